// launch_mma's definition, for the instantiations.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cuda/attention/launch.h"
#include "cuda/attention/mma_split_rows.cuh"

namespace quire::cuda::attn {

/// Whether a call asks for nothing but what Asks::kPagedPlain has, or Asks::kPlain.
inline bool is_plain(const Plan& plan, int padded_head_dim) {
  const AttentionParams& p = plan.params;
  return p.mask == nullptr && p.alibi_slopes == nullptr && p.sinks == nullptr && p.q_scale == nullptr && p.k_scale == nullptr &&
         p.v_scale == nullptr && !(p.softcap > 0.0f) && p.scale > 0.0f && p.window_left < 0 && p.window_right < 0 &&
         p.head_dim == padded_head_dim && plan.groups_exist && plan.q_alignment == 16 && plan.out_aligned && plan.num_splits == 1;
}

template <DType kKvDType, int kHeadDim>
void launch_mma(const Plan& plan, const Config& config, Stream stream) {
  const auto launch = [&](auto kernel, int shared_bytes) {
    const dim3 grid(static_cast<unsigned>(config.num_tiles * plan.params.num_kv_heads), static_cast<unsigned>(config.num_splits));
    launch_waiting("attention_mma_kernel", kernel, LaunchShape{grid, kThreads, shared_bytes}, stream, plan);
  };
  const auto launch_split_rows = [&]<Variant kVariant>() {
    constexpr int kSharedBytes = SplitRowsShape<kKvDType, kHeadDim, kVariant>::kSharedBytes;
    if constexpr (itemsize(kKvDType) == 2 && (kHeadDim == 256 || kVariant == Variant::kMmaSplitRows128)) {
      if (is_plain(plan, kHeadDim)) {
        if (plan.params.block_tables == nullptr)
          return launch(attention_mma_split_rows_kernel<kKvDType, kHeadDim, kVariant, Asks::kPlain>, kSharedBytes);
        // Where the general kernel is as fast, it serves.
        if constexpr (kHeadDim <= 128 || kVariant == Variant::kMmaSplitRowsSmall)
          return launch(attention_mma_split_rows_kernel<kKvDType, kHeadDim, kVariant, Asks::kPagedPlain>, kSharedBytes);
      }
    }
    launch(attention_mma_split_rows_kernel<kKvDType, kHeadDim, kVariant, Asks::kAll>, kSharedBytes);
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
