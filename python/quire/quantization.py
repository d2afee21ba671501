"""Quantized weights and activations: packed weights, their matrix products, float8 and int8 with scales.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, overload

from quire import _core
from quire._allocate import Array, device_of, dtype_name, empty, finish, shape_of
from quire._packed_weight import BLOCK as BLOCK
from quire._packed_weight import PackedWeight
from quire._quantized import Granularity, quantize
from quire._refusals import REFUSALS, renamed, unexpected
from quire._weight_source import check_dtype

__all__ = [
    "PackedWeight",
    "dequantize_fp8",
    "dequantize_int8",
    "quantize_fp8",
    "quantize_int8",
    "quantized_matmul",
    "quantized_matmul_workspace_size",
    "scaled_matmul",
    "scaled_matmul_workspace_size",
]

#: What quantized_matmul's caller knows the arguments of quantize_* and scaled_matmul as.
ACTIVATION_NAMES = {
    "a": "x",
    "num_tokens": "x",
    "b": "weight",
    "scale_a": "input_scale",
    "scales": "input_scale",
    "scale_b": "scale",
    "zero_point": "input_zero_point",
    "zero_points": "input_zero_point",
}

# ---- Products ------------------------------------------------------------------------------------------------------------


def quantized_matmul(
    x: Array,
    w: PackedWeight,
    *,
    bias: Array | None = None,
    out: Array | None = None,
    workspace: Array | None = None,
    batch_invariant: bool = False,
    stream: object = None,
) -> Array:
    """``x @ w.T + bias`` with a quantized weight.

    Packed integer codes meet the activations as they are, and sums are float32. On the CPU, up to four tokens of float16 or bfloat16 are
    multiplied in 16-bit fixed point, with a scale for each group of features (128 where a group is longer): an error of about 2**-16 of
    the group's largest magnitude. With AMX, more tokens of bfloat16, or any number with batch_invariant, meet the weight rounded to
    bfloat16. For "fp8" and "w8a8" weights x is quantized first: by ``w.input_scale``, or for each token, or for each 128 features
    where the weight has scales of blocks; then it is :func:`scaled_matmul`.

    Args:
        x: ``[..., in_features]`` float16 or bfloat16, on the CPU also float32; unit inner stride, and one distance between all rows.
        w: The weight, on x's device.
        bias: ``[out_features]`` of any of the three dtypes, or None.
        out: ``[..., out_features]`` of x's dtype, or None to allocate it in x's framework.
        workspace: uint8 ``[n]`` with n of at least :func:`quantized_matmul_workspace_size`; None uses a shared one.
        batch_invariant: The bits of a row of the result do not depend on how many other rows there are.
        stream: An int, an object with ``__cuda_stream__``, or None for the framework's current stream.

    Returns:
        ``out``.

    Raises:
        ValueError: Shapes, strides or devices do not fit, the weight was packed for another kind of device, or out overlaps an input.
        TypeError: A dtype is not one of those, or w is no PackedWeight.

    Source: Frantar et al., MARLIN: Mixed-Precision Auto-Regressive Parallel Inference on Large Language Models, 2024.

    Example:
        >>> import numpy as np, quire
        >>> w = quire.PackedWeight.quantize(np.eye(64, dtype=np.float32), "w8a16", 32)
        >>> quire.quantized_matmul(np.arange(64, dtype=np.float32)[None], w)[0, :4].round(1)
        array([0., 1., 2., 3.], dtype=float32)
    """
    if not isinstance(w, PackedWeight):
        raise TypeError(f"[quantized_matmul] w: expected a PackedWeight, got {type(w).__qualname__}")
    result = out
    if out is None:
        shape = shape_of("quantized_matmul", "x", x)
        if w.weight is not None:
            check_features(shape, w)
        result = empty(x, (*shape[:-1], w.shape[0]))
    if w.weight is None:
        _core.quantized_matmul(
            result, x, w._data, w._format, w._permutation, bias, workspace, batch_invariant, stream
        )
    else:
        try:
            _core.quantize_and_multiply(
                result, x, w.weight, w.scale, w._activation_granularity, w.input_scale, w.input_zero_point, w._column_sums, bias,
                workspace, batch_invariant, stream,
            )  # fmt: skip
        except REFUSALS as error:
            raise renamed(error, "quantized_matmul", ACTIVATION_NAMES) from None
    return finish(result, x) if out is None else out


def quantized_matmul_workspace_size(
    num_tokens: int, w: PackedWeight, *, dtype: object = "bfloat16", batch_invariant: bool = False
) -> int:
    """Bytes of workspace for ``num_tokens`` rows of x of this dtype on w's device.

    For "fp8" and "w8a8" weights it holds the quantized activations, on the CPU too, and ``dtype`` does not matter.

    Args:
        num_tokens: Rows of x.
        w: The weight.
        dtype: Of x: "float16", "bfloat16", on the CPU also "float32", or a framework's dtype of that name.
        batch_invariant: As in :func:`quantized_matmul`.

    Returns:
        Bytes for this number of rows. Another number may need more, a smaller one too, since it may run on another kernel.

    Raises:
        ValueError: A negative number of tokens.
        TypeError: A dtype that x may not have there.
    """
    if w.weight is not None:
        computes_sums = w.input_zero_point is not None and w._column_sums is None
        return _core.quantize_and_multiply_workspace_size(
            num_tokens, *w.shape, w.weight.dtype, w._activation_granularity, computes_sums, batch_invariant, device_of(w.weight)
        )  # fmt: skip
    return _core.quantized_matmul_workspace_size(
        num_tokens, w._format, w._permutation is not None, dtype, batch_invariant, device_of(w._data)
    )


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
    out: Array | None = None,
    workspace: Array | None = None,
    batch_invariant: bool = False,
    stream: object = None,
) -> Array:
    """``((a - zero_point) * scale_a) @ (b * scale_b).T + bias`` of float8 or int8.

    Dimensions: ``n`` output features, ``k`` input features. float8 is accumulated in float32, int8 in int32. (The
    tensor cores of compute capability 8.9 and 9.0 keep about 14 bits when they add products of float8.)

    Args:
        a: ``[..., k]`` float8_e4m3fn or int8; unit inner stride, and one distance between all rows.
        b: ``[n, k]`` of a's dtype, unit inner stride; or an "fp8" or "w8a8" weight, which brings its scale_b.
        scale_a: float32 ``[1]``, ``[..., 1]``, or with scales of blocks ``[..., k / 128]`` rounded up, any strides.
        scale_b: float32 ``[1]``, ``[n, 1]``, or ``[n / 128, k / 128]`` rounded up, any strides.
        zero_point: int32 ``[1]`` or ``[..., 1]``, of int8 a; None: 0. Not with scales of blocks.
        column_sums: int32 ``[n]``, the sum of each row of b, which zero_point needs; None: computed, unless b brings them.
        bias: ``[n]`` float32, float16 or bfloat16, or None.
        out_dtype: Of the result: "float32", "float16", "bfloat16", or a framework's dtype of that name.
        out: ``[..., n]``, of any of these dtypes, or None to allocate it in a's framework.
        workspace: uint8 ``[n]`` with n of at least :func:`scaled_matmul_workspace_size`; None uses a shared one.
        batch_invariant: The bits of a row of the result do not depend on how many other rows there are.
        stream: An int, an object with ``__cuda_stream__``, or None for the framework's current stream.

    Returns:
        ``out``.

    Raises:
        ValueError: Shapes, strides or devices do not fit, or out overlaps an input.
        TypeError: A dtype is not one of those.
        quire.UnsupportedError: A zero point with scales of blocks, or int8 with k above 65536.

    Source: Xiao et al., SmoothQuant, 2022 (int8); DeepSeek-AI, DeepSeek-V3 Technical Report, 2024 (scales of blocks).

    Example:
        >>> import numpy as np, quire
        >>> a, b = np.array([[1, 2]], np.int8), np.array([[3, 4], [5, 6]], np.int8)
        >>> one = np.ones(1, np.float32)
        >>> quire.scaled_matmul(a, b, one, one, out_dtype="float32")
        array([[11., 17.]], dtype=float32)
    """
    b, scale_b, column_sums = right_operand(b, scale_b, column_sums)
    result = out
    if out is None:
        name = dtype_name(out_dtype)
        if name not in ("float32", "float16", "bfloat16"):
            raise TypeError(f"[scaled_matmul] out_dtype: expected float32, float16 or bfloat16, got {name}")
        rows, columns = shape_of("scaled_matmul", "a", a), shape_of("scaled_matmul", "b", b)
        result = empty(a, (*rows[:-1], *columns[:1]), name)
    _core.scaled_matmul(
        result, a, b, scale_a, scale_b, zero_point, column_sums, bias, workspace, batch_invariant, stream
    )
    return finish(result, a) if out is None else out


def right_operand(
    b: Array | PackedWeight, scale_b: Array | None, column_sums: Array | None
) -> tuple[Array, Array, Array | None]:
    """b, its scales and its sums of scaled_matmul, for all forms of it."""
    if isinstance(b, PackedWeight):
        if b.weight is None:
            raise TypeError(f'[scaled_matmul] b: expected an "fp8" or "w8a8" weight, got "{b.format}"')
        if scale_b is not None:
            raise unexpected("scaled_matmul", "scale_b", "none, as b brings its own", "one")
        if column_sums is None:
            column_sums = b._column_sums
        b, scale_b = b.weight, b.scale
    if scale_b is None:
        raise unexpected("scaled_matmul", "scale_b", "a tensor", "none")
    return b, scale_b, column_sums


def check_features(shape: Sequence[int], w: PackedWeight) -> None:
    """Whether x of quantized_matmul has w's features, for an "fp8" or "w8a8" weight."""
    if not shape or shape[-1] != w.in_features:
        raise unexpected("quantized_matmul", "x", f"a last dimension of {w.in_features}", list(shape))


