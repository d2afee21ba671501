// What the launchers of quantize and dequantize share. Host code only.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>

#include "cuda/device/reduce.cuh"
#include "cuda/element.h"
#include "cuda/launch.h"
#include "ops/quantization.h"

namespace quire::cuda::quant {

/// The results that there are. A kernel knows which it makes: code of the others would cost it registers.
enum class Result { kFloat8, kInt8, kAsymmetricInt8 };

/// Elements that a thread quantizes at once: 16 bytes of the narrow side.
inline constexpr int kVec = 16;
inline constexpr int kMaxThreads = 512;
inline constexpr int kNarrowThreads = 128;

/// Threads of a CTA of kernels that read rows, kVectors vectors to a thread: those that fit in with 64 registers each.
template <int kVectors>
inline constexpr int kRowThreads = kVectors == 1 ? kMaxThreads : 2 * kMaxThreads;

inline unsigned num_ctas(std::int64_t num_items, std::int64_t per_cta, int ctas_per_sm) {
  const std::int64_t limit = std::int64_t{ctas_per_sm} * current_device_properties().num_sms;
  return static_cast<unsigned>(std::max<std::int64_t>(1, std::min(ceil_div(num_items, per_cta), limit)));
}

inline bool rows_keep_alignment(const RowLayout& rows, std::int64_t elements) {
  return rows.strides[0] % elements == 0 && rows.strides[1] % elements == 0 && rows.strides[2] % elements == 0;
}

/// Both sides can be read and written kCount elements at a time.
template <typename Wide, int kCount>
bool is_vectors(const void* wide, const RowLayout& wide_rows, const void* narrow, const RowLayout& narrow_rows, std::int64_t width) {
  return width % kCount == 0 && is_aligned(wide, 16) && is_aligned(narrow, kCount) &&
         rows_keep_alignment(wide_rows, kElementsPer16Bytes<Wide>) && rows_keep_alignment(narrow_rows, kCount);
}

/// Threads for rows of `lanes` vectors: several narrow rows share a CTA.
inline dim3 row_block(std::int64_t lanes, int max_threads) {
  dim3 block;
  if (lanes <= kWarpSize) {
    block.x = std::bit_ceil(static_cast<unsigned>(lanes));
    block.y = kNarrowThreads / block.x;
  } else {
    block.x = static_cast<unsigned>(std::min<std::int64_t>(ceil_div(lanes, kWarpSize) * kWarpSize, max_threads));
  }
  return block;
}

/// Whether rows lie `stride` apart, one behind the other.
inline bool are_apart_by(const QuantizeParams& p, const RowLayout& rows, std::int64_t stride) {
  return p.num_rows == 1 || (rows.inner_extents[0] == 1 && rows.inner_extents[1] == 1 && rows.strides[0] == stride);
}

/// All but a computed scale of a tensor. after_range: p holds that scale once the kernel before has ended.
template <typename T, Result kResult>
void launch_quantize(const QuantizeParams& p, bool after_range, Stream stream);

/// Why quantize_rows_kernel cannot do it; null: it can.
template <typename T>
const char* prevents_rows(const QuantizeParams& p) {
  const std::int64_t group_vectors = p.quant.group_size / kVec;
  if (!is_vectors<T, kVec>(p.x, p.x_rows, p.out, p.out_rows, p.width)) return "x or out does not divide into aligned pieces of 16 elements";
  if (p.quant.granularity == ScaleGranularity::kGroup) {
    if (p.quant.group_size % kVec != 0 || !std::has_single_bit(static_cast<std::uint64_t>(group_vectors)))
      return "group_size is not 16 times a power of two";
    if (p.computes && (p.width % p.quant.group_size != 0 || group_vectors > kWarpSize))
      return "scales are computed, and group_size is over 512 or does not divide the row";
  }
  if (p.computes && p.quant.granularity == ScaleGranularity::kToken && p.width / kVec > 2 * kRowThreads<2>)
    return "a row has more than 32768 elements";
  return p.width > INT32_MAX / 2 || p.num_rows > INT32_MAX / 2 ? "extents are over 2^30" : nullptr;
}

/// A computed scale of a tensor, and the result. Whether it was launched: all CTAs must run at once.
template <typename T, Result kResult>
bool launch_tensor(const QuantizeParams& p, Stream stream);
/// The scale alone: writes scales[0] and zero_points[0].
template <typename T, Result kResult>
void launch_tensor_scale(QuantizeParams p, Stream stream);
/// Why launch_tensor cannot do it; null: it can.
const char* prevents_tensor(const QuantizeParams& p);

}  // namespace quire::cuda::quant
