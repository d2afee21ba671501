// RMS norm, fused add + RMS norm, and layer norm on CUDA: kernels over rows, and their launchers.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <bit>
#include <type_traits>

#include "core/dispatch.h"
#include "core/explain.h"
#include "cuda/device/quantize.cuh"
#include "cuda/device/reduce.cuh"
#include "cuda/element.h"
#include "cuda/launch.h"
#include "ops/norm.h"

namespace quire::cuda {
namespace norm {

enum class NormKind { kRms, kAddRms, kLayer };

// Few threads with many registers: per row there is less to add up across warps than with many threads.
inline constexpr int kMaxThreads = 512;
// Threads of a kernel that an SM holds at once: the registers allow no more.
inline constexpr int kResidentThreads = 512;
// Threads of a CTA that holds several rows.
inline constexpr int kNarrowThreads = 128;
// Threads of a CTA whose row no registers hold.
inline constexpr int kLongRowThreads = 1024;
// Rows per SM from which the device counts as full.
inline constexpr int kManyRowsPerSm = 4;
// Shared memory that every GPU from compute capability 8.0 on has, less what the runtime keeps.
inline constexpr int kPortableSharedBytes = 98 * 1024;
// Shared memory of two sums over a CTA.
inline constexpr int kScratchBytes = 2 * kWarpSize * static_cast<int>(sizeof(float));

// Rows of a CTA that are in flight through shared memory; 0: rows are loaded as they are needed. It takes two to cover the
// latency of device memory and the sums.
template <NormKind kKind, int kVec, int kVectors>
__host__ __device__ constexpr int num_stages() {
  if (kVec == 1) return 0;
  const int vectors = kVectors * (kKind == NormKind::kAddRms ? 2 : 1);
  return vectors <= 2 ? 4 : vectors == 4 ? 3 : kKind == NormKind::kAddRms && vectors == 8 ? 2 : 0;
}

__device__ __forceinline__ void copy_async(void* shared, const void* global) {
  const auto address = static_cast<std::uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(global) : "memory");
}

// The rounded sum of the fused form.
template <typename T, int kVec>
__device__ __forceinline__ Packed<T, kVec> add(const Packed<T, kVec>& x, const Packed<T, kVec>& residual) {
  float a[kVec], b[kVec];
  unpack<T, kVec>(a, x);
  unpack<T, kVec>(b, residual);
#pragma unroll
  for (int e = 0; e < kVec; ++e) a[e] += b[e];
  return pack<T, kVec>(a);
}

template <NormKind kKind, int kVec>
__device__ __forceinline__ void normalise(float (&v)[kVec], const float (&weight)[kVec], const float (&bias)[kVec], float mean,
                                          float inverse) {
#pragma unroll
  for (int e = 0; e < kVec; ++e) {
    if constexpr (kKind == NormKind::kLayer) {
      v[e] = fmaf((v[e] - mean) * inverse, weight[e], bias[e]);
    } else {
      v[e] = v[e] * inverse * weight[e];
    }
  }
}

// Weight (its offset added) and bias of kVectors vectors, `width` vectors apart.
template <NormKind kKind, int kVectors, int kVec>
__device__ __forceinline__ void load_weights(float (&weight)[kVectors][kVec], float (&bias)[kVectors][kVec], const NormParams& p,
                                             std::int64_t first, std::int64_t stride) {
  load_parameter(weight, p.weight, p.weight_dtype, first, stride, p.hidden);
  if constexpr (kKind == NormKind::kLayer) {
    if (p.bias != nullptr) load_parameter(bias, p.bias, p.bias_dtype, first, stride, p.hidden);
  } else {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
#pragma unroll
      for (int e = 0; e < kVec; ++e) weight[i][e] += p.weight_offset;
    }
  }
}

