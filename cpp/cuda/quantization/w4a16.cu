// quantized_matmul on CUDA: which kernel, how its work is divided, and the order of the columns of x.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <random>
#include <string>

#include "core/explain.h"
#include "cuda/device_code.h"
#include "cuda/launch.h"
#include "cuda/quantization/w4a16_launch.h"
#include "cuda/tensor_map.h"
#include "quire/error.h"

namespace quire::cuda {

namespace w4a16 {
namespace {

constexpr int kGatherThreads = 256;

/// out[token, i] = x[token, permutation[i]], or 0 where that is no column. A CTA has kGatherThreads pieces of 8 columns of one token.
__global__ void __launch_bounds__(kGatherThreads)
    gather_columns_kernel(uint4* out, const std::uint16_t* x, const std::int32_t* permutation, std::int64_t x_stride, int num_columns,
                          int num_source_columns, int num_pieces) {
  device::launch_dependents();
  const std::int64_t token = blockIdx.y;
  const int piece = static_cast<int>(blockIdx.x * kGatherThreads + threadIdx.x);
  if (piece >= num_pieces) return;
  std::uint32_t values[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int column = 8 * piece + i;
    const int source = column < num_columns ? permutation[column] : -1;
    values[i] = source >= 0 && source < num_source_columns ? x[token * x_stride + source] : std::uint16_t{};
  }
  out[token * num_pieces + piece] =
      make_uint4(values[0] | values[1] << 16, values[2] | values[3] << 16, values[4] | values[5] << 16, values[6] | values[7] << 16);
}

constexpr int kMaxGatherBytes = 200 * 1024;

/// The same for kTokens of many tokens at a time: a CTA has pieces_of_cta pieces of them, and brings their rows to shared memory first, columns of all
/// side by side: one read in any order, at a better rate than L1's, and one of the permutation do for all.
template <int kTokens>
__global__ void __launch_bounds__(kGatherThreads)
    gather_many_kernel(uint4* out, const std::uint16_t* x, const std::int32_t* permutation, std::int64_t x_stride, std::int64_t num_tokens,
                       int num_columns, int num_source_columns, int num_pieces, int pieces_of_cta, bool is_aligned) {
  using Values = std::conditional_t<kTokens == 4, uint2, std::uint16_t>;  // of a column
  device::launch_dependents();
  extern __shared__ __align__(16) std::uint8_t gathered[];
  auto* columns = reinterpret_cast<Values*>(gathered);
  const std::int64_t token = std::int64_t{blockIdx.y} * kTokens;
  const int valid = static_cast<int>(min(num_tokens - token, std::int64_t{kTokens}));
  const std::uint16_t* rows[kTokens];
#pragma unroll
  for (int t = 0; t < kTokens; ++t) rows[t] = x + (token + min(t, valid - 1)) * x_stride;
  constexpr int kVector = kTokens == 4 ? 2 : 8;
  const int num_vectors = is_aligned ? num_source_columns / kVector : 0;
#pragma unroll 4
  for (int i = static_cast<int>(threadIdx.x); i < num_vectors; i += kGatherThreads) {
    if constexpr (kTokens == 4) {
      std::uint32_t pairs[4];
#pragma unroll
      for (int t = 0; t < 4; ++t) pairs[t] = reinterpret_cast<const std::uint32_t*>(rows[t])[i];
      reinterpret_cast<uint4*>(columns)[i] = make_uint4(__byte_perm(pairs[0], pairs[1], 0x5410), __byte_perm(pairs[2], pairs[3], 0x5410),
                                                        __byte_perm(pairs[0], pairs[1], 0x7632), __byte_perm(pairs[2], pairs[3], 0x7632));
    } else {
      reinterpret_cast<uint4*>(columns)[i] = reinterpret_cast<const uint4*>(rows[0])[i];
    }
  }
  for (int i = kVector * num_vectors + static_cast<int>(threadIdx.x); i < num_source_columns; i += kGatherThreads)
    for (int t = 0; t < kTokens; ++t) reinterpret_cast<std::uint16_t*>(columns)[i * kTokens + t] = rows[t][i];
  __syncthreads();
  const int first = static_cast<int>(blockIdx.x) * pieces_of_cta, last = min(first + pieces_of_cta, num_pieces);
  for (int piece = first + static_cast<int>(threadIdx.x); piece < last; piece += kGatherThreads) {
    Values values[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int column = 8 * piece + i;
      const int source = column < num_columns ? permutation[column] : -1;
      values[i] = source >= 0 && source < num_source_columns ? columns[source] : Values{};
    }
    if constexpr (kTokens == 4) {
#pragma unroll
      for (int t = 0; t < 4; ++t) {
        if (t >= valid) break;
        const auto pair = [&](int i) {
          const std::uint32_t a = t < 2 ? values[i].x : values[i].y, b = t < 2 ? values[i + 1].x : values[i + 1].y;
          return __byte_perm(a, b, t % 2 == 0 ? 0x5410 : 0x7632);
        };
        out[(token + t) * num_pieces + piece] = make_uint4(pair(0), pair(2), pair(4), pair(6));
      }
    } else {
      const auto pair = [&](int i) { return static_cast<std::uint32_t>(values[i]) | static_cast<std::uint32_t>(values[i + 1]) << 16; };
      out[token * num_pieces + piece] = make_uint4(pair(0), pair(2), pair(4), pair(6));
    }
  }
}

/// What tells this process's counts in a workspace from whatever else may be there; the lower 16 bits are for the count.
std::uint64_t arrival_tag() {
  static const std::uint64_t tag = [] {
    std::random_device source;
    return (std::uint64_t{source()} << 32 | source()) & ~std::uint64_t{0xffff};
  }();
  return tag;
}

/// At most so much of a workspace is for parts of sums, or for x in another order, where one slice of the tokens fits: more are worked on slice by slice.
constexpr std::int64_t kMaxPartialBytes = std::int64_t{32} << 20, kMaxGatheredBytes = std::int64_t{64} << 20;

int warps_of(int tiles) { return tiles == 8 ? 8 : 16; }
std::int64_t round_up(std::int64_t value, std::int64_t unit) { return ceil_div(value, unit) * unit; }

std::int64_t gathered_bytes(std::int64_t num_tokens, const WeightFormat& format) { return num_tokens * round_up(format.num_rows, 8) * 2; }

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

}  // namespace

namespace {

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
  // What rings and sums leave, in columns of x: of one chunk, or of two.
  plan.chunk_steps = 0;
  const int x_bytes = max_shared_bytes - (layout.bits == 4 ? shared_bytes<4>(plan, tiles) : shared_bytes<8>(plan, tiles)) + 16 * tokens;
  const auto steps_in = [&](int bytes) { return (bytes / tokens - 16) / (kUnitColumns * 2); };
  // Where x is read again for every strip, strips are of 128 rows at least; where sums of many tokens change hands, not of much more.
  const int first = tiles == 1 ? 0 : tiles == 8 ? 1 : 2, last = tiles == 2 ? 2 : tiles == 1 ? 4 : 3;
  const int preferred_steps = tiles == 1 ? layout.num_steps : tiles == 2 ? 16 : 8;
  MmaChoice best;
  double best_cycles = 0.0;
  for (int row_warps_log2 = first; row_warps_log2 <= last; ++row_warps_log2) {
    const int column_warps = warps_of(tiles) >> row_warps_log2;
    for (int parts = 1; parts <= (tiles == 1 ? 8 : 1); parts *= 2) {
      int steps = static_cast<int>(round_up(ceil_div(std::min(preferred_steps, layout.num_steps), parts), column_warps));
      const int limit = steps_in(steps >= layout.num_steps ? x_bytes : x_bytes / 2);
      if (steps > limit) steps = steps_in(x_bytes / 2) / column_warps * column_warps;
      if (steps <= 0) continue;
      MmaChoice choice = make_mma_choice(num_tokens, layout, tiles, row_warps_log2, steps, num_sms);
      choice.num_stages = num_stages;
      const auto tasks = static_cast<double>(ceil_div(choice.num_strips * choice.num_chunks, choice.num_ctas));
      const double strip_rows = kMmaUnits * kUnitRows << row_warps_log2, columns = choice.chunk_steps * kUnitColumns;
      const double sums = strip_rows * tokens;
      const double code_bytes = tasks * strip_rows * columns * layout.bits / 8;
      const double all_x_bytes = 2.0 * tokens * columns * (choice.num_chunks > 1 ? tasks : 1.0);
      const double flushes = tasks / choice.num_chunks + (choice.num_chunks > 1 ? 1.0 : 0.0);
      double cycles = std::max({code_bytes / 18.0, (code_bytes + all_x_bytes) / 36.0, tasks * strip_rows * columns * 8 * tiles / 1200.0});
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

namespace {

/// x as a kernel reads it, and what is left of the workspace.
struct Columns {
  const void* x;
  std::int64_t stride;
  int alignment;  // of every row, in bytes
  std::uint8_t* workspace;
};

/// Puts the columns of x in the order of the weight's, if that has one of its own.
Columns order_columns(const QuantizedMatmulParams& params, Stream stream) {
  const WeightFormat& format = params.weight.format;
  auto* workspace = static_cast<std::uint8_t*>(params.workspace);
  if (params.weight.permutation == nullptr) {
    int alignment = 16;
    while (alignment > 2 && !(is_aligned(params.x, alignment) && keeps_alignment(params.num_tokens, params.x_stride, 2, alignment)))
      alignment /= 2;
    if (alignment == 4 && format.in_features % 2 != 0) alignment = 2;  // copies by 4 bytes would end past the row
    return Columns{params.x, params.x_stride, alignment, workspace};
  }
  const int num_pieces = static_cast<int>(ceil_div(format.num_rows, 8));
  const auto num_source_columns = static_cast<int>(format.in_features), num_columns = static_cast<int>(format.num_rows);
  const std::int64_t row_bytes = format.in_features * 2;
  // Rows of four tokens side by side, or of one; else from device memory.
  const int room = std::min(kMaxGatherBytes, static_cast<int>(current_device_properties().max_shared_bytes_per_cta));
  const int tokens_at_once = params.num_tokens >= 1024 && 4 * row_bytes <= room ? 4 : params.num_tokens > 16 && row_bytes <= room ? 1 : 0;
  for (std::int64_t first = 0; first < params.num_tokens; first += 65535) {
    const auto num_tokens = static_cast<unsigned>(std::min<std::int64_t>(params.num_tokens - first, 65535));
    auto* out = reinterpret_cast<uint4*>(workspace) + first * num_pieces;
    const auto* x = static_cast<const std::uint16_t*>(params.x) + first * params.x_stride;
    if (tokens_at_once > 0) {
      const int pieces_of_cta = params.num_tokens >= 256 ? num_pieces : 2 * kGatherThreads;
      const bool aligned = is_aligned(x, 16) && keeps_alignment(num_tokens, params.x_stride, 2, 16);
      const auto kernel = tokens_at_once == 4 ? gather_many_kernel<4> : gather_many_kernel<1>;
      set_max_shared_bytes(reinterpret_cast<const void*>(kernel), room);
      kernel<<<dim3(static_cast<unsigned>(ceil_div(num_pieces, pieces_of_cta)),
                    static_cast<unsigned>(ceil_div(std::int64_t{num_tokens}, tokens_at_once))),
               kGatherThreads, static_cast<std::size_t>(tokens_at_once * row_bytes), cuda_stream(stream)>>>(
          out, x, params.weight.permutation, params.x_stride, num_tokens, num_columns, num_source_columns, num_pieces, pieces_of_cta,
          aligned);
      QUIRE_CHECK_LAUNCH("gather_many_kernel", stream);
    } else {
      gather_columns_kernel<<<dim3(static_cast<unsigned>(ceil_div(num_pieces, kGatherThreads)), num_tokens), kGatherThreads, 0,
                              cuda_stream(stream)>>>(out, x, params.weight.permutation, params.x_stride, num_columns, num_source_columns,
                                                     num_pieces);
      QUIRE_CHECK_LAUNCH("gather_columns_kernel", stream);
    }
  }
  return Columns{workspace, std::int64_t{num_pieces} * 8, 16, workspace + gathered_bytes(params.num_tokens, format)};
}

}  // namespace

void run_mma(const QuantizedMatmulParams& params, const MmaChoice& choice, Stream stream) {
  const WeightFormat& format = params.weight.format;
  const Columns columns = order_columns(params, stream);
  MmaPlan plan;
  plan.layout = Layout(params.weight.data, format);
  plan.bias = params.bias;
  plan.bias_dtype = params.bias_dtype;
  plan.partials = reinterpret_cast<float*>(columns.workspace);
  plan.arrivals = reinterpret_cast<std::uint64_t*>(columns.workspace + choice.partial_bytes);
  plan.tag = arrival_tag();
  plan.x_stride = columns.stride;
  plan.x_alignment = columns.alignment;
  plan.out_stride = params.out_stride;
  plan.num_rows = static_cast<int>(format.out_features);
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

namespace {

/// Cycles that 64 columns of a tile take.
double step_cycles(int tokens, int num_ctas, int num_sms) { return (tokens == 256 ? 1140.0 : 730.0) * (0.8 + 0.2 * num_ctas / num_sms); }

}  // namespace

namespace {

/// Tokens that all SMs work on at a time: of their x and of the weight the L2 cache has a part that is read many times.
constexpr int kBandTokens = 1024;

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

namespace {

/// [num_blocks, num_rows, row_bytes], contiguous, read in boxes of box_rows rows of box_blocks blocks.
CUtensorMap make_word_map(const void* data, int row_bytes, std::int64_t num_rows, std::int64_t num_blocks, int box_rows, int box_blocks) {
  const auto words = static_cast<cuuint32_t>(row_bytes / 8);
  const cuuint64_t sizes[4] = {words, static_cast<cuuint64_t>(num_rows), static_cast<cuuint64_t>(num_blocks), 1};
  const cuuint64_t row = static_cast<cuuint64_t>(row_bytes), block = row * static_cast<cuuint64_t>(num_rows);
  const cuuint64_t strides[3] = {row, block, block * static_cast<cuuint64_t>(num_blocks)};
  const cuuint32_t box[4] = {words, static_cast<cuuint32_t>(box_rows), static_cast<cuuint32_t>(box_blocks), 1}, steps[4] = {1, 1, 1, 1};
  CUtensorMap map;
  check_tensor_map(encode_tensor_map()(&map, CU_TENSOR_MAP_DATA_TYPE_FLOAT64, 4, const_cast<void*>(data), sizes, strides, box, steps,
                                       CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                                       CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE));
  return map;
}

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

void run_wgmma(const QuantizedMatmulParams& params, const WgmmaChoice& choice, Stream stream) {
  const WeightFormat& format = params.weight.format;
  const Columns columns = order_columns(params, stream);
  WgmmaPlan plan;
  plan.layout = Layout(params.weight.data, format);
  plan.out = params.out;
  plan.bias = params.bias;
  plan.bias_dtype = params.bias_dtype;
  plan.partials = reinterpret_cast<float*>(columns.workspace);
  plan.arrivals = reinterpret_cast<std::uint64_t*>(columns.workspace + choice.partial_bytes);
  plan.tag = arrival_tag();
  plan.out_stride = params.out_stride;
  plan.num_tokens = params.num_tokens;
  plan.num_rows = format.out_features;
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
  plan.waits = params.weight.permutation != nullptr;
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

FewChoice make_few_choice(std::int64_t num_tokens, const Layout& layout, int row_groups_log2, int cluster_ctas, int num_sms) {
  FewChoice choice;
  choice.tokens = num_tokens <= 8 ? 8 : num_tokens <= 16 ? 16 : num_tokens <= 32 ? 32 : 64;
  choice.row_groups_log2 = row_groups_log2;
  choice.cluster_ctas = cluster_ctas;
  const int row_groups = 1 << row_groups_log2, stage_steps = kFewStageUnits >> row_groups_log2;
  choice.num_tiles = static_cast<int>(ceil_div(layout.num_blocks, row_groups));
  choice.num_ctas = cluster_ctas > 1 ? choice.num_tiles * cluster_ctas : std::min(choice.num_tiles, num_sms);
  choice.chunk_steps = static_cast<int>(ceil_div(layout.num_steps, cluster_ctas * stage_steps)) * stage_steps;
  const int num_entries = row_groups * kBlockUnits * 8 * few_stage_groups(layout, stage_steps);
  const int x_bytes = stage_steps * static_cast<int>(round_up(num_tokens, 8)) * kUnitColumns * 2;
  choice.stage_bytes =
      static_cast<int>(round_up(x_bytes + kFewStageUnits * kBlockUnits * unit_bytes(layout.bits) + num_entries * layout.entry_bytes, 1024));
  const int sum_bytes = few_sum_bytes(static_cast<int>(num_tokens), row_groups_log2, cluster_ctas), room = 227 * 1024 - kFewFixedBytes;
  const int num_stages = choice.chunk_steps / stage_steps * static_cast<int>(ceil_div(choice.num_tiles * cluster_ctas, choice.num_ctas));
  const int most = std::clamp(num_stages, 2, kFewMaxStages);
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
  choice.shared_bytes = kFewFixedBytes + std::max(stages_bytes, choice.sums_at + sum_bytes);

  // Cycles of an SM, by what is the narrowest: making fragments and their products, what an SM reads, what all read of the L2 cache, and of memory.
  const int waves = static_cast<int>(ceil_div(choice.num_tiles, max_clusters(cluster_ctas)));
  const double code_bytes = kFewStageUnits * kBlockUnits * unit_bytes(layout.bits), read_bytes = x_bytes + 1.06 * code_bytes;
  const double stages = static_cast<double>(choice.chunk_steps / stage_steps) * waves;
  const double all_stages = static_cast<double>(choice.chunk_steps / stage_steps) * choice.num_tiles * cluster_ctas;
  const double product = choice.tokens == 8 ? 880.0 : choice.tokens == 16 ? 960.0 : choice.tokens == 32 ? 1100.0 : 1600.0;
  choice.cycles = std::max({stages * product, stages * read_bytes * (choice.num_stages + 1) / (37.0 * choice.num_stages),
                            all_stages * read_bytes / (34.0 * num_sms), all_stages * code_bytes / (16.0 * num_sms)}) +
                  3500.0 + (sum_bytes > 0 ? 300.0 : 0.0) + (cluster_ctas > 1 ? 900.0 + 2500.0 * (waves - 1) : 0.0) +
                  (cluster_ctas > 1 && choice.sums_at == 0 ? 700.0 : 0.0);
  return choice;
}

FewChoice choose_few(std::int64_t num_tokens, const Layout& layout, int num_sms) {
  FewChoice best;
  for (int row_groups_log2 = 0; row_groups_log2 <= 2; ++row_groups_log2) {
    for (int cluster_ctas = 1; cluster_ctas <= 6; ++cluster_ctas) {
      const FewChoice choice = make_few_choice(num_tokens, layout, row_groups_log2, cluster_ctas, num_sms);
      // Every CTA has work.
      const std::int64_t before_last = std::int64_t{choice.chunk_steps} * (cluster_ctas - 1);
      if (choice.num_ctas == 0 || (cluster_ctas > 1 && before_last >= layout.num_steps)) continue;
      if (best.num_ctas == 0 || choice.cycles < best.cycles) best = choice;
    }
  }
  return best;
}

void run_few(const QuantizedMatmulParams& params, const FewChoice& choice, Stream stream) {
  const WeightFormat& format = params.weight.format;
  const Columns columns = order_columns(params, stream);
  FewPlan plan;
  plan.layout = Layout(params.weight.data, format);
  plan.out = params.out;
  plan.bias = params.bias;
  plan.bias_dtype = params.bias_dtype;
  plan.out_stride = params.out_stride;
  plan.num_rows = format.out_features;
  plan.num_tokens = static_cast<int>(params.num_tokens);
  plan.row_groups_log2 = choice.row_groups_log2;
  plan.num_tiles = choice.num_tiles;
  plan.cluster_ctas = choice.cluster_ctas;
  plan.chunk_steps = choice.chunk_steps;
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
  plan.waits = params.weight.permutation != nullptr;
  FewMaps maps;
  const std::int64_t rows_of_step = kBlockUnits * unit_bytes(layout.bits) / kCodeRowBytes;
  maps.x = make_panel_map(columns.x, params.num_tokens, format.num_rows, columns.stride, token_rows, stage_steps);
  maps.codes = make_word_map(layout.codes, kCodeRowBytes, layout.num_steps * rows_of_step, layout.num_blocks,
                             static_cast<int>(stage_steps * rows_of_step), row_groups);
  maps.entries = make_word_map(layout.scales, kBlockUnits * 8 * layout.entry_bytes, layout.num_groups, layout.num_blocks,
                               plan.num_stage_groups, row_groups);
  params.dtype == DType::kBFloat16 ? launch_few<true>(plan, maps, choice.tokens, choice.num_ctas, choice.shared_bytes, stream)
                                   : launch_few<false>(plan, maps, choice.tokens, choice.num_ctas, choice.shared_bytes, stream);
}

namespace {

/// Why wgmma's kernel cannot do it or is the slower one; null: it is taken. It rounds weights to the dtype of x, whose range float16 may not have
/// for scales of another dtype; the other kernel multiplies by scales in float32.
const char* prevents_wgmma(std::int64_t num_tokens, const Layout& layout, DType dtype, bool batch_invariant) {
  if (!has_hopper_code()) return "the device is no Hopper, or this build has no code for sm_90a";
  if (batch_invariant) return "batch_invariant: one kernel for any number of tokens";
  if (num_tokens <= kMaxFewTokens) return "so few tokens would leave its tiles mostly empty";
  if (layout.num_steps < 4) return "fewer than 256 input features";
  if (dtype != DType::kBFloat16 && layout.scale_dtype != DType::kFloat16)
    return "float16 may not have the range of scales of another dtype";
  return nullptr;
}

/// The same for the kernel for few tokens.
const char* prevents_few(std::int64_t num_tokens, const WeightFormat& format, bool batch_invariant) {
  if (!has_hopper_code()) return "the device is no Hopper, or this build has no code for sm_90a";
  if (batch_invariant) return "batch_invariant: one kernel for any number of tokens";
  if (num_tokens == 1) return "one token is mma's";
  if (num_tokens > kMaxFewTokens) return "more tokens than it has room for";
  if (format.num_rows % kUnitColumns != 0) return "input features are no multiple of 64";
  return nullptr;
}

/// The first of `few` and `wgmma` that is null is the kernel that is taken; where neither is, it is mma.
void explain(const QuantizedMatmulParams& p, const Layout& layout, const char* few, const char* wgmma, const DeviceProperties& device,
             Explanation& explanation) {
  const auto add = [&](const std::string& reason) { explanation.reasons.push_back(reason); };
  if (few == nullptr) {
    const FewChoice choice = choose_few(p.num_tokens, layout, device.num_sms);
    explanation.variant = "few";
    add("tiles of " + std::to_string(choice.tokens) + " tokens and " + std::to_string(kBlockRows << choice.row_groups_log2) +
        " output features");
    if (choice.cluster_ctas > 1) add("each tile's input features in " + std::to_string(choice.cluster_ctas) + " parts of a cluster");
  } else if (wgmma == nullptr) {
    const WgmmaChoice choice = choose_wgmma(p.num_tokens, layout, device.num_sms);
    explanation.variant = "wgmma";
    add("tiles of " + std::to_string(choice.tokens) + " tokens and " + std::to_string(kWgmmaRows) + " output features");
    if (choice.cluster_ctas > 1) add("each tile's input features in " + std::to_string(choice.cluster_ctas) + " parts of a cluster");
    if (choice.num_shared_tiles > 0 && choice.num_chunks > 1)
      add("input features of " + std::to_string(choice.num_shared_tiles) + " tiles in " + std::to_string(choice.num_chunks) + " parts");
  } else {
    const MmaChoice choice = choose_mma(p.num_tokens, layout, device.num_sms, device.max_shared_bytes_per_cta, p.batch_invariant);
    explanation.variant = "mma";
    add(std::string("not few: ") + few);
    add(std::string("not wgmma: ") + wgmma);
    add("tiles of " + std::to_string(8 * choice.tiles) + " tokens, input features in " + std::to_string(choice.num_chunks) + " parts");
  }
  if (p.weight.permutation != nullptr) add("x is first put in the weight's order of input features (act-order)");
}

/// Tokens that are worked on at a time.
std::int64_t slice_tokens(std::int64_t num_tokens, const WeightFormat& format, bool has_permutation) {
  num_tokens = std::max(num_tokens, std::int64_t{1});
  if (!has_permutation) return num_tokens;
  const std::int64_t most = std::max(kMaxGatheredBytes / gathered_bytes(1, format) / kBandTokens, std::int64_t{1}) * kBandTokens;
  return std::min(num_tokens, most);
}

std::int64_t slice_workspace_size(std::int64_t num_tokens, const WeightFormat& format, bool has_permutation, DType dtype,
                                  bool batch_invariant) {
  if (num_tokens == 0) return 0;
  const DeviceProperties& device = current_device_properties();
  const Layout layout(nullptr, format);
  const MmaChoice mma = choose_mma(num_tokens, layout, device.num_sms, device.max_shared_bytes_per_cta, batch_invariant);
  std::int64_t num_bytes = mma.partial_bytes + mma.arrival_bytes;
  if (prevents_wgmma(num_tokens, layout, dtype, batch_invariant) == nullptr) {
    const WgmmaChoice wgmma = choose_wgmma(num_tokens, layout, device.num_sms);
    num_bytes = std::max(num_bytes, wgmma.partial_bytes + wgmma.arrival_bytes);
  }
  return num_bytes + (has_permutation ? gathered_bytes(num_tokens, format) : 0);
}

void multiply_slice(const QuantizedMatmulParams& params, Stream stream) {
  const DeviceProperties& device = current_device_properties();
  const Layout layout(params.weight.data, params.weight.format);
  const bool aligned =
      params.weight.permutation != nullptr || (is_aligned(params.x, 16) && (params.num_tokens == 1 || params.x_stride > 0) &&
                                               keeps_alignment(params.num_tokens, params.x_stride, 2, 16));
  const char* few = prevents_few(params.num_tokens, params.weight.format, params.batch_invariant);
  const char* wgmma = prevents_wgmma(params.num_tokens, layout, params.dtype, params.batch_invariant);
  if (!aligned) {
    const char* const obstacle = "rows of x do not begin at multiples of 16 bytes";
    if (few == nullptr) few = obstacle;
    if (wgmma == nullptr) wgmma = obstacle;
  }
  if (Explanation* const explanation = explaining()) return explain(params, layout, few, wgmma, device, *explanation);
  if (few == nullptr) {
    run_few(params, choose_few(params.num_tokens, layout, device.num_sms), stream);
  } else if (wgmma == nullptr) {
    run_wgmma(params, choose_wgmma(params.num_tokens, layout, device.num_sms), stream);
  } else {
    run_mma(params, choose_mma(params.num_tokens, layout, device.num_sms, device.max_shared_bytes_per_cta, params.batch_invariant), stream);
  }
}

}  // namespace
}  // namespace w4a16

std::int64_t quantized_matmul_workspace_size(std::int64_t num_tokens, const WeightFormat& format, bool has_permutation, DType dtype,
                                             bool batch_invariant) {
  const std::int64_t slice = w4a16::slice_tokens(num_tokens, format, has_permutation);
  return std::max(w4a16::slice_workspace_size(slice, format, has_permutation, dtype, batch_invariant),
                  w4a16::slice_workspace_size(num_tokens % slice, format, has_permutation, dtype, batch_invariant));
}

void quantized_matmul(const QuantizedMatmulParams& params, Stream stream) {
  const std::int64_t slice = w4a16::slice_tokens(params.num_tokens, params.weight.format, params.weight.permutation != nullptr);
  for (std::int64_t first = 0; first < params.num_tokens; first += slice) {
    QuantizedMatmulParams part = params;
    part.num_tokens = std::min(params.num_tokens - first, slice);
    part.x = static_cast<const std::uint16_t*>(params.x) + first * params.x_stride;
    part.out = static_cast<std::uint16_t*>(params.out) + first * params.out_stride;
    w4a16::multiply_slice(part, stream);
    if (explaining() != nullptr) return;  // the other parts are alike
  }
}

}  // namespace quire::cuda
