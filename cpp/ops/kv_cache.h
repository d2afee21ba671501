// What the KV-cache ops hand to a backend, and the backends' entry points. Everything here is validated.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "quire/dtype.h"
#include "quire/stream.h"

namespace quire {

class Check;
struct TensorView;

/// write_kv, gather_kv and rope_and_write_kv.
struct KvParams {
  void* k = nullptr;        // [num_tokens, num_kv_heads, head_dim]; read by write_kv, written by gather_kv
  void* v = nullptr;        // likewise
  void* k_cache = nullptr;  // [num_blocks, block_size, num_kv_heads, head_dim]
  void* v_cache = nullptr;  // likewise
  const void* slot_mapping = nullptr;  // [num_tokens], int32 or int64
  const float* k_scale = nullptr;      // [1] or [num_kv_heads], or null for 1
  const float* v_scale = nullptr;
  std::int64_t k_scale_stride = 0, v_scale_stride = 0;  // 0: one scale; 1: one per kv head
  DType dtype = DType::kFloat32;        // of k and v
  DType cache_dtype = DType::kFloat32;  // of the caches
  DType slot_dtype = DType::kInt64;
  std::int64_t num_tokens = 0;  // > 0
  std::int64_t num_kv_heads = 0, head_dim = 0, num_blocks = 0, block_size = 0;
  std::int64_t slot_stride = 1;
  std::int64_t k_token_stride = 0, k_head_stride = 0, v_token_stride = 0, v_head_stride = 0;
  std::int64_t k_cache_block_stride = 0, k_cache_slot_stride = 0, k_cache_head_stride = 0;
  std::int64_t v_cache_block_stride = 0, v_cache_slot_stride = 0, v_cache_head_stride = 0;
};

/// Checks what write_kv and gather_kv share, and fills their parameters.
KvParams check_kv(const Check& check, const TensorView& k, const TensorView& v, const TensorView& k_cache, const TensorView& v_cache,
                  const TensorView& slot_mapping, const TensorView* k_scale, const TensorView* v_scale);

/// Checks that the caches may be written, and that they share no memory with anything else.
void check_kv_writes(const Check& check, const TensorView& k, const TensorView& v, const TensorView& k_cache, const TensorView& v_cache,
                     const TensorView& slot_mapping, const TensorView* k_scale, const TensorView* v_scale);

/// copy_blocks. A block is num_segments runs of segment_bytes contiguous bytes, segment_stride_bytes apart.
struct CopyBlocksParams {
  void* cache = nullptr;
  const void* pairs = nullptr;  // [num_pairs, 2], int32 or int64, contiguous
  DType pair_dtype = DType::kInt64;
  std::int64_t num_pairs = 0;  // > 0
  std::int64_t num_blocks = 0, block_stride_bytes = 0;
  std::int64_t num_segments = 1, segment_bytes = 0, segment_stride_bytes = 0;
};

/// swap_blocks by one kernel. A block is num_rows rows of row_bytes.
struct SwapBlocksParams {
  void* dst = nullptr;
  const void* src = nullptr;
  const std::int64_t* pairs = nullptr;  // [num_pairs, 2] of (source, destination), on the host; no two have one destination
  std::int64_t num_pairs = 0;           // > 0
  std::int64_t num_rows = 1, row_bytes = 0;
  std::int64_t dst_block_stride_bytes = 0, src_block_stride_bytes = 0, dst_row_stride_bytes = 0, src_row_stride_bytes = 0;
};

namespace cpu {
void write_kv(const KvParams& params);
void gather_kv(const KvParams& params);
void copy_blocks(const CopyBlocksParams& params);
}  // namespace cpu

namespace cuda {
void write_kv(const KvParams& params, Stream stream);
void gather_kv(const KvParams& params, Stream stream);
void copy_blocks(const CopyBlocksParams& params, Stream stream);
/// Copies the blocks in few launches if this device reaches both memories and they are laid out in vectors; else does nothing and is false.
bool swap_blocks(const SwapBlocksParams& params, Stream stream);
/// One strided copy between any two memories: `height` runs of `width_bytes`.
void copy_memory(void* dst, std::int64_t dst_pitch_bytes, const void* src, std::int64_t src_pitch_bytes, std::int64_t width_bytes,
                 std::int64_t height, Stream stream);
}  // namespace cuda

}  // namespace quire