// Grid: a CTA takes blockDim.y rows at a time, gridDim.x CTAs walk all rows. A row lies in the registers of its blockDim.x
// threads, kVectors vectors of kVec elements each: one read, one write, and out may be x. The rows to come are on their way
// through shared memory, where a thread meets only what it copied itself, so that no barrier guards it.
// blockDim.x is a power of two up to 32, or whole warps with blockDim.y = 1. Quantized with a scale per group: a group's vectors
// lie in as many neighbouring lanes, a power of two up to 32 that divides blockDim.x.
template <NormKind kKind, bool kQuantizes, typename T, int kVec, int kVectors>
__global__ void __launch_bounds__(kMaxThreads, 1) norm_kernel(const __grid_constant__ NormParams p) {
  constexpr bool kAdds = kKind == NormKind::kAddRms, kIsLayer = kKind == NormKind::kLayer;
  constexpr int kStages = num_stages<kKind, kVec, kVectors>();
  // What 128 registers have room for.
  constexpr bool kHoldWeights = kVec > 1 && kVec * kVectors * (kIsLayer ? 2 : 1) <= 32;
  constexpr int kHeld = kHoldWeights ? kVectors : 1;
  extern __shared__ uint4 shared[];
  const auto scratch = reinterpret_cast<float (*)[kWarpSize]>(shared);
  const int num_vectors = static_cast<int>(p.hidden) / kVec;
  const int lane = static_cast<int>(threadIdx.x), width = static_cast<int>(blockDim.x);
  const float inverse_hidden = 1.0f / static_cast<float>(p.hidden);
  // Two sums in a row use different scratch memory, so that the barrier inside the second protects the first.
  int turn = 0;
  const auto row_sum = [&](float value) {
    turn ^= 1;
    return width <= kWarpSize ? warp_sum(value, width) : cta_sum(value, scratch[turn]);
  };
  const bool is_int8 = p.quant.dtype == DType::kInt8;
  const float largest_stored = largest_quantized(p.quant.dtype);
  const auto row_max = [&](float value) {
    turn ^= 1;
    return width <= kWarpSize ? warp_max(value, width) : cta_max(value, scratch[turn]);
  };

  // Stages: [kStages, kVectors * (kAdds ? 2 : 1), threads], 16 bytes each.
  const unsigned vector_bytes = 16 * blockDim.x * blockDim.y;
  const unsigned stage_bytes = vector_bytes * kVectors * (kAdds ? 2 : 1);
  char* const first_slot = reinterpret_cast<char*>(shared) + kScratchBytes + 16 * (threadIdx.y * blockDim.x + threadIdx.x);
  // Every call closes one group of copies, also for a row past the end.
  const auto fetch = [&](char* slot, std::int64_t row) {
    if (row < p.num_rows) {
      const T* const x = static_cast<const T*>(p.x) + p.x_rows.offset(row) + lane * kVec;
      const T* const residual = kAdds ? static_cast<const T*>(p.residual) + p.residual_rows.offset(row) + lane * kVec : nullptr;
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        if (lane + i * width >= num_vectors) continue;
        copy_async(slot + i * vector_bytes, x + i * width * kVec);
        if constexpr (kAdds) copy_async(slot + (kVectors + i) * vector_bytes, residual + i * width * kVec);
      }
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  };
  Packed<T, kVec> current[kVectors], addend[kAdds ? kVectors : 1];
  const auto take = [&](const char* slot, std::int64_t row) {
    const T *x = nullptr, *residual = nullptr;
    if constexpr (kStages == 0) {
      x = static_cast<const T*>(p.x) + p.x_rows.offset(row) + lane * kVec;
      if constexpr (kAdds) residual = static_cast<const T*>(p.residual) + p.residual_rows.offset(row) + lane * kVec;
    }
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      current[i] = {};
      if constexpr (kAdds) addend[i] = {};
      if (lane + i * width >= num_vectors || row >= p.num_rows) continue;
      if constexpr (kStages > 0) {
        current[i] = load_packed<T, kVec>(reinterpret_cast<const T*>(slot + i * vector_bytes));
        if constexpr (kAdds) addend[i] = load_packed<T, kVec>(reinterpret_cast<const T*>(slot + (kVectors + i) * vector_bytes));
      } else {
        current[i] = load_packed<T, kVec>(x + i * width * kVec);
        if constexpr (kAdds) addend[i] = load_packed<T, kVec>(residual + i * width * kVec);
      }
    }
  };

  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * blockDim.y;
  std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
#pragma unroll
  for (int stage = 0; stage < kStages; ++stage) fetch(first_slot + stage * stage_bytes, row + stage * step);
  float weight[kHeld][kVec], bias[kHeld][kVec] = {};
  if constexpr (kHoldWeights) load_weights<kKind>(weight, bias, p, lane * kVec, width * kVec);

  // The condition is on the CTA's first row: all its threads take part in the sums.
  char* slot = first_slot;
  for (; row - threadIdx.y < p.num_rows; row += step) {
    if constexpr (kStages > 0) asm volatile("cp.async.wait_group %0;" ::"n"(kStages - 1) : "memory");
    take(slot, row);
    const int limit = row < p.num_rows ? num_vectors : 0;

    if constexpr (kAdds) {
      T* const residual = static_cast<T*>(p.residual) + p.residual_rows.offset(row) + lane * kVec;
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        current[i] = add<T, kVec>(current[i], addend[i]);
        if (lane + i * width < limit) store_raw(residual + i * width * kVec, current[i]);
      }
    }

    // Statistics. A sum of its own for each vector keeps the chains of dependent additions short.
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      float v[kVec], vector_sum = 0.0f;
      unpack<T, kVec>(v, current[i]);
