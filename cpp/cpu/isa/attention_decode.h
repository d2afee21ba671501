// Attention of one query over its keys: bound by memory, so every key is read once, for all the query heads of its kv head.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cpu/isa/attention_softmax.h"

namespace quire::cpu::QUIRE_ISA_NAMESPACE {

inline constexpr int kDecodeTileKeys = 16;
inline constexpr int kDecodeKeyStep = 4;
// Rows that share each load of a key: as many as the registers hold next to the keys.
inline constexpr int kDecodeRows = QUIRE_ISA_LEVEL >= 2 ? 4 : 2;
inline constexpr int kDecodeChunks = 4;

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

/// What the queries are kept in.
template <typename KvT>
struct DecodeQuery {
  using Type = float;
};
#if QUIRE_ISA_LEVEL >= 2
template <>
struct DecodeQuery<BFloat16> {
  using Type = BFloat16;
};

/// Dot products of kRows queries with kDecodeKeyStep keys. q's rows are padded with zeros to whole vectors. Products of bfloat16
/// are exact in float, and are summed in float.
template <int kRows, typename KvT>
QUIRE_INLINE void score_keys(const BFloat16* q, std::int64_t q_stride, const void* const* keys, int head_dim, float* scores) {
  __m512 sums[kRows][kDecodeKeyStep];
  for (int r = 0; r < kRows; ++r)
    for (int j = 0; j < kDecodeKeyStep; ++j) sums[r][j] = _mm512_setzero_ps();
  const auto add = [&](int d, const Bits* chunk) __attribute__((always_inline)) {
    for (int r = 0; r < kRows; ++r) {
      const Bits query = detail::load32(q + r * q_stride + d);
      for (int j = 0; j < kDecodeKeyStep; ++j) sums[r][j] = _mm512_dpbf16_ps(sums[r][j], (__m512bh)query.v, (__m512bh)chunk[j].v);
    }
  };
  Bits chunk[kDecodeKeyStep];
  int d = 0;
  for (; d + 2 * kLanes <= head_dim; d += 2 * kLanes) {
    for (int j = 0; j < kDecodeKeyStep; ++j) chunk[j] = detail::load32(static_cast<const BFloat16*>(keys[j]) + d);
    add(d, chunk);
  }
  if (d < head_dim) {
    for (int j = 0; j < kDecodeKeyStep; ++j) chunk[j] = detail::load32(static_cast<const BFloat16*>(keys[j]) + d, (head_dim - d) / 2);
    add(d, chunk);
  }
  for (int r = 0; r < kRows; ++r) reduce_add4({sums[r][0]}, {sums[r][1]}, {sums[r][2]}, {sums[r][3]}, scores + r * kDecodeTileKeys);
}
#endif

/// The same in float.
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
  if constexpr (kHeadsHaveTails) {
    if (d < head_dim) {
      for (int j = 0; j < kDecodeKeyStep; ++j) chunk[j] = load(k[j] + d, head_dim - d);
      add(d, chunk);
    }
  }
  for (int r = 0; r < kRows; ++r) reduce_add4(sums[r][0], sums[r][1], sums[r][2], sums[r][3], scores + r * kDecodeTileKeys);
}

