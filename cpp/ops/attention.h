// What the attention ops hand to a backend, and the backends' entry points. Everything here is validated.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <optional>

#include "core/error_word.h"
#include "quire/attention.h"
#include "quire/dtype.h"
#include "quire/stream.h"

namespace quire {

/// paged_attention (block_tables not null) and attention (block_tables null). Index contents are not trusted: a backend clamps
/// query_start_loc to be monotonic within [0, num_tokens], seq_lens to [0, max_blocks_per_seq * block_size], kv_start_loc to be
/// monotonic within [0, num_kv_tokens], hides keys of table entries outside [0, num_blocks), and records what it clamped.
struct AttentionParams {
  void* out = nullptr;      // [num_tokens, num_heads, head_dim]
  float* lse = nullptr;     // [num_tokens, num_heads] or null
  const void* q = nullptr;  // [num_tokens, num_heads, head_dim]
  const void* k = nullptr;  // paged: [num_blocks, block_size, num_kv_heads, head_dim]; else [num_kv_tokens, num_kv_heads, head_dim]
  const void* v = nullptr;  // likewise
  const std::int32_t* block_tables = nullptr;     // paged: [num_seqs, max_blocks_per_seq]
  const std::int32_t* seq_lens = nullptr;         // paged: [num_seqs], or null: see shared_queries
  const std::int32_t* query_start_loc = nullptr;  // [num_seqs + 1], or null: paged: one query per sequence; else one sequence
  const std::int32_t* kv_start_loc = nullptr;     // not paged: [num_seqs + 1], or null: one sequence of num_kv_tokens
  const float* alibi_slopes = nullptr;            // [num_heads] or null
  const float* sinks = nullptr;                   // [num_heads] or null
  const float* q_scale = nullptr;                 // [1] or [num_kv_heads], or null for 1
  const float* k_scale = nullptr;                 // likewise
  const float* v_scale = nullptr;
  const std::uint8_t* mask = nullptr;        // [num_tokens, mask_bytes] or null: bit b of a row is key mask_start + b
  const std::int32_t* mask_start = nullptr;  // [num_seqs], or null for kv_len - q_len; any value
  std::int64_t mask_stride = 0, mask_bytes = 0;
  std::int64_t q_scale_stride = 0, k_scale_stride = 0, v_scale_stride = 0;  // 0: one scale; 1: one per kv head
  DType dtype = DType::kFloat32;                        // of q and out: float32, float16, bfloat16
  DType kv_dtype = DType::kFloat32;                     // dtype, float8_e4m3fn, float8_e5m2 or int8
  bool float8_queries = false;                          // q is float8_e4m3fn, out float16 or bfloat16, k and v of 8 bits
  std::int64_t num_tokens = 0;                          // > 0
  std::int64_t num_seqs = 0;                            // > 0
  std::int64_t num_heads = 0, num_kv_heads = 0;         // num_heads % num_kv_heads == 0, both > 0
  std::int64_t head_dim = 0;                            // multiple of 8, 8 to 256
  std::int64_t num_blocks = 0, block_size = 1, max_blocks_per_seq = 0;  // paged; num_blocks may be 0
  std::int64_t num_kv_tokens = 0;                                       // not paged
  std::int64_t block_tables_stride = 0;
  std::int64_t q_token_stride = 0, q_head_stride = 0, out_token_stride = 0, out_head_stride = 0;
  std::int64_t k_block_stride = 0, k_token_stride = 0, k_head_stride = 0;  // token = slot within the block when paged
  std::int64_t v_block_stride = 0, v_token_stride = 0, v_head_stride = 0;
  float scale = 1.0f;
  float softcap = 0.0f;           // 0: none
  bool causal = true;
  std::int64_t window_left = -1;  // negative: no limit
  std::int64_t window_right = -1;
  std::optional<AttentionVariant> variant;  // asked for
  bool batch_invariant = false;             // a row's bits depend on its own query and keys alone
  OpId op = OpId::kNone;
  // > 0, paged and without query_start_loc and seq_lens: all sequences have the first shared_queries rows of q, and sequence s has rows
  // [s * shared_queries, (s + 1) * shared_queries) of out and lse, num_tokens in all. Their keys are consecutive parts of total_keys,
  // max_blocks_per_seq blocks to each but the last. More than one sequence: kWgmma alone.
  std::int64_t shared_queries = 0, total_keys = 0;
  void* workspace = nullptr;  // at least *_attention_workspace_size(...) bytes, 16-byte aligned
};

/// The sequences' own keys, and the prefix that they share.
struct SharedPrefixParams {
  AttentionParams own;                          // workspace: at least shared_prefix_attention_workspace_size(...) bytes
  const std::int32_t* prefix_blocks = nullptr;  // [num_prefix_blocks]
  std::int64_t num_prefix_blocks = 0;           // > 0
};

/// The pass over (a part of) the prefix that writes to out and lse.
AttentionParams prefix_pass(const SharedPrefixParams& params, void* out, float* lse);

struct MergeParams {
  void* out = nullptr;         // [num_tokens, num_heads, head_dim]
  float* out_lse = nullptr;    // [num_tokens, num_heads] or null
  const void* out_a = nullptr;
  const float* lse_a = nullptr;
  const void* out_b = nullptr;
  const float* lse_b = nullptr;
  DType dtype = DType::kFloat32;
  std::int64_t num_tokens = 0, num_heads = 0, head_dim = 0;  // all > 0
  std::int64_t out_token_stride = 0, out_head_stride = 0, a_token_stride = 0, a_head_stride = 0, b_token_stride = 0, b_head_stride = 0;
};

namespace cpu {
void attention(const AttentionParams& params);
void shared_prefix_attention(const SharedPrefixParams& params);
void merge_attention(const MergeParams& params);
}  // namespace cpu

namespace cuda {
void attention(const AttentionParams& params, Stream stream);
void shared_prefix_attention(const SharedPrefixParams& params, Stream stream);
void merge_attention(const MergeParams& params, Stream stream);
/// Bytes for any batch of at most this size; the same for paged and ragged.
std::int64_t attention_workspace_size(std::int64_t num_tokens, std::int64_t num_seqs, std::int64_t num_heads, std::int64_t head_dim,
                                      int device_index);
std::int64_t shared_prefix_attention_workspace_size(std::int64_t num_tokens, std::int64_t num_heads, std::int64_t head_dim,
                                                    int device_index);
}  // namespace cuda

}  // namespace quire
