// Products of 8-bit matrices on Hopper: TMA, wgmma, clusters that share operands and that split the inner dimension.
// SPDX-License-Identifier: Apache-2.0
//
// A tile has kRows rows of one operand and kColumns rows of the other ("columns"). The weight lies along the rows, so that few tokens need
// few columns; with block scales and many tokens, tokens do (kTokenRows), so that a thread has few scales.
#pragma once

#include <cuda.h>

#include <algorithm>
#include <type_traits>

#include "cuda/device/async_copy.cuh"
#include "cuda/device/cluster.cuh"
#include "cuda/device/dependent_launch.cuh"
#include "cuda/device/mma.cuh"
#include "cuda/device/tma.cuh"
#include "cuda/device/wgmma_8bit.cuh"
#include "cuda/quantization/scaled_matmul_epilogue.cuh"

namespace quire::cuda::scaled {

constexpr int kStepBytes = 128;  // of a row, in one step

struct WgmmaPlan {
  CUtensorMap rows, columns;  // {k, row}; boxes of kRows and of kColumns / shared_columns rows
  CUtensorMap out;            // {feature, token}; boxes of 64 features and kChunkTokens tokens; for copies_out
  ScaledMatmulParams params;
  int num_steps;         // of one split
  int shared_columns;    // neighbours in a cluster with the same columns and other rows
  int splits;            // of the inner dimension: a cluster is shared_columns * splits CTAs
  int num_row_groups;    // of shared_columns row tiles
  int num_column_tiles;
  int column_group;      // column tiles that are gone through before the next row group
  int num_items;         // pairs of a row group and a column tile
  int num_halved_tiles;  // single tiles after the items, whose inner dimension the two CTAs of a cluster halve
  bool reads_rows_once;  // or at one time: the L2 cache need not keep them
  bool copies_out;       // results are written by the copy engine
  bool vector_out;       // or by 16-byte stores
};

template <int kConsumerCount, int kColumnCount, bool kTokensAreRows, bool kHasBlockScales>
struct WgmmaShape {
  static constexpr int kConsumers = kConsumerCount;  // warpgroups with 64 rows each
  static constexpr int kThreads = 128 * (kConsumers + 1);
  static constexpr int kColumns = kColumnCount;
  static constexpr bool kTokenRows = kTokensAreRows;
  static constexpr bool kBlockScales = kHasBlockScales;
  static constexpr int kRows = 64 * kConsumers;
  static constexpr int kTokens = kTokenRows ? kRows : kColumns;
  static constexpr int kRowsBytes = kRows * kStepBytes, kColumnsBytes = kColumns * kStepBytes;
  static constexpr int kStageBytes = kRowsBytes + kColumnsBytes;
  static constexpr int kPartColumns = kTokenRows ? 128 : kColumns;  // that share a scale_b, where it has blocks
  static constexpr int kParts = kColumns / kPartColumns;
  static constexpr int kScaleBytes = kBlockScales ? kTokens * 4 + 16 : 0;
  // Results are staged as 64 output features (128 bytes) of so many tokens: columns, or a consumer's rows.
  static constexpr int kChunkColumns = kColumns < 64 ? kColumns : 64;
  static constexpr int kChunkTokens = kTokenRows ? 64 : kChunkColumns;
  static constexpr int kChunkBytes = kChunkTokens * 128;
  static constexpr int kStagingBytes = 2 * kChunkBytes;   // per consumer
  static constexpr int kColumnValueBytes = kColumns * 4;  // per consumer
  static constexpr int kFixedBytes = kConsumers * (kStagingBytes + kColumnValueBytes) + 256;
  static constexpr int kStages = std::min(16, (227 * 1024 - kFixedBytes) / (kStageBytes + kScaleBytes));
  static constexpr int kStagingOffset = kStages * kStageBytes;
  static constexpr int kColumnValueOffset = kStagingOffset + kConsumers * kStagingBytes;
  static constexpr int kScaleOffset = kColumnValueOffset + kConsumers * kColumnValueBytes;
  static constexpr int kBarrierOffset = kScaleOffset + kStages * kScaleBytes;
  static constexpr int kSharedBytes = kBarrierOffset + (2 * kStages + 2) * 8;
  static_assert(kSharedBytes <= 227 * 1024 && kStages >= 3);
  static_assert(kRows * std::max(kColumns, 64) * 4 <= kStages * kStageBytes, "partial sums take the stages' place");
  static_assert(!kTokenRows || (kBlockScales && kRows == 128), "tokens are rows for block scales only");
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

template <int kStages>
struct StageRing {
  int stage = 0;
  std::uint32_t parity = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

/// What a CTA does next: a tile, and which of its steps.
struct Work {
  int row_tile, column_tile, first_step, num_steps;
  int splits, split;  // of the tile, and this CTA's
  bool shares;        // columns, with its neighbours
};

/// A CTA's `iteration`-th work.
__device__ __forceinline__ bool locate_work(const WgmmaPlan& plan, int rank, int iteration, Work& work) {
  const int size = plan.shared_columns * plan.splits;
  const int cluster = static_cast<int>(blockIdx.x) / size, num_clusters = static_cast<int>(gridDim.x) / size;
  int item = cluster + iteration * num_clusters;
  const bool halved = item >= plan.num_items;
  int row_in_group = rank % plan.shared_columns;
  work.shares = !halved;
  work.splits = plan.splits;
  work.num_steps = plan.num_steps;
  work.split = rank / plan.shared_columns;
  if (halved) {
    item -= plan.num_items;
    if (item >= plan.num_halved_tiles) return false;
    row_in_group = item % 2;
    item = plan.num_items + item / 2;
    work.splits = 2;
    work.split = rank;
    work.num_steps = (plan.num_steps + 1) / 2;
  }
  const int per_group = plan.column_group * plan.num_row_groups;
  const int group = item / per_group, in_group = item - group * per_group;
  const int width = min(plan.column_group, plan.num_column_tiles - group * plan.column_group);
  const int row_group = in_group / width;
  work.column_tile = group * plan.column_group + in_group - row_group * width;
  work.row_tile = row_group * plan.shared_columns + row_in_group;
  work.first_step = work.split * work.num_steps;
  return true;
}

__device__ __forceinline__ void store_shared(std::uint32_t address, float value) {
  asm volatile("st.shared.f32 [%0], %1;\n" ::"r"(address), "f"(value) : "memory");
}
// Not as words: sums that products write must not change their type, or the products wait for each other.
__device__ __forceinline__ void store_shared_4(std::uint32_t address, float a, float b, float c, float d) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};\n" ::"r"(address), "f"(a), "f"(b), "f"(c), "f"(d) : "memory");
}
__device__ __forceinline__ void store_shared_4(std::uint32_t address, int a, int b, int c, int d) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};\n" ::"r"(address), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}
__device__ __forceinline__ float load_shared(std::uint32_t address) {
  float value;
  asm volatile("ld.shared.f32 %0, [%1];\n" : "=f"(value) : "r"(address) : "memory");
  return value;
}
__device__ __forceinline__ void load_shared_2(float& first, float& second, std::uint32_t address) {
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];\n" : "=f"(first), "=f"(second) : "r"(address) : "memory");
}
__device__ __forceinline__ void load_shared_4(std::uint32_t (&words)[4], std::uint32_t address) {
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(address)
               : "memory");
}

