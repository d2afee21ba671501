// How a CUDA attention call is configured: variants, tiles, splits, and the workspace that they may take. Needs no GPU.
// SPDX-License-Identifier: Apache-2.0
#ifdef QUIRE_HAS_CUDA
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <random>
#include <string>
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

Config configure(const AttentionParams& params, const DeviceProperties& device, bool has_wgmma = false) {
  return choose_config(params, device, has_wgmma);
}

/// The same with a cache that Hopper's kernel can address.
AttentionParams dense(AttentionParams params) {
  alignas(16) static std::byte memory[16];
  params.q = params.k = params.v = params.out = memory;
  params.num_blocks = 100;
  params.q_head_stride = params.out_head_stride = params.k_head_stride = params.v_head_stride = params.head_dim;
  params.q_token_stride = params.out_token_stride = params.num_heads * params.head_dim;
  params.k_token_stride = params.v_token_stride = params.num_kv_heads * params.head_dim;
  params.k_block_stride = params.v_block_stride = params.block_size * params.k_token_stride;
  return params;
}

TEST(CudaAttentionConfig, variant_follows_packed_rows_per_sequence) {
  EXPECT_EQ(configure(paged(4, 1024, 32, 8, 128), kDevice).variant, Variant::kMmaSplitKeys8);
  EXPECT_EQ(configure(paged(4, 1024, 64, 8, 128), kDevice).variant, Variant::kMmaSplitKeys8);
  EXPECT_EQ(configure(paged(4, 1024, 72, 8, 128), kDevice).variant, Variant::kMmaSplitKeys16);
  EXPECT_EQ(configure(paged(4, 1024, 71, 1, 128), kDevice).variant, Variant::kMmaSplitRows);
  EXPECT_EQ(configure(ragged_queries(paged(4, 1024, 32, 8, 128), 4), kDevice).variant, Variant::kMmaSplitKeys8);
  EXPECT_EQ(configure(ragged_queries(paged(4, 1024, 32, 8, 128), 4096), kDevice).variant, Variant::kMmaSplitRows128);
  AttentionParams float32 = paged(4, 1024, 32, 8, 128);
  float32.dtype = float32.kv_dtype = DType::kFloat32;
  EXPECT_EQ(configure(float32, kDevice).variant, Variant::kSimt);
}

TEST(CudaAttentionConfig, hopper_takes_many_rows_unless_something_prevents_it) {
  const AttentionParams good = dense(ragged_queries(paged(4, 1024, 32, 8, 128), 4096));
  const auto variant = [](const AttentionParams& params) { return configure(params, kDevice, true).variant; };
  EXPECT_EQ(variant(good), Variant::kWgmma);
  EXPECT_EQ(variant(dense(ragged_queries(paged(4, 1024, 32, 8, 128), 64))), Variant::kMmaSplitRows);
  const auto changed = [&](auto&& change) {
    AttentionParams params = good;
    change(params);
    std::vector<std::string> why;
    EXPECT_NE(choose_config(params, kDevice, true, &why).variant, Variant::kWgmma);
    EXPECT_NE(std::find(why.begin(), why.end(), std::string("not wgmma: ") + obstacle(Variant::kWgmma, params, kDevice, true)), why.end());
  };
  AttentionParams narrow = good;
  narrow.kv_dtype = DType::kInt8;
  EXPECT_EQ(variant(narrow), Variant::kWgmma);
  narrow.kv_dtype = DType::kFloat8E4M3FN;
  narrow.float8_queries = true;
  EXPECT_EQ(variant(narrow), Variant::kWgmma);
  changed([](AttentionParams& p) { p.kv_dtype = DType::kInt8, p.float8_queries = true; });
  changed([](AttentionParams& p) { p.kv_dtype = DType::kInt8, p.k_token_stride += 8; });
  changed([](AttentionParams& p) { p.block_size = 12; });
  changed([](AttentionParams& p) { p.num_blocks = 0; });
  changed([](AttentionParams& p) { p.k_head_stride = 132; });
  changed([](AttentionParams& p) { p.v_block_stride = -p.v_block_stride; });
  changed([](AttentionParams& p) { p.q_token_stride += 4; });
  changed([](AttentionParams& p) { p.out = static_cast<std::byte*>(p.out) + 2; });
}

