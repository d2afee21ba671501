// Turns run-time values into template arguments. Every dispatcher throws in its default case.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <type_traits>

#include "quire/dtype.h"

namespace quire {

template <DType kDType>
using DTypeConstant = std::integral_constant<DType, kDType>;

[[noreturn]] void throw_unsupported_dtype(const char* op, DType dtype, const char* supported);

/// Calls f(DTypeConstant<d>) for float32, float16 and bfloat16.
template <typename F>
decltype(auto) dispatch_float(DType dtype, const char* op, F&& f) {
  switch (dtype) {
    case DType::kFloat32: return f(DTypeConstant<DType::kFloat32>{});
    case DType::kFloat16: return f(DTypeConstant<DType::kFloat16>{});
    case DType::kBFloat16: return f(DTypeConstant<DType::kBFloat16>{});
    default: throw_unsupported_dtype(op, dtype, "float32, float16 or bfloat16");
  }
}

/// Calls f(DTypeConstant<d>) for every dtype that a KV cache may have.
template <typename F>
decltype(auto) dispatch_kv(DType dtype, const char* op, F&& f) {
  switch (dtype) {
    case DType::kFloat32: return f(DTypeConstant<DType::kFloat32>{});
    case DType::kFloat16: return f(DTypeConstant<DType::kFloat16>{});
    case DType::kBFloat16: return f(DTypeConstant<DType::kBFloat16>{});
    case DType::kFloat8E4M3FN: return f(DTypeConstant<DType::kFloat8E4M3FN>{});
    case DType::kFloat8E5M2: return f(DTypeConstant<DType::kFloat8E5M2>{});
    case DType::kInt8: return f(DTypeConstant<DType::kInt8>{});
    default: throw_unsupported_dtype(op, dtype, "a float dtype or int8");
  }
}

/// Calls f(std::int32_t{}) or f(std::int64_t{}) for an index tensor's dtype.
template <typename F>
decltype(auto) dispatch_index(DType dtype, const char* op, F&& f) {
  switch (dtype) {
    case DType::kInt32: return f(std::int32_t{});
    case DType::kInt64: return f(std::int64_t{});
    default: throw_unsupported_dtype(op, dtype, "int32 or int64");
  }
}

/// Calls f(std::true_type) or f(std::false_type).
template <typename F>
decltype(auto) dispatch_bool(bool value, F&& f) {
  return value ? f(std::true_type{}) : f(std::false_type{});
}

}  // namespace quire
