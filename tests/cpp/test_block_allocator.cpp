// Tests of the block allocator: every rule by itself, then random use against a simulated cache, faults, and threads.
// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdlib>
#include <limits>
#include <map>
#include <new>
#include <numeric>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "quire/block_allocator.h"

// ---- Allocation failures on demand, on this thread: the countdown'th allocation from now fails. ----

namespace {
thread_local std::int64_t allocation_countdown = -1;

void* allocate_or_fail(std::size_t size) {
  if (allocation_countdown >= 0 && allocation_countdown-- == 0) throw std::bad_alloc();
  if (void* p = std::malloc(size == 0 ? 1 : size)) return p;
  throw std::bad_alloc();
}
}  // namespace

void* operator new(std::size_t size) { return allocate_or_fail(size); }
void* operator new[](std::size_t size) { return allocate_or_fail(size); }
void* operator new(std::size_t size, const std::nothrow_t&) noexcept { return std::malloc(size == 0 ? 1 : size); }
void* operator new[](std::size_t size, const std::nothrow_t&) noexcept { return std::malloc(size == 0 ? 1 : size); }
void operator delete(void* p) noexcept { std::free(p); }
void operator delete[](void* p) noexcept { std::free(p); }
void operator delete(void* p, std::size_t) noexcept { std::free(p); }
void operator delete[](void* p, std::size_t) noexcept { std::free(p); }

