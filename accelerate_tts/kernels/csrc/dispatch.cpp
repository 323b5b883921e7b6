// Exported functions, which call those of the chosen instruction set. Compiled for the plainest processor.
#include <cstring>

#include "kernels.h"
#include "threads.h"

#if defined(__x86_64__) || defined(_M_X64)
#include <cpuid.h>
#define KERNELS_X86
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

// build.py lists what its compiler can make, the plainest first: a name, and the instruction sets whose kernels for
// tokens and for sequences it takes.
#if !defined(KERNELS_LEVELS)
#define KERNELS_LEVELS(X) X(base, base, base)
#endif

#define KERNELS_DECLARED(LEVEL, TOKENS, SEQUENCES) KERNELS_OF(LEVEL)
KERNELS_LEVELS(KERNELS_DECLARED)

namespace {

struct Level {
  const char* name;
  Functions functions;
};
#define KERNELS_ROW(LEVEL, TOKENS, SEQUENCES)                                  \
  {#LEVEL, {TOKENS::skinny_linear, TOKENS::decoder_blocks, SEQUENCES::transformer_block, SEQUENCES::residual_block,   \
            SEQUENCES::short_convolution}},
constexpr Level LEVELS[] = {KERNELS_LEVELS(KERNELS_ROW)};
constexpr int COUNT = sizeof(LEVELS) / sizeof(LEVELS[0]);

const Level* chosen = nullptr;

#if defined(KERNELS_X86)
// Linux gives a process the tiles' state when it asks. No bit of the processor tells whether it may.
bool may_use_tiles() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XTILEDATA = 18;
  return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA) == 0;
#else
  return false;
#endif
}

bool has(const char* level) {
  unsigned a, b, c, d, b7 = 0, c7 = 0, d7 = 0, a71 = 0, low = 0, high = 0;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return false;
  const unsigned c1 = c;
  if (__get_cpuid_count(7, 0, &a, &b7, &c7, &d7) && a >= 1) __get_cpuid_count(7, 1, &a71, &b, &c, &d);
  if (c1 >> 27 & 1) __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));  // what the system saves
  const bool avx2 = (low & 0x6) == 0x6 && (c1 >> 28 & 1) && (c1 >> 12 & 1) && (b7 >> 5 & 1);  // AVX, FMA, AVX2
  const bool avx512 = avx2 && (low & 0xe6) == 0xe6 && (b7 >> 16 & 1) && (b7 >> 17 & 1) && (b7 >> 30 & 1) &&
                      (b7 >> 31 & 1);  // F, DQ, BW, VL
  const bool vnni = avx512 && (c7 >> 11 & 1), bf16 = vnni && (a71 >> 5 & 1);
  if (!strcmp(level, "base")) return true;
  if (!strcmp(level, "avx2")) return avx2;
  if (!strcmp(level, "avx512")) return avx512;
  if (!strcmp(level, "avx512vnni")) return vnni;
  if (!strcmp(level, "avx512bf16")) return bf16;
  if (!strcmp(level, "amx"))
    return bf16 && (low >> 17 & 3) == 3 && (d7 >> 24 & 3) == 3 && (d7 >> 22 & 1) && may_use_tiles();
  return false;
}
#else
bool has(const char* level) { return !strcmp(level, "base"); }  // what the compiler was asked for is all there is
#endif

// --- threads ---------------------------------------------------------------------------------------------------------

void alone(void (*work)(void*), void* data, unsigned, unsigned) { work(data); }
void nobody() {}
int first() { return 0; }
int one() { return 1; }
constexpr Threads ALONE = {alone, nobody, first, one};

Threads of_gcc;

// LLVM's and Intel's runtime, where it does not speak GCC's: a call of it names a place in a program.
struct Place {
  int32_t reserved, flags, also, more;
  const char* text;
};
const Place here = {0, 2, 0, 0, ";unknown;unknown;0;0;;"};
struct {
  int32_t (*global_number)(const Place*);
  void (*push_threads)(const Place*, int32_t number, int32_t threads);
  void (*fork)(const Place*, int32_t count, void (*work)(int32_t*, int32_t*, ...), ...);
  void (*barrier)(const Place*, int32_t number);
} of_llvm;

