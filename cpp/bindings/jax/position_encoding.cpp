// XLA handlers of rotary position encoding.
// SPDX-License-Identifier: Apache-2.0
#include "quire/position_encoding.h"

#include "bindings/jax/call.h"

namespace quire::jax {
namespace {

// Operands: positions, q, k, cos_sin_cache. Results: q, k.
void rotary(const Call& call) {
  rotary_embedding(call.operand(0), call.in_place(0, 1), call.optional_in_place(1, 2), call.operand(3), rope_style_of(call), call.stream());
}

// Operands: positions, q, k, q_weight, k_weight, cos_sin_cache. Results: q, k.
void qk_norm(const Call& call) {
  qk_norm_rope(call.operand(0), call.in_place(0, 1), call.optional_in_place(1, 2), call.operand(3), call.optional_operand(4),
               call.operand(5), call.number("eps"), call.number("weight_offset"), rope_style_of(call), call.stream());
}

// Operands: positions, q, k, v, cos_sin_cache, k_cache, v_cache, slot_mapping, k_scale, v_scale, q_weight, k_weight.
// Results: q, k_cache, v_cache, k_out.
void rope_and_write(const Call& call) {
  rope_and_write_kv(call.operand(0), call.in_place(0, 1), call.operand(2), call.operand(3), call.operand(4), call.in_place(1, 5),
                    call.in_place(2, 6), call.operand(7), call.optional_operand(8), call.optional_operand(9), call.optional_result(3),
                    call.optional_operand(10), call.optional_operand(11), call.number("eps"), call.number("weight_offset"),
                    rope_style_of(call), call.stream());
}

constexpr Target kPositionEncodingTargets[] = {
    target<"rotary_embedding", &rotary>(),
    target<"qk_norm_rope", &qk_norm>(),
    target<"rope_and_write_kv", &rope_and_write>(),
};

}  // namespace

std::span<const Target> position_encoding_targets() { return kPositionEncodingTargets; }

}  // namespace quire::jax
