"""Rotary position encoding of quire.jax.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from quire._allocate import Array
from quire.jax import _batch
from quire.jax._call import Attributes, Op, call
from quire.jax._results import like
from quire.position_encoding import Style

_ROTARY_EMBEDDING = Op(
    "rotary_embedding",
    ("positions", "q", "k", "cos_sin_cache"),
    lambda o, a: [like(x) if x is not None else None for x in o[1:3]],
    _batch.tokens([0, 1, 2]),
    aliases=((0, 1), (1, 2)),
)
_QK_NORM_ROPE = Op(
    "qk_norm_rope",
    ("positions", "q", "k", "q_weight", "k_weight", "cos_sin_cache"),
    lambda o, a: [like(x) if x is not None else None for x in o[1:3]],
    _batch.tokens([0, 1, 2]),
    aliases=((0, 1), (1, 2)),
)
_ROPE_AND_WRITE_KV = Op(
    "rope_and_write_kv",
    (
        "positions",
        "q",
        "k",
        "v",
        "cos_sin_cache",
        "k_cache",
        "v_cache",
        "slot_mapping",
        "k_scale",
        "v_scale",
        "q_weight",
        "k_weight",
    ),
    lambda o, a: [like(o[1]), like(o[5]), like(o[6]), like(o[2]) if a["return_k"] else None],
    _batch.caches([5, 6], 7, [0, 1, 2, 3], written=True),
    aliases=((0, 1), (1, 5), (2, 6)),
    donated=(5, 6),
)


def _style(op: str, style: str) -> str:
    if style not in ("neox", "gptj"):
        raise ValueError(f'[{op}] style: expected "neox" or "gptj", got "{style}"')
    return style


def rotary_embedding(
    positions: Array, q: Array, k: Array | None, cos_sin_cache: Array, *, style: Style = "neox"
) -> tuple[Array, Array | None]:
    """As :func:`quire.rotary_embedding`: q and k rotated by their positions.

    Returns:
        ``(q, k)``, the rotated ones.

    Example:
        >>> import jax.numpy as jnp, quire, quire.jax
        >>> q, table = jnp.array([[[1.0, 0.0]]]), jnp.asarray(quire.rope_cache(2, 4))
        >>> quire.jax.rotary_embedding(jnp.array([1]), q, None, table)[0].round(4)
        Array([[[0.5403, 0.8415]]], dtype=float32)
    """
    attributes: Attributes = {"style": _style("rotary_embedding", style)}
    q, *rest = call(_ROTARY_EMBEDDING, [positions, q, k, cos_sin_cache], attributes)
    return q, rest[0] if rest else None


def qk_norm_rope(
    positions: Array,
    q: Array,
    k: Array | None,
    q_weight: Array,
    k_weight: Array | None,
    cos_sin_cache: Array,
    eps: float = 1e-6,
    *,
    weight_offset: float = 0.0,
    style: Style = "neox",
) -> tuple[Array, Array | None]:
    """As :func:`quire.qk_norm_rope`: RMS norm of every head, then rotation.

    Returns:
        ``(q, k)``, the new ones.

    Example:
        >>> import jax.numpy as jnp, quire, quire.jax
        >>> q, table = jnp.array([[[3.0, -3.0]]]), jnp.asarray(quire.rope_cache(2, 4))
        >>> quire.jax.qk_norm_rope(jnp.array([0]), q, None, jnp.ones(2), None, table)[0].round()
        Array([[[ 1., -1.]]], dtype=float32)
    """
    attributes: Attributes = {
        "eps": float(eps),
        "weight_offset": float(weight_offset),
        "style": _style("qk_norm_rope", style),
    }
    q, *rest = call(_QK_NORM_ROPE, [positions, q, k, q_weight, k_weight, cos_sin_cache], attributes)
    return q, rest[0] if rest else None


def rope_and_write_kv(
    positions: Array,
    q: Array,
    k: Array,
    v: Array,
    cos_sin_cache: Array,
    k_cache: Array,
    v_cache: Array,
    slot_mapping: Array,
    *,
    style: Style = "neox",
    k_scale: Array | None = None,
    v_scale: Array | None = None,
    return_k: bool = False,
    q_weight: Array | None = None,
    k_weight: Array | None = None,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
) -> tuple[Array, ...]:
    """As :func:`quire.rope_and_write_kv`: rotates q and k and writes k and v to the caches, in place where those are donated.

    Args:
        return_k: Also return the rotated k.

    Returns:
        ``(q, k_cache, v_cache)``, or ``(q, k_cache, v_cache, k)``.

    Example:
        >>> import jax.numpy as jnp, quire, quire.jax
        >>> q, k, table = jnp.array([[[1.0, 0.0]]]), jnp.array([[[0.0, 1.0]]]), jnp.asarray(quire.rope_cache(2, 4))
        >>> cache = jnp.zeros((2, 4, 1, 2))
        >>> q, k_cache, v_cache = quire.jax.rope_and_write_kv(
        ...     jnp.array([1]), q, k, k, table, cache, jnp.zeros_like(cache), jnp.array([6]))
        >>> k_cache[1, 2].round(4)
        Array([[-0.8415,  0.5403]], dtype=float32)
    """
    attributes: Attributes = {
        "eps": float(eps),
        "weight_offset": float(weight_offset),
        "style": _style("rope_and_write_kv", style),
        "return_k": int(return_k),
    }
    operands = [
        positions, q, k, v, cos_sin_cache, k_cache, v_cache, slot_mapping, k_scale, v_scale, q_weight, k_weight
    ]  # fmt: skip
    return call(_ROPE_AND_WRITE_KV, operands, attributes)
