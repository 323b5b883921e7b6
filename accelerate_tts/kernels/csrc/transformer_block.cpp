// Blocks of a transformer over a whole sequence that sees itself both ways: norm, attention, norm, feed-forward.
//
// A flow's estimator runs dozens of small ones at each step of its solver. In eager PyTorch two thirds of such a block
// are attention and what lies between the products. Here a block is one call: rows go from a norm to the end of what
// needs no other row, in pieces that stay in a core's cache, and threads meet twice. Products are in bf16; norms,
// softmax, GELU and what is added up are in fp32.

#include <new>

#include "kernels.h"
#include "packed_gemm.h"

namespace KERNELS_LEVEL {
namespace {

constexpr int64_t WIDE = 256;

// Keys are multiplied in wide panels as long as there are enough of them: how many are from `key` on.
inline int64_t panel_at(int64_t key, int64_t padded) { return key < padded / WIDE * WIDE ? WIDE : PANEL; }

// x * Phi(x), to 3e-5 of x: an odd polynomial for erf (least squares, Chebyshev nodes) within 3.2.
inline floats exact_gelu(floats x) {
  floats z = x * 0.70710678f;
  z = z > 3.2f ? floats{} + 3.2f : z;
  z = z < -3.2f ? floats{} - 3.2f : z;
  const floats u = z * z;
  floats p = floats{} - 2.29819324e-9f;
  p = p * u + 1.36962861e-7f;
  p = p * u - 3.63846476e-6f;
  p = p * u + 5.73340738e-5f;
  p = p * u - 6.03762144e-4f;
  p = p * u + 4.55389581e-3f;
  p = p * u - 2.57431463e-2f;
  p = p * u + 1.11773409e-1f;
  p = p * u - 3.75654695e-1f;
  p = p * u + 1.1283168f;
  return 0.5f * x * (1.0f + p * z);
}

// Memory shared by threads, and memory of each; kept between calls, as large as the longest sequence needed. Rows
// behind a sequence's end are computed and never read.
struct Workspace {
  int64_t padded, attended;  // keys and their values, up to whole panels; heads * 64
  Buffer<bf16> queries, keys, values, made;
  Buffer<float> seen;  // [batch][padded]: the mask, times log2(e), and next to minus infinity behind the end
  struct Own {  // pieces of one thread's memory
    bf16 *normed, *wide, *weights;
    float *after, *scores;
  };
  Buffer<bf16> narrow_room;
  Buffer<float> wide_room;
  int64_t narrow_size, wide_size;

  bool fit(const TransformerBlock& b, const TransformerCall& call, int threads) {
    padded = up_to(call.length, PANEL);
    attended = b.heads * PANEL;
    narrow_size = ROWS * (b.hidden + b.inner + padded);
    wide_size = ROWS * (b.hidden + padded);
    const int64_t rows = call.batch * call.length + ROWS, all = call.batch * padded * attended;
    return queries.fit(rows * attended) && made.fit(rows * attended) && keys.fit(all) && values.fit(all) &&
           seen.fit(call.batch * padded) && narrow_room.fit(threads * narrow_size) &&
           wide_room.fit(threads * wide_size);
  }

