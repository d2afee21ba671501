"""Benchmarks of the gated activations.

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
    """T tokens, I numbers of output each."""
    if context.quick:
        grid = [(16, 512)]
    elif context.is_cuda:
        grid = [(1, 14336), (16, 14336), (64, 14336), (4096, 14336), (16384, 14336)]
    else:
        grid = [(1, 14336), (64, 14336), (1024, 14336)]
    for op in ("silu_and_mul", "gelu_tanh_and_mul"):
        for dtype in ("bfloat16",) if context.is_cuda else ("bfloat16", "float32"):
            for tokens, width in grid:
                held = op == "silu_and_mul" and not context.is_cuda and not context.quick and tokens > 1
                yield Case(
                    name=f"{op} T{tokens} I{width} {dtype}",
                    prepare=partial(_prepare, context, op, (tokens, width), dtype),
                    num_bytes=ITEM_BYTES[dtype] * 3 * tokens * width,
                    bound="copy",
                    target=Target(min_speedup=2.0) if held else None,
                    op=op,
                )
    tokens, width = grid[-1]
    yield Case(
        name=f"gelu_and_mul T{tokens} I{width} bfloat16",
        prepare=partial(_prepare, context, "gelu_and_mul", (tokens, width), "bfloat16"),
        num_bytes=2 * 3 * tokens * width,
        bound="copy",
        op="gelu_and_mul",
    )
    for op in ("gelu_new", "gelu_fast", "gelu_quick", "relu_squared"):
        yield Case(
            name=f"{op} T{tokens} I{width} bfloat16",
            prepare=partial(_plain, context, op, (tokens, width)),
            num_bytes=2 * 2 * tokens * width,
            bound="copy",
            op=op,
        )
    for granularity in ("tensor", "token", "group"):
        for tokens, width in grid:
            yield Case(
                name=f"silu_and_mul to float8_e4m3fn, scale per {granularity}, T{tokens} I{width} bfloat16",
                prepare=partial(_quantized, context, (tokens, width), granularity),
                num_bytes=5 * tokens * width,
                bound="copy",
                op="silu_and_mul quantized",
            )


def _prepare(context: Context, op: str, shape: tuple[int, int], dtype: str) -> Work:
    tokens, width = shape
    x, out = context.arrays.random((tokens, 2 * width), dtype), context.arrays.empty(shape, dtype)
    function = getattr(quire, op)

    def numpy_silu_and_mul() -> Any:
        gate = x[:, :width]
        return gate / (1 + np.exp(-gate)) * x[:, width:]

    only_cpu = {"NumPy": numpy_silu_and_mul} if op == "silu_and_mul" and dtype == "float32" else {}
    return Work(lambda: function(x, out=out), peers_of(context, op, only_cpu=only_cpu, out=out, x=x))


def _plain(context: Context, op: str, shape: tuple[int, int]) -> Work:
    x, out = context.arrays.random(shape, "bfloat16"), context.arrays.empty(shape, "bfloat16")
    function = getattr(quire, op)
    return Work(lambda: function(x, out=out), peers_of(context, op, out=out, x=x))


def _quantized(context: Context, shape: tuple[int, int], granularity: Granularity) -> Work:
    arrays, (tokens, width) = context.arrays, shape
    x, out = arrays.random((tokens, 2 * width), "bfloat16"), arrays.empty(shape, "float8_e4m3fn")
    outputs: Any = out
    given = None
    if granularity == "tensor":
        scale = given = arrays.put(np.array([0.02], np.float32))
    else:
        scale = arrays.empty((tokens, 1 if granularity == "token" else width // 128), "float32")
        outputs = (out, scale)
    return Work(
        lambda: quire.silu_and_mul(
            x, out=outputs, out_dtype="float8_e4m3fn", scale=given, granularity=granularity
        ),
        peers_of(context, f"silu_and_mul_fp8_{granularity}", out=out, scale=scale, x=x),
    )
