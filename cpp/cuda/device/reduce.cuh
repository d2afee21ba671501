// Sums and maxima over part of a warp, a warp and a CTA. Every thread gets the result.
// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace quire::cuda {

inline constexpr int kWarpSize = 32;
inline constexpr unsigned kFullMask = 0xffffffffu;

/// Over aligned groups of `width` lanes, a power of two up to 32, the same for the whole warp. All lanes take part.
__device__ __forceinline__ float warp_sum(float value, int width = kWarpSize) {
#pragma unroll
  for (int lane_mask = kWarpSize / 2; lane_mask > 0; lane_mask /= 2)
    if (lane_mask < width) value += __shfl_xor_sync(kFullMask, value, lane_mask);
  return value;
}

__device__ __forceinline__ float warp_max(float value, int width = kWarpSize) {
#pragma unroll
  for (int lane_mask = kWarpSize / 2; lane_mask > 0; lane_mask /= 2)
    if (lane_mask < width) value = fmaxf(value, __shfl_xor_sync(kFullMask, value, lane_mask));
  return value;
}

/// Over a one-dimensional CTA of whole warps. `scratch` is 32 floats of shared memory; there must be a barrier between two
/// uses of one scratch.
__device__ __forceinline__ float cta_sum(float value, float* scratch) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int num_warps = static_cast<int>(blockDim.x) / kWarpSize;
  value = warp_sum(value);
  if (num_warps == 1) return value;
  if (lane == 0) scratch[static_cast<int>(threadIdx.x) / kWarpSize] = value;
  __syncthreads();
  // Every warp reduces the partial sums itself, which saves the second barrier of a broadcast.
  return warp_sum(lane < num_warps ? scratch[lane] : 0.0f);
}

/// The maximum over a warp of values that are not negative, whose bits have their order, in one instruction.
__device__ __forceinline__ float warp_max_of_bits(float value) {
  return __int_as_float(__reduce_max_sync(kFullMask, __float_as_int(value)));
}

/// The maximum of values that are not negative, likewise.
__device__ __forceinline__ float cta_max(float value, float* scratch) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int num_warps = static_cast<int>(blockDim.x) / kWarpSize;
  value = warp_max_of_bits(value);
  if (num_warps == 1) return value;
  if (lane == 0) scratch[static_cast<int>(threadIdx.x) / kWarpSize] = value;
  __syncthreads();
  return warp_max_of_bits(lane < num_warps ? scratch[lane] : 0.0f);
}

}  // namespace quire::cuda
