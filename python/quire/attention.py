"""Attention over paged and ragged keys and values, and the merge of partial results.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from typing import Literal, overload

from quire import _core
from quire._allocate import Array, dtype_name, empty, finish, shape_of

__all__ = [
    "attention",
    "attention_workspace_size",
    "merge_attention",
    "paged_attention",
    "paged_attention_workspace_size",
    "shared_prefix_attention",
    "shared_prefix_attention_workspace_size",
]


def _out_dtype(q: Array) -> str | None:
    """The dtype of an output that is to be allocated; None: q's."""
    return "bfloat16" if dtype_name(getattr(q, "dtype", None)) == "float8_e4m3fn" else None


Window = int | tuple[int, int] | None
Variant = Literal[
    "mma_split_keys_8",
    "mma_split_keys_16",
    "mma_split_rows",
    "mma_split_rows_128",
    "wgmma",
    "mma_split_keys_8_small",
    "mma_split_rows_small",
    "simt",
]


def split_window(op: str, window: Window) -> tuple[int, int]:
    """``(left, right)`` of a window as callers give it; -1 for no limit."""
    if window is None:
        return -1, -1
    if isinstance(window, (tuple, list)):
        if len(window) != 2:
            raise ValueError(f"[{op}] window: expected an int or (left, right), got {window}")
        return int(window[0]), int(window[1])
    return int(window), -1


