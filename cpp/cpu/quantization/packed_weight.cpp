// Packing weights on the CPU, reading their tiles, and undoing it.
// SPDX-License-Identifier: Apache-2.0
#include "cpu/quantization/packed_weight.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/rows.h"
#include "cpu/thread_pool.h"

namespace quire::cpu {

void read_tile(const PackedLayout& layout, const PackedParams& w, std::int64_t tile, float* scales, float* zeros) {
  const char* const data = static_cast<const char*>(w.data);
  const DType dtype = w.format.scale_dtype;
  quantized_matmul_kernels.active().widen[index(dtype)](scales, data + layout.scales_at + tile * layout.tile_scales * itemsize(dtype),
                                                        layout.tile_scales);
  if (w.format.has_zeros) {
    const auto* const stored = reinterpret_cast<const std::uint8_t*>(data + layout.zeros_at) + tile * layout.tile_scales;
    for (std::int64_t i = 0; i < layout.tile_scales; ++i) zeros[i] = static_cast<float>(stored[i]);
  } else {
    std::fill(zeros, zeros + layout.tile_scales, w.format.stored_bits() == 4 ? 8.0f : 128.0f);
  }
}

void unpack_rows(const PackedLayout& layout, const WeightFormat& f, const std::uint32_t* words, const float* scales, const float* zeros,
                 std::int64_t first_step, std::int64_t num_steps, float* panel) {
  const auto unpack = quantized_matmul_kernels.active().unpack[f.stored_bits() == 4 ? 0 : 1];
  const std::int64_t group_steps = f.group_size == 0 ? layout.num_steps : f.group_size / layout.codes_per_word;
  for (std::int64_t step = first_step; step < first_step + num_steps;) {
    const std::int64_t group = step / group_steps;
    const std::int64_t end = std::min((group + 1) * group_steps, first_step + num_steps);
    unpack(panel, {words + step * kTileColumns, scales + group * kTileColumns, zeros + group * kTileColumns, end - step});
    panel += (end - step) * layout.codes_per_word * kTileColumns;
    step = end;
  }
}

std::int64_t packed_weight_size(const WeightFormat& format) { return PackedLayout(format).num_bytes; }

void pack_weight(void* data, const WeightFormat& f, const WeightSource& source) {
  const PackedLayout layout(f);
  const int bits = f.stored_bits();
  const std::int64_t scale_bytes = itemsize(f.scale_dtype);
  char* const bytes = static_cast<char*>(data);
  parallel_for(layout.num_tiles, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t tile = begin; tile < end; ++tile) {
      const std::int64_t first = tile * kTileColumns, columns = std::min<std::int64_t>(kTileColumns, f.out_features - first);
      auto* const words = reinterpret_cast<std::uint32_t*>(bytes) + tile * layout.tile_words;
      std::memset(words, 0, count(layout.tile_words) * 4);
      for (std::int64_t step = 0; step < layout.num_steps; ++step)
        for (int c = 0; c < layout.codes_per_word; ++c)
          for (std::int64_t column = 0; column < columns; ++column)
            words[step * kTileColumns + column] |= source.code(step * layout.codes_per_word + c, first + column) << (c * bits);
      char* const scales = bytes + layout.scales_at + tile * layout.tile_scales * scale_bytes;
      std::memset(scales, 0, count(layout.tile_scales * scale_bytes));
      auto* const zeros = reinterpret_cast<std::uint8_t*>(bytes + layout.zeros_at) + tile * layout.tile_scales;
      if (f.has_zeros) std::memset(zeros, 0, count(layout.tile_scales));
      for (std::int64_t group = 0; group < layout.num_groups; ++group)
        for (std::int64_t column = 0; column < columns; ++column) {
          const std::int64_t at = group * kTileColumns + column;
          std::memcpy(scales + at * scale_bytes,
                      static_cast<const char*>(source.scales) + source.scale_index(group, first + column) * scale_bytes,
                      count(scale_bytes));
          if (f.has_zeros) zeros[at] = static_cast<std::uint8_t>(source.zero(group, first + column));
        }
    }
  });
}

void dequantize_weight(void* out, DType dtype, std::int64_t out_stride, const PackedParams& w) {
  const PackedLayout layout(w.format);
  const auto& kernels = quantized_matmul_kernels.active();
  const std::int64_t num_rows = layout.num_steps * layout.codes_per_word, k = w.format.in_features;
  parallel_for(layout.num_tiles, 1, [&](std::int64_t begin, std::int64_t end) {
    std::vector<float> scales(count(layout.tile_scales)), zeros(scales.size()), panel(count(num_rows * kTileColumns)), line(count(k));
    for (std::int64_t tile = begin; tile < end; ++tile) {
      read_tile(layout, w, tile, scales.data(), zeros.data());
      unpack_rows(layout, w.format, layout.words(w.data, tile), scales.data(), zeros.data(), 0, layout.num_steps, panel.data());
      for (std::int64_t column = 0; column < std::min<std::int64_t>(kTileColumns, w.format.out_features - tile * kTileColumns); ++column) {
        // What no row is read from stays 0.
        std::fill(line.begin(), line.end(), 0.0f);
        for (std::int64_t row = 0; row < w.format.num_rows; ++row) {
          const std::int64_t feature = w.permutation == nullptr ? row : w.permutation[row];
          if (feature >= 0 && feature < k) line[count(feature)] = panel[count(row * kTileColumns + column)];
        }
        kernels.narrow[index(dtype)](advance(out, (tile * kTileColumns + column) * out_stride, dtype), line.data(), nullptr, k);
      }
    }
  });
}

}  // namespace quire::cpu
