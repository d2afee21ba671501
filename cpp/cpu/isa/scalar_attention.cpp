// Attention kernels for any machine.
// SPDX-License-Identifier: Apache-2.0
#define QUIRE_ISA_NAMESPACE scalar
#define QUIRE_ISA_LEVEL 0

#include "cpu/isa/attention_tables.h"

namespace quire::cpu::scalar {
extern const AttentionBf16Kernels attention_bf16_kernels;
const AttentionBf16Kernels attention_bf16_kernels = kFloatBf16Kernels;
}  // namespace quire::cpu::scalar
