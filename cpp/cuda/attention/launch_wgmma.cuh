// launch_wgmma's definition, for the instantiations.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>

#include "cuda/attention/launch.h"
#include "cuda/attention/wgmma.cuh"
#include "cuda/launch.h"
#include "cuda/tensor_map.h"

namespace quire::cuda::attn {

inline CUtensorMap make_tensor_map(const AttentionParams& p, const void* base, std::int64_t block_stride, std::int64_t token_stride,
                                   std::int64_t head_stride, int keys_per_box) {
  const bool paged = p.block_tables != nullptr;
  const cuuint64_t sizes[4] = {static_cast<cuuint64_t>(p.head_dim), static_cast<cuuint64_t>(p.num_kv_heads),
                               static_cast<cuuint64_t>(paged ? p.block_size : p.num_kv_tokens),
                               static_cast<cuuint64_t>(paged ? p.num_blocks : 1)};
  // Strides of dimensions of size 1 are not used, but must look well.
  const std::int64_t item = itemsize(p.kv_dtype);
  const auto bytes = [&](cuuint64_t size, std::int64_t stride) { return size > 1 ? static_cast<cuuint64_t>(stride * item) : 16; };
  const cuuint64_t strides[3] = {bytes(sizes[1], head_stride), bytes(sizes[2], token_stride), bytes(sizes[3], block_stride)};
  const cuuint32_t box[4] = {static_cast<cuuint32_t>(device::kPanelRowBytes / item), 1, static_cast<cuuint32_t>(keys_per_box), 1};
  const cuuint32_t steps[4] = {1, 1, 1, 1};
  CUtensorMap map;
  check_tensor_map(encode_tensor_map()(&map, item == 1 ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_UINT16, 4,
                                       const_cast<void*>(base), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                                       CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE));
  return map;
}

/// Whether `rows` packed rows from a multiple of it on are a box of {head_dim, head, token}, q or out; then the map of such boxes, a panel of
/// columns each.
inline bool make_rows_map(const AttentionParams& p, const void* base, std::int64_t item, std::int64_t token_stride,
                          std::int64_t head_stride, int rows, CUtensorMap& map) {
  const std::int64_t group = p.num_heads / p.num_kv_heads, heads = std::min<std::int64_t>(group, rows);
  const auto fits = [](std::int64_t stride) { return stride > 0 && stride < std::int64_t{1} << 38; };
  if (rows % heads != 0 || group % heads != 0 || !fits(token_stride) || !fits(head_stride)) return false;
  const std::int64_t tokens = p.shared_queries > 0 && base == p.q ? p.shared_queries : p.num_tokens;
  const cuuint64_t sizes[3] = {static_cast<cuuint64_t>(p.head_dim), static_cast<cuuint64_t>(p.num_heads), static_cast<cuuint64_t>(tokens)};
  const cuuint64_t strides[2] = {static_cast<cuuint64_t>(head_stride * item), static_cast<cuuint64_t>(token_stride * item)};
  const cuuint32_t box[3] = {static_cast<cuuint32_t>(device::kPanelRowBytes / item), static_cast<cuuint32_t>(heads),
                             static_cast<cuuint32_t>(rows / heads)};
  const cuuint32_t steps[3] = {1, 1, 1};
  check_tensor_map(encode_tensor_map()(&map, item == 1 ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_UINT16, 3,
                                       const_cast<void*>(base), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                                       CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE));
  return true;
}

template <typename Shape, bool kMayHaveOptions>
void launch_wgmma_shape(const Plan& plan, const Config& config, Stream stream) {
  constexpr bool kNarrowKv = Shape::kWidenV;
  const AttentionParams& p = plan.params;
  WgmmaInputs inputs{};
  inputs.keys_per_box =
      p.block_tables != nullptr ? static_cast<int>(std::min<std::int64_t>(p.block_size & -p.block_size, Shape::kKeyUnit)) : Shape::kKeys;
  inputs.in_blocks = p.block_tables != nullptr && p.block_size == kUsualBlock;
  inputs.log2_scale = p.scale * kLog2E;
  inputs.transform = p.softcap > 0.0f || p.alibi_slopes != nullptr || (!kNarrowKv && !(p.scale > 0.0f));
  inputs.k = make_tensor_map(p, p.k, p.k_block_stride, p.k_token_stride, p.k_head_stride, inputs.keys_per_box);
  inputs.v = make_tensor_map(p, p.v, p.v_block_stride, p.v_token_stride, p.v_head_stride, inputs.keys_per_box);
  inputs.q_boxes = make_rows_map(p, p.q, Shape::kNarrowQ ? 1 : 2, p.q_token_stride, p.q_head_stride, Shape::kRows, inputs.q);
  inputs.out_boxes = Shape::kOutBoxes && make_rows_map(p, p.out, 2, p.out_token_stride, p.out_head_stride, 16, inputs.out);
  const auto launch = [&](auto kernel) {
    constexpr int kSharedBytes = kWgmmaSharedBytes<Shape>;
    static_assert(kSharedBytes <= 227 * 1024);
    // The workspace has room for the notes of so many CTAs; that is fewer than SMs only where few rows meet many sequences.
    const std::int64_t num_sms = current_device_properties().num_sms, num_tiles = config.num_tiles * p.num_kv_heads;
    const std::int64_t note_bytes = Shape::kRows * kNoteWords<Shape::kHeadDim> * std::int64_t{sizeof(std::uint32_t)};
    const std::int64_t room = workspace_bytes(p.num_tokens, p.num_heads, p.head_dim, static_cast<int>(num_sms)) / note_bytes;
    const std::int64_t num_ctas = std::max<std::int64_t>(std::min({num_tiles, num_sms, room}), 1);
    launch_waiting("attention_wgmma_kernel", kernel, LaunchShape{static_cast<unsigned>(num_ctas), Shape::kThreads, kSharedBytes}, stream,
                   plan, inputs);
  };
  if constexpr (kMayHaveOptions) {
    if (inputs.transform || p.mask != nullptr) return launch(attention_wgmma_kernel<Shape, true>);
  }
  launch(attention_wgmma_kernel<Shape, false>);
}

template <DType kQ, bool kNarrowKv, int kHeadDim>
void launch_wgmma(const Plan& plan, const Config& config, Stream stream) {
  if constexpr (wgmma_has_short(kHeadDim, itemsize(kQ) == 1, kNarrowKv)) {
    if (config.is_short) return launch_wgmma_shape<WgmmaShape<kQ, kNarrowKv, kHeadDim, true>, false>(plan, config, stream);
  }
  launch_wgmma_shape<WgmmaShape<kQ, kNarrowKv, kHeadDim>, true>(plan, config, stream);
}

}  // namespace quire::cuda::attn
