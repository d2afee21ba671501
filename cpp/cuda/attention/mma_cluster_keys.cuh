// Decode of few sequences: the CTAs of a cluster share a tile's keys and put their parts together through each other's shared memory.
// SPDX-License-Identifier: Apache-2.0
//
// Most of such a call's time is that of loads that wait for one another and of instructions that are in no cache. So nothing is planned: steps of
// keys are dealt to the warps of all CTAs in turn, whatever the length is, and a warp asks for its first table entries before it knows the length.
// The copy engine brings keys block by block. Where rows are short, two warps, a team, read two kv heads' keys together: memory gives longer pieces
// faster, and one box brings both, at one time.
#pragma once

#include "cuda/attention/mma_split_keys.cuh"
#include "cuda/device/cluster.cuh"
#include "cuda/device/dependent_launch.cuh"
#include "cuda/device/tma.cuh"

namespace quire::cuda::attn {

/// Of a CTA that is alone on its SM, for one sequence.
constexpr int kLoneWarps = 16;

/// Of kv heads of kHeadDim, kTeam of them to a tile, whatever attend_to_stretches takes. A team's warps have a head each of the same keys.
template <DType kKvDType, int kHeadDim, int kWarpsOfCta, int kTeam>
struct ClusterKeysShape {
  using Base = SplitKeysShape<kKvDType, kHeadDim, Variant::kMmaSplitKeys8, true, Pairing::kNone>;
  using Types = typename Base::Types;
  static constexpr int kRows = Base::kRows * kTeam;
  static constexpr int kKeys = Base::kKeys;
  using KvRows = PanelRows<Types::kKvRowBytes, kKeys, kTeam>;
  static constexpr int kTeamHeads = kTeam;
  static constexpr int kMaxBoxKeys = kTeam > 1 ? 16 : kKeys;  // 16 keys further on are as many rows, whatever boxes have
  static constexpr int kSlotBytes = kKeys * Types::kKvRowBytes;
  static constexpr int kTeamSlotBytes = kTeam * kSlotBytes;
  static constexpr int kSlots = Base::kRingBytes / kSlotBytes;
  static constexpr int kRingBytes = Base::kRingBytes;
  static constexpr int kOutPitch = Base::kOutPitch;
  static constexpr int kCtaWarps = kWarpsOfCta;
  static constexpr int kCtaThreads = 32 * kCtaWarps;
  static constexpr int kItems = kRows * kHeadDim / 4 + kMaxCluster;  // of four columns, that a CTA receives at most
  static constexpr int kQOffset = kCtaWarps * kRingBytes;
  // From every CTA, items of this one: values and their softmax terms. They come where q was.
  static constexpr int kReceivedOffset = kQOffset;
  static constexpr int kReceivedStatsOffset = kReceivedOffset + kItems * static_cast<int>(sizeof(float4));
  static constexpr int kStatsOffset = kReceivedStatsOffset + kItems * static_cast<int>(sizeof(float2));
  static_assert(kStatsOffset - kQOffset >= kRows * Types::kQRowBytes);
  static constexpr int kRowParamsOffset = kStatsOffset + kCtaWarps * Base::kRows * static_cast<int>(sizeof(float2));
  static constexpr int kBarrierOffset = kRowParamsOffset + kRows * static_cast<int>(sizeof(RowParams));
  static constexpr int kSlotBarriersOffset = kBarrierOffset + 8;  // of each warp, one for each slot
  static constexpr int kCountersOffset = kSlotBarriersOffset + kCtaWarps * kSlots * 8;
  static constexpr int kBoxesOffset = (kCountersOffset + kCtaWarps * kSlots * 4 + 7) / 8 * 8;  // of each warp, 32: slot and block
  static constexpr int kSharedBytes = kBoxesOffset + kCtaWarps * 32 * 8;
  static_assert(kBarrierOffset % 8 == 0);
  static_assert(Base::kRows * kOutPitch * 4 <= kRingBytes && kSlotBytes % 1024 == 0);
  /// Of an item of four columns that goes to another CTA: the columns and their softmax terms.
  static constexpr int kItemBytes = static_cast<int>(sizeof(float4) + sizeof(float2));
};

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

/// A tile's keys, for BoxStream: steps are dealt to the teams of all CTAs in turn.
struct TileKeys {
  const Plan& plan;
  int tile_seq, first_head, step_stride;
  KeyRange range;

