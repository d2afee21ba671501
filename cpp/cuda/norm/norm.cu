// The norm ops on CUDA.
// SPDX-License-Identifier: Apache-2.0
#include "cuda/norm/rows.cuh"

namespace quire::cuda {

using norm::launch_norm;
using norm::NormKind;

void rms_norm(const NormParams& params, Stream stream) { launch_norm<NormKind::kRms>(params, "rms_norm", stream); }

void fused_add_rms_norm(const NormParams& params, Stream stream) { launch_norm<NormKind::kAddRms>(params, "fused_add_rms_norm", stream); }

void layer_norm(const NormParams& params, Stream stream) { launch_norm<NormKind::kLayer>(params, "layer_norm", stream); }

}  // namespace quire::cuda
