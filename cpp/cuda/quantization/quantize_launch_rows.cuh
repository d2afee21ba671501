// launch_quantize's definition, for the instantiations.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>

#include "cuda/launch.h"
#include "cuda/quantization/quantize_groups.cuh"
#include "cuda/quantization/quantize_launch.h"
#include "cuda/quantization/quantize_rows.cuh"
#include "cuda/quantization/quantize_zero_points.cuh"

namespace quire::cuda::quant {

template <typename T, int kVectors, Scaling kScaling, Result kResult>
void launch_rows(const QuantizeParams& p, bool after_range, Stream stream) {
  const std::int64_t num_vectors = p.width / kVec;
  dim3 block = row_block(ceil_div(num_vectors, kVectors), kScaling == Scaling::kToken ? kRowThreads<kVectors> : kMaxThreads);
  if constexpr (kScaling != Scaling::kToken) {
    // The more rows, the fewer threads for each: what is done once for a row counts less.
    const std::int64_t threads = kResidentThreads * current_device_properties().num_sms / p.num_rows;
    block.x = std::min(block.x, std::bit_ceil(static_cast<unsigned>(std::clamp<std::int64_t>(threads, kWarpSize, kMaxThreads))));
    if (kScaling == Scaling::kGroup) block.x = std::max(block.x, static_cast<unsigned>(p.quant.group_size / kVec));
    block.y = block.x < kNarrowThreads ? kNarrowThreads / block.x : 1;
  }
  const int threads = static_cast<int>(block.x * block.y);
  // Where threads do not read ahead, new CTAs do so for them.
  const unsigned ctas = num_ctas(p.num_rows, block.y, kReadsAhead<T> ? kResidentThreads / threads : 1 << 20);
  const int group_shift = std::countr_zero(static_cast<std::uint64_t>(p.quant.group_size / kVec));
  if constexpr (kResult == Result::kAsymmetricInt8) {
    constexpr auto kernel = zero_point_quantize_rows_kernel<T, kVectors, kScaling>;
    int num_ahead = 0, shared_bytes = 0;
    if (kReadsAhead<T>) {
      // Any device has place for one piece of a CTA of most threads.
      const int most_shared = current_device_properties().max_shared_bytes_per_cta - 1024;
      const int bytes = piece_bytes<T, kVectors, kScaling>(threads);
      num_ahead = 2 * bytes <= most_shared ? 2 : 1;
      shared_bytes = num_ahead * bytes;
      set_max_shared_bytes(reinterpret_cast<const void*>(kernel),
                           std::min(2 * piece_bytes<T, kVectors, kScaling>(kRowThreads<kVectors>), most_shared));
    }
    // Of what a range was taken from, the end is in the L2 cache.
    launch_waiting("zero_point_quantize_rows_kernel", kernel, LaunchShape{ctas, block, shared_bytes}, stream, p, group_shift, num_ahead,
                   after_range);
  } else {
    constexpr auto kernel = quantize_rows_kernel<T, kVectors, kScaling, kResult>;
    const int shift = kScaling == Scaling::kGivenGroup && p.quant.group_size == p.width ? -1 : group_shift;
    launch_waiting("quantize_rows_kernel", kernel, ctas, block, stream, p, shift, after_range);
  }
}

/// Whether quantize_dense_kernel can do what quantize_rows_kernel can.
inline bool is_dense_in_groups(const QuantizeParams& p) {
  if (p.quant.granularity != ScaleGranularity::kGroup || p.width % p.quant.group_size != 0) return false;
  const std::int64_t groups = p.width / p.quant.group_size;
  const auto dense_groups = [&](const RowLayout& rows, std::int64_t group_stride) {
    return are_apart_by(p, rows, groups) && (groups == 1 || group_stride == 1);
  };
  // Vectors are counted in 32 bits.
  return are_apart_by(p, p.x_rows, p.width) && are_apart_by(p, p.out_rows, p.width) &&
         dense_groups(p.quant.scale_rows, p.quant.group_stride) &&
         (p.zero_points == nullptr || dense_groups(p.zero_point_rows, p.zero_point_group_stride)) &&
         p.num_rows * (p.width / kVec) <= std::int64_t{1} << 29;
}

template <typename T, Scaling kScaling, Result kResult>
void launch_dense(const QuantizeParams& p, Stream stream) {
  const std::int64_t num_vectors = p.num_rows * (p.width / kVec);
  // As quantize_rows_kernel's.
  const unsigned ctas = num_ctas(num_vectors, 2 * kDenseThreads, kReadsAhead<T> ? kResidentThreads / kDenseThreads : 1 << 20);
  launch_waiting("quantize_dense_kernel", quantize_dense_kernel<T, kScaling, kResult>, ctas, kDenseThreads, stream, p,
                 static_cast<int>(num_vectors), std::countr_zero(static_cast<std::uint64_t>(p.quant.group_size / kVec)));
}

template <typename T, Result kResult>
void launch_quantize(const QuantizeParams& p, bool after_range, Stream stream) {
  if (prevents_rows<T>(p) == nullptr) {
    if (is_dense_in_groups(p)) {
      if (p.computes) return launch_dense<T, Scaling::kGroup, kResult>(p, stream);
      return launch_dense<T, Scaling::kGivenGroup, kResult>(p, stream);
    }
    // 64 bytes for each thread, and more only where a row has more than a CTA has threads for it.
    constexpr int kVectors = sizeof(T) == 2 ? 2 : 1;
    if constexpr (kResult == Result::kAsymmetricInt8) {
      if (!p.computes && p.quant.group_size == p.width) return launch_rows<T, kVectors, Scaling::kGiven, kResult>(p, after_range, stream);
    }
    if (!p.computes) return launch_rows<T, kVectors, Scaling::kGivenGroup, kResult>(p, after_range, stream);
    if (p.quant.granularity == ScaleGranularity::kGroup) return launch_rows<T, kVectors, Scaling::kGroup, kResult>(p, false, stream);
    if (p.width / kVec <= kVectors * kRowThreads<kVectors>) return launch_rows<T, kVectors, Scaling::kToken, kResult>(p, false, stream);
    return launch_rows<T, 2, Scaling::kToken, kResult>(p, false, stream);
  }
  const std::int64_t items = p.num_rows * ceil_div(p.width, p.quant.group_size);
  launch_waiting("quantize_groups_kernel", quantize_groups_kernel<T, kResult>, num_ctas(items, 8, 8), 256, stream, p);
}

}  // namespace quire::cuda::quant
