// Keys and values brought by the copy engine: boxes of a block's slots, for one kv head or for two whose warps are a team.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda.h>

#include "cuda/attention/mma_tile.cuh"
#include "cuda/attention/share.cuh"
#include "cuda/device/tma.cuh"

namespace quire::cuda::attn {

/// The lane, read anew each time: what is derived from it is then computed where it is needed, not kept in registers that the loop lacks.
__device__ __forceinline__ int lane_here() {
  unsigned lane;
  asm volatile("mov.u32 %0, %%laneid;\n" : "=r"(lane));
  return static_cast<int>(lane);
}

/// The thread likewise.
__device__ __forceinline__ int thread_here() {
  unsigned thread;
  asm volatile("mov.u32 %0, %%tid.x;\n" : "=r"(thread));
  return static_cast<int>(thread);
}

/// K's and V's rows in boxes of 2^box_shift slots (make_key_map).
struct KeyMaps {
  CUtensorMap k, v;
  int box_shift;
};

/// Rows of a step as boxes bring them: panels of up to 128 bytes of columns, one after the other. Each is as Rows, which is how boxes are swizzled.
/// A box has the rows of one head after the other's; 16 keys further on are 16 rows of each head.
template <int kRowBytes, int kKeys, int kHeads>
struct PanelRows {
  static constexpr int kPanelRowBytes = kRowBytes < 128 ? kRowBytes : 128;
  static constexpr int kPanels = kRowBytes / kPanelRowBytes;
  static constexpr int kPanelBytes = kKeys * kHeads * kPanelRowBytes;
  using Panel = Rows<kPanelRowBytes>;

  __device__ __forceinline__ static int row(int key, int head, int box_shift) {
    return ((key >> box_shift) * kHeads + head << box_shift) + (key & ((1 << box_shift) - 1));
  }
  __device__ __forceinline__ static std::uint32_t address(std::uint32_t base, int row, int chunk) {
    return Panel::address(base, row, chunk % Panel::kChunks) + static_cast<std::uint32_t>(chunk / Panel::kChunks * kPanelBytes);
  }
  __device__ __forceinline__ static std::uint32_t advance(std::uint32_t thread_address, int keys, int chunks) {
    return Panel::advance(thread_address, keys * kHeads, chunks % Panel::kChunks) +
           static_cast<std::uint32_t>(chunks / Panel::kChunks * kPanelBytes);
  }
};

template <typename Shape>
struct BoxStream;

#if __CUDA_ARCH__ >= 900

/// A team's keys, brought by boxes into one ring of slots K0 V0 K1 V1 ..., each counted at a barrier of its own. Whichever of the team's warps is the
/// last to be done with a slot asks for its next box. `Keys` says which keys those are: begin() and end(), of which sequence, seq, and kv heads, from
/// `head` on; how far on the team's next step is, stride(); and whether they are to leave the L2 cache to what is there, read_once().
template <typename Shape>
struct BoxStream {
  using Types = typename Shape::Types;
  using KvRows = typename Shape::KvRows;
  static constexpr int kTeam = Shape::kTeamHeads;
  static constexpr int kKeysShift = Shape::kKeys == 32 ? 5 : 4;
  static_assert(Shape::kKeys == 1 << kKeysShift);

  const Plan& plan;
  const KeyMaps& maps;
  char* shared;
  std::uint32_t shared_base;
  int next_key = 0;            // of the step whose boxes come next
  int next_entry = 0;          // the lane's, of the boxes after those in shared memory
  std::uint32_t box = 0;       // where the step's first box is, from the warp's first
  std::uint32_t parities = 0;  // of the slots' barriers
  bool complete = true;        // whether all blocks so far exist

  __device__ __forceinline__ BoxStream(const Plan& of_plan, const KeyMaps& of_maps, char* of_shared)
      : plan(of_plan), maps(of_maps), shared(of_shared), shared_base(device::shared_address(of_shared)) {}

