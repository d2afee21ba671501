// How quantized_matmul divides its work for the kernel on mma.sync.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "cuda/device_code.h"
#include "cuda/quantization/w4a16_launch.h"
#include "quire/error.h"

namespace quire::cuda::w4a16 {

namespace {

int warps_of(int tiles) { return tiles == 8 ? 8 : 16; }

}  // namespace

MmaChoice make_mma_choice(std::int64_t num_tokens, const Layout& layout, int tiles, int row_warps_log2, int chunk_steps, int num_ctas) {
  MmaChoice choice;
  const int column_warps = warps_of(tiles) >> row_warps_log2;
  choice.tiles = tiles;
  choice.row_warps_log2 = row_warps_log2;
  choice.num_chunks = static_cast<int>(ceil_div(layout.num_steps, chunk_steps));
  choice.chunk_steps = static_cast<int>(round_up(ceil_div(layout.num_steps, choice.num_chunks), column_warps));
  choice.num_chunks = static_cast<int>(ceil_div(layout.num_steps, choice.chunk_steps));
  const std::int64_t strip_rows = std::int64_t{kMmaUnits * kUnitRows} << row_warps_log2;
  choice.num_strips = static_cast<int>(ceil_div(layout.num_blocks * kBlockRows, strip_rows));
  choice.num_ctas = std::min(num_ctas, choice.num_strips * choice.num_chunks);
  choice.num_token_blocks = ceil_div(num_tokens, 8 * tiles);
  if (choice.num_chunks > 1) {
    const std::int64_t bytes = std::int64_t{choice.num_ctas} * 2 * strip_rows * 8 * tiles * 4;  // of a block
    choice.num_token_blocks = std::min(choice.num_token_blocks, std::max(kMaxPartialBytes / bytes, std::int64_t{1}));
    choice.partial_bytes = choice.num_token_blocks * bytes;
    choice.arrival_bytes = choice.num_token_blocks * choice.num_strips * 8;
  }
  return choice;
}

namespace {

template <int kBits>
int shared_bytes(const MmaPlan& plan, int tiles) {
  switch (tiles) {
    case 1: return mma_shared_bytes<MmaShape<kBits, 1>>(plan);
    case 2: return mma_shared_bytes<MmaShape<kBits, 2>>(plan);
    case 4: return mma_shared_bytes<MmaShape<kBits, 4>>(plan);
    default: return mma_shared_bytes<MmaShape<kBits, 8>>(plan);
  }
}

/// Stages of a ring that there may be.
template <int kBits>
int max_stages(int tiles) {
  return tiles == 1   ? MmaShape<kBits, 1>::kStages
         : tiles == 2 ? MmaShape<kBits, 2>::kStages
         : tiles == 4 ? MmaShape<kBits, 4>::kStages
                      : MmaShape<kBits, 8>::kStages;
}

/// Ways to divide the work for so many tokens in a CTA, by a model of its time in cycles of an SM; constants and limits are from sweeps. num_ctas is 0
/// if shared memory has no room.
MmaChoice choose_mma_of(std::int64_t num_tokens, const Layout& layout, int tiles, int tokens, int num_stages, int num_sms,
                        int max_shared_bytes) {
  MmaPlan plan;
  plan.layout = layout;
  plan.num_tokens = tokens;
  plan.num_stages = num_stages;
  plan.stage_bytes = kMmaUnits * (unit_bytes(layout.bits) + 8 * layout.entry_bytes * (layout.group_size == 32 ? 2 : 1));
  plan.chunk_steps = 0;
  const bool streams_x = tiles > 1;
  MmaChoice best;
  double best_cycles = 0.0;
  for (int row_warps_log2 = streams_x ? 1 : 0; row_warps_log2 <= 4 && 1 << row_warps_log2 <= warps_of(tiles); ++row_warps_log2) {
    plan.row_warps_log2 = row_warps_log2;
    const int column_warps = warps_of(tiles) >> row_warps_log2;
    // One tile: what rings and sums leave is for columns of x, of one chunk or of two.
    const int left = max_shared_bytes - (layout.bits == 4 ? shared_bytes<4>(plan, tiles) : shared_bytes<8>(plan, tiles));
    if (streams_x && left < 0) continue;
    const auto steps_in = [&](int bytes) { return (bytes / tokens - 16) / (kUnitColumns * 2); };
    for (int parts = 1; parts <= (streams_x ? 64 : 8); parts *= 2) {
      int steps = static_cast<int>(round_up(ceil_div(layout.num_steps, parts), column_warps));
      if (!streams_x) {
        const int x_bytes = left + 16 * tokens, limit = steps_in(steps >= layout.num_steps ? x_bytes : x_bytes / 2);
        if (steps > limit) steps = steps_in(x_bytes / 2) / column_warps * column_warps;
        if (steps <= 0) continue;
      }
      MmaChoice choice = make_mma_choice(num_tokens, layout, tiles, row_warps_log2, steps, num_sms);
      choice.num_stages = num_stages;
      const auto tasks = static_cast<double>(ceil_div(choice.num_strips * choice.num_chunks, choice.num_ctas));
      const double strip_rows = kMmaUnits * kUnitRows << row_warps_log2, columns = choice.chunk_steps * kUnitColumns;
      const double sums = strip_rows * tokens;
      const double code_bytes = tasks * strip_rows * columns * layout.bits / 8;
      const double all_x_bytes = 2.0 * tokens * columns * (streams_x || choice.num_chunks > 1 ? tasks : 1.0);
      const double flushes = tasks / choice.num_chunks + (choice.num_chunks > 1 ? 1.0 : 0.0);
      double cycles = std::max({code_bytes / 18.0, (code_bytes + all_x_bytes) / 36.0, tasks * strip_rows * columns * 8 * tiles / 1200.0});
      if (streams_x) {
        const double units = tasks * strip_rows * columns / (kUnitRows * kUnitColumns);
        cycles = std::max(cycles, units * (40.0 + 6.0 * tiles)) + 150.0 * tasks;
      }
      cycles += flushes * (300.0 + sums * (column_warps + 4) / 256.0);
      if (choice.num_chunks > 1) cycles += 2500.0 + sums * 4 * choice.num_chunks / tasks / 36.0;
      if (best.num_ctas == 0 || cycles < best_cycles) {
        best = choice;
        best_cycles = cycles;
      }
    }
  }
  return best;
}

}  // namespace

MmaChoice choose_mma(std::int64_t num_tokens, const Layout& layout, int num_sms, int max_shared_bytes, bool batch_invariant) {
  const bool is_float = layout.scale_dtype == DType::kFloat32;  // two kernels only
  int tiles = batch_invariant ? 4 : num_tokens <= 8 ? 1 : num_tokens <= 16 ? 2 : num_tokens <= 32 ? 4 : 8;
  if (is_float) tiles = tiles <= 2 ? 1 : 8;
  while (true) {
    const auto tokens = static_cast<int>(batch_invariant ? 8 * tiles : std::min<std::int64_t>(num_tokens, 8 * tiles));
    for (const int num_stages : {layout.bits == 4 ? max_stages<4>(tiles) : max_stages<8>(tiles), 2}) {
      const MmaChoice choice = choose_mma_of(num_tokens, layout, tiles, tokens, num_stages, num_sms, max_shared_bytes);
      if (choice.num_ctas > 0) return choice;
    }
    if (tiles == 1) throw UnsupportedError("[quantized_matmul] device: expected 99 KiB of shared memory for a CTA, got less");
    tiles = is_float ? 1 : tiles / 2;
  }
}

void run_mma(const QuantizedMatmulParams& params, const MmaChoice& choice, Stream stream) {
  const WeightFormat& format = params.weight.format;
  const Columns columns = order_columns(params, stream);
  MmaPlan plan;
  set_operands(plan, params, columns, choice);  // out and num_tokens become those of a slice below
  plan.x_stride = columns.stride;
  plan.x_alignment = columns.alignment;
  plan.num_columns = static_cast<int>(format.num_rows);
  plan.num_tasks = choice.num_strips * choice.num_chunks;
  plan.num_ctas = choice.num_ctas;
  plan.num_chunks = choice.num_chunks;
  plan.chunk_steps = choice.chunk_steps;
  plan.row_warps_log2 = choice.row_warps_log2;
  plan.num_stages = choice.num_stages;
  plan.group_shift = plan.layout.group_shift();
  plan.waits = params.weight.permutation != nullptr && has_dependent_launch_code();
  const std::int64_t slice_tokens = choice.num_token_blocks * 8 * choice.tiles;
  for (std::int64_t first = 0; first < params.num_tokens; first += slice_tokens) {
    plan.num_tokens = std::min(params.num_tokens - first, slice_tokens);
    plan.x = static_cast<const std::uint16_t*>(columns.x) + first * columns.stride;
    plan.out = static_cast<std::uint16_t*>(params.out) + first * params.out_stride;
    params.dtype == DType::kBFloat16 ? launch_mma<true>(plan, choice.tiles, stream) : launch_mma<false>(plan, choice.tiles, stream);
  }
}

}  // namespace quire::cuda::w4a16
