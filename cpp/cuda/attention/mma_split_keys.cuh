// Attention for few query rows per kv head (decode): the warps of a CTA take turns at the keys and meet at the end.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cuda/attention/key_boxes.cuh"
#include "cuda/attention/mma_columns.cuh"
#include "cuda/attention/share.cuh"
#include "cuda/device/named_barrier.cuh"

namespace quire::cuda::attn {

/// kWide: the warps of two CTAs are one CTA, for batches that are so small that the parts of a tile are many.
template <DType kKvDType, int kHeadDim, Variant kVariant, bool kWide, Pairing kPairing>
struct SplitKeysShape {
  static constexpr bool kPaired = kPairing == Pairing::kColumns;
  static constexpr bool kPairedWarps = kPairing == Pairing::kWarps;
  using Types = MmaTypes<kKvDType, kHeadDim>;
  static constexpr int kRows = kPairedWarps ? 16 : tile_rows(kVariant);
  static constexpr int kTiles = tile_rows(kVariant) / 8;  // of queries of a warp
  static constexpr int kCtasPerSm = kWide ? ctas_per_sm(kVariant, kHeadDim) / 2 : ctas_per_sm(kVariant, kHeadDim);
  static constexpr int kCtaWarps = kWide ? 2 * kWarps : kWarps;
  static constexpr int kCtaThreads = 32 * kCtaWarps;
  static constexpr int kHeadWarps = kPairedWarps ? kCtaWarps / 2 : kCtaWarps;  // that take turns at the keys
  // Per step of a warp; 32 as long as the ring has three slots and registers suffice.
  static constexpr bool kLongRows = Types::kKvRowBytes >= 512 || (Types::kKvRowBytes >= 256 && (kHeadDim < 256 || kTiles > 1));
  static constexpr int kKeys = kLongRows ? 16 : 32;
  static constexpr int kSlotBytes = kKeys * Types::kKvRowBytes;      // one step's K or V
  // 192 KiB for all warps of an SM, or 64 KiB for a CTA.
  static constexpr int kSlots =
      (kVariant == Variant::kMmaSplitKeys8Small ? 16 * 1024 : 48 * 1024 / ctas_per_sm(kVariant, kHeadDim)) / kSlotBytes;
  static constexpr int kRingBytes = kSlots * kSlotBytes;  // of one warp
  static constexpr int kLead = (kSlots + 1) / 2;          // steps whose copies are under way
  static constexpr int kEntryBytes = kLead * kKeys * 4;   // of a warp: table entries
  static constexpr int kOutPitch = kHeadDim + 4;          // floats; every second row 8 banks on
  static constexpr bool kManyRegisters = ctas_per_sm(kVariant, kHeadDim) <= 2;  // of a thread
  static constexpr int kColumns = kPaired ? kHeadDim / 2 : kHeadDim;  // of a row of q and out
  static constexpr int kQOffset = kCtaWarps * kRingBytes;
  static constexpr int kRowParamsOffset = kQOffset + kRows * Types::kQRowBytes;
  static constexpr int kStatsOffset = kRowParamsOffset + kRows * static_cast<int>(sizeof(RowParams));
  static constexpr int kNotesOffset = kStatsOffset + 2 * kCtaWarps * kRows * static_cast<int>(sizeof(float));
  static constexpr int kFoldedOffset = kNotesOffset + kRows * kNoteWords<kHeadDim> * 4;
  static constexpr int kEntriesOffset = kFoldedOffset + 2 * kRows * static_cast<int>(sizeof(float2));
  static constexpr int kWalkOffset = kEntriesOffset + kCtaWarps * kEntryBytes;
  static constexpr int kSharedBytes = kWalkOffset + static_cast<int>(sizeof(Walk));
  static constexpr int kAlignedBytes = (kSharedBytes + 1023) / 1024 * 1024;
  /// Of paired warps: whether this one has the second kv head.
  __device__ __forceinline__ static bool is_upper_warp() { return (threadIdx.x & 32u) != 0; }
  static_assert(kSlots >= 2);
  static_assert(kWide || kSharedBytes <= (kVariant == Variant::kMmaSplitKeys16 || kHeadDim == 256 && kVariant == Variant::kMmaSplitKeys8
                                              ? kLargeSharedBytes
                                              : 99 * 1024));
  static_assert(!kWide || kSharedBytes <= kWideSharedBytes / kCtasPerSm);
  static_assert(kRows * kOutPitch * 4 <= kRingBytes, "the rings hold the merge");
};

/// The same of paired warps with keys brought by boxes of both kv heads: two warps are a team.
template <typename Base>
struct BoxKeysShape : Base {
  using Types = typename Base::Types;
  static constexpr int kTeam = 2;
  using KvRows = PanelRows<Types::kKvRowBytes, Base::kKeys, kTeam>;
  static constexpr int kTeamHeads = kTeam;
  static constexpr int kMaxBoxKeys = 16;  // 16 keys further on are as many rows, whatever boxes have
  static constexpr int kTeamSlotBytes = kTeam * Base::kSlotBytes;
  static constexpr int kSlotBarriersOffset =
      (Base::kWalkOffset + static_cast<int>(sizeof(Walk)) + 7) / 8 * 8;  // of each team, one for each slot
  static constexpr int kCountersOffset = kSlotBarriersOffset + Base::kCtaWarps / kTeam * Base::kSlots * 8;
  static constexpr int kBoxesOffset = Base::kEntriesOffset;  // of each warp, 32: slot and block
  static_assert(Base::kWalkOffset - kBoxesOffset >= Base::kCtaWarps * 256 && kBoxesOffset % 8 == 0);
  static constexpr int kSharedBytes = kCountersOffset + Base::kCtaWarps / kTeam * Base::kSlots * 4;
  static_assert(Base::kSlotBytes % 1024 == 0);
};

/// Starts the copy of a key's table entry to shared memory, if it has one.
__device__ __forceinline__ void copy_entry(const Plan& plan, const Tile& tile, int key, int key_end, std::uint32_t target) {
  const AttentionParams& p = plan.params;
  if (p.block_tables == nullptr || key >= key_end) return;
  device::copy_async_4(target, p.block_tables + tile.seq * p.block_tables_stride + plan.block_size.quotient(key), 4);
}

/// One warp's keys: steps first, first + kCtaWarps, ... of the CTA's part, copied ahead into a ring of slots K0 V0 K1 V1 ... Table entries are copied
/// ahead of that, into a ring of their own: a load would be waited for. What is the whole CTA's stays in shared memory.
template <typename Shape>
struct KeyStream {
  using Types = typename Shape::Types;
  using KvRows = Rows<Types::kKvRowBytes>;
  static constexpr int kStride = Shape::kHeadWarps * Shape::kKeys;
  static constexpr int kSlots = Shape::kSlots;
  static constexpr bool kEven = kSlots % 2 == 0;
  static constexpr int kLead = Shape::kLead;
  static constexpr int kFillRounds = kLead;  // of the loop, before there is a first step

