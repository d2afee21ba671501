// RMS norm, fused add + RMS norm, and layer norm on CUDA: kernels over rows, and their launchers.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <bit>

#include "core/dispatch.h"
#include "core/explain_vectors.h"
#include "cuda/device/dependent_launch.cuh"
#include "cuda/device/quantize.cuh"
#include "cuda/device/reduce.cuh"
#include "cuda/element.h"
#include "cuda/launch.h"
#include "cuda/norm/dense_rows.cuh"
#include "ops/norm.h"

namespace quire::cuda {
namespace norm {

// Threads of a CTA at most.
inline constexpr int kMaxThreads = 1024;
// Threads of a CTA that holds several rows.
inline constexpr int kNarrowThreads = 256;
// Rows per SM from which the device counts as full.
inline constexpr int kManyRowsPerSm = 4;

// Weight (its offset added) and bias of one vector.
template <NormKind kKind, int kVec>
__device__ __forceinline__ void load_weights(float (&weight)[kVec], float (&bias)[kVec], const NormParams& p, std::int64_t at) {
  load_parameter(weight, p.weight, p.weight_dtype, at, p.hidden);
  if constexpr (kKind == NormKind::kLayer) {
    if (p.bias != nullptr) load_parameter(bias, p.bias, p.bias_dtype, at, p.hidden);
  } else if (p.weight_offset != 0.0f) {
#pragma unroll
    for (int e = 0; e < kVec; ++e) weight[e] += p.weight_offset;
  }
}

// The same of vectors whose bits are there.
template <NormKind kKind, int kVec>
__device__ __forceinline__ void unpack_weights(float (&weight)[kVec], float (&bias)[kVec], const NormParams& p,
                                               const ParameterBits<kVec>& weight_bits, const ParameterBits<kVec>& bias_bits) {
  weight_bits.unpack_to(weight, p.weight_dtype);
  if constexpr (kKind == NormKind::kLayer) {
    bias_bits.unpack_to(bias, p.bias_dtype);
  } else if (p.weight_offset != 0.0f) {
#pragma unroll
    for (int e = 0; e < kVec; ++e) weight[e] += p.weight_offset;
  }
}

// Where a row begins. Rows are counted in 32 bits: a 64-bit division is a call, around which registers are saved.
__device__ __forceinline__ std::int64_t row_offset(const RowLayout& rows, std::uint32_t row) {
  if (rows.inner_extents[0] == 1 && rows.inner_extents[1] == 1) return row * rows.strides[0];
  const auto middle_extent = static_cast<std::uint32_t>(rows.inner_extents[0]),
             inner_extent = static_cast<std::uint32_t>(rows.inner_extents[1]);
  const std::uint32_t outer = row / inner_extent, outermost = outer / middle_extent;
  return outermost * rows.strides[0] + (outer - outermost * middle_extent) * rows.strides[1] +
         (row - outer * inner_extent) * rows.strides[2];
}

// Grid: one CTA per blockDim.y rows, of fewer than 2^31. A row lies in the registers of its blockDim.x threads, kVectors vectors of
// kVec elements each: one read, one write, and out may be x. Every load of a row comes first. Few rows: the weights are read with
// them, which saves a latency. Many: after the sum, which saves registers, for it is the number of resident threads that covers the
// latency of memory.
// blockDim.x is a power of two up to 32, or whole warps with blockDim.y = 1. Quantized with a scale per group: a group's vectors
// lie in as many neighbouring lanes, a power of two up to 32 that divides blockDim.x.
template <NormKind kKind, bool kQuantizes, typename T, int kVec, int kVectors, bool kManyRows, int kRegisters>
__global__ void __maxnreg__(kRegisters) norm_kernel(const __grid_constant__ NormParams p, const float given_inverse) {
  device::wait_for_predecessor();
  // Few rows wait for nothing that the host has done. Many: with this division elsewhere, the compiler spills registers of quantized rows.
  const float inverse_hidden = kManyRows ? 1.0f / static_cast<float>(p.hidden) : given_inverse;
  constexpr bool kAdds = kKind == NormKind::kAddRms, kIsLayer = kKind == NormKind::kLayer;
  __shared__ __align__(16) float scratch[kIsLayer ? 2 : 1][kWarpSize];
  __shared__ __align__(16) float2 moment_scratch[kWarpSize];
  __shared__ float max_scratch[kQuantizes ? kWarpSize : 1];
  const int num_vectors = static_cast<int>(p.hidden) / kVec;
  const int lane = static_cast<int>(threadIdx.x), width = static_cast<int>(blockDim.x);
  const std::uint32_t row = blockIdx.x * blockDim.y + threadIdx.y;
  // A row past the end has no vectors, but its threads take part in the sums.
  const int limit = row < p.num_rows ? num_vectors : 0;

  // Load.
  Packed<T, kVec> current[kVectors], addend[kAdds ? kVectors : 1];
  const T* const x = static_cast<const T*>(p.x) + row_offset(p.x_rows, row) + lane * kVec;
  T* const residual = kAdds ? static_cast<T*>(p.residual) + row_offset(p.residual_rows, row) + lane * kVec : nullptr;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    current[i] = {};
    if constexpr (kAdds) addend[i] = {};
    if (lane + i * width >= limit) continue;
    current[i] = load_packed<T, kVec>(x + i * width * kVec);
    if constexpr (kAdds) addend[i] = load_packed<T, kVec>(residual + i * width * kVec);
  }
  constexpr int kHeld = kManyRows ? 1 : kVectors;
  ParameterBits<kVec> weight_bits[kHeld], bias_bits[kIsLayer ? kHeld : 1];
  float given_scale = 1.0f;
  if constexpr (!kManyRows) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      weight_bits[i].load(p.weight, p.weight_dtype, (lane + i * width) * kVec, p.hidden);
      if constexpr (kIsLayer) bias_bits[i].load(p.bias, p.bias_dtype, (lane + i * width) * kVec, p.bias == nullptr ? 0 : p.hidden);
    }
    if (kQuantizes && p.quant.granularity == ScaleGranularity::kTensor) given_scale = p.quant.scales[0];
  }

  if constexpr (kAdds) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      current[i] = add<T, kVec>(current[i], addend[i]);
      if (lane + i * width < limit) store_raw(residual + i * width * kVec, current[i]);
    }
  }

  const std::uint32_t num_warps = blockDim.x / kWarpSize;
  const auto is_inside = [&](int i) { return lane + i * width < limit; };
  const auto row_sum = [&](float value, int turn) {
    return width <= kWarpSize ? warp_sum(value, width) : cta_sum(value, scratch[turn], threadIdx.x, num_warps);
  };
  Statistics statistics;
  if (kIsLayer && sizeof(T) == 2 && width > kWarpSize) {
    statistics = layer_statistics_of<T, kVec, kVectors>(
        current, inverse_hidden, p.eps, is_inside,
        [&](Moments moments) { return cta_moments(moments, moment_scratch, threadIdx.x, num_warps); },
        [&](float squares) { return cta_sum(squares, scratch[0], threadIdx.x, num_warps); });
  } else {
    statistics = statistics_of<kKind, kHasShortRoot<kKind, T, kQuantizes, kManyRows>, T, kVec, kVectors>(current, inverse_hidden, p.eps,
                                                                                                         is_inside, row_sum);
  }

  const auto normalised = [&](float (&v)[kVec], int i) {
    float weight[kVec], bias[kVec] = {};
    if constexpr (kManyRows) {
      load_weights<kKind>(weight, bias, p, (lane + i * width) * kVec);
    } else {
      unpack_weights<kKind>(weight, bias, p, weight_bits[i], bias_bits[kIsLayer ? i : 0]);
    }
    unpack<T, kVec>(v, current[i]);
    normalise<kKind>(v, weight, bias, statistics);
  };
  if constexpr (!kQuantizes) {
    // Output.
    T* const out = static_cast<T*>(p.out) + row_offset(p.out_rows, row) + lane * kVec;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      float v[kVec];
      normalised(v, i);
      if (lane + i * width < limit) store_floats(out + i * width * kVec, v);
    }
  } else {
    // One copy of the code that reads weights and of each that stores serves all granularities: there is much of it.
    const bool is_int8 = p.quant.dtype == DType::kInt8;
    const std::int64_t out_at = row_offset(p.out_rows, row) + lane * kVec;
    float v[kVectors][kVec];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) normalised(v[i], i);
    if (p.quant.granularity == ScaleGranularity::kTensor) {
      const Divisor divisor(kManyRows ? p.quant.scales[0] : given_scale);
#pragma unroll
      for (int i = 0; i < kVectors; ++i)
        if (lane + i * width < limit) store_quantized<false>(p.out, out_at + i * width * kVec, is_int8, v[i], divisor);
      return;
    }
    const bool per_group = p.quant.granularity == ScaleGranularity::kGroup;
    float scale = 1.0f;
    if (!per_group) {
      float largest = 0.0f;
#pragma unroll
      for (int i = 0; i < kVectors; ++i)
        if (lane + i * width < limit) largest = fmaxf(largest, largest_of(v[i]));
      largest = width <= kWarpSize ? warp_max(largest, width) : cta_max(largest, max_scratch);
      scale = computed_scale(largest, is_int8);
      if (lane == 0 && row < p.num_rows) p.quant.scales[row_offset(p.quant.scale_rows, row)] = scale;
    }
    Divisor divisor(scale);
    const int group_lanes = static_cast<int>(p.quant.group_size) / kVec;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const bool inside = lane + i * width < limit;
      if (per_group) {
        scale = computed_scale(warp_max(inside ? largest_of(v[i]) : 0.0f, group_lanes), is_int8);
        if (inside && lane % group_lanes == 0)
          p.quant.scales[row_offset(p.quant.scale_rows, row) + (lane + i * width) / group_lanes * p.quant.group_stride] = scale;
        divisor = Divisor(scale);
      }
      if (inside) store_quantized<true>(p.out, out_at + i * width * kVec, is_int8, v[i], divisor);
    }
  }
}

