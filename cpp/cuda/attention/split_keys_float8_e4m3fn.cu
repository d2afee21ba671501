// Tensor-core attention of few query rows over float8_e4m3fn keys and values.
// SPDX-License-Identifier: Apache-2.0
#include "cuda/attention/launch_split_keys.cuh"

namespace quire::cuda::attn {
template void launch_split_keys<DType::kFloat8E4M3FN>(const Plan&, const Config&, Stream);
}  // namespace quire::cuda::attn
