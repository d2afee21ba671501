"""The norms of quire.jax.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from quire._allocate import Array
from quire._quantized import Granularity, check_no_quantization
from quire.jax import _batch
from quire.jax._call import Attributes, Op, call
from quire.jax._results import like, quantization, quantized_results

_RMS_NORM = Op("rms_norm", ("x", "weight"), lambda o, a: [like(o[0])], _batch.rows([0]))
_RMS_NORM_QUANTIZED = Op(
    "rms_norm_quantized",
    ("x", "weight", "scale"),
    lambda o, a: quantized_results(o[0], tuple(o[0].shape), a),
    _batch.rows([0]),
)
_FUSED_ADD_RMS_NORM = Op(
    "fused_add_rms_norm",
    ("x", "residual", "weight"),
    lambda o, a: [like(o[0]), like(o[1])],
    _batch.rows([0, 1]),
    aliases=((0, 0), (1, 1)),
)
_FUSED_ADD_RMS_NORM_QUANTIZED = Op(
    "fused_add_rms_norm_quantized",
    ("x", "residual", "weight", "scale"),
    lambda o, a: [*quantized_results(o[0], tuple(o[0].shape), a), like(o[1])],
    _batch.rows([0, 1]),
    aliases=((2, 1),),
)
_LAYER_NORM = Op("layer_norm", ("x", "weight", "bias"), lambda o, a: [like(o[0])], _batch.rows([0]))
_LAYER_NORM_QUANTIZED = Op(
    "layer_norm_quantized",
    ("x", "weight", "bias", "scale"),
    lambda o, a: quantized_results(o[0], tuple(o[0].shape), a),
    _batch.rows([0]),
)


def rms_norm(
    x: Array,
    weight: Array,
    eps: float = 1e-6,
    *,
    weight_offset: float = 0.0,
    out_dtype: object = None,
    scale: Array | None = None,
    granularity: Granularity = "tensor",
    group_size: int = 128,
) -> Array | tuple[Array, Array]:
    """As :func:`quire.rms_norm`: ``x / sqrt(mean(x**2) + eps) * (weight + weight_offset)``.

    Returns:
        ``out``; with ``out_dtype``, ``(out, scales)``.

    Example:
        >>> import jax, jax.numpy as jnp, quire.jax
        >>> jax.jit(quire.jax.rms_norm)(jnp.array([[3.0, -3.0]]), jnp.ones(2)).round()
        Array([[ 1., -1.]], dtype=float32)
    """
    attributes: Attributes = {"eps": float(eps), "weight_offset": float(weight_offset)}
    if out_dtype is None:
        check_no_quantization("rms_norm", scale, granularity)
        return call(_RMS_NORM, [x, weight], attributes)[0]
    attributes |= quantization("rms_norm", out_dtype, scale, granularity, group_size)
    out, *scales = call(_RMS_NORM_QUANTIZED, [x, weight, scale], attributes)
    return out, *(scales or [scale])


def fused_add_rms_norm(
    x: Array,
    residual: Array,
    weight: Array,
    eps: float = 1e-6,
    *,
    weight_offset: float = 0.0,
    out_dtype: object = None,
    scale: Array | None = None,
    granularity: Granularity = "tensor",
    group_size: int = 128,
) -> tuple[Array, ...]:
    """As :func:`quire.fused_add_rms_norm`: ``residual + x``, rounded, and its norm.

    Returns:
        ``(x, residual)``; with ``out_dtype``, ``(out, scales, residual)``.

    Example:
        >>> import jax.numpy as jnp, quire.jax
        >>> x, residual = quire.jax.fused_add_rms_norm(jnp.array([[1.0, 1.0]]), jnp.array([[2.0, 3.0]]), jnp.ones(2))
        >>> residual
        Array([[3., 4.]], dtype=float32)
    """
    attributes: Attributes = {"eps": float(eps), "weight_offset": float(weight_offset)}
    if out_dtype is None:
        check_no_quantization("fused_add_rms_norm", scale, granularity)
        return call(_FUSED_ADD_RMS_NORM, [x, residual, weight], attributes)
    attributes |= quantization("fused_add_rms_norm", out_dtype, scale, granularity, group_size)
    out, *scales, residual = call(_FUSED_ADD_RMS_NORM_QUANTIZED, [x, residual, weight, scale], attributes)
    return out, *(scales or [scale]), residual


def layer_norm(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    eps: float = 1e-5,
    *,
    out_dtype: object = None,
    scale: Array | None = None,
    granularity: Granularity = "tensor",
    group_size: int = 128,
) -> Array | tuple[Array, Array]:
    """As :func:`quire.layer_norm`: ``(x - mean(x)) / sqrt(var(x) + eps) * weight + bias``.

    Returns:
        ``out``; with ``out_dtype``, ``(out, scales)``.

    Example:
        >>> import jax.numpy as jnp, quire.jax
        >>> quire.jax.layer_norm(jnp.array([[1.0, 3.0]]), jnp.ones(2), eps=0.0)
        Array([[-1.,  1.]], dtype=float32)
    """
    attributes: Attributes = {"eps": float(eps)}
    if out_dtype is None:
        check_no_quantization("layer_norm", scale, granularity)
        return call(_LAYER_NORM, [x, weight, bias], attributes)[0]
    attributes |= quantization("layer_norm", out_dtype, scale, granularity, group_size)
    out, *scales = call(_LAYER_NORM_QUANTIZED, [x, weight, bias, scale], attributes)
    return out, *(scales or [scale])
