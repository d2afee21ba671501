// Attention for many query rows per kv head (prefill): each warp of a CTA has 16 or 32 rows, and they share the keys.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cuda/attention/mma_rows.cuh"
#include "cuda/device/dependent_launch.cuh"

namespace quire::cuda::attn {

/// What a call asks for, of what kernels are compiled for.
enum class Asks {
  kAll,         // any option
  kPagedPlain,  // a block table, lengths and a causal mask, of the kernel's head_dim, all of 16-bit and aligned
  kPlain        // the same without a block table
};

template <DType kKvDType, int kHeadDim, Variant kVariant>
struct SplitRowsShape {
  static constexpr int kTileRows = tile_rows(kVariant);
  static constexpr int kWarpRows = kTileRows / kWarps;
  using Types = MmaTypes<kKvDType, kHeadDim>;
  static constexpr int kKeys =
      (kHeadDim == 128 && kWarpRows == 16) || kVariant == Variant::kMmaSplitRowsSmall ? 32 : 64;  // per step of the CTA
  /// 2: a step's K and V are copied during the step before. 1: V is copied while scores are made, K during the product with V.
  static constexpr int kStages = kHeadDim == 256 || (kHeadDim == 128 && kWarpRows == 32) ? 1 : 2;
  /// Steps of the product with K whose q stays in registers: as many as there is room for.
  static constexpr int kQSteps = kHeadDim == 256 || (kHeadDim == 128 && kWarpRows == 32) ? 0 : kHeadDim / 16;
  static constexpr int kSlotBytes = kKeys * Types::kKvRowBytes;  // one step's K or V
  static constexpr int kQBytes = kTileRows * Types::kQRowBytes;
  static constexpr int kQOffset = 2 * kStages * kSlotBytes;
  static constexpr int kRowParamsOffset = kQOffset + kQBytes;
  static constexpr int kNotesOffset = kRowParamsOffset + kTileRows * static_cast<int>(sizeof(RowParams));
  static constexpr int kSharedBytes = kNotesOffset + kTileRows * kNoteWords<kHeadDim> * 4;
  static constexpr int kCtasPerSm = ctas_per_sm(kVariant, kHeadDim);
  static_assert(kSharedBytes <= (needs_large_shared(kVariant, kHeadDim, Types::kElementBytes) ? kLargeSharedBytes : 99 * 1024));
};

/// A warp's share of the copies of a CTA's steps of kKeys keys: kKeys / kWarps rows of each, zero for keys that do not exist: their weights
/// are zero, and zero times what was there could be NaN.
///
/// Usually (Plan::groups_exist, and the block table has no holes) 8 keys from a multiple of 8 on lie in one block, so that a warp needs one
/// location for each 8 rows. Else every warp looks up each key of the step, and knows afterwards which of them exist.
template <typename Types, int kKeys, Asks kAsks>
struct StepCopy {
  using KvRows = Rows<Types::kKvRowBytes>;
  static constexpr int kMasks = kKeys / 32;
  static constexpr int kWarpRows = kKeys / kWarps;
  static constexpr int kWarpGroups = kWarpRows / 8;
  static constexpr int kRowsPerPass = 32 / KvRows::kChunks;
  static_assert(kWarpRows % 8 == 0 && kRowsPerPass <= 8);

  const Plan& plan;
  const Tile& tile;
  int kv_head, key_end;
  bool by_groups;
  // By groups:
  int entry[kWarpGroups];       // of the warp's groups in the step whose K comes next
  int v_entry[kWarpGroups];     // in the step whose K came last
  const std::int32_t* table;    // the sequence's
  const char *k_base, *v_base;  // the thread's row and chunk of a group at the first key
  std::uint32_t target;         // the same in a slot at address 0
  int warp_key;                 // the warp's first in a step
  int first_row;                // the thread's; past all keys for chunks beyond head_dim

