// Common to all kernels: bf16, memory that is kept between calls, and the name of the instruction set.
//
// Each unit is compiled once for each instruction set, into a namespace of its own. Nothing of the C++ library that has
// code is used: of what several units define alike (an inline function of a standard header) the linker keeps one, and
// that may be the one with instructions that a processor lacks. So there are no exceptions either: what can fail
// (memory) says so by what it returns.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "abi.h"

#if !defined(KERNELS_LEVEL)
#define KERNELS_LEVEL base  // clangd, which sees a unit without the build's flags
#endif

constexpr int NO_MEMORY = 1;

namespace KERNELS_LEVEL {

typedef uint16_t bf16;

template <class T>
constexpr T least(T a, T b) {
  return b < a ? b : a;
}
template <class T>
constexpr T most(T a, T b) {
  return a < b ? b : a;
}
constexpr int64_t up_to(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

namespace {

inline float widen(float value) { return value; }
inline float widen(int8_t value) { return value; }
inline float widen(bf16 value) {
  const uint32_t bits = uint32_t(value) << 16;
  float wide;
  memcpy(&wide, &bits, sizeof wide);
  return wide;
}

inline bf16 narrow(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  if ((bits & 0x7fffffff) > 0x7f800000) return bf16(0x7fc0);
  return bf16((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);  // to the nearest, ties to even
}
inline void put(float* to, float value) { *to = value; }
inline void put(bf16* to, float value) { *to = narrow(value); }

// Memory that is kept and grows, aligned to a cache line. Growing discards its content.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { free(raw_); }
  T* data() const { return data_; }
  bool fit(int64_t count) {
    if (count <= room_) return true;
    free(raw_);
    room_ = 0;
    data_ = nullptr;
    raw_ = malloc(size_t(count) * sizeof(T) + 64);
    if (!raw_) return false;
    data_ = reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(raw_) + 63) & ~uintptr_t(63));
    memset(data_, 0, size_t(count) * sizeof(T));
    room_ = count;
    return true;
  }

 private:
  void* raw_ = nullptr;
  T* data_ = nullptr;
  int64_t room_ = 0;
};

// Workspace of a call, taken from a shelf and put back. Concurrent calls have one each, and a thread that ends leaves
// none behind.
template <class Workspace>
class Borrowed {
 public:
  Borrowed() {
    for (Workspace*& place : shelf())
      if ((workspace_ = __atomic_exchange_n(&place, nullptr, __ATOMIC_ACQ_REL))) return;
    if (void* raw = malloc(sizeof(Workspace))) workspace_ = new (raw) Workspace();
  }
  Borrowed(const Borrowed&) = delete;
  Borrowed& operator=(const Borrowed&) = delete;
  ~Borrowed() {
    if (!workspace_) return;
    for (Workspace*& place : shelf()) {
      Workspace* none = nullptr;
      if (__atomic_compare_exchange_n(&place, &none, workspace_, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED)) return;
    }
    workspace_->~Workspace();
    free(workspace_);
  }
  Workspace* get() const { return workspace_; }

 private:
  static constexpr int PLACES = 16;
  typedef Workspace* Shelf[PLACES];
  static Shelf& shelf() {
    static Shelf places = {};  // constants: no guard, nothing to run at the start or at the end
    return places;
  }
  Workspace* workspace_ = nullptr;
};

}  // namespace
}  // namespace KERNELS_LEVEL