TEST(CudaAttentionConfig, hopper_has_kernels_of_their_own_for_short_sequences) {
  const auto call = [](std::int64_t head_dim, std::int64_t keys, bool causal) {
    AttentionParams params = dense(ragged_queries(paged(4, keys, 32, 8, head_dim), 4096));
    params.causal = causal;
    params.scale = 0.125f;
    return params;
  };
  const auto is_short = [](const AttentionParams& params) {
    const Config config = configure(params, kDevice, true);
    EXPECT_EQ(config.variant, Variant::kWgmma);
    EXPECT_EQ(config.tile_rows, wgmma_rows(config.head_dim_bucket, params.float8_queries, itemsize(params.kv_dtype) == 1, config.is_short));
    EXPECT_EQ(config.num_tiles, 4096 * 4 / config.tile_rows + 4);
    return config.is_short;
  };
  EXPECT_TRUE(is_short(call(64, 2048, true)));
  EXPECT_FALSE(is_short(call(64, 2064, true)));
  EXPECT_FALSE(is_short(call(64, 512, false)));
  EXPECT_TRUE(is_short(call(96, 768, false)));
  EXPECT_FALSE(is_short(call(96, 784, false)));
  EXPECT_FALSE(is_short(call(96, 512, true)));
  EXPECT_FALSE(is_short(call(128, 512, true)));
  EXPECT_FALSE(is_short(call(192, 512, true)));
  EXPECT_TRUE(is_short(call(256, 2048, true)));
  EXPECT_FALSE(is_short(call(256, 2064, true)));
  EXPECT_TRUE(is_short(call(256, 768, false)));
  EXPECT_FALSE(is_short(call(256, 784, false)));
  AttentionParams ragged = call(96, 768, false);
  ragged.block_tables = nullptr;
  ragged.num_kv_tokens = 4 * 768;
  EXPECT_TRUE(is_short(ragged));
  ++ragged.num_kv_tokens;
  EXPECT_FALSE(is_short(ragged));
  const auto refuses = [&](auto change) {
    AttentionParams params = call(96, 512, false);
    change(params);
    EXPECT_FALSE(is_short(params));
  };
  refuses([](AttentionParams& p) { p.softcap = 1.0f; });
  refuses([](AttentionParams& p) { p.scale = -1.0f; });
  refuses([](AttentionParams& p) { p.scale = 0.0f; });
  static const float slope = 0.0f;
  refuses([](AttentionParams& p) { p.alibi_slopes = &slope; });
  static const std::uint8_t mask = 0;
  refuses([](AttentionParams& p) { p.mask = &mask; });
  refuses([](AttentionParams& p) { p.kv_dtype = DType::kFloat8E4M3FN; });
  AttentionParams float8 = call(64, 512, true);
  float8.kv_dtype = DType::kFloat8E4M3FN;
  EXPECT_FALSE(is_short(float8));
  float8.float8_queries = true;
  EXPECT_TRUE(is_short(float8));
}

TEST(CudaAttentionConfig, hopper_tiles_have_192_rows_where_three_warpgroups_fit) {
  const auto rows = [](std::int64_t head_dim, DType kv_dtype, bool float8_queries) {
    AttentionParams params = dense(ragged_queries(paged(4, 1024, 32, 8, head_dim), 4096));
    params.kv_dtype = kv_dtype;
    params.float8_queries = float8_queries;
    const Config config = configure(params, kDevice, true);
    EXPECT_EQ(config.variant, Variant::kWgmma);
    EXPECT_EQ(config.num_tiles, 4096 * 4 / config.tile_rows + 4);
    return config.tile_rows;
  };
  EXPECT_EQ(rows(64, DType::kBFloat16, false), 192);
  EXPECT_EQ(rows(64, DType::kFloat8E4M3FN, false), 128);
  EXPECT_EQ(rows(64, DType::kFloat8E4M3FN, true), 192);
  EXPECT_EQ(rows(96, DType::kBFloat16, false), 192);
  EXPECT_EQ(rows(96, DType::kFloat8E4M3FN, true), 128);
  EXPECT_EQ(rows(128, DType::kBFloat16, false), 128);
  EXPECT_EQ(rows(128, DType::kFloat8E4M3FN, true), 128);
}