  Own of(const TransformerBlock& b, int64_t thread) const {
    bf16* narrow = narrow_room.data() + thread * narrow_size;
    float* wide = wide_room.data() + thread * wide_size;
    return {narrow, narrow + ROWS * b.hidden, narrow + ROWS * (b.hidden + b.inner), wide, wide + ROWS * b.hidden};
  }
};

// Queries as rows, in units of log2; keys and values as panels that other rows multiply.
void project(const TransformerBlock& b, const TransformerCall& call, Workspace& s, const Workspace::Own& own, int64_t n,
             int64_t begin, int64_t rows, float* c) {
  const float scaling = float(b.scaling * 1.4426950408889634);
  const int64_t row = n * call.length + begin;
  for (int64_t r = 0; r < rows; r++)
    layer_norm(call.x + (row + r) * b.hidden, b.norm1, b.norm1_bias, float(b.eps1), b.hidden,
               own.normed + r * b.hidden);
  multiply(b.qkv, own.normed, b.hidden, rows, c, [&](int64_t at, const float* bias) {
    if (bias)
      for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < PANEL; i++) c[r * PANEL + i] += bias[i];
    const int64_t head = n * b.heads + at % s.attended / PANEL;
    if (at < s.attended) {
      for (int64_t r = 0; r < rows; r++) {
        bf16* to = s.queries.data() + (row + r) * s.attended + at;
        for (int64_t i = 0; i < PANEL; i += AT_ONCE) store(to + i, round_to_bf16(read(c + r * PANEL + i) * scaling));
      }
    } else if (at < 2 * s.attended) {
      for (int64_t r = 0; r < rows; r++) {  // in panels, [32][256 or 64][2]
        bf16 line[PANEL];
        for (int64_t i = 0; i < PANEL; i += AT_ONCE) store(line + i, round_to_bf16(read(c + r * PANEL + i)));
        const int64_t key = begin + r, width = panel_at(key, s.padded);
        bf16* to = s.keys.data() + (head * s.padded + key / width * width) * PANEL + key % width * 2;
        for (int64_t i = 0; i < PANEL; i += 2) memcpy(to + i * width, line + i, 2 * sizeof(bf16));
      }
    } else {
      for (int64_t r = 0; r < rows; r += 2) {  // [padded / 2][64][2]; pieces begin at even rows
        bf16* to = s.values.data() + (head * s.padded + begin + r) * PANEL;
        const float *one = c + r * PANEL, *two = one + PANEL;
        for (int64_t i = 0; i < PANEL; i += AT_ONCE) {
          const bits32 low = __builtin_convertvector(round_to_bf16(read(one + i)), bits32);
          const bits32 high = __builtin_convertvector(round_to_bf16(read(two + i)), bits32);
          store(to + 2 * i, r + 1 < rows ? (high << 16 | low) : low);
        }
      }
    }
  });
}

// Values behind the end are multiplied by nearly zero, so they must be finite.
void pad(const TransformerBlock& b, const TransformerCall& call, Workspace& s, int64_t n, int64_t head) {
  bf16* keys = s.keys.data() + (n * b.heads + head) * s.padded * PANEL;
  bf16* values = s.values.data() + (n * b.heads + head) * s.padded * PANEL;
  for (int64_t key = call.length; key < s.padded; key++) {
    const int64_t width = panel_at(key, s.padded);
    bf16* to = keys + key / width * width * PANEL + key % width * 2;
    for (int64_t i = 0; i < PANEL; i += 2) memset(to + i * width, 0, 2 * sizeof(bf16));
  }
  const int64_t paired = up_to(call.length, 2);
  memset(values + paired * PANEL, 0, (s.padded - paired) * PANEL * sizeof(bf16));
}

void attend(const TransformerBlock& b, const TransformerCall& call, Workspace& s, const Workspace::Own& own, int64_t n,
            int64_t head, int64_t begin, int64_t rows, float* c) {
  const int64_t whole = up_to(rows, 16), row = n * call.length + begin;
  const bf16* queries = s.queries.data() + row * s.attended + head * PANEL;
  const bf16* keys = s.keys.data() + (n * b.heads + head) * s.padded * PANEL;
  const bf16* values = s.values.data() + (n * b.heads + head) * s.padded * PANEL;
  const float* seen = s.seen.data() + n * s.padded;
  float* scores = own.scores;  // in panels, [64][256 or 64]; the weights that are made of them, too
  bf16* weights = own.weights;
  int64_t width;
  for (int64_t j = 0; j < s.padded; j += width) {
    width = panel_at(j, s.padded);
    multiply_panel(queries, s.attended, keys + j * PANEL, width, whole, PANEL, false, scores + j * ROWS);
  }
  float factors[ROWS];
  for (int64_t r = 0; r < rows; r++) {
    floats peaks = floats{} - INFINITY, sums = floats{};
    for (int64_t j = 0; j < s.padded; j += width) {
      width = panel_at(j, s.padded);
      const float* line = scores + j * ROWS + r * width;
      for (int64_t i = 0; i < width; i += AT_ONCE) {
        const floats score = read(line + i) + read(seen + j + i);
        peaks = score < peaks ? peaks : score;  // NaN comes through
      }
    }
    float top = peaks[0], sum = 0;
    for (int64_t i = 1; i < AT_ONCE; i++) top = peaks[i] < top ? top : peaks[i];
    for (int64_t j = 0; j < s.padded; j += width) {
      width = panel_at(j, s.padded);
      const int64_t at = j * ROWS + r * width;
      for (int64_t i = 0; i < width; i += AT_ONCE) {
        const floats weight = quick_exp2(read(scores + at + i) + read(seen + j + i) - top);
        sums += weight;
        store(weights + at + i, round_to_bf16(weight));
      }
    }
    for (int64_t i = 0; i < AT_ONCE; i++) sum += sums[i];
    factors[r] = 1.0f / sum;
  }
  for (int64_t j = 0; j < s.padded; j += width) {
    width = panel_at(j, s.padded);
    multiply_panel(weights + j * ROWS, width, values + j * PANEL, PANEL, whole, width, j > 0, c);
  }
  for (int64_t r = 0; r < rows; r++) {
    bf16* to = s.made.data() + (row + r) * s.attended + head * PANEL;
    for (int64_t i = 0; i < PANEL; i += AT_ONCE) store(to + i, round_to_bf16(read(c + r * PANEL + i) * factors[r]));
  }
}

inline void add(const float* x, const float* bias, const float* c, float* y) {
#pragma omp simd
  for (int64_t i = 0; i < PANEL; i++) y[i] = x[i] + c[i] + (bias ? bias[i] : 0.0f);
}

void feed_forward(const TransformerBlock& b, const TransformerCall& call, Workspace& s, const Workspace::Own& own, int64_t row,
                  int64_t rows, float* c) {
  float* after = own.after;
  multiply(b.o, s.made.data() + row * s.attended, s.attended, rows, c, [&](int64_t at, const float* bias) {
    for (int64_t r = 0; r < rows; r++)
      add(call.x + (row + r) * b.hidden + at, bias, c + r * PANEL, after + r * b.hidden + at);
  });
  for (int64_t r = 0; r < rows; r++)
    layer_norm(after + r * b.hidden, b.norm2, b.norm2_bias, float(b.eps2), b.hidden, own.normed + r * b.hidden);
  multiply(b.up, own.normed, b.hidden, rows, c, [&](int64_t at, const float* bias) {
    for (int64_t r = 0; r < rows; r++) {
      bf16* to = own.wide + r * b.inner + at;
      const float* from = c + r * PANEL;
      for (int64_t i = 0; i < PANEL; i += AT_ONCE)
        store(to + i, round_to_bf16(exact_gelu(read(from + i) + (bias ? read(bias + i) : floats{}))));
    }
  });
  multiply(b.down, own.wide, b.inner, rows, c, [&](int64_t at, const float* bias) {
    for (int64_t r = 0; r < rows; r++)
      add(after + r * b.hidden + at, bias, c + r * PANEL, call.y + (row + r) * b.hidden + at);
  });
}

}  // namespace

