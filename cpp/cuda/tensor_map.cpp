// Tensor maps, made by the driver.
// SPDX-License-Identifier: Apache-2.0
#include "cuda/tensor_map.h"

#include <cuda_runtime.h>

#include <string>

#include "cuda/launch.h"
#include "quire/error.h"

namespace quire::cuda {

EncodeTensorMap encode_tensor_map() {
  static const EncodeTensorMap function = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result{};
    QUIRE_CUDA_CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result));
    if (result != cudaDriverEntryPointSuccess) throw CudaError("[cuda] cuTensorMapEncodeTiled: this driver does not have it", 0);
    return reinterpret_cast<EncodeTensorMap>(found);
  }();
  return function;
}

void check_tensor_map(CUresult status) {
  if (status != CUDA_SUCCESS)
    throw CudaError("[cuda] cuTensorMapEncodeTiled failed with status " + std::to_string(static_cast<int>(status)),
                    static_cast<int>(status));
}

CUtensorMap make_byte_matrix_map(const void* data, std::int64_t num_rows, std::int64_t row_bytes, std::int64_t stride, int box_rows) {
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

CUtensorMap make_half_matrix_map(void* data, std::int64_t num_rows, std::int64_t row_length, std::int64_t stride, int box_rows) {
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
