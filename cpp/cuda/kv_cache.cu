// Writing, reading and copying the paged KV cache on CUDA.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <bit>
#include <string>
#include <type_traits>

#include "core/dispatch.h"
#include "core/explain_vectors.h"
#include "cuda/device/dependent_launch.cuh"
#include "cuda/device/divisor.cuh"
#include "cuda/element.h"
#include "cuda/launch.h"
#include "ops/kv_cache.h"
#include "quire/error.h"

namespace quire::cuda {
namespace {

// Threads of a CTA, or a few more.
constexpr int kThreads = 128;
// Vectors that a thread of copy_blocks has in flight.
constexpr int kVectorsInFlight = 4;
// Threads of an SM at once, about.
constexpr int kResidentThreads = 1024;
// What a call may have fewer slots than.
constexpr std::int64_t kMaxSlots = 0xffffffff;

// Where the elements of K, or of V, of one call lie.
struct KvSide {
  void* tokens;
  void* cache;
  const float* scale;
  std::int64_t scale_stride, token_stride, head_stride, cache_block_stride, cache_slot_stride, cache_head_stride;
  std::int64_t block_gap = 0;  // from the end of a block's slots to the next block
};

struct KvKernelParams {
  KvSide sides[2];
  const void* slot_mapping;
  std::int64_t slot_stride_bytes, first_token, num_tokens;
  std::uint32_t num_slots;
  std::uint32_t block_size, num_heads, head_dim;
  bool slots_are_int64;
  ErrorWord* error_word;
  std::uint32_t vectors_per_head, num_vectors;  // of K or V of one token
  std::uint32_t num_chunks;                     // of blockDim.x vectors
  int block_shift;                              // block_size is two to this; -1: it is no power of two
};

// Grid: a CTA moves one chunk of the vectors of K or V, kVec elements each, of blockDim.y * kTokens tokens between their rows and their
// slots. A thread keeps its place within the row, and with it its scale. kRaw copies bits, between types of one size; else values are
// converted, and scaled for the 8-bit types. The loads of all of a thread's tokens come before its first store.
template <bool kWrite, bool kRaw, typename T, typename CacheT, int kVec, int kTokens, int kRegisters>
__global__ void __maxnreg__(kRegisters) kv_kernel(const __grid_constant__ KvKernelParams p) {
  device::wait_for_predecessor();
  constexpr bool kIs8Bit = sizeof(CacheT) == 1;
  using Source = std::conditional_t<kWrite, T, CacheT>;
  const KvSide& side = p.sides[blockIdx.x % 2];
  std::uint32_t tile = blockIdx.x / 2, chunk = 0;
  if (p.num_chunks != 1) {
    chunk = tile % p.num_chunks;
    tile /= p.num_chunks;
  }
  const std::uint32_t vector = chunk * blockDim.x + threadIdx.x;
  if (vector >= p.num_vectors) return;
  const std::uint32_t head = p.num_heads == 1 ? 0 : vector / p.vectors_per_head;
  const std::uint32_t element = (vector - head * p.vectors_per_head) * kVec;
  const std::int64_t first = p.first_token + std::int64_t{tile} * (blockDim.y * kTokens) + threadIdx.y;
  if (first >= p.num_tokens) return;
  T* const row = static_cast<T*>(side.tokens) + first * side.token_stride + head * side.head_stride + element;
  const std::int64_t row_step = blockDim.y * side.token_stride;
  const char* const given_slots = static_cast<const char*>(p.slot_mapping) + first * p.slot_stride_bytes;
  const std::int64_t slot_step = blockDim.y * p.slot_stride_bytes;
  CacheT* const cache = static_cast<CacheT*>(side.cache) + head * side.cache_head_stride + element;
  float scale = 1.0f;
  if (kIs8Bit && side.scale != nullptr) scale = side.scale[head * side.scale_stride];

  // By one thread of a token.
  const auto report = [&](int index, int count) {
#pragma unroll 1
    for (int i = index; i < index + count; ++i) {
      IndexBits bits;
      bits.load(given_slots + i * slot_step, p.slots_are_int64, 0);
      const std::int64_t slot = bits.value(p.slots_are_int64);
      if (slot < -1 || slot >= p.num_slots)
        record_error(p.error_word, kWrite ? OpId::kWriteKv : OpId::kGatherKv, ArgId::kSlotMapping, first + i * blockDim.y, slot);
    }
  };
  // Tokens [index, index + kCount) of the thread's.
  const auto move = [&]<int kCount>(std::integral_constant<int, kCount>, int index) {
    // Load. Nothing looks at a slot or a scale before everything is on its way.
    T* const rows = row + index * row_step;
    const char* const given = given_slots + index * slot_step;
    IndexBits bits[kCount];
    Packed<Source, kVec> packed[kCount];
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      bits[u].load(given + u * slot_step, p.slots_are_int64, 0);
      if constexpr (kWrite) packed[u] = load_raw_once<kVec* static_cast<int>(sizeof(T))>(rows + u * row_step);
    }
    // There are fewer than 2^32 - 1 slots: what is none has another upper half than 0, or is too large.
    std::uint32_t slots[kCount];
#pragma unroll
    for (int u = 0; u < kCount; ++u) slots[u] = bits[u].bits.y == 0 ? bits[u].bits.x : 0xffffffffu;
    const auto is_slot = [&](int u) { return slots[u] < p.num_slots; };
    bool are_slots = true;
#pragma unroll
    for (int u = 0; u < kCount; ++u) are_slots = are_slots && is_slot(u);
    if (!are_slots && vector == 0 && blockIdx.x % 2 == 0) report(index, kCount);
    const auto slot_row = [&](int u) {
      CacheT* const result = cache + slots[u] * side.cache_slot_stride;
      if (side.block_gap == 0) return result;
      const std::uint32_t block_idx = p.block_shift >= 0 ? slots[u] >> p.block_shift : slots[u] / p.block_size;
      return result + block_idx * side.block_gap;
    };
    if constexpr (!kWrite) {
#pragma unroll
      for (int u = 0; u < kCount; ++u) {
        packed[u] = {};
        if (is_slot(u)) packed[u] = load_packed<CacheT, kVec>(slot_row(u));
      }
    }

    // Convert and store. What a skipped token gathers is zero. Nothing but the store of a write has a condition: the compiler would move the
    // load of a row that is used under one there, behind the wait for the slot.
    CacheT* target = slot_row(0);
    const Divisor divisor(scale);
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      if constexpr (kWrite) {
        if (u > 0) target = slot_row(u);
        Packed<CacheT, kVec> result;
        if constexpr (kRaw) {
          result = packed[u];
        } else {
          float v[kVec];
          unpack<Source, kVec>(v, packed[u]);
          if constexpr (kIs8Bit) {
            result = divisor.divide_and_pack<CacheT>(v);
          } else {
            result = pack<CacheT, kVec>(v);
          }
        }
        if (is_slot(u)) store_raw(target, result);
      } else if constexpr (kRaw) {
        store_raw(rows + u * row_step, packed[u]);
      } else {
        float v[kVec];
        unpack<Source, kVec>(v, packed[u]);
#pragma unroll
        for (int e = 0; e < kVec; ++e) v[e] = !is_slot(u) ? 0.0f : kIs8Bit ? v[e] * scale : v[e];
        store_floats(rows + u * row_step, v);
      }
    }
  };
  if constexpr (kTokens == 1) {
    move(std::integral_constant<int, 1>{}, 0);
  } else if (first + (kTokens - 1) * blockDim.y < p.num_tokens) {
    move(std::integral_constant<int, kTokens>{}, 0);
  } else {
    // The last tile.
#pragma unroll 1
    for (int index = 0; first + index * blockDim.y < p.num_tokens; ++index) move(std::integral_constant<int, 1>{}, index);
  }
}

