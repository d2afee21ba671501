// What tensor-core attention kernels share: rows in shared memory, copies of queries and keys, and what is not finite.
// SPDX-License-Identifier: Apache-2.0
//
// 16-bit K and V reach the tensor cores by ldmatrix as they are. 8-bit ones are loaded as if they were 16-bit pairs and widened in
// registers to float16, with no exchange between lanes, because two orders are free to choose:
//   K: a thread gets the four consecutive elements 4 quad .. 4 quad + 3 of its key for one 16-wide step. They serve as the step's
//      positions {2 quad, 2 quad + 1, 2 quad + 8, 2 quad + 9}, and q is stored in that order.
//   V: a thread gets columns 2 group and 2 group + 1 of its keys. Even columns go to one fragment, odd ones to another.
#pragma once

#include "cuda/attention/plan.cuh"
#include "cuda/device/async_copy.cuh"
#include "cuda/device/dequantize.cuh"
#include "cuda/device/mma.cuh"

namespace quire::cuda::attn {

/// Shared memory rows of kRowBytes as 16-byte chunks, exchanged within the row so that 8 consecutive rows at one chunk, what an
/// ldmatrix phase reads, lie in 8 different bank groups. Addresses of chunks whose index differs by a constant, added without a
/// carry, differ by an exclusive or: a thread needs one base for all of its accesses. `base` is a multiple of kRowBytes.
template <int kRowBytes>
struct Rows {
  static constexpr int kChunks = kRowBytes / 16;
  static_assert(kChunks >= 4 && (kChunks & (kChunks - 1)) == 0);

  __host__ __device__ static constexpr int key(int row) { return kChunks >= 8 ? row & 7 : (row >> 1) & 3; }

  __device__ __forceinline__ static std::uint32_t address(std::uint32_t base, int row, int chunk) {
    return base + static_cast<std::uint32_t>(row * kRowBytes + ((chunk ^ key(row)) << 4));
  }
  /// From a thread's address, to `rows` rows (a multiple of 16) and `chunks` chunks further on.
  __device__ __forceinline__ static std::uint32_t advance(std::uint32_t thread_address, int rows, int chunks) {
    return (thread_address ^ static_cast<std::uint32_t>(chunks << 4)) + static_cast<std::uint32_t>(rows * kRowBytes);
  }
};

/// kKvDType is what K and V are stored as; kHeadDim the padded head_dim.
template <DType kKvDType, int kHeadDim>
struct MmaTypes {
  static constexpr bool kBf16 = kKvDType == DType::kBFloat16;  // else the tensor cores compute in float16
  static constexpr bool kQuantized = itemsize(kKvDType) == 1;
  static constexpr device::Byte kByte = kKvDType == DType::kFloat8E4M3FN ? device::Byte::kE4M3
                                        : kKvDType == DType::kFloat8E5M2 ? device::Byte::kE5M2
                                                                         : device::Byte::kInt8;
  static constexpr int kElements = 16 / static_cast<int>(itemsize(kKvDType));  // of a 16-byte chunk
  static constexpr int kElementBytes = static_cast<int>(itemsize(kKvDType));
  static constexpr int kKvRowBytes = kHeadDim * kElementBytes;
  static constexpr int kQRowBytes = kHeadDim * 2;
};

/// What a row's scores need besides q k. Kept in shared memory: few steps look at it.
struct RowParams {
  float scale;     // score = this * (q k)
  float slope;     // alibi, in log2 units
  int position;    // the key index that the row's query stands at
  int begin, end;  // keys seen, before the mask
  int mask_first_key;
  const std::uint8_t* mask;  // the row's
};

/// Which of the keys [first_key, first_key + 32) the mask lets a row see.
__device__ __forceinline__ std::uint32_t mask_bits(const AttentionParams& p, const RowParams& row, int first_key) {
  return mask_bits(row.mask, static_cast<int>(p.mask_bytes), first_key - row.mask_first_key);
}

/// The same for a thread's kCount rows, in registers. Score in log2 units = log2_scale * value, where value is q k, or the score
/// itself if `transform`: with softcap or alibi, or a scale that does not keep the order of q k.
template <int kCount>
struct ScoreScale {
  float log2_scale[kCount];
  bool transform;
};

/// `row(i)` is the thread's row i.
template <int kCount, typename F>
__device__ __forceinline__ ScoreScale<kCount> make_score_scale(const AttentionParams& p, const RowParams* row_params, F&& row) {
  ScoreScale<kCount> score;
  score.transform = p.softcap > 0.0f || p.alibi_slopes != nullptr;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    score.log2_scale[i] = row_params[row(i)].scale * kLog2E;
    score.transform |= !(score.log2_scale[i] > 0.0f);
  }
  // All lanes take one branch.
  score.transform = __any_sync(kAllLanes, score.transform);
#pragma unroll
  for (int i = 0; i < kCount; ++i)
    if (score.transform) score.log2_scale[i] = 1.0f;
  return score;
}

