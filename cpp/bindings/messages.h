// Words of Python's for messages: a message's form is core/message.h's.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <nanobind/nanobind.h>

#include <string>

#include "core/message.h"

namespace quire::bindings {

namespace nb = nanobind;

inline bool starts_with(const std::string& text, const char* prefix) { return text.rfind(prefix, 0) == 0; }

/// A type's attribute, or nothing where that is no text.
inline std::string type_text(nb::handle type, const char* attribute) {
  const nb::object value = nb::getattr(type, attribute, nb::none());
  return nb::isinstance<nb::str>(value) ? std::string(nb::str(value).c_str()) : std::string();
}

/// The type's name, with its module's.
inline std::string object_type(nb::handle object) {
  const nb::handle type(reinterpret_cast<PyObject*>(Py_TYPE(object.ptr())));
  const std::string module = type_text(type, "__module__"), name = type_text(type, "__name__");
  return module.empty() || module == "builtins" ? name : module + "." + name;
}

}  // namespace quire::bindings