  const Plan& plan;
  const Walk& walk;
  std::uint32_t entries_base, ring;
  int next_key;                    // of the step whose K comes next
  std::uint32_t entries;           // the lane's entry for it, in shared memory
  KeyLocation location;            // the lane's, of the step whose K came last
  std::uint32_t last_valid;        // of that step: bit j says whether key j exists
  std::uint32_t valid[kLead + 1];  // the same of the step in use and the ones after

  /// Warps from `first_warp` on have `shared`.
  __device__ __forceinline__ KeyStream(const Plan& of_plan, const Walk& of_walk, char* shared, int first_warp)
      : plan(of_plan),
        walk(of_walk),
        entries_base(device::shared_address(shared) + static_cast<std::uint32_t>(Shape::kEntriesOffset - first_warp * Shape::kEntryBytes)),
        ring(device::shared_address(shared) +
             (threadIdx.x / 32 - static_cast<unsigned>(first_warp)) * static_cast<std::uint32_t>(Shape::kRingBytes)) {}

  /// The warp's entries.
  __device__ __forceinline__ std::uint32_t warp_entries() const {
    return entries_base + static_cast<std::uint32_t>(thread_here() / 32 * Shape::kEntryBytes);
  }

  /// Asks for the part's first steps' table entries. They are there when all that the thread has asked for is.
  __device__ __forceinline__ void start() {
    const int warp = static_cast<int>(threadIdx.x) / 32 % Shape::kCtaWarps;
    const int first_key = walk.part_begin + (Shape::kPairedWarps ? warp / 2 : warp) * Shape::kKeys;
    entries = warp_entries() + static_cast<std::uint32_t>(4 * lane_here());
    next_key = first_key;
#pragma unroll
    for (int i = 0; i < kLead; ++i) {
      copy_entry(plan, walk.tile, lane_key(), walk.part_end, entries + static_cast<std::uint32_t>(i * Shape::kKeys * 4));
      next_key += kStride;
    }
    next_key = first_key;
#pragma unroll
    for (std::uint32_t& bits : valid) bits = 0;
  }

  /// The first key of the step in use.
  __device__ __forceinline__ int key() const { return next_key - kLead * kStride; }

  __device__ __forceinline__ std::uint32_t slot_address(std::uint32_t slot) const { return ring + slot * Shape::kSlotBytes; }

  /// Until the step's K is there, or its V.
  __device__ __forceinline__ void wait(std::uint32_t) const {
    device::copy_async_wait<kSlots - 1>();
    __syncwarp();
  }

  /// Once the warp is done with a step's K, or V: what the slot has next.
  __device__ __forceinline__ void refill_k(std::uint32_t, std::uint32_t address) {
    if constexpr (kEven) {
      valid[kLead] = copy_k(address);
    } else {
      copy_v(address);
    }
    device::copy_async_commit();
  }
  __device__ __forceinline__ void refill_v(std::uint32_t, std::uint32_t address) {
    if constexpr (kEven) {
      copy_v(address);
    } else {
      valid[kLead] = copy_k(address);
    }
    device::copy_async_commit();
#pragma unroll
    for (int i = 0; i < kLead; ++i) valid[i] = valid[i + 1];
  }

  /// Which keys of the step in use exist.
  __device__ __forceinline__ std::uint32_t valid_keys(int) const { return valid[0]; }

