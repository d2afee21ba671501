"""Activations of the feed-forward layer, gated and plain. Arithmetic is in float32.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from collections.abc import Callable
from typing import overload

from quire import _core
from quire._allocate import Array, empty, finish, shape_of
from quire._quantized import Granularity, Quantized, check_no_quantization

__all__ = [
    "gelu_and_mul",
    "gelu_fast",
    "gelu_new",
    "gelu_quick",
    "gelu_tanh_and_mul",
    "relu_squared",
    "silu_and_mul",
]


def _gated(
    op: Callable[..., None],
    quantized_op: Callable[..., None],
    x: Array,
    out: Array | tuple[Array, Array] | None,
    out_dtype: object,
    scale: Array | None,
    granularity: Granularity,
    group_size: int,
    stream: object,
) -> Array | tuple[Array, Array]:
    if out_dtype is not None:
        *rows, width = shape_of(op.__name__, "x", x) or (0,)
        q = Quantized(op.__name__, x, (*rows, width // 2), out_dtype, scale, granularity, group_size, out)
        quantized_op(q.out, q.scales, x, granularity, group_size, stream)
        return q.finish()
    check_no_quantization(op.__name__, scale, granularity)
    result = out
    if out is None:
        *rows, width = shape_of(op.__name__, "x", x) or (0,)
        result = empty(x, (*rows, width // 2))
    op(result, x, stream)
    return finish(result, x) if out is None else out


def _plain(op: Callable[..., None], x: Array, out: Array | None, stream: object) -> Array:
    result = empty(x, shape_of(op.__name__, "x", x)) if out is None else out
    op(result, x, stream)
    return finish(result, x) if out is None else out


@overload
def silu_and_mul(
    x: Array, *, out: Array | None = None, out_dtype: None = None, stream: object = None
) -> Array: ...
@overload
def silu_and_mul(
    x: Array,
    *,
    out: Array | tuple[Array, Array] | None = None,
    out_dtype: object,
    scale: Array | None = None,
    granularity: Granularity = "tensor",
    group_size: int = 128,
    stream: object = None,
) -> tuple[Array, Array]: ...
def silu_and_mul(
    x: Array,
    *,
    out: Array | tuple[Array, Array] | None = None,
    out_dtype: object = None,
    scale: Array | None = None,
    granularity: Granularity = "tensor",
    group_size: int = 128,
    stream: object = None,
) -> Array | tuple[Array, Array]:
    """``silu(gate) * up`` with ``silu(g) = g / (1 + exp(-g))``; SwiGLU's activation.

    Args:
        x: ``[..., 2 * d]`` float32, float16 or bfloat16: gate, then up; unit inner stride, any outer strides.
        out: ``[..., d]`` of x's dtype, apart from ``x``; None allocates it in x's framework. Quantized and with computed scales it is
            a pair ``(out, scales)``.
        out_dtype: "float8_e4m3fn" or "int8", or a framework's dtype of that name: the result is quantized,
            ``stored = saturate(y / scale)`` of the float32 result, and comes with its scales. None: x's dtype.
        scale: As in :func:`quire.rms_norm`.
        granularity: Likewise; scales of "group" are float32 ``[..., d / group_size]``.
        group_size: Likewise; divides d.
        stream: An int, an object with ``__cuda_stream__``, or None for the framework's current stream.

    Returns:
        ``out``; with ``out_dtype``, ``(out, scales)``.

    Raises:
        ValueError: Shapes, strides or devices do not fit, out overlaps x, or a scale is missing, too many, or without out_dtype.
        TypeError: A dtype is not one of those, or an argument is no tensor.

    Source: Shazeer, GLU Variants Improve Transformer, 2020.

    Example:
        >>> import numpy as np, quire
        >>> quire.silu_and_mul(np.array([[0.0, 1.0, 2.0, 2.0]], np.float32)).round(4)
        array([[0.    , 1.4621]], dtype=float32)
    """
    return _gated(
        _core.silu_and_mul,
        _core.silu_and_mul_quantized,
        x,
        out,
        out_dtype,
        scale,
        granularity,
        group_size,
        stream,
    )


@overload
def gelu_and_mul(
    x: Array, *, out: Array | None = None, out_dtype: None = None, stream: object = None
) -> Array: ...
@overload
def gelu_and_mul(
    x: Array,
    *,
    out: Array | tuple[Array, Array] | None = None,
    out_dtype: object,
    scale: Array | None = None,
    granularity: Granularity = "tensor",
    group_size: int = 128,
    stream: object = None,
) -> tuple[Array, Array]: ...
def gelu_and_mul(
    x: Array,
    *,
    out: Array | tuple[Array, Array] | None = None,
    out_dtype: object = None,
    scale: Array | None = None,
    granularity: Granularity = "tensor",
    group_size: int = 128,
    stream: object = None,
) -> Array | tuple[Array, Array]:
    """``gelu(gate) * up`` with ``gelu(g) = g / 2 * (1 + erf(g / sqrt(2)))``; GEGLU's activation.

    Arguments, result and exceptions are those of :func:`silu_and_mul`.

    Source: Hendrycks and Gimpel, Gaussian Error Linear Units, 2016; Shazeer, GLU Variants Improve Transformer, 2020.
    """
    return _gated(
        _core.gelu_and_mul,
        _core.gelu_and_mul_quantized,
        x,
        out,
        out_dtype,
        scale,
        granularity,
        group_size,
        stream,
    )


@overload
def gelu_tanh_and_mul(
    x: Array, *, out: Array | None = None, out_dtype: None = None, stream: object = None
) -> Array: ...
@overload
def gelu_tanh_and_mul(
    x: Array,
    *,
    out: Array | tuple[Array, Array] | None = None,
    out_dtype: object,
    scale: Array | None = None,
    granularity: Granularity = "tensor",
    group_size: int = 128,
    stream: object = None,
) -> tuple[Array, Array]: ...
def gelu_tanh_and_mul(
    x: Array,
    *,
    out: Array | tuple[Array, Array] | None = None,
    out_dtype: object = None,
    scale: Array | None = None,
    granularity: Granularity = "tensor",
    group_size: int = 128,
    stream: object = None,
) -> Array | tuple[Array, Array]:
    """``gelu_tanh(gate) * up`` with ``gelu_tanh(g) = g / 2 * (1 + tanh(sqrt(2 / pi) * (g + 0.044715 g**3)))``; Gemma's.

    Arguments, result and exceptions are those of :func:`silu_and_mul`.

    Source: Hendrycks and Gimpel, Gaussian Error Linear Units, 2016; Shazeer, GLU Variants Improve Transformer, 2020.
    """
    return _gated(
        _core.gelu_tanh_and_mul,
        _core.gelu_tanh_and_mul_quantized,
        x,
        out,
        out_dtype,
        scale,
        granularity,
        group_size,
        stream,
    )


def gelu_new(x: Array, *, out: Array | None = None, stream: object = None) -> Array:
    """``x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x**3)))``; GPT-2's GELU.

    Args:
        x: ``[..., d]`` float32, float16 or bfloat16; unit inner stride, any outer strides.
        out: As ``x``; may be ``x`` itself; None allocates it in x's framework.
        stream: An int, an object with ``__cuda_stream__``, or None for the framework's current stream.

    Returns:
        ``out``.

    Raises:
        ValueError: Shapes, strides or devices do not fit, or out overlaps x in part.
        TypeError: The dtype is not one of the three, or an argument is no tensor.

    Source: Hendrycks and Gimpel, Gaussian Error Linear Units, 2016.

    Example:
        >>> import numpy as np, quire
        >>> quire.gelu_new(np.array([[0.0, 1.0]], np.float32)).round(4)
        array([[0.    , 0.8412]], dtype=float32)
    """
    return _plain(_core.gelu_new, x, out, stream)


def gelu_fast(x: Array, *, out: Array | None = None, stream: object = None) -> Array:
    """``x / 2 * (1 + tanh(0.7978845608 x (1 + 0.044715 x**2)))``: gelu_new in another order of operations.

    Arguments, result, source and exceptions are those of :func:`gelu_new`.
    """
    return _plain(_core.gelu_fast, x, out, stream)


def gelu_quick(x: Array, *, out: Array | None = None, stream: object = None) -> Array:
    """``x / (1 + exp(-1.702 x))``; CLIP's GELU.

    Arguments, result, source and exceptions are those of :func:`gelu_new`.
    """
    return _plain(_core.gelu_quick, x, out, stream)


def relu_squared(x: Array, *, out: Array | None = None, stream: object = None) -> Array:
    """``max(x, 0)**2``.

    Arguments, result and exceptions are those of :func:`gelu_new`.

    Source: So et al., Primer: Searching for Efficient Transformers, 2021.
    """
    return _plain(_core.relu_squared, x, out, stream)
