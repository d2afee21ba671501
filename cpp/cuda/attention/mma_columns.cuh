// One warp's queries as the columns of the products, 8 to a tile: what a few queries need is then half of what they need as rows.
// SPDX-License-Identifier: Apache-2.0
//
// Scores are K q^T, 16 keys by 8 queries, and the output is V^T p^T, 16 columns of V by 8 queries. A thread's scores belong to
// queries 2 quad and 2 quad + 1 of each tile, keys group and group + 8; the 8 x 8 transpose turns the weights into the second operand.
#pragma once

#include "cuda/attention/mma_tile.cuh"

namespace quire::cuda::attn {

/// kPaired: K and V rows hold two kv heads, and a query is one of either half of head_dim's. The halves' scores are summed apart, so that what
/// is not finite in one head does not reach the other. kKeepsQ: where registers suffice, queries stay in them.
template <DType kKvDType, int kHeadDim, int kTiles, bool kPaired, typename KvRows = Rows<MmaTypes<kKvDType, kHeadDim>::kKvRowBytes>,
          bool kKeepsQ = true>
struct MmaColumns {
  using Types = MmaTypes<kKvDType, kHeadDim>;
  static constexpr bool kBf16 = Types::kBf16;
  static constexpr int kSteps = kHeadDim / 16;
  static constexpr int kQueries = 2 * kTiles;  // of a thread
  static constexpr bool kQInRegisters = kKeepsQ && kSteps * kTiles <= 16;
  using Scale = ScoreScale<kQueries>;

  float out[kSteps][kTiles][4];  // columns of V by queries
  float largest[kQueries];       // in raw units
  float sum[kQueries];           // the thread's part
  std::uint32_t q[kQInRegisters ? kSteps / 2 : 1][kTiles][4];  // two steps' b0, b1
  std::uint32_t q_address;                                    // the thread's, for step 0
  bool upper[kPaired ? kQueries : 1];                         // whether the query is of the second half

  /// The tile row of the thread's query i.
  __device__ __forceinline__ static int query(int i) { return i / 2 * 8 + static_cast<int>(threadIdx.x) % 4 * 2 + i % 2; }

  __device__ __forceinline__ void reset() {
#pragma unroll
    for (int c = 0; c < kSteps; ++c)
#pragma unroll
      for (int t = 0; t < kTiles; ++t)
#pragma unroll
        for (int i = 0; i < 4; ++i) out[c][t][i] = 0.0f;
#pragma unroll
    for (int i = 0; i < kQueries; ++i) {
      largest[i] = -INFINITY;
      sum[i] = 0.0f;
    }
  }

  __device__ __forceinline__ void load_q(std::uint32_t (&fragment)[4], int pair, int t) const {
    using QRows = Rows<Types::kQRowBytes>;
    device::load_matrix_x4(fragment, QRows::advance(q_address, 0, 4 * pair) + static_cast<std::uint32_t>(8 * t * Types::kQRowBytes));
  }

  /// The queries are the rows of q from `first_row` on; what is there of 8 rows is not read where there are less.
  __device__ __forceinline__ void attach_q(std::uint32_t q_shared, int first_row = 0) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    q_address = Rows<Types::kQRowBytes>::address(q_shared, first_row + lane % 8, lane / 8);
    if constexpr (kQInRegisters) {
#pragma unroll
      for (int pair = 0; pair < kSteps / 2; ++pair)
#pragma unroll
        for (int t = 0; t < kTiles; ++t) load_q(q[pair][t], pair, t);
    }
  }

  /// Where the thread's part of K begins in a slot at address 0: (keys 0 to 7, chunk 0), (8 to 15, 0), (0 to 7, 1), (8 to 15, 1).
  __device__ __forceinline__ static std::uint32_t k_thread_offset() {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    return KvRows::address(0, lane % 16, lane / 16);
  }
  /// The same for V; 16-bit: (keys 0 to 7, chunk 0), (same, 1), (keys 8 to 15, 0), (same, 1).
  __device__ __forceinline__ static std::uint32_t v_thread_offset() {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    return Types::kQuantized ? KvRows::address(0, lane % 16, lane / 16) : KvRows::address(0, lane / 16 * 8 + lane % 8, lane / 8 % 2);
  }

