// One vector of floats per instruction set, with what the kernels need of it. Included by one translation
// unit per instruction set, each compiled with its own flags and inside its own namespace: keep std::
// templates out, or the linker may pick an AVX-512 instantiation for every caller.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#define SHAREDPROJ_INLINED __attribute__((always_inline))
#define SHAREDPROJ_INLINE inline SHAREDPROJ_INLINED

namespace sharedproj::cpu::SHAREDPROJ_ISA {

struct bf16_t {
  uint16_t bits;
};

SHAREDPROJ_INLINE float to_float(float x) { return x; }
SHAREDPROJ_INLINE float to_float(bf16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}

SHAREDPROJ_INLINE void from_float(float x, float* out) { *out = x; }
SHAREDPROJ_INLINE void from_float(float x, bf16_t* out) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) {
    out->bits = static_cast<uint16_t>((bits >> 16) | 0x40u);  // a NaN must not round to infinity
  } else {
    out->bits = static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
  }
}

#if defined(__AVX512F__)

constexpr int kWidth = 16;
constexpr int kRows = 8, kColumns = 3;  // register tile: 24 accumulators of 32 registers
using Vector = __m512;
using Units = __m512i;  // 32-bit units: a float, or a pair of bf16
constexpr bool kHasPairs =
#if defined(__AVX512BF16__)
    true;
#else
    false;
#endif

SHAREDPROJ_INLINE Vector zero() { return _mm512_setzero_ps(); }
SHAREDPROJ_INLINE Vector broadcast(float x) { return _mm512_set1_ps(x); }
SHAREDPROJ_INLINE Vector load(const float* p) { return _mm512_loadu_ps(p); }
SHAREDPROJ_INLINE void store(float* p, Vector x) { _mm512_storeu_ps(p, x); }
SHAREDPROJ_INLINE Vector add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
SHAREDPROJ_INLINE Vector sub(Vector a, Vector b) { return _mm512_sub_ps(a, b); }
SHAREDPROJ_INLINE Vector mul(Vector a, Vector b) { return _mm512_mul_ps(a, b); }
SHAREDPROJ_INLINE Vector fma(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
SHAREDPROJ_INLINE Vector max(Vector a, Vector b) { return _mm512_max_ps(a, b); }
SHAREDPROJ_INLINE float sum(Vector a) { return _mm512_reduce_add_ps(a); }
SHAREDPROJ_INLINE float greatest(Vector a) { return _mm512_reduce_max_ps(a); }
SHAREDPROJ_INLINE float first(Vector a) { return _mm512_cvtss_f32(a); }
// other where limit <= position, else x: masks the keys that a lane's query doesn't see.
SHAREDPROJ_INLINE Vector where_below(const int32_t* limit, int32_t position, Vector x, Vector other) {
  const __mmask16 seen = _mm512_cmpgt_epi32_mask(_mm512_loadu_si512(limit), _mm512_set1_epi32(position));
  return _mm512_mask_blend_ps(seen, other, x);
}
SHAREDPROJ_INLINE Vector where_finite(Vector x, Vector other) {
  const __mmask16 infinite = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-__builtin_inff()), _CMP_EQ_OQ);
  return _mm512_mask_blend_ps(infinite, x, other);
}
SHAREDPROJ_INLINE bool all_equal(Vector a, Vector b) {
  return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ) == 0xffff;
}
SHAREDPROJ_INLINE Vector round(Vector x) {
  return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
SHAREDPROJ_INLINE Vector scale_by_power(Vector x, Vector n) { return _mm512_scalef_ps(x, n); }
SHAREDPROJ_INLINE Vector widen(const bf16_t* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

SHAREDPROJ_INLINE Units load_units(const uint32_t* p) { return _mm512_loadu_si512(p); }
SHAREDPROJ_INLINE void store_units(uint32_t* p, Units x) { _mm512_storeu_si512(p, x); }
SHAREDPROJ_INLINE Units broadcast_unit(const char* p) {
  uint32_t unit;
  std::memcpy(&unit, p, 4);
  return _mm512_set1_epi32(static_cast<int>(unit));
}
SHAREDPROJ_INLINE Vector as_vector(Units x) { return _mm512_castsi512_ps(x); }

#if defined(__AVX512BF16__)
SHAREDPROJ_INLINE Vector dot_pairs(Vector c, Units a, Units b) {
  return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}
// (low, high) of each lane as one unit, rounded to nearest even.
SHAREDPROJ_INLINE Units pair(Vector low, Vector high) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7,
                                         22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)));
}
SHAREDPROJ_INLINE void narrow(bf16_t* p, Vector x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)));
}
#endif

