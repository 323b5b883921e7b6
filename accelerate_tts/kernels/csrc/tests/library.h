// The functions that the library exports, and the tests of them. Each test takes the name of an instruction set.
#pragma once
#include <string>

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
int accelerate_tts_short_convolution(const ShortConvolution*, const ConvolutionCall*, int);
}

namespace tests {

void meetings();
void few_rows(const std::string& level);
void tokens(const std::string& level);
void convolutions(const std::string& level);
void transformer(const std::string& level, int64_t batch, int64_t length, int64_t heads, bool masked, int threads);
void residual(const std::string& level, int64_t batch, int64_t length, int64_t channels, int64_t outputs, int threads);

}  // namespace tests
