// How the CTAs of a launch share a batch's keys: each works out its own part on the device, from the lengths alone.
// SPDX-License-Identifier: Apache-2.0
//
// The batch is one line: sequences, in them tiles of rows, in them kv heads, in them steps of keys. A CTA has a stretch of that line, as
// long as any other's, which may begin and end within a tile. A tile that several CTAs have a part of is put together by the one that
// finishes last, from what the others left in the workspace.
#pragma once

#include "cuda/attention/plan.cuh"

namespace quire::cuda::attn {

/// No CTA's stretch is shorter, if there is as much.
constexpr int kMinStretch = kWarps;

/// The part that a key lies in.
__device__ __forceinline__ int part_of(int key) {
  if (key < 8192) return key / 512;
  const int octave = 18 - __clz(key);
  return 8 + 8 * octave + (key >> (10 + octave));
}

/// A CTA's place on the line, in shared memory; one thread moves it on.
struct Walk {
  Tile tile;
  FullRange full;  // of the tile
  // On the line, in units of 2^line_shift steps: everything fits 31 bits.
  int begin, end;     // the CTA's stretch
  int stretch;        // the length of everyone's
  int first_cut;      // batch-invariant: no part before this one is cut off a tile's beginning
  int aligned_length;  // 0, or of every tile on the line, with nothing before its keys: a multiple of the stretch
  int tile_idx;        // of aligned tiles
  int keys_start;     // of the tile
  int length;         // that the line has for the keys of each of the sequence's tiles: no less than there are
  int tile_in_seq, tiles_in_seq;
  int kv_head;
  bool more;              // false: nothing is left
  bool lone;              // only the aligned tile that it begins with
  bool all_see_the_same;  // the tile's rows
  // The CTA's units [unit_begin, unit_end) of the tile's [unit_first, unit_last): steps from its first key, or in batch-invariant calls parts.
  int unit_begin, unit_end, unit_first, unit_last;
  int first_cta, last_cta;  // no other CTA has a part of the tile
  int part, part_begin, part_end;  // what the CTA works at: its first unit and its keys
  bool merges;  // the CTA is the last to finish it
};

/// Entry `first` of the running maximum of a start_loc array, where `first` and `last` are the lane's.
__device__ inline int running_start(const std::int32_t* loc, int first, int last, int limit) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  int largest = 0;
#pragma unroll 4
  for (int i = first; i < last; ++i) largest = max(largest, min(loc[i + 1], limit));
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const int before = __shfl_up_sync(kAllLanes, largest, offset);
    if (lane >= offset) largest = max(largest, before);
  }
  const int before = __shfl_up_sync(kAllLanes, largest, 1);
  return max(lane == 0 ? 0 : before, min(max(loc[0], 0), limit));
}

/// The first part from which on a stretch of so many keys never has more than kCutParts.
__device__ __forceinline__ int first_cut_of(std::int64_t stretch) {
  const int keys = static_cast<int>(min(stretch, std::int64_t{1} << 30));
  if (keys <= kCutParts * 512) return 0;
  int part = part_of(keys / 4);
#pragma unroll 1
  while (part_begin(part + kCutParts) - part_begin(part) < keys) ++part;
  return part;
}

/// Fills in sequence `seq`, whose predecessor's queries and keys end at `token` and `key`; `records` reports what is out of range.
__device__ inline void visit_sequence(const Plan& plan, int seq, int token, int key, bool records, Tile& tile) {
  const AttentionParams& p = plan.params;
  tile.seq = seq;
  if (p.query_start_loc != nullptr) {
    const std::int32_t raw = p.query_start_loc[seq + 1];
    const int end = max(token, min(raw, static_cast<int>(p.num_tokens)));
    if (records && raw != end) record_error(plan.error_word, plan.op, ArgId::kQueryStartLoc, seq + 1, raw);
    tile.first_token = token;
    tile.query_len = end - token;
  } else {
    tile.query_len = queries_per_sequence(p);
    tile.first_token = seq * tile.query_len;
  }
  tile.kv_first_token = 0;
  if (p.kv_start_loc != nullptr) {
    const std::int32_t raw = p.kv_start_loc[seq + 1];
    const int end = max(key, min(raw, plan.key_capacity));
    if (records && raw != end) record_error(plan.error_word, plan.op, ArgId::kKvStartLoc, seq + 1, raw);
    tile.kv_first_token = key;
    tile.kv_len = end - key;
  } else {
    tile.kv_len = sequence_keys(plan, seq, records);
  }
}

