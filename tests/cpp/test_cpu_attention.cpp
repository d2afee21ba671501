// CPU attention at every instruction set of this machine against a double-precision reference: every option, odd sizes, hostile
// indices, poisoned memory, empty rows, split keys.
// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "core/dispatch.h"
#include "core/layout.h"
#include "core/numeric.h"
#include "cpu/isa/dispatch.h"
#include "cpu/thread_pool.h"
#include "ops/attention.h"
#include "quire/error.h"
#include "quire/runtime.h"

namespace quire::cpu {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr std::int32_t kMinInt = std::numeric_limits<std::int32_t>::min(), kMaxInt = std::numeric_limits<std::int32_t>::max();
constexpr DType kFloats[] = {DType::kFloat32, DType::kFloat16, DType::kBFloat16};
constexpr DType kQuantized[] = {DType::kFloat8E4M3FN, DType::kFloat8E5M2, DType::kInt8};
constexpr std::int64_t kHeadDims[] = {8, 40, 64, 72, 96, 128, 256};
constexpr std::int64_t kBlockSizes[] = {1, 3, 16, 64};

std::vector<Isa> levels() {
  std::vector<Isa> result;
  for (Isa level : {Isa::kScalar, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Amx})
    if (level <= max_isa()) result.push_back(level);
  return result;
}

/// A dense array of any dtype.
class Elements {
 public:
  Elements() = default;
  Elements(DType dtype, std::int64_t count) : dtype_(dtype), bytes_(static_cast<std::size_t>(count * itemsize(dtype))) {}

  void* data() { return bytes_.data(); }
  const std::vector<char>& bytes() const { return bytes_; }
  float get(std::int64_t i) const {
    return dispatch_kv(dtype_, "test",
                       [&](auto constant) { return to_float(reinterpret_cast<const HostType<constant()>*>(bytes_.data())[i]); });
  }
  void set(std::int64_t i, float value) {
    dispatch_kv(dtype_, "test", [&](auto constant) {
      using T = HostType<constant()>;
      reinterpret_cast<T*>(bytes_.data())[i] = from_float<T>(value);
    });
  }
  /// NaN in the float dtypes, -1 in int8.
  void poison() { std::memset(bytes_.data(), 0xff, bytes_.size()); }

 private:
  DType dtype_ = DType::kFloat32;
  std::vector<char> bytes_;
};

struct Spec {
  DType dtype = DType::kFloat32, kv_dtype = DType::kFloat32;
  std::int64_t num_kv_heads = 2, group = 2, head_dim = 64;
  std::int64_t block_size = 16;  // 0: not paged
  std::vector<std::int64_t> q_lens, kv_lens;
  bool decode = false;  // no query_start_loc
  bool heads_outside_slots = false;
  bool causal = true;
  std::int64_t window_left = -1, window_right = -1;
  float softcap = 0.0f;
  bool alibi = false, sinks = false;
  int num_scales = 0;  // 0, 1 or num_kv_heads
};

/// A batch with its memory: shuffled blocks, and poison in every slot, row and table entry that is not in use.
struct Batch {
  Spec spec;
  AttentionParams p;
  Elements q, k, v, out;
  std::vector<float> lse, slopes, sinks, k_scale, v_scale;
  std::vector<std::int32_t> tables, seq_lens, query_start_loc, kv_start_loc;

