// Normalisation over the last dimension. Sums are accumulated in float32.
// SPDX-License-Identifier: Apache-2.0
//
// Every function: tensors are float32, float16 or bfloat16; x, out and residual share dtype, device and shape
// [..., hidden] with unit inner stride (rank 1 to 4, any outer strides); weight and bias are [hidden], contiguous, of any
// of the three dtypes, on the same device. Work is enqueued on `stream`; nothing synchronises.
// Throws std::invalid_argument (shape, layout, alias), TypeError (dtype), UnsupportedError (no CUDA in this build), CudaError.
#pragma once

#include <cstdint>

#include "quire/export.h"
#include "quire/quantization.h"
#include "quire/stream.h"
#include "quire/tensor.h"

namespace quire {

/// out = x / sqrt(mean(x^2) + eps) * (weight + weight_offset). weight_offset = 1 is Gemma's form.
/// out may be x itself (same memory, same strides); any other overlap is refused.
QUIRE_API void rms_norm(const TensorView& out, const TensorView& x, const TensorView& weight, double eps, double weight_offset,
                        Stream stream);

/// In place: residual = x + residual, then x = rms_norm(residual). The sum is rounded to the dtype before it is normalised.
/// x and residual must not overlap.
QUIRE_API void fused_add_rms_norm(const TensorView& x, const TensorView& residual, const TensorView& weight, double eps,
                                  double weight_offset, Stream stream);

/// out = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias, with the population variance. bias may be null.
/// out may be x itself; any other overlap is refused.
QUIRE_API void layer_norm(const TensorView& out, const TensorView& x, const TensorView& weight, const TensorView* bias, double eps,
                          Stream stream);

// With quantized results (quire/quantization.h): out is float8_e4m3fn or int8 of x's shape, apart from all other memory; scales
// are what `granularity` says, and group_size, which divides hidden, counts for kGroup only.

QUIRE_API void rms_norm_quantized(const TensorView& out, const TensorView& scales, const TensorView& x, const TensorView& weight,
                                  double eps, double weight_offset, ScaleGranularity granularity, std::int64_t group_size, Stream stream);

/// residual = x + residual, rounded to its dtype, then out = rms_norm(residual). x is only read.
QUIRE_API void fused_add_rms_norm_quantized(const TensorView& out, const TensorView& scales, const TensorView& residual,
                                            const TensorView& x, const TensorView& weight, double eps, double weight_offset,
                                            ScaleGranularity granularity, std::int64_t group_size, Stream stream);

QUIRE_API void layer_norm_quantized(const TensorView& out, const TensorView& scales, const TensorView& x, const TensorView& weight,
                                    const TensorView* bias, double eps, ScaleGranularity granularity, std::int64_t group_size,
                                    Stream stream);

}  // namespace quire
