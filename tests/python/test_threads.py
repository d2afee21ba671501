"""Threads: calls that share a workspace or do not, and first calls that meet.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import pathlib
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from op_list import OPS


@pytest.mark.parametrize("streams", ["same", "different", "default"])
def test_two_threads(torch_work, streams):
    """Two threads whose calls share a workspace (one stream) or not: nothing of one call shows in the other's result."""
    torch, work, op = torch_work.torch, torch_work, OPS["paged_long"]
    variants, calls = 4, 200
    inputs = [
        [work.upload(op.make(np.random.default_rng(10 * t + i), work.dtype)) for i in range(variants)]
        for t in range(2)
    ]
    want = []
    for thread_inputs in inputs:
        for tensors in thread_inputs:
            op.call(tensors)
        want.append([tensors["out"].clone() for tensors in thread_inputs])
    outs = [[torch.zeros_like(want[t][0]) for _ in range(calls)] for t in range(2)]
    work.synchronize()
    own = [torch.cuda.Stream(), torch.cuda.Stream()]
    chosen = {"same": [own[0]] * 2, "different": own, "default": [torch.cuda.default_stream()] * 2}[streams]
    barrier = threading.Barrier(2, timeout=60)

    def loop(thread: int) -> None:
        with torch.cuda.stream(chosen[thread]):
            barrier.wait()
            for i, out in enumerate(outs[thread]):
                op.call({**inputs[thread][i % variants], "out": out})

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(2) as executor:
            list(executor.map(loop, range(2)))
    finally:
        sys.setswitchinterval(interval)
    work.synchronize()
    for thread in range(2):
        wrong = [
            i
            for i, out in enumerate(outs[thread])
            if not torch.equal(out.view(torch.uint8), want[thread][i % variants].view(torch.uint8))
        ]
        assert not wrong, f"thread {thread}: {len(wrong)} of {calls} calls differ, first {wrong[0]}"


def test_threads_on_the_first_call(torch_work):
    """Eight threads of a fresh process whose first calls meet: what is made once is made once."""
    here = str(pathlib.Path(__file__).parent)
    code = f"""
        import sys, threading
        sys.path.insert(0, {here!r})
        import numpy as np
        from gpu_work import TorchWork, assert_same
        from op_list import OPS

        work = TorchWork()
        names = ["rms_norm", "rotary_embedding", "write_kv", "paged_long"] * 2
        made = [work.upload(OPS[n].make(np.random.default_rng(i), work.dtype)) for i, n in enumerate(names)]
        wants = [work.copy(t) for t in made]
        work.synchronize()
        barrier = threading.Barrier(len(names), timeout=60)

        def call(i):
            barrier.wait()
            with work.use(work.stream()):
                OPS[names[i]].call(made[i])

        threads = [threading.Thread(target=call, args=(i,)) for i in range(len(names))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for name, got, want in zip(names, made, wants):
            OPS[name].call(want)
            assert_same(work, got, want)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
