// The warps of Hopper's attention kernel that bring things: tiles, keys, values and query rows.
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

template <int kHeadDim>
__device__ __forceinline__ Box locate_box(const Plan& plan, int keys_per_box, const Tile& tile, int step) {
  constexpr int kKeys = WgmmaShape<kHeadDim>::kKeys;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int key = step * kKeys + lane * keys_per_box;
  if (lane * keys_per_box >= kKeys || key >= tile.key_end) return Box{0, -1, true};
  const KeyLocation location = locate_key(plan, tile, key, tile.key_end, load_entry(plan, tile, key, tile.key_end));
  return Box{location.slot, location.valid ? location.entry : -1, location.valid};
}

/// Starts the copy of one step's K or V, a lane's box each. A box whose block is -1 is outside the tensor: zeros.
template <int kHeadDim>
__device__ __forceinline__ void copy_boxes(const CUtensorMap& map, int keys_per_box, std::uint32_t full, std::uint32_t slot, int kv_head,
                                           const Box& box) {
  using Shape = WgmmaShape<kHeadDim>;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if (lane == 0) device::barrier_arrive_expect(full, Shape::kSlotBytes);
  __syncwarp();
  if (lane * keys_per_box >= Shape::kKeys) return;
  const std::uint32_t dst = slot + static_cast<std::uint32_t>(lane * keys_per_box * device::kPanelRowBytes);
#pragma unroll
  for (int panel = 0; panel < Shape::kPanels; ++panel)
    device::copy_box(dst + panel * Shape::kKeyPanelBytes, &map, full, panel * device::kPanelColumns, kv_head, box.slot, box.entry);
}

/// Warp 0: finds tiles and hands them to all others.
template <int kHeadDim>
struct WgmmaScheduler {
  using Control = WgmmaControl<kHeadDim>;

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

  /// A CTA takes the tile of its own number first, then the next that none has taken.
  __device__ void run() {
    const auto total = static_cast<std::uint32_t>(plan.num_tiles) * static_cast<std::uint32_t>(plan.params.num_kv_heads);
    const auto take_next = [&] {
      std::uint32_t taken = 0;
      if (threadIdx.x == 0 && gridDim.x < total) taken = atomicAdd(static_cast<std::uint32_t*>(plan.params.workspace), 1u);
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

/// Warp 1 copies each tile's keys, from the last to the first step, and warp 2 its values.
template <int kHeadDim, bool kIsK>
__device__ void copy_steps(const Plan& plan, const WgmmaInputs& inputs, char* shared, WgmmaControl<kHeadDim>* control) {
  using Shape = WgmmaShape<kHeadDim>;
  constexpr int kKeys = Shape::kKeys;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const std::uint32_t slots = device::shared_address(shared) + (kIsK ? 0 : Shape::kStages * Shape::kSlotBytes);
  auto& full = kIsK ? control->k_full : control->v_full;
  auto& empty = kIsK ? control->k_empty : control->v_empty;
  Ring<kTileSlots> tiles;
  Ring<Shape::kStages> ring;
  for (;;) {
    const TileSlot slot = take_tile<kHeadDim>(control, tiles);
    if (slot.kind == TileKind::kEnd) return;
    if (slot.kind == TileKind::kNone) continue;
    const int first = slot.tile.key_begin / kKeys;
    int step = (slot.tile.key_end + kKeys - 1) / kKeys - 1;
    if (step < first) continue;
    Box box = locate_box<kHeadDim>(plan, inputs.keys_per_box, slot.tile, step);
    for (;; --step) {
      Box next{};
      if (step > first) next = locate_box<kHeadDim>(plan, inputs.keys_per_box, slot.tile, step - 1);
      device::barrier_wait(device::shared_address(&empty[ring.stage]), ring.parity ^ 1);
      if constexpr (kIsK) {
        const bool valid = __shfl_sync(kAllLanes, box.valid ? 1 : 0, lane * 8 / inputs.keys_per_box % 32) != 0;
        const unsigned bits = __ballot_sync(kAllLanes, valid || lane >= kKeys / 8);
        if (lane == 0) control->valid_keys[ring.stage] = bits;
      }
      copy_boxes<kHeadDim>(kIsK ? inputs.k : inputs.v, inputs.keys_per_box, device::shared_address(&full[ring.stage]),
                           slots + static_cast<std::uint32_t>(ring.stage * Shape::kSlotBytes), slot.kv_head, box);
      ring.advance();
      if (step == first) break;
      box = next;
    }
  }
}

constexpr int kQueryLoaders = 32;  // one warp

/// Warp 3: each tile's query rows.
template <int kHeadDim>
__device__ void gather_queries(const Plan& plan, char* shared, WgmmaControl<kHeadDim>* control) {
  using Shape = WgmmaShape<kHeadDim>;
  const AttentionParams& p = plan.params;
  constexpr int kChunks = Shape::kPanels * 8;
  constexpr int kRowsAtOnce = 32 / kChunks;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const auto group = static_cast<int>(plan.group.divisor);
  const int head_step = kRowsAtOnce % group;
  const std::int64_t row_step = (kRowsAtOnce / group * p.q_token_stride + head_step * p.q_head_stride) * 2;
  const std::int64_t wrap_step = (p.q_token_stride - group * p.q_head_stride) * 2;
  Ring<kTileSlots> tiles;
  Ring<Shape::kQStages> queries;
  for (;;) {
    const TileSlot slot = take_tile<kHeadDim>(control, tiles);
    if (slot.kind == TileKind::kEnd) return;
    if (slot.kind == TileKind::kNone || slot.tile.key_end == 0) continue;
    const std::uint32_t q = device::shared_address(shared + Shape::kQOffset + queries.stage * Shape::kQBytes);
    device::barrier_wait(device::shared_address(&control->q_empty[queries.stage]), queries.parity ^ 1);
    // A lane has the same columns of every kRowsAtOnce-th row.
    const int chunk = lane % kChunks;
    const bool has_columns = chunk * 8 < p.head_dim;
    int token = plan.group.quotient(slot.tile.row_begin + lane / kChunks);
    int head = plan.group.remainder(slot.tile.row_begin + lane / kChunks, token);
    const char* source = static_cast<const char*>(p.q) +
                         ((static_cast<std::int64_t>(p.shared_queries > 0 ? 0 : slot.tile.first_token) + token) * p.q_token_stride +
                          (slot.kv_head * group + head) * p.q_head_stride + chunk * 8) *
                             2;
#pragma unroll 8
    for (int row = lane / kChunks; row < Shape::kRows; row += kRowsAtOnce) {
      const bool present = has_columns && row < slot.tile.num_rows;
      const std::uint32_t target =
          q + static_cast<std::uint32_t>(chunk / 8 * Shape::kRowPanelBytes + row * device::kPanelRowBytes + ((chunk % 8 ^ row % 8) << 4));
      device::copy_async_16(target, present ? source : static_cast<const char*>(p.q), present ? 16 : 0);
      source += row_step, head += head_step;
      if (head >= group) head -= group, source += wrap_step;
    }
    device::copy_async_commit();
    device::copy_async_wait<0>();
    device::fence_async_proxy();
    device::barrier_arrive(device::shared_address(&control->q_full[queries.stage]));
    queries.advance();
  }
}

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

}  // namespace quire::cuda::attn
