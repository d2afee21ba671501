// Products of 8-bit matrices on Hopper: TMA, wgmma, clusters that share operands and that split the inner dimension.
// SPDX-License-Identifier: Apache-2.0
//
// A tile has kRows rows of one operand and kColumns rows of the other ("columns"). The weight lies along the rows, so that few tokens need
// few columns; with block scales and many tokens, tokens do (kTokenRows), so that a thread has few scales.
#pragma once

#include "cuda/device/cluster.cuh"
#include "cuda/device/dependent_launch.cuh"
#include "cuda/device/mma.cuh"
#include "cuda/quantization/scaled_matmul_wgmma_consumer.cuh"
#include "cuda/quantization/scaled_matmul_wgmma_producer.cuh"

namespace quire::cuda::scaled {

/// A cluster produces shared_columns tiles at a time, or, with splits, all CTAs of a split do; tiles that are halved come last.
template <typename Sum, typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1) scaled_matmul_wgmma_kernel(const __grid_constant__ WgmmaPlan plan) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) char storage[];
  const WgmmaShared<Shape> shared{device::shared_address(storage)};
  const int rank = device::cluster_rank(), warp = static_cast<int>(threadIdx.x) / 32;
  const int cluster_size = plan.shared_columns * plan.splits;
  if (threadIdx.x == 0) {
    device::prefetch_tensor_map(&plan.rows);
    device::prefetch_tensor_map(&plan.columns);
    if (plan.copies_out) device::prefetch_tensor_map(&plan.out);
    for (int stage = 0; stage < Shape::kStages; ++stage) {
      device::barrier_init(shared.full(stage), Shape::kCopiesScales ? 1 + 32 : 1);
      device::barrier_init(shared.empty(stage), Shape::kConsumers * 4 * plan.shared_columns);
    }
    if (plan.splits > 1) {
      // With splits a CTA has one tile.
      const int count = SplitColumns<Shape>(plan, rank).count;
      device::barrier_init(shared.finished(), Shape::kConsumers * 4 * plan.splits);
      device::barrier_init(shared.received(), 1);
      if (count > 0) device::barrier_arrive_expect(shared.received(), (plan.splits - 1) * count * Shape::kConsumers * 128 * 16);
    }
    device::barrier_init_fence();
  }
  __syncthreads();
  // Barriers of others are there after the wait; without shared columns they are needed late.
  if (cluster_size > 1) device::cluster_arrive();
  if (plan.shared_columns > 1) device::cluster_wait();
  const bool waits_late = cluster_size > 1 && plan.shared_columns == 1;
  device::wait_for_predecessor();
  if (warp < 4) {
    if constexpr (Shape::kConsumers > 1) device::give_registers<40>();
    if (threadIdx.x == 0) copy_operands<Shape>(plan, shared, rank);
    if constexpr (Shape::kCopiesScales) {
      if (warp == 1) copy_scales<Shape>(plan, shared, rank);
    }
    __syncwarp();
    device::launch_dependents();
    if (waits_late) device::cluster_wait();
  } else {
    if constexpr (Shape::kConsumers > 1) device::take_registers<232>();
    if (waits_late) device::cluster_wait();
    const int lane = static_cast<int>(threadIdx.x) % 32;
    std::uint32_t empty = lane == 0 ? shared.empty(0) : 0;
    if (plan.shared_columns > 1)
      empty = lane < plan.shared_columns ? device::address_in_cta(shared.empty(0), rank - rank % plan.shared_columns + lane) : 0;
    WgmmaConsumer<Sum, Shape> consumer{{plan, shared, rank, warp / 4 - 1}, empty};
    consumer.run();
  }
  // No CTA ends while others may copy to it, or arrive at its barriers.
  __syncwarp();
  if (cluster_size > 1) {
    device::cluster_arrive();
    device::cluster_wait();
  }
#endif
}

}  // namespace quire::cuda::scaled
