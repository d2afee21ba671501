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
/// rotary_dim is even and at most head_dim. Nothing synchronises.
/// Throws std::invalid_argument, TypeError, CudaError.
QUIRE_API void rotary_embedding(const TensorView& positions, const TensorView& q, const TensorView* k, const TensorView& cos_sin_cache,
                                RopeStyle style, Stream stream);

}  // namespace quire
