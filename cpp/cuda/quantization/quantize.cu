// Quantizing to float8 and int8 on CUDA, undoing it, codes of weights, and sums of int8 rows.
// SPDX-License-Identifier: Apache-2.0
#include <cooperative_groups.h>

#include <algorithm>
#include <bit>
#include <type_traits>

#include "core/dispatch.h"
#include "core/explain.h"
#include "cuda/device/async_copy.cuh"
#include "cuda/device/dependent_launch.cuh"
#include "cuda/device/quantize.cuh"
#include "cuda/device/reduce.cuh"
#include "cuda/device_code.h"
#include "cuda/element.h"
#include "cuda/launch.h"
#include "ops/quantization.h"

namespace quire::cuda {
namespace {

// Elements that a thread quantizes at once: 16 bytes of the narrow side.
constexpr int kVec = 16;
constexpr int kMaxThreads = 512;
constexpr int kNarrowThreads = 128;
constexpr int kResidentThreads = 1024;  // of an SM, in quantize_rows_kernel
constexpr int kTensorThreads = 1024;
constexpr int kDenseThreads = 256;

// The results that there are. A kernel knows which it makes: code of the others would cost it registers.
enum class Result { kFloat8, kInt8, kAsymmetricInt8 };

// What a thread knows of the elements that share a scale. Neither side is below 0.
struct Range {
  float below = 0.0f, above = 0.0f;  // -min(0, x), max(0, x); where symmetric, above is the largest magnitude
};

template <bool kAsymmetric, int kCount>
__device__ __forceinline__ void extend(Range& range, const float (&v)[kCount]) {
  if constexpr (!kAsymmetric) {
    range.above = fmaxf(range.above, largest_of(v));
  } else {
    // fmaxf passes over NaN.
#pragma unroll
    for (int e = 0; e < kCount; ++e) {
      range.below = fmaxf(range.below, -v[e]);
      range.above = fmaxf(range.above, v[e]);
    }
  }
}

__device__ __forceinline__ __half2 largest_pairs(__half2 a, __half2 b) { return __hmax2(a, b); }
__device__ __forceinline__ __nv_bfloat162 largest_pairs(__nv_bfloat162 a, __nv_bfloat162 b) { return __hmax2(a, b); }
__device__ __forceinline__ __half2 smallest_pairs(__half2 a, __half2 b) { return __hmin2(a, b); }
__device__ __forceinline__ __nv_bfloat162 smallest_pairs(__nv_bfloat162 a, __nv_bfloat162 b) { return __hmin2(a, b); }
__device__ __forceinline__ float larger_of(__half2 a) { return fmaxf(__low2float(a), __high2float(a)); }
__device__ __forceinline__ float larger_of(__nv_bfloat162 a) { return fmaxf(__low2float(a), __high2float(a)); }
__device__ __forceinline__ float smaller_of(__half2 a) { return fminf(__low2float(a), __high2float(a)); }
__device__ __forceinline__ float smaller_of(__nv_bfloat162 a) { return fminf(__low2float(a), __high2float(a)); }

// The same of elements as they are in memory: of 16 bits two at a time.
template <bool kAsymmetric, typename T, int kCount>
__device__ __forceinline__ void extend(Range& range, const Packed<T, kCount>& packed) {
  if constexpr (sizeof(T) == 2 && kCount > 1) {
    using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
    const auto pair = [](std::uint32_t word) { return *reinterpret_cast<Pair*>(&word); };
    // Maximum and minimum pass over NaN.
    Pair below = pair(0), above = pair(0);
#pragma unroll
    for (const std::uint32_t word : packed.words) {
      above = largest_pairs(above, pair(kAsymmetric ? word : word & 0x7fff7fffu));
      if constexpr (kAsymmetric) below = smallest_pairs(below, pair(word));
    }
    range.above = fmaxf(range.above, larger_of(above));
    if constexpr (kAsymmetric) range.below = fmaxf(range.below, -smaller_of(below));
  } else {
    float v[kCount];
    unpack<T, kCount>(v, packed);
    extend<kAsymmetric>(range, v);
  }
}

__device__ __forceinline__ __half2 largest_pairs_or_nan(__half2 a, __half2 b) { return __hmax2_nan(a, b); }
__device__ __forceinline__ __nv_bfloat162 largest_pairs_or_nan(__nv_bfloat162 a, __nv_bfloat162 b) { return __hmax2_nan(a, b); }

// The same with both sides, of 16-bit elements. Returns whether none is NaN.
template <typename T, int kCount>
__device__ __forceinline__ bool extend_and_check(Range& range, const Packed<T, kCount>& packed) {
  using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
  const auto pair = [](std::uint32_t word) { return *reinterpret_cast<Pair*>(&word); };
  Pair below = pair(0), above = pair(0);
#pragma unroll
  for (const std::uint32_t word : packed.words) {
    above = largest_pairs_or_nan(above, pair(word));
    below = smallest_pairs(below, pair(word));
  }
  const float sum = __low2float(above) + __high2float(above);
  if (sum != sum) {
    extend<true, T, kCount>(range, packed);
    return false;
  }
  range.above = fmaxf(range.above, larger_of(above));
  range.below = fmaxf(range.below, -smaller_of(below));
  return true;
}

// Over groups of lanes, 2^shift, with `max` of two values. Eight lanes have 128 elements, the usual group.
template <typename V, typename Max>
__device__ __forceinline__ V group_max(V value, int shift, Max&& max) {
  if (shift == 3) {
#pragma unroll
    for (int lane_mask = 4; lane_mask > 0; lane_mask /= 2) value = max(value, __shfl_xor_sync(kFullMask, value, lane_mask));
  } else {
#pragma unroll 1
    for (int lane_mask = 1 << shift >> 1; lane_mask > 0; lane_mask >>= 1) value = max(value, __shfl_xor_sync(kFullMask, value, lane_mask));
  }
  return value;
}
__device__ __forceinline__ float group_max(float value, int shift) {
  return group_max(value, shift, [](float a, float b) { return fmaxf(a, b); });
}
// Both sides, of elements of T.
template <typename T>
__device__ __forceinline__ void group_range(Range& range, int shift) {
  if constexpr (sizeof(T) == 2) {
    using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
    Pair both;
    if constexpr (std::is_same_v<T, __half>) {
      both = __floats2half2_rn(range.below, range.above);
    } else {
      both = __floats2bfloat162_rn(range.below, range.above);
    }
    both = group_max(both, shift, [](Pair a, Pair b) { return largest_pairs(a, b); });
    range.below = __low2float(both), range.above = __high2float(both);
  } else {
    range.above = group_max(range.above, shift);
    range.below = group_max(range.below, shift);
  }
}

__device__ __forceinline__ int in_range(int zero_point) { return min(max(zero_point, -128), 127); }

struct ScaleAndZero {
  float scale;
  int zero_point;
};

template <Result kResult>
__device__ __forceinline__ ScaleAndZero computed(const QuantizeParams& p, const Range& range) {
  if constexpr (kResult != Result::kAsymmetricInt8) {
    return {computed_scale(fminf(range.above, p.scale_bound), kResult == Result::kInt8), 0};
  } else {
    const float span = range.above + range.below, reciprocal = 1.0f / 255.0f;
    // As in computed_scale.
    const float estimate = span * reciprocal;
    const float quotient = fmaf(fmaf(-estimate, 255.0f, span), reciprocal, estimate);
    const float scale = span <= 0x1.fffffep127f ? fmaxf(quotient, kSmallestScale) : span;
    float shift[1] = {-range.below};
    Divisor(scale).divide_bounded(shift);
    // Of an infinite range the shift is NaN.
    return {scale, in_range(-128 - (shift[0] == shift[0] ? __float2int_rn(shift[0]) : 512))};
  }
}

// NaN stays.
template <int kCount>
__device__ __forceinline__ void clamp_to(float (&v)[kCount], float limit) {
#pragma unroll
  for (int e = 0; e < kCount; ++e) {
    if (v[e] > limit) v[e] = limit;
    if (v[e] < -limit) v[e] = -limit;
  }
}

template <Result kResult>
__device__ __forceinline__ void write_scale(const QuantizeParams& p, std::int64_t row, std::int64_t group, const ScaleAndZero& value) {
  *p.quant.scale_at(row, group) = value.scale;
  if constexpr (kResult == Result::kAsymmetricInt8) *p.zero_point_at(row, group) = value.zero_point;
}

template <Result kResult>
__device__ __forceinline__ ScaleAndZero read_scale(const QuantizeParams& p, std::int64_t row, std::int64_t group) {
  ScaleAndZero value{*p.quant.scale_at(row, group), 0};
  if constexpr (kResult == Result::kAsymmetricInt8) value.zero_point = in_range(*p.zero_point_at(row, group));
  return value;
}

// Four integers as int8, the first in the low byte.
__device__ __forceinline__ std::uint32_t pack_saturated(int a, int b, int c, int d) {
  std::uint32_t word;
  asm("{\n.reg .b32 high;\n"
      "cvt.pack.sat.s8.s32.b32 high, %4, %3, 0;\n"
      "cvt.pack.sat.s8.s32.b32 %0, %2, %1, high;\n}\n"
      : "=r"(word)
      : "r"(a), "r"(b), "r"(c), "r"(d));
  return word;
}

// A scale, and what divides by it.
struct Quantizer {
  ScaleAndZero value;
  Divisor divisor;
  __device__ __forceinline__ explicit Quantizer(const ScaleAndZero& from) : value(from), divisor(from.scale) {}
};

// The largest magnitude; NaN where there is one.
template <int kCount>
__device__ __forceinline__ float largest_or_nan(const float (&v)[kCount]) {
  float largest = 0.0f;
#pragma unroll
  for (const float x : v) asm("max.NaN.f32 %0, %0, %1;" : "+f"(largest) : "f"(fabsf(x)));
  return largest;
}

// Quotients rounded, plus the zero point. ordinary: they are numbers up to 2^21.
template <int kCount>
__device__ __forceinline__ void store_rounded(void* out, float (&v)[kCount], int zero_point, bool ordinary) {
  if (!ordinary) {
#pragma unroll
    for (float& x : v) x = x == x ? fminf(fmaxf(x, -512.0f), 512.0f) : 0.0f;
  }
  // A number that has no bits below 1: the addition rounds, and leaves an integer in the low bits.
  constexpr float kRounds = 0x1.8p23f;
  int integers[kCount];
#pragma unroll
  for (int e = 0; e < kCount; ++e) integers[e] = __float_as_int(v[e] + kRounds) + (zero_point - __float_as_int(kRounds));
  Packed<std::int8_t, kCount> result;
  if constexpr (kCount == 1) {
    result.byte = static_cast<std::uint8_t>(pack_saturated(integers[0], 0, 0, 0));
  } else {
#pragma unroll
    for (int i = 0; i < kCount / 4; ++i)
      result.words[i] = pack_saturated(integers[4 * i], integers[4 * i + 1], integers[4 * i + 2], integers[4 * i + 3]);
  }
  store_raw(out, result);
}

// v over the scale, rounded, plus the zero point. kComputed: the scale is that of the elements' own range.
template <bool kComputed, int kCount>
__device__ __forceinline__ void store_asymmetric(void* out, float (&v)[kCount], const Quantizer& by) {
  bool ordinary;
  if constexpr (kComputed) {
    by.divisor.divide_bounded(v);
    float sum = 0.0f;
#pragma unroll
    for (const float x : v) sum += x;
    ordinary = sum == sum;
  } else {
    // A quotient up to 2^20 is an integer once it is rounded below; so is its sum with a zero point.
    const float scale = by.value.scale;
    ordinary = largest_or_nan(v) <= fminf(scale * 0x1p20f, 0x1.fffffep127f) && scale >= kSmallestScale;
    if (ordinary) {
      by.divisor.divide_bounded(v);
    } else {
      by.divisor.divide(v);
    }
  }
  store_rounded(out, v, by.value.zero_point, ordinary);
}

// The result's elements from `out` on. kComputed: the scale is one of the elements' own.
template <Result kResult, bool kComputed, int kCount>
__device__ __forceinline__ void store(const QuantizeParams& p, void* out, float (&v)[kCount], const Quantizer& by) {
  using Q = std::conditional_t<kResult == Result::kFloat8, __nv_fp8_e4m3, std::int8_t>;
  if constexpr (kResult == Result::kAsymmetricInt8) {
    store_asymmetric<kComputed>(out, v, by);
  } else if constexpr (kComputed) {
    if (p.scale_bound <= 0x1.fffffep127f) clamp_to(v, by.value.scale * 512.0f);
    store_raw(out, by.divisor.template divide_bounded_and_pack<Q>(v));
  } else if constexpr (kResult == Result::kInt8) {
    by.divisor.divide(v);
    store_raw(out, pack<Q, kCount>(v));
  } else {
    store_raw(out, by.divisor.template divide_and_pack<Q>(v));
  }
}

enum class Scaling { kGiven, kGivenGroup, kToken, kGroup };  // given: one scale for a row at least, or groups; or computed

// Threads of a CTA: those that fit in with 64 registers each.
template <int kVectors>
inline constexpr int kRowThreads = kVectors == 1 ? kMaxThreads : 2 * kMaxThreads;

// Whether threads read ahead: two pieces of 16-bit elements take at most 32 registers; of float32 they would take too many.
template <typename T>
inline constexpr bool kReadsAhead = sizeof(T) == 2;

// Where rows begin that have more than one stride. A call, which keeps divisions out of the kernels' way.
__device__ __noinline__ std::int64_t strided_offset(const RowLayout& rows, int row) { return rows.offset(row); }
__device__ __forceinline__ std::int64_t offset_of(const RowLayout& rows, int row) {
  if (rows.inner_extents[0] == 1 && rows.inner_extents[1] == 1) return rows.strides[0] * row;
  return strided_offset(rows, row);
}

// Symmetric results. Grid: CTAs share the rows, blockDim.y at a time, in turns. Each thread has kVectors vectors of a piece of its row, blockDim.x
// apart, and, where it reads ahead, those of the next piece are on their way while it works on them. With a scale per token a piece is a whole
// row, in the registers of its blockDim.x threads: one read, one write. blockDim.x is a power of two up to 32, or whole warps, then blockDim.y =
// 1 with a scale per token. With a scale per group, a group's vectors lie in as many neighbouring lanes, a power of two up to 32 that divides
// blockDim.x. group_shift: the logarithm of a group's vectors; -1: a row has one scale. from_end: the last rows come first.
template <typename T, int kVectors, Scaling kScaling, Result kResult>
__global__ void __launch_bounds__(kRowThreads<kVectors>, 1024 / kRowThreads<kVectors>)
    quantize_rows_kernel(const __grid_constant__ QuantizeParams p, const int group_shift, const bool from_end) {
  static_assert(kResult != Result::kAsymmetricInt8);
  constexpr bool kComputes = kScaling == Scaling::kToken || kScaling == Scaling::kGroup;
  if (!from_end) device::wait_for_predecessor();  // else later: x is older than the range that was taken from it
  __shared__ float scratch[2][kWarpSize];
  const int lane = static_cast<int>(threadIdx.x), width = static_cast<int>(blockDim.x);
  const int num_vectors = static_cast<int>(p.width) / kVec, num_rows = static_cast<int>(p.num_rows);
  const int height = static_cast<int>(blockDim.y), step = static_cast<int>(gridDim.x) * height;
  int turn = 0;
  const auto row_max = [&](float value) {
    turn ^= 1;
    return width <= kWarpSize ? warp_max(value, width) : cta_max(value, scratch[turn]);
  };

  // A piece of a row that this thread reads, then works on. Of rows past the last there is nothing.
  struct Piece {
    Packed<T, kVec> packed[kVectors];
    float given[kComputes ? 1 : kVectors];
    int first_row, first_vector;  // the CTA's
  };
  const auto row_of = [&](const Piece& piece) {
    const int row = piece.first_row + static_cast<int>(threadIdx.y);
    return from_end ? num_rows - 1 - row : row;
  };
  const auto limit_of = [&](const Piece& piece) { return piece.first_row + static_cast<int>(threadIdx.y) < num_rows ? num_vectors : 0; };
  const auto load = [&](Piece& piece) {
    const int row = row_of(piece), limit = limit_of(piece);
    const T* x = nullptr;
    if (limit > 0) x = static_cast<const T*>(p.x) + offset_of(p.x_rows, row);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int vector = piece.first_vector + lane + i * width;
      piece.packed[i] = {};
      if (vector < limit) piece.packed[i] = load_packed<T, kVec>(x + vector * kVec);
    }
  };
  const auto load_scale = [&](Piece& piece) {
    if constexpr (!kComputes) {
      const int row = row_of(piece), limit = limit_of(piece);
      const float* scales = nullptr;
      if (limit > 0) scales = p.quant.scales + offset_of(p.quant.scale_rows, row);
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        piece.given[i] = 1.0f;
        const int vector = piece.first_vector + lane + i * width, group = group_shift < 0 ? 0 : vector >> group_shift;
        if (vector < limit) piece.given[i] = scales[group * p.quant.group_stride];
      }
    }
  };
  const auto advance = [&](const Piece& piece, Piece& next) {
    next.first_row = piece.first_row;
    next.first_vector = piece.first_vector + kVectors * width;
    if (kScaling == Scaling::kToken || next.first_vector >= num_vectors) next.first_row += step, next.first_vector = 0;
    return next.first_row < num_rows;
  };
  const auto write_scale = [&](int row, int group, const ScaleAndZero& value) {
    p.quant.scales[offset_of(p.quant.scale_rows, row) + group * p.quant.group_stride] = value.scale;
  };
  const auto finish = [&](Piece& piece) {
    const int row = row_of(piece), limit = limit_of(piece);
    ScaleAndZero value{piece.given[0], 0};
    if constexpr (kScaling == Scaling::kToken) {
      Range range;
#pragma unroll
      for (int i = 0; i < kVectors; ++i) extend<false, T, kVec>(range, piece.packed[i]);
      range.above = row_max(range.above);
      value = computed<kResult>(p, range);
      if (lane == 0 && limit > 0) write_scale(row, 0, value);
    }
    auto* out = static_cast<std::uint8_t*>(p.out);
    if (limit > 0) out += offset_of(p.out_rows, row);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int vector = piece.first_vector + lane + i * width;
      if constexpr (!kComputes) value.scale = piece.given[i];
      if constexpr (kScaling == Scaling::kGroup) {
        Range range;
        extend<false, T, kVec>(range, piece.packed[i]);
        const int group_vectors = 1 << group_shift;
        range.above = group_max(range.above, group_shift);
        value = computed<kResult>(p, range);
        if (vector < limit && (lane & (group_vectors - 1)) == 0) write_scale(row, vector >> group_shift, value);
      }
      if (vector >= limit) continue;
      float v[kVec];
      unpack<T, kVec>(v, piece.packed[i]);
      store<kResult, kComputes>(p, out + vector * kVec, v, Quantizer(value));
    }
  };

  // All threads of a CTA go through its pieces together: they take part in the maxima.
  Piece piece;
  piece.first_row = static_cast<int>(blockIdx.x) * height, piece.first_vector = 0;
  bool more = piece.first_row < num_rows;
  if (more) load(piece);
  // The computed scale of a tensor.
  if constexpr (!kComputes) device::wait_for_predecessor();
  if (more) load_scale(piece);
  while (more) {
    if constexpr (kReadsAhead<T>) {
      Piece next;
      more = advance(piece, next);
      if (more) load(next), load_scale(next);
      finish(piece);
      piece = next;
    } else {
      finish(piece);
      more = advance(piece, piece);
      if (more) load(piece), load_scale(piece);
    }
  }
}

