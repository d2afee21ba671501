// What the kernels of quantized_matmul on wgmma share: entries of any kind, how results are stored. sm_90a.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <type_traits>

#include "cuda/device/async_copy.cuh"
#include "cuda/device/mma.cuh"
#include "cuda/device/wgmma.cuh"
#include "cuda/element.h"
#include "cuda/quantization/w4a16.cuh"

namespace quire::cuda::w4a16 {

constexpr int kStoreRowBytes = 48;  // 32 of a warp's 16 rows, and 16 that keep eight of them in different banks

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

template <int kBits>
__device__ __forceinline__ RowPair load_any_entry(const std::uint8_t* entry, const Layout& layout) {
  if (layout.scale_dtype == DType::kFloat32) return load_entry<Entry::kFloat, kBits>(entry, layout);
  return layout.has_zeros ? load_entry<Entry::kZeros, kBits>(entry, layout) : load_entry<Entry::kScales, kBits>(entry, layout);
}

/// The bias of rows `row` and `row + 8`.
__device__ __forceinline__ void load_row_bias(float (&bias)[2], const void* from, DType dtype, std::int64_t row, std::int64_t num_rows) {
  bias[0] = bias[1] = 0.0f;
  if (from == nullptr) return;
  for (int i = 0; i < 2; ++i) {
    float value[1][1];
    load_parameter(value, from, dtype, row + 8 * i, 0, num_rows);
    bias[i] = value[0][0];
  }
}

/// Stores 8 * kGroups tokens of a warp's 16 rows: sums 4 j + {0, 1} are of row lane / 4 and tokens 8 j + 2 (lane % 4) + {0, 1}, 4 j + {2, 3} of the row
/// 8 below. `space` is the warp's own, of kStoreRowBytes for each token.
template <bool kBf16, int kGroups, typename Plan>
__device__ __forceinline__ void store_tokens(std::uint8_t* space, const float (&sums)[4 * kGroups], const float (&bias)[2],
                                             const Plan& plan, std::int64_t token, std::int64_t row) {
  using T = std::conditional_t<kBf16, __nv_bfloat16, __half>;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  __syncwarp();
#pragma unroll
  for (int j = 0; j < kGroups; ++j) {
    const std::uint32_t pairs[2] = {device::pack_16<kBf16>(sums[4 * j] + bias[0], sums[4 * j + 1] + bias[0]),
                                    device::pack_16<kBf16>(sums[4 * j + 2] + bias[1], sums[4 * j + 3] + bias[1])};
    device::store_matrix_x2_transposed(
        device::shared_address(space) + static_cast<std::uint32_t>((8 * j + lane % 8) * kStoreRowBytes + lane / 8 % 2 * 16), pairs);
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < (kGroups + 1) / 2; ++i) {
    const int at = 16 * i + lane / 2;
    const std::int64_t first = row + 8 * (lane % 2);
    if (at >= 8 * kGroups || token + at >= plan.num_tokens || first >= plan.num_rows) continue;
    const auto* from = reinterpret_cast<const uint4*>(space + at * kStoreRowBytes + 16 * (lane % 2));
    T* to = static_cast<T*>(plan.out) + (token + at) * plan.out_stride + first;
    if (plan.stores_vectors && first + 8 <= plan.num_rows) {
      *reinterpret_cast<uint4*>(to) = *from;
    } else {
      for (int e = 0; e < 8; ++e)
        if (first + e < plan.num_rows) to[e] = reinterpret_cast<const T*>(from)[e];
    }
  }
}

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

}  // namespace quire::cuda::w4a16