namespace quire {
namespace {

using Tokens = std::vector<TokenId>;
using Ids = std::vector<BlockId>;
using Copies = std::vector<BlockCopy>;
using Kind = BlockEvent::Kind;

BlockAllocatorOptions small(std::int64_t num_blocks, std::int64_t block_size = 4, std::int64_t num_host_blocks = 0) {
  BlockAllocatorOptions options;
  options.num_blocks = num_blocks;
  options.block_size = block_size;
  options.num_host_blocks = num_host_blocks;
  options.watermark = 0.0;
  options.enable_events = true;
  return options;
}

Tokens range(TokenId first, std::int64_t count) {
  Tokens tokens(static_cast<std::size_t>(count));
  std::iota(tokens.begin(), tokens.end(), first);
  return tokens;
}

// Computes everything that is known of a sequence.
Copies compute(BlockAllocator& a, SequenceId id) {
  const SequenceInfo info = a.sequence(id);
  const std::int64_t count = info.num_tokens - info.num_computed_tokens;
  Copies copies = a.grow(id, count);
  a.commit(id, count);
  return copies;
}

void add_computed(BlockAllocator& a, SequenceId id, const Tokens& tokens, std::string_view salt = {}) {
  a.add_sequence(id, tokens, salt);
  compute(a, id);
}

void expect_states(const BlockAllocator& a, std::int64_t live, std::int64_t cached, std::int64_t free) {
  const BlockAllocatorStats stats = a.stats();
  EXPECT_EQ(stats.num_live, live);
  EXPECT_EQ(stats.num_cached, cached);
  EXPECT_EQ(stats.num_free, free);
  EXPECT_EQ(stats.num_live + stats.num_cached + stats.num_free, stats.num_blocks);
  a.check();
}

template <typename Error, typename F>
void expect_error(F&& f, const std::string& part) {
  try {
    f();
    ADD_FAILURE() << "nothing thrown; expected: " << part;
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find(part), std::string::npos) << error.what();
    EXPECT_EQ(std::string(error.what()).rfind("[BlockAllocator", 0), 0U) << error.what();
  }
}

// ---- Construction. ----

TEST(BlockAllocator, RefusesBadOptions) {
  const auto expect_refused = [](auto&& change, const std::string& part) {
    BlockAllocatorOptions options = small(8);
    change(options);
    expect_error<std::invalid_argument>([&] { BlockAllocator a(options); }, part);
  };
  expect_refused([](auto& o) { o.num_blocks = 0; }, "num_blocks: expected 1 to 2147483646, got 0");
  expect_refused([](auto& o) { o.num_blocks = std::numeric_limits<std::int64_t>::max(); }, "num_blocks");
  expect_refused([](auto& o) { o.block_size = 0; }, "block_size");
  expect_refused([](auto& o) { o.block_size = 65537; }, "block_size");
  expect_refused([](auto& o) { o.num_host_blocks = -1; }, "num_host_blocks");
  expect_refused([](auto& o) { o.max_events = 0; }, "max_events");
  expect_refused([](auto& o) { o.watermark = 1.0; }, "watermark");
  expect_refused([](auto& o) { o.watermark = -0.1; }, "watermark");
  expect_refused([](auto& o) { o.watermark = std::numeric_limits<double>::quiet_NaN(); }, "watermark");
}

TEST(BlockAllocator, StartsFree) {
  const BlockAllocator a(small(8, 4, 3));
  expect_states(a, 0, 0, 8);
  EXPECT_EQ(a.num_blocks(), 8);
  EXPECT_EQ(a.block_size(), 4);
  EXPECT_EQ(a.num_host_blocks(), 3);
  EXPECT_EQ(a.usage(), 0.0);
  EXPECT_EQ(a.stats().num_host_free, 3);
}

// ---- Raw blocks. ----

TEST(RawBlocks, ComeInIdOrderIncludingBlockZero) {
  BlockAllocator a(small(4));
  EXPECT_EQ(a.allocate(4), (Ids{0, 1, 2, 3}));
  EXPECT_EQ(a.usage(), 1.0);
  expect_states(a, 4, 0, 0);
}

TEST(RawBlocks, FreedLastIsReusedFirst) {
  BlockAllocator a(small(4));
  const Ids ids = a.allocate(3);
  a.free(ids);
  EXPECT_EQ(a.allocate(4), (Ids{2, 1, 0, 3}));
}

TEST(RawBlocks, ExhaustionTakesNothing) {
  BlockAllocator a(small(4));
  a.allocate(3);
  try {
    a.allocate(2);
    FAIL();
  } catch (const OutOfBlocksError& error) {
    EXPECT_EQ(error.num_requested(), 2);
    EXPECT_EQ(error.num_available(), 1);
    EXPECT_NE(dynamic_cast<const std::bad_alloc*>(&error), nullptr);
  }
  EXPECT_THROW(a.allocate(std::numeric_limits<std::int64_t>::max()), OutOfBlocksError);
  expect_error<std::invalid_argument>([&] { a.allocate(-1); }, "allocate] num_blocks: expected at least 0, got -1");
  EXPECT_TRUE(a.allocate(0).empty());
  expect_states(a, 3, 0, 1);
}

TEST(RawBlocks, CanAllocateKeepsTheWatermark) {
  BlockAllocatorOptions options = small(10);
  options.watermark = 0.2;
  BlockAllocator a(options);
  EXPECT_EQ(a.watermark_blocks(), 2);
  EXPECT_TRUE(a.can_allocate(10));
  EXPECT_FALSE(a.can_allocate(11));
  EXPECT_TRUE(a.can_allocate(8, true));
  EXPECT_FALSE(a.can_allocate(9, true));
  EXPECT_THROW(a.can_allocate(-1), std::invalid_argument);
}

TEST(RawBlocks, DoubleFreeIsRefusedWhole) {
  BlockAllocator a(small(4));
  const Ids ids = a.allocate(2);
  expect_error<std::invalid_argument>([&] { a.free(Ids{0, 1, 0}); }, "free] block_ids: expected blocks that are held");
  expect_states(a, 2, 0, 2);
  a.free(ids);
  EXPECT_THROW(a.free(ids), std::invalid_argument);
  EXPECT_THROW(a.free(Ids{3}), std::invalid_argument);
  expect_states(a, 0, 0, 4);
}

TEST(RawBlocks, ForeignIdsAreIndexErrors) {
  BlockAllocator a(small(4));
  for (const BlockId id : {-1, 4, std::numeric_limits<BlockId>::max(), std::numeric_limits<BlockId>::min()}) {
    expect_error<IndexError>([&] { a.free(Ids{id}); }, "expected a block id in [0, 4), got " + std::to_string(id));
    EXPECT_THROW(a.ref(Ids{id}), IndexError);
    EXPECT_THROW(a.pin(Ids{id}), IndexError);
    EXPECT_THROW(a.unpin(Ids{id}), IndexError);
    EXPECT_THROW(a.copy_on_write(id), IndexError);
    EXPECT_THROW(a.num_references(id), IndexError);
  }
}

TEST(RawBlocks, ReferencesAreCounted) {
  BlockAllocator a(small(4));
  const Ids ids = a.allocate(1);
  a.ref(Ids{0, 0});
  EXPECT_EQ(a.num_references(0), 3);
  a.free(Ids{0, 0});
  expect_states(a, 1, 0, 3);
  a.free(ids);
  expect_states(a, 0, 0, 4);
  expect_error<std::invalid_argument>([&] { a.ref(Ids{0}); }, "live or cached blocks, got block 0, which is free");
}

TEST(RawBlocks, CopyOnWrite) {
  BlockAllocator a(small(2));
  a.allocate(1);
  EXPECT_EQ(a.copy_on_write(0), (BlockCopy{0, 0}));
  a.ref(Ids{0});
  EXPECT_EQ(a.copy_on_write(0), (BlockCopy{0, 1}));
  EXPECT_EQ(a.num_references(0), 1);
  EXPECT_EQ(a.num_references(1), 1);
  a.ref(Ids{0});
  EXPECT_THROW(a.copy_on_write(0), OutOfBlocksError);
  a.free(Ids{0, 0, 1});
  EXPECT_THROW(a.copy_on_write(0), std::invalid_argument);
  expect_states(a, 0, 0, 2);
}

TEST(RawBlocks, ASequencesBlockCannotBeFreedByHand) {
  BlockAllocator a(small(4));
  add_computed(a, 1, range(0, 4));
  EXPECT_THROW(a.free(Ids{0}), std::invalid_argument);
  a.ref(Ids{0});
  a.free_sequence(1);
  expect_states(a, 1, 0, 3);
  a.free(Ids{0});
  expect_states(a, 0, 1, 3);
}

TEST(RawBlocks, PinKeepsFromEviction) {
  BlockAllocator a(small(4));
  add_computed(a, 1, range(0, 8));
  a.free_sequence(1);
  expect_states(a, 0, 2, 2);
  a.pin(Ids{0});
  a.pin(Ids{0});
  EXPECT_EQ(a.stats().num_pinned, 1);
  expect_states(a, 1, 1, 2);
  const Ids rest = a.allocate(3);
  EXPECT_EQ(std::count(rest.begin(), rest.end(), 0), 0);
  EXPECT_EQ(a.num_cached_tokens(range(0, 8)), 4);
  a.free(rest);
  a.unpin(Ids{0});
  EXPECT_EQ(a.stats().num_pinned, 1);
  a.unpin(Ids{0});
  EXPECT_EQ(a.stats().num_pinned, 0);
  EXPECT_THROW(a.unpin(Ids{0}), std::invalid_argument);
  expect_states(a, 0, 1, 3);
  EXPECT_THROW(a.pin(Ids{1}), std::invalid_argument);
}

TEST(RawBlocks, PinnedPartialBlockIsCopiedNotWritten) {
  BlockAllocator a(small(4));
  add_computed(a, 1, range(0, 6));
  a.pin(Ids{1});
  EXPECT_EQ(a.grow(1, 1), (Copies{{1, 2}}));
  a.unpin(Ids{1});
  a.check();
}

// ---- Sequences. ----

TEST(Sequences, ChunkedPrefillAndDecode) {
  BlockAllocator a(small(8));
  EXPECT_EQ(a.add_sequence(7, range(0, 10)), 0);
  EXPECT_EQ(a.num_blocks_needed(7, 6), 2);
  EXPECT_TRUE(a.grow(7, 6).empty());
  EXPECT_EQ(a.sequence(7).num_reserved_tokens, 6);
  EXPECT_TRUE(a.grow(7, 6).empty());  // again: nothing
  EXPECT_EQ(a.sequence(7).num_blocks, 2);
  a.commit(7, 6);
  EXPECT_EQ(a.num_cached_tokens(range(0, 10)), 4);  // only the computed full block
  a.grow(7, 4);
  a.commit(7, 4);
  EXPECT_EQ(a.num_cached_tokens(range(0, 10)), 8);
  for (TokenId t = 10; t < 13; ++t) {
    a.append_tokens(7, Tokens{t});
    a.grow(7, 1);
    a.commit(7, 1);
  }
  const SequenceInfo info = a.sequence(7);
  EXPECT_EQ(info.num_tokens, 13);
  EXPECT_EQ(info.num_computed_tokens, 13);
  EXPECT_EQ(info.num_blocks, 4);
  EXPECT_EQ(a.token_ids(7), range(0, 13));
  EXPECT_EQ(a.block_table(7), (Ids{0, 1, 2, 3}));
  EXPECT_EQ(a.sequence_ids(), (std::vector<SequenceId>{7}));
  a.check();
}

TEST(Sequences, UncommittedTokensAreNoHits) {
  BlockAllocator a(small(8));
  a.add_sequence(1, range(0, 8));
  a.grow(1, 8);
  EXPECT_EQ(a.add_sequence(2, range(0, 8)), 0);
  a.free_sequence(1);
  expect_states(a, 0, 0, 8);
}

TEST(Sequences, AtMostAllButOneTokenHit) {
  BlockAllocator a(small(8));
  add_computed(a, 1, range(0, 8));
  EXPECT_EQ(a.num_cached_tokens(range(0, 8)), 4);
  EXPECT_EQ(a.num_cached_tokens(range(0, 9)), 8);
  EXPECT_EQ(a.num_cached_tokens(range(0, 1)), 0);
  EXPECT_EQ(a.num_cached_tokens(Tokens{}), 0);
  EXPECT_EQ(a.add_sequence(2, range(0, 8)), 4);
  EXPECT_EQ(a.block_table(2), (Ids{0}));
  EXPECT_EQ(a.num_references(0), 2);
  const BlockAllocatorStats stats = a.stats();
  EXPECT_EQ(stats.num_lookup_tokens, 16);
  EXPECT_EQ(stats.num_hit_tokens, 4);
  a.check();
}

TEST(Sequences, CachedBlocksSurviveTheirSequenceAndCountAsAvailable) {
  BlockAllocator a(small(4));
  add_computed(a, 1, range(0, 9));
  a.free_sequence(1);
  expect_states(a, 0, 2, 2);
  EXPECT_TRUE(a.can_allocate(4));
  EXPECT_EQ(a.add_sequence(2, range(0, 9)), 8);
  expect_states(a, 2, 0, 2);
  EXPECT_EQ(a.stats().num_evictions, 0);
}

TEST(Sequences, TailsAreEvictedFirstAndOldSequencesBeforeNewOnes) {
  BlockAllocator a(small(6));
  add_computed(a, 1, range(0, 12));
  add_computed(a, 2, range(100, 12));
  a.free_sequence(1);
  a.free_sequence(2);
  expect_states(a, 0, 6, 0);
  a.allocate(1);
  EXPECT_EQ(a.num_cached_tokens(range(0, 13)), 8);
  a.allocate(3);
  EXPECT_EQ(a.num_cached_tokens(range(0, 13)), 0);
  EXPECT_EQ(a.num_cached_tokens(range(100, 13)), 8);
  EXPECT_EQ(a.stats().num_evictions, 4);
  a.check();
}

TEST(Sequences, FreeBlocksGoBeforeCachedOnes) {
  BlockAllocator a(small(4));
  add_computed(a, 1, range(0, 6));
  a.free_sequence(1);
  expect_states(a, 0, 1, 3);
  EXPECT_EQ(a.allocate(3), (Ids{1, 2, 3}));
  EXPECT_EQ(a.stats().num_evictions, 0);
}

TEST(Sequences, ContentsOfDifferentParentsDiffer) {
  BlockAllocator a(small(8));
  Tokens one = range(0, 8);
  Tokens two = range(50, 4);
  two.insert(two.end(), one.begin() + 4, one.end());
  add_computed(a, 1, one);
  add_computed(a, 2, two);
  two.push_back(0);
  EXPECT_EQ(a.num_cached_tokens(two), 8);
  Tokens three = range(90, 4);
  three.insert(three.end(), one.begin() + 4, one.end());
  EXPECT_EQ(a.num_cached_tokens(three), 0);
  EXPECT_EQ(a.num_cached_tokens(range(4, 8)), 0);
  a.check();
}

TEST(Sequences, SameContentsComputedTwiceAreKeptOnce) {
  BlockAllocator a(small(8));
  a.add_sequence(1, range(0, 9));
  a.add_sequence(2, range(0, 9));
  compute(a, 1);
  compute(a, 2);
  expect_states(a, 6, 0, 2);
  a.free_sequence(1);
  expect_states(a, 3, 0, 5);  // the twins hold the contents
  a.free_sequence(2);
  expect_states(a, 0, 2, 6);
  EXPECT_EQ(a.num_cached_tokens(range(0, 9)), 8);
  std::int64_t num_stored = 0;
  for (const BlockEvent& event : a.take_events()) num_stored += event.kind == Kind::kStored;
  EXPECT_EQ(num_stored, 2);
}

TEST(Sequences, AnIdleCopyIsFreedWhenATwinIsComputed) {
  BlockAllocator a(small(8));
  a.add_sequence(1, range(0, 5));
  a.add_sequence(2, range(0, 5));
  compute(a, 1);
  a.free_sequence(1);
  expect_states(a, 0, 1, 7);
  compute(a, 2);
  expect_states(a, 2, 0, 6);
  EXPECT_EQ(a.num_cached_tokens(range(0, 5)), 4);
}

TEST(Sequences, SaltAndExtraKeysSeparate) {
  BlockAllocator a(small(16));
  const Tokens tokens = range(0, 13);
  const std::vector<ExtraKey> lora{{0, "lora-a"}};
  const std::vector<ExtraKey> image{{5, "image-a"}};
  const std::vector<ExtraKey> other_image{{5, "image-b"}};
  const std::vector<ExtraKey> moved_image{{6, "image-a"}};
  a.add_sequence(1, tokens, "tenant", image);
  compute(a, 1);
  EXPECT_EQ(a.num_cached_tokens(tokens, "tenant", image), 12);
  EXPECT_EQ(a.num_cached_tokens(tokens, "tenant", other_image), 4);
  EXPECT_EQ(a.num_cached_tokens(tokens, "tenant", moved_image), 4);
  EXPECT_EQ(a.num_cached_tokens(tokens, "tenant"), 4);
  EXPECT_EQ(a.num_cached_tokens(tokens, "", image), 0);
  EXPECT_EQ(a.num_cached_tokens(tokens, "tenan", image), 0);
  EXPECT_EQ(a.num_cached_tokens(tokens), 0);
  a.add_sequence(2, tokens, {}, lora);
  compute(a, 2);
  EXPECT_EQ(a.num_cached_tokens(tokens, {}, lora), 12);
  EXPECT_EQ(a.num_cached_tokens(tokens, "lora-a"), 0);
  EXPECT_EQ(a.add_sequence(3, tokens, "tenant", image), 12);
  a.check();
  for (SequenceId id : {1, 2, 3}) a.free_sequence(id);
  a.check();
  a.allocate(16);
  a.check();
  expect_error<std::invalid_argument>([&] { a.add_sequence(9, tokens, {}, std::vector<ExtraKey>{{-1, "x"}}); }, "extra_keys");
}

TEST(Sequences, ManySaltsAreForgottenWithTheirBlocks) {
  BlockAllocator a(small(8));
  for (int i = 0; i < 200; ++i) {
    add_computed(a, i, range(0, 5), "salt " + std::to_string(i));
    a.free_sequence(i);
    a.check();
  }
  expect_states(a, 0, 7, 1);
}

TEST(Sequences, TokensMayBeAppendedAfterTheyAreComputed) {
  BlockAllocator a(small(8));
  a.add_sequence(1, range(0, 3));
  a.grow(1, 8);  // three known tokens and five drafts
  a.commit(1, 5);
  EXPECT_EQ(a.num_cached_tokens(range(0, 5)), 0);
  a.append_tokens(1, range(3, 2));
  EXPECT_EQ(a.num_cached_tokens(range(0, 5)), 4);
  a.append_token_batch(std::vector<SequenceId>{1}, Tokens{5});
  EXPECT_EQ(a.token_ids(1), range(0, 6));
  a.check();
  EXPECT_THROW(a.append_token_batch(std::vector<SequenceId>{1, 1}, Tokens{5, 6}), std::invalid_argument);
  EXPECT_THROW(a.append_token_batch(std::vector<SequenceId>{1}, Tokens{5, 6}), std::invalid_argument);
}

TEST(Sequences, WrongUseIsRefused) {
  BlockAllocator a(small(4));
  a.add_sequence(1, range(0, 8));
  expect_error<std::invalid_argument>([&] { a.add_sequence(1, range(0, 4)); },
                                      "add_sequence] seq_id: expected an id that is not in use, got 1");
  expect_error<IndexError>([&] { a.grow(2, 1); }, "grow] seq_id");
  EXPECT_THROW(a.free_sequence(2), IndexError);
  EXPECT_THROW(a.preempt(2), IndexError);
  EXPECT_THROW(a.sequence(2), IndexError);
  EXPECT_THROW(a.block_table(2), IndexError);
  EXPECT_THROW(a.token_ids(2), IndexError);
  EXPECT_THROW(a.append_tokens(2, Tokens{1}), IndexError);
  EXPECT_THROW(a.truncate(2, 0), IndexError);
  EXPECT_THROW(a.fork(2, 3), IndexError);
  EXPECT_THROW(a.swap_in(2), IndexError);
  EXPECT_THROW(a.swap_out(2), IndexError);
  EXPECT_THROW(a.match_prefix(2), IndexError);
  EXPECT_THROW(a.release_out_of_window(2, 1), IndexError);
  EXPECT_THROW(a.fork(1, 1), std::invalid_argument);
  EXPECT_THROW(a.swap_in(1), std::invalid_argument);
  EXPECT_THROW(a.grow(1, -1), std::invalid_argument);
  EXPECT_THROW(a.grow(1, std::numeric_limits<std::int64_t>::max()), std::invalid_argument);
  expect_error<std::invalid_argument>([&] { a.commit(1, 1); }, "at most the 0 tokens that grow made room for, got 1");
  EXPECT_THROW(a.commit(1, -1), std::invalid_argument);
  EXPECT_THROW(a.release_out_of_window(1, 0), std::invalid_argument);
  EXPECT_THROW(a.truncate(1, 9), std::invalid_argument);
  EXPECT_THROW(a.truncate(1, -1), std::invalid_argument);
  EXPECT_FALSE(a.has_sequence(2));
  EXPECT_TRUE(a.has_sequence(1));
  expect_states(a, 0, 0, 4);
}

TEST(Sequences, EmptyOnesAreAllowed) {
  BlockAllocator a(small(4));
  EXPECT_EQ(a.add_sequence(1, Tokens{}), 0);
  EXPECT_TRUE(a.grow(1, 0).empty());
  a.commit(1, 0);
  a.fork(1, 2);
  EXPECT_EQ(a.match_prefix(1), 0);
  a.free_sequence(1);
  a.free_sequence(2);
  expect_states(a, 0, 0, 4);
}

TEST(Sequences, GrowthIsAllOrNothing) {
  BlockAllocator a(small(4));
  a.add_sequence(1, range(0, 100));
  EXPECT_TRUE(a.can_grow(1, 16));
  EXPECT_FALSE(a.can_grow(1, 17));
  EXPECT_THROW(a.grow(1, 17), OutOfBlocksError);
  expect_states(a, 0, 0, 4);
  EXPECT_EQ(a.sequence(1).num_reserved_tokens, 0);
}

TEST(Sequences, NegativeAndExtremeIdsWork) {
  BlockAllocator a(small(4));
  const std::vector<SequenceId> ids{-1, 0, std::numeric_limits<SequenceId>::min(), std::numeric_limits<SequenceId>::max()};
  const Tokens extremes{std::numeric_limits<TokenId>::min(), -1, std::numeric_limits<TokenId>::max(), 0, 5};
  for (const SequenceId id : ids) a.add_sequence(id, extremes);
  compute(a, -1);
  EXPECT_EQ(a.num_cached_tokens(extremes), 4);
  for (const SequenceId id : ids) a.free_sequence(id);
  EXPECT_TRUE(a.sequence_ids().empty());
  expect_states(a, 0, 1, 3);
}

// ---- Forks. ----

TEST(Forks, ShareUntilWritten) {
  BlockAllocator a(small(8));
  add_computed(a, 1, range(0, 6));
  a.fork(1, 2);
  a.fork(1, 3);
  EXPECT_EQ(a.block_table(2), (Ids{0, 1}));
  EXPECT_EQ(a.num_references(1), 3);
  EXPECT_EQ(a.num_blocks_needed(2, 1), 1);
  EXPECT_EQ(a.grow(2, 1), (Copies{{1, 2}}));
  EXPECT_EQ(a.grow(3, 1), (Copies{{1, 3}}));
  EXPECT_TRUE(a.grow(1, 1).empty());  // the last holder writes in place
  EXPECT_EQ(a.num_references(0), 3);
  EXPECT_EQ(a.stats().num_copies, 2);
  a.check();
}

TEST(Forks, FullLastBlockNeedsNoCopy) {
  BlockAllocator a(small(8));
  add_computed(a, 1, range(0, 8));
  a.fork(1, 2);
  EXPECT_TRUE(a.grow(1, 1).empty());
  EXPECT_TRUE(a.grow(2, 1).empty());
  EXPECT_NE(a.block_table(1)[2], a.block_table(2)[2]);
  a.check();
}

TEST(Forks, UncomputedBlocksStayWithTheParent) {
  BlockAllocator a(small(8));
  a.add_sequence(1, range(0, 12));
  a.grow(1, 12);
  a.commit(1, 5);
  a.fork(1, 2);
  EXPECT_EQ(a.block_table(1), (Ids{0, 1, 2}));
  EXPECT_EQ(a.block_table(2), (Ids{0, 1}));
  a.commit(1, 7);  // the parent fills the shared block, which enters the cache
  EXPECT_EQ(a.grow(2, 1), (Copies{{1, 3}}));
  a.check();
}

TEST(Forks, TheSurvivorOfAFilledSharedBlockTakesItOutOfTheCache) {
  BlockAllocator a(small(8));
  a.add_sequence(1, range(0, 8));
  a.grow(1, 8);
  a.commit(1, 5);
  a.fork(1, 2);
  a.commit(1, 3);
  a.free_sequence(1);
  EXPECT_EQ(a.num_cached_tokens(range(0, 9)), 8);
  EXPECT_TRUE(a.grow(2, 1).empty());  // writes position 5 in place
  EXPECT_EQ(a.num_cached_tokens(range(0, 9)), 4);
  a.check();
}

TEST(Forks, DisagreeingTokensStayOutOfTheCache) {
  BlockAllocator a(small(8));
  a.add_sequence(1, range(0, 3));
  a.grow(1, 4);
  a.commit(1, 4);
  a.fork(1, 2);
  a.append_tokens(1, Tokens{3});
  a.append_tokens(2, Tokens{99});
  EXPECT_TRUE(a.sequence(1).is_cacheable);
  EXPECT_FALSE(a.sequence(2).is_cacheable);
  EXPECT_EQ(a.num_cached_tokens(range(0, 5)), 4);
  a.check();
}

// ---- Truncation, preemption, windows. ----

TEST(Truncate, GivesUpBlocksAndUncachesWhatIsOverwritten) {
  BlockAllocator a(small(8));
  add_computed(a, 1, range(0, 12));
  a.truncate(1, 6);
  EXPECT_EQ(a.sequence(1).num_tokens, 6);
  EXPECT_EQ(a.sequence(1).num_computed_tokens, 6);
  expect_states(a, 2, 1, 5);
  EXPECT_EQ(a.num_cached_tokens(range(0, 13)), 12);  // nothing is overwritten yet
  a.append_tokens(1, range(60, 3));
  compute(a, 1);
  EXPECT_EQ(a.num_cached_tokens(range(0, 13)), 4);
  a.check();
}

TEST(Truncate, CopiesWhenAnotherSequenceHoldsTheBlock) {
  BlockAllocator a(small(8));
  add_computed(a, 1, range(0, 9));
  EXPECT_EQ(a.add_sequence(2, range(0, 9)), 8);
  a.truncate(1, 6);
  EXPECT_EQ(a.grow(1, 1).size(), 1U);
  EXPECT_EQ(a.num_cached_tokens(range(0, 9)), 8);
  a.check();
}

TEST(Truncate, ToNothing) {
  BlockAllocator a(small(8));
  add_computed(a, 1, range(0, 9));
  a.truncate(1, 0);
  EXPECT_EQ(a.sequence(1).num_blocks, 0);
  expect_states(a, 0, 2, 6);
}

TEST(Preempt, KeepsTokensAndHitsItsOwnBlocks) {
  BlockAllocator a(small(8));
  add_computed(a, 1, range(0, 10));
  EXPECT_THROW(a.match_prefix(1), std::invalid_argument);
  a.preempt(1);
  EXPECT_EQ(a.sequence(1).num_tokens, 10);
  EXPECT_EQ(a.sequence(1).num_computed_tokens, 0);
  expect_states(a, 0, 2, 6);
  EXPECT_EQ(a.match_prefix(1), 8);
  compute(a, 1);
  EXPECT_EQ(a.sequence(1).num_computed_tokens, 10);
  a.check();
}

TEST(Window, ReleasesWhatNoQueryCanSee) {
  BlockAllocator a(small(8));
  add_computed(a, 1, range(0, 14));
  EXPECT_EQ(a.release_out_of_window(1, 100), 0);
  // The next query stands at 14 and sees 14 - 6 + 1 = 9 and later: blocks 0 and 1 are out, 9 is in block 2.
  EXPECT_EQ(a.release_out_of_window(1, 6), 2);
  EXPECT_EQ(a.release_out_of_window(1, 6), 0);
  EXPECT_EQ(a.block_table(1), (Ids{-1, -1, 2, 3}));
  EXPECT_EQ(a.sequence(1).num_released_blocks, 2);
  expect_states(a, 2, 2, 4);
  a.append_tokens(1, range(14, 4));
  compute(a, 1);
  EXPECT_EQ(a.block_table(1), (Ids{-1, -1, 2, 3, 4}));
  EXPECT_THROW(a.truncate(1, 7), std::invalid_argument);
  a.truncate(1, 9);
  a.fork(1, 2);
  EXPECT_EQ(a.block_table(2), (Ids{-1, -1, 2}));
  a.check();
  a.free_sequence(1);
  a.free_sequence(2);
  a.check();
  EXPECT_EQ(a.num_cached_tokens(range(0, 14)), 12);
}

TEST(Window, BoundaryAgreesWithTheDefinition) {
  for (std::int64_t computed = 0; computed <= 20; ++computed) {
    for (std::int64_t window = 1; window <= 22; ++window) {
      BlockAllocator a(small(8));
      a.add_sequence(1, range(0, computed));
      compute(a, 1);
      a.release_out_of_window(1, window);
      const Ids table = a.block_table(1);
      for (std::int64_t position = 0; position < computed; ++position) {
        const bool seen = computed - position < window;
        EXPECT_TRUE(!seen || table[static_cast<std::size_t>(position / 4)] != kNoBlock);
      }
      for (std::size_t i = 0; i < table.size(); ++i) {
        const auto last = static_cast<std::int64_t>(i) * 4 + 3;
        EXPECT_EQ(table[i] == kNoBlock, last < computed && computed - last >= window);
      }
    }
  }
}

TEST(Window, UnreachableTailsAreNotCached) {
  BlockAllocator a(small(4));
  add_computed(a, 1, range(0, 12));
  a.release_out_of_window(1, 2);
  expect_states(a, 1, 2, 1);
  const Ids others = a.allocate(3);  // evicts what was released
  a.free_sequence(1);
  expect_states(a, 3, 0, 1);
  a.free(others);
}

// ---- Host tier. ----

TEST(Swap, OutAndInWithTransfersOnlyForWhatTheCacheLost) {
  BlockAllocator a(small(4, 4, 4));
  add_computed(a, 1, range(0, 10));
  a.grow(1, 6);
  EXPECT_TRUE(a.can_swap_out(1));
  EXPECT_EQ(a.swap_out(1), (Copies{{0, 0}, {1, 1}, {2, 2}}));
  EXPECT_TRUE(a.sequence(1).is_swapped);
  EXPECT_EQ(a.block_table(1), (Ids{0, 1, 2}));
  EXPECT_EQ(a.stats().num_host_free, 1);
  expect_states(a, 0, 2, 2);
  EXPECT_THROW(a.grow(1, 1), std::invalid_argument);
  EXPECT_THROW(a.swap_out(1), std::invalid_argument);
  EXPECT_THROW(a.commit(1, 0), std::invalid_argument);
  a.append_tokens(1, Tokens{10});
  const Ids others = a.allocate(3);  // evicts block 1
  EXPECT_FALSE(a.can_swap_in(1));
  EXPECT_THROW(a.swap_in(1), OutOfBlocksError);
  a.free(others);
  EXPECT_TRUE(a.can_swap_in(1));
  const Copies copies = a.swap_in(1);
  ASSERT_EQ(copies.size(), 2U);  // block 0 was still cached
  EXPECT_EQ(copies[0].src, 1);
  EXPECT_EQ(copies[1].src, 2);
  EXPECT_EQ(a.block_table(1), (Ids{0, copies[0].dst, copies[1].dst}));
  EXPECT_EQ(a.stats().num_host_free, 4);
  EXPECT_EQ(a.num_cached_tokens(range(0, 10)), 8);
  compute(a, 1);
  a.check();
}

TEST(Swap, FullHostTierIsRefused) {
  BlockAllocator a(small(8, 4, 2));
  add_computed(a, 1, range(0, 12));
  EXPECT_FALSE(a.can_swap_out(1));
  expect_error<OutOfBlocksError>([&] { a.swap_out(1); }, "swap_out] host blocks: expected at most 2 available, got 3");
  expect_states(a, 3, 0, 5);
}

TEST(Swap, FreeingOrPreemptingASwappedSequenceFreesTheHost) {
  BlockAllocator a(small(8, 4, 4));
  add_computed(a, 1, range(0, 7));
  add_computed(a, 2, range(50, 7));
  a.swap_out(1);
  a.swap_out(2);
  EXPECT_EQ(a.stats().num_host_free, 0);
  a.free_sequence(1);
  a.preempt(2);
  EXPECT_EQ(a.stats().num_host_free, 4);
  EXPECT_FALSE(a.sequence(2).is_swapped);
  EXPECT_EQ(a.match_prefix(2), 4);
  a.check();
}

TEST(Swap, KeepsReleasedBlocksReleased) {
  BlockAllocator a(small(8, 4, 4));
  add_computed(a, 1, range(0, 14));
  a.release_out_of_window(1, 6);
  EXPECT_EQ(a.swap_out(1).size(), 2U);
  a.check();
  a.free(a.allocate(8));
  EXPECT_EQ(a.swap_in(1).size(), 2U);
  EXPECT_EQ(a.block_table(1)[0], kNoBlock);
  EXPECT_EQ(a.block_table(1)[1], kNoBlock);
  a.check();
}

// ---- Batches. ----

struct Arrays {
  Arrays(std::int64_t seqs, std::int64_t columns, std::int64_t slots)
      : tables(static_cast<std::size_t>(seqs * (columns + 3)), 77),
        slot_mapping(static_cast<std::size_t>(slots), 77),
        seq_lens(static_cast<std::size_t>(seqs), 77),
        query_start_loc(static_cast<std::size_t>(seqs + 1), 77),
        positions(static_cast<std::size_t>(slots), 77) {
    view.block_tables = tables.data();
    view.block_tables_stride = columns + 3;
    view.max_blocks_per_seq = columns;
    view.slot_mapping = slot_mapping.data();
    view.max_tokens = slots;
    view.seq_lens = seq_lens.data();
    view.query_start_loc = query_start_loc.data();
    view.max_seqs = seqs;
    view.positions = positions.data();
  }
  std::vector<std::int32_t> tables;
  std::vector<std::int64_t> slot_mapping;
  std::vector<std::int32_t> seq_lens;
  std::vector<std::int32_t> query_start_loc;
  std::vector<std::int64_t> positions;
  BatchView view;
};

using SeqIds = std::vector<SequenceId>;
using Counts = std::vector<std::int64_t>;

TEST(Batch, WritesEveryArrayAndItsPadding) {
  BlockAllocator a(small(16));
  add_computed(a, 1, range(0, 6));
  a.append_tokens(1, Tokens{6});
  a.add_sequence(2, range(50, 10));
  Arrays arrays(3, 4, 8);
  EXPECT_TRUE(a.grow_and_write_batch(SeqIds{2, 1}, Counts{5, 1}, arrays.view).empty());
  EXPECT_EQ(arrays.tables, (std::vector<std::int32_t>{2,  3,  -1, -1, 77, 77, 77,  //
                                                      0,  1,  -1, -1, 77, 77, 77,  //
                                                      -1, -1, -1, -1, 77, 77, 77}));
  EXPECT_EQ(arrays.slot_mapping, (std::vector<std::int64_t>{8, 9, 10, 11, 12, 6, -1, -1}));
  EXPECT_EQ(arrays.seq_lens, (std::vector<std::int32_t>{5, 7, 0}));
  EXPECT_EQ(arrays.query_start_loc, (std::vector<std::int32_t>{0, 5, 6, 6}));
  EXPECT_EQ(arrays.positions, (std::vector<std::int64_t>{0, 1, 2, 3, 4, 6, -1, -1}));
  a.commit_batch(SeqIds{2, 1}, Counts{5, 1});
  EXPECT_EQ(a.sequence(2).num_computed_tokens, 5);
  EXPECT_EQ(a.sequence(1).num_computed_tokens, 7);
  a.check();
}

TEST(Batch, WriteBatchAgreesWithTheFusedCall) {
  BlockAllocator a(small(16));
  a.add_sequence(1, range(0, 9));
  a.add_sequence(2, range(50, 3));
  Arrays fused(2, 3, 12), separate(2, 3, 12);
  a.grow_and_write_batch(SeqIds{1, 2}, Counts{9, 3}, fused.view);
  separate.view.positions = nullptr;
  a.write_batch(SeqIds{1, 2}, Counts{9, 3}, separate.view);
  EXPECT_EQ(fused.tables, separate.tables);
  EXPECT_EQ(fused.slot_mapping, separate.slot_mapping);
  EXPECT_EQ(fused.seq_lens, separate.seq_lens);
  EXPECT_EQ(fused.query_start_loc, separate.query_start_loc);
  EXPECT_EQ(separate.positions.front(), 77);
}

TEST(Batch, EmptyOnesAreOnlyPadding) {
  BlockAllocator a(small(4));
  a.add_sequence(1, range(0, 3));
  Arrays arrays(2, 2, 2);
  a.grow_and_write_batch(SeqIds{}, Counts{}, arrays.view);
  EXPECT_EQ(arrays.query_start_loc, (std::vector<std::int32_t>{0, 0, 0}));
  EXPECT_EQ(arrays.slot_mapping, (std::vector<std::int64_t>{-1, -1}));
  a.grow_and_write_batch(SeqIds{1}, Counts{0}, arrays.view);
  EXPECT_EQ(arrays.seq_lens, (std::vector<std::int32_t>{0, 0}));
  Arrays nothing(0, 0, 0);
  nothing.view.block_tables = nullptr;
  nothing.view.slot_mapping = nullptr;
  nothing.view.seq_lens = nullptr;
  a.write_batch(SeqIds{}, Counts{}, nothing.view);
  EXPECT_EQ(nothing.query_start_loc, (std::vector<std::int32_t>{0}));
  expect_states(a, 0, 0, 4);
}

TEST(Batch, ReleasedBlocksAreMinusOne) {
  BlockAllocator a(small(8));
  add_computed(a, 1, range(0, 14));
  a.release_out_of_window(1, 6);
  Arrays arrays(1, 4, 1);
  a.grow_and_write_batch(SeqIds{1}, Counts{1}, arrays.view);
  EXPECT_EQ((Ids{arrays.tables.begin(), arrays.tables.begin() + 4}), (Ids{-1, -1, 2, 3}));
  EXPECT_EQ(arrays.slot_mapping[0], 3 * 4 + 2);
}

TEST(Batch, BadOnesChangeAndWriteNothing) {
  BlockAllocator a(small(6));
  a.add_sequence(1, range(0, 9));
  a.add_sequence(2, range(50, 20));
  const auto expect_refused = [&a](const SeqIds& ids, const Counts& counts, auto&& change, const std::string& part) {
    Arrays arrays(2, 3, 12);
    change(arrays.view);
    try {
      a.grow_and_write_batch(ids, counts, arrays.view);
      ADD_FAILURE() << "nothing thrown: " << part;
    } catch (const std::exception& error) {
      EXPECT_NE(std::string(error.what()).find(part), std::string::npos) << error.what();
    }
    const auto untouched = [](const auto& v) { return std::all_of(v.begin(), v.end(), [](auto x) { return x == 77; }); };
    EXPECT_TRUE(untouched(arrays.tables) && untouched(arrays.slot_mapping) && untouched(arrays.seq_lens) &&
                untouched(arrays.query_start_loc) && untouched(arrays.positions));
    expect_states(a, 0, 0, 6);
  };
  const auto as_is = [](BatchView&) {};
  expect_refused({1, 1}, {1, 1}, as_is, "seq_ids: expected every sequence once, got 1 twice");
  expect_refused({1, 3}, {1, 1}, as_is, "seq_ids: expected the id of a sequence, got 3");
  expect_refused({1}, {1, 1}, as_is, "num_scheduled_tokens: expected 1 values, got 2");
  expect_refused({1}, {-1}, as_is, "num_scheduled_tokens: expected at least 0, got -1");
  expect_refused({1, 2}, {9, 4}, as_is, "slot_mapping: expected room for 13 tokens, got 12");
  expect_refused({1}, {13}, as_is, "block_tables: expected at least 4 columns, got 3");
  expect_refused({1, 2}, {1, 1}, [](BatchView& v) { v.max_seqs = 1; }, "seq_lens: expected room for 2 sequences, got 1");
  expect_refused({1}, {1}, [](BatchView& v) { v.block_tables_stride = 2; }, "row stride");
  expect_refused({1}, {1}, [](BatchView& v) { v.block_tables = nullptr; }, "block_tables: expected memory");
  expect_refused({1}, {1}, [](BatchView& v) { v.slot_mapping = nullptr; }, "slot_mapping: expected memory");
  expect_refused({1}, {1}, [](BatchView& v) { v.seq_lens = nullptr; }, "seq_lens: expected memory");
  expect_refused({1}, {1}, [](BatchView& v) { v.query_start_loc = nullptr; }, "query_start_loc: expected memory");
  const Ids taken = a.allocate(4);
  Arrays arrays(2, 3, 12);
  EXPECT_THROW(a.grow_and_write_batch(SeqIds{1, 2}, Counts{4, 8}, arrays.view), OutOfBlocksError);
  expect_states(a, 4, 0, 2);
  expect_error<std::invalid_argument>([&] { a.write_batch(SeqIds{1}, Counts{1}, arrays.view); },
                                      "grow made room for, got 1 for sequence 1");
}

TEST(Batch, TheLastOfTheSharersNeedsNoBlock) {
  BlockAllocator a(small(4));
  add_computed(a, 1, range(0, 6));
  a.fork(1, 2);
  a.fork(1, 3);
  Arrays arrays(3, 4, 8);
  // Two copies are all that there is room for, and all that is needed.
  EXPECT_EQ(a.grow_and_write_batch(SeqIds{3, 1, 2}, Counts{1, 1, 1}, arrays.view), (Copies{{1, 2}, {1, 3}}));
  a.check();
}

TEST(Batch, NoDestinationOfACopyIsAnotherCopysSource) {
  BlockAllocator a(small(64));
  add_computed(a, 0, range(0, 6));
  SeqIds ids{0};
  for (SequenceId id = 1; id < 20; ++id) {
    a.fork(0, id);
    ids.push_back(id);
  }
  Arrays arrays(20, 4, 40);
  const Copies copies = a.grow_and_write_batch(ids, Counts(20, 2), arrays.view);
  EXPECT_EQ(copies.size(), 19U);
  std::set<BlockId> sources, destinations;
  for (const BlockCopy& copy : copies) {
    sources.insert(copy.src);
    EXPECT_TRUE(destinations.insert(copy.dst).second);
  }
  for (const BlockId id : destinations) EXPECT_EQ(sources.count(id), 0U);
}

TEST(Batch, CommonPrefix) {
  BlockAllocator a(small(16));
  add_computed(a, 1, range(0, 9));
  a.add_sequence(2, range(0, 20));
  a.fork(1, 3);
  EXPECT_EQ(a.num_common_prefix_blocks(SeqIds{1, 2, 3}), 2);
  EXPECT_EQ(a.num_common_prefix_blocks(SeqIds{1}), 2);
  EXPECT_EQ(a.num_common_prefix_blocks(SeqIds{}), 0);
  add_computed(a, 4, range(70, 9));
  EXPECT_EQ(a.num_common_prefix_blocks(SeqIds{1, 4}), 0);
  a.release_out_of_window(1, 1);
  EXPECT_EQ(a.num_common_prefix_blocks(SeqIds{1, 3}), 0);
  EXPECT_EQ(a.num_common_prefix_blocks(SeqIds{3, 1}), 0);
}

TEST(Batch, CommitIsAllOrNothing) {
  BlockAllocator a(small(8));
  a.add_sequence(1, range(0, 4));
  a.add_sequence(2, range(50, 4));
  a.grow(1, 4);
  a.grow(2, 2);
  EXPECT_THROW(a.commit_batch(SeqIds{1, 2}, Counts{4, 3}), std::invalid_argument);
  EXPECT_THROW(a.commit_batch(SeqIds{1, 1}, Counts{2, 2}), std::invalid_argument);
  EXPECT_EQ(a.sequence(1).num_computed_tokens, 0);
  a.commit_batch(SeqIds{1, 2}, Counts{4, 2});
  EXPECT_EQ(a.sequence(1).num_computed_tokens, 4);
  a.check();
}

// ---- Prefix cache: hashes, events, reset. ----

// SipHash-2-4-128 again, byte by byte from its specification, as the oracle.
BlockHash siphash_reference(const BlockHash& key, const std::vector<unsigned char>& in) {
  std::array<std::uint64_t, 4> v{0x736f6d6570736575U ^ key.lo, 0x646f72616e646f6dU ^ key.hi, 0x6c7967656e657261U ^ key.lo,
                                 0x7465646279746573U ^ key.hi};
  v[1] ^= 0xee;
  const auto rotl = [](std::uint64_t x, int b) { return x << b | x >> (64 - b); };
  const auto rounds = [&](int count) {
    while (count-- > 0) {
      v[0] += v[1], v[1] = rotl(v[1], 13) ^ v[0], v[0] = rotl(v[0], 32);
      v[2] += v[3], v[3] = rotl(v[3], 16) ^ v[2];
      v[0] += v[3], v[3] = rotl(v[3], 21) ^ v[0];
      v[2] += v[1], v[1] = rotl(v[1], 17) ^ v[2], v[2] = rotl(v[2], 32);
    }
  };
  std::vector<unsigned char> padded = in;
  while (padded.size() % 8 != 7) padded.push_back(0);
  padded.push_back(static_cast<unsigned char>(in.size()));
  for (std::size_t i = 0; i < padded.size(); i += 8) {
    std::uint64_t word = 0;
    for (std::size_t j = 8; j-- > 0;) word = word << 8 | padded[i + j];
    v[3] ^= word;
    rounds(2);
    v[0] ^= word;
  }
  BlockHash out;
  v[2] ^= 0xee;
  rounds(4);
  out.lo = v[0] ^ v[1] ^ v[2] ^ v[3];
  v[1] ^= 0xdd;
  rounds(4);
  out.hi = v[0] ^ v[1] ^ v[2] ^ v[3];
  return out;
}

void put_le(std::vector<unsigned char>& bytes, std::uint64_t value, int count) {
  for (int i = 0; i < count; ++i) bytes.push_back(static_cast<unsigned char>(value >> (8 * i)));
}

TEST(Hashes, AreTheDocumentedFunction) {
  const BlockHash key{0x0706050403020100U, 0x0f0e0d0c0b0a0908U};
  // The published test vectors for inputs of length 0 and 1.
  EXPECT_EQ(siphash_reference(key, {}), (BlockHash{0xe6a825ba047f81a3U, 0x930255c71472f66dU}));
  EXPECT_EQ(siphash_reference(key, {0}), (BlockHash{0x44af996bd8c187daU, 0x45fc229b11597634U}));
  for (const std::int64_t block_size : {1, 2, 3, 4, 5, 16, 100}) {
    BlockAllocatorOptions options = small(4, block_size);
    options.hash_key = key;
    const BlockAllocator a(options);
    const Tokens tokens = range(-3, block_size * 3 + 1);
    const auto hashes = a.hash_blocks(tokens, "pepper", std::vector<ExtraKey>{{block_size, "x"}});
    ASSERT_EQ(hashes.size(), static_cast<std::size_t>(3 + (block_size == 1 ? 1 : 0)));
    BlockHash parent;
    for (std::size_t i = 0; i < hashes.size(); ++i) {
      std::vector<unsigned char> bytes, extra;
      put_le(bytes, parent.lo, 8);
      put_le(bytes, parent.hi, 8);
      if (i == 0) {
        extra.push_back('s');
        put_le(extra, 6, 8);
        for (const char c : std::string("pepper")) extra.push_back(static_cast<unsigned char>(c));
      } else if (i == 1) {
        extra.push_back('k');
        put_le(extra, static_cast<std::uint64_t>(block_size), 8);
        put_le(extra, 1, 8);
        extra.push_back('x');
      }
      if (!extra.empty()) {
        const BlockHash digest = siphash_reference(key, extra);
        put_le(bytes, digest.lo, 8);
        put_le(bytes, digest.hi, 8);
      }
      for (std::size_t j = 0; j < static_cast<std::size_t>(block_size); ++j) {
        put_le(bytes, static_cast<std::uint32_t>(tokens[i * static_cast<std::size_t>(block_size) + j]), 4);
      }
      parent = siphash_reference(key, bytes);
      EXPECT_EQ(hashes[i], parent) << block_size << " " << i;
    }
  }
}

TEST(Hashes, AreKeyedPerAllocator) {
  const BlockAllocator a(small(4)), b(small(4));
  EXPECT_NE(a.hash_blocks(range(0, 4)).front(), b.hash_blocks(range(0, 4)).front());
}

TEST(Hashes, AConstantFunctionGivesTheSameResults) {
  BlockAllocatorOptions constant = small(32);
  constant.hash_function = [](const BlockHash&, std::span<const TokenId>, std::span<const std::byte>) { return BlockHash{1, 2}; };
  BlockAllocator a(small(32)), b(constant);
  std::mt19937 random(3);
  for (SequenceId id = 0; id < 500; ++id) {
    Tokens tokens(1 + random() % 24);
    for (TokenId& token : tokens) token = static_cast<TokenId>(random() % 2);
    const std::string salt = random() % 3 == 0 ? "salt" : "";
    ASSERT_EQ(a.add_sequence(id, tokens, salt), b.add_sequence(id, tokens, salt));
    compute(a, id);
    compute(b, id);
    ASSERT_EQ(a.block_table(id), b.block_table(id));
    if (id >= 4) {
      a.free_sequence(id - 4);
      b.free_sequence(id - 4);
    }
    a.check();
    b.check();
  }
  EXPECT_GT(a.stats().num_hit_tokens, 0);
  EXPECT_EQ(a.stats().num_hit_tokens, b.stats().num_hit_tokens);
}

TEST(Hashes, TheExtraBytesReachAnInjectedFunction) {
  std::vector<std::string> seen;
  BlockAllocatorOptions options = small(8);
  options.hash_function = [&seen](const BlockHash&, std::span<const TokenId>, std::span<const std::byte> extra) {
    seen.emplace_back(reinterpret_cast<const char*>(extra.data()), extra.size());
    return BlockHash{};
  };
  BlockAllocator a(options);
  add_computed(a, 1, range(0, 8), "pepper");
  ASSERT_GE(seen.size(), 2U);
  EXPECT_NE(seen.front().find("pepper"), std::string::npos);
  EXPECT_TRUE(seen.back().empty());
}

TEST(Events, TellWhatCanBeHit) {
  BlockAllocator a(small(2));
  add_computed(a, 1, range(0, 8));
  const auto hashes = a.hash_blocks(range(0, 8));
  auto events = a.take_events();
  ASSERT_EQ(events.size(), 2U);
  EXPECT_EQ(events[0].kind, Kind::kStored);
  EXPECT_EQ(events[0].hash, hashes[0]);
  EXPECT_EQ(events[0].parent_hash, BlockHash{});
  EXPECT_EQ(events[0].token_ids, range(0, 4));
  EXPECT_EQ(events[1].hash, hashes[1]);
  EXPECT_EQ(events[1].parent_hash, hashes[0]);
  EXPECT_EQ(events[1].block_id, 1);
  a.free_sequence(1);
  EXPECT_TRUE(a.take_events().empty());
  a.free(a.allocate(1));
  events = a.take_events();
  ASSERT_EQ(events.size(), 1U);
  EXPECT_EQ(events[0].kind, Kind::kRemoved);
  EXPECT_EQ(events[0].hash, hashes[1]);
  a.reset_prefix_cache();
  events = a.take_events();
  ASSERT_EQ(events.size(), 1U);
  EXPECT_EQ(events[0].kind, Kind::kCleared);
}

TEST(Events, LossIsTold) {
  BlockAllocatorOptions options = small(64);
  options.max_events = 4;
  BlockAllocator a(options);
  add_computed(a, 1, range(0, 24));
  const auto events = a.take_events();
  ASSERT_EQ(events.size(), 3U);
  EXPECT_EQ(events[0].kind, Kind::kLost);
  EXPECT_EQ(events[1].token_ids, range(16, 4));
  EXPECT_EQ(events[2].token_ids, range(20, 4));
  options.max_events = 1;
  BlockAllocator b(options);
  add_computed(b, 1, range(0, 24));
  EXPECT_EQ(b.take_events().size(), 1U);
}

TEST(Events, CanBeOff) {
  BlockAllocatorOptions options = small(8);
  options.enable_events = false;
  BlockAllocator a(options);
  add_computed(a, 1, range(0, 24));
  EXPECT_TRUE(a.take_events().empty());
}

TEST(Reset, ForgetsAndTaintsWhatIsRunning) {
  BlockAllocator a(small(16, 4, 8));
  add_computed(a, 1, range(0, 8));
  add_computed(a, 2, range(50, 8));
  a.add_sequence(3, range(80, 8));
  a.add_sequence(4, range(90, 8));
  a.grow(4, 8);  // being computed while the reset comes
  add_computed(a, 5, range(110, 8));
  a.swap_out(5);
  a.free_sequence(2);
  a.reset_prefix_cache();
  expect_states(a, 4, 0, 12);
  EXPECT_EQ(a.num_cached_tokens(range(0, 9)), 0);
  a.append_tokens(1, range(8, 8));
  compute(a, 1);
  a.commit(4, 8);
  a.swap_in(5);
  EXPECT_FALSE(a.sequence(1).is_cacheable);
  EXPECT_EQ(a.num_cached_tokens(range(0, 17)), 0);
  EXPECT_EQ(a.num_cached_tokens(range(90, 9)), 0);
  EXPECT_EQ(a.num_cached_tokens(range(110, 9)), 0);
  compute(a, 3);  // had nothing computed: clean
  EXPECT_EQ(a.num_cached_tokens(range(80, 9)), 8);
  a.preempt(1);
  compute(a, 1);  // recomputed: clean
  EXPECT_EQ(a.num_cached_tokens(range(0, 17)), 16);
  a.check();
}

TEST(PrefixCache, CanBeOff) {
  BlockAllocatorOptions options = small(8, 4, 8);
  options.enable_prefix_cache = false;
  BlockAllocator a(options);
  add_computed(a, 1, range(0, 9));
  EXPECT_EQ(a.add_sequence(2, range(0, 9)), 0);
  EXPECT_EQ(a.num_cached_tokens(range(0, 9)), 0);
  a.fork(1, 3);
  a.release_out_of_window(1, 2);
  a.truncate(3, 5);
  a.swap_out(1);
  a.swap_in(1);
  a.reset_prefix_cache();
  a.check();
  for (SequenceId id : {1, 2, 3}) a.free_sequence(id);
  expect_states(a, 0, 0, 8);
  EXPECT_EQ(a.hash_blocks(range(0, 9)).size(), 2U);
}

// ---- Random use against a simulated cache. ----

// Keeps, for every slot, a fingerprint of what its keys and values were computed from: all tokens up to it, the salt, and the
// weights. Whatever the allocator does, a sequence must find its own fingerprints in its blocks.
class Simulation {
 public:
  Simulation(BlockAllocatorOptions options, std::uint64_t seed, bool orphans)
      : a_(options),
        bs_(options.block_size),
        orphans_(orphans),
        device_(static_cast<std::size_t>(options.num_blocks * bs_)),
        host_(static_cast<std::size_t>(options.num_host_blocks * bs_)),
        random_(seed) {}

