// Blocked attention of many rows: scores and weighted values as matrix products over packed tiles of keys and values.
// SPDX-License-Identifier: Apache-2.0
//
// Operands are 32-bit words: one float, or two neighbouring bfloat16 along the summed dimension. A left operand is rows of words.
// A right operand is packed in panels of kPanel columns: [panel][word][column]. An engine says which kind it is and multiplies.
#pragma once

#include "cpu/isa/attention_softmax.h"

namespace quire::cpu::QUIRE_ISA_NAMESPACE {

inline constexpr int kPanel = 2 * kLanes;
inline constexpr int kRowBlock = 32;  // rows whose scores are held at a time

/// c[rows, kPanel * panels] = a * b, or += with kAdd. a_stride and num_words count words; num_rows is a multiple of kStep.
template <typename Engine, bool kAdd>
QUIRE_INLINE void multiply_in_registers(const std::uint32_t* a, std::int64_t a_stride, int num_rows, const std::uint32_t* b,
                                        std::int64_t panel_stride, int num_panels, int num_words, float* c, std::int64_t c_stride) {
  constexpr int kStep = Engine::kRowStep;
  for (int panel = 0; panel < num_panels; ++panel) {
    const std::uint32_t* b_panel = b + panel * panel_stride;
    for (int row = 0; row < num_rows; row += kStep) {
      float* c_tile = c + row * c_stride + panel * kPanel;
      const std::uint32_t* a_rows = a + row * a_stride;
      Vec sums[kStep][2];
#pragma GCC unroll 8
      for (int r = 0; r < kStep; ++r) sums[r][0] = sums[r][1] = zero();
      for (int w = 0; w < num_words; ++w) {
        const Bits b0 = detail::load32(b_panel + w * kPanel), b1 = detail::load32(b_panel + w * kPanel + kLanes);
#pragma GCC unroll 8
        for (int r = 0; r < kStep; ++r) {
          const Bits a_word = set1_bits(a_rows[r * a_stride + w]);
          sums[r][0] = Engine::multiply_add(a_word, b0, sums[r][0]);
          sums[r][1] = Engine::multiply_add(a_word, b1, sums[r][1]);
        }
      }
#pragma GCC unroll 8
      for (int r = 0; r < kStep; ++r) {
        // Added last: a shorter sum has a smaller error.
        float* c_row = c_tile + r * c_stride;
        store(c_row, kAdd ? load(c_row) + sums[r][0] : sums[r][0]);
        store(c_row + kLanes, kAdd ? load(c_row + kLanes) + sums[r][1] : sums[r][1]);
      }
    }
  }
}

/// Float operands.
struct FloatEngine {
  static constexpr int kWordElements = 1;
  static constexpr int kRowStep = QUIRE_ISA_LEVEL >= 2 ? 8 : 4;
  static constexpr int kWordStep = 1;

  static QUIRE_INLINE void begin() {}
  static QUIRE_INLINE void end() {}
  static QUIRE_INLINE Vec multiply_add(Bits a, Bits b, Vec sum) { return fma(from_bits(a), from_bits(b), sum); }

  template <bool kAdd>
  static void multiply(const std::uint32_t* a, std::int64_t a_stride, int num_rows, const std::uint32_t* b, std::int64_t panel_stride,
                       int num_panels, int num_words, float* c, std::int64_t c_stride) {
    // The error of a sum grows with its length: long ones are taken in pieces.
    constexpr int kMaxWords = 128;
    multiply_in_registers<FloatEngine, kAdd>(a, a_stride, num_rows, b, panel_stride, num_panels, smaller(num_words, kMaxWords), c,
                                             c_stride);
    for (int w = kMaxWords; w < num_words; w += kMaxWords)
      multiply_in_registers<FloatEngine, true>(a + w, a_stride, num_rows, b + w * kPanel, panel_stride, num_panels,
                                               smaller(num_words - w, kMaxWords), c, c_stride);
  }

  static QUIRE_INLINE void load_query_words(const AttentionParams& p, std::int64_t token, std::int64_t head, std::uint32_t* out,
                                            std::int64_t num_words) {
    load_query(p, token, head, reinterpret_cast<float*>(out), num_words);
  }
  template <typename KvT>
  static QUIRE_INLINE Bits load_words(const KvT* row, int n) {
    return bits(load_dims(row, n));
  }
  static QUIRE_INLINE Bits join(Vec v, Vec) { return bits(v); }

