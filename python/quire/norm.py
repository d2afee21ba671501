"""Normalisation over the last dimension. Sums are accumulated in float32.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from typing import overload

from quire import _core
from quire._allocate import Array, empty, finish, shape_of
from quire._quantized import Granularity, Quantized, check_no_quantization

__all__ = ["fused_add_rms_norm", "layer_norm", "rms_norm"]


@overload
def rms_norm(
    x: Array,
    weight: Array,
    eps: float = 1e-6,
    *,
    weight_offset: float = 0.0,
    out: Array | None = None,
    out_dtype: None = None,
    stream: object = None,
) -> Array: ...
@overload
def rms_norm(
    x: Array,
    weight: Array,
    eps: float = 1e-6,
    *,
    weight_offset: float = 0.0,
    out: Array | tuple[Array, Array] | None = None,
    out_dtype: object,
    scale: Array | None = None,
    granularity: Granularity = "tensor",
    group_size: int = 128,
    stream: object = None,
) -> tuple[Array, Array]: ...
def rms_norm(
    x: Array,
    weight: Array,
    eps: float = 1e-6,
    *,
    weight_offset: float = 0.0,
    out: Array | tuple[Array, Array] | None = None,
    out_dtype: object = None,
    scale: Array | None = None,
    granularity: Granularity = "tensor",
    group_size: int = 128,
    stream: object = None,
) -> Array | tuple[Array, Array]:
    """Root-mean-square normalisation: ``x / sqrt(mean(x**2) + eps) * (weight + weight_offset)``.

    Dimensions: ``hidden`` is the last one; there are up to three more before it.

    Args:
        x: ``[..., hidden]`` float32, float16 or bfloat16; unit inner stride, any outer strides.
        weight: ``[hidden]`` of any of the three dtypes, contiguous.
        eps: Added to the mean of squares.
        weight_offset: Added to the weight; 1 is Gemma's form.
        out: As ``x``, or None to allocate it in x's framework. May be ``x`` itself. A quantized one is apart from ``x``; where scales
            are computed it is a pair ``(out, scales)``.
        out_dtype: "float8_e4m3fn" or "int8", or a framework's dtype of that name: the result is quantized,
            ``stored = saturate(y / scale)`` of the float32 result, and comes with its scales. None: x's dtype.
        scale: With granularity "tensor": float32 ``[1]``, the scale of the whole result.
        granularity: "tensor", with a given scale; "token": a computed scale for each row, float32 ``[..., 1]``; "group": one for
            each ``group_size`` elements of a row, float32 ``[..., hidden / group_size]``. Computed scales are the largest magnitude
            divided by 448 (float8) or 127 (int8), and not below 2**-126.
        group_size: For granularity "group"; divides hidden.
        stream: An int, an object with ``__cuda_stream__``, or None for the framework's current stream.

    Returns:
        ``out``; with ``out_dtype``, ``(out, scales)``.

    Raises:
        ValueError: Shapes, strides or devices do not fit, out overlaps x in part, or a scale is missing, too many, or without out_dtype.
        TypeError: A dtype is not one of those, or an argument is no tensor.

    Source: Zhang and Sennrich, Root Mean Square Layer Normalization, 2019.

    Example:
        >>> import numpy as np, quire
        >>> x = np.array([[3.0, 4.0]], dtype=np.float32)
        >>> quire.rms_norm(x, np.ones(2, np.float32), eps=0.0).round(4)
        array([[0.8485, 1.1314]], dtype=float32)
        >>> out, scales = quire.rms_norm(x, np.ones(2, np.float32), eps=0.0, out_dtype="int8", granularity="token")
        >>> out, scales.round(4)
        (array([[ 95, 127]], dtype=int8), array([[0.0089]], dtype=float32))
    """
    if out_dtype is not None:
        shape = shape_of("rms_norm", "x", x)
        q = Quantized("rms_norm", x, shape, out_dtype, scale, granularity, group_size, out)
        _core.rms_norm_quantized(
            q.out, q.scales, x, weight, eps, weight_offset, granularity, group_size, stream
        )
        return q.finish()
    check_no_quantization("rms_norm", scale, granularity)
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
    out: Array | tuple[Array, Array] | None = None,
    out_dtype: object = None,
    scale: Array | None = None,
    granularity: Granularity = "tensor",
    group_size: int = 128,
    stream: object = None,
) -> tuple[Array, Array]:
    """In place: ``residual += x``, then ``x = rms_norm(residual, weight)``.

    The sum is rounded to the dtype before it is normalised, so the result equals the two steps done one after the other.

    Args:
        x: ``[..., hidden]`` float32, float16 or bfloat16; overwritten with the normalised sum, unless that is quantized.
        residual: As ``x``; overwritten with the sum. Must not overlap ``x``.
        weight: ``[hidden]`` of any of the three dtypes, contiguous.
        eps: Added to the mean of squares.
        weight_offset: Added to the weight; 1 is Gemma's form.
        out: With ``out_dtype`` only, as in :func:`rms_norm`.
        out_dtype: As in :func:`rms_norm`. With it x is only read, and the normalised sum goes to ``out``.
        scale: As in :func:`rms_norm`.
        granularity: Likewise.
        group_size: Likewise.
        stream: Likewise.

    Returns:
        ``(x, residual)``, the tensors that were passed; with ``out_dtype``, ``(out, scales)``.

    Raises:
        ValueError: Shapes, strides, devices do not fit, x and residual overlap, or a scale is missing, too many, or without out_dtype.
        TypeError: A dtype is not one of those, or an argument is no tensor.

    Source: As :func:`rms_norm`.

    Example:
        >>> import numpy as np, quire
        >>> x, residual = np.ones((1, 4), np.float32), np.ones((1, 4), np.float32)
        >>> quire.fused_add_rms_norm(x, residual, np.ones(4, np.float32), eps=0.0)[1]
        array([[2., 2., 2., 2.]], dtype=float32)
    """
    if out_dtype is not None:
        shape = shape_of("fused_add_rms_norm", "x", x)
        q = Quantized("fused_add_rms_norm", x, shape, out_dtype, scale, granularity, group_size, out)
        _core.fused_add_rms_norm_quantized(
            q.out, q.scales, x, residual, weight, eps, weight_offset, granularity, group_size, stream
        )
        return q.finish()
    check_no_quantization("fused_add_rms_norm", scale, granularity)
    if out is not None:
        raise ValueError(
            "[fused_add_rms_norm] out: expected none without out_dtype, got one: x is overwritten"
        )
    _core.fused_add_rms_norm(x, residual, weight, eps, weight_offset, stream)
    return x, residual


@overload
def layer_norm(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    eps: float = 1e-5,
    *,
    out: Array | None = None,
    out_dtype: None = None,
    stream: object = None,
) -> Array: ...
@overload
def layer_norm(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    eps: float = 1e-5,
    *,
    out: Array | tuple[Array, Array] | None = None,
    out_dtype: object,
    scale: Array | None = None,
    granularity: Granularity = "tensor",
    group_size: int = 128,
    stream: object = None,
) -> tuple[Array, Array]: ...
def layer_norm(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    eps: float = 1e-5,
    *,
    out: Array | tuple[Array, Array] | None = None,
    out_dtype: object = None,
    scale: Array | None = None,
    granularity: Granularity = "tensor",
    group_size: int = 128,
    stream: object = None,
) -> Array | tuple[Array, Array]:
    """Layer normalisation: ``(x - mean) / sqrt(var + eps) * weight + bias``, with the population variance.

    Args:
        x: ``[..., hidden]`` float32, float16 or bfloat16; unit inner stride, any outer strides.
        weight: ``[hidden]`` of any of the three dtypes, contiguous.
        bias: As ``weight``, or None.
        eps: Added to the variance.
        out: As in :func:`rms_norm`.
        out_dtype: Likewise.
        scale: Likewise.
        granularity: Likewise.
        group_size: Likewise.
        stream: Likewise.

    Returns:
        ``out``; with ``out_dtype``, ``(out, scales)``.

    Raises:
        ValueError: Shapes, strides or devices do not fit, out overlaps x in part, or a scale is missing, too many, or without out_dtype.
        TypeError: A dtype is not one of those, or an argument is no tensor.

    Source: Ba, Kiros and Hinton, Layer Normalization, 2016.

    Example:
        >>> import numpy as np, quire
        >>> quire.layer_norm(np.array([[1.0, 3.0]], np.float32), np.ones(2, np.float32), eps=0.0)
        array([[-1.,  1.]], dtype=float32)
    """
    if out_dtype is not None:
        shape = shape_of("layer_norm", "x", x)
        q = Quantized("layer_norm", x, shape, out_dtype, scale, granularity, group_size, out)
        _core.layer_norm_quantized(q.out, q.scales, x, weight, bias, eps, granularity, group_size, stream)
        return q.finish()
    check_no_quantization("layer_norm", scale, granularity)
    result = empty(x, shape_of("layer_norm", "x", x)) if out is None else out
    _core.layer_norm(result, x, weight, bias, eps, stream)
    return finish(result, x) if out is None else out