// write_kv of few tokens whose heads lie side by side under one scale: nothing general on the way to the first loads. Parameters in the order of
// their use, in the lines of the constant cache (cuda/norm/dense_rows.cuh); of K, then of V. Strides of tokens are counted in 16 bytes, those of
// caches in vectors.
struct FewKvParams {
  const void* slot_mapping;
  const void* tokens[2];
  std::uint32_t slot_step, token_strides[2];  // slot_step in bytes
  std::uint32_t num_vectors, num_slots;       // vectors of K of one token
  std::uint16_t threads;                      // of a CTA
  bool slots_are_int64;
  // Here ends a line.
  const float* scales[2];
  void* caches[2];
  std::uint32_t slot_strides[2];
  std::int64_t block_gaps[2];
  std::uint32_t block_shift;  // block_size is two to this, or there are no gaps
  ErrorWord* error_word;
};

// Sides that a thread of write_few_kernel writes: both where there is nothing to compute.
template <bool kRaw>
inline constexpr int kFewSides = kRaw ? 2 : 1;

// Grid: (chunks of a token's vectors, each for K and for V unless a thread writes both; tokens). A thread writes one vector of each of its sides.
// kRaw copies bits, of whatever type.
template <bool kRaw, typename T, typename CacheT>
__global__ void __launch_bounds__(kThreads) write_few_kernel(const __grid_constant__ FewKvParams p) {
  constexpr int kVec = 16 / static_cast<int>(sizeof(CacheT)), kPieces = kVec * static_cast<int>(sizeof(T)) / 16, kSides = kFewSides<kRaw>;
  using Source = Packed<T, kVec>;
  using Result = Packed<CacheT, kVec>;
  const std::uint32_t token = blockIdx.y, chunk = kSides == 2 ? blockIdx.x : blockIdx.x / 2;
  const std::uint32_t vector = chunk * p.threads + threadIdx.x, first_side = kSides == 2 ? 0 : blockIdx.x % 2;
  const auto* const words = reinterpret_cast<const std::uint32_t*>(static_cast<const char*>(p.slot_mapping) + token * p.slot_step);
  device::wait_for_predecessor();

  // Load. The halves of a slot have registers of their own, so that nothing waits for one before the other. A thread past the end reads what
  // the last one reads.
  uint2 bits = {words[0], 0};
  if (p.slots_are_int64) bits.y = words[1];
  const std::uint32_t at = min(vector, p.num_vectors - 1) * kPieces;
  Source rows[kSides];
  float scales[kSides];
#pragma unroll
  for (int i = 0; i < kSides; ++i) {
    const std::uint32_t side = first_side + static_cast<std::uint32_t>(i);
    rows[i] = load_raw_once<sizeof(Source)>(static_cast<const uint4*>(p.tokens[side]) + (token * p.token_strides[side] + at));
    scales[i] = 1.0f;
    if (!kRaw && p.scales[side] != nullptr) scales[i] = *p.scales[side];
  }
  // Nothing is changed here, but the slot needs the rows, which the compiler would else load under the condition of the stores, behind the slot.
  const std::uint32_t nothing = p.num_vectors >> 31;
#pragma unroll
  for (int i = 0; i < kSides * kPieces; ++i) bits.x ^= rows[i / kPieces].words[i % kPieces * 4] & nothing;
  const std::uint32_t slot = bits.y == 0 ? bits.x : 0xffffffffu;
  const std::uint32_t block_idx = slot >> p.block_shift;
  const bool stores = slot < p.num_slots && vector < p.num_vectors;

  // Convert and store.
#pragma unroll
  for (int i = 0; i < kSides; ++i) {
    const std::uint32_t side = first_side + static_cast<std::uint32_t>(i);
    Result result;
    if constexpr (kRaw) {
      result = rows[i];
    } else {
      float x[kVec];
      unpack<T, kVec>(x, rows[i]);
      result = Divisor(scales[i]).template divide_and_pack<CacheT>(x);
    }
    const std::int64_t to = std::int64_t{slot} * p.slot_strides[side] + block_idx * p.block_gaps[side] + vector;
    if (stores) store_raw(static_cast<Result*>(p.caches[side]) + to, result);
  }
  if (vector == 0 && first_side == 0 && slot >= p.num_slots) {
    const std::int64_t given = IndexBits{bits}.value(p.slots_are_int64);
    if (given != -1) record_error(p.error_word, OpId::kWriteKv, ArgId::kSlotMapping, token, given);
  }
}

