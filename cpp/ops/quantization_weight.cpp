// Public entries of packed weights, and of their product: validate, then choose the backend.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <string>
#include <utility>

#include "core/check.h"
#include "core/runtime.h"
#include "ops/quantization.h"
#include "ops/quantization_checks.h"

namespace quire {

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

}  // namespace quire
