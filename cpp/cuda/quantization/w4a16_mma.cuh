// quantized_matmul on mma.sync: weights stream through the A operand, up to 64 tokens are the columns of B. sm_80 and later; the way of few tokens.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cuda/device/async_copy.cuh"
#include "cuda/device/dependent_launch.cuh"
#include "cuda/element.h"
#include "cuda/quantization/w4a16.cuh"
#include "cuda/quantization/w4a16_arrival.cuh"

namespace quire::cuda::w4a16 {

/// One launch. A task is a strip of rows x a chunk of columns; task = strip * num_chunks + chunk. CTA c of num_ctas has tasks
/// [c * num_tasks / num_ctas, (c + 1) * num_tasks / num_ctas).
struct MmaPlan {
  Layout layout;
  const void* x = nullptr;  // [num_tokens, num_columns], rows 16-byte aligned
  void* out = nullptr;  // [num_tokens, num_rows]
  const void* bias = nullptr;  // [num_rows] or null
  float* partials = nullptr;  // [token blocks][num_ctas][2][strip_rows * tokens of a block]
  std::uint64_t* arrivals = nullptr;  // [token blocks][num_strips]
  std::uint64_t tag = 0;  // of this launch; arrivals with another one count as zero
  std::int64_t x_stride = 0, out_stride = 0;
  std::int64_t num_tokens = 0;
  int num_tasks = 0;
  int num_rows = 0, num_columns = 0;
  int num_ctas = 0;  // for each block of tokens
  int num_chunks = 0;  // along K
  int chunk_steps = 0;  // a multiple of the warps along K
  int row_warps_log2 = 0;  // warps of a CTA side by side along N; the others share K
  int group_shift = 0;  // unit k's group is k >> group_shift, where groups are not of 32
  int num_stages = 0;  // of rings: kStages, or 2 where shared memory is short
  int stage_bytes = 0;  // codes, then entries
  int x_alignment = 16;  // of every row of x, in bytes
  DType bias_dtype = DType::kFloat16;
  bool waits = false;  // for x, which a predecessor of the call's own writes; without it for everything

  QUIRE_HOST_DEVICE int first_task(int cta) const { return static_cast<int>(std::int64_t{cta} * num_tasks / num_ctas); }
  QUIRE_HOST_DEVICE int owner(int task) const { return static_cast<int>(((std::int64_t{task} + 1) * num_ctas - 1) / num_tasks); }
};

constexpr int kMmaUnits = 2;  // of 16 rows, for each warp

template <int kBits, int kTiles>
struct MmaShape {
  static constexpr int kWarps = kTiles <= 4 ? 16 : 8;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kUnits = kMmaUnits;
  static constexpr int kTokens = 8 * kTiles;
  static constexpr int kCodeBytes = kUnits * unit_bytes(kBits);
  static constexpr bool kStreamsX = kTiles > 1;  // x comes with the codes, by a ring of all warps; else a chunk of it is there as a whole
  static constexpr int kStages = kWarps * kCodeBytes <= 16384 ? 4 : 3;
  static constexpr int kSumFloats = kUnits * kTiles * 4 * 32;  // of a warp
  static constexpr int kSumBytes = kWarps * kSumFloats * 4;
};

/// What a CTA has besides, in a variable of the kernel's own, rounded up: a device's limit is for both.
inline constexpr int kMmaStaticBytes = 16;

/// Of a CTA: rings of codes, sums, and x: its ring, or one chunk, or two.
template <typename Shape>
QUIRE_HOST_DEVICE int mma_shared_bytes(const MmaPlan& plan) {
  const int tokens = plan.num_tokens < Shape::kTokens ? static_cast<int>(plan.num_tokens) : Shape::kTokens;
  const int steps = Shape::kStreamsX ? Shape::kWarps >> plan.row_warps_log2 : plan.chunk_steps;
  const int buffers = Shape::kStreamsX ? plan.num_stages : plan.num_chunks > 1 ? 2 : 1;
  return Shape::kWarps * plan.num_stages * plan.stage_bytes + Shape::kSumBytes + buffers * tokens * (steps * kUnitColumns * 2 + 16);
}

/// d = a b.
template <bool kBf16>
__device__ __forceinline__ void mma_16816_first(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
  if constexpr (kBf16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %10, %10, %10};\n"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(0.0f));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %10, %10, %10};\n"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(0.0f));
  }
}

