// Kernels of the norms: a row is read once from memory, then again from the first-level cache.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace quire::cpu {

/// Rows at one stride, in elements.
struct NormRows {
  void* out;           // [num_rows, hidden]
  const void* x;       // [num_rows, hidden]
  void* residual;      // [num_rows, hidden], fused_add_rms_norm only
  const void* weight;  // [hidden]
  const void* bias;    // [hidden] or null, of weight's dtype
  std::int64_t out_stride, x_stride, residual_stride;
  std::int64_t num_rows, hidden;
  float eps, weight_offset;
};

using NormKernel = void (*)(const NormRows& rows);

/// Indexed by [dtype][NormWeight::column()]: float32, float16, bfloat16 in DType's order, and weights of that dtype or of float32.
struct NormKernels {
  NormKernel rms_norm[3][2];
  NormKernel fused_add_rms_norm[3][2];
  NormKernel layer_norm[3][2];
  // With an out of float32.
  NormKernel rms_norm_wide[3][2];
  NormKernel fused_add_rms_norm_wide[3][2];
  NormKernel layer_norm_wide[3][2];
};

}  // namespace quire::cpu

#ifdef QUIRE_ISA_NAMESPACE
#include "cpu/isa/vec.h"

namespace quire::cpu::QUIRE_ISA_NAMESPACE {

/// Calls f(i) for each whole vector of [0, n), then tail(i, number of elements left) if any is left.
template <typename F, typename Tail>
QUIRE_INLINE void for_each_vector(std::int64_t n, F f, Tail tail) {
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) f(i);
  if (i < n) tail(i, static_cast<int>(n - i));
}

/// Sums term(vector) over a row of n elements, in four chains.
template <typename T, typename Term>
QUIRE_INLINE float sum_over_row(const T* x, std::int64_t n, Term term) {
  Vec sum0 = zero(), sum1 = zero(), sum2 = zero(), sum3 = zero();
  std::int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    sum0 = term(load(x + i), sum0);
    sum1 = term(load(x + i + kLanes), sum1);
    sum2 = term(load(x + i + 2 * kLanes), sum2);
    sum3 = term(load(x + i + 3 * kLanes), sum3);
  }
  for (; i + kLanes <= n; i += kLanes) sum0 = term(load(x + i), sum0);
  if (i < n) {
    const int left = static_cast<int>(n - i);
    sum1 = select(first_lanes(left), term(load(x + i, left), sum1), sum1);
  }
  return reduce_add((sum0 + sum1) + (sum2 + sum3));
}

/// out = (x - mean) * scale * (weight + weight_offset) + bias.
template <bool kCentre, bool kBias, typename Out, typename T, typename W>
QUIRE_INLINE void scale_row(Out* out, const T* x, const W* weight, const W* bias, std::int64_t hidden, float mean, float scale,
                            float weight_offset) {
  const Vec mean_v = set1(mean), scale_v = set1(scale), offset_v = set1(weight_offset);
  const auto scaled = [=](Vec v, Vec w) QUIRE_LAMBDA_INLINE {
    if constexpr (kCentre) return (v - mean_v) * scale_v * w;
    return v * scale_v * (w + offset_v);
  };
  for_each_vector(
      hidden,
      [&](std::int64_t i) QUIRE_LAMBDA_INLINE {
        Vec y = scaled(load(x + i), load(weight + i));
        if constexpr (kBias) y += load(bias + i);
        store(out + i, y);
      },
      [&](std::int64_t i, int left) QUIRE_LAMBDA_INLINE {
        Vec y = scaled(load(x + i, left), load(weight + i, left));
        if constexpr (kBias) y += load(bias + i, left);
        store(out + i, y, left);
      });
}

template <bool kCentre, bool kBias, typename W, typename Out, typename T>
QUIRE_INLINE void scale_row(const NormRows& rows, Out* out, const T* x, float mean, float scale) {
  scale_row<kCentre, kBias>(out, x, static_cast<const W*>(rows.weight), static_cast<const W*>(rows.bias), rows.hidden, mean, scale,
                            rows.weight_offset);
}

template <typename T>
QUIRE_INLINE float inverse_rms(const T* x, std::int64_t hidden, float eps) {
  const float sum = sum_over_row(x, hidden, [](Vec v, Vec acc) QUIRE_LAMBDA_INLINE { return fma(v, v, acc); });
  return 1.0f / __builtin_sqrtf(sum / static_cast<float>(hidden) + eps);
}

