// One warp's queries, 16 for each of its row tiles, as the rows of the products: scores, masks, online softmax, and the sum of p v.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cuda/attention/mma_tile.cuh"

namespace quire::cuda::attn {

/// The state of one warp's kTiles * 16 rows: output sums, the base of the exponentials, and the thread's part of their sum. A row tile's
/// thread has rows lane / 4 and lane / 4 + 8; arrays over rows have them at 2 * tile and 2 * tile + 1. What is read of K and V serves all row
/// tiles.
template <DType kKvDType, int kHeadDim, int kTiles, int kQSteps>
struct MmaRows {
  using Types = MmaTypes<kKvDType, kHeadDim>;
  static constexpr bool kBf16 = Types::kBf16;
  static constexpr int kSteps = kHeadDim / 16;  // of the q k product
  static constexpr int kRows = 2 * kTiles;      // of a thread
  /// With 8-bit keys each row has a scale of its own; else a CTA has one.
  static constexpr int kScales = Types::kQuantized ? kRows : 1;
  /// Weights of one step and thread that add up to less are kept as they are: float16 holds them.
  static constexpr float kLargeWeights = 16384.0f;

  float out[kTiles][kHeadDim / 8][4];
  float base[kRows];  // what weights are relative to, in log2 units; -inf while a row that sees keys has none
  float sum[kRows];
  std::uint32_t q[kTiles][kQSteps > 0 ? kQSteps : 1][4];  // of the first kQSteps steps
  std::uint32_t q_address;  // the thread's, for step 0

  template <int kKeys>
  using Scores = float[kTiles][kKeys / 8][4];
  /// The left operands of the product with V: of 16 keys each.
  template <int kKeys>
  using Weights = std::uint32_t[kTiles][kKeys / 16][4];

  /// The thread's row i, of the warp's.
  __device__ __forceinline__ static int row(int i) { return i / 2 * 16 + static_cast<int>(threadIdx.x % 32 / 4) + i % 2 * 8; }

  __device__ __forceinline__ static float log2_scale(const ScoreScale<kScales>& score, int i) {
    return score.log2_scale[Types::kQuantized ? i : 0];
  }

  using KvRows = Rows<Types::kKvRowBytes>;

  /// `sees_keys(i)` says whether the thread's row i sees any.
  template <typename F>
  __device__ __forceinline__ void reset(F&& sees_keys) {
#pragma unroll
    for (int t = 0; t < kTiles; ++t)
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) out[t][n][i] = 0.0f;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      base[i] = sees_keys(i) ? -INFINITY : 0.0f;
      sum[i] = 0.0f;
    }
  }

  __device__ __forceinline__ void load_q_step(std::uint32_t (&fragment)[4], int tile, int step) const {
    device::load_matrix_x4(fragment, Rows<Types::kQRowBytes>::advance(q_address, 16 * tile, 2 * step));
  }

  __device__ __forceinline__ void q_step(std::uint32_t (&fragment)[4], int tile, int step) const {
    if (step < kQSteps) {
#pragma unroll
      for (int i = 0; i < 4; ++i) fragment[i] = q[tile][step][i];
    } else {
      load_q_step(fragment, tile, step);
    }
  }

  __device__ __forceinline__ void attach_q(std::uint32_t address, int first_row) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    q_address = Rows<Types::kQRowBytes>::address(address, first_row + lane % 16, lane / 16);
#pragma unroll
    for (int t = 0; t < kTiles; ++t)
