// Launches of Hopper's kernel, for the instantiations.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>

#include "cuda/launch.h"
#include "cuda/once_per_device.h"
#include "cuda/quantization/scaled_matmul.h"
#include "cuda/quantization/scaled_matmul_wgmma.cuh"
#include "cuda/tensor_map.h"

namespace quire::cuda::scaled {

template <typename Sum, typename Shape>
void launch_wgmma(const ScaledMatmulParams& p, const WgmmaChoice& choice, Stream stream) {
  constexpr auto kernel = scaled_matmul_wgmma_kernel<Sum, Shape>;
  constexpr bool kTokenRows = Shape::kTokenRows;
  WgmmaPlan plan;
  const std::int64_t num_rows = kTokenRows ? p.m : p.n, num_columns = kTokenRows ? p.n : p.m;
  const int box_columns = Shape::kColumns / choice.shared_columns;
  plan.rows = make_byte_matrix_map(kTokenRows ? p.a : p.b, num_rows, p.k, kTokenRows ? p.a_stride : p.b_stride, Shape::kRows);
  plan.columns = make_byte_matrix_map(kTokenRows ? p.b : p.a, num_columns, p.k, kTokenRows ? p.b_stride : p.a_stride, box_columns);
  plan.params = p;
  plan.shared_columns = choice.shared_columns;
  plan.splits = choice.splits;
  plan.num_steps = static_cast<int>(ceil_div(ceil_div(p.k, kStepBytes), choice.splits));
  // Two at least: past the end of the matrices they are zeros.
  if (Shape::kHalves) plan.num_steps = std::max(plan.num_steps, 2);
  plan.num_row_groups = static_cast<int>(ceil_div(num_rows, Shape::kRows * choice.shared_columns));
  plan.num_column_tiles = static_cast<int>(ceil_div(num_columns, Shape::kColumns));
  plan.column_group = 8;
  plan.num_items = plan.num_row_groups * plan.num_column_tiles;
  plan.num_halved_tiles = 0;
  plan.vector_out = reinterpret_cast<std::uintptr_t>(p.out) % 16 == 0 && (p.m == 1 || p.out_stride % 8 == 0);
  plan.copies_out = plan.vector_out && p.out_stride > 0 && p.out_dtype != DType::kFloat32;
  if (plan.copies_out) plan.out = make_half_matrix_map(p.out, p.m, p.n, p.out_stride, Shape::kChunkTokens);

  const int cluster_size = choice.shared_columns * choice.splits;
  LaunchShape shape{static_cast<unsigned>(cluster_size), Shape::kThreads, Shape::kSharedBytes, cluster_size};
  int num_clusters = plan.num_items;
  if (choice.splits == 1) {
    const int most = std::max(max_active_clusters<kernel>(shape), 1);
    const int rest = plan.num_items % most;
    if (Shape::kHalves && choice.halves && choice.shared_columns == 2 && plan.num_items > most && rest > 0 && 2 * rest <= most) {
      plan.num_items -= rest;
      plan.num_halved_tiles = 2 * rest;
    }
    num_clusters = std::min(num_clusters, most);
  }
  plan.reads_rows_once = !kTokenRows && (plan.num_column_tiles == 1 || plan.num_items <= num_clusters);
  shape.grid.x = static_cast<unsigned>(num_clusters * cluster_size);
  // Clusters of one are slower than none.
  if (cluster_size == 1) shape.cluster_ctas = 0;
  launch_waiting("scaled_matmul_wgmma_kernel", kernel, shape, stream, plan);
}

/// Without block scales the weight lies along the rows.
template <typename Sum>
void launch_wgmma_plain(const ScaledMatmulParams& p, const WgmmaChoice& choice, Stream stream) {
  if (choice.rows == 64) {
    switch (choice.columns) {
      case 16: return launch_wgmma<Sum, WgmmaShape<1, 16, false, false>>(p, choice, stream);
      case 32: return launch_wgmma<Sum, WgmmaShape<1, 32, false, false>>(p, choice, stream);
      case 64: return launch_wgmma<Sum, WgmmaShape<1, 64, false, false>>(p, choice, stream);
      default: return launch_wgmma<Sum, WgmmaShape<1, 128, false, false>>(p, choice, stream);
    }
  }
  switch (choice.columns) {
    case 64: return launch_wgmma<Sum, WgmmaShape<2, 64, false, false>>(p, choice, stream);
    case 128: return launch_wgmma<Sum, WgmmaShape<2, 128, false, false>>(p, choice, stream);
    default: return launch_wgmma<Sum, WgmmaShape<2, 256, false, false>>(p, choice, stream);
  }
}

}  // namespace quire::cuda::scaled
