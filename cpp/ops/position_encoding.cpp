// Public entry of rotary_embedding: validate, then choose the backend.
// SPDX-License-Identifier: Apache-2.0
#include "quire/position_encoding.h"

#include "core/check.h"
#include "core/runtime.h"
#include "ops/position_encoding.h"

namespace quire {

void rotary_embedding(const TensorView& positions, const TensorView& q, const TensorView* k, const TensorView& cos_sin_cache,
                      RopeStyle style, Stream stream) {
  const Check check("rotary_embedding");
  check.float_dtype(q, "q");
  check.shape(q, "q", {kAny, kAny, kAny});
  check.inner_contiguous(q, "q");
  check.writable(q, "q");
  const std::int64_t num_tokens = q.size(0), head_dim = q.size(2);

  check.dtype(positions, "positions", {DType::kInt32, DType::kInt64});
  check.shape(positions, "positions", {num_tokens});
  check.device(positions, "positions", q.device, "q");
  check.accessible(positions, "positions");

  check.float_dtype(cos_sin_cache, "cos_sin_cache");
  check.shape(cos_sin_cache, "cos_sin_cache", {kAny, kAny});
  check.device(cos_sin_cache, "cos_sin_cache", q.device, "q");
  check.contiguous(cos_sin_cache, "cos_sin_cache");
  check.accessible(cos_sin_cache, "cos_sin_cache");
  const std::int64_t rotary_dim = cos_sin_cache.size(1);
  if (rotary_dim % 2 != 0 || rotary_dim > head_dim)
    check.fail_value("cos_sin_cache", "an even rotary_dim of at most head_dim " + std::to_string(head_dim), describe(cos_sin_cache));

  RotaryParams params;
  if (k != nullptr) {
    check.same_dtype(*k, "k", q, "q");
    check.shape(*k, "k", {num_tokens, kAny, head_dim});
    check.device(*k, "k", q.device, "q");
    check.inner_contiguous(*k, "k");
    check.writable(*k, "k");
    check.disjoint(*k, "k", q, "q", false);
    check.disjoint(*k, "k", cos_sin_cache, "cos_sin_cache", false);
    check.disjoint(*k, "k", positions, "positions", false);
    params.k = k->data;
    params.num_kv_heads = k->size(1);
    params.k_token_stride = k->stride(0);
    params.k_head_stride = k->stride(1);
  }
  check.disjoint(q, "q", cos_sin_cache, "cos_sin_cache", false);
  check.disjoint(q, "q", positions, "positions", false);

  params.positions = positions.data;
  params.q = q.data;
  params.cos_sin_cache = cos_sin_cache.data;
  params.position_dtype = positions.dtype;
  params.dtype = q.dtype;
  params.cache_dtype = cos_sin_cache.dtype;
  params.style = style;
  params.num_tokens = num_tokens;
  params.num_heads = q.size(1);
  params.head_dim = head_dim;
  params.rotary_dim = rotary_dim;
  params.max_position = cos_sin_cache.size(0);
  params.position_stride = positions.stride(0);
  params.q_token_stride = q.stride(0);
  params.q_head_stride = q.stride(1);
  if (num_tokens == 0 || rotary_dim == 0 || params.num_heads + params.num_kv_heads == 0) return;
  dispatch_device(
      "rotary_embedding", q.device, stream, [&] { cpu::rotary_embedding(params); }, [&](auto s) { cuda::rotary_embedding(params, s); });
}

}  // namespace quire
