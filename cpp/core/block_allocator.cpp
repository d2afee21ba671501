// Block states, the free list, the prefix cache's table, and sequences. The contract is in the header.
// SPDX-License-Identifier: Apache-2.0
#include "quire/block_allocator.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <mutex>
#include <utility>

#include "core/block_allocator_records.h"
#include "core/block_hash.h"

namespace quire {

using namespace block_allocator;

namespace {

constexpr std::int64_t kMaxBlocks = (std::int64_t{1} << 31) - 2;  // one more index is the list's sentinel
constexpr std::int64_t kMaxBlockSize = 65536;
constexpr std::int64_t kMaxSequenceTokens = std::numeric_limits<std::int32_t>::max();
constexpr std::int32_t kMaxReferences = std::int32_t{1} << 30;
constexpr std::size_t kMaxSpareSequences = 1024;
constexpr std::size_t kMaxSpareTokens = 32768;

constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
constexpr std::size_t to_index(std::int64_t i) { return static_cast<std::size_t>(i); }

std::string text(std::int64_t value) { return std::to_string(value); }

std::string message(const char* function, const char* argument, const std::string& expected, const std::string& got) {
  return std::string("[block_allocator] ") + function + ": " + argument + ": expected " + expected + ", got " + got;
}

[[noreturn]] void fail(const char* function, const char* argument, const std::string& expected, const std::string& got) {
  throw std::invalid_argument(message(function, argument, expected, got));
}

[[noreturn]] void fail_index(const char* function, const char* argument, const std::string& expected, const std::string& got) {
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

// Salt and extra keys as unambiguous bytes, one entry per block that they enter.
std::vector<ExtraBytes> encode_extras(const char* function, std::string_view salt, std::span<const ExtraKey> extra_keys,
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

BlockAllocatorOptions checked(BlockAllocatorOptions options) {
  const char* const f = "BlockAllocator";
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

}  // namespace

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

  // Everything in execute_plan that could throw, done first.
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

  void check() const;

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

using Lock = std::lock_guard<std::mutex>;

BlockAllocator::BlockAllocator(BlockAllocatorOptions options) : impl_(std::make_unique<Impl>(std::move(options))) {}
BlockAllocator::~BlockAllocator() = default;

// ---- Counts. ----

std::int64_t BlockAllocator::num_blocks() const noexcept { return impl_->n; }
std::int64_t BlockAllocator::block_size() const noexcept { return impl_->bs; }
std::int64_t BlockAllocator::num_host_blocks() const noexcept { return impl_->options.num_host_blocks; }
std::int64_t BlockAllocator::watermark_blocks() const noexcept { return impl_->watermark_blocks; }

BlockAllocatorStats BlockAllocator::stats() const {
  const Lock lock(impl_->mutex);
  BlockAllocatorStats stats;
  stats.num_blocks = impl_->n;
  stats.num_live = impl_->n - impl_->num_available();
  stats.num_cached = impl_->num_cached;
  stats.num_free = impl_->num_free;
  stats.num_pinned = impl_->num_pinned;
  stats.num_host_blocks = impl_->options.num_host_blocks;
  stats.num_host_free = static_cast<std::int64_t>(impl_->host_free.size());
  stats.num_sequences = static_cast<std::int64_t>(impl_->sequences.size());
  stats.num_lookup_tokens = impl_->num_lookup_tokens;
  stats.num_hit_tokens = impl_->num_hit_tokens;
  stats.num_evictions = impl_->num_evictions;
  stats.num_copies = impl_->num_copies;
  return stats;
}

double BlockAllocator::usage() const {
  const Lock lock(impl_->mutex);
  return static_cast<double>(impl_->n - impl_->num_available()) / static_cast<double>(impl_->n);
}

std::int64_t BlockAllocator::num_references(BlockId block_id) const {
  const Lock lock(impl_->mutex);
  impl_->require_block("num_references", block_id, "block_id");
  return impl_->at(block_id).refs;
}

// ---- Raw blocks. ----

bool BlockAllocator::can_allocate(std::int64_t num_blocks, bool keep_watermark) const {
  if (num_blocks < 0) fail("can_allocate", "num_blocks", "at least 0", text(num_blocks));
  const Lock lock(impl_->mutex);
  return impl_->leaves(num_blocks, impl_->num_available(), keep_watermark);
}

void BlockAllocator::allocate(std::span<BlockId> out) {
  const Lock lock(impl_->mutex);
  const auto count = static_cast<std::int64_t>(out.size());
  impl_->require_available("allocate", count, impl_->num_available());
  impl_->make_room_for_events(count);
  for (BlockId& id : out) {
    id = impl_->take();
    impl_->at(id).raw_refs = 1;
  }
}

std::vector<BlockId> BlockAllocator::allocate(std::int64_t num_blocks) {
  if (num_blocks < 0) fail("allocate", "num_blocks", "at least 0", text(num_blocks));
  if (num_blocks > impl_->n) {  // before the vector is made
    const Lock lock(impl_->mutex);
    impl_->require_available("allocate", num_blocks, impl_->num_available());
  }
  std::vector<BlockId> out(to_index(num_blocks));
  allocate(out);
  return out;
}

void BlockAllocator::free(std::span<const BlockId> block_ids) {
  const Lock lock(impl_->mutex);
  impl_->require_held("free", block_ids, "held through allocate or ref", [](const Block& b) { return b.raw_refs; });
  for (const BlockId id : block_ids) {
    --impl_->at(id).raw_refs;
    impl_->release(id);
  }
}

void BlockAllocator::ref(std::span<const BlockId> block_ids) {
  const Lock lock(impl_->mutex);
  impl_->require_contents("ref", block_ids);
  for (const BlockId id : block_ids) {
    impl_->acquire(id);
    ++impl_->at(id).raw_refs;
  }
}

BlockCopy BlockAllocator::copy_on_write(BlockId block_id) {
  const Lock lock(impl_->mutex);
  impl_->require_held("copy_on_write", {&block_id, 1}, "held through allocate or ref", [](const Block& b) { return b.raw_refs; });
  impl_->make_room_for_events(1);
  Block& b = impl_->at(block_id);
  if (b.refs == 1) {
    if (b.is_cached()) impl_->uncache(block_id);
    return {block_id, block_id};
  }
  impl_->require_available("copy_on_write", 1, impl_->num_available());
  const BlockId fresh = impl_->take();
  impl_->at(fresh).raw_refs = 1;
  --b.raw_refs;
  impl_->release(block_id);
  ++impl_->num_copies;
  return {block_id, fresh};
}

void BlockAllocator::pin(std::span<const BlockId> block_ids) {
  const Lock lock(impl_->mutex);
  impl_->require_contents("pin", block_ids);
  for (const BlockId id : block_ids) {
    impl_->acquire(id);
    if (impl_->at(id).pin_refs++ == 0) ++impl_->num_pinned;
  }
}

void BlockAllocator::unpin(std::span<const BlockId> block_ids) {
  const Lock lock(impl_->mutex);
  impl_->require_held("unpin", block_ids, "pinned", [](const Block& b) { return b.pin_refs; });
  for (const BlockId id : block_ids) {
    if (--impl_->at(id).pin_refs == 0) --impl_->num_pinned;
    impl_->release(id);
  }
}

// ---- Sequences. ----

std::int64_t BlockAllocator::add_sequence(SequenceId seq_id, std::span<const TokenId> token_ids, std::string_view salt,
                                          std::span<const ExtraKey> extra_keys) {
  Impl& m = *impl_;
  if (token_ids.size() > to_index(kMaxSequenceTokens)) {
    fail("add_sequence", "token_ids", "at most " + text(kMaxSequenceTokens) + " tokens", text(static_cast<std::int64_t>(token_ids.size())));
  }
  const std::vector<ExtraBytes> encoded = encode_extras("add_sequence", salt, extra_keys, m.bs);
  const Lock lock(m.mutex);
  m.require_new("add_sequence", "seq_id", seq_id);
  m.sequences.reserve_one();
  make_room(m.spare, 1);
  std::unique_ptr<Sequence> seq = m.make_sequence(seq_id);
  std::int64_t num_cached = 0;
  try {
    seq->tokens.assign(token_ids.begin(), token_ids.end());
    seq->extras.reserve(encoded.size());
    for (const ExtraBytes& extra : encoded) seq->extras.push_back({extra.block_idx, m.extras.acquire(extra.bytes, m.key)});
    num_cached = m.match_sequence(*seq);
  } catch (...) {
    for (const ExtraAt& extra : seq->extras) m.extras.release(extra.extra_id);
    throw;
  }
  m.adopt_matches(*seq, num_cached);
  m.sequences.insert(std::move(seq));
  return num_cached;
}

std::int64_t BlockAllocator::num_cached_tokens(std::span<const TokenId> token_ids, std::string_view salt,
                                               std::span<const ExtraKey> extra_keys) const {
  const std::vector<ExtraBytes> encoded = encode_extras("num_cached_tokens", salt, extra_keys, impl_->bs);
  const Lock lock(impl_->mutex);
  std::vector<ExtraAt> extras;
  extras.reserve(encoded.size());
  for (const ExtraBytes& extra : encoded) extras.push_back({extra.block_idx, impl_->extras.find(extra.bytes)});
  std::int64_t num_hits = 0;
  impl_->match(token_ids, extras, [&num_hits](BlockId, const Link&) { ++num_hits; });
  return num_hits * impl_->bs;
}

bool BlockAllocator::has_sequence(SequenceId seq_id) const {
  const Lock lock(impl_->mutex);
  return impl_->sequences.find(seq_id) != nullptr;
}

std::vector<SequenceId> BlockAllocator::sequence_ids() const {
  const Lock lock(impl_->mutex);
  std::vector<SequenceId> ids;
  ids.reserve(impl_->sequences.size());
  impl_->sequences.for_each([&ids](const Sequence& seq) { ids.push_back(seq.id); });
  return ids;
}

SequenceInfo BlockAllocator::sequence(SequenceId seq_id) const {
  const Lock lock(impl_->mutex);
  const Sequence& seq = impl_->sequence("sequence", seq_id);
  return {seq.num_tokens(), seq.num_computed, seq.num_reserved, seq.num_blocks(), seq.num_released, seq.is_swapped, seq.is_cacheable};
}

std::vector<TokenId> BlockAllocator::token_ids(SequenceId seq_id) const {
  const Lock lock(impl_->mutex);
  return impl_->sequence("token_ids", seq_id).tokens;
}

std::vector<BlockId> BlockAllocator::block_table(SequenceId seq_id) const {
  const Lock lock(impl_->mutex);
  return impl_->sequence("block_table", seq_id).blocks;
}

std::int64_t BlockAllocator::num_blocks_needed(SequenceId seq_id, std::int64_t num_new_tokens) const {
  const Lock lock(impl_->mutex);
  return impl_->make_plan("num_blocks_needed", "seq_id", "num_new_tokens", {&seq_id, 1}, {&num_new_tokens, 1});
}

bool BlockAllocator::can_grow(SequenceId seq_id, std::int64_t num_new_tokens, bool keep_watermark) const {
  const Lock lock(impl_->mutex);
  const std::int64_t needed = impl_->make_plan("can_grow", "seq_id", "num_new_tokens", {&seq_id, 1}, {&num_new_tokens, 1});
  return impl_->leaves(needed, impl_->num_available(), keep_watermark);
}

std::vector<BlockCopy> BlockAllocator::grow(SequenceId seq_id, std::int64_t num_new_tokens) {
  const Lock lock(impl_->mutex);
  std::vector<BlockCopy> copies;
  impl_->prepare_plan("grow", impl_->make_plan("grow", "seq_id", "num_new_tokens", {&seq_id, 1}, {&num_new_tokens, 1}), copies);
  impl_->execute_step(impl_->plan.front(), copies);
  return copies;
}

void BlockAllocator::append_tokens(SequenceId seq_id, std::span<const TokenId> token_ids) {
  const Lock lock(impl_->mutex);
  Sequence& seq = impl_->sequence("append_tokens", seq_id);
  if (token_ids.size() > to_index(kMaxSequenceTokens - seq.num_tokens())) {
    fail("append_tokens", "token_ids", "at most " + text(kMaxSequenceTokens) + " tokens in a sequence",
         text(seq.num_tokens()) + " and " + text(static_cast<std::int64_t>(token_ids.size())) + " more");
  }
  const std::int64_t total = seq.num_tokens() + static_cast<std::int64_t>(token_ids.size());
  if (!seq.is_swapped) impl_->make_room_to_promote(seq, seq.num_computed, total);
  make_room(seq.tokens, token_ids.size());
  seq.tokens.insert(seq.tokens.end(), token_ids.begin(), token_ids.end());
  if (!seq.is_swapped) impl_->promote(seq);
}

void BlockAllocator::append_token_batch(std::span<const SequenceId> seq_ids, std::span<const TokenId> token_ids) {
  const Lock lock(impl_->mutex);
  const char* const f = "append_token_batch";
  Impl::require_lengths(f, "token_ids", token_ids.size(), seq_ids.size());
  const std::uint64_t mark = impl_->new_mark();
  std::int64_t num_promotions = 0;
  for (const SequenceId id : seq_ids) {
    Sequence& seq = impl_->resident(f, id, "seq_ids");
    impl_->mark_once(f, seq, mark);
    if (seq.num_tokens() >= kMaxSequenceTokens) {
      fail(f, "seq_ids", "sequences of fewer than " + text(kMaxSequenceTokens) + " tokens", text(id));
    }
    make_room(seq.tokens, 1);
    if (seq.num_computed > seq.num_tokens()) {
      impl_->make_room_to_promote(seq, seq.num_computed, seq.num_tokens() + 1);
      ++num_promotions;
    }
  }
  impl_->make_room_for_events(num_promotions);
  for (std::size_t i = 0; i < seq_ids.size(); ++i) {
    Sequence& seq = *impl_->sequences.find(seq_ids[i]);
    seq.tokens.push_back(token_ids[i]);
    if (seq.num_computed >= seq.num_tokens()) impl_->promote(seq);
  }
}

void BlockAllocator::commit(SequenceId seq_id, std::int64_t num_tokens) {
  const Lock lock(impl_->mutex);
  impl_->commit("commit", "seq_id", {&seq_id, 1}, {&num_tokens, 1});
}

void BlockAllocator::commit_batch(std::span<const SequenceId> seq_ids, std::span<const std::int64_t> num_tokens) {
  const Lock lock(impl_->mutex);
  impl_->commit("commit_batch", "seq_ids", seq_ids, num_tokens);
}

void BlockAllocator::truncate(SequenceId seq_id, std::int64_t num_tokens) {
  const Lock lock(impl_->mutex);
  Impl& m = *impl_;
  Sequence& seq = m.resident("truncate", seq_id);
  const std::int64_t longest = std::max(seq.num_tokens(), seq.num_computed);
  if (num_tokens < seq.num_released * m.bs || num_tokens > longest) {
    fail("truncate", "num_tokens", text(seq.num_released * m.bs) + " to " + text(longest), text(num_tokens));
  }
  seq.num_computed = seq.num_reserved = std::min(seq.num_computed, num_tokens);
  if (num_tokens < seq.num_tokens()) seq.tokens.resize(to_index(num_tokens));
  const std::int64_t kept = ceil_div(seq.num_computed, m.bs);
  while (seq.num_blocks() > kept) {
    m.release(seq.blocks.back());
    seq.blocks.pop_back();
  }
  const std::size_t num_full = to_index(std::min(seq.num_computed, seq.num_tokens()) / m.bs);
  if (seq.chain.size() > num_full) seq.chain.resize(num_full);
}

void BlockAllocator::fork(SequenceId parent, SequenceId child) {
  const Lock lock(impl_->mutex);
  Impl& m = *impl_;
  const Sequence& from = m.resident("fork", parent, "parent");
  m.require_new("fork", "child", child);
  const auto num_shared = static_cast<std::ptrdiff_t>(ceil_div(from.num_computed, m.bs));
  for (auto it = from.blocks.begin(); it != from.blocks.begin() + num_shared; ++it) {
    if (*it != kNoBlock && m.at(*it).refs >= kMaxReferences) {
      fail("fork", "parent", "fewer than " + text(kMaxReferences) + " references to a block", text(m.at(*it).refs));
    }
  }
  m.sequences.reserve_one();
  make_room(m.spare, 1);
  std::unique_ptr<Sequence> to = m.make_sequence(child);
  to->tokens = from.tokens;
  to->blocks.assign(from.blocks.begin(), from.blocks.begin() + num_shared);
  to->chain = from.chain;
  to->extras = from.extras;
  to->num_computed = to->num_reserved = from.num_computed;
  to->num_released = from.num_released;
  to->is_cacheable = from.is_cacheable;
  for (const ExtraAt& extra : to->extras) m.extras.add_ref(extra.extra_id);
  for (const BlockId id : to->blocks) {
    if (id != kNoBlock) m.acquire(id);
  }
  m.sequences.insert(std::move(to));
}

void BlockAllocator::free_sequence(SequenceId seq_id) {
  const Lock lock(impl_->mutex);
  Sequence& seq = impl_->sequence("free_sequence", seq_id);
  impl_->make_room_for_events(seq.num_blocks());
  impl_->drop_all_blocks(seq);
  for (const ExtraAt& extra : seq.extras) impl_->extras.release(extra.extra_id);
  impl_->recycle(impl_->sequences.extract(seq_id));
}

void BlockAllocator::preempt(SequenceId seq_id) {
  const Lock lock(impl_->mutex);
  Sequence& seq = impl_->sequence("preempt", seq_id);
  impl_->make_room_for_events(seq.num_blocks());
  impl_->drop_all_blocks(seq);
}

std::int64_t BlockAllocator::match_prefix(SequenceId seq_id) {
  const Lock lock(impl_->mutex);
  Sequence& seq = impl_->resident("match_prefix", seq_id);
  if (!seq.blocks.empty()) {
    fail("match_prefix", "seq_id", "a sequence without blocks", text(seq_id) + ", which has " + text(seq.num_blocks()));
  }
  const std::int64_t num_cached = impl_->match_sequence(seq);
  impl_->adopt_matches(seq, num_cached);
  return num_cached;
}

std::int64_t BlockAllocator::release_out_of_window(SequenceId seq_id, std::int64_t window) {
  if (window < 1) fail("release_out_of_window", "window", "at least 1", text(window));
  const Lock lock(impl_->mutex);
  Sequence& seq = impl_->resident("release_out_of_window", seq_id);
  const std::int64_t num_skipped = seq.num_computed >= window ? seq.num_computed - window + 1 : 0;
  const std::int64_t end = num_skipped / impl_->bs;
  const std::int64_t count = std::max<std::int64_t>(0, end - seq.num_released);
  for (std::int64_t i = end; i-- > seq.num_released;) {
    impl_->release(seq.blocks[to_index(i)]);
    seq.blocks[to_index(i)] = kNoBlock;
  }
  seq.num_released += count;
  return count;
}

std::int64_t BlockAllocator::num_common_prefix_blocks(std::span<const SequenceId> seq_ids) const {
  const Lock lock(impl_->mutex);
  if (seq_ids.empty()) return 0;
  const char* const f = "num_common_prefix_blocks";
  const Sequence& first = impl_->resident(f, seq_ids.front(), "seq_ids");
  std::int64_t common = first.num_computed / impl_->bs;
  if (first.num_released > 0) common = 0;
  for (const SequenceId id : seq_ids.subspan(1)) {
    const Sequence& seq = impl_->resident(f, id, "seq_ids");
    common = std::min(common, seq.num_computed / impl_->bs);
    const auto end = first.blocks.begin() + static_cast<std::ptrdiff_t>(common);
    common = std::mismatch(first.blocks.begin(), end, seq.blocks.begin()).first - first.blocks.begin();
  }
  return common;
}

// ---- Host tier. ----

bool BlockAllocator::can_swap_out(SequenceId seq_id) const {
  const Lock lock(impl_->mutex);
  const Sequence& seq = impl_->resident("can_swap_out", seq_id);
  return ceil_div(seq.num_computed, impl_->bs) - seq.num_released <= static_cast<std::int64_t>(impl_->host_free.size());
}

bool BlockAllocator::can_swap_in(SequenceId seq_id, bool keep_watermark) const {
  const Lock lock(impl_->mutex);
  const Sequence& seq = impl_->sequence("can_swap_in", seq_id);
  if (!seq.is_swapped) fail("can_swap_in", "seq_id", "a sequence that is swapped out", text(seq_id));
  const Impl::SwapIn swap = impl_->plan_swap_in(seq);
  return impl_->leaves(swap.num_needed, swap.num_available, keep_watermark);
}

std::vector<BlockCopy> BlockAllocator::swap_out(SequenceId seq_id) {
  const Lock lock(impl_->mutex);
  Impl& m = *impl_;
  Sequence& seq = m.resident("swap_out", seq_id);
  const std::int64_t num_used = ceil_div(seq.num_computed, m.bs);
  const std::int64_t needed = num_used - seq.num_released;
  const auto available = static_cast<std::int64_t>(m.host_free.size());
  if (needed > available) {
    throw OutOfBlocksError(message("swap_out", "host blocks", "at most " + text(available) + " available", text(needed)), needed,
                           available);
  }
  std::vector<BlockId> host(to_index(num_used), kNoBlock);
  std::vector<BlockCopy> copies;
  copies.reserve(to_index(needed));
  m.make_room_for_events(seq.num_blocks());
  for (std::int64_t i = seq.num_released; i < num_used; ++i) {
    const BlockId id = m.host_free.back();
    m.host_free.pop_back();
    m.host_used[to_index(id)] = true;
    host[to_index(i)] = id;
    copies.push_back({seq.blocks[to_index(i)], id});
  }
  m.release_blocks(seq);
  seq.blocks = std::move(host);
  seq.num_reserved = seq.num_computed;
  seq.is_swapped = true;
  return copies;
}

std::vector<BlockCopy> BlockAllocator::swap_in(SequenceId seq_id) {
  const Lock lock(impl_->mutex);
  Impl& m = *impl_;
  Sequence& seq = m.sequence("swap_in", seq_id);
  if (!seq.is_swapped) fail("swap_in", "seq_id", "a sequence that is swapped out", text(seq_id));
  Impl::SwapIn swap = m.plan_swap_in(seq);
  m.require_available("swap_in", swap.num_needed, swap.num_available);
  std::vector<BlockId> device(seq.blocks.size(), kNoBlock);
  std::vector<BlockCopy> copies;
  copies.reserve(to_index(swap.num_needed));
  m.make_room_for_events(swap.num_needed * 2);
  m.make_room_to_promote(seq, seq.num_computed, seq.num_tokens());
  for (const BlockId id : swap.hits) {
    if (id != kNoBlock) m.acquire(id);
  }
  for (std::size_t i = to_index(seq.num_released); i < device.size(); ++i) {
    const BlockId hit = swap.hits[i - to_index(seq.num_released)];
    device[i] = hit != kNoBlock ? hit : m.take();
    if (hit == kNoBlock) copies.push_back({seq.blocks[i], device[i]});
  }
  m.free_host_blocks(seq);
  seq.blocks = std::move(device);
  seq.is_swapped = false;
  seq.chain = std::move(swap.chain);
  m.promote(seq);
  return copies;
}

// ---- Batches. ----

void BlockAllocator::write_batch(std::span<const SequenceId> seq_ids, std::span<const std::int64_t> num_scheduled_tokens,
                                 const BatchView& batch) {
  const Lock lock(impl_->mutex);
  const char* const f = "write_batch";
  impl_->make_plan(f, "seq_ids", "num_scheduled_tokens", seq_ids, num_scheduled_tokens);
  for (const GrowStep& step : impl_->plan) {
    if (step.num_scheduled > step.seq->num_reserved - step.seq->num_computed) {
      fail(f, "num_scheduled_tokens",
           "at most the " + text(step.seq->num_reserved - step.seq->num_computed) + " tokens that grow made room for",
           text(step.num_scheduled) + " for sequence " + text(step.seq->id));
    }
  }
  impl_->require_fits(f, batch);
  std::int64_t num_tokens = 0;
  for (std::size_t i = 0; i < impl_->plan.size(); ++i) {
    impl_->write_row(impl_->plan[i], batch, static_cast<std::int64_t>(i), num_tokens);
    num_tokens += impl_->plan[i].num_scheduled;
  }
  impl_->write_padding(batch, num_tokens);
}

std::vector<BlockCopy> BlockAllocator::grow_and_write_batch(std::span<const SequenceId> seq_ids,
                                                            std::span<const std::int64_t> num_scheduled_tokens, const BatchView& batch) {
  const Lock lock(impl_->mutex);
  const char* const f = "grow_and_write_batch";
  const std::int64_t needed = impl_->make_plan(f, "seq_ids", "num_scheduled_tokens", seq_ids, num_scheduled_tokens);
  impl_->require_fits(f, batch);
  std::vector<BlockCopy> copies;
  impl_->prepare_plan(f, needed, copies);
  std::int64_t num_tokens = 0;
  for (std::size_t i = 0; i < impl_->plan.size(); ++i) {
    impl_->execute_step(impl_->plan[i], copies);
    impl_->write_row(impl_->plan[i], batch, static_cast<std::int64_t>(i), num_tokens);
    num_tokens += impl_->plan[i].num_scheduled;
  }
  impl_->write_padding(batch, num_tokens);
  return copies;
}

// ---- Prefix cache. ----

std::vector<BlockHash> BlockAllocator::hash_blocks(std::span<const TokenId> token_ids, std::string_view salt,
                                                   std::span<const ExtraKey> extra_keys) const {
  const Impl& m = *impl_;  // reads only what is constant: no lock
  const std::vector<ExtraBytes> encoded = encode_extras("hash_blocks", salt, extra_keys, m.bs);
  std::vector<BlockHash> hashes(token_ids.size() / to_index(m.bs));
  BlockHash parent;
  auto extra = encoded.begin();
  for (std::size_t i = 0; i < hashes.size(); ++i) {
    const auto tokens = token_ids.subspan(i * to_index(m.bs), to_index(m.bs));
    const bool has_extra = extra != encoded.end() && extra->block_idx == static_cast<std::int64_t>(i);
    if (m.options.hash_function) {
      const std::string_view bytes = has_extra ? std::string_view(extra->bytes) : std::string_view();
      parent = m.options.hash_function(parent, tokens, std::as_bytes(std::span(bytes)));
    } else if (has_extra) {
      const BlockHash digest = hash_bytes(m.key, extra->bytes);
      parent = hash_block(m.key, parent, &digest, tokens);
    } else {
      parent = hash_block(m.key, parent, nullptr, tokens);
    }
    if (has_extra) ++extra;
    hashes[i] = parent;
  }
  return hashes;
}

void BlockAllocator::reset_prefix_cache() {
  const Lock lock(impl_->mutex);
  Impl& m = *impl_;
  m.make_room_for_events(1);
  for (std::int64_t i = 0; i < m.n; ++i) m.forget(m.blocks[to_index(i)]);
  m.num_free += std::exchange(m.num_cached, 0);
  std::fill(m.table.begin(), m.table.end(), TableSlot{});
  m.sequences.for_each([](Sequence& seq) {
    seq.chain.clear();
    if (!seq.blocks.empty()) seq.is_cacheable = false;  // also what is being computed right now
  });
  m.push_event({BlockEvent::Kind::kCleared, kNoBlock, {}, {}});
}

std::vector<BlockEvent> BlockAllocator::take_events() {
  const Lock lock(impl_->mutex);
  std::vector<BlockEvent> events;
  events.reserve(impl_->events.size());
  auto next = impl_->event_tokens.begin();
  for (const PendingEvent& event : impl_->events) {
    events.push_back({event.kind, event.block_id, event.hash, event.parent_hash, {}});
    if (event.kind != BlockEvent::Kind::kStored) continue;
    const auto end = next + static_cast<std::ptrdiff_t>(impl_->bs);
    events.back().token_ids.assign(next, end);
    next = end;
  }
  impl_->events.clear();
  impl_->event_tokens.clear();
  return events;
}

// ---- Proof. ----

void BlockAllocator::check() const {
  const Lock lock(impl_->mutex);
  impl_->check();
}

void BlockAllocator::Impl::check() const {
  const auto require = [](bool condition, const char* what, std::int64_t id) {
    if (!condition) throw std::logic_error(std::string("[block_allocator] check: ") + what + " (" + text(id) + ")");
  };

  // Sequences: their own consistency, and the references they account for.
  std::vector<std::int64_t> seq_refs(to_index(n), 0);
  std::vector<std::int64_t> extra_refs(extras.num_entries() + 1, 0);
  std::vector<bool> host_held(host_used.size(), false);
  std::size_t num_sequences = 0;
  sequences.for_each([&](const Sequence& seq) {
    ++num_sequences;
    require(sequences.find(seq.id) == &seq, "sequence not found under its id", seq.id);
    require(seq.num_computed >= 0 && seq.num_computed <= seq.num_reserved, "computed tokens exceed reserved ones", seq.id);
    require(seq.num_reserved <= seq.num_blocks() * bs, "reserved tokens exceed blocks", seq.id);
    require(seq.num_released * bs <= seq.num_computed, "a released block was not computed", seq.id);
    for (const ExtraAt& extra : seq.extras) ++extra_refs[extra.extra_id];
    for (std::int64_t i = 0; i < seq.num_blocks(); ++i) {
      const BlockId id = seq.blocks[to_index(i)];
      require((id == kNoBlock) == (i < seq.num_released), "released blocks are not the leading ones", seq.id);
      if (id == kNoBlock) continue;
      if (seq.is_swapped) {
        require(id >= 0 && id < static_cast<BlockId>(host_used.size()), "host block out of range", id);
        require(!host_held[to_index(id)], "host block held twice", id);
        host_held[to_index(id)] = true;
      } else {
        require(id >= 0 && id < n, "block out of range", id);
        ++seq_refs[to_index(id)];
        if (i * bs >= seq.num_computed) {
          require(!at(id).is_cached(), "a block without computed tokens is cached", id);
        }
      }
    }
    const std::int64_t full = num_full_blocks(seq, seq.num_computed, seq.num_tokens());
    const auto num_links = static_cast<std::int64_t>(seq.chain.size());
    require(num_links <= std::min(seq.num_computed, seq.num_tokens()) / bs, "chain longer than the full blocks", seq.id);
    require(seq.is_swapped || !seq.is_cacheable || num_links == full, "a full block is not in the chain", seq.id);
    Link parent;
    for (std::int64_t i = 0; i < num_links; ++i) {
      const Link& link = seq.chain[to_index(i)];
      const auto tokens = std::span<const TokenId>(seq.tokens).subspan(to_index(i * bs), to_index(bs));
      require(link.hash == hash_of(parent.hash, extra_at(seq.extras, i), tokens), "chain hash", seq.id);
      if (!seq.is_swapped && i >= seq.num_released) {
        const BlockId id = seq.blocks[to_index(i)];
        require(at(id).prefix_id == link.prefix_id && at(id).hash == link.hash, "block is not what the chain says", id);
        require(at(id).extra_id == extra_at(seq.extras, i), "block has other extra keys than its sequence", id);
        require(std::equal(tokens.begin(), tokens.end(), tokens_of(id).begin()), "block has other tokens than its sequence", id);
      }
      parent = link;
    }
  });
  require(num_sequences == sequences.size(), "number of sequences", static_cast<std::int64_t>(sequences.size()));

  // Host tier.
  for (const BlockId id : host_free) {
    require(!host_used[to_index(id)] && !host_held[to_index(id)], "free host block in use or twice in the list", id);
    host_held[to_index(id)] = true;
  }
  for (std::size_t i = 0; i < host_held.size(); ++i) {
    require(host_held[i], "host block neither free nor held", static_cast<std::int64_t>(i));
  }

  // Blocks: reference counts and states.
  std::int64_t live = 0, cached = 0, unused = 0, pinned = 0, num_heads = 0;
  for (BlockId id = 0; id < n; ++id) {
    const Block& b = at(id);
    const std::int64_t num_holders = b.raw_refs + b.pin_refs + seq_refs[to_index(id)];
    require(b.raw_refs >= 0 && b.pin_refs >= 0 && b.refs == num_holders, "reference count", id);
    require(claims[to_index(id)] == 0, "scratch not cleared", id);
    ++(b.refs > 0 ? live : b.is_cached() ? cached : unused);
    if (b.pin_refs > 0) ++pinned;
    require((b.prev == kNoBlock) == (b.refs > 0), "in the free list and in use, or neither", id);
    require((b.next == kNoBlock) == (b.refs > 0), "in the free list and in use, or neither", id);
    if (!b.is_cached()) {
      require(b.extra_id == kNoExtra && !b.has_twin(), "leftovers of a cached block", id);
      continue;
    }
    require(options.enable_prefix_cache && b.prefix_id <= last_prefix_id && b.parent_prefix_id < b.prefix_id, "prefix id", id);
    ++extra_refs[b.extra_id];
    if (b.twin_prev == kNoBlock) {
      ++num_heads;
      require(find(b.hash, b.parent_prefix_id, b.extra_id, tokens_of(id).data()) == id, "contents not found, or found twice", id);
    } else {
      const Block& t = at(b.twin_prev);
      require(t.twin_next == id && t.prefix_id == b.prefix_id && t.hash == b.hash && t.extra_id == b.extra_id, "twins differ", id);
      require(b.refs > 0, "a twin is kept though nobody holds it", id);
    }
    if (b.twin_next != kNoBlock) require(at(b.twin_next).twin_prev == id && b.refs > 0, "twin list", id);
  }
  require(live + cached + unused == n, "states do not add up", live);
  require(unused == num_free && cached == num_cached && pinned == num_pinned, "counts", unused);

  // Free list: exactly the unreferenced blocks, each once, free ones first.
  std::int64_t num_listed = 0;
  bool seen_cached = false;
  BlockId prev = static_cast<BlockId>(n);
  for (BlockId id = blocks.back().next; id != n; id = at(id).next) {
    require(++num_listed <= n && at(id).prev == prev && at(id).refs == 0, "free list", id);
    seen_cached = seen_cached || at(id).is_cached();
    require(seen_cached == at(id).is_cached(), "a free block behind a cached one", id);
    prev = id;
  }
  require(num_listed == unused + cached && blocks.back().prev == prev, "free list length", num_listed);

  // Table: exactly the first twins.
  std::int64_t num_entries = 0;
  for (const TableSlot& slot : table) {
    if (slot.block_id == kNoBlock) continue;
    ++num_entries;
    const Block& b = at(slot.block_id);
    require(b.is_cached() && b.twin_prev == kNoBlock && slot.tag == tag_of(b.hash), "table entry", slot.block_id);
  }
  require(num_entries == num_heads, "table size", num_entries);

  for (std::uint32_t id = 1; id < extra_refs.size(); ++id) require(extras[id].refs == extra_refs[id], "extra key references", id);
}

}  // namespace quire
