// Conversions between float32 and the narrower element types, one element or one 32-bit word at a time.
// SPDX-License-Identifier: Apache-2.0
//
// Narrowing rounds to nearest even. The 8-bit types saturate; fp8 keeps NaN, int8 turns it into 0.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>

namespace quire::cuda {

/// Elements of T in a 32-bit word.
template <typename T>
inline constexpr int kElementsPerWord = 4 / static_cast<int>(sizeof(T));

namespace detail {

// Without branches: where hardware does not convert, this is in many places many times.
template <int kMantissa, int kBias>
__device__ __forceinline__ std::uint32_t float_to_fp8_bits(float x, float max_finite) {
  const std::uint32_t sign = (__float_as_uint(x) >> 24) & 0x80u;
  const float magnitude = fminf(fabsf(x), max_finite);
  const std::uint32_t u = __float_as_uint(magnitude);
  constexpr int kShift = 23 - kMantissa;
  constexpr std::uint32_t kMinNormal = static_cast<std::uint32_t>(127 - kBias + 1) << 23;
  // Below the normal numbers the ulp of the anchor is the target's smallest subnormal, so that the addition does the rounding.
  constexpr std::uint32_t kAnchor = static_cast<std::uint32_t>(127 - kBias + 1 + kShift) << 23;
  const std::uint32_t subnormal = __float_as_uint(magnitude + __uint_as_float(kAnchor)) - kAnchor;
  const std::uint32_t even = (u >> kShift) & 1u;
  const std::uint32_t normal = (u + ((1u << (kShift - 1)) - 1u - (static_cast<std::uint32_t>(127 - kBias) << 23)) + even) >> kShift;
  const std::uint32_t bits = sign | (u < kMinNormal ? subnormal : normal);
  return isnan(x) ? 0x7fu : bits;
}

__device__ __forceinline__ float2 half2_bits_to_float2(std::uint32_t bits) {
  return __half22float2(*reinterpret_cast<const __half2*>(&bits));
}

}  // namespace detail

/// Two e4m3 elements as two float16, which hold them exactly; the first is in the low half.
__device__ __forceinline__ std::uint32_t e4m3x2_to_half2_bits(std::uint32_t pair) {
#if __CUDA_ARCH__ >= 890
  std::uint32_t bits;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(bits) : "h"(static_cast<std::uint16_t>(pair)));
  return bits;
#else
  // Shifted into float16's fields the value is 2^8 too small (biases 7 and 15); NaN has no such pattern and is put in by hand.
  std::uint32_t bits = ((pair & 0x7fu) << 7) | ((pair & 0x80u) << 8) | ((pair & 0x7f00u) << 15) | ((pair & 0x8000u) << 16);
  const __half2 scaled = __hmul2(*reinterpret_cast<const __half2*>(&bits), __float2half2_rn(256.0f));
  bits = *reinterpret_cast<const std::uint32_t*>(&scaled);
  if ((pair & 0x7fu) == 0x7fu) bits = (bits & 0xffff0000u) | 0x7fffu;
  if ((pair & 0x7f00u) == 0x7f00u) bits = (bits & 0xffffu) | 0x7fff0000u;
  return bits;
#endif
}

/// Two e5m2 elements as two float16; e5m2 is float16 with its low byte cut off.
__device__ __forceinline__ std::uint32_t e5m2x2_to_half2_bits(std::uint32_t pair) { return __byte_perm(pair, 0u, 0x1404); }

/// The elements of one 32-bit word as float32; the first is in the low bits.
template <typename T>
__device__ __forceinline__ void unpack_word(float* dst, std::uint32_t word);

template <>
__device__ __forceinline__ void unpack_word<float>(float* dst, std::uint32_t word) {
  dst[0] = __uint_as_float(word);
}

template <>
__device__ __forceinline__ void unpack_word<__half>(float* dst, std::uint32_t word) {
  const float2 pair = detail::half2_bits_to_float2(word);
  dst[0] = pair.x;
  dst[1] = pair.y;
}

template <>
__device__ __forceinline__ void unpack_word<__nv_bfloat16>(float* dst, std::uint32_t word) {
  dst[0] = __uint_as_float(word << 16);
  dst[1] = __uint_as_float(word & 0xffff0000u);
}

template <>
__device__ __forceinline__ void unpack_word<__nv_fp8_e4m3>(float* dst, std::uint32_t word) {
  const float2 low = detail::half2_bits_to_float2(e4m3x2_to_half2_bits(word & 0xffffu));
  const float2 high = detail::half2_bits_to_float2(e4m3x2_to_half2_bits(word >> 16));
  dst[0] = low.x;
  dst[1] = low.y;
  dst[2] = high.x;
  dst[3] = high.y;
}

template <>
__device__ __forceinline__ void unpack_word<__nv_fp8_e5m2>(float* dst, std::uint32_t word) {
  const float2 low = detail::half2_bits_to_float2(e5m2x2_to_half2_bits(word & 0xffffu));
  const float2 high = detail::half2_bits_to_float2(e5m2x2_to_half2_bits(word >> 16));
  dst[0] = low.x;
  dst[1] = low.y;
  dst[2] = high.x;
  dst[3] = high.y;
}

template <>
__device__ __forceinline__ void unpack_word<std::int8_t>(float* dst, std::uint32_t word) {
  // A byte put into the mantissa of 2^23 is exact and costs a permute and a subtraction; I2F runs at a quarter of that rate.
  const std::uint32_t biased = word ^ 0x80808080u;
  constexpr float kOffset = 8388608.0f + 128.0f;
  dst[0] = __uint_as_float(__byte_perm(biased, 0x4b000000u, 0x7540)) - kOffset;
  dst[1] = __uint_as_float(__byte_perm(biased, 0x4b000000u, 0x7541)) - kOffset;
  dst[2] = __uint_as_float(__byte_perm(biased, 0x4b000000u, 0x7542)) - kOffset;
  dst[3] = __uint_as_float(__byte_perm(biased, 0x4b000000u, 0x7543)) - kOffset;
}

