// A norm of each head, rotation, and the write to the cache, in one pass, on CUDA.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <bit>
#include <type_traits>

#include "core/dispatch.h"
#include "cuda/device/async_copy.cuh"
#include "cuda/device/dependent_launch.cuh"
#include "cuda/device/reduce.cuh"
#include "cuda/device/tma.cuh"
#include "cuda/device_code.h"
#include "cuda/position_encoding/shared.cuh"

namespace quire::cuda {
namespace {

constexpr int kThreads = 128;

struct RopeRows {
  std::uint32_t query_rows, kv_rows;  // rows of a token: of q; of k, and as many of v
  std::uint32_t block_size;
  int block_shift;  // block_size is two to this; -1: it is no power of two
  std::int64_t first_token;
};

// A slot of the cache, as its block and its place within that.
struct Place {
  std::uint32_t block_idx, offset;
};

__device__ __forceinline__ Place place_of(const RopeRows& rows, std::int64_t slot) {
  const auto known_slot = static_cast<std::uint32_t>(slot);
  const std::uint32_t block_idx = rows.block_shift >= 0 ? known_slot >> rows.block_shift : known_slot / rows.block_size;
  return {block_idx, known_slot - block_idx * rows.block_size};
}

// The element type of a cache that there is none of, and of one of any float dtype.
struct NoCache {};
struct AnyFloat {};

// Grid: CTAs of blockDim.y rows; the rows of all tokens are one list. A row is up to kHeads heads of one of q, k and v of one token, a
// thread of which has two vectors of kVec elements of each head: those that rotate with each other, and past rotary_dim those that
// follow each other. blockDim.x, a power of two, covers a head; with norms it is at most 32. Every load of a row comes first.
template <bool kNorms, typename CacheT, typename T, int kVec, int kHeads, int kRegisters>
__global__ void __maxnreg__(kRegisters)
    rope_kernel(const __grid_constant__ RopeParams p, const __grid_constant__ RopeRows rows, ErrorWord* const error_word) {
  device::wait_for_predecessor();
  constexpr bool kWrites = !std::is_same_v<CacheT, NoCache>;
  const RotaryParams& r = p.rotary;
  const KvParams& kv = p.kv;
  const std::uint32_t rows_per_token = rows.query_rows + (kWrites ? 2 : 1) * rows.kv_rows;
  const std::uint32_t item = blockIdx.x * blockDim.y + threadIdx.y, token_of_launch = item / rows_per_token;
  std::uint32_t row = item - token_of_launch * rows_per_token;
  const std::int64_t token = rows.first_token + token_of_launch;
  if (token >= r.num_tokens) return;
  const bool is_first_row = row == 0;

  // The row's heads.
  const HeadKind kind = row < rows.query_rows ? HeadKind::kQuery : row < rows.query_rows + rows.kv_rows ? HeadKind::kKey : HeadKind::kValue;
  std::int64_t position = -1, slot = -1;
  const auto read_indices = [&] {
    if (kind != HeadKind::kValue || is_first_row) position = read_index(r.positions, r.position_dtype, token * r.position_stride);
    if (kWrites && (kind != HeadKind::kQuery || is_first_row)) slot = read_index(kv.slot_mapping, kv.slot_dtype, token * kv.slot_stride);
  };
  // One head leaves registers for what has a latency of its own: the position, which the angles wait for, and the weights of its norm.
  constexpr bool kOneHead = kHeads == 1;
  if constexpr (kOneHead) read_indices();
  const T* source;
  std::int64_t head_stride;
  int num_heads = static_cast<int>(kv.num_kv_heads);
  if (kind == HeadKind::kQuery) {
    num_heads = static_cast<int>(r.num_heads);
    head_stride = r.q_head_stride;
    source = static_cast<const T*>(r.q) + token * r.q_token_stride;
  } else if (kind == HeadKind::kKey) {
    row -= rows.query_rows;
    head_stride = kv.k_head_stride;
    source = static_cast<const T*>(kv.k) + token * kv.k_token_stride;
  } else {
    row -= rows.query_rows + rows.kv_rows;
    head_stride = kv.v_head_stride;
    source = static_cast<const T*>(kv.v) + token * kv.v_token_stride;
  }
  const int head = static_cast<int>(row * kHeads);
  const int count = min(kHeads, num_heads - head);

  // The thread's vectors in a head.
  const int head_dim = static_cast<int>(r.head_dim), half = static_cast<int>(r.rotary_dim) / 2;
  const bool is_neox = r.style == RopeStyle::kNeox;
  const int angle = static_cast<int>(threadIdx.x) * kVec;
  const bool rotates = angle < half;
  const int first_at = rotates && is_neox ? angle : 2 * angle, second_at = rotates && is_neox ? angle + half : 2 * angle + kVec;
  const bool has_first = first_at < head_dim, has_second = second_at < head_dim;
  source += head * head_stride;

  // Load.
  Packed<T, kVec> firsts[kHeads], seconds[kHeads];
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    firsts[i] = seconds[i] = {};
    if (i >= count) continue;
    if (has_first) firsts[i] = load_packed<T, kVec>(source + i * head_stride + first_at);
    if (has_second) seconds[i] = load_packed<T, kVec>(source + i * head_stride + second_at);
  }
  constexpr bool kIs8Bit = kWrites && !std::is_same_v<CacheT, AnyFloat> && sizeof(CacheT) == 1;
  const float* const scale = kind == HeadKind::kKey ? kv.k_scale : kv.v_scale;
  const std::int64_t scale_stride = kind == HeadKind::kKey ? kv.k_scale_stride : kv.v_scale_stride;
  float head_scale = 1.0f;
  if (kIs8Bit && kind != HeadKind::kQuery && scale != nullptr) head_scale = scale[head * scale_stride];
  ParameterBits<kVec> first_bits, second_bits;
  const bool is_query = kind == HeadKind::kQuery;
  const DType weight_dtype = is_query ? p.norm.q_weight_dtype : p.norm.k_weight_dtype;
  const auto load_weights = [&] {
    const void* const weight = is_query ? p.norm.q_weight : p.norm.k_weight;
    first_bits.load(weight, weight_dtype, first_at, head_dim);
    second_bits.load(weight, weight_dtype, second_at, head_dim);
  };
  if constexpr (kNorms && kOneHead) {
    if (kind != HeadKind::kValue) load_weights();
  }
  if constexpr (!kOneHead) read_indices();
  const bool known = is_known(p, position) && kind != HeadKind::kValue;
  const bool in_cache = kWrites && kind != HeadKind::kQuery && slot >= 0 && slot < kv.num_blocks * kv.block_size;
  if (is_first_row && threadIdx.x == 0) record_bad_indices(p, error_word, token, position, slot);

