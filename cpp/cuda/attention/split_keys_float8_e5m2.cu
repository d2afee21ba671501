// Tensor-core attention of few query rows over float8_e5m2 keys and values.
// SPDX-License-Identifier: Apache-2.0
#include "cuda/attention/launch_split_keys.cuh"

namespace quire::cuda::attn {
template void launch_split_keys<DType::kFloat8E5M2>(const Plan&, const Config&, Stream);
}  // namespace quire::cuda::attn
