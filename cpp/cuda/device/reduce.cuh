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

/// Over a one-dimensional CTA of `num_warps` whole warps. `scratch` is shared memory, aligned to 16 bytes; there must be a barrier between two
/// uses of one scratch. All entries that are read are written: those that no warp has are zeros, by other lanes. kShort: for up to 8 warps
/// there is a way of its own, with the same bits.
template <bool kShort = false>
__device__ __forceinline__ float cta_sum(float value, float (&scratch)[kWarpSize], unsigned thread, unsigned num_warps) {
  const unsigned lane = thread % kWarpSize, entry = thread / kWarpSize + lane * num_warps;
  value = warp_sum(value);
  if (kShort && num_warps <= 8) {
    if (entry < 8) scratch[entry] = lane == 0 ? value : 0.0f;
    __syncthreads();
    const float4 low = *reinterpret_cast<const float4*>(&scratch[0]), high = *reinterpret_cast<const float4*>(&scratch[4]);
    return ((low.x + high.x) + (low.z + high.z)) + ((low.y + high.y) + (low.w + high.w));
  }
  // Entry i lies at i % 8 * 4 + i / 8: what other lanes would be asked for lies side by side.
  if (entry < kWarpSize) scratch[entry % 8 * 4 + entry / 8] = lane == 0 ? value : 0.0f;
  __syncthreads();
  const float4 four = *reinterpret_cast<const float4*>(&scratch[lane % 8 * 4]);
  float sum = (four.x + four.z) + (four.y + four.w);
#pragma unroll
  for (int lane_mask = 4; lane_mask > 0; lane_mask /= 2) sum += __shfl_xor_sync(kFullMask, sum, lane_mask);
  return sum;
}

/// The maximum over a warp of values that are not negative, whose bits have their order, in one instruction.
__device__ __forceinline__ float warp_max_of_bits(float value) {
  return __int_as_float(__reduce_max_sync(kFullMask, __float_as_int(value)));
}

/// The same over a one-dimensional CTA of whole warps. `scratch` is 32 floats of shared memory, to be used as that of a sum.
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