  if (known) {
    float cos_sin[2][kVec];
    ParameterBits<kVec> cos_bits, sin_bits;
    const std::int64_t angle_at = position * r.rotary_dim + angle, num_angles = rotates ? r.max_position * r.rotary_dim : 0;
    if constexpr (kOneHead) {
      cos_bits.load(r.cos_sin_cache, r.cache_dtype, angle_at, num_angles);
      sin_bits.load(r.cos_sin_cache, r.cache_dtype, angle_at + half, num_angles);
    } else {
      if (rotates) load_parameter(cos_sin, r.cos_sin_cache, r.cache_dtype, angle_at, half, num_angles);
    }

    // Normalise.
    float inverse[kHeads], first_weight[kVec], second_weight[kVec];
    if constexpr (kNorms) {
      if constexpr (!kOneHead) load_weights();
#pragma unroll
      for (int i = 0; i < kHeads; ++i) {
        float x[kVec], y[kVec];
        unpack<T, kVec>(x, firsts[i]);
        unpack<T, kVec>(y, seconds[i]);
        inverse[i] = 0.0f;
#pragma unroll
        for (int e = 0; e < kVec; ++e) inverse[i] = fmaf(x[e], x[e], fmaf(y[e], y[e], inverse[i]));
      }
      const unsigned lane = (threadIdx.y * blockDim.x + threadIdx.x) % kWarpSize;
      // The lanes of a head.
      const unsigned lane_mask = blockDim.x == kWarpSize ? kFullMask : ((1u << blockDim.x) - 1) << (lane & ~(blockDim.x - 1));
#pragma unroll
      for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
        if (distance >= static_cast<int>(blockDim.x)) continue;
#pragma unroll
        for (int i = 0; i < kHeads; ++i) inverse[i] += __shfl_xor_sync(lane_mask, inverse[i], distance);
      }
#pragma unroll
      for (int i = 0; i < kHeads; ++i) inverse[i] = __frsqrt_rn(fmaf(inverse[i], 1.0f / static_cast<float>(head_dim), p.norm.eps));
      first_bits.unpack_to(first_weight, weight_dtype);
      second_bits.unpack_to(second_weight, weight_dtype);
      if (p.norm.weight_offset != 0.0f) {
#pragma unroll
        for (int e = 0; e < kVec; ++e) {
          first_weight[e] += p.norm.weight_offset;
          second_weight[e] += p.norm.weight_offset;
        }
      }
    }
    if constexpr (kOneHead) {
      cos_bits.unpack_to(cos_sin[0], r.cache_dtype);
      sin_bits.unpack_to(cos_sin[1], r.cache_dtype);
    }

