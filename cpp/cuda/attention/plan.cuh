// What every attention kernel shares: launch parameters, which queries and keys a CTA has, and how its rows are finished.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <bit>
#include <cfloat>
#include <climits>
#include <cstdint>

#include "core/error_word.h"
#include "cuda/attention/config.h"
#include "ops/attention.h"

namespace quire::cuda::attn {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

/// Division by a run-time constant, for dividends below 2^31.
struct Divisor {
  std::uint32_t divisor, multiplier, shift;

  static Divisor make(std::int64_t value) {
    const auto d = static_cast<std::uint32_t>(std::min<std::int64_t>(value, std::numeric_limits<std::int32_t>::max()));
    const auto shift = static_cast<std::uint32_t>(std::bit_width(d - 1));
    const std::uint64_t multiplier = ((std::uint64_t{1} << 32) * ((std::uint64_t{1} << shift) - d)) / d + 1;
    return Divisor{d, static_cast<std::uint32_t>(multiplier), shift};
  }
  __device__ int quotient(int n) const {
    const auto dividend = static_cast<std::uint32_t>(n);
    return static_cast<int>((__umulhi(dividend, multiplier) + dividend) >> shift);
  }
  __device__ int remainder(int n, int quotient_of_n) const { return n - quotient_of_n * static_cast<int>(divisor); }
};

/// Everything a kernel needs, passed by value.
struct Plan {
  AttentionParams params;
  Divisor group;       // query heads of a kv head, or of two that are one (Config::paired)
  Divisor kv_group;    // of a kv head
  Divisor block_size;  // paged only
  ErrorWord* error_word;
  // [num_splits, num_tokens * num_heads, head_dim], or [CTAs, slots_per_cta, tile_rows, head_dim]; not normalised.
  float* partial_out;
  float2* partial_stats;  // the same without head_dim: largest score in units of log2, sum of exponentials
  std::int64_t num_rows;  // num_tokens * num_heads
  int num_splits;
  int keys_per_split_min;
  int tile_rows;
  Divisor rows_of_tile;
  int min_rows, max_rows;  // sequences with another number of packed rows are not this launch's
  // For kernels that share the batch's keys on the device (share.cuh).
  unsigned* counters;     // [CTAs], zero between launches: units of a shared tile that are done; at the first CTA that has a part of it
  int slots_per_cta;      // of partial results, each of tile_rows rows
  int key_span;           // no tile has more keys
  // If all tiles turn out to have one length: of one of these there are several. tiles_per_cta 0: they are shared by length whatever they are.
  Divisor ctas_per_tile;
  int tiles_per_cta;
  // In clusters: of sequences up to so long keys leave the L2 cache to what is there.
  int read_once_keys;
  Divisor tiles_of_seq, kv_heads;  // of all kv heads; how many of those there are
  Divisor cluster;  // CTAs of a cluster, if there is one to a tile (mma_cluster_keys.cuh)
  bool in_clusters;
  int num_ctas;  // that share keys
  int tile_cost;  // what a tile takes besides its keys, on the line
  int line_shift;  // places on the line are counted in units of 2^line_shift steps
  int read_once_stretch;  // by boxes: of stretches up to so long keys leave the L2 cache to what is there
  bool batch_invariant;
  int num_tiles;  // per kv head
  int tiles_per_seq;  // 0 with query_start_loc
  Divisor tiles_of_each_seq;  // the same, but 1
  int key_capacity;
  int kv_alignment;  // of every K and V row, in bytes: 1, 2, 4, 8 or 16
  // With kv_alignment 16, rows of whole chunks of 16 bytes, and every offset below 2^32 chunks, strides in such chunks: {block, token}.
  bool chunk_strides_exist;
  uint2 k_chunk_strides, v_chunk_strides;
  bool groups_exist;  // the same, and 8 keys from a multiple of 8 on are never in two blocks
  int q_alignment;  // of every row of q
  bool out_aligned;  // every row of out is aligned to 16 bytes
  OpId op;
};

/// One CTA's share: `num_rows` packed rows of one sequence and the keys that any of them sees.
struct Tile {
  int seq;
  int first_token;  // the sequence's first row of q
  int query_len;
  int kv_len;
  int row_begin;  // packed row within the sequence
  int num_rows;
  int key_begin, key_end;
  int kv_first_token;  // not paged: the sequence's first row of k
};

/// Keys that a query sees: [begin, end), empty if end <= begin.
struct KeyRange {
  int begin, end;
};

__device__ __forceinline__ KeyRange visible_keys(const AttentionParams& p, const Tile& tile, int token) {
  // Lengths, windows and numbers of rows are below 2^30.
  const int position = tile.kv_len - tile.query_len + token;
  int begin = 0, end = tile.kv_len;
  if (p.window_left >= 0) begin = max(begin, position - static_cast<int>(p.window_left));
  if (p.causal) end = min(end, position + 1);
  if (p.window_right >= 0) end = min(end, position + static_cast<int>(p.window_right) + 1);
  return KeyRange{begin, max(end, 0)};
}

/// The key that bit 0 of the mask's rows stands for, or one as far from all keys and bits, whose numbers are below 2^30.
__device__ __forceinline__ int mask_first_key(const AttentionParams& p, const Tile& tile) {
  constexpr int kFar = 1 << 30;
  return p.mask_start != nullptr ? min(max(p.mask_start[tile.seq], -kFar), kFar) : tile.kv_len - tile.query_len;
}

/// 32 bits of a mask row from bit `first` on, which may be negative; bits outside the row are ones.
__device__ __forceinline__ std::uint32_t mask_bits(const std::uint8_t* row, int num_bytes, int first) {
  const int byte = first >> 3;
  std::uint32_t bits = 0, last = 0xff;
#pragma unroll
  for (int i = 0; i < 5; ++i) {
    std::uint32_t value = 0xff;
    if (byte + i >= 0 && byte + i < num_bytes) value = row[byte + i];
    if (i < 4) {
      bits |= value << (8 * i);
    } else {
      last = value;
    }
  }
  return __funnelshift_r(bits, last, static_cast<unsigned>(first & 7));
}

/// Entry `index` of a start_loc array [count + 1] as its running maximum within [0, limit]. A whole warp takes part.
__device__ inline int monotonic_entry(const std::int32_t* start_loc, std::int64_t index, int limit) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  int result = 0;
  for (std::int64_t i = lane; i <= index; i += 32) result = max(result, min(start_loc[i], limit));
  return __reduce_max_sync(kAllLanes, result);
}

