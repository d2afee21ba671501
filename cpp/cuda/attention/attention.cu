// Launches attention: shape to configuration to kernel, and the merge of two partial results.
// SPDX-License-Identifier: Apache-2.0
#include <cmath>
#include <initializer_list>
#include <limits>
#include <mutex>
#include <unordered_map>

#include "core/dispatch.h"
#include "core/explain.h"
#include "cuda/attention/combine.cuh"
#include "cuda/attention/config.h"
#include "cuda/attention/launch.h"
#include "cuda/attention/plan.cuh"
#include "cuda/device_code.h"
#include "cuda/launch.h"
#include "cuda/runtime.h"
#include "ops/attention.h"

namespace quire::cuda {
namespace attn {
namespace {

/// The largest of 16, 8, 4, 2, 1 that divides every address a + i * stride, all in bytes.
int common_alignment(std::initializer_list<std::int64_t> values) {
  std::int64_t bits = 16;
  for (const std::int64_t value : values) bits |= value;
  return static_cast<int>(bits & -bits);
}

Plan make_plan(const AttentionParams& params, const Config& config) {
  const auto address = [](const void* pointer) { return static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(pointer)); };
  const std::int64_t kv_bytes = itemsize(params.kv_dtype);
  const std::int64_t q_bytes = params.float8_queries ? 1 : itemsize(params.dtype), out_bytes = itemsize(params.dtype);
  Plan plan{};
  plan.params = params;
  // The tensor cores' kernels have tanh by 1 - 2 / (e^2x + 1), off by about softcap * 2^-22. Beyond this cap that is more than what the
  // cap takes from a score below 70.
  if (config.variant != Variant::kSimt && params.softcap > 8192.0f) plan.params.softcap = 0.0f;
  if (config.pairing != Pairing::kNone) {
    plan.params.num_kv_heads /= 2;
    plan.params.k_head_stride *= 2;
    plan.params.v_head_stride *= 2;
  }
  plan.group = Divisor::make(params.num_heads / plan.params.num_kv_heads);
  plan.kv_group = Divisor::make(params.num_heads / params.num_kv_heads);
  plan.block_size = Divisor::make(params.block_size);
  plan.error_word = error_word();
  plan.num_rows = params.num_tokens * params.num_heads;
  plan.partial_out = static_cast<float*>(params.workspace);
  const std::int64_t rows = config.tile_rows;
  const std::int64_t num_partial_rows =
      shares_keys(config.variant) ? config.num_ctas * config.slots_per_cta * rows : config.num_splits * plan.num_rows;
  plan.partial_stats = reinterpret_cast<float2*>(plan.partial_out + num_partial_rows * params.head_dim);
  plan.num_splits = config.num_splits;
  plan.keys_per_split_min = config.keys_per_split_min;
  plan.rows_of_tile = Divisor::make(rows);
  plan.tile_rows = static_cast<int>(rows);
  plan.min_rows = config.min_rows;
  plan.max_rows = config.max_rows;
  plan.slots_per_cta = config.slots_per_cta;
  plan.batch_invariant = params.batch_invariant;
  plan.key_span = std::numeric_limits<std::int32_t>::max();
  plan.line_shift = config.line_shift;
  plan.tile_cost = config.tile_cost;
  plan.num_ctas = config.num_ctas;
  plan.cluster = Divisor::make(1);
  plan.ctas_per_tile = Divisor::make(std::max(config.ctas_per_tile, 1));
  plan.tiles_per_cta = config.tiles_per_cta;
  plan.tiles_of_seq = Divisor::make(std::max<std::int64_t>(config.tiles_per_seq * plan.params.num_kv_heads, 1));
  plan.kv_heads = Divisor::make(plan.params.num_kv_heads);
  if (params.window_left >= 0 && (params.causal || params.window_right >= 0) && !params.batch_invariant) {
    const std::int64_t tokens = (rows - 1) / plan.group.divisor + 2;  // that a tile has rows of, at most
    const std::int64_t span = params.window_left + (params.causal ? 0 : params.window_right) + tokens;
    plan.key_span = static_cast<int>(std::min<std::int64_t>(span, plan.key_span));
  }
  plan.num_tiles = static_cast<int>(config.num_tiles);
  plan.tiles_per_seq = static_cast<int>(config.tiles_per_seq);
  plan.tiles_of_each_seq = Divisor::make(std::max<std::int64_t>(config.tiles_per_seq, 1));
  plan.key_capacity = static_cast<int>(key_capacity(params));
  plan.kv_alignment = common_alignment({address(params.k), address(params.v), params.k_block_stride * kv_bytes,
                                        params.k_token_stride * kv_bytes, params.k_head_stride * kv_bytes, params.v_block_stride * kv_bytes,
                                        params.v_token_stride * kv_bytes, params.v_head_stride * kv_bytes});
  const auto chunk_strides = [&](std::int64_t block_stride, std::int64_t token_stride, uint2& strides) {
    const std::int64_t tokens = params.block_tables != nullptr ? params.block_size : params.num_kv_tokens;
    const std::int64_t blocks = params.block_tables != nullptr ? params.num_blocks : 1;
    const std::int64_t limit = std::numeric_limits<std::uint32_t>::max();
    block_stride = block_stride * kv_bytes / 16, token_stride = token_stride * kv_bytes / 16;
    if (block_stride < 0 || token_stride < 0 || block_stride > limit || token_stride > limit) return false;
    strides = uint2{static_cast<unsigned>(block_stride), static_cast<unsigned>(token_stride)};
    return static_cast<double>(blocks) * static_cast<double>(block_stride) +
               static_cast<double>(tokens) * static_cast<double>(token_stride) <
           static_cast<double>(limit);
  };
  plan.chunk_strides_exist = plan.kv_alignment == 16 && params.head_dim * kv_bytes % 16 == 0 &&
                             chunk_strides(params.k_block_stride, params.k_token_stride, plan.k_chunk_strides) &&
                             chunk_strides(params.v_block_stride, params.v_token_stride, plan.v_chunk_strides);
  plan.groups_exist = plan.chunk_strides_exist && (params.block_tables == nullptr || params.block_size % 8 == 0);
  plan.q_alignment = common_alignment({address(params.q), params.q_token_stride * q_bytes, params.q_head_stride * q_bytes});
  plan.out_aligned = common_alignment({address(params.out), params.out_token_stride * out_bytes, params.out_head_stride * out_bytes}) == 16;
  plan.op = params.op;
  return plan;
}

/// Counters for the CTAs of a launch, zero between launches. Launches that may run at once have different workspaces, as everything that
/// they write there is theirs alone: each workspace has counters of its own.
unsigned* counters_of(const void* workspace) {
  constexpr int kPerAllocation = 256, kEach = kMaxCtas + 32;  // and one for tickets (next_tile, WgmmaScheduler)
  struct Counters {
    std::unordered_map<const void*, unsigned*> of;
    unsigned* next = nullptr;
    int num_left = 0;
  };
  // What this thread asked for last needs no look.
  struct Recent {
    int device = -1;
    const void* workspace = nullptr;
    unsigned* counters = nullptr;
  };
  thread_local Recent recent;
  const int device = current_device();
  if (recent.device == device && recent.workspace == workspace) return recent.counters;
  static std::mutex mutex;
  static std::unordered_map<int, Counters>& of_device = *new std::unordered_map<int, Counters>;  // outlives whoever calls at exit
  const std::lock_guard lock(mutex);
  Counters& counters = of_device[device];
  unsigned*& mine = counters.of[workspace];
  if (mine != nullptr) {
    recent = {device, workspace, mine};
    return mine;
  }
  if (counters.num_left == 0) {
    counters.next = static_cast<unsigned*>(allocate_zeroed(std::size_t{kPerAllocation} * kEach * sizeof(unsigned)));
    counters.num_left = kPerAllocation;
  }
  --counters.num_left;
  mine = counters.next;
  counters.next += kEach;
  recent = {device, workspace, mine};
  return mine;
}

}  // namespace

void launch(const AttentionParams& params, const Config& config, Stream stream) {
  Plan plan = make_plan(params, config);
  if (shares_keys(config.variant)) {
    plan.counters = counters_of(params.workspace);
    return dispatch_kv(params.kv_dtype, "attention", [&](auto kv) {
      constexpr DType kKvDType = decltype(kv)::value;
      if constexpr (kKvDType != DType::kFloat32) {
        launch_split_keys<kKvDType>(plan, config, stream);
      } else {
        throw UnsupportedError("[attention] k: expected q's dtype, float8_e4m3fn, float8_e5m2 or int8");
      }
    });
  }
  if (config.variant == Variant::kWgmma) {
    plan.counters = counters_of(params.workspace);
    const auto launch = [&]<DType kQ, bool kNarrowKv>() {
      if constexpr (!kNarrowKv) {
        if (config.head_dim_bucket == 96) return launch_wgmma<kQ, false, 96>(plan, config, stream);
        if (config.head_dim_bucket == 192) return launch_wgmma<kQ, false, 192>(plan, config, stream);
      }
      switch (config.head_dim_bucket) {
        case 64: return launch_wgmma<kQ, kNarrowKv, 64>(plan, config, stream);
        case 128: return launch_wgmma<kQ, kNarrowKv, 128>(plan, config, stream);
        default: return launch_wgmma<kQ, kNarrowKv, 256>(plan, config, stream);
      }
    };
    const auto launch_wide = [&]<DType kQ>() {
      return itemsize(params.kv_dtype) == 1 ? launch.template operator()<kQ, true>() : launch.template operator()<kQ, false>();
    };
    if (params.float8_queries) return launch.template operator()<DType::kFloat8E4M3FN, true>();
    return params.dtype == DType::kBFloat16 ? launch_wide.template operator()<DType::kBFloat16>()
                                            : launch_wide.template operator()<DType::kFloat16>();
  }
  dispatch_kv(params.kv_dtype, "attention", [&](auto kv) {
    constexpr DType kKvDType = decltype(kv)::value;
    if (config.variant == Variant::kSimt) {
      if constexpr (kKvDType != DType::kFloat16 && kKvDType != DType::kBFloat16) return launch_simt<kKvDType>(plan, config, stream);
    } else if constexpr (kKvDType != DType::kFloat32) {
      switch (config.head_dim_bucket) {
        case 64: return launch_mma<kKvDType, 64>(plan, config, stream);
        case 128: return launch_mma<kKvDType, 128>(plan, config, stream);
        case 256: return launch_mma<kKvDType, 256>(plan, config, stream);
        default: break;
      }
    }
    throw UnsupportedError("[attention] k: expected q's dtype, float8_e4m3fn, float8_e5m2 or int8");
  });
  if (config.num_splits > 1) {
    const std::int64_t group = params.num_heads / params.num_kv_heads;
    // Paged and without query_start_loc there is one query per sequence, but in the pass over a shared prefix.
    const bool one_query = config.tiles_per_seq == 1 && params.block_tables != nullptr && params.shared_queries == 0;
    const std::int64_t rows = one_query ? group : config.tile_rows;
    launch_waiting("attention_combine_kernel", attention_combine_kernel,
                   dim3(static_cast<unsigned>(config.num_tiles * params.num_kv_heads), static_cast<unsigned>(rows)), kThreads, stream,
                   plan);
  }
}

namespace {

std::string tiles_text(const Config& config, std::int64_t num_kv_heads) {
  if (config.cluster > 0) {
    const bool lone = config.lone_cluster > 0;
    const int heads = lone ? 1 : config.cluster_heads, cluster = lone ? config.lone_cluster : config.cluster;
    return std::to_string(config.num_tiles * num_kv_heads / heads) + " tiles, of a sequence by " +
           (heads > 1 ? "two kv heads, " : "one kv head, ") +
           (cluster > 1 ? "the keys of each shared by a cluster of up to " + std::to_string(cluster) + " CTAs" : "a CTA to each") +
           ", brought block by block by the copy engine, if the lengths are alike; else all keys shared evenly by up to " +
           std::to_string(config.num_ctas) + " CTAs";
  }
  if (shares_keys(config.variant))
    return "the keys of all tiles, of " + std::to_string(config.tile_rows) + " rows by one kv head, shared evenly by " +
           std::to_string(config.num_ctas) + (config.wide ? " CTAs of many warps" : " CTAs") +
           (config.pairing != Pairing::kNone ? ", two kv heads at a time" : "") +
           (config.by_boxes ? ", brought block by block by the copy engine" : "");
  return std::to_string(config.num_tiles * num_kv_heads) + " tiles of " + std::to_string(config.tile_rows) +
         " rows by one kv head at most" +
         (config.num_splits > 1 ? ", the keys of each split over up to " + std::to_string(config.num_splits) + " CTAs" : "");
}

template <typename T>
__device__ __forceinline__ float widen(T value) {
  return static_cast<float>(value);
}

/// Grid: a warp per (token, head).
template <typename T>
__global__ void __launch_bounds__(kThreads) merge_attention_kernel(const __grid_constant__ MergeParams p) {
  device::wait_for_predecessor();
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const std::int64_t row = (static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x) / 32;
  if (row >= p.num_tokens * p.num_heads) return;
  const std::int64_t token = row / p.num_heads;
  const std::int64_t head = row - token * p.num_heads;
  const float lse_a = p.lse_a[row], lse_b = p.lse_b[row];
  const float top = fmaxf(lse_a, lse_b);
  const bool has_a = lse_a != -INFINITY, has_b = lse_b != -INFINITY;
  const float weight_a = has_a ? expf(lse_a - top) : 0.0f;
  const float weight_b = has_b ? expf(lse_b - top) : 0.0f;
  const float total = weight_a + weight_b;
  const float inverse = has_a || has_b ? 1.0f / total : 0.0f;
  const T* a = static_cast<const T*>(p.out_a) + token * p.a_token_stride + head * p.a_head_stride;
  const T* b = static_cast<const T*>(p.out_b) + token * p.b_token_stride + head * p.b_head_stride;
  T* out = static_cast<T*>(p.out) + token * p.out_token_stride + head * p.out_head_stride;
  for (std::int64_t column = lane; column < p.head_dim; column += 32) {
    // A part without keys is selected away: what it holds need not be finite.
    const float value_a = has_a ? widen(a[column]) * (weight_a * inverse) : 0.0f;
    const float value_b = has_b ? widen(b[column]) * (weight_b * inverse) : 0.0f;
    out[column] = static_cast<T>(value_a + value_b);
  }
  // out_lse may be lse_a or lse_b, which every lane has read before it comes here.
  __syncwarp();
  if (lane == 0 && p.out_lse != nullptr) p.out_lse[row] = has_a || has_b ? top + logf(total) : -INFINITY;
}

struct PrefixMergeParams {
  void* out;                            // [num_tokens, num_heads, head_dim]: the own keys' result, and the merged one
  float* lse;                           // [num_tokens, num_heads] or null: the merged one
  const float* own_lse;                 // [num_tokens, num_heads]
  const void* prefix_out;               // [num_ranges, num_tokens, num_heads, head_dim]
  const float* prefix_lse;              // [num_ranges, num_tokens, num_heads]
  const std::int32_t* query_start_loc;  // [num_seqs + 1] or null: rows outside are not touched
  std::int64_t num_tokens, num_seqs, num_heads, head_dim, out_token_stride, out_head_stride;
  int num_ranges;
  bool aligned;  // rows of out: four elements at once
};

/// Grid: a warp per (token, head). As merge_attention_kernel, for the own keys and num_ranges parts of the prefix.
template <typename T>
__global__ void __launch_bounds__(kThreads) merge_prefix_kernel(const __grid_constant__ PrefixMergeParams p) {
  struct alignas(4 * sizeof(T)) Four {
    T values[4];
  };
  device::wait_for_predecessor();
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const std::int64_t row = (static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x) / 32;
  const std::int64_t num_rows = p.num_tokens * p.num_heads;
  if (row >= num_rows) return;
  const std::int64_t token = row / p.num_heads;
  if (p.query_start_loc != nullptr) {
    const int limit = static_cast<int>(p.num_tokens);
    if (token < p.query_start_loc[0] || token >= monotonic_entry(p.query_start_loc, p.num_seqs, limit)) return;
  }
  // Lane s has range s, the last one the own keys.
  static_assert(kMaxPrefixRanges < 32);
  float lse = -INFINITY;
  if (lane < p.num_ranges) lse = p.prefix_lse[lane * num_rows + row];
  if (lane == 31) lse = p.own_lse[row];
  float top = lse;
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, offset));
  const bool has_keys = lse != -INFINITY;  // NaN has
  float weight = has_keys ? expf(lse - top) : 0.0f;
  float total = weight;
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) total += __shfl_xor_sync(kAllLanes, total, offset);
  const unsigned with_keys = __ballot_sync(kAllLanes, has_keys);
  weight = has_keys ? weight / total : 0.0f;

  T* const out = static_cast<T*>(p.out) + token * p.out_token_stride + (row - token * p.num_heads) * p.out_head_stride;
  for (std::int64_t first = 0; first < p.head_dim; first += 128) {
    const std::int64_t column = first + lane * 4;
    const bool exists = column < p.head_dim;
    float sum[4] = {};
    // A part without keys is selected away: what it holds need not be finite.
    const auto add = [&](const Four& part, float factor) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[i] = fmaf(widen(part.values[i]), factor, sum[i]);
    };
