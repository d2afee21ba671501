// What the norm ops hand to a backend, and the backends' entry points. Everything here is validated.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "core/layout.h"
#include "ops/quantization.h"
#include "quire/dtype.h"
#include "quire/stream.h"

namespace quire {

struct NormParams {
  void* out = nullptr;           // [num_rows, hidden], of dtype or, quantized, quant.dtype
  const void* x = nullptr;       // [num_rows, hidden]; for fused_add_rms_norm `out` is x's own memory, unless it is quantized
  void* residual = nullptr;      // [num_rows, hidden], fused_add_rms_norm only
  const void* weight = nullptr;  // [hidden]
  const void* bias = nullptr;    // [hidden] or null, layer_norm only
  DType dtype = DType::kFloat32;         // of x, residual, and out unless it is quantized
  DType weight_dtype = DType::kFloat32;  // of weight
  DType bias_dtype = DType::kFloat32;    // of bias
  std::int64_t num_rows = 0;             // > 0
  std::int64_t hidden = 0;               // > 0
  RowLayout out_rows, x_rows, residual_rows;
  float eps = 0.0f;
  float weight_offset = 0.0f;
  QuantParams quant;
};

namespace cpu {
void rms_norm(const NormParams& params);
void fused_add_rms_norm(const NormParams& params);
void layer_norm(const NormParams& params);
}  // namespace cpu

namespace cuda {
void rms_norm(const NormParams& params, Stream stream);
void fused_add_rms_norm(const NormParams& params, Stream stream);
void layer_norm(const NormParams& params, Stream stream);
}  // namespace cuda

}  // namespace quire
