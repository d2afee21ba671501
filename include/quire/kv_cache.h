// The paged KV cache: writing it, reading it back, and moving its blocks.
// SPDX-License-Identifier: Apache-2.0
//
// A cache is [num_blocks, block_size, num_kv_heads, head_dim] with unit inner stride and any other strides, of dtype
// float32, float16, bfloat16, float8_e4m3fn, float8_e5m2 or int8. A slot is block_id * block_size + offset.
// Quantized caches hold stored = saturate(x / scale), rounded to nearest even, and are read as stored * scale; k_scale and
// v_scale are float32 [1] or [num_kv_heads], on the same device; null means 1, and it is what a float cache takes.
//
// Work is enqueued on `stream`; nothing synchronises but swap_blocks() with pageable host memory. What is written is apart from what is read (copy_blocks: blocks).
// Throws std::invalid_argument (shape, layout, alias), TypeError (dtype), UnsupportedError, CudaError.
#pragma once

#include "quire/export.h"
#include "quire/stream.h"
#include "quire/tensor.h"

namespace quire {

/// Writes token t's key and value to slot slot_mapping[t] of the caches.
///
///   k, v          float32, float16 or bfloat16 [num_tokens, num_kv_heads, head_dim], unit inner stride
///   k_cache, v_cache  one dtype: that of k, or float8_e4m3fn, float8_e5m2, int8, or another float dtype (converted)
///   slot_mapping  int32 or int64 [num_tokens]; -1 skips the token; any other value outside the cache is skipped and
///                 recorded for check_errors(). Two tokens with one slot: one of them wins, element by element.
QUIRE_API void write_kv(const TensorView& k_cache, const TensorView& v_cache, const TensorView& k, const TensorView& v,
                        const TensorView& slot_mapping, const TensorView* k_scale, const TensorView* v_scale, Stream stream);

/// The reverse of write_kv: k[t], v[t] = slot slot_mapping[t], dequantized. A skipped token's rows are filled with zeros.
QUIRE_API void gather_kv(const TensorView& k, const TensorView& v, const TensorView& k_cache, const TensorView& v_cache,
                         const TensorView& slot_mapping, const TensorView* k_scale, const TensorView* v_scale, Stream stream);

/// Copies whole blocks inside one cache: block pairs[i][1] = block pairs[i][0], for copy-on-write.
///
///   cache  any cache tensor [num_blocks, ...]; a pool [num_blocks, ...] of any rank from 2 with dense, unit inner dims
///   pairs  int32 or int64 [num_pairs, 2] on the cache's device; a pair with an index outside the cache is skipped and, unless
///          that index is -1, recorded. No destination may be a source or a destination of another pair.
QUIRE_API void copy_blocks(const TensorView& cache, const TensorView& pairs, Stream stream);

/// Copies blocks between two caches of one block shape and dtype, on any pair of devices (host to device, device to
/// host, device to device, host to host): dst block pairs[i][1] = src block pairs[i][0].
///
///   pairs  int64 [num_pairs, 2] on the CPU; an index out of range is an IndexError before anything is copied
///
/// Adjacent pairs become one transfer. From pageable host memory the copy into the driver's staging buffer happens before
/// the call returns; from pinned memory nothing blocks.
QUIRE_API void swap_blocks(const TensorView& dst, const TensorView& src, const TensorView& pairs, Stream stream);

}  // namespace quire
