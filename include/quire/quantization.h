// Quantized results: how an op writes its output as float8_e4m3fn or int8, with scales.
// SPDX-License-Identifier: Apache-2.0
//
// stored = saturate(y / scale), rounded to nearest even. y is the op's float32 result, not rounded to the dtype of its input before;
// the quotient is the float32 one, bit for bit. NaN stays NaN in float8 and becomes 0 in int8.
//
// A computed scale is max |y| over what it belongs to, divided by 448 (float8_e4m3fn) or 127 (int8), in float32, and not below
// 2^-126; NaN does not count. stored * scale gives y back.
#pragma once

namespace quire {

/// What one scale belongs to.
enum class ScaleGranularity {
  kTensor,  ///< The whole tensor: scales is float32 [1], and it is read. Null is not allowed.
  kToken,   ///< A row: scales is float32 [..., 1], and it is written.
  kGroup,   ///< group_size elements of a row: scales is float32 [..., width / group_size], any strides, and it is written.
};

}  // namespace quire