  /// scores = K q^T for kKeys keys; `k_address` is k_thread_offset() in their slot.
  template <int kKeys>
  __device__ __forceinline__ void multiply_qk(float (&scores)[kKeys / 16][kTiles][4], std::uint32_t k_address) const {
    // Products that wait for one another are slow; few keys make few independent ones, so that steps take turns at several sums.
    constexpr int kSums = kKeys / 16 * kTiles >= 4 ? 1 : kKeys / 16 * kTiles == 2 ? 2 : 4;
    static_assert(!kPaired || kSums > 1);
    const auto sum_of = [](int step) { return kPaired ? step / (kSteps / 2) * (kSums / 2) + step % (kSums / 2) : step % kSums; };
    float parts[kSums][kKeys / 16][kTiles][4];
#pragma unroll
    for (int s = 0; s < kSums; ++s)
#pragma unroll
      for (int m = 0; m < kKeys / 16; ++m)
#pragma unroll
        for (int t = 0; t < kTiles; ++t)
#pragma unroll
          for (int i = 0; i < 4; ++i) parts[s][m][t][i] = 0.0f;
#pragma unroll
    for (int pair = 0; pair < kSteps / 2; ++pair) {
      std::uint32_t b[kTiles][4];
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        if constexpr (kQInRegisters) {
#pragma unroll
          for (int i = 0; i < 4; ++i) b[t][i] = q[pair][t][i];
        } else {
          load_q(b[t], pair, t);
        }
      }
#pragma unroll
      for (int m = 0; m < kKeys / 16; ++m) {
        std::uint32_t a[2][4];
        if constexpr (Types::kQuantized) {
          std::uint32_t packed[4];
          device::load_matrix_x4(packed, KvRows::advance(k_address, 16 * m, 2 * pair));
#pragma unroll
          for (int i = 0; i < 4; ++i) device::dequantize_4<Types::kByte>(packed[i], a[i / 2][i % 2], a[i / 2][i % 2 + 2]);
        } else {
#pragma unroll
          for (int i = 0; i < 2; ++i) device::load_matrix_x4(a[i], KvRows::advance(k_address, 16 * m, 4 * pair + 2 * i));
        }
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
          for (int t = 0; t < kTiles; ++t) device::mma_16816<kBf16>(parts[sum_of(2 * pair + i)][m][t], a[i], b[t][2 * i], b[t][2 * i + 1]);
      }
    }
#pragma unroll
    for (int m = 0; m < kKeys / 16; ++m)
#pragma unroll
      for (int t = 0; t < kTiles; ++t)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if constexpr (kPaired) {
            float halves[2];
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              halves[h] = parts[h * (kSums / 2)][m][t][i];
#pragma unroll
              for (int s = 1; s < kSums / 2; ++s) halves[h] += parts[h * (kSums / 2) + s][m][t][i];
            }
            scores[m][t][i] = upper[2 * t + i % 2] ? halves[1] : halves[0];
          } else {
            scores[m][t][i] = parts[0][m][t][i];
#pragma unroll
            for (int s = 1; s < kSums; ++s) scores[m][t][i] += parts[s][m][t][i];
          }
        }
  }

  /// Turns q k into scores in log2 units where more than a factor is asked for. Key `first_key` is row 0.
  template <int kKeys>
  __device__ __forceinline__ static void transform_scores(float (&scores)[kKeys / 16][kTiles][4], const RowParams* row_params,
                                                          float softcap, int first_key) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int i = 0; i < kQueries; ++i) {
      const RowParams row = row_params[query(i)];
#pragma unroll
      for (int m = 0; m < kKeys / 16; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float& value = scores[m][i / 2][2 * h + i % 2];
          value = transformed_score(value, row, softcap, first_key + 16 * m + 8 * h + lane / 4);
        }
    }
  }

  /// Selects -inf for keys that a query does not see. Bit j of `valid` says whether key j of the step exists.
  template <int kKeys>
  __device__ __forceinline__ static void mask_scores(float (&scores)[kKeys / 16][kTiles][4], const RowParams* row_params, int first_key,
                                                     std::uint32_t valid) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int i = 0; i < kQueries; ++i) {
      const int begin = row_params[query(i)].begin, end = row_params[query(i)].end;
#pragma unroll
      for (int m = 0; m < kKeys / 16; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int row = 16 * m + 8 * h + lane / 4;
          const int key = first_key + row;
          const bool seen = ((valid >> row) & 1u) != 0 && key >= begin && key < end;
          if (!seen) scores[m][i / 2][2 * h + i % 2] = -INFINITY;
        }
    }
  }

  /// The same for keys that the mask hides. A lane fetches all keys' bits of one query.
  template <int kKeys>
  __device__ __forceinline__ static void apply_mask(float (&scores)[kKeys / 16][kTiles][4], const AttentionParams& p,
                                                    const RowParams* row_params, int first_key) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const std::uint32_t mine = mask_bits(p, row_params[lane % (8 * kTiles)], first_key);
