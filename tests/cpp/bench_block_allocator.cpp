// Times of the block allocator's hot paths, single thread, against the targets in docs/concepts/block_allocator.md.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <numeric>
#include <vector>

#include "quire/block_allocator.h"

namespace {

using namespace quire;

// The best of several rounds: what the code costs when nothing else runs.
template <typename F>
double seconds_per_call(std::int64_t num_calls, F&& f) {
  double best = 1e9;
  for (int round = 0; round < 15; ++round) {
    const auto start = std::chrono::steady_clock::now();
    for (std::int64_t i = 0; i < num_calls; ++i) f();
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  return best / static_cast<double>(num_calls);
}

BlockAllocatorOptions options_of(std::int64_t num_blocks) {
  BlockAllocatorOptions options;
  options.num_blocks = num_blocks;
  return options;
}

void bench_decode_step(std::int64_t seq_len, std::int64_t max_blocks_per_seq) {
  constexpr std::int64_t kNumSeqs = 256;
  BlockAllocator a(options_of(kNumSeqs * (max_blocks_per_seq + 1)));
  std::vector<SequenceId> ids(kNumSeqs);
  std::iota(ids.begin(), ids.end(), 1000);
  for (const SequenceId id : ids) {
    std::vector<TokenId> prompt(static_cast<std::size_t>(seq_len), static_cast<TokenId>(id));
    a.add_sequence(id, prompt);
    a.grow(id, seq_len);
    a.commit(id, seq_len);
  }
  const std::vector<std::int64_t> ones(kNumSeqs, 1);
  const std::vector<TokenId> next(kNumSeqs, 5);
  std::vector<std::int32_t> tables(static_cast<std::size_t>(kNumSeqs * max_blocks_per_seq)), seq_lens(kNumSeqs), starts(kNumSeqs + 1);
  std::vector<std::int64_t> slots(kNumSeqs);
  BatchView batch;
  batch.block_tables = tables.data();
  batch.block_tables_stride = batch.max_blocks_per_seq = max_blocks_per_seq;
  batch.slot_mapping = slots.data();
  batch.max_tokens = kNumSeqs;
  batch.seq_lens = seq_lens.data();
  batch.query_start_loc = starts.data();
  batch.max_seqs = kNumSeqs;
  double grow = 1e9, rest = 1e9;
  const std::int64_t num_steps = std::min<std::int64_t>(400, max_blocks_per_seq * 16 - seq_len);
  double grow_sum = 0, rest_sum = 0;
  for (std::int64_t step = 0; step < num_steps; ++step) {
    const auto t0 = std::chrono::steady_clock::now();
    a.grow_and_write_batch(ids, ones, batch);
    const auto t1 = std::chrono::steady_clock::now();
    a.commit_batch(ids, ones);
    a.append_token_batch(ids, next);
    const auto t2 = std::chrono::steady_clock::now();
    grow_sum += std::chrono::duration<double>(t1 - t0).count();
    rest_sum += std::chrono::duration<double>(t2 - t1).count();
    if (step % 16 == 15) {  // one block per sequence was allocated in these
      grow = std::min(grow, grow_sum / 16);
      rest = std::min(rest, rest_sum / 16);
      grow_sum = rest_sum = 0;
    }
  }
  std::printf("grow_and_write_batch, 256 x 1 token, %5lld tokens each, %4lld columns  %8.2f us\n", static_cast<long long>(seq_len),
              static_cast<long long>(max_blocks_per_seq), grow * 1e6);
  std::printf("commit_batch + append_token_batch, the same                          %8.2f us\n", rest * 1e6);
}

}  // namespace

int main() {
  {
    BlockAllocator a(options_of(65536));
    BlockId id = kNoBlock;
    const double seconds = seconds_per_call(200000, [&] {
      a.allocate({&id, 1});
      a.free({&id, 1});
    });
    std::printf("allocate + free of one block                                         %8.2f M/s\n", 1e-6 / seconds);
    std::vector<BlockId> ids(64);
    const double many = seconds_per_call(5000, [&] {
      a.allocate(ids);
      a.free(ids);
    });
    std::printf("allocate + free of 64 blocks, per block                              %8.2f M/s\n", 64e-6 / many);
  }
  {
    BlockAllocator a(options_of(65536));
    std::vector<TokenId> prompt(4096);
    std::iota(prompt.begin(), prompt.end(), 0);
    std::printf("hash_blocks, 4096 tokens                                             %8.2f us\n",
                1e6 * seconds_per_call(200, [&] { a.hash_blocks(prompt); }));
    a.add_sequence(1, prompt);
    a.grow(1, 4096);
    a.commit(1, 4096);
    std::printf("add_sequence + free_sequence, 4096 tokens, all cached                %8.2f us\n", 1e6 * seconds_per_call(200, [&] {
                                                                                                     a.add_sequence(2, prompt);
                                                                                                     a.free_sequence(2);
                                                                                                   }));
    std::printf("the same with misses only                                            %8.2f us\n", 1e6 * seconds_per_call(200, [&] {
                                                                                                     a.add_sequence(2, prompt, "other");
                                                                                                     a.free_sequence(2);
                                                                                                   }));
  }
  bench_decode_step(500, 64);
  bench_decode_step(1500, 128);
  bench_decode_step(3500, 256);
  bench_decode_step(3500, 1024);
}