    // Rotate.
#pragma unroll
    for (int i = 0; i < kHeads; ++i) {
      float x[2 * kVec];
      unpack<T, kVec>(reinterpret_cast<float (&)[kVec]>(x[0]), firsts[i]);
      unpack<T, kVec>(reinterpret_cast<float (&)[kVec]>(x[kVec]), seconds[i]);
      if constexpr (kNorms) {
#pragma unroll
        for (int e = 0; e < kVec; ++e) {
          x[e] = x[e] * inverse[i] * first_weight[e];
          x[kVec + e] = x[kVec + e] * inverse[i] * second_weight[e];
        }
      }
      if (rotates) rotate_vectors<kVec>(x, cos_sin[0], cos_sin[1], is_neox);
      firsts[i] = pack<T, kVec>(reinterpret_cast<const float (&)[kVec]>(x[0]));
      seconds[i] = pack<T, kVec>(reinterpret_cast<const float (&)[kVec]>(x[kVec]));
    }
  }

  // Store.
  T* target = nullptr;
  std::int64_t target_stride = r.q_head_stride;
  if (kind == HeadKind::kQuery) {
    target = static_cast<T*>(r.q) + token * r.q_token_stride + head * r.q_head_stride;
  } else if (kind == HeadKind::kKey && r.k != nullptr) {
    target = static_cast<T*>(r.k) + token * r.k_token_stride + head * r.k_head_stride;
    target_stride = r.k_head_stride;
  }
  if (target != nullptr) {
#pragma unroll
    for (int i = 0; i < kHeads; ++i) {
      if (i >= count) continue;
      if (has_first) store_raw(target + i * target_stride + first_at, firsts[i]);
      if (has_second) store_raw(target + i * target_stride + second_at, seconds[i]);
    }
  }
  if constexpr (kWrites) {
    if (!in_cache) return;
    const bool is_key = kind == HeadKind::kKey;
    const auto [block_idx, offset] = place_of(rows, slot);
    const std::int64_t cache_head_stride = is_key ? kv.k_cache_head_stride : kv.v_cache_head_stride;
    const std::int64_t element = block_idx * (is_key ? kv.k_cache_block_stride : kv.v_cache_block_stride) +
                                 offset * (is_key ? kv.k_cache_slot_stride : kv.v_cache_slot_stride) + head * cache_head_stride;
    void* const cache = is_key ? kv.k_cache : kv.v_cache;
#pragma unroll
    for (int i = 0; i < kHeads; ++i) {
      if (i >= count) continue;
      const std::int64_t at = element + i * cache_head_stride;
      if constexpr (std::is_same_v<CacheT, T>) {
        if (has_first) store_raw(static_cast<T*>(cache) + at + first_at, firsts[i]);
        if (has_second) store_raw(static_cast<T*>(cache) + at + second_at, seconds[i]);
      } else if constexpr (std::is_same_v<CacheT, AnyFloat>) {
        if (has_first) store_as_float<T, kVec>(cache, kv.cache_dtype, at + first_at, firsts[i]);
        if (has_second) store_as_float<T, kVec>(cache, kv.cache_dtype, at + second_at, seconds[i]);
      } else {
        if (i > 0 && scale != nullptr && scale_stride != 0) head_scale = scale[(head + i) * scale_stride];
        const Divisor divisor(head_scale);
        float x[kVec];
        unpack<T, kVec>(x, firsts[i]);
        if (has_first) store_raw(static_cast<CacheT*>(cache) + at + first_at, divisor.divide_and_pack<CacheT>(x));
        unpack<T, kVec>(x, seconds[i]);
        if (has_second) store_raw(static_cast<CacheT*>(cache) + at + second_at, divisor.divide_and_pack<CacheT>(x));
      }
    }
  }
}

