"""Quantized weights and activations of quire.jax, and PackedWeight as a pytree.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, overload

import jax
import jax.numpy as jnp

from quire import _core
from quire._allocate import Array, dtype_name, shape_of
from quire._packed_weight import (
    BLOCK,
    TRACED_DEQUANTIZE,
    Fields,
    PackedWeight,
    format_of,
)
from quire._quantized import Granularity, check_given, scale_shape
from quire._refusals import REFUSALS, renamed
from quire.jax._batch import refuse_batched, rows
from quire.jax._call import Attributes, Op, Result, Value, call
from quire.quantization import ACTIVATION_NAMES, check_features, right_operand

_FLOATS = ("float32", "float16", "bfloat16")

jax.tree_util.register_pytree_node(PackedWeight, PackedWeight._flatten, PackedWeight._unflatten)


def _float_name(op: str, dtype: object, arg: str = "out_dtype") -> str:
    name = dtype_name(dtype)
    if name not in _FLOATS:
        raise TypeError(f"[{op}] {arg}: expected float32, float16 or bfloat16, got {name}")
    return name


def _shape(op: str, arg: str, x: Array) -> tuple[int, ...]:
    return tuple(x.shape) if isinstance(x, jax.core.Tracer) else shape_of(op, arg, x)


# ---- quantize, dequantize --------------------------------------------------------------------------------------------------


def _quantize_results(operands: list[Array], attributes: Attributes) -> list[Result | None]:
    x, scale = operands[0], operands[1]
    shape = tuple(x.shape)
    out: Result = (shape, str(attributes["dtype"]))
    if scale is not None:
        return [out, None, None]
    group = scale_shape("quantize", shape, str(attributes["granularity"]), int(attributes["group_size"]))
    return [out, (group, "float32"), None if attributes["symmetric"] else (group, "int32")]


def _stack(size: int, is_batched: bool, x: Array) -> Array:
    return x if is_batched else jnp.broadcast_to(x[None], (size, *x.shape))


def _flatten(x: Array) -> Array:
    """``[rows, hidden]``. No -1 in the shape: nothing says what it stands for where there are no rows or columns."""
    return x.reshape((math.prod(x.shape[:-1]), x.shape[-1]))


def _as_rows(
    size: int, batched: list[bool], operands: list[Array], granularity: Value
) -> tuple[list[Array], bool]:
    """Operands x, scale, zero_point of a batch as those of one call over rows; and whether each element is one row of its own."""
    x: Array = _stack(size, batched[0], operands[0])
    # Each element has a scale of its own: then its whole tensor is a row.
    whole = granularity == "tensor" and (operands[1] is None or batched[1] or batched[2])
    width = math.prod(x.shape[1:]) if whole else x.shape[-1]
    num_rows = size if whole else math.prod(x.shape[:-1])
    folded: list[Array] = [x.reshape((num_rows, width))]
    for is_batched, given in zip(batched[1:], operands[1:], strict=True):
        if given is not None and (whole or granularity != "tensor"):
            wide = _stack(size, is_batched, given)
            given = wide.reshape((size, 1)) if whole else _flatten(wide)
        folded.append(given)
    return folded, whole


def _quantize_rule(
    op: Op, size: int, batched: list[bool], operands: list[Array], attributes: Attributes
) -> list[Array]:
    x: Array = operands[0]
    shape = (size, *x.shape[int(batched[0]) :])
    folded, whole = _as_rows(size, batched, operands, attributes["granularity"])
    if whole:
        attributes = {**attributes, "granularity": "token"}
    out, *scales = call(op, folded, attributes)
    return [
        out.reshape(shape),
        *(s.reshape((size, 1) if whole else (*shape[:-1], s.shape[-1])) for s in scales),
    ]


def _dequantize_rule(
    op: Op, size: int, batched: list[bool], operands: list[Array], attributes: Attributes
) -> list[Array]:
    q: Array = operands[0]
    shape = (size, *q.shape[int(batched[0]) :])
    if attributes["granularity"] == "block":
        if shape[1] % BLOCK != 0:  # a block's rows would be those of two
            refuse_batched(op, batched, (0, 1))
        folded: list[Array] = [_flatten(w) for w in map(_stack, [size] * 2, batched, operands[:2])]
        return [call(op, [*folded, None], attributes)[0].reshape(shape)]
    folded, whole = _as_rows(size, batched, operands, attributes["granularity"])
    if whole:
        attributes = {**attributes, "granularity": "token"}
    return [call(op, folded, attributes)[0].reshape(shape)]


_QUANTIZE = {
    name: Op(name, ("x", "scale", "zero_point"), _quantize_results, _quantize_rule)
    for name in ("quantize_fp8", "quantize_int8")
}
_DEQUANTIZE = {
    name: Op(
        name,
        ("q", "scale", "zero_point"),
        lambda o, a: [(tuple(o[0].shape), str(a["dtype"]))],
        _dequantize_rule,
    )
    for name in ("dequantize_fp8", "dequantize_int8")
}


def _quantize(
    op: str,
    dtype: str,
    x: Array,
    symmetric: bool,
    scale: Array | None,
    zero_point: Array | None,
    granularity: str,
    group_size: int,
    scale_ub: float | None,
) -> tuple[Array, ...]:
    shape = _shape(op, "x", x)
    if not shape:
        raise ValueError(f"[{op}] x: expected rank 1 to 4, got []")
    scale_shape(op, shape, granularity, group_size)
    check_given(op, symmetric, scale, zero_point, scale_ub)
    attributes: Attributes = {
        "dtype": dtype,
        "granularity": granularity,
        "group_size": int(group_size),
        "symmetric": int(symmetric),
    }
    if scale_ub is not None:
        attributes["scale_ub"] = float(scale_ub)
    out, *scales = call(_QUANTIZE[op], [x, scale, zero_point], attributes)
    if scale is None:
        return out, *scales
    return (out, scale) if symmetric else (out, scale, zero_point)


def quantize_fp8(
    x: Array,
    *,
    scale: Array | None = None,
    granularity: Granularity = "tensor",
    group_size: int = 128,
    scale_ub: float | None = None,
) -> tuple[Array, Array]:
    """As :func:`quire.quantize_fp8`: ``saturate(x / scale)``. Under ``jax.vmap`` each batch element has scales of its own.

    Returns:
        ``(out, scale)``.

    Example:
        >>> import jax.numpy as jnp, quire.jax
        >>> q, scale = quire.jax.quantize_fp8(jnp.array([[1.0, -448.0]]))
        >>> q.astype(jnp.float32), scale
        (Array([[   1., -448.]], dtype=float32), Array([1.], dtype=float32))
    """
    out, scales = _quantize(
        "quantize_fp8", "float8_e4m3fn", x, True, scale, None, granularity, group_size, scale_ub
    )
    return out, scales


@overload
def quantize_int8(
    x: Array,
    *,
    symmetric: Literal[True] = ...,
    scale: Array | None = ...,
    zero_point: None = ...,
    granularity: Granularity = ...,
    group_size: int = ...,
) -> tuple[Array, Array]: ...
@overload
def quantize_int8(
    x: Array,
    *,
    symmetric: bool,
    scale: Array | None = ...,
    zero_point: Array | None = ...,
    granularity: Granularity = ...,
    group_size: int = ...,
) -> tuple[Array, ...]: ...
def quantize_int8(
    x: Array,
    *,
    symmetric: bool = True,
    scale: Array | None = None,
    zero_point: Array | None = None,
    granularity: Granularity = "tensor",
    group_size: int = 128,
) -> tuple[Array, ...]:
    """As :func:`quire.quantize_int8`: ``saturate(round(x / scale) + zero_point)``; see :func:`quantize_fp8`.

    Returns:
        ``(out, scale)``, or unless symmetric ``(out, scale, zero_point)``.

    Example:
        >>> import jax.numpy as jnp, quire.jax
        >>> quire.jax.quantize_int8(jnp.array([[1.0, -2.0]]))[0]
        Array([[  64, -127]], dtype=int8)
    """
    return _quantize("quantize_int8", "int8", x, symmetric, scale, zero_point, granularity, group_size, None)


def _dequantize(
    op: str,
    q: Array,
    scale: Array,
    zero_point: Array | None,
    granularity: str,
    group_size: int,
    out_dtype: object,
) -> Array:
    if granularity not in ("tensor", "token", "group", "block"):
        raise ValueError(
            f'[{op}] granularity: expected "tensor", "token", "group" or "block", got "{granularity}"'
        )
    if granularity == "block" and zero_point is not None:
        raise ValueError(f'[{op}] zero_point: expected none with granularity "block", got one')
    attributes: Attributes = {
        "dtype": _float_name(op, out_dtype),
        "granularity": granularity,
        "group_size": int(group_size),
    }
    return call(_DEQUANTIZE[op], [q, scale, zero_point], attributes)[0]


def dequantize_fp8(
    q: Array,
    scale: Array,
    *,
    granularity: Literal["tensor", "token", "group", "block"] = "tensor",
    group_size: int = 128,
    out_dtype: object = "float32",
) -> Array:
    """As :func:`quire.dequantize_fp8`: ``q * scale``.

    Returns:
        ``out``.

    Example:
        >>> import jax.numpy as jnp, quire.jax
        >>> q, scale = quire.jax.quantize_fp8(jnp.array([[7.0, -448.0]]), granularity="token")
        >>> quire.jax.dequantize_fp8(q, scale, granularity="token")
        Array([[   7., -448.]], dtype=float32)
    """
    return _dequantize("dequantize_fp8", q, scale, None, granularity, group_size, out_dtype)


def dequantize_int8(
    q: Array,
    scale: Array,
    zero_point: Array | None = None,
    *,
    granularity: Literal["tensor", "token", "group", "block"] = "tensor",
    group_size: int = 128,
    out_dtype: object = "float32",
) -> Array:
    """As :func:`quire.dequantize_int8`: ``(q - zero_point) * scale``.

    Returns:
        ``out``.

    Example:
        >>> import jax.numpy as jnp, quire.jax
        >>> q, scale, zero = quire.jax.quantize_int8(jnp.array([[0.0, 255.0]]), symmetric=False)
        >>> quire.jax.dequantize_int8(q, scale, zero)
        Array([[  0., 255.]], dtype=float32)
    """
    return _dequantize("dequantize_int8", q, scale, zero_point, granularity, group_size, out_dtype)


# ---- products --------------------------------------------------------------------------------------------------------------


def _num_rows(x: Array) -> int:
    return math.prod(x.shape[:-1])


def _has_gpu() -> bool:
    return _core.has_cuda() and _core.num_cuda_devices() > 0


def _packed_scratch(operands: list[Array], attributes: Attributes) -> int:
    x: Array = operands[0]
    tokens = _num_rows(x)
    if tokens == 0:
        return 0
    return _core.quantized_matmul_workspace_size(
        tokens,
        format_of(_fields_of(attributes)),
        operands[2] is not None,
        x.dtype,
        bool(attributes["batch_invariant"]),
        attributes["layout"],
    )


def _most_bytes(size_on: Callable[[str], int]) -> int:
    """Of whichever platform needs more: which one is compiled for is not known while tracing."""
    return max(size_on(device) for device in (("cpu", "cuda") if _has_gpu() else ("cpu",)))


def _scaled_scratch(operands: list[Array], attributes: Attributes) -> int:
    a, b, scale_b = operands[0], operands[1], operands[3]
    rows_of_a, n, k = _num_rows(a), b.shape[0], b.shape[1]
    has_blocks = scale_b.ndim == 2 and scale_b.size > 1 and tuple(scale_b.shape) != (n, 1)
    computes_sums = operands[4] is not None and operands[5] is None
    invariant = bool(attributes["batch_invariant"])
    return _most_bytes(
        lambda device: _core.scaled_matmul_workspace_size(
            rows_of_a, n, k, a.dtype, has_blocks, computes_sums, invariant, device
        )
    )


def _quantizing_scratch(operands: list[Array], attributes: Attributes) -> int:
    x, weight = operands[0], operands[1]
    n, k = weight.shape
    computes_sums = operands[4] is not None and operands[5] is None
    granularity, invariant = str(attributes["granularity"]), bool(attributes["batch_invariant"])
    return _most_bytes(
        lambda device: _core.quantize_and_multiply_workspace_size(
            _num_rows(x), n, k, weight.dtype, granularity, computes_sums, invariant, device
        )
    )


def _scaled_rule(
    op: Op, size: int, batched: list[bool], operands: list[Array], attributes: Attributes
) -> list[Array]:
    refuse_batched(op, batched, (1, 3, 5, 6))
    a: Array = _stack(size, batched[0], operands[0])
    folded = list(operands)
    folded[0] = _flatten(a)
    for i in (2, 4):  # scale_a, zero_point: one for all rows, or of rows
        given: Array = operands[i]
        if given is None or (not batched[i] and given.size == 1 and given.ndim == 1):
            continue
        wide = _stack(size, batched[i], given)
        if wide.ndim != a.ndim:  # one for each batch element
            wide = wide.reshape((size, *(1,) * (a.ndim - 1)))
        wide = jnp.broadcast_to(wide, (*a.shape[:-1], wide.shape[-1]))
        folded[i] = _flatten(wide)
    out = call(op, folded, attributes)[0]
    return [out.reshape((*a.shape[:-1], out.shape[-1]))]


_FIELDS = (
    "in_features",
    "out_features",
    "bits",
    "group_size",
    "num_rows",
    "scale_dtype",
    "has_zeros",
    "layout",
)


def _fields_of(attributes: Attributes) -> Fields:
    in_features, out_features, bits, group_size, num_rows = (int(attributes[name]) for name in _FIELDS[:5])
    scale_dtype, has_zeros, layout = (attributes[name] for name in _FIELDS[5:])
    return (
        in_features, out_features, bits, group_size, num_rows, str(scale_dtype), bool(has_zeros), str(layout)
    )  # fmt: skip


_QUANTIZED_MATMUL = Op(
    "quantized_matmul",
    ("x", "w", "permutation", "bias"),
    lambda o, a: [((*o[0].shape[:-1], int(a["out_features"])), str(o[0].dtype))],
    rows([0]),
    scratch_bytes=_packed_scratch,
)


def _dequantize_weight_rule(
    op: Op, size: int, batched: list[bool], operands: list[Array], attributes: Attributes
) -> list[Array]:
    refuse_batched(op, batched, (0, 1))
    return [_stack(size, False, call(op, operands, attributes)[0])]


_DEQUANTIZE_WEIGHT = Op(
    "dequantize_weight",
    ("w", "permutation"),
    lambda o, a: [((int(a["out_features"]), int(a["in_features"])), str(a["dtype"]))],
    _dequantize_weight_rule,
)
_SCALED_MATMUL = Op(
    "scaled_matmul",
    ("a", "b", "scale_a", "scale_b", "zero_point", "column_sums", "bias"),
    lambda o, a: [((*o[0].shape[:-1], *o[1].shape[:1]), str(a["dtype"]))],
    _scaled_rule,
    scratch_bytes=_scaled_scratch,
)
_QUANTIZE_AND_MULTIPLY = Op(
    "quantize_and_multiply",
    ("x", "weight", "scale", "input_scale", "input_zero_point", "column_sums", "bias"),
    lambda o, a: [((*o[0].shape[:-1], *o[1].shape[:1]), str(o[0].dtype))],
    rows([0]),
    scratch_bytes=_quantizing_scratch,
    function="quantized_matmul",
)


def quantized_matmul(
    x: Array, w: PackedWeight, *, bias: Array | None = None, batch_invariant: bool = False
) -> Array:
    """As :func:`quire.quantized_matmul`: ``x @ w.T + bias``.

    The weight may be an argument of a jitted function: ``quire.jax`` makes PackedWeight a pytree, whose leaves are its tensors, and whose
    format and shape are static.

    Returns:
        ``out``.

    Example:
        >>> import jax, jax.numpy as jnp, quire, quire.jax
        >>> w = quire.PackedWeight.quantize(jnp.eye(64), "w8a16", 32)
        >>> jax.jit(quire.jax.quantized_matmul)(jnp.arange(64, dtype=jnp.float16)[None], w)[0, :4].round(1)
        Array([0., 1., 2., 3.], dtype=float16)
    """
    if not isinstance(w, PackedWeight):
        raise TypeError(f"[quantized_matmul] w: expected a PackedWeight, got {type(w).__qualname__}")
    if w.weight is not None:
        return _quantize_and_multiply(x, w, bias, batch_invariant)
    attributes = _packed_attributes(w) | {"batch_invariant": int(batch_invariant)}
    return call(_QUANTIZED_MATMUL, [x, w._data, w._permutation, bias], attributes)[0]


def _packed_attributes(w: PackedWeight) -> Attributes:
    assert w._fields is not None
    attributes: Attributes = dict(zip(_FIELDS, w._fields, strict=True))
    return attributes | {"has_zeros": int(attributes["has_zeros"])}


def _dequantize_traced(w: PackedWeight, dtype: object, out: Array | None, stream: object) -> Array:
    """:meth:`PackedWeight.dequantize` of a weight whose tensors are traced."""
    for arg, given in (("out", out), ("stream", stream)):
        if given is not None:
            raise ValueError(f"[dequantize] {arg}: expected none under a JAX transformation, got one")
    name = _float_name("dequantize", dtype, "dtype")
    if w.weight is not None:
        scale = w.scale
        assert scale is not None
        of = "dequantize_fp8" if w.format == "fp8" else "dequantize_int8"
        return _dequantize(of, w.weight, scale, None, w._granularity, 1, name)
    return call(_DEQUANTIZE_WEIGHT, [w._data, w._permutation], {**_packed_attributes(w), "dtype": name})[0]


TRACED_DEQUANTIZE.append((lambda x: isinstance(x, jax.core.Tracer), _dequantize_traced))


def _quantize_and_multiply(x: Array, w: PackedWeight, bias: Array | None, batch_invariant: bool) -> Array:
    check_features(_shape("quantized_matmul", "x", x), w)
    attributes: Attributes = {
        "granularity": w._activation_granularity,
        "batch_invariant": int(batch_invariant),
    }
    operands = [x, w.weight, w.scale, w.input_scale, w.input_zero_point, w._column_sums, bias]
    try:
        return call(_QUANTIZE_AND_MULTIPLY, operands, attributes)[0]
    except REFUSALS as error:
        raise renamed(error, "quantized_matmul", ACTIVATION_NAMES) from None


def scaled_matmul(
    a: Array,
    b: Array | PackedWeight,
    scale_a: Array,
    scale_b: Array | None = None,
    *,
    zero_point: Array | None = None,
    column_sums: Array | None = None,
    bias: Array | None = None,
    out_dtype: object = "bfloat16",
    batch_invariant: bool = False,
) -> Array:
    """As :func:`quire.scaled_matmul`: ``((a - zero_point) * scale_a) @ (b * scale_b).T + bias``.

    Under ``jax.vmap`` a, scale_a and zero_point may be batched; b and what belongs to it may not.

    Returns:
        ``out``.

    Example:
        >>> import jax.numpy as jnp, quire.jax
        >>> a, b, one = jnp.array([[1, 2]], jnp.int8), jnp.array([[3, 4], [5, 6]], jnp.int8), jnp.ones(1)
        >>> quire.jax.scaled_matmul(a, b, one, one, out_dtype="float32")
        Array([[11., 17.]], dtype=float32)
    """
    b, scale_b, column_sums = right_operand(b, scale_b, column_sums)
    attributes: Attributes = {
        "dtype": _float_name("scaled_matmul", out_dtype),
        "batch_invariant": int(batch_invariant),
    }
    operands: Sequence[Array] = [a, b, scale_a, scale_b, zero_point, column_sums, bias]
    return call(_SCALED_MATMUL, operands, attributes)[0]
