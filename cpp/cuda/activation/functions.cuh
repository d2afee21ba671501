// The activation functions on one float32, and what the files of this folder share.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "ops/activation.h"

namespace quire::cuda {

/// activation_quantized.cu: gated activations with a quantized result.
void activation_quantized(const ActivationParams& params, Stream stream);

/// exp(x) and a / b: a 16-bit result hides the error of the fast forms (2 ulp), a float32 one does not.
template <bool kPrecise>
__device__ __forceinline__ float exponential(float x) {
  return kPrecise ? expf(x) : __expf(x);
}
template <bool kPrecise>
__device__ __forceinline__ float quotient(float a, float b) {
  // The approximate division gives 0 for a divisor above 2^126, which is where the quotient vanishes anyway.
  return kPrecise ? a / b : __fdividef(a, b);
}

template <Activation kActivation, bool kPrecise>
__device__ __forceinline__ float activate(float x) {
  constexpr float kSqrt2OverPi = 0.7978845608028654f;
  // (1 + tanh(u)) / 2 = 1 / (1 + exp(-2 u)), which also keeps the relative accuracy of small results.
  const auto gated_by = [&](float two_u) { return quotient<kPrecise>(x, 1.0f + exponential<kPrecise>(-two_u)); };
  if constexpr (kActivation == Activation::kSilu) {
    return gated_by(x);
  } else if constexpr (kActivation == Activation::kGelu) {
    // erfc keeps the digits of the lower tail that 1 + erf loses.
    return 0.5f * x * erfcf(x * -0.7071067811865476f);
  } else if constexpr (kActivation == Activation::kGeluTanh || kActivation == Activation::kGeluNew) {
    return gated_by(2.0f * kSqrt2OverPi * fmaf(0.044715f * x * x, x, x));
  } else if constexpr (kActivation == Activation::kGeluFast) {
    return gated_by(2.0f * 0.7978845608f * x * fmaf(0.044715f * x, x, 1.0f));
  } else if constexpr (kActivation == Activation::kGeluQuick) {
    return gated_by(1.702f * x);
  } else {
    // Written so that NaN stays NaN.
    const float positive = x < 0.0f ? 0.0f : x;
    return positive * positive;
  }
}

template <Activation kActivation>
constexpr bool kIsGated = kActivation == Activation::kSilu || kActivation == Activation::kGelu || kActivation == Activation::kGeluTanh;

}  // namespace quire::cuda
