// Hopper's attention over bfloat16 keys and values.
// SPDX-License-Identifier: Apache-2.0
#include "cuda/attention/launch_wgmma.cuh"

namespace quire::cuda::attn {

template void launch_wgmma<DType::kBFloat16, false, 64>(const Plan&, const Config&, Stream);
template void launch_wgmma<DType::kBFloat16, false, 96>(const Plan&, const Config&, Stream);
template void launch_wgmma<DType::kBFloat16, false, 128>(const Plan&, const Config&, Stream);
template void launch_wgmma<DType::kBFloat16, false, 192>(const Plan&, const Config&, Stream);
template void launch_wgmma<DType::kBFloat16, false, 256>(const Plan&, const Config&, Stream);

}  // namespace quire::cuda::attn
