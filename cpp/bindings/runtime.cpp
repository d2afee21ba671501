// Bindings of the runtime: exceptions, build facts, threads, deferred errors, the border's own benchmark.
// SPDX-License-Identifier: Apache-2.0
#include "quire/runtime.h"

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <vector>

#include "bindings/bindings.h"
#include "bindings/gil.h"
#include "bindings/scalar_args.h"
#include "bindings/tensor_args.h"
#include "quire/error.h"
#include "quire/explain.h"

namespace quire::bindings {

void bind_runtime(nb::module_& m) {
  // The translator that is registered last is asked first; TypeError is an invalid_argument, so it must come before the built-in.
  nb::exception<UnsupportedError>(m, "UnsupportedError", PyExc_RuntimeError).attr("__doc__") =
      "The request is well formed, but this build, device or kernel does not do it; the text names what is supported.";
  nb::exception<CudaError>(m, "CudaError", PyExc_RuntimeError).attr("__doc__") =
      "A CUDA call failed; the text holds the call, the error's name and text, and file:line.";
  nb::register_exception_translator(
      [](const std::exception_ptr& pointer, void*) {
        try {
          std::rethrow_exception(pointer);
        } catch (const TypeError& error) {
          PyErr_SetString(PyExc_TypeError, error.what());
        } catch (const OutOfMemoryError& error) {
          PyErr_SetString(PyExc_MemoryError, error.what());
        }
      },
      nullptr);

  m.def("version", &version, "The library's version.");
  m.def("has_cuda", &has_cuda, "Whether this build contains CUDA kernels.");
  m.def("num_cuda_devices", &num_cuda_devices, "CUDA devices that the driver shows; 0 without one. Never raises.");
  m.def("cuda_architectures", &cuda_architectures,
        "The architectures that the CUDA kernels were compiled for, as CMake spells them; empty in a CPU-only build.");
  m.def("cuda_runtime_version", &cuda_runtime_version, "The CUDA runtime of this build, 1000 * major + 10 * minor; 0 in a CPU-only build.");
  m.def("cpu_isa", &cpu_isa,
        "The instruction set that the CPU kernels use: \"scalar\", \"avx2\", \"avx512\" or \"avx512_amx\". The environment variable "
        "QUIRE_CPU_ISA lowers it.");
  m.def(
      "set_num_threads",
      [](nb::handle n) {
        const std::int64_t count = to_int("set_num_threads", "num_threads", n);
        set_num_threads(static_cast<int>(count < 0 ? 0 : count > 4096 ? 4096 : count));
      },
      nb::arg("num_threads").none(), nb::sig("def set_num_threads(num_threads: int) -> None"),
      "Sets the number of threads that CPU ops use, the caller included: 1 to 1024, else ValueError.");
  m.def("num_threads", &num_threads,
        "The number of threads that CPU ops use. It starts as the number of cores in the process's affinity mask, or QUIRE_NUM_THREADS.");
  m.def(
      "check_errors",
      [](nb::handle device) {
        std::vector<Device> devices;
        if (device.is_none()) {
          devices.push_back(Device{});
          for (int i = 0; i < num_cuda_devices(); ++i) devices.push_back(Device{DeviceType::kCUDA, i});
        } else {
          devices.push_back(to_device("check_errors", device));
        }
        const GilRelease release;
        for (const Device d : devices) check_errors(d);
      },
      nb::arg("device") = nb::none(),
      R"doc(Raises IndexError if an op on the device met an index value out of range since the last call. Waits for a CUDA device's work.

Args:
    device: "cpu", "cuda", "cuda:<index>", or a framework's device; None: every device.

Raises:
    IndexError: There was one; the text names op, argument and value.
    ValueError: That is no device.
    quire.UnsupportedError: "cuda" in a CPU-only build.
)doc");
  m.def(
      "synchronize",
      [](const std::string& op, const std::string& arg, nb::handle x, nb::handle stream) {
        Args(op.c_str(), stream, {{x, arg.c_str()}}).synchronize();
      },
      nb::arg("op"), nb::arg("arg"), nb::arg("x").none(), nb::arg("stream").none(),
      "Waits for the stream that an op on the tensor would run on, so that the host may read what it holds; nothing for one on the CPU. "
      "Raises UnsupportedError if the stream is being captured.");
  m.def(
      "explain",
      [](nb::callable call) {
        const Explanation explanation = explain([&] { call(); });
        nb::list reasons;
        for (const std::string& reason : explanation.reasons) reasons.append(nb::str(reason.c_str()));
        return nb::make_tuple(explanation.op, explanation.device, explanation.variant, reasons);
      },
      nb::sig("def explain(call: object) -> tuple[str, str, str, list[str]]"), nb::arg("call"),
      "Calls `call` with every op of this thread saying what it would run instead of running: (op, device, variant, reasons).");
  m.def(
      "import_tensors",
      [](nb::handle a, nb::handle b, nb::handle c, nb::handle d, nb::handle e, nb::handle f) {
        const Args args("import_tensors", nb::none(), {{a, "a"}, {b, "b"}, {c, "c"}, {d, "d"}, {e, "e"}, {f, "f"}});
      },
      nb::arg("a").none(), nb::arg("b").none(), nb::arg("c").none(), nb::arg("d").none(), nb::arg("e").none(), nb::arg("f").none(),
      "Imports six tensors and drops them: what the border costs.");
}

}  // namespace quire::bindings
