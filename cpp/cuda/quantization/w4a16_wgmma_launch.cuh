// launch_wgmma's definition, for the instantiations.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "core/dispatch.h"
#include "cuda/quantization/w4a16_launch.h"

namespace quire::cuda::w4a16 {

template <bool kBf16>
void launch_wgmma(const WgmmaPlan& plan, const WgmmaMaps& maps, int tokens, int num_ctas, Stream stream) {
  const auto launch = [&]<int kBits, bool kSmallGroups, int kTokens>() {
    using Shape = WgmmaShape<kBits, kSmallGroups, kTokens>;
    static_assert(Shape::kSharedBytes <= 227 * 1024);
    const auto kernel = quantized_matmul_wgmma_kernel<kBf16, kBits, kSmallGroups, kTokens>;
    launch_waiting("quantized_matmul_wgmma_kernel", kernel,
                   LaunchShape{static_cast<unsigned>(num_ctas), Shape::kThreads, Shape::kSharedBytes, clusters_of(plan.cluster_ctas)},
                   stream, plan, maps);
  };
  dispatch_bool(plan.layout.bits == 4, [&](auto four) {
    dispatch_bool(plan.layout.group_size == 32, [&](auto small_groups) {
      constexpr int kBits = decltype(four)::value ? 4 : 8;
      constexpr bool kSmallGroups = decltype(small_groups)::value;
      switch (tokens) {
        case 128: return launch.template operator()<kBits, kSmallGroups, 128>();
        default: return launch.template operator()<kBits, kSmallGroups, 256>();
      }
    });
  });
}

}  // namespace quire::cuda::w4a16
