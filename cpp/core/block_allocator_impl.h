// The block allocator's state, and the steps that its calls are made of: free list, prefix table, events, sequences, growth.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <mutex>
#include <utility>

#include "core/block_allocator_records.h"
#include "core/block_hash.h"
#include "core/layout.h"
#include "quire/block_allocator.h"

namespace quire {

namespace block_allocator {

inline constexpr std::int64_t kMaxBlocks = (std::int64_t{1} << 31) - 2;  // one more index is the list's sentinel
inline constexpr std::int64_t kMaxBlockSize = 65536;
inline constexpr std::int64_t kMaxSequenceTokens = std::numeric_limits<std::int32_t>::max();
inline constexpr std::int32_t kMaxReferences = std::int32_t{1} << 30;
inline constexpr std::size_t kMaxSpareSequences = 1024;
inline constexpr std::size_t kMaxSpareTokens = 32768;

inline constexpr std::size_t to_index(std::int64_t i) { return static_cast<std::size_t>(i); }

inline std::string text(std::int64_t value) { return std::to_string(value); }

// `function` is null for the constructor.
inline std::string message(const char* function, const char* argument, const std::string& expected, const std::string& got) {
  const std::string where = function == nullptr ? "[BlockAllocator] " : std::string("[BlockAllocator.") + function + "] ";
  return where + argument + ": expected " + expected + ", got " + got;
}

[[noreturn]] inline void fail(const char* function, const char* argument, const std::string& expected, const std::string& got) {
  throw std::invalid_argument(message(function, argument, expected, got));
}

[[noreturn]] inline void fail_index(const char* function, const char* argument, const std::string& expected, const std::string& got) {
  throw IndexError(message(function, argument, expected, got));
}

struct PendingEvent {
  BlockEvent::Kind kind = BlockEvent::Kind::kStored;
  BlockId block_id = kNoBlock;
  BlockHash hash;
  BlockHash parent_hash;
};

struct TableSlot {
  std::uint32_t tag = 0;
  BlockId block_id = kNoBlock;
};

struct GrowStep {
  Sequence* seq = nullptr;
  std::int64_t num_scheduled = 0;
  std::int64_t num_new_blocks = 0;
  bool copies = false;
};

/// Salt and extra keys as unambiguous bytes, one entry per block that they enter.
inline std::vector<ExtraBytes> encode_extras(const char* function, std::string_view salt, std::span<const ExtraKey> extra_keys,
                                             std::int64_t block_size) {
  std::vector<ExtraBytes> extras;
  const auto put = [](std::string& bytes, std::uint64_t value) {
    for (int i = 0; i < 8; ++i) bytes.push_back(static_cast<char>(value >> (8 * i) & 0xffU));
  };
  if (!salt.empty()) {
    std::string bytes = "s";
    put(bytes, salt.size());
    bytes += salt;
    extras.push_back({0, std::move(bytes)});
  }
  if (extra_keys.empty()) return extras;
  std::vector<const ExtraKey*> sorted;
  for (const ExtraKey& key : extra_keys) {
    if (key.token_idx < 0 || key.token_idx >= kMaxSequenceTokens) {
      fail(function, "extra_keys", "a token_idx in [0, " + text(kMaxSequenceTokens) + ")", text(key.token_idx));
    }
    sorted.push_back(&key);
  }
  std::stable_sort(sorted.begin(), sorted.end(), [](const auto* a, const auto* b) { return a->token_idx < b->token_idx; });
  for (const ExtraKey* key : sorted) {
    const std::int64_t block_idx = key->token_idx / block_size;
    if (extras.empty() || extras.back().block_idx != block_idx) extras.push_back({block_idx, {}});
    std::string& bytes = extras.back().bytes;
    bytes += 'k';
    put(bytes, static_cast<std::uint64_t>(key->token_idx));
    put(bytes, key->value.size());
    bytes += key->value;
  }
  return extras;
}

inline BlockAllocatorOptions checked(BlockAllocatorOptions options) {
  const char* const f = nullptr;
  const auto check_range = [f](const char* argument, std::int64_t value, std::int64_t lowest, std::int64_t highest) {
    if (value < lowest || value > highest) fail(f, argument, text(lowest) + " to " + text(highest), text(value));
  };
  check_range("num_blocks", options.num_blocks, 1, kMaxBlocks);
  check_range("block_size", options.block_size, 1, kMaxBlockSize);
  check_range("num_host_blocks", options.num_host_blocks, 0, kMaxBlocks);
  check_range("max_events", options.max_events, 1, std::int64_t{1} << 31);
  if (!(options.watermark >= 0.0 && options.watermark < 1.0)) {
    fail(f, "watermark", "a number in [0, 1)", std::to_string(options.watermark));
  }
  return options;
}

}  // namespace block_allocator

using namespace block_allocator;  // for block_allocator.cpp and block_allocator_check.cpp, which alone include this

struct BlockAllocator::Impl {
  explicit Impl(BlockAllocatorOptions options_in)
      : options(checked(std::move(options_in))),
        key(options.hash_key ? *options.hash_key : random_key()),
        bs(options.block_size),
        n(options.num_blocks),
        watermark_blocks(static_cast<std::int64_t>(std::floor(options.watermark * static_cast<double>(options.num_blocks)))),
        sequences(key.lo ^ key.hi),
        blocks(to_index(n + 1)),
        claims(to_index(n), 0),
        num_free(n) {
    for (std::int64_t i = 0; i <= n; ++i) {
      blocks[to_index(i)].prev = static_cast<BlockId>(i == 0 ? n : i - 1);
      blocks[to_index(i)].next = static_cast<BlockId>(i == n ? 0 : i + 1);
    }
    if (options.enable_prefix_cache) {
      block_tokens = std::make_unique_for_overwrite<TokenId[]>(to_index(n * bs));
      table.resize(std::bit_ceil(to_index(std::max<std::int64_t>(16, n * 2))));
      table_mask = table.size() - 1;
    }
    host_free.resize(to_index(options.num_host_blocks));
    for (std::size_t i = 0; i < host_free.size(); ++i) {
      host_free[i] = static_cast<BlockId>(host_free.size() - 1 - i);  // taken from the back: id order
    }
    host_used.assign(host_free.size(), false);
  }