#pragma unroll
      for (int step = 0; step < kQSteps; ++step) load_q_step(q[t][step], t, step);
  }

  /// Where the thread's part of K begins in a slot at address 0: its row and chunk of the first ldmatrix.
  __device__ __forceinline__ static std::uint32_t k_thread_offset() {
    const int lane = static_cast<int>(threadIdx.x % 32);
    // 16-bit: (keys 0 to 7, chunk 0), (same, 1), (keys 8 to 15, 0), (same, 1). 8-bit: (0 to 7, 0), (8 to 15, 0), (0 to 7, 1), ...
    return Types::kQuantized ? KvRows::address(0, lane % 16, lane / 16) : KvRows::address(0, lane / 16 * 8 + lane % 8, lane / 8 % 2);
  }

  /// scores = q k for kKeys keys; `k_address` is k_thread_offset() in their slot.
  template <int kKeys>
  __device__ __forceinline__ void multiply_qk(Scores<kKeys>& scores, std::uint32_t k_address) const {
#pragma unroll
    for (int t = 0; t < kTiles; ++t)
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) scores[t][n][i] = 0.0f;
    if constexpr (!Types::kQuantized) {
      // Fragments are loaded one product ahead.
      constexpr int kPairs = kKeys / 16;
      std::uint32_t a[2][kTiles][4], b[2][4];
#pragma unroll
      for (int t = 0; t < kTiles; ++t) q_step(a[0][t], t, 0);
      device::load_matrix_x4(b[0], k_address);
#pragma unroll
      for (int step = 0; step < kSteps; ++step)
#pragma unroll
        for (int pair = 0; pair < kPairs; ++pair) {
          const int i = step * kPairs + pair;
          if (pair + 1 < kPairs) {
            device::load_matrix_x4(b[(i + 1) % 2], KvRows::advance(k_address, 16 * (pair + 1), 2 * step));
          } else if (step + 1 < kSteps) {
#pragma unroll
            for (int t = 0; t < kTiles; ++t) q_step(a[(step + 1) % 2][t], t, step + 1);
            device::load_matrix_x4(b[(i + 1) % 2], KvRows::advance(k_address, 0, 2 * (step + 1)));
          }
#pragma unroll
          for (int t = 0; t < kTiles; ++t) {
            device::mma_16816<kBf16>(scores[t][2 * pair], a[step % 2][t], b[i % 2][0], b[i % 2][1]);
            device::mma_16816<kBf16>(scores[t][2 * pair + 1], a[step % 2][t], b[i % 2][2], b[i % 2][3]);
          }
        }
    } else {
#pragma unroll
      for (int step = 0; step < kSteps; step += 2) {
        std::uint32_t a[kTiles][2][4];
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
          q_step(a[t][0], t, step);
          q_step(a[t][1], t, step + 1);
        }
#pragma unroll
        for (int pair = 0; pair < kKeys / 16; ++pair) {
          std::uint32_t b[4];  // (keys 0 to 7, step), (keys 8 to 15, step), then step + 1
          device::load_matrix_x4(b, KvRows::advance(k_address, 16 * pair, step));
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            std::uint32_t b0, b1;
            device::dequantize_4<Types::kByte>(b[i], b0, b1);
#pragma unroll
            for (int t = 0; t < kTiles; ++t) device::mma_16816<kBf16>(scores[t][2 * pair + i % 2], a[t][i / 2], b0, b1);
          }
        }
      }
    }
  }

  /// Turns q k into scores in log2 units where more than a factor is asked for. Key `first_key` is column 0; `row_params` is the
  /// warp's.
  template <int kKeys>
  __device__ __forceinline__ static void transform_scores(Scores<kKeys>& scores, const RowParams* row_params, float softcap,
                                                          int first_key) {
    const int lane = static_cast<int>(threadIdx.x % 32);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const RowParams params = row_params[row(i)];
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& score = scores[i / 2][n][i % 2 * 2 + e];
          score = transformed_score(score, params, softcap, first_key + 8 * n + lane % 4 * 2 + e);
        }
    }
  }

  /// Selects -inf for keys that a row does not see. Bit j of `valid` says whether key j of the step exists.
  template <int kKeys>
  __device__ __forceinline__ static void mask_scores(Scores<kKeys>& scores, const RowParams* row_params, int first_key,
                                                     const std::uint32_t (&valid)[(kKeys + 31) / 32]) {
    const int lane = static_cast<int>(threadIdx.x % 32);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int begin = row_params[row(i)].begin, end = row_params[row(i)].end;
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int column = 8 * n + lane % 4 * 2 + e;
          const int key = first_key + column;
          const bool seen = ((valid[n / 4] >> (column % 32)) & 1u) != 0 && key >= begin && key < end;
          if (!seen) scores[i / 2][n][i % 2 * 2 + e] = -INFINITY;
        }
    }
  }

  /// The same where all keys exist, and the thread's row i sees those before ends[i].
  template <int kKeys>
  __device__ __forceinline__ static void hide_keys(Scores<kKeys>& scores, const int (&ends)[kRows], int first_key) {
    const int first = first_key + static_cast<int>(threadIdx.x % 4) * 2;
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e)
          if (first + 8 * n + e >= ends[i]) scores[i / 2][n][i % 2 * 2 + e] = -INFINITY;
  }

  template <int kKeys>
  __device__ __forceinline__ static void hide_missing(Scores<kKeys>& scores, const std::uint32_t (&valid)[(kKeys + 31) / 32]) {
    const int first = static_cast<int>(threadIdx.x % 4) * 2;
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e)
          if (((valid[n / 4] >> (first + n % 4 * 8 + e)) & 1u) == 0) scores[i / 2][n][i % 2 * 2 + e] = -INFINITY;
  }

  /// The same for keys that the mask hides. A lane fetches 32 keys' bits of one row.
  template <int kKeys>
  __device__ __forceinline__ static void apply_mask(Scores<kKeys>& scores, const AttentionParams& p, const RowParams* row_params,
                                                    int first_key) {
    const int lane = static_cast<int>(threadIdx.x % 32);
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      const std::uint32_t mine = mask_bits(p, row_params[16 * t + lane % 16], first_key + (kKeys > 32 ? lane / 16 * 32 : 0));
#pragma unroll
      for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int m = 0; m < (kKeys + 31) / 32; ++m) {
          const std::uint32_t seen = __shfl_sync(kAllLanes, mine, lane / 4 + 8 * r + 16 * m) >> (lane % 4 * 2);
#pragma unroll
          for (int n = 4 * m; n < 4 * m + 4; ++n)
#pragma unroll
            for (int e = 0; e < 2; ++e)
              if (((seen >> (n % 4 * 8 + e)) & 1u) == 0) scores[t][n][2 * r + e] = -INFINITY;
        }
    }
  }

  /// Scores become weights relative to `base`, which need not be the maximum: as long as weights are not large, nothing depends on it.
  /// `added` is what they come to in this thread's columns. Bit i of the result: they are large, or not numbers, in the thread's row i.
  /// `raised`: after raise_base; then a row without a base has no weights.
  template <int kKeys>
  __device__ __forceinline__ unsigned weigh(Weights<kKeys>& weights, const Scores<kKeys>& scores, const ScoreScale<kScales>& score,
                                            bool raised, float (&added)[kRows]) const {
    float shift[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      shift[i] = raised && base[i] == -INFINITY ? 0.0f : base[i];
      added[i] = 0.0f;
    }
#pragma unroll
    for (int t = 0; t < kTiles; ++t)
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int r = 2 * t + half;
          const float low = device::exp2_approx(fmaf(scores[t][n][2 * half], log2_scale(score, r), -shift[r]));
          const float high = device::exp2_approx(fmaf(scores[t][n][2 * half + 1], log2_scale(score, r), -shift[r]));
          added[r] += low;
          added[r] += high;
          weights[t][n / 2][n % 2 * 2 + half] = device::pack_16<kBf16>(low, high);
        }
    unsigned large = 0;
