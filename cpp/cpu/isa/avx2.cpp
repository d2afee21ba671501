// The kernels of every family but attention, for AVX2, FMA and F16C.
// SPDX-License-Identifier: Apache-2.0
#if defined(__x86_64__)
#define QUIRE_ISA_NAMESPACE avx2
#define QUIRE_ISA_LEVEL 1

#include "cpu/isa/activation.h"
#include "cpu/isa/kv_cache.h"
#include "cpu/isa/norm.h"
#include "cpu/isa/position_encoding.h"
#include "cpu/isa/quantization.h"
#endif
