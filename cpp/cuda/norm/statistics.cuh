// What the kernels of norms share: the sum of the fused form, a row's statistics, a normalised vector.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "cuda/device/reduce.cuh"
#include "cuda/device/vector.cuh"

namespace quire::cuda::norm {

enum class NormKind { kRms, kAddRms, kLayer };

// The rounded sum of the fused form.
template <typename T, int kVec>
__device__ __forceinline__ Packed<T, kVec> add(const Packed<T, kVec>& x, const Packed<T, kVec>& residual) {
  float a[kVec], b[kVec];
  unpack<T, kVec>(a, x);
  unpack<T, kVec>(b, residual);
#pragma unroll
  for (int e = 0; e < kVec; ++e) a[e] += b[e];
  return pack<T, kVec>(a);
}

struct Statistics {
  float mean, inverse;  // of layer_norm alone; 1 / sqrt(variance or mean square + eps)
};

template <NormKind kKind, int kVec>
__device__ __forceinline__ void normalise(float (&v)[kVec], const float (&weight)[kVec], const float (&bias)[kVec],
                                          const Statistics& statistics) {
#pragma unroll
  for (int e = 0; e < kVec; ++e) {
    if constexpr (kKind == NormKind::kLayer) {
      v[e] = fmaf((v[e] - statistics.mean) * statistics.inverse, weight[e], bias[e]);
    } else {
      v[e] = v[e] * statistics.inverse * weight[e];
    }
  }
}

// The short form's error, 2 ulp of float32, is hidden by what comes from 16 bits. Many quantized rows of the fused form are slower with it, as
// their registers are dealt out otherwise.
template <NormKind kKind, typename T, bool kQuantizes, bool kManyRows>
inline constexpr bool kHasShortRoot = sizeof(T) == 2 && !(kKind == NormKind::kAddRms && kQuantizes && kManyRows);

template <bool kShort>
__device__ __forceinline__ float inverse_root(float x) {
  return kShort ? rsqrtf(x) : __frsqrt_rn(x);
}

// What a thread's vectors add to the sum about `mean` of squares.
template <typename T, int kVec, int kVectors, typename IsInside>
__device__ __forceinline__ float squares_about(float mean, const Packed<T, kVec> (&row)[kVectors], const IsInside& is_inside) {
  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    float v[kVec], vector_sum = 0.0f;
    unpack<T, kVec>(v, row[i]);
#pragma unroll
    for (int e = 0; e < kVec; ++e) vector_sum = fmaf(v[e] - mean, v[e] - mean, vector_sum);
    squares += is_inside(i) ? vector_sum : 0.0f;
  }
  return squares;
}

// Of a row in the registers of its threads, all of which get them. row_sum(value, turn) adds up a value of each thread; turn is 0, then 1.
template <NormKind kKind, bool kShortRoot, typename T, int kVec, int kVectors, typename IsInside, typename RowSum>
__device__ __forceinline__ Statistics statistics_of(const Packed<T, kVec> (&row)[kVectors], float inverse_hidden, float eps,
                                                    const IsInside& is_inside, const RowSum& row_sum) {
  // A sum of its own for each vector keeps the chains of dependent additions short.
  float sum = 0.0f, mean = 0.0f;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    float v[kVec], vector_sum = 0.0f;
    unpack<T, kVec>(v, row[i]);
#pragma unroll
    for (int e = 0; e < kVec; ++e) vector_sum = kKind == NormKind::kLayer ? vector_sum + v[e] : fmaf(v[e], v[e], vector_sum);
    sum += is_inside(i) ? vector_sum : 0.0f;
  }
  float spread = row_sum(sum, 0);
  if constexpr (kKind == NormKind::kLayer) {
    // Rounded: fused with the subtractions, as the compiler does where the factor is a parameter, dense rows would not get
    // the bits of others.
    mean = __fmul_rn(spread, inverse_hidden);
    spread = row_sum(squares_about<T, kVec, kVectors>(mean, row, is_inside), 1);
  }
  return {mean, inverse_root<kShortRoot>(fmaf(spread, inverse_hidden, eps))};
}

// Sums over a thread's vectors, or over more.
struct Moments {
  float sum, squares;
};

// Over a CTA of more than one warp, as cta_sum(): half of a warp goes on with the sums, the other half with the squares. `scratch` is aligned to 16 bytes.
__device__ __forceinline__ Moments cta_moments(Moments value, float2 (&scratch)[kWarpSize], std::uint32_t thread, std::uint32_t num_warps) {
  constexpr std::uint32_t kHalf = kWarpSize / 2;
  const std::uint32_t lane = thread % kWarpSize, entry = thread / kWarpSize + lane % kHalf * num_warps;
  const bool is_low = lane < kHalf;
  float own = is_low ? value.sum : value.squares;
  own += __shfl_xor_sync(kFullMask, is_low ? value.squares : value.sum, kHalf);
#pragma unroll
  for (int lane_mask = kHalf / 2; lane_mask > 0; lane_mask /= 2) own += __shfl_xor_sync(kFullMask, own, lane_mask);
  if (entry < kWarpSize) reinterpret_cast<float*>(scratch)[2 * entry + lane / kHalf] = lane % kHalf == 0 ? own : 0.0f;
  __syncthreads();
  if (num_warps <= 8) {
    const float4 a = *reinterpret_cast<const float4*>(&scratch[0]), b = *reinterpret_cast<const float4*>(&scratch[2]);
    Moments sums{(a.x + a.z) + (b.x + b.z), (a.y + a.w) + (b.y + b.w)};
    if (num_warps > 4) {
      const float4 c = *reinterpret_cast<const float4*>(&scratch[4]), d = *reinterpret_cast<const float4*>(&scratch[6]);
      sums.sum += (c.x + c.z) + (d.x + d.z);
      sums.squares += (c.y + c.w) + (d.y + d.w);
    }
    return sums;
  }
  const float2 sums = scratch[lane];
  return {warp_sum(sums.x), warp_sum(sums.y)};
}

// The statistics of layer_norm in one sweep, which has one wait for all threads of a row instead of two. row_moments(sums) adds up those of each thread.
// The variance lacks the digits that the mean's square takes from the mean square: a row whose mean is over twice its deviation is swept again, and
// so is one whose squares are no number.
template <typename T, int kVec, int kVectors, typename IsInside, typename RowMoments, typename RowSum>
__device__ __forceinline__ Statistics layer_statistics_of(const Packed<T, kVec> (&row)[kVectors], float inverse_hidden, float eps,
                                                          const IsInside& is_inside, const RowMoments& row_moments, const RowSum& row_sum) {
  Moments moments{};
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    float v[kVec], vector_sum = 0.0f, vector_squares = 0.0f;
    unpack<T, kVec>(v, row[i]);
#pragma unroll
    for (int e = 0; e < kVec; ++e) {
      vector_sum += v[e];
      vector_squares = fmaf(v[e], v[e], vector_squares);
    }
    moments.sum += is_inside(i) ? vector_sum : 0.0f;
    moments.squares += is_inside(i) ? vector_squares : 0.0f;
  }
  moments = row_moments(moments);
  const float mean = __fmul_rn(moments.sum, inverse_hidden);
  float variance = fmaf(-mean, mean, __fmul_rn(moments.squares, inverse_hidden));
  if (!(mean * mean <= 4.0f * variance && variance <= 0x1.fffffep127f))
    variance = __fmul_rn(row_sum(squares_about<T, kVec, kVectors>(mean, row, is_inside)), inverse_hidden);
  return {mean, inverse_root<true>(variance + eps)};
}

}  // namespace quire::cuda::norm
