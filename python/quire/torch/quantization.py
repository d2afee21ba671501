"""Quantized products and quantizing inside PyTorch.

SPDX-License-Identifier: Apache-2.0
"""

# The traced forms have the arguments of the documented functions.
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from typing import Any

import torch

from quire import _core
from quire import quantization as _quantization
from quire._packed_weight import BLOCK, TENSORS, TRACED_DEQUANTIZE, PackedWeight, Static, format_of, restore
from quire._quantized import check_given, scale_shape, split_out
from quire._refusals import unexpected
from quire.torch import _operators, _results

Tensor = torch.Tensor
_raw: Any = _core


def _quantize_call(
    out: Tensor,
    scales: Tensor | None,
    zero_points: Tensor | None,
    x: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    granularity: str,
    group_size: int,
    scale_ub: float | None,
) -> None:
    computes = scale is None
    given = (scales, zero_points) if computes else (scale, zero_point)
    bound = float("inf") if scale_ub is None else scale_ub
    call = _core.quantize_int8 if out.dtype is torch.int8 else _core.quantize_fp8
    call(out, *given, x, granularity, group_size, computes, bound, None)


_operators.define(
    "quantize",
    "Tensor(a!) out, Tensor(b!)? scales, Tensor(c!)? zero_points, Tensor x, Tensor? scale, Tensor? zero_point, str granularity, "
    "int group_size, float? scale_ub",
    _quantize_call,
)
_operators.define(
    "dequantize",
    "Tensor(a!) out, Tensor q, Tensor scale, Tensor? zero_point, str granularity, int group_size",
    lambda out, q, *a: (_raw.dequantize_int8 if q.dtype is torch.int8 else _raw.dequantize_fp8)(
        out, q, *a, None
    ),
)
_operators.define(
    "quantized_matmul",
    "Tensor(a!) out, Tensor x, Tensor weight, Tensor? permutation, Tensor? bias, Tensor(b!)? workspace, int in_features, int out_features, "
    "int bits, int group_size, int num_rows, str scale_dtype, bool has_zeros, str layout, bool batch_invariant",
    lambda *a: _raw.quantized_matmul(*a[:3], format_of(a[6:14]), *a[3:6], a[14], None),
)
_operators.define(
    "dequantize_weight",
    "Tensor(a!) out, Tensor weight, Tensor? permutation, int in_features, int out_features, int bits, int group_size, int num_rows, "
    "str scale_dtype, bool has_zeros, str layout",
    lambda out, weight, permutation, *fields: _raw.dequantize_weight(
        out, weight, format_of(fields), permutation, None
    ),
)
_operators.define(
    "scaled_matmul",
    "Tensor(a!) out, Tensor a, Tensor b, Tensor scale_a, Tensor scale_b, Tensor? zero_point, Tensor? column_sums, Tensor? bias, "
    "Tensor(b!)? workspace, bool batch_invariant",
    _operators.core_call(_core.scaled_matmul),
)


def _static_of(dumped: list[Any]) -> Static:
    """Of a weight in a saved program, where tuples have become lists."""
    format, shape, bits, group_size, layout, fields = dumped
    return format, (shape[0], shape[1]), bits, group_size, layout, None if fields is None else tuple(fields)


# A weight among the arguments of what is exported; its tensors are inputs then.
_pytree: Any = torch.utils._pytree
_pytree.register_pytree_node(
    PackedWeight,
    lambda w: (list(w._flatten()[0]), w._flatten()[1]),
    lambda tensors, static: PackedWeight._unflatten(static, list(tensors)),
    serialized_type_name="quire.PackedWeight",
    flatten_with_keys_fn=lambda w: (
        [(_pytree.GetAttrKey(name), t) for name, t in zip(TENSORS, w._flatten()[0], strict=True)],
        w._flatten()[1],
    ),
    to_dumpable_context=list,
    from_dumpable_context=_static_of,
)
torch.serialization.add_safe_globals([restore])


def _quantize(op: str, x, dtype, symmetric, scale, zero_point, granularity, group_size, scale_ub, out) -> Any:
    if x.ndim == 0:
        raise ValueError(f"[{op}] x: expected rank 1 to 4, got []")
    wanted = scale_shape(op, tuple(x.shape), granularity, group_size)
    check_given(op, symmetric, scale, zero_point, scale_ub)
    computes, scales, zeros = scale is None, None, None
    q = out
    if out is None:
        q = x.new_empty(tuple(x.shape), dtype=dtype)
        if computes:
            scales = x.new_empty(wanted, dtype=torch.float32)
            zeros = None if symmetric else x.new_empty(wanted, dtype=torch.int32)
    elif computes:
        q, scales, zeros = split_out(op, out, symmetric)
    if q.dtype is not dtype:
        raise TypeError(f"[{op}] out: expected {str(dtype)[6:]}, got {str(q.dtype)[6:]}")
    _operators.ops.quantize(q, scales, zeros, x, scale, zero_point, granularity, group_size, scale_ub)
    return (q, scales, zeros) if computes else (q, scale, zero_point)