#pragma unroll
    for (int i = 0; i < kQueries; ++i) {
      const std::uint32_t seen = __shfl_sync(kAllLanes, mine, query(i)) >> (lane / 4);
#pragma unroll
      for (int m = 0; m < kKeys / 16; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h)
          if (((seen >> (16 * m + 8 * h)) & 1u) == 0) scores[m][i / 2][2 * h + i % 2] = -INFINITY;
    }
  }

  /// One step of the online softmax: scores become weights, and what was summed so far is rescaled where the maximum grew.
  template <int kKeys>
  __device__ __forceinline__ void softmax(float (&scores)[kKeys / 16][kTiles][4], const Scale& score) {
    float shift[kQueries], rescale[kQueries];
    bool grew = false;
#pragma unroll
    for (int i = 0; i < kQueries; ++i) {
      float top = largest[i];
#pragma unroll
      for (int m = 0; m < kKeys / 16; ++m) top = fmaxf(top, fmaxf(scores[m][i / 2][i % 2], scores[m][i / 2][2 + i % 2]));
#pragma unroll
      for (int lanes = 4; lanes < 32; lanes *= 2) top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, lanes));
      // A query that has seen nothing yet: any finite shift gives weights of exp2(-inf) = 0.
      const float base = top == -INFINITY ? 0.0f : top;
      grew |= top != largest[i];
      rescale[i] = device::exp2_approx((largest[i] - base) * score.log2_scale[i]);
      shift[i] = base * score.log2_scale[i];
      largest[i] = top;
    }
    if (__any_sync(kAllLanes, grew)) {
#pragma unroll
      for (int c = 0; c < kSteps; ++c)
#pragma unroll
        for (int t = 0; t < kTiles; ++t)
#pragma unroll
          for (int i = 0; i < 4; ++i) out[c][t][i] *= rescale[2 * t + i % 2];
#pragma unroll
      for (int i = 0; i < kQueries; ++i) sum[i] *= rescale[i];
    }
#pragma unroll
    for (int i = 0; i < kQueries; ++i)
#pragma unroll
      for (int m = 0; m < kKeys / 16; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float& value = scores[m][i / 2][2 * h + i % 2];
          value = device::exp2_approx(fmaf(value, score.log2_scale[i], -shift[i]));
          sum[i] += value;
        }
  }

  /// out += V^T weights for kKeys keys; `v_address` is v_thread_offset() in their slot.
  template <int kKeys>
  __device__ __forceinline__ void multiply_pv(const float (&weights)[kKeys / 16][kTiles][4], std::uint32_t v_address) {
#pragma unroll
    for (int m = 0; m < kKeys / 16; ++m) {
      std::uint32_t b[kTiles][2];
#pragma unroll
      for (int t = 0; t < kTiles; ++t)
#pragma unroll
        for (int h = 0; h < 2; ++h) b[t][h] = device::transpose_8x8(device::pack_16<kBf16>(weights[m][t][2 * h], weights[m][t][2 * h + 1]));
      constexpr int kStride = Types::kQuantized ? 2 : 1;  // fragments of one ldmatrix
#pragma unroll
      for (int c = 0; c < kSteps; c += kStride) {
        std::uint32_t a[kStride][4];
        if constexpr (Types::kQuantized) {
          // Even columns become rows group of the fragment, odd ones rows group + 8.
          std::uint32_t packed[4];
          device::load_matrix_x4_transposed(packed, KvRows::advance(v_address, 16 * m, c));
#pragma unroll
          for (int i = 0; i < 4; ++i)
            device::dequantize_4<Types::kByte>(device::permute_bytes(packed[i], 0, 0x3120), a[i / 2][i % 2 * 2], a[i / 2][i % 2 * 2 + 1]);
        } else {
          device::load_matrix_x4_transposed(a[0], KvRows::advance(v_address, 16 * m, 2 * c));
        }
#pragma unroll
        for (int i = 0; i < kStride; ++i)
#pragma unroll
          for (int t = 0; t < kTiles; ++t) device::mma_16816<kBf16>(out[c + i][t], a[i], b[t][0], b[t][1]);
      }
    }
  }

  /// Adds up the eight threads of each query; before that `sum` is a part.
  __device__ __forceinline__ void reduce_sum() {
#pragma unroll
    for (int i = 0; i < kQueries; ++i)
#pragma unroll
      for (int lanes = 4; lanes < 32; lanes *= 2) sum[i] += __shfl_xor_sync(kAllLanes, sum[i], lanes);
  }

  /// The column of V that out[c][t][2 * half] and its neighbour belong to.
  __device__ __forceinline__ static int column(int c, int half) {
    const int group = static_cast<int>(threadIdx.x) % 32 / 4;
    return Types::kQuantized ? 16 * c + 2 * group + half : 16 * c + group + 8 * half;
  }

  /// Whether any output sum is infinite or NaN.
  __device__ __forceinline__ bool not_finite() const {
    float probe = 0.0f;
#pragma unroll
    for (int c = 0; c < kSteps; ++c)
#pragma unroll
      for (int t = 0; t < kTiles; ++t)
#pragma unroll
        for (int i = 0; i < 4; ++i) probe = fmaf(out[c][t][i], 0.0f, probe);
    return probe != 0.0f;
  }
};

}  // namespace quire::cuda::attn
