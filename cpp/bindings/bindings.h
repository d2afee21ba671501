// The families' binding functions, called by module.cpp.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <nanobind/nanobind.h>

namespace quire::bindings {

void bind_runtime(nanobind::module_& m);
void bind_tensor(nanobind::module_& m);
void bind_norm(nanobind::module_& m);
void bind_activation(nanobind::module_& m);
void bind_position_encoding(nanobind::module_& m);
void bind_kv_cache(nanobind::module_& m);
void bind_attention(nanobind::module_& m);
void bind_quantization(nanobind::module_& m);
void bind_block_allocator(nanobind::module_& m);
void bind_jax(nanobind::module_& m);

}  // namespace quire::bindings