/// A score in log2 units from q k, where more than a factor is asked for.
__device__ __forceinline__ float transformed_score(float product, const RowParams& row, float softcap, int key) {
  float value = product * row.scale;
  if (softcap > 0.0f) {
    // tanh(x) = 1 - 2 / (e^2x + 1), which saturates as it should.
    const float power = device::exp2_approx(value * __fdividef(2.0f * kLog2E, softcap));
    value = softcap - __fdividef(2.0f * softcap, power + 1.0f);
  }
  return value * kLog2E - row.slope * static_cast<float>(row.position - key);
}

/// What copy_q does with float8_e4m3fn queries, at once: float16 in shared memory.
template <typename Types>
__device__ __noinline__ void widen_q(const Plan& plan, const Tile& tile, int kv_head, int first_row, int num_rows, int first_pass,
                                     int pass_step, char* q_shared) {
  using QRows = Rows<Types::kQRowBytes>;
  const AttentionParams& p = plan.params;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  constexpr int kRowsPerPass = 32 / QRows::kChunks;
  const int chunk = lane % QRows::kChunks;
  for (int pass = first_pass; pass < num_rows / kRowsPerPass; pass += pass_step) {
    const int row = first_row + pass * kRowsPerPass + lane / QRows::kChunks;
    std::uint32_t words[4] = {};
    if (row < tile.num_rows && chunk * 8 < p.head_dim) {
      const RowIndex index = row_index(plan, tile, kv_head, row);
      const auto* source =
          static_cast<const std::uint8_t*>(p.q) + index.q_token * p.q_token_stride + index.head * p.q_head_stride + chunk * 8;
      std::uint32_t packed[2] = {};
      for (int i = 0; i < 8; ++i) packed[i / 4] |= static_cast<std::uint32_t>(source[i]) << (8 * (i % 4));
      device::dequantize_4<device::Byte::kE4M3>(packed[0], words[0], words[1]);
      device::dequantize_4<device::Byte::kE4M3>(packed[1], words[2], words[3]);
    }
    *reinterpret_cast<uint4*>(q_shared + row * Types::kQRowBytes + ((chunk ^ QRows::key(row)) << 4)) =
        uint4{words[0], words[1], words[2], words[3]};
  }
}

/// A warp starts the copy of its part of q's rows [first_row, first_row + kRows) of the tile to shared memory, zero where there is no row
/// or column: the passes first_pass, first_pass + pass_step, ... `q_shared_rows` are the whole tile's.
template <typename Types, int kRows>
__device__ __forceinline__ void copy_q(const Plan& plan, const Tile& tile, int kv_head, int first_row, int first_pass, int pass_step,
                                       char* q_shared_rows) {
  if constexpr (Types::kQuantized) {
    if (plan.params.float8_queries) return widen_q<Types>(plan, tile, kv_head, first_row, kRows, first_pass, pass_step, q_shared_rows);
  }
  using QRows = Rows<Types::kQRowBytes>;
  const std::uint32_t q_shared = device::shared_address(q_shared_rows);
  const AttentionParams& p = plan.params;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  constexpr int kRowsPerPass = 32 / QRows::kChunks;
  static_assert(kRows % kRowsPerPass == 0);
  const int chunk = lane % QRows::kChunks;
  const int bytes = chunk * 8 < p.head_dim ? 16 : 0;
#pragma unroll 2
  for (int pass = first_pass; pass < kRows / kRowsPerPass; pass += pass_step) {
    const int row = first_row + pass * kRowsPerPass + lane / QRows::kChunks;
    const RowIndex index = row_index(plan, tile, kv_head, min(row, tile.num_rows - 1));
    const int present = row < tile.num_rows ? bytes : 0;
    const char* source = static_cast<const char*>(p.q) + (index.q_token * p.q_token_stride + index.head * p.q_head_stride) * 2;
    const std::uint32_t target = QRows::address(q_shared, row, chunk);
    if (plan.q_alignment == 16) {
      device::copy_async_16(target, source + (present > 0 ? chunk * 16 : 0), present);
    } else {
      device::copy_narrow_16(target, source + (present > 0 ? chunk * 16 : 0), present, plan.q_alignment);
    }
  }
}

