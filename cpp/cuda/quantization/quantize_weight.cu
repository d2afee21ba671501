// Codes of weights, and sums of int8 rows.
// SPDX-License-Identifier: Apache-2.0
#include <cstdint>

#include "core/dispatch.h"
#include "cuda/device/dependent_launch.cuh"
#include "cuda/device/reduce.cuh"
#include "cuda/element.h"
#include "cuda/launch.h"
#include "cuda/quantization/quantize_launch.h"
#include "cuda/quantization/quantize_range.cuh"
#include "ops/quantization.h"

namespace quire::cuda {
namespace quant {
namespace {

// Grid: a warp for each output feature and group, in turns.
template <typename T, typename Scale>
__global__ void quantize_weight_kernel(const __grid_constant__ QuantizeWeightParams p) {
  device::wait_for_predecessor();
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const std::int64_t warps = static_cast<std::int64_t>(gridDim.x) * (blockDim.x / kWarpSize), groups = p.num_groups();
  const float largest_code = static_cast<float>((1 << p.bits) - 1), middle = static_cast<float>(1 << (p.bits - 1));
  for (std::int64_t item = static_cast<std::int64_t>(blockIdx.x) * (blockDim.x / kWarpSize) + threadIdx.x / kWarpSize; item < p.n * groups;
       item += warps) {
    const std::int64_t row = divide(item, groups), group = item - row * groups;
    const std::int64_t begin = group * p.group_size, end = min(begin + p.group_size, p.k);
    const T* const w = static_cast<const T*>(p.w) + row * p.w_stride;
    Range range;
    for (std::int64_t i = begin + lane; i < end; i += kWarpSize) {
      const float v[1] = {to_float<T>(w[i])};
      extend<true>(range, v);
    }
    range.above = warp_max(range.above);
    range.below = warp_max(range.below);
    float scale =
        p.zeros == nullptr ? __fdiv_rn(fmaxf(range.above, range.below), middle - 0.5f) : __fdiv_rn(range.above + range.below, largest_code);
    scale = fmaxf(scale, p.scale_dtype == DType::kFloat16 ? 0x1p-14f : kSmallestScale);
    const Scale stored = from_float<Scale>(scale);
    scale = to_float<Scale>(stored);
    const float zero = p.zeros == nullptr ? middle : fminf(rintf(__fdiv_rn(range.below, scale)), largest_code);
    if (lane == 0) {
      static_cast<Scale*>(p.scales)[item] = stored;
      if (p.zeros != nullptr) p.zeros[item] = static_cast<std::uint8_t>(zero);
    }
    for (std::int64_t i = begin + lane; i < end; i += kWarpSize) {
      const float code = rintf(__fdiv_rn(to_float<T>(w[i]), scale)) + zero;
      // fmaxf passes over NaN.
      p.codes[row * p.codes_stride + i] = static_cast<std::uint8_t>(fminf(fmaxf(code, 0.0f), largest_code));
    }
  }
}

// Grid: a warp for each row, in turns. kWords: rows are read in 16-byte accesses.
template <bool kWords>
__global__ void column_sums_kernel(std::int32_t* sums, const std::int8_t* b, std::int64_t n, std::int64_t k, std::int64_t stride) {
  device::wait_for_predecessor();
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const std::int64_t warps = static_cast<std::int64_t>(gridDim.x) * (blockDim.x / kWarpSize);
  for (std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * (blockDim.x / kWarpSize) + threadIdx.x / kWarpSize; row < n;
       row += warps) {
    int sum = 0;
    if constexpr (kWords) {
      for (std::int64_t i = lane * 16; i < k; i += kWarpSize * 16) {
        const RawVector<16> words = load_raw<16>(b + row * stride + i);
#pragma unroll
        for (int w = 0; w < 4; ++w) sum = __dp4a(static_cast<int>(words.words[w]), 0x01010101, sum);
      }
    } else {
      for (std::int64_t i = lane; i < k; i += kWarpSize) sum += b[row * stride + i];
    }
    sum = __reduce_add_sync(kFullMask, sum);
    if (lane == 0) sums[row] = sum;
  }
}

}  // namespace
}  // namespace quant

void quantize_weight(const QuantizeWeightParams& p, Stream stream) {
  dispatch_float(p.dtype, "quantize_weight", [&](auto dtype) {
    dispatch_float(p.scale_dtype, "quantize_weight", [&](auto scale_dtype) {
      using T = Element<decltype(dtype)::value>;
      using Scale = Element<decltype(scale_dtype)::value>;
      launch_waiting("quantize_weight_kernel", quant::quantize_weight_kernel<T, Scale>, quant::num_ctas(p.n * p.num_groups(), 8, 32), 256,
                     stream, p);
    });
  });
}

void column_sums(std::int32_t* sums, const std::int8_t* b, std::int64_t n, std::int64_t k, std::int64_t stride, Stream stream) {
  const unsigned ctas = quant::num_ctas(n, 8, 32);
  const bool words = k % 16 == 0 && stride % 16 == 0 && is_aligned(b, 16);
  launch_waiting("column_sums_kernel", words ? quant::column_sums_kernel<true> : quant::column_sums_kernel<false>, ctas, 256, stream, sums,
                 b, n, k, stride);
}

}  // namespace quire::cuda
