// Every kernel against plain scalar loops, at each instruction set that this processor has: all formats, odd shapes, one
// to nine rows. Needs neither torch nor Python, so that it runs under an emulator too. `make kernels-test`.
//
// The library is linked in and asked through what it exports. Threads are this file's own.
#include <algorithm>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "../abi.h"

extern "C" {
const char* accelerate_tts_level(int);
const char* accelerate_tts_choose(const char*);
void accelerate_tts_use_threads(int, void* const*);
int accelerate_tts_skinny_linear(int64_t, const float*, const void*, const float*, const float*, float*, int64_t,
                                 int64_t, int64_t, int);
int accelerate_tts_decoder_blocks(const DecoderBlock* const*, const Token*, int64_t, int);
int accelerate_tts_transformer_block(const TransformerBlock*, const TransformerCall*, int);
int accelerate_tts_residual_block(const ResidualBlock*, const ResidualCall*, int);
}

namespace {

// --- threads, as an OpenMP has them ----------------------------------------------------------------------------------

struct {
  std::mutex lock;
  std::condition_variable all_here;
  int size = 1, waiting = 0, turn = 0;
} team;
thread_local int number = 0;

void parallel(void (*work)(void*), void* data, unsigned threads, unsigned) {
  team.size = int(threads);
  std::vector<std::thread> others;
  for (unsigned i = 1; i < threads; i++)
    others.emplace_back([=] {
      number = int(i);
      work(data);
    });
  number = 0;
  work(data);
  for (auto& other : others) other.join();
}
void barrier() {
  std::unique_lock<std::mutex> held(team.lock);
  const int turn = team.turn;
  if (++team.waiting == team.size) {
    team.waiting = 0;
    team.turn++;
    team.all_here.notify_all();
  } else
    team.all_here.wait(held, [&] { return team.turn != turn; });
}
int thread_number() { return number; }
int thread_count() { return team.size; }

// --- numbers ---------------------------------------------------------------------------------------------------------

std::mt19937 generator(1);
float normal(float scale = 1) { return std::normal_distribution<float>(0, scale)(generator); }
std::vector<float> normals(size_t count, float scale = 1) {
  std::vector<float> made(count);
  for (float& one : made) one = normal(scale);
  return made;
}
uint16_t narrow(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
float widen(uint16_t value) {
  const uint32_t bits = uint32_t(value) << 16;
  float wide;
  memcpy(&wide, &bits, sizeof wide);
  return wide;
}

int failures = 0;
void expect(double error, double limit, const std::string& what) {
  if (error <= limit) return;  // a NaN is more than any limit
  std::printf("FAILED %s: %g, more than %g\n", what.c_str(), error, limit);
  failures++;
}
double distance(const std::vector<double>& expected, const float* found) {
  double difference = 0, size = 0;
  for (size_t i = 0; i < expected.size(); i++) {
    difference += (expected[i] - found[i]) * (expected[i] - found[i]);
    size += expected[i] * expected[i];
  }
  return std::sqrt(difference / std::max(size, 1e-30));
}

// A layer in one of the four formats, and what it really holds.
struct Layer {
  int64_t outputs, inputs;
  std::vector<float> truth, bias, scale, wide;
  std::vector<uint16_t> halves;
  std::vector<int8_t> bytes;
  Format format;
  Layer(Format format, int64_t outputs, int64_t inputs, bool with_bias)
      : outputs(outputs), inputs(inputs), truth(outputs * inputs), format(format) {
    if (with_bias) bias = normals(outputs);
    if (format == INT8) scale = normals(outputs, 0.01f);
    for (int64_t n = 0; n < outputs; n++)
      for (int64_t k = 0; k < inputs; k++) {
        const float value = normal(1 / std::sqrt(float(inputs)));
        float& kept = truth[n * inputs + k] = value;
        if (format == BF16) {
          halves.push_back(narrow(value));
          kept = widen(halves.back());
        } else if (format == INT8) {
          bytes.push_back(int8_t(int(generator() % 255) - 127));
          kept = bytes.back() * scale[n];
        }
      }
    if (format == FP32) wide = truth;
    if (format == TRANSPOSED) {
      wide.resize(truth.size());
      for (int64_t n = 0; n < outputs; n++)
        for (int64_t k = 0; k < inputs; k++) wide[k * outputs + n] = truth[n * inputs + k];
    }
  }
  const void* data() const {
    return format == BF16 ? static_cast<const void*>(halves.data())
                          : format == INT8 ? static_cast<const void*>(bytes.data()) : wide.data();
  }
  Linear linear() const {
    return {data(), scale.empty() ? nullptr : scale.data(), bias.empty() ? nullptr : bias.data(), outputs, inputs};
  }
  std::vector<double> operator()(const std::vector<double>& x) const {
    const int64_t rows = int64_t(x.size()) / inputs;
    std::vector<double> y(rows * outputs);
    for (int64_t m = 0; m < rows; m++)
      for (int64_t n = 0; n < outputs; n++) {
        double sum = bias.empty() ? 0 : bias[n];
        for (int64_t k = 0; k < inputs; k++) sum += x[m * inputs + k] * truth[n * inputs + k];
        y[m * outputs + n] = sum;
      }
    return y;
  }
};

std::vector<double> wide(const std::vector<float>& x) { return {x.begin(), x.end()}; }

std::vector<double> normed(const std::vector<double>& x, int64_t size, const std::vector<float>& weight,
                           const std::vector<float>& bias, double eps, bool layer_norm) {
  std::vector<double> y(x.size());
  for (size_t m = 0; m < x.size() / size; m++) {
    double mean = 0, squares = 0;
    if (layer_norm)
      for (int64_t i = 0; i < size; i++) mean += x[m * size + i] / double(size);
    for (int64_t i = 0; i < size; i++) squares += (x[m * size + i] - mean) * (x[m * size + i] - mean);
    for (int64_t i = 0; i < size; i++)
      y[m * size + i] = (x[m * size + i] - mean) / std::sqrt(squares / double(size) + eps) * weight[i] +
                        (bias.empty() ? 0 : bias[i]);
  }
  return y;
}

// --- a few rows ------------------------------------------------------------------------------------------------------

void few_rows(const std::string& level) {
  const char* names[] = {"fp32", "bf16", "int8", "transposed"};
  for (int format = FP32; format <= TRANSPOSED; format++)
    for (int64_t rows = 1; rows <= 9; rows++)
      for (const auto& [outputs, inputs] : std::vector<std::pair<int64_t, int64_t>>{
               {1, 1}, {3, 5}, {17, 31}, {64, 64}, {67, 130}, {33, 257}, {140, 512}})
        for (int threads = 1; threads <= 3; threads++) {
          const Layer layer(Format(format), outputs, inputs, rows % 2);
          const std::vector<float> x = normals(rows * inputs);
          std::vector<float> y(rows * outputs + 1, 77.0f);
          const Linear told = layer.linear();
          const int code = accelerate_tts_skinny_linear(format, x.data(), told.w, told.scale, told.bias, y.data(), rows,
                                                        outputs, inputs, threads);
          const std::string what = level + " " + names[format] + " " + std::to_string(rows) + " rows, " +
                                   std::to_string(outputs) + " x " + std::to_string(inputs);
          expect(code, 0, what);
          expect(distance(layer(wide(x)), y.data()), format == INT8 ? 3e-4 : 2e-6, what);
          expect(std::fabs(y.back() - 77.0f), 0, what + ": behind the end");
        }
  // What is not finite stays so, in its row.
  for (int format = FP32; format <= TRANSPOSED; format++)
    for (float value : {NAN, INFINITY, -INFINITY}) {
      const Layer layer(Format(format), 5, 70, false);
      std::vector<float> x = normals(2 * 70), y(10);
      x[70 + 40] = value;
      const Linear told = layer.linear();
      accelerate_tts_skinny_linear(format, x.data(), told.w, told.scale, nullptr, y.data(), 2, 5, 70, 1);
      for (int n = 0; n < 5; n++) {
        expect(std::isfinite(y[n]) ? 0 : 1, 0, level + ": a row beside one that is not finite");
        expect(std::isfinite(y[5 + n]) ? 1 : 0, 0, level + ": a row that is not finite");
      }
    }
}

// --- one token -------------------------------------------------------------------------------------------------------

struct Sizes {
  Format format;
  int64_t rows, heads, kv_heads, head_dim, inner, length;
  bool gated, layer_norm, joined, rotated, own_rows;
  int mask;  // 0 none, 1 bytes, 2 added
};

void one_token(const std::string& level, const Sizes& s, int threads) {
  const int64_t hidden = 40, attended = s.heads * s.head_dim, keyed = s.kv_heads * s.head_dim, room = s.length + 3;
  const bool biased = s.layer_norm;
  const Layer q(s.format, s.joined ? attended + 2 * keyed : attended, hidden, biased), k(s.format, keyed, hidden, biased),
      v(s.format, keyed, hidden, biased), o(s.format, hidden, attended, biased), gate(s.format, s.inner, hidden, false),
      up(s.format, s.inner, hidden, biased), down(s.format, hidden, s.inner, biased);
  const std::vector<float> norm1 = normals(hidden), norm2 = normals(hidden), none;
  const std::vector<float> bias1 = biased ? normals(hidden) : none, bias2 = biased ? normals(hidden) : none;
  std::vector<float> keys = normals(s.rows * s.kv_heads * room * s.head_dim), values = normals(keys.size());
  const std::vector<float> cos = normals(s.head_dim), sin = normals(s.head_dim), x = normals(s.rows * hidden);
  std::vector<int64_t> lengths(s.rows, s.length);
  std::vector<void*> own_keys, own_values;
  for (int64_t m = 0; m < s.rows; m++) {
    if (s.own_rows) lengths[m] = s.length - m % (s.length + 1);
    own_keys.push_back(keys.data() + m * s.kv_heads * room * s.head_dim);
    own_values.push_back(values.data() + m * s.kv_heads * room * s.head_dim);
  }
  std::vector<uint8_t> seen(s.rows * (s.length + 1), 1);
  std::vector<float> added(seen.size(), 0.0f);
  if (s.mask)
    for (int64_t m = 0; m < s.rows; m++)
      for (int64_t j = 0; j < lengths[m] / 2; j++) {
        seen[m * (s.length + 1) + j] = 0;
        added[m * (s.length + 1) + j] = -1e9f;
      }

  const std::vector<double> given = normed(wide(x), hidden, norm1, bias1, 1e-5, s.layer_norm);
  const std::vector<double> all = q(given), only_k = s.joined ? all : k(given), only_v = s.joined ? all : v(given);
  std::vector<double> gathered(s.rows * attended), weights(s.rows * s.heads * (s.length + 1));
  std::vector<float> expected_keys = keys, expected_values = values;
  for (int64_t m = 0; m < s.rows; m++) {
    const int64_t positions = lengths[m] + 1, width = q.outputs;
    auto rotate = [&](std::vector<double> head) {
      const std::vector<double> before = head;
      const int64_t half = s.head_dim / 2;
      for (int64_t i = 0; s.rotated && i < half; i++) {
        head[i] = before[i] * cos[i] - before[i + half] * sin[i];
        head[i + half] = before[i + half] * cos[i + half] + before[i] * sin[i + half];
      }
      return head;
    };
    auto piece = [&](const std::vector<double>& of, int64_t stride, int64_t at) {
      return std::vector<double>(of.begin() + m * stride + at, of.begin() + m * stride + at + s.head_dim);
    };
    for (int64_t h = 0; h < s.kv_heads; h++) {
      const std::vector<double> key = rotate(s.joined ? piece(all, width, attended + h * s.head_dim)
                                                      : piece(only_k, keyed, h * s.head_dim));
      const std::vector<double> value = s.joined ? piece(all, width, attended + keyed + h * s.head_dim)
                                                 : piece(only_v, keyed, h * s.head_dim);
      const int64_t begin = (m * s.kv_heads + h) * room * s.head_dim;
      for (int64_t i = 0; i < s.head_dim; i++) {
        expected_keys[begin + lengths[m] * s.head_dim + i] = float(key[i]);
        expected_values[begin + lengths[m] * s.head_dim + i] = float(value[i]);
      }
      const int64_t group = s.heads / s.kv_heads;
      for (int64_t head = h * group; head < (h + 1) * group; head++) {
        const std::vector<double> query = rotate(piece(all, width, head * s.head_dim));
        std::vector<double> scores(positions);
        double peak = -1e300, sum = 0;
        for (int64_t j = 0; j < positions; j++) {
          for (int64_t i = 0; i < s.head_dim; i++)
            scores[j] += query[i] * expected_keys[begin + j * s.head_dim + i] * 0.2;
          if (s.mask) scores[j] += added[m * (s.length + 1) + j];
          peak = std::max(peak, scores[j]);
        }
        for (double& score : scores) sum += score = std::exp(score - peak);
        for (int64_t j = 0; j < positions; j++) {
          weights[(m * s.heads + head) * (s.length + 1) + j] = scores[j] / sum;
          for (int64_t i = 0; i < s.head_dim; i++)
            gathered[m * attended + head * s.head_dim + i] +=
                scores[j] / sum * expected_values[begin + j * s.head_dim + i];
        }
      }
    }
  }
  std::vector<double> after = o(gathered);
  for (size_t i = 0; i < after.size(); i++) after[i] += x[i];
  const std::vector<double> next = normed(after, hidden, norm2, bias2, 1e-5, s.layer_norm);
  std::vector<double> inner = up(next);
  const std::vector<double> gated = s.gated ? gate(next) : inner;
  for (size_t i = 0; i < inner.size(); i++) {
    const double z = gated[i];
    const double active = s.gated ? z / (1 + std::exp(-z))
                                  : 0.5 * z * (1 + std::tanh(0.7978845608 * (z + 0.044715 * z * z * z)));
    inner[i] = active * (s.gated ? inner[i] : 1.0);
  }
  std::vector<double> expected = down(inner);
  for (size_t i = 0; i < expected.size(); i++) expected[i] += after[i];

  DecoderBlock block = {};
  block.hidden = hidden, block.heads = s.heads, block.kv_heads = s.kv_heads, block.head_dim = s.head_dim;
  block.inner = s.inner, block.format = s.format, block.layer_norm = s.layer_norm, block.gated = s.gated;
  block.activation = s.gated ? 0 : 1, block.eps1 = block.eps2 = 1e-5, block.scaling = 0.2;
  block.norm1 = norm1.data(), block.norm2 = norm2.data();
  block.norm1_bias = biased ? bias1.data() : nullptr, block.norm2_bias = biased ? bias2.data() : nullptr;
  block.q = q.linear(), block.o = o.linear(), block.up = up.linear(), block.down = down.linear();
  if (!s.joined) block.k = k.linear(), block.v = v.linear();
  if (s.gated) block.gate = gate.linear();
  std::vector<float> y(s.rows * hidden), attention(weights.size(), 5.0f);
  Token token = {};
  token.x = x.data(), token.y = y.data(), token.rows = s.rows;
  token.cos = s.rotated ? cos.data() : nullptr, token.sin = s.rotated ? sin.data() : nullptr;
  token.mask = s.mask == 1 ? static_cast<const void*>(seen.data()) : s.mask == 2 ? added.data() : nullptr;
  token.mask_stride = s.length + 1, token.mask_is_bytes = s.mask == 1;
  token.keys = keys.data(), token.values = values.data();
  token.key_row = token.value_row = s.kv_heads * room * s.head_dim;
  token.key_head = token.value_head = room * s.head_dim;
  token.key_position = token.value_position = s.head_dim;
  token.length = s.length, token.attention = attention.data();
  if (s.own_rows) {
    token.keys = token.values = nullptr;
    token.row_keys = own_keys.data(), token.row_values = own_values.data(), token.row_lengths = lengths.data();
  }
  const DecoderBlock* one = &block;
  const std::string what = level + ": a token, format " + std::to_string(s.format) + ", " + std::to_string(s.rows) +
                           " rows, " + std::to_string(s.length) + " before, mask " + std::to_string(s.mask) +
                           (s.own_rows ? ", each row's own cache" : "");
  expect(accelerate_tts_decoder_blocks(&one, &token, 1, threads), 0, what);
  const double limit = s.format == INT8 ? 2e-3 : 2e-5;
  expect(distance(expected, y.data()), limit, what);
  expect(distance(weights, attention.data()), limit, what + ": attention weights");
  expect(distance(wide(expected_keys), keys.data()), limit, what + ": keys");
  expect(distance(wide(expected_values), values.data()), limit, what + ": values");
}

void tokens(const std::string& level) {
  for (int format = FP32; format <= TRANSPOSED; format++)
    for (int64_t rows : {1, 2, 3, 5, 8})
      for (int64_t length : {0, 1, 6, 37})
        for (int mask = 0; mask < 3; mask++) {
          const bool gpt = format == TRANSPOSED || length == 6;
          const bool own_rows = rows > 1 && length == 37;
          one_token(level, {Format(format), rows, 6, gpt ? 6 : 2, length == 37 ? 20 : 16, 53, length, !gpt, gpt, gpt,
                            !gpt, own_rows, mask}, int(1 + (rows + length) % 3));
        }
}

// --- a sequence ------------------------------------------------------------------------------------------------------

// A layer in panels of 64 outputs, [inputs / 2][64][2].
struct Panels {
  Layer layer;
  std::vector<uint16_t> packed;
  Panels(int64_t outputs, int64_t inputs, bool with_bias) : layer(BF16, outputs, inputs, with_bias) {
    for (int64_t n = 0; n < outputs; n += 64)
      for (int64_t k = 0; k < inputs; k += 2)
        for (int64_t i = 0; i < 64; i++)
          for (int64_t j = 0; j < 2; j++) packed.push_back(layer.halves[(n + i) * inputs + k + j]);
  }
  Dense dense() const {
    return {packed.data(), layer.bias.empty() ? nullptr : layer.bias.data(), layer.outputs, layer.inputs};
  }
};

void transformer(const std::string& level, int64_t batch, int64_t length, int64_t heads, bool masked, int threads) {
  const int64_t hidden = 64, inner = 128, attended = heads * 64;
  const Panels qkv(3 * attended, hidden, masked), o(hidden, attended, true), up(inner, hidden, true),
      down(hidden, inner, true);
  const std::vector<float> norm1 = normals(hidden), norm2 = normals(hidden), bias1 = normals(hidden),
                           bias2 = normals(hidden), x = normals(batch * length * hidden);
  std::vector<float> mask(batch * length, 0.0f), y(x.size() + 1, 77.0f);
  for (int64_t j = length / 2; masked && j < length - 1; j++) mask[j] = -1e10f;

  std::vector<double> expected;
  for (int64_t n = 0; n < batch; n++) {
    const std::vector<double> own(x.begin() + n * length * hidden, x.begin() + (n + 1) * length * hidden);
    const std::vector<double> made = qkv.layer(normed(own, hidden, norm1, bias1, 1e-5, true));
    std::vector<double> gathered(length * attended);
    for (int64_t h = 0; h < heads; h++)
      for (int64_t r = 0; r < length; r++) {
        std::vector<double> scores(length);
        double peak = -1e300, sum = 0;
        for (int64_t j = 0; j < length; j++) {
          for (int64_t i = 0; i < 64; i++)
            scores[j] += made[r * 3 * attended + h * 64 + i] * made[j * 3 * attended + attended + h * 64 + i] * 0.125;
          scores[j] += mask[n * length + j];
          peak = std::max(peak, scores[j]);
        }
        for (double& score : scores) sum += score = std::exp(score - peak);
        for (int64_t j = 0; j < length; j++)
          for (int64_t i = 0; i < 64; i++)
            gathered[r * attended + h * 64 + i] += scores[j] / sum * made[j * 3 * attended + 2 * attended + h * 64 + i];
      }
    std::vector<double> after = o.layer(gathered);
    for (size_t i = 0; i < after.size(); i++) after[i] += own[i];
    std::vector<double> wider = up.layer(normed(after, hidden, norm2, bias2, 1e-5, true));
    for (double& one : wider) one = one * 0.5 * (1 + std::erf(one / std::sqrt(2.0)));
    const std::vector<double> last = down.layer(wider);
    for (size_t i = 0; i < after.size(); i++) expected.push_back(after[i] + last[i]);
  }
  TransformerBlock block = {};
  block.hidden = hidden, block.heads = heads, block.inner = inner, block.eps1 = block.eps2 = 1e-5, block.scaling = 0.125;
  block.norm1 = norm1.data(), block.norm1_bias = bias1.data(), block.norm2 = norm2.data(), block.norm2_bias = bias2.data();
  block.qkv = qkv.dense(), block.o = o.dense(), block.up = up.dense(), block.down = down.dense();
  const TransformerCall call = {x.data(), y.data(), masked ? mask.data() : nullptr, batch, length};
  const std::string what = level + ": a sequence of " + std::to_string(length) + " through a transformer's block";
  expect(accelerate_tts_transformer_block(&block, &call, threads), 0, what);
  expect(distance(expected, y.data()), 1e-2, what);
  expect(std::fabs(y.back() - 77.0f), 0, what + ": behind the end");
}

void residual(const std::string& level, int64_t batch, int64_t length, int64_t channels, int64_t outputs, int threads) {
  const Panels first(outputs, 3 * channels, true), second(outputs, 3 * outputs, true), beside(outputs, channels, true);
  const std::vector<float> norm1 = normals(outputs), norm2 = normals(outputs), bias1 = normals(outputs),
                           bias2 = normals(outputs), x = normals(batch * channels * length), time = normals(batch * outputs);
  std::vector<float> mask(batch * length, 1.0f), y(batch * outputs * length + 1, 77.0f);
  for (int64_t j = length - length / 4; j < length; j++) mask[j] = 0.0f;
  std::vector<double> expected(batch * outputs * length);
  for (int64_t n = 0; n < batch; n++) {
    auto convolved = [&](const std::vector<double>& frames, int64_t width, const Panels& layer,
                         const std::vector<float>& norm, const std::vector<float>& bias) {
      std::vector<double> three;
      for (int64_t r = 0; r < length; r++)
        for (int64_t past = 2; past >= 0; past--)
          for (int64_t i = 0; i < width; i++) three.push_back(r >= past ? frames[(r - past) * width + i] : 0.0);
      std::vector<double> made = normed(layer.layer(three), outputs, norm, bias, 1e-5, true);
      for (size_t i = 0; i < made.size(); i++)
        made[i] *= std::tanh(std::log1p(std::exp(made[i]))) * mask[n * length + i / outputs];
      return made;
    };
    std::vector<double> frames(length * channels);
    for (int64_t r = 0; r < length; r++)
      for (int64_t i = 0; i < channels; i++) frames[r * channels + i] = x[(n * channels + i) * length + r] * mask[n * length + r];
    std::vector<double> between = convolved(frames, channels, first, norm1, bias1);
    for (size_t i = 0; i < between.size(); i++)
      between[i] = (between[i] + time[n * outputs + i % outputs]) * mask[n * length + i / outputs];
    const std::vector<double> last = convolved(between, outputs, second, norm2, bias2), aside = beside.layer(frames);
    for (int64_t r = 0; r < length; r++)
      for (int64_t i = 0; i < outputs; i++)
        expected[(n * outputs + i) * length + r] = last[r * outputs + i] + aside[r * outputs + i];
  }
  ResidualBlock block = {};
  block.channels = channels, block.outputs = outputs, block.eps1 = block.eps2 = 1e-5;
  block.norm1 = norm1.data(), block.norm1_bias = bias1.data(), block.norm2 = norm2.data(), block.norm2_bias = bias2.data();
  block.first = first.dense(), block.second = second.dense(), block.beside = beside.dense();
  const ResidualCall call = {x.data(), y.data(), mask.data(), time.data(), batch, length};
  const std::string what = level + ": a sequence of " + std::to_string(length) + " through a residual block";
  expect(accelerate_tts_residual_block(&block, &call, threads), 0, what);
  expect(distance(expected, y.data()), 1e-2, what);
  expect(std::fabs(y.back() - 77.0f), 0, what + ": behind the end");
}

}  // namespace

int main(int count, char** named) {
  void* functions[] = {reinterpret_cast<void*>(parallel), reinterpret_cast<void*>(barrier),
                       reinterpret_cast<void*>(thread_number), reinterpret_cast<void*>(thread_count)};
  accelerate_tts_use_threads(1, functions);
  for (int i = 0; const char* name = accelerate_tts_level(i); i++) {
    if (count > 1 && std::find_if(named + 1, named + count, [&](char* one) { return !strcmp(one, name); }) == named + count)
      continue;
    const std::string level = accelerate_tts_choose(name);
    if (level != name) {
      std::printf("%s: this processor lacks it\n", name);
      continue;
    }
    const int before = failures;
    few_rows(level);
    tokens(level);
    for (int64_t length : {1, 15, 33, 64, 70, 129, 300}) {
      transformer(level, 2, length, 1 + length % 2, length % 3 == 0, int(1 + length % 3));
      residual(level, 2, length, length % 2 ? 64 : 192, 64, int(1 + length % 3));
    }
    std::printf("%s: %s\n", name, failures == before ? "right" : "WRONG");
    std::fflush(stdout);
  }
  return failures != 0;
}
