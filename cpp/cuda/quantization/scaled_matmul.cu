// Products of float8 and int8 matrices with scales, on CUDA.
// SPDX-License-Identifier: Apache-2.0
#include "ops/quantization.h"
#include "quire/error.h"

namespace quire::cuda {

void scaled_matmul(const ScaledMatmulParams&, Stream) { throw UnsupportedError("[scaled_matmul] device: expected cpu, got cuda"); }
std::int64_t scaled_matmul_workspace_size(std::int64_t, std::int64_t, std::int64_t, DType, bool, bool) { return 0; }

}  // namespace quire::cuda