  void run(std::int64_t num_steps, std::int64_t check_every) {
    for (std::int64_t step = 0; step < num_steps && !testing::Test::HasFatalFailure(); ++step) {
      one_step();
      if (step % check_every == 0) {
        a_.check();
        verify_all();
      }
    }
    drain();
  }

  std::int64_t num_operations() const { return num_operations_; }
  const BlockAllocator& allocator() const { return a_; }

 private:
  static constexpr std::size_t kMaxSequences = 10;

  struct Model {
    Tokens tokens;
    std::string salt;
    std::int64_t num_computed = 0;
    std::uint64_t weights = 0;
    bool is_swapped = false;
  };

  std::uint64_t below(std::uint64_t bound) { return random_() % bound; }

  static std::uint64_t mix(std::uint64_t h, std::uint64_t x) {
    h = (h ^ x) * 0x9e3779b97f4a7c15U;
    return h ^ (h >> 29);
  }

  std::vector<std::uint64_t> fingerprints(const Model& m, std::int64_t count) const {
    std::vector<std::uint64_t> result;
    std::uint64_t h = mix(m.weights + 1, std::hash<std::string>()(m.salt));
    for (std::int64_t i = 0; i < count; ++i) {
      // A token that is computed before it is known will turn out to be 0 (see schedule).
      const auto index = static_cast<std::size_t>(i);
      h = mix(h, static_cast<std::uint64_t>(index < m.tokens.size() ? m.tokens[index] : 0));
      result.push_back(h);
    }
    return result;
  }

