"""Attention inside PyTorch.

SPDX-License-Identifier: Apache-2.0
"""

# The traced forms have the arguments of the documented functions.
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, cast

import torch

from quire import _core
from quire.attention import attention as _attention
from quire.attention import merge_attention as _merge_attention
from quire.attention import paged_attention as _paged_attention
from quire.attention import shared_prefix_attention as _shared_prefix_attention
from quire.attention import split_window
from quire.torch import _operators
from quire.torch._operators import F

Tensor = torch.Tensor
_raw: Any = _core

_OPTIONS = (
    "float? scale, bool causal, int window_left, int window_right, float softcap, Tensor? alibi_slopes, Tensor? sinks, Tensor? q_scale, "
    "Tensor? k_scale, Tensor? v_scale, Tensor? mask, Tensor? mask_start"
)
_operators.define(
    "paged_attention",
    "Tensor(a!) out, Tensor(b!)? lse, Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_tables, Tensor seq_lens, "
    f"Tensor? query_start_loc, Tensor(c!)? workspace, {_OPTIONS}, str? variant, bool batch_invariant",
    lambda *a: _raw.paged_attention(*a[:11], (a[11], a[12]), *a[13:], "shape", None),
)
_operators.define(
    "shared_prefix_attention",
    "Tensor(a!) out, Tensor(b!)? lse, Tensor q, Tensor k_cache, Tensor v_cache, Tensor prefix_blocks, Tensor block_tables, "
    f"Tensor seq_lens, Tensor? query_start_loc, Tensor(c!)? workspace, {_OPTIONS}",
    lambda *a: _raw.shared_prefix_attention(*a[:12], (a[12], a[13]), *a[14:], "shape", None),
)
_operators.define(
    "attention",
    "Tensor(a!) out, Tensor(b!)? lse, Tensor q, Tensor k, Tensor v, Tensor? query_start_loc, Tensor? kv_start_loc, "
    f"Tensor(c!)? workspace, {_OPTIONS}, str? variant, bool batch_invariant",
    lambda *a: _raw.attention(*a[:10], (a[10], a[11]), *a[12:], "shape", None),
)
_operators.define(
    "merge_attention",
    "Tensor(a!) out, Tensor(b!) out_lse, Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b",
    _operators.core_call(_core.merge_attention),
)


def _autocast(q: Any, k: Any, v: Any, is_cache: bool) -> tuple[Any, Any, Any]:
    """Float32 tensors in the autocast dtype; q in that of a cache, which is not converted."""
    if not isinstance(q, torch.Tensor) or q.dtype is not torch.float32:
        return q, k, v
    kind = q.device.type
    if not torch.is_autocast_enabled(kind):
        return q, k, v
    dtype = torch.get_autocast_dtype(kind)
    if is_cache:
        own = getattr(k, "dtype", None)
        same = own in (torch.float32, torch.float16, torch.bfloat16)
        return q.to(cast(torch.dtype, own) if same else dtype), k, v
    return q.to(dtype), *(x.to(dtype) if x.dtype is torch.float32 else x for x in (k, v))


def _attention_function(eager: F, is_cache: bool) -> Callable[[Callable[..., Any]], F]:
    """As function, with autocast."""

    def decorate(traced: Callable[..., Any]) -> F:
        function = _operators.function(eager)(traced)
        names = tuple(inspect.signature(eager).parameters)[:3]

        @functools.wraps(eager)
        def with_autocast(*args: Any, **kwargs: Any) -> Any:
            if (
                args
                and type(args[0]) in _operators.PLAIN
                and args[0].dtype is not torch.float32
                and not _operators.is_compiling()
                and _operators.is_unwatched()
            ):
                return eager(*args, **kwargs)
            missing = names[len(args) :]
            if not all(name in kwargs for name in missing):
                return function(*args, **kwargs)  # its TypeError says what is missing
            q, k, v, *rest = (*args, *(kwargs.pop(name) for name in missing))
            return function(*_autocast(q, k, v, is_cache), *rest, **kwargs)

        with_autocast.__module__ = "quire.torch"
        return cast(F, with_autocast)

    return decorate


def _outputs(q: Tensor, out: Tensor | None, return_lse: bool) -> tuple[Tensor, Tensor | None]:
    # Of float8 queries the output is wider.
    dtype = torch.bfloat16 if q.dtype is torch.float8_e4m3fn else q.dtype
    result = torch.empty_like(q, dtype=dtype, memory_format=torch.contiguous_format) if out is None else out
    return result, q.new_empty(q.shape[:2], dtype=torch.float32) if return_lse else None


def _options(op: str, scale, causal, window, softcap, *tensors):
    return (scale, bool(causal), *split_window(op, window), float(softcap or 0.0), *tensors)


@_attention_function(_paged_attention, True)
def paged_attention(
    q, k_cache, v_cache, block_tables, seq_lens, *, query_start_loc=None, scale=None, causal=True, window=None, softcap=None,
    alibi_slopes=None, sinks=None, q_scale=None, k_scale=None, v_scale=None, mask=None, mask_start=None, out=None, return_lse=False,
    workspace=None, variant=None, batch_invariant=False,
):  # fmt: skip
    """Traced."""
    result, lse = _outputs(q, out, return_lse)
    options = _options(
        "paged_attention",
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
    )
    _operators.ops.paged_attention(
        result,
        lse,
        q,
        k_cache,
        v_cache,
        block_tables,
        seq_lens,
        query_start_loc,
        workspace,
        *options,
        variant,
        bool(batch_invariant),
    )
    return (result, lse) if return_lse else result


@_attention_function(_shared_prefix_attention, True)
def shared_prefix_attention(
    q, k_cache, v_cache, prefix_blocks, block_tables, seq_lens, *, query_start_loc=None, scale=None, causal=True, window=None,
    softcap=None, alibi_slopes=None, sinks=None, q_scale=None, k_scale=None, v_scale=None, mask=None, mask_start=None, out=None,
    return_lse=False, workspace=None,
):  # fmt: skip
    """Traced."""
    result, lse = _outputs(q, out, return_lse)
    options = _options(
        "shared_prefix_attention",
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
    )
    _operators.ops.shared_prefix_attention(
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
        *options,
    )
    return (result, lse) if return_lse else result


@_attention_function(_attention, False)
def attention(
    q, k, v, *, query_start_loc=None, kv_start_loc=None, scale=None, causal=True, window=None, softcap=None, alibi_slopes=None,
    sinks=None, q_scale=None, k_scale=None, v_scale=None, mask=None, mask_start=None, out=None, return_lse=False,
    workspace=None, variant=None, batch_invariant=False,
):  # fmt: skip
    """Traced."""
    result, lse = _outputs(q, out, return_lse)
    options = _options(
        "attention",
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
    )
    _operators.ops.attention(
        result,
        lse,
        q,
        k,
        v,
        query_start_loc,
        kv_start_loc,
        workspace,
        *options,
        variant,
        bool(batch_invariant),
    )
    return (result, lse) if return_lse else result


@_operators.function(_merge_attention)
def merge_attention(out_a, lse_a, out_b, lse_b, *, out=None, out_lse=None):
    """Traced."""
    result = torch.empty_like(out_a, memory_format=torch.contiguous_format) if out is None else out
    lse = torch.empty_like(lse_a) if out_lse is None else out_lse
    _operators.ops.merge_attention(result, lse, out_a, lse_a, out_b, lse_b)
    return result, lse
