"""`quire bench`: what the op families cost, beside their peers and the machine's measured ceilings.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

__all__ = ["FAMILIES", "BenchError", "description"]

#: The families in the order of a full run. Each is a module here with ``cases(context) -> Iterator[Case]``
#: and, where its figures come to something, ``summary(results) -> list[str]``.
FAMILIES = {
    "border": "what a call costs before any arithmetic: importing tensors, one tiny op",
    "block_allocator": "the block allocator's hot paths",
    "norm": "rms_norm, fused_add_rms_norm, layer_norm, also with quantized results",
    "activation": "gated activations, also with quantized results; plain ones",
    "position_encoding": "rotary_embedding, qk_norm_rope, rope_and_write_kv",
    "kv_cache": "writing, gathering, copying and swapping the paged cache",
    "attention": "paged decode, mixed batches and prefill, shared prefixes, merging",
    "quantization": "products with quantized weights and activations, quantizing and undoing it",
    "ladder": "one attention, from a Python loop to the library's kernel; KV memory with and without paging",
}


def description(docstring: str | None) -> str:
    """A module's docstring as the description of its program: without the licence line."""
    return (docstring or "").replace("SPDX-License-Identifier: Apache-2.0\n\n", "")


class BenchError(Exception):
    """A mistake of whoever runs the benchmark; its text is one line."""
