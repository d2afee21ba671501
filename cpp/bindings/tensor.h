// quire.Tensor: a tensor over memory of the core's own, handed to any framework through DLPack.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <memory>

#include "cuda/runtime.h"
#include "quire/runtime.h"
#include "quire/tensor.h"

namespace quire::bindings {

/// A view and a share in the memory that it looks at.
struct Tensor {
  TensorView view;
  std::shared_ptr<Buffer> buffer;
  std::shared_ptr<cuda::Marker> written{};  ///< What a stream that takes the tensor must wait for, or null.
};

}  // namespace quire::bindings
