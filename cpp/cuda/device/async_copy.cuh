// cp.async: copies from global to shared memory that do not pass through registers.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace quire::cuda::device {

__device__ __forceinline__ std::uint32_t shared_address(const void* pointer) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ std::int32_t load_shared(std::uint32_t address) {
  std::int32_t value;
  asm volatile("ld.shared.b32 %0, [%1];\n" : "=r"(value) : "r"(address) : "memory");
  return value;
}

__device__ __forceinline__ uint4 load_shared_16(std::uint32_t address) {
  uint4 value;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "r"(address)
               : "memory");
  return value;
}

__device__ __forceinline__ int2 load_shared_8(std::uint32_t address) {
  int2 value;
  asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];\n" : "=r"(value.x), "=r"(value.y) : "r"(address) : "memory");
  return value;
}

__device__ __forceinline__ void store_shared_8(std::uint32_t address, int2 value) {
  asm volatile("st.shared.v2.b32 [%0], {%1, %2};\n" ::"r"(address), "r"(value.x), "r"(value.y) : "memory");
}

__device__ __forceinline__ void store_shared_16(std::uint32_t address, uint4 value) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};\n" ::"r"(address), "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w)
               : "memory");
}

/// 16 bytes, of which the first `src_bytes` are read and the rest become zero. Both addresses are 16-byte aligned.
__device__ __forceinline__ void copy_async_16(std::uint32_t dst, const void* src, int src_bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(dst), "l"(src), "r"(src_bytes) : "memory");
}

/// 16 bytes, by way of the L1 cache.
__device__ __forceinline__ void copy_async_cached_16(std::uint32_t dst, const void* src) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 16;\n" ::"r"(dst), "l"(src) : "memory");
}

/// All 16 bytes if `exists`, else zeros. A size that is not known before costs four instructions more.
__device__ __forceinline__ void copy_async_16_if(std::uint32_t dst, const void* src, bool exists) {
  asm volatile(
      "{\n"
      ".reg .pred absent;\n"
      "setp.eq.u32 absent, %2, 0;\n"
      "cp.async.cg.shared.global [%0], [%1], 16, absent;\n"
      "}\n" ::"r"(dst),
      "l"(src), "r"(static_cast<std::uint32_t>(exists))
      : "memory");
}

/// 8 bytes, as copy_async_16.
__device__ __forceinline__ void copy_async_8(std::uint32_t dst, const void* src, int src_bytes) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;\n" ::"r"(dst), "l"(src), "r"(src_bytes) : "memory");
}

/// 4 bytes, likewise.
__device__ __forceinline__ void copy_async_4(std::uint32_t dst, const void* src, int src_bytes) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;\n" ::"r"(dst), "l"(src), "r"(src_bytes) : "memory");
}

__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

/// Waits until at most `kPending` of this thread's latest groups are under way.
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

/// Waits for all copies of this thread, also those not committed to a group.
__device__ __forceinline__ void copy_async_wait_all() { asm volatile("cp.async.wait_all;\n" ::: "memory"); }

/// 16 bytes from an address aligned to `alignment` (1, 2 or 4) only, of which the first `src_bytes`, a multiple of it, are
/// read. Synchronous.
__device__ __forceinline__ void copy_unaligned_16(std::uint32_t dst, const void* src, int src_bytes, int alignment) {
  std::uint32_t words[4] = {0, 0, 0, 0};
  const auto* bytes = static_cast<const unsigned char*>(src);
#pragma unroll 1
  for (int i = 0; i < src_bytes; i += alignment) {
    std::uint32_t value;
    if (alignment == 4) {
      value = *reinterpret_cast<const std::uint32_t*>(bytes + i);
    } else if (alignment == 2) {
      value = *reinterpret_cast<const std::uint16_t*>(bytes + i);
    } else {
      value = bytes[i];
    }
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      if (i / 4 == w) words[w] |= value << (8 * (i % 4));
    }
  }
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};\n" ::"r"(dst), "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
               : "memory");
}

/// 16 bytes from an address aligned to `alignment` < 16 only, likewise.
__device__ __forceinline__ void copy_narrow_16(std::uint32_t dst, const void* src, int src_bytes, int alignment) {
  if (alignment == 8) {
    copy_async_8(dst, src, min(src_bytes, 8));
    copy_async_8(dst + 8, src_bytes > 8 ? static_cast<const char*>(src) + 8 : src, max(src_bytes - 8, 0));
  } else {
    copy_unaligned_16(dst, src, src_bytes, alignment);
  }
}

}  // namespace quire::cuda::device
