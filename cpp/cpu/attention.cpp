// CPU attention over paged and ragged keys and values, and the merge of partial results.
// SPDX-License-Identifier: Apache-2.0
#include "ops/attention.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <new>
#include <vector>

#include "core/dispatch.h"
#include "core/error_word.h"
#include "core/explain.h"
#include "core/layout.h"
#include "core/numeric.h"
#include "cpu/isa/tables.h"
#include "cpu/thread_pool.h"

namespace quire::cpu {

#if defined(__x86_64__)
namespace avx512_amx {
extern const AttentionBf16Kernels attention_bf16_kernels;
}
#endif

namespace {

// The one family with kernels of its own for AMX.
const AttentionBf16Kernels& active_bf16_kernels() {
#if defined(__x86_64__)
  if (isa() == Isa::kAvx512Amx) return avx512_amx::attention_bf16_kernels;
#endif
  return attention_bf16_kernels.active();
}

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// A task of at most this many rows is split no further for the sake of parallelism, except along its keys.
constexpr std::int64_t kMinTaskRows = 32;
constexpr std::int64_t kMaxTaskRows = 256;
// More heads per kv head than this pay for the packing of keys even with one query.
constexpr std::int64_t kMaxDecodeGroup = 16;
constexpr std::int64_t kMinKeysPerSplit = 256;
constexpr std::int64_t kTasksPerThread = 4;
// Batch-invariant tasks have one query each and are cut at every so many of its keys, whatever the batch and the number of threads.
constexpr std::int64_t kInvariantSplitKeys = 2048;
// In units of cost(): below it, waking the other threads costs more than they save.
constexpr std::int64_t kMinParallelCost = 4096;

std::int64_t clamp_index(std::int64_t value, std::int64_t low, std::int64_t high, OpId op, ArgId arg, std::int64_t index) {
  const std::int64_t clamped = std::clamp(value, low, high);
  if (clamped != value) record_cpu_error(op, arg, index, value);
  return clamped;
}

std::vector<AttentionSequence> resolve_sequences(const AttentionParams& p) {
  const bool paged = p.block_tables != nullptr;
  const OpId op = p.op;
  std::vector<AttentionSequence> sequences(static_cast<std::size_t>(p.num_seqs));
  std::int64_t query = 0, kv = 0;
  if (p.query_start_loc) query = clamp_index(p.query_start_loc[0], 0, p.num_tokens, op, ArgId::kQueryStartLoc, 0);
  if (p.kv_start_loc) kv = clamp_index(p.kv_start_loc[0], 0, p.num_kv_tokens, op, ArgId::kKvStartLoc, 0);
  for (std::int64_t s = 0; s < p.num_seqs; ++s) {
    AttentionSequence& sequence = sequences[static_cast<std::size_t>(s)];
    std::int64_t query_end = paged && p.shared_queries == 0 ? std::min(s + 1, p.num_tokens) : p.num_tokens;
    if (p.query_start_loc) query_end = clamp_index(p.query_start_loc[s + 1], query, p.num_tokens, op, ArgId::kQueryStartLoc, s + 1);
    sequence.query_begin = query;
    sequence.num_queries = query_end - query;
    query = query_end;
    if (p.shared_queries > 0) {
      sequence.kv_begin = 0;
      sequence.kv_len = p.total_keys;
    } else if (paged) {
      sequence.kv_begin = 0;
      sequence.kv_len = clamp_index(p.seq_lens[s], 0, p.max_blocks_per_seq * p.block_size, op, ArgId::kSeqLens, s);
    } else {
      std::int64_t kv_end = p.num_kv_tokens;
      if (p.kv_start_loc) kv_end = clamp_index(p.kv_start_loc[s + 1], kv, p.num_kv_tokens, op, ArgId::kKvStartLoc, s + 1);
      sequence.kv_begin = kv;
      sequence.kv_len = kv_end - kv;
      kv = kv_end;
    }
  }
  return sequences;
}

struct Work {
  AttentionTask task;
  const AttentionKernel* kernel;
};

// The tasks of a task that is split along its keys, and where their states lie.
struct Split {
  std::size_t first_work, num_works;
  std::size_t partial_offset;  // in floats
};

struct Plan {
  std::vector<Work> works;
  std::vector<Split> splits;
  std::size_t partial_size = 0;  // of all states, in floats
  std::int64_t total_cost = 0;
  std::int64_t scratch_bytes = 0;  // of one thread
};

// Time is spent on reading keys and on rows times keys.
std::int64_t cost(const AttentionTask& task) {
  return (task.key_end - task.key_begin) * (rows_of(task) + 8 * (task.kv_head_end - task.kv_head_begin)) + 64;
}

// The plan depends on the batch and on the number of threads, or on neither, but never on timing: no more does any sum's order.
Plan make_plan(const AttentionParams& p, const std::vector<AttentionSequence>& sequences, std::int64_t threads) {
  const std::int64_t group = p.num_heads / p.num_kv_heads;
  const auto kv_dtype = static_cast<std::size_t>(p.kv_dtype);
  const AttentionKernel* decode = &attention_kernels.active().decode[kv_dtype];
  const AttentionKernel* prefill =
      p.dtype == DType::kBFloat16 ? &active_bf16_kernels().prefill[kv_dtype] : &attention_kernels.active().prefill[kv_dtype];

  std::int64_t num_rows = 0;
  for (const AttentionSequence& sequence : sequences) num_rows += sequence.num_queries * p.num_heads;
  std::int64_t task_rows = kMaxTaskRows;
  while (task_rows > kMinTaskRows && num_rows < task_rows * threads * kTasksPerThread) task_rows /= 2;
  const std::int64_t task_queries = p.batch_invariant ? 1 : std::max<std::int64_t>(1, task_rows / group);

  // A key's kv heads are near each other in memory: decode takes them together unless the threads need more tasks.
  std::int64_t decode_heads = p.num_kv_heads;
  while (decode_heads > 1 && num_rows < decode_heads * group * threads * kTasksPerThread) decode_heads = ceil_div(decode_heads, 2);

  Plan plan;
  for (std::int64_t s = 0; s < p.num_seqs; ++s) {
    const AttentionSequence& sequence = sequences[static_cast<std::size_t>(s)];
    // The last queries see most keys: they go first, so that the threads end together.
    for (std::int64_t query_end = sequence.num_queries; query_end > 0; query_end -= std::min(query_end, task_queries)) {
      const std::int64_t query_begin = std::max<std::int64_t>(0, query_end - task_queries);
      const bool is_decode = query_end - query_begin == 1 && group <= kMaxDecodeGroup;
      const std::int64_t task_heads = is_decode ? decode_heads : 1;
      const std::int64_t key_begin = visible_keys(p, sequence, query_begin).begin;
      const std::int64_t key_end = std::max(key_begin, visible_keys(p, sequence, query_end - 1).end);
      for (std::int64_t head = 0; head < p.num_kv_heads; head += task_heads) {
        const std::int64_t head_end = std::min(head + task_heads, p.num_kv_heads);
        plan.works.push_back(
            {{&p, sequence, s, head, head_end, query_begin, query_end, key_begin, key_end, nullptr}, is_decode ? decode : prefill});
        plan.total_cost += cost(plan.works.back().task);
      }
    }
  }

  // A task that would keep one thread busy while the others have run out is split along its keys.
  if (p.batch_invariant || (threads > 1 && plan.total_cost >= kMinParallelCost)) {
    const std::int64_t max_cost = plan.total_cost / (threads * kTasksPerThread / 2) + 1;
    std::vector<Work> works;
    for (const Work& work : plan.works) {
      const std::int64_t num_keys = work.task.key_end - work.task.key_begin;
      const std::int64_t num_parts = p.batch_invariant ? ceil_div(num_keys, kInvariantSplitKeys)
                                                       : std::min(ceil_div(cost(work.task), max_cost), num_keys / kMinKeysPerSplit);
      if (num_parts < 2) {
        works.push_back(work);
        continue;
      }
      const std::int64_t part_keys = p.batch_invariant ? kInvariantSplitKeys : ceil_div(ceil_div(num_keys, num_parts), 64) * 64;
      Split split = {works.size(), 0, plan.partial_size};
      for (std::int64_t key = work.task.key_begin; key < work.task.key_end; key += part_keys) {
        works.push_back(work);
        works.back().task.key_begin = key;
        works.back().task.key_end = std::min(key + part_keys, work.task.key_end);
        ++split.num_works;
      }
      plan.partial_size += split.num_works * static_cast<std::size_t>(rows_of(work.task) * (p.head_dim + 2));
      plan.splits.push_back(split);
    }
    plan.works = std::move(works);
  }
  for (const Work& work : plan.works)
    plan.scratch_bytes = std::max(plan.scratch_bytes, work.kernel->scratch_bytes(rows_of(work.task), p.head_dim));
  return plan;
}

void explain_plan(const AttentionParams& p, const Plan& plan, std::int64_t threads, Explanation& explanation) {
  const AttentionKernel* decode = &attention_kernels.active().decode[static_cast<std::size_t>(p.kv_dtype)];
  const auto num_decode = std::count_if(plan.works.begin(), plan.works.end(), [&](const Work& work) { return work.kernel == decode; });
  const auto num_works = static_cast<std::int64_t>(plan.works.size());
  if (num_works == 0) return;
  const bool amx = num_decode < num_works && &active_bf16_kernels() != &attention_bf16_kernels.active() && p.dtype == DType::kBFloat16;
  explain_cpu(explanation, num_decode == num_works ? "decode" : num_decode == 0 ? "prefill" : "decode_and_prefill", amx);
  explanation.reasons.push_back(std::to_string(num_decode) + " of " + std::to_string(num_works) + " tasks have one query and at most " +
                                std::to_string(kMaxDecodeGroup) + " heads for each kv head: decode");
  explanation.reasons.push_back(std::to_string(plan.splits.size()) + " ranges of keys are split" +
                                (p.batch_invariant ? ", every " + std::to_string(kInvariantSplitKeys) + " keys (batch_invariant)"
                                                   : ", for " + std::to_string(threads) + " threads"));
}

// Memory that a calling thread keeps from call to call, cache-line aligned.
std::byte* reserve_scratch(std::size_t num_bytes) {
  struct Free {
    void operator()(std::byte* memory) const { ::operator delete(memory, std::align_val_t{64}); }
  };
  thread_local std::unique_ptr<std::byte, Free> memory;
  thread_local std::size_t size = 0;
  if (size < num_bytes) {
    memory.reset();
    size = 0;
    memory.reset(static_cast<std::byte*>(::operator new(num_bytes, std::align_val_t{64})));
    size = num_bytes;
  }
  return memory.get();
}

alignas(64) constexpr std::byte kZeroRow[256 * sizeof(float)] = {};

// The bits [first, end) of the mask that belong to the keys [key, key + num_keys); empty if end <= first.
struct MaskBits {
  std::int64_t first, end;
  std::int64_t first_key;  // that bit 0 stands for
};

MaskBits mask_bits(const AttentionTask& task, std::int64_t key, int num_keys) {
  const AttentionParams& p = *task.params;
  const std::int64_t first_key = p.mask_start ? p.mask_start[task.seq_idx] : task.sequence.kv_len - task.sequence.num_queries;
  return {std::max<std::int64_t>(key - first_key, 0), std::min(key + num_keys - first_key, p.mask_bytes * 8), first_key};
}

}  // namespace

bool mask_reaches(const AttentionTask& task, std::int64_t key, int num_keys) {
  if (task.params->mask == nullptr) return false;
  const MaskBits bits = mask_bits(task, key, num_keys);
  return bits.first < bits.end;
}

void hide_masked(const AttentionTask& task, std::int64_t query_idx, std::int64_t key, int num_keys, std::uint32_t* hidden) {
  const AttentionParams& p = *task.params;
  const std::uint8_t* row = p.mask + (task.sequence.query_begin + query_idx) * p.mask_stride;
  const MaskBits bits = mask_bits(task, key, num_keys);
  for (std::int64_t bit = bits.first; bit < bits.end; ++bit) {
    const std::int64_t column = bits.first_key + bit - key;
    const std::uint32_t seen = row[bit / 8] >> (bit % 8) & 1u;
    hidden[column / 32] |= (seen ^ 1u) << (column % 32);
  }
}

void locate_keys(const AttentionTask& task, std::int64_t key, int num_keys, int num_padded_keys, AttentionKeyTile& tile) {
  const AttentionParams& p = *task.params;
  const std::int64_t item = itemsize(p.kv_dtype);
  const std::byte* k = static_cast<const std::byte*>(p.k) + task.kv_head_begin * p.k_head_stride * item;
  const std::byte* v = static_cast<const std::byte*>(p.v) + task.kv_head_begin * p.v_head_stride * item;
  const std::int64_t k_step = p.k_token_stride * item, v_step = p.v_token_stride * item;
  tile.any_hidden = false;
  int i = 0;
  const auto add_run = [&](std::int64_t k_offset, std::int64_t v_offset, int end) {
    for (; i < end; ++i, k_offset += k_step, v_offset += v_step) {
      tile.k[i] = k + k_offset;
      tile.v[i] = v + v_offset;
    }
  };
  const auto add_zeros = [&](int end) {
    for (; i < end; ++i) tile.k[i] = tile.v[i] = kZeroRow;
  };
  if (p.block_tables == nullptr) {
    const std::int64_t row = task.sequence.kv_begin + key;
    add_run(row * k_step, row * v_step, num_keys);
  } else {
    const std::int32_t* table = p.block_tables + task.seq_idx * p.block_tables_stride;
    std::int64_t entry = key / p.block_size, offset = key % p.block_size;
    while (i < num_keys) {
      const int end = static_cast<int>(std::min<std::int64_t>(num_keys, i + p.block_size - offset));
      const std::int64_t block = table[entry];
      if (block >= 0 && block < p.num_blocks) {
        add_run(block * p.k_block_stride * item + offset * k_step, block * p.v_block_stride * item + offset * v_step, end);
      } else {
        if (block != -1)
          record_cpu_error(p.op, p.shared_queries > 0 ? ArgId::kPrefixBlocks : ArgId::kBlockTables,
                           task.seq_idx * p.max_blocks_per_seq + entry, block);
        if (!tile.any_hidden) std::fill(std::begin(tile.hidden), std::end(tile.hidden), 0u);
        tile.any_hidden = true;
        for (int j = i; j < end; ++j) tile.hidden[j / 32] |= 1u << (j % 32);
        add_zeros(end);
      }
      ++entry;
      offset = 0;
    }
  }
  add_zeros(num_padded_keys);
  if (task.query_end - task.query_begin == 1 && mask_reaches(task, key, num_keys)) {
    if (!tile.any_hidden) std::fill(std::begin(tile.hidden), std::end(tile.hidden), 0u);
    tile.any_hidden = true;
    hide_masked(task, task.query_begin, key, num_keys, tile.hidden);
    for (int j = 0; j < num_keys; ++j)
      if (tile.hidden[j / 32] >> (j % 32) & 1u) tile.k[j] = tile.v[j] = kZeroRow;
  }
}

namespace {

// The params of a call with float8 queries, which are widened into `memory`. Either 16-bit dtype holds them exactly.
AttentionParams widen_queries(AttentionParams params, std::vector<std::uint16_t>& memory) {
  const DefaultFloatMode mode;
  std::uint16_t wide[256];
  for (int i = 0; i < 256; ++i) {
    const float value = to_float(Float8E4M3FN{static_cast<std::uint8_t>(i)});
    wide[i] = params.dtype == DType::kBFloat16 ? from_float<BFloat16>(value).bits : from_float<Half>(value).bits;
  }
  const auto* q = static_cast<const std::uint8_t*>(params.q);
  memory.resize(static_cast<std::size_t>(params.num_tokens * params.num_heads * params.head_dim));
  parallel_for(params.num_tokens * params.num_heads, 64, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) {
      const std::uint8_t* from = q + row / params.num_heads * params.q_token_stride + row % params.num_heads * params.q_head_stride;
      for (std::int64_t i = 0; i < params.head_dim; ++i) memory[static_cast<std::size_t>(row * params.head_dim + i)] = wide[from[i]];
    }
  });
  params.q = memory.data();
  params.q_head_stride = params.head_dim;
  params.q_token_stride = params.num_heads * params.head_dim;
  params.float8_queries = false;
  return params;
}

}  // namespace

