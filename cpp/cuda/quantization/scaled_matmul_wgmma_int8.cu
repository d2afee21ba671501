// Hopper's kernel for int8 operands.
// SPDX-License-Identifier: Apache-2.0
#include "cuda/quantization/scaled_matmul_launch_wgmma.cuh"

namespace quire::cuda::scaled {

void launch_wgmma_int8(const ScaledMatmulParams& p, const WgmmaChoice& choice, Stream stream) {
  launch_wgmma_plain<int>(p, choice, stream);
}

}  // namespace quire::cuda::scaled
