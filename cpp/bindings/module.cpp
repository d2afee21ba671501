// The Python extension quire._core. The typed, documented API is in python/quire; this module has its raw entry points.
// SPDX-License-Identifier: Apache-2.0
#include <nanobind/nanobind.h>

#include "bindings/bindings.h"

NB_MODULE(_core, m) {
  using namespace quire::bindings;
  m.doc() = "Raw entry points of quire. Use the functions of the package quire instead.";
  bind_runtime(m);
  bind_tensor(m);
  bind_norm(m);
  bind_activation(m);
  bind_position_encoding(m);
  bind_kv_cache(m);
  bind_attention(m);
  bind_quantization(m);
  bind_block_allocator(m);
  bind_jax(m);
}
