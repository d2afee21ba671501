// The library's own state: CPU threads, what this build contains, deferred errors, and owned memory.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "quire/export.h"
#include "quire/stream.h"
#include "quire/tensor.h"

namespace quire {

/// The version, as in version.h.
QUIRE_API const char* version();

/// True when the library contains CUDA kernels.
QUIRE_API bool has_cuda();

/// The number of CUDA devices that the driver shows; 0 without a driver, a device or CUDA kernels. Never throws.
QUIRE_API int num_cuda_devices();

/// The architectures that the CUDA kernels were compiled for, as CMake spells them; empty in a CPU-only build.
QUIRE_API std::string cuda_architectures();

/// The CUDA runtime that the library was built with, as 1000 * major + 10 * minor; 0 in a CPU-only build.
QUIRE_API int cuda_runtime_version();

/// The instruction set that the CPU kernels use on this machine: "scalar", "avx2", "avx512" or "avx512_amx".
/// The environment variable QUIRE_CPU_ISA lowers it.
QUIRE_API std::string cpu_isa();

/// Sets the number of threads that CPU ops use, the calling thread included.
/// Throws std::invalid_argument unless 1 <= num_threads <= 1024.
QUIRE_API void set_num_threads(int num_threads);

/// The number of threads that CPU ops use. It starts as the number of cores in the process's affinity mask.
QUIRE_API int num_threads();

/// Throws IndexError when an op on `device` has met an index value out of range since the last call; the text names
/// op, argument and value. For a CUDA device on which an op that guards indices has run, this waits for the device's work so far: it is
/// the one call that does.
QUIRE_API void check_errors(Device device);

/// Memory of the core's own: 64-byte aligned host memory or device memory, freed when the last reference goes.
class QUIRE_API Buffer {
 public:
  /// Throws OutOfMemoryError when the memory cannot be had, std::invalid_argument for a negative size.
  static std::shared_ptr<Buffer> allocate(std::int64_t num_bytes, Device device);
  /// Page-locked host memory, which swap_blocks moves at the link's rate. CUDA builds only (else UnsupportedError).
  static std::shared_ptr<Buffer> allocate_pinned(std::int64_t num_bytes);

  ~Buffer();
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  void* data() const { return data_; }
  std::int64_t num_bytes() const { return num_bytes_; }
  Device device() const { return device_; }
  bool is_pinned() const { return pinned_; }

 private:
  Buffer(void* data, std::int64_t num_bytes, Device device, bool pinned)
      : data_(data), num_bytes_(num_bytes), device_(device), pinned_(pinned) {}

  void* data_;
  std::int64_t num_bytes_;
  Device device_;
  bool pinned_;
};

}  // namespace quire
