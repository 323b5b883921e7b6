// x @ w.T * scale for a few rows of x, at the rate at which the memory gives w: what skinny_gemm.cpp and
// decoder_block.cpp have in common.
//
// Each weight is read once, in the order in which it lies in memory, and used for up to eight rows of x, or four with few
// registers. Weights are
// fp32, bf16 or int8 with a scale for each output. Sums are kept in fp32; for int8 in integers, with x in 16 bits.
//
// From three rows on, the arithmetic of int8 takes longer than the reading. AMX's tiles have it for nothing: weights are
// the rows of a tile as they lie in memory, and each row of x is two columns of another, its high and its low bytes.
#pragma once
#include "common.h"
#include "simd.h"
#include "tiles.h"

namespace KERNELS_LEVEL {
namespace {

struct Shape {
  int64_t rows, outputs, inputs;
};

// For each format of weights: what x is turned into first, and ROWS rows of it with COUNT rows of weights.
//
// step: inputs at a time; the inputs behind the last whole step are added one by one.
// together: how many rows of weights at once, for so many of x, each with a sum of its own in a register. 0: one after the
// other, in several sums.
//
// With 32 registers it is eight rows that lie far from each other, each read from end to end: so many places of the memory
// at once give 1.1 to 1.3 times as much as one (decision 0006). With 16 of them, where that was not measured, fp32 takes
// neighbouring rows, and of fewer bytes one row after the other lets the processor fetch ahead.
#if defined(__AVX512BW__)
constexpr bool FAR_APART = true;
constexpr int FP32_ROWS = 8, NARROW_ROWS = 8;
constexpr int MOST_AT_ONCE = 8;  // rows of x whose sums fit into the registers
#else
constexpr bool FAR_APART = false;
constexpr int FP32_ROWS = 4, NARROW_ROWS = 0;
constexpr int MOST_AT_ONCE = 4;
#endif
// How many rows of weights at once: `one` for one or two of x, and `many` for more than four.
constexpr int at_once(int rows, int one, int many) { return rows <= 2 ? one : rows <= 4 ? one / 2 : many; }

// Rows of x in a pack for tiles, two of whose 16 columns each takes; as many as are computed at once.
constexpr int64_t PACKED_ROWS = 8, TILE_INPUTS = 64, TILE_OUTPUTS = 16;
#if defined(__AMX_INT8__)
constexpr bool INT8_TILES = true;
#else
constexpr bool INT8_TILES = false;
#endif
// Whether so many rows are worth a pack. The sums are integers, so one row in tiles and another beside them agree.
constexpr bool in_tiles(int64_t rows, int64_t inputs) { return INT8_TILES && rows > 2 && inputs % TILE_INPUTS == 0; }
constexpr int64_t pack_bytes(int64_t rows, int64_t inputs) { return up_to(rows, PACKED_ROWS) * 2 * inputs; }

struct Fp32 {
  static constexpr bool packs = false;
  static constexpr bool as_is = true;  // x needs nothing done to it
  typedef float weight;
  typedef float input;
  typedef vec sum;
  static constexpr int64_t step = LANES;
  static constexpr int together(int rows) { return at_once(rows, FP32_ROWS, 3); }
  static void prepare(const float* x, input* to, float*, Shape of) {
    memcpy(to, x, of.rows * of.inputs * sizeof(float));
  }
  template <int ROWS, int COUNT>
  static void add(sum (&sums)[ROWS][COUNT], const input* x, int64_t inputs, const weight* w, int64_t apart, int64_t k) {
    vec weights[COUNT];
    for (int r = 0; r < COUNT; r++) weights[r] = load(w + r * apart + k);
    for (int m = 0; m < ROWS; m++) {
      const vec in = load(x + m * inputs + k);
      for (int r = 0; r < COUNT; r++) sums[m][r] += in * weights[r];
    }
  }
  static sum join(sum a, sum b) { return a + b; }
  template <int COUNT>
  static void values(const sum* sums, float* to) {
    for (int i = 0; i < COUNT; i++) to[i] = total(sums[i]);
  }
  static float scaled(float value, float) { return value; }
};

struct Bf16 {
  static constexpr bool packs = false;
  static constexpr bool as_is = false;
  typedef bf16 weight;
  typedef float input;
  typedef vec sum;
  static constexpr int64_t step = 2 * LANES;
  static constexpr int together(int rows) { return at_once(rows, NARROW_ROWS, 2); }
  // The weights at even places are the low halves of 32 bits, those at odd places the high halves: x is sorted so too.
  // The same for any number of rows: a sum in another order has other bits.
  static constexpr int in_turn(int) { return 2; }
  static void prepare(const float* x, input* to, float*, Shape of) {
    for (int64_t m = 0; m < of.rows; m++)
      for (int64_t k = 0; k + step <= of.inputs; k += step)
        for (int64_t i = 0; i < LANES; i++) {
          to[m * of.inputs + k + i] = x[m * of.inputs + k + 2 * i];
          to[m * of.inputs + k + LANES + i] = x[m * of.inputs + k + 2 * i + 1];
        }
  }
  template <int ROWS, int COUNT>
  static void add(sum (&sums)[ROWS][COUNT], const input* x, int64_t inputs, const weight* w, int64_t apart, int64_t k) {
    vec even[COUNT], odd[COUNT];
    for (int r = 0; r < COUNT; r++) {
      const words pairs = load_as<words>(w + r * apart + k);
      even[r] = even_bf16(pairs), odd[r] = odd_bf16(pairs);
    }
    for (int m = 0; m < ROWS; m++) {
      const vec first = load(x + m * inputs + k), second = load(x + m * inputs + k + LANES);
      for (int r = 0; r < COUNT; r++) sums[m][r] += first * even[r];
      for (int r = 0; r < COUNT; r++) sums[m][r] += second * odd[r];
    }
  }
  static sum join(sum a, sum b) { return a + b; }
  template <int COUNT>
  static void values(const sum* sums, float* to) {
    for (int i = 0; i < COUNT; i++) to[i] = total(sums[i]);
  }
  static float scaled(float value, float) { return value; }
};

struct Int8 {
  static constexpr bool packs = INT8_TILES;
  static constexpr bool as_is = false;
  typedef int8_t weight;
  typedef int16_t input;
  typedef ints sum;
  static constexpr int64_t step = 2 * LANES;
  static constexpr int together(int rows) { return at_once(rows, NARROW_ROWS, 3); }
  static constexpr int in_turn(int rows) { return rows <= 2 ? 4 : 2; }  // sums of integers are the same in any order
  // x in up to 16 bits, as many as the sums have room for: each of LANES sums gets 1 / LANES of the products.
  static void prepare(const float* x, input* to, float* scales, Shape of) {
    const double room = 2147483647.0 * LANES / (127.0 * double(of.inputs + step));
    constexpr double most = 127 * 256 + 127;  // a high and a low byte, both with a sign
    const float limit = float(room < most ? floor(room) : most);
    for (int64_t m = 0; m < of.rows; m++) {
      const float* row = x + m * of.inputs;
      float peak = 0, zero = 0;
#pragma omp simd reduction(max : peak) reduction(+ : zero)
      for (int64_t k = 0; k < of.inputs; k++) {
        const float size = fabsf(row[k]);
        peak = size > peak ? size : peak;
        zero += size * 0.0f;  // of an infinity or a NaN, a NaN
      }
      // One value that is not finite makes the whole row NaN, as it does in fp32.
      const bool finite = zero == 0.0f;
      scales[m] = finite ? peak / limit : NAN;
      const float to_integer = finite && peak > 0 ? limit / peak : 0;
      int16_t* integers = to + m * of.inputs;
      if (!finite) memset(integers, 0, of.inputs * sizeof(int16_t));
      else {
#pragma omp simd
        for (int64_t k = 0; k < of.inputs; k++) integers[k] = int16_t(int32_t(__builtin_rintf(row[k] * to_integer)));
      }
    }
  }
  // Row m of x for tiles: [inputs / 4][16 columns][4], high bytes in the first eight columns, low bytes in the others.
  static void pack(const input* row, int64_t m, int64_t inputs, int8_t* packed) {
    int8_t* to = packed + m / PACKED_ROWS * pack_bytes(1, inputs) + m % PACKED_ROWS * 4;
    for (int64_t k = 0; k < inputs; k += 4)
      for (int64_t i = 0; i < 4; i++) {
        const int high = (row[k + i] + 128) >> 8;
        to[k * 16 + i] = int8_t(high);
        to[k * 16 + PACKED_ROWS * 4 + i] = int8_t(row[k + i] - high * 256);
      }
  }
  template <int ROWS, int COUNT>
  static void add(sum (&sums)[ROWS][COUNT], const input* x, int64_t inputs, const weight* w, int64_t apart, int64_t k) {
    shorts weights[COUNT];
    for (int r = 0; r < COUNT; r++) weights[r] = load_int8(w + r * apart + k);
    for (int m = 0; m < ROWS; m++) {
      const shorts in = in_register(load_as<shorts>(x + m * inputs + k));
      for (int r = 0; r < COUNT; r++) sums[m][r] = add_products(sums[m][r], weights[r], in);
    }
  }
  static sum join(sum a, sum b) { return a + b; }  // prepare() has left room for all of a lane
  template <int COUNT>
  static void values(const sum* sums, float* to) {
    totals<COUNT>(sums, to);
  }
  static float scaled(float value, float scale) { return value * scale; }
};
// Inputs of a call: x as given, and x in the format with a scale for each row.
template <class F>
struct Work {
  const float* x;
  const typename F::input* prepared;
  const float* row_scales;
  const typename F::weight* w;
  const float* scale;
  const float* bias;
  float* y;
  Shape of;
  int64_t stride;  // of y's rows
  const int8_t* packed;  // x for tiles, or null

