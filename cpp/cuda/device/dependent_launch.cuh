// Programmatic dependent launch: a kernel starts while its predecessor ends. sm_90 and later; elsewhere nothing.
// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace quire::cuda::device {

/// Lets the next kernel start once every CTA of this grid has come here or ended.
__device__ __forceinline__ void launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory");
#endif
}

/// Waits until the previous kernel has ended and its writes are visible.
__device__ __forceinline__ void wait_for_predecessor() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\n" ::: "memory");
#endif
}

}  // namespace quire::cuda::device