// One kernel, as the launcher needs it: its code is not a template, as there are many kernels.
struct KvKernel {
  void (*kernel)(KvKernelParams);
  int vec, tokens;                 // elements of a vector; tokens of a thread, blockDim.y apart
  void (*single)(KvKernelParams);  // has one token to a thread
  void (*few)(FewKvParams);        // or null; its vectors have vec elements, too
  int few_sides;
};

// Whether choice.few took the tokens.
bool write_few(const KvKernel& choice, const KvKernelParams& p, std::int64_t item_bytes, const char* name, Stream stream) {
  constexpr std::int64_t kMost = 0xffffffff;
  const std::int64_t vec = choice.vec, num_vectors = p.head_dim / vec, pieces = p.head_dim * item_bytes / 16;
  const std::int64_t slot_step = p.num_tokens == 1 ? 0 : p.slot_stride_bytes;
  const bool has_gaps = p.sides[0].block_gap != 0 || p.sides[1].block_gap != 0;
  const auto piece_stride = [&](const KvSide& side) { return side.token_stride * item_bytes / 16; };
  const auto fits = [&](const KvSide& side) {
    return side.scale_stride == 0 && side.cache_slot_stride >= 0 && side.cache_slot_stride % vec == 0 &&
           side.cache_slot_stride / vec <= kMost &&
           (p.num_tokens == 1 || (piece_stride(side) >= 0 && piece_stride(side) <= (kMost - pieces) / p.num_tokens));
  };
  if (choice.few == nullptr || p.num_heads != 1 || (has_gaps && p.block_shift < 0) || p.num_tokens > 0xffff || slot_step < 0 ||
      slot_step > kMost / p.num_tokens || !fits(p.sides[0]) || !fits(p.sides[1]))
    return false;
  const std::int64_t num_chunks = ceil_div(num_vectors, kThreads);
  FewKvParams few{.slot_mapping = p.slot_mapping,
                  .tokens = {p.sides[0].tokens, p.sides[1].tokens},
                  .slot_step = static_cast<std::uint32_t>(slot_step),
                  .token_strides = {},
                  .num_vectors = static_cast<std::uint32_t>(num_vectors),
                  .num_slots = p.num_slots,
                  .threads = static_cast<std::uint16_t>(ceil_div(ceil_div(num_vectors, num_chunks), 32) * 32),
                  .slots_are_int64 = p.slots_are_int64,
                  .scales = {p.sides[0].scale, p.sides[1].scale},
                  .caches = {p.sides[0].cache, p.sides[1].cache},
                  .slot_strides = {},
                  .block_gaps = {p.sides[0].block_gap / vec, p.sides[1].block_gap / vec},
                  .block_shift = has_gaps ? static_cast<std::uint32_t>(p.block_shift) : 31,
                  .error_word = p.error_word};
  for (int i = 0; i < 2; ++i) {
    few.token_strides[i] = static_cast<std::uint32_t>(piece_stride(p.sides[i]));
    few.slot_strides[i] = static_cast<std::uint32_t>(p.sides[i].cache_slot_stride / vec);
  }
  const dim3 grid(static_cast<unsigned>(num_chunks * (2 / choice.few_sides)), static_cast<unsigned>(p.num_tokens));
  launch_waiting(name, choice.few, grid, few.threads, stream, few);
  return true;
}

