// What the rotary kernels share.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cuda/device/divisor.cuh"
#include "cuda/element.h"
#include "cuda/launch.h"
#include "ops/position_encoding.h"

namespace quire::cuda {

/// rope_write.cu: qk_norm_rope and rope_and_write_kv for layouts that have vectors.
void rope_vectors(const RopeParams& params, const char* name, Stream stream);

/// Tokens per SM below which there are few, and heads are spread over as many threads as there are.
inline constexpr int kManyTokensPerSm = 8;

/// Heads of q, then of k, then of v, numbered as one list.
enum class HeadKind { kQuery, kKey, kValue };

/// One pair. Which product is fused is fixed, so that every kernel and the CPU give the same bits.
__device__ __forceinline__ void rotate(float& a, float& b, float cos, float sin) {
  const float rotated_a = fmaf(a, cos, -__fmul_rn(b, sin));
  b = fmaf(b, cos, __fmul_rn(a, sin));
  a = rotated_a;
}

/// The pairs of two vectors, x[0, kVec) and x[kVec, 2 kVec): an element of each, or neighbours.
template <int kVec>
__device__ __forceinline__ void rotate_vectors(float (&x)[2 * kVec], const float (&cos)[kVec], const float (&sin)[kVec], bool is_neox) {
  if (is_neox) {
#pragma unroll
    for (int e = 0; e < kVec; ++e) rotate(x[e], x[e + kVec], cos[e], sin[e]);
  } else {
#pragma unroll
    for (int e = 0; e < kVec; ++e) rotate(x[2 * e], x[2 * e + 1], cos[e], sin[e]);
  }
}

__device__ __forceinline__ std::int64_t read_index(const void* indices, DType dtype, std::int64_t at) {
  return dtype == DType::kInt64 ? static_cast<const std::int64_t*>(indices)[at] : static_cast<const std::int32_t*>(indices)[at];
}

__device__ __forceinline__ bool is_known(const RopeParams& p, std::int64_t position) {
  return position >= 0 && position < p.rotary.max_position;
}

/// By one thread of a token.
__device__ __forceinline__ void record_bad_indices(const RopeParams& p, ErrorWord* error_word, std::int64_t token, std::int64_t position,
                                                   std::int64_t slot) {
  if (!is_known(p, position) && position != -1) record_error(error_word, p.op, ArgId::kPositions, token, position);
  if (slot < -1 || slot >= p.kv.num_blocks * p.kv.block_size) record_error(error_word, p.op, ArgId::kSlotMapping, token, slot);
}

/// x at `element` of a cache of any float dtype, which is a run-time value: its branch is uniform.
template <typename T, int kVec>
__device__ __forceinline__ void store_as_float(void* cache, DType dtype, std::int64_t element, const Packed<T, kVec>& x) {
  float v[kVec];
  unpack<T, kVec>(v, x);
  switch (dtype) {
    case DType::kFloat32: return store_floats(static_cast<float*>(cache) + element, v);
    case DType::kFloat16: return store_floats(static_cast<__half*>(cache) + element, v);
    default: return store_floats(static_cast<__nv_bfloat16*>(cache) + element, v);
  }
}

}  // namespace quire::cuda