def scaled_matmul_workspace_size(
    m: int,
    n: int,
    k: int,
    *,
    dtype: object = "float8_e4m3fn",
    has_blocks: bool = False,
    computes_sums: bool = False,
    batch_invariant: bool = False,
    device: object = "cuda",
) -> int:
    """Bytes of workspace of :func:`scaled_matmul`.

    Args:
        m: Rows of a.
        n: Rows of b.
        k: Columns of both.
        dtype: Of both.
        has_blocks: Scales are those of blocks.
        computes_sums: There is a zero_point, and no column_sums.
        batch_invariant: As in :func:`scaled_matmul`.
        device: "cpu", "cuda", "cuda:<index>", or a framework's device.

    Returns:
        Bytes.

    Raises:
        ValueError: An extent does not fit.
        TypeError: Another dtype.
        quire.UnsupportedError: "cuda" in a CPU-only build.
    """
    return _core.scaled_matmul_workspace_size(
        m, n, k, dtype, has_blocks, computes_sums, batch_invariant, device
    )


# ---- Quantizing and undoing it ------------------------------------------------------------------------------------------------


def quantize_fp8(
    x: Array,
    *,
    scale: Array | None = None,
    granularity: Granularity = "tensor",
    group_size: int = 128,
    scale_ub: float | None = None,
    out: Array | tuple[Array, Array] | None = None,
    stream: object = None,
) -> tuple[Array, Array]:
    """x as float8_e4m3fn: ``saturate(x / scale)``, the float32 quotient rounded to nearest even; NaN stays NaN.

    Args:
        x: ``[..., width]`` float32, float16 or bfloat16; unit inner stride, any outer strides.
        scale: Of granularity's shape: float32 ``[1]``, ``[..., 1]`` or ``[..., width / group_size]`` rounded up, any strides. None: it is
            computed, as the largest magnitude that is not NaN, divided by 448, and not below 2**-126.
        granularity: "tensor", "token" (a row) or "group" (``group_size`` elements of a row).
        group_size: For "group". The last group of a row may be shorter.
        scale_ub: The largest magnitude that a computed scale is made for; what is larger saturates.
        out: float8_e4m3fn of x's shape, or None; where scales are computed a pair ``(out, scale)``.
        stream: An int, an object with ``__cuda_stream__``, or None for the framework's current stream.

    Returns:
        ``(out, scale)``.

    Raises:
        ValueError: Shapes, strides or devices do not fit, or out overlaps an input.
        TypeError: A dtype is not one of those.

    Source: Micikevicius et al., FP8 Formats for Deep Learning, 2022.

    Example:
        >>> import numpy as np, quire
        >>> q, scale = quire.quantize_fp8(np.array([[1.0, -448.0]], np.float32))
        >>> q.astype(np.float32), scale
        (array([[   1., -448.]], dtype=float32), array([1.], dtype=float32))
    """
    op = "quantize_fp8"
    q, scales, _ = quantize(
        op, "float8_e4m3fn", x, scale, None, True, granularity, group_size, scale_ub, out, stream
    )
    return q, scales


