// Scalar arguments of a call become C++ values, with the library's message form.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <optional>

#include "quire/dtype.h"
#include "quire/quantization.h"
#include "quire/tensor.h"

namespace quire::bindings {

namespace nb = nanobind;

double to_double(const char* op, const char* arg, nb::handle value);
std::int64_t to_int(const char* op, const char* arg, nb::handle value);
std::optional<double> to_optional_double(const char* op, const char* arg, nb::handle value);
/// By Python's rules of truth.
bool to_bool(nb::handle value);

/// "tensor", "token" or "group".
ScaleGranularity to_granularity(const char* op, nb::handle value);
/// "cpu", "cuda", "cuda:1", or an object with `type` and `index`, as a Device.
Device to_device(const char* op, nb::handle value);
/// A dtype name, or an object that has one (NumPy, ml_dtypes, JAX, PyTorch, CuPy dtypes).
DType to_dtype(const char* op, const char* arg, nb::handle value);

}  // namespace quire::bindings
