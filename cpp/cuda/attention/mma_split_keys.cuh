// Attention for few query rows per kv head (decode): the warps of a CTA take turns at the keys and meet at the end.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cuda/attention/mma_columns.cuh"
#include "cuda/device/dependent_launch.cuh"

namespace quire::cuda::attn {

template <DType kKvDType, int kHeadDim, Variant kVariant>
struct SplitKeysShape {
  using Types = MmaTypes<kKvDType, kHeadDim>;
  static constexpr int kRows = tile_rows(kVariant);
  static constexpr int kTiles = kRows / 8;
  static constexpr int kCtasPerSm = ctas_per_sm(kVariant, kHeadDim);
  static constexpr int kKeys = Types::kKvRowBytes >= 256 ? 16 : 32;  // per step of a warp
  static constexpr int kSlotBytes = kKeys * Types::kKvRowBytes;      // one step's K or V
  // 192 KiB for all warps of an SM, or 64 KiB for a CTA.
  static constexpr int kSlots = (kVariant == Variant::kMmaSplitKeys8Small ? 16 * 1024 : 48 * 1024 / kCtasPerSm) / kSlotBytes;
  static constexpr int kRingBytes = kSlots * kSlotBytes;              // of one warp
  static constexpr int kOutPitch = kHeadDim + 4;                      // floats; every second row 8 banks on
  static constexpr int kQOffset = kWarps * kRingBytes;
  static constexpr int kRowParamsOffset = kQOffset + kRows * Types::kQRowBytes;
  static constexpr int kStatsOffset = kRowParamsOffset + kRows * static_cast<int>(sizeof(RowParams));
  static constexpr int kNotesOffset = kStatsOffset + 2 * kWarps * kRows * static_cast<int>(sizeof(float));
  static constexpr int kTileOffset = kNotesOffset + kRows * kNoteWords<kHeadDim> * 4;
  static constexpr int kSharedBytes = kTileOffset + static_cast<int>(sizeof(Tile));
  static_assert(kSlots >= 2);
  static_assert(kSharedBytes <= (kVariant == Variant::kMmaSplitKeys16 || kHeadDim == 256 && kVariant == Variant::kMmaSplitKeys8
                                     ? kLargeSharedBytes
                                     : 99 * 1024));
  static_assert(kWarps * kRows * kOutPitch * 4 <= kWarps * kRingBytes, "the rings hold the merge");
};

/// One warp's keys: steps first, first + kWarps, ... of the CTA's range, copied ahead into a ring of slots K0 V0 K1 V1 ...
template <typename Shape>
struct KeyStream {
  using Types = typename Shape::Types;

  int kv_head;
  int key_end;
  int next_key;          // of the step whose K comes next
  int next_entry;        // the lane's table entry for it, fetched ahead
  KeyLocation location;  // the lane's, of the step whose K came last
  std::uint32_t valid;   // of that step: bit j says whether key j exists
  bool has_step;         // that step is inside the range

  __device__ __forceinline__ void start(const Plan& plan, const Tile& tile, int head, int first_key, int end) {
    kv_head = head;
    key_end = end;
    has_step = false;
    next_key = first_key;
    next_entry = load_entry(plan, tile, lane_key(), key_end);
  }

  __device__ __forceinline__ int lane_key() const {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    // Lanes beyond the step have no key.
    return lane < Shape::kKeys ? next_key + lane : INT_MAX;
  }

  /// Starts the copy of the next step's K and returns which of its keys exist.
  __device__ __forceinline__ std::uint32_t copy_k(const Plan& plan, const Tile& tile, std::uint32_t slot) {
    has_step = next_key < key_end;
    if (!has_step) return 0;
    location = locate_key(plan, tile, lane_key(), key_end, next_entry);
    valid = __ballot_sync(kAllLanes, location.valid);
    copy_rows<Types, Shape::kKeys>(plan, k_view<Types>(plan.params, plan, kv_head), location, valid, 0, slot, 0);
    next_key += kWarps * Shape::kKeys;
    next_entry = load_entry(plan, tile, lane_key(), key_end);
    return valid;
  }

