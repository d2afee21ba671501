// The vector of floats that CPU kernels are written in: one source, compiled once per instruction set.
// SPDX-License-Identifier: Apache-2.0
//
// A translation unit defines QUIRE_ISA_NAMESPACE (scalar, avx2, avx512, avx512_amx) and QUIRE_ISA_LEVEL (0 to 3) before it
// includes this. Hazard: such a unit is compiled with -m flags, and the linker keeps one copy of each inline function of the
// whole library. Any inline function or template instantiation outside QUIRE_ISA_NAMESPACE (the standard library, core/numeric.h,
// FunctionRef, RowLayout::offset) could thus leave AVX-512 code to callers on a lesser machine. So: kernels live in
// QUIRE_ISA_NAMESPACE and use nothing from outside but types, constants and __builtin functions.
#pragma once

#if !defined(QUIRE_ISA_NAMESPACE) || !defined(QUIRE_ISA_LEVEL)
#error "define QUIRE_ISA_NAMESPACE and QUIRE_ISA_LEVEL first"
#endif

#include <cstdint>

#if QUIRE_ISA_LEVEL > 0
// GCC 12's AVX-512 intrinsics initialise "undefined" vectors with themselves, and warn about it where they are inlined.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#include "core/numeric.h"

#define QUIRE_INLINE inline __attribute__((always_inline))
#define QUIRE_LAMBDA_INLINE __attribute__((always_inline))
// Loads and stores of part of a vector: a few instructions with AVX-512's masks, else long and out of line, as rows have one tail at most.
#if QUIRE_ISA_LEVEL >= 2
#define QUIRE_PARTIAL QUIRE_INLINE
#else
#define QUIRE_PARTIAL inline __attribute__((noinline))
#endif

namespace quire::cpu::QUIRE_ISA_NAMESPACE {

inline constexpr int kLanes = QUIRE_ISA_LEVEL == 0 ? 4 : QUIRE_ISA_LEVEL == 1 ? 8 : 16;

// ---- Types -------------------------------------------------------------------------------------------------------------------

typedef float NativeF __attribute__((vector_size(kLanes * 4)));
typedef std::int32_t NativeI __attribute__((vector_size(kLanes * 4)));
typedef std::uint32_t NativeU __attribute__((vector_size(kLanes * 4)));

/// kLanes floats.
struct Vec {
  NativeF v;
};
/// kLanes 32-bit words.
struct Bits {
  NativeU v;
};
/// kLanes booleans.
struct Mask {
#if QUIRE_ISA_LEVEL >= 2
  __mmask16 m;
#else
  NativeI m;  // 0 or -1
#endif
};

QUIRE_INLINE Bits bits(Vec a) { return {(NativeU)a.v}; }
QUIRE_INLINE Vec from_bits(Bits a) { return {(NativeF)a.v}; }

QUIRE_INLINE Vec set1(float x) {
#if QUIRE_ISA_LEVEL >= 2
  return {_mm512_set1_ps(x)};
#elif QUIRE_ISA_LEVEL == 1
  return {_mm256_set1_ps(x)};
#else
  return {NativeF{x, x, x, x}};
#endif
}
QUIRE_INLINE Bits set1_bits(std::uint32_t x) { return {NativeU{} + x}; }
QUIRE_INLINE Vec zero() { return {NativeF{}}; }

// ---- Arithmetic --------------------------------------------------------------------------------------------------------------

QUIRE_INLINE Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
QUIRE_INLINE Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
QUIRE_INLINE Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
QUIRE_INLINE Vec operator/(Vec a, Vec b) { return {a.v / b.v}; }
QUIRE_INLINE Vec& operator+=(Vec& a, Vec b) { return a = a + b; }
QUIRE_INLINE Vec& operator*=(Vec& a, Vec b) { return a = a * b; }

QUIRE_INLINE Bits operator+(Bits a, Bits b) { return {a.v + b.v}; }
QUIRE_INLINE Bits operator-(Bits a, Bits b) { return {a.v - b.v}; }
QUIRE_INLINE Bits operator&(Bits a, Bits b) { return {a.v & b.v}; }
QUIRE_INLINE Bits operator|(Bits a, Bits b) { return {a.v | b.v}; }
QUIRE_INLINE Bits operator^(Bits a, Bits b) { return {a.v ^ b.v}; }
template <int kShift>
QUIRE_INLINE Bits shift_left(Bits a) {
  return {a.v << kShift};
}
template <int kShift>
QUIRE_INLINE Bits shift_right(Bits a) {
  return {a.v >> kShift};
}
template <int kShift>
QUIRE_INLINE Bits shift_right_signed(Bits a) {
  return {(NativeU)((NativeI)a.v >> kShift)};
}

/// a * b + c, fused where the hardware has it.
QUIRE_INLINE Vec fma(Vec a, Vec b, Vec c) {
#if QUIRE_ISA_LEVEL >= 2
  return {_mm512_fmadd_ps(a.v, b.v, c.v)};
#elif QUIRE_ISA_LEVEL == 1
  return {_mm256_fmadd_ps(a.v, b.v, c.v)};
#else
  return {a.v * b.v + c.v};
#endif
}

/// a > b ? a : b, hence b when either is NaN.
QUIRE_INLINE Vec max(Vec a, Vec b) {
#if QUIRE_ISA_LEVEL >= 2
  return {_mm512_max_ps(a.v, b.v)};
#elif QUIRE_ISA_LEVEL == 1
  return {_mm256_max_ps(a.v, b.v)};
#else
  return {a.v > b.v ? a.v : b.v};
#endif
}

/// a < b ? a : b, hence b when either is NaN.
QUIRE_INLINE Vec min(Vec a, Vec b) {
#if QUIRE_ISA_LEVEL >= 2
  return {_mm512_min_ps(a.v, b.v)};
#elif QUIRE_ISA_LEVEL == 1
  return {_mm256_min_ps(a.v, b.v)};
#else
  return {a.v < b.v ? a.v : b.v};
#endif
}

QUIRE_INLINE Vec abs(Vec a) { return from_bits(bits(a) & set1_bits(0x7fffffffu)); }
QUIRE_INLINE Vec neg(Vec a) { return from_bits(bits(a) ^ set1_bits(0x80000000u)); }

// ---- Masks -------------------------------------------------------------------------------------------------------------------

QUIRE_INLINE Mask operator<(Vec a, Vec b) {
#if QUIRE_ISA_LEVEL >= 2
  return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)};
