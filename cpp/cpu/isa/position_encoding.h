// Kernels of the rotary position encoding.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace quire::cpu {

/// Rotates one token's heads in place: x is [num_heads, head_dim] at head_stride elements, cos_sin the table's row [rotary_dim].
using RotaryKernel = void (*)(void* x, std::int64_t head_stride, std::int64_t num_heads, const void* cos_sin, std::int64_t rotary_dim);

/// Indexed by [RopeStyle][dtype][table dtype], both dtypes float32, float16, bfloat16 in DType's order.
struct RotaryKernels {
  RotaryKernel rotate[2][3][3];
};

}  // namespace quire::cpu

#ifdef QUIRE_ISA_NAMESPACE
#include "cpu/isa/vec.h"

namespace quire::cpu::QUIRE_ISA_NAMESPACE {

// The columns are the outer loop, so that cos and sin are converted once for all heads.
template <typename T, typename C>
void rotate_neox(void* x_, std::int64_t head_stride, std::int64_t num_heads, const void* cos_sin, std::int64_t rotary_dim) {
  const std::int64_t half = rotary_dim / 2;
  const C* cos_row = static_cast<const C*>(cos_sin);
  const C* sin_row = cos_row + half;
  T* x = static_cast<T*>(x_);
  std::int64_t i = 0;
  for (; i + kLanes <= half; i += kLanes) {
    const Vec cos_v = load(cos_row + i), sin_v = load(sin_row + i);
    T* p = x + i;
    for (std::int64_t head = 0; head < num_heads; ++head, p += head_stride) {
      const Vec a = load(p), b = load(p + half);
      store(p, fma(a, cos_v, neg(b * sin_v)));
      store(p + half, fma(b, cos_v, a * sin_v));
    }
  }
  if (i < half) {
    const int left = static_cast<int>(half - i);
    const Vec cos_v = load(cos_row + i, left), sin_v = load(sin_row + i, left);
    T* p = x + i;
    for (std::int64_t head = 0; head < num_heads; ++head, p += head_stride) {
      const Vec a = load(p, left), b = load(p + half, left);
      store(p, fma(a, cos_v, neg(b * sin_v)), left);
      store(p + half, fma(b, cos_v, a * sin_v), left);
    }
  }
}

template <typename T, typename C>
void rotate_gptj(void* x_, std::int64_t head_stride, std::int64_t num_heads, const void* cos_sin, std::int64_t rotary_dim) {
  const std::int64_t half = rotary_dim / 2;
  const C* cos_row = static_cast<const C*>(cos_sin);
  const C* sin_row = cos_row + half;
  T* x = static_cast<T*>(x_);
  for (std::int64_t i = 0; i < half; i += kLanes) {
    // kLanes angles turn two vectors of pairs: x' = x * (c0 c0 c1 c1 ...) + swapped x * (-s0 s0 -s1 s1 ...).
    const int num_angles = static_cast<int>(half - i < kLanes ? half - i : kLanes);
    const Vec cos_v = load(cos_row + i, num_angles), sin_v = load(sin_row + i, num_angles);
    Vec cos_low, cos_high, sin_low, sin_high;
    interleave(cos_v, cos_v, cos_low, cos_high);
    interleave(neg(sin_v), sin_v, sin_low, sin_high);
    T* p = x + 2 * i;
    if (num_angles == kLanes) {
      for (std::int64_t head = 0; head < num_heads; ++head, p += head_stride) {
        const Vec low = load(p), high = load(p + kLanes);
        store(p, fma(low, cos_low, swap_pairs(low) * sin_low));
        store(p + kLanes, fma(high, cos_high, swap_pairs(high) * sin_high));
      }
    } else {
      const int num_low = 2 * num_angles < kLanes ? 2 * num_angles : kLanes;
      const int num_high = 2 * num_angles - num_low;
      for (std::int64_t head = 0; head < num_heads; ++head, p += head_stride) {
        const Vec low = load(p, num_low);
        store(p, fma(low, cos_low, swap_pairs(low) * sin_low), num_low);
        if (num_high == 0) continue;
        const Vec high = load(p + kLanes, num_high);
        store(p + kLanes, fma(high, cos_high, swap_pairs(high) * sin_high), num_high);
      }
    }
  }
}

#define QUIRE_KERNELS_BY_TABLE(kernel, T) {kernel<T, float>, kernel<T, Half>, kernel<T, BFloat16>}
#define QUIRE_KERNELS(kernel) \
  {QUIRE_KERNELS_BY_TABLE(kernel, float), QUIRE_KERNELS_BY_TABLE(kernel, Half), QUIRE_KERNELS_BY_TABLE(kernel, BFloat16)}

extern const RotaryKernels rotary_kernels;
const RotaryKernels rotary_kernels = {{QUIRE_KERNELS(rotate_neox), QUIRE_KERNELS(rotate_gptj)}};

#undef QUIRE_KERNELS
#undef QUIRE_KERNELS_BY_TABLE

}  // namespace quire::cpu::QUIRE_ISA_NAMESPACE
#endif
