// One token through blocks of a transformer decoder, in one go: norm, attention over the cache, norm, feed-forward.
//
// A block in eager PyTorch is some twenty operators, each of which wakes all threads for a few microseconds of work
// beside the weights. Here the threads are woken once for all blocks, and wait for each other at nine barriers in each.
// skinny_gemm.h reads the weights. Loops that must become vectors are marked `omp simd`, the only OpenMP pragma in use.
#include <new>

#include "kernels.h"
#include "skinny_gemm.h"
#include "threads.h"

namespace KERNELS_LEVEL {
namespace {

// A model in bf16 rounds what each of its operators returns. So do these kernels, in the same places: what is left
// between the two is the order of the sums.
inline float rounded(float value) { return widen(narrow(value)); }
inline void round_if(bool is_bf16, float* values, int64_t count) {
  if (!is_bf16) return;
#pragma omp simd
  for (int64_t i = 0; i < count; i++) values[i] = rounded(values[i]);
}

void normalise(const float* x, const float* weight, const float* bias, float eps, bool layer_norm, int64_t size,
               bool is_bf16, float* y) {
  double sum = 0, squares = 0;
  if (layer_norm) {
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < size; i++) sum += x[i];
  }
  const float mean = float(sum / double(size));
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < size; i++) squares += double(x[i] - mean) * double(x[i] - mean);
  const float factor = float(1.0 / sqrt(squares / double(size) + double(eps)));
#pragma omp simd
  for (int64_t i = 0; i < size; i++) y[i] = (x[i] - mean) * factor;
  round_if(is_bf16 && !layer_norm, y, size);  // RMSNorm is two operators: the weight comes after it
#pragma omp simd
  for (int64_t i = 0; i < size; i++) y[i] *= weight[i];
  if (bias) {
#pragma omp simd
    for (int64_t i = 0; i < size; i++) y[i] += bias[i];
  }
  round_if(is_bf16, y, size);
}

// Who of the team computes which outputs, in whole strips so that no two write to one line of the cache.
struct Share {
  int64_t begin, end;
};
inline Share share(int64_t size, Team team) {
  const int64_t strips = (size + 15) / 16;
  const int64_t end = strips * (team.me + 1) / team.all * 16;
  return {strips * team.me / team.all * 16, end < size ? end : size};
}

// Memory shared by all threads of a call: one block of floats, cut into pieces.
struct Scratch {
  Buffer<float> floats;
  Buffer<char> prepared;
  Buffer<int8_t> packed;
  float *norm, *qkv, *attended, *made, *after, *inner, *row_scales, *partial, *scores;
  int64_t partial_size, scores_size;
};

// Room for the largest of the blocks.
bool lay_out(Scratch& s, const DecoderBlock* const* blocks, const Token* tokens, int64_t count, int threads) {
  enum { NORM, QKV, ATTENDED, MADE, AFTER, INNER, ROW_SCALES, PARTIAL, SCORES, PIECES };
  int64_t sizes[PIECES] = {}, widest = 0, pack = 0;
  for (int64_t i = 0; i < count; i++) {
    const DecoderBlock& b = *blocks[i];
    const int64_t rows = tokens[i].rows, attended = b.heads * b.head_dim;
    const int64_t qkv = attended + 2 * b.kv_heads * b.head_dim, widths = most(most(b.hidden, qkv), b.inner);
    const int64_t wanted[PIECES] = {
        rows * b.hidden, rows * qkv,    rows * attended, rows * b.hidden, rows * b.hidden, rows * b.inner * 2,
        rows * 2,        b.format == TRANSPOSED ? rows * widths : 0, tokens[i].length + 17};
    for (int j = 0; j < PIECES; j++) sizes[j] = most(sizes[j], wanted[j]);
    widest = most(widest, rows * widths);
    if (b.format == INT8 && in_tiles(rows, TILE_INPUTS)) pack = most(pack, pack_bytes(rows, widths));
  }
  for (int64_t& size : sizes) size = (size + 15) / 16 * 16;
  s.partial_size = sizes[PARTIAL];  // of one thread, and so are the scores
  s.scores_size = sizes[SCORES];
  sizes[PARTIAL] *= threads;
  sizes[SCORES] *= threads;
  int64_t total = 0;
  for (int64_t size : sizes) total += size;
  if (!s.floats.fit(total) || !s.prepared.fit(widest * sizeof(float)) || !s.packed.fit(pack)) return false;
  float** pieces[PIECES] = {&s.norm,  &s.qkv,        &s.attended, &s.made,  &s.after,
                            &s.inner, &s.row_scales, &s.partial,  &s.scores};
  float* next = s.floats.data();
  for (int j = 0; j < PIECES; j++) {
    *pieces[j] = next;
    next += sizes[j];
  }
  return true;
}