  // ---- Free list. The sentinel is blocks[n]; free blocks come first, then cached ones, oldest first. ----

  Block& at(BlockId id) { return blocks[to_index(id)]; }
  const Block& at(BlockId id) const { return blocks[to_index(id)]; }

  void unlink(Block& b) {
    at(b.prev).next = b.next;
    at(b.next).prev = b.prev;
    b.prev = b.next = kNoBlock;
  }

  void link_before(BlockId id, BlockId successor) {
    Block& b = at(id);
    Block& s = at(successor);
    b.prev = s.prev;
    b.next = successor;
    at(s.prev).next = id;
    s.prev = id;
  }

  std::int64_t num_available() const { return num_free + num_cached; }

  // The next block to give away, with one reference. There must be one.
  BlockId take() noexcept {
    const BlockId id = blocks.back().next;
    Block& b = at(id);
    unlink(b);
    if (b.is_cached()) {
      uncache(id);
      --num_cached;
      ++num_evictions;
    } else {
      --num_free;
    }
    b.refs = 1;
    return id;
  }

  void acquire(BlockId id) noexcept {
    Block& b = at(id);
    if (b.refs++ > 0) return;
    unlink(b);
    --(b.is_cached() ? num_cached : num_free);
  }

  void release(BlockId id) noexcept {
    Block& b = at(id);
    if (--b.refs > 0) return;
    if (b.has_twin()) uncache(id);  // the contents stay reachable in the twin
    if (b.is_cached()) {
      link_before(id, static_cast<BlockId>(n));
      ++num_cached;
    } else {
      link_before(id, blocks.back().next);
      ++num_free;
    }
  }

  void require_available(const char* function, std::int64_t needed, std::int64_t available) const {
    if (needed <= available) return;
    throw OutOfBlocksError(message(function, "blocks",
                                   "at most " + text(available) + " available (" + text(num_free) + " free, " + text(num_cached) +
                                       " cached, of " + text(n) + ")",
                                   text(needed)),
                           needed, available);
  }

  bool leaves(std::int64_t needed, std::int64_t available, bool keep_watermark) const {
    return needed <= available - (keep_watermark ? watermark_blocks : 0);
  }

  // ---- Prefix table: linear probing over the first of each set of twins, deletion by shifting back. ----

  static std::uint32_t tag_of(const BlockHash& hash) { return static_cast<std::uint32_t>(hash.hi); }
  std::size_t home(const BlockHash& hash) const { return static_cast<std::size_t>(hash.lo) & table_mask; }
  std::span<const TokenId> tokens_of(BlockId id) const { return {block_tokens.get() + id * bs, to_index(bs)}; }

