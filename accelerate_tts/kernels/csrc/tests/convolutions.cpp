// Convolutions along time in fewer products: every tiling, layouts, phases, pieces, and what is added at the end.
#include <algorithm>
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "library.h"
#include "reference.h"

namespace tests {
namespace {

// Of its own, so that the other kernels' inputs stay those for which their limits are.
std::mt19937 generator(2);
std::vector<float> numbers(size_t count, float scale = 1) {
  std::vector<float> made(count);
  for (float& value : made) value = std::normal_distribution<float>(0, scale)(generator);
  return made;
}

const double POINTS[] = {0, 1, -1, 2, -2, 0.5, -0.5};

// The matrices of a tiling, as toom_cook.py makes them but for factors of two.
struct Tiling {
  int64_t taps, frames, chunks, points;
  std::vector<double> weight;
  std::vector<float> before, after;
  Tiling(int64_t taps, int64_t frames, int64_t chunks)
      : taps(taps), frames(frames), chunks(chunks), points(taps + frames - 1), weight(points * taps),
        before(points * points), after(frames * points) {
    for (int64_t p = 0; p < points; p++) {
      std::vector<double> product = {1};  // of x - other, the lowest power first
      double scale = 1;
      for (int64_t q = 0; q < points - 1; q++) {
        if (q == p) continue;
        std::vector<double> higher(product.size() + 1);
        for (size_t i = 0; i < product.size(); i++) {
          higher[i + 1] += product[i];
          higher[i] -= POINTS[q] * product[i];
        }
        product = higher;
        if (p < points - 1) scale *= POINTS[p] - POINTS[q];
      }
      for (size_t i = 0; i < product.size(); i++) before[p * points + i] = float(product[i]);
      const bool infinite = p == points - 1;
      for (int64_t k = 0; k < taps; k++)
        weight[p * taps + k] = infinite ? k == taps - 1 : std::pow(POINTS[p], double(k)) / scale;
      for (int64_t f = 0; f < frames; f++)
        after[f * points + p] = infinite ? f == frames - 1 : float(std::pow(POINTS[p], double(f)));
    }
  }
};

struct Case {
  int64_t batch, outputs, inputs, taps, dilation, padding, length;
  bool biased, last, sliced;
  int plus;  // 0 nothing, 1 is added, 2 is the result's own memory
  double slope;
};

void one(const std::string& level, const Tiling& t, const Case& c, int threads) {
  const int64_t outputs = (c.outputs + 31) / 32 * 32, results = c.length + 2 * c.padding - c.dilation * (c.taps - 1);
  const std::vector<float> weight = numbers(c.outputs * c.inputs * c.taps, 1 / std::sqrt(float(c.inputs * c.taps)));
  std::vector<float> bias = c.biased ? numbers(outputs) : std::vector<float>();
  std::vector<float> packed(outputs * t.points * t.chunks * c.inputs);
  for (int64_t n = 0; n < c.outputs; n++)
    for (int64_t p = 0; p < t.points; p++)
      for (int64_t chunk = 0; chunk < t.chunks; chunk++)
        for (int64_t k = 0; k < c.inputs; k++) {
          double sum = 0;
          for (int64_t i = 0; i < t.taps && chunk * t.taps + i < c.taps; i++)
            sum += t.weight[p * t.taps + i] * weight[(n * c.inputs + k) * c.taps + chunk * t.taps + i];
          packed[(((n / 32 * t.points + p) * t.chunks + chunk) * c.inputs + k) * 32 + n % 32] = float(sum);
        }
  // Signals and results lie within other numbers: NaN, which nobody may read, and 77, which nobody may write.
  const int64_t more = c.sliced ? 5 : 0, border = 40;
  ConvolutionCall call = {};
  call.slope = c.slope, call.batch = c.batch, call.length = c.length, call.outputs = c.outputs, call.results = results;
  call.x_channel = c.last ? 1 : c.length + more, call.x_frame = c.last ? c.inputs + more : 1;
  call.x_batch = (c.length + more) * (c.inputs + more);
  call.y_channel = c.last ? 1 : results + more, call.y_frame = c.last ? c.outputs + more : 1;
  call.y_batch = (results + more) * (c.outputs + more);
  std::vector<float> x(c.batch * call.x_batch + 2 * border, NAN), y(c.batch * call.y_batch + 2 * border, 77.0f);
  const std::vector<float> random = numbers(x.size()), added = numbers(y.size());
  std::vector<float> plus = y;
  std::vector<double> expected, found_at;
  for (int64_t b = 0; b < c.batch; b++) {
    for (int64_t k = 0; k < c.inputs; k++)
      for (int64_t f = 0; f < c.length; f++) {
        const int64_t at = border + b * call.x_batch + k * call.x_channel + f * call.x_frame;
        x[at] = random[at];
      }
    for (int64_t n = 0; n < c.outputs; n++)
      for (int64_t r = 0; r < results; r++) {
        double sum = c.biased ? bias[n] : 0;
        for (int64_t i = 0; i < c.taps; i++) {
          const int64_t f = r + c.dilation * i - c.padding;
          if (f < 0 || f >= c.length) continue;
          for (int64_t k = 0; k < c.inputs; k++)
            sum += double(weight[(n * c.inputs + k) * c.taps + i]) *
                   x[border + b * call.x_batch + k * call.x_channel + f * call.x_frame];
        }
        const int64_t at = border + b * call.y_batch + n * call.y_channel + r * call.y_frame;
        plus[at] = added[at];
        if (c.plus == 2) y[at] = added[at];
        if (c.plus) sum += added[at];
        expected.push_back(sum < 0 ? sum * c.slope : sum);
        found_at.push_back(double(at));
      }
  }
  call.x = x.data() + border, call.y = y.data() + border;
  call.plus = c.plus == 0 ? nullptr : c.plus == 1 ? plus.data() + border : call.y;
  const ShortConvolution layer = {packed.data(), c.biased ? bias.data() : nullptr, t.before.data(), t.after.data(),
                                  outputs, c.inputs, t.points, t.frames, t.chunks, c.dilation, c.padding};
  const std::string what = level + ": a convolution of " + std::to_string(c.taps) + " taps by " +
                           std::to_string(t.frames) + " frames, " + std::to_string(c.inputs) + " to " +
                           std::to_string(c.outputs) + " channels, " + std::to_string(c.length) + " frames, dilation " +
                           std::to_string(c.dilation) + (c.last ? ", channels last" : "");
  expect(accelerate_tts_short_convolution(&layer, &call, threads), 0, what);
  std::vector<float> found;
  for (double at : found_at) {
    found.push_back(y[size_t(at)]);
    y[size_t(at)] = 77.0f;
  }
  expect(distance(expected, found.data()), 5e-6, what);
  expect(double(std::count_if(y.begin(), y.end(), [](float value) { return value != 77.0f; })), 0, what + ": beside it");
}

}  // namespace

void convolutions(const std::string& level) {
  int number = 0;
  const auto next = [&](const Tiling& t, int64_t taps, int64_t inputs, int64_t outputs, int64_t dilation, int64_t length) {
    number++;
    const Case c = {1 + number % 3, outputs, inputs, taps, dilation, number % 7, length, number % 2 == 0, number % 4 < 2,
                    number % 3 == 0, number % 3, number % 5 ? 1.0 : 0.1};
    one(level, t, c, 1 + number % 3);
  };
  // Each tile that there are points for, 3 to 8.
  for (int64_t taps = 1; taps <= 8; taps++)
    for (int64_t frames = 1; frames <= 8; frames++)
      if (taps + frames >= 4 && taps + frames <= 9)
        next(Tiling(taps, frames, 1), taps, taps % 2 ? 17 : 32, frames % 2 ? 33 : 64, 1 + frames % 3, 60);
  // Several chunks, of which the last may be a part.
  for (int64_t taps : {7, 8, 9, 11, 16, 23})
    for (int64_t dilation : {1, 3, 16})
      next(Tiling(4, 4, (taps + 3) / 4), taps, 31 + taps % 3, 70, dilation, dilation * taps + 40);
  // Lengths of a result, about tiles and what a thread computes at once.
  for (int64_t results : {1, 2, 5, 6, 7, 35, 36, 37, 71, 72, 73, 500})
    for (int64_t inputs : {5, 16, 48}) next(Tiling(3, 6, 1), 3, inputs, 32, 2, results + 4);
  // Several pieces for each thread.
  for (int64_t taps : {7, 11})
    for (int64_t dilation : {1, 5}) next(Tiling(4, 4, (taps + 3) / 4), taps, 96, 40, dilation, 2500);
}

}  // namespace tests
