// The range of elements that share a scale: each thread's, and that of groups of lanes.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/device/quantize.cuh"
#include "cuda/device/reduce.cuh"
#include "cuda/element.h"

namespace quire::cuda::quant {

// What a thread knows of the elements that share a scale. Neither side is below 0.
struct Range {
  float below = 0.0f, above = 0.0f;  // -min(0, x), max(0, x); where symmetric, above is the largest magnitude
};

template <bool kAsymmetric, int kCount>
__device__ __forceinline__ void extend(Range& range, const float (&v)[kCount]) {
  if constexpr (!kAsymmetric) {
    range.above = fmaxf(range.above, largest_of(v));
  } else {
    // fmaxf passes over NaN.
#pragma unroll
    for (int e = 0; e < kCount; ++e) {
      range.below = fmaxf(range.below, -v[e]);
      range.above = fmaxf(range.above, v[e]);
    }
  }
}

__device__ __forceinline__ __half2 largest_pairs(__half2 a, __half2 b) { return __hmax2(a, b); }
__device__ __forceinline__ __nv_bfloat162 largest_pairs(__nv_bfloat162 a, __nv_bfloat162 b) { return __hmax2(a, b); }
__device__ __forceinline__ __half2 smallest_pairs(__half2 a, __half2 b) { return __hmin2(a, b); }
__device__ __forceinline__ __nv_bfloat162 smallest_pairs(__nv_bfloat162 a, __nv_bfloat162 b) { return __hmin2(a, b); }
__device__ __forceinline__ float larger_of(__half2 a) { return fmaxf(__low2float(a), __high2float(a)); }
__device__ __forceinline__ float larger_of(__nv_bfloat162 a) { return fmaxf(__low2float(a), __high2float(a)); }
__device__ __forceinline__ float smaller_of(__half2 a) { return fminf(__low2float(a), __high2float(a)); }
__device__ __forceinline__ float smaller_of(__nv_bfloat162 a) { return fminf(__low2float(a), __high2float(a)); }

// The same of elements as they are in memory: of 16 bits two at a time.
template <bool kAsymmetric, typename T, int kCount>
__device__ __forceinline__ void extend(Range& range, const Packed<T, kCount>& packed) {
  if constexpr (sizeof(T) == 2 && kCount > 1) {
    using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
    const auto pair = [](std::uint32_t word) { return *reinterpret_cast<Pair*>(&word); };
    // Maximum and minimum pass over NaN.
    Pair below = pair(0), above = pair(0);
#pragma unroll
    for (const std::uint32_t word : packed.words) {
      above = largest_pairs(above, pair(kAsymmetric ? word : word & 0x7fff7fffu));
      if constexpr (kAsymmetric) below = smallest_pairs(below, pair(word));
    }
    range.above = fmaxf(range.above, larger_of(above));
    if constexpr (kAsymmetric) range.below = fmaxf(range.below, -smaller_of(below));
  } else {
    float v[kCount];
    unpack<T, kCount>(v, packed);
    extend<kAsymmetric>(range, v);
  }
}

__device__ __forceinline__ __half2 largest_pairs_or_nan(__half2 a, __half2 b) { return __hmax2_nan(a, b); }
__device__ __forceinline__ __nv_bfloat162 largest_pairs_or_nan(__nv_bfloat162 a, __nv_bfloat162 b) { return __hmax2_nan(a, b); }

// The same with both sides, of 16-bit elements. Returns whether none is NaN.
template <typename T, int kCount>
__device__ __forceinline__ bool extend_and_check(Range& range, const Packed<T, kCount>& packed) {
  using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
  const auto pair = [](std::uint32_t word) { return *reinterpret_cast<Pair*>(&word); };
  Pair below = pair(0), above = pair(0);
#pragma unroll
  for (const std::uint32_t word : packed.words) {
    above = largest_pairs_or_nan(above, pair(word));
    below = smallest_pairs(below, pair(word));
  }
  const float sum = __low2float(above) + __high2float(above);
  if (sum != sum) {
    extend<true, T, kCount>(range, packed);
    return false;
  }
  range.above = fmaxf(range.above, larger_of(above));
  range.below = fmaxf(range.below, -smaller_of(below));
  return true;
}

// Over groups of lanes, 2^shift, with `max` of two values. Eight lanes have 128 elements, the usual group.
template <typename V, typename Max>
__device__ __forceinline__ V group_max(V value, int shift, Max&& max) {
  if (shift == 3) {
#pragma unroll
    for (int lane_mask = 4; lane_mask > 0; lane_mask /= 2) value = max(value, __shfl_xor_sync(kFullMask, value, lane_mask));
  } else {
#pragma unroll 1
    for (int lane_mask = 1 << shift >> 1; lane_mask > 0; lane_mask >>= 1) value = max(value, __shfl_xor_sync(kFullMask, value, lane_mask));
  }
  return value;
}
__device__ __forceinline__ float group_max(float value, int shift) {
  return group_max(value, shift, [](float a, float b) { return fmaxf(a, b); });
}
// Both sides, of elements of T.
template <typename T>
__device__ __forceinline__ void group_range(Range& range, int shift) {
  if constexpr (sizeof(T) == 2) {
    using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
    Pair both;
    if constexpr (std::is_same_v<T, __half>) {
      both = __floats2half2_rn(range.below, range.above);
    } else {
      both = __floats2bfloat162_rn(range.below, range.above);
    }
    both = group_max(both, shift, [](Pair a, Pair b) { return largest_pairs(a, b); });
    range.below = __low2float(both), range.above = __high2float(both);
  } else {
    range.above = group_max(range.above, shift);
    range.below = group_max(range.below, shift);
  }
}

}  // namespace quire::cuda::quant
