// The workspace that ops get when the caller passes none: on CUDA grow-only, one for each device and stream.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>

#include "bindings/tensor_args.h"
#include "quire/runtime.h"
#include "quire/stream.h"
#include "quire/tensor.h"

namespace quire::bindings {

/// A workspace, and the right to enqueue work on it: two threads on one stream must not interleave the launches of their ops.
struct WorkspaceLease {
  TensorView view;
  std::unique_lock<std::mutex> lock;
  std::shared_ptr<Buffer> buffer;  // the call's own, on the CPU
};

/// The caller's workspace, or else a uint8 one of at least num_bytes in `lease`; null if num_bytes is 0. Call without the GIL, and keep the
/// lease until the last launch is made, on the CPU until the op returns.
/// On the CPU each call has its own. On CUDA each stream of a device has one, each thread where `stream` is the per-thread default stream, and
/// each capture of a CUDA graph. Smaller ones are kept when it grows, because work in flight or a captured graph may still use them; sizes at
/// least double, so all of them together take less than twice the newest.
const TensorView* choose_workspace(const Args& args, const TensorView* given, std::int64_t num_bytes, Device device, Stream stream,
                                   WorkspaceLease& lease);

}  // namespace quire::bindings