TEST(CudaAttentionConfig, drafts_take_the_kernel_that_reads_keys_once) {
  const auto variant = [](std::int64_t num_seqs, std::int64_t drafts, std::int64_t head_dim, DType kv_dtype, bool has_wgmma = true) {
    AttentionParams params = ragged_queries(dense(paged(num_seqs, 4096, 32, 8, head_dim)), num_seqs * drafts);
    params.kv_dtype = kv_dtype;
    return configure(params, kDevice, has_wgmma).variant;
  };
  for (const DType kv_dtype : {DType::kBFloat16, DType::kFloat8E4M3FN}) {
    EXPECT_EQ(variant(8, 2, 128, kv_dtype), Variant::kMmaSplitKeys8);
    EXPECT_EQ(variant(8, 4, 128, kv_dtype), Variant::kMmaSplitKeys16);
    EXPECT_EQ(variant(8, 9, 128, kv_dtype), Variant::kWgmma);  // 64 tiles
    EXPECT_EQ(variant(4, 9, 128, kv_dtype), Variant::kMmaSplitRows);
    EXPECT_EQ(variant(128, 5, 128, kv_dtype), Variant::kWgmma);
  }
  EXPECT_EQ(variant(1, 8, 128, DType::kBFloat16), Variant::kMmaSplitRows);
  EXPECT_EQ(variant(8, 8, 128, DType::kBFloat16), Variant::kWgmma);
  EXPECT_EQ(variant(8, 8, 128, DType::kBFloat16, false), Variant::kMmaSplitRows);
  EXPECT_EQ(variant(8, 8, 128, DType::kFloat8E4M3FN), Variant::kMmaSplitKeys16);
  EXPECT_EQ(variant(8, 8, 256, DType::kFloat8E4M3FN), Variant::kMmaSplitRows);
  EXPECT_EQ(variant(8, 16, 64, DType::kBFloat16), Variant::kWgmma);
  EXPECT_EQ(variant(32, 16, 64, DType::kBFloat16), Variant::kMmaSplitRows);  // many tiles, two thirds of each empty
  EXPECT_EQ(variant(32, 16, 64, DType::kFloat8E4M3FN), Variant::kMmaSplitRows);  // half of each
  // One sequence of two queries beside decodes of large groups makes no drafts of them.
  EXPECT_EQ(configure(ragged_queries(dense(paged(65, 16384, 128, 8, 128)), 66), kDevice, true).variant, Variant::kMmaSplitKeys16);
  // Where one may be very long and others short, a tile's keys are shared, unless tiles are many.
  EXPECT_EQ(configure(ragged_queries(dense(paged(8, 131072, 32, 8, 128)), 40), kDevice, true).variant, Variant::kMmaSplitRows);
  EXPECT_EQ(configure(ragged_queries(dense(paged(64, 131072, 32, 8, 128)), 320), kDevice, true).variant, Variant::kWgmma);
  // A chunk beside decodes has few tiles, however many the decodes are.
  const Launches mixed = choose_launches(ragged_queries(dense(paged(33, 131072, 8, 2, 128)), 32 + 64), kDevice, true);
  ASSERT_EQ(mixed.count, 2);
  EXPECT_EQ(mixed.configs[1].variant, Variant::kMmaSplitRows);
}

TEST(CudaAttentionConfig, a_variant_that_is_asked_for_runs_or_is_refused) {
  AttentionParams params = dense(paged(4, 1024, 32, 8, 128));
  for (const Variant variant : {Variant::kMmaSplitKeys8, Variant::kMmaSplitKeys16, Variant::kMmaSplitRows, Variant::kMmaSplitRows128,
                                Variant::kWgmma, Variant::kMmaSplitKeys8Small, Variant::kMmaSplitRowsSmall, Variant::kSimt}) {
    params.variant = variant;
    if (obstacle(variant, params, kDevice, true) == nullptr) {
      EXPECT_EQ(configure(params, kDevice, true).variant, variant);
    } else {
      EXPECT_THROW(configure(params, kDevice, true), UnsupportedError);
    }
  }
  EXPECT_THROW(configure(params, kDevice), UnsupportedError);  // kSimt takes float32
}

TEST(CudaAttentionConfig, prefixes_are_divided_to_fill_the_device) {
  const auto pass = [](std::int64_t num_queries, std::int64_t num_keys, std::int64_t head_dim) {
    AttentionParams params = dense(paged(1, num_keys, 32, 8, head_dim));
    params.seq_lens = nullptr;
    params.num_tokens = params.shared_queries = num_queries;
    params.total_keys = num_keys;
    params.causal = false;
    return params;
  };
  EXPECT_EQ(choose_prefix_ranges(pass(256, 32768, 128), kDevice, true), 2);  // 64 tiles
  EXPECT_EQ(choose_prefix_ranges(pass(256, 1008, 128), kDevice, true), 1);
  EXPECT_EQ(choose_prefix_ranges(pass(4096, 32768, 128), kDevice, true), 1);
  EXPECT_EQ(choose_prefix_ranges(pass(8, 32768, 128), kDevice, true), 0);  // 32 rows
  EXPECT_EQ(choose_prefix_ranges(pass(256, 32768, 128), kDevice, false), 0);
  for (std::int64_t num_queries : {9, 40, 100, 256, 300, 1000, 5000})
    for (std::int64_t head_dim : {64, 128, 256})
      for (std::int64_t num_keys : {16, 5000, 1000000}) {
        const AttentionParams params = pass(num_queries, num_keys, head_dim);
        const int ranges = choose_prefix_ranges(params, kDevice, true);
        ASSERT_GE(ranges, 1);
        ASSERT_LE(ranges, kMaxPrefixRanges);
        ASSERT_LE(ranges * num_queries * params.num_heads, prefix_rows(num_queries, params.num_heads, kDevice.num_sms));
        ASSERT_LE(prefix_rows(num_queries, params.num_heads, kDevice.num_sms),
                  prefix_rows(num_queries + 1, params.num_heads, kDevice.num_sms));
      }
}