// What a piece of a row takes of shared memory in the kernel below: its elements, and its scales and zero points where they are given.
template <int kVectors, Scaling kScaling>
inline constexpr int kGivenScales = kScaling == Scaling::kGiven        ? 1
                                    : kScaling == Scaling::kGivenGroup ? kVectors
                                                                       : 0;
template <typename T, int kVectors, Scaling kScaling>
constexpr int piece_bytes(int threads) {
  return threads *
         (kVectors * kVec * static_cast<int>(sizeof(T)) + kGivenScales<kVectors, kScaling> * static_cast<int>(sizeof(ScaleAndZero)));
}

// Results with zero points. Grid and group_shift, which is not negative, as above. Where a thread reads ahead, the next pieces are on their way to
// its own part of shared memory while it works on one: num_ahead, 1 or 2.
template <typename T, int kVectors, Scaling kScaling>
__global__ void __launch_bounds__(kRowThreads<kVectors>, 1024 / kRowThreads<kVectors>)
    zero_point_quantize_rows_kernel(const __grid_constant__ QuantizeParams p, const int group_shift, const int num_ahead,
                                    const bool from_end) {
  constexpr Result kResult = Result::kAsymmetricInt8;
  constexpr bool kComputes = kScaling == Scaling::kToken || kScaling == Scaling::kGroup;
  if (!from_end) device::wait_for_predecessor();  // else later: x is older than the range that was taken from it
  constexpr int kScales = kGivenScales<kVectors, kScaling>;
  constexpr int kWords = kVec * static_cast<int>(sizeof(T)) / 16;
  extern __shared__ __align__(16) uint4 ring[];
  __shared__ float2 scratch[2][kWarpSize];
  const int lane = static_cast<int>(threadIdx.x), width = static_cast<int>(blockDim.x), threads = width * static_cast<int>(blockDim.y);
  const int thread = static_cast<int>(threadIdx.y) * width + lane;
  const int num_vectors = static_cast<int>(p.width) / kVec, num_rows = static_cast<int>(p.num_rows);
  const int height = static_cast<int>(blockDim.y), step = static_cast<int>(gridDim.x) * height;
  int turn = 0;
  const auto row_range = [&](Range& range) {
    if (width <= kWarpSize) {
      range.above = warp_max(range.above, width);
      range.below = warp_max(range.below, width);
      return;
    }
    const int in_warp = lane % kWarpSize;
    float2 both = make_float2(warp_max_of_bits(range.above), warp_max_of_bits(range.below));
    turn ^= 1;
    if (in_warp == 0) scratch[turn][lane / kWarpSize] = both;
    __syncthreads();
    both = in_warp < width / kWarpSize ? scratch[turn][in_warp] : float2{0.0f, 0.0f};
    range.above = warp_max_of_bits(both.x);
    range.below = warp_max_of_bits(both.y);
  };

  // Where the CTA is. Of rows past the last there is nothing.
  struct Place {
    int first_row, first_vector;
  };
  const auto row_at = [&](const Place& at) {
    const int row = at.first_row + static_cast<int>(threadIdx.y);
    return from_end ? num_rows - 1 - row : row;
  };
  const auto limit_at = [&](const Place& at) { return at.first_row + static_cast<int>(threadIdx.y) < num_rows ? num_vectors : 0; };
  const auto advance = [&](Place& at) {
    at.first_vector += kVectors * width;
    if (kScaling == Scaling::kToken || at.first_vector >= num_vectors) at.first_row += step, at.first_vector = 0;
  };
  // Calls f(i, vector) for the thread's vectors there.
  const auto each_vector = [&](const Place& at, int limit, auto&& f) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int vector = at.first_vector + lane + i * width;
      if (vector < limit) f(i, vector);
    }
  };

  struct Piece {
    Packed<T, kVec> packed[kVectors];
    ScaleAndZero given[kScales == 0 ? 1 : kScales];
  };
  const auto read = [&](const Place& at, Piece& piece) {
#pragma unroll
    for (auto& packed : piece.packed) packed = {};
    const int limit = limit_at(at);
    if (limit == 0) return;
    const T* const x = static_cast<const T*>(p.x) + offset_of(p.x_rows, row_at(at));
    each_vector(at, limit, [&](int i, int vector) { piece.packed[i] = load_packed<T, kVec>(x + vector * kVec); });
  };
  // f(i, scale, zero point) for the given scales there.
  const auto each_given = [&](const Place& at, auto&& f) {
    const int limit = limit_at(at), row = row_at(at);
    if (kScales == 0 || limit == 0) return;
    const float* const scales = p.quant.scales + offset_of(p.quant.scale_rows, row);
    const std::int32_t* const zero_points = p.zero_points + offset_of(p.zero_point_rows, row);
    each_vector(at, limit, [&](int i, int vector) {
      if (i >= kScales) return;
      const int group = kScaling == Scaling::kGivenGroup ? vector >> group_shift : 0;
      f(i, scales + group * p.quant.group_stride, zero_points + group * p.zero_point_group_stride);
    });
  };
  const auto read_given = [&](const Place& at, Piece& piece) {
    each_given(at, [&](int i, const float* scale, const std::int32_t* zero_point) { piece.given[i] = {*scale, in_range(*zero_point)}; });
  };

  // This thread's part of shared memory: words of the elements, and scales with zero points.
  const auto word_bytes = static_cast<std::uint32_t>(threads) * 16, given_bytes = static_cast<std::uint32_t>(threads) * 8;
  const std::uint32_t own_words = device::shared_address(ring + thread);
  const std::uint32_t own_given =
      device::shared_address(ring + num_ahead * kVectors * kWords * threads) + static_cast<std::uint32_t>(thread) * 8;
  const auto words_at = [&](int stage) { return own_words + static_cast<std::uint32_t>(stage * kVectors * kWords) * word_bytes; };
  const auto given_at = [&](int stage, int i) { return own_given + static_cast<std::uint32_t>(stage * kScales + i) * given_bytes; };
  const auto copy = [&](const Place& at, int stage) {
    const int limit = limit_at(at);
    if (limit == 0) return;
    const T* const x = static_cast<const T*>(p.x) + offset_of(p.x_rows, row_at(at));
    const std::uint32_t to = words_at(stage);
    each_vector(at, limit, [&](int i, int vector) {
#pragma unroll
      for (int word = 0; word < kWords; ++word)
        device::copy_async_cached_16(to + static_cast<std::uint32_t>(i * kWords + word) * word_bytes,
                                     x + vector * kVec + word * kElementsPer16Bytes<T>);
    });
  };
  const auto copy_given = [&](const Place& at, int stage) {
    each_given(at, [&](int i, const float* scale, const std::int32_t* zero_point) {
      const std::uint32_t to = given_at(stage, i);
      device::copy_async_4(to, scale, 4);
      device::copy_async_4(to + 4, zero_point, 4);
    });
  };
  const auto take = [&](const Place& at, int stage, Piece& piece) {
    const int limit = limit_at(at);
    const std::uint32_t from = words_at(stage);
#pragma unroll
    for (auto& packed : piece.packed) packed = {};
    each_vector(at, limit, [&](int i, int) {
#pragma unroll
      for (int word = 0; word < kWords; ++word) {
        const uint4 part = device::load_shared_16(from + static_cast<std::uint32_t>(i * kWords + word) * word_bytes);
        piece.packed[i].words[4 * word] = part.x, piece.packed[i].words[4 * word + 1] = part.y;
        piece.packed[i].words[4 * word + 2] = part.z, piece.packed[i].words[4 * word + 3] = part.w;
      }
      if (i >= kScales) return;
      piece.given[i].scale = __int_as_float(device::load_shared(given_at(stage, i)));
      piece.given[i].zero_point = in_range(device::load_shared(given_at(stage, i) + 4));
    });
  };

  Quantizer by(ScaleAndZero{1.0f, 0});
  const auto write_scale = [&](int row, int group) {
    p.quant.scales[offset_of(p.quant.scale_rows, row) + group * p.quant.group_stride] = by.value.scale;
    p.zero_points[offset_of(p.zero_point_rows, row) + group * p.zero_point_group_stride] = by.value.zero_point;
  };
  const auto finish = [&](const Place& at, const Piece& piece) {
    const int row = row_at(at), limit = limit_at(at);
    // Of 16 bits, whether none is NaN is known before they are divided.
    constexpr bool kChecks = kComputes && sizeof(T) == 2;
    bool ordinary = true;
    const auto extend_by = [&](Range& range, const Packed<T, kVec>& packed) {
      if constexpr (kChecks) {
        if (!extend_and_check<T, kVec>(range, packed)) ordinary = false;
      } else {
        extend<true, T, kVec>(range, packed);
      }
    };
    if constexpr (kScaling == Scaling::kToken) {
      Range range;
#pragma unroll
      for (const auto& packed : piece.packed) extend_by(range, packed);
      row_range(range);
      by = Quantizer(computed<kResult>(p, range));
      if (lane == 0 && limit > 0) write_scale(row, 0);
    }
    auto* out = static_cast<std::uint8_t*>(p.out);
    if (limit > 0) out += offset_of(p.out_rows, row);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int vector = at.first_vector + lane + i * width;
      if constexpr (kScaling == Scaling::kGroup) {
        Range range;
        ordinary = true;
        extend_by(range, piece.packed[i]);
        const int group_vectors = 1 << group_shift;
        group_range<T>(range, group_shift);
        by = Quantizer(computed<kResult>(p, range));
        if (vector < limit && (lane & (group_vectors - 1)) == 0) write_scale(row, vector >> group_shift);
      }
      if (vector >= limit) continue;
      if constexpr (kScales > 0) {
        const ScaleAndZero& value = piece.given[kScales == 1 ? 0 : i];
        // Often it is the scale before; to know that costs registers.
        if (!kReadsAhead<T> || value.scale != by.value.scale) by = Quantizer(value);
        by.value.zero_point = value.zero_point;
      }
      float v[kVec];
      unpack<T, kVec>(v, piece.packed[i]);
      if constexpr (kChecks) {
        by.divisor.divide_bounded(v);
        store_rounded(out + vector * kVec, v, by.value.zero_point, ordinary && by.value.scale <= 0x1.fffffep127f);
      } else {
        store<kResult, kComputes>(p, out + vector * kVec, v, by);
      }
    }
  };

  // All threads of a CTA go through its pieces together: they take part in the maxima.
  Place at{static_cast<int>(blockIdx.x) * height, 0}, next = at;
  Piece piece;
  if constexpr (kReadsAhead<T>) {
    for (int stage = 0; stage < num_ahead; ++stage, advance(next)) copy(next, stage);
  } else {
    read(at, piece);
  }
  // The computed scale of a tensor.
  if constexpr (!kComputes) device::wait_for_predecessor();
  if constexpr (kReadsAhead<T>) {
    next = at;
    for (int stage = 0; stage < num_ahead; ++stage, advance(next)) {
      copy_given(next, stage);
      device::copy_async_commit();
    }
  } else {
    read_given(at, piece);
  }
  for (int stage = 0; at.first_row < num_rows; advance(at)) {
    if constexpr (kReadsAhead<T>) {
      if (num_ahead == 2) {
        device::copy_async_wait<1>();
      } else {
        device::copy_async_wait<0>();
      }
      take(at, stage, piece);
      copy(next, stage);
      copy_given(next, stage);
      device::copy_async_commit();
      advance(next);
      stage = stage + 1 < num_ahead ? stage + 1 : 0;
      finish(at, piece);
    } else {
      finish(at, piece);
      advance(next);
      read(next, piece);
      read_given(next, piece);
    }
  }
}

