"""Benchmarks of the norms.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

import quire
from quire._allocate import ITEM_BYTES
from quire._quantized import Granularity
from quire.bench.harness import Case, Context, Target, Work
from quire.bench.peers import peers_of

__all__ = ["cases"]


def cases(context: Context) -> Iterator[Case]:
    """T tokens of H numbers."""
    if context.quick:
        grid = [(16, 1024)]
    elif context.is_cuda:
        grid = [
            (1, 4096),
            (1, 8192),
            (16, 4096),
            (64, 4096),
            (64, 8192),
            (256, 4096),
            (4096, 4096),
            (4096, 8192),
            (16384, 4096),
            (16384, 8192),
        ]
    else:
        grid = [(1, 4096), (64, 4096), (4096, 4096)]
    # Heads as rows: the norm of q and k.
    narrow = [(131072, 64), (524288, 128), (262144, 256)] if context.is_cuda and not context.quick else []
    for op, prepare, num_passes in (
        ("rms_norm", _rms_norm, 2),
        ("fused_add_rms_norm", _fused_add_rms_norm, 4),
        ("layer_norm", _layer_norm, 2),
    ):
        for dtype in ("bfloat16",) if context.is_cuda else ("bfloat16", "float32"):
            for tokens, hidden in grid + (narrow if op == "rms_norm" else []):
                held = op == "rms_norm" and not context.is_cuda and not context.quick and tokens > 1
                yield Case(
                    name=f"{op} T{tokens} H{hidden} {dtype}",
                    prepare=partial(prepare, context, (tokens, hidden), dtype),
                    num_bytes=ITEM_BYTES[dtype] * (num_passes * tokens + 1) * hidden,
                    bound="copy",
                    target=Target(min_speedup=2.0) if held else None,
                    op=op,
                )
    kinds: list[tuple[str, Granularity]] = [
        *(("float8_e4m3fn", kind) for kind in ("tensor", "token", "group")),
        ("int8", "token"),
    ]
    for op, element_bytes in (("rms_norm", 3), ("fused_add_rms_norm", 7), ("layer_norm", 3)):
        for quant_dtype, granularity in kinds:
            for tokens, hidden in grid:
                yield Case(
                    name=f"{op} to {quant_dtype}, scale per {granularity}, T{tokens} H{hidden} bfloat16",
                    prepare=partial(_quantized, context, op, (tokens, hidden), quant_dtype, granularity),
                    num_bytes=element_bytes * tokens * hidden + 2 * hidden,
                    bound="copy",
                    op=f"{op} quantized",
                )


def _rms_norm(context: Context, shape: tuple[int, int], dtype: str) -> Work:
    x, weight = context.arrays.random(shape, dtype), context.arrays.random(shape[1:], dtype)
    out = context.arrays.empty(shape, dtype)

    def numpy_rms_norm() -> Any:
        return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-6) * weight

    peers = peers_of(
        context,
        "rms_norm",
        only_cpu={"NumPy": numpy_rms_norm} if dtype == "float32" else {},
        out=out,
        x=x,
        weight=weight,
        eps=1e-6,
    )
    return Work(lambda: quire.rms_norm(x, weight, out=out), peers)


def _fused_add_rms_norm(context: Context, shape: tuple[int, int], dtype: str) -> Work:
    # Repeated in place, the residual must stay finite: normed rows that are added again grow it linearly.
    x, residual = context.arrays.random(shape, dtype, 1e-3), context.arrays.random(shape, dtype)
    weight = context.arrays.random(shape[1:], dtype, 1e-3)
    peers = peers_of(context, "fused_add_rms_norm", x=x, residual=residual, weight=weight, eps=1e-6)
    return Work(lambda: quire.fused_add_rms_norm(x, residual, weight), peers)


def _layer_norm(context: Context, shape: tuple[int, int], dtype: str) -> Work:
    x, weight = context.arrays.random(shape, dtype), context.arrays.random(shape[1:], dtype)
    bias, out = context.arrays.random(shape[1:], dtype), context.arrays.empty(shape, dtype)
    peers = peers_of(context, "layer_norm", out=out, x=x, weight=weight, bias=bias, eps=1e-5)
    return Work(lambda: quire.layer_norm(x, weight, bias, out=out), peers)


def _quantized(
    context: Context, op: str, shape: tuple[int, int], dtype: str, granularity: Granularity
) -> Work:
    arrays = context.arrays
    x, weight = arrays.random(shape, "bfloat16", 1e-3), arrays.random(shape[1:], "bfloat16")
    residual = arrays.random(shape, "bfloat16") if op == "fused_add_rms_norm" else None
    out = arrays.empty(shape, dtype)
    outputs: Any = out
    given = None
    if granularity == "tensor":
        scale = given = arrays.put(np.array([0.02], np.float32))
    else:
        scale = arrays.empty((shape[0], 1 if granularity == "token" else shape[1] // 128), "float32")
        outputs = (out, scale)
    inputs = [x, weight] if residual is None else [x, residual, weight]
    if op == "layer_norm":
        inputs.append(arrays.random(shape[1:], "bfloat16"))
    peers = {}
    if dtype == "float8_e4m3fn":
        more = {} if residual is None else {"residual": residual}
        peers = peers_of(
            context, f"{op}_fp8_{granularity}", out=out, scale=scale, x=x, weight=weight, eps=1e-6, **more
        )
    function = getattr(quire, op)
    return Work(
        lambda: function(*inputs, out=outputs, out_dtype=dtype, scale=given, granularity=granularity), peers
    )
