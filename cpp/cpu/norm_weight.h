// A norm's weight in a dtype that its kernels take.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "core/dispatch.h"
#include "core/numeric.h"

namespace quire::cpu {

/// A vector of n elements in x's dtype, or else in float32: kernels know no other, and mixed dtypes are rare enough to be copied.
class NormWeight {
 public:
  /// data may be null. With `widen` it is float32 in any case.
  NormWeight(const void* data, DType dtype, std::int64_t n, DType x_dtype, bool widen = false)
      : data_(data), column_(dtype == x_dtype && !widen ? 0 : 1) {
    if (data == nullptr || column_ == 0 || dtype == DType::kFloat32) return;
    copy_.resize(static_cast<std::size_t>(n));
    dispatch_float(dtype, "norm", [&](auto constant) {
      const auto* values = static_cast<const HostType<constant()>*>(data);
      std::transform(values, values + n, copy_.begin(), [](auto value) { return to_float(value); });
    });
    data_ = copy_.data();
  }
  NormWeight(const NormWeight&) = delete;
  NormWeight& operator=(const NormWeight&) = delete;

  const void* data() const { return data_; }
  /// Its place in NormKernels.
  std::size_t column() const { return column_; }

 private:
  std::vector<float> copy_;
  const void* data_;
  std::size_t column_;
};

}  // namespace quire::cpu
