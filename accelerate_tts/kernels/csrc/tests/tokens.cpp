// Decoder blocks for one token: formats, rows, lengths of the cache, masks, and caches of single rows.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "library.h"
#include "reference.h"

namespace tests {
namespace {

struct Sizes {
  Format format;
  int64_t hidden, rows, heads, kv_heads, head_dim, inner, length;
  bool gated, layer_norm, joined, rotated, own_rows;
  int mask;  // 0 none, 1 bytes, 2 added
};

void one_token(const std::string& level, const Sizes& s, int threads) {
  const int64_t hidden = s.hidden, attended = s.heads * s.head_dim, keyed = s.kv_heads * s.head_dim, room = s.length + 3;
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
  std::vector<Row> own;
  std::vector<float> own_attention(attention.size(), 5.0f);
  for (int64_t m = 0; m < s.rows; m++) {
    const int64_t at = m * (s.length + 1);
    const void* mask = s.mask == 1 ? static_cast<const void*>(&seen[at]) : s.mask == 2 ? &added[at] : nullptr;
    own.push_back({own_keys[m], own_values[m], room * s.head_dim, room * s.head_dim, lengths[m], mask,
                   &own_attention[at * s.heads]});
  }
  if (s.own_rows) {
    token.keys = token.values = nullptr, token.mask = nullptr, token.attention = nullptr;
    token.own = own.data();
  }
  const DecoderBlock* one = &block;
  const std::string what = level + ": a token, format " + std::to_string(s.format) + ", " + std::to_string(s.rows) +
                           " rows, " + std::to_string(s.length) + " before, mask " + std::to_string(s.mask) +
                           (s.own_rows ? ", each row's own cache" : "");
  expect(accelerate_tts_decoder_blocks(&one, &token, 1, threads), 0, what);
  for (int64_t m = 0; s.own_rows && m < s.rows; m++)  // each row's weights are as long as its own cache
    for (int64_t head = 0; head < s.heads; head++)
      for (int64_t j = 0; j <= s.length; j++)
        attention[(m * s.heads + head) * (s.length + 1) + j] =
            j <= lengths[m] ? own[m].attention[head * (lengths[m] + 1) + j] : 0;
  const double limit = s.format == INT8 ? 2e-3 : 2e-5;
  expect(distance(expected, y.data()), limit, what);
  expect(distance(weights, attention.data()), limit, what + ": attention weights");
  expect(distance(wide(expected_keys), keys.data()), limit, what + ": keys");
  expect(distance(wide(expected_values), values.data()), limit, what + ": values");

  // Each row alone: not a bit differs.
  const std::vector<float> joint_keys = keys, joint_values = values;
  for (int64_t m = 0; m < s.rows; m++) {
    std::vector<float> alone_x(x.begin() + m * hidden, x.begin() + (m + 1) * hidden), alone_y(hidden);
    std::vector<float> alone_attention(s.heads * (lengths[m] + 1));
    Token alone = token;
    alone.x = alone_x.data(), alone.y = alone_y.data(), alone.rows = 1, alone.own = nullptr;
    alone.keys = own_keys[m], alone.values = own_values[m], alone.length = lengths[m];
    alone.mask = own[m].mask, alone.attention = alone_attention.data();
    expect(accelerate_tts_decoder_blocks(&one, &alone, 1, threads), 0, what);
    expect(memcmp(alone_y.data(), &y[m * hidden], hidden * sizeof(float)) != 0, 0, what + ": a row differs alone");
    for (int64_t head = 0; head < s.heads; head++)
      expect(memcmp(&alone_attention[head * (lengths[m] + 1)], &attention[(m * s.heads + head) * (s.length + 1)],
                    (lengths[m] + 1) * sizeof(float)) != 0, 0, what + ": a row's weights differ alone");
  }
  expect(joint_keys == keys && joint_values == values ? 0 : 1, 0, what + ": a row's cache differs alone");
}

}  // namespace

void tokens(const std::string& level) {
  for (int format = FP32; format <= TRANSPOSED; format++)
    for (int64_t rows : {1, 2, 3, 5, 8})
      for (int64_t length : {0, 1, 6, 37})
        for (int mask = 0; mask < 3; mask++) {
          const bool gpt = format == TRANSPOSED || length == 6;
          const bool own_rows = rows > 1 && length >= 6;
          const int64_t hidden = format == INT8 && length == 37 ? 128 : 40;  // whole tiles
          one_token(level, {Format(format), hidden, rows, 6, gpt ? 6 : 2, length == 37 ? 20 : 16, 53, length, !gpt, gpt, gpt,
                            !gpt, own_rows, mask}, int(1 + (rows + length) % 3));
        }
}

}  // namespace tests
