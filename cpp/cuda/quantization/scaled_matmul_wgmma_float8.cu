// Hopper's kernel for float8 operands.
// SPDX-License-Identifier: Apache-2.0
#include "cuda/quantization/scaled_matmul_launch_wgmma.cuh"

namespace quire::cuda::scaled {

void launch_wgmma_float8(const ScaledMatmulParams& p, const WgmmaChoice& choice, Stream stream) {
  if (p.granularity_a != ScaleGranularity::kGroup) return launch_wgmma_plain<float>(p, choice, stream);
  if (choice.token_rows) {
    if (choice.columns == 128) return launch_wgmma<float, WgmmaShape<2, 128, true, true>>(p, choice, stream);
    return launch_wgmma<float, WgmmaShape<2, 256, true, true>>(p, choice, stream);
  }
  if (choice.columns == 16) return launch_wgmma<float, WgmmaShape<1, 16, false, true>>(p, choice, stream);
  launch_wgmma<float, WgmmaShape<1, 64, false, true>>(p, choice, stream);
}

}  // namespace quire::cuda::scaled
