// Residual blocks of causal convolutions along time: twice a convolution of three frames, a norm and Mish, and a
// convolution of one frame beside them.
//
// With time as rows and channels next to each other, three frames are one row of three times as many numbers, which
// begins in the row before: a convolution is a product as it lies there, without a copy. Two zero rows before the first
// are what a causal convolution sees of the past. Products are in bf16; norms, Mish and what is added up are in fp32.
#include <new>

#include "kernels.h"
#include "packed_gemm.h"

namespace KERNELS_LEVEL {
namespace {

constexpr int64_t PAST = 2;  // frames that a causal convolution of three sees before a frame

// Memory shared by threads, and memory of each; kept between calls. Rows behind a sequence's end are computed and never
// read.
struct Frames {
  Buffer<bf16> given, between;  // [batch][past + length][channels] and [outputs], and room for a last piece
  Buffer<float> wide;           // of each thread
  int64_t wide_size;

  bool fit(const ResidualBlock& b, const ResidualCall& call, int threads) {
    const int64_t rows = call.batch * (PAST + call.length) + ROWS;
    wide_size = ROWS * most(b.channels, b.outputs);
    return given.fit(rows * b.channels) && between.fit(rows * b.outputs) && wide.fit(threads * wide_size);
  }
};

// x * tanh(log(1 + exp(x))), to 1e-4 of it
inline floats mish(floats x) {
  const floats e = quick_exp2((x > 20.0f ? floats{} + 20.0f : x) * 1.44269504f);
  const floats n = e * (e + 2.0f);
  return x * (n / (n + 2.0f));
}

// A convolution of `rows` frames from `begin`, its norm and Mish, times the mask: [rows][outputs] in `wide`.
void convolve(const Dense& layer, const bf16* frames, int64_t channels, const float* norm, const float* bias, float eps,
              const float* mask, int64_t rows, int64_t outputs, float* wide, float* c) {
  multiply(layer, frames, channels, rows, c, [&](int64_t at, const float* added) {
    for (int64_t r = 0; r < rows; r++)
      for (int64_t i = 0; i < PANEL; i += AT_ONCE)
        store(wide + r * outputs + at + i, read(c + r * PANEL + i) + (added ? read(added + i) : floats{}));
  });
  for (int64_t r = 0; r < rows; r++) {
    float* line = wide + r * outputs;
    layer_norm(line, norm, bias, eps, outputs, line);
    for (int64_t i = 0; i < outputs; i += AT_ONCE) store(line + i, mish(read(line + i)) * mask[r]);
  }
}

}  // namespace

int residual_block(const ResidualBlock& b, const ResidualCall& call, int threads) {
  Borrowed<Frames> borrowed;
  if (!borrowed.get() || !borrowed.get()->fit(b, call, threads)) return NO_MEMORY;
  Frames& s = *borrowed.get();
  const int64_t length = call.length, size = rows_of_a_piece(call.batch, length, threads);
  const int64_t pieces = (length + size - 1) / size, tasks = call.batch * pieces;
  in_team(threads, [&](Team team) {
    const Tiles tiles;
    float* wide = s.wide.data() + team.me * s.wide_size;
    alignas(64) float c[ROWS * PANEL];
    each(team, tasks, [&](int64_t task) {
      const int64_t n = task / pieces, begin = task % pieces * size, rows = least(size, length - begin);
      bf16* to = s.given.data() + (n * (PAST + length) + PAST + begin) * b.channels;
      if (begin == 0) {
        memset(to - PAST * b.channels, 0, PAST * b.channels * sizeof(bf16));
        memset(s.between.data() + n * (PAST + length) * b.outputs, 0, PAST * b.outputs * sizeof(bf16));
      }
      const float *from = call.x + n * b.channels * length + begin, *mask = call.mask + n * length + begin;
      for (int64_t i = 0; i < b.channels; i++)  // along time as it lies there, and turned in the cache
        for (int64_t r = 0; r < rows; r++) wide[r * b.channels + i] = from[i * length + r] * mask[r];
      for (int64_t i = 0; i < rows * b.channels; i++) to[i] = narrow(wide[i]);
    });
    team.barrier();
    each(team, tasks, [&](int64_t task) {
      const int64_t n = task / pieces, begin = task % pieces * size, rows = least(size, length - begin);
      const float *mask = call.mask + n * length + begin, *time = call.time + n * b.outputs;
      convolve(b.first, s.given.data() + (n * (PAST + length) + begin) * b.channels, b.channels, b.norm1, b.norm1_bias,
               float(b.eps1), mask, rows, b.outputs, wide, c);
      bf16* to = s.between.data() + (n * (PAST + length) + PAST + begin) * b.outputs;
      for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < b.outputs; i += AT_ONCE)
          store(to + r * b.outputs + i, round_to_bf16((read(wide + r * b.outputs + i) + read(time + i)) * mask[r]));
    });
    team.barrier();
    each(team, tasks, [&](int64_t task) {
      const int64_t n = task / pieces, begin = task % pieces * size, rows = least(size, length - begin);
      convolve(b.second, s.between.data() + (n * (PAST + length) + begin) * b.outputs, b.outputs, b.norm2,
               b.norm2_bias, float(b.eps2), call.mask + n * length + begin, rows, b.outputs, wide, c);
      const bf16* now = s.given.data() + (n * (PAST + length) + PAST + begin) * b.channels;
      multiply(b.beside, now, b.channels, rows, c, [&](int64_t at, const float* added) {
        for (int64_t i = 0; i < PANEL; i++) {
          float* to = call.y + (n * b.outputs + at + i) * length + begin;
          for (int64_t r = 0; r < rows; r++)
            to[r] = wide[r * b.outputs + at + i] + c[r * PANEL + i] + (added ? added[i] : 0.0f);
        }
      });
    });
  });
  return 0;
}

}  // namespace KERNELS_LEVEL
