// The warps of Hopper's attention kernel that bring things: tiles, keys, values and query rows; and those that widen keys and values.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cuda/attention/wgmma_shape.cuh"

namespace quire::cuda::attn {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

/// A box of each lane's: the slot of its first key, its block (-1: nothing to copy), and whether its keys may be seen.
struct Box {
  int slot, entry;
  bool valid;
};

/// How a warp finds a tile's boxes. kBlocks: they are blocks of kUsualBlock slots; else parts of blocks of any
/// size, or there are no blocks.
template <typename Shape, bool kBlocks>
struct BoxFinder {
  static constexpr int kKeys = Shape::kKeys;
  const Plan& plan;
  const Tile& tile;
  int keys_per_box;
  const std::int32_t* row;  // of the block table

  __device__ __forceinline__ BoxFinder(const Plan& of_plan, const Tile& of_tile, int of_keys)
      : plan(of_plan),
        tile(of_tile),
        keys_per_box(of_keys),
        row(of_plan.params.block_tables + of_tile.seq * of_plan.params.block_tables_stride) {}

  /// The lane's first key of a step; the tile's end if there is none.
  __device__ __forceinline__ int key(int step) const {
    const int offset = static_cast<int>(threadIdx.x) % 32 * keys_per_box;
    return offset < kKeys ? min(step * kKeys + offset, tile.key_end) : tile.key_end;
  }
  /// Asks for its table entry.
  __device__ __forceinline__ int load(int step) const {
    if constexpr (kBlocks) return key(step) < tile.key_end ? row[key(step) / kUsualBlock] : 0;
    return load_entry(plan, tile, key(step), tile.key_end);
  }
  __device__ __forceinline__ Box finish(int step, int entry) const {
    if (key(step) >= tile.key_end) return Box{0, -1, true};
    const KeyLocation location = locate_key(plan, tile, key(step), tile.key_end, entry);
    return Box{kBlocks ? 0 : location.slot, location.valid ? location.entry : -1, location.valid};
  }
};

/// Warp 0: finds tiles and hands them to all others.
template <typename Shape>
struct WgmmaScheduler {
  using Control = WgmmaControl<Shape>;

  const Plan& plan;
  Control* control;
  Ring<kTileSlots> tiles{};

  /// Waits until the next slot's readers are done with what was in it.
  __device__ TileSlot& acquire() {
    device::barrier_wait(device::shared_address(&control->tile_empty[tiles.stage]), tiles.parity ^ 1);
    return control->tiles[tiles.stage];
  }
  /// Hands a tile to all others, in the acquired slot.
  __device__ void publish(const Tile& tile, int kv_head, TileKind kind) {
    __syncwarp();
    if (threadIdx.x == 0) {
      control->tiles[tiles.stage] = TileSlot{tile, kv_head, kind, 0};
      device::barrier_arrive(device::shared_address(&control->tile_full[tiles.stage]));
    }
    __syncwarp();
    tiles.advance();
  }

  /// Tiles and kv heads in the order of work: the last tiles of sequences first, which under a causal mask are the long ones.
  __device__ bool locate(std::uint32_t work, Tile& tile, int& kv_head) const {
    const auto num_kv_heads = static_cast<std::uint32_t>(plan.params.num_kv_heads);
    const std::uint32_t reversed = work / num_kv_heads;
    kv_head = static_cast<int>(work - reversed * num_kv_heads);
    return locate_tile(plan, plan.num_tiles - 1 - static_cast<int>(reversed), tile);
  }

  /// Hands out again what the slot's tile needs, if it does.
  __device__ bool repeat(const TileSlot& slot) {
    if (slot.again == 0) return false;
    const Tile tile = slot.tile;
    publish(tile, slot.kv_head, TileKind::kSelecting);
    return true;
  }

