"""quire: kernels for LLM inference on any DLPack tensor, on CPU and CUDA.

SPDX-License-Identifier: Apache-2.0
"""

import os
import sys
from typing import TYPE_CHECKING


def _is_doctor() -> bool:
    """Whether this is `python -m quire doctor` or `quire doctor`, told from other programs that take a `doctor`."""
    if sys.argv[1:2] != ["doctor"]:
        return False
    # Where the interpreter's own arguments end: the module's name, or "-m" and the name in one, or the script.
    (program,) = sys.orig_argv[-len(sys.argv) :][:1] or [""]
    if sys.argv[0] == "-m":
        return program == "quire" or (program.startswith("-") and program.endswith("mquire"))
    return program == sys.argv[0] and os.path.basename(program) in ("quire", "quire.exe")


# `quire doctor` must run, and say why, also where nothing below can be loaded, or crashes when it is. There, and only
# there, it waits for the first use, and an ImportError comes then.
_deferred = "_deferred" not in globals() and _is_doctor()

if _deferred:
    if not TYPE_CHECKING:

        def __getattr__(name: str) -> object:
            if name not in __all__:
                raise AttributeError(f"module 'quire' has no attribute {name!r}")
            import importlib

            return getattr(importlib.reload(sys.modules[__name__]), name)

else:
    from quire._core import (
        CudaError,
        Tensor,
        UnsupportedError,
        check_errors,
        cpu_isa,
        cuda_architectures,
        empty,
        has_cuda,
        num_cuda_devices,
        num_threads,
        set_num_threads,
    )
    from quire._core import version as _version
    from quire.activation import (
        gelu_and_mul,
        gelu_fast,
        gelu_new,
        gelu_quick,
        gelu_tanh_and_mul,
        relu_squared,
        silu_and_mul,
    )
    from quire.attention import (
        attention,
        attention_workspace_size,
        merge_attention,
        paged_attention,
        paged_attention_workspace_size,
        shared_prefix_attention,
        shared_prefix_attention_workspace_size,
    )
    from quire.block_allocator import BlockAllocator, OutOfBlocksError
    from quire.explain import Explanation, explain
    from quire.kv_cache import (
        KVBlocks,
        KVCache,
        KVCacheDescription,
        copy_blocks,
        gather_kv,
        swap_blocks,
        write_kv,
    )
    from quire.norm import fused_add_rms_norm, layer_norm, rms_norm
    from quire.position_encoding import qk_norm_rope, rope_and_write_kv, rope_cache, rotary_embedding
    from quire.quantization import (
        PackedWeight,
        dequantize_fp8,
        dequantize_int8,
        quantize_fp8,
        quantize_int8,
        quantized_matmul,
        quantized_matmul_workspace_size,
        scaled_matmul,
        scaled_matmul_workspace_size,
    )

    __version__ = _version()

__all__ = [
    "BlockAllocator",
    "CudaError",
    "Explanation",
    "KVBlocks",
    "KVCache",
    "KVCacheDescription",
    "OutOfBlocksError",
    "PackedWeight",
    "Tensor",
    "UnsupportedError",
    "__version__",
    "attention",
    "attention_workspace_size",
    "check_errors",
    "copy_blocks",
    "cpu_isa",
    "cuda_architectures",
    "dequantize_fp8",
    "dequantize_int8",
    "empty",
    "explain",
    "fused_add_rms_norm",
    "gather_kv",
    "gelu_and_mul",
    "gelu_fast",
    "gelu_new",
    "gelu_quick",
    "gelu_tanh_and_mul",
    "has_cuda",
    "layer_norm",
    "merge_attention",
    "num_cuda_devices",
    "num_threads",
    "paged_attention",
    "paged_attention_workspace_size",
    "qk_norm_rope",
    "quantize_fp8",
    "quantize_int8",
    "quantized_matmul",
    "quantized_matmul_workspace_size",
    "relu_squared",
    "rms_norm",
    "rope_and_write_kv",
    "rope_cache",
    "rotary_embedding",
    "scaled_matmul",
    "scaled_matmul_workspace_size",
    "set_num_threads",
    "shared_prefix_attention",
    "shared_prefix_attention_workspace_size",
    "silu_and_mul",
    "swap_blocks",
    "write_kv",
]