  void copy(std::vector<std::uint64_t>& to, const std::vector<std::uint64_t>& from, const Copies& copies) {
    std::set<BlockId> destinations;
    for (const BlockCopy& c : copies) ASSERT_TRUE(destinations.insert(c.dst).second);
    for (const BlockCopy& c : copies) {
      ASSERT_TRUE(&to != &from || destinations.count(c.src) == 0);
      std::copy_n(from.begin() + c.src * bs_, bs_, to.begin() + c.dst * bs_);
    }
  }

  void verify(SequenceId id, const Model& m) {
    const SequenceInfo info = a_.sequence(id);
    ASSERT_EQ(info.num_computed_tokens, m.num_computed);
    ASSERT_EQ(info.num_tokens, static_cast<std::int64_t>(m.tokens.size()));
    ASSERT_EQ(info.is_swapped, m.is_swapped);
    const Ids table = a_.block_table(id);
    const auto expected = fingerprints(m, m.num_computed);
    const auto& memory = m.is_swapped ? host_ : device_;
    for (std::int64_t i = info.num_released_blocks * bs_; i < m.num_computed; ++i) {
      const BlockId block = table[static_cast<std::size_t>(i / bs_)];
      ASSERT_EQ(memory[static_cast<std::size_t>(block * bs_ + i % bs_)], expected[static_cast<std::size_t>(i)])
          << "sequence " << id << " position " << i;
    }
  }

