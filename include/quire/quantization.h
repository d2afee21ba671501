// Quantization: float8 and int8 results with scales, packed integer weights, and the matrix products of both.
// SPDX-License-Identifier: Apache-2.0
//
// Every function validates, enqueues on `stream` and does not synchronise.
// Throws std::invalid_argument (shape, layout, alias), TypeError (dtype), UnsupportedError, CudaError.
#pragma once

#include <cstdint>

#include "quire/dtype.h"
#include "quire/export.h"
#include "quire/stream.h"
#include "quire/tensor.h"

namespace quire {

/// What one scale belongs to.
enum class ScaleGranularity {
  kTensor,  ///< The whole tensor: scales is float32 [1].
  kToken,   ///< A row: scales is float32 [..., 1].
  kGroup,   ///< group_size elements of a row: scales is float32 [..., width / group_size], any strides.
};

// ---- Quantized results: how norms, gated activations and quantize() write float8_e4m3fn or int8 ----------------------------------
//
// stored = saturate(y / scale), rounded to nearest even. y is the op's float32 result, not rounded to the dtype of its input before;
// the quotient is the float32 one, bit for bit. NaN stays NaN in float8 and becomes 0 in int8. stored * scale gives y back.
//
// A computed scale is max |y| over what it belongs to, divided by 448 (float8_e4m3fn) or 127 (int8), in float32, and not below
// 2^-126; NaN does not count. Norms and activations read kTensor's scale and write the others.
//
// Asymmetric int8: stored = saturate(round(y / scale) + zero_point), y = (stored - zero_point) * scale. Computed, with low = min(0, min y) and
// high = max(0, max y): scale = (high - low) / 255, not below 2^-126, and zero_point = -128 - round(low / scale), within [-128, 127].

/// out = quantized x. x is float32, float16 or bfloat16 [..., width] (rank 1 to 4, unit inner stride); out is float8_e4m3fn or int8 of its
/// shape. `scales` and `zero_points` are read where `computes` is false, else written. zero_points is int32 of scales' shape, or null:
/// symmetric; int8 only. scale_bound is the largest |y| that counts for a computed scale of float8 (larger values saturate); infinity: none.
/// For kGroup the last group of a row may be shorter than group_size. Messages say quantize_fp8 or quantize_int8, as Python does.
/// Computed scales of an x without elements are 1, zero points 0.
QUIRE_API void quantize(const TensorView& out, const TensorView& scales, const TensorView* zero_points, const TensorView& x,
                        ScaleGranularity granularity, std::int64_t group_size, bool computes, double scale_bound, Stream stream);

/// out = (q - zero_point) * scale, in float32, rounded to out's dtype (float32, float16, bfloat16). Tensors as in quantize.
/// Messages say dequantize_fp8 or dequantize_int8.
QUIRE_API void dequantize(const TensorView& out, const TensorView& q, const TensorView& scales, const TensorView* zero_points,
                          ScaleGranularity granularity, std::int64_t group_size, Stream stream);

/// out[n, k] = w[n, k] * scales[n / block_rows, k / block_columns]: one scale for each block. w is float8_e4m3fn or int8 [N, K], scales float32
/// [ceil(N / block_rows), ceil(K / block_columns)]; out is float32, float16 or bfloat16 of w's shape.
QUIRE_API void dequantize_blocks(const TensorView& out, const TensorView& w, const TensorView& scales, std::int64_t block_rows,
                                 std::int64_t block_columns, Stream stream);

// ---- Packed weights: integer codes for products with 16-bit activations ----------------------------------------------------------
//
// w[n, k] = (code - zero) * scale, the product in float32. n is an output feature, k an input feature. Scale and zero belong to an output
// feature and a group of input features; without zeros, zero is 2^(bits - 1). On the CPU with AMX, most products with bfloat16
// activations round w to bfloat16: see quantized_matmul.

/// How a checkpoint stores codes and zeros. G is the number of groups; words are int32, lowest bits first.
enum class WeightEncoding : std::uint8_t {
  kAwq,                ///< codes [K, N/8], zeros [G, N/8], nibbles of a word in column order 0 2 4 6 1 3 5 7; scales [G, N]. 4 bits.
  kGptq,               ///< codes [K*bits/32, N] along K, zeros [G, N*bits/32], less 1 modulo 2^bits; scales [G, N]. 2, 3, 4, 8 bits.
  kGptqV2,             ///< kGptq with zeros as they are.
  kCompressedTensors,  ///< codes [N, ceil(K*bits/32)] along K, zeros [ceil(N*bits/32), G] along N; scales [N, G]. 4, 8 bits.
  kCodes,              ///< codes uint8 [N, K], zeros uint8 [N, G] one to a byte; scales [N, G]. 2, 3, 4, 8 bits.
};

/// What a packed weight is. Two weights with one format have one layout.
struct WeightFormat {
  std::int64_t in_features = 0;   ///< K
  std::int64_t out_features = 0;  ///< N
  int bits = 4;                   ///< Of a code: 2, 3, 4 or 8. Codes below 4 bits are stored in 4.
  /// Rows that share scale and zero: 32, 64, 128, or 0: all of them.
  std::int64_t group_size = 128;
  /// Rows in the order they are stored in. in_features, unless a permutation leaves rows empty; then a multiple of group_size.
  std::int64_t num_rows = 0;
  DType scale_dtype = DType::kFloat16;  ///< float16, bfloat16 or float32.
  bool has_zeros = false;

