// The functions that each instruction set has, and the table from which they are called.
#pragma once
#include "abi.h"

struct SkinnyCall {
  Format format;
  const float* x;      // [rows, inputs]
  const void* w;       // [outputs, inputs], or [inputs, outputs] if transposed
  const float* scale;  // [outputs] or null
  const float* bias;   // [outputs] or null
  float* y;            // [rows, outputs]
  int64_t rows, outputs, inputs;
};

// Each returns 0, or NO_MEMORY.
struct Functions {
  int (*skinny_linear)(const SkinnyCall& call, int threads);
  int (*decoder_blocks)(const DecoderBlock* const* blocks, const Token* tokens, int64_t count, int threads);
  int (*transformer_block)(const TransformerBlock& block, const TransformerCall& call, int threads);
  int (*residual_block)(const ResidualBlock& block, const ResidualCall& call, int threads);
  int (*short_convolution)(const ShortConvolution& layer, const ConvolutionCall& call, int threads);
};

#define KERNELS_OF(LEVEL)                                                                                       \
  namespace LEVEL {                                                                                             \
  int skinny_linear(const SkinnyCall& call, int threads);                                                       \
  int decoder_blocks(const DecoderBlock* const* blocks, const Token* tokens, int64_t count, int threads);       \
  int transformer_block(const TransformerBlock& block, const TransformerCall& call, int threads);               \
  int residual_block(const ResidualBlock& block, const ResidualCall& call, int threads);                        \
  int short_convolution(const ShortConvolution& layer, const ConvolutionCall& call, int threads);               \
  }