#else
  return {a.v < b.v};
#endif
}
QUIRE_INLINE Mask operator<=(Vec a, Vec b) {
#if QUIRE_ISA_LEVEL >= 2
  return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LE_OQ)};
#else
  return {a.v <= b.v};
#endif
}
QUIRE_INLINE Mask operator>(Vec a, Vec b) { return b < a; }
QUIRE_INLINE Mask operator>=(Vec a, Vec b) { return b <= a; }

/// Lanes that are NaN.
QUIRE_INLINE Mask is_nan(Vec a) {
#if QUIRE_ISA_LEVEL >= 2
  return {_mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q)};
#else
  return {a.v != a.v};
#endif
}

/// Signed comparison.
QUIRE_INLINE Mask less_signed(Bits a, Bits b) {
#if QUIRE_ISA_LEVEL >= 2
  return {_mm512_cmplt_epi32_mask((__m512i)a.v, (__m512i)b.v)};
#else
  return {(NativeI)a.v < (NativeI)b.v};
#endif
}

/// Lane numbers 0, 1, 2, ...
QUIRE_INLINE Bits lane_numbers() {
#if QUIRE_ISA_LEVEL >= 2
  return {NativeU{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}};
#elif QUIRE_ISA_LEVEL == 1
  return {NativeU{0, 1, 2, 3, 4, 5, 6, 7}};
#else
  return {NativeU{0, 1, 2, 3}};
#endif
}

/// The first n lanes, 0 <= n <= kLanes.
QUIRE_INLINE Mask first_lanes(int n) {
#if QUIRE_ISA_LEVEL >= 2
  return {static_cast<__mmask16>((1u << n) - 1u)};
#else
  return less_signed(lane_numbers(), set1_bits(static_cast<std::uint32_t>(n)));
#endif
}

QUIRE_INLINE Mask operator&(Mask a, Mask b) {
#if QUIRE_ISA_LEVEL >= 2
  return {static_cast<__mmask16>(a.m & b.m)};
#else
  return {a.m & b.m};
#endif
}
QUIRE_INLINE Mask operator|(Mask a, Mask b) {
#if QUIRE_ISA_LEVEL >= 2
  return {static_cast<__mmask16>(a.m | b.m)};
#else
  return {a.m | b.m};
#endif
}

