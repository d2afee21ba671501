// Division by a scale and rounding to an 8-bit type, without a division per element.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "vector.cuh"

namespace quire::cuda {

// Out of line: scales that are no ordinary numbers are not worth code in every kernel.
static __device__ __noinline__ float divide_any(float x, float scale) { return __fdiv_rn(x, scale); }

/// Division by one scale to an 8-bit type, with the result of float32 division, bit for bit.
class Divisor {
 public:
  __device__ __forceinline__ explicit Divisor(float scale) : scale_(scale) {
    // Inside this range no intermediate of a quotient that an 8-bit type tells from 0 or from its largest value overflows or
    // loses bits.
    in_range_ = fabsf(scale) >= 0x1p-60f && fabsf(scale) <= 0x1p60f;
    float estimate;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(estimate) : "f"(scale));
    reciprocal_ = fmaf(fmaf(-scale, estimate, 1.0f), estimate, estimate);
    // Two products enclose every quotient; a power of two has an exact reciprocal.
    const float margin = (__float_as_uint(scale) & 0x7fffffu) == 0u ? 0.0f : reciprocal_ * 0x1p-21f;
    low_ = reciprocal_ - margin;
    high_ = reciprocal_ + margin;
  }

  template <typename CacheT, int kVec>
  __device__ __forceinline__ Packed<CacheT, kVec> divide_and_pack(float (&v)[kVec]) const {
    if (in_range_) {
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
    } else {
#pragma unroll
      for (int e = 0; e < kVec; ++e) v[e] = divide_any(v[e], scale_);
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

  float scale_, reciprocal_, low_, high_;
  bool in_range_;
};

}  // namespace quire::cuda
