"""RMS and layer norms inside PyTorch.

SPDX-License-Identifier: Apache-2.0
"""

# The traced forms have the arguments of the documented functions.
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch

from quire import _core
from quire import norm as _norm
from quire._quantized import check_no_quantization
from quire.torch import _operators, _results

_operators.define(
    "rms_norm",
    "Tensor(a!) out, Tensor x, Tensor weight, float eps, float weight_offset",
    _operators.core_call(_core.rms_norm),
)
_operators.define(
    "fused_add_rms_norm",
    "Tensor(a!) x, Tensor(b!) residual, Tensor weight, float eps, float weight_offset",
    _operators.core_call(_core.fused_add_rms_norm),
)
_operators.define(
    "layer_norm",
    "Tensor(a!) out, Tensor x, Tensor weight, Tensor? bias, float eps",
    _operators.core_call(_core.layer_norm),
)

_operators.define(
    "rms_norm_quantized",
    f"{_results.SCALES}, Tensor x, Tensor weight, float eps, float weight_offset, {_results.SCALING}",
    lambda out, scales, x, weight, eps, offset, scale, granularity, size: _core.rms_norm_quantized(
        out, _results.choose(scales, scale), x, weight, eps, offset, granularity, size, None
    ),
)
_operators.define(
    "fused_add_rms_norm_quantized",
    f"{_results.SCALES}, Tensor x, Tensor(c!) residual, Tensor weight, float eps, float weight_offset, {_results.SCALING}",
    lambda out, scales, x, residual, weight, eps, offset, scale, granularity, size: (
        _core.fused_add_rms_norm_quantized(
            out, _results.choose(scales, scale), x, residual, weight, eps, offset, granularity, size, None
        )
    ),
)
_operators.define(
    "layer_norm_quantized",
    f"{_results.SCALES}, Tensor x, Tensor weight, Tensor? bias, float eps, {_results.SCALING}",
    lambda out, scales, x, weight, bias, eps, scale, granularity, size: _core.layer_norm_quantized(
        out, _results.choose(scales, scale), x, weight, bias, eps, granularity, size, None
    ),
)


@_operators.function(_norm.rms_norm)
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
        q, scale_out, scales = _results.quantized(
            "rms_norm", x, x.shape, out_dtype, scale, granularity, group_size, out
        )
        _operators.ops.rms_norm_quantized(
            q, scales, x, weight, eps, weight_offset, scale, granularity, group_size
        )
        return q, scale_out
    check_no_quantization("rms_norm", scale, granularity)
    result = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    _operators.ops.rms_norm(result, x, weight, eps, weight_offset)
    return result


@_operators.function(_norm.fused_add_rms_norm)
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
        q, scale_out, scales = _results.quantized(
            "fused_add_rms_norm", x, x.shape, out_dtype, scale, granularity, group_size, out
        )
        _operators.ops.fused_add_rms_norm_quantized(
            q, scales, x, residual, weight, eps, weight_offset, scale, granularity, group_size
        )
        return q, scale_out
    check_no_quantization("fused_add_rms_norm", scale, granularity)
    _operators.ops.fused_add_rms_norm(x, residual, weight, eps, weight_offset)
    return x, residual


@_operators.function(_norm.layer_norm)
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
        q, scale_out, scales = _results.quantized(
            "layer_norm", x, x.shape, out_dtype, scale, granularity, group_size, out
        )
        _operators.ops.layer_norm_quantized(q, scales, x, weight, bias, eps, scale, granularity, group_size)
        return q, scale_out
    check_no_quantization("layer_norm", scale, granularity)
    result = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    _operators.ops.layer_norm(result, x, weight, bias, eps)
    return result
