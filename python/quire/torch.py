"""quire inside PyTorch: eager calls go straight to the library; ``torch.compile`` and ``torch.export`` see them as ``quire::*`` operators.

SPDX-License-Identifier: Apache-2.0

The functions are quire's own, with the same arguments, results and exceptions. Outside a trace they cost no more. Traced, each is
an operator that declares what it writes, so that compilers keep, order and capture it. Gradients are not computed. Inside
``torch.autocast`` attention takes float32 queries, keys and values in the autocast dtype; the other ops compute in float32 and keep
their dtypes anyway.
"""

# The traced forms have the arguments of the documented functions.
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch

from quire import _core
from quire import activation as _activation
from quire import kv_cache as _kv_cache
from quire import norm as _norm
from quire import position_encoding as _position_encoding
from quire import quantization as _quantization
from quire._packed_weight import BLOCK, TENSORS, TRACED_DEQUANTIZE, PackedWeight, Static, format_of, restore
from quire._quantized import check_given, scale_shape, split_out
from quire.attention import attention as _attention
from quire.attention import merge_attention as _merge_attention
from quire.attention import paged_attention as _paged_attention
from quire.attention import shared_prefix_attention as _shared_prefix_attention
from quire.attention import split_window

__all__ = [
    "attention",
    "copy_blocks",
    "dequantize_fp8",
    "dequantize_int8",
    "fused_add_rms_norm",
    "gather_kv",
    "gelu_and_mul",
    "gelu_fast",
    "gelu_new",
    "gelu_quick",
    "gelu_tanh_and_mul",
    "layer_norm",
    "merge_attention",
    "paged_attention",
    "qk_norm_rope",
    "quantize_fp8",
    "quantize_int8",
    "quantized_matmul",
    "relu_squared",
    "rms_norm",
    "rope_and_write_kv",
    "rotary_embedding",
    "scaled_matmul",
    "shared_prefix_attention",
    "silu_and_mul",
    "swap_blocks",
    "write_kv",
]

F = TypeVar("F", bound=Callable[..., Any])
Tensor = torch.Tensor
_is_compiling = torch.compiler.is_compiling
_raw: Any = _core
_PLAIN = (torch.Tensor, torch.nn.Parameter)
_QUANTIZED_DTYPES: dict[object, torch.dtype] = {
    name: dtype
    for dtype in (torch.float8_e4m3fn, torch.int8)
    for name in (dtype, str(dtype).removeprefix("torch."))
}
_FLOAT_DTYPES: dict[object, torch.dtype] = {
    name: dtype
    for dtype in (torch.float32, torch.float16, torch.bfloat16)
    for name in (dtype, str(dtype).removeprefix("torch."))
}


# ---- operators -------------------------------------------------------------------------------------------------------------

_torch_library: Any = torch.library
_library = _torch_library.Library("quire", "DEF")
_ops = torch.ops.quire