 private:
  /// The warp's part of a kv head, or of a pair's view.
  __device__ __forceinline__ static KvView own_part(KvView view, std::int64_t pair_stride) {
    if constexpr (Shape::kPaired) view.row_bytes *= 2;
    if constexpr (Shape::kPairedWarps) {
      if (Shape::is_upper_warp()) view.base += pair_stride * Types::kElementBytes / 2;
    }
    return view;
  }

  __device__ __forceinline__ int lane_key() const {
    const int lane = lane_here();
    // Lanes beyond the step have no key. Batch-invariant steps may begin before the tile's first.
    return lane < Shape::kKeys && next_key + lane >= walk.tile.key_begin ? next_key + lane : INT_MAX;
  }

  /// Starts the copy of the next step's K and returns which of its keys exist.
  __device__ __forceinline__ std::uint32_t copy_k(std::uint32_t slot) {
    const int key = next_key;
    if (key >= walk.part_end) {
      next_key = key + kStride;
      return 0;
    }
    location = locate_key(plan, walk.tile, lane_key(), walk.part_end, device::load_shared(entries));
    last_valid = __ballot_sync(kAllLanes, location.valid);
    copy_rows<Types, Shape::kKeys>(plan, own_part(k_view<Types>(plan.params, plan, walk.kv_head), plan.params.k_head_stride), location,
                                   last_valid, 0, slot, 0, lane_here());
    next_key = key + kLead * kStride;
    copy_entry(plan, walk.tile, lane_key(), walk.part_end, entries);
    next_key = key + kStride;
    entries += Shape::kKeys * 4;
    if (entries >= warp_entries() + Shape::kEntryBytes) entries -= Shape::kEntryBytes;
    return last_valid;
  }

  /// Starts the copy of the V that belongs to the last copy_k.
  __device__ __forceinline__ void copy_v(std::uint32_t slot) const {
    const int key = next_key - kStride;
    if (key >= walk.part_begin && key < walk.part_end)
      copy_rows<Types, Shape::kKeys>(plan, own_part(v_view<Types>(plan.params, plan, walk.kv_head), plan.params.v_head_stride), location,
                                     last_valid, 0, slot, 0, lane_here());
  }
};

/// The same by boxes (key_boxes.cuh): a team's keys.
template <typename Shape>
struct BoxKeyStream;

#if __CUDA_ARCH__ >= 900

/// A part's keys, for BoxStream: steps are dealt to the CTA's teams in turn.
template <typename Shape>
struct PartKeys {
  const Plan& plan;
  const Walk& walk;

  __device__ __forceinline__ int begin() const { return walk.part_begin; }
  __device__ __forceinline__ int end() const { return walk.part_end; }
  __device__ __forceinline__ int seq() const { return walk.tile.seq; }
  __device__ __forceinline__ int head() const { return walk.kv_head * Shape::kTeamHeads; }
  __device__ __forceinline__ static constexpr int stride() { return Shape::kHeadWarps * Shape::kKeys; }
  __device__ __forceinline__ bool read_once() const {
    // What the CTA has of the line, more or less.
    const int all = walk.aligned_length > 0 && plan.tiles_per_cta > 1 ? walk.stretch * plan.tiles_per_cta : walk.stretch;
    return all <= plan.read_once_stretch;
  }
};

template <typename Shape>
struct BoxKeyStream {
  using KvRows = typename Shape::KvRows;
  static constexpr int kFillRounds = 0;

  BoxStream<Shape> boxes;
  PartKeys<Shape> keys;
  int first_entry;

  __device__ __forceinline__ BoxKeyStream(const Plan& plan, const Walk& walk, const KeyMaps& maps, char* shared)
      : boxes(plan, maps, shared), keys{plan, walk} {}

  __device__ __forceinline__ void start() {
    const int first_step = keys.begin() / Shape::kKeys + static_cast<int>(threadIdx.x) / (32 * Shape::kTeamHeads);
    first_entry = boxes.start(keys.seq(), keys.stride(), first_step * Shape::kKeys, keys.end());
  }
  __device__ __forceinline__ void fill() { boxes.fill(keys, first_entry); }
  __device__ __forceinline__ int key() const { return boxes.key(keys); }
  __device__ __forceinline__ std::uint32_t slot_address(std::uint32_t slot) const { return boxes.slot_address(slot); }
  __device__ __forceinline__ void wait(std::uint32_t slot) { boxes.wait(slot); }
  __device__ __forceinline__ void refill_k(std::uint32_t slot, std::uint32_t) { boxes.refill_k(keys, slot); }
  __device__ __forceinline__ void refill_v(std::uint32_t slot, std::uint32_t) { boxes.refill_v(keys, slot); }
  __device__ __forceinline__ std::uint32_t valid_keys(int key) const {
    if (!boxes.complete) return boxes.valid_keys(keys, key);
    constexpr std::uint32_t kAll = Shape::kKeys == 32 ? kAllLanes : (1u << (Shape::kKeys % 32)) - 1;
    if (is_within(key)) return kAll;
    const int lane = lane_here(), mine = key + lane;
    return __ballot_sync(kAllLanes, lane < Shape::kKeys && mine >= keys.begin() && mine < keys.end());
  }
  /// Before V is used: no key that is not the part's counts.
  __device__ __forceinline__ void hide_values(int key, std::uint32_t slot) const {
    if (!is_within(key)) boxes.hide_values(keys, key, slot);
  }

