"""The cache's operations inside PyTorch.

SPDX-License-Identifier: Apache-2.0
"""

# The traced forms have the arguments of the documented functions.
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch

from quire import _core
from quire import kv_cache as _kv_cache
from quire.torch import _operators

_operators.define(
    "write_kv",
    "Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slot_mapping, Tensor? k_scale, Tensor? v_scale",
    _operators.core_call(_core.write_kv),
)
_operators.define(
    "gather_kv",
    "Tensor(a!) k, Tensor(b!) v, Tensor k_cache, Tensor v_cache, Tensor slot_mapping, Tensor? k_scale, Tensor? v_scale",
    _operators.core_call(_core.gather_kv),
)
_operators.define("copy_blocks", "Tensor(a!) cache, Tensor pairs", _operators.core_call(_core.copy_blocks))
_operators.define(
    "swap_blocks", "Tensor(a!) dst, Tensor src, Tensor pairs", _operators.core_call(_core.swap_blocks)
)


@_operators.function(_kv_cache.write_kv)
def write_kv(k, v, k_cache, v_cache, slot_mapping, *, k_scale=None, v_scale=None):
    """Traced."""
    _operators.ops.write_kv(k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale)


@_operators.function(_kv_cache.gather_kv)
def gather_kv(k_cache, v_cache, slot_mapping, *, k_scale=None, v_scale=None, out=None):
    """Traced."""
    if out is None:
        dtype = torch.float32 if k_cache.itemsize == 1 else k_cache.dtype
        shape = (slot_mapping.shape[0], *k_cache.shape[2:])
        out = k_cache.new_empty(shape, dtype=dtype), k_cache.new_empty(shape, dtype=dtype)
    k, v = out
    _operators.ops.gather_kv(k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale)
    return k, v


@_operators.function(_kv_cache.copy_blocks)
def copy_blocks(cache, pairs):
    """Traced."""
    _operators.ops.copy_blocks(cache, pairs)


@_operators.function(_kv_cache.swap_blocks)
def swap_blocks(dst, src, pairs):
    """Traced."""
    _operators.ops.swap_blocks(dst, src, pairs)