// x, its result, scales and zero points are dense, and groups end with rows: rows do not matter. Grid: CTAs share x in turns, 2 vectors to a thread, 256
// apart. Groups as above.
template <typename T, Scaling kScaling, Result kResult>
__global__ void __launch_bounds__(kDenseThreads, kResidentThreads / kDenseThreads)
    quantize_dense_kernel(const __grid_constant__ QuantizeParams p, const int num_vectors, const int group_shift) {
  static_assert(kScaling == Scaling::kGroup || kScaling == Scaling::kGivenGroup);
  constexpr bool kComputes = kScaling == Scaling::kGroup, kAsymmetric = kResult == Result::kAsymmetricInt8;
  constexpr bool kChecks = kComputes && kAsymmetric && sizeof(T) == 2;
  constexpr int kVectors = 2;
  const int thread = static_cast<int>(threadIdx.x), step = static_cast<int>(gridDim.x) * kVectors * kDenseThreads;
  const auto* const x = static_cast<const T*>(p.x);
  auto* const out = static_cast<std::uint8_t*>(p.out);
  float* const scales = p.quant.scales;

  struct Piece {
    Packed<T, kVec> packed[kVectors];
    ScaleAndZero given[kComputes ? 1 : kVectors];
  };
  const auto load = [&](Piece& piece, int first) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int vector = first + i * kDenseThreads;
      piece.packed[i] = {};
      if (vector < num_vectors) piece.packed[i] = load_packed<T, kVec>(x + std::int64_t{vector} * kVec);
      if constexpr (!kComputes) {
        piece.given[i] = {1.0f, 0};
        if (vector < num_vectors) {
          piece.given[i].scale = scales[vector >> group_shift];
          if constexpr (kAsymmetric) piece.given[i].zero_point = in_range(p.zero_points[vector >> group_shift]);
        }
      }
    }
  };
  const auto finish = [&](const Piece& piece, int first) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int vector = first + i * kDenseThreads;
      ScaleAndZero value = piece.given[kComputes ? 0 : i];
      bool ordinary = true;
      if constexpr (kComputes) {
        Range range;
        if constexpr (kChecks) {
          ordinary = extend_and_check<T, kVec>(range, piece.packed[i]);
        } else {
          extend<kAsymmetric, T, kVec>(range, piece.packed[i]);
        }
        if constexpr (kAsymmetric) {
          group_range<T>(range, group_shift);
        } else {
          range.above = group_max(range.above, group_shift);
        }
        value = computed<kResult>(p, range);
        if (vector < num_vectors && (vector & ((1 << group_shift) - 1)) == 0) {
          scales[vector >> group_shift] = value.scale;
          if constexpr (kAsymmetric) p.zero_points[vector >> group_shift] = value.zero_point;
        }
      }
      if (vector >= num_vectors) continue;
      const Quantizer by(value);
      auto* const to = out + std::int64_t{vector} * kVec;
      float v[kVec];
      unpack<T, kVec>(v, piece.packed[i]);
      if constexpr (kChecks) {
        by.divisor.divide_bounded(v);
        store_rounded(to, v, value.zero_point, ordinary && value.scale <= 0x1.fffffep127f);
      } else {
        store<kResult, kComputes>(p, to, v, by);
      }
    }
  };

  // All lanes of a warp go through the pieces together: they take part in the maxima.
  device::wait_for_predecessor();
  const int first_of_cta = static_cast<int>(blockIdx.x) * kVectors * kDenseThreads;
  Piece piece;
  load(piece, first_of_cta + thread);
  for (int first = first_of_cta; first < num_vectors; first += step) {
    if constexpr (kReadsAhead<T>) {
      Piece next;
      load(next, min(first + step, num_vectors) + thread);
      finish(piece, first + thread);
      piece = next;
    } else {
      finish(piece, first + thread);
      load(piece, min(first + step, num_vectors) + thread);
    }
  }
}

