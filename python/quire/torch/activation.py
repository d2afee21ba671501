"""Activations inside PyTorch.

SPDX-License-Identifier: Apache-2.0
"""

# The traced forms have the arguments of the documented functions.
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from quire import _core
from quire import activation as _activation
from quire._quantized import check_no_quantization
from quire.torch import _operators, _results


def _gated_call(op: Callable[..., None]) -> Callable[..., None]:
    return lambda out, scales, x, scale, *scaling: op(out, _results.choose(scales, scale), x, *scaling, None)


_GATED = ("silu_and_mul", "gelu_and_mul", "gelu_tanh_and_mul")
for _name in (*_GATED, "gelu_new", "gelu_fast", "gelu_quick", "relu_squared"):
    _operators.define(_name, "Tensor(a!) out, Tensor x", _operators.core_call(getattr(_core, _name)))
for _name in _GATED:
    _operators.define(
        f"{_name}_quantized",
        f"{_results.SCALES}, Tensor x, {_results.SCALING}",
        _gated_call(getattr(_core, f"{_name}_quantized")),
    )


def _gated(name: str) -> Callable[..., Any]:
    def traced(x, *, out=None, out_dtype=None, scale=None, granularity="tensor", group_size=128):
        shape = (*x.shape[:-1], x.shape[-1] // 2)
        if out_dtype is not None:
            q, scale_out, scales = _results.quantized(
                name, x, shape, out_dtype, scale, granularity, group_size, out
            )
            getattr(_operators.ops, f"{name}_quantized")(q, scales, x, scale, granularity, group_size)
            return q, scale_out
        check_no_quantization(name, scale, granularity)
        result = x.new_empty(shape) if out is None else out
        getattr(_operators.ops, name)(result, x)
        return result

    return traced


def _plain(name: str) -> Callable[..., Any]:
    def traced(x, *, out=None):
        result = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
        getattr(_operators.ops, name)(result, x)
        return result

    return traced


silu_and_mul = _operators.function(_activation.silu_and_mul)(_gated("silu_and_mul"))
gelu_and_mul = _operators.function(_activation.gelu_and_mul)(_gated("gelu_and_mul"))
gelu_tanh_and_mul = _operators.function(_activation.gelu_tanh_and_mul)(_gated("gelu_tanh_and_mul"))
gelu_new = _operators.function(_activation.gelu_new)(_plain("gelu_new"))
gelu_fast = _operators.function(_activation.gelu_fast)(_plain("gelu_fast"))
gelu_quick = _operators.function(_activation.gelu_quick)(_plain("gelu_quick"))
relu_squared = _operators.function(_activation.relu_squared)(_plain("relu_squared"))