/// mask ? a : b, lane by lane.
QUIRE_INLINE Vec select(Mask mask, Vec a, Vec b) {
#if QUIRE_ISA_LEVEL >= 2
  return {_mm512_mask_blend_ps(mask.m, b.v, a.v)};
#elif QUIRE_ISA_LEVEL == 1
  return {_mm256_blendv_ps(b.v, a.v, (__m256)mask.m)};
#else
  return {mask.m ? a.v : b.v};
#endif
}
QUIRE_INLINE Bits select(Mask mask, Bits a, Bits b) {
#if QUIRE_ISA_LEVEL >= 2
  return {(NativeU)_mm512_mask_blend_epi32(mask.m, (__m512i)b.v, (__m512i)a.v)};
#else
  return bits(select(mask, from_bits(a), from_bits(b)));
#endif
}

// ---- Reductions and lane moves -----------------------------------------------------------------------------------------------

QUIRE_INLINE float reduce_add(Vec a) {
#if QUIRE_ISA_LEVEL >= 2
  const __m256 h = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
#elif QUIRE_ISA_LEVEL == 1
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
#endif
#if QUIRE_ISA_LEVEL >= 1
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return s[0] + s[1];
#else
  return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]);
#endif
}

/// The largest lane. Lanes must not be NaN.
QUIRE_INLINE float reduce_max(Vec a) {
#if QUIRE_ISA_LEVEL >= 2
  const __m256 h = _mm256_max_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
#elif QUIRE_ISA_LEVEL == 1
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
#endif
#if QUIRE_ISA_LEVEL >= 1
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return s[0] > s[1] ? s[0] : s[1];
#else
  const float m02 = a.v[0] > a.v[2] ? a.v[0] : a.v[2];
  const float m13 = a.v[1] > a.v[3] ? a.v[1] : a.v[3];
  return m02 > m13 ? m02 : m13;
#endif
}

/// Swaps neighbours: lanes 1, 0, 3, 2, ...
QUIRE_INLINE Vec swap_pairs(Vec a) {
#if QUIRE_ISA_LEVEL >= 2
  return {_mm512_permute_ps(a.v, 0xb1)};
#elif QUIRE_ISA_LEVEL == 1
  return {_mm256_permute_ps(a.v, 0xb1)};
#else
  return {__builtin_shuffle(a.v, NativeI{1, 0, 3, 2})};
#endif
}

/// low | high = a0 b0 a1 b1 ...
QUIRE_INLINE void interleave(Vec a, Vec b, Vec& low, Vec& high) {
#if QUIRE_ISA_LEVEL >= 2
  const __m512i low_idx = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high_idx = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  low = {_mm512_permutex2var_ps(a.v, low_idx, b.v)};
  high = {_mm512_permutex2var_ps(a.v, high_idx, b.v)};
#elif QUIRE_ISA_LEVEL == 1
  const __m256 even = _mm256_unpacklo_ps(a.v, b.v), odd = _mm256_unpackhi_ps(a.v, b.v);
  low = {_mm256_permute2f128_ps(even, odd, 0x20)};
  high = {_mm256_permute2f128_ps(even, odd, 0x31)};
#else
  low = {__builtin_shuffle(a.v, b.v, NativeI{0, 4, 1, 5})};
  high = {__builtin_shuffle(a.v, b.v, NativeI{2, 6, 3, 7})};
#endif
}

// ---- Memory: words of 32, 16 and 8 bits --------------------------------------------------------------------------------------
// Pointers need the alignment of their element only. The forms with n touch the first n elements and nothing else; the lanes
// beyond read as 0.

