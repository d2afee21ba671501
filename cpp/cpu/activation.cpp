// Activations on the CPU: tiles of rows over threads.
// SPDX-License-Identifier: Apache-2.0
#include "ops/activation.h"

#include <algorithm>
#include <vector>

#include "cpu/isa/tables.h"
#include "cpu/quantize_row.h"
#include "cpu/rows.h"
#include "cpu/thread_pool.h"

namespace quire::cpu {

namespace {

// Fewer elements than this are not worth waking a thread for.
constexpr std::int64_t kActivationGrain = 16384;
// Wide rows are cut so that a few of them fill all threads. A multiple of a cache line of any dtype.
constexpr std::int64_t kTileWidth = 4096;

// Row by row through a float32 row of each thread.
void activation_quantized(const ActivationParams& p) {
  const ActivationKernel kernel =
      activation_kernels.active().run_wide[static_cast<std::size_t>(p.activation)][static_cast<std::size_t>(p.dtype)];
  const std::int64_t item_bytes = itemsize(p.dtype), grain = ceil_div(kActivationGrain, p.width);
  const std::int64_t num_parts = std::min<std::int64_t>(num_threads(), ceil_div(p.num_rows, grain)),
                     rows_per_part = ceil_div(p.num_rows, num_parts);
  // Apart by a cache line or more: threads must not share one.
  constexpr std::int64_t kLine = 16;
  const std::int64_t scratch_floats = ceil_div(p.width, kLine) * kLine + kLine;
  std::vector<float> scratch(static_cast<std::size_t>(num_parts * scratch_floats));
  parallel_for(num_parts, 1, [&](std::int64_t begin, std::int64_t end) {
    float* const y = scratch.data() + begin * scratch_floats;
    for (std::int64_t row = begin * rows_per_part; row < std::min(end * rows_per_part, p.num_rows); ++row) {
      const char* const x = static_cast<const char*>(p.x) + p.x_rows.offset(row) * item_bytes;
      kernel({y, x, x + p.width * item_bytes, 0, 0, 1, p.width});
      quantize_row(p.quant, static_cast<char*>(p.out) + p.out_rows.offset(row), y, row, p.width);
    }
  });
}

}  // namespace

void activation(const ActivationParams& p) {
  if (p.quant.scales != nullptr) return activation_quantized(p);
  const ActivationKernel kernel =
      activation_kernels.active().run[static_cast<std::size_t>(p.activation)][static_cast<std::size_t>(p.dtype)];
  const std::int64_t item_bytes = itemsize(p.dtype);

  // Up to `num_rows` rows from `row` on, columns [column, column + width); returns how many rows share a stride and were done.
  const auto run = [&](std::int64_t row, std::int64_t num_rows, std::int64_t column, std::int64_t width) {
    const RowRun out = row_run(p.out_rows, row), x = row_run(p.x_rows, row);
    ActivationRows rows;
    rows.out = static_cast<char*>(p.out) + (p.out_rows.offset(row) + column) * item_bytes;
    rows.x = static_cast<const char*>(p.x) + (p.x_rows.offset(row) + column) * item_bytes;
    rows.up = p.gated ? static_cast<const char*>(rows.x) + p.width * item_bytes : nullptr;
    rows.out_stride = out.stride;
    rows.x_stride = x.stride;
    rows.num_rows = std::min({num_rows, out.num_rows, x.num_rows});
    rows.width = width;
    kernel(rows);
    return rows.num_rows;
  };

  if (p.width <= kTileWidth) {
    const auto run_rows = [&](std::int64_t begin, std::int64_t end) {
      while (begin < end) begin += run(begin, end - begin, 0, p.width);
    };
    if (p.num_rows * p.width < 2 * kActivationGrain)
      run_rows(0, p.num_rows);
    else
      parallel_for(p.num_rows, ceil_div(kActivationGrain, p.width), run_rows);
    return;
  }
  const std::int64_t tiles_per_row = ceil_div(p.width, kTileWidth);
  parallel_for(p.num_rows * tiles_per_row, kActivationGrain / kTileWidth, [&](std::int64_t begin, std::int64_t end) {
    while (begin < end) {
      const std::int64_t row = begin / tiles_per_row, tile = begin % tiles_per_row;
      const std::int64_t num_tiles = std::min(end - begin, tiles_per_row - tile);
      const std::int64_t column = tile * kTileWidth;
      run(row, 1, column, std::min(num_tiles * kTileWidth, p.width - column));
      begin += num_tiles;
    }
  });
}

}  // namespace quire::cpu
