// Blocks of a transformer over a whole sequence that sees itself both ways: norm, attention, norm, feed-forward.
//
// A flow's estimator runs dozens of small ones at each step of its solver. In eager PyTorch two thirds of such a block
// are attention and what lies between the products. Here a block is one call: rows go from a norm to the end of what
// needs no other row, in pieces that stay in a core's cache, and threads meet twice. Products are in bf16 with sums in
// fp32, by oneDNN's kernels for AMX (which torch has in it); norms, softmax, GELU and what is added up are in fp32.
// Built behind block.cpp, whose `narrow` and `bf16` it uses. Products are of 16, 32, 48 or 64 rows, and of 64 or 256 keys:
// oneDNN makes and keeps a kernel for each shape that it meets, and sequences have any length.
#if defined(__AMX_BF16__)
#include <ATen/native/CPUBlas.h>
#endif

// Both structs are filled in by sequence_kernel.py, field by field.
struct Dense {
  const bf16* w;  // in panels of 64 outputs, each [inputs / 2][64][2]
  const float* bias;
  int64_t outputs, inputs;
};

struct SequenceBlock {
  int64_t hidden, heads, inner;  // multiples of 64; heads are 64 wide
  double eps1, eps2, scaling;
  const float *norm1, *norm1_bias, *norm2, *norm2_bias;
  Dense qkv, o, up, down;
};

struct SequenceCall {
  const float* x;     // [batch][length][hidden]
  float* y;           // the same
  const float* mask;  // [batch][length], what is added for a key; or null
  int64_t batch, length;
};

namespace {

constexpr int64_t PANEL = 64, WIDE = 256, ROWS = 64;

// Keys are multiplied in wide panels as long as there are enough of them: how many are from `key` on.
inline int64_t panel_at(int64_t key, int64_t padded) { return key < padded / WIDE * WIDE ? WIDE : PANEL; }

bool has_amx() {
#if defined(__AMX_BF16__)
  static const bool has = at::native::cpublas::could_pack(at::kBFloat16);
  return has;
#else
  return false;
#endif
}

// c[rows][columns] (+)= a[rows][inputs] of a panel, [inputs / 2][columns][2]
void multiply_panel(const bf16* a, int64_t stride, const bf16* panel, int64_t columns, int64_t rows, int64_t inputs,
                    bool add, float* c) {
#if defined(__AMX_BF16__)
  if (has_amx()) {
    at::native::cpublas::brgemm(rows, columns, inputs, stride, columns, columns, add,
                                reinterpret_cast<const at::BFloat16*>(a),
                                reinterpret_cast<const at::BFloat16*>(panel), c, true);
    return;
  }
#endif
  for (int64_t m = 0; m < rows; m++) {
    float* to = c + m * columns;
    if (!add) memset(to, 0, columns * sizeof(float));
    for (int64_t k = 0; k < inputs; k++) {
      const float one = widen(a[m * stride + k]);
      const bf16* from = panel + k / 2 * columns * 2 + k % 2;
#pragma omp simd
      for (int64_t n = 0; n < columns; n++) to[n] += one * widen(from[2 * n]);
    }
  }
}

void release() {
#if defined(__AMX_BF16__)
  if (has_amx()) at::native::cpublas::brgemm_release(true);
#endif
}

// Sixteen numbers at a time: compilers for any processor make of it what it has.
typedef float floats __attribute__((vector_size(64)));
typedef uint32_t words __attribute__((vector_size(64)));
typedef bf16 halves __attribute__((vector_size(32)));
constexpr int64_t AT_ONCE = 16;

inline floats read(const float* p) {
  floats v;
  memcpy(&v, p, sizeof v);
  return v;
}
template <class V, class T>
inline void write(T* p, V v) {
  memcpy(p, &v, sizeof v);
}

// To the nearest, ties to even, of what is a number or the processor's own NaN.
inline halves round_to_bf16(floats v) {
#if defined(__AVX512BF16__)
  return (halves)_mm512_cvtneps_pbh((__m512)v);
#endif
  words bits = (words)v;
  bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return __builtin_convertvector(bits, halves);
}

// 2 to the x, for x up to 0, to 5e-5: it is rounded to bf16, which has 4e-3.
inline floats quick_exp2(floats x) {
  x = x < -126.0f ? floats{} - 126.0f : x;  // NaN stays
  const floats shifted = x + 12582912.0f;    // 1.5 * 2^23: the nearest integer is in the low bits
  const floats r = x - (shifted - 12582912.0f);
  floats p = floats{} + 9.6181291e-3f;
  p = p * r + 5.5504109e-2f;
  p = p * r + 2.4022651e-1f;
  p = p * r + 6.9314718e-1f;
  p = p * r + 1.0f;
  return (floats)((words)p + ((words)shifted << 23));
}

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

void layer_norm(const float* x, const float* weight, const float* bias, float eps, int64_t size, bf16* y) {
  float sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < size; i++) sum += x[i];
  const float mean = sum / float(size);
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < size; i++) squares += (x[i] - mean) * (x[i] - mean);
  const float factor = 1.0f / std::sqrt(squares / float(size) + eps);
