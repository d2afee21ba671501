// Tensor maps, by which Hopper's copy engine knows tensors. Host code only.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <string>

#include "cuda/launch.h"
#include "quire/error.h"

namespace quire::cuda {

using EncodeTensorMap = decltype(&cuTensorMapEncodeTiled);

/// The driver's function, which the library does not link against.
inline EncodeTensorMap encode_tensor_map() {
  static const EncodeTensorMap function = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result{};
    QUIRE_CUDA_CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result));
    if (result != cudaDriverEntryPointSuccess) throw CudaError("[cuda] cuTensorMapEncodeTiled: this driver does not have it", 0);
    return reinterpret_cast<EncodeTensorMap>(found);
  }();
  return function;
}

inline void check_tensor_map(CUresult status) {
  if (status != CUDA_SUCCESS)
    throw CudaError("[cuda] cuTensorMapEncodeTiled failed with status " + std::to_string(static_cast<int>(status)),
                    static_cast<int>(status));
}

/// A matrix [num_rows, row_bytes] of bytes, read in boxes of 128 bytes of `box_rows` rows, with the 128-byte swizzle. data and stride are multiples
/// of 16 bytes.
inline CUtensorMap make_byte_matrix_map(const void* data, std::int64_t num_rows, std::int64_t row_bytes, std::int64_t stride,
                                        int box_rows) {
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(row_bytes), static_cast<cuuint64_t>(num_rows)};
  // The stride of a dimension of size 1 is not used, but must look well.
  const cuuint64_t strides[1] = {num_rows > 1 ? static_cast<cuuint64_t>(stride) : 16};
  const cuuint32_t box[2] = {128, static_cast<cuuint32_t>(box_rows)}, steps[2] = {1, 1};
  CUtensorMap map;
  check_tensor_map(encode_tensor_map()(&map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, const_cast<void*>(data), sizes, strides, box, steps,
                                       CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                                       CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE));
  return map;
}

/// A matrix of 16-bit elements [num_rows, row_length], written in boxes of 64 elements of `box_rows` rows, with the 128-byte swizzle. data and
/// stride (in elements) are multiples of 16 bytes.
inline CUtensorMap make_half_matrix_map(void* data, std::int64_t num_rows, std::int64_t row_length, std::int64_t stride, int box_rows) {
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(row_length), static_cast<cuuint64_t>(num_rows)};
  const cuuint64_t strides[1] = {num_rows > 1 ? static_cast<cuuint64_t>(stride * 2) : 16};
  const cuuint32_t box[2] = {64, static_cast<cuuint32_t>(box_rows)}, steps[2] = {1, 1};
  CUtensorMap map;
  check_tensor_map(encode_tensor_map()(&map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 2, data, sizes, strides, box, steps,
                                       CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                                       CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE));
  return map;
}

}  // namespace quire::cuda
