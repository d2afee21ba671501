// launch_few's definition, for the instantiations.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "core/dispatch.h"
#include "cuda/quantization/w4a16_launch.h"

namespace quire::cuda::w4a16 {

template <bool kBf16>
void launch_few(const FewPlan& plan, const FewMaps& maps, int tokens, int num_ctas, int shared_bytes, Stream stream) {
  const auto launch = [&]<int kBits, bool kSmallGroups, int kTokens>() {
    const auto kernel = quantized_matmul_few_kernel<kBf16, kBits, kSmallGroups, kTokens>;
    launch_waiting("quantized_matmul_few_kernel", kernel,
                   LaunchShape{static_cast<unsigned>(num_ctas), kFewThreads, shared_bytes, clusters_of(plan.cluster_ctas)}, stream, plan,
                   maps);
  };
  dispatch_bool(plan.layout.bits == 4, [&](auto four) {
    dispatch_bool(plan.layout.group_size == 32 || plan.layout.group_size == 64, [&](auto small_groups) {
      constexpr int kBits = decltype(four)::value ? 4 : 8;
      constexpr bool kSmallGroups = decltype(small_groups)::value;
      switch (tokens) {
        case 1: return launch.template operator()<kBits, kSmallGroups, 1>();
        case 8: return launch.template operator()<kBits, kSmallGroups, 8>();
        case 16: return launch.template operator()<kBits, kSmallGroups, 16>();
        case 32: return launch.template operator()<kBits, kSmallGroups, 32>();
        default: return launch.template operator()<kBits, kSmallGroups, 64>();
      }
    });
  });
}

}  // namespace quire::cuda::w4a16