// y = x @ w.T for outputs begin .. end of all rows, by one thread.
template <class F>
void part_of_linear(const Linear& l, const float* x, const Scratch& s, float* y, int64_t stride, int64_t rows,
                    bool is_bf16, Share mine) {
  const void* prepared = F::as_is ? static_cast<const void*>(x) : s.prepared.data();
  const Work<F> work = {x, static_cast<const typename F::input*>(prepared), s.row_scales,
                        static_cast<const typename F::weight*>(l.w), l.scale, l.bias, y,
                        {rows, l.outputs, l.inputs}, stride,
                        F::packs && in_tiles(rows, l.inputs) ? s.packed.data() : nullptr};
  all_dots(work, mine.begin, mine.end);
  for (int64_t m = 0; m < rows; m++) round_if(is_bf16, y + m * stride + mine.begin, mine.end - mine.begin);
}

// Products of a format within a team. The thread that computed a row of x converts it to the format by `ready`.
template <class F>
struct Rows {
  static constexpr bool as_is = F::as_is;
  static void ready(const float* x, Scratch& s, int64_t row, int64_t rows, int64_t inputs) {
    if (as_is) return;
    typedef typename F::input input;
    input* to = reinterpret_cast<input*>(s.prepared.data()) + row * inputs;
    F::prepare(x + row * inputs, to, s.row_scales + row, {1, 0, inputs});
    if constexpr (F::packs)
      if (in_tiles(rows, inputs)) F::pack(to, row, inputs, s.packed.data());
  }
  static void multiply(const Linear& l, const float* x, Scratch& s, float* y, int64_t stride, int64_t rows,
                       bool is_bf16, Team team) {
    part_of_linear<F>(l, x, s, y, stride, rows, is_bf16, share(l.outputs, team));
  }
};

struct Transposed {};
template <>
struct Rows<Transposed> {
  static constexpr bool as_is = true;
  static void ready(const float*, Scratch&, int64_t, int64_t, int64_t) {}
  static void multiply(const Linear& l, const float* x, Scratch& s, float* y, int64_t stride, int64_t rows,
                       bool is_bf16, Team team) {
    float* mine = s.partial + team.me * s.partial_size;
    const int64_t size = rows * l.outputs;
    memset(mine, 0, size * sizeof(float));
    add_transposed(x, static_cast<const float*>(l.w), mine, {rows, l.outputs, l.inputs}, l.inputs * team.me / team.all,
                   l.inputs * (team.me + 1) / team.all);
  team.barrier();
    const Share part = share(l.outputs, team);
    for (int64_t m = 0; m < rows; m++)
      for (int64_t n = part.begin; n < part.end; n++) {
        float sum = l.bias ? l.bias[n] : 0;
        for (int64_t t = 0; t < team.all; t++) sum += s.partial[t * s.partial_size + m * l.outputs + n];
        y[m * stride + n] = is_bf16 ? rounded(sum) : sum;
      }
  team.barrier();
  }
};

