// Kernels of products with quantized operands: tiles in float32 and in int16, what fills their panels, and packed weights times one row.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "quire/dtype.h"

namespace quire::cpu {

/// Output features that lie side by side in a panel and in a packed weight.
inline constexpr int kTileColumns = 16;
/// Rows of a block of x that shares a scale where it is rounded to 16 bits, unless a weight's groups are shorter.
inline constexpr std::int64_t kFixedPointBlock = 128;
/// 256 * 127 + 127: two signed digits of 8 bits.
inline constexpr std::int32_t kLargestFixedPoint = 32639;

/// c[rows][columns] (+)= a times b. `rows` and `columns` are those of the table.
struct MatmulTile {
  void* c;                   // float32 or int32
  const void* a;             // float32 [k][rows], or pairs of int16 [k / 2][rows]
  const void* b;             // columns / 16 panels of float32 [k][16], or pairs of int16 [k / 2][16], panel_stride words apart
  std::int64_t c_stride;
  std::int64_t panel_stride;
  std::int64_t num_steps;    // k, or k / 2
  bool accumulates;          // false: c is overwritten
};

/// Codes of 16 output features: word j of a step holds 32 / bits codes of feature j, the lowest bits first.
struct PackedTile {
  const std::uint32_t* words;  // [num_steps][16]
  const float* scales;         // [16]
  const float* zeros;          // [16]
  std::int64_t num_steps;
};

/// Codes of 16 output features times one row in fixed point.
struct PackedRow {
  float* out;                        // [16]
  const std::uint32_t* words;        // [num_steps][16]
  const float* scales;               // [num_groups][16]
  const float* zeros;                // [num_groups][16], or [16] where zero_stride is 0
  const std::int32_t* operand;       // [num_steps][16 / bits] words of pack_row
  const float* block_scales;         // [num_blocks]
  const std::int32_t* block_sums;    // [num_blocks]
  std::int64_t num_steps, block_steps;
  std::int64_t group_stride;         // of scales from one block to the next: 16, or 0
  std::int64_t zero_stride;          // likewise
};

/// sums[row] = the product of a row of b with each of num_rows <= 4 rows of a.
struct DotRows {
  void* sums;     // int32 or float32
  const void* a;  // int16 or float32, a_stride elements apart
  const void* b;  // int8, or what float32 rows of a meet: int8, float8_e4m3fn
  std::int64_t a_stride, k;
  int num_rows;
};
inline constexpr int kDotRows = 4;

struct QuantizedMatmulKernels {
  int rows, columns;
  void (*multiply)(const MatmulTile& tile);
  void (*multiply_int16)(const MatmulTile& tile);
  /// panel[step * codes + i][16] = (code - zero) * scale; by stored bits: 4, 8.
  void (*unpack[2])(float* panel, const PackedTile& tile);
  void (*row[2])(const PackedRow& row);
  /// The row of fixed-point x for `row`, by stored bits: 32 / bits elements a step.
  void (*pack_row[2])(std::int32_t* operand, const std::int16_t* x, std::int64_t num_steps);
  void (*dot_int8)(const DotRows& rows);        // int16 and int8, in int32
  void (*dot_int8_wide)(const DotRows& rows);   // float32 and int8
  void (*dot_float8)(const DotRows& rows);      // float32 and float8_e4m3fn
  /// out = x, as float32; float32, float16, bfloat16, float8_e4m3fn, float8_e5m2, int8 in DType's order.
  void (*widen[6])(float* out, const void* x, std::int64_t n);
  /// The reverse for the first three, with a bias or null: out = x + bias.
  void (*narrow[3])(void* out, const float* x, const float* bias, std::int64_t n);
  /// q = x / scale rounded to int16, where scale is the largest magnitude over kLargestFixedPoint, or 1 where that is 0. Returns the
  /// scale; it is not finite where x is not.
  float (*fixed_point)(std::int16_t* q, const float* x, std::int64_t n);
};

}  // namespace quire::cpu

#ifdef QUIRE_ISA_NAMESPACE
#include "cpu/isa/vec.h"

