// Tensor-core attention over float8_e4m3fn keys and values, head_dim up to 128.
// SPDX-License-Identifier: Apache-2.0
#include "cuda/attention/launch_mma.cuh"

namespace quire::cuda::attn {
template void launch_mma<DType::kFloat8E4M3FN, 128>(const Plan&, const Config&, Stream);
}  // namespace quire::cuda::attn
