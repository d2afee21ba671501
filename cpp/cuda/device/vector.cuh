// Loads and stores of 1 to 16 (or several times 16) contiguous bytes as single instructions, raw or as float32.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "convert.cuh"

namespace quire::cuda {

/// Raw bytes in registers. Up to 16 bytes move in one instruction, more in 16-byte pieces; addresses must be aligned to
/// min(kBytes, 16).
template <int kBytes>
struct alignas(kBytes < 16 ? kBytes : 16) RawVector {
  static_assert(kBytes % 4 == 0, "below 4 bytes use RawVector<1> and RawVector<2>");
  std::uint32_t words[kBytes / 4];
};
template <>
struct RawVector<1> {
  std::uint8_t byte;
};
template <>
struct RawVector<2> {
  std::uint16_t half_word;
};

template <int kBytes>
__device__ __forceinline__ RawVector<kBytes> load_raw(const void* src) {
  if constexpr (kBytes > 4 && kBytes % 16 == 0) {
    RawVector<kBytes> result;
#pragma unroll
    for (int i = 0; i < kBytes / 16; ++i) {
      const uint4 piece = static_cast<const uint4*>(src)[i];
      result.words[4 * i] = piece.x;
      result.words[4 * i + 1] = piece.y;
      result.words[4 * i + 2] = piece.z;
      result.words[4 * i + 3] = piece.w;
    }
    return result;
  } else if constexpr (kBytes == 8) {
    const uint2 piece = *static_cast<const uint2*>(src);
    return {{piece.x, piece.y}};
  } else {
    return *static_cast<const RawVector<kBytes>*>(src);
  }
}

/// The same of global memory that nobody reads again soon: in the L2 cache it is the first to make room.
template <int kBytes>
__device__ __forceinline__ RawVector<kBytes> load_raw_once(const void* src) {
  if constexpr (kBytes > 4 && kBytes % 16 == 0) {
    RawVector<kBytes> result;
#pragma unroll
    for (int i = 0; i < kBytes / 16; ++i) {
      const uint4 piece = __ldcs(static_cast<const uint4*>(src) + i);
      result.words[4 * i] = piece.x;
      result.words[4 * i + 1] = piece.y;
      result.words[4 * i + 2] = piece.z;
      result.words[4 * i + 3] = piece.w;
    }
    return result;
  } else {
    return load_raw<kBytes>(src);
  }
}

/// 16 bytes to global memory by one instruction. Of a plain store the compiler may make four where it does not find registers in a row.
__device__ __forceinline__ void store_global_16(void* dst, uint4 value) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};\n" ::"l"(dst), "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w) : "memory");
}

template <int kBytes>
__device__ __forceinline__ void store_raw(void* dst, const RawVector<kBytes>& value) {
  if constexpr (kBytes > 4 && kBytes % 16 == 0) {
#pragma unroll
    for (int i = 0; i < kBytes / 16; ++i)
      static_cast<uint4*>(dst)[i] = make_uint4(value.words[4 * i], value.words[4 * i + 1], value.words[4 * i + 2], value.words[4 * i + 3]);
  } else if constexpr (kBytes == 8) {
    *static_cast<uint2*>(dst) = make_uint2(value.words[0], value.words[1]);
  } else {
    *static_cast<RawVector<kBytes>*>(dst) = value;
  }
}

/// kCount elements of T in registers, in T's own width.
template <typename T, int kCount>
using Packed = RawVector<kCount* static_cast<int>(sizeof(T))>;

template <typename T, int kCount>
__device__ __forceinline__ Packed<T, kCount> load_packed(const T* src) {
  return load_raw<kCount* static_cast<int>(sizeof(T))>(src);
}

template <typename T, int kCount>
__device__ __forceinline__ void unpack(float (&dst)[kCount], const Packed<T, kCount>& src) {
  if constexpr (kCount == 1) {
    dst[0] = to_float<T>(*reinterpret_cast<const T*>(&src));
  } else {
#pragma unroll
    for (int i = 0; i < kCount / kElementsPerWord<T>; ++i) unpack_word<T>(dst + i * kElementsPerWord<T>, src.words[i]);
  }
}

template <typename T, int kCount>
__device__ __forceinline__ Packed<T, kCount> pack(const float (&src)[kCount]) {
  Packed<T, kCount> result;
  if constexpr (kCount == 1) {
    *reinterpret_cast<T*>(&result) = from_float<T>(src[0]);
  } else {
#pragma unroll
    for (int i = 0; i < kCount / kElementsPerWord<T>; ++i) result.words[i] = pack_word<T>(src + i * kElementsPerWord<T>);
  }
  return result;
}

/// kCount elements as float32. `src` is aligned to min(kCount * sizeof(T), 16) bytes.
template <typename T, int kCount>
__device__ __forceinline__ void load_floats(float (&dst)[kCount], const T* src) {
  unpack<T, kCount>(dst, load_packed<T, kCount>(src));
}

/// The reverse, rounded to T.
template <typename T, int kCount>
__device__ __forceinline__ void store_floats(T* dst, const float (&src)[kCount]) {
  store_raw(dst, pack<T, kCount>(src));
}

}  // namespace quire::cuda