// Threads of a CTA that has a token, pairs of a thread in each head, and bytes of a token at most.
constexpr int kTokenThreads = 64, kPairs = 8, kMaxTokenBytes = 24 << 10;

// Many tokens without norms. Grid: a CTA per token. The copy engine brings its q, k and v at once, so that none of them waits for the angles,
// which wait for the position, and takes away what is not to be quantized. Heads lie side by side, and rotate as a whole; a thread has the same
// pairs of every head that it rotates. Caches have the dtype of k or one of 8 bits.
template <typename CacheT, typename T>
__global__ void __maxnreg__(64)
    rope_token_kernel(const __grid_constant__ RopeParams p, const __grid_constant__ RopeRows rows, ErrorWord* const error_word) {
  device::wait_for_predecessor();
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) unsigned char token_memory[];
  __shared__ std::uint64_t barriers[2];
  constexpr bool kIsCopy = std::is_same_v<CacheT, T>;
  const RotaryParams& r = p.rotary;
  const KvParams& kv = p.kv;
  const std::int64_t token = rows.first_token + blockIdx.x;
  const int head_dim = static_cast<int>(r.head_dim), num_heads = static_cast<int>(r.num_heads);
  const int num_rotated = num_heads + static_cast<int>(kv.num_kv_heads);
  const int q_bytes = num_heads * head_dim * static_cast<int>(sizeof(T)), kv_elements = static_cast<int>(kv.num_kv_heads) * head_dim;
  const int kv_bytes = kv_elements * static_cast<int>(sizeof(T));
  T* const heads = reinterpret_cast<T*>(token_memory);
  T* const q = static_cast<T*>(r.q) + token * r.q_token_stride;
  const std::uint32_t q_at = device::shared_address(heads), k_at = q_at + static_cast<std::uint32_t>(q_bytes),
                      v_at = k_at + static_cast<std::uint32_t>(kv_bytes);
  const std::uint32_t rotated = device::shared_address(barriers), values = device::shared_address(barriers + 1);
  if (threadIdx.x == 0) {
    device::barrier_init(rotated, 1);
    device::barrier_init(values, 1);
    device::barrier_init_fence();
    device::barrier_arrive_expect(rotated, q_bytes + kv_bytes);
    device::copy_row(q_at, q, q_bytes, rotated);
    device::copy_row(k_at, static_cast<const T*>(kv.k) + token * kv.k_token_stride, kv_bytes, rotated);
    device::barrier_arrive_expect(values, kv_bytes);
    device::copy_row(v_at, static_cast<const T*>(kv.v) + token * kv.v_token_stride, kv_bytes, values);
  }

  // Indices and angles.
  const bool positions_are_int64 = r.position_dtype == DType::kInt64, slots_are_int64 = kv.slot_dtype == DType::kInt64;
  IndexBits given_position, given_slot;
  given_position.load(r.positions, positions_are_int64, token * r.position_stride);
  given_slot.load(kv.slot_mapping, slots_are_int64, token * kv.slot_stride);
  const float k_scale = !kIsCopy && kv.k_scale != nullptr ? *kv.k_scale : 1.0f,
              v_scale = !kIsCopy && kv.v_scale != nullptr ? *kv.v_scale : 1.0f;
  const std::int64_t position = given_position.value(positions_are_int64), slot = given_slot.value(slots_are_int64);
  const bool known = is_known(p, position), in_cache = slot >= 0 && slot < kv.num_blocks * kv.block_size;
  const bool is_neox = r.style == RopeStyle::kNeox;
  const int lanes = head_dim / (2 * kPairs), half = head_dim / 2, angle = static_cast<int>(threadIdx.x) % lanes * kPairs;
  const int first_at = is_neox ? angle : 2 * angle, second_at = is_neox ? angle + half : 2 * angle + kPairs;
  float cos_sin[2][kPairs];
  if (known) load_parameter(cos_sin, r.cos_sin_cache, r.cache_dtype, position * r.rotary_dim + angle, half, r.max_position * r.rotary_dim);
  if (threadIdx.x == 0) record_bad_indices(p, error_word, token, position, slot);
  const auto [block_idx, offset] = place_of(rows, slot);
  CacheT* const k_row = static_cast<CacheT*>(kv.k_cache) + block_idx * kv.k_cache_block_stride + offset * kv.k_cache_slot_stride;
  CacheT* const v_row = static_cast<CacheT*>(kv.v_cache) + block_idx * kv.v_cache_block_stride + offset * kv.v_cache_slot_stride;

  // Rotate in shared memory; quantize keys from there.
  __syncthreads();
  device::barrier_wait(rotated, 0);
  const Divisor k_divisor(k_scale);
  for (int head = static_cast<int>(threadIdx.x) / lanes; head < num_rotated; head += kTokenThreads / lanes) {
    T* const at = heads + head * head_dim;
    float x[2 * kPairs];
    auto& firsts = reinterpret_cast<float (&)[kPairs]>(x[0]);
    auto& seconds = reinterpret_cast<float (&)[kPairs]>(x[kPairs]);
    load_floats(firsts, at + first_at);
    load_floats(seconds, at + second_at);
    if (known) {
      rotate_vectors<kPairs>(x, cos_sin[0], cos_sin[1], is_neox);
      const Packed<T, kPairs> first = pack<T, kPairs>(firsts), second = pack<T, kPairs>(seconds);
      store_raw(at + first_at, first);
      store_raw(at + second_at, second);
      unpack<T, kPairs>(firsts, first);
      unpack<T, kPairs>(seconds, second);
    }
    if constexpr (!kIsCopy) {
      if (head < num_heads || !in_cache) continue;
      CacheT* const target = k_row + (head - num_heads) * head_dim;
      store_raw(target + first_at, k_divisor.divide_and_pack<CacheT>(firsts));
      store_raw(target + second_at, k_divisor.divide_and_pack<CacheT>(seconds));
    }
  }

  // Store.
  device::fence_async_proxy();
  __syncthreads();
  if (threadIdx.x == 0) {
    if (known) device::store_row(q, q_at, q_bytes);
    if (r.k != nullptr) device::store_row(static_cast<T*>(r.k) + token * r.k_token_stride, k_at, kv_bytes);
    if (kIsCopy && in_cache) device::store_row(k_row, k_at, kv_bytes);
  }
  if constexpr (kIsCopy) {
    if (threadIdx.x != 0) return;
    device::barrier_wait(values, 0);
    if (in_cache) device::store_row(v_row, v_at, kv_bytes);
  } else {
    const Divisor v_divisor(v_scale);
    constexpr int kVec = 2 * kPairs;
    device::barrier_wait(values, 0);
    for (int at = static_cast<int>(threadIdx.x) * kVec; in_cache && at < kv_elements; at += kTokenThreads * kVec) {
      float x[kVec];
      load_floats(x, heads + num_rotated * head_dim + at);
      store_raw(v_row + at, v_divisor.divide_and_pack<CacheT>(x));
    }
  }
  if (threadIdx.x == 0) {
    device::store_commit();
    device::store_wait_read<0>();
  }
