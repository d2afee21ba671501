// The norm ops with a quantized result on CUDA.
// SPDX-License-Identifier: Apache-2.0
#include "cuda/norm/rows.cuh"

namespace quire::cuda {

using norm::launch_norm;
using norm::NormKind;

void rms_norm_quantized(const NormParams& params, Stream stream) { launch_norm<NormKind::kRms, true>(params, "rms_norm", stream); }

void fused_add_rms_norm_quantized(const NormParams& params, Stream stream) {
  launch_norm<NormKind::kAddRms, true>(params, "fused_add_rms_norm", stream);
}

void layer_norm_quantized(const NormParams& params, Stream stream) { launch_norm<NormKind::kLayer, true>(params, "layer_norm", stream); }

}  // namespace quire::cuda