  /// Where the weights of a row of scores go: they replace the scores.
  static QUIRE_INLINE std::uint32_t* weight_row(float* scores, std::uint32_t*) { return reinterpret_cast<std::uint32_t*>(scores); }
  static QUIRE_INLINE Vec put_weights(std::uint32_t* row, int column, Vec weights) {
    store(reinterpret_cast<float*>(row) + column, weights);
    return weights;
  }
  static QUIRE_INLINE float weight(const std::uint32_t* row, int column) { return reinterpret_cast<const float*>(row)[column]; }
};

/// Transposes kLanes x kLanes words: each round of shuffles rotates the bits of (row, column) by one.
inline __attribute__((noinline)) void transpose(Bits* rows) {
  Vec a[kLanes], b[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) a[i] = from_bits(rows[i]);
#pragma GCC unroll 4
  for (int round = 1; round < kLanes; round *= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes / 2; ++i) interleave(a[i], a[i + kLanes / 2], b[2 * i], b[2 * i + 1]);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) a[i] = b[i];
  }
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) rows[i] = bits(a[i]);
}

/// Packs keys as a right operand with a column per key; num_words counts the words of a key, zeros past head_dim.
template <typename Engine, typename KvT>
void pack_keys(const AttentionKeyTile& tile, int first_key, int last_key, int head_dim, int num_words, std::uint32_t* out) {
  constexpr int kElements = Engine::kWordElements;
  for (int key = first_key; key < last_key; key += kLanes) {
    std::uint32_t* panel = out + static_cast<std::int64_t>(key / kPanel) * num_words * kPanel + key % kPanel;
    for (int word = 0; word < num_words; word += kLanes) {
      const int d = word * kElements, left = larger(smaller(head_dim / kElements - word, kLanes), 0);
      Bits rows[kLanes];
      for (int j = 0; j < kLanes; ++j) rows[j] = Engine::load_words(static_cast<const KvT*>(tile.k[key + j]) + d, left);
      transpose(rows);
      const int count = smaller(num_words - word, kLanes);
      for (int w = 0; w < count; ++w) detail::store32(panel + (word + w) * kPanel, rows[w]);
    }
  }
}

/// Packs values as a right operand with a column per dimension, zeros past head_dim; panels are panel_stride words apart.
template <typename Engine, typename KvT>
void pack_values(const AttentionKeyTile& tile, int first_key, int last_key, int head_dim, std::int64_t panel_stride, std::uint32_t* out) {
  constexpr int kElements = Engine::kWordElements;
  const int padded_dim = round_up(head_dim, kPanel);
  for (int key = first_key; key < last_key; key += kElements) {
    const KvT* v0 = static_cast<const KvT*>(tile.v[key]);
    const KvT* v1 = static_cast<const KvT*>(tile.v[key + kElements - 1]);
    std::uint32_t* row = out + static_cast<std::int64_t>(key / kElements) * kPanel;
    for (int d = 0; d < padded_dim; d += kLanes) {
      std::uint32_t* words = row + (d / kPanel) * panel_stride + d % kPanel;
      const int left = larger(smaller(head_dim - d, kLanes), 0);
      detail::store32(words, Engine::join(load_dims(v0 + d, left), load_dims(v1 + d, left)));
    }
  }
}

/// Whether no value of the tile is NaN or infinite.
template <typename KvT>
bool values_are_finite(const AttentionKeyTile& tile, int num_keys, int head_dim) {
  const Bits exponent = set1_bits(0x7f800000u);
  Bits largest = set1_bits(0u);
  for (int j = 0; j < num_keys; ++j) {
    const KvT* v = static_cast<const KvT*>(tile.v[j]);
    for (int d = 0; d < head_dim; d += kLanes) {
      const Bits e = bits(load_dims(v + d, smaller(kLanes, head_dim - d))) & exponent;
      largest = select(less_signed(largest, e), e, largest);
    }
  }
  alignas(64) std::uint32_t lanes[kLanes];
  detail::store32(lanes, largest);
  bool finite = true;
  for (int i = 0; i < kLanes; ++i) finite = finite && lanes[i] != 0x7f800000u;
  return finite;
}

/// sums[d] += weight * v[d], of one key; sums are padded to whole vectors.
template <typename KvT>
void add_value(const void* value, float weight, int head_dim, float* sums) {
  const KvT* v = static_cast<const KvT*>(value);
  for (int d = 0; d < head_dim; d += kLanes)
    store(sums + d, fma(set1(weight), load_dims(v + d, smaller(kLanes, head_dim - d)), load(sums + d)));
}

/// What depends on the dtype of keys and values.
struct TileFunctions {
  void (*pack_keys)(const AttentionKeyTile&, int, int, int, int, std::uint32_t*);
  void (*pack_values)(const AttentionKeyTile&, int, int, int, std::int64_t, std::uint32_t*);
  bool (*values_are_finite)(const AttentionKeyTile&, int, int);
  void (*add_value)(const void*, float, int, float*);
};

