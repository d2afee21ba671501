// How a configured attention call reaches its kernel; launch_mma and launch_split_keys have one translation unit per dtype.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "quire/dtype.h"
#include "quire/stream.h"

namespace quire {
struct AttentionParams;
}

namespace quire::cuda::attn {

struct Plan;
struct Config;

/// Launches the kernels for `config`, which is choose_config's or one that asks for no more workspace.
void launch(const AttentionParams& params, const Config& config, Stream stream);

/// Launches config's variant, one of whole rows, for K and V of kKvDType and the padded kHeadDim.
template <DType kKvDType, int kHeadDim>
void launch_mma(const Plan& plan, const Config& config, Stream stream);
/// Launches config's variant, one that shares keys, for K and V of kKvDType.
template <DType kKvDType>
void launch_split_keys(const Plan& plan, const Config& config, Stream stream);
/// Launches Hopper's kernel for queries of kQ: 16 bits, or float8_e4m3fn. Keys and values are of it too, or kNarrowKv: of 8 bits.
template <DType kQ, bool kNarrowKv, int kHeadDim>
void launch_wgmma(const Plan& plan, const Config& config, Stream stream);
template <DType kKvDType>
void launch_simt(const Plan& plan, const Config& config, Stream stream);

}  // namespace quire::cuda::attn