void attention(const AttentionParams& params) {
  if (params.float8_queries && explaining() == nullptr) {
    std::vector<std::uint16_t> memory;
    return attention(widen_queries(params, memory));
  }
  const std::vector<AttentionSequence> sequences = resolve_sequences(params);
  const std::int64_t threads = num_threads();
  Plan plan = make_plan(params, sequences, threads);
  if (Explanation* const explanation = explaining()) return explain_plan(params, plan, threads, *explanation);
  if (plan.works.empty()) return;

  const std::int64_t num_works = static_cast<std::int64_t>(plan.works.size());
  const std::int64_t num_workers = plan.total_cost < kMinParallelCost ? 1 : std::min(threads, num_works);
  const std::int64_t partial_bytes = ceil_div(static_cast<std::int64_t>(plan.partial_size * sizeof(float)), 64) * 64;
  std::byte* memory = reserve_scratch(static_cast<std::size_t>(partial_bytes + num_workers * plan.scratch_bytes));
  float* partials = reinterpret_cast<float*>(memory);
  for (const Split& split : plan.splits) {
    float* partial = partials + split.partial_offset;
    for (std::size_t i = split.first_work; i < split.first_work + split.num_works; ++i) {
      plan.works[i].task.partial = partial;
      partial += rows_of(plan.works[i].task) * (params.head_dim + 2);
    }
  }

  // Tasks are taken one by one, as their costs differ; each writes only what is its own.
  std::atomic<std::int64_t> next{0};
  parallel_for(num_workers, 1, [&](std::int64_t worker, std::int64_t) {
    std::byte* scratch = memory + partial_bytes + worker * plan.scratch_bytes;
    for (std::int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < num_works;) {
      const Work& work = plan.works[static_cast<std::size_t>(i)];
      work.kernel->run(work.task, scratch);
    }
  });

  parallel_for(static_cast<std::int64_t>(plan.splits.size()), 4, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const Split& split = plan.splits[static_cast<std::size_t>(i)];
      AttentionTask task = plan.works[split.first_work].task;
      task.partial = nullptr;
      attention_kernels.active().merge(task, partials + split.partial_offset, static_cast<std::int64_t>(split.num_works));
    }
  });
}

