// Public entries of quantize and dequantize: validate, then choose the backend.
// SPDX-License-Identifier: Apache-2.0
#include "ops/quantization.h"

#include <algorithm>
#include <string>
#include <utility>

#include "core/check.h"
#include "core/runtime.h"
#include "ops/quantization_checks.h"

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
  if (block_rows < 1 || block_columns < 1) check.fail_value("block", "extents of 1 or more", shape_text({block_rows, block_columns}));
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

}  // namespace quire
