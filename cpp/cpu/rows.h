// Walking the rows of [..., hidden] tensors.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "core/layout.h"
#include "quire/tensor.h"

namespace quire::cpu {

/// Fewer elements than this are not worth waking a thread for, where little is computed with each.
inline constexpr std::int64_t kGrainElements = 32768;

/// A size of containers and of memory.
inline std::size_t count(std::int64_t n) { return static_cast<std::size_t>(n); }

/// A dtype's place in a table of kernels.
inline std::size_t index(DType dtype) { return static_cast<std::size_t>(dtype); }

/// data + num_elements, of elements of `dtype`.
template <typename T>
auto* advance(T* data, std::int64_t num_elements, DType dtype) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return static_cast<Byte*>(data) + num_elements * itemsize(dtype);
}

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
