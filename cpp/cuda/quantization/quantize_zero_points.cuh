// Quantizing rows with zero points.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "cuda/device/async_copy.cuh"
#include "cuda/quantization/quantize_rows.cuh"

namespace quire::cuda::quant {

// What a piece of a row takes of shared memory: its elements, and its scales and zero points where they are given.
template <int kVectors, Scaling kScaling>
inline constexpr int kGivenScales = kScaling == Scaling::kGiven        ? 1
                                    : kScaling == Scaling::kGivenGroup ? kVectors
                                                                       : 0;
template <typename T, int kVectors, Scaling kScaling>
constexpr int piece_bytes(int threads) {
  return threads *
         (kVectors * kVec * static_cast<int>(sizeof(T)) + kGivenScales<kVectors, kScaling> * static_cast<int>(sizeof(ScaleAndZero)));
}

// Grid and group_shift, which is not negative, as quantize_rows_kernel's. Where a thread reads ahead, the next pieces are on their way to
// its own part of shared memory while it works on one: num_ahead, 1 or 2.
template <typename T, int kVectors, Scaling kScaling>
__global__ void __launch_bounds__(kRowThreads<kVectors>, 1024 / kRowThreads<kVectors>)
    zero_point_quantize_rows_kernel(const __grid_constant__ QuantizeParams p, const int group_shift, const int num_ahead,
                                    const bool from_end) {
  constexpr Result kResult = Result::kAsymmetricInt8;
  constexpr bool kComputes = kScaling == Scaling::kToken || kScaling == Scaling::kGroup;
  if (!from_end) device::wait_for_predecessor();  // else later: x is older than the range that was taken from it
  constexpr int kScales = kGivenScales<kVectors, kScaling>;
  constexpr int kWords = kVec * static_cast<int>(sizeof(T)) / 16;
  extern __shared__ __align__(16) uint4 ring[];
  __shared__ float2 scratch[2][kWarpSize];
  const int lane = static_cast<int>(threadIdx.x), width = static_cast<int>(blockDim.x), threads = width * static_cast<int>(blockDim.y);
  const int thread = static_cast<int>(threadIdx.y) * width + lane;
  const int num_vectors = static_cast<int>(p.width) / kVec, num_rows = static_cast<int>(p.num_rows);
  const int height = static_cast<int>(blockDim.y), step = static_cast<int>(gridDim.x) * height;
  int turn = 0;
  const auto row_range = [&](Range& range) {
    if (width <= kWarpSize) {
      range.above = warp_max(range.above, width);
      range.below = warp_max(range.below, width);
      return;
    }
    const int in_warp = lane % kWarpSize;
    float2 both = make_float2(warp_max_of_bits(range.above), warp_max_of_bits(range.below));
    turn ^= 1;
    if (in_warp == 0) scratch[turn][lane / kWarpSize] = both;
    __syncthreads();
    both = in_warp < width / kWarpSize ? scratch[turn][in_warp] : float2{0.0f, 0.0f};
    range.above = warp_max_of_bits(both.x);
    range.below = warp_max_of_bits(both.y);
  };

  // Where the CTA is. Of rows past the last there is nothing.
  struct Place {
    int first_row, first_vector;
  };
  const auto row_at = [&](const Place& at) {
    const int row = at.first_row + static_cast<int>(threadIdx.y);
    return from_end ? num_rows - 1 - row : row;
  };
  const auto limit_at = [&](const Place& at) { return at.first_row + static_cast<int>(threadIdx.y) < num_rows ? num_vectors : 0; };
  const auto advance = [&](Place& at) {
    at.first_vector += kVectors * width;
    if (kScaling == Scaling::kToken || at.first_vector >= num_vectors) at.first_row += step, at.first_vector = 0;
  };
  // Calls f(i, vector) for the thread's vectors there.
  const auto each_vector = [&](const Place& at, int limit, auto&& f) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int vector = at.first_vector + lane + i * width;
      if (vector < limit) f(i, vector);
    }
  };

  struct Piece {
    Packed<T, kVec> packed[kVectors];
    ScaleAndZero given[kScales == 0 ? 1 : kScales];
  };
  const auto read = [&](const Place& at, Piece& piece) {
#pragma unroll
    for (auto& packed : piece.packed) packed = {};
    const int limit = limit_at(at);
    if (limit == 0) return;
    const T* const x = static_cast<const T*>(p.x) + offset_of(p.x_rows, row_at(at));
    each_vector(at, limit, [&](int i, int vector) { piece.packed[i] = load_packed<T, kVec>(x + vector * kVec); });
  };
  // f(i, scale, zero point) for the given scales there.
  const auto each_given = [&](const Place& at, auto&& f) {
    const int limit = limit_at(at), row = row_at(at);
    if (kScales == 0 || limit == 0) return;
    const float* const scales = p.quant.scales + offset_of(p.quant.scale_rows, row);
    const std::int32_t* const zero_points = p.zero_points + offset_of(p.zero_point_rows, row);
    each_vector(at, limit, [&](int i, int vector) {
      if (i >= kScales) return;
      const int group = kScaling == Scaling::kGivenGroup ? vector >> group_shift : 0;
      f(i, scales + group * p.quant.group_stride, zero_points + group * p.zero_point_group_stride);
    });
  };
  const auto read_given = [&](const Place& at, Piece& piece) {
    each_given(at, [&](int i, const float* scale, const std::int32_t* zero_point) { piece.given[i] = {*scale, in_range(*zero_point)}; });
  };

  // This thread's part of shared memory: words of the elements, and scales with zero points.
  const auto word_bytes = static_cast<std::uint32_t>(threads) * 16, given_bytes = static_cast<std::uint32_t>(threads) * 8;
  const std::uint32_t own_words = device::shared_address(ring + thread);
  const std::uint32_t own_given =
      device::shared_address(ring + num_ahead * kVectors * kWords * threads) + static_cast<std::uint32_t>(thread) * 8;
  const auto words_at = [&](int stage) { return own_words + static_cast<std::uint32_t>(stage * kVectors * kWords) * word_bytes; };
  const auto given_at = [&](int stage, int i) { return own_given + static_cast<std::uint32_t>(stage * kScales + i) * given_bytes; };
  const auto copy = [&](const Place& at, int stage) {
    const int limit = limit_at(at);
    if (limit == 0) return;
    const T* const x = static_cast<const T*>(p.x) + offset_of(p.x_rows, row_at(at));
    const std::uint32_t to = words_at(stage);
    each_vector(at, limit, [&](int i, int vector) {
#pragma unroll
      for (int word = 0; word < kWords; ++word)
        device::copy_async_cached_16(to + static_cast<std::uint32_t>(i * kWords + word) * word_bytes,
                                     x + vector * kVec + word * kElementsPer16Bytes<T>);
    });
  };
  const auto copy_given = [&](const Place& at, int stage) {
    each_given(at, [&](int i, const float* scale, const std::int32_t* zero_point) {
      const std::uint32_t to = given_at(stage, i);
      device::copy_async_4(to, scale, 4);
      device::copy_async_4(to + 4, zero_point, 4);
    });
  };
  const auto take = [&](const Place& at, int stage, Piece& piece) {
    const int limit = limit_at(at);
    const std::uint32_t from = words_at(stage);
#pragma unroll
    for (auto& packed : piece.packed) packed = {};
    each_vector(at, limit, [&](int i, int) {
#pragma unroll
      for (int word = 0; word < kWords; ++word) {
        const uint4 part = device::load_shared_16(from + static_cast<std::uint32_t>(i * kWords + word) * word_bytes);
        piece.packed[i].words[4 * word] = part.x, piece.packed[i].words[4 * word + 1] = part.y;
        piece.packed[i].words[4 * word + 2] = part.z, piece.packed[i].words[4 * word + 3] = part.w;
      }
      if (i >= kScales) return;
      piece.given[i].scale = __int_as_float(device::load_shared(given_at(stage, i)));
      piece.given[i].zero_point = in_range(device::load_shared(given_at(stage, i) + 4));
    });
  };

  Quantizer by(ScaleAndZero{1.0f, 0});
  const auto write_scale = [&](int row, int group) {
    p.quant.scales[offset_of(p.quant.scale_rows, row) + group * p.quant.group_stride] = by.value.scale;
    p.zero_points[offset_of(p.zero_point_rows, row) + group * p.zero_point_group_stride] = by.value.zero_point;
  };
  const auto finish = [&](const Place& at, const Piece& piece) {
    const int row = row_at(at), limit = limit_at(at);
    // Of 16 bits, whether none is NaN is known before they are divided.
    constexpr bool kChecks = kComputes && sizeof(T) == 2;
    bool ordinary = true;
    const auto extend_by = [&](Range& range, const Packed<T, kVec>& packed) {
      if constexpr (kChecks) {
        if (!extend_and_check<T, kVec>(range, packed)) ordinary = false;
      } else {
        extend<true, T, kVec>(range, packed);
      }
    };
    if constexpr (kScaling == Scaling::kToken) {
      Range range;
#pragma unroll
      for (const auto& packed : piece.packed) extend_by(range, packed);
      row_range(range);
      by = Quantizer(computed<kResult>(p, range));
      if (lane == 0 && limit > 0) write_scale(row, 0);
    }
    auto* out = static_cast<std::uint8_t*>(p.out);
    if (limit > 0) out += offset_of(p.out_rows, row);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int vector = at.first_vector + lane + i * width;
      if constexpr (kScaling == Scaling::kGroup) {
        Range range;
        ordinary = true;
        extend_by(range, piece.packed[i]);
        const int group_vectors = 1 << group_shift;
        group_range<T>(range, group_shift);
        by = Quantizer(computed<kResult>(p, range));
        if (vector < limit && (lane & (group_vectors - 1)) == 0) write_scale(row, vector >> group_shift);
      }
      if (vector >= limit) continue;
      if constexpr (kScales > 0) {
        const ScaleAndZero& value = piece.given[kScales == 1 ? 0 : i];
        // Often it is the scale before; to know that costs registers.
        if (!kReadsAhead<T> || value.scale != by.value.scale) by = Quantizer(value);
        by.value.zero_point = value.zero_point;
      }
      float v[kVec];
      unpack<T, kVec>(v, piece.packed[i]);
      if constexpr (kChecks) {
        by.divisor.divide_bounded(v);
        store_rounded(out + vector * kVec, v, by.value.zero_point, ordinary && by.value.scale <= 0x1.fffffep127f);
      } else {
        store<kResult, kComputes>(p, out + vector * kVec, v, by);
      }
    }
  };

  // All threads of a CTA go through its pieces together: they take part in the maxima.
  Place at{static_cast<int>(blockIdx.x) * height, 0}, next = at;
  Piece piece;
  if constexpr (kReadsAhead<T>) {
    for (int stage = 0; stage < num_ahead; ++stage, advance(next)) copy(next, stage);
  } else {
    read(at, piece);
  }
  // The computed scale of a tensor.
  if constexpr (!kComputes) device::wait_for_predecessor();
  if constexpr (kReadsAhead<T>) {
    next = at;
    for (int stage = 0; stage < num_ahead; ++stage, advance(next)) {
      copy_given(next, stage);
      device::copy_async_commit();
    }
  } else {
    read_given(at, piece);
  }
  for (int stage = 0; at.first_row < num_rows; advance(at)) {
    if constexpr (kReadsAhead<T>) {
      if (num_ahead == 2) {
        device::copy_async_wait<1>();
      } else {
        device::copy_async_wait<0>();
      }
      take(at, stage, piece);
      copy(next, stage);
      copy_given(next, stage);
      device::copy_async_commit();
      advance(next);
      stage = stage + 1 < num_ahead ? stage + 1 : 0;
      finish(at, piece);
    } else {
      finish(at, piece);
      advance(next);
      read(next, piece);
      read_given(next, piece);
    }
  }
}

}  // namespace quire::cuda::quant