TEST(CudaAttentionConfig, head_dim_is_padded_to_a_compiled_one) {
  for (std::int64_t head_dim = 8; head_dim <= 256; head_dim += 8) {
    const int bucket = configure(paged(1, 64, 8, 8, head_dim), kDevice).head_dim_bucket;
    EXPECT_GE(bucket, head_dim);
    EXPECT_TRUE(bucket == 64 || bucket == 128 || bucket == 256);
    for (const bool narrow : {false, true}) {
      const int hopper = wgmma_head_dim_bucket(head_dim, narrow);
      EXPECT_GE(hopper, head_dim);
      EXPECT_TRUE(hopper == bucket || (!narrow && (hopper == 96 || hopper == 192)));
    }
  }
}

TEST(CudaAttentionConfig, small_shared_memory_gets_variants_that_fit) {
  constexpr DeviceProperties kSmall{128, 89, 101376, 75497472};
  EXPECT_EQ(configure(paged(4, 1024, 32, 8, 128), kSmall).variant, Variant::kMmaSplitKeys8);
  EXPECT_EQ(configure(paged(4, 1024, 16, 1, 128), kSmall).variant, Variant::kMmaSplitKeys8);
  EXPECT_EQ(configure(paged(4, 1024, 16, 2, 256), kSmall).variant, Variant::kMmaSplitKeys8Small);
  const AttentionParams wide = ragged_queries(paged(4, 1024, 16, 2, 256), 4096);
  EXPECT_EQ(configure(wide, kSmall).variant, Variant::kMmaSplitRowsSmall);
  EXPECT_EQ(configure(ragged_queries(paged(4, 1024, 32, 8, 128), 4096), kSmall).variant, Variant::kMmaSplitRows128);
  // Enough for one CTA of the larger one, not for two.
  constexpr DeviceProperties kMiddle{108, 80, 166912, 41943040};
  EXPECT_EQ(configure(wide, kMiddle).variant, Variant::kMmaSplitRowsSmall);
  EXPECT_EQ(configure(wide, kDevice).variant, Variant::kMmaSplitRows);
  AttentionParams narrow = wide;
  narrow.kv_dtype = DType::kInt8;
  EXPECT_EQ(configure(narrow, kSmall).variant, Variant::kMmaSplitRows);
  narrow.variant = Variant::kMmaSplitRowsSmall;
  EXPECT_THROW(configure(narrow, kSmall), UnsupportedError);
}

TEST(CudaAttentionConfig, decode_fills_the_device_whatever_the_batch) {
  EXPECT_EQ(configure(paged(1, 65536, 32, 8, 128), kDevice).num_ctas, 2 * 132);  // of twice as many warps
  EXPECT_TRUE(configure(paged(1, 65536, 32, 8, 128), kDevice).wide);
  EXPECT_EQ(configure(paged(32, 8192, 32, 8, 128), kDevice).num_ctas, 4 * 132);
  EXPECT_FALSE(configure(paged(32, 8192, 32, 8, 128), kDevice).wide);
  EXPECT_EQ(configure(paged(4096, 8192, 32, 8, 128), kDevice).num_ctas, 4 * 132);
  EXPECT_LE(configure(paged(1, 16, 8, 1, 128), kDevice).num_ctas, 4);
  AttentionParams invariant = paged(1, 65536, 32, 8, 128);
  invariant.batch_invariant = true;
  EXPECT_FALSE(configure(invariant, kDevice).wide);
}

TEST(CudaAttentionConfig, few_tiles_have_clusters) {
  const auto cluster = [](const AttentionParams& params) { return configure(dense(params), kDevice, true).cluster; };
  EXPECT_EQ(cluster(paged(1, 1024, 32, 8, 128)), 16);
  EXPECT_EQ(cluster(paged(3, 1024, 32, 8, 128)), 11);
  EXPECT_EQ(cluster(paged(32, 1024, 32, 8, 128)), 1);
  EXPECT_EQ(cluster(paged(34, 1024, 32, 8, 128)), 0);  // more tiles than the device has places for CTAs
  EXPECT_EQ(cluster(paged(20, 1024, 32, 8, 128)), 0);  // a third of the places would be left empty
  EXPECT_EQ(cluster(paged(32, 1024, 16, 2, 256)), 2);
  EXPECT_EQ(cluster(paged(32, 8192, 32, 8, 96)), 0);  // rows that are no whole lines are better read two heads at a time
  EXPECT_EQ(cluster(paged(1, 1024, 72, 8, 128)), 0);
  EXPECT_EQ(cluster(ragged_queries(paged(2, 1024, 32, 8, 128), 4)), 0);
  AttentionParams params = paged(1, 1024, 32, 8, 128);
  EXPECT_EQ(configure(dense(params), kDevice, true).lone_cluster, 16);  // one sequence has a kernel of its own
  EXPECT_EQ(configure(dense(paged(2, 1024, 32, 8, 128)), kDevice, true).lone_cluster, 0);
  EXPECT_EQ(configure(dense(params), kDevice).cluster, 0);
}

