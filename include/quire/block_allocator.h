// The block allocator: who owns which block of the paged KV cache, which blocks can be reused, and a batch's index tensors.
// SPDX-License-Identifier: Apache-2.0
//
// It holds block ids, token ids and counts, never tensors: it runs on the host, knows no device, and launches nothing.
//
// Every device block is in exactly one of three states, so num_live + num_cached + num_free == num_blocks at all times:
//   live    someone holds a reference: a sequence, an allocate() caller, or a pin (pinned blocks are a part of the live ones)
//   cached  nobody holds it, but its keys and values are known and it can be hit; evicted when blocks run out, oldest first
//   free    nobody holds it and its contents mean nothing
// Block 0 is a block like any other: no null block is reserved. Unused entries of a block table are kNoBlock (-1), unused
// slots are -1, and the kernels skip both.
//
// A sequence's way through a step:
//   add_sequence     the prompt's tokens; blocks of the prefix cache that match are taken over as already computed
//   grow             blocks for the next num_new_tokens (a chunk of the prompt, one decoded token, or a few draft tokens)
//   write_batch      the index tensors of the scheduled batch; grow_and_write_batch does both in one pass
//   (the caller runs the returned copies, in the order in which the calls returned them, then the model)
//   commit           the keys and values are there: blocks that became full enter the prefix cache and can now be hit
//   append_tokens    the sampled tokens
// Tokens may be appended before or after commit; a block enters the cache when it is both computed and its tokens are known.
//
// Every function locks one mutex and may be called from any thread. A function that throws has changed nothing.
// Throws: std::invalid_argument (a bad value, a block that the caller does not hold, a sequence in the wrong state), IndexError
// (an id that does not exist), OutOfBlocksError, OutOfMemoryError and std::bad_alloc (host memory).
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "quire/error.h"
#include "quire/export.h"

namespace quire {

using BlockId = std::int32_t;     ///< In [0, num_blocks), or kNoBlock.
using SequenceId = std::int64_t;  ///< Any value; the caller's choice.
using TokenId = std::int32_t;     ///< Any value.

inline constexpr BlockId kNoBlock = -1;
inline constexpr std::int64_t kNoSlot = -1;

/// Not enough free and cached blocks; nothing was allocated.
class QUIRE_API OutOfBlocksError : public OutOfMemoryError {
 public:
  OutOfBlocksError(const std::string& message, std::int64_t num_requested, std::int64_t num_available)
      : OutOfMemoryError(message), num_requested_(num_requested), num_available_(num_available) {}
  std::int64_t num_requested() const noexcept { return num_requested_; }
  std::int64_t num_available() const noexcept { return num_available_; }

