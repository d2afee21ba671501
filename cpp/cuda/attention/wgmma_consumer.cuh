// The warpgroups of Hopper's attention kernel that multiply: scores, softmax and output of 64 rows each.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cuda/attention/wgmma_shape.cuh"
#include "cuda/device/vector.cuh"

namespace quire::cuda::attn {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

/// A warpgroup with 64 of the tile's rows. kOptions: there is a mask, or scores are more than a factor times q k.
template <typename Shape, bool kOptions>
struct WgmmaConsumer {
  using Control = WgmmaControl<Shape>;
  static constexpr bool kBf16 = Shape::kBf16;
  static constexpr int kHeadDim = Shape::kHeadDim;
  static constexpr int kKeys = Shape::kKeys;
  static constexpr int kTurnBarrier = 1;  // and the next ones: a warpgroup's turn at products
  static constexpr int kAllBarrier = 8;   // all consumers
  /// Weights of one step and thread that add up to less are kept as they are: float16 holds them.
  static constexpr float kLargeWeights = 16384.0f;
  /// A base below 2^27 becomes larger by at most so much at once: 2^-126, a little less after rounding, would be flushed to zero, and the row with it.
  static constexpr int kMostLowered = 120;
  /// Of a row whose keys were hidden so far. Hidden keys, of score -inf, weigh nothing even so.
  static constexpr float kNoBase = -3.0e38f;

  const Plan& plan;
  const WgmmaInputs& inputs;
  char* shared;
  int group;  // which of the consumers
  // Uses so far, of which follow the next one's place in its ring and the parity of its barrier.
  unsigned tile_uses = 0, q_uses = 0, k_uses = 0;  // the values of the next product are of the keys before
  float out[kHeadDim / 2];
  float score[kKeys / 2];
  std::uint32_t weights[kKeys / 16][4];
  float base[2];  // what weights are relative to, in log2 units; kNoBase while a row that sees keys has none
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

  /// A value that is the same in all lanes, so that the compiler knows, where that is faster.
  __device__ __forceinline__ static int uniform(int value) {
    if constexpr (Shape::kKnowsUniform) return __shfl_sync(kAllLanes, value, 0);
    return value;
  }

  __device__ __forceinline__ int row(int r) const {
    return 64 * group + static_cast<int>(threadIdx.x) % 128 / 32 * 16 + static_cast<int>(threadIdx.x) % 32 / 4 + 8 * r;
  }

  __device__ __forceinline__ static void wait_turn(int group) {
    if constexpr (Shape::kTakeTurns) device::named_barrier_sync(kTurnBarrier + group, 256);
  }
  __device__ __forceinline__ static void pass_turn(int group) {
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
        device::matrix_descriptor(address + k_uses % Shape::kStages * Shape::kKSlotBytes, 0),
        device::matrix_descriptor(address + Shape::kVOffset + (k_uses - 1) % Shape::kStages * Shape::kVSlotBytes, Shape::kKeyPanelBytes)};
  }

  /// score = q k^T for the stage's keys, started.
  __device__ __forceinline__ void start_scores(const Operands& from) {
#pragma unroll
    for (int step = 0; step < Shape::kQkSteps; ++step) {
      const std::uint32_t q = from.q + (step / 4 * Shape::kRowPanelBytes + step % 4 * 32) / 16;
      const std::uint32_t k = from.k + (step / 4 * Shape::kKeyPanelBytes + step % 4 * 32) / 16;
      if constexpr (Shape::kNarrowQ) {
        device::WgmmaShared8<kKeys>::product(score, q, k, step > 0 ? 1 : 0);
      } else {
        device::WgmmaShared<kKeys, kBf16>::product(score, q, k, step > 0 ? 1 : 0);
      }
    }
    device::wgmma_commit();
  }

  /// out += weights v, started.
  __device__ __forceinline__ void start_output(const Operands& from, int accumulate) {
#pragma unroll
    for (int step = 0; step < kKeys / 16; ++step) {
      const std::uint32_t v = from.v + (step * 16 * device::kPanelRowBytes) / 16;
      if constexpr (Shape::kOutputParts == 1) {
        device::WgmmaRegisters<kHeadDim, kBf16>::product(out, weights[step], v, step > 0 ? 1 : accumulate);
      } else {
        constexpr int kPart = kHeadDim / 4;
        using Part = float (&)[kPart];
        using Product = device::WgmmaRegisters<kHeadDim / 2, kBf16>;
        Product::product(reinterpret_cast<Part>(out[0]), weights[step], v, step > 0 ? 1 : accumulate);
        Product::product(reinterpret_cast<Part>(out[kPart]), weights[step], v + Shape::kVPanels / 2 * Shape::kKeyPanelBytes / 16,
                         step > 0 ? 1 : accumulate);
      }
    }
    device::wgmma_commit();
  }

