// The kernels of every family but attention, for the baseline instruction set.
// SPDX-License-Identifier: Apache-2.0
#define QUIRE_ISA_NAMESPACE scalar
#define QUIRE_ISA_LEVEL 0

#include "cpu/isa/activation.h"
#include "cpu/isa/kv_cache.h"
#include "cpu/isa/norm.h"
#include "cpu/isa/position_encoding.h"
#include "cpu/isa/quantization.h"
