// What ops with quantized operands or results hand to a backend, and the backends' entry points. Everything here is validated.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "core/layout.h"
#include "quire/dtype.h"
#include "quire/quantization.h"
#include "quire/stream.h"

namespace quire {

class Check;
struct TensorView;

/// Rows and columns of a block that has a scale of its own, where scales are those of blocks.
inline constexpr std::int64_t kScaleBlock = 128;

// ---- Quantized results ----------------------------------------------------------------------------------------------------------------

struct QuantParams {
  float* scales = nullptr;  // kTensor: [1], read; kToken, kGroup: [num_rows, groups per row], written. Null: the result is not quantized
  ScaleGranularity granularity = ScaleGranularity::kTensor;
  DType dtype = DType::kFloat8E4M3FN;  // of the result
  std::int64_t group_size = 0;         // elements that share a scale, within a row
  RowLayout scale_rows;
  std::int64_t group_stride = 0;  // of scales

  QUIRE_HOST_DEVICE float* scale_at(std::int64_t row, std::int64_t group) const {
    return scales + scale_rows.offset(row) + group * group_stride;
  }
};

/// The largest value of a quantized dtype, by which a computed scale is made.
QUIRE_HOST_DEVICE constexpr float largest_quantized(DType dtype) { return dtype == DType::kInt8 ? 127.0f : 448.0f; }
/// Computed scales are not below this: a row of zeros has a scale that can be divided by.
inline constexpr float kSmallestScale = 0x1p-126f;

/// Checks a quantized result and its scales. `like` has the result's shape and device.
QuantParams check_quantized(const Check& check, const TensorView& out, const TensorView& scales, const TensorView& like,
                            const char* like_arg, ScaleGranularity granularity, std::int64_t group_size);

// ---- quantize, dequantize ---------------------------------------------------------------------------------------------------------------

struct QuantizeParams {
  void* out = nullptr;      // [num_rows, width], float8_e4m3fn or int8; for dequantize of out_dtype
  const void* x = nullptr;  // [num_rows, width], of dtype; for dequantize float8_e4m3fn or int8
  std::int32_t* zero_points = nullptr;  // as scales, or null
  DType dtype = DType::kFloat32;        // of the float side
  std::int64_t num_rows = 0;            // > 0
  std::int64_t width = 0;               // > 0
  RowLayout out_rows, x_rows, zero_point_rows;
  std::int64_t zero_point_group_stride = 0;
  bool computes = false;      // scales and zero_points are written, not read
  float scale_bound = 0.0f;   // computed scales: the largest |x| that counts; infinity: none
  std::int64_t block_rows = 1;  // dequantize: rows that share a scale
  // quant.dtype is that of the quantized side. kTensor: group_size is width and all strides are 0; kToken: group_size is width.
  QuantParams quant;

  QUIRE_HOST_DEVICE std::int32_t* zero_point_at(std::int64_t row, std::int64_t group) const {
    return zero_points + zero_point_rows.offset(row) + group * zero_point_group_stride;
  }
};

struct QuantizeWeightParams {
  std::uint8_t* codes = nullptr;  // [n, k]
  void* scales = nullptr;         // [n, groups], contiguous, of scale_dtype
  std::uint8_t* zeros = nullptr;  // [n, groups] contiguous, or null
  const void* w = nullptr;        // [n, k], of dtype
  DType dtype = DType::kFloat32, scale_dtype = DType::kFloat16;
  std::int64_t n = 0, k = 0, w_stride = 0, codes_stride = 0;
  std::int64_t group_size = 0;  // > 0; the last group may be shorter
  int bits = 4;

