"""Asynchronous work in PyTorch and CuPy: streams that are kept busy, graphs, and what the tests of ops do with them.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import frameworks
import numpy as np
import pytest
from op_list import BLOCKS, Arrays, Op

#: Cycles: about 25 and 100 ms.
SHORT_DELAY, LONG_DELAY = 50_000_000, 200_000_000


class TorchWork:
    """Asynchronous work in PyTorch."""

    dtype = "bfloat16"

    def __init__(self, framework: Any = None) -> None:
        self.framework = framework or frameworks.Torch("cuda:0")
        self.torch = self.framework.torch

    def upload(self, arrays: dict[str, np.ndarray]) -> Arrays:
        return {n: a if n.startswith("host_") else self.framework.array(a) for n, a in arrays.items()}

    def made(self, op: Op, seed: int) -> Arrays:
        """One draw of an op's tensors."""
        tensors = self.upload(op.make(np.random.default_rng(seed), self.dtype))
        op.prepare(tensors)
        return tensors

    def malformed(self, op: Op, tensors: Arrays) -> Arrays:
        """The same with an argument that the op must refuse."""
        if op.name == "swap_blocks":  # which takes any devices
            return {**tensors, "host_pairs": np.array([[0, BLOCKS]])}
        name = next(iter(tensors))
        return {**tensors, name: self.framework.numpy(tensors[name])}

    def copy(self, arrays: Arrays) -> Arrays:
        return {n: a if n.startswith("host_") else a.clone() for n, a in arrays.items()}

    def assign(self, to: Arrays, arrays: Arrays) -> None:
        """In place and asynchronously, on the current stream."""
        for name, array in arrays.items():
            if not name.startswith("host_"):
                to[name].copy_(array)

    def device(self) -> Any:
        """Makes the first GPU the current one: what used another before in this process (JAX) may have left that."""
        return self.torch.cuda.device(0)

    def stream(self) -> Any:
        return self.torch.cuda.Stream()

    def use(self, stream: Any) -> Any:
        return self.torch.cuda.stream(stream)

    def handle(self, stream: Any) -> int:
        return stream.cuda_stream

    def delay(self, cycles: int) -> None:
        """Keeps the current stream busy: 50 million cycles are about 25 ms."""
        self.torch.cuda._sleep(cycles)

    def capture(self, call: Callable[[], object]) -> Callable[[], None]:
        """Gives what replays the call, on the stream that is current then."""
        graph = self.torch.cuda.CUDAGraph()
        with self.torch.cuda.graph(graph):
            call()
        return graph.replay

    def bits(self, array: Any) -> np.ndarray:
        return np.ascontiguousarray(self.framework.numpy(array)).view(np.uint8)

    def synchronize(self) -> None:
        self.torch.cuda.synchronize()


class CuPyWork(TorchWork):
    """Asynchronous work in CuPy; PyTorch, where it is there, keeps a stream busy."""

    dtype = "float16"

    def __init__(self, framework: Any) -> None:
        self.framework = framework
        self.cupy = framework.cupy

    def upload(self, arrays: dict[str, np.ndarray]) -> Arrays:
        if any(isinstance(a, np.ndarray) and a.dtype.name.startswith("float8") for a in arrays.values()):
            pytest.skip("CuPy has no float8")
        return super().upload(arrays)

    def copy(self, arrays: Arrays) -> Arrays:
        return {n: a if n.startswith("host_") else a.copy() for n, a in arrays.items()}

    def assign(self, to: Arrays, arrays: Arrays) -> None:
        for name, array in arrays.items():
            if not name.startswith("host_"):
                self.cupy.copyto(to[name], array)

    def device(self) -> Any:
        return self.cupy.cuda.Device(0)

    def stream(self) -> Any:
        return self.cupy.cuda.Stream(non_blocking=True)

    def use(self, stream: Any) -> Any:
        return stream

    def handle(self, stream: Any) -> int:
        return stream.ptr

    def delay(self, cycles: int) -> None:
        torch = pytest.importorskip("torch", reason="torch, which keeps a stream busy, is not installed")
        if not torch.cuda.is_available():
            pytest.skip("this torch, which keeps a stream busy, has no CUDA")
        with torch.cuda.stream(torch.cuda.ExternalStream(self.cupy.cuda.get_current_stream().ptr)):
            torch.cuda._sleep(cycles)

    def capture(self, call: Callable[[], object]) -> Callable[[], None]:
        self.synchronize()
        stream = self.stream()
        pool = self.cupy.cuda.MemoryPool()  # what is allocated in the capture stays the graph's
        with stream, self.cupy.cuda.using_allocator(pool.malloc):
            stream.begin_capture()
            try:
                call()
            finally:
                graph = stream.end_capture()

        def replay(owner: object = pool) -> None:
            graph.launch(self.cupy.cuda.get_current_stream())

        return replay

    def synchronize(self) -> None:
        self.cupy.cuda.Device().synchronize()


def draws(op: Op, work: TorchWork) -> tuple[Arrays, Arrays, Arrays]:
    """Tensors to call the op on, others to assign to them, and what the op then makes of them; all is done on return."""
    old, new = (work.made(op, seed) for seed in (1, 2))
    want = work.copy(new)
    op.call(want)
    work.synchronize()
    return old, new, want


def assert_same(work: TorchWork, got: Arrays, want: Arrays) -> None:
    work.synchronize()
    for name, array in want.items():
        if not name.startswith("host_"):
            np.testing.assert_array_equal(work.bits(got[name]), work.bits(array), err_msg=name)


@contextlib.contextmanager
def busy(work: Any, stream: Any) -> Iterator[Callable[[], bool]]:
    """Makes the stream current, and busy for a tenth of a second; gives whether it still is."""
    with work.use(stream):
        work.delay(LONG_DELAY)
        if isinstance(work, CuPyWork):
            event = stream.record()
            yield lambda: not event.done
        else:
            event = stream.record_event()
            yield lambda: not event.query()
