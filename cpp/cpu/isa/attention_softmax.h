// The parts of attention that every kernel shares: scores to weights, the online softmax, and the end of a row.
// SPDX-License-Identifier: Apache-2.0
//
// Scores, maxima and sinks are in units of log 2, so that a weight is 2^(score - max).
#pragma once

#include "cpu/isa/attention.h"
#include "cpu/isa/vec.h"

namespace quire::cpu::QUIRE_ISA_NAMESPACE {

inline constexpr float kLog2E = 0x1.715476p+0f;
inline constexpr float kLn2 = 0x1.62e430p-1f;
inline constexpr float kInfinity = __builtin_inff();

/// A value as a type, for generic lambdas.
template <typename T, T kValue>
struct Constant {
  static constexpr T value = kValue;
};

template <typename Int>
constexpr QUIRE_INLINE Int round_up(Int a, Int b) {
  return (a + b - 1) / b * b;
}
template <typename Int>
constexpr QUIRE_INLINE Int smaller(Int a, Int b) {
  return a < b ? a : b;
}
template <typename Int>
constexpr QUIRE_INLINE Int larger(Int a, Int b) {
  return a > b ? a : b;
}

/// Hands out 64-byte aligned pieces of a kernel's scratch memory; with a null base it only counts.
struct ScratchLayout {
  std::byte* base;
  std::int64_t num_bytes = 0;