  /// Starts the copy of the V that belongs to the last copy_k.
  __device__ __forceinline__ void copy_v(const Plan& plan, std::uint32_t slot) const {
    if (has_step) copy_rows<Types, Shape::kKeys>(plan, v_view<Types>(plan.params, plan, kv_head), location, valid, 0, slot, 0);
  }
};

/// Grid: x = tile * num_kv_heads + kv_head, y = split. A CTA computes 8 or 16 packed rows against its split's keys and writes them to
/// out and lse, or to the workspace if other splits have keys too.
template <DType kKvDType, int kHeadDim, Variant kVariant>
__global__ void __launch_bounds__(kThreads, SplitKeysShape<kKvDType, kHeadDim, kVariant>::kCtasPerSm)
    attention_mma_split_keys_kernel(const __grid_constant__ Plan plan) {
  using Types = MmaTypes<kKvDType, kHeadDim>;
  using Shape = SplitKeysShape<kKvDType, kHeadDim, kVariant>;
  constexpr int kRows = Shape::kRows;
  constexpr int kTiles = Shape::kTiles;
  constexpr int kKeys = Shape::kKeys;
  constexpr int kSlots = Shape::kSlots;
  constexpr bool kEven = kSlots % 2 == 0;
  extern __shared__ __align__(1024) char shared[];
  const AttentionParams& p = plan.params;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int num_kv_heads = static_cast<int>(p.num_kv_heads);
  const int tile_idx = static_cast<int>(blockIdx.x) / num_kv_heads;
  const int kv_head = static_cast<int>(blockIdx.x) - tile_idx * num_kv_heads;

  device::launch_dependents();
  // In shared memory, since the loop has no registers to spare.
  Tile& tile = *reinterpret_cast<Tile*>(shared + Shape::kTileOffset);
  {
    Tile found;
    if (!locate_tile(plan, tile_idx, found)) return;
    if (threadIdx.x == 0) tile = found;
    __syncthreads();
  }
  const SplitRange splits = active_splits(plan, tile);
  const int split = static_cast<int>(blockIdx.y);
  if (split >= splits.num_active) return;
  const int key_begin = tile.key_begin + split * splits.keys_per_split;
  const int key_end = min(static_cast<std::int64_t>(key_begin) + splits.keys_per_split, std::int64_t{tile.key_end});

  char* q_shared = shared + Shape::kQOffset;
  auto* row_params = reinterpret_cast<RowParams*>(shared + Shape::kRowParamsOffset);
  auto& stats = *reinterpret_cast<float (*)[2][kWarps][kRows]>(shared + Shape::kStatsOffset);
  const std::uint32_t shared_base = device::shared_address(shared);
  const std::uint32_t ring = shared_base + static_cast<std::uint32_t>(warp * Shape::kRingBytes);
  auto* notes = reinterpret_cast<std::uint32_t*>(shared + Shape::kNotesOffset);

  const FullRange full = full_range(plan, tile);
  const bool all_see_the_same =
      p.mask == nullptr && plan.group.quotient(tile.row_begin) == plan.group.quotient(tile.row_begin + tile.num_rows - 1);
  using MmaState = MmaColumns<kKvDType, kHeadDim, kTiles>;
  MmaState state;
  typename MmaState::Scale score;
  const std::uint32_t k_offset = MmaState::k_thread_offset();
  const std::uint32_t v_offset = MmaState::v_thread_offset();

  copy_q<Types, kRows>(plan, tile, kv_head, 0, warp, kWarps, q_shared);
  if (threadIdx.x < kRows) row_params[threadIdx.x] = make_row_params(plan, tile, kv_head, static_cast<int>(threadIdx.x));
  device::copy_async_commit();

  // A second pass only where NaN or infinity in V reached rows that do not see it.
  bool selecting = false;
  for (;; selecting = true) {
    KeyStream<Shape> stream;
    stream.start(plan, tile, kv_head, key_begin + warp * kKeys, key_end);
    state.reset();

    // The first kLead rounds only fill the ring: one copy of the code serves both, which matters to a cold instruction cache.
    constexpr int kLead = (kSlots + 1) / 2;
    std::uint32_t valid[kLead + 1] = {};  // of the step in use and the ones after
    std::uint32_t slot = 0;
    int key = key_begin + warp * kKeys - kLead * kWarps * kKeys;
    for (int round = -kLead;; ++round, key += kWarps * kKeys) {
      if (round == 0) {
        if (selecting) {
          for (int i = static_cast<int>(threadIdx.x); i < kRows * kNoteWords<kHeadDim>; i += kThreads) notes[i] = 0;
        } else {
          device::copy_async_wait<kSlots>();
          if constexpr (Types::kQuantized) {
            __syncthreads();
            convert_q<Types, kHeadDim, kRows / kWarps>(plan, warp * (kRows / kWarps), q_shared, row_params);
          }
        }
        __syncthreads();
        if (!selecting) {
          score = make_score_scale<MmaState::kQueries>(p, row_params, MmaState::query);
          state.attach_q(device::shared_address(q_shared));
        }
      }
      if (round >= 0 && key >= key_end) break;
      const std::uint32_t k_address = ring + slot * Shape::kSlotBytes;
      slot = slot + 1 == kSlots ? 0 : slot + 1;
      const std::uint32_t v_address = ring + slot * Shape::kSlotBytes;
      slot = slot + 1 == kSlots ? 0 : slot + 1;

      float scores[kKeys / 16][kTiles][4];
      if (round >= 0) {
        device::copy_async_wait<kSlots - 1>();
        __syncwarp();
        state.template multiply_qk<kKeys>(scores, k_address + k_offset);
        __syncwarp();
      }
      if constexpr (kEven) {
        valid[kLead] = stream.copy_k(plan, tile, k_address);
      } else {
        stream.copy_v(plan, k_address);
      }
      device::copy_async_commit();

      if (round >= 0) {
        if (score.transform) state.template transform_scores<kKeys>(scores, row_params, p.softcap, key);
        constexpr std::uint32_t kAll = kKeys == 32 ? 0xffffffffu : (1u << (kKeys % 32)) - 1;
        if (valid[0] != kAll || key < full.begin || key > full.end - kKeys) {
          state.template mask_scores<kKeys>(scores, row_params, key, valid[0]);
          if (p.mask != nullptr) state.template apply_mask<kKeys>(scores, p, row_params, key);
        }
        state.template softmax<kKeys>(scores, score);

        device::copy_async_wait<kSlots - 1>();
        __syncwarp();
        if (selecting) {
          take_out_not_finite<kKvDType, kHeadDim>(p, shared + (v_address - shared_base), 0, kKeys, key, row_params, notes, tile.num_rows);
          __syncwarp();
        }
        state.template multiply_pv<kKeys>(scores, v_address + v_offset);
        __syncwarp();
      }
      if constexpr (kEven) {
        stream.copy_v(plan, v_address);
      } else {
        valid[kLead] = stream.copy_k(plan, tile, v_address);
      }
      device::copy_async_commit();
#pragma unroll
      for (int i = 0; i < kLead; ++i) valid[i] = valid[i + 1];
    }
    device::copy_async_wait<0>();
    if (!kMayBeNotFinite<kKvDType> || selecting || all_see_the_same || !__syncthreads_or(state.not_finite())) break;
  }

  // Bring the four warps to one maximum.
  state.reduce_sum();
  if (lane < 4) {
#pragma unroll
    for (int i = 0; i < MmaState::kQueries; ++i) {
      stats[0][warp][MmaState::query(i)] = state.largest[i] * score.log2_scale[i];
      stats[1][warp][MmaState::query(i)] = state.sum[i];
    }
  }
  __syncthreads();
  auto* merged = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int i = 0; i < MmaState::kQueries; ++i) {
    const int row = MmaState::query(i);
    float top = stats[0][0][row];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) top = fmaxf(top, stats[0][w][row]);
    const float weight = exp2f(stats[0][warp][row] - (top == -INFINITY ? 0.0f : top));
    if (row < tile.num_rows) {
      float* target = merged + (warp * kRows + row) * Shape::kOutPitch;
#pragma unroll
      for (int c = 0; c < MmaState::kSteps; ++c)
#pragma unroll
        for (int half = 0; half < 2; ++half) target[MmaState::column(c, half)] = weight * state.out[c][i / 2][2 * half + i % 2];
    }
  }
  __syncthreads();

  // Write rows.
  const int head_dim = static_cast<int>(p.head_dim);
  const float v_scale = p.v_scale != nullptr ? p.v_scale[kv_head * p.v_scale_stride] : 1.0f;
  constexpr int kThreadsPerRow = kHeadDim / 4;
  for (int i = static_cast<int>(threadIdx.x); i < tile.num_rows * kThreadsPerRow; i += kThreads) {
    const int row = i / kThreadsPerRow;
    const int column = i % kThreadsPerRow * 4;
    float top = stats[0][0][row];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) top = fmaxf(top, stats[0][w][row]);
    float total = 0.0f;
    float4 value{0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      total += stats[1][w][row] * exp2f(stats[0][w][row] - (top == -INFINITY ? 0.0f : top));
      const float4 part = *reinterpret_cast<const float4*>(merged + (w * kRows + row) * Shape::kOutPitch + column);
      value.x += part.x, value.y += part.y, value.z += part.z, value.w += part.w;
    }
    if (selecting) value = with_notes<kHeadDim>(value, notes, row, column);
    const RowIndex index = row_index(plan, tile, kv_head, row);
    if (splits.num_active > 1) {
      const std::int64_t target = split * plan.num_rows + stats_index(plan, index);
      if (column == 0) plan.partial_stats[target] = float2{top, total};
      if (column < head_dim) *reinterpret_cast<float4*>(plan.partial_out + target * head_dim + column) = value;
    } else {
      const RowFinish finish = finish_row(p, top, total, index.head);
      if (column == 0 && p.lse != nullptr) p.lse[stats_index(plan, index)] = finish.lse;
      const float factor = finish.factor * v_scale;
      if (column < head_dim)
        store_out_4(plan, index, column, float4{value.x * factor, value.y * factor, value.z * factor, value.w * factor});
    }
  }
}

}  // namespace quire::cuda::attn