  /// A tile as this thread sees it.
  struct Work {
    TileSlot* slot;  // until it is finished
    RowParams rows[2];  // only with options
    // Keys that all of the warp's rows see, and whose scores need nothing. The end is ~end while that is not so, because rows have no base.
    int full_begin, full_end;
    float log2_scale;  // of scores, to log2 units; where it differs from WgmmaInputs'
    bool scale_first;  // scores are multiplied by all of it beforehand, because it would not keep their order
    bool sees_keys[2];  // for each of the thread's rows
    bool selecting;
    int first, step;  // the next step whose scores are to be computed, down to the first
  };

  __device__ __forceinline__ RowParams row_params(const TileSlot& slot, int r) const {
    return make_row_params(plan, slot.tile, slot.kv_head, row(r));
  }

  /// Which keys of the step the thread's rows see, if not all rows of the warp see all of them: the result. Bit 2 j + i stands for
  /// score[4 j + i] of the first row, and score[4 j + 2 + i] of the second, i < 2: key 8 j + i, counted from the thread's first.
  __device__ __forceinline__ bool find_seen(const Work& work, std::uint32_t valid, std::uint32_t (&seen)[2]) const {
    if ((work.step + 1) * kKeys <= work.full_end && work.step * kKeys >= work.full_begin && valid == ~0u) return false;
    const int first = work.step * kKeys + static_cast<int>(threadIdx.x) % 4 * 2;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const RowParams params = row_params(*work.slot, r);
      seen[r] = bits_below(params.end - first) & ~bits_below(params.begin - first);
      if (valid != ~0u) seen[r] &= spread_bits(valid);
    }
    if (kOptions && plan.params.mask != nullptr) apply_mask(work, seen);
    return true;
  }

  /// Scores of keys that a row does not see become -inf; and what is asked for beyond a factor is done. `masked` and `seen` are find_seen's.
  __device__ __forceinline__ void mask_scores(const Work& work, bool masked, const std::uint32_t (&seen)[2]) {
    if (kOptions && inputs.transform) {
      const int first = work.step * kKeys + static_cast<int>(threadIdx.x) % 4 * 2;
#pragma unroll
      for (int j = 0; j < kKeys / 8; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          score[4 * j + i] = transformed_score(score[4 * j + i], work.rows[i / 2], plan.params.softcap, first + 8 * j + i % 2);
    }
    if (!masked) return;
    if (Shape::kWidenV && work.scale_first) {
      const float factor = row_params(*work.slot, 0).scale * kLog2E;
#pragma unroll
      for (int i = 0; i < kKeys / 2; ++i) score[i] *= factor;
    }
#pragma unroll
    for (int block = 0; block < (kKeys + 31) / 32; ++block) {
      // Most of a step is seen or hidden by all rows.
      const std::uint32_t ones = kKeys - 32 * block >= 32 ? 0xffu : (1u << (kKeys - 32 * block) / 4) - 1u;
      if ((seen[0] & seen[1] & ones << (8 * block)) == ones << (8 * block)) continue;
#pragma unroll
      for (int j = 4 * block; j < 4 * block + 4 && j < kKeys / 8; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if ((seen[i / 2] >> (2 * j + i % 2) & 1u) == 0) score[4 * j + i] = -INFINITY;
    }
  }

  /// The base of rows that need one, as a step after a tile's first has hidden keys.
  __device__ __forceinline__ void give_bases(Work& work) {
    if (work.full_end >= 0) return;
    float factor[2];
    if (work.selecting) {
      device::wgmma_wait<0>();
      device::pin_registers(out);
      raise_base(log2_scale(work), true, factor);
#pragma unroll
      for (int i = 0; i < kHeadDim / 2; ++i) out[i] *= factor[i / 2 % 2];
    } else {
      raise_base(log2_scale(work), false, factor);
      if (__all_sync(kAllLanes, base[0] != kNoBase && base[1] != kNoBase)) work.full_end = ~work.full_end;
    }
  }

  static_assert(kKeys <= 128);
  /// find_seen's bits of the keys before `end`.
  __device__ __forceinline__ static std::uint32_t bits_below(int end) {
    const int keys = min(max(end, 0), kKeys);
    return __funnelshift_lc(~0u, 0u, static_cast<unsigned>(keys / 8 * 2 + min(keys % 8, 2)));
  }
  /// Bit j for both keys of a group of eight.
  __device__ __forceinline__ static std::uint32_t spread_bits(std::uint32_t groups) {
    groups = (groups & 0xffffu) | groups << 8;
    groups &= 0x00ff00ffu;
    groups = (groups | groups << 4) & 0x0f0f0f0fu;
    groups = (groups | groups << 2) & 0x33333333u;
    groups = (groups | groups << 1) & 0x55555555u;
    return groups | groups << 1;
  }

  /// Takes keys that the mask hides out of `seen`. Of four lanes with the same rows each fetches 32 keys' bits.
  __device__ __forceinline__ void apply_mask(const Work& work, std::uint32_t (&seen)[2]) const {
    const int quad = static_cast<int>(threadIdx.x) % 4;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const std::uint32_t mine = mask_bits(plan.params, work.rows[r], work.step * kKeys + 32 * quad);
#pragma unroll
      for (int word = 0; word < (kKeys + 31) / 32; ++word) {
        std::uint32_t bits = __shfl_sync(kAllLanes, mine, word, 4) >> (2 * quad) & 0x03030303u;
        bits = (bits | bits >> 6) & 0x000f000fu;
        seen[r] &= (bits | bits >> 12 | ~0xffu) << (8 * word) | ((1u << (8 * word)) - 1u);
      }
    }
  }

  /// Scores become weights in float32, relative to `base`, which need not be the maximum: as long as weights are not large, nothing depends
  /// on it. `added` is what they come to in this thread's columns.
  __device__ __forceinline__ void weigh(float log2_scale, float (&added)[2]) {
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
    for (int r = 0; r < 2; ++r) {
      added[r] = parts[r][0] + parts[r][1];
    }
  }

  /// Makes the maximum of the scores the base of rows that have none, or of all rows where it is larger. Earlier weights of a row are to be
  /// multiplied by `factor`. A row's base follows from its own scores alone.
  __device__ __forceinline__ void raise_base(float log2_scale, bool all, float (&factor)[2]) {
    float top[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int j = 0; j < kKeys / 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) top[i / 2] = fmaxf(top[i / 2], score[4 * j + i]);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int lanes = 1; lanes <= 2; ++lanes) top[r] = fmaxf(top[r], __shfl_xor_sync(kAllLanes, top[r], lanes));
      const float raised = all || base[r] == kNoBase ? fmaxf(base[r], top[r] * log2_scale) : base[r];
      factor[r] = device::exp2_approx(base[r] - raised);
      base[r] = raised;
      sum[r] *= factor[r];
    }
  }

  /// After a step's large weights, which `added` has told: the base of their rows becomes larger by a whole number. `factor`: what that makes
  /// of the output.
  __device__ __forceinline__ void lower_weights(const float (&added)[2], float (&factor)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float top = added[r];
#pragma unroll
      for (int lanes = 1; lanes <= 2; ++lanes) top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, lanes));
      const int exponent = top >= kLargeWeights ? min(static_cast<int>(__float_as_uint(top) >> 23) - 127, kMostLowered) : 0;
      const float raised = base[r] + static_cast<float>(exponent);
      // A sum that is infinite, of weights that need not be, must show in the output, too; and so must a base that is rounded by so much that the
      // factor would be flushed to zero.
      const float lowered = base[r] - raised;
      factor[r] = top < INFINITY && lowered >= -126.0f ? device::exp2_approx(lowered) : __uint_as_float(0x7fffffffu);
      base[r] = raised;
      sum[r] *= factor[r];
    }