#pragma omp simd
  for (int64_t i = 0; i < size; i++) y[i] = narrow((x[i] - mean) * factor * weight[i] + bias[i]);
}

inline int64_t up_to(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// How a sequence is cut: as few pieces as fit into a cache, but as many as keep all threads at work.
int64_t rows_of_a_piece(int64_t batch, int64_t length, int64_t threads) {
  const int64_t fewest = (length + ROWS - 1) / ROWS;
  int64_t pieces = fewest;
  while (batch * pieces % threads && pieces < 2 * fewest) pieces++;
  return std::min(ROWS, up_to((length + pieces - 1) / pieces, 16));
}

// What threads share, and what each has for itself. Rows behind a sequence's end are computed with, and never read.
struct Workspace {
  int64_t padded, attended;  // keys and their values, up to whole panels; heads * 64
  std::vector<bf16> queries, keys, values, made;
  std::vector<float> seen;  // [batch][padded]: the mask, times log2(e), and next to minus infinity behind the end
  struct Own {
    std::vector<bf16> normed, wide, weights;
    std::vector<float> after, scores;
  };
  std::vector<Own> own;

  void fit(const SequenceBlock& b, const SequenceCall& call, int threads) {
    padded = up_to(call.length, PANEL);
    attended = b.heads * PANEL;
    const size_t rows = size_t(call.batch * call.length + ROWS), all = size_t(call.batch * padded * attended);
    grow(queries, rows * attended);
    grow(made, rows * attended);
    grow(keys, all);
    grow(values, all);
    grow(seen, size_t(call.batch * padded));
    if (own.size() < size_t(threads)) own.resize(threads);
    for (Own& o : own) {
      grow(o.normed, size_t(ROWS * b.hidden));
      grow(o.wide, size_t(ROWS * b.inner));
      grow(o.after, size_t(ROWS * b.hidden));
      grow(o.scores, size_t(ROWS * padded));
      grow(o.weights, size_t(ROWS * padded));
    }
  }

 private:
  template <class T>
  static void grow(std::vector<T>& buffer, size_t size) {
    if (buffer.size() < size) buffer.resize(size);
  }
};

template <class Then>
void multiply(const Dense& layer, const bf16* a, int64_t rows, float* c, Then then) {
  for (int64_t n = 0; n < layer.outputs; n += PANEL) {
    multiply_panel(a, layer.inputs, layer.w + n * layer.inputs, PANEL, up_to(rows, 16), layer.inputs, false, c);
    then(n, layer.bias ? layer.bias + n : nullptr);
  }
}

// Queries as rows, in units of log2; keys and values as panels that other rows multiply.
void project(const SequenceBlock& b, const SequenceCall& call, Workspace& s, Workspace::Own& own, int64_t n,
             int64_t begin, int64_t rows, float* c) {
  const float scaling = float(b.scaling * 1.4426950408889634);
  const int64_t row = n * call.length + begin;
  for (int64_t r = 0; r < rows; r++)
    layer_norm(call.x + (row + r) * b.hidden, b.norm1, b.norm1_bias, float(b.eps1), b.hidden,
               own.normed.data() + r * b.hidden);
  multiply(b.qkv, own.normed.data(), rows, c, [&](int64_t at, const float* bias) {
    if (bias)
      for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < PANEL; i++) c[r * PANEL + i] += bias[i];
    const int64_t head = n * b.heads + at % s.attended / PANEL;
    if (at < s.attended) {
      for (int64_t r = 0; r < rows; r++) {
        bf16* to = s.queries.data() + (row + r) * s.attended + at;
        for (int64_t i = 0; i < PANEL; i += AT_ONCE) write(to + i, round_to_bf16(read(c + r * PANEL + i) * scaling));
      }
    } else if (at < 2 * s.attended) {
      for (int64_t r = 0; r < rows; r++) {  // in panels, [32][256 or 64][2]
        bf16 line[PANEL];
        for (int64_t i = 0; i < PANEL; i += AT_ONCE) write(line + i, round_to_bf16(read(c + r * PANEL + i)));
        const int64_t key = begin + r, width = panel_at(key, s.padded);
        bf16* to = s.keys.data() + (head * s.padded + key / width * width) * PANEL + key % width * 2;
        for (int64_t i = 0; i < PANEL; i += 2) memcpy(to + i * width, line + i, 2 * sizeof(bf16));
      }
    } else {
      for (int64_t r = 0; r < rows; r += 2) {  // [padded / 2][64][2]; pieces begin at even rows
        bf16* to = s.values.data() + (head * s.padded + begin + r) * PANEL;
        const float *one = c + r * PANEL, *two = one + PANEL;
        for (int64_t i = 0; i < PANEL; i += AT_ONCE) {
          const words low = __builtin_convertvector(round_to_bf16(read(one + i)), words);
          const words high = __builtin_convertvector(round_to_bf16(read(two + i)), words);
          write(to + 2 * i, r + 1 < rows ? (high << 16 | low) : low);
        }
      }
    }
  });
}

