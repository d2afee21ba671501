// Quantizing rows, symmetric.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "cuda/device/dependent_launch.cuh"
#include "cuda/device/reduce.cuh"
#include "cuda/quantization/quantize_launch.h"
#include "cuda/quantization/quantize_result.cuh"

namespace quire::cuda::quant {

enum class Scaling { kGiven, kGivenGroup, kToken, kGroup };  // given: one scale for a row at least, or groups; or computed

inline constexpr int kResidentThreads = 1024;  // of an SM, in kernels that read ahead

// Whether threads read ahead: two pieces of 16-bit elements take at most 32 registers; of float32 they would take too many.
template <typename T>
inline constexpr bool kReadsAhead = sizeof(T) == 2;

// Where rows begin that have more than one stride. A call, which keeps divisions out of the kernels' way.
inline __device__ __noinline__ std::int64_t strided_offset(const RowLayout& rows, int row) { return rows.offset(row); }
__device__ __forceinline__ std::int64_t offset_of(const RowLayout& rows, int row) {
  if (rows.inner_extents[0] == 1 && rows.inner_extents[1] == 1) return rows.strides[0] * row;
  return strided_offset(rows, row);
}

// Grid: CTAs share the rows, blockDim.y at a time, in turns. Each thread has kVectors vectors of a piece of its row, blockDim.x
// apart, and, where it reads ahead, those of the next piece are on their way while it works on them. With a scale per token a piece is a whole
// row, in the registers of its blockDim.x threads: one read, one write. blockDim.x is a power of two up to 32, or whole warps, then blockDim.y =
// 1 with a scale per token. With a scale per group, a group's vectors lie in as many neighbouring lanes, a power of two up to 32 that divides
// blockDim.x. group_shift: the logarithm of a group's vectors; -1: a row has one scale. from_end: the last rows come first.
template <typename T, int kVectors, Scaling kScaling, Result kResult>
__global__ void __launch_bounds__(kRowThreads<kVectors>, 1024 / kRowThreads<kVectors>)
    quantize_rows_kernel(const __grid_constant__ QuantizeParams p, const int group_shift, const bool from_end) {
  static_assert(kResult != Result::kAsymmetricInt8);
  constexpr bool kComputes = kScaling == Scaling::kToken || kScaling == Scaling::kGroup;
  if (!from_end) device::wait_for_predecessor();  // else later: x is older than the range that was taken from it
  __shared__ float scratch[2][kWarpSize];
  const int lane = static_cast<int>(threadIdx.x), width = static_cast<int>(blockDim.x);
  const int num_vectors = static_cast<int>(p.width) / kVec, num_rows = static_cast<int>(p.num_rows);
  const int height = static_cast<int>(blockDim.y), step = static_cast<int>(gridDim.x) * height;
  int turn = 0;
  const auto row_max = [&](float value) {
    turn ^= 1;
    return width <= kWarpSize ? warp_max(value, width) : cta_max(value, scratch[turn]);
  };

  // A piece of a row that this thread reads, then works on. Of rows past the last there is nothing.
  struct Piece {
    Packed<T, kVec> packed[kVectors];
    float given[kComputes ? 1 : kVectors];
    int first_row, first_vector;  // the CTA's
  };
  const auto row_of = [&](const Piece& piece) {
    const int row = piece.first_row + static_cast<int>(threadIdx.y);
    return from_end ? num_rows - 1 - row : row;
  };
  const auto limit_of = [&](const Piece& piece) { return piece.first_row + static_cast<int>(threadIdx.y) < num_rows ? num_vectors : 0; };
  const auto load = [&](Piece& piece) {
    const int row = row_of(piece), limit = limit_of(piece);
    const T* x = nullptr;
    if (limit > 0) x = static_cast<const T*>(p.x) + offset_of(p.x_rows, row);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int vector = piece.first_vector + lane + i * width;
      piece.packed[i] = {};
      if (vector < limit) piece.packed[i] = load_packed<T, kVec>(x + vector * kVec);
    }
  };
  const auto load_scale = [&](Piece& piece) {
    if constexpr (!kComputes) {
      const int row = row_of(piece), limit = limit_of(piece);
      const float* scales = nullptr;
      if (limit > 0) scales = p.quant.scales + offset_of(p.quant.scale_rows, row);
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        piece.given[i] = 1.0f;
        const int vector = piece.first_vector + lane + i * width, group = group_shift < 0 ? 0 : vector >> group_shift;
        if (vector < limit) piece.given[i] = scales[group * p.quant.group_stride];
      }
    }
  };
  const auto advance = [&](const Piece& piece, Piece& next) {
    next.first_row = piece.first_row;
    next.first_vector = piece.first_vector + kVectors * width;
    if (kScaling == Scaling::kToken || next.first_vector >= num_vectors) next.first_row += step, next.first_vector = 0;
    return next.first_row < num_rows;
  };
  const auto write_scale = [&](int row, int group, const ScaleAndZero& value) {
    p.quant.scales[offset_of(p.quant.scale_rows, row) + group * p.quant.group_stride] = value.scale;
  };
  const auto finish = [&](Piece& piece) {
    const int row = row_of(piece), limit = limit_of(piece);
    ScaleAndZero value{piece.given[0], 0};
    if constexpr (kScaling == Scaling::kToken) {
      Range range;
#pragma unroll
      for (int i = 0; i < kVectors; ++i) extend<false, T, kVec>(range, piece.packed[i]);
      range.above = row_max(range.above);
      value = computed<kResult>(p, range);
      if (lane == 0 && limit > 0) write_scale(row, 0, value);
    }
    auto* out = static_cast<std::uint8_t*>(p.out);
    if (limit > 0) out += offset_of(p.out_rows, row);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int vector = piece.first_vector + lane + i * width;
      if constexpr (!kComputes) value.scale = piece.given[i];
      if constexpr (kScaling == Scaling::kGroup) {
        Range range;
        extend<false, T, kVec>(range, piece.packed[i]);
        const int group_vectors = 1 << group_shift;
        range.above = group_max(range.above, group_shift);
        value = computed<kResult>(p, range);
        if (vector < limit && (lane & (group_vectors - 1)) == 0) write_scale(row, vector >> group_shift, value);
      }
      if (vector >= limit) continue;
      float v[kVec];
      unpack<T, kVec>(v, piece.packed[i]);
      store<kResult, kComputes>(p, out + vector * kVec, v, Quantizer(value));
    }
  };

  // All threads of a CTA go through its pieces together: they take part in the maxima.
  Piece piece;
  piece.first_row = static_cast<int>(blockIdx.x) * height, piece.first_vector = 0;
  bool more = piece.first_row < num_rows;
  if (more) load(piece);
  // The computed scale of a tensor.
  if constexpr (!kComputes) device::wait_for_predecessor();
  if (more) load_scale(piece);
  while (more) {
    if constexpr (kReadsAhead<T>) {
      Piece next;
      more = advance(piece, next);
      if (more) load(next), load_scale(next);
      finish(piece);
      piece = next;
    } else {
      finish(piece);
      more = advance(piece, piece);
      if (more) load(piece), load_scale(piece);
    }
  }
}

}  // namespace quire::cuda::quant
