// Norms of rows at one stride of 16-bit elements, with weights of the same type: the common case, with nothing general in the way.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <bit>
#include <cstdint>
#include <optional>
#include <type_traits>

#include "cuda/device/dependent_launch.cuh"
#include "cuda/device/quantize.cuh"
#include "cuda/device/reduce.cuh"
#include "cuda/element.h"
#include "cuda/launch.h"
#include "cuda/norm/statistics.cuh"
#include "cuda/row_stride.h"
#include "ops/norm.h"

namespace quire::cuda::norm {

// Parameters lie behind 16 bytes of the launch's own in lines of 64 bytes of the constant cache, each a miss of its own where rows are few.
// What is needed first has the rest of the first. Strides are counted in vectors of the kernel's.
struct DenseRows {
  const void* x;       // with a residual also the result, unless that is quantized
  const void* weight;  // of x's dtype
  void* residual;
  std::uint32_t x_stride, residual_stride, num_vectors, width;  // threads of a row
  float inverse_hidden, eps;
  // The second line.
  void* out;
  float* scales;
  std::uint32_t out_stride, scale_row_stride, scale_group_stride;
  std::uint32_t group_shift;  // lanes of a group are two to this
  float weight_offset;
  std::uint32_t offset_passes;  // 0 or 1: whether there is an offset
  const void* bias;             // of x's dtype, or null; layer_norm only
  std::uint32_t two_to_16;
};

// unpack(), on request with multiplications for shifts, which have another unit than masks, maxima and conversions: `two_to_16` is a number
// that the compiler does not see.
template <bool kByProducts, typename T, int kVec>
__device__ __forceinline__ void unpack_dense(float (&dst)[kVec], const Packed<T, kVec>& src, std::uint32_t two_to_16) {
  if constexpr (kByProducts && std::is_same_v<T, __nv_bfloat16>) {
#pragma unroll
    for (int i = 0; i < kVec / 2; ++i) {
      dst[2 * i] = __uint_as_float(src.words[i] * two_to_16);
      dst[2 * i + 1] = __uint_as_float(src.words[i] & 0xffff0000u);
    }
  } else {
    unpack<T, kVec>(dst, src);
  }
}

// Grid: a CTA per row; kVectors vectors of kVec elements for each thread. The sums, the order of their terms and the roundings are those of
// norm_kernel, so that results are its own. Q is the result's type; kScale counts where that is one of 8 bits. Weights are read with the row where
// rows are few, before its sum where there are registers for them, and else after it.
template <NormKind kKind, typename T, typename Q, ScaleGranularity kScale, int kVec, int kVectors, bool kManyRows, int kRegisters>
__global__ void __maxnreg__(kRegisters) dense_rows_kernel(const __grid_constant__ DenseRows p) {
  constexpr bool kAdds = kKind == NormKind::kAddRms, kIsLayer = kKind == NormKind::kLayer;
  constexpr bool kQuantizes = sizeof(Q) == 1, kComputes = kQuantizes && kScale != ScaleGranularity::kTensor;
  constexpr bool kIsInt8 = std::is_same_v<Q, std::int8_t>, kHoldsWeights = kManyRows && kQuantizes && !kIsLayer;
  constexpr bool kHasShortSum = kManyRows && kQuantizes && !kAdds;
  // What has gained from it.
  constexpr bool kByProducts = kIsLayer && kManyRows && kQuantizes;
  using Vector = Packed<T, kVec>;
  using Result = Packed<Q, kVec>;
  __shared__ __align__(16) float scratch[kWarpSize];
  __shared__ __align__(16) float2 moment_scratch[kWarpSize];
  __shared__ float max_scratch[kComputes ? kWarpSize : 1];
  const std::uint32_t thread = threadIdx.x, row = blockIdx.x, width = p.width;
  const Vector* const x = static_cast<const Vector*>(p.x) + row * p.x_stride;
  Vector* const residual = static_cast<Vector*>(p.residual) + row * p.residual_stride;
  const Vector* const weights = static_cast<const Vector*>(p.weight);
  const Vector* const biases = static_cast<const Vector*>(p.bias);
  const auto is_inside = [&](int i) { return thread + i * width < p.num_vectors; };
  // A thread past the end reads what the last one reads, and adds nothing.
  std::uint32_t at[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) at[i] = min(thread + i * width, p.num_vectors - 1);
  device::wait_for_predecessor();

  // Load.
  Vector current[kVectors], addend[kAdds ? kVectors : 1], weight_bits[kVectors], bias_bits[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    if constexpr (kAdds) {
      // What is there, others write.
      current[i] = addend[i] = {};
      if (is_inside(i)) current[i] = load_raw<sizeof(Vector)>(x + at[i]);
      if (is_inside(i)) addend[i] = load_raw<sizeof(Vector)>(residual + at[i]);
    } else {
      current[i] = load_raw<sizeof(Vector)>(x + at[i]);
    }
  }
  const auto load_weights = [&](int i) {
    weight_bits[i] = load_raw<sizeof(Vector)>(weights + at[i]);
    bias_bits[i] = {};
    if (kIsLayer && p.bias != nullptr) bias_bits[i] = load_raw<sizeof(Vector)>(biases + at[i]);
  };
  float given_scale = 1.0f;
  if constexpr (!kManyRows) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) load_weights(i);
    if constexpr (kQuantizes && !kComputes) given_scale = *p.scales;
  }
  if constexpr (kAdds) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      current[i] = add<T, kVec>(current[i], addend[i]);
      if (is_inside(i)) store_raw(residual + at[i], current[i]);
    }
  }

  // Statistics.
  const std::uint32_t num_warps = width / kWarpSize;
  const auto before_sum = [&](float sum) {
    // Nothing is changed here, but this has the weights loaded with the row: what the sum does not need, the compiler loads after it.
    if constexpr (!kManyRows) {
      const std::uint32_t nothing = p.num_vectors >> 31;
#pragma unroll
      for (int i = 0; i < kVectors; ++i)
#pragma unroll
        for (int word = 0; word < static_cast<int>(sizeof(Vector)) / 4; word += 4)
          sum = __uint_as_float(__float_as_uint(sum) ^ (weight_bits[i].words[word] & nothing));
    }
    if constexpr (kHoldsWeights) {
#pragma unroll
      for (int i = 0; i < kVectors; ++i) load_weights(i);
    }
    return sum;
  };
  Statistics statistics;
  if constexpr (kIsLayer) {
    statistics = layer_statistics_of<T, kVec, kVectors>(
        current, p.inverse_hidden, p.eps, is_inside,
        [&](Moments moments) { return cta_moments({before_sum(moments.sum), moments.squares}, moment_scratch, thread, num_warps); },
        [&](float squares) { return cta_sum<false>(squares, scratch, thread, num_warps); });
  } else {
    statistics = statistics_of<kKind, kHasShortRoot<kKind, T, kQuantizes, kManyRows>, T, kVec, kVectors>(
        current, p.inverse_hidden, p.eps, is_inside,
        [&](float sum, int) { return cta_sum<kHasShortSum>(before_sum(sum), scratch, thread, num_warps); });
  }

  const auto normalised = [&](float (&v)[kVec], int i) {
    float weight[kVec], bias[kVec];
    if constexpr (kManyRows && !kHoldsWeights) load_weights(i);
    unpack_dense<kByProducts, T, kVec>(weight, weight_bits[i], p.two_to_16);
    unpack_dense<kByProducts, T, kVec>(bias, bias_bits[i], p.two_to_16);
    if constexpr (!kIsLayer) {
      // A loop is a branch: of a condition the compiler would make predicates, and additions that do nothing.
#pragma unroll 1
      for (std::uint32_t pass = p.offset_passes; pass != 0; --pass) {
#pragma unroll
        for (int e = 0; e < kVec; ++e) weight[e] += p.weight_offset;
      }
    }
    unpack_dense<kByProducts, T, kVec>(v, current[i], p.two_to_16);
    normalise<kKind>(v, weight, bias, statistics);
  };
  Result* const out = static_cast<Result*>(p.out) + row * p.out_stride;
  if constexpr (!kQuantizes) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      float v[kVec];
      normalised(v, i);
      if (is_inside(i)) store_raw(out + at[i], pack<T, kVec>(v));
    }
  } else if constexpr (!kComputes) {
    const Divisor divisor(kManyRows ? *p.scales : given_scale);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      float v[kVec];
      normalised(v, i);
      const Result result = divisor.template divide_and_pack<Q>(v);
      if (is_inside(i)) store_raw(out + at[i], result);
    }
  } else {
    float v[kVectors][kVec];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) normalised(v[i], i);
    if constexpr (kScale == ScaleGranularity::kToken) {
      float largest = 0.0f;
#pragma unroll
      for (int i = 0; i < kVectors; ++i)
        if (is_inside(i)) largest = fmaxf(largest, largest_of(v[i]));
      const float scale = computed_scale(cta_max(largest, max_scratch), kIsInt8);
      if (thread == 0) p.scales[row * p.scale_row_stride] = scale;
      const Divisor divisor(scale);
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        const Result result = divisor.template divide_bounded_and_pack<Q>(v[i]);
        if (is_inside(i)) store_raw(out + at[i], result);
      }
    } else {
      // A group's vectors lie in neighbouring lanes, all inside or none.
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        const float scale = computed_scale(warp_max(largest_of(v[i]), 1 << p.group_shift), kIsInt8);
        const Result result = Divisor(scale).template divide_bounded_and_pack<Q>(v[i]);
        if (!is_inside(i)) continue;
        store_raw(out + at[i], result);
        if ((at[i] & ((1u << p.group_shift) - 1)) == 0)
          p.scales[std::uint64_t{row * p.scale_row_stride} + (at[i] >> p.group_shift) * p.scale_group_stride] = scale;
      }
    }
  }
}

