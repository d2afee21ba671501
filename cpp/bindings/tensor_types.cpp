// Which way a type's tensors can be taken.
// SPDX-License-Identifier: Apache-2.0
#include "bindings/tensor_types.h"

#include <cstring>
#include <string>

#include "bindings/messages.h"
#include "bindings/tensor.h"

namespace quire::bindings {
namespace {

const DLPackExchangeAPI* exchange_api_of(PyTypeObject* type) {
  PyObject* const capsule = PyObject_GetAttr(reinterpret_cast<PyObject*>(type), names().exchange_api);
  if (capsule == nullptr) {
    PyErr_Clear();
    return nullptr;
  }
  const auto* api = PyCapsule_IsValid(capsule, "dlpack_exchange_api")
                        ? static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"))
                        : nullptr;
  Py_DECREF(capsule);
  while (api != nullptr && api->header.version.major != DLPACK_MAJOR_VERSION)
    api = reinterpret_cast<const DLPackExchangeAPI*>(api->header.prev_api);
  if (api != nullptr && (api->dltensor_from_py_object_no_sync == nullptr || api->current_work_stream == nullptr)) return nullptr;
  return api;
}

// Finds them in the base type that defines them, unless a subclass has its own. Two attribute look-ups a tensor cost more than the rest
// of its import, so they are made once a type.
AutogradFlags autograd_flags(nb::handle type) {
  AutogradFlags flags;
  const nb::object own_grad = nb::getattr(type, "requires_grad", nb::none()), own_neg = nb::getattr(type, "is_neg", nb::none());
  for (const nb::handle base : nb::borrow<nb::tuple>(nb::getattr(type, "__mro__", nb::tuple()))) {
    auto* const base_type = reinterpret_cast<PyTypeObject*>(base.ptr());
    auto* getset = static_cast<PyGetSetDef*>(PyType_GetSlot(base_type, Py_tp_getset));
    for (; getset != nullptr && getset->name != nullptr; ++getset)
      if (std::strcmp(getset->name, "requires_grad") == 0 && nb::getattr(base, "requires_grad", nb::none()).is(own_grad)) {
        flags.requires_grad = getset->get;
        flags.requires_grad_closure = getset->closure;
      }
    auto* method = static_cast<PyMethodDef*>(PyType_GetSlot(base_type, Py_tp_methods));
    for (; method != nullptr && method->ml_name != nullptr; ++method)
      if (std::strcmp(method->ml_name, "is_neg") == 0 && method->ml_flags == METH_NOARGS &&
          nb::getattr(base, "is_neg", nb::none()).is(own_neg))
        flags.is_neg = method->ml_meth;
  }
  PyErr_Clear();
  return flags;
}

}  // namespace

TypeInfo classify(PyTypeObject* type) {
  const nb::handle handle(reinterpret_cast<PyObject*>(type));
  if (handle.is(nb::type<Tensor>())) return {type, Kind::kQuire};
  if (const DLPackExchangeAPI* api = exchange_api_of(type)) return {type, Kind::kExchange, api, autograd_flags(handle)};
  const std::string module = type_text(handle, "__module__"), name = type_text(handle, "__name__");
  if (module == "numpy" && name == "ndarray") return {type, Kind::kNumPy};
  if (nb::hasattr(handle, "mask") && nb::hasattr(handle, "filled")) return {type, Kind::kMasked};  // numpy.ma's, and what derives from it
  if (starts_with(module, "cupy")) return {type, Kind::kCuPy};
  if (starts_with(module, "jax")) return {type, Kind::kJax};
  const bool tensor = PyObject_HasAttr(handle.ptr(), names().dlpack) != 0 && PyObject_HasAttr(handle.ptr(), names().dlpack_device) != 0;
  return {type, tensor ? Kind::kProtocol : Kind::kNotATensor};
}

}  // namespace quire::bindings
