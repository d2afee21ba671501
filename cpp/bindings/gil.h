// Releasing the GIL around an op, also while the interpreter shuts down.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <nanobind/nanobind.h>
#include <unistd.h>

namespace quire::bindings {

/// Releases the GIL for a scope.
///
/// A thread that asks for the GIL while the interpreter shuts down is ended by CPython (before 3.14) with pthread_exit, whose unwinding
/// would meet noexcept frames and abort the process. Such a thread stays here instead, and ends with the process.
class GilRelease {
 public:
  GilRelease() : state_(PyEval_SaveThread()) {}
  ~GilRelease() {
    try {
      PyEval_RestoreThread(state_);
    } catch (...) {
      for (;;) pause();
    }
  }
  GilRelease(const GilRelease&) = delete;
  GilRelease& operator=(const GilRelease&) = delete;

 private:
  PyThreadState* state_;
};

}  // namespace quire::bindings