// The parameters of a kernel with `vectors` vectors of `vec` elements for each thread, where it takes these rows.
inline std::optional<DenseRows> dense_rows(const NormParams& p, int vec, int vectors) {
  const bool computes = p.quant.scales != nullptr && p.quant.granularity != ScaleGranularity::kTensor;
  const std::int64_t num_vectors = p.hidden / vec, width = ceil_div(ceil_div(num_vectors, vectors), kWarpSize) * kWarpSize;
  const auto stride = [&](const RowLayout& rows, std::int64_t unit) { return short_row_stride(rows, p.num_rows, num_vectors, unit); };
  const auto x_stride = stride(p.x_rows, vec), out_stride = stride(p.out_rows, vec);
  const auto residual_stride = p.residual == nullptr ? 0 : stride(p.residual_rows, vec);
  const auto scale_row_stride = computes ? stride(p.quant.scale_rows, 1) : 0;
  // Narrow rows share CTAs.
  if (!x_stride || !out_stride || !residual_stride || !scale_row_stride || width <= kWarpSize || p.weight_dtype != p.dtype ||
      (p.bias != nullptr && p.bias_dtype != p.dtype) ||
      (computes && (p.quant.group_stride < 0 || p.quant.group_stride > 0xffffffff / num_vectors)))
    return std::nullopt;
  // A row whose tokens have one scale is no group, and nobody asks for its lanes.
  const std::int64_t group_lanes = computes ? p.quant.group_size / vec : 1;
  return DenseRows{.x = p.x,
                   .weight = p.weight,
                   .residual = p.residual,
                   .x_stride = *x_stride,
                   .residual_stride = *residual_stride,
                   .num_vectors = static_cast<std::uint32_t>(num_vectors),
                   .width = static_cast<std::uint32_t>(width),
                   .inverse_hidden = 1.0f / static_cast<float>(p.hidden),
                   .eps = p.eps,
                   .out = p.out,
                   .scales = p.quant.scales,
                   .out_stride = *out_stride,
                   .scale_row_stride = *scale_row_stride,
                   .scale_group_stride = static_cast<std::uint32_t>(p.quant.group_stride),
                   .group_shift = static_cast<std::uint32_t>(std::countr_zero(static_cast<std::uint64_t>(group_lanes))),
                   .weight_offset = p.weight_offset,
                   .offset_passes = p.weight_offset != 0.0f,
                   .bias = p.bias,
                   .two_to_16 = 1u << 16};
}

