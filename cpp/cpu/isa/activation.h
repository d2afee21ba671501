// Kernels of the activations.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace quire::cpu {

/// Rows at one stride, in elements.
struct ActivationRows {
  void* out;                          // [num_rows, width]
  const void* x;                      // [num_rows, width]: the gate, when gated
  const void* up;                     // [num_rows, width], gated only
  std::int64_t out_stride, x_stride;  // up's is x's
  std::int64_t num_rows, width;
};

using ActivationKernel = void (*)(const ActivationRows& rows);

/// Indexed by [Activation][dtype], where dtype is float32, float16, bfloat16 in DType's order.
struct ActivationKernels {
  ActivationKernel run[7][3];
  ActivationKernel run_wide[3][3];  // the gated ones, with an out of float32
};

}  // namespace quire::cpu

#ifdef QUIRE_ISA_NAMESPACE
#include "cpu/isa/vec.h"

namespace quire::cpu::QUIRE_ISA_NAMESPACE {

/// x / (1 + e^exponent). With exponent -2u that is x (1 + tanh(u)) / 2 without that form's cancellation.
template <int N>
QUIRE_INLINE void logistic(Vec (&x)[N], Vec (&exponent)[N]) {
  exp(exponent);
  for (int k = 0; k < N; ++k) x[k] = x[k] / (set1(1.0f) + exponent[k]);
}

struct Silu {
  template <int N>
  static QUIRE_INLINE void apply(Vec (&x)[N]) {
    Vec exponent[N];
    for (int k = 0; k < N; ++k) exponent[k] = neg(x[k]);
    logistic(x, exponent);
  }
};
struct Gelu {
  template <int N>
  static QUIRE_INLINE void apply(Vec (&x)[N]) {
    Vec cdf[N];
    for (int k = 0; k < N; ++k) cdf[k] = x[k];
    normal_cdf(cdf);
    for (int k = 0; k < N; ++k) x[k] *= cdf[k];
  }
};
struct GeluTanh {
  template <int N>
  static QUIRE_INLINE void apply(Vec (&x)[N]) {
    constexpr float kTwoRootTwoOverPi = 1.5957691216057308f;
    Vec exponent[N];
    for (int k = 0; k < N; ++k) exponent[k] = x[k] * fma(x[k] * x[k], set1(-0.044715f * kTwoRootTwoOverPi), set1(-kTwoRootTwoOverPi));
    logistic(x, exponent);
  }
};
struct GeluQuick {
  template <int N>
  static QUIRE_INLINE void apply(Vec (&x)[N]) {
    Vec exponent[N];
    for (int k = 0; k < N; ++k) exponent[k] = x[k] * set1(-1.702f);
    logistic(x, exponent);
  }
};
struct ReluSquared {
  template <int N>
  static QUIRE_INLINE void apply(Vec (&x)[N]) {
    for (int k = 0; k < N; ++k) {
      const Vec positive = max(zero(), x[k]);
      x[k] = positive * positive;
    }
  }
};

/// N whole vectors from column i on.
template <typename F, bool kGated, int N, typename Out, typename T>
QUIRE_INLINE void activate_vectors(Out* out, const T* x, const T* up, std::int64_t i) {
  Vec y[N];
  for (int k = 0; k < N; ++k) y[k] = load(x + i + k * kLanes);
  F::apply(y);
  for (int k = 0; k < N; ++k) {
    if constexpr (kGated) y[k] *= load(up + i + k * kLanes);
    store(out + i + k * kLanes, y[k]);
  }
}

template <typename F, bool kGated, typename Out, typename T>
QUIRE_INLINE void activate_row(Out* out, const T* x, const T* up, std::int64_t width) {
  std::int64_t i = 0;
  for (; i + 4 * kLanes <= width; i += 4 * kLanes) activate_vectors<F, kGated, 4>(out, x, up, i);
  for (; i < width; i += kLanes) {
    const int left = static_cast<int>(width - i < kLanes ? width - i : kLanes);
    Vec y[1] = {load(x + i, left)};
    F::apply(y);
    if constexpr (kGated) y[0] *= load(up + i, left);
    store(out + i, y[0], left);
  }
}

template <typename F, bool kGated, typename Out, typename T>
void activate(const ActivationRows& rows) {
  for (std::int64_t row = 0; row < rows.num_rows; ++row) {
    const T* x = static_cast<const T*>(rows.x) + row * rows.x_stride;
    const T* up = kGated ? static_cast<const T*>(rows.up) + row * rows.x_stride : nullptr;
    Out* out = static_cast<Out*>(rows.out) + row * rows.out_stride;
    activate_row<F, kGated>(out, x, up, rows.width);
  }
}

#define QUIRE_KERNELS(F, kGated) \
  {activate<F, kGated, float, float>, activate<F, kGated, Half, Half>, activate<F, kGated, BFloat16, BFloat16>}
#define QUIRE_WIDE_KERNELS(F) {activate<F, true, float, float>, activate<F, true, float, Half>, activate<F, true, float, BFloat16>}

extern const ActivationKernels activation_kernels;
const ActivationKernels activation_kernels = {{
                                                  QUIRE_KERNELS(Silu, true),
                                                  QUIRE_KERNELS(Gelu, true),
                                                  QUIRE_KERNELS(GeluTanh, true),
                                                  QUIRE_KERNELS(GeluTanh, false),  // gelu_new
                                                  QUIRE_KERNELS(GeluTanh, false),  // gelu_fast: the same function, factored otherwise
                                                  QUIRE_KERNELS(GeluQuick, false),
                                                  QUIRE_KERNELS(ReluSquared, false),
                                              },
                                              {QUIRE_WIDE_KERNELS(Silu), QUIRE_WIDE_KERNELS(Gelu), QUIRE_WIDE_KERNELS(GeluTanh)}};

#undef QUIRE_WIDE_KERNELS
#undef QUIRE_KERNELS

}  // namespace quire::cpu::QUIRE_ISA_NAMESPACE
#endif
