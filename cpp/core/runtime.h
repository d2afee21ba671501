// What ops share at run time: choosing the backend, and deferred errors.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>
#include <utility>

#include "core/check.h"
#include "core/error_word.h"
#include "core/explain.h"
#include "cuda/runtime.h"
#include "quire/runtime.h"
#include "quire/stream.h"
#include "quire/tensor.h"

namespace quire {

#ifdef QUIRE_HAS_CUDA
inline constexpr bool kHasCuda = true;
#else
inline constexpr bool kHasCuda = false;
#endif

[[noreturn]] void throw_cpu_only_build(const char* op, const char* what = "device: expected cpu, got cuda");

/// cpu(), or cuda_call(stream) with the device current. The one place that switches on the device. `cuda_call` is a generic lambda, so that a
/// CPU-only build neither compiles its body nor links what it names.
template <typename Cpu, typename Cuda>
void on_device(const char* op, Device device, Stream stream, Cpu&& cpu, Cuda&& cuda_call) {
  if (device.type == DeviceType::kCPU) {
    cpu();
  } else if constexpr (kHasCuda) {
    const cuda::DeviceScope scope(device.index);
    cuda_call(stream);
  } else {
    static_cast<void>(cuda_call);
    static_cast<void>(stream);
    throw_cpu_only_build(op);
  }
}

/// Runs an op's backend on `device`, or has it explained; `explains` says which backends do so themselves.
template <typename Cpu, typename Cuda>
void dispatch_device(const char* op, Device device, Stream stream, Cpu&& cpu, Cuda&& cuda, Explains explains = Explains::kNeither) {
  if (Explanation* const explanation = explaining()) {
    if (is_validation(explanation)) return;
    const bool is_cpu = device.type == DeviceType::kCPU;
    *explanation = Explanation{op, is_cpu ? "cpu" : "cuda:" + std::to_string(device.index), {}, {}};
    if (explains == Explains::kNeither || (is_cpu && explains == Explains::kCuda))
      return is_cpu ? explain_cpu(*explanation, "", false) : explain_only_kernel(*explanation);
  }
  on_device(op, device, stream, std::forward<Cpu>(cpu), std::forward<Cuda>(cuda));
}

/// "slot_mapping" and so on, for messages.
const char* name(OpId op);
const char* name(ArgId arg);

/// The CPU backend's error word, taken and cleared.
ErrorWord take_cpu_error();

}  // namespace quire