  __device__ __forceinline__ StepCopy(const Plan& of_plan, const Tile& of_tile, int of_kv_head, int end)
      : plan(of_plan),
        tile(of_tile),
        kv_head(of_kv_head),
        key_end(end),
        by_groups(kAsks != Asks::kAll || of_plan.groups_exist),
        entry{},
        v_entry{} {
    const AttentionParams& p = plan.params;
    const int row = lane() / KvRows::kChunks, chunk = lane() % KvRows::kChunks;
    const auto base = [&](const KvView& view) {
      return view.base + chunk * 16 +
             static_cast<std::uint64_t>(static_cast<std::uint32_t>(tile.kv_first_token + row) * view.chunk_strides.y) * 16;
    };
    k_base = base(k_view<Types>(p, plan, kv_head));
    v_base = base(v_view<Types>(p, plan, kv_head));
    if (is_paged()) table = p.block_tables + tile.seq * p.block_tables_stride;
    target = KvRows::address(0, warp() * kWarpRows + row, chunk);
    warp_key = warp() * kWarpRows;
    first_row = kAsks != Asks::kAll || chunk * Types::kElements < p.head_dim ? warp() * kWarpRows + row : INT_MAX / 2;
    // Kept in registers where there are some; else computed again in each step.
    if constexpr (Types::kElementBytes == 2 && (KvRows::kChunks <= 8 || (kAsks == Asks::kPlain && KvRows::kChunks > 16))) {
      asm volatile("" : "+l"(k_base), "+l"(v_base), "+r"(target), "+r"(warp_key), "+r"(first_row));
    }
  }

  __device__ __forceinline__ bool is_paged() const {
    return kAsks == Asks::kAll ? plan.params.block_tables != nullptr : kAsks == Asks::kPagedPlain;
  }
  __device__ __forceinline__ static int lane() { return static_cast<int>(threadIdx.x % 32); }
  __device__ __forceinline__ static int warp() { return static_cast<int>(threadIdx.x / 32); }
  __device__ __forceinline__ int group_key(int g) const { return warp_key + 8 * g; }

  /// Whether the thread found a key in [first_key, key_end) whose block the table does not name.
  __device__ __forceinline__ bool finds_holes(int first_key) const {
    if (!is_paged() || first_key >= key_end) return false;
    bool found = false;
    const int block_size = static_cast<int>(plan.block_size.divisor);
    const int first_block = plan.block_size.quotient(first_key);
#pragma unroll 1
    for (int block = first_block + static_cast<int>(threadIdx.x); block <= plan.block_size.quotient(key_end - 1); block += kThreads) {
      const int key = max(first_key, block * block_size);
      found |= !locate_key(plan, tile, key, key_end, load_entry(plan, tile, key, key_end)).valid;
    }
    return found;
  }

  /// Before copy(key, ...).
  __device__ __forceinline__ void look_up(int key) {
    if (!is_paged()) return;
#pragma unroll
    for (int g = 0; g < kWarpGroups; ++g)
      if (key + group_key(g) < key_end) entry[g] = table[plan.block_size.quotient(key + group_key(g))];
  }

  /// Starts the copies of K, V or both, for the step at `key`, to slots at these addresses; V alone: of the step whose K came last.
  template <bool kK, bool kV>
  __device__ __forceinline__ void copy(int key, std::uint32_t k_slot, std::uint32_t v_slot) {
    if (kAsks == Asks::kPlain || by_groups) {
#pragma unroll
      for (int g = 0; g < kWarpGroups; ++g) {
        int block = 0, token = key + group_key(g);
        if (is_paged()) {
          token = plan.block_size.remainder(token, plan.block_size.quotient(token));
          block = kK ? entry[g] : v_entry[g];
          if constexpr (kK && !kV) v_entry[g] = entry[g];
        }
        const int end = key_end - key - 8 * g - first_row;
        const auto copy_group = [&](const char* base, uint2 strides, std::uint32_t slot) {
          base +=
              static_cast<std::uint64_t>(static_cast<std::uint32_t>(block) * strides.x + static_cast<std::uint32_t>(token) * strides.y) *
              16;
          asm volatile("" : "+l"(base));  // one sum, not one for each pass
#pragma unroll
          for (int r = 0; r < 8; r += kRowsPerPass) {
            const int bytes = Types::kQuantized ? min(static_cast<int>(plan.params.head_dim) - lane() % KvRows::kChunks * 16, 16) : 16;
            device::copy_async_16(slot + KvRows::advance(target, 8 * g + r, KvRows::key(r)),
                                  base + static_cast<std::uint64_t>(static_cast<std::uint32_t>(r) * strides.y) * 16, r < end ? bytes : 0);
          }
        };
        if constexpr (kK) copy_group(k_base, plan.k_chunk_strides, k_slot);
        if constexpr (kV) copy_group(v_base, plan.v_chunk_strides, v_slot);
      }
      if constexpr (kK) look_up(key + kKeys);
    } else {
      if constexpr (kK) copy_keys(k_view<Types>(plan.params, plan, kv_head), key, k_slot);
      if constexpr (kV) copy_keys(v_view<Types>(plan.params, plan, kv_head), key, v_slot);
    }
  }

