// Products of panels in bf16. See packed_gemm.h.
#include "packed_gemm.h"

namespace KERNELS_LEVEL {

#if defined(__AMX_BF16__)

namespace {

constexpr int64_t TILE = 16, DEEP = 32;  // rows and columns of sums, and inputs, of one tile

// WIDE tiles of columns of TALL tiles of rows: tiles 0..3 are sums, 4..5 rows of a, 6..7 columns of the panel.
template <int TALL, int WIDE>
inline void block(const bf16* a, int64_t stride, const bf16* panel, int64_t columns, int64_t inputs, bool add, float* c) {
  static_assert(TALL * WIDE == 4, "all four tiles of sums");
  const int64_t a_row = stride * int64_t(sizeof(bf16)), b_row = columns * 4, c_row = columns * 4;
#define AT(M, N) (c + (M) * TILE * columns + (N) * TILE)
  if (add) {
    _tile_loadd(0, AT(0, 0), c_row);
    _tile_loadd(1, TALL == 2 ? AT(1, 0) : AT(0, 1), c_row);
    _tile_loadd(2, TALL == 2 ? AT(0, 1) : AT(0, 2), c_row);
    _tile_loadd(3, TALL == 2 ? AT(1, 1) : AT(0, 3), c_row);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t k = 0; k < inputs; k += DEEP) {
    const bf16* b = panel + k * columns;
    if (TALL == 2) {
      _tile_loadd(6, b, b_row);
      _tile_loadd(4, a + k, a_row);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(5, a + TILE * stride + k, a_row);
      _tile_dpbf16ps(1, 5, 6);
      _tile_loadd(7, b + 2 * TILE, b_row);
      _tile_dpbf16ps(2, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    } else {
      _tile_loadd(4, a + k, a_row);
      _tile_loadd(6, b, b_row);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, b + 2 * TILE, b_row);
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(6, b + 4 * TILE, b_row);
      _tile_dpbf16ps(2, 4, 6);
      _tile_loadd(7, b + 6 * TILE, b_row);
      _tile_dpbf16ps(3, 4, 7);
    }
  }
  _tile_stored(0, AT(0, 0), c_row);
  _tile_stored(1, TALL == 2 ? AT(1, 0) : AT(0, 1), c_row);
  _tile_stored(2, TALL == 2 ? AT(0, 1) : AT(0, 2), c_row);
  _tile_stored(3, TALL == 2 ? AT(1, 1) : AT(0, 3), c_row);
#undef AT
}

}  // namespace

void multiply_panel(const bf16* a, int64_t stride, const bf16* panel, int64_t columns, int64_t rows, int64_t inputs,
                    bool add, float* c) {
  int64_t m = 0;
  for (; m + 2 * TILE <= rows; m += 2 * TILE)
    for (int64_t n = 0; n < columns; n += 2 * TILE)
      block<2, 2>(a + m * stride, stride, panel + 2 * n, columns, inputs, add, c + m * columns + n);
  if (m < rows)
    for (int64_t n = 0; n < columns; n += 4 * TILE)
      block<1, 4>(a + m * stride, stride, panel + 2 * n, columns, inputs, add, c + m * columns + n);
}

#else

namespace {

// ROWS_AT_ONCE rows of WIDE vectors of columns, whose sums stay in registers.
constexpr int ROWS_AT_ONCE = 4, WIDE = MANY_REGISTERS ? 4 : 2;

inline void block(const bf16* a, int64_t stride, const bf16* panel, int64_t columns, int64_t inputs, bool add, float* c) {
  vec sums[ROWS_AT_ONCE][WIDE] = {};
  if (add)
    for (int m = 0; m < ROWS_AT_ONCE; m++)
      for (int n = 0; n < WIDE; n++) sums[m][n] = load(c + m * columns + n * LANES);
  for (int64_t k = 0; k < inputs; k += 2) {
    const bf16* pairs = panel + k * columns;
#if defined(__AVX512BF16__)
    words weights[WIDE];
    for (int n = 0; n < WIDE; n++) weights[n] = load_as<words>(pairs + 2 * n * LANES);
    for (int m = 0; m < ROWS_AT_ONCE; m++) {
      const words two = words{} + load_as<uint32_t>(a + m * stride + k);
      for (int n = 0; n < WIDE; n++)
        sums[m][n] = (vec)_mm512_dpbf16_ps((__m512)sums[m][n], (__m512bh)two, (__m512bh)weights[n]);
    }
#else
    vec even[WIDE], odd[WIDE];
    for (int n = 0; n < WIDE; n++) {
      const words both = load_as<words>(pairs + 2 * n * LANES);
      even[n] = even_bf16(both);
      odd[n] = odd_bf16(both);
    }
    for (int m = 0; m < ROWS_AT_ONCE; m++) {
      const float one = widen(a[m * stride + k]), two = widen(a[m * stride + k + 1]);
      for (int n = 0; n < WIDE; n++) sums[m][n] += one * even[n] + two * odd[n];
    }
#endif
  }
  for (int m = 0; m < ROWS_AT_ONCE; m++)
    for (int n = 0; n < WIDE; n++) store(c + m * columns + n * LANES, sums[m][n]);
}

}  // namespace

void multiply_panel(const bf16* a, int64_t stride, const bf16* panel, int64_t columns, int64_t rows, int64_t inputs,
                    bool add, float* c) {
  for (int64_t n = 0; n < columns; n += WIDE * LANES)
    for (int64_t m = 0; m < rows; m += ROWS_AT_ONCE)
      block(a + m * stride, stride, panel + 2 * n, columns, inputs, add, c + m * columns + n);
}

#endif

}  // namespace KERNELS_LEVEL