void shared_prefix_attention(const SharedPrefixParams& params) {
  AttentionParams own = params.own;
  const std::int64_t num_rows = own.num_tokens * own.num_heads;
  std::vector<float> lse(static_cast<std::size_t>(2 * num_rows));
  std::vector<std::byte> out(static_cast<std::size_t>(num_rows * own.head_dim * itemsize(own.dtype)));
  const AttentionParams prefix = prefix_pass(params, out.data(), lse.data());
  own.lse = lse.data() + num_rows;
  attention(prefix);
  if (Explanation* const explanation = explaining()) {
    const std::string of_prefix = explanation->variant;
    explanation->reasons.clear();
    attention(own);
    explanation->variant = of_prefix + "+" + explanation->variant;
    return;
  }
  attention(own);

  // Rows of no sequence keep what they hold.
  std::int64_t begin = 0, end = own.num_tokens;
  if (own.query_start_loc != nullptr) {
    const auto clamped = [&](std::int64_t i) { return std::clamp<std::int64_t>(own.query_start_loc[i], 0, own.num_tokens); };
    begin = end = clamped(0);
    for (std::int64_t s = 1; s <= own.num_seqs; ++s) end = std::max(end, clamped(s));
  }
  if (begin == end) return;
  const auto row = [&](void* data, std::int64_t token_stride) {
    return static_cast<std::byte*>(data) + begin * token_stride * itemsize(own.dtype);
  };
  MergeParams merge;
  merge.out = row(own.out, own.out_token_stride);
  merge.out_lse = params.own.lse == nullptr ? nullptr : params.own.lse + begin * own.num_heads;
  merge.out_a = row(prefix.out, prefix.out_token_stride);
  merge.lse_a = prefix.lse + begin * own.num_heads;
  merge.out_b = merge.out;
  merge.lse_b = own.lse + begin * own.num_heads;
  merge.dtype = own.dtype;
  merge.num_tokens = end - begin;
  merge.num_heads = own.num_heads;
  merge.head_dim = own.head_dim;
  merge.out_token_stride = merge.b_token_stride = own.out_token_stride;
  merge.out_head_stride = merge.b_head_stride = own.out_head_stride;
  merge.a_token_stride = prefix.out_token_stride;
  merge.a_head_stride = prefix.out_head_stride;
  merge_attention(merge);
}

