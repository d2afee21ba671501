"""The steps of the ladder: one attention without a mask, computed in ever better ways, each checked against float64.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

import quire
from quire.bench.harness import Work

__all__ = ["CPU_STEPS", "GPU_STEPS", "Gpu", "Problem", "asked_bytes"]

Floats = np.ndarray[Any, np.dtype[Any]]

# ‖out − reference‖ / ‖reference‖. The steps with 16-bit weights or output round each number to 2^-11.
_TOLERANCE_32, _TOLERANCE_16 = 1e-5, 2e-3
_TILE = 16  # kTile in kernels.cu
_QUERIES = 64  # kQueries there
_ROWS_PER_CTA = 8  # of the softmax kernel
_ASKED = "asked of memory, GB"  # by asked_bytes()


@dataclass(frozen=True)
class Problem:
    """The one shape, its inputs and its result in float64."""

    num_tokens: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    sample_rows: int  # queries of each of the first KV head's query heads, for the Python loop

    @property
    def scale(self) -> float:
        """Of the scores."""
        return 1.0 / math.sqrt(self.head_dim)

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def num_flops(self) -> float:
        """Two products of ``num_tokens`` x ``num_tokens`` x ``head_dim`` for each head."""
        return 4.0 * self.num_tokens**2 * self.num_heads * self.head_dim

    @cached_property
    def inputs(self) -> tuple[Floats, Floats, Floats]:
        """q, k and v ``[num_tokens, heads, head_dim]``, float16."""
        rng = np.random.default_rng(7)

        def draw(num_heads: int) -> Floats:
            shape = (self.num_tokens, num_heads, self.head_dim)
            return rng.standard_normal(shape, dtype=np.float32).astype(np.float16)

        return draw(self.num_heads), draw(self.num_kv_heads), draw(self.num_kv_heads)

    @cached_property
    def reference(self) -> Floats:
        """The output, float64."""
        q, k, v = (_by_head(x, np.float64) for x in self.inputs)
        out = np.empty_like(q)
        for head in range(self.num_heads):
            _attend(q[head], k[head // self.group], v[head // self.group], self.scale, out[head])
        return out.transpose(1, 0, 2)

    @cached_property
    def sample(self) -> list[tuple[int, int]]:
        """(query, head) of the rows that the Python loop computes."""
        queries = np.linspace(0, self.num_tokens - 1, self.sample_rows).astype(int).tolist()
        return [(query, head) for head in range(self.group) for query in queries]

    def error(self, out: Floats, rows: list[tuple[int, int]] | None = None) -> float:
        """‖out − reference‖ / ‖reference‖, of all rows or of some."""
        reference = self.reference if rows is None else np.stack([self.reference[row] for row in rows])
        return float(np.linalg.norm(out.astype(np.float64) - reference) / np.linalg.norm(reference))


def _by_head(x: Floats, dtype: type) -> Floats:
    return np.ascontiguousarray(x.transpose(1, 0, 2), dtype=dtype)


def _attend(q: Floats, k: Floats, v: Floats, scale: float, out: Floats) -> None:
    """One head in whole-array operations."""
    scores = q @ k.T
    scores *= scale
    scores -= scores.max(axis=1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=1, keepdims=True)
    np.matmul(scores, v, out=out)


def _checked(error: float, tolerance: float, **facts: float | str) -> dict[str, float | str]:
    """The facts and the error; raises where that is too large to be rounding."""
    if not error <= tolerance:
        raise AssertionError(f"the result is off by {error:.3g} of its norm; expected at most {tolerance:g}")
    return {**facts, "error": f"{error:.1e}"}


# ---- On the CPU --------------------------------------------------------------------------------


def _python_loop(problem: Problem) -> Work:
    """Plain Python over lists, for a sample of the rows."""
    q, k, v = problem.inputs
    queries = [q[row].astype(float).tolist() for row in problem.sample]
    keys, values = (x[:, 0].astype(float).tolist() for x in (k, v))
    scale = problem.scale

    def run() -> list[list[float]]:
        out = []
        for query in queries:
            scores = []
            for key in keys:
                score = 0.0
                for a, b in zip(query, key):
                    score += a * b
                scores.append(score * scale)
            largest = max(scores)
            weights = [math.exp(score - largest) for score in scores]
            total = sum(weights)
            row = [0.0] * len(query)
            for weight, value in zip(weights, values):
                for d, x in enumerate(value):
                    row[d] += weight * x
            out.append([x / total for x in row])
        return out

    error = problem.error(np.array(run()), problem.sample)
    rows = problem.num_tokens * problem.num_heads
    return Work(run, facts=_checked(error, _TOLERANCE_32, note=f"timed on {len(queries)} of {rows} rows"))


def _numpy(problem: Problem) -> Work:
    q, k, v = (_by_head(x, np.float32) for x in problem.inputs)
    out = np.empty_like(q)

    def run() -> None:
        for head in range(problem.num_heads):
            _attend(q[head], k[head // problem.group], v[head // problem.group], problem.scale, out[head])

    run()
    return Work(run, facts=_checked(problem.error(out.transpose(1, 0, 2)), _TOLERANCE_32))


def _quire_on_cpu(problem: Problem) -> Work:
    q, k, v = (x.astype(np.float32) for x in problem.inputs)
    out = np.empty_like(q)
    run = partial(quire.attention, q, k, v, causal=False, out=out)
    run()
    return Work(run, facts=_checked(problem.error(out), _TOLERANCE_32))


#: name -> (what makes it, whether it is a sample of the rows)
CPU_STEPS: dict[str, tuple[Callable[[Problem], Work], bool]] = {
    "Python loop": (_python_loop, True),
    "NumPy": (_numpy, False),
    "quire on the CPU": (_quire_on_cpu, False),
}


# ---- On the GPU --------------------------------------------------------------------------------


class Gpu:
    """The inputs on a device, through CuPy, and the compiled kernels. Launches go to CuPy's current stream."""

    def __init__(self, problem: Problem, device: str) -> None:
        """Compiles; raises what CuPy raises."""
        import cupy

        self.cupy: Any = cupy
        self.problem = problem
        cupy.cuda.Device(int(device.partition(":")[2] or 0)).use()
        source = Path(__file__).with_name("kernels.cu").read_text(encoding="utf-8")
        options = ("-std=c++17", f"-DHEAD_DIM={problem.head_dim}")
        self._module = cupy.RawModule(code=source, options=options, backend="nvrtc")
        self._module.get_function("ladder_softmax_kernel")  # compiles here, and not at the first launch
        self.q, self.k, self.v = (cupy.asarray(x) for x in problem.inputs)
        self.out = cupy.empty_like(self.q)
        self._counts = tuple(
            np.int32(x) for x in (problem.num_tokens, problem.num_heads, problem.num_kv_heads)
        )

    def launch(self, name: str, grid: tuple[int, ...], block: tuple[int, ...], *arguments: object) -> None:
        """One kernel of kernels.cu, with the shape after its tensors and scalars last."""
        arrays = [x for x in arguments if isinstance(x, self.cupy.ndarray)]
        scalars = [x for x in arguments if not isinstance(x, self.cupy.ndarray)]
        self._module.get_function(f"ladder_{name}_kernel")(grid, block, (*arrays, *self._counts, *scalars))

    def softmax(self, scores: Any) -> None:
        """The softmax of each row, in place."""
        rows = scores.shape[0] * scores.shape[1]
        kernel = self._module.get_function("ladder_softmax_kernel")
        arguments = (scores, np.int64(rows), np.int32(scores.shape[2]))
        kernel((-(-rows // _ROWS_PER_CTA),), (32 * _ROWS_PER_CTA,), arguments)

    def work(self, run: Callable[[], object], asked_bytes: float) -> Work:
        """Runs once and checks the output."""
        self.out.fill(0)
        run()
        error = self.problem.error(self.out.get())
        return Work(run, facts={_ASKED: asked_bytes / 1e9, **_checked(error, _TOLERANCE_16)})


def _three_kernels(gpu: Gpu, kind: str) -> Work:
    p, scale = gpu.problem, np.float32(gpu.problem.scale)
    scores = gpu.cupy.empty((p.num_heads, p.num_tokens, p.num_tokens), "f4")
    tiles, columns, block = -(-p.num_tokens // _TILE), p.head_dim // _TILE, (_TILE, _TILE)

    def run() -> None:
        gpu.launch(f"scores_{kind}", (tiles, tiles, p.num_heads), block, scores, gpu.q, gpu.k, scale)
        gpu.softmax(scores)
        gpu.launch(f"output_{kind}", (columns, tiles, p.num_heads), block, gpu.out, scores, gpu.v)

    return gpu.work(run, asked_bytes(p, kind))


def _online(gpu: Gpu) -> Work:
    p, scale = gpu.problem, np.float32(gpu.problem.scale)
    grid = (-(-p.num_tokens // _TILE), p.num_heads)
    run = partial(gpu.launch, "online", grid, (_TILE, _TILE), gpu.out, gpu.q, gpu.k, gpu.v, scale)
    return gpu.work(run, asked_bytes(p, "online"))


def _tensor_cores(gpu: Gpu) -> Work:
    p, scale = gpu.problem, np.float32(gpu.problem.scale)
    grid = (-(-p.num_tokens // _QUERIES), p.num_heads)
    run = partial(gpu.launch, "tensor_core", grid, (128,), gpu.out, gpu.q, gpu.k, gpu.v, scale)
    return gpu.work(run, asked_bytes(p, "tensor_core"))


def _standard(gpu: Gpu) -> Work:
    """Scores, softmax and output as three calls of PyTorch, the products by cuBLAS on the tensor cores, scores in float16."""
    import torch
    import torch.utils.dlpack

    p = gpu.problem
    q, k, v, out = (torch.utils.dlpack.from_dlpack(x) for x in (gpu.q, gpu.k, gpu.v, gpu.out))

    def by_kv_head(x: Any) -> Any:
        """``[num_kv_heads, group * num_tokens, head_dim]`` of q, ``[num_kv_heads, num_tokens, head_dim]`` of k and v."""
        return x.transpose(0, 1).reshape(p.num_kv_heads, -1, p.head_dim)

    queries, keys, values = by_kv_head(q), by_kv_head(k).transpose(1, 2), by_kv_head(v)
    scores = queries.new_empty(p.num_kv_heads, queries.shape[1], p.num_tokens)
    weights, result = torch.empty_like(scores), torch.empty_like(queries)

    def run() -> None:
        torch.baddbmm(scores, queries, keys, beta=0, alpha=p.scale, out=scores)
        torch.softmax(scores, -1, out=weights)
        torch.bmm(weights, values, out=result)

    run()
    out.copy_(result.view(p.num_heads, p.num_tokens, p.head_dim).transpose(0, 1))
    return Work(run, facts=_checked(p.error(gpu.out.get()), _TOLERANCE_16))


def _final(gpu: Gpu) -> Work:
    run = partial(quire.attention, gpu.q, gpu.k, gpu.v, causal=False, out=gpu.out)
    work = gpu.work(run, asked_bytes(gpu.problem, "once"))
    return Work(run, facts={**work.facts, "note": "asked: the tensors once"})


GPU_STEPS: dict[str, Callable[[Gpu], Work]] = {
    "naive CUDA kernels": partial(_three_kernels, kind="naive"),
    "shared-memory tiles": partial(_three_kernels, kind="tiled"),
    "one pass, online softmax": _online,
    "one pass on tensor cores": _tensor_cores,
    "standard attention, PyTorch": _standard,
    "quire": _final,
}


def asked_bytes(problem: Problem, kind: str) -> float:
    """Bytes that a step's loads and stores name in global memory, each thread's counted, caches or not."""
    p = problem
    scores = float(p.num_tokens**2 * p.num_heads)
    out = 2.0 * p.num_tokens * p.num_heads * p.head_dim
    kv = 4.0 * p.num_tokens * p.num_kv_heads * p.head_dim
    if kind == "once":
        return 2.0 * out + kv
    if kind in (
        "online",
        "tensor_core",
    ):  # queries once, keys and values once for each tile of queries of each head
        tiles = -(-p.num_tokens // (_TILE if kind == "online" else _QUERIES))
        return 2.0 * out + kv * p.group * tiles
    softmax = 12.0 * scores  # read twice, written once
    reuse = _TILE if kind == "tiled" else 1
    first = scores * (2 * p.head_dim * 2 / reuse + 4)
    second = scores * p.head_dim * (4 + 2) / reuse + out
    return first + softmax + second