  // The block that holds these contents, compared in full: the hash only says where to look.
  BlockId find(const BlockHash& hash, std::uint64_t parent_prefix_id, std::uint32_t extra_id, const TokenId* tokens) const {
    const std::uint32_t tag = tag_of(hash);
    for (std::size_t i = home(hash);; i = (i + 1) & table_mask) {
      const TableSlot slot = table[i];
      if (slot.block_id == kNoBlock) return kNoBlock;
      if (slot.tag != tag) continue;
      const Block& b = at(slot.block_id);
      if (b.hash == hash && b.parent_prefix_id == parent_prefix_id && b.extra_id == extra_id &&
          std::memcmp(tokens_of(slot.block_id).data(), tokens, to_index(bs) * sizeof(TokenId)) == 0) {
        return slot.block_id;
      }
    }
  }

  bool is_reachable(const Link& link) const {
    for (std::size_t i = home(link.hash); table[i].block_id != kNoBlock; i = (i + 1) & table_mask) {
      if (at(table[i].block_id).prefix_id == link.prefix_id) return true;
    }
    return false;
  }

  std::size_t table_position(BlockId id) const {
    std::size_t i = home(at(id).hash);
    while (table[i].block_id != id) i = (i + 1) & table_mask;
    return i;
  }

  void table_insert(BlockId id) {
    std::size_t i = home(at(id).hash);
    while (table[i].block_id != kNoBlock) i = (i + 1) & table_mask;
    table[i] = {tag_of(at(id).hash), id};
  }

  void table_erase(BlockId id) {
    std::size_t hole = table_position(id);
    for (std::size_t i = (hole + 1) & table_mask; table[i].block_id != kNoBlock; i = (i + 1) & table_mask) {
      if (((i - home(at(table[i].block_id).hash)) & table_mask) >= ((i - hole) & table_mask)) {
        table[hole] = table[i];
        hole = i;
      }
    }
    table[hole] = {};
  }

  // Makes the contents of a block unreachable through it. Does not touch the free list or its counts.
  void uncache(BlockId id) noexcept {
    Block& b = at(id);
    if (b.twin_prev != kNoBlock) {
      at(b.twin_prev).twin_next = b.twin_next;
      if (b.twin_next != kNoBlock) at(b.twin_next).twin_prev = b.twin_prev;
    } else if (b.twin_next != kNoBlock) {
      table[table_position(id)].block_id = b.twin_next;
      at(b.twin_next).twin_prev = kNoBlock;
    } else {
      table_erase(id);
      push_event({BlockEvent::Kind::kRemoved, id, b.hash, {}});
    }
    forget(b);
  }

  void forget(Block& b) noexcept {
    extras.release(b.extra_id);
    b.extra_id = kNoExtra;
    b.prefix_id = b.parent_prefix_id = kRootPrefix;
    b.twin_prev = b.twin_next = kNoBlock;
  }

  // Enters a block under its contents. Room for the event has been made.
  Link cache(BlockId id, const Link& parent, const BlockHash& hash, std::uint32_t extra_id, const TokenId* tokens) {
    Block& b = at(id);
    const BlockId twin = find(hash, parent.prefix_id, extra_id, tokens);
    b.hash = hash;
    b.parent_prefix_id = parent.prefix_id;
    b.extra_id = extra_id;
    extras.add_ref(extra_id);
    std::memcpy(block_tokens.get() + id * bs, tokens, to_index(bs) * sizeof(TokenId));
    if (twin != kNoBlock) {
      Block& t = at(twin);
      b.prefix_id = t.prefix_id;
      b.twin_prev = twin;
      b.twin_next = t.twin_next;
      if (t.twin_next != kNoBlock) at(t.twin_next).twin_prev = id;
      t.twin_next = id;
      if (t.refs == 0) {  // one copy is enough: the idle one is freed
        uncache(twin);
        unlink(t);
        link_before(twin, blocks.back().next);
        --num_cached;
        ++num_free;
      }
    } else {
      b.prefix_id = ++last_prefix_id;
      table_insert(id);
      push_event({BlockEvent::Kind::kStored, id, hash, parent.hash});
    }
    return {hash, b.prefix_id};
  }

  BlockHash hash_of(const BlockHash& parent, std::uint32_t extra_id, std::span<const TokenId> tokens) const {
    const ExtraPool::Entry* const extra = extra_id == kNoExtra ? nullptr : &extras[extra_id];
    if (options.hash_function) {
      const std::string_view bytes = extra == nullptr ? std::string_view() : std::string_view(extra->bytes);
      return options.hash_function(parent, tokens, std::as_bytes(std::span(bytes)));
    }
    return hash_block(key, parent, extra == nullptr ? nullptr : &extra->digest, tokens);
  }

  // ---- Events. ----

