"""The KV-cache operations of quire.jax.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from quire._allocate import Array, dtype_name
from quire.jax import _batch
from quire.jax._call import Op, call
from quire.jax._results import like

_WRITE_KV = Op(
    "write_kv",
    ("k", "v", "k_cache", "v_cache", "slot_mapping", "k_scale", "v_scale"),
    lambda o, a: [like(o[2]), like(o[3])],
    _batch.caches([2, 3], 4, [0, 1], written=True),
    aliases=((0, 2), (1, 3)),
    donated=(2, 3),
)
_GATHER_KV = Op(
    "gather_kv",
    ("k_cache", "v_cache", "slot_mapping", "k_scale", "v_scale"),
    lambda o, a: [((*o[2].shape[:1], *o[0].shape[2:]), str(a["dtype"]))] * 2,
    _batch.caches([0, 1], 2, [], written=False),
)
_COPY_BLOCKS = Op(
    "copy_blocks",
    ("cache", "pairs"),
    lambda o, a: [like(o[0])],
    _batch.caches([0], 1, [], written=True),
    aliases=((0, 0),),
    donated=(0,),
)


def write_kv(
    k: Array,
    v: Array,
    k_cache: Array,
    v_cache: Array,
    slot_mapping: Array,
    *,
    k_scale: Array | None = None,
    v_scale: Array | None = None,
) -> tuple[Array, Array]:
    """As :func:`quire.write_kv`: token ``t``'s key and value go to slot ``slot_mapping[t]``, in place where the caches are donated.

    Returns:
        ``(k_cache, v_cache)``, the written ones.

    Example:
        >>> import jax.numpy as jnp, quire.jax
        >>> x, cache = jnp.ones((1, 1, 8)), jnp.zeros((2, 4, 1, 8))
        >>> k_cache, v_cache = quire.jax.write_kv(x, x, cache, jnp.zeros_like(cache), jnp.array([5]))
        >>> float(k_cache[1, 1].sum())
        8.0
    """
    k_cache, v_cache = call(_WRITE_KV, [k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale], {})
    return k_cache, v_cache


def gather_kv(
    k_cache: Array,
    v_cache: Array,
    slot_mapping: Array,
    *,
    k_scale: Array | None = None,
    v_scale: Array | None = None,
    dtype: object = None,
) -> tuple[Array, Array]:
    """As :func:`quire.gather_kv`: ``k[t], v[t] = cache[slot_mapping[t]]``, dequantized.

    Args:
        dtype: Of the result. None: the cache's, or float32 for a quantized cache.

    Returns:
        ``(k, v)``.

    Example:
        >>> import jax.numpy as jnp, quire.jax
        >>> cache = jnp.arange(16.0).reshape(2, 1, 1, 8)
        >>> quire.jax.gather_kv(cache, cache, jnp.array([1, -1]))[0][:, 0, 0]
        Array([8., 0.], dtype=float32)
    """
    name = dtype_name(k_cache.dtype if dtype is None else dtype)
    if dtype is None and name in ("float8_e4m3fn", "float8_e5m2", "int8"):
        name = "float32"
    k, v = call(_GATHER_KV, [k_cache, v_cache, slot_mapping, k_scale, v_scale], {"dtype": name})
    return k, v


def copy_blocks(cache: Array, pairs: Array) -> Array:
    """As :func:`quire.copy_blocks`: ``cache[pairs[i, 1]] = cache[pairs[i, 0]]``, in place where the cache is donated.

    Returns:
        The cache.

    Example:
        >>> import jax.numpy as jnp, quire.jax
        >>> quire.jax.copy_blocks(jnp.arange(4.0).reshape(4, 1), jnp.array([[3, 0]]))[:, 0]
        Array([3., 1., 2., 3.], dtype=float32)
    """
    return call(_COPY_BLOCKS, [cache, pairs], {})[0]
