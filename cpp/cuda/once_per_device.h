// Answers that are asked for once per device. Host code only; apart from cuda/launch.h because <atomic> costs every file that includes it.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <atomic>

#include "cuda/launch.h"
#include "cuda/runtime.h"

namespace quire::cuda {

/// `ask()` for the current device, once.
template <typename F>
bool known_of_device(F&& ask) {
  constexpr int kMaxDevices = 64;
  static std::atomic<int> known[kMaxDevices];  // 0: not asked yet; 1: no; 2: yes
  const int device = current_device();
  if (device >= kMaxDevices) return false;
  int answer = known[device].load(std::memory_order_relaxed);
  if (answer == 0) {
    answer = ask() ? 2 : 1;
    known[device].store(answer, std::memory_order_relaxed);
  }
  return answer == 2;
}

}  // namespace quire::cuda
