"""Benchmarks of the border: what handing tensors to quire costs, and a whole call of a tiny op.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

import quire
from quire import _core
from quire._allocate import Array
from quire.bench.arrays import available
from quire.bench.harness import Case, Context, Run, Target, Work

__all__ = ["cases"]

Make = Callable[[tuple[int, ...], str], Array]


def _makers(context: Context) -> dict[str, Make]:
    """How each library that is here makes a tensor on the device."""
    makers: dict[str, Make] = {}
    device = context.device
    if not context.is_cuda:
        makers["NumPy"] = lambda shape, dtype: context.arrays.random(shape, dtype)
    if available("torch"):
        import torch

        makers["torch"] = lambda shape, dtype: torch.ones(shape, dtype=getattr(torch, dtype), device=device)
    if context.is_cuda and available("cupy"):
        import cupy

        makers["CuPy"] = lambda shape, dtype: cupy.ones(shape, dtype)
    makers["quire"] = lambda shape, dtype: _core.empty(shape, dtype, device)
    return makers


def cases(context: Context) -> Iterator[Case]:
    """Six tensors imported and dropped; rms_norm on one row of 64 numbers, also under jax.jit. Host time, also on a GPU."""
    import_target = {"torch": 0.7, "NumPy": 1.0}
    for library, make in _makers(context).items():
        for dtype in ("float32",) if library == "CuPy" else ("float32", "bfloat16"):
            limit = import_target.get(library) if dtype == "float32" else None
            yield Case(
                name=f"import six {library} tensors, {dtype}",
                prepare=partial(_import, make, dtype),
                target=None if limit is None or context.is_cuda else Target(max_us=limit),
                timer="host",
                op="import",
            )
    for library, make in _makers(context).items():
        yield Case(
            name=f"rms_norm of 64 {library} numbers into out=",
            prepare=partial(_rms_norm, context, library, make),
            target=None if context.is_cuda or library == "quire" else Target(max_us=2.0),
            timer="host",
            op="rms_norm",
        )
    if available("jax"):
        yield Case(
            name="rms_norm of 64 JAX numbers under jax.jit",
            prepare=partial(_jax_rms_norm, context),
            timer="host",
            op="rms_norm",
        )


def _import(make: Make, dtype: str) -> Work:
    tensors = [make((4, 64), dtype) for _ in range(6)]
    return Work(partial(_core.import_tensors, *tensors))


def _rms_norm(context: Context, library: str, make: Make) -> Work:
    x, weight, out = make((1, 64), "float32"), make((64,), "float32"), make((1, 64), "float32")
    peers: dict[str, Run] = {}
    if context.use_peers and library == "torch":
        from torch.nn.functional import rms_norm

        peers["torch"] = lambda: rms_norm(x, (64,), weight, 1e-6)
    elif context.use_peers and library == "NumPy":

        def numpy_rms_norm() -> Any:
            return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-6) * weight

        peers["NumPy"] = numpy_rms_norm
    return Work(partial(quire.rms_norm, x, weight, out=out), peers)


def _jax_rms_norm(context: Context) -> Work:
    """Beside a jitted op of the same arity: what is left is the price of the call into the library."""
    import jax

    import quire.jax

    device = jax.devices("cuda" if context.is_cuda else "cpu")[0]
    x, weight = (jax.device_put(np.ones(shape, np.float32), device) for shape in ((1, 64), (64,)))
    ours, product = jax.jit(lambda x, w: quire.jax.rms_norm(x, w)), jax.jit(lambda x, w: x * w)
    return Work(partial(ours, x, weight), {"JAX product": partial(product, x, weight)})
