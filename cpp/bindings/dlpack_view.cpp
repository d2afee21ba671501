// TensorViews of what DLPack describes, and DLPack's dtypes.
// SPDX-License-Identifier: Apache-2.0
#include "bindings/dlpack_view.h"

#include <optional>
#include <stdexcept>
#include <string>

#include "bindings/messages.h"
#include "core/check.h"
#include "core/runtime.h"
#include "quire/error.h"

namespace quire::bindings {
namespace {

std::optional<DType> from_dlpack(DLDataType d) {
  if (d.lanes != 1) return std::nullopt;
  switch (d.code) {
    case kDLFloat:
      if (d.bits == 32) return DType::kFloat32;
      if (d.bits == 16) return DType::kFloat16;
      break;
    case kDLBfloat:
      if (d.bits == 16) return DType::kBFloat16;
      break;
    case kDLFloat8_e4m3fn:
      if (d.bits == 8) return DType::kFloat8E4M3FN;
      break;
    case kDLFloat8_e5m2:
      if (d.bits == 8) return DType::kFloat8E5M2;
      break;
    case kDLInt:
      if (d.bits == 8) return DType::kInt8;
      if (d.bits == 32) return DType::kInt32;
      if (d.bits == 64) return DType::kInt64;
      break;
    case kDLUInt:
      if (d.bits == 8) return DType::kUInt8;
      break;
    case kDLBool:
      if (d.bits == 8) return DType::kBool;
      break;
    default: break;
  }
  return std::nullopt;
}

std::string dlpack_dtype_text(DLDataType d) {
  static constexpr const char* kCodes[] = {"int", "uint", "float", "handle", "bfloat", "complex", "bool"};
  const std::string code = d.code < std::size(kCodes) ? kCodes[d.code] : "code " + std::to_string(d.code) + " ";
  return code + std::to_string(d.bits) + (d.lanes == 1 ? "" : "x" + std::to_string(d.lanes));
}

}  // namespace

DLDataType to_dlpack(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return {kDLFloat, 32, 1};
    case DType::kFloat16: return {kDLFloat, 16, 1};
    case DType::kBFloat16: return {kDLBfloat, 16, 1};
    case DType::kFloat8E4M3FN: return {kDLFloat8_e4m3fn, 8, 1};
    case DType::kFloat8E5M2: return {kDLFloat8_e5m2, 8, 1};
    case DType::kInt8: return {kDLInt, 8, 1};
    case DType::kUInt8: return {kDLUInt, 8, 1};
    case DType::kInt32: return {kDLInt, 32, 1};
    case DType::kInt64: return {kDLInt, 64, 1};
    case DType::kBool: return {kDLBool, 8, 1};
  }
  throw TypeError("[dlpack] dtype: expected a known dtype, got another");
}

void throw_other_device(const char* op, const char* arg, DLDeviceType type) {
  throw UnsupportedError(message(op, arg, "a tensor on cpu or cuda", "one on DLPack device type " + std::to_string(type)));
}

void fill_view(const char* op, const char* arg, const DLTensor& t, bool read_only, TensorView& view) {
  const std::optional<DType> dtype = from_dlpack(t.dtype);
  if (!dtype)
    throw TypeError(message(op, arg, "float32, float16, bfloat16, float8_e4m3fn, float8_e5m2, int8, uint8, int32, int64 or bool",
                            dlpack_dtype_text(t.dtype)));
  if (t.ndim < 0 || t.ndim > kMaxRank) throw std::invalid_argument(message(op, arg, "a rank of at most 8", std::to_string(t.ndim)));
  if (t.ndim > 0 && t.shape == nullptr) throw std::invalid_argument(message(op, arg, "a shape", "null"));
  if (is_cuda(t.device.device_type)) {
    if (!kHasCuda) throw_cpu_only_build(op);
    view.device = Device{DeviceType::kCUDA, t.device.device_id};
  } else if (is_host(t.device.device_type)) {
    view.device = Device{};
  } else {
    throw_other_device(op, arg, t.device.device_type);
  }
  view.dtype = *dtype;
  view.read_only = read_only;
  view.ndim = t.ndim;
  std::int64_t numel = 1;
  for (int i = t.ndim - 1; i >= 0; --i) {
    const auto at = static_cast<std::size_t>(i);
    view.shape[at] = t.shape[i];
    view.strides[at] = t.strides != nullptr ? t.strides[i] : numel;
    if (t.shape[i] < 0) throw std::invalid_argument(message(op, arg, "a shape of 0 or more", std::to_string(t.shape[i])));
    numel = checked_mul(numel, t.shape[i], op, arg);
  }
  tame_strides(view, numel > 0);
  if (t.data == nullptr && numel > 0)
    throw std::invalid_argument(message(op, arg, "a tensor with data", "one without (a meta or fake tensor); materialize it first"));
  view.data = t.data == nullptr ? nullptr : static_cast<std::byte*>(t.data) + t.byte_offset;
}

}  // namespace quire::bindings