  void make_room_for_events(std::int64_t num_more) {
    if (!options.enable_events) return;
    const std::size_t limit = to_index(options.max_events);
    const std::size_t needed = std::min(events.size() + to_index(num_more), limit) + 1;
    if (needed > events.capacity()) events.reserve(std::min(std::max(needed, events.capacity() * 2), limit + 1));
    const std::size_t tokens = std::min(event_tokens.size() + to_index(num_more * bs), limit * to_index(bs));
    if (tokens > event_tokens.capacity()) event_tokens.reserve(std::max(tokens, event_tokens.capacity() * 2));
  }

  void push_event(const PendingEvent& event) noexcept {
    if (!options.enable_events) return;
    if (events.size() >= to_index(options.max_events)) {
      events.clear();
      event_tokens.clear();
      events.push_back({BlockEvent::Kind::kLost, kNoBlock, {}, {}});
      if (events.size() >= to_index(options.max_events)) return;
    }
    events.push_back(event);
    if (event.kind == BlockEvent::Kind::kStored) {
      const auto tokens = tokens_of(event.block_id);
      event_tokens.insert(event_tokens.end(), tokens.begin(), tokens.end());
    }
  }

  // ---- Sequences. ----

  Sequence& sequence(const char* function, SequenceId id, const char* argument = "seq_id") const {
    Sequence* const seq = sequences.find(id);
    if (seq == nullptr) fail_index(function, argument, "the id of a sequence", text(id));
    return *seq;
  }

  Sequence& resident(const char* function, SequenceId id, const char* argument = "seq_id") const {
    Sequence& seq = sequence(function, id, argument);
    if (seq.is_swapped) fail(function, argument, "a sequence on the device", text(id) + ", which is swapped out");
    return seq;
  }

  void require_new(const char* function, const char* argument, SequenceId id) const {
    if (sequences.find(id) != nullptr) fail(function, argument, "an id that is not in use", text(id));
  }

  std::unique_ptr<Sequence> make_sequence(SequenceId id) {
    std::unique_ptr<Sequence> seq;
    if (spare.empty()) {
      seq = std::make_unique<Sequence>();
    } else {
      seq = std::move(spare.back());
      spare.pop_back();
    }
    seq->id = id;
    return seq;
  }

  // Keeps the record's memory for the next sequence, unless it is large.
  void recycle(std::unique_ptr<Sequence> seq) noexcept {
    if (spare.size() >= kMaxSpareSequences || spare.size() == spare.capacity() || seq->tokens.capacity() > kMaxSpareTokens) return;
    seq->blocks.clear();
    seq->tokens.clear();
    seq->chain.clear();
    seq->extras.clear();
    seq->num_computed = seq->num_reserved = seq->num_released = 0;
    seq->mark = 0;
    seq->is_swapped = false;
    seq->is_cacheable = true;
    spare.push_back(std::move(seq));
  }

  static std::uint32_t extra_at(std::span<const ExtraAt> list, std::int64_t block_idx) {
    if (list.empty()) return kNoExtra;
    const auto it =
        std::lower_bound(list.begin(), list.end(), block_idx, [](const ExtraAt& extra, std::int64_t idx) { return extra.block_idx < idx; });
    return it != list.end() && it->block_idx == block_idx ? it->extra_id : kNoExtra;
  }

  // Calls on_hit(block_id, link) for the longest run of cached blocks that hold these tokens, all but the last token at most.
  template <typename F>
  void match(std::span<const TokenId> tokens, std::span<const ExtraAt> extra_list, F&& on_hit) const {
    if (!options.enable_prefix_cache || tokens.empty()) return;
    const std::int64_t limit = (static_cast<std::int64_t>(tokens.size()) - 1) / bs;
    Link parent;
    for (std::int64_t i = 0; i < limit; ++i) {
      const std::uint32_t extra_id = extra_at(extra_list, i);
      if (extra_id == kUnknownExtra) return;
      const auto block = tokens.subspan(to_index(i * bs), to_index(bs));
      const BlockHash hash = hash_of(parent.hash, extra_id, block);
      const BlockId id = find(hash, parent.prefix_id, extra_id, block.data());
      if (id == kNoBlock) return;
      parent = {hash, at(id).prefix_id};
      on_hit(id, parent);
    }
  }

  // Takes over cached blocks for a sequence that has none. Everything that can throw comes before the first acquire.
  std::int64_t match_sequence(Sequence& seq) {
    try {
      match(seq.tokens, seq.extras, [&seq](BlockId id, const Link& link) {
        seq.blocks.push_back(id);
        seq.chain.push_back(link);
      });
    } catch (...) {
      seq.blocks.clear();
      seq.chain.clear();
      throw;
    }
    return seq.num_blocks() * bs;
  }

  void adopt_matches(Sequence& seq, std::int64_t num_cached_tokens) noexcept {
    for (const BlockId id : seq.blocks) acquire(id);
    seq.num_computed = seq.num_reserved = num_cached_tokens;
    if (options.enable_prefix_cache) num_lookup_tokens += seq.num_tokens();
    num_hit_tokens += num_cached_tokens;
  }

