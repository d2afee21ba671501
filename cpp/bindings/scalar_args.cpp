// Scalar arguments of a call: numbers, granularities, devices, dtypes.
// SPDX-License-Identifier: Apache-2.0
#include "bindings/scalar_args.h"

#include <stdexcept>
#include <string>

#include "bindings/messages.h"
#include "quire/error.h"

namespace quire::bindings {

double to_double(const char* op, const char* arg, nb::handle value) {
  const double number = PyFloat_AsDouble(value.ptr());
  if (number == -1.0 && PyErr_Occurred() != nullptr) {
    PyErr_Clear();
    throw TypeError(message(op, arg, "a number", object_type(value)));
  }
  return number;
}

std::optional<double> to_optional_double(const char* op, const char* arg, nb::handle value) {
  if (value.is_none()) return std::nullopt;
  return to_double(op, arg, value);
}

bool to_bool(nb::handle value) {
  const int truth = PyObject_IsTrue(value.ptr());
  if (truth < 0) throw nb::python_error();
  return truth == 1;
}

std::int64_t to_int(const char* op, const char* arg, nb::handle value) {
  const nb::object index = nb::steal(PyNumber_Index(value.ptr()));
  if (!index.is_valid()) {
    PyErr_Clear();
    throw TypeError(message(op, arg, "an integer", object_type(value)));
  }
  const long long number = PyLong_AsLongLong(index.ptr());
  if (number == -1 && PyErr_Occurred() != nullptr) {
    PyErr_Clear();
    throw std::invalid_argument(message(op, arg, "an integer of 64 bits", std::string(nb::str(value).c_str())));
  }
  return number;
}

ScaleGranularity to_granularity(const char* op, nb::handle value) {
  const std::string text = nb::str(value).c_str();
  if (text == "tensor") return ScaleGranularity::kTensor;
  if (text == "token") return ScaleGranularity::kToken;
  if (text == "group") return ScaleGranularity::kGroup;
  throw std::invalid_argument(message(op, "granularity", "\"tensor\", \"token\" or \"group\"", '"' + text + '"'));
}

Device to_device(const char* op, nb::handle value) {
  std::string text;
  if (nb::isinstance<nb::str>(value)) {
    text = nb::str(value).c_str();
  } else {  // torch.device and the like
    const nb::object type = nb::getattr(value, "type", nb::none());
    const nb::object index = nb::getattr(value, "index", nb::none());
    if (nb::isinstance<nb::str>(type)) text = nb::str(type).c_str();
    if (nb::isinstance<nb::int_>(index)) text.append(1, ':').append(nb::str(index).c_str());
  }
  if (text == "cpu" || text == "cpu:0") return Device{};
  if (text == "cuda") return Device{DeviceType::kCUDA, 0};
  if (starts_with(text, "cuda:") && text.size() > 5 && text.size() <= 7 && text.find_first_not_of("0123456789", 5) == std::string::npos)
    return Device{DeviceType::kCUDA, std::stoi(text.substr(5))};
  throw std::invalid_argument(message(op, "device", "\"cpu\", \"cuda\" or \"cuda:<index>\"", text.empty() ? object_type(value) : text));
}

DType to_dtype(const char* op, const char* arg, nb::handle value) {
  std::string text;
  if (nb::isinstance<nb::str>(value)) {
    text = nb::str(value).c_str();
  } else {
    const nb::object name_attribute = nb::getattr(value, "name", nb::none());
    const nb::object type_attribute = nb::getattr(value, "__name__", nb::none());
    if (nb::isinstance<nb::str>(name_attribute)) {
      text = nb::str(name_attribute).c_str();
    } else if (nb::isinstance<nb::str>(type_attribute)) {
      text = nb::str(type_attribute).c_str();
    } else {
      text = nb::str(value).c_str();  // "torch.bfloat16"
    }
  }
  if (starts_with(text, "torch.")) text = text.substr(6);
  for (DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16, DType::kFloat8E4M3FN, DType::kFloat8E5M2, DType::kInt8,
                      DType::kUInt8, DType::kInt32, DType::kInt64, DType::kBool})
    if (text == name(dtype)) return dtype;
  throw TypeError(message(op, arg, "float32, float16, bfloat16, float8_e4m3fn, float8_e5m2, int8, uint8, int32, int64 or bool", text));
}

}  // namespace quire::bindings
