"""The attention functions of quire.jax.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from collections.abc import Callable

from quire import _core
from quire._allocate import Array, dtype_name
from quire.attention import Window, split_window
from quire.jax import _batch
from quire.jax._call import Attributes, Op, Result, call
from quire.jax._results import like

_OPTIONS = ("alibi_slopes", "sinks", "q_scale", "k_scale", "v_scale", "mask", "mask_start")


def _attention_results(operands: list[Array], attributes: Attributes) -> list[Result | None]:
    q: Array = operands[0]
    # Of float8 queries the output is wider.
    out: Result = (tuple(q.shape), "bfloat16") if dtype_name(q.dtype) == "float8_e4m3fn" else like(q)
    return [out, (tuple(q.shape[:2]), "float32") if attributes["return_lse"] else None]


def _scratch_bytes(
    size_name: str, seq_lens: int | None, start_loc: int | None
) -> Callable[[list[Array], Attributes], int]:
    """Of the workspace that the op asks for on CUDA.

    Which platform is compiled for is not known while tracing: where there is a GPU, it is declared for the CPU too, which leaves it
    untouched.
    """
    size = getattr(_core, size_name)

    def scratch_bytes(operands: list[Array], attributes: Attributes) -> int:
        if not _core.has_cuda() or _core.num_cuda_devices() == 0:
            return 0
        q: Array = operands[0]
        num_seqs = 1
        if seq_lens is not None:
            lens: Array = operands[seq_lens]
            num_seqs = lens.shape[0]
        elif start_loc is not None and operands[start_loc] is not None:
            loc: Array = operands[start_loc]
            num_seqs = loc.shape[0] - 1
        if q.size == 0 or num_seqs < 1:
            return 0
        return int(size(q.shape[0], num_seqs, q.shape[1], q.shape[2], "cuda"))

    return scratch_bytes


_PAGED_ATTENTION = Op(
    "paged_attention",
    ("q", "k_cache", "v_cache", "block_tables", "seq_lens", "query_start_loc", *_OPTIONS),
    _attention_results,
    _batch.paged(3),
    scratch_bytes=_scratch_bytes("paged_attention_workspace_size", 4, None),
)
_SHARED_PREFIX_ATTENTION = Op(
    "shared_prefix_attention",
    ("q", "k_cache", "v_cache", "prefix_blocks", "block_tables", "seq_lens", "query_start_loc", *_OPTIONS),
    _attention_results,
    _batch.paged(4),
    scratch_bytes=_scratch_bytes("shared_prefix_attention_workspace_size", 5, None),
)
_ATTENTION = Op(
    "attention",
    ("q", "k", "v", "query_start_loc", "kv_start_loc", *_OPTIONS),
    _attention_results,
    _batch.ragged(),
    scratch_bytes=_scratch_bytes("attention_workspace_size", None, 3),
)
_MERGE_ATTENTION = Op(
    "merge_attention",
    ("out_a", "lse_a", "out_b", "lse_b"),
    lambda o, a: [like(o[0]), like(o[1])],
    _batch.tokens([0, 1, 2, 3]),
)


def _options(
    op: str,
    scale: float | None,
    causal: bool,
    window: Window,
    softcap: float | None,
    return_lse: bool,
    batch_invariant: bool = False,
) -> Attributes:
    left, right = split_window(op, window)
    attributes: Attributes = {
        "causal": int(causal),
        "window_left": left,
        "window_right": right,
        "softcap": float(softcap or 0.0),
        "return_lse": int(return_lse),
        "batch_invariant": int(batch_invariant),
    }
    return attributes if scale is None else {**attributes, "scale": float(scale)}


def paged_attention(
    q: Array,
    k_cache: Array,
    v_cache: Array,
    block_tables: Array,
    seq_lens: Array,
    *,
    query_start_loc: Array | None = None,
    scale: float | None = None,
    causal: bool = True,
    window: Window = None,
    softcap: float | None = None,
    alibi_slopes: Array | None = None,
    sinks: Array | None = None,
    q_scale: Array | None = None,
    k_scale: Array | None = None,
    v_scale: Array | None = None,
    mask: Array | None = None,
    mask_start: Array | None = None,
    return_lse: bool = False,
    batch_invariant: bool = False,
) -> Array | tuple[Array, Array]:
    """As :func:`quire.paged_attention`: decode, prefill and mixed batches over a paged cache.

    Args:
        batch_invariant: As there, and under ``jax.vmap`` too: each batch element's bits are those of a call of its own.

    Returns:
        ``out``, or ``(out, lse)``: out of q's dtype, of float8_e4m3fn queries bfloat16. Rows of q that belong to no sequence are
        undefined.

    Example:
        >>> import jax.numpy as jnp, quire.jax
        >>> cache, q = jnp.ones((4, 16, 1, 8)), jnp.ones((1, 2, 8))
        >>> tables, lens = jnp.array([[2, 0]]), jnp.array([20])
        >>> quire.jax.paged_attention(q, cache, cache, tables, lens)[0, 0, :3]
        Array([1., 1., 1.], dtype=float32)
    """
    operands = [
        q, k_cache, v_cache, block_tables, seq_lens, query_start_loc, alibi_slopes, sinks, q_scale, k_scale, v_scale, mask, mask_start
    ]  # fmt: skip
    results = call(
        _PAGED_ATTENTION,
        operands,
        _options("paged_attention", scale, causal, window, softcap, return_lse, batch_invariant),
    )
    return (results[0], results[1]) if return_lse else results[0]


def shared_prefix_attention(
    q: Array,
    k_cache: Array,
    v_cache: Array,
    prefix_blocks: Array,
    block_tables: Array,
    seq_lens: Array,
    *,
    query_start_loc: Array | None = None,
    scale: float | None = None,
    causal: bool = True,
    softcap: float | None = None,
    sinks: Array | None = None,
    q_scale: Array | None = None,
    k_scale: Array | None = None,
    v_scale: Array | None = None,
    mask: Array | None = None,
    mask_start: Array | None = None,
    return_lse: bool = False,
) -> Array | tuple[Array, Array]:
    """As :func:`quire.shared_prefix_attention`: sequences that all begin with the same blocks.

    Returns:
        ``out``, or ``(out, lse)``: out of q's dtype, of float8_e4m3fn queries bfloat16.

    Example:
        >>> import jax.numpy as jnp, quire.jax
        >>> cache, q = jnp.ones((4, 16, 1, 8)), jnp.ones((2, 2, 8))
        >>> prefix, tables, lens = jnp.array([0, 3]), jnp.array([[1], [2]]), jnp.array([5, 9])
        >>> _, lse = quire.jax.shared_prefix_attention(q, cache, cache, prefix, tables, lens, return_lse=True)
        >>> jnp.exp(lse[:, 0] - 8**0.5).round()
        Array([37., 41.], dtype=float32)
    """
    operands = [
        q, k_cache, v_cache, prefix_blocks, block_tables, seq_lens, query_start_loc, None, sinks, q_scale, k_scale, v_scale, mask,
        mask_start
    ]  # fmt: skip
    results = call(
        _SHARED_PREFIX_ATTENTION,
        operands,
        _options("shared_prefix_attention", scale, causal, None, softcap, return_lse),
    )
    return (results[0], results[1]) if return_lse else results[0]


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    query_start_loc: Array | None = None,
    kv_start_loc: Array | None = None,
    scale: float | None = None,
    causal: bool = True,
    window: Window = None,
    softcap: float | None = None,
    alibi_slopes: Array | None = None,
    sinks: Array | None = None,
    q_scale: Array | None = None,
    k_scale: Array | None = None,
    v_scale: Array | None = None,
    mask: Array | None = None,
    mask_start: Array | None = None,
    return_lse: bool = False,
    batch_invariant: bool = False,
) -> Array | tuple[Array, Array]:
    """As :func:`quire.attention`: ragged, unpaged keys and values.

    Args:
        batch_invariant: As in :func:`paged_attention`.

    Returns:
        ``out``, or ``(out, lse)``: out of q's dtype, of float8_e4m3fn queries bfloat16.

    Example:
        >>> import jax.numpy as jnp, quire.jax
        >>> x = jnp.ones((3, 2, 8))
        >>> quire.jax.attention(x, x, x).shape
        (3, 2, 8)
    """
    operands = [
        q, k, v, query_start_loc, kv_start_loc, alibi_slopes, sinks, q_scale, k_scale, v_scale, mask, mask_start
    ]  # fmt: skip
    results = call(
        _ATTENTION,
        operands,
        _options("attention", scale, causal, window, softcap, return_lse, batch_invariant),
    )
    return (results[0], results[1]) if return_lse else results[0]


def merge_attention(out_a: Array, lse_a: Array, out_b: Array, lse_b: Array) -> tuple[Array, Array]:
    """As :func:`quire.merge_attention`: partial results over disjoint keys in one.

    Returns:
        ``(out, lse)``.

    Example:
        >>> import jax.numpy as jnp, quire.jax
        >>> a, b, zero = jnp.zeros((1, 1, 8)), jnp.ones((1, 1, 8)), jnp.zeros((1, 1))
        >>> out, lse = quire.jax.merge_attention(a, zero, b, zero)
        >>> float(out[0, 0, 0]), round(float(lse[0, 0]), 4)
        (0.5, 0.6931)
    """
    out, lse = call(_MERGE_ATTENTION, [out_a, lse_a, out_b, lse_b], {})
    return out, lse
