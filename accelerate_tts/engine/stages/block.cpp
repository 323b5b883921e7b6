// One token through blocks of a transformer decoder, in one go: norm, attention over the cache, norm, feed-forward.
//
// A block in eager PyTorch is some twenty operators, each of which wakes all threads for a few microseconds of work
// beside the weights. Here the threads are woken once for all blocks, and wait for each other at nine barriers in each.
// Built behind skinny.cpp, whose formats and dot products it uses: what reads the weights is the same. Loops that must
// become vectors are marked `omp simd`; native.py asks the compiler for that, since inductor's own flags forbid it.

// Both structs are filled in by fused.py, field by field.
struct Linear {
  const void* w;       // [outputs, inputs], or [inputs, outputs] if transposed
  const float* scale;  // of each output, for int8
  const float* bias;
  int64_t outputs, inputs;
};

struct Block {
  int64_t hidden, heads, kv_heads, head_dim, inner;
  int64_t format;      // 0 fp32, 1 bf16, 2 int8, 3 fp32 transposed
  int64_t layer_norm;  // 1 LayerNorm, 0 RMSNorm
  int64_t gated;       // 1: act(gate) * up, 0: act(up)
  int64_t activation;  // 0 SiLU, 1 GELU by tanh
  double eps1, eps2, scaling;
  const float *norm1, *norm1_bias, *norm2, *norm2_bias;
  Linear q, k, v, o, gate, up, down;  // k.w and v.w are null where q makes all three
};

struct Token {
  const float* x;  // [rows, hidden]
  float* y;        // the same
  int64_t rows;
  const float *cos, *sin;  // [rows or 1, head_dim], or null
  int64_t rotation_stride;
  const void* mask;  // [rows or 1, positions] or null: 0 where nothing is seen (bytes), or what is added (fp32)
  int64_t mask_stride, mask_is_bytes;
  void *keys, *values;  // [rows, kv_heads, room, head_dim]
  int64_t key_row, key_head, key_position, value_row, value_head, value_position;  // strides, in elements
  int64_t is_bf16;  // the model: its cache, and what one block hands to the next
  int64_t length;  // positions in the cache before this token
  float* attention;  // [rows, heads, length + 1], the attention weights; or null, where nobody asks for them
};

namespace {

inline bf16 narrow(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  if ((bits & 0x7fffffff) > 0x7f800000) return bf16(0x7fc0);
  return bf16((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);  // to the nearest, ties to even
}
inline void put(float* to, float value) { *to = value; }
inline void put(bf16* to, float value) { *to = narrow(value); }

// exp to 2 units in the last place, without branches, so that compilers make vectors of it (Cephes' polynomial).
inline float quick_exp(float x) {
  x = x < -87.0f ? -87.0f : (x > 88.0f ? 88.0f : x);
  const float n = __builtin_rintf(x * 1.44269504088896341f);
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const int32_t bits = (int32_t(n) + 127) << 23;
  float power;
  memcpy(&power, &bits, sizeof power);
  return p * power;
}

void normalise(const float* x, const float* weight, const float* bias, float eps, bool layer_norm, int64_t size,
               float* y) {
  double sum = 0, squares = 0;
  if (layer_norm) {
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < size; i++) sum += x[i];
  }
  const float mean = float(sum / double(size));
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < size; i++) squares += double(x[i] - mean) * double(x[i] - mean);
  const float factor = float(1.0 / std::sqrt(squares / double(size) + double(eps)));
#pragma omp simd
  for (int64_t i = 0; i < size; i++) y[i] = (x[i] - mean) * factor * weight[i];
  if (bias) {
#pragma omp simd
    for (int64_t i = 0; i < size; i++) y[i] += bias[i];
  }
}

// Who of the team computes which outputs, in whole strips so that no two write to one line of the cache.
struct Share {
  int64_t begin, end;
};
inline Share share(int64_t size, int64_t me, int64_t all) {
  const int64_t strips = (size + 15) / 16;
  const int64_t end = strips * (me + 1) / all * 16;
  return {strips * me / all * 16, end < size ? end : size};
}

// What all threads of a call see. One block of floats, cut into pieces.
struct Scratch {
  std::vector<float> floats;
  std::vector<char> prepared;
  float *norm, *qkv, *attended, *made, *after, *inner, *row_scales, *partial, *scores;
  int64_t partial_size, scores_size;
};