@overload
def quantize_int8(
    x: Array,
    *,
    symmetric: Literal[True] = ...,
    scale: Array | None = ...,
    zero_point: None = ...,
    granularity: Granularity = ...,
    group_size: int = ...,
    out: Array | tuple[Array, ...] | None = ...,
    stream: object = ...,
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
    out: Array | tuple[Array, ...] | None = ...,
    stream: object = ...,
) -> tuple[Array, ...]: ...
def quantize_int8(
    x: Array,
    *,
    symmetric: bool = True,
    scale: Array | None = None,
    zero_point: Array | None = None,
    granularity: Granularity = "tensor",
    group_size: int = 128,
    out: Array | tuple[Array, ...] | None = None,
    stream: object = None,
) -> tuple[Array, ...]:
    """x as int8: ``saturate(round(x / scale) + zero_point)``, rounded to nearest even; NaN becomes zero_point.

    Args:
        x: ``[..., width]`` float32, float16 or bfloat16; unit inner stride, any outer strides.
        symmetric: No zero point, and computed scales are the largest magnitude divided by 127. Otherwise computed scales are the range of
            x, with 0 in it, divided by 255, and ``zero_point = -128 - round(low / scale)``.
        scale: As in :func:`quantize_fp8`.
        zero_point: int32 of scale's shape, with it, unless symmetric; values are taken into [-128, 127].
        granularity: As in :func:`quantize_fp8`.
        group_size: Likewise.
        out: int8 of x's shape, or None; where scales are computed a pair ``(out, scale)``, or ``(out, scale, zero_point)``.
        stream: Likewise.

    Returns:
        ``(out, scale)``, or unless symmetric ``(out, scale, zero_point)``. ``x = (out - zero_point) * scale``.

    Raises:
        ValueError: Shapes, strides or devices do not fit, out overlaps an input, or scale and zero_point do not go together.
        TypeError: A dtype is not one of those.

    Source: Jacob et al., Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference, 2018.

    Example:
        >>> import numpy as np, quire
        >>> quire.quantize_int8(np.array([[1.0, -2.0]], np.float32))[0]
        array([[  64, -127]], dtype=int8)
    """
    op = "quantize_int8"
    q, scales, zeros = quantize(
        op, "int8", x, scale, zero_point, symmetric, granularity, group_size, None, out, stream
    )
    return (q, scales) if symmetric else (q, scales, zeros)


