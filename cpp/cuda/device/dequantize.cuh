// 8-bit values to float16 pairs. Every float8_e4m3fn, float8_e5m2 and int8 value is exact in float16.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

namespace quire::cuda::device {

enum class Byte { kE4M3, kE5M2, kInt8 };

__device__ __forceinline__ std::uint32_t permute_bytes(std::uint32_t a, std::uint32_t b, std::uint32_t selector) {
  return __byte_perm(a, b, selector);
}

/// Bytes 0 and 1 of `packed` become `low`, bytes 2 and 3 `high`.
template <Byte kByte>
__device__ __forceinline__ void dequantize_4(std::uint32_t packed, std::uint32_t& low, std::uint32_t& high) {
  if constexpr (kByte == Byte::kE5M2) {
    // The upper byte of a float16.
    low = permute_bytes(packed, 0, 0x1404);
    high = permute_bytes(packed, 0, 0x3424);
  } else if constexpr (kByte == Byte::kInt8) {
    // 0x6400 | u is 1024 + u; u = x + 128.
    const std::uint32_t biased = packed ^ 0x80808080u;
    const __half2 offset = __half2half2(__ushort_as_half(0x6480));
    const std::uint32_t bits[2] = {permute_bytes(biased, 0x64646464u, 0x4140), permute_bytes(biased, 0x64646464u, 0x4342)};
    const __half2 values[2] = {__hsub2(reinterpret_cast<const __half2&>(bits[0]), offset),
                               __hsub2(reinterpret_cast<const __half2&>(bits[1]), offset)};
    low = reinterpret_cast<const std::uint32_t&>(values[0]);
    high = reinterpret_cast<const std::uint32_t&>(values[1]);
  } else {
#if __CUDA_ARCH__ >= 890
    asm("{\n.reg .b16 l, h;\nmov.b32 {l, h}, %2;\ncvt.rn.f16x2.e4m3x2 %0, l;\ncvt.rn.f16x2.e4m3x2 %1, h;\n}\n"
        : "=r"(low), "=r"(high)
        : "r"(packed));
#else
    // Moving the payload under the wider exponent gives x / 2^8; only NaN (payload 0x7f) needs a hand.
    const __half2 factor = __half2half2(__ushort_as_half(0x5c00));
    const std::uint32_t spread[2] = {permute_bytes(packed, 0, 0x1404), permute_bytes(packed, 0, 0x3424)};
    std::uint32_t result[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const std::uint32_t bits = (spread[i] & 0x80008000u) | ((spread[i] & 0x7f007f00u) >> 1);
      const __half2 value = __hmul2(reinterpret_cast<const __half2&>(bits), factor);
      result[i] = reinterpret_cast<const std::uint32_t&>(value);
      if ((spread[i] & 0x7f00u) == 0x7f00u) result[i] |= 0x7e00u;
      if ((spread[i] & 0x7f000000u) == 0x7f000000u) result[i] |= 0x7e000000u;
    }
    low = result[0];
    high = result[1];
#endif
  }
}

}  // namespace quire::cuda::device
