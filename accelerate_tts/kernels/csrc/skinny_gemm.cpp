// y = x @ w.T * scale + bias for a few rows of x. See skinny_gemm.h.
#include "skinny_gemm.h"

#include <new>

#include "kernels.h"
#include "threads.h"

namespace KERNELS_LEVEL {
namespace {

struct Workspace {
  Buffer<char> prepared;
  Buffer<float> row_scales, partial;
  Buffer<int8_t> packed;
};

// w is [outputs, inputs], as nn.Linear has it.
template <class F>
int linear(const SkinnyCall& call, Workspace& s, int threads) {
  typedef typename F::input input;
  const Shape of = {call.rows, call.outputs, call.inputs};
  if (!s.prepared.fit(of.rows * of.inputs * sizeof(input)) || !s.row_scales.fit(of.rows)) return NO_MEMORY;
  input* prepared = reinterpret_cast<input*>(s.prepared.data());
  F::prepare(call.x, prepared, s.row_scales.data(), of);
  const int8_t* packed = nullptr;
  if constexpr (F::packs)
    if (in_tiles(of.rows, of.inputs)) {
      if (!s.packed.fit(pack_bytes(of.rows, of.inputs))) return NO_MEMORY;
      for (int64_t m = 0; m < of.rows; m++) F::pack(prepared + m * of.inputs, m, of.inputs, s.packed.data());
      packed = s.packed.data();
    }
  const Work<F> work = {call.x, prepared, s.row_scales.data(), static_cast<const typename F::weight*>(call.w),
                        call.scale, call.bias, call.y, of, of.outputs, packed};
  in_team(threads, [&](Team team) {
    const Tiles tiles;
    all_dots(work, of.outputs * team.me / team.all, of.outputs * (team.me + 1) / team.all);
  });
  return 0;
}

// Threads share the inputs, not the outputs, so that each reads one piece of memory from end to end; their sums are
// added last.
int linear_transposed(const SkinnyCall& call, Workspace& s, int threads) {
  const Shape of = {call.rows, call.outputs, call.inputs};
  const int64_t size = of.rows * of.outputs;
  if (!s.partial.fit(size * threads)) return NO_MEMORY;
  in_team(threads, [&](Team team) {
    float* mine = s.partial.data() + team.me * size;
    memset(mine, 0, size * sizeof(float));
    add_transposed(call.x, static_cast<const float*>(call.w), mine, of, of.inputs * team.me / team.all,
                   of.inputs * (team.me + 1) / team.all);
    team.barrier();
    for (int64_t i = size * team.me / team.all; i < size * (team.me + 1) / team.all; i++) {
      float sum = call.bias ? call.bias[i % of.outputs] : 0;
      for (int64_t t = 0; t < team.all; t++) sum += s.partial.data()[t * size + i];
      call.y[i] = sum;
    }
  });
  return 0;
}

}  // namespace

int skinny_linear(const SkinnyCall& call, int threads) {
  Borrowed<Workspace> borrowed;
  if (!borrowed.get()) return NO_MEMORY;
  switch (call.format) {
    case FP32: return linear<Fp32>(call, *borrowed.get(), threads);
    case BF16: return linear<Bf16>(call, *borrowed.get(), threads);
    case INT8: return linear<Int8>(call, *borrowed.get(), threads);
    default: return linear_transposed(call, *borrowed.get(), threads);
  }
}

}  // namespace KERNELS_LEVEL