// Grid: a warp for each group of elements with one scale, in turns. For every layout, width and group.
template <typename T, Result kResult>
__global__ void quantize_groups_kernel(const __grid_constant__ QuantizeParams p) {
  device::wait_for_predecessor();
  constexpr bool kAsymmetric = kResult == Result::kAsymmetricInt8;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const std::int64_t warps = static_cast<std::int64_t>(gridDim.x) * (blockDim.x / kWarpSize);
  const std::int64_t groups = ceil_div(p.width, p.quant.group_size);
  for (std::int64_t item = static_cast<std::int64_t>(blockIdx.x) * (blockDim.x / kWarpSize) + threadIdx.x / kWarpSize;
       item < p.num_rows * groups; item += warps) {
    const std::int64_t row = divide(item, groups), group = item - row * groups;
    const std::int64_t begin = group * p.quant.group_size, end = min(begin + p.quant.group_size, p.width);
    const T* const x = static_cast<const T*>(p.x) + p.x_rows.offset(row);
    ScaleAndZero value;
    if (p.computes) {
      Range range;
      for (std::int64_t i = begin + lane; i < end; i += kWarpSize) {
        const float v[1] = {to_float<T>(x[i])};
        extend<kAsymmetric>(range, v);
      }
      range.above = warp_max(range.above);
      if constexpr (kAsymmetric) range.below = warp_max(range.below);
      value = computed<kResult>(p, range);
      if (lane == 0) write_scale<kResult>(p, row, group, value);
    } else {
      value = read_scale<kResult>(p, row, group);
    }
    const Quantizer by(value);
    const std::int64_t out_at = p.out_rows.offset(row);
    for (std::int64_t i = begin + lane; i < end; i += kWarpSize) {
      float v[1] = {to_float<T>(x[i])};
      store<kResult, false>(p, static_cast<std::uint8_t*>(p.out) + out_at + i, v, by);
    }
  }
}