void rotate(float* head, const float* cos, const float* sin, int64_t size, bool is_bf16) {
  const int64_t half = size / 2;
  if (is_bf16) {
#pragma omp simd
    for (int64_t i = 0; i < half; i++) {
      const float a = head[i], b = head[i + half];
      head[i] = rounded(rounded(a * cos[i]) - rounded(b * sin[i]));
      head[i + half] = rounded(rounded(b * cos[i + half]) + rounded(a * sin[i + half]));
    }
    return;
  }
#pragma omp simd
  for (int64_t i = 0; i < half; i++) {
    const float a = head[i], b = head[i + half];
    head[i] = a * cos[i] - b * sin[i];
    head[i + half] = b * cos[i + half] + a * sin[i + half];
  }
}

// How much of a query each key has, for COUNT positions at once.
template <int COUNT, class T>
inline void look(const float* query, const T* keys, int64_t stride, int64_t size, float scaling, float* scores) {
  vec sums[COUNT] = {};
  int64_t i = 0;
  for (; i + LANES <= size; i += LANES) {
    const vec q = load(query + i);
    for (int j = 0; j < COUNT; j++) sums[j] += q * load(keys + j * stride + i);
  }
  for (int j = 0; j < COUNT; j++) {
    float sum = total(sums[j]);
    for (int64_t rest = i; rest < size; rest++) sum += query[rest] * widen(keys[j * stride + rest]);
    scores[j] = sum * scaling;
  }
}

// The sum of the values, each by its weight, for COUNT vectors of a head that stay in registers meanwhile.
template <int COUNT, class T>
inline void gather(const T* values, int64_t stride, const float* weights, int64_t positions, float factor, float* out) {
  vec sums[COUNT] = {};
  for (int64_t j = 0; j < positions; j++)
    for (int i = 0; i < COUNT; i++) sums[i] += load(values + j * stride + i * LANES) * weights[j];
  for (int i = 0; i < COUNT; i++) store(out + i * LANES, sums[i] * factor);
}

