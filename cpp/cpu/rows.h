// Walking the rows of [..., hidden] tensors, and when to write past the caches.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <unistd.h>

#include <algorithm>
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

/// Output that the last-level cache cannot keep is written past it: that saves reading the lines first.
inline bool worth_streaming(std::int64_t output_bytes) {
  static const std::int64_t last_level_bytes = [] {
    const std::int64_t l3 = sysconf(_SC_LEVEL3_CACHE_SIZE);
    const std::int64_t l2 = sysconf(_SC_LEVEL2_CACHE_SIZE);
    const std::int64_t known = std::max(l2, l3);
    return known > 0 ? known : std::int64_t{32} << 20;
  }();
  return output_bytes > last_level_bytes;
}

}  // namespace quire::cpu
