// What quantized_matmul's launcher and its kernels' instantiations share. Host code only.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cuda/launch.h"
#include "cuda/quantization/w4a16_few.cuh"
#include "cuda/quantization/w4a16_mma.cuh"
#include "cuda/quantization/w4a16_wgmma.cuh"
#include "quire/stream.h"

namespace quire::cuda::w4a16 {

/// At most so much of a workspace is for parts of sums, or for x in another order, where one slice of the tokens fits: more are worked on slice by slice.
constexpr std::int64_t kMaxPartialBytes = std::int64_t{32} << 20, kMaxGatheredBytes = std::int64_t{64} << 20;
/// Tokens that all SMs work on at a time: of their x and of the weight the L2 cache has a part that is read many times.
constexpr int kBandTokens = 1024;

inline std::int64_t round_up(std::int64_t value, std::int64_t unit) { return ceil_div(value, unit) * unit; }

/// What tells this process's counts in a workspace from whatever else may be there; the lower 16 bits are for the count.
std::uint64_t arrival_tag();

/// x as a kernel reads it, and what is left of the workspace.
struct Columns {
  const void* x;
  std::int64_t stride;
  int alignment;  // of every row, in bytes
  std::uint8_t* workspace;
};

inline std::int64_t gathered_bytes(std::int64_t num_tokens, const WeightFormat& format) {
  return num_tokens * round_up(format.num_rows, 8) * 2;
}
/// Puts the columns of x in the order of the weight's, if that has one of its own.
Columns order_columns(const QuantizedMatmulParams& params, Stream stream);

/// How quantized_matmul_mma_kernel divides its work.
struct MmaChoice {
  int tiles = 1;  // of 8 tokens, in a CTA: 1, 2, 4 or 8
  int row_warps_log2 = 0;
  int num_stages = 0;
  int chunk_steps = 0;
  int num_chunks = 1;
  int num_strips = 0;
  int num_ctas = 0;  // for each block of tokens
  std::int64_t num_token_blocks = 1;
  std::int64_t partial_bytes = 0, arrival_bytes = 0;  // of the workspace
};

/// How quantized_matmul_wgmma_kernel does.
struct WgmmaChoice {
  int tokens = 128;  // of a tile: 128 or 256
  int num_row_tiles = 0, num_token_tiles = 0;
  int band_tiles = 1;
  int whole_rounds = 0;
  int num_chunks = 1, chunk_steps = 0;
  int num_ctas = 0;
  int cluster_ctas = 1;
  std::int64_t num_shared_tiles = 0;
  std::int64_t partial_bytes = 0, arrival_bytes = 0;
  double cycles = 0.0;
};

/// How quantized_matmul_few_kernel does.
struct FewChoice {
  int tokens = 8;  // of a tile: 1, 8, 16, 32 or 64
  int row_groups_log2 = 0;
  int num_tiles = 0, num_ctas = 0, cluster_ctas = 1;
  int chunk_steps = 0;
  int num_helpers = 0, first_cut = 0, cut_step = 0;
  std::int64_t partial_bytes = 0, arrival_bytes = 0;
  int num_stages = 0, stage_bytes = 0, sums_at = 0, x_at = 0, source_at = 0, shared_bytes = 0;
  double cycles = 0.0;
};

MmaChoice make_mma_choice(std::int64_t num_tokens, const Layout& layout, int tiles, int row_warps_log2, int chunk_steps, int num_ctas);
MmaChoice choose_mma(std::int64_t num_tokens, const Layout& layout, int num_sms, int max_shared_bytes, bool batch_invariant);
void run_mma(const QuantizedMatmulParams& params, const MmaChoice& choice, Stream stream);

WgmmaChoice make_wgmma_choice(std::int64_t num_tokens, const Layout& layout, int tokens, int whole_rounds, int num_chunks, int num_sms);
/// Every tile to a cluster.
WgmmaChoice make_cluster_choice(std::int64_t num_tokens, const Layout& layout, int tokens, int cluster_ctas, int num_sms);
WgmmaChoice choose_wgmma(std::int64_t num_tokens, const Layout& layout, int num_sms);
void run_wgmma(const QuantizedMatmulParams& params, const WgmmaChoice& choice, Stream stream);

/// num_stages is 0 if shared memory has no room.
/// cut_stages: how much of a tile is a helper's; 0: no tile is cut. source_columns: of x, if that is one token's and permuted.
FewChoice make_few_choice(std::int64_t num_tokens, const Layout& layout, int source_columns, int row_groups_log2, int cluster_ctas,
                          int cut_stages, int num_sms);
FewChoice choose_few(std::int64_t num_tokens, const Layout& layout, int source_columns, int num_sms);
/// The columns of x, if the kernel for few tokens puts them in order itself; else 0.
int few_source_columns(std::int64_t num_tokens, const WeightFormat& format, bool has_permutation);
/// Clusters of so many CTAs that the current device has room for at a time.
int max_clusters(int cluster_ctas);
void run_few(const QuantizedMatmulParams& params, const FewChoice& choice, Stream stream);

/// What the plans of all kernels have in common: the operands, and where CTAs leave parts of sums for each other.
template <typename Plan, typename Choice>
void set_operands(Plan& plan, const QuantizedMatmulParams& params, const Columns& columns, const Choice& choice) {
  plan.layout = Layout(params.weight.data, params.weight.format);
  plan.out = params.out;
  plan.bias = params.bias;
  plan.bias_dtype = params.bias_dtype;
  plan.out_stride = params.out_stride;
  plan.num_tokens = static_cast<decltype(plan.num_tokens)>(params.num_tokens);
  plan.num_rows = static_cast<decltype(plan.num_rows)>(params.weight.format.out_features);
  plan.partials = reinterpret_cast<decltype(plan.partials)>(columns.workspace);
  plan.arrivals = reinterpret_cast<std::uint64_t*>(columns.workspace + choice.partial_bytes);
  plan.tag = arrival_tag();
}

/// As a launch has it.
inline int clusters_of(int cluster_ctas) { return cluster_ctas > 1 ? cluster_ctas : 0; }

/// Launches the kernel for 8 * tiles tokens a CTA.
template <bool kBf16>
void launch_mma(const MmaPlan& plan, int tiles, Stream stream);
/// Launches the kernel for tiles of `tokens` tokens.
template <bool kBf16>
void launch_wgmma(const WgmmaPlan& plan, const WgmmaMaps& maps, int tokens, int num_ctas, Stream stream);
/// Launches the kernel for up to `tokens` tokens.
template <bool kBf16>
void launch_few(const FewPlan& plan, const FewMaps& maps, int tokens, int num_ctas, int shared_bytes, Stream stream);

extern template void launch_mma<false>(const MmaPlan&, int, Stream);
extern template void launch_mma<true>(const MmaPlan&, int, Stream);
extern template void launch_wgmma<false>(const WgmmaPlan&, const WgmmaMaps&, int, int, Stream);
extern template void launch_wgmma<true>(const WgmmaPlan&, const WgmmaMaps&, int, int, Stream);
extern template void launch_few<false>(const FewPlan&, const FewMaps&, int, int, int, Stream);
extern template void launch_few<true>(const FewPlan&, const FewMaps&, int, int, int, Stream);

}  // namespace quire::cuda::w4a16