  Batch(const Spec& s, std::mt19937& rng) : spec(s) {
    const std::int64_t num_seqs = static_cast<std::int64_t>(s.q_lens.size()), num_heads = s.num_kv_heads * s.group;
    std::normal_distribution<float> normal;
    std::uniform_real_distribution<float> uniform(0.5f, 1.5f);
    query_start_loc.assign(1, 0), kv_start_loc.assign(1, 0);
    for (std::int64_t n : s.q_lens) query_start_loc.push_back(query_start_loc.back() + static_cast<std::int32_t>(n));
    for (std::int64_t n : s.kv_lens) kv_start_loc.push_back(kv_start_loc.back() + static_cast<std::int32_t>(n));
    // A row of q more than the sequences have must stay as it is.
    p.num_tokens = query_start_loc.back() + (s.decode ? 0 : 1);
    p.num_seqs = num_seqs, p.num_heads = num_heads, p.num_kv_heads = s.num_kv_heads, p.head_dim = s.head_dim;
    p.dtype = s.dtype, p.kv_dtype = s.kv_dtype;
    p.causal = s.causal, p.window_left = s.window_left, p.window_right = s.window_right, p.softcap = s.softcap;
    p.scale = 1.0f / std::sqrt(static_cast<float>(s.head_dim));

    q = Elements(s.dtype, p.num_tokens * num_heads * s.head_dim);
    out = Elements(s.dtype, p.num_tokens * num_heads * s.head_dim);
    q.poison(), out.poison();
    for (std::int64_t i = 0; i < query_start_loc.back() * num_heads * s.head_dim; ++i) q.set(i, normal(rng));
    lse.assign(static_cast<std::size_t>(p.num_tokens * num_heads), 1234.0f);
    p.q_head_stride = p.out_head_stride = s.head_dim;
    p.q_token_stride = p.out_token_stride = num_heads * s.head_dim;

    const float spread = s.kv_dtype == DType::kInt8 ? 30.0f : 1.0f;
    const auto draw = [&] { return normal(rng) * spread; };
    if (s.block_size > 0) {
      std::int64_t num_used = 0;
      for (std::int64_t n : s.kv_lens) {
        num_used += ceil_div(n, s.block_size);
        p.max_blocks_per_seq = std::max(p.max_blocks_per_seq, ceil_div(n, s.block_size) + 2);
      }
      p.num_blocks = num_used + 3, p.block_size = s.block_size;
      p.block_tables_stride = p.max_blocks_per_seq + 1;
      std::vector<std::int32_t> order(static_cast<std::size_t>(p.num_blocks));
      std::iota(order.begin(), order.end(), 0);
      std::shuffle(order.begin(), order.end(), rng);
      const std::int32_t hostile[] = {-1, kMinInt, kMaxInt, static_cast<std::int32_t>(p.num_blocks), 0};
      tables.resize(static_cast<std::size_t>(num_seqs * p.block_tables_stride));
      for (std::size_t i = 0; i < tables.size(); ++i) tables[i] = hostile[i % 5];
      p.k_block_stride = s.block_size * s.num_kv_heads * s.head_dim;
      p.k_token_stride = s.heads_outside_slots ? s.head_dim : s.num_kv_heads * s.head_dim;
      p.k_head_stride = s.heads_outside_slots ? s.block_size * s.head_dim : s.head_dim;
      p.v_block_stride = p.k_block_stride, p.v_token_stride = p.k_token_stride, p.v_head_stride = p.k_head_stride;
      k = Elements(s.kv_dtype, p.num_blocks * p.k_block_stride), v = Elements(s.kv_dtype, p.num_blocks * p.v_block_stride);
      k.poison(), v.poison();
      std::size_t at = 0;
      for (std::int64_t seq = 0; seq < num_seqs; ++seq) {
        for (std::int64_t b = 0; b < ceil_div(s.kv_lens[static_cast<std::size_t>(seq)], s.block_size); ++b) table(seq, b) = order[at++];
        seq_lens.push_back(static_cast<std::int32_t>(s.kv_lens[static_cast<std::size_t>(seq)]));
      }
    } else {
      // One row of k and v more than the sequences have.
      p.num_kv_tokens = kv_start_loc.back() + 1;
      p.k_token_stride = p.v_token_stride = s.num_kv_heads * s.head_dim;
      p.k_head_stride = p.v_head_stride = s.head_dim;
      k = Elements(s.kv_dtype, p.num_kv_tokens * p.k_token_stride), v = Elements(s.kv_dtype, p.num_kv_tokens * p.v_token_stride);
      k.poison(), v.poison();
    }
    for (std::int64_t seq = 0; seq < num_seqs; ++seq)
      for (std::int64_t key = 0; key < s.kv_lens[static_cast<std::size_t>(seq)]; ++key)
        for (std::int64_t head = 0; head < s.num_kv_heads; ++head)
          for (std::int64_t d = 0; d < s.head_dim; ++d) {
            k.set(k_index(seq, key, head) + d, draw());
            v.set(v_index(seq, key, head) + d, draw());
          }
    for (std::int64_t h = 0; s.alibi && h < num_heads; ++h) slopes.push_back(std::exp2(-static_cast<float>(h + 1)));
    for (std::int64_t h = 0; s.sinks && h < num_heads; ++h) sinks.push_back(2.0f * normal(rng));
    for (int i = 0; i < s.num_scales; ++i) k_scale.push_back(uniform(rng) / spread), v_scale.push_back(uniform(rng) / spread);
    p.k_scale_stride = p.v_scale_stride = s.num_scales > 1 ? 1 : 0;
  }

  std::int32_t& table(std::int64_t seq, std::int64_t entry) {
    return tables[static_cast<std::size_t>(seq * p.block_tables_stride + entry)];
  }
  std::int64_t block_of(std::int64_t seq, std::int64_t key) const {
    return tables[static_cast<std::size_t>(seq * p.block_tables_stride + key / p.block_size)];
  }
  bool is_hidden(std::int64_t seq, std::int64_t key) const {
    return spec.block_size > 0 && (block_of(seq, key) < 0 || block_of(seq, key) >= p.num_blocks);
  }
  std::int64_t k_index(std::int64_t seq, std::int64_t key, std::int64_t head) const {
    if (spec.block_size == 0) return (kv_start_loc[static_cast<std::size_t>(seq)] + key) * p.k_token_stride + head * p.k_head_stride;
    return block_of(seq, key) * p.k_block_stride + key % p.block_size * p.k_token_stride + head * p.k_head_stride;
  }
  std::int64_t v_index(std::int64_t seq, std::int64_t key, std::int64_t head) const {
    if (spec.block_size == 0) return (kv_start_loc[static_cast<std::size_t>(seq)] + key) * p.v_token_stride + head * p.v_head_stride;
    return block_of(seq, key) * p.v_block_stride + key % p.block_size * p.v_token_stride + head * p.v_head_stride;
  }
  std::int64_t q_index(std::int64_t token, std::int64_t head) const { return token * p.q_token_stride + head * p.q_head_stride; }
  std::int64_t out_index(std::int64_t token, std::int64_t head) const { return token * p.out_token_stride + head * p.out_head_stride; }

