// What ops with a quantized result hand to a backend besides their own parameters. Everything here is validated.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "core/layout.h"
#include "quire/dtype.h"
#include "quire/quantization.h"

namespace quire {

class Check;
struct TensorView;

struct QuantParams {
  float* scales = nullptr;  // kTensor: [1], read; kToken, kGroup: [num_rows, groups per row], written. Null: the result is not quantized
  ScaleGranularity granularity = ScaleGranularity::kTensor;
  DType dtype = DType::kFloat8E4M3FN;  // of the result
  std::int64_t group_size = 0;         // elements that share a scale, within a row
  RowLayout scale_rows;
  std::int64_t group_stride = 0;  // of scales

  QUIRE_HOST_DEVICE float* scale_at(std::int64_t row, std::int64_t group) const {
    return scales + scale_rows.offset(row) + group * group_stride;
  }
};

/// The largest value of a quantized dtype, by which a computed scale is made.
QUIRE_HOST_DEVICE constexpr float largest_quantized(DType dtype) { return dtype == DType::kInt8 ? 127.0f : 448.0f; }
/// Computed scales are not below this: a row of zeros has a scale that can be divided by.
inline constexpr float kSmallestScale = 0x1p-126f;

/// Checks a quantized result and its scales. `like` has the result's shape and device.
QuantParams check_quantized(const Check& check, const TensorView& out, const TensorView& scales, const TensorView& like,
                            const char* like_arg, ScaleGranularity granularity, std::int64_t group_size);

}  // namespace quire