// One key/value head of one row: the new position is written behind the cache, then all query heads of its group look.
template <class T>
__attribute__((noinline)) void attend(const DecoderBlock& b, const Token& t, Scratch& s, int64_t row, int64_t kv_head,
                                      float* scores) {
  const int64_t size = b.head_dim, group = b.heads / b.kv_heads;
  const Row* own = t.own ? t.own + row : nullptr;
  const int64_t length = own ? own->length : t.length, positions = length + 1;
  float* qkv = s.qkv + row * (b.heads + 2 * b.kv_heads) * size;
  float* key = qkv + (b.heads + kv_head) * size;
  const float* value = qkv + (b.heads + b.kv_heads + kv_head) * size;
  T* keys = own ? static_cast<T*>(own->keys) : static_cast<T*>(t.keys) + row * t.key_row;
  T* values = own ? static_cast<T*>(own->values) : static_cast<T*>(t.values) + row * t.value_row;
  keys += kv_head * (own ? own->key_head : t.key_head);
  values += kv_head * (own ? own->value_head : t.value_head);
  const void* mask = own ? own->mask : t.mask;
  const int64_t at = own ? 0 : row * t.mask_stride;
  float* attention = own ? own->attention : t.attention ? t.attention + row * b.heads * positions : nullptr;
  // Attention whose weights are asked for is written out in operators, each of which rounds in bf16. Otherwise it is
  // one operator, which rounds the weights behind their sum, and the result.
  const bool by_operators = attention && t.is_bf16;
  const float scaling = by_operators ? 1.0f : float(b.scaling);
  const float* cos = t.cos ? t.cos + row * t.rotation_stride : nullptr;
  const float* sin = t.cos ? t.sin + row * t.rotation_stride : nullptr;
  if (cos) rotate(key, cos, sin, size, t.is_bf16);
  for (int64_t i = 0; i < size; i++) {
    put(keys + length * t.key_position + i, key[i]);
    put(values + length * t.value_position + i, value[i]);
  }
  for (int64_t head = kv_head * group; head < (kv_head + 1) * group; head++) {
    float* query = qkv + head * size;
    if (cos) rotate(query, cos, sin, size, t.is_bf16);
    int64_t j = 0;
    for (; j + 4 <= positions; j += 4) {
      for (int ahead = 4; ahead < 8; ahead++) {
        __builtin_prefetch(keys + (j + ahead) * t.key_position);
        __builtin_prefetch(values + (j + ahead) * t.value_position, 0, 2);
      }
      look<4>(query, keys + j * t.key_position, t.key_position, size, scaling, scores + j);
    }
    for (; j < positions; j++)
      look<1>(query, keys + j * t.key_position, t.key_position, size, scaling, scores + j);
    if (by_operators)
      for (j = 0; j < positions; j++) scores[j] = rounded(rounded(scores[j]) * float(b.scaling));
    if (mask) {
      if (t.mask_is_bytes) {
        for (j = 0; j < positions; j++)
          if (!static_cast<const uint8_t*>(mask)[at + j]) scores[j] = -INFINITY;
      } else
        for (j = 0; j < positions; j++) scores[j] += static_cast<const float*>(mask)[at + j];
    }
    round_if(by_operators, scores, positions);
    float peak = -INFINITY, sum = 0;
#pragma omp simd reduction(max : peak)
    for (j = 0; j < positions; j++) peak = scores[j] > peak ? scores[j] : peak;
    // A row that sees nothing gets zeros, as by torch's scaled_dot_product_attention.
    const bool blind = peak == -INFINITY;
    if (blind) peak = 0;
#pragma omp simd
    for (j = 0; j < positions; j++) scores[j] = quick_exp(scores[j] - peak);
#pragma omp simd reduction(+ : sum)
    for (j = 0; j < positions; j++) sum += scores[j];
    const float factor = blind ? 0.0f : 1.0f / sum;
    if (attention) {
      float* weights = attention + head * positions;
#pragma omp simd
      for (j = 0; j < positions; j++) weights[j] = scores[j] * factor;
      round_if(by_operators, weights, positions);
    }
    round_if(t.is_bf16, scores, positions);
    const float* weights = by_operators ? attention + head * positions : scores;
    const float rest = by_operators ? 1.0f : factor;
    float* out = s.attended + (row * b.heads + head) * size;
    int64_t i = 0;
    for (; i + 4 * LANES <= size; i += 4 * LANES)
      gather<4>(values + i, t.value_position, weights, positions, rest, out + i);
    for (; i + LANES <= size; i += LANES)
      gather<1>(values + i, t.value_position, weights, positions, rest, out + i);
    for (; i < size; i++) {
      float one = 0;
      for (j = 0; j < positions; j++) one += weights[j] * widen(values[j * t.value_position + i]);
      out[i] = one * rest;
    }
    round_if(t.is_bf16, out, size);
  }
}

