"""quire inside JAX: every op as an XLA FFI call, under ``jax.jit``, ``scan``, ``while_loop``, ``vmap`` and ``shard_map``.

SPDX-License-Identifier: Apache-2.0

The functions have the names and arguments of quire's own, less ``out``, ``workspace``, ``validate`` and ``stream``, which XLA sees
to. They return what quire's own write: a KV cache goes in and comes out. Inside ``jax.jit`` a cache that the caller donates is
written in place; outside it, the ops that write caches donate them themselves, so that the arrays that were passed are gone.
Shapes and dtypes are checked while tracing, by the library's own validation. Scalars and options are static.
"""

from quire.jax.activation import (
    gelu_and_mul,
    gelu_fast,
    gelu_new,
    gelu_quick,
    gelu_tanh_and_mul,
    relu_squared,
    silu_and_mul,
)
from quire.jax.attention import (
    attention,
    merge_attention,
    paged_attention,
    shared_prefix_attention,
)
from quire.jax.kv_cache import (
    copy_blocks,
    gather_kv,
    write_kv,
)
from quire.jax.norm import (
    fused_add_rms_norm,
    layer_norm,
    rms_norm,
)
from quire.jax.position_encoding import (
    qk_norm_rope,
    rope_and_write_kv,
    rotary_embedding,
)
from quire.jax.quantization import (
    dequantize_fp8,
    dequantize_int8,
    quantize_fp8,
    quantize_int8,
    quantized_matmul,
    scaled_matmul,
)

__all__ = [
    "attention",
    "copy_blocks",
    "dequantize_fp8",
    "dequantize_int8",
    "fused_add_rms_norm",
    "gather_kv",
    "gelu_and_mul",
    "gelu_fast",
    "gelu_new",
    "gelu_quick",
    "gelu_tanh_and_mul",
    "layer_norm",
    "merge_attention",
    "paged_attention",
    "qk_norm_rope",
    "quantize_fp8",
    "quantize_int8",
    "quantized_matmul",
    "relu_squared",
    "rms_norm",
    "rope_and_write_kv",
    "rotary_embedding",
    "scaled_matmul",
    "shared_prefix_attention",
    "silu_and_mul",
    "write_kv",
]