TEST(CudaAttentionConfig, batch_invariant_tiles_have_clusters_or_whole_CTAs) {
  const auto cluster = [](std::int64_t num_seqs, std::int64_t num_keys) {
    AttentionParams params = dense(paged(num_seqs, num_keys, 32, 8, 128));
    params.batch_invariant = true;
    return configure(params, kDevice, true).cluster;
  };
  EXPECT_EQ(cluster(1, 65536), 16);
  EXPECT_EQ(cluster(1, 1024), 2);  // parts
  EXPECT_EQ(cluster(32, 8192), 2);
  EXPECT_EQ(cluster(64, 8192), 1);
  EXPECT_EQ(cluster(2, 8192), 0);
  EXPECT_EQ(cluster(8, 8192), 0);  // the line of keys is faster
  EXPECT_EQ(cluster(31, 8192), 0);
  EXPECT_EQ(cluster(44, 8192), 0);   // a third of the places would be left empty
  EXPECT_EQ(cluster(256, 8192), 1);  // whole tiles, one after the other
  EXPECT_EQ(cluster(70, 8192), 0);   // of which the last would leave most places empty
  AttentionParams params = dense(paged(32, 8192, 32, 8, 128));
  params.batch_invariant = true;
  EXPECT_EQ(configure(params, kDevice).cluster, 0);
  EXPECT_EQ(configure(ragged_queries(params, 32), kDevice, true).cluster, 0);
}

TEST(CudaAttentionConfig, batch_invariant_tiles_are_two_heads_where_rows_are_short) {
  const auto config = [](std::int64_t num_seqs, DType kv_dtype, std::int64_t head_dim, std::int64_t kv_heads = 8) {
    AttentionParams params = dense(paged(num_seqs, 8192, 4 * kv_heads, kv_heads, head_dim));
    params.kv_dtype = kv_dtype;
    params.batch_invariant = true;
    return configure(params, kDevice, true);
  };
  const auto heads_and_ctas = [&](auto... arguments) {
    const Config c = config(arguments...);
    return std::pair{c.cluster_heads, c.cluster};
  };
  EXPECT_EQ(heads_and_ctas(32, DType::kBFloat16, 128), std::pair(1, 2));
  EXPECT_EQ(heads_and_ctas(32, DType::kBFloat16, 64), std::pair(2, 2));      // CTAs of twice as many warps
  EXPECT_EQ(heads_and_ctas(32, DType::kFloat8E4M3FN, 128), std::pair(2, 2));
  EXPECT_EQ(heads_and_ctas(32, DType::kFloat8E4M3FN, 64), std::pair(2, 4));  // a warp has both
  EXPECT_EQ(heads_and_ctas(256, DType::kFloat8E4M3FN, 128), std::pair(2, 1));
  EXPECT_EQ(config(64, DType::kFloat8E4M3FN, 128, 7).cluster, 0);  // no pairs
  EXPECT_EQ(config(32, DType::kBFloat16, 96).cluster, 0);          // rows of one and a half times 128 bytes
  EXPECT_GT(config(32, DType::kFloat8E4M3FN, 96).cluster, 0);
  EXPECT_EQ(config(32, DType::kFloat8E4M3FN, 72).cluster, 0);
}

TEST(CudaAttentionConfig, clusters_read_two_heads_of_8_bits_together) {
  const auto config = [](std::int64_t num_seqs, std::int64_t head_dim = 128) {
    AttentionParams params = dense(paged(num_seqs, 1024, 32, 8, head_dim));
    params.kv_dtype = DType::kFloat8E4M3FN;
    return configure(params, kDevice, true);
  };
  EXPECT_EQ(config(32).cluster_heads, 2);
  EXPECT_EQ(config(32).cluster, 2);
  EXPECT_EQ(config(12).cluster, 5);  // 48 tiles; heads one by one would leave places empty
  EXPECT_EQ(config(1).lone_cluster, 16);
  EXPECT_EQ(config(64).cluster, 0);  // a CTA to each tile
  EXPECT_EQ(config(20).cluster, 0);  // a tenth of the places would be empty
  EXPECT_EQ(config(8).cluster_heads, 1);  // of few keys each
  EXPECT_EQ(config(8).cluster, 4);
  EXPECT_EQ(config(2).cluster_heads, 1);  // 8 tiles of two heads would be too few
  EXPECT_EQ(config(2).pairing, Pairing::kNone);
  EXPECT_EQ(config(2).cluster, 16);
  EXPECT_EQ(config(32, 256).cluster_heads, 1);  // long rows
  EXPECT_EQ(configure(dense(paged(32, 1024, 32, 8, 128)), kDevice, true).cluster_heads, 1);
}

