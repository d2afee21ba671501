// How quantized_matmul divides its work for the kernel on wgmma for few tokens.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "cuda/quantization/w4a16_launch.h"
#include "cuda/quantization/w4a16_maps.h"

namespace quire::cuda::w4a16 {

namespace {

/// What a helper loses with each tile whose sums it hands over, in stages.
constexpr double kStagesToHandOver = 1.5;
constexpr int kMinCutStages = 5;

/// x [num_tokens, num_columns], whose columns are whole panels of 64, read in boxes of box_panels panels of box_tokens tokens, with the 128-byte
/// swizzle.
CUtensorMap make_panel_map(const void* x, std::int64_t num_tokens, std::int64_t num_columns, std::int64_t stride, int box_tokens,
                           int box_panels) {
  const auto panels = static_cast<cuuint64_t>(num_columns / kUnitColumns);
  const cuuint64_t sizes[4] = {kUnitColumns, static_cast<cuuint64_t>(num_tokens), panels, 1};
  const cuuint64_t row = num_tokens > 1 ? static_cast<cuuint64_t>(stride) * 2 : kUnitColumns * 2;
  const cuuint64_t strides[3] = {row, kUnitColumns * 2, panels * kUnitColumns * 2};
  const cuuint32_t box[4] = {kUnitColumns, static_cast<cuuint32_t>(box_tokens), static_cast<cuuint32_t>(box_panels), 1},
                   steps[4] = {1, 1, 1, 1};
  CUtensorMap map;
  check_tensor_map(encode_tensor_map()(&map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 4, const_cast<void*>(x), sizes, strides, box, steps,
                                       CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                                       CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE));
  return map;
}

/// By how many bits a number of 32 columns is shifted to that of its group.
int few_group_shift(const Layout& layout) {
  return layout.group_size == 0 ? 31 : layout.group_size == 128 ? 2 : layout.group_size == 64 ? 1 : 0;
}
/// Groups in so many steps, which are an even number.
int few_stage_groups(const Layout& layout, int steps) { return std::max(1, 2 * steps >> few_group_shift(layout)); }

}  // namespace

FewChoice make_few_choice(std::int64_t num_tokens, const Layout& layout, int source_columns, int row_groups_log2, int cluster_ctas,
                          int cut_stages, int num_sms) {
  FewChoice choice;
  choice.tokens = num_tokens == 1 ? 1 : num_tokens <= 8 ? 8 : num_tokens <= 16 ? 16 : num_tokens <= 32 ? 32 : 64;
  choice.row_groups_log2 = row_groups_log2;
  choice.cluster_ctas = cluster_ctas;
  const int row_groups = 1 << row_groups_log2, stage_steps = kFewStageUnits >> row_groups_log2;
  choice.num_tiles = static_cast<int>(ceil_div(layout.num_blocks, row_groups));
  choice.num_ctas = cluster_ctas > 1 ? choice.num_tiles * cluster_ctas : std::min(choice.num_tiles, num_sms);
  choice.chunk_steps = static_cast<int>(ceil_div(layout.num_steps, cluster_ctas * stage_steps)) * stage_steps;
  const int num_entries = row_groups * kBlockUnits * 8 * few_stage_groups(layout, stage_steps);
  const int x_bytes = num_tokens == 1 ? 0 : stage_steps * static_cast<int>(round_up(num_tokens, 8)) * kUnitColumns * 2;
  choice.stage_bytes =
      static_cast<int>(round_up(x_bytes + kFewStageUnits * kBlockUnits * unit_bytes(layout.bits) + num_entries * layout.entry_bytes, 1024));

  // Tiles of the last round may be cut, where that leaves SMs without work.
  const int tile_stages = choice.chunk_steps / stage_steps;
  const int rounds = static_cast<int>(ceil_div(choice.num_tiles, choice.num_ctas));
  double num_stages = static_cast<double>(tile_stages) * (cluster_ctas > 1 ? 1 : rounds), handed_over = 0.0;
  choice.first_cut = choice.num_tiles;
  if (cut_stages > 0) {
    const int owners = static_cast<int>(ceil_div(choice.num_tiles, rounds));
    if (cluster_ctas > 1 || owners >= num_sms || cut_stages >= tile_stages) return FewChoice{};
    choice.num_helpers = num_sms - owners;
    choice.num_ctas = num_sms;
    choice.first_cut = (rounds - 1) * owners;
    choice.cut_step = (tile_stages - cut_stages) * stage_steps;
    const int num_cut = choice.num_tiles - choice.first_cut;
    handed_over = static_cast<double>(ceil_div(num_cut, choice.num_helpers));
    num_stages = std::max(num_stages - cut_stages, handed_over * (cut_stages + kStagesToHandOver));
    choice.partial_bytes = std::int64_t{num_cut} * row_groups * kBlockRows * round_up(num_tokens, 8) * 4;
    choice.arrival_bytes = std::int64_t{num_cut} * 8;
  }

  const int one_x_bytes = num_tokens == 1 ? few_x_bytes(choice.chunk_steps) : 0;
  const int one_bytes = one_x_bytes + static_cast<int>(round_up(source_columns, 8)) * 2;
  const int sum_bytes = few_sum_bytes(static_cast<int>(num_tokens), row_groups_log2, cluster_ctas),
            room = 227 * 1024 - kFewFixedBytes - one_bytes;
  const int most = std::clamp(static_cast<int>(num_stages), 2, kFewMaxStages);
  choice.num_stages = std::min(most, (room - sum_bytes) / choice.stage_bytes);
  choice.sums_at = choice.num_stages * choice.stage_bytes;
  // Sums may lie where the stages of a CTA with one tile did. CTAs of a cluster wait for each other for that.
  const bool once = choice.num_tiles * cluster_ctas == choice.num_ctas;
  if (sum_bytes > 0 && once && (cluster_ctas == 1 || choice.num_stages < std::min(most, 3))) {
    choice.num_stages = std::min(most, room / choice.stage_bytes);
    choice.sums_at = 0;
  }
  if (choice.num_stages < 2 || sum_bytes > room) return FewChoice{};
  const int stages_bytes = choice.num_stages * choice.stage_bytes;
  choice.x_at = static_cast<int>(round_up(std::max(stages_bytes, choice.sums_at + sum_bytes), 128));
  choice.source_at = choice.x_at + one_x_bytes;
  choice.shared_bytes = kFewFixedBytes + choice.x_at + one_bytes;

  // Cycles of an SM, by what is the narrowest: making fragments and their products, what an SM reads, what all read of the L2 cache, and of memory.
  const int waves = static_cast<int>(ceil_div(choice.num_tiles, max_clusters(cluster_ctas)));
  const double code_bytes = kFewStageUnits * kBlockUnits * unit_bytes(layout.bits), read_bytes = x_bytes + 1.06 * code_bytes;
  const double stages = num_stages * (cluster_ctas > 1 ? waves : 1);
  const double all_stages = static_cast<double>(tile_stages) * choice.num_tiles * cluster_ctas;
  const double product = choice.tokens <= 8 ? 880.0 : choice.tokens == 16 ? 960.0 : choice.tokens == 32 ? 1100.0 : 1600.0;
  const double waits = choice.num_stages == 2 ? 1.45 : 1.0;  // a ring of two waits for most of its copies
  choice.cycles = std::max({stages * product * waits, stages * read_bytes * waits / 37.0, all_stages * read_bytes / (34.0 * num_sms),
                            all_stages * code_bytes / (16.0 * num_sms)}) +
                  3500.0 + (sum_bytes > 0 ? 300.0 : 0.0) + (cluster_ctas > 1 ? 300.0 + 2500.0 * (waves - 1) : 0.0) +
                  (cluster_ctas > 1 && choice.sums_at == 0 ? 700.0 : 0.0) + (cut_stages > 0 ? 600.0 : 0.0);
  return choice;
}

FewChoice choose_few(std::int64_t num_tokens, const Layout& layout, int source_columns, int num_sms) {
  FewChoice best;
  for (int row_groups_log2 = 0; row_groups_log2 <= 2; ++row_groups_log2) {
    for (int cluster_ctas = 1; cluster_ctas <= 6; ++cluster_ctas) {
      // Helpers are done as early as the others, or a little earlier.
      int most_cut = 0;
      if (cluster_ctas == 1) {
        const std::int64_t num_tiles = ceil_div(layout.num_blocks, 1 << row_groups_log2), rounds = ceil_div(num_tiles, num_sms);
        const std::int64_t owners = ceil_div(num_tiles, rounds),
                           tile_stages = ceil_div(layout.num_steps, kFewStageUnits >> row_groups_log2);
        if (owners < num_sms) {
          const std::int64_t tiles_of_helper = ceil_div(num_tiles - (rounds - 1) * owners, num_sms - owners);
          const double even = (static_cast<double>(rounds * tile_stages) - kStagesToHandOver * static_cast<double>(tiles_of_helper)) /
                              static_cast<double>(tiles_of_helper + 1);
          most_cut = std::clamp(static_cast<int>(even + 1.0), 0, static_cast<int>(tile_stages) - 1);
          // One tile for each helper is a cluster's, and short parts cost more than they save.
          if (tiles_of_helper == 1 || most_cut < kMinCutStages) most_cut = 0;
        }
      }
      for (const int cut_stages : {0, most_cut - 1, most_cut}) {
        if (cut_stages < 0) continue;
        const FewChoice choice = make_few_choice(num_tokens, layout, source_columns, row_groups_log2, cluster_ctas, cut_stages, num_sms);
        // Every CTA has work.
        const std::int64_t before_last = std::int64_t{choice.chunk_steps} * (cluster_ctas - 1);
        if (choice.num_ctas == 0 || (cluster_ctas > 1 && before_last >= layout.num_steps)) continue;
        if (best.num_ctas == 0 || choice.cycles < best.cycles) best = choice;
      }
    }
  }
  return best;
}

int few_source_columns(std::int64_t num_tokens, const WeightFormat& format, bool has_permutation) {
  return num_tokens == 1 && has_permutation ? static_cast<int>(format.in_features) : 0;
}

void run_few(const QuantizedMatmulParams& params, const FewChoice& choice, Stream stream) {
  const WeightFormat& format = params.weight.format;
  const bool one = params.num_tokens == 1;
  const Columns columns = one ? Columns{params.x, 0, 2, static_cast<std::uint8_t*>(params.workspace)} : order_columns(params, stream);
  FewPlan plan;
  plan.x = params.x;
  plan.permutation = params.weight.permutation;
  plan.num_columns = static_cast<int>(format.num_rows);
  plan.num_source_columns = static_cast<int>(format.in_features);
  plan.x_at = choice.x_at;
  plan.source_at = choice.source_at;
  set_operands(plan, params, columns, choice);
  plan.row_groups_log2 = choice.row_groups_log2;
  plan.num_tiles = choice.num_tiles;
  plan.cluster_ctas = choice.cluster_ctas;
  plan.chunk_steps = choice.chunk_steps;
  plan.num_helpers = choice.num_helpers;
  plan.first_cut = choice.first_cut;
  plan.cut_step = choice.cut_step;
  plan.num_stages = choice.num_stages;
  plan.stage_bytes = choice.stage_bytes;
  const int token_rows = static_cast<int>(round_up(params.num_tokens, 8));
  plan.panel_bytes = token_rows * kUnitColumns * 2;
  const Layout& layout = plan.layout;
  const int row_groups = 1 << choice.row_groups_log2, stage_steps = kFewStageUnits >> choice.row_groups_log2;
  plan.num_stage_groups = few_stage_groups(layout, stage_steps);
  plan.group_shift = few_group_shift(layout);
  plan.sums_at = choice.sums_at;
  plan.stores_vectors = is_aligned(params.out, 16) && keeps_alignment(params.num_tokens, params.out_stride, 2, 16);
  plan.waits = params.weight.permutation != nullptr && !one;
  FewMaps maps{};
  const std::int64_t rows_of_step = kBlockUnits * unit_bytes(layout.bits) / kCodeRowBytes;
  if (!one) maps.x = make_panel_map(columns.x, params.num_tokens, format.num_rows, columns.stride, token_rows, stage_steps);
  maps.codes = make_word_map(layout.codes, kCodeRowBytes, layout.num_steps * rows_of_step, layout.num_blocks,
                             static_cast<int>(stage_steps * rows_of_step), row_groups);
  maps.entries = make_word_map(layout.scales, kBlockUnits * 8 * layout.entry_bytes, layout.num_groups, layout.num_blocks,
                               plan.num_stage_groups, row_groups);
  params.dtype == DType::kBFloat16 ? launch_few<true>(plan, maps, choice.tokens, choice.num_ctas, choice.shared_bytes, stream)
                                   : launch_few<false>(plan, maps, choice.tokens, choice.num_ctas, choice.shared_bytes, stream);
}

}  // namespace quire::cuda::w4a16
