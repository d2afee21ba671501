// Products of float8 and int8 matrices with scales, on CUDA: which kernel, which tile.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "cuda/launch.h"
#include "cuda/quantization/scaled_matmul.h"

namespace quire::cuda {
namespace scaled {

bool can_use_wgmma(const ScaledMatmulParams& p, int compute_capability) {
  const auto copies = [](const void* data, std::int64_t num_rows, std::int64_t stride) {
    return reinterpret_cast<std::uintptr_t>(data) % 16 == 0 && (num_rows == 1 || stride % 16 == 0);
  };
  return compute_capability == 90 && copies(p.a, p.m, p.a_stride) && copies(p.b, p.n, p.b_stride);
}

WgmmaChoice choose_wgmma(const ScaledMatmulParams& p, int num_sms) {
  static_cast<void>(num_sms);
  const bool blocks = p.granularity_a == ScaleGranularity::kGroup;
  if (blocks && p.m > 64) return {128, 128, true, 1, 1, false};
  if (blocks) return {64, p.m > 16 ? 64 : 16, false, 1, 1, false};
  return {p.m > 64 ? 128 : 64, p.m > 128 ? 256 : p.m > 64 ? 128 : p.m > 32 ? 64 : p.m > 16 ? 32 : 16, false, 1, 1, false};
}

}  // namespace scaled

void scaled_matmul(const ScaledMatmulParams& p, Stream stream) {
  const DeviceProperties& device = current_device_properties();
  if (!scaled::can_use_wgmma(p, device.compute_capability)) return scaled::launch_mma(p, stream);
  const scaled::WgmmaChoice choice = scaled::choose_wgmma(p, device.num_sms);
  if (p.dtype == DType::kInt8) {
    scaled::launch_wgmma_int8(p, choice, stream);
  } else {
    scaled::launch_wgmma_float8(p, choice, stream);
  }
}

std::int64_t scaled_matmul_workspace_size(std::int64_t, std::int64_t, std::int64_t, DType, bool, bool) { return 0; }

}  // namespace quire::cuda
