// quantized_matmul on wgmma: codes become the A operand in registers, tokens are the columns of B in shared memory. sm_90a; the way of many tokens.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda.h>

#include <algorithm>

#include "cuda/device/cluster.cuh"
#include "cuda/device/dependent_launch.cuh"
#include "cuda/device/tma.cuh"
#include "cuda/device/wgmma.cuh"
#include "cuda/element.h"
#include "cuda/quantization/w4a16.cuh"
#include "cuda/quantization/w4a16_arrival.cuh"
#include "cuda/quantization/w4a16_wgmma_parts.cuh"

namespace quire::cuda::w4a16 {

/// One launch. A tile is kWgmmaRows rows x kTokens tokens. Tiles are counted in bands of band_tiles tiles of tokens, row by
/// row of a band: what the CTAs read of x at a time is that of a band. CTA c has the tiles c, c + num_ctas, ... of the first whole_rounds rounds. The
/// others are cut along K into num_chunks chunks each, of which it has [c * num_shared_chunks / n, (c + 1) * num_shared_chunks / n), where n is the
/// smaller of num_ctas and num_shared_chunks.
struct WgmmaPlan {
  Layout layout;
  void* out = nullptr;  // [num_tokens, num_rows]
  const void* bias = nullptr;  // [num_rows] or null
  float* partials = nullptr;  // [num_ctas][2][rows * tokens of a tile], in the order of fragments
  std::uint64_t* arrivals = nullptr;  // [shared tiles]
  std::uint64_t tag = 0;
  std::int64_t out_stride = 0, num_tokens = 0, num_rows = 0;
  int num_shared_chunks = 0;
  int num_row_tiles = 0, num_token_tiles = 0;
  int band_tiles = 1;
  int whole_rounds = 0;
  int num_chunks = 1, chunk_steps = 0;
  int cluster_ctas = 1;  // above 1: so many CTAs, a cluster, have one tile, a chunk each, and none of the above holds
  int group_shift = 0;
  DType bias_dtype = DType::kFloat16;
  bool stores_vectors = false;  // rows of out are 16-byte aligned

  struct Place {
    int row_tile, token_tile;
  };
  QUIRE_HOST_DEVICE Place place_of(int tile) const {
    const int band = tile / (num_row_tiles * band_tiles), within = tile - band * num_row_tiles * band_tiles;
    const int left = num_token_tiles - band * band_tiles, width = left < band_tiles ? left : band_tiles;
    return Place{within / width, band * band_tiles + within % width};
  }
};

constexpr int kWgmmaWarpgroups = 2;  // that multiply
constexpr int kWgmmaRows = kBlockRows * kWgmmaWarpgroups;

/// What the copy engine reads: x [tokens, columns], codes in rows of 2048 bytes [blocks, rows of all steps], entries [blocks, groups].
struct WgmmaMaps {
  CUtensorMap x, codes, entries;
};
constexpr int kCodeRowBytes = 2048;

template <int kBits, bool kSmallGroups, int kTokens>
struct WgmmaShape {
  static constexpr int kWarpgroups = kWgmmaWarpgroups;
  static constexpr int kThreads = 128 * (kWarpgroups + 1);
  static constexpr int kProducerRegisters = 40;
  static constexpr int kConsumerRegisters = 232;
  static constexpr int kSums = kTokens / 2;  // of a thread
  static constexpr int kXBytes = kTokens * device::kPanelRowBytes;
  static constexpr int kCodeBytes = kBlockUnits * unit_bytes(kBits);  // of a warpgroup
  static constexpr int kMaxEntryBytes = kBlockUnits * 8 * 16 * (kSmallGroups ? 2 : 1);
  static constexpr int kEntriesAt = kXBytes + kWarpgroups * kCodeBytes;  // in a stage: x, codes of all warpgroups, entries of all
  static constexpr int kStageBytes = (kEntriesAt + kWarpgroups * kMaxEntryBytes + 1023) / 1024 * 1024;
  static constexpr int kStoreTokens = 32;
  static constexpr int kStoreBytes = 4 * kWarpgroups * kStoreTokens * kStoreRowBytes;
  static constexpr int kFixedBytes = 1024 + kStoreBytes + 256;  // to align, to store, barriers
  static constexpr int kStages = std::min(8, (227 * 1024 - kFixedBytes) / kStageBytes);
  static constexpr int kSharedBytes = kFixedBytes + kStages * kStageBytes;
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

/// What a CTA works on, one after the other: a tile and steps [begin, end) of it.
struct Work {
  const WgmmaPlan& plan;
  int tile = 0, next_chunk, end_chunk, round = -1, begin = 0, end = 0;
  bool whole = false;

