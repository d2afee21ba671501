// How a CUDA attention call is configured: variants, tiles, splits, and the workspace that they may take. Needs no GPU.
// SPDX-License-Identifier: Apache-2.0
#ifdef QUIRE_HAS_CUDA
#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

#include "cuda/attention/config.h"

namespace quire::cuda::attn {
namespace {

constexpr DeviceProperties kDevice{132, 90, 232448, 62914560};

AttentionParams paged(std::int64_t num_seqs, std::int64_t capacity, std::int64_t num_heads, std::int64_t num_kv_heads,
                      std::int64_t head_dim) {
  static const std::int32_t index = 0;
  AttentionParams params;
  params.block_tables = params.seq_lens = &index;
  params.dtype = params.kv_dtype = DType::kBFloat16;
  params.num_tokens = params.num_seqs = num_seqs;
  params.num_heads = num_heads;
  params.num_kv_heads = num_kv_heads;
  params.head_dim = head_dim;
  params.block_size = 16;
  params.max_blocks_per_seq = ceil_div(capacity, 16);
  return params;
}

AttentionParams ragged_queries(AttentionParams params, std::int64_t num_tokens) {
  params.num_tokens = num_tokens;
  params.query_start_loc = params.seq_lens;
  return params;
}

TEST(CudaAttentionConfig, variant_follows_packed_rows_per_sequence) {
  EXPECT_EQ(choose_config(paged(4, 1024, 32, 8, 128), kDevice).variant, Variant::kMmaSplitKeys8);
  EXPECT_EQ(choose_config(paged(4, 1024, 64, 8, 128), kDevice).variant, Variant::kMmaSplitKeys8);
  EXPECT_EQ(choose_config(paged(4, 1024, 72, 8, 128), kDevice).variant, Variant::kMmaSplitKeys16);
  EXPECT_EQ(choose_config(paged(4, 1024, 71, 1, 128), kDevice).variant, Variant::kMmaSplitRows);
  EXPECT_EQ(choose_config(ragged_queries(paged(4, 1024, 32, 8, 128), 4), kDevice).variant, Variant::kMmaSplitKeys8);
  EXPECT_EQ(choose_config(ragged_queries(paged(4, 1024, 32, 8, 128), 4096), kDevice).variant, Variant::kMmaSplitRows128);
  AttentionParams float32 = paged(4, 1024, 32, 8, 128);
  float32.dtype = float32.kv_dtype = DType::kFloat32;
  EXPECT_EQ(choose_config(float32, kDevice).variant, Variant::kSimt);
}

TEST(CudaAttentionConfig, head_dim_is_padded_to_a_compiled_one) {
  for (std::int64_t head_dim = 8; head_dim <= 256; head_dim += 8) {
    const int bucket = choose_config(paged(1, 64, 8, 8, head_dim), kDevice).head_dim_bucket;
    EXPECT_GE(bucket, head_dim);
    EXPECT_TRUE(bucket == 64 || bucket == 128 || bucket == 256);
  }
}

TEST(CudaAttentionConfig, small_shared_memory_gets_variants_that_fit) {
  constexpr DeviceProperties kSmall{128, 89, 101376, 75497472};
  EXPECT_EQ(choose_config(paged(4, 1024, 32, 8, 128), kSmall).variant, Variant::kMmaSplitKeys8);
  EXPECT_EQ(choose_config(paged(4, 1024, 16, 1, 128), kSmall).variant, Variant::kMmaSplitKeys8);
  EXPECT_EQ(choose_config(paged(4, 1024, 16, 2, 256), kSmall).variant, Variant::kMmaSplitKeys8Small);
  EXPECT_EQ(choose_config(ragged_queries(paged(4, 1024, 16, 2, 256), 4096), kSmall).variant, Variant::kMmaSplitKeys8Small);
  EXPECT_EQ(choose_config(ragged_queries(paged(4, 1024, 32, 8, 128), 4096), kSmall).variant, Variant::kMmaSplitRows);
}

TEST(CudaAttentionConfig, few_tiles_are_split_and_many_are_not) {
  EXPECT_GE(choose_config(paged(1, 65536, 32, 8, 128), kDevice).num_splits, 16);
  EXPECT_GT(choose_config(paged(8, 4096, 32, 8, 128), kDevice).num_splits, 1);
  EXPECT_EQ(choose_config(paged(32, 8192, 32, 8, 128), kDevice).num_splits, 1);
  EXPECT_EQ(choose_config(paged(4096, 8192, 32, 8, 128), kDevice).num_splits, 1);
  EXPECT_EQ(choose_config(paged(1, 16, 32, 8, 128), kDevice).num_splits, 1);
}

TEST(CudaAttentionConfig, tiles_cover_every_row) {
  std::mt19937 random(1);
  for (int repeat = 0; repeat < 2000; ++repeat) {
    const auto pick = [&](std::int64_t low, std::int64_t high) { return std::uniform_int_distribution<std::int64_t>(low, high)(random); };
    const std::int64_t num_kv_heads = pick(1, 8), num_seqs = pick(1, 9);
    AttentionParams params = paged(num_seqs, 4096, num_kv_heads * pick(1, 40), num_kv_heads, 64);
    std::vector<std::int64_t> start(1, pick(0, 3));
    for (std::int64_t seq = 0; seq < num_seqs; ++seq) start.push_back(start.back() + pick(0, 40));
    if (start.back() == 0) continue;
    params = ragged_queries(params, start.back() + pick(0, 3));
    const Config config = choose_config(params, kDevice);
    const std::int64_t group = params.num_heads / params.num_kv_heads, rows = tile_rows(config.variant);
    for (std::size_t seq = 0; seq < start.size() - 1; ++seq) {
      // What kernels search for: where each sequence's tiles begin.
      const std::int64_t first = start[seq] * group / rows + static_cast<std::int64_t>(seq);
      const std::int64_t end = start[seq + 1] * group / rows + static_cast<std::int64_t>(seq) + 1;
      EXPECT_GE((end - first) * rows, (start[seq + 1] - start[seq]) * group);
      EXPECT_LE(end, config.num_tiles);
    }
  }
}

TEST(CudaAttentionConfig, partial_results_fit_the_workspace_of_any_larger_batch) {
  std::mt19937 random(2);
  for (int repeat = 0; repeat < 20000; ++repeat) {
    const auto pick = [&](double high) {
      return static_cast<std::int64_t>(std::exp(std::uniform_real_distribution<double>(0.0, std::log(high))(random)));
    };
    const std::int64_t num_kv_heads = pick(64.0);
    AttentionParams params = paged(pick(5000.0), pick(2e6), num_kv_heads * pick(64.0), num_kv_heads, 8 * pick(32.9));
    if (repeat % 3 == 0) params.dtype = params.kv_dtype = DType::kFloat32;
    if (repeat % 2 == 0) params = ragged_queries(params, pick(20000.0));
    const Config config = choose_config(params, kDevice);
    const std::int64_t bytes = config.num_splits * params.num_tokens * params.num_heads * (params.head_dim + 2) * 4;
    const std::int64_t limit = workspace_bytes(params.num_tokens, params.num_heads, params.head_dim, kDevice.num_sms);
    ASSERT_GE(config.num_splits, 1);
    ASSERT_LE(config.num_splits, kMaxSplits);
    if (config.num_splits > 1) {
      ASSERT_LE(bytes, limit);
    }
    ASSERT_GE(workspace_bytes(params.num_tokens + pick(100.0), params.num_heads, params.head_dim, kDevice.num_sms), limit);
  }
}

TEST(CudaAttentionConfig, what_32_bit_indices_cannot_hold_is_refused_or_clamped) {
  AttentionParams params = paged(1, 16, 8, 1, 64);
  params.max_blocks_per_seq = std::int64_t{1} << 40;
  EXPECT_LT(key_capacity(params), std::numeric_limits<std::int32_t>::max());
  EXPECT_THROW(choose_config(paged(std::int64_t{1} << 31, 16, 8, 1, 64), kDevice), UnsupportedError);
}

}  // namespace
}  // namespace quire::cuda::attn
#endif
