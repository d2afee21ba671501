// The warpgroups of Hopper's kernel for products of 8-bit matrices that multiply: 64 rows of every tile each.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cuda/device/wgmma_8bit.cuh"
#include "cuda/quantization/scaled_matmul_wgmma_results.cuh"

namespace quire::cuda::scaled {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

/// A warpgroup: 64 rows of every tile.
template <typename Sum, typename Shape>
struct WgmmaConsumer : WgmmaResults<Sum, Shape> {
  using Results = WgmmaResults<Sum, Shape>;
  using Results::clear_sums, Results::exchange, Results::group, Results::kColumnBlocks, Results::lane, Results::load_values, Results::plan,
      Results::rank, Results::shared, Results::store, Results::sum, Results::thread, Results::warp;
  static constexpr int kTurnBarrier = 3;  // and the next one: one for each group

  std::uint32_t empty;  // the first barrier that this lane releases stages by, in whichever CTA; 0: none
  StageRing<Shape::kStages> ring;

  /// Tells every CTA that copies to this one's stage that this warp has read it: lane i tells the i-th.
  __device__ __forceinline__ void release(int stage) const {
    __syncwarp();
    if (empty == 0) return;
    if (plan.shared_columns == 1) {
      device::barrier_arrive(empty + stage * 8);
    } else {
      device::cluster_barrier_arrive(empty + stage * 8);
    }
  }

  /// Starts the products of a stage with some of its columns.
  template <int kCount>
  __device__ __forceinline__ void multiply_stage(Sum (&d)[kCount], int stage, int first_column, bool accumulate) const {
    const std::uint32_t rows = device::matrix_descriptor(shared.rows(stage) + static_cast<std::uint32_t>(group * 64 * kStepBytes), 0);
    const std::uint32_t columns =
        device::matrix_descriptor(shared.columns(stage) + static_cast<std::uint32_t>(first_column * kStepBytes), 0);
    device::wgmma_fence();
#pragma unroll
    for (int part = 0; part < kStepBytes / 32; ++part)
      device::Wgmma8Bit<kCount * 2, Sum>::product(d, rows + part * 2, columns + part * 2, accumulate || part > 0 ? 1 : 0);
    device::wgmma_commit();
  }

  /// Starts the products of the next step.
  template <int kCount>
  __device__ __forceinline__ void start_next(Sum (&d)[kCount], bool accumulate) {
    device::barrier_wait(shared.full(ring.stage), ring.parity);
    multiply_stage(d, ring.stage, 0, accumulate);
    ring.advance();
  }
  /// d += the products of the next `count` steps with all of a stage's columns, or with the first ones; those of the `started` steps before, one
  /// at least, are on their way.
  template <int kCount>
  __device__ __forceinline__ void multiply_rest(Sum (&d)[kCount], int started, int count) {
    if (count > 0) {
      start_next(d, true);
      device::wgmma_wait<1>();
      for (int step = started; step > 0; --step) release(ring.before(step + 1));
    }
#pragma unroll 1
    for (int step = 1; step < count; ++step) {
      start_next(d, true);
      device::wgmma_wait<1>();
      release(ring.before(2));
    }
    device::wgmma_wait<0>();
    device::pin_registers(d);
    for (int step = count > 0 ? 1 : started; step > 0; --step) release(ring.before(step));
  }
  template <int kCount>
  __device__ __forceinline__ void multiply(Sum (&d)[kCount], const Work& work) {
    start_next(d, false);
    multiply_rest(d, 1, work.num_steps - 1);
  }

  /// Tiles one after another; a tile's results are stored while the next one's first products are under way.
  __device__ __forceinline__ void run_overlapped() {
    auto& half = reinterpret_cast<Sum(&)[Shape::kColumns / 4]>(sum);
    typename Results::AllWords words;
    Work work, next;
    int iteration = 0;
    bool more = locate_work(plan, rank, iteration, work);
    if (more && work.half < 0) {
      start_next(sum, false);
      load_values(work);
      multiply_rest(sum, 1, work.num_steps - 1);
      for (;;) {
        this->convert(words, work);
        more = locate_work(plan, rank, ++iteration, next);
        if (!more || next.half >= 0) break;
        start_next(sum, false);
        start_next(sum, true);
        this->store_words(words, work);
        work = next;
        load_values(work);
        multiply_rest(sum, 2, work.num_steps - 2);
      }
      this->store_words(words, work);
      work = next;
    }
    for (; more; more = locate_work(plan, rank, ++iteration, work)) {
      load_values(work);
      multiply(half, work);
      store(work, work.half * kColumnBlocks / 2, kColumnBlocks / 2);
    }
  }

