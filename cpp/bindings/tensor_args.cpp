// The DLPack importer. Fast paths: quire.Tensor, types with the DLPack C exchange API (PyTorch), numpy.ndarray; then any object with
// __dlpack__ and __dlpack_device__.
// SPDX-License-Identifier: Apache-2.0
#include "bindings/tensor_args.h"

#include <array>
#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "bindings/dlpack_view.h"
#include "bindings/messages.h"
#include "bindings/tensor.h"
#include "bindings/tensor_types.h"
#include "core/check.h"
#include "core/runtime.h"
#include "cuda/runtime.h"
#include "quire/error.h"

namespace quire::bindings {
namespace {

// CuPy's dtype objects whose meaning is known: NumPy's, of which there is one for each type, and ml_dtypes'. Guarded by the GIL. They are
// learned from what DLPack says, so that a dtype of another byte order is never among them.
struct KnownDtype {
  PyObject* object = nullptr;  // kept for ever, so that no address is reused
  DType dtype = DType::kFloat32;
};
std::array<KnownDtype, 16> known_dtypes;

const KnownDtype* find_dtype(PyObject* object) {
  for (const KnownDtype& known : known_dtypes)
    if (known.object == object) return &known;
  return nullptr;
}

void learn_dtype(PyObject* object, DType dtype) {
  if (find_dtype(object) != nullptr) return;
  for (KnownDtype& known : known_dtypes)
    if (known.object == nullptr) {
      Py_INCREF(object);
      known = {object, dtype};
      return;
    }
}

// Drops the pending Python error, unless it is Ctrl-C or the like.
void drop_python_error() {
  if (PyErr_Occurred() == nullptr) return;
  if (!PyErr_ExceptionMatches(PyExc_Exception)) throw nb::python_error();
  PyErr_Clear();
}

// Takes the pending Python error as "Type: text" and clears it.
std::string take_python_error() {
  if (PyErr_Occurred() == nullptr) return "no reason given";
  if (!PyErr_ExceptionMatches(PyExc_Exception)) throw nb::python_error();  // Ctrl-C and the like are not ours to reword
  const nb::python_error error;
  return std::string(nb::str(error.type().attr("__name__")).c_str()) + ": " + nb::str(error.value()).c_str();
}

bool truthy_attribute(nb::handle object, const char* attribute) {
  const nb::object value = nb::getattr(object, attribute, nb::none());
  const int truth = PyObject_IsTrue(value.ptr());
  if (truth < 0) PyErr_Clear();
  return truth == 1;
}

// Why a torch tensor could not be taken, in words; `reason` is what the framework said.
[[noreturn]] void throw_torch_refusal(const char* op, const char* arg, nb::handle object, const std::string& reason) {
  const std::string layout = nb::str(nb::getattr(object, "layout", nb::str("torch.strided"))).c_str();
  if (layout != "torch.strided" || reason.find("parse") != std::string::npos)
    throw TypeError(message(op, arg, "a dense (strided) tensor", "a sparse one (" + layout + "); call .to_dense() first"));
  if (truthy_attribute(object, "is_quantized"))
    throw TypeError(message(op, arg, "a plain tensor", "a torch quantized one; call .dequantize() or .int_repr() first"));
  if (truthy_attribute(object, "is_meta")) throw TypeError(message(op, arg, "a tensor with data", "a meta tensor; materialize it first"));
  throw TypeError(message(op, arg, "a tensor that DLPack can describe", object_type(object) + " (" + reason + ")"));
}

// PyObject_Vectorcall on a bound name; a new reference or null with a Python error.
PyObject* call_method(PyObject* name, PyObject* object, PyObject* const* extra, std::size_t num_extra, PyObject* keywords) {
  std::array<PyObject*, 4> arguments{object};
  for (std::size_t i = 0; i < num_extra; ++i) arguments[i + 1] = extra[i];
  return PyObject_VectorcallMethod(name, arguments.data(), 1 | PY_VECTORCALL_ARGUMENTS_OFFSET, keywords);
}

}  // namespace

// Imports the tensors of one Args. Two passes, because a producer is told the launch stream when it exports.
class Importer {
 public:
  Importer(Args& args, nb::handle stream) : args_(args), stream_argument_(stream) {}