  std::int64_t num_full_blocks(const Sequence& seq, std::int64_t num_computed, std::int64_t num_tokens) const {
    if (!options.enable_prefix_cache || !seq.is_cacheable) return 0;
    return std::min(num_computed, num_tokens) / bs;
  }

  void make_room_to_promote(Sequence& seq, std::int64_t num_computed, std::int64_t num_tokens) {
    const std::int64_t num_more = num_full_blocks(seq, num_computed, num_tokens) - static_cast<std::int64_t>(seq.chain.size());
    if (num_more <= 0) return;
    make_room(seq.chain, to_index(num_more));
    make_room_for_events(num_more);
  }

  // Enters the sequence's newly full blocks into the prefix cache.
  void promote(Sequence& seq) {
    const std::int64_t full = num_full_blocks(seq, seq.num_computed, seq.num_tokens());
    for (auto i = static_cast<std::int64_t>(seq.chain.size()); i < full; ++i) {
      const BlockId id = seq.blocks[to_index(i)];
      if (id == kNoBlock) {  // released before its tokens were known: the chain is broken
        seq.is_cacheable = false;
        return;
      }
      const Link parent = i == 0 ? Link{} : seq.chain[to_index(i - 1)];
      const std::uint32_t extra_id = extra_at(seq.extras, i);
      const auto tokens = std::span<const TokenId>(seq.tokens).subspan(to_index(i * bs), to_index(bs));
      const BlockHash hash = hash_of(parent.hash, extra_id, tokens);
      const Block& b = at(id);
      if (!b.is_cached()) {
        seq.chain.push_back(cache(id, parent, hash, extra_id, tokens.data()));
      } else if (b.parent_prefix_id == parent.prefix_id && b.extra_id == extra_id &&
                 std::memcmp(tokens_of(id).data(), tokens.data(), tokens.size_bytes()) == 0) {
        seq.chain.push_back({hash, b.prefix_id});  // a fork entered it first
      } else {
        seq.is_cacheable = false;  // forks disagree about the tokens of one block: trust neither from here on
        return;
      }
    }
  }

  void commit(const char* function, const char* id_argument, std::span<const SequenceId> seq_ids,
              std::span<const std::int64_t> num_tokens) {
    require_lengths(function, "num_tokens", num_tokens.size(), seq_ids.size());
    const std::uint64_t mark = new_mark();
    std::int64_t num_promotions = 0;
    plan.resize(seq_ids.size());
    for (std::size_t i = 0; i < seq_ids.size(); ++i) {
      Sequence& seq = resident(function, seq_ids[i], id_argument);
      mark_once(function, seq, mark);
      const std::int64_t total = total_tokens(function, "num_tokens", seq, num_tokens[i]);
      if (total > seq.num_reserved) {
        fail(function, "num_tokens", "at most the " + text(seq.num_reserved - seq.num_computed) + " tokens that grow made room for",
             text(num_tokens[i]));
      }
      const std::int64_t num_new_links = num_full_blocks(seq, total, seq.num_tokens()) - static_cast<std::int64_t>(seq.chain.size());
      if (num_new_links > 0) {
        make_room(seq.chain, to_index(num_new_links));
        num_promotions += num_new_links;
      }
      plan[i] = {&seq, num_tokens[i], 0, false};
    }
    make_room_for_events(num_promotions);
    for (const GrowStep& step : plan) {
      step.seq->num_computed += step.num_scheduled;
      promote(*step.seq);
    }
  }

  void free_host_blocks(Sequence& seq) noexcept {
    for (auto it = seq.blocks.rbegin(); it != seq.blocks.rend(); ++it) {
      if (*it == kNoBlock) continue;
      host_used[to_index(*it)] = false;
      host_free.push_back(*it);  // its capacity was never given up
    }
  }

  // Gives up all device blocks, tail first. Leaves seq.blocks as it is. Room for events has been made.
  void release_blocks(const Sequence& seq) noexcept {
    // Behind a window, blocks whose predecessors are gone can never be hit: caching them would only push out better ones.
    const auto released = to_index(seq.num_released);
    const bool orphaned = released > 0 && seq.chain.size() >= released && !is_reachable(seq.chain[released - 1]);
    for (std::size_t i = seq.blocks.size(); i-- > released;) {
      const BlockId id = seq.blocks[i];
      if (orphaned && at(id).refs == 1 && at(id).is_cached()) uncache(id);
      release(id);
    }
  }

