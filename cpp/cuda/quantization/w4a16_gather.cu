// The order of the columns of x that a weight with an activation order of its own takes.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <type_traits>

#include "cuda/quantization/w4a16_launch.h"

namespace quire::cuda::w4a16 {
namespace {

constexpr int kGatherThreads = 256;

/// The columns of x that columns 8 piece .. 8 piece + 7 of the weight take.
__device__ __forceinline__ void load_permutation(int (&sources)[8], const std::int32_t* permutation, int piece, int num_columns,
                                                 bool is_aligned) {
  if (is_aligned && 8 * piece + 8 <= num_columns) {
    const int4* from = reinterpret_cast<const int4*>(permutation) + 2 * piece;
    const int4 a = __ldg(from), b = __ldg(from + 1);
    sources[0] = a.x, sources[1] = a.y, sources[2] = a.z, sources[3] = a.w;
    sources[4] = b.x, sources[5] = b.y, sources[6] = b.z, sources[7] = b.w;
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) sources[i] = 8 * piece + i < num_columns ? __ldg(permutation + 8 * piece + i) : -1;
  }
}

/// out[token, i] = x[token, permutation[i]], or 0 where that is no column. A CTA has kGatherThreads pieces of 8 columns of one token.
__global__ void __launch_bounds__(kGatherThreads)
    gather_columns_kernel(uint4* out, const std::uint16_t* x, const std::int32_t* permutation, std::int64_t x_stride, int num_columns,
                          int num_source_columns, int num_pieces, bool permutation_is_aligned) {
  // In this order: who comes next reads the weight, which may be new, before it waits.
  device::wait_for_predecessor();
  device::launch_dependents();
  const std::int64_t token = blockIdx.y;
  const int piece = static_cast<int>(blockIdx.x * kGatherThreads + threadIdx.x);
  if (piece >= num_pieces) return;
  // x is under way beside the permutation: a line of it for every eight pieces.
  if (piece % 8 == 0 && 8 * piece < num_source_columns) asm volatile("prefetch.global.L2 [%0];\n" ::"l"(x + token * x_stride + 8 * piece));
  int sources[8];
  load_permutation(sources, permutation, piece, num_columns, permutation_is_aligned);
  std::uint32_t values[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const bool is_column = sources[i] >= 0 && sources[i] < num_source_columns;
    values[i] = is_column ? x[token * x_stride + sources[i]] : std::uint16_t{};
  }
  out[token * num_pieces + piece] =
      make_uint4(values[0] | values[1] << 16, values[2] | values[3] << 16, values[4] | values[5] << 16, values[6] | values[7] << 16);
}

constexpr int kMaxGatherBytes = 200 * 1024;
constexpr int kGatherManyThreads = 512;
/// So many elements, in rows that are not longer, are put in order for two tokens at a time also where that leaves few CTAs.
constexpr std::int64_t kManyElements = std::int64_t{1} << 18, kMaxColumnsOfTwo = 8192;

/// The same for kTokens tokens at a time: a CTA has pieces_of_cta pieces of them, and brings their rows to shared memory first, columns of all
/// side by side: one read in any order, at a better rate than L1's, and one of the permutation do for all.
template <int kTokens>
__global__ void __launch_bounds__(kGatherManyThreads)
    gather_many_kernel(uint4* out, const std::uint16_t* x, const std::int32_t* permutation, std::int64_t x_stride, std::int64_t num_tokens,
                       int num_columns, int num_source_columns, int num_pieces, int pieces_of_cta, bool is_aligned,
                       bool permutation_is_aligned) {
  using Values = std::conditional_t<kTokens == 4, uint2, std::conditional_t<kTokens == 2, std::uint32_t, std::uint16_t>>;  // of a column
  device::wait_for_predecessor();
  device::launch_dependents();
  extern __shared__ __align__(16) std::uint8_t gathered[];
  auto* columns = reinterpret_cast<Values*>(gathered);
  const int first = static_cast<int>(blockIdx.x) * pieces_of_cta, last = min(first + pieces_of_cta, num_pieces);
  int piece = first + static_cast<int>(threadIdx.x), sources[8];
  if (piece < last) load_permutation(sources, permutation, piece, num_columns, permutation_is_aligned);
  const std::int64_t token = std::int64_t{blockIdx.y} * kTokens;
  const int valid = static_cast<int>(min(num_tokens - token, std::int64_t{kTokens}));
  const std::uint16_t* rows[kTokens];
#pragma unroll
  for (int t = 0; t < kTokens; ++t) rows[t] = x + (token + min(t, valid - 1)) * x_stride;
  constexpr int kVector = 8 / kTokens;
  const int num_vectors = is_aligned ? num_source_columns / kVector : 0;
#pragma unroll 4
  for (int i = static_cast<int>(threadIdx.x); i < num_vectors; i += kGatherManyThreads) {
    if constexpr (kTokens == 4) {
      std::uint32_t pairs[4];
#pragma unroll
      for (int t = 0; t < 4; ++t) pairs[t] = reinterpret_cast<const std::uint32_t*>(rows[t])[i];
      reinterpret_cast<uint4*>(columns)[i] = make_uint4(__byte_perm(pairs[0], pairs[1], 0x5410), __byte_perm(pairs[2], pairs[3], 0x5410),
                                                        __byte_perm(pairs[0], pairs[1], 0x7632), __byte_perm(pairs[2], pairs[3], 0x7632));
    } else if constexpr (kTokens == 2) {
      const uint2 a = reinterpret_cast<const uint2*>(rows[0])[i], b = reinterpret_cast<const uint2*>(rows[1])[i];
      reinterpret_cast<uint4*>(columns)[i] = make_uint4(__byte_perm(a.x, b.x, 0x5410), __byte_perm(a.x, b.x, 0x7632),
                                                        __byte_perm(a.y, b.y, 0x5410), __byte_perm(a.y, b.y, 0x7632));
    } else {
      reinterpret_cast<uint4*>(columns)[i] = reinterpret_cast<const uint4*>(rows[0])[i];
    }
  }
  for (int i = kVector * num_vectors + static_cast<int>(threadIdx.x); i < num_source_columns; i += kGatherManyThreads)
    for (int t = 0; t < kTokens; ++t) reinterpret_cast<std::uint16_t*>(columns)[i * kTokens + t] = rows[t][i];
  __syncthreads();
  for (; piece < last; piece += kGatherManyThreads) {
    Values values[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = sources[i] >= 0 && sources[i] < num_source_columns ? columns[sources[i]] : Values{};
    if (piece + kGatherManyThreads < last)
      load_permutation(sources, permutation, piece + kGatherManyThreads, num_columns, permutation_is_aligned);
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      if (t >= valid) break;
      const auto pair = [&](int i) {
        if constexpr (kTokens == 4) {
          const std::uint32_t a = t < 2 ? values[i].x : values[i].y, b = t < 2 ? values[i + 1].x : values[i + 1].y;
          return __byte_perm(a, b, t % 2 == 0 ? 0x5410 : 0x7632);
        } else if constexpr (kTokens == 2) {
          return __byte_perm(values[i], values[i + 1], t == 0 ? 0x5410 : 0x7632);
        } else {
          return static_cast<std::uint32_t>(values[i]) | static_cast<std::uint32_t>(values[i + 1]) << 16;
        }
      };
      out[(token + t) * num_pieces + piece] = make_uint4(pair(0), pair(2), pair(4), pair(6));
    }
  }
}

}  // namespace

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
  // Rows of four or two tokens side by side, or of one; else from device memory.
  const DeviceProperties& device = current_device_properties();
  const int room = std::min(kMaxGatherBytes, static_cast<int>(device.max_shared_bytes_per_cta));
  const bool has_much = params.num_tokens * format.in_features >= kManyElements && format.in_features <= kMaxColumnsOfTwo;
  int tokens_at_once = params.num_tokens >= 4 * device.num_sms                                       ? 4
                       : params.num_tokens >= device.num_sms || (params.num_tokens > 16 && has_much) ? 2
                       : params.num_tokens > 32                                                      ? 1
                                                                                                     : 0;
  while (tokens_at_once > 0 && tokens_at_once * row_bytes > room) tokens_at_once /= 2;
  const bool permutation_is_aligned = is_aligned(params.weight.permutation, 16);
  for (std::int64_t first = 0; first < params.num_tokens; first += 65532) {
    const auto num_tokens = static_cast<unsigned>(std::min<std::int64_t>(params.num_tokens - first, 65532));
    auto* out = reinterpret_cast<uint4*>(workspace) + first * num_pieces;
    const auto* x = static_cast<const std::uint16_t*>(params.x) + first * params.x_stride;
    if (tokens_at_once > 0) {
      const int num_rows = static_cast<int>(ceil_div(std::int64_t{num_tokens}, tokens_at_once));
      const int parts = std::clamp(device.num_sms / num_rows, 1, static_cast<int>(ceil_div(num_pieces, kGatherManyThreads / 2)));
      const int pieces_of_cta = static_cast<int>(ceil_div(num_pieces, parts));
      const bool aligned = is_aligned(x, 16) && keeps_alignment(num_tokens, params.x_stride, 2, 16);
      const auto kernel = tokens_at_once == 4 ? gather_many_kernel<4> : tokens_at_once == 2 ? gather_many_kernel<2> : gather_many_kernel<1>;
      const dim3 grid(static_cast<unsigned>(ceil_div(num_pieces, pieces_of_cta)), static_cast<unsigned>(num_rows));
      launch_waiting("gather_many_kernel", kernel, LaunchShape{grid, kGatherManyThreads, static_cast<int>(tokens_at_once * row_bytes)},
                     stream, out, x, params.weight.permutation, params.x_stride, num_tokens, num_columns, num_source_columns, num_pieces,
                     pieces_of_cta, aligned, permutation_is_aligned);
    } else {
      const dim3 grid(static_cast<unsigned>(ceil_div(num_pieces, kGatherThreads)), num_tokens);
      launch_waiting("gather_columns_kernel", gather_columns_kernel, grid, kGatherThreads, stream, out, x, params.weight.permutation,
                     params.x_stride, num_columns, num_source_columns, num_pieces, permutation_is_aligned);
    }
  }
  return Columns{workspace, std::int64_t{num_pieces} * 8, 16, workspace + gathered_bytes(params.num_tokens, format)};
}

}  // namespace quire::cuda::w4a16