 private:
  std::int64_t num_requested_;
  std::int64_t num_available_;
};

/// The hash of a block and of everything before it.
struct BlockHash {
  std::uint64_t lo = 0;
  std::uint64_t hi = 0;
  friend bool operator==(const BlockHash&, const BlockHash&) = default;
};

/// Copy (or transfer between tiers) of one whole block, in every layer, for K and V.
struct BlockCopy {
  BlockId src = kNoBlock;
  BlockId dst = kNoBlock;
  friend bool operator==(const BlockCopy&, const BlockCopy&) = default;
};

/// Something besides the tokens that a block's contents depend on (an adapter's name, an image's digest) from a token on.
struct ExtraKey {
  std::int64_t token_idx = 0;  ///< The first token that depends on it; 0: the whole sequence.
  std::string value;           ///< Any bytes.
};

/// Replaces the hash of a block: a function of the parent's hash (zeros for the first block), the block's tokens, and the salt
/// and extra keys that enter here (empty for most). Called under the lock: it must not throw, nor call the allocator. A
/// poor function costs time, never a wrong hit.
using BlockHashFunction =
    std::function<BlockHash(const BlockHash& parent, std::span<const TokenId> tokens, std::span<const std::byte> extra)>;

struct BlockAllocatorOptions {
  std::int64_t num_blocks = 0;       ///< Device blocks, 1 to 2^31 - 2.
  std::int64_t block_size = 16;      ///< Tokens per block, 1 to 65536.
  std::int64_t num_host_blocks = 0;  ///< Blocks of the host tier, for swap_out.
  double watermark = 0.01;           ///< Share of the blocks, in [0, 1), that can_allocate and can_grow keep back when asked to.
  bool enable_prefix_cache = true;
  bool enable_events = false;
  std::int64_t max_events = 1 << 20;             ///< Events kept until take_events(); beyond it they are lost, with a kLost event.
  std::optional<BlockHash> hash_key;             ///< Left out: random, so that nobody outside can construct collisions.
  BlockHashFunction hash_function;               ///< Empty: SipHash-2-4-128 of parent | tokens (little-endian) | SipHash(extra).
};

/// A change of the prefix cache, for routers and offload tiers. Events speak of contents: a second block with the same contents
/// makes no event, and neither does losing one of two.
struct BlockEvent {
  enum class Kind : std::uint8_t {
    kStored,   ///< hash became hittable in block_id.
    kRemoved,  ///< hash can no longer be hit.
    kCleared,  ///< Nothing can be hit any more.
    kLost,     ///< Events were dropped here because nobody took them in time.
  };
  Kind kind = Kind::kStored;
  BlockId block_id = kNoBlock;
  BlockHash hash;
  BlockHash parent_hash;           ///< kStored: zeros for a sequence's first block.
  std::vector<TokenId> token_ids;  ///< kStored: the block's tokens.
};

struct BlockAllocatorStats {
  std::int64_t num_blocks = 0;
  std::int64_t num_live = 0;
  std::int64_t num_cached = 0;
  std::int64_t num_free = 0;
  std::int64_t num_pinned = 0;  ///< A part of num_live.
  std::int64_t num_host_blocks = 0;
  std::int64_t num_host_free = 0;
  std::int64_t num_sequences = 0;
  std::int64_t num_lookup_tokens = 0;  ///< Since construction: tokens of the sequences that asked the prefix cache.
  std::int64_t num_hit_tokens = 0;     ///< Of these, found.
  std::int64_t num_evictions = 0;      ///< Cached blocks that were given to somebody else.
  std::int64_t num_copies = 0;         ///< Copy-on-write.
};

struct SequenceInfo {
  std::int64_t num_tokens = 0;           ///< Token ids known.
  std::int64_t num_computed_tokens = 0;  ///< Tokens whose keys and values are in the cache.
  std::int64_t num_reserved_tokens = 0;  ///< Tokens that there is room for: what grow() was last asked for.
  std::int64_t num_blocks = 0;           ///< Entries of its block table, released ones included.
  std::int64_t num_released_blocks = 0;  ///< Leading entries that are kNoBlock after release_out_of_window.
  bool is_swapped = false;
  bool is_cacheable = true;  ///< False from reset_prefix_cache() until its blocks are recomputed.
};

/// The arrays that describe a batch, in the caller's memory. Rows and slots past the batch are padding and are written too.
struct BatchView {
  std::int32_t* block_tables = nullptr;     ///< [max_seqs, max_blocks_per_seq], unit inner stride; padded with -1.
  std::int64_t block_tables_stride = 0;     ///< Elements between rows, at least max_blocks_per_seq.
  std::int64_t max_blocks_per_seq = 0;
  std::int64_t* slot_mapping = nullptr;     ///< [max_tokens]: block_id * block_size + offset; padded with -1.
  std::int64_t max_tokens = 0;
  std::int32_t* seq_lens = nullptr;         ///< [max_seqs]: computed and scheduled tokens; padded with 0.
  std::int32_t* query_start_loc = nullptr;  ///< [max_seqs + 1]; padded with its last value.
  std::int64_t max_seqs = 0;
  std::int64_t* positions = nullptr;        ///< [max_tokens] or null: each token's place in its sequence; padded with -1.
};

/// Allocates the blocks of a paged KV cache, shares them between sequences, and keeps freed ones for prefix hits.
class QUIRE_API BlockAllocator {
 public:
  /// O(num_blocks). Throws std::invalid_argument for values outside the ranges given at BlockAllocatorOptions.
  explicit BlockAllocator(BlockAllocatorOptions options);
  ~BlockAllocator();
  BlockAllocator(const BlockAllocator&) = delete;
  BlockAllocator& operator=(const BlockAllocator&) = delete;

