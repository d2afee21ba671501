// Attention in float32 throughout, for float32 queries: no tensor cores, which would round to 11 bits.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cuda/attention/plan.cuh"
#include "cuda/device/dependent_launch.cuh"
#include "cuda/device/dequantize.cuh"

namespace quire::cuda::attn {

constexpr int kSimtRows = tile_rows(Variant::kSimt);

/// Four consecutive stored elements as float32; `aligned` says that they may be read at once.
template <DType kKvDType>
__device__ __forceinline__ float4 load_4(const void* base, std::int64_t offset, bool aligned) {
  if constexpr (kKvDType == DType::kFloat32) {
    const float* source = static_cast<const float*>(base) + offset;
    if (aligned) return *reinterpret_cast<const float4*>(source);
    return float4{source[0], source[1], source[2], source[3]};
  } else {
    constexpr device::Byte kByte = kKvDType == DType::kFloat8E4M3FN ? device::Byte::kE4M3
                                   : kKvDType == DType::kFloat8E5M2 ? device::Byte::kE5M2
                                                                    : device::Byte::kInt8;
    const auto* source = static_cast<const unsigned char*>(base) + offset;
    std::uint32_t packed;
    if (aligned) {
      packed = *reinterpret_cast<const std::uint32_t*>(source);
    } else {
      packed = static_cast<std::uint32_t>(source[0]) | static_cast<std::uint32_t>(source[1]) << 8 |
               static_cast<std::uint32_t>(source[2]) << 16 | static_cast<std::uint32_t>(source[3]) << 24;
    }
    std::uint32_t low, high;
    device::dequantize_4<kByte>(packed, low, high);
    const float2 a = __half22float2(reinterpret_cast<const __half2&>(low));
    const float2 b = __half22float2(reinterpret_cast<const __half2&>(high));
    return float4{a.x, a.y, b.x, b.y};
  }
}

/// Grid: x = tile * num_kv_heads + kv_head, y = split. A CTA computes 8 packed rows against its split's keys; its warps take turns
/// at steps of 32 keys, one to a lane for q k, and meet at the end.
template <DType kKvDType, int kHeadDim>
__global__ void __launch_bounds__(kThreads) attention_simt_kernel(const __grid_constant__ Plan plan) {
  constexpr int kPerLane = kHeadDim / 32;  // consecutive columns of out
  constexpr int kRows = kSimtRows;
  __shared__ __align__(16) float q_shared[kRows][kHeadDim];
  __shared__ __align__(16) float weights[kWarps][kRows][32];  // -1: not seen
  __shared__ __align__(16) float merged[kRows][kHeadDim];
  __shared__ float stats[2][kWarps][kRows];
  const AttentionParams& p = plan.params;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int num_kv_heads = static_cast<int>(p.num_kv_heads);
  const int tile_idx = static_cast<int>(blockIdx.x) / num_kv_heads;
  const int kv_head = static_cast<int>(blockIdx.x) - tile_idx * num_kv_heads;
  const int head_dim = static_cast<int>(p.head_dim);

  device::wait_for_predecessor();
  device::launch_dependents();
  Tile tile;
  if (!locate_tile(plan, tile_idx, tile)) return;
  const SplitRange splits = active_splits(plan, tile);
  const int split = static_cast<int>(blockIdx.y);
  if (split >= splits.num_active) return;
  const int own_begin = tile.key_begin + split * splits.keys_per_split;
  const int key_end = min(static_cast<std::int64_t>(own_begin) + splits.keys_per_split, std::int64_t{tile.key_end});
  // A batch-invariant call has the same keys in a step, and the same steps in a warp, whatever the tile's rows.
  const int key_begin = plan.batch_invariant ? own_begin / (kWarps * 32) * (kWarps * 32) : own_begin;

  for (int i = static_cast<int>(threadIdx.x); i < kRows * kHeadDim; i += kThreads) {
    const int row = i / kHeadDim, column = i % kHeadDim;
    float value = 0.0f;
    if (row < tile.num_rows && column < head_dim) {
      const RowIndex index = row_index(plan, tile, kv_head, row);
      value = static_cast<const float*>(p.q)[index.q_token * p.q_token_stride + index.head * p.q_head_stride + column];
    }
    q_shared[row][column] = value;
  }
  __syncthreads();

  const float scale = p.scale * (p.k_scale != nullptr ? p.k_scale[kv_head * p.k_scale_stride] : 1.0f);
  const float v_scale = p.v_scale != nullptr ? p.v_scale[kv_head * p.v_scale_stride] : 1.0f;
  const bool aligned = plan.kv_alignment >= (kKvDType == DType::kFloat32 ? 16 : 4);
  float out[kRows][kPerLane], largest[kRows], sum[kRows], slope[kRows];
  int position[kRows];
  KeyRange range[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    largest[r] = -INFINITY;
    sum[r] = 0.0f;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) out[r][i] = 0.0f;
    const RowIndex index = row_index(plan, tile, kv_head, min(r, tile.num_rows - 1));
    range[r] = visible_keys(p, tile, index.token);
    position[r] = tile.kv_len - tile.query_len + index.token;
    slope[r] = p.alibi_slopes != nullptr ? p.alibi_slopes[index.head] : 0.0f;
  }

