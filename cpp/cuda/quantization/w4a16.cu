// Packed weights on CUDA: their layout, and their product with 16-bit activations.
// SPDX-License-Identifier: Apache-2.0
#include "ops/quantization.h"
#include "quire/error.h"

namespace quire::cuda {

std::int64_t packed_weight_size(const WeightFormat&) { throw UnsupportedError("[packed_weight_size] device: expected cpu, got cuda"); }
void pack_weight(void*, const WeightFormat&, const WeightSource&, Stream) {
  throw UnsupportedError("[pack_weight] device: expected cpu, got cuda");
}
void dequantize_weight(void*, DType, std::int64_t, const PackedParams&, Stream) {
  throw UnsupportedError("[dequantize_weight] device: expected cpu, got cuda");
}
void quantized_matmul(const QuantizedMatmulParams&, Stream) { throw UnsupportedError("[quantized_matmul] device: expected cpu, got cuda"); }
std::int64_t quantized_matmul_workspace_size(std::int64_t, const WeightFormat&, bool, DType, bool) { return 0; }

}  // namespace quire::cuda
