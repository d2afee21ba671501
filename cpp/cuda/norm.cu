// RMS norm, fused add + RMS norm, and layer norm on CUDA.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <bit>
#include <type_traits>

#include "core/dispatch.h"
#include "cuda/device/reduce.cuh"
#include "cuda/element.h"
#include "cuda/launch.h"
#include "ops/norm.h"

namespace quire::cuda {
namespace {

enum class NormKind { kRms, kAddRms, kLayer };

constexpr int kMaxThreads = 1024;
// Threads of a kernel that an SM holds at once: its registers are bounded accordingly.
constexpr int kResidentThreads = 1024;
// Threads of a CTA that holds several rows.
constexpr int kNarrowThreads = 128;
// Threads that share a row when rows are few: more only lengthen the barrier.
constexpr int kFewRowsThreads = 512;
// Rows of a CTA that are in flight, in shared memory: it takes two to cover the latency of device memory and the sums.
constexpr int kStages = 3;
// 16-byte vectors of a row that a thread has in flight per stage, at most: 96 KiB in all with kResidentThreads threads, which
// every GPU from compute capability 8.0 on has.
constexpr int kStageVectors = 2;
// Shared memory of two sums over a CTA.
constexpr int kScratchBytes = 2 * kWarpSize * static_cast<int>(sizeof(float));
// Rows per SM from which the device counts as full.
constexpr int kManyRowsPerSm = 4;

// Whether rows come through shared memory: whole vectors, and few enough of them.
template <NormKind kKind, int kVec, int kVectors>
__host__ __device__ constexpr bool is_staged() {
  return kVec > 1 && kVectors * (kKind == NormKind::kAddRms ? 2 : 1) <= kStageVectors;
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
__device__ __forceinline__ void normalise(float (&v)[kVec], const float (&weight)[kVec], const float (&bias)[kVec], float mean, float inverse,
                                          float weight_offset) {
#pragma unroll
  for (int e = 0; e < kVec; ++e) {
    if constexpr (kKind == NormKind::kLayer) {
      v[e] = fmaf((v[e] - mean) * inverse, weight[e], bias[e]);
    } else {
      v[e] = v[e] * inverse * (weight[e] + weight_offset);
    }
  }
}

// Grid: a CTA takes blockDim.y rows at a time, gridDim.x CTAs walk all rows. A row lies in the registers of its blockDim.x
// threads, kVectors vectors of kVec elements each: one read, one write, and out may be x. The rows to come are on their way
// through shared memory, where a thread meets only what it copied itself, so that no barrier guards it.
// blockDim.x is a power of two up to 32, or whole warps with blockDim.y = 1.
template <NormKind kKind, typename T, int kVec, int kVectors>
__global__ void __launch_bounds__(kMaxThreads, 1) norm_kernel(const __grid_constant__ NormParams p) {
  constexpr bool kAdds = kKind == NormKind::kAddRms, kIsLayer = kKind == NormKind::kLayer;
  constexpr bool kIsStaged = is_staged<kKind, kVec, kVectors>();
  // What 64 registers have room for.
  constexpr bool kHoldParameters = kVec * kVectors * (kIsLayer ? 2 : 1) <= 16 && kVec * kVectors > 1;
  constexpr int kHeld = kHoldParameters ? kVectors : 1;
  extern __shared__ uint4 shared[];
  const auto scratch = reinterpret_cast<float(*)[kWarpSize]>(shared);
  uint4* const stages = shared + kScratchBytes / 16;  // [kStages, kVectors * (kAdds ? 2 : 1), threads]
  const int num_vectors = static_cast<int>(p.hidden) / kVec;
  const int lane = static_cast<int>(threadIdx.x), width = static_cast<int>(blockDim.x);
  const float inverse_hidden = 1.0f / static_cast<float>(p.hidden);
  // Two sums in a row use different scratch memory, so that the barrier inside the second protects the first.
  int turn = 0;
  const auto row_sum = [&](float value) {
    turn ^= 1;
    return width <= kWarpSize ? warp_sum(value, width) : cta_sum(value, scratch[turn]);
  };
  const auto load_parameters = [&](auto& weight, auto& bias, int vector) {
    load_parameter(weight, p.weight, p.weight_dtype, vector * kVec, width * kVec, p.hidden);
    if (kIsLayer && p.bias != nullptr) load_parameter(bias, p.bias, p.bias_dtype, vector * kVec, width * kVec, p.hidden);
  };
  const auto stage_slot = [&](int stage, int i) {
    const unsigned num_threads = blockDim.x * blockDim.y, thread = threadIdx.y * blockDim.x + threadIdx.x;
    return &stages[(static_cast<unsigned>(stage) * (kVectors * (kAdds ? 2 : 1)) + static_cast<unsigned>(i)) * num_threads + thread];
  };
  // Every call closes one group of copies, also for a row past the end.
  const auto fetch = [&](int stage, std::int64_t row) {
    if (row < p.num_rows) {
      const T* const x = static_cast<const T*>(p.x) + p.x_rows.offset(row);
      const T* const residual = kAdds ? static_cast<const T*>(p.residual) + p.residual_rows.offset(row) : nullptr;
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        const int vector = lane + i * width;
        if (vector >= num_vectors) continue;
        copy_async(stage_slot(stage, i), x + vector * kVec);
        if constexpr (kAdds) copy_async(stage_slot(stage, kVectors + i), residual + vector * kVec);
      }
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  };
  Packed<T, kVec> current[kVectors], addend[kAdds ? kVectors : 1];
  const auto take = [&](int stage, std::int64_t row) {
    const T* const x = static_cast<const T*>(p.x) + (kIsStaged ? 0 : p.x_rows.offset(row));
    const T* const residual = static_cast<const T*>(p.residual) + (kIsStaged || !kAdds ? 0 : p.residual_rows.offset(row));
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int vector = lane + i * width;
      current[i] = {};
      if constexpr (kAdds) addend[i] = {};
      if (vector >= num_vectors || row >= p.num_rows) continue;
      if constexpr (kIsStaged) {
        current[i] = load_packed<T, kVec>(reinterpret_cast<const T*>(stage_slot(stage, i)));
        if constexpr (kAdds) addend[i] = load_packed<T, kVec>(reinterpret_cast<const T*>(stage_slot(stage, kVectors + i)));
      } else {
        current[i] = load_packed<T, kVec>(x + vector * kVec);
        if constexpr (kAdds) addend[i] = load_packed<T, kVec>(residual + vector * kVec);
      }
    }
  };

  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * blockDim.y;
  std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if constexpr (kIsStaged) {
    for (int stage = 0; stage < kStages; ++stage) fetch(stage, row + stage * step);
  }
  float weight[kHeld][kVec], bias[kHeld][kVec] = {};
  if constexpr (kHoldParameters) load_parameters(weight, bias, lane);

  // The condition is on the CTA's first row: all its threads take part in the sums.
  for (int stage = 0; row - threadIdx.y < p.num_rows; row += step, stage = stage + 1 == kStages ? 0 : stage + 1) {
    if constexpr (kIsStaged) asm volatile("cp.async.wait_group %0;" ::"n"(kStages - 1) : "memory");
    take(stage, row);
    const int limit = row < p.num_rows ? num_vectors : 0;

    if constexpr (kAdds) {
      T* const residual = static_cast<T*>(p.residual) + p.residual_rows.offset(row);
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        const int vector = lane + i * width;
        current[i] = add<T, kVec>(current[i], addend[i]);
        if (vector < limit) store_raw(residual + vector * kVec, current[i]);
      }
    }

    // Statistics.
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      float v[kVec];
      unpack<T, kVec>(v, current[i]);
#pragma unroll
      for (int e = 0; e < kVec; ++e) sum = kIsLayer ? sum + v[e] : fmaf(v[e], v[e], sum);
    }
    float mean = 0.0f, variance = row_sum(sum) * inverse_hidden;
    // The stage may be written again only now that the sum has used what was in it.
    if constexpr (kIsStaged) fetch(stage, row + kStages * step);
    if constexpr (kIsLayer) {
      mean = variance;
      float squares = 0.0f;
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        float v[kVec];
        unpack<T, kVec>(v, current[i]);
        if (lane + i * width < limit) {
#pragma unroll
          for (int e = 0; e < kVec; ++e) squares = fmaf(v[e] - mean, v[e] - mean, squares);
        }
      }
      variance = row_sum(squares) * inverse_hidden;
    }
    const float inverse = __frsqrt_rn(variance + p.eps);

