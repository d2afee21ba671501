// What the activation ops hand to a backend, and the backends' entry points. Everything here is validated.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "core/layout.h"
#include "ops/quantization.h"
#include "quire/dtype.h"
#include "quire/stream.h"

namespace quire {

enum class Activation { kSilu, kGelu, kGeluTanh, kGeluNew, kGeluFast, kGeluQuick, kReluSquared };

struct ActivationParams {
  void* out = nullptr;      // [num_rows, width], of dtype or, quantized, quant.dtype
  const void* x = nullptr;  // gated: [num_rows, 2 * width], gate first; plain: [num_rows, width]
  DType dtype = DType::kFloat32;
  Activation activation = Activation::kSilu;  // kSilu, kGelu, kGeluTanh are gated; the others plain
  bool gated = false;
  std::int64_t num_rows = 0;  // > 0
  std::int64_t width = 0;     // > 0
  RowLayout out_rows, x_rows;
  QuantParams quant;  // gated only
};

namespace cpu {
void activation(const ActivationParams& params);
}
namespace cuda {
void activation(const ActivationParams& params, Stream stream);
}

}  // namespace quire
