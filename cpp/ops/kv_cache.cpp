// Public entries of the KV-cache ops: validate, then choose the backend.
// SPDX-License-Identifier: Apache-2.0
#include "quire/kv_cache.h"

#include <cstring>
#include <vector>

#include "core/check.h"
#include "core/runtime.h"
#include "ops/kv_cache.h"

namespace quire {
namespace {

constexpr std::initializer_list<DType> kCacheDTypes = {DType::kFloat32,      DType::kFloat16,    DType::kBFloat16,
                                                       DType::kFloat8E4M3FN, DType::kFloat8E5M2, DType::kInt8};

// Bytes of a row from which the copy engine reaches the link's rate.
constexpr std::int64_t kLongRowBytes = 2 << 20;

bool empty(const KvParams& params) { return params.num_tokens == 0 || params.num_kv_heads == 0 || params.head_dim == 0; }

// How one block of a cache lies in memory: runs of contiguous bytes at one distance.
struct BlockShape {
  std::int64_t num_segments = 1, segment_bytes = 0, segment_stride_bytes = 0;
};

BlockShape block_shape(const Check& check, const TensorView& t, const char* arg) {
  // The dimensions of a block, from the smallest stride up: a heads-first view has the same bytes as its pool.
  int order[kMaxRank];
  int count = 0;
  for (int i = 1; i < t.ndim; ++i) {
    if (t.size(i) == 1) continue;
    int at = count++;
    for (; at > 0 && t.stride(order[at - 1]) > t.stride(i); --at) order[at] = order[at - 1];
    order[at] = i;
  }
  const std::int64_t item_bytes = itemsize(t.dtype);
  std::int64_t run = 1;
  int at = 0;
  for (; at < count && t.stride(order[at]) == run; ++at) run *= t.size(order[at]);
  BlockShape shape{1, run * item_bytes, run * item_bytes};
  if (at == count) return shape;
  std::int64_t span = t.stride(order[at]);
  shape.segment_stride_bytes = span * item_bytes;
  for (; at < count; ++at) {
    if (t.stride(order[at]) != span)
      check.fail_value(arg, "blocks that are contiguous, or contiguous rows at one distance", describe_strides(t));
    shape.num_segments *= t.size(order[at]);
    span *= t.size(order[at]);
  }
  return shape;
}

// True if both tensors' blocks walk memory in one order of dimensions, so that copying bytes copies elements.
bool same_block_order(const TensorView& a, const TensorView& b) {
  for (int i = 1; i < a.ndim; ++i)
    for (int j = i + 1; j < a.ndim; ++j)
      if (a.size(i) > 1 && a.size(j) > 1 && (a.stride(i) < a.stride(j)) != (b.stride(i) < b.stride(j))) return false;
  return true;
}

}  // namespace

KvParams check_kv(const Check& check, const TensorView& k, const TensorView& v, const TensorView& k_cache, const TensorView& v_cache,
                  const TensorView& slot_mapping, const TensorView* k_scale, const TensorView* v_scale) {
  check.float_dtype(k, "k");
  check.shape(k, "k", {kAny, kAny, kAny});
  check.inner_contiguous(k, "k");
  check.accessible(k, "k");
  check.same_dtype(v, "v", k, "k");
  check.same_shape(v, "v", k, "k");
  check.device(v, "v", k.device, "k");
  check.inner_contiguous(v, "v");
  check.accessible(v, "v");
  const std::int64_t num_tokens = k.size(0), num_kv_heads = k.size(1), head_dim = k.size(2);

  check.dtype(k_cache, "k_cache", kCacheDTypes);
  check.shape(k_cache, "k_cache", {kAny, kAny, num_kv_heads, head_dim});
  check.device(k_cache, "k_cache", k.device, "k");
  check.inner_contiguous(k_cache, "k_cache");
  check.accessible(k_cache, "k_cache");
  check.same_dtype(v_cache, "v_cache", k_cache, "k_cache");
  check.same_shape(v_cache, "v_cache", k_cache, "k_cache");
  check.device(v_cache, "v_cache", k.device, "k");
  check.inner_contiguous(v_cache, "v_cache");
  check.accessible(v_cache, "v_cache");

  check.dtype(slot_mapping, "slot_mapping", {DType::kInt32, DType::kInt64});
  check.shape(slot_mapping, "slot_mapping", {num_tokens});
  check.device(slot_mapping, "slot_mapping", k.device, "k");
  check.accessible(slot_mapping, "slot_mapping");

  KvParams params;
  params.k_scale_stride = check.scale(k_scale, "k_scale", k_cache.dtype, num_kv_heads, k.device, "k");
  params.v_scale_stride = check.scale(v_scale, "v_scale", k_cache.dtype, num_kv_heads, k.device, "k");
  params.k = k.data;
  params.v = v.data;
  params.k_cache = k_cache.data;
  params.v_cache = v_cache.data;
  params.slot_mapping = slot_mapping.data;
  params.k_scale = k_scale == nullptr ? nullptr : k_scale->as<const float>();
  params.v_scale = v_scale == nullptr ? nullptr : v_scale->as<const float>();
  params.dtype = k.dtype;
  params.cache_dtype = k_cache.dtype;
  params.slot_dtype = slot_mapping.dtype;
  params.num_tokens = num_tokens;
  params.num_kv_heads = num_kv_heads;
  params.head_dim = head_dim;
  params.num_blocks = k_cache.size(0);
  params.block_size = k_cache.size(1);
  checked_mul(params.num_blocks, params.block_size, check.op(), "k_cache");
  params.slot_stride = slot_mapping.stride(0);
  params.k_token_stride = k.stride(0);
  params.k_head_stride = k.stride(1);
  params.v_token_stride = v.stride(0);
  params.v_head_stride = v.stride(1);
  params.k_cache_block_stride = k_cache.stride(0);
  params.k_cache_slot_stride = k_cache.stride(1);
  params.k_cache_head_stride = k_cache.stride(2);
  params.v_cache_block_stride = v_cache.stride(0);
  params.v_cache_slot_stride = v_cache.stride(1);
  params.v_cache_head_stride = v_cache.stride(2);
  return params;
}

void check_kv_writes(const Check& check, const TensorView& k, const TensorView& v, const TensorView& k_cache, const TensorView& v_cache,
                     const TensorView& slot_mapping, const TensorView* k_scale, const TensorView* v_scale) {
  check.writable(k_cache, "k_cache");
  check.writable(v_cache, "v_cache");
  check.disjoint(k_cache, "k_cache", v_cache, "v_cache", false);
  check.disjoint(k_cache, "k_cache", k, "k", false);
  check.disjoint(k_cache, "k_cache", v, "v", false);
  check.disjoint(v_cache, "v_cache", k, "k", false);
  check.disjoint(v_cache, "v_cache", v, "v", false);
  check.disjoint(k_cache, "k_cache", slot_mapping, "slot_mapping", false);
  check.disjoint(v_cache, "v_cache", slot_mapping, "slot_mapping", false);
  for (const TensorView* cache : {&k_cache, &v_cache}) {
    if (k_scale != nullptr) check.disjoint(*cache, "k_cache, v_cache", *k_scale, "k_scale", false);
    if (v_scale != nullptr) check.disjoint(*cache, "k_cache, v_cache", *v_scale, "v_scale", false);
  }
}

void write_kv(const TensorView& k_cache, const TensorView& v_cache, const TensorView& k, const TensorView& v,
              const TensorView& slot_mapping, const TensorView* k_scale, const TensorView* v_scale, Stream stream) {
  const Check check("write_kv");
  const KvParams params = check_kv(check, k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale);
  check_kv_writes(check, k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale);
  if (empty(params)) return;
  dispatch_device(
      "write_kv", k.device, stream, [&] { cpu::write_kv(params); }, [&](auto s) { cuda::write_kv(params, s); }, Explains::kCuda);
}

void gather_kv(const TensorView& k, const TensorView& v, const TensorView& k_cache, const TensorView& v_cache,
               const TensorView& slot_mapping, const TensorView* k_scale, const TensorView* v_scale, Stream stream) {
  const Check check("gather_kv");
  const KvParams params = check_kv(check, k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale);
  check.writable(k, "k");
  check.writable(v, "v");
  check.disjoint(k, "k", v, "v", false);
  check.disjoint(k, "k", k_cache, "k_cache", false);
  check.disjoint(k, "k", v_cache, "v_cache", false);
  check.disjoint(v, "v", k_cache, "k_cache", false);
  check.disjoint(v, "v", v_cache, "v_cache", false);
  check.disjoint(k, "k", slot_mapping, "slot_mapping", false);
  check.disjoint(v, "v", slot_mapping, "slot_mapping", false);
  for (const TensorView* out : {&k, &v}) {
    if (k_scale != nullptr) check.disjoint(*out, "out", *k_scale, "k_scale", false);
    if (v_scale != nullptr) check.disjoint(*out, "out", *v_scale, "v_scale", false);
  }
  if (empty(params)) return;
  dispatch_device(
      "gather_kv", k.device, stream, [&] { cpu::gather_kv(params); }, [&](auto s) { cuda::gather_kv(params, s); }, Explains::kCuda);
}

void copy_blocks(const TensorView& cache, const TensorView& pairs, Stream stream) {
  const Check check("copy_blocks");
  check.rank(cache, "cache", 2, kMaxRank);
  check.writable(cache, "cache");
  check.dtype(pairs, "pairs", {DType::kInt32, DType::kInt64});
  check.shape(pairs, "pairs", {kAny, 2});
  check.device(pairs, "pairs", cache.device, "cache");
  check.contiguous(pairs, "pairs");
  check.accessible(pairs, "pairs");
  check.disjoint(cache, "cache", pairs, "pairs", false);
  if (pairs.size(0) == 0 || cache.numel() == 0) return;

  const BlockShape shape = block_shape(check, cache, "cache");
  CopyBlocksParams params;
  params.cache = cache.data;
  params.pairs = pairs.data;
  params.pair_dtype = pairs.dtype;
  params.num_pairs = pairs.size(0);
  params.num_blocks = cache.size(0);
  params.block_stride_bytes = cache.stride(0) * itemsize(cache.dtype);
  params.num_segments = shape.num_segments;
  params.segment_bytes = shape.segment_bytes;
  params.segment_stride_bytes = shape.segment_stride_bytes;
  dispatch_device(
      "copy_blocks", cache.device, stream, [&] { cpu::copy_blocks(params); }, [&](auto s) { cuda::copy_blocks(params, s); },
      Explains::kCuda);
}

void swap_blocks(const TensorView& dst, const TensorView& src, const TensorView& pairs, Stream stream) {
  const Check check("swap_blocks");
  check.rank(dst, "dst", 2, kMaxRank);
  check.writable(dst, "dst");
  check.same_dtype(src, "src", dst, "dst");
  check.rank(src, "src", dst.ndim, dst.ndim);
  check.accessible(src, "src");
  for (int i = 1; i < dst.ndim; ++i)
    if (src.size(i) != dst.size(i)) check.fail_value("src", "blocks of dst's shape, " + describe(dst), describe(src));
  check.dtype(pairs, "pairs", {DType::kInt64});
  check.shape(pairs, "pairs", {kAny, 2});
  check.device(pairs, "pairs", Device{}, "a host tensor");
  check.contiguous(pairs, "pairs");
  check.accessible(pairs, "pairs");
  check.disjoint(dst, "dst", src, "src", false);
  check.disjoint(dst, "dst", pairs, "pairs", false);
  const std::int64_t num_pairs = pairs.size(0);
  // A copy, so that another thread cannot change a pair between its check and its use.
  const std::vector<std::int64_t> pair(pairs.as<const std::int64_t>(), pairs.as<const std::int64_t>() + 2 * num_pairs);
  const auto at = [&](std::int64_t i, std::int64_t column) { return pair[static_cast<std::size_t>(2 * i + column)]; };
  for (std::int64_t i = 0; i < num_pairs; ++i) {
    const auto in_range = [&](std::int64_t id, const TensorView& t, int column) {
      if (id < 0 || id >= t.size(0))
        check.fail_index("pairs", "a block id in [0, " + std::to_string(t.size(0)) + ")",
                         std::to_string(id) + " at [" + std::to_string(i) + ", " + std::to_string(column) + "]");
    };
    in_range(at(i, 0), src, 0);
    in_range(at(i, 1), dst, 1);
  }
  if (num_pairs == 0 || dst.numel() == 0 || src.numel() == 0) return;

  if (!same_block_order(dst, src))
    check.fail_value("src", "strides in the order of dst's", describe_strides(src) + "; permute one of them");
  const BlockShape to = block_shape(check, dst, "dst"), from = block_shape(check, src, "src");
  const std::int64_t item_bytes = itemsize(dst.dtype);
  const std::int64_t dst_stride = dst.stride(0) * item_bytes, src_stride = src.stride(0) * item_bytes;
  const std::int64_t block_bytes = to.num_segments * to.segment_bytes;
  const bool dense = to.num_segments == 1 && from.num_segments == 1;
  const std::int64_t segment_bytes = to.segment_bytes < from.segment_bytes ? to.segment_bytes : from.segment_bytes;
  if (to.segment_bytes % segment_bytes != 0 || from.segment_bytes % segment_bytes != 0)
    check.fail_value("src", "a block layout that is made of the same rows as dst's", describe_strides(src));
  const Device cuda_device = dst.device.type == DeviceType::kCUDA ? dst.device : src.device;

  if (!dense && to.num_segments > 1 && from.num_segments > 1 && to.segment_bytes != from.segment_bytes)
    check.fail_value("src", "a block layout like dst's", describe_strides(src));
  // Blocks that lie end to end in both caches, as in a pool of layers: the segments of a run join.
  const bool joins =
      to.num_segments > 1 && to.segment_bytes == from.segment_bytes && dst_stride == segment_bytes && src_stride == segment_bytes;
  // A dense side is read as rows of the other side's segments.
  const std::int64_t to_pitch = to.num_segments > 1 ? to.segment_stride_bytes : segment_bytes;
  const std::int64_t from_pitch = from.num_segments > 1 ? from.segment_stride_bytes : segment_bytes;

  struct Run {
    std::int64_t src_block, dst_block, num_blocks;
  };
  std::vector<Run> runs;
  std::vector<bool> is_written(static_cast<std::size_t>(dst.size(0)));
  bool destinations_differ = true;
  for (std::int64_t i = 0; i < num_pairs; ++i) {
    const auto destination = static_cast<std::size_t>(at(i, 1));
    destinations_differ = destinations_differ && !is_written[destination];
    is_written[destination] = true;
    if (!runs.empty() && at(i, 0) == runs.back().src_block + runs.back().num_blocks &&
        at(i, 1) == runs.back().dst_block + runs.back().num_blocks) {
      ++runs.back().num_blocks;
    } else {
      runs.push_back({at(i, 0), at(i, 1), 1});
    }
  }

  // The copy engine has a start-up time for every row, which a kernel has not: short rows are left to that.
  const bool has_dense_runs = dense && dst_stride == block_bytes && src_stride == block_bytes;
  const auto is_short = [&](const Run& run) {
    const std::int64_t row_bytes = dense ? block_bytes : segment_bytes;
    return (has_dense_runs || joins ? run.num_blocks : 1) * row_bytes < kLongRowBytes;
  };
  std::vector<std::int64_t> short_pairs;
  for (const Run& run : runs) {
    if (!is_short(run)) continue;
    for (std::int64_t i = 0; i < run.num_blocks; ++i) short_pairs.insert(short_pairs.end(), {run.src_block + i, run.dst_block + i});
  }
  bool short_ones_are_done = false;
  if (destinations_differ && (runs.size() > 1 || !has_dense_runs) && !short_pairs.empty()) {
    SwapBlocksParams params;
    params.dst = dst.data;
    params.src = src.data;
    params.pairs = short_pairs.data();
    params.num_pairs = static_cast<std::int64_t>(short_pairs.size() / 2);
    params.num_rows = dense ? 1 : block_bytes / segment_bytes;
    params.row_bytes = block_bytes / params.num_rows;
    params.dst_block_stride_bytes = dst_stride;
    params.src_block_stride_bytes = src_stride;
    params.dst_row_stride_bytes = to_pitch;
    params.src_row_stride_bytes = from_pitch;
    dispatch_device("swap_blocks", cuda_device, stream, [] {}, [&](auto s) { short_ones_are_done = cuda::swap_blocks(params, s); });
  }

  // One run of adjacent pairs is one strided transfer of `height` rows of `width` bytes.
  const auto transfer = [&](std::int64_t src_block, std::int64_t dst_block, std::int64_t num_blocks) {
    const auto copy = [&](std::byte* to_rows, std::int64_t to_step, const std::byte* from_rows, std::int64_t from_step, std::int64_t width,
                          std::int64_t height) {
      dispatch_device(
          "swap_blocks", cuda_device, stream,
          [&] {
            for (std::int64_t row = 0; row < height; ++row)
              std::memcpy(to_rows + row * to_step, from_rows + row * from_step, static_cast<std::size_t>(width));
          },
          [&](auto s) { cuda::copy_memory(to_rows, to_step, from_rows, from_step, width, height, s); });
    };
    std::byte* const to_data = dst.as<std::byte>() + dst_block * dst_stride;
    const std::byte* const from_data = src.as<const std::byte>() + src_block * src_stride;
    if (dense) {
      copy(to_data, dst_stride, from_data, src_stride, block_bytes, num_blocks);
      return;
    }
    if (joins) {  // the run has the rows of one block
      copy(to_data, to.segment_stride_bytes, from_data, from.segment_stride_bytes, num_blocks * segment_bytes, to.num_segments);
      return;
    }
    for (std::int64_t i = 0; i < num_blocks; ++i)
      copy(to_data + i * dst_stride, to_pitch, from_data + i * src_stride, from_pitch, segment_bytes, block_bytes / segment_bytes);
  };
  for (const Run& run : runs)
    if (!short_ones_are_done || !is_short(run)) transfer(run.src_block, run.dst_block, run.num_blocks);
}

}  // namespace quire
