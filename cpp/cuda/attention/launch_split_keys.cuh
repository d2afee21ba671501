// launch_split_keys's definition, for the instantiations.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cuda/attention/launch.h"
#include "cuda/attention/mma_split_keys.cuh"

namespace quire::cuda::attn {

template <DType kKvDType>
void launch_split_keys(const Plan& plan, const Config& config, Stream stream) {
  const auto launch = [&]<int kHeadDim, Variant kVariant, bool kWide, bool kPaired = false>() {
    using Shape = SplitKeysShape<kKvDType, kHeadDim, kVariant, kWide, kPaired>;
    const auto kernel = attention_mma_split_keys_kernel<kKvDType, kHeadDim, kVariant, kWide, kPaired>;
    set_max_shared_bytes(reinterpret_cast<const void*>(kernel), Shape::kSharedBytes);
    kernel<<<static_cast<unsigned>(config.num_ctas), Shape::kCtaThreads, static_cast<std::size_t>(Shape::kSharedBytes),
             cuda_stream(stream)>>>(plan);
    QUIRE_CHECK_LAUNCH("attention_mma_split_keys_kernel", stream);
  };
  const auto of_head_dim = [&]<int kHeadDim>() {
    if constexpr (kHeadDim == 128)
      if (config.paired) {
        return config.wide ? launch.template operator()<128, Variant::kMmaSplitKeys8, true, true>()
                           : launch.template operator()<128, Variant::kMmaSplitKeys8, false, true>();
      }
    if constexpr (kHeadDim == 256)
      if (config.variant == Variant::kMmaSplitKeys8Small) return launch.template operator()<256, Variant::kMmaSplitKeys8Small, false>();
    if (config.variant == Variant::kMmaSplitKeys16) {
      return config.wide ? launch.template operator()<kHeadDim, Variant::kMmaSplitKeys16, true>()
                         : launch.template operator()<kHeadDim, Variant::kMmaSplitKeys16, false>();
    }
    return config.wide ? launch.template operator()<kHeadDim, Variant::kMmaSplitKeys8, true>()
                       : launch.template operator()<kHeadDim, Variant::kMmaSplitKeys8, false>();
  };
  switch (config.head_dim_bucket) {
    case 64: return of_head_dim.template operator()<64>();
    case 128: return of_head_dim.template operator()<128>();
    default: return of_head_dim.template operator()<256>();
  }
}

}  // namespace quire::cuda::attn