/// Two floats as two fp8 elements, the first in the low byte.
template <typename T>
__device__ __forceinline__ std::uint32_t pack_fp8x2(float first, float second);

template <>
__device__ __forceinline__ std::uint32_t pack_fp8x2<__nv_fp8_e4m3>(float first, float second) {
#if __CUDA_ARCH__ >= 890
  std::uint16_t bits;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(bits) : "f"(second), "f"(first));
  return bits;
#else
  return detail::float_to_fp8_bits<3, 7>(first, 448.0f) | (detail::float_to_fp8_bits<3, 7>(second, 448.0f) << 8);
#endif
}

template <>
__device__ __forceinline__ std::uint32_t pack_fp8x2<__nv_fp8_e5m2>(float first, float second) {
#if __CUDA_ARCH__ >= 890
  std::uint16_t bits;
  asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(bits) : "f"(second), "f"(first));
  return bits;
#else
  return detail::float_to_fp8_bits<2, 15>(first, 57344.0f) | (detail::float_to_fp8_bits<2, 15>(second, 57344.0f) << 8);
#endif
}

namespace detail {

/// The low byte is the result. Float to integer conversion saturates and turns NaN into 0.
__device__ __forceinline__ std::uint32_t float_to_int8_bits(float x) {
  std::int32_t value;
  asm("cvt.rni.sat.s8.f32 %0, %1;" : "=r"(value) : "f"(x));
  return static_cast<std::uint32_t>(value);
}

}  // namespace detail

/// The reverse of unpack_word.
template <typename T>
__device__ __forceinline__ std::uint32_t pack_word(const float* src);

template <>
__device__ __forceinline__ std::uint32_t pack_word<float>(const float* src) {
  return __float_as_uint(src[0]);
}

template <>
__device__ __forceinline__ std::uint32_t pack_word<__half>(const float* src) {
  const __half2 pair = __floats2half2_rn(src[0], src[1]);
  return *reinterpret_cast<const std::uint32_t*>(&pair);
}

template <>
__device__ __forceinline__ std::uint32_t pack_word<__nv_bfloat16>(const float* src) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(src[0], src[1]);
  return *reinterpret_cast<const std::uint32_t*>(&pair);
}

template <>
__device__ __forceinline__ std::uint32_t pack_word<__nv_fp8_e4m3>(const float* src) {
  return pack_fp8x2<__nv_fp8_e4m3>(src[0], src[1]) | (pack_fp8x2<__nv_fp8_e4m3>(src[2], src[3]) << 16);
}

template <>
__device__ __forceinline__ std::uint32_t pack_word<__nv_fp8_e5m2>(const float* src) {
  return pack_fp8x2<__nv_fp8_e5m2>(src[0], src[1]) | (pack_fp8x2<__nv_fp8_e5m2>(src[2], src[3]) << 16);
}

template <>
__device__ __forceinline__ std::uint32_t pack_word<std::int8_t>(const float* src) {
  const std::uint32_t low = __byte_perm(detail::float_to_int8_bits(src[0]), detail::float_to_int8_bits(src[1]), 0x0040);
  const std::uint32_t high = __byte_perm(detail::float_to_int8_bits(src[2]), detail::float_to_int8_bits(src[3]), 0x0040);
  return __byte_perm(low, high, 0x5410);
}

/// One element as float32.
template <typename T>
__device__ __forceinline__ float to_float(T x);

template <>
__device__ __forceinline__ float to_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ float to_float<__half>(__half x) {
  return __half2float(x);
}
template <>
__device__ __forceinline__ float to_float<__nv_bfloat16>(__nv_bfloat16 x) {
  return __bfloat162float(x);
}
template <>
__device__ __forceinline__ float to_float<__nv_fp8_e4m3>(__nv_fp8_e4m3 x) {
  return detail::half2_bits_to_float2(e4m3x2_to_half2_bits(x.__x)).x;
}
template <>
__device__ __forceinline__ float to_float<__nv_fp8_e5m2>(__nv_fp8_e5m2 x) {
  return detail::half2_bits_to_float2(e5m2x2_to_half2_bits(x.__x)).x;
}
template <>
__device__ __forceinline__ float to_float<std::int8_t>(std::int8_t x) {
  return static_cast<float>(x);
}

/// One float32 as an element.
template <typename T>
__device__ __forceinline__ T from_float(float x);

template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __nv_fp8_e4m3 from_float<__nv_fp8_e4m3>(float x) {
  __nv_fp8_e4m3 result;
  result.__x = static_cast<__nv_fp8_storage_t>(pack_fp8x2<__nv_fp8_e4m3>(x, 0.0f) & 0xffu);
  return result;
}
template <>
__device__ __forceinline__ __nv_fp8_e5m2 from_float<__nv_fp8_e5m2>(float x) {
  __nv_fp8_e5m2 result;
  result.__x = static_cast<__nv_fp8_storage_t>(pack_fp8x2<__nv_fp8_e5m2>(x, 0.0f) & 0xffu);
  return result;
}
template <>
__device__ __forceinline__ std::int8_t from_float<std::int8_t>(float x) {
  return static_cast<std::int8_t>(detail::float_to_int8_bits(x) & 0xffu);
}

}  // namespace quire::cuda