// Grid: one CTA per row and step, for rows that no register file holds. Each pass re-reads the row; a thread meets only its own
// elements, so out may be x and the residual is read back by the thread that wrote it. Quantized, it is also the kernel of whatever
// layout has no vectors: each warp takes whole groups, whose elements others may have written.
template <NormKind kKind, bool kQuantizes, typename T, int kVec>
__global__ void __launch_bounds__(kMaxThreads, 1) norm_long_row_kernel(const __grid_constant__ NormParams p) {
  device::wait_for_predecessor();
  __shared__ __align__(16) float scratch[3][kWarpSize];
  const unsigned num_warps = blockDim.x / kWarpSize;
  const std::int64_t lane = static_cast<std::int64_t>(threadIdx.x) * kVec, step = static_cast<std::int64_t>(blockDim.x) * kVec;
  for (std::int64_t row = blockIdx.x; row < p.num_rows; row += gridDim.x) {
    const T* x = static_cast<const T*>(p.x) + p.x_rows.offset(row);
    T* const residual = kKind == NormKind::kAddRms ? static_cast<T*>(p.residual) + p.residual_rows.offset(row) : nullptr;

    // Statistics. Four partial sums per thread keep the error of a long row's sum small.
    float sums[4] = {};
    int turn = 0;
    for (std::int64_t at = lane; at < p.hidden; at += step, turn = (turn + 1) % 4) {
      float v[kVec];
      Packed<T, kVec> packed = load_packed<T, kVec>(x + at);
      if constexpr (kKind == NormKind::kAddRms) {
        packed = add<T, kVec>(packed, load_packed<T, kVec>(residual + at));
        store_raw(residual + at, packed);
      }
      unpack<T, kVec>(v, packed);
      float sum = 0.0f;
#pragma unroll
      for (int e = 0; e < kVec; ++e) sum = kKind == NormKind::kLayer ? sum + v[e] : fmaf(v[e], v[e], sum);
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[i] += i == turn ? sum : 0.0f;
    }
    const float count = static_cast<float>(p.hidden);
    float mean = 0.0f, variance = cta_sum((sums[0] + sums[1]) + (sums[2] + sums[3]), scratch[0], threadIdx.x, num_warps) / count;
    if constexpr (kKind == NormKind::kAddRms) x = residual;
    if constexpr (kKind == NormKind::kLayer) {
      mean = variance;
      float squares = 0.0f;
      for (std::int64_t at = lane; at < p.hidden; at += step) {
        float v[kVec];
        load_floats(v, x + at);
#pragma unroll
        for (int e = 0; e < kVec; ++e) squares = fmaf(v[e] - mean, v[e] - mean, squares);
      }
      variance = cta_sum(squares, scratch[1], threadIdx.x, num_warps) / count;
    }
    const Statistics statistics{mean, inverse_root<false>(variance + p.eps)};

    const auto normalised = [&](float (&v)[kVec], std::int64_t at) {
      float weight[kVec], bias[kVec] = {};
      load_floats(v, x + at);
      load_weights<kKind>(weight, bias, p, at);
      normalise<kKind>(v, weight, bias, statistics);
    };
    if constexpr (!kQuantizes) {
      // Output.
      T* const out = static_cast<T*>(p.out) + p.out_rows.offset(row);
      for (std::int64_t at = lane; at < p.hidden; at += step) {
        float v[kVec];
        normalised(v, at);
        store_floats(out + at, v);
      }
    } else {
      const std::int64_t out_at = p.out_rows.offset(row);
      const bool is_int8 = p.quant.dtype == DType::kInt8;
      const auto quantize = [&](std::int64_t first, std::int64_t end, std::int64_t stride, float scale) {
        const Divisor divisor(scale);
        for (std::int64_t at = first; at < end; at += stride) {
          float v[kVec];
          normalised(v, at);
          store_quantized<false>(p.out, out_at + at, is_int8, v, divisor);
        }
      };
      const auto largest_in = [&](std::int64_t first, std::int64_t end, std::int64_t stride) {
        float largest = 0.0f;
        for (std::int64_t at = first; at < end; at += stride) {
          float v[kVec];
          normalised(v, at);
          largest = fmaxf(largest, largest_of(v));
        }
        return largest;
      };
      if (p.quant.granularity == ScaleGranularity::kTensor) {
        quantize(lane, p.hidden, step, p.quant.scales[0]);
      } else if (p.quant.granularity == ScaleGranularity::kToken) {
        // The barrier at the row's end and the statistics' own order the uses of this scratch memory.
        const float scale = computed_scale(cta_max(largest_in(lane, p.hidden, step), scratch[2]), is_int8);
        if (threadIdx.x == 0) *p.quant.scale_at(row, 0) = scale;
        quantize(lane, p.hidden, step, scale);
      } else {
        // The residual of a group was written by other threads.
        __syncthreads();
        const std::int64_t warp = threadIdx.x / kWarpSize;
        const std::int64_t warp_lane = static_cast<std::int64_t>(threadIdx.x % kWarpSize) * kVec;
        for (std::int64_t group = warp; group * p.quant.group_size < p.hidden; group += num_warps) {
          const std::int64_t first = group * p.quant.group_size + warp_lane, end = (group + 1) * p.quant.group_size;
          const float scale = computed_scale(warp_max(largest_in(first, end, kWarpSize * kVec)), is_int8);
          if (warp_lane == 0) *p.quant.scale_at(row, group) = scale;
          quantize(first, end, kWarpSize * kVec, scale);
        }
      }
    }
    __syncthreads();
  }
}