#pragma unroll 4
    for (int s = 0; s < p.num_ranges; ++s) {
      const float factor = __shfl_sync(kAllLanes, weight, s);
      if (exists && (with_keys >> s & 1u) != 0)
        add(*reinterpret_cast<const Four*>(static_cast<const T*>(p.prefix_out) + (s * num_rows + row) * p.head_dim + column), factor);
    }
    const float factor = __shfl_sync(kAllLanes, weight, 31);
    if (!exists) continue;
    Four own;
    if (p.aligned) {
      own = *reinterpret_cast<const Four*>(out + column);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) own.values[i] = out[column + i];
    }
    if (with_keys >> 31 != 0) add(own, factor);
#pragma unroll
    for (int i = 0; i < 4; ++i) own.values[i] = static_cast<T>(sum[i]);
    if (p.aligned) {
      *reinterpret_cast<Four*>(out + column) = own;
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) out[column + i] = own.values[i];
    }
  }
  if (lane == 0 && p.lse != nullptr) p.lse[row] = with_keys != 0 ? top + logf(total) : -INFINITY;
}

/// Where the parts of a shared-prefix call lie in its workspace.
struct PrefixWorkspace {
  std::int64_t out, prefix_lse, own_lse, num_bytes;  // in bytes; the two passes' own workspace is at 0

