// The kernel tables of one instruction set without matrix instructions.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cpu/isa/attention_decode.h"
#include "cpu/isa/attention_prefill.h"

namespace quire::cpu::QUIRE_ISA_NAMESPACE {

template <typename KvT>
inline constexpr AttentionKernel kDecode = {decode<KvT>, decode_scratch_bytes};

extern const AttentionKernels attention_kernels;
const AttentionKernels attention_kernels = {
    {kDecode<float>, kDecode<Half>, kDecode<BFloat16>, kDecode<Float8E4M3FN>, kDecode<Float8E5M2>, kDecode<std::int8_t>},
    {kPrefill<FloatEngine, float>, kPrefill<FloatEngine, Half>, kPrefill<FloatEngine, BFloat16>, kPrefill<FloatEngine, Float8E4M3FN>,
     kPrefill<FloatEngine, Float8E5M2>, kPrefill<FloatEngine, std::int8_t>},
    merge_partials};

/// For instruction sets that multiply bfloat16 as floats.
inline constexpr AttentionBf16Kernels kFloatBf16Kernels = {{{},
                                                            {},
                                                            kPrefill<FloatEngine, BFloat16>,
                                                            kPrefill<FloatEngine, Float8E4M3FN>,
                                                            kPrefill<FloatEngine, Float8E5M2>,
                                                            kPrefill<FloatEngine, std::int8_t>}};

}  // namespace quire::cpu::QUIRE_ISA_NAMESPACE