void launch_kv_of(const KvKernel& choice, KvKernelParams p, std::int64_t item_bytes, const char* name, Stream stream) {
  p.vectors_per_head = p.head_dim / static_cast<std::uint32_t>(choice.vec);
  p.num_vectors = p.num_heads * p.vectors_per_head;
  p.num_chunks = static_cast<std::uint32_t>(ceil_div(p.num_vectors, 2 * kThreads));
  const dim3 block(static_cast<unsigned>(ceil_div(p.num_vectors, p.num_chunks)));
  const unsigned rows = std::max(1u, kThreads / block.x);
  // Several tokens to a thread where at least half a round of threads is left to every SM.
  const std::int64_t half_a_round = kResidentThreads / 2 * current_device_properties().num_sms;
  const bool in_one = choice.tokens == 1 || 2 * p.num_tokens * p.num_vectors < half_a_round * choice.tokens;
  p.block_shift = std::has_single_bit(p.block_size) ? std::countr_zero(p.block_size) : -1;
  if (in_one && write_few(choice, p, item_bytes, name, stream)) return;
  const std::int64_t tile_tokens = rows * static_cast<unsigned>(in_one ? 1 : choice.tokens),
                     tiles_per_launch = 0x7fffffff / (2 * p.num_chunks);
  for (; p.first_token < p.num_tokens; p.first_token += tiles_per_launch * tile_tokens) {
    const std::int64_t num_tiles = std::min(ceil_div(p.num_tokens - p.first_token, tile_tokens), tiles_per_launch);
    launch_waiting(name, in_one ? choice.single : choice.kernel, static_cast<unsigned>(2 * p.num_chunks * num_tiles), dim3(block.x, rows),
                   stream, p);
  }
}