// Grid: CTAs of 512 threads share the rows of x, kCount elements to a thread at a time. The range goes to scales[0] and zero_points[0], as bits
// of floats that are not negative and so order as integers do; both are 0 before.
template <typename T, int kCount, bool kAsymmetric>
__global__ void __launch_bounds__(kMaxThreads) tensor_range_kernel(const __grid_constant__ QuantizeParams p) {
  __shared__ float scratch[2][kWarpSize];
  const std::int64_t row_vectors = p.width / kCount, total = p.num_rows * row_vectors;
  const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
  Range range;
  constexpr int kInFlight = 4;
  for (std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; first < total; first += kInFlight * stride) {
    Packed<T, kCount> packed[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      packed[i] = {};
      const std::int64_t item = first + i * stride;
      if (item >= total) continue;
      const std::int64_t row = p.num_rows == 1 ? 0 : divide(item, row_vectors);
      packed[i] = load_packed<T, kCount>(static_cast<const T*>(p.x) + p.x_rows.offset(row) + (item - row * row_vectors) * kCount);
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) extend<kAsymmetric, T, kCount>(range, packed[i]);
  }
  range.above = cta_max(range.above, scratch[0]);
  if constexpr (kAsymmetric) range.below = cta_max(range.below, scratch[1]);
  // What it adds to is cleared by then; x was there before that began.
  device::wait_for_predecessor();
  if (threadIdx.x != 0) return;
  atomicMax(reinterpret_cast<unsigned*>(p.quant.scales), __float_as_uint(range.above));
  if constexpr (kAsymmetric) atomicMax(reinterpret_cast<unsigned*>(p.zero_points), __float_as_uint(range.below));
}

// Grid: one thread.
template <bool kAsymmetric>
__global__ void clear_tensor_range_kernel(const __grid_constant__ QuantizeParams p) {
  device::wait_for_predecessor();
  p.quant.scales[0] = 0.0f;
  if constexpr (kAsymmetric) p.zero_points[0] = 0;
}

// Grid: one thread. The range that tensor_range_kernel left becomes scale and zero point.
template <Result kResult>
__global__ void tensor_scale_kernel(const __grid_constant__ QuantizeParams p) {
  device::launch_dependents();
  device::wait_for_predecessor();
  Range range;
  range.above = p.quant.scales[0];
  if constexpr (kResult == Result::kAsymmetricInt8) range.below = __int_as_float(p.zero_points[0]);
  write_scale<kResult>(p, 0, 0, computed<kResult>(p, range));
}

constexpr int kRegisterWords = 4;  // of a thread
constexpr int kTensorSlots = 5;    // words of a thread that are on their way at the second reading

// Grid: CTAs that all run at once divide x, which is dense, as num_words words of 16 bytes. While all find the tensor's range a CTA holds the first
// `most_held` words of its part in shared memory and the next ones in registers; the rest it reads again, the last words first: the L2 cache still has
// those. The CTAs' ranges lie at the beginning of the result, which is written last.
template <typename T, Result kResult>
__global__ void __launch_bounds__(kTensorThreads, 1)
    quantize_tensor_kernel(const __grid_constant__ QuantizeParams p, const std::int64_t num_words, const int most_held) {
  constexpr bool kAsymmetric = kResult == Result::kAsymmetricInt8;
  constexpr int kCount = kElementsPer16Bytes<T>, kInFlight = 4, kBatches = 3;
  extern __shared__ __align__(16) uint4 held[];
  __shared__ float scratch[4][kWarpSize];
  using Word = Packed<T, kCount>;
  const auto grid = cooperative_groups::this_grid();
  const int thread = static_cast<int>(threadIdx.x), cta = static_cast<int>(blockIdx.x), num_ctas = static_cast<int>(gridDim.x);
  const std::int64_t share = ceil_div(num_words, num_ctas), first_word = share * cta;
  const int count = static_cast<int>(max(min(num_words - first_word, share), std::int64_t{0}));
  const int num_held = min(count, most_held), first_rest = min(count, num_held + kRegisterWords * kTensorThreads);
  const uint4* const x = static_cast<const uint4*>(p.x) + first_word;
  auto* const out = static_cast<std::uint8_t*>(p.out) + first_word * kCount;
  const auto as_word = [](uint4 v) { return Word{{v.x, v.y, v.z, v.w}}; };
  const auto held_word = [&](int i) { return as_word(held[i]); };

  // Copies begin in batches, so that the first are looked at while others come. A thread reads what it has copied itself.
  const int batch = (most_held / kBatches + kTensorThreads - 1) / kTensorThreads * kTensorThreads;
  const auto each_of_batch = [&](int b, auto&& f) {
    const int end = b == kBatches - 1 ? num_held : min(num_held, (b + 1) * batch);
    for (int i = b * batch + thread; i < end; i += kTensorThreads) f(i);
  };
#pragma unroll
  for (int b = 0; b < kBatches; ++b) {
    each_of_batch(b, [&](int i) { device::copy_async_16(device::shared_address(held + i), x + i, 16); });
    device::copy_async_commit();
  }
  Range range;
  for (int first = first_rest + thread; first < count; first += kInFlight * kTensorThreads) {
    Word words[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      words[i] = {};
      const int word = first + i * kTensorThreads;
      if (word < count) words[i] = as_word(x[word]);
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) extend<kAsymmetric, T, kCount>(range, words[i]);
  }
  Word kept[kRegisterWords];
#pragma unroll
  for (int i = 0; i < kRegisterWords; ++i) {
    const int word = num_held + thread + i * kTensorThreads;
    kept[i] = {};
    if (word < first_rest) kept[i] = as_word(x[word]);
  }
  const auto extend_by_batch = [&](int b) { each_of_batch(b, [&](int i) { extend<kAsymmetric, T, kCount>(range, held_word(i)); }); };
  static_assert(kBatches == 3);
  device::copy_async_wait<2>();
  extend_by_batch(0);
  device::copy_async_wait<1>();
  extend_by_batch(1);
  device::copy_async_wait<0>();
  extend_by_batch(2);
#pragma unroll
  for (int i = 0; i < kRegisterWords; ++i) extend<kAsymmetric, T, kCount>(range, kept[i]);
  range.above = cta_max(range.above, scratch[0]);
  if constexpr (kAsymmetric) range.below = cta_max(range.below, scratch[1]);
  auto* const ranges = static_cast<float2*>(p.out);
  if (thread == 0) ranges[cta] = make_float2(range.above, range.below);
  grid.sync();
  const float2 other = thread < num_ctas ? __ldcg(ranges + thread) : float2{0.0f, 0.0f};
  range.above = cta_max(other.x, scratch[2]);
  if constexpr (kAsymmetric) range.below = cta_max(other.y, scratch[3]);
  const ScaleAndZero value = computed<kResult>(p, range);
  if (cta == 0 && thread == 0) write_scale<kResult>(p, 0, 0, value);
  const Quantizer by(value);
  // Words whose results lie where the ranges are.
  const int num_late = cta == 0 ? static_cast<int>(sizeof(float2)) * num_ctas / kCount : 0;
  auto read_all = grid.barrier_arrive();

  const auto finish = [&](int word, const Word& packed) {
    float v[kCount];
    unpack<T, kCount>(v, packed);
    store<kResult, true>(p, out + static_cast<std::int64_t>(word) * kCount, v, by);
  };
#pragma unroll
  for (int i = 0; i < kRegisterWords; ++i) {
    const int word = num_held + thread + i * kTensorThreads;
    if (word < first_rest) finish(word, kept[i]);
  }
  int num_left = num_held;
  if (first_rest < count) {
    // The rest comes back from the end, to places of shared memory that are done with: a thread's own, the last ones.
    const auto slot = [&](int i) { return num_held - 1 - thread - i * kTensorThreads; };
    int next = count - 1 - thread;
    const auto refill = [&](int i) {
      if (next >= first_rest) device::copy_async_16(device::shared_address(held + slot(i)), x + next, 16);
      device::copy_async_commit();
      next -= kTensorThreads;
    };
#pragma unroll
    for (int i = 0; i < kTensorSlots; ++i) {
      finish(slot(i), held_word(slot(i)));
      refill(i);
    }
    num_left -= kTensorSlots * kTensorThreads;
    for (int word = count - 1 - thread; word >= first_rest;) {
#pragma unroll
      for (int i = 0; i < kTensorSlots; ++i, word -= kTensorThreads) {
        device::copy_async_wait<kTensorSlots - 1>();
        if (word < first_rest) continue;
        finish(word, held_word(slot(i)));
        refill(i);
      }
    }
  }
#pragma unroll 2
  for (int i = thread; i < num_left; i += kTensorThreads)
    if (i >= num_late) finish(i, held_word(i));
  grid.barrier_wait(std::move(read_all));
  for (int i = thread; i < num_late; i += kTensorThreads) finish(i, held_word(i));
}

