// Random inputs, plain scalar computations in double, and the check of a result against them.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "../abi.h"

namespace tests {

std::vector<float> normals(size_t count, float scale = 1);

// Checks that failed so far.
extern int failures;
// Counts and prints a failure if the error is larger than the limit, or NaN.
void expect(double error, double limit, const std::string& what);
// Relative error in the Euclidean norm.
double distance(const std::vector<double>& expected, const float* found);

// A linear layer in one of the four formats. `truth` has the weights that the format represents.
struct Layer {
  int64_t outputs, inputs;
  std::vector<float> truth, bias, scale, wide;
  std::vector<uint16_t> halves;
  std::vector<int8_t> bytes;
  Format format;
  Layer(Format format, int64_t outputs, int64_t inputs, bool with_bias);
  const void* data() const {
    return format == BF16 ? static_cast<const void*>(halves.data())
                          : format == INT8 ? static_cast<const void*>(bytes.data()) : wide.data();
  }
  Linear linear() const {
    return {data(), scale.empty() ? nullptr : scale.data(), bias.empty() ? nullptr : bias.data(), outputs, inputs};
  }
  std::vector<double> operator()(const std::vector<double>& x) const;
};

std::vector<double> wide(const std::vector<float>& x);

// LayerNorm or RMSNorm of rows of `size` numbers.
std::vector<double> normed(const std::vector<double>& x, int64_t size, const std::vector<float>& weight,
                           const std::vector<float>& bias, double eps, bool layer_norm);

}  // namespace tests
