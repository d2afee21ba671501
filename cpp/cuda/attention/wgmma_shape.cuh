// What the warps of Hopper's attention kernel share: sizes, shared memory, barriers, and the tiles that are handed from warp to warp.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda.h>

#include "cuda/attention/mma_tile.cuh"
#include "cuda/device/tma.cuh"
#include "cuda/device/wgmma.cuh"

namespace quire::cuda::attn {

/// K's and V's rows as {head_dim, kv head, slot in its block, block}; without a block table all keys are one block.
struct WgmmaInputs {
  CUtensorMap k, v;
  int keys_per_box;
  float log2_scale;  // of q k, to log2 units
};

template <int kHeadDim>
struct WgmmaShape {
  static constexpr int kConsumers = kHeadDim == 64 ? 3 : 2;  // warpgroups with 64 rows each
  static constexpr int kRows = 64 * kConsumers;
  static constexpr int kThreads = 128 * (kConsumers + 1);
  static constexpr int kConsumerWarps = 4 * kConsumers;
  static constexpr int kKeys = kHeadDim > 128 ? 80 : 128;  // per step
  static constexpr int kKeyUnit = kKeys & -kKeys;  // the largest box
  static constexpr int kStages = 2;
  static constexpr int kQStages = kHeadDim > 128 ? 1 : 2;
  static constexpr int kPanels = (kHeadDim + device::kPanelColumns - 1) / device::kPanelColumns;
  static constexpr int kKeyPanelBytes = kKeys * device::kPanelRowBytes;
  static constexpr int kRowPanelBytes = kRows * device::kPanelRowBytes;
  static constexpr int kSlotBytes = kPanels * kKeyPanelBytes;  // one step's K or V
  static constexpr int kQBytes = kPanels * kRowPanelBytes;
  static constexpr int kQOffset = 2 * kStages * kSlotBytes;
  static constexpr int kControlOffset = kQOffset + kQStages * kQBytes;
  static constexpr int kProducerRegisters = kConsumers == 3 ? 32 : 40;
  static constexpr int kConsumerRegisters = kConsumers == 3 ? 160 : 232;
  /// Warpgroups take turns at issuing products where that is faster.
  static constexpr bool kTakeTurns = kHeadDim <= 128;
};

enum class TileKind : int {
  kUsual,
  kSelecting,  // again, because NaN or infinity in V may have reached rows that do not see it
  kNone,  // nothing to do until what came before is finished
  kEnd,
};

struct TileSlot {
  Tile tile;
  int kv_head;
  TileKind kind;
  int again;  // set by consumers: the tile is to be done again, selecting
};

constexpr int kTileSlots = 3;

template <int kHeadDim>
struct WgmmaControl {
  using Shape = WgmmaShape<kHeadDim>;
  static constexpr int kStages = Shape::kStages;
  std::uint64_t k_full[kStages], k_empty[kStages], v_full[kStages], v_empty[kStages];
  std::uint64_t q_full[Shape::kQStages], q_empty[Shape::kQStages];
  std::uint64_t tile_full[kTileSlots], tile_empty[kTileSlots];
  TileSlot tiles[kTileSlots];
  std::uint32_t valid_keys[kStages];  // a bit for each 8 keys of K's stage: they have a block
  int any_again;
};

/// The workspace begins with the number of tiles that were taken beyond each CTA's first; the launcher sets it to zero.
constexpr int kWgmmaNotesOffset = 256;

/// Where a CTA notes what it takes out of V, one row after the other; in the workspace, which always has as much.
template <int kHeadDim>
__device__ __forceinline__ std::uint32_t* wgmma_notes(const Plan& plan) {
  constexpr int kWords = WgmmaShape<kHeadDim>::kRows * kNoteWords<kHeadDim>;
  static_assert(kWords <= kPartialRowsPerSm * kHeadDim / 4);
  return reinterpret_cast<std::uint32_t*>(static_cast<char*>(plan.params.workspace) + kWgmmaNotesOffset) +
         static_cast<std::size_t>(blockIdx.x) * kWords;
}

template <int kHeadDim>
constexpr int kWgmmaSharedBytes = WgmmaShape<kHeadDim>::kControlOffset + static_cast<int>(sizeof(WgmmaControl<kHeadDim>));

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

/// A ring of stages: the place of the next use, and the parity of its barriers.
template <int kStages>
struct Ring {
  int stage = 0;
  std::uint32_t parity = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

/// The next tile, for a whole warp, which is done with the slot. Every lane says so for itself.
template <int kHeadDim>
__device__ __forceinline__ TileSlot take_tile(WgmmaControl<kHeadDim>* control, Ring<kTileSlots>& ring) {
  device::barrier_wait(device::shared_address(&control->tile_full[ring.stage]), ring.parity);
  const TileSlot slot = control->tiles[ring.stage];
  device::barrier_arrive(device::shared_address(&control->tile_empty[ring.stage]));
  ring.advance();
  return slot;
}

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

}  // namespace quire::cuda::attn