template <int kRows>
__device__ __forceinline__ int tiles_of(const Plan& plan, const Tile& tile) {
  const int rows = tile.query_len * static_cast<int>(plan.group.divisor);
  return rows < plan.min_rows || rows > plan.max_rows ? 0 : (rows + kRows - 1) / kRows;
}

/// What the line has for the keys of each of the sequence's tiles.
template <int kKeys>
__device__ __forceinline__ int length_of(const Plan& plan, const Tile& tile) {
  const int steps = (min(tile.kv_len, plan.key_span) + kKeys - 1) / kKeys;
  return max(((steps - 1) >> plan.line_shift) + 1, 1);
}

/// The unit of the tile that a CTA begins with whose stretch begins at `place`, counted from keys_start.
template <int kKeys>
__device__ __forceinline__ int unit_at(const Plan& plan, const Walk& walk, int place, bool invariant) {
  if (place <= 0) return walk.unit_first;
  if (place >= walk.length) return walk.unit_last;
  const int step = place << plan.line_shift;
  if (!invariant) return min(step, walk.unit_last);
  // The first part that begins there or after, and is one of those that may be cut off.
  const int key = step * kKeys;
  const int part = part_of(key);
  return min(max(max(part + (part_begin(part) != key), walk.first_cut), walk.unit_first), walk.unit_last);
}

/// Goes to the keys from unit `unit` on: to the unit's end if batch-invariant, else to the end of what the CTA has of the tile. One thread's work.
template <int kKeys>
__device__ __forceinline__ void enter_part(Walk& walk, int unit, bool invariant) {
  const Tile& tile = walk.tile;
  walk.part = unit;
  walk.part_begin = invariant ? part_begin(unit) : tile.key_begin + unit * kKeys;
  // Behind the tile's last unit there may be no 32-bit number.
  const bool last = invariant ? unit + 1 == walk.unit_last : walk.unit_end == walk.unit_last;
  walk.part_end = last ? tile.key_end : invariant ? part_begin(unit + 1) : tile.key_begin + walk.unit_end * kKeys;
}

/// Whole tiles go to whoever is ready for one: the next of them, or none. Every tile but the CTAs' first takes a ticket, and every CTA one more in vain:
/// as many as there are tiles. The last one makes the counter zero again.
__device__ __forceinline__ int take_ticket(const Plan& plan, int num_tiles, int num_ctas) {
  unsigned* const tickets = plan.counters + kMaxCtas;
  const unsigned ticket = atomicAdd(tickets, 1u);
  if (ticket == static_cast<unsigned>(num_tiles) - 1) *tickets = 0;
  return static_cast<int>(min(ticket + static_cast<unsigned>(num_ctas), static_cast<unsigned>(num_tiles)));
}