/// Finds the sequence that owns a tile, by a scan of query_start_loc's running maximum. A whole warp takes part.
__device__ inline bool find_sequence(const Plan& plan, int tile_idx, Tile& tile) {
  const AttentionParams& p = plan.params;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int limit = static_cast<int>(p.num_tokens);
  const auto num_seqs = static_cast<int>(p.num_seqs);
  const auto first_tile = [&](int loc, int seq) {  // loc times the group is below 2^31
    return static_cast<std::int64_t>(plan.rows_of_tile.quotient(loc * static_cast<int>(plan.group.divisor))) + seq;
  };
  const std::int32_t first = p.query_start_loc[0];
  int carry = min(max(first, 0), limit);
  if (first != carry && lane == 0) record_error(plan.error_word, plan.op, ArgId::kQueryStartLoc, 0, first);

  constexpr int kChunks = 4;
  for (int base = 1; base <= num_seqs; base += 32 * kChunks) {
    std::int32_t raw[kChunks];
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int entry = base + 32 * c + lane;
      raw[c] = entry <= num_seqs ? p.query_start_loc[entry] : limit;
    }
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int entry = base + 32 * c + lane;
      int loc = raw[c];
      int previous_raw = __shfl_up_sync(kAllLanes, loc, 1);
      if (lane == 0) previous_raw = carry;
      if (!__all_sync(kAllLanes, loc >= previous_raw && loc <= limit)) {
        loc = min(max(loc, 0), limit);
#pragma unroll
        for (int offset = 1; offset < 32; offset *= 2) {
          const int before = __shfl_up_sync(kAllLanes, loc, offset);
          if (lane >= offset) loc = max(loc, before);
        }
        loc = max(loc, carry);
        if (entry <= num_seqs && raw[c] != loc) record_error(plan.error_word, plan.op, ArgId::kQueryStartLoc, entry, raw[c]);
      }
      const unsigned later = __ballot_sync(kAllLanes, entry <= num_seqs && first_tile(loc, entry) > tile_idx);
      if (later != 0) {
        const int found = __ffs(static_cast<int>(later)) - 1;
        const int end = __shfl_sync(kAllLanes, loc, found);
        const int previous = __shfl_sync(kAllLanes, loc, max(found - 1, 0));
        tile.seq = base + 32 * c + found - 1;
        tile.first_token = found == 0 ? carry : previous;
        tile.query_len = end - tile.first_token;
        tile.row_begin = static_cast<int>(tile_idx - first_tile(tile.first_token, tile.seq)) * plan.tile_rows;
        return tile.row_begin >= 0;  // negative: rows before the first sequence
      }
      carry = __shfl_sync(kAllLanes, loc, 31);
    }
  }
  return false;
}