TEST(CudaAttentionConfig, clusters_need_what_the_copy_engine_can_address) {
  AttentionParams params = dense(paged(8, 1024, 32, 8, 128));
  EXPECT_GT(configure(params, kDevice, true).cluster, 0);
  params.k_token_stride += 4;  // 8 bytes
  std::vector<std::string> why;
  EXPECT_EQ(choose_config(params, kDevice, true, &why).cluster, 0);
  EXPECT_NE(why.back().find("multiple of 16 bytes"), std::string::npos);
  params = dense(paged(8, 1024, 32, 8, 64));
  params.kv_dtype = DType::kInt8;
  params.block_size = 1;
  EXPECT_EQ(configure(params, kDevice, true).cluster, 0);
  params.block_size = 2;
  EXPECT_GT(configure(params, kDevice, true).cluster, 0);
}

TEST(CudaAttentionConfig, neighbouring_heads_are_pairs) {
  const auto pairing = [](const AttentionParams& params) { return configure(params, kDevice).pairing; };
  EXPECT_EQ(pairing(dense(paged(64, 1024, 32, 8, 64))), Pairing::kColumns);
  EXPECT_EQ(pairing(dense(paged(64, 1024, 32, 8, 128))), Pairing::kWarps);
  EXPECT_EQ(pairing(dense(paged(64, 1024, 64, 8, 128))), Pairing::kWarps);
  EXPECT_EQ(pairing(dense(paged(64, 1024, 72, 8, 128))), Pairing::kNone);
  EXPECT_EQ(pairing(dense(paged(64, 1024, 28, 7, 128))), Pairing::kNone);
  EXPECT_EQ(pairing(dense(paged(64, 1024, 32, 8, 256))), Pairing::kNone);
  const auto narrow = [](std::int64_t num_seqs, std::int64_t head_dim) {
    AttentionParams params = dense(paged(num_seqs, 8192, 16, 2, head_dim));
    params.kv_dtype = DType::kFloat8E4M3FN;
    return configure(params, kDevice, true);
  };
  EXPECT_EQ(narrow(256, 256).pairing, Pairing::kWarps);  // a pair's tile to each CTA, all at once
  EXPECT_EQ(narrow(256, 256).ctas_per_tile, 1);
  EXPECT_EQ(narrow(256, 256).tiles_per_cta, 1);
  EXPECT_EQ(narrow(132, 256).pairing, Pairing::kNone);  // as many tiles as places
  EXPECT_EQ(narrow(132, 192).pairing, Pairing::kWarps);
  EXPECT_EQ(narrow(66, 192).pairing, Pairing::kNone);
  for (std::int64_t num_seqs = 1; num_seqs < 600; ++num_seqs)
    for (const std::int64_t head_dim : {136, 192, 256}) {
      const Config config = narrow(num_seqs, head_dim);
      EXPECT_FALSE(config.pairing == Pairing::kWarps && (config.wide || config.cluster > 0));  // there is no such kernel
    }
  AttentionParams params = dense(paged(64, 1024, 32, 8, 128));
  params.k_head_stride *= 16;  // heads are not side by side
  EXPECT_EQ(pairing(params), Pairing::kNone);
}

TEST(CudaAttentionConfig, pairs_of_16_bits_have_wide_CTAs_while_tiles_are_few) {
  const auto config = [](std::int64_t num_seqs, DType kv_dtype) {
    AttentionParams params = dense(paged(num_seqs, 4096, 32, 8, 128));
    params.kv_dtype = kv_dtype;
    return configure(params, kDevice, true);
  };
  EXPECT_TRUE(config(64, DType::kBFloat16).wide);
  EXPECT_EQ(config(64, DType::kBFloat16).ctas_per_tile, 1);
  EXPECT_EQ(config(64, DType::kBFloat16).tiles_per_cta, 1);
  EXPECT_TRUE(config(128, DType::kBFloat16).wide);
  EXPECT_FALSE(config(256, DType::kBFloat16).wide);
}

