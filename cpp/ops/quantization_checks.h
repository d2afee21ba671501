// Checks that the quantization ops share.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <string>

#include "core/check.h"

namespace quire {

/// Extents below this have products of three that fit 64 bits only where one is small; of two, always.
inline constexpr std::int64_t kMaxExtent = std::numeric_limits<std::int32_t>::max();

/// The rows of a [..., width] tensor that lie at one distance, which is returned.
inline std::int64_t check_rows(const Check& check, const TensorView& t, const char* arg, std::int64_t& num_rows) {
  num_rows = 1;
  std::int64_t stride = 0, span = 0;  // of the rows seen so far: their distance, and how far the next dimension must step
  for (int i = t.ndim - 2; i >= 0; --i) {
    const std::int64_t extent = t.size(i);
    if (extent != 1 && num_rows > 1 && extent > 0 && t.stride(i) != span)
      check.fail_value(arg, "leading dimensions that fold into one", describe_strides(t));
    if (extent != 1) {
      if (num_rows == 1) stride = t.stride(i);
      span = t.stride(i) * extent;
    }
    num_rows *= extent;
  }
  return stride;
}

inline void check_bias(const Check& check, const TensorView* bias, std::int64_t n, const TensorView& like, const char* like_arg,
                       const void*& data, DType& dtype) {
  if (bias == nullptr) return;
  check.float_dtype(*bias, "bias");
  check.vector(*bias, "bias", bias->dtype, n, like.device, like_arg);
  data = bias->data;
  dtype = bias->dtype;
}

/// The result of a product of x with n output features.
inline void check_product(const Check& check, const TensorView& out, const TensorView& x, const char* x_arg, std::int64_t n) {
  check.rank(out, "out", x.ndim, x.ndim);
  TensorView expected = x;
  expected.dtype = out.dtype;
  expected.shape[static_cast<std::size_t>(x.ndim - 1)] = n;
  if (!std::equal(out.shape.begin(), out.shape.begin() + out.ndim, expected.shape.begin()))
    check.fail_value("out", describe(expected), describe(out));
  check.device(out, "out", x.device, x_arg);
  check.inner_contiguous(out, "out");
  check.writable(out, "out");
}

inline void check_count(const Check& check, const char* arg, std::int64_t value, std::int64_t low) {
  if (value < low || value > kMaxExtent) check.fail_value(arg, std::to_string(low) + " to 2^31 - 1", std::to_string(value));
}

}  // namespace quire
