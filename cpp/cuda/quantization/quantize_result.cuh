// Scale and zero point from a range, and elements that are divided, rounded and stored.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/device/quantize.cuh"
#include "cuda/quantization/quantize_launch.h"
#include "cuda/quantization/quantize_range.cuh"
#include "ops/quantization.h"

namespace quire::cuda::quant {

__device__ __forceinline__ int in_range(int zero_point) { return min(max(zero_point, -128), 127); }

struct ScaleAndZero {
  float scale;
  int zero_point;
};

template <Result kResult>
__device__ __forceinline__ ScaleAndZero computed(const QuantizeParams& p, const Range& range) {
  if constexpr (kResult != Result::kAsymmetricInt8) {
    return {computed_scale(fminf(range.above, p.scale_bound), kResult == Result::kInt8), 0};
  } else {
    const float span = range.above + range.below, reciprocal = 1.0f / 255.0f;
    // As in computed_scale.
    const float estimate = span * reciprocal;
    const float quotient = fmaf(fmaf(-estimate, 255.0f, span), reciprocal, estimate);
    const float scale = span <= 0x1.fffffep127f ? fmaxf(quotient, kSmallestScale) : span;
    float shift[1] = {-range.below};
    Divisor(scale).divide_bounded(shift);
    // Of an infinite range the shift is NaN.
    return {scale, in_range(-128 - (shift[0] == shift[0] ? __float2int_rn(shift[0]) : 512))};
  }
}

// NaN stays.
template <int kCount>
__device__ __forceinline__ void clamp_to(float (&v)[kCount], float limit) {
#pragma unroll
  for (int e = 0; e < kCount; ++e) {
    if (v[e] > limit) v[e] = limit;
    if (v[e] < -limit) v[e] = -limit;
  }
}

template <Result kResult>
__device__ __forceinline__ void write_scale(const QuantizeParams& p, std::int64_t row, std::int64_t group, const ScaleAndZero& value) {
  *p.quant.scale_at(row, group) = value.scale;
  if constexpr (kResult == Result::kAsymmetricInt8) *p.zero_point_at(row, group) = value.zero_point;
}

template <Result kResult>
__device__ __forceinline__ ScaleAndZero read_scale(const QuantizeParams& p, std::int64_t row, std::int64_t group) {
  ScaleAndZero value{*p.quant.scale_at(row, group), 0};
  if constexpr (kResult == Result::kAsymmetricInt8) value.zero_point = in_range(*p.zero_point_at(row, group));
  return value;
}

// Four integers as int8, the first in the low byte.
__device__ __forceinline__ std::uint32_t pack_saturated(int a, int b, int c, int d) {
  std::uint32_t word;
  asm("{\n.reg .b32 high;\n"
      "cvt.pack.sat.s8.s32.b32 high, %4, %3, 0;\n"
      "cvt.pack.sat.s8.s32.b32 %0, %2, %1, high;\n}\n"
      : "=r"(word)
      : "r"(a), "r"(b), "r"(c), "r"(d));
  return word;
}

// A scale, and what divides by it.
struct Quantizer {
  ScaleAndZero value;
  Divisor divisor;
  __device__ __forceinline__ explicit Quantizer(const ScaleAndZero& from) : value(from), divisor(from.scale) {}
};

// The largest magnitude; NaN where there is one.
template <int kCount>
__device__ __forceinline__ float largest_or_nan(const float (&v)[kCount]) {
  float largest = 0.0f;
#pragma unroll
  for (const float x : v) asm("max.NaN.f32 %0, %0, %1;" : "+f"(largest) : "f"(fabsf(x)));
  return largest;
}

// Quotients rounded, plus the zero point. ordinary: they are numbers up to 2^21.
template <int kCount>
__device__ __forceinline__ void store_rounded(void* out, float (&v)[kCount], int zero_point, bool ordinary) {
  if (!ordinary) {
#pragma unroll
    for (float& x : v) x = x == x ? fminf(fmaxf(x, -512.0f), 512.0f) : 0.0f;
  }
  // A number that has no bits below 1: the addition rounds, and leaves an integer in the low bits.
  constexpr float kRounds = 0x1.8p23f;
  int integers[kCount];
#pragma unroll
  for (int e = 0; e < kCount; ++e) integers[e] = __float_as_int(v[e] + kRounds) + (zero_point - __float_as_int(kRounds));
  Packed<std::int8_t, kCount> result;
  if constexpr (kCount == 1) {
    result.byte = static_cast<std::uint8_t>(pack_saturated(integers[0], 0, 0, 0));
  } else {
#pragma unroll
    for (int i = 0; i < kCount / 4; ++i)
      result.words[i] = pack_saturated(integers[4 * i], integers[4 * i + 1], integers[4 * i + 2], integers[4 * i + 3]);
  }
  store_raw(out, result);
}

// v over the scale, rounded, plus the zero point. kComputed: the scale is that of the elements' own range.
template <bool kComputed, int kCount>
__device__ __forceinline__ void store_asymmetric(void* out, float (&v)[kCount], const Quantizer& by) {
  bool ordinary;
  if constexpr (kComputed) {
    by.divisor.divide_bounded(v);
    float sum = 0.0f;
#pragma unroll
    for (const float x : v) sum += x;
    ordinary = sum == sum;
  } else {
    // A quotient up to 2^20 is an integer once it is rounded below; so is its sum with a zero point.
    const float scale = by.value.scale;
    ordinary = largest_or_nan(v) <= fminf(scale * 0x1p20f, 0x1.fffffep127f) && scale >= kSmallestScale;
    if (ordinary) {
      by.divisor.divide_bounded(v);
    } else {
      by.divisor.divide(v);
    }
  }
  store_rounded(out, v, by.value.zero_point, ordinary);
}

// The result's elements from `out` on. kComputed: the scale is one of the elements' own.
template <Result kResult, bool kComputed, int kCount>
__device__ __forceinline__ void store(const QuantizeParams& p, void* out, float (&v)[kCount], const Quantizer& by) {
  using Q = std::conditional_t<kResult == Result::kFloat8, __nv_fp8_e4m3, std::int8_t>;
  if constexpr (kResult == Result::kAsymmetricInt8) {
    store_asymmetric<kComputed>(out, v, by);
  } else if constexpr (kComputed) {
    if (p.scale_bound <= 0x1.fffffep127f) clamp_to(v, by.value.scale * 512.0f);
    store_raw(out, by.divisor.template divide_bounded_and_pack<Q>(v));
  } else if constexpr (kResult == Result::kInt8) {
    by.divisor.divide(v);
    store_raw(out, pack<Q, kCount>(v));
  } else {
    store_raw(out, by.divisor.template divide_and_pack<Q>(v));
  }
}

}  // namespace quire::cuda::quant