def dequantize_fp8(
    q: Array,
    scale: Array,
    *,
    granularity: Literal["tensor", "token", "group", "block"] = "tensor",
    group_size: int = 128,
    out_dtype: object = "float32",
    out: Array | None = None,
    stream: object = None,
) -> Array:
    """``q * scale``, in float32, rounded to the result's dtype.

    Args:
        q: ``[..., width]`` float8_e4m3fn; unit inner stride, any outer strides.
        scale: float32, as :func:`quantize_fp8` gives it; "block": ``[rows / 128, width / 128]`` rounded up, of a q of two dimensions.
        granularity: "tensor", "token", "group", or "block" for blocks of 128 x 128.
        group_size: For "group".
        out_dtype: "float32", "float16", "bfloat16", or a framework's dtype of that name.
        out: As q, of one of these dtypes, or None to allocate it in q's framework.
        stream: An int, an object with ``__cuda_stream__``, or None for the framework's current stream.

    Returns:
        ``out``.

    Raises:
        ValueError: Shapes, strides or devices do not fit, or out overlaps an input.
        TypeError: A dtype is not one of those.

    Example:
        >>> import numpy as np, quire
        >>> q, scale = quire.quantize_fp8(np.array([[7.0, -448.0]], np.float32), granularity="token")
        >>> quire.dequantize_fp8(q, scale, granularity="token")
        array([[   7., -448.]], dtype=float32)
    """
    return _dequantize(
        "dequantize_fp8", "float8_e4m3fn", q, scale, None, granularity, group_size, out_dtype, out, stream
    )


