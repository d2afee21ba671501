// quantized_matmul on CUDA: which kernel, how its work is divided, and the order of the columns of x.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <random>

#include "cuda/launch.h"
#include "cuda/once_per_device.h"
#include "cuda/quantization/hopper_code.h"
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

constexpr int kMaxGatherBytes = 96 * 1024;

/// The same for many tokens: a CTA has pieces_of_cta pieces of a token, and brings the token's row to shared memory first, which is read in any order
/// at a better rate than L1.
__global__ void __launch_bounds__(kGatherThreads)
    gather_many_kernel(uint4* out, const std::uint16_t* x, const std::int32_t* permutation, std::int64_t x_stride, int num_columns,
                       int num_source_columns, int num_pieces, int pieces_of_cta, bool is_aligned) {
  extern __shared__ std::uint16_t row[];
  const std::int64_t token = blockIdx.y;
  const std::uint16_t* source_row = x + token * x_stride;
  const int num_vectors = is_aligned ? num_source_columns / 8 : 0;
  for (int i = static_cast<int>(threadIdx.x); i < num_vectors; i += kGatherThreads)
    reinterpret_cast<uint4*>(row)[i] = reinterpret_cast<const uint4*>(source_row)[i];
  for (int i = 8 * num_vectors + static_cast<int>(threadIdx.x); i < num_source_columns; i += kGatherThreads) row[i] = source_row[i];
  __syncthreads();
  const int first = static_cast<int>(blockIdx.x) * pieces_of_cta, last = min(first + pieces_of_cta, num_pieces);
  for (int piece = first + static_cast<int>(threadIdx.x); piece < last; piece += kGatherThreads) {
    std::uint32_t values[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int column = 8 * piece + i;
      const int source = column < num_columns ? permutation[column] : -1;
      values[i] = source >= 0 && source < num_source_columns ? row[source] : std::uint16_t{};
    }
    out[token * num_pieces + piece] =
        make_uint4(values[0] | values[1] << 16, values[2] | values[3] << 16, values[4] | values[5] << 16, values[6] | values[7] << 16);
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
    choice.partial_bytes = choice.num_token_blocks * choice.num_ctas * 2 * strip_rows * 8 * tiles * 4;
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
  const bool many = params.num_tokens > 16 && row_bytes <= kMaxGatherBytes;
  if (many) set_max_shared_bytes(reinterpret_cast<const void*>(gather_many_kernel), kMaxGatherBytes);
  for (std::int64_t first = 0; first < params.num_tokens; first += 65535) {
    const auto num_tokens = static_cast<unsigned>(std::min<std::int64_t>(params.num_tokens - first, 65535));
    auto* out = reinterpret_cast<uint4*>(workspace) + first * num_pieces;
    const auto* x = static_cast<const std::uint16_t*>(params.x) + first * params.x_stride;
    if (many) {
      const int pieces_of_cta = num_tokens >= 256 ? num_pieces : 2 * kGatherThreads;
      const bool aligned = is_aligned(x, 16) && keeps_alignment(num_tokens, params.x_stride, 2, 16);
      gather_many_kernel<<<dim3(static_cast<unsigned>(ceil_div(num_pieces, pieces_of_cta)), num_tokens), kGatherThreads,
                           static_cast<std::size_t>(row_bytes), cuda_stream(stream)>>>(
          out, x, params.weight.permutation, params.x_stride, num_columns, num_source_columns, num_pieces, pieces_of_cta, aligned);
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
  plan.x = columns.x;
  plan.out = params.out;
  plan.bias = params.bias;
  plan.bias_dtype = params.bias_dtype;
  plan.partials = reinterpret_cast<float*>(columns.workspace);
  plan.arrivals = reinterpret_cast<std::uint64_t*>(columns.workspace + choice.partial_bytes);
  plan.tag = arrival_tag();
  plan.x_stride = columns.stride;
  plan.x_alignment = columns.alignment;
  plan.out_stride = params.out_stride;
  plan.num_tokens = params.num_tokens;
  plan.num_rows = static_cast<int>(format.out_features);
  plan.num_columns = static_cast<int>(format.num_rows);
  plan.num_tasks = choice.num_strips * choice.num_chunks;
  plan.num_ctas = choice.num_ctas;
  plan.num_chunks = choice.num_chunks;
  plan.chunk_steps = choice.chunk_steps;
  plan.row_warps_log2 = choice.row_warps_log2;
  plan.num_stages = choice.num_stages;
  plan.group_shift = plan.layout.group_shift();
  plan.waits = params.weight.permutation != nullptr && has_hopper_code();
  params.dtype == DType::kBFloat16 ? launch_mma<true>(plan, choice.tiles, stream) : launch_mma<false>(plan, choice.tiles, stream);
}

namespace {

/// Cycles that 64 columns of a tile take.
double step_cycles(int tokens, int num_ctas, int num_sms) {
  return (tokens == 256 ? 1075.0 : tokens == 128 ? 820.0 : 1100.0) * (0.8 + 0.2 * num_ctas / num_sms);
}

}  // namespace

WgmmaChoice make_wgmma_choice(std::int64_t num_tokens, const Layout& layout, int tokens, int whole_rounds, int num_chunks, int num_sms) {
  WgmmaChoice choice;
  choice.tokens = tokens;
  choice.num_row_tiles = static_cast<int>(ceil_div(layout.num_blocks, wgmma_warpgroups(tokens)));
  choice.num_token_tiles = static_cast<int>(ceil_div(num_tokens, tokens));
  const std::int64_t num_tiles = std::int64_t{choice.num_row_tiles} * choice.num_token_tiles;
  choice.whole_rounds = whole_rounds;
  choice.num_shared_tiles = num_tiles - std::int64_t{whole_rounds} * num_sms;
  choice.chunk_steps = static_cast<int>(ceil_div(layout.num_steps, num_chunks));
  choice.num_chunks = static_cast<int>(ceil_div(layout.num_steps, choice.chunk_steps));
  const std::int64_t num_chunks_in_all = choice.num_shared_tiles * choice.num_chunks;
  choice.num_ctas = static_cast<int>(whole_rounds > 0 ? num_sms : std::min<std::int64_t>(num_sms, num_chunks_in_all));
  choice.cycles = whole_rounds * (layout.num_steps * step_cycles(tokens, choice.num_ctas, num_sms) + 4000.0);
  if (choice.num_shared_tiles > 0) {
    choice.cycles += static_cast<double>(ceil_div(num_chunks_in_all, choice.num_ctas)) * choice.chunk_steps *
                         step_cycles(tokens, choice.num_ctas, num_sms) +
                     4000.0;
    if (choice.num_chunks > 1) {
      choice.partial_bytes = std::int64_t{choice.num_ctas} * 2 * wgmma_rows(tokens) * tokens * 4;
      choice.arrival_bytes = choice.num_shared_tiles * 8;
      const double parts = std::min(static_cast<double>(choice.num_chunks),
                                    static_cast<double>(choice.num_ctas) / static_cast<double>(choice.num_shared_tiles) +
                                        (num_chunks_in_all % choice.num_ctas == 0 ? 0.0 : 1.0));
      choice.cycles += 3000.0 + parts * 2900.0 * wgmma_rows(tokens) * tokens / 16384.0;
    }
  }
  return choice;
}

WgmmaChoice make_cluster_choice(std::int64_t num_tokens, const Layout& layout, int tokens, int cluster_ctas, int num_sms) {
  WgmmaChoice choice;
  choice.tokens = tokens;
  choice.num_row_tiles = static_cast<int>(ceil_div(layout.num_blocks, wgmma_warpgroups(tokens)));
  choice.num_token_tiles = static_cast<int>(ceil_div(num_tokens, tokens));
  choice.cluster_ctas = cluster_ctas;
  choice.chunk_steps = static_cast<int>(ceil_div(layout.num_steps, cluster_ctas));
  choice.num_ctas = choice.num_row_tiles * choice.num_token_tiles * cluster_ctas;
  choice.cycles = choice.chunk_steps * step_cycles(tokens, choice.num_ctas, num_sms) + 4000.0 + 0.1 * wgmma_rows(tokens) * tokens;
  return choice;
}

WgmmaChoice choose_wgmma(std::int64_t num_tokens, const Layout& layout, int num_sms) {
  WgmmaChoice best;
  const auto consider = [&](const WgmmaChoice& choice) {
    if (best.num_ctas == 0 || choice.cycles < best.cycles) best = choice;
  };
  for (const int tokens : {64, 128, 256}) {
    if (tokens == 64 ? num_tokens > 64 : num_tokens <= tokens / 2) continue;
    const std::int64_t num_tiles = ceil_div(layout.num_blocks, wgmma_warpgroups(tokens)) * ceil_div(num_tokens, tokens);
    for (int cluster_ctas = 2; cluster_ctas <= 4; cluster_ctas *= 2) {
      // Each of a cluster's CTAs has work, and all clusters run at once: not all SMs can be in clusters of four, by where they lie.
      const std::int64_t chunk_steps = ceil_div(layout.num_steps, cluster_ctas);
      const int limit = cluster_ctas == 2 ? num_sms : num_sms * 3 / 4;
      if (num_tiles * cluster_ctas <= limit && chunk_steps * (cluster_ctas - 1) < layout.num_steps)
        consider(make_cluster_choice(num_tokens, layout, tokens, cluster_ctas, num_sms));
    }
    const int rounds = static_cast<int>(num_tiles / num_sms);
    if (num_tiles % num_sms == 0) {
      consider(make_wgmma_choice(num_tokens, layout, tokens, rounds, 1, num_sms));
      continue;
    }
    for (int whole_rounds = rounds == 1 ? 0 : rounds; whole_rounds <= rounds; ++whole_rounds)
      for (const int num_chunks : {1, 2, 3, 4, 6, 8, 12, 16})
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
  plan.num_token_tiles = choice.num_token_tiles;
  plan.whole_rounds = choice.whole_rounds;
  plan.num_chunks = choice.num_chunks;
  plan.chunk_steps = choice.chunk_steps;
  plan.cluster_ctas = choice.cluster_ctas;
  plan.group_shift = plan.layout.group_shift();
  plan.stores_vectors = is_aligned(params.out, 16) && keeps_alignment(params.num_tokens, params.out_stride, 2, 16);
  WgmmaMaps maps;
  const Layout& layout = plan.layout;
  const int warpgroups = wgmma_warpgroups(choice.tokens), row_bytes = kBlockUnits * 8 * layout.entry_bytes;
  const std::int64_t rows_of_step = kBlockUnits * unit_bytes(layout.bits) / kCodeRowBytes;
  maps.x = make_byte_matrix_map(columns.x, params.num_tokens, format.num_rows * 2, columns.stride * 2, choice.tokens);
  maps.codes = make_word_map(layout.codes, kCodeRowBytes, layout.num_steps * rows_of_step, layout.num_blocks,
                             static_cast<int>(rows_of_step), warpgroups);
  maps.entries = make_word_map(layout.scales, row_bytes, layout.num_groups, layout.num_blocks, layout.group_size == 32 ? 2 : 1, warpgroups);
  params.dtype == DType::kBFloat16 ? launch_wgmma<true>(plan, maps, choice.tokens, choice.num_ctas, stream)
                                   : launch_wgmma<false>(plan, maps, choice.tokens, choice.num_ctas, stream);
}

namespace {

/// Whether wgmma's kernel can do it and is the faster one. It rounds weights to the dtype of x, whose range float16 may not have for scales of
/// another dtype; the other kernel multiplies by scales in float32.
bool takes_wgmma(std::int64_t num_tokens, const Layout& layout, DType dtype, bool batch_invariant) {
  return num_tokens > 16 && layout.num_steps >= 4 && (dtype == DType::kBFloat16 || layout.scale_dtype == DType::kFloat16) &&
         !batch_invariant && has_hopper_code();
}

}  // namespace

}  // namespace w4a16

bool has_hopper_code() {
  // Code made from sm_80 PTX has no wgmma and does not wait for a predecessor, on whatever device.
  return known_of_device([] {
    cudaFuncAttributes attributes{};
    QUIRE_CUDA_CHECK(cudaFuncGetAttributes(&attributes, w4a16::gather_columns_kernel));
    return attributes.ptxVersion >= 90 && attributes.binaryVersion == 90;
  });
}

std::int64_t quantized_matmul_workspace_size(std::int64_t num_tokens, const WeightFormat& format, bool has_permutation, DType dtype,
                                             bool batch_invariant) {
  const DeviceProperties& device = current_device_properties();
  const w4a16::Layout layout(nullptr, format);
  const auto mma = w4a16::choose_mma(num_tokens, layout, device.num_sms, device.max_shared_bytes_per_cta, batch_invariant);
  std::int64_t num_bytes = mma.partial_bytes + mma.arrival_bytes;
  if (w4a16::takes_wgmma(num_tokens, layout, dtype, batch_invariant)) {
    const auto wgmma = w4a16::choose_wgmma(num_tokens, layout, device.num_sms);
    num_bytes = std::max(num_bytes, wgmma.partial_bytes + wgmma.arrival_bytes);
  }
  return num_bytes + (has_permutation ? w4a16::gathered_bytes(num_tokens, format) : 0);
}

void quantized_matmul(const QuantizedMatmulParams& params, Stream stream) {
  const DeviceProperties& device = current_device_properties();
  const w4a16::Layout layout(params.weight.data, params.weight.format);
  const bool aligned =
      params.weight.permutation != nullptr || (is_aligned(params.x, 16) && (params.num_tokens == 1 || params.x_stride > 0) &&
                                               keeps_alignment(params.num_tokens, params.x_stride, 2, 16));
  if (aligned && w4a16::takes_wgmma(params.num_tokens, layout, params.dtype, params.batch_invariant)) {
    w4a16::run_wgmma(params, w4a16::choose_wgmma(params.num_tokens, layout, device.num_sms), stream);
  } else {
    w4a16::run_mma(params,
                   w4a16::choose_mma(params.num_tokens, layout, device.num_sms, device.max_shared_bytes_per_cta, params.batch_invariant),
                   stream);
  }
}

}  // namespace quire::cuda
