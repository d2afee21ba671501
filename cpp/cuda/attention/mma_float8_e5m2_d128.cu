// Tensor-core attention over float8_e5m2 keys and values, head_dim up to 128.
// SPDX-License-Identifier: Apache-2.0
#include "cuda/attention/launch_mma.cuh"

namespace quire::cuda::attn {
template void launch_mma<DType::kFloat8E5M2, 128>(const Plan&, const Config&, Stream);
}  // namespace quire::cuda::attn