  /// A CTA takes the tile of its own number first, then the next that none has taken. Every CTA takes one more number in vain, so that there
  /// are as many as tiles: the last one makes the counter zero again.
  __device__ void run() {
    const auto total = static_cast<std::uint32_t>(plan.num_tiles) * static_cast<std::uint32_t>(plan.params.num_kv_heads);
    const auto take_next = [&] {
      std::uint32_t taken = 0;
      if (threadIdx.x == 0 && gridDim.x < total) {
        unsigned* const tickets = plan.counters + kMaxCtas;
        taken = atomicAdd(tickets, 1u);
        if (taken == total - 1) *tickets = 0;
      }
      return gridDim.x + taken;  // of lane 0
    };
    std::uint32_t work = blockIdx.x, next = take_next();
    while (work < total) {
      Tile tile;
      int kv_head;
      if (locate(work, tile, kv_head)) {
        while (repeat(acquire())) {
        }
        publish(tile, kv_head, TileKind::kUsual);
      }
      work = __shfl_sync(kAllLanes, next, 0);
      next = work < total ? take_next() : total;
    }
    // Consumers give this one back when they have finished every tile before it.
    while (repeat(acquire())) {
    }
    publish(Tile{}, 0, TileKind::kNone);
    const int last = (tiles.stage + kTileSlots - 1) % kTileSlots;
    device::barrier_wait(device::shared_address(&control->tile_empty[last]), tiles.stage == 0 ? tiles.parity ^ 1 : tiles.parity);
    for (int clean = control->any_again == 0 ? kTileSlots : 0; clean < kTileSlots; ++clean)
      if (!repeat(acquire())) publish(Tile{}, 0, TileKind::kNone);
    acquire();
    publish(Tile{}, 0, TileKind::kEnd);
  }
};

/// The copies of K or V, step by step: to where they are multiplied, or widened from. kBlocks: boxes are blocks of kUsualBlock slots.
template <typename Shape, bool kIsK, bool kBlocks>
struct StepCopies {
  static constexpr int kKeys = Shape::kKeys;
  static constexpr bool kWiden = kIsK ? Shape::kWidenK : Shape::kWidenV;
  static constexpr int kStages = kWiden ? Shape::kNarrowStages : Shape::kStages;
  static constexpr int kPanels = kWiden ? Shape::kNarrowPanels : kIsK ? Shape::kQkPanels : Shape::kVPanels;
  static constexpr int kPanelElements = device::kPanelRowBytes / (Shape::kWidenV ? 1 : 2);
  static constexpr int kOffset = kIsK ? (kWiden ? Shape::kNarrowKOffset : 0) : kWiden ? Shape::kNarrowVOffset : Shape::kVOffset;
  /// Boxes whose copies are one piece of code, by what is fastest.
  static constexpr int kAtOnce = !kBlocks ? 2 : kPanels == 1 ? kKeys / kUsualBlock : Shape::kConsumers == 3 ? 2 : 1;

  const WgmmaInputs& inputs;
  WgmmaControl<Shape>* control;
  std::uint32_t slots, full, empty;
  Ring<kStages> ring{};

  __device__ __forceinline__ StepCopies(const WgmmaInputs& from, char* shared, WgmmaControl<Shape>* to)
      : inputs(from),
        control(to),
        slots(device::shared_address(shared) + kOffset),
        full(device::shared_address(kWiden ? (kIsK ? to->narrow_k_full : to->narrow_v_full) : (kIsK ? to->k_full : to->v_full))),
        empty(device::shared_address(kWiden ? (kIsK ? to->narrow_k_empty : to->narrow_v_empty) : (kIsK ? to->k_empty : to->v_empty))) {}

  /// Starts the copies of one step, of which each lane knows a box. `valid`: a bit for each 8 keys that have a block.
  __device__ __forceinline__ void start(int kv_head, const Box& box, unsigned valid) {
    const auto stage = static_cast<std::uint32_t>(ring.stage);
    const std::uint32_t stage_full = full + stage * 8, slot = slots + stage * (kPanels * Shape::kKeyPanelBytes);
    const int keys_per_box = kBlocks ? kUsualBlock : inputs.keys_per_box;
    const CUtensorMap& map = kIsK ? inputs.k : inputs.v;
    device::barrier_wait(empty + stage * 8, ring.parity ^ 1);
    // One lane starts them all: the compiler makes of copies by lanes a loop over lanes, one for each panel.
    __syncwarp();
    const bool elected = device::elect_lane();
    if (elected) {
      if (kIsK) (kWiden ? control->narrow_valid_keys : control->valid_keys)[stage] = valid;
      device::barrier_arrive_expect(stage_full, kPanels * Shape::kKeyPanelBytes);
    }
#pragma unroll 1
    for (int first = 0; first * keys_per_box < kKeys; first += kAtOnce) {
      int of_slot[kAtOnce], of_block[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        of_slot[i] = kBlocks ? 0 : __shfl_sync(kAllLanes, box.slot, first + i);
        of_block[i] = __shfl_sync(kAllLanes, box.entry, first + i);
      }
      if (!elected) continue;
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int key = (first + i) * keys_per_box;
        // A box whose block is -1 is outside the tensor: zeros.
        if (key >= kKeys) break;
        const std::uint32_t dst = slot + static_cast<std::uint32_t>(key * device::kPanelRowBytes);
#pragma unroll
        for (int panel = 0; panel < kPanels; ++panel)
          device::copy_box(dst + panel * Shape::kKeyPanelBytes, &map, stage_full, panel * kPanelElements, kv_head, of_slot[i], of_block[i]);
      }
    }
    ring.advance();
  }
};

