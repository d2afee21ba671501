// Attention of one query over its keys, for the heads that share a kv head: bound by memory, so every key is read once.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cpu/isa/attention_softmax.h"

namespace quire::cpu::QUIRE_ISA_NAMESPACE {

inline constexpr int kDecodeTileKeys = 64;
inline constexpr int kDecodeKeyStep = 4;
// Rows that share each load of a key: as many as the registers hold next to the keys.
inline constexpr int kDecodeRows = QUIRE_ISA_LEVEL >= 2 ? 4 : 2;
inline constexpr int kDecodeChunks = 4;

QUIRE_INLINE void prefetch_row(const void* row, std::int64_t num_bytes) {
  for (std::int64_t i = 0; i < num_bytes; i += 64) __builtin_prefetch(static_cast<const char*>(row) + i, 0, 3);
}

/// Sums of four vectors.
QUIRE_INLINE void reduce_add4(Vec a, Vec b, Vec c, Vec d, float* out) {
#if QUIRE_ISA_LEVEL >= 2
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a.v, b.v), _mm512_unpackhi_ps(a.v, b.v));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c.v, d.v), _mm512_unpackhi_ps(c.v, d.v));
  const __m512 abcd = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
#elif QUIRE_ISA_LEVEL == 1
  const __m256 abcd = _mm256_hadd_ps(_mm256_hadd_ps(a.v, b.v), _mm256_hadd_ps(c.v, d.v));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1)));
#else
  out[0] = reduce_add(a);
  out[1] = reduce_add(b);
  out[2] = reduce_add(c);
  out[3] = reduce_add(d);
#endif
}

/// Dot products of kRows queries with kDecodeKeyStep keys. q's rows are padded with zeros to whole vectors.
template <int kRows, typename KvT>
QUIRE_INLINE void score_keys(const float* q, std::int64_t q_stride, const void* const* keys, int head_dim, float* scores) {
  Vec sums[kRows][kDecodeKeyStep];
  for (int r = 0; r < kRows; ++r)
    for (int j = 0; j < kDecodeKeyStep; ++j) sums[r][j] = zero();
  const KvT* k[kDecodeKeyStep];
  for (int j = 0; j < kDecodeKeyStep; ++j) k[j] = static_cast<const KvT*>(keys[j]);
  const auto add = [&](int d, const Vec* chunk) __attribute__((always_inline)) {
    for (int r = 0; r < kRows; ++r) {
      const Vec query = load(q + r * q_stride + d);
      for (int j = 0; j < kDecodeKeyStep; ++j) sums[r][j] = fma(query, chunk[j], sums[r][j]);
    }
  };
  Vec chunk[kDecodeKeyStep];
  int d = 0;
  for (; d + kLanes <= head_dim; d += kLanes) {
    for (int j = 0; j < kDecodeKeyStep; ++j) chunk[j] = load(k[j] + d);
    add(d, chunk);
  }
  if (d < head_dim) {
    for (int j = 0; j < kDecodeKeyStep; ++j) chunk[j] = load(k[j] + d, head_dim - d);
    add(d, chunk);
  }
  for (int r = 0; r < kRows; ++r) reduce_add4(sums[r][0], sums[r][1], sums[r][2], sums[r][3], scores + r * kDecodeTileKeys);
}

