// Quantizing groups of elements: those of dense tensors, where rows do not matter, and of every layout.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "cuda/quantization/quantize_rows.cuh"

namespace quire::cuda::quant {

inline constexpr int kDenseThreads = 256;

// x, its result, scales and zero points are dense, and groups end with rows: rows do not matter. Grid: CTAs share x in turns, 2 vectors to a thread, 256
// apart. Groups as quantize_rows_kernel's.
template <typename T, Scaling kScaling, Result kResult>
__global__ void __launch_bounds__(kDenseThreads, kResidentThreads / kDenseThreads)
    quantize_dense_kernel(const __grid_constant__ QuantizeParams p, const int num_vectors, const int group_shift) {
  static_assert(kScaling == Scaling::kGroup || kScaling == Scaling::kGivenGroup);
  constexpr bool kComputes = kScaling == Scaling::kGroup, kAsymmetric = kResult == Result::kAsymmetricInt8;
  constexpr bool kChecks = kComputes && kAsymmetric && sizeof(T) == 2;
  constexpr int kVectors = 2;
  const int thread = static_cast<int>(threadIdx.x), step = static_cast<int>(gridDim.x) * kVectors * kDenseThreads;
  const auto* const x = static_cast<const T*>(p.x);
  auto* const out = static_cast<std::uint8_t*>(p.out);
  float* const scales = p.quant.scales;

  struct Piece {
    Packed<T, kVec> packed[kVectors];
    ScaleAndZero given[kComputes ? 1 : kVectors];
  };
  const auto load = [&](Piece& piece, int first) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int vector = first + i * kDenseThreads;
      piece.packed[i] = {};
      if (vector < num_vectors) piece.packed[i] = load_packed<T, kVec>(x + std::int64_t{vector} * kVec);
      if constexpr (!kComputes) {
        piece.given[i] = {1.0f, 0};
        if (vector < num_vectors) {
          piece.given[i].scale = scales[vector >> group_shift];
          if constexpr (kAsymmetric) piece.given[i].zero_point = in_range(p.zero_points[vector >> group_shift]);
        }
      }
    }
  };
  const auto finish = [&](const Piece& piece, int first) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int vector = first + i * kDenseThreads;
      ScaleAndZero value = piece.given[kComputes ? 0 : i];
      bool ordinary = true;
      if constexpr (kComputes) {
        Range range;
        if constexpr (kChecks) {
          ordinary = extend_and_check<T, kVec>(range, piece.packed[i]);
        } else {
          extend<kAsymmetric, T, kVec>(range, piece.packed[i]);
        }
        if constexpr (kAsymmetric) {
          group_range<T>(range, group_shift);
        } else {
          range.above = group_max(range.above, group_shift);
        }
        value = computed<kResult>(p, range);
        if (vector < num_vectors && (vector & ((1 << group_shift) - 1)) == 0) {
          scales[vector >> group_shift] = value.scale;
          if constexpr (kAsymmetric) p.zero_points[vector >> group_shift] = value.zero_point;
        }
      }
      if (vector >= num_vectors) continue;
      const Quantizer by(value);
      auto* const to = out + std::int64_t{vector} * kVec;
      float v[kVec];
      unpack<T, kVec>(v, piece.packed[i]);
      if constexpr (kChecks) {
        by.divisor.divide_bounded(v);
        store_rounded(to, v, value.zero_point, ordinary && value.scale <= 0x1.fffffep127f);
      } else {
        store<kResult, kComputes>(p, to, v, by);
      }
    }
  };

  // All lanes of a warp go through the pieces together: they take part in the maxima.
  device::wait_for_predecessor();
  const int first_of_cta = static_cast<int>(blockIdx.x) * kVectors * kDenseThreads;
  Piece piece;
  load(piece, first_of_cta + thread);
  for (int first = first_of_cta; first < num_vectors; first += step) {
    if constexpr (kReadsAhead<T>) {
      Piece next;
      load(next, min(first + step, num_vectors) + thread);
      finish(piece, first + thread);
      piece = next;
    } else {
      finish(piece, first + thread);
      load(piece, min(first + step, num_vectors) + thread);
    }
  }
}

// Grid: a warp for each group of elements with one scale, in turns. For every layout, width and group.
template <typename T, Result kResult>
__global__ void quantize_groups_kernel(const __grid_constant__ QuantizeParams p) {
  device::wait_for_predecessor();
  constexpr bool kAsymmetric = kResult == Result::kAsymmetricInt8;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const std::int64_t warps = static_cast<std::int64_t>(gridDim.x) * (blockDim.x / kWarpSize);
  const std::int64_t groups = ceil_div(p.width, p.quant.group_size);
  for (std::int64_t item = static_cast<std::int64_t>(blockIdx.x) * (blockDim.x / kWarpSize) + threadIdx.x / kWarpSize;
       item < p.num_rows * groups; item += warps) {
    const std::int64_t row = divide(item, groups), group = item - row * groups;
    const std::int64_t begin = group * p.quant.group_size, end = min(begin + p.quant.group_size, p.width);
    const T* const x = static_cast<const T*>(p.x) + p.x_rows.offset(row);
    ScaleAndZero value;
    if (p.computes) {
      Range range;
      for (std::int64_t i = begin + lane; i < end; i += kWarpSize) {
        const float v[1] = {to_float<T>(x[i])};
        extend<kAsymmetric>(range, v);
      }
      range.above = warp_max(range.above);
      if constexpr (kAsymmetric) range.below = warp_max(range.below);
      value = computed<kResult>(p, range);
      if (lane == 0) write_scale<kResult>(p, row, group, value);
    } else {
      value = read_scale<kResult>(p, row, group);
    }
    const Quantizer by(value);
    const std::int64_t out_at = p.out_rows.offset(row);
    for (std::int64_t i = begin + lane; i < end; i += kWarpSize) {
      float v[1] = {to_float<T>(x[i])};
      store<kResult, false>(p, static_cast<std::uint8_t*>(p.out) + out_at + i, v, by);
    }
  }
}

}  // namespace quire::cuda::quant
