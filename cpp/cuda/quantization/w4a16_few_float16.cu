// quantized_matmul on wgmma for few tokens of float16.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "cuda/once_per_device.h"
#include "cuda/quantization/w4a16_few_launch.cuh"

namespace quire::cuda::w4a16 {

template void launch_few<false>(const FewPlan&, const FewMaps&, int, int, int, Stream);

int max_clusters(int cluster_ctas) {
  if (cluster_ctas == 1) return current_device_properties().num_sms;
  const LaunchShape shape{static_cast<unsigned>(cluster_ctas), kFewThreads, 200 * 1024, cluster_ctas};
  return std::max(max_active_clusters<quantized_matmul_few_kernel<false, 4, false, 8>>(shape), 1);
}

}  // namespace quire::cuda::w4a16