  static PrefixWorkspace make(std::int64_t num_tokens, std::int64_t num_heads, std::int64_t head_dim, int num_sms) {
    const auto align = [](std::int64_t bytes) { return ceil_div(bytes, 256) * 256; };
    const std::int64_t rows = prefix_rows(num_tokens, num_heads, num_sms);
    PrefixWorkspace space{};
    // The passes of the ranges have no partial results; the undivided one has no more rows than the batch.
    space.out = align(std::max<std::int64_t>(workspace_bytes(num_tokens, num_heads, head_dim, num_sms), 16));
    space.prefix_lse = space.out + align(rows * head_dim * std::int64_t{sizeof(float)});
    space.own_lse = space.prefix_lse + align(rows * std::int64_t{sizeof(float)});
    space.num_bytes = space.own_lse + align(num_tokens * num_heads * std::int64_t{sizeof(float)});
    return space;
  }
};

}  // namespace
}  // namespace attn

void shared_prefix_attention(const SharedPrefixParams& params, Stream stream) {
  const DeviceProperties& device = current_device_properties();
  AttentionParams own = params.own;
  const attn::PrefixWorkspace space = attn::PrefixWorkspace::make(own.num_tokens, own.num_heads, own.head_dim, device.num_sms);
  char* const memory = static_cast<char*>(own.workspace);
  float* const own_lse = reinterpret_cast<float*>(memory + space.own_lse);

  AttentionParams prefix = prefix_pass(params, memory + space.out, reinterpret_cast<float*>(memory + space.prefix_lse));
  int num_ranges = attn::choose_prefix_ranges(prefix, device, has_hopper_code());
  if (num_ranges > 0) {
    prefix.variant = AttentionVariant::kWgmma;
    prefix.max_blocks_per_seq = prefix.block_tables_stride = ceil_div(params.num_prefix_blocks, num_ranges);
    num_ranges = static_cast<int>(ceil_div(params.num_prefix_blocks, prefix.max_blocks_per_seq));
    prefix.num_seqs = num_ranges;
    prefix.num_tokens = num_ranges * prefix.shared_queries;
  }
  num_ranges = std::max(num_ranges, 1);
  own.lse = own_lse;
  if (Explanation* const explanation = explaining()) {
    attention(prefix, stream);
    Explanation of_prefix = *explanation;
    explanation->reasons.clear();
    if (prefix.variant) of_prefix.reasons.front() = "all queries are rows of one set of tiles";
    attention(own, stream);
    explanation->variant = of_prefix.variant + "+" + explanation->variant;
    for (std::string& reason : explanation->reasons) reason = "own keys: " + reason;
    for (std::string& reason : of_prefix.reasons) reason = "prefix: " + reason;
    of_prefix.reasons.push_back("prefix: " + std::to_string(num_ranges) + " ranges of keys");
    explanation->reasons.insert(explanation->reasons.begin(), of_prefix.reasons.begin(), of_prefix.reasons.end());
    return;
  }
  attention(prefix, stream);
  attention(own, stream);

  const std::int64_t item = itemsize(own.dtype);
  const auto divides = [&](std::int64_t value) { return value % (4 * item) == 0; };
  const attn::PrefixMergeParams merge{own.out,
                                      params.own.lse,
                                      own_lse,
                                      prefix.out,
                                      prefix.lse,
                                      own.query_start_loc,
                                      own.num_tokens,
                                      own.num_seqs,
                                      own.num_heads,
                                      own.head_dim,
                                      own.out_token_stride,
                                      own.out_head_stride,
                                      num_ranges,
                                      divides(static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(own.out))) &&
                                          divides(own.out_token_stride * item) && divides(own.out_head_stride * item)};
  const auto num_ctas = static_cast<unsigned>(ceil_div(own.num_tokens * own.num_heads, attn::kWarps));
  const auto launch = [&](auto kernel) { launch_waiting("merge_prefix_kernel", kernel, num_ctas, attn::kThreads, stream, merge); };
  switch (own.dtype) {
    case DType::kFloat32: return launch(attn::merge_prefix_kernel<float>);
    case DType::kFloat16: return launch(attn::merge_prefix_kernel<__half>);
    case DType::kBFloat16: return launch(attn::merge_prefix_kernel<__nv_bfloat16>);
    default: throw_unsupported_dtype("shared_prefix_attention", own.dtype, "float32, float16 or bfloat16");
  }
}

