// Gated and plain activations on CUDA.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <bit>

#include "core/dispatch.h"
#include "core/explain_vectors.h"
#include "cuda/activation/functions.cuh"
#include "cuda/device/dependent_launch.cuh"
#include "cuda/element.h"
#include "cuda/launch.h"

namespace quire::cuda {
namespace {

constexpr int kThreads = 128;
// Vectors (gated: pairs of vectors) that a thread has in flight.
constexpr int kUnroll = 4;

// Grid: work item = blockDim.y rows x one chunk of blockDim.x * kUnroll vectors; gridDim.x CTAs walk all items.
template <Activation kActivation, typename T, int kVec>
__global__ void __launch_bounds__(kThreads)
    activation_kernel(const __grid_constant__ ActivationParams p, const std::int64_t num_chunks, const std::int64_t num_items) {
  device::wait_for_predecessor();
  constexpr bool kGated = kIsGated<kActivation>;
  constexpr bool kPrecise = sizeof(T) == 4;
  for (std::int64_t item = blockIdx.x; item < num_items; item += gridDim.x) {
    const std::int64_t row_group = num_chunks == 1 ? item : divide(item, num_chunks);
    const std::int64_t chunk = item - row_group * num_chunks;
    const std::int64_t row = row_group * blockDim.y + threadIdx.y;
    if (row >= p.num_rows) continue;
    const T* const x = static_cast<const T*>(p.x) + p.x_rows.offset(row);
    T* const out = static_cast<T*>(p.out) + p.out_rows.offset(row);
    const std::int64_t first = (chunk * blockDim.x * kUnroll + threadIdx.x) * kVec;
    const std::int64_t step = static_cast<std::int64_t>(blockDim.x) * kVec;

    // Load.
    Packed<T, kVec> gates[kUnroll], ups[kGated ? kUnroll : 1];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const std::int64_t at = first + u * step;
      if (at >= p.width) continue;
      gates[u] = load_packed<T, kVec>(x + at);
      if constexpr (kGated) ups[u] = load_packed<T, kVec>(x + p.width + at);
    }

    // Compute and store.
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const std::int64_t at = first + u * step;
      if (at >= p.width) continue;
      float v[kVec];
      unpack<T, kVec>(v, gates[u]);
#pragma unroll
      for (int e = 0; e < kVec; ++e) v[e] = activate<kActivation, kPrecise>(v[e]);
      if constexpr (kGated) {
        float up[kVec];
        unpack<T, kVec>(up, ups[u]);
#pragma unroll
        for (int e = 0; e < kVec; ++e) v[e] *= up[e];
      }
      store_floats(out + at, v);
    }
  }
}

// No template, as there are many kernels.
void launch_activation(void (*kernel)(ActivationParams, std::int64_t, std::int64_t), int vec, const ActivationParams& p, Stream stream) {
  const std::int64_t num_vectors = p.width / vec;
  const std::int64_t wanted = std::min<std::int64_t>(ceil_div(num_vectors, kUnroll), kThreads);
  const dim3 block(std::bit_ceil(static_cast<unsigned>(wanted)), kThreads / std::bit_ceil(static_cast<unsigned>(wanted)));
  const std::int64_t num_chunks = ceil_div(num_vectors, std::int64_t{block.x} * kUnroll);
  const std::int64_t num_items = ceil_div(p.num_rows, block.y) * num_chunks;
  const auto num_ctas = static_cast<unsigned>(std::min<std::int64_t>(num_items, 0x7fffffff));
  launch_waiting("activation", kernel, num_ctas, block, stream, p, num_chunks, num_items);
}

template <Activation kActivation>
void launch_dtype(const ActivationParams& p, Stream stream) {
  dispatch_float(p.dtype, "activation", [&](auto dtype) {
    using T = Element<decltype(dtype)::value>;
    // For a gated x this also puts the second half on a vector boundary.
    const char* const obstacle = !rows_are_vectors<T>(p.x, p.x_rows, p.width)       ? "x"
                                 : !rows_are_vectors<T>(p.out, p.out_rows, p.width) ? "out"
                                                                                    : nullptr;
    if (explain_vectors(obstacle)) return;
    if (obstacle == nullptr) {
      launch_activation(activation_kernel<kActivation, T, kElementsPer16Bytes<T>>, kElementsPer16Bytes<T>, p, stream);
    } else {
      launch_activation(activation_kernel<kActivation, T, 1>, 1, p, stream);
    }
  });
}

}  // namespace

void activation(const ActivationParams& params, Stream stream) {
  if (params.quant.scales != nullptr) return activation_quantized(params, stream);
  switch (params.activation) {
    case Activation::kSilu: return launch_dtype<Activation::kSilu>(params, stream);
    case Activation::kGelu: return launch_dtype<Activation::kGelu>(params, stream);
    case Activation::kGeluTanh: return launch_dtype<Activation::kGeluTanh>(params, stream);
    case Activation::kGeluNew: return launch_dtype<Activation::kGeluNew>(params, stream);
    case Activation::kGeluFast: return launch_dtype<Activation::kGeluFast>(params, stream);
    case Activation::kGeluQuick: return launch_dtype<Activation::kGeluQuick>(params, stream);
    case Activation::kReluSquared: return launch_dtype<Activation::kReluSquared>(params, stream);
  }
}

}  // namespace quire::cuda