template <typename Out, typename T, typename W>
void rms_norm_to(const NormRows& rows) {
  for (std::int64_t row = 0; row < rows.num_rows; ++row) {
    const T* x = static_cast<const T*>(rows.x) + row * rows.x_stride;
    Out* out = static_cast<Out*>(rows.out) + row * rows.out_stride;
    scale_row<false, false, W>(rows, out, x, 0.0f, inverse_rms(x, rows.hidden, rows.eps));
  }
}

/// out may be x.
template <typename Out, typename T, typename W>
void fused_add_rms_norm_to(const NormRows& rows) {
  for (std::int64_t row = 0; row < rows.num_rows; ++row) {
    const T* x = static_cast<const T*>(rows.x) + row * rows.x_stride;
    Out* out = static_cast<Out*>(rows.out) + row * rows.out_stride;
    T* residual = static_cast<T*>(rows.residual) + row * rows.residual_stride;
    // The sum is stored first and read back: what is normalised is what was rounded.
    for_each_vector(
        rows.hidden, [&](std::int64_t i) QUIRE_LAMBDA_INLINE { store(residual + i, load(x + i) + load(residual + i)); },
        [&](std::int64_t i, int left) QUIRE_LAMBDA_INLINE { store(residual + i, load(x + i, left) + load(residual + i, left), left); });
    scale_row<false, false, W>(rows, out, residual, 0.0f, inverse_rms(residual, rows.hidden, rows.eps));
  }
}

template <typename Out, typename T, typename W>
void layer_norm_to(const NormRows& rows) {
  const float inverse_hidden = 1.0f / static_cast<float>(rows.hidden);
  for (std::int64_t row = 0; row < rows.num_rows; ++row) {
    const T* x = static_cast<const T*>(rows.x) + row * rows.x_stride;
    Out* out = static_cast<Out*>(rows.out) + row * rows.out_stride;
    const float mean = sum_over_row(x, rows.hidden, [](Vec v, Vec acc) QUIRE_LAMBDA_INLINE { return acc + v; }) * inverse_hidden;
    const Vec mean_v = set1(mean);
    // Deviations from the mean, not a difference of sums: that one cancels when the mean is large.
    const float variance = sum_over_row(x, rows.hidden,
                                        [mean_v](Vec v, Vec acc) QUIRE_LAMBDA_INLINE {
                                          const Vec d = v - mean_v;
                                          return fma(d, d, acc);
                                        }) *
                           inverse_hidden;
    const float scale = 1.0f / __builtin_sqrtf(variance + rows.eps);
    if (rows.bias != nullptr)
      scale_row<true, true, W>(rows, out, x, mean, scale);
    else
      scale_row<true, false, W>(rows, out, x, mean, scale);
  }
}

#define QUIRE_KERNELS_BY_WEIGHT(kernel, Out, T) {kernel<Out, T, T>, kernel<Out, T, float>}
#define QUIRE_KERNELS(kernel)                                                                  \
  {QUIRE_KERNELS_BY_WEIGHT(kernel, float, float), QUIRE_KERNELS_BY_WEIGHT(kernel, Half, Half), \
   QUIRE_KERNELS_BY_WEIGHT(kernel, BFloat16, BFloat16)}
#define QUIRE_WIDE_KERNELS(kernel)                                                              \
  {QUIRE_KERNELS_BY_WEIGHT(kernel, float, float), QUIRE_KERNELS_BY_WEIGHT(kernel, float, Half), \
   QUIRE_KERNELS_BY_WEIGHT(kernel, float, BFloat16)}

extern const NormKernels norm_kernels;
const NormKernels norm_kernels = {
    QUIRE_KERNELS(rms_norm_to),      QUIRE_KERNELS(fused_add_rms_norm_to),      QUIRE_KERNELS(layer_norm_to),
    QUIRE_WIDE_KERNELS(rms_norm_to), QUIRE_WIDE_KERNELS(fused_add_rms_norm_to), QUIRE_WIDE_KERNELS(layer_norm_to)};

#undef QUIRE_WIDE_KERNELS
#undef QUIRE_KERNELS
#undef QUIRE_KERNELS_BY_WEIGHT

}  // namespace quire::cpu::QUIRE_ISA_NAMESPACE
#endif
