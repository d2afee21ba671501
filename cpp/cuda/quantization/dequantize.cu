// Undoing quantize on CUDA.
// SPDX-License-Identifier: Apache-2.0
#include <cstdint>
#include <string>

#include "core/dispatch.h"
#include "core/explain.h"
#include "cuda/device/dependent_launch.cuh"
#include "cuda/element.h"
#include "cuda/launch.h"
#include "cuda/quantization/quantize_launch.h"
#include "ops/quantization.h"

namespace quire::cuda {
namespace quant {
namespace {

// Grid: threads share the elements of the result, in turns. For every layout, width and group.
template <typename Out, typename Narrow>
__global__ void __launch_bounds__(kMaxThreads) dequantize_kernel(const __grid_constant__ QuantizeParams p) {
  device::wait_for_predecessor();
  const std::int64_t total = p.num_rows * p.width, stride = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
  for (std::int64_t item = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; item < total; item += stride) {
    const std::int64_t row = divide(item, p.width), column = item - row * p.width;
    const std::int64_t scale_row = divide(row, p.block_rows), group = divide(column, p.quant.group_size);
    const float zero = p.zero_points == nullptr ? 0.0f : static_cast<float>(*p.zero_point_at(scale_row, group));
    const float v = to_float<Narrow>(static_cast<const Narrow*>(p.x)[p.x_rows.offset(row) + column]);
    static_cast<Out*>(p.out)[p.out_rows.offset(row) + column] = from_float<Out>((v - zero) * *p.quant.scale_at(scale_row, group));
  }
}

// Grid: as quantize_rows_kernel, with kVectors vectors of a row at a time.
template <typename Out, typename Narrow, int kVectors>
__global__ void __launch_bounds__(kMaxThreads) dequantize_rows_kernel(const __grid_constant__ QuantizeParams p) {
  device::wait_for_predecessor();
  constexpr int kVec = kElementsPer16Bytes<Out>;
  const int lane = static_cast<int>(threadIdx.x), width = static_cast<int>(blockDim.x);
  const int num_vectors = static_cast<int>(p.width) / kVec, group_vectors = static_cast<int>(p.quant.group_size) / kVec;
  const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= p.num_rows) return;
  const Narrow* const x = static_cast<const Narrow*>(p.x) + p.x_rows.offset(row);
  Out* const out = static_cast<Out*>(p.out) + p.out_rows.offset(row);
  const std::int64_t scale_row = p.block_rows == 1 ? row : divide(row, p.block_rows);
  const float* const scales = p.quant.scale_at(scale_row, 0);
  const std::int32_t* const zero_points = p.zero_points == nullptr ? nullptr : p.zero_point_at(scale_row, 0);
  for (int first = lane; first < num_vectors; first += kVectors * width) {
    Packed<Narrow, kVec> packed[kVectors];
    float scale[kVectors], zero[kVectors];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int vector = first + i * width;
      if (vector >= num_vectors) continue;
      packed[i] = load_packed<Narrow, kVec>(x + vector * kVec);
      const int group = vector / group_vectors;
      scale[i] = scales[group * p.quant.group_stride];
      zero[i] = zero_points == nullptr ? 0.0f : static_cast<float>(zero_points[group * p.zero_point_group_stride]);
    }
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int vector = first + i * width;
      if (vector >= num_vectors) continue;
      float v[kVec];
      unpack<Narrow, kVec>(v, packed[i]);
#pragma unroll
      for (int e = 0; e < kVec; ++e) v[e] = (v[e] - zero[i]) * scale[i];
      store_floats(out + vector * kVec, v);
    }
  }
}

/// Why dequantize_rows_kernel, which stores 16 bytes at once, cannot do it; null: it can.
template <typename Out>
const char* prevents_dequantize_rows(const QuantizeParams& p) {
  constexpr int kCount = kElementsPer16Bytes<Out>;
  if (!is_vectors<Out, kCount>(p.out, p.out_rows, p.x, p.x_rows, p.width))
    return "q or out does not divide into aligned 16-byte pieces of out";
  if (p.width > INT32_MAX / 2 || p.num_rows > INT32_MAX) return "extents are over 2^30";
  if (p.quant.granularity == ScaleGranularity::kGroup && p.quant.group_size % kCount != 0)
    return "groups do not divide into 16-byte pieces";
  return nullptr;
}

template <typename Out, typename Narrow>
void launch_dequantize(const QuantizeParams& p, Stream stream) {
  constexpr int kCount = kElementsPer16Bytes<Out>, kVectors = 4;
  if (prevents_dequantize_rows<Out>(p) == nullptr) {
    const dim3 block = row_block(ceil_div(p.width / kCount, kVectors), kNarrowThreads * 2);
    return launch_waiting("dequantize_rows_kernel", dequantize_rows_kernel<Out, Narrow, kVectors>,
                          static_cast<unsigned>(ceil_div(p.num_rows, block.y)), block, stream, p);
  }
  launch_waiting("dequantize_kernel", dequantize_kernel<Out, Narrow>, num_ctas(p.num_rows * p.width, kMaxThreads, 64), kMaxThreads, stream,
                 p);
}

}  // namespace
}  // namespace quant

void dequantize(const QuantizeParams& p, Stream stream) {
  dispatch_float(p.dtype, "dequantize", [&](auto dtype) {
    using Out = Element<decltype(dtype)::value>;
    if (Explanation* const explanation = explaining()) {
      const char* const obstacle = quant::prevents_dequantize_rows<Out>(p);
      explanation->variant = obstacle == nullptr ? "rows" : "elements";
      explanation->reasons.push_back(obstacle == nullptr ? "all rows of out begin and end at multiples of 16 bytes"
                                                         : std::string("not rows: ") + obstacle);
      return;
    }
    if (p.quant.dtype == DType::kInt8) {
      quant::launch_dequantize<Out, std::int8_t>(p, stream);
    } else {
      quant::launch_dequantize<Out, __nv_fp8_e4m3>(p, stream);
    }
  });
}

}  // namespace quire::cuda
