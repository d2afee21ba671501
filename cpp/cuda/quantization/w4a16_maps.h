// How the copy engine reads a packed weight. Host code only.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "cuda/tensor_map.h"

namespace quire::cuda::w4a16 {

/// [num_blocks, num_rows, row_bytes], contiguous, read in boxes of box_rows rows of box_blocks blocks.
inline CUtensorMap make_word_map(const void* data, int row_bytes, std::int64_t num_rows, std::int64_t num_blocks, int box_rows,
                                 int box_blocks) {
  const auto words = static_cast<cuuint32_t>(row_bytes / 8);
  const cuuint64_t sizes[4] = {words, static_cast<cuuint64_t>(num_rows), static_cast<cuuint64_t>(num_blocks), 1};
  const cuuint64_t row = static_cast<cuuint64_t>(row_bytes), block = row * static_cast<cuuint64_t>(num_rows);
  const cuuint64_t strides[3] = {row, block, block * static_cast<cuuint64_t>(num_blocks)};
  const cuuint32_t box[4] = {words, static_cast<cuuint32_t>(box_rows), static_cast<cuuint32_t>(box_blocks), 1}, steps[4] = {1, 1, 1, 1};
  CUtensorMap map;
  check_tensor_map(encode_tensor_map()(&map, CU_TENSOR_MAP_DATA_TYPE_FLOAT64, 4, const_cast<void*>(data), sizes, strides, box, steps,
                                       CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                                       CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE));
  return map;
}

}  // namespace quire::cuda::w4a16