  void run(std::initializer_list<TensorArg> tensors) {
    if (tensors.size() > Args::kMaxTensors) throw UnsupportedError("[dlpack] tensors: expected at most 20, got more");
    // Options that are left out stand at the end.
    const TensorArg *const begin = tensors.begin(), *end = tensors.end();
    while (end != begin && end[-1].optional && end[-1].object.is_none()) --end;
    args_.count_ = static_cast<std::size_t>(end - begin);
    // First pass: whatever needs no stream, and the devices of the rest. Inputs come first, as an output is often made like one: what is
    // wrong with both is said of the input.
    bool pending = false;
    for (const Access access : {Access::kRead, Access::kWrite}) {
      for (std::size_t i = 0; i < args_.count_; ++i) {
        const TensorArg& tensor = begin[i];
        if (tensor.access == access && !(tensor.optional && tensor.object.is_none())) pending = first_pass(tensor, i) || pending;
      }
    }
    if (args_.device_index_ < 0) {
      if (!stream_argument_.is_none()) static_cast<void>(stream_from_argument());
      return;
    }
    choose_stream();
    if (!pending) return;
    // Second pass: CUDA tensors that come through __dlpack__.
    for (std::size_t i = 0; i < args_.count_; ++i)
      if (pending_[i]) import_cuda_protocol(begin[i], i);
  }

 private:
  // Returns true if the tensor waits for the second pass.
  bool first_pass(const TensorArg& tensor, std::size_t i) {
    PyObject* const object = tensor.object.ptr();
    const TypeInfo& info = type_info(object);
    kinds_[i] = info.kind;
    switch (info.kind) {
      case Kind::kQuire: import_quire(tensor, i); break;
      case Kind::kExchange: import_exchange(tensor, i, info); break;
      case Kind::kNumPy: import_host_protocol(tensor, i, false); break;
      case Kind::kCuPy:
        if (kHasCuda && import_cupy(tensor, i)) break;
        [[fallthrough]];
      case Kind::kJax:
      case Kind::kProtocol: {
        const DLDevice device = ask_device(tensor);
        if (is_host(device.device_type)) {
          import_host_protocol(tensor, i, info.kind == Kind::kJax);
          break;
        }
        if (!is_cuda(device.device_type)) throw_other_device(args_.op_, tensor.name, device.device_type);
        if (!kHasCuda) throw_cpu_only_build(args_.op_);
        if (device.device_id < 0)
          throw std::invalid_argument(
              message(args_.op_, tensor.name, "a CUDA device's index of 0 or more", std::to_string(device.device_id)));
        note_device(device.device_id);
        if (info.kind == Kind::kCuPy) has_cupy_ = true;
        pending_[i] = true;
        return true;
      }
      case Kind::kMasked:
        throw TypeError(message(args_.op_, tensor.name, "a tensor without a mask", object_type(tensor.object) + "; call .filled() first"));
      case Kind::kNotATensor:
        throw TypeError(message(args_.op_, tensor.name, "a tensor (any object with __dlpack__)", object_type(tensor.object)));
    }
    finish(tensor, i);
    return false;
  }

  void note_device(int device_index) {
    if (args_.device_index_ < 0) args_.device_index_ = device_index;
    if (device_index != args_.device_index_) second_device_ = device_index;
  }

  void finish(const TensorArg& tensor, std::size_t i) {
    args_.present_[i] = true;
    const TensorView& view = args_.views_[i].get();
    if (view.device.type == DeviceType::kCUDA) note_device(view.device.index);
    if (tensor.access == Access::kWrite && view.read_only) {
      if (kinds_[i] == Kind::kJax)
        throw std::invalid_argument(message(args_.op_, tensor.name, "a writable tensor",
                                            std::string("a JAX array; JAX arrays are immutable: use quire.jax.") + args_.op_ +
                                                ", which returns what it wrote and takes donated arrays in place"));
      throw std::invalid_argument(message(args_.op_, tensor.name, "a writable tensor", "a read-only one; copy it first"));
    }
  }

  void import_quire(const TensorArg& tensor, std::size_t i) {
    if (!nb::inst_ready(tensor.object))
      throw TypeError(message(args_.op_, tensor.name, "a tensor", "a quire.Tensor that was never initialized"));
    args_.views_[i].emplace() = nb::inst_ptr<Tensor>(tensor.object)->view;
  }