#elif defined(__AVX2__)

constexpr int kWidth = 8;
constexpr int kRows = 4, kColumns = 3;  // 12 accumulators of 16 registers
using Vector = __m256;
using Units = __m256i;
constexpr bool kHasPairs = false;

SHAREDPROJ_INLINE Vector zero() { return _mm256_setzero_ps(); }
SHAREDPROJ_INLINE Vector broadcast(float x) { return _mm256_set1_ps(x); }
SHAREDPROJ_INLINE Vector load(const float* p) { return _mm256_loadu_ps(p); }
SHAREDPROJ_INLINE void store(float* p, Vector x) { _mm256_storeu_ps(p, x); }
SHAREDPROJ_INLINE Vector add(Vector a, Vector b) { return _mm256_add_ps(a, b); }
SHAREDPROJ_INLINE Vector sub(Vector a, Vector b) { return _mm256_sub_ps(a, b); }
SHAREDPROJ_INLINE Vector mul(Vector a, Vector b) { return _mm256_mul_ps(a, b); }
SHAREDPROJ_INLINE Vector fma(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
SHAREDPROJ_INLINE Vector max(Vector a, Vector b) { return _mm256_max_ps(a, b); }
SHAREDPROJ_INLINE float sum(Vector a) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_shuffle_ps(half, half, 1)));
}
SHAREDPROJ_INLINE float first(Vector a) { return _mm256_cvtss_f32(a); }
SHAREDPROJ_INLINE float greatest(Vector a) {
  __m128 half = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  half = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(half, _mm_shuffle_ps(half, half, 1)));
}
SHAREDPROJ_INLINE Vector where_below(const int32_t* limit, int32_t position, Vector x, Vector other) {
  const __m256i limits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(limit));
  const __m256i seen = _mm256_cmpgt_epi32(limits, _mm256_set1_epi32(position));
  return _mm256_blendv_ps(other, x, _mm256_castsi256_ps(seen));
}
SHAREDPROJ_INLINE Vector where_finite(Vector x, Vector other) {
  return _mm256_blendv_ps(x, other, _mm256_cmp_ps(x, _mm256_set1_ps(-__builtin_inff()), _CMP_EQ_OQ));
}
SHAREDPROJ_INLINE bool all_equal(Vector a, Vector b) {
  return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_EQ_OQ)) == 0xff;
}
SHAREDPROJ_INLINE Vector round(Vector x) {
  return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
// In two steps, so that results down to the smallest denormals and 0 come out right.
SHAREDPROJ_INLINE Vector scale_by_power(Vector x, Vector n) {
  const __m256i whole = _mm256_cvtps_epi32(n);
  const __m256i half = _mm256_srai_epi32(whole, 1);
  const __m256i rest = _mm256_sub_epi32(whole, half);
  const __m256i bias = _mm256_set1_epi32(127);
  const Vector a = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23));
  const Vector b = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23));
  return _mm256_mul_ps(_mm256_mul_ps(x, a), b);
}
SHAREDPROJ_INLINE Vector widen(const bf16_t* p) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
SHAREDPROJ_INLINE Units load_units(const uint32_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
SHAREDPROJ_INLINE Units broadcast_unit(const char* p) {
  int32_t unit;
  std::memcpy(&unit, p, 4);
  return _mm256_set1_epi32(unit);
}
SHAREDPROJ_INLINE Vector as_vector(Units x) { return _mm256_castsi256_ps(x); }

#else

// Compiler vectors: SSE2 on x86-64, NEON on Arm.
constexpr int kWidth = 4;
constexpr int kRows = 4, kColumns = 2;
typedef float Vector __attribute__((vector_size(16)));
typedef int32_t Units __attribute__((vector_size(16)));
constexpr bool kHasPairs = false;

SHAREDPROJ_INLINE Vector zero() { return Vector{0, 0, 0, 0}; }
SHAREDPROJ_INLINE Vector broadcast(float x) { return Vector{x, x, x, x}; }
SHAREDPROJ_INLINE Vector load(const float* p) {
  Vector x;
  std::memcpy(&x, p, 16);
  return x;
}
SHAREDPROJ_INLINE void store(float* p, Vector x) { std::memcpy(p, &x, 16); }
SHAREDPROJ_INLINE Vector add(Vector a, Vector b) { return a + b; }
SHAREDPROJ_INLINE Vector sub(Vector a, Vector b) { return a - b; }
SHAREDPROJ_INLINE Vector mul(Vector a, Vector b) { return a * b; }
SHAREDPROJ_INLINE Vector fma(Vector a, Vector b, Vector c) { return a * b + c; }
SHAREDPROJ_INLINE Vector max(Vector a, Vector b) { return a > b ? a : b; }
SHAREDPROJ_INLINE float sum(Vector a) { return (a[0] + a[1]) + (a[2] + a[3]); }
SHAREDPROJ_INLINE float first(Vector a) { return a[0]; }
SHAREDPROJ_INLINE float greatest(Vector a) {
  const float low = a[0] > a[1] ? a[0] : a[1], high = a[2] > a[3] ? a[2] : a[3];
  return low > high ? low : high;
}
SHAREDPROJ_INLINE Vector where_below(const int32_t* limit, int32_t position, Vector x, Vector other) {
  Units limits;
  std::memcpy(&limits, limit, 16);
  return limits > position ? x : other;
}
SHAREDPROJ_INLINE Vector where_finite(Vector x, Vector other) { return x == -__builtin_inff() ? other : x; }
SHAREDPROJ_INLINE bool all_equal(Vector a, Vector b) {
  const Units same = a == b;
  return (same[0] & same[1] & same[2] & same[3]) != 0;
}
SHAREDPROJ_INLINE Vector round(Vector x) {
  // |x| stays below 2^22 here, so that adding 1.5 * 2^23 rounds to nearest even.
  volatile float big = 12582912.0f;
  const Vector shift = broadcast(big);
  return (x + shift) - shift;
}
SHAREDPROJ_INLINE Vector scale_by_power(Vector x, Vector n) {
  const Units whole = __builtin_convertvector(n, Units);
  const Units half = whole >> 1, rest = whole - (whole >> 1);
  const Units a = (half + 127) << 23, b = (rest + 127) << 23;
  return x * reinterpret_cast<Vector>(a) * reinterpret_cast<Vector>(b);
}
SHAREDPROJ_INLINE Vector widen(const bf16_t* p) {
  return Vector{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])};
}
SHAREDPROJ_INLINE Units load_units(const uint32_t* p) {
  Units x;
  std::memcpy(&x, p, 16);
  return x;
}
SHAREDPROJ_INLINE Units broadcast_unit(const char* p) {
  int32_t unit;
  std::memcpy(&unit, p, 4);
  return Units{unit, unit, unit, unit};
}
SHAREDPROJ_INLINE Vector as_vector(Units x) { return reinterpret_cast<Vector>(x); }

#endif

// 2^x for x <= 0 (and a little above); relative error below 3e-7, exact 0 from x = -160 down to -infinity.
SHAREDPROJ_INLINE Vector exp2(Vector x) {
  x = max(broadcast(-160.0f), x);  // in this order a NaN stays one
  const Vector n = round(x);
  const Vector f = sub(x, n);
  Vector p = broadcast(1.339887440e-3f);
  p = fma(p, f, broadcast(9.618437357e-3f));
  p = fma(p, f, broadcast(5.550332471e-2f));
  p = fma(p, f, broadcast(2.402264791e-1f));
  p = fma(p, f, broadcast(6.931472028e-1f));
  p = fma(p, f, broadcast(1.0f));
  return scale_by_power(p, n);
}

SHAREDPROJ_INLINE Vector widen(const float* p) { return load(p); }
SHAREDPROJ_INLINE int round_up(int x, int multiple) { return (x + multiple - 1) / multiple * multiple; }

constexpr float kLog2e = 1.44269504088896341f;
constexpr float kLn2 = 0.69314718055994531f;

}  // namespace sharedproj::cpu::SHAREDPROJ_ISA