template <typename T>
__device__ __forceinline__ T from_word(std::uint32_t word) {
  if constexpr (std::is_same_v<T, float>) {
    return __uint_as_float(word);
  } else {
    return static_cast<T>(word);
  }
}

/// Addresses of everything in shared memory.
template <typename Shape>
struct WgmmaShared {
  std::uint32_t base;
  __device__ __forceinline__ std::uint32_t rows(int stage) const { return base + stage * Shape::kStageBytes; }
  __device__ __forceinline__ std::uint32_t columns(int stage) const { return rows(stage) + Shape::kRowsBytes; }
  __device__ __forceinline__ std::uint32_t scales(int stage) const { return base + Shape::kScaleOffset + stage * Shape::kScaleBytes; }
  __device__ __forceinline__ std::uint32_t full(int stage) const { return base + Shape::kBarrierOffset + stage * 8; }
  __device__ __forceinline__ std::uint32_t empty(int stage) const { return full(stage) + Shape::kStages * 8; }
  /// All splits' warps have finished their products, and their sums are here.
  __device__ __forceinline__ std::uint32_t finished() const { return base + Shape::kBarrierOffset + 2 * Shape::kStages * 8; }
  __device__ __forceinline__ std::uint32_t received() const { return finished() + 8; }
};

/// How the CTAs of a tile's splits divide its columns between them once they exchange sums: blocks of 8 columns.
template <typename Shape>
struct SplitColumns {
  int first_rank, distance;  // ranks of the splits
  int each, first, count;
  __device__ __forceinline__ SplitColumns(const WgmmaPlan& plan, int rank) {
    // Either every shared_columns-th CTA, or both that halve a tile.
    const bool halved = plan.splits == 1;
    const int splits = halved ? 2 : plan.splits, split = halved ? rank : rank / plan.shared_columns;
    first_rank = halved ? 0 : rank % plan.shared_columns;
    distance = halved ? 1 : plan.shared_columns;
    each = (Shape::kColumns / 8 + splits - 1) / splits;
    first = split * each;
    count = min(each, Shape::kColumns / 8 - first);
  }
};

