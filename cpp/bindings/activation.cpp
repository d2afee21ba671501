// Bindings of the activation ops.
// SPDX-License-Identifier: Apache-2.0
#include "quire/activation.h"

#include "bindings/bindings.h"
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

}  // namespace

void bind_activation(nb::module_& m) {
  bind(m, "silu_and_mul", &silu_and_mul);
  bind(m, "gelu_and_mul", &gelu_and_mul);
  bind(m, "gelu_tanh_and_mul", &gelu_tanh_and_mul);
  bind(m, "gelu_new", &gelu_new);
  bind(m, "gelu_fast", &gelu_fast);
  bind(m, "gelu_quick", &gelu_quick);
  bind(m, "relu_squared", &relu_squared);
}

}  // namespace quire::bindings
