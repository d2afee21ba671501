// Writing, reading and copying the paged KV cache on CUDA.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <bit>
#include <string>
#include <type_traits>

#include "core/dispatch.h"
#include "core/explain.h"
#include "cuda/device/divisor.cuh"
#include "cuda/device/reduce.cuh"
#include "cuda/element.h"
#include "cuda/launch.h"
#include "ops/kv_cache.h"

namespace quire::cuda {
namespace {

constexpr int kThreads = 128;
// Vectors that a thread has in flight.
constexpr int kVectorsInFlight = 4;
// Tokens per SM below which a token is spread over as many threads as it has vectors.
constexpr int kManyTokensPerSm = 8;

// Where the elements of K, or of V, of one call lie.
struct KvSide {
  void* tokens;
  void* cache;
  const float* scale;
  std::int64_t scale_stride, token_stride, head_stride, cache_block_stride, cache_slot_stride, cache_head_stride;
};

struct KvKernelParams {
  KvSide sides[2];
  const void* slot_mapping;
  std::int64_t slot_stride, num_tokens, num_slots, block_size;
  std::uint32_t num_heads, head_dim;
  bool slots_are_int64;
  ErrorWord* error_word;
  // A group of vector_lanes x head_lanes threads moves K or V of one token.
  std::uint32_t vectors_per_head, vector_lanes, head_lanes;
};

// Grid: a CTA holds groups of threads; a group moves K or V of one token between its row and its slot, kVec elements at a time,
// a thread always the same vectors of up to kUnroll heads at once. CTAs walk all (token, side) items. kRaw copies bits, between
// types of one size; else values are converted, and scaled for the 8-bit types.
template <bool kWrite, bool kRaw, typename T, typename CacheT, int kVec>
__global__ void __launch_bounds__(kThreads) kv_kernel(const __grid_constant__ KvKernelParams p) {
  constexpr bool kIs8Bit = sizeof(CacheT) == 1;
  // Rare pairs of types get less code, not less width.
  constexpr int kUnroll = kVec > 1 && (kRaw || kIs8Bit) ? kVectorsInFlight : 1;
  const std::uint32_t group_size = p.vector_lanes * p.head_lanes, groups_per_cta = kThreads / group_size;
  const std::uint32_t group = threadIdx.x / group_size, lane = threadIdx.x - group * group_size;
  const std::uint32_t first_head = lane / p.vector_lanes, first_vector = lane - first_head * p.vector_lanes;
  if (group >= groups_per_cta) return;
  const std::int64_t item_step = static_cast<std::int64_t>(gridDim.x) * groups_per_cta;
  for (std::int64_t item = static_cast<std::int64_t>(blockIdx.x) * groups_per_cta + group; item < 2 * p.num_tokens; item += item_step) {
    const std::int64_t token = item >> 1;
    const KvSide& side = p.sides[item & 1];
    const std::int64_t slot = p.slots_are_int64 ? static_cast<const std::int64_t*>(p.slot_mapping)[token * p.slot_stride]
                                                : static_cast<const std::int32_t*>(p.slot_mapping)[token * p.slot_stride];
    const bool skipped = slot < 0 || slot >= p.num_slots;
    const std::int64_t safe_slot = skipped ? 0 : slot;
    const std::int64_t block_idx = divide(safe_slot, p.block_size);
    T* const row = static_cast<T*>(side.tokens) + token * side.token_stride;
    CacheT* const slot_row = static_cast<CacheT*>(side.cache) + block_idx * side.cache_block_stride +
                             (safe_slot - block_idx * p.block_size) * side.cache_slot_stride;
    const bool scale_per_head = kIs8Bit && side.scale_stride != 0;
    const float common_scale = kIs8Bit && side.scale != nullptr ? side.scale[0] : 1.0f;
    const Divisor common_divisor(common_scale);

    for (std::uint32_t vector = first_vector; vector < p.vectors_per_head; vector += p.vector_lanes) {
      for (std::uint32_t head = first_head; head < p.num_heads; head += kUnroll * p.head_lanes) {
        T* const row_at = row + vector * kVec + head * side.head_stride;
        CacheT* const slot_at = slot_row + vector * kVec + head * side.cache_head_stride;
        const std::int64_t row_step = p.head_lanes * side.head_stride, slot_step = p.head_lanes * side.cache_head_stride;
        const auto is_inside = [&](int u) { return u == 0 || head + u * p.head_lanes < p.num_heads; };

        // Load.
        using Source = std::conditional_t<kWrite, T, CacheT>;
        Packed<Source, kVec> packed[kUnroll];
        float scales[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          packed[u] = {};
          scales[u] = common_scale;
          if (!is_inside(u)) continue;
          if (scale_per_head) scales[u] = side.scale[head + u * p.head_lanes];
          if constexpr (kWrite) {
            packed[u] = load_packed<T, kVec>(row_at + u * row_step);
          } else if (!skipped) {
            packed[u] = load_packed<CacheT, kVec>(slot_at + u * slot_step);
          }
        }
        // Here, not before the loads, so that they do not wait for the slot.
        if (kWrite && skipped) continue;

        // Convert and store. What a skipped token gathers is zero.
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          if (!is_inside(u)) continue;
          if constexpr (kRaw) {
            store_raw(kWrite ? static_cast<void*>(slot_at + u * slot_step) : static_cast<void*>(row_at + u * row_step), packed[u]);
          } else {
            float v[kVec];
            unpack<Source, kVec>(v, packed[u]);
            if constexpr (kWrite && kIs8Bit) {
              const Divisor divisor = scale_per_head ? Divisor(scales[u]) : common_divisor;
              store_raw(slot_at + u * slot_step, divisor.divide_and_pack<CacheT>(v));
            } else if constexpr (kWrite) {
              store_floats(slot_at + u * slot_step, v);
            } else {
#pragma unroll
              for (int e = 0; e < kVec; ++e) v[e] = skipped ? 0.0f : kIs8Bit ? v[e] * scales[u] : v[e];
              store_floats(row_at + u * row_step, v);
            }
          }
        }
      }
    }
    if (skipped && slot != -1 && lane == 0 && (item & 1) == 0)
      record_error(p.error_word, kWrite ? OpId::kWriteKv : OpId::kGatherKv, ArgId::kSlotMapping, token, slot);
  }
}

template <bool kWrite, bool kRaw, typename T, typename CacheT, int kVec>
void launch_kv(KvKernelParams p, const char* name, Stream stream) {
  p.vectors_per_head = p.head_dim / kVec;
  // A long head, as dense heads together are, becomes heads of one warp's width where that comes out even.
  if (p.num_heads == 1 && p.vectors_per_head % kWarpSize == 0) {
    p.num_heads = p.vectors_per_head / kWarpSize;
    p.vectors_per_head = kWarpSize;
    for (KvSide& side : p.sides) side.head_stride = side.cache_head_stride = kWarpSize * kVec;
  }
  const bool many_tokens = p.num_tokens >= kManyTokensPerSm * current_device_properties().num_sms;
  const std::uint32_t wanted_head_lanes = many_tokens ? (p.num_heads + kVectorsInFlight - 1) / kVectorsInFlight : p.num_heads;
  p.vector_lanes = std::min<std::uint32_t>(p.vectors_per_head, kThreads);
  p.head_lanes = std::min<std::uint32_t>(wanted_head_lanes, kThreads / p.vector_lanes);
  const std::int64_t num_ctas = ceil_div(2 * p.num_tokens, kThreads / (p.vector_lanes * p.head_lanes));
  kv_kernel<kWrite, kRaw, T, CacheT, kVec>
      <<<static_cast<unsigned>(std::min<std::int64_t>(num_ctas, 0x7fffffff)), kThreads, 0, cuda_stream(stream)>>>(p);
  QUIRE_CHECK_LAUNCH(name, stream);
}

template <bool kWrite, bool kRaw, typename T, typename CacheT>
void launch_kv_vectors(const KvKernelParams& p, const char* name, Stream stream) {
  constexpr int kVec = 16 / static_cast<int>(std::max(sizeof(T), sizeof(CacheT)));
  const auto side_is_aligned = [&](const KvSide& side) {
    constexpr std::int64_t kRowBytes = kVec * sizeof(T), kCacheBytes = kVec * sizeof(CacheT);
    return is_aligned(side.tokens, kRowBytes) && keeps_alignment(p.num_tokens, side.token_stride, sizeof(T), kRowBytes) &&
           keeps_alignment(p.num_heads, side.head_stride, sizeof(T), kRowBytes) && is_aligned(side.cache, kCacheBytes) &&
           keeps_alignment(0, side.cache_block_stride, sizeof(CacheT), kCacheBytes) &&
           keeps_alignment(p.block_size, side.cache_slot_stride, sizeof(CacheT), kCacheBytes) &&
           keeps_alignment(p.num_heads, side.cache_head_stride, sizeof(CacheT), kCacheBytes);
  };
  const char* const obstacle = p.head_dim % kVec != 0         ? "head_dim"
                               : !side_is_aligned(p.sides[0]) ? "k or k_cache"
                               : !side_is_aligned(p.sides[1]) ? "v or v_cache"
                                                              : nullptr;
  if (explain_vectors(obstacle)) return;
  if (obstacle == nullptr) {
    launch_kv<kWrite, kRaw, T, CacheT, kVec>(p, name, stream);
  } else {
    launch_kv<kWrite, kRaw, T, CacheT, 1>(p, name, stream);
  }
}

template <bool kWrite>
void move_kv(const KvParams& params, const char* name, Stream stream) {
  // A kernel counts a token's elements in 32 bits, with room for a step past the end.
  if (params.num_kv_heads > 0x40000000 / params.head_dim)
    throw UnsupportedError(std::string("[") + name + "] k: expected at most 2^30 elements per token, got " +
                           std::to_string(params.num_kv_heads) + " x " + std::to_string(params.head_dim));
  KvKernelParams p{{{params.k, params.k_cache, params.k_scale, params.k_scale_stride, params.k_token_stride, params.k_head_stride,
                     params.k_cache_block_stride, params.k_cache_slot_stride, params.k_cache_head_stride},
                    {params.v, params.v_cache, params.v_scale, params.v_scale_stride, params.v_token_stride, params.v_head_stride,
                     params.v_cache_block_stride, params.v_cache_slot_stride, params.v_cache_head_stride}},
                   params.slot_mapping,
                   params.slot_stride,
                   params.num_tokens,
                   params.num_blocks * params.block_size,
                   params.block_size,
                   static_cast<std::uint32_t>(params.num_kv_heads),
                   static_cast<std::uint32_t>(params.head_dim),
                   params.slot_dtype == DType::kInt64,
                   error_word(),
                   0,
                   0,
                   0};
  for (KvSide& side : p.sides)
    if (side.scale == nullptr || p.num_heads == 1) side.scale_stride = 0;
  // An empty cache may have block_size 0, by which nothing can be divided.
  p.block_size = std::max<std::int64_t>(p.block_size, 1);
  // Heads that lie side by side under one scale are one long head.
  const auto heads_are_dense = [&](const KvSide& side) {
    return side.head_stride == p.head_dim && side.cache_head_stride == p.head_dim && side.scale_stride == 0;
  };
  if (heads_are_dense(p.sides[0]) && heads_are_dense(p.sides[1])) {
    p.head_dim *= p.num_heads;
    p.num_heads = 1;
  }
  if (params.dtype == params.cache_dtype) {
    if (params.dtype == DType::kFloat32) return launch_kv_vectors<kWrite, true, std::uint32_t, std::uint32_t>(p, name, stream);
    return launch_kv_vectors<kWrite, true, std::uint16_t, std::uint16_t>(p, name, stream);
  }
  dispatch_float(params.dtype, name, [&](auto dtype) {
    using T = Element<decltype(dtype)::value>;
    dispatch_kv(params.cache_dtype, name, [&](auto cache_dtype) {
      using CacheT = Element<decltype(cache_dtype)::value>;
      if constexpr (!std::is_same_v<T, CacheT>) launch_kv_vectors<kWrite, false, T, CacheT>(p, name, stream);
    });
  });
}

// Grid: work item = one pair x one chunk of kThreads * kVectorsInFlight vectors of kBytes; CTAs walk all items.
template <int kBytes, typename Index>
__global__ void __launch_bounds__(kThreads)
    copy_blocks_kernel(const __grid_constant__ CopyBlocksParams p, const std::int64_t num_chunks, ErrorWord* const error_word) {
  const std::int64_t vectors_per_segment = p.segment_bytes / kBytes;
  const std::int64_t num_vectors = p.num_segments * vectors_per_segment;
  const auto* const pairs = static_cast<const Index*>(p.pairs);
  for (std::int64_t item = blockIdx.x; item < p.num_pairs * num_chunks; item += gridDim.x) {
    const std::int64_t pair = divide(item, num_chunks);
    const std::int64_t chunk = item - pair * num_chunks;
    const std::int64_t src = pairs[2 * pair], dst = pairs[2 * pair + 1];
    const bool src_is_valid = src >= 0 && src < p.num_blocks, dst_is_valid = dst >= 0 && dst < p.num_blocks;
    if (!src_is_valid || !dst_is_valid) {
      if (chunk == 0 && threadIdx.x == 0) {
        if (!src_is_valid && src != -1) record_error(error_word, OpId::kCopyBlocks, ArgId::kPairs, 2 * pair, src);
        if (!dst_is_valid && dst != -1) record_error(error_word, OpId::kCopyBlocks, ArgId::kPairs, 2 * pair + 1, dst);
      }
      continue;
    }
    const char* const from = static_cast<const char*>(p.cache) + src * p.block_stride_bytes;
    char* const to = static_cast<char*>(p.cache) + dst * p.block_stride_bytes;
    RawVector<kBytes> vectors[kVectorsInFlight];
    std::int64_t offsets[kVectorsInFlight];
#pragma unroll
    for (int u = 0; u < kVectorsInFlight; ++u) {
      const std::int64_t vector = (chunk * kVectorsInFlight + u) * kThreads + threadIdx.x;
      offsets[u] = -1;
      if (vector >= num_vectors) continue;
      const std::int64_t segment = p.num_segments == 1 ? 0 : divide(vector, vectors_per_segment);
      offsets[u] = segment * p.segment_stride_bytes + (vector - segment * vectors_per_segment) * kBytes;
      vectors[u] = load_raw<kBytes>(from + offsets[u]);
    }
#pragma unroll
    for (int u = 0; u < kVectorsInFlight; ++u)
      if (offsets[u] >= 0) store_raw(to + offsets[u], vectors[u]);
  }
}

template <int kBytes>
void launch_copy_blocks(const CopyBlocksParams& p, Stream stream) {
  const std::int64_t num_chunks = ceil_div(p.num_segments * (p.segment_bytes / kBytes), std::int64_t{kThreads} * kVectorsInFlight);
  const auto num_ctas = static_cast<unsigned>(std::min<std::int64_t>(p.num_pairs * num_chunks, 0x7fffffff));
  dispatch_index(p.pair_dtype, "copy_blocks", [&](auto index) {
    copy_blocks_kernel<kBytes, decltype(index)><<<num_ctas, kThreads, 0, cuda_stream(stream)>>>(p, num_chunks, error_word());
  });
  QUIRE_CHECK_LAUNCH("copy_blocks", stream);
}

}  // namespace