// One block by a team of threads. Every thread of the team calls this.
template <class F>
void block_by_team(const DecoderBlock& b, const Token& t, Scratch& s, Team team) {
  const int64_t qkv = (b.heads + 2 * b.kv_heads) * b.head_dim, attended = b.heads * b.head_dim, rows = t.rows;
  for (int64_t m = team.me; m < rows; m += team.all) {
    normalise(t.x + m * b.hidden, b.norm1, b.norm1_bias, float(b.eps1), b.layer_norm, b.hidden, t.is_bf16,
              s.norm + m * b.hidden);
    Rows<F>::ready(s.norm, s, m, rows, b.hidden);
  }
  team.barrier();
  Rows<F>::multiply(b.q, s.norm, s, s.qkv, qkv, rows, t.is_bf16, team);
  if (b.k.w) {
    Rows<F>::multiply(b.k, s.norm, s, s.qkv + b.q.outputs, qkv, rows, t.is_bf16, team);
    Rows<F>::multiply(b.v, s.norm, s, s.qkv + b.q.outputs + b.k.outputs, qkv, rows, t.is_bf16, team);
  }
  team.barrier();
  float* scores = s.scores + team.me * s.scores_size;
  for (int64_t task = team.me; task < rows * b.kv_heads; task += team.all) {
    if (t.is_bf16) attend<bf16>(b, t, s, task / b.kv_heads, task % b.kv_heads, scores);
    else attend<float>(b, t, s, task / b.kv_heads, task % b.kv_heads, scores);
  }
  team.barrier();
  if (!Rows<F>::as_is) {
    for (int64_t m = team.me; m < rows; m += team.all) Rows<F>::ready(s.attended, s, m, rows, attended);
  team.barrier();
  }
  Rows<F>::multiply(b.o, s.attended, s, s.made, b.hidden, rows, t.is_bf16, team);
  team.barrier();
  for (int64_t m = team.me; m < rows; m += team.all) {
    float* after = s.after + m * b.hidden;
    for (int64_t i = 0; i < b.hidden; i++) after[i] = t.x[m * b.hidden + i] + s.made[m * b.hidden + i];
    round_if(t.is_bf16, after, b.hidden);
    normalise(after, b.norm2, b.norm2_bias, float(b.eps2), b.layer_norm, b.hidden, t.is_bf16,
              s.norm + m * b.hidden);
    Rows<F>::ready(s.norm, s, m, rows, b.hidden);
  }
  team.barrier();
  float *up = s.inner, *gate = s.inner + rows * b.inner;
  Rows<F>::multiply(b.up, s.norm, s, up, b.inner, rows, t.is_bf16, team);
  if (b.gated) Rows<F>::multiply(b.gate, s.norm, s, gate, b.inner, rows, t.is_bf16, team);
  const Share mine = share(b.inner, team);  // what this thread has just made
  for (int64_t m = 0; m < rows; m++) {
    float* to = up + m * b.inner;
    const float* from = (b.gated ? gate : up) + m * b.inner;
    // x * sigmoid(z): SiLU with z = x, and GELU by tanh with z = 2 sqrt(2 / pi) (x + 0.044715 x^3)
#pragma omp simd
    for (int64_t n = mine.begin; n < mine.end; n++) {
      const float x = from[n], cube = x * x * x;
      const float z = b.activation == 0 ? x : 1.5957691216057308f * (x + 0.044715f * cube);
      const float active = x / (1.0f + quick_exp(-z));
      to[n] = (t.is_bf16 ? rounded(active) : active) * (b.gated ? to[n] : 1.0f);
    }
    if (b.gated) round_if(t.is_bf16, to + mine.begin, mine.end - mine.begin);
  }
  team.barrier();
  if (!Rows<F>::as_is) {
    for (int64_t m = team.me; m < rows; m += team.all) Rows<F>::ready(up, s, m, rows, b.inner);
  team.barrier();
  }
  Rows<F>::multiply(b.down, up, s, s.made, b.hidden, rows, t.is_bf16, team);
  const Share last = share(b.hidden, team);
  for (int64_t m = 0; m < rows; m++)
    for (int64_t n = last.begin; n < last.end; n++) {
      const float y = s.after[m * b.hidden + n] + s.made[m * b.hidden + n];
      t.y[m * b.hidden + n] = t.is_bf16 ? rounded(y) : y;
    }
}

}  // namespace

// `blocks` one after the other: tokens[i].x is what blocks[i] is given, tokens[i].y what it makes of it.
int decoder_blocks(const DecoderBlock* const* blocks, const Token* tokens, int64_t count, int threads) {
  Borrowed<Scratch> borrowed;
  if (!borrowed.get() || !lay_out(*borrowed.get(), blocks, tokens, count, threads)) return NO_MEMORY;
  Scratch& s = *borrowed.get();
  in_team(threads, [&](Team team) {
    const Tiles tiles;
    for (int64_t i = 0; i < count; i++) {
      const DecoderBlock& b = *blocks[i];
      const Token& t = tokens[i];
      switch (b.format) {
        case FP32: block_by_team<Fp32>(b, t, s, team); break;
        case BF16: block_by_team<Bf16>(b, t, s, team); break;
        case INT8: block_by_team<Int8>(b, t, s, team); break;
        default: block_by_team<Transposed>(b, t, s, team);
      }
      team.barrier();
    }
  });
  return 0;
}

}  // namespace KERNELS_LEVEL
