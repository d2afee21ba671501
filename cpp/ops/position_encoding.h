// What rotary_embedding hands to a backend, and the backends' entry points. Everything here is validated.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

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

namespace cpu {
void rotary_embedding(const RotaryParams& params);
}
namespace cuda {
void rotary_embedding(const RotaryParams& params, Stream stream);
}

}  // namespace quire