/// Moves on to the next tile that the CTA has a part of, which may be where it stands if it is `fresh`. One thread's work.
template <int kRows, int kKeys>
__device__ __forceinline__ void next_tile(const Plan& plan, Walk& walk, bool fresh, bool invariant) {
  const AttentionParams& p = plan.params;
  Tile& tile = walk.tile;
#pragma unroll 1
  for (;; fresh = false) {
    if (walk.aligned_length > 0) {
      if (!fresh) {
        walk.more = false;
        if (plan.tiles_per_cta <= 1 || walk.lone) return;
        const auto num_tiles = static_cast<int>(p.num_seqs) * static_cast<int>(plan.tiles_of_seq.divisor);
        const int tile_idx = take_ticket(plan, num_tiles, plan.num_ctas);
        if (tile_idx >= num_tiles) return;
        walk.more = true;
        walk.tile_idx = tile_idx;
        walk.begin = walk.tile_idx * walk.stretch;
        walk.end = walk.begin + walk.stretch;
      }
      const int seq = plan.tiles_of_seq.quotient(walk.tile_idx), in_seq = plan.tiles_of_seq.remainder(walk.tile_idx, seq);
      walk.keys_start = walk.tile_idx * walk.length;
      walk.tile_in_seq = plan.kv_heads.quotient(in_seq);
      walk.kv_head = plan.kv_heads.remainder(in_seq, walk.tile_in_seq);
      tile.seq = seq;
      tile.query_len = queries_per_sequence(p);
      tile.first_token = seq * tile.query_len;
      tile.kv_first_token = 0;
      tile.kv_len = sequence_keys(plan, seq, false);
    } else if (!fresh) {
      walk.keys_start += walk.length + plan.tile_cost;
      if (walk.keys_start >= walk.end) {
        walk.more = false;
        return;
      }
      if (++walk.kv_head == static_cast<int>(p.num_kv_heads)) {
        walk.kv_head = 0;
        ++walk.tile_in_seq;
      }
#pragma unroll 1
      while (walk.tile_in_seq == walk.tiles_in_seq) {
        // There is another sequence with tiles, or the line would have ended.
        visit_sequence(plan, tile.seq + 1, tile.first_token + tile.query_len, tile.kv_first_token + tile.kv_len, false, tile);
        walk.tile_in_seq = 0;
        walk.tiles_in_seq = tiles_of<kRows>(plan, tile);
        walk.length = length_of<kKeys>(plan, tile);
      }
    }
    tile.row_begin = walk.tile_in_seq * kRows;
    walk.full = finish_tile(plan, tile, kRows);
    walk.unit_first = 0;
    walk.unit_last = max((tile.key_end - tile.key_begin + kKeys - 1) / kKeys, 1);
    if (invariant) {
      walk.unit_first = part_of(tile.key_begin);
      walk.unit_last = tile.key_end == 0 ? walk.unit_first + 1 : part_of(tile.key_end - 1) + 1;
    }
    walk.unit_begin = unit_at<kKeys>(plan, walk, walk.begin - walk.keys_start, invariant);
    walk.unit_end = unit_at<kKeys>(plan, walk, walk.end - walk.keys_start, invariant);
    if (walk.unit_begin < walk.unit_end) break;
  }
  walk.all_see_the_same =
      p.mask == nullptr && plan.group.quotient(tile.row_begin) == plan.group.quotient(tile.row_begin + tile.num_rows - 1);
  enter_part<kKeys>(walk, walk.unit_begin, invariant);
}

/// Which CTAs have parts of the tile, if not one alone. One thread's work.
__device__ __forceinline__ void find_ctas(const Plan& plan, Walk& walk, bool invariant) {
  const auto cta_at = [&](int place) { return static_cast<int>(static_cast<unsigned>(place) / static_cast<unsigned>(walk.stretch)); };
  walk.first_cta = cta_at(walk.keys_start);
  const int length = invariant ? walk.length : ((walk.unit_last - 1) >> plan.line_shift) + 1;
  walk.last_cta = cta_at(walk.keys_start + length - 1);
}

/// begin_walk where all tiles have one length: a whole number of CTAs to a tile, or of tiles to a CTA. False if they have not. Little code, as
/// most of a small call's time is that of instructions that are not in a cache.
template <int kKeys>
__device__ __forceinline__ bool begin_aligned_walk(const Plan& plan, Walk& walk, int cta) {
  const AttentionParams& p = plan.params;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const auto num_seqs = static_cast<int>(p.num_seqs);
  int shortest = INT_MAX, longest = 0;
  Tile tile{};
#pragma unroll 4
  for (int seq = lane; seq < num_seqs; seq += 32) {
    tile.kv_len = sequence_keys(plan, seq, cta == 0);
    const int length = length_of<kKeys>(plan, tile);
    shortest = min(shortest, length), longest = max(longest, length);
  }
  shortest = __reduce_min_sync(kAllLanes, shortest), longest = __reduce_max_sync(kAllLanes, longest);
  if (shortest != longest) return false;
  const auto ctas_per_tile = static_cast<int>(plan.ctas_per_tile.divisor);
  const int tile_idx = plan.ctas_per_tile.quotient(cta);
  const int stretch = ctas_per_tile > 1 ? max(plan.ctas_per_tile.quotient(longest + ctas_per_tile - 1), kMinStretch) : longest;
  if (lane == 0) {
    walk.more = tile_idx < num_seqs * static_cast<int>(plan.tiles_of_seq.divisor);
    walk.tile_idx = tile_idx;
    walk.stretch = stretch;
    walk.first_cut = first_cut_of((std::int64_t{stretch} << plan.line_shift) * kKeys);
    walk.begin = stretch * cta;
    walk.end = walk.begin + stretch;
    walk.length = walk.aligned_length = ctas_per_tile * stretch;
    walk.lone = false;
  }
  __syncwarp();
  return true;
}