  // A lane fetches the mask's bits of one row.
  const int mask_first = p.mask != nullptr ? mask_first_key(p, tile) : 0;
  const std::uint8_t* mask = p.mask + row_index(plan, tile, kv_head, min(lane % kRows, tile.num_rows - 1)).q_token * p.mask_stride;
  for (int first = key_begin + warp * 32; first < key_end; first += kWarps * 32) {
    const int key = first + lane;
    const int wanted = key < own_begin ? INT_MAX : key;
    const KeyLocation location = locate_key(plan, tile, wanted, key_end, load_entry(plan, tile, wanted, key_end));
    const std::int64_t k_offset = location.entry * p.k_block_stride + location.slot * p.k_token_stride + kv_head * p.k_head_stride;
    const std::int64_t lane_v_offset = location.entry * p.v_block_stride + location.slot * p.v_token_stride + kv_head * p.v_head_stride;

    // Scores: a key to each lane.
    float score[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) score[r] = 0.0f;
    if (location.valid) {
#pragma unroll 2
      for (int column = 0; column < head_dim; column += 4) {
        const float4 k = load_4<kKvDType>(p.k, k_offset + column, aligned);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const float4 q = *reinterpret_cast<const float4*>(&q_shared[r][column]);
          score[r] = fmaf(q.x, k.x, fmaf(q.y, k.y, fmaf(q.z, k.z, fmaf(q.w, k.w, score[r]))));
        }
      }
    }

    // Online softmax.
    const std::uint32_t row_mask = p.mask != nullptr ? mask_bits(mask, static_cast<int>(p.mask_bytes), first - mask_first) : kAllLanes;
    __syncwarp();
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float value = score[r] * scale;
      if (p.softcap > 0.0f) value = p.softcap * tanhf(value / p.softcap);
      if (p.alibi_slopes != nullptr) value -= slope[r] * static_cast<float>(position[r] - key);
      const bool allowed = (__shfl_sync(kAllLanes, row_mask, r) >> lane & 1u) != 0;
      const bool seen = allowed && location.valid && key >= range[r].begin && key < range[r].end;
      if (!seen) value = -INFINITY;
      float top = value;
#pragma unroll
      for (int offset = 16; offset > 0; offset /= 2) top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, offset));
      top = fmaxf(top, largest[r]);
      const float base = top == -INFINITY ? 0.0f : top;
      const float rescale = expf(largest[r] - base);
      const float weight = expf(value - base);
      largest[r] = top;
      sum[r] = sum[r] * rescale + (seen ? weight : 0.0f);
      weights[warp][r][lane] = seen ? weight : -1.0f;
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) out[r][i] *= rescale;
    }
    __syncwarp();

    // Weighted sum of V: a few columns to each lane.
    const std::uint32_t valid = __ballot_sync(kAllLanes, location.valid);
#pragma unroll 2
    for (int j = 0; j < 32; ++j) {
      const std::int64_t v_offset = __shfl_sync(kAllLanes, lane_v_offset, j);
      if (!((valid >> j) & 1u)) continue;
      float v[kPerLane];
#pragma unroll
      for (int i = 0; i < kPerLane; i += 4) {
        const int column = lane * kPerLane + i;
        float4 loaded{0.0f, 0.0f, 0.0f, 0.0f};
        if (column < head_dim) loaded = load_4<kKvDType>(p.v, v_offset + column, aligned);
        v[i] = loaded.x, v[i + 1] = loaded.y, v[i + 2] = loaded.z, v[i + 3] = loaded.w;
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float weight = weights[warp][r][j];
        // Selected, not multiplied by zero: v may be NaN. A NaN weight counts.
        if (weight < 0.0f) continue;
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) out[r][i] = fmaf(weight, v[i], out[r][i]);
      }
    }
  }

  // Bring the four warps to one maximum and add them up, one after the other.
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) sum[r] += __shfl_xor_sync(kAllLanes, sum[r], offset);
    if (lane == 0) {
      stats[0][warp][r] = largest[r];
      stats[1][warp][r] = sum[r];
    }
  }
  for (int w = 0; w < kWarps; ++w) {
    __syncthreads();
    if (warp != w) continue;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float top = fmaxf(fmaxf(stats[0][0][r], stats[0][1][r]), fmaxf(stats[0][2][r], stats[0][3][r]));
      const float weight = expf(largest[r] - (top == -INFINITY ? 0.0f : top));
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        float* target = &merged[r][lane * kPerLane + i];
        *target = (w == 0 ? 0.0f : *target) + weight * out[r][i];
      }
    }
  }
  __syncthreads();

  // Write rows.
  for (int i = static_cast<int>(threadIdx.x); i < tile.num_rows * (head_dim / 4); i += kThreads) {
    const int row = i / (head_dim / 4);
    const int column = (i - row * (head_dim / 4)) * 4;
    const float top = fmaxf(fmaxf(stats[0][0][row], stats[0][1][row]), fmaxf(stats[0][2][row], stats[0][3][row]));
    float total = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) total += stats[1][w][row] * expf(stats[0][w][row] - (top == -INFINITY ? 0.0f : top));
    const float4 value = *reinterpret_cast<const float4*>(&merged[row][column]);
    const RowIndex index = row_index(plan, tile, kv_head, row);
    if (splits.num_active > 1) {
      const std::int64_t target = split * plan.num_rows + stats_index(plan, index);
      if (column == 0) plan.partial_stats[target] = float2{top * kLog2E, total};
      *reinterpret_cast<float4*>(plan.partial_out + target * head_dim + column) = value;
    } else {
      const RowFinish finish = finish_row(p, top * kLog2E, total, index.head);
      if (column == 0 && p.lse != nullptr) p.lse[stats_index(plan, index)] = finish.lse;
      const float factor = finish.factor * v_scale;
      store_out_4(plan, index, column, float4{value.x * factor, value.y * factor, value.z * factor, value.w * factor});
    }
  }
}

}  // namespace quire::cuda::attn