/// sums[r][d, d + kChunks vectors) = that * rescale[r] + sum over keys of weight[r][key] * v[key]. With kTail the last vector holds
/// fewer than kLanes elements.
template <int kRows, int kChunks, bool kTail, typename KvT>
QUIRE_INLINE void add_values(const float* weights, const float* rescale, const void* const* values, int num_keys, int d, int head_dim,
                             float* sums, std::int64_t stride, const void* const* next_keys, int num_prefetch_bytes) {
  Vec total[kRows][kChunks];
  for (int r = 0; r < kRows; ++r)
    for (int c = 0; c < kChunks; ++c) total[r][c] = load(sums + r * stride + d + c * kLanes) * set1(rescale[r]);
  for (int j = 0; j < num_keys; ++j) {
    if (num_prefetch_bytes > 0) prefetch_row(next_keys[j], num_prefetch_bytes);
    const KvT* v = static_cast<const KvT*>(values[j]) + d;
    Vec chunk[kChunks];
    for (int c = 0; c < kChunks; ++c)
      chunk[c] = kTail && c == kChunks - 1 ? load(v + c * kLanes, head_dim - d - c * kLanes) : load(v + c * kLanes);
    for (int r = 0; r < kRows; ++r) {
      const Vec weight = set1(weights[r * kDecodeTileKeys + j]);
      for (int c = 0; c < kChunks; ++c) total[r][c] = fma(weight, chunk[c], total[r][c]);
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int c = 0; c < kChunks; ++c) store(sums + r * stride + d + c * kLanes, total[r][c]);
}

template <int kRows, typename KvT>
QUIRE_INLINE void add_all_values(const float* weights, const float* rescale, const void* const* values, int num_keys, int head_dim,
                                 float* sums, std::int64_t stride, const void* const* next_keys, int num_prefetch_bytes) {
  constexpr int kStep = kDecodeChunks * kLanes;
  int d = 0;
  for (; d + kStep <= head_dim; d += kStep) {
    add_values<kRows, kDecodeChunks, false, KvT>(weights, rescale, values, num_keys, d, head_dim, sums, stride, next_keys,
                                                 d == 0 ? num_prefetch_bytes : 0);
  }
  const auto add = [&](auto chunks, auto tail) __attribute__((always_inline)) {
    add_values<kRows, chunks.value, tail.value, KvT>(weights, rescale, values, num_keys, d, head_dim, sums, stride, next_keys,
                                                     d == 0 ? num_prefetch_bytes : 0);
  };
  const int left = head_dim - d;
  const auto with_tail = [&](auto tail) __attribute__((always_inline)) {
    switch ((left + kLanes - 1) / kLanes) {
      case 1: add(Constant<int, 1>{}, tail); break;
      case 2: add(Constant<int, 2>{}, tail); break;
      case 3: add(Constant<int, 3>{}, tail); break;
      default: add(Constant<int, 4>{}, tail); break;
    }
  };
  if (left == 0) return;
  if (left % kLanes == 0)
    with_tail(Constant<bool, false>{});
  else
    with_tail(Constant<bool, true>{});
}

/// Calls f(first row, number of rows as a constant) over all rows, kDecodeRows at a time.
template <typename F>
QUIRE_INLINE void for_row_groups(int num_rows, F&& f) {
  int row = 0;
  for (; row + kDecodeRows <= num_rows; row += kDecodeRows) f(row, Constant<int, kDecodeRows>{});
  if constexpr (kDecodeRows > 2) {
    if (row + 2 <= num_rows) {
      f(row, Constant<int, 2>{});
      row += 2;
    }
  }
  if (row < num_rows) f(row, Constant<int, 1>{});
}

struct DecodeScratch {
  float *q, *sums, *scores, *rescale;
  RowState* states;
  std::int64_t stride;

  QUIRE_INLINE std::int64_t assign(std::byte* base, std::int64_t num_rows, std::int64_t head_dim) {
    ScratchLayout layout{base};
    stride = round_up<std::int64_t>(head_dim, kLanes);
    q = layout.take<float>(num_rows * stride);
    sums = layout.take<float>(num_rows * stride);
    scores = layout.take<float>(num_rows * kDecodeTileKeys);
    rescale = layout.take<float>(num_rows);
    states = layout.take<RowState>(num_rows);
    return layout.num_bytes;
  }
};

inline std::int64_t decode_scratch_bytes(std::int64_t num_rows, std::int64_t head_dim) {
  DecodeScratch scratch;
  return scratch.assign(nullptr, num_rows, head_dim);
}

template <typename KvT>
void decode(const AttentionTask& task, std::byte* scratch_bytes) {
  const AttentionParams& p = *task.params;
  const int head_dim = static_cast<int>(p.head_dim);
  const int num_rows = static_cast<int>(p.num_heads / p.num_kv_heads);
  const std::int64_t first_head = task.kv_head * num_rows;
  DecodeScratch scratch;
  scratch.assign(scratch_bytes, num_rows, head_dim);
  const std::int64_t stride = scratch.stride;
  for (int r = 0; r < num_rows; ++r) {
    load_query(p, task.sequence.query_begin + task.query_begin, first_head + r, scratch.q + r * stride, stride);
    for (std::int64_t d = 0; d < stride; d += kLanes) store(scratch.sums + r * stride + d, zero());
    scratch.states[r] = {-kInfinity, 0.0f};
  }

  const ScoreRule rule = score_rule(task);
  const std::int64_t position = task.sequence.kv_len - task.sequence.num_queries + task.query_begin;
  const int row_bytes = head_dim * static_cast<int>(sizeof(KvT));
  const auto tile_keys = [&](std::int64_t key) __attribute__((always_inline)) {
    return static_cast<int>(smaller<std::int64_t>(kDecodeTileKeys, task.key_end - key));
  };
  AttentionKeyTile tiles[2];
  if (task.key_begin < task.key_end)
    locate_keys(task, task.key_begin, tile_keys(task.key_begin), kDecodeTileKeys, tiles[0]);
  for (std::int64_t key = task.key_begin, i = 0; key < task.key_end; key += kDecodeTileKeys, ++i) {
    const AttentionKeyTile& tile = tiles[i % 2];
    AttentionKeyTile& next = tiles[(i + 1) % 2];
    const int num_keys = tile_keys(key);
    const bool has_next = key + num_keys < task.key_end;
    if (has_next) locate_keys(task, key + num_keys, tile_keys(key + num_keys), kDecodeTileKeys, next);

    // Scores, with this tile's values on their way.
    for (int j = 0; j < num_keys; j += kDecodeKeyStep) {
      for (int i = j; i < j + kDecodeKeyStep; ++i) prefetch_row(tile.v[i], row_bytes);
      for_row_groups(num_rows, [&](int row, auto rows) __attribute__((always_inline)) {
        score_keys<rows.value, KvT>(scratch.q + row * stride, stride, tile.k + j, head_dim, scratch.scores + row * kDecodeTileKeys + j);
      });
    }

    const RowMask mask = {0, num_keys, tile.any_hidden ? tile.hidden : nullptr};
    for (int r = 0; r < num_rows; ++r) {
      float* scores = scratch.scores + r * kDecodeTileKeys;
      const float alibi = p.alibi_slopes ? p.alibi_slopes[first_head + r] * kLog2E : 0.0f;
      scratch.rescale[r] = softmax_row(scores, 0, round_up(num_keys, kLanes), mask, rule, alibi, key - position, scratch.states[r],
                                       [&](int column, Vec weights) __attribute__((always_inline)) {
                                         store(scores + column, weights);
                                         return weights;
                                       });
    }

    // Weighted values, with the next tile's keys on their way.
    int prefetch_bytes = has_next ? row_bytes : 0;
    for_row_groups(num_rows, [&](int row, auto rows) __attribute__((always_inline)) {
      add_all_values<rows.value, KvT>(scratch.scores + row * kDecodeTileKeys, scratch.rescale + row, tile.v, num_keys, head_dim,
                                      scratch.sums + row * stride, stride, next.k, prefetch_bytes);
      prefetch_bytes = 0;
    });
  }
  finish_rows(task, scratch.sums, stride, scratch.states);
}

}  // namespace quire::cpu::QUIRE_ISA_NAMESPACE
