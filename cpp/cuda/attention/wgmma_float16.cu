// Hopper's attention over float16 keys and values.
// SPDX-License-Identifier: Apache-2.0
#include "cuda/attention/launch_wgmma.cuh"

namespace quire::cuda::attn {

template void launch_wgmma<false, 64>(const Plan&, const Config&, Stream);
template void launch_wgmma<false, 128>(const Plan&, const Config&, Stream);
template void launch_wgmma<false, 256>(const Plan&, const Config&, Stream);

}  // namespace quire::cuda::attn
