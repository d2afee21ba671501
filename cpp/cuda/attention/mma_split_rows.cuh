// Attention for many query rows per kv head (prefill): each warp of a CTA has 16 or 32 rows, and they share the keys.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cuda/attention/mma_rows.cuh"
#include "cuda/device/dependent_launch.cuh"

namespace quire::cuda::attn {

template <DType kKvDType, int kHeadDim, Variant kVariant>
struct SplitRowsShape {
  static constexpr int kTileRows = tile_rows(kVariant);
  static constexpr int kWarpRows = kTileRows / kWarps;
  using Types = MmaTypes<kKvDType, kHeadDim>;
  static constexpr int kKeys = kHeadDim * kWarpRows > 128 * 16 ? 32 : 64;  // per step of the CTA
  static constexpr int kSlotBytes = kKeys * Types::kKvRowBytes;  // one step's K or V
  static constexpr int kSlots = 4;
  static constexpr int kQBytes = kTileRows * Types::kQRowBytes;
  static constexpr int kRowParamsOffset = kSlots * kSlotBytes + kQBytes;
  static constexpr int kNotesOffset = kRowParamsOffset + kTileRows * static_cast<int>(sizeof(RowParams));
  static constexpr int kSharedBytes = kNotesOffset + kTileRows * kNoteWords<kHeadDim> * 4;
  static constexpr int kCtasPerSm = ctas_per_sm(kVariant, kHeadDim);
  static_assert(kSharedBytes <= (needs_large_shared(kVariant, kHeadDim, Types::kElementBytes) ? kLargeSharedBytes : 99 * 1024));
};

/// Grid: x = (num_tiles - 1 - tile) * num_kv_heads + kv_head, so that under a causal mask long tiles come first; y = split. A CTA
/// computes its packed rows against its split's keys and writes them to out and lse, or to the workspace if other splits have keys.
template <DType kKvDType, int kHeadDim, Variant kVariant>
__global__ void __launch_bounds__(kThreads, SplitRowsShape<kKvDType, kHeadDim, kVariant>::kCtasPerSm)
    attention_mma_split_rows_kernel(const __grid_constant__ Plan plan) {
  using Types = MmaTypes<kKvDType, kHeadDim>;
  using Shape = SplitRowsShape<kKvDType, kHeadDim, kVariant>;
  constexpr int kKeys = Shape::kKeys, kWarpRows = Shape::kWarpRows, kTileRows = Shape::kTileRows;
  constexpr int kMasks = kKeys / 32;
  extern __shared__ __align__(1024) char shared[];
  const AttentionParams& p = plan.params;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int num_kv_heads = static_cast<int>(p.num_kv_heads);
  const int reversed_idx = static_cast<int>(blockIdx.x) / num_kv_heads;
  const int kv_head = static_cast<int>(blockIdx.x) - reversed_idx * num_kv_heads;

  device::launch_dependents();
  Tile tile;
  if (!locate_tile(plan, plan.num_tiles - 1 - reversed_idx, tile)) return;
  const SplitRange splits = active_splits(plan, tile);
  const int split = static_cast<int>(blockIdx.y);
  if (split >= splits.num_active) return;
  const int key_begin = tile.key_begin + split * splits.keys_per_split;
  const int key_end = min(static_cast<std::int64_t>(key_begin) + splits.keys_per_split, std::int64_t{tile.key_end});

  char* q_shared = shared + Shape::kSlots * Shape::kSlotBytes;
  auto* row_params = reinterpret_cast<RowParams*>(shared + Shape::kRowParamsOffset);
  const std::uint32_t slots = device::shared_address(shared);
  auto* notes = reinterpret_cast<std::uint32_t*>(shared + Shape::kNotesOffset);

  const FullRange full = full_range(plan, tile);
  const int warp_row = warp * kWarpRows;
  using MmaState = MmaRows<kKvDType, kHeadDim, kWarpRows / 16>;
  constexpr int kRows = MmaState::kRows;
  MmaState rows;
  ScoreScale<kRows> score;
  const std::uint32_t k_thread_offset = MmaState::k_thread_offset();
  const std::uint32_t v_thread_offset = Shape::kSlotBytes + MmaState::v_thread_offset();

  // Every warp looks up the whole step, so that each knows all of its keys, and copies a quarter of the rows.
  const auto copy = [&](const KvView& view, const KeyLocation(&location)[kMasks], const std::uint32_t (&valid)[kMasks],
                        std::uint32_t slot) {
    constexpr int kRowsPerWarp = kKeys / kWarps;
    const int first_row = warp * kRowsPerWarp;
    if (kMasks == 1 || first_row < 32) {
      copy_rows<Types, kRowsPerWarp>(plan, view, location[0], valid[0], first_row % 32, slot, first_row);
    } else {
      copy_rows<Types, kRowsPerWarp>(plan, view, location[kMasks - 1], valid[kMasks - 1], first_row % 32, slot, first_row);
    }
  };

  copy_q<Types, kWarpRows>(plan, tile, kv_head, warp_row, 0, 1, q_shared);
  if (lane < kWarpRows) row_params[warp_row + lane] = make_row_params(plan, tile, kv_head, warp_row + lane);
  device::copy_async_commit();

  // A second pass only where NaN or infinity in V reached rows that do not see it.
  bool selecting = false;
  for (;; selecting = true) {
    int next_key = key_begin;  // of the step whose K comes next
    int entry[kMasks];
    KeyLocation location[kMasks] = {};  // of the step whose K came last
    std::uint32_t next_valid[kMasks] = {};
#pragma unroll
    for (int m = 0; m < kMasks; ++m) entry[m] = load_entry(plan, tile, next_key + 32 * m + lane, key_end);
    const auto copy_k = [&](std::uint32_t slot) {
      if (next_key >= key_end) return;
#pragma unroll
      for (int m = 0; m < kMasks; ++m) {
        location[m] = locate_key(plan, tile, next_key + 32 * m + lane, key_end, entry[m]);
        next_valid[m] = __ballot_sync(kAllLanes, location[m].valid);
      }
      copy(k_view<Types>(p, plan, kv_head), location, next_valid, slot);
      next_key += kKeys;
#pragma unroll
      for (int m = 0; m < kMasks; ++m) entry[m] = load_entry(plan, tile, next_key + 32 * m + lane, key_end);
    };
    const auto copy_v = [&](std::uint32_t slot) { copy(v_view<Types>(p, plan, kv_head), location, next_valid, slot); };

    // Slots hold K0 V0 K1 V1; three are ahead of the one in use.
    std::uint32_t valid[2][kMasks];  // of the step in use and the one after
    copy_k(slots);
    device::copy_async_commit();
    copy_v(slots + Shape::kSlotBytes);
    device::copy_async_commit();
#pragma unroll
    for (int m = 0; m < kMasks; ++m) valid[0][m] = next_valid[m];
    copy_k(slots + 2 * Shape::kSlotBytes);
    device::copy_async_commit();
#pragma unroll
    for (int m = 0; m < kMasks; ++m) valid[1][m] = next_valid[m];

    if (!selecting) {
      // Three newer groups may be under way.
      device::copy_async_wait<3>();
      __syncwarp();
      if constexpr (Types::kQuantized) {
        convert_q<Types, kHeadDim, kWarpRows>(plan, warp_row, q_shared, row_params);
        __syncwarp();
      }
      score = make_score_scale<kRows>(p, row_params, [&](int i) { return warp_row + MmaState::row(i); });
      rows.attach_q(device::shared_address(q_shared), warp_row);
    }
    rows.reset([&](int i) {
      const RowParams& row = row_params[warp_row + MmaState::row(i)];
      return max(row.begin, key_begin) < min(row.end, key_end);
    });
    if (selecting) {
      for (int i = static_cast<int>(threadIdx.x); i < kTileRows * kNoteWords<kHeadDim>; i += kThreads) notes[i] = 0;
    }

    // Steps.
    std::uint32_t pair = slots;  // of the step in use
    for (int key = key_begin; key < key_end; key += kKeys) {
      const std::uint32_t other = pair == slots ? slots + 2 * Shape::kSlotBytes : slots;
      typename MmaState::template Scores<kKeys> scores;
      device::copy_async_wait<2>();
      __syncthreads();
      if (key + kKeys < key_end) copy_v(other + Shape::kSlotBytes);
      device::copy_async_commit();
      float added[kRows];
      // Scores are computed twice where the first weights were large, which is rare after a tile's first step.
      for (bool large = false;; large = true) {
        rows.template multiply_qk<kKeys>(scores, pair + k_thread_offset);
        if (score.transform) rows.template transform_scores<kKeys>(scores, row_params + warp_row, p.softcap, key);
        bool all_valid = true;
#pragma unroll
        for (int m = 0; m < kMasks; ++m) all_valid &= valid[0][m] == kAllLanes;
        if (!all_valid || key < full.begin || key > full.end - kKeys) {
          rows.template mask_scores<kKeys>(scores, row_params + warp_row, key, valid[0]);
          if (p.mask != nullptr) rows.template apply_mask<kKeys>(scores, p, row_params + warp_row, key);
        }
        if (large) rows.template raise_base<kKeys>(scores, score, added);
        if (!rows.template weigh<kKeys>(scores, score, large, added) || large) break;
      }
#pragma unroll
      for (int i = 0; i < kRows; ++i) rows.sum[i] += added[i];

      device::copy_async_wait<2>();
      __syncthreads();
      copy_k(pair);
      device::copy_async_commit();
#pragma unroll
      for (int m = 0; m < kMasks; ++m) {
        valid[0][m] = valid[1][m];
        valid[1][m] = next_valid[m];
      }
      if (selecting) {
        take_out_not_finite<kKvDType, kHeadDim>(p, shared + (pair - slots) + Shape::kSlotBytes, warp * (kKeys / kWarps),
                                                (warp + 1) * (kKeys / kWarps), key, row_params, notes, tile.num_rows);
        __syncthreads();
      }
      rows.template multiply_pv<kKeys>(scores, pair + v_thread_offset);
      pair = other;
    }
    device::copy_async_wait<0>();
    if (!kMayBeNotFinite<kKvDType> || selecting || !__syncthreads_or(warp_row < tile.num_rows && rows.not_finite())) break;
  }

  // Write rows.
  rows.reduce_sum();
  const int head_dim = static_cast<int>(p.head_dim);
  const float v_scale = p.v_scale != nullptr ? p.v_scale[kv_head * p.v_scale_stride] : 1.0f;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int row = warp_row + MmaState::row(r);
    const bool exists = row < tile.num_rows;
    const RowIndex index = row_index(plan, tile, kv_head, exists ? row : 0);
    const float top = rows.final_base(r);
    const std::int64_t target = split * plan.num_rows + stats_index(plan, index);
    float factor = 1.0f;
    if (splits.num_active > 1) {
      if (exists && lane % 4 == 0) plan.partial_stats[target] = float2{top, rows.sum[r]};
    } else {
      const RowFinish finish = finish_row(p, top, rows.sum[r], index.head);
      if (exists && lane % 4 == 0 && p.lse != nullptr) p.lse[stats_index(plan, index)] = finish.lse;
      factor = finish.factor * v_scale;
    }
#pragma unroll
    for (int i = 0; i < kHeadDim / 16; ++i) {
      int column;
      float4 value = rows.columns(i, r, column);
      if (!exists || column >= head_dim) continue;
      if (selecting) value = with_notes<kHeadDim>(value, notes, row, column);
      if (splits.num_active > 1) {
        *reinterpret_cast<float4*>(plan.partial_out + target * head_dim + column) = value;
      } else {
        store_out_4(plan, index, column, float4{value.x * factor, value.y * factor, value.z * factor, value.w * factor});
      }
    }
  }
}

}  // namespace quire::cuda::attn
