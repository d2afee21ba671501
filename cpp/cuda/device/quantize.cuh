// Quantized results: scales, and vectors divided by them.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "divisor.cuh"

namespace quire::cuda {

/// The largest magnitude that is not NaN, or 0.
template <int kVec>
__device__ __forceinline__ float largest_of(const float (&v)[kVec]) {
  // fmaxf passes over NaN.
  float largest = 0.0f;
#pragma unroll
  for (int e = 0; e < kVec; ++e) largest = fmaxf(largest, fabsf(v[e]));
  return largest;
}

/// The scale of elements up to `largest` in a type up to `largest_stored`, not below the smallest normal number.
__device__ __forceinline__ float computed_scale(float largest, float largest_stored) {
  return fmaxf(__fdiv_rn(largest, largest_stored), 0x1p-126f);
}

/// Elements [at, at + kVec) of an int8 or e4m3 result.
template <int kVec>
__device__ __forceinline__ void store_quantized(void* out, std::int64_t at, bool is_int8, float (&v)[kVec], const Divisor& divisor) {
  if (is_int8) {
    store_raw(static_cast<std::int8_t*>(out) + at, divisor.divide_and_pack<std::int8_t>(v));
  } else {
    store_raw(static_cast<__nv_fp8_e4m3*>(out) + at, divisor.divide_and_pack<__nv_fp8_e4m3>(v));
  }
}

}  // namespace quire::cuda