#pragma unroll
      for (int e = 0; e < kVec; ++e) vector_sum = kIsLayer ? vector_sum + v[e] : fmaf(v[e], v[e], vector_sum);
      sum += vector_sum;
    }
    float mean = 0.0f, variance = row_sum(sum) * inverse_hidden;
    // The stage may be written again only now that the sum has used what was in it.
    if constexpr (kStages > 0) {
      fetch(slot, row + kStages * step);
      slot += stage_bytes;
      if (slot == first_slot + kStages * stage_bytes) slot = first_slot;
    }
    if constexpr (kIsLayer) {
      mean = variance;
      float squares = 0.0f;
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        float v[kVec], vector_sum = 0.0f;
        unpack<T, kVec>(v, current[i]);
#pragma unroll
        for (int e = 0; e < kVec; ++e) vector_sum = fmaf(v[e] - mean, v[e] - mean, vector_sum);
        if (lane + i * width < limit) squares += vector_sum;
      }
      variance = row_sum(squares) * inverse_hidden;
    }
    const float inverse = __frsqrt_rn(variance + p.eps);

    const auto normalised = [&](float (&v)[kVec], int i) {
      if constexpr (!kHoldWeights) load_weights<kKind>(weight, bias, p, (lane + i * width) * kVec, 0);
      unpack<T, kVec>(v, current[i]);
      constexpr bool kOwn = kHoldWeights;
      normalise<kKind>(v, weight[kOwn ? i : 0], bias[kOwn ? i : 0], mean, inverse);
    };
    if constexpr (!kQuantizes) {
      // Output.
      T* const out = static_cast<T*>(p.out) + p.out_rows.offset(row) + lane * kVec;
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        float v[kVec];
        normalised(v, i);
        if (lane + i * width < limit) store_floats(out + i * width * kVec, v);
      }
    } else {
      // Scale of the row. The results are computed twice: there is no room to keep them.
      float scale = 1.0f;
      if (p.quant.granularity == ScaleGranularity::kTensor) {
        scale = p.quant.scales[0];
      } else if (p.quant.granularity == ScaleGranularity::kToken) {
        float largest = 0.0f;
#pragma unroll
        for (int i = 0; i < kVectors; ++i) {
          float v[kVec];
          normalised(v, i);
          if (lane + i * width < limit) largest = fmaxf(largest, largest_of(v));
        }
        scale = computed_scale(row_max(largest), largest_stored);
        if (lane == 0 && row < p.num_rows) *p.quant.scale_at(row, 0) = scale;
      }

      // Output.
      const std::int64_t out_at = p.out_rows.offset(row) + lane * kVec;
      const bool per_group = p.quant.granularity == ScaleGranularity::kGroup;
      const int group_lanes = static_cast<int>(p.quant.group_size) / kVec;
      const Divisor row_divisor(scale);
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        float v[kVec];
        normalised(v, i);
        const bool inside = lane + i * width < limit;
        if (per_group) {
          const float group_scale = computed_scale(warp_max(inside ? largest_of(v) : 0.0f, group_lanes), largest_stored);
          if (inside && lane % group_lanes == 0) *p.quant.scale_at(row, (lane + i * width) / group_lanes) = group_scale;
          if (inside) store_quantized(p.out, out_at + i * width * kVec, is_int8, v, Divisor(group_scale));
        } else if (inside) {
          store_quantized(p.out, out_at + i * width * kVec, is_int8, v, row_divisor);
        }
      }
    }
  }
}