  template <typename T>
  QUIRE_INLINE T* take(std::int64_t count) {
    T* piece = base ? reinterpret_cast<T*>(base + num_bytes) : nullptr;
    num_bytes += round_up<std::int64_t>(count * static_cast<std::int64_t>(sizeof(T)), 64);
    return piece;
  }
};

/// 2^t for t <= 0 or barely above, relative error 1e-7; 0 below -125, so that no weight is subnormal; NaN for NaN.
QUIRE_INLINE Vec exp2_weight(Vec t) {
  const Vec clamped = max(set1(-125.0f), t);
  // Adding 1.5 * 2^23 rounds to an integer, which the low bits then hold.
  const Vec shifted = clamped + set1(0x1.8p23f);
  const Vec n = shifted - set1(0x1.8p23f);
  const Vec f = clamped - n;
  Vec p = set1(0x1.41fbbcp-13f);
  p = fma(p, f, set1(0x1.5f3e54p-10f));
  p = fma(p, f, set1(0x1.3b2d4cp-7f));
  p = fma(p, f, set1(0x1.c6aee8p-5f));
  p = fma(p, f, set1(0x1.ebfbdcp-3f));
  p = fma(p, f, set1(0x1.62e430p-1f));
  p = fma(p, f, set1(1.0f));
#if QUIRE_ISA_LEVEL >= 2
  const Vec power = {_mm512_scalef_ps(p.v, n.v)};
#else
  const Vec power = p * from_bits(shift_left<23>(bits(shifted) + set1_bits(127u)));
#endif
  return select(t < set1(-125.0f), zero(), power);
}

// head_dim is a multiple of 8.
inline constexpr bool kHeadsHaveTails = kLanes > 8;

/// The first n dimensions of a vector of a head, 0 <= n <= kLanes and as many as head_dim leaves; 0 in the other lanes.
template <typename T>
QUIRE_INLINE Vec load_dims(const T* x, int n) {
  if (n >= kLanes) return load(x);
  if constexpr (kHeadsHaveTails) {
    if (n > 0) return load(x, n);
  }
  return zero();
}

template <typename T, typename Out>
QUIRE_INLINE void convert_row(const T* x, std::int64_t count, Out* out, std::int64_t padded_count) {
  std::int64_t d = 0;
  for (; d + kLanes <= count; d += kLanes) store(out + d, load(x + d));
  for (; d < padded_count; d += kLanes) store(out + d, load(x + d, static_cast<int>(larger<std::int64_t>(count - d, 0))));
}

/// A row of q, padded with zeros; padded_count is a multiple of kLanes.
template <typename Out>
QUIRE_INLINE void load_query(const AttentionParams& p, std::int64_t token, std::int64_t head, Out* out, std::int64_t padded_count) {
  const std::int64_t offset = token * p.q_token_stride + head * p.q_head_stride;
  switch (p.dtype) {
    case DType::kFloat16: convert_row(static_cast<const Half*>(p.q) + offset, p.head_dim, out, padded_count); break;
    case DType::kBFloat16: convert_row(static_cast<const BFloat16*>(p.q) + offset, p.head_dim, out, padded_count); break;
    default: convert_row(static_cast<const float*>(p.q) + offset, p.head_dim, out, padded_count); break;
  }
}

/// How dot products become scores.
struct ScoreRule {
  float factor;   // dot product to score, or to the argument of tanh
  float softcap;  // tanh to score; 0: none
  bool plain;     // the factor is all there is
};

QUIRE_INLINE ScoreRule score_rule(const AttentionParams& p, std::int64_t kv_head) {
  float scale = p.scale * (p.k_scale ? p.k_scale[kv_head * p.k_scale_stride] : 1.0f);
  if (p.q_scale) scale *= p.q_scale[kv_head * p.q_scale_stride];
  if (p.softcap > 0.0f) return {scale / p.softcap, p.softcap * kLog2E, false};
  return {scale * kLog2E, 0.0f, p.alibi_slopes == nullptr};
}

/// The columns of a tile of scores that a row sees.
struct RowMask {
  int begin, end;
  const std::uint32_t* hidden;  // null: none
};

QUIRE_INLINE Vec apply_mask(Vec scores, int column, RowMask mask) {
  alignas(64) static constexpr std::uint32_t kLaneBits[16] = {1u << 0, 1u << 1, 1u << 2,  1u << 3,  1u << 4,  1u << 5,  1u << 6,  1u << 7,
                                                              1u << 8, 1u << 9, 1u << 10, 1u << 11, 1u << 12, 1u << 13, 1u << 14, 1u << 15};
  const Bits lanes = lane_numbers();
  const Vec masked = set1(-kInfinity);
  scores = select(less_signed(lanes, set1_bits(static_cast<std::uint32_t>(mask.end - column))), scores, masked);
  scores = select(less_signed(lanes, set1_bits(static_cast<std::uint32_t>(mask.begin - column))), masked, scores);
  if (mask.hidden) {
    const std::uint32_t word = (mask.hidden[column / 32] >> (column % 32)) & 0xffffu;
    const Bits hidden = set1_bits(word) & detail::load32(kLaneBits);
    scores = select(less_signed(set1_bits(0u), hidden), masked, scores);
  }
  return scores;
}

/// Running state of a row.
struct RowState {
  float max, sum;
};

/// Turns the dot products s[begin, end) of a row into weights against the row's new maximum. begin and end are multiples of kLanes
/// and may reach beyond the mask: weights there are 0, whatever s holds. put(column, weights) stores kLanes weights and returns
/// what it stored. `alibi` is slope * log2(e), `distance` is column 0's key minus the row's position. Returns the factor for what
/// the row has accumulated so far.
template <typename Put>
QUIRE_INLINE float softmax_row(float* s, int begin, int end, RowMask mask, const ScoreRule& rule, float alibi, std::int64_t distance,
                               RowState& state, Put&& put) {
  const bool masked = mask.begin > begin || mask.end < end || mask.hidden != nullptr;
  const bool in_place = !rule.plain || masked;
  const Vec factor = set1(rule.factor);
  Vec row_max = set1(state.max);
  if (!in_place) {
    for (int c = begin; c < end; c += kLanes) row_max = max(load(s + c) * factor, row_max);
  } else {
    for (int c = begin; c < end; c += kLanes) {
      Vec x = load(s + c) * factor;
      if (rule.softcap > 0.0f) x = tanh(x) * set1(rule.softcap);
      if (alibi != 0.0f) x = fma(set1(alibi), set1(static_cast<float>(distance + c)) + detail::small_int_to_float(lane_numbers()), x);
      if (masked) x = apply_mask(x, c, mask);
      store(s + c, x);
      row_max = max(x, row_max);
    }
  }
  const float new_max = reduce_max(row_max);
  // Without a key so far everything is -inf, and must not be subtracted from itself.
  const float reference = new_max == -kInfinity ? 0.0f : new_max;
  const Vec shift = set1(-reference);
  Vec sum = zero();
  if (in_place) {
    for (int c = begin; c < end; c += kLanes) sum += put(c, exp2_weight(load(s + c) + shift));
  } else {
    for (int c = begin; c < end; c += kLanes) sum += put(c, exp2_weight(fma(load(s + c), factor, shift)));
  }
  const float rescale = state.max == -kInfinity ? 0.0f : state.max == new_max ? 1.0f : __builtin_exp2f(state.max - reference);
  state.sum = state.sum * rescale + reduce_add(sum);
  state.max = new_max;
  return rescale;
}

template <typename T>
QUIRE_INLINE void store_scaled(T* out, const float* sums, float factor, std::int64_t head_dim) {
  std::int64_t d = 0;
  for (; d + kLanes <= head_dim; d += kLanes) store(out + d, load(sums + d) * set1(factor));
  if (const int left = static_cast<int>(head_dim - d); left > 0) store(out + d, load(sums + d, left) * set1(factor), left);
}

/// Ends a row of a task: writes out and lse.
inline void finish_row(const AttentionTask& task, std::int64_t row, const float* sums, RowState state) {
  const AttentionParams& p = *task.params;
  const std::int64_t group = p.num_heads / p.num_kv_heads, num_heads = heads_of(task);
  const std::int64_t token = task.sequence.query_begin + task.query_begin + row / num_heads;
  const std::int64_t head = task.kv_head_begin * group + row % num_heads;
  const float sink = p.sinks ? p.sinks[head] * kLog2E : -kInfinity;
  float lse = p.sinks ? p.sinks[head] : -kInfinity, factor = 0.0f;
  // The sum tells whether there were keys: scores that are all NaN leave the maximum at -inf.
  if (state.sum != 0.0f) {
    const float reference = sink > state.max ? sink : state.max;
    const float rescale = __builtin_exp2f(state.max - reference);
    const float denominator = state.sum * rescale + (p.sinks ? __builtin_exp2f(sink - reference) : 0.0f);
    lse = reference * kLn2 + __builtin_logf(denominator);
    factor = rescale / denominator * (p.v_scale ? p.v_scale[head / group * p.v_scale_stride] : 1.0f);
  }
  const std::int64_t offset = token * p.out_token_stride + head * p.out_head_stride;
  switch (p.dtype) {
    case DType::kFloat16: store_scaled(static_cast<Half*>(p.out) + offset, sums, factor, p.head_dim); break;
    case DType::kBFloat16: store_scaled(static_cast<BFloat16*>(p.out) + offset, sums, factor, p.head_dim); break;
    default: store_scaled(static_cast<float*>(p.out) + offset, sums, factor, p.head_dim); break;
  }
  if (p.lse) p.lse[token * p.num_heads + head] = lse;
}

/// Ends a task: finishes its rows, or writes their partial state. Row r's sums are at sums + r * stride.
inline void finish_rows(const AttentionTask& task, const float* sums, std::int64_t stride, const RowState* states) {
  const std::int64_t head_dim = task.params->head_dim, num_rows = rows_of(task);
  for (std::int64_t row = 0; row < num_rows; ++row) {
    if (!task.partial) {
      finish_row(task, row, sums + row * stride, states[row]);
      continue;
    }
    float* maxima = task.partial + num_rows * head_dim;
    __builtin_memcpy(task.partial + row * head_dim, sums + row * stride, static_cast<std::size_t>(head_dim) * sizeof(float));
    maxima[row] = states[row].max;
    maxima[num_rows + row] = states[row].sum;
  }
}

inline void merge_partials(const AttentionTask& task, float* partials, std::int64_t num_partials) {
  const std::int64_t head_dim = task.params->head_dim, num_rows = rows_of(task);
  const std::int64_t partial_size = num_rows * (head_dim + 2);
  for (std::int64_t row = 0; row < num_rows; ++row) {
    const float* row_maxima = partials + num_rows * head_dim + row;
    const float* row_sums = row_maxima + num_rows;
    float max = -kInfinity;
    for (std::int64_t i = 0; i < num_partials; ++i) max = larger(row_maxima[i * partial_size], max);
    RowState state = {max, 0.0f};
    float* sums = partials + row * head_dim;  // the first range's sums become the row's
    for (std::int64_t i = 0; i < num_partials; ++i) {
      const float sum = row_sums[i * partial_size];
      const float weight = sum == 0.0f ? 0.0f : __builtin_exp2f(row_maxima[i * partial_size] - max);
      state.sum += weight * sum;
      const float* partial_sums = sums + i * partial_size;
      for (std::int64_t d = 0; d < head_dim; ++d) sums[d] = (i == 0 ? 0.0f : sums[d]) + weight * partial_sums[d];
    }
    finish_row(task, row, sums, state);
  }
}

}  // namespace quire::cpu::QUIRE_ISA_NAMESPACE