// `item_bytes` and `cache_item_bytes` are the sizes of T and CacheT.
void launch_kv_vectors(const KvKernel& vectors, const KvKernel& elements, std::int64_t item_bytes, std::int64_t cache_item_bytes,
                       const KvKernelParams& p, const char* name, Stream stream) {
  const auto side_is_aligned = [&](const KvSide& side) {
    return is_aligned(side.tokens, 16) && keeps_alignment(p.num_tokens, side.token_stride, item_bytes, 16) &&
           keeps_alignment(p.num_heads, side.head_stride, item_bytes, 16) && is_aligned(side.cache, 16) &&
           keeps_alignment(0, side.cache_block_stride, cache_item_bytes, 16) &&
           keeps_alignment(p.block_size, side.cache_slot_stride, cache_item_bytes, 16) &&
           keeps_alignment(p.num_heads, side.cache_head_stride, cache_item_bytes, 16);
  };
  const char* const obstacle = p.head_dim % static_cast<std::uint32_t>(vectors.vec) != 0 ? "head_dim"
                               : !side_is_aligned(p.sides[0])                            ? "k or k_cache"
                               : !side_is_aligned(p.sides[1])                            ? "v or v_cache"
                                                                                         : nullptr;
  if (explain_vectors(obstacle)) return;
  launch_kv_of(obstacle == nullptr ? vectors : elements, p, item_bytes, name, stream);
}

template <bool kWrite, bool kRaw, typename T, typename CacheT>
void launch_kv(const KvKernelParams& p, const char* name, Stream stream) {
  // Both sides move in pieces of 16 bytes, or several times 16.
  constexpr int kVec = 16 / static_cast<int>(sizeof(T) < sizeof(CacheT) ? sizeof(T) : sizeof(CacheT));
  // Copies have the registers for many tokens. Conversions gain more from threads, and rare pairs of types get less code.
  constexpr int kTokens = kRaw ? 8 : 1, kRegisters = kRaw ? 64 : 40;
  const auto single = kv_kernel<kWrite, kRaw, T, CacheT, kVec, 1, 40>, elements = kv_kernel<kWrite, kRaw, T, CacheT, 1, 1, 40>;
  void (*few)(FewKvParams) = nullptr;
  if constexpr (kWrite && kRaw) few = write_few_kernel<true, std::uint32_t, std::uint32_t>;
  if constexpr (kWrite && !kRaw && sizeof(T) == 2 && sizeof(CacheT) == 1) few = write_few_kernel<false, T, CacheT>;
  launch_kv_vectors({kv_kernel<kWrite, kRaw, T, CacheT, kVec, kTokens, kRegisters>, kVec, kTokens, single, few, kFewSides<kRaw>},
                    {elements, 1, 1, elements, nullptr, 1}, sizeof(T), sizeof(CacheT), p, name, stream);
}