  /// Bit i of valid: the table names key i's block. Only where it has holes.
  __device__ __forceinline__ void find_valid(int key, std::uint32_t (&valid)[kMasks]) const {
#pragma unroll
    for (int m = 0; m < kMasks; ++m) {
      const int lane_key = key + 32 * m + lane();
      valid[m] = __ballot_sync(kAllLanes, locate_key(plan, tile, lane_key, key_end, load_entry(plan, tile, lane_key, key_end)).valid);
    }
  }

  __device__ __forceinline__ void copy_keys(const KvView& view, int key, std::uint32_t slot) {
    const int first_row = warp() * kWarpRows;
    const int lane_key = key + first_row + lane() % kWarpRows;
    const KeyLocation location = locate_key(plan, tile, lane_key, key_end, load_entry(plan, tile, lane_key, key_end));
    const int chunk = lane() % KvRows::kChunks;
#pragma unroll 1
    for (int r = 0; r < kWarpRows; r += kRowsPerPass) {
      const int row = first_row + r + lane() / KvRows::kChunks;
      const int of_lane = row - first_row;
      const int block = __shfl_sync(kAllLanes, location.entry, of_lane);
      const int token = __shfl_sync(kAllLanes, location.slot, of_lane);
      const bool exists = __shfl_sync(kAllLanes, static_cast<int>(location.valid), of_lane) != 0 && chunk * 16 < view.row_bytes;
      const char* const source = exists ? view.base + block * view.block_stride + token * view.token_stride + chunk * 16 : view.base;
      const int bytes = exists ? min(view.row_bytes - chunk * 16, 16) : 0;
      if (plan.kv_alignment == 16) {
        device::copy_async_16(KvRows::address(slot, row, chunk), source, bytes);
      } else {
        device::copy_narrow_16(KvRows::address(slot, row, chunk), source, bytes, plan.kv_alignment);
      }
    }
  }
};

/// A warp starts the copy of its kRows rows of q, the tile's from first_row on, to the tile's `q_shared`: zero where there is no row or
/// column. Lane i knows where row i begins.
template <typename Types, int kRows, bool kPlain>
__device__ __forceinline__ void copy_warp_q(const Plan& plan, const Tile& tile, int first_row, std::int64_t row_offset,
                                            std::uint32_t q_shared) {
  using QRows = Rows<Types::kQRowBytes>;
  const AttentionParams& p = plan.params;
  const int lane = static_cast<int>(threadIdx.x % 32);
  constexpr int kRowsPerPass = 32 / QRows::kChunks;
  const int row = lane / QRows::kChunks, chunk = lane % QRows::kChunks;
  const bool column_exists = kPlain || chunk * 8 < p.head_dim;
  const std::uint32_t target = QRows::address(q_shared, first_row + row, chunk);
  const char* const base = static_cast<const char*>(p.q) + chunk * 16;
  if (kPlain || plan.q_alignment == 16) {
#pragma unroll
    for (int r = 0; r < kRows; r += kRowsPerPass) {
      const char* const source = base + __shfl_sync(kAllLanes, row_offset, r + row);
      device::copy_async_16(QRows::advance(target, r, QRows::key(r % 8)), source,
                            column_exists && first_row + r + row < tile.num_rows ? 16 : 0);
    }
  } else {
#pragma unroll 1
    for (int r = 0; r < kRows; r += kRowsPerPass) {
      const char* const source = base + __shfl_sync(kAllLanes, row_offset, r + row);
      const bool exists = column_exists && first_row + r + row < tile.num_rows;
      device::copy_narrow_16(QRows::address(q_shared, first_row + r + row, chunk), exists ? source : static_cast<const char*>(p.q),
                             exists ? 16 : 0, plan.q_alignment);
    }
  }
}

/// Where the keys end that a tile's row sees, without windows.
__device__ __forceinline__ int visible_end(const Plan& plan, const Tile& tile, int row) {
  return plan.params.causal ? tile.kv_len - tile.query_len + plan.group.quotient(tile.row_begin + row) + 1 : tile.kv_len;
}

/// As finish_tile, for plain calls.
__device__ __forceinline__ FullRange finish_plain_tile(const Plan& plan, Tile& tile, int tile_rows) {
  tile.num_rows = min(tile_rows, tile.query_len * static_cast<int>(plan.group.divisor) - tile.row_begin);
  tile.key_begin = 0;
  tile.key_end = max(visible_end(plan, tile, tile.num_rows - 1), 0);
  return FullRange{0, visible_end(plan, tile, 0)};
}

/// Grid: x = (num_tiles - 1 - tile) * num_kv_heads + kv_head, so that under a causal mask long tiles come first; y = split. A CTA
/// computes its packed rows against its split's keys and writes them to out and lse, or to the workspace if other splits have keys.
template <DType kKvDType, int kHeadDim, Variant kVariant, Asks kAsks>
__global__ void __launch_bounds__(kThreads, SplitRowsShape<kKvDType, kHeadDim, kVariant>::kCtasPerSm)
    attention_mma_split_rows_kernel(const __grid_constant__ Plan plan) {
  using Types = MmaTypes<kKvDType, kHeadDim>;
  using Shape = SplitRowsShape<kKvDType, kHeadDim, kVariant>;
  constexpr int kKeys = Shape::kKeys, kWarpRows = Shape::kWarpRows, kTileRows = Shape::kTileRows;
  using MmaState = MmaRows<kKvDType, kHeadDim, kWarpRows / 16, Shape::kQSteps>;
  constexpr int kRows = MmaState::kRows;
  constexpr bool kPlain = kAsks != Asks::kAll, kMayBePaged = kAsks != Asks::kPlain;
  extern __shared__ __align__(1024) char shared[];
  const AttentionParams& p = plan.params;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int warp = static_cast<int>(threadIdx.x / 32);
  const int reversed_idx = plan.kv_heads.quotient(static_cast<int>(blockIdx.x));
  const int kv_head = plan.kv_heads.remainder(static_cast<int>(blockIdx.x), reversed_idx);

  device::wait_for_predecessor();
  device::launch_dependents();
  Tile tile;
  const int tile_idx = plan.num_tiles - 1 - reversed_idx;
  FullRange full;
  SplitRange splits{1, 0};
  int key_begin = 0, key_end;
  if constexpr (kPlain) {
    if (!locate_rows(plan, tile_idx, tile)) return;
    full = finish_plain_tile(plan, tile, kTileRows);
    key_end = tile.key_end;
  } else {
    if (!locate_tile(plan, tile_idx, tile)) return;
    splits = active_splits(plan, tile);
    if (static_cast<int>(blockIdx.y) >= splits.num_active) return;
    key_begin = tile.key_begin + static_cast<int>(blockIdx.y) * splits.keys_per_split;
    key_end = min(static_cast<std::int64_t>(key_begin) + splits.keys_per_split, std::int64_t{tile.key_end});
  }
  const int first_key = key_begin & ~7;  // steps are made of whole groups

  char* const q_shared = shared + Shape::kQOffset;
  auto* const row_params = reinterpret_cast<RowParams*>(shared + Shape::kRowParamsOffset);
  auto* const notes = reinterpret_cast<std::uint32_t*>(shared + Shape::kNotesOffset);
  const std::uint32_t k_slot = device::shared_address(shared);
  const std::uint32_t v_slot = k_slot + Shape::kSlotBytes;
  const int warp_row = warp * kWarpRows;

  StepCopy<Types, kKeys, kAsks> steps(plan, tile, kv_head, key_end);
  const auto start_first = [&] {
    if (first_key < key_end) {
      if constexpr (Shape::kStages == 2) {
        steps.template copy<true, true>(first_key, k_slot, v_slot);
      } else {
        steps.template copy<true, false>(first_key, k_slot, v_slot);
      }
    }
    device::copy_async_commit();
  };
  // A row of the warp's, as lanes know it.
  const RowIndex lane_index = row_index(plan, tile, kv_head, min(warp_row + lane % kWarpRows, tile.num_rows - 1));
  bool holes = false;
  if constexpr (Types::kQuantized) {
    steps.look_up(first_key);
    holes = steps.finds_holes(first_key);
    copy_q<Types, kWarpRows>(plan, tile, kv_head, warp_row, 0, 1, q_shared);
  } else {
    steps.look_up(first_key);
    holes = steps.finds_holes(first_key);
    const std::int64_t row_offset = (lane_index.q_token * p.q_token_stride + lane_index.head * p.q_head_stride) * 2;
    copy_warp_q<Types, kWarpRows, kPlain>(plan, tile, warp_row, row_offset, device::shared_address(q_shared));
  }
  if (steps.is_paged()) holes = __syncthreads_or(holes);
  steps.by_groups &= !holes;
  start_first();

  MmaState rows;
  ScoreScale<MmaState::kScales> score;
  // Where the keys end that the thread's row i of the warp's rows from first_row on sees.
  const auto row_end = [&](int first_row, int i) { return visible_end(plan, tile, min(first_row + MmaState::row(i), tile.num_rows - 1)); };
  if constexpr (kPlain) {
    score.log2_scale[0] = p.scale * kLog2E;
    score.transform = false;
  } else {
    // What a row sees of this split's keys.
    if (lane < kWarpRows) {
      RowParams params = make_row_params(plan, tile, kv_head, warp_row + lane);
      params.begin = max(params.begin, key_begin);
      params.end = min(params.end, key_end);
      row_params[warp_row + lane] = params;
    }
    full = full_range(plan, tile);
    full.begin = max(full.begin, key_begin);
    full.end = min(full.end, key_end);
    if constexpr (Types::kQuantized) {
      device::copy_async_wait<0>();
      __syncwarp();
      convert_q<Types, kHeadDim, kWarpRows>(plan, warp_row, q_shared, row_params);
    }
    __syncwarp();
    score = make_score_scale<MmaState::kScales>(p, row_params, [&](int i) { return warp_row + MmaState::row(i); });
  }
  if constexpr (Shape::kQSteps > 0) {
    device::copy_async_wait<0>();
    __syncwarp();
  }
  rows.attach_q(device::shared_address(q_shared), warp_row);

  // A second pass only where NaN or infinity in V reached rows that do not see it.
  bool selecting = false;
  for (;;) {
    rows.reset([&](int i) {
      if constexpr (kPlain) return row_end(warp_row, i) > 0;
      const RowParams& row = row_params[warp_row + MmaState::row(i)];
      return row.begin < row.end;
    });

    // Steps. K comes while the product with V runs, V while scores are made.
    std::uint32_t stage = 0;
    std::uint32_t k_first = k_slot + MmaState::k_thread_offset(), v_first = v_slot + MmaState::v_thread_offset();
    asm volatile("" : "+r"(k_first), "+r"(v_first));
#pragma unroll 1
    for (int key = first_key; key < key_end; key += kKeys) {
      typename MmaState::template Weights<kKeys> weights;
      device::copy_async_wait<0>();
      __syncthreads();
      if constexpr (Shape::kStages == 2) {
        const std::uint32_t next = 2 * Shape::kSlotBytes - stage;
        steps.template copy<true, true>(key + kKeys, k_slot + next, v_slot + next);
      } else {
        steps.template copy<false, true>(key, k_slot, v_slot);
      }
      device::copy_async_commit();
      float added[kRows];
      // The first step takes the maximum as the base. Later ones compute scores a second time if weights were large, which is rare.
      unsigned large = (1u << kRows) - 1;
#pragma unroll 1
      for (bool raise = key == first_key;; raise = true) {
        // Addresses of fragments are one operation each: too cheap to keep in registers.
        std::uint32_t k_address = k_first + stage;
        asm volatile("" : "+r"(k_address), "+r"(rows.q_address));
        typename MmaState::template Scores<kKeys> scores;
        rows.template multiply_qk<kKeys>(scores, k_address);
        if (!kPlain && score.transform) {
          int at = key;
          float softcap = p.softcap;
          asm volatile("" : "+r"(at), "+f"(softcap));
          rows.template transform_scores<kKeys>(scores, row_params + warp_row, softcap, at);
        }
        if (kPlain && ((kMayBePaged && holes) || key > full.end - kKeys)) {
          __syncwarp();  // keeps this out of steps that do not need it
          int ends[kRows], at = key, first_row = warp_row;
          asm volatile("" : "+r"(at), "+r"(first_row));  // nothing of it is done in advance
#pragma unroll
          for (int i = 0; i < kRows; ++i) ends[i] = min(row_end(first_row, i), key_end);
          rows.template hide_keys<kKeys>(scores, ends, at);
          if (kMayBePaged && holes) {
            std::uint32_t valid[kKeys / 32];
            steps.find_valid(at, valid);
            rows.template hide_missing<kKeys>(scores, valid);
          }
        } else if (!kPlain && (holes || key < full.begin || key > full.end - kKeys)) {
          std::uint32_t valid[kKeys / 32];
#pragma unroll
          for (int m = 0; m < kKeys / 32; ++m) valid[m] = kAllLanes;
          int at = key;
          asm volatile("" : "+r"(at));  // nothing of this is done in advance
          if (holes) steps.find_valid(at, valid);
          rows.template mask_scores<kKeys>(scores, row_params + warp_row, at, valid);
          if (p.mask != nullptr) rows.template apply_mask<kKeys>(scores, p, row_params + warp_row, at);
        }
        if (raise) rows.template raise_base<kKeys>(scores, score, large);
        large = rows.template weigh<kKeys>(weights, scores, score, raise, added);
        if (!__any_sync(kAllLanes, large != 0) || raise) break;
      }
#pragma unroll
      for (int i = 0; i < kRows; ++i) rows.sum[i] += added[i];

      if constexpr (Shape::kStages == 1) {
        device::copy_async_wait<0>();
        __syncthreads();
        steps.template copy<true, false>(key + kKeys, k_slot, v_slot);
        device::copy_async_commit();
      }
      if (selecting) {
        if constexpr (kPlain) {
          // Notes are for what rows see; nothing else here needs to know.
          if (lane < kWarpRows) {
            RowParams& params = row_params[warp_row + lane];
            params.begin = 0;
            params.end = visible_end(plan, tile, min(warp_row + lane, tile.num_rows - 1));
          }
          __syncthreads();
        }
        take_out_not_finite<kKvDType, kHeadDim>(p, shared + stage + Shape::kSlotBytes, warp * (kKeys / kWarps),
                                                (warp + 1) * (kKeys / kWarps), key, row_params, notes, tile.num_rows);
        __syncthreads();
      }
      std::uint32_t v_address = v_first + stage;
      asm volatile("" : "+r"(v_address));
      rows.template multiply_pv<kKeys>(weights, v_address);
      if constexpr (Shape::kStages == 2) stage = 2 * Shape::kSlotBytes - stage;
    }
    if (!kMayBeNotFinite<kKvDType> || selecting || !__syncthreads_or(warp_row < tile.num_rows && rows.not_finite())) break;
    selecting = true;
    for (int i = static_cast<int>(threadIdx.x); i < kTileRows * kNoteWords<kHeadDim>; i += kThreads) notes[i] = 0;
    steps.look_up(first_key);
    device::copy_async_wait<0>();  // for the zeros of steps beyond the last, which go to the same slots
    start_first();
  }

  // Write rows.
  device::copy_async_wait<0>();
  __syncwarp();
  rows.reduce_sum();
  if (selecting) rows.add_notes(notes, warp_row);
  const int head_dim = kPlain ? kHeadDim : static_cast<int>(p.head_dim);
  const int lane_row = warp_row + lane % kWarpRows;
  float factors[kRows];
  if constexpr (kPlain) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float base = rows.final_base(r), sum = rows.sum[r];
      const bool empty = base == -INFINITY && sum == 0.0f;
      factors[r] = empty ? 0.0f : __fdividef(1.0f, sum);
    }
    if (p.lse != nullptr) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int row = warp_row + MmaState::row(r);
        if (lane % 4 != 0 || row >= tile.num_rows) continue;
        const float base = rows.final_base(r), sum = rows.sum[r];
        const bool empty = base == -INFINITY && sum == 0.0f;
        p.lse[stats_index(plan, row_index(plan, tile, kv_head, row))] = empty ? -INFINITY : base * kLn2 + logf(sum);
      }
    }
  } else {
    // A lane finishes a row. The thread's rows get there, and their factors back, through row_params.
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      RowParams& of_row = row_params[warp_row + MmaState::row(r)];
      if (lane % 4 == 0) of_row.scale = rows.final_base(r), of_row.slope = rows.sum[r];
    }
    __syncwarp();
    const bool lane_row_exists = lane < kWarpRows && lane_row < tile.num_rows;
    const float top = row_params[lane_row].scale, sum = row_params[lane_row].slope;
    if (splits.num_active > 1) {
      const std::int64_t target = static_cast<int>(blockIdx.y) * plan.num_rows + stats_index(plan, lane_index);
      if (lane_row_exists) plan.partial_stats[target] = float2{top, sum};
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        float* const out = plan.partial_out + __shfl_sync(kAllLanes, target, MmaState::row(r)) * head_dim;
        if (warp_row + MmaState::row(r) >= tile.num_rows) continue;
#pragma unroll
        for (int j = 0; j < kHeadDim / 8; ++j) {
          int column;
          const float2 value = rows.columns(j, r, column);
          if (column < head_dim) *reinterpret_cast<float2*>(out + column) = value;
        }
      }
      return;
    }
    const RowFinish finish = finish_row(p, top, sum, lane_index.head);
    if (lane_row_exists && p.lse != nullptr) p.lse[stats_index(plan, lane_index)] = finish.lse;
    __syncwarp();
    if (lane < kWarpRows)
      row_params[lane_row].scale = finish.factor * (p.v_scale != nullptr ? p.v_scale[kv_head * p.v_scale_stride] : 1.0f);
    __syncwarp();