  __device__ explicit Work(const WgmmaPlan& p)
      : plan(p), next_chunk(first_chunk(p, static_cast<int>(blockIdx.x))), end_chunk(first_chunk(p, static_cast<int>(blockIdx.x) + 1)) {}
  /// CTAs that have chunks of shared tiles. There may be more CTAs than chunks; none without lies between two with, as a tile waits for all
  /// from its first to its last.
  __device__ static int num_sharing(const WgmmaPlan& p) { return max(min(static_cast<int>(gridDim.x), p.num_shared_chunks), 1); }
  __device__ static int first_chunk(const WgmmaPlan& p, int cta) {
    const int sharing = num_sharing(p);
    return static_cast<int>(std::int64_t{min(cta, sharing)} * p.num_shared_chunks / sharing);
  }
  __device__ int first_shared() const { return plan.whole_rounds * static_cast<int>(gridDim.x); }

  __device__ bool next() {
    if (plan.cluster_ctas > 1) {
      if (++round > 0) return false;
      tile = static_cast<int>(blockIdx.x) / plan.cluster_ctas;
      begin = static_cast<int>(blockIdx.x) % plan.cluster_ctas * plan.chunk_steps;
      end = min(begin + plan.chunk_steps, plan.layout.num_steps);
      return true;
    }
    if (++round < plan.whole_rounds) {
      tile = static_cast<int>(blockIdx.x) + round * static_cast<int>(gridDim.x);
      begin = 0;
      end = plan.layout.num_steps;
      whole = true;
      return true;
    }
    if (next_chunk >= end_chunk) return false;
    const int shared_tile = next_chunk / plan.num_chunks, chunk = next_chunk - shared_tile * plan.num_chunks;
    const int count = min(plan.num_chunks - chunk, end_chunk - next_chunk);
    tile = first_shared() + shared_tile;
    begin = chunk * plan.chunk_steps;
    end = min((chunk + count) * plan.chunk_steps, plan.layout.num_steps);
    whole = count == plan.num_chunks;
    next_chunk += count;
    return true;
  }
};

template <bool kBf16, int kBits, int kStep>
__device__ __forceinline__ void make_fragment(std::uint32_t (&a)[4], const std::uint32_t* words, std::uint32_t lower, std::uint32_t upper,
                                              const std::uint32_t (&scales)[2]) {
  dequantize<kBits, kBf16, kStep>(a, words, lower, upper);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (kBf16) {
      a[i] = fma_pair<true>(a[i], scales[i % 2], 0x80008000u);
    } else {
      asm("mul.rn.f16x2 %0, %0, %1;\n" : "+r"(a[i]) : "r"(scales[i % 2]));
    }
  }
}

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

/// Grid: a CTA for each SM, or fewer; each adds up tiles, and parts of tiles that the last CTA of a tile puts together in the order of K. The first
/// warpgroup brings x, codes and scales of 64 columns at a time; the others turn their 64 rows' codes into fragments of A while the tensor cores
/// work on those of the step before.
template <bool kBf16, int kBits, bool kSmallGroups, int kTokens>
__global__ __launch_bounds__(WgmmaShape<kBits, kSmallGroups, kTokens>::kThreads,
                             1) void quantized_matmul_wgmma_kernel(const __grid_constant__ WgmmaPlan plan,
                                                                   const __grid_constant__ WgmmaMaps maps) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Shape = WgmmaShape<kBits, kSmallGroups, kTokens>;
  constexpr int kStages = Shape::kStages, kWarpgroups = Shape::kWarpgroups, kRows = kWgmmaRows;
  constexpr int kGroups = kSmallGroups ? 2 : 1;
  extern __shared__ std::uint8_t shared_raw[];
  std::uint8_t* shared = shared_raw + (1024 - device::shared_address(shared_raw) % 1024) % 1024;
  std::uint8_t* stages = shared;
  std::uint8_t* store_space = shared + kStages * Shape::kStageBytes;
  auto* barriers = reinterpret_cast<std::uint64_t*>(store_space + Shape::kStoreBytes);  // full, empty
  int* is_last = reinterpret_cast<int*>(barriers + 2 * kStages);
  const std::uint32_t full = device::shared_address(barriers), empty = full + 8 * kStages;

