"""The activations of quire.jax.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from quire._allocate import Array
from quire._quantized import Granularity, check_no_quantization
from quire.jax import _batch
from quire.jax._call import Op, call
from quire.jax._results import like, quantization, quantized_results


def _half(x: Array) -> tuple[int, ...]:
    return (*x.shape[:-1], x.shape[-1] // 2) if x.shape else ()


def _gated_op(name: str) -> tuple[Op, Op]:
    plain = Op(name, ("x",), lambda o, a: [(_half(o[0]), str(o[0].dtype))], _batch.rows([0]))
    quantized = Op(
        f"{name}_quantized",
        ("x", "scale"),
        lambda o, a: quantized_results(o[0], _half(o[0]), a),
        _batch.rows([0]),
    )
    return plain, quantized


_GATED = {name: _gated_op(name) for name in ("silu_and_mul", "gelu_and_mul", "gelu_tanh_and_mul")}
_PLAIN = {
    name: Op(name, ("x",), lambda o, a: [like(o[0])], _batch.rows([0]))
    for name in ("gelu_new", "gelu_fast", "gelu_quick", "relu_squared")
}


def _gated(
    name: str, x: Array, out_dtype: object, scale: Array | None, granularity: str, group_size: int
) -> Array | tuple[Array, Array]:
    plain, quantized = _GATED[name]
    if out_dtype is None:
        check_no_quantization(name, scale, granularity)
        return call(plain, [x], {})[0]
    attributes = quantization(name, out_dtype, scale, granularity, group_size)
    out, *scales = call(quantized, [x, scale], attributes)
    return out, *(scales or [scale])


def silu_and_mul(
    x: Array,
    *,
    out_dtype: object = None,
    scale: Array | None = None,
    granularity: Granularity = "tensor",
    group_size: int = 128,
) -> Array | tuple[Array, Array]:
    """As :func:`quire.silu_and_mul`: ``silu(gate) * up`` of ``[..., 2 * d]``.

    Returns:
        ``out``; with ``out_dtype``, ``(out, scales)``.

    Example:
        >>> import jax.numpy as jnp, quire.jax
        >>> quire.jax.silu_and_mul(jnp.array([[0.0, 100.0, 2.0, 2.0]]))
        Array([[  0., 200.]], dtype=float32)
    """
    return _gated("silu_and_mul", x, out_dtype, scale, granularity, group_size)


def gelu_and_mul(
    x: Array,
    *,
    out_dtype: object = None,
    scale: Array | None = None,
    granularity: Granularity = "tensor",
    group_size: int = 128,
) -> Array | tuple[Array, Array]:
    """As :func:`quire.gelu_and_mul`: ``gelu(gate) * up``; see :func:`silu_and_mul`."""
    return _gated("gelu_and_mul", x, out_dtype, scale, granularity, group_size)


def gelu_tanh_and_mul(
    x: Array,
    *,
    out_dtype: object = None,
    scale: Array | None = None,
    granularity: Granularity = "tensor",
    group_size: int = 128,
) -> Array | tuple[Array, Array]:
    """As :func:`quire.gelu_tanh_and_mul`: ``gelu_tanh(gate) * up``; see :func:`silu_and_mul`."""
    return _gated("gelu_tanh_and_mul", x, out_dtype, scale, granularity, group_size)


def gelu_new(x: Array) -> Array:
    """As :func:`quire.gelu_new`."""
    return call(_PLAIN["gelu_new"], [x], {})[0]


def gelu_fast(x: Array) -> Array:
    """As :func:`quire.gelu_fast`."""
    return call(_PLAIN["gelu_fast"], [x], {})[0]


def gelu_quick(x: Array) -> Array:
    """As :func:`quire.gelu_quick`."""
    return call(_PLAIN["gelu_quick"], [x], {})[0]


def relu_squared(x: Array) -> Array:
    """As :func:`quire.relu_squared`."""
    return call(_PLAIN["relu_squared"], [x], {})[0]
