// Public entries of the quantization ops: validate, then choose the backend.
// SPDX-License-Identifier: Apache-2.0
#include "ops/quantization.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <utility>

#include "core/check.h"
#include "core/runtime.h"

namespace quire {

QuantParams check_quantized(const Check& check, const TensorView& out, const TensorView& scales, const TensorView& like,
                            const char* like_arg, ScaleGranularity granularity, std::int64_t group_size) {
  check.dtype(out, "out", {DType::kFloat8E4M3FN, DType::kInt8});
  if (out.ndim != like.ndim || !std::equal(out.shape.begin(), out.shape.begin() + out.ndim, like.shape.begin()))
    check.fail_value("out", std::string("the shape of ") + like_arg + ", " + describe(like), describe(out));
  check.device(out, "out", like.device, like_arg);
  check.inner_contiguous(out, "out");
  check.writable(out, "out");

  QuantParams params;
  params.granularity = granularity;
  params.dtype = out.dtype;
  check.dtype(scales, "scales", {DType::kFloat32});
  check.device(scales, "scales", like.device, like_arg);
  check.disjoint(out, "out", scales, "scales", false);
  const std::int64_t width = like.size(-1);
  if (granularity == ScaleGranularity::kTensor) {
    check.shape(scales, "scales", {1});
    check.accessible(scales, "scales");
    params.group_size = width;
  } else {
    params.group_size = granularity == ScaleGranularity::kToken ? width : group_size;
    if (granularity == ScaleGranularity::kGroup && (group_size < 1 || width % group_size != 0))
      check.fail_value("group_size", "a divisor of the last dimension " + std::to_string(width), std::to_string(group_size));
    TensorView expected = like;
    expected.dtype = DType::kFloat32;
    expected.shape[static_cast<std::size_t>(like.ndim - 1)] = width == 0 ? 0 : width / params.group_size;
    if (granularity == ScaleGranularity::kToken) expected.shape[static_cast<std::size_t>(like.ndim - 1)] = 1;
    if (scales.ndim != like.ndim || !std::equal(scales.shape.begin(), scales.shape.begin() + scales.ndim, expected.shape.begin()))
      check.fail_value("scales", describe(expected), describe(scales));
    check.writable(scales, "scales");
    params.scale_rows = row_layout(scales);
    params.group_stride = scales.stride(-1);
  }
  params.scales = scales.as<float>();
  return params;
}

namespace {

// Extents below this have products of three that fit 64 bits only where one is small; of two, always.
constexpr std::int64_t kMaxExtent = std::numeric_limits<std::int32_t>::max();

std::string list(std::initializer_list<std::int64_t> extents) {
  std::string text = "[";
  for (std::int64_t extent : extents) {
    if (text.size() > 1) text += ", ";
    text += std::to_string(extent);
  }
  return text + "]";
}

// ---- quantize, dequantize ----------------------------------------------------------------------------------------------------------

// As Python has it.
const char* dequantize_name(const TensorView& q) { return q.dtype == DType::kInt8 ? "dequantize_int8" : "dequantize_fp8"; }

// Scales or zero points of a tensor [..., width], checked against the granularity.
void check_scales(const Check& check, const TensorView& t, const char* arg, DType dtype, const TensorView& like, const char* like_arg,
                  ScaleGranularity granularity, std::int64_t group_size, RowLayout& rows, std::int64_t& group_stride) {
  check.dtype(t, arg, {dtype});
  check.device(t, arg, like.device, like_arg);
  if (granularity == ScaleGranularity::kTensor) {
    check.shape(t, arg, {1});
    check.accessible(t, arg);
    rows = RowLayout{};
    group_stride = 0;
    return;
  }
  TensorView expected = like;
  expected.dtype = dtype;
  const std::int64_t width = like.size(-1);
  // A group of more than the row has is the row; the sum in ceil_div must not overflow.
  expected.shape[static_cast<std::size_t>(like.ndim - 1)] =
      granularity == ScaleGranularity::kToken ? 1 : ceil_div(width, std::min(group_size, std::max<std::int64_t>(width, 1)));
  if (t.ndim != like.ndim || !std::equal(t.shape.begin(), t.shape.begin() + t.ndim, expected.shape.begin()))
    check.fail_value(arg, describe(expected), describe(t));
  check.accessible(t, arg);
  rows = row_layout(t);
  group_stride = granularity == ScaleGranularity::kToken ? 0 : t.stride(-1);
}

// What quantize and dequantize share; `wide` is the float side, `narrow` the other.
QuantizeParams check_both_sides(const Check& check, const TensorView& wide, const char* wide_arg, const TensorView& narrow,
                                const char* narrow_arg, const TensorView& scales, const TensorView* zero_points,
                                ScaleGranularity granularity, std::int64_t group_size) {
  check.float_dtype(wide, wide_arg);
  check.dtype(narrow, narrow_arg, {DType::kFloat8E4M3FN, DType::kInt8});
  check.rank(wide, wide_arg, 1, 4);
  check.same_shape(narrow, narrow_arg, wide, wide_arg);
  check.device(narrow, narrow_arg, wide.device, wide_arg);
  for (const auto& [t, arg] : {std::pair{&wide, wide_arg}, std::pair{&narrow, narrow_arg}}) {
    check.inner_contiguous(*t, arg);
    check.accessible(*t, arg);
  }
  if (granularity == ScaleGranularity::kGroup && group_size < 1) check.fail_value("group_size", "1 or more", std::to_string(group_size));

  QuantizeParams params;
  params.dtype = wide.dtype;
  params.width = wide.size(-1);
  params.num_rows = params.width == 0 ? 0 : num_rows(wide);
  params.quant.granularity = granularity;
  params.quant.dtype = narrow.dtype;
  params.quant.group_size =
      granularity == ScaleGranularity::kGroup ? std::min(group_size, std::max<std::int64_t>(params.width, 1)) : params.width;
  check_scales(check, scales, "scales", DType::kFloat32, wide, wide_arg, granularity, group_size, params.quant.scale_rows,
               params.quant.group_stride);
  params.quant.scales = scales.as<float>();
  if (zero_points != nullptr) {
    if (narrow.dtype != DType::kInt8) check.fail_value("zero_points", "none for float8", describe(*zero_points));
    check_scales(check, *zero_points, "zero_points", DType::kInt32, wide, wide_arg, granularity, group_size, params.zero_point_rows,
                 params.zero_point_group_stride);
    params.zero_points = zero_points->as<std::int32_t>();
  }
  return params;
}

}  // namespace

void quantize(const TensorView& out, const TensorView& scales, const TensorView* zero_points, const TensorView& x,
              ScaleGranularity granularity, std::int64_t group_size, bool computes, double scale_bound, Stream stream) {
  const Check check(out.dtype == DType::kInt8 ? "quantize_int8" : "quantize_fp8");
  QuantizeParams params = check_both_sides(check, x, "x", out, "out", scales, zero_points, granularity, group_size);
  check.writable(out, "out");
  check.disjoint(out, "out", x, "x", false);
  check.disjoint(out, "out", scales, "scales", false);
  if (zero_points != nullptr) {
    check.disjoint(out, "out", *zero_points, "zero_points", false);
    check.disjoint(scales, "scales", *zero_points, "zero_points", false);
  }
  if (computes) {
    check.writable(scales, "scales");
    check.disjoint(scales, "scales", x, "x", false);
    if (zero_points != nullptr) {
      check.writable(*zero_points, "zero_points");
      check.disjoint(*zero_points, "zero_points", x, "x", false);
    }
  }
  if (!(static_cast<float>(scale_bound) > 0.0f)) check.fail_value("scale_ub", "more than 0 in float32", std::to_string(scale_bound));
  params.out = out.data;
  params.x = x.data;
  params.out_rows = row_layout(out);
  params.x_rows = row_layout(x);
  params.computes = computes;
  params.scale_bound = static_cast<float>(scale_bound);
  if (params.num_rows == 0) {
    // Computed scales are there, but for groups, where x has no elements: they must not be left as they were.
    params.num_rows = !computes || granularity == ScaleGranularity::kGroup ? 0 : granularity == ScaleGranularity::kTensor ? 1 : num_rows(x);
    if (params.num_rows == 0) return;
    dispatch_device(
        check.op(), x.device, stream, [&] { cpu::set_default_scales(params); }, [&](auto s) { cuda::set_default_scales(params, s); });
    return;
  }
  dispatch_device(
      check.op(), x.device, stream, [&] { cpu::quantize(params); }, [&](auto s) { cuda::quantize(params, s); }, Explains::kCuda);
}

void dequantize(const TensorView& out, const TensorView& q, const TensorView& scales, const TensorView* zero_points,
                ScaleGranularity granularity, std::int64_t group_size, Stream stream) {
  const Check check(dequantize_name(q));
  QuantizeParams params = check_both_sides(check, out, "out", q, "q", scales, zero_points, granularity, group_size);
  check.writable(out, "out");
  check.disjoint(out, "out", q, "q", false);
  check.disjoint(out, "out", scales, "scales", false);
  if (zero_points != nullptr) check.disjoint(out, "out", *zero_points, "zero_points", false);
  params.out = out.data;
  params.x = q.data;
  params.out_rows = row_layout(out);
  params.x_rows = row_layout(q);
  if (params.num_rows == 0) return;
  dispatch_device(
      check.op(), out.device, stream, [&] { cpu::dequantize(params); }, [&](auto s) { cuda::dequantize(params, s); }, Explains::kCuda);
}

void dequantize_blocks(const TensorView& out, const TensorView& w, const TensorView& scales, std::int64_t block_rows,
                       std::int64_t block_columns, Stream stream) {
  const Check check(dequantize_name(w));
  check.float_dtype(out, "out");
  check.dtype(w, "q", {DType::kFloat8E4M3FN, DType::kInt8});
  check.shape(w, "q", {kAny, kAny});
  check.same_shape(out, "out", w, "q");
  check.device(out, "out", w.device, "q");
  check.inner_contiguous(out, "out");
  check.inner_contiguous(w, "q");
  check.accessible(w, "q");
  check.writable(out, "out");
  check.disjoint(out, "out", w, "q", false);
  if (block_rows < 1 || block_columns < 1) check.fail_value("block", "extents of 1 or more", list({block_rows, block_columns}));
  block_rows = std::min(block_rows, std::max<std::int64_t>(w.size(0), 1));
  block_columns = std::min(block_columns, std::max<std::int64_t>(w.size(1), 1));
  check.dtype(scales, "scales", {DType::kFloat32});
  check.shape(scales, "scales", {ceil_div(w.size(0), block_rows), ceil_div(w.size(1), block_columns)});
  check.device(scales, "scales", w.device, "q");
  check.accessible(scales, "scales");
  check.disjoint(out, "out", scales, "scales", false);
  QuantizeParams params;
  params.out = out.data;
  params.x = w.data;
  params.dtype = out.dtype;
  params.num_rows = w.size(0);
  params.width = w.size(1);
  params.out_rows = row_layout(out);
  params.x_rows = row_layout(w);
  params.block_rows = block_rows;
  params.quant.scales = scales.as<float>();
  params.quant.granularity = ScaleGranularity::kGroup;
  params.quant.dtype = w.dtype;
  params.quant.group_size = std::min(block_columns, std::max<std::int64_t>(params.width, 1));
  params.quant.scale_rows = row_layout(scales);
  params.quant.group_stride = scales.stride(1);
  if (params.num_rows == 0 || params.width == 0) return;
  dispatch_device(
      check.op(), w.device, stream, [&] { cpu::dequantize(params); }, [&](auto s) { cuda::dequantize(params, s); }, Explains::kCuda);
}

// ---- Packed weights ------------------------------------------------------------------------------------------------------------------

namespace {

void check_format(const Check& check, const WeightFormat& f) {
  if (f.in_features < 1 || f.in_features > kMaxExtent) check.fail_value("in_features", "1 to 2^31 - 1", std::to_string(f.in_features));
  if (f.out_features < 1 || f.out_features > kMaxExtent) check.fail_value("out_features", "1 to 2^31 - 1", std::to_string(f.out_features));
  if (f.num_rows < 1 || f.num_rows > kMaxExtent) check.fail_value("num_rows", "1 to 2^31 - 1", std::to_string(f.num_rows));
  if (f.bits != 2 && f.bits != 3 && f.bits != 4 && f.bits != 8) check.fail_unsupported("bits", "2, 3, 4 or 8", std::to_string(f.bits));
  if (f.group_size != 0 && f.group_size != 32 && f.group_size != 64 && f.group_size != 128)
    check.fail_unsupported("group_size", "32, 64, 128, or 0 for all rows", std::to_string(f.group_size));
  if (f.scale_dtype != DType::kFloat16 && f.scale_dtype != DType::kBFloat16 && f.scale_dtype != DType::kFloat32)
    check.fail_dtype("scales", "float32, float16 or bfloat16", name(f.scale_dtype));
}

std::int64_t size_on(const Check& check, const WeightFormat& format, Device device) {
  std::int64_t num_bytes = 0;
  on_device(
      check.op(), device, Stream::legacy_default(), [&] { num_bytes = cpu::packed_weight_size(format); },
      [&](auto) { num_bytes = cuda::packed_weight_size(format); });
  return num_bytes;
}

PackedParams check_packed(const Check& check, const PackedWeight& weight) {
  check_format(check, weight.format);
  const WeightFormat& f = weight.format;
  check.dtype(weight.data, "weight", {DType::kUInt8});
  check.rank(weight.data, "weight", 1, 1);
  check.contiguous(weight.data, "weight");
  check.accessible(weight.data, "weight");
  const std::int64_t num_bytes = size_on(check, f, weight.data.device);
  if (weight.data.numel() != num_bytes) check.fail_value("weight", "uint8 [" + std::to_string(num_bytes) + "]", describe(weight.data));
  const auto address = reinterpret_cast<std::uintptr_t>(weight.data.data);
  if (address % 16 != 0) check.fail_value("weight", "a 16-byte aligned address", std::to_string(address));
  PackedParams params;
  params.data = weight.data.data;
  params.format = f;
  if (weight.permutation != nullptr) {
    check.vector(*weight.permutation, "permutation", DType::kInt32, f.num_rows, weight.data.device, "weight");
    params.permutation = weight.permutation->as<const std::int32_t>();
  } else if (f.num_rows != f.in_features) {
    check.fail_value("num_rows", "in_features, " + std::to_string(f.in_features) + ", without a permutation", std::to_string(f.num_rows));
  }
  return params;
}

// A tensor of a checkpoint: dtype, device, shape, and a unit inner stride. Returns the distance of its rows.
std::int64_t check_source(const Check& check, const TensorView& t, const char* arg, DType dtype, std::int64_t rows, std::int64_t columns,
                          Device device) {
  check.dtype(t, arg, {dtype});
  check.device(t, arg, device, "weight");
  check.shape(t, arg, {rows, columns});
  check.inner_contiguous(t, arg);
  check.accessible(t, arg);
  return t.stride(0);
}

}  // namespace

SourceNames source_names(WeightEncoding encoding) {
  switch (encoding) {
    case WeightEncoding::kAwq:
    case WeightEncoding::kGptq:
    case WeightEncoding::kGptqV2: return {"qweight", "scales", "qzeros"};
    case WeightEncoding::kCompressedTensors: return {"weight_packed", "weight_scale", "weight_zero_point"};
    case WeightEncoding::kCodes: break;
  }
  return {"codes", "scales", "zeros"};
}

std::int64_t packed_weight_size(const WeightFormat& format, Device device) {
  const Check check("packed_weight_size");
  check_format(check, format);
  return size_on(check, format, device);
}

void pack_weight(const PackedWeight& weight, const WeightTensors& tensors, Stream stream) {
  const Check check("pack_weight");
  const PackedParams packed = check_packed(check, weight);
  check.writable(weight.data, "weight");
  const WeightFormat& f = weight.format;
  const Device device = weight.data.device;
  const std::int64_t k = f.in_features, n = f.out_features;
  const WeightEncoding encoding = tensors.encoding;
  const SourceNames names = source_names(encoding);
  const bool groups_first = encoding == WeightEncoding::kAwq || encoding == WeightEncoding::kGptq || encoding == WeightEncoding::kGptqV2;

  WeightSource source;
  source.encoding = encoding;
  source.bits = f.bits;
  source.in_features = k;
  source.group_size = f.group_size;
  source.num_rows = f.num_rows;
  source.permutation = packed.permutation;

  // Scales.
  check.rank(tensors.scales, names.scales, 2, 2);
  check.dtype(tensors.scales, names.scales, {f.scale_dtype});
  check.device(tensors.scales, names.scales, device, "weight");
  check.accessible(tensors.scales, names.scales);
  source.num_source_groups = tensors.scales.size(groups_first ? 0 : 1);
  if (tensors.groups == nullptr) source.num_source_groups = f.num_groups();
  const std::int64_t g = source.num_source_groups;
  if (groups_first)
    check.shape(tensors.scales, names.scales, {g, n});
  else
    check.shape(tensors.scales, names.scales, {n, g});
  if (g < 1) check.fail_value(names.scales, "one group or more", describe(tensors.scales));
  source.scales = tensors.scales.data;
  source.scale_group_stride = tensors.scales.stride(groups_first ? 0 : 1);
  source.scale_n_stride = tensors.scales.stride(groups_first ? 1 : 0);
  if (tensors.groups != nullptr) {
    check.vector(*tensors.groups, "groups", DType::kInt32, f.num_groups(), device, "weight");
    source.groups = tensors.groups->as<const std::int32_t>();
  }

  // Codes and zeros.
  if ((tensors.zeros != nullptr) != f.has_zeros)
    check.fail_value(names.zeros, f.has_zeros ? "a tensor" : "none", tensors.zeros == nullptr ? "none" : describe(*tensors.zeros));
  const auto unsupported_bits = [&](const char* supported) { check.fail_unsupported("bits", supported, std::to_string(f.bits)); };
  const auto words = [&](std::int64_t count) { return ceil_div(count * f.bits, 32); };
  std::int64_t code_rows = 0, code_columns = 0, zero_rows = 0, zero_columns = 0;
  DType dtype = DType::kInt32;
  switch (encoding) {
    case WeightEncoding::kAwq:
      if (f.bits != 4) unsupported_bits("4 for AWQ");
      if (n % 8 != 0) check.fail_value("out_features", "a multiple of 8 for AWQ", std::to_string(n));
      code_rows = k, code_columns = n / 8, zero_rows = g, zero_columns = n / 8;
      break;
    case WeightEncoding::kGptq:
    case WeightEncoding::kGptqV2: code_rows = words(k), code_columns = n, zero_rows = g, zero_columns = words(n); break;
    case WeightEncoding::kCompressedTensors:
      if (f.bits != 4 && f.bits != 8) unsupported_bits("4 or 8 for compressed-tensors");
      code_rows = n, code_columns = words(k), zero_rows = words(n), zero_columns = g;
      break;
    case WeightEncoding::kCodes: code_rows = n, code_columns = k, zero_rows = n, zero_columns = g, dtype = DType::kUInt8; break;
  }
  source.code_stride = check_source(check, tensors.codes, names.codes, dtype, code_rows, code_columns, device);
  source.codes = tensors.codes.data;
  if (tensors.zeros != nullptr) {
    source.zero_stride = check_source(check, *tensors.zeros, names.zeros, dtype, zero_rows, zero_columns, device);
    source.zeros = tensors.zeros->data;
  }
  check.disjoint(weight.data, "weight", tensors.codes, names.codes, false);
  check.disjoint(weight.data, "weight", tensors.scales, names.scales, false);
  if (tensors.zeros != nullptr) check.disjoint(weight.data, "weight", *tensors.zeros, names.zeros, false);
  if (tensors.groups != nullptr) check.disjoint(weight.data, "weight", *tensors.groups, "groups", false);
  if (weight.permutation != nullptr) check.disjoint(weight.data, "weight", *weight.permutation, "permutation", false);

  dispatch_device(
      check.op(), device, stream, [&] { cpu::pack_weight(weight.data.data, f, source); },
      [&](auto s) { cuda::pack_weight(weight.data.data, f, source, s); });
}

void dequantize_weight(const TensorView& out, const PackedWeight& weight, Stream stream) {
  const Check check("dequantize_weight");
  const PackedParams params = check_packed(check, weight);
  check.float_dtype(out, "out");
  check.shape(out, "out", {weight.format.out_features, weight.format.in_features});
  check.device(out, "out", weight.data.device, "weight");
  check.inner_contiguous(out, "out");
  check.writable(out, "out");
  check.disjoint(out, "out", weight.data, "weight", false);
  if (weight.permutation != nullptr) check.disjoint(out, "out", *weight.permutation, "permutation", false);
  dispatch_device(
      check.op(), out.device, stream, [&] { cpu::dequantize_weight(out.data, out.dtype, out.stride(0), params); },
      [&](auto s) { cuda::dequantize_weight(out.data, out.dtype, out.stride(0), params, s); });
}

void quantize_weight(const TensorView& codes, const TensorView& scales, const TensorView* zeros, const TensorView& w, int bits,
                     std::int64_t group_size, Stream stream) {
  const Check check("quantize_weight");
  check.float_dtype(w, "w");
  check.shape(w, "w", {kAny, kAny});
  check.inner_contiguous(w, "w");
  check.accessible(w, "w");
  const std::int64_t n = w.size(0), k = w.size(1);
  if (bits != 2 && bits != 3 && bits != 4 && bits != 8) check.fail_unsupported("bits", "2, 3, 4 or 8", std::to_string(bits));
  if (group_size < 0) check.fail_value("group_size", "0 or more", std::to_string(group_size));
  QuantizeWeightParams params;
  params.group_size = std::max<std::int64_t>(1, group_size == 0 ? k : std::min(group_size, k));
  const std::int64_t groups = ceil_div(k, params.group_size);
  check.dtype(codes, "codes", {DType::kUInt8});
  check.shape(codes, "codes", {n, k});
  check.device(codes, "codes", w.device, "w");
  check.inner_contiguous(codes, "codes");
  check.writable(codes, "codes");
  check.disjoint(codes, "codes", w, "w", false);
  check.float_dtype(scales, "scales");
  const auto check_groups = [&](const TensorView& t, const char* arg) {
    check.shape(t, arg, {n, groups});
    check.device(t, arg, w.device, "w");
    check.contiguous(t, arg);
    check.writable(t, arg);
    check.disjoint(t, arg, w, "w", false);
    check.disjoint(t, arg, codes, "codes", false);
  };
  check_groups(scales, "scales");
  if (zeros != nullptr) {
    check.dtype(*zeros, "zeros", {DType::kUInt8});
    check_groups(*zeros, "zeros");
    check.disjoint(*zeros, "zeros", scales, "scales", false);
    params.zeros = zeros->as<std::uint8_t>();
  }
  if (n == 0 || k == 0) return;
  params.codes = codes.as<std::uint8_t>();
  params.scales = scales.data;
  params.w = w.data;
  params.dtype = w.dtype;
  params.scale_dtype = scales.dtype;
  params.n = n;
  params.k = k;
  params.w_stride = w.stride(0);
  params.codes_stride = codes.stride(0);
  params.bits = bits;
  dispatch_device(check.op(), w.device, stream, [&] { cpu::quantize_weight(params); }, [&](auto s) { cuda::quantize_weight(params, s); });
}

// ---- Matrix products -------------------------------------------------------------------------------------------------------------------

namespace {

// The rows of a [..., width] tensor that lie at one distance, which is returned.
std::int64_t check_rows(const Check& check, const TensorView& t, const char* arg, std::int64_t& num_rows) {
  num_rows = 1;
  std::int64_t stride = 0, span = 0;  // of the rows seen so far: their distance, and how far the next dimension must step
  for (int i = t.ndim - 2; i >= 0; --i) {
    const std::int64_t extent = t.size(i);
    if (extent != 1 && num_rows > 1 && extent > 0 && t.stride(i) != span)
      check.fail_value(arg, "leading dimensions that fold into one", describe_strides(t));
    if (extent != 1) {
      if (num_rows == 1) stride = t.stride(i);
      span = t.stride(i) * extent;
    }
    num_rows *= extent;
  }
  return stride;
}

void check_bias(const Check& check, const TensorView* bias, std::int64_t n, const TensorView& like, const char* like_arg, const void*& data,
                DType& dtype) {
  if (bias == nullptr) return;
  check.float_dtype(*bias, "bias");
  check.vector(*bias, "bias", bias->dtype, n, like.device, like_arg);
  data = bias->data;
  dtype = bias->dtype;
}

void check_product(const Check& check, const TensorView& out, const TensorView& x, const char* x_arg, std::int64_t n) {
  check.rank(out, "out", x.ndim, x.ndim);
  TensorView expected = x;
  expected.dtype = out.dtype;
  expected.shape[static_cast<std::size_t>(x.ndim - 1)] = n;
  if (!std::equal(out.shape.begin(), out.shape.begin() + out.ndim, expected.shape.begin()))
    check.fail_value("out", describe(expected), describe(out));
  check.device(out, "out", x.device, x_arg);
  check.inner_contiguous(out, "out");
  check.writable(out, "out");
}

std::int64_t matmul_workspace_size(const Check& check, std::int64_t num_tokens, const WeightFormat& format, bool has_permutation,
                                   DType dtype, const MatmulOptions& options, Device device) {
  std::int64_t num_bytes = 0;
  on_device(
      check.op(), device, Stream::legacy_default(),
      [&] { num_bytes = cpu::quantized_matmul_workspace_size(num_tokens, format, has_permutation, dtype, options.batch_invariant); },
      [&](auto) {
        num_bytes = cuda::quantized_matmul_workspace_size(num_tokens, format, has_permutation, dtype, options.batch_invariant);
      });
  return num_bytes;
}

void check_activation_dtype(const Check& check, const char* arg, DType dtype, Device device) {
  const bool is_cpu = device.type == DeviceType::kCPU;
  if (dtype != DType::kFloat16 && dtype != DType::kBFloat16 && !(is_cpu && dtype == DType::kFloat32))
    check.fail_dtype(arg, is_cpu ? "float32, float16 or bfloat16" : "float16 or bfloat16", name(dtype));
}

void check_count(const Check& check, const char* arg, std::int64_t value, std::int64_t low) {
  if (value < low || value > kMaxExtent) check.fail_value(arg, std::to_string(low) + " to 2^31 - 1", std::to_string(value));
}

}  // namespace

std::int64_t quantized_matmul_workspace_size(std::int64_t num_tokens, const WeightFormat& format, bool has_permutation, DType dtype,
                                             const MatmulOptions& options, Device device) {
  const Check check("quantized_matmul_workspace_size");
  check_format(check, format);
  check_activation_dtype(check, "dtype", dtype, device);
  check_count(check, "num_tokens", num_tokens, 0);
  return num_tokens == 0 ? 0 : matmul_workspace_size(check, num_tokens, format, has_permutation, dtype, options, device);
}

void quantized_matmul(const TensorView& out, const TensorView& x, const PackedWeight& weight, const TensorView* bias,
                      const TensorView* workspace, const MatmulOptions& options, Stream stream) {
  const Check check("quantized_matmul");
  QuantizedMatmulParams params;
  params.weight = check_packed(check, weight);
  const WeightFormat& f = weight.format;
  check_activation_dtype(check, "x", x.dtype, x.device);
  check.rank(x, "x", 1, kMaxRank);
  check.device(x, "x", weight.data.device, "weight");
  if (x.size(-1) != f.in_features) check.fail_value("x", "a last dimension of " + std::to_string(f.in_features), describe(x));
  check.inner_contiguous(x, "x");
  check.accessible(x, "x");
  check_product(check, out, x, "x", f.out_features);
  check.same_dtype(out, "out", x, "x");
  for (const auto& [t, arg] : {std::pair{&x, "x"}, std::pair{&weight.data, "weight"}}) check.disjoint(out, "out", *t, arg, false);
  if (weight.permutation != nullptr) check.disjoint(out, "out", *weight.permutation, "permutation", false);
  if (bias != nullptr) check.disjoint(out, "out", *bias, "bias", false);
  check_bias(check, bias, f.out_features, x, "x", params.bias, params.bias_dtype);
  std::int64_t out_rows = 0;
  params.x_stride = check_rows(check, x, "x", params.num_tokens);
  params.out_stride = check_rows(check, out, "out", out_rows);
  params.out = out.data;
  params.x = x.data;
  params.dtype = x.dtype;
  params.batch_invariant = options.batch_invariant;
  if (params.num_tokens == 0) return;
  check_count(check, "x", params.num_tokens, 0);
  const std::int64_t num_bytes =
      matmul_workspace_size(check, params.num_tokens, f, weight.permutation != nullptr, x.dtype, options, x.device);
  params.workspace =
      check.workspace(workspace, num_bytes, x.device, "x",
                      {{&x, "x"}, {&out, "out"}, {&weight.data, "weight"}, {weight.permutation, "permutation"}, {bias, "bias"}});
  dispatch_device(
      check.op(), x.device, stream, [&] { cpu::quantized_matmul(params); }, [&](auto s) { cuda::quantized_matmul(params, s); },
      Explains::kBoth);
}

namespace {

// Where the sums of b's rows lie in the workspace, if they are computed: at its end.
constexpr std::int64_t kSumAlignment = 256;
std::int64_t scaled_workspace_size(const Check& check, std::int64_t m, std::int64_t n, std::int64_t k, DType dtype, bool has_blocks,
                                   const MatmulOptions& options, Device device) {
  std::int64_t num_bytes = 0;
  on_device(
      check.op(), device, Stream::legacy_default(),
      [&] { num_bytes = cpu::scaled_matmul_workspace_size(m, n, k, dtype, has_blocks, options.batch_invariant); },
      [&](auto) { num_bytes = cuda::scaled_matmul_workspace_size(m, n, k, dtype, has_blocks, options.batch_invariant); });
  return ceil_div(num_bytes, kSumAlignment) * kSumAlignment;
}

// [1]: one; otherwise [rows] or [rows, 1].
bool is_per_row(const TensorView& t, std::int64_t rows) {
  return (t.ndim == 1 && t.size(0) == rows) || (t.ndim == 2 && t.size(0) == rows && t.size(1) == 1);
}
bool is_single(const TensorView& t) { return t.ndim >= 1 && t.ndim <= 2 && t.numel() == 1; }

void check_scale_b(const Check& check, const TensorView& t, ScaledMatmulParams& p) {
  check.dtype(t, "scale_b", {DType::kFloat32});
  check.accessible(t, "scale_b");
  p.scale_b = t.as<const float>();
  if (is_single(t)) return;
  if (is_per_row(t, p.n)) {
    p.granularity_b = ScaleGranularity::kToken;
    p.scale_b_row_stride = t.stride(0);
    return;
  }
  const std::int64_t row_blocks = ceil_div(p.n, kScaleBlock), k_blocks = ceil_div(p.k, kScaleBlock);
  if (t.ndim != 2 || t.size(0) != row_blocks || t.size(1) != k_blocks)
    check.fail_value("scale_b", "float32 [1], " + list({p.n, 1}) + " or " + list({row_blocks, k_blocks}), describe(t));
  p.granularity_b = ScaleGranularity::kGroup;
  p.scale_b_row_stride = t.stride(0);
  p.scale_b_group_stride = t.stride(1);
}

void check_scale_a(const Check& check, const TensorView& t, const TensorView& a, ScaledMatmulParams& p) {
  check.dtype(t, "scale_a", {DType::kFloat32});
  check.accessible(t, "scale_a");
  p.scale_a = t.as<const float>();
  const bool by_group = p.granularity_b == ScaleGranularity::kGroup;
  if (!by_group && is_single(t)) return;
  TensorView expected = a;
  expected.dtype = DType::kFloat32;
  expected.shape[static_cast<std::size_t>(a.ndim - 1)] = by_group ? ceil_div(p.k, kScaleBlock) : 1;
  if (t.ndim != a.ndim || !std::equal(t.shape.begin(), t.shape.begin() + t.ndim, expected.shape.begin()))
    check.fail_value("scale_a", (by_group ? "" : "float32 [1] or ") + describe(expected), describe(t));
  std::int64_t rows = 0;
  p.scale_a_row_stride = check_rows(check, t, "scale_a", rows);
  p.scale_a_group_stride = by_group ? t.stride(-1) : 0;
  p.granularity_a = by_group ? ScaleGranularity::kGroup : ScaleGranularity::kToken;
}

void check_zero_point(const Check& check, const TensorView* t, const TensorView& a, ScaledMatmulParams& p) {
  if (t == nullptr) return;
  if (p.dtype != DType::kInt8) check.fail_value("zero_point", "none for float8", describe(*t));
  if (p.granularity_b == ScaleGranularity::kGroup) check.fail_unsupported("zero_point", "none with scales of blocks", describe(*t));
  check.dtype(*t, "zero_point", {DType::kInt32});
  check.device(*t, "zero_point", a.device, "a");
  check.accessible(*t, "zero_point");
  p.zero_point = t->as<const std::int32_t>();
  if (is_single(*t)) return;
  TensorView expected = a;
  expected.dtype = DType::kInt32;
  expected.shape[static_cast<std::size_t>(a.ndim - 1)] = 1;
  if (t->ndim != a.ndim || !std::equal(t->shape.begin(), t->shape.begin() + t->ndim, expected.shape.begin()))
    check.fail_value("zero_point", "int32 [1] or " + describe(expected), describe(*t));
  std::int64_t rows = 0;
  p.zero_point_stride = check_rows(check, *t, "zero_point", rows);
}

void run_column_sums(const Check& check, std::int32_t* sums, const std::int8_t* b, std::int64_t n, std::int64_t k, std::int64_t stride,
                     Device device, Stream stream) {
  on_device(
      check.op(), device, stream, [&] { cpu::column_sums(sums, b, n, k, stride); },
      [&](auto s) { cuda::column_sums(sums, b, n, k, stride, s); });
}

}  // namespace

std::int64_t scaled_matmul_workspace_size(std::int64_t m, std::int64_t n, std::int64_t k, DType dtype, bool has_blocks, bool computes_sums,
                                          const MatmulOptions& options, Device device) {
  const Check check("scaled_matmul_workspace_size");
  if (dtype != DType::kFloat8E4M3FN && dtype != DType::kInt8) check.fail_dtype("dtype", "float8_e4m3fn or int8", name(dtype));
  check_count(check, "m", m, 0);
  check_count(check, "n", n, 0);
  check_count(check, "k", k, 1);
  if (m == 0 || n == 0) return 0;
  return scaled_workspace_size(check, m, n, k, dtype, has_blocks, options, device) +
         (computes_sums ? n * std::int64_t{sizeof(std::int32_t)} : 0);
}

namespace {

struct ScaledMatmulCall {
  ScaledMatmulParams params;
  std::int32_t* sums_to_compute = nullptr;  // of b's rows, in the workspace
};

// All that may be refused, before anything is launched.
ScaledMatmulCall check_scaled_matmul(const Check& check, const TensorView& out, const TensorView& a, const TensorView& b,
                                     const MatmulScales& scales, const TensorView* bias, const TensorView* workspace,
                                     const MatmulOptions& options) {
  check.dtype(a, "a", {DType::kFloat8E4M3FN, DType::kInt8});
  check.same_dtype(b, "b", a, "a");
  check.rank(a, "a", 1, kMaxRank);
  check.shape(b, "b", {kAny, a.size(-1)});
  check.device(b, "b", a.device, "a");
  for (const auto& [t, arg] : {std::pair{&a, "a"}, std::pair{&b, "b"}}) {
    check.inner_contiguous(*t, arg);
    check.accessible(*t, arg);
  }
  ScaledMatmulCall call;
  ScaledMatmulParams& p = call.params;
  p.dtype = a.dtype;
  p.n = b.size(0);
  p.k = a.size(-1);
  check_count(check, "b", p.n, 0);
  check_count(check, "a", p.k, 1);
  if (p.dtype == DType::kInt8 && p.k > 65536) check.fail_unsupported("a", "up to 65536 columns of int8", describe(a));
  check_product(check, out, a, "a", p.n);
  check.float_dtype(out, "out");
  p.out_dtype = out.dtype;
  p.a_stride = check_rows(check, a, "a", p.m);
  // One row's stride is never stepped along, but it has a part in which kernel runs, and so in the bits of a batch-invariant result.
  if (p.m == 1) p.a_stride = a.ndim >= 2 ? a.stride(-2) : p.k;
  std::int64_t out_rows = 0;
  p.out_stride = check_rows(check, out, "out", out_rows);
  check_count(check, "a", p.m, 0);
  p.b_stride = b.stride(0);
  check.device(scales.scale_a, "scale_a", a.device, "a");
  check.device(scales.scale_b, "scale_b", a.device, "a");
  check_scale_b(check, scales.scale_b, p);
  check_scale_a(check, scales.scale_a, a, p);
  check_zero_point(check, scales.zero_point, a, p);
  if (scales.column_sums != nullptr) {
    check.vector(*scales.column_sums, "column_sums", DType::kInt32, p.n, a.device, "a");
    if (p.zero_point != nullptr) p.column_sums = scales.column_sums->as<const std::int32_t>();
  }
  check_bias(check, bias, p.n, a, "a", p.bias, p.bias_dtype);
  const std::initializer_list<std::pair<const TensorView*, const char*>> inputs = {{&a, "a"},
                                                                                   {&b, "b"},
                                                                                   {&scales.scale_a, "scale_a"},
                                                                                   {&scales.scale_b, "scale_b"},
                                                                                   {scales.zero_point, "zero_point"},
                                                                                   {scales.column_sums, "column_sums"},
                                                                                   {bias, "bias"}};
  for (const auto& [t, arg] : inputs)
    if (t != nullptr) check.disjoint(out, "out", *t, arg, false);
  p.out = out.data;
  p.a = a.data;
  p.b = b.data;
  p.batch_invariant = options.batch_invariant;
  if (p.m == 0 || p.n == 0) return call;
  const bool computes_sums = p.zero_point != nullptr && p.column_sums == nullptr;
  const std::int64_t own_bytes =
      scaled_workspace_size(check, p.m, p.n, p.k, p.dtype, p.granularity_b == ScaleGranularity::kGroup, options, a.device);
  const std::int64_t num_bytes = own_bytes + (computes_sums ? p.n * std::int64_t{sizeof(std::int32_t)} : 0);
  p.workspace = check.workspace(workspace, num_bytes, a.device, "a", inputs);
  if (num_bytes > 0) check.disjoint(*workspace, "workspace", out, "out", false);
  if (computes_sums) {
    call.sums_to_compute = reinterpret_cast<std::int32_t*>(static_cast<char*>(p.workspace) + own_bytes);
    p.column_sums = call.sums_to_compute;
  }
  return call;
}

void run_scaled_matmul(const Check& check, const ScaledMatmulCall& call, Device device, Stream stream) {
  const ScaledMatmulParams& p = call.params;
  if (p.m == 0 || p.n == 0) return;
  if (call.sums_to_compute != nullptr && explaining() == nullptr)
    run_column_sums(check, call.sums_to_compute, static_cast<const std::int8_t*>(p.b), p.n, p.k, p.b_stride, device, stream);
  dispatch_device(check.op(), device, stream, [&] { cpu::scaled_matmul(p); }, [&](auto s) { cuda::scaled_matmul(p, s); }, Explains::kBoth);
}

}  // namespace

void scaled_matmul(const TensorView& out, const TensorView& a, const TensorView& b, const MatmulScales& scales, const TensorView* bias,
                   const TensorView* workspace, const MatmulOptions& options, Stream stream) {
  const Check check("scaled_matmul");
  run_scaled_matmul(check, check_scaled_matmul(check, out, a, b, scales, bias, workspace, options), a.device, stream);
}

namespace {

// How quantize_and_multiply divides its workspace: what scaled_matmul needs, the activations, their scales.
struct QuantizedActivations {
  std::int64_t product_bytes = 0, x_bytes = 0, scale_bytes = 0;
  std::int64_t num_bytes() const { return product_bytes + x_bytes + scale_bytes; }
};

QuantizedActivations divide_workspace(std::int64_t m, std::int64_t n, std::int64_t k, DType dtype, ScaleGranularity granularity,
                                      bool computes_sums, const MatmulOptions& options, Device device) {
  const auto aligned = [](std::int64_t num_bytes) { return ceil_div(num_bytes, kSumAlignment) * kSumAlignment; };
  const std::int64_t groups = granularity == ScaleGranularity::kTensor  ? 0
                              : granularity == ScaleGranularity::kToken ? 1
                                                                        : ceil_div(k, kScaleBlock);
  const bool has_blocks = granularity == ScaleGranularity::kGroup;
  return {aligned(scaled_matmul_workspace_size(m, n, k, dtype, has_blocks, computes_sums, options, device)), aligned(m * k),
          aligned(m * groups * std::int64_t{sizeof(float)})};
}

// Row-major, of the rows of x and so many columns.
TensorView rows_like(const TensorView& x, void* data, DType dtype, std::int64_t columns) {
  TensorView t = x;
  t.data = data;
  t.dtype = dtype;
  t.read_only = false;
  std::int64_t stride = 1;
  for (int i = x.ndim - 1; i >= 0; --i) {
    const auto at = static_cast<std::size_t>(i);
    if (i == x.ndim - 1) t.shape[at] = columns;
    t.strides[at] = stride;
    stride *= t.shape[at];
  }
  return t;
}

}  // namespace

std::int64_t quantize_and_multiply_workspace_size(std::int64_t num_tokens, std::int64_t n, std::int64_t k, DType dtype,
                                                  ScaleGranularity granularity, bool computes_sums, const MatmulOptions& options,
                                                  Device device) {
  check_count(Check("quantized_matmul_workspace_size"), "num_tokens", num_tokens, 0);
  return divide_workspace(num_tokens, n, k, dtype, granularity, computes_sums, options, device).num_bytes();
}

void quantize_and_multiply(const TensorView& out, const TensorView& x, const TensorView& w, const QuantizedProduct& product,
                           const TensorView* bias, const TensorView* workspace, const MatmulOptions& options, Stream stream) {
  const Check check("quantized_matmul");
  check.rank(x, "x", 1, 4);
  check.float_dtype(x, "x");
  check.shape(w, "weight", {kAny, kAny});
  check.device(x, "x", w.device, "weight");
  if (x.size(-1) != w.size(1)) check.fail_value("x", "a last dimension of " + std::to_string(w.size(1)), describe(x));
  check.inner_contiguous(x, "x");
  check.accessible(x, "x");
  std::int64_t num_tokens = 0;
  check_rows(check, x, "x", num_tokens);
  check_count(check, "x", num_tokens, 0);
  check_product(check, out, x, "x", w.size(0));
  const bool computes_sums = product.zero_point != nullptr && product.column_sums == nullptr;
  const QuantizedActivations parts =
      divide_workspace(num_tokens, w.size(0), w.size(1), w.dtype, product.granularity, computes_sums, options, x.device);
  void* const memory = check.workspace(workspace, parts.num_bytes(), x.device, "x",
                                       {{&x, "x"},
                                        {&out, "out"},
                                        {&w, "weight"},
                                        {&product.w_scale, "scale"},
                                        {product.x_scale, "input_scale"},
                                        {product.zero_point, "input_zero_point"},
                                        {product.column_sums, "column_sums"},
                                        {bias, "bias"}});
  auto* const bytes = static_cast<std::byte*>(memory);
  const bool computes = product.granularity != ScaleGranularity::kTensor;
  const std::int64_t groups = product.granularity == ScaleGranularity::kGroup ? ceil_div(w.size(1), kScaleBlock) : 1;
  const auto at = [&](std::int64_t offset) { return bytes == nullptr ? nullptr : bytes + offset; };
  const TensorView a = rows_like(x, at(parts.product_bytes), w.dtype, w.size(1));
  TensorView scale = rows_like(x, at(parts.product_bytes + parts.x_bytes), DType::kFloat32, groups);
  if (!computes) {
    if (product.x_scale == nullptr) check.fail_value("input_scale", "one", "none");
    scale = *product.x_scale;
  }
  const TensorView space(memory, DType::kUInt8, {parts.product_bytes}, x.device);
  const ScaledMatmulCall call =
      check_scaled_matmul(check, out, a, w, {scale, product.w_scale, product.zero_point, product.column_sums}, bias, &space, options);
  quantize(a, scale, product.zero_point, x, product.granularity, kScaleBlock, computes, std::numeric_limits<double>::infinity(), stream);
  run_scaled_matmul(Check("scaled_matmul"), call, x.device, stream);  // what is explained
}

void column_sums(const TensorView& sums, const TensorView& b, Stream stream) {
  const Check check("column_sums");
  check.dtype(b, "b", {DType::kInt8});
  check.shape(b, "b", {kAny, kAny});
  check.inner_contiguous(b, "b");
  check.accessible(b, "b");
  check.vector(sums, "sums", DType::kInt32, b.size(0), b.device, "b");
  check.writable(sums, "sums");
  check.disjoint(sums, "sums", b, "b", false);
  if (b.size(1) > 65536) check.fail_unsupported("b", "up to 65536 columns", describe(b));
  if (b.size(0) == 0) return;
  run_column_sums(check, sums.as<std::int32_t>(), b.as<const std::int8_t>(), b.size(0), b.size(1), b.stride(0), b.device, stream);
}

}  // namespace quire
