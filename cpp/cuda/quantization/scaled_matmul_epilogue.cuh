// What scaled_matmul's kernels do with sums: zero points, scales, bias, and results of any float type.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "ops/quantization.h"

namespace quire::cuda::scaled {

/// bias[n], 0 without a bias and past the end.
__device__ __forceinline__ float load_bias(const ScaledMatmulParams& p, std::int64_t n) {
  if (p.bias == nullptr || n >= p.n) return 0.0f;
  if (p.bias_dtype == DType::kFloat32) return static_cast<const float*>(p.bias)[n];
  if (p.bias_dtype == DType::kFloat16) return __half2float(static_cast<const __half*>(p.bias)[n]);
  return __bfloat162float(static_cast<const __nv_bfloat16*>(p.bias)[n]);
}
/// Scale of a token, unless it has groups; 0 past the end.
__device__ __forceinline__ float load_token_scale(const ScaledMatmulParams& p, std::int64_t m) {
  return m < p.m ? p.scale_a[m * p.scale_a_row_stride] : 0.0f;
}
/// Scale of an output feature, unless it has blocks; 0 past the end.
__device__ __forceinline__ float load_feature_scale(const ScaledMatmulParams& p, std::int64_t n) {
  return n < p.n ? p.scale_b[n * p.scale_b_row_stride] : 0.0f;
}
__device__ __forceinline__ int load_zero_point(const ScaledMatmulParams& p, std::int64_t m) {
  return m < p.m ? p.zero_point[m * p.zero_point_stride] : 0;
}
__device__ __forceinline__ int load_column_sum(const ScaledMatmulParams& p, std::int64_t n) {
  return p.zero_point != nullptr && n < p.n ? p.column_sums[n] : 0;
}

/// A sum of a - zero_point from that of a. K is at most 65536: the result fits; the steps may wrap.
__device__ __forceinline__ int subtract_zero_point(int sum, int zero_point, int column_sum) {
  return static_cast<int>(static_cast<unsigned>(sum) - static_cast<unsigned>(zero_point) * static_cast<unsigned>(column_sum));
}
__device__ __forceinline__ float subtract_zero_point(float sum, int, int) { return sum; }

__device__ __forceinline__ void store_result(const ScaledMatmulParams& p, std::int64_t m, std::int64_t n, float value) {
  const std::int64_t at = m * p.out_stride + n;
  if (p.out_dtype == DType::kFloat32) {
    static_cast<float*>(p.out)[at] = value;
  } else if (p.out_dtype == DType::kFloat16) {
    static_cast<__half*>(p.out)[at] = __float2half_rn(value);
  } else {
    static_cast<__nv_bfloat16*>(p.out)[at] = __float2bfloat16_rn(value);
  }
}

}  // namespace quire::cuda::scaled
