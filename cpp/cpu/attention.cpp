// CPU attention over paged and ragged keys and values, and the merge of partial results.
// SPDX-License-Identifier: Apache-2.0
#include "ops/attention.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

#include "core/dispatch.h"
#include "core/error_word.h"
#include "core/layout.h"
#include "core/numeric.h"
#include "cpu/thread_pool.h"

namespace quire::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr std::int64_t kUnlimited = std::int64_t{1} << 40;  // more than any length, and safe to add to one

// One sequence of the batch, its index contents clamped.
struct Sequence {
  std::int64_t query_begin;  // first row of q
  std::int64_t num_queries;
  std::int64_t kv_begin;  // first row of k and v; 0 when paged
  std::int64_t kv_len;
};

std::int64_t clamp_index(std::int64_t value, std::int64_t low, std::int64_t high, OpId op, ArgId arg, std::int64_t index) {
  const std::int64_t clamped = std::clamp(value, low, high);
  if (clamped != value) record_cpu_error(op, arg, index, value);
  return clamped;
}

std::vector<Sequence> resolve_sequences(const AttentionParams& p) {
  const bool paged = p.block_tables != nullptr;
  const OpId op = paged ? OpId::kPagedAttention : OpId::kAttention;
  std::vector<Sequence> sequences(static_cast<std::size_t>(p.num_seqs));
  std::int64_t query = 0, kv = 0;
  if (p.query_start_loc) query = clamp_index(p.query_start_loc[0], 0, p.num_tokens, op, ArgId::kQueryStartLoc, 0);
  if (p.kv_start_loc) kv = clamp_index(p.kv_start_loc[0], 0, p.num_kv_tokens, op, ArgId::kKvStartLoc, 0);
  for (std::int64_t s = 0; s < p.num_seqs; ++s) {
    Sequence& sequence = sequences[static_cast<std::size_t>(s)];
    std::int64_t query_end = paged ? std::min(s + 1, p.num_tokens) : p.num_tokens;
    if (p.query_start_loc) query_end = clamp_index(p.query_start_loc[s + 1], query, p.num_tokens, op, ArgId::kQueryStartLoc, s + 1);
    sequence.query_begin = query;
    sequence.num_queries = query_end - query;
    query = query_end;
    if (paged) {
      sequence.kv_begin = 0;
      sequence.kv_len = clamp_index(p.seq_lens[s], 0, p.max_blocks_per_seq * p.block_size, op, ArgId::kSeqLens, s);
    } else {
      std::int64_t kv_end = p.num_kv_tokens;
      if (p.kv_start_loc) kv_end = clamp_index(p.kv_start_loc[s + 1], kv, p.num_kv_tokens, op, ArgId::kKvStartLoc, s + 1);
      sequence.kv_begin = kv;
      sequence.kv_len = kv_end - kv;
      kv = kv_end;
    }
  }
  return sequences;
}

// Row of the key in k and v, in elements.
struct KeyRow {
  bool hidden;
  std::int64_t k_offset, v_offset;
};

KeyRow locate_key(const AttentionParams& p, const Sequence& sequence, std::int64_t seq_idx, std::int64_t key) {
  if (!p.block_tables) {
    const std::int64_t row = sequence.kv_begin + key;
    return {false, row * p.k_token_stride, row * p.v_token_stride};
  }
  const std::int64_t entry = key / p.block_size;
  const std::int64_t block = p.block_tables[seq_idx * p.block_tables_stride + entry];
  if (block < 0 || block >= p.num_blocks) {
    if (block != -1) record_cpu_error(OpId::kPagedAttention, ArgId::kBlockTables, seq_idx * p.max_blocks_per_seq + entry, block);
    return {true, 0, 0};
  }
  const std::int64_t offset = key % p.block_size;
  return {false, block * p.k_block_stride + offset * p.k_token_stride, block * p.v_block_stride + offset * p.v_token_stride};
}