/// Warp 1 copies each tile's keys, from the last to the first step, and its values, unless warp 2 does.
template <typename Shape, bool kKeysToo, bool kValuesToo, bool kBlocks>
__device__ void copy_steps(const Plan& plan, const WgmmaInputs& inputs, char* shared, WgmmaControl<Shape>* control) {
  constexpr int kKeys = Shape::kKeys;
  [[maybe_unused]] StepCopies<Shape, true, kBlocks> keys(inputs, shared, control);
  [[maybe_unused]] StepCopies<Shape, false, kBlocks> values(inputs, shared, control);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int keys_per_box = kBlocks ? kUsualBlock : inputs.keys_per_box;
  const int box_of_group = lane * 8 / keys_per_box % 32;  // the box that has the lane's 8 keys of valid_keys
  Ring<kTileSlots> tiles;
  for (;;) {
    const TileSlot slot = take_tile<Shape>(control, tiles);
    if (slot.kind == TileKind::kEnd) return;
    if (slot.kind == TileKind::kNone) continue;
    const int first = slot.tile.key_begin / kKeys;
    int step = (slot.tile.key_end + kKeys - 1) / kKeys - 1;
    if (step < first) continue;
    const BoxFinder<Shape, kBlocks> finder(plan, slot.tile, keys_per_box);
    int entry = finder.load(step);
    for (;; --step) {
      // What a step takes besides its copies is done before its stage is empty; the next one's entry is under way meanwhile.
      const Box box = finder.finish(step, entry);
      if (step > first) entry = finder.load(step - 1);
      [[maybe_unused]] unsigned valid = 0;
      if constexpr (kKeysToo)
        valid = __ballot_sync(kAllLanes, __shfl_sync(kAllLanes, box.valid ? 1 : 0, box_of_group) != 0 || lane >= kKeys / 8);
      if constexpr (kKeysToo) keys.start(slot.kv_head, box, valid);
      if constexpr (kValuesToo) values.start(slot.kv_head, box, 0);
      if (step == first) break;
    }
  }
}

/// Four 8-bit elements as two pairs of 16-bit ones, in which every 8-bit value is exact.
template <device::Byte kByte, bool kBf16>
__device__ __forceinline__ uint2 widen_4(std::uint32_t packed) {
  uint2 pairs;
  device::dequantize_4<kByte>(packed, pairs.x, pairs.y);
  if constexpr (kBf16) {
    const auto to_bf16 = [](std::uint32_t bits) {
      const float2 values = __half22float2(reinterpret_cast<const __half2&>(bits));
      return device::pack_16<true>(values.x, values.y);
    };
    pairs = uint2{to_bf16(pairs.x), to_bf16(pairs.y)};
  }
  return pairs;
}

