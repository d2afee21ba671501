// Kernels of quantized results: what a scale is made from. Dividing and rounding is the business of cpu/isa/kv_cache.h.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace quire::cpu {

struct QuantizationKernels {
  /// The largest |x[i]| that is not NaN, or 0.
  float (*largest)(const float* x, std::int64_t n);
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

extern const QuantizationKernels quantization_kernels;
const QuantizationKernels quantization_kernels = {largest_magnitude};

}  // namespace quire::cpu::QUIRE_ISA_NAMESPACE
#endif
