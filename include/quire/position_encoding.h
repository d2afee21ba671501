// Rotary position encoding (RoPE).
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "quire/export.h"
#include "quire/stream.h"
#include "quire/tensor.h"

namespace quire {

/// Which elements form a rotated pair.
enum class RopeStyle {
  kNeox,  ///< (i, i + rotary_dim / 2): GPT-NeoX, Llama, and most checkpoints of the HF hub.
  kGptj,  ///< (2 i, 2 i + 1): GPT-J, the original Llama release.
};

/// In place, for token t, head h and pair (a, b) with angle index i:
///   a' = a cos_i - b sin_i,   b' = b cos_i + a sin_i,   cos_i | sin_i = cos_sin_cache[positions[t]].
/// Elements from rotary_dim on stay as they are (partial rotary).
///
///   positions      int32 or int64 [num_tokens]; a value outside [0, max_position) leaves its token as it is and, unless it
///                  is -1, is recorded for check_errors()
///   q              float32, float16 or bfloat16 [num_tokens, num_heads, head_dim], unit inner stride
///   k              null, or as q with num_kv_heads; must not overlap q
///   cos_sin_cache  float32, float16 or bfloat16 [max_position, rotary_dim], contiguous: cos in the first half, sin in the second
///
/// rotary_dim is even and at most head_dim. q and k are apart from all else. Nothing synchronises.
/// Throws std::invalid_argument (shape, layout, alias), TypeError (dtype), UnsupportedError, CudaError.
QUIRE_API void rotary_embedding(const TensorView& positions, const TensorView& q, const TensorView* k, const TensorView& cos_sin_cache,
                                RopeStyle style, Stream stream);

/// In place: every head of q and of k is RMS-normalised with its tensor's weight, then rotated as by rotary_embedding:
///   x = x / sqrt(mean(x^2) + eps) * (weight + weight_offset) over head_dim.
/// Both steps are done in float32 and rounded once. A skipped position leaves its token as it is. Throws likewise. Qwen3, Gemma 3.
///
///   positions, q, k, cos_sin_cache  as in rotary_embedding; k may be null
///   q_weight, k_weight              float32, float16 or bfloat16 [head_dim], contiguous; k_weight is null if k is
QUIRE_API void qk_norm_rope(const TensorView& positions, const TensorView& q, const TensorView* k, const TensorView& q_weight,
                            const TensorView* k_weight, const TensorView& cos_sin_cache, double eps, double weight_offset, RopeStyle style,
                            Stream stream);

/// One pass for what stands between a layer's projection and its attention: rotates q in place, and writes the rotated k, and v, to
/// slot slot_mapping[t] of the caches. The result is, bit for bit, that of rotary_embedding (with weights: qk_norm_rope) followed
/// by write_kv, so the rotated k is rounded to its own dtype before it is converted to the cache's.
///
///   positions, q, cos_sin_cache     as in rotary_embedding
///   k, v                            as in write_kv, of q's dtype, device and head_dim; read only
///   k_cache, v_cache, slot_mapping, k_scale, v_scale  as in write_kv
///   k_out                           null, or as k: the rotated k is written there too; it may be k itself
///   q_weight, k_weight              both null, or both as in qk_norm_rope
///
/// A token with slot -1 still has its q (and k_out) rotated; one with position -1 is written as it is. Throws as rotary_embedding.
QUIRE_API void rope_and_write_kv(const TensorView& positions, const TensorView& q, const TensorView& k, const TensorView& v,
                                 const TensorView& cos_sin_cache, const TensorView& k_cache, const TensorView& v_cache,
                                 const TensorView& slot_mapping, const TensorView* k_scale, const TensorView* v_scale,
                                 const TensorView* k_out, const TensorView* q_weight, const TensorView* k_weight, double eps,
                                 double weight_offset, RopeStyle style, Stream stream);

}  // namespace quire
