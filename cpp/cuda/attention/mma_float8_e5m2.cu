// Tensor-core attention of many query rows over float8_e5m2 keys and values.
// SPDX-License-Identifier: Apache-2.0
#include "cuda/attention/launch_mma.cuh"

namespace quire::cuda::attn {
template void launch_mma<DType::kFloat8E5M2, 64>(const Plan&, const Config&, Stream);
template void launch_mma<DType::kFloat8E5M2, 128>(const Plan&, const Config&, Stream);
template void launch_mma<DType::kFloat8E5M2, 256>(const Plan&, const Config&, Stream);
}  // namespace quire::cuda::attn