// Room for the largest of the blocks.
void lay_out(Scratch& s, const Block* const* blocks, const Token* tokens, int64_t count, int threads) {
  enum { NORM, QKV, ATTENDED, MADE, AFTER, INNER, ROW_SCALES, PARTIAL, SCORES, PIECES };
  int64_t sizes[PIECES] = {}, widest = 0;
  for (int64_t i = 0; i < count; i++) {
    const Block& b = *blocks[i];
    const int64_t rows = tokens[i].rows, attended = b.heads * b.head_dim;
    const int64_t qkv = attended + 2 * b.kv_heads * b.head_dim, most = std::max(std::max(b.hidden, qkv), b.inner);
    const int64_t wanted[PIECES] = {
        rows * b.hidden, rows * qkv,    rows * attended, rows * b.hidden, rows * b.hidden, rows * b.inner * 2,
        rows * 2,        b.format == 3 ? rows * most : 0, tokens[i].length + 17};
    for (int j = 0; j < PIECES; j++) sizes[j] = std::max(sizes[j], wanted[j]);
    widest = std::max(widest, rows * most);
  }
  for (int64_t& size : sizes) size = (size + 15) / 16 * 16;
  s.partial_size = sizes[PARTIAL];  // of one thread, and so are the scores
  s.scores_size = sizes[SCORES];
  sizes[PARTIAL] *= threads;
  sizes[SCORES] *= threads;
  int64_t total = 0;
  for (int64_t size : sizes) total += size;
  s.floats.resize(total);
  s.prepared.resize(widest * sizeof(float));
  float** pieces[PIECES] = {&s.norm,  &s.qkv,        &s.attended, &s.made,  &s.after,
                            &s.inner, &s.row_scales, &s.partial,  &s.scores};
  float* next = s.floats.data();
  for (int j = 0; j < PIECES; j++) {
    *pieces[j] = next;
    next += sizes[j];
  }
}

// y = x @ w.T for outputs begin .. end of all rows, by one thread.
template <class F>
void part_of_linear(const Linear& l, const float* x, const void* prepared, const float* row_scales, float* y,
                    int64_t stride, int64_t rows, Share mine) {
  const Work<F> work = {x, static_cast<const typename F::input*>(prepared), row_scales,
                        static_cast<const typename F::weight*>(l.w), l.scale, l.bias, y,
                        {rows, l.outputs, l.inputs}, stride};
  all_dots(work, mine.begin, mine.end);
}

// How a format multiplies within a team: `ready` turns one row of x into what the format wants, by whoever made it.
template <class F>
struct Rows {
  static constexpr bool as_is = std::is_same<F, Fp32>::value;
  static void ready(const float* x, Scratch& s, int64_t row, int64_t inputs) {
    if (as_is) return;
    typedef typename F::input input;
    F::prepare(x + row * inputs, reinterpret_cast<input*>(s.prepared.data()) + row * inputs, s.row_scales + row,
               {1, 0, inputs});
  }
  static void multiply(const Linear& l, const float* x, Scratch& s, float* y, int64_t stride, int64_t rows, int64_t me,
                       int64_t all) {
    const void* prepared = as_is ? static_cast<const void*>(x) : s.prepared.data();
    part_of_linear<F>(l, x, prepared, s.row_scales, y, stride, rows, share(l.outputs, me, all));
  }
};

struct Transposed {};
template <>
struct Rows<Transposed> {
  static constexpr bool as_is = true;
  static void ready(const float*, Scratch&, int64_t, int64_t) {}
  static void multiply(const Linear& l, const float* x, Scratch& s, float* y, int64_t stride, int64_t rows, int64_t me,
                       int64_t all) {
    float* mine = s.partial + me * s.partial_size;
    const int64_t size = rows * l.outputs;
    std::fill(mine, mine + size, 0.0f);
    add_transposed(x, static_cast<const float*>(l.w), mine, {rows, l.outputs, l.inputs}, l.inputs * me / all,
                   l.inputs * (me + 1) / all);
#pragma omp barrier
    const Share part = share(l.outputs, me, all);
    for (int64_t m = 0; m < rows; m++)
      for (int64_t n = part.begin; n < part.end; n++) {
        float sum = l.bias ? l.bias[n] : 0;
        for (int64_t t = 0; t < all; t++) sum += s.partial[t * s.partial_size + m * l.outputs + n];
        y[m * stride + n] = sum;
      }
#pragma omp barrier
  }
};