/// The parameters of the tile's row `row`. Rows past the last get the last one's and are never stored.
__device__ __forceinline__ RowParams make_row_params(const Plan& plan, const Tile& tile, int kv_head, int row) {
  const AttentionParams& p = plan.params;
  const RowIndex index = row_index(plan, tile, kv_head, min(row, tile.num_rows - 1));
  const KeyRange range = visible_keys(p, tile, index.token);
  float scale = p.scale * (p.k_scale != nullptr ? p.k_scale[kv_head * p.k_scale_stride] : 1.0f);
  if (p.q_scale != nullptr) scale *= p.q_scale[kv_head * p.q_scale_stride];
  return RowParams{scale,
                   p.alibi_slopes != nullptr ? p.alibi_slopes[index.head] * kLog2E : 0.0f,
                   tile.kv_len - tile.query_len + index.token,
                   range.begin,
                   range.end,
                   p.mask != nullptr ? mask_first_key(p, tile) : 0,
                   p.mask + index.q_token * p.mask_stride};
}

/// For 8-bit K: turns kRows rows of q, which copy_q has brought, into float16 in the order that 8-bit K is read in. A warp's work. Each row is
/// divided by a power of two near its largest element, so that bfloat16 values fit float16; that goes into the row's scale.
template <typename Types, int kHeadDim, int kRows>
__device__ __forceinline__ void convert_q(const Plan& plan, int first_row, char* q_shared, RowParams* row_params) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  constexpr int kPerLane = kHeadDim / 32;
#pragma unroll 1
  for (int row = first_row; row < first_row + kRows; ++row) {
    const auto at = [&](int column) -> std::uint16_t& {
      const int chunk = column / 8 ^ Rows<Types::kQRowBytes>::key(row);
      return *reinterpret_cast<std::uint16_t*>(q_shared + row * Types::kQRowBytes + (chunk << 4) + column % 8 * 2);
    };
    float values[kPerLane];
    float largest = 0.0f;
#pragma unroll
    for (int e = 0; e < kPerLane; ++e) {
      const std::uint16_t bits = at(lane + 32 * e);
      values[e] = plan.params.dtype == DType::kBFloat16 && !plan.params.float8_queries ? __bfloat162float(__ushort_as_bfloat16(bits))
                                                                                       : __half2float(__ushort_as_half(bits));
      largest = fmaxf(largest, fabsf(values[e]));
    }
    // Positive floats compare like their bits. 2^-e and 2^e, both normal; 1 for zero, subnormal and infinite rows.
    const unsigned exponent = __reduce_max_sync(kAllLanes, __float_as_uint(largest)) >> 23;
    const bool scaled = exponent >= 1 && exponent <= 254;
    const unsigned biased = min(exponent, 253u);
    const float down = scaled ? __uint_as_float((254u - biased) << 23) : 1.0f;
    if (scaled && lane == 0) row_params[row].scale *= __uint_as_float(biased << 23);
    __syncwarp();  // all have read the row before it is overwritten in another order
#pragma unroll
    for (int e = 0; e < kPerLane; ++e) {
      const int within = lane % 16;
      const int position = 2 * (within / 4) + within % 2 + (within % 4 >= 2 ? 8 : 0);
      at(lane - within + position + 32 * e) = __half_as_ushort(__float2half_rn(values[e] * down));
    }
  }
}

