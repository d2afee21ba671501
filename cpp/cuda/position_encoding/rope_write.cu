// A norm of each head, rotation, and the write to the cache, in one pass, on CUDA.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <bit>
#include <type_traits>

#include "core/dispatch.h"
#include "cuda/device/dependent_launch.cuh"
#include "cuda/device/reduce.cuh"
#include "cuda/position_encoding/shared.cuh"

namespace quire::cuda {
namespace {

constexpr int kThreads = 128;
// Tokens per SM below which a row is one head.
constexpr int kManyTokensPerSm = 8;

struct RopeRows {
  std::uint32_t query_rows, kv_rows;  // rows of a token: of q; of k, and as many of v
  std::uint32_t block_size;
  int block_shift;  // block_size is two to this; -1: it is no power of two
  std::int64_t first_token;
};

// The element type of a cache that there is none of, and of one of any float dtype.
struct NoCache {};
struct AnyFloat {};

// Grid: CTAs of blockDim.y rows; the rows of all tokens are one list, but those of one head, which are for few tokens, have a token to each
// gridDim.y, which saves a division before the first load. A row is up to kHeads heads of one of q, k and v of one token, a
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
  // One head leaves registers for what has a latency of its own: the position, which the angles wait for, and the weights of its norm.
  constexpr bool kOneHead = kHeads == 1;
  const std::uint32_t item = blockIdx.x * blockDim.y + threadIdx.y, token_of_launch = kOneHead ? blockIdx.y : item / rows_per_token;
  std::uint32_t row = kOneHead ? item : item - token_of_launch * rows_per_token;
  const std::int64_t token = rows.first_token + token_of_launch;
  if (kOneHead ? row >= rows_per_token : token >= r.num_tokens) return;
  const bool is_first_row = row == 0;

  // The row's heads.
  const HeadKind kind = row < rows.query_rows ? HeadKind::kQuery : row < rows.query_rows + rows.kv_rows ? HeadKind::kKey : HeadKind::kValue;
  std::int64_t position = -1, slot = -1;
  const auto read_indices = [&] {
    if (kind != HeadKind::kValue || is_first_row) position = read_index(r.positions, r.position_dtype, token * r.position_stride);
    if (kWrites && (kind != HeadKind::kQuery || is_first_row)) slot = read_index(kv.slot_mapping, kv.slot_dtype, token * kv.slot_stride);
  };
  const bool positions_are_int64 = r.position_dtype == DType::kInt64, slots_are_int64 = kv.slot_dtype == DType::kInt64;
  IndexBits given_position, given_slot;
  if constexpr (kOneHead) {
    if (kind != HeadKind::kValue || is_first_row) given_position.load(r.positions, positions_are_int64, token * r.position_stride);
    if (kWrites && (kind != HeadKind::kQuery || is_first_row)) given_slot.load(kv.slot_mapping, slots_are_int64, token * kv.slot_stride);
  }
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
  if constexpr (kOneHead) {
    position = given_position.value(positions_are_int64);
    slot = given_slot.value(slots_are_int64);
  } else {
    read_indices();
  }
  const bool known = is_known(p, position) && kind != HeadKind::kValue;
  const bool in_cache = kWrites && kind != HeadKind::kQuery && slot >= 0 && slot < kv.num_blocks * kv.block_size;
  const auto record = [&] {
    if (is_first_row && threadIdx.x == 0) record_bad_indices(p, error_word, token, position, slot);
  };
  if constexpr (!kOneHead) record();

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
  }

