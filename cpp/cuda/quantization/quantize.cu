// Quantizing to float8 and int8 on CUDA: which kernel.
// SPDX-License-Identifier: Apache-2.0
#include <cstdint>
#include <string>

#include "core/dispatch.h"
#include "core/explain.h"
#include "cuda/device/dependent_launch.cuh"
#include "cuda/element.h"
#include "cuda/launch.h"
#include "cuda/quantization/quantize_launch.h"
#include "ops/quantization.h"

namespace quire::cuda {
namespace quant {
namespace {

// Grid: threads share the rows, in turns.
__global__ void default_scales_kernel(const __grid_constant__ QuantizeParams p) {
  device::wait_for_predecessor();
  for (std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; row < p.num_rows;
       row += static_cast<std::int64_t>(gridDim.x) * blockDim.x) {
    *p.quant.scale_at(row, 0) = 1.0f;
    if (p.zero_points != nullptr) *p.zero_point_at(row, 0) = 0;
  }
}

template <typename T, Result kResult>
void quantize_to(const QuantizeParams& p, Stream stream) {
  if (p.quant.granularity != ScaleGranularity::kTensor || !p.computes) return launch_quantize<T, kResult>(p, false, stream);
  if (launch_tensor<T, kResult>(p, stream)) return;
  launch_tensor_scale<T, kResult>(p, stream);
  QuantizeParams given = p;
  given.computes = false;
  launch_quantize<T, kResult>(given, true, stream);
}

}  // namespace
}  // namespace quant

void quantize(const QuantizeParams& p, Stream stream) {
  dispatch_float(p.dtype, "quantize", [&](auto dtype) {
    using T = Element<decltype(dtype)::value>;
    if (Explanation* const explanation = explaining()) {
      const bool reads_twice = p.computes && p.quant.granularity == ScaleGranularity::kTensor;
      if (reads_twice && quant::prevents_tensor(p) == nullptr) {
        explanation->variant = "tensor";
        explanation->reasons.emplace_back("one scale for the whole tensor is computed: CTAs keep what fits of x while all find its range");
        return;
      }
      const char* const obstacle = quant::prevents_rows<T>(p);
      explanation->variant = std::string(reads_twice ? "range+" : "") + (obstacle == nullptr ? "rows" : "groups");
      explanation->reasons.push_back(obstacle == nullptr ? "a row stays in registers between its scale and its results"
                                                         : std::string("not rows: ") + obstacle);
      if (reads_twice)
        explanation->reasons.push_back(std::string("one scale for the whole tensor is computed, and x is read twice: not tensor: ") +
                                       quant::prevents_tensor(p));
      return;
    }
    if (p.quant.dtype != DType::kInt8) return quant::quantize_to<T, quant::Result::kFloat8>(p, stream);
    if (p.zero_points == nullptr) return quant::quantize_to<T, quant::Result::kInt8>(p, stream);
    quant::quantize_to<T, quant::Result::kAsymmetricInt8>(p, stream);
  });
}

void set_default_scales(const QuantizeParams& p, Stream stream) {
  launch_waiting("default_scales_kernel", quant::default_scales_kernel, quant::num_ctas(p.num_rows, 256, 8), 256, stream, p);
}

}  // namespace quire::cuda
