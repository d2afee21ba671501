// What the warps of Hopper's attention kernel share: sizes, shared memory, barriers, and the tiles that are handed from warp to warp.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda.h>

#include "cuda/attention/mma_tile.cuh"
#include "cuda/device/tma.cuh"
#include "cuda/device/wgmma.cuh"

namespace quire::cuda::attn {

/// Blocks of so many slots have code of their own, with less to compute for each.
constexpr int kUsualBlock = 16;

/// K's and V's rows as {head_dim, kv head, slot in its block, block}; without a block table all keys are one block.
struct WgmmaInputs {
  CUtensorMap k, v;
  CUtensorMap q, out;         // as {head_dim, head, token}; only if
  bool q_boxes, out_boxes;  // a tile's rows are a box of q, and 16 of them one of out
  int keys_per_box;
  bool in_blocks;  // boxes are blocks of kUsualBlock slots
  float log2_scale;  // of q k, to log2 units; without scales that only the device knows
  bool transform;    // scores are more than a factor times q k
};

/// kQ is what q is stored as: 16 bits, or float8_e4m3fn, whose K is of it too. K and V have 16 bits, of kQ then, or kNarrowKv: 8. Products of
/// weights and values are of 16 bits: narrow values are widened before, and so are narrow keys of wide queries. kShort: for short sequences.
template <DType kQ, bool kNarrowKv, int kDim, bool kShort = false>
struct WgmmaShape {
  static_assert(itemsize(kQ) == 2 || kNarrowKv);
  static constexpr int kHeadDim = kDim;
  static constexpr bool kNarrowQ = itemsize(kQ) == 1;
  static constexpr bool kBf16 = kQ == DType::kBFloat16;  // of weights and values; else float16
  static constexpr bool kWidenV = kNarrowKv, kWidenK = kNarrowKv && !kNarrowQ;

  static constexpr int kRows = wgmma_rows(kDim, kNarrowQ, kNarrowKv, kShort);
  static constexpr int kConsumers = kRows / 64;  // warpgroups with 64 rows each
  static constexpr int kConsumerWarps = 4 * kConsumers;
  /// Warps 2 and 3 widen values, instead of a warpgroup of its own, for which three consumers leave no registers.
  static constexpr bool kWidenBeside = kNarrowKv && kConsumers == 3;
  static_assert(!kWidenBeside || kNarrowQ);
  static constexpr int kWidenerWarps = kWidenBeside ? 2 : kNarrowKv ? 4 : 0;
  static constexpr int kFirstConsumer = kNarrowKv && !kWidenBeside ? 2 : 1;  // its warpgroup
  static constexpr int kTileReaders = 4 * (kConsumers + kFirstConsumer) - 1;  // warps
  static constexpr int kThreads = 128 * (kConsumers + kFirstConsumer);
  static constexpr int kProducerRegisters = kConsumers == 3 || kNarrowKv ? 32 : 40;
  static constexpr int kWidenerRegisters = 48;
  static constexpr int kConsumerRegisters = kConsumers == 3 ? 160 : kNarrowKv ? 216 : 232;
  /// Warpgroups take turns at issuing products where that is faster.
  static constexpr bool kTakeTurns = kDim <= 128 && (!kNarrowKv || kWidenBeside);
  /// The compiler is told what is the same in all lanes where that is faster; elsewhere registers come out worse.
  static constexpr bool kKnowsUniform = kNarrowKv ? kDim == 64 || (kNarrowQ && kDim == 128) : kDim != 96;
  /// ptxas counts 128 registers for a thread of four warpgroups, too few for one product with all columns.
  static constexpr int kOutputParts = kNarrowKv && kDim > 128 ? 2 : 1;

  static constexpr int kKeys = wgmma_keys(kDim, kNarrowQ, kNarrowKv, kShort);  // per step
  static constexpr int kKeyUnit = kKeys & -kKeys;  // the largest box
  static constexpr int kStages = kWidenBeside ? 3 : 2;
  static constexpr int kNarrowStages = kWidenK && kDim > 64 ? 1 : 2;
  static constexpr int kQStages = kDim > (kNarrowQ ? 256 : 128) ? 1 : 2;