 private:
  __device__ __forceinline__ bool is_within(int key) const { return key >= keys.begin() && key + Shape::kKeys <= keys.end(); }
};

#endif  // sm_90

/// Of paired kv heads: whether a query head is of the second, whose columns follow the first's.
__device__ __forceinline__ bool is_upper(const Plan& plan, int head) { return (plan.kv_group.quotient(head) & 1) != 0; }

/// copy_q for paired kv heads: a row of q, in the half that is its kv head's, beside zeros.
template <typename Shape>
__device__ __forceinline__ void copy_paired_q(const Plan& plan, const Tile& tile, int kv_head, std::uint32_t q_shared) {
  using QRows = Rows<Shape::Types::kQRowBytes>;
  constexpr int kHalf = QRows::kChunks / 2;
  const AttentionParams& p = plan.params;
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < Shape::kRows * QRows::kChunks; i += Shape::kCtaThreads) {
    const int row = i / QRows::kChunks, chunk = i % QRows::kChunks;
    const RowIndex index = row_index(plan, tile, kv_head, min(row, tile.num_rows - 1));
    const int own_chunk = is_upper(plan, index.head) ? chunk - kHalf : chunk;
    const int present = row < tile.num_rows && own_chunk >= 0 && own_chunk < kHalf ? 16 : 0;
    const char* source = static_cast<const char*>(p.q) + (index.q_token * p.q_token_stride + index.head * p.q_head_stride) * 2;
    if (present > 0) source += own_chunk * 16;
    const std::uint32_t target = QRows::address(q_shared, row, chunk);
    if (plan.q_alignment == 16) {
      device::copy_async_16(target, source, present);
    } else {
      device::copy_narrow_16(target, source, present, plan.q_alignment);
    }
  }
}

/// A row's sum of weighted values, or four columns of it, and the two terms of its softmax.
struct Partial {
  float4 value;
  float top, sum;  // in units of log2
};

/// a becomes a and b together. Every operation's rounding is spelled out: what is folded in one order has the same bits wherever it is done.
__device__ __forceinline__ void fold(Partial& a, const Partial& b) {
  const float top = fmaxf(a.top, b.top);
  const float base = top == -INFINITY ? 0.0f : top;
  const float of_a = device::exp2_approx(a.top - base), of_b = device::exp2_approx(b.top - base);
  a.sum = __fmaf_rn(b.sum, of_b, __fmul_rn(a.sum, of_a));
  a.value.x = __fmaf_rn(b.value.x, of_b, __fmul_rn(a.value.x, of_a));
  a.value.y = __fmaf_rn(b.value.y, of_b, __fmul_rn(a.value.y, of_a));
  a.value.z = __fmaf_rn(b.value.z, of_b, __fmul_rn(a.value.z, of_a));
  a.value.w = __fmaf_rn(b.value.w, of_b, __fmul_rn(a.value.w, of_a));
  a.top = top;
}

/// Adds a part's columns and its sum, whose largest score is stats.x, to what is relative to `base`.
__device__ __forceinline__ void add_part(Partial& to, float base, float4 value, float2 stats) {
  const float weight = device::exp2_approx(stats.x - base);
  to.sum = fmaf(weight, stats.y, to.sum);
  to.value.x = fmaf(weight, value.x, to.value.x), to.value.y = fmaf(weight, value.y, to.value.y);
  to.value.z = fmaf(weight, value.z, to.value.z), to.value.w = fmaf(weight, value.w, to.value.w);
}

/// Writes four columns of a row of out, and with the first ones its lse.
__device__ __forceinline__ void finish(const Plan& plan, const Tile& tile, int kv_head, int row, int column, const Partial& result) {
  const AttentionParams& p = plan.params;
  const RowIndex index = row_index(plan, tile, kv_head, row);
  // As finish_row, in few instructions.
  const bool empty = result.top == -INFINITY && result.sum == 0.0f;
  float top = result.top, scale = 1.0f, total = result.sum;
  if (p.sinks != nullptr) {
    const float sink = p.sinks[index.head] * kLog2E;
    top = fmaxf(fmaxf(top, sink), -FLT_MAX);
    scale = device::exp2_approx(result.top - top);
    total = fmaf(total, scale, device::exp2_approx(sink - top));
  }
  if (column == 0 && p.lse != nullptr)
    p.lse[stats_index(plan, index)] = empty ? (p.sinks != nullptr ? p.sinks[index.head] : -INFINITY) : fmaf(top, kLn2, __logf(total));
  const float factor = (empty ? 0.0f : __fdividef(scale, total)) *
                       (p.v_scale != nullptr ? p.v_scale[plan.kv_group.quotient(index.head) * p.v_scale_stride] : 1.0f);
  const float4 value = result.value;
  if (column < p.head_dim) store_out_4(plan, index, column, float4{value.x * factor, value.y * factor, value.z * factor, value.w * factor});
}

/// Row `row` of a slot of partial results.
__device__ __forceinline__ std::int64_t partial_row(const Plan& plan, int cta, int slot, int row) {
  return (static_cast<std::int64_t>(cta) * plan.slots_per_cta + slot) * plan.tile_rows + row;
}