// Grid: one CTA per row and step, for rows that no register file holds. Each pass re-reads the row; a thread meets only its own
// elements, so out may be x and the residual is read back by the thread that wrote it. Quantized, it is also the kernel of whatever
// layout has no vectors: each warp takes whole groups, whose elements others may have written.
template <NormKind kKind, bool kQuantizes, typename T, int kVec>
__global__ void __launch_bounds__(kLongRowThreads, 1) norm_long_row_kernel(const __grid_constant__ NormParams p) {
  __shared__ float scratch[3][kWarpSize];
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
    float mean = 0.0f, variance = cta_sum((sums[0] + sums[1]) + (sums[2] + sums[3]), scratch[0]) / count;
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
      variance = cta_sum(squares, scratch[1]) / count;
    }
    const float inverse = __frsqrt_rn(variance + p.eps);

    const auto normalised = [&](float (&v)[kVec], std::int64_t at) {
      float weight[1][kVec], bias[1][kVec] = {};
      load_floats(v, x + at);
      load_weights<kKind>(weight, bias, p, at, 0);
      normalise<kKind>(v, weight[0], bias[0], mean, inverse);
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
      const float largest_stored = largest_quantized(p.quant.dtype);
      const auto quantize = [&](std::int64_t first, std::int64_t end, std::int64_t stride, float scale) {
        const Divisor divisor(scale);
        for (std::int64_t at = first; at < end; at += stride) {
          float v[kVec];
          normalised(v, at);
          store_quantized(p.out, out_at + at, is_int8, v, divisor);
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
        const float scale = computed_scale(cta_max(largest_in(lane, p.hidden, step), scratch[2]), largest_stored);
        if (threadIdx.x == 0) *p.quant.scale_at(row, 0) = scale;
        quantize(lane, p.hidden, step, scale);
      } else {
        // The residual of a group was written by other threads.
        __syncthreads();
        const std::int64_t warp = threadIdx.x / kWarpSize, num_warps = blockDim.x / kWarpSize;
        const std::int64_t warp_lane = static_cast<std::int64_t>(threadIdx.x % kWarpSize) * kVec;
        for (std::int64_t group = warp; group * p.quant.group_size < p.hidden; group += num_warps) {
          const std::int64_t first = group * p.quant.group_size + warp_lane, end = (group + 1) * p.quant.group_size;
          const float scale = computed_scale(warp_max(largest_in(first, end, kWarpSize * kVec)), largest_stored);
          if (warp_lane == 0) *p.quant.scale_at(row, group) = scale;
          quantize(first, end, kWarpSize * kVec, scale);
        }
      }
    }
    __syncthreads();
  }
}

// Lanes that hold one group's vectors, where the kernel over vectors can do that; else 0.
template <int kVec>
std::int64_t lanes_of_group(const QuantParams& p) {
  const std::int64_t lanes = p.group_size / kVec;
  return p.group_size % kVec == 0 && lanes <= kWarpSize && std::has_single_bit(static_cast<std::uint64_t>(lanes)) ? lanes : 0;
}

template <NormKind kKind, bool kQuantizes, typename T, int kVec>
void launch_long_rows(const NormParams& p, const char* name, Stream stream) {
  const auto num_ctas = static_cast<unsigned>(std::min<std::int64_t>(p.num_rows, 0x7fffffff));
  // Quantized rows of any length come here.
  const std::int64_t num_threads =
      kQuantizes ? std::min<std::int64_t>(ceil_div(p.hidden, kWarpSize) * kWarpSize, kLongRowThreads) : kLongRowThreads;
  norm_long_row_kernel<kKind, kQuantizes, T, kVec><<<num_ctas, static_cast<unsigned>(num_threads), 0, cuda_stream(stream)>>>(p);
  QUIRE_CHECK_LAUNCH(name, stream);
}

