// One warp's queries, 16 for each of its row tiles, as the rows of the products: scores, masks, online softmax, and the sum of p v.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cuda/attention/mma_tile.cuh"

namespace quire::cuda::attn {

/// The state of one warp's kTiles * 16 rows: output sums, the base of the exponentials, and the thread's part of their sum. A row tile's
/// thread has rows lane / 4 and lane / 4 + 8; arrays over rows have them at 2 * tile and 2 * tile + 1. What is read of K and V serves all row
/// tiles.
template <DType kKvDType, int kHeadDim, int kTiles>
struct MmaRows {
  using Types = MmaTypes<kKvDType, kHeadDim>;
  static constexpr bool kBf16 = Types::kBf16;
  static constexpr bool kQInRegisters = kHeadDim <= 128 && kTiles == 1;
  static constexpr int kSteps = kHeadDim / 16;  // of the q k product
  static constexpr int kRows = 2 * kTiles;      // of a thread
  /// Weights of one step and thread that add up to less are kept as they are: float16 holds them.
  static constexpr float kLargeWeights = 16384.0f;

  float out[kTiles][kHeadDim / 8][4];
  float base[kRows];  // what weights are relative to, in log2 units; -inf while a row that sees keys has none
  float sum[kRows];
  std::uint32_t q[kQInRegisters ? kSteps : 1][4];
  std::uint32_t q_address;  // the thread's, for step 0

  template <int kKeys>
  using Scores = float[kTiles][kKeys / 8][4];

  /// The thread's row i, of the warp's.
  __device__ __forceinline__ static int row(int i) { return i / 2 * 16 + static_cast<int>(threadIdx.x) % 32 / 4 + i % 2 * 8; }

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
    if constexpr (kQInRegisters) {
#pragma unroll
      for (int i = 0; i < 4; ++i) fragment[i] = q[step][i];
    } else {
      load_q_step(fragment, tile, step);
    }
  }