  void import_exchange(const TensorArg& tensor, std::size_t i, const TypeInfo& info) {
    PyObject* const object = tensor.object.ptr();
    const DLPackExchangeAPI* const api = info.api;
    DLTensor t;
    if (api->dltensor_from_py_object_no_sync(object, &t) != 0)
      throw_torch_refusal(args_.op_, tensor.name, tensor.object, take_python_error());
    // Integers are outside autograd.
    if (t.dtype.code != kDLInt && t.dtype.code != kDLUInt) check_requires_grad(tensor, info.flags);
    // What is negated is the imaginary part of a conjugate: bfloat16 and float8 have no complex type, so
    // that only PyTorch's private _neg_view makes one of them. The question costs more than all else here.
    if (t.dtype.code == kDLFloat) check_is_neg(tensor, info.flags);
    if (t.data == nullptr && truthy_attribute(tensor.object, "is_meta"))
      throw TypeError(message(args_.op_, tensor.name, "a tensor with data", "a meta tensor; materialize it first"));
    fill_view(args_.op_, tensor.name, t, false, args_.views_[i].emplace());
    if (args_.views_[i].get().device.type == DeviceType::kCUDA) exchange_ = api;
  }

  // PyTorch's question whether it records gradients; null members where it is not loaded, or cannot be called directly.
  struct GradMode {
    nb::object is_enabled;
    PyCFunction direct = nullptr;

    GradMode() {
      const nb::object torch = nb::steal(PyImport_GetModule(nb::str("torch").ptr()));
      if (!torch.is_valid()) return;
      is_enabled = torch.attr("is_grad_enabled");
      if (PyCFunction_Check(is_enabled.ptr()) && PyCFunction_GetFlags(is_enabled.ptr()) == METH_NOARGS)
        direct = PyCFunction_GetFunction(is_enabled.ptr());
    }
  };

  // Not under no_grad and inference_mode, where no tensor need be asked whether it requires gradients. The mode is a call's.
  bool records_gradients(const AutogradFlags& flags) {
    // A type with an attribute of its own is asked without PyTorch, and with it only where that records.
    if (flags.requires_grad == nullptr && !nb::steal(PyImport_GetModule(nb::str("torch").ptr())).is_valid()) return true;
    if (!records_gradients_) {
      static const GradMode* const mode = new GradMode;
      nb::object answer = nb::bool_(true);
      if (mode->direct != nullptr)
        answer = nb::steal(mode->direct(PyCFunction_GetSelf(mode->is_enabled.ptr()), nullptr));
      else if (mode->is_enabled.is_valid())
        answer = mode->is_enabled();
      if (!answer.is_valid()) throw nb::python_error();
      records_gradients_ = answer.ptr() == Py_True;
    }
    return *records_gradients_;
  }

  // The exchange API looks neither at this nor at the next, and both change what the bytes mean.
  void check_requires_grad(const TensorArg& tensor, const AutogradFlags& flags) {
    if (!records_gradients(flags)) return;
    PyObject* const object = tensor.object.ptr();
    PyObject* const grad = flags.requires_grad != nullptr ? flags.requires_grad(object, flags.requires_grad_closure)
                                                          : PyObject_GetAttr(object, names().requires_grad);
    if (grad == nullptr) drop_python_error();
    Py_XDECREF(grad);
    if (grad == Py_True)
      throw std::invalid_argument(message(args_.op_, tensor.name, "a tensor outside autograd (quire is for inference)",
                                          "one with requires_grad; call .detach() first, or use torch.no_grad()"));
  }

  void check_is_neg(const TensorArg& tensor, const AutogradFlags& flags) {
    PyObject* const object = tensor.object.ptr();
    PyObject* const negated = flags.is_neg != nullptr
                                  ? flags.is_neg(object, nullptr)
                                  : PyObject_VectorcallMethod(names().is_neg, &object, 1 | PY_VECTORCALL_ARGUMENTS_OFFSET, nullptr);
    if (negated == nullptr) drop_python_error();
    Py_XDECREF(negated);
    if (negated == Py_True)
      throw std::invalid_argument(
          message(args_.op_, tensor.name, "a tensor whose memory holds its values", "a lazily negated one; call .resolve_neg() first"));
  }

