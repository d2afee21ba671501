// How a packed weight lies in memory on the CPU, and reading its tiles.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "core/layout.h"
#include "cpu/isa/tables.h"
#include "ops/quantization.h"

namespace quire::cpu {

/// Three parts, each from a multiple of 64 bytes on, by tiles of 16 output features:
///   codes   uint32 [tiles][steps][16]: a word has 8 codes of 4 bits, or 4 of 8, of neighbouring rows, the lowest bits first
///   scales  [tiles][groups][16], of the checkpoint's dtype
///   zeros   uint8 [tiles][groups][16]
/// Features beyond the last have scale 0, rows beyond the last the code of 0.
struct PackedLayout {
  explicit PackedLayout(const WeightFormat& f)
      : codes_per_word(32 / f.stored_bits()),
        num_tiles(ceil_div(f.out_features, kTileColumns)),
        num_steps(ceil_div(f.num_rows, codes_per_word)),
        num_groups(f.num_groups()),
        tile_words(num_steps * kTileColumns),
        tile_scales(num_groups * kTileColumns),
        scales_at(num_tiles * tile_words * 4),
        zeros_at(scales_at + ceil_div(num_tiles * tile_scales * itemsize(f.scale_dtype), 64) * 64),
        num_bytes(zeros_at + (f.has_zeros ? num_tiles * tile_scales : 0)) {}

  int codes_per_word;
  std::int64_t num_tiles, num_steps, num_groups;
  std::int64_t tile_words, tile_scales;  // of one tile
  std::int64_t scales_at, zeros_at, num_bytes;

  const std::uint32_t* words(const void* data, std::int64_t tile) const {
    return static_cast<const std::uint32_t*>(data) + tile * tile_words;
  }
};

/// Scales and zeros of a tile as float32 [num_groups][16].
void read_tile(const PackedLayout& layout, const PackedParams& w, std::int64_t tile, float* scales, float* zeros);

/// panel[row - first][16] = w of rows [step * codes_per_word, ...) of a tile; steps are cut where groups end.
void unpack_rows(const PackedLayout& layout, const WeightFormat& f, const std::uint32_t* words, const float* scales, const float* zeros,
                 std::int64_t first_step, std::int64_t num_steps, float* panel);

}  // namespace quire::cpu
