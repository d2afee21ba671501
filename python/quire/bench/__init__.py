"""`quire bench`: what the op families cost, beside their peers and the machine's measured ceilings.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

__all__ = ["FAMILIES", "BenchError"]

#: The families in the order of a full run. Each is a module here with ``cases(context) -> Iterator[Case]``
#: and, where its figures come to something, ``summary(results) -> list[str]``.
FAMILIES = {
    "border": "what a call costs before any arithmetic: importing tensors, one tiny op",
    "block_allocator": "the block allocator's hot paths",
    "norm": "rms_norm, fused_add_rms_norm, layer_norm",
    "activation": "gated activations",
    "position_encoding": "rotary embedding",
    "kv_cache": "writing, gathering and copying the paged cache",
    "attention": "paged decode and prefill",
    "quantization": "products with quantized weights and activations, quantizing",
    "ladder": "one attention, from a Python loop to the library's kernel; KV memory with and without paging",
}


class BenchError(Exception):
    """A mistake of whoever runs the benchmark; its text is one line."""