  __device__ __forceinline__ void attach_q(std::uint32_t address, int first_row) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    q_address = Rows<Types::kQRowBytes>::address(address, first_row + lane % 16, lane / 16);
    if constexpr (kQInRegisters) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) load_q_step(q[step], 0, step);
    }
  }

  /// Where the thread's part of K begins in a slot at address 0: its row and chunk of the first ldmatrix.
  __device__ __forceinline__ static std::uint32_t k_thread_offset() {
    const int lane = static_cast<int>(threadIdx.x) % 32;
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
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        std::uint32_t a[kTiles][4];
#pragma unroll
        for (int t = 0; t < kTiles; ++t) q_step(a[t], t, step);
#pragma unroll
        for (int pair = 0; pair < kKeys / 16; ++pair) {
          std::uint32_t b[4];
          device::load_matrix_x4(b, KvRows::advance(k_address, 16 * pair, 2 * step));
#pragma unroll
          for (int t = 0; t < kTiles; ++t) {
            device::mma_16816<kBf16>(scores[t][2 * pair], a[t], b[0], b[1]);
            device::mma_16816<kBf16>(scores[t][2 * pair + 1], a[t], b[2], b[3]);
          }
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
    const int lane = static_cast<int>(threadIdx.x) % 32;
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
    const int lane = static_cast<int>(threadIdx.x) % 32;
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

  /// The same for keys that the mask hides. A lane fetches 32 keys' bits of one row.
  template <int kKeys>
  __device__ __forceinline__ static void apply_mask(Scores<kKeys>& scores, const AttentionParams& p, const RowParams* row_params,
                                                    int first_key) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
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
  /// `added` is what they come to in this thread's columns. True if they are large, or not numbers, in some row of the warp. `raised`: after
  /// raise_base; then a row without a base has no weights.
  template <int kKeys>
  __device__ __forceinline__ bool weigh(Scores<kKeys>& scores, const ScoreScale<kRows>& score, bool raised, float (&added)[kRows]) const {
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
        for (int i = 0; i < 4; ++i) {
          const int r = 2 * t + i / 2;
          scores[t][n][i] = device::exp2_approx(fmaf(scores[t][n][i], score.log2_scale[r], -shift[r]));
          added[r] += scores[t][n][i];
        }
    bool large = false;
#pragma unroll
    for (int i = 0; i < kRows; ++i) large |= !(added[i] < kLargeWeights);
    return __any_sync(kAllLanes, large);
  }

  /// Makes the maximum of the scores the base of rows whose weights came to too much, by their own scores alone, and rescales what was summed
  /// so far.
  template <int kKeys>
  __device__ __forceinline__ void raise_base(const Scores<kKeys>& scores, const ScoreScale<kRows>& score, const float (&added)[kRows]) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      float top = -INFINITY;
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) top = fmaxf(top, fmaxf(scores[i / 2][n][i % 2 * 2], scores[i / 2][n][i % 2 * 2 + 1]));
      top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 1));
      top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 2));
      const unsigned large = __ballot_sync(kAllLanes, !(added[i] < kLargeWeights)) >> (threadIdx.x % 32 & ~3u) & 15u;
      const float raised = fmaxf(base[i], top * score.log2_scale[i]);
      float factor = 1.0f;
      if (large != 0 && raised != -INFINITY) {
        factor = device::exp2_approx(base[i] - raised);
        base[i] = raised;
      }
      sum[i] *= factor;
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) out[i / 2][n][i % 2 * 2 + e] *= factor;
    }
  }

  /// What a row's weights are relative to, and -inf for one that has none.
  __device__ __forceinline__ float final_base(int i) const { return sum[i] == 0.0f ? -INFINITY : base[i]; }

  /// As k_thread_offset, for V: (keys 0 to 7, chunk 0), (keys 8 to 15, chunk 0), (0 to 7, 1), (8 to 15, 1).
  __device__ __forceinline__ static std::uint32_t v_thread_offset() {
    const int lane = static_cast<int>(threadIdx.x) % 32;
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
  __device__ __forceinline__ void multiply_pv(const Scores<kKeys>& weights, std::uint32_t v_address) {
#pragma unroll
    for (int step = 0; step < kKeys / 16; ++step) {
      std::uint32_t a[kTiles][4];
#pragma unroll
      for (int t = 0; t < kTiles; ++t)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          a[t][i] = device::pack_16<kBf16>(weights[t][2 * step + i / 2][i % 2 * 2], weights[t][2 * step + i / 2][i % 2 * 2 + 1]);
#pragma unroll
      for (int pair = 0; pair < kHeadDim / 16; pair += 2) {
        std::uint32_t b[2][4];
        load_v(b, v_address, 16 * step, pair);
#pragma unroll
        for (int t = 0; t < kTiles; ++t)
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            device::mma_16816<kBf16>(out[t][2 * (pair + i)], a[t], b[i][0], b[i][1]);
            device::mma_16816<kBf16>(out[t][2 * (pair + i) + 1], a[t], b[i][2], b[i][3]);
          }
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

  /// Four consecutive columns of the thread's row `of`, and the first one, for i below kHeadDim / 16.
  /// 16-bit V: the thread's pairs of n-tiles 2 i and 2 i + 1 are exchanged with the neighbour's.
  __device__ __forceinline__ float4 columns(int i, int of, int& column) const {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int r = of % 2;
    const auto& tile = out[of / 2];
    if constexpr (Types::kQuantized) {
      column = 16 * i + 4 * (lane % 4);
      return float4{tile[2 * i][2 * r], tile[2 * i + 1][2 * r], tile[2 * i][2 * r + 1], tile[2 * i + 1][2 * r + 1]};
    } else {
      // Even quads end up with the first n-tile's columns, odd ones with the second's.
      const bool odd = lane % 2 != 0;
      const float give0 = odd ? tile[2 * i][2 * r] : tile[2 * i + 1][2 * r];
      const float give1 = odd ? tile[2 * i][2 * r + 1] : tile[2 * i + 1][2 * r + 1];
      const float got0 = __shfl_xor_sync(kAllLanes, give0, 1);
      const float got1 = __shfl_xor_sync(kAllLanes, give1, 1);
      column = 16 * i + (odd ? 8 : 0) + (lane % 4 / 2) * 4;
      return odd ? float4{got0, got1, tile[2 * i + 1][2 * r], tile[2 * i + 1][2 * r + 1]}
                 : float4{tile[2 * i][2 * r], tile[2 * i][2 * r + 1], got0, got1};
    }
  }

  /// Whether any output sum is infinite or NaN.
  __device__ __forceinline__ bool not_finite() const {
    float probe = 0.0f;
#pragma unroll
    for (int t = 0; t < kTiles; ++t)
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) probe = fmaf(out[t][n][i], 0.0f, probe);
    return probe != 0.0f;
  }
};

}  // namespace quire::cuda::attn
