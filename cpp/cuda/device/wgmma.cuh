// wgmma: a warpgroup's asynchronous 64 x N x 16 matrix products (x 32 of 8-bit operands) with float32 sums. sm_90a; elsewhere nothing here is
// compiled.
// SPDX-License-Identifier: Apache-2.0
//
// Operands in shared memory lie in panels of 64 16-bit or 128 8-bit columns: rows of 128 bytes, whose 16-byte chunks are exchanged by the exclusive or with
// the row's number modulo 8, which is what the copy engine's 128-byte swizzle writes. A panel begins at a multiple of 1024 bytes.
#pragma once

#include <cstdint>

namespace quire::cuda::device {

constexpr int kPanelColumns = 64;  // of 16 bits
constexpr int kPanelRowBytes = 128;

/// The lower half of the descriptor of an operand in panels at a shared address, the same for the whole warp; advance by bytes / 16.
/// panel_bytes, the distance between panels, counts where rows lie across the product's inner dimension (V of p v).
__device__ __forceinline__ std::uint32_t matrix_descriptor(std::uint32_t address, std::uint32_t panel_bytes) {
  return __shfl_sync(0xffffffffu, (address & 0x3ffffu) >> 4 | (panel_bytes & 0x3ffffu) >> 4 << 16, 0);
}
/// The upper half: eight rows are contiguous, and chunks exchanged by the 128-byte pattern.
constexpr std::uint32_t kDescriptorHigh = (8 * kPanelRowBytes) >> 4 | 1u << 30;
/// The upper half where an operand is not in panels: eight rows of 16 bytes one after the other; those of the next columns begin at panel_bytes from there.
constexpr std::uint32_t kPlainDescriptorHigh = 128 >> 4;

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

/// Before the first product, and between other uses of a product's registers and the product.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory"); }
/// Waits until at most kPending of the groups are under way.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kPending) : "memory");
}
/// Keeps the compiler from moving uses of a product's registers across this place.
template <int kCount>
__device__ __forceinline__ void pin_registers(float (&values)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(values[i])::"memory");
}

#define QUIRE_WGMMA_D0 "%0, %1, %2, %3, %4, %5, %6, %7"
#define QUIRE_WGMMA_D8 "%8, %9, %10, %11, %12, %13, %14, %15"
#define QUIRE_WGMMA_D16 "%16, %17, %18, %19, %20, %21, %22, %23"
#define QUIRE_WGMMA_D24 "%24, %25, %26, %27, %28, %29, %30, %31"
#define QUIRE_WGMMA_D32 "%32, %33, %34, %35, %36, %37, %38, %39"
#define QUIRE_WGMMA_D40 "%40, %41, %42, %43, %44, %45, %46, %47"
#define QUIRE_WGMMA_D48 "%48, %49, %50, %51, %52, %53, %54, %55"
#define QUIRE_WGMMA_D56 "%56, %57, %58, %59, %60, %61, %62, %63"
#define QUIRE_WGMMA_D64 "%64, %65, %66, %67, %68, %69, %70, %71"
#define QUIRE_WGMMA_D72 "%72, %73, %74, %75, %76, %77, %78, %79"
#define QUIRE_WGMMA_D80 "%80, %81, %82, %83, %84, %85, %86, %87"
#define QUIRE_WGMMA_D88 "%88, %89, %90, %91, %92, %93, %94, %95"
#define QUIRE_WGMMA_D96 "%96, %97, %98, %99, %100, %101, %102, %103"
#define QUIRE_WGMMA_D104 "%104, %105, %106, %107, %108, %109, %110, %111"
#define QUIRE_WGMMA_D112 "%112, %113, %114, %115, %116, %117, %118, %119"
#define QUIRE_WGMMA_D120 "%120, %121, %122, %123, %124, %125, %126, %127"
#define QUIRE_WGMMA_O8(d, i)                                                                                                              \
  "+f"((d)[(i)]), "+f"((d)[(i) + 1]), "+f"((d)[(i) + 2]), "+f"((d)[(i) + 3]), "+f"((d)[(i) + 4]), "+f"((d)[(i) + 5]), "+f"((d)[(i) + 6]), \
      "+f"((d)[(i) + 7])
