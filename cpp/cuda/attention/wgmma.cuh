// Attention for many query rows per kv head on Hopper: the copy engine brings keys, warpgroups multiply. sm_90a.
// SPDX-License-Identifier: Apache-2.0
//
// A CTA stays on its SM and takes tile after tile. The warps of its first warpgroup bring things: one finds the tiles, one copies their keys,
// one their values, and one gathers their query rows. Each further warpgroup has 64 rows of the tile. Two products are under way at once:
// scores of the next keys, and weights times values of the last ones; and warpgroups take turns at issuing products, so that one's softmax
// runs beside the other's products.
#pragma once

#include "cuda/attention/wgmma_consumer.cuh"
#include "cuda/attention/wgmma_producer.cuh"

namespace quire::cuda::attn {

/// Grid: one CTA per SM at most; each takes tiles of 64 packed rows per consumer and one kv head until none is left.
template <bool kBf16, int kHeadDim, bool kTransform>
__global__ void __launch_bounds__(WgmmaShape<kHeadDim>::kThreads, 1)
    attention_wgmma_kernel(const __grid_constant__ Plan plan, const __grid_constant__ WgmmaInputs inputs) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Shape = WgmmaShape<kHeadDim>;
  using Control = WgmmaControl<kHeadDim>;
  extern __shared__ __align__(1024) char shared[];
  auto* control = reinterpret_cast<Control*>(shared + Shape::kControlOffset);
  const int warp = static_cast<int>(threadIdx.x) / 32;
  if (threadIdx.x == 0) {
    const auto init = [](std::uint64_t& barrier, int arrivals) { device::barrier_init(device::shared_address(&barrier), arrivals); };
    for (int i = 0; i < Shape::kStages; ++i) {
      init(control->k_full[i], 1), init(control->v_full[i], 1);
      init(control->k_empty[i], Shape::kConsumerWarps), init(control->v_empty[i], Shape::kConsumerWarps);
    }
    for (int i = 0; i < Shape::kQStages; ++i) init(control->q_full[i], kQueryLoaders), init(control->q_empty[i], Shape::kConsumerWarps);
    for (int i = 0; i < kTileSlots; ++i) init(control->tile_full[i], 1), init(control->tile_empty[i], 32 * (Shape::kConsumerWarps + 3));
    for (int i = 0; i < kTileSlots; ++i) control->tiles[i].again = 0;
    control->any_again = 0;
    device::barrier_init_fence();
    device::prefetch_tensor_map(&inputs.k);
    device::prefetch_tensor_map(&inputs.v);
  }
  __syncthreads();

  if (warp < 4) {
    device::give_registers<Shape::kProducerRegisters>();
    if (warp == 0) {
      WgmmaScheduler<kHeadDim>{plan, control}.run();
    } else if (warp == 1) {
      copy_steps<kHeadDim, true>(plan, inputs, shared, control);
    } else if (warp == 2) {
      copy_steps<kHeadDim, false>(plan, inputs, shared, control);
    } else {
      gather_queries<kHeadDim>(plan, shared, control);
    }
  } else {
    device::take_registers<Shape::kConsumerRegisters>();
    WgmmaConsumer<kBf16, kHeadDim, kTransform> consumer{plan, inputs, shared, warp / 4 - 1};
    consumer.run();
  }
#endif
}

}  // namespace quire::cuda::attn
