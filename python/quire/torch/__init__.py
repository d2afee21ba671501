"""quire inside PyTorch: eager calls go straight to the library; ``torch.compile`` and ``torch.export`` see them as ``quire::*`` operators.

SPDX-License-Identifier: Apache-2.0

The functions are quire's own, with the same arguments, results and exceptions. Outside a trace they cost no more. Traced, each is
an operator that declares what it writes, so that compilers keep, order and capture it. Gradients are not computed. Inside
``torch.autocast`` attention takes float32 queries, keys and values in the autocast dtype; the other ops compute in float32 and keep
their dtypes anyway.
"""

from quire.torch.activation import (
    gelu_and_mul,
    gelu_fast,
    gelu_new,
    gelu_quick,
    gelu_tanh_and_mul,
    relu_squared,
    silu_and_mul,
)
from quire.torch.attention import (
    attention,
    merge_attention,
    paged_attention,
    shared_prefix_attention,
)
from quire.torch.kv_cache import (
    copy_blocks,
    gather_kv,
    swap_blocks,
    write_kv,
)
from quire.torch.norm import (
    fused_add_rms_norm,
    layer_norm,
    rms_norm,
)
from quire.torch.position_encoding import (
    qk_norm_rope,
    rope_and_write_kv,
    rotary_embedding,
)
from quire.torch.quantization import (
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
    "swap_blocks",
    "write_kv",
]
