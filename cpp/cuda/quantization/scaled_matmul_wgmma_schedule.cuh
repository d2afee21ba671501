// Which tile a CTA of Hopper's kernel for products of 8-bit matrices is at, and what of a split tile is its own.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cuda/quantization/scaled_matmul_wgmma_shape.cuh"

namespace quire::cuda::scaled {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

/// What a CTA does next: a tile, and which of its steps.
struct Work {
  int row_tile, column_tile, first_step, num_steps;
  int splits, split;  // of the tile, and this CTA's
  bool shares;        // columns, with its neighbours
};

/// A CTA's `iteration`-th work.
__device__ __forceinline__ bool locate_work(const WgmmaPlan& plan, int rank, int iteration, Work& work) {
  const int size = plan.shared_columns * plan.splits;
  const int cluster = static_cast<int>(blockIdx.x) / size, num_clusters = static_cast<int>(gridDim.x) / size;
  int item = cluster + iteration * num_clusters;
  const bool halved = item >= plan.num_items;
  int row_in_group = rank % plan.shared_columns;
  work.shares = !halved;
  work.splits = plan.splits;
  work.num_steps = plan.num_steps;
  work.split = rank / plan.shared_columns;
  if (halved) {
    item -= plan.num_items;
    if (item >= plan.num_halved_tiles) return false;
    row_in_group = item % 2;
    item = plan.num_items + item / 2;
    work.splits = 2;
    work.split = rank;
    work.num_steps = (plan.num_steps + 1) / 2;
  }
  const int per_group = plan.column_group * plan.num_row_groups;
  const int group = item / per_group, in_group = item - group * per_group;
  const int width = min(plan.column_group, plan.num_column_tiles - group * plan.column_group);
  const int row_group = in_group / width;
  work.column_tile = group * plan.column_group + in_group - row_group * width;
  work.row_tile = row_group * plan.shared_columns + row_in_group;
  work.first_step = work.split * work.num_steps;
  return true;
}

/// How the CTAs of a tile's splits divide its columns between them once they exchange sums: blocks of 8 columns.
template <typename Shape>
struct SplitColumns {
  int first_rank, distance;  // ranks of the splits
  int each, first, count;
  __device__ __forceinline__ SplitColumns(const WgmmaPlan& plan, int rank) {
    // Either every shared_columns-th CTA, or both that halve a tile.
    const bool halved = plan.splits == 1;
    const int splits = halved ? 2 : plan.splits, split = halved ? rank : rank / plan.shared_columns;
    first_rank = halved ? 0 : rank % plan.shared_columns;
    distance = halved ? 1 : plan.shared_columns;
    each = (Shape::kColumns / 8 + splits - 1) / splits;
    first = split * each;
    count = min(each, Shape::kColumns / 8 - first);
  }
};

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

}  // namespace quire::cuda::scaled
