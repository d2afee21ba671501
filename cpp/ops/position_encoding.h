// What rotary_embedding hands to a backend, and the backends' entry points. Everything here is validated.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "core/error_word.h"
#include "ops/kv_cache.h"
#include "quire/dtype.h"
#include "quire/position_encoding.h"
#include "quire/stream.h"

namespace quire {

struct RotaryParams {
  const void* positions = nullptr;  // [num_tokens], int32 or int64
  void* q = nullptr;                // [num_tokens, num_heads, head_dim]
  void* k = nullptr;                // [num_tokens, num_kv_heads, head_dim] or null
  const void* cos_sin_cache = nullptr;  // [max_position, rotary_dim]
  DType position_dtype = DType::kInt64;
  DType dtype = DType::kFloat32;        // of q and k
  DType cache_dtype = DType::kFloat32;  // of cos_sin_cache
  RopeStyle style = RopeStyle::kNeox;
  std::int64_t num_tokens = 0;  // > 0
  std::int64_t num_heads = 0, num_kv_heads = 0, head_dim = 0, rotary_dim = 0, max_position = 0;
  std::int64_t position_stride = 1;
  std::int64_t q_token_stride = 0, q_head_stride = 0, k_token_stride = 0, k_head_stride = 0;
};

/// An RMS norm over each head.
struct HeadNormParams {
  const void* q_weight = nullptr;  // [head_dim]; null: no norm
  const void* k_weight = nullptr;  // [head_dim]; null with q_weight, or where there is no k
  DType q_weight_dtype = DType::kFloat32, k_weight_dtype = DType::kFloat32;
  float eps = 0.0f, weight_offset = 0.0f;
};

/// qk_norm_rope and rope_and_write_kv.
struct RopeParams {
  RotaryParams rotary;  // q is rotated in place; k is where the rotated keys go, or null
  HeadNormParams norm;
  KvParams kv;  // k (null: none), v and the caches (null: nothing is written to a cache)
  OpId op = OpId::kNone;
};

namespace cpu {
void rotary_embedding(const RotaryParams& params);
void rope(const RopeParams& params);
}  // namespace cpu
namespace cuda {
void rotary_embedding(const RotaryParams& params, Stream stream);
void rope(const RopeParams& params, Stream stream);
}  // namespace cuda

}  // namespace quire
