"""quire inside JAX: every op as an XLA FFI call, under ``jax.jit``, ``scan``, ``while_loop``, ``vmap`` and ``shard_map``.

SPDX-License-Identifier: Apache-2.0

The functions have the names and arguments of quire's own, less ``out``, ``workspace``, ``validate`` and ``stream``, which XLA sees
to. They return what quire's own write: a KV cache goes in and comes out. Inside ``jax.jit`` a cache that the caller donates is
written in place; outside it, the ops that write caches donate them themselves, so that the arrays that were passed are gone.
Shapes and dtypes are checked while tracing, by the library's own validation. Scalars and options are static.
"""

from __future__ import annotations

from collections.abc import Callable

from quire import _core
from quire import _jax_batch as _batch
from quire._allocate import Array, dtype_name
from quire._jax_call import Op, Result, Value, call
from quire._jax_quantization import (
    dequantize_fp8,
    dequantize_int8,
    quantize_fp8,
    quantize_int8,
    quantized_matmul,
    scaled_matmul,
)
from quire._quantized import Granularity
from quire.attention import Window, split_window
from quire.position_encoding import Style

__all__ = [
    "attention",
    "copy_blocks",
    "dequantize_fp8",
    "dequantize_int8",
    "fused_add_rms_norm",
    "gather_kv",
    "gelu_and_mul",
    "gelu_fast",
    "gelu_new",
    "gelu_quick",
    "gelu_tanh_and_mul",
    "layer_norm",
    "merge_attention",
    "paged_attention",
    "qk_norm_rope",
    "quantize_fp8",
    "quantize_int8",
    "quantized_matmul",
    "relu_squared",
    "rms_norm",
    "rope_and_write_kv",
    "rotary_embedding",
    "scaled_matmul",
    "shared_prefix_attention",
    "silu_and_mul",
    "write_kv",
]

_Operands = list[Array]
_Attributes = dict[str, Value]


def _like(x: Array) -> Result:
    return tuple(x.shape), str(x.dtype)


# ---- quantized results -----------------------------------------------------------------------------------------------------


def _quantized_results(x: Array, shape: tuple[int, ...], attributes: _Attributes) -> list[Result | None]:
    out: Result = (shape, str(attributes["out_dtype"]))
    if attributes["granularity"] == "tensor":
        return [out, None]
    size = int(attributes["group_size"])
    groups = 1
    if attributes["granularity"] == "group" and shape:
        groups = shape[-1] // size if size > 0 else 1
    return [out, ((*shape[:-1], groups), "float32")]


def _quantization(
    op: str, out_dtype: object, scale: Array | None, granularity: str, group_size: int
) -> _Attributes:
    name = dtype_name(out_dtype)
    if name not in ("float8_e4m3fn", "int8"):
        raise TypeError(f"[{op}] out_dtype: expected float8_e4m3fn or int8, got {name}")
    if granularity not in ("tensor", "token", "group"):
        raise ValueError(f'[{op}] granularity: expected "tensor", "token" or "group", got "{granularity}"')
    if (scale is None) == (granularity == "tensor"):
        expected, got = ("one", "none") if scale is None else ("none", "one")
        raise ValueError(f'[{op}] scale: expected {expected} for granularity "{granularity}", got {got}')
    return {"out_dtype": name, "granularity": granularity, "group_size": int(group_size)}


# ---- norms ---------------------------------------------------------------------------------------------------------------

_RMS_NORM = Op("rms_norm", ("x", "weight"), lambda o, a: [_like(o[0])], _batch.rows([0]))
_RMS_NORM_QUANTIZED = Op(
    "rms_norm_quantized",
    ("x", "weight", "scale"),
    lambda o, a: _quantized_results(o[0], tuple(o[0].shape), a),
    _batch.rows([0]),
)
_FUSED_ADD_RMS_NORM = Op(
    "fused_add_rms_norm",
    ("x", "residual", "weight"),
    lambda o, a: [_like(o[0]), _like(o[1])],
    _batch.rows([0, 1]),
    aliases=((0, 0), (1, 1)),
)
_FUSED_ADD_RMS_NORM_QUANTIZED = Op(
    "fused_add_rms_norm_quantized",
    ("x", "residual", "weight", "scale"),
    lambda o, a: [*_quantized_results(o[0], tuple(o[0].shape), a), _like(o[1])],
    _batch.rows([0, 1]),
    aliases=((2, 1),),
)
_LAYER_NORM = Op("layer_norm", ("x", "weight", "bias"), lambda o, a: [_like(o[0])], _batch.rows([0]))
_LAYER_NORM_QUANTIZED = Op(
    "layer_norm_quantized",
    ("x", "weight", "bias", "scale"),
    lambda o, a: _quantized_results(o[0], tuple(o[0].shape), a),
    _batch.rows([0]),
)