/// One thread: copies the operands of every step. Past the end of a matrix it copies zeros.
template <typename Shape>
__device__ void copy_operands(const WgmmaPlan& plan, const WgmmaShared<Shape>& shared, int rank) {
  StageRing<Shape::kStages> ring;
  Work work;
  const int sharing = plan.shared_columns, box_columns = Shape::kColumns / sharing;
  const int member = rank % sharing;
  const std::uint32_t neighbours = ((1u << sharing) - 1u) << (rank - member);
  const std::uint64_t policy = device::read_once_policy();
  for (int iteration = 0; locate_work(plan, rank, iteration, work); ++iteration) {
    const int row = work.row_tile * Shape::kRows, column = work.column_tile * Shape::kColumns;
    for (int step = 0; step < work.num_steps; ++step) {
      const int k = (work.first_step + step) * kStepBytes;
      const std::uint32_t full = shared.full(ring.stage);
      device::barrier_wait(shared.empty(ring.stage), ring.parity ^ 1);
      device::barrier_arrive_expect(full, Shape::kStageBytes);
      if (plan.reads_rows_once) {
        device::copy_box_once(shared.rows(ring.stage), &plan.rows, full, k, row, policy);
      } else {
        device::copy_box(shared.rows(ring.stage), &plan.rows, full, k, row);
      }
      if (sharing == 1) {
        device::copy_box(shared.columns(ring.stage), &plan.columns, full, k, column);
      } else if (work.shares) {
        device::copy_box_to_ctas(shared.columns(ring.stage) + static_cast<std::uint32_t>(member * box_columns * kStepBytes), &plan.columns,
                                 full, k, column + member * box_columns, neighbours);
      } else {
        for (int part = 0; part < sharing; ++part)
          device::copy_box(shared.columns(ring.stage) + static_cast<std::uint32_t>(part * box_columns * kStepBytes), &plan.columns, full, k,
                           column + part * box_columns);
      }
      ring.advance();
    }
  }
}

/// One warp: puts scales beside the operands of every step, one for each token, and the block's after them.
template <typename Shape>
__device__ void copy_scales(const WgmmaPlan& plan, const WgmmaShared<Shape>& shared, int rank) {
  const ScaledMatmulParams& p = plan.params;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  StageRing<Shape::kStages> ring;
  Work work;
  for (int iteration = 0; locate_work(plan, rank, iteration, work); ++iteration) {
    const std::int64_t token = std::int64_t{Shape::kTokenRows ? work.row_tile : work.column_tile} * Shape::kTokens + lane;
    const std::int64_t block =
        Shape::kTokenRows ? std::int64_t{work.column_tile} * Shape::kParts + lane : work.row_tile * Shape::kRows / 128;
    for (int step = 0; step < work.num_steps; ++step) {
      const std::int64_t group = work.first_step + step;
      const bool valid = group * kStepBytes < p.k;
      const float* a = p.scale_a + token * p.scale_a_row_stride + group * p.scale_a_group_stride;
      const float* b = p.scale_b + block * p.scale_b_row_stride + group * p.scale_b_group_stride;
      device::barrier_wait(shared.empty(ring.stage), ring.parity ^ 1);
      const std::uint32_t to = shared.scales(ring.stage);
#pragma unroll
      for (int i = 0; i < (Shape::kTokens + 31) / 32; ++i) {
        const bool there = valid && token + 32 * i < p.m;
        if (lane + 32 * i < Shape::kTokens)
          device::copy_async_4(to + static_cast<std::uint32_t>(lane + 32 * i) * 4, there ? a + 32 * i * p.scale_a_row_stride : p.scale_a,
                               there ? 4 : 0);
      }
      if (lane < Shape::kParts) {
        const bool there = valid && block * 128 < p.n;
        device::copy_async_4(to + static_cast<std::uint32_t>(Shape::kTokens + lane) * 4, there ? b : p.scale_b, there ? 4 : 0);
      }
      device::barrier_arrive_after_copies(shared.full(ring.stage));
      ring.advance();
    }
  }
}