#pragma unroll
    for (int i = 0; i < kKeys / 2; ++i) score[i] *= factor[i / 2 % 2];
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
    const int thread = static_cast<int>(threadIdx.x) - 128 * Shape::kFirstConsumer;
    device::named_barrier_sync(kAllBarrier, kThreads);
    if (step == (slot.tile.key_end + kKeys - 1) / kKeys - 1) {
      for (int i = thread; i < Shape::kRows * kNoteWords<kHeadDim>; i += kThreads) notes[i] = 0;
      device::named_barrier_sync(kAllBarrier, kThreads);
    }
    for (int i = thread; i < Shape::kVSlotBytes / 2; i += kThreads) {
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
        const RowParams params = make_row_params(plan, slot.tile, slot.kv_head, row);
        if (step * kKeys + key >= params.begin && step * kKeys + key < params.end &&
            (!kOptions || plan.params.mask == nullptr || (mask_bits(plan.params, params, step * kKeys + key) & 1u) != 0))
          atomicOr(&notes[row * kNoteWords<kHeadDim> + column / 16], note);
      }
    }
    device::fence_async_proxy();
    device::named_barrier_sync(kAllBarrier, kThreads);
  }

  /// Lets the other warpgroups have a tile of which this one has no row.
  __device__ __noinline__ static void pass_over(const Control& control, int group, unsigned k_uses, unsigned q_uses, int num_steps) {
    wait_full(control.q_full, q_uses);
    release(control.q_empty, q_uses);
#pragma unroll 1
    for (const unsigned end = k_uses + static_cast<unsigned>(num_steps); k_uses != end; ++k_uses) {
      wait_full(control.k_full, k_uses);
      wait_turn(group);
      pass_turn(group);
      release(control.k_empty, k_uses);
      wait_full(control.v_full, k_uses);
      release(control.v_empty, k_uses);
    }
  }

  /// The next tile that has keys and rows of this warpgroup; others are finished here. False: there is none, or, with a tile `unfinished`, none before that
  /// one must be finished.
  __device__ __forceinline__ bool open(Work& work, bool unfinished) {
    for (;;) {
      wait_full(control().tile_full, tile_uses);
      work.slot = &control().tiles[tile_uses % kTileSlots];
      const auto kind = static_cast<TileKind>(uniform(static_cast<int>(work.slot->kind)));
      const int key_begin = uniform(work.slot->tile.key_begin), key_end = uniform(work.slot->tile.key_end);
      const bool has_keys = key_end > 0, has_rows = 64 * group < uniform(work.slot->tile.num_rows);
      // On a second pass all consumers work on V.
      const bool usual = has_keys && (has_rows || kind == TileKind::kSelecting);
      // What is not usual waits as well: the ring is not to fill up behind the tile that is unfinished.
      if (kind == TileKind::kEnd || (unfinished && (kind == TileKind::kNone || !usual))) return false;
      ++tile_uses;
      if (kind != TileKind::kNone) {
        work.first = key_begin / kKeys;
        work.step = (key_end + kKeys - 1) / kKeys - 1;
        if (usual) return true;
        if (has_keys) {
          const int num_steps = work.step + 1 - work.first;
          pass_over(control(), group, k_uses, q_uses, num_steps);
          k_uses += static_cast<unsigned>(num_steps), ++q_uses;
        } else {
          finish_empty(plan, group, *work.slot);
        }
      }
      close(work);
    }
  }

  /// The rest of what an opened tile is: not needed to start its first product.
  __device__ __forceinline__ void describe(Work& work) const {
    RowParams rows[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) rows[r] = row_params(*work.slot, r);
    if constexpr (kOptions) work.rows[0] = rows[0], work.rows[1] = rows[1];
#pragma unroll
    for (int r = 0; r < 2; ++r) work.sees_keys[r] = rows[r].end > rows[r].begin;
    // Rows are in order of position: the warp's first and last say what all of them see.
    work.full_end = __shfl_sync(kAllLanes, rows[0].end, 0);
    work.full_begin = __shfl_sync(kAllLanes, rows[1].begin, 31);
    if (kOptions && plan.params.mask != nullptr) work.full_end = min(work.full_end, max(rows[0].mask_first_key, 0));
    work.log2_scale = inputs.log2_scale;
    work.scale_first = false;
    if (kOptions && inputs.transform) {
      work.log2_scale = 1.0f;
    } else if constexpr (Shape::kWidenV) {
      work.log2_scale = rows[0].scale * kLog2E;
      work.scale_first = !(work.log2_scale > 0.0f && work.log2_scale < INFINITY);
      if (work.scale_first) work.log2_scale = 1.0f, work.full_end = 0;
    }
    work.selecting = uniform(static_cast<int>(work.slot->kind)) == static_cast<int>(TileKind::kSelecting);
    // A second pass takes the maximum first in every step.
    if (work.selecting) work.full_end = -1;
  }

  /// Gives the tile's slot back, each lane for itself.
  __device__ __forceinline__ void close(const Work& work) const {
    device::barrier_arrive(device::shared_address(&control().tile_empty[work.slot - control().tiles]));
  }

  __device__ __forceinline__ float log2_scale(const Work& work) const {
    return kOptions || Shape::kWidenV ? work.log2_scale : inputs.log2_scale;
  }

  /// Waits for K and, with a new tile, its queries; returns, to lane 0, which keys have a block.
  __device__ __forceinline__ std::uint32_t wait_scores_inputs(bool new_tile) const {
    if (new_tile) wait_full(control().q_full, q_uses);
    wait_full(control().k_full, k_uses);
    // The lane that gives the stage back reads it.
    return threadIdx.x % 32 == 0 ? control().valid_keys[k_uses % Shape::kStages] : 0;
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
    select_values(plan, *work.slot, shared + Shape::kVOffset + (k_uses - 1) % Shape::kStages * Shape::kVSlotBytes, wgmma_notes<Shape>(plan),
                  work.step + 1);
  }
  __device__ __forceinline__ void wait_values() const { wait_full(control().v_full, k_uses - 1); }

  /// `later`: how many uses of keys came after those of the values.
  __device__ __forceinline__ void release_values(unsigned later) {
    device::pin_registers(out);
    release(control().v_empty, k_uses - 1 - later);
  }

  /// A tile's first scores become weights.
  __device__ __forceinline__ void weigh_first(Work& work, bool masked, const std::uint32_t (&seen)[2]) {
    device::pin_registers(score);
    mask_scores(work, masked, seen);
    release_keys(work);
#pragma unroll
    for (int r = 0; r < 2; ++r) base[r] = work.sees_keys[r] ? kNoBase : 0.0f, sum[r] = 0.0f;
    float factor[2];
    raise_base(log2_scale(work), true, factor);
    if (work.full_end >= 0 && !__all_sync(kAllLanes, base[0] != kNoBase && base[1] != kNoBase)) work.full_end = ~work.full_end;
    weigh(log2_scale(work), sum);
  }

  /// The first scores of a tile, with nothing else under way.
  __device__ __forceinline__ void start_tile(Work& work) {
    const Operands from = operands();
    const std::uint32_t loaded = wait_scores_inputs(true);
    wait_turn(group);
    device::pin_registers(score);
    device::wgmma_fence();
    start_scores(from);
    pass_turn(group);
    describe(work);
    std::uint32_t seen[2];
    const bool masked = find_seen(work, __shfl_sync(kAllLanes, loaded, 0), seen);
    device::wgmma_wait<0>();
    weigh_first(work, masked, seen);
    pack_weights();
  }

  /// The output of the step that has weights, beside the scores of the next step, which may be another tile's first. The latter's weights
  /// are left in `score`. With a new tile, returns what finishing the last one takes.
  template <bool kNewTile>
  __device__ __forceinline__ auto advance(const Work& values, Work& scores, int accumulate) {
    const Operands from = operands();
    prepare_values(values);
    const std::uint32_t loaded = wait_scores_inputs(kNewTile);
    wait_turn(group);
    device::pin_registers(score);
    device::pin_registers(out);
    device::wgmma_fence();
    start_scores(from);
    wait_values();
    device::wgmma_fence();
    start_output(from, accumulate);
    pass_turn(group);
    const std::uint32_t valid = __shfl_sync(kAllLanes, loaded, 0);
    if constexpr (kNewTile) {
      describe(scores);
      std::uint32_t seen[2];
      const bool masked = find_seen(scores, valid, seen);
      const Ending ending = end_rows(*values.slot);
      device::wgmma_wait<1>();
      weigh_first(scores, masked, seen);
      device::wgmma_wait<0>();
      release_values(1);
      return ending;
    } else {
      device::wgmma_wait<1>();
      device::pin_registers(score);
      // Few of these steps are masked: what that takes is not worth registers before the scores are there.
      std::uint32_t seen[2];
      const bool masked = find_seen(scores, valid, seen);
      mask_scores(scores, masked, seen);
      if (masked) give_bases(scores);
      release_keys(scores);
      float added[2];
      weigh(log2_scale(scores), added);
      sum[0] += added[0], sum[1] += added[1];
      // Rare after a tile's first steps. Without a branch here the compiler would wait for the output amid the exponentials.
      const bool large = __any_sync(kAllLanes, !(added[0] < kLargeWeights && added[1] < kLargeWeights));
      float factor[2];
      if (large) lower_weights(added, factor);
      device::wgmma_wait<0>();
      if (large) {
        device::pin_registers(out);
#pragma unroll
        for (int i = 0; i < kHeadDim / 2; ++i) out[i] *= factor[i / 2 % 2];
      }
      release_values(1);
    }
  }

  __device__ __forceinline__ void run() {
    // The first warpgroup's first turn.
    if (group == Shape::kConsumers - 1) pass_turn(group);
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
        if constexpr (Shape::kQStages > 1) {
          Work next;
          if (open(next, true)) {
            const Ending ending = advance<true>(work, next, accumulate);
            finish(*work.slot, ending);
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
        const Ending ending = end_rows(*work.slot);
        device::wgmma_wait<0>();
        release_values(0);
        finish(*work.slot, ending);
        close(work);
        break;
      }
    }
    if (group == 0) wait_turn(group);
    // Shared memory stays until the copy engine has read it.
    if (Shape::kOutBoxes && threadIdx.x % 32 == 0) device::store_wait_read<0>();
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
    const std::uint32_t* notes = wgmma_notes<Shape>(plan);
    const bool bf16 = Shape::kNarrowQ ? p.dtype == DType::kBFloat16 : kBf16;
    const std::uint16_t infinity = bf16 ? 0x7f80 : 0x7c00, nan = 0x7fff;
    __syncwarp();
    const int first = 64 * group + static_cast<int>(threadIdx.x) % 128 / 32 * 16;
    for (int row = first; row < min(slot.tile.num_rows, first + 16); ++row) {
      const RowIndex index = row_index(plan, slot.tile, slot.kv_head, row);
      auto* out_row = static_cast<std::uint16_t*>(p.out) + index.q_token * p.out_token_stride + index.head * p.out_head_stride;
      for (int column = static_cast<int>(threadIdx.x) % 32; column < p.head_dim; column += 32) {
        const std::uint32_t note = notes[row * kNoteWords<kHeadDim> + column / 16] >> (column % 16 * 2) & 3u;
        if (note == 0 || (out_row[column] & 0x7fff) > infinity) continue;
        out_row[column] = note == 3 ? nan : static_cast<std::uint16_t>(note == 2 ? infinity | 0x8000 : infinity);
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

  /// Two floats of an output row.
  __device__ __forceinline__ std::uint32_t pack_out(float low, float high) const {
    if (Shape::kNarrowQ && plan.params.dtype == DType::kBFloat16) return device::pack_16<true>(low, high);
    return device::pack_16<kBf16>(low, high);
  }

  /// What finishing a tile's rows takes besides their output: known before the last product is done.
  struct Ending {
    float factor[2];
  };

  /// The tile's log-sum-exps are stored here.
  __device__ __forceinline__ Ending end_rows(const TileSlot& slot) const {
    const AttentionParams& p = plan.params;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const float v_scale = p.v_scale != nullptr ? p.v_scale[slot.kv_head * p.v_scale_stride] : 1.0f;
    Ending ending;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float total = sum[r];
      total += __shfl_xor_sync(kAllLanes, total, 1);
      total += __shfl_xor_sync(kAllLanes, total, 2);
      const bool exists = row(r) < slot.tile.num_rows;
      const RowIndex index = row_index(plan, slot.tile, slot.kv_head, exists ? row(r) : 0);
      const RowFinish end = finish_row(p, total == 0.0f ? -INFINITY : base[r], total, index.head);
      if (exists && lane % 4 == 0 && p.lse != nullptr) p.lse[stats_index(plan, index)] = end.lse;
      ending.factor[r] = end.factor * v_scale;
    }
    return ending;
  }

  /// The warp's 16 rows as they are in boxes, by the copy engine.
  __device__ __forceinline__ void store_boxes(const TileSlot& slot, const std::uint32_t (&words)[kHeadDim / 4]) const {
    if constexpr (Shape::kOutBoxes) {
      const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) % 128 / 32;
      const std::uint32_t box =
          device::shared_address(shared) + Shape::kOutOffset + (4 * group + warp) * (Shape::kVPanels * 16 * device::kPanelRowBytes);
      if (lane == 0) device::store_wait_read<0>();
      __syncwarp();
      // Of four matrices at once two are the upper and the lower rows of eight columns, and two of the next eight.
      const std::uint32_t target = box + static_cast<std::uint32_t>(lane % 16 * device::kPanelRowBytes);
#pragma unroll
      for (int i = 0; i < kHeadDim / 16; ++i) {
        const std::uint32_t four[4] = {words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]};
        device::store_matrix_x4(target + i / 4 * (16 * device::kPanelRowBytes) + (((i % 4 * 2 + lane / 16) ^ lane % 8) << 4), four);
      }
      device::fence_async_proxy();
      __syncwarp();
      if (lane == 0) {
        const RowIndex index = row_index(plan, slot.tile, slot.kv_head, row(0));
#pragma unroll
        for (int panel = 0; panel < Shape::kVPanels; ++panel)
          device::store_box(&inputs.out, box + panel * 16 * device::kPanelRowBytes, panel * device::kPanelColumns, index.head,
                            static_cast<int>(index.q_token));
        device::store_commit();
      }
    }
  }

  __device__ __forceinline__ void store_rows(const TileSlot& slot, const std::uint32_t (&words)[kHeadDim / 4]) const {
    const AttentionParams& p = plan.params;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    // Boxes of the same rows on the tile's first pass come before.
    if (Shape::kOutBoxes && slot.kind == TileKind::kSelecting) {
      if (lane == 0) device::store_wait<0>();
      __syncwarp();
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const bool exists = row(r) < slot.tile.num_rows;
      const RowIndex index = row_index(plan, slot.tile, slot.kv_head, exists ? row(r) : 0);
      auto* row_out =
          static_cast<std::uint16_t*>(p.out) + index.q_token * p.out_token_stride + index.head * p.out_head_stride + lane % 4 * 8;
      const int num_columns = exists ? p.head_dim - lane % 4 * 8 : 0;
#pragma unroll
      for (int i = 0; i < kHeadDim / 32; ++i) {
        const uint4 columns = gather_columns({words[8 * i + r], words[8 * i + 2 + r], words[8 * i + 4 + r], words[8 * i + 6 + r]});
        if (32 * i < num_columns) store_global_16(row_out + 32 * i, columns);
      }
    }
  }

  __device__ __forceinline__ void finish(TileSlot& slot, const Ending& ending) {
    // Of each group of eight columns two words: of the thread's two rows.
    std::uint32_t words[kHeadDim / 4];
#pragma unroll
    for (int i = 0; i < kHeadDim / 4; ++i) words[i] = pack_out(out[2 * i] * ending.factor[i % 2], out[2 * i + 1] * ending.factor[i % 2]);
    // What is not finite is not zero times zero.
    bool finite;
    if constexpr (Shape::kNarrowQ) {
      float probes[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
      for (int i = 0; i < kHeadDim / 2; ++i) probes[i % 4] = fmaf(out[i], 0.0f, probes[i % 4]);
      finite = (probes[0] + probes[1]) + (probes[2] + probes[3]) == 0.0f;
    } else {
      std::uint32_t probes[4] = {0, 0, 0, 0};
#pragma unroll
      for (int i = 0; i < kHeadDim / 4; ++i) probes[i % 4] = device::times_zero_plus<kBf16>(words[i], probes[i % 4]);
      finite = ((probes[0] | probes[1] | probes[2] | probes[3]) & 0x7fff7fffu) == 0;
    }
    const bool selecting = slot.kind == TileKind::kSelecting;
    if (!finite && !selecting) slot.again = control().any_again = 1;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    if (Shape::kOutBoxes && inputs.out_boxes && !selecting && row(0) - lane / 4 + 16 <= slot.tile.num_rows) {
      store_boxes(slot, words);
    } else {
      store_rows(slot, words);
      if (selecting) store_notes(plan, group, slot);
    }
  }
};

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

}  // namespace quire::cuda::attn