// Whether the kernel of these arguments took the rows.
template <NormKind kKind, bool kQuantizes, typename T, int kVec, int kVectors, bool kManyRows, int kRegisters>
bool launch_dense_rows(const NormParams& p, const char* name, Stream stream) {
  const std::optional<DenseRows> rows = dense_rows(p, kVec, kVectors);
  if (!rows) return false;
  const auto launch = [&](void (*kernel)(DenseRows)) {
    launch_waiting(name, kernel, static_cast<unsigned>(p.num_rows), rows->width, stream, *rows);
    return true;
  };
  if constexpr (!kQuantizes) {
    return launch(dense_rows_kernel<kKind, T, T, ScaleGranularity::kTensor, kVec, kVectors, kManyRows, kRegisters>);
  } else {
    const auto launch_to = [&](auto element) {
      using Q = decltype(element);
      switch (p.quant.granularity) {
        case ScaleGranularity::kTensor:
          return launch(dense_rows_kernel<kKind, T, Q, ScaleGranularity::kTensor, kVec, kVectors, kManyRows, kRegisters>);
        case ScaleGranularity::kToken:
          return launch(dense_rows_kernel<kKind, T, Q, ScaleGranularity::kToken, kVec, kVectors, kManyRows, kRegisters>);
        default: return launch(dense_rows_kernel<kKind, T, Q, ScaleGranularity::kGroup, kVec, kVectors, kManyRows, kRegisters>);
      }
    };
    return p.quant.dtype == DType::kInt8 ? launch_to(std::int8_t{}) : launch_to(__nv_fp8_e4m3{});
  }
}

}  // namespace quire::cuda::norm