void merge_attention(const MergeParams& params) {
  dispatch_float(params.dtype, "merge_attention", [&](auto dtype) {
    using T = HostType<decltype(dtype)::value>;
    const MergeParams& p = params;
    const std::int64_t grain = std::max<std::int64_t>(1, 4096 / p.head_dim);
    parallel_for(p.num_tokens * p.num_heads, grain, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t row = begin; row < end; ++row) {
        const std::int64_t token = row / p.num_heads, head = row % p.num_heads;
        const float lse_a = p.lse_a[row], lse_b = p.lse_b[row];
        const bool has_a = lse_a != -kInfinity, has_b = lse_b != -kInfinity;  // NaN has keys
        float lse = -kInfinity, weight_a = 0.0f, weight_b = 0.0f;
        if (has_a || has_b) {
          const float max = std::fmax(lse_a, lse_b);
          weight_a = has_a ? std::exp(lse_a - max) : 0.0f;
          weight_b = has_b ? std::exp(lse_b - max) : 0.0f;
          const float sum = weight_a + weight_b;
          lse = max + std::log(sum);
          weight_a /= sum;
          weight_b /= sum;
        }
        const T* a = static_cast<const T*>(p.out_a) + token * p.a_token_stride + head * p.a_head_stride;
        const T* b = static_cast<const T*>(p.out_b) + token * p.b_token_stride + head * p.b_head_stride;
        T* out = static_cast<T*>(p.out) + token * p.out_token_stride + head * p.out_head_stride;
        // A side without keys is selected away: whatever its output holds must not matter.
        for (std::int64_t i = 0; i < p.head_dim; ++i) {
          const float from_a = has_a ? weight_a * to_float(a[i]) : 0.0f;
          const float from_b = has_b ? weight_b * to_float(b[i]) : 0.0f;
          out[i] = from_float<T>(from_a + from_b);
        }
        if (p.out_lse) p.out_lse[row] = lse;
      }
    });
  });
}

}  // namespace quire::cpu
