// Attention for float32 queries.
// SPDX-License-Identifier: Apache-2.0
#include "cuda/attention/launch.h"
#include "cuda/attention/simt.cuh"

namespace quire::cuda::attn {

template <DType kKvDType>
void launch_simt(const Plan& plan, const Config& config, Stream stream) {
  const dim3 grid(static_cast<unsigned>(config.num_tiles * plan.params.num_kv_heads), static_cast<unsigned>(config.num_splits));
  const auto kernel = config.head_dim_bucket == 128 ? attention_simt_kernel<kKvDType, 128> : attention_simt_kernel<kKvDType, 256>;
  launch_waiting("attention_simt_kernel", kernel, grid, kThreads, stream, plan);
}

template void launch_simt<DType::kFloat32>(const Plan&, const Config&, Stream);
template void launch_simt<DType::kFloat8E4M3FN>(const Plan&, const Config&, Stream);
template void launch_simt<DType::kFloat8E5M2>(const Plan&, const Config&, Stream);
template void launch_simt<DType::kInt8>(const Plan&, const Config&, Stream);

}  // namespace quire::cuda::attn
