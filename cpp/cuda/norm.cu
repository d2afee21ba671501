// RMS norm, fused add + RMS norm, and layer norm on CUDA.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <bit>

#include "core/dispatch.h"
#include "cuda/device/reduce.cuh"
#include "cuda/element.h"
#include "cuda/launch.h"
#include "ops/norm.h"

namespace quire::cuda {
namespace {

enum class NormKind { kRms, kAddRms, kLayer };

constexpr int kMaxThreads = 1024;
// Threads of a CTA that holds several rows.
constexpr int kNarrowThreads = 128;
// Threads of a kernel that an SM holds at once: its registers are bounded accordingly.
constexpr int kResidentThreads = 1024;
// Vectors of a row that a thread holds when there are rows enough to fill the device: as many as the pipelined kernel has
// registers for, so that few warps meet at a barrier. With fewer rows, one.
constexpr int kVectorsManyRows = 2;
constexpr int kVectorsManyRowsAdd = 1;
// Rows per SM from which the device counts as full.
constexpr int kManyRowsPerSm = 4;

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
// threads, kVectors vectors of kVec elements each: one read, one write, and out may be x. Where registers allow it, the next row
// is on its way while one is worked on, and the parameters are read once.
// blockDim.x is a power of two up to 32, or whole warps with blockDim.y = 1.
template <NormKind kKind, typename T, int kVec, int kVectors>
__global__ void __launch_bounds__(kMaxThreads, 1) norm_kernel(const __grid_constant__ NormParams p) {
  constexpr bool kAdds = kKind == NormKind::kAddRms, kIsLayer = kKind == NormKind::kLayer;
  // What 64 registers have room for.
  constexpr int kParameterRegisters = kVec * kVectors * (kIsLayer ? 2 : 1);
  constexpr int kRowRegisters = kVectors * (kVec == 1 ? 3 : 4) * (kAdds ? 2 : 1);
  constexpr bool kHoldParameters = kParameterRegisters <= 16 && kRowRegisters <= 16;
  constexpr bool kPipelined = kRowRegisters <= 8;
  constexpr int kHeld = kHoldParameters ? kVectors : 1;
  __shared__ float scratch[2][kWarpSize];
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
  struct Row {
    Packed<T, kVec> x[kVectors], residual[kAdds ? kVectors : 1];
  };
  const auto load_row = [&](Row& loaded, std::int64_t row) {
    const T* const x = static_cast<const T*>(p.x) + p.x_rows.offset(row);
    const T* const residual = kAdds ? static_cast<const T*>(p.residual) + p.residual_rows.offset(row) : nullptr;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int vector = lane + i * width;
      loaded.x[i] = {};
      if constexpr (kAdds) loaded.residual[i] = {};
      if (vector >= num_vectors || row >= p.num_rows) continue;
      loaded.x[i] = load_packed<T, kVec>(x + vector * kVec);
      if constexpr (kAdds) loaded.residual[i] = load_packed<T, kVec>(residual + vector * kVec);
    }
  };

  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * blockDim.y;
  std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  Row current;
  load_row(current, row);
  float weight[kHeld][kVec], bias[kHeld][kVec] = {};
  if constexpr (kHoldParameters) load_parameters(weight, bias, lane);

  // The condition is on the CTA's first row: all its threads take part in the sums.
  for (; row - threadIdx.y < p.num_rows; row += step) {
    Row next;
    if constexpr (kPipelined) load_row(next, row + step);
    const int limit = row < p.num_rows ? num_vectors : 0;

    if constexpr (kAdds) {
      T* const residual = static_cast<T*>(p.residual) + p.residual_rows.offset(row);
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        const int vector = lane + i * width;
        current.x[i] = add<T, kVec>(current.x[i], current.residual[i]);
        if (vector < limit) store_raw(residual + vector * kVec, current.x[i]);
      }
    }

    // Statistics.
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      float v[kVec];
      unpack<T, kVec>(v, current.x[i]);
#pragma unroll
      for (int e = 0; e < kVec; ++e) sum = kIsLayer ? sum + v[e] : fmaf(v[e], v[e], sum);
    }
    float mean = 0.0f, variance = row_sum(sum) * inverse_hidden;
    if constexpr (kIsLayer) {
      mean = variance;
      float squares = 0.0f;
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        float v[kVec];
        unpack<T, kVec>(v, current.x[i]);
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
      unpack<T, kVec>(v, current.x[i]);
      constexpr bool kOwn = kHoldParameters;
      normalise<kKind>(v, weight[kOwn ? i : 0], bias[kOwn ? i : 0], mean, inverse, p.weight_offset);
      if (vector < limit) store_floats(out + vector * kVec, v);
    }
    if constexpr (kPipelined) {
      current = next;
    } else {
      load_row(current, row + step);
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
  constexpr int kMaxVectors = kVec > 1 ? 4 : 8;
  const std::int64_t num_vectors = p.hidden / kVec;
  const std::int64_t num_sms = current_device_properties().num_sms;
  const auto launch = [&](auto kernel, std::int64_t width, std::int64_t rows_per_cta) {
    const auto num_ctas = std::min(ceil_div(p.num_rows, rows_per_cta), num_sms * (kResidentThreads / (width * rows_per_cta)));
    const dim3 block(static_cast<unsigned>(width), static_cast<unsigned>(rows_per_cta));
    kernel<<<static_cast<unsigned>(num_ctas), block, 0, cuda_stream(stream)>>>(p);
    QUIRE_CHECK_LAUNCH(name, stream);
  };
  if (num_vectors > kMaxVectors * kMaxThreads) return launch(norm_long_row_kernel<kKind, T, kVec>, kMaxThreads, 1);

  const bool many_rows = p.num_rows >= kManyRowsPerSm * num_sms;
  std::int64_t vectors = std::max<std::int64_t>(many_rows ? (kKind == NormKind::kAddRms ? kVectorsManyRowsAdd : kVectorsManyRows) : 1, ceil_div(num_vectors, kMaxThreads));
  if (kVec == 1) vectors = vectors <= 2 ? 2 : 8;
  vectors = vectors <= 2 ? vectors : vectors <= 4 ? 4 : 8;
  const std::int64_t threads = ceil_div(num_vectors, vectors);
  const std::int64_t width = threads <= kWarpSize ? static_cast<std::int64_t>(std::bit_ceil(static_cast<unsigned>(threads)))
                                                  : ceil_div(threads, kWarpSize) * kWarpSize;
  const std::int64_t rows_per_cta = width > kWarpSize ? 1 : kNarrowThreads / width;
  if constexpr (kVec == 1) {
    if (vectors == 2) return launch(norm_kernel<kKind, T, kVec, 2>, width, rows_per_cta);
    return launch(norm_kernel<kKind, T, kVec, 8>, width, rows_per_cta);
  } else {
    if (vectors == 1) return launch(norm_kernel<kKind, T, kVec, 1>, width, rows_per_cta);
    if (vectors == 2) return launch(norm_kernel<kKind, T, kVec, 2>, width, rows_per_cta);
    return launch(norm_kernel<kKind, T, kVec, 4>, width, rows_per_cta);
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
