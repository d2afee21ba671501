// What the products with quantized operands share: blocks on the vector kernels' tiles and on AMX's.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "cpu/isa/quantization_amx.h"
#include "cpu/isa/tables.h"
#include "cpu/rows.h"
#include "cpu/thread_pool.h"

namespace quire::cpu {

#if defined(__x86_64__)
namespace avx512_amx {
extern const QuantizationAmxKernels quantization_amx_kernels;
}
#endif

/// Null on a machine without AMX, where other paths are taken.
inline const QuantizationAmxKernels* amx_kernels() {
#if defined(__x86_64__)
  if (isa() == Isa::kAvx512Amx) return &avx512_amx::quantization_amx_kernels;
#endif
  return nullptr;
}

inline constexpr std::int64_t kBlockRows = 192;            // a multiple of every table's rows
inline constexpr std::int64_t kBlockColumns = 64;          // likewise of its columns
inline constexpr std::int64_t kBlockSteps = 256;  // of a panel that stays in the second-level cache, a column of it in the first
inline constexpr std::int64_t kChunkRows = 8 * kBlockRows;  // rows of x that are widened at a time
static_assert(kBlockColumns % kTileColumns == 0);

/// The left operand of tiles: [ceil(m / rows)][num_steps][rows], 4 bytes each; rows beyond the last are 0.
struct LeftOperand {
  const std::uint32_t* data;
  std::int64_t num_rows, num_steps;
};

/// c = a b by blocks. fill(tile, first step, number of steps, panel) writes [steps][16] words of the right operand; finish(row, first column,
/// number of columns, sums) takes sums of one row.
template <typename Fill, typename Finish>
void multiply_blocks(const LeftOperand& a, std::int64_t num_columns, bool is_int16, Fill&& fill, Finish&& finish) {
  const auto& kernels = quantized_matmul_kernels.active();
  const auto multiply = is_int16 ? kernels.multiply_int16 : kernels.multiply;
  const std::int64_t row_blocks = ceil_div(a.num_rows, kBlockRows), column_blocks = ceil_div(num_columns, kBlockColumns);
  parallel_for(row_blocks * column_blocks, 1, [&](std::int64_t begin, std::int64_t end) {
    std::vector<std::uint32_t> panel(count(kBlockSteps * kBlockColumns)), sums(count(kBlockRows * kBlockColumns));
    for (std::int64_t task = begin; task < end; ++task) {
      const std::int64_t first_row = task % row_blocks * kBlockRows, first_column = task / row_blocks * kBlockColumns;
      const std::int64_t rows = std::min(kBlockRows, a.num_rows - first_row), columns = std::min(kBlockColumns, num_columns - first_column);
      for (std::int64_t step = 0; step < a.num_steps; step += kBlockSteps) {
        const std::int64_t steps = std::min(kBlockSteps, a.num_steps - step), panel_words = steps * kTileColumns;
        for (std::int64_t tile = 0; tile < ceil_div(columns, kTileColumns); ++tile)
          fill(first_column / kTileColumns + tile, step, steps, panel.data() + tile * panel_words);
        for (std::int64_t row = 0; row < rows; row += kernels.rows) {
          const std::uint32_t* const left = a.data + ((first_row + row) * a.num_steps + step * kernels.rows);
          for (std::int64_t column = 0; column < columns; column += kernels.columns)
            multiply({sums.data() + row * kBlockColumns + column, left, panel.data() + column / kTileColumns * panel_words, kBlockColumns,
                      panel_words, steps, step > 0});
        }
      }
      for (std::int64_t row = 0; row < rows; ++row) finish(first_row + row, first_column, columns, sums.data() + row * kBlockColumns);
    }
  });
}

/// Fills the left operand: widened(row, line) gives the row's elements as words in line, num_steps of them.
template <typename F>
std::vector<std::uint32_t> pack_left(std::int64_t num_rows, std::int64_t num_steps, F&& widened) {
  const std::int64_t tile_rows = quantized_matmul_kernels.active().rows, num_tiles = ceil_div(num_rows, tile_rows);
  std::vector<std::uint32_t> result(count(num_tiles * tile_rows * num_steps));
  parallel_for(num_tiles, ceil_div(kGrainElements, tile_rows * num_steps), [&](std::int64_t begin, std::int64_t end) {
    std::vector<std::uint32_t> line(count(num_steps));
    for (std::int64_t row = begin * tile_rows; row < std::min(end * tile_rows, num_rows); ++row) {
      widened(row, line.data());
      std::uint32_t* const out = result.data() + row / tile_rows * tile_rows * num_steps + row % tile_rows;
      for (std::int64_t step = 0; step < num_steps; ++step) out[step * tile_rows] = line[count(step)];
    }
  });
  return result;
}

/// Words from a multiple of 64 bytes on, so that no row of a tile lies in two lines of the cache.
class AlignedWords {
 public:
  explicit AlignedWords(std::int64_t num_words) : storage_(count(num_words + 16)) {
    void* start = storage_.data();
    std::size_t space = storage_.size() * 4;
    data_ = static_cast<std::uint32_t*>(std::align(64, count(num_words) * 4, start, space));
  }
  std::uint32_t* data() const { return data_; }

 private:
  std::vector<std::uint32_t> storage_;
  std::uint32_t* data_;
};

inline constexpr std::int64_t kAmxBlockRows = 512, kAmxFewRows = 128;

/// Blocks of rows and columns of a product on AMX, by threads: block(first row, rows, first column, columns, panel, sums), where panel has
/// room for kAmxSteps tiles of each of the columns' panels.
template <typename F>
void for_amx_blocks(std::int64_t num_rows, std::int64_t num_columns, F&& block) {
  const std::int64_t column_blocks = ceil_div(num_columns, std::int64_t{kAmxColumns});
  // A panel is filled again for each block of rows, so these are long unless threads would have nothing to do.
  const std::int64_t most = column_blocks * ceil_div(num_rows, kAmxBlockRows) >= 2 * num_threads() ? kAmxBlockRows : kAmxFewRows;
  const std::int64_t row_blocks = ceil_div(num_rows, most);
  parallel_for(row_blocks * column_blocks, 1, [&](std::int64_t begin, std::int64_t end) {
    const AlignedWords panel(kAmxSteps * kAmxTile * kAmxColumns);
    const AlignedWords sums(ceil_div(std::min(most, num_rows), std::int64_t{kAmxTile}) * kAmxTile * kAmxColumns);
    for (std::int64_t task = begin; task < end; ++task) {
      const std::int64_t row = task % row_blocks * most, column = task / row_blocks * kAmxColumns;
      block(row, std::min(most, num_rows - row), column, std::min<std::int64_t>(kAmxColumns, num_columns - column), panel.data(),
            sums.data());
    }
  });
}

/// bias as float32; empty for none.
inline std::vector<float> widened_bias(const void* bias, DType dtype, std::int64_t n) {
  std::vector<float> result;
  if (bias == nullptr) return result;
  result.resize(count(n));
  quantized_matmul_kernels.active().widen[index(dtype)](result.data(), bias, n);
  return result;
}

}  // namespace quire::cpu
