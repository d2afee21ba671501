// Hopper's attention over bfloat16 keys and values, and whether this build has it.
// SPDX-License-Identifier: Apache-2.0
#include "cuda/attention/launch_wgmma.cuh"

namespace quire::cuda::attn {

template void launch_wgmma<DType::kBFloat16, false, 64>(const Plan&, const Config&, Stream);
template void launch_wgmma<DType::kBFloat16, false, 96>(const Plan&, const Config&, Stream);
template void launch_wgmma<DType::kBFloat16, false, 128>(const Plan&, const Config&, Stream);
template void launch_wgmma<DType::kBFloat16, false, 192>(const Plan&, const Config&, Stream);
template void launch_wgmma<DType::kBFloat16, false, 256>(const Plan&, const Config&, Stream);

bool has_wgmma_code() {
  cudaFuncAttributes attributes{};
  QUIRE_CUDA_CHECK(cudaFuncGetAttributes(&attributes, attention_wgmma_kernel<WgmmaShape<DType::kBFloat16, false, 128>, false>));
  // Code made from older PTX is empty.
  return attributes.ptxVersion >= 90 && attributes.binaryVersion == 90;
}

}  // namespace quire::cuda::attn
