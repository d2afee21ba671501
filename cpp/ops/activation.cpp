// Public entries of the activation ops: validate, then choose the backend.
// SPDX-License-Identifier: Apache-2.0
#include "quire/activation.h"

#include "core/check.h"
#include "core/runtime.h"
#include "ops/activation.h"

namespace quire {
namespace {

// How a result is quantized; null scales: not at all.
struct Quantization {
  const TensorView* scales = nullptr;
  ScaleGranularity granularity = ScaleGranularity::kTensor;
  std::int64_t group_size = 0;
};

void run(const char* op, Activation activation, bool gated, const TensorView& out, const TensorView& x, Stream stream,
         const Quantization& quantization = {}) {
  const Check check(op);
  check.float_dtype(x, "x");
  check.rank(x, "x", 1, 4);
  check.inner_contiguous(x, "x");
  check.accessible(x, "x");
  if (gated && x.size(-1) % 2 != 0) check.fail_value("x", "an even last dimension (gate and up)", describe(x));
  TensorView expected = x;
  if (gated) expected.shape[static_cast<std::size_t>(x.ndim - 1)] /= 2;
  ActivationParams params;
  if (quantization.scales != nullptr) {
    params.quant =
        check_quantized(check, out, *quantization.scales, expected, "half of x", quantization.granularity, quantization.group_size);
    check.disjoint(*quantization.scales, "scales", x, "x", false);
  } else {
    check.same_dtype(out, "out", x, "x");
    check.same_shape(out, "out", expected, gated ? "half of x" : "x");
    check.device(out, "out", x.device, "x");
    check.inner_contiguous(out, "out");
    check.writable(out, "out");
  }
  check.disjoint(out, "out", x, "x", !gated);

  params.out = out.data;
  params.x = x.data;
  params.dtype = x.dtype;
  params.activation = activation;
  params.gated = gated;
  params.num_rows = num_rows(x);
  params.width = out.size(-1);
  params.out_rows = row_layout(out);
  params.x_rows = row_layout(x);
  if (params.num_rows == 0 || params.width == 0) return;
  dispatch_device(op, x.device, stream, [&] { cpu::activation(params); }, [&](auto s) { cuda::activation(params, s); }, Explains::kCuda);
}

}  // namespace

void silu_and_mul(const TensorView& out, const TensorView& x, Stream stream) {
  run("silu_and_mul", Activation::kSilu, true, out, x, stream);
}
void gelu_and_mul(const TensorView& out, const TensorView& x, Stream stream) {
  run("gelu_and_mul", Activation::kGelu, true, out, x, stream);
}
void gelu_tanh_and_mul(const TensorView& out, const TensorView& x, Stream stream) {
  run("gelu_tanh_and_mul", Activation::kGeluTanh, true, out, x, stream);
}
void silu_and_mul_quantized(const TensorView& out, const TensorView& scales, const TensorView& x, ScaleGranularity granularity,
                            std::int64_t group_size, Stream stream) {
  run("silu_and_mul", Activation::kSilu, true, out, x, stream, {&scales, granularity, group_size});
}
void gelu_and_mul_quantized(const TensorView& out, const TensorView& scales, const TensorView& x, ScaleGranularity granularity,
                            std::int64_t group_size, Stream stream) {
  run("gelu_and_mul", Activation::kGelu, true, out, x, stream, {&scales, granularity, group_size});
}
void gelu_tanh_and_mul_quantized(const TensorView& out, const TensorView& scales, const TensorView& x, ScaleGranularity granularity,
                                 std::int64_t group_size, Stream stream) {
  run("gelu_tanh_and_mul", Activation::kGeluTanh, true, out, x, stream, {&scales, granularity, group_size});
}
void gelu_new(const TensorView& out, const TensorView& x, Stream stream) { run("gelu_new", Activation::kGeluNew, false, out, x, stream); }
void gelu_fast(const TensorView& out, const TensorView& x, Stream stream) {
  run("gelu_fast", Activation::kGeluFast, false, out, x, stream);
}
void gelu_quick(const TensorView& out, const TensorView& x, Stream stream) {
  run("gelu_quick", Activation::kGeluQuick, false, out, x, stream);
}
void relu_squared(const TensorView& out, const TensorView& x, Stream stream) {
  run("relu_squared", Activation::kReluSquared, false, out, x, stream);
}

}  // namespace quire
