// Batch-invariant decode where lengths are alike: a tile to a CTA, or to the CTAs of a cluster, each of which has some of its parts.
// SPDX-License-Identifier: Apache-2.0
//
// What attend_to_stretches computes, bit by bit: the same warps have the same keys of a part, and their sums are folded in the same order. But the
// copy engine brings keys, as in attend_in_clusters, and no warp waits for all others at a part's end: a part's sums go from warp to warp.
#pragma once

#include <algorithm>

#include "cuda/attention/mma_cluster_keys.cuh"

namespace quire::cuda::attn {

/// No tile is left to do.
constexpr int kNothing = -1;

/// What a CTA has of a tile, in shared memory.
struct PartsRun {
  int more;  // 0: nothing is left
  int tile_idx, next_tile;
  int seq, kv_head;  // the first one of a pair
  int kv_len;
  int begin, end;  // keys that the query sees
  int tile_first, tile_last;  // parts of the tile, and of the CTA
  int first, last;
  int run_end;  // of the CTA's keys
  int few;  // 1: with up to 4 rows of a kv head half of the lanes have any, and there is room for the tile's beginning as well
};

/// Of a CTA of attend_to_parts. Rows of up to 128 bytes are two kv heads', as memory gives longer pieces faster: of 64 bytes every warp takes one
/// head after the other, else two warps, a team, have one each, at the same keys. A head's warps are four in any case.
template <DType kKvDType, int kHeadDim>
struct PartsShape {
  using Base = SplitKeysShape<kKvDType, kHeadDim, Variant::kMmaSplitKeys8, false, Pairing::kNone>;
  using Types = typename Base::Types;
  static constexpr int kTeamHeads = heads_of_parts(Types::kKvRowBytes);
  static constexpr int kTeam = warps_of_parts(Types::kKvRowBytes);
  static constexpr int kHeadsOfWarp = kTeamHeads / kTeam;
  static constexpr int kCtaWarps = kWarps * kTeam;
  static constexpr int kCtaThreads = 32 * kCtaWarps;
  static constexpr int kCtasPerSm = Base::kCtasPerSm / kTeam;
  static constexpr int kRows = Base::kRows * kTeamHeads;
  static constexpr int kKeys = Base::kKeys;
  using KvRows = PanelRows<Types::kKvRowBytes, kKeys, kTeamHeads>;
  static constexpr int kMaxBoxKeys = kTeamHeads > 1 ? 16 : kKeys;
  static constexpr int kSlotBytes = kKeys * Types::kKvRowBytes * kTeamHeads;
  static constexpr int kRingBytes = Base::kRingBytes * kTeam;
  static constexpr int kSlots = kRingBytes / kSlotBytes;
  static constexpr int kSteps = kHeadDim / 16;
  static constexpr int kItems = kSteps * 32;  // of four sums, a lane's of 16 columns; of a kv head
  static constexpr int kQOffset = kWarps * kRingBytes;
  static constexpr int kSumsOffset = kQOffset + kRows * Types::kQRowBytes;
  static constexpr int kStatsOffset = kSumsOffset + kTeamHeads * kItems * 16;  // {top, sum} of two queries, a quad's
  static constexpr int kRowParamsOffset = kStatsOffset + kTeamHeads * 4 * 16;
  static constexpr int kBarriersOffset = kRowParamsOffset + kRows * static_cast<int>(sizeof(RowParams));  // of each team, one for each slot
  static constexpr int kTurnsOffset = kBarriersOffset + kWarps * kSlots * 8;  // whether a warp has passed a part's sums on
  static constexpr int kCountersOffset = kTurnsOffset + kCtaWarps * 8;  // of each team, of warps that are done with a slot
  static constexpr int kBoxesOffset =
      (kCountersOffset + (kTeam > 1 ? kWarps * kSlots * 4 : 0) + 15) / 16 * 16;  // of each warp, 32: slot and block
  static constexpr int kTileStatsOffset = kBoxesOffset;  // as those of a part, when boxes are done with
  static constexpr int kRunOffset = kBoxesOffset + kCtaWarps * 32 * 8;
  static constexpr int kSharedBytes = kRunOffset + static_cast<int>(sizeof(PartsRun));
  // A CTA of several heads' warps is as many for attend_to_stretches, whose tiles are one head's.
  static constexpr int kLaunchedBytes = std::max(kSharedBytes, kTeam* Base::kAlignedBytes);
  static_assert(kRunOffset >= Base::kSharedBytes, "what is left to do stays there while attend_to_stretches has one tile");
  static_assert(kSlotBytes % 1024 == 0 && kSlots % 2 == 1 && kBarriersOffset % 8 == 0);
};

/// The CTA likewise (see lane_here).
__device__ __forceinline__ int cta_here() {
  unsigned cta;
  asm volatile("mov.u32 %0, %%ctaid.x;\n" : "=r"(cta));
  return static_cast<int>(cta);
}

/// Whether queries stay in registers: at head_dim 128 the loop has too few.
template <int kHeadDim>
constexpr bool kKeepsQ = kHeadDim != 128;

#if __CUDA_ARCH__ >= 900

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

/// What fold() does, for a lane's sums of two queries: `a` comes first, and the result is in `b`. Stats are {top, sum} of either.
struct FoldFactors {
  float of_a[2], of_b[2];
};
__device__ __forceinline__ FoldFactors fold_stats(float4 a, float4& b) {
  FoldFactors factors;
  const auto one = [](float top_a, float sum_a, float& top_b, float& sum_b, float& of_a, float& of_b) {
    const float top = fmaxf(top_a, top_b);
    const float base = top == -INFINITY ? 0.0f : top;
    of_a = device::exp2_approx(top_a - base), of_b = device::exp2_approx(top_b - base);
    sum_b = __fmaf_rn(sum_b, of_b, __fmul_rn(sum_a, of_a));
    top_b = top;
  };
  one(a.x, a.y, b.x, b.y, factors.of_a[0], factors.of_b[0]);
  one(a.z, a.w, b.z, b.w, factors.of_a[1], factors.of_b[1]);
  return factors;
}
__device__ __forceinline__ void fold_sums(float4 a, const FoldFactors& factors, float& x, float& y, float& z, float& w) {
  x = __fmaf_rn(x, factors.of_b[0], __fmul_rn(a.x, factors.of_a[0]));
  y = __fmaf_rn(y, factors.of_b[1], __fmul_rn(a.y, factors.of_a[1]));
  z = __fmaf_rn(z, factors.of_b[0], __fmul_rn(a.z, factors.of_a[0]));
  w = __fmaf_rn(w, factors.of_b[1], __fmul_rn(a.w, factors.of_a[1]));
}

__device__ __forceinline__ bool is_finite(const Partial& partial) {
  // A key that is not finite makes sums NaN, V that is not, a column.
  const float probe = fmaf(partial.sum, 0.0f, partial.value.x * 0.0f) + fmaf(partial.value.y, 0.0f, partial.value.z * 0.0f);
  return fmaf(partial.value.w, 0.0f, probe) == 0.0f;
}

/// Queries one to a sequence, groups of up to 8 heads, no mask. The cluster's first tile, of all kv heads or pairs, is that of its number; tiles that
/// come after that, if they are more than CTAs, go to whoever is ready for one. Returns a tile in which something is not finite, and goes on behind
/// it when called again, `resumes`: what infinity in hidden values does is attend_to_stretches's to say.
template <DType kKvDType, int kHeadDim>
__device__ __forceinline__ int attend_to_parts(const Plan& plan, const KeyMaps& maps, bool resumes) {
  using Shape = PartsShape<kKvDType, kHeadDim>;
  using Types = typename Shape::Types;
  using KvRows = typename Shape::KvRows;
  constexpr int kHeads = Shape::kTeamHeads;
  constexpr int kTeam = Shape::kTeam, kHeadsOfWarp = Shape::kHeadsOfWarp;
  constexpr int kKeys = Shape::kKeys;
  constexpr int kSlots = Shape::kSlots;
  constexpr int kSteps = Shape::kSteps;
  constexpr int kItems = Shape::kItems;
  constexpr int kStride = kWarps * kKeys;
  static_assert(512 % kStride == 0, "the next part's steps are the next in turn");
  extern __shared__ __align__(1024) char shared[];
  const AttentionParams& p = plan.params;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int team = warp / kTeam, member = warp % kTeam;  // which of a head's warps it is, and its first head
  const auto group = static_cast<int>(plan.kv_group.divisor);
  char* const q_shared = shared + Shape::kQOffset;
  auto* const row_params = reinterpret_cast<RowParams*>(shared + Shape::kRowParamsOffset);
  auto& part_sums = *reinterpret_cast<float4(*)[kHeads][kItems]>(shared + Shape::kSumsOffset);
  auto& part_stats = *reinterpret_cast<float4(*)[kHeads][4]>(shared + Shape::kStatsOffset);
  auto& tile_stats = *reinterpret_cast<float4(*)[kHeads][4]>(shared + Shape::kTileStatsOffset);
  PartsRun& own = *reinterpret_cast<PartsRun*>(shared + Shape::kRunOffset);
  const std::uint32_t shared_base = device::shared_address(shared);
  // What the loop seldom needs is read again, as it has no registers to spare.
  const auto run = [&](int PartsRun::* member) {
    return device::load_shared(
        shared_base + static_cast<std::uint32_t>(Shape::kRunOffset) +
        static_cast<std::uint32_t>(reinterpret_cast<const char*>(&(own.*member)) - reinterpret_cast<const char*>(&own)));
  };
  const auto ring = [&] { return shared_base + static_cast<std::uint32_t>(thread_here() / (32 * kTeam) * Shape::kRingBytes); };
  const auto barriers = [&] {
    return shared_base + static_cast<std::uint32_t>(Shape::kBarriersOffset + thread_here() / (32 * kTeam) * (kSlots * 8));
  };
  const auto turns = [&](int of_team) {
    return shared_base + static_cast<std::uint32_t>(Shape::kTurnsOffset + (of_team * kTeam + thread_here() / 32 % kTeam) * 8);
  };
  [[maybe_unused]] auto* const counters = reinterpret_cast<unsigned*>(shared + Shape::kCountersOffset);
  const auto boxes = [&] { return shared_base + static_cast<std::uint32_t>(Shape::kBoxesOffset + thread_here() / 32 * 256); };
  const auto rank_of_cluster = [&] {
    const auto cta = static_cast<int>(blockIdx.x);
    return plan.cluster.remainder(cta, plan.cluster.quotient(cta));
  };
  // Partial results, of this kernel alone, lie as lanes have them.
  const auto partial_sums = [&](int cta, int slot) {
    return reinterpret_cast<float4*>(plan.partial_out) +
           (static_cast<std::int64_t>(cta) * (plan.slots_per_cta * kTeam) + slot) * (plan.tile_rows * p.head_dim / 4);
  };
  const auto partial_stats = [&](int cta, int slot) {
    return reinterpret_cast<float4*>(plan.partial_stats) +
           (static_cast<std::int64_t>(cta) * (plan.slots_per_cta * kTeam) + slot) * (plan.tile_rows / 2);
  };
  const auto slot_of_beginning = [&](int h) { return plan.slots_per_cta * kTeam - kHeads + h; };
  const bool few = group <= 4;
  const auto place_of = [&](int c, int of_lane) { return few ? c * 16 + of_lane / 4 * 2 + of_lane % 2 : c * 32 + of_lane; };
  const auto used_steps = [&] { return static_cast<int>(p.head_dim) / 16; };

  if (lane == 0) {
    if (member == 0) {
#pragma unroll
      for (int i = 0; i < kSlots; ++i) device::barrier_init(barriers() + i * 8, 1);
      if constexpr (kTeam > 1) {
#pragma unroll
        for (int i = 0; i < kSlots; ++i) counters[team * kSlots + i] = 0;
      }
    }
    device::barrier_init(turns(team), 32);
    device::barrier_init_fence();
  }
  if (!resumes && threadIdx.x == 0) own.next_tile = plan.cluster.quotient(static_cast<int>(blockIdx.x));
  // What another kernel's code left in the rings is done with before boxes come.
  device::fence_async_proxy();
  std::uint32_t slot = 0, parities = 0, turn = 0;

#pragma unroll 1
  for (;;) {
    if (threadIdx.x == 0) {
      const int num_tiles = static_cast<int>(p.num_seqs) * (static_cast<int>(plan.kv_heads.divisor) / kHeads);
      const int head_idx = own.next_tile * kHeads;
      own.tile_idx = own.next_tile;
      own.next_tile = num_tiles;
      own.more = own.tile_idx < num_tiles;
      if (own.more) {
        const int rank = rank_of_cluster();
        Tile tile{};
        tile.seq = plan.kv_heads.quotient(head_idx);
        tile.query_len = 1;
        own.seq = tile.seq;
        own.kv_head = plan.kv_heads.remainder(head_idx, tile.seq);
        own.kv_len = tile.kv_len = sequence_keys(plan, tile.seq, rank == 0 && own.kv_head == 0);
        KeyRange range = visible_keys(p, tile, 0);
        if (range.end <= range.begin) range.begin = range.end = 0;
        own.begin = range.begin, own.end = range.end;
        own.tile_first = part_of(range.begin);
        own.tile_last = range.end == 0 ? own.tile_first + 1 : part_of(range.end - 1) + 1;
        own.first = first_part(plan.cluster, rank, range, own.tile_first, own.tile_last);
        own.last = first_part(plan.cluster, rank + 1, range, own.tile_first, own.tile_last);
      }
      own.few = few ? 1 : 0;
      own.run_end = own.last == own.tile_last ? own.end : part_begin(own.last);
    }
    __syncthreads();
    if (run(&PartsRun::more) == 0) return kNothing;

    // A lane has a box's place; see attend_in_clusters.
    const int box_shift = maps.box_shift;
    constexpr int kKeysShift = kKeys == 32 ? 5 : 4;
    static_assert(kKeys == 1 << kKeysShift);
    const int boxes_shift = kKeysShift - box_shift;  // of a step
    const auto lane_offset = [&] {
      const int i = lane_here();
      return (i >> boxes_shift) * kStride + ((i & ((1 << boxes_shift) - 1)) << box_shift);
    };
    const int lanes_stride = (32 >> boxes_shift) * kStride;
    int next_key = part_begin(run(&PartsRun::first)) + team * kKeys;  // of the step whose boxes come next
    const auto entry_of = [&](int key) {
      return key < run(&PartsRun::run_end) ? p.block_tables[run(&PartsRun::seq) * p.block_tables_stride + plan.block_size.quotient(key)]
                                           : -1;
    };
    bool complete = true;  // whether all blocks so far exist
    std::uint32_t box = 0;  // where the step's first box is, from the warp's first
    const auto place_box = [&](int key, int entry) {
      const int block = plan.block_size.quotient(key);
      const bool wanted = key < run(&PartsRun::run_end) && key + (1 << box_shift) > run(&PartsRun::begin);
      const bool valid = entry >= 0 && entry < p.num_blocks;
      if (wanted && !valid && entry != -1)
        record_error(plan.error_word, plan.op, ArgId::kBlockTables, run(&PartsRun::seq) * p.max_blocks_per_seq + block, entry);
      complete &= __all_sync(kAllLanes, valid || !wanted);
      device::store_shared_8(boxes() + static_cast<std::uint32_t>(lane_here() * 8),
                             int2{plan.block_size.remainder(key, block), valid && wanted ? entry : -1});
      __syncwarp();
    };
    const int begin = run(&PartsRun::begin), run_end = run(&PartsRun::run_end);
    const auto copy_boxes = [&](const CUtensorMap& map, std::uint32_t of_slot) {
      if (next_key >= run_end) return;
      if (device::elect_lane()) {
        const std::uint64_t policy = run(&PartsRun::end) <= plan.read_once_keys ? device::read_once_policy() : device::usual_policy();
        const int kv_head = run(&PartsRun::kv_head);
        std::uint32_t target = ring() + of_slot * Shape::kSlotBytes, source = boxes() + box;
        const std::uint32_t slot_barrier = barriers() + of_slot * 8, end = target + KvRows::kPanelBytes;
        device::barrier_arrive_expect(slot_barrier, Shape::kSlotBytes);
#pragma unroll 1
        do {
          const int2 place = device::load_shared_8(source);
#pragma unroll
          for (int panel = 0; panel < KvRows::kPanels; ++panel)
            device::copy_box_by(target + static_cast<std::uint32_t>(panel * KvRows::kPanelBytes), &map, slot_barrier,
                                panel * KvRows::kPanelRowBytes / Types::kElementBytes, place.x, kv_head, place.y, policy);
          source += 8, target += static_cast<std::uint32_t>(kHeads * KvRows::kPanelRowBytes) << box_shift;
        } while (target < end);
      }
      __syncwarp();
    };
    int next_entry;
    {
      const int lane_key = next_key + lane_offset();
      const int lane_entry = entry_of(lane_key);
      next_entry = entry_of(lane_key + lanes_stride);

      const int kv_head = run(&PartsRun::kv_head), seq = run(&PartsRun::seq);
      using QRows = Rows<Types::kQRowBytes>;
#pragma unroll 1
      for (int i = thread_here(); i < Shape::kRows * QRows::kChunks; i += Shape::kCtaThreads) {
        const int row = i / QRows::kChunks, chunk = i % QRows::kChunks;
        const bool exists = row % 8 < group && chunk * 8 < p.head_dim;
        const std::int64_t head = (kv_head + row / 8) * group + row % 8;
        const char* const source = static_cast<const char*>(p.q) + (seq * p.q_token_stride + head * p.q_head_stride) * 2 + chunk * 16;
        device::copy_async_16_if(QRows::address(device::shared_address(q_shared), row, chunk),
                                 exists ? source : static_cast<const char*>(p.q), exists);
      }
      device::copy_async_commit();
      place_box(lane_key, lane_entry);
    }
    const auto next_step = [&] {
      next_key += kStride;
      box += 8u << boxes_shift;
      if (box < 256) return;
      box = 0;
      const int key = next_key + lane_offset();
      place_box(key, next_entry);
      next_entry = entry_of(key + lanes_stride);
    };
    {
      std::uint32_t of_slot = slot;
#pragma unroll
      for (int i = 0; i < kSlots; ++i) {
        if (member == 0) copy_boxes(i % 2 == 0 ? maps.k : maps.v, of_slot);
        of_slot = of_slot + 1 == kSlots ? 0 : of_slot + 1;
        if (i % 2 != 0) next_step();
      }
      Tile tile{};
      tile.seq = tile.first_token = run(&PartsRun::seq);
      tile.query_len = 1;
      tile.num_rows = group;
      tile.kv_len = run(&PartsRun::kv_len);
      if (threadIdx.x == 0 && plan.tiles_per_cta > 1)
        own.next_tile = take_ticket(plan, static_cast<int>(p.num_seqs) * (static_cast<int>(plan.kv_heads.divisor) / kHeads),
                                    static_cast<int>(gridDim.x));
      if (threadIdx.x >= Shape::kCtaThreads - Shape::kRows) {
        const int row = static_cast<int>(threadIdx.x) - (Shape::kCtaThreads - Shape::kRows);
        row_params[row] = make_row_params(plan, tile, run(&PartsRun::kv_head) + row / 8, row % 8);
      }
      device::copy_async_wait<0>();
      if constexpr (Types::kQuantized) {
        __syncthreads();
        for (int row = warp; row < Shape::kRows; row += Shape::kCtaWarps) convert_q<Types, kHeadDim, 1>(plan, row, q_shared, row_params);
      }
      __syncthreads();
    }

    using MmaState = MmaColumns<kKvDType, kHeadDim, 1, false, KvRows, kKeepsQ<kHeadDim>>;
    MmaState state[kHeadsOfWarp];
    typename MmaState::Scale score[kHeadsOfWarp];
    const RowParams* const warp_row_params = row_params + 8 * member;
#pragma unroll
    for (int h = 0; h < kHeadsOfWarp; ++h) {
      score[h] = make_score_scale<MmaState::kQueries>(p, warp_row_params + 8 * h, MmaState::query);
      state[h].attach_q(device::shared_address(q_shared), 8 * (member + h));
    }
    const auto k_offset = [&](int h) { return KvRows::address(0, KvRows::row(lane_here() % 16, member + h, box_shift), lane_here() / 16); };
    const auto v_offset = [&](int h) {
      const int l = lane_here();
      return Types::kQuantized ? KvRows::address(0, KvRows::row(l % 16, member + h, box_shift), l / 16)
                               : KvRows::address(0, KvRows::row(l / 16 * 8 + l % 8, member + h, box_shift), l / 8 % 2);
    };
    const auto wait_for_slot = [&](std::uint32_t of) {
      device::barrier_wait(barriers() + of * 8, parities >> of & 1u);
      parities ^= 1u << of;
    };

    // Whether the other warps of the team are done with a slot, too: the last one fills it again (see attend_in_clusters).
    const auto is_last_of_team = [&](std::uint32_t of) {
      if constexpr (kTeam == 1) return true;
      unsigned before = 0;
      if (lane_here() == 0) before = atomicAdd(counters + thread_here() / (32 * kTeam) * kSlots + of, 1u);
      return (__shfl_sync(kAllLanes, before, 0) + 1) % kTeam == 0;
    };

    // A part's sums go from warp to warp, each of which folds its own behind them; the last one folds the part behind those before it, or leaves it.
    const auto pass_on = [&](int part) {
      // All is found anew here, so that the loop over steps keeps nothing of it.
      const int quad = lane_here() % 4, own_team = thread_here() / (32 * kTeam), own_member = thread_here() / 32 % kTeam;
      const bool few = run(&PartsRun::few) != 0;
      const int width = few ? 16 : 32, place = few ? lane_here() / 4 * 2 + quad % 2 : lane_here();
      float4 stats[kHeadsOfWarp];
#pragma unroll
      for (int h = 0; h < kHeadsOfWarp; ++h) {
        state[h].reduce_sum();
        stats[h] = float4{__fmul_rn(state[h].largest[0], score[h].log2_scale[0]), state[h].sum[0],
                          __fmul_rn(state[h].largest[1], score[h].log2_scale[1]), state[h].sum[1]};
      }
      const auto fold_behind = [&](int h, const float4* sums, int width, float4 of_sums, int steps) {
        const FoldFactors factors = fold_stats(of_sums, stats[h]);
#pragma unroll
        for (int c = 0; c < kSteps; ++c)
          if (c < steps) {
            float (&out)[4] = state[h].out[c][0];
            fold_sums(sums[c * width], factors, out[0], out[1], out[2], out[3]);
          }
      };
      const auto leave = [&](int h, float4* sums, int width, float4* of_sums, int steps) {
#pragma unroll
        for (int c = 0; c < kSteps; ++c)
          if (c < steps) {
            const float (&out)[4] = state[h].out[c][0];
            sums[c * width] = float4{out[0], out[1], out[2], out[3]};
          }
        if (lane_here() < 4) *of_sums = stats[h];
      };
      const bool has_rows = !few || quad < 2;
      device::barrier_wait(turns((own_team + kWarps - 1) % kWarps), (turn - (own_team == 0 ? 1u : 0u)) & 1u);
      ++turn;
      if (own_team > 0) {
#pragma unroll
        for (int h = 0; h < kHeadsOfWarp; ++h)
          if (has_rows) fold_behind(h, &part_sums[own_member + h][place], width, part_stats[own_member + h][quad], kSteps);
        __syncwarp();
      }
      const bool is_last = own_team == kWarps - 1;
      if (!is_last) {
#pragma unroll
        for (int h = 0; h < kHeadsOfWarp; ++h)
          if (has_rows) leave(h, &part_sums[own_member + h][place], width, &part_stats[own_member + h][quad], kSteps);
        __syncwarp();
      }
      device::barrier_arrive(turns(own_team));
      if (!is_last) return;
      const int cta = cta_here(), first = run(&PartsRun::first), tile_first = run(&PartsRun::tile_first);
      const bool begins = first == tile_first, is_last_part = part + 1 == run(&PartsRun::last);
      // The tile's beginning, part by part: in shared memory, if there are few rows, else in the workspace. The lane finds what it left there.
#pragma unroll
      for (int h = 0; h < kHeadsOfWarp; ++h) {
        float4* const tile_sums = &part_sums[own_member + h][kItems / 2 + place];
        float4* const of_tile = &part_stats[own_member + h][2 + quad % 2];
        if (begins && part > tile_first && has_rows) {
          if (few) {
            fold_behind(h, tile_sums, 16, *of_tile, kSteps);
          } else {
            fold_behind(h, partial_sums(cta, slot_of_beginning(own_member + h)) + lane_here(), 32,
                        float4(partial_stats(cta, slot_of_beginning(own_member + h))[quad]), used_steps());
          }
        }
        __syncwarp();  // all lanes have read what few of them write
        if (has_rows) {
          if (begins && is_last_part) {
            leave(h, &part_sums[own_member + h][place], width, &part_stats[own_member + h][quad], kSteps);
          } else if (begins && few && !is_last_part) {
            leave(h, tile_sums, 16, of_tile, kSteps);
          } else {
            const int of = begins ? slot_of_beginning(own_member + h) : (part - first) * kHeads + own_member + h;
            leave(h, partial_sums(cta, of) + lane_here(), 32, partial_stats(cta, of) + quad, used_steps());
          }
        }
      }
      __syncwarp();
    };

#pragma unroll 1
    for (int part = run(&PartsRun::first); part < run(&PartsRun::last); ++part) {
      const int part_end = part + 1 == run(&PartsRun::last) ? run_end : part_begin(part + 1);
#pragma unroll
      for (int h = 0; h < kHeadsOfWarp; ++h) state[h].reset();
#pragma unroll 1
      for (;;) {
        const int key = next_key - kSlots / 2 * kStride;
        if (key >= part_end) break;
        const std::uint32_t k_slot = slot, v_slot = slot + 1 == kSlots ? 0 : slot + 1;
        slot = v_slot + 1 == kSlots ? 0 : v_slot + 1;
        const bool inner = key >= begin && key + kKeys <= run_end;

        float scores[kHeadsOfWarp][kKeys / 16][1][4];
        wait_for_slot(k_slot);
#pragma unroll
        for (int h = 0; h < kHeadsOfWarp; ++h)
          state[h].template multiply_qk<kKeys>(scores[h], ring() + k_slot * Shape::kSlotBytes + k_offset(h));
        __syncwarp();
        if (is_last_of_team(k_slot)) copy_boxes(maps.v, k_slot);
        next_step();

#pragma unroll
        for (int h = 0; h < kHeadsOfWarp; ++h)
          if (score[h].transform) MmaState::template transform_scores<kKeys>(scores[h], warp_row_params + 8 * h, p.softcap, key);
        if (!inner || !complete) {
          std::uint32_t valid = 0xffffffffu;
          if (!complete) {
            const int mine = key + lane_here();
            const int entry = lane_here() < kKeys && mine >= run(&PartsRun::begin) ? entry_of(mine) : -1;
            valid = __ballot_sync(kAllLanes, entry >= 0 && entry < p.num_blocks);
          }
#pragma unroll
          for (int h = 0; h < kHeadsOfWarp; ++h) MmaState::template mask_scores<kKeys>(scores[h], warp_row_params + 8 * h, key, valid);
        }
#pragma unroll
        for (int h = 0; h < kHeadsOfWarp; ++h) state[h].template softmax<kKeys>(scores[h], score[h]);

        wait_for_slot(v_slot);
        if (!inner) {
          // Zeros for hidden keys: their weight is 0, and what lies there may not be finite.
          constexpr int kChunks = Types::kKvRowBytes / 16;
#pragma unroll 1
          for (int i = lane_here(); i < kKeys * kHeadsOfWarp * kChunks; i += 32) {
            const int row = i / kChunks, of = key + row % kKeys;
            if (of < begin || of >= run_end)
              device::store_shared_16(KvRows::address(ring() + v_slot * Shape::kSlotBytes,
                                                      KvRows::row(row % kKeys, member + row / kKeys, box_shift), i % kChunks),
                                      uint4{0, 0, 0, 0});
          }
          device::fence_async_proxy();
          __syncwarp();
        }
#pragma unroll
        for (int h = 0; h < kHeadsOfWarp; ++h)
          state[h].template multiply_pv<kKeys>(scores[h], ring() + v_slot * Shape::kSlotBytes + v_offset(h));
        __syncwarp();
        if (is_last_of_team(v_slot)) copy_boxes(maps.k, v_slot);
      }
      pass_on(part);
    }

    // In a cluster the first CTA puts together what the others have left, which it brings to where the rings were, as much as fits at a time.
    bool in_tile_stats = false;
    if (plan.cluster.divisor > 1) {
      device::cluster_sync();
      if (rank_of_cluster() > 0) return kNothing;
      constexpr int kItemsOfPart = kHeads * (kItems + 4);
      constexpr int kPartsAtATime = kWarps * Shape::kRingBytes / (kItemsOfPart * 16);
      const KeyRange range{own.begin, own.end};
#pragma unroll 1
      for (int base = own.last; base < own.tile_last; base += kPartsAtATime) {
        const int end = min(base + kPartsAtATime, own.tile_last);
        int rank = 0, rank_begin = own.first, rank_end = own.last;  // whose part it is
#pragma unroll 1
        for (int part = base; part < end; ++part) {
          while (part >= rank_end) {
            ++rank;
            rank_begin = rank_end;
            rank_end = first_part(plan.cluster, rank + 1, range, own.tile_first, own.tile_last);
          }
#pragma unroll 1
          for (int i = thread_here(); i < kItemsOfPart; i += Shape::kCtaThreads) {
            const int h = i / (kItems + 4), item = i % (kItems + 4), of = (part - rank_begin) * kHeads + h;
            const int cta = cta_here() + rank;
            const bool exists = item >= kItems || item / 32 < used_steps();
            const float4* const source = item >= kItems ? partial_stats(cta, of) + (item - kItems) : partial_sums(cta, of) + item;
            device::copy_async_16_if(shared_base + static_cast<std::uint32_t>(((part - base) * kItemsOfPart + i) * 16),
                                     exists ? source : partial_sums(cta, of), exists);
          }
        }
        device::copy_async_commit();
        device::copy_async_wait<0>();
        __syncthreads();
        const auto* const parts = reinterpret_cast<const float4*>(shared);
#pragma unroll 1
        for (int i = thread_here(); i < kHeads * kItems; i += Shape::kCtaThreads) {
          const int h = i / kItems, item = i % kItems, quad = item % 4;
          if (few && quad >= 2) continue;
          float4& place = part_sums[h][place_of(item / 32, item % 32)];
          float4 sums = place, stats = (in_tile_stats ? tile_stats : part_stats)[h][quad];
#pragma unroll 1
          for (int part = 0; part < end - base; ++part) {
            const float4* const of_part = parts + part * kItemsOfPart + h * (kItems + 4);
            float4 next = of_part[item], of_next = of_part[kItems + quad];
            const FoldFactors factors = fold_stats(stats, of_next);
            fold_sums(sums, factors, next.x, next.y, next.z, next.w);
            sums = next, stats = of_next;
          }
          place = sums;
          if (item < 4) (in_tile_stats ? part_stats : tile_stats)[h][quad] = stats;
        }
        in_tile_stats = !in_tile_stats;
        __syncthreads();
      }
    }
    __syncthreads();
    bool finite = true;
    Tile tile{};
    tile.seq = tile.first_token = own.seq;
    tile.query_len = 1;
    constexpr int kThreadsPerRow = kHeadDim / 4;
#pragma unroll 1
    for (int i = thread_here(); i < kHeads * group * kThreadsPerRow; i += Shape::kCtaThreads) {
      const int of_all = i / kThreadsPerRow, column = i % kThreadsPerRow * 4;
      const int h = kHeads > 1 && of_all >= group ? 1 : 0, row = of_all - h * group;
      const auto sum_at = [&](int of) {
        const int within = of % 16, c = of / 16;
        const int in_group = Types::kQuantized ? within / 2 : within % 8, half = Types::kQuantized ? within % 2 : within / 8;
        return reinterpret_cast<const float*>(&part_sums[h][place_of(c, in_group * 4 + row / 2)])[2 * half + row % 2];
      };
      const float4 stats = (in_tile_stats ? tile_stats : part_stats)[h][row / 2];
      const Partial result{float4{sum_at(column), sum_at(column + 1), sum_at(column + 2), sum_at(column + 3)},
                           row % 2 != 0 ? stats.z : stats.x, row % 2 != 0 ? stats.w : stats.y};
      finite &= column >= p.head_dim || is_finite(result);
      finish(plan, tile, own.kv_head + h, row, column, result);
    }
    if (__syncthreads_or(!finite)) {
      if (lane == 0) {
        if (member == 0) {
#pragma unroll
          for (int i = 0; i < kSlots; ++i) device::barrier_invalidate(barriers() + i * 8);
        }
        device::barrier_invalidate(turns(team));
      }
      return run(&PartsRun::tile_idx);
    }
  }
}

#endif  // sm_90

}  // namespace quire::cuda::attn
