// Walking the rows of [..., hidden] tensors.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <limits>

#include "core/layout.h"

namespace quire::cpu {

/// The stride that holds from `row` on, and for how many rows.
struct RowRun {
  std::int64_t stride;
  std::int64_t num_rows;
};

inline RowRun row_run(const RowLayout& layout, std::int64_t row) {
  if (layout.inner_extents[1] > 1) return {layout.strides[2], layout.inner_extents[1] - row % layout.inner_extents[1]};
  if (layout.inner_extents[0] > 1) return {layout.strides[1], layout.inner_extents[0] - row % layout.inner_extents[0]};
  return {layout.strides[0], std::numeric_limits<std::int64_t>::max()};
}

}  // namespace quire::cpu