/// The tile's first and last key that every row of it sees, up to the mask's first; keys outside need to be looked at.
struct FullRange {
  int begin, end;
};

/// Fills in the rows from row_begin on, up to tile_rows of them, and the keys that they see.
__device__ __forceinline__ FullRange finish_tile(const Plan& plan, Tile& tile, int tile_rows) {
  tile.num_rows = min(tile_rows, tile.query_len * static_cast<int>(plan.group.divisor) - tile.row_begin);
  const KeyRange of_first = visible_keys(plan.params, tile, plan.group.quotient(tile.row_begin));
  const KeyRange of_last = visible_keys(plan.params, tile, plan.group.quotient(tile.row_begin + tile.num_rows - 1));
  tile.key_begin = of_first.begin;
  tile.key_end = of_last.end;
  if (tile.key_end <= tile.key_begin) tile.key_begin = tile.key_end = 0;
  FullRange full{of_last.begin, of_first.end};
  if (plan.params.mask != nullptr) full.end = min(full.end, max(mask_first_key(plan.params, tile), 0));
  return full;
}

/// What finish_tile returns, once more.
__device__ __forceinline__ FullRange full_range(const Plan& plan, const Tile& tile) {
  Tile copy = tile;
  return finish_tile(plan, copy, plan.tile_rows);
}

/// Without query_start_loc.
__device__ __forceinline__ int queries_per_sequence(const AttentionParams& p) {
  return static_cast<int>(p.shared_queries > 0 ? p.shared_queries : p.block_tables != nullptr ? 1 : p.num_tokens);
}

/// A sequence's number of keys without kv_start_loc; `records` reports one out of range.
__device__ __forceinline__ int sequence_keys(const Plan& plan, int seq, bool records) {
  const AttentionParams& p = plan.params;
  if (p.shared_queries > 0) {
    const std::int64_t before = static_cast<std::int64_t>(seq) * plan.key_capacity;
    return static_cast<int>(min(max(p.total_keys - before, std::int64_t{0}), std::int64_t{plan.key_capacity}));
  }
  if (p.block_tables == nullptr) return plan.key_capacity;
  const std::int32_t seq_len = p.seq_lens[seq];
  const int keys = min(max(seq_len, 0), plan.key_capacity);
  if (records && seq_len != keys) record_error(plan.error_word, plan.op, ArgId::kSeqLens, seq, seq_len);
  return keys;
}