int transformer_block(const TransformerBlock& b, const TransformerCall& call, int threads) {
  Borrowed<Workspace> borrowed;
  if (!borrowed.get() || !borrowed.get()->fit(b, call, threads)) return NO_MEMORY;
  Workspace& s = *borrowed.get();
  const int64_t length = call.length, size = rows_of_a_piece(call.batch, length, threads);
  const int64_t pieces = (length + size - 1) / size;
  in_team(threads, [&](Team team) {
    const Tiles tiles;
    const Workspace::Own own = s.of(b, team.me);
    alignas(64) float c[ROWS * PANEL];
    each(team, call.batch * b.heads, [&](int64_t task) { pad(b, call, s, task / b.heads, task % b.heads); });
    each(team, call.batch, [&](int64_t n) {
      for (int64_t j = 0; j < s.padded; j++)
        s.seen.data()[n * s.padded + j] =
            j >= length ? -3.0e38f : call.mask ? most(call.mask[n * length + j] * 1.44269504f, -3.0e38f) : 0.0f;
    });
    each(team, call.batch * pieces, [&](int64_t task) {
      const int64_t begin = task % pieces * size;
      project(b, call, s, own, task / pieces, begin, least(size, length - begin), c);
    });
    team.barrier();
    each(team, call.batch * b.heads * pieces, [&](int64_t task) {
      const int64_t n = task / (b.heads * pieces), begin = task % pieces * size;
      attend(b, call, s, own, n, task / pieces % b.heads, begin, least(size, length - begin), c);
    });
    team.barrier();
    each(team, call.batch * pieces, [&](int64_t task) {
      const int64_t begin = task % pieces * size;
      feed_forward(b, call, s, own, task / pieces * length + begin, least(size, length - begin), c);
    });
  });
  return 0;
}

}  // namespace KERNELS_LEVEL