#pragma unroll
    for (int i = 0; i < kRows; ++i) large |= added[i] < kLargeWeights ? 0u : 1u << i;
    return large;
  }

  /// Makes the maximum of the scores the base of rows whose weights came to too much, by their own scores alone, and rescales what was summed
  /// so far.
  template <int kKeys>
  __device__ __forceinline__ void raise_base(const Scores<kKeys>& scores, const ScoreScale<kScales>& score, unsigned large) {
    float factors[kRows];
    bool rescales = false;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      float top = -INFINITY;
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) top = fmaxf(top, fmaxf(scores[i / 2][n][i % 2 * 2], scores[i / 2][n][i % 2 * 2 + 1]));
      top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 1));
      top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 2));
      const unsigned of_row = __ballot_sync(kAllLanes, (large >> i & 1u) != 0) >> (threadIdx.x % 32 & ~3u) & 15u;
      const float raised = fmaxf(base[i], top * log2_scale(score, i));
      float factor = 1.0f;
      if (of_row != 0 && raised != -INFINITY) {
        factor = device::exp2_approx(base[i] - raised);
        rescales |= base[i] != -INFINITY;  // else nothing was summed
        base[i] = raised;
      }
      sum[i] *= factor;
      factors[i] = factor;
    }
    if (!__any_sync(kAllLanes, rescales)) return;
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) out[i / 2][n][i % 2 * 2 + e] *= factors[i];
  }

  /// What a row's weights are relative to, and -inf for one that has none.
  __device__ __forceinline__ float final_base(int i) const { return sum[i] == 0.0f ? -INFINITY : base[i]; }

  /// As k_thread_offset, for V: (keys 0 to 7, chunk 0), (keys 8 to 15, chunk 0), (0 to 7, 1), (8 to 15, 1).
  __device__ __forceinline__ static std::uint32_t v_thread_offset() {
    const int lane = static_cast<int>(threadIdx.x % 32);
    return KvRows::address(0, lane % 16, lane / 16);
  }

  /// The V fragments of 16 keys and 32 columns from 16 * pair on: b[i][0], b[i][1] for n-tile 2 (pair + i), b[i][2], b[i][3] for the next.
  __device__ __forceinline__ static void load_v(std::uint32_t (&b)[2][4], std::uint32_t v_address, int first_key, int pair) {
    if constexpr (!Types::kQuantized) {
#pragma unroll
      for (int i = 0; i < 2; ++i) device::load_matrix_x4_transposed(b[i], KvRows::advance(v_address, first_key, 2 * (pair + i)));
    } else {
      std::uint32_t packed[4];
      device::load_matrix_x4_transposed(packed, KvRows::advance(v_address, first_key, pair));
#pragma unroll
      for (int i = 0; i < 4; ++i)
        device::dequantize_4<Types::kByte>(device::permute_bytes(packed[i], 0, 0x3120), b[i / 2][i % 2], b[i / 2][2 + i % 2]);
    }
  }

  /// out += weights v for kKeys keys; `v_address` is v_thread_offset() in their slot.
  template <int kKeys>
  __device__ __forceinline__ void multiply_pv(const Weights<kKeys>& weights, std::uint32_t v_address) {
    constexpr int kPairs = kHeadDim / 32;
    constexpr int kCount = kKeys / 16 * kPairs;
    std::uint32_t b[2][2][4];  // loaded one product ahead
    load_v(b[0], v_address, 0, 0);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (i + 1 < kCount) load_v(b[(i + 1) % 2], v_address, (i + 1) / kPairs * 16, (i + 1) % kPairs * 2);
      const int step = i / kPairs, pair = i % kPairs * 2;
#pragma unroll
      for (int t = 0; t < kTiles; ++t)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          device::mma_16816<kBf16>(out[t][2 * (pair + j)], weights[t][step], b[i % 2][j][0], b[i % 2][j][1]);
          device::mma_16816<kBf16>(out[t][2 * (pair + j) + 1], weights[t][step], b[i % 2][j][2], b[i % 2][j][3]);
        }
    }
  }

  /// Adds up the four threads of each row; before that `sum` is a part.
  __device__ __forceinline__ void reduce_sum() {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      sum[i] += __shfl_xor_sync(kAllLanes, sum[i], 1);
      sum[i] += __shfl_xor_sync(kAllLanes, sum[i], 2);
    }
  }

  /// Two consecutive columns of the thread's row `of`, and the first one, for j below kHeadDim / 8.
  __device__ __forceinline__ float2 columns(int j, int of, int& column) const {
    const int quad = static_cast<int>(threadIdx.x % 4);
    const int r = of % 2;
    const auto& tile = out[of / 2];
    if constexpr (Types::kQuantized) {
      column = 16 * (j / 2) + 4 * quad + j % 2 * 2;
      return float2{tile[j & ~1][2 * r + j % 2], tile[j | 1][2 * r + j % 2]};
    } else {
      column = 8 * j + 2 * quad;
      return float2{tile[j][2 * r], tile[j][2 * r + 1]};
    }
  }

  /// Puts back into the output sums what was noted of the rows of the tile from first_row on.
  __device__ __forceinline__ void add_notes(const std::uint32_t* notes, int first_row) {
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < kHeadDim / 8; ++j) {
        int column;
        columns(j, i, column);
        const std::uint32_t note = notes[(first_row + row(i)) * kNoteWords<kHeadDim> + column / 16] >> (column % 16 * 2);
        float& first = Types::kQuantized ? out[i / 2][j & ~1][i % 2 * 2 + j % 2] : out[i / 2][j][i % 2 * 2];
        float& second = Types::kQuantized ? out[i / 2][j | 1][i % 2 * 2 + j % 2] : out[i / 2][j][i % 2 * 2 + 1];
        first = noted(first, note);
        second = noted(second, note >> 2);
      }
  }

  /// Whether any output sum is infinite or NaN.
  __device__ __forceinline__ bool not_finite() const {
    float probe[4] = {};
#pragma unroll
    for (int t = 0; t < kTiles; ++t)
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) probe[i] = fmaf(out[t][n][i], 0.0f, probe[i]);
    return probe[0] + probe[1] + probe[2] + probe[3] != 0.0f;
  }
};

}  // namespace quire::cuda::attn
