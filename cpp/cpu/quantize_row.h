// A row of float32 results becomes a quantized row with its scales.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/isa/tables.h"
#include "ops/quantization.h"

namespace quire::cpu {

/// out = saturate(y / scale) for row `row` of `width` elements; computes the scales that are not given.
inline void quantize_row(const QuantParams& p, void* out, const float* y, std::int64_t row, std::int64_t width) {
  const KvKernel convert = kv_kernels.active().write[static_cast<std::size_t>(DType::kFloat32)][static_cast<std::size_t>(p.dtype)];
  const auto store = [&](std::int64_t begin, std::int64_t count, const float* scale) {
    convert({static_cast<char*>(out) + begin, y + begin, 0, 0, 1, count, scale, 0});
  };
  if (p.granularity == ScaleGranularity::kTensor) return store(0, width, p.scales);
  for (std::int64_t begin = 0; begin < width; begin += p.group_size) {
    const float largest = quantization_kernels.active().largest(y + begin, p.group_size);
    float* const scale = p.scale_at(row, begin / p.group_size);
    *scale = std::max(largest / largest_quantized(p.dtype), kSmallestScale);
    store(begin, p.group_size, scale);
  }
}

}  // namespace quire::cpu
