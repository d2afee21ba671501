// Quantizing to float8 and int8 on CUDA, undoing it, codes of weights, and sums of int8 rows.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <bit>

#include "core/dispatch.h"
#include "cuda/device/quantize.cuh"
#include "cuda/device/reduce.cuh"
#include "cuda/element.h"
#include "cuda/launch.h"
#include "ops/quantization.h"

namespace quire::cuda {
namespace {

// Elements that a thread quantizes at once: 16 bytes of the narrow side.
constexpr int kVec = 16;
constexpr int kMaxThreads = 512;
constexpr int kNarrowThreads = 128;

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
    const float scale = fmaxf(__fdiv_rn(range.above + range.below, 255.0f), kSmallestScale);
    const float shift = rintf(__fdiv_rn(-range.below, scale));
    return {scale, in_range(-128 - static_cast<int>(fmaxf(fminf(shift, 512.0f), -512.0f)))};
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

// Elements [at, at + kCount) of the result.
template <Result kResult, int kCount>
__device__ __forceinline__ void store(const QuantizeParams& p, std::int64_t at, float (&v)[kCount], const ScaleAndZero& value) {
  if constexpr (kResult == Result::kFloat8) {
    store_raw(static_cast<__nv_fp8_e4m3*>(p.out) + at, Divisor(value.scale).divide_and_pack<__nv_fp8_e4m3>(v));
  } else if constexpr (kResult == Result::kInt8) {
    store_raw(static_cast<std::int8_t*>(p.out) + at, Divisor(value.scale).divide_and_pack<std::int8_t>(v));
  } else {
#pragma unroll
    for (int e = 0; e < kCount; ++e) {
      const float quotient = __fdiv_rn(v[e], value.scale);
      v[e] = (isnan(quotient) ? 0.0f : rintf(fmaxf(fminf(quotient, 512.0f), -512.0f))) + static_cast<float>(value.zero_point);
    }
    store_raw(static_cast<std::int8_t*>(p.out) + at, pack<std::int8_t, kCount>(v));
  }
}

enum class Scaling { kGiven, kToken, kGroup };

// Grid: a CTA quantizes blockDim.y rows, one after the other every gridDim.x * blockDim.y. A row lies in the registers of its blockDim.x
// threads, kVectors vectors each: one read, one write. blockDim.x is a power of two up to 32, or whole warps with blockDim.y = 1. With a scale per
// group, a group's vectors lie in as many neighbouring lanes, a power of two up to 32 that divides blockDim.x.
template <typename T, int kVectors, Scaling kScaling, Result kResult>
__global__ void __launch_bounds__(kMaxThreads, 2) quantize_rows_kernel(const __grid_constant__ QuantizeParams p) {
  constexpr bool kAsymmetric = kResult == Result::kAsymmetricInt8;
  __shared__ float scratch[2][kWarpSize];
  const int lane = static_cast<int>(threadIdx.x), width = static_cast<int>(blockDim.x);
  const int num_vectors = static_cast<int>(p.width) / kVec, group_vectors = static_cast<int>(p.quant.group_size) / kVec;
  int turn = 0;
  const auto row_max = [&](float value) {
    turn ^= 1;
    return width <= kWarpSize ? warp_max(value, width) : cta_max(value, scratch[turn]);
  };
  // The condition is on the CTA's first row: all its threads take part in the maxima.
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * blockDim.y;
  for (std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * blockDim.y; first < p.num_rows; first += step) {
    const std::int64_t row = first + threadIdx.y;
    const int limit = row < p.num_rows ? num_vectors : 0;
    const T* const x = static_cast<const T*>(p.x) + (limit > 0 ? p.x_rows.offset(row) : 0);
    Packed<T, kVec> packed[kVectors];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      packed[i] = {};
      if (lane + i * width < limit) packed[i] = load_packed<T, kVec>(x + (lane + i * width) * kVec);
    }

    ScaleAndZero of_row{1.0f, 0};
    if constexpr (kScaling == Scaling::kToken) {
      Range range;
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        float v[kVec];
        unpack<T, kVec>(v, packed[i]);
        extend<kAsymmetric>(range, v);
      }
      range.above = row_max(range.above);
      if constexpr (kAsymmetric) range.below = row_max(range.below);
      of_row = computed<kResult>(p, range);
      if (lane == 0 && limit > 0) write_scale<kResult>(p, row, 0, of_row);
    }

    const std::int64_t out_at = limit > 0 ? p.out_rows.offset(row) : 0;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int vector = lane + i * width;
      const bool inside = vector < limit;
      float v[kVec];
      unpack<T, kVec>(v, packed[i]);
      ScaleAndZero value = of_row;
      if constexpr (kScaling == Scaling::kGroup) {
        Range range;
        extend<kAsymmetric>(range, v);
        range.above = warp_max(range.above, group_vectors);
        if constexpr (kAsymmetric) range.below = warp_max(range.below, group_vectors);
        value = computed<kResult>(p, range);
        if (inside && lane % group_vectors == 0) write_scale<kResult>(p, row, vector / group_vectors, value);
      } else if constexpr (kScaling == Scaling::kGiven) {
        if (inside) value = read_scale<kResult>(p, row, vector / group_vectors);
      }
      if (inside) store<kResult>(p, out_at + vector * kVec, v, value);
    }
  }
}