template <NormKind kKind, bool kQuantizes, typename T, int kVec>
void launch_rows(const NormParams& p, const char* name, Stream stream) {
  constexpr bool kStagesPairs = kKind == NormKind::kAddRms && kVec > 1;
  constexpr int kMaxVectors = kStagesPairs ? 4 : 8;
  const DeviceProperties& device = current_device_properties();
  const std::int64_t num_vectors = p.hidden / kVec;
  // Four vectors of two tensors take more shared memory than every GPU has.
  const bool has_large_shared = device.max_shared_bytes_per_cta >= 2 * kPortableSharedBytes;
  const bool per_group = kQuantizes && p.quant.granularity == ScaleGranularity::kGroup;
  const std::int64_t group_lanes = per_group ? lanes_of_group<kVec>(p.quant) : 1;
  if (group_lanes == 0 || num_vectors > (kStagesPairs && !has_large_shared ? 2 : kMaxVectors) * kMaxThreads) {
    launch_long_rows<kKind, kQuantizes, T, kQuantizes ? 1 : kVec>(p, name, stream);
    return;
  }
  const bool many_rows = p.num_rows >= kManyRowsPerSm * device.num_sms;
  const auto launch = [&](auto vectors_constant) {
    constexpr int kVectors = decltype(vectors_constant)::value;
    const std::int64_t threads = ceil_div(num_vectors, kVectors);
    const std::int64_t width = threads <= kWarpSize ? static_cast<std::int64_t>(std::bit_ceil(static_cast<unsigned>(threads)))
                                                    : ceil_div(threads, kWarpSize) * kWarpSize;
    const std::int64_t rows_per_cta = width > kWarpSize ? 1 : kNarrowThreads / width;
    // Many rows are walked by as many CTAs as fit the device, which keep their stages full.
    const std::int64_t limit = many_rows ? device.num_sms * (kResidentThreads / (width * rows_per_cta)) : 0x7fffffff;
    const auto num_ctas = static_cast<unsigned>(std::min(ceil_div(p.num_rows, rows_per_cta), limit));
    constexpr int kThreadBytes = 16 * num_stages<kKind, kVec, kVectors>() * kVectors * (kKind == NormKind::kAddRms ? 2 : 1);
    const int shared_bytes = kScratchBytes + kThreadBytes * static_cast<int>(width * rows_per_cta);
    const auto kernel = norm_kernel<kKind, kQuantizes, T, kVec, kVectors>;
    set_max_shared_bytes(reinterpret_cast<const void*>(kernel), shared_bytes);
    kernel<<<num_ctas, dim3(static_cast<unsigned>(width), static_cast<unsigned>(rows_per_cta)), static_cast<std::size_t>(shared_bytes),
             cuda_stream(stream)>>>(p);
    QUIRE_CHECK_LAUNCH(name, stream);
  };
  std::int64_t vectors = ceil_div(num_vectors, kMaxThreads);
  if constexpr (kVec == 1) {
    vectors <= 2 ? launch(std::integral_constant<int, 2>{}) : launch(std::integral_constant<int, 8>{});
  } else {
    // Few rows: threads enough for one vector each. Many: as many vectors per thread as can be in flight, but not fewer than
    // four threads, so that accesses stay whole sectors.
    if (many_rows) {
      const std::int64_t preferred = kKind == NormKind::kLayer || (kStagesPairs && !has_large_shared) ? 2 : 4;
      vectors = std::max(vectors, std::min(preferred, ceil_div(num_vectors, 4)));
    }
    // A group's lanes must be there.
    if (per_group) vectors = std::max(ceil_div(num_vectors, kMaxThreads), std::min(vectors, num_vectors / group_lanes));
    if (vectors == 1) return launch(std::integral_constant<int, 1>{});
    if (vectors == 2) return launch(std::integral_constant<int, 2>{});
    if (vectors <= 4) return launch(std::integral_constant<int, 4>{});
    if constexpr (kMaxVectors == 8) launch(std::integral_constant<int, 8>{});
  }
}

template <NormKind kKind, bool kQuantizes>
void launch_norm(const NormParams& p, const char* name, Stream stream) {
  dispatch_float(p.dtype, name, [&](auto dtype) {
    using T = Element<decltype(dtype)::value>;
    constexpr int kVec = kElementsPer16Bytes<T>;
    const auto outputs_are_vectors = [&] {
      if constexpr (kQuantizes) {
        // kVec bytes at a time.
        return is_aligned(p.out, kVec) && p.out_rows.strides[0] % kVec == 0 && p.out_rows.strides[1] % kVec == 0 &&
               p.out_rows.strides[2] % kVec == 0;
      } else {
        return rows_are_vectors<T>(p.out, p.out_rows, p.hidden);
      }
    };
    const char* const obstacle = !rows_are_vectors<T>(p.x, p.x_rows, p.hidden)                                               ? "x"
                                 : !outputs_are_vectors()                                                                    ? "out"
                                 : kKind == NormKind::kAddRms && !rows_are_vectors<T>(p.residual, p.residual_rows, p.hidden) ? "residual"
                                 : !parameter_is_vectors(p.weight, p.weight_dtype, kVec)                                     ? "weight"
                                 : kKind == NormKind::kLayer && !parameter_is_vectors(p.bias, p.bias_dtype, kVec)            ? "bias"
                                 : kQuantizes && p.quant.granularity == ScaleGranularity::kGroup && lanes_of_group<kVec>(p.quant) == 0
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

}  // namespace norm

/// norm_quantized.cu: the ops with a quantized result.
void rms_norm_quantized(const NormParams& params, Stream stream);
void fused_add_rms_norm_quantized(const NormParams& params, Stream stream);
void layer_norm_quantized(const NormParams& params, Stream stream);

}  // namespace quire::cuda