  // ---- Counts. O(1). ----

  std::int64_t num_blocks() const noexcept;
  std::int64_t block_size() const noexcept;
  std::int64_t num_host_blocks() const noexcept;
  std::int64_t watermark_blocks() const noexcept;  ///< The blocks that `keep_watermark` keeps back.
  BlockAllocatorStats stats() const;
  /// The share of blocks that are live, in [0, 1].
  double usage() const;
  /// References to a block: those of allocate() and ref(), of sequences, and of pins.
  std::int64_t num_references(BlockId block_id) const;

  // ---- Raw blocks, for callers that keep their own tables. ----

  /// Whether `num_blocks` blocks could be allocated now, and the watermark's blocks would still be there afterwards if asked for.
  bool can_allocate(std::int64_t num_blocks, bool keep_watermark = false) const;
  /// Takes out.size() blocks, or throws OutOfBlocksError and takes none. Free blocks first, then the oldest cached ones. O(size).
  void allocate(std::span<BlockId> out);
  std::vector<BlockId> allocate(std::int64_t num_blocks);
  /// Gives up one reference of allocate() or ref() per entry. A block that is not so held (a double free, a sequence's block) is
  /// std::invalid_argument, and then none is freed. Pass a chain of blocks tail first, for the tail to be evicted first.
  void free(std::span<const BlockId> block_ids);
  /// Adds one reference per entry, to be given up by free(). The blocks must be live or cached.
  void ref(std::span<const BlockId> block_ids);
  /// Makes a block that the caller holds writable: shared, it is exchanged for a new one, to which src must be copied; the
  /// caller then holds dst instead of src. Not shared, src == dst and there is nothing to copy.
  BlockCopy copy_on_write(BlockId block_id);
  /// Keeps live or cached blocks from being evicted or written to, until as many calls of unpin.
  void pin(std::span<const BlockId> block_ids);
  void unpin(std::span<const BlockId> block_ids);

  // ---- Sequences. ----

  /// Starts a sequence and takes over the longest run of cached full blocks that hold its tokens under the same salt and extra
  /// keys, except that the last token is never taken, so that there is always one to compute. Needs no free block.
  /// Returns the number of tokens taken over. O(tokens hashed), which ends at the first miss.
  std::int64_t add_sequence(SequenceId seq_id, std::span<const TokenId> token_ids, std::string_view salt = {},
                            std::span<const ExtraKey> extra_keys = {});
  /// What add_sequence would return, changing nothing.
  std::int64_t num_cached_tokens(std::span<const TokenId> token_ids, std::string_view salt = {},
                                 std::span<const ExtraKey> extra_keys = {}) const;
  bool has_sequence(SequenceId seq_id) const;
  std::vector<SequenceId> sequence_ids() const;
  SequenceInfo sequence(SequenceId seq_id) const;
  std::vector<TokenId> token_ids(SequenceId seq_id) const;
  /// The sequence's device blocks, or its host blocks while it is swapped out.
  std::vector<BlockId> block_table(SequenceId seq_id) const;

