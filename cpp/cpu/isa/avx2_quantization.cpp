// Products with quantized operands for AVX2, FMA and F16C.
// SPDX-License-Identifier: Apache-2.0
#if defined(__x86_64__)
#define QUIRE_ISA_NAMESPACE avx2
#define QUIRE_ISA_LEVEL 1

#include "cpu/isa/quantization_matmul.h"
#endif
