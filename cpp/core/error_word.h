// The error word: where kernels record the first index value out of range, for check_errors() to report.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "core/layout.h"

namespace quire {

/// Ops that guard index contents.
enum class OpId : std::uint32_t {
  kNone,
  kPagedAttention,
  kAttention,
  kWriteKv,
  kGatherKv,
  kCopyBlocks,
  kRotaryEmbedding,
  kQkNormRope,
  kRopeAndWriteKv,
  kSharedPrefixAttention
};
/// Their index arguments.
enum class ArgId : std::uint32_t {
  kNone,
  kBlockTables,
  kSeqLens,
  kQueryStartLoc,
  kKvStartLoc,
  kSlotMapping,
  kPairs,
  kPositions,
  kPrefixBlocks
};

/// One per device. Only the first error since the last check is kept.
struct ErrorWord {
  std::uint32_t state;  // 0: no error; 1: taken
  OpId op;
  ArgId arg;
  std::uint32_t reserved;
  std::int64_t index;  // flat index into the argument
  std::int64_t value;
};

#ifdef __CUDACC__
/// Keeps the first error. Any thread may call it; the record is read only after the device's work is done.
__device__ inline void record_error(ErrorWord* word, OpId op, ArgId arg, std::int64_t index, std::int64_t value) {
  if (atomicCAS(&word->state, 0u, 1u) == 0u) {
    word->op = op;
    word->arg = arg;
    word->index = index;
    word->value = value;
  }
}
#endif

/// The same for the CPU backend's word.
void record_cpu_error(OpId op, ArgId arg, std::int64_t index, std::int64_t value) noexcept;

}  // namespace quire
