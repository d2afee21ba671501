// Products of 8-bit matrices with mma.sync: any alignment, sm_80 and later.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <type_traits>

#include "cuda/device/async_copy.cuh"
#include "cuda/device/dependent_launch.cuh"
#include "cuda/device/dequantize.cuh"
#include "cuda/device/mma.cuh"
#include "cuda/launch.h"
#include "cuda/quantization/scaled_matmul.h"
#include "cuda/quantization/scaled_matmul_epilogue.cuh"

namespace quire::cuda::scaled {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kStepBytes = 64;  // of a row, in one step: half a scale's block
constexpr int kStages = 4;

template <int kTokenCount>
struct MmaShape {
  static constexpr int kTokens = kTokenCount, kFeatures = kTokens == 16 ? 64 : 128;
  static constexpr int kTokenWarps = kTokens == 16 ? 1 : 4, kFeatureWarps = kWarps / kTokenWarps;
  static constexpr int kTokenBlocks = kTokens / kTokenWarps / 16, kFeatureBlocks = kFeatures / kFeatureWarps / 8;  // of a warp
  static constexpr int kStageBytes = (kTokens + kFeatures) * kStepBytes;
  static constexpr int kSharedBytes = kStages * kStageBytes;
};

/// Where a 16-byte chunk of a row lies, so that eight rows' chunks meet in no bank.
__device__ __forceinline__ std::uint32_t chunk_offset(int row, int chunk) {
  return static_cast<std::uint32_t>(row * kStepBytes + ((chunk ^ (row / 2 % 4)) * 16));
}

/// Copies rows [first, first + kRows) of a matrix, bytes [k, k + kStepBytes), to shared memory; zeros where there are none.
template <int kRows>
__device__ __forceinline__ void copy_rows(std::uint32_t dst, const void* matrix, std::int64_t stride, std::int64_t first,
                                          std::int64_t num_rows, std::int64_t k, std::int64_t width, int alignment) {
#pragma unroll
  for (int i = 0; i < (kRows * 4 + kThreads - 1) / kThreads; ++i) {
    const int index = static_cast<int>(threadIdx.x) + i * kThreads, row = index / 4, chunk = index % 4;
    if (row >= kRows) break;
    const std::int64_t at = k + chunk * 16;
    const int bytes = first + row < num_rows ? static_cast<int>(max(min(width - at, std::int64_t{16}), std::int64_t{0})) : 0;
    const void* src = bytes > 0 ? static_cast<const char*>(matrix) + (first + row) * stride + at : matrix;
    // The end of a row that is part of a chunk goes by bytes: memcheck takes a copy of fewer bytes for one of all.
    const bool is_whole = bytes % 16 == 0;
    if (alignment == 16 && is_whole) {
      device::copy_async_16(dst + chunk_offset(row, chunk), src, bytes);
    } else {
      device::copy_narrow_16(dst + chunk_offset(row, chunk), src, bytes, is_whole ? alignment : 1);
    }
  }
}

/// c += a b on 16 x 32 and 32 x 8 bytes.
__device__ __forceinline__ void mma_bytes(int (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void mma_bytes(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
#if __CUDA_ARCH__ == 890
  asm("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  // In float16. A thread's four neighbours become two pairs that a 16-wide product has 8 apart: both operands alike, so that sums stay the same.
  std::uint32_t low[4], high[4], b[2][2];
#pragma unroll
  for (int i = 0; i < 4; ++i) device::dequantize_4<device::Byte::kE4M3>(a[i], low[i], high[i]);
  device::dequantize_4<device::Byte::kE4M3>(b0, b[0][0], b[0][1]);
  device::dequantize_4<device::Byte::kE4M3>(b1, b[1][0], b[1][1]);
  const std::uint32_t first[4] = {low[0], low[1], high[0], high[1]}, second[4] = {low[2], low[3], high[2], high[3]};
  device::mma_16816<false>(c, first, b[0][0], b[0][1]);
  device::mma_16816<false>(c, second, b[1][0], b[1][1]);
#endif
}

/// A CTA produces kTokens x kFeatures results.
template <typename Sum, int kTokenCount, bool kBlockScales>
__global__ void __launch_bounds__(kThreads)
    scaled_matmul_mma_kernel(const ScaledMatmulParams p, int num_feature_tiles, int alignment_a, int alignment_b) {
  using Shape = MmaShape<kTokenCount>;
  constexpr int kTokenBlocks = Shape::kTokenBlocks, kFeatureBlocks = Shape::kFeatureBlocks;
  extern __shared__ __align__(128) char storage[];
  device::wait_for_predecessor();
  const std::uint32_t shared = device::shared_address(storage);
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int feature_tile = static_cast<int>(blockIdx.x) % num_feature_tiles, token_tile = static_cast<int>(blockIdx.x) / num_feature_tiles;
  const std::int64_t first_token = std::int64_t{token_tile} * Shape::kTokens, first_feature = std::int64_t{feature_tile} * Shape::kFeatures;
  const int warp_token = warp / Shape::kFeatureWarps * kTokenBlocks * 16, warp_feature = warp % Shape::kFeatureWarps * kFeatureBlocks * 8;
  const int num_steps = static_cast<int>((p.k + kStepBytes - 1) / kStepBytes);

  const auto copy_step = [&](int step) {
    if (step < num_steps) {
      const std::uint32_t to = shared + static_cast<std::uint32_t>(step % kStages * Shape::kStageBytes);
      const std::int64_t k = std::int64_t{step} * kStepBytes;
      copy_rows<Shape::kTokens>(to, p.a, p.a_stride, first_token, p.m, k, p.k, alignment_a);
      copy_rows<Shape::kFeatures>(to + Shape::kTokens * kStepBytes, p.b, p.b_stride, first_feature, p.n, k, p.k, alignment_b);
    }
    device::copy_async_commit();
  };
#pragma unroll 1
  for (int step = 0; step < kStages - 1; ++step) copy_step(step);

  Sum sum[kTokenBlocks][kFeatureBlocks][4] = {};
  float total[kBlockScales ? kTokenBlocks : 1][kBlockScales ? kFeatureBlocks : 1][4] = {};
#pragma unroll 1
  for (int step = 0; step < num_steps; ++step) {
    device::copy_async_wait<kStages - 2>();
    __syncthreads();
    copy_step(step + kStages - 1);
    const std::uint32_t tokens = shared + static_cast<std::uint32_t>(step % kStages * Shape::kStageBytes);
    const std::uint32_t features = tokens + Shape::kTokens * kStepBytes;
    std::uint32_t a[kTokenBlocks][2][4];
#pragma unroll
    for (int i = 0; i < kTokenBlocks; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half)
        device::load_matrix_x4(a[i][half], tokens + chunk_offset(warp_token + i * 16 + lane % 16, half * 2 + lane / 16));
    }
#pragma unroll
    for (int j = 0; j < kFeatureBlocks; ++j) {
      std::uint32_t b[4];
      device::load_matrix_x4(b, features + chunk_offset(warp_feature + j * 8 + lane % 8, lane / 8));
#pragma unroll
      for (int i = 0; i < kTokenBlocks; ++i) {
        mma_bytes(sum[i][j], a[i][0], b[0], b[1]);
        mma_bytes(sum[i][j], a[i][1], b[2], b[3]);
      }
    }
    if constexpr (kBlockScales) {
      // A block of 128 is two steps.
      if (step % 2 == 0 && step + 1 < num_steps) continue;
      const std::int64_t group = step / 2;
#pragma unroll
      for (int i = 0; i < kTokenBlocks; ++i) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const std::int64_t m = first_token + warp_token + i * 16 + lane / 4 + 8 * r;
          const std::int64_t block = (first_feature + warp_feature) / 128;
          const float scale = m < p.m && block * 128 < p.n ? p.scale_a[m * p.scale_a_row_stride + group * p.scale_a_group_stride] *
                                                                 p.scale_b[block * p.scale_b_row_stride + group * p.scale_b_group_stride]
                                                           : 0.0f;
#pragma unroll
          for (int j = 0; j < kFeatureBlocks; ++j) {
#pragma unroll
            for (int e = 2 * r; e < 2 * r + 2; ++e) {
              total[i][j][e] += static_cast<float>(sum[i][j][e]) * scale;
              sum[i][j][e] = 0;
            }
          }
        }
      }
    }
  }

#pragma unroll
  for (int j = 0; j < kFeatureBlocks; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const std::int64_t n = first_feature + warp_feature + j * 8 + lane % 4 * 2 + e;
      if (n >= p.n) continue;
      const float bias = load_bias(p, n);
      const float feature_scale = kBlockScales ? 1.0f : load_feature_scale(p, n);
      const int column_sum = load_column_sum(p, n);
#pragma unroll
      for (int i = 0; i < kTokenBlocks; ++i) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const std::int64_t m = first_token + warp_token + i * 16 + lane / 4 + 8 * r;
          if (m >= p.m) continue;
          if constexpr (kBlockScales) {
            store_result(p, m, n, total[i][j][2 * r + e] + bias);
          } else {
            const int zero_point = p.zero_point != nullptr ? load_zero_point(p, m) : 0;
            const auto value = static_cast<float>(subtract_zero_point(sum[i][j][2 * r + e], zero_point, column_sum));
            store_result(p, m, n, value * load_token_scale(p, m) * feature_scale + bias);
          }
        }
      }
    }
  }
}