@overload
def paged_attention(
    q: Array,
    k_cache: Array,
    v_cache: Array,
    block_tables: Array,
    seq_lens: Array,
    *,
    query_start_loc: Array | None = ...,
    scale: float | None = ...,
    causal: bool = ...,
    window: Window = ...,
    softcap: float | None = ...,
    alibi_slopes: Array | None = ...,
    sinks: Array | None = ...,
    q_scale: Array | None = ...,
    k_scale: Array | None = ...,
    v_scale: Array | None = ...,
    mask: Array | None = ...,
    mask_start: Array | None = ...,
    out: Array | None = ...,
    return_lse: Literal[False] = ...,
    workspace: Array | None = ...,
    variant: Variant | None = ...,
    batch_invariant: bool = ...,
    validate: Literal["shape", "full"] = ...,
    stream: object = ...,
) -> Array: ...
@overload
def paged_attention(
    q: Array,
    k_cache: Array,
    v_cache: Array,
    block_tables: Array,
    seq_lens: Array,
    *,
    query_start_loc: Array | None = ...,
    scale: float | None = ...,
    causal: bool = ...,
    window: Window = ...,
    softcap: float | None = ...,
    alibi_slopes: Array | None = ...,
    sinks: Array | None = ...,
    q_scale: Array | None = ...,
    k_scale: Array | None = ...,
    v_scale: Array | None = ...,
    mask: Array | None = ...,
    mask_start: Array | None = ...,
    out: Array | None = ...,
    return_lse: Literal[True],
    workspace: Array | None = ...,
    variant: Variant | None = ...,
    batch_invariant: bool = ...,
    validate: Literal["shape", "full"] = ...,
    stream: object = ...,
) -> tuple[Array, Array]: ...
@overload
def paged_attention(
    q: Array,
    k_cache: Array,
    v_cache: Array,
    block_tables: Array,
    seq_lens: Array,
    *,
    query_start_loc: Array | None = ...,
    scale: float | None = ...,
    causal: bool = ...,
    window: Window = ...,
    softcap: float | None = ...,
    alibi_slopes: Array | None = ...,
    sinks: Array | None = ...,
    q_scale: Array | None = ...,
    k_scale: Array | None = ...,
    v_scale: Array | None = ...,
    mask: Array | None = ...,
    mask_start: Array | None = ...,
    out: Array | None = ...,
    return_lse: bool,
    workspace: Array | None = ...,
    variant: Variant | None = ...,
    batch_invariant: bool = ...,
    validate: Literal["shape", "full"] = ...,
    stream: object = ...,
) -> Array | tuple[Array, Array]: ...
def paged_attention(
    q: Array,
    k_cache: Array,
    v_cache: Array,
    block_tables: Array,
    seq_lens: Array,
    *,
    query_start_loc: Array | None = None,
    scale: float | None = None,
    causal: bool = True,
    window: Window = None,
    softcap: float | None = None,
    alibi_slopes: Array | None = None,
    sinks: Array | None = None,
    q_scale: Array | None = None,
    k_scale: Array | None = None,
    v_scale: Array | None = None,
    mask: Array | None = None,
    mask_start: Array | None = None,
    out: Array | None = None,
    return_lse: bool = False,
    workspace: Array | None = None,
    variant: Variant | None = None,
    batch_invariant: bool = False,
    validate: Literal["shape", "full"] = "shape",
    stream: object = None,
) -> Array | tuple[Array, Array]:
    """Attention of every query over its sequence's keys and values in a paged cache: decode, prefill and mixed batches.

    Query ``i`` of a sequence stands at position ``seq_len - q_len + i``. The score of key ``j`` is ``scale * q.k``, then
    ``softcap * tanh(score / softcap)``, then minus ``alibi_slope * (position - j)``. With ``causal``, keys up to the position are
    seen; ``window=(left, right)`` limits them to ``[position - left, position + right]``; ``mask`` hides keys one by one, as the
    verification of a draft tree needs.

    Dimensions: ``num_tokens`` queries of all sequences, ``num_seqs`` sequences, ``num_heads`` query heads, ``num_kv_heads`` (a
    divisor of num_heads), ``head_dim`` (a multiple of 8 up to 256), ``num_blocks`` of ``block_size`` slots.

    Args:
        q: ``[num_tokens, num_heads, head_dim]`` float32, float16, bfloat16 or float8_e4m3fn, unit inner stride.
        k_cache: ``[num_blocks, block_size, num_kv_heads, head_dim]``, unit inner stride, of q's dtype, float8_e4m3fn,
            float8_e5m2 or int8.
        v_cache: As ``k_cache``.
        block_tables: int32 ``[num_seqs, max_blocks_per_seq]``, unit inner stride. Entries past a sequence's length may hold
            anything.
        seq_lens: int32 ``[num_seqs]``: keys of each sequence, those of its queries included.
        query_start_loc: int32 ``[num_seqs + 1]``: sequence ``s`` has the queries ``[query_start_loc[s], query_start_loc[s + 1])``.
            None: decode, one query for each sequence. Rows of q before the first and behind the last entry belong to no sequence, as
            in a padded batch: their rows of ``out`` and lse are not written, and of a new ``out`` hold anything.
        scale: Default ``1 / sqrt(head_dim)``.
        causal: Whether keys after a query's position are hidden.
        window: ``(left, right)`` in tokens, negative for no limit; an int is ``left``.
        softcap: None or 0 for none.
        alibi_slopes: float32 ``[num_heads]``.
        sinks: float32 ``[num_heads]``: ``exp(sink)`` joins the softmax's denominator and nothing joins the output.
        q_scale: float32 ``[1]`` or ``[num_kv_heads]``: float8 queries are read as ``stored * scale``, those of a kv head's group
            by one scale. None is 1, and all that other queries take.
        k_scale: Likewise, for a float8 or int8 cache.
        v_scale: Likewise.
        mask: uint8 ``[num_tokens, mask_bytes]``, unit inner stride, a row for each row of q: bit ``b``, which is bit ``b % 8`` of byte
            ``b // 8`` (``numpy.packbits(seen, axis=-1, bitorder="little")``), says whether the query may see key
            ``mask_start + b``. Keys that a row has no bit for may be seen, and what else hides a key still does, ``causal``
            first of all: a tree whose nodes stand before their parents needs ``causal=False``.
        mask_start: int32 ``[num_seqs]``: the key of bit 0, any number. None is ``seq_len - q_len``: bit ``b`` is the sequence's
            own query ``b``, and all keys before its queries are seen, as for a draft or a tree to verify. Zeros make it a mask
            over all keys.
        out: As ``q``, or None to allocate it in q's framework. Of float8 queries bfloat16, which None gives, or float16.
        return_lse: Also return the log-sum-exp.
        workspace: uint8 ``[n]`` with n of at least :func:`paged_attention_workspace_size`; None uses a shared one per device
            and stream.
        variant: The CUDA kernel to run, for measurements and to work around trouble; None: the fastest, as far as known.
            :func:`quire.explain` says which and why.
        batch_invariant: Whether a row's bits shall depend on its own query and on the keys that it sees alone: not on the batch, the
            other rows, the blocks that its keys lie in, or whether it comes in a decode or a prefill. A batch of many decodes hardly
            pays for it; a prefill, whose rows then share less, takes several times as long. Bits differ between devices' kinds,
            between the CPU and CUDA, and from those of a call without it. Not with ``variant``.
        validate: "shape" checks shapes and skips bad index contents on the device, recording them for
            :func:`quire.check_errors`; "full" checks index contents first, which waits for the device.
        stream: An int, an object with ``__cuda_stream__``, or None for the framework's current stream.

    Returns:
        ``out``, or ``(out, lse)`` with lse float32 ``[num_tokens, num_heads]``, natural log, of the sink too. A query that sees no key
        gives 0 and -inf, or its head's sink.

    Raises:
        ValueError: Shapes, strides, devices or scalars do not fit.
        TypeError: A dtype does not fit, or an argument is no tensor.
        IndexError: ``validate="full"`` found an index out of range.
        quire.UnsupportedError: head_dim, a size over 32 bits, a ``variant`` that cannot run the call, or CUDA tensors in a CPU-only build.

    Source: Kwon et al., Efficient Memory Management for LLM Serving with PagedAttention, 2023; Dao, FlashAttention-2, 2023;
    Xiao et al., Efficient Streaming Language Models with Attention Sinks, 2023; Press, Smith and Lewis, Train Short, Test Long, 2021
    (ALiBi); Gemma 2, 2024 (softcap).

    Example:
        >>> import numpy as np, quire
        >>> k_cache = np.zeros((4, 16, 1, 8), np.float32)
        >>> v_cache = np.ones((4, 16, 1, 8), np.float32)
        >>> q = np.ones((1, 2, 8), np.float32)
        >>> tables, lens = np.array([[2, 0]], np.int32), np.array([20], np.int32)
        >>> quire.paged_attention(q, k_cache, v_cache, tables, lens)[0, 0, :3]
        array([1., 1., 1.], dtype=float32)
    """
    shape = shape_of("paged_attention", "q", q) if out is None or return_lse else ()
    result = empty(q, shape, _out_dtype(q)) if out is None else out
    lse = empty(q, shape[:2], "float32") if return_lse else None
    _core.paged_attention(
        result,
        lse,
        q,
        k_cache,
        v_cache,
        block_tables,
        seq_lens,
        query_start_loc,
        workspace,
        scale,
        causal,
        window,
        softcap,
        alibi_slopes,
        sinks,
        q_scale,
        k_scale,
        v_scale,
        mask,
        mask_start,
        variant,
        batch_invariant,
        validate,
        stream,
    )
    result = finish(result, q) if out is None else out
    return (result, finish(lse, q)) if return_lse else result


