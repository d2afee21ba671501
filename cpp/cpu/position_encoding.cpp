// Rotary position encoding on the CPU: tokens over threads.
// SPDX-License-Identifier: Apache-2.0
#include "ops/position_encoding.h"

#include <algorithm>
#include <vector>

#include "core/dispatch.h"
#include "core/error_word.h"
#include "core/layout.h"
#include "cpu/isa/tables.h"
#include "cpu/norm_weight.h"
#include "cpu/rows.h"
#include "cpu/thread_pool.h"

namespace quire::cpu {

namespace {

// Fewer elements than this are not worth waking a thread for.
constexpr std::int64_t kRotaryGrain = 16384;

}  // namespace

void rotary_embedding(const RotaryParams& p) {
  const RotaryKernel rotate = rotary_kernels.active().rotate[p.style == RopeStyle::kGptj][index(p.dtype)][index(p.cache_dtype)];
  const std::int64_t item_bytes = itemsize(p.dtype);
  const std::int64_t table_row_bytes = p.rotary_dim * itemsize(p.cache_dtype);
  const std::int64_t elements_per_token = (p.num_heads + (p.k != nullptr ? p.num_kv_heads : 0)) * p.rotary_dim;
  if (elements_per_token == 0) return;
  const std::int64_t grain = ceil_div(kRotaryGrain, elements_per_token);

  dispatch_index(p.position_dtype, "rotary_embedding", [&](auto tag) {
    const auto* positions = static_cast<const decltype(tag)*>(p.positions);
    parallel_for(p.num_tokens, grain, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t token = begin; token < end; ++token) {
        const std::int64_t position = positions[token * p.position_stride];
        if (position < 0 || position >= p.max_position) {
          if (position != -1) record_cpu_error(OpId::kRotaryEmbedding, ArgId::kPositions, token, position);
          continue;
        }
        const void* table_row = static_cast<const char*>(p.cos_sin_cache) + position * table_row_bytes;
        rotate(static_cast<char*>(p.q) + token * p.q_token_stride * item_bytes, p.q_head_stride, p.num_heads, table_row, p.rotary_dim);
        if (p.k != nullptr)
          rotate(static_cast<char*>(p.k) + token * p.k_token_stride * item_bytes, p.k_head_stride, p.num_kv_heads, table_row, p.rotary_dim);
      }
    });
  });
}

namespace {

// One token's heads.
struct Heads {
  char* data;
  std::int64_t head_stride;  // in elements
};

// The steps of one call on one token's heads, with what one thread needs in between.
class HeadPass {
 public:
  /// `scratch` holds scratch_floats(p).
  HeadPass(const RopeParams& p, float* scratch)
      : p_(p), r_(p.rotary), wide_(scratch), keys_(reinterpret_cast<char*>(scratch + (p.norm.q_weight == nullptr ? 0 : wide_floats(p)))) {}

  static std::int64_t scratch_floats(const RopeParams& p) {
    // Apart by a cache line or more: threads must not share one.
    constexpr std::int64_t kLine = 16;
    return (p.norm.q_weight == nullptr ? 0 : wide_floats(p)) + ceil_div(p.kv.num_kv_heads * p.rotary.head_dim, kLine) * kLine + kLine;
  }

  /// from -> to, which may be one: normalised and rotated with the table's row, or copied where the position is not `known`. A table
  /// without columns may have no address.
  void turn(Heads to, Heads from, std::int64_t num_heads, const NormWeight& weight, bool known, const void* table_row) {
    if (num_heads == 0) return;
    if (!known) {
      if (to.data != from.data) convert(to, r_.dtype, from, r_.dtype, num_heads, nullptr, 0);
      return;
    }
    const auto& rotate = rotary_kernels.active().rotate[r_.style == RopeStyle::kGptj];
    if (weight.data() != nullptr) {
      NormRows rows{};
      rows.out = wide_;
      rows.x = from.data;
      rows.weight = weight.data();
      rows.out_stride = r_.head_dim;
      rows.x_stride = from.head_stride;
      rows.num_rows = num_heads;
      rows.hidden = r_.head_dim;
      rows.eps = p_.norm.eps;
      rows.weight_offset = p_.norm.weight_offset;
      norm_kernels.active().rms_norm_wide[index(r_.dtype)][weight.column()](rows);
      rotate[index(DType::kFloat32)][index(r_.cache_dtype)](wide_, r_.head_dim, num_heads, table_row, r_.rotary_dim);
      convert(to, r_.dtype, {reinterpret_cast<char*>(wide_), r_.head_dim}, DType::kFloat32, num_heads, nullptr, 0);
      return;
    }
    if (to.data != from.data) convert(to, r_.dtype, from, r_.dtype, num_heads, nullptr, 0);
    rotate[index(r_.dtype)][index(r_.cache_dtype)](to.data, to.head_stride, num_heads, table_row, r_.rotary_dim);
  }

  /// Heads to the cache's slot, or of one float dtype to another.
  void convert(Heads to, DType to_dtype, Heads from, DType from_dtype, std::int64_t num_heads, const float* scale,
               std::int64_t scale_stride) {
    kv_kernels.active().write[index(from_dtype)][index(to_dtype)](
        {to.data, from.data, to.head_stride, from.head_stride, num_heads, r_.head_dim, scale, scale_stride});
  }