  // A CuPy array by its attributes, in half of the time that DLPack takes. False, without a Python error, for one whose dtype DLPack has
  // not said yet (a later call knows it), and for whatever else is unusual: DLPack takes it, or says why not.
  bool import_cupy(const TensorArg& tensor, std::size_t i) {
    const auto get = [](nb::handle from, PyObject* name) { return nb::steal(PyObject_GetAttr(from.ptr(), name)); };
    const auto number = [](const nb::object& value) { return value.is_valid() ? PyLong_AsLongLong(value.ptr()) : -1LL; };
    const bool done = [&] {
      const nb::object dtype = get(tensor.object, names().dtype);
      const KnownDtype* const known = dtype.is_valid() ? find_dtype(dtype.ptr()) : nullptr;
      if (known == nullptr) return false;
      const nb::object memory = get(tensor.object, names().data), shape = get(tensor.object, names().shape),
                       strides = get(tensor.object, names().strides);
      if (!memory.is_valid() || !shape.is_valid() || !strides.is_valid() || !PyTuple_Check(shape.ptr()) || !PyTuple_Check(strides.ptr()))
        return false;
      const long long device = number(get(memory, names().device_id));
      const nb::object pointer = get(memory, names().ptr);
      const auto ndim = PyTuple_Size(shape.ptr());
      if (device < 0 || device > 1024 || !pointer.is_valid() || ndim > kMaxRank || PyTuple_Size(strides.ptr()) != ndim) return false;
      TensorView& view = args_.views_[i].emplace();
      const std::int64_t item_bytes = itemsize(known->dtype);
      std::int64_t numel = 1;
      for (Py_ssize_t d = 0; d < ndim; ++d) {
        const auto at = static_cast<std::size_t>(d);
        const long long extent = PyLong_AsLongLong(PyTuple_GetItem(shape.ptr(), d));
        const long long stride = PyLong_AsLongLong(PyTuple_GetItem(strides.ptr(), d));
        if (extent < 0 || stride % item_bytes != 0) return false;
        view.shape[at] = extent;
        view.strides[at] = stride / item_bytes;
        numel = checked_mul(numel, extent, args_.op_, tensor.name);
      }
      const unsigned long long address = PyLong_AsUnsignedLongLong(pointer.ptr());
      if (PyErr_Occurred() != nullptr || (address == 0 && numel > 0)) return false;
      view.data = reinterpret_cast<void*>(static_cast<std::uintptr_t>(address));
      view.dtype = known->dtype;
      view.device = Device{DeviceType::kCUDA, static_cast<int>(device)};
      view.ndim = static_cast<int>(ndim);
      tame_strides(view, numel > 0);
      return true;
    }();
    if (!done) {
      drop_python_error();
      return false;
    }
    has_cupy_ = orders_cupy_ = true;
    return true;
  }

  DLDevice ask_device(const TensorArg& tensor) {
    PyObject* const object = tensor.object.ptr();
    const nb::object result =
        nb::steal(PyObject_VectorcallMethod(names().dlpack_device, &object, 1 | PY_VECTORCALL_ARGUMENTS_OFFSET, nullptr));
    int type = 0, id = 0;
    if (!result.is_valid() || !PyTuple_Check(result.ptr()) || !PyArg_ParseTuple(result.ptr(), "ii", &type, &id))
      throw TypeError(message(args_.op_, tensor.name, "a tensor with __dlpack_device__",
                              object_type(tensor.object) + " (" + take_python_error() + ")"));
    return DLDevice{static_cast<DLDeviceType>(type), id};
  }

  void import_host_protocol(const TensorArg& tensor, std::size_t i, bool jax) {
    PyObject* const version = names().max_version;
    PyObject* capsule = call_method(names().dlpack, tensor.object.ptr(), &version, 1, names().kw_version);
    if (capsule == nullptr && PyErr_ExceptionMatches(PyExc_TypeError)) {  // a producer from before max_version
      PyErr_Clear();
      capsule = call_method(names().dlpack, tensor.object.ptr(), nullptr, 0, nullptr);
    }
    if (capsule == nullptr) {
      if (kinds_[i] == Kind::kNumPy && PyErr_ExceptionMatches(PyExc_BufferError) && import_ml_dtypes(tensor, i)) return;
      throw TypeError(message(args_.op_, tensor.name, "a tensor that DLPack can describe",
                              object_type(tensor.object) + " (" + take_python_error() + ")"));
    }
    take_capsule(tensor, i, capsule, jax);
  }

