// From the shape of an attention call to the kernel variant and its split of the keys. Host code, pure: no device is touched.
// SPDX-License-Identifier: Apache-2.0
//
// Rows are packed: query token t of a sequence and query head g of a kv head's group make row t * group + g, so that one
// CTA reads its keys once for the whole group. A tile is tile_rows such rows of one sequence and one kv head.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "core/layout.h"
#include "cuda/launch.h"
#include "ops/attention.h"
#include "quire/error.h"

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

/// The largest key count that a sequence can have, as far as the host knows. Kernels add a step to key indices in 32 bits.
inline std::int64_t key_capacity(const AttentionParams& params) {
  const std::int64_t limit = std::numeric_limits<std::int32_t>::max() - 4096;
  if (params.block_tables == nullptr) return std::min(params.num_kv_tokens, limit);
  if (params.max_blocks_per_seq > limit / std::max<std::int64_t>(params.block_size, 1)) return limit;
  return params.max_blocks_per_seq * params.block_size;
}

/// Whether kWgmma has a kernel of its own for short sequences of a head_dim.
constexpr bool wgmma_has_short(int head_dim_bucket, bool narrow_q, bool narrow_kv) {
  return head_dim_bucket == 64 ? narrow_q == narrow_kv : !narrow_kv && (head_dim_bucket == 96 || head_dim_bucket == 256);
}

/// Rows of a tile of kWgmma. Narrow: of 8 bits.
constexpr int wgmma_rows(int head_dim_bucket, bool narrow_q, bool narrow_kv, bool is_short) {
  return head_dim_bucket <= 96 && narrow_q == narrow_kv && !(is_short && head_dim_bucket == 96) ? 192 : 128;
}

/// Keys of a step of kWgmma.
constexpr int wgmma_keys(int head_dim_bucket, bool narrow_q, bool narrow_kv, bool is_short) {
  if (is_short) return head_dim_bucket == 64 ? 96 : head_dim_bucket == 96 ? 128 : 64;
  if (head_dim_bucket == 96) return 96;
  if (head_dim_bucket == 64 && narrow_q) return 112;
  return head_dim_bucket <= 128 ? 128 : narrow_kv ? 64 : head_dim_bucket == 192 ? 112 : 80;
}

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

/// Whether a call goes to kWgmma's kernel for short sequences.
inline bool wgmma_is_short(const AttentionParams& p) {
  const bool narrow = itemsize(p.kv_dtype) == 1;
  const int bucket = wgmma_head_dim_bucket(p.head_dim, narrow);
  if (!wgmma_has_short(bucket, p.float8_queries, narrow)) return false;
  if (p.mask != nullptr || p.alibi_slopes != nullptr || p.softcap > 0.0f || !(p.scale > 0.0f)) return false;  // it has no code for these
  // Of ragged keys on average.
  const auto up_to = [&](std::int64_t keys) {
    return p.block_tables != nullptr ? key_capacity(p) <= keys : p.num_kv_tokens <= keys * p.num_seqs;
  };
  switch (bucket) {
    case 64: return p.causal && up_to(2048);  // smaller steps hide less under the causal mask's edge
    case 96: return !p.causal && up_to(768);  // smaller tiles of fewer, larger steps
    default: return up_to(p.causal ? 2048 : 768);  // smaller steps: less of the last one is past the end, or under the edge
  }
}