def dequantize_int8(
    q: Array,
    scale: Array,
    zero_point: Array | None = None,
    *,
    granularity: Literal["tensor", "token", "group", "block"] = "tensor",
    group_size: int = 128,
    out_dtype: object = "float32",
    out: Array | None = None,
    stream: object = None,
) -> Array:
    """``(q - zero_point) * scale``, in float32, rounded to the result's dtype.

    Args:
        q: ``[..., width]`` int8; unit inner stride, any outer strides.
        scale: As in :func:`dequantize_fp8`.
        zero_point: int32 of scale's shape, or None: 0. Not with "block".
        granularity: As in :func:`dequantize_fp8`.
        group_size: Likewise.
        out_dtype: Likewise.
        out: Likewise.
        stream: Likewise.

    Returns:
        ``out``.

    Raises:
        ValueError: Shapes, strides or devices do not fit, or out overlaps an input.
        TypeError: A dtype is not one of those.

    Example:
        >>> import numpy as np, quire
        >>> q, scale, zero = quire.quantize_int8(np.array([[0.0, 255.0]], np.float32), symmetric=False)
        >>> quire.dequantize_int8(q, scale, zero)
        array([[  0., 255.]], dtype=float32)
    """
    return _dequantize(
        "dequantize_int8", "int8", q, scale, zero_point, granularity, group_size, out_dtype, out, stream
    )


def _dequantize(
    op: str,
    dtype: str,
    q: Array,
    scale: Array,
    zero_point: Array | None,
    granularity: str,
    group_size: int,
    out_dtype: object,
    out: Array | None,
    stream: object,
) -> Array:
    shape = shape_of(op, "q", q)
    check_dtype(op, "q", q, dtype)
    result = out
    if out is None:
        name = dtype_name(out_dtype)
        if name not in ("float32", "float16", "bfloat16"):
            raise TypeError(f"[{op}] out_dtype: expected float32, float16 or bfloat16, got {name}")
        result = empty(q, shape, name)
    if granularity not in ("tensor", "token", "group", "block"):
        raise unexpected(op, "granularity", '"tensor", "token", "group" or "block"', repr(granularity))
    if granularity == "block" and zero_point is not None:
        raise unexpected(op, "zero_point", 'none with granularity "block"', "one")
    undo = _core.dequantize_fp8 if dtype == "float8_e4m3fn" else _core.dequantize_int8
    undo(result, q, scale, zero_point, granularity, group_size, stream)
    return finish(result, q) if out is None else out
