// quantized_matmul on wgmma for few tokens of float16.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <atomic>

#include "cuda/quantization/w4a16_few_launch.cuh"

namespace quire::cuda::w4a16 {

template void launch_few<false>(const FewPlan&, const FewMaps&, int, int, int, Stream);

int max_clusters(int cluster_ctas) {
  if (cluster_ctas == 1) return current_device_properties().num_sms;
  constexpr int kMaxDevices = 64, kMaxClusterCtas = 8;
  static std::atomic<int> known[kMaxDevices][kMaxClusterCtas + 1];
  int device = 0;
  QUIRE_CUDA_CHECK(cudaGetDevice(&device));
  if (device >= kMaxDevices || cluster_ctas > kMaxClusterCtas) return 1;
  int count = known[device][cluster_ctas].load(std::memory_order_relaxed);
  if (count == 0) {
    const auto kernel = quantized_matmul_few_kernel<false, 4, false, 8>;
    constexpr int kSharedBytes = 200 * 1024;
    set_max_shared_bytes(reinterpret_cast<const void*>(kernel), kSharedBytes);
    cudaLaunchAttribute cluster{};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = static_cast<unsigned>(cluster_ctas);
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(cluster_ctas));
    config.blockDim = dim3(kFewThreads);
    config.dynamicSmemBytes = kSharedBytes;
    config.attrs = &cluster;
    config.numAttrs = 1;
    QUIRE_CUDA_CHECK(cudaOccupancyMaxActiveClusters(&count, kernel, &config));
    count = std::max(count, 1);
    known[device][cluster_ctas].store(count, std::memory_order_relaxed);
  }
  return count;
}

}  // namespace quire::cuda::w4a16