  void drop_all_blocks(Sequence& seq) noexcept {
    if (seq.is_swapped) {
      free_host_blocks(seq);
    } else {
      release_blocks(seq);
    }
    seq.blocks.clear();
    seq.chain.clear();
    seq.num_computed = seq.num_reserved = seq.num_released = 0;
    seq.is_swapped = false;
    seq.is_cacheable = true;
  }

  // ---- Growth. ----

  static void require_lengths(const char* function, const char* argument, std::size_t got, std::size_t expected) {
    if (got == expected) return;
    fail(function, argument, text(static_cast<std::int64_t>(expected)) + " values", text(static_cast<std::int64_t>(got)));
  }

  std::uint64_t new_mark() { return ++last_mark; }

  void mark_once(const char* function, Sequence& seq, std::uint64_t mark) const {
    if (seq.mark == mark) fail(function, "seq_ids", "every sequence once", text(seq.id) + " twice");
    seq.mark = mark;
  }

  std::int64_t total_tokens(const char* function, const char* argument, const Sequence& seq, std::int64_t num_more) const {
    if (num_more < 0) fail(function, argument, "at least 0", text(num_more));
    if (num_more > kMaxSequenceTokens - seq.num_computed) {
      fail(function, argument, "at most " + text(kMaxSequenceTokens) + " tokens in a sequence",
           text(seq.num_computed) + " and " + text(num_more) + " more");
    }
    return seq.num_computed + num_more;
  }

  // Fills plan and returns the blocks it takes. `claims` counts the shares of a block that earlier steps will have given up, so
  // that the last of its sharers is not promised a copy; it is all zeros outside this function.
  std::int64_t make_plan(const char* function, const char* id_argument, const char* argument, std::span<const SequenceId> seq_ids,
                         std::span<const std::int64_t> num_new_tokens) {
    require_lengths(function, argument, num_new_tokens.size(), seq_ids.size());
    plan.resize(seq_ids.size());
    const std::uint64_t mark = new_mark();
    std::int64_t num_needed = 0;
    std::size_t i = 0;
    const auto clear_claims = [this, &i] {
      for (std::size_t j = 0; j < i; ++j) {
        const GrowStep& step = plan[j];
        if (step.copies) claims[to_index(step.seq->blocks[to_index(step.seq->num_computed / bs)])] = 0;
      }
    };
    try {
      for (; i < seq_ids.size(); ++i) {
        Sequence& seq = resident(function, seq_ids[i], id_argument);
        mark_once(function, seq, mark);
        const std::int64_t total = total_tokens(function, argument, seq, num_new_tokens[i]);
        GrowStep step{&seq, num_new_tokens[i], std::max<std::int64_t>(0, ceil_div(total, bs) - seq.num_blocks()), false};
        if (step.num_scheduled > 0 && seq.num_computed % bs != 0) {
          const BlockId last = seq.blocks[to_index(seq.num_computed / bs)];
          if (at(last).refs - claims[to_index(last)] > 1) {
            step.copies = true;
            ++claims[to_index(last)];
          }
        }
        num_needed += step.num_new_blocks + (step.copies ? 1 : 0);
        plan[i] = step;
      }
    } catch (...) {
      clear_claims();
      throw;
    }
    clear_claims();
    return num_needed;
  }

  // Everything of a plan that could throw, done before its first step.
  void prepare_plan(const char* function, std::int64_t num_needed, std::vector<BlockCopy>& copies) {
    require_available(function, num_needed, num_available());
    std::size_t num_shared = 0;
    for (const GrowStep& step : plan) {
      num_shared += step.copies ? 1 : 0;
      if (step.num_new_blocks > 0) make_room(step.seq->blocks, to_index(step.num_new_blocks));
    }
    if (num_shared > 0) copies.reserve(num_shared);
    make_room_for_events(num_needed + static_cast<std::int64_t>(plan.size()));
  }

  void execute_step(const GrowStep& step, std::vector<BlockCopy>& copies) noexcept {
    Sequence& seq = *step.seq;
    if (step.num_scheduled > 0 && seq.num_computed % bs != 0) {
      BlockId& last = seq.blocks[to_index(seq.num_computed / bs)];
      if (step.copies) {
        const BlockId fresh = take();
        copies.push_back({last, fresh});
        release(last);
        last = fresh;
        ++num_copies;
      } else if (at(last).is_cached()) {
        uncache(last);  // full once, then truncated: it is about to be overwritten
      }
    }
    for (std::int64_t i = 0; i < step.num_new_blocks; ++i) seq.blocks.push_back(take());
    seq.num_reserved = std::max(seq.num_reserved, seq.num_computed + step.num_scheduled);
  }

