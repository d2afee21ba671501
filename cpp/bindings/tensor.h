// quire.Tensor: a tensor over memory of the core's own, handed to any framework through DLPack.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <memory>

#include "quire/runtime.h"
#include "quire/tensor.h"

namespace quire::bindings {

/// A view and a share in the memory that it looks at.
struct Tensor {
  TensorView view;
  std::shared_ptr<Buffer> buffer;
};

}  // namespace quire::bindings