  void verify_all() {
    for (const auto& [id, m] : models_) verify(id, m);
    const BlockAllocatorStats stats = a_.stats();
    ASSERT_EQ(stats.num_live + stats.num_cached + stats.num_free, stats.num_blocks);
    ASSERT_LE(stats.num_pinned, stats.num_live);
    ASSERT_EQ(stats.num_sequences, static_cast<std::int64_t>(models_.size()));
  }

  SequenceId any(bool resident) {
    std::vector<SequenceId> ids;
    for (const auto& [id, m] : models_) {
      if (m.is_swapped != resident) ids.push_back(id);
    }
    return ids.empty() ? -1 : ids[below(ids.size())];
  }

  void one_step() {
    ++num_operations_;
    switch (below(24)) {
      case 0:
      case 1:
        if (models_.size() < kMaxSequences) add();
        return;
      case 2:
      case 11: {
        const SequenceId id = any(below(4) != 0);
        if (id < 0) return;
        a_.free_sequence(id);
        models_.erase(id);
        return;
      }
      case 3:
      case 12:
      case 13: {
        const SequenceId id = any(true);
        if (id < 0 || models_.size() >= kMaxSequences) return;
        a_.fork(id, ++last_id_);
        models_[last_id_] = models_[id];
        return;
      }
      case 4: return preempt();
      case 5: return swap();
      case 6: {
        const SequenceId id = any(true);
        if (id < 0 || !orphans_) return;
        a_.release_out_of_window(id, 1 + static_cast<std::int64_t>(below(12)));
        return;
      }
      case 7: return truncate();
      case 8: return raw();
      case 9: return pin();
      case 10:
        if (below(200) == 0) {
          a_.reset_prefix_cache();
          ++weights_;
          for (auto& [id, m] : models_) {
            if (a_.sequence(id).num_blocks == 0) m.weights = weights_;
          }
        }
        return;
      default: return schedule();
    }
  }

