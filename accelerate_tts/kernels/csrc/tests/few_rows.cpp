// Linear layers with one to nine rows, in all formats and odd shapes.
#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

#include "library.h"
#include "reference.h"

namespace tests {

void few_rows(const std::string& level) {
  const char* names[] = {"fp32", "bf16", "int8", "transposed"};
  for (int format = FP32; format <= TRANSPOSED; format++)
    for (int64_t rows = 1; rows <= 9; rows++)
      for (const auto& [outputs, inputs] : std::vector<std::pair<int64_t, int64_t>>{
               {1, 1}, {3, 5}, {17, 31}, {64, 64}, {67, 130}, {33, 257}, {140, 512}})
        for (int threads = 1; threads <= 3; threads++) {
          const Layer layer(Format(format), outputs, inputs, rows % 2);
          const std::vector<float> x = normals(rows * inputs);
          std::vector<float> y(rows * outputs + 1, 77.0f);
          const Linear told = layer.linear();
          const int code = accelerate_tts_skinny_linear(format, x.data(), told.w, told.scale, told.bias, y.data(), rows,
                                                        outputs, inputs, threads);
          const std::string what = level + " " + names[format] + " " + std::to_string(rows) + " rows, " +
                                   std::to_string(outputs) + " x " + std::to_string(inputs);
          expect(code, 0, what);
          const double limit = inputs == 1 ? 1e-5 : 2e-6;  // one product and a bias may cancel each other
          expect(distance(layer(wide(x)), y.data()), format == INT8 ? 3e-4 : limit, what);
          expect(std::fabs(y.back() - 77.0f), 0, what + ": behind the end");
        }
  // A row's result does not depend on the rows beside it, nor on their number, in a single bit.
  for (int format = FP32; format <= TRANSPOSED; format++)
    for (const auto& [outputs, inputs] : std::vector<std::pair<int64_t, int64_t>>{
             {1, 1}, {3, 5}, {17, 31}, {64, 64}, {67, 130}, {33, 257}, {140, 512}, {77, 1024}})
      for (int threads = 1; threads <= 3; threads++) {
        const Layer layer(Format(format), outputs, inputs, outputs % 2);
        const std::vector<float> x = normals(8 * inputs);
        const Linear told = layer.linear();
        std::vector<float> all(8 * outputs), some(8 * outputs);
        accelerate_tts_skinny_linear(format, x.data(), told.w, told.scale, told.bias, all.data(), 8, outputs, inputs,
                                     threads);
        for (int64_t rows = 1; rows <= 8; rows++)
          for (int64_t first = 0; first + rows <= 8; first++) {
            accelerate_tts_skinny_linear(format, &x[first * inputs], told.w, told.scale, told.bias, some.data(), rows,
                                         outputs, inputs, threads);
            expect(memcmp(some.data(), &all[first * outputs], rows * outputs * sizeof(float)) != 0, 0,
                   level + " " + names[format] + " " + std::to_string(rows) + " rows differ from eight, " +
                       std::to_string(outputs) + " x " + std::to_string(inputs));
          }
      }
  // A row that is not finite stays so, and changes no other row.
  for (int format = FP32; format <= TRANSPOSED; format++)
    for (float value : {NAN, INFINITY, -INFINITY}) {
      const Layer layer(Format(format), 5, 70, false);
      std::vector<float> x = normals(2 * 70), y(10);
      x[70 + 40] = value;
      const Linear told = layer.linear();
      accelerate_tts_skinny_linear(format, x.data(), told.w, told.scale, nullptr, y.data(), 2, 5, 70, 1);
      for (int n = 0; n < 5; n++) {
        expect(std::isfinite(y[n]) ? 0 : 1, 0, level + ": a row beside one that is not finite");
        expect(std::isfinite(y[5 + n]) ? 1 : 0, 0, level + ": a row that is not finite");
      }
    }
}

}  // namespace tests
