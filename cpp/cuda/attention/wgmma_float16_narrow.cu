// Hopper's attention of float16 queries over 8-bit keys and values.
// SPDX-License-Identifier: Apache-2.0
#include "cuda/attention/launch_wgmma.cuh"

namespace quire::cuda::attn {

template void launch_wgmma<DType::kFloat16, true, 64>(const Plan&, const Config&, Stream);
template void launch_wgmma<DType::kFloat16, true, 128>(const Plan&, const Config&, Stream);
template void launch_wgmma<DType::kFloat16, true, 256>(const Plan&, const Config&, Stream);

}  // namespace quire::cuda::attn
