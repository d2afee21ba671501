// The engine of prefill with bfloat16 operands: what AVX-512 and AMX share, and the former's matrix product.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cpu/isa/attention_prefill.h"

namespace quire::cpu::QUIRE_ISA_NAMESPACE {

/// Operands in bfloat16, sums in float. Every element of the 8-bit kv dtypes is exact in bfloat16.
struct Bf16Operands {
  static constexpr int kWordElements = 2;

  static QUIRE_INLINE void load_query_words(const AttentionParams& p, std::int64_t token, std::int64_t head, std::uint32_t* out,
                                            std::int64_t num_words) {
    const BFloat16* q = static_cast<const BFloat16*>(p.q) + token * p.q_token_stride + head * p.q_head_stride;
    __builtin_memset(out, 0, static_cast<std::size_t>(num_words) * sizeof(*out));
    __builtin_memcpy(out, q, static_cast<std::size_t>(p.head_dim) * sizeof(*q));
  }
  static QUIRE_INLINE Bits load_words(const BFloat16* row, int n) { return detail::load32(row, n); }
  template <typename KvT>
  static QUIRE_INLINE Bits load_words(const KvT* row, int n) {
    alignas(64) BFloat16 words[2 * kLanes];
    const int low = smaller(2 * n, kLanes), high = 2 * n - low;
    store(words, low > 0 ? load(row, low) : zero());
    store(words + kLanes, high > 0 ? load(row + kLanes, high) : zero());
    return detail::load32(words);
  }
  /// Word d holds v0[d] and v1[d].
  static QUIRE_INLINE Bits join(Vec v0, Vec v1) { return shift_right<16>(bits(v0)) | (bits(v1) & set1_bits(0xffff0000u)); }

  static QUIRE_INLINE std::uint32_t* weight_row(float*, std::uint32_t* weights) { return weights; }
  static QUIRE_INLINE Vec put_weights(std::uint32_t* row, int column, Vec weights) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(row + column / 2), (__m256i)_mm512_cvtneps_pbh(weights.v));
    return weights;
  }
  static QUIRE_INLINE float weight(const std::uint32_t* row, int column) {
    const std::uint32_t word = row[column / 2];
    return __builtin_bit_cast(float, column % 2 == 0 ? word << 16 : word & 0xffff0000u);
  }
};

struct Bf16Engine : Bf16Operands {
  static constexpr int kRowStep = 8;
  static constexpr int kWordStep = 1;

  static QUIRE_INLINE void begin() {}
  static QUIRE_INLINE void end() {}
  static QUIRE_INLINE Vec multiply_add(Bits a, Bits b, Vec sum) { return {_mm512_dpbf16_ps(sum.v, (__m512bh)a.v, (__m512bh)b.v)}; }

  template <bool kAdd>
  static void multiply(const std::uint32_t* a, std::int64_t a_stride, int num_rows, const std::uint32_t* b, std::int64_t panel_stride,
                       int num_panels, int num_words, float* c, std::int64_t c_stride) {
    multiply_in_registers<Bf16Engine, kAdd>(a, a_stride, num_rows, b, panel_stride, num_panels, num_words, c, c_stride);
  }
};

template <typename Engine>
inline constexpr AttentionBf16Kernels kBf16Kernels = {
    {{}, {}, kPrefill<Engine, BFloat16>, kPrefill<Engine, Float8E4M3FN>, kPrefill<Engine, Float8E5M2>, kPrefill<Engine, std::int8_t>}};

}  // namespace quire::cpu::QUIRE_ISA_NAMESPACE