def _define(name: str, arguments: str, call: Callable[..., None]) -> None:
    """An operator that returns nothing: what it writes is among its arguments, and marked so."""
    _library.define(f"{name}({arguments}) -> ()", tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CPU", "CUDA"):
        _library.impl(name, call, key)
    _torch_library.register_fake(f"quire::{name}", lambda *args: None, lib=_library)


def _core_call(op: Callable[..., None]) -> Callable[..., None]:
    return lambda *args: op(*args, None)  # None: the current stream


_define(
    "rms_norm",
    "Tensor(a!) out, Tensor x, Tensor weight, float eps, float weight_offset",
    _core_call(_core.rms_norm),
)
_define(
    "fused_add_rms_norm",
    "Tensor(a!) x, Tensor(b!) residual, Tensor weight, float eps, float weight_offset",
    _core_call(_core.fused_add_rms_norm),
)
_define(
    "layer_norm",
    "Tensor(a!) out, Tensor x, Tensor weight, Tensor? bias, float eps",
    _core_call(_core.layer_norm),
)

_SCALES = "Tensor(a!) out, Tensor(b!)? scales"
_SCALING = "Tensor? scale, str granularity, int group_size"


def _choose(scales: Tensor | None, scale: Tensor | None) -> Tensor | None:
    return scale if scales is None else scales


_define(
    "rms_norm_quantized",
    f"{_SCALES}, Tensor x, Tensor weight, float eps, float weight_offset, {_SCALING}",
    lambda out, scales, x, weight, eps, offset, scale, granularity, size: _core.rms_norm_quantized(
        out, _choose(scales, scale), x, weight, eps, offset, granularity, size, None
    ),
)
_define(
    "fused_add_rms_norm_quantized",
    f"{_SCALES}, Tensor x, Tensor(c!) residual, Tensor weight, float eps, float weight_offset, {_SCALING}",
    lambda out, scales, x, residual, weight, eps, offset, scale, granularity, size: (
        _core.fused_add_rms_norm_quantized(
            out, _choose(scales, scale), x, residual, weight, eps, offset, granularity, size, None
        )
    ),
)
_define(
    "layer_norm_quantized",
    f"{_SCALES}, Tensor x, Tensor weight, Tensor? bias, float eps, {_SCALING}",
    lambda out, scales, x, weight, bias, eps, scale, granularity, size: _core.layer_norm_quantized(
        out, _choose(scales, scale), x, weight, bias, eps, granularity, size, None
    ),
)


def _gated_call(op: Callable[..., None]) -> Callable[..., None]:
    return lambda out, scales, x, scale, *scaling: op(out, _choose(scales, scale), x, *scaling, None)


_GATED = ("silu_and_mul", "gelu_and_mul", "gelu_tanh_and_mul")
for _name in (*_GATED, "gelu_new", "gelu_fast", "gelu_quick", "relu_squared"):
    _define(_name, "Tensor(a!) out, Tensor x", _core_call(getattr(_core, _name)))
for _name in _GATED:
    _define(
        f"{_name}_quantized",
        f"{_SCALES}, Tensor x, {_SCALING}",
        _gated_call(getattr(_core, f"{_name}_quantized")),
    )
_define(
    "rotary_embedding",
    "Tensor positions, Tensor(a!) q, Tensor(b!)? k, Tensor cos_sin_cache, str style",
    _core_call(_core.rotary_embedding),
)
_define(
    "qk_norm_rope",
    "Tensor positions, Tensor(a!) q, Tensor(b!)? k, Tensor q_weight, Tensor? k_weight, Tensor cos_sin_cache, float eps, "
    "float weight_offset, str style",
    _core_call(_core.qk_norm_rope),
)
_define(
    "rope_and_write_kv",
    "Tensor positions, Tensor(a!) q, Tensor k, Tensor v, Tensor cos_sin_cache, Tensor(b!) k_cache, Tensor(c!) v_cache, "
    "Tensor slot_mapping, Tensor? k_scale, Tensor? v_scale, Tensor(d!)? k_out, Tensor? q_weight, Tensor? k_weight, float eps, "
    "float weight_offset, str style",
    _core_call(_core.rope_and_write_kv),
)
_define(
    "write_kv",
    "Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slot_mapping, Tensor? k_scale, Tensor? v_scale",
    _core_call(_core.write_kv),
)
_define(
    "gather_kv",
    "Tensor(a!) k, Tensor(b!) v, Tensor k_cache, Tensor v_cache, Tensor slot_mapping, Tensor? k_scale, Tensor? v_scale",
    _core_call(_core.gather_kv),
)
_define("copy_blocks", "Tensor(a!) cache, Tensor pairs", _core_call(_core.copy_blocks))
_define("swap_blocks", "Tensor(a!) dst, Tensor src, Tensor pairs", _core_call(_core.swap_blocks))

_OPTIONS = (
    "float? scale, bool causal, int window_left, int window_right, float softcap, Tensor? alibi_slopes, Tensor? sinks, Tensor? q_scale, "
    "Tensor? k_scale, Tensor? v_scale, Tensor? mask, Tensor? mask_start"
)
_define(
    "paged_attention",
    "Tensor(a!) out, Tensor(b!)? lse, Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_tables, Tensor seq_lens, "
    f"Tensor? query_start_loc, Tensor(c!)? workspace, {_OPTIONS}, str? variant, bool batch_invariant",
    lambda *a: _raw.paged_attention(*a[:11], (a[11], a[12]), *a[13:], "shape", None),
)
_define(
    "shared_prefix_attention",
    "Tensor(a!) out, Tensor(b!)? lse, Tensor q, Tensor k_cache, Tensor v_cache, Tensor prefix_blocks, Tensor block_tables, "
    f"Tensor seq_lens, Tensor? query_start_loc, Tensor(c!)? workspace, {_OPTIONS}",
    lambda *a: _raw.shared_prefix_attention(*a[:12], (a[12], a[13]), *a[14:], "shape", None),
)
_define(
    "attention",
    "Tensor(a!) out, Tensor(b!)? lse, Tensor q, Tensor k, Tensor v, Tensor? query_start_loc, Tensor? kv_start_loc, "
    f"Tensor(c!)? workspace, {_OPTIONS}, str? variant, bool batch_invariant",
    lambda *a: _raw.attention(*a[:10], (a[10], a[11]), *a[12:], "shape", None),
)
_define(
    "merge_attention",
    "Tensor(a!) out, Tensor(b!) out_lse, Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b",
    _core_call(_core.merge_attention),
)


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


_define(
    "quantize",
    "Tensor(a!) out, Tensor(b!)? scales, Tensor(c!)? zero_points, Tensor x, Tensor? scale, Tensor? zero_point, str granularity, "
    "int group_size, float? scale_ub",
    _quantize_call,
)
_define(
    "dequantize",
    "Tensor(a!) out, Tensor q, Tensor scale, Tensor? zero_point, str granularity, int group_size",
    lambda out, q, *a: (_raw.dequantize_int8 if q.dtype is torch.int8 else _raw.dequantize_fp8)(
        out, q, *a, None
    ),
)
_define(
    "quantized_matmul",
    "Tensor(a!) out, Tensor x, Tensor weight, Tensor? permutation, Tensor? bias, Tensor(b!)? workspace, int in_features, int out_features, "
    "int bits, int group_size, int num_rows, str scale_dtype, bool has_zeros, str layout, bool batch_invariant",
    lambda *a: _raw.quantized_matmul(*a[:3], format_of(a[6:14]), *a[3:6], a[14], None),
)
_define(
    "dequantize_weight",
    "Tensor(a!) out, Tensor weight, Tensor? permutation, int in_features, int out_features, int bits, int group_size, int num_rows, "
    "str scale_dtype, bool has_zeros, str layout",
    lambda out, weight, permutation, *fields: _raw.dequantize_weight(
        out, weight, format_of(fields), permutation, None
    ),
)
_define(
    "scaled_matmul",
    "Tensor(a!) out, Tensor a, Tensor b, Tensor scale_a, Tensor scale_b, Tensor? zero_point, Tensor? column_sums, Tensor? bias, "
    "Tensor(b!)? workspace, bool batch_invariant",
    _core_call(_core.scaled_matmul),
)


# ---- functions -------------------------------------------------------------------------------------------------------------


def _is_traced(x: object) -> bool:
    # A subclass is a fake or functional tensor, or one that dispatches in its own way: operators know how.
    return _is_compiling() or (isinstance(x, torch.Tensor) and type(x) not in _PLAIN)


def _function(eager: F) -> Callable[[Callable[..., Any]], F]:
    """Makes a function that is ``eager`` outside a trace, and the decorated one inside."""

    def decorate(traced: Callable[..., Any]) -> F:
        @functools.wraps(eager)
        def function(*args: Any, **kwargs: Any) -> Any:
            if args and type(args[0]) in _PLAIN and not _is_compiling():  # what most calls are
                return eager(*args, **kwargs)
            first = args[0] if args else next(iter(kwargs.values()), None)
            if _is_traced(first):
                _check_traced(eager.__name__, kwargs)
                return traced(*args, **kwargs)
            return eager(*args, **kwargs)

        function.__module__ = __name__
        return cast(F, function)

    return decorate


def _check_traced(op: str, kwargs: dict[str, Any]) -> None:
    if kwargs.pop("stream", None) is not None:
        raise ValueError(
            f"[{op}] stream: expected none in a compiled function, which runs on the current stream, got one"
        )
    if kwargs.pop("validate", "shape") != "shape":
        raise ValueError(f'[{op}] validate: expected "shape" in a compiled function, got another')


def _quantized(
    op: str, x: Tensor, shape: Sequence[int], dtype: object, scale: Any, granularity: str, size: int, out: Any
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``out``, its scales, and the scales if they are computed; as quire._quantized, in terms that can be traced."""
    if granularity == "tensor":
        if scale is None:
            raise ValueError(f'[{op}] scale: expected one for granularity "tensor", got none')
        return (_empty(op, x, shape, dtype) if out is None else out), scale, None
    if scale is not None:
        raise ValueError(
            f'[{op}] scale: expected none for granularity "{granularity}", which computes its own, got one'
        )
    if out is None:
        groups = shape[-1] // size if granularity == "group" and size > 0 else 1
        out = _empty(op, x, shape, dtype), x.new_empty((*shape[:-1], groups), dtype=torch.float32)
    result, scales = out
    return result, scales, scales


def _empty(op: str, x: Tensor, shape: Sequence[int], dtype: object) -> Tensor:
    if dtype not in _QUANTIZED_DTYPES:
        raise TypeError(f"[{op}] out_dtype: expected float8_e4m3fn or int8, got {dtype}")
    return x.new_empty(tuple(shape), dtype=_QUANTIZED_DTYPES[dtype])


@_function(_norm.rms_norm)
def rms_norm(
    x,
    weight,
    eps=1e-6,
    *,
    weight_offset=0.0,
    out=None,
    out_dtype=None,
    scale=None,
    granularity="tensor",
    group_size=128,
):
    """Traced."""
    if out_dtype is not None:
        q, scale_out, scales = _quantized(
            "rms_norm", x, x.shape, out_dtype, scale, granularity, group_size, out
        )
        _ops.rms_norm_quantized(q, scales, x, weight, eps, weight_offset, scale, granularity, group_size)
        return q, scale_out
    result = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    _ops.rms_norm(result, x, weight, eps, weight_offset)
    return result


@_function(_norm.fused_add_rms_norm)
def fused_add_rms_norm(
    x,
    residual,
    weight,
    eps=1e-6,
    *,
    weight_offset=0.0,
    out=None,
    out_dtype=None,
    scale=None,
    granularity="tensor",
    group_size=128,
):
    """Traced."""
    if out_dtype is not None:
        q, scale_out, scales = _quantized(
            "fused_add_rms_norm", x, x.shape, out_dtype, scale, granularity, group_size, out
        )
        _ops.fused_add_rms_norm_quantized(
            q, scales, x, residual, weight, eps, weight_offset, scale, granularity, group_size
        )
        return q, scale_out
    _ops.fused_add_rms_norm(x, residual, weight, eps, weight_offset)
    return x, residual


@_function(_norm.layer_norm)
def layer_norm(
    x,
    weight,
    bias=None,
    eps=1e-5,
    *,
    out=None,
    out_dtype=None,
    scale=None,
    granularity="tensor",
    group_size=128,
):
    """Traced."""
    if out_dtype is not None:
        q, scale_out, scales = _quantized(
            "layer_norm", x, x.shape, out_dtype, scale, granularity, group_size, out
        )
        _ops.layer_norm_quantized(q, scales, x, weight, bias, eps, scale, granularity, group_size)
        return q, scale_out
    result = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    _ops.layer_norm(result, x, weight, bias, eps)
    return result


def _gated(name: str) -> Callable[..., Any]:
    def traced(x, *, out=None, out_dtype=None, scale=None, granularity="tensor", group_size=128):
        shape = (*x.shape[:-1], x.shape[-1] // 2)
        if out_dtype is not None:
            q, scale_out, scales = _quantized(name, x, shape, out_dtype, scale, granularity, group_size, out)
            getattr(_ops, f"{name}_quantized")(q, scales, x, scale, granularity, group_size)
            return q, scale_out
        result = x.new_empty(shape) if out is None else out
        getattr(_ops, name)(result, x)
        return result

    return traced


def _plain(name: str) -> Callable[..., Any]:
    def traced(x, *, out=None):
        result = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
        getattr(_ops, name)(result, x)
        return result

    return traced


silu_and_mul = _function(_activation.silu_and_mul)(_gated("silu_and_mul"))
gelu_and_mul = _function(_activation.gelu_and_mul)(_gated("gelu_and_mul"))
gelu_tanh_and_mul = _function(_activation.gelu_tanh_and_mul)(_gated("gelu_tanh_and_mul"))
gelu_new = _function(_activation.gelu_new)(_plain("gelu_new"))
gelu_fast = _function(_activation.gelu_fast)(_plain("gelu_fast"))
gelu_quick = _function(_activation.gelu_quick)(_plain("gelu_quick"))
relu_squared = _function(_activation.relu_squared)(_plain("relu_squared"))


@_function(_position_encoding.rotary_embedding)
def rotary_embedding(positions, q, k, cos_sin_cache, *, style="neox"):
    """Traced."""
    _ops.rotary_embedding(positions, q, k, cos_sin_cache, style)
    return q, k


@_function(_position_encoding.qk_norm_rope)
def qk_norm_rope(
    positions, q, k, q_weight, k_weight, cos_sin_cache, eps=1e-6, *, weight_offset=0.0, style="neox"
):
    """Traced."""
    _ops.qk_norm_rope(positions, q, k, q_weight, k_weight, cos_sin_cache, eps, weight_offset, style)
    return q, k


@_function(_position_encoding.rope_and_write_kv)
def rope_and_write_kv(
    positions, q, k, v, cos_sin_cache, k_cache, v_cache, slot_mapping, *, style="neox", k_scale=None, v_scale=None, k_out=None,
    q_weight=None, k_weight=None, eps=1e-6, weight_offset=0.0,
):  # fmt: skip
    """Traced."""
    _ops.rope_and_write_kv(
        positions, q, k, v, cos_sin_cache, k_cache, v_cache, slot_mapping, k_scale, v_scale, k_out, q_weight, k_weight, eps,
        weight_offset, style,
    )  # fmt: skip
    return q


@_function(_kv_cache.write_kv)
def write_kv(k, v, k_cache, v_cache, slot_mapping, *, k_scale=None, v_scale=None):
    """Traced."""
    _ops.write_kv(k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale)


@_function(_kv_cache.gather_kv)
def gather_kv(k_cache, v_cache, slot_mapping, *, k_scale=None, v_scale=None, out=None):
    """Traced."""
    if out is None:
        dtype = torch.float32 if k_cache.itemsize == 1 else k_cache.dtype
        shape = (slot_mapping.shape[0], *k_cache.shape[2:])
        out = k_cache.new_empty(shape, dtype=dtype), k_cache.new_empty(shape, dtype=dtype)
    k, v = out
    _ops.gather_kv(k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale)
    return k, v


@_function(_kv_cache.copy_blocks)
def copy_blocks(cache, pairs):
    """Traced."""
    _ops.copy_blocks(cache, pairs)


@_function(_kv_cache.swap_blocks)
def swap_blocks(dst, src, pairs):
    """Traced."""
    _ops.swap_blocks(dst, src, pairs)


# ---- quantization ----------------------------------------------------------------------------------------------------------


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
    _ops.quantize(q, scales, zeros, x, scale, zero_point, granularity, group_size, scale_ub)
    return (q, scales, zeros) if computes else (q, scale, zero_point)


@_function(_quantization.quantize_fp8)
def quantize_fp8(x, *, scale=None, granularity="tensor", group_size=128, scale_ub=None, out=None):
    """Traced."""
    dtype = torch.float8_e4m3fn
    return _quantize("quantize_fp8", x, dtype, True, scale, None, granularity, group_size, scale_ub, out)[:2]


@_function(_quantization.quantize_int8)
def quantize_int8(
    x, *, symmetric=True, scale=None, zero_point=None, granularity="tensor", group_size=128, out=None
):
    """Traced."""
    results = _quantize(
        "quantize_int8", x, torch.int8, symmetric, scale, zero_point, granularity, group_size, None, out
    )
    return results[:2] if symmetric else results


def _float_dtype(op: str, dtype: object, arg: str = "out_dtype") -> torch.dtype:
    if dtype not in _FLOAT_DTYPES:
        raise TypeError(f"[{op}] {arg}: expected float32, float16 or bfloat16, got {dtype}")
    return _FLOAT_DTYPES[dtype]


def _dequantize(op: str, q, dtype, scale, zero_point, granularity, group_size, out_dtype, out) -> Any:
    if q.dtype is not dtype:
        raise TypeError(f"[{op}] q: expected {str(dtype)[6:]}, got {str(q.dtype)[6:]}")
    if granularity == "block" and zero_point is not None:
        raise ValueError(f'[{op}] zero_point: expected none with granularity "block", got one')
    result = q.new_empty(tuple(q.shape), dtype=_float_dtype(op, out_dtype)) if out is None else out
    _ops.dequantize(result, q, scale, zero_point, granularity, group_size)
    return result


@_function(_quantization.dequantize_fp8)
def dequantize_fp8(q, scale, *, granularity="tensor", group_size=128, out_dtype="float32", out=None):
    """Traced."""
    dtype = torch.float8_e4m3fn
    return _dequantize("dequantize_fp8", q, dtype, scale, None, granularity, group_size, out_dtype, out)


@_function(_quantization.dequantize_int8)
def dequantize_int8(
    q, scale, zero_point=None, *, granularity="tensor", group_size=128, out_dtype="float32", out=None
):
    """Traced."""
    dtype = torch.int8
    return _dequantize(
        "dequantize_int8", q, dtype, scale, zero_point, granularity, group_size, out_dtype, out
    )


@_function(_quantization.scaled_matmul)
def scaled_matmul(
    a, b, scale_a, scale_b=None, *, zero_point=None, column_sums=None, bias=None, out_dtype="bfloat16", out=None, workspace=None,
    batch_invariant=False,
):  # fmt: skip
    """Traced."""
    b, scale_b, column_sums = _quantization.right_operand(b, scale_b, column_sums)
    result = out
    if out is None:
        result = a.new_empty((*a.shape[:-1], b.shape[0]), dtype=_float_dtype("scaled_matmul", out_dtype))
    _ops.scaled_matmul(
        result, a, b, scale_a, scale_b, zero_point, column_sums, bias, workspace, bool(batch_invariant)
    )
    return result


@_function(_quantization.quantized_matmul)
def quantized_matmul(x, w, *, bias=None, out=None, workspace=None, batch_invariant=False):
    """Traced."""
    if not isinstance(w, PackedWeight):
        raise TypeError(f"[quantized_matmul] w: expected a PackedWeight, got {type(w).__qualname__}")
    if w._fields is not None:
        result = x.new_empty((*x.shape[:-1], w.shape[0])) if out is None else out
        _ops.quantized_matmul(
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
    _check_traced("dequantize", {"stream": stream})
    tensor: Any = w._like
    result = (
        tensor.new_empty(w.shape, dtype=_float_dtype("dequantize", dtype, "dtype")) if out is None else out
    )
    if w._fields is not None:
        _ops.dequantize_weight(result, w._data, w._permutation, *w._fields)
    else:
        _ops.dequantize(result, w.weight, w.scale, None, w._granularity, 1)
    return result


TRACED_DEQUANTIZE.append((lambda x: isinstance(x, torch.Tensor) and _is_traced(x), _dequantize_traced))


# ---- attention -------------------------------------------------------------------------------------------------------------


def _autocast(q: Any, k: Any, v: Any, is_cache: bool) -> tuple[Any, Any, Any]:
    """Float32 tensors in the autocast dtype; q in that of a cache, which is not converted."""
    if not isinstance(q, torch.Tensor) or q.dtype is not torch.float32:
        return q, k, v
    kind = q.device.type
    if not torch.is_autocast_enabled(kind):
        return q, k, v
    dtype = torch.get_autocast_dtype(kind)
    if is_cache:
        own = getattr(k, "dtype", None)
        same = own in (torch.float32, torch.float16, torch.bfloat16)
        return q.to(cast(torch.dtype, own) if same else dtype), k, v
    return q.to(dtype), *(x.to(dtype) if x.dtype is torch.float32 else x for x in (k, v))


def _attention_function(eager: F, is_cache: bool) -> Callable[[Callable[..., Any]], F]:
    """As _function, with autocast."""

    def decorate(traced: Callable[..., Any]) -> F:
        function = _function(eager)(traced)
        names = tuple(inspect.signature(eager).parameters)[:3]

        @functools.wraps(eager)
        def with_autocast(*args: Any, **kwargs: Any) -> Any:
            if (
                args
                and type(args[0]) in _PLAIN
                and args[0].dtype is not torch.float32
                and not _is_compiling()
            ):
                return eager(*args, **kwargs)
            missing = names[len(args) :]
            if not all(name in kwargs for name in missing):
                return function(*args, **kwargs)  # its TypeError says what is missing
            q, k, v, *rest = (*args, *(kwargs.pop(name) for name in missing))
            return function(*_autocast(q, k, v, is_cache), *rest, **kwargs)

        with_autocast.__module__ = __name__
        return cast(F, with_autocast)

    return decorate


def _outputs(q: Tensor, out: Tensor | None, return_lse: bool) -> tuple[Tensor, Tensor | None]:
    # Of float8 queries the output is wider.
    dtype = torch.bfloat16 if q.dtype is torch.float8_e4m3fn else q.dtype
    result = torch.empty_like(q, dtype=dtype, memory_format=torch.contiguous_format) if out is None else out
    return result, q.new_empty(q.shape[:2], dtype=torch.float32) if return_lse else None


def _options(op: str, scale, causal, window, softcap, *tensors):
    return (scale, bool(causal), *split_window(op, window), float(softcap or 0.0), *tensors)


@_attention_function(_paged_attention, True)
def paged_attention(
    q, k_cache, v_cache, block_tables, seq_lens, *, query_start_loc=None, scale=None, causal=True, window=None, softcap=None,
    alibi_slopes=None, sinks=None, q_scale=None, k_scale=None, v_scale=None, mask=None, mask_start=None, out=None, return_lse=False,
    workspace=None, variant=None, batch_invariant=False,
):  # fmt: skip
    """Traced."""
    result, lse = _outputs(q, out, return_lse)
    options = _options(
        "paged_attention",
        scale,
        causal,
        window,
        softcap,
        alibi_slopes,
        sinks,
        q_scale,
        k_scale,
        v_scale,
        mask,
        mask_start,
    )
    _ops.paged_attention(
        result,
        lse,
        q,
        k_cache,
        v_cache,
        block_tables,
        seq_lens,
        query_start_loc,
        workspace,
        *options,
        variant,
        bool(batch_invariant),
    )
    return (result, lse) if return_lse else result


@_attention_function(_shared_prefix_attention, True)
def shared_prefix_attention(
    q, k_cache, v_cache, prefix_blocks, block_tables, seq_lens, *, query_start_loc=None, scale=None, causal=True, window=None,
    softcap=None, alibi_slopes=None, sinks=None, q_scale=None, k_scale=None, v_scale=None, mask=None, mask_start=None, out=None,
    return_lse=False, workspace=None,
):  # fmt: skip
    """Traced."""
    result, lse = _outputs(q, out, return_lse)
    options = _options(
        "shared_prefix_attention",
        scale,
        causal,
        window,
        softcap,
        alibi_slopes,
        sinks,
        q_scale,
        k_scale,
        v_scale,
        mask,
        mask_start,
    )
    _ops.shared_prefix_attention(
        result,
        lse,
        q,
        k_cache,
        v_cache,
        prefix_blocks,
        block_tables,
        seq_lens,
        query_start_loc,
        workspace,
        *options,
    )
    return (result, lse) if return_lse else result


@_attention_function(_attention, False)
def attention(
    q, k, v, *, query_start_loc=None, kv_start_loc=None, scale=None, causal=True, window=None, softcap=None, alibi_slopes=None,
    sinks=None, q_scale=None, k_scale=None, v_scale=None, mask=None, mask_start=None, out=None, return_lse=False,
    workspace=None, variant=None, batch_invariant=False,
):  # fmt: skip
    """Traced."""
    result, lse = _outputs(q, out, return_lse)
    options = _options(
        "attention",
        scale,
        causal,
        window,
        softcap,
        alibi_slopes,
        sinks,
        q_scale,
        k_scale,
        v_scale,
        mask,
        mask_start,
    )
    _ops.attention(
        result,
        lse,
        q,
        k,
        v,
        query_start_loc,
        kv_start_loc,
        workspace,
        *options,
        variant,
        bool(batch_invariant),
    )
    return (result, lse) if return_lse else result


@_function(_merge_attention)
def merge_attention(out_a, lse_a, out_b, lse_b, *, out=None, out_lse=None):
    """Traced."""
    result = torch.empty_like(out_a, memory_format=torch.contiguous_format) if out is None else out
    lse = torch.empty_like(lse_a) if out_lse is None else out_lse
    _ops.merge_attention(result, lse, out_a, lse_a, out_b, lse_b)
    return result, lse