  __device__ __forceinline__ static int team() { return thread_here() / (32 * kTeam); }
  __device__ __forceinline__ std::uint32_t slot_address(std::uint32_t slot) const {
    return shared_base + static_cast<std::uint32_t>(team() * (kTeam * Shape::kRingBytes)) + slot * Shape::kTeamSlotBytes;
  }
  __device__ __forceinline__ std::uint32_t barrier(std::uint32_t slot) const {
    return shared_base + static_cast<std::uint32_t>(Shape::kSlotBarriersOffset + team() * (Shape::kSlots * 8)) + slot * 8;
  }
  __device__ __forceinline__ std::uint32_t boxes() const {
    return shared_base + static_cast<std::uint32_t>(Shape::kBoxesOffset + thread_here() / 32 * 256);
  }
  __device__ __forceinline__ int boxes_shift() const { return kKeysShift - maps.box_shift; }  // of a step
  /// From next_key, of the lane's box; and from there that of the next 32. They are some steps', or one's.
  __device__ __forceinline__ int lane_offset(int stride) const {
    const int i = lane_here();
    return (i >> boxes_shift()) * stride + ((i & ((1 << boxes_shift()) - 1)) << maps.box_shift);
  }
  __device__ __forceinline__ int lanes_stride(int stride) const { return (32 >> boxes_shift()) * stride; }

  /// By each team's first thread, before all else. A barrier of the CTA comes before the first step.
  __device__ __forceinline__ void init() const {
#pragma unroll
    for (int i = 0; i < Shape::kSlots; ++i) device::barrier_init(barrier(i), 1);
    if constexpr (kTeam > 1) {
#pragma unroll
      for (int i = 0; i < Shape::kSlots; ++i) done(i) = 0;
    }
  }
  __device__ __forceinline__ void invalidate() const {
#pragma unroll
    for (int i = 0; i < Shape::kSlots; ++i) device::barrier_invalidate(barrier(i));
  }

  __device__ __forceinline__ int entry_of(int seq, int key, int key_end) const {
    const AttentionParams& p = plan.params;
    return key < key_end ? p.block_tables[seq * p.block_tables_stride + plan.block_size.quotient(key)] : -1;
  }

  /// Asks for the table entries of the first steps, from `first_key` on; returns the lane's.
  __device__ __forceinline__ int start(int seq, int stride, int first_key, int key_end) {
    next_key = first_key;
    box = 0;
    complete = true;
    const int key = first_key + lane_offset(stride);
    const int entry = entry_of(seq, key, key_end);
    next_entry = entry_of(seq, key + lanes_stride(stride), key_end);
    return entry;
  }

  /// Leaves the lane's box in shared memory. One that does not exist is outside of the tensor, where zeros come from.
  template <typename Keys>
  __device__ __forceinline__ void place_box(const Keys& keys, int key, int entry) {
    const AttentionParams& p = plan.params;
    const int block = plan.block_size.quotient(key);
    const bool wanted = key < keys.end() && key + (1 << maps.box_shift) > keys.begin();
    const bool valid = entry >= 0 && entry < p.num_blocks;
    if (wanted && !valid && entry != -1)
      record_error(plan.error_word, plan.op, ArgId::kBlockTables, keys.seq() * p.max_blocks_per_seq + block, entry);
    complete &= __all_sync(kAllLanes, valid || !wanted);
    device::store_shared_8(boxes() + static_cast<std::uint32_t>(lane_here() * 8),
                           int2{plan.block_size.remainder(key, block), valid && wanted ? entry : -1});
    __syncwarp();
  }

  /// Starts the copy of the next step's K or V, if there is one.
  template <typename Keys>
  __device__ __forceinline__ void copy(const Keys& keys, const CUtensorMap& map, std::uint32_t slot) const {
    if (next_key >= keys.end()) return;
    if (device::elect_lane()) {
      const std::uint64_t policy = keys.read_once() ? device::read_once_policy() : device::usual_policy();
      std::uint32_t target = slot_address(slot), source = boxes() + box;
      const std::uint32_t slot_barrier = barrier(slot), end = target + KvRows::kPanelBytes;
      device::barrier_arrive_expect(slot_barrier, Shape::kTeamSlotBytes);
#pragma unroll 1
      do {
        const int2 place = device::load_shared_8(source);
#pragma unroll
        for (int panel = 0; panel < KvRows::kPanels; ++panel)
          device::copy_box_by(target + static_cast<std::uint32_t>(panel * KvRows::kPanelBytes), &map, slot_barrier,
                              panel * KvRows::kPanelRowBytes / Types::kElementBytes, place.x, keys.head(), place.y, policy);
        source += 8, target += static_cast<std::uint32_t>(kTeam * KvRows::kPanelRowBytes) << maps.box_shift;
      } while (target < end);
    }
    __syncwarp();
  }