  /// Blocks that grow would take, copies included.
  std::int64_t num_blocks_needed(SequenceId seq_id, std::int64_t num_new_tokens) const;
  bool can_grow(SequenceId seq_id, std::int64_t num_new_tokens, bool keep_watermark = false) const;
  /// Makes room for `num_new_tokens` after the computed ones. A last block that others hold too is exchanged for a copy: the
  /// result says which blocks to copy before the sequence is written to. Asking again for the same room does nothing.
  std::vector<BlockCopy> grow(SequenceId seq_id, std::int64_t num_new_tokens);
  /// Appends token ids. O(num_tokens).
  void append_tokens(SequenceId seq_id, std::span<const TokenId> token_ids);
  /// Appends token_ids[i] to seq_ids[i].
  void append_token_batch(std::span<const SequenceId> seq_ids, std::span<const TokenId> token_ids);
  /// The next `num_tokens` tokens' keys and values are in the cache (grow made room for them). Full blocks can now be hit.
  void commit(SequenceId seq_id, std::int64_t num_tokens);
  /// commit(seq_ids[i], num_tokens[i]), all or nothing. No sequence may occur twice.
  void commit_batch(std::span<const SequenceId> seq_ids, std::span<const std::int64_t> num_tokens);
  /// Forgets all but the first `num_tokens` tokens and computed tokens, and gives up the blocks that only they needed. Must not
  /// reach into released blocks.
  void truncate(SequenceId seq_id, std::int64_t num_tokens);
  /// Starts `child` with the parent's tokens and computed blocks, shared until one of them writes. O(blocks + tokens).
  void fork(SequenceId parent, SequenceId child);
  /// Ends the sequence. Its blocks become free, or cached with the tail to be evicted first.
  void free_sequence(SequenceId seq_id);
  /// Gives up all blocks but keeps the tokens: the sequence is to be recomputed.
  void preempt(SequenceId seq_id);
  /// For a sequence without blocks (preempted, or added when the cache had less): asks the prefix cache as add_sequence does.
  std::int64_t match_prefix(SequenceId seq_id);
  /// Gives up the blocks that lie wholly before the last `window` tokens, counting the one that comes next; their table entries
  /// become kNoBlock. Returns how many were given up.
  std::int64_t release_out_of_window(SequenceId seq_id, std::int64_t window);
  /// How many leading blocks all of these sequences share, by id.
  std::int64_t num_common_prefix_blocks(std::span<const SequenceId> seq_ids) const;

  // ---- Host tier. ----

  bool can_swap_out(SequenceId seq_id) const;
  bool can_swap_in(SequenceId seq_id, bool keep_watermark = false) const;
  /// Moves the sequence's computed blocks to the host tier; the transfers are src (device) to dst (host). The device blocks are
  /// given up: run the transfers before anything else is written to the cache. Throws OutOfBlocksError if the host tier is full.
  std::vector<BlockCopy> swap_out(SequenceId seq_id);
  /// Brings it back; src is the host block, dst the device block. Blocks still in the prefix cache need no transfer.
  std::vector<BlockCopy> swap_in(SequenceId seq_id);

  // ---- Batches. ----

  /// Writes the index tensors for the next num_scheduled_tokens[i] tokens of seq_ids[i]; grow must have made room. Throws, before
  /// anything is written, when the batch does not fit the arrays or a sequence occurs twice. O(max_seqs * max_blocks_per_seq).
  void write_batch(std::span<const SequenceId> seq_ids, std::span<const std::int64_t> num_scheduled_tokens, const BatchView& batch);
  /// grow for every sequence, all or nothing, and write_batch.
  std::vector<BlockCopy> grow_and_write_batch(std::span<const SequenceId> seq_ids, std::span<const std::int64_t> num_scheduled_tokens,
                                              const BatchView& batch);

  // ---- Prefix cache. ----

  /// The hashes of the full blocks of these tokens, as they appear in events. O(num_tokens).
  std::vector<BlockHash> hash_blocks(std::span<const TokenId> token_ids, std::string_view salt = {},
                                     std::span<const ExtraKey> extra_keys = {}) const;
  /// Forgets all cached contents, as after a change of weights. Sequences keep their blocks, but what they have computed, and what
  /// they go on to compute from it, never becomes a hit. O(num_blocks).
  void reset_prefix_cache();
  /// The events since the last call, oldest first.
  std::vector<BlockEvent> take_events();

  /// Proves every invariant (states, reference counts, lists, table, chains) or throws std::logic_error. O(everything).
  void check() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace quire
