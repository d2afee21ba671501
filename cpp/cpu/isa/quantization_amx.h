// Kernels of products with quantized operands on AMX tiles: 16 rows of 16 words of 4 bytes, four int8 or two bfloat16 each.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace quire::cpu {

inline constexpr int kAmxTile = 16;                         // rows of a tile, and words of a row
inline constexpr int kAmxTileWords = kAmxTile * kAmxTile;
inline constexpr int kAmxColumns = 4 * kAmxTile;            // of a block
/// Tiles along k of a block: two panels of the right operand stay in the first-level cache.
inline constexpr std::int64_t kAmxSteps = 16;

/// sums[16 * num_row_tiles][kAmxColumns] (+)= a times b, for up to kAmxSteps tiles along k. All pointers are 64-byte aligned.
struct AmxBlock {
  void* sums;              // int32 or float32
  const std::uint32_t* a;  // [num_row_tiles] tiles of rows, a_stride words apart, each [num_steps][16][16]
  const std::uint32_t* b;  // [kAmxColumns / 16] panels, panel_stride words apart, each [num_steps][16][16]
  std::int64_t num_row_tiles, a_stride, panel_stride, num_steps;
  bool accumulates;  // false: sums is overwritten
};

/// Results of `rows` rows of a block: out = (sums - zero_point * column_sums) * scale_a * scale_b + bias.
struct AmxFinish {
  void* out;
  const void* sums;                 // int32 or float32 [rows][kAmxColumns]
  const float* bias;                // [columns] or null
  const float* scale_a;             // of int32 only, like the rest
  const float* scale_b;             // [columns]
  const std::int32_t* zero_point;   // or null
  const std::int32_t* column_sums;  // [columns]
  std::int64_t out_stride, scale_a_stride, zero_point_stride, rows, columns;
};

struct QuantizationAmxKernels {
  /// int8 in int32, bfloat16 in float32.
  void (*multiply_int8)(const AmxBlock& block);
  void (*multiply_bfloat16)(const AmxBlock& block);
  /// Rows of int8, k bytes each, as one tile of rows: [ceil(k / 64)][16][16] words, 0 beyond num_rows and k.
  void (*pack_rows_int8)(std::uint32_t* out, const std::int8_t* rows, std::int64_t stride, std::int64_t num_rows, std::int64_t k);
  /// The same rows as a panel of columns.
  void (*pack_columns_int8)(std::uint32_t* out, const std::int8_t* rows, std::int64_t stride, std::int64_t num_rows, std::int64_t k);
  /// Packed weights of 16 output features as a panel of bfloat16, by stored bits: words [num_words][16] that share scales and zeros [16].
  /// A pair is elements i and i + 16 / bits of a word's.
  void (*unpack[2])(std::uint32_t* panel, const std::uint32_t* words, std::int64_t num_words, const float* scales, const float* zeros);
  /// By float32, float16, bfloat16.
  void (*finish_int32[3])(const AmxFinish& finish);
  void (*finish_float32[3])(const AmxFinish& finish);
};

}  // namespace quire::cpu
