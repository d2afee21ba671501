// Tensor-core attention of few query rows over bfloat16 keys and values.
// SPDX-License-Identifier: Apache-2.0
#include "cuda/attention/launch_split_keys.cuh"

namespace quire::cuda::attn {
template void launch_split_keys<DType::kBFloat16>(const Plan&, const Config&, Stream);
}  // namespace quire::cuda::attn