#endif
}

// One kernel, as the launcher needs it: its code is not a template, as there are many kernels.
struct RopeKernel {
  void (*kernel)(RopeParams, RopeRows, ErrorWord*);
  int vec, heads;
  bool writes;
};

RopeRows rows_of(const RopeParams& p, std::int64_t query_rows, std::int64_t kv_rows) {
  const auto block_size = static_cast<std::uint32_t>(std::max<std::int64_t>(p.kv.block_size, 1));
  return {static_cast<std::uint32_t>(query_rows), static_cast<std::uint32_t>(kv_rows), block_size,
          std::has_single_bit(block_size) ? std::countr_zero(block_size) : -1, 0};
}

void launch_rope_of(const RopeKernel& choice, const RopeParams& p, const char* name, Stream stream) {
  const RotaryParams& r = p.rotary;
  const std::int64_t lanes = std::bit_ceil(static_cast<std::uint64_t>(ceil_div(r.head_dim / choice.vec, 2)));
  const std::int64_t query_rows = ceil_div(r.num_heads, choice.heads), kv_rows = ceil_div(p.kv.num_kv_heads, choice.heads);
  const std::int64_t rows_per_token = query_rows + (choice.writes ? 2 : 1) * kv_rows, rows_per_cta = kThreads / lanes;
  RopeRows rows = rows_of(p, query_rows, kv_rows);
  const dim3 block(static_cast<unsigned>(lanes), static_cast<unsigned>(rows_per_cta));
  const std::int64_t tokens_per_launch = std::max<std::int64_t>(0x7fffffff / rows_per_token, 1);
  for (; rows.first_token < r.num_tokens; rows.first_token += tokens_per_launch) {
    const std::int64_t num_rows = std::min(r.num_tokens - rows.first_token, tokens_per_launch) * rows_per_token;
    const auto num_ctas = static_cast<unsigned>(ceil_div(num_rows, rows_per_cta));
    launch_waiting(name, choice.kernel, num_ctas, block, stream, p, rows, error_word());
  }
}