  const Layout& layout = plan.layout;
  const int thread = static_cast<int>(threadIdx.x);
  const int warpgroup = __shfl_sync(0xffffffffu, thread / 128, 0);
  if (thread == 0) {
    for (int i = 0; i < kStages; ++i) {
      device::barrier_init(full + 8 * i, 1);
      device::barrier_init(empty + 8 * i, 4 * kWarpgroups);
    }
    device::barrier_init_fence();
    device::prefetch_tensor_map(&maps.x);
    device::prefetch_tensor_map(&maps.codes);
    device::prefetch_tensor_map(&maps.entries);
  }
  __syncthreads();
  device::wait_for_predecessor();

  const int entry_bytes = kBlockUnits * 8 * layout.entry_bytes;  // of a warpgroup and a group
  Work work(plan);
  int stage = 0;
  std::uint32_t parity = 0;
  if (warpgroup == 0) {
    // ---- Copies ----
    device::give_registers<Shape::kProducerRegisters>();
    if (thread != 0) return;
    const int bytes = Shape::kXBytes + kWarpgroups * (Shape::kCodeBytes + kGroups * entry_bytes);
    const std::uint64_t policy = device::read_once_policy();
    while (work.next()) {
      const WgmmaPlan::Place place = plan.place_of(work.tile);
      const int block = place.row_tile * kWarpgroups, token = place.token_tile * kTokens;
#pragma unroll 1
      for (int k = work.begin; k < work.end; ++k) {
        const std::uint32_t slot = device::shared_address(stages) + static_cast<std::uint32_t>(stage * Shape::kStageBytes),
                            ready = full + 8 * stage;
        device::barrier_wait(empty + 8 * stage, parity ^ 1);
        device::barrier_arrive_expect(ready, bytes);
        const int codes_row = k * (Shape::kCodeBytes / kCodeRowBytes), group = kSmallGroups ? 2 * k : k >> plan.group_shift;
        if (plan.num_token_tiles == 1) {
          device::copy_box_by(slot + Shape::kXBytes, &maps.codes, ready, 0, codes_row, block, 0, policy);
          device::copy_box_by(slot + Shape::kEntriesAt, &maps.entries, ready, 0, group, block, 0, policy);
        } else {
          device::copy_box(slot + Shape::kXBytes, &maps.codes, ready, 0, codes_row, block, 0);
          device::copy_box(slot + Shape::kEntriesAt, &maps.entries, ready, 0, group, block, 0);
        }
        device::copy_box(slot, &maps.x, ready, k * device::kPanelRowBytes, token);
        if (++stage == kStages) stage = 0, parity ^= 1;
      }
    }
    return;
  }

  // ---- Products ----
  device::take_registers<Shape::kConsumerRegisters>();
  const int lane = thread % 32, warp = thread / 32 - 4;
  const int block = warpgroup - 1, unit = warp % 4;
  const int code_offset = Shape::kXBytes + block * Shape::kCodeBytes + unit * unit_bytes(kBits) + 16 * lane;
  const int entry_offset = Shape::kEntriesAt + block * kGroups * entry_bytes + (8 * unit + lane / 4) * layout.entry_bytes;
  float acc[Shape::kSums];
  std::uint32_t fragments[2][4][4];

