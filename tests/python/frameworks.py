"""The array libraries that the tests run through, behind one small interface.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import importlib.util
from typing import Any

import ml_dtypes
import numpy as np
import pytest

Array = Any


def np_dtype(name: str) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, name)) if hasattr(ml_dtypes, name) else np.dtype(name)


def as_float64(array: np.ndarray) -> np.ndarray:
    """Exact for every dtype that the library takes."""
    return (
        array.astype(np.float32).astype(np.float64) if array.dtype.itemsize <= 4 else array.astype(np.float64)
    )


class Framework:
    """Makes tensors from NumPy arrays and gives them back."""

    writable = True

    def __init__(self, name: str, device: str) -> None:
        self.name, self.device = name, device

    def __repr__(self) -> str:
        return f"{self.name}-{self.device}"

    def array(self, x: np.ndarray) -> Array:
        return x.copy()

    def numpy(self, x: Array) -> np.ndarray:
        return np.asarray(x)

    def strided(self, x: np.ndarray, pad: int) -> Array:
        """x as a view whose last-but-one dimension has a pitch of size + pad; the padding is NaN (or the largest integer)."""
        wide = np.empty((*x.shape[:-1], x.shape[-1] + pad), x.dtype)
        wide.view(np.uint8)[...] = 0xFF
        wide[..., : x.shape[-1]] = x
        return self.array(wide)[..., : x.shape[-1]]

    def synchronize(self) -> None:
        pass


class Torch(Framework):
    def __init__(self, device: str) -> None:
        super().__init__("torch", device)
        import torch

        self.torch = torch

    def array(self, x: np.ndarray) -> Array:
        torch = self.torch
        x = np.ascontiguousarray(x)
        if x.dtype.name in ("bfloat16", "float8_e4m3fn", "float8_e5m2"):
            bits = torch.from_numpy(x.view(np.int16 if x.itemsize == 2 else np.uint8).copy())
            return bits.view(getattr(torch, x.dtype.name)).to(self.device)
        return torch.from_numpy(x.copy()).to(self.device)

    def numpy(self, x: Array) -> np.ndarray:
        torch = self.torch
        x = x.detach().cpu().contiguous()
        name = str(x.dtype).removeprefix("torch.")
        if name in ("bfloat16", "float8_e4m3fn", "float8_e5m2"):
            bits = x.view(torch.int16 if x.element_size() == 2 else torch.uint8).numpy()
            return bits.view(np_dtype(name))
        return x.numpy()

    def synchronize(self) -> None:
        if self.device != "cpu":
            self.torch.cuda.synchronize()


class CuPy(Framework):
    def __init__(self) -> None:
        super().__init__("cupy", "cuda:0")
        import cupy

        self.cupy = cupy

    def array(self, x: np.ndarray) -> Array:
        if x.dtype.name.startswith("float8"):
            pytest.skip("cupy on cuda: CuPy has no float8 dtypes")
        return self.cupy.asarray(x)

    def numpy(self, x: Array) -> np.ndarray:
        return self.cupy.asnumpy(x)

    def synchronize(self) -> None:
        self.cupy.cuda.Device().synchronize()


class Jax(Framework):
    writable = False

    def __init__(self, device: str) -> None:
        super().__init__("jax", device)
        import jax

        self.jax = jax
        self.jax_device = jax.devices("cpu" if device == "cpu" else "cuda")[0]

    def array(self, x: np.ndarray) -> Array:
        with self.jax.enable_x64(True):
            return self.jax.device_put(x, self.jax_device)

    def strided(self, x: np.ndarray, pad: int) -> Array:
        return self.array(x)  # a JAX array has no strides of its own

    def numpy(self, x: Array) -> np.ndarray:
        return np.asarray(x)


def has_module(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def has_gpu() -> bool:
    import quire

    return quire.has_cuda() and quire.num_cuda_devices() > 0


def make(name: str, device: str) -> Framework | str:
    """The framework, or why it is not there."""
    if device != "cpu" and not has_gpu():
        return "no CUDA device, or a CPU-only build"
    if name != "numpy" and not has_module(name):
        return f"{name} is not installed"
    try:
        if name == "torch":
            framework: Framework = Torch(device)
            if device != "cpu" and not framework.torch.cuda.is_available():
                return "this torch has no CUDA"
            return framework
        if name == "cupy":
            return CuPy()
        if name == "jax":
            return Jax(device)
    except (ImportError, RuntimeError) as error:
        return f"{name}: {error}"
    return Framework(name, device)


#: Every way a tensor can come in, CPU first.
ALL = [
    ("numpy", "cpu"),
    ("torch", "cpu"),
    ("jax", "cpu"),
    ("torch", "cuda:0"),
    ("cupy", "cuda:0"),
    ("jax", "cuda:0"),
]
#: One way for each backend, for the large grids.
BACKENDS = [("numpy", "cpu"), ("torch", "cuda:0")]