@_operators.function(_quantization.quantize_fp8)
def quantize_fp8(x, *, scale=None, granularity="tensor", group_size=128, scale_ub=None, out=None):
    """Traced."""
    dtype = torch.float8_e4m3fn
    return _quantize("quantize_fp8", x, dtype, True, scale, None, granularity, group_size, scale_ub, out)[:2]


@_operators.function(_quantization.quantize_int8)
def quantize_int8(
    x, *, symmetric=True, scale=None, zero_point=None, granularity="tensor", group_size=128, out=None
):
    """Traced."""
    results = _quantize(
        "quantize_int8", x, torch.int8, symmetric, scale, zero_point, granularity, group_size, None, out
    )
    return results[:2] if symmetric else results


def _dequantize(op: str, q, dtype, scale, zero_point, granularity, group_size, out_dtype, out) -> Any:
    if q.dtype is not dtype:
        raise TypeError(f"[{op}] q: expected {str(dtype)[6:]}, got {str(q.dtype)[6:]}")
    if granularity not in ("tensor", "token", "group", "block"):
        raise unexpected(op, "granularity", '"tensor", "token", "group" or "block"', repr(granularity))
    if granularity == "block" and zero_point is not None:
        raise ValueError(f'[{op}] zero_point: expected none with granularity "block", got one')
    result = q.new_empty(tuple(q.shape), dtype=_results.float_dtype(op, out_dtype)) if out is None else out
    _operators.ops.dequantize(result, q, scale, zero_point, granularity, group_size)
    return result


@_operators.function(_quantization.dequantize_fp8)
def dequantize_fp8(q, scale, *, granularity="tensor", group_size=128, out_dtype="float32", out=None):
    """Traced."""
    dtype = torch.float8_e4m3fn
    return _dequantize("dequantize_fp8", q, dtype, scale, None, granularity, group_size, out_dtype, out)


@_operators.function(_quantization.dequantize_int8)
def dequantize_int8(
    q, scale, zero_point=None, *, granularity="tensor", group_size=128, out_dtype="float32", out=None
):
    """Traced."""
    dtype = torch.int8
    return _dequantize(
        "dequantize_int8", q, dtype, scale, zero_point, granularity, group_size, out_dtype, out
    )


@_operators.function(_quantization.scaled_matmul)
def scaled_matmul(
    a, b, scale_a, scale_b=None, *, zero_point=None, column_sums=None, bias=None, out_dtype="bfloat16", out=None, workspace=None,
    batch_invariant=False,
):  # fmt: skip
    """Traced."""
    b, scale_b, column_sums = _quantization.right_operand(b, scale_b, column_sums)
    result = out
    if out is None:
        result = a.new_empty(
            (*a.shape[:-1], b.shape[0]), dtype=_results.float_dtype("scaled_matmul", out_dtype)
        )
    _operators.ops.scaled_matmul(
        result, a, b, scale_a, scale_b, zero_point, column_sums, bias, workspace, bool(batch_invariant)
    )
    return result


@_operators.function(_quantization.quantized_matmul)
def quantized_matmul(x, w, *, bias=None, out=None, workspace=None, batch_invariant=False):
    """Traced."""
    if not isinstance(w, PackedWeight):
        raise TypeError(f"[quantized_matmul] w: expected a PackedWeight, got {type(w).__qualname__}")
    if w._fields is not None:
        result = x.new_empty((*x.shape[:-1], w.shape[0])) if out is None else out
        _operators.ops.quantized_matmul(
            result, x, w._data, w._permutation, bias, workspace, *w._fields, bool(batch_invariant)
        )
        return result
    _quantization.check_features(x.shape, w)
    scaling, zero = w._activation_granularity, w.input_zero_point
    if w.format == "fp8":
        a, scale = quantize_fp8(x, scale=w.input_scale, granularity=scaling, group_size=BLOCK)
    else:
        a, scale = quantize_int8(
            x, symmetric=zero is None, scale=w.input_scale, zero_point=zero, granularity=scaling
        )[:2]
    return scaled_matmul(
        a, w, scale, zero_point=zero, bias=bias, out_dtype=x.dtype, out=out, workspace=workspace, batch_invariant=batch_invariant
    )  # fmt: skip


def _dequantize_traced(w: PackedWeight, dtype: object, out: Tensor | None, stream: object) -> Tensor:
    """:meth:`PackedWeight.dequantize`, traced."""
    _operators.check_traced("dequantize", {"stream": stream})
    tensor: Any = w._like
    result = (
        tensor.new_empty(w.shape, dtype=_results.float_dtype("dequantize", dtype, "dtype"))
        if out is None
        else out
    )
    if w._fields is not None:
        _operators.ops.dequantize_weight(result, w._data, w._permutation, *w._fields)
    else:
        _operators.ops.dequantize(result, w.weight, w.scale, None, w._granularity, 1)
    return result


TRACED_DEQUANTIZE.append(
    (lambda x: isinstance(x, torch.Tensor) and _operators.is_traced(x), _dequantize_traced)
)