namespace detail {

#if QUIRE_ISA_LEVEL < 2
// Copies n <= kLanes items as a few fixed-size moves.
template <int kItem>
QUIRE_INLINE void copy_items(void* dst, const void* src, int n) {
  char* d = static_cast<char*>(dst);
  const char* s = static_cast<const char*>(src);
  if (n >= kLanes) {
    __builtin_memcpy(d, s, kLanes * kItem);
    return;
  }
  if constexpr (kLanes > 4) {
    if (n & 4) {
      __builtin_memcpy(d, s, 4 * kItem);
      d += 4 * kItem, s += 4 * kItem;
    }
  }
  if (n & 2) {
    __builtin_memcpy(d, s, 2 * kItem);
    d += 2 * kItem, s += 2 * kItem;
  }
  if (n & 1) __builtin_memcpy(d, s, kItem);
}
#endif

/// kLanes words of 16 bits.
#if QUIRE_ISA_LEVEL >= 2
typedef __m256i Packed16;
#elif QUIRE_ISA_LEVEL == 1
typedef __m128i Packed16;
#else
typedef std::uint16_t Packed16 __attribute__((vector_size(kLanes * 2)));
typedef std::uint8_t Packed8 __attribute__((vector_size(kLanes)));
#endif

QUIRE_INLINE Bits load32(const void* p) {
  Bits r;
  __builtin_memcpy(&r.v, p, sizeof(r.v));
  return r;
}

QUIRE_INLINE void store32(void* p, Bits a) { __builtin_memcpy(p, &a.v, sizeof(a.v)); }

QUIRE_INLINE Bits load32(const void* p, int n) {
#if QUIRE_ISA_LEVEL >= 2
  return {(NativeU)_mm512_maskz_loadu_epi32(first_lanes(n).m, p)};
#elif QUIRE_ISA_LEVEL == 1
  return {(NativeU)_mm256_maskload_epi32(static_cast<const int*>(p), (__m256i)first_lanes(n).m)};
#else
  std::uint32_t buffer[kLanes] = {};
  copy_items<4>(buffer, p, n);
  return load32(buffer);
#endif
}

QUIRE_INLINE void store32(void* p, Bits a, int n) {
#if QUIRE_ISA_LEVEL >= 2
  _mm512_mask_storeu_epi32(p, first_lanes(n).m, (__m512i)a.v);
#elif QUIRE_ISA_LEVEL == 1
  _mm256_maskstore_epi32(static_cast<int*>(p), (__m256i)first_lanes(n).m, (__m256i)a.v);
#else
  std::uint32_t buffer[kLanes];
  store32(buffer, a);
  copy_items<4>(p, buffer, n);
#endif
}

/// Zero-extended.
QUIRE_INLINE Bits load16(const void* p) {
#if QUIRE_ISA_LEVEL >= 2
  return {(NativeU)_mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(p)))};
#elif QUIRE_ISA_LEVEL == 1
  return {(NativeU)_mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p)))};
#else
  Packed16 r;
  __builtin_memcpy(&r, p, sizeof(r));
  return {__builtin_convertvector(r, NativeU)};
#endif
}

QUIRE_INLINE Bits load16(const void* p, int n) {
#if QUIRE_ISA_LEVEL >= 2
  return {(NativeU)_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first_lanes(n).m, p))};
#else
  std::uint16_t buffer[kLanes] = {};
  copy_items<2>(buffer, p, n);
  return load16(buffer);
#endif
}

/// The low half of each word; words must be below 2^16.
QUIRE_INLINE Packed16 narrow16(Bits a) {
#if QUIRE_ISA_LEVEL >= 2
  return _mm512_cvtepi32_epi16((__m512i)a.v);
#elif QUIRE_ISA_LEVEL == 1
  const __m256i packed = _mm256_packus_epi32((__m256i)a.v, (__m256i)a.v);
  return _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
#else
  return __builtin_convertvector(a.v, Packed16);
#endif
}

QUIRE_INLINE void store16(void* p, Packed16 a) { __builtin_memcpy(p, &a, sizeof(a)); }

QUIRE_INLINE void store16(void* p, Packed16 a, int n) {
#if QUIRE_ISA_LEVEL >= 2
  _mm256_mask_storeu_epi16(p, first_lanes(n).m, a);
#else
  std::uint16_t buffer[kLanes];
  store16(buffer, a);
  copy_items<2>(p, buffer, n);
#endif
}

/// Zero-extended.
QUIRE_INLINE Bits load8(const void* p) {
#if QUIRE_ISA_LEVEL >= 2
  return {(NativeU)_mm512_cvtepu8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p)))};
#elif QUIRE_ISA_LEVEL == 1
  return {(NativeU)_mm256_cvtepu8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(p)))};
#else
  Packed8 r;
  __builtin_memcpy(&r, p, sizeof(r));
  return {__builtin_convertvector(r, NativeU)};
#endif
}

QUIRE_INLINE Bits load8(const void* p, int n) {
#if QUIRE_ISA_LEVEL >= 2
  return {(NativeU)_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(first_lanes(n).m, p))};
#else
  std::uint8_t buffer[kLanes] = {};
  copy_items<1>(buffer, p, n);
  return load8(buffer);
#endif
}

/// Words must be below 2^8.
QUIRE_INLINE void store8(void* p, Bits a) {
#if QUIRE_ISA_LEVEL >= 2
  _mm_storeu_si128(static_cast<__m128i*>(p), _mm512_cvtepi32_epi8((__m512i)a.v));
#elif QUIRE_ISA_LEVEL == 1
  const __m128i words = narrow16(a);
  _mm_storel_epi64(static_cast<__m128i*>(p), _mm_packus_epi16(words, words));
#else
  const Packed8 r = __builtin_convertvector(a.v, Packed8);
  __builtin_memcpy(p, &r, sizeof(r));
#endif
}

