// Attention for many query rows per kv head on Hopper: the copy engine brings keys, warpgroups multiply. sm_90a.
// SPDX-License-Identifier: Apache-2.0
//
// A CTA stays on its SM and takes tile after tile. The warps of its first warpgroup bring things: one finds the tiles, one copies their keys,
// one their values, and one gathers their query rows. Each further warpgroup has 64 rows of the tile. Two products are under way at once:
// scores of the next keys, and weights times values of the last ones; and warpgroups take turns at issuing products, so that one's softmax
// runs beside the other's products.
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

/// The next tile, for a whole warp, which is done with the slot.
template <int kHeadDim>
__device__ __forceinline__ TileSlot take_tile(WgmmaControl<kHeadDim>* control, Ring<kTileSlots>& ring) {
  device::barrier_wait(device::shared_address(&control->tile_full[ring.stage]), ring.parity);
  const TileSlot slot = control->tiles[ring.stage];
  __syncwarp();
  if (threadIdx.x % 32 == 0) device::barrier_arrive(device::shared_address(&control->tile_empty[ring.stage]));
  ring.advance();
  return slot;
}

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
    const char* source = static_cast<const char*>(p.q) + ((static_cast<std::int64_t>(slot.tile.first_token) + token) * p.q_token_stride +
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

/// A warpgroup with 64 of the tile's rows.
template <bool kBf16, int kHeadDim, bool kTransform>
struct WgmmaConsumer {
  using Shape = WgmmaShape<kHeadDim>;
  using Control = WgmmaControl<kHeadDim>;
  static constexpr int kKeys = Shape::kKeys;
  static constexpr int kTurnBarrier = 1;  // and the next ones: a warpgroup's turn at products
  static constexpr int kAllBarrier = 8;  // all consumers
  /// Weights of one step and thread that add up to less are kept as they are: float16 holds them.
  static constexpr float kLargeWeights = 16384.0f;

  const Plan& plan;
  const WgmmaInputs& inputs;
  char* shared;
  int group;  // which of the consumers
  // Uses so far, of which follow the next one's place in its ring and the parity of its barrier.
  unsigned tile_uses = 0, q_uses = 0, k_uses = 0, v_uses = 0;
  float out[kHeadDim / 2];
  float score[kKeys / 2];
  std::uint32_t weights[kKeys / 16][4];
  float base[2];  // what weights are relative to, in log2 units; -inf while a row that sees keys has none
  float sum[2];  // of weights so far, of this thread's columns

  __device__ __forceinline__ Control& control() const { return *reinterpret_cast<Control*>(shared + Shape::kControlOffset); }
  template <unsigned kPlaces>
  __device__ __forceinline__ static void wait_full(const std::uint64_t (&barriers)[kPlaces], unsigned uses) {
    device::barrier_wait(device::shared_address(&barriers[uses % kPlaces]), uses / kPlaces & 1);
  }
  template <unsigned kPlaces>
  __device__ __forceinline__ static void release(const std::uint64_t (&barriers)[kPlaces], unsigned uses) {
    if (threadIdx.x % 32 == 0) device::barrier_arrive(device::shared_address(&barriers[uses % kPlaces]));
  }

  __device__ __forceinline__ int row(int r) const {
    return 64 * group + static_cast<int>(threadIdx.x) % 128 / 32 * 16 + static_cast<int>(threadIdx.x) % 32 / 4 + 8 * r;
  }

  __device__ __forceinline__ void wait_turn() const {
    if constexpr (Shape::kTakeTurns) device::named_barrier_sync(kTurnBarrier + group, 256);
  }
  __device__ __forceinline__ void pass_turn() const {
    if constexpr (Shape::kTakeTurns) device::named_barrier_arrive(kTurnBarrier + (group + 1 == Shape::kConsumers ? 0 : group + 1), 256);
  }

  /// Descriptors of the next products' operands. Computed before waits, whose time they take none of.
  struct Operands {
    std::uint32_t q, k, v;
  };
  __device__ __forceinline__ Operands operands() const {
    const std::uint32_t address = device::shared_address(shared);
    return Operands{
        device::matrix_descriptor(
            address + Shape::kQOffset + q_uses % Shape::kQStages * Shape::kQBytes + group * 64 * device::kPanelRowBytes, 0),
        device::matrix_descriptor(address + k_uses % Shape::kStages * Shape::kSlotBytes, 0),
        device::matrix_descriptor(address + (Shape::kStages + v_uses % Shape::kStages) * Shape::kSlotBytes, Shape::kKeyPanelBytes)};
  }

  /// score = q k^T for the stage's keys, started.
  __device__ __forceinline__ void start_scores(const Operands& from) {
#pragma unroll
    for (int step = 0; step < kHeadDim / 16; ++step)
      device::WgmmaShared<kKeys, kBf16>::product(score, from.q + (step / 4 * Shape::kRowPanelBytes + step % 4 * 32) / 16,
                                                 from.k + (step / 4 * Shape::kKeyPanelBytes + step % 4 * 32) / 16, step > 0 ? 1 : 0);
    device::wgmma_commit();
  }

  /// out += weights v, started.
  __device__ __forceinline__ void start_output(const Operands& from, int accumulate) {
#pragma unroll
    for (int step = 0; step < kKeys / 16; ++step)
      device::WgmmaRegisters<kHeadDim, kBf16>::product(out, weights[step], from.v + (step * 16 * device::kPanelRowBytes) / 16,
                                                       step > 0 ? 1 : accumulate);
    device::wgmma_commit();
  }

  /// A tile as this thread sees it.
  struct Work {
    TileSlot* slot;  // until it is finished
    RowParams rows[2];  // only where scores are more than a factor times q k
    int full_begin, full_end;  // keys that all of the warp's rows see
    bool sees_keys[2];  // for each of the thread's rows
    bool selecting;
    int first, step;  // the next step whose scores are to be computed, down to the first
  };

  __device__ __forceinline__ RowParams row_params(const TileSlot& slot, int r) const {
    return make_row_params(plan, slot.tile, slot.kv_head, row(r));
  }

  /// Scores of keys that a row does not see become -inf; and what is asked for beyond a factor is done.
  __device__ __forceinline__ void mask_scores(const Work& work, std::uint32_t valid) {
    const int first = work.step * kKeys + static_cast<int>(threadIdx.x) % 4 * 2;
    if constexpr (kTransform) {
#pragma unroll
      for (int j = 0; j < kKeys / 8; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          score[4 * j + i] = transformed_score(score[4 * j + i], work.rows[i / 2], plan.params.softcap, first + 8 * j + i % 2);
    }
    if ((work.step + 1) * kKeys <= work.full_end && work.step * kKeys >= work.full_begin && valid == ~0u) return;
    int begin[2], end[2];  // relative to `first`
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const RowParams params = row_params(*work.slot, r);
      begin[r] = params.begin - first, end[r] = params.end - first;
    }
#pragma unroll
    for (int j = 0; j < kKeys / 8; ++j) {
      const bool present = (valid >> j & 1) != 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int key = 8 * j + i % 2;
        if (!(present && key >= begin[i / 2] && key < end[i / 2])) score[4 * j + i] = -INFINITY;
      }
    }
  }

  /// Scores become weights in float32, relative to `base`, which need not be the maximum: as long as weights are not large, nothing depends
  /// on it. True if they are, or are not numbers, in some row of the warp: then `sum` is as before.
  __device__ __forceinline__ bool weigh(float log2_scale, float (&added)[2]) {
    float parts[2][2] = {{0.0f, 0.0f}, {0.0f, 0.0f}};
#pragma unroll
    for (int j = 0; j < kKeys / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        score[4 * j + i] = device::exp2_approx(fmaf(score[4 * j + i], log2_scale, -base[i / 2]));
        parts[i / 2][i % 2] += score[4 * j + i];
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) added[r] = parts[r][0] + parts[r][1];
    return __any_sync(kAllLanes, !(added[0] < kLargeWeights && added[1] < kLargeWeights));
  }

  /// Makes the maximum of the scores the base of rows that need one: those whose weights would be large. Earlier weights of a row are to be
  /// multiplied by `factor`. A row's base follows from its own scores alone.
  __device__ __forceinline__ void raise_base(float log2_scale, const float (&added)[2], float (&factor)[2]) {
    float top[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int j = 0; j < kKeys / 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) top[i / 2] = fmaxf(top[i / 2], score[4 * j + i]);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int lanes = 1; lanes <= 2; ++lanes) top[r] = fmaxf(top[r], __shfl_xor_sync(kAllLanes, top[r], lanes));
      const unsigned large = __ballot_sync(kAllLanes, !(added[r] < kLargeWeights)) >> (threadIdx.x % 32 & ~3u) & 15u;
      factor[r] = 1.0f;
      const float raised = fmaxf(base[r], top[r] * log2_scale);
      if (large == 0 || raised == -INFINITY) continue;
      factor[r] = device::exp2_approx(base[r] - raised);
      base[r] = raised;
      sum[r] *= factor[r];
    }
  }

  /// raise_base, then weights whatever they come to.
  __device__ __forceinline__ void weigh_anew(float log2_scale, const float (&large)[2], float (&factor)[2]) {
    raise_base(log2_scale, large, factor);
    float added[2];
    const float kept[2] = {base[0], base[1]};
#pragma unroll
    for (int r = 0; r < 2; ++r)
      if (base[r] == -INFINITY) base[r] = 0.0f;
    weigh(log2_scale, added);
#pragma unroll
    for (int r = 0; r < 2; ++r) base[r] = kept[r], sum[r] += added[r];
  }

  __device__ __forceinline__ void pack_weights() {
#pragma unroll
    for (int step = 0; step < kKeys / 16; ++step)
#pragma unroll
      for (int i = 0; i < 4; ++i) weights[step][i] = device::pack_16<kBf16>(score[8 * step + 2 * i], score[8 * step + 2 * i + 1]);
  }

  /// Takes what is not finite out of V's stage, and notes it for the rows that see it. All consumers come here together.
  __device__ __noinline__ static void select_values(const Plan& plan, const TileSlot& slot, char* shared_v, std::uint32_t* notes,
                                                    int step) {
    constexpr int kThreads = 128 * Shape::kConsumers;
    constexpr std::uint32_t kInfinity = kBf16 ? 0x7f80u : 0x7c00u;
    device::named_barrier_sync(kAllBarrier, kThreads);
    if (step == (slot.tile.key_end + kKeys - 1) / kKeys - 1) {
      for (int i = static_cast<int>(threadIdx.x) - 128; i < Shape::kRows * kNoteWords<kHeadDim>; i += kThreads) notes[i] = 0;
      device::named_barrier_sync(kAllBarrier, kThreads);
    }
    for (int i = static_cast<int>(threadIdx.x) - 128; i < Shape::kSlotBytes / 2; i += kThreads) {
      auto* element = reinterpret_cast<std::uint16_t*>(shared_v) + i;
      const std::uint32_t magnitude = *element & 0x7fffu;
      if (magnitude < kInfinity) continue;
      const bool nan = magnitude > kInfinity, negative = (*element & 0x8000u) != 0;
      *element = 0;
      const int panel = i / (kKeys * device::kPanelColumns);
      const int key = i / device::kPanelColumns % kKeys;
      const int column = panel * device::kPanelColumns + ((i / 8 % 8 ^ key % 8) * 8) + i % 8;
      const std::uint32_t note = (nan ? 3u : negative ? 2u : 1u) << (column % 16 * 2);
#pragma unroll 1
      for (int row = 0; row < slot.tile.num_rows; ++row) {
        const KeyRange range = visible_keys(plan.params, slot.tile, row_index(plan, slot.tile, slot.kv_head, row).token);
        if (step * kKeys + key >= range.begin && step * kKeys + key < range.end)
          atomicOr(&notes[row * kNoteWords<kHeadDim> + column / 16], note);
      }
    }
    device::fence_async_proxy();
    device::named_barrier_sync(kAllBarrier, kThreads);
  }

  /// The next tile that has keys; those without are finished here. False: there is none, or, with a tile `unfinished`, none before that
  /// one must be finished.
  __device__ __forceinline__ bool open(Work& work, bool unfinished) {
    for (;;) {
      wait_full(control().tile_full, tile_uses);
      work.slot = &control().tiles[tile_uses % kTileSlots];
      const TileKind kind = work.slot->kind;
      if (kind == TileKind::kEnd || (kind == TileKind::kNone && unfinished)) return false;
      ++tile_uses;
      if (kind != TileKind::kNone) {
        if (work.slot->tile.key_end > 0) break;
        finish_empty(plan, group, *work.slot);
      }
      close(work);
    }
    RowParams rows[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) rows[r] = row_params(*work.slot, r);
    if constexpr (kTransform) work.rows[0] = rows[0], work.rows[1] = rows[1];
#pragma unroll
    for (int r = 0; r < 2; ++r) work.sees_keys[r] = rows[r].end > rows[r].begin;
    // Rows are in order of position: the warp's first and last say what all of them see.
    work.full_end = __shfl_sync(kAllLanes, rows[0].end, 0);
    work.full_begin = __shfl_sync(kAllLanes, rows[1].begin, 31);
    work.selecting = work.slot->kind == TileKind::kSelecting;
    work.first = work.slot->tile.key_begin / kKeys;
    work.step = (work.slot->tile.key_end + kKeys - 1) / kKeys - 1;
    return true;
  }

  /// Gives the tile's slot back.
  __device__ __forceinline__ void close(const Work& work) const {
    __syncwarp();
    release(control().tile_empty, static_cast<unsigned>(work.slot - control().tiles));
  }

  /// From a score before the factor to log2 units.
  __device__ __forceinline__ float log2_scale() const { return kTransform ? 1.0f : inputs.log2_scale; }

  /// Waits for K and, with a new tile, its queries; returns which keys have a block.
  __device__ __forceinline__ std::uint32_t wait_scores_inputs(bool new_tile) const {
    if (new_tile) wait_full(control().q_full, q_uses);
    wait_full(control().k_full, k_uses);
    return control().valid_keys[k_uses % Shape::kStages];
  }

  /// Gives the stage of keys back, and after the last step the tile's queries.
  __device__ __forceinline__ void release_keys(Work& work) {
    release(control().k_empty, k_uses++);
    if (work.step == work.first) release(control().q_empty, q_uses++);
    --work.step;
  }

  /// On a second pass, takes what is not finite out of the values of the next product. Before wait_values.
  __device__ __forceinline__ void prepare_values(const Work& work) const {
    if (!work.selecting) return;
    wait_values();
    select_values(plan, *work.slot, shared + (Shape::kStages + v_uses % Shape::kStages) * Shape::kSlotBytes, wgmma_notes<kHeadDim>(plan),
                  work.step + 1);
  }
  __device__ __forceinline__ void wait_values() const { wait_full(control().v_full, v_uses); }

  __device__ __forceinline__ void release_values() {
    device::pin_registers(out);
    release(control().v_empty, v_uses++);
  }

  /// A tile's first scores become weights.
  __device__ __forceinline__ void weigh_first(Work& work, std::uint32_t valid) {
    device::pin_registers(score);
    mask_scores(work, valid);
    release_keys(work);
#pragma unroll
    for (int r = 0; r < 2; ++r) base[r] = work.sees_keys[r] ? -INFINITY : 0.0f, sum[r] = 0.0f;
    const float large[2] = {INFINITY, INFINITY};
    float factor[2];
    weigh_anew(log2_scale(), large, factor);
  }

  /// The first scores of a tile, with nothing else under way.
  __device__ __forceinline__ void start_tile(Work& work) {
    const Operands from = operands();
    const std::uint32_t valid = wait_scores_inputs(true);
    wait_turn();
    device::pin_registers(score);
    device::wgmma_fence();
    start_scores(from);
    pass_turn();
    device::wgmma_wait<0>();
    weigh_first(work, valid);
    pack_weights();
  }

  /// The output of the step that has weights, beside the scores of the next step, which may be another tile's first. The latter's weights
  /// are left in `score`.
  template <bool kNewTile>
  __device__ __forceinline__ void advance(const Work& values, Work& scores, int accumulate) {
    const Operands from = operands();
    prepare_values(values);
    const std::uint32_t valid = wait_scores_inputs(kNewTile);
    wait_turn();
    device::pin_registers(score);
    device::pin_registers(out);
    device::wgmma_fence();
    start_scores(from);
    wait_values();
    device::wgmma_fence();
    start_output(from, accumulate);
    pass_turn();
    device::wgmma_wait<1>();
    if constexpr (kNewTile) {
      weigh_first(scores, valid);
      device::wgmma_wait<0>();
    } else {
      device::pin_registers(score);
      mask_scores(scores, valid);
      float added[2];
      if (weigh(log2_scale(), added)) {
        // Rare after a tile's first steps: the scores are computed again, for they are weights now.
        device::pin_registers(score);
        device::wgmma_fence();
        start_scores(from);
        device::wgmma_wait<0>();
        device::pin_registers(score);
        device::pin_registers(out);
        mask_scores(scores, valid);
        float factor[2];
        weigh_anew(log2_scale(), added, factor);
#pragma unroll
        for (int i = 0; i < kHeadDim / 2; ++i) out[i] *= factor[i / 2 % 2];
      } else {
        sum[0] += added[0], sum[1] += added[1];
        device::wgmma_wait<0>();
      }
      release_keys(scores);
    }
    release_values();
  }

  __device__ __forceinline__ void run() {
    // The first warpgroup's first turn.
    if (Shape::kTakeTurns && group == Shape::kConsumers - 1) pass_turn();
    Work work;
    while (open(work, false)) {
      start_tile(work);
      // Tile after tile, as long as the next one's first scores can go beside the last output.
      for (;;) {
        int accumulate = 0;
        for (; work.step >= work.first; accumulate = 1) {
          advance<false>(work, work, accumulate);
          pack_weights();
        }
        const float last_base[2] = {base[0], base[1]}, last_sum[2] = {sum[0], sum[1]};
        if constexpr (Shape::kQStages > 1) {
          Work next;
          if (open(next, true)) {
            advance<true>(work, next, accumulate);
            finish(*work.slot, last_base, last_sum);
            close(work);
            pack_weights();
            work = next;
            continue;
          }
        }
        const Operands from = operands();
        prepare_values(work);
        wait_values();
        device::pin_registers(out);
        device::wgmma_fence();
        start_output(from, accumulate);
        device::wgmma_wait<0>();
        release_values();
        finish(*work.slot, last_base, last_sum);
        close(work);
        break;
      }
    }
    if (Shape::kTakeTurns && group == 0) wait_turn();
  }

  /// Rows that see no key.
  __device__ __noinline__ static void finish_empty(const Plan& plan, int group, const TileSlot& slot) {
    const AttentionParams& p = plan.params;
    for (int row = 64 * group + static_cast<int>(threadIdx.x) % 128 / 32; row < min(slot.tile.num_rows, 64 * group + 64); row += 4) {
      const RowIndex index = row_index(plan, slot.tile, slot.kv_head, row);
      const int lane = static_cast<int>(threadIdx.x) % 32;
      if (lane == 0 && p.lse != nullptr) p.lse[stats_index(plan, index)] = finish_row(p, -INFINITY, 0.0f, index.head).lse;
      for (int column = 4 * lane; column < p.head_dim; column += 128) store_out_4(plan, index, column, float4{0.0f, 0.0f, 0.0f, 0.0f});
    }
  }

  /// Infinity or NaN for what was noted, over the rows that the warp has stored.
  __device__ __noinline__ static void store_notes(const Plan& plan, int group, const TileSlot& slot) {
    const AttentionParams& p = plan.params;
    const std::uint32_t* notes = wgmma_notes<kHeadDim>(plan);
    constexpr std::uint16_t kInfinity = kBf16 ? 0x7f80 : 0x7c00, kNan = 0x7fff;
    __syncwarp();
    const int first = 64 * group + static_cast<int>(threadIdx.x) % 128 / 32 * 16;
    for (int row = first; row < min(slot.tile.num_rows, first + 16); ++row) {
      const RowIndex index = row_index(plan, slot.tile, slot.kv_head, row);
      auto* out_row = static_cast<std::uint16_t*>(p.out) + index.q_token * p.out_token_stride + index.head * p.out_head_stride;
      for (int column = static_cast<int>(threadIdx.x) % 32; column < p.head_dim; column += 32) {
        const std::uint32_t note = notes[row * kNoteWords<kHeadDim> + column / 16] >> (column % 16 * 2) & 3u;
        if (note == 0 || (out_row[column] & 0x7fff) > kInfinity) continue;
        out_row[column] = note == 3 ? kNan : static_cast<std::uint16_t>(note == 2 ? kInfinity | 0x8000 : kInfinity);
      }
    }
  }

  /// Four groups of eight columns of a row, of which each of four neighbouring lanes holds two columns: returns the lane's group.
  __device__ __forceinline__ static uint4 gather_columns(const std::uint32_t (&words)[4]) {
    const bool odd = (threadIdx.x & 1) != 0, upper = (threadIdx.x & 2) != 0;
    std::uint32_t pairs[2][2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const std::uint32_t got = __shfl_xor_sync(kAllLanes, odd ? words[2 * i] : words[2 * i + 1], 1);
      pairs[i][0] = odd ? got : words[2 * i];
      pairs[i][1] = odd ? words[2 * i + 1] : got;
    }
    const std::uint32_t got0 = __shfl_xor_sync(kAllLanes, upper ? pairs[0][0] : pairs[1][0], 2);
    const std::uint32_t got1 = __shfl_xor_sync(kAllLanes, upper ? pairs[0][1] : pairs[1][1], 2);
    return upper ? uint4{got0, got1, pairs[1][0], pairs[1][1]} : uint4{pairs[0][0], pairs[0][1], got0, got1};
  }

  __device__ __forceinline__ void finish(TileSlot& slot, const float (&last_base)[2], const float (&last_sum)[2]) {
    const AttentionParams& p = plan.params;
    float probes[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) probes[i % 4] = fmaf(out[i], 0.0f, probes[i % 4]);
    const bool selecting = slot.kind == TileKind::kSelecting;
    if ((probes[0] + probes[1]) + (probes[2] + probes[3]) != 0.0f && !selecting) slot.again = control().any_again = 1;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const float v_scale = p.v_scale != nullptr ? p.v_scale[slot.kv_head * p.v_scale_stride] : 1.0f;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float total = last_sum[r];
      total += __shfl_xor_sync(kAllLanes, total, 1);
      total += __shfl_xor_sync(kAllLanes, total, 2);
      const bool exists = row(r) < slot.tile.num_rows;
      const RowIndex index = row_index(plan, slot.tile, slot.kv_head, exists ? row(r) : 0);
      const RowFinish end = finish_row(p, total == 0.0f ? -INFINITY : last_base[r], total, index.head);
      if (exists && lane % 4 == 0 && p.lse != nullptr) p.lse[stats_index(plan, index)] = end.lse;
      const float factor = end.factor * v_scale;
      auto* row_out =
          static_cast<std::uint16_t*>(p.out) + index.q_token * p.out_token_stride + index.head * p.out_head_stride + lane % 4 * 8;
      const int num_columns = exists ? p.head_dim - lane % 4 * 8 : 0;
#pragma unroll
      for (int i = 0; i < kHeadDim / 32; ++i) {
        std::uint32_t words[4];
#pragma unroll
        for (int j = 0; j < 4; ++j)
          words[j] = device::pack_16<kBf16>(out[16 * i + 4 * j + 2 * r] * factor, out[16 * i + 4 * j + 2 * r + 1] * factor);
        const uint4 columns = gather_columns(words);
        if (32 * i < num_columns) *reinterpret_cast<uint4*>(row_out + 32 * i) = columns;
      }
    }
    if (selecting) store_notes(plan, group, slot);
  }
};

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