// What launches a kernel is no template, as there are many.
using NormKernel = void (*)(NormParams);
using NormRowsKernel = void (*)(NormParams, float);

inline void launch_long_rows(NormKernel kernel, std::int64_t num_threads, const NormParams& p, const char* name, Stream stream) {
  const auto num_ctas = static_cast<unsigned>(std::min<std::int64_t>(p.num_rows, 0x7fffffff));
  launch_waiting(name, kernel, num_ctas, static_cast<unsigned>(num_threads), stream, p);
}

template <NormKind kKind, bool kQuantizes, typename T, int kVec>
void launch_long_rows(const NormParams& p, const char* name, Stream stream) {
  // Quantized rows of any length come here.
  launch_long_rows(norm_long_row_kernel<kKind, kQuantizes, T, kVec>,
                   kQuantizes ? std::min<std::int64_t>(ceil_div(p.hidden, kWarpSize) * kWarpSize, kMaxThreads) : kMaxThreads, p, name,
                   stream);
}

/// Rows in the registers of their threads: `vectors` of `vec` elements for each.
inline void launch_rows_of(NormRowsKernel kernel, int vec, int vectors, const NormParams& p, const char* name, Stream stream) {
  const std::int64_t threads = ceil_div(p.hidden / vec, vectors);
  const std::int64_t width = threads <= kWarpSize ? static_cast<std::int64_t>(std::bit_ceil(static_cast<unsigned>(threads)))
                                                  : ceil_div(threads, kWarpSize) * kWarpSize;
  const std::int64_t rows_per_cta = width > kWarpSize ? 1 : kNarrowThreads / width;
  const auto num_ctas = static_cast<unsigned>(ceil_div(p.num_rows, rows_per_cta));
  launch_waiting(name, kernel, num_ctas, dim3(static_cast<unsigned>(width), static_cast<unsigned>(rows_per_cta)), stream, p,
                 1.0f / static_cast<float>(p.hidden));
}