  void run() {
    p.out = out.data(), p.lse = lse.data(), p.q = q.data(), p.k = k.data(), p.v = v.data();
    if (spec.block_size > 0) {
      p.block_tables = tables.data(), p.seq_lens = seq_lens.data();
    } else {
      p.kv_start_loc = kv_start_loc.data();
    }
    p.query_start_loc = spec.decode ? nullptr : query_start_loc.data();
    p.alibi_slopes = slopes.empty() ? nullptr : slopes.data();
    p.sinks = sinks.empty() ? nullptr : sinks.data();
    p.k_scale = k_scale.empty() ? nullptr : k_scale.data();
    p.v_scale = v_scale.empty() ? nullptr : v_scale.data();
    attention(p);
  }

  struct Row {
    std::vector<double> out;
    double lse;
  };

  /// What the semantics of quire/attention.h say, in double.
  Row reference(std::int64_t seq, std::int64_t query, std::int64_t head) const {
    const std::int64_t q_len = spec.q_lens[static_cast<std::size_t>(seq)], kv_len = spec.kv_lens[static_cast<std::size_t>(seq)];
    const std::int64_t position = kv_len - q_len + query, kv_head = head / spec.group;
    const std::int64_t token = query_start_loc[static_cast<std::size_t>(seq)] + query;
    const auto scale_of = [&](const std::vector<float>& scales) {
      return scales.empty() ? 1.0 : static_cast<double>(scales[scales.size() > 1 ? static_cast<std::size_t>(kv_head) : 0]);
    };
    std::vector<double> scores;
    std::vector<std::int64_t> keys;
    for (std::int64_t key = 0; key < kv_len; ++key) {
      if (is_hidden(seq, key) || (spec.causal && key > position)) continue;
      if (spec.window_left >= 0 && key < position - spec.window_left) continue;
      if (spec.window_right >= 0 && key > position + spec.window_right) continue;
      double score = 0;
      for (std::int64_t d = 0; d < spec.head_dim; ++d)
        score += static_cast<double>(q.get(q_index(token, head) + d)) * static_cast<double>(k.get(k_index(seq, key, kv_head) + d));
      score *= static_cast<double>(p.scale) * scale_of(k_scale);
      if (spec.softcap > 0) score = static_cast<double>(spec.softcap) * std::tanh(score / static_cast<double>(spec.softcap));
      if (!slopes.empty()) score -= static_cast<double>(slopes[static_cast<std::size_t>(head)]) * static_cast<double>(position - key);
      scores.push_back(score), keys.push_back(key);
    }
    double max = sinks.empty() ? -kInf : static_cast<double>(sinks[static_cast<std::size_t>(head)]);
    for (double score : scores) max = std::max(max, score);
    Row row{std::vector<double>(static_cast<std::size_t>(spec.head_dim)), -kInf};
    if (max == -kInf) return row;
    double sum = sinks.empty() ? 0.0 : std::exp(static_cast<double>(sinks[static_cast<std::size_t>(head)]) - max);
    for (double score : scores) sum += std::exp(score - max);
    row.lse = max + std::log(sum);
    for (std::size_t i = 0; i < keys.size(); ++i)
      for (std::int64_t d = 0; d < spec.head_dim; ++d)
        row.out[static_cast<std::size_t>(d)] +=
            std::exp(scores[i] - row.lse) * scale_of(v_scale) * static_cast<double>(v.get(v_index(seq, keys[i], kv_head) + d));
    return row;
  }

