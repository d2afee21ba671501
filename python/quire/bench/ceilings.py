"""What the machine can do at most, measured: memory bandwidth and matrix products.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np

from quire.bench.arrays import available
from quire.bench.cuda_timer import CudaTimer
from quire.bench.harness import Context

__all__ = ["measure_ceilings"]


def measure_ceilings(context: Context) -> tuple[dict[str, float], dict[str, str]]:
    """The ceilings "copy" and "read" (GB/s, read plus written) and "matmul" (TFLOP/s); how each came."""
    return _cuda(context) if context.is_cuda else _cpu(context)


def _cpu(context: Context) -> tuple[dict[str, float], dict[str, str]]:
    num_threads = len(os.sched_getaffinity(0))
    # Beyond the last-level cache, but no burden to a small machine.
    available_bytes = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    num_bytes = min((64 if context.quick else 512) << 20, available_bytes // 8)
    source = np.ones(num_bytes // 4, np.int32)
    target = np.zeros_like(source)
    parts = [
        slice(i * source.size // num_threads, (i + 1) * source.size // num_threads)
        for i in range(num_threads)
    ]
    repeats = 2 if context.quick else 5

    with ThreadPoolExecutor(num_threads) as pool:

        def best(one: Callable[[slice], object]) -> float:
            times = []
            for _ in range(repeats + 1):
                start = time.perf_counter()
                list(pool.map(one, parts))
                times.append(time.perf_counter() - start)
            return min(times[1:])

        # NumPy releases the GIL in both loops.
        read = num_bytes / best(lambda part: np.bitwise_or.reduce(source[part])) / 1e9
        copy = 2 * num_bytes / best(lambda part: np.copyto(target[part], source[part])) / 1e9
    how = {
        "read": f"NumPy reduction of {num_bytes >> 20} MiB, {num_threads} threads",
        "copy": f"NumPy copy of {num_bytes >> 20} MiB, {num_threads} threads",
    }
    size = 512 if context.quick else 2048
    matmul, how["matmul"] = _cpu_matmul(size, repeats)
    return {"read": max(read, copy), "copy": copy, "matmul": matmul}, how


def _cpu_matmul(size: int, repeats: int) -> tuple[float, str]:
    """The fastest of float32 by NumPy and bfloat16 by torch."""
    x = np.ones((size, size), np.float32)
    runs: dict[str, Callable[[], Any]] = {f"NumPy float32 {size}³": lambda: x @ x}
    if available("torch"):
        try:
            import torch

            y = torch.ones(size, size, dtype=torch.bfloat16)
            runs[f"torch bfloat16 {size}³"] = lambda: y @ y
        except (ImportError, OSError):
            pass
    best_rate, best_how = 0.0, ""
    for how, run in runs.items():
        start = time.perf_counter()
        run()
        if 2 * size**3 / (time.perf_counter() - start) / 1e12 < best_rate / 4:
            continue  # bfloat16 on a CPU without it takes minutes
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        rate = 2 * size**3 / min(times) / 1e12
        if rate > best_rate:
            best_rate, best_how = rate, how
    return best_rate, best_how


def _cuda(context: Context) -> tuple[dict[str, float], dict[str, str]]:
    timer = context.timer
    assert isinstance(timer, CudaTimer)
    library = timer.library
    num_bytes = min((256 << 20) if context.quick else (4 << 30), library.free_bytes() // 4)
    source, target = library.buffer(num_bytes), library.buffer(num_bytes)
    library.fill(source)
    times, _ = timer.times({"copy": partial(library.copy, target, source)})
    copy = 2 * num_bytes / statistics.median(times["copy"]) / 1e9
    del source, target  # the matrices may need the room
    size = 2048 if context.quick else 8192
    run, dtype = library.matmul(size)
    times, _ = timer.times({"matmul": run})
    matmul = 2 * size**3 / statistics.median(times["matmul"]) / 1e12
    how = {
        "copy": f"device-to-device copy of {num_bytes >> 20} MiB",
        "matmul": f"{dtype} {size}³ through {context.arrays.name}",
    }
    return {"copy": copy, "matmul": matmul}, how
