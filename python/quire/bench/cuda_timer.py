"""Device times by CUDA events, through torch or CuPy, with the L2 cache flushed between runs.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import Any

from quire.bench.arrays import Arrays
from quire.bench.harness import Run, Timer

__all__ = ["CudaTimer"]

# The host's time for a call that writing the buffer once hides, and how often more it is written at most.
_FILL_S = 30e-6
_MAX_FILLS = 8


class _Torch:
    """What the timer needs of torch."""

    def __init__(self, device: str) -> None:
        import torch

        self._torch = torch
        self._device = torch.device(device)
        torch.cuda.set_device(self._device)
        self.l2_bytes = int(getattr(torch.cuda.get_device_properties(self._device), "L2_cache_size", 0))

    def event(self) -> Any:
        event: Any = self._torch.cuda.Event
        return event(enable_timing=True)

    def elapsed_ms(self, start: Any, end: Any) -> float:
        return float(start.elapsed_time(end))

    def synchronize(self) -> None:
        self._torch.cuda.synchronize(self._device)

    def buffer(self, num_bytes: int) -> Any:
        return self._torch.empty(num_bytes, dtype=self._torch.uint8, device=self._device)

    def fill(self, buffer: Any) -> None:
        buffer.zero_()

    def copy(self, target: Any, source: Any) -> None:
        target.copy_(source)

    def empty_kernel(self) -> Run:
        torch, one = self._torch, self.buffer(1)
        sleep = getattr(torch.cuda, "_sleep", None)  # a kernel that spins for a number of cycles
        return one.zero_ if sleep is None else lambda: sleep(0)

    def matmul(self, size: int) -> tuple[Run, str]:
        torch = self._torch
        a = torch.randn(size, size, device=self._device).to(torch.bfloat16)
        b = torch.randn(size, size, device=self._device).to(torch.bfloat16)
        out = torch.empty_like(a)
        return lambda: torch.mm(a, b, out=out), "bfloat16"

    def free_bytes(self) -> int:
        return int(self._torch.cuda.mem_get_info(self._device)[0])


class _Cupy:
    """What the timer needs of CuPy."""

    def __init__(self, device: str) -> None:
        import cupy

        self._cupy = cupy
        self._device = cupy.cuda.Device(int(device.partition(":")[2] or 0))
        self._device.use()
        self.l2_bytes = int(self._device.attributes.get("L2CacheSize", 0))

    def event(self) -> Any:
        return self._cupy.cuda.Event()

    def elapsed_ms(self, start: Any, end: Any) -> float:
        return float(self._cupy.cuda.get_elapsed_time(start, end))

    def synchronize(self) -> None:
        self._device.synchronize()

    def buffer(self, num_bytes: int) -> Any:
        return self._cupy.empty(num_bytes, dtype="u1")

    def fill(self, buffer: Any) -> None:
        buffer.data.memset_async(0, buffer.nbytes)

    def copy(self, target: Any, source: Any) -> None:
        target.data.copy_from_device_async(source.data, source.nbytes)

    def empty_kernel(self) -> Run:
        kernel = self._cupy.RawKernel('extern "C" __global__ void empty_kernel() {}', "empty_kernel")
        return lambda: kernel((1,), (1,), ())

    def matmul(self, size: int) -> tuple[Run, str]:
        cupy = self._cupy
        a = cupy.random.standard_normal((size, size), dtype="f4").astype("f2")
        b = cupy.random.standard_normal((size, size), dtype="f4").astype("f2")
        out = cupy.empty_like(a)
        return lambda: cupy.matmul(a, b, out=out), "float16"

    def free_bytes(self) -> int:
        return int(self._cupy.cuda.runtime.memGetInfo()[0])


class CudaTimer(Timer):
    """Events around each run. Before it a buffer larger than L2 is written, as often as it takes to hide the launch."""

    kind = "median"

    def __init__(self, arrays: Arrays, min_time: float, quick: bool = False) -> None:
        """``arrays`` names the library whose events, stream and memory are used."""
        super().__init__(min_time, quick)
        self.library = _Torch(arrays.device) if arrays.name == "torch" else _Cupy(arrays.device)
        self._flush = self.library.buffer(max(4 * self.library.l2_bytes, 256 << 20))

    def settle(self) -> None:
        """Waits for the device."""
        self.library.synchronize()

    def check(self) -> None:
        """A launch that failed leaves an error in the CUDA runtime, which the next library to ask takes for its own: we ask first."""
        self.library.empty_kernel()()
        self.settle()

    def times(self, runs: Mapping[str, Run], is_round: bool = False) -> tuple[dict[str, list[float]], int]:
        """Seconds of one run on the device, for at least 20 rounds (5 when quick)."""
        library = self.library
        times: dict[str, list[float]] = {name: [] for name in runs}
        start_time = time.perf_counter()
        num_rounds = 5 if self.quick else 20
        num_fills: dict[str, int] = {}
        for name, run in runs.items():
            run()
            self.settle()
            begin = time.perf_counter()
            run()
            num_fills[name] = 1 + min(int((time.perf_counter() - begin) / _FILL_S), _MAX_FILLS)
        self.settle()
        while True:
            events = []
            for _ in range(num_rounds):
                for name, run in runs.items():
                    start, end = library.event(), library.event()
                    for _ in range(num_fills[name]):
                        library.fill(self._flush)
                    start.record()
                    run()
                    end.record()
                    events.append((name, start, end))
            self.settle()
            for name, start, end in events:
                times[name].append(library.elapsed_ms(start, end) * 1e-3)
            if time.perf_counter() - start_time >= self.min_time:
                return times, 1

    def floor_us(self) -> float:
        """What a kernel that does nothing takes by this timer."""
        times, _ = self.times({"empty": self.library.empty_kernel()})
        return statistics.median(times["empty"]) * 1e6
