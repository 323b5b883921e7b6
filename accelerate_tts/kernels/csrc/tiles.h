// AMX's tiles of a thread, for as long as it multiplies; nothing where there are none.
#pragma once
#include "common.h"

#if defined(__AMX_TILE__)
#include <immintrin.h>
#endif

namespace KERNELS_LEVEL {
namespace {

#if defined(__AMX_TILE__)

// Eight tiles of 16 rows of 64 bytes. A constant, since GCC takes the instruction to read no more than a pointer.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
constexpr TileConfig CONFIG;

class Tiles {
 public:
  Tiles() { _tile_loadconfig(&CONFIG); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
  ~Tiles() { _tile_release(); }
};

#else

class Tiles {
 public:
  Tiles() {}  // not trivial, so that nobody is told of an unused variable
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

#endif

}  // namespace
}  // namespace KERNELS_LEVEL
