// How quantized_matmul divides its work for the kernel on mma.sync.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <array>
#include <utility>

#include "cuda/device_code.h"
#include "cuda/quantization/w4a16_launch.h"
#include "quire/error.h"

namespace quire::cuda::w4a16 {

namespace {

int warps_of(int tiles) { return tiles == 8 ? 8 : 16; }

/// How many tokens are worked on at a time.
void set_token_blocks(MmaChoice& choice, std::int64_t num_tokens) {
  choice.num_token_blocks = ceil_div(num_tokens, 8 * choice.tiles);
  if (choice.num_chunks == 1) return;
  const std::int64_t strip_rows = std::int64_t{kMmaUnits * kUnitRows} << choice.row_warps_log2;
  const std::int64_t bytes = std::int64_t{choice.num_ctas} * 2 * strip_rows * 8 * choice.tiles * 4;  // of a block
  choice.num_token_blocks = std::min(choice.num_token_blocks, std::max(kMaxPartialBytes / bytes, std::int64_t{1}));
  choice.partial_bytes = choice.num_token_blocks * bytes;
  choice.arrival_bytes = choice.num_token_blocks * choice.num_strips * 8;
}

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
  set_token_blocks(choice, num_tokens);
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

/// A way to divide the work, and a model of its time in cycles of an SM, whose constants are from sweeps (H100).
struct Timed {
  MmaChoice choice;  // num_ctas is 0 if shared memory has no room
  double cycles = 0.0;
};

/// The best of those for tiles of 8 * tiles tokens, if so many blocks of tokens are worked on.
Timed choose_mma_of(std::int64_t num_tokens, std::int64_t num_blocks, const Layout& layout, int tiles, int num_stages, int num_sms,
                    int max_shared_bytes) {
  const auto tokens = static_cast<int>(std::min<std::int64_t>(num_tokens, 8 * tiles));
  MmaPlan plan;
  plan.layout = layout;
  plan.num_tokens = tokens;
  plan.num_stages = num_stages;
  plan.stage_bytes = kMmaUnits * (unit_bytes(layout.bits) + 8 * layout.entry_bytes * (layout.group_size == 32 ? 2 : 1));
  plan.chunk_steps = 0;
  const bool streams_x = tiles > 1;
  Timed best;
  for (int row_warps_log2 = streams_x ? 1 : 0; row_warps_log2 <= 4 && 1 << row_warps_log2 <= warps_of(tiles); ++row_warps_log2) {
    plan.row_warps_log2 = row_warps_log2;
    const int column_warps = warps_of(tiles) >> row_warps_log2;
    // One tile: what rings and sums leave is for columns of x, of one chunk or of two.
    const int left = max_shared_bytes - kMmaStaticBytes - (layout.bits == 4 ? shared_bytes<4>(plan, tiles) : shared_bytes<8>(plan, tiles));
    if (streams_x && left < 0) continue;
    const auto steps_in = [&](int bytes) { return (bytes / tokens - 16) / (kUnitColumns * 2); };
    for (int parts = 1; parts <= 32; parts *= 2) {
      int steps = static_cast<int>(round_up(ceil_div(layout.num_steps, parts), column_warps));
      if (!streams_x) {
        const int x_bytes = left + 16 * tokens, limit = steps_in(steps >= layout.num_steps ? x_bytes : x_bytes / 2);
        if (steps > limit) steps = steps_in(x_bytes / 2) / column_warps * column_warps;
        if (steps <= 0) continue;
      }
      Timed timed{make_mma_choice(num_tokens, layout, tiles, row_warps_log2, steps, num_sms)};
      MmaChoice& choice = timed.choice;
      choice.num_stages = num_stages;
      // A unit takes what its fragments and products do, or what it takes to read it.
      const double unit_cycles = std::max(30.0 + 12.0 * tiles, unit_bytes(layout.bits) / 11.0) * (num_stages == 2 ? 1.4 : 1.0);
      const auto tasks = static_cast<double>(ceil_div(choice.num_strips * choice.num_chunks, choice.num_ctas));
      const double task_units = static_cast<double>(kMmaUnits << row_warps_log2) * choice.chunk_steps;
      const double sums = static_cast<double>(kMmaUnits * kUnitRows << row_warps_log2) * tokens;
      timed.cycles = (streams_x ? 9000.0 : 7500.0) + tasks * (task_units * unit_cycles + 100.0) +
                     0.7 * sums * std::max(tasks / choice.num_chunks, 1.0);
      if (choice.num_chunks > 1) timed.cycles += 12000.0 + 4.0 * sums;  // sums change hands
      timed.cycles *= static_cast<double>(ceil_div(num_blocks * choice.num_ctas, num_sms));
      if (best.choice.num_ctas == 0 || timed.cycles < best.cycles) best = timed;
      if (steps == column_warps) break;
    }
  }
  return best;
}

/// All that a choice depends on.
struct Question {
  std::int64_t num_tokens = 0, num_row_blocks = 0;
  int num_steps = 0, group_size = 0, bits = 0, entry_bytes = 0, num_sms = 0, max_shared_bytes = 0;
  DType scale_dtype = DType::kFloat16;
  bool batch_invariant = false;