namespace quire::cpu::QUIRE_ISA_NAMESPACE {

inline constexpr int kTileVecs = kTileColumns / kLanes;
inline constexpr int kMatmulRows = QUIRE_ISA_LEVEL >= 2 ? 12 : QUIRE_ISA_LEVEL == 1 ? 6 : 2;
inline constexpr int kMatmulPanels = QUIRE_ISA_LEVEL >= 2 ? 2 : 1;
inline constexpr int kMatmulVecs = kMatmulPanels * kTileVecs;

/// Sums of products of neighbouring int16, added to `sum`.
QUIRE_INLINE Bits add_pairs(Bits sum, Bits a, Bits b) {
#if QUIRE_ISA_LEVEL >= 2
#ifdef __AVX512VNNI__
  return {(NativeU)_mm512_dpwssd_epi32((__m512i)sum.v, (__m512i)a.v, (__m512i)b.v)};
#else
  return sum + Bits{(NativeU)_mm512_madd_epi16((__m512i)a.v, (__m512i)b.v)};
#endif
#elif QUIRE_ISA_LEVEL == 1
  return sum + Bits{(NativeU)_mm256_madd_epi16((__m256i)a.v, (__m256i)b.v)};
#else
  const auto low = [](Bits x) QUIRE_LAMBDA_INLINE { return (NativeI)shift_right_signed<16>(shift_left<16>(x)).v; };
  const auto high = [](Bits x) QUIRE_LAMBDA_INLINE { return (NativeI)shift_right_signed<16>(x).v; };
  return {sum.v + (NativeU)(low(a) * low(b) + high(a) * high(b))};
#endif
}

QUIRE_INLINE Vec signed_to_float(Bits a) { return {__builtin_convertvector((NativeI)a.v, NativeF)}; }

inline void multiply(const MatmulTile& t) {
  Vec sums[kMatmulRows][kMatmulVecs];
  float* const c = static_cast<float*>(t.c);
#pragma GCC unroll 12
  for (int r = 0; r < kMatmulRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kMatmulVecs; ++v) sums[r][v] = t.accumulates ? load(c + r * t.c_stride + v * kLanes) : zero();
  const float* a = static_cast<const float*>(t.a);
  const float* b = static_cast<const float*>(t.b);
  for (std::int64_t step = 0; step < t.num_steps; ++step, a += kMatmulRows, b += kTileColumns) {
    Vec columns[kMatmulVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kMatmulVecs; ++v) columns[v] = load(b + (v / kTileVecs) * t.panel_stride + (v % kTileVecs) * kLanes);
#pragma GCC unroll 12
    for (int r = 0; r < kMatmulRows; ++r) {
      const Vec x = set1(a[r]);
#pragma GCC unroll 4
      for (int v = 0; v < kMatmulVecs; ++v) sums[r][v] = fma(x, columns[v], sums[r][v]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < kMatmulRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kMatmulVecs; ++v) store(c + r * t.c_stride + v * kLanes, sums[r][v]);
}

inline void multiply_int16(const MatmulTile& t) {
  Bits sums[kMatmulRows][kMatmulVecs];
  std::uint32_t* const c = static_cast<std::uint32_t*>(t.c);
#pragma GCC unroll 12
  for (int r = 0; r < kMatmulRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kMatmulVecs; ++v) sums[r][v] = t.accumulates ? detail::load32(c + r * t.c_stride + v * kLanes) : Bits{NativeU{}};
  const std::uint32_t* a = static_cast<const std::uint32_t*>(t.a);
  const std::uint32_t* b = static_cast<const std::uint32_t*>(t.b);
  for (std::int64_t step = 0; step < t.num_steps; ++step, a += kMatmulRows, b += kTileColumns) {
    Bits columns[kMatmulVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kMatmulVecs; ++v) columns[v] = detail::load32(b + (v / kTileVecs) * t.panel_stride + (v % kTileVecs) * kLanes);
#pragma GCC unroll 12
    for (int r = 0; r < kMatmulRows; ++r) {
      const Bits x = set1_bits(a[r]);
#pragma GCC unroll 4
      for (int v = 0; v < kMatmulVecs; ++v) sums[r][v] = add_pairs(sums[r][v], x, columns[v]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < kMatmulRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kMatmulVecs; ++v) detail::store32(c + r * t.c_stride + v * kLanes, sums[r][v]);
}

template <int kBits>
void unpack(float* panel, const PackedTile& t) {
  constexpr int kCodes = 32 / kBits;
  Vec scales[kTileVecs], zeros[kTileVecs];
  for (int v = 0; v < kTileVecs; ++v) {
    scales[v] = load(t.scales + v * kLanes);
    zeros[v] = load(t.zeros + v * kLanes);
  }
  for (std::int64_t step = 0; step < t.num_steps; ++step) {
    for (int v = 0; v < kTileVecs; ++v) {
      Bits word = detail::load32(t.words + step * kTileColumns + v * kLanes);
      float* out = panel + step * kCodes * kTileColumns + v * kLanes;
#pragma GCC unroll 8
      for (int i = 0; i < kCodes; ++i) {
        const Vec code = signed_to_float(word & set1_bits((1u << kBits) - 1u));
        store(out + i * kTileColumns, (code - zeros[v]) * scales[v]);
        word = shift_right<kBits>(word);
      }
    }
  }
}

#ifdef __AVX512VNNI__
// Codes are bytes without a sign, x two digits of 8 bits with one: the words of a step are the upper and the lower digits of elements
// 0 2 4 6 and those of 1 3 5 7, or of 0 1 2 3.
template <int kBits>
void pack_row(std::int32_t* operand, const std::int16_t* x, std::int64_t num_steps) {
  constexpr std::int64_t kCodes = 32 / kBits, kWords = 16 / kBits;
  const __m128i order = kBits == 4 ? _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15)
                                   : _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (std::int64_t i = 0; i < num_steps * kCodes; i += 16) {
    const std::int64_t left = num_steps * kCodes - i;
    const __m256i q = left >= 16 ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i))
                                 : _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << left) - 1u), x + i);
    const __m128i low = _mm256_cvtepi16_epi8(q);
    const __m128i high = _mm256_cvtepi16_epi8(_mm256_srai_epi16(_mm256_sub_epi16(q, _mm256_cvtepi8_epi16(low)), 8));
    const __m128i lows = _mm_shuffle_epi8(low, order), highs = _mm_shuffle_epi8(high, order);
    const __m256i words =
        _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_unpacklo_epi32(highs, lows)), _mm_unpackhi_epi32(highs, lows), 1);
    std::int32_t* const out = operand + i / kCodes * kWords;
    if (left >= 16) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), words);
    } else {
      _mm256_mask_storeu_epi32(out, static_cast<__mmask8>((1u << (left / kCodes * kWords)) - 1u), words);
    }
  }
}

