// Host types of the 16-bit and 8-bit floats, with conversions that round to nearest even.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "quire/dtype.h"

namespace quire {

struct Half {
  std::uint16_t bits;
};
struct BFloat16 {
  std::uint16_t bits;
};
struct Float8E4M3FN {
  std::uint8_t bits;
};
struct Float8E5M2 {
  std::uint8_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(std::int8_t x) { return static_cast<float>(x); }
inline float to_float(BFloat16 x) { return std::bit_cast<float>(static_cast<std::uint32_t>(x.bits) << 16); }

inline float to_float(Half x) {
  const std::uint32_t sign = static_cast<std::uint32_t>(x.bits & 0x8000u) << 16;
  const std::uint32_t magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return std::bit_cast<float>(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  // Shifting the exponent and multiplying by 2^112 handles subnormals without a branch.
  const float scaled = std::bit_cast<float>(magnitude << 13) * 0x1p112f;
  return std::bit_cast<float>(sign | std::bit_cast<std::uint32_t>(scaled));
}

inline float to_float(Float8E4M3FN x) {
  const std::uint32_t sign = static_cast<std::uint32_t>(x.bits & 0x80u) << 24;
  const std::uint32_t magnitude = x.bits & 0x7fu;
  if (magnitude == 0x7fu) return std::bit_cast<float>(sign | 0x7fc00000u);
  const float scaled = std::bit_cast<float>(magnitude << 20) * 0x1p120f;
  return std::bit_cast<float>(sign | std::bit_cast<std::uint32_t>(scaled));
}

inline float to_float(Float8E5M2 x) { return to_float(Half{static_cast<std::uint16_t>(x.bits << 8)}); }

template <typename T>
T from_float(float x);

template <>
inline float from_float<float>(float x) {
  return x;
}

template <>
inline BFloat16 from_float<BFloat16>(float x) {
  std::uint32_t u = std::bit_cast<std::uint32_t>(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return BFloat16{static_cast<std::uint16_t>((u >> 16) | 0x40u)};
  u += 0x7fffu + ((u >> 16) & 1u);
  return BFloat16{static_cast<std::uint16_t>(u >> 16)};
}

template <>
inline Half from_float<Half>(float x) {
  const std::uint32_t u = std::bit_cast<std::uint32_t>(x);
  const std::uint32_t sign = (u >> 16) & 0x8000u;
  const std::uint32_t magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return Half{static_cast<std::uint16_t>(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return Half{static_cast<std::uint16_t>(sign | 0x7c00u)};  // rounds to 2^16 or more
  if (magnitude < 0x38800000u) {
    // Subnormal: adding 0.5 aligns the mantissa so that the FPU does the rounding.
    const float aligned = std::bit_cast<float>(magnitude) + 0.5f;
    return Half{static_cast<std::uint16_t>(sign | (std::bit_cast<std::uint32_t>(aligned) - 0x3f000000u))};
  }
  const std::uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return Half{static_cast<std::uint16_t>(sign | ((rounded - 0x38000000u) >> 13))};
}

namespace detail {

// Saturating conversion to an 8-bit float with kMantissa mantissa bits, exponent bias kBias and largest finite value kMax.
template <int kMantissa, int kBias, std::uint32_t kMaxBits, std::uint32_t kNanBits>
inline std::uint8_t float_to_fp8(float x, float max_finite) {
  const std::uint32_t u = std::bit_cast<std::uint32_t>(x);
  const std::uint32_t sign = (u >> 24) & 0x80u;
  std::uint32_t magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<std::uint8_t>(sign | kNanBits);
  if (std::bit_cast<float>(magnitude) >= max_finite) return static_cast<std::uint8_t>(sign | kMaxBits);
  constexpr int kShift = 23 - kMantissa;
  constexpr std::uint32_t kMinNormal = static_cast<std::uint32_t>(127 - kBias + 1) << 23;
  if (magnitude < kMinNormal) {
    // The ulp of `anchor` is the smallest subnormal of the target.
    constexpr std::uint32_t kAnchor = static_cast<std::uint32_t>(127 - kBias + 1 + kShift) << 23;
    const float aligned = std::bit_cast<float>(magnitude) + std::bit_cast<float>(kAnchor);
    return static_cast<std::uint8_t>(sign | (std::bit_cast<std::uint32_t>(aligned) - kAnchor));
  }
  magnitude += (1u << (kShift - 1)) - 1u + ((magnitude >> kShift) & 1u);
  magnitude -= static_cast<std::uint32_t>(127 - kBias) << 23;
  const std::uint32_t bits = magnitude >> kShift;
  return static_cast<std::uint8_t>(sign | (bits > kMaxBits ? kMaxBits : bits));
}

}  // namespace detail

/// Saturates to +-448; NaN stays NaN.
template <>
inline Float8E4M3FN from_float<Float8E4M3FN>(float x) {
  return Float8E4M3FN{detail::float_to_fp8<3, 7, 0x7eu, 0x7fu>(x, 448.0f)};
}

/// Saturates to +-57344; NaN stays NaN.
template <>
inline Float8E5M2 from_float<Float8E5M2>(float x) {
  return Float8E5M2{detail::float_to_fp8<2, 15, 0x7bu, 0x7eu>(x, 57344.0f)};
}

/// Saturates to [-128, 127]; NaN becomes 0.
template <>
inline std::int8_t from_float<std::int8_t>(float x) {
  if (std::isnan(x)) return 0;
  const float rounded = std::nearbyint(x);
  return static_cast<std::int8_t>(rounded < -128.0f ? -128.0f : rounded > 127.0f ? 127.0f : rounded);
}

/// The host type of a dtype.
template <DType>
struct HostTypeOf;
template <>
struct HostTypeOf<DType::kFloat32> {
  using type = float;
};
template <>
struct HostTypeOf<DType::kFloat16> {
  using type = Half;
};
template <>
struct HostTypeOf<DType::kBFloat16> {
  using type = BFloat16;
};
template <>
struct HostTypeOf<DType::kFloat8E4M3FN> {
  using type = Float8E4M3FN;
};
template <>
struct HostTypeOf<DType::kFloat8E5M2> {
  using type = Float8E5M2;
};
template <>
struct HostTypeOf<DType::kInt8> {
  using type = std::int8_t;
};
template <DType kDType>
using HostType = typename HostTypeOf<kDType>::type;

}  // namespace quire
