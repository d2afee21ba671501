// Puts a tile's splits together.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cuda/attention/plan.cuh"
#include "cuda/device/dependent_launch.cuh"

namespace quire::cuda::attn {

/// Grid: x = tile * num_kv_heads + kv_head, y = the tile's row. A CTA writes one row of out and lse, from the splits that have keys; rows
/// with one such split were finished by it. A warp sums every fourth split, a lane four columns at a time.
__global__ void __launch_bounds__(kThreads) attention_combine_kernel(const __grid_constant__ Plan plan) {
  __shared__ float weight[kMaxSplits];
  __shared__ float reduced[kWarps];
  __shared__ __align__(16) float parts[kWarps][256];
  const AttentionParams& p = plan.params;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % 32;
  const int warp = thread / 32;
  const int num_kv_heads = static_cast<int>(p.num_kv_heads);
  const int tile_idx = static_cast<int>(blockIdx.x) / num_kv_heads;
  const int kv_head = static_cast<int>(blockIdx.x) - tile_idx * num_kv_heads;
  const int row = static_cast<int>(blockIdx.y);

  // Lengths may be read: the kernel before this one starts it behind its own wait.
  Tile tile;
  const bool exists = locate_tile(plan, tile_idx, tile) && row < tile.num_rows;
  // Every CTA waits, so that this kernel never ends before its predecessor.
  device::wait_for_predecessor();
  if (!exists) return;
  const SplitRange splits = active_splits(plan, tile);
  if (splits.num_active <= 1) return;
  const RowIndex index = row_index(plan, tile, kv_head, row);
  const std::int64_t first = stats_index(plan, index);

  // The weight of each split.
  float top = -INFINITY;
  for (int s = thread; s < splits.num_active; s += kThreads) top = fmaxf(top, plan.partial_stats[s * plan.num_rows + first].x);
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, offset));
  if (lane == 0) reduced[warp] = top;
  __syncthreads();
  top = fmaxf(fmaxf(reduced[0], reduced[1]), fmaxf(reduced[2], reduced[3]));
  const float base = top == -INFINITY ? 0.0f : top;
  float sum = 0.0f;
  for (int s = thread; s < splits.num_active; s += kThreads) {
    const float2 stats = plan.partial_stats[s * plan.num_rows + first];
    const float factor = exp2f(stats.x - base);
    weight[s] = factor;
    sum += factor * stats.y;
  }
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(kAllLanes, sum, offset);
  __syncthreads();
  if (lane == 0) reduced[warp] = sum;
  __syncthreads();
  sum = reduced[0] + reduced[1] + reduced[2] + reduced[3];

  // The weighted sum.
  const int head_dim = static_cast<int>(p.head_dim);
  for (int column = lane * 4; column < head_dim; column += 128) {
    float4 total{0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 4
    for (int s = warp; s < splits.num_active; s += kWarps) {
      const float4 part = *reinterpret_cast<const float4*>(plan.partial_out + (s * plan.num_rows + first) * head_dim + column);
      const float factor = weight[s];
      total.x = fmaf(factor, part.x, total.x), total.y = fmaf(factor, part.y, total.y);
      total.z = fmaf(factor, part.z, total.z), total.w = fmaf(factor, part.w, total.w);
    }
    *reinterpret_cast<float4*>(&parts[warp][column]) = total;
  }
  __syncthreads();
  const RowFinish finish = finish_row(p, top, sum, index.head);
  if (thread == 0 && p.lse != nullptr) p.lse[first] = finish.lse;
  const float factor = finish.factor * (p.v_scale != nullptr ? p.v_scale[kv_head * p.v_scale_stride] : 1.0f);
  const int column = thread * 4;
  if (column < head_dim) {
    float4 total{0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      total.x += parts[w][column], total.y += parts[w][column + 1];
      total.z += parts[w][column + 2], total.w += parts[w][column + 3];
    }
    store_out_4(plan, index, column, float4{total.x * factor, total.y * factor, total.z * factor, total.w * factor});
  }
}

}  // namespace quire::cuda::attn