template <int kBits>
QUIRE_INLINE void multiply_digits(__m512i word, const std::int32_t* digits, __m512i& high, __m512i& low) {
  const __m512i first = kBits == 4 ? _mm512_and_si512(word, _mm512_set1_epi8(0x0f)) : word;
  high = _mm512_dpbusd_epi32(high, first, _mm512_set1_epi32(digits[0]));
  low = _mm512_dpbusd_epi32(low, first, _mm512_set1_epi32(digits[1]));
  if constexpr (kBits == 4) {
    const __m512i second = _mm512_and_si512(_mm512_srli_epi32(word, 4), _mm512_set1_epi8(0x0f));
    high = _mm512_dpbusd_epi32(high, second, _mm512_set1_epi32(digits[2]));
    low = _mm512_dpbusd_epi32(low, second, _mm512_set1_epi32(digits[3]));
  }
}

/// Sums over steps [begin, end) of codes times x, for 16 output features.
template <int kBits>
QUIRE_INLINE void multiply_steps(const PackedRow& row, std::int64_t begin, std::int64_t end, Bits (&sums)[kTileVecs]) {
  constexpr int kWords = 16 / kBits, kChains = 4;  // one alone waits for its own additions
  __m512i high[kChains], low[kChains];
#pragma GCC unroll 4
  for (int i = 0; i < kChains; ++i) high[i] = low[i] = _mm512_setzero_si512();
  const std::uint32_t* words = row.words + begin * kTileColumns;
  const std::int32_t* digits = row.operand + begin * kWords;
  std::int64_t step = begin;
  for (; step + kChains <= end; step += kChains, words += kChains * kTileColumns, digits += kChains * kWords)
#pragma GCC unroll 4
    for (int i = 0; i < kChains; ++i)
      multiply_digits<kBits>(_mm512_loadu_si512(words + i * kTileColumns), digits + i * kWords, high[i], low[i]);
  for (; step < end; ++step, words += kTileColumns, digits += kWords)
    multiply_digits<kBits>(_mm512_loadu_si512(words), digits, high[0], low[0]);
  const __m512i highs = _mm512_add_epi32(_mm512_add_epi32(high[0], high[1]), _mm512_add_epi32(high[2], high[3]));
  const __m512i lows = _mm512_add_epi32(_mm512_add_epi32(low[0], low[1]), _mm512_add_epi32(low[2], low[3]));
  sums[0] = {(NativeU)_mm512_add_epi32(_mm512_slli_epi32(highs, 8), lows)};
}
#else
// Pairs of int16: elements i and i + 16 / bits of a step.
template <int kBits>
void pack_row(std::int32_t* operand, const std::int16_t* x, std::int64_t num_steps) {
  constexpr int kPairs = 16 / kBits;
  for (std::int64_t step = 0; step < num_steps; ++step, x += 2 * kPairs)
    for (int i = 0; i < kPairs; ++i) {
      const auto low = static_cast<std::uint16_t>(x[i]), high = static_cast<std::uint16_t>(x[i + kPairs]);
      *operand++ = static_cast<std::int32_t>(low | static_cast<std::uint32_t>(high) << 16);
    }
}

