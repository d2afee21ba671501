"""Tensors for the benchmarks, from whichever array library is here.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import abc
import importlib.util
from collections.abc import Sequence
from typing import Any

import numpy as np

from quire import _core
from quire._allocate import Array, numpy_dtype
from quire.bench import BenchError

__all__ = ["Arrays", "CupyArrays", "NumpyArrays", "TorchArrays", "available", "for_device"]

_TILE = 1 << 20  # numbers drawn; larger tensors repeat them


def available(module: str) -> bool:
    """Whether a module can be found, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _random(shape: Sequence[int], dtype: str, scale: float) -> np.ndarray[Any, Any]:
    """Normal numbers. bfloat16 and float8 come as arrays of ml_dtypes."""
    count = int(np.prod(shape))
    rng = np.random.default_rng(1)
    tile = rng.standard_normal(max(1, min(count, _TILE)), dtype=np.float32) * np.float32(scale)
    if dtype == "int8":
        tile = np.clip(np.rint(tile * 32), -127, 127)
    drawn = tile.astype(numpy_dtype(dtype))
    # resize() copies bytes, whatever the dtype.
    return np.resize(drawn.view(f"u{drawn.dtype.itemsize}"), tuple(shape)).view(drawn.dtype)


class Arrays(abc.ABC):
    """What the benchmarks ask of an array library."""

    name = ""
    device = "cpu"

    @abc.abstractmethod
    def random(self, shape: Sequence[int], dtype: str, scale: float = 1.0) -> Array:
        """Normal numbers times ``scale``."""

    @abc.abstractmethod
    def empty(self, shape: Sequence[int], dtype: str) -> Array:
        """Undefined contents."""

    @abc.abstractmethod
    def put(self, array: np.ndarray[Any, Any]) -> Array:
        """A copy of a NumPy array of plain dtype."""

    @abc.abstractmethod
    def as_torch(self, x: Array) -> Any:
        """The same memory as a torch tensor, for peers that are written for torch."""


class NumpyArrays(Arrays):
    """NumPy, with ml_dtypes for bfloat16 and float8."""

    name = "numpy"

    def random(self, shape: Sequence[int], dtype: str, scale: float = 1.0) -> Array:
        """Normal numbers times ``scale``."""
        return _random(shape, dtype, scale)

    def empty(self, shape: Sequence[int], dtype: str) -> Array:
        """Undefined contents, but with its pages in memory."""
        x = np.empty(tuple(shape), numpy_dtype(dtype))
        x.view(np.uint8)[...] = 0
        return x

    def put(self, array: np.ndarray[Any, Any]) -> Array:
        """A copy of a NumPy array."""
        return array.copy()

    def as_torch(self, x: Array) -> Any:
        """The same memory as a torch tensor."""
        import torch

        if x.dtype.name in ("bfloat16", "float8_e4m3fn", "float8_e5m2"):
            return torch.from_numpy(x.view(f"i{x.dtype.itemsize}")).view(getattr(torch, x.dtype.name))
        return torch.from_numpy(x)


class TorchArrays(Arrays):
    """torch on a GPU."""

    name = "torch"

    def __init__(self, device: str) -> None:
        """Raises BenchError where this torch has no such device."""
        import torch

        if not torch.cuda.is_available():
            raise BenchError("torch has no CUDA device here")
        self.device = device
        self._torch = torch

    def random(self, shape: Sequence[int], dtype: str, scale: float = 1.0) -> Array:
        """Normal numbers times ``scale``."""
        torch = self._torch
        count = int(np.prod(shape))
        tile = torch.from_numpy(_random((max(1, min(count, _TILE)),), "float32", scale)).to(self.device)
        if dtype == "int8":
            tile = (tile * 32).round().clamp(-127, 127)
        tile = tile.to(getattr(torch, dtype))
        bits = tile.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[tile.element_size()])
        whole = bits.repeat(-(-count // bits.numel()))[:count]
        return whole.view(tile.dtype).reshape(tuple(shape))

    def empty(self, shape: Sequence[int], dtype: str) -> Array:
        """Undefined contents."""
        return self._torch.empty(tuple(shape), dtype=getattr(self._torch, dtype), device=self.device)

    def put(self, array: np.ndarray[Any, Any]) -> Array:
        """A copy of a NumPy array on the device."""
        return self._torch.from_numpy(array).to(self.device)

    def as_torch(self, x: Array) -> Any:
        """The tensor itself."""
        return x


class CupyArrays(Arrays):
    """CuPy. Tensors of floats are quire's own, which come in every dtype, filled through CuPy."""

    name = "cupy"

    def __init__(self, device: str) -> None:
        """Raises BenchError where CuPy finds no GPU."""
        import cupy

        self.device = device
        self._cupy = cupy
        self._index = int(device.partition(":")[2] or 0)
        try:
            cupy.cuda.Device(self._index).use()
        except Exception as error:
            raise BenchError(f"CuPy has no device {device}: {error}") from None

    def _bytes_of(self, x: Any) -> Any:
        memory = self._cupy.cuda.UnownedMemory(x.data_ptr, x.nbytes, x, self._index)
        return self._cupy.ndarray((x.nbytes,), np.uint8, self._cupy.cuda.MemoryPointer(memory, 0))

    def random(self, shape: Sequence[int], dtype: str, scale: float = 1.0) -> Array:
        """Normal numbers times ``scale``."""
        x = _core.empty(tuple(shape), dtype, self.device)
        target = self._bytes_of(x)
        tile = self._cupy.asarray(_random((_TILE,), dtype, scale).view(np.uint8))
        for start in range(0, target.size, tile.size):
            part = target[start : start + tile.size]
            part[...] = tile[: part.size]
        return x

    def empty(self, shape: Sequence[int], dtype: str) -> Array:
        """Undefined contents."""
        return _core.empty(tuple(shape), dtype, self.device)

    def put(self, array: np.ndarray[Any, Any]) -> Array:
        """A copy of a NumPy array on the device."""
        return self._cupy.asarray(array)

    def as_torch(self, x: Array) -> Any:
        """The same memory as a torch tensor."""
        import torch.utils.dlpack

        return torch.utils.dlpack.from_dlpack(x)


def for_device(device: str) -> Arrays:
    """NumPy for "cpu"; for "cuda" torch if it is here, else CuPy. Raises BenchError where neither works."""
    if device == "cpu":
        return NumpyArrays()
    reasons = []
    for module, make in (("torch", TorchArrays), ("cupy", CupyArrays)):
        if not available(module):
            reasons.append(f"{module} is not installed")
            continue
        try:
            return make(device)
        except (BenchError, ImportError, OSError) as error:
            reasons.append(str(error))
    raise BenchError(f"--device {device} needs torch or CuPy: {'; '.join(reasons)}")
