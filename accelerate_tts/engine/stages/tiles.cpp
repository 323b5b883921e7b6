// What the kernels for whole sequences have in common: products by AMX, and what goes on between them.
//
// Products are in bf16 with sums in fp32, by oneDNN's kernels (which torch has in it). oneDNN makes and keeps one for
// each shape that it meets, and sequences have any length: so products are of 16, 32, 48 or 64 rows.
// Built behind block.cpp, whose `narrow` and `bf16` it uses.
#if defined(__AMX_BF16__)
#include <ATen/native/CPUBlas.h>
#endif

// Filled in by tiles.py.
struct Dense {
  const bf16* w;  // in panels of 64 outputs, each [inputs / 2][64][2]
  const float* bias;
  int64_t outputs, inputs;
};

namespace {

constexpr int64_t PANEL = 64, ROWS = 64;

bool has_amx() {
#if defined(__AMX_BF16__)
  static const bool has = at::native::cpublas::could_pack(at::kBFloat16);
  return has;
#else
  return false;
#endif
}

// c[rows][columns] (+)= a[rows][inputs] of a panel, [inputs / 2][columns][2]
void multiply_panel(const bf16* a, int64_t stride, const bf16* panel, int64_t columns, int64_t rows, int64_t inputs,
                    bool add, float* c) {
#if defined(__AMX_BF16__)
  if (has_amx()) {
    at::native::cpublas::brgemm(rows, columns, inputs, stride, columns, columns, add,
                                reinterpret_cast<const at::BFloat16*>(a),
                                reinterpret_cast<const at::BFloat16*>(panel), c, true);
    return;
  }
#endif
  for (int64_t m = 0; m < rows; m++) {
    float* to = c + m * columns;
    if (!add) memset(to, 0, columns * sizeof(float));
    for (int64_t k = 0; k < inputs; k++) {
      const float one = widen(a[m * stride + k]);
      const bf16* from = panel + k / 2 * columns * 2 + k % 2;
#pragma omp simd
      for (int64_t n = 0; n < columns; n++) to[n] += one * widen(from[2 * n]);
    }
  }
}

void release() {
#if defined(__AMX_BF16__)
  if (has_amx()) at::native::cpublas::brgemm_release(true);
#endif
}

// Sixteen numbers at a time: compilers for any processor make of it what it has.
typedef float floats __attribute__((vector_size(64)));
typedef uint32_t words __attribute__((vector_size(64)));
typedef bf16 halves __attribute__((vector_size(32)));
constexpr int64_t AT_ONCE = 16;

inline floats read(const float* p) {
  floats v;
  memcpy(&v, p, sizeof v);
  return v;
}
template <class V, class T>
inline void write(T* p, V v) {
  memcpy(p, &v, sizeof v);
}

// To the nearest, ties to even, of what is a number or the processor's own NaN.
inline halves round_to_bf16(floats v) {
#if defined(__AVX512BF16__)
  return (halves)_mm512_cvtneps_pbh((__m512)v);
#endif
  words bits = (words)v;
  bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return __builtin_convertvector(bits, halves);
}

// 2 to the x, for x up to 127, to 5e-5: it is rounded to bf16, which has 4e-3.
inline floats quick_exp2(floats x) {
  x = x < -126.0f ? floats{} - 126.0f : x;  // NaN stays
  const floats shifted = x + 12582912.0f;    // 1.5 * 2^23: the nearest integer is in the low bits
  const floats r = x - (shifted - 12582912.0f);
  floats p = floats{} + 9.6181291e-3f;
  p = p * r + 5.5504109e-2f;
  p = p * r + 2.4022651e-1f;
  p = p * r + 6.9314718e-1f;
  p = p * r + 1.0f;
  return (floats)((words)p + ((words)shifted << 23));
}

inline int64_t up_to(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// How a sequence is cut: as few pieces as fit into a cache, but as many as keep all threads at work.
int64_t rows_of_a_piece(int64_t batch, int64_t length, int64_t threads) {
  const int64_t fewest = (length + ROWS - 1) / ROWS;
  int64_t pieces = fewest;
  while (batch * pieces % threads && pieces < 2 * fewest) pieces++;
  return std::min(ROWS, up_to((length + pieces - 1) / pieces, 16));
}

template <class T>
void grow(std::vector<T>& buffer, size_t size) {
  if (buffer.size() < size) buffer.resize(size);
}

template <class T>
void layer_norm(const float* x, const float* weight, const float* bias, float eps, int64_t size, T* y) {
  float sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < size; i++) sum += x[i];
  const float mean = sum / float(size);
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < size; i++) squares += (x[i] - mean) * (x[i] - mean);
  const float factor = 1.0f / std::sqrt(squares / float(size) + eps);
#pragma omp simd
  for (int64_t i = 0; i < size; i++) put(y + i, (x[i] - mean) * factor * weight[i] + bias[i]);
}

// c[rows][64] of `layer`, 64 outputs after the other; `then` is told which, and their biases. Rows of `a` lie `stride`
// apart: less than the inputs where each begins in the one before.
template <class Then>
void multiply(const Dense& layer, const bf16* a, int64_t stride, int64_t rows, float* c, Then then) {
  for (int64_t n = 0; n < layer.outputs; n += PANEL) {
    multiply_panel(a, stride, layer.w + n * layer.inputs, PANEL, up_to(rows, 16), layer.inputs, false, c);
    then(n, layer.bias ? layer.bias + n : nullptr);
  }
}

}  // namespace

extern "C" int multiplies_in_bf16() { return has_amx(); }