void rotate(float* head, const float* cos, const float* sin, int64_t size) {
  const int64_t half = size / 2;
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
__attribute__((noinline)) void attend(const Block& b, const Token& t, Scratch& s, int64_t row, int64_t kv_head, float* scores) {
  const int64_t size = b.head_dim, group = b.heads / b.kv_heads, positions = t.length + 1;
  float* qkv = s.qkv + row * (b.heads + 2 * b.kv_heads) * size;
  float* key = qkv + (b.heads + kv_head) * size;
  const float* value = qkv + (b.heads + b.kv_heads + kv_head) * size;
  T* keys = static_cast<T*>(t.keys) + row * t.key_row + kv_head * t.key_head;
  T* values = static_cast<T*>(t.values) + row * t.value_row + kv_head * t.value_head;
  const float* cos = t.cos ? t.cos + row * t.rotation_stride : nullptr;
  const float* sin = t.cos ? t.sin + row * t.rotation_stride : nullptr;
  if (cos) rotate(key, cos, sin, size);
  for (int64_t i = 0; i < size; i++) {
    put(keys + t.length * t.key_position + i, key[i]);
    put(values + t.length * t.value_position + i, value[i]);
  }
  for (int64_t head = kv_head * group; head < (kv_head + 1) * group; head++) {
    float* query = qkv + head * size;
    if (cos) rotate(query, cos, sin, size);
    int64_t j = 0;
    for (; j + 4 <= positions; j += 4) {
      for (int ahead = 4; ahead < 8; ahead++) {
        __builtin_prefetch(keys + (j + ahead) * t.key_position);
        __builtin_prefetch(values + (j + ahead) * t.value_position, 0, 2);
      }
      look<4>(query, keys + j * t.key_position, t.key_position, size, float(b.scaling), scores + j);
    }
    for (; j < positions; j++)
      look<1>(query, keys + j * t.key_position, t.key_position, size, float(b.scaling), scores + j);
    if (t.mask) {
      const int64_t at = row * t.mask_stride;
      if (t.mask_is_bytes) {
        for (j = 0; j < positions; j++)
          if (!static_cast<const uint8_t*>(t.mask)[at + j]) scores[j] = -3.0e38f;
      } else
        for (j = 0; j < positions; j++) scores[j] += static_cast<const float*>(t.mask)[at + j];
    }
    float most = -INFINITY, sum = 0;
#pragma omp simd reduction(max : most)
    for (j = 0; j < positions; j++) most = scores[j] > most ? scores[j] : most;
#pragma omp simd
    for (j = 0; j < positions; j++) scores[j] = quick_exp(scores[j] - most);
#pragma omp simd reduction(+ : sum)
    for (j = 0; j < positions; j++) sum += scores[j];
    if (t.attention) {
      float* weights = t.attention + (row * b.heads + head) * positions;
      const float factor = 1.0f / sum;
#pragma omp simd
      for (j = 0; j < positions; j++) weights[j] = scores[j] * factor;
    }
    float* out = s.attended + (row * b.heads + head) * size;
    int64_t i = 0;
    for (; i + 4 * LANES <= size; i += 4 * LANES)
      gather<4>(values + i, t.value_position, scores, positions, 1.0f / sum, out + i);
    for (; i + LANES <= size; i += LANES)
      gather<1>(values + i, t.value_position, scores, positions, 1.0f / sum, out + i);
    for (; i < size; i++) {
      float one = 0;
      for (j = 0; j < positions; j++) one += scores[j] * widen(values[j * t.value_position + i]);
      out[i] = one / sum;
    }
  }
}

// One block by a team of threads, of which this is one.
template <class F>
void block_by_team(const Block& b, const Token& t, Scratch& s, int64_t me, int64_t all) {
  const int64_t qkv = (b.heads + 2 * b.kv_heads) * b.head_dim, attended = b.heads * b.head_dim, rows = t.rows;
  for (int64_t m = me; m < rows; m += all) {
    normalise(t.x + m * b.hidden, b.norm1, b.norm1_bias, float(b.eps1), b.layer_norm, b.hidden, s.norm + m * b.hidden);
    Rows<F>::ready(s.norm, s, m, b.hidden);
  }
#pragma omp barrier
  Rows<F>::multiply(b.q, s.norm, s, s.qkv, qkv, rows, me, all);
  if (b.k.w) {
    Rows<F>::multiply(b.k, s.norm, s, s.qkv + b.q.outputs, qkv, rows, me, all);
    Rows<F>::multiply(b.v, s.norm, s, s.qkv + b.q.outputs + b.k.outputs, qkv, rows, me, all);
  }
#pragma omp barrier
  float* scores = s.scores + me * s.scores_size;
  for (int64_t task = me; task < rows * b.kv_heads; task += all) {
    if (t.is_bf16) attend<bf16>(b, t, s, task / b.kv_heads, task % b.kv_heads, scores);
    else attend<float>(b, t, s, task / b.kv_heads, task % b.kv_heads, scores);
  }
#pragma omp barrier
  if (!Rows<F>::as_is) {
    for (int64_t m = me; m < rows; m += all) Rows<F>::ready(s.attended, s, m, attended);
#pragma omp barrier
  }
  Rows<F>::multiply(b.o, s.attended, s, s.made, b.hidden, rows, me, all);
#pragma omp barrier
  for (int64_t m = me; m < rows; m += all) {
    float* after = s.after + m * b.hidden;
    for (int64_t i = 0; i < b.hidden; i++) after[i] = t.x[m * b.hidden + i] + s.made[m * b.hidden + i];
    normalise(after, b.norm2, b.norm2_bias, float(b.eps2), b.layer_norm, b.hidden, s.norm + m * b.hidden);
    Rows<F>::ready(s.norm, s, m, b.hidden);
  }
#pragma omp barrier
  float *up = s.inner, *gate = s.inner + rows * b.inner;
  Rows<F>::multiply(b.up, s.norm, s, up, b.inner, rows, me, all);
  if (b.gated) Rows<F>::multiply(b.gate, s.norm, s, gate, b.inner, rows, me, all);
  const Share mine = share(b.inner, me, all);  // what this thread has just made
  for (int64_t m = 0; m < rows; m++) {
    float* to = up + m * b.inner;
    const float* from = (b.gated ? gate : up) + m * b.inner;
    // x * sigmoid(z): SiLU with z = x, and GELU by tanh with z = 2 sqrt(2 / pi) (x + 0.044715 x^3)
#pragma omp simd
    for (int64_t n = mine.begin; n < mine.end; n++) {
      const float x = from[n], cube = x * x * x;
      const float z = b.activation == 0 ? x : 1.5957691216057308f * (x + 0.044715f * cube);
      to[n] = x / (1.0f + quick_exp(-z)) * (b.gated ? to[n] : 1.0f);
    }
  }
#pragma omp barrier
  if (!Rows<F>::as_is) {
    for (int64_t m = me; m < rows; m += all) Rows<F>::ready(up, s, m, b.inner);
#pragma omp barrier
  }
  Rows<F>::multiply(b.down, up, s, s.made, b.hidden, rows, me, all);
  const Share last = share(b.hidden, me, all);
  for (int64_t m = 0; m < rows; m++)
    for (int64_t n = last.begin; n < last.end; n++) {
      const float y = s.after[m * b.hidden + n] + s.made[m * b.hidden + n];
      t.y[m * b.hidden + n] = t.is_bf16 ? widen(narrow(y)) : y;
    }
}

}  // namespace

// `blocks` one after the other: tokens[i].x is what blocks[i] is given, tokens[i].y what it makes of it.
extern "C" void decoder_blocks(const Block* const* blocks, const Token* tokens, int64_t count, int threads) {
  static thread_local Scratch kept;  // of the calling thread: two calls at once have two
  Scratch& s = kept;
  lay_out(s, blocks, tokens, count, threads);
#pragma omp parallel num_threads(threads)
  {
    const int64_t me = omp_get_thread_num(), all = omp_get_num_threads();
    for (int64_t i = 0; i < count; i++) {
      const Block& b = *blocks[i];
      const Token& t = tokens[i];
      switch (b.format) {
        case 0: block_by_team<Fp32>(b, t, s, me, all); break;
        case 1: block_by_team<Bf16>(b, t, s, me, all); break;
        case 2: block_by_team<Int8>(b, t, s, me, all); break;
        default: block_by_team<Transposed>(b, t, s, me, all);
      }
#pragma omp barrier
    }
  }
}