bool are_few(const RopeParams& p) { return p.rotary.num_tokens < kManyTokensPerSm * current_device_properties().num_sms; }

// Whether rope_token_kernel takes it. `item_bytes` and `cache_item_bytes` are the sizes of T and CacheT.
bool is_for_token_kernel(const RopeParams& p, std::int64_t item_bytes, std::int64_t cache_item_bytes) {
  const RotaryParams& r = p.rotary;
  const KvParams& kv = p.kv;
  const auto is_row = [&](const void* data, std::int64_t head_stride, std::int64_t token_stride, std::int64_t bytes) {
    return is_aligned(data, 16) && head_stride == r.head_dim && keeps_alignment(r.num_tokens, token_stride, bytes, 16);
  };
  const auto is_cache = [&](const void* data, std::int64_t head_stride, std::int64_t slot_stride, std::int64_t block_stride) {
    return is_row(data, head_stride, slot_stride, cache_item_bytes) && keeps_alignment(0, block_stride, cache_item_bytes, 16);
  };
  return has_dependent_launch_code() && !are_few(p) && r.num_heads > 0 && kv.num_kv_heads > 0 && r.rotary_dim == r.head_dim &&
         r.head_dim % (2 * kPairs) == 0 && kTokenThreads % (r.head_dim / (2 * kPairs)) == 0 &&
         (r.num_heads + 2 * kv.num_kv_heads) * r.head_dim * item_bytes <= kMaxTokenBytes && kv.k_scale_stride == 0 &&
         kv.v_scale_stride == 0 && parameter_is_vectors(r.cos_sin_cache, r.cache_dtype, kPairs) &&
         is_row(r.q, r.q_head_stride, r.q_token_stride, item_bytes) && is_row(kv.k, kv.k_head_stride, kv.k_token_stride, item_bytes) &&
         is_row(kv.v, kv.v_head_stride, kv.v_token_stride, item_bytes) &&
         (r.k == nullptr || is_row(r.k, r.k_head_stride, r.k_token_stride, item_bytes)) &&
         is_cache(kv.k_cache, kv.k_cache_head_stride, kv.k_cache_slot_stride, kv.k_cache_block_stride) &&
         is_cache(kv.v_cache, kv.v_cache_head_stride, kv.v_cache_slot_stride, kv.v_cache_block_stride);
}

