// Whether this build has code of Hopper's own.
// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace quire::cuda {

/// Whether what runs on the current device, a Hopper, was compiled for sm_90a: kernels with wgmma are empty in other code.
bool has_hopper_code();

}  // namespace quire::cuda
