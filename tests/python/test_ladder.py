"""`quire bench ladder`: every step against float64, the traffic's formula, the pools' bookkeeping, the summary.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
import sys

import numpy as np
import pytest

import quire
from quire.__main__ import main
from quire.bench import ladder
from quire.bench.harness import Result
from quire.bench.ladder import summary
from quire.bench.ladder.kv_waste import BuddyPool, PagedPool, Pool, Request, draw_requests, simulate
from quire.bench.ladder.steps import CPU_STEPS, GPU_STEPS, Gpu, Problem, asked_bytes

has_gpu = importlib.util.find_spec("cupy") is not None and quire.has_cuda() and quire.num_cuda_devices() > 0


@pytest.mark.parametrize("name", CPU_STEPS)
def test_cpu_step(name: str) -> None:
    """A step checks itself; a wrong reference makes it fail."""
    problem = Problem(33, 4, 2, 32, 3)
    work = CPU_STEPS[name][0](problem)
    assert work.run is not None
    work.run()
    assert float(work.facts["error"]) < 1e-5
    other = Problem(33, 4, 2, 32, 3)
    other.reference[...] *= 1.001
    with pytest.raises(AssertionError, match="off by"):
        CPU_STEPS[name][0](other)


@pytest.mark.skipif(not has_gpu, reason="needs a GPU and CuPy")
@pytest.mark.parametrize("name", GPU_STEPS)
@pytest.mark.parametrize(("num_tokens", "head_dim"), [(1, 64), (33, 128), (64, 64), (200, 128)])
def test_gpu_step(name: str, num_tokens: int, head_dim: int) -> None:
    """Whole tiles, parts of tiles, both head dims."""
    if "PyTorch" in name:
        pytest.importorskip("torch")
    problem = Problem(num_tokens, 4, 2, head_dim, 1)
    work = GPU_STEPS[name](Gpu(problem, "cuda:0"))
    assert float(work.facts["error"]) < 2e-3
    other = Problem(num_tokens, 4, 2, head_dim, 1)
    other.reference[...] *= 1.01
    with pytest.raises(AssertionError, match="off by"):
        GPU_STEPS[name](Gpu(other, "cuda:0"))


def test_the_reference_is_attention() -> None:
    problem = Problem(7, 4, 2, 8, 2)
    q, k, v = (x.astype(np.float64) for x in problem.inputs)
    for head in range(4):
        scores = np.exp(q[:, head] @ k[:, head // 2].T / np.sqrt(8))
        expected = scores / scores.sum(1, keepdims=True) @ v[:, head // 2]
        np.testing.assert_allclose(problem.reference[:, head], expected, rtol=1e-12)


def test_asked_bytes() -> None:
    """Counted by hand for one head: 16 queries, 16 keys of 16 numbers."""
    problem = Problem(16, 1, 1, 16, 1)
    softmax, out = 12 * 256, 2 * 256
    assert asked_bytes(problem, "naive") == 256 * (64 + 4) + softmax + 256 * 16 * 6 + out
    assert asked_bytes(problem, "tiled") == 256 * (4 + 4) + softmax + 256 * 6 + out
    assert asked_bytes(problem, "online") == asked_bytes(problem, "once") == 4 * 512
    long = dataclasses.replace(problem, num_tokens=4096)
    assert asked_bytes(long, "online") > 3.9 * asked_bytes(long, "tensor_core")


@pytest.mark.parametrize("reserve", ["max", "pow2", "oracle"])
def test_buddy_ranges_never_overlap(reserve: str) -> None:
    pool = BuddyPool(1024, 256, reserve)
    rng = np.random.default_rng(1)
    running: list[Request] = []
    refused = 0
    for seq_id in range(400):
        request = Request(seq_id, int(rng.integers(1, 128)), int(rng.integers(1, 128)))
        if pool.start(request):
            running.append(request)
            assert request.final <= pool.allocated(request) <= 256
        else:
            refused += 1
        ranges = sorted(pool._held.values())
        assert all(start % size == 0 for start, size in ranges)
        assert all(a[0] + a[1] <= b[0] for a, b in itertools.pairwise(ranges))
        assert not ranges or ranges[-1][0] + ranges[-1][1] <= 1024
        if rng.random() < 0.5 and running:
            pool.stop(running.pop(int(rng.integers(len(running)))), finished=True)
    assert refused
    for request in running:
        pool.stop(request, finished=True)
    # Merged again: the longest fits wherever it did at first.
    assert all(pool.start(Request(1000 + i, 128, 128)) for i in range(4))
    assert not pool.start(Request(2000, 1, 1))


@pytest.mark.parametrize(
    ("prompt", "output", "reserve", "expected"), [(5, 3, "max", 256), (5, 3, "oracle", 8)]
)
def test_buddy_reservation(prompt: int, output: int, reserve: str, expected: int) -> None:
    pool, request = BuddyPool(256, 256, reserve), Request(0, prompt, output)
    assert pool.start(request)
    assert pool.allocated(request) == expected


def test_paging_wastes_less_than_any_reservation() -> None:
    requests = draw_requests(120, 512, seed=3)
    assert max(request.final for request in requests) <= 512
    pools: dict[str, Pool] = {name: BuddyPool(4096, 512, name) for name in ("max", "pow2", "oracle")}
    pools["paged"] = PagedPool(4096, 16)
    found = {name: simulate(pool, 4096, requests) for name, pool in pools.items()}
    for shares in found.values():
        assert shares.tokens + shares.reserved + shares.fragments + shares.free == pytest.approx(100.0)
    assert found["max"].tokens < found["pow2"].tokens < found["oracle"].tokens < found["paged"].tokens
    assert found["paged"].tokens > 90.0
    assert found["max"].num_running == 8.0
    assert requests[0].length == 0  # every pool begins with the same requests


def test_a_paged_pool_preempts_and_gives_all_back() -> None:
    pool = PagedPool(64, 16)
    first, second = Request(0, 30, 34), Request(1, 30, 30)
    shares = simulate(pool, 64, [first, second, Request(2, 5, 5), *(Request(3 + i, 1, 1) for i in range(9))])
    assert shares.num_preempted > 0
    pool.allocator.check()
    for seq_id in pool.allocator.sequence_ids():
        pool.allocator.free_sequence(seq_id)
    assert pool.allocator.stats().num_free == 4


def test_a_pool_that_holds_everything_is_no_measurement() -> None:
    with pytest.raises(ValueError, match="nothing to count"):
        simulate(PagedPool(1024, 16), 1024, [Request(0, 4, 4)])


def test_summary() -> None:
    times = {
        "Python loop": 4e6,
        "naive CUDA kernels": 2e3,
        "standard attention, PyTorch": 30.0,
        "quire": 10.0,
    }
    results = [Result("ladder", name, us=us) for name, us in times.items()]
    results.append(Result("ladder", "paged", shares={"tokens": 97.5, "free": 2.5}))
    text = "\n".join(summary(results))
    assert "Python loop / naive CUDA kernels 2e+03x" not in text
    assert "Python loop / naive CUDA kernels 2000x" in text
    assert "standard attention, PyTorch / quire 3x" in text
    assert "NumPy / quire not measured" in text
    assert "paged 2.5 %" in text


def test_a_broken_cupy_is_an_absence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    problem = Problem(16, 2, 1, 16, 1)
    work = ladder._on_gpu(ladder._OnFirstUse(problem, "cuda:0"), next(iter(GPU_STEPS.values())))
    assert work.run is None
    assert str(work.facts["note"]).startswith("absent: CuPy: ")


def test_without_a_gpu_its_steps_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("bench", "ladder", "--quick", "--device", "cpu", "--no-ceilings", "--min-time", "0.001")
    assert main([*arguments, "--format", "json"]) == 0
    report = json.loads(capsys.readouterr().out)
    results = {result["name"]: result for result in report["results"]}
    assert all(results[name]["us"] > 0 for name in CPU_STEPS)
    assert all(results[name]["facts"]["note"].startswith("absent") for name in GPU_STEPS)
    assert results["Python loop"]["implementation"] == "Python loop"
    assert report["summaries"]["ladder"]
