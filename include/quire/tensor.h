// TensorView: a non-owning view of a strided tensor. What every op takes.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cstdint>
#include <initializer_list>

#include "quire/dtype.h"

namespace quire {

enum class DeviceType : std::uint8_t { kCPU, kCUDA };

/// Where a tensor's memory is.
struct Device {
  DeviceType type = DeviceType::kCPU;
  int index = 0;

  friend bool operator==(const Device&, const Device&) = default;
};

/// The largest rank that an op takes.
inline constexpr int kMaxRank = 8;

/// A view of memory that somebody else owns. Copying it copies no element.
struct TensorView {
  void* data = nullptr;  ///< First element. May be null when the tensor has no element.
  DType dtype = DType::kFloat32;
  Device device;
  bool read_only = false;  ///< The producer forbids writing; ops refuse such a tensor as an output.
  int ndim = 0;
  std::array<std::int64_t, kMaxRank> shape{};
  std::array<std::int64_t, kMaxRank> strides{};  ///< In elements, not bytes.

  TensorView() = default;

  /// A contiguous (row-major) tensor.
  TensorView(void* data_, DType dtype_, std::initializer_list<std::int64_t> shape_, Device device_ = {})
      : data(data_), dtype(dtype_), device(device_) {
    for (std::int64_t extent : shape_)
      if (ndim < kMaxRank) shape[static_cast<std::size_t>(ndim++)] = extent;
    std::int64_t stride = 1;
    for (int i = ndim - 1; i >= 0; --i) {
      strides[static_cast<std::size_t>(i)] = stride;
      stride *= shape[static_cast<std::size_t>(i)];
    }
  }

  /// Extent and stride of a dimension; a negative index counts from the end.
  std::int64_t size(int dim) const { return shape[static_cast<std::size_t>(dim < 0 ? dim + ndim : dim)]; }
  std::int64_t stride(int dim) const { return strides[static_cast<std::size_t>(dim < 0 ? dim + ndim : dim)]; }

  std::int64_t numel() const {
    std::int64_t n = 1;
    for (int i = 0; i < ndim; ++i) n *= shape[static_cast<std::size_t>(i)];
    return n;
  }

  template <typename T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

}  // namespace quire
