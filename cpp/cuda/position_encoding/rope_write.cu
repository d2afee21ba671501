// Rotation of q and k and the write to the cache, in one pass, on CUDA.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <bit>
#include <type_traits>

#include "core/dispatch.h"
#include "cuda/position_encoding/shared.cuh"

namespace quire::cuda {
namespace {

constexpr int kThreads = 256;
// Heads that a thread takes at once.
constexpr int kHeadsPerThread = 2;
// Threads of this kernel that an SM holds at once: with the registers that more of them would leave, it spills.
constexpr int kResidentThreads = 768;
// Tokens per SM below which heads are spread over as many threads as there are.
constexpr int kManyTokensPerSm = 8;

struct Head {
  HeadKind kind;
  int index;  // within its tensor
};

__device__ __forceinline__ Head head_of(const RopeParams& p, int number) {
  const int num_heads = static_cast<int>(p.rotary.num_heads), num_kv_heads = static_cast<int>(p.kv.num_kv_heads);
  if (number < num_heads) return {HeadKind::kQuery, number};
  if (number < num_heads + num_kv_heads) return {HeadKind::kKey, number - num_heads};
  return {HeadKind::kValue, number - num_heads - num_kv_heads};
}

template <typename T>
__device__ __forceinline__ const T* head_source(const RopeParams& p, Head head, std::int64_t token) {
  if (head.kind == HeadKind::kQuery)
    return static_cast<const T*>(p.rotary.q) + token * p.rotary.q_token_stride + head.index * p.rotary.q_head_stride;
  if (head.kind == HeadKind::kKey) return static_cast<const T*>(p.kv.k) + token * p.kv.k_token_stride + head.index * p.kv.k_head_stride;
  return static_cast<const T*>(p.kv.v) + token * p.kv.v_token_stride + head.index * p.kv.v_head_stride;
}

// Where a rotated head goes besides the cache; null: nowhere.
template <typename T>
__device__ __forceinline__ T* head_target(const RopeParams& p, Head head, std::int64_t token) {
  if (head.kind == HeadKind::kQuery)
    return static_cast<T*>(p.rotary.q) + token * p.rotary.q_token_stride + head.index * p.rotary.q_head_stride;
  if (head.kind == HeadKind::kValue || p.rotary.k == nullptr) return nullptr;
  return static_cast<T*>(p.rotary.k) + token * p.rotary.k_token_stride + head.index * p.rotary.k_head_stride;
}

// A head of K or V in its slot.
struct CacheHead {
  void* data;            // the cache
  std::int64_t element;  // of the head's first element
};

__device__ __forceinline__ CacheHead cache_head(const RopeParams& p, Head head, std::int64_t slot) {
  const KvParams& kv = p.kv;
  const std::int64_t block_idx = divide(slot, kv.block_size), offset = slot - block_idx * kv.block_size;
  if (head.kind == HeadKind::kKey)
    return {kv.k_cache, block_idx * kv.k_cache_block_stride + offset * kv.k_cache_slot_stride + head.index * kv.k_cache_head_stride};
  return {kv.v_cache, block_idx * kv.v_cache_block_stride + offset * kv.v_cache_slot_stride + head.index * kv.v_cache_head_stride};
}

__device__ __forceinline__ float cache_scale(const RopeParams& p, Head head) {
  const bool is_key = head.kind == HeadKind::kKey;
  const float* const scale = is_key ? p.kv.k_scale : p.kv.v_scale;
  return scale == nullptr ? 1.0f : scale[head.index * (is_key ? p.kv.k_scale_stride : p.kv.v_scale_stride)];
}

// x in the cache's dtype.
template <typename T, int kVec>
__device__ __forceinline__ void store_to_cache(const RopeParams& p, CacheHead to, int at, const Packed<T, kVec>& x,
                                               const Divisor& divisor) {
  if (p.kv.cache_dtype == p.rotary.dtype) {
    store_raw(static_cast<T*>(to.data) + to.element + at, x);
  } else {
    store_converted<T, kVec>(to.data, p.kv.cache_dtype, to.element + at, x, divisor);
  }
}

// Grid: work item = blockDim.z tokens x one chunk of heads; gridDim.x CTAs walk all items. Thread (x, y, z) has two vectors of kVec
// elements of up to kHeadsPerThread heads: those that rotate with each other, and past rotary_dim those that follow each other.
// blockDim.x, a power of two up to 32, covers a head. Position and slot of the next item are read ahead.
template <typename T, int kVec>
__global__ void __launch_bounds__(kThreads, kResidentThreads / kThreads)
    rope_and_write_kernel(const __grid_constant__ RopeParams p, ErrorWord* const error_word, const int num_head_chunks,
                          const std::int64_t num_items) {
  const RotaryParams& r = p.rotary;
  const int head_dim = static_cast<int>(r.head_dim), half = static_cast<int>(r.rotary_dim) / 2;
  const int num_all_heads = static_cast<int>(r.num_heads + 2 * p.kv.num_kv_heads);
  const bool is_neox = r.style == RopeStyle::kNeox;
  const int angle = static_cast<int>(threadIdx.x) * kVec;
  const bool rotates = angle < half;
  const int first_at = rotates && is_neox ? angle : 2 * angle, second_at = rotates && is_neox ? angle + half : 2 * angle + kVec;
  const bool has_first = first_at < head_dim, has_second = second_at < head_dim;
  const std::int64_t num_slots = p.kv.num_blocks * p.kv.block_size;
  const auto token_of = [&](std::int64_t item) {
    return (num_head_chunks == 1 ? item : divide(item, num_head_chunks)) * blockDim.z + threadIdx.z;
  };
  const auto read_ahead = [&](std::int64_t item, std::int64_t& position, std::int64_t& slot) {
    const std::int64_t token = token_of(item);
    if (item >= num_items || token >= r.num_tokens) return;
    position = read_index(r.positions, r.position_dtype, token * r.position_stride);
    slot = read_index(p.kv.slot_mapping, p.kv.slot_dtype, token * p.kv.slot_stride);
  };

  std::int64_t next_position = -1, next_slot = -1;
  read_ahead(blockIdx.x, next_position, next_slot);
  for (std::int64_t item = blockIdx.x; item < num_items; item += gridDim.x) {
    const std::int64_t position = next_position, slot = next_slot, token = token_of(item);
    read_ahead(item + gridDim.x, next_position, next_slot);
    const int head_chunk = num_head_chunks == 1 ? 0 : static_cast<int>(item - divide(item, num_head_chunks) * num_head_chunks);
    if (token >= r.num_tokens) continue;
    const auto number_of = [&](int i) { return static_cast<int>((head_chunk * kHeadsPerThread + i) * blockDim.y + threadIdx.y); };

    // Load.
    Packed<T, kVec> firsts[kHeadsPerThread], seconds[kHeadsPerThread];
#pragma unroll
    for (int i = 0; i < kHeadsPerThread; ++i) {
      firsts[i] = seconds[i] = {};
      if (number_of(i) >= num_all_heads) continue;
      const T* const source = head_source<T>(p, head_of(p, number_of(i)), token);
      if (has_first) firsts[i] = load_packed<T, kVec>(source + first_at);
      if (has_second) seconds[i] = load_packed<T, kVec>(source + second_at);
    }
    const bool known = is_known(p, position);
    const bool in_cache = slot >= 0 && slot < num_slots;
    if (head_chunk == 0 && threadIdx.x == 0 && threadIdx.y == 0) record_bad_indices(p, error_word, token, position, slot);
    float cos_sin[2][kVec];
    if (known && rotates && head_of(p, number_of(0)).kind != HeadKind::kValue)
      load_parameter(cos_sin, r.cos_sin_cache, r.cache_dtype, position * r.rotary_dim + angle, half, r.max_position * r.rotary_dim);

#pragma unroll
    for (int i = 0; i < kHeadsPerThread; ++i) {
      if (number_of(i) >= num_all_heads) continue;
      const Head head = head_of(p, number_of(i));

      // Rotate.
      if (known && head.kind != HeadKind::kValue) {
        float x[2 * kVec];
        unpack<T, kVec>(reinterpret_cast<float (&)[kVec]>(x[0]), firsts[i]);
        unpack<T, kVec>(reinterpret_cast<float (&)[kVec]>(x[kVec]), seconds[i]);
        if (rotates) {
#pragma unroll
          for (int e = 0; e < kVec; ++e) {
            if (is_neox) {
              rotate(x[e], x[e + kVec], cos_sin[0][e], cos_sin[1][e]);
            } else {
              rotate(x[2 * e], x[2 * e + 1], cos_sin[0][e], cos_sin[1][e]);
            }
          }
        }
        firsts[i] = pack<T, kVec>(reinterpret_cast<const float (&)[kVec]>(x[0]));
        seconds[i] = pack<T, kVec>(reinterpret_cast<const float (&)[kVec]>(x[kVec]));
      }

      // Store.
      T* const target = head_target<T>(p, head, token);
      if (target != nullptr) {
        if (has_first) store_raw(target + first_at, firsts[i]);
        if (has_second) store_raw(target + second_at, seconds[i]);
      }
      if (head.kind != HeadKind::kQuery && in_cache) {
        const CacheHead to = cache_head(p, head, slot);
        const Divisor divisor(cache_scale(p, head));
        if (has_first) store_to_cache<T, kVec>(p, to, first_at, firsts[i], divisor);
        if (has_second) store_to_cache<T, kVec>(p, to, second_at, seconds[i], divisor);
      }
    }
  }
}

template <typename T, int kVec>
void launch_rope_and_write(const RopeParams& p, const char* name, Stream stream) {
  const RotaryParams& r = p.rotary;
  const std::int64_t lanes = std::bit_ceil(static_cast<std::uint64_t>(ceil_div(r.head_dim / kVec, 2)));
  const std::int64_t num_all_heads = r.num_heads + 2 * p.kv.num_kv_heads;
  const DeviceProperties& device = current_device_properties();
  const bool many_tokens = r.num_tokens >= kManyTokensPerSm * device.num_sms;
  const std::int64_t head_lanes = std::min(many_tokens ? ceil_div(num_all_heads, kHeadsPerThread) : num_all_heads, kThreads / lanes);
  // z is limited to 64 by the hardware.
  const std::int64_t tokens_per_cta = many_tokens ? std::min<std::int64_t>(kThreads / (lanes * head_lanes), 64) : 1;
  const std::int64_t num_head_chunks = ceil_div(num_all_heads, head_lanes * kHeadsPerThread);
  const std::int64_t num_items = ceil_div(r.num_tokens, tokens_per_cta) * num_head_chunks;
  const dim3 block(static_cast<unsigned>(lanes), static_cast<unsigned>(head_lanes), static_cast<unsigned>(tokens_per_cta));
  const std::int64_t limit = many_tokens ? device.num_sms * (kResidentThreads / (lanes * head_lanes * tokens_per_cta)) : 0x7fffffff;
  const auto num_ctas = static_cast<unsigned>(std::min(num_items, limit));
  rope_and_write_kernel<T, kVec>
      <<<num_ctas, block, 0, cuda_stream(stream)>>>(p, error_word(), static_cast<int>(num_head_chunks), num_items);
  QUIRE_CHECK_LAUNCH(name, stream);
}

}  // namespace

void rope_and_write_vectors(const RopeParams& params, const char* name, Stream stream) {
  dispatch_float(params.rotary.dtype, name, [&](auto dtype) {
    using T = Element<decltype(dtype)::value>;
    launch_rope_and_write<T, kElementsPer16Bytes<T>>(params, name, stream);
  });
}

}  // namespace quire::cuda
