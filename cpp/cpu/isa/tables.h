// Every family's kernels, by instruction set: `<family>_kernels.active()` are those in use.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cpu/isa/activation.h"
#include "cpu/isa/attention.h"
#include "cpu/isa/dispatch.h"
#include "cpu/isa/kv_cache.h"
#include "cpu/isa/norm.h"
#include "cpu/isa/position_encoding.h"
#include "cpu/isa/quantization.h"
#include "cpu/isa/quantization_matmul.h"

namespace quire::cpu {

QUIRE_ISA_TABLES(ActivationKernels, activation_kernels);
QUIRE_ISA_TABLES(AttentionKernels, attention_kernels);
QUIRE_ISA_TABLES(AttentionBf16Kernels, attention_bf16_kernels);
QUIRE_ISA_TABLES(KvKernels, kv_kernels);
QUIRE_ISA_TABLES(NormKernels, norm_kernels);
QUIRE_ISA_TABLES(RotaryKernels, rotary_kernels);
QUIRE_ISA_TABLES(QuantizationKernels, quantization_kernels);
QUIRE_ISA_TABLES(QuantizedMatmulKernels, quantized_matmul_kernels);

}  // namespace quire::cpu