void launch_rope_tokens(void (*kernel)(RopeParams, RopeRows, ErrorWord*), std::int64_t item_bytes, const RopeParams& p, const char* name,
                        Stream stream) {
  const RotaryParams& r = p.rotary;
  LaunchShape shape{{}, kTokenThreads, static_cast<int>((r.num_heads + 2 * p.kv.num_kv_heads) * r.head_dim * item_bytes)};
  RopeRows rows = rows_of(p, 1, 1);
  for (; rows.first_token < r.num_tokens; rows.first_token += 0x7fffffff) {
    shape.grid = static_cast<unsigned>(std::min<std::int64_t>(r.num_tokens - rows.first_token, 0x7fffffff));
    launch_waiting(name, kernel, shape, stream, p, rows, error_word());
  }
}

template <bool kNorms, typename CacheT, typename T>
void launch_rope(const RopeParams& p, const char* name, Stream stream) {
  // Registers are better spent on more heads, which share angles, than on longer vectors, unless those are to be quantized. With norms all
  // kernels have the same vectors, which is the order of a norm's sum: results are those of the separate ops.
  constexpr bool kQuantizes = !std::is_same_v<CacheT, NoCache> && !std::is_same_v<CacheT, AnyFloat> && sizeof(CacheT) == 1;
  constexpr bool kWrites = !std::is_same_v<CacheT, NoCache>, kLong = kQuantizes && !kNorms;
  constexpr int kVec = kLong ? kElementsPer16Bytes<T> : 4, kHeads = kLong ? 2 : 4;
  constexpr int kRegisters = kNorms && sizeof(T) == 4 ? 80 : !kNorms && std::is_same_v<CacheT, T> && sizeof(T) == 2 ? 48 : 64;
  if constexpr (!kNorms && sizeof(T) == 2 && (kQuantizes || std::is_same_v<CacheT, T>)) {
    if (is_for_token_kernel(p, sizeof(T), sizeof(CacheT)))
      return launch_rope_tokens(rope_token_kernel<CacheT, T>, sizeof(T), p, name, stream);
  }
  launch_rope_of(are_few(p) ? RopeKernel{rope_kernel<kNorms, CacheT, T, 4, 1, 48>, 4, 1, kWrites}
                            : RopeKernel{rope_kernel<kNorms, CacheT, T, kVec, kHeads, kRegisters>, kVec, kHeads, kWrites},
                 p, name, stream);
}

}  // namespace

void rope_vectors(const RopeParams& params, const char* name, Stream stream) {
  dispatch_float(params.rotary.dtype, name, [&](auto dtype) {
    using T = Element<decltype(dtype)::value>;
    const auto launch = [&](auto norms) {
      constexpr bool kNorms = decltype(norms)::value;
      if (params.kv.cache_dtype == params.rotary.dtype) return launch_rope<kNorms, T, T>(params, name, stream);
      switch (params.kv.cache_dtype) {
        case DType::kFloat8E4M3FN: return launch_rope<kNorms, __nv_fp8_e4m3, T>(params, name, stream);
        case DType::kFloat8E5M2: return launch_rope<kNorms, __nv_fp8_e5m2, T>(params, name, stream);
        case DType::kInt8: return launch_rope<kNorms, std::int8_t, T>(params, name, stream);
        default: return launch_rope<kNorms, AnyFloat, T>(params, name, stream);
      }
    };
    if (params.norm.q_weight == nullptr) {
      // Without norms there is always a cache.
      launch(std::false_type{});
    } else if (params.kv.k_cache == nullptr) {
      launch_rope<true, NoCache, T>(params, name, stream);
    } else {
      launch(std::true_type{});
    }
  });
}

}  // namespace quire::cuda
