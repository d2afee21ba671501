// Rotary position encoding on CUDA.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <string>

#include "core/dispatch.h"
#include "core/explain_vectors.h"
#include "cuda/device/dependent_launch.cuh"
#include "cuda/device/divisor.cuh"
#include "cuda/device/reduce.cuh"
#include "cuda/position_encoding/rotate_few.cuh"
#include "cuda/position_encoding/shared.cuh"
#include "quire/error.h"

namespace quire::cuda {
namespace {

constexpr int kThreads = 256;
// Heads that a thread rotates by one set of angles; their loads are in flight together.
constexpr int kHeadsPerThread = 2;
// Threads of this kernel that an SM holds at once: the registers of a thread are bounded accordingly.
constexpr int kResidentThreads = 1024;

// Grid: work item = blockDim.z tokens x one chunk of heads x one chunk of angles; gridDim.x CTAs walk all items. Thread (x, y, z)
// rotates kVec pairs of up to kHeadsPerThread heads of a token; the heads of q and k are numbered as one list. The position of
// the next item is read ahead, so that an item's pairs and angles are fetched together.
template <typename T, RopeStyle kStyle, int kVec>
__global__ void __launch_bounds__(kThreads, kResidentThreads / kThreads)
    rotary_embedding_kernel(const __grid_constant__ RotaryParams p, ErrorWord* const error_word, const std::int64_t num_head_chunks,
                            const std::int64_t num_angle_chunks, const std::int64_t num_items) {
  device::wait_for_predecessor();
  const std::int64_t half = p.rotary_dim / 2;
  const std::int64_t num_all_heads = p.num_heads + p.num_kv_heads;
  const std::int64_t per_token = num_head_chunks * num_angle_chunks;
  const auto token_of = [&](std::int64_t item) { return (per_token == 1 ? item : divide(item, per_token)) * blockDim.z + threadIdx.z; };
  const auto read_position = [&](std::int64_t item) -> std::int64_t {
    const std::int64_t token = token_of(item);
    if (item >= num_items || token >= p.num_tokens) return -1;
    return read_index(p.positions, p.position_dtype, token * p.position_stride);
  };
  std::int64_t next_position = read_position(blockIdx.x);
  for (std::int64_t item = blockIdx.x; item < num_items; item += gridDim.x) {
    const std::int64_t position = next_position;
    next_position = read_position(item + gridDim.x);
    const std::int64_t chunk = per_token == 1 ? 0 : item - divide(item, per_token) * per_token;
    const std::int64_t head_chunk = num_angle_chunks == 1 ? chunk : divide(chunk, num_angle_chunks);
    const std::int64_t angle = ((chunk - head_chunk * num_angle_chunks) * blockDim.x + threadIdx.x) * kVec;
    const std::int64_t token = token_of(item);
    if (token >= p.num_tokens || angle >= half) continue;

    // Load the pairs.
    constexpr bool kNeox = kStyle == RopeStyle::kNeox;
    const std::int64_t first_at = kNeox ? angle : 2 * angle;
    const std::int64_t second_at = kNeox ? angle + half : 2 * angle + kVec;
    T* rows[kHeadsPerThread];
    Packed<T, kVec> firsts[kHeadsPerThread], seconds[kHeadsPerThread];
#pragma unroll
    for (int i = 0; i < kHeadsPerThread; ++i) {
      const std::int64_t head = (head_chunk * kHeadsPerThread + i) * blockDim.y + threadIdx.y;
      rows[i] = nullptr;
      if (head >= num_all_heads) continue;
      rows[i] = head < p.num_heads ? static_cast<T*>(p.q) + token * p.q_token_stride + head * p.q_head_stride
                                   : static_cast<T*>(p.k) + token * p.k_token_stride + (head - p.num_heads) * p.k_head_stride;
      firsts[i] = load_packed<T, kVec>(rows[i] + first_at);
      seconds[i] = load_packed<T, kVec>(rows[i] + second_at);
    }

    // Angles.
    if (position < 0 || position >= p.max_position) {
      if (position != -1 && chunk == 0 && threadIdx.x == 0 && threadIdx.y == 0)
        record_error(error_word, OpId::kRotaryEmbedding, ArgId::kPositions, token, position);
      continue;
    }
    float cos_sin[2][kVec];
    load_parameter(cos_sin, p.cos_sin_cache, p.cache_dtype, position * p.rotary_dim + angle, half, p.max_position * p.rotary_dim);

    // Rotate and store.
#pragma unroll
    for (int i = 0; i < kHeadsPerThread; ++i) {
      if (rows[i] == nullptr) continue;
      float x[2 * kVec];
      unpack<T, kVec>(reinterpret_cast<float (&)[kVec]>(x[0]), firsts[i]);
      unpack<T, kVec>(reinterpret_cast<float (&)[kVec]>(x[kVec]), seconds[i]);
      rotate_vectors<kVec>(x, cos_sin[0], cos_sin[1], kNeox);
      store_floats(rows[i] + first_at, reinterpret_cast<const float (&)[kVec]>(x[0]));
      store_floats(rows[i] + second_at, reinterpret_cast<const float (&)[kVec]>(x[kVec]));
    }
  }
}

template <typename T, RopeStyle kStyle, int kVec>
void launch_rotary(const RotaryParams& p, Stream stream) {
  const std::int64_t num_angle_vectors = p.rotary_dim / 2 / kVec;
  const std::int64_t num_all_heads = p.num_heads + p.num_kv_heads;
  const std::int64_t lanes = std::min<std::int64_t>(num_angle_vectors, kThreads);
  const bool many_tokens = p.num_tokens >= kManyTokensPerSm * current_device_properties().num_sms;
  const std::int64_t head_lanes = std::min(many_tokens ? ceil_div(num_all_heads, kHeadsPerThread) : num_all_heads, kThreads / lanes);
  // z is limited to 64 by the hardware.
  const std::int64_t tokens_per_cta = many_tokens ? std::min<std::int64_t>(kThreads / (lanes * head_lanes), 64) : 1;
  const std::int64_t num_angle_chunks = ceil_div(num_angle_vectors, lanes);
  const std::int64_t num_head_chunks = ceil_div(num_all_heads, head_lanes * kHeadsPerThread);
  const std::int64_t num_items = ceil_div(p.num_tokens, tokens_per_cta) * num_head_chunks * num_angle_chunks;
  const dim3 block(static_cast<unsigned>(lanes), static_cast<unsigned>(head_lanes), static_cast<unsigned>(tokens_per_cta));
  const auto num_ctas = static_cast<unsigned>(std::min<std::int64_t>(num_items, 0x7fffffff));
  launch_waiting("rotary_embedding", rotary_embedding_kernel<T, kStyle, kVec>, num_ctas, block, stream, p, error_word(), num_head_chunks,
                 num_angle_chunks, num_items);
}

// ---- A norm of each head, rotation, and the write to the cache, for layouts that have no vectors ----

// One head of a call: where it is read and written at token 0 and slot 0.
template <typename T>
struct Head {
  HeadKind kind;
  const T* source;
  T* target;                   // besides the cache; null: nowhere
  void* cache;                 // null: nowhere
  std::int64_t cache_element;  // of the head's first element