    // Output.
    T* const out = static_cast<T*>(p.out) + p.out_rows.offset(row);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int vector = lane + i * width;
      if constexpr (!kHoldParameters) load_parameters(weight, bias, vector);
      float v[kVec];
      unpack<T, kVec>(v, current[i]);
      constexpr bool kOwn = kHoldParameters;
      normalise<kKind>(v, weight[kOwn ? i : 0], bias[kOwn ? i : 0], mean, inverse, p.weight_offset);
      if (vector < limit) store_floats(out + vector * kVec, v);
    }
  }
}

// Grid: one CTA per row and step, for rows that no register file holds. Each pass re-reads the row; a thread meets only its own
// elements, so out may be x and the residual is read back by the thread that wrote it.
template <NormKind kKind, typename T, int kVec>
__global__ void __launch_bounds__(kMaxThreads, 1) norm_long_row_kernel(const __grid_constant__ NormParams p) {
  __shared__ float scratch[2][kWarpSize];
  const std::int64_t lane = static_cast<std::int64_t>(threadIdx.x) * kVec, step = static_cast<std::int64_t>(blockDim.x) * kVec;
  for (std::int64_t row = blockIdx.x; row < p.num_rows; row += gridDim.x) {
    const T* x = static_cast<const T*>(p.x) + p.x_rows.offset(row);
    T* const residual = kKind == NormKind::kAddRms ? static_cast<T*>(p.residual) + p.residual_rows.offset(row) : nullptr;
    T* const out = static_cast<T*>(p.out) + p.out_rows.offset(row);

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

    // Output.
    for (std::int64_t at = lane; at < p.hidden; at += step) {
      float v[kVec], weight[1][kVec], bias[1][kVec] = {};
      load_floats(v, x + at);
      load_parameter(weight, p.weight, p.weight_dtype, at, 0, p.hidden);
      if (kKind == NormKind::kLayer && p.bias != nullptr) load_parameter(bias, p.bias, p.bias_dtype, at, 0, p.hidden);
      normalise<kKind>(v, weight[0], bias[0], mean, inverse, p.weight_offset);
      store_floats(out + at, v);
    }
    __syncthreads();
  }
}

