"""What results of quire.torch's traced ops look like.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

Tensor = torch.Tensor
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
SCALES = "Tensor(a!) out, Tensor(b!)? scales"
SCALING = "Tensor? scale, str granularity, int group_size"


def choose(scales: Tensor | None, scale: Tensor | None) -> Tensor | None:
    """The one that is there: computed scales, which an operator writes, or a given one."""
    return scale if scales is None else scales


def quantized(
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


def float_dtype(op: str, dtype: object, arg: str = "out_dtype") -> torch.dtype:
    """A dtype of a name or of PyTorch's, checked."""
    if dtype not in _FLOAT_DTYPES:
        raise TypeError(f"[{op}] {arg}: expected float32, float16 or bfloat16, got {dtype}")
    return _FLOAT_DTYPES[dtype]
