// Barriers of some of a CTA's threads.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace quire::cuda::device {

/// The CTA's barrier number `id`, of which `threads` take part: 0 is __syncthreads'.
__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;\n" ::"r"(id), "r"(threads) : "memory");
}
/// The same, and whether `any` is true in any of the threads.
__device__ __forceinline__ bool named_barrier_or(int id, int threads, bool any) {
  std::uint32_t result;
  asm volatile(
      "{\n"
      ".reg .pred p, q;\n"
      "setp.ne.u32 p, %3, 0;\n"
      "bar.red.or.pred q, %1, %2, p;\n"
      "selp.u32 %0, 1, 0, q;\n"
      "}\n"
      : "=r"(result)
      : "r"(id), "r"(threads), "r"(static_cast<std::uint32_t>(any))
      : "memory");
  return result != 0;
}
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;\n" ::"r"(id), "r"(threads) : "memory");
}

}  // namespace quire::cuda::device
