// The workspace that ops get when the caller passes none.
// SPDX-License-Identifier: Apache-2.0
#include "bindings/workspace.h"

#include <algorithm>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "quire/runtime.h"

namespace quire::bindings {

TensorView shared_workspace(std::int64_t num_bytes, Device device, Stream stream) {
  constexpr std::int64_t kFirstBytes = std::int64_t{1} << 22;
  using Kept = std::map<std::pair<int, void*>, std::vector<std::shared_ptr<Buffer>>>;
  static auto* const kept = new Kept;  // leaked on purpose: the driver may be gone at exit
  if (num_bytes == 0) return TensorView(nullptr, DType::kUInt8, {0}, device);
  std::vector<std::shared_ptr<Buffer>>& buffers = (*kept)[{device.index, stream.handle()}];
  if (buffers.empty() || buffers.back()->num_bytes() < num_bytes) {
    const std::int64_t grown = buffers.empty() ? kFirstBytes : 2 * buffers.back()->num_bytes();
    buffers.push_back(Buffer::allocate(std::max(num_bytes, grown), device));
  }
  return TensorView(buffers.back()->data(), DType::kUInt8, {buffers.back()->num_bytes()}, device);
}

}  // namespace quire::bindings