  __device__ __forceinline__ int begin() const { return range.begin; }
  __device__ __forceinline__ int end() const { return range.end; }
  __device__ __forceinline__ int seq() const { return tile_seq; }
  __device__ __forceinline__ int head() const { return first_head; }
  __device__ __forceinline__ int stride() const { return step_stride; }
  __device__ __forceinline__ bool read_once() const { return end() <= plan.read_once_keys; }
};

/// The same with the range in shared memory, in a row's parameters, since the loop has no registers to spare.
struct LoopKeys {
  const Plan& plan;
  int tile_seq, first_head, step_stride;
  std::uint32_t row_params;

  __device__ __forceinline__ int at(std::size_t offset) const {
    return device::load_shared(row_params + static_cast<std::uint32_t>(offset));
  }
  __device__ __forceinline__ int begin() const { return at(offsetof(RowParams, begin)); }
  __device__ __forceinline__ int end() const { return at(offsetof(RowParams, end)); }
  __device__ __forceinline__ int seq() const { return tile_seq; }
  __device__ __forceinline__ int head() const { return first_head; }
  __device__ __forceinline__ int stride() const { return step_stride; }
  __device__ __forceinline__ bool read_once() const { return end() <= plan.read_once_keys; }
};

/// A tile to a cluster of plan.cluster CTAs: a query of each sequence, and a group of up to 8 heads. False if the lengths are too different; then
/// nothing has been done.
template <DType kKvDType, int kHeadDim, int kWarpsOfCta, bool kInPairs, int kTeam>
__device__ __forceinline__ bool attend_in_clusters(const Plan& plan, const KeyMaps& maps) {
  using Types = MmaTypes<kKvDType, kHeadDim>;
  using Shape = ClusterKeysShape<kKvDType, kHeadDim, kWarpsOfCta, kTeam>;
  constexpr int kTeams = Shape::kCtaWarps / kTeam;
  constexpr int kRows = Shape::kRows;
  constexpr int kKeys = Shape::kKeys;
  constexpr int kSlots = Shape::kSlots;
  constexpr int kCtaWarps = Shape::kCtaWarps;
  using KvRows = typename Shape::KvRows;
  extern __shared__ __align__(1024) char shared[];
  const AttentionParams& p = plan.params;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const auto size = static_cast<int>(plan.cluster.divisor);
  const int tile_idx = plan.cluster.quotient(static_cast<int>(blockIdx.x));
  const int rank = plan.cluster.remainder(static_cast<int>(blockIdx.x), tile_idx);

  char* const q_shared = shared + Shape::kQOffset;
  auto* const row_params = reinterpret_cast<RowParams*>(shared + Shape::kRowParamsOffset);
  auto& stats = *reinterpret_cast<float2(*)[kCtaWarps][8]>(shared + Shape::kStatsOffset);
  const std::uint32_t shared_base = device::shared_address(shared);
  const int team = warp / kTeam, member = warp % kTeam;

  // If kInPairs, a kv head of the plan is two here, and rows of the second follow the first's.
  constexpr bool kOneByOne = kInPairs && kTeam == 1;
  static_assert(kTeam == 1 || kInPairs);
  const int pair_idx = kOneByOne ? tile_idx / 2 : tile_idx;
  Tile tile{};
  tile.seq = tile.first_token = plan.kv_heads.quotient(pair_idx);
  const int pair = plan.kv_heads.remainder(pair_idx, tile.seq);
  const int kv_head = kOneByOne ? 2 * pair + tile_idx % 2 : pair * kTeam;  // the first
  const auto group = static_cast<int>(plan.kv_group.divisor);
  tile.query_len = 1;
  tile.num_rows = group * kTeam;
  tile.row_begin = kOneByOne ? tile_idx % 2 * group : 0;
  const int first_row = member * group;  // of the warp's

  BoxStream<Shape> stream(plan, maps, shared);
  // What the other CTAs send here at the end is counted at a barrier, which they may use when all have arrived below.
  constexpr int kItemsOfRow = kHeadDim / 4;
  const int num_items = tile.num_rows * kItemsOfRow;  // of four columns of a row; CTA r puts the items r, r + size, ... together
  const std::uint32_t barrier = shared_base + static_cast<std::uint32_t>(Shape::kBarrierOffset);
  if (lane == 0) {
    if (member == 0) stream.init();
    if (warp == 1) device::prefetch_tensor_map(&maps.k);
    if (warp == 2) device::prefetch_tensor_map(&maps.v);
    device::barrier_init_fence();
  }
  __syncwarp();
  device::wait_for_predecessor();

  // What needs no other load's result comes first: the lanes' boxes, of the warp's first steps, and q. 32 boxes are some steps', or one's.
  const std::int32_t seq_len = p.seq_lens[tile.seq];
  const int stride = size * kTeams * kKeys;
  int lane_entry = stream.start(tile.seq, stride, (team * size + rank) * kKeys, plan.key_capacity);
  using QRows = Rows<Types::kQRowBytes>;
  static_assert(kRows * QRows::kChunks <= Shape::kCtaThreads);
  if (static_cast<int>(threadIdx.x) < kRows * QRows::kChunks) {
    const int row = static_cast<int>(threadIdx.x) / QRows::kChunks, chunk = static_cast<int>(threadIdx.x) % QRows::kChunks;
    const bool exists = row < tile.num_rows && chunk * 8 < p.head_dim;
    const std::int64_t head = kv_head * group + row;
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
      if (lane == 0 && member == 0) stream.invalidate();
      __syncthreads();
      return false;
    }
  }
  if (threadIdx.x == 0) {
    device::barrier_init(barrier, 1);
    device::barrier_init_fence();
    device::barrier_arrive_expect(barrier, plan.cluster.quotient(num_items - rank + size - 1) * (size - 1) * Shape::kItemBytes);
  }

