// KV-cache operations on the CPU: tokens, or runs of a block's bytes, over threads.
// SPDX-License-Identifier: Apache-2.0
#include "ops/kv_cache.h"

#include <algorithm>
#include <cstring>

#include "core/dispatch.h"
#include "core/error_word.h"
#include "core/layout.h"
#include "cpu/isa/tables.h"
#include "cpu/thread_pool.h"

namespace quire::cpu {

namespace {

// Fewer bytes than this are not worth waking a thread for.
constexpr std::int64_t kGrainBytes = 65536;

/// Where k or v lies, outside and in the cache. Strides are in elements.
struct KvSide {
  char* data;
  std::int64_t token_stride, head_stride;
  char* cache;
  std::int64_t cache_block_stride, cache_slot_stride, cache_head_stride;
  const float* scale;
  std::int64_t scale_stride;
};

/// Calls f(token, slot) for every token, with slot -1 for those to skip.
template <typename F>
void for_each_token(const KvParams& p, OpId op, F f) {
  const std::int64_t num_slots = p.num_blocks * p.block_size;
  const std::int64_t bytes_per_token = 2 * p.num_kv_heads * p.head_dim * (itemsize(p.dtype) + itemsize(p.cache_dtype));
  dispatch_index(p.slot_dtype, op == OpId::kWriteKv ? "write_kv" : "gather_kv", [&](auto tag) {
    const auto* slots = static_cast<const decltype(tag)*>(p.slot_mapping);
    parallel_for(p.num_tokens, ceil_div(kGrainBytes, std::max<std::int64_t>(bytes_per_token, 1)),
                 [&](std::int64_t begin, std::int64_t end) {
                   for (std::int64_t token = begin; token < end; ++token) {
                     std::int64_t slot = slots[token * p.slot_stride];
                     if (slot < 0 || slot >= num_slots) {
                       if (slot != -1) record_cpu_error(op, ArgId::kSlotMapping, token, slot);
                       slot = -1;
                     }
                     f(token, slot);
                   }
                 });
  });
}

char* token_row(const KvParams& p, const KvSide& side, std::int64_t token) {
  return side.data + token * side.token_stride * itemsize(p.dtype);
}

char* cache_row(const KvParams& p, const KvSide& side, std::int64_t slot) {
  const std::int64_t block = slot / p.block_size, offset = slot % p.block_size;
  return side.cache + (block * side.cache_block_stride + offset * side.cache_slot_stride) * itemsize(p.cache_dtype);
}

/// Everything but the two addresses. Heads that are dense on both sides and share a scale are one long head.
KvRows rows_of(const KvParams& p, const KvSide& side, bool write) {
  KvRows rows;
  rows.dst = nullptr;
  rows.src = nullptr;
  rows.dst_head_stride = write ? side.cache_head_stride : side.head_stride;
  rows.src_head_stride = write ? side.head_stride : side.cache_head_stride;
  rows.num_heads = p.num_kv_heads;
  rows.head_dim = p.head_dim;
  rows.scale = side.scale;
  rows.scale_stride = side.scale_stride;
  if (side.head_stride == p.head_dim && side.cache_head_stride == p.head_dim && (side.scale == nullptr || side.scale_stride == 0)) {
    rows.head_dim *= rows.num_heads;
    rows.num_heads = 1;
  }
  return rows;
}

KvSide k_side(const KvParams& p) {
  return {static_cast<char*>(p.k), p.k_token_stride,      p.k_head_stride,       static_cast<char*>(p.k_cache),
          p.k_cache_block_stride,  p.k_cache_slot_stride, p.k_cache_head_stride, p.k_scale,
          p.k_scale_stride};
}

KvSide v_side(const KvParams& p) {
  return {static_cast<char*>(p.v), p.v_token_stride,      p.v_head_stride,       static_cast<char*>(p.v_cache),
          p.v_cache_block_stride,  p.v_cache_slot_stride, p.v_cache_head_stride, p.v_scale,
          p.v_scale_stride};
}

}  // namespace

void write_kv(const KvParams& p) {
  const KvKernel write = kv_kernels.active().write[static_cast<std::size_t>(p.dtype)][static_cast<std::size_t>(p.cache_dtype)];
  const KvSide sides[2] = {k_side(p), v_side(p)};
  const KvRows shapes[2] = {rows_of(p, sides[0], true), rows_of(p, sides[1], true)};
  for_each_token(p, OpId::kWriteKv, [&](std::int64_t token, std::int64_t slot) {
    if (slot < 0) return;
    for (int i = 0; i < 2; ++i) {
      KvRows rows = shapes[i];
      rows.dst = cache_row(p, sides[i], slot);
      rows.src = token_row(p, sides[i], token);
      write(rows);
    }
  });
}

void gather_kv(const KvParams& p) {
  const KvKernel gather = kv_kernels.active().gather[static_cast<std::size_t>(p.dtype)][static_cast<std::size_t>(p.cache_dtype)];
  const KvSide sides[2] = {k_side(p), v_side(p)};
  const KvRows shapes[2] = {rows_of(p, sides[0], false), rows_of(p, sides[1], false)};
  const std::int64_t item_bytes = itemsize(p.dtype);
  for_each_token(p, OpId::kGatherKv, [&](std::int64_t token, std::int64_t slot) {
    for (int i = 0; i < 2; ++i) {
      KvRows rows = shapes[i];
      rows.dst = token_row(p, sides[i], token);
      if (slot < 0) {
        for (std::int64_t head = 0; head < rows.num_heads; ++head)
          std::memset(static_cast<char*>(rows.dst) + head * rows.dst_head_stride * item_bytes, 0,
                      static_cast<std::size_t>(rows.head_dim * item_bytes));
        continue;
      }
      rows.src = cache_row(p, sides[i], slot);
      gather(rows);
    }
  });
}

void copy_blocks(const CopyBlocksParams& p) {
  if (p.segment_bytes <= 0 || p.num_segments <= 0) return;
  char* cache = static_cast<char*>(p.cache);
  // One item is one run of bytes, or a part of a long one.
  constexpr std::int64_t kPieceBytes = 1 << 20;
  const std::int64_t pieces_per_segment = ceil_div(p.segment_bytes, kPieceBytes);
  const std::int64_t items_per_pair = p.num_segments * pieces_per_segment;
  const std::int64_t bytes_per_item = std::min(p.segment_bytes, kPieceBytes);
  dispatch_index(p.pair_dtype, "copy_blocks", [&](auto tag) {
    const auto* pairs = static_cast<const decltype(tag)*>(p.pairs);
    parallel_for(p.num_pairs * items_per_pair, ceil_div(kGrainBytes, bytes_per_item), [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t item = begin; item < end; ++item) {
        const std::int64_t pair = item / items_per_pair, within = item % items_per_pair;
        const std::int64_t src = pairs[2 * pair], dst = pairs[2 * pair + 1];
        const bool src_valid = src >= 0 && src < p.num_blocks, dst_valid = dst >= 0 && dst < p.num_blocks;
        if (!src_valid || !dst_valid) {
          if (within == 0) {
            if (!src_valid && src != -1) record_cpu_error(OpId::kCopyBlocks, ArgId::kPairs, 2 * pair, src);
            if (!dst_valid && dst != -1) record_cpu_error(OpId::kCopyBlocks, ArgId::kPairs, 2 * pair + 1, dst);
          }
          continue;
        }
        if (src == dst) continue;
        const std::int64_t piece = within % pieces_per_segment * kPieceBytes;
        const std::int64_t offset = within / pieces_per_segment * p.segment_stride_bytes + piece;
        std::memcpy(cache + dst * p.block_stride_bytes + offset, cache + src * p.block_stride_bytes + offset,
                    static_cast<std::size_t>(std::min(kPieceBytes, p.segment_bytes - piece)));
      }
    });
  });
}

}  // namespace quire::cpu