template <NormKind kKind, bool kQuantizes, typename T, int kVec, int kVectors, bool kManyRows, int kRegisters>
void launch_rows_of(const NormParams& p, const char* name, Stream stream) {
  launch_rows_of(norm_kernel<kKind, kQuantizes, T, kVec, kVectors, kManyRows, kRegisters>, kVec, kVectors, p, name, stream);
}

template <NormKind kKind, bool kQuantizes, typename T, int kVec>
void launch_rows(const NormParams& p, const char* name, Stream stream) {
  constexpr int kMaxVectors = kQuantizes ? 2 : 4;
  // Vectors of a row above which a thread of many rows has four: CTAs of many threads wait longer for their sums. (Chosen
  // where a layer norm had two of them; rows of 16 bits have one since, if they are centred.)
  constexpr std::int64_t kLongVectors = kKind == NormKind::kLayer ? 256 : 512;
  const std::int64_t num_vectors = p.hidden / kVec;
  const bool per_group = kQuantizes && p.quant.granularity == ScaleGranularity::kGroup;
  const std::int64_t group_lanes = per_group ? lanes_of_group(p.quant, kVec) : 1;
  if (group_lanes == 0 || num_vectors > kMaxVectors * kMaxThreads || p.num_rows > 0x7fffffff) {
    launch_long_rows<kKind, kQuantizes, T, kQuantizes ? 1 : kVec>(p, name, stream);
    return;
  }
  if constexpr (kVec == 1) {
    launch_rows_of<kKind, false, T, 1, kMaxVectors, false, 64>(p, name, stream);
  } else {
    const bool many_rows = p.num_rows >= kManyRowsPerSm * current_device_properties().num_sms;
    // Few rows: as many threads as there are. Many: two vectors in flight per thread, but not fewer than four threads, so that accesses
    // stay whole sectors; and a group's lanes must be there.
    std::int64_t vectors = ceil_div(num_vectors, kMaxThreads);
    if (many_rows) vectors = std::max(vectors, std::min({std::int64_t{2}, ceil_div(num_vectors, 4), num_vectors / group_lanes}));
    // What the kernels of dense rows do not take comes below: narrow rows, very long ones, two strides, weights of another type.
    constexpr bool kHasDense = sizeof(T) == 2;
    if constexpr (kHasDense && kQuantizes) {
      if (!many_rows && vectors == 1 && launch_dense_rows<kKind, true, T, kVec, 1, false, 64>(p, name, stream)) return;
      if (many_rows && vectors == 2 && launch_dense_rows<kKind, true, T, kVec, 2, true, 64>(p, name, stream)) return;
    } else if constexpr (kHasDense) {
      constexpr int kRegisters = kKind == NormKind::kAddRms ? 48 : 40;
      const bool is_long = num_vectors > kLongVectors;
      if (!many_rows && vectors == 1 && launch_dense_rows<kKind, false, T, kVec, 1, false, 64>(p, name, stream)) return;
      if (many_rows && is_long && launch_dense_rows<kKind, false, T, kVec, 4, true, 64>(p, name, stream)) return;
      if (many_rows && !is_long && vectors == 2 && launch_dense_rows<kKind, false, T, kVec, 2, true, kRegisters>(p, name, stream)) return;
    }
    if constexpr (kQuantizes) {
      if (!many_rows && vectors == 1) return launch_rows_of<kKind, true, T, kVec, 1, false, 64>(p, name, stream);
      if (vectors == 1) return launch_rows_of<kKind, true, T, kVec, 1, true, 48>(p, name, stream);
      launch_rows_of<kKind, true, T, kVec, 2, true, kKind == NormKind::kRms ? 56 : 64>(p, name, stream);
    } else {
      if (!many_rows && vectors == 1) return launch_rows_of<kKind, false, T, kVec, 1, false, 64>(p, name, stream);
      if (!many_rows && vectors == 2) return launch_rows_of<kKind, false, T, kVec, 2, false, 64>(p, name, stream);
      if (num_vectors > kLongVectors) return launch_rows_of<kKind, false, T, kVec, 4, true, 64>(p, name, stream);
      if (vectors == 1) return launch_rows_of<kKind, false, T, kVec, 1, true, 40>(p, name, stream);
      launch_rows_of<kKind, false, T, kVec, 2, true, kKind == NormKind::kAddRms ? 48 : 40>(p, name, stream);
    }
  }
}

