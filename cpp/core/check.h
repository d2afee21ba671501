// Validation helpers: one message form for every caller, "[op] argument: expected ..., got ...".
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <string>
#include <utility>

#include "core/layout.h"
#include "quire/dtype.h"
#include "quire/error.h"
#include "quire/tensor.h"

namespace quire {

/// "float32 [4, 12]": a tensor as messages show it.
std::string describe(const TensorView& t);
/// "cpu", "cuda:0".
std::string describe(Device device);
/// "strides [24, 2] for shape [4, 12]".
std::string describe_strides(const TensorView& t);
/// "[4, *]": a shape, or one that is expected; kAny is a star.
std::string shape_text(const std::int64_t* shape, std::size_t ndim);
inline std::string shape_text(std::initializer_list<std::int64_t> shape) { return shape_text(shape.begin(), shape.size()); }

/// An extent that a shape check leaves open; none that a caller could give by mistake.
inline constexpr std::int64_t kAny = std::numeric_limits<std::int64_t>::min();

/// The checks of one call of one op. Cheap when they pass; each throws the documented type when it fails.
class Check {
 public:
  explicit Check(const char* op) : op_(op) {}

  const char* op() const { return op_; }

  [[noreturn]] void fail_value(const char* arg, const std::string& expected, const std::string& got) const;
  [[noreturn]] void fail_dtype(const char* arg, const std::string& expected, const std::string& got) const;
  [[noreturn]] void fail_unsupported(const char* arg, const std::string& expected, const std::string& got) const;
  [[noreturn]] void fail_index(const char* arg, const std::string& expected, const std::string& got) const;

  /// TypeError unless t's dtype is one of `allowed`.
  void dtype(const TensorView& t, const char* arg, std::initializer_list<DType> allowed) const;
  /// TypeError unless t is float32, float16 or bfloat16.
  void float_dtype(const TensorView& t, const char* arg) const;
  /// TypeError unless t and `reference` share a dtype.
  void same_dtype(const TensorView& t, const char* arg, const TensorView& reference, const char* reference_arg) const;
  /// ValueError unless t has this shape; kAny matches every extent.
  void shape(const TensorView& t, const char* arg, std::initializer_list<std::int64_t> expected) const;
  /// ValueError unless low <= rank <= high.
  void rank(const TensorView& t, const char* arg, int low, int high) const;
  /// ValueError unless t and `reference` have one shape.
  void same_shape(const TensorView& t, const char* arg, const TensorView& reference, const char* reference_arg) const;
  /// ValueError unless t is on `device`.
  void device(const TensorView& t, const char* arg, Device device, const char* reference_arg) const;
  /// ValueError unless the last dimension has stride 1.
  void inner_contiguous(const TensorView& t, const char* arg) const;
  /// ValueError unless t is dense and row-major.
  void contiguous(const TensorView& t, const char* arg) const;
  /// ValueError unless t's elements are aligned to their size and, if there are any, its pointer is not null.
  void accessible(const TensorView& t, const char* arg) const;
  /// As accessible; also ValueError if t is read-only or two of its elements share memory.
  void writable(const TensorView& t, const char* arg) const;
  /// ValueError if a and b share memory. With `same_is_fine`, exactly the same view passes.
  void disjoint(const TensorView& a, const char* a_arg, const TensorView& b, const char* b_arg, bool same_is_fine) const;
  /// ValueError unless value is finite (and, with `positive`, above zero).
  void finite(double value, const char* arg, bool positive = false) const;

  /// Checks a scale of keys or values of `kv_dtype`: null, or for one-byte dtypes float32 [1] or [num_kv_heads], contiguous, on `device`.
  /// Returns its stride: 0 or 1.
  std::int64_t scale(const TensorView* t, const char* arg, DType kv_dtype, std::int64_t num_kv_heads, Device device,
                     const char* reference_arg) const;
  /// TypeError unless t has this dtype, ValueError unless it has this shape; either message names both.
  void tensor(const TensorView& t, const char* arg, DType dtype, std::initializer_list<std::int64_t> shape) const;
  /// Checks a vector of known length and dtype: contiguous, on `device`.
  void vector(const TensorView& t, const char* arg, DType dtype, std::int64_t length, Device device, const char* reference_arg) const;
  /// Checks scratch memory: uint8 of `num_bytes` or more, contiguous, 16-byte aligned, on `device`, apart from each of `others` (which may be
  /// null). Returns its address; null where no bytes are needed, of whatever was given.
  void* workspace(const TensorView* t, std::int64_t num_bytes, Device device, const char* reference_arg,
                  std::initializer_list<std::pair<const TensorView*, const char*>> others) const;

 private:
  const char* op_;
};

/// Strides that are never stepped along may be anything in DLPack: those of extents of 1 are kept where arithmetic with them cannot
/// overflow, those of a tensor without elements become 0.
inline void tame_strides(TensorView& t, bool has_elements) {
  constexpr std::int64_t kLargest = std::int64_t{1} << 40;
  for (int i = 0; i < t.ndim; ++i) {
    const auto at = static_cast<std::size_t>(i);
    if (!has_elements)
      t.strides[at] = 0;
    else if (t.shape[at] == 1)
      t.strides[at] = std::clamp(t.strides[at], -kLargest, kLargest);
  }
}

/// From a tensor's first byte to behind its last; empty at 0 where it has no elements.
struct ByteRange {
  std::intptr_t begin, end;
};
ByteRange byte_range(const TensorView& t);
/// True where no tensors in these ranges can share a byte.
inline bool are_apart(ByteRange a, ByteRange b) { return a.end <= b.begin || b.end <= a.begin; }

/// True if an element of a and an element of b may share a byte. Strided views that interleave without touching are told apart
/// where they share their strides.
bool may_overlap(const TensorView& a, const TensorView& b);

/// The outer dimensions of a [..., hidden] tensor (rank 1 to 4), folded where the strides of all `tensors` allow it.
std::int64_t num_rows(const TensorView& t);
RowLayout row_layout(const TensorView& t);

/// a * b, or ValueError "[op] arg: ... overflows".
std::int64_t checked_mul(std::int64_t a, std::int64_t b, const char* op, const char* arg);

}  // namespace quire
