// Products with quantized operands on AMX tiles: int8 with int8, and bfloat16 with the codes of packed weights.
// SPDX-License-Identifier: Apache-2.0
#if defined(__x86_64__)
#define QUIRE_ISA_NAMESPACE avx512_amx
#define QUIRE_ISA_LEVEL 3

#include "cpu/isa/amx_tiles.h"
#include "cpu/isa/quantization_amx.h"
#include "cpu/isa/vec.h"

namespace quire::cpu::avx512_amx {
namespace {

/// The tiles for as long as it lives.
class Tiles {
 public:
  Tiles() { load_tile_config(); }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

constexpr int kSumsBytes = kAmxColumns * 4;

// Tiles 0 to 3 hold sums of 2 x 2 tiles, 4 and 5 rows of a, 6 and 7 columns of b.
template <bool kBFloat16, int kRowTiles>
QUIRE_INLINE void multiply_step(const std::uint32_t* a0, const std::uint32_t* a1, const std::uint32_t* b0, const std::uint32_t* b1) {
  _tile_loadd(6, b0, 64);
  _tile_loadd(4, a0, 64);
  _tile_loadd(7, b1, 64);
  if constexpr (kRowTiles == 2) _tile_loadd(5, a1, 64);
  if constexpr (kBFloat16) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (kRowTiles == 2) _tile_dpbf16ps(2, 5, 6);
    if constexpr (kRowTiles == 2) _tile_dpbf16ps(3, 5, 7);
  } else {
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(1, 4, 7);
    if constexpr (kRowTiles == 2) _tile_dpbssd(2, 5, 6);
    if constexpr (kRowTiles == 2) _tile_dpbssd(3, 5, 7);
  }
}

template <bool kBFloat16, int kRowTiles>
QUIRE_INLINE void multiply_tiles(const AmxBlock& block, const std::uint32_t* a, const std::uint32_t* b, char* sums) {
  if (block.accumulates) {
    _tile_loadd(0, sums, kSumsBytes);
    _tile_loadd(1, sums + 64, kSumsBytes);
    if constexpr (kRowTiles == 2) _tile_loadd(2, sums + 16 * kSumsBytes, kSumsBytes);
    if constexpr (kRowTiles == 2) _tile_loadd(3, sums + 16 * kSumsBytes + 64, kSumsBytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (kRowTiles == 2) _tile_zero(2);
    if constexpr (kRowTiles == 2) _tile_zero(3);
  }
  for (std::int64_t word = 0; word < block.num_steps * kAmxTileWords; word += kAmxTileWords)
    multiply_step<kBFloat16, kRowTiles>(a + word, a + block.a_stride + word, b + word, b + block.panel_stride + word);
  _tile_stored(0, sums, kSumsBytes);
  _tile_stored(1, sums + 64, kSumsBytes);
  if constexpr (kRowTiles == 2) _tile_stored(2, sums + 16 * kSumsBytes, kSumsBytes);
  if constexpr (kRowTiles == 2) _tile_stored(3, sums + 16 * kSumsBytes + 64, kSumsBytes);
}

template <bool kBFloat16>
void multiply(const AmxBlock& block) {
  const Tiles tiles;
  for (int column = 0; column < kAmxColumns; column += 2 * kAmxTile) {
    const std::uint32_t* const b = block.b + column / kAmxTile * block.panel_stride;
    const std::uint32_t* a = block.a;
    char* sums = static_cast<char*>(block.sums) + column * 4;
    std::int64_t tile = 0;
    for (; tile + 2 <= block.num_row_tiles; tile += 2, a += 2 * block.a_stride, sums += 2 * kAmxTile * kSumsBytes)
      multiply_tiles<kBFloat16, 2>(block, a, b, sums);
    if (tile < block.num_row_tiles) multiply_tiles<kBFloat16, 1>(block, a, b, sums);
  }
}

QUIRE_INLINE __m512i load_bytes(const std::int8_t* p, std::int64_t n) {
  return n >= 64 ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi8((std::uint64_t{1} << n) - 1, p);
}

void pack_rows_int8(std::uint32_t* out, const std::int8_t* rows, std::int64_t stride, std::int64_t num_rows, std::int64_t k) {
  for (std::int64_t r = 0; r < kAmxTile; ++r)
    for (std::int64_t step = 0; step * 64 < k; ++step)
      _mm512_storeu_si512(out + step * kAmxTileWords + r * kAmxTile,
                          r < num_rows ? load_bytes(rows + r * stride + step * 64, k - step * 64) : _mm512_setzero_si512());
}

/// The transpose of 16 x 16 words.
QUIRE_INLINE void transpose(__m512i (&r)[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  // Now r[4 i + c] holds in its lane of 128 bits l column 4 l + c of rows 4 i to 4 i + 3.
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512i low0 = _mm512_shuffle_i32x4(r[c], r[4 + c], 0x88), high0 = _mm512_shuffle_i32x4(r[c], r[4 + c], 0xdd);
    const __m512i low1 = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0x88), high1 = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0xdd);
    t[c] = _mm512_shuffle_i32x4(low0, low1, 0x88);
    t[4 + c] = _mm512_shuffle_i32x4(high0, high1, 0x88);
    t[8 + c] = _mm512_shuffle_i32x4(low0, low1, 0xdd);
    t[12 + c] = _mm512_shuffle_i32x4(high0, high1, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = t[i];
}

void pack_columns_int8(std::uint32_t* out, const std::int8_t* rows, std::int64_t stride, std::int64_t num_rows, std::int64_t k) {
  for (std::int64_t step = 0; step * 64 < k; ++step) {
    __m512i words[kAmxTile];
#pragma GCC unroll 16
    for (int r = 0; r < kAmxTile; ++r)
      words[r] = r < num_rows ? load_bytes(rows + r * stride + step * 64, k - step * 64) : _mm512_setzero_si512();
    transpose(words);
#pragma GCC unroll 16
    for (int r = 0; r < kAmxTile; ++r) _mm512_storeu_si512(out + step * kAmxTileWords + r * kAmxTile, words[r]);
  }
}

template <int kBits>
void unpack(std::uint32_t* panel, const std::uint32_t* words, std::int64_t num_words, const float* scales, const float* zeros) {
  constexpr int kPairs = 16 / kBits;
  // A code in the low bits of 2^23 is that float's distance from it.
  const __m512i mask = _mm512_set1_epi32((1 << kBits) - 1), magic = _mm512_set1_epi32(0x4b000000);
  const __m512 scale = _mm512_loadu_ps(scales), zero = _mm512_add_ps(_mm512_loadu_ps(zeros), _mm512_set1_ps(0x1p23f));
  alignas(64) std::uint16_t order[32];
  for (int i = 0; i < 32; ++i) order[i] = static_cast<std::uint16_t>(i / 2 + i % 2 * 16);
  const __m512i interleave = _mm512_load_si512(order);
  const auto value = [&](__m512i code) QUIRE_LAMBDA_INLINE {
    const __m512 wide = _mm512_castsi512_ps(_mm512_ternarylogic_epi32(code, mask, magic, 0xea));  // code & mask | magic
    return _mm512_mul_ps(_mm512_sub_ps(wide, zero), scale);
  };
  for (std::int64_t i = 0; i < num_words; ++i, panel += kPairs * kAmxTile) {
    __m512i word = _mm512_loadu_si512(words + i * kAmxTile);
#pragma GCC unroll 4
    for (int j = 0; j < kPairs; ++j) {
      const __m512bh pair = _mm512_cvtne2ps_pbh(value(_mm512_srli_epi32(word, 16)), value(word));
      _mm512_storeu_si512(panel + j * kAmxTile, _mm512_permutexvar_epi16(interleave, (__m512i)pair));
      word = _mm512_srli_epi32(word, kBits);
    }
  }
}

template <typename T, bool kInt32>
void finish(const AmxFinish& f) {
  for (std::int64_t row = 0; row < f.rows; ++row) {
    T* const out = static_cast<T*>(f.out) + row * f.out_stride;
    const std::int32_t zero_point = f.zero_point == nullptr ? 0 : f.zero_point[row * f.zero_point_stride];
    const Vec scale_a = set1(kInt32 ? f.scale_a[row * f.scale_a_stride] : 1.0f);
    for (std::int64_t column = 0; column < f.columns; column += kLanes) {
      const int n = f.columns - column < kLanes ? static_cast<int>(f.columns - column) : kLanes;
      const std::int64_t at = row * kAmxColumns + column;
      Vec value;
      if constexpr (kInt32) {
        __m512i sum = _mm512_loadu_si512(static_cast<const std::int32_t*>(f.sums) + at);
        // Modulo 2^32: the difference fits, its terms need not.
        if (zero_point != 0) {
          const __m512i column_sums = (__m512i)detail::load32(f.column_sums + column, n).v;
          sum = _mm512_sub_epi32(sum, _mm512_mullo_epi32(column_sums, _mm512_set1_epi32(zero_point)));
        }
        value = Vec{_mm512_cvtepi32_ps(sum)} * scale_a * load(f.scale_b + column, n);
      } else {
        value = load(static_cast<const float*>(f.sums) + at);
      }
      if (f.bias != nullptr) value = value + load(f.bias + column, n);
      if (n == kLanes) {
        store(out + column, value);
      } else {
        store(out + column, value, n);
      }
    }
  }
}

}  // namespace

extern const QuantizationAmxKernels quantization_amx_kernels;
const QuantizationAmxKernels quantization_amx_kernels = {multiply<false>,
                                                         multiply<true>,
                                                         pack_rows_int8,
                                                         pack_columns_int8,
                                                         {unpack<4>, unpack<8>},
                                                         {finish<float, true>, finish<Half, true>, finish<BFloat16, true>},
                                                         {finish<float, false>, finish<Half, false>, finish<BFloat16, false>}};

}  // namespace quire::cpu::avx512_amx
#endif