/// Sums over steps [begin, end) of codes times x, for 16 output features.
template <int kBits>
QUIRE_INLINE void multiply_steps(const PackedRow& row, std::int64_t begin, std::int64_t end, Bits (&sums)[kTileVecs]) {
  constexpr int kPairs = 16 / kBits;
  constexpr std::uint32_t kMask = kBits == 4 ? 0x000f000fu : 0x00ff00ffu;
  Bits chains[kTileVecs][2];
  for (int v = 0; v < kTileVecs; ++v) chains[v][0] = chains[v][1] = {NativeU{}};
  const std::uint32_t* words = row.words + begin * kTileColumns;
  const std::int32_t* pairs = row.operand + begin * kPairs;
  for (std::int64_t step = begin; step < end; ++step, words += kTileColumns, pairs += kPairs) {
    Bits word[kTileVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kTileVecs; ++v) word[v] = detail::load32(words + v * kLanes);
#pragma GCC unroll 4
    for (int i = 0; i < kPairs; ++i) {
      const Bits x = set1_bits(static_cast<std::uint32_t>(pairs[i]));
#pragma GCC unroll 4
      for (int v = 0; v < kTileVecs; ++v) {
        chains[v][i & 1] = add_pairs(chains[v][i & 1], word[v] & set1_bits(kMask), x);
        word[v] = shift_right<kBits>(word[v]);
      }
    }
  }
  for (int v = 0; v < kTileVecs; ++v) sums[v] = chains[v][0] + chains[v][1];
}
#endif

template <int kBits>
void multiply_row(const PackedRow& row) {
  Vec out[kTileVecs];
  for (int v = 0; v < kTileVecs; ++v) out[v] = zero();
  const float *scales = row.scales, *zeros = row.zeros;
  std::int64_t block = 0;
  for (std::int64_t begin = 0; begin < row.num_steps; begin += row.block_steps, ++block) {
    Bits sums[kTileVecs];
    multiply_steps<kBits>(row, begin, begin + row.block_steps < row.num_steps ? begin + row.block_steps : row.num_steps, sums);
    const Vec block_scale = set1(row.block_scales[block]);
    const Vec block_sum = set1(static_cast<float>(row.block_sums[block]));
    for (int v = 0; v < kTileVecs; ++v) {
      const Vec sum = signed_to_float(sums[v]) - load(zeros + v * kLanes) * block_sum;
      out[v] = fma(sum, block_scale * load(scales + v * kLanes), out[v]);
    }
    scales += row.group_stride;
    zeros += row.zero_stride;
  }
  for (int v = 0; v < kTileVecs; ++v) store(row.out + v * kLanes, out[v]);
}

inline void dot_int8(const DotRows& rows) {
  std::int32_t* const sums = static_cast<std::int32_t*>(rows.sums);
  const std::int16_t* const a = static_cast<const std::int16_t*>(rows.a);
  const std::int8_t* const b = static_cast<const std::int8_t*>(rows.b);
  std::int64_t i = 0;
  for (int r = 0; r < rows.num_rows; ++r) sums[r] = 0;
#if QUIRE_ISA_LEVEL >= 1
  Bits vectors[kDotRows];
  for (int r = 0; r < kDotRows; ++r) vectors[r] = {NativeU{}};
  for (; i + 2 * kLanes <= rows.k; i += 2 * kLanes) {
#if QUIRE_ISA_LEVEL >= 2
    const Bits wide = {(NativeU)_mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(b + i)))};
#else
    const Bits wide = {(NativeU)_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(b + i)))};
#endif
#pragma GCC unroll 4
    for (int r = 0; r < kDotRows; ++r)
      if (r < rows.num_rows) vectors[r] = add_pairs(vectors[r], wide, detail::load32(a + r * rows.a_stride + i));
  }
  for (int r = 0; r < rows.num_rows; ++r)
    for (int lane = 0; lane < kLanes; ++lane) sums[r] += static_cast<std::int32_t>(vectors[r].v[lane]);
