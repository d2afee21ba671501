"""Rotary position encoding (RoPE): the op and its tables.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from quire import _core
from quire._allocate import Array, dtype_name, from_numpy, numpy_dtype, shape_of

__all__ = ["qk_norm_rope", "rope_and_write_kv", "rope_cache", "rotary_embedding"]

Style = Literal["neox", "gptj"]


def rotary_embedding(
    positions: Array,
    q: Array,
    k: Array | None,
    cos_sin_cache: Array,
    *,
    style: Style = "neox",
    stream: object = None,
) -> tuple[Array, Array | None]:
    """Rotates q and k in place by their positions.

    For each pair ``(a, b)`` of a head with angle index ``i``: ``a' = a cos_i - b sin_i``, ``b' = b cos_i + a sin_i``, where
    ``cos | sin = cos_sin_cache[position]``. Elements from ``rotary_dim`` on stay as they are.

    Args:
        positions: int32 or int64 ``[num_tokens]``. -1 leaves a token as it is; so does any other value outside the table, which
            is also recorded for :func:`quire.check_errors`.
        q: ``[num_tokens, num_heads, head_dim]`` float32, float16 or bfloat16, unit inner stride; overwritten.
        k: As ``q`` with its own number of heads, or None; overwritten.
        cos_sin_cache: ``[max_position, rotary_dim]`` of any of the three dtypes, contiguous; see :func:`rope_cache`.
        style: Which elements pair up: "neox" ``(i, i + rotary_dim / 2)``, "gptj" ``(2 i, 2 i + 1)``.
        stream: An int, an object with ``__cuda_stream__``, or None for the framework's current stream.

    Returns:
        ``(q, k)``, the tensors that were passed.

    Raises:
        ValueError: Shapes, strides or devices do not fit, or memory overlaps.
        TypeError: A dtype does not fit, or an argument is no tensor.

    Source: Su et al., RoFormer: Enhanced Transformer with Rotary Position Embedding, 2021.

    Example:
        >>> import numpy as np, quire
        >>> q = np.array([[[1.0, 0.0]]], np.float32)
        >>> table = quire.rope_cache(2, 4, theta=10000.0)
        >>> quire.rotary_embedding(np.array([1]), q, None, table)[0].round(4)
        array([[[0.5403, 0.8415]]], dtype=float32)
    """
    _core.rotary_embedding(positions, q, k, cos_sin_cache, style, stream)
    return q, k


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
    stream: object = None,
) -> tuple[Array, Array | None]:
    """RMS norm of every head of q and k, then their rotation, in place and in one pass; Qwen3's and Gemma 3's.

    ``x / sqrt(mean(x**2) + eps) * (weight + weight_offset)`` over ``head_dim``, then :func:`rotary_embedding`. Both steps are done
    in float32 and rounded once.

    Args:
        positions: As in :func:`rotary_embedding`; a token that is skipped stays as it is.
        q: ``[num_tokens, num_heads, head_dim]`` float32, float16 or bfloat16, unit inner stride; overwritten.
        k: As ``q`` with its own number of heads, or None; overwritten.
        q_weight: ``[head_dim]`` of any of the three dtypes, contiguous.
        k_weight: As ``q_weight``; None where k is.
        cos_sin_cache: As in :func:`rotary_embedding`.
        eps: Added to the mean of squares.
        weight_offset: Added to the weights; 1 is Gemma's form.
        style: As in :func:`rotary_embedding`.
        stream: An int, an object with ``__cuda_stream__``, or None for the framework's current stream.

    Returns:
        ``(q, k)``, the tensors that were passed.

    Raises:
        ValueError: Shapes, strides or devices do not fit, or memory overlaps.
        TypeError: A dtype does not fit, or an argument is no tensor.

    Source: Dehghani et al., Scaling Vision Transformers to 22 Billion Parameters, 2023 (norms of queries and keys).

    Example:
        >>> import numpy as np, quire
        >>> q, weight = np.array([[[3.0, 4.0]]], np.float32), np.ones(2, np.float32)
        >>> table = quire.rope_cache(2, 4)
        >>> quire.qk_norm_rope(np.array([0]), q, None, weight, None, table, eps=0.0)[0].round(4)
        array([[[0.8485, 1.1314]]], dtype=float32)
    """
    _core.qk_norm_rope(positions, q, k, q_weight, k_weight, cos_sin_cache, eps, weight_offset, style, stream)
    return q, k


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
    k_out: Array | None = None,
    q_weight: Array | None = None,
    k_weight: Array | None = None,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    stream: object = None,
) -> Array:
    """What stands between a layer's projection and its attention, in one pass: rotates q and k, writes k and v to the cache.

    q is rotated in place. The rotated k goes to the cache, and nowhere else unless ``k_out`` says so: attention over the cache needs
    no other copy. The result is, bit for bit, that of :func:`rotary_embedding` (with weights, :func:`qk_norm_rope`) followed by
    :func:`quire.write_kv`.

    Args:
        positions: int32 or int64 ``[num_tokens]``. A token with -1, or with another value outside the table (which is recorded for
            :func:`quire.check_errors`), is not rotated, but written.
        q: ``[num_tokens, num_heads, head_dim]`` float32, float16 or bfloat16, unit inner stride; overwritten.
        k: ``[num_tokens, num_kv_heads, head_dim]`` of q's dtype, unit inner stride; read only.
        v: As ``k``.
        cos_sin_cache: ``[max_position, rotary_dim]``; see :func:`rope_cache`.
        k_cache: ``[num_blocks, block_size, num_kv_heads, head_dim]``, unit inner stride: float32, float16, bfloat16,
            float8_e4m3fn, float8_e5m2 or int8.
        v_cache: As ``k_cache``.
        slot_mapping: int32 or int64 ``[num_tokens]``. A token with -1, or with another value outside the cache (which is recorded),
            is not written; its q is rotated.
        style: As in :func:`rotary_embedding`.
        k_scale: float32 ``[1]`` or ``[num_kv_heads]``, for float8 and int8 caches only; None is 1. Stored is
            ``saturate(x / scale)``.
        v_scale: Likewise.
        k_out: As ``k``, or ``k`` itself: the rotated k is written there too, for attention that takes k and v as they are. Or None.
        q_weight: ``[head_dim]`` of a float dtype: the weight of an RMS norm of each head before its rotation, as in
            :func:`qk_norm_rope`. None: no norm.
        k_weight: Likewise; both or neither.
        eps: As in :func:`qk_norm_rope`.
        weight_offset: Likewise.
        stream: An int, an object with ``__cuda_stream__``, or None for the framework's current stream.

    Returns:
        ``q``, the tensor that was passed.

    Raises:
        ValueError: Shapes, strides or devices do not fit, a tensor to be written is read-only, or memory overlaps.
        TypeError: A dtype does not fit, or an argument is no tensor.

    Source: As :func:`rotary_embedding` and :func:`quire.write_kv`.

    Example:
        >>> import numpy as np, quire
        >>> cache = np.zeros((2, 2, 4, 1, 2), np.float32)
        >>> q, k = np.array([[[1.0, 0.0]]], np.float32), np.array([[[0.0, 1.0]]], np.float32)
        >>> table = quire.rope_cache(2, 4)
        >>> quire.rope_and_write_kv(np.array([1]), q, k, k, table, cache[0], cache[1], np.array([6])).round(4)
        array([[[0.5403, 0.8415]]], dtype=float32)
        >>> cache[0, 1, 2].round(4)
        array([[-0.8415,  0.5403]], dtype=float32)
    """
    _core.rope_and_write_kv(
        positions,
        q,
        k,
        v,
        cos_sin_cache,
        k_cache,
        v_cache,
        slot_mapping,
        k_scale,
        v_scale,
        k_out,
        q_weight,
        k_weight,
        eps,
        weight_offset,
        style,
        stream,
    )
    return q


def rope_cache(
    head_dim: int,
    max_position: int,
    *,
    theta: float = 10000.0,
    scaling: Mapping[str, Any] | None = None,
    rotary_dim: int | None = None,
    dtype: str = "float32",
    like: Array | None = None,
) -> Array:
    """The table of cosines and sines for :func:`rotary_embedding`.

    Args:
        head_dim: Elements of a head.
        max_position: Rows of the table. For "dynamic" and "longrope" it is also the sequence length that the frequencies are
            chosen for.
        theta: The base of the frequencies (``rope_theta``).
        scaling: None, or a mapping as in a checkpoint's ``rope_scaling``: ``rope_type`` (or ``type``) is "default", "linear",
            "dynamic", "yarn", "longrope" or "llama3", with that type's parameters: ``factor``,
            ``original_max_position_embeddings``, ``low_freq_factor``, ``high_freq_factor``, ``beta_fast``, ``beta_slow``,
            ``mscale``, ``mscale_all_dim``, ``truncate``, ``attention_factor``, ``short_factor``, ``long_factor``, and
            ``max_position_embeddings`` where the model's differs from ``max_position``.
        rotary_dim: Rotated elements of a head, even; None is head_dim.
        dtype: "float32", "float16" or "bfloat16".
        like: A tensor whose framework and device the table is made for; None gives a NumPy array.

    Returns:
        ``[max_position, rotary_dim]``: cosines in the first half, sines in the second.

    Raises:
        ValueError: A size or a parameter is out of range, missing, or the type is unknown.
        TypeError: A size is no integer, ``theta`` no number, ``dtype`` none of the three, ``scaling`` no mapping, or ``like`` no
            tensor.

    Source: Su et al. 2021; Peng et al., YaRN, 2023; Ding et al., LongRoPE, 2024; Llama 3.1's scaling. Arithmetic is done in
    float32 in the order of HF transformers, so that the tables agree with it.

    Example:
        >>> import quire
        >>> quire.rope_cache(64, 16, theta=500000.0).shape
        (16, 64)
    """
    head_dim, max_position = _integer("head_dim", head_dim), _integer("max_position", max_position)
    dim = head_dim if rotary_dim is None else _integer("rotary_dim", rotary_dim)
    if dim < 2 or dim % 2 or dim > head_dim:
        raise ValueError(
            f"[rope_cache] rotary_dim: expected an even number of 2 to head_dim {head_dim}, got {dim}"
        )
    if max_position < 1:
        raise ValueError(f"[rope_cache] max_position: expected 1 or more, got {max_position}")
    if max_position * dim >= 2**48:
        raise ValueError(
            f"[rope_cache] max_position: expected a table of fewer than 2**48 numbers, got {max_position} rows of {dim}"
        )
    if not isinstance(theta, numbers.Real):
        raise TypeError(f"[rope_cache] theta: expected a number, got {type(theta).__qualname__}")
    theta = _float(theta)
    if not 0.0 < theta < math.inf:
        raise ValueError(f"[rope_cache] theta: expected a finite number above 0, got {theta}")
    if scaling is not None and not isinstance(scaling, Mapping):
        raise TypeError(f"[rope_cache] scaling: expected a mapping or None, got {type(scaling).__qualname__}")
    name = dtype_name(dtype)
    if name not in ("float32", "float16", "bfloat16"):
        raise TypeError(f"[rope_cache] dtype: expected float32, float16 or bfloat16, got {name}")
    if like is not None:
        shape_of("rope_cache", "like", like)
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        inv_freq, attention_factor = _inverse_frequencies(dim, max_position, theta, dict(scaling or {}))
    if not (np.isfinite(inv_freq).all() and (inv_freq > 0).all() and math.isfinite(attention_factor)):
        raise ValueError(
            "[rope_cache] theta, scaling: expected frequencies above 0 and finite in float32, got "
            f"{inv_freq.min()} to {inv_freq.max()}"
        )
    angles = np.arange(max_position, dtype=np.float32)[:, None] * inv_freq[None, :]
    # The products are rounded to float32, as everywhere; cos and sin of those are taken exactly.
    wide = angles.astype(np.float64)
    table = np.concatenate([np.cos(wide), np.sin(wide)], axis=1).astype(np.float32)
    table = (table * np.float32(attention_factor)).astype(numpy_dtype(name))
    return table if like is None else from_numpy(table, like)


def _integer(name: str, value: int) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"[rope_cache] {name}: expected an integer, got {type(value).__qualname__}") from None


def _float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:  # an integer of hundreds of digits
        return math.inf


def _powers(dim: int, base: float) -> np.ndarray[Any, Any]:
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    # The base is a float32 too; its power is rounded once.
    return np.power(np.float64(np.float32(base)), exponents.astype(np.float64)).astype(np.float32)


def _parameter(scaling: dict[str, Any], kind: str, name: str) -> float:
    value = scaling.get(name)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < _float(value) < math.inf:
        raise ValueError(
            f"[rope_cache] scaling: expected {name!r} above 0 for rope_type {kind!r}, got {value!r}"
        )
    return float(value)


def _optional(scaling: dict[str, Any], kind: str, name: str, default: float) -> float:
    """A parameter that 0 and None leave at its default, as in HF transformers."""
    return _parameter(scaling, kind, name) if scaling.get(name) else default


def _inverse_frequencies(
    dim: int, max_position: int, theta: float, scaling: dict[str, Any]
) -> tuple[np.ndarray[Any, Any], float]:
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    one = np.float32(1.0)
    if kind == "default":
        return one / _powers(dim, theta), 1.0
    if kind == "linear":
        return one / _powers(dim, theta) / np.float32(_parameter(scaling, kind, "factor")), 1.0
    if kind == "dynamic":
        factor = _parameter(scaling, kind, "factor")
        trained = _optional(scaling, kind, "max_position_embeddings", max_position)
        trained = _optional(scaling, kind, "original_max_position_embeddings", trained)
        length = max(max_position, trained)
        if dim == 2:
            raise ValueError("[rope_cache] rotary_dim: expected 4 or more for rope_type 'dynamic', got 2")
        stretch = np.float32(factor * length) / np.float32(trained) - np.float32(factor - 1)
        power = np.float32(np.power(np.float64(stretch), dim / (dim - 2)))
        return one / _powers(dim, float(np.float32(theta) * power)), 1.0
    if kind == "yarn":
        return _yarn(dim, max_position, theta, scaling)
    if kind == "longrope":
        return _longrope(dim, max_position, theta, scaling)
    if kind == "llama3":
        return _llama3(dim, theta, scaling), 1.0
    raise ValueError(
        "[rope_cache] scaling: expected rope_type default, linear, dynamic, yarn, longrope or llama3, "
        f"got {kind!r}"
    )


def _factor(scaling: dict[str, Any], kind: str, max_position: int, original: float) -> float:
    if scaling.get("factor") is not None:
        return _parameter(scaling, kind, "factor")
    return _optional(scaling, kind, "max_position_embeddings", max_position) / original


def _yarn(
    dim: int, max_position: int, theta: float, scaling: dict[str, Any]
) -> tuple[np.ndarray[Any, Any], float]:
    if theta <= 1.0:
        raise ValueError(f"[rope_cache] theta: expected a number above 1 for rope_type 'yarn', got {theta}")
    original = _parameter(scaling, "yarn", "original_max_position_embeddings")
    factor = _factor(scaling, "yarn", max_position, original)

    def magnitude(scale: float, weight: float) -> float:
        return 1.0 if scale <= 1.0 else 0.1 * weight * math.log(scale) + 1.0

    if scaling.get("attention_factor") is not None:
        attention_factor = _parameter(scaling, "yarn", "attention_factor")
    else:
        mscale, mscale_all_dim = (
            _optional(scaling, "yarn", name, 0.0) for name in ("mscale", "mscale_all_dim")
        )
        if mscale and mscale_all_dim:
            attention_factor = magnitude(factor, mscale) / magnitude(factor, mscale_all_dim)
        else:
            attention_factor = magnitude(factor, 1.0)

    def dim_of(rotations: float) -> float:
        return (dim * math.log(original / (rotations * 2 * math.pi))) / (2 * math.log(theta))

    low = dim_of(_optional(scaling, "yarn", "beta_fast", 32))
    high = dim_of(_optional(scaling, "yarn", "beta_slow", 1))
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low), 0, 1)
    keep = np.float32(1.0) - ramp
    powers = _powers(dim, theta)
    extrapolated = np.float32(1.0) / powers
    interpolated = np.float32(1.0) / (np.float32(factor) * powers)
    return interpolated * (np.float32(1.0) - keep) + extrapolated * keep, attention_factor


def _longrope(
    dim: int, max_position: int, theta: float, scaling: dict[str, Any]
) -> tuple[np.ndarray[Any, Any], float]:
    original = _parameter(scaling, "longrope", "original_max_position_embeddings")
    factor = _factor(scaling, "longrope", max_position, original)
    if scaling.get("attention_factor") is not None:
        attention_factor = _parameter(scaling, "longrope", "attention_factor")
    elif factor <= 1.0:
        attention_factor = 1.0
    elif original > 1.0:
        attention_factor = math.sqrt(1 + math.log(factor) / math.log(original))
    else:
        raise ValueError(
            "[rope_cache] scaling: expected 'original_max_position_embeddings' above 1 for rope_type "
            f"'longrope' without 'attention_factor', got {original}"
        )
    which = "long_factor" if max_position > original else "short_factor"
    try:
        factors = np.asarray(scaling.get(which, []), dtype=np.float32)
    except (TypeError, ValueError):
        raise ValueError(
            f"[rope_cache] scaling: expected {which!r} with {dim // 2} numbers, got {scaling[which]!r}"
        ) from None
    if factors.shape != (dim // 2,):
        raise ValueError(
            f"[rope_cache] scaling: expected {which!r} with {dim // 2} numbers, got {factors.size}"
        )
    if not (factors > 0).all():
        raise ValueError(f"[rope_cache] scaling: expected {which!r} above 0, got {factors.min()}")
    return np.float32(1.0) / (factors * _powers(dim, theta)), attention_factor


def _llama3(dim: int, theta: float, scaling: dict[str, Any]) -> np.ndarray[Any, Any]:
    factor = _parameter(scaling, "llama3", "factor")
    low = _parameter(scaling, "llama3", "low_freq_factor")
    high = _parameter(scaling, "llama3", "high_freq_factor")
    original = _parameter(scaling, "llama3", "original_max_position_embeddings")
    if high <= low:
        raise ValueError(
            f"[rope_cache] scaling: expected high_freq_factor above low_freq_factor {low}, got {high}"
        )
    inv_freq = np.float32(1.0) / _powers(dim, theta)
    wavelength = np.float32(2 * math.pi) / inv_freq
    scaled = np.where(wavelength > original / low, inv_freq / np.float32(factor), inv_freq)
    smooth = (np.float32(original) / wavelength - np.float32(low)) / np.float32(high - low)
    blended = (np.float32(1.0) - smooth) * scaled / np.float32(factor) + smooth * scaled
    middle = (wavelength >= original / high) & (wavelength <= original / low)
    return np.where(middle, blended, scaled).astype(np.float32)