  tile.kv_len = min(max(seq_len, 0), plan.key_capacity);
  if (tile.kv_len != seq_len && rank == 0 && kv_head == 0 && threadIdx.x == 0)
    record_error(plan.error_word, plan.op, ArgId::kSeqLens, tile.seq, seq_len);
  const KeyRange range = visible_keys(p, tile, 0);
  const int first_key = range.begin / kKeys * kKeys;
  if (first_key > 0) lane_entry = stream.start(tile.seq, stride, first_key + (team * size + rank) * kKeys, range.end);

  using MmaState = MmaColumns<kKvDType, kHeadDim, 1, false, KvRows>;
  MmaState state;
  typename MmaState::Scale score;
  const std::uint32_t k_offset = KvRows::address(0, KvRows::row(lane % 16, member, maps.box_shift), lane / 16);
  const std::uint32_t v_offset =
      Types::kQuantized ? k_offset : KvRows::address(0, KvRows::row(lane / 16 * 8 + lane % 8, member, maps.box_shift), lane / 8 % 2);
  state.reset();

  stream.fill(TileKeys{plan, tile.seq, kv_head, stride, range}, lane_entry);

  if (threadIdx.x >= Shape::kCtaThreads - kRows) {
    // As make_row_params, for one query that no mask is for.
    const int row = static_cast<int>(threadIdx.x) - (Shape::kCtaThreads - kRows);
    RowParams params{p.scale, 0.0f, tile.kv_len - 1, range.begin, range.end, 0, nullptr};
    const int head = kv_head * group + min(row, tile.num_rows - 1);
    if (p.k_scale != nullptr) params.scale *= p.k_scale[plan.kv_group.quotient(head) * p.k_scale_stride];
    if (p.alibi_slopes != nullptr) params.slope = p.alibi_slopes[head] * kLog2E;
    row_params[row] = params;
  }
  device::copy_async_wait<0>();
  if constexpr (Types::kQuantized) {
    __syncthreads();
    for (int row = warp; row < kRows; row += kCtaWarps) convert_q<Types, kHeadDim, 1>(plan, row, q_shared, row_params);
  }
  __syncthreads();
  const RowParams* const warp_row_params = row_params + first_row;
  score = make_score_scale<MmaState::kQueries>(p, warp_row_params, MmaState::query);
  static_assert(MmaState::kQInRegisters);
  state.attach_q(device::shared_address(q_shared), first_row);
  __syncwarp();
  device::cluster_arrive();  // others may write where q was