/// A warpgroup: 64 rows of every tile.
template <typename Sum, typename Shape>
struct WgmmaConsumer {
  static constexpr int kColumnBlocks = Shape::kColumns / 8, kChunkBlocks = Shape::kChunkColumns / 8;
  static constexpr int kGroupBarrier = 1, kTurnBarrier = 3;  // and the next ones: one for each group
  static constexpr bool kHasColumnValues = Shape::kTokenRows || !Shape::kBlockScales;
  static constexpr int kValuesPerThread = (Shape::kColumns + 127) / 128;

  const WgmmaPlan& plan;
  const WgmmaShared<Shape>& shared;
  int rank, group;
  std::uint32_t empty;  // the first barrier that this lane releases stages by, in whichever CTA; 0: none
  StageRing<Shape::kStages> ring;
  Sum sum[Shape::kColumns / 2];
  // Of the thread's rows, where they are output features.
  float feature_scale[2], bias[2];
  int column_sum[2];
  float column_value[kValuesPerThread];
  int chunks_staged = 0;

  __device__ __forceinline__ int thread() const { return static_cast<int>(threadIdx.x) % 128; }
  __device__ __forceinline__ int warp() const { return thread() / 32; }
  __device__ __forceinline__ int lane() const { return thread() % 32; }
  __device__ __forceinline__ void sync_group() const { device::named_barrier_sync(kGroupBarrier + group, 128); }
  __device__ __forceinline__ std::uint32_t column_values() const {
    return shared.base + Shape::kColumnValueOffset + group * Shape::kColumnValueBytes;
  }
  __device__ __forceinline__ std::uint32_t staging() const { return shared.base + Shape::kStagingOffset + group * Shape::kStagingBytes; }
  /// First row, within the matrix.
  __device__ __forceinline__ std::int64_t first_row(const Work& work) const {
    return std::int64_t{work.row_tile} * Shape::kRows + group * 64;
  }

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