template <NormKind kKind, bool kQuantizes>
void launch_norm(const NormParams& p, const char* name, Stream stream) {
  dispatch_float(p.dtype, name, [&](auto dtype) {
    using T = Element<decltype(dtype)::value>;
    // Quantized: the result is written 16 bytes at a time.
    constexpr int kVec = kQuantizes ? 16 : kElementsPer16Bytes<T>;
    using Result = std::conditional_t<kQuantizes, std::int8_t, T>;  // or as many bytes
    const char* const obstacle = !rows_are_vectors<T>(p.x, p.x_rows, p.hidden)                                               ? "x"
                                 : !rows_are_vectors<Result>(p.out, p.out_rows, p.hidden)                                    ? "out"
                                 : kKind == NormKind::kAddRms && !rows_are_vectors<T>(p.residual, p.residual_rows, p.hidden) ? "residual"
                                 : !parameter_is_vectors(p.weight, p.weight_dtype, kVec)                                     ? "weight"
                                 : kKind == NormKind::kLayer && !parameter_is_vectors(p.bias, p.bias_dtype, kVec)            ? "bias"
                                 : kQuantizes && p.quant.granularity == ScaleGranularity::kGroup && lanes_of_group(p.quant, kVec) == 0
                                     ? "group_size"
                                     : nullptr;
    if (explain_vectors(obstacle)) return;
    if (obstacle == nullptr) {
      launch_rows<kKind, kQuantizes, T, kVec>(p, name, stream);
    } else if constexpr (kQuantizes) {
      launch_long_rows<kKind, true, T, 1>(p, name, stream);
    } else {
      launch_rows<kKind, false, T, 1>(p, name, stream);
    }
  });
}

template <NormKind kKind>
void launch_norm(const NormParams& p, const char* name, Stream stream) {
  p.quant.scales != nullptr ? launch_norm<kKind, true>(p, name, stream) : launch_norm<kKind, false>(p, name, stream);
}

}  // namespace norm
}  // namespace quire::cuda