template <bool kWrite>
void move_kv(const KvParams& params, const char* name, Stream stream) {
  // A kernel counts a token's elements in 32 bits, with room for a step past the end.
  if (params.num_kv_heads > 0x40000000 / params.head_dim)
    throw UnsupportedError(std::string("[") + name + "] k: expected at most 2^30 elements per token, got " +
                           std::to_string(params.num_kv_heads) + " x " + std::to_string(params.head_dim));
  const std::int64_t num_slots = params.num_blocks * params.block_size;
  if (num_slots >= kMaxSlots)
    throw UnsupportedError(std::string("[") + name + "] k_cache: expected fewer than 2^32 - 1 slots, got " + std::to_string(num_slots));
  // int32 slots name no more, and a negative one is no large one.
  const std::int64_t num_named = params.slot_dtype == DType::kInt64 ? num_slots : std::min(num_slots, std::int64_t{1} << 31);
  KvKernelParams p{{{params.k, params.k_cache, params.k_scale, params.k_scale_stride, params.k_token_stride, params.k_head_stride,
                     params.k_cache_block_stride, params.k_cache_slot_stride, params.k_cache_head_stride},
                    {params.v, params.v_cache, params.v_scale, params.v_scale_stride, params.v_token_stride, params.v_head_stride,
                     params.v_cache_block_stride, params.v_cache_slot_stride, params.v_cache_head_stride}},
                   params.slot_mapping,
                   params.slot_stride * itemsize(params.slot_dtype),
                   0,
                   params.num_tokens,
                   static_cast<std::uint32_t>(num_named),
                   // An empty cache may have block_size 0, by which nothing can be divided.
                   num_slots == 0 ? 1 : static_cast<std::uint32_t>(params.block_size),
                   static_cast<std::uint32_t>(params.num_kv_heads),
                   static_cast<std::uint32_t>(params.head_dim),
                   params.slot_dtype == DType::kInt64,
                   error_word(),
                   0,
                   0,
                   0,
                   0};
  for (KvSide& side : p.sides) {
    if (side.scale == nullptr || p.num_heads == 1) side.scale_stride = 0;
    side.block_gap = side.cache_block_stride - p.block_size * side.cache_slot_stride;
  }
  // Heads that lie side by side under one scale are one long head.
  const auto heads_are_dense = [&](const KvSide& side) {
    return side.head_stride == p.head_dim && side.cache_head_stride == p.head_dim && side.scale_stride == 0;
  };
  if (heads_are_dense(p.sides[0]) && heads_are_dense(p.sides[1])) {
    p.head_dim *= p.num_heads;
    p.num_heads = 1;
  }
  if (params.dtype == params.cache_dtype) {
    if (params.dtype == DType::kFloat32) return launch_kv<kWrite, true, std::uint32_t, std::uint32_t>(p, name, stream);
    return launch_kv<kWrite, true, std::uint16_t, std::uint16_t>(p, name, stream);
  }
  dispatch_float(params.dtype, name, [&](auto dtype) {
    using T = Element<decltype(dtype)::value>;
    dispatch_kv(params.cache_dtype, name, [&](auto cache_dtype) {
      using CacheT = Element<decltype(cache_dtype)::value>;
      if constexpr (!std::is_same_v<T, CacheT>) launch_kv<kWrite, false, T, CacheT>(p, name, stream);
    });
  });
}

// Grid: a CTA copies one chunk of blockDim.x * kVectorsInFlight vectors of kBytes of the block of one pair.
template <int kBytes, typename Index>
__global__ void __launch_bounds__(kThreads) copy_blocks_kernel(const __grid_constant__ CopyBlocksParams p, const std::int64_t first_pair,
                                                               const std::uint32_t num_chunks, ErrorWord* const error_word) {
  device::wait_for_predecessor();
  const std::uint32_t vectors_per_segment = static_cast<std::uint32_t>(p.segment_bytes / kBytes);
  const std::uint32_t num_vectors = static_cast<std::uint32_t>(p.num_segments) * vectors_per_segment;
  const std::uint32_t pair_of_launch = blockIdx.x / num_chunks, chunk = blockIdx.x - pair_of_launch * num_chunks;
  const std::int64_t pair = first_pair + pair_of_launch;
  const auto* const pairs = static_cast<const Index*>(p.pairs);
  const std::int64_t src = pairs[2 * pair], dst = pairs[2 * pair + 1];
  const bool src_is_valid = src >= 0 && src < p.num_blocks, dst_is_valid = dst >= 0 && dst < p.num_blocks;
  if (!src_is_valid || !dst_is_valid) {
    if (chunk == 0 && threadIdx.x == 0) {
      if (!src_is_valid && src != -1) record_error(error_word, OpId::kCopyBlocks, ArgId::kPairs, 2 * pair, src);
      if (!dst_is_valid && dst != -1) record_error(error_word, OpId::kCopyBlocks, ArgId::kPairs, 2 * pair + 1, dst);
    }
    return;
  }
  const char* const from = static_cast<const char*>(p.cache) + src * p.block_stride_bytes;
  char* const to = static_cast<char*>(p.cache) + dst * p.block_stride_bytes;
  const std::uint32_t first = chunk * kVectorsInFlight * kThreads + threadIdx.x;
  const auto offset_of = [&](std::uint32_t vector) -> std::int64_t {
    if (p.num_segments == 1) return static_cast<std::int64_t>(vector) * kBytes;
    const std::uint32_t segment = vector / vectors_per_segment;
    return segment * p.segment_stride_bytes + static_cast<std::int64_t>(vector - segment * vectors_per_segment) * kBytes;
  };
  RawVector<kBytes> vectors[kVectorsInFlight];
#pragma unroll
  for (int u = 0; u < kVectorsInFlight; ++u)
    if (first + u * kThreads < num_vectors) vectors[u] = load_raw<kBytes>(from + offset_of(first + u * kThreads));
#pragma unroll
  for (int u = 0; u < kVectorsInFlight; ++u)
    if (first + u * kThreads < num_vectors) store_raw(to + offset_of(first + u * kThreads), vectors[u]);
}

