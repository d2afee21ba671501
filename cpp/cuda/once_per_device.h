// Answers that are asked for once per device. Host code only; apart from cuda/launch.h because <atomic> costs every file that includes it.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <atomic>

#include "cuda/launch.h"
#include "cuda/runtime.h"

namespace quire::cuda {

inline constexpr int kMaxRememberedDevices = 64;

/// `ask()` for the current device, once.
template <typename F>
bool known_of_device(F&& ask) {
  static std::atomic<int> known[kMaxRememberedDevices];  // 0: not asked yet; 1: no; 2: yes
  const int device = current_device();
  if (device >= kMaxRememberedDevices) return false;
  int answer = known[device].load(std::memory_order_relaxed);
  if (answer == 0) {
    answer = ask() ? 2 : 1;
    known[device].store(answer, std::memory_order_relaxed);
  }
  return answer == 2;
}

/// Clusters of the shape that run on the current device at once, asked once for a kernel's cluster size: its block and shared memory are the same
/// in all calls.
template <auto kKernel>
int max_active_clusters(const LaunchShape& shape) {
  constexpr int kMaxClusterCtas = 16;
  static std::atomic<int> known[kMaxRememberedDevices][kMaxClusterCtas + 1];  // 0: not asked yet; else 1 + the answer
  const int device = current_device();
  if (device >= kMaxRememberedDevices || shape.cluster_ctas > kMaxClusterCtas)
    return ask_max_active_clusters(reinterpret_cast<const void*>(kKernel), shape);
  std::atomic<int>& of_size = known[device][shape.cluster_ctas];
  int answer = of_size.load(std::memory_order_relaxed) - 1;
  if (answer < 0) {
    answer = ask_max_active_clusters(reinterpret_cast<const void*>(kKernel), shape);
    of_size.store(answer + 1, std::memory_order_relaxed);
  }
  return answer;
}

}  // namespace quire::cuda
