// Attention kernels for AVX-512 with BF16.
// SPDX-License-Identifier: Apache-2.0
#if defined(__x86_64__)
#define QUIRE_ISA_NAMESPACE avx512
#define QUIRE_ISA_LEVEL 2

#include "cpu/isa/attention_bf16.h"
#include "cpu/isa/attention_tables.h"

namespace quire::cpu::avx512 {
extern const AttentionBf16Kernels attention_bf16_kernels;
const AttentionBf16Kernels attention_bf16_kernels = kBf16Kernels<Bf16Engine>;
}  // namespace quire::cpu::avx512
#endif