TEST(CudaAttentionConfig, pairs_of_8_bits_come_by_boxes) {
  const auto params = [](std::int64_t num_seqs, std::int64_t head_dim = 128) {
    AttentionParams params = dense(paged(num_seqs, 4096, 32, 8, head_dim));
    params.kv_dtype = DType::kFloat8E4M3FN;
    return params;
  };
  const auto config = [&](std::int64_t num_seqs) { return configure(params(num_seqs), kDevice, true); };
  for (const std::int64_t num_seqs : {12, 20, 64, 100, 256}) EXPECT_TRUE(config(num_seqs).by_boxes) << num_seqs;
  EXPECT_FALSE(config(2).by_boxes);  // heads one by one
  // CTAs of many warps up to two tiles for each SM.
  EXPECT_TRUE(config(64).wide);
  EXPECT_EQ(config(64).ctas_per_tile, 1);
  EXPECT_FALSE(config(100).wide);
  EXPECT_FALSE(configure(params(64, 96), kDevice, true).by_boxes);
  // What falls out of clusters, or is in them, is by boxes whatever the columns.
  for (const std::int64_t head_dim : {80, 96, 112, 128}) {
    for (const std::int64_t num_seqs : {1, 4, 5, 6, 8}) {
      const Config few = configure(params(num_seqs, head_dim), kDevice, true);
      EXPECT_GT(few.cluster, 0);
      EXPECT_TRUE(few.by_boxes || few.pairing == Pairing::kNone) << num_seqs << " " << head_dim;
    }
  }
  EXPECT_FALSE(configure(params(256, 256), kDevice, true).by_boxes);
  EXPECT_FALSE(configure(dense(paged(100, 4096, 32, 8, 128)), kDevice, true).by_boxes);
  EXPECT_FALSE(configure(params(100), kDevice).by_boxes);
  AttentionParams odd = params(100);
  odd.block_size = 12;  // boxes of 4 keys are too small
  EXPECT_FALSE(configure(odd, kDevice, true).by_boxes);
  odd = params(64);
  odd.v_token_stride += 8;
  EXPECT_FALSE(configure(odd, kDevice, true).by_boxes);
  EXPECT_FALSE(configure(odd, kDevice, true).wide);
}

TEST(CudaAttentionConfig, rows_of_many_queries_are_split_where_tiles_are_few) {
  EXPECT_GT(configure(ragged_queries(paged(1, 65536, 32, 8, 128), 64), kDevice).num_splits, 1);
  EXPECT_EQ(configure(ragged_queries(paged(32, 8192, 32, 8, 128), 4096), kDevice).num_splits, 1);
}

TEST(CudaAttentionConfig, the_line_of_all_keys_fits_31_bits) {
  EXPECT_EQ(configure(paged(1024, 131072, 64, 8, 128), kDevice).line_shift, 0);
  for (std::int64_t num_seqs : {1, 1000, 100000})
    for (std::int64_t capacity : {16, 100000, 1 << 30}) {
      const Config config = configure(paged(num_seqs, capacity, 64, 8, 128), kDevice);
      const double steps = std::ceil(static_cast<double>(capacity) / 16 / static_cast<double>(1 << config.line_shift));
      EXPECT_LT(static_cast<double>(num_seqs) * 8 * (steps + config.tile_cost),
                static_cast<double>(std::numeric_limits<std::int32_t>::max()));
    }
}

TEST(CudaAttentionConfig, batch_invariant_parts_are_at_most_an_eighth_of_the_keys_before) {
  EXPECT_EQ(part_begin(0), 0);
  EXPECT_EQ(part_begin(16), 8192);
  EXPECT_EQ(part_begin(17), 9216);
  EXPECT_EQ(part_begin(24), 16384);
  EXPECT_EQ(part_begin(160), std::numeric_limits<std::int32_t>::max());
  for (int part = 0; part < 159; ++part) {
    EXPECT_EQ(part_begin(part) % 512, 0);
    EXPECT_LE(part_begin(part + 1) - part_begin(part), std::max(512, part_begin(part) / 8));
    EXPECT_GT(part_begin(part + 1), part_begin(part));
  }
}

TEST(CudaAttentionConfig, batch_invariant_calls_are_configured_alike) {
  for (std::int64_t group : {1, 4, 8, 12, 71}) {
    AttentionParams params = paged(1, 4096, 8 * group, 8, 128);
    params.batch_invariant = true;
    const Variant variant = configure(params, kDevice, true).variant;
    EXPECT_EQ(variant, group <= 8 ? Variant::kMmaSplitKeys8 : Variant::kMmaSplitKeys16);
    for (std::int64_t num_seqs : {2, 64, 257})
      for (std::int64_t num_tokens : {1, 9, 3000}) {
        AttentionParams other = ragged_queries(dense(paged(num_seqs, 100000, 8 * group, 8, 128)), num_seqs * num_tokens);
        other.batch_invariant = true;
        const Launches launches = choose_launches(other, kDevice, true);
        ASSERT_EQ(launches.count, 1);
        EXPECT_EQ(launches.configs[0].variant, variant);
        EXPECT_FALSE(launches.configs[0].wide);
      }
  }
}

