// Products with quantized operands for the baseline instruction set.
// SPDX-License-Identifier: Apache-2.0
#define QUIRE_ISA_NAMESPACE scalar
#define QUIRE_ISA_LEVEL 0

#include "cpu/isa/quantization_matmul.h"