inline int wgmma_rows(const AttentionParams& params) {
  const bool narrow = itemsize(params.kv_dtype) == 1;
  return wgmma_rows(wgmma_head_dim_bucket(params.head_dim, narrow), params.float8_queries, narrow, wgmma_is_short(params));
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

/// What a tile costs besides its keys, in steps: the time in which a CTA reads so many. Batches of very many tiles count less, so that they fit 31
/// bits.
constexpr int tile_cost(bool wide, std::int64_t num_tiles) { return num_tiles > 1 << 20 ? 4 : wide ? 24 : 8; }

/// Whether a variant's CTAs share the batch's keys on the device (share.cuh), so that the host splits nothing.
constexpr bool shares_keys(Variant variant) {
  return variant == Variant::kMmaSplitKeys8 || variant == Variant::kMmaSplitKeys16 || variant == Variant::kMmaSplitKeys8Small;
}

/// Batch-invariant calls cut a tile's keys at these places alone, which depend on nothing: sixteen parts of 512 keys, then eight to each octave,
/// so that a part is at most an eighth of the keys before it. Part `index` begins there.
__host__ __device__ constexpr int part_begin(int index) {
  constexpr int kLast = 160;  // would begin at 2^31
  if (index < 16) return index * 512;
  if (index >= kLast) return INT_MAX;
  const int octave = (index - 16) / 8;
  return (8192 << octave) + (index - 16) % 8 * (1024 << octave);
}

/// Kv heads of a tile of batch-invariant decode (mma_cluster_parts.cuh), whose rows of up to 128 bytes are short pieces of memory, and how many warps
/// have them.
__host__ __device__ constexpr int heads_of_parts(std::int64_t row_bytes) { return row_bytes <= 128 ? 2 : 1; }
__host__ __device__ constexpr int warps_of_parts(std::int64_t row_bytes) { return row_bytes == 128 ? 2 : 1; }

/// How two neighbouring kv heads are one tile's: memory gives what lies in longer pieces faster.
enum class Pairing {
  kNone,
  kColumns,  // heads of half of the kernel's head_dim, their groups in one tile of 8 queries
  kWarps     // every second warp has the second head
};

/// Whether there are kernels that share keys evenly and have them brought by the copy engine, two heads' at once (key_boxes.cuh): rows of a line.
constexpr bool has_box_stretches(std::int64_t kv_itemsize, std::int64_t head_dim) { return kv_itemsize == 1 && head_dim == 128; }

struct Config {
  Variant variant;
  int head_dim_bucket;
  int tile_rows;
  // If shares_keys.
  int num_ctas;
  Pairing pairing;    // unless kNone, params.num_kv_heads and the heads' strides are as if the two were one
  bool by_boxes;      // of pairs: the copy engine brings keys also where they are shared evenly
  bool wide;          // CTAs of twice as many warps
  // If lengths are alike, up to so many CTAs, a cluster, share a tile's keys (mma_cluster_keys.cuh); 0: there are no clusters. A tile is
  // cluster_heads kv heads'.
  int cluster, cluster_heads;
  int lone_cluster;   // the same of the kernel for one sequence, a tile to each kv head; 0: that is not for this call
  int slots_per_cta;  // of partial results, each of a tile's rows
  int ctas_per_tile, tiles_per_cta;  // if all tiles have one length; 0: that makes no difference
  int line_shift;                    // see Plan
  int tile_cost;
  // If not.
  int num_splits;          // CTAs that share one tile's keys; > 1 needs the workspace and the combine kernel
  int keys_per_split_min;  // a split is at least this long, and a multiple of it
  bool is_short = false;   // kWgmma's kernel for short sequences
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
/// Of a batch-invariant tile that another CTA has begun a CTA has at most so many parts.
constexpr int kCutParts = 12;
constexpr int kWideSharedBytes = 226 * 1024;
constexpr int kMaxPrefixRanges = 16;
/// Rows of K and V up to so long are read by pairs of kv heads.
constexpr int kPairedRowBytes = 256;
/// CTAs of a cluster, at most.
constexpr int kMaxCluster = 16;

/// Twice as many of few columns.
constexpr std::int64_t partial_rows(std::int64_t num_tokens, std::int64_t num_heads, std::int64_t head_dim, int num_sms) {
  return std::min(num_tokens * num_heads * kPartialsPerRow, std::int64_t{kPartialRowsPerSm} * (head_dim <= 64 ? 2 : 1) * num_sms);
}

/// Bytes of partial results (output rows and their two softmax terms) of any call of at most this size, head_dim included.
constexpr std::int64_t workspace_bytes(std::int64_t num_tokens, std::int64_t num_heads, std::int64_t head_dim, int num_sms) {
  const auto of = [&](std::int64_t columns) {
    return partial_rows(num_tokens, num_heads, columns, num_sms) * (columns + 2) * static_cast<std::int64_t>(sizeof(float));
  };
  return std::max(of(head_dim), of(std::min<std::int64_t>(head_dim, 64)));
}

/// CTAs of a variant that an SM holds together, by registers and shared memory.
constexpr int ctas_per_sm(Variant variant, int bucket) {
  switch (variant) {
    case Variant::kMmaSplitKeys8: return bucket < 256 ? 4 : 2;
    case Variant::kMmaSplitRows: return bucket < 256 ? 3 : 2;
    default: return 2;
  }
}

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

inline bool aligned_to_16(const void* pointer) { return reinterpret_cast<std::uintptr_t>(pointer) % 16 == 0; }

/// What keeps the copy engine from K and V as they lie; null: nothing.
inline const char* boxes_obstacle(const AttentionParams& p) {
  const bool paged = p.block_tables != nullptr;
  if (paged ? p.num_blocks == 0 : p.num_kv_tokens == 0) return "there are no keys";
  if (p.num_blocks > std::numeric_limits<std::int32_t>::max() || p.block_size > std::numeric_limits<std::int32_t>::max())
    return "the cache has more than 2^31 blocks or slots in a block";
  const std::int64_t unit = 16 / itemsize(p.kv_dtype);  // elements of 16 bytes
  const auto stride_fits = [&](std::int64_t size, std::int64_t stride) {
    return size <= 1 || (stride > 0 && stride % unit == 0 && stride < std::int64_t{1} << 38);
  };
  if (!aligned_to_16(p.k) || !aligned_to_16(p.v)) return "keys or values do not start at a multiple of 16 bytes";
  const std::int64_t slots = paged ? p.block_size : p.num_kv_tokens, blocks = paged ? p.num_blocks : 1;
  if (!stride_fits(p.num_kv_heads, p.k_head_stride) || !stride_fits(p.num_kv_heads, p.v_head_stride) ||
      !stride_fits(slots, p.k_token_stride) || !stride_fits(slots, p.v_token_stride) || !stride_fits(blocks, p.k_block_stride) ||
      !stride_fits(blocks, p.v_block_stride))
    return "a stride of keys or values is not a positive multiple of 16 bytes below 2^38 elements, which the copy engine needs";
  return nullptr;
}

/// What keeps a decode from attend_to_parts (mma_cluster_parts.cuh); null: nothing.
inline const char* parts_obstacle(const AttentionParams& p) {
  const std::int64_t row_bytes = p.head_dim * itemsize(p.kv_dtype);
  if (p.head_dim % 16 != 0) return "head_dim is no multiple of 16";
  if (!aligned_to_16(p.q) || p.q_token_stride % 8 != 0 || p.q_head_stride % 8 != 0)
    return "a row of q does not start at a multiple of 16 bytes";
  if (row_bytes % 128 != 0 && row_bytes > (itemsize(p.kv_dtype) == 1 ? 128 : 64))
    return "rows end within 128 bytes, which boxes are slow with";
  if (row_bytes <= 64 && p.block_size % 2 != 0) return "block_size is odd, and one row of a block is no multiple of 128 bytes";
  return boxes_obstacle(p);
}

/// What keeps Hopper's kernel from a call on a Hopper; null: nothing. It copies K and V by boxes and
/// q and out by 16 bytes.
inline const char* wgmma_obstacle(const AttentionParams& p) {
  if (itemsize(p.dtype) != 2) return "q has more than 16 bits";
  if (p.float8_queries && p.kv_dtype != DType::kFloat8E4M3FN) return "q is float8_e4m3fn and keys and values are not";
  if (p.block_tables != nullptr && p.num_blocks > 0 && p.block_size % 8 != 0) return "block_size is not a multiple of 8";
  const std::int64_t q_unit = p.float8_queries ? 16 : 8;  // elements of 16 bytes
  if (!aligned_to_16(p.q) || !aligned_to_16(p.out)) return "q or out does not start at a multiple of 16 bytes";
  if (p.q_token_stride % q_unit != 0 || p.q_head_stride % q_unit != 0 || p.out_token_stride % 8 != 0 || p.out_head_stride % 8 != 0)
    return "a stride of q or out is not a multiple of 16 bytes";
  return boxes_obstacle(p);
}

/// What keeps a variant from a call; null: nothing.
inline const char* obstacle(Variant variant, const AttentionParams& params, const DeviceProperties& device, bool has_wgmma) {
  if ((variant == Variant::kSimt) != (params.dtype == DType::kFloat32))
    return variant == Variant::kSimt ? "q is not float32" : "q is float32";
  const bool small_shared = device.max_shared_bytes_per_cta < kLargeSharedBytes;
  const int bucket = head_dim_bucket(variant, params.head_dim);
  if (small_shared && needs_large_shared(variant, bucket, itemsize(params.kv_dtype)))
    return "the device has too little shared memory for it at this head_dim";
  switch (variant) {
    case Variant::kWgmma: return has_wgmma ? wgmma_obstacle(params) : "the device is no Hopper, or this build has no code for it";
    case Variant::kMmaSplitRows128: return bucket == 256 ? "head_dim is over 128" : nullptr;
    case Variant::kMmaSplitKeys8Small: return bucket == 256 ? nullptr : "head_dim is at most 128";
    case Variant::kMmaSplitRowsSmall:
      return bucket != 256 ? "head_dim is at most 128" : itemsize(params.kv_dtype) != 2 ? "keys and values are not 16-bit" : nullptr;
    default: return nullptr;
  }
}

/// Whether tiles, each of whose keys are one CTA's or a fixed number of CTAs', are enough for all SMs. Where a sequence may be very long, others
/// may be short, and more tiles are needed.
inline bool are_enough_tiles(const AttentionParams& params, const DeviceProperties& device, std::int64_t num_tiles) {
  constexpr std::int64_t kLong = 16384;
  return key_capacity(params) <= kLong ? num_tiles * 9 >= std::int64_t{4} * device.num_sms : num_tiles >= std::int64_t{2} * device.num_sms;
}

/// Whether prefill's kernels are faster than two of kMmaSplitKeys16's tiles, each of which reads all keys: for drafts of 17 to 32 rows. 8-bit keys,
/// which every warp widens anew for 64 rows of which most are empty, are not worth it until tiles are many.
inline bool prefers_prefill(const AttentionParams& params, const DeviceProperties& device, std::int64_t rows) {
  const std::int64_t group = params.num_heads / params.num_kv_heads, num_tiles = params.num_seqs * params.num_kv_heads;
  const std::int64_t drafts = params.num_tokens / params.num_seqs;  // of a sequence, at least on average
  if (params.block_tables == nullptr || drafts < 2 || drafts * group <= 16 || rows > 32) return false;
  if (itemsize(params.kv_dtype) == 2) return true;
  if (params.head_dim <= 128) return num_tiles >= std::int64_t{4} * device.num_sms;
  return key_capacity(params) <= 4096 || are_enough_tiles(params, device, num_tiles);
}

/// What speaks against Hopper's kernel for a call that it can do; null: nothing. `rows` is what a sequence has at most.
inline const char* wgmma_drawback(const AttentionParams& params, const DeviceProperties& device, std::int64_t rows) {
  const std::int64_t tile_rows = wgmma_rows(params), num_sms = device.num_sms;
  const std::int64_t num_seqs =
      std::min(params.num_seqs, ceil_div(params.num_tokens * (params.num_heads / params.num_kv_heads), std::max<std::int64_t>(rows, 1)));
  const std::int64_t num_tiles = num_seqs * params.num_kv_heads * ceil_div(rows, tile_rows);
  // Keys are what takes the time of tiles that are mostly empty, so that these are worth as much; over more than 128 columns of 8 bits it is
  // widening them.
  const bool reads_enough = are_enough_tiles(params, device, num_tiles) && (itemsize(params.kv_dtype) == 2 || params.head_dim <= 128);
  if (params.num_tokens * params.num_heads * 3 < tile_rows * num_sms && !reads_enough)
    return "its tiles, if full, would be fewer than a third of the SMs, and it does not split the keys of a tile";
  if (params.head_dim <= 64 && params.block_tables != nullptr && rows * 2 <= tile_rows && num_tiles > num_sms)
    return "its tiles would be more than SMs, and half empty or more";
  return nullptr;
}

/// The variant for a call, and in `why`, unless null, the reasons. `rows` is the number of packed rows of a sequence.
inline Variant choose_variant(const AttentionParams& params, const DeviceProperties& device, bool has_wgmma, std::int64_t rows,
                              std::vector<std::string>* why) {
  // No text is made where nobody asks.
  const auto because = [&](const auto&... parts) {
    if (why != nullptr) why->push_back((std::string() + ... + parts));
  };
  const auto prevents = [&](Variant variant) { return obstacle(variant, params, device, has_wgmma); };
  if (params.variant) {
    if (const char* reason = prevents(*params.variant))
      throw UnsupportedError(std::string("[") + (params.block_tables != nullptr ? "paged_attention" : "attention") +
                             "] variant: expected one that can run, got " + name(*params.variant) + ": " + reason);
    because("it was asked for by variant=");
    return *params.variant;
  }
  if (params.dtype == DType::kFloat32) {
    because("q is float32, which tensor cores would round");
    return Variant::kSimt;
  }
  if (params.batch_invariant) {
    // By what is the same for every batch.
    because("batch_invariant: the kernel, and where it divides keys, do not depend on the batch");
    for (const Variant variant : {Variant::kMmaSplitKeys16, Variant::kMmaSplitKeys8})
      if (prevents(variant) == nullptr && (variant == Variant::kMmaSplitKeys8 || params.num_heads / params.num_kv_heads > 8))
        return variant;
    return Variant::kMmaSplitKeys8Small;
  }
  if (why != nullptr) because(std::to_string(rows), " rows of each sequence and kv head (queries times heads of the group)");
  const bool prefill = rows > 32 || prefers_prefill(params, device, rows);
  Variant variant = prefill ? Variant::kMmaSplitRows : rows <= 8 ? Variant::kMmaSplitKeys8 : Variant::kMmaSplitKeys16;
  if (!prefill)
    because("up to 32 rows the warps take turns at the keys: the larger tiles of mma_split_rows and wgmma would be mostly empty");
  if (prefill && rows <= 32) because("over 16 rows mma_split_keys_16 would read these keys twice");
  if (const char* reason = prevents(variant)) {
    because("not ", name(variant), ": ", reason);
    if (variant == Variant::kMmaSplitRows) return Variant::kMmaSplitRowsSmall;
    variant = variant == Variant::kMmaSplitKeys16 && prevents(Variant::kMmaSplitKeys8) == nullptr ? Variant::kMmaSplitKeys8
                                                                                                  : Variant::kMmaSplitKeys8Small;
  }
  if (variant != Variant::kMmaSplitRows) return variant;
  const std::int64_t all_rows = params.num_tokens * params.num_heads;
  if (const char* reason = prevents(Variant::kWgmma)) {
    because("not wgmma: ", reason);
  } else if (const char* drawback = wgmma_drawback(params, device, rows)) {
    because("not wgmma: ", drawback);
  } else {
    return Variant::kWgmma;
  }
  if (const char* reason = prevents(Variant::kMmaSplitRows128)) {
    because("not mma_split_rows_128: ", reason);
  } else if (rows <= 64 || all_rows < std::int64_t{2 * 128} * device.num_sms) {
    because("not mma_split_rows_128: its tiles would be fewer than two for each SM, or half empty");
  } else {
    return Variant::kMmaSplitRows128;
  }
  if (device.max_shared_bytes_per_cta < 2 * kLargeSharedBytes && prevents(Variant::kMmaSplitRowsSmall) == nullptr) {
    because("not mma_split_rows: an SM has too little shared memory for two of its CTAs at this head_dim");
    return Variant::kMmaSplitRowsSmall;
  }
  return variant;
}

/// How many CTAs share a tile if lengths are alike; 0: all keys are shared evenly at once. `per_sm` of them run on an SM together.
constexpr int choose_cluster(std::int64_t num_tiles, std::int64_t num_sms, std::int64_t per_sm, bool long_rows) {
  const std::int64_t places = num_sms * per_sm, size = std::min<std::int64_t>(places / num_tiles, kMaxCluster);
  if (num_tiles * 2 <= num_sms) return static_cast<int>(size);
  // Where tiles are many, short rows are better read two heads at a time, and places should not be left empty.
  return long_rows && num_tiles * size * 10 >= places * 9 ? static_cast<int>(size) : 0;
}

/// How decode takes two neighbouring kv heads as one. `num_head_tiles` are those of heads one by one.
inline Pairing choose_pairing(const AttentionParams& params, std::int64_t num_head_tiles, std::int64_t num_sms) {
  const std::int64_t group = params.num_heads / params.num_kv_heads;
  if (params.num_kv_heads % 2 != 0 || params.k_head_stride != params.head_dim || params.v_head_stride != params.head_dim ||
      params.block_tables == nullptr || params.query_start_loc != nullptr || params.shared_queries > 0 || params.batch_invariant ||
      params.float8_queries)
    return Pairing::kNone;
  if (params.head_dim == 64 && group <= 4) return Pairing::kColumns;
  const std::int64_t row_bytes = params.head_dim * itemsize(params.kv_dtype);
  if (group > 8 || params.head_dim <= 64 || row_bytes > kPairedRowBytes || params.mask != nullptr) return Pairing::kNone;
  // Whole lines are long enough by themselves; but half of the tiles may be few enough for all to run at once. While tiles are few, clusters and
  // CTAs of more warps have them one by one.
  if (params.head_dim > 128 && num_head_tiles <= (row_bytes % 128 == 0 ? ctas_per_sm(Variant::kMmaSplitKeys8, 256) : 1) * num_sms)
    return Pairing::kNone;
  return Pairing::kWarps;
}

/// Kv heads that the warps of a cluster read together: rows of up to 128 bytes are short pieces of memory by themselves.
constexpr int heads_of_team(Pairing pairing, std::int64_t row_bytes) { return pairing != Pairing::kNone && row_bytes <= 128 ? 2 : 1; }

/// Gives a decode its clusters, if it may have some, and the pairing that goes with them; `config` has the one without. `num_head_tiles` are those of
/// heads one by one.
inline void choose_clusters(const AttentionParams& params, const DeviceProperties& device, std::int64_t num_head_tiles, Config& config,
                            std::vector<std::string>* why) {
  const std::int64_t per_sm = ctas_per_sm(config.variant, config.head_dim_bucket) / 2, places = device.num_sms * per_sm;
  const std::int64_t item = itemsize(params.kv_dtype), row_bytes = params.head_dim * item, padded_row_bytes = config.head_dim_bucket * item;
  const bool long_rows = row_bytes % 128 == 0;
  config.cluster = choose_cluster(num_head_tiles, device.num_sms, per_sm, long_rows);
  config.cluster_heads = 1;
  if (params.num_seqs == 1 && num_head_tiles < kMaxCluster && config.head_dim_bucket < 256) config.lone_cluster = config.cluster;
  // Boxes of 16-bit rows that end within 128 bytes are slow; stretches are not.
  if (item == 2 && row_bytes > 128 && !long_rows && num_head_tiles > 32) config.cluster = 0;

  const int team = heads_of_team(config.pairing, padded_row_bytes);
  if (team > 1 && (config.cluster > 0 || long_rows)) {
    const std::int64_t tiles = num_head_tiles / team;
    const int of_team = choose_cluster(tiles, device.num_sms, per_sm, long_rows);
    bool in_teams = true;
    if (config.lone_cluster == 0) {
      // Not a CTA to each of many tiles: lengths that are not alike would have stretches of wide CTAs then. Where heads one by one have clusters, too,
      // larger ones have more to put together: not where a CTA has few keys, or so few tiles leave places empty.
      in_teams = config.cluster == 0 ? tiles * 2 <= device.num_sms
                                     : tiles * kMaxCluster * 10 >= places * 9 && key_capacity(params) >= of_team * std::int64_t{256};
      in_teams = in_teams && of_team > 0;
    }
    if (in_teams) {
      config.cluster_heads = team;
      config.cluster = of_team;
    } else if (config.cluster > 0) {
      config.pairing = Pairing::kNone;
    }
  }

  const char* reason = config.cluster > 0 ? boxes_obstacle(params) : nullptr;
  if (config.cluster > 0 && padded_row_bytes < 128 && params.block_size % 2 != 0)
    reason = "block_size is odd, and one row of a block is no multiple of 128 bytes";
  if (reason != nullptr) {
    config.cluster = config.lone_cluster = 0;
    config.pairing = choose_pairing(params, num_head_tiles, device.num_sms);
    if (why != nullptr) why->push_back(std::string("no clusters of CTAs for a tile: ") + reason);
  }
}

/// CTAs to a tile of batch-invariant decode where lengths turn out alike, 0 if the line of keys is faster. There are places for so many at a time.
inline int choose_parts_cluster(const AttentionParams& params, const DeviceProperties& device, std::int64_t num_tiles,
                                std::int64_t places) {
  // One sequence gained, and 32 and more; 8 of 4096 keys take 74 us instead of the line's 71, over 8-bit keys 55 instead of 50 (H100).
  if (params.num_seqs > 1 && params.num_seqs < 32) return 0;
  int parts = 1;
  while (parts < kMaxCluster && part_begin(parts) < key_capacity(params)) ++parts;
  const std::int64_t size = std::min<std::int64_t>(places / num_tiles, parts);
  // Whole tiles, one after the other, if they fill their last round.
  if (size == 0) return num_tiles * 10 >= ceil_div(num_tiles, places) * places * 9 ? 1 : 0;
  const bool fills = num_tiles * size * 10 >= places * 9;
  return size == parts || num_tiles * 2 <= device.num_sms || fills ? static_cast<int>(size) : 0;
}

/// `why`, unless null, gets the reasons for the variant. `rows_of_sequence` is what to choose for; 0: the mean.
inline Config choose_config(const AttentionParams& params, const DeviceProperties& device, bool has_wgmma,
                            std::vector<std::string>* why = nullptr, std::int64_t rows_of_sequence = 0) {
  const std::int64_t group = params.num_heads / params.num_kv_heads;
  const bool ragged = params.query_start_loc != nullptr;
  const std::int64_t query_len =
      params.shared_queries > 0 || ragged || params.block_tables == nullptr ? ceil_div(params.num_tokens, params.num_seqs) : 1;

  Config config{};
  config.variant = choose_variant(params, device, has_wgmma, rows_of_sequence > 0 ? rows_of_sequence : query_len * group, why);
  const bool hopper = config.variant == Variant::kWgmma;
  config.head_dim_bucket =
      hopper ? wgmma_head_dim_bucket(params.head_dim, itemsize(params.kv_dtype) == 1) : head_dim_bucket(config.variant, params.head_dim);
  config.is_short = hopper && wgmma_is_short(params);
  const int rows = config.tile_rows = hopper ? wgmma_rows(params) : tile_rows(config.variant);

  // Sequence s owns the tiles from floor(query_start_loc[s] * group / rows) + s on: never too few, and found by one search.
  config.tiles_per_seq = ragged ? 0 : ceil_div(query_len * group, rows);
  config.num_tiles = ragged ? params.num_tokens * group / rows + params.num_seqs : config.tiles_per_seq * params.num_seqs;

  const std::int64_t num_head_tiles = config.num_tiles * params.num_kv_heads;
  if (config.variant == Variant::kMmaSplitKeys8) config.pairing = choose_pairing(params, num_head_tiles, device.num_sms);
  const bool may_have_clusters = has_wgmma && config.variant == Variant::kMmaSplitKeys8 && params.block_tables != nullptr && !ragged &&
                                 params.shared_queries == 0 && !params.float8_queries && params.mask == nullptr && group <= rows &&
                                 key_capacity(params) < 1 << 30;
  if (may_have_clusters && !params.batch_invariant) choose_clusters(params, device, num_head_tiles, config, why);
  // Heads of 80 to 112 columns come as 128 with zeros, and are worth it for the sake of clusters alone, which these kernels have, too.
  config.by_boxes = has_wgmma && config.pairing == Pairing::kWarps &&
                    has_box_stretches(itemsize(params.kv_dtype), config.head_dim_bucket) && boxes_obstacle(params) == nullptr &&
                    (config.cluster > 0 || (params.head_dim == 128 && params.block_size % 8 == 0));
  if (config.pairing == Pairing::kColumns) config.head_dim_bucket = 128;
  if (config.pairing == Pairing::kWarps) config.tile_rows = 16;
  const std::int64_t num_ctas = config.num_tiles * (config.pairing != Pairing::kNone ? params.num_kv_heads / 2 : params.num_kv_heads);
  const std::int64_t limit = std::numeric_limits<std::int32_t>::max();
  if (num_ctas > limit || params.num_tokens * group > limit - 64)
    throw UnsupportedError("[attention] num_tokens * num_heads: expected less than 2^31 query rows in one call");

  config.num_splits = 1;
  config.keys_per_split_min = 1;
  if (hopper || (params.batch_invariant && config.variant == Variant::kSimt)) return config;
  if (shares_keys(config.variant)) {
    // CTAs of more warps where tiles are so few that each has many parts: then it has fewer.
    config.wide = !params.batch_invariant && config.variant != Variant::kMmaSplitKeys8Small &&
                  (config.cluster > 0 || (num_ctas * 2 <= device.num_sms && key_capacity(params) > 2048) ||
                   (config.pairing == Pairing::kWarps && itemsize(params.kv_dtype) == 2 && num_ctas <= 4 * device.num_sms) ||
                   (config.by_boxes && num_ctas <= 2 * device.num_sms)) &&
                  device.max_shared_bytes_per_cta >= kWideSharedBytes;
    const int per_sm = ctas_per_sm(config.variant, config.head_dim_bucket) / (config.wide ? 2 : 1);
    config.tile_cost = tile_cost(config.wide, num_ctas);
    // Of batch-invariant decode where lengths are alike: kv heads of a tile, and how many warps have those.
    const std::int64_t padded_row_bytes = config.head_dim_bucket * itemsize(params.kv_dtype);
    const int heads = heads_of_parts(padded_row_bytes), warps = warps_of_parts(padded_row_bytes);
    config.slots_per_cta = params.batch_invariant ? (kCutParts + 1) * (heads / warps) : 2;
    const std::int64_t fitting =
        partial_rows(params.num_tokens, params.num_heads, params.head_dim, device.num_sms) / (config.slots_per_cta * config.tile_rows);
    // Places on the line are 31 bits, and its tiles alone may take half of them.
    constexpr std::int64_t kMaxTiles = (std::int64_t{1} << 29) / 5;
    if (num_ctas > kMaxTiles)
      throw UnsupportedError("[attention] num_seqs * num_kv_heads: expected at most " + std::to_string(kMaxTiles) +
                             " tiles of query rows in one call, got " + std::to_string(num_ctas));
    const auto longest = static_cast<double>(num_ctas) * (static_cast<double>(key_capacity(params)) / 16 + config.tile_cost + 1);
    while (std::ldexp(longest, -config.line_shift) + static_cast<double>(num_ctas) * (config.tile_cost + 1) > 1 << 30) ++config.line_shift;
    // A CTA has 64 keys or more.
    const std::int64_t useful = num_ctas * (key_capacity(params) / 64 + 2);
    config.num_ctas = static_cast<int>(
        std::max<std::int64_t>(std::min({std::int64_t{per_sm} * device.num_sms, std::int64_t{kMaxCtas}, fitting, useful}), 1));
    if (!ragged && params.block_tables != nullptr) {
      // More parts of a tile would cost more to put together. Not if more than a tenth of the CTAs were left without work.
      constexpr std::int64_t kMaxParts = 32;
      const std::int64_t parts = std::clamp<std::int64_t>(config.num_ctas / num_ctas, 1, kMaxParts);
      const std::int64_t tiles = ceil_div(num_ctas, config.num_ctas);
      if (tiles > 1 ? num_ctas * 10 >= tiles * config.num_ctas * 9
                    : parts == kMaxParts || num_ctas * parts * 10 >= std::int64_t{config.num_ctas} * 9) {
        config.ctas_per_tile = static_cast<int>(parts);
        config.tiles_per_cta = static_cast<int>(tiles);
      }
    }
    const bool may_have_parts = may_have_clusters && params.batch_invariant && params.num_kv_heads % heads == 0 && config.num_ctas >= warps;
    const char* const obstacle = may_have_parts ? parts_obstacle(params) : nullptr;
    if (obstacle != nullptr && why != nullptr)
      why->push_back(std::string("no kernel that has a tile's parts one after the other: ") + obstacle);
    if (may_have_parts && obstacle == nullptr) {
      config.cluster = choose_parts_cluster(params, device, num_ctas / heads, config.num_ctas / warps);
      config.cluster_heads = heads;
      // Whole tiles, one after the other.
      if (config.cluster > 0) config.tiles_per_cta = static_cast<int>(ceil_div(num_ctas / heads, config.num_ctas / warps));
    }
    return config;
  }
  config.keys_per_split_min = 256;

  const std::int64_t max_splits =
      std::min({std::int64_t{kMaxSplits}, ceil_div(std::max<std::int64_t>(key_capacity(params), 1), config.keys_per_split_min),
                std::int64_t{kPartialRowsPerSm} * device.num_sms / (num_ctas * rows)});
  config.num_splits = choose_num_splits(num_ctas, device.num_sms, ctas_per_sm(config.variant, config.head_dim_bucket), max_splits);
  return config;
}

/// The launches of a call: one, or one for the sequences of few rows (decode) and one for those of many (prefill), each of which leaves out
/// the other's sequences on the device.
struct Launches {
  int count = 0;
  Config configs[2] = {};
};

inline Launches choose_launches(const AttentionParams& params, const DeviceProperties& device, bool has_wgmma,
                                std::vector<std::string>* why = nullptr) {
  Launches launches;
  const std::int64_t group = params.num_heads / params.num_kv_heads;
  // What the kernels of few rows do well: two of the smaller tiles to a sequence.
  const std::int64_t few = group <= 8 ? 16 : 32;
  const std::int64_t mean_rows = params.num_tokens * group / params.num_seqs;
  // Sequences of equally few queries (drafts to verify) are one launch's; what the lengths are the host cannot know.
  const bool alike = params.num_tokens % params.num_seqs == 0 && mean_rows <= 32;
  const bool may_be_mixed = params.query_start_loc != nullptr && params.block_tables != nullptr && params.num_seqs > 1 &&
                            params.dtype != DType::kFloat32 && !params.variant && !params.batch_invariant && group <= few && !alike &&
                            (params.num_tokens - params.num_seqs) * group > 128;
  if (!may_be_mixed) {
    launches.configs[launches.count++] = choose_config(params, device, has_wgmma, why);
    return launches;
  }
  // As many rows as one sequence can have.
  std::vector<std::string> why_many;
  Config prefill =
      choose_config(params, device, has_wgmma, why != nullptr ? &why_many : nullptr, (params.num_tokens - params.num_seqs + 1) * group);
  // Where tiles are few, no sequence may be very long, as all of a tile's keys are one CTA's there. 8-bit keys are widened for whole tiles, and
  // decodes then wait for that.
  const std::int64_t capacity = key_capacity(params), tiles_needed = capacity <= 4096 ? 1 : capacity <= 8192 ? 2 : 4;  // for each SM
  if (mean_rows > 32 && prefill.variant == Variant::kWgmma && itemsize(params.kv_dtype) == 2 &&
      params.num_seqs * params.num_kv_heads >= tiles_needed * device.num_sms) {
    // Then the reading of decodes goes on beside the prefills' products.
    if (why != nullptr) why->insert(why->end(), why_many.begin(), why_many.end());
    launches.configs[launches.count++] = prefill;
    return launches;
  }
  if (why != nullptr)
    why->push_back("the batch may hold decodes and prefills: sequences of up to " + std::to_string(few) +
                   " rows for each kv head are one launch's, the others another's");
  AttentionParams of_few = params;
  of_few.variant = group <= 8 ? Variant::kMmaSplitKeys8 : Variant::kMmaSplitKeys16;
  for (const Variant smaller : {Variant::kMmaSplitKeys8, Variant::kMmaSplitKeys8Small})
    if (obstacle(*of_few.variant, params, device, has_wgmma) != nullptr) of_few.variant = smaller;
  Config decode = choose_config(of_few, device, has_wgmma);
  decode.max_rows = static_cast<int>(few);
  prefill.min_rows = decode.max_rows + 1;
  if (why != nullptr) {
    why->push_back(std::string(name(decode.variant)) + " for the sequences of few rows");
    why->insert(why->end(), why_many.begin(), why_many.end());
  }
  launches.configs[launches.count++] = decode;
  launches.configs[launches.count++] = prefill;
  return launches;
}

/// Into how many ranges of keys, each with its own result, the pass over a shared prefix is divided, so that Hopper's kernel, which does
/// not split the keys of a tile, has tiles for all SMs; 0 if another kernel takes it. `pass` is the undivided one.
inline int choose_prefix_ranges(const AttentionParams& pass, const DeviceProperties& device, bool has_wgmma) {
  constexpr std::int64_t kMinKeys = 512;
  const std::int64_t rows = pass.shared_queries * (pass.num_heads / pass.num_kv_heads);
  if (rows <= 32 || obstacle(Variant::kWgmma, pass, device, has_wgmma) != nullptr) return 0;
  const std::int64_t tiles = ceil_div(rows, wgmma_rows(pass)) * pass.num_kv_heads;
  const auto cost = [&](std::int64_t ranges) {  // rounds of the device, as parts of the whole; and each range has a price
    return static_cast<double>(ceil_div(tiles * ranges, device.num_sms)) / static_cast<double>(ranges) *
           (1.0 + 0.02 * static_cast<double>(ranges));
  };
  int best = 1;
  for (int ranges = 2; ranges <= kMaxPrefixRanges && tiles * ranges <= 2 * device.num_sms && pass.total_keys >= ranges * kMinKeys; ++ranges)
    if (cost(ranges) < cost(best)) best = ranges;
  return best;
}

/// Rows of out and lse of the pass over a shared prefix for a batch of at most this size.
constexpr std::int64_t prefix_rows(std::int64_t num_tokens, std::int64_t num_heads, int num_sms) {
  // More than one range: at most two tiles for each SM.
  return std::max(num_tokens * num_heads, std::min(num_tokens * num_heads * kMaxPrefixRanges, std::int64_t{2 * 192} * num_sms));
}

}  // namespace quire::cuda::attn
