// How CTAs that share a part of a result find out which of them is the last.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace quire::cuda::w4a16 {

/// What a store_release of any CTA left, and with it all that its CTA wrote before.
__device__ __forceinline__ std::uint64_t load_acquire(const std::uint64_t* from) {
  std::uint64_t value;
  asm volatile("ld.acquire.gpu.global.b64 %0, [%1];\n" : "=l"(value) : "l"(from) : "memory");
  return value;
}
__device__ __forceinline__ void store_release(std::uint64_t* to, std::uint64_t value) {
  asm volatile("st.release.gpu.global.b64 [%0], %1;\n" ::"l"(to), "l"(value) : "memory");
}

/// Counts this CTA as arrived; true for the last of `count`, which is below 65536. A count carries the tag, whose lower 16 bits are 0: whatever else is in
/// the counter before the first arrival counts as zero. The last one leaves a count of zero.
__device__ __forceinline__ bool arrive(std::uint64_t* counter, std::uint64_t tag, int count) {
  auto* address = reinterpret_cast<unsigned long long*>(counter);
  unsigned long long seen = tag;  // a guess; the exchange says what was there
  while (true) {
    const unsigned long long next = ((seen ^ tag) >> 16 == 0 ? seen : tag) + 1;
    const unsigned long long found = atomicCAS(address, seen, next);
    if (found == seen) {
      const bool last = next == tag + static_cast<unsigned>(count);
      if (last) *reinterpret_cast<volatile unsigned long long*>(address) = tag;
      return last;
    }
    seen = found;
  }
}

}  // namespace quire::cuda::w4a16