  __device__ __forceinline__ void load_values(const Work& work) {
    const ScaledMatmulParams& p = plan.params;
    if constexpr (!Shape::kTokenRows) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const std::int64_t n = first_row(work) + warp() * 16 + lane() / 4 + 8 * r;
        bias[r] = load_bias(p, n);
        if constexpr (!Shape::kBlockScales) {
          feature_scale[r] = load_feature_scale(p, n);
          column_sum[r] = load_column_sum(p, n);
        }
      }
    }
    if constexpr (kHasColumnValues) {
#pragma unroll
      for (int i = 0; i < kValuesPerThread; ++i) {
        const int column = thread() + 128 * i;
        const std::int64_t at = std::int64_t{work.column_tile} * Shape::kColumns + column;
        if (column < Shape::kColumns) column_value[i] = Shape::kTokenRows ? load_bias(p, at) : load_token_scale(p, at);
      }
    }
  }
  /// Shows the group the values of columns. Not before the products: that would be a wait for memory.
  __device__ __forceinline__ void share_values() const {
    if constexpr (kHasColumnValues) {
#pragma unroll
      for (int i = 0; i < kValuesPerThread; ++i) {
        const int column = thread() + 128 * i;
        if (column < Shape::kColumns) store_shared(column_values() + static_cast<std::uint32_t>(column) * 4, column_value[i]);
      }
    }
  }

  /// Starts the products of the ring's stage with some of its columns.
  template <int kCount>
  __device__ __forceinline__ void multiply_stage(Sum (&d)[kCount], int first_column, bool accumulate) const {
    const std::uint32_t rows = device::matrix_descriptor(shared.rows(ring.stage) + static_cast<std::uint32_t>(group * 64 * kStepBytes), 0);
    const std::uint32_t columns =
        device::matrix_descriptor(shared.columns(ring.stage) + static_cast<std::uint32_t>(first_column * kStepBytes), 0);
    device::wgmma_fence();
#pragma unroll
    for (int part = 0; part < kStepBytes / 32; ++part)
      device::Wgmma8Bit<kCount * 2, Sum>::product(d, rows + part * 2, columns + part * 2, accumulate || part > 0 ? 1 : 0);
    device::wgmma_commit();
  }

  /// sum = the tile's products.
  __device__ __forceinline__ void multiply(const Work& work) {
    int previous = 0;
#pragma unroll 1
    for (int step = 0; step < work.num_steps; ++step) {
      device::barrier_wait(shared.full(ring.stage), ring.parity);
      multiply_stage(sum, 0, step > 0);
      if (step > 0) {
        device::wgmma_wait<1>();
        release(previous);
      }
      previous = ring.stage;
      ring.advance();
    }
    device::wgmma_wait<0>();
    device::pin_registers(sum);
    release(previous);
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
  __device__ __forceinline__ void add_scaled(const Part& products, const PartScales& scales, int part) {
#pragma unroll
    for (int j = 0; j < Shape::kPartColumns / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e)
        sum[part * Shape::kPartColumns / 2 + 4 * j + e] += products[4 * j + e] * scales.value[Shape::kTokenRows ? e / 2 : 2 * j + e % 2];
    }
  }
  __device__ __forceinline__ void clear_sums() {
#pragma unroll
    for (int i = 0; i < Shape::kColumns / 2; ++i) sum[i] = 0;
  }

  /// Starts the products of the ring's stage; returns the stage.
  __device__ __forceinline__ int start_step(Part& products) {
    device::barrier_wait(shared.full(ring.stage), ring.parity);
    multiply_stage(products, 0, false);
    const int stage = ring.stage;
    ring.advance();
    return stage;
  }
  /// Adds a stage's products, while the next stage's, if there is one, are under way.
  template <bool kIsLast>
  __device__ __forceinline__ void finish_step(Part& products, int stage) {
    const PartScales scales = load_scales(stage, 0);
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
    int stage = start_step(even), next = 0;
    int left = work.num_steps - 1;  // steps not started
#pragma unroll 1
    for (; left >= 2; left -= 2) {
      next = start_step(odd);
      finish_step<false>(even, stage);
      stage = start_step(even);
      finish_step<false>(odd, next);
    }
    if (left == 1) {
      next = start_step(odd);
      finish_step<false>(even, stage);
      finish_step<true>(odd, next);
    } else {
      finish_step<true>(even, stage);
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
        multiply_stage(products, part * Shape::kPartColumns, false);
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

  /// Sums of products with a - zero_point.
  __device__ __forceinline__ void subtract_zero_points(Sum* sums, const Work& work, int j) const {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int zero_point = load_zero_point(plan.params, std::int64_t{work.column_tile} * Shape::kColumns + 8 * j + lane() % 4 * 2 + e);
      sums[e] = subtract_zero_point(sums[e], zero_point, column_sum[0]);
      sums[2 + e] = subtract_zero_point(sums[2 + e], zero_point, column_sum[1]);
    }
  }
  __device__ __forceinline__ bool has_zero_points() const { return std::is_same_v<Sum, int> && plan.params.zero_point != nullptr; }

  /// The values of two columns of column block j: scales of tokens or, where tokens are rows, biases.
  __device__ __forceinline__ void load_column_values(float (&values)[2], int j) const {
    if constexpr (kHasColumnValues)
      load_shared_2(values[0], values[1], column_values() + static_cast<std::uint32_t>(8 * j + lane() % 4 * 2) * 4);
  }
  /// A result from a sum in row lane / 4 + 8 r.
  __device__ __forceinline__ float finish(Sum value, int r, float column_value) const {
    if constexpr (Shape::kTokenRows) {
      return value + column_value;
    } else if constexpr (Shape::kBlockScales) {
      return value + bias[r];
    } else {
      return fmaf(static_cast<float>(value) * column_value, feature_scale[r], bias[r]);
    }
  }

  __device__ __forceinline__ void store_float32(float value, const Work& work, int j, int e) const {
    const ScaledMatmulParams& p = plan.params;
    const std::int64_t row = first_row(work) + warp() * 16 + lane() / 4 + e / 2 * 8;
    const std::int64_t column = std::int64_t{work.column_tile} * Shape::kColumns + 8 * j + lane() % 4 * 2 + e % 2;
    const std::int64_t m = Shape::kTokenRows ? row : column, n = Shape::kTokenRows ? column : row;
    if (m < p.m && n < p.n) static_cast<float*>(p.out)[m * p.out_stride + n] = value;
  }

  /// Copies results of column blocks [first, first + count), staged at an address, to the output.
  __device__ __forceinline__ void copy_out(std::uint32_t from, const Work& work, int first, int count) const {
    const ScaledMatmulParams& p = plan.params;
    const std::int64_t column = std::int64_t{work.column_tile} * Shape::kColumns + 8 * first;
    const int pieces = Shape::kTokenRows ? count : 8, tokens = Shape::kTokenRows ? 64 : 8 * count;
    const std::int64_t first_token = Shape::kTokenRows ? first_row(work) : column;
    const std::int64_t first_feature = Shape::kTokenRows ? column : first_row(work);
    auto* out = static_cast<std::uint16_t*>(p.out);
#pragma unroll 1
    for (int i = thread(); i < tokens * pieces; i += 128) {
      const int token = i / pieces, piece = i - token * pieces;
      const std::int64_t m = first_token + token, n = first_feature + piece * 8;
      if (m >= p.m || n >= p.n) continue;
      std::uint32_t words[4];
      load_shared_4(words, from + static_cast<std::uint32_t>(token * 128 + ((piece ^ token % 8) * 16)));
      std::uint16_t* to = out + m * p.out_stride + n;
      if (plan.vector_out && n + 8 <= p.n) {
        *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
      } else {
#pragma unroll
        for (int e = 0; e < 8; ++e)
          if (n + e < p.n) to[e] = static_cast<std::uint16_t>(words[e / 2] >> (e % 2 * 16));
      }
    }
  }

  /// Stores `count` column blocks from `first` on as 16-bit floats, by way of shared memory: 64 features of some tokens, in rows of 128 bytes with
  /// swizzled 16-byte pieces.
  template <bool kBf16>
  __device__ __forceinline__ void store_chunk(const Sum* from, const Work& work, int first, int count) {
    std::uint32_t words[kChunkBlocks][2];
    float values[kChunkBlocks][2];
#pragma unroll
    for (int j = 0; j < kChunkBlocks; ++j) load_column_values(values[j], min(first + j, kColumnBlocks - 1));
#pragma unroll
    for (int j = 0; j < kChunkBlocks; ++j) {
#pragma unroll
      for (int r = 0; r < 2; ++r)
        words[j][r] =
            device::pack_16<kBf16>(finish(from[4 * j + 2 * r], r, values[j][0]), finish(from[4 * j + 2 * r + 1], r, values[j][1]));
    }
    const std::uint32_t buffer = staging() + static_cast<std::uint32_t>(chunks_staged % 2 * Shape::kChunkBytes);
    ++chunks_staged;
    if (thread() == 0) device::store_wait_read<1>();
    sync_group();
    // Lane i says where row i % 8 of matrix i / 8 goes.
    const int matrix = lane() / 8, in_matrix = lane() % 8;
#pragma unroll
    for (int j = 0; j < kChunkBlocks; j += 2) {
      const std::uint32_t four[4] = {words[j][0], words[j][1], words[j + 1][0], words[j + 1][1]};
      if constexpr (Shape::kTokenRows) {
        const int token = warp() * 16 + matrix % 2 * 8 + in_matrix, piece = j + matrix / 2;
        device::store_matrix_x4(buffer + static_cast<std::uint32_t>(token * 128 + ((piece ^ in_matrix) * 16)), four);
      } else {
        const int token = (j + matrix / 2) * 8 + in_matrix, piece = warp() * 2 + matrix % 2;
        device::store_matrix_x4_transposed(buffer + static_cast<std::uint32_t>(token * 128 + ((piece ^ in_matrix) * 16)), four);
      }
    }
    if (plan.copies_out && count >= kChunkBlocks) {
      device::fence_async_proxy();
      sync_group();
      if (thread() == 0) {
        const int row = work.row_tile * Shape::kRows + group * 64, column = work.column_tile * Shape::kColumns + 8 * first;
        device::store_box(&plan.out, buffer, Shape::kTokenRows ? column : row, Shape::kTokenRows ? row : column);
        device::store_commit();
      }
    } else {
      sync_group();
      copy_out(buffer, work, first, min(count, kChunkBlocks));
    }
  }

  /// Stores results of sums, which are of `count` column blocks from `first` on.
  __device__ __forceinline__ void store(const Work& work, int first, int count) {
    share_values();
    sync_group();
    const DType dtype = plan.params.out_dtype;
#pragma unroll
    for (int chunk = 0; chunk < Shape::kColumns / Shape::kChunkColumns; ++chunk) {
      const int left = count - chunk * kChunkBlocks, at = first + chunk * kChunkBlocks;
      if (left <= 0) break;
      // A copy: only products may write sums, or they would wait for each other.
      Sum from[4 * kChunkBlocks];
#pragma unroll
      for (int i = 0; i < 4 * kChunkBlocks; ++i) from[i] = sum[4 * chunk * kChunkBlocks + i];
      if (has_zero_points()) {
#pragma unroll
        for (int j = 0; j < kChunkBlocks; ++j) subtract_zero_points(from + 4 * j, work, at + j);
      }
      if (dtype == DType::kBFloat16) {
        store_chunk<true>(from, work, at, left);
      } else if (dtype == DType::kFloat16) {
        store_chunk<false>(from, work, at, left);
      } else {
#pragma unroll
        for (int j = 0; j < kChunkBlocks; ++j) {
          if (j >= left) break;
          float values[2];
          load_column_values(values, at + j);
#pragma unroll
          for (int e = 0; e < 4; ++e) store_float32(finish(from[4 * j + e], e / 2, values[e % 2]), work, at + j, e);
        }
      }
    }
    // Values of columns may change only now.
    if (dtype == DType::kFloat32) sync_group();
  }

  /// Makes sums the totals over all splits, added in their order, of this CTA's share of the columns.
  __device__ __forceinline__ void exchange(const Work& work, const SplitColumns<Shape>& mine) {
    const int split_rank = mine.first_rank + lane() * mine.distance;
    // Sums take the stages' place: none may be in use any more.
    __syncwarp();
    if (lane() < work.splits) device::cluster_barrier_arrive(device::address_in_cta(shared.finished(), split_rank));
    device::barrier_wait(shared.finished(), 0);
    const auto place = [&](int split, int j) {
      return shared.base + static_cast<std::uint32_t>(((split * mine.each + j) * Shape::kConsumers * 128 + group * 128 + thread()) * 16);
    };
    int owner = 0, in_owner = 0;
#pragma unroll
    for (int j = 0; j < kColumnBlocks; ++j) {
      const std::uint32_t to = place(work.split, in_owner);
      if (owner == work.split) {
        store_shared_4(to, sum[4 * j], sum[4 * j + 1], sum[4 * j + 2], sum[4 * j + 3]);
      } else {
        const int owner_rank = mine.first_rank + owner * mine.distance;
        device::cluster_store_16(device::address_in_cta(to, owner_rank), device::address_in_cta(shared.received(), owner_rank), sum[4 * j],
                                 sum[4 * j + 1], sum[4 * j + 2], sum[4 * j + 3]);
      }
      if (++in_owner == mine.each) in_owner = 0, ++owner;
    }
    if (mine.count <= 0) return;
    device::barrier_wait(shared.received(), 0);
    clear_sums();
#pragma unroll 1
    for (int split = 0; split < work.splits; ++split) {
#pragma unroll
      for (int j = 0; j < (kColumnBlocks + 1) / 2; ++j) {
        if (j >= mine.count) break;
        std::uint32_t words[4];
        load_shared_4(words, place(split, j));
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[4 * j + e] += from_word<Sum>(words[e]);
      }
    }
  }

  __device__ __forceinline__ void run() {
    Work work;
    const SplitColumns<Shape> mine(plan, rank);
    begin_turns();
    for (int iteration = 0; locate_work(plan, rank, iteration, work); ++iteration) {
      load_values(work);
      if constexpr (Shape::kParts > 1) {
        multiply_blocks_in_turn(work);
      } else if constexpr (Shape::kBlockScales) {
        multiply_blocks(work);
      } else {
        multiply(work);
      }
      int first = 0, count = kColumnBlocks;
      if (work.splits > 1) {
        exchange(work, mine);
        first = mine.first, count = mine.count;
      }
      store(work, first, count);
    }
    end_turns();
    if (thread() == 0) device::store_wait_read<0>();
  }
};

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

