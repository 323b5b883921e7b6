// Vectors as wide as the instruction set has them, by GCC's and Clang's vector extensions: arithmetic, conversions and
// shifts are the compiler's. By name are only what extensions cannot say (products of 16 bits summed in 32, sums of a
// vector's numbers) and loads that become wider, which GCC 12 makes of two halves.
#pragma once
#include "common.h"

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#elif defined(__aarch64__) || defined(_M_ARM64)
#include <arm_neon.h>
#endif

namespace KERNELS_LEVEL {
namespace {

#if defined(__AVX512BW__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
#if defined(__AVX512BW__) || defined(__aarch64__)
constexpr bool MANY_REGISTERS = true;  // 32
#else
constexpr bool MANY_REGISTERS = false;  // 16
#endif

typedef float vec __attribute__((vector_size(LANES * 4)));
typedef int32_t ints __attribute__((vector_size(LANES * 4)));
typedef uint32_t words __attribute__((vector_size(LANES * 4)));
typedef int16_t shorts __attribute__((vector_size(LANES * 4)));
typedef bf16 halves __attribute__((vector_size(LANES * 2)));
typedef int8_t bytes __attribute__((vector_size(LANES * 2)));

template <class V, class T>
inline V load_as(const T* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}
template <class V, class T>
inline void store(T* p, V v) {
  memcpy(p, &v, sizeof v);
}
inline vec load(const float* p) { return load_as<vec>(p); }
inline vec load(const bf16* p) {
#if defined(__AVX512BW__)
  return (vec)((words)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)) << 16);
#elif defined(__AVX2__)
  return (vec)((words)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)) << 16);
#else
  return (vec)(__builtin_convertvector(load_as<halves>(p), words) << 16);
#endif
}
inline vec all_of(float value) { return vec{} + value; }

// Two numbers in bf16 lie in 32 bits, the one at an even place in the low half.
inline vec even_bf16(words pairs) { return (vec)(pairs << 16); }
inline vec odd_bf16(words pairs) { return (vec)(pairs & 0xffff0000u); }

// Keeps a vector that is used several times in a register: GCC 12 loads it anew for each product.
template <class V>
inline V in_register(V v) {
#if defined(__AVX512BW__) && defined(__GNUC__)
  __asm__("" : "+v"(v));
#endif
  return v;
}

inline shorts load_int8(const int8_t* p) {
#if defined(__AVX512BW__)
  return (shorts)_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__AVX2__)
  return (shorts)_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p));
#else
  return __builtin_convertvector(load_as<bytes>(p), shorts);
#endif
}

// sum + a * b, two products to each of its numbers.
inline ints add_products(ints sum, shorts a, shorts b) {
#if defined(__AVX512VNNI__)
  return (ints)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#elif defined(__AVX512BW__)
  return sum + (ints)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return sum + (ints)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return sum + (ints)_mm_madd_epi16((__m128i)a, (__m128i)b);
#elif defined(__aarch64__)
  return (ints)vmlal_high_s16(vmlal_s16((int32x4_t)sum, vget_low_s16((int16x8_t)a), vget_low_s16((int16x8_t)b)),
                              (int16x8_t)a, (int16x8_t)b);
#else
  for (int i = 0; i < LANES; i++) sum[i] += int32_t(a[2 * i]) * b[2 * i] + int32_t(a[2 * i + 1]) * b[2 * i + 1];
  return sum;
#endif
}

inline float total(vec v) {
#if defined(__AVX512BW__)
  return _mm512_reduce_add_ps((__m512)v);
#elif defined(__AVX2__)
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
#else
  return (v[0] + v[1]) + (v[2] + v[3]);
#endif
}

