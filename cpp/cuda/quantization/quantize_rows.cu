// Quantizing rows, and groups of their elements, to float8 and int8.
// SPDX-License-Identifier: Apache-2.0
#include "cuda/quantization/quantize_launch_rows.cuh"

namespace quire::cuda::quant {

template void launch_quantize<float, Result::kFloat8>(const QuantizeParams&, bool, Stream);
template void launch_quantize<__half, Result::kFloat8>(const QuantizeParams&, bool, Stream);
template void launch_quantize<__nv_bfloat16, Result::kFloat8>(const QuantizeParams&, bool, Stream);
template void launch_quantize<float, Result::kInt8>(const QuantizeParams&, bool, Stream);
template void launch_quantize<__half, Result::kInt8>(const QuantizeParams&, bool, Stream);
template void launch_quantize<__nv_bfloat16, Result::kInt8>(const QuantizeParams&, bool, Stream);
template void launch_quantize<float, Result::kAsymmetricInt8>(const QuantizeParams&, bool, Stream);
template void launch_quantize<__half, Result::kAsymmetricInt8>(const QuantizeParams&, bool, Stream);
template void launch_quantize<__nv_bfloat16, Result::kAsymmetricInt8>(const QuantizeParams&, bool, Stream);

}  // namespace quire::cuda::quant
