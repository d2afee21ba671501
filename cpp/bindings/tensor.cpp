// Binding of quire.Tensor: memory of the core's own, exported through DLPack.
// SPDX-License-Identifier: Apache-2.0
#include "bindings/tensor.h"

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <mutex>
#include <string>
#include <vector>

#include "bindings/bindings.h"
#include "bindings/dlpack_view.h"
#include "bindings/gil.h"
#include "bindings/scalar_args.h"
#include "bindings/tensor_args.h"
#include "core/check.h"
#include "core/runtime.h"
#include "quire/error.h"

namespace quire::bindings {
namespace {

// Device memory whose last view was dropped by a DLPack consumer. That may happen on a thread of the consumer's that must not call CUDA (a host
// function of a stream, say, where cudaFree would wait for the stream that waits for it), so it is freed at the next allocation.
class Retired {
 public:
  static Retired& instance() {
    static auto* const retired = new Retired;  // leaked on purpose: the driver may be gone at exit
    return *retired;
  }

  void add(std::shared_ptr<Buffer> buffer) {
    const std::lock_guard lock(mutex_);
    buffers_.push_back(std::move(buffer));
  }

  void free_all() {
    std::vector<std::shared_ptr<Buffer>> buffers;
    {
      const std::lock_guard lock(mutex_);
      buffers.swap(buffers_);
    }
  }

