// XLA handlers of the activation ops.
// SPDX-License-Identifier: Apache-2.0
#include "quire/activation.h"

#include "bindings/jax/call.h"

namespace quire::jax {
namespace {

template <void (*kFunction)(const TensorView&, const TensorView&, Stream)>
void plain(const Call& call) {
  kFunction(call.result(0), call.operand(0), call.stream());
}

template <void (*kFunction)(const TensorView&, const TensorView&, const TensorView&, ScaleGranularity, std::int64_t, Stream)>
void quantized(const Call& call) {
  const TensorView* const given = call.optional_operand(1);
  kFunction(call.result(0), given != nullptr ? *given : call.result(1), call.operand(0), granularity_of(call), call.integer("group_size"),
            call.stream());
}

constexpr Target kActivationTargets[] = {
    target<"silu_and_mul", &plain<&silu_and_mul>>(),
    target<"gelu_and_mul", &plain<&gelu_and_mul>>(),
    target<"gelu_tanh_and_mul", &plain<&gelu_tanh_and_mul>>(),
    target<"gelu_new", &plain<&gelu_new>>(),
    target<"gelu_fast", &plain<&gelu_fast>>(),
    target<"gelu_quick", &plain<&gelu_quick>>(),
    target<"relu_squared", &plain<&relu_squared>>(),
    target<"silu_and_mul_quantized", &quantized<&silu_and_mul_quantized>>(),
    target<"gelu_and_mul_quantized", &quantized<&gelu_and_mul_quantized>>(),
    target<"gelu_tanh_and_mul_quantized", &quantized<&gelu_tanh_and_mul_quantized>>(),
};

}  // namespace

std::span<const Target> activation_targets() { return kActivationTargets; }

}  // namespace quire::jax
