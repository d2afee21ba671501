// What every CUDA launcher shares: error checks, device properties, the error word. Host code only.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "core/error_word.h"
#include "quire/stream.h"

namespace quire::cuda {

/// Throws CudaError (OutOfMemoryError for an allocation failure) unless `status` is success; clears a non-sticky error.
void check(cudaError_t status, const char* call, const char* file, int line);

#define QUIRE_CUDA_CHECK(call) ::quire::cuda::check((call), #call, __FILE__, __LINE__)

/// Checks the launch that was just made; with QUIRE_SYNC=1 also waits for the stream and checks what ran.
void check_launch(const char* kernel, Stream stream, const char* file, int line);

#define QUIRE_CHECK_LAUNCH(kernel, stream) ::quire::cuda::check_launch((kernel), (stream), __FILE__, __LINE__)

struct DeviceProperties {
  int num_sms;
  int compute_capability;        // 10 * major + minor
  int max_shared_bytes_per_cta;  // opt-in limit
  int l2_bytes;
};

/// Read once per device, then cached.
const DeviceProperties& device_properties(int device_index);
/// The current device's. Ops have a DeviceScope around them (dispatch_device), so that this asks nobody.
const DeviceProperties& current_device_properties();

/// The current device's error word, in device memory. Made on first use, also inside a stream capture.
ErrorWord* error_word();

/// Memory of the current device, all zero, for the library's own use until the process ends. Also inside a stream capture; once made it is
/// ready for every stream.
void* allocate_zeroed(std::size_t num_bytes);

/// Raises a kernel's dynamic shared memory limit, once per kernel and device; `Kernel` is the kernel itself.
void set_max_shared_bytes(const void* kernel, int shared_bytes);

/// What a launch is, besides its kernel.
struct LaunchShape {
  dim3 grid, block;
  int shared_bytes = 0;  // dynamic; the kernel's limit is raised to it
  int cluster_ctas = 0;  // 0: no clusters
};

/// Clusters of the shape that run on the current device at once; max_active_clusters in cuda/once_per_device.h remembers it.
int ask_max_active_clusters(const void* kernel, const LaunchShape& shape);

void launch_waiting(const char* name, const void* kernel, const LaunchShape& shape, Stream stream, void** arguments);

/// Launches a kernel whose CTAs all call device::wait_for_predecessor() before they read or write memory: the device prepares it while the
/// kernel before it ends, which takes the host less time, too. The second kernel of an op may read before it waits what is older than the op, if
/// the first one waits before it lets others start.
template <typename... Parameters>
void launch_waiting(const char* name, void (*kernel)(Parameters...), const LaunchShape& shape, Stream stream,
                    const std::type_identity_t<Parameters>&... arguments) {
  void* pointers[] = {const_cast<void*>(static_cast<const void*>(&arguments))...};
  launch_waiting(name, reinterpret_cast<const void*>(kernel), shape, stream, pointers);
}

template <typename... Parameters>
void launch_waiting(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, Stream stream,
                    const std::type_identity_t<Parameters>&... arguments) {
  launch_waiting(name, kernel, LaunchShape{grid, block}, stream, arguments...);
}

inline cudaStream_t cuda_stream(Stream stream) { return static_cast<cudaStream_t>(stream.handle()); }

}  // namespace quire::cuda
