"""Benchmarks of attention: decode over a paged cache, and prefill.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

import quire
from quire._allocate import ITEM_BYTES, Array
from quire.bench.harness import Case, Context, Target, Work
from quire.bench.peers import peers_of

__all__ = ["cases"]

_BLOCK_SIZE = 16
_INT8_SCALE = 1.0 / 32.0  # of what Arrays.random draws

Lengths = np.ndarray[Any, np.dtype[Any]]
Shape = tuple[int, int, int, int, int]  # sequences, tokens of each, query heads, KV heads, head_dim


@dataclass(frozen=True)
class _Sizes:
    """What is measured where."""

    decode: list[Shape]
    decode_int8: list[Shape]
    ragged: tuple[int, int]  # sequences, tokens of the longest
    heads: tuple[int, int, int]  # of what has no shapes of its own: query heads, KV heads, head_dim
    mixed: tuple[int, int, int, int]  # chunks, decodes, queries of a chunk, keys of each sequence
    invariant: list[Shape]  # with batch_invariant=True, and without beside it
    verify: list[tuple[int, int, int]]  # sequences, tokens and draft tokens of each; with and without a tree
    prefix: list[tuple[int, int, int]]  # sequences, tokens of the prefix that they share, own tokens of each
    merge: list[int]  # rows of two partial results
    prefill: list[Shape]
    prefill_float8_keys: list[Shape]
    prefill_float8: list[Shape]
    causal: tuple[bool, ...]  # of prefill


_QUICK = _Sizes(
    decode=[(2, 100, 4, 2, 64)],
    decode_int8=[(2, 100, 4, 2, 64)],
    ragged=(3, 64),
    heads=(4, 2, 64),
    mixed=(2, 6, 16, 64),
    invariant=[(2, 100, 4, 2, 64)],
    verify=[(2, 100, 5)],
    prefix=[(3, 96, 16)],
    merge=[16],
    prefill=[(1, 64, 4, 2, 64)],
    prefill_float8_keys=[(1, 64, 4, 2, 64)],
    prefill_float8=[(1, 64, 4, 2, 64)],
    causal=(True,),
)
_CPU = _Sizes(
    decode=[(1, 4096, 32, 8, 128), (8, 4096, 32, 8, 128)],
    decode_int8=[(8, 4096, 32, 8, 128)],
    ragged=(16, 4096),
    heads=(32, 8, 128),
    mixed=(4, 28, 512, 2048),
    invariant=[(1, 4096, 32, 8, 128), (8, 4096, 32, 8, 128)],
    verify=[(1, 4096, 8)],
    prefix=[(8, 4096, 128)],
    merge=[64],
    prefill=[(1, 512, 32, 8, 128), (1, 2048, 32, 8, 128)],
    prefill_float8_keys=[],
    prefill_float8=[],
    causal=(True,),
)
_PREFILL_CUDA: list[Shape] = [
    (8, 2048, 32, 8, 64),
    (2, 8192, 32, 8, 64),
    (32, 512, 32, 8, 128),
    (8, 2048, 32, 8, 128),
    (2, 8192, 32, 8, 128),
    (1, 16384, 32, 8, 128),
    (8, 2048, 16, 8, 256),
    (2, 8192, 16, 8, 256),
]
_CUDA = _Sizes(
    decode=[
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
    ],
    decode_int8=[
        (1, 8192, 32, 8, 128),
        (32, 8192, 32, 8, 128),
        (256, 1024, 32, 8, 128),
        (32, 8192, 32, 8, 64),
    ],
    ragged=(64, 32768),
    heads=(32, 8, 128),
    mixed=(4, 252, 512, 2048),
    invariant=[
        (1, 8192, 32, 8, 128),
        (32, 1024, 32, 8, 128),
        (32, 8192, 32, 8, 128),
        (256, 1024, 32, 8, 128),
    ],
    verify=[(1, 8192, 8), (32, 8192, 8), (32, 8192, 32)],
    prefix=[(256, 32768, 128), (64, 8192, 128)],
    merge=[256, 16384],
    prefill=_PREFILL_CUDA,
    prefill_float8_keys=[(2, 8192, 32, 8, 128), (2, 8192, 32, 8, 64)],
    prefill_float8=_PREFILL_CUDA,
    causal=(True, False),
)


def cases(context: Context) -> Iterator[Case]:
    """Decode over caches of three dtypes, of equal lengths and ragged; mixed batches; drafts; shared prefixes, merges; prefill."""
    sizes = _QUICK if context.quick else _CUDA if context.is_cuda else _CPU
    yield from _decode_cases(context, sizes)
    yield from _mixed_cases(context, sizes)
    for cache_dtype in ("bfloat16", "float8_e4m3fn"):
        yield from _invariant_cases(context, sizes.invariant, cache_dtype)
    yield from _verify_cases(context, sizes.verify, sizes.heads)
    yield from _prefix_cases(context, sizes.prefix, sizes.heads)
    yield from _merge_cases(context, sizes.merge, sizes.heads)
    for q_dtype, kv_dtype, shapes in (
        ("bfloat16", "bfloat16", sizes.prefill),
        ("bfloat16", "float8_e4m3fn", sizes.prefill_float8_keys),
        ("float8_e4m3fn", "float8_e4m3fn", sizes.prefill_float8),
    ):
        for shape in shapes:
            for causal in sizes.causal:
                yield _prefill_case(context, shape, causal, q_dtype, kv_dtype)


def _decode_cases(context: Context, sizes: _Sizes) -> Iterator[Case]:
    for cache_dtype, shapes in (
        ("bfloat16", sizes.decode),
        ("float8_e4m3fn", sizes.decode),
        ("int8", sizes.decode_int8),
    ):
        for batch, length, num_heads, num_kv_heads, head_dim in shapes:
            held = sizes is _CPU and cache_dtype == "bfloat16" and batch == 8
            yield _decode_case(
                context,
                f"decode B{batch} L{length} {num_heads}/{num_kv_heads} D{head_dim}, cache {cache_dtype}",
                f"decode, cache {cache_dtype}",
                np.full(batch, length),
                (num_heads, num_kv_heads, head_dim),
                cache_dtype,
                Target(min_speedup=2.0) if held else None,
            )
    batch, longest = sizes.ragged
    # Log-uniform: as many sequences between 16 and 32 tokens as between 16384 and 32768.
    lengths = np.exp(np.random.default_rng(6).uniform(np.log(16), np.log(longest), batch)).astype(int)
    num_heads, num_kv_heads, head_dim = sizes.heads
    for cache_dtype in ("bfloat16", "float8_e4m3fn", "int8"):
        yield _decode_case(
            context,
            f"decode ragged B{batch} L16..{longest} {num_heads}/{num_kv_heads} D{head_dim}, cache {cache_dtype}",
            "decode, ragged",
            lengths,
            sizes.heads,
            cache_dtype,
        )


def _mixed_cases(context: Context, sizes: _Sizes) -> Iterator[Case]:
    chunks, decodes, chunk, length = sizes.mixed
    num_heads, num_kv_heads, head_dim = sizes.heads
    for cache_dtype in ("bfloat16", "float8_e4m3fn"):
        yield Case(
            name=f"mixed {chunks} chunks of {chunk} + {decodes} decodes, L{length} {num_heads}/{num_kv_heads} D{head_dim}, "
            f"cache {cache_dtype}",
            prepare=partial(_mixed, context, sizes.mixed, sizes.heads, cache_dtype),
            op="paged_attention_mixed",
            group="mixed",
            unranked=("quire, two calls",),
        )


def _prefill_case(context: Context, shape: Shape, causal: bool, q_dtype: str, kv_dtype: str) -> Case:
    batch, length, num_heads, num_kv_heads, head_dim = shape
    held = not context.is_cuda and not context.quick and length == 2048
    mask = "causal" if causal else "full"
    keys = "" if kv_dtype == q_dtype else f", keys {kv_dtype}"
    return Case(
        name=f"prefill B{batch} L{length} {num_heads}/{num_kv_heads} D{head_dim} {mask} {q_dtype}{keys}",
        prepare=partial(_prefill, context, shape, causal, q_dtype, kv_dtype),
        # By convention half of the score matrix counts under the causal mask.
        num_flops=4.0 * batch * length * length * num_heads * head_dim * (0.5 if causal else 1.0),
        bound="matmul",
        target=Target(min_speedup=0.5) if held else None,
        op="attention_prefill",
        group=f"prefill, keys {kv_dtype}" if q_dtype == "bfloat16" else f"prefill, {q_dtype}",
    )


def _verify_cases(
    context: Context, sizes: list[tuple[int, int, int]], heads: tuple[int, int, int]
) -> Iterator[Case]:
    num_heads, num_kv_heads, head_dim = heads
    for batch, length, draft in sizes:
        for tree in (False, True):
            yield Case(
                name=f"verify B{batch} L{length} T{draft} {num_heads}/{num_kv_heads} D{head_dim} bfloat16"
                + (", tree" if tree else ""),
                prepare=partial(_verify, context, (batch, length, draft), heads, tree),
                num_bytes=4 * batch * (length * num_kv_heads + draft * num_heads) * head_dim,
                num_flops=4.0 * batch * length * draft * num_heads * head_dim,
                bound="read",
                op="paged_attention_verify",
                group="verify",
            )


def _invariant_cases(context: Context, shapes: list[Shape], cache_dtype: str) -> Iterator[Case]:
    for batch, length, num_heads, num_kv_heads, head_dim in shapes:
        kv_bytes = 2 * batch * length * num_kv_heads * head_dim * ITEM_BYTES[cache_dtype]
        yield Case(
            name=f"invariant B{batch} L{length} {num_heads}/{num_kv_heads} D{head_dim}, cache {cache_dtype}",
            prepare=partial(
                _invariant, context, np.full(batch, length), (num_heads, num_kv_heads, head_dim), cache_dtype
            ),
            num_bytes=kv_bytes + 4 * batch * num_heads * head_dim,
            num_flops=4.0 * batch * length * num_heads * head_dim,
            bound="read",
            op="paged_attention_invariant",
            group="decode, batch invariant",
            unranked=("quire, any bits",),
        )


def _prefix_cases(
    context: Context, sizes: list[tuple[int, int, int]], heads: tuple[int, int, int]
) -> Iterator[Case]:
    num_heads, num_kv_heads, head_dim = heads
    for batch, length, own in sizes:
        yield Case(
            name=f"prefix B{batch} L{length}+{own} {num_heads}/{num_kv_heads} D{head_dim} bfloat16",
            prepare=partial(_prefix, context, (batch, length, own), heads),
            num_flops=4.0 * batch * (length + own) * num_heads * head_dim,
            bound="matmul",
            op="shared_prefix_attention",
            group="shared prefix",
            unranked=("quire, paged_attention",),
        )


def _merge_cases(context: Context, sizes: list[int], heads: tuple[int, int, int]) -> Iterator[Case]:
    num_heads, _, head_dim = heads
    for tokens in sizes:
        yield Case(
            name=f"merge T{tokens} {num_heads} heads D{head_dim} bfloat16",
            prepare=partial(_merge, context, (tokens, num_heads, head_dim)),
            num_bytes=3 * tokens * num_heads * (2 * head_dim + 4),
            bound="copy",
            op="merge_attention",
            group="merge",
        )


def _merge(context: Context, shape: tuple[int, int, int]) -> Work:
    arrays = context.arrays
    out_a, out_b, out = (
        arrays.random(shape, "bfloat16"),
        arrays.random(shape, "bfloat16"),
        arrays.empty(shape, "bfloat16"),
    )
    lse_a, lse_b, lse = (
        arrays.random(shape[:2], "float32"),
        arrays.random(shape[:2], "float32"),
        arrays.empty(shape[:2], "float32"),
    )
    tensors = {"out_a": out_a, "lse_a": lse_a, "out_b": out_b, "lse_b": lse_b, "out": out, "out_lse": lse}
    return Work(partial(quire.merge_attention, **tensors), peers_of(context, "merge_attention", **tensors))


def _decode_case(
    context: Context,
    name: str,
    group: str,
    lengths: Lengths,
    heads: tuple[int, int, int],
    cache_dtype: str,
    target: Target | None = None,
) -> Case:
    num_heads, num_kv_heads, head_dim = heads
    num_tokens = float(lengths.sum())
    kv_bytes = 2 * num_tokens * num_kv_heads * head_dim * ITEM_BYTES[cache_dtype]
    return Case(
        name=name,
        prepare=partial(_decode, context, lengths, heads, cache_dtype),
        num_bytes=kv_bytes + 4 * len(lengths) * num_heads * head_dim,
        num_flops=4.0 * num_tokens * num_heads * head_dim,
        bound="read",
        target=target,
        op="paged_attention_decode",
        group=group,
        unranked=("torch",),  # reads contiguous keys and values
    )


def _cache(
    context: Context, lengths: Lengths, num_kv_heads: int, head_dim: int, dtype: str
) -> tuple[Array, Array, Array, Array]:
    """k_cache, v_cache, block_tables, seq_lens."""
    counts = -(-lengths // _BLOCK_SIZE)
    shape = (int(counts.sum()), _BLOCK_SIZE, num_kv_heads, head_dim)
    k_cache, v_cache = (context.arrays.random(shape, dtype) for _ in range(2))
    # Blocks in random order, as after hours of serving. Beyond a sequence's end: a block that every peer may read.
    order = np.random.default_rng(5).permutation(shape[0]).astype(np.int32)
    tables = np.zeros((len(lengths), counts.max()), np.int32)
    tables[np.arange(counts.max()) < counts[:, None]] = order
    put = context.arrays.put
    return k_cache, v_cache, put(tables), put(lengths.astype(np.int32))


def _scales(context: Context, dtype: str) -> dict[str, Array]:
    if dtype != "int8":
        return {}
    return {name: context.arrays.put(np.array([_INT8_SCALE], np.float32)) for name in ("k_scale", "v_scale")}


def _decode(context: Context, lengths: Lengths, heads: tuple[int, int, int], cache_dtype: str) -> Work:
    num_heads, num_kv_heads, head_dim = heads
    arrays = context.arrays
    q = arrays.random((len(lengths), num_heads, head_dim), "bfloat16")
    k_cache, v_cache, block_tables, seq_lens = _cache(context, lengths, num_kv_heads, head_dim, cache_dtype)
    out = arrays.empty((len(lengths), num_heads, head_dim), "bfloat16")
    peers = peers_of(
        context,
        "paged_attention_decode",
        out=out,
        q=q,
        k_cache=k_cache,
        v_cache=v_cache,
        block_tables=block_tables,
        seq_lens=seq_lens,
        max_seq_len=int(lengths.max()),
    )
    scales = _scales(context, cache_dtype)
    return Work(
        lambda: quire.paged_attention(q, k_cache, v_cache, block_tables, seq_lens, out=out, **scales), peers
    )


def _invariant(context: Context, lengths: Lengths, heads: tuple[int, int, int], cache_dtype: str) -> Work:
    """Batch-invariant, and beside it not."""
    num_heads, num_kv_heads, head_dim = heads
    arrays = context.arrays
    q = arrays.random((len(lengths), num_heads, head_dim), "bfloat16")
    out = arrays.empty((len(lengths), num_heads, head_dim), "bfloat16")
    caches = _cache(context, lengths, num_kv_heads, head_dim, cache_dtype)

    def call(batch_invariant: bool) -> object:
        return quire.paged_attention(q, *caches, out=out, batch_invariant=batch_invariant)

    return Work(partial(call, True), {"quire, any bits": partial(call, False)})


def _verify(context: Context, sizes: tuple[int, int, int], heads: tuple[int, int, int], tree: bool) -> Work:
    batch, length, draft = sizes
    num_heads, num_kv_heads, head_dim = heads
    arrays = context.arrays
    q = arrays.random((batch * draft, num_heads, head_dim), "bfloat16")
    out = arrays.empty((batch * draft, num_heads, head_dim), "bfloat16")
    caches = _cache(context, np.full(batch, length), num_kv_heads, head_dim, "bfloat16")
    starts = arrays.put(np.arange(batch + 1, dtype=np.int32) * np.int32(draft))
    mask = None
    if tree:
        # Binary: node i is below node (i - 1) // 2.
        seen = np.eye(draft, dtype=bool)
        for i in range(1, draft):
            seen[i] |= seen[(i - 1) // 2]
        mask = arrays.put(np.tile(np.packbits(seen, axis=-1, bitorder="little"), (batch, 1)))
    return Work(lambda: quire.paged_attention(q, *caches, query_start_loc=starts, mask=mask, out=out))


def _prefix(context: Context, sizes: tuple[int, int, int], heads: tuple[int, int, int]) -> Work:
    """The prefix read once, and beside it read for each sequence."""
    batch, length, own = sizes
    num_heads, num_kv_heads, head_dim = heads
    arrays = context.arrays
    columns, own_columns = length // _BLOCK_SIZE, own // _BLOCK_SIZE
    q = arrays.random((batch, num_heads, head_dim), "bfloat16")
    out = arrays.empty((batch, num_heads, head_dim), "bfloat16")
    cache_shape = (columns + batch * own_columns, _BLOCK_SIZE, num_kv_heads, head_dim)
    k_cache, v_cache = (arrays.random(cache_shape, "bfloat16") for _ in "kv")
    order = np.random.default_rng(5).permutation(cache_shape[0]).astype(np.int32)
    prefix, tables = order[:columns], order[columns:].reshape(batch, own_columns)
    whole = arrays.put(np.concatenate([np.tile(prefix, (batch, 1)), tables], axis=1))
    whole_lens = arrays.put(np.full(batch, length + own, np.int32))
    blocks, own_tables, own_lens = (arrays.put(x) for x in (prefix, tables, np.full(batch, own, np.int32)))
    return Work(
        lambda: quire.shared_prefix_attention(q, k_cache, v_cache, blocks, own_tables, own_lens, out=out),
        {
            "quire, paged_attention": lambda: quire.paged_attention(
                q, k_cache, v_cache, whole, whole_lens, out=out
            )
        },
    )


def _mixed(
    context: Context, sizes: tuple[int, int, int, int], heads: tuple[int, int, int], cache_dtype: str
) -> Work:
    """Chunks of prompts first, then one row of each decoding sequence."""
    num_chunks, num_rows, chunk, length = sizes
    num_heads, num_kv_heads, head_dim = heads
    arrays = context.arrays
    num_seqs, split = num_chunks + num_rows, num_chunks * chunk
    query_lens = np.array([chunk] * num_chunks + [1] * num_rows)
    starts = np.concatenate(([0], query_lens.cumsum())).astype(np.int32)
    query_start_loc, chunk_starts = arrays.put(starts), arrays.put(starts[: num_chunks + 1])
    q = arrays.random((split + num_rows, num_heads, head_dim), "bfloat16")
    out = arrays.empty((split + num_rows, num_heads, head_dim), "bfloat16")
    k_cache, v_cache, tables, seq_lens = _cache(
        context, np.full(num_seqs, length), num_kv_heads, head_dim, cache_dtype
    )

    def one_call() -> object:
        return quire.paged_attention(
            q, k_cache, v_cache, tables, seq_lens, query_start_loc=query_start_loc, out=out
        )

    # CuPy's tensors of bfloat16 are quire's own, which cannot be sliced.
    parts = [arrays.random((n, num_heads, head_dim), "bfloat16") for n in (split, num_rows)]
    outs = [arrays.empty((n, num_heads, head_dim), "bfloat16") for n in (split, num_rows)]

    def two_calls() -> object:
        quire.paged_attention(
            parts[0],
            k_cache,
            v_cache,
            tables[:num_chunks],
            seq_lens[:num_chunks],
            query_start_loc=chunk_starts,
            out=outs[0],
        )
        return quire.paged_attention(
            parts[1], k_cache, v_cache, tables[num_chunks:], seq_lens[num_chunks:], out=outs[1]
        )

    peers = peers_of(
        context,
        "paged_attention_mixed",
        out=out,
        q=q,
        k_cache=k_cache,
        v_cache=v_cache,
        block_tables=tables,
        seq_lens=seq_lens,
        max_seq_len=length,
        query_start_loc=query_start_loc,
        max_query_len=chunk,
    )
    return Work(one_call, {"quire, two calls": two_calls, **peers})


def _prefill(context: Context, shape: Shape, causal: bool, q_dtype: str, kv_dtype: str) -> Work:
    batch, length, num_heads, num_kv_heads, head_dim = shape
    arrays = context.arrays
    q = arrays.random((batch * length, num_heads, head_dim), q_dtype)
    k, v = (arrays.random((batch * length, num_kv_heads, head_dim), kv_dtype) for _ in range(2))
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