/// The largest power of two up to 16 that divides every row's address; below 8 bytes also the row's length, as copies are so wide then.
int row_alignment(const void* data, std::int64_t num_rows, std::int64_t stride, std::int64_t length) {
  const auto lowest = [](std::uint64_t bits) { return static_cast<int>(bits & (~bits + 1)); };
  const auto bits = reinterpret_cast<std::uintptr_t>(data) | (num_rows > 1 ? static_cast<std::uint64_t>(stride) : 0) | 16;
  return lowest(bits) >= 8 ? lowest(bits) : lowest(bits | static_cast<std::uint64_t>(length));
}

template <typename Sum, int kTokens, bool kBlockScales>
void launch(const ScaledMatmulParams& p, Stream stream) {
  using Shape = MmaShape<kTokens>;
  constexpr auto kernel = scaled_matmul_mma_kernel<Sum, kTokens, kBlockScales>;
  const std::int64_t num_feature_tiles = (p.n + Shape::kFeatures - 1) / Shape::kFeatures, num_token_tiles = (p.m + kTokens - 1) / kTokens;
  const LaunchShape shape{static_cast<unsigned>(num_feature_tiles * num_token_tiles), kThreads, Shape::kSharedBytes};
  launch_waiting("scaled_matmul_mma_kernel", kernel, shape, stream, p, static_cast<int>(num_feature_tiles),
                 row_alignment(p.a, p.m, p.a_stride, p.k), row_alignment(p.b, p.n, p.b_stride, p.k));
}

template <typename Sum, bool kBlockScales>
void launch_tokens(const ScaledMatmulParams& p, Stream stream) {
  p.m <= 32 ? launch<Sum, 16, kBlockScales>(p, stream) : launch<Sum, 128, kBlockScales>(p, stream);
}

}  // namespace

void launch_mma(const ScaledMatmulParams& p, Stream stream) {
  const bool blocks = p.granularity_a == ScaleGranularity::kGroup;
  if (p.dtype == DType::kInt8) {
    blocks ? launch_tokens<int, true>(p, stream) : launch_tokens<int, false>(p, stream);
  } else {
    blocks ? launch_tokens<float, true>(p, stream) : launch_tokens<float, false>(p, stream);
  }
}

}  // namespace quire::cuda::scaled
