// What kernels of rows at one stride ask of a layout. Host code.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <optional>

#include "core/layout.h"

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

}  // namespace quire::cuda
