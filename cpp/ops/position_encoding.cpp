// Public entries of the rotary ops: validate, then choose the backend.
// SPDX-License-Identifier: Apache-2.0
#include "quire/position_encoding.h"

#include "core/check.h"
#include "core/runtime.h"
#include "ops/position_encoding.h"

namespace quire {
namespace {

// What all rotary ops share: q, positions and the table.
RotaryParams check_rotary(const Check& check, const TensorView& positions, const TensorView& q, const TensorView& cos_sin_cache,
                          RopeStyle style) {
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
  check.disjoint(q, "q", cos_sin_cache, "cos_sin_cache", false);
  check.disjoint(q, "q", positions, "positions", false);

  RotaryParams params;
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
  return params;
}

// Rotated keys that are written: k itself, or k_out.
void check_rotated_k(const Check& check, const TensorView& k, const char* arg, const TensorView& positions, const TensorView& q,
                     const TensorView& cos_sin_cache, RotaryParams& params) {
  check.same_dtype(k, arg, q, "q");
  check.shape(k, arg, {params.num_tokens, kAny, params.head_dim});
  check.device(k, arg, q.device, "q");
  check.inner_contiguous(k, arg);
  check.writable(k, arg);
  check.disjoint(k, arg, q, "q", false);
  check.disjoint(k, arg, cos_sin_cache, "cos_sin_cache", false);
  check.disjoint(k, arg, positions, "positions", false);
  params.k = k.data;
  params.num_kv_heads = k.size(1);
  params.k_token_stride = k.stride(0);
  params.k_head_stride = k.stride(1);
}

void check_weight(const Check& check, const TensorView& weight, const char* arg, const TensorView& q) {
  check.float_dtype(weight, arg);
  check.vector(weight, arg, weight.dtype, q.size(2), q.device, "q");
  check.disjoint(q, "q", weight, arg, false);
}

HeadNormParams check_head_norm(const Check& check, const TensorView& q, const TensorView& q_weight, const TensorView* k_weight, double eps,
                               double weight_offset) {
  check_weight(check, q_weight, "q_weight", q);
  HeadNormParams params;
  params.q_weight = q_weight.data;
  params.q_weight_dtype = q_weight.dtype;
  if (k_weight != nullptr) {
    check_weight(check, *k_weight, "k_weight", q);
    params.k_weight = k_weight->data;
    params.k_weight_dtype = k_weight->dtype;
  }
  check.finite(eps, "eps");
  if (eps < 0.0) check.fail_value("eps", "0 or more", std::to_string(eps));
  check.finite(weight_offset, "weight_offset");
  params.eps = static_cast<float>(eps);
  params.weight_offset = static_cast<float>(weight_offset);
  return params;
}

void run_rope(const Check& check, const RopeParams& params, const TensorView& q, Stream stream) {
  if (params.rotary.num_tokens == 0 || params.rotary.head_dim == 0 || params.rotary.num_heads + params.kv.num_kv_heads == 0) return;
  dispatch_device(check.op(), q.device, stream, [&] { cpu::rope(params); }, [&](auto s) { cuda::rope(params, s); }, Explains::kCuda);
}

}  // namespace

void rotary_embedding(const TensorView& positions, const TensorView& q, const TensorView* k, const TensorView& cos_sin_cache,
                      RopeStyle style, Stream stream) {
  const Check check("rotary_embedding");
  RotaryParams params = check_rotary(check, positions, q, cos_sin_cache, style);
  if (k != nullptr) check_rotated_k(check, *k, "k", positions, q, cos_sin_cache, params);
  if (params.num_tokens == 0 || params.rotary_dim == 0 || params.num_heads + params.num_kv_heads == 0) return;
  dispatch_device(
      "rotary_embedding", q.device, stream, [&] { cpu::rotary_embedding(params); }, [&](auto s) { cuda::rotary_embedding(params, s); },
      Explains::kCuda);
}

void qk_norm_rope(const TensorView& positions, const TensorView& q, const TensorView* k, const TensorView& q_weight,
                  const TensorView* k_weight, const TensorView& cos_sin_cache, double eps, double weight_offset, RopeStyle style,
                  Stream stream) {
  const Check check("qk_norm_rope");
  RopeParams params;
  params.op = OpId::kQkNormRope;
  params.rotary = check_rotary(check, positions, q, cos_sin_cache, style);
  if ((k == nullptr) != (k_weight == nullptr)) check.fail_value("k_weight", "one where there is a k, and only there", k ? "none" : "one");
  params.norm = check_head_norm(check, q, q_weight, k_weight, eps, weight_offset);
  if (k != nullptr) {
    check_rotated_k(check, *k, "k", positions, q, cos_sin_cache, params.rotary);
    check.disjoint(*k, "k", q_weight, "q_weight", false);
    check.disjoint(*k, "k", *k_weight, "k_weight", false);
    params.kv.k = k->data;
    params.kv.num_kv_heads = k->size(1);
    params.kv.k_token_stride = k->stride(0);
    params.kv.k_head_stride = k->stride(1);
  }
  run_rope(check, params, q, stream);
}

void rope_and_write_kv(const TensorView& positions, const TensorView& q, const TensorView& k, const TensorView& v,
                       const TensorView& cos_sin_cache, const TensorView& k_cache, const TensorView& v_cache,
                       const TensorView& slot_mapping, const TensorView* k_scale, const TensorView* v_scale, const TensorView* k_out,
                       const TensorView* q_weight, const TensorView* k_weight, double eps, double weight_offset, RopeStyle style,
                       Stream stream) {
  const Check check("rope_and_write_kv");
  RopeParams params;
  params.op = OpId::kRopeAndWriteKv;
  params.rotary = check_rotary(check, positions, q, cos_sin_cache, style);
  check.same_dtype(k, "k", q, "q");
  check.shape(k, "k", {params.rotary.num_tokens, kAny, params.rotary.head_dim});
  check.device(k, "k", q.device, "q");
  params.kv = check_kv(check, k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale);
  // A cache without blocks may have no address, and backends take a null pointer for no cache. No slot of it is written.
  if (params.kv.k_cache == nullptr) params.kv.k_cache = k.data;
  check_kv_writes(check, k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale);
  if ((q_weight == nullptr) != (k_weight == nullptr))
    check.fail_value(q_weight == nullptr ? "q_weight" : "k_weight", "both weights or neither", "none");
  if (q_weight != nullptr) params.norm = check_head_norm(check, q, *q_weight, k_weight, eps, weight_offset);

  // What is written shares no memory with anything else, but for k_out, which may be k.
  struct Named {
    const TensorView* tensor;
    const char* arg;
  };
  const Named inputs[] = {{&v, "v"},
                          {&slot_mapping, "slot_mapping"},
                          {k_scale, "k_scale"},
                          {v_scale, "v_scale"},
                          {&positions, "positions"},
                          {&cos_sin_cache, "cos_sin_cache"},
                          {q_weight, "q_weight"},
                          {k_weight, "k_weight"}};
  const Named outputs[] = {{&q, "q"}, {&k_cache, "k_cache"}, {&v_cache, "v_cache"}, {k_out, "k_out"}};
  if (k_out != nullptr) {
    check_rotated_k(check, *k_out, "k_out", positions, q, cos_sin_cache, params.rotary);
    check.same_shape(*k_out, "k_out", k, "k");
    check.disjoint(*k_out, "k_out", k, "k", true);
  }
  for (const Named& output : outputs) {
    if (output.tensor == nullptr) continue;
    for (const Named& input : inputs)
      if (input.tensor != nullptr) check.disjoint(*output.tensor, output.arg, *input.tensor, input.arg, false);
  }
  check.disjoint(q, "q", k, "k", false);
  for (const Named& cache : {outputs[1], outputs[2]}) {
    check.disjoint(*cache.tensor, cache.arg, q, "q", false);
    if (k_out != nullptr) check.disjoint(*cache.tensor, cache.arg, *k_out, "k_out", false);
  }
  run_rope(check, params, q, stream);
}

}  // namespace quire
