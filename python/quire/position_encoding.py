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
from quire._allocate import Array, from_numpy, numpy_dtype, shape_of

__all__ = ["rope_cache", "rotary_embedding"]


def rotary_embedding(
    positions: Array,
    q: Array,
    k: Array | None,
    cos_sin_cache: Array,
    *,
    style: Literal["neox", "gptj"] = "neox",
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
    if not isinstance(theta, numbers.Real):
        raise TypeError(f"[rope_cache] theta: expected a number, got {type(theta).__qualname__}")
    theta = float(theta)
    if not 0.0 < theta < math.inf:
        raise ValueError(f"[rope_cache] theta: expected a finite number above 0, got {theta}")
    if scaling is not None and not isinstance(scaling, Mapping):
        raise TypeError(f"[rope_cache] scaling: expected a mapping or None, got {type(scaling).__qualname__}")
    name = _core.dtype_name(dtype) if dtype is not None else "None"
    if name not in ("float32", "float16", "bfloat16"):
        raise TypeError(f"[rope_cache] dtype: expected float32, float16 or bfloat16, got {name}")
    if like is not None:
        shape_of("rope_cache", "like", like)
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        inv_freq, attention_factor = _inverse_frequencies(dim, max_position, theta, dict(scaling or {}))
    if not (np.isfinite(inv_freq).all() and math.isfinite(attention_factor)):
        raise ValueError("[rope_cache] scaling: expected parameters that give finite frequencies, got infinity")
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


def _powers(dim: int, base: float) -> np.ndarray[Any, Any]:
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    # The base is a float32 too; its power is rounded once.
    return np.power(np.float64(np.float32(base)), exponents.astype(np.float64)).astype(np.float32)


def _parameter(scaling: dict[str, Any], kind: str, name: str) -> float:
    value = scaling.get(name)
    if (
        not isinstance(value, (int, float))
        or isinstance(value, bool)
        or not math.isfinite(value)
        or value <= 0
    ):
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