/// A warp widens its part of one step's K or V. Eight lanes take one chunk of 16 bytes of eight rows, so that neither
/// loads nor stores meet in a bank.
template <typename Shape, device::Byte kByte>
__device__ __forceinline__ void widen_slot(const char* narrow, char* wide) {
  constexpr int kQuarters = (Shape::kHeadDim + 63) / 64;  // of 64 columns: four chunks
  constexpr int kWarps = Shape::kWidenerWarps;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32 % kWarps;
  static_assert(Shape::kKeys / 8 * kQuarters % kWarps == 0);
#pragma unroll 2
  for (int i = warp; i < Shape::kKeys / 8 * kQuarters; i += kWarps) {
    const int row = i / kQuarters * 8 + lane % 8, panel = i % kQuarters, chunk = panel % 2 * 4 + lane / 8;
    const uint4 packed = *reinterpret_cast<const uint4*>(narrow + panel / 2 * Shape::kKeyPanelBytes + row * device::kPanelRowBytes +
                                                         ((chunk ^ lane % 8) << 4));
    const uint2 a = widen_4<kByte, Shape::kBf16>(packed.x), b = widen_4<kByte, Shape::kBf16>(packed.y);
    const uint2 c = widen_4<kByte, Shape::kBf16>(packed.z), d = widen_4<kByte, Shape::kBf16>(packed.w);
    char* const target = wide + panel * Shape::kKeyPanelBytes + row * device::kPanelRowBytes;
    *reinterpret_cast<uint4*>(target + ((lane / 8 * 2 ^ lane % 8) << 4)) = uint4{a.x, a.y, b.x, b.y};
    *reinterpret_cast<uint4*>(target + (((lane / 8 * 2 + 1) ^ lane % 8) << 4)) = uint4{c.x, c.y, d.x, d.y};
  }
}

/// What a warp that widens does: of each step's K, unless it is multiplied as it is, and V.
template <typename Shape, device::Byte kByte>
struct Widener {
  char* shared;
  WgmmaControl<Shape>* control;
  Ring<Shape::kNarrowStages> from{};
  Ring<Shape::kStages> to{};

  template <bool kIsK>
  __device__ __forceinline__ void widen() const {
    const auto at = [](auto& barriers, int stage) { return device::shared_address(&barriers[stage]); };
    device::barrier_wait(at(kIsK ? control->narrow_k_full : control->narrow_v_full, from.stage), from.parity);
    device::barrier_wait(at(kIsK ? control->k_empty : control->v_empty, to.stage), to.parity ^ 1);
    widen_slot<Shape, kByte>(shared + (kIsK ? Shape::kNarrowKOffset : Shape::kNarrowVOffset) + from.stage * Shape::kNarrowSlotBytes,
                             shared + (kIsK ? to.stage * Shape::kKSlotBytes : Shape::kVOffset + to.stage * Shape::kVSlotBytes));
    if (kIsK && threadIdx.x % 128 == 0) control->valid_keys[to.stage] = control->narrow_valid_keys[from.stage];
    device::fence_async_proxy();
    __syncwarp();
    if (threadIdx.x % 32 == 0) {
      device::barrier_arrive(at(kIsK ? control->narrow_k_empty : control->narrow_v_empty, from.stage));
      device::barrier_arrive(at(kIsK ? control->k_full : control->v_full, to.stage));
    }
  }
  __device__ __forceinline__ void widen_tile(const TileSlot& slot) {
    const int first = slot.tile.key_begin / Shape::kKeys;
    for (int step = (slot.tile.key_end + Shape::kKeys - 1) / Shape::kKeys - 1; step >= first; --step) {
      if constexpr (Shape::kWidenK) widen<true>();
      widen<false>();
      from.advance(), to.advance();
    }
  }
};

/// The second warpgroup of calls with 8-bit keys, or warp 2.
template <typename Shape, device::Byte kByte>
__device__ void widen_steps(char* shared, WgmmaControl<Shape>* control) {
  Ring<kTileSlots> tiles;
  Widener<Shape, kByte> widener{shared, control};
  for (;;) {
    const TileSlot slot = take_tile<Shape>(control, tiles);
    if (slot.kind == TileKind::kEnd) return;
    if (slot.kind != TileKind::kNone) widener.widen_tile(slot);
  }
}

constexpr int kQueryLoaders = 32;  // one warp

