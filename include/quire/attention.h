// Attention over paged and ragged keys and values, with log-sum-exp output and its merge.
// SPDX-License-Identifier: Apache-2.0
//
// Semantics, for query i of sequence s (q_len queries, kv_len keys):
//   position = kv_len - q_len + i                      the key index that the query stands at
//   score(j) = scale * dot(q_i, k_j)
//   score    = softcap * tanh(score / softcap)         if softcap > 0
//   score   -= alibi_slope[head] * (position - j)      if alibi_slopes
//   key j is seen if 0 <= j < kv_len, and j <= position if causal, and position - left <= j <= position + right,
//   and bit j - mask_start[s] of the query's mask row is set, or outside the row, if mask
//   out      = sum_j exp(score(j) - lse') v_j,  lse = log sum_j exp(score(j)) over the keys seen,
//   where lse' = lse, or log(exp(lse) + exp(sink[head])) if sinks; the lse that is returned includes the sink.
// A row that sees no key gives output 0 and lse -inf (the sink's value if there are sinks). Logarithms are natural.
// Query head h reads kv head h / (num_heads / num_kv_heads).
#pragma once

#include <cstdint>
#include <optional>

#include "quire/export.h"
#include "quire/stream.h"
#include "quire/tensor.h"

namespace quire {

/// How much of a call is checked before anything is written.
enum class Validate {
  kShape,  ///< Shapes, dtypes, layouts, devices. Bad index contents are skipped and recorded for check_errors().
  kFull,   ///< Also every index content: raises IndexError. On CUDA this copies the index tensors and waits; not in a capture.
};

/// The CUDA kernels.
enum class AttentionVariant : std::uint8_t {
  kMmaSplitKeys8,       ///< 8 rows; the four warps of a CTA take turns at the keys: decode.
  kMmaSplitKeys16,      ///< The same with 16 rows.
  kMmaSplitRows,        ///< 64 rows; 16 to each of four warps, which share the keys: prefill.
  kMmaSplitRows128,     ///< The same with 128 rows, 32 to each warp: prefill of enough rows, head_dim up to 128.
  kWgmma,               ///< 128 rows, 192 at head_dim 64; 64 to each warpgroup: prefill on Hopper.
  kMmaSplitKeys8Small,  ///< kMmaSplitKeys8 for a head_dim over 128 where a CTA has little shared memory.
  kMmaSplitRowsSmall,  ///< kMmaSplitRows for a head_dim over 128 and 16-bit keys where a CTA can have less than 216 KiB of shared memory.
  kSimt,  ///< 8 rows, float32 throughout: float32 queries.
};

inline constexpr AttentionVariant kAttentionVariants[] = {AttentionVariant::kMmaSplitKeys8,
                                                          AttentionVariant::kMmaSplitKeys16,
                                                          AttentionVariant::kMmaSplitRows,
                                                          AttentionVariant::kMmaSplitRows128,
                                                          AttentionVariant::kWgmma,
                                                          AttentionVariant::kMmaSplitKeys8Small,
                                                          AttentionVariant::kMmaSplitRowsSmall,
                                                          AttentionVariant::kSimt};

/// "mma_split_keys_8" and so on.
QUIRE_API const char* name(AttentionVariant variant);

struct AttentionOptions {
  std::optional<double> scale;  ///< Default 1 / sqrt(head_dim).
  bool causal = true;  ///< Keys after the query's position are not seen.
  std::int64_t window_left = -1;  ///< Keys before position - window_left are not seen; negative: no limit.
  std::int64_t window_right = -1;  ///< Keys after position + window_right are not seen; negative: no limit.
  double softcap = 0.0;  ///< 0: none.
  const TensorView* alibi_slopes = nullptr;  ///< float32 [num_heads], or null.
  const TensorView* sinks = nullptr;  ///< float32 [num_heads], or null.
  const TensorView* q_scale = nullptr;  ///< float32 [1] or [num_kv_heads], or null for 1; only for float8 queries.
  const TensorView* k_scale = nullptr;  ///< Likewise; only for float8 and int8 keys.
  const TensorView* v_scale = nullptr;  ///< Likewise.
  /// uint8 [num_tokens, mask_bytes], unit inner stride, or null. Row t belongs to row t of q. Its bit b, which is bit b % 8 of byte b / 8,
  /// says whether key mask_start[s] + b may be seen; keys that the row has no bit for may. Everything else that hides a key still does.
  const TensorView* mask = nullptr;
  /// int32 [num_seqs], or null for kv_len - q_len: bit b is then the key of the sequence's query b, and all keys before its queries may
  /// be seen, as in the verification of a draft or a tree. 0 for a row of all keys. Any value is fine.
  const TensorView* mask_start = nullptr;
  /// The kernel to run, for measurements and to work around trouble; none: the fastest, as far as known. UnsupportedError where it cannot run.
  std::optional<AttentionVariant> variant;
  Validate validate = Validate::kShape;
  /// A row's bits depend on its own query and on the keys that it sees alone: not on the batch, the other rows, whether it comes in a decode or
  /// a prefill, the physical blocks, or the device's number of SMs. Slower where many rows of a sequence come together. Not with `variant`.
  bool batch_invariant = false;
};

/// Attention of every query over its sequence's keys and values in a paged cache: decode, prefill and mixed batches.
///
///   out              as q; bfloat16 or float16 where q is float8_e4m3fn
///   lse              null, or float32 [num_tokens, num_heads], contiguous
///   q                float32, float16, bfloat16 or float8_e4m3fn [num_tokens, num_heads, head_dim], unit inner stride
///   k_cache, v_cache [num_blocks, block_size, num_kv_heads, head_dim], unit inner stride; q's dtype, or float8_e4m3fn,
///                    float8_e5m2, int8. num_heads is a multiple of num_kv_heads; head_dim a multiple of 8 up to 256.
///   block_tables     int32 [num_seqs, max_blocks_per_seq], unit inner stride. Entries past a sequence's length may hold
///                    anything. A needed entry outside [0, num_blocks) hides its keys and, unless -1, is recorded.
///   seq_lens         int32 [num_seqs]: keys of each sequence, the queries' own included. Clamped to
///                    [0, max_blocks_per_seq * block_size], with a record if that changes it.
///   query_start_loc  null for decode (one query per sequence, num_tokens == num_seqs), or int32 [num_seqs + 1]: sequence
///                    s has the queries [query_start_loc[s], query_start_loc[s + 1]). Clamped to be monotonic and within
///                    num_tokens. Rows of q that belong to no sequence are not written.
///   workspace        contiguous uint8 of at least paged_attention_workspace_size(...) bytes on q's device, 16-byte
///                    aligned; its contents do not matter. Null is right when that size is 0 (always on the CPU).
///
/// No aliases. kFull alone synchronises. Throws std::invalid_argument, TypeError, UnsupportedError, CudaError, with kFull IndexError.
QUIRE_API void paged_attention(const TensorView& out, const TensorView* lse, const TensorView& q, const TensorView& k_cache,
                               const TensorView& v_cache, const TensorView& block_tables, const TensorView& seq_lens,
                               const TensorView* query_start_loc, const TensorView* workspace, const AttentionOptions& options,
                               Stream stream);

/// Bytes of workspace that paged_attention needs for a batch of at most this size on this device: 0 on the CPU. It depends on nothing
/// else, so one workspace serves every batch up to it. Throws std::invalid_argument, UnsupportedError.
QUIRE_API std::int64_t paged_attention_workspace_size(std::int64_t num_tokens, std::int64_t num_seqs, std::int64_t num_heads,
                                                      std::int64_t head_dim, Device device);

/// Attention of a batch whose sequences all begin with the same keys: those are read once for all queries, not once for each sequence.
/// The result is that of paged_attention on tables that begin with prefix_blocks, with lengths that count the prefix.
///
///   prefix_blocks    int32 [num_prefix_blocks], contiguous: the blocks of the common prefix, all of them full. Out-of-range entries as in
///                    block_tables.
///   block_tables, seq_lens   as in paged_attention, of what follows the prefix
/// Queries belong to what follows the prefix: every one sees the whole prefix. options.window_left, window_right and alibi_slopes must
/// be unset, since they tell the prefix's keys apart by query (UnsupportedError), and so must options.variant. options.mask is over the keys
/// that follow. The rest is as in paged_attention; the workspace size is shared_prefix_attention_workspace_size(...).
/// The result is put together from rounded parts: its error is up to twice paged_attention's.
QUIRE_API void shared_prefix_attention(const TensorView& out, const TensorView* lse, const TensorView& q, const TensorView& k_cache,
                                       const TensorView& v_cache, const TensorView& prefix_blocks, const TensorView& block_tables,
                                       const TensorView& seq_lens, const TensorView* query_start_loc, const TensorView* workspace,
                                       const AttentionOptions& options, Stream stream);

/// As paged_attention_workspace_size.
QUIRE_API std::int64_t shared_prefix_attention_workspace_size(std::int64_t num_tokens, std::int64_t num_seqs, std::int64_t num_heads,
                                                              std::int64_t head_dim, Device device);

/// Attention over ragged (unpaged) keys and values.
///
///   k, v             q's dtype, float8_e4m3fn, float8_e5m2 or int8: [num_kv_tokens, num_kv_heads, head_dim], unit inner stride
///   query_start_loc  int32 [num_seqs + 1], or null for a single sequence
///   kv_start_loc     int32 [num_seqs + 1], or null: then equal to query_start_loc
/// The rest is as in paged_attention; the workspace size is attention_workspace_size(...).
QUIRE_API void attention(const TensorView& out, const TensorView* lse, const TensorView& q, const TensorView& k, const TensorView& v,
                         const TensorView* query_start_loc, const TensorView* kv_start_loc, const TensorView* workspace,
                         const AttentionOptions& options, Stream stream);

/// As paged_attention_workspace_size.
QUIRE_API std::int64_t attention_workspace_size(std::int64_t num_tokens, std::int64_t num_seqs, std::int64_t num_heads,
                                                std::int64_t head_dim, Device device);

/// Merges two partial attention results over disjoint keys:
///   lse = log(exp(lse_a) + exp(lse_b)),  out = out_a exp(lse_a - lse) + out_b exp(lse_b - lse).
/// The state (0, -inf) is the identity; merging two of them gives it again.
///
///   out, out_a, out_b        one dtype of float32, float16, bfloat16: [num_tokens, num_heads, head_dim], unit inner stride
///   out_lse, lse_a, lse_b    float32 [num_tokens, num_heads], contiguous; out_lse may be null
/// out may be out_a or out_b, and out_lse lse_a or lse_b (same memory, same strides); no other aliases. Throws as paged_attention.
QUIRE_API void merge_attention(const TensorView& out, const TensorView* out_lse, const TensorView& out_a, const TensorView& lse_a,
                               const TensorView& out_b, const TensorView& lse_b, Stream stream);

}  // namespace quire