#pragma unroll
    for (int r = 0; r < kRows; ++r) factors[r] = row_params[warp_row + MmaState::row(r)].scale;
  }

  // Through the warp's part of q's memory, so that a row is stored by 16 bytes a lane.
  using OutRows = Rows<Types::kQRowBytes>;
  const bool bfloat16 = Types::kQuantized ? p.dtype == DType::kBFloat16 : Types::kBf16;
  // Rows of a thread are 8 apart, so that its chunks are exchanged alike in all of them.
  const int thread_row = warp_row + lane / 4;
  char* const thread_rows = q_shared + thread_row * Types::kQRowBytes;
#pragma unroll
  for (int j = 0; j < kHeadDim / 8; ++j) {
    int column;
    static_cast<void>(rows.columns(j, 0, column));
    char* const target = thread_rows + ((column / 8 ^ OutRows::key(thread_row)) << 4) + column % 8 * 2;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float2 value = rows.columns(j, r, column);
      const float first = value.x * factors[r], second = value.y * factors[r];
      *reinterpret_cast<std::uint32_t*>(target + 8 * r * Types::kQRowBytes) =
          bfloat16 ? device::pack_16<true>(first, second) : device::pack_16<false>(first, second);
    }
  }
  __syncwarp();
  constexpr int kRowsPerPass = 32 / OutRows::kChunks;
  const int chunk = lane % OutRows::kChunks;
  const int pass_row = lane / OutRows::kChunks;
  const std::int64_t row_offset = (lane_index.q_token * p.out_token_stride + lane_index.head * p.out_head_stride) * 2;
  const char* const staged = q_shared + warp_row * Types::kQRowBytes;
  char* const out = static_cast<char*>(p.out) + chunk * 16;
  const int end = chunk * 8 < head_dim ? tile.num_rows - warp_row - pass_row : 0;
  if (kPlain || plan.out_aligned) {
#pragma unroll
    for (int r = 0; r < kWarpRows; r += kRowsPerPass) {
      const int row = r + pass_row;
      const uint4 value = *reinterpret_cast<const uint4*>(staged + row * Types::kQRowBytes + ((chunk ^ OutRows::key(row)) << 4));
      char* const target = out + __shfl_sync(kAllLanes, row_offset, row);
      if (r < end) *reinterpret_cast<uint4*>(target) = value;
    }
  } else {
#pragma unroll 1
    for (int r = 0; r < kWarpRows; r += kRowsPerPass) {
      const int row = r + pass_row;
      const auto* const source =
          reinterpret_cast<const std::uint16_t*>(staged + row * Types::kQRowBytes + ((chunk ^ OutRows::key(row)) << 4));
      auto* const target = reinterpret_cast<std::uint16_t*>(out + __shfl_sync(kAllLanes, row_offset, row));
      for (int i = 0; i < 8 && r < end; ++i) target[i] = source[i];
    }
  }
}

}  // namespace quire::cuda::attn