template <NormKind kKind, typename T, int kVec>
void launch_rows(const NormParams& p, const char* name, Stream stream) {
  // Twice the registers per vector for the fused form.
  constexpr int kMaxVectors = kVec == 1 ? 8 : kKind == NormKind::kAddRms ? 2 : 4;
  const std::int64_t num_vectors = p.hidden / kVec, num_sms = current_device_properties().num_sms;
  if (num_vectors > kMaxVectors * kMaxThreads) {
    const auto num_ctas = static_cast<unsigned>(std::min<std::int64_t>(p.num_rows, 0x7fffffff));
    norm_long_row_kernel<kKind, T, kVec><<<num_ctas, kMaxThreads, 0, cuda_stream(stream)>>>(p);
    QUIRE_CHECK_LAUNCH(name, stream);
    return;
  }
  const auto launch = [&](auto vectors_constant) {
    constexpr int kVectors = decltype(vectors_constant)::value;
    const std::int64_t threads = ceil_div(num_vectors, kVectors);
    const std::int64_t width = threads <= kWarpSize ? static_cast<std::int64_t>(std::bit_ceil(static_cast<unsigned>(threads)))
                                                    : ceil_div(threads, kWarpSize) * kWarpSize;
    const std::int64_t rows_per_cta = width > kWarpSize ? 1 : kNarrowThreads / width;
    const std::int64_t num_ctas = std::min(ceil_div(p.num_rows, rows_per_cta), num_sms * (kResidentThreads / (width * rows_per_cta)));
    constexpr int kThreadBytes = is_staged<kKind, kVec, kVectors>() ? 16 * kStages * kVectors * (kKind == NormKind::kAddRms ? 2 : 1) : 0;
    const int shared_bytes = kScratchBytes + kThreadBytes * static_cast<int>(width * rows_per_cta);
    const auto kernel = norm_kernel<kKind, T, kVec, kVectors>;
    set_max_shared_bytes(reinterpret_cast<const void*>(kernel), shared_bytes);
    kernel<<<static_cast<unsigned>(num_ctas), dim3(static_cast<unsigned>(width), static_cast<unsigned>(rows_per_cta)),
             static_cast<std::size_t>(shared_bytes), cuda_stream(stream)>>>(p);
    QUIRE_CHECK_LAUNCH(name, stream);
  };
  // Many rows: as many vectors per thread as can be staged, for few warps at each barrier. Few: threads enough for one each.
  const bool many_rows = p.num_rows >= kManyRowsPerSm * num_sms;
  const std::int64_t wanted = many_rows ? (kKind == NormKind::kAddRms ? kStageVectors / 2 : kStageVectors) : ceil_div(num_vectors, kFewRowsThreads);
  const std::int64_t vectors = std::min<std::int64_t>(std::max(wanted, ceil_div(num_vectors, kMaxThreads)), kMaxVectors);
  if constexpr (kVec == 1) {
    vectors <= 2 ? launch(std::integral_constant<int, 2>{}) : launch(std::integral_constant<int, 8>{});
  } else {
    if (vectors == 1) return launch(std::integral_constant<int, 1>{});
    if (vectors == 2) return launch(std::integral_constant<int, 2>{});
    if constexpr (kMaxVectors > 2) launch(std::integral_constant<int, 4>{});
  }
}

