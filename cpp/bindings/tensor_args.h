// The border: Python tensors become TensorViews, without a copy, with the right stream and lifetime.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <dlpack/dlpack.h>
#include <nanobind/nanobind.h>

#include <array>
#include <cstddef>
#include <initializer_list>
#include <new>
#include <optional>
#include <string>

#include "bindings/gil.h"
#include "quire/quantization.h"
#include "quire/stream.h"
#include "quire/tensor.h"

namespace quire::bindings {

namespace nb = nanobind;

struct Tensor;

/// What the op does with an argument.
enum class Access { kRead, kWrite };

/// One tensor argument of a call. None is allowed where `optional` is set.
struct TensorArg {
  nb::handle object;
  const char* name;
  Access access = Access::kRead;
  bool optional = false;
};

/// The tensors of one call, imported together, because the stream depends on all of them:
///   stream=     an int (1: legacy, 2: per-thread default), or an object with __cuda_stream__; left out, the current stream of the
///               framework that the tensors come from (PyTorch, CuPy), else the legacy default stream.
/// A producer that works on another stream is ordered before the op, and after it when it knows its own stream.
/// Usage: Args args("op", stream, {{x, "x"}, ...}); args.run([&](Stream s) { op(args[0], s); });
class Args {
 public:
  static constexpr std::size_t kMaxTensors = 20;

  Args(const char* op, nb::handle stream, std::initializer_list<TensorArg> tensors);
  ~Args();
  Args(const Args&) = delete;
  Args& operator=(const Args&) = delete;

  const TensorView& operator[](std::size_t i) const { return views_[i].get(); }
  /// Null where None was passed.
  const TensorView* optional(std::size_t i) const { return present_[i] ? &views_[i].get() : nullptr; }

  /// Calls f(stream) without the GIL, then orders the producers' streams behind it.
  template <typename F>
  void run(F&& f) {
    {
      const GilRelease release;
      f(stream_);
    }
    if (device_index_ >= 0) after_launch();
  }

  /// Whether the stream is being captured into a CUDA graph.
  bool capturing() const;

  /// Waits on the host for the stream, which the tensors' producers are ordered before. Throws UnsupportedError if it is being captured.
  void synchronize() const;

 private:
  friend class Importer;

  // Room for a view that is not zeroed before it is filled: a call uses few of them.
  class Slot {
   public:
    TensorView& get() { return *std::launder(reinterpret_cast<TensorView*>(storage_)); }
    const TensorView& get() const { return *std::launder(reinterpret_cast<const TensorView*>(storage_)); }
    TensorView& emplace() { return *new (storage_) TensorView(); }

   private:
    alignas(TensorView) std::byte storage_[sizeof(TensorView)];
  };

  void after_launch();

  const char* op_;
  std::size_t count_ = 0;
  std::array<Slot, kMaxTensors> views_;
  std::array<bool, kMaxTensors> present_{};
  std::array<PyObject*, kMaxTensors> owners_{};  // capsules that keep imported memory alive during the call
  Stream stream_ = Stream::legacy_default();
  int device_index_ = -1;                      // of the first CUDA tensor
  bool producer_needs_hold_ = false;           // some producer may reuse memory before the launch has run (JAX)
  mutable std::optional<bool> capturing_;      // asked when it matters: not for PyTorch's tensors on their own stream
  std::array<void*, 4> producer_streams_{};    // work streams other than stream_, to be ordered behind the launch
  std::array<int, 4> producer_devices_{};      // their devices
  std::size_t num_producer_streams_ = 0;
};

/// What an op does with its scales.
inline Access scale_access(ScaleGranularity granularity) {
  return granularity == ScaleGranularity::kTensor ? Access::kRead : Access::kWrite;
}

/// Marks a tensor as written by this thread's last CUDA launch, so that whoever takes it through DLPack on a stream waits for that.
void hand_over(Tensor& tensor);

/// Releases what earlier launches held, where they are done. Called on every CUDA import.
void release_finished_holds();

}  // namespace quire::bindings
