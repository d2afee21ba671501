// The exceptions that quire throws. Nothing in the library exits, aborts or asserts on user input.
// SPDX-License-Identifier: Apache-2.0
//
//   shape, layout, alias, value mistakes   std::invalid_argument   (Python ValueError)
//   wrong dtype, not a tensor              quire::TypeError        (Python TypeError)
//   bad contents of an index tensor        quire::IndexError       (Python IndexError)
//   not built, not available, no such size quire::UnsupportedError (Python quire.UnsupportedError)
//   memory                                 quire::OutOfMemoryError (Python MemoryError)
//   a CUDA call failed                     quire::CudaError        (Python quire.CudaError)
//
// Every message has the form "[op] argument: expected ..., got ...".
#pragma once

#include <new>
#include <stdexcept>
#include <string>

#include "quire/export.h"

namespace quire {

/// A tensor has a dtype that the op does not take here, or an argument is no tensor at all.
class QUIRE_API TypeError : public std::invalid_argument {
 public:
  using std::invalid_argument::invalid_argument;
};

/// An index tensor holds a value out of range.
class QUIRE_API IndexError : public std::out_of_range {
 public:
  using std::out_of_range::out_of_range;
};

/// The request is well formed, but this build, device or kernel does not do it; the text names what is supported.
class QUIRE_API UnsupportedError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// Memory could not be had; the text says how many bytes, on which device.
class QUIRE_API OutOfMemoryError : public std::bad_alloc {
 public:
  explicit OutOfMemoryError(std::string message) : message_(std::move(message)) {}
  const char* what() const noexcept override { return message_.c_str(); }

 private:
  std::string message_;
};

/// A CUDA call failed; the text holds the call, the error's name and text, and file:line.
class QUIRE_API CudaError : public std::runtime_error {
 public:
  CudaError(const std::string& message, int code) : std::runtime_error(message), code_(code) {}
  /// The cudaError_t value.
  int code() const noexcept { return code_; }

 private:
  int code_;
};

}  // namespace quire