  using Part = float[Shape::kPartColumns / 2];

  /// What a part's products are multiplied by: of rows lane / 4 and + 8, or of columns.
  struct PartScales {
    float value[Shape::kTokenRows ? 2 : Shape::kColumns / 4];
  };
  __device__ __forceinline__ PartScales load_scales(int stage, int part) const {
    const std::uint32_t scales = shared.scales(stage);
    PartScales result;
    if constexpr (Shape::kTokenRows) {
#pragma unroll
      for (int r = 0; r < 2; ++r)
        result.value[r] = load_shared(scales + static_cast<std::uint32_t>(group * 64 + warp() * 16 + lane() / 4 + 8 * r) * 4);
    } else {
#pragma unroll
      for (int j = 0; j < kColumnBlocks; ++j)
        load_shared_2(result.value[2 * j], result.value[2 * j + 1], scales + static_cast<std::uint32_t>(8 * j + lane() % 4 * 2) * 4);
    }
    const float block_scale = load_shared(scales + static_cast<std::uint32_t>(Shape::kTokens + part) * 4);
#pragma unroll
    for (float& value : result.value) value *= block_scale;
    return result;
  }

  /// Where a lane reads the next step's scale, for shapes that read them: lanes 0 to 15 that of a token of the warp's rows, the others the block's. What lies
  /// outside of the matrices has those of the last token and block: it is not stored.
  struct ScalePlace {
    const float* at = nullptr;
    bool is_block = false;
    int num_left = 0;  // steps with scales
  };
  __device__ __forceinline__ ScalePlace first_scale(const Work& work) const {
    const ScaledMatmulParams& p = plan.params;
    ScalePlace place;
    place.is_block = lane() >= 16;
    const std::int64_t token = min(this->first_row(work) + warp() * 16 + lane(), p.m - 1);
    const std::int64_t block = min(std::int64_t{work.column_tile}, (p.n - 1) / 128);
    place.at = place.is_block ? p.scale_b + block * p.scale_b_row_stride + work.first_step * p.scale_b_group_stride
                              : p.scale_a + token * p.scale_a_row_stride + work.first_step * p.scale_a_group_stride;
    place.num_left = static_cast<int>((p.k + kStepBytes - 1) / kStepBytes) - work.first_step;
    return place;
  }
  /// A step's scale; goes on to the next.
  __device__ __forceinline__ float read_scale(ScalePlace& place) const {
    const int exists = place.num_left-- > 0;
    float scale;
    // Not where the compiler finds it best, which is where it is needed.
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %2, 0;\nmov.f32 %0, 0f00000000;\n@p ld.global.f32 %0, [%1];\n}\n"
                 : "=f"(scale)
                 : "l"(place.at), "r"(exists)
                 : "memory");
    place.at += place.is_block ? plan.params.scale_b_group_stride : plan.params.scale_a_group_stride;
    return scale;
  }
  /// The rows' scales from those of the warp's lanes.
  __device__ __forceinline__ PartScales scales_of_lanes(float scale) const {
    PartScales result;
    scale *= __shfl_sync(0xffffffffu, scale, 16);
#pragma unroll
    for (int r = 0; r < 2; ++r) result.value[r] = __shfl_sync(0xffffffffu, scale, lane() / 4 + 8 * r);
    return result;
  }

  __device__ __forceinline__ void add_scaled(const Part& products, const PartScales& scales, int part) {
#pragma unroll
    for (int j = 0; j < Shape::kPartColumns / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e)
        sum[part * Shape::kPartColumns / 2 + 4 * j + e] += products[4 * j + e] * scales.value[Shape::kTokenRows ? e / 2 : 2 * j + e % 2];
    }
  }

  /// Starts the products of the ring's stage; returns the stage.
  __device__ __forceinline__ int start_step(Part& products) {
    device::barrier_wait(shared.full(ring.stage), ring.parity);
    multiply_stage(products, ring.stage, 0, false);
    const int stage = ring.stage;
    ring.advance();
    return stage;
  }
  /// Adds a stage's products, while the next stage's, if there is one, are under way.
  template <bool kIsLast>
  __device__ __forceinline__ void finish_step(Part& products, int stage, float& scale, ScalePlace& place) {
    PartScales scales;
    if constexpr (Shape::kReadsScales) {
      scales = scales_of_lanes(scale);
      // That of two steps on: it has as long to come.
      if (!kIsLast) scale = read_scale(place);
    } else {
      scales = load_scales(stage, 0);
    }
    device::wgmma_wait<kIsLast ? 0 : 1>();
    device::pin_registers(products);
    release(stage);
    add_scaled(products, scales, 0);
  }

  /// sum = the tile's products with a scale for each token and step: a step's products are summed by themselves, and added while the next
  /// step's are computed.
  __device__ __forceinline__ void multiply_blocks(const Work& work) {
    Part even, odd;
    clear_sums();
    ScalePlace place;
    float even_scale = 0.0f, odd_scale = 0.0f;
    if constexpr (Shape::kReadsScales) {
      place = first_scale(work);
      even_scale = read_scale(place);
      odd_scale = read_scale(place);
    }
    int stage = start_step(even), next = 0;
    int left = work.num_steps - 1;  // steps not started
#pragma unroll 1
    for (; left >= 2; left -= 2) {
      next = start_step(odd);
      finish_step<false>(even, stage, even_scale, place);
      stage = start_step(even);
      finish_step<false>(odd, next, odd_scale, place);
    }
    if (left == 1) {
      next = start_step(odd);
      finish_step<false>(even, stage, even_scale, place);
      finish_step<true>(odd, next, odd_scale, place);
    } else {
      finish_step<true>(even, stage, even_scale, place);
    }
  }

  /// The same where there are no registers for two steps' products: the groups take turns, so that one adds while the other multiplies.
  __device__ __forceinline__ void multiply_blocks_in_turn(const Work& work) {
    Part products;
    clear_sums();
#pragma unroll 1
    for (int step = 0; step < work.num_steps; ++step) {
      device::barrier_wait(shared.full(ring.stage), ring.parity);
#pragma unroll
      for (int part = 0; part < Shape::kParts; ++part) {
        device::named_barrier_sync(kTurnBarrier + group, 256);
        device::pin_registers(products);
        multiply_stage(products, ring.stage, part * Shape::kPartColumns, false);
        device::named_barrier_arrive(kTurnBarrier + 1 - group, 256);
        const PartScales scales = load_scales(ring.stage, part);
        device::wgmma_wait<0>();
        device::pin_registers(products);
        if (part == Shape::kParts - 1) release(ring.stage);
        add_scaled(products, scales, part);
      }
      ring.advance();
    }
  }
  /// Group 0 has the first turn; in the end it takes the last.
  __device__ __forceinline__ void begin_turns() const {
    if (Shape::kParts > 1 && group == 1) device::named_barrier_arrive(kTurnBarrier, 256);
  }
  __device__ __forceinline__ void end_turns() const {
    if (Shape::kParts > 1 && group == 0) device::named_barrier_sync(kTurnBarrier, 256);
  }

  __device__ __forceinline__ void run() {
    if constexpr (Shape::kHalves) {
      if (plan.params.out_dtype != DType::kFloat32) {
        run_overlapped();
      } else {
        run_tiles();
      }
    } else {
      run_tiles();
    }
    if (thread() == 0) device::store_wait_read<0>();
  }

  __device__ __forceinline__ void run_tiles() {
    Work work;
    const SplitColumns<Shape> mine(plan, rank);
    begin_turns();
    for (int iteration = 0; locate_work(plan, rank, iteration, work); ++iteration) {
      load_values(work);
      int first = 0, count = kColumnBlocks;
      if constexpr (Shape::kParts > 1) {
        multiply_blocks_in_turn(work);
      } else if constexpr (Shape::kBlockScales) {
        multiply_blocks(work);
      } else if constexpr (Shape::kHalves) {
        if (work.half >= 0) {
          count = kColumnBlocks / 2, first = work.half * count;
          multiply(reinterpret_cast<Sum(&)[Shape::kColumns / 4]>(sum), work);
        } else {
          multiply(sum, work);
        }
      } else {
        multiply(sum, work);
      }
      // Tiles that are halved have no splits.
      if constexpr (!Shape::kHalves) {
        if (plan.splits > 1) {
          exchange(mine);
          first = mine.first, count = mine.count;
        }
      }
      store(work, first, count);
    }
    end_turns();
  }
};

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

}  // namespace quire::cuda::scaled