  /// Every row against the reference, and the row of no sequence against what it was.
  void check(const std::string& label) {
    const double arithmetic = spec.dtype == DType::kFloat32 ? 1e-5 : spec.dtype == DType::kFloat16 ? 1.5e-3 : 1.2e-2;
    for (std::size_t seq = 0; seq < spec.q_lens.size(); ++seq)
      for (std::int64_t query = 0; query < spec.q_lens[seq]; ++query)
        for (std::int64_t head = 0; head < p.num_heads; ++head) {
          const Row expected = reference(static_cast<std::int64_t>(seq), query, head);
          const std::int64_t token = query_start_loc[seq] + query;
          const std::string where =
              label + " seq " + std::to_string(seq) + " query " + std::to_string(query) + " head " + std::to_string(head);
          const double got_lse = static_cast<double>(lse[static_cast<std::size_t>(token * p.num_heads + head)]);
          if (expected.lse == -kInf) {
            ASSERT_EQ(got_lse, -kInf) << where;
          } else {
            ASSERT_NEAR(got_lse, expected.lse, 4e-6 * std::max(1.0, std::abs(expected.lse)) + (spec.softcap > 0 ? 1e-5 : 0)) << where;
          }
          double largest = 1.0;
          for (double x : expected.out) largest = std::max(largest, std::abs(x));
          for (std::int64_t d = 0; d < spec.head_dim; ++d)
            ASSERT_NEAR(static_cast<double>(out.get(out_index(token, head) + d)), expected.out[static_cast<std::size_t>(d)],
                        arithmetic * largest)
                << where << " element " << d;
        }
    if (!spec.decode)
      for (std::int64_t head = 0; head < p.num_heads; ++head) {
        ASSERT_EQ(lse[static_cast<std::size_t>((p.num_tokens - 1) * p.num_heads + head)], 1234.0f) << label;
        ASSERT_TRUE(std::isnan(out.get(out_index(p.num_tokens - 1, head)))) << label;
      }
  }
};

void expect_error(const std::string& argument) {
  try {
    check_errors(Device{});
    ADD_FAILURE() << "expected an error about " << argument;
  } catch (const IndexError& error) {
    EXPECT_NE(std::string(error.what()).find(argument), std::string::npos) << error.what();
  }
}

class CpuAttention : public ::testing::TestWithParam<Isa> {
 protected:
  void SetUp() override {
    set_isa(GetParam());
    ASSERT_EQ(isa(), GetParam());
  }
  void TearDown() override {
    set_isa(max_isa());
    set_num_threads(threads_before_);
    // What one test leaves behind must not fail the next.
    try {
      check_errors(Device{});
    } catch (const IndexError& error) {
      if (!errors_expected_) ADD_FAILURE() << error.what();
    }
  }
  void check(const Spec& spec, const std::string& label) {
    Batch batch(spec, rng);
    batch.run();
    batch.check(label);
  }
  std::mt19937 rng{99};
  bool errors_expected_ = false;

