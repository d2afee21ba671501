// What Hopper's kernel for products of 8-bit matrices does with a tile's sums: adds those of splits, scales and stores.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <type_traits>

#include "cuda/device/cluster.cuh"
#include "cuda/device/mma.cuh"
#include "cuda/device/tma.cuh"
#include "cuda/quantization/scaled_matmul_epilogue.cuh"
#include "cuda/quantization/scaled_matmul_wgmma_schedule.cuh"

namespace quire::cuda::scaled {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

__device__ __forceinline__ void store_shared(std::uint32_t address, float value) {
  asm volatile("st.shared.f32 [%0], %1;\n" ::"r"(address), "f"(value) : "memory");
}
// Not as words: sums that products write must not change their type, or the products wait for each other.
__device__ __forceinline__ void store_shared_4(std::uint32_t address, float a, float b, float c, float d) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};\n" ::"r"(address), "f"(a), "f"(b), "f"(c), "f"(d) : "memory");
}
__device__ __forceinline__ void store_shared_4(std::uint32_t address, int a, int b, int c, int d) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};\n" ::"r"(address), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}
__device__ __forceinline__ float load_shared(std::uint32_t address) {
  float value;
  asm volatile("ld.shared.f32 %0, [%1];\n" : "=f"(value) : "r"(address) : "memory");
  return value;
}
__device__ __forceinline__ void load_shared_2(float& first, float& second, std::uint32_t address) {
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];\n" : "=f"(first), "=f"(second) : "r"(address) : "memory");
}
__device__ __forceinline__ void load_shared_4(std::uint32_t (&words)[4], std::uint32_t address) {
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(address)
               : "memory");
}

template <typename T>
__device__ __forceinline__ T from_word(std::uint32_t word) {
  if constexpr (std::is_same_v<T, float>) {
    return __uint_as_float(word);
  } else {
    return static_cast<T>(word);
  }
}

/// A warpgroup's sums of 64 rows of a tile, and what becomes of them.
template <typename Sum, typename Shape>
struct WgmmaResults {
  static constexpr int kColumnBlocks = Shape::kColumns / 8, kChunkBlocks = Shape::kChunkColumns / 8;
  static constexpr int kGroupBarrier = 1;  // and the next one: one for each group
  static constexpr bool kHasColumnValues = Shape::kTokenRows || !Shape::kBlockScales;
  static constexpr int kValuesPerThread = (Shape::kColumns + 127) / 128;

  const WgmmaPlan& plan;
  const WgmmaShared<Shape>& shared;
  int rank, group;
  Sum sum[Shape::kColumns / 2];
  // Of the thread's rows, where they are output features.
  float feature_scale[2], bias[2];
  int column_sum[2];
  float column_value[kValuesPerThread];
  int chunks_staged = 0;

  __device__ __forceinline__ int thread() const { return static_cast<int>(threadIdx.x) % 128; }
  __device__ __forceinline__ int warp() const { return thread() / 32; }
  __device__ __forceinline__ int lane() const { return thread() % 32; }
  __device__ __forceinline__ void sync_group() const { device::named_barrier_sync(kGroupBarrier + group, 128); }
  __device__ __forceinline__ std::uint32_t column_values() const {
    return shared.base + Shape::kColumnValueOffset + group * Shape::kColumnValueBytes;
  }
  __device__ __forceinline__ std::uint32_t staging() const { return shared.base + Shape::kStagingOffset + group * Shape::kStagingBytes; }
  /// First row, within the matrix.
  __device__ __forceinline__ std::int64_t first_row(const Work& work) const {
    return std::int64_t{work.row_tile} * Shape::kRows + group * 64;
  }

  __device__ __forceinline__ void clear_sums() {
#pragma unroll
    for (int i = 0; i < Shape::kColumns / 2; ++i) sum[i] = 0;
  }