/// Grid: one CTA per SM at most; each takes tiles of 64 packed rows per consumer and one kv head until none is left.
template <bool kBf16, int kHeadDim, bool kTransform>
__global__ void __launch_bounds__(WgmmaShape<kHeadDim>::kThreads, 1)
    attention_wgmma_kernel(const __grid_constant__ Plan plan, const __grid_constant__ WgmmaInputs inputs) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Shape = WgmmaShape<kHeadDim>;
  using Control = WgmmaControl<kHeadDim>;
  extern __shared__ __align__(1024) char shared[];
  auto* control = reinterpret_cast<Control*>(shared + Shape::kControlOffset);
  const int warp = static_cast<int>(threadIdx.x) / 32;
  if (threadIdx.x == 0) {
    const auto init = [](std::uint64_t& barrier, int arrivals) { device::barrier_init(device::shared_address(&barrier), arrivals); };
    for (int i = 0; i < Shape::kStages; ++i) {
      init(control->k_full[i], 1), init(control->v_full[i], 1);
      init(control->k_empty[i], Shape::kConsumerWarps), init(control->v_empty[i], Shape::kConsumerWarps);
    }
    for (int i = 0; i < Shape::kQStages; ++i) init(control->q_full[i], kQueryLoaders), init(control->q_empty[i], Shape::kConsumerWarps);
    for (int i = 0; i < kTileSlots; ++i) init(control->tile_full[i], 1), init(control->tile_empty[i], Shape::kConsumerWarps + 3);
    for (int i = 0; i < kTileSlots; ++i) control->tiles[i].again = 0;
    control->any_again = 0;
    device::barrier_init_fence();
    device::prefetch_tensor_map(&inputs.k);
    device::prefetch_tensor_map(&inputs.v);
  }
  __syncthreads();

  if (warp < 4) {
    device::give_registers<Shape::kProducerRegisters>();
    if (warp == 0) {
      WgmmaScheduler<kHeadDim>{plan, control}.run();
    } else if (warp == 1) {
      copy_steps<kHeadDim, true>(plan, inputs, shared, control);
    } else if (warp == 2) {
      copy_steps<kHeadDim, false>(plan, inputs, shared, control);
    } else {
      gather_queries<kHeadDim>(plan, shared, control);
    }
  } else {
    device::take_registers<Shape::kConsumerRegisters>();
    WgmmaConsumer<kBf16, kHeadDim, kTransform> consumer{plan, inputs, shared, warp / 4 - 1};
    consumer.run();
  }
#endif
}

}  // namespace quire::cuda::attn
