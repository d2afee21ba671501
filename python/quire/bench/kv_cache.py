"""Benchmarks of the ops on the paged KV cache.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np

import quire
from quire._allocate import ITEM_BYTES
from quire.bench.harness import Case, Context, Work
from quire.bench.peers import peers_of

__all__ = ["cases"]

_BLOCK_SIZE, _NUM_KV_HEADS, _HEAD_DIM = 16, 8, 128


def cases(context: Context) -> Iterator[Case]:
    """T tokens of 8 KV heads of 128 at random slots; whole blocks of 16 tokens."""
    grid = [16] if context.quick else [1, 16, 64, 4096, 16384] if context.is_cuda else [1, 64, 4096]
    numbers = 2 * _NUM_KV_HEADS * _HEAD_DIM  # K and V of a token
    for op, prepare in (("write_kv", _write_kv), ("gather_kv", _gather_kv)):
        for cache_dtype in ("bfloat16", "float8_e4m3fn"):
            for tokens in grid:
                yield Case(
                    name=f"{op} T{tokens} bfloat16, cache {cache_dtype}",
                    prepare=partial(prepare, context, tokens, cache_dtype),
                    num_bytes=tokens * (numbers * (2 + ITEM_BYTES[cache_dtype]) + 8),
                    bound="copy",
                    op=op,
                )
    for pairs in [2] if context.quick else [1, 64, 512, 1024]:
        yield Case(
            name=f"copy_blocks {pairs} blocks bfloat16",
            prepare=partial(_copy_blocks, context, pairs),
            num_bytes=pairs * (2 * 2 * _BLOCK_SIZE * _NUM_KV_HEADS * _HEAD_DIM + 16),
            bound="copy",
            op="copy_blocks",
        )
    if not context.is_cuda:
        return
    # (layers, blocks, KiB of each)
    sizes = (
        [(1, 2, 32)]
        if context.quick
        else [(1, 1024, 32), (1, 1024, 128), (1, 256, 512), (1, 64, 2048), (32, 64, 32)]
    )
    for to_device in (True, False):
        for layers, pairs, kib in sizes:
            yield Case(
                name=f"swap_blocks to {'the device' if to_device else 'pinned memory'}, {pairs} blocks of {kib} KiB"
                + (f", {layers} layers" if layers > 1 else ""),
                prepare=partial(_swap_blocks, context, to_device, (layers, pairs, kib)),
                num_bytes=2 * layers * pairs * kib * 1024,
                op="swap_blocks",
                unranked=("quire, one run",),
            )


def _slots(tokens: int) -> tuple[int, np.ndarray[tuple[int], np.dtype[np.int64]]]:
    num_blocks = max(64, 2 * tokens // _BLOCK_SIZE)
    slots = np.random.default_rng(3).permutation(num_blocks * _BLOCK_SIZE)[:tokens]
    return num_blocks, slots.astype(np.int64)


def _write_kv(context: Context, tokens: int, cache_dtype: str) -> Work:
    arrays = context.arrays
    num_blocks, slots = _slots(tokens)
    k, v = (arrays.random((tokens, _NUM_KV_HEADS, _HEAD_DIM), "bfloat16") for _ in range(2))
    shape = (num_blocks, _BLOCK_SIZE, _NUM_KV_HEADS, _HEAD_DIM)
    k_cache, v_cache = (arrays.empty(shape, cache_dtype) for _ in range(2))
    slot_mapping = arrays.put(slots)
    peers = peers_of(
        context, "write_kv", k=k, v=v, k_cache=k_cache, v_cache=v_cache, slot_mapping=slot_mapping
    )
    return Work(lambda: quire.write_kv(k, v, k_cache, v_cache, slot_mapping), peers)


def _gather_kv(context: Context, tokens: int, cache_dtype: str) -> Work:
    arrays = context.arrays
    num_blocks, slots = _slots(tokens)
    out = tuple(arrays.empty((tokens, _NUM_KV_HEADS, _HEAD_DIM), "bfloat16") for _ in range(2))
    shape = (num_blocks, _BLOCK_SIZE, _NUM_KV_HEADS, _HEAD_DIM)
    k_cache, v_cache = (arrays.random(shape, cache_dtype) for _ in range(2))
    slot_mapping = arrays.put(slots)
    peers = peers_of(
        context,
        "gather_kv",
        out_k=out[0],
        out_v=out[1],
        k_cache=k_cache,
        v_cache=v_cache,
        slot_mapping=slot_mapping,
    )
    return Work(lambda: quire.gather_kv(k_cache, v_cache, slot_mapping, out=(out[0], out[1])), peers)


def _copy_blocks(context: Context, pairs: int) -> Work:
    cache = context.arrays.random((2 * pairs, _BLOCK_SIZE, _NUM_KV_HEADS, _HEAD_DIM), "bfloat16")
    order = np.random.default_rng(4).permutation(2 * pairs).astype(np.int64).reshape(pairs, 2)
    table = context.arrays.put(order)
    return Work(lambda: quire.copy_blocks(cache, table))


def _swap_blocks(context: Context, to_device: bool, sizes: tuple[int, int, int]) -> Work:
    """Blocks of which no two are adjacent, and beside them as many in one run, which is one transfer, or one of each layer's K and V."""
    layers, pairs, kib = sizes
    heads = kib * 1024 // (_BLOCK_SIZE * _HEAD_DIM * 2)
    host, device = (
        quire.KVCache(
            layers, 2 * pairs, _BLOCK_SIZE, heads, _HEAD_DIM, "bfloat16", where, pinned=where == "cpu"
        )
        for where in ("cpu", context.device)
    )
    source, target = (host, device) if to_device else (device, host)
    rng = np.random.default_rng(4)
    single = np.stack([2 * rng.permutation(pairs).astype(np.int64) for _ in range(2)], 1)
    run = np.stack([np.arange(pairs)] * 2, 1)
    return Work(
        lambda: target.swap_blocks_from(source, single),
        {"quire, one run": lambda: target.swap_blocks_from(source, run)},
    )
