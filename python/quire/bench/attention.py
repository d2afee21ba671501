"""Benchmarks of attention: decode over a paged cache, and prefill.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np

import quire
from quire.bench.harness import Case, Context, Target, Work
from quire.bench.peers import peers_of

__all__ = ["cases"]

_BLOCK_SIZE = 16
_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float8_e4m3fn": 1}

# (sequences, tokens of each, query heads, KV heads, head_dim)
_DECODE_CUDA = [
    (1, 1024, 32, 8, 128),
    (1, 8192, 32, 8, 128),
    (1, 65536, 32, 8, 128),
    (8, 4096, 32, 8, 128),
    (32, 1024, 32, 8, 128),
    (32, 8192, 32, 8, 128),
    (64, 4096, 32, 8, 128),
    (128, 2048, 32, 8, 128),
    (256, 1024, 32, 8, 128),
    (256, 4096, 32, 8, 128),
    (1, 8192, 64, 8, 128),
    (32, 8192, 64, 8, 128),
    (256, 1024, 64, 8, 128),
    (1, 8192, 32, 32, 128),
    (32, 8192, 32, 32, 128),
    (256, 1024, 32, 32, 128),
    (1, 8192, 16, 2, 256),
    (32, 8192, 16, 2, 256),
    (256, 1024, 16, 2, 256),
    (1, 8192, 32, 8, 64),
    (32, 8192, 32, 8, 64),
    (256, 1024, 32, 8, 64),
]
# (sequences, tokens of each, query heads, KV heads, head_dim), each causal and not
_PREFILL_CUDA = [
    (8, 2048, 32, 8, 64),
    (2, 8192, 32, 8, 64),
    (32, 512, 32, 8, 128),
    (8, 2048, 32, 8, 128),
    (2, 8192, 32, 8, 128),
    (1, 16384, 32, 8, 128),
    (8, 2048, 16, 8, 256),
    (2, 8192, 16, 8, 256),
]


def cases(context: Context) -> Iterator[Case]:
    """Decode with the cache in bfloat16 and in float8_e4m3fn, then prefill in bfloat16."""
    masks: tuple[bool, ...] = (True,)
    if context.quick:
        decode, prefill, masks = [(2, 100, 4, 2, 64)], [(1, 64, 4, 2, 64)], (True,)
    elif context.is_cuda:
        decode, prefill, masks = _DECODE_CUDA, _PREFILL_CUDA, (True, False)
    else:
        decode, prefill, masks = (
            [(1, 4096, 32, 8, 128), (8, 4096, 32, 8, 128)],
            [(1, 512, 32, 8, 128), (1, 2048, 32, 8, 128)],
            (True,),
        )
    on_cpu = not context.is_cuda and not context.quick
    for cache_dtype in ("bfloat16", "float8_e4m3fn"):
        for shape in decode:
            batch, length, num_heads, num_kv_heads, head_dim = shape
            kv_numbers = 2 * batch * length * num_kv_heads * head_dim
            held = on_cpu and cache_dtype == "bfloat16" and batch == 8
            yield Case(
                name=f"decode B{batch} L{length} {num_heads}/{num_kv_heads} D{head_dim}, cache {cache_dtype}",
                prepare=partial(_decode, context, shape, cache_dtype),
                num_bytes=kv_numbers * _ITEM_BYTES[cache_dtype] + 4 * batch * num_heads * head_dim,
                num_flops=4.0 * batch * length * num_heads * head_dim,
                bound="read",
                target=Target(min_speedup=2.0) if held else None,
                op="paged_attention_decode",
            )
    for shape in prefill:
        batch, length, num_heads, num_kv_heads, head_dim = shape
        for causal in masks:
            # By convention half of the score matrix counts under the causal mask.
            flops = 4.0 * batch * length * length * num_heads * head_dim * (0.5 if causal else 1.0)
            mask = "causal" if causal else "full"
            yield Case(
                name=f"prefill B{batch} L{length} {num_heads}/{num_kv_heads} D{head_dim} {mask} bfloat16",
                prepare=partial(_prefill, context, shape, causal),
                num_flops=flops,
                bound="matmul",
                target=Target(min_speedup=0.5) if on_cpu and length == 2048 else None,
                op="attention_prefill",
            )


def _decode(context: Context, shape: tuple[int, int, int, int, int], cache_dtype: str) -> Work:
    batch, length, num_heads, num_kv_heads, head_dim = shape
    arrays = context.arrays
    columns = -(-length // _BLOCK_SIZE)
    num_blocks = batch * columns
    q = arrays.random((batch, num_heads, head_dim), "bfloat16")
    cache_shape = (num_blocks, _BLOCK_SIZE, num_kv_heads, head_dim)
    k_cache, v_cache = (arrays.random(cache_shape, cache_dtype) for _ in range(2))
    # Blocks in random order, as after hours of serving.
    order = np.random.default_rng(5).permutation(num_blocks).astype(np.int32).reshape(batch, columns)
    block_tables, seq_lens = arrays.put(order), arrays.put(np.full(batch, length, np.int32))
    out = arrays.empty((batch, num_heads, head_dim), "bfloat16")
    peers = peers_of(
        context,
        "paged_attention_decode",
        out=out,
        q=q,
        k_cache=k_cache,
        v_cache=v_cache,
        block_tables=block_tables,
        seq_lens=seq_lens,
        max_seq_len=length,
    )
    return Work(lambda: quire.paged_attention(q, k_cache, v_cache, block_tables, seq_lens, out=out), peers)


def _prefill(context: Context, shape: tuple[int, int, int, int, int], causal: bool) -> Work:
    batch, length, num_heads, num_kv_heads, head_dim = shape
    arrays = context.arrays
    q = arrays.random((batch * length, num_heads, head_dim), "bfloat16")
    k, v = (arrays.random((batch * length, num_kv_heads, head_dim), "bfloat16") for _ in range(2))
    starts = arrays.put(np.arange(batch + 1, dtype=np.int32) * np.int32(length))
    out = arrays.empty((batch * length, num_heads, head_dim), "bfloat16")
    peers = peers_of(
        context,
        "attention_prefill",
        out=out,
        q=q,
        k=k,
        v=v,
        query_start_loc=starts,
        batch=batch,
        length=length,
        causal=causal,
    )
    return Work(lambda: quire.attention(q, k, v, query_start_loc=starts, causal=causal, out=out), peers)