/// The tile's sequence and first row; false if it has no rows. Every warp of the CTA takes part and gets the same answer.
__device__ inline bool locate_rows(const Plan& plan, int tile_idx, Tile& tile) {
  const AttentionParams& p = plan.params;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  // With few sequences these are loaded beside query_start_loc.
  const bool few_seqs = p.num_seqs < 32;
  std::int32_t kv_start = 0;
  if (p.kv_start_loc != nullptr && few_seqs && lane <= p.num_seqs) kv_start = p.kv_start_loc[lane];
  if (plan.tiles_per_seq > 0) {
    tile.seq = plan.tiles_of_each_seq.quotient(tile_idx);
    tile.query_len = queries_per_sequence(p);
    tile.first_token = tile.seq * tile.query_len;
    tile.row_begin = (tile_idx - tile.seq * plan.tiles_per_seq) * plan.tile_rows;
  } else if (!find_sequence(plan, tile_idx, tile)) {
    return false;
  }
  const int rows = tile.query_len * static_cast<int>(plan.group.divisor);
  if (tile.row_begin >= rows || rows < plan.min_rows || rows > plan.max_rows) return false;

  const bool leader = threadIdx.x == 0;
  tile.kv_first_token = 0;
  if (p.kv_start_loc != nullptr) {
    int begin;
    std::int32_t raw_begin, raw_end;
    if (few_seqs) {
      begin = __reduce_max_sync(kAllLanes, lane <= tile.seq ? max(min(kv_start, plan.key_capacity), 0) : 0);
      raw_begin = __shfl_sync(kAllLanes, kv_start, tile.seq);
      raw_end = __shfl_sync(kAllLanes, kv_start, tile.seq + 1);
    } else {
      begin = monotonic_entry(p.kv_start_loc, tile.seq, plan.key_capacity);
      raw_begin = p.kv_start_loc[tile.seq], raw_end = p.kv_start_loc[tile.seq + 1];
    }
    const int end = max(begin, min(raw_end, plan.key_capacity));
    if (leader && raw_begin != begin) record_error(plan.error_word, plan.op, ArgId::kKvStartLoc, tile.seq, raw_begin);
    if (leader && raw_end != end) record_error(plan.error_word, plan.op, ArgId::kKvStartLoc, tile.seq + 1, raw_end);
    tile.kv_first_token = begin;
    tile.kv_len = end - begin;
  } else {
    tile.kv_len = sequence_keys(plan, tile.seq, leader);
  }
  return true;
}

/// The same, with its rows and keys.
__device__ inline bool locate_tile(const Plan& plan, int tile_idx, Tile& tile) {
  if (!locate_rows(plan, tile_idx, tile)) return false;
  finish_tile(plan, tile, plan.tile_rows);
  return true;
}

/// How many of num_splits have keys (at least one has, be it none), and how many keys each has at most.
struct SplitRange {
  int num_active, keys_per_split;
};

__device__ __forceinline__ SplitRange active_splits(const Plan& plan, const Tile& tile) {
  const int keys = tile.key_end - tile.key_begin;
  if (plan.num_splits == 1) return SplitRange{1, keys};
  const int unit = plan.keys_per_split_min;
  const int per_split = keys / plan.num_splits + (keys % plan.num_splits != 0);
  const int units = max(per_split / unit + (per_split % unit != 0), 1);
  const std::int64_t keys_per_split = static_cast<std::int64_t>(units) * unit;
  if (keys_per_split >= keys) return SplitRange{1, keys};
  return SplitRange{static_cast<int>((keys + keys_per_split - 1) / keys_per_split), static_cast<int>(keys_per_split)};
}

/// A tile row's query head and its row in q, out and lse.
struct RowIndex {
  int token;  // within the sequence
  int head;
  std::int64_t q_token;  // row of q
};

__device__ __forceinline__ RowIndex row_index(const Plan& plan, const Tile& tile, int kv_head, int row) {
  const int packed = tile.row_begin + row;
  const int token = plan.group.quotient(packed);
  return RowIndex{token, kv_head * static_cast<int>(plan.group.divisor) + plan.group.remainder(packed, token),
                  static_cast<std::int64_t>(tile.first_token) + token};
}

__device__ __forceinline__ std::int64_t stats_index(const Plan& plan, const RowIndex& row) {
  return row.q_token * plan.params.num_heads + row.head;
}

/// The factor that finishes a row's sum of p v, and its log-sum-exp, from its largest score (log2 units) and sum.
struct RowFinish {
  float factor, lse;
};

