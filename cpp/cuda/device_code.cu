// What this build's code for the current device was compiled for: asked of a kernel that is compiled as all others are.
// SPDX-License-Identifier: Apache-2.0
#include "cuda/device_code.h"
#include "cuda/once_per_device.h"

namespace quire::cuda {

namespace {

__global__ void probe_kernel() {}  // never launched

cudaFuncAttributes probe() {
  cudaFuncAttributes attributes{};
  QUIRE_CUDA_CHECK(cudaFuncGetAttributes(&attributes, probe_kernel));
  return attributes;
}

}  // namespace

bool has_hopper_code() {
  return known_of_device([] {
    const cudaFuncAttributes code = probe();
    return code.ptxVersion >= 90 && code.binaryVersion == 90;
  });
}

bool has_dependent_launch_code() {
  return known_of_device([] {
    const cudaFuncAttributes code = probe();
    return code.ptxVersion >= 90 && code.binaryVersion >= 90;
  });
}

}  // namespace quire::cuda
