// Attention for many query rows per kv head (prefill): each warp of a CTA has 16 rows, and they share the keys.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cuda/attention/mma_tile.cuh"

namespace quire::cuda::attn {

template <DType kKvDType, int kHeadDim>
struct SplitRowsShape {
  using Types = MmaTypes<kKvDType, kHeadDim>;
  static constexpr int kKeys = kHeadDim == 256 ? 32 : 64;        // per step of the CTA
  static constexpr int kSlotBytes = kKeys * Types::kKvRowBytes;  // one step's K or V
  static constexpr int kSlots = 4;
  static constexpr int kQBytes = kWarps * kWarpRows * Types::kQRowBytes;
  static constexpr int kRowParamsOffset = kSlots * kSlotBytes + kQBytes;
  static constexpr int kNotesOffset = kRowParamsOffset + kWarps * kWarpRows * static_cast<int>(sizeof(RowParams));
  static constexpr int kSharedBytes = kNotesOffset + kWarps * kWarpRows * kNoteWords<kHeadDim> * 4;
  static constexpr int kCtasPerSm = ctas_per_sm(Variant::kMmaSplitRows, kHeadDim);
};

/// Grid: x = (num_tiles - 1 - tile) * num_kv_heads + kv_head, so that under a causal mask long tiles come first; y = split. A CTA
/// computes 64 packed rows against its split's keys and writes them to out and lse, or to the workspace if other splits have keys.
template <DType kKvDType, int kHeadDim>
__global__ void __launch_bounds__(kThreads, SplitRowsShape<kKvDType, kHeadDim>::kCtasPerSm)
    attention_mma_split_rows_kernel(const __grid_constant__ Plan plan) {
  using Types = MmaTypes<kKvDType, kHeadDim>;
  using Shape = SplitRowsShape<kKvDType, kHeadDim>;
  constexpr int kKeys = Shape::kKeys;
  constexpr int kMasks = kKeys / 32;
  constexpr int kChunks = Types::kKvRowBytes / 16;
  extern __shared__ __align__(1024) char shared[];
  const AttentionParams& p = plan.params;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int num_kv_heads = static_cast<int>(p.num_kv_heads);
  const int reversed_idx = static_cast<int>(blockIdx.x) / num_kv_heads;
  const int kv_head = static_cast<int>(blockIdx.x) - reversed_idx * num_kv_heads;

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
  const char* k_base = static_cast<const char*>(p.k) + kv_head * p.k_head_stride * Types::kElementBytes;
  const char* v_base = static_cast<const char*>(p.v) + kv_head * p.v_head_stride * Types::kElementBytes;
  const int row_bytes = static_cast<int>(p.head_dim) * Types::kElementBytes;
  auto* notes = reinterpret_cast<std::uint32_t*>(shared + Shape::kNotesOffset);

  const FullRange full = full_range(plan, tile);
  const int warp_row = warp * kWarpRows;
  using MmaState = MmaRows<kKvDType, kHeadDim>;
  MmaState rows;
  ScoreScale score;
  const std::uint32_t k_thread_offset = MmaState::k_thread_offset();
  const std::uint32_t v_thread_offset = Shape::kSlotBytes + MmaState::v_thread_offset();

  // Every warp looks up the whole step, so that each knows all of its keys, and copies a quarter of the rows.
  const auto copy = [&](const char* base, const std::int64_t (&offset)[kMasks], const std::uint32_t (&valid)[kMasks], std::uint32_t slot) {
    constexpr int kRowsPerPass = 32 / kChunks;
    constexpr int kRowsPerWarp = kKeys / kWarps;
    const int chunk = lane % kChunks;
    const int bytes = min(max(row_bytes - chunk * 16, 0), 16);
    const int half = kMasks == 1 ? 0 : warp / 2;
    const std::int64_t warp_offset = half == 0 ? offset[0] : offset[kMasks - 1];
    const std::uint32_t warp_valid = half == 0 ? valid[0] : valid[kMasks - 1];
    using KvRows = Rows<Types::kKvRowBytes>;
    static_assert(kRowsPerWarp % 8 == 0);
    const std::uint32_t thread_target = KvRows::address(slot, warp * kRowsPerWarp + lane / kChunks, chunk);
    const auto copy_row = [&](int pass, auto&& copy_chunk) {
      const int row = warp * kRowsPerWarp + pass * kRowsPerPass + lane / kChunks;
      const std::int64_t row_offset = __shfl_sync(kAllLanes, warp_offset, row % 32);
      // Keys that do not exist become zero: their weights are zero, and zero times what was there could be NaN.
      const int present = (warp_valid >> (row % 32)) & 1u ? bytes : 0;
      const std::uint32_t target = KvRows::advance(thread_target, pass * kRowsPerPass, KvRows::key(pass * kRowsPerPass));
      copy_chunk(target, present > 0 ? base + row_offset + chunk * 16 : base, present);
    };
    constexpr int kPasses = kRowsPerWarp / kRowsPerPass;
    if (plan.kv_alignment == 16) {
#pragma unroll
      for (int pass = 0; pass < kPasses; ++pass) copy_row(pass, device::copy_async_16);
    } else {
      const auto copy_narrow = [&](std::uint32_t target, const char* source, int present) {
        device::copy_narrow_16(target, source, present, plan.kv_alignment);
      };
#pragma unroll 1
      for (int pass = 0; pass < kPasses; ++pass) copy_row(pass, copy_narrow);
    }
  };

  // A second pass only where NaN or infinity in V reached rows that do not see it.
  bool selecting = false;
  for (;; selecting = true) {
    int next_key = key_begin;  // of the step whose K comes next
    int entry[kMasks];
    std::int64_t v_offset[kMasks] = {};
    std::uint32_t next_valid[kMasks] = {};
#pragma unroll
    for (int m = 0; m < kMasks; ++m) entry[m] = load_entry(p, plan, tile, next_key + 32 * m + lane, key_end);
    const auto copy_k = [&](std::uint32_t slot) {
      if (next_key >= key_end) return;
      std::int64_t k_offset[kMasks];
#pragma unroll
      for (int m = 0; m < kMasks; ++m) {
        const KeyLocation location = locate_key(p, plan, tile, next_key + 32 * m + lane, key_end, entry[m]);
        next_valid[m] = __ballot_sync(kAllLanes, location.valid);
        k_offset[m] = location.k_offset * Types::kElementBytes;
        v_offset[m] = location.v_offset * Types::kElementBytes;
      }
      copy(k_base, k_offset, next_valid, slot);
      next_key += kKeys;
#pragma unroll
      for (int m = 0; m < kMasks; ++m) entry[m] = load_entry(p, plan, tile, next_key + 32 * m + lane, key_end);
    };

    // Slots hold K0 V0 K1 V1; three are ahead of the one in use.
    std::uint32_t valid[2][kMasks];  // of the step in use and the one after
    copy_k(slots);
    device::copy_async_commit();
    copy(v_base, v_offset, next_valid, slots + Shape::kSlotBytes);
    device::copy_async_commit();
#pragma unroll
    for (int m = 0; m < kMasks; ++m) valid[0][m] = next_valid[m];
    copy_k(slots + 2 * Shape::kSlotBytes);
    device::copy_async_commit();
#pragma unroll
    for (int m = 0; m < kMasks; ++m) valid[1][m] = next_valid[m];

    if (!selecting) {
      load_q<Types, kHeadDim, kWarpRows>(plan, tile, kv_head, warp_row, q_shared, row_params);
      __syncwarp();
      score = make_score_scale(p, row_params, warp_row);
      rows.attach_q(device::shared_address(q_shared), warp_row);
    }
    rows.reset();
    if (selecting) {
      for (int i = static_cast<int>(threadIdx.x); i < kWarps * kWarpRows * kNoteWords<kHeadDim>; i += kThreads) notes[i] = 0;
    }

    // Steps.
    std::uint32_t pair = slots;  // of the step in use
    for (int key = key_begin; key < key_end; key += kKeys) {
      const std::uint32_t other = pair == slots ? slots + 2 * Shape::kSlotBytes : slots;
      float scores[kKeys / 8][4];
      device::copy_async_wait<2>();
      __syncthreads();
      if (key + kKeys < key_end) copy(v_base, v_offset, next_valid, other + Shape::kSlotBytes);
      device::copy_async_commit();
      rows.template multiply_qk<kKeys>(scores, pair + k_thread_offset);

      if (score.transform) rows.template transform_scores<kKeys>(scores, row_params + warp_row, p.softcap, key);
      bool all_valid = true;
#pragma unroll
      for (int m = 0; m < kMasks; ++m) all_valid &= valid[0][m] == kAllLanes;
      if (!all_valid || key < full.begin || key > full.end - kKeys) rows.template mask_scores<kKeys>(scores, row_params + warp_row, key, valid[0]);
      rows.template softmax<kKeys>(scores, score);

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
        take_out_not_finite<kKvDType, kHeadDim>(shared + (pair - slots) + Shape::kSlotBytes, warp * (kKeys / kWarps),
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
  for (int r = 0; r < 2; ++r) {
    const int row = warp_row + lane / 4 + 8 * r;
    const bool exists = row < tile.num_rows;
    const RowIndex index = row_index(plan, tile, kv_head, exists ? row : 0);
    const float top = rows.largest[r] * score.log2_scale[r];
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