  template <typename Keys>
  __device__ __forceinline__ void next_step(const Keys& keys) {
    next_key += keys.stride();
    box += 8u << boxes_shift();
    if (box < 256) return;
    box = 0;
    const int key = next_key + lane_offset(keys.stride());
    place_box(keys, key, next_entry);
    next_entry = entry_of(keys.seq(), key + lanes_stride(keys.stride()), keys.end());
  }

  /// Fills the ring. `entry` is what start returned.
  template <typename Keys>
  __device__ __forceinline__ void fill(const Keys& keys, int entry) {
    place_box(keys, next_key + lane_offset(keys.stride()), entry);
#pragma unroll
    for (int i = 0; i < Shape::kSlots; ++i) {
      if (kTeam == 1 || thread_here() / 32 % kTeam == 0) copy(keys, i % 2 == 0 ? maps.k : maps.v, static_cast<std::uint32_t>(i));
      if (i % 2 != 0) next_step(keys);
    }
  }

  /// The first key of the step in use, before its K's slot is filled again.
  template <typename Keys>
  __device__ __forceinline__ int key(const Keys& keys) const {
    return next_key - Shape::kSlots / 2 * keys.stride();
  }

  __device__ __forceinline__ void wait(std::uint32_t slot) {
    device::barrier_wait(barrier(slot), parities >> slot & 1u);
    parities ^= 1u << slot;
  }

  /// Once the warp is done with a step's K, or V: what the slot has next.
  template <typename Keys>
  __device__ __forceinline__ void refill_k(const Keys& keys, std::uint32_t slot) {
    constexpr bool kEven = Shape::kSlots % 2 == 0;
    __syncwarp();
    if (is_last(slot)) copy(keys, kEven ? maps.k : maps.v, slot);
    if constexpr (!kEven) next_step(keys);
  }
  template <typename Keys>
  __device__ __forceinline__ void refill_v(const Keys& keys, std::uint32_t slot) {
    constexpr bool kEven = Shape::kSlots % 2 == 0;
    __syncwarp();
    if (is_last(slot)) copy(keys, kEven ? maps.v : maps.k, slot);
    if constexpr (kEven) next_step(keys);
  }

  /// After a thread's last other use of the ring; a barrier of the CTA comes before the next box.
  __device__ __forceinline__ void give_back() const { device::fence_async_proxy(); }

  /// Which keys of a step exist, by the table: where not all blocks do.
  template <typename Keys>
  __device__ __forceinline__ std::uint32_t valid_keys(const Keys& keys, int key) const {
    const int lane = lane_here(), mine = key + lane;
    const int entry = entry_of(keys.seq(), lane < Shape::kKeys && mine >= keys.begin() ? mine : INT_MAX, keys.end());
    return __ballot_sync(kAllLanes, entry >= 0 && entry < plan.params.num_blocks);
  }

  /// Zeros for the warp's V of keys outside of the range: their weight is 0, and what lies there may not be finite.
  template <typename Keys>
  __device__ __forceinline__ void hide_values(const Keys& keys, int key, std::uint32_t slot) const {
    constexpr int kChunks = Types::kKvRowBytes / 16, kRowsPerPass = 32 / kChunks;
    const int lane = lane_here(), begin = keys.begin() - key, end = keys.end() - key;
    const int member = kTeam == 1 ? 0 : thread_here() / 32 % kTeam;
    const std::uint32_t rows = slot_address(slot);
#pragma unroll 2
    for (int row = lane / kChunks; row < Shape::kKeys; row += kRowsPerPass)
      if (row < begin || row >= end)
        device::store_shared_16(KvRows::address(rows, KvRows::row(row, member, maps.box_shift), lane % kChunks), uint4{0, 0, 0, 0});
    device::fence_async_proxy();
    __syncwarp();
  }

 private:
  __device__ __forceinline__ unsigned& done(std::uint32_t slot) const {
    return reinterpret_cast<unsigned*>(shared + Shape::kCountersOffset)[team() * Shape::kSlots + slot];
  }

  /// Whether the other warps of the team are done with a slot, too. Shared memory takes a warp's accesses in their order, so that it has read before
  /// it counts.
  __device__ __forceinline__ bool is_last(std::uint32_t slot) const {
    if constexpr (kTeam == 1) return true;
    unsigned before = 0;
    if (lane_here() == 0) before = atomicAdd(&done(slot), 1u);
    return (__shfl_sync(kAllLanes, before, 0) + 1) % kTeam == 0;
  }
};

#endif  // sm_90

}  // namespace quire::cuda::attn
