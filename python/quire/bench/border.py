"""Benchmarks of the border: what handing tensors to quire costs, and a whole call of a tiny op.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

import quire
from quire import _core
from quire._allocate import Array, from_numpy
from quire.bench.arrays import available
from quire.bench.harness import Case, Context, Run, Target, Work
from quire.bench.peers import peers_of

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


#: µs of a call with tensors of a library, its result written into one that is there, on a GPU's host.
_CUDA_TARGETS = {("rms_norm", "torch"): 1.5, ("paged_attention", "torch"): 2.5, ("rms_norm", "CuPy"): 3.0}


def _target(context: Context, op: str, library: str) -> Target | None:
    if context.is_cuda:
        limit = _CUDA_TARGETS.get((op, library))
    else:
        limit = 2.0 if op == "rms_norm" and library != "quire" else None
    return None if limit is None else Target(max_us=limit)


def cases(context: Context) -> Iterator[Case]:
    """Six tensors imported and dropped; small calls of two ops, also under jax.jit. Host time, also on a GPU."""
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
            target=_target(context, "rms_norm", library),
            timer="host",
            op="rms_norm",
        )
    for library, make in _makers(context).items():
        yield Case(
            name=f"paged_attention over one key, {library}, into out=",
            prepare=partial(_paged_attention, context, library, make),
            target=_target(context, "paged_attention", library),
            timer="host",
            op="paged_attention",
        )
    if available("jax"):
        for op in ("rms_norm", "paged_attention"):
            yield Case(
                name=f"{op} under jax.jit",
                prepare=partial(_jax, context, op),
                timer="host",
                op=op,
                unranked=("JAX, empty",),
            )


def _import(make: Make, dtype: str) -> Work:
    tensors = [make((4, 64), dtype) for _ in range(6)]
    return Work(partial(_core.import_tensors, *tensors))


def _rms_norm(context: Context, library: str, make: Make) -> Work:
    x, weight, out = make((1, 64), "float32"), make((64,), "float32"), make((1, 64), "float32")
    peers: dict[str, Run] = {}
    if library == "torch":
        peers = peers_of(context, "rms_norm", out=out, x=x, weight=weight, eps=1e-6)
    elif context.use_peers and library == "NumPy":

        def numpy_rms_norm() -> Any:
            return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-6) * weight

        peers["NumPy"] = numpy_rms_norm
    return Work(partial(quire.rms_norm, x, weight, out=out), peers)


def _indices(context: Context, library: str) -> list[Array]:
    """block_tables and seq_lens of one sequence with one key."""
    arrays: list[Array] = [np.zeros((1, 1), np.int32), np.ones(1, np.int32)]
    if library == "torch":
        import torch

        return [torch.from_numpy(a).to(context.device) for a in arrays]
    if library == "CuPy":
        import cupy

        return [cupy.asarray(a) for a in arrays]
    if library == "quire":
        like = _core.empty((1,), "int32", context.device)
        return [from_numpy(a, like) for a in arrays]
    return arrays


def _paged_attention(context: Context, library: str, make: Make) -> Work:
    dtype = "float16" if context.is_cuda else "float32"
    q, out = make((1, 4, 64), dtype), make((1, 4, 64), dtype)
    k_cache, v_cache = make((1, 16, 2, 64), dtype), make((1, 16, 2, 64), dtype)
    tables, lens = _indices(context, library)
    return Work(partial(quire.paged_attention, q, k_cache, v_cache, tables, lens, out=out))


def _jax(context: Context, op: str) -> Work:
    """Beside a jitted function of as many arrays that does as good as nothing: what is left is the call into the library."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax

    import quire.jax

    device = jax.devices("cuda" if context.is_cuda else "cpu")[0]

    def put(*shapes: tuple[int, ...]) -> list[Any]:
        return [jax.device_put(np.ones(shape, np.float32), device) for shape in shapes]

    if op == "rms_norm":
        operands = put((1, 64), (64,))
        ours = jax.jit(lambda x, w: quire.jax.rms_norm(x, w))
    else:
        indices = [jax.device_put(a, device) for a in (np.zeros((1, 1), np.int32), np.ones(1, np.int32))]
        operands = [*put((1, 4, 64), (1, 16, 2, 64), (1, 16, 2, 64)), *indices]
        ours = jax.jit(lambda q, k, v, t, n: quire.jax.paged_attention(q, k, v, t, n))
    empty = jax.jit(lambda x, *rest: 2 * x, keep_unused=True)
    return Work(partial(ours, *operands), {"JAX, empty": partial(empty, *operands)})