#define QUIRE_WGMMA_D_4 "%0, %1, %2, %3"
#define QUIRE_WGMMA_D_8 QUIRE_WGMMA_D0
#define QUIRE_WGMMA_D_16 QUIRE_WGMMA_D0 ", " QUIRE_WGMMA_D8
#define QUIRE_WGMMA_D_32 QUIRE_WGMMA_D0 ", " QUIRE_WGMMA_D8 ", " QUIRE_WGMMA_D16 ", " QUIRE_WGMMA_D24
#define QUIRE_WGMMA_D_40 QUIRE_WGMMA_D_32 ", " QUIRE_WGMMA_D32
#define QUIRE_WGMMA_D_48 QUIRE_WGMMA_D_40 ", " QUIRE_WGMMA_D40
#define QUIRE_WGMMA_D_56 QUIRE_WGMMA_D_48 ", " QUIRE_WGMMA_D48
#define QUIRE_WGMMA_D_64 QUIRE_WGMMA_D_48 ", " QUIRE_WGMMA_D48 ", " QUIRE_WGMMA_D56
#define QUIRE_WGMMA_D_80 QUIRE_WGMMA_D_64 ", " QUIRE_WGMMA_D64 ", " QUIRE_WGMMA_D72
#define QUIRE_WGMMA_D_96 QUIRE_WGMMA_D_80 ", " QUIRE_WGMMA_D80 ", " QUIRE_WGMMA_D88
#define QUIRE_WGMMA_D_128 QUIRE_WGMMA_D_96 ", " QUIRE_WGMMA_D96 ", " QUIRE_WGMMA_D104 ", " QUIRE_WGMMA_D112 ", " QUIRE_WGMMA_D120
#define QUIRE_WGMMA_O_4(d) "+f"((d)[0]), "+f"((d)[1]), "+f"((d)[2]), "+f"((d)[3])
#define QUIRE_WGMMA_O_8(d) QUIRE_WGMMA_O8(d, 0)
#define QUIRE_WGMMA_O_16(d) QUIRE_WGMMA_O8(d, 0), QUIRE_WGMMA_O8(d, 8)
#define QUIRE_WGMMA_O_32(d) QUIRE_WGMMA_O8(d, 0), QUIRE_WGMMA_O8(d, 8), QUIRE_WGMMA_O8(d, 16), QUIRE_WGMMA_O8(d, 24)
#define QUIRE_WGMMA_O_40(d) QUIRE_WGMMA_O_32(d), QUIRE_WGMMA_O8(d, 32)
#define QUIRE_WGMMA_O_48(d) QUIRE_WGMMA_O_40(d), QUIRE_WGMMA_O8(d, 40)
#define QUIRE_WGMMA_O_56(d) QUIRE_WGMMA_O_48(d), QUIRE_WGMMA_O8(d, 48)
#define QUIRE_WGMMA_O_64(d) QUIRE_WGMMA_O_48(d), QUIRE_WGMMA_O8(d, 48), QUIRE_WGMMA_O8(d, 56)
#define QUIRE_WGMMA_O_80(d) QUIRE_WGMMA_O_64(d), QUIRE_WGMMA_O8(d, 64), QUIRE_WGMMA_O8(d, 72)
#define QUIRE_WGMMA_O_96(d) QUIRE_WGMMA_O_80(d), QUIRE_WGMMA_O8(d, 80), QUIRE_WGMMA_O8(d, 88)
#define QUIRE_WGMMA_O_128(d) \
  QUIRE_WGMMA_O_96(d), QUIRE_WGMMA_O8(d, 96), QUIRE_WGMMA_O8(d, 104), QUIRE_WGMMA_O8(d, 112), QUIRE_WGMMA_O8(d, 120)

/// d = a b^T, or d += it: a [64, 16] and b [N, 16] in shared memory.
template <int kN, bool kBf16>
struct WgmmaShared;
/// The same of float8_e4m3fn: a [64, 32] and b [N, 32]. Products are summed with about 14 bits.
template <int kN>
struct WgmmaShared8;
/// d += a b: a [64, 16] in registers, as mma.sync has it, and b [16, N] in shared memory.
template <int kN, bool kBf16>
struct WgmmaRegisters;
/// d += a b^T, or d = it: a [64, 16] in registers, b [N, 16] in shared memory.
template <int kN, bool kBf16, std::uint32_t kHigh = kDescriptorHigh>
struct WgmmaRegistersRows;