@overload
def shared_prefix_attention(
    q: Array,
    k_cache: Array,
    v_cache: Array,
    prefix_blocks: Array,
    block_tables: Array,
    seq_lens: Array,
    *,
    query_start_loc: Array | None = ...,
    scale: float | None = ...,
    causal: bool = ...,
    window: Window = ...,
    softcap: float | None = ...,
    alibi_slopes: Array | None = ...,
    sinks: Array | None = ...,
    q_scale: Array | None = ...,
    k_scale: Array | None = ...,
    v_scale: Array | None = ...,
    mask: Array | None = ...,
    mask_start: Array | None = ...,
    out: Array | None = ...,
    return_lse: Literal[False] = ...,
    workspace: Array | None = ...,
    validate: Literal["shape", "full"] = ...,
    stream: object = ...,
) -> Array: ...
@overload
def shared_prefix_attention(
    q: Array,
    k_cache: Array,
    v_cache: Array,
    prefix_blocks: Array,
    block_tables: Array,
    seq_lens: Array,
    *,
    query_start_loc: Array | None = ...,
    scale: float | None = ...,
    causal: bool = ...,
    window: Window = ...,
    softcap: float | None = ...,
    alibi_slopes: Array | None = ...,
    sinks: Array | None = ...,
    q_scale: Array | None = ...,
    k_scale: Array | None = ...,
    v_scale: Array | None = ...,
    mask: Array | None = ...,
    mask_start: Array | None = ...,
    out: Array | None = ...,
    return_lse: Literal[True],
    workspace: Array | None = ...,
    validate: Literal["shape", "full"] = ...,
    stream: object = ...,
) -> tuple[Array, Array]: ...
@overload
def shared_prefix_attention(
    q: Array,
    k_cache: Array,
    v_cache: Array,
    prefix_blocks: Array,
    block_tables: Array,
    seq_lens: Array,
    *,
    query_start_loc: Array | None = ...,
    scale: float | None = ...,
    causal: bool = ...,
    window: Window = ...,
    softcap: float | None = ...,
    alibi_slopes: Array | None = ...,
    sinks: Array | None = ...,
    q_scale: Array | None = ...,
    k_scale: Array | None = ...,
    v_scale: Array | None = ...,
    mask: Array | None = ...,
    mask_start: Array | None = ...,
    out: Array | None = ...,
    return_lse: bool,
    workspace: Array | None = ...,
    validate: Literal["shape", "full"] = ...,
    stream: object = ...,
) -> Array | tuple[Array, Array]: ...
def shared_prefix_attention(
    q: Array,
    k_cache: Array,
    v_cache: Array,
    prefix_blocks: Array,
    block_tables: Array,
    seq_lens: Array,
    *,
    query_start_loc: Array | None = None,
    scale: float | None = None,
    causal: bool = True,
    window: Window = None,
    softcap: float | None = None,
    alibi_slopes: Array | None = None,
    sinks: Array | None = None,
    q_scale: Array | None = None,
    k_scale: Array | None = None,
    v_scale: Array | None = None,
    mask: Array | None = None,
    mask_start: Array | None = None,
    out: Array | None = None,
    return_lse: bool = False,
    workspace: Array | None = None,
    validate: Literal["shape", "full"] = "shape",
    stream: object = None,
) -> Array | tuple[Array, Array]:
    """Attention of a batch whose sequences all begin with the same keys, which are read once for all queries.

    A system prompt, few-shot examples or a document that many requests ask about. The result is that of :func:`paged_attention` on tables
    that begin with ``prefix_blocks`` and lengths that count the prefix, from two passes and a merge: all queries as rows of one set of
    tiles over the prefix, then each sequence over its own keys.

    Args:
        q: ``[num_tokens, num_heads, head_dim]`` float32, float16, bfloat16 or float8_e4m3fn, unit inner stride.
        k_cache: ``[num_blocks, block_size, num_kv_heads, head_dim]``, unit inner stride, of q's dtype, float8_e4m3fn,
            float8_e5m2 or int8.
        v_cache: As ``k_cache``.
        prefix_blocks: int32 ``[num_prefix_blocks]``: the blocks of the common prefix, all of them full.
        block_tables: int32 ``[num_seqs, max_blocks_per_seq]``: the blocks of what follows.
        seq_lens: int32 ``[num_seqs]``: keys of each sequence behind the prefix, those of its queries included.
        query_start_loc: int32 ``[num_seqs + 1]``, or None for decode, as in :func:`paged_attention`.
        scale: Default ``1 / sqrt(head_dim)``.
        causal: Whether keys after a query's position are hidden. Every query sees the whole prefix.
        window: None; see Raises.
        softcap: None or 0 for none.
        alibi_slopes: None; see Raises.
        sinks: float32 ``[num_heads]``, counted once.
        q_scale: float32 ``[1]`` or ``[num_kv_heads]``, for float8 queries.
        k_scale: float32 ``[1]`` or ``[num_kv_heads]``.
        v_scale: Likewise.
        mask: uint8 ``[num_tokens, mask_bytes]``, over the keys behind the prefix, as in :func:`paged_attention`.
        mask_start: int32 ``[num_seqs]``, counted from behind the prefix.
        out: As ``q``, or None to allocate it in q's framework. Of float8 queries bfloat16, which None gives, or float16.
        return_lse: Also return the log-sum-exp, float32 ``[num_tokens, num_heads]``, natural log.
        workspace: uint8 ``[n]`` with n of at least :func:`shared_prefix_attention_workspace_size`, or None.
        validate: "shape" or "full".
        stream: An int, an object with ``__cuda_stream__``, or None for the framework's current stream.

    Returns:
        ``out``, or ``(out, lse)``. The parts are rounded to q's dtype before they are merged, so that the error is up to twice that of
        :func:`paged_attention`.

    Raises:
        ValueError: Shapes, strides, devices or scalars do not fit.
        TypeError: A dtype does not fit, or an argument is no tensor.
        IndexError: ``validate="full"`` found an index out of range.
        quire.UnsupportedError: head_dim, a size over 32 bits, or a window or ALiBi slopes, which tell the prefix's keys apart by
            query.

    Source: Juravsky et al., Hydragen: High-Throughput LLM Inference with Shared Prefixes, 2024.

    Example:
        >>> import numpy as np, quire
        >>> cache = np.ones((4, 16, 1, 8), np.float32)
        >>> q = np.ones((2, 2, 8), np.float32)
        >>> prefix, tables, lens = np.array([0, 3], np.int32), np.array([[1], [2]], np.int32), np.array([5, 9], np.int32)
        >>> _, lse = quire.shared_prefix_attention(q, cache, cache, prefix, tables, lens, return_lse=True)
        >>> np.exp(lse[:, 0] - 8**0.5).round()
        array([37., 41.], dtype=float32)
    """
    shape = shape_of("shared_prefix_attention", "q", q) if out is None or return_lse else ()
    result = empty(q, shape, _out_dtype(q)) if out is None else out
    lse = empty(q, shape[:2], "float32") if return_lse else None
    _core.shared_prefix_attention(
        result,
        lse,
        q,
        k_cache,
        v_cache,
        prefix_blocks,
        block_tables,
        seq_lens,
        query_start_loc,
        workspace,
        scale,
        causal,
        window,
        softcap,
        alibi_slopes,
        sinks,
        q_scale,
        k_scale,
        v_scale,
        mask,
        mask_start,
        validate,
        stream,
    )
    result = finish(result, q) if out is None else out
    return (result, finish(lse, q)) if return_lse else result


