// The workspace that ops get when the caller passes none: grow-only, one per device and stream.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "quire/stream.h"
#include "quire/tensor.h"

namespace quire::bindings {

/// A uint8 workspace of at least num_bytes, or an empty view for 0. Call with the GIL held.
/// Smaller ones are kept when it grows, because a captured CUDA graph may still use them; sizes at least double, so all of them
/// together take less than twice the newest.
TensorView shared_workspace(std::int64_t num_bytes, Device device, Stream stream);

}  // namespace quire::bindings