  // The angles were on their way first.
  if constexpr (kOneHead) record();

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
    const auto known_slot = static_cast<std::uint32_t>(slot);
    const std::uint32_t block_idx = rows.block_shift >= 0 ? known_slot >> rows.block_shift : known_slot / rows.block_size;
    const std::uint32_t offset = known_slot - block_idx * rows.block_size;
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

// One kernel, as the launcher needs it: its code is not a template, as there are many kernels.
struct RopeKernel {
  void (*kernel)(RopeParams, RopeRows, ErrorWord*);
  int vec, heads;
  bool writes;
};

void launch_rope_of(const RopeKernel& choice, const RopeParams& p, const char* name, Stream stream) {
  const RotaryParams& r = p.rotary;
  const std::int64_t lanes = std::bit_ceil(static_cast<std::uint64_t>(ceil_div(r.head_dim / choice.vec, 2)));
  const std::int64_t query_rows = ceil_div(r.num_heads, choice.heads), kv_rows = ceil_div(p.kv.num_kv_heads, choice.heads);
  const std::int64_t rows_per_token = query_rows + (choice.writes ? 2 : 1) * kv_rows, rows_per_cta = kThreads / lanes;
  const auto block_size = static_cast<std::uint32_t>(std::max<std::int64_t>(p.kv.block_size, 1));
  RopeRows rows{static_cast<std::uint32_t>(query_rows), static_cast<std::uint32_t>(kv_rows), block_size,
                std::has_single_bit(block_size) ? std::countr_zero(block_size) : -1, 0};
  const dim3 block(static_cast<unsigned>(lanes), static_cast<unsigned>(rows_per_cta));
  const bool one_head = choice.heads == 1;
  // gridDim.y has 16 bits.
  const std::int64_t tokens_per_launch = one_head ? 0xffff : std::max<std::int64_t>(0x7fffffff / rows_per_token, 1);
  for (; rows.first_token < r.num_tokens; rows.first_token += tokens_per_launch) {
    const std::int64_t num_tokens = std::min(r.num_tokens - rows.first_token, tokens_per_launch);
    const auto num_ctas = static_cast<unsigned>(ceil_div((one_head ? 1 : num_tokens) * rows_per_token, rows_per_cta));
    launch_waiting(name, choice.kernel, dim3(num_ctas, one_head ? static_cast<unsigned>(num_tokens) : 1), block, stream, p, rows,
                   error_word());
  }
}

bool are_few(const RopeParams& p) { return p.rotary.num_tokens < kManyTokensPerSm * current_device_properties().num_sms; }

template <bool kNorms, typename CacheT, typename T>
void launch_rope(const RopeParams& p, const char* name, Stream stream) {
  // Registers are better spent on more heads, which share angles, than on longer vectors, unless those are to be quantized. With norms all
  // kernels have the same vectors, which is the order of a norm's sum: results are those of the separate ops.
  constexpr bool kQuantizes = !std::is_same_v<CacheT, NoCache> && !std::is_same_v<CacheT, AnyFloat> && sizeof(CacheT) == 1;
  constexpr bool kWrites = !std::is_same_v<CacheT, NoCache>, kLong = kQuantizes && !kNorms;
  constexpr int kVec = kLong ? kElementsPer16Bytes<T> : 4, kHeads = kLong ? 2 : 4;
  constexpr int kRegisters = kNorms && sizeof(T) == 4 ? 80 : !kNorms && std::is_same_v<CacheT, T> && sizeof(T) == 2 ? 48 : 64;
  launch_rope_of(are_few(p) ? RopeKernel{rope_kernel<kNorms, CacheT, T, 4, 1, 48>, 4, 1, kWrites}
                            : RopeKernel{rope_kernel<kNorms, CacheT, T, kVec, kHeads, kRegisters>, kVec, kHeads, kWrites},
                 p, name, stream);
}

}  // namespace

bool rotate_few_tokens(const RotaryParams& params, Stream stream) {
  RopeParams p;
  p.rotary = params;
  p.op = OpId::kRotaryEmbedding;
  if (params.head_dim != params.rotary_dim || params.head_dim > 512 || !are_few(p)) return false;
  p.kv.k = params.k;
  p.kv.num_kv_heads = params.k == nullptr ? 0 : params.num_kv_heads;
  p.kv.k_token_stride = params.k_token_stride;
  p.kv.k_head_stride = params.k_head_stride;
  dispatch_float(params.dtype, "rotary_embedding", [&](auto dtype) {
    using T = Element<decltype(dtype)::value>;
    launch_rope_of({rope_kernel<false, NoCache, T, 4, 1, 48>, 4, 1, false}, p, "rotary_embedding", stream);
  });
  return true;
}

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