QUIRE_INLINE void store8(void* p, Bits a, int n) {
#if QUIRE_ISA_LEVEL >= 2
  _mm_mask_storeu_epi8(p, first_lanes(n).m, _mm512_cvtepi32_epi8((__m512i)a.v));
#else
  std::uint8_t buffer[kLanes];
  store8(buffer, a);
  copy_items<1>(p, buffer, n);
#endif
}

// ---- Conversions between element types and float, round to nearest even ------------------------------------------------------

/// For words up to 2^23.
QUIRE_INLINE Vec small_int_to_float(Bits a) { return {__builtin_convertvector((NativeI)a.v, NativeF)}; }

QUIRE_INLINE Vec half_to_float(Bits a) {
#if QUIRE_ISA_LEVEL >= 2
  return {_mm512_cvtph_ps(_mm512_cvtepi32_epi16((__m512i)a.v))};
#elif QUIRE_ISA_LEVEL == 1
  return {_mm256_cvtph_ps(narrow16(a))};
#else
  const Bits magnitude = a & set1_bits(0x7fffu);
  const Bits sign = shift_left<16>(a & set1_bits(0x8000u));
  const Bits shifted = shift_left<13>(magnitude);
  const Bits scaled = bits(from_bits(shifted) * set1(0x1p112f));
  return from_bits(sign | select(less_signed(magnitude, set1_bits(0x7c00u)), scaled, shifted | set1_bits(0x7f800000u)));
#endif
}

#if QUIRE_ISA_LEVEL == 0
QUIRE_INLINE Bits float_to_half(Vec a) {
  const Bits u = bits(a);
  const Bits magnitude = u & set1_bits(0x7fffffffu);
  const Bits sign = shift_right<16>(u) & set1_bits(0x8000u);
  // Subnormal: adding 0.5 aligns the mantissa so that the FPU does the rounding.
  const Bits subnormal = bits(from_bits(magnitude) + set1(0.5f)) - set1_bits(0x3f000000u);
  const Bits odd = shift_right<13>(magnitude) & set1_bits(1u);
  const Bits normal = shift_right<13>(magnitude + set1_bits(0xfffu) + odd - set1_bits(0x38000000u));
  Bits r = select(less_signed(magnitude, set1_bits(0x38800000u)), subnormal, normal);
  r = select(less_signed(magnitude, set1_bits(0x477ff000u)), r, set1_bits(0x7c00u));
  r = select(less_signed(set1_bits(0x7f800000u), magnitude), set1_bits(0x7e00u), r);
  return sign | r;
}
#endif

QUIRE_INLINE Bits float_to_bfloat16(Vec a) {
  const Bits u = bits(a);
  const Bits rounded = u + set1_bits(0x7fffu) + (shift_right<16>(u) & set1_bits(1u));
  return shift_right<16>(select(is_nan(a), u | set1_bits(0x00400000u), rounded));
}

/// kLanes rounded elements, packed; the first argument only selects the type.
QUIRE_INLINE Packed16 pack(const BFloat16*, Vec a) {
#if QUIRE_ISA_LEVEL >= 2
  // vcvtneps2bf16 takes subnormals for zero.
  constexpr int kSubnormalClass = 0x20;
  if (__builtin_expect(_mm512_fpclass_ps_mask(a.v, kSubnormalClass) != 0, 0)) return narrow16(float_to_bfloat16(a));
  return (__m256i)_mm512_cvtneps_pbh(a.v);
#else
  return narrow16(float_to_bfloat16(a));
#endif
}
QUIRE_INLINE Packed16 pack(const Half*, Vec a) {
#if QUIRE_ISA_LEVEL >= 2
  return _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif QUIRE_ISA_LEVEL == 1
  return _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  return narrow16(float_to_half(a));
#endif
}

#if QUIRE_ISA_LEVEL >= 1
/// kLanes of float8_e4m3fn. By way of float16, whose conversion takes subnormals at full speed: its exponent is 2^8 lower.
QUIRE_INLINE Vec load_e4m3(const void* p) {
#if QUIRE_ISA_LEVEL >= 2
  const __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128(static_cast<const __m128i*>(p)));
  const __m256i half = _mm256_and_si256(_mm256_slli_epi16(wide, 7), _mm256_set1_epi16(static_cast<short>(0xbfff)));
  const __m256i magnitude = _mm256_set1_epi16(0x3f80);
  const __mmask16 is_number = _mm256_test_epi16_mask(_mm256_xor_si256(half, magnitude), magnitude);
  return {_mm512_mask_mul_ps(_mm512_set1_ps(__builtin_nanf("")), is_number, _mm512_cvtph_ps(half), _mm512_set1_ps(256.0f))};