 private:
  int threads_before_ = num_threads();
};

TEST_P(CpuAttention, EveryHeadDimAndBlockSize) {
  int i = 0;
  for (std::int64_t head_dim : kHeadDims)
    for (std::int64_t block_size : kBlockSizes)
      for (DType dtype : kFloats) {
        Spec spec;
        spec.dtype = spec.kv_dtype = dtype;
        spec.head_dim = head_dim, spec.block_size = block_size;
        spec.heads_outside_slots = ++i % 2 == 0;
        const std::string label = std::string(name(dtype)) + " " + std::to_string(head_dim) + " " + std::to_string(block_size);
        spec.kv_lens = {70, 0, 1, 131, 16};
        spec.q_lens = {1, 1, 1, 1, 1}, spec.decode = true;
        check(spec, "decode " + label);
        spec.q_lens = {70, 0, 1, 45, 16}, spec.decode = false;
        check(spec, "mixed " + label);
      }
}

TEST_P(CpuAttention, EveryGroupSize) {
  for (std::int64_t group : {1, 2, 3, 4, 5, 7, 8, 16, 17, 40})
    for (DType dtype : kFloats) {
      Spec spec;
      spec.dtype = spec.kv_dtype = dtype, spec.group = group, spec.num_kv_heads = 3, spec.head_dim = 40;
      spec.kv_lens = {77, 33}, spec.q_lens = {1, 1}, spec.decode = true;
      check(spec, "decode group " + std::to_string(group));
      spec.q_lens = {20, 1}, spec.decode = false;
      check(spec, "prefill group " + std::to_string(group));
    }
}

TEST_P(CpuAttention, EveryOption) {
  // Twelve bits choose the options; primes below keep combinations from repeating.
  for (int i = 0; i < 192; ++i) {
    const int bits = i * 1229 % 4096;
    Spec spec;
    spec.dtype = kFloats[i % 3];
    spec.kv_dtype = bits & 1 ? kQuantized[i / 3 % 3] : spec.dtype;
    spec.num_scales = spec.kv_dtype == spec.dtype ? 0 : bits & 2 ? 2 : 1;
    spec.causal = (bits & 4) == 0;
    spec.window_left = bits & 8 ? i % 23 : -1;
    spec.window_right = bits & 16 ? i % 5 : -1;
    spec.softcap = bits & 32 ? (bits & 64 ? 2.0f : 30.0f) : 0.0f;
    spec.alibi = (bits & 128) != 0;
    spec.sinks = (bits & 256) != 0;
    spec.block_size = bits & 512 ? 0 : kBlockSizes[i % 4];
    spec.head_dim = kHeadDims[i % 7];
    spec.decode = (bits & 1024) != 0 && spec.block_size > 0;
    // The third sequence has more queries than keys: with causal, the first rows see none.
    spec.kv_lens = {67, 0, 5, 300};
    spec.q_lens = spec.decode ? std::vector<std::int64_t>{1, 1, 1, 1} : std::vector<std::int64_t>{30, 2, 9, bits & 2048 ? 1 : 4};
    check(spec, "options " + std::to_string(i));
  }
}

TEST_P(CpuAttention, QuantizedCaches) {
  for (DType dtype : kFloats)
    for (DType kv_dtype : kQuantized)
      for (int num_scales : {0, 1, 2})
        for (std::int64_t head_dim : {8, 72, 128}) {
          Spec spec;
          spec.dtype = dtype, spec.kv_dtype = kv_dtype, spec.num_scales = num_scales, spec.head_dim = head_dim;
          if (kv_dtype == DType::kInt8 && num_scales == 0) continue;  // scores of hundreds: the reference itself is one-hot
          spec.kv_lens = {50, 17}, spec.q_lens = {1, 1}, spec.decode = true;
          check(spec, std::string("decode ") + name(kv_dtype));
          spec.q_lens = {40, 1}, spec.decode = false;
          check(spec, std::string("prefill ") + name(kv_dtype));
        }
}

TEST_P(CpuAttention, LongSequencesCrossTiles) {
  for (DType dtype : kFloats)
    for (std::int64_t head_dim : {64, 256}) {
      Spec spec;
      spec.dtype = spec.kv_dtype = dtype, spec.head_dim = head_dim, spec.num_kv_heads = 1, spec.group = 3, spec.block_size = 16;
      spec.kv_lens = {700}, spec.q_lens = {60};
      check(spec, "causal");
      spec.window_left = 100;
      check(spec, "window");
      spec.causal = false, spec.window_right = 20;
      check(spec, "two-sided window");
      spec.window_left = spec.window_right = -1;
      check(spec, "everything");
    }
}

TEST_P(CpuAttention, SplitKeysMatchTheReference) {
  for (int threads : {1, 3, 16}) {
    set_num_threads(threads);
    for (DType dtype : kFloats) {
      Spec spec;
      spec.dtype = spec.kv_dtype = dtype, spec.num_kv_heads = 1, spec.group = 4, spec.head_dim = 64;
      spec.sinks = true;
      spec.kv_lens = {3000}, spec.q_lens = {1}, spec.decode = true;
      check(spec, "decode, threads " + std::to_string(threads));
      spec.q_lens = {9}, spec.decode = false;
      check(spec, "prefill, threads " + std::to_string(threads));
    }
  }
}

TEST_P(CpuAttention, RunsRepeatBitForBit) {
  set_num_threads(4);
  for (DType dtype : kFloats) {
    Spec spec;
    spec.dtype = spec.kv_dtype = dtype, spec.num_kv_heads = 2, spec.group = 4;
    spec.kv_lens = {2000, 40, 900}, spec.q_lens = {1, 40, 33};
    Batch batch(spec, rng);
    batch.run();
    const std::vector<char> out = batch.out.bytes();
    const std::vector<float> lse = batch.lse;
    for (int i = 0; i < 5; ++i) {
      batch.run();
      ASSERT_EQ(out, batch.out.bytes());
      ASSERT_EQ(lse, batch.lse);
    }
  }
}

TEST_P(CpuAttention, UnusedSlotsChangeNoBit) {
  for (DType dtype : kFloats)
    for (std::int64_t block_size : kBlockSizes) {
      Spec spec;
      spec.dtype = spec.kv_dtype = dtype, spec.block_size = block_size;
      spec.kv_lens = {70, 5, 33}, spec.q_lens = {1, 5, 20};
      Batch batch(spec, rng);
      batch.run();
      const std::vector<char> out = batch.out.bytes();
      const std::vector<float> lse = batch.lse;
      std::vector<bool> used(static_cast<std::size_t>(batch.p.num_blocks * block_size));
      for (std::int64_t seq = 0; seq < 3; ++seq)
        for (std::int64_t key = 0; key < spec.kv_lens[static_cast<std::size_t>(seq)]; ++key)
          used[static_cast<std::size_t>(batch.block_of(seq, key) * block_size + key % block_size)] = true;
      for (std::size_t slot = 0; slot < used.size(); ++slot)
        for (std::int64_t i = 0; !used[slot] && i < batch.p.k_token_stride; ++i) {
          batch.k.set(static_cast<std::int64_t>(slot) * batch.p.k_token_stride + i, 3.0f);
          batch.v.set(static_cast<std::int64_t>(slot) * batch.p.v_token_stride + i, std::numeric_limits<float>::infinity());
        }
      batch.run();
      ASSERT_EQ(out, batch.out.bytes());
      ASSERT_EQ(lse, batch.lse);
    }
}

TEST_P(CpuAttention, HostileTablesHideTheirKeys) {
  errors_expected_ = true;
  for (DType dtype : kFloats)
    for (std::int64_t block_size : kBlockSizes)
      for (bool decode : {true, false}) {
        Spec spec;
        spec.dtype = spec.kv_dtype = dtype, spec.block_size = block_size, spec.decode = decode;
        spec.kv_lens = {100, 64, 3}, spec.q_lens = decode ? std::vector<std::int64_t>{1, 1, 1} : std::vector<std::int64_t>{50, 64, 2};
        Batch batch(spec, rng);
        const std::int64_t num_entries = ceil_div(100, block_size);
        const std::int32_t hostile[] = {-1, kMinInt, kMaxInt, static_cast<std::int32_t>(batch.p.num_blocks), -2};
        for (std::int64_t i = 0; i < num_entries; i += 3) batch.table(0, i) = hostile[i % 5];
        for (std::int64_t i = 0; i < ceil_div(3, block_size); ++i) batch.table(2, i) = kMaxInt;  // a sequence without any key left
        batch.run();
        batch.check("hostile table");
        expect_error("block_tables");
      }
}

TEST_P(CpuAttention, MinusOneInATableIsSilent) {
  Spec spec;
  spec.kv_lens = {100}, spec.q_lens = {60};
  Batch batch(spec, rng);
  batch.table(0, 2) = -1;
  batch.run();
  batch.check("-1");
  EXPECT_NO_THROW(check_errors(Device{}));
}

TEST_P(CpuAttention, EntriesThatNoQuerySeesAreNotRead) {
  Spec spec;
  spec.window_left = 8;
  spec.kv_lens = {200}, spec.q_lens = {3};
  Batch batch(spec, rng);
  for (std::int64_t i = 0; i < 11; ++i) batch.table(0, i) = kMaxInt;  // keys 0 to 175; the first query sees 189 and later
  batch.run();
  batch.check("released blocks");
  EXPECT_NO_THROW(check_errors(Device{}));
}

TEST_P(CpuAttention, LengthsAreClamped) {
  errors_expected_ = true;
  for (std::int32_t length : {-5, kMinInt, kMaxInt, 1000}) {
    Spec spec;
    spec.kv_lens = {30, 20}, spec.q_lens = {1, 1}, spec.decode = true;
    Batch batch(spec, rng);
    for (std::int64_t i = 2; i < batch.p.max_blocks_per_seq; ++i) batch.table(0, i) = -1;
    batch.seq_lens[0] = length;
    batch.run();
    expect_error("seq_lens");
    // A length that is too long takes in the rest of the last block, which is poison; the other sequence is as it was.
    batch.spec.kv_lens[0] = 0;
    if (length < 0) batch.check("clamped to 0");
    const Batch::Row expected = batch.reference(1, 0, 0);
    EXPECT_NEAR(static_cast<double>(batch.out.get(batch.out_index(1, 0))), expected.out[0], 1e-5);
  }
}

TEST_P(CpuAttention, StartLocationsAreClamped) {
  errors_expected_ = true;
  for (bool paged : {true, false}) {
    Spec spec;
    spec.block_size = paged ? 16 : 0;
    spec.kv_lens = {30, 20, 10}, spec.q_lens = {5, 6, 7};
    Batch batch(spec, rng);
    batch.query_start_loc = {-3, kMaxInt, 4, kMinInt};
    batch.run();
    expect_error("query_start_loc");
    batch.query_start_loc = {0, 5, 11, 18};
    if (paged) continue;
    batch.kv_start_loc = {-7, 30, kMaxInt, 3};
    batch.run();
    expect_error("kv_start_loc");
  }
}

TEST_P(CpuAttention, RowsWithoutKeys) {
  for (DType dtype : kFloats)
    for (bool sinks : {false, true})
      for (bool paged : {false, true}) {
        Spec spec;
        spec.dtype = spec.kv_dtype = dtype, spec.sinks = sinks, spec.block_size = paged ? 16 : 0;
        spec.kv_lens = {0, 2, 40}, spec.q_lens = {3, 6, 1};
        check(spec, "no keys");
        spec.causal = false, spec.window_left = 0, spec.window_right = 0;
        check(spec, "only itself");
      }
}

TEST_P(CpuAttention, LaterTokensDoNotReachEarlierRows) {
  for (DType dtype : kFloats) {
    Spec spec;
    spec.dtype = spec.kv_dtype = dtype;
    spec.kv_lens = {90}, spec.q_lens = {90};
    Batch batch(spec, rng);
    for (std::int64_t d = 0; d < spec.head_dim; ++d) {
      batch.k.set(batch.k_index(0, 60, 0) + d, kNan);
      batch.v.set(batch.v_index(0, 60, 1) + d, kNan);
      batch.v.set(batch.v_index(0, 70, 1) + d, std::numeric_limits<float>::infinity());
    }
    batch.run();
    for (std::int64_t token = 0; token < 90; ++token)
      for (std::int64_t head = 0; head < 4; ++head) {
        const float got = batch.out.get(batch.out_index(token, head));
        if (token >= 60) {
          ASSERT_TRUE(std::isnan(got)) << token << " " << head;
        } else {
          ASSERT_NEAR(static_cast<double>(got), batch.reference(0, token, head).out[0], 2e-2) << token << " " << head;
        }
      }
  }
}

TEST_P(CpuAttention, ScoresThatAreAllNanGiveNan) {
  for (DType dtype : kFloats)
    for (std::int64_t q_len : {1, 2}) {
      Spec spec;
      spec.dtype = spec.kv_dtype = dtype;
      spec.kv_lens = {40}, spec.q_lens = {q_len};
      Batch batch(spec, rng);
      batch.q.set(batch.q_index(0, 1), kNan);
      batch.run();
      EXPECT_TRUE(std::isnan(batch.out.get(batch.out_index(0, 1))));
      EXPECT_TRUE(std::isnan(batch.lse[1]));
      EXPECT_FALSE(std::isnan(batch.out.get(batch.out_index(0, 0))));
    }
}

TEST_P(CpuAttention, LargeScoresDoNotOverflow) {
  for (DType dtype : kFloats)
    for (std::int64_t q_len : {1, 40})
      for (bool sinks : {false, true}) {
        Spec spec;
        spec.dtype = spec.kv_dtype = dtype, spec.sinks = sinks;
        spec.kv_lens = {600}, spec.q_lens = {q_len};
        Batch batch(spec, rng);
        // Scores of either sign up to a few hundred, but no two within rounding of each other at the top.
        for (std::int64_t i = 0; i < q_len * 4 * spec.head_dim; ++i) batch.q.set(i, batch.q.get(i) * 32.0f);
        batch.run();
        for (std::int64_t token = 0; token < q_len; ++token)
          for (std::int64_t head = 0; head < 4; ++head) {
            const Batch::Row expected = batch.reference(0, token, head);
            ASSERT_NEAR(static_cast<double>(batch.lse[static_cast<std::size_t>(token * 4 + head)]), expected.lse,
                        1e-6 * std::abs(expected.lse));
            ASSERT_TRUE(std::isfinite(batch.out.get(batch.out_index(token, head))));
          }
      }
}

TEST_P(CpuAttention, StridedQueriesOutputsAndPools) {
  for (DType dtype : kFloats)
    for (std::int64_t q_len : {1, 25}) {
      Spec spec;
      spec.dtype = spec.kv_dtype = dtype, spec.head_dim = 40;
      spec.kv_lens = {60}, spec.q_lens = {q_len};
      Batch plain(spec, rng);
      plain.run();
      // The same numbers in an interleaved pool [num_blocks, 2, ...], and q and out as slices of wider tensors.
      Batch strided = plain;
      const std::int64_t block = plain.p.k_block_stride;
      Elements pool(dtype, 2 * plain.p.num_blocks * block);
      for (std::int64_t i = 0; i < plain.p.num_blocks * block; ++i) {
        pool.set(i / block * 2 * block + i % block, plain.k.get(i));
        pool.set(i / block * 2 * block + block + i % block, plain.v.get(i));
      }
      strided.p.k_block_stride = strided.p.v_block_stride = 2 * block;
      const std::int64_t width = 4 * 48 + 5;
      Elements q(dtype, plain.p.num_tokens * width), out(dtype, plain.p.num_tokens * width);
      q.poison(), out.poison();
      for (std::int64_t token = 0; token < plain.p.num_tokens; ++token)
        for (std::int64_t head = 0; head < 4; ++head)
          for (std::int64_t d = 0; d < 40; ++d) q.set(token * width + head * 48 + d, plain.q.get(plain.q_index(token, head) + d));
      strided.q = q, strided.out = out, strided.k = pool;
      strided.v = pool;
      strided.p.q_token_stride = strided.p.out_token_stride = width, strided.p.q_head_stride = strided.p.out_head_stride = 48;
      // v lies one block after k; a copy of the pool that starts there stands for the view.
      std::memmove(strided.v.data(), static_cast<char*>(strided.v.data()) + block * itemsize(dtype),
                   static_cast<std::size_t>((2 * plain.p.num_blocks - 1) * block * itemsize(dtype)));
      strided.run();
      for (std::int64_t token = 0; token < q_len; ++token)
        for (std::int64_t head = 0; head < 4; ++head) {
          for (std::int64_t d = 0; d < 40; ++d)
            ASSERT_EQ(strided.out.get(token * width + head * 48 + d), plain.out.get(plain.out_index(token, head) + d));
          for (std::int64_t d = 40; d < 48 && head < 3; ++d) ASSERT_TRUE(std::isnan(strided.out.get(token * width + head * 48 + d)));
        }
      ASSERT_EQ(strided.lse, plain.lse);
    }
}

TEST_P(CpuAttention, WithoutLse) {
  Spec spec;
  spec.kv_lens = {60}, spec.q_lens = {7};
  Batch batch(spec, rng);
  batch.run();
  const std::vector<char> out = batch.out.bytes();
  batch.out.poison();
  batch.p.lse = nullptr;
  attention(batch.p);
  EXPECT_EQ(std::memcmp(out.data(), batch.out.data(), static_cast<std::size_t>(7 * batch.p.out_token_stride) * sizeof(float)), 0);
}

TEST_P(CpuAttention, NoBlocksAtAll) {
  errors_expected_ = true;
  Spec spec;
  spec.kv_lens = {20}, spec.q_lens = {2};
  Batch batch(spec, rng);
  batch.p.num_blocks = 0;
  batch.run();
  batch.check("empty pool");
  expect_error("block_tables");
}

INSTANTIATE_TEST_SUITE_P(Levels, CpuAttention, ::testing::ValuesIn(levels()),
                         [](const auto& info) { return std::string(name(info.param)); });

// ---- Merge -------------------------------------------------------------------------------------------------------------------

struct Partial {
  Elements out;
  std::vector<float> lse;
};

MergeParams merge_params(Partial& result, Partial& a, Partial& b, DType dtype, std::int64_t num_tokens, std::int64_t num_heads,
                         std::int64_t head_dim) {
  MergeParams p;
  p.out = result.out.data(), p.out_lse = result.lse.data();
  p.out_a = a.out.data(), p.lse_a = a.lse.data(), p.out_b = b.out.data(), p.lse_b = b.lse.data();
  p.dtype = dtype, p.num_tokens = num_tokens, p.num_heads = num_heads, p.head_dim = head_dim;
  p.out_token_stride = p.a_token_stride = p.b_token_stride = num_heads * head_dim;
  p.out_head_stride = p.a_head_stride = p.b_head_stride = head_dim;
  return p;
}

TEST(CpuMergeAttention, MatchesDoubleAndKeepsTheIdentity) {
  std::mt19937 rng{7};
  std::normal_distribution<float> normal;
  constexpr std::int64_t kTokens = 37, kHeads = 3, kHeadDim = 40;
  constexpr float kInfF = std::numeric_limits<float>::infinity();
  for (DType dtype : kFloats) {
    Partial a{Elements(dtype, kTokens * kHeads * kHeadDim), std::vector<float>(kTokens * kHeads)}, b = a, result = a;
    for (std::int64_t i = 0; i < kTokens * kHeads * kHeadDim; ++i) a.out.set(i, normal(rng)), b.out.set(i, normal(rng));
    for (std::size_t row = 0; row < a.lse.size(); ++row) {
      a.lse[row] = row % 5 == 1 ? -kInfF : 20.0f * normal(rng);
      b.lse[row] = row % 7 == 2 ? -kInfF : 20.0f * normal(rng);
      // The output of a side without keys must not matter.
      for (std::int64_t d = 0; d < kHeadDim; ++d) {
        if (a.lse[row] == -kInfF) a.out.set(static_cast<std::int64_t>(row) * kHeadDim + d, kNan);
        if (b.lse[row] == -kInfF) b.out.set(static_cast<std::int64_t>(row) * kHeadDim + d, kNan);
      }
    }
    merge_attention(merge_params(result, a, b, dtype, kTokens, kHeads, kHeadDim));
    const double ulp = dtype == DType::kFloat32 ? 2e-6 : dtype == DType::kFloat16 ? 0x1p-10 : 0x1p-7;
    for (std::size_t row = 0; row < a.lse.size(); ++row) {
      const double lse_a = static_cast<double>(a.lse[row]), lse_b = static_cast<double>(b.lse[row]), max = std::max(lse_a, lse_b);
      const double lse = max == -kInf ? -kInf : max + std::log(std::exp(lse_a - max) + std::exp(lse_b - max));
      if (lse == -kInf) {
        EXPECT_EQ(result.lse[row], -kInfF);
      } else {
        EXPECT_NEAR(static_cast<double>(result.lse[row]), lse, 1e-6 * std::max(1.0, std::abs(lse)));
      }
      for (std::int64_t d = 0; d < kHeadDim; ++d) {
        const std::int64_t i = static_cast<std::int64_t>(row) * kHeadDim + d;
        double expected = 0;
        if (lse_a != -kInf) expected += static_cast<double>(a.out.get(i)) * std::exp(lse_a - lse);
        if (lse_b != -kInf) expected += static_cast<double>(b.out.get(i)) * std::exp(lse_b - lse);
        ASSERT_NEAR(static_cast<double>(result.out.get(i)), expected, ulp * std::max(1.0, std::abs(expected))) << row;
      }
    }
    Partial in_place = a;
    merge_attention(merge_params(in_place, in_place, b, dtype, kTokens, kHeads, kHeadDim));
    EXPECT_EQ(in_place.out.bytes(), result.out.bytes());
    EXPECT_EQ(in_place.lse, result.lse);
  }
}

TEST(CpuMergeAttention, HalvesOfTheKeysMakeTheWhole) {
  std::mt19937 rng{8};
  Spec spec;
  spec.block_size = 0, spec.causal = false, spec.kv_lens = {90}, spec.q_lens = {11};
  Batch whole(spec, rng), first = whole, second = whole;
  whole.run();
  first.kv_start_loc = {0, 50}, second.kv_start_loc = {50, 90};
  first.run(), second.run();
  Partial a{first.out, first.lse}, b{second.out, second.lse}, result = a;
  merge_attention(merge_params(result, a, b, DType::kFloat32, 11, 4, 64));
  for (std::int64_t i = 0; i < 11 * 4 * 64; ++i) ASSERT_NEAR(result.out.get(i), whole.out.get(i), 2e-6f);
  for (std::size_t i = 0; i < 11 * 4; ++i) ASSERT_NEAR(result.lse[i], whole.lse[i], 4e-6f);
}

}  // namespace
}  // namespace quire::cpu