  // The capsule stays unconsumed: its own destructor frees what it holds when the call is over.
  void take_capsule(const TensorArg& tensor, std::size_t i, PyObject* capsule, bool jax) {
    args_.owners_[i] = capsule;
    if (PyCapsule_IsValid(capsule, "dltensor_versioned")) {
      const auto* managed = static_cast<const DLManagedTensorVersioned*>(PyCapsule_GetPointer(capsule, "dltensor_versioned"));
      if (managed->version.major != DLPACK_MAJOR_VERSION)
        throw TypeError(message(args_.op_, tensor.name, "DLPack version 1", "version " + std::to_string(managed->version.major)));
      fill_view(args_.op_, tensor.name, managed->dl_tensor, jax || (managed->flags & DLPACK_FLAG_BITMASK_READ_ONLY) != 0,
                args_.views_[i].emplace());
    } else if (PyCapsule_IsValid(capsule, "dltensor")) {
      const auto* managed = static_cast<const DLManagedTensor*>(PyCapsule_GetPointer(capsule, "dltensor"));
      fill_view(args_.op_, tensor.name, managed->dl_tensor, jax, args_.views_[i].emplace());
    } else {
      throw TypeError(message(args_.op_, tensor.name, "a DLPack capsule from __dlpack__", object_type(nb::handle(capsule))));
    }
  }

  // NumPy cannot export the dtypes of ml_dtypes: take the bytes as integers, and the dtype by its name.
  bool import_ml_dtypes(const TensorArg& tensor, std::size_t i) {
    PyErr_Clear();
    const nb::object dtype_name = nb::getattr(nb::getattr(tensor.object, "dtype", nb::none()), "name", nb::none());
    if (!nb::isinstance<nb::str>(dtype_name)) return fail_numpy();
    const std::string text = nb::str(dtype_name).c_str();
    DType dtype;
    const char* integer;
    if (text == "bfloat16") {
      dtype = DType::kBFloat16;
      integer = "u2";
    } else if (text == "float8_e4m3fn") {
      dtype = DType::kFloat8E4M3FN;
      integer = "u1";
    } else if (text == "float8_e5m2") {
      dtype = DType::kFloat8E5M2;
      integer = "u1";
    } else {
      return fail_numpy();
    }
    // The integer view has two-byte items that DLPack does name (uint16), so only its dtype has to be replaced.
    const nb::object integers = tensor.object.attr("view")(integer);
    PyObject* const version = names().max_version;
    PyObject* const capsule = call_method(names().dlpack, integers.ptr(), &version, 1, names().kw_version);
    if (capsule == nullptr) return fail_numpy();
    args_.owners_[i] = capsule;
    const auto* managed = static_cast<const DLManagedTensorVersioned*>(PyCapsule_GetPointer(capsule, "dltensor_versioned"));
    if (managed == nullptr) throw nb::python_error();
    DLTensor t = managed->dl_tensor;
    t.dtype = to_dlpack(dtype);
    fill_view(args_.op_, tensor.name, t, (managed->flags & DLPACK_FLAG_BITMASK_READ_ONLY) != 0, args_.views_[i].emplace());
    return true;
  }

  static bool fail_numpy() {
    if (PyErr_Occurred() == nullptr) PyErr_SetString(PyExc_BufferError, "NumPy cannot export this dtype or byte order through DLPack");
    return false;
  }

  // ---- streams -------------------------------------------------------------------------------------------------------
  Stream stream_from_argument() {
    const nb::handle value = stream_argument_;
    const auto from_number = [&](std::uint64_t number) {
      // 0 is ambiguous in DLPack; as a raw handle it is the legacy stream, whose other name is 1.
      return Stream(reinterpret_cast<void*>(static_cast<std::uintptr_t>(number == 0 ? 1 : number)));
    };
    if (nb::isinstance<nb::int_>(value)) {
      const std::uint64_t number = PyLong_AsUnsignedLongLong(value.ptr());
      if (PyErr_Occurred() != nullptr) {
        PyErr_Clear();
        throw std::invalid_argument(message(args_.op_, "stream", "a stream handle of 0 or more", std::string(nb::str(value).c_str())));
      }
      return from_number(number);
    }
    if (PyObject_HasAttr(value.ptr(), names().cuda_stream) != 0) {
      const nb::object pair = nb::getattr(value, "__cuda_stream__")();
      int protocol = 0;
      unsigned long long handle = 0;
      if (!PyTuple_Check(pair.ptr()) || !PyArg_ParseTuple(pair.ptr(), "iK", &protocol, &handle) || protocol != 0) {
        PyErr_Clear();
        throw TypeError(message(args_.op_, "stream", "__cuda_stream__() to return (0, handle)", std::string(nb::str(pair).c_str())));
      }
      return from_number(handle);
    }
    throw TypeError(message(args_.op_, "stream", "an int, an object with __cuda_stream__, or None", object_type(value)));
  }

