// Public entries of the attention ops: validate, then choose the backend.
// SPDX-License-Identifier: Apache-2.0
#include "quire/attention.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "core/check.h"
#include "core/runtime.h"
#include "cuda/runtime.h"
#include "ops/attention.h"

namespace quire {
namespace {

constexpr std::int64_t kMaxHeadDim = 256;
// Kernels keep token, key and row indices of one call in 32 bits; offsets stay 64-bit.
constexpr std::int64_t kMaxIndex = std::numeric_limits<std::int32_t>::max() / 2;

void check_below(const Check& check, const char* arg, const char* what, std::int64_t value) {
  if (value > kMaxIndex) check.fail_unsupported(arg, std::string(what) + " of at most " + std::to_string(kMaxIndex), std::to_string(value));
}

// What both ops share: q, out, lse, options. `k_arg` is the keys' name.
AttentionParams check_query(const Check& check, const TensorView& out, const TensorView* lse, const TensorView& q, const char* k_arg,
                            std::int64_t num_kv_heads, std::int64_t kv_head_dim, const AttentionOptions& options) {
  const bool float8_queries = q.dtype == DType::kFloat8E4M3FN;
  if (!float8_queries) check.dtype(q, "q", {DType::kFloat32, DType::kFloat16, DType::kBFloat16, DType::kFloat8E4M3FN});
  check.shape(q, "q", {kAny, kAny, kAny});
  check.inner_contiguous(q, "q");
  check.accessible(q, "q");
  const std::int64_t num_tokens = q.size(0), num_heads = q.size(1), head_dim = q.size(2);
  if (head_dim % 8 != 0 || head_dim < 8 || head_dim > kMaxHeadDim)
    check.fail_unsupported("q", "a head_dim that is a multiple of 8, from 8 to 256", std::to_string(head_dim));
  if (kv_head_dim != head_dim) check.fail_value(k_arg, "head_dim " + std::to_string(head_dim) + " like q", std::to_string(kv_head_dim));
  if (num_heads == 0 || num_kv_heads == 0 || num_heads % num_kv_heads != 0)
    check.fail_value("q", "a num_heads that is a positive multiple of num_kv_heads " + std::to_string(num_kv_heads),
                     std::to_string(num_heads));
  check_below(check, "q", "num_tokens * num_heads", num_tokens > 0 ? checked_mul(num_tokens, num_heads, check.op(), "q") : 0);

  if (float8_queries) {
    check.dtype(out, "out", {DType::kBFloat16, DType::kFloat16});
  } else {
    check.same_dtype(out, "out", q, "q");
  }
  check.same_shape(out, "out", q, "q");
  check.device(out, "out", q.device, "q");
  check.inner_contiguous(out, "out");
  check.writable(out, "out");
  check.disjoint(out, "out", q, "q", false);
  AttentionParams params;
  if (lse != nullptr) {
    check.tensor(*lse, "lse", DType::kFloat32, {num_tokens, num_heads});
    check.device(*lse, "lse", q.device, "q");
    check.contiguous(*lse, "lse");
    check.writable(*lse, "lse");
    check.disjoint(*lse, "lse", q, "q", false);
    check.disjoint(*lse, "lse", out, "out", false);
    params.lse = lse->as<float>();
  }

  const double scale = options.scale.value_or(1.0 / std::sqrt(static_cast<double>(head_dim)));
  check.finite(scale, "scale");
  check.finite(options.softcap, "softcap");
  if (options.softcap < 0.0) check.fail_value("softcap", "0 (none) or more", std::to_string(options.softcap));
  const auto per_head = [&](const TensorView* t, const char* arg) -> const float* {
    if (t == nullptr) return nullptr;
    check.vector(*t, arg, DType::kFloat32, num_heads, q.device, "q");
    return t->as<const float>();
  };
  params.alibi_slopes = per_head(options.alibi_slopes, "alibi_slopes");
  params.sinks = per_head(options.sinks, "sinks");

  params.out = out.data;
  params.q = q.data;
  params.dtype = out.dtype;
  params.float8_queries = float8_queries;
  if (options.q_scale != nullptr) {
    if (!float8_queries) check.fail_value("q_scale", std::string("none for ") + name(q.dtype) + " queries", describe(*options.q_scale));
    params.q_scale_stride = check.scale(options.q_scale, "q_scale", q.dtype, num_kv_heads, q.device, "q");
    params.q_scale = options.q_scale->as<const float>();
  }
  params.num_tokens = num_tokens;
  params.num_heads = num_heads;
  params.num_kv_heads = num_kv_heads;
  params.head_dim = head_dim;
  params.q_token_stride = q.stride(0);
  params.q_head_stride = q.stride(1);
  params.out_token_stride = out.stride(0);
  params.out_head_stride = out.stride(1);
  params.scale = static_cast<float>(scale);
  params.softcap = static_cast<float>(options.softcap);
  params.causal = options.causal;
  params.window_left = options.window_left < 0 ? -1 : std::min(options.window_left, kMaxIndex);
  params.window_right = options.window_right < 0 ? -1 : std::min(options.window_right, kMaxIndex);
  return params;
}

void check_kv(const Check& check, const TensorView& k, const char* k_arg, const TensorView& v, const char* v_arg, const TensorView& q,
              const AttentionOptions& options, AttentionParams& params) {
  if (params.float8_queries) {
    check.dtype(k, k_arg, {DType::kFloat8E4M3FN, DType::kFloat8E5M2, DType::kInt8});
  } else if (k.dtype != q.dtype) {
    check.dtype(k, k_arg, {q.dtype, DType::kFloat8E4M3FN, DType::kFloat8E5M2, DType::kInt8});
  }
  check.device(k, k_arg, q.device, "q");
  check.inner_contiguous(k, k_arg);
  check.accessible(k, k_arg);
  check.same_dtype(v, v_arg, k, k_arg);
  check.same_shape(v, v_arg, k, k_arg);
  check.device(v, v_arg, q.device, "q");
  check.inner_contiguous(v, v_arg);
  check.accessible(v, v_arg);
  params.k_scale_stride = check.scale(options.k_scale, "k_scale", k.dtype, params.num_kv_heads, q.device, "q");
  params.v_scale_stride = check.scale(options.v_scale, "v_scale", k.dtype, params.num_kv_heads, q.device, "q");
  if (options.k_scale != nullptr) params.k_scale = options.k_scale->as<const float>();
  if (options.v_scale != nullptr) params.v_scale = options.v_scale->as<const float>();
}

void check_mask(const Check& check, const AttentionOptions& options, const TensorView& q, std::int64_t num_seqs, AttentionParams& params) {
  if (options.mask == nullptr) {
    if (options.mask_start != nullptr) check.fail_value("mask", "uint8 [num_tokens, mask_bytes] with mask_start", "none");
    return;
  }
  const TensorView& mask = *options.mask;
  check.tensor(mask, "mask", DType::kUInt8, {params.num_tokens, kAny});
  check.device(mask, "mask", q.device, "q");
  check.inner_contiguous(mask, "mask");
  check.accessible(mask, "mask");
  check_below(check, "mask", "mask_bytes * 8", checked_mul(mask.size(1), 8, check.op(), "mask"));
  if (options.mask_start != nullptr) check.vector(*options.mask_start, "mask_start", DType::kInt32, num_seqs, q.device, "q");
  if (mask.numel() == 0) return;  // no bits: everything may be seen
  params.mask = mask.as<const std::uint8_t>();
  params.mask_stride = mask.stride(0);
  params.mask_bytes = mask.size(1);
  if (options.mask_start != nullptr) params.mask_start = options.mask_start->as<const std::int32_t>();
}

// What has no bearing on the CPU is refused there, not ignored.
void check_variant(const Check& check, const AttentionOptions& options, const TensorView& q, AttentionParams& params) {
  if (options.variant && q.device.type == DeviceType::kCPU)
    check.fail_unsupported("variant", "none for CPU tensors", name(*options.variant));
  if (options.variant && options.batch_invariant)
    check.fail_value("variant", "none with batch_invariant, which has a kernel of its own", name(*options.variant));
  params.variant = options.variant;
  params.batch_invariant = options.batch_invariant;
}

const std::int32_t* check_start_loc(const Check& check, const TensorView& t, const char* arg, std::int64_t num_seqs, Device device) {
  check.vector(t, arg, DType::kInt32, num_seqs + 1, device, "q");
  return t.as<const std::int32_t>();
}

// Nothing that is written may be what kernels still read.
void check_outputs_apart(const Check& check, const TensorView& out, const TensorView* lse, const TensorView* workspace,
                         std::initializer_list<std::pair<const TensorView*, const char*>> inputs) {
  // Nearly all calls' tensors have ranges of their own.
  const auto range_of = [](const TensorView* t) { return t != nullptr ? byte_range(*t) : ByteRange{0, 0}; };
  const ByteRange of_out = byte_range(out), of_lse = range_of(lse), of_workspace = range_of(workspace);
  for (const auto& [input, arg] : inputs) {
    if (input == nullptr) continue;
    const ByteRange of_input = byte_range(*input);
    if (!are_apart(of_out, of_input)) check.disjoint(out, "out", *input, arg, false);
    if (!are_apart(of_lse, of_input)) check.disjoint(*lse, "lse", *input, arg, false);
    if (!are_apart(of_workspace, of_input)) check.disjoint(*workspace, "workspace", *input, arg, false);
  }
  if (workspace != nullptr && lse != nullptr) check.disjoint(*workspace, "workspace", *lse, "lse", false);
}

// validate="full": index tensors on the host, a CUDA tensor's after a copy that waits.
class IndexReader {
 public:
  IndexReader(const Check& check, Device device, Stream stream) : check_(check), device_(device), stream_(stream) {
    if constexpr (kHasCuda) {
      if (device.type == DeviceType::kCUDA && cuda::is_capturing(stream))
        check.fail_value("validate", "\"shape\" while the stream is being captured", "\"full\"");
    }
  }

