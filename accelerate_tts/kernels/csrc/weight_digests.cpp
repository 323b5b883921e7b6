// Digests of weights, a piece at a time: whether what was made of them is out of date. Compiled for the plainest
// processor, since it waits for memory.
#include <cstdint>
#include <cstring>

#if defined(_WIN32)
#define KERNELS_EXPORT extern "C" __declspec(dllexport)
#else
#define KERNELS_EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace {

constexpr int64_t PIECE = 1024;  // bytes; the last piece of a tensor may be shorter
constexpr uint64_t FACTOR = 0x9E3779B97F4A7C15u;

// Each word goes through a bijection of one of four sums: no change of a single word is lost.
uint64_t digest(const char* data, int64_t bytes) {
  uint64_t sums[4] = {1, 2, 3, 4}, words[4];
  for (; bytes >= 32; data += 32, bytes -= 32) {
    memcpy(words, data, 32);
    for (int i = 0; i < 4; i++) {
      sums[i] = (sums[i] ^ words[i]) * FACTOR;
      sums[i] ^= sums[i] >> 32u;
    }
  }
  uint64_t all = uint64_t(bytes);
  for (; bytes > 0; data += 8, bytes -= 8) {
    uint64_t word = 0;
    memcpy(&word, data, bytes < 8 ? bytes : 8);
    all = (all ^ word) * FACTOR;
  }
  for (uint64_t sum : sums) all = (all ^ sum) * FACTOR;
  return all ^ all >> 32u;
}

int64_t pieces(int64_t bytes) { return (bytes + PIECE - 1) / PIECE; }

uint64_t digest_of_piece(const char* data, int64_t bytes, int64_t piece) {
  const int64_t start = piece * PIECE;
  return digest(data + start, bytes - start < PIECE ? bytes - start : PIECE);
}

}  // namespace

// The digest of each piece of a tensor, `digests` of them being room for one each 1,024 bytes begun.
KERNELS_EXPORT void accelerate_tts_digests(const char* data, int64_t bytes, uint64_t* digests) {
  for (int64_t piece = 0; piece < pieces(bytes); piece++) digests[piece] = digest_of_piece(data, bytes, piece);
}

// Compares one piece of each of `count` tensors, at `places[i]`, with its digest, and moves the places on by
// `steps[i]`: a step that has no factor in common with the number of pieces comes to all of them. Returns whether any
// is another now.
KERNELS_EXPORT int accelerate_tts_changed(const char* const* data, const int64_t* bytes, const uint64_t* const* digests,
                                          int64_t* places, const int64_t* steps, int64_t count) {
#if defined(__GNUC__)
  for (int64_t i = 0; i < count; i++)  // the memory answers many such questions at once
    for (int64_t line = 0; line < PIECE && places[i] * PIECE + line < bytes[i]; line += 64)
      __builtin_prefetch(data[i] + places[i] * PIECE + line, 0, 0);
#endif
  bool changed = false;
  for (int64_t i = 0; i < count; i++) {
    const int64_t all = pieces(bytes[i]), place = places[i];
    changed |= digest_of_piece(data[i], bytes[i], place) != digests[i][place];
    places[i] = (place + steps[i]) % all;
  }
  return changed;
}
