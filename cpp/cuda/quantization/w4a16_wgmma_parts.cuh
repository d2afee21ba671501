// What the kernels of quantized_matmul on wgmma share: products with A in registers, entries of any kind, how results are stored. sm_90a.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <type_traits>

#include "cuda/device/async_copy.cuh"
#include "cuda/device/mma.cuh"
#include "cuda/device/wgmma.cuh"
#include "cuda/element.h"
#include "cuda/quantization/w4a16.cuh"

namespace quire::cuda::w4a16 {

constexpr int kStoreRowBytes = 48;  // 32 of a warp's 16 rows, and 16 that keep eight of them in different banks

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

/// d += a b^T: a [64, 16] in registers, b [N, 16] in shared memory.
template <int kN, bool kBf16, std::uint32_t kHigh = device::kDescriptorHigh>
struct WgmmaCodes;
/// The upper half of b's descriptor where its rows are not in panels: of 16 bytes one after the other, the rows of the next 8 columns at matrix_descriptor's
/// panel_bytes from there.
constexpr std::uint32_t kPlainRows = 128 >> 4;

#define QUIRE_WGMMA_D_4 "%0, %1, %2, %3"
#define QUIRE_WGMMA_D_8 QUIRE_WGMMA_D0
#define QUIRE_WGMMA_D_16 QUIRE_WGMMA_D0 ", " QUIRE_WGMMA_D8
#define QUIRE_WGMMA_O_4(d) "+f"((d)[0]), "+f"((d)[1]), "+f"((d)[2]), "+f"((d)[3])
#define QUIRE_WGMMA_O_8(d) QUIRE_WGMMA_O8(d, 0)
#define QUIRE_WGMMA_O_16(d) QUIRE_WGMMA_O8(d, 0), QUIRE_WGMMA_O8(d, 8)
#define QUIRE_WGMMA_CODES(N, COUNT, BF16, TYPE, A0, A1, A2, A3, B, ACCUMULATE, HIGH)                                                  \
  template <std::uint32_t kHigh>                                                                                                      \
  struct WgmmaCodes<N, BF16, kHigh> {                                                                                                       \
    __device__ __forceinline__ static void product(float (&d)[COUNT], const std::uint32_t (&a)[4], std::uint32_t b, int accumulate) { \
      asm volatile("{\n.reg .pred p;\n.reg .b64 db;\nsetp.ne.b32 p, " ACCUMULATE ", 0;\nmov.b64 db, {" B ", " HIGH                    \
                   "};\n"                                                                                                             \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" QUIRE_WGMMA_D_##COUNT                         \
                   "}, {" A0 ", " A1 ", " A2 ", " A3 "}, db, p, 1, 1, 0;\n}\n"                                                        \
                   : QUIRE_WGMMA_O_##COUNT(d)                                                                                         \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "r"(accumulate), "n"(kHigh));              \
    }                                                                                                                                 \
  };
QUIRE_WGMMA_CODES(8, 4, true, "bf16", "%4", "%5", "%6", "%7", "%8", "%9", "%10")
QUIRE_WGMMA_CODES(8, 4, false, "f16", "%4", "%5", "%6", "%7", "%8", "%9", "%10")
QUIRE_WGMMA_CODES(16, 8, true, "bf16", "%8", "%9", "%10", "%11", "%12", "%13", "%14")
QUIRE_WGMMA_CODES(16, 8, false, "f16", "%8", "%9", "%10", "%11", "%12", "%13", "%14")
QUIRE_WGMMA_CODES(32, 16, true, "bf16", "%16", "%17", "%18", "%19", "%20", "%21", "%22")
QUIRE_WGMMA_CODES(32, 16, false, "f16", "%16", "%17", "%18", "%19", "%20", "%21", "%22")
QUIRE_WGMMA_CODES(64, 32, true, "bf16", "%32", "%33", "%34", "%35", "%36", "%37", "%38")
QUIRE_WGMMA_CODES(64, 32, false, "f16", "%32", "%33", "%34", "%35", "%36", "%37", "%38")
QUIRE_WGMMA_CODES(128, 64, true, "bf16", "%64", "%65", "%66", "%67", "%68", "%69", "%70")
QUIRE_WGMMA_CODES(128, 64, false, "f16", "%64", "%65", "%66", "%67", "%68", "%69", "%70")
QUIRE_WGMMA_CODES(256, 128, true, "bf16", "%128", "%129", "%130", "%131", "%132", "%133", "%134")
QUIRE_WGMMA_CODES(256, 128, false, "f16", "%128", "%129", "%130", "%131", "%132", "%133", "%134")

template <int kBits>
__device__ __forceinline__ RowPair load_any_entry(const std::uint8_t* entry, const Layout& layout) {
  if (layout.scale_dtype == DType::kFloat32) return load_entry<Entry::kFloat, kBits>(entry, layout);
  return layout.has_zeros ? load_entry<Entry::kZeros, kBits>(entry, layout) : load_entry<Entry::kScales, kBits>(entry, layout);
}

/// The bias of rows `row` and `row + 8`.
__device__ __forceinline__ void load_row_bias(float (&bias)[2], const void* from, DType dtype, std::int64_t row, std::int64_t num_rows) {
  bias[0] = bias[1] = 0.0f;
  if (from == nullptr) return;
  for (int i = 0; i < 2; ++i) {
    float value[1][1];
    load_parameter(value, from, dtype, row + 8 * i, 0, num_rows);
    bias[i] = value[0][0];
  }
}

/// Stores 8 * kGroups tokens of a warp's 16 rows: sums 4 j + {0, 1} are of row lane / 4 and tokens 8 j + 2 (lane % 4) + {0, 1}, 4 j + {2, 3} of the row
/// 8 below. `space` is the warp's own, of kStoreRowBytes for each token.
template <bool kBf16, int kGroups, typename Plan>
__device__ __forceinline__ void store_tokens(std::uint8_t* space, const float (&sums)[4 * kGroups], const float (&bias)[2],
                                             const Plan& plan, std::int64_t token, std::int64_t row) {
  using T = std::conditional_t<kBf16, __nv_bfloat16, __half>;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  __syncwarp();
#pragma unroll
  for (int j = 0; j < kGroups; ++j) {
    const std::uint32_t pairs[2] = {device::pack_16<kBf16>(sums[4 * j] + bias[0], sums[4 * j + 1] + bias[0]),
                                    device::pack_16<kBf16>(sums[4 * j + 2] + bias[1], sums[4 * j + 3] + bias[1])};
    device::store_matrix_x2_transposed(
        device::shared_address(space) + static_cast<std::uint32_t>((8 * j + lane % 8) * kStoreRowBytes + lane / 8 % 2 * 16), pairs);
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < (kGroups + 1) / 2; ++i) {
    const int at = 16 * i + lane / 2;
    const std::int64_t first = row + 8 * (lane % 2);
    if (at >= 8 * kGroups || token + at >= plan.num_tokens || first >= plan.num_rows) continue;
    const auto* from = reinterpret_cast<const uint4*>(space + at * kStoreRowBytes + 16 * (lane % 2));
    T* to = static_cast<T*>(plan.out) + (token + at) * plan.out_stride + first;
    if (plan.stores_vectors && first + 8 <= plan.num_rows) {
      *reinterpret_cast<uint4*>(to) = *from;
    } else {
      for (int e = 0; e < 8; ++e)
        if (first + e < plan.num_rows) to[e] = reinterpret_cast<const T*>(from)[e];
    }
  }
}

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

}  // namespace quire::cuda::w4a16
