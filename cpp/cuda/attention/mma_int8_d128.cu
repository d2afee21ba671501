// Tensor-core attention over int8 keys and values, head_dim up to 128.
// SPDX-License-Identifier: Apache-2.0
#include "cuda/attention/launch_mma.cuh"

namespace quire::cuda::attn {
template void launch_mma<DType::kInt8, 128>(const Plan&, const Config&, Stream);
}  // namespace quire::cuda::attn
