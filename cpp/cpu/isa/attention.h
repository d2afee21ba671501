// What attention's orchestration hands to its per-ISA kernels.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>

#include "ops/attention.h"

namespace quire::cpu {

/// One sequence of the batch, its index contents clamped.
struct AttentionSequence {
  std::int64_t query_begin;  // first row of q
  std::int64_t num_queries;
  std::int64_t kv_begin;  // first row of k and v; 0 when paged
  std::int64_t kv_len;
};

/// A unit of work: some queries of one sequence, for the query heads of some kv heads, over a range of keys. Its rows are
/// (query, head), query outermost. Decode takes one query, prefill one kv head.
struct AttentionTask {
  const AttentionParams* params;
  AttentionSequence sequence;
  std::int64_t seq_idx;
  std::int64_t kv_head_begin, kv_head_end;
  std::int64_t query_begin, query_end;  // within the sequence
  std::int64_t key_begin, key_end;      // within the sequence; may be empty
  /// Null: the finished rows go to out and lse. Else this range of keys is one of several, and its state goes here: weighted sums
  /// [rows, head_dim], then maxima [rows], in units of log 2, then sums of weights [rows].
  float* partial;
};

struct AttentionKeyRange {
  std::int64_t begin, end;
};

/// The keys that one query of the sequence sees, before the block table hides any; empty if end <= begin.
inline __attribute__((always_inline)) AttentionKeyRange visible_keys(const AttentionParams& p, const AttentionSequence& sequence,
                                                                     std::int64_t query_idx) {
  // More than any length, and safe to add to one.
  constexpr std::int64_t kUnlimited = std::int64_t{1} << 40;
  const std::int64_t position = sequence.kv_len - sequence.num_queries + query_idx;
  std::int64_t right = p.causal ? 0 : kUnlimited;
  if (p.window_right >= 0 && p.window_right < right) right = p.window_right;
  const std::int64_t left = p.window_left >= 0 && p.window_left < kUnlimited ? p.window_left : kUnlimited;
  const std::int64_t begin = position - left, end = position + right + 1;
  return {begin > 0 ? begin : 0, end < sequence.kv_len ? end : sequence.kv_len};
}

/// Rows of a task per query.
inline __attribute__((always_inline)) std::int64_t heads_of(const AttentionTask& task) {
  return (task.kv_head_end - task.kv_head_begin) * (task.params->num_heads / task.params->num_kv_heads);
}

inline __attribute__((always_inline)) std::int64_t rows_of(const AttentionTask& task) {
  return (task.query_end - task.query_begin) * heads_of(task);
}

inline constexpr int kMaxTileKeys = 256;

/// Where consecutive keys lie. A hidden key, and one past the tile's keys, points to a row of zeros.
struct AttentionKeyTile {
  const void* k[kMaxTileKeys];
  const void* v[kMaxTileKeys];
  std::uint32_t hidden[kMaxTileKeys / 32];  // one bit per key
  bool any_hidden;
};

/// Finds the keys [key, key + num_keys) of the task's sequence and first kv head, guards the block table and records what it holds
/// out of range. What the mask hides from the only query of a task is hidden like a key that does not exist.
void locate_keys(const AttentionTask& task, std::int64_t key, int num_keys, int num_padded_keys, AttentionKeyTile& tile);

/// Sets the bits of `hidden` for those of the keys [key, key + num_keys) that the mask hides from a query of the task's sequence.
void hide_masked(const AttentionTask& task, std::int64_t query_idx, std::int64_t key, int num_keys, std::uint32_t* hidden);

/// Whether the mask has a bit for any of the keys [key, key + num_keys).
bool mask_reaches(const AttentionTask& task, std::int64_t key, int num_keys);

struct AttentionKernel {
  void (*run)(const AttentionTask& task, std::byte* scratch);
  std::int64_t (*scratch_bytes)(std::int64_t num_rows, std::int64_t head_dim);  // scratch is 64-byte aligned
};

inline constexpr int kNumKvDTypes = 6;  // float32 to int8, as DType counts them

struct AttentionKernels {
  AttentionKernel decode[kNumKvDTypes];
  AttentionKernel prefill[kNumKvDTypes];
  /// Merges the states of num_partials ranges of keys, which lie one after the other, and finishes the rows.
  void (*merge)(const AttentionTask& task, float* partials, std::int64_t num_partials);
};

/// Prefill of bfloat16 queries, where that has kernels of its own.
struct AttentionBf16Kernels {
  AttentionKernel prefill[kNumKvDTypes];
};

}  // namespace quire::cpu
