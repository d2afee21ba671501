// Thread block clusters: ranks, barriers, and the shared memory of other CTAs. sm_90 and later.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace quire::cuda::device {

#if __CUDA_ARCH__ >= 900

__device__ __forceinline__ int cluster_rank() {
  std::uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;\n" : "=r"(rank));
  return static_cast<int>(rank);
}

/// Every thread of every CTA of the cluster arrives, and later waits. Orders no memory: that would wait for everything that the thread ever wrote.
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.relaxed.aligned;\n" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.aligned;\n" ::: "memory"); }

/// Both, and what any thread of the cluster wrote before is visible after.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\n" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;\n" ::: "memory");
}

/// Where the CTA of that rank has what this CTA has at a shared address.
__device__ __forceinline__ std::uint32_t address_in_cta(std::uint32_t address, int rank) {
  std::uint32_t mapped;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;\n" : "=r"(mapped) : "r"(address), "r"(rank));
  return mapped;
}

/// Arrives at a barrier of any CTA, by its address_in_cta. Orders only what tensor cores and copies have read before, and shared memory of this CTA:
/// a release for the whole cluster would wait for everything that the thread ever wrote.
__device__ __forceinline__ void cluster_barrier_arrive(std::uint32_t mapped_barrier) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];\n" ::"r"(mapped_barrier) : "memory");
}

/// 16 bytes of any CTA's shared memory, by their address_in_cta.
__device__ __forceinline__ float4 load_cluster_16(std::uint32_t mapped) {
  float4 value;
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];\n"
               : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w)
               : "r"(mapped)
               : "memory");
  return value;
}

/// Writes to any CTA's shared memory, by address_in_cta. cluster_sync makes it visible.
__device__ __forceinline__ void store_cluster_16(std::uint32_t mapped, float4 value) {
  asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};\n" ::"r"(mapped), "f"(value.x), "f"(value.y), "f"(value.z), "f"(value.w)
               : "memory");
}

/// Writes 16 bytes to another CTA's shared memory, and counts them at a barrier of that CTA. Addresses are address_in_cta. What becomes of a write to
/// the thread's own CTA is not defined.
__device__ __forceinline__ void cluster_store_16(std::uint32_t mapped, std::uint32_t mapped_barrier, float a, float b, float c, float d) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];\n" ::"r"(mapped), "f"(a), "f"(b),
               "f"(c), "f"(d), "r"(mapped_barrier)
               : "memory");
}
__device__ __forceinline__ void cluster_store_16(std::uint32_t mapped, std::uint32_t mapped_barrier, int a, int b, int c, int d) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];\n" ::"r"(mapped), "r"(a), "r"(b),
               "r"(c), "r"(d), "r"(mapped_barrier)
               : "memory");
}

/// The same of 8 bytes.
__device__ __forceinline__ void cluster_store_8(std::uint32_t mapped, std::uint32_t mapped_barrier, float a, float b) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];\n" ::"r"(mapped), "f"(a), "f"(b),
               "r"(mapped_barrier)
               : "memory");
}

#endif  // sm_90

}  // namespace quire::cuda::device