template <typename T, typename KvT>
void attend_row(const AttentionParams& p, const Sequence& sequence, std::int64_t seq_idx, std::int64_t query_idx, std::int64_t head) {
  const std::int64_t kv_head = head / (p.num_heads / p.num_kv_heads);
  const std::int64_t token = sequence.query_begin + query_idx;
  const std::int64_t position = sequence.kv_len - sequence.num_queries + query_idx;
  std::int64_t end = sequence.kv_len, begin = 0;
  if (p.causal) end = std::min(end, position + 1);
  if (p.window_right >= 0) end = std::min(end, position + std::min(p.window_right, kUnlimited) + 1);
  if (p.window_left >= 0) begin = std::max(begin, position - std::min(p.window_left, kUnlimited));
  const T* q = static_cast<const T*>(p.q) + token * p.q_token_stride + head * p.q_head_stride;
  const float score_scale = p.scale * (p.k_scale ? p.k_scale[kv_head * p.k_scale_stride] : 1.0f);
  float accumulator[256] = {};
  float max = -kInfinity, sum = 0.0f;
  for (std::int64_t key = begin; key < end; ++key) {
    const KeyRow row = locate_key(p, sequence, seq_idx, key);
    if (row.hidden) continue;
    const KvT* k = static_cast<const KvT*>(p.k) + row.k_offset + kv_head * p.k_head_stride;
    const KvT* v = static_cast<const KvT*>(p.v) + row.v_offset + kv_head * p.v_head_stride;
    float score = 0.0f;
    for (std::int64_t i = 0; i < p.head_dim; ++i) score += to_float(q[i]) * to_float(k[i]);
    score *= score_scale;
    if (p.softcap > 0.0f) score = p.softcap * std::tanh(score / p.softcap);
    if (p.alibi_slopes) score -= p.alibi_slopes[head] * static_cast<float>(position - key);
    if (score > max) {
      const float rescale = std::exp(max - score);
      for (std::int64_t i = 0; i < p.head_dim; ++i) accumulator[i] *= rescale;
      sum *= rescale;
      max = score;
    }
    const float weight = score == -kInfinity ? 0.0f : std::exp(score - max);
    sum += weight;
    for (std::int64_t i = 0; i < p.head_dim; ++i) accumulator[i] += weight * to_float(v[i]);
  }
  const float sink = p.sinks ? p.sinks[head] : -kInfinity;
  const float reference = std::max(max, sink);
  float lse = -kInfinity, factor = 0.0f;
  if (reference != -kInfinity) {
    const float rescale = std::exp(max - reference);
    const float denominator = sum * rescale + std::exp(sink - reference);
    lse = reference + std::log(denominator);
    factor = rescale / denominator * (p.v_scale ? p.v_scale[kv_head * p.v_scale_stride] : 1.0f);
  }
  T* out = static_cast<T*>(p.out) + token * p.out_token_stride + head * p.out_head_stride;
  for (std::int64_t i = 0; i < p.head_dim; ++i) out[i] = from_float<T>(accumulator[i] * factor);
  if (p.lse) p.lse[token * p.num_heads + head] = lse;
}

template <typename T, typename KvT>
void attend_all(const AttentionParams& p) {
  const std::vector<Sequence> sequences = resolve_sequences(p);
  for (std::int64_t s = 0; s < p.num_seqs; ++s) {
    const Sequence& sequence = sequences[static_cast<std::size_t>(s)];
    parallel_for(sequence.num_queries * p.num_heads, 1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t row = begin; row < end; ++row)
        attend_row<T, KvT>(p, sequence, s, row / p.num_heads, row % p.num_heads);
    });
  }
}

}  // namespace

void attention(const AttentionParams& params) {
  dispatch_float(params.dtype, "paged_attention", [&](auto dtype) {
    using T = HostType<decltype(dtype)::value>;
    switch (params.kv_dtype) {
      case DType::kFloat8E4M3FN: return attend_all<T, Float8E4M3FN>(params);
      case DType::kFloat8E5M2: return attend_all<T, Float8E5M2>(params);
      case DType::kInt8: return attend_all<T, std::int8_t>(params);
      default: return attend_all<T, T>(params);
    }
  });
}

void merge_attention(const MergeParams& params) {
  dispatch_float(params.dtype, "merge_attention", [&](auto dtype) {
    using T = HostType<decltype(dtype)::value>;
    const MergeParams& p = params;
    const std::int64_t grain = std::max<std::int64_t>(1, 4096 / p.head_dim);
    parallel_for(p.num_tokens * p.num_heads, grain, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t row = begin; row < end; ++row) {
        const std::int64_t token = row / p.num_heads, head = row % p.num_heads;
        const float lse_a = p.lse_a[row], lse_b = p.lse_b[row];
        const float max = std::max(lse_a, lse_b);
        float lse = max, weight_a = 0.0f, weight_b = 0.0f;
        if (max != -kInfinity) {
          weight_a = std::exp(lse_a - max);
          weight_b = std::exp(lse_b - max);
          const float sum = weight_a + weight_b;
          lse = max + std::log(sum);
          weight_a /= sum;
          weight_b /= sum;
        }
        const T* a = static_cast<const T*>(p.out_a) + token * p.a_token_stride + head * p.a_head_stride;
        const T* b = static_cast<const T*>(p.out_b) + token * p.b_token_stride + head * p.b_head_stride;
        T* out = static_cast<T*>(p.out) + token * p.out_token_stride + head * p.out_head_stride;
        // A side without keys is selected away: whatever its output holds must not matter.
        for (std::int64_t i = 0; i < p.head_dim; ++i) {
          const float from_a = lse_a == -kInfinity ? 0.0f : weight_a * to_float(a[i]);
          const float from_b = lse_b == -kInfinity ? 0.0f : weight_b * to_float(b[i]);
          out[i] = from_float<T>(from_a + from_b);
        }
        if (p.out_lse) p.out_lse[row] = lse;
      }
    });
  });
}

}  // namespace quire::cpu