  void add() {
    Model m;
    m.tokens.resize(below(40));
    // Few distinct prompts with long common prefixes.
    const std::uint64_t family = below(3), length = below(40);
    for (std::size_t i = 0; i < m.tokens.size(); ++i) m.tokens[i] = static_cast<TokenId>(i < length ? family : below(2));
    if (below(4) == 0) m.salt = "salt";
    m.weights = weights_;
    follow_events();
    std::int64_t expected = 0;
    if (!m.tokens.empty()) {
      for (const BlockHash& hash : a_.hash_blocks(std::span(m.tokens).first(m.tokens.size() - 1), m.salt)) {
        if (stored_.count({hash.lo, hash.hi}) == 0) break;
        expected += bs_;
      }
    }
    m.num_computed = a_.num_cached_tokens(m.tokens, m.salt);
    // What the events tell is what can be hit; behind windows and pins some of it may be out of reach.
    if (!orphans_) {
      ASSERT_EQ(m.num_computed, expected);
    } else {
      ASSERT_LE(m.num_computed, expected);
    }
    ASSERT_EQ(a_.add_sequence(++last_id_, m.tokens, m.salt), m.num_computed);
    ASSERT_LE(m.num_computed, std::max<std::int64_t>(0, static_cast<std::int64_t>(m.tokens.size()) - 1));
    verify(last_id_, m);
    models_[last_id_] = m;
  }