template <typename Engine>
struct PrefillScratch {
  std::uint32_t *q, *k, *v, *weights;
  float *sums, *scores;
  RowState* states;
  std::int64_t sums_stride;  // of a row, in floats
  int q_words;               // of a row
  int tile_keys;

  QUIRE_INLINE std::int64_t assign(std::byte* base, std::int64_t num_rows, std::int64_t head_dim) {
    constexpr int kElements = Engine::kWordElements;
    ScratchLayout layout{base};
    const std::int64_t padded_rows = round_up<std::int64_t>(num_rows, Engine::kRowStep);
    sums_stride = round_up<std::int64_t>(head_dim, kPanel);
    // Query rows are loaded by whole vectors.
    q_words = static_cast<int>(round_up<std::int64_t>(head_dim / kElements, kElements == 1 ? kLanes : Engine::kWordStep));
    // Packed keys and values should leave most of the second-level cache to the rows.
    tile_keys = q_words <= 64 ? 256 : q_words <= 128 ? 128 : 64;
    q = layout.take<std::uint32_t>(padded_rows * q_words);
    sums = layout.take<float>(padded_rows * sums_stride);
    states = layout.take<RowState>(padded_rows);
    k = layout.take<std::uint32_t>(static_cast<std::int64_t>(tile_keys) * q_words);
    v = layout.take<std::uint32_t>(tile_keys / kElements * sums_stride);
    scores = layout.take<float>(static_cast<std::int64_t>(kRowBlock) * tile_keys);
    weights = kElements == 1 ? nullptr : layout.take<std::uint32_t>(static_cast<std::int64_t>(kRowBlock) * tile_keys / kElements);
    return layout.num_bytes;
  }
};

template <typename Engine>
std::int64_t prefill_scratch_bytes(std::int64_t num_rows, std::int64_t head_dim) {
  PrefillScratch<Engine> scratch;
  return scratch.assign(nullptr, num_rows, head_dim);
}