/// Warp 3: each tile's query rows, if they are a box of q. Rows past the tile's last are other queries or zeros. With kWidenBeside it widens values besides.
template <typename Shape>
__device__ void copy_queries(const Plan& plan, const WgmmaInputs& inputs, char* shared, WgmmaControl<Shape>* control) {
  constexpr int kPanelElements = device::kPanelRowBytes / (Shape::kNarrowQ ? 1 : 2);
  const auto group = static_cast<int>(plan.group.divisor);
  Ring<kTileSlots> tiles;
  Ring<Shape::kQStages> queries;
  [[maybe_unused]] Widener<Shape, device::Byte::kE4M3> widener{shared, control};
  for (;;) {
    const TileSlot slot = take_tile<Shape>(control, tiles);
    if (slot.kind == TileKind::kEnd) return;
    if (slot.kind == TileKind::kNone || slot.tile.key_end == 0) continue;
    const std::uint32_t q = device::shared_address(shared + Shape::kQOffset + queries.stage * Shape::kQBytes);
    const std::uint32_t full = device::shared_address(&control->q_full[queries.stage]);
    device::barrier_wait(device::shared_address(&control->q_empty[queries.stage]), queries.parity ^ 1);
    if (threadIdx.x % 32 == 0) {
      device::barrier_arrive_expect(full, Shape::kQBytes);
      const int token = plan.group.quotient(slot.tile.row_begin);
      const int head = slot.kv_head * group + plan.group.remainder(slot.tile.row_begin, token);
      const int q_token = (plan.params.shared_queries > 0 ? 0 : slot.tile.first_token) + token;
#pragma unroll
      for (int panel = 0; panel < Shape::kQkPanels; ++panel)
        device::copy_box(q + panel * Shape::kRowPanelBytes, &inputs.q, full, panel * kPanelElements, head, q_token);
    }
    __syncwarp();
    queries.advance();
    if constexpr (Shape::kWidenBeside) widener.widen_tile(slot);
  }
}

/// Warp 3: each tile's query rows, wherever they lie.
template <typename Shape>
__device__ void gather_queries(const Plan& plan, char* shared, WgmmaControl<Shape>* control) {
  const AttentionParams& p = plan.params;
  constexpr int kItem = Shape::kNarrowQ ? 1 : 2;
  constexpr int kChunks = Shape::kQkPanels * 8;
  constexpr int kLanes = kChunks <= 8 ? 8 : kChunks <= 16 ? 16 : 32;  // of a row
  constexpr int kRowsAtOnce = 32 / kLanes;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const auto group = static_cast<int>(plan.group.divisor);
  const int head_step = kRowsAtOnce % group;
  const std::int64_t row_step = (kRowsAtOnce / group * p.q_token_stride + head_step * p.q_head_stride) * kItem;
  const std::int64_t wrap_step = (p.q_token_stride - group * p.q_head_stride) * kItem;
  Ring<kTileSlots> tiles;
  Ring<Shape::kQStages> queries;
  [[maybe_unused]] Widener<Shape, device::Byte::kE4M3> widener{shared, control};
  for (;;) {
    const TileSlot slot = take_tile<Shape>(control, tiles);
    if (slot.kind == TileKind::kEnd) return;
    if (slot.kind == TileKind::kNone || slot.tile.key_end == 0) continue;
    const std::uint32_t q = device::shared_address(shared + Shape::kQOffset + queries.stage * Shape::kQBytes);
    device::barrier_wait(device::shared_address(&control->q_empty[queries.stage]), queries.parity ^ 1);
    // A lane has the same columns of every kRowsAtOnce-th row.
    const int chunk = lane % kLanes;
    const int num_bytes = min(max(static_cast<int>(p.head_dim) * kItem - chunk * 16, 0), 16);
    int token = plan.group.quotient(slot.tile.row_begin + lane / kLanes);
    int head = plan.group.remainder(slot.tile.row_begin + lane / kLanes, token);
    const char* source = static_cast<const char*>(p.q) +
                         ((static_cast<std::int64_t>(p.shared_queries > 0 ? 0 : slot.tile.first_token) + token) * p.q_token_stride +
                          (slot.kv_head * group + head) * p.q_head_stride) *
                             kItem +
                         chunk * 16;
#pragma unroll 8
    for (int row = lane / kLanes; row < Shape::kRows; row += kRowsAtOnce) {
      const int present = row < slot.tile.num_rows ? num_bytes : 0;
      const std::uint32_t target =
          q + static_cast<std::uint32_t>(chunk / 8 * Shape::kRowPanelBytes + row * device::kPanelRowBytes + ((chunk % 8 ^ row % 8) << 4));
      if (kChunks == kLanes || chunk < kChunks)
        device::copy_async_16(target, present > 0 ? source : static_cast<const char*>(p.q), present);
      source += row_step, head += head_step;
      if (head >= group) head -= group, source += wrap_step;
    }
    device::copy_async_commit();
    device::copy_async_wait<0>();
    device::fence_async_proxy();
    device::barrier_arrive(device::shared_address(&control->q_full[queries.stage]));
    queries.advance();
    if constexpr (Shape::kWidenBeside) widener.widen_tile(slot);
  }
}

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

}  // namespace quire::cuda::attn
