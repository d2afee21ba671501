"""Allocates outputs and workspace in the caller's own framework.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from quire import _core

#: Any tensor with ``__dlpack__``: NumPy, CuPy, PyTorch, JAX, quire.Tensor, ...
Array = Any

_workspaces: dict[tuple[str, int], list[_core.Tensor]] = {}


def framework_of(x: Array) -> str:
    """The root module of a tensor's type: "numpy", "torch", "cupy", "jax", "jaxlib", "quire", ..."""
    return type(x).__module__.partition(".")[0]


def _numpy_dtype(name: str) -> Any:
    if name in ("bfloat16", "float8_e4m3fn", "float8_e5m2"):
        import ml_dtypes

        return getattr(ml_dtypes, name)
    return np.dtype(name)


def empty(like: Array, shape: Sequence[int], dtype: str | None = None) -> Array:
    """A new tensor with undefined contents, of the framework and on the device of ``like``.

    Args:
        like: The tensor whose framework, device and (unless ``dtype`` is given) dtype are used.
        shape: The extents.
        dtype: A dtype name such as "float32", or None.

    Raises:
        TypeError: ``like`` belongs to no framework that quire can allocate in; pass ``out=``.
    """
    shape = tuple(int(n) for n in shape)
    if type(like) is np.ndarray:
        return np.empty(shape, like.dtype if dtype is None else _numpy_dtype(dtype))
    framework = framework_of(like)
    if "torch" in sys.modules and isinstance(like, sys.modules["torch"].Tensor):
        torch = sys.modules["torch"]
        return torch.empty(shape, dtype=like.dtype if dtype is None else getattr(torch, dtype), device=like.device)
    if framework == "cupy":
        cupy = sys.modules["cupy"]
        with like.device:
            return cupy.empty(shape, like.dtype if dtype is None else _numpy_dtype(dtype))
    if framework == "quire":
        return _core.empty(shape, like.dtype if dtype is None else dtype, like.device)
    if framework in ("jax", "jaxlib"):
        # JAX arrays cannot be written. The result is written to memory of ours, which finish() hands to JAX.
        return _core.empty(shape, str(like.dtype) if dtype is None else dtype, _jax_device(like))
    raise TypeError(
        f"[empty] like: expected a NumPy, CuPy, PyTorch, JAX or quire tensor to allocate an output for, got "
        f"{type(like).__module__}.{type(like).__qualname__}; pass out="
    )


def _jax_device(x: Array) -> str:
    kind, index = x.__dlpack_device__()
    return f"cuda:{index}" if int(kind) == 2 else "cpu"


def finish(out: Array, like: Array) -> Array:
    """Turns what empty() gave for ``like`` into a tensor of its framework, now that it is written."""
    if isinstance(out, _core.Tensor) and framework_of(like) in ("jax", "jaxlib"):
        return sys.modules["jax"].dlpack.from_dlpack(out)
    return out


def workspace(num_bytes: int, device: str, stream: object) -> _core.Tensor | None:
    """A grow-only workspace, one per device and stream. None for zero bytes.

    Older, smaller workspaces are kept: a captured CUDA graph may still use them. Sizes at least double, so all of them together
    take less than twice the newest.
    """
    if num_bytes == 0:
        return None
    key = (device, _core.stream_key(stream))
    kept = _workspaces.setdefault(key, [])
    if not kept or kept[-1].nbytes < num_bytes:
        size = max(num_bytes, 2 * kept[-1].nbytes if kept else 1 << 20)
        kept.append(_core.empty((size,), "uint8", device))
    return kept[-1]
