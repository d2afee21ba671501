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

}  // namespace

void rms_norm(const TensorView& out, const TensorView& x, const TensorView& weight, double eps, double weight_offset, Stream stream) {
  const Check check("rms_norm");
  NormParams params = check_input(check, x, weight, eps, weight_offset);
  check_output(check, out, x, weight, params);
  if (params.num_rows == 0) return;
  dispatch_device("rms_norm", x.device, stream, [&] { cpu::rms_norm(params); }, [&](auto s) { cuda::rms_norm(params, s); });
}

void fused_add_rms_norm(const TensorView& x, const TensorView& residual, const TensorView& weight, double eps, double weight_offset,
                        Stream stream) {
  const Check check("fused_add_rms_norm");
  NormParams params = check_input(check, x, weight, eps, weight_offset);
  check.writable(x, "x");
  check.same_dtype(residual, "residual", x, "x");
  check.same_shape(residual, "residual", x, "x");
  check.device(residual, "residual", x.device, "x");
  check.inner_contiguous(residual, "residual");
  check.writable(residual, "residual");
  check.disjoint(residual, "residual", x, "x", false);
  check.disjoint(x, "x", weight, "weight", false);
  check.disjoint(residual, "residual", weight, "weight", false);
  params.residual = residual.data;
  params.residual_rows = row_layout(residual);
  if (params.num_rows == 0) return;
  dispatch_device(
      "fused_add_rms_norm", x.device, stream, [&] { cpu::fused_add_rms_norm(params); },
      [&](auto s) { cuda::fused_add_rms_norm(params, s); });
}

void layer_norm(const TensorView& out, const TensorView& x, const TensorView& weight, const TensorView* bias, double eps, Stream stream) {
  const Check check("layer_norm");
  NormParams params = check_input(check, x, weight, eps, 0.0);
  check_output(check, out, x, weight, params);
  if (bias != nullptr) {
    check.float_dtype(*bias, "bias");
    check.vector(*bias, "bias", bias->dtype, params.hidden, x.device, "x");
    check.disjoint(out, "out", *bias, "bias", false);
    params.bias = bias->data;
    params.bias_dtype = bias->dtype;
  }
  if (params.num_rows == 0) return;
  dispatch_device("layer_norm", x.device, stream, [&] { cpu::layer_norm(params); }, [&](auto s) { cuda::layer_norm(params, s); });
}

}  // namespace quire
