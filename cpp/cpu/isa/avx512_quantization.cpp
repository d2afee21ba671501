// Products with quantized operands for AVX-512 with VNNI.
// SPDX-License-Identifier: Apache-2.0
#if defined(__x86_64__)
#define QUIRE_ISA_NAMESPACE avx512
#define QUIRE_ISA_LEVEL 2

#include "cpu/isa/quantization_matmul.h"
#endif
