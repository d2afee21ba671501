// quantized_matmul on wgmma for up to 64 tokens: the weight is read once, at the memory's rate. sm_90a.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda.h>

#include <algorithm>

#include "cuda/device/async_copy.cuh"
#include "cuda/device/cluster.cuh"
#include "cuda/device/dependent_launch.cuh"
#include "cuda/device/tma.cuh"
#include "cuda/quantization/w4a16.cuh"
#include "cuda/quantization/w4a16_arrival.cuh"
#include "cuda/quantization/w4a16_wgmma_parts.cuh"

namespace quire::cuda::w4a16 {

/// One launch. A tile is 64 rows for each of the warpgroups side by side along N x all tokens; the other warpgroups share its columns. A cluster's CTAs
/// have a tile, a chunk of the columns each. Without clusters the first num_helpers CTAs help the others, of which the c-th has the tiles c,
/// c + their number, ...: of tiles from first_cut on, the last round, a helper has the columns from cut_step on, and hands their sums over in memory.
struct FewPlan {
  Layout layout;
  void* out = nullptr;  // [num_tokens, num_rows]
  const void* bias = nullptr;  // [num_rows] or null
  std::int64_t out_stride = 0, num_rows = 0;
  int num_tokens = 0;
  int row_groups_log2 = 0;  // warpgroups along N
  int num_tiles = 0;
  int cluster_ctas = 1;
  int chunk_steps = 0;  // of 64 columns, a multiple of those of a stage
  int num_helpers = 0, first_cut = 0, cut_step = 0;  // first_cut is num_tiles, if none help
  float4* partials = nullptr;  // [tiles from first_cut on][pieces of 64 rows x 8 tokens][threads of a warpgroup]
  std::uint64_t* arrivals = nullptr;  // [tiles from first_cut on]: tag + 1 says that the partials are there
  std::uint64_t tag = 0;
  int num_stages = 0, stage_bytes = 0;
  int panel_bytes = 0;  // of x in a stage: 64 columns of all tokens
  const void* x = nullptr;  // of one token
  const std::int32_t* permutation = nullptr;  // [num_columns] of its columns, or null
  int num_columns = 0, num_source_columns = 0;
  int x_at = 0,
      source_at =
          0;  // one token: in shared memory, behind the stages: its columns of all tiles of a CTA, and x as it comes, if that is permuted
  int num_stage_groups = 0;  // entries of a stage, for each row
  int group_shift = 0;  // 32 columns c are of group c >> group_shift
  int sums_at = 0;  // in shared memory, behind the stages; 0 if a CTA has one tile: they lie where its stages did
  DType bias_dtype = DType::kFloat16;
  bool stores_vectors = false;  // rows of out are 16-byte aligned
  bool waits = false;  // for x, which a predecessor of the call's own writes; without it for everything
};

/// What the copy engine reads: x [panels of 64 columns, tokens, 64], codes and entries as WgmmaMaps has them.
struct FewMaps {
  CUtensorMap x, codes, entries;
};

constexpr int kMaxFewTokens = 64;
constexpr int kFewWarpgroups = 4;  // that multiply
constexpr int kFewThreads = 128 * kFewWarpgroups + 32;
constexpr int kFewStepsOfWarpgroup = 2;  // in a stage
constexpr int kFewStageUnits = kFewWarpgroups * kFewStepsOfWarpgroup;  // of 64 rows x 64 columns
constexpr int kFewMaxStages = 12;
constexpr int kFewStoreBytes = 4 * kFewWarpgroups * 8 * kStoreRowBytes;
constexpr int kFewStagesAt = (kFewStoreBytes + 256 + 1023) / 1024 * 1024;  // behind what stores need, and barriers
constexpr int kFewFixedBytes = 1024 + kFewStagesAt;  // 1024 to align

/// One token: column c, of permuted x permutation[c], 0 where there is none.
QUIRE_HOST_DEVICE constexpr int few_x_bytes(int num_steps) { return num_steps * kUnitColumns * 2 + 128; }
constexpr int kStagesBeforeX = 4;  // copies of codes that begin before one token's x is there
constexpr int kMaxFewOneColumns = 28672;

/// Room for the parts of sums that a CTA adds up.
QUIRE_HOST_DEVICE constexpr int few_sum_bytes(int num_tokens, int row_groups_log2, int cluster_ctas) {
  const int num_parts = cluster_ctas * (kFewWarpgroups >> row_groups_log2), num_pieces = ((num_tokens + 7) / 8) << row_groups_log2;
  return num_parts == 1 ? 0
                        : static_cast<int>(ceil_div(num_pieces, kFewWarpgroups * cluster_ctas)) * kFewWarpgroups * num_parts * 64 * 8 * 4;
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

/// Columns at to at + 7 of a row, 0 past its end.
__device__ __forceinline__ uint4 load_columns(const std::uint16_t* row, int at, int num_columns, bool is_aligned) {
  if (is_aligned && at + 8 <= num_columns) return *reinterpret_cast<const uint4*>(row + at);
  std::uint32_t values[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) values[i] = at + i < num_columns ? row[at + i] : 0u;
  return make_uint4(values[0] | values[1] << 16, values[2] | values[3] << 16, values[4] | values[5] << 16, values[6] | values[7] << 16);
}

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

/// Grid: the CTAs of all clusters, or up to one for each SM. A warp brings x, codes and scales of a stage by three tensor copies. Each of four
/// warpgroups turns its 64 rows' codes of 128 columns into fragments of A, the integers that they are, while the tensor cores work on those before;
/// the products of a group are multiplied by its scale in float32.
///
/// One token (kAllTokens 1) has its x in shared memory from the start, as it is: the tensor cores take 8 columns at any multiple of 16 bytes for a row, and
/// what they take for the other seven tokens nobody looks at.
template <bool kBf16, int kBits, bool kSmallGroups, int kAllTokens>
__global__ __launch_bounds__(kFewThreads, 1) void quantized_matmul_few_kernel(const __grid_constant__ FewPlan plan,
                                                                              const __grid_constant__ FewMaps maps) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  constexpr bool kOne = kAllTokens == 1;
  constexpr int kTokens = kOne ? 8 : kAllTokens;
  constexpr int kSums = kTokens / 2;  // of a thread
  constexpr int kSlices = 4 * kFewStepsOfWarpgroup;  // of 16 columns, in a stage
  constexpr int kGroupSlices = kSmallGroups ? 2 : kSlices;
  constexpr int kPhaseSlices = kSmallGroups || kTokens == 64 ? 2 : 4;  // fragments that are made at a time
  constexpr int kStepBytes = kBlockUnits * unit_bytes(kBits);
  constexpr bool kCounts =
      kTokens <= 16;  // stores to another CTA count themselves at its barrier: faster where they are few, slower where they are many
  extern __shared__ std::uint8_t shared_raw[];
  std::uint8_t* shared = shared_raw + (1024 - device::shared_address(shared_raw) % 1024) % 1024;
  std::uint8_t* store_space = shared;
  auto* barriers = reinterpret_cast<std::uint64_t*>(shared + kFewStoreBytes);  // full, empty
  std::uint8_t* stages = shared + kFewStagesAt;
  int* handed_over = reinterpret_cast<int*>(barriers + 2 * kFewMaxStages + 3);  // warps that are done with a helper's tiles
  const std::uint32_t full = device::shared_address(barriers), empty = full + 8 * kFewMaxStages, helped = empty + 8 * kFewMaxStages,
                      x_there = helped + 8, sums_there = x_there + 8;

  const Layout& layout = plan.layout;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  const int warp = __shfl_sync(0xffffffffu, thread / 32, 0);
  if (!plan.waits) device::wait_for_predecessor();  // else later, as nothing but x is new
  // The end of this is awaited before one CTA writes to another, whose barriers are there by then.
  if (plan.cluster_ctas > 1 && warp < 4 * kFewWarpgroups) device::cluster_arrive();
  if (warp == 4 * kFewWarpgroups) {
    if (lane == 0) {
      for (int i = 0; i < plan.num_stages; ++i) {
        device::barrier_init(full + 8 * i, 1);
        device::barrier_init(empty + 8 * i, 4 * kFewWarpgroups);
      }
      device::barrier_init(helped, 1);
      device::barrier_init(x_there, 4 * kFewWarpgroups);
      device::barrier_init(sums_there, 1);
      *handed_over = 0;
      device::barrier_init_fence();
    }
    __syncwarp();
    if (plan.cluster_ctas > 1) device::cluster_arrive();
    device::named_barrier_arrive(2, kFewThreads);
  } else {
    device::named_barrier_sync(2, kFewThreads);
  }

  const int row_groups = 1 << plan.row_groups_log2, column_groups = kFewWarpgroups >> plan.row_groups_log2;
  const int stage_steps = column_groups * kFewStepsOfWarpgroup;
  const int rank = plan.cluster_ctas > 1 ? device::cluster_rank() : 0;
  const int cta = static_cast<int>(blockIdx.x), num_cut = plan.num_tiles - plan.first_cut;
  const bool helps = cta < plan.num_helpers;
  int first_step = rank * plan.chunk_steps, first_tile = (cta - plan.num_helpers) / plan.cluster_ctas, end_tile = plan.num_tiles;
  int tiles_at_once = (static_cast<int>(gridDim.x) - plan.num_helpers) / plan.cluster_ctas;
  if (helps) {
    first_step = plan.cut_step;
    first_tile = plan.first_cut + cta * num_cut / plan.num_helpers;
    end_tile = plan.first_cut + (cta + 1) * num_cut / plan.num_helpers;
    tiles_at_once = 1;
  }
  const auto last_step_of = [&](int tile) {
    return tile >= plan.first_cut && !helps ? plan.cut_step : min(first_step + plan.chunk_steps, layout.num_steps);
  };
  const int x_bytes = kOne ? 0 : stage_steps * plan.panel_bytes, code_bytes = kFewStageUnits * kStepBytes;
  const int entry_row_bytes = kBlockUnits * 8 * layout.entry_bytes;  // of 64 rows and a group

  if (warp == 4 * kFewWarpgroups) {
    // ---- Copies ----
    if (lane != 0) return;
    const int bytes = x_bytes + code_bytes + row_groups * plan.num_stage_groups * entry_row_bytes;
    const std::uint64_t policy = device::read_once_policy();
    const auto copy_x = [&](int slot, int step) {
      device::copy_box(device::shared_address(stages) + static_cast<std::uint32_t>(slot * plan.stage_bytes), &maps.x, full + 8 * slot, 0, 0,
                       step, 0);
    };
    int slot = 0, ahead = plan.waits ? plan.num_stages : 0;  // stages whose x has to wait
    std::uint32_t parity = 0;
    const auto end_wait = [&] {
      device::wait_for_predecessor();
      const int behind = plan.num_stages - ahead;
      ahead = 0;
      for (int i = 0; i < behind; ++i) copy_x(i, first_step + i * stage_steps);
    };
    // This warp tells that parts of sums are there: a store that waits for those of a whole CTA would hold up a warp that multiplies.
    int tile = first_tile, given = first_tile;
    const auto give = [&] {
      if (*reinterpret_cast<volatile int*>(handed_over) < (given - first_tile + 1) * 4 * kFewWarpgroups) return;
      __threadfence_block();
      store_release(plan.arrivals + (given - plan.first_cut), plan.tag + 1);
      ++given;
    };
    for (; tile < end_tile; tile += tiles_at_once) {
      const int last_step = last_step_of(tile);
#pragma unroll 1
      for (int k = first_step; k < last_step; k += stage_steps) {
        const std::uint32_t at = device::shared_address(stages) + static_cast<std::uint32_t>(slot * plan.stage_bytes),
                            ready = full + 8 * slot;
        device::barrier_wait(empty + 8 * slot, parity ^ 1);
        if (kOne && slot == kStagesBeforeX && parity == 0) device::barrier_wait(x_there, 0);  // x does not queue behind all these copies
        device::barrier_arrive_expect(ready, bytes);
        device::copy_box_by(at + x_bytes, &maps.codes, ready, 0, k * (kBits == 8 ? 2 : 1), tile * row_groups, 0, policy);
        device::copy_box_by(at + x_bytes + code_bytes, &maps.entries, ready, 0, (2 * k) >> plan.group_shift, tile * row_groups, 0, policy);
        if constexpr (!kOne) {
          if (ahead == 0) {
            copy_x(slot, k);
          } else if (--ahead == 0) {
            end_wait();
          }
        }
        if (++slot == plan.num_stages) slot = 0, parity ^= 1;
        if (helps && given < tile) give();
      }
      // No stage is used twice before x is there.
      if (!kOne && ahead > 0) end_wait();
    }
    while (helps && given < tile) give();
    tile -= tiles_at_once;
    if (!helps && tile >= plan.first_cut) {
      auto* arrival = plan.arrivals + (tile - plan.first_cut);
      while (load_acquire(arrival) != plan.tag + 1) __nanosleep(20);
      *arrival = plan.tag;  // for the next launch
      device::barrier_arrive(helped);
    }
    return;
  }

  if constexpr (kOne) {
    // ---- x ----
    std::uint8_t* x_shared = stages + plan.x_at;
    const auto* x = static_cast<const std::uint16_t*>(plan.x);
    const int first = first_step * kUnitColumns,
              last = min(first_step + plan.chunk_steps, (layout.num_steps + stage_steps - 1) / stage_steps * stage_steps) * kUnitColumns;
    if (plan.permutation == nullptr) {
      const bool is_aligned = (reinterpret_cast<std::uintptr_t>(plan.x) & 15) == 0;
      for (int at = first + 8 * thread; at < last; at += 8 * 128 * kFewWarpgroups)
        *reinterpret_cast<uint4*>(x_shared + 2 * (at - first)) = load_columns(x, at, plan.num_columns, is_aligned);
    } else {
      auto* source = reinterpret_cast<std::uint16_t*>(stages + plan.source_at);
      const bool is_aligned = (reinterpret_cast<std::uintptr_t>(plan.x) & 15) == 0;
      const bool has_vectors = (reinterpret_cast<std::uintptr_t>(plan.permutation) & 15) == 0;
      int columns[8];
      const auto load_permutation = [&](int at) {
        if (has_vectors && at + 8 <= plan.num_columns) {
          const int4 a = __ldg(reinterpret_cast<const int4*>(plan.permutation + at)),
                     b = __ldg(reinterpret_cast<const int4*>(plan.permutation + at) + 1);
          columns[0] = a.x, columns[1] = a.y, columns[2] = a.z, columns[3] = a.w;
          columns[4] = b.x, columns[5] = b.y, columns[6] = b.z, columns[7] = b.w;
        } else {
#pragma unroll
          for (int i = 0; i < 8; ++i) columns[i] = at + i < plan.num_columns ? __ldg(plan.permutation + at + i) : -1;
        }
      };
      if (first + 8 * thread < last) load_permutation(first + 8 * thread);
      for (int at = 8 * thread; at < plan.num_source_columns; at += 8 * 128 * kFewWarpgroups)
        *reinterpret_cast<uint4*>(source + at) = load_columns(x, at, plan.num_source_columns, is_aligned);
      device::named_barrier_sync(1, 128 * kFewWarpgroups);
      for (int at = first + 8 * thread; at < last; at += 8 * 128 * kFewWarpgroups) {
        std::uint32_t values[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const bool is_column = columns[i] >= 0 && columns[i] < plan.num_source_columns;
          values[i] = is_column ? source[columns[i]] : 0u;
        }
        *reinterpret_cast<uint4*>(x_shared + 2 * (at - first)) =
            make_uint4(values[0] | values[1] << 16, values[2] | values[3] << 16, values[4] | values[5] << 16, values[6] | values[7] << 16);
        const int next = at + 8 * 128 * kFewWarpgroups;
        if (next < last) load_permutation(next);
      }
    }
    device::fence_async_proxy();
    if (lane == 0) device::barrier_arrive(x_there);
    device::named_barrier_sync(1, 128 * kFewWarpgroups);
  }

  // ---- Products ----
  const int warpgroup = warp / 4, unit = warp % 4, group_thread = thread % 128;
  const int row_group = warpgroup & (row_groups - 1), column_group = warpgroup >> plan.row_groups_log2;
  const int own_step = column_group * kFewStepsOfWarpgroup;  // the first in a stage
  const int codes_at = x_bytes + (row_group * stage_steps + own_step) * kStepBytes + unit * unit_bytes(kBits) + 16 * lane;
  const int entries_at =
      x_bytes + code_bytes + row_group * plan.num_stage_groups * entry_row_bytes + (8 * unit + lane / 4) * layout.entry_bytes;
  const int panel_bytes = kOne ? kUnitColumns * 2 : plan.panel_bytes;
  const std::uint32_t x_at = device::matrix_descriptor(
      device::shared_address(stages) + static_cast<std::uint32_t>((kOne ? plan.x_at : 0) + own_step * panel_bytes), kOne ? 16 : 0);
  const std::uint32_t panel_step = static_cast<std::uint32_t>(panel_bytes) >> 4,
                      stage_step = static_cast<std::uint32_t>(plan.stage_bytes) >> 4;
  std::uint8_t* space = store_space + warp * (8 * kStoreRowBytes);
  const int num_token_groups = (plan.num_tokens + 7) / 8;

  float acc[kSums] = {}, product[kSums] = {};
  std::uint32_t fragments[2][kPhaseSlices][4];
  constexpr std::uint32_t kMiddle = kBits == 4 ? 8 : 128;
  std::uint32_t lower = zero_term<kBits, kBf16, false>(kMiddle), upper = zero_term<kBits, kBf16, true>(kMiddle);
  int slot = 0;
  std::uint32_t parity = 0;
  for (int tile = first_tile; tile < end_tile; tile += tiles_at_once) {
    const int last_step = last_step_of(tile);
    float scales[2] = {0.0f, 0.0f};
    int previous = -1;
#pragma unroll
    for (int i = 0; i < kSums; ++i) acc[i] = product[i] = 0.0f;
    const auto finish_group = [&] {
      device::wgmma_wait<0>();
      device::pin_registers(product);
#pragma unroll
      for (int i = 0; i < kSums; ++i) acc[i] = fmaf(scales[i / 2 % 2], product[i], acc[i]);
    };
#pragma unroll 1
    for (int k = first_step; k < last_step; k += stage_steps) {
      const std::uint8_t* stage = stages + slot * plan.stage_bytes;
      const std::uint32_t x =
          x_at + (kOne ? static_cast<std::uint32_t>(k - first_step) * panel_step : static_cast<std::uint32_t>(slot) * stage_step);
      device::barrier_wait(full + 8 * slot, parity);
      std::uint32_t words[kBits];
      float next_scales[2];
      const auto phase = [&](auto constant) {
        constexpr int kPhase = decltype(constant)::value, kFirst = kPhase * kPhaseSlices;
        auto& a = fragments[kPhase % 2];
        if constexpr (kFirst % 4 == 0) {
#pragma unroll
          for (int i = 0; i < kBits / 4; ++i) {
            const uint4 loaded = *reinterpret_cast<const uint4*>(stage + codes_at + kFirst / 4 * kStepBytes + 512 * i);
            words[4 * i] = loaded.x;
            words[4 * i + 1] = loaded.y;
            words[4 * i + 2] = loaded.z;
            words[4 * i + 3] = loaded.w;
          }
        }
        if constexpr (kFirst % kGroupSlices == 0) {
          const int entry = (2 * own_step + kFirst / 2) >> plan.group_shift;
          const RowPair rows = load_any_entry<kBits>(stage + entries_at + entry * entry_row_bytes, layout);
          if (layout.has_zeros) {
            lower = zero_term<kBits, kBf16, false>(rows.zero[0]);
            upper = zero_term<kBits, kBf16, true>(rows.zero[1]);
          }
          next_scales[0] = rows.scale[0], next_scales[1] = rows.scale[1];
        }
        device::wgmma_wait<1>();  // the tensor cores are done with these fragments
        dequantize<kBits, kBf16, kFirst % 4>(a[0], words, lower, upper);
        dequantize<kBits, kBf16, kFirst % 4 + 1>(a[1], words, lower, upper);
        if constexpr (kPhaseSlices == 4) {
          dequantize<kBits, kBf16, 2>(a[2], words, lower, upper);
          dequantize<kBits, kBf16, 3>(a[3], words, lower, upper);
        }
        if constexpr (kFirst % kGroupSlices == 0) {
          finish_group();
          scales[0] = next_scales[0], scales[1] = next_scales[1];
          if (kPhase == 0 && previous >= 0 && lane == 0) device::barrier_arrive(empty + 8 * previous);
        }
        device::wgmma_fence();
#pragma unroll
        for (int s = 0; s < kPhaseSlices; ++s) {
          device::WgmmaRegistersRows<kTokens, kBf16, kOne ? device::kPlainDescriptorHigh : device::kDescriptorHigh>::product(
              product, a[s], x + kFirst / 4 * panel_step + 2 * (kFirst % 4 + s), kFirst % kGroupSlices == 0 && s == 0 ? 0 : 1);
        }
        device::wgmma_commit();
      };
      phase(std::integral_constant<int, 0>{});
      phase(std::integral_constant<int, 1>{});
      if constexpr (kPhaseSlices == 2) {
        phase(std::integral_constant<int, 2>{});
        phase(std::integral_constant<int, 3>{});
      }
      previous = slot;
      if (++slot == plan.num_stages) slot = 0, parity ^= 1;
    }
    finish_group();
    if (previous >= 0 && lane == 0) device::barrier_arrive(empty + 8 * previous);

    // ---- Sums of eight tokens: warpgroups, and a cluster's CTAs, take turns ----
    // Piece i is of 64 rows and eight tokens.
    const std::int64_t tile_row = std::int64_t{tile} * row_groups * kBlockRows + unit * kUnitRows;
    const int num_pieces = num_token_groups << plan.row_groups_log2;
    const bool is_cut = tile >= plan.first_cut;
    float4* partials = plan.partials + (std::int64_t{tile - plan.first_cut} * num_pieces * 128 + group_thread);
    const auto hand_over = [&] {
      __syncwarp();
      if (lane == 0) {
        __threadfence_block();
        atomicAdd(handed_over, 1);
      }
    };
    if (is_cut && !helps) device::barrier_wait(helped, 0);
    if (column_groups * plan.cluster_ctas == 1) {
      if (helps) {
#pragma unroll
        for (int j = 0; j < kTokens / 8; ++j) {
          if (j >= num_token_groups) break;
          __stcg(partials + (j << plan.row_groups_log2 | row_group) * 128,
                 make_float4(acc[4 * j], acc[4 * j + 1], acc[4 * j + 2], acc[4 * j + 3]));
        }
        // Warps are counted, not which tile they are done with: none may be a tile ahead of another.
        device::named_barrier_sync(1, 128 * kFewWarpgroups);
        hand_over();
        continue;
      }
      if (is_cut) {
#pragma unroll
        for (int j = 0; j < kTokens / 8; ++j) {
          if (j >= num_token_groups) break;
          const float4 part = __ldcg(partials + (j << plan.row_groups_log2 | row_group) * 128);
          acc[4 * j] += part.x;
          acc[4 * j + 1] += part.y;
          acc[4 * j + 2] += part.z;
          acc[4 * j + 3] += part.w;
        }
      }
      float bias[2];
      const std::int64_t row = tile_row + row_group * kBlockRows;
      load_row_bias(bias, plan.bias, plan.bias_dtype, row + lane / 4, plan.num_rows);
#pragma unroll
      for (int j = 0; j < kTokens / 8; ++j) {
        if (j >= num_token_groups) break;
        store_tokens<kBf16, 1>(space, reinterpret_cast<const float (&)[4]>(acc[4 * j]), bias, plan, 8 * j, row);
      }
      continue;
    }
    // Piece i goes to warpgroup i % 4 of the CTA of rank i / 4 % cluster_ctas, which has room for its parts: of all CTAs and, of each, of the warpgroups
    // that share columns.
    const int num_parts = plan.cluster_ctas * column_groups;
    float4* sums = reinterpret_cast<float4*>(stages + plan.sums_at) + group_thread;
    if (plan.cluster_ctas > 1) {
      if (kCounts && thread == 0) {
        const int of_all = num_pieces / (kFewWarpgroups * plan.cluster_ctas), left = num_pieces % (kFewWarpgroups * plan.cluster_ctas);
        const int count = of_all * kFewWarpgroups + min(max(left - rank * kFewWarpgroups, 0), kFewWarpgroups);
        device::barrier_arrive_expect(sums_there, count * (num_parts - column_groups) * 64 * 8 * 4);  // of the other CTAs
      }
      device::cluster_wait();
      if (plan.sums_at == 0) device::cluster_sync();  // nobody reads stages any more
    } else {
      device::named_barrier_sync(1, 128 * kFewWarpgroups);  // the last tile's sums were read, and stages, where these are
    }
#pragma unroll
    for (int j = 0; j < kTokens / 8; ++j) {
      if (j >= num_token_groups) break;
      const int piece = j << plan.row_groups_log2 | row_group, turn = piece / (kFewWarpgroups * plan.cluster_ctas);
      float4* to = sums + ((turn * kFewWarpgroups + piece % kFewWarpgroups) * num_parts + rank * column_groups + column_group) * 128;
      if (plan.cluster_ctas > 1) {
        const int owner = piece / kFewWarpgroups % plan.cluster_ctas;
        const std::uint32_t there = device::address_in_cta(device::shared_address(to), owner);
        const float4 sum = make_float4(acc[4 * j], acc[4 * j + 1], acc[4 * j + 2], acc[4 * j + 3]);
        if constexpr (kCounts) {
          if (owner == rank) {
            *to = sum;
          } else {
            device::cluster_store_16(there, device::address_in_cta(sums_there, owner), sum.x, sum.y, sum.z, sum.w);
          }
        } else {
          device::store_cluster_16(there, sum);
        }
      } else {
        *to = make_float4(acc[4 * j], acc[4 * j + 1], acc[4 * j + 2], acc[4 * j + 3]);
      }
    }
    float4 help = make_float4(0.0f, 0.0f, 0.0f, 0.0f);  // a helper's part of the piece that is next
    if (is_cut && !helps && warpgroup < num_pieces) help = __ldcg(partials + warpgroup * 128);
    if (plan.cluster_ctas > 1) {
      if constexpr (kCounts) {
        device::named_barrier_sync(1, 128 * kFewWarpgroups);  // the CTA's own parts
        device::barrier_wait(sums_there, 0);
      } else {
        device::cluster_sync();
      }
    } else {
      device::named_barrier_sync(1, 128 * kFewWarpgroups);
    }
    const float4* from = sums + warpgroup * num_parts * 128;
#pragma unroll 1
    for (int piece = rank * kFewWarpgroups + warpgroup; piece < num_pieces; piece += plan.cluster_ctas * kFewWarpgroups) {
      float bias[2], total[4] = {};
      const std::int64_t row = tile_row + (piece & (row_groups - 1)) * kBlockRows;
      load_row_bias(bias, plan.bias, plan.bias_dtype, row + lane / 4, plan.num_rows);
#pragma unroll 4
      for (int part = 0; part < num_parts; ++part) {
        const float4 sum = from[part * 128];
        total[0] += sum.x;
        total[1] += sum.y;
        total[2] += sum.z;
        total[3] += sum.w;
      }
      if (helps) {
        __stcg(partials + piece * 128, make_float4(total[0], total[1], total[2], total[3]));
        from += kFewWarpgroups * num_parts * 128;
        continue;
      }
      total[0] += help.x;
      total[1] += help.y;
      total[2] += help.z;
      total[3] += help.w;
      if (is_cut && piece + kFewWarpgroups < num_pieces) help = __ldcg(partials + (piece + kFewWarpgroups) * 128);
      store_tokens<kBf16, 1>(space, total, bias, plan, piece >> plan.row_groups_log2 << 3, row);
      from += kFewWarpgroups * num_parts * 128;
    }
    if (plan.cluster_ctas > 1) return;
    if (helps) hand_over();
  }
#endif
}

}  // namespace quire::cuda::w4a16
