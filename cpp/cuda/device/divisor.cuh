// Division by a scale and rounding to an 8-bit type, without a division per element.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "vector.cuh"

namespace quire::cuda {

/// Division by one scale to an 8-bit type, with the result of float32 division, bit for bit.
class Divisor {
 public:
  __device__ __forceinline__ explicit Divisor(float scale) : scale_(scale) {
    // Inside a range, no intermediate of a quotient that an 8-bit type tells from 0 or from its largest value overflows or loses bits.
    // A power of two brings every scale there, and dividends that it takes to 0 or to infinity have such quotients.
    const float magnitude = fabsf(scale);
    factor_ = magnitude < 0x1p-60f ? 0x1p96f : magnitude > 0x1p60f ? 0x1p-96f : 1.0f;
    scale_ *= factor_;
    float estimate;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(estimate) : "f"(scale_));
    reciprocal_ = fmaf(fmaf(-scale_, estimate, 1.0f), estimate, estimate);
    // Two products enclose every quotient; a power of two has an exact reciprocal.
    float margin = (__float_as_uint(scale_) & 0x7fffffu) == 0u ? 0.0f : reciprocal_ * 0x1p-21f;
    // 0, infinity and NaN: the product is the quotient, and there is no residue.
    if (!(magnitude > 0.0f && magnitude < __int_as_float(0x7f800000))) {
      reciprocal_ = estimate;
      margin = scale_ = 0.0f;
    }
    low_ = reciprocal_ - margin;
    high_ = reciprocal_ + margin;
  }

  /// For a scale that is the largest magnitude of a row or a group over the largest value of CacheT: no quotient overflows, and one
  /// residual correction of every element is less work than to enclose it.
  template <typename CacheT, int kVec>
  __device__ __forceinline__ Packed<CacheT, kVec> divide_bounded_and_pack(float (&v)[kVec]) const {
    divide_bounded(v);
    return pack<CacheT, kVec>(v);
  }
  /// The same, not rounded to 8 bits.
  template <int kVec>
  __device__ __forceinline__ void divide_bounded(float (&v)[kVec]) const {
    if (factor_ != 1.0f) {
#pragma unroll
      for (int e = 0; e < kVec; ++e) v[e] *= factor_;
    }
#pragma unroll
    for (int e = 0; e < kVec; ++e) {
      // In this order, a zero keeps its sign.
      const float estimate = v[e] * reciprocal_;
      v[e] = fmaf(-fmaf(estimate, scale_, -v[e]), reciprocal_, estimate);
    }
  }

  /// Any quotients, not rounded to 8 bits. What overflows is infinite, or as good as that for 8 bits.
  template <int kVec>
  __device__ __forceinline__ void divide(float (&v)[kVec]) const {
    if (factor_ != 1.0f) {
#pragma unroll
      for (int e = 0; e < kVec; ++e) v[e] *= factor_;
    }
#pragma unroll
    for (int e = 0; e < kVec; ++e) {
      // Bounded, an estimate leaves the residue finite where v is, and an infinite or NaN residue says what v is.
      const float estimate = fmaxf(fminf(v[e] * reciprocal_, 0x1p20f), -0x1p20f);
      v[e] = fmaf(-fmaf(estimate, scale_, -v[e]), reciprocal_, estimate);
    }
  }

  template <typename CacheT, int kVec>
  __device__ __forceinline__ Packed<CacheT, kVec> divide_and_pack(float (&v)[kVec]) const {
    if (factor_ != 1.0f) {
#pragma unroll
      for (int e = 0; e < kVec; ++e) v[e] *= factor_;
    }
    float low[kVec], high[kVec];
#pragma unroll
    for (int e = 0; e < kVec; ++e) {
      low[e] = v[e] * low_;
      high[e] = v[e] * high_;
    }
    // Where both round to one 8-bit value, so does the quotient between them: nearly always, unless many quotients are ties.
    const Packed<CacheT, kVec> result = pack<CacheT, kVec>(low);
    if (is_same(result, pack<CacheT, kVec>(high))) return result;
    // Two residual corrections make an estimate the correctly rounded quotient.
#pragma unroll
    for (int e = 0; e < kVec; ++e) {
      const float estimate = v[e] * reciprocal_;
      float quotient = fmaf(fmaf(-estimate, scale_, v[e]), reciprocal_, estimate);
      quotient = fmaf(fmaf(-quotient, scale_, v[e]), reciprocal_, quotient);
      // A zero keeps its sign; what saturates, Inf and NaN stay as they are.
      const float magnitude = fabsf(estimate);
      v[e] = magnitude > 0.0f && magnitude < 0x1p20f ? quotient : estimate;
    }
    return pack<CacheT, kVec>(v);
  }

 private:
  template <int kBytes>
  __device__ __forceinline__ static bool is_same(const RawVector<kBytes>& a, const RawVector<kBytes>& b) {
    if constexpr (kBytes == 1) {
      return a.byte == b.byte;
    } else {
      std::uint32_t difference = 0;
#pragma unroll
      for (int i = 0; i < kBytes / 4; ++i) difference |= a.words[i] ^ b.words[i];
      return difference == 0;
    }
  }

  float scale_, factor_, reciprocal_, low_, high_;
};

}  // namespace quire::cuda