  void require_fits(const char* function, const BatchView& batch) const {
    const auto num_seqs = static_cast<std::int64_t>(plan.size());
    if (batch.max_seqs < num_seqs || batch.max_seqs >= kMaxSequenceTokens) {
      fail(function, "seq_lens", "room for " + text(num_seqs) + " sequences", text(batch.max_seqs));
    }
    if (batch.max_blocks_per_seq < 0) fail(function, "block_tables", "at least 0 columns", text(batch.max_blocks_per_seq));
    if (batch.block_tables_stride < batch.max_blocks_per_seq) {
      fail(function, "block_tables", "a row stride of at least " + text(batch.max_blocks_per_seq), text(batch.block_tables_stride));
    }
    std::int64_t num_tokens = 0;
    std::int64_t num_columns = 0;
    for (const GrowStep& step : plan) {
      num_tokens += step.num_scheduled;
      num_columns = std::max(num_columns, ceil_div(step.seq->num_computed + step.num_scheduled, bs));
    }
    if (num_columns > batch.max_blocks_per_seq) {
      fail(function, "block_tables", "at least " + text(num_columns) + " columns", text(batch.max_blocks_per_seq));
    }
    if (num_tokens > batch.max_tokens || num_tokens > kMaxSequenceTokens) {
      fail(function, "slot_mapping", "room for " + text(num_tokens) + " tokens", text(batch.max_tokens));
    }
    const auto require_pointer = [function](const char* argument, const void* pointer, std::int64_t size) {
      if (size > 0 && pointer == nullptr) fail(function, argument, "memory", "a null pointer");
    };
    require_pointer("block_tables", batch.block_tables, batch.max_seqs * batch.max_blocks_per_seq);
    require_pointer("slot_mapping", batch.slot_mapping, batch.max_tokens);
    require_pointer("seq_lens", batch.seq_lens, batch.max_seqs);
    require_pointer("query_start_loc", batch.query_start_loc, batch.max_seqs + 1);
  }

  // Row `row` of a batch whose earlier rows hold num_tokens tokens.
  void write_row(const GrowStep& step, const BatchView& batch, std::int64_t row, std::int64_t num_tokens) const noexcept {
    const Sequence& seq = *step.seq;
    const std::int64_t start = seq.num_computed;
    const std::int64_t total = start + step.num_scheduled;
    const std::int64_t num_columns = ceil_div(total, bs);
    if (batch.max_blocks_per_seq > 0) {
      BlockId* const table_row = batch.block_tables + row * batch.block_tables_stride;
      std::copy_n(seq.blocks.data(), num_columns, table_row);
      std::fill(table_row + num_columns, table_row + batch.max_blocks_per_seq, kNoBlock);
    }
    batch.seq_lens[row] = static_cast<std::int32_t>(total);
    batch.query_start_loc[row] = static_cast<std::int32_t>(num_tokens);
    std::int64_t* slot = batch.slot_mapping + num_tokens;
    std::int64_t block_idx = start / bs;
    std::int64_t offset = start % bs;
    for (std::int64_t left = step.num_scheduled; left > 0; ++block_idx, offset = 0) {
      const std::int64_t in_block = std::min(left, bs - offset);
      const std::int64_t first = seq.blocks[to_index(block_idx)] * bs + offset;
      for (std::int64_t i = 0; i < in_block; ++i) *slot++ = first + i;
      left -= in_block;
    }
    if (batch.positions != nullptr) {
      for (std::int64_t i = 0; i < step.num_scheduled; ++i) batch.positions[num_tokens + i] = start + i;
    }
  }

  void write_padding(const BatchView& batch, std::int64_t num_tokens) const noexcept {
    const auto num_seqs = static_cast<std::int64_t>(plan.size());
    for (std::int64_t row = num_seqs; row < batch.max_seqs; ++row) {
      if (batch.max_blocks_per_seq > 0) {
        std::fill_n(batch.block_tables + row * batch.block_tables_stride, batch.max_blocks_per_seq, kNoBlock);
      }
      batch.seq_lens[row] = 0;
    }
    std::fill(batch.query_start_loc + num_seqs, batch.query_start_loc + batch.max_seqs + 1, static_cast<std::int32_t>(num_tokens));
    std::fill(batch.slot_mapping + num_tokens, batch.slot_mapping + batch.max_tokens, kNoSlot);
    if (batch.positions != nullptr) std::fill(batch.positions + num_tokens, batch.positions + batch.max_tokens, std::int64_t{-1});
  }

  // ---- Raw references. ----

  void require_block(const char* function, BlockId id, const char* argument = "block_ids") const {
    if (id < 0 || id >= n) fail_index(function, argument, "a block id in [0, " + text(n) + ")", text(id));
  }

