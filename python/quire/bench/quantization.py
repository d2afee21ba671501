"""Benchmarks of quantized weights and activations.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import cycle
from typing import Any, Literal

import numpy as np

import quire
from quire._quantized import Granularity
from quire.bench.harness import Case, Context, Target, Work
from quire.bench.peers import peers_of

__all__ = ["cases"]

_GROUP = 128
# (K, N) of the projections of Llama-3 8B and 70B, and one of each kind elsewhere.
_CUDA_SHAPES = ((4096, 4096), (4096, 14336), (8192, 8192), (8192, 28672))
_CUDA_TOKENS = (1, 16, 64, 256, 1024, 4096)
_CPU_SHAPES, _CPU_TOKENS = ((4096, 4096),), (1, 4, 128, 512)
_CPU_LONG = (8192, 28672)  # for one token: with others like it in turn, beyond a last-level cache
_BEYOND_CACHES = 1 << 29


def cases(context: Context) -> Iterator[Case]:
    """M tokens, K input and N output features; groups of 128."""
    shapes: tuple[tuple[int, int], ...] = _CUDA_SHAPES if context.is_cuda else _CPU_SHAPES
    tokens: tuple[int, ...] = _CUDA_TOKENS if context.is_cuda else _CPU_TOKENS
    if context.quick:
        shapes, tokens = ((256, 256),), (1, 16)
    dtype = "float16" if context.is_cuda else "bfloat16"
    for bits in (4, 8):
        for k, n in shapes:
            for m in tokens:
                yield Case(
                    name=f"quantized_matmul W{bits}A16 M{m} K{k} N{n} {dtype}",
                    prepare=partial(_weight_only, context, bits, (m, k, n), dtype),
                    num_bytes=k * n * bits / 8 + 2 * k * n / _GROUP + 2 * m * (k + n),
                    num_flops=2.0 * m * k * n,
                    bound="read" if m <= 32 else "matmul",
                    target=None
                    if context.is_cuda or context.quick or m < 128 or bits != 4
                    else Target(min_speedup=1.0),
                    op=f"quantized_matmul W{bits}A16",
                )
        if not context.is_cuda and not context.quick:
            k, n = _CPU_LONG
            yield Case(
                name=f"quantized_matmul W{bits}A16 M1 K{k} N{n} {dtype}, weights in turn",
                prepare=partial(_weight_only, context, bits, (1, k, n), dtype, in_turn=True),
                num_bytes=k * n * bits / 8 + 2 * k * n / _GROUP + 2 * (k + n),
                num_flops=2.0 * k * n,
                bound="read",
                target=Target(min_percent=70.0) if bits == 4 else None,
                op=f"quantized_matmul W{bits}A16",
            )
    for name, scaling in (("float8_e4m3fn", "channel"), ("float8_e4m3fn", "block"), ("int8", "channel")):
        for k, n in shapes:
            for m in tokens:
                yield Case(
                    name=f"scaled_matmul {name}, scale per {scaling}, M{m} K{k} N{n}",
                    prepare=partial(_scaled, context, name, scaling, (m, k, n)),
                    num_bytes=k * n + m * k + 2 * m * n,
                    num_flops=2.0 * m * k * n,
                    bound="read" if m <= 32 else "matmul",
                    target=Target(min_speedup=1.5)
                    if not context.is_cuda and not context.quick and name == "int8" and m == 512
                    else None,
                    op=f"scaled_matmul {name}",
                )
    grid = [(16, 1024)] if context.quick else [(64, 4096), (4096, 4096), (4096, 8192), (16384, 4096)]
    granularities: tuple[Granularity, ...] = ("tensor", "token", "group")
    for kind in ("fp8", "int8"):
        for granularity in granularities:
            for rows, width in grid if context.is_cuda or context.quick else grid[:2]:
                yield Case(
                    name=f"quantize_{kind}, scale per {granularity}, T{rows} H{width} bfloat16",
                    prepare=partial(_quantize, context, kind, granularity, (rows, width)),
                    num_bytes=3 * rows * width,
                    bound="copy",
                    op=f"quantize_{kind}",
                )
        for rows, width in grid if context.is_cuda or context.quick else grid[:2]:
            yield Case(
                name=f"dequantize_{kind}, scale per token, T{rows} H{width} bfloat16",
                prepare=partial(_dequantize, context, kind, (rows, width)),
                num_bytes=3 * rows * width,
                bound="copy",
                op=f"dequantize_{kind}",
            )


def _weight_only(
    context: Context, bits: int, shape: tuple[int, int, int], dtype: str, *, in_turn: bool = False
) -> Work:
    """One weight, or as many copies in turn as no cache holds; the peers have one."""
    m, k, n = shape
    arrays = context.arrays
    rng = np.random.default_rng(1)
    qweight = rng.integers(-(2**31), 2**31, (k * bits // 32, n)).astype(np.int32)
    scales = arrays.random((k // _GROUP, n), dtype, 1e-3)
    scales = abs(scales)
    weight = quire.PackedWeight.from_gptq(arrays.put(qweight), None, scales, bits=bits, group_size=_GROUP)
    x, out = arrays.random((m, k), dtype, 0.1), arrays.empty((m, n), dtype)
    dense = weight.dequantize(dtype)
    peers = peers_of(
        context,
        f"quantized_matmul_w{bits}",
        out=out,
        x=x,
        weight=dense,
        qweight=arrays.put(qweight),
        scales=scales,
        group_size=_GROUP,
    )
    if not in_turn:
        return Work(lambda: quire.quantized_matmul(x, weight, out=out), peers)
    weights = cycle(
        [weight]
        + [
            quire.PackedWeight.from_gptq(qweight, None, scales, bits=bits, group_size=_GROUP)
            for _ in range(_BEYOND_CACHES // weight.nbytes)
        ]
    )
    return Work(lambda: quire.quantized_matmul(x, next(weights), out=out), peers)


def _scaled(context: Context, dtype: str, scaling: str, shape: tuple[int, int, int]) -> Work:
    m, k, n = shape
    arrays = context.arrays
    a, b = arrays.random((m, k), dtype), arrays.random((n, k), dtype)
    out = arrays.empty((m, n), "bfloat16")
    blocks = scaling == "block"
    ones = np.ones
    scale_a = arrays.put(ones((m, -(-k // 128) if blocks else 1), np.float32))
    scale_b = arrays.put(ones((-(-n // 128), -(-k // 128)) if blocks else (n, 1), np.float32))
    peers = peers_of(context, f"scaled_matmul_{scaling}", out=out, a=a, b=b, scale_a=scale_a, scale_b=scale_b)
    return Work(lambda: quire.scaled_matmul(a, b, scale_a, scale_b, out=out), peers)


def _quantize(
    context: Context, kind: Literal["fp8", "int8"], granularity: Granularity, shape: tuple[int, int]
) -> Work:
    arrays = context.arrays
    x = arrays.random(shape, "bfloat16")
    out = arrays.empty(shape, "float8_e4m3fn" if kind == "fp8" else "int8")
    columns = {"tensor": (1,), "token": (shape[0], 1), "group": (shape[0], shape[1] // 128)}[granularity]
    scale = arrays.empty(columns, "float32")

    def run() -> Any:
        if kind == "fp8":
            return quire.quantize_fp8(x, granularity=granularity, out=(out, scale))
        return quire.quantize_int8(x, granularity=granularity, out=(out, scale))

    return Work(run, peers_of(context, f"quantize_{kind}_{granularity}", out=out, scale=scale, x=x))


def _dequantize(context: Context, kind: Literal["fp8", "int8"], shape: tuple[int, int]) -> Work:
    arrays = context.arrays
    q = arrays.random(shape, "float8_e4m3fn" if kind == "fp8" else "int8")
    scale, out = arrays.put(np.full((shape[0], 1), 0.01, np.float32)), arrays.empty(shape, "bfloat16")
    function = quire.dequantize_fp8 if kind == "fp8" else quire.dequantize_int8
    return Work(
        lambda: function(q, scale, granularity="token", out=out),
        peers_of(context, f"dequantize_{kind}_token", out=out, q=q, scale=scale),
    )
