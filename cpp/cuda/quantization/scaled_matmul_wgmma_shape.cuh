// What the parts of Hopper's kernel for products of 8-bit matrices share: the plan of a launch, a tile's shape, the layout of shared memory.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda.h>

#include <algorithm>

#include "ops/quantization.h"

namespace quire::cuda::scaled {

constexpr int kStepBytes = 128;  // of a row, in one step

struct WgmmaPlan {
  CUtensorMap rows, columns;  // {k, row}; boxes of kRows and of kColumns / shared_columns rows
  CUtensorMap out;  // {feature, token}; boxes of 64 features and kChunkTokens tokens; for copies_out
  ScaledMatmulParams params;
  int num_steps;  // of one split
  int shared_columns;  // neighbours in a cluster with the same columns and other rows
  int splits;  // of the inner dimension: a cluster is shared_columns * splits CTAs
  int num_row_groups;  // of shared_columns row tiles
  int num_column_tiles;
  int column_group;  // column tiles that are gone through before the next row group
  int num_items;  // pairs of a row group and a column tile
  int num_halved_tiles;  // single tiles after the items, whose columns the two CTAs of a cluster halve
  bool reads_rows_once;  // or at one time: the L2 cache need not keep them
  bool copies_out;  // results are written by the copy engine
  bool vector_out;  // or by 16-byte stores
};

template <int kConsumerCount, int kColumnCount, bool kTokensAreRows, bool kHasBlockScales>
struct WgmmaShape {
  static constexpr int kConsumers = kConsumerCount;  // warpgroups with 64 rows each
  static constexpr int kThreads = 128 * (kConsumers + 1);
  static constexpr int kColumns = kColumnCount;
  static constexpr bool kTokenRows = kTokensAreRows;
  static constexpr bool kBlockScales = kHasBlockScales;
  static constexpr int kRows = 64 * kConsumers;
  static constexpr bool kHalves = kColumns == 256 && !kBlockScales;  // products with half of the columns too
  static constexpr int kTokens = kTokenRows ? kRows : kColumns;
  static constexpr int kRowsBytes = kRows * kStepBytes, kColumnsBytes = kColumns * kStepBytes;
  static constexpr int kStageBytes = kRowsBytes + kColumnsBytes;
  static constexpr int kPartColumns = kTokenRows ? 128 : kColumns;  // that share a scale_b, where it has blocks
  static constexpr int kParts = kColumns / kPartColumns;
  // Scales of blocks are copied beside the operands, or read by the warps that need them.
  static constexpr bool kReadsScales = kBlockScales && kTokenRows && kParts == 1, kCopiesScales = kBlockScales && !kReadsScales;
  static constexpr int kScaleBytes = kCopiesScales ? kTokens * 4 + 16 : 0;
  // Results are staged as 64 output features (128 bytes) of so many tokens: columns, or a consumer's rows.
  static constexpr int kChunkColumns = kColumns < 64 ? kColumns : 64;
  static constexpr int kChunkTokens = kTokenRows ? 64 : kChunkColumns;
  static constexpr int kChunkBytes = kChunkTokens * 128;
  static constexpr int kStagingBytes = 2 * kChunkBytes;  // per consumer
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
  /// The stage of so many steps ago, at most kStages.
  __device__ __forceinline__ int before(int steps) const { return stage - steps + (stage < steps ? kStages : 0); }
};

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

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

}  // namespace quire::cuda::scaled
