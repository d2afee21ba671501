"""What results of quire.jax's ops look like.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from quire._allocate import Array, dtype_name
from quire.jax._call import Attributes, Result


def like(x: Array) -> Result:
    """A result of x's shape and dtype."""
    return tuple(x.shape), str(x.dtype)


def quantized_results(x: Array, shape: tuple[int, ...], attributes: Attributes) -> list[Result | None]:
    """A quantized result of this shape, and its scales if they are computed."""
    out: Result = (shape, str(attributes["out_dtype"]))
    if attributes["granularity"] == "tensor":
        return [out, None]
    size = int(attributes["group_size"])
    groups = 1
    if attributes["granularity"] == "group" and shape:
        groups = shape[-1] // size if size > 0 else 1
    return [out, ((*shape[:-1], groups), "float32")]


def quantization(
    op: str, out_dtype: object, scale: Array | None, granularity: str, group_size: int
) -> Attributes:
    """The attributes of an op with quantized results, checked as quire's own does before it allocates."""
    name = dtype_name(out_dtype)
    if name not in ("float8_e4m3fn", "int8"):
        raise TypeError(f"[{op}] out_dtype: expected float8_e4m3fn or int8, got {name}")
    if granularity not in ("tensor", "token", "group"):
        raise ValueError(f'[{op}] granularity: expected "tensor", "token" or "group", got "{granularity}"')
    if (scale is None) == (granularity == "tensor"):
        expected, got = ("one", "none") if scale is None else ("none", "one")
        raise ValueError(f'[{op}] scale: expected {expected} for granularity "{granularity}", got {got}')
    return {"out_dtype": name, "granularity": granularity, "group_size": int(group_size)}