def rms_norm(
    x: Array,
    weight: Array,
    eps: float = 1e-6,
    *,
    weight_offset: float = 0.0,
    out_dtype: object = None,
    scale: Array | None = None,
    granularity: Granularity = "tensor",
    group_size: int = 128,
) -> Array | tuple[Array, Array]:
    """As :func:`quire.rms_norm`: ``x / sqrt(mean(x**2) + eps) * (weight + weight_offset)``.

    Returns:
        ``out``; with ``out_dtype``, ``(out, scales)``.

    Example:
        >>> import jax, jax.numpy as jnp, quire.jax
        >>> jax.jit(quire.jax.rms_norm)(jnp.array([[3.0, -3.0]]), jnp.ones(2)).round()
        Array([[ 1., -1.]], dtype=float32)
    """
    attributes: _Attributes = {"eps": float(eps), "weight_offset": float(weight_offset)}
    if out_dtype is None:
        return call(_RMS_NORM, [x, weight], attributes)[0]
    attributes |= _quantization("rms_norm", out_dtype, scale, granularity, group_size)
    out, *scales = call(_RMS_NORM_QUANTIZED, [x, weight, scale], attributes)
    return out, *(scales or [scale])


def fused_add_rms_norm(
    x: Array,
    residual: Array,
    weight: Array,
    eps: float = 1e-6,
    *,
    weight_offset: float = 0.0,
    out_dtype: object = None,
    scale: Array | None = None,
    granularity: Granularity = "tensor",
    group_size: int = 128,
) -> tuple[Array, ...]:
    """As :func:`quire.fused_add_rms_norm`: ``residual + x``, rounded, and its norm.

    Returns:
        ``(x, residual)``; with ``out_dtype``, ``(out, scales, residual)``.

    Example:
        >>> import jax.numpy as jnp, quire.jax
        >>> x, residual = quire.jax.fused_add_rms_norm(jnp.array([[1.0, 1.0]]), jnp.array([[2.0, 3.0]]), jnp.ones(2))
        >>> residual
        Array([[3., 4.]], dtype=float32)
    """
    attributes: _Attributes = {"eps": float(eps), "weight_offset": float(weight_offset)}
    if out_dtype is None:
        return call(_FUSED_ADD_RMS_NORM, [x, residual, weight], attributes)
    attributes |= _quantization("fused_add_rms_norm", out_dtype, scale, granularity, group_size)
    out, *scales, residual = call(_FUSED_ADD_RMS_NORM_QUANTIZED, [x, residual, weight, scale], attributes)
    return out, *(scales or [scale]), residual


def layer_norm(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    eps: float = 1e-5,
    *,
    out_dtype: object = None,
    scale: Array | None = None,
    granularity: Granularity = "tensor",
    group_size: int = 128,
) -> Array | tuple[Array, Array]:
    """As :func:`quire.layer_norm`: ``(x - mean(x)) / sqrt(var(x) + eps) * weight + bias``.

    Returns:
        ``out``; with ``out_dtype``, ``(out, scales)``.

    Example:
        >>> import jax.numpy as jnp, quire.jax
        >>> quire.jax.layer_norm(jnp.array([[1.0, 3.0]]), jnp.ones(2), eps=0.0)
        Array([[-1.,  1.]], dtype=float32)
    """
    attributes: _Attributes = {"eps": float(eps)}
    if out_dtype is None:
        return call(_LAYER_NORM, [x, weight, bias], attributes)[0]
    attributes |= _quantization("layer_norm", out_dtype, scale, granularity, group_size)
    out, *scales = call(_LAYER_NORM_QUANTIZED, [x, weight, bias, scale], attributes)
    return out, *(scales or [scale])


# ---- activations -----------------------------------------------------------------------------------------------------------


