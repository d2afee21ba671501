"""Allocates outputs in the caller's own framework.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from quire import _core

#: Any tensor with ``__dlpack__``: NumPy, CuPy, PyTorch, JAX, quire.Tensor, ...
Array = Any

#: Bytes of an element, by the dtype's name.
ITEM_BYTES = {
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "int8": 1,
    "uint8": 1,
    "int32": 4,
    "int64": 8,
    "bool": 1,
}


def framework_of(x: Array) -> str:
    """The root module of a tensor's type: "numpy", "torch", "cupy", "jax", "jaxlib", "quire", ..."""
    return type(x).__module__.partition(".")[0]


@functools.lru_cache(maxsize=256)
def _known_name(dtype: object) -> str:
    return _core.dtype_name(dtype)


def dtype_name(dtype: object) -> str:
    """The name of a dtype of any framework; what is no dtype of ours comes back as text, for an error message."""
    if dtype is None:
        return "None"
    try:
        return _known_name(dtype)
    except TypeError:  # also for what cannot be a key
        try:
            return _core.dtype_name(dtype)
        except TypeError:
            return str(dtype)


@functools.cache
def numpy_dtype(name: str) -> np.dtype[Any]:
    """NumPy's dtype of a name; bfloat16 and float8 come from ml_dtypes."""
    if name in ("bfloat16", "float8_e4m3fn", "float8_e5m2"):
        import ml_dtypes

        extended: np.dtype[Any] = np.dtype(getattr(ml_dtypes, name))
        return extended
    return np.dtype(name)


#: Types of tensors for which shape_of has nothing to ask.
_CHECKED: set[type] = set()


def shape_of(op: str, arg: str, x: Array) -> tuple[int, ...]:
    """The shape of an argument that an output is made like.

    Raises:
        TypeError: It is no tensor, a masked array, or a JAX tracer.
        ValueError: It is a JAX array that is deleted, or on more than one device.
    """
    if type(x) in _CHECKED:
        return tuple(x.shape)
    if framework_of(x) in ("jax", "jaxlib"):
        _check_jax(op, arg, x)
    if isinstance(x, np.ma.MaskedArray):
        raise TypeError(
            f"[{op}] {arg}: expected a tensor without a mask, got {type(x).__qualname__}; call .filled() first"
        )
    shape = getattr(x, "shape", None)
    if shape is None or not hasattr(x, "__dlpack__"):
        raise TypeError(
            f"[{op}] {arg}: expected a tensor (any object with __dlpack__), got {type(x).__qualname__}"
        )
    if framework_of(x) in ("numpy", "torch", "cupy", "quire"):
        _CHECKED.add(type(x))
    return tuple(shape)


def _check_jax(op: str, arg: str, x: Array) -> None:
    jax = sys.modules["jax"]
    if isinstance(x, jax.core.Tracer):
        raise TypeError(
            f"[{op}] {arg}: expected a JAX array with data, got a tracer; inside jax.jit and other "
            f"transformations use quire.jax.{op}"
        )
    if not isinstance(x, jax.Array):
        return
    if x.is_deleted():
        raise ValueError(f"[{op}] {arg}: expected a JAX array with data, got a deleted or donated one")
    if len(x.sharding.device_set) > 1:
        raise ValueError(
            f"[{op}] {arg}: expected a JAX array on one device, got one sharded over "
            f"{len(x.sharding.device_set)}"
        )


