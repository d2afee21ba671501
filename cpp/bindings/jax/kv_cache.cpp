// XLA handlers of the KV-cache ops. Caches are written in place.
// SPDX-License-Identifier: Apache-2.0
#include "quire/kv_cache.h"

#include "bindings/jax/call.h"

namespace quire::jax {
namespace {

// Operands: k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale. Results: k_cache, v_cache.
void write(const Call& call) {
  write_kv(call.in_place(0, 2), call.in_place(1, 3), call.operand(0), call.operand(1), call.operand(4), call.optional_operand(5),
           call.optional_operand(6), call.stream());
}

// Operands: k_cache, v_cache, slot_mapping, k_scale, v_scale. Results: k, v.
void gather(const Call& call) {
  gather_kv(call.result(0), call.result(1), call.operand(0), call.operand(1), call.operand(2), call.optional_operand(3),
            call.optional_operand(4), call.stream());
}

// Operands: cache, pairs. Results: cache.
void copy(const Call& call) { copy_blocks(call.in_place(0, 0), call.operand(1), call.stream()); }

constexpr Target kKvCacheTargets[] = {
    target<"write_kv", &write>(),
    target<"gather_kv", &gather>(),
    target<"copy_blocks", &copy>(),
};

}  // namespace

std::span<const Target> kv_cache_targets() { return kKvCacheTargets; }

}  // namespace quire::jax