/// K or V of one kv head, and how to get at a key's row.
struct KvView {
  const char* base;
  int row_bytes;
  std::int64_t block_stride, token_stride;  // in bytes
  uint2 chunk_strides;
};

template <typename Types>
__device__ __forceinline__ KvView k_view(const AttentionParams& p, const Plan& plan, int kv_head) {
  return KvView{static_cast<const char*>(p.k) + kv_head * p.k_head_stride * Types::kElementBytes,
                static_cast<int>(p.head_dim) * Types::kElementBytes, p.k_block_stride * Types::kElementBytes,
                p.k_token_stride * Types::kElementBytes, plan.k_chunk_strides};
}

template <typename Types>
__device__ __forceinline__ KvView v_view(const AttentionParams& p, const Plan& plan, int kv_head) {
  return KvView{static_cast<const char*>(p.v) + kv_head * p.v_head_stride * Types::kElementBytes,
                static_cast<int>(p.head_dim) * Types::kElementBytes, p.v_block_stride * Types::kElementBytes,
                p.v_token_stride * Types::kElementBytes, plan.v_chunk_strides};
}

/// A warp starts the copy of kKeys rows to `slot` from its row `first_row` on. Lane first_lane + i knows key i's location, and bit
/// first_lane + i of `valid` says whether there is one. Keys that do not exist become zero: their weights are zero, and zero times what
/// was there could be NaN.
template <typename Types, int kKeys>
__device__ __forceinline__ void copy_rows(const Plan& plan, const KvView& view, const KeyLocation& location, std::uint32_t valid,
                                          int first_lane, std::uint32_t slot, int first_row,
                                          int lane = static_cast<int>(threadIdx.x) % 32) {
  using KvRows = Rows<Types::kKvRowBytes>;
  constexpr int kRowsPerPass = 32 / KvRows::kChunks;
  constexpr int kPasses = kKeys / kRowsPerPass;
  constexpr std::uint32_t kAll = kKeys == 32 ? 0xffffffffu : (1u << (kKeys % 32)) - 1;
  static_assert(kPasses * kRowsPerPass == kKeys && kKeys % 8 == 0);
  const int chunk = lane % KvRows::kChunks;
  const int pass_lane = first_lane + lane / KvRows::kChunks;
  const int bytes = min(max(view.row_bytes - chunk * 16, 0), 16);
  const std::uint32_t target = KvRows::address(slot, first_row + lane / KvRows::kChunks, chunk);
  if (plan.chunk_strides_exist && (valid >> first_lane & kAll) == kAll) {
    const std::uint32_t offset = static_cast<std::uint32_t>(location.entry) * view.chunk_strides.x +
                                 static_cast<std::uint32_t>(location.slot) * view.chunk_strides.y;
    const char* source = view.base + (bytes > 0 ? chunk * 16 : 0);
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const std::uint32_t row_offset = __shfl_sync(kAllLanes, offset, pass_lane + pass * kRowsPerPass);
      device::copy_async_16_if(KvRows::advance(target, pass * kRowsPerPass, KvRows::key(pass * kRowsPerPass)),
                               source + static_cast<std::uint64_t>(row_offset) * 16, bytes > 0);
    }
  } else {
#pragma unroll 1
    for (int pass = 0; pass < kPasses; ++pass) {
      const int row_lane = pass_lane + pass * kRowsPerPass;
      const int entry = __shfl_sync(kAllLanes, location.entry, row_lane);
      const int token = __shfl_sync(kAllLanes, location.slot, row_lane);
      const int present = (valid >> row_lane) & 1u ? bytes : 0;
      const char* source = present > 0 ? view.base + entry * view.block_stride + token * view.token_stride + chunk * 16 : view.base;
      const std::uint32_t row_target = KvRows::advance(target, pass * kRowsPerPass, KvRows::key(pass * kRowsPerPass));
      if (plan.kv_alignment == 16) {
        device::copy_async_16(row_target, source, present);
      } else {
        device::copy_narrow_16(row_target, source, present, plan.kv_alignment);
      }
    }
  }
}