std::int64_t shared_prefix_attention_workspace_size(std::int64_t num_tokens, std::int64_t num_heads, std::int64_t head_dim,
                                                    int device_index) {
  return attn::PrefixWorkspace::make(num_tokens, num_heads, head_dim, device_properties(device_index).num_sms).num_bytes;
}

void attention(const AttentionParams& params, Stream stream) {
  const DeviceProperties& device = current_device_properties();
  const bool has_wgmma = has_hopper_code();
  if (Explanation* const explanation = explaining()) {
    const attn::Launches launches = attn::choose_launches(params, device, has_wgmma, &explanation->reasons);
    explanation->variant.clear();
    for (int i = 0; i < launches.count; ++i) {
      explanation->variant += std::string(i > 0 ? "+" : "") + name(launches.configs[i].variant);
      explanation->reasons.push_back(attn::tiles_text(launches.configs[i], params.num_kv_heads));
    }
    return;
  }
  const attn::Launches launches = attn::choose_launches(params, device, has_wgmma);
  // The prefills first, which take longer: the host prepares the second launch meanwhile.
  for (int i = launches.count; i-- > 0;) attn::launch(params, launches.configs[i], stream);
}

void merge_attention(const MergeParams& params, Stream stream) {
  const std::int64_t num_ctas = ceil_div(params.num_tokens * params.num_heads, attn::kWarps);
  if (num_ctas > std::numeric_limits<std::int32_t>::max())
    throw UnsupportedError("[merge_attention] num_tokens * num_heads: expected less than 2^33 rows in one call");
  const auto launch = [&](auto kernel) {
    launch_waiting("merge_attention_kernel", kernel, static_cast<unsigned>(num_ctas), attn::kThreads, stream, params);
  };
  switch (params.dtype) {
    case DType::kFloat32: return launch(attn::merge_attention_kernel<float>);
    case DType::kFloat16: return launch(attn::merge_attention_kernel<__half>);
    case DType::kBFloat16: return launch(attn::merge_attention_kernel<__nv_bfloat16>);
    default: throw_unsupported_dtype("merge_attention", params.dtype, "float32, float16 or bfloat16");
  }
}

std::int64_t attention_workspace_size(std::int64_t num_tokens, std::int64_t num_seqs, std::int64_t num_heads, std::int64_t head_dim,
                                      int device_index) {
  static_cast<void>(num_seqs);
  return attn::workspace_bytes(num_tokens, num_heads, head_dim, device_properties(device_index).num_sms);
}

}  // namespace quire::cuda