  /// Room for rotated keys that only the cache takes.
  Heads keys() { return {keys_, r_.head_dim}; }

 private:
  static std::int64_t wide_floats(const RopeParams& p) { return std::max(p.rotary.num_heads, p.kv.num_kv_heads) * p.rotary.head_dim; }

  const RopeParams& p_;
  const RotaryParams& r_;
  float* wide_;  // [heads, head_dim]
  char* keys_;   // [num_kv_heads, head_dim]
};

}  // namespace

void rope(const RopeParams& p) {
  const RotaryParams& r = p.rotary;
  const KvParams& kv = p.kv;
  const std::int64_t item_bytes = itemsize(r.dtype), cache_item_bytes = itemsize(kv.cache_dtype);
  const std::int64_t table_row_bytes = r.rotary_dim * itemsize(r.cache_dtype);
  const std::int64_t elements_per_token = (r.num_heads + 2 * kv.num_kv_heads) * r.head_dim;
  const bool writes = kv.k_cache != nullptr;
  const std::int64_t num_slots = kv.num_blocks * kv.block_size;
  const std::int64_t num_parts = std::min<std::int64_t>(num_threads(), ceil_div(r.num_tokens, ceil_div(kRotaryGrain, elements_per_token)));
  const std::int64_t tokens_per_part = ceil_div(r.num_tokens, num_parts), scratch_floats = HeadPass::scratch_floats(p);
  std::vector<float> scratch(static_cast<std::size_t>(num_parts * scratch_floats));
  const NormWeight q_weight(p.norm.q_weight, p.norm.q_weight_dtype, r.head_dim, r.dtype);
  const NormWeight k_weight(p.norm.k_weight, p.norm.k_weight_dtype, r.head_dim, r.dtype);
  const auto heads_at = [&](void* data, std::int64_t token, std::int64_t token_stride, std::int64_t head_stride) {
    return Heads{static_cast<char*>(data) + token * token_stride * item_bytes, head_stride};
  };

  dispatch_index(r.position_dtype, "rope", [&](auto position_tag) {
    dispatch_index(kv.slot_dtype, "rope", [&](auto slot_tag) {
      const auto* positions = static_cast<const decltype(position_tag)*>(r.positions);
      const auto* slots = static_cast<const decltype(slot_tag)*>(kv.slot_mapping);
      parallel_for(num_parts, 1, [&](std::int64_t begin, std::int64_t end) {
        HeadPass pass(p, scratch.data() + begin * scratch_floats);
        for (std::int64_t token = begin * tokens_per_part; token < std::min(end * tokens_per_part, r.num_tokens); ++token) {
          const std::int64_t position = positions[token * r.position_stride];
          const bool known = position >= 0 && position < r.max_position;
          if (!known && position != -1) record_cpu_error(p.op, ArgId::kPositions, token, position);
          const void* table_row = known ? static_cast<const char*>(r.cos_sin_cache) + position * table_row_bytes : nullptr;
          const Heads q = heads_at(r.q, token, r.q_token_stride, r.q_head_stride);
          pass.turn(q, q, r.num_heads, q_weight, known, table_row);
          if (kv.k == nullptr) continue;

          std::int64_t slot = writes ? slots[token * kv.slot_stride] : -1;
          if (slot < 0 || slot >= num_slots) {
            if (slot != -1) record_cpu_error(p.op, ArgId::kSlotMapping, token, slot);
            slot = -1;
          }
          // Keys that only the cache takes are rotated on the side.
          const Heads k = heads_at(kv.k, token, kv.k_token_stride, kv.k_head_stride);
          const Heads rotated = r.k == nullptr ? pass.keys() : heads_at(r.k, token, r.k_token_stride, r.k_head_stride);
          if (r.k == nullptr && slot < 0) continue;
          pass.turn(rotated, k, kv.num_kv_heads, k_weight, known, table_row);
          if (slot < 0) continue;
          const std::int64_t block = slot / kv.block_size, offset = slot % kv.block_size;
          const auto at_slot = [&](void* cache, std::int64_t block_stride, std::int64_t slot_stride, std::int64_t head_stride) {
            return Heads{static_cast<char*>(cache) + (block * block_stride + offset * slot_stride) * cache_item_bytes, head_stride};
          };
          pass.convert(at_slot(kv.k_cache, kv.k_cache_block_stride, kv.k_cache_slot_stride, kv.k_cache_head_stride), kv.cache_dtype,
                       rotated, r.dtype, kv.num_kv_heads, kv.k_scale, kv.k_scale_stride);
          pass.convert(at_slot(kv.v_cache, kv.v_cache_block_stride, kv.v_cache_slot_stride, kv.v_cache_head_stride), kv.cache_dtype,
                       heads_at(kv.v, token, kv.v_token_stride, kv.v_head_stride), r.dtype, kv.num_kv_heads, kv.v_scale, kv.v_scale_stride);
        }
      });
    });
  });
}

}  // namespace quire::cpu