// Grid: a warp for each group of elements with one scale, in turns. For every layout, width and group.
template <typename T, Result kResult>
__global__ void quantize_groups_kernel(const __grid_constant__ QuantizeParams p) {
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
    const std::int64_t out_at = p.out_rows.offset(row);
    for (std::int64_t i = begin + lane; i < end; i += kWarpSize) {
      float v[1] = {to_float<T>(x[i])};
      store<kResult>(p, out_at + i, v, value);
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
    for (int i = 0; i < kInFlight; ++i) {
      float v[kCount];
      unpack<T, kCount>(v, packed[i]);
      extend<kAsymmetric>(range, v);
    }
  }
  range.above = cta_max(range.above, scratch[0]);
  if constexpr (kAsymmetric) range.below = cta_max(range.below, scratch[1]);
  if (threadIdx.x != 0) return;
  atomicMax(reinterpret_cast<unsigned*>(p.quant.scales), __float_as_uint(range.above));
  if constexpr (kAsymmetric) atomicMax(reinterpret_cast<unsigned*>(p.zero_points), __float_as_uint(range.below));
}

// Grid: one thread. The range that tensor_range_kernel left becomes scale and zero point.
template <Result kResult>
__global__ void tensor_scale_kernel(const __grid_constant__ QuantizeParams p) {
  Range range;
  range.above = p.quant.scales[0];
  if constexpr (kResult == Result::kAsymmetricInt8) range.below = __int_as_float(p.zero_points[0]);
  write_scale<kResult>(p, 0, 0, computed<kResult>(p, range));
}

