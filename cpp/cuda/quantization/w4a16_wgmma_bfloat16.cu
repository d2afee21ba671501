// quantized_matmul on wgmma for bfloat16 activations.
// SPDX-License-Identifier: Apache-2.0
#include "cuda/quantization/w4a16_wgmma_launch.cuh"

namespace quire::cuda::w4a16 {

template void launch_wgmma<true>(const WgmmaPlan&, const WgmmaMaps&, int, int, Stream);

}  // namespace quire::cuda::w4a16