  static Stream cupy_stream(int device_index) {
    static const nb::object* const get_current = new nb::object(nb::module_::import_("cupy").attr("cuda").attr("get_current_stream"));
    const auto handle = nb::cast<std::uintptr_t>((*get_current)(device_index).attr("ptr"));
    return Stream(reinterpret_cast<void*>(handle == 0 ? std::uintptr_t{1} : handle));
  }

  Stream exchange_stream(int device_index) const {
    void* handle = nullptr;
    if (exchange_->current_work_stream(kDLCUDA, device_index, &handle) != 0) throw nb::python_error();
    return Stream(handle == nullptr ? reinterpret_cast<void*>(std::uintptr_t{1}) : handle);
  }

  void choose_stream() {
    if constexpr (!kHasCuda) {
      throw_cpu_only_build(args_.op_);
    } else {
      release_finished_holds();
      const bool is_explicit = !stream_argument_.is_none();
      if (is_explicit) {
        args_.stream_ = stream_from_argument();
      } else if (exchange_ != nullptr) {
        args_.stream_ = exchange_stream(args_.device_index_);
      } else if (has_cupy_) {
        args_.stream_ = cupy_stream(args_.device_index_);
      } else {
        args_.stream_ = Stream(reinterpret_cast<void*>(std::uintptr_t{1}));
      }
      if (!is_explicit && !has_cupy_ && second_device_ < 0) return;
      if (args_.capturing()) return;
      const int device = args_.device_index_;
      if (exchange_ != nullptr && is_explicit) order_after(exchange_stream(device), device, true);
      if (has_cupy_ && (is_explicit || exchange_ != nullptr)) order_after(cupy_stream(device), device, orders_cupy_);
      if (second_device_ >= 0) {  // swap_blocks between two GPUs; every other op refuses it later
        if (exchange_ != nullptr) order_after(exchange_stream(second_device_), second_device_, true);
        if (has_cupy_) order_after(cupy_stream(second_device_), second_device_, true);
      }
    }
  }

  // The op runs behind what `producer` holds (unless the producer does that itself, in __dlpack__), and `producer` behind the op.
  void order_after(Stream producer, int device_index, bool before) {
    // One handle on two devices, as that of the default stream, is two streams.
    if (producer.handle() == args_.stream_.handle() && device_index == args_.device_index_) return;
    if constexpr (kHasCuda) {
      if (before) cuda::order_streams(producer, device_index, args_.stream_, args_.device_index_);
    }
    args_.producer_devices_[args_.num_producer_streams_ % args_.producer_devices_.size()] = device_index;
    if (args_.num_producer_streams_ < args_.producer_streams_.size())
      args_.producer_streams_[args_.num_producer_streams_++] = producer.handle();
  }

  void import_cuda_protocol(const TensorArg& tensor, std::size_t i) {
    if (args_.capturing() && kinds_[i] == Kind::kJax)
      throw UnsupportedError(
          message(args_.op_, tensor.name, "no JAX array while a CUDA graph is captured", "one; capture through jax.jit instead"));
    // While capturing, ordering is the graph's; -1 tells the producer to do nothing.
    const long long number = args_.capturing() ? -1LL : static_cast<long long>(reinterpret_cast<std::intptr_t>(args_.stream_.handle()));
    const nb::object stream = nb::steal(PyLong_FromLongLong(number));
    std::array<PyObject*, 2> extra{names().max_version, stream.ptr()};
    PyObject* capsule = call_method(names().dlpack, tensor.object.ptr(), extra.data(), 2, names().kw_version_stream);
    if (capsule == nullptr && PyErr_ExceptionMatches(PyExc_TypeError)) {
      PyErr_Clear();
      static PyObject* const kw_stream = Py_BuildValue("(s)", "stream");
      capsule = call_method(names().dlpack, tensor.object.ptr(), &extra[1], 1, kw_stream);
    }
    if (capsule == nullptr)
      throw TypeError(message(args_.op_, tensor.name, "a tensor that DLPack can describe",
                              object_type(tensor.object) + " (" + take_python_error() + ")"));
    take_capsule(tensor, i, capsule, kinds_[i] == Kind::kJax);
    if (kinds_[i] != Kind::kCuPy) {
      args_.producer_needs_hold_ = true;
    } else if (const nb::object dtype = nb::steal(PyObject_GetAttr(tensor.object.ptr(), names().dtype)); dtype.is_valid()) {
      learn_dtype(dtype.ptr(), args_.views_[i].get().dtype);
    } else {
      drop_python_error();
    }
    finish(tensor, i);
  }

