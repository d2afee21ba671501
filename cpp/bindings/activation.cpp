// Bindings of the activation ops.
// SPDX-License-Identifier: Apache-2.0
#include "quire/activation.h"

#include "bindings/bindings.h"
#include "bindings/scalar_args.h"
#include "bindings/tensor_args.h"

namespace quire::bindings {
namespace {

using ActivationOp = void (*)(const TensorView&, const TensorView&, Stream);

void bind(nb::module_& m, const char* op, ActivationOp function) {
  m.def(
      op,
      [op, function](nb::handle out, nb::handle x, nb::handle stream) {
        Args args(op, stream, {{out, "out", Access::kWrite}, {x, "x"}});
        args.run([&](Stream s) { function(args[0], args[1], s); });
      },
      nb::arg("out").none(), nb::arg("x").none(), nb::arg("stream").none());
}

using QuantizedActivationOp = void (*)(const TensorView&, const TensorView&, const TensorView&, ScaleGranularity, std::int64_t, Stream);

// `name` is the function's here, `op` the one in messages.
void bind_quantized(nb::module_& m, const char* name, const char* op, QuantizedActivationOp function) {
  m.def(
      name,
      [op, function](nb::handle out, nb::handle scales, nb::handle x, nb::handle granularity, nb::handle group_size, nb::handle stream) {
        const ScaleGranularity scaling = to_granularity(op, granularity);
        const std::int64_t size = to_int(op, "group_size", group_size);
        Args args(op, stream, {{out, "out", Access::kWrite}, {scales, "scales", scale_access(scaling)}, {x, "x"}});
        args.run([&](Stream s) { function(args[0], args[1], args[2], scaling, size, s); });
      },
      nb::arg("out").none(), nb::arg("scales").none(), nb::arg("x").none(), nb::arg("granularity").none(), nb::arg("group_size").none(),
      nb::arg("stream").none());
}

}  // namespace

void bind_activation(nb::module_& m) {
  bind(m, "silu_and_mul", &silu_and_mul);
  bind(m, "gelu_and_mul", &gelu_and_mul);
  bind(m, "gelu_tanh_and_mul", &gelu_tanh_and_mul);
  bind_quantized(m, "silu_and_mul_quantized", "silu_and_mul", &silu_and_mul_quantized);
  bind_quantized(m, "gelu_and_mul_quantized", "gelu_and_mul", &gelu_and_mul_quantized);
  bind_quantized(m, "gelu_tanh_and_mul_quantized", "gelu_tanh_and_mul", &gelu_tanh_and_mul_quantized);
  bind(m, "gelu_new", &gelu_new);
  bind(m, "gelu_fast", &gelu_fast);
  bind(m, "gelu_quick", &gelu_quick);
  bind(m, "relu_squared", &relu_squared);
}

}  // namespace quire::bindings
