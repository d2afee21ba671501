// What the block allocator keeps per block, per sequence, and per salt or extra key.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <new>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "core/block_hash.h"
#include "quire/block_allocator.h"

namespace quire::block_allocator {

inline constexpr std::uint64_t kRootPrefix = 0;  // as a parent: no parent; as a block's own: not cached
inline constexpr std::uint32_t kNoExtra = 0;
inline constexpr std::uint32_t kUnknownExtra = std::numeric_limits<std::uint32_t>::max();

// Room for `num_more` further elements, growing geometrically, so that the push_backs that follow cannot throw.
template <typename T>
void make_room(std::vector<T>& v, std::size_t num_more) {
  const std::size_t needed = v.size() + num_more;
  if (needed > v.capacity()) v.reserve(std::max(needed, v.capacity() * 2));
}

struct Block {
  BlockHash hash;
  std::uint64_t prefix_id = kRootPrefix;         // names the contents of this block and all before it; never used twice
  std::uint64_t parent_prefix_id = kRootPrefix;
  std::uint32_t extra_id = kNoExtra;
  std::int32_t refs = 0;       // raw_refs + pin_refs + the sequences that hold it
  std::int32_t raw_refs = 0;
  std::int32_t pin_refs = 0;
  BlockId prev = kNoBlock;     // free list, while refs == 0
  BlockId next = kNoBlock;
  BlockId twin_prev = kNoBlock;  // blocks of the same contents; the first of them is in the table
  BlockId twin_next = kNoBlock;

  bool is_cached() const { return prefix_id != kRootPrefix; }
  bool has_twin() const { return twin_prev != kNoBlock || twin_next != kNoBlock; }
};
static_assert(sizeof(Block) == 64, "one cache line per block");

// A full block of a sequence in the prefix cache's terms.
struct Link {
  BlockHash hash;
  std::uint64_t prefix_id = kRootPrefix;
};

struct ExtraAt {
  std::int64_t block_idx = 0;
  std::uint32_t extra_id = kNoExtra;
};

struct ExtraBytes {
  std::int64_t block_idx = 0;
  std::string bytes;
};

struct Sequence {
  SequenceId id = 0;
  std::vector<BlockId> blocks;  // host blocks while swapped
  std::int64_t num_computed = 0;
  std::int64_t num_reserved = 0;
  std::int64_t num_released = 0;
  std::uint64_t mark = 0;  // the last batch that named it
  bool is_swapped = false;
  bool is_cacheable = true;
  std::vector<TokenId> tokens;
  std::vector<Link> chain;      // of the leading full blocks whose contents are known
  std::vector<ExtraAt> extras;  // by block_idx

  std::int64_t num_tokens() const { return static_cast<std::int64_t>(tokens.size()); }
  std::int64_t num_blocks() const { return static_cast<std::int64_t>(blocks.size()); }
};

// Sequence ids to sequences: linear probing, deletion by shifting back.
class SequenceMap {
 public:
  explicit SequenceMap(std::uint64_t seed) : seed_(seed), slots_(16) {}

  Sequence* find(SequenceId id) const {
    for (std::size_t i = home(id);; i = next(i)) {
      Sequence* const seq = slots_[i].get();
      if (seq == nullptr || seq->id == id) return seq;
    }
  }

  void reserve_one() {
    if ((size_ + 1) * 2 <= slots_.size()) return;
    std::vector<std::unique_ptr<Sequence>> old(slots_.size() * 2);
    old.swap(slots_);
    for (auto& seq : old) {
      if (seq) place(std::move(seq));
    }
  }

  // After reserve_one(); the id must be new.
  void insert(std::unique_ptr<Sequence> seq) noexcept {
    place(std::move(seq));
    ++size_;
  }

  std::unique_ptr<Sequence> extract(SequenceId id) noexcept {
    std::size_t hole = home(id);
    while (slots_[hole]->id != id) hole = next(hole);
    std::unique_ptr<Sequence> seq = std::move(slots_[hole]);
    for (std::size_t i = next(hole); slots_[i]; i = next(i)) {
      const std::size_t mask = slots_.size() - 1;
      if (((i - home(slots_[i]->id)) & mask) >= ((i - hole) & mask)) {
        slots_[hole] = std::move(slots_[i]);
        hole = i;
      }
    }
    --size_;
    return seq;
  }

  std::size_t size() const { return size_; }

  template <typename F>
  void for_each(F&& f) const {
    for (const auto& seq : slots_) {
      if (seq) f(*seq);
    }
  }

 private:
  std::size_t home(SequenceId id) const {
    std::uint64_t x = static_cast<std::uint64_t>(id) ^ seed_;
    x = (x ^ (x >> 32)) * 0xd6e8feb86659fd93U;
    x = (x ^ (x >> 32)) * 0xd6e8feb86659fd93U;
    return static_cast<std::size_t>(x ^ (x >> 32)) & (slots_.size() - 1);
  }
  std::size_t next(std::size_t i) const { return (i + 1) & (slots_.size() - 1); }
  void place(std::unique_ptr<Sequence> seq) noexcept {
    std::size_t i = home(seq->id);
    while (slots_[i]) i = next(i);
    slots_[i] = std::move(seq);
  }

  std::uint64_t seed_;
  std::vector<std::unique_ptr<Sequence>> slots_;
  std::size_t size_ = 0;
};

// Salts and extra keys by value, so that a block compares them exactly in one integer. Ids are reference counted.
class ExtraPool {
 public:
  struct Entry {
    std::string bytes;
    BlockHash digest;
    std::int64_t refs = 0;
  };

  std::uint32_t find(std::string_view bytes) const {
    const auto it = ids_.find(bytes);
    return it == ids_.end() ? kUnknownExtra : it->second;
  }

  std::uint32_t acquire(const std::string& bytes, const BlockHash& key) {
    const std::uint32_t known = find(bytes);
    if (known != kUnknownExtra) {
      ++entries_[known - 1]->refs;
      return known;
    }
    if (unused_.empty()) {
      if (entries_.size() + 1 >= kUnknownExtra) throw std::bad_alloc();
      // Room for every id, for release() not to throw.
      if (unused_.capacity() <= entries_.size()) unused_.reserve(std::max<std::size_t>(16, entries_.size() * 2));
      entries_.push_back(std::make_unique<Entry>());
      unused_.push_back(static_cast<std::uint32_t>(entries_.size()));
    }
    const std::uint32_t id = unused_.back();
    Entry& entry = *entries_[id - 1];
    entry.bytes = bytes;
    ids_.emplace(entry.bytes, id);
    entry.digest = hash_bytes(key, bytes);
    entry.refs = 1;
    unused_.pop_back();
    return id;
  }

  void add_ref(std::uint32_t id) noexcept {
    if (id != kNoExtra) ++entries_[id - 1]->refs;
  }

  void release(std::uint32_t id) noexcept {
    if (id == kNoExtra) return;
    Entry& entry = *entries_[id - 1];
    if (--entry.refs > 0) return;
    ids_.erase(entry.bytes);
    entry.bytes = std::string();
    unused_.push_back(id);
  }

  const Entry& operator[](std::uint32_t id) const { return *entries_[id - 1]; }
  std::size_t num_entries() const { return entries_.size(); }

 private:
  std::vector<std::unique_ptr<Entry>> entries_;
  std::vector<std::uint32_t> unused_;
  std::unordered_map<std::string_view, std::uint32_t> ids_;
};

}  // namespace quire::block_allocator
