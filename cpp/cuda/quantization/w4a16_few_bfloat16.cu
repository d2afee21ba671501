// quantized_matmul on wgmma for few tokens of bfloat16.
// SPDX-License-Identifier: Apache-2.0
#include "cuda/quantization/w4a16_few_launch.cuh"

namespace quire::cuda::w4a16 {

template void launch_few<true>(const FewPlan&, const FewMaps&, int, int, int, Stream);

}  // namespace quire::cuda::w4a16