/// The walk of a CTA that has one whole tile. One thread's work.
__device__ __forceinline__ void begin_lone_walk(Walk& walk, int tile_idx) {
  walk.more = walk.lone = true;
  walk.tile_idx = tile_idx;
  // All lies between 0 and 1.
  walk.begin = walk.length = 0;
  walk.end = walk.aligned_length = walk.stretch = 1;
}

/// Finds the stretch of CTA `cta` of `num_ctas` and the tile in which it begins. A warp's work.
template <int kRows, int kKeys>
__device__ __forceinline__ void begin_walk(const Plan& plan, Walk& walk, int cta, int num_ctas) {
  const AttentionParams& p = plan.params;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const bool records = cta == 0;
  const auto num_seqs = static_cast<int>(p.num_seqs);
  const auto num_kv_heads = static_cast<int>(p.num_kv_heads);
  if (plan.tiles_per_cta > 0 && begin_aligned_walk<kKeys>(plan, walk, cta)) return;
  // A lane has some consecutive sequences.
  const int per_lane = (num_seqs + 31) / 32;
  const int first = min(lane * per_lane, num_seqs), last = min(first + per_lane, num_seqs);
  int first_token = 0, first_key = 0;
  if (p.query_start_loc != nullptr) {
    first_token = running_start(p.query_start_loc, first, last, static_cast<int>(p.num_tokens));
    if (records && lane == 0 && p.query_start_loc[0] != first_token)
      record_error(plan.error_word, plan.op, ArgId::kQueryStartLoc, 0, p.query_start_loc[0]);
  }
  if (p.kv_start_loc != nullptr) {
    first_key = running_start(p.kv_start_loc, first, last, plan.key_capacity);
    if (records && lane == 0 && p.kv_start_loc[0] != first_key)
      record_error(plan.error_word, plan.op, ArgId::kKvStartLoc, 0, p.kv_start_loc[0]);
  }

  // The first pass measures the lane's part of the line; the second, in the lane that has the CTA's beginning, finds it.
  int at = 0, begin = -1;
#pragma unroll 1
  for (bool finding = false;; finding = true) {
    int token = first_token, key = first_key;
#pragma unroll 1
    for (int seq = first; seq < last; ++seq) {
      Tile tile;
      visit_sequence(plan, seq, token, key, records && !finding, tile);
      token = tile.first_token + tile.query_len, key = tile.kv_first_token + tile.kv_len;
      const int tiles = tiles_of<kRows>(plan, tile);
      const int length = length_of<kKeys>(plan, tile);
      const int of_head = (plan.tile_cost + length) * tiles;
      if (finding && begin < at + of_head * num_kv_heads) {
        const int tile_idx = (begin - at) / (plan.tile_cost + length);
        walk.tile = tile;
        walk.keys_start = at + tile_idx * (plan.tile_cost + length) + plan.tile_cost;
        walk.tile_in_seq = tile_idx / num_kv_heads;
        walk.kv_head = tile_idx % num_kv_heads;
        walk.tiles_in_seq = tiles;
        walk.length = length;
        break;
      }
      at += of_head * num_kv_heads;
    }
    if (finding) break;
    int end = at;
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
      const int other = __shfl_up_sync(kAllLanes, end, offset);
      if (lane >= offset) end += other;
    }
    const int total = __shfl_sync(kAllLanes, end, 31);
    const int stretch = max((total + num_ctas - 1) / num_ctas, kMinStretch);
    begin = stretch * cta;
    if (lane == 0) {
      walk.begin = begin;
      walk.end = min(begin + stretch, total);
      walk.stretch = stretch;
      walk.first_cut = first_cut_of((std::int64_t{stretch} << plan.line_shift) * kKeys);
      walk.aligned_length = 0;
      walk.more = begin < total;
    }
    at = end - at;
    if (begin < at || begin >= end) break;
  }
  __syncwarp();
}

}  // namespace quire::cuda::attn
