// Kernels of quantized results: what a scale is made from. Dividing and rounding is the business of cpu/isa/kv_cache.h.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace quire::cpu {

struct QuantizationKernels {
  /// The largest |x[i]| that is not NaN, or 0.
  float (*largest)(const float* x, std::int64_t n);
  /// The smallest and the largest of 0 and the x[i] that are not NaN.
  void (*range)(const float* x, std::int64_t n, float* low, float* high);
  /// out = saturate(round(x / scale) + zero_point), zero_point in [-128, 127]; NaN becomes zero_point.
  void (*quantize_asymmetric)(std::int8_t* out, const float* x, std::int64_t n, float scale, std::int32_t zero_point);
};

}  // namespace quire::cpu

#ifdef QUIRE_ISA_NAMESPACE
#include "cpu/isa/vec.h"

namespace quire::cpu::QUIRE_ISA_NAMESPACE {

inline float largest_magnitude(const float* x, std::int64_t n) {
  // max() gives its second operand where the first is NaN.
  Vec largest0 = zero(), largest1 = zero();
  std::int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    largest0 = max(abs(load(x + i)), largest0);
    largest1 = max(abs(load(x + i + kLanes)), largest1);
  }
  for (; i + kLanes <= n; i += kLanes) largest0 = max(abs(load(x + i)), largest0);
  if (i < n) largest1 = max(abs(load(x + i, static_cast<int>(n - i))), largest1);
  return reduce_max(max(largest0, largest1));
}

inline void range(const float* x, std::int64_t n, float* low, float* high) {
  // min() and max() give their second operand where the first is NaN.
  Vec low_v = zero(), high_v = zero();
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    low_v = min(load(x + i), low_v);
    high_v = max(load(x + i), high_v);
  }
  if (i < n) {
    const Vec last = load(x + i, static_cast<int>(n - i));
    low_v = min(last, low_v);
    high_v = max(last, high_v);
  }
  *low = -reduce_max(neg(low_v));
  *high = reduce_max(high_v);
}

inline void quantize_asymmetric(std::int8_t* out, const float* x, std::int64_t n, float scale, std::int32_t zero_point) {
  const Vec scale_v = set1(scale), zero_v = set1(static_cast<float>(zero_point));
  const auto quantized = [=](Vec v) QUIRE_LAMBDA_INLINE {
    v = v / scale_v;
    v = max(min(select(is_nan(v), zero(), v), set1(512.0f)), set1(-512.0f));
    // Adding 1.5 * 2^23 rounds to an integer.
    return (v + set1(0x1.8p23f)) - set1(0x1.8p23f) + zero_v;
  };
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, quantized(load(x + i)));
  if (i < n) store(out + i, quantized(load(x + i, static_cast<int>(n - i))), static_cast<int>(n - i));
}

extern const QuantizationKernels quantization_kernels;
const QuantizationKernels quantization_kernels = {largest_magnitude, range, quantize_asymmetric};

}  // namespace quire::cpu::QUIRE_ISA_NAMESPACE
#endif