#else
  const __m128i wide = _mm_cvtepi8_epi16(_mm_loadl_epi64(static_cast<const __m128i*>(p)));
  const __m128i half = _mm_and_si128(_mm_slli_epi16(wide, 7), _mm_set1_epi16(static_cast<short>(0xbfff)));
  const __m128i magnitude = _mm_set1_epi16(0x3f80);
  const __m256i is_nan = _mm256_cvtepi16_epi32(_mm_cmpeq_epi16(_mm_and_si128(half, magnitude), magnitude));
  // All ones are a NaN.
  return {_mm256_or_ps(_mm256_mul_ps(_mm256_cvtph_ps(half), _mm256_set1_ps(256.0f)), (__m256)is_nan)};
#endif
}
#endif

QUIRE_INLINE Vec e4m3_to_float(Bits a) {
  const Bits magnitude = a & set1_bits(0x7fu);
  const Bits sign = shift_left<24>(a & set1_bits(0x80u));
  const Bits scaled = bits(from_bits(shift_left<20>(magnitude)) * set1(0x1p120f));
  return from_bits(sign | select(less_signed(magnitude, set1_bits(0x7fu)), scaled, set1_bits(0x7fc00000u)));
}

QUIRE_INLINE Vec e5m2_to_float(Bits a) { return half_to_float(shift_left<8>(a)); }

/// Saturating conversion to an 8-bit float with kMantissa mantissa bits, exponent bias kBias and largest finite value kMaxFinite.
template <int kMantissa, int kBias, std::uint32_t kMaxFinite, std::uint32_t kNanBits>
QUIRE_INLINE Bits float_to_fp8(Vec a) {
  constexpr int kShift = 23 - kMantissa;
  constexpr std::uint32_t kMinNormal = static_cast<std::uint32_t>(127 - kBias + 1) << 23;
  // The ulp of the anchor is the smallest subnormal of the target.
  constexpr std::uint32_t kAnchor = static_cast<std::uint32_t>(127 - kBias + 1 + kShift) << 23;
  constexpr std::uint32_t kRebias = static_cast<std::uint32_t>(127 - kBias) << 23;
  const Bits u = bits(a);
  const Bits sign = shift_right<24>(u) & set1_bits(0x80u);
  Bits magnitude = u & set1_bits(0x7fffffffu);
  // The bits of non-negative floats order as the floats do.
  magnitude = select(less_signed(magnitude, set1_bits(kMaxFinite)), magnitude, set1_bits(kMaxFinite));
  const Bits subnormal = bits(from_bits(magnitude) + from_bits(set1_bits(kAnchor))) - set1_bits(kAnchor);
  const Bits odd = shift_right<kShift>(magnitude) & set1_bits(1u);
  const Bits normal = shift_right<kShift>(magnitude + set1_bits((1u << (kShift - 1)) - 1u - kRebias) + odd);
  const Bits r = select(less_signed(magnitude, set1_bits(kMinNormal)), subnormal, normal);
  return sign | select(is_nan(a), set1_bits(kNanBits), r);
}

QUIRE_INLINE Bits float_to_int8(Vec a) {
  // The operands' order makes NaN 0; adding 1.5 * 2^23 leaves the rounded integer in the low bits.
  const Vec clamped = max(min(select(is_nan(a), zero(), a), set1(127.0f)), set1(-128.0f));
  return bits(clamped + set1(0x1.8p23f)) & set1_bits(0xffu);
}

}  // namespace detail

// ---- Loads and stores of elements --------------------------------------------------------------------------------------------

/// kLanes elements as floats.
QUIRE_INLINE Vec load(const float* p) { return from_bits(detail::load32(p)); }
QUIRE_INLINE Vec load(const BFloat16* p) { return from_bits(shift_left<16>(detail::load16(p))); }
QUIRE_INLINE Vec load(const Half* p) {
#if QUIRE_ISA_LEVEL >= 2
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
#elif QUIRE_ISA_LEVEL == 1
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
#else
  return detail::half_to_float(detail::load16(p));
#endif
}
QUIRE_INLINE Vec load(const Float8E4M3FN* p) {
#if QUIRE_ISA_LEVEL >= 1
  return detail::load_e4m3(p);
#else
  return detail::e4m3_to_float(detail::load8(p));
#endif
}
QUIRE_INLINE Vec load(const Float8E5M2* p) { return detail::e5m2_to_float(detail::load8(p)); }
QUIRE_INLINE Vec load(const std::int8_t* p) {
#if QUIRE_ISA_LEVEL >= 2
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
#elif QUIRE_ISA_LEVEL == 1
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
#else
  return detail::small_int_to_float(shift_right_signed<24>(shift_left<24>(detail::load8(p))));
#endif
}