@overload
def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    query_start_loc: Array | None = ...,
    kv_start_loc: Array | None = ...,
    scale: float | None = ...,
    causal: bool = ...,
    window: Window = ...,
    softcap: float | None = ...,
    alibi_slopes: Array | None = ...,
    sinks: Array | None = ...,
    q_scale: Array | None = ...,
    k_scale: Array | None = ...,
    v_scale: Array | None = ...,
    mask: Array | None = ...,
    mask_start: Array | None = ...,
    out: Array | None = ...,
    return_lse: Literal[False] = ...,
    workspace: Array | None = ...,
    variant: Variant | None = ...,
    batch_invariant: bool = ...,
    validate: Literal["shape", "full"] = ...,
    stream: object = ...,
) -> Array: ...
@overload
def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    query_start_loc: Array | None = ...,
    kv_start_loc: Array | None = ...,
    scale: float | None = ...,
    causal: bool = ...,
    window: Window = ...,
    softcap: float | None = ...,
    alibi_slopes: Array | None = ...,
    sinks: Array | None = ...,
    q_scale: Array | None = ...,
    k_scale: Array | None = ...,
    v_scale: Array | None = ...,
    mask: Array | None = ...,
    mask_start: Array | None = ...,
    out: Array | None = ...,
    return_lse: Literal[True],
    workspace: Array | None = ...,
    variant: Variant | None = ...,
    batch_invariant: bool = ...,
    validate: Literal["shape", "full"] = ...,
    stream: object = ...,
) -> tuple[Array, Array]: ...
@overload
def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    query_start_loc: Array | None = ...,
    kv_start_loc: Array | None = ...,
    scale: float | None = ...,
    causal: bool = ...,
    window: Window = ...,
    softcap: float | None = ...,
    alibi_slopes: Array | None = ...,
    sinks: Array | None = ...,
    q_scale: Array | None = ...,
    k_scale: Array | None = ...,
    v_scale: Array | None = ...,
    mask: Array | None = ...,
    mask_start: Array | None = ...,
    out: Array | None = ...,
    return_lse: bool,
    workspace: Array | None = ...,
    variant: Variant | None = ...,
    batch_invariant: bool = ...,
    validate: Literal["shape", "full"] = ...,
    stream: object = ...,
) -> Array | tuple[Array, Array]: ...
def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    query_start_loc: Array | None = None,
    kv_start_loc: Array | None = None,
    scale: float | None = None,
    causal: bool = True,
    window: Window = None,
    softcap: float | None = None,
    alibi_slopes: Array | None = None,
    sinks: Array | None = None,
    q_scale: Array | None = None,
    k_scale: Array | None = None,
    v_scale: Array | None = None,
    mask: Array | None = None,
    mask_start: Array | None = None,
    out: Array | None = None,
    return_lse: bool = False,
    workspace: Array | None = None,
    variant: Variant | None = None,
    batch_invariant: bool = False,
    validate: Literal["shape", "full"] = "shape",
    stream: object = None,
) -> Array | tuple[Array, Array]:
    """Attention over ragged, unpaged keys and values. Semantics and options are those of :func:`paged_attention`.

    Args:
        q: ``[num_tokens, num_heads, head_dim]`` float32, float16, bfloat16 or float8_e4m3fn, unit inner stride.
        k: ``[num_kv_tokens, num_kv_heads, head_dim]``, unit inner stride, of q's dtype, float8_e4m3fn, float8_e5m2 or int8.
        v: As ``k``.
        query_start_loc: int32 ``[num_seqs + 1]``; None: one sequence.
        kv_start_loc: int32 ``[num_seqs + 1]``; None: query_start_loc.
        scale: Default ``1 / sqrt(head_dim)``.
        causal: Whether keys after a query's position are hidden.
        window: ``(left, right)`` in tokens, negative for no limit; an int is ``left``.
        softcap: None or 0 for none.
        alibi_slopes: float32 ``[num_heads]``.
        sinks: float32 ``[num_heads]``.
        q_scale: float32 ``[1]`` or ``[num_kv_heads]``, for float8 queries.
        k_scale: float32 ``[1]`` or ``[num_kv_heads]``.
        v_scale: Likewise.
        mask: uint8 ``[num_tokens, mask_bytes]``: which keys each query may see, in bits.
        mask_start: int32 ``[num_seqs]``: the key of bit 0; None: ``kv_len - q_len``.
        out: As ``q``, or None to allocate it in q's framework. Of float8 queries bfloat16, which None gives, or float16.
        return_lse: Also return the log-sum-exp, float32 ``[num_tokens, num_heads]``, natural log.
        workspace: uint8 ``[n]`` with n of at least :func:`attention_workspace_size`, or None.
        variant: The CUDA kernel to run, or None.
        batch_invariant: As in :func:`paged_attention`.
        validate: "shape" or "full".
        stream: An int, an object with ``__cuda_stream__``, or None for the framework's current stream.

    Returns:
        ``out``, or ``(out, lse)``.

    Raises:
        ValueError: Shapes, strides, devices or scalars do not fit.
        TypeError: A dtype does not fit, or an argument is no tensor.
        IndexError: ``validate="full"`` found an index out of range.
        quire.UnsupportedError: head_dim, a size over 32 bits, or a ``variant`` that cannot run the call.

    Source: As :func:`paged_attention`.

    Example:
        >>> import numpy as np, quire
        >>> x = np.ones((3, 2, 8), np.float32)
        >>> quire.attention(x, x, x).shape
        (3, 2, 8)
    """
    shape = shape_of("attention", "q", q) if out is None or return_lse else ()
    result = empty(q, shape, _out_dtype(q)) if out is None else out
    lse = empty(q, shape[:2], "float32") if return_lse else None
    _core.attention(
        result,
        lse,
        q,
        k,
        v,
        query_start_loc,
        kv_start_loc,
        workspace,
        scale,
        causal,
        window,
        softcap,
        alibi_slopes,
        sinks,
        q_scale,
        k_scale,
        v_scale,
        mask,
        mask_start,
        variant,
        batch_invariant,
        validate,
        stream,
    )
    result = finish(result, q) if out is None else out
    return (result, finish(lse, q)) if return_lse else result


