// The structs that kernels are called with. Written from structs.py; never edited.
#pragma once
#include <cstddef>
#include <cstdint>

constexpr int ABI_VERSION = 3;

enum Format : int64_t { FP32, BF16, INT8, TRANSPOSED };

struct Linear {
  const void* w;  // [outputs, inputs], or [inputs, outputs] if transposed
  const float* scale;  // [outputs] for int8, or null
  const float* bias;  // [outputs] or null
  int64_t outputs;
  int64_t inputs;
};

struct DecoderBlock {
  int64_t hidden;
  int64_t heads;
  int64_t kv_heads;
  int64_t head_dim;
  int64_t inner;
  int64_t format;  // of the weights, see Format
  int64_t layer_norm;  // 1 LayerNorm, 0 RMSNorm
  int64_t gated;  // 1: act(gate) * up, 0: act(up)
  int64_t activation;  // 0 SiLU, 1 GELU by tanh
  double eps1;
  double eps2;
  double scaling;
  const float* norm1;  // [hidden]; biases may be null
  const float* norm1_bias;
  const float* norm2;
  const float* norm2_bias;
  Linear q;  // k.w and v.w are null where q makes all three
  Linear k;
  Linear v;
  Linear o;
  Linear gate;
  Linear up;
  Linear down;
};

struct Row {
  void* keys;  // [kv_heads, room, head_dim]
  void* values;
  int64_t key_head;  // strides, in elements; those of positions are the token's
  int64_t value_head;
  int64_t length;  // positions in the cache before this token
  const void* mask;  // [length + 1] as the token's, or null
  float* attention;  // [heads, length + 1], or null
};

struct Token {
  const float* x;  // [rows, hidden]
  float* y;  // the same
  int64_t rows;
  const float* cos;  // [rows or 1, head_dim], or null
  const float* sin;
  int64_t rotation_stride;  // 0 where all rows have one
  const void* mask;  // [rows or 1, positions] or null: bytes, 0 where nothing is seen, or added fp32
  int64_t mask_stride;
  int64_t mask_is_bytes;
  void* keys;  // [rows, kv_heads, room, head_dim]
  void* values;
  int64_t key_row;  // strides, in elements
  int64_t key_head;
  int64_t key_position;
  int64_t value_row;
  int64_t value_head;
  int64_t value_position;
  int64_t is_bf16;  // the model: its cache, and what one block hands to the next
  int64_t length;  // positions in the cache before this token; of the longest, where rows have their own
  float* attention;  // [rows, heads, length + 1], the attention weights; null if not requested
  const Row* own;  // [rows], each row's own cache; or null: one cache and one mask, as above, for all
};

struct Dense {
  const uint16_t* w;  // bf16, in panels of 64 outputs, each [inputs / 2][64][2]
  const float* bias;  // [outputs] or null
  int64_t outputs;
  int64_t inputs;
};

struct TransformerBlock {
  int64_t hidden;  // multiples of 64; heads are 64 wide
  int64_t heads;
  int64_t inner;
  double eps1;
  double eps2;
  double scaling;
  const float* norm1;  // [hidden]
  const float* norm1_bias;
  const float* norm2;
  const float* norm2_bias;
  Dense qkv;
  Dense o;
  Dense up;
  Dense down;
};

struct TransformerCall {
  const float* x;  // [batch][length][hidden]
  float* y;  // the same
  const float* mask;  // [batch][length], what is added for a key; or null
  int64_t batch;
  int64_t length;
};

struct ResidualBlock {
  int64_t channels;  // multiples of 64
  int64_t outputs;
  double eps1;
  double eps2;
  const float* norm1;  // [outputs]
  const float* norm1_bias;
  const float* norm2;
  const float* norm2_bias;
  Dense first;  // inputs: [3][channels], [3][outputs]
  Dense second;
  Dense beside;
};

struct ResidualCall {
  const float* x;  // [batch][channels][length]
  float* y;  // [batch][outputs][length]
  const float* mask;  // [batch][length], what frames are multiplied by
  const float* time;  // [batch][outputs], what is added between the convolutions
  int64_t batch;
  int64_t length;
};

