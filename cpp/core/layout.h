// Index arithmetic that host and device code share.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define QUIRE_HOST_DEVICE __host__ __device__
#else
#define QUIRE_HOST_DEVICE
#endif

namespace quire {

/// a / b for a >= 0, b > 0. 64-bit division is a subroutine on a GPU, so the common small case takes the 32-bit one.
QUIRE_HOST_DEVICE constexpr std::int64_t divide(std::int64_t a, std::int64_t b) {
  if (((a | b) >> 32) == 0) return static_cast<std::uint32_t>(a) / static_cast<std::uint32_t>(b);
  return a / b;
}

/// The outer dimensions of a [..., hidden] tensor, walked as one row index. Strides are in elements.
struct RowLayout {
  std::int64_t inner_extents[2] = {1, 1};  // extents of the two inner outer-dimensions; 1, 1 when rows have one stride
  std::int64_t strides[3] = {0, 0, 0};     // outermost first; only strides[0] counts when inner_extents are 1, 1

  QUIRE_HOST_DEVICE std::int64_t offset(std::int64_t row) const {
    if (inner_extents[0] == 1 && inner_extents[1] == 1) return row * strides[0];
    std::int64_t inner = 0;
    if (inner_extents[1] != 1) {
      const std::int64_t quotient = divide(row, inner_extents[1]);
      inner = (row - quotient * inner_extents[1]) * strides[2];
      row = quotient;
    }
    const std::int64_t outermost = divide(row, inner_extents[0]);
    return outermost * strides[0] + (row - outermost * inner_extents[0]) * strides[1] + inner;
  }
};

QUIRE_HOST_DEVICE constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

}  // namespace quire