def merge_attention(
    out_a: Array,
    lse_a: Array,
    out_b: Array,
    lse_b: Array,
    *,
    out: Array | None = None,
    out_lse: Array | None = None,
    stream: object = None,
) -> tuple[Array, Array]:
    """Merges two partial attention results over disjoint keys.

    ``lse = log(exp(lse_a) + exp(lse_b))`` and ``out = out_a * exp(lse_a - lse) + out_b * exp(lse_b - lse)``. The state (0, -inf)
    is the identity.

    Args:
        out_a: ``[num_tokens, num_heads, head_dim]`` float32, float16 or bfloat16, unit inner stride.
        lse_a: float32 ``[num_tokens, num_heads]``, contiguous, natural log.
        out_b: As ``out_a``.
        lse_b: As ``lse_a``.
        out: As ``out_a``, or None to allocate it. May be ``out_a`` or ``out_b``.
        out_lse: As ``lse_a``, or None to allocate it. May be ``lse_a`` or ``lse_b``.
        stream: An int, an object with ``__cuda_stream__``, or None for the framework's current stream.

    Returns:
        ``(out, out_lse)``.

    Raises:
        ValueError: Shapes, strides or devices do not fit.
        TypeError: A dtype does not fit, or an argument is no tensor.

    Source: Milakov and Gimelshein, Online Normalizer Calculation for Softmax, 2018.

    Example:
        >>> import numpy as np, quire
        >>> a, b = np.zeros((1, 1, 8), np.float32), np.ones((1, 1, 8), np.float32)
        >>> out, lse = quire.merge_attention(a, np.zeros((1, 1), np.float32), b, np.zeros((1, 1), np.float32))
        >>> float(out[0, 0, 0]), round(float(lse[0, 0]), 4)
        (0.5, 0.6931)
    """
    shape = shape_of("merge_attention", "out_a", out_a) if out is None or out_lse is None else ()
    result = empty(out_a, shape) if out is None else out
    lse = empty(out_a, shape[:2], "float32") if out_lse is None else out_lse
    _core.merge_attention(result, lse, out_a, lse_a, out_b, lse_b, stream)
    return (
        finish(result, out_a) if out is None else out,
        finish(lse, out_a) if out_lse is None else out_lse,
    )