/// The first n elements, 0 <= n <= kLanes; 0 in the other lanes.
QUIRE_PARTIAL Vec load(const float* p, int n) { return from_bits(detail::load32(p, n)); }
QUIRE_PARTIAL Vec load(const BFloat16* p, int n) { return from_bits(shift_left<16>(detail::load16(p, n))); }
QUIRE_PARTIAL Vec load(const Half* p, int n) { return detail::half_to_float(detail::load16(p, n)); }
QUIRE_PARTIAL Vec load(const Float8E4M3FN* p, int n) { return detail::e4m3_to_float(detail::load8(p, n)); }
QUIRE_PARTIAL Vec load(const Float8E5M2* p, int n) { return detail::e5m2_to_float(detail::load8(p, n)); }
QUIRE_PARTIAL Vec load(const std::int8_t* p, int n) {
  return detail::small_int_to_float(shift_right_signed<24>(shift_left<24>(detail::load8(p, n))));
}

/// Rounds to nearest even. float16 overflows to infinity; fp8 and int8 saturate; NaN stays NaN, and is 0 in int8.
QUIRE_INLINE void store(float* p, Vec a) { detail::store32(p, bits(a)); }
QUIRE_INLINE void store(BFloat16* p, Vec a) { detail::store16(p, detail::pack(p, a)); }
QUIRE_INLINE void store(Half* p, Vec a) { detail::store16(p, detail::pack(p, a)); }
QUIRE_INLINE void store(Float8E4M3FN* p, Vec a) { detail::store8(p, detail::float_to_fp8<3, 7, 0x43e00000u, 0x7fu>(a)); }
QUIRE_INLINE void store(Float8E5M2* p, Vec a) { detail::store8(p, detail::float_to_fp8<2, 15, 0x47600000u, 0x7eu>(a)); }
QUIRE_INLINE void store(std::int8_t* p, Vec a) { detail::store8(p, detail::float_to_int8(a)); }

/// The first n lanes, 0 <= n <= kLanes.
QUIRE_PARTIAL void store(float* p, Vec a, int n) { detail::store32(p, bits(a), n); }
QUIRE_PARTIAL void store(BFloat16* p, Vec a, int n) { detail::store16(p, detail::pack(p, a), n); }
QUIRE_PARTIAL void store(Half* p, Vec a, int n) { detail::store16(p, detail::pack(p, a), n); }
QUIRE_PARTIAL void store(Float8E4M3FN* p, Vec a, int n) { detail::store8(p, detail::float_to_fp8<3, 7, 0x43e00000u, 0x7fu>(a), n); }
QUIRE_PARTIAL void store(Float8E5M2* p, Vec a, int n) { detail::store8(p, detail::float_to_fp8<2, 15, 0x47600000u, 0x7eu>(a), n); }
QUIRE_PARTIAL void store(std::int8_t* p, Vec a, int n) { detail::store8(p, detail::float_to_int8(a), n); }

// ---- Functions ---------------------------------------------------------------------------------------------------------------
// The forms on N vectors work in place, step by step on all of them: one chain alone leaves the multipliers waiting.