template <typename Engine>
void run_prefill(const AttentionTask& task, std::byte* scratch_bytes, const TileFunctions& functions) {
  constexpr int kElements = Engine::kWordElements;
  const AttentionParams& p = *task.params;
  const int head_dim = static_cast<int>(p.head_dim);
  const std::int64_t group = p.num_heads / p.num_kv_heads;
  const std::int64_t num_queries = task.query_end - task.query_begin, num_rows = num_queries * group;
  const std::int64_t padded_rows = round_up<std::int64_t>(num_rows, Engine::kRowStep);
  PrefillScratch<Engine> scratch;
  scratch.assign(scratch_bytes, num_rows, head_dim);
  const std::int64_t sums_stride = scratch.sums_stride;
  const int q_words = scratch.q_words, tile_size = scratch.tile_keys;
  const int num_sum_panels = static_cast<int>(sums_stride / kPanel);
  const std::int64_t value_panel_stride = static_cast<std::int64_t>(tile_size / kElements) * kPanel;
  const std::int64_t weight_stride = kElements == 1 ? tile_size : tile_size / kElements;

  for (std::int64_t r = 0; r < padded_rows; ++r) {
    std::uint32_t* q = scratch.q + r * q_words;
    if (r < num_rows)
      Engine::load_query_words(p, task.sequence.query_begin + task.query_begin + r / group, task.kv_head_begin * group + r % group, q,
                               q_words);
    else
      __builtin_memset(q, 0, static_cast<std::size_t>(q_words) * sizeof(*q));
    scratch.states[r] = {-kInfinity, 0.0f};
  }
  __builtin_memset(scratch.sums, 0, static_cast<std::size_t>(padded_rows * sums_stride) * sizeof(float));

  const ScoreRule rule = score_rule(p, task.kv_head_begin);
  const std::int64_t first_position = task.sequence.kv_len - task.sequence.num_queries;
  const auto keys_of = [&](std::int64_t row)
                           __attribute__((always_inline)) { return visible_keys(p, task.sequence, task.query_begin + row / group); };
  AttentionKeyTile tile;
  Engine::begin();
  for (std::int64_t key = task.key_begin; key < task.key_end; key += tile_size) {
    const int num_keys = static_cast<int>(smaller<std::int64_t>(tile_size, task.key_end - key));
    const int padded_keys = round_up(num_keys, kPanel);
    locate_keys(task, key, num_keys, padded_keys, tile);
    functions.pack_keys(tile, 0, padded_keys, head_dim, q_words, scratch.k);
    functions.pack_values(tile, 0, padded_keys, head_dim, value_panel_stride, scratch.v);
    // A key that only some rows see has weight 0 for the others, which selects it away only if its value is finite.
    const bool masked = num_queries > 1 && mask_reaches(task, key, num_keys);
    const bool all_see_all = !masked && keys_of(0).end >= key + num_keys && keys_of(num_rows - 1).begin <= key;
    const bool finite = all_see_all || functions.values_are_finite(tile, num_keys, head_dim);
    const std::uint32_t* hidden = tile.any_hidden ? tile.hidden : nullptr;
    std::uint32_t row_hidden[kMaxTileKeys / 32];  // with a mask, of the query that row_query names
    std::int64_t row_query = -1;

    for (std::int64_t block = 0; block < num_rows; block += kRowBlock) {
      const int block_rows = static_cast<int>(smaller<std::int64_t>(kRowBlock, num_rows - block));
      const int padded_block_rows = round_up(block_rows, Engine::kRowStep);
      // The keys that any row of the block sees: both ends grow with the query.
      const std::int64_t seen_begin = larger(keys_of(block).begin, key),
                         seen_end = smaller(keys_of(block + block_rows - 1).end, key + num_keys);
      if (seen_begin >= seen_end) continue;
      const int first = static_cast<int>(seen_begin - key) / kPanel * kPanel, last = round_up(static_cast<int>(seen_end - key), kPanel);
      float* scores = scratch.scores + first;
      Engine::template multiply<false>(scratch.q + block * q_words, q_words, padded_block_rows,
                                       scratch.k + static_cast<std::int64_t>(first) * q_words, static_cast<std::int64_t>(q_words) * kPanel,
                                       (last - first) / kPanel, q_words, scores, tile_size);

      for (int r = 0; r < block_rows; ++r) {
        const std::int64_t row = block + r, query = task.query_begin + row / group;
        const AttentionKeyRange seen = keys_of(row);
        if (masked && query != row_query) {
          row_query = query;
          for (int i = 0; i < kMaxTileKeys / 32; ++i) row_hidden[i] = tile.any_hidden ? tile.hidden[i] : 0u;
          hide_masked(task, query, key, num_keys, row_hidden);
          hidden = row_hidden;
        }
        const RowMask mask = {static_cast<int>(larger<std::int64_t>(seen.begin - key, 0)),
                              static_cast<int>(smaller<std::int64_t>(larger<std::int64_t>(seen.end - key, 0), num_keys)), hidden};
        const float alibi = p.alibi_slopes ? p.alibi_slopes[task.kv_head_begin * group + row % group] * kLog2E : 0.0f;
        float* score_row = scratch.scores + static_cast<std::int64_t>(r) * tile_size;
        std::uint32_t* weight_row = Engine::weight_row(score_row, scratch.weights + r * weight_stride);
        const float rescale = softmax_row(score_row, first, last, mask, rule, alibi, key - (first_position + query), scratch.states[row],
                                          [&](int column, Vec weights)
                                              __attribute__((always_inline)) { return Engine::put_weights(weight_row, column, weights); });
        float* sums = scratch.sums + row * sums_stride;
        if (rescale != 1.0f)
          for (std::int64_t d = 0; d < sums_stride; d += kLanes) store(sums + d, load(sums + d) * set1(rescale));
        if (!finite)
          for (int j = mask.begin; j < mask.end; ++j)
            if (!masked || (row_hidden[j / 32] >> (j % 32) & 1u) == 0)
              functions.add_value(tile.v[j], Engine::weight(weight_row, j), head_dim, sums);
      }

      if (finite) {
        const std::uint32_t* weights = Engine::weight_row(scratch.scores, scratch.weights) + first / kElements;
        Engine::template multiply<true>(weights, weight_stride, padded_block_rows,
                                        scratch.v + static_cast<std::int64_t>(first / kElements) * kPanel, value_panel_stride,
                                        num_sum_panels, (last - first) / kElements, scratch.sums + block * sums_stride, sums_stride);
      }
    }
  }
  Engine::end();
  finish_rows(task, scratch.sums, sums_stride, scratch.states);
}

template <typename Engine, typename KvT>
void prefill(const AttentionTask& task, std::byte* scratch) {
  static constexpr TileFunctions kFunctions = {pack_keys<Engine, KvT>, pack_values<Engine, KvT>, values_are_finite<KvT>, add_value<KvT>};
  run_prefill<Engine>(task, scratch, kFunctions);
}

template <typename Engine, typename KvT>
inline constexpr AttentionKernel kPrefill = {prefill<Engine, KvT>, prefill_scratch_bytes<Engine>};

}  // namespace quire::cpu::QUIRE_ISA_NAMESPACE
