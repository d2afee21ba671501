// quantized_matmul on wgmma for few tokens of float16.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <atomic>

#include "cuda/quantization/w4a16_few_launch.cuh"
#include "cuda/runtime.h"

namespace quire::cuda::w4a16 {

template void launch_few<false>(const FewPlan&, const FewMaps&, int, int, int, Stream);

int max_clusters(int cluster_ctas) {
  if (cluster_ctas == 1) return current_device_properties().num_sms;
  constexpr int kMaxDevices = 64, kMaxClusterCtas = 8;
  static std::atomic<int> known[kMaxDevices][kMaxClusterCtas + 1];
  const int device = current_device();
  if (device >= kMaxDevices || cluster_ctas > kMaxClusterCtas) return 1;
  int count = known[device][cluster_ctas].load(std::memory_order_relaxed);
  if (count == 0) {
    const LaunchShape shape{static_cast<unsigned>(cluster_ctas), kFewThreads, 200 * 1024, cluster_ctas};
    count = std::max(max_active_clusters(reinterpret_cast<const void*>(quantized_matmul_few_kernel<false, 4, false, 8>), shape), 1);
    known[device][cluster_ctas].store(count, std::memory_order_relaxed);
  }
  return count;
}

}  // namespace quire::cuda::w4a16
