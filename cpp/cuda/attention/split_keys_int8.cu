// Tensor-core attention of few query rows over int8 keys and values.
// SPDX-License-Identifier: Apache-2.0
#include "cuda/attention/launch_split_keys.cuh"

namespace quire::cuda::attn {
template void launch_split_keys<DType::kInt8>(const Plan&, const Config&, Stream);
}  // namespace quire::cuda::attn
