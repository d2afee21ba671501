// Decode of few sequences: the CTAs of a cluster share a tile's keys and put their parts together through each other's shared memory.
// SPDX-License-Identifier: Apache-2.0
//
// Most of such a call's time is that of loads that wait for one another and of instructions that are in no cache. So nothing is planned: steps of
// keys are dealt to the warps of all CTAs in turn, whatever the length is, and a warp asks for its first block before it knows the length.
#pragma once

#include "cuda/attention/mma_split_keys.cuh"
#include "cuda/device/cluster.cuh"
#include "cuda/device/tma.cuh"

namespace quire::cuda::attn {

/// Of a CTA that is alone on its SM, for one sequence.
constexpr int kLoneWarps = 16;

/// Of kv heads of kHeadDim, one by one, also where attend_to_stretches takes them in pairs.
template <DType kKvDType, int kHeadDim, int kWarpsOfCta>
struct ClusterKeysShape {
  using Base = SplitKeysShape<kKvDType, kHeadDim, Variant::kMmaSplitKeys8, true, Pairing::kNone>;
  using Types = typename Base::Types;
  static constexpr int kRows = Base::kRows;
  static constexpr int kKeys = Base::kKeys;
  static constexpr int kSlots = Base::kSlots;
  static constexpr int kSlotBytes = Base::kSlotBytes;
  static constexpr int kRingBytes = Base::kRingBytes;
  static constexpr int kOutPitch = Base::kOutPitch;
  static constexpr int kLead = Base::kLead;
  static constexpr int kEntryBytes = Base::kEntryBytes;
  static constexpr int kCtaWarps = kWarpsOfCta;
  static constexpr int kCtaThreads = 32 * kCtaWarps;
  static constexpr int kItems = kRows * kHeadDim / 4 + kMaxCluster;  // of four columns, that a CTA receives at most
  static constexpr int kQOffset = kCtaWarps * kRingBytes;
  static constexpr int kEntriesOffset = kQOffset + kRows * Types::kQRowBytes;
  // From every CTA, items of this one: values and their softmax terms.
  static constexpr int kReceivedOffset = kEntriesOffset + kCtaWarps * kEntryBytes;
  static constexpr int kReceivedStatsOffset = kReceivedOffset + kItems * static_cast<int>(sizeof(float4));
  static constexpr int kStatsOffset = kReceivedStatsOffset + kItems * static_cast<int>(sizeof(float2));
  static constexpr int kRowParamsOffset = kStatsOffset + kCtaWarps * kRows * static_cast<int>(sizeof(float2));
  static constexpr int kBarrierOffset = kRowParamsOffset + kRows * static_cast<int>(sizeof(RowParams));
  static constexpr int kSharedBytes = kBarrierOffset + 8;
  static_assert(kBarrierOffset % 8 == 0);
  /// Of an item of four columns that goes to another CTA: the columns and their softmax terms.
  static constexpr int kItemBytes = static_cast<int>(sizeof(float4) + sizeof(float2));
};

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

/// Whether sequences are so much alike that clusters may have one tile each. A warp's work.
__device__ __forceinline__ bool lengths_are_alike(const Plan& plan) {
  const auto num_seqs = static_cast<int>(plan.params.num_seqs);
  if (num_seqs == 1) return true;
  constexpr int kUnit = 64;  // of keys; few enough units for sums of 32 bits
  int longest = 0;
  unsigned sum = 0;
#pragma unroll 2
  for (int seq = static_cast<int>(threadIdx.x) % 32; seq < num_seqs; seq += 32) {
    const int units = min(sequence_keys(plan, seq, false), plan.key_span) / kUnit;
    longest = max(longest, units);
    sum += static_cast<unsigned>(units);
  }
  longest = __reduce_max_sync(kAllLanes, longest);
  sum = __reduce_add_sync(kAllLanes, sum);
  // The longest sequence may have a few keys, or some of them, more than the mean.
  constexpr int kFew = 512 / kUnit;
  return static_cast<std::int64_t>(longest - kFew) * num_seqs <= std::int64_t{sum} + sum / 16;
}

#if __CUDA_ARCH__ >= 900

/// A tile to a cluster of plan.cluster CTAs: a query of each sequence, and a group of up to 8 heads. False if the lengths are too different; then
/// nothing has been done.
template <DType kKvDType, int kHeadDim, int kWarpsOfCta, bool kInPairs>
__device__ __forceinline__ bool attend_in_clusters(const Plan& plan) {
  using Types = MmaTypes<kKvDType, kHeadDim>;
  using Shape = ClusterKeysShape<kKvDType, kHeadDim, kWarpsOfCta>;
  constexpr int kRows = Shape::kRows;
  constexpr int kKeys = Shape::kKeys;
  constexpr int kSlots = Shape::kSlots;
  constexpr int kCtaWarps = Shape::kCtaWarps;
  constexpr int kLead = Shape::kLead;
  constexpr bool kEven = kSlots % 2 == 0;
  extern __shared__ __align__(1024) char shared[];
  const AttentionParams& p = plan.params;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const auto size = static_cast<int>(plan.cluster.divisor);
  const int tile_idx = plan.cluster.quotient(static_cast<int>(blockIdx.x));
  const int rank = plan.cluster.remainder(static_cast<int>(blockIdx.x), tile_idx);

  char* const q_shared = shared + Shape::kQOffset;
  auto* const row_params = reinterpret_cast<RowParams*>(shared + Shape::kRowParamsOffset);
  auto& stats = *reinterpret_cast<float2(*)[kCtaWarps][kRows]>(shared + Shape::kStatsOffset);
  const std::uint32_t shared_base = device::shared_address(shared);
  const std::uint32_t ring = shared_base + static_cast<std::uint32_t>(warp * Shape::kRingBytes);

  // If kInPairs, a kv head of the plan is two here, and rows of the second follow the first's.
  const int pair_idx = kInPairs ? tile_idx / 2 : tile_idx;
  Tile tile{};
  tile.seq = tile.first_token = plan.kv_heads.quotient(pair_idx);
  const int pair = plan.kv_heads.remainder(pair_idx, tile.seq);
  const int kv_head = kInPairs ? 2 * pair + tile_idx % 2 : pair;
  tile.query_len = 1;
  tile.num_rows = static_cast<int>(plan.kv_group.divisor);
  tile.row_begin = kInPairs ? tile_idx % 2 * tile.num_rows : 0;
  const auto view_of = [&](KvView view, std::int64_t stride) {
    if (kInPairs && tile_idx % 2 != 0) view.base += stride * Types::kElementBytes / 2;
    return view;
  };

  // What needs no other load's result comes first: table entries of the first steps, if they exist, and q.
  const std::int32_t seq_len = p.seq_lens[tile.seq];
  const int stride = size * kCtaWarps * kKeys;
  const auto lane_key = [&](int key) { return lane < kKeys ? key + lane : INT_MAX; };
  const std::uint32_t first_entries =
      shared_base + static_cast<std::uint32_t>(Shape::kEntriesOffset + warp * Shape::kEntryBytes + 4 * lane);
  std::uint32_t entries = first_entries;
  int next_key = (warp * size + rank) * kKeys;  // of the step whose K comes next
  const auto copy_first_entries = [&](int key_end) {
#pragma unroll
    for (int i = 0; i < kLead; ++i)
      copy_entry(plan, tile, lane_key(next_key + i * stride), key_end, first_entries + static_cast<std::uint32_t>(i * kKeys * 4));
  };
  copy_first_entries(plan.key_capacity);
  using QRows = Rows<Types::kQRowBytes>;
  static_assert(kRows * QRows::kChunks <= Shape::kCtaThreads);
  if (static_cast<int>(threadIdx.x) < kRows * QRows::kChunks) {
    const int row = static_cast<int>(threadIdx.x) / QRows::kChunks, chunk = static_cast<int>(threadIdx.x) % QRows::kChunks;
    const bool exists = row < tile.num_rows && chunk * 8 < p.head_dim;
    const std::int64_t head = kv_head * tile.num_rows + row;
    const char* const source =
        static_cast<const char*>(p.q) + (tile.first_token * p.q_token_stride + head * p.q_head_stride) * 2 + chunk * 16;
    device::copy_async_16_if(QRows::address(device::shared_address(q_shared), row, chunk), exists ? source : static_cast<const char*>(p.q),
                             exists);
  }
  device::copy_async_commit();
  if constexpr (kWarpsOfCta != kLoneWarps) {
    prefetch_tables<Shape::kCtaThreads>(p);
    if (!lengths_are_alike(plan)) {
      device::copy_async_wait<0>();
      __syncthreads();
      return false;
    }
  }

  // What the other CTAs send here at the end is counted at a barrier, which they may use when all have arrived below.
  constexpr int kItemsOfRow = kHeadDim / 4;
  const int num_items = tile.num_rows * kItemsOfRow;  // of four columns of a row; CTA r puts the items r, r + size, ... together
  const std::uint32_t barrier = shared_base + static_cast<std::uint32_t>(Shape::kBarrierOffset);
  if (threadIdx.x == 0) {
    device::barrier_init(barrier, 1);
    device::barrier_init_fence();
    device::barrier_arrive_expect(barrier, plan.cluster.quotient(num_items - rank + size - 1) * size * Shape::kItemBytes);
  }
  __syncwarp();
  device::cluster_arrive();

  tile.kv_len = min(max(seq_len, 0), plan.key_capacity);
  if (tile.kv_len != seq_len && rank == 0 && kv_head == 0 && threadIdx.x == 0)
    record_error(plan.error_word, plan.op, ArgId::kSeqLens, tile.seq, seq_len);
  const KeyRange range = visible_keys(p, tile, 0);
  const int first_key = range.begin / kKeys * kKeys;
  device::copy_async_wait<0>();
  if (first_key > 0) {
    next_key += first_key;
    copy_first_entries(range.end);
    device::copy_async_wait_all();
  }

  using MmaState = MmaColumns<kKvDType, kHeadDim, 1, false>;
  MmaState state;
  typename MmaState::Scale score;
  const std::uint32_t k_offset = MmaState::k_thread_offset();
  const std::uint32_t v_offset = MmaState::v_thread_offset();
  state.reset();

  std::uint32_t last_valid = 0, v_chunks = 0;  // of the step whose K came last: which keys exist, and where the lane's V is
  const auto copy_k = [&](std::uint32_t slot) {
    last_valid = 0;
    if (next_key < range.end) {
      const int key = lane_key(next_key);
      const KeyLocation location = locate_key(plan, tile, key < range.begin ? INT_MAX : key, range.end, device::load_shared(entries));
      last_valid = __ballot_sync(kAllLanes, location.valid);
      const std::uint32_t entry = location.valid ? static_cast<std::uint32_t>(location.entry) : 0;
      const std::uint32_t token = location.valid ? static_cast<std::uint32_t>(location.slot) : 0;
      v_chunks = entry * plan.v_chunk_strides.x + token * plan.v_chunk_strides.y;
      copy_step<Types, kKeys>(view_of(k_view<Types>(p, plan, pair), p.k_head_stride),
                              entry * plan.k_chunk_strides.x + token * plan.k_chunk_strides.y, last_valid, slot);
      copy_entry(plan, tile, lane_key(next_key + kLead * stride), range.end, entries);
      entries += kKeys * 4;
      if (entries >= first_entries + Shape::kEntryBytes) entries -= Shape::kEntryBytes;
    }
    next_key += stride;
    return last_valid;
  };
  const auto copy_v = [&](std::uint32_t slot) {
    // Zeros for hidden keys, of a whole step too: their weight is 0, and what lies there may not be finite.
    const int key = next_key - stride;
    if (key >= first_key && key < range.end)
      copy_step<Types, kKeys>(view_of(v_view<Types>(p, plan, pair), p.v_head_stride), v_chunks, last_valid, slot);
  };

  // As in attend_to_stretches.
  std::uint32_t valid[kLead + 1] = {};
  std::uint32_t slot = 0;
#pragma unroll 1
  for (int round = -kLead;; ++round) {
    if (round == 0) {
      if (threadIdx.x >= Shape::kCtaThreads - kRows) {
        // As make_row_params, for one query that no mask is for.
        const int row = static_cast<int>(threadIdx.x) - (Shape::kCtaThreads - kRows);
        RowParams params{p.scale, 0.0f, tile.kv_len - 1, range.begin, range.end, 0, nullptr};
        if (p.k_scale != nullptr) params.scale *= p.k_scale[kv_head * p.k_scale_stride];
        if (p.alibi_slopes != nullptr) params.slope = p.alibi_slopes[kv_head * tile.num_rows + min(row, tile.num_rows - 1)] * kLog2E;
        row_params[row] = params;
      }
      if constexpr (Types::kQuantized) {
        __syncthreads();
        for (int row = warp; row < kRows; row += kCtaWarps) convert_q<Types, kHeadDim, 1>(plan, row, q_shared, row_params);
      }
      __syncthreads();
      score = make_score_scale<MmaState::kQueries>(p, row_params, MmaState::query);
      state.attach_q(device::shared_address(q_shared));
      device::cluster_wait();  // all CTAs have begun, so that their memory may be written; here that costs nothing
    }
    const int key = next_key - kLead * stride;
    if (round >= 0 && key >= range.end) break;
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
    if constexpr (kEven) {
      copy_v(v_address);
    } else {
      valid[kLead] = copy_k(v_address);
    }
    device::copy_async_commit();
#pragma unroll
    for (int i = 0; i < kLead; ++i) valid[i] = valid[i + 1];
  }
  device::copy_async_wait<0>();
  state.reduce_sum();
  __syncwarp();

  // Every warp leaves its sums in its own ring, and the CTA puts together those of the warps that had keys.
  const int steps = (range.end - first_key + kKeys - 1) / kKeys;
  const int num_warps = min(plan.cluster.quotient(max(steps - rank + size - 1, 0)), kCtaWarps);
  if (warp < num_warps) {
    if (lane < 4) {
#pragma unroll
      for (int i = 0; i < MmaState::kQueries; ++i)
        stats[warp][MmaState::query(i)] = float2{state.largest[i] * score.log2_scale[i], state.sum[i]};
    }
#pragma unroll
    for (int i = 0; i < MmaState::kQueries; ++i) {
      const int row = MmaState::query(i);
      if (row < tile.num_rows) {
        float* const target = reinterpret_cast<float*>(shared + warp * Shape::kRingBytes) + row * Shape::kOutPitch;
#pragma unroll
        for (int c = 0; c < MmaState::kSteps; ++c)
#pragma unroll
          for (int half = 0; half < 2; ++half) target[MmaState::column(c, half)] = state.out[c][i / 2][2 * half + i % 2];
      }
    }
  }
  __syncthreads();

  const int items_each = plan.cluster.quotient(num_items + size - 1);
  for (int i = static_cast<int>(threadIdx.x); i < num_items; i += Shape::kCtaThreads) {
    const int row = i / kItemsOfRow, column = i % kItemsOfRow * 4;
    Partial result{float4{0.0f, 0.0f, 0.0f, 0.0f}, -INFINITY, 0.0f};
#pragma unroll 4
    for (int w = 0; w < num_warps; ++w) result.top = fmaxf(result.top, stats[w][row].x);
    const float base = result.top == -INFINITY ? 0.0f : result.top;
#pragma unroll 4
    for (int w = 0; w < num_warps; ++w) {
      add_part(result, base,
               *reinterpret_cast<const float4*>(reinterpret_cast<const float*>(shared + w * Shape::kRingBytes) + row * Shape::kOutPitch +
                                                column),
               stats[w][row]);
    }
    const int index = plan.cluster.quotient(i), owner = plan.cluster.remainder(i, index);
    const int place = rank * items_each + index;
    const std::uint32_t mapped = device::address_in_cta(shared_base, owner);
    const std::uint32_t mapped_barrier = mapped + static_cast<std::uint32_t>(Shape::kBarrierOffset);
    device::cluster_store_16(mapped + static_cast<std::uint32_t>(Shape::kReceivedOffset + place * 16), mapped_barrier, result.value.x,
                             result.value.y, result.value.z, result.value.w);
    device::cluster_store_8(mapped + static_cast<std::uint32_t>(Shape::kReceivedStatsOffset + place * 8), mapped_barrier, result.top,
                            result.sum);
  }
  device::barrier_wait(barrier, 0);

  const auto* const received = reinterpret_cast<const float4*>(shared + Shape::kReceivedOffset);
  const auto* const received_stats = reinterpret_cast<const float2*>(shared + Shape::kReceivedStatsOffset);
  // Four lanes share the parts of an item.
  const int lane_part = lane / 8;
  for (int first = warp * 8; first < items_each; first += kCtaWarps * 8) {
    const int index = first + lane % 8;
    const int item = index * size + rank;
    const int row = item / kItemsOfRow, column = item % kItemsOfRow * 4;
    const bool exists = row < tile.num_rows;
    Partial result{float4{0.0f, 0.0f, 0.0f, 0.0f}, -INFINITY, 0.0f};
#pragma unroll 1
    for (int i = lane_part; i < size; i += 4)
      if (exists) result.top = fmaxf(result.top, received_stats[i * items_each + index].x);
    result.top = fmaxf(result.top, __shfl_xor_sync(kAllLanes, result.top, 8));
    result.top = fmaxf(result.top, __shfl_xor_sync(kAllLanes, result.top, 16));
    const float base = result.top == -INFINITY ? 0.0f : result.top;
#pragma unroll 1
    for (int i = lane_part; i < size; i += 4)
      if (exists) add_part(result, base, received[i * items_each + index], received_stats[i * items_each + index]);
#pragma unroll
    for (int lanes = 8; lanes < 32; lanes *= 2) {
      result.sum += __shfl_xor_sync(kAllLanes, result.sum, lanes);
      result.value.x += __shfl_xor_sync(kAllLanes, result.value.x, lanes);
      result.value.y += __shfl_xor_sync(kAllLanes, result.value.y, lanes);
      result.value.z += __shfl_xor_sync(kAllLanes, result.value.z, lanes);
      result.value.w += __shfl_xor_sync(kAllLanes, result.value.w, lanes);
    }
    if (exists && lane_part == 0) finish(plan, tile, pair, row, column, result);
  }
  return true;
}

#endif  // sm_90

}  // namespace quire::cuda::attn