#define QUIRE_WGMMA_SHARED(N, COUNT, BF16, TYPE, A, B, ACCUMULATE, HIGH)                                                  \
  template <>                                                                                                             \
  struct WgmmaShared<N, BF16> {                                                                                           \
    __device__ __forceinline__ static void product(float (&d)[COUNT], std::uint32_t a, std::uint32_t b, int accumulate) { \
      asm volatile("{\n.reg .pred p;\n.reg .b64 da, db;\nsetp.ne.b32 p, " ACCUMULATE ", 0;\nmov.b64 da, {" A ", " HIGH    \
                   "};\nmov.b64 db, {" B ", " HIGH                                                                        \
                   "};\n"                                                                                                 \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" QUIRE_WGMMA_D_##COUNT             \
                   "}, da, db"                                                                                            \
                   ", p, 1, 1, 0, 0;\n}\n"                                                                                \
                   : QUIRE_WGMMA_O_##COUNT(d)                                                                             \
                   : "r"(a), "r"(b), "r"(accumulate), "n"(kDescriptorHigh));                                              \
    }                                                                                                                     \
  };
#define QUIRE_WGMMA_SHARED_8(N, COUNT, A, B, ACCUMULATE, HIGH)                                                            \
  template <>                                                                                                             \
  struct WgmmaShared8<N> {                                                                                                \
    __device__ __forceinline__ static void product(float (&d)[COUNT], std::uint32_t a, std::uint32_t b, int accumulate) { \
      asm volatile("{\n.reg .pred p;\n.reg .b64 da, db;\nsetp.ne.b32 p, " ACCUMULATE ", 0;\nmov.b64 da, {" A ", " HIGH    \
                   "};\nmov.b64 db, {" B ", " HIGH                                                                        \
                   "};\n"                                                                                                 \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k32.f32.e4m3.e4m3 {" QUIRE_WGMMA_D_##COUNT                     \
                   "}, da, db"                                                                                            \
                   ", p, 1, 1;\n}\n"                                                                                      \
                   : QUIRE_WGMMA_O_##COUNT(d)                                                                             \
                   : "r"(a), "r"(b), "r"(accumulate), "n"(kDescriptorHigh));                                              \
    }                                                                                                                     \
  };
#define QUIRE_WGMMA_REGISTERS(N, COUNT, BF16, TYPE, A0, A1, A2, A3, B, ACCUMULATE, HIGH)                                              \
  template <>                                                                                                                         \
  struct WgmmaRegisters<N, BF16> {                                                                                                    \
    __device__ __forceinline__ static void product(float (&d)[COUNT], const std::uint32_t (&a)[4], std::uint32_t b, int accumulate) { \
      asm volatile("{\n.reg .pred p;\n.reg .b64 db;\nsetp.ne.b32 p, " ACCUMULATE ", 0;\nmov.b64 db, {" B ", " HIGH                    \
                   "};\n"                                                                                                             \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" QUIRE_WGMMA_D_##COUNT                         \
                   "}, {" A0 ", " A1 ", " A2 ", " A3 "}, db, p, 1, 1, 1;\n}\n"                                                        \
                   : QUIRE_WGMMA_O_##COUNT(d)                                                                                         \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "r"(accumulate), "n"(kDescriptorHigh));                      \
    }                                                                                                                                 \
  };
#define QUIRE_WGMMA_REGISTERS_ROWS(N, COUNT, BF16, TYPE, A0, A1, A2, A3, B, ACCUMULATE, HIGH)                                         \
  template <std::uint32_t kHigh>                                                                                                      \
  struct WgmmaRegistersRows<N, BF16, kHigh> {                                                                                         \
    __device__ __forceinline__ static void product(float (&d)[COUNT], const std::uint32_t (&a)[4], std::uint32_t b, int accumulate) { \
      asm volatile("{\n.reg .pred p;\n.reg .b64 db;\nsetp.ne.b32 p, " ACCUMULATE ", 0;\nmov.b64 db, {" B ", " HIGH                    \
                   "};\n"                                                                                                             \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" QUIRE_WGMMA_D_##COUNT                         \
                   "}, {" A0 ", " A1 ", " A2 ", " A3 "}, db, p, 1, 1, 0;\n}\n"                                                        \
                   : QUIRE_WGMMA_O_##COUNT(d)                                                                                         \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "r"(accumulate), "n"(kHigh));                                \
    }                                                                                                                                 \
  };

QUIRE_WGMMA_SHARED(64, 32, true, "bf16", "%32", "%33", "%34", "%35")
QUIRE_WGMMA_SHARED(64, 32, false, "f16", "%32", "%33", "%34", "%35")
QUIRE_WGMMA_SHARED(80, 40, true, "bf16", "%40", "%41", "%42", "%43")
QUIRE_WGMMA_SHARED(80, 40, false, "f16", "%40", "%41", "%42", "%43")
QUIRE_WGMMA_SHARED(96, 48, true, "bf16", "%48", "%49", "%50", "%51")
QUIRE_WGMMA_SHARED(96, 48, false, "f16", "%48", "%49", "%50", "%51")
QUIRE_WGMMA_SHARED(112, 56, true, "bf16", "%56", "%57", "%58", "%59")
QUIRE_WGMMA_SHARED(112, 56, false, "f16", "%56", "%57", "%58", "%59")
QUIRE_WGMMA_SHARED(128, 64, true, "bf16", "%64", "%65", "%66", "%67")
QUIRE_WGMMA_SHARED(128, 64, false, "f16", "%64", "%65", "%66", "%67")
QUIRE_WGMMA_SHARED_8(64, 32, "%32", "%33", "%34", "%35")
QUIRE_WGMMA_SHARED_8(96, 48, "%48", "%49", "%50", "%51")
QUIRE_WGMMA_SHARED_8(128, 64, "%64", "%65", "%66", "%67")
QUIRE_WGMMA_REGISTERS(64, 32, true, "bf16", "%32", "%33", "%34", "%35", "%36", "%37", "%38")
QUIRE_WGMMA_REGISTERS(64, 32, false, "f16", "%32", "%33", "%34", "%35", "%36", "%37", "%38")
QUIRE_WGMMA_REGISTERS(96, 48, true, "bf16", "%48", "%49", "%50", "%51", "%52", "%53", "%54")
QUIRE_WGMMA_REGISTERS(96, 48, false, "f16", "%48", "%49", "%50", "%51", "%52", "%53", "%54")
QUIRE_WGMMA_REGISTERS(128, 64, true, "bf16", "%64", "%65", "%66", "%67", "%68", "%69", "%70")
QUIRE_WGMMA_REGISTERS(128, 64, false, "f16", "%64", "%65", "%66", "%67", "%68", "%69", "%70")
QUIRE_WGMMA_REGISTERS(192, 96, true, "bf16", "%96", "%97", "%98", "%99", "%100", "%101", "%102")
QUIRE_WGMMA_REGISTERS(192, 96, false, "f16", "%96", "%97", "%98", "%99", "%100", "%101", "%102")
QUIRE_WGMMA_REGISTERS(256, 128, true, "bf16", "%128", "%129", "%130", "%131", "%132", "%133", "%134")
QUIRE_WGMMA_REGISTERS(256, 128, false, "f16", "%128", "%129", "%130", "%131", "%132", "%133", "%134")
QUIRE_WGMMA_REGISTERS_ROWS(8, 4, true, "bf16", "%4", "%5", "%6", "%7", "%8", "%9", "%10")
QUIRE_WGMMA_REGISTERS_ROWS(8, 4, false, "f16", "%4", "%5", "%6", "%7", "%8", "%9", "%10")
QUIRE_WGMMA_REGISTERS_ROWS(16, 8, true, "bf16", "%8", "%9", "%10", "%11", "%12", "%13", "%14")
QUIRE_WGMMA_REGISTERS_ROWS(16, 8, false, "f16", "%8", "%9", "%10", "%11", "%12", "%13", "%14")
QUIRE_WGMMA_REGISTERS_ROWS(32, 16, true, "bf16", "%16", "%17", "%18", "%19", "%20", "%21", "%22")
QUIRE_WGMMA_REGISTERS_ROWS(32, 16, false, "f16", "%16", "%17", "%18", "%19", "%20", "%21", "%22")
QUIRE_WGMMA_REGISTERS_ROWS(64, 32, true, "bf16", "%32", "%33", "%34", "%35", "%36", "%37", "%38")
QUIRE_WGMMA_REGISTERS_ROWS(64, 32, false, "f16", "%32", "%33", "%34", "%35", "%36", "%37", "%38")
QUIRE_WGMMA_REGISTERS_ROWS(128, 64, true, "bf16", "%64", "%65", "%66", "%67", "%68", "%69", "%70")
QUIRE_WGMMA_REGISTERS_ROWS(128, 64, false, "f16", "%64", "%65", "%66", "%67", "%68", "%69", "%70")
QUIRE_WGMMA_REGISTERS_ROWS(256, 128, true, "bf16", "%128", "%129", "%130", "%131", "%132", "%133", "%134")
QUIRE_WGMMA_REGISTERS_ROWS(256, 128, false, "f16", "%128", "%129", "%130", "%131", "%132", "%133", "%134")

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

}  // namespace quire::cuda::device