__device__ __forceinline__ RowFinish finish_row(const AttentionParams& p, float max_log2, float sum, int head) {
  // A row whose every score is NaN has that maximum too, but its sum is NaN.
  const bool empty = max_log2 == -INFINITY && sum == 0.0f;
  if (p.sinks == nullptr) {
    return empty ? RowFinish{0.0f, -INFINITY} : RowFinish{1.0f / sum, max_log2 * kLn2 + logf(sum)};
  }
  const float sink = p.sinks[head];
  if (empty) return RowFinish{0.0f, sink};
  const float sink_log2 = sink * kLog2E;
  const float top = fmaxf(fmaxf(max_log2, sink_log2), -FLT_MAX);
  const float scale = exp2f(max_log2 - top);
  const float total = sum * scale + exp2f(sink_log2 - top);
  return RowFinish{scale / total, top * kLn2 + logf(total)};
}

/// Four consecutive elements of an output row of `dtype`.
__device__ __forceinline__ void store_out_4(const Plan& plan, const RowIndex& row, int column, float4 value) {
  const AttentionParams& p = plan.params;
  const std::int64_t offset = row.q_token * p.out_token_stride + row.head * p.out_head_stride + column;
  if (p.dtype == DType::kFloat32) {
    float* out = static_cast<float*>(p.out) + offset;
    if (plan.out_aligned) {
      *reinterpret_cast<float4*>(out) = value;
    } else {
      out[0] = value.x, out[1] = value.y, out[2] = value.z, out[3] = value.w;
    }
    return;
  }
  ushort4 bits;
  if (p.dtype == DType::kBFloat16) {
    bits = ushort4{__bfloat16_as_ushort(__float2bfloat16_rn(value.x)), __bfloat16_as_ushort(__float2bfloat16_rn(value.y)),
                   __bfloat16_as_ushort(__float2bfloat16_rn(value.z)), __bfloat16_as_ushort(__float2bfloat16_rn(value.w))};
  } else {
    bits = ushort4{__half_as_ushort(__float2half_rn(value.x)), __half_as_ushort(__float2half_rn(value.y)),
                   __half_as_ushort(__float2half_rn(value.z)), __half_as_ushort(__float2half_rn(value.w))};
  }
  auto* out = static_cast<unsigned short*>(p.out) + offset;
  if (plan.out_aligned) {
    *reinterpret_cast<ushort4*>(out) = bits;
  } else {
    out[0] = bits.x, out[1] = bits.y, out[2] = bits.z, out[3] = bits.w;
  }
}

/// Where one key's rows begin: entry * block_stride + slot * token_stride elements from k or v.
struct KeyLocation {
  int entry;  // block; 0 when not paged
  int slot;  // within the block, or of all keys when not paged
  bool valid;
};

/// The table entry of a key (0 when not paged, or when there is no such key).
__device__ __forceinline__ int load_entry(const Plan& plan, const Tile& tile, int key, int key_end) {
  const AttentionParams& p = plan.params;
  if (p.block_tables == nullptr || key >= key_end) return 0;
  return p.block_tables[tile.seq * p.block_tables_stride + plan.block_size.quotient(key)];
}

__device__ __forceinline__ KeyLocation locate_key(const Plan& plan, const Tile& tile, int key, int key_end, int entry) {
  const AttentionParams& p = plan.params;
  if (key >= key_end) return KeyLocation{0, 0, false};
  if (p.block_tables == nullptr) return KeyLocation{0, tile.kv_first_token + key, true};
  const int block = plan.block_size.quotient(key);
  const bool valid = entry >= 0 && entry < p.num_blocks;
  if (!valid && entry != -1)
    record_error(plan.error_word, plan.op, p.shared_queries > 0 ? ArgId::kPrefixBlocks : ArgId::kBlockTables,
                 tile.seq * p.max_blocks_per_seq + block, entry);
  return KeyLocation{entry, plan.block_size.remainder(key, block), valid};
}

}  // namespace quire::cuda::attn