  std::int64_t num_groups() const { return group_size == 0 ? 1 : (num_rows + group_size - 1) / group_size; }
  /// Bits that a code takes: 4 or 8.
  int stored_bits() const { return bits <= 4 ? 4 : 8; }
};

/// A weight in the layout of the backend of its device.
struct PackedWeight {
  WeightFormat format;
  TensorView data;                        ///< uint8 [packed_weight_size()], 16-byte aligned, contiguous.
  const TensorView* permutation = nullptr;  ///< int32 [num_rows] or null: the input feature of each row; -1: none, the row is empty.
};

/// The tensors of a checkpoint that a weight is packed from, all on its device.
struct WeightTensors {
  WeightEncoding encoding = WeightEncoding::kAwq;
  TensorView codes;
  TensorView scales;                 ///< float16, bfloat16, float32
  const TensorView* zeros = nullptr;
  /// int32 [num_groups] or null: the checkpoint's group that each group of the packed weight takes scale and zero from.
  const TensorView* groups = nullptr;
};

/// Bytes of PackedWeight::data, whose layout is that of the device's kind.
QUIRE_API std::int64_t packed_weight_size(const WeightFormat& format, Device device);

/// Fills weight.data from a checkpoint's tensors. Scales are copied bit by bit. Contents of `permutation` and `groups` that are out of range
/// count as -1 and as 0.
QUIRE_API void pack_weight(const PackedWeight& weight, const WeightTensors& source, Stream stream);

/// out[n, k] = w[n, k], the float32 product rounded to out's dtype (float32, float16, bfloat16). out is [N, K], any row stride.
QUIRE_API void dequantize_weight(const TensorView& out, const PackedWeight& weight, Stream stream);

/// codes uint8 [N, K], scales [N, G] and zeros uint8 [N, G] (null: symmetric) of a weight w [N, K], each code rounded to nearest:
/// symmetric, scale = max |w| / (2^(bits-1) - 0.5); asymmetric, the range with 0 in it over 2^bits - 1. Scales are rounded to their dtype first.
QUIRE_API void quantize_weight(const TensorView& codes, const TensorView& scales, const TensorView* zeros, const TensorView& w, int bits,
                               std::int64_t group_size, Stream stream);

// ---- Matrix products ---------------------------------------------------------------------------------------------------------------

struct MatmulOptions {
  /// The bits of a row of the result do not depend on how many other rows there are.
  bool batch_invariant = false;
};

/// out[..., n] = sum_k x[..., k] w[n, k] + bias[n], accumulated in float32. x is float16 or bfloat16 (on the CPU also float32)
/// [..., K]; out is [..., N] of its dtype; both with unit inner stride, and one distance between all rows. bias is [N] of any float dtype,
/// or null. workspace is uint8, 16-byte aligned, of quantized_matmul_workspace_size bytes or more; null where that is 0.
/// On the CPU with AMX, more than four tokens of bfloat16, or any number with batch_invariant, meet w rounded to bfloat16.
QUIRE_API void quantized_matmul(const TensorView& out, const TensorView& x, const PackedWeight& weight, const TensorView* bias,
                                const TensorView* workspace, const MatmulOptions& options, Stream stream);
QUIRE_API std::int64_t quantized_matmul_workspace_size(std::int64_t num_tokens, const WeightFormat& format, bool has_permutation,
                                                       DType dtype, const MatmulOptions& options, Device device);

/// The operands of scaled_matmul besides a and b.
struct MatmulScales {
  TensorView scale_a;                       ///< float32: [1], [M, 1], or [M, ceil(K/128)], any strides.
  TensorView scale_b;                       ///< float32: [1], [N, 1], or [ceil(N/128), ceil(K/128)], any strides.
  const TensorView* zero_point = nullptr;   ///< int32 [1] or [M, 1], of int8 a; null: 0.
  const TensorView* column_sums = nullptr;  ///< int32 [N], sum_k b[n, k], for zero_point; null: they are computed.
};

/// out[m, n] = sum_k (a[m, k] - zero_point[m]) scale_a[m, k/128] b[n, k] scale_b[n/128, k/128] + bias[n].
/// a [M, K] and b [N, K] are both float8_e4m3fn (accumulated in float32) or both int8 (in int32), with unit inner stride. Groups of scale_a go
/// with blocks of scale_b, both of 128; K <= 65536 for int8. out is float32, float16 or bfloat16 [M, N] with unit inner stride.
QUIRE_API void scaled_matmul(const TensorView& out, const TensorView& a, const TensorView& b, const MatmulScales& scales,
                             const TensorView* bias, const TensorView* workspace, const MatmulOptions& options, Stream stream);
/// `dtype` is that of a and b; `has_blocks`: scales of 1x128 and 128x128; `computes_sums`: a zero point without column_sums.
QUIRE_API std::int64_t scaled_matmul_workspace_size(std::int64_t m, std::int64_t n, std::int64_t k, DType dtype, bool has_blocks,
                                                    bool computes_sums, const MatmulOptions& options, Device device);

/// sums[n] = sum_k b[n, k]; int32 [N] from int8 [N, K].
QUIRE_API void column_sums(const TensorView& sums, const TensorView& b, Stream stream);

}  // namespace quire
