// From the shape of an attention call to the kernel variant and its split of the keys. Host code, pure: no device is touched.
// SPDX-License-Identifier: Apache-2.0
//
// Rows are packed: query token t of a sequence and query head g of a kv head's group make row t * group + g, so that one
// CTA reads its keys once for the whole group. A tile is tile_rows such rows of one sequence and one kv head.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "core/layout.h"
#include "cuda/launch.h"
#include "ops/attention.h"
#include "quire/error.h"

namespace quire::cuda::attn {

enum class Variant : std::uint8_t {
  kMmaSplitKeys8,       // 8 rows; the four warps of a CTA take turns at the keys: decode
  kMmaSplitKeys16,      // the same with 16 rows
  kMmaSplitRows,        // 64 rows; 16 to each of four warps, which share the keys: prefill
  kWgmma,               // 128 rows, 192 at head_dim 64; 64 to each warpgroup: prefill on Hopper
  kMmaSplitKeys8Small,  // kMmaSplitKeys8 for head_dim 256 where a CTA may have less than kLargeSharedBytes
  kSimt,                // 8 rows, float32 throughout: float32 queries
};

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;

constexpr int tile_rows(Variant variant, int head_dim_bucket = 128) {
  switch (variant) {
    case Variant::kWgmma: return head_dim_bucket == 64 ? 192 : 128;
    case Variant::kMmaSplitKeys16: return 16;
    case Variant::kMmaSplitRows: return 64;
    default: return 8;
  }
}

/// head_dim rounded up to what kernels are compiled for; the rest is zero in shared memory.
constexpr int head_dim_bucket(Variant variant, std::int64_t head_dim) {
  if (variant != Variant::kSimt && head_dim <= 64) return 64;
  return head_dim <= 128 ? 128 : 256;
}

/// What the largest variants need; devices of compute capability 8.0 and 9.0 have it, 8.6, 8.9 and 12.0 have 99 KiB.
constexpr int kLargeSharedBytes = 108 * 1024;

struct Config {
  Variant variant;
  int head_dim_bucket;
  int num_splits;          // CTAs that share one tile's keys; > 1 needs the workspace and the combine kernel
  int keys_per_split_min;  // a split is at least this long, and a multiple of it
  std::int64_t tiles_per_seq;  // without query_start_loc; else 0
  std::int64_t num_tiles;      // per kv head; with query_start_loc an upper bound
};

/// Partial results never take more rows than this, whatever the batch.
constexpr int kPartialRowsPerSm = 256;
constexpr int kMaxSplits = 256;

/// Bytes of partial results (output rows and their two softmax terms) of any call of at most this size.
constexpr std::int64_t workspace_bytes(std::int64_t num_tokens, std::int64_t num_heads, std::int64_t head_dim, int num_sms) {
  const std::int64_t rows = std::min(num_tokens * num_heads * kMaxSplits, std::int64_t{kPartialRowsPerSm} * num_sms);
  return rows * (head_dim + 2) * static_cast<std::int64_t>(sizeof(float));
}

/// CTAs of a variant that an SM holds together, by registers and shared memory.
constexpr int ctas_per_sm(Variant variant, int bucket) { return variant == Variant::kMmaSplitKeys8 && bucket < 256 ? 4 : 2; }

/// How many CTAs share a tile's keys. The cost that it minimises: CTAs run in rounds of ctas_per_sm on each SM; a last round of fewer
/// than about 1.6 per SM cannot draw the whole memory bandwidth; and splitting has a price of its own. Of equals, the fewest splits.
constexpr int choose_num_splits(std::int64_t num_ctas, std::int64_t num_sms, std::int64_t ctas_per_sm, std::int64_t max_splits) {
  const std::int64_t enough = num_sms * 8 / 5;
  if (max_splits <= 1) return 1;
  if (num_ctas * 8 <= enough) return static_cast<int>(std::min(max_splits, ceil_div(enough, num_ctas)));
  const auto cost = [&](std::int64_t splits) {
    const std::int64_t last = num_ctas * splits % (num_sms * ctas_per_sm);
    const std::int64_t rounds = num_ctas * splits - last + (last == 0 ? 0 : std::max(last, enough));
    return static_cast<double>(rounds) / static_cast<double>(splits) * (splits == 1 ? 1.0 : 1.08);
  };
  int best = 1;
  for (int splits = 2; splits <= std::min<std::int64_t>(max_splits, 16); ++splits)
    if (cost(splits) < 0.98 * cost(best)) best = splits;
  return best;
}

/// The largest key count that a sequence can have, as far as the host knows. Kernels add a step to key indices in 32 bits.
inline std::int64_t key_capacity(const AttentionParams& params) {
  const std::int64_t limit = std::numeric_limits<std::int32_t>::max() - 1024;
  if (params.block_tables == nullptr) return std::min(params.num_kv_tokens, limit);
  if (params.max_blocks_per_seq > limit / std::max<std::int64_t>(params.block_size, 1)) return limit;
  return params.max_blocks_per_seq * params.block_size;
}

/// Whether Hopper's kernel, which copies K and V by boxes and q and out by 16 bytes, can address them, and there is no mask, which it does not know.
inline bool wgmma_layout(const AttentionParams& p) {
  if (p.kv_dtype != p.dtype || itemsize(p.dtype) != 2 || p.mask != nullptr) return false;
  const bool paged = p.block_tables != nullptr;
  if (paged ? p.block_size % 8 != 0 || p.num_blocks == 0 : p.num_kv_tokens == 0) return false;
  if (p.num_blocks > std::numeric_limits<std::int32_t>::max() || p.block_size > std::numeric_limits<std::int32_t>::max()) return false;
  const auto aligned = [](const void* pointer) { return reinterpret_cast<std::uintptr_t>(pointer) % 16 == 0; };
  const auto stride_fits = [](std::int64_t size, std::int64_t stride) {
    return size <= 1 || (stride > 0 && stride % 8 == 0 && stride < std::int64_t{1} << 38);
  };
  const std::int64_t slots = paged ? p.block_size : p.num_kv_tokens, blocks = paged ? p.num_blocks : 1;
  return aligned(p.q) && aligned(p.k) && aligned(p.v) && aligned(p.out) && p.q_token_stride % 8 == 0 && p.q_head_stride % 8 == 0 &&
         p.out_token_stride % 8 == 0 && p.out_head_stride % 8 == 0 && stride_fits(p.num_kv_heads, p.k_head_stride) &&
         stride_fits(p.num_kv_heads, p.v_head_stride) && stride_fits(slots, p.k_token_stride) && stride_fits(slots, p.v_token_stride) &&
         stride_fits(blocks, p.k_block_stride) && stride_fits(blocks, p.v_block_stride);
}

inline Config choose_config(const AttentionParams& params, const DeviceProperties& device, bool has_wgmma) {
  const std::int64_t group = params.num_heads / params.num_kv_heads;
  const bool ragged = params.query_start_loc != nullptr;
  const std::int64_t query_len = ragged || params.block_tables == nullptr ? ceil_div(params.num_tokens, params.num_seqs) : 1;

  Config config{};
  config.variant = params.dtype == DType::kFloat32 ? Variant::kSimt
                   : query_len * group <= 8        ? Variant::kMmaSplitKeys8
                   : query_len * group <= 32       ? Variant::kMmaSplitKeys16
                                                   : Variant::kMmaSplitRows;
  config.head_dim_bucket = head_dim_bucket(config.variant, params.head_dim);
  if (config.variant != Variant::kSimt && device.max_shared_bytes_per_cta < kLargeSharedBytes) {
    const bool wide = config.head_dim_bucket == 256 && (config.variant != Variant::kMmaSplitRows || itemsize(params.kv_dtype) == 2);
    if (wide) {
      config.variant = Variant::kMmaSplitKeys8Small;
    } else if (config.variant == Variant::kMmaSplitKeys16) {
      config.variant = Variant::kMmaSplitKeys8;
    }
  }
  // With few tiles, kMmaSplitRows shares each one's keys between CTAs.
  if (config.variant == Variant::kMmaSplitRows && has_wgmma && wgmma_layout(params) &&
      params.num_tokens * params.num_heads * 3 >= std::int64_t{tile_rows(Variant::kWgmma, config.head_dim_bucket)} * device.num_sms)
    config.variant = Variant::kWgmma;
  const int rows = tile_rows(config.variant, config.head_dim_bucket);

  // Sequence s owns the tiles from floor(query_start_loc[s] * group / rows) + s on: never too few, and found by one search.
  config.tiles_per_seq = ragged ? 0 : ceil_div(query_len * group, rows);
  config.num_tiles = ragged ? params.num_tokens * group / rows + params.num_seqs : config.tiles_per_seq * params.num_seqs;

  const std::int64_t num_ctas = config.num_tiles * params.num_kv_heads;
  const std::int64_t limit = std::numeric_limits<std::int32_t>::max();
  if (num_ctas > limit || params.num_tokens * group > limit - 64)
    throw UnsupportedError("[attention] num_tokens * num_heads: expected less than 2^31 query rows in one call");

  // At least one step of 16 or 32 keys for each of the four warps that take turns, or a few steps that they share.
  const bool narrow = head_dim_bucket(config.variant, params.head_dim) * itemsize(params.kv_dtype) <= 128;
  const bool shared_steps = config.variant == Variant::kMmaSplitRows || config.variant == Variant::kSimt;
  if (config.variant == Variant::kWgmma) {
    config.num_splits = 1;
    config.keys_per_split_min = 1;
    return config;
  }
  config.keys_per_split_min = shared_steps ? 256 : narrow ? 128 : 64;

  const std::int64_t max_splits =
      std::min({std::int64_t{kMaxSplits}, ceil_div(std::max<std::int64_t>(key_capacity(params), 1), config.keys_per_split_min),
                std::int64_t{kPartialRowsPerSm} * device.num_sms / (num_ctas * rows)});
  config.num_splits = choose_num_splits(num_ctas, device.num_sms, ctas_per_sm(config.variant, config.head_dim_bucket), max_splits);
  return config;
}

}  // namespace quire::cuda::attn