/// kBits codes; groups of 32 columns if kSmallGroups; 8 * kTiles tokens.
///
/// Grid: num_ctas CTAs for each block of tokens. A CTA adds up its tasks strip by strip: its warps share rows and, with what is left of them, the
/// columns of a chunk. Each warp brings its own codes by a ring of asynchronous copies that runs on across tasks. One tile's x is there as a whole, or by
/// large chunks, so that no warp waits for others; more come with the codes, for all warps, step by step.
/// A strip that several CTAs share is added up by the last of them, in the order of K.
template <bool kBf16, int kBits, bool kSmallGroups, Entry kEntry, int kTiles>
__global__ __launch_bounds__(MmaShape<kBits, kTiles>::kThreads, 1) void quantized_matmul_mma_kernel(const __grid_constant__ MmaPlan plan) {
  using Shape = MmaShape<kBits, kTiles>;
  using T = std::conditional_t<kBf16, __nv_bfloat16, __half>;
  constexpr int kUnits = Shape::kUnits;
  constexpr int kStages = Shape::kStages;
  constexpr int kGroups = kSmallGroups ? 2 : 1;  // in 64 columns
  extern __shared__ __align__(128) std::uint8_t shared[];
  __shared__ int is_last;

  if (!plan.waits) device::wait_for_predecessor();  // else later, as nothing but x is new
  const Layout& layout = plan.layout;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int row_warps = 1 << plan.row_warps_log2, column_warps = Shape::kWarps >> plan.row_warps_log2;
  const int row_warp = warp & (row_warps - 1), column_warp = warp >> plan.row_warps_log2;
  const int strip_units = row_warps * kUnits;
  const int token_block = static_cast<int>(blockIdx.x / static_cast<unsigned>(plan.num_ctas));
  const int cta = static_cast<int>(blockIdx.x % static_cast<unsigned>(plan.num_ctas));
  const std::int64_t first_token = std::int64_t{token_block} * Shape::kTokens;
  const int num_tokens = static_cast<int>(min(plan.num_tokens - first_token, std::int64_t{Shape::kTokens}));
  const int begin = plan.first_task(cta), end = plan.first_task(cta + 1);
  const int warp_steps = plan.chunk_steps / column_warps;

  // Shared memory: rings, sums, x.
  const int ring_bytes = plan.num_stages * plan.stage_bytes;
  std::uint8_t* ring = shared + warp * ring_bytes;
  float* sums = reinterpret_cast<float*>(shared + Shape::kWarps * ring_bytes);
  const std::uint32_t x_shared = device::shared_address(shared) + static_cast<std::uint32_t>(Shape::kWarps * ring_bytes + Shape::kSumBytes);
  const int x_steps = Shape::kStreamsX ? column_warps : plan.chunk_steps;  // at a time
  const int x_row_bytes = x_steps * kUnitColumns * 2 + 16;  // eight rows are in different banks
  const int x_bytes = x_row_bytes * num_tokens;

  // ---- Copies of x: the part `part` of `parts` of x_steps steps ----
  const int x_pieces = x_steps * (kUnitColumns / 8);  // of 16 bytes, in a row
  const int x_rows_at_once = max(Shape::kThreads / x_pieces, 1);
  const int x_row = x_rows_at_once == 1 ? 0 : thread / x_pieces, x_piece = x_rows_at_once == 1 ? thread : thread % x_pieces;
  const bool x_is_simple = plan.x_alignment == 16 && plan.num_columns == layout.num_steps * kUnitColumns &&
                           plan.num_chunks * plan.chunk_steps == layout.num_steps;
  const auto copy_x = [&](int first_step, int buffer, int part, int parts) {
    if (x_row >= x_rows_at_once) return;
    int token = part * x_rows_at_once + x_row;
    const int first_column = first_step * kUnitColumns + x_piece * 8;
    const T* from = static_cast<const T*>(plan.x) + (first_token + token) * plan.x_stride + first_column;
    std::uint32_t dst = x_shared + static_cast<std::uint32_t>(buffer * x_bytes + token * x_row_bytes + 16 * x_piece);
    const std::int64_t from_step = std::int64_t{parts} * x_rows_at_once * plan.x_stride;
    const auto dst_step = static_cast<std::uint32_t>(parts * x_rows_at_once * x_row_bytes);
    if (x_is_simple && x_pieces <= Shape::kThreads) {
#pragma unroll 4
      for (; token < num_tokens; token += parts * x_rows_at_once, from += from_step, dst += dst_step)
        if (x_piece < x_pieces) device::copy_async_16(dst, from, 16);
      return;
    }
    for (; token < num_tokens; token += parts * x_rows_at_once, from += from_step, dst += dst_step) {
      for (int piece = 0; x_piece + piece < x_pieces; piece += Shape::kThreads) {
        const int valid = min(max(plan.num_columns - first_column - 8 * piece, 0), 8);
        const T* at = valid > 0 ? from + 8 * piece : static_cast<const T*>(plan.x);
        // The end of a row that is part of a piece goes by elements: memcheck takes a copy of fewer bytes for one of all.
        const bool is_whole = valid == 0 || valid == 8;
        if (plan.x_alignment == 16 && is_whole) {
          device::copy_async_16(dst + static_cast<std::uint32_t>(16 * piece), at, 2 * valid);
        } else {
          device::copy_narrow_16(dst + static_cast<std::uint32_t>(16 * piece), at, 2 * valid, is_whole ? plan.x_alignment : 2);
        }
      }
    }
  };

  // ---- The ring of codes and entries: what is copied next ----
  const int num_units = static_cast<int>(layout.num_blocks) * kBlockUnits;
  const int code_step = column_warps * kBlockUnits * unit_bytes(kBits), group_bytes = kBlockUnits * 8 * layout.entry_bytes;
  const int entry_pieces = kUnits * layout.entry_bytes / 2;  // of 16 bytes; entries of a group are side by side
  struct Ahead {
    int task, strip, chunk, step, k, limit;
    const std::uint8_t* codes;
    const std::uint8_t* entries;
  };
  Ahead ahead{begin, begin / plan.num_chunks, begin % plan.num_chunks, 0, 0, 0, nullptr, nullptr};
  const auto aim = [&] {
    const int unit = ahead.strip * strip_units + row_warp * kUnits;
    ahead.step = 0;
    ahead.k = ahead.chunk * plan.chunk_steps + column_warp;
    ahead.limit = ahead.task < end && unit < num_units ? layout.num_steps : 0;
    ahead.codes = layout.codes + layout.unit_offset(unit, ahead.k) + 16 * lane;
    ahead.entries = layout.scales + layout.entry_offset(unit, 0) + 16 * lane;
  };
  aim();
  const std::uint32_t ring_begin = device::shared_address(ring), ring_end = ring_begin + static_cast<std::uint32_t>(ring_bytes);
  std::uint32_t write_slot = ring_begin;
  int write_stage = 0;
  const auto copy_step = [&] {
    if (Shape::kStreamsX) {
      if (ahead.task < end) copy_x(ahead.chunk * plan.chunk_steps + ahead.step * column_warps, write_stage, 0, 1);
      if (++write_stage == plan.num_stages) write_stage = 0;
    }
    if (ahead.k < ahead.limit) {
      const std::uint32_t dst = write_slot + static_cast<std::uint32_t>(16 * lane);
#pragma unroll
      for (int i = 0; i < Shape::kCodeBytes / 512; ++i)
        device::copy_async_16(dst + static_cast<std::uint32_t>(512 * i), ahead.codes + 512 * i, 16);
      const std::uint8_t* entries = ahead.entries + std::int64_t{kSmallGroups ? 2 * ahead.k : ahead.k >> plan.group_shift} * group_bytes;
      if (lane < entry_pieces) {
#pragma unroll
        for (int g = 0; g < kGroups; ++g)
          device::copy_async_16(dst + static_cast<std::uint32_t>(Shape::kCodeBytes + g * kUnits * 8 * layout.entry_bytes),
                                entries + g * group_bytes, 16);
      }
    }
    write_slot += static_cast<std::uint32_t>(plan.stage_bytes);
    if (write_slot == ring_end) write_slot = ring_begin;
    ahead.codes += code_step;
    ahead.k += column_warps;
    if (++ahead.step == warp_steps) {
      ++ahead.task;
      if (++ahead.chunk == plan.num_chunks) ahead.chunk = 0, ++ahead.strip;
      aim();
    }
  };

  // ---- Start: codes depend on no predecessor, x may ----
  int strip = ahead.strip, chunk = ahead.chunk;
  if (Shape::kStreamsX) {
    if (plan.waits) device::wait_for_predecessor();
  } else if (!plan.waits) {
    copy_x(chunk * plan.chunk_steps, 0, 0, 1);
    device::copy_async_commit();
  }
#pragma unroll 1
  for (int i = 0; i < plan.num_stages - 1; ++i) {
    copy_step();
    device::copy_async_commit();
  }
  if (!Shape::kStreamsX) {
    if (plan.waits) {
      device::wait_for_predecessor();
      copy_x(chunk * plan.chunk_steps, 0, 0, 1);
      device::copy_async_commit();
      device::copy_async_wait<0>();
    } else {
      plan.num_stages == kStages ? device::copy_async_wait<kStages - 1>() : device::copy_async_wait<1>();
    }
    __syncthreads();
  }

  // The row of x that a lane gives ldmatrix the address of, for each tile; rows past the last token repeat it, and nobody looks at their sums.
  std::uint32_t x_rows[kTiles];
#pragma unroll
  for (int t = 0; t < kTiles; ++t)
    x_rows[t] = x_shared + static_cast<std::uint32_t>(min(8 * t + lane % 8, num_tokens - 1) * x_row_bytes + lane / 8 * 16 +
                                                      column_warp * (kUnitColumns * 2));
  const int entry_at = Shape::kCodeBytes + lane / 4 * layout.entry_bytes;

  float acc[kUnits][kTiles][4] = {};
  int segment_begin = begin;
  std::uint32_t x_buffer = 0;  // or stage
  std::uint32_t read_slot = ring_begin;
  for (int task = begin; task < end; ++task) {
    if (!Shape::kStreamsX && plan.num_chunks > 1 && task > begin) {
      // x came with groups of the last task's steps but the last two.
      if (warp_steps >= 3) {
        device::copy_async_wait<2>();
      } else if (warp_steps == 2) {
        device::copy_async_wait<1>();
      } else {
        device::copy_async_wait<0>();
      }
      __syncthreads();
      x_buffer ^= 1;
    }
    const int x_parts = !Shape::kStreamsX && plan.num_chunks > 1 && task + 1 < end ? max(warp_steps - 2, 1) : 0;
    const int next_chunk = chunk + 1 == plan.num_chunks ? 0 : chunk + 1;

    // ---- The steps of a chunk ----
    std::uint32_t x_offset = x_buffer * static_cast<std::uint32_t>(x_bytes);
    int k = chunk * plan.chunk_steps + column_warp;
    const int limit = strip * strip_units + row_warp * kUnits < num_units ? layout.num_steps : 0;
#pragma unroll 1
    for (int step = 0; step < warp_steps; ++step) {
      plan.num_stages == kStages ? device::copy_async_wait<kStages - 2>() : device::copy_async_wait<0>();
      // Some lanes, or warps, bring what all read, and all are done with the slot that is written next.
      Shape::kStreamsX ? __syncthreads() : __syncwarp();
      copy_step();
      if (step < x_parts) copy_x(next_chunk * plan.chunk_steps, static_cast<int>(x_buffer ^ 1), step, x_parts);
      device::copy_async_commit();
      const std::uint8_t* slot = ring + (read_slot - ring_begin);
      read_slot += static_cast<std::uint32_t>(plan.stage_bytes);
      if (read_slot == ring_end) read_slot = ring_begin;
      if (k < limit) {
        std::uint32_t x[kTiles][2][4];  // of 32 columns each
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
          device::load_matrix_x4(x[t][0], x_rows[t] + x_offset);
          device::load_matrix_x4(x[t][1], x_rows[t] + x_offset + 64);
        }
#pragma unroll
        for (int u = 0; u < kUnits; ++u) {
          std::uint32_t words[kBits];
#pragma unroll
          for (int i = 0; i < kBits / 4; ++i) {
            const uint4 loaded = *reinterpret_cast<const uint4*>(slot + u * unit_bytes(kBits) + 512 * i + 16 * lane);
            words[4 * i] = loaded.x;
            words[4 * i + 1] = loaded.y;
            words[4 * i + 2] = loaded.z;
            words[4 * i + 3] = loaded.w;
          }
#pragma unroll
          for (int g = 0; g < kGroups; ++g) {
            const RowPair rows = load_entry<kEntry, kBits>(slot + entry_at + (g * kUnits + u) * 8 * layout.entry_bytes, layout);
            const std::uint32_t lower = zero_term<kBits, kBf16, false>(rows.zero[0]), upper = zero_term<kBits, kBf16, true>(rows.zero[1]);
            float product[kTiles][4];
            const auto multiply = [&](auto constant) {
              constexpr int kStep = decltype(constant)::value;
              std::uint32_t a[4];
              dequantize<kBits, kBf16, kStep>(a, words, lower, upper);
#pragma unroll
              for (int t = 0; t < kTiles; ++t) {
                const std::uint32_t b0 = x[t][kStep / 2][2 * (kStep % 2)], b1 = x[t][kStep / 2][2 * (kStep % 2) + 1];
                if constexpr (kStep % (4 / kGroups) == 0) {
                  mma_16816_first<kBf16>(product[t], a, b0, b1);
                } else {
                  device::mma_16816<kBf16>(product[t], a, b0, b1);
                }
              }
            };
            if (kGroups == 1 || g == 0) {
              multiply(std::integral_constant<int, 0>{});
              multiply(std::integral_constant<int, 1>{});
            }
            if (kGroups == 1 || g == 1) {
              multiply(std::integral_constant<int, 2>{});
              multiply(std::integral_constant<int, 3>{});
            }
#pragma unroll
            for (int t = 0; t < kTiles; ++t)
#pragma unroll
              for (int r = 0; r < 4; ++r) acc[u][t][r] = fmaf(rows.scale[r / 2], product[t][r], acc[u][t][r]);
          }
        }
      }
      k += column_warps;
      if (Shape::kStreamsX) {
        x_offset += static_cast<std::uint32_t>(x_bytes);
        if (++x_buffer == static_cast<std::uint32_t>(plan.num_stages)) x_buffer = 0, x_offset = 0;
      } else {
        x_offset += static_cast<std::uint32_t>(column_warps * (kUnitColumns * 2));
      }
    }

    // ---- The end of a strip, or of what this CTA has of it ----
    const int done = strip;
    const bool ends_strip = next_chunk == 0;
    chunk = next_chunk;
    strip += ends_strip ? 1 : 0;
    if (!ends_strip && task + 1 < end) continue;
    const bool whole = ends_strip && task + 1 - segment_begin == plan.num_chunks;
    segment_begin = task + 1;

    __syncthreads();  // the last strip's sums were read
#pragma unroll
    for (int u = 0; u < kUnits; ++u)
#pragma unroll
      for (int t = 0; t < kTiles; ++t)
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          sums[warp * Shape::kSumFloats + ((u * kTiles + t) * 4 + r) * 32 + lane] = acc[u][t][r];
          acc[u][t][r] = 0.0f;
        }
    __syncthreads();

    // A thread has one row, and some tokens.
    const int strip_rows = strip_units * kUnitRows, row = thread & (strip_rows - 1);
    const int first_of_tokens = thread >> (plan.row_warps_log2 + 5), tokens_at_once = Shape::kThreads >> (plan.row_warps_log2 + 5);
    const std::int64_t n = std::int64_t{done} * strip_rows + row;
    float bias[1][1] = {};
    if (plan.bias != nullptr) load_parameter(bias, plan.bias, plan.bias_dtype, n, 0, plan.num_rows);
    const auto store = [&](int token, float value) {
      if (n < plan.num_rows) static_cast<T*>(plan.out)[(first_token + token) * plan.out_stride + n] = from_float<T>(value + bias[0][0]);
    };
    // A CTA's parts: of its first strip in slot 0, of its last in slot 1.
    const std::int64_t slot_floats = std::int64_t{strip_rows} * Shape::kTokens;
    float* partials = plan.partials + std::int64_t{token_block} * plan.num_ctas * 2 * slot_floats + row;
    float* mine = partials + (std::int64_t{cta} * 2 + (begin / plan.num_chunks == done ? 0 : 1)) * slot_floats;
    const float* of_row = sums + row / 32 * Shape::kSumFloats + row / 16 % 2 * (kTiles * 128) + row / 8 % 2 * 64 + row % 8 * 4;
    for (int token = first_of_tokens; token < num_tokens; token += tokens_at_once) {
      const float* from = of_row + token / 8 * 128 + token % 2 * 32 + token % 8 / 2;
      float value = 0.0f;
#pragma unroll 4
      for (int w = 0; w < column_warps; ++w) value += from[w * row_warps * Shape::kSumFloats];
      if (whole) {
        store(token, value);
      } else {
        __stcg(mine + token * strip_rows, value);
      }
    }
    if (whole) continue;

    __threadfence();
    __syncthreads();
    const int first = plan.owner(done * plan.num_chunks), last = plan.owner((done + 1) * plan.num_chunks - 1);
    if (thread == 0) {
      const int num_strips = static_cast<int>(plan.num_tasks / plan.num_chunks);
      is_last = arrive(plan.arrivals + std::int64_t{token_block} * num_strips + done, plan.tag, last - first + 1);
    }
    __syncthreads();
    if (!is_last) continue;
    __threadfence();
    // All but the first of a strip's CTAs begin in it.
    const float* of_first = partials + (std::int64_t{first} * 2 + (plan.first_task(first) / plan.num_chunks == done ? 0 : 1)) * slot_floats;
    const float* of_others = partials + std::int64_t{first + 1} * 2 * slot_floats;
    for (int token = first_of_tokens; token < num_tokens; token += tokens_at_once) {
      float value = __ldcg(of_first + token * strip_rows);
      const float* from = of_others + token * strip_rows;
#pragma unroll 4
      for (int other = first; other < last; ++other, from += 2 * slot_floats) value += __ldcg(from);
      store(token, value);
    }
  }
  device::copy_async_wait<0>();
}

}  // namespace quire::cuda::w4a16
