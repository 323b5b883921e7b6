// Common to the kernels for whole sequences: products of panels, and the operations between them.
//
// Products are in bf16 with sums in fp32: by AMX's tiles, by AVX-512's products of bf16, or in fp32 with what is wide
// enough. They are of 16, 32, 48 or 64 rows, of inputs in multiples of 32, and of 64 or 256 columns.
#pragma once
#include "common.h"
#include "simd.h"
#include "threads.h"
#include "tiles.h"

namespace KERNELS_LEVEL {

constexpr int64_t PANEL = 64, ROWS = 64;

// c[rows][columns] (+)= a[rows][inputs] of a panel, [inputs / 2][columns][2]; rows of `a` lie `stride` apart.
// Rows are a multiple of 16, columns of 64, inputs of 32.
void multiply_panel(const bf16* a, int64_t stride, const bf16* panel, int64_t columns, int64_t rows, int64_t inputs,
                    bool add, float* c);

namespace {

// Sixteen numbers at a time: compilers for any processor make of it what it has.
typedef float floats __attribute__((vector_size(64)));
typedef uint32_t bits32 __attribute__((vector_size(64)));
typedef bf16 narrows __attribute__((vector_size(32)));
constexpr int64_t AT_ONCE = 16;

inline floats read(const float* p) { return load_as<floats>(p); }

// To the nearest, ties to even, of what is a number or the processor's own NaN.
inline narrows round_to_bf16(floats v) {
#if defined(__AVX512BF16__)
  return (narrows)_mm512_cvtneps_pbh((__m512)v);
#else
  bits32 bits = (bits32)v;
  bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return __builtin_convertvector(bits, narrows);
#endif
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
  return (floats)((bits32)p + ((bits32)shifted << 23));
}

// How a sequence is cut: as few pieces as fit into a cache, but as many as keep all threads at work.
inline int64_t rows_of_a_piece(int64_t batch, int64_t length, int64_t threads) {
  const int64_t fewest = (length + ROWS - 1) / ROWS;
  int64_t pieces = fewest;
  while (batch * pieces % threads && pieces < 2 * fewest) pieces++;
  return least(ROWS, up_to((length + pieces - 1) / pieces, 16));
}

template <class T>
void layer_norm(const float* x, const float* weight, const float* bias, float eps, int64_t size, T* y) {
  float sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < size; i++) sum += x[i];
  const float mean = sum / float(size);
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < size; i++) squares += (x[i] - mean) * (x[i] - mean);
  const float factor = 1.0f / sqrtf(squares / float(size) + eps);
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

// Pieces of work, shared out in order.
template <class Work>
inline void each(Team team, int64_t count, const Work& work) {
  for (int64_t i = count * team.me / team.all; i < count * (team.me + 1) / team.all; i++) work(i);
}

}  // namespace
}  // namespace KERNELS_LEVEL