  // Checks that every entry, repeated ones counted, still has one of the references that `refs_of` counts.
  template <typename F>
  void require_held(const char* function, std::span<const BlockId> ids, const char* what, F&& refs_of) {
    std::size_t num_claimed = 0;
    const auto clear_claims = [&] {
      for (std::size_t i = 0; i < num_claimed; ++i) claims[to_index(ids[i])] = 0;
    };
    try {
      for (const BlockId id : ids) {
        require_block(function, id);
        if (claims[to_index(id)] >= refs_of(at(id))) {
          fail(function, "block_ids", std::string("blocks that are ") + what,
               "block " + text(id) + ", which has " + text(refs_of(at(id))) + " such references");
        }
        ++claims[to_index(id)];
        ++num_claimed;
      }
    } catch (...) {
      clear_claims();
      throw;
    }
    clear_claims();
  }

  void require_contents(const char* function, std::span<const BlockId> ids) const {
    if (static_cast<std::int64_t>(ids.size()) >= kMaxReferences) {
      fail(function, "block_ids", "fewer than " + text(kMaxReferences) + " ids", text(static_cast<std::int64_t>(ids.size())));
    }
    for (const BlockId id : ids) {
      require_block(function, id);
      const Block& b = at(id);
      if (b.refs == 0 && !b.is_cached()) {
        fail(function, "block_ids", "live or cached blocks", "block " + text(id) + ", which is free");
      }
      if (b.refs >= kMaxReferences - static_cast<std::int32_t>(ids.size())) {
        fail(function, "block_ids", "fewer than " + text(kMaxReferences) + " references to a block", text(b.refs));
      }
    }
  }

  // ---- Swapping in. ----

  struct SwapIn {
    std::vector<BlockId> hits;  // per block from num_released on; kNoBlock from the first miss on
    std::vector<Link> chain;    // of the released and the hit blocks
    std::int64_t num_needed = 0;
    std::int64_t num_available = 0;
  };

  SwapIn plan_swap_in(const Sequence& seq) const {
    SwapIn result;
    result.hits.resize(to_index(seq.num_blocks() - seq.num_released), kNoBlock);
    result.num_needed = seq.num_blocks() - seq.num_released;
    result.num_available = num_available();
    const auto num_links = static_cast<std::int64_t>(seq.chain.size());
    result.chain.reserve(seq.chain.size());
    Link parent;
    for (std::int64_t i = 0; i < num_links; ++i) {
      const Link& old = seq.chain[to_index(i)];
      const BlockId id = find(old.hash, parent.prefix_id, extra_at(seq.extras, i), seq.tokens.data() + i * bs);
      if (id == kNoBlock && i >= seq.num_released) break;
      parent = id == kNoBlock ? old : Link{old.hash, at(id).prefix_id};
      result.chain.push_back(parent);
      if (i < seq.num_released) continue;
      result.hits[to_index(i - seq.num_released)] = id;
      --result.num_needed;
      if (at(id).refs == 0) --result.num_available;
    }
    return result;
  }

  // ---- Proof (block_allocator_check.cpp). ----

  struct Holders;
  void check() const;
  void check_sequences(Holders& holders) const;
  void check_host_tier(Holders& holders) const;
  std::int64_t check_blocks(Holders& holders) const;
  void check_free_list() const;
  void check_table(std::int64_t num_first_twins) const;

  const BlockAllocatorOptions options;
  const BlockHash key;
  const std::int64_t bs;
  const std::int64_t n;
  const std::int64_t watermark_blocks;

  mutable std::mutex mutex;
  SequenceMap sequences;
  std::vector<std::unique_ptr<Sequence>> spare;
  std::vector<Block> blocks;          // and the free list's sentinel
  std::vector<std::int32_t> claims;   // scratch per block, all zeros between calls
  std::unique_ptr<TokenId[]> block_tokens;  // [n, bs], of cached blocks
  std::vector<TableSlot> table;
  std::size_t table_mask = 0;
  ExtraPool extras;
  std::vector<BlockId> host_free;
  std::vector<bool> host_used;
  std::vector<PendingEvent> events;
  std::vector<TokenId> event_tokens;  // of the kStored events, one after the other
  std::vector<GrowStep> plan;
  std::uint64_t last_prefix_id = kRootPrefix;
  std::uint64_t last_mark = 0;
  std::int64_t num_free;
  std::int64_t num_cached = 0;
  std::int64_t num_pinned = 0;
  std::int64_t num_lookup_tokens = 0;
  std::int64_t num_hit_tokens = 0;
  std::int64_t num_evictions = 0;
  std::int64_t num_copies = 0;
};

}  // namespace quire