def _half(x: Array) -> tuple[int, ...]:
    return (*x.shape[:-1], x.shape[-1] // 2) if x.shape else ()


def _gated_op(name: str) -> tuple[Op, Op]:
    plain = Op(name, ("x",), lambda o, a: [(_half(o[0]), str(o[0].dtype))], _batch.rows([0]))
    quantized = Op(
        f"{name}_quantized",
        ("x", "scale"),
        lambda o, a: _quantized_results(o[0], _half(o[0]), a),
        _batch.rows([0]),
    )
    return plain, quantized


_GATED = {name: _gated_op(name) for name in ("silu_and_mul", "gelu_and_mul", "gelu_tanh_and_mul")}
_PLAIN = {
    name: Op(name, ("x",), lambda o, a: [_like(o[0])], _batch.rows([0]))
    for name in ("gelu_new", "gelu_fast", "gelu_quick", "relu_squared")
}


def _gated(
    name: str, x: Array, out_dtype: object, scale: Array | None, granularity: str, group_size: int
) -> Array | tuple[Array, Array]:
    plain, quantized = _GATED[name]
    if out_dtype is None:
        return call(plain, [x], {})[0]
    attributes = _quantization(name, out_dtype, scale, granularity, group_size)
    out, *scales = call(quantized, [x, scale], attributes)
    return out, *(scales or [scale])


def silu_and_mul(
    x: Array,
    *,
    out_dtype: object = None,
    scale: Array | None = None,
    granularity: Granularity = "tensor",
    group_size: int = 128,
) -> Array | tuple[Array, Array]:
    """As :func:`quire.silu_and_mul`: ``silu(gate) * up`` of ``[..., 2 * d]``.

    Returns:
        ``out``; with ``out_dtype``, ``(out, scales)``.

    Example:
        >>> import jax.numpy as jnp, quire.jax
        >>> quire.jax.silu_and_mul(jnp.array([[0.0, 100.0, 2.0, 2.0]]))
        Array([[  0., 200.]], dtype=float32)
    """
    return _gated("silu_and_mul", x, out_dtype, scale, granularity, group_size)


def gelu_and_mul(
    x: Array,
    *,
    out_dtype: object = None,
    scale: Array | None = None,
    granularity: Granularity = "tensor",
    group_size: int = 128,
) -> Array | tuple[Array, Array]:
    """As :func:`quire.gelu_and_mul`: ``gelu(gate) * up``; see :func:`silu_and_mul`."""
    return _gated("gelu_and_mul", x, out_dtype, scale, granularity, group_size)


def gelu_tanh_and_mul(
    x: Array,
    *,
    out_dtype: object = None,
    scale: Array | None = None,
    granularity: Granularity = "tensor",
    group_size: int = 128,
) -> Array | tuple[Array, Array]:
    """As :func:`quire.gelu_tanh_and_mul`: ``gelu_tanh(gate) * up``; see :func:`silu_and_mul`."""
    return _gated("gelu_tanh_and_mul", x, out_dtype, scale, granularity, group_size)


def gelu_new(x: Array) -> Array:
    """As :func:`quire.gelu_new`."""
    return call(_PLAIN["gelu_new"], [x], {})[0]


def gelu_fast(x: Array) -> Array:
    """As :func:`quire.gelu_fast`."""
    return call(_PLAIN["gelu_fast"], [x], {})[0]


def gelu_quick(x: Array) -> Array:
    """As :func:`quire.gelu_quick`."""
    return call(_PLAIN["gelu_quick"], [x], {})[0]


def relu_squared(x: Array) -> Array:
    """As :func:`quire.relu_squared`."""
    return call(_PLAIN["relu_squared"], [x], {})[0]


# ---- position encoding -----------------------------------------------------------------------------------------------------

_ROTARY_EMBEDDING = Op(
    "rotary_embedding",
    ("positions", "q", "k", "cos_sin_cache"),
    lambda o, a: [_like(x) if x is not None else None for x in o[1:3]],
    _batch.tokens([0, 1, 2]),
    aliases=((0, 1), (1, 2)),
)
_QK_NORM_ROPE = Op(
    "qk_norm_rope",
    ("positions", "q", "k", "q_weight", "k_weight", "cos_sin_cache"),
    lambda o, a: [_like(x) if x is not None else None for x in o[1:3]],
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
    lambda o, a: [_like(o[1]), _like(o[5]), _like(o[6]), _like(o[2]) if a["return_k"] else None],
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
    attributes: _Attributes = {"style": _style("rotary_embedding", style)}
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
    attributes: _Attributes = {
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
    attributes: _Attributes = {
        "eps": float(eps),
        "weight_offset": float(weight_offset),
        "style": _style("rope_and_write_kv", style),
        "return_k": int(return_k),
    }
    operands = [
        positions, q, k, v, cos_sin_cache, k_cache, v_cache, slot_mapping, k_scale, v_scale, q_weight, k_weight
    ]  # fmt: skip
    return call(_ROPE_AND_WRITE_KV, operands, attributes)


# ---- KV cache --------------------------------------------------------------------------------------------------------------

_WRITE_KV = Op(
    "write_kv",
    ("k", "v", "k_cache", "v_cache", "slot_mapping", "k_scale", "v_scale"),
    lambda o, a: [_like(o[2]), _like(o[3])],
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
    lambda o, a: [_like(o[0])],
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


# ---- attention -------------------------------------------------------------------------------------------------------------

_OPTIONS = ("alibi_slopes", "sinks", "q_scale", "k_scale", "v_scale", "mask", "mask_start")


def _attention_results(operands: _Operands, attributes: _Attributes) -> list[Result | None]:
    q: Array = operands[0]
    # Of float8 queries the output is wider.
    out: Result = (tuple(q.shape), "bfloat16") if dtype_name(q.dtype) == "float8_e4m3fn" else _like(q)
    return [out, (tuple(q.shape[:2]), "float32") if attributes["return_lse"] else None]


def _scratch_bytes(
    size_name: str, seq_lens: int | None, start_loc: int | None
) -> Callable[[_Operands, _Attributes], int]:
    """Of the workspace that the op asks for on CUDA.

    Which platform is compiled for is not known while tracing: where there is a GPU, it is declared for the CPU too, which leaves it
    untouched.
    """
    size = getattr(_core, size_name)

    def scratch_bytes(operands: _Operands, attributes: _Attributes) -> int:
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
    lambda o, a: [_like(o[0]), _like(o[1])],
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
) -> _Attributes:
    left, right = split_window(op, window)
    attributes: _Attributes = {
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