  std::vector<std::int32_t> read(const std::int32_t* data, std::int64_t count) const {
    std::vector<std::int32_t> values(static_cast<std::size_t>(count));
    if (count == 0) return values;
    on_device(
        check_.op(), device_, stream_, [&] { std::copy(data, data + count, values.begin()); },
        [&](auto s) { cuda::copy_to_host(values.data(), data, count * std::int64_t{sizeof(std::int32_t)}, s); });
    return values;
  }

  std::vector<std::int32_t> read_start_loc(const std::int32_t* data, const char* arg, std::int64_t num_seqs,
                                           std::int64_t num_tokens) const {
    std::vector<std::int32_t> loc = read(data, num_seqs + 1);
    for (std::size_t i = 0; i < loc.size(); ++i) {
      const std::int64_t low = i == 0 ? 0 : loc[i - 1];
      if (loc[i] < low || loc[i] > num_tokens)
        check_.fail_index(arg, "a value in [" + std::to_string(low) + ", " + std::to_string(num_tokens) + "]",
                          std::to_string(loc[i]) + " at [" + std::to_string(i) + "]");
    }
    return loc;
  }

  /// Block ids; `row` is text before the index in a message.
  void check_blocks(const std::int32_t* data, std::int64_t count, const char* arg, const std::string& row, std::int64_t num_blocks) const {
    const std::vector<std::int32_t> blocks = read(data, count);
    for (std::size_t i = 0; i < blocks.size(); ++i)
      if (blocks[i] < -1 || blocks[i] >= num_blocks)
        check_.fail_index(arg, "-1 or a block id in [0, " + std::to_string(num_blocks) + ")",
                          std::to_string(blocks[i]) + " at [" + row + std::to_string(i) + "]");
  }

