"""Position encodings inside PyTorch.

SPDX-License-Identifier: Apache-2.0
"""

# The traced forms have the arguments of the documented functions.
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from quire import _core
from quire import position_encoding as _position_encoding
from quire.torch import _operators

_operators.define(
    "rotary_embedding",
    "Tensor positions, Tensor(a!) q, Tensor(b!)? k, Tensor cos_sin_cache, str style",
    _operators.core_call(_core.rotary_embedding),
)
_operators.define(
    "qk_norm_rope",
    "Tensor positions, Tensor(a!) q, Tensor(b!)? k, Tensor q_weight, Tensor? k_weight, Tensor cos_sin_cache, float eps, "
    "float weight_offset, str style",
    _operators.core_call(_core.qk_norm_rope),
)
_operators.define(
    "rope_and_write_kv",
    "Tensor positions, Tensor(a!) q, Tensor k, Tensor v, Tensor cos_sin_cache, Tensor(b!) k_cache, Tensor(c!) v_cache, "
    "Tensor slot_mapping, Tensor? k_scale, Tensor? v_scale, Tensor(d!)? k_out, Tensor? q_weight, Tensor? k_weight, float eps, "
    "float weight_offset, str style",
    _operators.core_call(_core.rope_and_write_kv),
)


@_operators.function(_position_encoding.rotary_embedding)
def rotary_embedding(positions, q, k, cos_sin_cache, *, style="neox"):
    """Traced."""
    _operators.ops.rotary_embedding(positions, q, k, cos_sin_cache, style)
    return q, k


@_operators.function(_position_encoding.qk_norm_rope)
def qk_norm_rope(
    positions, q, k, q_weight, k_weight, cos_sin_cache, eps=1e-6, *, weight_offset=0.0, style="neox"
):
    """Traced."""
    _operators.ops.qk_norm_rope(positions, q, k, q_weight, k_weight, cos_sin_cache, eps, weight_offset, style)
    return q, k


@_operators.function(_position_encoding.rope_and_write_kv)
def rope_and_write_kv(
    positions, q, k, v, cos_sin_cache, k_cache, v_cache, slot_mapping, *, style="neox", k_scale=None, v_scale=None, k_out=None,
    q_weight=None, k_weight=None, eps=1e-6, weight_offset=0.0,
):  # fmt: skip
    """Traced."""
    _operators.ops.rope_and_write_kv(
        positions, q, k, v, cos_sin_cache, k_cache, v_cache, slot_mapping, k_scale, v_scale, k_out, q_weight, k_weight, eps,
        weight_offset, style,
    )  # fmt: skip
    return q
