// The proof of the block allocator's invariants.
// SPDX-License-Identifier: Apache-2.0
#include "core/block_allocator_impl.h"

namespace quire {

namespace {

void require(bool condition, const char* what, std::int64_t id) {
  if (!condition) throw std::logic_error(std::string("[BlockAllocator.check] ") + what + " (" + text(id) + ")");
}

}  // namespace

/// What holds references, counted.
struct BlockAllocator::Impl::Holders {
  std::vector<std::int64_t> of_blocks;  // sequences
  std::vector<std::int64_t> of_extras;  // sequences and cached blocks
  std::vector<bool> of_host;            // whether a sequence does
};

void BlockAllocator::Impl::check() const {
  Holders holders{std::vector<std::int64_t>(to_index(n), 0), std::vector<std::int64_t>(extras.num_entries() + 1, 0),
                  std::vector<bool>(host_used.size(), false)};
  check_sequences(holders);
  check_host_tier(holders);
  const std::int64_t num_first_twins = check_blocks(holders);
  check_free_list();
  check_table(num_first_twins);
  for (std::uint32_t id = 1; id < holders.of_extras.size(); ++id)
    require(extras[id].refs == holders.of_extras[id], "extra key references", id);
}

// Their own consistency, and the references they account for.
void BlockAllocator::Impl::check_sequences(Holders& holders) const {
  std::size_t num_sequences = 0;
  sequences.for_each([&](const Sequence& seq) {
    ++num_sequences;
    require(sequences.find(seq.id) == &seq, "sequence not found under its id", seq.id);
    require(seq.num_computed >= 0 && seq.num_computed <= seq.num_reserved, "computed tokens exceed reserved ones", seq.id);
    require(seq.num_reserved <= seq.num_blocks() * bs, "reserved tokens exceed blocks", seq.id);
    require(seq.num_released * bs <= seq.num_computed, "a released block was not computed", seq.id);
    for (const ExtraAt& extra : seq.extras) ++holders.of_extras[extra.extra_id];
    for (std::int64_t i = 0; i < seq.num_blocks(); ++i) {
      const BlockId id = seq.blocks[to_index(i)];
      require((id == kNoBlock) == (i < seq.num_released), "released blocks are not the leading ones", seq.id);
      if (id == kNoBlock) continue;
      if (seq.is_swapped) {
        require(id >= 0 && id < static_cast<BlockId>(host_used.size()), "host block out of range", id);
        require(!holders.of_host[to_index(id)], "host block held twice", id);
        holders.of_host[to_index(id)] = true;
      } else {
        require(id >= 0 && id < n, "block out of range", id);
        ++holders.of_blocks[to_index(id)];
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
}

void BlockAllocator::Impl::check_host_tier(Holders& holders) const {
  for (const BlockId id : host_free) {
    require(!host_used[to_index(id)] && !holders.of_host[to_index(id)], "free host block in use or twice in the list", id);
    holders.of_host[to_index(id)] = true;
  }
  for (std::size_t i = 0; i < holders.of_host.size(); ++i) {
    require(holders.of_host[i], "host block neither free nor held", static_cast<std::int64_t>(i));
  }
}

// Reference counts and states. Returns how many blocks are the first of their twins.
std::int64_t BlockAllocator::Impl::check_blocks(Holders& holders) const {
  std::int64_t live = 0, cached = 0, unused = 0, pinned = 0, num_heads = 0;
  for (BlockId id = 0; id < n; ++id) {
    const Block& b = at(id);
    const std::int64_t num_holders = b.raw_refs + b.pin_refs + holders.of_blocks[to_index(id)];
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
    ++holders.of_extras[b.extra_id];
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
  return num_heads;
}

// Exactly the unreferenced blocks, each once, free ones first.
void BlockAllocator::Impl::check_free_list() const {
  std::int64_t num_listed = 0;
  bool seen_cached = false;
  BlockId prev = static_cast<BlockId>(n);
  for (BlockId id = blocks.back().next; id != n; id = at(id).next) {
    require(++num_listed <= n && at(id).prev == prev && at(id).refs == 0, "free list", id);
    seen_cached = seen_cached || at(id).is_cached();
    require(seen_cached == at(id).is_cached(), "a free block behind a cached one", id);
    prev = id;
  }
  require(num_listed == num_free + num_cached && blocks.back().prev == prev, "free list length", num_listed);
}

// Exactly the first twins.
void BlockAllocator::Impl::check_table(std::int64_t num_first_twins) const {
  std::int64_t num_entries = 0;
  for (const TableSlot& slot : table) {
    if (slot.block_id == kNoBlock) continue;
    ++num_entries;
    const Block& b = at(slot.block_id);
    require(b.is_cached() && b.twin_prev == kNoBlock && slot.tag == tag_of(b.hash), "table entry", slot.block_id);
  }
  require(num_entries == num_first_twins, "table size", num_entries);
}

}  // namespace quire