// Grid: threads share the rows, in turns.
__global__ void default_scales_kernel(const __grid_constant__ QuantizeParams p) {
  device::wait_for_predecessor();
  for (std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; row < p.num_rows;
       row += static_cast<std::int64_t>(gridDim.x) * blockDim.x) {
    *p.quant.scale_at(row, 0) = 1.0f;
    if (p.zero_points != nullptr) *p.zero_point_at(row, 0) = 0;
  }
}

// Grid: threads share the elements of the result, in turns. For every layout, width and group.
template <typename Out, typename Narrow>
__global__ void __launch_bounds__(kMaxThreads) dequantize_kernel(const __grid_constant__ QuantizeParams p) {
  device::wait_for_predecessor();
  const std::int64_t total = p.num_rows * p.width, stride = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
  for (std::int64_t item = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; item < total; item += stride) {
    const std::int64_t row = divide(item, p.width), column = item - row * p.width;
    const std::int64_t scale_row = divide(row, p.block_rows), group = divide(column, p.quant.group_size);
    const float zero = p.zero_points == nullptr ? 0.0f : static_cast<float>(*p.zero_point_at(scale_row, group));
    const float v = to_float<Narrow>(static_cast<const Narrow*>(p.x)[p.x_rows.offset(row) + column]);
    static_cast<Out*>(p.out)[p.out_rows.offset(row) + column] = from_float<Out>((v - zero) * *p.quant.scale_at(scale_row, group));
  }
}

// Grid: as quantize_rows_kernel, with kVectors vectors of a row at a time.
template <typename Out, typename Narrow, int kVectors>
__global__ void __launch_bounds__(kMaxThreads) dequantize_rows_kernel(const __grid_constant__ QuantizeParams p) {
  device::wait_for_predecessor();
  constexpr int kVec = kElementsPer16Bytes<Out>;
  const int lane = static_cast<int>(threadIdx.x), width = static_cast<int>(blockDim.x);
  const int num_vectors = static_cast<int>(p.width) / kVec, group_vectors = static_cast<int>(p.quant.group_size) / kVec;
  const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= p.num_rows) return;
  const Narrow* const x = static_cast<const Narrow*>(p.x) + p.x_rows.offset(row);
  Out* const out = static_cast<Out*>(p.out) + p.out_rows.offset(row);
  const std::int64_t scale_row = p.block_rows == 1 ? row : divide(row, p.block_rows);
  const float* const scales = p.quant.scale_at(scale_row, 0);
  const std::int32_t* const zero_points = p.zero_points == nullptr ? nullptr : p.zero_point_at(scale_row, 0);
  for (int first = lane; first < num_vectors; first += kVectors * width) {
    Packed<Narrow, kVec> packed[kVectors];
    float scale[kVectors], zero[kVectors];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int vector = first + i * width;
      if (vector >= num_vectors) continue;
      packed[i] = load_packed<Narrow, kVec>(x + vector * kVec);
      const int group = vector / group_vectors;
      scale[i] = scales[group * p.quant.group_stride];
      zero[i] = zero_points == nullptr ? 0.0f : static_cast<float>(zero_points[group * p.zero_point_group_stride]);
    }
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int vector = first + i * width;
      if (vector >= num_vectors) continue;
      float v[kVec];
      unpack<Narrow, kVec>(v, packed[i]);
#pragma unroll
      for (int e = 0; e < kVec; ++e) v[e] = (v[e] - zero[i]) * scale[i];
      store_floats(out + vector * kVec, v);
    }
  }
}

// Grid: a warp for each output feature and group, in turns.
template <typename T, typename Scale>
__global__ void quantize_weight_kernel(const __grid_constant__ QuantizeWeightParams p) {
  device::wait_for_predecessor();
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const std::int64_t warps = static_cast<std::int64_t>(gridDim.x) * (blockDim.x / kWarpSize), groups = p.num_groups();
  const float largest_code = static_cast<float>((1 << p.bits) - 1), middle = static_cast<float>(1 << (p.bits - 1));
  for (std::int64_t item = static_cast<std::int64_t>(blockIdx.x) * (blockDim.x / kWarpSize) + threadIdx.x / kWarpSize; item < p.n * groups;
       item += warps) {
    const std::int64_t row = divide(item, groups), group = item - row * groups;
    const std::int64_t begin = group * p.group_size, end = min(begin + p.group_size, p.k);
    const T* const w = static_cast<const T*>(p.w) + row * p.w_stride;
    Range range;
    for (std::int64_t i = begin + lane; i < end; i += kWarpSize) {
      const float v[1] = {to_float<T>(w[i])};
      extend<true>(range, v);
    }
    range.above = warp_max(range.above);
    range.below = warp_max(range.below);
    float scale =
        p.zeros == nullptr ? __fdiv_rn(fmaxf(range.above, range.below), middle - 0.5f) : __fdiv_rn(range.above + range.below, largest_code);
    scale = fmaxf(scale, p.scale_dtype == DType::kFloat16 ? 0x1p-14f : kSmallestScale);
    const Scale stored = from_float<Scale>(scale);
    scale = to_float<Scale>(stored);
    const float zero = p.zeros == nullptr ? middle : fminf(rintf(__fdiv_rn(range.below, scale)), largest_code);
    if (lane == 0) {
      static_cast<Scale*>(p.scales)[item] = stored;
      if (p.zeros != nullptr) p.zeros[item] = static_cast<std::uint8_t>(zero);
    }
    for (std::int64_t i = begin + lane; i < end; i += kWarpSize) {
      const float code = rintf(__fdiv_rn(to_float<T>(w[i]), scale)) + zero;
      // fmaxf passes over NaN.
      p.codes[row * p.codes_stride + i] = static_cast<std::uint8_t>(fminf(fmaxf(code, 0.0f), largest_code));
    }
  }
}

// Grid: a warp for each row, in turns. kWords: rows are read in 16-byte accesses.
template <bool kWords>
__global__ void column_sums_kernel(std::int32_t* sums, const std::int8_t* b, std::int64_t n, std::int64_t k, std::int64_t stride) {
  device::wait_for_predecessor();
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const std::int64_t warps = static_cast<std::int64_t>(gridDim.x) * (blockDim.x / kWarpSize);
  for (std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * (blockDim.x / kWarpSize) + threadIdx.x / kWarpSize; row < n;
       row += warps) {
    int sum = 0;
    if constexpr (kWords) {
      for (std::int64_t i = lane * 16; i < k; i += kWarpSize * 16) {
        const RawVector<16> words = load_raw<16>(b + row * stride + i);
#pragma unroll
        for (int w = 0; w < 4; ++w) sum = __dp4a(static_cast<int>(words.words[w]), 0x01010101, sum);
      }
    } else {
      for (std::int64_t i = lane; i < k; i += kWarpSize) sum += b[row * stride + i];
    }
    sum = __reduce_add_sync(kFullMask, sum);
    if (lane == 0) sums[row] = sum;
  }
}

unsigned num_ctas(std::int64_t num_items, std::int64_t per_cta, int ctas_per_sm) {
  const std::int64_t limit = std::int64_t{ctas_per_sm} * current_device_properties().num_sms;
  return static_cast<unsigned>(std::max<std::int64_t>(1, std::min(ceil_div(num_items, per_cta), limit)));
}

