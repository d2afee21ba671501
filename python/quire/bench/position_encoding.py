"""Benchmarks of rotary position encoding.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np

import quire
from quire.bench.harness import Case, Context, Work
from quire.bench.peers import peers_of

__all__ = ["cases"]

_NUM_HEADS, _NUM_KV_HEADS, _HEAD_DIM = 32, 8, 128


def cases(context: Context) -> Iterator[Case]:
    """T tokens with 32 query heads and 8 KV heads of 128, style neox."""
    grid = [16] if context.quick else [1, 64, 4096, 16384] if context.is_cuda else [1, 64, 2048]
    for dtype, item_bytes in (("bfloat16", 2),) if context.is_cuda else (("bfloat16", 2), ("float32", 4)):
        for tokens in grid:
            numbers = tokens * (_NUM_HEADS + _NUM_KV_HEADS) * _HEAD_DIM
            yield Case(
                name=f"rotary_embedding T{tokens} {dtype}",
                prepare=partial(_prepare, context, tokens, dtype),
                num_bytes=2 * item_bytes * numbers + tokens * (4 * _HEAD_DIM + 8),
                bound="copy",
                op="rotary_embedding",
            )


def _prepare(context: Context, tokens: int, dtype: str) -> Work:
    arrays = context.arrays
    q = arrays.random((tokens, _NUM_HEADS, _HEAD_DIM), dtype)
    k = arrays.random((tokens, _NUM_KV_HEADS, _HEAD_DIM), dtype)
    max_position = max(tokens, 64)
    table = arrays.put(quire.rope_cache(_HEAD_DIM, max_position))
    positions = arrays.put(np.random.default_rng(2).permutation(max_position)[:tokens].astype(np.int64))
    peers = peers_of(context, "rotary_embedding", positions=positions, q=q, k=k, cos_sin_cache=table)
    return Work(lambda: quire.rotary_embedding(positions, q, k, table), peers)
