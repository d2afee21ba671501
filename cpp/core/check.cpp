// Validation helpers. The passing path is inline arithmetic; messages are built only on failure.
// SPDX-License-Identifier: Apache-2.0
#include "core/check.h"

#include <algorithm>
#include <cmath>
#include <cstddef>

#include "core/dispatch.h"
#include "core/message.h"

namespace quire {
namespace {

// True if distinct index tuples may name one element. Exact for layouts where each dimension steps over all smaller ones.
bool overlaps_itself(const TensorView& t) {
  int order[kMaxRank];
  int count = 0;
  for (int i = 0; i < t.ndim; ++i) {
    if (t.size(i) <= 1) continue;
    int at = count++;
    for (; at > 0 && t.stride(order[at - 1]) > t.stride(i); --at) order[at] = order[at - 1];
    order[at] = i;
  }
  std::int64_t span = 0;
  for (int i = 0; i < count; ++i) {
    if (t.stride(order[i]) <= span) return true;
    span += (t.size(order[i]) - 1) * t.stride(order[i]);
  }
  return false;
}

}  // namespace

void throw_unsupported_dtype(const char* op, DType dtype, const char* supported) {
  throw UnsupportedError(message(op, "dtype", supported, name(dtype)));
}

std::string shape_text(const std::int64_t* shape, std::size_t ndim) {
  std::string text = "[";
  for (std::size_t i = 0; i < ndim; ++i) {
    if (i > 0) text += ", ";
    text += shape[i] == kAny ? std::string("*") : std::to_string(shape[i]);
  }
  return text + "]";
}

std::string describe(Device device) {
  return device.type == DeviceType::kCPU ? std::string("cpu") : "cuda:" + std::to_string(device.index);
}

std::string describe_strides(const TensorView& t) {
  std::string strides = "[";
  for (int i = 0; i < t.ndim; ++i) strides += (i > 0 ? ", " : "") + std::to_string(t.stride(i));
  return "strides " + strides + "] for shape " + shape_text(t.shape.data(), static_cast<std::size_t>(t.ndim));
}

std::string describe(const TensorView& t) {
  return std::string(name(t.dtype)) + " " + shape_text(t.shape.data(), static_cast<std::size_t>(t.ndim));
}

void Check::fail_value(const char* arg, const std::string& expected, const std::string& got) const {
  throw std::invalid_argument(message(op_, arg, expected, got));
}
void Check::fail_dtype(const char* arg, const std::string& expected, const std::string& got) const {
  throw TypeError(message(op_, arg, expected, got));
}
void Check::fail_unsupported(const char* arg, const std::string& expected, const std::string& got) const {
  throw UnsupportedError(message(op_, arg, expected, got));
}
void Check::fail_index(const char* arg, const std::string& expected, const std::string& got) const {
  throw IndexError(message(op_, arg, expected, got));
}

void Check::dtype(const TensorView& t, const char* arg, std::initializer_list<DType> allowed) const {
  if (std::find(allowed.begin(), allowed.end(), t.dtype) != allowed.end()) return;
  std::string expected;
  std::size_t i = 0;
  for (DType d : allowed) {
    if (i > 0) expected += i + 1 == allowed.size() ? " or " : ", ";
    expected += name(d);
    ++i;
  }
  fail_dtype(arg, expected, describe(t));
}

void Check::float_dtype(const TensorView& t, const char* arg) const {
  if (t.dtype == DType::kFloat32 || t.dtype == DType::kFloat16 || t.dtype == DType::kBFloat16) return;
  fail_dtype(arg, "float32, float16 or bfloat16", describe(t));
}

void Check::same_dtype(const TensorView& t, const char* arg, const TensorView& reference, const char* reference_arg) const {
  if (t.dtype != reference.dtype) fail_dtype(arg, std::string(name(reference.dtype)) + " like " + reference_arg, describe(t));
}

void Check::shape(const TensorView& t, const char* arg, std::initializer_list<std::int64_t> expected) const {
  bool good = static_cast<std::size_t>(t.ndim) == expected.size();
  if (good) {
    int i = 0;
    for (std::int64_t extent : expected) {
      good = good && (extent == kAny || extent == t.size(i));
      ++i;
    }
  }
  if (!good) fail_value(arg, std::string(name(t.dtype)) + " " + shape_text(expected), describe(t));
}

void Check::rank(const TensorView& t, const char* arg, int low, int high) const {
  if (t.ndim >= low && t.ndim <= high) return;
  const std::string expected = low == high ? "rank " + std::to_string(low) : "rank " + std::to_string(low) + " to " + std::to_string(high);
  fail_value(arg, expected, describe(t));
}

void Check::same_shape(const TensorView& t, const char* arg, const TensorView& reference, const char* reference_arg) const {
  bool good = t.ndim == reference.ndim;
  for (int i = 0; good && i < t.ndim; ++i) good = t.size(i) == reference.size(i);
  if (!good) {
    const std::string expected = shape_text(reference.shape.data(), static_cast<std::size_t>(reference.ndim));
    fail_value(arg, std::string(name(t.dtype)) + " " + expected + " like " + reference_arg, describe(t));
  }
}

void Check::device(const TensorView& t, const char* arg, Device device, const char* reference_arg) const {
  if (!(t.device == device)) fail_value(arg, describe(device) + " like " + reference_arg, describe(t.device));
}

void Check::inner_contiguous(const TensorView& t, const char* arg) const {
  if (t.ndim > 0 && t.size(-1) > 1 && t.stride(-1) != 1 && t.numel() > 0)
    fail_value(arg, "stride 1 in the last dimension", describe_strides(t));
}

void Check::contiguous(const TensorView& t, const char* arg) const {
  if (t.numel() == 0) return;
  std::int64_t stride = 1;
  for (int i = t.ndim - 1; i >= 0; --i) {
    if (t.size(i) > 1 && t.stride(i) != stride) fail_value(arg, "a contiguous tensor", describe_strides(t));
    stride *= t.size(i);
  }
}

void Check::accessible(const TensorView& t, const char* arg) const {
  const auto address = reinterpret_cast<std::uintptr_t>(t.data);
  if (address % static_cast<std::uintptr_t>(itemsize(t.dtype)) != 0)
    fail_value(arg, "data aligned to its " + std::to_string(itemsize(t.dtype)) + "-byte items",
               "address " + std::to_string(address) + "; copy the tensor first");
  if (t.data == nullptr && t.numel() > 0) fail_value(arg, "data", "a null pointer (a meta or fake tensor has no data)");
}

void Check::writable(const TensorView& t, const char* arg) const {
  if (t.read_only) fail_value(arg, "a writable tensor", "a read-only one");
  accessible(t, arg);
  if (t.numel() > 0 && overlaps_itself(t))
    fail_value(arg, "an output whose elements do not share memory (positive strides, no broadcast)", describe_strides(t));
}

void Check::disjoint(const TensorView& a, const char* a_arg, const TensorView& b, const char* b_arg, bool same_is_fine) const {
  const ByteRange ra = byte_range(a), rb = byte_range(b);
  if (are_apart(ra, rb) || a.numel() == 0 || b.numel() == 0) return;
  if (same_is_fine && a.data == b.data && a.dtype == b.dtype && a.ndim == b.ndim) {
    bool same = true;
    for (int i = 0; i < a.ndim; ++i) same = same && a.size(i) == b.size(i) && (a.size(i) == 1 || a.stride(i) == b.stride(i));
    if (same) return;
  }
  if (may_overlap(a, b))
    fail_value(a_arg, std::string("memory apart from ") + b_arg + (same_is_fine ? ", or exactly its own" : ""), "memory that overlaps it");
}

void Check::finite(double value, const char* arg, bool positive) const {
  if (!std::isfinite(static_cast<float>(value)) || (positive && value <= 0.0))
    fail_value(arg, positive ? "a finite number above 0" : "a finite number", std::to_string(value));
}

std::int64_t Check::scale(const TensorView* t, const char* arg, DType kv_dtype, std::int64_t num_kv_heads, Device device_,
                          const char* reference_arg) const {
  if (t == nullptr) return 0;
  if (itemsize(kv_dtype) > 1)
    fail_value(arg, std::string("none for ") + name(kv_dtype) + " keys and values (scales belong to float8 and int8)", describe(*t));
  dtype(*t, arg, {DType::kFloat32});
  if (t->ndim != 1 || (t->size(0) != 1 && t->size(0) != num_kv_heads))
    fail_value(arg, "float32 [1] or [" + std::to_string(num_kv_heads) + "]", describe(*t));
  device(*t, arg, device_, reference_arg);
  contiguous(*t, arg);
  accessible(*t, arg);
  return t->size(0) == 1 ? 0 : 1;
}

void Check::tensor(const TensorView& t, const char* arg, DType dtype_, std::initializer_list<std::int64_t> shape_) const {
  if (t.dtype != dtype_) fail_dtype(arg, std::string(name(dtype_)) + " " + shape_text(shape_), describe(t));
  shape(t, arg, shape_);
}

void Check::vector(const TensorView& t, const char* arg, DType dtype_, std::int64_t length, Device device_,
                   const char* reference_arg) const {
  tensor(t, arg, dtype_, {length});
  device(t, arg, device_, reference_arg);
  contiguous(t, arg);
  accessible(t, arg);
}

void* Check::workspace(const TensorView* t, std::int64_t num_bytes, Device device_, const char* reference_arg,
                       std::initializer_list<std::pair<const TensorView*, const char*>> others) const {
  if (num_bytes == 0) return nullptr;
  const char* const arg = "workspace";
  const auto expected = [&] { return "uint8 [" + std::to_string(num_bytes) + "] or longer"; };
  if (t == nullptr) fail_value(arg, expected(), "none");
  dtype(*t, arg, {DType::kUInt8});
  rank(*t, arg, 1, 1);
  device(*t, arg, device_, reference_arg);
  contiguous(*t, arg);
  writable(*t, arg);
  if (t->numel() < num_bytes) fail_value(arg, expected(), describe(*t));
  const auto address = reinterpret_cast<std::uintptr_t>(t->data);
  if (address % 16 != 0) fail_value(arg, "a 16-byte aligned address", std::to_string(address));
  for (const auto& [other, other_arg] : others)
    if (other != nullptr) disjoint(*t, arg, *other, other_arg, false);
  return t->data;
}

ByteRange byte_range(const TensorView& t) {
  if (t.numel() == 0) return {0, 0};  // and its strides may be anything
  const std::int64_t item_bytes = itemsize(t.dtype);
  std::intptr_t low = 0, high = 0;
  for (int i = 0; i < t.ndim; ++i) {
    const std::int64_t span = (t.size(i) - 1) * t.stride(i) * item_bytes;
    (span < 0 ? low : high) += span;
  }
  const auto base = reinterpret_cast<std::intptr_t>(t.data);
  return {base + low, base + high + item_bytes};
}

bool may_overlap(const TensorView& a, const TensorView& b) {
  if (!(a.device == b.device) || a.numel() == 0 || b.numel() == 0) return false;
  ByteRange ra = byte_range(a), rb = byte_range(b);
  if (are_apart(ra, rb)) return false;
  if (a.ndim != b.ndim || itemsize(a.dtype) != itemsize(b.dtype)) return true;
  // Both views step through memory with a common period: if what remains of both within one period fits side by side, they interleave
  // without touching. That holds for a stride only if all larger strides are multiples of it.
  int order[kMaxRank];
  int count = 0;
  for (int i = 0; i < a.ndim; ++i) {
    if (a.size(i) == 1 && b.size(i) == 1) continue;
    if (a.stride(i) != b.stride(i) || a.stride(i) <= 0) return true;
    int at = count++;
    for (; at > 0 && a.stride(order[at - 1]) < a.stride(i); --at) order[at] = order[at - 1];
    order[at] = i;
  }
  std::intptr_t offset = reinterpret_cast<std::intptr_t>(b.data) - reinterpret_cast<std::intptr_t>(a.data);
  std::int64_t rest_a = ra.end - ra.begin, rest_b = rb.end - rb.begin;
  for (int at = 0; at < count; ++at) {
    const std::int64_t stride = a.stride(order[at]);
    if (at > 0 && a.stride(order[at - 1]) % stride != 0) return true;
    const std::int64_t period = stride * itemsize(a.dtype);
    rest_a -= (a.size(order[at]) - 1) * period;
    rest_b -= (b.size(order[at]) - 1) * period;
    offset %= period;
    if (offset < 0) offset += period;
    if (offset >= rest_a && offset + rest_b <= period) return false;
  }
  return true;
}

std::int64_t num_rows(const TensorView& t) {
  std::int64_t rows = 1;
  for (int i = 0; i + 1 < t.ndim; ++i) rows *= t.size(i);
  return rows;
}

RowLayout row_layout(const TensorView& t) {
  std::int64_t extents[3], strides[3];
  int count = 0;
  for (int i = t.ndim - 2; i >= 0; --i) {
    if (t.size(i) == 1) continue;
    if (count > 0 && t.stride(i) == strides[count - 1] * extents[count - 1]) {
      extents[count - 1] *= t.size(i);
    } else {
      extents[count] = t.size(i);
      strides[count] = t.stride(i);
      ++count;
    }
  }
  // extents and strides run from the innermost to the outermost dimension.
  RowLayout rows;
  if (count == 1) rows.strides[0] = strides[0];
  if (count == 2) rows = RowLayout{{extents[0], 1}, {strides[1], strides[0], 0}};
  if (count == 3) rows = RowLayout{{extents[1], extents[0]}, {strides[2], strides[1], strides[0]}};
  return rows;
}

std::int64_t checked_mul(std::int64_t a, std::int64_t b, const char* op, const char* arg) {
  std::int64_t product = 0;
  if (__builtin_mul_overflow(a, b, &product))
    throw std::invalid_argument(message(op, arg, "a size that fits in 64 bits", std::to_string(a) + " * " + std::to_string(b)));
  return product;
}

}  // namespace quire