struct ShortConvolution {
  const float* w;  // turned, in panels of 32 outputs, each [points][chunks][inputs][32]
  const float* bias;  // [outputs] or null
  const float* before;  // [points][points], turns a tile of the input
  const float* after;  // [frames][points], turns sums back
  int64_t outputs;  // a multiple of 32; those that there are not are zeros
  int64_t inputs;
  int64_t points;  // products of a tile, 3 to 8
  int64_t frames;  // results of a tile; with several chunks, as many as a chunk has taps
  int64_t chunks;  // parts of the taps
  int64_t dilation;  // in frames
  int64_t padding;
};

struct ConvolutionCall {
  const float* x;  // [batch][inputs][length]
  float* y;  // [batch][outputs][results]
  const float* plus;  // what is added, in the order of y; or null
  double slope;  // of a leaky ReLU at the end, which 1 leaves out
  int64_t x_batch;  // strides, in elements
  int64_t x_channel;
  int64_t x_frame;
  int64_t y_batch;
  int64_t y_channel;
  int64_t y_frame;
  int64_t batch;
  int64_t length;
  int64_t outputs;
  int64_t results;
};

struct Field {
  const char* name;
  int64_t offset, size;
};

#define KERNELS_FIELD(S, F) {#S "." #F, offsetof(S, F), sizeof(S::F)}
constexpr Field FIELDS[] = {
    KERNELS_FIELD(Linear, w),
    KERNELS_FIELD(Linear, scale),
    KERNELS_FIELD(Linear, bias),
    KERNELS_FIELD(Linear, outputs),
    KERNELS_FIELD(Linear, inputs),
    KERNELS_FIELD(DecoderBlock, hidden),
    KERNELS_FIELD(DecoderBlock, heads),
    KERNELS_FIELD(DecoderBlock, kv_heads),
    KERNELS_FIELD(DecoderBlock, head_dim),
    KERNELS_FIELD(DecoderBlock, inner),
    KERNELS_FIELD(DecoderBlock, format),
    KERNELS_FIELD(DecoderBlock, layer_norm),
    KERNELS_FIELD(DecoderBlock, gated),
    KERNELS_FIELD(DecoderBlock, activation),
    KERNELS_FIELD(DecoderBlock, eps1),
    KERNELS_FIELD(DecoderBlock, eps2),
    KERNELS_FIELD(DecoderBlock, scaling),
    KERNELS_FIELD(DecoderBlock, norm1),
    KERNELS_FIELD(DecoderBlock, norm1_bias),
    KERNELS_FIELD(DecoderBlock, norm2),
    KERNELS_FIELD(DecoderBlock, norm2_bias),
    KERNELS_FIELD(DecoderBlock, q),
    KERNELS_FIELD(DecoderBlock, k),
    KERNELS_FIELD(DecoderBlock, v),
    KERNELS_FIELD(DecoderBlock, o),
    KERNELS_FIELD(DecoderBlock, gate),
    KERNELS_FIELD(DecoderBlock, up),
    KERNELS_FIELD(DecoderBlock, down),
    KERNELS_FIELD(Row, keys),
    KERNELS_FIELD(Row, values),
    KERNELS_FIELD(Row, key_head),
    KERNELS_FIELD(Row, value_head),
    KERNELS_FIELD(Row, length),
    KERNELS_FIELD(Row, mask),
    KERNELS_FIELD(Row, attention),
    KERNELS_FIELD(Token, x),
    KERNELS_FIELD(Token, y),
    KERNELS_FIELD(Token, rows),
    KERNELS_FIELD(Token, cos),
    KERNELS_FIELD(Token, sin),
    KERNELS_FIELD(Token, rotation_stride),
    KERNELS_FIELD(Token, mask),
    KERNELS_FIELD(Token, mask_stride),
    KERNELS_FIELD(Token, mask_is_bytes),
    KERNELS_FIELD(Token, keys),
    KERNELS_FIELD(Token, values),
    KERNELS_FIELD(Token, key_row),
    KERNELS_FIELD(Token, key_head),
    KERNELS_FIELD(Token, key_position),
    KERNELS_FIELD(Token, value_row),
    KERNELS_FIELD(Token, value_head),
    KERNELS_FIELD(Token, value_position),
    KERNELS_FIELD(Token, is_bf16),
    KERNELS_FIELD(Token, length),
    KERNELS_FIELD(Token, attention),
    KERNELS_FIELD(Token, own),
    KERNELS_FIELD(Dense, w),
    KERNELS_FIELD(Dense, bias),
    KERNELS_FIELD(Dense, outputs),
    KERNELS_FIELD(Dense, inputs),
    KERNELS_FIELD(TransformerBlock, hidden),
    KERNELS_FIELD(TransformerBlock, heads),
    KERNELS_FIELD(TransformerBlock, inner),
    KERNELS_FIELD(TransformerBlock, eps1),
    KERNELS_FIELD(TransformerBlock, eps2),
    KERNELS_FIELD(TransformerBlock, scaling),
    KERNELS_FIELD(TransformerBlock, norm1),
    KERNELS_FIELD(TransformerBlock, norm1_bias),
    KERNELS_FIELD(TransformerBlock, norm2),
    KERNELS_FIELD(TransformerBlock, norm2_bias),
    KERNELS_FIELD(TransformerBlock, qkv),
    KERNELS_FIELD(TransformerBlock, o),
    KERNELS_FIELD(TransformerBlock, up),
    KERNELS_FIELD(TransformerBlock, down),
    KERNELS_FIELD(TransformerCall, x),
    KERNELS_FIELD(TransformerCall, y),
    KERNELS_FIELD(TransformerCall, mask),
    KERNELS_FIELD(TransformerCall, batch),
    KERNELS_FIELD(TransformerCall, length),
    KERNELS_FIELD(ResidualBlock, channels),
    KERNELS_FIELD(ResidualBlock, outputs),
    KERNELS_FIELD(ResidualBlock, eps1),
    KERNELS_FIELD(ResidualBlock, eps2),
    KERNELS_FIELD(ResidualBlock, norm1),
    KERNELS_FIELD(ResidualBlock, norm1_bias),
    KERNELS_FIELD(ResidualBlock, norm2),
    KERNELS_FIELD(ResidualBlock, norm2_bias),
    KERNELS_FIELD(ResidualBlock, first),
    KERNELS_FIELD(ResidualBlock, second),
    KERNELS_FIELD(ResidualBlock, beside),
    KERNELS_FIELD(ResidualCall, x),
    KERNELS_FIELD(ResidualCall, y),
    KERNELS_FIELD(ResidualCall, mask),
    KERNELS_FIELD(ResidualCall, time),
    KERNELS_FIELD(ResidualCall, batch),
    KERNELS_FIELD(ResidualCall, length),
    KERNELS_FIELD(ShortConvolution, w),
    KERNELS_FIELD(ShortConvolution, bias),
    KERNELS_FIELD(ShortConvolution, before),
    KERNELS_FIELD(ShortConvolution, after),
    KERNELS_FIELD(ShortConvolution, outputs),
    KERNELS_FIELD(ShortConvolution, inputs),
    KERNELS_FIELD(ShortConvolution, points),
    KERNELS_FIELD(ShortConvolution, frames),
    KERNELS_FIELD(ShortConvolution, chunks),
    KERNELS_FIELD(ShortConvolution, dilation),
    KERNELS_FIELD(ShortConvolution, padding),
    KERNELS_FIELD(ConvolutionCall, x),
    KERNELS_FIELD(ConvolutionCall, y),
    KERNELS_FIELD(ConvolutionCall, plus),
    KERNELS_FIELD(ConvolutionCall, slope),
    KERNELS_FIELD(ConvolutionCall, x_batch),
    KERNELS_FIELD(ConvolutionCall, x_channel),
    KERNELS_FIELD(ConvolutionCall, x_frame),
    KERNELS_FIELD(ConvolutionCall, y_batch),
    KERNELS_FIELD(ConvolutionCall, y_channel),
    KERNELS_FIELD(ConvolutionCall, y_frame),
    KERNELS_FIELD(ConvolutionCall, batch),
    KERNELS_FIELD(ConvolutionCall, length),
    KERNELS_FIELD(ConvolutionCall, outputs),
    KERNELS_FIELD(ConvolutionCall, results),
};
#undef KERNELS_FIELD
