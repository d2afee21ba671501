// The calls of the block allocator. The contract is in the header.
// SPDX-License-Identifier: Apache-2.0
#include "core/block_allocator_impl.h"

namespace quire {

using Lock = std::lock_guard<std::mutex>;

BlockAllocator::BlockAllocator(BlockAllocatorOptions options) {
  const std::int64_t num_blocks = options.num_blocks, num_host_blocks = options.num_host_blocks;
  try {
    impl_ = std::make_unique<Impl>(std::move(options));
  } catch (const std::bad_alloc&) {
    throw OutOfMemoryError("[BlockAllocator] num_blocks, num_host_blocks: expected as many as host memory has room for, got " +
                           std::to_string(num_blocks) + " and " + std::to_string(num_host_blocks));
  }
}
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

}  // namespace quire
