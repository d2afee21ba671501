"""What ops with a quantized result share: making ``out`` and ``scales``, and quantizing itself.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Literal

from quire import _core
from quire._allocate import Array, dtype_name, empty, finish, shape_of
from quire._refusals import unexpected

Granularity = Literal["tensor", "token", "group"]


class Quantized:
    """The tensors of one quantized result."""

    def __init__(
        self,
        op: str,
        like: Array,
        shape: Sequence[int],
        out_dtype: object,
        scale: Array | None,
        granularity: str,
        group_size: int,
        out: Array | tuple[Array, Array] | None,
    ) -> None:
        """Takes or allocates them, in the framework of ``like``.

        Raises:
            ValueError: ``scale`` is there where scales are computed, or missing where they are not; ``out`` is no pair.
            TypeError: ``out_dtype`` is neither of the two.
        """
        name = dtype_name(out_dtype)
        if name not in ("float8_e4m3fn", "int8"):
            raise TypeError(f"[{op}] out_dtype: expected float8_e4m3fn or int8, got {name}")
        self._op, self._like, self._given = op, like, out
        self.out: Array = out
        self.scales: Array = scale
        if granularity == "tensor":
            if scale is None:
                raise ValueError(f'[{op}] scale: expected one for granularity "tensor", got none')
            if out is None:
                self.out = empty(like, shape, name)
            return
        if scale is not None:
            raise ValueError(
                f'[{op}] scale: expected none for granularity "{granularity}", which computes its own, got one'
            )
        if out is None:
            self.out = empty(like, shape, name)
            groups = 1
            if granularity == "group" and shape:
                size = whole_number(op, "group_size", group_size)
                groups = shape[-1] // size if size > 0 else 1
            self.scales = empty(like, (*shape[:-1], groups), "float32")
        elif isinstance(out, tuple) and len(out) == 2:
            self.out, self.scales = out
        else:
            raise ValueError(
                f"[{op}] out: expected a pair (out, scales), as scales are computed, got {type(out).__qualname__}"
            )

    def finish(self) -> tuple[Array, Array]:
        """``(out, scales)`` in the caller's framework, now that they are written."""
        if self._given is not None:
            return self.out, self.scales
        out = finish(self.out, self._like, self._op)
        return out, finish(self.scales, self._like)


def whole_number(op: str, arg: str, value: int) -> int:
    """An argument that counts something; True is no number here."""
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:  # no integer, or an array of several
        pass
    raise TypeError(f"[{op}] {arg}: expected an integer, got {type(value).__qualname__}")


def check_no_quantization(op: str, scale: Array | None, granularity: str) -> None:
    """Refuses what means something with ``out_dtype`` only: a scale, a granularity."""
    if scale is not None:
        raise unexpected(op, "scale", "none without out_dtype", "one")
    if granularity != "tensor":
        raise unexpected(op, "granularity", '"tensor" without out_dtype', repr(granularity))


def scale_shape(op: str, shape: tuple[int, ...], granularity: str, group_size: int) -> tuple[int, ...]:
    """The shape of the scales of a tensor of this shape.

    Raises:
        ValueError: No such granularity, or a group_size below 1.
        TypeError: The group_size is no integer.
    """
    if granularity == "tensor":
        return (1,)
    if granularity == "token":
        return (*shape[:-1], 1)
    if granularity != "group":
        raise unexpected(op, "granularity", '"tensor", "token" or "group"', repr(granularity))
    size = whole_number(op, "group_size", group_size)
    if size < 1:
        raise unexpected(op, "group_size", "1 or more", size)
    return (*shape[:-1], -(-shape[-1] // size))


def check_given(
    op: str, symmetric: bool, scale: object | None, zero_point: object | None, scale_ub: float | None
) -> None:
    """Whether what is given of scales and zero points goes together.

    Raises:
        ValueError: It does not.
    """
    computes = scale is None
    if symmetric and zero_point is not None:
        raise unexpected(op, "zero_point", "none, as symmetric is set", "one")
    if not symmetric and computes != (zero_point is None):
        raise unexpected(op, "zero_point", "one with scale, and none without", "one" if computes else "none")
    if not computes and scale_ub is not None:
        raise unexpected(op, "scale_ub", "none with a given scale", scale_ub)


def split_out(op: str, out: Array | tuple[Array, ...], symmetric: bool) -> tuple[Array, Array, Array | None]:
    """An ``out`` that has computed scales too.

    Raises:
        ValueError: It has none.
    """
    if not isinstance(out, tuple) or len(out) != (2 if symmetric else 3):
        names = "(out, scale)" if symmetric else "(out, scale, zero_point)"
        raise unexpected(op, "out", f"{names}, as scales are computed", type(out).__qualname__)
    return out[0], out[1], None if symmetric else out[2]


def quantize(
    op: str,
    dtype: str,
    x: Array,
    scale: Array | None,
    zero_point: Array | None,
    symmetric: bool,
    granularity: Granularity,
    group_size: int,
    scale_ub: float | None,
    out: Array | tuple[Array, ...] | None,
    stream: object,
) -> tuple[Array, Array, Array | None]:
    """``(out, scale, zero_point)`` of :func:`quire.quantize_fp8` and :func:`quire.quantize_int8`."""
    shape = shape_of(op, "x", x)
    if not shape:
        raise unexpected(op, "x", "rank 1 to 4", list(shape))
    wanted = scale_shape(op, shape, granularity, group_size)
    check_given(op, symmetric, scale, zero_point, scale_ub)
    computes, fresh = scale is None, out is None
    q: Array = out
    if fresh:
        q = empty(x, shape, dtype)
        if computes:
            scale = empty(x, wanted, "float32")
            zero_point = None if symmetric else empty(x, wanted, "int32")
    elif computes:
        q, scale, zero_point = split_out(op, out, symmetric)
    if not hasattr(q, "dtype"):
        raise TypeError(f"[{op}] out: expected a {dtype} tensor, got {type(q).__qualname__}")
    if dtype_name(q.dtype) != dtype:
        raise TypeError(f"[{op}] out: expected {dtype}, got {dtype_name(q.dtype)}")
    bound = float("inf") if scale_ub is None else scale_ub
    call = _core.quantize_fp8 if dtype == "float8_e4m3fn" else _core.quantize_int8
    call(q, scale, zero_point, x, granularity, group_size, computes, bound, stream)
    if fresh:
        q = finish(q, x, op)
        if computes:
            scale = finish(scale, x)
            zero_point = None if zero_point is None else finish(zero_point, x)
    return q, scale, zero_point