def empty(like: Array, shape: Sequence[int], dtype: str | None = None) -> Array:
    """A new tensor with undefined contents, of the framework and on the device of ``like``.

    Args:
        like: The tensor whose framework, device and (unless ``dtype`` is given) dtype are used.
        shape: The extents.
        dtype: A dtype name such as "float32", or None.

    Raises:
        TypeError: ``like`` belongs to no framework that quire can allocate in; pass ``out=``.
    """
    torch = sys.modules.get("torch")
    if torch is not None and type(like) is torch.Tensor:
        return like.new_empty(shape) if dtype is None else like.new_empty(shape, dtype=getattr(torch, dtype))
    shape = tuple(int(n) for n in shape)
    if isinstance(like, np.ndarray):  # a subclass, such as np.memmap, gives a plain array
        return np.empty(shape, like.dtype if dtype is None else numpy_dtype(dtype))
    framework = framework_of(like)
    if torch is not None and isinstance(like, torch.Tensor):
        return torch.empty(
            shape, dtype=like.dtype if dtype is None else getattr(torch, dtype), device=like.device
        )
    if framework == "cupy":
        cupy = sys.modules["cupy"]
        with like.device:
            return cupy.empty(shape, like.dtype if dtype is None else numpy_dtype(dtype))
    if framework == "quire":
        return _core.empty(shape, like.dtype if dtype is None else dtype, like.device)
    if framework in ("jax", "jaxlib"):
        # JAX arrays cannot be written. The result is written to memory of ours, which finish() hands to JAX.
        return _core.empty(shape, str(like.dtype) if dtype is None else dtype, device_of(like))
    raise _unknown_framework(like)


def _unknown_framework(like: Array) -> TypeError:
    return TypeError(
        f"[empty] like: expected a NumPy, CuPy, PyTorch, JAX or quire tensor to allocate an output for, got "
        f"{type(like).__module__}.{type(like).__qualname__}; pass out="
    )


def device_of(x: Array) -> str:
    """ "cpu" or "cuda:<index>"."""
    kind, index = x.__dlpack_device__()
    return f"cuda:{index}" if int(kind) in (2, 13) else "cpu"  # kDLCUDA, kDLCUDAManaged


def finish(out: Array, like: Array, op: str = "finish") -> Array:
    """Turns what empty() gave for ``like`` into a tensor of its framework, now that it is written.

    Args:
        out: What empty() gave.
        like: As for empty().
        op: Whose result it is, where it may be of float8, which not every JAX takes.

    Raises:
        TypeError: It is of float8, and this JAX does not take it.
    """
    if type(out) is _core.Tensor and framework_of(like) in ("jax", "jaxlib"):
        jax = sys.modules["jax"]
        _core.hand_over(out)
        try:
            result = jax.dlpack.from_dlpack(out)
        except jax.errors.JaxRuntimeError as e:
            if not out.dtype.startswith("float8"):
                raise
            raise TypeError(
                f"[{op}] out: expected a dtype that JAX {jax.__version__} takes through DLPack, got {out.dtype}: {e}"
            ) from e
        # DLPack knows one CPU, JAX may have several.
        return result if result.device == like.device else jax.device_put(result, like.device)
    return out


def from_numpy(array: np.ndarray[Any, Any], like: Array) -> Array:
    """A copy of a NumPy array in the framework and on the device of ``like``.

    Raises:
        TypeError: ``like`` belongs to no framework that quire can allocate in.
    """
    if isinstance(like, np.ndarray):
        return array.copy()
    framework = framework_of(like)
    if "torch" in sys.modules and isinstance(like, sys.modules["torch"].Tensor):
        torch = sys.modules["torch"]
        # torch does not know ml_dtypes: the table travels as float32, which holds every narrower float.
        return torch.from_numpy(array.astype(np.float32)).to(getattr(torch, array.dtype.name)).to(like.device)
    if framework == "cupy":
        with like.device:
            return sys.modules["cupy"].asarray(array)
    if framework in ("jax", "jaxlib"):
        return sys.modules["jax"].device_put(array, like.device)
    if framework == "quire":
        # As one block, because that op copies from the host to any device.
        block = _core.empty((1, *array.shape), array.dtype.name, like.device)
        _core.swap_blocks(block, array[None], np.zeros((1, 2), np.int64), None)
        _core.synchronize(
            "from_numpy", "array", block, None
        )  # nothing of its own orders another stream behind the copy
        return block[0]
    raise _unknown_framework(like)
