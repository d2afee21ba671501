// What is known of the types that tensors come as, found out once for each type.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <dlpack/dlpack.h>
#include <nanobind/nanobind.h>

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>

namespace quire::bindings {

enum class Kind { kQuire, kExchange, kNumPy, kCuPy, kJax, kProtocol, kMasked, kNotATensor };

/// Interned names and call tuples, made once and kept: they outlive the interpreter's need of them.
struct Names {
  PyObject* exchange_api = PyUnicode_InternFromString("__dlpack_c_exchange_api__");
  PyObject* dlpack = PyUnicode_InternFromString("__dlpack__");
  PyObject* dlpack_device = PyUnicode_InternFromString("__dlpack_device__");
  PyObject* requires_grad = PyUnicode_InternFromString("requires_grad");
  PyObject* is_neg = PyUnicode_InternFromString("is_neg");
  PyObject* cuda_stream = PyUnicode_InternFromString("__cuda_stream__");
  PyObject* data = PyUnicode_InternFromString("data");
  PyObject* ptr = PyUnicode_InternFromString("ptr");
  PyObject* device_id = PyUnicode_InternFromString("device_id");
  PyObject* dtype = PyUnicode_InternFromString("dtype");
  PyObject* shape = PyUnicode_InternFromString("shape");
  PyObject* strides = PyUnicode_InternFromString("strides");
  PyObject* max_version = Py_BuildValue("(ii)", DLPACK_MAJOR_VERSION, DLPACK_MINOR_VERSION);
  PyObject* kw_version = Py_BuildValue("(s)", "max_version");
  PyObject* kw_version_stream = Py_BuildValue("(ss)", "max_version", "stream");
};

inline const Names& names() {
  static const Names* const instance = new Names;
  return *instance;
}

/// The C functions behind a tensor type's `requires_grad` and `is_neg`. Null where the type has none, or they cannot be called directly.
struct AutogradFlags {
  getter requires_grad = nullptr;
  void* requires_grad_closure = nullptr;
  PyCFunction is_neg = nullptr;
};

struct TypeInfo {
  PyTypeObject* type;
  Kind kind;
  const DLPackExchangeAPI* api = nullptr;
  AutogradFlags flags{};
};

/// Finds out what type_info remembers.
TypeInfo classify(PyTypeObject* type);

/// Types met so far. A handful in a process; the references are kept for ever, so that no address is reused.
inline const TypeInfo& type_info(PyObject* object) {
  constexpr std::size_t kSlots = 64;
  static std::array<std::atomic<const TypeInfo*>, kSlots> table{};
  PyTypeObject* const type = Py_TYPE(object);
  std::size_t slot = (reinterpret_cast<std::uintptr_t>(type) >> 4) % kSlots;
  for (std::size_t probe = 0; probe < kSlots; ++probe, slot = (slot + 1) % kSlots) {
    const TypeInfo* const known = table[slot].load(std::memory_order_acquire);
    if (known != nullptr && known->type == type) return *known;
    if (known == nullptr) {
      const auto* fresh = new TypeInfo(classify(type));
      Py_INCREF(reinterpret_cast<PyObject*>(type));
      const TypeInfo* expected = nullptr;
      if (table[slot].compare_exchange_strong(expected, fresh, std::memory_order_acq_rel)) return *fresh;
      delete fresh;
      if (expected->type == type) return *expected;
    }
  }
  thread_local TypeInfo overflow{};
  overflow = classify(type);
  return overflow;
}

}  // namespace quire::bindings
