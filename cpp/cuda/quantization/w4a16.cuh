// The layout of packed weights on CUDA, which is the order in which tensor cores take them, and the way from codes to 16-bit floats.
// SPDX-License-Identifier: Apache-2.0
//
// Codes lie in units of 16 output features ("rows" here) x 64 input features ("columns"): units [N / 64][K / 64][4], rounded up. In a unit, lane
// 4 group + quad of a warp has, for each of the four steps of 16 columns, the eight codes of its fragment of mma.sync's (and of a quarter of
// wgmma's) A operand. Code i = 0..3 of half h = 0, 1 belongs to row group + 8 (i % 2), column 16 step + 2 quad + h + 8 (i / 2).
//   4 bits: 16 bytes a lane; word `step` has code (i, h) at bit 4 i + 16 h.
//   8 bits: two blocks of 16 bytes a lane, for steps 0, 1 and 2, 3; word 2 (step % 2) + i / 2 has code (i, h) in byte 2 (i % 2) + h.
// Behind them scales, in entries [N / 64][groups][4][8]: an entry has the scales of rows `group` and `group + 8` of 16, each of 16 or 32 bits, and
// where the weight has zeros these two, of 16 bits each; after scales of 32 bits and zeros, 4 bytes are unused. Groups of 32 columns are
// rounded up to an even number.
#pragma once

#include <cstdint>

#include "core/layout.h"
#include "cuda/device/mma.cuh"
#include "ops/quantization.h"

namespace quire::cuda::w4a16 {

constexpr int kUnitRows = 16;
constexpr int kUnitColumns = 64;
constexpr int kBlockUnits = 4;
constexpr int kBlockRows = kBlockUnits * kUnitRows;

QUIRE_HOST_DEVICE constexpr int unit_bytes(int bits) { return kUnitRows * kUnitColumns * bits / 8; }

/// Where things of a packed weight are.
struct Layout {
  const std::uint8_t* codes = nullptr;
  const std::uint8_t* scales = nullptr;
  std::int64_t num_blocks = 0;  // of 64 rows
  std::int64_t num_bytes = 0;
  int num_steps = 0;  // units along K
  int num_groups = 0;
  int group_size = 0;  // 32, 64, 128, or 0: all columns
  int bits = 4;  // 4 or 8
  int entry_bytes = 4;
  DType scale_dtype = DType::kFloat16;
  bool has_zeros = false;

  Layout() = default;
  Layout(const void* data, const WeightFormat& format)
      : num_blocks(ceil_div(format.out_features, kBlockRows)),
        num_steps(static_cast<int>(ceil_div(format.num_rows, kUnitColumns))),
        group_size(static_cast<int>(format.group_size)),
        bits(format.stored_bits()),
        entry_bytes(format.scale_dtype == DType::kFloat32 ? (format.has_zeros ? 16 : 8) : (format.has_zeros ? 8 : 4)),
        scale_dtype(format.scale_dtype),
        has_zeros(format.has_zeros) {
    num_groups = group_size == 0 ? 1 : group_size == 32 ? 2 * num_steps : static_cast<int>(ceil_div(num_steps, group_size / kUnitColumns));
    codes = static_cast<const std::uint8_t*>(data);
    const std::int64_t code_bytes = num_blocks * num_steps * kBlockUnits * unit_bytes(bits);
    scales = codes + code_bytes;
    num_bytes = code_bytes + num_blocks * num_groups * kBlockUnits * 8 * entry_bytes;
  }

