// How quantized_matmul divides its work for the kernel on wgmma for many tokens.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "cuda/quantization/w4a16_launch.h"
#include "cuda/quantization/w4a16_maps.h"

namespace quire::cuda::w4a16 {

namespace {

/// Cycles that 64 columns of a tile take.
double step_cycles(int tokens, int num_ctas, int num_sms) { return (tokens == 256 ? 1140.0 : 730.0) * (0.8 + 0.2 * num_ctas / num_sms); }

}  // namespace

WgmmaChoice make_wgmma_choice(std::int64_t num_tokens, const Layout& layout, int tokens, int whole_rounds, int num_chunks, int num_sms) {
  WgmmaChoice choice;
  choice.tokens = tokens;
  choice.num_row_tiles = static_cast<int>(ceil_div(layout.num_blocks, kWgmmaWarpgroups));
  choice.num_token_tiles = static_cast<int>(ceil_div(num_tokens, tokens));
  choice.band_tiles = kBandTokens / tokens;
  const std::int64_t num_tiles = std::int64_t{choice.num_row_tiles} * choice.num_token_tiles;
  choice.whole_rounds = whole_rounds;
  choice.num_shared_tiles = num_tiles - std::int64_t{whole_rounds} * num_sms;
  choice.chunk_steps = static_cast<int>(ceil_div(layout.num_steps, num_chunks));
  choice.num_chunks = static_cast<int>(ceil_div(layout.num_steps, choice.chunk_steps));
  const std::int64_t num_chunks_in_all = choice.num_shared_tiles * choice.num_chunks;
  choice.num_ctas = static_cast<int>(whole_rounds > 0 ? num_sms : std::min<std::int64_t>(num_sms, num_chunks_in_all));
  choice.cycles = whole_rounds * (layout.num_steps * step_cycles(tokens, choice.num_ctas, num_sms) + 4000.0);
  if (choice.num_shared_tiles > 0) {
    const double area = kWgmmaRows * tokens / 16384.0;
    const auto chunks = static_cast<double>(ceil_div(num_chunks_in_all, choice.num_ctas));
    const bool is_even = num_chunks_in_all % choice.num_ctas == 0;
    // Tiles of which a CTA has a part: each has an end.
    const double tiles = choice.num_chunks == 1 ? chunks : std::max(1.0, chunks / choice.num_chunks + (is_even ? 0.0 : 1.0));
    choice.cycles += chunks * choice.chunk_steps * step_cycles(tokens, choice.num_ctas, num_sms) + 4000.0 * tiles;
    if (choice.num_chunks > 1) {
      choice.partial_bytes = std::int64_t{choice.num_ctas} * 2 * kWgmmaRows * tokens * 4;
      choice.arrival_bytes = choice.num_shared_tiles * 8;
      const double parts =
          std::min(static_cast<double>(choice.num_chunks),
                   static_cast<double>(choice.num_ctas) / static_cast<double>(choice.num_shared_tiles) + (is_even ? 0.0 : 1.0));
      choice.cycles += 3000.0 + (parts * (tokens == 256 ? 2900.0 : 2200.0) + (tiles - 1.0) * 2900.0) * area;
    }
  }
  return choice;
}

WgmmaChoice make_cluster_choice(std::int64_t num_tokens, const Layout& layout, int tokens, int cluster_ctas, int num_sms) {
  WgmmaChoice choice;
  choice.tokens = tokens;
  choice.num_row_tiles = static_cast<int>(ceil_div(layout.num_blocks, kWgmmaWarpgroups));
  choice.num_token_tiles = static_cast<int>(ceil_div(num_tokens, tokens));
  choice.band_tiles = kBandTokens / tokens;
  choice.cluster_ctas = cluster_ctas;
  choice.chunk_steps = static_cast<int>(ceil_div(layout.num_steps, cluster_ctas));
  choice.num_ctas = choice.num_row_tiles * choice.num_token_tiles * cluster_ctas;
  choice.cycles = choice.chunk_steps * step_cycles(tokens, choice.num_ctas, num_sms) + 4000.0 +
                  (tokens == 256 ? 0.35 : 0.1 * (cluster_ctas - 1)) * kWgmmaRows * tokens;
  return choice;
}

WgmmaChoice choose_wgmma(std::int64_t num_tokens, const Layout& layout, int num_sms) {
  WgmmaChoice best;
  const auto consider = [&](const WgmmaChoice& choice) {
    if (best.num_ctas == 0 || choice.cycles < best.cycles) best = choice;
  };
  for (const int tokens : {128, 256}) {
    if (num_tokens <= tokens / 2) continue;
    const std::int64_t num_tiles = ceil_div(layout.num_blocks, kWgmmaWarpgroups) * ceil_div(num_tokens, tokens);
    for (int cluster_ctas = 2; cluster_ctas <= 6; ++cluster_ctas) {
      // Each of a cluster's CTAs has work, and all clusters run at once: not all SMs can be in clusters of any size, by where they lie.
      const std::int64_t chunk_steps = ceil_div(layout.num_steps, cluster_ctas);
      if (num_tiles <= max_clusters(cluster_ctas) && chunk_steps * (cluster_ctas - 1) < layout.num_steps)
        consider(make_cluster_choice(num_tokens, layout, tokens, cluster_ctas, num_sms));
    }
    const int rounds = static_cast<int>(num_tiles / num_sms);
    if (num_tiles % num_sms == 0) {
      consider(make_wgmma_choice(num_tokens, layout, tokens, rounds, 1, num_sms));
      continue;
    }
    for (int whole_rounds = rounds == 1 ? 0 : rounds; whole_rounds <= rounds; ++whole_rounds)
      for (const int num_chunks : {1, 2, 3, 4, 6, 8})
        if (num_chunks <= layout.num_steps) consider(make_wgmma_choice(num_tokens, layout, tokens, whole_rounds, num_chunks, num_sms));
  }
  return best;
}

void run_wgmma(const QuantizedMatmulParams& params, const WgmmaChoice& choice, Stream stream) {
  const WeightFormat& format = params.weight.format;
  const Columns columns = order_columns(params, stream);
  WgmmaPlan plan;
  set_operands(plan, params, columns, choice);
  plan.num_shared_chunks = static_cast<int>(choice.num_shared_tiles * choice.num_chunks);
  plan.num_row_tiles = choice.num_row_tiles;
  plan.num_token_tiles = choice.num_token_tiles;
  plan.band_tiles = choice.band_tiles;
  plan.whole_rounds = choice.whole_rounds;
  plan.num_chunks = choice.num_chunks;
  plan.chunk_steps = choice.chunk_steps;
  plan.cluster_ctas = choice.cluster_ctas;
  plan.group_shift = plan.layout.group_shift();
  plan.stores_vectors = is_aligned(params.out, 16) && keeps_alignment(params.num_tokens, params.out_stride, 2, 16);
  WgmmaMaps maps;
  const Layout& layout = plan.layout;
  const int row_bytes = kBlockUnits * 8 * layout.entry_bytes;
  const std::int64_t rows_of_step = kBlockUnits * unit_bytes(layout.bits) / kCodeRowBytes;
  maps.x = make_byte_matrix_map(columns.x, params.num_tokens, format.num_rows * 2, columns.stride * 2, choice.tokens);
  maps.codes = make_word_map(layout.codes, kCodeRowBytes, layout.num_steps * rows_of_step, layout.num_blocks,
                             static_cast<int>(rows_of_step), kWgmmaWarpgroups);
  maps.entries =
      make_word_map(layout.scales, row_bytes, layout.num_groups, layout.num_blocks, layout.group_size == 32 ? 2 : 1, kWgmmaWarpgroups);
  params.dtype == DType::kBFloat16 ? launch_wgmma<true>(plan, maps, choice.tokens, choice.num_ctas, stream)
                                   : launch_wgmma<false>(plan, maps, choice.tokens, choice.num_ctas, stream);
}

}  // namespace quire::cuda::w4a16