#endif
  for (; i < rows.k; ++i)
    for (int r = 0; r < rows.num_rows; ++r) sums[r] += a[r * rows.a_stride + i] * b[i];
}

template <typename B>
void dot_wide(const DotRows& rows) {
  float* const sums = static_cast<float*>(rows.sums);
  const float* const a = static_cast<const float*>(rows.a);
  const B* const b = static_cast<const B*>(rows.b);
  // Two chains for each row: one alone waits for its own additions.
  Vec vectors[kDotRows][2];
  for (int r = 0; r < kDotRows; ++r) vectors[r][0] = vectors[r][1] = zero();
  std::int64_t i = 0;
  for (; i + 2 * kLanes <= rows.k; i += 2 * kLanes) {
    const Vec first = load(b + i), second = load(b + i + kLanes);
#pragma GCC unroll 4
    for (int r = 0; r < kDotRows; ++r)
      if (r < rows.num_rows) {
        vectors[r][0] = fma(load(a + r * rows.a_stride + i), first, vectors[r][0]);
        vectors[r][1] = fma(load(a + r * rows.a_stride + i + kLanes), second, vectors[r][1]);
      }
  }
  for (; i < rows.k; i += kLanes) {
    const int left = rows.k - i < kLanes ? static_cast<int>(rows.k - i) : kLanes;
    const Vec last = load(b + i, left);
    for (int r = 0; r < rows.num_rows; ++r) vectors[r][0] = fma(load(a + r * rows.a_stride + i, left), last, vectors[r][0]);
  }
  for (int r = 0; r < rows.num_rows; ++r) sums[r] = reduce_add(vectors[r][0] + vectors[r][1]);
}

template <typename T>
void widen(float* out, const void* src, std::int64_t n) {
  const T* x = static_cast<const T*>(src);
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, load(x + i));
  if (i < n) store(out + i, load(x + i, static_cast<int>(n - i)), static_cast<int>(n - i));
}

template <typename T>
void narrow(void* dst, const float* x, const float* bias, std::int64_t n) {
  T* out = static_cast<T*>(dst);
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, bias == nullptr ? load(x + i) : load(x + i) + load(bias + i));
  if (i < n) {
    const int left = static_cast<int>(n - i);
    store(out + i, bias == nullptr ? load(x + i, left) : load(x + i, left) + load(bias + i, left), left);
  }
}

inline float fixed_point(std::int16_t* q, const float* x, std::int64_t n) {
  // Bits of magnitudes order as the magnitudes do, with infinity and NaN at the end.
  std::uint32_t largest = 0;
  for (std::int64_t i = 0; i < n; ++i) {
    std::uint32_t magnitude;
    __builtin_memcpy(&magnitude, x + i, 4);
    magnitude &= 0x7fffffffu;
    largest = magnitude > largest ? magnitude : largest;
  }
  float limit;
  __builtin_memcpy(&limit, &largest, 4);
  if (largest >= 0x7f800000u) return limit;
  // Below 2^-100 a reciprocal overflows; what is left of such a block is 0.
  const float scale = limit > 0x1p-100f ? limit / static_cast<float>(kLargestFixedPoint) : 1.0f;
  const float inverse = 1.0f / scale;
  for (std::int64_t i = 0; i < n; ++i) {
    // Adding 1.5 * 2^23 rounds to nearest even and leaves the integer in the low bits.
    const float shifted = x[i] * inverse + 0x1.8p23f;
    std::int32_t word;
    __builtin_memcpy(&word, &shifted, 4);
    q[i] = static_cast<std::int16_t>(word);
  }
  return scale;
}

extern const QuantizedMatmulKernels quantized_matmul_kernels;
const QuantizedMatmulKernels quantized_matmul_kernels = {
    kMatmulRows,
    kMatmulPanels * kTileColumns,
    multiply,
    multiply_int16,
    {unpack<4>, unpack<8>},
    {multiply_row<4>, multiply_row<8>},
    {pack_row<4>, pack_row<8>},
    dot_int8,
    dot_wide<std::int8_t>,
    dot_wide<Float8E4M3FN>,
    {widen<float>, widen<Half>, widen<BFloat16>, widen<Float8E4M3FN>, widen<Float8E5M2>, widen<std::int8_t>},
    {narrow<float>, narrow<Half>, narrow<BFloat16>},
    fixed_point};

}  // namespace quire::cpu::QUIRE_ISA_NAMESPACE
#endif
