// The variants of the attention kernels: their tiles, limits and workspace, and a configured call. What kernels need of config.h.
// SPDX-License-Identifier: Apache-2.0
//
// Rows are packed: query token t of a sequence and query head g of a kv head's group make row t * group + g, so that one
// CTA reads its keys once for the whole group. A tile is tile_rows such rows of one sequence and one kv head.
#pragma once

#include <climits>
#include <cstdint>
#include <limits>

#include "core/layout.h"
#include "ops/attention.h"

namespace quire::cuda::attn {

using Variant = AttentionVariant;

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;

/// Rows of a tile of all variants but kWgmma.
constexpr int tile_rows(Variant variant) {
  switch (variant) {
    case Variant::kMmaSplitKeys16: return 16;
    case Variant::kMmaSplitRows:
    case Variant::kMmaSplitRowsSmall: return 64;
    case Variant::kMmaSplitRows128: return 128;
    default: return 8;
  }
}

/// Rows of a tile of kWgmma.
constexpr int wgmma_rows(int head_dim_bucket, bool narrow_kv) { return head_dim_bucket == 64 && !narrow_kv ? 192 : 128; }

/// head_dim rounded up to what kernels are compiled for; the rest is zero in shared memory.
constexpr int head_dim_bucket(Variant variant, std::int64_t head_dim) {
  if (variant != Variant::kSimt && head_dim <= 64) return 64;
  return head_dim <= 128 ? 128 : 256;
}

/// The same of kWgmma, which has more of them for 16-bit keys and values.
constexpr int wgmma_head_dim_bucket(std::int64_t head_dim, bool narrow_kv) {
  if (!narrow_kv && head_dim > 64 && head_dim <= 96) return 96;
  if (!narrow_kv && head_dim > 128 && head_dim <= 192) return 192;
  return head_dim_bucket(Variant::kWgmma, head_dim);
}

inline int wgmma_rows(const AttentionParams& params) {
  const bool narrow = itemsize(params.kv_dtype) == 1;
  return wgmma_rows(wgmma_head_dim_bucket(params.head_dim, narrow), narrow);
}

/// What the largest variants need; devices of compute capability 8.0 and 9.0 have it, 8.6, 8.9 and 12.0 have 99 KiB.
constexpr int kLargeSharedBytes = 108 * 1024;

/// Whether a variant's shared memory is more than the smaller devices have.
constexpr bool needs_large_shared(Variant variant, int bucket, std::int64_t kv_itemsize) {
  switch (variant) {
    case Variant::kMmaSplitKeys8: return bucket == 256;
    case Variant::kMmaSplitKeys16: return true;
    case Variant::kMmaSplitRows: return bucket == 256 && kv_itemsize == 2;
    default: return false;
  }
}

/// What a tile costs besides its keys, in steps.
constexpr int kTileCost = 4;

/// Whether a variant's CTAs share the batch's keys on the device (share.cuh), so that the host splits nothing.
constexpr bool shares_keys(Variant variant) {
  return variant == Variant::kMmaSplitKeys8 || variant == Variant::kMmaSplitKeys16 || variant == Variant::kMmaSplitKeys8Small;
}

/// Batch-invariant calls cut a tile's keys at these places alone, which depend on nothing: eight parts of 512 keys, then four to each octave,
/// so that a part is at most a quarter of the keys before it. Part `index` begins there.
__host__ __device__ constexpr int part_begin(int index) {
  constexpr int kLast = 84;  // would begin at 2^31
  if (index < 8) return index * 512;
  if (index >= kLast) return INT_MAX;
  const int octave = (index - 8) / 4;
  return (4096 << octave) + (index - 8) % 4 * (1024 << octave);
}

struct Config {
  Variant variant;
  int head_dim_bucket;
  int tile_rows;
  // If shares_keys.
  int num_ctas;
  bool paired;        // two neighbouring kv heads are one: params.num_kv_heads and the heads' strides are as if
  bool wide;          // one CTA with all warps to an SM, instead of several
  int slots_per_cta;  // of partial results, each of a tile's rows
  int ctas_per_tile, tiles_per_cta;  // if all tiles have one length; 0: that makes no difference
  int line_shift;                    // see Plan
  // If not.
  int num_splits;          // CTAs that share one tile's keys; > 1 needs the workspace and the combine kernel
  int keys_per_split_min;  // a split is at least this long, and a multiple of it
  int min_rows = 0, max_rows = std::numeric_limits<int>::max();  // of a sequence; others are not this launch's
  std::int64_t tiles_per_seq;  // without query_start_loc; else 0
  std::int64_t num_tiles;      // per kv head; with query_start_loc an upper bound
};

/// Partial results never take more rows than this, whatever the batch; nor than kPartialsPerRow for each row of it.
constexpr int kPartialRowsPerSm = 416;
constexpr int kPartialsPerRow = 1024;
constexpr int kMaxSplits = 256;
/// The most CTAs that share keys.
constexpr int kMaxCtas = 640;
/// Only the last so many parts of a batch-invariant tile may be another CTA's than its beginning.
constexpr int kCutParts = 12;
constexpr int kWideSharedBytes = 226 * 1024;
constexpr int kMaxPrefixRanges = 16;

constexpr std::int64_t partial_rows(std::int64_t num_tokens, std::int64_t num_heads, int num_sms) {
  const std::int64_t by_rows = num_tokens * num_heads * kPartialsPerRow, by_sms = std::int64_t{kPartialRowsPerSm} * num_sms;
  return by_rows < by_sms ? by_rows : by_sms;
}

/// Bytes of partial results (output rows and their two softmax terms) of any call of at most this size.
constexpr std::int64_t workspace_bytes(std::int64_t num_tokens, std::int64_t num_heads, std::int64_t head_dim, int num_sms) {
  return partial_rows(num_tokens, num_heads, num_sms) * (head_dim + 2) * static_cast<std::int64_t>(sizeof(float));
}

/// CTAs of a variant that an SM holds together, by registers and shared memory.
constexpr int ctas_per_sm(Variant variant, int bucket) {
  switch (variant) {
    case Variant::kMmaSplitKeys8: return bucket < 256 ? 4 : 2;
    case Variant::kMmaSplitRows: return bucket < 256 ? 3 : 2;
    default: return 2;
  }
}

}  // namespace quire::cuda::attn