  const LoopKeys keys{plan, tile.seq, kv_head, stride, shared_base + static_cast<std::uint32_t>(Shape::kRowParamsOffset)};
  std::uint32_t slot = 0;
#pragma unroll 1
  for (;;) {
    const int key = stream.key(keys);
    if (key >= keys.end()) break;
    const std::uint32_t k_slot = slot, v_slot = slot + 1 == kSlots ? 0 : slot + 1;
    slot = v_slot + 1 == kSlots ? 0 : v_slot + 1;
    const bool inner = key >= keys.begin() && key + kKeys <= keys.end();

    float scores[kKeys / 16][1][4];
    stream.wait(k_slot);
    state.template multiply_qk<kKeys>(scores, stream.slot_address(k_slot) + k_offset);

    stream.refill_k(keys, k_slot);

    if (score.transform) state.template transform_scores<kKeys>(scores, warp_row_params, p.softcap, key);
    if (!inner || !stream.complete) {
      // Some keys' blocks may not exist.
      const std::uint32_t valid = stream.complete ? kAllLanes : stream.valid_keys(keys, key);
      state.template mask_scores<kKeys>(scores, warp_row_params, key, valid);
    }
    state.template softmax<kKeys>(scores, score);

    stream.wait(v_slot);
    if (!inner) stream.hide_values(keys, key, v_slot);
    state.template multiply_pv<kKeys>(scores, stream.slot_address(v_slot) + v_offset);

    stream.refill_v(keys, v_slot);
  }
  state.reduce_sum();
  __syncwarp();

  // Every warp leaves its sums in the team's ring, and the CTA puts together those of the warps that had keys.
  if constexpr (kTeam > 1) __syncthreads();
  const int steps = (range.end - first_key + kKeys - 1) / kKeys;
  const int num_teams = min(plan.cluster.quotient(max(steps - rank + size - 1, 0)), kTeams);
  if (team < num_teams) {
    if (lane < 4) {
#pragma unroll
      for (int i = 0; i < MmaState::kQueries; ++i)
        stats[warp][MmaState::query(i)] = float2{state.largest[i] * score.log2_scale[i], state.sum[i]};
    }
#pragma unroll
    for (int i = 0; i < MmaState::kQueries; ++i) {
      const int row = MmaState::query(i);
      if (row < group) {
        float* const target = reinterpret_cast<float*>(shared + warp * Shape::kRingBytes) + row * Shape::kOutPitch;
#pragma unroll
        for (int c = 0; c < MmaState::kSteps; ++c)
#pragma unroll
          for (int half = 0; half < 2; ++half) target[MmaState::column(c, half)] = state.out[c][i / 2][2 * half + i % 2];
      }
    }
  }
  __syncthreads();

  device::cluster_wait();  // all have come so far that their memory may be written
  const int items_each = plan.cluster.quotient(num_items + size - 1);
  auto* const received = reinterpret_cast<float4*>(shared + Shape::kReceivedOffset);
  auto* const received_stats = reinterpret_cast<float2*>(shared + Shape::kReceivedStatsOffset);
  for (int i = static_cast<int>(threadIdx.x); i < num_items; i += Shape::kCtaThreads) {
    const int row = i / kItemsOfRow, column = i % kItemsOfRow * 4;
    const int of = kTeam > 1 && row >= group ? 1 : 0, own_row = row - of * group;
    static_assert(kTeam <= 2);
    const int end = num_teams * kTeam;
    Partial result{float4{0.0f, 0.0f, 0.0f, 0.0f}, -INFINITY, 0.0f};
#pragma unroll 4
    for (int w = of; w < end; w += kTeam) result.top = fmaxf(result.top, stats[w][own_row].x);
    const float base = result.top == -INFINITY ? 0.0f : result.top;
#pragma unroll 4
    for (int w = of; w < end; w += kTeam) {
      add_part(result, base,
               *reinterpret_cast<const float4*>(reinterpret_cast<const float*>(shared + w * Shape::kRingBytes) +
                                                own_row * Shape::kOutPitch + column),
               stats[w][own_row]);
    }
    const int index = plan.cluster.quotient(i), owner = plan.cluster.remainder(i, index);
    const int place = rank * items_each + index;
    if (owner == rank) {
      received[place] = result.value;
      received_stats[place] = float2{result.top, result.sum};
      continue;
    }
    const std::uint32_t mapped = device::address_in_cta(shared_base, owner);
    const std::uint32_t mapped_barrier = mapped + static_cast<std::uint32_t>(Shape::kBarrierOffset);
    device::cluster_store_16(mapped + static_cast<std::uint32_t>(Shape::kReceivedOffset + place * 16), mapped_barrier, result.value.x,
                             result.value.y, result.value.z, result.value.w);
    device::cluster_store_8(mapped + static_cast<std::uint32_t>(Shape::kReceivedStatsOffset + place * 8), mapped_barrier, result.top,
                            result.sum);
  }
  __syncthreads();  // the CTA's own items
  device::barrier_wait(barrier, 0);

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