// Grid: threads share the elements of the result, in turns. For every layout, width and group.
template <typename Out, typename Narrow>
__global__ void __launch_bounds__(kMaxThreads) dequantize_kernel(const __grid_constant__ QuantizeParams p) {
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

template <typename T, int kVectors, Result kResult>
void launch_rows(const QuantizeParams& p, Stream stream) {
  const dim3 block = row_block(ceil_div(p.width / kVec, kVectors), kMaxThreads);
  const std::int64_t ctas = std::min<std::int64_t>(ceil_div(p.num_rows, block.y), 1 << 24);
  const auto launch = [&](auto kernel) {
    kernel<<<static_cast<unsigned>(ctas), block, 0, cuda_stream(stream)>>>(p);
    QUIRE_CHECK_LAUNCH("quantize_rows_kernel", stream);
  };
  if (!p.computes || p.quant.granularity == ScaleGranularity::kTensor)
    return launch(quantize_rows_kernel<T, kVectors, Scaling::kGiven, kResult>);
  if (p.quant.granularity == ScaleGranularity::kToken) return launch(quantize_rows_kernel<T, kVectors, Scaling::kToken, kResult>);
  launch(quantize_rows_kernel<T, kVectors, Scaling::kGroup, kResult>);
}

template <typename T, Result kResult>
void launch_quantize(const QuantizeParams& p, Stream stream) {
  const std::int64_t group_vectors = p.quant.group_size / kVec, num_vectors = p.width / kVec;
  const bool by_group = p.quant.granularity == ScaleGranularity::kGroup;
  const bool fits_group =
      !by_group || (p.quant.group_size % kVec == 0 && (!p.computes || (p.width % p.quant.group_size == 0 && group_vectors <= kWarpSize &&
                                                                       std::has_single_bit(static_cast<std::uint64_t>(group_vectors)))));
  if (is_vectors<T, kVec>(p.x, p.x_rows, p.out, p.out_rows, p.width) && fits_group && num_vectors <= 4 * kMaxThreads) {
    // One vector is enough in flight; more only where a row has more than a CTA has threads.
    if (num_vectors <= kMaxThreads) return launch_rows<T, 1, kResult>(p, stream);
    if (num_vectors <= 2 * kMaxThreads) return launch_rows<T, 2, kResult>(p, stream);
    return launch_rows<T, 4, kResult>(p, stream);
  }
  const std::int64_t items = p.num_rows * ceil_div(p.width, p.quant.group_size);
  quantize_groups_kernel<T, kResult><<<num_ctas(items, 8, 8), 256, 0, cuda_stream(stream)>>>(p);
  QUIRE_CHECK_LAUNCH("quantize_groups_kernel", stream);
}

template <typename T, Result kResult>
void launch_tensor_range(QuantizeParams p, Stream stream) {
  constexpr bool kAsymmetric = kResult == Result::kAsymmetricInt8;
  constexpr int kCount = kElementsPer16Bytes<T>;
  if (p.x_rows.inner_extents[0] == 1 && p.x_rows.inner_extents[1] == 1 && p.x_rows.strides[0] == p.width) {
    // Dense rows are one.
    p.width *= p.num_rows;
    p.num_rows = 1;
  }
  QUIRE_CUDA_CHECK(cudaMemsetAsync(p.quant.scales, 0, sizeof(float), cuda_stream(stream)));
  if constexpr (kAsymmetric) QUIRE_CUDA_CHECK(cudaMemsetAsync(p.zero_points, 0, sizeof(std::int32_t), cuda_stream(stream)));
  if (is_vectors<T, kCount>(p.x, p.x_rows, p.x, RowLayout{}, p.width)) {
    const std::int64_t items = p.num_rows * (p.width / kCount);
    tensor_range_kernel<T, kCount, kAsymmetric><<<num_ctas(items, kMaxThreads, 4), kMaxThreads, 0, cuda_stream(stream)>>>(p);
  } else {
    tensor_range_kernel<T, 1, kAsymmetric><<<num_ctas(p.num_rows * p.width, kMaxThreads, 4), kMaxThreads, 0, cuda_stream(stream)>>>(p);
  }
  QUIRE_CHECK_LAUNCH("tensor_range_kernel", stream);
  tensor_scale_kernel<kResult><<<1, 1, 0, cuda_stream(stream)>>>(p);
  QUIRE_CHECK_LAUNCH("tensor_scale_kernel", stream);
}

template <typename T, Result kResult>
void quantize_to(const QuantizeParams& p, Stream stream) {
  if (p.quant.granularity != ScaleGranularity::kTensor || !p.computes) return launch_quantize<T, kResult>(p, stream);
  launch_tensor_range<T, kResult>(p, stream);
  QuantizeParams given = p;
  given.computes = false;
  launch_quantize<T, kResult>(given, stream);
}

template <typename Out, typename Narrow>
void launch_dequantize(const QuantizeParams& p, Stream stream) {
  constexpr int kCount = kElementsPer16Bytes<Out>, kVectors = 4;
  const bool by_group = p.quant.granularity == ScaleGranularity::kGroup;
  if (is_vectors<Out, kCount>(p.out, p.out_rows, p.x, p.x_rows, p.width) && p.width <= INT32_MAX / 2 && p.num_rows <= INT32_MAX &&
      (!by_group || p.quant.group_size % kCount == 0)) {
    const dim3 block = row_block(ceil_div(p.width / kCount, kVectors), kNarrowThreads * 2);
    dequantize_rows_kernel<Out, Narrow, kVectors>
        <<<static_cast<unsigned>(ceil_div(p.num_rows, block.y)), block, 0, cuda_stream(stream)>>>(p);
    QUIRE_CHECK_LAUNCH("dequantize_rows_kernel", stream);
    return;
  }
  dequantize_kernel<Out, Narrow><<<num_ctas(p.num_rows * p.width, kMaxThreads, 64), kMaxThreads, 0, cuda_stream(stream)>>>(p);
  QUIRE_CHECK_LAUNCH("dequantize_kernel", stream);
}

}  // namespace

void quantize(const QuantizeParams& p, Stream stream) {
  dispatch_float(p.dtype, "quantize", [&](auto dtype) {
    using T = Element<decltype(dtype)::value>;
    if (p.quant.dtype != DType::kInt8) return quantize_to<T, Result::kFloat8>(p, stream);
    if (p.zero_points == nullptr) return quantize_to<T, Result::kInt8>(p, stream);
    quantize_to<T, Result::kAsymmetricInt8>(p, stream);
  });
}

void dequantize(const QuantizeParams& p, Stream stream) {
  dispatch_float(p.dtype, "dequantize", [&](auto dtype) {
    using Out = Element<decltype(dtype)::value>;
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
      quantize_weight_kernel<T, Scale><<<num_ctas(p.n * p.num_groups(), 8, 32), 256, 0, cuda_stream(stream)>>>(p);
      QUIRE_CHECK_LAUNCH("quantize_weight_kernel", stream);
    });
  });
}

void column_sums(std::int32_t* sums, const std::int8_t* b, std::int64_t n, std::int64_t k, std::int64_t stride, Stream stream) {
  const unsigned ctas = num_ctas(n, 8, 32);
  if (k % 16 == 0 && stride % 16 == 0 && is_aligned(b, 16)) {
    column_sums_kernel<true><<<ctas, 256, 0, cuda_stream(stream)>>>(sums, b, n, k, stride);
  } else {
    column_sums_kernel<false><<<ctas, 256, 0, cuda_stream(stream)>>>(sums, b, n, k, stride);
  }
  QUIRE_CHECK_LAUNCH("column_sums_kernel", stream);
}

}  // namespace quire::cuda
