// From a run-time dtype to device element types: the type itself, reads of parameters in any float dtype, alignment checks.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "core/layout.h"
#include "cuda/device/vector.cuh"
#include "quire/dtype.h"

namespace quire::cuda {

template <DType>
struct ElementOf;
template <>
struct ElementOf<DType::kFloat32> {
  using type = float;
};
template <>
struct ElementOf<DType::kFloat16> {
  using type = __half;
};
template <>
struct ElementOf<DType::kBFloat16> {
  using type = __nv_bfloat16;
};
template <>
struct ElementOf<DType::kFloat8E4M3FN> {
  using type = __nv_fp8_e4m3;
};
template <>
struct ElementOf<DType::kFloat8E5M2> {
  using type = __nv_fp8_e5m2;
};
template <>
struct ElementOf<DType::kInt8> {
  using type = std::int8_t;
};
/// The device type of a dtype that a kernel computes on.
template <DType kDType>
using Element = typename ElementOf<kDType>::type;

/// Elements of T that one 16-byte access moves.
template <typename T>
inline constexpr int kElementsPer16Bytes = 16 / static_cast<int>(sizeof(T));

inline bool is_aligned(const void* data, std::int64_t num_bytes) {
  return reinterpret_cast<std::uintptr_t>(data) % static_cast<std::uintptr_t>(num_bytes) == 0;
}

/// True if a dimension's stride keeps the alignment; a dimension of extent 1 is never stepped along.
inline bool keeps_alignment(std::int64_t extent, std::int64_t stride, std::int64_t item_bytes, std::int64_t num_bytes) {
  return extent == 1 || (stride * item_bytes) % num_bytes == 0;
}

/// True if every row of `count` elements of T can be read in 16-byte accesses.
template <typename T>
bool rows_are_vectors(const void* data, const RowLayout& rows, std::int64_t count) {
  return is_aligned(data, 16) && count % kElementsPer16Bytes<T> == 0 && rows.strides[0] % kElementsPer16Bytes<T> == 0 &&
         rows.strides[1] % kElementsPer16Bytes<T> == 0 && rows.strides[2] % kElementsPer16Bytes<T> == 0;
}

/// True if a contiguous parameter can be read kVec elements at a time.
inline bool parameter_is_vectors(const void* data, DType dtype, int num_elements) {
  const std::int64_t num_bytes = num_elements * itemsize(dtype);
  return is_aligned(data, num_bytes < 16 ? num_bytes : 16);
}

/// f(elements) of a float32, float16 or bfloat16 parameter. The dtype is a run-time value because its branch is uniform and costs less than three
/// copies of each kernel.
template <typename F>
__device__ __forceinline__ void with_parameter(const void* src, DType dtype, F&& f) {
  if (dtype == DType::kFloat32) {
    f(static_cast<const float*>(src));
  } else if (dtype == DType::kFloat16) {
    f(static_cast<const __half*>(src));
  } else {
    f(static_cast<const __nv_bfloat16*>(src));
  }
}

/// Elements [index, index + kCount) of a parameter; an index at or past `limit` reads nothing and gives 0.
template <int kCount>
__device__ __forceinline__ void load_parameter(float (&dst)[kCount], const void* src, DType dtype, std::int64_t index, std::int64_t limit) {
  with_parameter(src, dtype, [&](auto* elements) {
#pragma unroll
    for (int e = 0; e < kCount; ++e) dst[e] = 0.0f;
    if (index < limit) load_floats(dst, elements + index);
  });
}

/// The same for kVectors indices `stride` apart.
template <int kVectors, int kCount>
__device__ __forceinline__ void load_parameter(float (&dst)[kVectors][kCount], const void* src, DType dtype, std::int64_t index,
                                               std::int64_t stride, std::int64_t limit) {
  with_parameter(src, dtype, [&](auto* elements) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const std::int64_t at = index + i * stride;
#pragma unroll
      for (int e = 0; e < kCount; ++e) dst[i][e] = 0.0f;
      if (at < limit) load_floats(dst[i], elements + at);
    }
  });
}

/// The bits of kCount elements of a parameter, for loads that are to be on their way before the first one is looked at: a branch
/// by dtype that also converts waits for what it has read.
template <int kCount>
struct ParameterBits {
  Packed<float, kCount> bits;

  /// Elements [index, index + kCount), or zeros past `limit`. Eight and more without branches, around which the compiler would arrange what waits:
  /// the first half of the bytes of a float32 parameter is read as those of a 16-bit one are.
  __device__ __forceinline__ void load(const void* src, DType dtype, std::int64_t index, std::int64_t limit) {
    bits = {};
    const bool is_inside = index < limit, is_wide = dtype == DType::kFloat32;
    if constexpr (kCount >= 8) {
      constexpr int kHalf = kCount / 2;
      const auto* const words = static_cast<const std::uint32_t*>(src) + (is_wide ? index : index / 2);
      RawVector<4 * kHalf> first{}, second{};
      if (is_inside) first = load_raw<4 * kHalf>(words);
      if (is_inside && is_wide) second = load_raw<4 * kHalf>(words + kHalf);
#pragma unroll
      for (int i = 0; i < kHalf; ++i) {
        bits.words[i] = first.words[i];
        bits.words[kHalf + i] = second.words[i];
      }
    } else if (is_inside && is_wide) {
      bits = load_packed<float, kCount>(static_cast<const float*>(src) + index);
    } else if (is_inside) {
      const auto half = load_packed<std::uint16_t, kCount>(static_cast<const std::uint16_t*>(src) + index);
      if constexpr (kCount == 1) {
        bits.words[0] = half.half_word;
      } else {
#pragma unroll
        for (int i = 0; i < kCount / 2; ++i) bits.words[i] = half.words[i];
      }
    }
  }

  __device__ __forceinline__ void unpack_to(float (&dst)[kCount], DType dtype) const {
    Packed<std::uint16_t, kCount> half;
    if constexpr (kCount == 1) {
      half.half_word = static_cast<std::uint16_t>(bits.words[0]);
    } else {
#pragma unroll
      for (int i = 0; i < kCount / 2; ++i) half.words[i] = bits.words[i];
    }
    if (dtype == DType::kFloat32) {
      unpack<float, kCount>(dst, bits);
    } else if (dtype == DType::kFloat16) {
      unpack<__half, kCount>(dst, half);
    } else {
      unpack<__nv_bfloat16, kCount>(dst, half);
    }
  }
};

/// An index of a slot, a position, ... as it was read, for loads that are to be on their way before the first one is looked at: to extend a
/// sign is to look.
struct IndexBits {
  uint2 bits = {0xffffffffu, 0xffffffffu};  // -1

  /// The upper half of an index of 32 bits is 0, whatever its sign.
  __device__ __forceinline__ void load(const void* src, bool is_int64, std::int64_t at) {
    if (is_int64) {
      bits = static_cast<const uint2*>(src)[at];
    } else {
      bits = {static_cast<const std::uint32_t*>(src)[at], 0};
    }
  }

  __device__ __forceinline__ std::int64_t value(bool is_int64) const {
    const auto low = static_cast<std::int32_t>(bits.x), high = static_cast<std::int32_t>(bits.y);
    return is_int64 ? std::int64_t{high} << 32 | bits.x : std::int64_t{low};
  }
};

}  // namespace quire::cuda
