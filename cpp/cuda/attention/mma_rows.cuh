// One warp's 16 queries as the rows of the products: scores, masks, online softmax, and the sum of p v.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cuda/attention/mma_tile.cuh"

namespace quire::cuda::attn {

/// The state of one warp's 16 rows: output sums, largest score in raw units, and the thread's part of the sum of exponentials.
template <DType kKvDType, int kHeadDim>
struct MmaRows {
  using Types = MmaTypes<kKvDType, kHeadDim>;
  static constexpr bool kBf16 = Types::kBf16;
  static constexpr bool kQInRegisters = kHeadDim <= 128;
  static constexpr int kSteps = kHeadDim / 16;  // of the q k product

  float out[kHeadDim / 8][4];
  float largest[2];
  float sum[2];
  std::uint32_t q[kQInRegisters ? kSteps : 1][4];
  std::uint32_t q_address;  // the thread's, for step 0

  using KvRows = Rows<Types::kKvRowBytes>;

  __device__ __forceinline__ void reset() {
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) out[n][i] = 0.0f;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      largest[i] = -INFINITY;
      sum[i] = 0.0f;
    }
  }

  __device__ __forceinline__ void load_q_step(std::uint32_t (&fragment)[4], int step) const {
    device::load_matrix_x4(fragment, Rows<Types::kQRowBytes>::advance(q_address, 0, 2 * step));
  }

  __device__ __forceinline__ void q_step(std::uint32_t (&fragment)[4], int step) const {
    if constexpr (kQInRegisters) {
#pragma unroll
      for (int i = 0; i < 4; ++i) fragment[i] = q[step][i];
    } else {
      load_q_step(fragment, step);
    }
  }

  __device__ __forceinline__ void attach_q(std::uint32_t address, int first_row) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    q_address = Rows<Types::kQRowBytes>::address(address, first_row + lane % 16, lane / 16);
    if constexpr (kQInRegisters) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) load_q_step(q[step], step);
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
  __device__ __forceinline__ void multiply_qk(float (&scores)[kKeys / 8][4], std::uint32_t k_address) const {
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[n][i] = 0.0f;
    if constexpr (!Types::kQuantized) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        std::uint32_t a[4];
        q_step(a, step);
#pragma unroll
        for (int pair = 0; pair < kKeys / 16; ++pair) {
          std::uint32_t b[4];
          device::load_matrix_x4(b, KvRows::advance(k_address, 16 * pair, 2 * step));
          device::mma_16816<kBf16>(scores[2 * pair], a, b[0], b[1]);
          device::mma_16816<kBf16>(scores[2 * pair + 1], a, b[2], b[3]);
        }
      }
    } else {
#pragma unroll
      for (int step = 0; step < kSteps; step += 2) {
        std::uint32_t a[2][4];
        q_step(a[0], step);
        q_step(a[1], step + 1);
#pragma unroll
        for (int pair = 0; pair < kKeys / 16; ++pair) {
          std::uint32_t b[4];  // (keys 0 to 7, step), (keys 8 to 15, step), then step + 1
          device::load_matrix_x4(b, KvRows::advance(k_address, 16 * pair, step));
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            std::uint32_t b0, b1;
            device::dequantize_4<Types::kByte>(b[i], b0, b1);
            device::mma_16816<kBf16>(scores[2 * pair + i % 2], a[i / 2], b0, b1);
          }
        }
      }
    }
  }

  /// Turns q k into scores in log2 units where more than a factor is asked for. Key `first_key` is column 0; `row_params` is the
  /// warp's.
  template <int kKeys>
  __device__ __forceinline__ static void transform_scores(float (&scores)[kKeys / 8][4], const RowParams* row_params, float softcap,
                                                          int first_key) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const RowParams row = row_params[lane / 4 + 8 * r];
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e)
          scores[n][2 * r + e] = transformed_score(scores[n][2 * r + e], row, softcap, first_key + 8 * n + lane % 4 * 2 + e);
    }
  }

  /// Selects -inf for keys that a row does not see. Bit j of `valid` says whether key j of the step exists.
  template <int kKeys>
  __device__ __forceinline__ static void mask_scores(float (&scores)[kKeys / 8][4], const RowParams* row_params, int first_key,
                                                     const std::uint32_t (&valid)[(kKeys + 31) / 32]) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int begin = row_params[lane / 4 + 8 * r].begin, end = row_params[lane / 4 + 8 * r].end;
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int column = 8 * n + lane % 4 * 2 + e;
          const int key = first_key + column;
          const bool seen = ((valid[n / 4] >> (column % 32)) & 1u) != 0 && key >= begin && key < end;
          if (!seen) scores[n][2 * r + e] = -INFINITY;
        }
    }
  }

  /// The same for keys that the mask hides. A lane fetches 32 keys' bits of one row.
  template <int kKeys>
  __device__ __forceinline__ static void apply_mask(float (&scores)[kKeys / 8][4], const AttentionParams& p, const RowParams* row_params,
                                                    int first_key) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const std::uint32_t mine = mask_bits(p, row_params[lane % 16], first_key + (kKeys > 32 ? lane / 16 * 32 : 0));
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int m = 0; m < (kKeys + 31) / 32; ++m) {
        const std::uint32_t seen = __shfl_sync(kAllLanes, mine, lane / 4 + 8 * r + 16 * m) >> (lane % 4 * 2);
#pragma unroll
        for (int n = 4 * m; n < 4 * m + 4; ++n)
#pragma unroll
          for (int e = 0; e < 2; ++e)
            if (((seen >> (n % 4 * 8 + e)) & 1u) == 0) scores[n][2 * r + e] = -INFINITY;
      }
  }

  /// One step of the online softmax: scores become weights, and what was summed so far is rescaled where the maximum grew.
  template <int kKeys>
  __device__ __forceinline__ void softmax(float (&scores)[kKeys / 8][4], const ScoreScale<2>& score) {
    float shift[2], rescale[2];
    bool grew = false;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float top = largest[r];
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) top = fmaxf(top, fmaxf(scores[n][2 * r], scores[n][2 * r + 1]));
      top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 1));
      top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 2));
      // A row that has seen nothing yet: any finite shift gives weights of exp2(-inf) = 0.
      const float base = top == -INFINITY ? 0.0f : top;
      grew |= top != largest[r];
      rescale[r] = device::exp2_approx((largest[r] - base) * score.log2_scale[r]);
      shift[r] = base * score.log2_scale[r];
      largest[r] = top;
    }
    if (__any_sync(kAllLanes, grew)) {
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) out[n][i] *= rescale[i / 2];
#pragma unroll
      for (int r = 0; r < 2; ++r) sum[r] *= rescale[r];
    }
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        scores[n][i] = device::exp2_approx(fmaf(scores[n][i], score.log2_scale[i / 2], -shift[i / 2]));
        sum[i / 2] += scores[n][i];
      }
  }

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
  __device__ __forceinline__ void multiply_pv(const float (&weights)[kKeys / 8][4], std::uint32_t v_address) {
#pragma unroll
    for (int step = 0; step < kKeys / 16; ++step) {
      const std::uint32_t a[4] = {device::pack_16<kBf16>(weights[2 * step][0], weights[2 * step][1]),
                                  device::pack_16<kBf16>(weights[2 * step][2], weights[2 * step][3]),
                                  device::pack_16<kBf16>(weights[2 * step + 1][0], weights[2 * step + 1][1]),
                                  device::pack_16<kBf16>(weights[2 * step + 1][2], weights[2 * step + 1][3])};
#pragma unroll
      for (int pair = 0; pair < kHeadDim / 16; pair += 2) {
        std::uint32_t b[2][4];
        load_v(b, v_address, 16 * step, pair);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          device::mma_16816<kBf16>(out[2 * (pair + i)], a, b[i][0], b[i][1]);
          device::mma_16816<kBf16>(out[2 * (pair + i) + 1], a, b[i][2], b[i][3]);
        }
      }
    }
  }

  /// Adds up the four threads of each row; before that `sum` is a part.
  __device__ __forceinline__ void reduce_sum() {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      sum[r] += __shfl_xor_sync(kAllLanes, sum[r], 1);
      sum[r] += __shfl_xor_sync(kAllLanes, sum[r], 2);
    }
  }

  /// Four consecutive columns of a row (of group if r is 0, else group + 8), and the first one, for i below kHeadDim / 16.
  /// 16-bit V: the thread's pairs of n-tiles 2 i and 2 i + 1 are exchanged with the neighbour's.
  __device__ __forceinline__ float4 columns(int i, int r, int& column) const {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    if constexpr (Types::kQuantized) {
      column = 16 * i + 4 * (lane % 4);
      return float4{out[2 * i][2 * r], out[2 * i + 1][2 * r], out[2 * i][2 * r + 1], out[2 * i + 1][2 * r + 1]};
    } else {
      // Even quads end up with the first n-tile's columns, odd ones with the second's.
      const bool odd = lane % 2 != 0;
      const float give0 = odd ? out[2 * i][2 * r] : out[2 * i + 1][2 * r];
      const float give1 = odd ? out[2 * i][2 * r + 1] : out[2 * i + 1][2 * r + 1];
      const float got0 = __shfl_xor_sync(kAllLanes, give0, 1);
      const float got1 = __shfl_xor_sync(kAllLanes, give1, 1);
      column = 16 * i + (odd ? 8 : 0) + (lane % 4 / 2) * 4;
      return odd ? float4{got0, got1, out[2 * i + 1][2 * r], out[2 * i + 1][2 * r + 1]}
                 : float4{out[2 * i][2 * r], out[2 * i][2 * r + 1], got0, got1};
    }
  }

  /// Whether any output sum is infinite or NaN.
  __device__ __forceinline__ bool not_finite() const {
    float probe = 0.0f;
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) probe = fmaf(out[n][i], 0.0f, probe);
    return probe != 0.0f;
  }
};

}  // namespace quire::cuda::attn