  __device__ __forceinline__ void load_values(const Work& work) {
    const ScaledMatmulParams& p = plan.params;
    if constexpr (!Shape::kTokenRows) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const std::int64_t n = first_row(work) + warp() * 16 + lane() / 4 + 8 * r;
        bias[r] = load_bias(p, n);
        if constexpr (!Shape::kBlockScales) {
          feature_scale[r] = load_feature_scale(p, n);
          column_sum[r] = load_column_sum(p, n);
        }
      }
    }
    if constexpr (kHasColumnValues) {
#pragma unroll
      for (int i = 0; i < kValuesPerThread; ++i) {
        const int column = thread() + 128 * i;
        const std::int64_t at = std::int64_t{work.column_tile} * Shape::kColumns + column;
        if (column < Shape::kColumns) column_value[i] = Shape::kTokenRows ? load_bias(p, at) : load_token_scale(p, at);
      }
    }
  }
  /// Shows the group the values of columns. Not before the products: that would be a wait for memory.
  __device__ __forceinline__ void share_values() const {
    if constexpr (kHasColumnValues) {
#pragma unroll
      for (int i = 0; i < kValuesPerThread; ++i) {
        const int column = thread() + 128 * i;
        if (column < Shape::kColumns) store_shared(column_values() + static_cast<std::uint32_t>(column) * 4, column_value[i]);
      }
    }
  }

  /// Sums of products with a - zero_point.
  __device__ __forceinline__ void subtract_zero_points(Sum* sums, const Work& work, int j) const {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int zero_point = load_zero_point(plan.params, std::int64_t{work.column_tile} * Shape::kColumns + 8 * j + lane() % 4 * 2 + e);
      sums[e] = subtract_zero_point(sums[e], zero_point, column_sum[0]);
      sums[2 + e] = subtract_zero_point(sums[2 + e], zero_point, column_sum[1]);
    }
  }
  __device__ __forceinline__ bool has_zero_points() const { return std::is_same_v<Sum, int> && plan.params.zero_point != nullptr; }

  /// The values of two columns of column block j: scales of tokens or, where tokens are rows, biases.
  __device__ __forceinline__ void load_column_values(float (&values)[2], int j) const {
    if constexpr (kHasColumnValues)
      load_shared_2(values[0], values[1], column_values() + static_cast<std::uint32_t>(8 * j + lane() % 4 * 2) * 4);
  }
  /// A result from a sum in row lane / 4 + 8 r.
  __device__ __forceinline__ float finish(Sum value, int r, float column_value) const {
    if constexpr (Shape::kTokenRows) {
      return value + column_value;
    } else if constexpr (Shape::kBlockScales) {
      return value + bias[r];
    } else {
      return fmaf(static_cast<float>(value) * column_value, feature_scale[r], bias[r]);
    }
  }

  __device__ __forceinline__ void store_float32(float value, const Work& work, int j, int e) const {
    const ScaledMatmulParams& p = plan.params;
    const std::int64_t row = first_row(work) + warp() * 16 + lane() / 4 + e / 2 * 8;
    const std::int64_t column = std::int64_t{work.column_tile} * Shape::kColumns + 8 * j + lane() % 4 * 2 + e % 2;
    const std::int64_t m = Shape::kTokenRows ? row : column, n = Shape::kTokenRows ? column : row;
    if (m < p.m && n < p.n) static_cast<float*>(p.out)[m * p.out_stride + n] = value;
  }

  /// Copies results of column blocks [first, first + count), staged at an address, to the output.
  __device__ __forceinline__ void copy_out(std::uint32_t from, const Work& work, int first, int count) const {
    const ScaledMatmulParams& p = plan.params;
    const std::int64_t column = std::int64_t{work.column_tile} * Shape::kColumns + 8 * first;
    const int pieces = Shape::kTokenRows ? count : 8, tokens = Shape::kTokenRows ? 64 : 8 * count;
    const std::int64_t first_token = Shape::kTokenRows ? first_row(work) : column;
    const std::int64_t first_feature = Shape::kTokenRows ? column : first_row(work);
    auto* out = static_cast<std::uint16_t*>(p.out);
#pragma unroll 1
    for (int i = thread(); i < tokens * pieces; i += 128) {
      const int token = i / pieces, piece = i - token * pieces;
      const std::int64_t m = first_token + token, n = first_feature + piece * 8;
      if (m >= p.m || n >= p.n) continue;
      std::uint32_t words[4];
      load_shared_4(words, from + static_cast<std::uint32_t>(token * 128 + ((piece ^ token % 8) * 16)));
      std::uint16_t* to = out + m * p.out_stride + n;
      if (plan.vector_out && n + 8 <= p.n) {
        *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
      } else {
#pragma unroll
        for (int e = 0; e < 8; ++e)
          if (n + e < p.n) to[e] = static_cast<std::uint16_t>(words[e / 2] >> (e % 2 * 16));
      }
    }
  }

  /// 16-bit results of a chunk, two to a word: those of rows lane / 4 and + 8.
  using ChunkWords = std::uint32_t[kChunkBlocks][2];

  /// The results of sums of column blocks from `first` on.
  template <bool kBf16>
  __device__ __forceinline__ void convert_chunk(ChunkWords& words, const Sum (&from)[4 * kChunkBlocks], int first) const {
    float values[kChunkBlocks][2];
#pragma unroll
    for (int j = 0; j < kChunkBlocks; ++j) load_column_values(values[j], min(first + j, kColumnBlocks - 1));
#pragma unroll
    for (int j = 0; j < kChunkBlocks; ++j) {
#pragma unroll
      for (int r = 0; r < 2; ++r)
        words[j][r] =
            device::pack_16<kBf16>(finish(from[4 * j + 2 * r], r, values[j][0]), finish(from[4 * j + 2 * r + 1], r, values[j][1]));
    }
  }

  /// Stores `count` column blocks from `first` on by way of shared memory: 64 features of some tokens, in rows of 128 bytes with
  /// swizzled 16-byte pieces.
  __device__ __forceinline__ void store_chunk(const ChunkWords& words, const Work& work, int first, int count) {
    const std::uint32_t buffer = staging() + static_cast<std::uint32_t>(chunks_staged % 2 * Shape::kChunkBytes);
    ++chunks_staged;
    if (thread() == 0) device::store_wait_read<1>();
    sync_group();
    // Lane i says where row i % 8 of matrix i / 8 goes.
    const int matrix = lane() / 8, in_matrix = lane() % 8;
#pragma unroll
    for (int j = 0; j < kChunkBlocks; j += 2) {
      const std::uint32_t four[4] = {words[j][0], words[j][1], words[j + 1][0], words[j + 1][1]};
      if constexpr (Shape::kTokenRows) {
        const int token = warp() * 16 + matrix % 2 * 8 + in_matrix, piece = j + matrix / 2;
        device::store_matrix_x4(buffer + static_cast<std::uint32_t>(token * 128 + ((piece ^ in_matrix) * 16)), four);
      } else {
        const int token = (j + matrix / 2) * 8 + in_matrix, piece = warp() * 2 + matrix % 2;
        device::store_matrix_x4_transposed(buffer + static_cast<std::uint32_t>(token * 128 + ((piece ^ in_matrix) * 16)), four);
      }
    }
    if (plan.copies_out && count >= kChunkBlocks) {
      device::fence_async_proxy();
      sync_group();
      if (thread() == 0) {
        const int row = work.row_tile * Shape::kRows + group * 64, column = work.column_tile * Shape::kColumns + 8 * first;
        device::store_box(&plan.out, buffer, Shape::kTokenRows ? column : row, Shape::kTokenRows ? row : column);
        device::store_commit();
      }
    } else {
      sync_group();
      copy_out(buffer, work, first, min(count, kChunkBlocks));
    }
  }

  /// The sums of a chunk, without zero points. A copy: only products may write sums, or they would wait for each other.
  __device__ __forceinline__ void take_sums(Sum (&from)[4 * kChunkBlocks], const Work& work, int chunk, int first) const {
#pragma unroll
    for (int i = 0; i < 4 * kChunkBlocks; ++i) from[i] = sum[4 * chunk * kChunkBlocks + i];
    if (has_zero_points()) {
#pragma unroll
      for (int j = 0; j < kChunkBlocks; ++j) subtract_zero_points(from + 4 * j, work, first + j);
    }
  }

  static constexpr int kChunks = Shape::kColumns / Shape::kChunkColumns;
  using AllWords = ChunkWords[kChunks];

  /// The tile's 16-bit results.
  __device__ __forceinline__ void convert(AllWords& words, const Work& work) {
    share_values();
    sync_group();
    const bool bf16 = plan.params.out_dtype == DType::kBFloat16;
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      const int at = chunk * kChunkBlocks;
      Sum from[4 * kChunkBlocks];
      take_sums(from, work, chunk, at);
      if (bf16) {
        convert_chunk<true>(words[chunk], from, at);
      } else {
        convert_chunk<false>(words[chunk], from, at);
      }
    }
    // Values of columns may change only now.
    sync_group();
  }
  __device__ __forceinline__ void store_words(const AllWords& words, const Work& work) {
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) store_chunk(words[chunk], work, chunk * kChunkBlocks, kChunkBlocks);
  }

  /// Stores results of sums, which are of `count` column blocks from `first` on.
  __device__ __forceinline__ void store(const Work& work, int first, int count) {
    share_values();
    sync_group();
    const DType dtype = plan.params.out_dtype;
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      const int left = count - chunk * kChunkBlocks, at = first + chunk * kChunkBlocks;
      if (left <= 0) break;
      Sum from[4 * kChunkBlocks];
      take_sums(from, work, chunk, at);
      ChunkWords words;
      if (dtype == DType::kBFloat16) {
        convert_chunk<true>(words, from, at);
        store_chunk(words, work, at, left);
      } else if (dtype == DType::kFloat16) {
        convert_chunk<false>(words, from, at);
        store_chunk(words, work, at, left);
      } else {
#pragma unroll
        for (int j = 0; j < kChunkBlocks; ++j) {
          if (j >= left) break;
          float values[2];
          load_column_values(values, at + j);
#pragma unroll
          for (int e = 0; e < 4; ++e) store_float32(finish(from[4 * j + e], e / 2, values[e % 2]), work, at + j, e);
        }
      }
    }
    // Values of columns may change only now.
    if (dtype == DType::kFloat32) sync_group();
  }

  /// Makes sums the totals over all splits, added in their order, of this CTA's share of the columns.
  __device__ __forceinline__ void exchange(const SplitColumns<Shape>& mine) {
    const int splits = plan.splits, own = rank / plan.shared_columns;
    const int split_rank = mine.first_rank + lane() * plan.shared_columns;
    // Sums take the stages' place: none may be in use any more.
    __syncwarp();
    if (lane() < splits) device::cluster_barrier_arrive(device::address_in_cta(shared.finished(), split_rank));
    device::barrier_wait(shared.finished(), 0);
    const auto place = [&](int split, int j) {
      return shared.base + static_cast<std::uint32_t>(((split * mine.each + j) * Shape::kConsumers * 128 + group * 128 + thread()) * 16);
    };
    int owner = 0, in_owner = 0;
#pragma unroll
    for (int j = 0; j < kColumnBlocks; ++j) {
      const std::uint32_t to = place(own, in_owner);
      if (owner == own) {
        store_shared_4(to, sum[4 * j], sum[4 * j + 1], sum[4 * j + 2], sum[4 * j + 3]);
      } else {
        const int owner_rank = mine.first_rank + owner * plan.shared_columns;
        device::cluster_store_16(device::address_in_cta(to, owner_rank), device::address_in_cta(shared.received(), owner_rank), sum[4 * j],
                                 sum[4 * j + 1], sum[4 * j + 2], sum[4 * j + 3]);
      }
      if (++in_owner == mine.each) in_owner = 0, ++owner;
    }
    if (mine.count <= 0) return;
    device::barrier_wait(shared.received(), 0);
    clear_sums();
#pragma unroll 1
    for (int split = 0; split < splits; ++split) {
#pragma unroll
      for (int j = 0; j < (kColumnBlocks + 1) / 2; ++j) {
        if (j >= mine.count) break;
        std::uint32_t words[4];
        load_shared_4(words, place(split, j));
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[4 * j + e] += from_word<Sum>(words[e]);
      }
    }
  }
};

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

}  // namespace quire::cuda::scaled
