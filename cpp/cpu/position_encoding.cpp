// Rotary position encoding on the CPU: tokens over threads.
// SPDX-License-Identifier: Apache-2.0
#include "ops/position_encoding.h"

#include <algorithm>

#include "core/dispatch.h"
#include "core/error_word.h"
#include "core/layout.h"
#include "cpu/isa/dispatch.h"
#include "cpu/isa/position_encoding.h"
#include "cpu/thread_pool.h"

namespace quire::cpu {

QUIRE_ISA_TABLES(RotaryKernels, rotary_kernels);

namespace {

// Fewer elements than this are not worth waking a thread for.
constexpr std::int64_t kGrainElements = 16384;

}  // namespace

void rotary_embedding(const RotaryParams& p) {
  const RotaryKernel rotate =
      rotary_kernels.active()
          .rotate[p.style == RopeStyle::kGptj][static_cast<std::size_t>(p.dtype)][static_cast<std::size_t>(p.cache_dtype)];
  const std::int64_t item_bytes = itemsize(p.dtype);
  const std::int64_t table_row_bytes = p.rotary_dim * itemsize(p.cache_dtype);
  const std::int64_t elements_per_token = (p.num_heads + (p.k != nullptr ? p.num_kv_heads : 0)) * p.rotary_dim;
  if (elements_per_token == 0) return;
  const std::int64_t grain = ceil_div(kGrainElements, elements_per_token);

  dispatch_index(p.position_dtype, "rotary_embedding", [&](auto tag) {
    const auto* positions = static_cast<const decltype(tag)*>(p.positions);
    parallel_for(p.num_tokens, grain, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t token = begin; token < end; ++token) {
        const std::int64_t position = positions[token * p.position_stride];
        if (position < 0 || position >= p.max_position) {
          if (position != -1) record_cpu_error(OpId::kRotaryEmbedding, ArgId::kPositions, token, position);
          continue;
        }
        const void* table_row = static_cast<const char*>(p.cos_sin_cache) + position * table_row_bytes;
        rotate(static_cast<char*>(p.q) + token * p.q_token_stride * item_bytes, p.q_head_stride, p.num_heads, table_row, p.rotary_dim);
        if (p.k != nullptr)
          rotate(static_cast<char*>(p.k) + token * p.k_token_stride * item_bytes, p.k_head_stride, p.num_kv_heads, table_row, p.rotary_dim);
      }
    });
  });
}

}  // namespace quire::cpu