  void follow_events() {
    for (const BlockEvent& event : a_.take_events()) {
      const std::pair key(event.hash.lo, event.hash.hi);
      if (event.kind == Kind::kStored) {
        ++stored_[key];
        ASSERT_TRUE(stored_[key] == 1 || orphans_);
      } else if (event.kind == Kind::kRemoved) {
        ASSERT_GT(stored_[key], 0);
        if (--stored_[key] == 0) stored_.erase(key);
      } else {
        ASSERT_EQ(event.kind, Kind::kCleared);
        stored_.clear();
      }
    }
  }

  void preempt() {
    const SequenceId id = any(below(4) != 0);
    if (id < 0) return;
    Model& m = models_[id];
    a_.preempt(id);
    m.is_swapped = false;
    m.weights = weights_;
    m.num_computed = below(2) == 0 ? a_.match_prefix(id) : 0;
    verify(id, m);
  }

  void swap() {
    SequenceId id = any(true);
    if (below(2) == 0 && id >= 0) {
      if (!a_.can_swap_out(id)) {
        EXPECT_THROW(a_.swap_out(id), OutOfBlocksError);
        return;
      }
      copy(host_, device_, a_.swap_out(id));
      models_[id].is_swapped = true;
    } else {
      id = any(false);
      if (id < 0) return;
      if (!a_.can_swap_in(id)) {
        EXPECT_THROW(a_.swap_in(id), OutOfBlocksError);
        return;
      }
      copy(device_, host_, a_.swap_in(id));
      models_[id].is_swapped = false;
    }
    verify(id, models_[id]);
  }

  void truncate() {
    const SequenceId id = any(true);
    if (id < 0 || !orphans_) return;
    Model& m = models_[id];
    const std::int64_t lowest = a_.sequence(id).num_released_blocks * bs_;
    const std::int64_t highest = std::max(static_cast<std::int64_t>(m.tokens.size()), m.num_computed);
    const std::int64_t count = lowest + static_cast<std::int64_t>(below(static_cast<std::uint64_t>(highest - lowest + 1)));
    a_.truncate(id, count);
    m.num_computed = std::min(m.num_computed, count);
    if (count < static_cast<std::int64_t>(m.tokens.size())) m.tokens.resize(static_cast<std::size_t>(count));
  }

  void raw() {
    const auto count = static_cast<std::int64_t>(below(4));
    if (raw_.size() < 12 && below(2) == 0) {
      if (!a_.can_allocate(count)) {
        EXPECT_THROW(a_.allocate(count), OutOfBlocksError);
        return;
      }
      for (const BlockId id : a_.allocate(count)) {
        std::fill_n(device_.begin() + id * bs_, bs_, 0);
        raw_.push_back(id);
      }
    } else if (!raw_.empty()) {
      std::shuffle(raw_.begin(), raw_.end(), random_);
      a_.free(std::span(&raw_.back(), 1));
      raw_.pop_back();
    }
  }

  void pin() {
    if (!orphans_) return;
    const SequenceId id = any(true);
    if (id >= 0 && pinned_.size() < 4) {
      const Ids table = a_.block_table(id);
      const std::int64_t full = a_.sequence(id).num_computed_tokens / bs_;
      if (full == 0) return;
      const BlockId block = table[below(static_cast<std::uint64_t>(full))];
      if (block == kNoBlock) return;
      a_.pin(std::span(&block, 1));
      pinned_.push_back(block);
    } else if (!pinned_.empty()) {
      a_.unpin(std::span(&pinned_.back(), 1));
      pinned_.pop_back();
    }
  }

  // A step of the engine: a batch of prompt chunks, decodes and drafts, its copies, its writes, its commit.
  void schedule() {
    SeqIds ids;
    Counts counts;
    for (const auto& [id, m] : models_) {
      if (m.is_swapped || below(2) == 0) continue;
      const auto known = static_cast<std::int64_t>(m.tokens.size()) - m.num_computed;
      const auto count = static_cast<std::int64_t>(below(static_cast<std::uint64_t>(std::max<std::int64_t>(known, 0) + 3)));
      if (m.num_computed + count > 60) continue;
      ids.push_back(id);
      counts.push_back(count);
      ++num_operations_;
    }
    std::int64_t total = 0;
    for (const std::int64_t count : counts) total += count;
    Arrays arrays(static_cast<std::int64_t>(ids.size() + below(3)), 60 / bs_ + 1, total + static_cast<std::int64_t>(below(5)));
    Copies copies;
    const BlockAllocatorStats before = a_.stats();
    try {
      if (below(2) == 0) {
        copies = a_.grow_and_write_batch(ids, counts, arrays.view);
      } else {
        for (std::size_t i = 0; i < ids.size(); ++i) {
          copy(device_, device_, a_.grow(ids[i], counts[i]));
        }
        a_.write_batch(ids, counts, arrays.view);
      }
    } catch (const OutOfBlocksError&) {
      const SequenceId victim = any(true);
      if (victim >= 0 && before.num_live > 0) {
        a_.preempt(victim);
        models_[victim].num_computed = 0;
        models_[victim].weights = weights_;
      }
      return;
    }
    copy(device_, device_, copies);
    std::size_t token = 0;
    for (std::size_t i = 0; i < ids.size(); ++i) {
      Model& m = models_[ids[i]];
      ASSERT_EQ(arrays.seq_lens[i], m.num_computed + counts[i]);
      ASSERT_EQ(arrays.query_start_loc[i], static_cast<std::int32_t>(token));
      const auto values = fingerprints(m, m.num_computed + counts[i]);
      for (std::int64_t j = 0; j < counts[i]; ++j, ++token) {
        const std::int64_t position = m.num_computed + j;
        ASSERT_EQ(arrays.positions[token], position);
        const std::int64_t slot = arrays.slot_mapping[token];
        ASSERT_EQ(slot / bs_,
                  arrays.tables[i * static_cast<std::size_t>(arrays.view.block_tables_stride) + static_cast<std::size_t>(position / bs_)]);
        ASSERT_EQ(slot % bs_, position % bs_);
        device_[static_cast<std::size_t>(slot)] = values[static_cast<std::size_t>(position)];
      }
    }
    ASSERT_EQ(arrays.query_start_loc[ids.size()], static_cast<std::int32_t>(token));
    // Drafts may be rejected; tokens computed ahead of being known are appended as 0 afterwards, or left for later.
    for (std::size_t i = 0; i < ids.size(); ++i) {
      Model& m = models_[ids[i]];
      if (below(3) == 0) counts[i] = static_cast<std::int64_t>(below(static_cast<std::uint64_t>(counts[i] + 1)));
      m.num_computed += counts[i];
    }
    a_.commit_batch(ids, counts);
    for (const SequenceId id : ids) {
      Model& m = models_[id];
      const std::int64_t unknown = m.num_computed - static_cast<std::int64_t>(m.tokens.size());
      if (unknown > 0 && below(2) == 0) {
        const Tokens zeros(static_cast<std::size_t>(unknown), 0);
        a_.append_tokens(id, zeros);
        m.tokens.insert(m.tokens.end(), zeros.begin(), zeros.end());
      } else if (unknown == 0) {
        const TokenId next = static_cast<TokenId>(below(2));
        a_.append_token_batch(std::span(&id, 1), std::span(&next, 1));
        m.tokens.push_back(next);
      }
    }
  }

