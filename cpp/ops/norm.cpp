// Public entries of the norm ops: validate, then choose the backend.
// SPDX-License-Identifier: Apache-2.0
#include "quire/norm.h"

#include "core/check.h"
#include "core/runtime.h"
#include "ops/norm.h"

namespace quire {
namespace {

// What the three ops share: x, weight and eps.
NormParams check_input(const Check& check, const TensorView& x, const TensorView& weight, double eps, double weight_offset) {
  check.float_dtype(x, "x");
  check.rank(x, "x", 1, 4);
  check.inner_contiguous(x, "x");
  check.accessible(x, "x");
  const std::int64_t hidden = x.size(-1);
  if (hidden == 0) check.fail_value("x", "a last dimension of 1 or more", describe(x));
  check.float_dtype(weight, "weight");
  check.vector(weight, "weight", weight.dtype, hidden, x.device, "x");
  check.finite(eps, "eps");
  if (eps < 0.0) check.fail_value("eps", "0 or more", std::to_string(eps));
  check.finite(weight_offset, "weight_offset");

  NormParams params;
  params.x = params.out = x.data;
  params.weight = weight.data;
  params.dtype = x.dtype;
  params.weight_dtype = weight.dtype;
  params.num_rows = num_rows(x);
  params.hidden = hidden;
  params.x_rows = params.out_rows = row_layout(x);
  params.eps = static_cast<float>(eps);
  params.weight_offset = static_cast<float>(weight_offset);
  return params;
}

void check_output(const Check& check, const TensorView& out, const TensorView& x, const TensorView& weight, NormParams& params) {
  check.same_dtype(out, "out", x, "x");
  check.same_shape(out, "out", x, "x");
  check.device(out, "out", x.device, "x");
  check.inner_contiguous(out, "out");
  check.writable(out, "out");
  check.disjoint(out, "out", x, "x", true);
  check.disjoint(out, "out", weight, "weight", false);
  params.out = out.data;
  params.out_rows = row_layout(out);
}

void check_quantized_output(const Check& check, const TensorView& out, const TensorView& scales, const TensorView& x,
                            const TensorView& weight, ScaleGranularity granularity, std::int64_t group_size, NormParams& params) {
  params.quant = check_quantized(check, out, scales, x, "x", granularity, group_size);
  for (const TensorView* written : {&out, &scales}) {
    check.disjoint(*written, written == &out ? "out" : "scales", x, "x", false);
    check.disjoint(*written, written == &out ? "out" : "scales", weight, "weight", false);
  }
  params.out = out.data;
  params.out_rows = row_layout(out);
}

void check_residual(const Check& check, const TensorView& residual, const TensorView& x, const TensorView& weight, NormParams& params) {
  check.same_dtype(residual, "residual", x, "x");
  check.same_shape(residual, "residual", x, "x");
  check.device(residual, "residual", x.device, "x");
  check.inner_contiguous(residual, "residual");
  check.writable(residual, "residual");
  check.disjoint(residual, "residual", x, "x", false);
  check.disjoint(residual, "residual", weight, "weight", false);
  params.residual = residual.data;
  params.residual_rows = row_layout(residual);
}

void check_bias(const Check& check, const TensorView* bias, const TensorView& x, NormParams& params) {
  if (bias == nullptr) return;
  check.float_dtype(*bias, "bias");
  check.vector(*bias, "bias", bias->dtype, params.hidden, x.device, "x");
  params.bias = bias->data;
  params.bias_dtype = bias->dtype;
}

void run_rms_norm(const Check& check, const NormParams& params, Device device, Stream stream) {
  if (params.num_rows == 0) return;
  dispatch_device(check.op(), device, stream, [&] { cpu::rms_norm(params); }, [&](auto s) { cuda::rms_norm(params, s); }, Explains::kCuda);
}

void run_fused_add_rms_norm(const Check& check, const NormParams& params, Device device, Stream stream) {
  if (params.num_rows == 0) return;
  dispatch_device(
      check.op(), device, stream, [&] { cpu::fused_add_rms_norm(params); }, [&](auto s) { cuda::fused_add_rms_norm(params, s); },
      Explains::kCuda);
}

void run_layer_norm(const Check& check, const NormParams& params, Device device, Stream stream) {
  if (params.num_rows == 0) return;
  dispatch_device(
      check.op(), device, stream, [&] { cpu::layer_norm(params); }, [&](auto s) { cuda::layer_norm(params, s); }, Explains::kCuda);
}

}  // namespace

void rms_norm(const TensorView& out, const TensorView& x, const TensorView& weight, double eps, double weight_offset, Stream stream) {
  const Check check("rms_norm");
  NormParams params = check_input(check, x, weight, eps, weight_offset);
  check_output(check, out, x, weight, params);
  run_rms_norm(check, params, x.device, stream);
}

void rms_norm_quantized(const TensorView& out, const TensorView& scales, const TensorView& x, const TensorView& weight, double eps,
                        double weight_offset, ScaleGranularity granularity, std::int64_t group_size, Stream stream) {
  const Check check("rms_norm");
  NormParams params = check_input(check, x, weight, eps, weight_offset);
  check_quantized_output(check, out, scales, x, weight, granularity, group_size, params);
  run_rms_norm(check, params, x.device, stream);
}

void fused_add_rms_norm(const TensorView& x, const TensorView& residual, const TensorView& weight, double eps, double weight_offset,
                        Stream stream) {
  const Check check("fused_add_rms_norm");
  NormParams params = check_input(check, x, weight, eps, weight_offset);
  check.writable(x, "x");
  check_residual(check, residual, x, weight, params);
  check.disjoint(x, "x", weight, "weight", false);
  run_fused_add_rms_norm(check, params, x.device, stream);
}

void fused_add_rms_norm_quantized(const TensorView& out, const TensorView& scales, const TensorView& residual, const TensorView& x,
                                  const TensorView& weight, double eps, double weight_offset, ScaleGranularity granularity,
                                  std::int64_t group_size, Stream stream) {
  const Check check("fused_add_rms_norm");
  NormParams params = check_input(check, x, weight, eps, weight_offset);
  check_residual(check, residual, x, weight, params);
  check_quantized_output(check, out, scales, x, weight, granularity, group_size, params);
  check.disjoint(out, "out", residual, "residual", false);
  check.disjoint(residual, "residual", scales, "scales", false);
  run_fused_add_rms_norm(check, params, x.device, stream);
}

void layer_norm(const TensorView& out, const TensorView& x, const TensorView& weight, const TensorView* bias, double eps, Stream stream) {
  const Check check("layer_norm");
  NormParams params = check_input(check, x, weight, eps, 0.0);
  check_output(check, out, x, weight, params);
  check_bias(check, bias, x, params);
  if (bias != nullptr) check.disjoint(out, "out", *bias, "bias", false);
  run_layer_norm(check, params, x.device, stream);
}

void layer_norm_quantized(const TensorView& out, const TensorView& scales, const TensorView& x, const TensorView& weight,
                          const TensorView* bias, double eps, ScaleGranularity granularity, std::int64_t group_size, Stream stream) {
  const Check check("layer_norm");
  NormParams params = check_input(check, x, weight, eps, 0.0);
  check_quantized_output(check, out, scales, x, weight, granularity, group_size, params);
  check_bias(check, bias, x, params);
  if (bias != nullptr) {
    check.disjoint(out, "out", *bias, "bias", false);
    check.disjoint(scales, "scales", *bias, "bias", false);
  }
  run_layer_norm(check, params, x.device, stream);
}

}  // namespace quire
