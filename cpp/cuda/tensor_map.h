// Tensor maps, by which Hopper's copy engine knows tensors. Host code only.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda.h>

#include <cstdint>

namespace quire::cuda {

using EncodeTensorMap = decltype(&cuTensorMapEncodeTiled);

/// The driver's function, which the library does not link against.
EncodeTensorMap encode_tensor_map();

void check_tensor_map(CUresult status);

/// A matrix [num_rows, row_bytes] of bytes, read in boxes of 128 bytes of `box_rows` rows, with the 128-byte swizzle. data and stride are multiples
/// of 16 bytes.
CUtensorMap make_byte_matrix_map(const void* data, std::int64_t num_rows, std::int64_t row_bytes, std::int64_t stride, int box_rows);

/// A matrix of 16-bit elements [num_rows, row_length], written in boxes of 64 elements of `box_rows` rows, with the 128-byte swizzle. data and
/// stride (in elements) are multiples of 16 bytes.
CUtensorMap make_half_matrix_map(void* data, std::int64_t num_rows, std::int64_t row_length, std::int64_t stride, int box_rows);

}  // namespace quire::cuda
