// Which tile a CTA of Hopper's kernel for products of 8-bit matrices is at, and what of a split tile is its own.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cuda/quantization/scaled_matmul_wgmma_shape.cuh"

namespace quire::cuda::scaled {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

/// What a CTA does next: a tile, which of its steps, and which of its columns.
struct Work {
  int row_tile, column_tile, first_step, num_steps;
  int half;  // of the columns; -1: all
};

/// A CTA's `iteration`-th work.
__device__ __forceinline__ bool locate_work(const WgmmaPlan& plan, int rank, int iteration, Work& work) {
  const int size = plan.shared_columns * plan.splits;
  const int cluster = static_cast<int>(blockIdx.x) / size, num_clusters = static_cast<int>(gridDim.x) / size;
  int item = cluster + iteration * num_clusters, row_in_group = rank % plan.shared_columns;
  work.half = -1;
  work.num_steps = plan.num_steps;
  work.first_step = rank / plan.shared_columns * plan.num_steps;
  if (item >= plan.num_items) {
    item -= plan.num_items;
    if (item >= plan.num_halved_tiles) return false;
    row_in_group = item % 2;
    item = plan.num_items + item / 2;
    work.half = rank;
  }
  const int per_group = plan.column_group * plan.num_row_groups;
  const int group = item / per_group, in_group = item - group * per_group;
  const int width = min(plan.column_group, plan.num_column_tiles - group * plan.column_group);
  const int row_group = in_group / width;
  work.column_tile = group * plan.column_group + in_group - row_group * width;
  work.row_tile = row_group * plan.shared_columns + row_in_group;
  return true;
}

/// How the CTAs of a tile's splits divide its columns between them once they exchange sums: blocks of 8 columns.
template <typename Shape>
struct SplitColumns {
  int first_rank;  // of the splits; every shared_columns-th is one
  int each, first, count;
  __device__ __forceinline__ SplitColumns(const WgmmaPlan& plan, int rank) {
    first_rank = rank % plan.shared_columns;
    each = (Shape::kColumns / 8 + plan.splits - 1) / plan.splits;
    first = rank / plan.shared_columns * each;
    count = min(each, Shape::kColumns / 8 - first);
  }
};

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

}  // namespace quire::cuda::scaled
