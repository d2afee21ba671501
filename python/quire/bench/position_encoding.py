"""Benchmarks of rotary position encoding, alone and with what is fused to it.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np

import quire
from quire._allocate import ITEM_BYTES, Array
from quire.bench.harness import Case, Context, Work
from quire.bench.peers import peers_of

__all__ = ["cases"]

_NUM_HEADS, _NUM_KV_HEADS, _HEAD_DIM, _BLOCK_SIZE = 32, 8, 128, 16


def cases(context: Context) -> Iterator[Case]:
    """T tokens with 32 query heads and 8 KV heads of 128, style neox."""
    grid = [16] if context.quick else [1, 16, 64, 4096, 16384] if context.is_cuda else [1, 64, 2048]
    for dtype in ("bfloat16",) if context.is_cuda else ("bfloat16", "float32"):
        for tokens in grid:
            numbers = tokens * (_NUM_HEADS + _NUM_KV_HEADS) * _HEAD_DIM
            yield Case(
                name=f"rotary_embedding T{tokens} {dtype}",
                prepare=partial(_prepare, context, tokens, dtype),
                num_bytes=2 * ITEM_BYTES[dtype] * numbers + tokens * (4 * _HEAD_DIM + 8),
                bound="copy",
                op="rotary_embedding",
            )
            yield Case(
                name=f"qk_norm_rope T{tokens} {dtype}",
                prepare=partial(_prepare_norm, context, tokens, dtype),
                num_bytes=2 * ITEM_BYTES[dtype] * numbers + tokens * (4 * _HEAD_DIM + 8),
                bound="copy",
                op="qk_norm_rope",
            )
    for cache_dtype in ("bfloat16", "float8_e4m3fn"):
        for norms in (False, True):
            for tokens in grid:
                per_token = (
                    2 * 2 * _NUM_HEADS * _HEAD_DIM
                    + 2 * (2 + ITEM_BYTES[cache_dtype]) * _NUM_KV_HEADS * _HEAD_DIM
                )
                yield Case(
                    name=f"rope_and_write_kv{' with norms' if norms else ''} T{tokens} bfloat16, cache {cache_dtype}",
                    prepare=partial(_prepare_write, context, tokens, cache_dtype, norms),
                    num_bytes=tokens * (per_token + 4 * _HEAD_DIM + 16),
                    bound="copy",
                    op="rope_and_write_kv",
                )


def _positions(context: Context, tokens: int) -> tuple[Array, Array]:
    """Random positions, and a table that has them."""
    max_position = max(tokens, 64)
    positions = np.random.default_rng(2).permutation(max_position)[:tokens].astype(np.int64)
    return context.arrays.put(positions), context.arrays.put(quire.rope_cache(_HEAD_DIM, max_position))


def _prepare_norm(context: Context, tokens: int, dtype: str) -> Work:
    arrays = context.arrays
    q = arrays.random((tokens, _NUM_HEADS, _HEAD_DIM), dtype)
    k = arrays.random((tokens, _NUM_KV_HEADS, _HEAD_DIM), dtype)
    weight = arrays.random((_HEAD_DIM,), dtype)
    positions, table = _positions(context, tokens)
    peers = peers_of(
        context,
        "qk_norm_rope",
        positions=positions,
        q=q,
        k=k,
        q_weight=weight,
        k_weight=weight,
        cos_sin_cache=table,
        eps=1e-6,
    )
    return Work(lambda: quire.qk_norm_rope(positions, q, k, weight, weight, table), peers)


def _prepare_write(context: Context, tokens: int, cache_dtype: str, norms: bool) -> Work:
    arrays = context.arrays
    q = arrays.random((tokens, _NUM_HEADS, _HEAD_DIM), "bfloat16")
    k, v = (arrays.random((tokens, _NUM_KV_HEADS, _HEAD_DIM), "bfloat16") for _ in range(2))
    weight = arrays.random((_HEAD_DIM,), "bfloat16") if norms else None
    positions, table = _positions(context, tokens)
    num_blocks = max(64, 2 * tokens // _BLOCK_SIZE)
    caches = [
        arrays.empty((num_blocks, _BLOCK_SIZE, _NUM_KV_HEADS, _HEAD_DIM), cache_dtype) for _ in range(2)
    ]
    slots = arrays.put(
        np.random.default_rng(3).permutation(num_blocks * _BLOCK_SIZE)[:tokens].astype(np.int64)
    )
    return Work(
        lambda: quire.rope_and_write_kv(
            positions, q, k, v, table, caches[0], caches[1], slots, q_weight=weight, k_weight=weight
        )
    )


def _prepare(context: Context, tokens: int, dtype: str) -> Work:
    arrays = context.arrays
    q = arrays.random((tokens, _NUM_HEADS, _HEAD_DIM), dtype)
    k = arrays.random((tokens, _NUM_KV_HEADS, _HEAD_DIM), dtype)
    positions, table = _positions(context, tokens)
    peers = peers_of(context, "rotary_embedding", positions=positions, q=q, k=k, cos_sin_cache=table)
    return Work(lambda: quire.rotary_embedding(positions, q, k, table), peers)