void fork_team(void (*work)(void*), void* data, unsigned threads, unsigned) {
  struct Alias {  // its fork hands each word that follows over as an argument of its own
    static void start(int32_t*, int32_t*, void* work, void* data) {
      reinterpret_cast<void (*)(void*)>(work)(data);
    }
  };
  of_llvm.push_threads(&here, of_llvm.global_number(&here), int32_t(threads));
  of_llvm.fork(&here, 2, reinterpret_cast<void (*)(int32_t*, int32_t*, ...)>(Alias::start),
               reinterpret_cast<void*>(work), data);
}
void meet() { of_llvm.barrier(&here, of_llvm.global_number(&here)); }

}  // namespace

const Threads* threads_of_torch = &ALONE;

#if defined(_WIN32)
#define KERNELS_EXPORT extern "C" __declspec(dllexport)
#else
#define KERNELS_EXPORT extern "C" __attribute__((visibility("default")))
#endif

KERNELS_EXPORT int accelerate_tts_abi_version() { return ABI_VERSION; }

KERNELS_EXPORT const Field* accelerate_tts_fields(int64_t* count) {
  *count = sizeof(FIELDS) / sizeof(FIELDS[0]);
  return FIELDS;
}

// The names of what was built, the plainest first; null behind the last.
KERNELS_EXPORT const char* accelerate_tts_level(int number) {
  return number >= 0 && number < COUNT ? LEVELS[number].name : nullptr;
}

// Takes the best that this processor has, and that is not above `limit` (null: any). Its name.
KERNELS_EXPORT const char* accelerate_tts_choose(const char* limit) {
  const Level* best = &LEVELS[0];
  for (const Level& level : LEVELS) {
    if (has(level.name)) best = &level;
    if (limit && !strcmp(level.name, limit)) break;
  }
  chosen = best;
  return best->name;
}

// By the functions of the OpenMP that torch has loaded: GCC's four (flavour 1), LLVM's six (2), or none (0).
KERNELS_EXPORT void accelerate_tts_use_threads(int flavour, void* const* functions) {
  if (flavour == 1) {
    memcpy(&of_gcc, functions, sizeof of_gcc);
    threads_of_torch = &of_gcc;
  } else if (flavour == 2) {
    memcpy(&of_llvm, functions, sizeof of_llvm);
    of_gcc = {fork_team, meet, nullptr, nullptr};
    memcpy(&of_gcc.number, functions + 4, 2 * sizeof(void*));
    threads_of_torch = &of_gcc;
  } else
    threads_of_torch = &ALONE;
}

KERNELS_EXPORT int accelerate_tts_skinny_linear(int64_t format, const float* x, const void* w, const float* scale,
                                                const float* bias, float* y, int64_t rows, int64_t outputs,
                                                int64_t inputs, int threads) {
  return chosen->functions.skinny_linear({Format(format), x, w, scale, bias, y, rows, outputs, inputs}, threads);
}

KERNELS_EXPORT int accelerate_tts_decoder_blocks(const DecoderBlock* const* blocks, const Token* tokens, int64_t count,
                                                 int threads) {
  return chosen->functions.decoder_blocks(blocks, tokens, count, threads);
}

KERNELS_EXPORT int accelerate_tts_transformer_block(const TransformerBlock* block, const TransformerCall* call,
                                                    int threads) {
  return chosen->functions.transformer_block(*block, *call, threads);
}

KERNELS_EXPORT int accelerate_tts_residual_block(const ResidualBlock* block, const ResidualCall* call, int threads) {
  return chosen->functions.residual_block(*block, *call, threads);
}

KERNELS_EXPORT int accelerate_tts_short_convolution(const ShortConvolution* layer, const ConvolutionCall* call,
                                                    int threads) {
  return chosen->functions.short_convolution(*layer, *call, threads);
}
