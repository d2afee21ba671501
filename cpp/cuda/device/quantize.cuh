// Quantized results: scales, and vectors divided by them.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <type_traits>

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

/// The scale of elements up to `largest` in int8 or e4m3, not below the smallest normal number.
__device__ __forceinline__ float computed_scale(float largest, bool is_int8) {
  // A division by a constant: one residual correction makes the product with its reciprocal the correctly rounded quotient.
  const float divisor = is_int8 ? 127.0f : 448.0f, reciprocal = is_int8 ? 1.0f / 127.0f : 1.0f / 448.0f;
  const float estimate = largest * reciprocal;
  const float quotient = fmaf(fmaf(-estimate, divisor, largest), reciprocal, estimate);
  return largest <= 0x1.fffffep127f ? fmaxf(quotient, 0x1p-126f) : largest;
}

/// Elements [at, at + kVec) of an int8 or e4m3 result. kBounded: the scale is a computed one.
template <bool kBounded, int kVec>
__device__ __forceinline__ void store_quantized(void* out, std::int64_t at, bool is_int8, float (&v)[kVec], const Divisor& divisor) {
  const auto divided = [&](auto* element) {
    using Q = std::remove_pointer_t<decltype(element)>;
    if constexpr (kBounded) {
      return divisor.template divide_bounded_and_pack<Q>(v);
    } else {
      return divisor.template divide_and_pack<Q>(v);
    }
  };
  if (is_int8) {
    store_raw(static_cast<std::int8_t*>(out) + at, divided(static_cast<std::int8_t*>(nullptr)));
  } else {
    store_raw(static_cast<__nv_fp8_e4m3*>(out) + at, divided(static_cast<__nv_fp8_e4m3*>(nullptr)));
  }
}

}  // namespace quire::cuda