  const auto make_fragments = [&](std::uint32_t (&a)[4][4], const std::uint8_t* slot) {
    std::uint32_t words[kBits];
#pragma unroll
    for (int i = 0; i < kBits / 4; ++i) {
      const uint4 loaded = *reinterpret_cast<const uint4*>(slot + code_offset + 512 * i);
      words[4 * i] = loaded.x;
      words[4 * i + 1] = loaded.y;
      words[4 * i + 2] = loaded.z;
      words[4 * i + 3] = loaded.w;
    }
    RowPair rows = load_any_entry<kBits>(slot + entry_offset, layout);
    std::uint32_t lower = zero_term<kBits, kBf16, false>(rows.zero[0]), upper = zero_term<kBits, kBf16, true>(rows.zero[1]);
    std::uint32_t scales[2] = {device::pack_16<kBf16>(rows.scale[0], rows.scale[0]), device::pack_16<kBf16>(rows.scale[1], rows.scale[1])};
    make_fragment<kBf16, kBits, 0>(a[0], words, lower, upper, scales);
    make_fragment<kBf16, kBits, 1>(a[1], words, lower, upper, scales);
    if constexpr (kSmallGroups) {
      rows = load_any_entry<kBits>(slot + entry_offset + entry_bytes, layout);
      lower = zero_term<kBits, kBf16, false>(rows.zero[0]), upper = zero_term<kBits, kBf16, true>(rows.zero[1]);
      scales[0] = device::pack_16<kBf16>(rows.scale[0], rows.scale[0]), scales[1] = device::pack_16<kBf16>(rows.scale[1], rows.scale[1]);
    }
    make_fragment<kBf16, kBits, 2>(a[2], words, lower, upper, scales);
    make_fragment<kBf16, kBits, 3>(a[3], words, lower, upper, scales);
  };
  const auto release = [&](int which) {
    if (lane == 0) device::barrier_arrive(empty + 8 * which);
  };

  std::uint8_t* space = store_space + warp * (Shape::kStoreTokens * kStoreRowBytes);

