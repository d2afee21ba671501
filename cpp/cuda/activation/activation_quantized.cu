// Gated activations with a quantized result on CUDA.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <bit>
#include <optional>

#include "core/dispatch.h"
#include "core/explain_vectors.h"
#include "cuda/activation/functions.cuh"
#include "cuda/device/dependent_launch.cuh"
#include "cuda/device/quantize.cuh"
#include "cuda/device/reduce.cuh"
#include "cuda/element.h"
#include "cuda/launch.h"
#include "cuda/row_stride.h"

namespace quire::cuda {
namespace {

constexpr int kThreads = 128;
// Elements of a vector: the result is written 16 bytes at a time.
constexpr int kVec = 16;
// Vectors of a row that a thread holds.
constexpr int kVectorsPerThread = 2;
// Threads of a CTA that holds a whole row.
constexpr int kMaxRowThreads = 1024;
// Vectors of twice as many elements, which share the work per group, pay from so many of kVec for each SM on.
constexpr std::int64_t kManyVectorsPerSm = 8192;
// Vectors of kFewVec up to which there are few for each SM.
constexpr std::int64_t kFewVectorsPerSm = 1024;

// The result's vector from its gate and its up.
template <Activation kActivation, typename T, int kCount>
__device__ __forceinline__ void gated(float (&v)[kCount], const Packed<T, kCount>& gate, const Packed<T, kCount>& up) {
  float factor[kCount];
  unpack<T, kCount>(v, gate);
  unpack<T, kCount>(factor, up);
#pragma unroll
  for (int e = 0; e < kCount; ++e) v[e] = activate<kActivation, sizeof(T) == 4>(v[e]) * factor[e];
}

// One scale, or one per group. Grid: a CTA has blockDim.y rows x one chunk of blockDim.x vectors. A group's vectors lie in `group_lanes`
// neighbouring lanes, a power of two up to 32 that divides blockDim.x.
template <Activation kActivation, typename T, int kCount>
__global__ void __launch_bounds__(kThreads) activation_group_kernel(const __grid_constant__ ActivationParams p, const int group_lanes,
                                                                    const std::int64_t num_chunks, const std::int64_t first_item) {
  device::wait_for_predecessor();
  const bool per_group = p.quant.granularity == ScaleGranularity::kGroup, is_int8 = p.quant.dtype == DType::kInt8;
  const std::int64_t item = first_item + blockIdx.x;
  const std::int64_t row_group = num_chunks == 1 ? item : divide(item, num_chunks);
  const std::int64_t chunk = item - row_group * num_chunks;
  const std::int64_t row = row_group * blockDim.y + threadIdx.y;
  const std::int64_t at = (chunk * blockDim.x + threadIdx.x) * kCount;
  // Every lane takes part in the maxima, also one with nothing to do.
  const bool inside = row < p.num_rows && at < p.width;

  // Load. A given scale is not looked at before the rest is on its way.
  const float given_scale = per_group ? 1.0f : p.quant.scales[0];
  Packed<T, kCount> gate{}, up{};
  if (inside) {
    const T* const x = static_cast<const T*>(p.x) + p.x_rows.offset(row) + at;
    gate = load_packed<T, kCount>(x);
    up = load_packed<T, kCount>(x + p.width);
  }
  float v[kCount];
  gated<kActivation, T, kCount>(v, gate, up);
  if (per_group) {
    const float scale = computed_scale(warp_max(largest_of(v), group_lanes), is_int8);
    if (!inside) return;
    if (static_cast<int>(threadIdx.x) % group_lanes == 0) *p.quant.scale_at(row, divide(at, p.quant.group_size)) = scale;
    store_quantized<true>(p.out, p.out_rows.offset(row) + at, is_int8, v, Divisor(scale));
  } else if (inside) {
    store_quantized<false>(p.out, p.out_rows.offset(row) + at, is_int8, v, Divisor(given_scale));
  }
}

// Few rows at one stride, one scale or one per group. Parameters in the order of their use, in the lines of the constant cache
// (cuda/norm/dense_rows.cuh); strides of x and of the result in vectors.
struct FewRows {
  const void* x;
  const float* given_scale;  // null: one per group
  std::uint32_t x_stride, num_vectors;  // vectors of a row of the result
  void* out;
  float* scales;
  std::uint32_t out_stride, scale_row_stride;
  // Here ends a line.
  std::uint32_t scale_group_stride, group_shift;  // lanes of a group are two to this
  bool is_int8;
};

// Elements of a thread: few rows gain from threads.
constexpr int kFewVec = 8;

// Grid: (chunks of a row's vectors, rows). A group's vectors lie in neighbouring lanes, all inside or none.
template <Activation kActivation, typename T>
__global__ void __launch_bounds__(kThreads) activation_few_kernel(const __grid_constant__ FewRows p) {
  using Vector = Packed<T, kFewVec>;
  const std::uint32_t vector = blockIdx.x * kThreads + threadIdx.x, at = min(vector, p.num_vectors - 1);
  const Vector* const gates = static_cast<const Vector*>(p.x) + (blockIdx.y * p.x_stride + at);
  device::wait_for_predecessor();

  // Load. A thread past the end reads what the last one reads.
  const Vector gate = load_raw<sizeof(Vector)>(gates), up = load_raw<sizeof(Vector)>(gates + p.num_vectors);
  float scale = 1.0f;
  if (p.given_scale != nullptr) scale = *p.given_scale;
  float v[kFewVec];
  gated<kActivation, T, kFewVec>(v, gate, up);
  const auto out_at = static_cast<std::int64_t>(blockIdx.y * p.out_stride + at) * kFewVec;
  if (p.given_scale == nullptr) {
    scale = computed_scale(warp_max(largest_of(v), 1 << p.group_shift), p.is_int8);
    if (vector >= p.num_vectors) return;
    if ((at & ((1u << p.group_shift) - 1)) == 0)
      p.scales[std::uint64_t{blockIdx.y * p.scale_row_stride} + (at >> p.group_shift) * p.scale_group_stride] = scale;
    store_quantized<true>(p.out, out_at, p.is_int8, v, Divisor(scale));
  } else if (vector < p.num_vectors) {
    store_quantized<false>(p.out, out_at, p.is_int8, v, Divisor(scale));
  }
}

// One scale per row. Grid: one CTA per row and step; a thread keeps up to kVectorsPerThread vectors of results.
template <Activation kActivation, typename T>
__global__ void __launch_bounds__(kMaxRowThreads) activation_token_kernel(const __grid_constant__ ActivationParams p) {
  device::wait_for_predecessor();
  __shared__ float scratch[2][kWarpSize];
  const bool is_int8 = p.quant.dtype == DType::kInt8;
  const std::int64_t first = static_cast<std::int64_t>(threadIdx.x) * kVec, step = static_cast<std::int64_t>(blockDim.x) * kVec;
  int turn = 0;
  for (std::int64_t row = blockIdx.x; row < p.num_rows; row += gridDim.x, turn ^= 1) {
    const T* const x = static_cast<const T*>(p.x) + p.x_rows.offset(row);
    Packed<T, kVec> gates[kVectorsPerThread], ups[kVectorsPerThread];
#pragma unroll
    for (int u = 0; u < kVectorsPerThread; ++u) {
      gates[u] = ups[u] = {};
      if (first + u * step >= p.width) continue;
      gates[u] = load_packed<T, kVec>(x + first + u * step);
      ups[u] = load_packed<T, kVec>(x + p.width + first + u * step);
    }

    // Compute.
    float v[kVectorsPerThread][kVec], largest = 0.0f;
#pragma unroll
    for (int u = 0; u < kVectorsPerThread; ++u) {
      gated<kActivation, T, kVec>(v[u], gates[u], ups[u]);
      if (first + u * step < p.width) largest = fmaxf(largest, largest_of(v[u]));
    }

    // Scale and store. The scratch memory alternates, so that the barrier of the next row's maximum guards this one's.
    const float scale = computed_scale(cta_max(largest, scratch[turn]), is_int8);
    if (threadIdx.x == 0) *p.quant.scale_at(row, 0) = scale;
    const Divisor divisor(scale);
#pragma unroll
    for (int u = 0; u < kVectorsPerThread; ++u)
      if (first + u * step < p.width) store_quantized<true>(p.out, p.out_rows.offset(row) + first + u * step, is_int8, v[u], divisor);
  }
}

// Any layout, width and group. Grid: one CTA per row and step. A group, or the row, is read twice: for its maximum and for its result.
template <Activation kActivation, typename T>
__global__ void __launch_bounds__(kMaxRowThreads) activation_element_kernel(const __grid_constant__ ActivationParams p) {
  device::wait_for_predecessor();
  __shared__ float scratch[kWarpSize];
  const bool is_int8 = p.quant.dtype == DType::kInt8;
  for (std::int64_t row = blockIdx.x; row < p.num_rows; row += gridDim.x) {
    const T* const x = static_cast<const T*>(p.x) + p.x_rows.offset(row);
    const auto result = [&](float (&v)[1], std::int64_t at) {
      gated<kActivation, T, 1>(v, load_packed<T, 1>(x + at), load_packed<T, 1>(x + p.width + at));
    };
    const auto largest_in = [&](std::int64_t first, std::int64_t end, std::int64_t step) {
      float largest = 0.0f;
      for (std::int64_t at = first; at < end; at += step) {
        float v[1];
        result(v, at);
        largest = fmaxf(largest, largest_of(v));
      }
      return largest;
    };
    const auto store = [&](std::int64_t first, std::int64_t end, std::int64_t step, float scale) {
      const Divisor divisor(scale);
      for (std::int64_t at = first; at < end; at += step) {
        float v[1];
        result(v, at);
        store_quantized<false>(p.out, p.out_rows.offset(row) + at, is_int8, v, divisor);
      }
    };
    if (p.quant.granularity == ScaleGranularity::kTensor) {
      store(threadIdx.x, p.width, blockDim.x, p.quant.scales[0]);
    } else if (p.quant.granularity == ScaleGranularity::kToken) {
      const float scale = computed_scale(cta_max(largest_in(threadIdx.x, p.width, blockDim.x), scratch), is_int8);
      if (threadIdx.x == 0) *p.quant.scale_at(row, 0) = scale;
      store(threadIdx.x, p.width, blockDim.x, scale);
      // The next row's maximum uses the same scratch memory.
      __syncthreads();
    } else {
      const std::int64_t lane = threadIdx.x % kWarpSize, num_warps = blockDim.x / kWarpSize;
      for (std::int64_t group = threadIdx.x / kWarpSize; group * p.quant.group_size < p.width; group += num_warps) {
        const std::int64_t first = group * p.quant.group_size + lane, end = (group + 1) * p.quant.group_size;
        const float scale = computed_scale(warp_max(largest_in(first, end, kWarpSize)), is_int8);
        if (lane == 0) *p.quant.scale_at(row, group) = scale;
        store(first, end, kWarpSize, scale);
      }
    }
  }
}

std::int64_t whole_warps(std::int64_t num_threads) {
  return std::min<std::int64_t>(ceil_div(num_threads, kWarpSize) * kWarpSize, kMaxRowThreads);
}

// The parameters of activation_few_kernel, where it takes these rows, whose layouts have vectors.
std::optional<FewRows> few_rows(const ActivationParams& p) {
  const bool per_group = p.quant.granularity == ScaleGranularity::kGroup;
  const std::int64_t num_vectors = p.width / kFewVec, group_lanes = per_group ? p.quant.group_size / kFewVec : 1;
  const auto stride = [&](const RowLayout& rows, std::int64_t unit) { return short_row_stride(rows, p.num_rows, num_vectors, unit); };
  const auto x_stride = stride(p.x_rows, kFewVec), out_stride = stride(p.out_rows, kFewVec);
  const auto scale_row_stride = per_group ? stride(p.quant.scale_rows, 1) : 0;
  const bool are_few =
      p.num_rows <= 0xffff && num_vectors <= 0xffffff && p.num_rows * num_vectors <= kFewVectorsPerSm * current_device_properties().num_sms;
  if (p.quant.granularity == ScaleGranularity::kToken || !are_few || !x_stride || !out_stride || !scale_row_stride ||
      group_lanes > kWarpSize || p.quant.group_stride < 0 || p.quant.group_stride > 0xffffffff / num_vectors)
    return std::nullopt;
  return FewRows{.x = p.x,
                 .given_scale = per_group ? nullptr : p.quant.scales,
                 .x_stride = *x_stride,
                 .num_vectors = static_cast<std::uint32_t>(num_vectors),
                 .out = p.out,
                 .scales = p.quant.scales,
                 .out_stride = *out_stride,
                 .scale_row_stride = *scale_row_stride,
                 .scale_group_stride = static_cast<std::uint32_t>(p.quant.group_stride),
                 .group_shift = static_cast<std::uint32_t>(std::countr_zero(static_cast<std::uint64_t>(group_lanes))),
                 .is_int8 = p.quant.dtype == DType::kInt8};
}

template <Activation kActivation, typename T>
void launch_quantized(const ActivationParams& p, Stream stream) {
  const auto num_row_ctas = static_cast<unsigned>(std::min<std::int64_t>(p.num_rows, 0x7fffffff));
  const std::int64_t num_vectors = p.width / kVec;
  const bool per_token = p.quant.granularity == ScaleGranularity::kToken;
  const std::int64_t group_lanes = p.quant.granularity == ScaleGranularity::kGroup ? lanes_of_group(p.quant, kVec) : 1;
  const char* const obstacle = !rows_are_vectors<T>(p.x, p.x_rows, p.width)                    ? "x"
                               : !rows_are_vectors<std::int8_t>(p.out, p.out_rows, p.width)    ? "out"
                               : per_token && num_vectors > kMaxRowThreads * kVectorsPerThread ? "a row of this length"
                               : group_lanes == 0                                              ? "group_size"
                                                                                               : nullptr;
  if (explain_vectors(obstacle)) return;
  if constexpr (sizeof(T) == 2) {
    if (const std::optional<FewRows> rows = obstacle == nullptr ? few_rows(p) : std::nullopt) {
      const dim3 grid(static_cast<unsigned>(ceil_div(rows->num_vectors, kThreads)), static_cast<unsigned>(p.num_rows));
      return launch_waiting("activation", activation_few_kernel<kActivation, T>, grid, kThreads, stream, *rows);
    }
  }
  if (obstacle == nullptr && per_token) {
    const std::int64_t num_threads = whole_warps(ceil_div(num_vectors, kVectorsPerThread));
    launch_waiting("activation", activation_token_kernel<kActivation, T>, num_row_ctas, static_cast<unsigned>(num_threads), stream, p);
  } else if (obstacle == nullptr) {
    const auto launch = [&](auto* kernel, std::int64_t vectors, std::int64_t lanes) {
      const std::int64_t wanted = std::clamp<std::int64_t>(vectors, lanes, kThreads);
      const dim3 block(std::bit_ceil(static_cast<unsigned>(wanted)), kThreads / std::bit_ceil(static_cast<unsigned>(wanted)));
      const std::int64_t num_chunks = ceil_div(vectors, block.x);
      const std::int64_t num_items = ceil_div(p.num_rows, block.y) * num_chunks;
      for (std::int64_t first_item = 0; first_item < num_items; first_item += 0x7fffffff) {
        const auto num_ctas = static_cast<unsigned>(std::min<std::int64_t>(num_items - first_item, 0x7fffffff));
        launch_waiting("activation", kernel, num_ctas, block, stream, p, static_cast<int>(lanes), num_chunks, first_item);
      }
    };
    const bool pairs_up = p.width % (2 * kVec) == 0 && (group_lanes % 2 == 0 || p.quant.granularity == ScaleGranularity::kTensor);
    const bool are_many = p.num_rows >= ceil_div(kManyVectorsPerSm * current_device_properties().num_sms, num_vectors);
    const bool in_pairs = sizeof(T) == 2 && pairs_up && are_many;
    if constexpr (sizeof(T) == 2) {
      if (in_pairs) launch(activation_group_kernel<kActivation, T, 2 * kVec>, num_vectors / 2, std::max<std::int64_t>(group_lanes / 2, 1));
    }
    if (!in_pairs) launch(activation_group_kernel<kActivation, T, kVec>, num_vectors, group_lanes);
  } else {
    launch_waiting("activation", activation_element_kernel<kActivation, T>, num_row_ctas, static_cast<unsigned>(whole_warps(p.width)),
                   stream, p);
  }
}

}  // namespace

void activation_quantized(const ActivationParams& params, Stream stream) {
  dispatch_float(params.dtype, "activation", [&](auto dtype) {
    using T = Element<decltype(dtype)::value>;
    switch (params.activation) {
      case Activation::kSilu: return launch_quantized<Activation::kSilu, T>(params, stream);
      case Activation::kGelu: return launch_quantized<Activation::kGelu, T>(params, stream);
      default: return launch_quantized<Activation::kGeluTanh, T>(params, stream);
    }
  });
}

}  // namespace quire::cuda