bool rows_keep_alignment(const RowLayout& rows, std::int64_t elements) {
  return rows.strides[0] % elements == 0 && rows.strides[1] % elements == 0 && rows.strides[2] % elements == 0;
}

// Both sides can be read and written kCount elements at a time.
template <typename Wide, int kCount>
bool is_vectors(const void* wide, const RowLayout& wide_rows, const void* narrow, const RowLayout& narrow_rows, std::int64_t width) {
  return width % kCount == 0 && is_aligned(wide, 16) && is_aligned(narrow, kCount) &&
         rows_keep_alignment(wide_rows, kElementsPer16Bytes<Wide>) && rows_keep_alignment(narrow_rows, kCount);
}

// Threads for rows of `lanes` vectors: several narrow rows share a CTA.
dim3 row_block(std::int64_t lanes, int max_threads) {
  dim3 block;
  if (lanes <= kWarpSize) {
    block.x = std::bit_ceil(static_cast<unsigned>(lanes));
    block.y = kNarrowThreads / block.x;
  } else {
    block.x = static_cast<unsigned>(std::min<std::int64_t>(ceil_div(lanes, kWarpSize) * kWarpSize, max_threads));
  }
  return block;
}

// after_range: p holds the tensor's scale once the kernel before has ended.
template <typename T, int kVectors, Scaling kScaling, Result kResult>
void launch_rows(const QuantizeParams& p, bool after_range, Stream stream) {
  const std::int64_t num_vectors = p.width / kVec;
  dim3 block = row_block(ceil_div(num_vectors, kVectors), kScaling == Scaling::kToken ? kRowThreads<kVectors> : kMaxThreads);
  if constexpr (kScaling != Scaling::kToken) {
    // The more rows, the fewer threads for each: what is done once for a row counts less.
    const std::int64_t threads = kResidentThreads * current_device_properties().num_sms / p.num_rows;
    block.x = std::min(block.x, std::bit_ceil(static_cast<unsigned>(std::clamp<std::int64_t>(threads, kWarpSize, kMaxThreads))));
    if (kScaling == Scaling::kGroup) block.x = std::max(block.x, static_cast<unsigned>(p.quant.group_size / kVec));
    block.y = block.x < kNarrowThreads ? kNarrowThreads / block.x : 1;
  }
  const int threads = static_cast<int>(block.x * block.y);
  // Where threads do not read ahead, new CTAs do so for them.
  const unsigned ctas = num_ctas(p.num_rows, block.y, kReadsAhead<T> ? kResidentThreads / threads : 1 << 20);
  const int group_shift = std::countr_zero(static_cast<std::uint64_t>(p.quant.group_size / kVec));
  if constexpr (kResult == Result::kAsymmetricInt8) {
    constexpr auto kernel = zero_point_quantize_rows_kernel<T, kVectors, kScaling>;
    int num_ahead = 0, shared_bytes = 0;
    if (kReadsAhead<T>) {
      // Any device has place for one piece of a CTA of most threads.
      const int most_shared = current_device_properties().max_shared_bytes_per_cta - 1024;
      const int bytes = piece_bytes<T, kVectors, kScaling>(threads);
      num_ahead = 2 * bytes <= most_shared ? 2 : 1;
      shared_bytes = num_ahead * bytes;
      set_max_shared_bytes(reinterpret_cast<const void*>(kernel),
                           std::min(2 * piece_bytes<T, kVectors, kScaling>(kRowThreads<kVectors>), most_shared));
    }
    // Of what a range was taken from, the end is in the L2 cache.
    launch_waiting("zero_point_quantize_rows_kernel", kernel, LaunchShape{ctas, block, shared_bytes}, stream, p, group_shift, num_ahead,
                   after_range);
  } else {
    constexpr auto kernel = quantize_rows_kernel<T, kVectors, kScaling, kResult>;
    const int shift = kScaling == Scaling::kGivenGroup && p.quant.group_size == p.width ? -1 : group_shift;
    launch_waiting("quantize_rows_kernel", kernel, ctas, block, stream, p, shift, after_range);
  }
}

/// Why quantize_rows_kernel cannot do it; null: it can.
template <typename T>
const char* prevents_rows(const QuantizeParams& p) {
  const std::int64_t group_vectors = p.quant.group_size / kVec;
  if (!is_vectors<T, kVec>(p.x, p.x_rows, p.out, p.out_rows, p.width)) return "x or out does not divide into aligned pieces of 16 elements";
  if (p.quant.granularity == ScaleGranularity::kGroup) {
    if (p.quant.group_size % kVec != 0 || !std::has_single_bit(static_cast<std::uint64_t>(group_vectors)))
      return "group_size is not 16 times a power of two";
    if (p.computes && (p.width % p.quant.group_size != 0 || group_vectors > kWarpSize))
      return "scales are computed, and group_size is over 512 or does not divide the row";
  }
  if (p.computes && p.quant.granularity == ScaleGranularity::kToken && p.width / kVec > 2 * kRowThreads<2>)
    return "a row has more than 32768 elements";
  return p.width > INT32_MAX / 2 || p.num_rows > INT32_MAX / 2 ? "extents are over 2^30" : nullptr;
}

/// Whether rows lie `stride` apart, one behind the other.
bool are_apart_by(const QuantizeParams& p, const RowLayout& rows, std::int64_t stride) {
  return p.num_rows == 1 || (rows.inner_extents[0] == 1 && rows.inner_extents[1] == 1 && rows.strides[0] == stride);
}

/// Whether quantize_dense_kernel can do what quantize_rows_kernel can.
bool is_dense_in_groups(const QuantizeParams& p) {
  if (p.quant.granularity != ScaleGranularity::kGroup || p.width % p.quant.group_size != 0) return false;
  const std::int64_t groups = p.width / p.quant.group_size;
  const auto dense_groups = [&](const RowLayout& rows, std::int64_t group_stride) {
    return are_apart_by(p, rows, groups) && (groups == 1 || group_stride == 1);
  };
  // Vectors are counted in 32 bits.
  return are_apart_by(p, p.x_rows, p.width) && are_apart_by(p, p.out_rows, p.width) &&
         dense_groups(p.quant.scale_rows, p.quant.group_stride) &&
         (p.zero_points == nullptr || dense_groups(p.zero_point_rows, p.zero_point_group_stride)) &&
         p.num_rows * (p.width / kVec) <= std::int64_t{1} << 29;
}

template <typename T, Scaling kScaling, Result kResult>
void launch_dense(const QuantizeParams& p, Stream stream) {
  const std::int64_t num_vectors = p.num_rows * (p.width / kVec);
  // As quantize_rows_kernel's.
  const unsigned ctas = num_ctas(num_vectors, 2 * kDenseThreads, kReadsAhead<T> ? kResidentThreads / kDenseThreads : 1 << 20);
  launch_waiting("quantize_dense_kernel", quantize_dense_kernel<T, kScaling, kResult>, ctas, kDenseThreads, stream, p,
                 static_cast<int>(num_vectors), std::countr_zero(static_cast<std::uint64_t>(p.quant.group_size / kVec)));
}

template <typename T, Result kResult>
void launch_quantize(const QuantizeParams& p, bool after_range, Stream stream) {
  if (prevents_rows<T>(p) == nullptr) {
    if (is_dense_in_groups(p)) {
      if (p.computes) return launch_dense<T, Scaling::kGroup, kResult>(p, stream);
      return launch_dense<T, Scaling::kGivenGroup, kResult>(p, stream);
    }
    // 64 bytes for each thread, and more only where a row has more than a CTA has threads for it.
    constexpr int kVectors = sizeof(T) == 2 ? 2 : 1;
    if constexpr (kResult == Result::kAsymmetricInt8) {
      if (!p.computes && p.quant.group_size == p.width) return launch_rows<T, kVectors, Scaling::kGiven, kResult>(p, after_range, stream);
    }
    if (!p.computes) return launch_rows<T, kVectors, Scaling::kGivenGroup, kResult>(p, after_range, stream);
    if (p.quant.granularity == ScaleGranularity::kGroup) return launch_rows<T, kVectors, Scaling::kGroup, kResult>(p, false, stream);
    if (p.width / kVec <= kVectors * kRowThreads<kVectors>) return launch_rows<T, kVectors, Scaling::kToken, kResult>(p, false, stream);
    return launch_rows<T, 2, Scaling::kToken, kResult>(p, false, stream);
  }
  const std::int64_t items = p.num_rows * ceil_div(p.width, p.quant.group_size);
  launch_waiting("quantize_groups_kernel", quantize_groups_kernel<T, kResult>, num_ctas(items, 8, 8), 256, stream, p);
}