  static constexpr int panels(int bytes) { return (bytes + device::kPanelRowBytes - 1) / device::kPanelRowBytes; }
  static constexpr int kQkPanels = panels(kDim * static_cast<int>(itemsize(kQ)));  // of q and of K as it is multiplied
  static constexpr int kVPanels = panels(kDim * 2);
  static constexpr int kNarrowPanels = panels(kDim);
  static constexpr int kQkSteps = kDim * static_cast<int>(itemsize(kQ)) / 32;  // of 32 bytes of a row
  static constexpr int kKeyPanelBytes = kKeys * device::kPanelRowBytes;
  static constexpr int kRowPanelBytes = kRows * device::kPanelRowBytes;
  // Of one step's K or V, and of a tile's q.
  static constexpr int kKSlotBytes = kQkPanels * kKeyPanelBytes;
  static constexpr int kVSlotBytes = kVPanels * kKeyPanelBytes;
  static constexpr int kNarrowSlotBytes = kNarrowPanels * kKeyPanelBytes;
  static constexpr int kQBytes = kQkPanels * kRowPanelBytes;

  static constexpr int kVOffset = kStages * kKSlotBytes;
  static constexpr int kNarrowKOffset = kVOffset + kStages * kVSlotBytes;
  static constexpr int kNarrowVOffset = kNarrowKOffset + (kWidenK ? kNarrowStages * kNarrowSlotBytes : 0);
  static constexpr int kQOffset = kNarrowVOffset + (kWidenV ? kNarrowStages * kNarrowSlotBytes : 0);
  static constexpr int kOutOffset = kQOffset + kQStages * kQBytes;
  static constexpr int kOutBytes = kVPanels * kRowPanelBytes;
  static constexpr bool kOutBoxes = kOutOffset + kOutBytes <= 225 * 1024;  // there is room for a tile's output
  static constexpr int kControlOffset = kOutOffset + (kOutBoxes ? kOutBytes : 0);
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

template <typename Shape>
struct WgmmaControl {
  static constexpr int kStages = Shape::kStages, kNarrowStages = Shape::kNarrowStages;
  std::uint64_t k_full[kStages], k_empty[kStages], v_full[kStages], v_empty[kStages];
  std::uint64_t narrow_k_full[kNarrowStages], narrow_k_empty[kNarrowStages], narrow_v_full[kNarrowStages], narrow_v_empty[kNarrowStages];
  std::uint64_t q_full[Shape::kQStages], q_empty[Shape::kQStages];
  std::uint64_t tile_full[kTileSlots], tile_empty[kTileSlots];
  TileSlot tiles[kTileSlots];
  // A bit for each 8 keys of K's stage: they have a block.
  std::uint32_t valid_keys[kStages], narrow_valid_keys[kNarrowStages];
  int any_again;
};

/// Where a CTA notes what it takes out of V, one row after the other; in the workspace, which always has as much.
template <typename Shape>
__device__ __forceinline__ std::uint32_t* wgmma_notes(const Plan& plan) {
  constexpr int kWords = Shape::kRows * kNoteWords<Shape::kHeadDim>;
  static_assert(kWords <= kPartialRowsPerSm * Shape::kHeadDim / 4);
  return static_cast<std::uint32_t*>(plan.params.workspace) + static_cast<std::size_t>(blockIdx.x) * kWords;
}

template <typename Shape>
constexpr int kWgmmaSharedBytes = Shape::kControlOffset + static_cast<int>(sizeof(WgmmaControl<Shape>));

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
template <typename Shape>
__device__ __forceinline__ TileSlot take_tile(WgmmaControl<Shape>* control, Ring<kTileSlots>& ring) {
  device::barrier_wait(device::shared_address(&control->tile_full[ring.stage]), ring.parity);
  const TileSlot slot = control->tiles[ring.stage];
  device::barrier_arrive(device::shared_address(&control->tile_empty[ring.stage]));
  ring.advance();
  return slot;
}

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

}  // namespace quire::cuda::attn