def paged_attention_workspace_size(
    num_tokens: int, num_seqs: int, num_heads: int, head_dim: int, device: object = "cuda"
) -> int:
    """Bytes of workspace for a batch of at most this size on ``device``: 0 on the CPU. It depends on nothing else.

    Args:
        num_tokens: Queries of all sequences.
        num_seqs: Sequences.
        num_heads: Query heads.
        head_dim: Elements of a head, 8 to 256.
        device: "cpu", "cuda", "cuda:<index>", or a framework's device.

    Returns:
        Bytes, which grow with each argument: a workspace for the largest batch serves all smaller ones.

    Raises:
        ValueError: A count is negative, head_dim out of range, or the device none.
        TypeError: A count is no integer.
        quire.UnsupportedError: A count of 2**30 or more, or "cuda" in a CPU-only build.

    Example:
        >>> import quire
        >>> quire.paged_attention_workspace_size(256, 256, 32, 128, "cpu")
        0
    """
    return _core.paged_attention_workspace_size(num_tokens, num_seqs, num_heads, head_dim, device)


def attention_workspace_size(
    num_tokens: int, num_seqs: int, num_heads: int, head_dim: int, device: object = "cuda"
) -> int:
    """Bytes of workspace for :func:`attention`.

    Arguments, result and exceptions are those of :func:`paged_attention_workspace_size`.
    """
    return _core.attention_workspace_size(num_tokens, num_seqs, num_heads, head_dim, device)


def shared_prefix_attention_workspace_size(
    num_tokens: int, num_seqs: int, num_heads: int, head_dim: int, device: object = "cuda"
) -> int:
    """Bytes of workspace for :func:`shared_prefix_attention`, of any prefix.

    Arguments, result and exceptions are those of :func:`paged_attention_workspace_size`.
    """
    return _core.shared_prefix_attention_workspace_size(num_tokens, num_seqs, num_heads, head_dim, device)