template <NormKind kKind>
void launch_norm(const NormParams& p, const char* name, Stream stream) {
  dispatch_float(p.dtype, name, [&](auto dtype) {
    using T = Element<decltype(dtype)::value>;
    constexpr int kVec = kElementsPer16Bytes<T>;
    const bool vectors = rows_are_vectors<T>(p.x, p.x_rows, p.hidden) && rows_are_vectors<T>(p.out, p.out_rows, p.hidden) &&
                         (kKind != NormKind::kAddRms || rows_are_vectors<T>(p.residual, p.residual_rows, p.hidden)) &&
                         parameter_is_vectors(p.weight, p.weight_dtype, kVec) &&
                         (kKind != NormKind::kLayer || parameter_is_vectors(p.bias, p.bias_dtype, kVec));
    vectors ? launch_rows<kKind, T, kVec>(p, name, stream) : launch_rows<kKind, T, 1>(p, name, stream);
  });
}

}  // namespace

void rms_norm(const NormParams& params, Stream stream) { launch_norm<NormKind::kRms>(params, "rms_norm", stream); }

void fused_add_rms_norm(const NormParams& params, Stream stream) {
  launch_norm<NormKind::kAddRms>(params, "fused_add_rms_norm", stream);
}

void layer_norm(const NormParams& params, Stream stream) { launch_norm<NormKind::kLayer>(params, "layer_norm", stream); }

}  // namespace quire::cuda
