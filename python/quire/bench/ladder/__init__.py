"""Benchmarks of one attention from a Python loop to the library's kernel, and of KV memory with and without paging.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

from quire.bench.arrays import available
from quire.bench.harness import Case, Context, Result, Work
from quire.bench.ladder.kv_waste import BuddyPool, PagedPool, Pool, draw_requests, simulate
from quire.bench.ladder.steps import CPU_STEPS, GPU_STEPS, Gpu, Problem
from quire.bench.report import number

__all__ = ["cases", "summary"]

_MAX_LENGTH, _NUM_SLOTS, _BLOCK_SIZE = 2048, 16384, 16
_POOLS: dict[str, Callable[[], Pool]] = {
    "contiguous, the longest possible": lambda: BuddyPool(_NUM_SLOTS, _MAX_LENGTH, "max"),
    "contiguous, a power of two above the output": lambda: BuddyPool(_NUM_SLOTS, _MAX_LENGTH, "pow2"),
    "contiguous, the length foreseen": lambda: BuddyPool(_NUM_SLOTS, _MAX_LENGTH, "oracle"),
    "paged, blocks of 16": lambda: PagedPool(_NUM_SLOTS, _BLOCK_SIZE),
}


def cases(context: Context) -> Iterator[Case]:
    """The steps on one shape, no mask, so that all do the same arithmetic; then shares of a KV pool."""
    problem = Problem(100, 4, 2, 64, 2) if context.quick else Problem(2048, 32, 8, 128, 8)
    for name, (make, is_sample) in CPU_STEPS.items():
        part = len(problem.sample) / (problem.num_tokens * problem.num_heads) if is_sample else 1
        yield Case(
            name=name,
            prepare=partial(make, problem),
            num_flops=problem.num_flops * part,
            num_items=part,
            bound="" if context.is_cuda else "matmul",
            timer="host",
            op="ladder",
            implementation=name,
        )
    gpu = _OnFirstUse(problem, context.device)
    absent = "" if context.is_cuda else "no GPU here, or --device cpu"
    for name, step in GPU_STEPS.items():
        # The library's own kernel, too, works on CuPy's arrays here.
        needs = ("CuPy", "torch") if "PyTorch" in name else ("CuPy",)
        lacking = [module for module in needs if not available(module.lower())]
        missing = absent or (f"needs {' and '.join(lacking)}" if lacking else "")
        yield Case(
            name=name,
            prepare=partial(_absent, missing) if missing else partial(_on_gpu, gpu, step),
            num_flops=problem.num_flops,
            bound="matmul",
            op="ladder",
            implementation=name,
        )
    for name, pool in _POOLS.items():
        prepare = partial(_kv_waste, pool, 100 if context.quick else 1000)
        yield Case(name=name, prepare=prepare, op="ladder", implementation=name)


class _OnFirstUse:
    """The GPU's side, made when the first step's turn comes and kept for the others."""

    def __init__(self, problem: Problem, device: str) -> None:
        self._problem, self._device = problem, device
        self._gpu: Gpu | None = None

    def get(self) -> Gpu:
        if self._gpu is None:
            self._gpu = Gpu(self._problem, self._device)
        return self._gpu


def _on_gpu(gpu: _OnFirstUse, step: Callable[[Gpu], Work]) -> Work:
    try:
        ready = gpu.get()
    except Exception as error:  # a CuPy that does not fit the driver or finds no compiler
        return _absent(f"CuPy: {' '.join(str(error).split())[:200]}")
    return step(ready)


def _absent(why: str) -> Work:
    return Work(None, facts={"note": f"absent: {why}"})


def _kv_waste(make: Callable[[], Pool], num_requests: int) -> Work:
    found = simulate(make(), _NUM_SLOTS, draw_requests(num_requests, _MAX_LENGTH))
    shares = {
        "tokens": found.tokens,
        "reserved for later": found.reserved,
        "never used": found.fragments,
        "free, but too little": found.free,
    }
    return Work(
        None,
        facts={"sequences at once": found.num_running, "preempted": str(found.num_preempted)},
        shares=shares,
    )


def summary(results: Sequence[Result]) -> list[str]:
    """How much each step gains, and what that leaves of four well-known claims."""
    us = {result.name: result.us for result in results}
    waste = {result.name: 100.0 - result.shares["tokens"] for result in results if result.shares}

    def gain(slow: str, fast: str) -> str:
        a, b = us.get(slow), us.get(fast)
        return "not measured" if a is None or b is None else f"{number(a / b)}x"

    def line(claim: str, *pairs: tuple[str, str]) -> str:
        return f"{claim}: " + "; ".join(f"{slow} / {fast} {gain(slow, fast)}" for slow, fast in pairs)

    lines = [
        line(
            "the whole ladder",
            ("Python loop", "quire"),
            ("NumPy", "quire"),
            ("Python loop", "quire on the CPU"),
        ),
        line(
            'claim "CUDA is 100 to 1000 times a Python loop"',
            ("Python loop", "naive CUDA kernels"),
            ("Python loop", "one pass on tensor cores"),
        ),
        line(
            'claim "shared memory: 5 to 10 times fewer trips to global memory"; time',
            ("naive CUDA kernels", "shared-memory tiles"),
        ),
        line(
            'claim "FlashAttention is 2 to 4 times standard attention"',
            ("standard attention, PyTorch", "quire"),
            ("standard attention, PyTorch", "one pass on tensor cores"),
            ("shared-memory tiles", "one pass, online softmax"),
        ),
    ]
    if waste:
        measured = "; ".join(f"{name} {percent:.1f} %" for name, percent in waste.items())
        lines.append(
            f'claim "paging cuts KV waste from 60-80 % to under 4 %"; slots without a token: {measured}'
        )
    return lines
