// Kernels of the activations.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace quire::cpu {

/// Rows at one stride, in elements.
struct ActivationRows {
  void* out;      // [num_rows, width]
  const void* x;  // [num_rows, width]: the gate, when gated
  const void* up;  // [num_rows, width], gated only
  std::int64_t out_stride, x_stride;  // up's is x's
  std::int64_t num_rows, width;
  bool stream;  // write `out` past the caches
};

using ActivationKernel = void (*)(const ActivationRows& rows);

/// Indexed by [Activation][dtype], where dtype is float32, float16, bfloat16 in DType's order.
struct ActivationKernels {
  ActivationKernel run[7][3];
};

}  // namespace quire::cpu

#ifdef QUIRE_ISA_NAMESPACE
#include "cpu/isa/vec.h"

namespace quire::cpu::QUIRE_ISA_NAMESPACE {

// x / (1 + e^-u) is x (1 + tanh(u / 2)) / 2 without that form's cancellation.
struct Silu {
  static QUIRE_INLINE Vec apply(Vec x) { return x / (set1(1.0f) + exp(neg(x))); }
};
struct Gelu {
  static QUIRE_INLINE Vec apply(Vec x) { return x * normal_cdf(x); }
};
struct GeluTanh {
  static QUIRE_INLINE Vec apply(Vec x) {
    constexpr float kTwoRootTwoOverPi = 1.5957691216057308f;
    const Vec u = x * fma(x * x, set1(-0.044715f * kTwoRootTwoOverPi), set1(-kTwoRootTwoOverPi));
    return x / (set1(1.0f) + exp(u));
  }
};
struct GeluQuick {
  static QUIRE_INLINE Vec apply(Vec x) { return x / (set1(1.0f) + exp(x * set1(-1.702f))); }
};
struct ReluSquared {
  static QUIRE_INLINE Vec apply(Vec x) {
    const Vec positive = max(zero(), x);
    return positive * positive;
  }
};

template <typename F, bool kGated, bool kStream, typename T>
QUIRE_INLINE void activate_row(T* out, const T* x, const T* up, std::int64_t width) {
  std::int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) {
    Vec y = F::apply(load(x + i));
    if constexpr (kGated) y *= load(up + i);
    if constexpr (kStream)
      store_stream(out + i, y);
    else
      store(out + i, y);
  }
  if (i < width) {
    const int left = static_cast<int>(width - i);
    Vec y = F::apply(load(x + i, left));
    if constexpr (kGated) y *= load(up + i, left);
    store(out + i, y, left);
  }
}

template <typename F, bool kGated, typename T>
void activate(const ActivationRows& rows) {
  for (std::int64_t row = 0; row < rows.num_rows; ++row) {
    const T* x = static_cast<const T*>(rows.x) + row * rows.x_stride;
    const T* up = kGated ? static_cast<const T*>(rows.up) + row * rows.x_stride : nullptr;
    T* out = static_cast<T*>(rows.out) + row * rows.out_stride;
    if (rows.stream && can_stream(out))
      activate_row<F, kGated, true>(out, x, up, rows.width);
    else
      activate_row<F, kGated, false>(out, x, up, rows.width);
  }
  if (rows.stream) stream_fence();
}

#define QUIRE_KERNELS(F, kGated) {activate<F, kGated, float>, activate<F, kGated, Half>, activate<F, kGated, BFloat16>}

extern const ActivationKernels activation_kernels;
const ActivationKernels activation_kernels = {{
    QUIRE_KERNELS(Silu, true),
    QUIRE_KERNELS(Gelu, true),
    QUIRE_KERNELS(GeluTanh, true),
    QUIRE_KERNELS(GeluTanh, false),  // gelu_new
    QUIRE_KERNELS(GeluTanh, false),  // gelu_fast: the same function, factored otherwise
    QUIRE_KERNELS(GeluQuick, false),
    QUIRE_KERNELS(ReluSquared, false),
}};

#undef QUIRE_KERNELS

}  // namespace quire::cpu::QUIRE_ISA_NAMESPACE
#endif