  QUIRE_HOST_DEVICE std::int64_t num_groups() const { return ceil_div(k, group_size); }
};

// ---- Packed weights ------------------------------------------------------------------------------------------------------------------

/// What a checkpoint calls the tensors of WeightTensors, for messages.
struct SourceNames {
  const char *codes, *scales, *zeros;
};
SourceNames source_names(WeightEncoding encoding);

/// Reads a checkpoint's tensors, whatever their encoding, in the order that a packed weight stores.
///
/// row, group, n: of the packed weight. Codes come normalised to format.stored_bits(): without zeros, what represents 0 is 8 (4 bits) or 128
/// (8 bits), also for 2 and 3 bits; with zeros, code and zero are the checkpoint's. A row without an input feature gives the code of 0.
struct WeightSource {
  const void* codes = nullptr;   // as WeightEncoding says
  const void* scales = nullptr;  // of format.scale_dtype
  const void* zeros = nullptr;   // null: format.has_zeros is false
  const std::int32_t* permutation = nullptr;  // [num_rows] or null
  const std::int32_t* groups = nullptr;       // [num_groups] or null
  WeightEncoding encoding = WeightEncoding::kAwq;
  int bits = 4;
  std::int64_t in_features = 0, num_source_groups = 0;
  std::int64_t group_size = 0, num_rows = 0;  // of the packed weight
  std::int64_t code_stride = 0, zero_stride = 0;           // between rows of these tensors, in their elements
  std::int64_t scale_group_stride = 0, scale_n_stride = 0;  // of scales

  QUIRE_HOST_DEVICE std::int64_t source_group(std::int64_t group) const {
    if (groups == nullptr) return group;
    const std::int64_t g = groups[group];
    return g < 0 || g >= num_source_groups ? 0 : g;
  }

  /// The position of a scale in `scales`.
  QUIRE_HOST_DEVICE std::int64_t scale_index(std::int64_t group, std::int64_t n) const {
    return source_group(group) * scale_group_stride + n * scale_n_stride;
  }

  /// `bits` bits at position `at` of a stream of words that lie `stride` apart.
  QUIRE_HOST_DEVICE std::uint32_t stream_bits(const std::uint32_t* words, std::int64_t stride, std::int64_t at) const {
    const std::int64_t word = at >> 5;
    const int shift = static_cast<int>(at & 31);
    std::uint32_t value = words[word * stride] >> shift;
    if (shift + bits > 32) value |= words[(word + 1) * stride] << (32 - shift);
    return value & ((1u << bits) - 1u);
  }

  /// Where AWQ keeps column n of a word of eight.
  QUIRE_HOST_DEVICE static constexpr int awq_shift(std::int64_t n) {
    const int column = static_cast<int>(n & 7);
    return 4 * ((column >> 1) | ((column & 1) << 2));
  }

  /// The zero of a packed group; format.has_zeros.
  QUIRE_HOST_DEVICE std::uint32_t zero(std::int64_t group, std::int64_t n) const {
    const std::int64_t g = source_group(group);
    const std::uint32_t mask = (1u << bits) - 1u;
    const auto* words = static_cast<const std::uint32_t*>(zeros);
    switch (encoding) {
      case WeightEncoding::kAwq: return (words[g * zero_stride + (n >> 3)] >> awq_shift(n)) & mask;
      case WeightEncoding::kGptq: return (stream_bits(words + g * zero_stride, 1, n * bits) + 1u) & mask;
      case WeightEncoding::kGptqV2: return stream_bits(words + g * zero_stride, 1, n * bits);
      case WeightEncoding::kCompressedTensors: return stream_bits(words + g, zero_stride, n * bits);
      case WeightEncoding::kCodes: return static_cast<const std::uint8_t*>(zeros)[n * zero_stride + g] & mask;
    }
    return 0;
  }