TEST(CudaAttentionConfig, decodes_beside_prefills_have_a_launch_of_their_own) {
  const auto launches = [](const AttentionParams& params) { return choose_launches(params, kDevice, true); };
  const auto mixed_of = [](std::int64_t keys) { return dense(ragged_queries(paged(32, keys, 32, 8, 128), 28 + 4 * 512)); };
  const AttentionParams mixed = mixed_of(8192);
  const Launches of_mixed = launches(mixed);
  ASSERT_EQ(of_mixed.count, 2);
  const Config* const configs = of_mixed.configs;
  EXPECT_EQ(configs[0].variant, Variant::kMmaSplitKeys8);
  EXPECT_EQ(configs[1].variant, Variant::kWgmma);
  EXPECT_EQ(configs[0].min_rows, 0);
  EXPECT_EQ(configs[0].max_rows + 1, configs[1].min_rows);
  // Not where decodes are enough for Hopper's kernel.
  const AttentionParams many = dense(ragged_queries(paged(256, 2048, 32, 8, 128), 252 + 4 * 512));
  ASSERT_EQ(launches(many).count, 1);
  EXPECT_EQ(launches(many).configs[0].variant, Variant::kWgmma);
  EXPECT_EQ(choose_launches(many, kDevice, false).count, 2);
  AttentionParams narrow = many;
  narrow.kv_dtype = DType::kInt8;
  EXPECT_EQ(launches(narrow).count, 2);
  // Fewer of them where none can have very many keys.
  EXPECT_EQ(launches(mixed_of(4096)).count, 1);
  // One chunk among many decodes, too.
  EXPECT_EQ(launches(dense(ragged_queries(paged(256, 2048, 32, 8, 128), 255 + 512))).count, 2);
  EXPECT_EQ(launches(dense(paged(256, 2048, 32, 8, 128))).count, 1);
  EXPECT_EQ(launches(dense(ragged_queries(paged(256, 2048, 32, 8, 128), 256 * 4))).count, 1);  // drafts
  EXPECT_EQ(launches(dense(ragged_queries(paged(1, 2048, 32, 8, 128), 2048))).count, 1);
  AttentionParams asked = mixed;
  asked.variant = Variant::kMmaSplitRows;
  EXPECT_EQ(launches(asked).count, 1);
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
    const Config config = configure(params, kDevice);
    const std::int64_t group = params.num_heads / params.num_kv_heads, rows = config.tile_rows;
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
    AttentionParams params = dense(paged(pick(5000.0), pick(2e6), num_kv_heads * pick(64.0), num_kv_heads, 8 * pick(32.9)));
    if (repeat % 3 == 0) params.dtype = params.kv_dtype = DType::kFloat32;
    if (repeat % 2 == 0) params = ragged_queries(params, pick(20000.0));
    params.batch_invariant = repeat % 5 == 0;
    const Config config = configure(params, kDevice, repeat % 7 < 3);
    const std::int64_t rows = shares_keys(config.variant) ? std::int64_t{config.num_ctas} * config.slots_per_cta * config.tile_rows
                                                          : config.num_splits * params.num_tokens * params.num_heads;
    const std::int64_t bytes = rows * (params.head_dim + 2) * 4;
    const std::int64_t limit = workspace_bytes(params.num_tokens, params.num_heads, params.head_dim, kDevice.num_sms);
    ASSERT_GE(config.num_splits, 1);
    ASSERT_LE(config.num_splits, kMaxSplits);
    // A single CTA leaves nothing there.
    if (shares_keys(config.variant) ? config.num_ctas > 1 || params.batch_invariant : config.num_splits > 1) {
      ASSERT_LE(bytes, limit);
    }
    ASSERT_GE(workspace_bytes(params.num_tokens + pick(100.0), params.num_heads, params.head_dim, kDevice.num_sms), limit);
    ASSERT_GE(workspace_bytes(params.num_tokens, params.num_heads, params.head_dim + 8 * pick(30.0), kDevice.num_sms), limit);
  }
}

TEST(CudaAttentionConfig, what_32_bit_indices_cannot_hold_is_refused_or_clamped) {
  AttentionParams params = paged(1, 16, 8, 1, 64);
  params.max_blocks_per_seq = std::int64_t{1} << 40;
  EXPECT_LT(key_capacity(params), std::numeric_limits<std::int32_t>::max());
  EXPECT_THROW(configure(paged(std::int64_t{1} << 31, 16, 8, 1, 64), kDevice), UnsupportedError);
}

}  // namespace
}  // namespace quire::cuda::attn
#endif