/// Four columns of a partial row; written by other CTAs, so that they come from the L2.
__device__ __forceinline__ Partial load_partial(const Plan& plan, std::int64_t row, int column) {
  const float2 stats = __ldcg(plan.partial_stats + row);
  const auto head_dim = static_cast<int>(plan.params.head_dim);
  Partial result{float4{0.0f, 0.0f, 0.0f, 0.0f}, stats.x, stats.y};
  if (column < head_dim) result.value = __ldcg(reinterpret_cast<const float4*>(plan.partial_out + row * head_dim + column));
  return result;
}

__device__ __forceinline__ void store_partial(const Plan& plan, std::int64_t row, int column, const Partial& partial) {
  const auto head_dim = static_cast<int>(plan.params.head_dim);
  if (column == 0) plan.partial_stats[row] = float2{partial.top, partial.sum};
  if (column < head_dim) *reinterpret_cast<float4*>(plan.partial_out + row * head_dim + column) = partial.value;
}

/// The slot of the part that begins a tile; the ones that go on with a tile have those from 0 on.
__device__ __forceinline__ int first_slot(const Plan& plan) { return plan.slots_per_cta - 1; }

/// Puts four columns of a tile's row together from its parts, one after the other.
template <int kKeys>
__device__ __forceinline__ Partial fold_parts(const Plan& plan, const Walk& walk, int row, int column) {
  Partial result{};
#pragma unroll 1
  for (int cta = walk.first_cta; cta <= walk.last_cta; ++cta) {
    const int place = cta * walk.stretch - walk.keys_start;
    const int first = unit_at<kKeys>(plan, walk, place, true), last = unit_at<kKeys>(plan, walk, place + walk.stretch, true);
    if (first == walk.unit_first && first < last) {
      // The tile's beginning is folded already.
      result = load_partial(plan, partial_row(plan, cta, first_slot(plan), row), column);
      continue;
    }
#pragma unroll 1
    for (int part = first; part < last; ++part) fold(result, load_partial(plan, partial_row(plan, cta, part - first, row), column));
  }
  return result;
}

/// The same some at a time, where each CTA has one part.
template <typename Shape>
__device__ __forceinline__ Partial sum_parts(const Plan& plan, const Walk& walk, int row, int column) {
  // As many as registers hold.
  constexpr int kAtATime = Shape::kManyRegisters ? 16 : 8;
  const int num_parts = walk.last_cta - walk.first_cta + 1;
  const int rows_per_cta = plan.slots_per_cta * Shape::kRows;
  const int first_row = walk.first_cta * rows_per_cta + row;
  Partial result{float4{0.0f, 0.0f, 0.0f, 0.0f}, -INFINITY, 0.0f};
#pragma unroll 1
  for (int first = 0; first < num_parts; first += kAtATime) {
    Partial parts[kAtATime];
    float top = result.top;
#pragma unroll
    for (int i = 0; i < kAtATime; ++i) {
      const int part = first + i;
      parts[i] = Partial{float4{0.0f, 0.0f, 0.0f, 0.0f}, -INFINITY, 0.0f};
      const int part_row = first_row + part * rows_per_cta + (part == 0 ? first_slot(plan) * Shape::kRows : 0);
      if (part < num_parts) parts[i] = load_partial(plan, part_row, column);
    }
#pragma unroll
    for (int i = 0; i < kAtATime; ++i) top = fmaxf(top, parts[i].top);
    const float base = top == -INFINITY ? 0.0f : top;
    const auto add = [&](const Partial& part, Partial& to) {
      const float factor = device::exp2_approx(part.top - base);
      to.sum = fmaf(factor, part.sum, to.sum);
      to.value.x = fmaf(factor, part.value.x, to.value.x), to.value.y = fmaf(factor, part.value.y, to.value.y);
      to.value.z = fmaf(factor, part.value.z, to.value.z), to.value.w = fmaf(factor, part.value.w, to.value.w);
    };
    Partial sum{float4{0.0f, 0.0f, 0.0f, 0.0f}, top, 0.0f};
    add(result, sum);
#pragma unroll
    for (int i = 0; i < kAtATime; ++i) add(parts[i], sum);
    result = sum;
  }
  return result;
}

/// Asks the L2 for the block tables, which are needed as soon as the lengths are known.
template <int kCtaThreads>
__device__ __forceinline__ void prefetch_tables(const AttentionParams& p) {
  constexpr std::int64_t kLimit = 512 * 1024, kLine = 128;
  if (p.block_tables == nullptr || p.block_tables_stride < 0) return;
  const std::int64_t num_bytes = ((p.num_seqs - 1) * p.block_tables_stride + p.max_blocks_per_seq) * std::int64_t{sizeof(std::int32_t)};
  const std::int64_t offset = (static_cast<std::int64_t>(blockIdx.x) * kCtaThreads + threadIdx.x) * kLine;
  if (num_bytes > kLimit || offset >= num_bytes) return;
  asm volatile("prefetch.global.L2 [%0];\n" ::"l"(reinterpret_cast<const char*>(p.block_tables) + offset));
}