template <int kBytes>
void launch_copy_blocks(const CopyBlocksParams& p, Stream stream) {
  const std::int64_t num_vectors = p.num_segments * (p.segment_bytes / kBytes);
  // A kernel counts them in 32 bits, with room for a step past the end.
  if (num_vectors > 0x40000000)
    throw UnsupportedError("[copy_blocks] cache: expected blocks of at most 2^30 aligned pieces, got " + std::to_string(num_vectors) +
                           " of " + std::to_string(kBytes) + " bytes");
  const std::int64_t num_chunks = ceil_div(num_vectors, std::int64_t{kThreads} * kVectorsInFlight);
  const std::int64_t pairs_per_launch = 0x7fffffff / num_chunks;
  dispatch_index(p.pair_dtype, "copy_blocks", [&](auto index) {
    for (std::int64_t first_pair = 0; first_pair < p.num_pairs; first_pair += pairs_per_launch) {
      const auto num_ctas = static_cast<unsigned>(std::min(p.num_pairs - first_pair, pairs_per_launch) * num_chunks);
      launch_waiting("copy_blocks", copy_blocks_kernel<kBytes, decltype(index)>, num_ctas, kThreads, stream, p, first_pair,
                     static_cast<std::uint32_t>(num_chunks), error_word());
    }
  });
}

// Threads of a CTA of swap_blocks, vectors that each has in flight, and CTAs: enough for any link, and few enough to leave the device to others.
constexpr int kSwapThreads = 512, kSwapVectors = 4, kSwapCtas = 16;
// Pairs of one launch: kernel parameters have 4096 bytes.
constexpr int kSwapPairs = 490;

struct SwapKernelParams {
  char* dst;
  const char* src;
  std::int64_t dst_block_stride_bytes, src_block_stride_bytes, dst_row_stride_bytes, src_row_stride_bytes;
  std::uint32_t vectors_per_row, num_vectors;  // of 16 bytes; of a block
  std::uint32_t pieces_per_block, num_pieces;  // of a CTA's vectors in flight; of this launch
  std::uint32_t pairs[kSwapPairs][2];          // source, destination
};
static_assert(sizeof(SwapKernelParams) <= 4096);

