// XLA handlers of the norm ops.
// SPDX-License-Identifier: Apache-2.0
#include "quire/norm.h"

#include "bindings/jax/call.h"

namespace quire::jax {
namespace {

// Scales that are given are the last operand; computed ones are a result.
const TensorView& scales_of(const Call& call, std::size_t operand) {
  const TensorView* const given = call.optional_operand(operand);
  return given != nullptr ? *given : call.result(1);
}

void rms(const Call& call) {
  rms_norm(call.result(0), call.operand(0), call.operand(1), call.number("eps"), call.number("weight_offset"), call.stream());
}

void rms_quantized(const Call& call) {
  rms_norm_quantized(call.result(0), scales_of(call, 2), call.operand(0), call.operand(1), call.number("eps"), call.number("weight_offset"),
                     granularity_of(call), call.integer("group_size"), call.stream());
}

void fused_add_rms(const Call& call) {
  fused_add_rms_norm(call.in_place(0, 0), call.in_place(1, 1), call.operand(2), call.number("eps"), call.number("weight_offset"),
                     call.stream());
}

void fused_add_rms_quantized(const Call& call) {
  fused_add_rms_norm_quantized(call.result(0), scales_of(call, 3), call.in_place(2, 1), call.operand(0), call.operand(2),
                               call.number("eps"), call.number("weight_offset"), granularity_of(call), call.integer("group_size"),
                               call.stream());
}

void layer(const Call& call) {
  layer_norm(call.result(0), call.operand(0), call.operand(1), call.optional_operand(2), call.number("eps"), call.stream());
}

void layer_quantized(const Call& call) {
  layer_norm_quantized(call.result(0), scales_of(call, 3), call.operand(0), call.operand(1), call.optional_operand(2), call.number("eps"),
                       granularity_of(call), call.integer("group_size"), call.stream());
}

constexpr Target kNormTargets[] = {
    target<"rms_norm", &rms>(),
    target<"rms_norm_quantized", &rms_quantized>(),
    target<"fused_add_rms_norm", &fused_add_rms>(),
    target<"fused_add_rms_norm_quantized", &fused_add_rms_quantized>(),
    target<"layer_norm", &layer>(),
    target<"layer_norm_quantized", &layer_quantized>(),
};

}  // namespace

std::span<const Target> norm_targets() { return kNormTargets; }

}  // namespace quire::jax
