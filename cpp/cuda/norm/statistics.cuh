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

template <typename T>
__device__ __forceinline__ float inverse_root(float x) {
  // The error of the short form, 2 ulp of float32, is hidden by a result of fewer bits.
  return sizeof(T) == 2 ? rsqrtf(x) : __frsqrt_rn(x);
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
template <NormKind kKind, typename T, int kVec, int kVectors, typename IsInside, typename RowSum>
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
    // Rounded: fused with the subtractions, as the compiler does where the factor is a parameter, few rows would not get the bits of many.
    mean = __fmul_rn(spread, inverse_hidden);
    spread = row_sum(squares_about<T, kVec, kVectors>(mean, row, is_inside), 1);
  }
  return {mean, inverse_root<T>(fmaf(spread, inverse_hidden, eps))};
}

}  // namespace quire::cuda::norm
