// Rotary position encoding on CUDA.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <bit>
#include <string>
#include <type_traits>

#include "core/dispatch.h"
#include "core/explain.h"
#include "cuda/device/divisor.cuh"
#include "cuda/device/reduce.cuh"
#include "cuda/position_encoding/shared.cuh"

namespace quire::cuda {
namespace {

constexpr int kThreads = 256;
// Heads that a thread rotates by one set of angles; their loads are in flight together.
constexpr int kHeadsPerThread = 2;
// Threads of this kernel that an SM holds at once: the registers of a thread are bounded accordingly.
constexpr int kResidentThreads = 1024;
// Tokens per SM below which heads are spread over as many threads as there are.
constexpr int kManyTokensPerSm = 8;

// Grid: work item = blockDim.z tokens x one chunk of heads x one chunk of angles; gridDim.x CTAs walk all items. Thread (x, y, z)
// rotates kVec pairs of up to kHeadsPerThread heads of a token; the heads of q and k are numbered as one list. The position of
// the next item is read ahead, so that an item's pairs and angles are fetched together.
template <typename T, RopeStyle kStyle, int kVec>
__global__ void __launch_bounds__(kThreads, kResidentThreads / kThreads)
    rotary_embedding_kernel(const __grid_constant__ RotaryParams p, ErrorWord* const error_word, const std::int64_t num_head_chunks,
                            const std::int64_t num_angle_chunks, const std::int64_t num_items) {
  const std::int64_t half = p.rotary_dim / 2;
  const std::int64_t num_all_heads = p.num_heads + p.num_kv_heads;
  const std::int64_t per_token = num_head_chunks * num_angle_chunks;
  const auto token_of = [&](std::int64_t item) { return (per_token == 1 ? item : divide(item, per_token)) * blockDim.z + threadIdx.z; };
  const auto read_position = [&](std::int64_t item) -> std::int64_t {
    const std::int64_t token = token_of(item);
    if (item >= num_items || token >= p.num_tokens) return -1;
    return p.position_dtype == DType::kInt64 ? static_cast<const std::int64_t*>(p.positions)[token * p.position_stride]
                                             : static_cast<const std::int32_t*>(p.positions)[token * p.position_stride];
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
#pragma unroll
      for (int e = 0; e < kVec; ++e) {
        rotate(x[kNeox ? e : 2 * e], x[kNeox ? e + kVec : 2 * e + 1], cos_sin[0][e], cos_sin[1][e]);
      }
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
  rotary_embedding_kernel<T, kStyle, kVec>
      <<<num_ctas, block, 0, cuda_stream(stream)>>>(p, error_word(), num_head_chunks, num_angle_chunks, num_items);
  QUIRE_CHECK_LAUNCH("rotary_embedding", stream);
}

// ---- A norm of each head, rotation, and the write to the cache, in one pass ----

// Registers of a thread of this kernel: more than rotary_embedding's, or it spills.
constexpr int kRopeResidentThreads = 768;

// What becomes of keys and values.
enum class CacheForm {
  kNone,       // there is no cache
  kRaw,        // it has the dtype of k and v
  kConverted,  // another one
};

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

// Grid: gridDim.x is a multiple of the chunks of heads, so that a thread keeps its heads; the CTAs of a chunk walk the tokens,
// blockDim.z at a time. Thread (x, y, z) has two vectors of kVec elements of up to kHeadsPerThread heads: those that rotate with
// each other, and past rotary_dim those that follow each other. blockDim.x, a power of two up to 32, covers a head. Position and
// slot of the next token are read ahead. The weights lie in shared memory, head_dim floats for q and as many for k.
template <CacheForm kForm, typename T, int kVec>
__global__ void __launch_bounds__(kThreads, kRopeResidentThreads / kThreads)
    head_norm_rope_kernel(const __grid_constant__ RopeParams p, ErrorWord* const error_word, const int num_head_chunks) {
  constexpr bool kWrites = kForm != CacheForm::kNone;
  extern __shared__ float4 shared[];
  float* const weights = reinterpret_cast<float*>(shared);
  bool has_weights = false;
  const RotaryParams& r = p.rotary;
  const int head_dim = static_cast<int>(r.head_dim), half = static_cast<int>(r.rotary_dim) / 2;
  const int num_all_heads = static_cast<int>(r.num_heads + (kWrites ? 2 : 1) * p.kv.num_kv_heads);
  const int num_head_groups = static_cast<int>(gridDim.x) / num_head_chunks, group = static_cast<int>(blockIdx.x) / num_head_chunks;
  const int head_chunk = static_cast<int>(blockIdx.x) - group * num_head_chunks;
  const bool is_neox = r.style == RopeStyle::kNeox;
  const int angle = static_cast<int>(threadIdx.x) * kVec;
  const bool rotates = angle < half;
  const int first_at = rotates && is_neox ? angle : 2 * angle, second_at = rotates && is_neox ? angle + half : 2 * angle + kVec;
  const bool has_first = first_at < head_dim, has_second = second_at < head_dim;
  const std::int64_t num_slots = p.kv.num_blocks * p.kv.block_size;
  const float inverse_head_dim = 1.0f / static_cast<float>(head_dim);
  const unsigned lane = ((threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x) % kWarpSize;
  // The lanes of a head.
  const unsigned lane_mask = blockDim.x == kWarpSize ? kFullMask : ((1u << blockDim.x) - 1) << (lane & ~(blockDim.x - 1));
  const auto number_of = [&](int i) {
    return (head_chunk * kHeadsPerThread + i) * static_cast<int>(blockDim.y) + static_cast<int>(threadIdx.y);
  };
  const Head<T> heads[kHeadsPerThread] = {Head<T>(p, number_of(0)), Head<T>(p, number_of(1))};
  static_assert(kHeadsPerThread == 2);

  const auto read_ahead = [&](std::int64_t token, std::int64_t& position, std::int64_t& slot) {
    if (token >= r.num_tokens) return;
    position = read_index(r.positions, r.position_dtype, token * r.position_stride);
    if (kWrites) slot = read_index(p.kv.slot_mapping, p.kv.slot_dtype, token * p.kv.slot_stride);
  };
  const std::int64_t step = static_cast<std::int64_t>(num_head_groups) * blockDim.z;
  std::int64_t first_token = static_cast<std::int64_t>(group) * blockDim.z;
  std::int64_t next_position = -1, next_slot = -1;
  read_ahead(first_token + threadIdx.z, next_position, next_slot);
  for (; first_token < r.num_tokens; first_token += step) {
    const std::int64_t token = first_token + threadIdx.z;
    const std::int64_t position = next_position, slot = next_slot;
    read_ahead(token + step, next_position, next_slot);
    const bool is_token = token < r.num_tokens;

    // Load.
    Packed<T, kVec> firsts[kHeadsPerThread], seconds[kHeadsPerThread];
#pragma unroll
    for (int i = 0; i < kHeadsPerThread; ++i) {
      firsts[i] = seconds[i] = {};
      if (!is_token || number_of(i) >= num_all_heads) continue;
      const T* const source = heads[i].source_at(p, token);
      if (has_first) firsts[i] = load_packed<T, kVec>(source + first_at);
      if (has_second) seconds[i] = load_packed<T, kVec>(source + second_at);
    }
    if (!has_weights) {
      // After the first loads, so that both are under way together.
      const int num_threads = static_cast<int>(blockDim.x * blockDim.y * blockDim.z);
      const int thread = static_cast<int>((threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x);
      for (int i = thread; i < head_dim; i += num_threads) {
        weights[i] = head_weight(p, true, i);
        if (p.norm.k_weight != nullptr) weights[head_dim + i] = head_weight(p, false, i);
      }
      __syncthreads();
      has_weights = true;
    }
    if (!is_token) continue;
    const bool known = is_known(p, position);
    const bool in_cache = kWrites && slot >= 0 && slot < num_slots;
    if (head_chunk == 0 && threadIdx.x == 0 && threadIdx.y == 0) record_bad_indices(p, error_word, token, position, slot);
    float cos_sin[2][kVec];
    if (known && rotates && heads[0].kind != HeadKind::kValue)
      load_parameter(cos_sin, r.cos_sin_cache, r.cache_dtype, position * r.rotary_dim + angle, half, r.max_position * r.rotary_dim);
    const std::int64_t block_idx = in_cache ? divide(slot, p.kv.block_size) : 0, offset = slot - block_idx * p.kv.block_size;

#pragma unroll
    for (int i = 0; i < kHeadsPerThread; ++i) {
      if (number_of(i) >= num_all_heads) continue;

      // Normalise and rotate.
      if (known && heads[i].kind != HeadKind::kValue) {
        float x[2 * kVec];
        unpack<T, kVec>(reinterpret_cast<float (&)[kVec]>(x[0]), firsts[i]);
        unpack<T, kVec>(reinterpret_cast<float (&)[kVec]>(x[kVec]), seconds[i]);
        float sum = 0.0f;
#pragma unroll
        for (int e = 0; e < 2 * kVec; ++e) sum = fmaf(x[e], x[e], sum);
        for (unsigned distance = blockDim.x / 2; distance > 0; distance /= 2)
          sum += __shfl_xor_sync(lane_mask, sum, static_cast<int>(distance));
        const float inverse = __frsqrt_rn(fmaf(sum, inverse_head_dim, p.norm.eps));
        const float* const weight = weights + (heads[i].kind == HeadKind::kQuery ? 0 : head_dim);
        float factors[2 * kVec] = {};
        if (has_first) load_floats(reinterpret_cast<float (&)[kVec]>(factors[0]), weight + first_at);
        if (has_second) load_floats(reinterpret_cast<float (&)[kVec]>(factors[kVec]), weight + second_at);
#pragma unroll
        for (int e = 0; e < 2 * kVec; ++e) x[e] = x[e] * inverse * factors[e];
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
      if (heads[i].target != nullptr) {
        T* const target = heads[i].target_at(p, token);
        if (has_first) store_raw(target + first_at, firsts[i]);
        if (has_second) store_raw(target + second_at, seconds[i]);
      }
      if (!kWrites || heads[i].kind == HeadKind::kQuery || !in_cache) continue;
      const std::int64_t element = heads[i].cache_element_at(p, block_idx, offset);
      if constexpr (kForm == CacheForm::kRaw) {
        if (has_first) store_raw(static_cast<T*>(heads[i].cache) + element + first_at, firsts[i]);
        if (has_second) store_raw(static_cast<T*>(heads[i].cache) + element + second_at, seconds[i]);
      } else if constexpr (kForm == CacheForm::kConverted) {
        const Divisor divisor(cache_scale(p, heads[i].kind, number_of(i)));
        if (has_first) store_converted<T, kVec>(heads[i].cache, p.kv.cache_dtype, element + first_at, firsts[i], divisor);
        if (has_second) store_converted<T, kVec>(heads[i].cache, p.kv.cache_dtype, element + second_at, seconds[i], divisor);
      }
    }
  }
}

// Grid: one warp per (token, head) and step, for layouts that have no vectors. An element is read again by the lane that sums its
// square or the one that rotates it, and written only by the latter, after the sum.
template <typename T>
__global__ void __launch_bounds__(kThreads) rope_element_kernel(const __grid_constant__ RopeParams p, ErrorWord* const error_word) {
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
          store_converted<T, 1>(head.cache, p.kv.cache_dtype, element + at[i], packed, divisor);
        }
      }
    }
  }
}

template <CacheForm kForm, typename T, int kVec>
void launch_head_norm_rope(const RopeParams& p, const char* name, Stream stream) {
  const RotaryParams& r = p.rotary;
  const std::int64_t lanes = std::bit_ceil(static_cast<std::uint64_t>(ceil_div(r.head_dim / kVec, 2)));
  const std::int64_t num_all_heads = r.num_heads + (kForm == CacheForm::kNone ? 1 : 2) * p.kv.num_kv_heads;
  const DeviceProperties& device = current_device_properties();
  const bool many_tokens = r.num_tokens >= kManyTokensPerSm * device.num_sms;
  const std::int64_t head_lanes = std::min(many_tokens ? ceil_div(num_all_heads, kHeadsPerThread) : num_all_heads, kThreads / lanes);
  // z is limited to 64 by the hardware.
  const std::int64_t tokens_per_cta = many_tokens ? std::min<std::int64_t>(kThreads / (lanes * head_lanes), 64) : 1;
  const std::int64_t num_head_chunks = ceil_div(num_all_heads, head_lanes * kHeadsPerThread);
  const dim3 block(static_cast<unsigned>(lanes), static_cast<unsigned>(head_lanes), static_cast<unsigned>(tokens_per_cta));
  // CTAs of a chunk; all of them together fit the device, so that they walk the tokens.
  const std::int64_t resident_ctas = device.num_sms * (kRopeResidentThreads / (lanes * head_lanes * tokens_per_cta));
  const std::int64_t ctas_per_chunk = std::min(ceil_div(r.num_tokens, tokens_per_cta),
                                               many_tokens ? ceil_div(resident_ctas, num_head_chunks) : 0x7fffffff / num_head_chunks);
  const std::size_t shared_bytes = 2 * static_cast<std::size_t>(r.head_dim) * sizeof(float);
  head_norm_rope_kernel<kForm, T, kVec>
      <<<static_cast<unsigned>(ctas_per_chunk * num_head_chunks), block, shared_bytes, cuda_stream(stream)>>>(
          p, error_word(), static_cast<int>(num_head_chunks));
  QUIRE_CHECK_LAUNCH(name, stream);
}

template <typename T>
void launch_rope_elements(const RopeParams& p, const char* name, Stream stream) {
  const std::int64_t num_heads = p.rotary.num_heads + (p.kv.v == nullptr ? 1 : 2) * p.kv.num_kv_heads;
  const std::int64_t num_ctas = ceil_div(p.rotary.num_tokens * num_heads, kThreads / kWarpSize);
  rope_element_kernel<T>
      <<<static_cast<unsigned>(std::min<std::int64_t>(num_ctas, 0x7fffffff)), kThreads, 0, cuda_stream(stream)>>>(p, error_word());
  QUIRE_CHECK_LAUNCH(name, stream);
}

}  // namespace

void rotary_embedding(const RotaryParams& params, Stream stream) {
  dispatch_float(params.dtype, "rotary_embedding", [&](auto dtype) {
    using T = Element<decltype(dtype)::value>;
    constexpr int kVec = kElementsPer16Bytes<T>;
    const auto rows_are_aligned = [&](const void* data, std::int64_t num_heads, std::int64_t token_stride, std::int64_t head_stride) {
      return num_heads == 0 || (is_aligned(data, 16) && keeps_alignment(params.num_tokens, token_stride, sizeof(T), 16) &&
                                keeps_alignment(num_heads, head_stride, sizeof(T), 16));
    };
    const char* const obstacle = params.rotary_dim / 2 % kVec != 0                                       ? "rotary_dim"
                                 : !parameter_is_vectors(params.cos_sin_cache, params.cache_dtype, kVec) ? "cos_sin_cache"
                                 : !rows_are_aligned(params.q, params.num_heads, params.q_token_stride, params.q_head_stride)    ? "q"
                                 : !rows_are_aligned(params.k, params.num_kv_heads, params.k_token_stride, params.k_head_stride) ? "k"
                                                                                                                                 : nullptr;
    if (explain_vectors(obstacle)) return;
    const bool neox = params.style == RopeStyle::kNeox;
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
  dispatch_float(r.dtype, name, [&](auto dtype) {
    using T = Element<decltype(dtype)::value>;
    constexpr int kVec = kElementsPer16Bytes<T>;
    const auto heads_are_vectors = [&](const void* data, std::int64_t num_heads, std::int64_t token_stride, std::int64_t head_stride) {
      return data == nullptr || num_heads == 0 ||
             (is_aligned(data, 16) && keeps_alignment(r.num_tokens, token_stride, sizeof(T), 16) &&
              keeps_alignment(num_heads, head_stride, sizeof(T), 16));
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
        r.head_dim % kVec != 0 || ceil_div(r.head_dim / kVec, 2) > kWarpSize      ? "head_dim"
        : r.rotary_dim / 2 % kVec != 0                                            ? "rotary_dim"
        : !parameter_is_vectors(r.cos_sin_cache, r.cache_dtype, kVec)             ? "cos_sin_cache"
        : !norm_is_vectors                                                        ? "a norm's weight"
        : !heads_are_vectors(r.q, r.num_heads, r.q_token_stride, r.q_head_stride) ? "q"
        : !heads_are_vectors(r.k, kv.num_kv_heads, r.k_token_stride, r.k_head_stride) ||
                !heads_are_vectors(kv.k, kv.num_kv_heads, kv.k_token_stride, kv.k_head_stride)
            ? "k"
        : !heads_are_vectors(kv.v, kv.num_kv_heads, kv.v_token_stride, kv.v_head_stride)                          ? "v"
        : !slots_are_vectors(kv.k_cache, kv.k_cache_block_stride, kv.k_cache_slot_stride, kv.k_cache_head_stride) ? "k_cache"
        : !slots_are_vectors(kv.v_cache, kv.v_cache_block_stride, kv.v_cache_slot_stride, kv.v_cache_head_stride) ? "v_cache"
                                                                                                                  : nullptr;
    if (explain_vectors(obstacle)) return;
    if (obstacle != nullptr) return launch_rope_elements<T>(params, name, stream);
    // Without norms there is always a cache.
    if (params.norm.q_weight == nullptr) return rope_and_write_vectors(params, name, stream);
    if (kv.k_cache == nullptr) {
      launch_head_norm_rope<CacheForm::kNone, T, kVec>(params, name, stream);
    } else if (kv.cache_dtype == r.dtype) {
      launch_head_norm_rope<CacheForm::kRaw, T, kVec>(params, name, stream);
    } else {
      launch_head_norm_rope<CacheForm::kConverted, T, kVec>(params, name, stream);
    }
  });
}

}  // namespace quire::cuda
