"""Normalisation over the last dimension. Sums are accumulated in float32.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from quire import _core
from quire._allocate import Array, empty, finish, shape_of

__all__ = ["fused_add_rms_norm", "layer_norm", "rms_norm"]


def rms_norm(
    x: Array,
    weight: Array,
    eps: float = 1e-6,
    *,
    weight_offset: float = 0.0,
    out: Array | None = None,
    stream: object = None,
) -> Array:
    """Root-mean-square normalisation: ``x / sqrt(mean(x**2) + eps) * (weight + weight_offset)``.

    Dimensions: ``hidden`` is the last one; there are up to three more before it.

    Args:
        x: ``[..., hidden]`` float32, float16 or bfloat16; unit inner stride, any outer strides.
        weight: ``[hidden]`` of any of the three dtypes, contiguous.
        eps: Added to the mean of squares.
        weight_offset: Added to the weight; 1 is Gemma's form.
        out: As ``x``, or None to allocate it in x's framework. May be ``x`` itself.
        stream: An int, an object with ``__cuda_stream__``, or None for the framework's current stream.

    Returns:
        ``out``.

    Raises:
        ValueError: Shapes, strides or devices do not fit, or out overlaps x in part.
        TypeError: A dtype is not one of the three, or an argument is no tensor.

    Source: Zhang and Sennrich, Root Mean Square Layer Normalization, 2019.

    Example:
        >>> import numpy as np, quire
        >>> x = np.array([[3.0, 4.0]], dtype=np.float32)
        >>> quire.rms_norm(x, np.ones(2, np.float32), eps=0.0).round(4)
        array([[0.8485, 1.1314]], dtype=float32)
    """
    if out is not None:
        _core.rms_norm(out, x, weight, eps, weight_offset, stream)
        return out
    result = empty(x, shape_of("rms_norm", "x", x))
    _core.rms_norm(result, x, weight, eps, weight_offset, stream)
    return finish(result, x)


def fused_add_rms_norm(
    x: Array,
    residual: Array,
    weight: Array,
    eps: float = 1e-6,
    *,
    weight_offset: float = 0.0,
    stream: object = None,
) -> tuple[Array, Array]:
    """In place: ``residual += x``, then ``x = rms_norm(residual, weight)``.

    The sum is rounded to the dtype before it is normalised, so the result equals the two steps done one after the other.

    Args:
        x: ``[..., hidden]`` float32, float16 or bfloat16; overwritten with the normalised sum.
        residual: As ``x``; overwritten with the sum. Must not overlap ``x``.
        weight: ``[hidden]`` of any of the three dtypes, contiguous.
        eps: Added to the mean of squares.
        weight_offset: Added to the weight; 1 is Gemma's form.
        stream: As in :func:`rms_norm`.

    Returns:
        ``(x, residual)``, the tensors that were passed.

    Raises:
        ValueError: Shapes, strides, devices do not fit, or x and residual overlap.
        TypeError: A dtype is not one of the three, or an argument is no tensor.

    Example:
        >>> import numpy as np, quire
        >>> x, residual = np.ones((1, 4), np.float32), np.ones((1, 4), np.float32)
        >>> quire.fused_add_rms_norm(x, residual, np.ones(4, np.float32), eps=0.0)[1]
        array([[2., 2., 2., 2.]], dtype=float32)
    """
    _core.fused_add_rms_norm(x, residual, weight, eps, weight_offset, stream)
    return x, residual


def layer_norm(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    eps: float = 1e-5,
    *,
    out: Array | None = None,
    stream: object = None,
) -> Array:
    """Layer normalisation: ``(x - mean) / sqrt(var + eps) * weight + bias``, with the population variance.

    Args:
        x: ``[..., hidden]`` float32, float16 or bfloat16; unit inner stride, any outer strides.
        weight: ``[hidden]`` of any of the three dtypes, contiguous.
        bias: As ``weight``, or None.
        eps: Added to the variance.
        out: As ``x``, or None to allocate it in x's framework. May be ``x`` itself.
        stream: As in :func:`rms_norm`.

    Returns:
        ``out``.

    Raises:
        ValueError: Shapes, strides or devices do not fit, or out overlaps x in part.
        TypeError: A dtype is not one of the three, or an argument is no tensor.

    Source: Ba, Kiros and Hinton, Layer Normalization, 2016.

    Example:
        >>> import numpy as np, quire
        >>> quire.layer_norm(np.array([[1.0, 3.0]], np.float32), np.ones(2, np.float32), eps=0.0)
        array([[-1.,  1.]], dtype=float32)
    """
    result = empty(x, shape_of("layer_norm", "x", x)) if out is None else out
    _core.layer_norm(result, x, weight, bias, eps, stream)
    return finish(result, x) if out is None else out