// Zero times NaN is NaN, so that a V row which some of a tile's rows see and others do not spoils the others where it is not
// finite. Kernels notice that in their sums and then run a second time, with V's elements that are not finite taken out and noted
// for the rows that see them.

/// One row's notes: two bits for each column, +inf and -inf, both for NaN.
template <int kHeadDim>
constexpr int kNoteWords = kHeadDim / 16;

/// Whether V of this type can hold what is not finite.
template <DType kKvDType>
constexpr bool kMayBeNotFinite = kKvDType != DType::kInt8;

/// Takes elements that are not finite out of rows [first_row, end_row) of a V slot, of which row 0 is key `first_key`, and notes
/// them for the tile's rows. A warp's work.
template <DType kKvDType, int kHeadDim>
__device__ __forceinline__ void take_out_not_finite(const AttentionParams& p, char* slot, int first_row, int end_row, int first_key,
                                                    const RowParams* row_params, std::uint32_t* notes, int num_tile_rows) {
  using Types = MmaTypes<kKvDType, kHeadDim>;
  constexpr int kRowBytes = Types::kKvRowBytes;
  constexpr int kElements = Types::kQuantized ? 4 : 2;  // of a word
  constexpr int kBits = 32 / kElements;
  constexpr std::uint32_t kSign = 1u << (kBits - 1);
  constexpr std::uint32_t kInfinity = kKvDType == DType::kFloat16        ? 0x7c00u
                                      : kKvDType == DType::kBFloat16     ? 0x7f80u
                                      : kKvDType == DType::kFloat8E4M3FN ? 0x7eu  // no infinity: NaN is what lies above
                                                                         : 0x7cu;
  constexpr bool kHasInfinity = kKvDType != DType::kFloat8E4M3FN;
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll 1
  for (int i = first_row * (kRowBytes / 4) + lane; i < end_row * (kRowBytes / 4); i += 32) {
    auto* word = reinterpret_cast<std::uint32_t*>(slot) + i;
    const int key = i / (kRowBytes / 4);
    const int chunk = i % (kRowBytes / 4) / 4 ^ Rows<kRowBytes>::key(key);
#pragma unroll 1
    for (int e = 0; e < kElements; ++e) {
      const std::uint32_t value = *word >> (kBits * e) & (2 * kSign - 1);
      const std::uint32_t magnitude = value & (kSign - 1);
      const bool nan = magnitude > kInfinity;
      if (!nan && !(kHasInfinity && magnitude == kInfinity)) continue;
      *word &= ~((2 * kSign - 1) << (kBits * e));
      const int column = (chunk * 4 + i % 4) * kElements + e;
      const std::uint32_t note = (nan ? 3u : (value & kSign) == 0 ? 1u : 2u) << (column % 16 * 2);
#pragma unroll 1
      for (int row = 0; row < num_tile_rows; ++row) {
        const bool seen = first_key + key >= row_params[row].begin && first_key + key < row_params[row].end &&
                          (p.mask == nullptr || (mask_bits(p, row_params[row], first_key + key) & 1u) != 0);
        if (seen) atomicOr(&notes[row * kNoteWords<kHeadDim> + column / 16], note);
      }
    }
  }
}

/// A value with what two bits of a note say.
__device__ __forceinline__ float noted(float value, std::uint32_t note) {
  return value + (note & 1u ? INFINITY : 0.0f) - (note & 2u ? INFINITY : 0.0f);
}

/// The four columns of a row from `column`, with what was noted for them.
template <int kHeadDim>
__device__ __forceinline__ float4 with_notes(float4 value, const std::uint32_t* notes, int row, int column) {
  const std::uint32_t bits = notes[row * kNoteWords<kHeadDim> + column / 16] >> (column % 16 * 2);
  return float4{noted(value.x, bits), noted(value.y, bits >> 2), noted(value.z, bits >> 4), noted(value.w, bits >> 6)};
}

}  // namespace quire::cuda::attn