// What lies behind the end is multiplied too, by next to nothing: it must be numbers.
void pad(const SequenceBlock& b, const SequenceCall& call, Workspace& s, int64_t n, int64_t head) {
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

void attend(const SequenceBlock& b, const SequenceCall& call, Workspace& s, Workspace::Own& own, int64_t n,
            int64_t head, int64_t begin, int64_t rows, float* c) {
  const int64_t whole = up_to(rows, 16), row = n * call.length + begin;
  const bf16* queries = s.queries.data() + row * s.attended + head * PANEL;
  const bf16* keys = s.keys.data() + (n * b.heads + head) * s.padded * PANEL;
  const bf16* values = s.values.data() + (n * b.heads + head) * s.padded * PANEL;
  const float* seen = s.seen.data() + n * s.padded;
  float* scores = own.scores.data();  // in panels, [64][256 or 64]; the weights that are made of them, too
  bf16* weights = own.weights.data();
  int64_t width;
  for (int64_t j = 0; j < s.padded; j += width) {
    width = panel_at(j, s.padded);
    multiply_panel(queries, s.attended, keys + j * PANEL, width, whole, PANEL, false, scores + j * ROWS);
  }
  float factors[ROWS];
  for (int64_t r = 0; r < rows; r++) {
    floats most = floats{} - INFINITY, sums = floats{};
    for (int64_t j = 0; j < s.padded; j += width) {
      width = panel_at(j, s.padded);
      const float* line = scores + j * ROWS + r * width;
      for (int64_t i = 0; i < width; i += AT_ONCE) {
        const floats score = read(line + i) + read(seen + j + i);
        most = score < most ? most : score;  // NaN comes through
      }
    }
    float top = most[0], sum = 0;
    for (int64_t i = 1; i < AT_ONCE; i++) top = most[i] < top ? top : most[i];
    for (int64_t j = 0; j < s.padded; j += width) {
      width = panel_at(j, s.padded);
      const int64_t at = j * ROWS + r * width;
      for (int64_t i = 0; i < width; i += AT_ONCE) {
        const floats weight = quick_exp2(read(scores + at + i) + read(seen + j + i) - top);
        sums += weight;
        write(weights + at + i, round_to_bf16(weight));
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
    for (int64_t i = 0; i < PANEL; i += AT_ONCE) write(to + i, round_to_bf16(read(c + r * PANEL + i) * factors[r]));
  }
}

inline void add(const float* x, const float* bias, const float* c, float* y) {
#pragma omp simd
  for (int64_t i = 0; i < PANEL; i++) y[i] = x[i] + c[i] + (bias ? bias[i] : 0.0f);
}

void feed_forward(const SequenceBlock& b, const SequenceCall& call, Workspace& s, Workspace::Own& own, int64_t row,
                  int64_t rows, float* c) {
  float* after = own.after.data();
  multiply(b.o, s.made.data() + row * s.attended, rows, c, [&](int64_t at, const float* bias) {
    for (int64_t r = 0; r < rows; r++)
      add(call.x + (row + r) * b.hidden + at, bias, c + r * PANEL, after + r * b.hidden + at);
  });
  for (int64_t r = 0; r < rows; r++)
    layer_norm(after + r * b.hidden, b.norm2, b.norm2_bias, float(b.eps2), b.hidden, own.normed.data() + r * b.hidden);
  multiply(b.up, own.normed.data(), rows, c, [&](int64_t at, const float* bias) {
    for (int64_t r = 0; r < rows; r++) {
      bf16* to = own.wide.data() + r * b.inner + at;
      const float* from = c + r * PANEL;
      for (int64_t i = 0; i < PANEL; i += AT_ONCE)
        write(to + i, round_to_bf16(exact_gelu(read(from + i) + (bias ? read(bias + i) : floats{}))));
    }
  });
  multiply(b.down, own.wide.data(), rows, c, [&](int64_t at, const float* bias) {
    for (int64_t r = 0; r < rows; r++)
      add(after + r * b.hidden + at, bias, c + r * PANEL, call.y + (row + r) * b.hidden + at);
  });
}

}  // namespace

extern "C" int multiplies_in_bf16() { return has_amx(); }

extern "C" void sequence_block(const SequenceBlock* block, const SequenceCall* given, int threads) {
  static thread_local Workspace kept;  // of the calling thread: two calls at once have two
  Workspace& s = kept;
  const SequenceBlock& b = *block;
  const SequenceCall& call = *given;
  s.fit(b, call, threads);
  const int64_t length = call.length, size = rows_of_a_piece(call.batch, length, threads);
  const int64_t pieces = (length + size - 1) / size;
#pragma omp parallel num_threads(threads)
  {
    Workspace::Own& own = s.own[omp_get_thread_num()];
    alignas(64) float c[ROWS * PANEL];
#pragma omp for schedule(static) nowait
    for (int64_t task = 0; task < call.batch * b.heads; task++) pad(b, call, s, task / b.heads, task % b.heads);
#pragma omp for schedule(static) nowait
    for (int64_t n = 0; n < call.batch; n++)
      for (int64_t j = 0; j < s.padded; j++)
        s.seen[n * s.padded + j] =
            j >= length ? -3.0e38f : call.mask ? std::max(call.mask[n * length + j] * 1.44269504f, -3.0e38f) : 0.0f;
#pragma omp for schedule(static)
    for (int64_t task = 0; task < call.batch * pieces; task++) {
      const int64_t begin = task % pieces * size;
      project(b, call, s, own, task / pieces, begin, std::min(size, length - begin), c);
    }
#pragma omp for schedule(static)
    for (int64_t task = 0; task < call.batch * b.heads * pieces; task++) {
      const int64_t n = task / (b.heads * pieces), begin = task % pieces * size;
      attend(b, call, s, own, n, task / pieces % b.heads, begin, std::min(size, length - begin), c);
    }
#pragma omp for schedule(static)
    for (int64_t task = 0; task < call.batch * pieces; task++) {
      const int64_t begin = task % pieces * size;
      feed_forward(b, call, s, own, task / pieces * length + begin, std::min(size, length - begin), c);
    }
    release();
  }
}