  __device__ __forceinline__ Head(const RopeParams& p, int number) {
    const RotaryParams& r = p.rotary;
    const KvParams& kv = p.kv;
    const int num_heads = static_cast<int>(r.num_heads), num_kv_heads = static_cast<int>(kv.num_kv_heads);
    cache = nullptr;
    cache_element = 0;
    if (number < num_heads) {
      kind = HeadKind::kQuery;
      target = static_cast<T*>(r.q) + number * r.q_head_stride;
      source = target;
    } else if (number < num_heads + num_kv_heads) {
      const int index = number - num_heads;
      kind = HeadKind::kKey;
      source = static_cast<const T*>(kv.k) + index * kv.k_head_stride;
      target = r.k == nullptr ? nullptr : static_cast<T*>(r.k) + index * r.k_head_stride;
      cache = kv.k_cache;
      cache_element = index * kv.k_cache_head_stride;
    } else {
      const int index = number - num_heads - num_kv_heads;
      kind = HeadKind::kValue;
      source = static_cast<const T*>(kv.v) + index * kv.v_head_stride;
      target = nullptr;
      cache = kv.v_cache;
      cache_element = index * kv.v_cache_head_stride;
    }
  }

  __device__ __forceinline__ const T* source_at(const RopeParams& p, std::int64_t token) const {
    return source + token * (kind == HeadKind::kQuery ? p.rotary.q_token_stride
                             : kind == HeadKind::kKey ? p.kv.k_token_stride
                                                      : p.kv.v_token_stride);
  }
  __device__ __forceinline__ T* target_at(const RopeParams& p, std::int64_t token) const {
    return target + token * (kind == HeadKind::kQuery ? p.rotary.q_token_stride : p.rotary.k_token_stride);
  }
  __device__ __forceinline__ std::int64_t cache_element_at(const RopeParams& p, std::int64_t block_idx, std::int64_t offset) const {
    const bool is_key = kind == HeadKind::kKey;
    return cache_element + block_idx * (is_key ? p.kv.k_cache_block_stride : p.kv.v_cache_block_stride) +
           offset * (is_key ? p.kv.k_cache_slot_stride : p.kv.v_cache_slot_stride);
  }
};

// `number` is that of the head.
__device__ __forceinline__ float cache_scale(const RopeParams& p, HeadKind kind, int number) {
  const bool is_key = kind == HeadKind::kKey;
  const float* const scale = is_key ? p.kv.k_scale : p.kv.v_scale;
  const int index = number - static_cast<int>(p.rotary.num_heads + (is_key ? 0 : p.kv.num_kv_heads));
  return kind == HeadKind::kQuery || scale == nullptr ? 1.0f : scale[index * (is_key ? p.kv.k_scale_stride : p.kv.v_scale_stride)];
}

// One weight of a norm, its offset added.
__device__ __forceinline__ float head_weight(const RopeParams& p, bool is_query, std::int64_t at) {
  float weight[1][1];
  load_parameter(weight, is_query ? p.norm.q_weight : p.norm.k_weight, is_query ? p.norm.q_weight_dtype : p.norm.k_weight_dtype, at, 0,
                 p.rotary.head_dim);
  return weight[0][0] + p.norm.weight_offset;
}

// x at `element` of a cache of any dtype.
template <typename T>
__device__ __forceinline__ void store_converted(void* cache, DType dtype, std::int64_t element, const Packed<T, 1>& x,
                                                const Divisor& divisor) {
  float v[1];
  unpack<T, 1>(v, x);
  switch (dtype) {
    case DType::kFloat8E4M3FN: return store_raw(static_cast<__nv_fp8_e4m3*>(cache) + element, divisor.divide_and_pack<__nv_fp8_e4m3>(v));
    case DType::kFloat8E5M2: return store_raw(static_cast<__nv_fp8_e5m2*>(cache) + element, divisor.divide_and_pack<__nv_fp8_e5m2>(v));
    case DType::kInt8: return store_raw(static_cast<std::int8_t*>(cache) + element, divisor.divide_and_pack<std::int8_t>(v));
    default: return store_as_float<T, 1>(cache, dtype, element, x);
  }
}

// Grid: one warp per (token, head) and step, for layouts that have no vectors. An element is read again by the lane that sums its
// square or the one that rotates it, and written only by the latter, after the sum.
template <typename T>
__global__ void __launch_bounds__(kThreads) rope_element_kernel(const __grid_constant__ RopeParams p, ErrorWord* const error_word) {
  device::wait_for_predecessor();
  const RotaryParams& r = p.rotary;
  const int head_dim = static_cast<int>(r.head_dim), half = static_cast<int>(r.rotary_dim) / 2;
  const int num_all_heads = static_cast<int>(r.num_heads + (p.kv.v == nullptr ? 1 : 2) * p.kv.num_kv_heads);
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * (kThreads / kWarpSize);
  std::int64_t item = static_cast<std::int64_t>(blockIdx.x) * (kThreads / kWarpSize) + threadIdx.x / kWarpSize;
  for (; item < r.num_tokens * num_all_heads; item += step) {
    const std::int64_t token = divide(item, num_all_heads);
    const int number = static_cast<int>(item - token * num_all_heads);
    const Head<T> head(p, number);
    const std::int64_t position = read_index(r.positions, r.position_dtype, token * r.position_stride);
    const std::int64_t slot = p.kv.k_cache == nullptr ? -1 : read_index(p.kv.slot_mapping, p.kv.slot_dtype, token * p.kv.slot_stride);
    const bool known = is_known(p, position) && head.kind != HeadKind::kValue;
    if (number == 0 && lane == 0) record_bad_indices(p, error_word, token, position, slot);
    const T* const source = head.source_at(p, token);
    T* const target = head.target == nullptr ? nullptr : head.target_at(p, token);
    const bool in_cache = head.cache != nullptr && slot >= 0 && slot < p.kv.num_blocks * p.kv.block_size;
    const std::int64_t block_idx = in_cache ? divide(slot, p.kv.block_size) : 0;
    const std::int64_t element = in_cache ? head.cache_element_at(p, block_idx, slot - block_idx * p.kv.block_size) : 0;
    const Divisor divisor(in_cache ? cache_scale(p, head.kind, number) : 1.0f);
    const bool normalises = known && p.norm.q_weight != nullptr, is_query = head.kind == HeadKind::kQuery;
    float inverse = 1.0f;
    if (normalises) {
      float sum = 0.0f;
      for (int i = lane; i < head_dim; i += kWarpSize) sum = fmaf(to_float<T>(source[i]), to_float<T>(source[i]), sum);
      inverse = __frsqrt_rn(warp_sum(sum) / static_cast<float>(head_dim) + p.norm.eps);
    }

    for (int pair = lane; 2 * pair < head_dim; pair += kWarpSize) {
      const bool apart = pair < half && r.style == RopeStyle::kNeox;
      const int at[2] = {apart ? pair : 2 * pair, apart ? pair + half : 2 * pair + 1};
      float x[2] = {to_float<T>(source[at[0]]), at[1] < head_dim ? to_float<T>(source[at[1]]) : 0.0f};
      if (normalises) {
        x[0] = x[0] * inverse * head_weight(p, is_query, at[0]);
        x[1] = x[1] * inverse * head_weight(p, is_query, at[1]);
      }
      if (known && pair < half) {
        float cos_sin[2][1];
        load_parameter(cos_sin, r.cos_sin_cache, r.cache_dtype, position * r.rotary_dim + pair, half, r.max_position * r.rotary_dim);
        rotate(x[0], x[1], cos_sin[0][0], cos_sin[1][0]);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (at[i] >= head_dim) continue;
        // What is not computed with keeps its bits.
        Packed<T, 1> packed = load_packed<T, 1>(source + at[i]);
        if (known) packed = pack<T, 1>(reinterpret_cast<const float (&)[1]>(x[i]));
        if (target != nullptr) store_raw(target + at[i], packed);
        if (!in_cache) continue;
        if (p.kv.cache_dtype == r.dtype) {
          store_raw(static_cast<T*>(head.cache) + element + at[i], packed);
        } else {
          store_converted<T>(head.cache, p.kv.cache_dtype, element + at[i], packed, divisor);
        }
      }
    }
  }
}

template <typename T>
void launch_rope_elements(const RopeParams& p, const char* name, Stream stream) {
  const std::int64_t num_heads = p.rotary.num_heads + (p.kv.v == nullptr ? 1 : 2) * p.kv.num_kv_heads;
  const std::int64_t num_ctas = ceil_div(p.rotary.num_tokens * num_heads, kThreads / kWarpSize);
  launch_waiting(name, rope_element_kernel<T>, static_cast<unsigned>(std::min<std::int64_t>(num_ctas, 0x7fffffff)), kThreads, stream, p,
                 error_word());
}

// Whether heads, if there are any, can be read in 16-byte accesses.
template <typename T>
bool heads_are_vectors(const void* data, std::int64_t num_tokens, std::int64_t token_stride, std::int64_t num_heads,
                       std::int64_t head_stride) {
  return data == nullptr || num_heads == 0 ||
         (is_aligned(data, 16) && keeps_alignment(num_tokens, token_stride, sizeof(T), 16) &&
          keeps_alignment(num_heads, head_stride, sizeof(T), 16));
}

}  // namespace

void rotary_embedding(const RotaryParams& params, Stream stream) {
  dispatch_float(params.dtype, "rotary_embedding", [&](auto dtype) {
    using T = Element<decltype(dtype)::value>;
    constexpr int kVec = kElementsPer16Bytes<T>;
    const auto are_vectors = [&](const void* data, std::int64_t num_heads, std::int64_t token_stride, std::int64_t head_stride) {
      return heads_are_vectors<T>(data, params.num_tokens, token_stride, num_heads, head_stride);
    };
    const char* const obstacle = params.rotary_dim / 2 % kVec != 0                                                       ? "rotary_dim"
                                 : !parameter_is_vectors(params.cos_sin_cache, params.cache_dtype, kVec)                 ? "cos_sin_cache"
                                 : !are_vectors(params.q, params.num_heads, params.q_token_stride, params.q_head_stride) ? "q"
                                 : !are_vectors(params.k, params.num_kv_heads, params.k_token_stride, params.k_head_stride) ? "k"
                                                                                                                            : nullptr;
    if (explain_vectors(obstacle)) return;
    const bool neox = params.style == RopeStyle::kNeox;
    if (obstacle == nullptr && rotate_few_tokens<T>(params, stream)) return;
    if (obstacle == nullptr) {
      neox ? launch_rotary<T, RopeStyle::kNeox, kVec>(params, stream) : launch_rotary<T, RopeStyle::kGptj, kVec>(params, stream);
    } else {
      neox ? launch_rotary<T, RopeStyle::kNeox, 1>(params, stream) : launch_rotary<T, RopeStyle::kGptj, 1>(params, stream);
    }
  });
}

void rope(const RopeParams& params, Stream stream) {
  const char* const name = params.op == OpId::kQkNormRope ? "qk_norm_rope" : "rope_and_write_kv";
  const RotaryParams& r = params.rotary;
  const KvParams& kv = params.kv;
  // A kernel counts heads and a head's elements in 32 bits, with room for a step past the end.
  constexpr std::int64_t kMost = 1 << 28;
  if (r.head_dim > kMost || r.num_heads > kMost || kv.num_kv_heads > kMost)
    throw UnsupportedError(std::string("[") + name + "] q, k: expected at most 2^28 heads of at most 2^28 elements, got " +
                           std::to_string(r.num_heads) + ", " + std::to_string(kv.num_kv_heads) + " of " + std::to_string(r.head_dim));
  // Slots likewise.
  if (kv.num_blocks * kv.block_size >= 0xffffffff)
    throw UnsupportedError(std::string("[") + name + "] k_cache: expected fewer than 2^32 - 1 slots, got " +
                           std::to_string(kv.num_blocks * kv.block_size));
  dispatch_float(r.dtype, name, [&](auto dtype) {
    using T = Element<decltype(dtype)::value>;
    constexpr int kVec = kElementsPer16Bytes<T>;
    const auto are_vectors = [&](const void* data, std::int64_t num_heads, std::int64_t token_stride, std::int64_t head_stride) {
      return heads_are_vectors<T>(data, r.num_tokens, token_stride, num_heads, head_stride);
    };
    const auto slots_are_vectors = [&](const void* cache, std::int64_t block_stride, std::int64_t slot_stride, std::int64_t head_stride) {
      const std::int64_t item_bytes = itemsize(kv.cache_dtype), bytes = std::min<std::int64_t>(kVec * item_bytes, 16);
      return cache == nullptr || (is_aligned(cache, bytes) && keeps_alignment(0, block_stride, item_bytes, bytes) &&
                                  keeps_alignment(kv.block_size, slot_stride, item_bytes, bytes) &&
                                  keeps_alignment(kv.num_kv_heads, head_stride, item_bytes, bytes));
    };
    const bool norm_is_vectors = parameter_is_vectors(params.norm.q_weight, params.norm.q_weight_dtype, kVec) &&
                                 parameter_is_vectors(params.norm.k_weight, params.norm.k_weight_dtype, kVec);
    const char* const obstacle =
        r.head_dim % kVec != 0 || r.head_dim > (params.norm.q_weight == nullptr ? 512 : 256) ? "head_dim"
        : r.rotary_dim / 2 % kVec != 0                                                       ? "rotary_dim"
        : !parameter_is_vectors(r.cos_sin_cache, r.cache_dtype, kVec)                        ? "cos_sin_cache"
        : !norm_is_vectors                                                                   ? "a norm's weight"
        : !are_vectors(r.q, r.num_heads, r.q_token_stride, r.q_head_stride)                  ? "q"
        : !are_vectors(r.k, kv.num_kv_heads, r.k_token_stride, r.k_head_stride) ||
                !are_vectors(kv.k, kv.num_kv_heads, kv.k_token_stride, kv.k_head_stride)
            ? "k"
        : !are_vectors(kv.v, kv.num_kv_heads, kv.v_token_stride, kv.v_head_stride)                                ? "v"
        : !slots_are_vectors(kv.k_cache, kv.k_cache_block_stride, kv.k_cache_slot_stride, kv.k_cache_head_stride) ? "k_cache"
        : !slots_are_vectors(kv.v_cache, kv.v_cache_block_stride, kv.v_cache_slot_stride, kv.v_cache_head_stride) ? "v_cache"
                                                                                                                  : nullptr;
    if (explain_vectors(obstacle)) return;
    if (obstacle != nullptr) return launch_rope_elements<T>(params, name, stream);
    rope_vectors(params, name, stream);
  });
}

}  // namespace quire::cuda