  void put(int64_t m, int64_t n, float sum) const {
    if (scale && bias) sum = multiply_add(sum, scale[n], bias[n]);
    else if (scale) sum *= scale[n];
    else if (bias) sum += bias[n];
    y[m * stride + n] = sum;
  }
};

// Outputs n, n + apart, ... of COUNT.
template <class F, int ROWS, int COUNT>
inline void dot(const Work<F>& work, int64_t m0, int64_t n, int64_t apart) {
  constexpr int64_t AHEAD = 16 * 64 / sizeof(typename F::weight);
  const int64_t inputs = work.of.inputs, whole = inputs / F::step * F::step, stride = apart * inputs;
  const typename F::input* x = work.prepared + m0 * inputs;
  const typename F::weight* w = work.w + n * inputs;
  typename F::sum sums[ROWS][COUNT] = {};
  for (int64_t k = 0; k < whole; k += F::step) {
    // Of neighbours, the next rows: processors fetch ahead within a page, and a row may end with one.
    for (int r = 0; r < COUNT; r++) __builtin_prefetch(w + r * stride + k + (FAR_APART ? AHEAD : COUNT * inputs));
    F::template add<ROWS, COUNT>(sums, x, inputs, w, stride, k);
  }
  float values[ROWS][COUNT];
  F::template values<ROWS * COUNT>(&sums[0][0], &values[0][0]);
  for (int m = 0; m < ROWS; m++)
    for (int r = 0; r < COUNT; r++) {
      const int64_t to = n + r * apart;
      float sum = F::scaled(values[m][r], work.row_scales[m0 + m]);
      for (int64_t k = whole; k < inputs; k++) sum += work.x[(m0 + m) * inputs + k] * widen(w[r * stride + k]);
      work.put(m0 + m, to, sum);
    }
}

// The same with one row of weights, in several sums.
template <class F, int ROWS>
inline void dot_in_turn(const Work<F>& work, int64_t m0, int64_t n) {
  constexpr int SUMS = F::in_turn(ROWS);
  constexpr int64_t LINE = 64 / sizeof(typename F::weight), AHEAD = 128 * LINE;  // farther than processors by themselves
  const int64_t inputs = work.of.inputs, whole = inputs / F::step * F::step;
  const typename F::input* x = work.prepared + m0 * inputs;
  const typename F::weight* w = work.w + n * inputs;
  typename F::sum sums[SUMS][ROWS][1] = {};
  int64_t k = 0;
  for (; k + SUMS * F::step <= whole; k += SUMS * F::step) {
    for (int64_t line = 0; line < SUMS * F::step; line += LINE) __builtin_prefetch(w + k + AHEAD + line, 0, 2);
    for (int j = 0; j < SUMS; j++) F::template add<ROWS, 1>(sums[j], x, inputs, w, 0, k + j * F::step);
  }
  for (; k < whole; k += F::step) F::template add<ROWS, 1>(sums[0], x, inputs, w, 0, k);
  float values[ROWS];
  for (int m = 0; m < ROWS; m++)
    for (int j = 1; j < SUMS; j++) sums[0][m][0] = F::join(sums[0][m][0], sums[j][m][0]);
  F::template values<ROWS>(&sums[0][0][0], values);
  for (int m = 0; m < ROWS; m++) {
    float sum = F::scaled(values[m], work.row_scales[m0 + m]);
    for (k = whole; k < inputs; k++) sum += work.x[(m0 + m) * inputs + k] * widen(w[k]);
    work.put(m0 + m, n, sum);
  }
}

// Not inlined: what calls it in a dozen places would take twice as long to compile.
template <class F, int ROWS>
__attribute__((noinline)) void dots(const Work<F>& work, int64_t m, int64_t n, int64_t end) {
  constexpr int COUNT = F::together(ROWS);
  if constexpr (COUNT > 0) {
    const int64_t times = (end - n) / COUNT, apart = FAR_APART ? times : 1, next = FAR_APART ? 1 : COUNT;
    for (int64_t i = 0; i < times; i++) dot<F, ROWS, COUNT>(work, m, n + i * next, apart);
    for (n += times * COUNT; n < end; n++) dot<F, ROWS, 1>(work, m, n, 1);
  } else
    for (; n < end; n++) dot_in_turn<F, ROWS>(work, m, n);
}

#if defined(__AMX_INT8__)
// Outputs n .. end of up to eight rows of x from m0 on, 16 far apart at once; returns the first that is left.
__attribute__((noinline)) inline int64_t dots_in_tiles(const Work<Int8>& work, int64_t m0, int64_t rows, int64_t n,
                                                       int64_t end) {
  const int64_t inputs = work.of.inputs, apart = (end - n) / TILE_OUTPUTS;
  const int8_t* packed = work.packed + m0 / PACKED_ROWS * pack_bytes(1, inputs);
  alignas(64) int32_t sums[TILE_OUTPUTS][2][PACKED_ROWS];
  float scales[PACKED_ROWS] = {}, made[PACKED_ROWS];
  for (int64_t m = 0; m < rows; m++) scales[m] = work.row_scales[m0 + m];
  for (int64_t i = n; i < n + apart; i++) {
    _tile_zero(0);
    for (int64_t k = 0; k < inputs; k += TILE_INPUTS) {
      _tile_loadd(1, packed + k * 16, 64);
      _tile_loadd(2, work.w + i * inputs + k, apart * inputs);
      _tile_dpbssd(0, 2, 1);
    }
    _tile_stored(0, sums, 64);
    for (int64_t r = 0; r < TILE_OUTPUTS; r++) {
#pragma omp simd
      for (int64_t m = 0; m < PACKED_ROWS; m++)
        made[m] = float(int64_t(sums[r][0][m]) * 256 + sums[r][1][m]) * scales[m];
      for (int64_t m = 0; m < rows; m++) work.put(m0 + m, i + r * apart, made[m]);
    }
  }
  return n + apart * TILE_OUTPUTS;
}
#endif

// Outputs begin .. end of all rows of x. Of more rows than registers have room for, strips of w stay in the cache while
// all take their turn.
template <class F>
void all_dots(const Work<F>& work, int64_t begin, int64_t end) {
  const int64_t rows = work.of.rows, strip = rows <= MOST_AT_ONCE ? end - begin : 16;
  for (int64_t first = begin; first < end; first += strip) {
    const int64_t to = least(first + strip, end);
    for (int64_t m = 0; m < rows; m += MOST_AT_ONCE) {
      const int64_t left = rows - m;
      int64_t n = first;
#if defined(__AMX_INT8__)
      if constexpr (F::packs)
        if (work.packed) n = dots_in_tiles(work, m, least(left, PACKED_ROWS), n, to);
#endif
      if constexpr (MOST_AT_ONCE > 4) switch (left) {
          case 1: case 2: case 3: case 4: break;
          case 5: dots<F, 5>(work, m, n, to); continue;
          case 6: dots<F, 6>(work, m, n, to); continue;
          case 7: dots<F, 7>(work, m, n, to); continue;
          default: dots<F, 8>(work, m, n, to); continue;
        }
      switch (left) {
        case 1: dots<F, 1>(work, m, n, to); break;
        case 2: dots<F, 2>(work, m, n, to); break;
        case 3: dots<F, 3>(work, m, n, to); break;
        default: dots<F, 4>(work, m, n, to);
      }
    }
  }
}

// Inputs begin .. end of w [inputs, outputs], as transformers' Conv1D (of GPT-2) has it: rows of w, several at a time, are
// added to y [rows, outputs]. With 32 registers they lie far apart, as above.
__attribute__((noinline)) void add_transposed(const float* x, const float* w, float* y, Shape of, int64_t begin, int64_t end) {
  constexpr int64_t AT_ONCE = FAR_APART ? 16 : 4, ROWS = 8;
  const int64_t times = (end - begin + AT_ONCE - 1) / AT_ONCE, apart = FAR_APART ? times : 1;
  const int64_t ahead = FAR_APART ? 8 * LANES : AT_ONCE * of.outputs;
  for (int64_t i = 0; i < times; i++) {
    const float* rows[AT_ONCE];
    int64_t at[AT_ONCE];
    for (int64_t j = 0; j < AT_ONCE; j++) {
      at[j] = begin + (FAR_APART ? i : i * AT_ONCE) + j * apart;
      rows[j] = w + (at[j] < end ? at[j] : begin) * of.outputs;
    }
    for (int64_t m0 = 0; m0 < of.rows; m0 += ROWS) {
      const int64_t count = least(of.rows - m0, ROWS);
      float in[ROWS][AT_ONCE];
      for (int64_t m = 0; m < count; m++)
        for (int64_t j = 0; j < AT_ONCE; j++) in[m][j] = at[j] < end ? x[(m0 + m) * of.inputs + at[j]] : 0;
      int64_t n = 0;
      for (; n + LANES <= of.outputs; n += LANES) {
        vec weights[AT_ONCE];  // in registers while all rows of x take their turn
        for (int64_t j = 0; j < AT_ONCE; j++) {
          __builtin_prefetch(rows[j] + n + ahead);
          weights[j] = load(rows[j] + n);
        }
        for (int64_t m = 0; m < count; m++) {
          float* to = y + (m0 + m) * of.outputs + n;
          vec even = load(to), odd = in[m][1] * weights[1];
          for (int64_t j = 0; j < AT_ONCE; j += 2) even += in[m][j] * weights[j];
          for (int64_t j = 3; j < AT_ONCE; j += 2) odd += in[m][j] * weights[j];
          store(to, even + odd);
        }
      }
      for (; n < of.outputs; n++)
        for (int64_t m = 0; m < count; m++)
          for (int64_t j = 0; j < AT_ONCE; j++) y[(m0 + m) * of.outputs + n] += in[m][j] * rows[j][n];
    }
  }
}

}  // namespace
}  // namespace KERNELS_LEVEL
