// quantized_matmul on mma.sync for float16 activations.
// SPDX-License-Identifier: Apache-2.0
#include "cuda/quantization/w4a16_mma_launch.cuh"

namespace quire::cuda::w4a16 {

template void launch_mma<false>(const MmaPlan&, int, Stream);

}  // namespace quire::cuda::w4a16
