// ldmatrix and mma.sync m16n8k16 on 16-bit floats (sm_80 and later), and the packing of their fragments.
// SPDX-License-Identifier: Apache-2.0
//
// With group = lane / 4 and quad = lane % 4, a thread holds of
//   A (16 x 16)  a0: (group, 2 quad + {0, 1})  a1: (group + 8, same)  a2: (group, 2 quad + 8 + {0, 1})  a3: (group + 8, same)
//   B (16 x 8)   b0: (2 quad + {0, 1}, group)  b1: (2 quad + 8 + {0, 1}, group)
//   C (16 x 8)   c0, c1: (group, 2 quad + {0, 1})  c2, c3: (group + 8, same)
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace quire::cuda::device {

/// Four 8 x 8 matrices of 16-bit elements; lane i gives the address of row i % 8 of matrix i / 8.
__device__ __forceinline__ void load_matrix_x4(std::uint32_t (&r)[4], std::uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

/// The same, each matrix transposed.
__device__ __forceinline__ void load_matrix_x4_transposed(std::uint32_t (&r)[4], std::uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

#if __CUDA_ARCH__ >= 900
/// Stores four 8 x 8 matrices of 16-bit elements, lane 4 i + j holding elements 2 j and 2 j + 1 of row i of each; lane i gives the address of
/// row i % 8 of matrix i / 8.
__device__ __forceinline__ void store_matrix_x4(std::uint32_t address, const std::uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};\n" ::"r"(address), "r"(r[0]), "r"(r[1]), "r"(r[2]),
               "r"(r[3])
               : "memory");
}
/// The same, each matrix transposed.
__device__ __forceinline__ void store_matrix_x4_transposed(std::uint32_t address, const std::uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};\n" ::"r"(address), "r"(r[0]), "r"(r[1]), "r"(r[2]),
               "r"(r[3])
               : "memory");
}
/// Two matrices, transposed; lane i < 16 gives the address.
__device__ __forceinline__ void store_matrix_x2_transposed(std::uint32_t address, const std::uint32_t (&r)[2]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};\n" ::"r"(address), "r"(r[0]), "r"(r[1]) : "memory");
}
#endif

/// An 8 x 8 matrix of 16-bit elements, lane 4 i + j holding elements 2 j and 2 j + 1 of row i, transposed.
__device__ __forceinline__ std::uint32_t transpose_8x8(std::uint32_t r) {
  std::uint32_t transposed;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;\n" : "=r"(transposed) : "r"(r));
  return transposed;
}

/// c += a b; bfloat16 operands if kBf16, else float16.
template <bool kBf16>
__device__ __forceinline__ void mma_16816(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
  if constexpr (kBf16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

/// Two floats rounded to 16 bits, `low` in the low half.
template <bool kBf16>
__device__ __forceinline__ std::uint32_t pack_16(float low, float high) {
  std::uint32_t packed;
  if constexpr (kBf16) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(packed) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;\n" : "=r"(packed) : "f"(high), "f"(low));
  }
  return packed;
}

/// For both halves: 0 value + sum, which is sum unless the value is not finite; then NaN.
template <bool kBf16>
__device__ __forceinline__ std::uint32_t times_zero_plus(std::uint32_t values, std::uint32_t sums) {
  if constexpr (kBf16) {
    asm("fma.rn.bf16x2 %0, %1, %2, %0;\n" : "+r"(sums) : "r"(values), "r"(0));
  } else {
    asm("fma.rn.f16x2 %0, %1, %2, %0;\n" : "+r"(sums) : "r"(values), "r"(0));
  }
  return sums;
}

/// 2^x, with 2^-inf = 0.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace quire::cuda::device
