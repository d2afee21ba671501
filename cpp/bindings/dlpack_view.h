// Between DLPack's descriptions of tensors and TensorViews.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <dlpack/dlpack.h>

#include "quire/dtype.h"
#include "quire/tensor.h"

namespace quire::bindings {

DLDataType to_dlpack(DType dtype);

/// Throws for a dtype, rank, device or stride that is not ours, and for a tensor without data.
void fill_view(const char* op, const char* arg, const DLTensor& tensor, bool read_only, TensorView& view);

inline bool is_cuda(DLDeviceType type) { return type == kDLCUDA || type == kDLCUDAManaged; }
inline bool is_host(DLDeviceType type) { return type == kDLCPU || type == kDLCUDAHost; }
[[noreturn]] void throw_other_device(const char* op, const char* arg, DLDeviceType type);

}  // namespace quire::bindings