/// e^x within 1.5 ulp; 0 below -104, infinity above 88.73, NaN for NaN.
template <int N>
QUIRE_INLINE void exp(Vec (&x)[N]) {
  Vec shifted[N], n[N], r[N];
  for (int k = 0; k < N; ++k) x[k] = max(set1(-104.0f), min(set1(89.0f), x[k]));
  // Adding 1.5 * 2^23 rounds to an integer, which the low bits then hold.
  for (int k = 0; k < N; ++k) shifted[k] = fma(x[k], set1(0x1.715476p+0f), set1(0x1.8p23f));
  for (int k = 0; k < N; ++k) n[k] = shifted[k] - set1(0x1.8p23f);
  // ln 2 in two parts; n times the first is exact.
  for (int k = 0; k < N; ++k) r[k] = fma(n[k], set1(-0x1.63p-1f), x[k]);
  for (int k = 0; k < N; ++k) r[k] = fma(n[k], set1(0x1.bd0106p-13f), r[k]);
  // Minimax for (e^r - 1 - r) / r^2 on [-ln 2 / 2, ln 2 / 2]; relative error of e^r 3e-9.
  for (int k = 0; k < N; ++k) x[k] = fma(r[k], set1(0x1.6a2256p-10f), set1(0x1.123b02p-7f));
  for (int k = 0; k < N; ++k) x[k] = fma(x[k], r[k], set1(0x1.5558f8p-5f));
  for (int k = 0; k < N; ++k) x[k] = fma(x[k], r[k], set1(0x1.555490p-3f));
  for (int k = 0; k < N; ++k) x[k] = fma(x[k], r[k], set1(0x1.fffffcp-2f));
  for (int k = 0; k < N; ++k) x[k] = fma(x[k] * r[k], r[k], r[k]);
  for (int k = 0; k < N; ++k) x[k] += set1(1.0f);
  for (int k = 0; k < N; ++k) {
#if QUIRE_ISA_LEVEL >= 2
    x[k] = {_mm512_scalef_ps(x[k].v, n[k].v)};
#else
    // 2^n in two factors, so that neither overflows and subnormal results round once.
    const Bits exponent = bits(shifted[k]) - set1_bits(0x4b400000u);
    const Bits first = shift_right_signed<1>(exponent);
    const Bits second = exponent - first;
    const Bits bias = set1_bits(127u);
    x[k] = x[k] * from_bits(shift_left<23>(first + bias)) * from_bits(shift_left<23>(second + bias));
#endif
  }
}
QUIRE_INLINE Vec exp(Vec x) {
  Vec a[1] = {x};
  exp(a);
  return a[0];
}

QUIRE_INLINE Vec tanh(Vec x) {
  const Vec a = abs(x);
  // Minimax for (tanh(x) - x) / x^3 in x^2 on |x| < 0.65; relative error 7e-9.
  const Vec s = x * x;
  Vec p = set1(-0x1.69711ap-8f);
  p = fma(p, s, set1(0x1.4f5ef8p-6f));
  p = fma(p, s, set1(-0x1.b7cff2p-5f));
  p = fma(p, s, set1(0x1.1103f2p-3f));
  p = fma(p, s, set1(-0x1.555524p-2f));
  const Vec small = fma(p * s, x, x);
  const Vec large = set1(1.0f) - set1(2.0f) / (exp(a + a) + set1(1.0f));
  const Vec signed_large = from_bits(bits(large) | (bits(x) & set1_bits(0x80000000u)));
  return select(a < set1(0.65f), small, signed_large);
}

/// The standard normal distribution's cumulative function, (1 + erf(x / sqrt(2))) / 2, without the cancellation for negative x.
template <int N>
QUIRE_INLINE void normal_cdf(Vec (&x)[N]) {
  // 1 - cdf(a) = exp(-a^2 / 2) q(t), t = 1 / (1 + 0.35 a); q is minimax over a in [0, 14.6], relative error 3e-8.
  Vec e[N], t[N], q[N];
  for (int k = 0; k < N; ++k) e[k] = set1(-0.5f) * x[k] * x[k];
  exp(e);
  for (int k = 0; k < N; ++k) t[k] = set1(1.0f) / fma(abs(x[k]), set1(0.35f), set1(1.0f));
  for (int k = 0; k < N; ++k) q[k] = fma(t[k], set1(-0x1.ddc066p-6f), set1(0x1.26fe3ap-3f));
  for (int k = 0; k < N; ++k) q[k] = fma(q[k], t[k], set1(-0x1.05ff6cp-2f));
  for (int k = 0; k < N; ++k) q[k] = fma(q[k], t[k], set1(0x1.465478p-3f));
  for (int k = 0; k < N; ++k) q[k] = fma(q[k], t[k], set1(-0x1.7c8dacp-6f));
  for (int k = 0; k < N; ++k) q[k] = fma(q[k], t[k], set1(0x1.b05e82p-4f));
  for (int k = 0; k < N; ++k) q[k] = fma(q[k], t[k], set1(0x1.eac800p-4f));
  for (int k = 0; k < N; ++k) q[k] = fma(q[k], t[k], set1(0x1.1e70e2p-3f));
  for (int k = 0; k < N; ++k) q[k] = fma(q[k], t[k], set1(0x1.1df1c4p-3f));
  for (int k = 0; k < N; ++k) {
    const Vec tail = e[k] * (q[k] * t[k]);
    x[k] = select(x[k] < zero(), tail, set1(1.0f) - tail);
  }
}

}  // namespace quire::cpu::QUIRE_ISA_NAMESPACE
