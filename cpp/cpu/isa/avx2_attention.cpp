// Attention kernels for AVX2.
// SPDX-License-Identifier: Apache-2.0
#if defined(__x86_64__)
#define QUIRE_ISA_NAMESPACE avx2
#define QUIRE_ISA_LEVEL 1

#include "cpu/isa/attention_tables.h"

namespace quire::cpu::avx2 {
extern const AttentionBf16Kernels attention_bf16_kernels;
const AttentionBf16Kernels attention_bf16_kernels = kFloatBf16Kernels;
}  // namespace quire::cpu::avx2
#endif