  /// k >> group_shift() is the group of the unit k, where groups are not of 32.
  int group_shift() const { return group_size == 0 ? 31 : group_size == 128 ? 1 : 0; }
  QUIRE_HOST_DEVICE std::int64_t unit_offset(std::int64_t unit, std::int64_t step) const {
    return ((unit / kBlockUnits * num_steps + step) * kBlockUnits + unit % kBlockUnits) * unit_bytes(bits);
  }
  QUIRE_HOST_DEVICE std::int64_t entry_offset(std::int64_t unit, std::int64_t group) const {
    return ((unit / kBlockUnits * num_groups + group) * kBlockUnits + unit % kBlockUnits) * 8 * entry_bytes;
  }
};

/// (a & mask) | b in one instruction.
__device__ __forceinline__ std::uint32_t mask_or(std::uint32_t a, std::uint32_t mask, std::uint32_t b) {
  std::uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;\n" : "=r"(result) : "r"(a), "r"(mask), "r"(b));
  return result;
}

template <bool kBf16>
__device__ __forceinline__ std::uint32_t fma_pair(std::uint32_t a, std::uint32_t b, std::uint32_t c) {
  std::uint32_t result;
  if constexpr (kBf16) {
    asm("fma.rn.bf16x2 %0, %1, %2, %3;\n" : "=r"(result) : "r"(a), "r"(b), "r"(c));
  } else {
    asm("fma.rn.f16x2 %0, %1, %2, %3;\n" : "=r"(result) : "r"(a), "r"(b), "r"(c));
  }
  return result;
}
template <bool kBf16>
__device__ __forceinline__ std::uint32_t add_pair(std::uint32_t a, std::uint32_t b) {
  if constexpr (kBf16) {
    return fma_pair<true>(a, 0x3f803f80u, b);  // bfloat16 has no add before sm_90
  } else {
    std::uint32_t result;
    asm("add.rn.f16x2 %0, %1, %2;\n" : "=r"(result) : "r"(a), "r"(b));
    return result;
  }
}

/// What takes a zero, and the offset that dequantize's trick brings, off a pair of codes of a unit's lower or upper eight rows.
template <int kBits, bool kBf16, bool kUpper>
__device__ __forceinline__ std::uint32_t zero_term(std::uint32_t zero) {
  if constexpr (kBits == 8 && kBf16) {
    return __float_as_uint(-8388608.0f - static_cast<float>(zero));
  } else if constexpr (kBf16) {
    return 0xc300c300u | zero | zero << 16;  // -(128 + zero)
  } else if constexpr (kBits == 4 && kUpper) {
    return 0xd400d400u | zero << 4 | zero << 20;  // -(64 + zero)
  } else {
    return 0xe400e400u | zero | zero << 16;  // -(1024 + zero)
  }
}

/// The fragment of step kStep, less zeros: integers that both types hold exactly. A logical operation puts codes into the mantissas of 1024
/// (float16) or 128 (bfloat16), or of 2^23; the terms take that off together with the zero.
template <int kBits, bool kBf16, int kStep>
__device__ __forceinline__ void dequantize(std::uint32_t (&a)[4], const std::uint32_t* words, std::uint32_t lower, std::uint32_t upper) {
  if constexpr (kBits == 4 && kBf16) {
    const std::uint32_t w = words[kStep];
    a[0] = add_pair<true>(mask_or(w, 0x000f000fu, 0x43004300u), lower);
    a[1] = add_pair<true>(mask_or(w >> 4, 0x000f000fu, 0x43004300u), upper);
    a[2] = add_pair<true>(mask_or(w >> 8, 0x000f000fu, 0x43004300u), lower);
    a[3] = add_pair<true>(mask_or(w >> 12, 0x000f000fu, 0x43004300u), upper);
  } else if constexpr (kBits == 4) {
    const std::uint32_t w = words[kStep];
    a[0] = add_pair<false>(mask_or(w, 0x000f000fu, 0x64006400u), lower);
    a[1] = fma_pair<false>(mask_or(w, 0x00f000f0u, 0x64006400u), 0x2c002c00u, upper);  // times 1/16
    a[2] = add_pair<false>(mask_or(w >> 8, 0x000f000fu, 0x64006400u), lower);
    a[3] = fma_pair<false>(mask_or(w >> 8, 0x00f000f0u, 0x64006400u), 0x2c002c00u, upper);
  } else {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const std::uint32_t w = words[2 * kStep + j];
      if constexpr (kBf16) {
        // A difference of up to eight bits is in the upper half of its float.
        const auto value = [w](unsigned selector, std::uint32_t term) {
          return __float_as_uint(__uint_as_float(__byte_perm(w, 0x4b000000u, selector)) + __uint_as_float(term));
        };
        a[2 * j] = __byte_perm(value(0x7440, lower), value(0x7441, lower), 0x7632);
        a[2 * j + 1] = __byte_perm(value(0x7442, upper), value(0x7443, upper), 0x7632);
      } else {
        a[2 * j] = add_pair<false>(__byte_perm(w, 0x64646464u, 0x5150), lower);
        a[2 * j + 1] = add_pair<false>(__byte_perm(w, 0x64646464u, 0x5352), upper);
      }
    }
  }
}

/// What an entry has.
enum class Entry {
  kScales,  ///< Two scales of 16 bits.
  kZeros,  ///< And two zeros.
  kFloat,  ///< Two scales of 32 bits, and zeros if the layout has them.
};

inline Entry entry_of(const Layout& layout) {
  return layout.scale_dtype == DType::kFloat32 ? Entry::kFloat : layout.has_zeros ? Entry::kZeros : Entry::kScales;
}

/// The scales and zeros of a lane's two rows.
struct RowPair {
  float scale[2];
  std::uint32_t zero[2];
};

template <Entry kEntry, int kBits>
__device__ __forceinline__ RowPair load_entry(const std::uint8_t* entry, const Layout& layout) {
  RowPair rows;
  rows.zero[0] = rows.zero[1] = kBits == 4 ? 8 : 128;
  if constexpr (kEntry == Entry::kFloat) {
    const float2 pair = *reinterpret_cast<const float2*>(entry);
    rows.scale[0] = pair.x;
    rows.scale[1] = pair.y;
  } else {
    const std::uint32_t pair = *reinterpret_cast<const std::uint32_t*>(entry);
    const float2 halves = __half22float2(*reinterpret_cast<const __half2*>(&pair));
    const bool bf16 = layout.scale_dtype == DType::kBFloat16;
    rows.scale[0] = bf16 ? __uint_as_float(pair << 16) : halves.x;
    rows.scale[1] = bf16 ? __uint_as_float(pair & 0xffff0000u) : halves.y;
  }
  if (kEntry == Entry::kZeros || (kEntry == Entry::kFloat && layout.has_zeros)) {
    const std::uint32_t zeros = *reinterpret_cast<const std::uint32_t*>(entry + (kEntry == Entry::kFloat ? 8 : 4));
    rows.zero[0] = zeros & 0xffffu;
    rows.zero[1] = zeros >> 16;
  }
  return rows;
}

}  // namespace quire::cuda::w4a16
