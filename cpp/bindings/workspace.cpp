// The workspace that ops get when the caller passes none.
// SPDX-License-Identifier: Apache-2.0
#include "bindings/workspace.h"

#include <algorithm>
#include <functional>
#include <map>
#include <memory>
#include <thread>
#include <tuple>
#include <vector>

#include "core/runtime.h"
#include "cuda/runtime.h"
#include "quire/runtime.h"

namespace quire::bindings {
namespace {

struct Workspace {
  std::mutex mutex;
  std::vector<std::shared_ptr<Buffer>> buffers;  // the last one is in use
};

// Leaked on purpose: the driver may be gone at exit. CUDA device, stream, thread (per-thread default stream only), capture.
using Key = std::tuple<int, void*, std::size_t, unsigned long long>;

Workspace& find(const Key& key) {
  static auto* const mutex = new std::mutex;
  static auto* const all = new std::map<Key, Workspace>;
  const std::lock_guard lock(*mutex);
  return (*all)[key];
}

// `capturing`: whether the stream is being captured.
WorkspaceLease lease_workspace(std::int64_t num_bytes, Device device, Stream stream, bool capturing) {
  if (device.type == DeviceType::kCPU) {
    std::shared_ptr<Buffer> buffer = Buffer::allocate(num_bytes, device);
    const TensorView view(buffer->data(), DType::kUInt8, {num_bytes}, device);
    return {view, std::unique_lock<std::mutex>(), std::move(buffer)};
  }
  constexpr std::int64_t kFirstBytes = std::int64_t{1} << 22;
  // What this thread used last needs no look; a workspace stays where it is.
  struct Recent {
    int device = -1;
    void* stream = nullptr;
    Workspace* workspace = nullptr;
  };
  thread_local Recent recent;
  unsigned long long capture = 0;
  if constexpr (kHasCuda) {
    if (capturing) capture = cuda::capture_id(stream);
  }
  if (capture != 0 || recent.workspace == nullptr || recent.device != device.index || recent.stream != stream.handle()) {
    const bool per_thread = stream.handle() == reinterpret_cast<void*>(std::uintptr_t{2});
    const std::size_t thread = per_thread ? std::hash<std::thread::id>{}(std::this_thread::get_id()) : 0;
    recent = {device.index, stream.handle(), &find({device.index, stream.handle(), thread, capture})};
  }
  Workspace& workspace = *recent.workspace;
  if (capture != 0) recent.workspace = nullptr;
  std::unique_lock lock(workspace.mutex);
  std::vector<std::shared_ptr<Buffer>>& buffers = workspace.buffers;
  if (buffers.empty() || buffers.back()->num_bytes() < num_bytes) {
    const std::int64_t grown = !buffers.empty() ? 2 * buffers.back()->num_bytes() : capture == 0 ? kFirstBytes : 0;
    buffers.push_back(Buffer::allocate(std::max(num_bytes, grown), device));
  }
  return {TensorView(buffers.back()->data(), DType::kUInt8, {buffers.back()->num_bytes()}, device), std::move(lock), nullptr};
}

}  // namespace

const TensorView* choose_workspace(const Args& args, const TensorView* given, std::int64_t num_bytes, Device device, Stream stream,
                                   WorkspaceLease& lease) {
  if (given != nullptr || num_bytes == 0) return given;
  lease = lease_workspace(num_bytes, device, stream, args.capturing());
  return &lease.view;
}

}  // namespace quire::bindings