  QUIRE_HOST_DEVICE std::uint32_t code(std::int64_t row, std::int64_t n) const {
    std::int64_t k = row;
    if (permutation != nullptr) k = row < num_rows ? permutation[row] : -1;
    const std::uint32_t middle = bits <= 4 ? 8u : 128u;
    if (k < 0 || k >= in_features) {
      if (zeros == nullptr) return middle;
      return row < num_rows ? zero(group_size == 0 ? 0 : row / group_size, n) : 0u;
    }
    const auto* words = static_cast<const std::uint32_t*>(codes);
    std::uint32_t value = 0;
    switch (encoding) {
      case WeightEncoding::kAwq: value = (words[k * code_stride + (n >> 3)] >> awq_shift(n)) & 15u; break;
      case WeightEncoding::kGptq:
      case WeightEncoding::kGptqV2: value = stream_bits(words + n, code_stride, k * bits); break;
      case WeightEncoding::kCompressedTensors: value = stream_bits(words + n * code_stride, 1, k * bits); break;
      case WeightEncoding::kCodes: value = static_cast<const std::uint8_t*>(codes)[n * code_stride + k] & ((1u << bits) - 1u); break;
    }
    return zeros == nullptr ? value + middle - (1u << (bits - 1)) : value;
  }
};

/// What a backend's matrix product and dequantize_weight read.
struct PackedParams {
  const void* data = nullptr;                 // as the backend's pack_weight left it
  const std::int32_t* permutation = nullptr;  // [format.num_rows] or null; -1 and whatever is not in [0, in_features): the row is empty
  WeightFormat format;
};

struct QuantizedMatmulParams {
  void* out = nullptr;         // [num_tokens, format.out_features], of dtype
  const void* x = nullptr;     // [num_tokens, format.in_features], of dtype; aligned to its element only
  const void* bias = nullptr;  // [format.out_features] or null, of bias_dtype
  DType dtype = DType::kFloat16;  // float16, bfloat16; on the CPU float32 too
  DType bias_dtype = DType::kFloat16;
  std::int64_t num_tokens = 0;  // > 0, as in_features and out_features are
  std::int64_t out_stride = 0, x_stride = 0;  // between rows
  PackedParams weight;
  void* workspace = nullptr;  // 16-byte aligned, of *_workspace_size bytes; contents arbitrary before, arbitrary after
  bool batch_invariant = false;
};

struct ScaledMatmulParams {
  void* out = nullptr;         // [m, n], of out_dtype
  const void* a = nullptr;     // [m, k], of dtype
  const void* b = nullptr;     // [n, k], of dtype
  const void* bias = nullptr;  // [n] or null, of bias_dtype
  const float* scale_a = nullptr;  // scale_a[row * scale_a_row_stride + (k / 128) * scale_a_group_stride]
  const float* scale_b = nullptr;  // scale_b[(n or n / 128) * scale_b_row_stride + (k / 128) * scale_b_group_stride]
  const std::int32_t* zero_point = nullptr;   // zero_point[row * zero_point_stride], or null; int8 only
  const std::int32_t* column_sums = nullptr;  // [n], there where zero_point is
  DType dtype = DType::kFloat8E4M3FN;         // of a and b: float8_e4m3fn or int8
  DType out_dtype = DType::kBFloat16;         // float32, float16, bfloat16
  DType bias_dtype = DType::kBFloat16;
  ScaleGranularity granularity_a = ScaleGranularity::kTensor;  // kGroup: 1 x 128, and then b has 128 x 128
  ScaleGranularity granularity_b = ScaleGranularity::kTensor;  // kToken: one per output feature
  std::int64_t m = 0, n = 0, k = 0;                            // > 0
  std::int64_t out_stride = 0, a_stride = 0, b_stride = 0;     // between rows
  std::int64_t scale_a_row_stride = 0, scale_a_group_stride = 0;  // 0 where there is one
  std::int64_t scale_b_row_stride = 0, scale_b_group_stride = 0;
  std::int64_t zero_point_stride = 0;
  void* workspace = nullptr;  // 16-byte aligned, of *_workspace_size bytes; contents arbitrary before, arbitrary after
  bool batch_invariant = false;
};

// ---- Products that quantize their activations ------------------------------------------------------------------------------------------

/// The operands of quantize_and_multiply besides x and w. Tensors are scaled_matmul's.
struct QuantizedProduct {
  ScaleGranularity granularity = ScaleGranularity::kToken;  // of the activations' scales; kGroup: of kScaleBlock features
  TensorView w_scale;
  const TensorView* x_scale = nullptr;      // float32 [1], for kTensor; else scales are computed
  const TensorView* zero_point = nullptr;   // int32 [1], with x_scale
  const TensorView* column_sums = nullptr;  // as scaled_matmul has it
};

/// quantized_matmul with a weight w, float8_e4m3fn or int8 [N, K], that is not packed: x goes through quantize() into the workspace, then
/// through scaled_matmul(). All bits are those of the two calls.
void quantize_and_multiply(const TensorView& out, const TensorView& x, const TensorView& w, const QuantizedProduct& product,
                           const TensorView* bias, const TensorView* workspace, const MatmulOptions& options, Stream stream);
std::int64_t quantize_and_multiply_workspace_size(std::int64_t num_tokens, std::int64_t n, std::int64_t k, DType dtype,
                                                  ScaleGranularity granularity, bool computes_sums, const MatmulOptions& options,
                                                  Device device);

// ---- Backends --------------------------------------------------------------------------------------------------------------------------

namespace cpu {
void quantize(const QuantizeParams& params);
/// Scales of 1 and zero points of 0, one for each of num_rows rows without elements.
void set_default_scales(const QuantizeParams& params);
void dequantize(const QuantizeParams& params);
void quantize_weight(const QuantizeWeightParams& params);
std::int64_t packed_weight_size(const WeightFormat& format);
void pack_weight(void* data, const WeightFormat& format, const WeightSource& source);
void dequantize_weight(void* out, DType dtype, std::int64_t out_stride, const PackedParams& weight);
void quantized_matmul(const QuantizedMatmulParams& params);
std::int64_t quantized_matmul_workspace_size(std::int64_t num_tokens, const WeightFormat& format, bool has_permutation, DType dtype,
                                             bool batch_invariant);
void scaled_matmul(const ScaledMatmulParams& params);
std::int64_t scaled_matmul_workspace_size(std::int64_t m, std::int64_t n, std::int64_t k, DType dtype, bool has_blocks,
                                          bool batch_invariant);
void column_sums(std::int32_t* sums, const std::int8_t* b, std::int64_t n, std::int64_t k, std::int64_t stride);
}  // namespace cpu

namespace cuda {
// cuda/quantization/quantize*, dequantize.cu
void quantize(const QuantizeParams& params, Stream stream);
void set_default_scales(const QuantizeParams& params, Stream stream);
void dequantize(const QuantizeParams& params, Stream stream);
void quantize_weight(const QuantizeWeightParams& params, Stream stream);
void column_sums(std::int32_t* sums, const std::int8_t* b, std::int64_t n, std::int64_t k, std::int64_t stride, Stream stream);

// cuda/quantization/w4a16*: the layout of packed weights, and their product. The current device is the weight's.
std::int64_t packed_weight_size(const WeightFormat& format);
void pack_weight(void* data, const WeightFormat& format, const WeightSource& source, Stream stream);
void dequantize_weight(void* out, DType dtype, std::int64_t out_stride, const PackedParams& weight, Stream stream);
void quantized_matmul(const QuantizedMatmulParams& params, Stream stream);
std::int64_t quantized_matmul_workspace_size(std::int64_t num_tokens, const WeightFormat& format, bool has_permutation, DType dtype,
                                             bool batch_invariant);

// cuda/quantization/scaled_matmul*
void scaled_matmul(const ScaledMatmulParams& params, Stream stream);
std::int64_t scaled_matmul_workspace_size(std::int64_t m, std::int64_t n, std::int64_t k, DType dtype, bool has_blocks,
                                          bool batch_invariant);
}  // namespace cuda

}  // namespace quire