/// A cluster produces shared_columns tiles at a time, or, with splits, all CTAs of a split do; CTAs that halve a tile come last.
template <typename Sum, typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1) scaled_matmul_wgmma_kernel(const __grid_constant__ WgmmaPlan plan) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) char storage[];
  const WgmmaShared<Shape> shared{device::shared_address(storage)};
  const int rank = device::cluster_rank(), warp = static_cast<int>(threadIdx.x) / 32;
  const int cluster_size = plan.shared_columns * plan.splits;
  if (threadIdx.x == 0) {
    device::prefetch_tensor_map(&plan.rows);
    device::prefetch_tensor_map(&plan.columns);
    for (int stage = 0; stage < Shape::kStages; ++stage) {
      device::barrier_init(shared.full(stage), Shape::kBlockScales ? 1 + 32 : 1);
      device::barrier_init(shared.empty(stage), Shape::kConsumers * 4 * plan.shared_columns);
    }
    if (cluster_size > 1) {
      // Sums are exchanged once, by a CTA's last work.
      const int splits = max(plan.splits, 2), count = SplitColumns<Shape>(plan, rank).count;
      device::barrier_init(shared.finished(), Shape::kConsumers * 4 * splits);
      device::barrier_init(shared.received(), 1);
      if (count > 0) device::barrier_arrive_expect(shared.received(), (splits - 1) * count * Shape::kConsumers * 128 * 16);
    }
    device::barrier_init_fence();
  }
  __syncthreads();
  // Barriers of others are there after the wait; without shared columns they are needed late.
  if (cluster_size > 1) device::cluster_arrive();
  if (plan.shared_columns > 1) device::cluster_wait();
  const bool waits_late = cluster_size > 1 && plan.shared_columns == 1;
  device::wait_for_predecessor();
  if (warp < 4) {
    if constexpr (Shape::kConsumers > 1) device::give_registers<40>();
    if (threadIdx.x == 0) copy_operands<Shape>(plan, shared, rank);
    if constexpr (Shape::kBlockScales) {
      if (warp == 1) copy_scales<Shape>(plan, shared, rank);
    }
    __syncwarp();
    device::launch_dependents();
    if (waits_late) device::cluster_wait();
  } else {
    if constexpr (Shape::kConsumers > 1) device::take_registers<232>();
    if (waits_late) device::cluster_wait();
    const int lane = static_cast<int>(threadIdx.x) % 32;
    std::uint32_t empty = lane == 0 ? shared.empty(0) : 0;
    if (plan.shared_columns > 1)
      empty = lane < plan.shared_columns ? device::address_in_cta(shared.empty(0), rank - rank % plan.shared_columns + lane) : 0;
    WgmmaConsumer<Sum, Shape> consumer{plan, shared, rank, warp / 4 - 1, empty};
    consumer.run();
  }
  // No CTA ends while others may copy to it, or arrive at its barriers.
  __syncwarp();
  if (cluster_size > 1) {
    device::cluster_arrive();
    device::cluster_wait();
  }
#endif
}

}  // namespace quire::cuda::scaled
