// What kernels over rows ask of a layout and of the groups of a quantized result. Host code.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <bit>
#include <cstdint>
#include <optional>

#include "core/layout.h"
#include "cuda/device/reduce.cuh"
#include "ops/quantization.h"

namespace quire::cuda {

/// The stride of rows in units of `unit` elements, where they lie at one and the offsets of `num_rows` of them, and of `num_vectors` vectors in each, have
/// 32 bits. 0 for a single row.
inline std::optional<std::uint32_t> short_row_stride(const RowLayout& rows, std::int64_t num_rows, std::int64_t num_vectors,
                                                     std::int64_t unit) {
  if (rows.inner_extents[0] != 1 || rows.inner_extents[1] != 1) return std::nullopt;
  if (num_rows == 1) return 0;
  if (rows.strides[0] % unit != 0 || rows.strides[0] < 0 || rows.strides[0] / unit > (0xffffffff - num_vectors) / num_rows)
    return std::nullopt;
  return static_cast<std::uint32_t>(rows.strides[0] / unit);
}

/// Neighbouring lanes that hold one group's vectors of `vec` elements, where these are a power of two of a warp; else 0.
inline std::int64_t lanes_of_group(const QuantParams& p, std::int64_t vec) {
  const std::int64_t lanes = p.group_size / vec;
  return p.group_size % vec == 0 && lanes <= kWarpSize && std::has_single_bit(static_cast<std::uint64_t>(lanes)) ? lanes : 0;
}

}  // namespace quire::cuda