  bool operator==(const Question&) const = default;
};

MmaChoice choose(std::int64_t num_tokens, const Layout& layout, int num_sms, int max_shared_bytes, bool batch_invariant) {
  const bool is_float = layout.scale_dtype == DType::kFloat32;  // two kernels only
  const auto with_tiles = [&](int tiles, std::int64_t tokens) {
    Timed best;
    for (const int num_stages : {layout.bits == 4 ? max_stages<4>(tiles) : max_stages<8>(tiles), 2}) {
      best = choose_mma_of(tokens, ceil_div(tokens, 8 * tiles), layout, tiles, num_stages, num_sms, max_shared_bytes);
      if (best.choice.num_ctas > 0) break;
    }
    return best;
  };
  Timed best;
  if (batch_invariant) {
    // A row's sums are added up in one order, whatever the number of tokens: the choice is that of one tile.
    for (int tiles = is_float ? 8 : 4; tiles > 0 && best.choice.num_ctas == 0; tiles = is_float ? tiles / 8 : tiles / 2)
      best = with_tiles(tiles, 8 * tiles);
    if (best.choice.num_ctas > 0) set_token_blocks(best.choice, num_tokens);
  } else {
    for (const int tiles : {1, 2, 4, 8}) {
      if (is_float && tiles != 1 && tiles != 8) continue;
      if (tiles > 1 && num_tokens <= (is_float ? 16 : 4 * tiles)) continue;
      const Timed timed = with_tiles(tiles, num_tokens);
      if (timed.choice.num_ctas > 0 && (best.choice.num_ctas == 0 || timed.cycles < best.cycles)) best = timed;
    }
  }
  if (best.choice.num_ctas == 0) throw UnsupportedError("[quantized_matmul] device: expected 99 KiB of shared memory for a CTA, got less");
  return best.choice;
}

}  // namespace

MmaChoice choose_mma(std::int64_t num_tokens, const Layout& layout, int num_sms, int max_shared_bytes, bool batch_invariant) {
  // Every call asks, for its workspace too, and mostly what was asked lately.
  constexpr std::size_t kNumRecent = 32;
  thread_local std::array<std::pair<Question, MmaChoice>, kNumRecent> recents;
  const Question question{num_tokens,         layout.num_blocks, layout.num_steps, layout.group_size,  layout.bits,
                          layout.entry_bytes, num_sms,           max_shared_bytes, layout.scale_dtype, batch_invariant};
  auto& [asked, choice] = recents[static_cast<std::size_t>(num_tokens + 5 * layout.num_blocks + 3 * layout.num_steps) % kNumRecent];
  if (asked != question) {
    choice = choose(num_tokens, layout, num_sms, max_shared_bytes, batch_invariant);
    asked = question;
  }
  return choice;
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