// Writes scales[0] and zero_points[0].
template <typename T, Result kResult>
void launch_tensor_scale(QuantizeParams p, Stream stream) {
  constexpr bool kAsymmetric = kResult == Result::kAsymmetricInt8;
  constexpr int kCount = kElementsPer16Bytes<T>;
  if (p.x_rows.inner_extents[0] == 1 && p.x_rows.inner_extents[1] == 1 && p.x_rows.strides[0] == p.width) {
    // Dense rows are one.
    p.width *= p.num_rows;
    p.num_rows = 1;
  }
  launch_waiting("clear_tensor_range_kernel", clear_tensor_range_kernel<kAsymmetric>, 1, 1, stream, p);
  if (is_vectors<T, kCount>(p.x, p.x_rows, p.x, RowLayout{}, p.width)) {
    const std::int64_t items = p.num_rows * (p.width / kCount);
    launch_waiting("tensor_range_kernel", tensor_range_kernel<T, kCount, kAsymmetric>, num_ctas(items, kMaxThreads, 4), kMaxThreads, stream,
                   p);
  } else {
    launch_waiting("tensor_range_kernel", tensor_range_kernel<T, 1, kAsymmetric>, num_ctas(p.num_rows * p.width, kMaxThreads, 4),
                   kMaxThreads, stream, p);
  }
  launch_waiting("tensor_scale_kernel", tensor_scale_kernel<kResult>, 1, 1, stream, p);
}

/// Why quantize_tensor_kernel cannot do it; null: it can.
template <typename T>
const char* prevents_tensor(const QuantizeParams& p) {
  const std::int64_t size = p.num_rows * p.width;
  if (!are_apart_by(p, p.x_rows, p.width) || !are_apart_by(p, p.out_rows, p.width)) return "x or out is not dense";
  if (!is_aligned(p.x, 16) || !is_aligned(p.out, 16) || size % kElementsPer16Bytes<T> != 0)
    return "x or out does not divide into aligned pieces of 16 bytes of x";
  if (size < kTensorThreads * kElementsPer16Bytes<T>) return "x is small";
  // As measured on an H200.
  return size * static_cast<std::int64_t>(sizeof(T)) > 3 * std::int64_t{current_device_properties().l2_bytes}
             ? "x is over three times the L2 cache's size"
             : nullptr;
}

/// Whether it was launched: all CTAs must run at once.
template <typename T, Result kResult>
bool launch_tensor(const QuantizeParams& p, Stream stream) {
  constexpr auto kernel = quantize_tensor_kernel<T, kResult>;
  if (prevents_tensor<T>(p) != nullptr) return false;
  const DeviceProperties& device = current_device_properties();
  const int shared_bytes = device.max_shared_bytes_per_cta - 1024, most_held = shared_bytes / 16;
  set_max_shared_bytes(reinterpret_cast<const void*>(kernel), shared_bytes);
  const std::int64_t num_words = p.num_rows * p.width / kElementsPer16Bytes<T>;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = {static_cast<unsigned>(std::min<std::int64_t>(device.num_sms, num_words / kTensorThreads)), 1, 1};
  config.blockDim = {kTensorThreads, 1, 1};
  config.dynamicSmemBytes = static_cast<std::size_t>(shared_bytes);
  config.stream = cuda_stream(stream);
  config.attrs = &attribute;
  config.numAttrs = 1;
  const cudaError_t status = cudaLaunchKernelEx(&config, kernel, p, num_words, most_held);
  if (status == cudaErrorCooperativeLaunchTooLarge) {
    // Of this device's SMs the stream has a part only.
    static_cast<void>(cudaGetLastError());
    return false;
  }
  QUIRE_CUDA_CHECK(status);
  QUIRE_CHECK_LAUNCH("quantize_tensor_kernel", stream);
  return true;
}

template <typename T, Result kResult>
void quantize_to(const QuantizeParams& p, Stream stream) {
  if (p.quant.granularity != ScaleGranularity::kTensor || !p.computes) return launch_quantize<T, kResult>(p, false, stream);
  if (launch_tensor<T, kResult>(p, stream)) return;
  launch_tensor_scale<T, kResult>(p, stream);
  QuantizeParams given = p;
  given.computes = false;
  launch_quantize<T, kResult>(given, true, stream);
}

/// Why dequantize_rows_kernel, which stores 16 bytes at once, cannot do it; null: it can.
template <typename Out>
const char* prevents_dequantize_rows(const QuantizeParams& p) {
  constexpr int kCount = kElementsPer16Bytes<Out>;
  if (!is_vectors<Out, kCount>(p.out, p.out_rows, p.x, p.x_rows, p.width))
    return "q or out does not divide into aligned 16-byte pieces of out";
  if (p.width > INT32_MAX / 2 || p.num_rows > INT32_MAX) return "extents are over 2^30";
  if (p.quant.granularity == ScaleGranularity::kGroup && p.quant.group_size % kCount != 0)
    return "groups do not divide into 16-byte pieces";
  return nullptr;
}

template <typename Out, typename Narrow>
void launch_dequantize(const QuantizeParams& p, Stream stream) {
  constexpr int kCount = kElementsPer16Bytes<Out>, kVectors = 4;
  if (prevents_dequantize_rows<Out>(p) == nullptr) {
    const dim3 block = row_block(ceil_div(p.width / kCount, kVectors), kNarrowThreads * 2);
    return launch_waiting("dequantize_rows_kernel", dequantize_rows_kernel<Out, Narrow, kVectors>,
                          static_cast<unsigned>(ceil_div(p.num_rows, block.y)), block, stream, p);
  }
  launch_waiting("dequantize_kernel", dequantize_kernel<Out, Narrow>, num_ctas(p.num_rows * p.width, kMaxThreads, 64), kMaxThreads, stream,
                 p);
}

}  // namespace

void quantize(const QuantizeParams& p, Stream stream) {
  dispatch_float(p.dtype, "quantize", [&](auto dtype) {
    using T = Element<decltype(dtype)::value>;
    if (Explanation* const explanation = explaining()) {
      const bool reads_twice = p.computes && p.quant.granularity == ScaleGranularity::kTensor;
      if (reads_twice && prevents_tensor<T>(p) == nullptr) {
        explanation->variant = "tensor";
        explanation->reasons.emplace_back("one scale for the whole tensor is computed: CTAs keep what fits of x while all find its range");
        return;
      }
      const char* const obstacle = prevents_rows<T>(p);
      explanation->variant = std::string(reads_twice ? "range+" : "") + (obstacle == nullptr ? "rows" : "groups");
      explanation->reasons.push_back(obstacle == nullptr ? "a row stays in registers between its scale and its results"
                                                         : std::string("not rows: ") + obstacle);
      if (reads_twice)
        explanation->reasons.push_back(std::string("one scale for the whole tensor is computed, and x is read twice: not tensor: ") +
                                       prevents_tensor<T>(p));
      return;
    }
    if (p.quant.dtype != DType::kInt8) return quantize_to<T, Result::kFloat8>(p, stream);
    if (p.zero_points == nullptr) return quantize_to<T, Result::kInt8>(p, stream);
    quantize_to<T, Result::kAsymmetricInt8>(p, stream);
  });
}

void set_default_scales(const QuantizeParams& p, Stream stream) {
  launch_waiting("default_scales_kernel", default_scales_kernel, num_ctas(p.num_rows, 256, 8), 256, stream, p);
}

void dequantize(const QuantizeParams& p, Stream stream) {
  dispatch_float(p.dtype, "dequantize", [&](auto dtype) {
    using Out = Element<decltype(dtype)::value>;
    if (Explanation* const explanation = explaining()) {
      const char* const obstacle = prevents_dequantize_rows<Out>(p);
      explanation->variant = obstacle == nullptr ? "rows" : "elements";
      explanation->reasons.push_back(obstacle == nullptr ? "all rows of out begin and end at multiples of 16 bytes"
                                                         : std::string("not rows: ") + obstacle);
      return;
    }
    if (p.quant.dtype == DType::kInt8) {
      launch_dequantize<Out, std::int8_t>(p, stream);
    } else {
      launch_dequantize<Out, __nv_fp8_e4m3>(p, stream);
    }
  });
}

void quantize_weight(const QuantizeWeightParams& p, Stream stream) {
  dispatch_float(p.dtype, "quantize_weight", [&](auto dtype) {
    dispatch_float(p.scale_dtype, "quantize_weight", [&](auto scale_dtype) {
      using T = Element<decltype(dtype)::value>;
      using Scale = Element<decltype(scale_dtype)::value>;
      launch_waiting("quantize_weight_kernel", quantize_weight_kernel<T, Scale>, num_ctas(p.n * p.num_groups(), 8, 32), 256, stream, p);
    });
  });
}

void column_sums(std::int32_t* sums, const std::int8_t* b, std::int64_t n, std::int64_t k, std::int64_t stride, Stream stream) {
  const unsigned ctas = num_ctas(n, 8, 32);
  const bool words = k % 16 == 0 && stride % 16 == 0 && is_aligned(b, 16);
  launch_waiting("column_sums_kernel", words ? column_sums_kernel<true> : column_sums_kernel<false>, ctas, 256, stream, sums, b, n, k,
                 stride);
}

}  // namespace quire::cuda
