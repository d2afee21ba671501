// Stream: a CUDA stream as a type of its own, so that no 0 or nullptr becomes one by accident.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>

namespace quire {

/// The CUDA stream that an op enqueues its work on. Ops on CPU tensors run before they return and ignore it.
class Stream {
 public:
  /// From a cudaStream_t. The caller keeps the stream alive until the work is done.
  explicit Stream(void* handle) : handle_(handle) {}
  Stream(int) = delete;
  Stream(std::nullptr_t) = delete;

  /// The legacy default stream. Naming it is the only way to get it.
  static Stream legacy_default() { return Stream(static_cast<void*>(nullptr)); }

  void* handle() const { return handle_; }

 private:
  void* handle_;
};

}  // namespace quire
