#include "reference.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>

namespace tests {
namespace {

std::mt19937 generator(1);
float normal(float scale = 1) { return std::normal_distribution<float>(0, scale)(generator); }
uint16_t narrow(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
float widen(uint16_t value) {
  const uint32_t bits = uint32_t(value) << 16;
  float wide;
  memcpy(&wide, &bits, sizeof wide);
  return wide;
}

}  // namespace

std::vector<float> normals(size_t count, float scale) {
  std::vector<float> made(count);
  for (float& one : made) one = normal(scale);
  return made;
}

int failures = 0;
void expect(double error, double limit, const std::string& what) {
  if (error <= limit) return;  // a NaN is more than any limit
  std::printf("FAILED %s: %g, more than %g\n", what.c_str(), error, limit);
  failures++;
}
double distance(const std::vector<double>& expected, const float* found) {
  double difference = 0, size = 0;
  for (size_t i = 0; i < expected.size(); i++) {
    difference += (expected[i] - found[i]) * (expected[i] - found[i]);
    size += expected[i] * expected[i];
  }
  return std::sqrt(difference / std::max(size, 1e-30));
}

Layer::Layer(Format format, int64_t outputs, int64_t inputs, bool with_bias)
    : outputs(outputs), inputs(inputs), truth(outputs * inputs), format(format) {
  if (with_bias) bias = normals(outputs);
  if (format == INT8) scale = normals(outputs, 0.06f / std::sqrt(float(inputs)));
  for (int64_t n = 0; n < outputs; n++)
    for (int64_t k = 0; k < inputs; k++) {
      const float value = normal(1 / std::sqrt(float(inputs)));
      float& kept = truth[n * inputs + k] = value;
      if (format == BF16) {
        halves.push_back(narrow(value));
        kept = widen(halves.back());
      } else if (format == INT8) {
        bytes.push_back(int8_t(int(generator() % 255) - 127));
        kept = bytes.back() * scale[n];
      }
    }
  if (format == FP32) wide = truth;
  if (format == TRANSPOSED) {
    wide.resize(truth.size());
    for (int64_t n = 0; n < outputs; n++)
      for (int64_t k = 0; k < inputs; k++) wide[k * outputs + n] = truth[n * inputs + k];
  }
}
std::vector<double> Layer::operator()(const std::vector<double>& x) const {
  const int64_t rows = int64_t(x.size()) / inputs;
  std::vector<double> y(rows * outputs);
  for (int64_t m = 0; m < rows; m++)
    for (int64_t n = 0; n < outputs; n++) {
      double sum = bias.empty() ? 0 : bias[n];
      for (int64_t k = 0; k < inputs; k++) sum += x[m * inputs + k] * truth[n * inputs + k];
      y[m * outputs + n] = sum;
    }
  return y;
}

std::vector<double> wide(const std::vector<float>& x) { return {x.begin(), x.end()}; }

std::vector<double> normed(const std::vector<double>& x, int64_t size, const std::vector<float>& weight,
                           const std::vector<float>& bias, double eps, bool layer_norm) {
  std::vector<double> y(x.size());
  for (size_t m = 0; m < x.size() / size; m++) {
    double mean = 0, squares = 0;
    if (layer_norm)
      for (int64_t i = 0; i < size; i++) mean += x[m * size + i] / double(size);
    for (int64_t i = 0; i < size; i++) squares += (x[m * size + i] - mean) * (x[m * size + i] - mean);
    for (int64_t i = 0; i < size; i++)
      y[m * size + i] = (x[m * size + i] - mean) / std::sqrt(squares / double(size) + eps) * weight[i] +
                        (bias.empty() ? 0 : bias[i]);
  }
  return y;
}

}  // namespace tests