  void drain() {
    for (const auto& [id, m] : models_) a_.free_sequence(id);
    models_.clear();
    a_.free(raw_);
    a_.unpin(pinned_);
    a_.check();
    const BlockAllocatorStats stats = a_.stats();
    EXPECT_EQ(stats.num_live, 0);
    EXPECT_EQ(stats.num_host_free, stats.num_host_blocks);
    a_.reset_prefix_cache();
    a_.check();
    EXPECT_EQ(a_.stats().num_free, stats.num_blocks);
  }

  BlockAllocator a_;
  const std::int64_t bs_;
  const bool orphans_;  // also use what can leave blocks cached whose predecessors are gone: windows, pins, truncation
  std::vector<std::uint64_t> device_, host_;
  std::mt19937_64 random_;
  std::map<SequenceId, Model> models_;
  std::map<std::pair<std::uint64_t, std::uint64_t>, int> stored_;
  std::vector<BlockId> raw_, pinned_;
  SequenceId last_id_ = 0;
  std::uint64_t weights_ = 0;
  std::int64_t num_operations_ = 0;
};

std::int64_t scaled(std::int64_t count) {
  const char* const percent = std::getenv("QUIRE_TEST_PERCENT");
  return percent == nullptr ? count : std::max<std::int64_t>(1, count * std::atoll(percent) / 100);
}

TEST(Random, AMillionOperations) {
  std::int64_t num_operations = 0;
  for (std::uint64_t seed = 0; seed < 8; ++seed) {
    const std::int64_t block_size = std::array<std::int64_t, 4>{4, 1, 3, 16}[seed % 4];
    Simulation simulation(small((seed < 4 ? 150 : 500) / block_size + 8, block_size, 100 / block_size), seed, seed % 2 == 1);
    simulation.run(scaled(50000), 50);
    num_operations += simulation.num_operations();
    EXPECT_GT(simulation.allocator().stats().num_hit_tokens, 0);
    EXPECT_TRUE(block_size == 1 || simulation.allocator().stats().num_copies > 0);
    if (testing::Test::HasFatalFailure()) FAIL() << "seed " << seed;
  }
  RecordProperty("num_operations", static_cast<int>(num_operations));
  EXPECT_TRUE(std::getenv("QUIRE_TEST_PERCENT") != nullptr || num_operations >= 1000000) << num_operations;
}

TEST(Random, ConstantAndWeakHashes) {
  for (const std::uint64_t num_values : {1U, 2U, 7U}) {
    BlockAllocatorOptions options = small(60, 2, 10);
    options.hash_function = [num_values](const BlockHash& parent, std::span<const TokenId> tokens, std::span<const std::byte>) {
      const auto value = (parent.lo + static_cast<std::uint64_t>(tokens[0])) % num_values;
      return BlockHash{value, value};
    };
    Simulation(options, num_values, true).run(scaled(5000), 20);
  }
}

// ---- Failing host memory. ----

struct Snapshot {
  explicit Snapshot(const BlockAllocator& a) : stats(a.stats()) {
    for (const SequenceId id : a.sequence_ids()) {
      const SequenceInfo info = a.sequence(id);
      sequences[id] = {info.num_tokens, info.num_computed_tokens, info.num_reserved_tokens, info.num_released_blocks, info.is_swapped};
      tables[id] = a.block_table(id);
    }
  }
  bool operator==(const Snapshot& o) const {
    return stats.num_live == o.stats.num_live && stats.num_cached == o.stats.num_cached && stats.num_free == o.stats.num_free &&
           stats.num_pinned == o.stats.num_pinned && stats.num_host_free == o.stats.num_host_free &&
           stats.num_hit_tokens == o.stats.num_hit_tokens && stats.num_lookup_tokens == o.stats.num_lookup_tokens &&
           stats.num_evictions == o.stats.num_evictions && sequences == o.sequences && tables == o.tables;
  }
  BlockAllocatorStats stats;
  std::map<SequenceId, std::vector<std::int64_t>> sequences;
  std::map<SequenceId, Ids> tables;
};

// Runs f with the first allocation failing, then the second, and so on until it succeeds.
template <typename F>
int expect_strong(BlockAllocator& a, F&& f) {
  const Snapshot before(a);
  for (std::int64_t failing = 0;; ++failing) {
    allocation_countdown = failing;
    try {
      f();
      allocation_countdown = -1;
      a.check();
      return static_cast<int>(failing);
    } catch (const std::bad_alloc&) {
      allocation_countdown = -1;
      a.check();
      EXPECT_TRUE(Snapshot(a) == before) << "changed by a failure of allocation " << failing;
    }
  }
}

TEST(Faults, EveryAllocationMayFail) {
  BlockAllocator a(small(64, 4, 32));
  const Tokens tokens = range(0, 30);
  const std::vector<ExtraKey> keys{{9, "a rather long extra key that needs memory of its own"}};
  const std::string salt = "a salt that is too long to be kept inside the string object";
  Arrays arrays(4, 32, 256);
  const SeqIds ids{1, 2, 3};
  const Counts counts{7, 7, 7};
  int num_failures = 0;
  num_failures += expect_strong(a, [&] { a.add_sequence(1, tokens, salt, keys); });
  num_failures += expect_strong(a, [&] { a.grow(1, 30); });
  num_failures += expect_strong(a, [&] { a.commit(1, 30); });
  num_failures += expect_strong(a, [&] { a.add_sequence(2, tokens, salt, keys); });
  num_failures += expect_strong(a, [&] { a.fork(1, 3); });
  num_failures += expect_strong(a, [&] { a.append_tokens(2, range(30, 100)); });
  num_failures += expect_strong(a, [&] { a.grow_and_write_batch(ids, counts, arrays.view); });
  num_failures += expect_strong(a, [&] { a.commit_batch(ids, counts); });
  num_failures += expect_strong(a, [&] { a.append_token_batch(ids, Tokens{1, 2, 3}); });
  num_failures += expect_strong(a, [&] { a.write_batch(SeqIds{2}, Counts{0}, arrays.view); });
  num_failures += expect_strong(a, [&] { a.swap_out(1); });
  num_failures += expect_strong(a, [&] { a.swap_in(1); });
  num_failures += expect_strong(a, [&] { a.allocate(5); });
  num_failures += expect_strong(a, [&] { a.truncate(1, 11); });
  num_failures += expect_strong(a, [&] { a.release_out_of_window(2, 4); });
  num_failures += expect_strong(a, [&] { a.preempt(3); });
  num_failures += expect_strong(a, [&] { a.match_prefix(3); });
  num_failures += expect_strong(a, [&] { a.free_sequence(1); });
  num_failures += expect_strong(a, [&] { a.reset_prefix_cache(); });
  EXPECT_GT(num_failures, 20);
  for (SequenceId id = 10; id < 60; ++id) {
    expect_strong(a, [&] { a.add_sequence(id, tokens, salt + std::to_string(id)); });
  }
  const std::size_t num_events = [&] {
    std::size_t count = 0;
    expect_strong(a, [&] { count = a.take_events().size(); });
    return count;
  }();
  EXPECT_GT(num_events, 5U);  // a failed call loses none
}

TEST(Faults, AFailingConstructorLeaksNothing) {
  for (std::int64_t failing = 0;; ++failing) {
    BlockAllocatorOptions options = small(64, 4, 32);
    allocation_countdown = failing;
    try {
      const BlockAllocator a(options);
      allocation_countdown = -1;
      EXPECT_GT(failing, 4);
      return;
    } catch (const std::bad_alloc&) {
      allocation_countdown = -1;
    }
  }
}

// ---- Threads. ----

TEST(Threads, ManyEnginesOnOneAllocator) {
  constexpr int kNumThreads = 8;
  BlockAllocatorOptions options = small(256, 4, 64);
  BlockAllocator a(options);
  std::atomic<std::int64_t> num_exhausted{0};
  const auto work = [&](int thread) {
    std::mt19937_64 random(static_cast<std::uint64_t>(thread));
    const std::int64_t num_rounds = scaled(4000);
    for (std::int64_t round = 0; round < num_rounds; ++round) {
      const SequenceId id = round * kNumThreads + thread;
      const Tokens tokens = range(static_cast<TokenId>(random() % 3), 8 + static_cast<std::int64_t>(random() % 40));
      a.add_sequence(id, tokens, random() % 2 == 0 ? "salt" : "");
      try {
        compute(a, id);
        a.fork(id, -id - 1);
        a.append_tokens(-id - 1, tokens);
        compute(a, -id - 1);
        if (random() % 2 == 0) {
          a.swap_out(id);
          a.swap_in(id);
        }
        Arrays arrays(1, 64, 4);
        a.grow_and_write_batch(SeqIds{id}, Counts{2}, arrays.view);
        a.free(a.allocate(2));
      } catch (const OutOfBlocksError&) {
        ++num_exhausted;
      }
      if (a.has_sequence(-id - 1)) a.free_sequence(-id - 1);
      a.free_sequence(id);
      if (round % 64 == 0) {
        a.check();
        a.take_events();
        if (thread == 0) a.reset_prefix_cache();
      }
      a.stats();
      a.usage();
    }
  };
  std::vector<std::thread> threads;
  for (int thread = 0; thread < kNumThreads; ++thread) threads.emplace_back(work, thread);
  for (std::thread& thread : threads) thread.join();
  a.check();
  EXPECT_EQ(a.stats().num_live, 0);
  EXPECT_EQ(a.stats().num_sequences, 0);
  EXPECT_EQ(a.stats().num_host_free, 64);
}

}  // namespace
}  // namespace quire
