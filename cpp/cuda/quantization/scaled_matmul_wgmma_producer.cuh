// The warps of Hopper's kernel for products of 8-bit matrices that copy: operands, and scales of blocks beside them.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cuda/device/async_copy.cuh"
#include "cuda/device/tma.cuh"
#include "cuda/quantization/scaled_matmul_wgmma_schedule.cuh"

namespace quire::cuda::scaled {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

/// One thread: copies the operands of every step. Past the end of a matrix it copies zeros.
template <typename Shape>
__device__ void copy_operands(const WgmmaPlan& plan, const WgmmaShared<Shape>& shared, int rank) {
  StageRing<Shape::kStages> ring;
  Work work;
  const int sharing = plan.shared_columns, box_columns = Shape::kColumns / sharing;
  const int member = rank % sharing;
  const std::uint32_t neighbours = ((1u << sharing) - 1u) << (rank - member);
  const std::uint64_t policy = device::read_once_policy();
  for (int iteration = 0; locate_work(plan, rank, iteration, work); ++iteration) {
    const bool halved = work.half >= 0;
    const int row = work.row_tile * Shape::kRows, column = work.column_tile * Shape::kColumns + max(work.half, 0) * box_columns;
    const int num_bytes = halved ? Shape::kRowsBytes + Shape::kColumnsBytes / 2 : Shape::kStageBytes;
    for (int step = 0; step < work.num_steps; ++step) {
      const int k = (work.first_step + step) * kStepBytes;
      const std::uint32_t full = shared.full(ring.stage);
      device::barrier_wait(shared.empty(ring.stage), ring.parity ^ 1);
      device::barrier_arrive_expect(full, num_bytes);
      if (plan.reads_rows_once) {
        device::copy_box_by(shared.rows(ring.stage), &plan.rows, full, k, row, policy);
      } else {
        device::copy_box(shared.rows(ring.stage), &plan.rows, full, k, row);
      }
      if (sharing == 1 || halved) {
        device::copy_box(shared.columns(ring.stage), &plan.columns, full, k, column);
      } else {
        device::copy_box_to_ctas(shared.columns(ring.stage) + static_cast<std::uint32_t>(member * box_columns * kStepBytes), &plan.columns,
                                 full, k, column + member * box_columns, neighbours);
      }
      ring.advance();
    }
  }
}

/// One warp: puts scales beside the operands of every step, one for each token, and the block's after them.
template <typename Shape>
__device__ void copy_scales(const WgmmaPlan& plan, const WgmmaShared<Shape>& shared, int rank) {
  const ScaledMatmulParams& p = plan.params;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  StageRing<Shape::kStages> ring;
  Work work;
  for (int iteration = 0; locate_work(plan, rank, iteration, work); ++iteration) {
    const std::int64_t token = std::int64_t{Shape::kTokenRows ? work.row_tile : work.column_tile} * Shape::kTokens + lane;
    const std::int64_t block =
        Shape::kTokenRows ? std::int64_t{work.column_tile} * Shape::kParts + lane : work.row_tile * Shape::kRows / 128;
    for (int step = 0; step < work.num_steps; ++step) {
      const std::int64_t group = work.first_step + step;
      const bool valid = group * kStepBytes < p.k;
      const float* a = p.scale_a + token * p.scale_a_row_stride + group * p.scale_a_group_stride;
      const float* b = p.scale_b + block * p.scale_b_row_stride + group * p.scale_b_group_stride;
      device::barrier_wait(shared.empty(ring.stage), ring.parity ^ 1);
      const std::uint32_t to = shared.scales(ring.stage);
#pragma unroll
      for (int i = 0; i < (Shape::kTokens + 31) / 32; ++i) {
        const bool there = valid && token + 32 * i < p.m;
        if (lane + 32 * i < Shape::kTokens)
          device::copy_async_4(to + static_cast<std::uint32_t>(lane + 32 * i) * 4, there ? a + 32 * i * p.scale_a_row_stride : p.scale_a,
                               there ? 4 : 0);
      }
      if (lane < Shape::kParts) {
        const bool there = valid && block * 128 < p.n;
        device::copy_async_4(to + static_cast<std::uint32_t>(Shape::kTokens + lane) * 4, there ? b : p.scale_b, there ? 4 : 0);
      }
      device::barrier_arrive_after_copies(shared.full(ring.stage));
      ring.advance();
    }
  }
}

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

}  // namespace quire::cuda::scaled