 private:
  const Check& check_;
  Device device_;
  Stream stream_;
};

void check_paged_contents(const Check& check, const AttentionParams& p, Device device, Stream stream) {
  const IndexReader reader(check, device, stream);
  if (p.query_start_loc != nullptr) reader.read_start_loc(p.query_start_loc, "query_start_loc", p.num_seqs, p.num_tokens);
  const std::vector<std::int32_t> lens = reader.read(p.seq_lens, p.num_seqs);
  const std::int64_t capacity = p.max_blocks_per_seq * p.block_size;
  for (std::size_t s = 0; s < lens.size(); ++s) {
    if (lens[s] < 0 || lens[s] > capacity)
      check.fail_index("seq_lens", "a value in [0, " + std::to_string(capacity) + "]",
                       std::to_string(lens[s]) + " at [" + std::to_string(s) + "]");
    const std::int64_t row = static_cast<std::int64_t>(s) * p.block_tables_stride;
    reader.check_blocks(p.block_tables + row, ceil_div(lens[s], p.block_size), "block_tables", std::to_string(s) + ", ", p.num_blocks);
  }
}

std::int64_t workspace_size(const char* op, std::int64_t num_tokens, std::int64_t num_seqs, std::int64_t num_heads, std::int64_t head_dim,
                            Device device, bool shared_prefix = false) {
  const Check check(op);
  const auto count = [&](std::int64_t value, const char* arg) {
    if (value < 0) check.fail_value(arg, "0 or more", std::to_string(value));
    check_below(check, arg, arg, value);
  };
  count(num_tokens, "num_tokens");
  count(num_seqs, "num_seqs");
  count(num_heads, "num_heads");
  if (head_dim < 8 || head_dim > kMaxHeadDim) check.fail_value("head_dim", "8 to 256", std::to_string(head_dim));
  if (device.type == DeviceType::kCPU) return 0;
  if constexpr (kHasCuda) {  // the device need not be current
    return shared_prefix ? cuda::shared_prefix_attention_workspace_size(num_tokens, num_heads, head_dim, device.index)
                         : cuda::attention_workspace_size(num_tokens, num_seqs, num_heads, head_dim, device.index);
  } else {
    throw_cpu_only_build(op);
  }
}

// Everything that paged ops check, but for the workspace.
AttentionParams check_paged(const Check& check, const TensorView& out, const TensorView* lse, const TensorView& q,
                            const TensorView& k_cache, const TensorView& v_cache, const TensorView& block_tables,
                            const TensorView& seq_lens, const TensorView* query_start_loc, const TensorView* workspace,
                            const AttentionOptions& options) {
  check.shape(k_cache, "k_cache", {kAny, kAny, kAny, kAny});
  AttentionParams params = check_query(check, out, lse, q, "k_cache", k_cache.size(2), k_cache.size(3), options);
  check_kv(check, k_cache, "k_cache", v_cache, "v_cache", q, options, params);
  if (k_cache.size(1) < 1) check.fail_value("k_cache", "a block_size of 1 or more", describe(k_cache));

  check.tensor(seq_lens, "seq_lens", DType::kInt32, {kAny});
  const std::int64_t num_seqs = seq_lens.size(0);
  check.vector(seq_lens, "seq_lens", DType::kInt32, num_seqs, q.device, "q");
  check.tensor(block_tables, "block_tables", DType::kInt32, {num_seqs, kAny});
  check.device(block_tables, "block_tables", q.device, "q");
  check.inner_contiguous(block_tables, "block_tables");
  check.accessible(block_tables, "block_tables");
  if (query_start_loc != nullptr) {
    params.query_start_loc = check_start_loc(check, *query_start_loc, "query_start_loc", num_seqs, q.device);
  } else if (params.num_tokens != num_seqs) {
    check.fail_value("q", "one token for each of " + std::to_string(num_seqs) + " sequences (or query_start_loc)", describe(q));
  }
  check_mask(check, options, q, num_seqs, params);
  check_variant(check, options, q, params);
  params.k = k_cache.data;
  params.v = v_cache.data;
  params.kv_dtype = k_cache.dtype;
  // A table without columns may have no address, and backends take a null pointer for "not paged". None of its entries is read.
  params.block_tables = block_tables.data != nullptr ? block_tables.as<const std::int32_t>() : seq_lens.as<const std::int32_t>();
  params.seq_lens = seq_lens.as<const std::int32_t>();
  params.num_seqs = num_seqs;
  params.num_blocks = std::min<std::int64_t>(k_cache.size(0), std::numeric_limits<std::int32_t>::max());
  params.block_size = k_cache.size(1);
  params.max_blocks_per_seq = block_tables.size(1);
  check_below(check, "k_cache", "block_size", params.block_size);
  check_below(check, "block_tables", "max_blocks_per_seq * block_size",
              checked_mul(params.max_blocks_per_seq, params.block_size, check.op(), "block_tables"));
  params.block_tables_stride = block_tables.stride(0);
  params.k_block_stride = k_cache.stride(0);
  params.k_token_stride = k_cache.stride(1);
  params.k_head_stride = k_cache.stride(2);
  params.v_block_stride = v_cache.stride(0);
  params.v_token_stride = v_cache.stride(1);
  params.v_head_stride = v_cache.stride(2);
  check_outputs_apart(check, out, lse, workspace,
                      {{&k_cache, "k_cache"},
                       {&v_cache, "v_cache"},
                       {&block_tables, "block_tables"},
                       {&seq_lens, "seq_lens"},
                       {query_start_loc, "query_start_loc"},
                       {options.alibi_slopes, "alibi_slopes"},
                       {options.sinks, "sinks"},
                       {options.q_scale, "q_scale"},
                       {options.k_scale, "k_scale"},
                       {options.v_scale, "v_scale"},
                       {options.mask, "mask"},
                       {options.mask_start, "mask_start"}});
  return params;
}

}  // namespace

const char* name(AttentionVariant variant) {
  switch (variant) {
    case AttentionVariant::kMmaSplitKeys8: return "mma_split_keys_8";
    case AttentionVariant::kMmaSplitKeys16: return "mma_split_keys_16";
    case AttentionVariant::kMmaSplitRows: return "mma_split_rows";
    case AttentionVariant::kMmaSplitRows128: return "mma_split_rows_128";
    case AttentionVariant::kWgmma: return "wgmma";
    case AttentionVariant::kMmaSplitKeys8Small: return "mma_split_keys_8_small";
    case AttentionVariant::kMmaSplitRowsSmall: return "mma_split_rows_small";
    case AttentionVariant::kSimt: return "simt";
  }
  return "unknown";
}

void paged_attention(const TensorView& out, const TensorView* lse, const TensorView& q, const TensorView& k_cache,
                     const TensorView& v_cache, const TensorView& block_tables, const TensorView& seq_lens,
                     const TensorView* query_start_loc, const TensorView* workspace, const AttentionOptions& options, Stream stream) {
  const Check check("paged_attention");
  AttentionParams params = check_paged(check, out, lse, q, k_cache, v_cache, block_tables, seq_lens, query_start_loc, workspace, options);
  params.op = OpId::kPagedAttention;
  if (params.num_tokens == 0 || params.num_seqs == 0) return;
  params.workspace = check.workspace(
      workspace, paged_attention_workspace_size(params.num_tokens, params.num_seqs, params.num_heads, params.head_dim, q.device), q.device,
      "q", {{&q, "q"}, {&out, "out"}});
  if (options.validate == Validate::kFull) check_paged_contents(check, params, q.device, stream);
  dispatch_device(
      "paged_attention", q.device, stream, [&] { cpu::attention(params); }, [&](auto s) { cuda::attention(params, s); }, Explains::kBoth);
}

std::int64_t paged_attention_workspace_size(std::int64_t num_tokens, std::int64_t num_seqs, std::int64_t num_heads, std::int64_t head_dim,
                                            Device device) {
  return workspace_size("paged_attention_workspace_size", num_tokens, num_seqs, num_heads, head_dim, device);
}

AttentionParams prefix_pass(const SharedPrefixParams& params, void* out, float* lse) {
  AttentionParams pass = params.own;
  pass.out = out;
  pass.lse = lse;
  pass.out_head_stride = pass.head_dim;
  pass.out_token_stride = pass.num_heads * pass.head_dim;
  pass.block_tables = params.prefix_blocks;
  pass.seq_lens = pass.query_start_loc = nullptr;
  pass.num_seqs = 1;
  pass.shared_queries = pass.num_tokens;
  pass.total_keys = params.num_prefix_blocks * pass.block_size;
  pass.max_blocks_per_seq = pass.block_tables_stride = params.num_prefix_blocks;
  pass.causal = false;
  pass.sinks = nullptr;  // they count once, with the sequences' own keys
  pass.mask = nullptr;
  return pass;
}

void shared_prefix_attention(const TensorView& out, const TensorView* lse, const TensorView& q, const TensorView& k_cache,
                             const TensorView& v_cache, const TensorView& prefix_blocks, const TensorView& block_tables,
                             const TensorView& seq_lens, const TensorView* query_start_loc, const TensorView* workspace,
                             const AttentionOptions& options, Stream stream) {
  const Check check("shared_prefix_attention");
  if (options.window_left >= 0 || options.window_right >= 0)
    check.fail_unsupported("window", "none, since the prefix is read once for all queries (paged_attention takes windows)",
                           "(" + std::to_string(options.window_left) + ", " + std::to_string(options.window_right) + ")");
  if (options.alibi_slopes != nullptr)
    check.fail_unsupported("alibi_slopes", "none, since the prefix is read once for all queries (paged_attention takes slopes)",
                           describe(*options.alibi_slopes));
  if (options.variant) check.fail_unsupported("variant", "none, since two kernels run", name(*options.variant));
  if (options.batch_invariant)
    check.fail_unsupported("batch_invariant", "false, since the rows of a batch share the pass over the prefix", "true");
  SharedPrefixParams params;
  params.own = check_paged(check, out, lse, q, k_cache, v_cache, block_tables, seq_lens, query_start_loc, workspace, options);
  params.own.op = OpId::kSharedPrefixAttention;
  check.tensor(prefix_blocks, "prefix_blocks", DType::kInt32, {kAny});
  params.num_prefix_blocks = prefix_blocks.size(0);
  check.vector(prefix_blocks, "prefix_blocks", DType::kInt32, params.num_prefix_blocks, q.device, "q");
  check_below(check, "prefix_blocks", "num_prefix_blocks * block_size",
              checked_mul(params.num_prefix_blocks, params.own.block_size, check.op(), "prefix_blocks"));
  check_outputs_apart(check, out, lse, workspace, {{&prefix_blocks, "prefix_blocks"}});
  params.prefix_blocks = prefix_blocks.as<const std::int32_t>();
  AttentionParams& own = params.own;
  if (own.num_tokens == 0 || own.num_seqs == 0) return;
  own.workspace = check.workspace(
      workspace, shared_prefix_attention_workspace_size(own.num_tokens, own.num_seqs, own.num_heads, own.head_dim, q.device), q.device, "q",
      {{&q, "q"}, {&out, "out"}});
  if (options.validate == Validate::kFull) {
    check_paged_contents(check, own, q.device, stream);
    const IndexReader reader(check, q.device, stream);
    reader.check_blocks(params.prefix_blocks, params.num_prefix_blocks, "prefix_blocks", "", own.num_blocks);
  }
  dispatch_device(
      "shared_prefix_attention", q.device, stream,
      [&] { params.num_prefix_blocks == 0 ? cpu::attention(own) : cpu::shared_prefix_attention(params); },
      [&](auto s) { params.num_prefix_blocks == 0 ? cuda::attention(own, s) : cuda::shared_prefix_attention(params, s); }, Explains::kBoth);
}

std::int64_t shared_prefix_attention_workspace_size(std::int64_t num_tokens, std::int64_t num_seqs, std::int64_t num_heads,
                                                    std::int64_t head_dim, Device device) {
  return workspace_size("shared_prefix_attention_workspace_size", num_tokens, num_seqs, num_heads, head_dim, device, true);
}

void attention(const TensorView& out, const TensorView* lse, const TensorView& q, const TensorView& k, const TensorView& v,
               const TensorView* query_start_loc, const TensorView* kv_start_loc, const TensorView* workspace,
               const AttentionOptions& options, Stream stream) {
  const Check check("attention");
  check.shape(k, "k", {kAny, kAny, kAny});
  AttentionParams params = check_query(check, out, lse, q, "k", k.size(1), k.size(2), options);
  check_kv(check, k, "k", v, "v", q, options, params);
  if (query_start_loc == nullptr && kv_start_loc != nullptr)
    check.fail_value("query_start_loc", "int32 [num_seqs + 1] with kv_start_loc", "none");
  std::int64_t num_seqs = 1;
  if (query_start_loc != nullptr) {
    check.rank(*query_start_loc, "query_start_loc", 1, 1);
    num_seqs = query_start_loc->size(0) - 1;
    if (num_seqs < 0) check.fail_value("query_start_loc", "int32 [num_seqs + 1]", describe(*query_start_loc));
    params.query_start_loc = check_start_loc(check, *query_start_loc, "query_start_loc", num_seqs, q.device);
    const TensorView& kv_loc = kv_start_loc == nullptr ? *query_start_loc : *kv_start_loc;
    params.kv_start_loc = check_start_loc(check, kv_loc, "kv_start_loc", num_seqs, q.device);
  }
  check_mask(check, options, q, num_seqs, params);
  check_variant(check, options, q, params);
  params.k = k.data;
  params.v = v.data;
  params.kv_dtype = k.dtype;
  params.num_seqs = num_seqs;
  params.num_kv_tokens = k.size(0);
  check_below(check, "k", "num_kv_tokens", params.num_kv_tokens);
  params.k_token_stride = k.stride(0);
  params.k_head_stride = k.stride(1);
  params.v_token_stride = v.stride(0);
  params.v_head_stride = v.stride(1);
  check_outputs_apart(check, out, lse, workspace,
                      {{&k, "k"},
                       {&v, "v"},
                       {query_start_loc, "query_start_loc"},
                       {kv_start_loc, "kv_start_loc"},
                       {options.alibi_slopes, "alibi_slopes"},
                       {options.sinks, "sinks"},
                       {options.q_scale, "q_scale"},
                       {options.k_scale, "k_scale"},
                       {options.v_scale, "v_scale"},
                       {options.mask, "mask"},
                       {options.mask_start, "mask_start"}});
  if (params.num_tokens == 0 || num_seqs == 0) return;
  params.workspace =
      check.workspace(workspace, attention_workspace_size(params.num_tokens, num_seqs, params.num_heads, params.head_dim, q.device),
                      q.device, "q", {{&q, "q"}, {&out, "out"}});
  if (options.validate == Validate::kFull) {
    const IndexReader reader(check, q.device, stream);
    if (params.query_start_loc != nullptr) {
      reader.read_start_loc(params.query_start_loc, "query_start_loc", num_seqs, params.num_tokens);
      reader.read_start_loc(params.kv_start_loc, "kv_start_loc", num_seqs, params.num_kv_tokens);
    }
  }
  params.op = OpId::kAttention;
  dispatch_device(
      "attention", q.device, stream, [&] { cpu::attention(params); }, [&](auto s) { cuda::attention(params, s); }, Explains::kBoth);
}

std::int64_t attention_workspace_size(std::int64_t num_tokens, std::int64_t num_seqs, std::int64_t num_heads, std::int64_t head_dim,
                                      Device device) {
  return workspace_size("attention_workspace_size", num_tokens, num_seqs, num_heads, head_dim, device);
}

void merge_attention(const TensorView& out, const TensorView* out_lse, const TensorView& out_a, const TensorView& lse_a,
                     const TensorView& out_b, const TensorView& lse_b, Stream stream) {
  const Check check("merge_attention");
  check.float_dtype(out_a, "out_a");
  check.shape(out_a, "out_a", {kAny, kAny, kAny});
  const auto state = [&](const TensorView& t, const char* arg, const TensorView& l, const char* lse_arg) {
    check.same_dtype(t, arg, out_a, "out_a");
    check.same_shape(t, arg, out_a, "out_a");
    check.device(t, arg, out_a.device, "out_a");
    check.inner_contiguous(t, arg);
    check.accessible(t, arg);
    check.tensor(l, lse_arg, DType::kFloat32, {out_a.size(0), out_a.size(1)});
    check.device(l, lse_arg, out_a.device, "out_a");
    check.contiguous(l, lse_arg);
    check.accessible(l, lse_arg);
  };
  state(out_a, "out_a", lse_a, "lse_a");
  state(out_b, "out_b", lse_b, "lse_b");
  state(out, "out", out_lse == nullptr ? lse_a : *out_lse, "out_lse");
  check.writable(out, "out");
  check.disjoint(out, "out", out_a, "out_a", true);
  check.disjoint(out, "out", out_b, "out_b", true);
  check.disjoint(out, "out", lse_a, "lse_a", false);
  check.disjoint(out, "out", lse_b, "lse_b", false);
  MergeParams params;
  if (out_lse != nullptr) {
    check.writable(*out_lse, "out_lse");
    check.disjoint(*out_lse, "out_lse", lse_a, "lse_a", true);
    check.disjoint(*out_lse, "out_lse", lse_b, "lse_b", true);
    check.disjoint(*out_lse, "out_lse", out, "out", false);
    check.disjoint(*out_lse, "out_lse", out_a, "out_a", false);
    check.disjoint(*out_lse, "out_lse", out_b, "out_b", false);
    params.out_lse = out_lse->as<float>();
  }
  params.out = out.data;
  params.out_a = out_a.data;
  params.lse_a = lse_a.as<const float>();
  params.out_b = out_b.data;
  params.lse_b = lse_b.as<const float>();
  params.dtype = out.dtype;
  params.num_tokens = out.size(0);
  params.num_heads = out.size(1);
  params.head_dim = out.size(2);
  params.out_token_stride = out.stride(0);
  params.out_head_stride = out.stride(1);
  params.a_token_stride = out_a.stride(0);
  params.a_head_stride = out_a.stride(1);
  params.b_token_stride = out_b.stride(0);
  params.b_head_stride = out_b.stride(1);
  if (out.numel() == 0) return;
  dispatch_device(
      "merge_attention", out.device, stream, [&] { cpu::merge_attention(params); }, [&](auto s) { cuda::merge_attention(params, s); });
}

}  // namespace quire
