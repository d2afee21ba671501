// Batch-invariant decode where lengths are alike: a tile to a CTA, or to the CTAs of a cluster, each of which has some of its parts.
// SPDX-License-Identifier: Apache-2.0
//
// What attend_to_stretches computes, bit by bit: the same warps have the same keys of a part, and parts are folded in the same order. But nothing is
// planned over the batch, and from one part to the next the ring stays full.
#pragma once

#include "cuda/attention/mma_cluster_keys.cuh"

namespace quire::cuda::attn {

/// No tile is left to do.
constexpr int kNothing = -1;

#if __CUDA_ARCH__ >= 900

/// A warp's copy of a step's rows: lane i knows where key i's are, in chunks from the view's base. Keys that do not exist become zero.
template <typename Types, int kKeys>
__device__ __forceinline__ void copy_step(const KvView& view, std::uint32_t offset, std::uint32_t valid, std::uint32_t slot) {
  using KvRows = Rows<Types::kKvRowBytes>;
  constexpr int kRowsPerPass = 32 / KvRows::kChunks;
  const int lane = lane_here();
  const int chunk = lane % KvRows::kChunks;
  const int first_row = lane / KvRows::kChunks;
  const bool exists = chunk * 16 < view.row_bytes;
  const char* const source = view.base + (exists ? chunk * 16 : 0);
  const std::uint32_t existing = exists ? valid >> first_row : 0;
  const std::uint32_t target = KvRows::address(slot, first_row, chunk);
#pragma unroll
  for (int row = 0; row < kKeys; row += kRowsPerPass) {
    const std::uint32_t row_offset = __shfl_sync(kAllLanes, offset, first_row + row);
    device::copy_async_16_if(KvRows::advance(target, row, KvRows::key(row)), source + static_cast<std::uint64_t>(row_offset) * 16,
                             (existing & (1u << row)) != 0);
  }
}

/// The part that CTA `rank` of `size` begins with: cut where the keys before it are its share, more or less. The tile's parts are [first, last), and
/// the first one's CTA has one.
__device__ __forceinline__ int first_part(const Divisor& size, int rank, KeyRange range, int first, int last) {
  if (rank == 0 || first >= last) return first;
  if (rank >= static_cast<int>(size.divisor)) return last;
  const int share = size.quotient(range.end - range.begin);  // of keys
  const int key = range.begin + share * rank;
  const int part = part_of(key);
  const int middle = part_begin(part) + (part_begin(part + 1) - part_begin(part)) / 2;
  return min(max(key < middle ? part : part + 1, first + 1), last);
}

__device__ __forceinline__ bool is_finite(const Partial& partial) {
  // A key that is not finite makes sums NaN, V that is not, a column.
  const float probe = fmaf(partial.sum, 0.0f, partial.value.x * 0.0f) + fmaf(partial.value.y, 0.0f, partial.value.z * 0.0f);
  return fmaf(partial.value.w, 0.0f, probe) == 0.0f;
}

/// Queries one to a sequence, groups of up to 8 heads, no mask. Begins with `tile_idx`, of all kv heads, which is the cluster's first; tiles that come
/// after that, if they are more than CTAs, go to whoever is ready for one. Returns a tile in which something is not finite, with the next in
/// `tile_idx`: what infinity in hidden values does is attend_to_stretches's to say.
template <DType kKvDType, int kHeadDim>
__device__ __forceinline__ int attend_to_parts(const Plan& plan, int& tile_idx) {
  using Types = MmaTypes<kKvDType, kHeadDim>;
  using Shape = SplitKeysShape<kKvDType, kHeadDim, Variant::kMmaSplitKeys8, false, Pairing::kNone>;
  constexpr int kRows = Shape::kRows;
  constexpr int kKeys = Shape::kKeys;
  constexpr int kSlots = Shape::kSlots;
  constexpr int kLead = Shape::kLead;
  constexpr bool kEven = kSlots % 2 == 0;
  constexpr int kStride = kWarps * kKeys;
  static_assert(kRows * kHeadDim * static_cast<int>(sizeof(float)) <= Shape::kSlotBytes, "a slot holds a warp's sums");
  static_assert(512 % kStride == 0);
  extern __shared__ __align__(1024) char shared[];
  const AttentionParams& p = plan.params;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int size = static_cast<int>(plan.cluster.divisor);
  char* const q_shared = shared + Shape::kQOffset;
  auto* const row_params = reinterpret_cast<RowParams*>(shared + Shape::kRowParamsOffset);
  auto& stats = *reinterpret_cast<float2(*)[kWarps][kRows]>(shared + Shape::kStatsOffset);
  auto& folded_stats = *reinterpret_cast<float2(*)[2][kRows]>(shared + Shape::kFoldedOffset);
  auto& next_ticket = *reinterpret_cast<int*>(shared + Shape::kNotesOffset);
  const std::uint32_t shared_base = device::shared_address(shared);
  const std::uint32_t ring = shared_base + static_cast<std::uint32_t>(warp * Shape::kRingBytes);
  const int num_tiles = static_cast<int>(p.num_seqs) * static_cast<int>(plan.kv_heads.divisor);

#pragma unroll 1
  while (tile_idx < num_tiles) {
    Tile tile{};
    tile.seq = tile.first_token = plan.kv_heads.quotient(tile_idx);
    const int kv_head = plan.kv_heads.remainder(tile_idx, tile.seq);
    const int rank = plan.cluster.remainder(static_cast<int>(blockIdx.x), plan.cluster.quotient(static_cast<int>(blockIdx.x)));
    tile.query_len = 1;
    tile.num_rows = static_cast<int>(plan.group.divisor);
    tile.kv_len = sequence_keys(plan, tile.seq, rank == 0 && kv_head == 0 && threadIdx.x == 0);
    KeyRange range = visible_keys(p, tile, 0);
    if (range.end <= range.begin) range.begin = range.end = 0;
    const int tile_first = part_of(range.begin), tile_last = range.end == 0 ? tile_first + 1 : part_of(range.end - 1) + 1;
    const int first = first_part(plan.cluster, rank, range, tile_first, tile_last);
    const int last = first_part(plan.cluster, rank + 1, range, tile_first, tile_last);
    const int run_begin = part_begin(first), run_end = last == tile_last ? range.end : part_begin(last);

    const std::uint32_t first_entries = shared_base + static_cast<std::uint32_t>(Shape::kEntriesOffset + warp * Shape::kEntryBytes);
    const auto lane_key = [&](int key) {
      const int lane = lane_here();
      return lane < kKeys && key + lane >= range.begin ? key + lane : INT_MAX;
    };
    std::uint32_t entries = 0;  // of the step whose K comes next, from the warp's first
    int next_key = run_begin + warp * kKeys;  // of that step
    if (first < last) {
#pragma unroll
      for (int i = 0; i < kLead; ++i)
        copy_entry(plan, tile, lane_key(next_key + i * kStride), run_end,
                   first_entries + static_cast<std::uint32_t>(i * kKeys * 4 + 4 * lane_here()));
      copy_q<Types, kRows>(plan, tile, kv_head, 0, warp, kWarps, q_shared);
    }
    device::copy_async_commit();
    device::copy_async_wait<0>();

    using MmaState = MmaColumns<kKvDType, kHeadDim, 1, false, Rows<Types::kKvRowBytes>, kHeadDim != 128>;
    MmaState state;
    typename MmaState::Scale score;
    const std::uint32_t k_offset = MmaState::k_thread_offset();
    const std::uint32_t v_offset = MmaState::v_thread_offset();
    state.reset();

    std::uint32_t last_valid = 0, v_chunks = 0;  // of the step whose K came last: which keys exist, and where the lane's V is
    const auto copy_k = [&](std::uint32_t slot) {
      last_valid = 0;
      if (next_key < run_end) {
        const std::uint32_t entry_address = first_entries + entries + static_cast<std::uint32_t>(4 * lane_here());
        const KeyLocation location = locate_key(plan, tile, lane_key(next_key), run_end, device::load_shared(entry_address));
        last_valid = __ballot_sync(kAllLanes, location.valid);
        const std::uint32_t entry = location.valid ? static_cast<std::uint32_t>(location.entry) : 0;
        const std::uint32_t token = location.valid ? static_cast<std::uint32_t>(location.slot) : 0;
        v_chunks = entry * plan.v_chunk_strides.x + token * plan.v_chunk_strides.y;
        copy_step<Types, kKeys>(k_view<Types>(p, plan, kv_head), entry * plan.k_chunk_strides.x + token * plan.k_chunk_strides.y,
                                last_valid, slot);
        copy_entry(plan, tile, lane_key(next_key + kLead * kStride), run_end, entry_address);
        entries = entries + kKeys * 4 == Shape::kEntryBytes ? 0 : entries + kKeys * 4;
      }
      next_key += kStride;
      return last_valid;
    };
    const auto copy_v = [&](std::uint32_t slot) {
      const int key = next_key - kStride;
      if (key >= run_begin && key < run_end) copy_step<Types, kKeys>(v_view<Types>(p, plan, kv_head), v_chunks, last_valid, slot);
    };

    std::uint32_t valid[kLead + 1] = {};
    std::uint32_t slot = 0;
    int round = -kLead;
    bool finite = true;
#pragma unroll 1
    for (int part = first; part < last; ++part) {
      const int part_end = part + 1 == last ? run_end : part_begin(part + 1);
      // As in attend_to_stretches, but that a step's last copy comes with the next step: after a part's last one a slot is free.
#pragma unroll 1
      for (;; ++round) {
        if (round == 0) {
          if (threadIdx.x < kRows) row_params[threadIdx.x] = make_row_params(plan, tile, kv_head, static_cast<int>(threadIdx.x));
          if (threadIdx.x == 0 && plan.tiles_per_cta > 1) next_ticket = take_ticket(plan, num_tiles);
          if constexpr (Types::kQuantized) {
            __syncthreads();
            for (int row = warp; row < kRows; row += kWarps) convert_q<Types, kHeadDim, 1>(plan, row, q_shared, row_params);
          }
          __syncthreads();
          score = make_score_scale<MmaState::kQueries>(p, row_params, MmaState::query);
          state.attach_q(device::shared_address(q_shared));
        }
        const int key = next_key - (kEven ? kLead : kLead - 1) * kStride;
        if (round >= 0 && key >= part_end) break;
        const std::uint32_t free_address = ring + (slot == 0 ? kSlots - 1 : slot - 1) * Shape::kSlotBytes;
        if constexpr (kEven) {
          copy_v(free_address);
        } else if (round > -kLead) {
          valid[kLead] = copy_k(free_address);
        }
        device::copy_async_commit();
#pragma unroll
        for (int i = 0; i < kLead; ++i) valid[i] = valid[i + 1];
        const std::uint32_t k_address = ring + slot * Shape::kSlotBytes;
        slot = slot + 1 == kSlots ? 0 : slot + 1;
        const std::uint32_t v_address = ring + slot * Shape::kSlotBytes;
        slot = slot + 1 == kSlots ? 0 : slot + 1;

        float scores[kKeys / 16][1][4];
        if (round >= 0) {
          device::copy_async_wait<kSlots - 1>();
          __syncwarp();
          state.template multiply_qk<kKeys>(scores, k_address + k_offset);
          __syncwarp();
        }
        if constexpr (kEven) {
          valid[kLead] = copy_k(k_address);
        } else {
          copy_v(k_address);
        }
        device::copy_async_commit();

        if (round >= 0) {
          if (score.transform) state.template transform_scores<kKeys>(scores, row_params, p.softcap, key);
          constexpr std::uint32_t kAll = kKeys == 32 ? 0xffffffffu : (1u << (kKeys % 32)) - 1;
          if (valid[0] != kAll) state.template mask_scores<kKeys>(scores, row_params, key, valid[0]);
          state.template softmax<kKeys>(scores, score);

          device::copy_async_wait<kSlots - 1>();
          __syncwarp();
          state.template multiply_pv<kKeys>(scores, v_address + v_offset);
          __syncwarp();
        }
      }
      // The warps' sums go into the slot that is free, the same one of every ring; with the last part all are.
      std::uint32_t sums_slot = slot == 0 ? kSlots - 1 : slot - 1;
      if (part + 1 == last) {
        device::copy_async_wait<0>();
        __syncwarp();
        sums_slot = 0;
      }
      state.reduce_sum();
      const int lane = lane_here();
      if (lane < 4) {
#pragma unroll
        for (int i = 0; i < MmaState::kQueries; ++i)
          stats[warp][lane * 2 + i] = float2{state.largest[i] * score.log2_scale[i], state.sum[i]};
      }
      auto* const sums = reinterpret_cast<float*>(shared + sums_slot * Shape::kSlotBytes);
      // What a warp writes at once is in different banks.
      const auto sum_index = [](int query, int column) {
        return query * kHeadDim + (column ^ ((query >> 1 & 1) << 4 | (query >> 2 & 1) << 3));
      };
      int places[2][2];
#pragma unroll
      for (int c = 0; c < 2; ++c)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int group = lane / 4;
          const int column = Types::kQuantized ? 16 * c + 2 * group + half : 16 * c + group + 8 * half;
          places[c][half] = warp * (Shape::kRingBytes / 4) + sum_index(lane % 4 * 2, column);
        }
#pragma unroll
      for (int i = 0; i < MmaState::kQueries; ++i)
        if (lane % 4 * 2 + i < tile.num_rows) {
#pragma unroll
          for (int c = 0; c < MmaState::kSteps; ++c)
#pragma unroll
            for (int half = 0; half < 2; ++half) sums[places[c % 2][half] + c / 2 * 32 + i * kHeadDim] = state.out[c][0][2 * half + i];
        }
      __syncthreads();

      constexpr int kThreadsPerRow = kHeadDim / 4;
#pragma unroll 1
      for (int i = thread_here(); i < tile.num_rows * kThreadsPerRow; i += kThreads) {
        const int row = i / kThreadsPerRow, column = i % kThreadsPerRow * 4;
        const std::int64_t target = partial_row(plan, static_cast<int>(blockIdx.x), rank == 0 ? first_slot(plan) : part - first, row);
        Partial before{};
        const bool folds = rank == 0 && part > tile_first;
        if (folds) {
          // The thread finds what it left here.
          before = load_partial(plan, target, column);
          before.top = folded_stats[part % 2][row].x;
          before.sum = folded_stats[part % 2][row].y;
        }
        Partial result{float4{0.0f, 0.0f, 0.0f, 0.0f}, -INFINITY, 0.0f};
#pragma unroll
        for (int w = 0; w < kWarps; ++w) result.top = fmaxf(result.top, stats[w][row].x);
        const float base = result.top == -INFINITY ? 0.0f : result.top;
#pragma unroll
        for (int w = 0; w < kWarps; ++w)
          add_part(result, base, *reinterpret_cast<const float4*>(sums + w * (Shape::kRingBytes / 4) + sum_index(row, column)),
                   stats[w][row]);
        if (folds) {
          fold(before, result);
          result = before;
        }
        if (rank == 0 && column == 0) folded_stats[(part + 1) % 2][row] = float2{result.top, result.sum};
        if (size == 1 && part + 1 == last) {
          finite &= is_finite(result);
          finish(plan, tile, kv_head, row, column, result);
        } else {
          store_partial(plan, target, column, result);
        }
      }
      __syncthreads();
      state.reset();
    }
    if (size > 1) {
      device::cluster_sync();
      if (rank > 0) return kNothing;
#pragma unroll 1
      for (int i = thread_here(); i < tile.num_rows * (kHeadDim / 4); i += kThreads) {
        const int row = i / (kHeadDim / 4), column = i % (kHeadDim / 4) * 4;
        Partial result = load_partial(plan, partial_row(plan, static_cast<int>(blockIdx.x), first_slot(plan), row), column);
        int part = last;
#pragma unroll 1
        for (int other = 1; other < size; ++other) {
          const int begin = part;
          part = first_part(plan.cluster, other + 1, range, tile_first, tile_last);
#pragma unroll 2
          for (int i = begin; i < part; ++i)
            fold(result, load_partial(plan, partial_row(plan, static_cast<int>(blockIdx.x) + other, i - begin, row), column));
        }
        finite &= is_finite(result);
        finish(plan, tile, kv_head, row, column, result);
      }
    }
    const int this_tile = tile_idx;
    const bool repeats = __syncthreads_or(!finite);
    tile_idx = plan.tiles_per_cta > 1 ? next_ticket : num_tiles;
    __syncthreads();
    if (repeats) return this_tile;
  }
  return kNothing;
}

#endif  // sm_90

}  // namespace quire::cuda::attn
