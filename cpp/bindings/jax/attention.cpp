// XLA handlers of the attention ops. The workspace is a result that XLA allocates and nobody reads.
// SPDX-License-Identifier: Apache-2.0
#include "quire/attention.h"

#include "bindings/jax/call.h"

namespace quire::jax {
namespace {

// `first` is the first of the operands alibi_slopes, sinks, q_scale, k_scale, v_scale, mask, mask_start.
AttentionOptions options_of(const Call& call, std::size_t first) {
  AttentionOptions options;
  options.batch_invariant = call.integer("batch_invariant") != 0;
  options.causal = call.integer("causal") != 0;
  options.scale = call.optional_number("scale");
  options.softcap = call.number("softcap");
  options.window_left = call.integer("window_left");
  options.window_right = call.integer("window_right");
  options.alibi_slopes = call.optional_operand(first);
  options.sinks = call.optional_operand(first + 1);
  options.q_scale = call.optional_operand(first + 2);
  options.k_scale = call.optional_operand(first + 3);
  options.v_scale = call.optional_operand(first + 4);
  options.mask = call.optional_operand(first + 5);
  options.mask_start = call.optional_operand(first + 6);
  return options;
}

// Operands: q, k_cache, v_cache, block_tables, seq_lens, query_start_loc, options. Results: out, lse, workspace.
void paged(const Call& call) {
  paged_attention(call.result(0), call.optional_result(1), call.operand(0), call.operand(1), call.operand(2), call.operand(3),
                  call.operand(4), call.optional_operand(5), call.optional_result(2), options_of(call, 6), call.stream());
}

// Operands: q, k_cache, v_cache, prefix_blocks, block_tables, seq_lens, query_start_loc, options. Results: out, lse, workspace.
void shared_prefix(const Call& call) {
  shared_prefix_attention(call.result(0), call.optional_result(1), call.operand(0), call.operand(1), call.operand(2), call.operand(3),
                          call.operand(4), call.operand(5), call.optional_operand(6), call.optional_result(2), options_of(call, 7),
                          call.stream());
}

// Operands: q, k, v, query_start_loc, kv_start_loc, options. Results: out, lse, workspace.
void ragged(const Call& call) {
  attention(call.result(0), call.optional_result(1), call.operand(0), call.operand(1), call.operand(2), call.optional_operand(3),
            call.optional_operand(4), call.optional_result(2), options_of(call, 5), call.stream());
}

// Operands: out_a, lse_a, out_b, lse_b. Results: out, out_lse.
void merge(const Call& call) {
  merge_attention(call.result(0), &call.result(1), call.operand(0), call.operand(1), call.operand(2), call.operand(3), call.stream());
}

constexpr Target kAttentionTargets[] = {
    target<"paged_attention", &paged>(),
    target<"shared_prefix_attention", &shared_prefix>(),
    target<"attention", &ragged>(),
    target<"merge_attention", &merge>(),
};

}  // namespace

std::span<const Target> attention_targets() { return kAttentionTargets; }

}  // namespace quire::jax