/// sums[r][d, d + kChunks vectors) = that * rescale[r] + sum over keys of weight[r][key] * v[key]. With kTail the one vector holds
/// fewer than kLanes elements.
template <int kRows, int kChunks, bool kTail, typename KvT>
QUIRE_INLINE void add_values(const float* weights, const float* rescale, const void* const* values, int num_keys, int d, int head_dim,
                             float* sums, std::int64_t stride) {
  Vec total[kRows][kChunks];  // of these keys alone, as a shorter sum has a smaller error
  for (int r = 0; r < kRows; ++r)
    for (int c = 0; c < kChunks; ++c) total[r][c] = zero();
  for (int j = 0; j < num_keys; ++j) {
    const KvT* v = static_cast<const KvT*>(values[j]) + d;
    Vec chunk[kChunks];
    for (int c = 0; c < kChunks; ++c) chunk[c] = kTail ? load(v, head_dim - d) : load(v + c * kLanes);
    for (int r = 0; r < kRows; ++r) {
      const Vec weight = set1(weights[r * kDecodeTileKeys + j]);
      for (int c = 0; c < kChunks; ++c) total[r][c] = fma(weight, chunk[c], total[r][c]);
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int c = 0; c < kChunks; ++c) {
      float* sum = sums + r * stride + d + c * kLanes;
      store(sum, fma(load(sum), set1(rescale[r]), total[r][c]));
    }
}

template <int kRows, typename KvT>
QUIRE_INLINE void add_all_values(const float* weights, const float* rescale, const void* const* values, int num_keys, int head_dim,
                                 float* sums, std::int64_t stride) {
  int d = 0;
  const auto add = [&](auto chunks, auto tail) __attribute__((always_inline)) {
    add_values<kRows, chunks.value, tail.value, KvT>(weights, rescale, values, num_keys, d, head_dim, sums, stride);
    d += chunks.value * kLanes;
  };
  while (d + kDecodeChunks * kLanes <= head_dim) add(Constant<int, kDecodeChunks>{}, Constant<bool, false>{});
  if (d + 2 * kLanes <= head_dim) add(Constant<int, 2>{}, Constant<bool, false>{});
  if (d + kLanes <= head_dim) add(Constant<int, 1>{}, Constant<bool, false>{});
  if constexpr (kHeadsHaveTails) {
    if (d < head_dim) add(Constant<int, 1>{}, Constant<bool, true>{});
  }
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
  void* q;
  float *sums, *scores, *rescale;
  RowState* states;
  std::int64_t stride;  // of a row of q and of sums

  QUIRE_INLINE std::int64_t assign(std::byte* base, std::int64_t num_rows, std::int64_t head_dim) {
    ScratchLayout layout{base};
    stride = round_up<std::int64_t>(head_dim, 2 * kLanes);
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

/// Brings the next tile's rows near while this one is computed, in the order in which they lie in memory.
class DecodePrefetch {
 public:
  QUIRE_INLINE DecodePrefetch(const AttentionKeyTile& tile, int num_keys, std::int64_t row_bytes, std::int64_t k_head_bytes,
                              std::int64_t v_head_bytes, int num_heads)
      : tile_(tile),
        num_keys_(num_keys),
        num_heads_(num_heads),
        row_bytes_(row_bytes),
        k_head_bytes_(k_head_bytes),
        v_head_bytes_(v_head_bytes) {}

  /// One key of one kv head.
  QUIRE_INLINE void step() {
    if (key_ >= num_keys_) return;
    const char* k = static_cast<const char*>(tile_.k[key_]) + head_ * k_head_bytes_;
    const char* v = static_cast<const char*>(tile_.v[key_]) + head_ * v_head_bytes_;
    for (std::int64_t i = 0; i < row_bytes_; i += 64) __builtin_prefetch(k + i, 0, 3);
    for (std::int64_t i = 0; i < row_bytes_; i += 64) __builtin_prefetch(v + i, 0, 3);
    if (++head_ == num_heads_) {
      head_ = 0;
      ++key_;
    }
  }

 private:
  const AttentionKeyTile& tile_;
  int key_ = 0, head_ = 0, num_keys_, num_heads_;
  std::int64_t row_bytes_, k_head_bytes_, v_head_bytes_;
};

/// Moves a tile's pointers on to the next kv head.
QUIRE_INLINE void advance_head(AttentionKeyTile& tile, int num_keys, std::int64_t k_head_bytes, std::int64_t v_head_bytes) {
  for (int j = 0; j < num_keys; ++j) {
    if (tile.any_hidden && (tile.hidden[j / 32] >> (j % 32) & 1u)) continue;
    tile.k[j] = static_cast<const char*>(tile.k[j]) + k_head_bytes;
    tile.v[j] = static_cast<const char*>(tile.v[j]) + v_head_bytes;
  }
}

template <typename KvT>
void decode(const AttentionTask& task, std::byte* scratch_bytes) {
  using Query = typename DecodeQuery<KvT>::Type;
  const AttentionParams& p = *task.params;
  const int head_dim = static_cast<int>(p.head_dim);
  const int group = static_cast<int>(p.num_heads / p.num_kv_heads);
  const int num_kv_heads = static_cast<int>(task.kv_head_end - task.kv_head_begin), num_rows = num_kv_heads * group;
  const std::int64_t first_head = task.kv_head_begin * group;
  constexpr std::int64_t kItem = sizeof(KvT);
  const std::int64_t k_head_bytes = p.k_head_stride * kItem, v_head_bytes = p.v_head_stride * kItem;
  DecodeScratch scratch;
  scratch.assign(scratch_bytes, num_rows, head_dim);
  const std::int64_t stride = scratch.stride;
  Query* q = static_cast<Query*>(scratch.q);
  for (int r = 0; r < num_rows; ++r) {
    load_query(p, task.sequence.query_begin + task.query_begin, first_head + r, q + r * stride, stride);
    for (std::int64_t d = 0; d < stride; d += kLanes) store(scratch.sums + r * stride + d, zero());
    scratch.states[r] = {-kInfinity, 0.0f};
  }

  const std::int64_t position = task.sequence.kv_len - task.sequence.num_queries + task.query_begin;
  const auto locate = [&](std::int64_t key, AttentionKeyTile& tile) __attribute__((always_inline)) {
    const int num_keys = static_cast<int>(smaller<std::int64_t>(kDecodeTileKeys, task.key_end - key));
    if (num_keys > 0) locate_keys(task, key, num_keys, kDecodeTileKeys, tile);
    return larger(num_keys, 0);
  };
  AttentionKeyTile tiles[2];
  int num_keys = locate(task.key_begin, tiles[0]);
  for (std::int64_t key = task.key_begin, parity = 0; num_keys > 0; parity ^= 1) {
    AttentionKeyTile& tile = tiles[parity];
    AttentionKeyTile& next = tiles[parity ^ 1];
    const int num_next_keys = locate(key + num_keys, next);
    DecodePrefetch prefetch(next, num_next_keys, head_dim * kItem, k_head_bytes, v_head_bytes, num_kv_heads);
    const RowMask mask = {0, num_keys, tile.any_hidden ? tile.hidden : nullptr};
    for (int kv_head = 0; kv_head < num_kv_heads; ++kv_head) {
      if (kv_head > 0) advance_head(tile, num_keys, k_head_bytes, v_head_bytes);
      const int first_row = kv_head * group;
      for (int j = 0; j < num_keys; j += kDecodeKeyStep) {
        for (int i = 0; i < kDecodeKeyStep; ++i) prefetch.step();
        for_row_groups(group, [&](int row, auto rows) __attribute__((always_inline)) {
          row += first_row;
          score_keys<rows.value, KvT>(q + row * stride, stride, tile.k + j, head_dim, scratch.scores + row * kDecodeTileKeys + j);
        });
      }
      const ScoreRule rule = score_rule(p, task.kv_head_begin + kv_head);
      for (int row = first_row; row < first_row + group; ++row) {
        float* scores = scratch.scores + row * kDecodeTileKeys;
        const float alibi = p.alibi_slopes ? p.alibi_slopes[first_head + row] * kLog2E : 0.0f;
        scratch.rescale[row] = softmax_row(scores, 0, round_up(num_keys, kLanes), mask, rule, alibi, key - position, scratch.states[row],
                                           [&](int column, Vec weights) __attribute__((always_inline)) {
                                             store(scores + column, weights);
                                             return weights;
                                           });
      }
      for_row_groups(group, [&](int row, auto rows) __attribute__((always_inline)) {
        row += first_row;
        add_all_values<rows.value, KvT>(scratch.scores + row * kDecodeTileKeys, scratch.rescale + row, tile.v, num_keys, head_dim,
                                        scratch.sums + row * stride, stride);
      });
    }
    key += num_keys;
    num_keys = num_next_keys;
  }
  finish_rows(task, scratch.sums, stride, scratch.states);
}

}  // namespace quire::cpu::QUIRE_ISA_NAMESPACE
