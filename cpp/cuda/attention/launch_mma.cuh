// launch_mma's definition, for the instantiations.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cuda/attention/launch.h"
#include "cuda/attention/mma_split_rows.cuh"

namespace quire::cuda::attn {

template <DType kKvDType, int kHeadDim>
void launch_mma(const Plan& plan, const Config& config, Stream stream) {
  const auto launch = [&](auto kernel, int shared_bytes) {
    set_max_shared_bytes(reinterpret_cast<const void*>(kernel), shared_bytes);
    const dim3 grid(static_cast<unsigned>(config.num_tiles * plan.params.num_kv_heads), static_cast<unsigned>(config.num_splits));
    kernel<<<grid, kThreads, static_cast<std::size_t>(shared_bytes), cuda_stream(stream)>>>(plan);
    QUIRE_CHECK_LAUNCH("attention_mma_kernel", stream);
  };
  const auto launch_split_rows = [&]<Variant kVariant>() {
    launch(attention_mma_split_rows_kernel<kKvDType, kHeadDim, kVariant>, SplitRowsShape<kKvDType, kHeadDim, kVariant>::kSharedBytes);
  };
  switch (config.variant) {
    case Variant::kMmaSplitRows128:
      if constexpr (kHeadDim <= 128) return launch_split_rows.template operator()<Variant::kMmaSplitRows128>();
      [[fallthrough]];
    case Variant::kMmaSplitRowsSmall:
      if constexpr (kHeadDim == 256 && itemsize(kKvDType) == 2) return launch_split_rows.template operator()<Variant::kMmaSplitRowsSmall>();
      [[fallthrough]];
    default: return launch_split_rows.template operator()<Variant::kMmaSplitRows>();
  }
}

}  // namespace quire::cuda::attn