void write_kv(const KvParams& params, Stream stream) { move_kv<true>(params, "write_kv", stream); }

void gather_kv(const KvParams& params, Stream stream) { move_kv<false>(params, "gather_kv", stream); }

void copy_blocks(const CopyBlocksParams& params, Stream stream) {
  if (params.num_segments == 0 || params.segment_bytes == 0) return;
  const auto all_aligned = [&](std::int64_t num_bytes) {
    return is_aligned(params.cache, num_bytes) && params.block_stride_bytes % num_bytes == 0 && params.segment_bytes % num_bytes == 0 &&
           keeps_alignment(params.num_segments, params.segment_stride_bytes, 1, num_bytes);
  };
  if (explain_vectors(all_aligned(16) ? nullptr : "cache")) return;
  if (all_aligned(16)) return launch_copy_blocks<16>(params, stream);
  if (all_aligned(4)) return launch_copy_blocks<4>(params, stream);
  if (all_aligned(2)) return launch_copy_blocks<2>(params, stream);
  launch_copy_blocks<1>(params, stream);
}

void copy_memory(void* dst, std::int64_t dst_pitch_bytes, const void* src, std::int64_t src_pitch_bytes, std::int64_t width_bytes,
                 std::int64_t height, Stream stream) {
  if (width_bytes == 0 || height == 0) return;
  const cudaStream_t target = cuda_stream(stream);
  const auto width = static_cast<std::size_t>(width_bytes);
  if (height == 1 || (dst_pitch_bytes == width_bytes && src_pitch_bytes == width_bytes)) {
    QUIRE_CUDA_CHECK(cudaMemcpyAsync(dst, src, width * static_cast<std::size_t>(height), cudaMemcpyDefault, target));
    QUIRE_CHECK_LAUNCH("copy_memory", stream);
    return;
  }
  // The 2D copy takes pitches of 31 bits, and none below the width.
  const auto [low, high] = std::minmax(dst_pitch_bytes, src_pitch_bytes);
  if (low >= width_bytes && high <= 0x7fffffff) {
    QUIRE_CUDA_CHECK(cudaMemcpy2DAsync(dst, static_cast<std::size_t>(dst_pitch_bytes), src, static_cast<std::size_t>(src_pitch_bytes),
                                       width, static_cast<std::size_t>(height), cudaMemcpyDefault, target));
    QUIRE_CHECK_LAUNCH("copy_memory", stream);
    return;
  }
  for (std::int64_t row = 0; row < height; ++row)
    QUIRE_CUDA_CHECK(cudaMemcpyAsync(static_cast<char*>(dst) + row * dst_pitch_bytes, static_cast<const char*>(src) + row * src_pitch_bytes,
                                     width, cudaMemcpyDefault, target));
  QUIRE_CHECK_LAUNCH("copy_memory", stream);
}

}  // namespace quire::cuda
