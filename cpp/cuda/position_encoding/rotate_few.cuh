// rotary_embedding of few tokens, which costs a launch and two latencies: nothing general on the way to the first loads.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <bit>
#include <cstdint>

#include "cuda/device/dependent_launch.cuh"
#include "cuda/position_encoding/shared.cuh"

namespace quire::cuda {

// Parameters in the order of their use. Strides are counted in vectors of four elements.
struct FewTokens {
  const void* positions;
  void* q;
  void* k;
  const void* cos_sin_cache;
  std::uint32_t position_step;  // bytes
  std::uint32_t q_token_stride, q_head_stride;
  std::uint16_t num_heads;
  std::uint8_t lanes_shift;  // lanes of a head are two to this
  bool positions_are_int64 : 1, is_neox : 1;
  // Here ends a line of the constant cache.
  std::uint32_t k_token_stride, k_head_stride, num_all_heads, half_vectors, max_position;
  ErrorWord* error_word;
};

// Threads of a CTA, and pairs of a thread.
inline constexpr int kFewThreads = 128, kFewVec = 4;

// Grid: (heads of a CTA, tokens). A thread rotates four pairs of one head.
template <typename T, typename Table>
__global__ void __launch_bounds__(kFewThreads) rotate_few_tokens_kernel(const __grid_constant__ FewTokens p) {
  constexpr int kVec = kFewVec;
  using Vector = Packed<T, kVec>;
  using Angles = Packed<Table, kVec>;
  const std::uint32_t token = blockIdx.y;
  const auto* const words = reinterpret_cast<const std::uint32_t*>(static_cast<const char*>(p.positions) + token * p.position_step);
  device::wait_for_predecessor();

  // Load. The angles wait for the position, whose halves have registers of their own: nothing in between does.
  IndexBits position;
  position.bits = {words[0], 0};
  if (p.positions_are_int64) position.bits.y = words[1];
  const std::uint32_t lane = threadIdx.x & ((1u << p.lanes_shift) - 1);
  const std::uint32_t head = (blockIdx.x * kFewThreads + threadIdx.x) >> p.lanes_shift;
  const bool is_query = head < p.num_heads, is_inside = head < p.num_all_heads && lane < p.half_vectors;
  const std::uint32_t row =
      is_query ? token * p.q_token_stride + head * p.q_head_stride : token * p.k_token_stride + (head - p.num_heads) * p.k_head_stride;
  Vector* const first_at = static_cast<Vector*>(is_query ? p.q : p.k) + (row + (p.is_neox ? lane : 2 * lane));
  Vector* const second_at = first_at + (p.is_neox ? p.half_vectors : 1);
  Vector first{}, second{};
  if (is_inside) first = load_raw<sizeof(Vector)>(first_at);
  if (is_inside) second = load_raw<sizeof(Vector)>(second_at);
  const bool known = position.bits.y == 0 && position.bits.x < p.max_position;
  const Angles* const cos_at = static_cast<const Angles*>(p.cos_sin_cache) + (position.bits.x * (2 * p.half_vectors) + lane);
  Angles cos_bits{}, sin_bits{};
  if (known && is_inside) cos_bits = load_raw<sizeof(Angles)>(cos_at);
  if (known && is_inside) sin_bits = load_raw<sizeof(Angles)>(cos_at + p.half_vectors);
  if (!known) {
    const std::int64_t value = position.value(p.positions_are_int64);
    if (value != -1 && blockIdx.x == 0 && threadIdx.x == 0)
      record_error(p.error_word, OpId::kRotaryEmbedding, ArgId::kPositions, token, value);
    return;
  }
  if (!is_inside) return;

  // Rotate and store.
  float cos[kVec], sin[kVec], x[2 * kVec];
  unpack<Table, kVec>(cos, cos_bits);
  unpack<Table, kVec>(sin, sin_bits);
  unpack<T, kVec>(reinterpret_cast<float (&)[kVec]>(x[0]), first);
  unpack<T, kVec>(reinterpret_cast<float (&)[kVec]>(x[kVec]), second);
  rotate_vectors<kVec>(x, cos, sin, p.is_neox);
  store_raw(first_at, pack<T, kVec>(reinterpret_cast<const float (&)[kVec]>(x[0])));
  store_raw(second_at, pack<T, kVec>(reinterpret_cast<const float (&)[kVec]>(x[kVec])));
}

/// Rotates few tokens of whole heads, where layouts have vectors and numbers 32 bits; else does nothing and is false.
template <typename T>
bool rotate_few_tokens(const RotaryParams& p, Stream stream) {
  constexpr std::int64_t kMost = 0xffffffff;
  const bool positions_are_int64 = p.position_dtype == DType::kInt64;
  const std::int64_t position_step = p.num_tokens == 1 ? 0 : p.position_stride * itemsize(p.position_dtype);
  const std::int64_t num_kv_heads = p.k == nullptr ? 0 : p.num_kv_heads, num_all_heads = p.num_heads + num_kv_heads;
  const std::int64_t half_vectors = p.rotary_dim / 2 / kFewVec;
  // Where the last vector of all heads lies, or more than kMost.
  const auto last_of = [&](std::int64_t num_heads, std::int64_t token_stride, std::int64_t head_stride) {
    if (num_heads == 0) return std::int64_t{0};
    const auto part = [](std::int64_t count, std::int64_t stride) {
      return count == 1 ? 0 : stride < 0 || stride % kFewVec != 0 || stride > kMost / count ? kMost + 1 : (count - 1) * stride / kFewVec;
    };
    return part(p.num_tokens, token_stride) + part(num_heads, head_stride) + 2 * half_vectors;
  };
  if (p.num_tokens >= kManyTokensPerSm * current_device_properties().num_sms || p.num_tokens > 0xffff || p.head_dim != p.rotary_dim ||
      half_vectors > kFewThreads || p.num_heads > 0xffff || num_all_heads > 0xffff || position_step < 0 ||
      position_step > kMost / p.num_tokens || p.max_position > kMost / (2 * half_vectors) ||
      last_of(p.num_heads, p.q_token_stride, p.q_head_stride) > kMost || last_of(num_kv_heads, p.k_token_stride, p.k_head_stride) > kMost ||
      (p.cache_dtype != p.dtype && p.cache_dtype != DType::kFloat32))
    return false;
  const auto lanes_shift = static_cast<unsigned>(std::bit_width(static_cast<std::uint64_t>(half_vectors - 1)));
  const auto stride = [](std::int64_t elements) { return static_cast<std::uint32_t>(elements / kFewVec); };
  const FewTokens tokens{p.positions,
                         p.q,
                         p.k,
                         p.cos_sin_cache,
                         static_cast<std::uint32_t>(position_step),
                         stride(p.q_token_stride),
                         stride(p.q_head_stride),
                         static_cast<std::uint16_t>(p.num_heads),
                         static_cast<std::uint8_t>(lanes_shift),
                         positions_are_int64,
                         p.style == RopeStyle::kNeox,
                         stride(p.k_token_stride),
                         stride(p.k_head_stride),
                         static_cast<std::uint32_t>(num_all_heads),
                         static_cast<std::uint32_t>(half_vectors),
                         static_cast<std::uint32_t>(p.max_position),
                         error_word()};
  const auto num_ctas = static_cast<unsigned>(ceil_div(num_all_heads << lanes_shift, kFewThreads));
  const auto launch = [&](void (*kernel)(FewTokens)) {
    launch_waiting("rotary_embedding", kernel, dim3(num_ctas, static_cast<unsigned>(p.num_tokens)), kFewThreads, stream, tokens);
  };
  p.cache_dtype == DType::kFloat32 ? launch(rotate_few_tokens_kernel<T, float>) : launch(rotate_few_tokens_kernel<T, T>);
  return true;
}

}  // namespace quire::cuda
