// Blocks of an estimator for whole sequences, with bf16 weights packed in panels.
#include <algorithm>
#include <cmath>
#include <vector>

#include "library.h"
#include "reference.h"

namespace tests {
namespace {

// A bf16 layer in panels of 64 outputs, [inputs / 2][64][2].
struct Panels {
  Layer layer;
  std::vector<uint16_t> packed;
  Panels(int64_t outputs, int64_t inputs, bool with_bias) : layer(BF16, outputs, inputs, with_bias) {
    for (int64_t n = 0; n < outputs; n += 64)
      for (int64_t k = 0; k < inputs; k += 2)
        for (int64_t i = 0; i < 64; i++)
          for (int64_t j = 0; j < 2; j++) packed.push_back(layer.halves[(n + i) * inputs + k + j]);
  }
  Dense dense() const {
    return {packed.data(), layer.bias.empty() ? nullptr : layer.bias.data(), layer.outputs, layer.inputs};
  }
};

}  // namespace

void transformer(const std::string& level, int64_t batch, int64_t length, int64_t heads, bool masked, int threads) {
  const int64_t hidden = 64, inner = 128, attended = heads * 64;
  const Panels qkv(3 * attended, hidden, masked), o(hidden, attended, true), up(inner, hidden, true),
      down(hidden, inner, true);
  const std::vector<float> norm1 = normals(hidden), norm2 = normals(hidden), bias1 = normals(hidden),
                           bias2 = normals(hidden), x = normals(batch * length * hidden);
  std::vector<float> mask(batch * length, 0.0f), y(x.size() + 1, 77.0f);
  for (int64_t j = length / 2; masked && j < length - 1; j++) mask[j] = -1e10f;

  std::vector<double> expected;
  for (int64_t n = 0; n < batch; n++) {
    const std::vector<double> own(x.begin() + n * length * hidden, x.begin() + (n + 1) * length * hidden);
    const std::vector<double> made = qkv.layer(normed(own, hidden, norm1, bias1, 1e-5, true));
    std::vector<double> gathered(length * attended);
    for (int64_t h = 0; h < heads; h++)
      for (int64_t r = 0; r < length; r++) {
        std::vector<double> scores(length);
        double peak = -1e300, sum = 0;
        for (int64_t j = 0; j < length; j++) {
          for (int64_t i = 0; i < 64; i++)
            scores[j] += made[r * 3 * attended + h * 64 + i] * made[j * 3 * attended + attended + h * 64 + i] * 0.125;
          scores[j] += mask[n * length + j];
          peak = std::max(peak, scores[j]);
        }
        for (double& score : scores) sum += score = std::exp(score - peak);
        for (int64_t j = 0; j < length; j++)
          for (int64_t i = 0; i < 64; i++)
            gathered[r * attended + h * 64 + i] += scores[j] / sum * made[j * 3 * attended + 2 * attended + h * 64 + i];
      }
    std::vector<double> after = o.layer(gathered);
    for (size_t i = 0; i < after.size(); i++) after[i] += own[i];
    std::vector<double> wider = up.layer(normed(after, hidden, norm2, bias2, 1e-5, true));
    for (double& one : wider) one = one * 0.5 * (1 + std::erf(one / std::sqrt(2.0)));
    const std::vector<double> last = down.layer(wider);
    for (size_t i = 0; i < after.size(); i++) expected.push_back(after[i] + last[i]);
  }
  TransformerBlock block = {};
  block.hidden = hidden, block.heads = heads, block.inner = inner, block.eps1 = block.eps2 = 1e-5, block.scaling = 0.125;
  block.norm1 = norm1.data(), block.norm1_bias = bias1.data(), block.norm2 = norm2.data(), block.norm2_bias = bias2.data();
  block.qkv = qkv.dense(), block.o = o.dense(), block.up = up.dense(), block.down = down.dense();
  const TransformerCall call = {x.data(), y.data(), masked ? mask.data() : nullptr, batch, length};
  const std::string what = level + ": a sequence of " + std::to_string(length) + " through a transformer's block";
  expect(accelerate_tts_transformer_block(&block, &call, threads), 0, what);
  expect(distance(expected, y.data()), 1e-2, what);
  expect(std::fabs(y.back() - 77.0f), 0, what + ": behind the end");
}

void residual(const std::string& level, int64_t batch, int64_t length, int64_t channels, int64_t outputs, int threads) {
  const Panels first(outputs, 3 * channels, true), second(outputs, 3 * outputs, true), beside(outputs, channels, true);
  const std::vector<float> norm1 = normals(outputs), norm2 = normals(outputs), bias1 = normals(outputs),
                           bias2 = normals(outputs), x = normals(batch * channels * length), time = normals(batch * outputs);
  std::vector<float> mask(batch * length, 1.0f), y(batch * outputs * length + 1, 77.0f);
  for (int64_t j = length - length / 4; j < length; j++) mask[j] = 0.0f;
  std::vector<double> expected(batch * outputs * length);
  for (int64_t n = 0; n < batch; n++) {
    auto convolved = [&](const std::vector<double>& frames, int64_t width, const Panels& layer,
                         const std::vector<float>& norm, const std::vector<float>& bias) {
      std::vector<double> three;
      for (int64_t r = 0; r < length; r++)
        for (int64_t past = 2; past >= 0; past--)
          for (int64_t i = 0; i < width; i++) three.push_back(r >= past ? frames[(r - past) * width + i] : 0.0);
      std::vector<double> made = normed(layer.layer(three), outputs, norm, bias, 1e-5, true);
      for (size_t i = 0; i < made.size(); i++)
        made[i] *= std::tanh(std::log1p(std::exp(made[i]))) * mask[n * length + i / outputs];
      return made;
    };
    std::vector<double> frames(length * channels);
    for (int64_t r = 0; r < length; r++)
      for (int64_t i = 0; i < channels; i++) frames[r * channels + i] = x[(n * channels + i) * length + r] * mask[n * length + r];
    std::vector<double> between = convolved(frames, channels, first, norm1, bias1);
    for (size_t i = 0; i < between.size(); i++)
      between[i] = (between[i] + time[n * outputs + i % outputs]) * mask[n * length + i / outputs];
    const std::vector<double> last = convolved(between, outputs, second, norm2, bias2), aside = beside.layer(frames);
    for (int64_t r = 0; r < length; r++)
      for (int64_t i = 0; i < outputs; i++)
        expected[(n * outputs + i) * length + r] = last[r * outputs + i] + aside[r * outputs + i];
  }
  ResidualBlock block = {};
  block.channels = channels, block.outputs = outputs, block.eps1 = block.eps2 = 1e-5;
  block.norm1 = norm1.data(), block.norm1_bias = bias1.data(), block.norm2 = norm2.data(), block.norm2_bias = bias2.data();
  block.first = first.dense(), block.second = second.dense(), block.beside = beside.dense();
  const ResidualCall call = {x.data(), y.data(), mask.data(), time.data(), batch, length};
  const std::string what = level + ": a sequence of " + std::to_string(length) + " through a residual block";
  expect(accelerate_tts_residual_block(&block, &call, threads), 0, what);
  expect(distance(expected, y.data()), 1e-2, what);
  expect(std::fabs(y.back() - 77.0f), 0, what + ": behind the end");
}

}  // namespace tests
