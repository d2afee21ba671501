// Activations of the feed-forward layer, gated and plain. Arithmetic is in float32.
// SPDX-License-Identifier: Apache-2.0
//
// Every function: tensors are float32, float16 or bfloat16, out and x share dtype and device, rank 1 to 4, unit inner
// stride, any outer strides. Work is enqueued on `stream`; nothing synchronises.
// Throws std::invalid_argument (shape, layout, alias), TypeError (dtype), UnsupportedError (no CUDA in this build), CudaError.
#pragma once

#include <cstdint>

#include "quire/export.h"
#include "quire/quantization.h"
#include "quire/stream.h"
#include "quire/tensor.h"

namespace quire {

// Gated: x is [..., 2 * d] = gate | up, out is [..., d] and must not overlap x.

/// out = silu(gate) * up, silu(g) = g / (1 + exp(-g)).
QUIRE_API void silu_and_mul(const TensorView& out, const TensorView& x, Stream stream);
/// out = gelu(gate) * up, gelu(g) = g / 2 * (1 + erf(g / sqrt(2))).
QUIRE_API void gelu_and_mul(const TensorView& out, const TensorView& x, Stream stream);
/// out = gelu_tanh(gate) * up, gelu_tanh(g) = g / 2 * (1 + tanh(sqrt(2 / pi) * (g + 0.044715 g^3))).
QUIRE_API void gelu_tanh_and_mul(const TensorView& out, const TensorView& x, Stream stream);

// Gated, with quantized results (quire/quantization.h): out is float8_e4m3fn or int8 [..., d]; scales are what `granularity` says, and
// group_size, which divides d, counts for kGroup only.

QUIRE_API void silu_and_mul_quantized(const TensorView& out, const TensorView& scales, const TensorView& x, ScaleGranularity granularity,
                                      std::int64_t group_size, Stream stream);
QUIRE_API void gelu_and_mul_quantized(const TensorView& out, const TensorView& scales, const TensorView& x, ScaleGranularity granularity,
                                      std::int64_t group_size, Stream stream);
QUIRE_API void gelu_tanh_and_mul_quantized(const TensorView& out, const TensorView& scales, const TensorView& x,
                                           ScaleGranularity granularity, std::int64_t group_size, Stream stream);

// Plain: out and x have one shape; out may be x itself, any other overlap is refused.

/// out = x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))).
QUIRE_API void gelu_new(const TensorView& out, const TensorView& x, Stream stream);
/// out = x / 2 * (1 + tanh(0.7978845608 x * (1 + 0.044715 x^2))).
QUIRE_API void gelu_fast(const TensorView& out, const TensorView& x, Stream stream);
/// out = x / (1 + exp(-1.702 x)).
QUIRE_API void gelu_quick(const TensorView& out, const TensorView& x, Stream stream);
/// out = max(x, 0)^2.
QUIRE_API void relu_squared(const TensorView& out, const TensorView& x, Stream stream);

}  // namespace quire