  Args& args_;
  nb::handle stream_argument_;
  std::array<Kind, Args::kMaxTensors> kinds_{};
  std::array<bool, Args::kMaxTensors> pending_{};
  const DLPackExchangeAPI* exchange_ = nullptr;  // of a CUDA tensor
  bool has_cupy_ = false;
  bool orders_cupy_ = false;  // of CuPy's arrays that came without __dlpack__, which would have ordered them before the op
  int second_device_ = -1;
  std::optional<bool> records_gradients_;
};

// ---- lifetimes ---------------------------------------------------------------------------------------------------------
#ifdef QUIRE_HAS_CUDA
namespace {

// This thread's last CUDA launch, for hand_over().
struct Launch {
  void* stream = nullptr;
  int device_index = -1;
};
thread_local Launch last_launch;

// Capsules of a launch whose producer may reuse memory in an order of its own; held until the launch is done.
struct Hold {
  cuda::Marker marker;
  std::vector<PyObject*> owners;
};

std::deque<Hold>& holds() {
  static auto* const instance = new std::deque<Hold>;  // guarded by the GIL; leaked on purpose, as the driver may be gone at exit
  return *instance;
}

}  // namespace

void hand_over(Tensor& tensor) {
  if (tensor.view.device.type != DeviceType::kCUDA || last_launch.device_index < 0) return;
  tensor.written = std::make_shared<cuda::Marker>(Stream(last_launch.stream), last_launch.device_index);
}

void release_finished_holds() {
  std::deque<Hold>& queue = holds();
  while (!queue.empty() && queue.front().marker.done()) {
    const std::vector<PyObject*> owners = std::move(queue.front().owners);
    queue.pop_front();
    for (PyObject* owner : owners) Py_DECREF(owner);
  }
}
#else
void hand_over(Tensor&) {}
void release_finished_holds() {}
#endif

Args::Args(const char* op, nb::handle stream, std::initializer_list<TensorArg> tensors) : op_(op) {
  try {
    Importer(*this, stream).run(tensors);
  } catch (...) {
    for (PyObject* owner : owners_) Py_XDECREF(owner);
    throw;
  }
}

Args::~Args() {
  for (std::size_t i = 0; i < count_; ++i) Py_XDECREF(owners_[i]);
}

bool Args::capturing() const {
  if (!capturing_) {
    capturing_ = false;
    if constexpr (kHasCuda) capturing_ = device_index_ >= 0 && cuda::is_capturing(stream_);
  }
  return *capturing_;
}

void Args::after_launch() {
#ifdef QUIRE_HAS_CUDA
  last_launch = {stream_.handle(), device_index_};
  for (std::size_t i = 0; i < num_producer_streams_; ++i)
    cuda::order_streams(stream_, device_index_, Stream(producer_streams_[i]), producer_devices_[i]);
  if (!producer_needs_hold_ || capturing()) return;
  Hold hold{cuda::Marker(stream_, device_index_), {}};
  for (std::size_t i = 0; i < count_; ++i)
    if (owners_[i] != nullptr) hold.owners.push_back(std::exchange(owners_[i], nullptr));
  holds().push_back(std::move(hold));
#endif
}

void Args::synchronize() const {
  if (device_index_ < 0) return;
  if (capturing())
    throw UnsupportedError(message(op_, "stream", "one that is not being captured, since the host reads contents", "one that is"));
  if constexpr (kHasCuda) {
    const GilRelease release;
    cuda::synchronize(stream_, device_index_);
  }
}

}  // namespace quire::bindings
