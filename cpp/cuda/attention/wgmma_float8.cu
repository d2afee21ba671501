// Hopper's attention of float8_e4m3fn queries, keys and values.
// SPDX-License-Identifier: Apache-2.0
#include "cuda/attention/launch_wgmma.cuh"

namespace quire::cuda::attn {

template void launch_wgmma<DType::kFloat8E4M3FN, true, 64>(const Plan&, const Config&, Stream);
template void launch_wgmma<DType::kFloat8E4M3FN, true, 128>(const Plan&, const Config&, Stream);
template void launch_wgmma<DType::kFloat8E4M3FN, true, 256>(const Plan&, const Config&, Stream);

}  // namespace quire::cuda::attn