/// A CTA has an equal stretch of the batch's line of keys (share.cuh). It computes 8 or 16 packed rows at a time against the keys that it has of
/// them and writes them to out and lse, or to the workspace if other CTAs have keys of them too. Or only `lone_tile`, of all kv heads, where lengths
/// are aligned. kPerCta: in attend_to_parts's kernel, how many such CTAs a CTA is, each of kThreads threads; all is batch-invariant there. kBoxes:
/// keys are brought by the copy engine, by `maps`, and BoxStream::init has been called.
template <DType kKvDType, int kHeadDim, Variant kVariant, bool kWide, Pairing kPairing, int kPerCta = 0, bool kBoxes = false>
__device__ __forceinline__ void attend_to_stretches(const Plan& plan, int lone_tile = -1, [[maybe_unused]] const KeyMaps* maps = nullptr) {
  using Types = MmaTypes<kKvDType, kHeadDim>;
  using Plain = SplitKeysShape<kKvDType, kHeadDim, kVariant, kWide, kPairing>;
  using Shape = std::conditional_t<kBoxes, BoxKeysShape<Plain>, Plain>;
  static_assert(!kBoxes || kPairing == Pairing::kWarps);
  constexpr bool kPaired = Shape::kPaired, kPairedWarps = Shape::kPairedWarps;
  constexpr int kRows = Shape::kRows;
  constexpr int kTiles = Shape::kTiles;
  constexpr int kKeys = Shape::kKeys;
  constexpr int kSlots = Shape::kSlots;
  constexpr int kCtaWarps = Shape::kCtaWarps;
  constexpr bool kInvariant = kPerCta > 0;
  extern __shared__ __align__(1024) char shared_of_all[];
  const AttentionParams& p = plan.params;
  const auto here = [] { return static_cast<int>(threadIdx.x); };
  const int member = kPerCta > 1 ? here() / Shape::kCtaThreads : 0;
  const auto thread = [&] { return kPerCta > 1 ? here() % Shape::kCtaThreads : here(); };
  const int cta = kPerCta > 1 ? static_cast<int>(blockIdx.x) * kPerCta + member : static_cast<int>(blockIdx.x);
  const int num_ctas = kInvariant ? static_cast<int>(gridDim.x) * kPerCta : plan.num_ctas;
  char* const shared = shared_of_all + (kPerCta > 1 ? member * Shape::kAlignedBytes : 0);
  const int lane = here() % 32;
  const int warp = thread() / 32;

  char* q_shared = shared + Shape::kQOffset;
  auto* row_params = reinterpret_cast<RowParams*>(shared + Shape::kRowParamsOffset);
  // Of warps: a row's largest score in units of log2, and its sum of exponentials.
  auto& stats = *reinterpret_cast<float2(*)[kCtaWarps][kRows]>(shared + Shape::kStatsOffset);
  // Which warps have a row's keys: [first, first + kWarpStep, ...).
  constexpr int kWarpStep = kPairedWarps ? 2 : 1;
  auto& folded_stats = *reinterpret_cast<float2(*)[2][kRows]>(shared + Shape::kFoldedOffset);
  const std::uint32_t shared_base = device::shared_address(shared);
  auto* notes = reinterpret_cast<std::uint32_t*>(shared + Shape::kNotesOffset);
  auto* merged = reinterpret_cast<float*>(shared);
  // In shared memory, since the loop has no registers to spare.
  Walk& walk = *reinterpret_cast<Walk*>(shared + Shape::kWalkOffset);
  const Tile& tile = walk.tile;
  auto stream = [&] {
    if constexpr (kBoxes) {
      return BoxKeyStream<Shape>(plan, walk, *maps, shared);
    } else {
      return KeyStream<Shape>(plan, walk, shared, member * kCtaWarps);
    }
  }();
  using Stream = decltype(stream);
  using KvRows = typename Stream::KvRows;
  // Batch-invariant calls have narrow CTAs and no pairs.
  const auto invariant = [&] { return kInvariant || (!kWide && kPairing == Pairing::kNone && plan.batch_invariant); };

  const auto sync = [&] {
    if constexpr (kInvariant) {
      device::named_barrier_sync(1 + member, Shape::kCtaThreads);
    } else {
      __syncthreads();
    }
  };
  const auto sync_or = [&](bool any) {
    if constexpr (kInvariant) {
      return device::named_barrier_or(1 + member, Shape::kCtaThreads, any);
    } else {
      return __syncthreads_or(any) != 0;
    }
  };

  if (!kInvariant && cta >= num_ctas) return;
  prefetch_tables<Shape::kCtaThreads>(p);
  if (lone_tile >= 0) {
    if (thread() == 0) begin_lone_walk(walk, lone_tile);
  } else if (warp == 0) {
    begin_walk<kRows, kKeys>(plan, walk, cta, num_ctas);
  }
  for (bool fresh = true;; fresh = false) {
    if (thread() == 0 && (!fresh || walk.more)) next_tile<kRows, kKeys>(plan, walk, fresh, invariant());
    sync();
    if (!walk.more) return;
    using MmaState = MmaColumns<kKvDType, kHeadDim, kTiles, kPaired, KvRows, !(kInvariant && kHeadDim == 128)>;
    MmaState state;
    typename MmaState::Scale score;
    std::uint32_t k_offset, v_offset;
    if constexpr (kBoxes) {
      static_assert(Types::kQuantized);
      k_offset = v_offset = KvRows::address(0, KvRows::row(lane % 16, warp % 2, maps->box_shift), lane / 16);
    } else {
      k_offset = MmaState::k_thread_offset();
      v_offset = MmaState::v_thread_offset();
    }
    // Of paired warps: the tile's row that is the warp's first.
    const auto first_row = [&] { return kPairedWarps && Shape::is_upper_warp() ? static_cast<int>(plan.kv_group.divisor) : 0; };
    const RowParams* const warp_row_params = row_params + first_row();

    // Batch-invariant calls go from part to part; else all of the CTA's keys of the tile are one.
    for (bool has_q = false;; has_q = true) {
      // A second pass only where NaN or infinity in V reached rows that do not see it.
      bool selecting = false;
      for (;; selecting = true) {
        stream.start();
        if (!has_q && !selecting) {
          if constexpr (kPaired) {
            copy_paired_q<Shape>(plan, tile, walk.kv_head, device::shared_address(q_shared));
          } else {
            copy_q<Types, kRows>(plan, tile, walk.kv_head, 0, warp, kCtaWarps, q_shared);
          }
        }
        device::copy_async_commit();
        if constexpr (kBoxes) stream.fill();
        device::copy_async_wait<0>();
        state.reset();

        // The first rounds only fill the ring, where copies are not boxes: one copy of the code serves both, which matters to a cold instruction cache.
        std::uint32_t slot = 0;
        for (int round = -Stream::kFillRounds;; ++round) {
          const bool fills = Stream::kFillRounds > 0 && round < 0;
          if (round == 0) {
            if (selecting) {
              for (int i = thread(); i < kRows * kNoteWords<kHeadDim>; i += Shape::kCtaThreads) notes[i] = 0;
            } else if (!has_q) {
              if (thread() < kRows) {
                const int row = thread();
                row_params[row] = make_row_params(plan, tile, walk.kv_head, row);
                if ((kPaired || kPairedWarps) && p.k_scale != nullptr) {
                  const int head = row_index(plan, tile, walk.kv_head, min(row, tile.num_rows - 1)).head;
                  row_params[row].scale = p.scale * p.k_scale[plan.kv_group.quotient(head) * p.k_scale_stride];
                }
              }
              if constexpr (Types::kQuantized) {
                sync();
                for (int row = warp; row < kRows; row += kCtaWarps) convert_q<Types, kHeadDim, 1>(plan, row, q_shared, row_params);
              }
            }
            sync();
            if (!selecting && !has_q) {
              score = make_score_scale<MmaState::kQueries>(p, warp_row_params, MmaState::query);
              state.attach_q(device::shared_address(q_shared), first_row());
              if constexpr (kPaired) {
#pragma unroll
                for (int i = 0; i < MmaState::kQueries; ++i)
                  state.upper[i] = is_upper(plan, row_index(plan, tile, walk.kv_head, min(MmaState::query(i), tile.num_rows - 1)).head);
              }
            }
          }
          const int key = stream.key();
          if (!fills && key >= walk.part_end) break;
          const std::uint32_t k_slot = slot, k_address = stream.slot_address(slot);
          slot = slot + 1 == kSlots ? 0 : slot + 1;
          const std::uint32_t v_slot = slot, v_address = stream.slot_address(slot);
          slot = slot + 1 == kSlots ? 0 : slot + 1;

          float scores[kKeys / 16][kTiles][4];
          if (!fills) {
            stream.wait(k_slot);
            state.template multiply_qk<kKeys>(scores, k_address + k_offset);
            __syncwarp();
          }
          stream.refill_k(k_slot, k_address);

          if (!fills) {
            if (score.transform) state.template transform_scores<kKeys>(scores, warp_row_params, p.softcap, key);
            constexpr std::uint32_t kAll = kKeys == 32 ? 0xffffffffu : (1u << (kKeys % 32)) - 1;
            const std::uint32_t valid = stream.valid_keys(key);
            if (valid != kAll || key < walk.full.begin || key > walk.full.end - kKeys) {
              state.template mask_scores<kKeys>(scores, warp_row_params, key, valid);
              if (p.mask != nullptr) state.template apply_mask<kKeys>(scores, p, warp_row_params, key);
            }
            state.template softmax<kKeys>(scores, score);

            stream.wait(v_slot);
            if constexpr (kBoxes) {
              stream.hide_values(key, v_slot);
            } else if (selecting) {
              take_out_not_finite<kKvDType, kHeadDim>(p, shared + (v_address - shared_base), 0, kKeys, key, row_params, notes,
                                                      tile.num_rows);
              __syncwarp();
            }
            state.template multiply_pv<kKeys>(scores, v_address + v_offset);
            __syncwarp();
          }
          stream.refill_v(v_slot, v_address);
        }
        if constexpr (kBoxes) {
          sync();  // the other warp of the team may still read where this one's sums go
        } else {
          device::copy_async_wait<0>();
        }
        if (kBoxes || kPairedWarps || !kMayBeNotFinite<kKvDType> || selecting || (walk.all_see_the_same && !invariant()) ||
            !sync_or(state.not_finite()))
          break;
      }

      // Every warp leaves its sums in its own ring.
      state.reduce_sum();
      if (lane < 4) {
#pragma unroll
        for (int i = 0; i < MmaState::kQueries; ++i)
          stats[warp][first_row() + MmaState::query(i)] = float2{state.largest[i] * score.log2_scale[i], state.sum[i]};
      }
      __syncwarp();
#pragma unroll
      for (int i = 0; i < MmaState::kQueries; ++i) {
        const int row = first_row() + MmaState::query(i);
        if (kPairedWarps && MmaState::query(i) >= static_cast<int>(plan.kv_group.divisor)) continue;
        if (row < tile.num_rows) {
          float* target = merged + warp * (Shape::kRingBytes / 4) + row * Shape::kOutPitch;
#pragma unroll
          for (int c = 0; c < MmaState::kSteps; ++c)
#pragma unroll
            for (int half = 0; half < 2; ++half) target[MmaState::column(c, half)] = state.out[c][i / 2][2 * half + i % 2];
        }
      }
      if constexpr (kBoxes) stream.boxes.give_back();
      sync();

      const int part = walk.part;
      const bool is_last_part = !invariant() || part + 1 == walk.unit_end;
      // Write rows, of out or of partial results; and if those were the tile's last, read all of them and write rows of out.
      const bool whole = walk.unit_begin == walk.unit_first && walk.unit_end == walk.unit_last;
      const bool folds = invariant() && walk.unit_begin == walk.unit_first;  // a tile's beginning, part by part
      constexpr int kThreadsPerRow = Shape::kColumns / 4;
      bool merging = false;
#pragma unroll 1
      for (;; merging = true) {
#pragma unroll 1
        for (int i = thread(); i < tile.num_rows * kThreadsPerRow; i += Shape::kCtaThreads) {
          const int row = i / kThreadsPerRow;
          const int column = i % kThreadsPerRow * 4;
          Partial result;
          if (merging) {
            result = invariant() ? fold_parts<kKeys>(plan, walk, row, column) : sum_parts<Shape>(plan, walk, row, column);
          } else {
            int merged_column = column, first_warp = 0;
            if (kPaired && is_upper(plan, row_index(plan, tile, walk.kv_head, row).head)) merged_column += Shape::kColumns;
            if (kPairedWarps && row >= static_cast<int>(plan.kv_group.divisor)) first_warp = 1;
            const float* const of_warps = merged + row * Shape::kOutPitch + merged_column;
            const auto sums_of = [&](int w) { return *reinterpret_cast<const float4*>(of_warps + w * (Shape::kRingBytes / 4)); };
            if (invariant()) {
              // One warp after the other, as in attend_to_parts.
              result = Partial{sums_of(0), stats[0][row].x, stats[0][row].y};
#pragma unroll 1
              for (int w = 1; w < kCtaWarps; ++w) fold(result, Partial{sums_of(w), stats[w][row].x, stats[w][row].y});
            } else {
              result = Partial{float4{0.0f, 0.0f, 0.0f, 0.0f}, stats[first_warp][row].x, 0.0f};
#pragma unroll 4
              for (int w = first_warp + kWarpStep; w < kCtaWarps; w += kWarpStep) result.top = fmaxf(result.top, stats[w][row].x);
              const float base = result.top == -INFINITY ? 0.0f : result.top;
#pragma unroll 4
              for (int w = first_warp; w < kCtaWarps; w += kWarpStep) add_part(result, base, sums_of(w), stats[w][row]);
            }
            if (selecting) result.value = with_notes<kHeadDim>(result.value, notes, row, merged_column);
          }
          const int slot = part == walk.unit_first || folds ? first_slot(plan) : part - walk.unit_begin;
          const std::int64_t target = partial_row(plan, cta, slot, row);
          if (!merging && folds) {
            if (part > walk.unit_first) {
              // The thread finds what it left here.
              Partial before = load_partial(plan, target, column);
              before.top = folded_stats[part % 2][row].x;
              before.sum = folded_stats[part % 2][row].y;
              fold(before, result);
              result = before;
            }
            if (column == 0) folded_stats[(part + 1) % 2][row] = float2{result.top, result.sum};
          }
          if (merging || whole && (!invariant() || part + 1 == walk.unit_last)) {
            finish(plan, tile, walk.kv_head, row, column, result);
          } else {
            store_partial(plan, target, column, result);
          }
        }
        sync();
        if (whole || merging || !is_last_part) break;
        if (thread() == 0) {
          __threadfence();
          find_ctas(plan, walk, invariant());
          const auto units = static_cast<unsigned>(walk.unit_end - walk.unit_begin);
          const auto all_units = static_cast<unsigned>(walk.unit_last - walk.unit_first);
          walk.merges = atomicAdd(plan.counters + walk.first_cta, units) + units == all_units;
          if (walk.merges) plan.counters[walk.first_cta] = 0;
          __threadfence();
        }
        sync();
        if (!walk.merges) break;
      }
      if (is_last_part) break;
      if (thread() == 0) enter_part<kKeys>(walk, part + 1, invariant());
      sync();
    }
  }
}

}  // namespace quire::cuda::attn