// Grid: CTAs walk the pieces of all blocks. One of the two memories may be the host's.
__global__ void __launch_bounds__(kSwapThreads) swap_blocks_kernel(const __grid_constant__ SwapKernelParams p) {
  device::wait_for_predecessor();
  for (std::uint32_t piece = blockIdx.x; piece < p.num_pieces; piece += gridDim.x) {
    const std::uint32_t pair = piece / p.pieces_per_block;
    const std::uint32_t first = (piece - pair * p.pieces_per_block) * (kSwapThreads * kSwapVectors) + threadIdx.x;
    const char* const from = p.src + p.pairs[pair][0] * p.src_block_stride_bytes;
    char* const to = p.dst + p.pairs[pair][1] * p.dst_block_stride_bytes;
    RawVector<16> vectors[kSwapVectors];
    std::int64_t targets[kSwapVectors];
#pragma unroll
    for (int u = 0; u < kSwapVectors; ++u) {
      const std::uint32_t vector = first + u * kSwapThreads, row = vector / p.vectors_per_row;
      const std::int64_t in_row = std::int64_t{vector - row * p.vectors_per_row} * 16;
      targets[u] = row * p.dst_row_stride_bytes + in_row;
      if (vector < p.num_vectors) vectors[u] = load_raw<16>(from + row * p.src_row_stride_bytes + in_row);
    }
#pragma unroll
    for (int u = 0; u < kSwapVectors; ++u)
      if (first + u * kSwapThreads < p.num_vectors) store_raw(to + targets[u], vectors[u]);
  }
}

// Where this device reaches memory of the host that is page-locked, or its own; null: nowhere.
char* reachable(const void* data) {
  cudaPointerAttributes attributes;
  QUIRE_CUDA_CHECK(cudaPointerGetAttributes(&attributes, data));
  int device = -1;
  QUIRE_CUDA_CHECK(cudaGetDevice(&device));
  const bool is_own = attributes.type == cudaMemoryTypeDevice && attributes.device == device;
  return is_own || attributes.type == cudaMemoryTypeHost ? static_cast<char*>(attributes.devicePointer) : nullptr;
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

bool swap_blocks(const SwapBlocksParams& params, Stream stream) {
  const auto is_vectors = [&](const void* data, std::int64_t block_stride_bytes, std::int64_t row_stride_bytes) {
    return is_aligned(data, 16) && block_stride_bytes % 16 == 0 && keeps_alignment(params.num_rows, row_stride_bytes, 1, 16);
  };
  if (params.row_bytes % 16 != 0 || !is_vectors(params.dst, params.dst_block_stride_bytes, params.dst_row_stride_bytes) ||
      !is_vectors(params.src, params.src_block_stride_bytes, params.src_row_stride_bytes))
    return false;
  const std::int64_t vectors_per_row = params.row_bytes / 16;
  const std::int64_t pieces_per_block = ceil_div(params.num_rows * vectors_per_row, kSwapThreads * kSwapVectors);
  // A kernel counts in 32 bits, with room for a step past the end.
  if (pieces_per_block > 0x40000000 / (kSwapThreads * kSwapVectors)) return false;
  SwapKernelParams p{};
  p.dst = reachable(params.dst);
  p.src = reachable(params.src);
  if (p.dst == nullptr || p.src == nullptr) return false;
  for (std::int64_t i = 0; i < 2 * params.num_pairs; ++i)
    if (params.pairs[i] > 0xffffffff) return false;
  p.dst_block_stride_bytes = params.dst_block_stride_bytes;
  p.src_block_stride_bytes = params.src_block_stride_bytes;
  p.dst_row_stride_bytes = params.dst_row_stride_bytes;
  p.src_row_stride_bytes = params.src_row_stride_bytes;
  p.vectors_per_row = static_cast<std::uint32_t>(vectors_per_row);
  p.num_vectors = static_cast<std::uint32_t>(params.num_rows * vectors_per_row);
  p.pieces_per_block = static_cast<std::uint32_t>(pieces_per_block);
  const std::int64_t pairs_per_launch = std::min<std::int64_t>(kSwapPairs, 0x40000000 / pieces_per_block);
  for (std::int64_t first = 0; first < params.num_pairs; first += pairs_per_launch) {
    const std::int64_t count = std::min(pairs_per_launch, params.num_pairs - first);
    for (std::int64_t i = 0; i < 2 * count; ++i) p.pairs[i / 2][i % 2] = static_cast<std::uint32_t>(params.pairs[2 * first + i]);
    p.num_pieces = static_cast<std::uint32_t>(count * pieces_per_block);
    launch_waiting("swap_blocks", swap_blocks_kernel, std::min<unsigned>(p.num_pieces, kSwapCtas), kSwapThreads, stream, p);
  }
  return true;
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
