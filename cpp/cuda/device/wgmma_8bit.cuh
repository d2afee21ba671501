// wgmma of 8-bit operands: a warpgroup's asynchronous 64 x N x 32 products, float8_e4m3fn with float32 sums, int8 with int32 sums.
// SPDX-License-Identifier: Apache-2.0
//
// Both operands lie in shared memory along the inner dimension, in panels of 128 columns: rows of 128 bytes as wgmma.cuh has them. The tensor
// cores align the products of float8 operands to the largest and keep about 14 bits of a sum, each time they add 32 of them.
#pragma once

#include "wgmma.cuh"

namespace quire::cuda::device {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

/// d = a b^T, or d += it: a [64, 32] and b [N, 32]. int8 operands if `Sum` is int, float8_e4m3fn if it is float.
template <int kN, typename Sum>
struct Wgmma8Bit;

#define QUIRE_WGMMA_I8(d, i)                                                                                                              \
  "+r"((d)[(i)]), "+r"((d)[(i) + 1]), "+r"((d)[(i) + 2]), "+r"((d)[(i) + 3]), "+r"((d)[(i) + 4]), "+r"((d)[(i) + 5]), "+r"((d)[(i) + 6]), \
      "+r"((d)[(i) + 7])
#define QUIRE_WGMMA_I_8(d) QUIRE_WGMMA_I8(d, 0)
#define QUIRE_WGMMA_I_16(d) QUIRE_WGMMA_I8(d, 0), QUIRE_WGMMA_I8(d, 8)
#define QUIRE_WGMMA_I_32(d) QUIRE_WGMMA_I_16(d), QUIRE_WGMMA_I8(d, 16), QUIRE_WGMMA_I8(d, 24)
#define QUIRE_WGMMA_I_64(d) QUIRE_WGMMA_I_32(d), QUIRE_WGMMA_I8(d, 32), QUIRE_WGMMA_I8(d, 40), QUIRE_WGMMA_I8(d, 48), QUIRE_WGMMA_I8(d, 56)
#define QUIRE_WGMMA_I_128(d)                                                                                                              \
  QUIRE_WGMMA_I_64(d), QUIRE_WGMMA_I8(d, 64), QUIRE_WGMMA_I8(d, 72), QUIRE_WGMMA_I8(d, 80), QUIRE_WGMMA_I8(d, 88), QUIRE_WGMMA_I8(d, 96), \
      QUIRE_WGMMA_I8(d, 104), QUIRE_WGMMA_I8(d, 112), QUIRE_WGMMA_I8(d, 120)
#define QUIRE_WGMMA_D_8 QUIRE_WGMMA_D0
#define QUIRE_WGMMA_D_16 QUIRE_WGMMA_D0 ", " QUIRE_WGMMA_D8
#define QUIRE_WGMMA_O_8(d) QUIRE_WGMMA_O8(d, 0)
#define QUIRE_WGMMA_O_16(d) QUIRE_WGMMA_O8(d, 0), QUIRE_WGMMA_O8(d, 8)

#define QUIRE_WGMMA_8BIT(N, COUNT, A, B, ACCUMULATE, HIGH)                                                                       \
  template <>                                                                                                                    \
  struct Wgmma8Bit<N, float> {                                                                                                   \
    __device__ __forceinline__ static void product(float (&d)[COUNT], std::uint32_t a, std::uint32_t b, int accumulate) {        \
      asm volatile("{\n.reg .pred p;\n.reg .b64 da, db;\nsetp.ne.b32 p, " ACCUMULATE ", 0;\nmov.b64 da, {" A ", " HIGH           \
                   "};\nmov.b64 db, {" B ", " HIGH                                                                               \
                   "};\n"                                                                                                        \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k32.f32.e4m3.e4m3 {" QUIRE_WGMMA_D_##COUNT "}, da, db, p, 1, 1;\n}\n" \
                   : QUIRE_WGMMA_O_##COUNT(d)                                                                                    \
                   : "r"(a), "r"(b), "r"(accumulate), "n"(kDescriptorHigh));                                                     \
    }                                                                                                                            \
  };                                                                                                                             \
  template <>                                                                                                                    \
  struct Wgmma8Bit<N, int> {                                                                                                     \
    __device__ __forceinline__ static void product(int (&d)[COUNT], std::uint32_t a, std::uint32_t b, int accumulate) {          \
      asm volatile("{\n.reg .pred p;\n.reg .b64 da, db;\nsetp.ne.b32 p, " ACCUMULATE ", 0;\nmov.b64 da, {" A ", " HIGH           \
                   "};\nmov.b64 db, {" B ", " HIGH                                                                               \
                   "};\n"                                                                                                        \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k32.s32.s8.s8 {" QUIRE_WGMMA_D_##COUNT "}, da, db, p;\n}\n"           \
                   : QUIRE_WGMMA_I_##COUNT(d)                                                                                    \
                   : "r"(a), "r"(b), "r"(accumulate), "n"(kDescriptorHigh));                                                     \
    }                                                                                                                            \
  };

QUIRE_WGMMA_8BIT(16, 8, "%8", "%9", "%10", "%11")
QUIRE_WGMMA_8BIT(32, 16, "%16", "%17", "%18", "%19")
QUIRE_WGMMA_8BIT(64, 32, "%32", "%33", "%34", "%35")
QUIRE_WGMMA_8BIT(128, 64, "%64", "%65", "%66", "%67")
QUIRE_WGMMA_8BIT(256, 128, "%128", "%129", "%130", "%131")

/// Keeps the compiler from moving uses of a product's registers across this place.
template <int kCount>
__device__ __forceinline__ void pin_registers(int (&values)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(values[i])::"memory");
}

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

}  // namespace quire::cuda::device