// a * b + c, rounded once where there is an instruction for it: left alone, compilers choose anew at each place.
inline float multiply_add(float a, float b, float c) {
#if defined(__FMA__) || defined(__aarch64__)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

// All numbers of a vector, without rounding.
inline int64_t total(ints v) {
  typedef int64_t longs __attribute__((vector_size(LANES * 4)));
  const longs pairs = (longs)v, sums = (pairs << 32 >> 32) + (pairs >> 32);
  int64_t sum = 0;
  for (int i = 0; i < LANES / 2; i++) sum += sums[i];
  return sum;
}

// The same of several vectors, each rounded once, at its end.
template <int COUNT>
inline void totals(const ints* v, float* to) {
#if defined(__AVX512BW__)
  // Of eight vectors at a time: halves of two are added up in one, three times. One by one they take five times as long.
  for (int first = 0; first < COUNT; first += 8) {
    __m512i whole[8], pairs[4], fours[2];
    for (int i = 0; i < 8; i++) {
      const __m512i one = first + i < COUNT ? (__m512i)v[first + i] : __m512i{};
      whole[i] = _mm512_add_epi64(_mm512_srai_epi64(_mm512_slli_epi64(one, 32), 32), _mm512_srai_epi64(one, 32));
    }
    for (int i = 0; i < 4; i++)
      pairs[i] = _mm512_add_epi64(_mm512_unpacklo_epi64(whole[2 * i], whole[2 * i + 1]),
                                  _mm512_unpackhi_epi64(whole[2 * i], whole[2 * i + 1]));
    for (int i = 0; i < 2; i++)
      fours[i] = _mm512_add_epi64(_mm512_shuffle_i64x2(pairs[2 * i], pairs[2 * i + 1], 0x88),
                                  _mm512_shuffle_i64x2(pairs[2 * i], pairs[2 * i + 1], 0xdd));
    const __m512i all = _mm512_add_epi64(_mm512_shuffle_i64x2(fours[0], fours[1], 0x88),
                                         _mm512_shuffle_i64x2(fours[0], fours[1], 0xdd));
    const __m256 rounded = _mm512_cvtepi64_ps(all);
    if (COUNT - first >= 8) _mm256_storeu_ps(to + first, rounded);
    else _mm256_mask_storeu_ps(to + first, __mmask8((1 << (COUNT - first)) - 1), rounded);
  }
#else
  for (int i = 0; i < COUNT; i++) to[i] = float(total(v[i]));
#endif
}

// Turns a square of LANES rows: v[i][j] becomes v[j][i].
inline void transpose(vec* v) {
#if defined(__AVX512BW__)
  __m512 a[16], b[16];
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_ps((__m512)v[i], (__m512)v[i + 1]);
    a[i + 1] = _mm512_unpackhi_ps((__m512)v[i], (__m512)v[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; j++) {
      const __m512d low = _mm512_castps_pd(a[i + j]), high = _mm512_castps_pd(a[i + j + 2]);
      b[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
      b[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
    }
  for (int j = 0; j < 4; j++) {  // quarters of rows of four: those of columns j, j + 4, j + 8, j + 12
    const __m512 even0 = _mm512_shuffle_f32x4(b[j], b[j + 4], 0x88), odd0 = _mm512_shuffle_f32x4(b[j], b[j + 4], 0xdd);
    const __m512 even1 = _mm512_shuffle_f32x4(b[j + 8], b[j + 12], 0x88);
    const __m512 odd1 = _mm512_shuffle_f32x4(b[j + 8], b[j + 12], 0xdd);
    v[j] = (vec)_mm512_shuffle_f32x4(even0, even1, 0x88);
    v[j + 8] = (vec)_mm512_shuffle_f32x4(even0, even1, 0xdd);
    v[j + 4] = (vec)_mm512_shuffle_f32x4(odd0, odd1, 0x88);
    v[j + 12] = (vec)_mm512_shuffle_f32x4(odd0, odd1, 0xdd);
  }
#elif defined(__AVX2__)
  __m256 a[8], b[8];
  for (int i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_ps((__m256)v[i], (__m256)v[i + 1]);
    a[i + 1] = _mm256_unpackhi_ps((__m256)v[i], (__m256)v[i + 1]);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; j++) {
      b[i + 2 * j] = _mm256_shuffle_ps(a[i + j], a[i + j + 2], 0x44);
      b[i + 2 * j + 1] = _mm256_shuffle_ps(a[i + j], a[i + j + 2], 0xee);
    }
  for (int j = 0; j < 4; j++) {
    v[j] = (vec)_mm256_permute2f128_ps(b[j], b[j + 4], 0x20);
    v[j + 4] = (vec)_mm256_permute2f128_ps(b[j], b[j + 4], 0x31);
  }
#else
  for (int i = 0; i < LANES; i++)
    for (int j = 0; j < i; j++) {
      const float other = v[i][j];
      v[i][j] = v[j][i];
      v[j][i] = other;
    }
#endif
}

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

}  // namespace
}  // namespace KERNELS_LEVEL