  while (work.next()) {
    int previous = -1, accumulate = 0;
    const auto step = [&](std::uint32_t (&a)[4][4]) {
      const std::uint8_t* slot = stages + stage * Shape::kStageBytes;
      device::barrier_wait(full + 8 * stage, parity);
      make_fragments(a, slot);
      const std::uint32_t x = device::matrix_descriptor(device::shared_address(slot), 0);
      device::wgmma_fence();
#pragma unroll
      for (int s = 0; s < 4; ++s) {
        device::WgmmaRegistersRows<kTokens, kBf16>::product(acc, a[s], x + 2 * s, s == 0 ? accumulate : 1);
      }
      device::wgmma_commit();
      accumulate = 1;
      device::wgmma_wait<1>();
      if (previous >= 0) release(previous);
      previous = stage;
      if (++stage == kStages) stage = 0, parity ^= 1;
    };
    int k = work.begin;
#pragma unroll 1
    for (; k + 1 < work.end; k += 2) {
      step(fragments[0]);
      step(fragments[1]);
    }
    if (k < work.end) step(fragments[0]);
    device::wgmma_wait<0>();
    release(previous);
    device::pin_registers(acc);

    const int group_thread = thread % 128;
    const WgmmaPlan::Place place = plan.place_of(work.tile);
    const std::int64_t first_row = std::int64_t{place.row_tile} * kRows + block * kBlockRows + unit * kUnitRows;
    const std::int64_t first_token = std::int64_t{place.token_tile} * kTokens;
    float bias[2];
    load_row_bias(bias, plan.bias, plan.bias_dtype, first_row + lane / 4, plan.num_rows);

    // ---- Sums of eight tokens: a cluster's CTAs take turns ----
    if (plan.cluster_ctas > 1) {
      device::named_barrier_sync(1, 128 * kWarpgroups);  // nobody reads stages any more
      float4* sums = reinterpret_cast<float4*>(stages) + block * (Shape::kSums / 4 * 128) + group_thread;
#pragma unroll
      for (int i = 0; i < Shape::kSums / 4; ++i) sums[128 * i] = make_float4(acc[4 * i], acc[4 * i + 1], acc[4 * i + 2], acc[4 * i + 3]);
      device::cluster_sync();
      const int num_groups = static_cast<int>(min((plan.num_tokens - first_token + 7) / 8, std::int64_t{kTokens / 8}));
#pragma unroll 1
      for (int i = device::cluster_rank(); i < num_groups; i += plan.cluster_ctas) {
        float total[4] = {};
#pragma unroll 4
        for (int rank = 0; rank < plan.cluster_ctas; ++rank) {
          const float4 part = device::load_cluster_16(device::address_in_cta(device::shared_address(sums + 128 * i), rank));
          total[0] += part.x;
          total[1] += part.y;
          total[2] += part.z;
          total[3] += part.w;
        }
        store_tokens<kBf16, 1>(space, total, bias, plan, first_token + 8 * i, first_row);
      }
      device::cluster_sync();  // the others read this CTA's sums
      return;
    }

    // ---- A part of a tile ----
    if (!work.whole) {
      const int shared_tile = work.tile - work.first_shared(), first_chunk = shared_tile * plan.num_chunks;
      const auto owner = [&](int chunk) {
        return static_cast<int>(((std::int64_t{chunk} + 1) * Work::num_sharing(plan) - 1) / plan.num_shared_chunks);
      };
      const auto partials_of = [&](int cta) {
        const int slot = Work::first_chunk(plan, cta) / plan.num_chunks == shared_tile ? 0 : 1;
        return reinterpret_cast<float4*>(plan.partials) +
               ((std::int64_t{cta} * 2 + slot) * kWarpgroups + block) * (Shape::kSums / 4 * 128) + group_thread;
      };
      float4* mine = partials_of(static_cast<int>(blockIdx.x));
#pragma unroll
      for (int i = 0; i < Shape::kSums / 4; ++i)
        __stcg(mine + 128 * i, make_float4(acc[4 * i], acc[4 * i + 1], acc[4 * i + 2], acc[4 * i + 3]));
      __threadfence();
      device::named_barrier_sync(1, 128 * kWarpgroups);
      const int first = owner(first_chunk), last = owner(first_chunk + plan.num_chunks - 1);
      if (thread == 128) *is_last = arrive(plan.arrivals + shared_tile, plan.tag, last - first + 1);
      device::named_barrier_sync(1, 128 * kWarpgroups);
      if (*is_last == 0) continue;
      __threadfence();
#pragma unroll
      for (int i = 0; i < Shape::kSums; ++i) acc[i] = 0.0f;
      for (int from = first; from <= last; ++from) {
        const float4* theirs = partials_of(from);
#pragma unroll
        for (int i = 0; i < Shape::kSums / 4; ++i) {
          const float4 part = __ldcg(theirs + 128 * i);
          acc[4 * i] += part.x;
          acc[4 * i + 1] += part.y;
          acc[4 * i + 2] += part.z;
          acc[4 * i + 3] += part.w;
        }
      }
    }

    constexpr int kPieces = kTokens / Shape::kStoreTokens, kPieceSums = Shape::kSums / kPieces;
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      if (first_token + piece * Shape::kStoreTokens >= plan.num_tokens) break;
      store_tokens<kBf16, Shape::kStoreTokens / 8>(space, reinterpret_cast<const float (&)[kPieceSums]>(acc[piece * kPieceSums]), bias,
                                                   plan, first_token + piece * Shape::kStoreTokens, first_row);
    }
  }
#endif
}

}  // namespace quire::cuda::w4a16
