// Attention for many query rows per kv head on Hopper: the copy engine brings keys, warpgroups multiply. sm_90a.
// SPDX-License-Identifier: Apache-2.0
//
// A CTA stays on its SM and takes tile after tile. The warps of its first warpgroup bring things: one finds the tiles, one copies their keys,
// one their values, and one gathers their query rows. Where keys and values have 8 bits, the second warpgroup widens what is not multiplied as
// it is. Each further warpgroup has 64 rows of the tile. Two products are under way at once:
// scores of the next keys, and weights times values of the last ones; and warpgroups take turns at issuing products, so that one's softmax
// runs beside the other's products.
#pragma once

#include "cuda/attention/wgmma_consumer.cuh"
#include "cuda/attention/wgmma_producer.cuh"
#include "cuda/device/dependent_launch.cuh"

namespace quire::cuda::attn {

/// Grid: one CTA per SM at most; each takes tiles of 64 packed rows per consumer and one kv head until none is left.
template <typename Shape, bool kOptions>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    attention_wgmma_kernel(const __grid_constant__ Plan plan, const __grid_constant__ WgmmaInputs inputs) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Control = WgmmaControl<Shape>;
  extern __shared__ __align__(1024) char shared[];
  auto* control = reinterpret_cast<Control*>(shared + Shape::kControlOffset);
  int warp = static_cast<int>(threadIdx.x) / 32;
  if constexpr (Shape::kKnowsUniform) warp = __shfl_sync(kAllLanes, warp, 0);
  if (threadIdx.x == 0) {
    const auto init = [](std::uint64_t& barrier, int arrivals) { device::barrier_init(device::shared_address(&barrier), arrivals); };
    for (int i = 0; i < Shape::kStages; ++i) {
      init(control->k_full[i], Shape::kWidenK ? Shape::kWidenerWarps : 1),
          init(control->v_full[i], Shape::kWidenV ? Shape::kWidenerWarps : 1);
      init(control->k_empty[i], Shape::kConsumerWarps), init(control->v_empty[i], Shape::kConsumerWarps);
    }
    for (int i = 0; Shape::kWidenV && i < Shape::kNarrowStages; ++i) {
      init(control->narrow_k_full[i], 1), init(control->narrow_v_full[i], 1);
      init(control->narrow_k_empty[i], Shape::kWidenerWarps), init(control->narrow_v_empty[i], Shape::kWidenerWarps);
    }
    for (int i = 0; i < Shape::kQStages; ++i)
      init(control->q_full[i], inputs.q_boxes ? 1 : kQueryLoaders), init(control->q_empty[i], Shape::kConsumerWarps);
    for (int i = 0; i < kTileSlots; ++i) init(control->tile_full[i], 1), init(control->tile_empty[i], 32 * Shape::kTileReaders);
    for (int i = 0; i < kTileSlots; ++i) control->tiles[i].again = 0;
    control->any_again = 0;
    device::barrier_init_fence();
    device::prefetch_tensor_map(&inputs.k);
    device::prefetch_tensor_map(&inputs.v);
    if (inputs.q_boxes) device::prefetch_tensor_map(&inputs.q);
    if (inputs.out_boxes) device::prefetch_tensor_map(&inputs.out);
  }
  __syncthreads();
  device::wait_for_predecessor();

  if (warp < 4) {
    device::give_registers<Shape::kProducerRegisters>();
    if (warp == 0) {
      WgmmaScheduler<Shape>{plan, control}.run();
    } else if (warp == 1) {
      if (inputs.in_blocks) {
        copy_steps<Shape, true, Shape::kWidenBeside, true>(plan, inputs, shared, control);
      } else {
        copy_steps<Shape, true, Shape::kWidenBeside, false>(plan, inputs, shared, control);
      }
    } else if (warp == 2) {
      if constexpr (Shape::kWidenBeside) {
        widen_steps<Shape, device::Byte::kE4M3>(shared, control);
      } else {
        if (inputs.in_blocks) {
          copy_steps<Shape, false, true, true>(plan, inputs, shared, control);
        } else {
          copy_steps<Shape, false, true, false>(plan, inputs, shared, control);
        }
      }
    } else if (inputs.q_boxes) {
      copy_queries<Shape>(plan, inputs, shared, control);
    } else {
      gather_queries<Shape>(plan, shared, control);
    }
  } else if (warp < 4 * Shape::kFirstConsumer) {
    if constexpr (Shape::kFirstConsumer == 2) {
      device::give_registers<Shape::kWidenerRegisters>();
      if (Shape::kNarrowQ || plan.params.kv_dtype == DType::kFloat8E4M3FN) {
        widen_steps<Shape, device::Byte::kE4M3>(shared, control);
      } else if (plan.params.kv_dtype == DType::kFloat8E5M2) {
        widen_steps<Shape, device::Byte::kE5M2>(shared, control);
      } else {
        widen_steps<Shape, device::Byte::kInt8>(shared, control);
      }
    }
  } else {
    device::take_registers<Shape::kConsumerRegisters>();
    WgmmaConsumer<Shape, kOptions> consumer{plan, inputs, shared, warp / 4 - Shape::kFirstConsumer};
    consumer.run();
  }
#endif
}

}  // namespace quire::cuda::attn
