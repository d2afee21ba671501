// What this build's code for the current device was compiled for, asked once per device. Host code only.
// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace quire::cuda {

/// Whether the device is a Hopper and its code was compiled for sm_90a: kernels with wgmma are empty in other code.
bool has_hopper_code();

/// Whether kernels wait for their predecessor (device/dependent_launch.cuh) where they say so. Code made from PTX of before sm_90 does not,
/// on whatever device; its kernels must not start early.
bool has_dependent_launch_code();

}  // namespace quire::cuda
