// launch_mma's definition, for the instantiations.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cuda/quantization/w4a16_launch.h"

namespace quire::cuda::w4a16 {

template <bool kBf16>
void launch_mma(const MmaPlan& given, int tiles, Stream stream) {
  MmaPlan plan = given;
  const auto launch = [&]<int kBits, bool kSmallGroups, Entry kEntry, int kTiles>() {
    using Shape = MmaShape<kBits, kTiles>;
    const auto kernel = quantized_matmul_mma_kernel<kBf16, kBits, kSmallGroups, kEntry, kTiles>;
    plan.stage_bytes = Shape::kCodeBytes + Shape::kUnits * 8 * plan.layout.entry_bytes * (kSmallGroups ? 2 : 1);
    const int shared_bytes = mma_shared_bytes<Shape>(plan);
    const auto num_ctas = static_cast<unsigned>(ceil_div(plan.num_tokens, Shape::kTokens) * plan.num_ctas);
    launch_waiting("quantized_matmul_mma_kernel", kernel, LaunchShape{num_ctas, Shape::kThreads, shared_bytes}, stream, plan);
  };
  const auto with_tiles = [&]<int kBits, bool kSmallGroups>() {
    const auto with_entry = [&]<int kTiles>() {
      switch (entry_of(plan.layout)) {
        case Entry::kScales: return launch.template operator()<kBits, kSmallGroups, Entry::kScales, kTiles>();
        case Entry::kZeros: return launch.template operator()<kBits, kSmallGroups, Entry::kZeros, kTiles>();
        case Entry::kFloat: break;
      }
      // Scales of 32 bits are rare: two kernels do for all.
      launch.template operator()<kBits, kSmallGroups, Entry::kFloat, kTiles <= 2 ? 1 : 8>();
    };
    switch (tiles) {
      case 1: return with_entry.template operator()<1>();
      case 2: return with_entry.template operator()<2>();
      case 4: return with_entry.template operator()<4>();
      default: return with_entry.template operator()<8>();
    }
  };
  const bool small_groups = plan.layout.group_size == 32;
  if (plan.layout.bits == 4) {
    small_groups ? with_tiles.template operator()<4, true>() : with_tiles.template operator()<4, false>();
  } else {
    small_groups ? with_tiles.template operator()<8, true>() : with_tiles.template operator()<8, false>();
  }
}

}  // namespace quire::cuda::w4a16