 private:
  std::mutex mutex_;
  std::vector<std::shared_ptr<Buffer>> buffers_;
};

// What a DLPack consumer holds: the memory lives as long as it does.
template <typename Managed>
struct Export {
  Managed managed{};
  std::shared_ptr<Buffer> buffer;
  std::array<std::int64_t, kMaxRank> shape, strides;
};

template <typename Managed>
nb::object make_capsule(const Tensor& tensor, const char* name) {
  auto owner = std::make_unique<Export<Managed>>();
  owner->buffer = tensor.buffer;
  owner->shape = tensor.view.shape;
  owner->strides = tensor.view.strides;
  DLTensor& t = owner->managed.dl_tensor;
  t.data = tensor.view.data;
  t.device = DLDevice{tensor.view.device.type == DeviceType::kCPU ? kDLCPU : kDLCUDA, tensor.view.device.index};
  t.ndim = tensor.view.ndim;
  t.dtype = to_dlpack(tensor.view.dtype);
  t.shape = owner->shape.data();
  t.strides = owner->strides.data();
  t.byte_offset = 0;
  if constexpr (std::is_same_v<Managed, DLManagedTensorVersioned>) {
    owner->managed.version = DLPackVersion{DLPACK_MAJOR_VERSION, DLPACK_MINOR_VERSION};
    owner->managed.flags = 0;
  }
  owner->managed.manager_ctx = owner.get();
  owner->managed.deleter = [](Managed* self) {
    auto* const owned = static_cast<Export<Managed>*>(self->manager_ctx);
    if (owned->buffer->device().type == DeviceType::kCUDA) Retired::instance().add(std::move(owned->buffer));
    delete owned;
  };
  const auto destructor = [](PyObject* capsule) {
    const char* const unused = std::is_same_v<Managed, DLManagedTensorVersioned> ? "dltensor_versioned" : "dltensor";
    if (!PyCapsule_IsValid(capsule, unused)) return;  // consumed: the consumer calls the deleter
    auto* managed = static_cast<Managed*>(PyCapsule_GetPointer(capsule, unused));
    managed->deleter(managed);
  };
  PyObject* const capsule = PyCapsule_New(&owner->managed, name, destructor);
  if (capsule == nullptr) throw nb::python_error();
  static_cast<void>(owner.release());
  return nb::steal(capsule);
}

nb::object dlpack(const Tensor& self, nb::handle stream, nb::handle max_version, nb::handle dl_device, nb::handle copy) {
  if (self.view.device.type == DeviceType::kCPU && !stream.is_none())
    throw nb::buffer_error("[Tensor.__dlpack__] stream: expected None for a tensor on cpu");
  if (copy.is(Py_True)) throw nb::buffer_error("[Tensor.__dlpack__] copy: expected False or None, got True");
  if (!dl_device.is_none()) {
    const nb::tuple wanted = nb::cast<nb::tuple>(dl_device);
    const int type = self.view.device.type == DeviceType::kCPU ? kDLCPU : kDLCUDA;
    if (nb::cast<int>(wanted[0]) != type || nb::cast<int>(wanted[1]) != self.view.device.index)
      throw nb::buffer_error("[Tensor.__dlpack__] dl_device: expected the tensor's own device");
  }
  if constexpr (kHasCuda) {
    if (self.written != nullptr) {
      const std::int64_t number = stream.is_none() ? 1 : to_int("Tensor.__dlpack__", "stream", stream);
      if (number != -1)
        self.written->make_wait(Stream(reinterpret_cast<void*>(static_cast<std::intptr_t>(number == 0 ? 1 : number))),
                                self.view.device.index);
    }
  }
  const bool versioned = !max_version.is_none() && nb::cast<int>(nb::cast<nb::tuple>(max_version)[0]) >= 1;
  return versioned ? make_capsule<DLManagedTensorVersioned>(self, "dltensor_versioned") : make_capsule<DLManagedTensor>(self, "dltensor");
}

nb::tuple to_tuple(const std::array<std::int64_t, kMaxRank>& values, int count) {
  nb::list list;
  for (int i = 0; i < count; ++i) list.append(values[static_cast<std::size_t>(i)]);
  return nb::tuple(list);
}

// self[i] or self[i, j, ...] with integers: a view of lower rank.
Tensor select(const Tensor& self, nb::handle key) {
  const nb::tuple indices = nb::isinstance<nb::tuple>(key) ? nb::borrow<nb::tuple>(key) : nb::make_tuple(key);
  if (indices.size() > static_cast<std::size_t>(self.view.ndim))
    throw IndexError("[Tensor] index: expected at most " + std::to_string(self.view.ndim) + " indices, got " +
                     std::to_string(indices.size()));
  Tensor result{TensorView(), self.buffer, self.written};
  TensorView& view = result.view;
  view = self.view;
  std::int64_t offset = 0;
  const int dropped = static_cast<int>(indices.size());
  for (int i = 0; i < dropped; ++i) {
    const std::int64_t extent = self.view.size(i);
    std::int64_t index = to_int("Tensor", "index", indices[static_cast<std::size_t>(i)]);
    if (index < 0) index += extent;
    if (index < 0 || index >= extent)
      throw IndexError("[Tensor] index: expected less than " + std::to_string(extent) + ", got " +
                       std::to_string(to_int("Tensor", "index", indices[static_cast<std::size_t>(i)])));
    offset += index * self.view.stride(i);
  }
  view.ndim = self.view.ndim - dropped;
  for (int i = 0; i < view.ndim; ++i) {
    view.shape[static_cast<std::size_t>(i)] = self.view.size(i + dropped);
    view.strides[static_cast<std::size_t>(i)] = self.view.stride(i + dropped);
  }
  view.data = static_cast<std::byte*>(self.view.data) + offset * itemsize(self.view.dtype);
  return result;
}

// A view with two dimensions exchanged.
Tensor transpose(const Tensor& self, nb::handle dim0, nb::handle dim1) {
  Tensor result = self;
  TensorView& view = result.view;
  const auto to_dim = [&](const char* arg, nb::handle value) {
    const std::int64_t dim = to_int("Tensor.transpose", arg, value);
    if (dim < 0 || dim >= view.ndim)
      throw IndexError(std::string("[Tensor.transpose] ") + arg + ": expected 0 or more and less than " + std::to_string(view.ndim) +
                       ", got " + std::to_string(dim));
    return static_cast<std::size_t>(dim);
  };
  const std::size_t first = to_dim("dim0", dim0), second = to_dim("dim1", dim1);
  std::swap(view.shape[first], view.shape[second]);
  std::swap(view.strides[first], view.strides[second]);
  return result;
}

// A view of `length` entries of a dimension, from `start` on.
Tensor narrow(const Tensor& self, nb::handle dim, nb::handle start, nb::handle length) {
  const char* const op = "Tensor.narrow";
  const std::int64_t at = to_int(op, "dim", dim), first = to_int(op, "start", start), count = to_int(op, "length", length);
  if (at < 0 || at >= self.view.ndim)
    throw IndexError("[Tensor.narrow] dim: expected 0 or more and less than " + std::to_string(self.view.ndim) + ", got " +
                     std::to_string(at));
  const std::int64_t extent = self.view.size(static_cast<int>(at));
  if (first < 0 || count < 0 || first > extent || count > extent - first)
    throw IndexError("[Tensor.narrow] start, length: expected a range within " + std::to_string(extent) + ", got " + std::to_string(first) +
                     ", " + std::to_string(count));
  Tensor result = self;
  result.view.shape[static_cast<std::size_t>(at)] = count;
  result.view.data = static_cast<std::byte*>(self.view.data) + first * self.view.stride(static_cast<int>(at)) * itemsize(self.view.dtype);
  return result;
}

// A view of the same memory as uint8; the last dimension, which is dense, grows by the size of an element.
Tensor bytes(const Tensor& self) {
  if (self.view.ndim == 0 || self.view.stride(-1) != 1)
    throw std::invalid_argument("[Tensor.bytes] strides: expected a last dimension with stride 1, got " + describe_strides(self.view));
  Tensor result = self;
  const std::int64_t item_bytes = itemsize(self.view.dtype);
  for (int i = 0; i + 1 < result.view.ndim; ++i) result.view.strides[static_cast<std::size_t>(i)] *= item_bytes;
  result.view.shape[static_cast<std::size_t>(result.view.ndim - 1)] *= item_bytes;
  result.view.dtype = DType::kUInt8;
  return result;
}

// A NumPy view. Dtypes that NumPy lacks come through an integer view and ml_dtypes.
nb::object numpy(const Tensor& self) {
  if (self.view.device.type != DeviceType::kCPU)
    throw std::invalid_argument("[Tensor.numpy] device: expected cpu, got " + describe(self.view.device));
  const nb::module_ np = nb::module_::import_("numpy");
  const bool extended =
      self.view.dtype == DType::kBFloat16 || self.view.dtype == DType::kFloat8E4M3FN || self.view.dtype == DType::kFloat8E5M2;
  if (!extended) return np.attr("from_dlpack")(nb::cast(self));
  const nb::module_ ml_dtypes = nb::module_::import_("ml_dtypes");
  Tensor integers = self;
  integers.view.dtype = DType::kUInt8;
  const bool wide = itemsize(self.view.dtype) == 2;
  if (wide) {  // uint16 is no dtype of ours: two uint8 columns, viewed as one
    if (self.view.ndim == kMaxRank) throw UnsupportedError("[Tensor.numpy] rank: expected at most 7, got 8");
    TensorView& view = integers.view;
    for (int i = 0; i < view.ndim; ++i) view.strides[static_cast<std::size_t>(i)] *= 2;
    view.shape[static_cast<std::size_t>(view.ndim)] = 2;
    view.strides[static_cast<std::size_t>(view.ndim)] = 1;
    ++view.ndim;
  }
  const nb::object array = np.attr("from_dlpack")(nb::cast(integers)).attr("view")(ml_dtypes.attr(name(self.view.dtype)));
  return wide ? nb::object(array.attr("squeeze")(-1)) : array;
}

// A row-major shape; the number of its elements is returned.
std::int64_t set_shape(const char* op, nb::handle shape, TensorView& view) {
  const nb::object sequence = nb::steal(PySequence_Tuple(shape.ptr()));
  if (!sequence.is_valid()) {
    PyErr_Clear();
    throw TypeError(std::string("[") + op + "] shape: expected a sequence of integers, got " + nb::str(shape).c_str());
  }
  const nb::tuple extents = nb::borrow<nb::tuple>(sequence);
  if (extents.size() > kMaxRank)
    throw std::invalid_argument(std::string("[") + op + "] shape: expected a rank of at most 8, got " + std::to_string(extents.size()));
  view.ndim = static_cast<int>(extents.size());
  std::int64_t numel = 1;
  for (int i = view.ndim - 1; i >= 0; --i) {
    const auto at = static_cast<std::size_t>(i);
    view.shape[at] = to_int(op, "shape", extents[at]);
    if (view.shape[at] < 0)
      throw std::invalid_argument(std::string("[") + op + "] shape: expected extents of 0 or more, got " + std::to_string(view.shape[at]));
    view.strides[at] = numel;
    numel = checked_mul(numel, view.shape[at], op, "shape");
  }
  return numel;
}

// A view of a contiguous tensor in another shape.
Tensor reshape(const Tensor& self, nb::handle shape) {
  Check("Tensor.reshape").contiguous(self.view, "strides");
  Tensor result = self;
  if (set_shape("Tensor.reshape", shape, result.view) != self.view.numel())
    throw std::invalid_argument("[Tensor.reshape] shape: expected " + std::to_string(self.view.numel()) + " elements, got " +
                                describe(result.view));
  return result;
}

Tensor empty(nb::handle shape, nb::handle dtype, nb::handle device, bool pinned) {
  Tensor tensor;
  TensorView& view = tensor.view;
  view.dtype = to_dtype("empty", "dtype", dtype);
  view.device = to_device("empty", device);
  const std::int64_t numel = set_shape("empty", shape, view);
  const std::int64_t num_bytes = checked_mul(numel, itemsize(view.dtype), "empty", "shape");
  if (!kHasCuda && view.device.type == DeviceType::kCUDA) throw_cpu_only_build("empty");
  if (!kHasCuda && pinned) throw_cpu_only_build("empty", "pinned: expected False, got True");
  if (pinned && view.device.type != DeviceType::kCPU)
    throw std::invalid_argument("[empty] pinned: expected device cpu, got " + describe(view.device));
  const GilRelease release;
  Retired::instance().free_all();
  tensor.buffer = pinned ? Buffer::allocate_pinned(num_bytes) : Buffer::allocate(num_bytes, view.device);
  view.data = tensor.buffer->data();
  return tensor;
}

}  // namespace

void bind_tensor(nb::module_& m) {
  nb::class_<Tensor>(
      m, "Tensor",
      "A tensor over memory that quire owns. Any framework takes it through DLPack without a copy; the memory lives until the last "
      "view of it, wherever that is, is gone. Device memory whose last view another framework drops is freed at the next allocation.")
      .def_prop_ro(
          "shape", [](const Tensor& t) { return to_tuple(t.view.shape, t.view.ndim); }, "The extents.",
          nb::sig("def shape(self) -> tuple[int, ...]"))
      .def_prop_ro(
          "strides", [](const Tensor& t) { return to_tuple(t.view.strides, t.view.ndim); }, "In elements.",
          nb::sig("def strides(self) -> tuple[int, ...]"))
      .def_prop_ro(
          "ndim", [](const Tensor& t) { return t.view.ndim; }, "The number of dimensions, at most 8.")
      .def_prop_ro(
          "dtype", [](const Tensor& t) { return name(t.view.dtype); }, "The dtype's name, as NumPy and ml_dtypes spell it.")
      .def_prop_ro(
          "device", [](const Tensor& t) { return describe(t.view.device); }, "\"cpu\" or \"cuda:<index>\".")
      .def_prop_ro(
          "nbytes", [](const Tensor& t) { return t.view.numel() * itemsize(t.view.dtype); }, "Bytes of the elements.")
      .def_prop_ro(
          "data_ptr", [](const Tensor& t) { return reinterpret_cast<std::uintptr_t>(t.view.data); }, "Address of the first element.")
      .def_prop_ro(
          "pinned", [](const Tensor& t) { return t.buffer->is_pinned(); }, "Whether the memory is page-locked host memory.")
      .def(
          "__len__",
          [](const Tensor& t) {
            if (t.view.ndim == 0) throw TypeError("[Tensor] len: expected a rank of 1 or more, got 0");
            return t.view.size(0);
          },
          "The first extent.")
      .def("__getitem__", &select, nb::arg("index"),
           "Integer indices: a view of lower rank. Negative ones count from the end. Raises IndexError, for what is no integer TypeError.")
      .def("transpose", &transpose, nb::arg("dim0"), nb::arg("dim1"), "A view with two dimensions exchanged. Raises IndexError.")
      .def("narrow", &narrow, nb::arg("dim"), nb::arg("start"), nb::arg("length"), "A view of a part of a dimension. Raises IndexError.")
      .def("reshape", &reshape, nb::arg("shape"), "A view of a contiguous tensor in another shape. Raises ValueError.")
      .def("bytes", &bytes,
           "A view of the same memory as uint8; the last dimension, which is to have stride 1, grows by the size of an element. Raises "
           "ValueError.")
      .def("numpy", &numpy,
           "A NumPy view of a tensor on the CPU (bfloat16 and float8 need ml_dtypes). Raises ValueError for one elsewhere.")
      .def("__repr__", [](const Tensor& t) { return "quire.Tensor(" + describe(t.view) + " on " + describe(t.view.device) + ")"; })
      .def(
          "__dlpack_device__",
          [](const Tensor& t) {
            return nb::make_tuple(static_cast<int>(t.view.device.type == DeviceType::kCPU ? kDLCPU : kDLCUDA), t.view.device.index);
          },
          nb::sig("def __dlpack_device__(self) -> tuple[int, int]"))
      .def("__dlpack__", &dlpack, nb::kw_only(), nb::arg("stream") = nb::none(), nb::arg("max_version") = nb::none(),
           nb::arg("dl_device") = nb::none(), nb::arg("copy") = nb::none(),
           "The capsule. The memory's last writer is the caller's to order, unless hand_over() marked it.");
  m.def("hand_over", &hand_over, nb::arg("tensor"), "Orders whoever takes the tensor through DLPack behind this thread's last launch.");
  m.def(
      "dtype_name", [](nb::handle dtype) { return name(to_dtype("dtype_name", "dtype", dtype)); }, nb::arg("dtype"),
      "The name of a dtype, given as a name or as a framework's dtype.");
  m.def("empty", &empty, nb::arg("shape"), nb::arg("dtype"), nb::arg("device"), nb::arg("pinned") = false,
        R"doc(A new tensor with undefined contents, row-major.

Args:
    shape: The extents, at most 8.
    dtype: "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int8", "uint8", "int32", "int64" or "bool", or a framework's dtype
        of that name.
    device: "cpu", "cuda", "cuda:<index>", or a framework's device.
    pinned: On the CPU: page-locked memory, which :func:`swap_blocks` moves at the link's rate.

Raises:
    MemoryError: The memory cannot be had; the text says how many bytes.
    ValueError: An extent is negative, the sizes multiply beyond 64 bits, that is no device, or ``pinned`` is not for the CPU.
    TypeError: Another dtype, or a shape that is not made of integers.
    quire.UnsupportedError: "cuda" or ``pinned`` in a CPU-only build.

Example:
    >>> import quire
    >>> quire.empty((2, 3), "float32", "cpu").nbytes
    24
)doc");
}

}  // namespace quire::bindings
