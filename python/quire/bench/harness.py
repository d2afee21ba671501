"""The benchmark's frame: cases, timers for CPU and CUDA, and the results.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import gc
import math
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import cast

from quire.bench.arrays import Arrays

__all__ = [
    "Case",
    "Context",
    "Fact",
    "GivenUp",
    "Result",
    "Sample",
    "Target",
    "Timer",
    "Work",
    "make_timer",
    "measure",
]

Run = Callable[[], object]
Fact = float | str

_BEYOND_CACHES = 64 << 20
# Worker threads, ours and the peers', spin for a while after a call, on cores that the next one may need.
_REST_S = 0.003


@dataclass(frozen=True)
class Target:
    """What a case is held to: at most so many µs, so much of its ceiling, or so many times as fast as a peer."""

    max_us: float | None = None
    min_percent: float | None = None
    min_speedup: float | None = None
    peer: str = "torch"

    def __str__(self) -> str:
        """As the tables say it."""
        if self.max_us is not None:
            return f"<= {self.max_us:g} µs"
        if self.min_percent is not None:
            return f">= {self.min_percent:g} % of the ceiling"
        return f">= {self.min_speedup:g}x {self.peer}"


@dataclass(frozen=True)
class Work:
    """What is timed: ours, and the peers by name. Without ``run`` nothing is, and the facts and shares are the result.

    With ``is_round``, each callable is a whole round that times itself and returns seconds for one call.
    """

    run: Run | None
    peers: Mapping[str, Run] = field(default_factory=dict)
    is_round: bool = False
    facts: Mapping[str, Fact] = field(default_factory=dict)  # more columns of the table
    shares: Mapping[str, float] = field(default_factory=dict)  # parts of a whole, in percent


@dataclass(frozen=True)
class Case:
    """One line of a table. ``prepare`` makes the tensors when the case's turn comes; they go after it."""

    name: str
    prepare: Callable[[], Work]
    num_bytes: float = 0.0  # that have to be moved, read and written
    num_flops: float = 0.0
    bound: str = ""  # the ceiling that counts: "copy", "read", "matmul", or "" for none
    target: Target | None = None
    # Calls, blocks, ... that one run stands for; times are given for one of them. Below 1 a run is a sample of a call.
    num_items: float = 1
    timer: str = ""  # "host" times the call alone, also on a GPU
    op: str = ""
    implementation: str = "quire"  # whose time it is
    group: str = ""  # the cases that a summary takes together; "" is op
    unranked: tuple[str, ...] = ()  # peers that do another task, a lighter one say; no summary counts them


@dataclass(frozen=True)
class Sample:
    """The times of one implementation, in microseconds."""

    best_us: float
    median_us: float
    num_rounds: int
    num_calls: int


@dataclass(frozen=True)
class Result:
    """What came of one case."""

    family: str
    name: str
    implementation: str = "quire"
    group: str = ""
    unranked: tuple[str, ...] = ()
    us: float | None = None  # the best round on the CPU, the median on a GPU
    sample: Sample | None = None
    gb_per_s: float | None = None
    tflop_per_s: float | None = None
    percent_of_ceiling: float | None = None
    ceiling: str = ""
    peers: dict[str, float] = field(default_factory=dict)  # µs, likewise
    speedups: dict[str, float] = field(default_factory=dict)  # peer's time / ours
    target: str = ""
    target_met: bool | None = None
    facts: dict[str, Fact] = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=dict)
    error: str = ""


class GivenUp(Exception):
    """A peer has spent its time on attempts that failed; the reason has been noted."""


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in the block after so many seconds. Outside the main thread there is no limit."""
    if math.isinf(seconds) or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise TimeoutError("took too long, compiling perhaps")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, previous)


@dataclass
class Context:
    """What a family's module is told when it makes its cases."""

    device: str
    arrays: Arrays
    timer: Timer
    quick: bool = False
    use_peers: bool = True
    skipped_peers: dict[str, str] = field(default_factory=dict)  # "op: name" -> reason
    peer_limit_s: float = math.inf  # that a peer of an op may spend on attempts that fail
    wasted_s: dict[str, float] = field(default_factory=dict)  # "op: name" -> seconds of such attempts

    @property
    def is_cuda(self) -> bool:
        """Whether the device is a GPU."""
        return self.device != "cpu"

    @contextmanager
    def attempt(self, peer: str) -> Iterator[None]:
        """Around what a peer does for the first time, which may be to compile. Raises GivenUp where that has failed for too long."""
        left = self.peer_limit_s - self.wasted_s.get(peer, 0.0)
        if left <= 0.0:
            raise GivenUp(peer)
        start = time.perf_counter()
        try:
            with _time_limit(left):
                yield
        except Exception:
            self.wasted_s[peer] = self.wasted_s.get(peer, 0.0) + time.perf_counter() - start
            with suppress(Exception):
                self.timer.check()  # what it left behind is no matter of the next one
            raise


class Timer:
    """Rounds of calls, ours and the peers' in turn, so that a busy machine disturbs all alike."""

    kind = "best round"

    def __init__(self, min_time: float, quick: bool = False) -> None:
        """``min_time`` is the seconds to spend on a case at least."""
        self.min_time = min_time
        self.quick = quick

    def settle(self) -> None:
        """Waits until what was launched is done."""

    def check(self) -> None:
        """Raises what the calls so far have left behind as an error that nobody asked for."""

    def times(self, runs: Mapping[str, Run], is_round: bool = False) -> tuple[dict[str, list[float]], int]:
        """Seconds of one call, for each round and each run; and the calls of a round of the first."""
        return self.host_times(runs, is_round)

    def host_times(
        self, runs: Mapping[str, Run], is_round: bool = False
    ) -> tuple[dict[str, list[float]], int]:
        """As times(), by the host's clock; the device's queue is emptied between rounds, untimed."""
        num_calls = {name: 1 if is_round else self._calibrate(run) for name, run in runs.items()}
        times: dict[str, list[float]] = {name: [] for name in runs}
        enabled = gc.isenabled()
        gc.disable()
        try:
            start = time.perf_counter()
            min_rounds = 3 if self.quick else 5
            while True:
                for name, run in runs.items():
                    if is_round:
                        times[name].append(cast(float, run()))
                        continue
                    if len(runs) > 1:
                        time.sleep(_REST_S)
                        run()
                    times[name].append(_loop(run, num_calls[name]))
                    self.settle()
                spent = time.perf_counter() - start
                rounds = len(next(iter(times.values())))
                # A case whose single round is long is not repeated for the sake of statistics.
                if rounds >= min_rounds and spent >= self.min_time:
                    break
                if rounds >= 2 and spent >= 8 * self.min_time:
                    break
        finally:
            if enabled:
                gc.enable()
        return times, next(iter(num_calls.values()))

    def _calibrate(self, run: Run) -> int:
        """Calls that make a round of about a millisecond: long for the clock, short for the scheduler."""
        run()
        self.settle()
        wanted = 0.001
        num_calls = 1
        while num_calls < 1 << 20:
            spent = _loop(run, num_calls) * num_calls
            self.settle()
            if spent >= wanted:
                break
            num_calls *= 2 if spent > wanted / 16 else 8
        return num_calls


def _loop(run: Run, num_calls: int) -> float:
    calls = range(num_calls)
    start = time.perf_counter()
    for _ in calls:
        run()
    return (time.perf_counter() - start) / num_calls


def measure(family: str, case: Case, context: Context, ceilings: Mapping[str, float]) -> Result:
    """Runs a case. What goes wrong in it becomes the result's error."""
    blank = Result(
        family, case.name, case.implementation, group=case.group or case.op or family, unranked=case.unranked
    )
    try:
        work = case.prepare()
        if work.run is None:
            return replace(blank, facts=dict(work.facts), shares=dict(work.shares))
        runs: dict[str, Run] = {"quire": work.run}
        work.run()  # raises here, and not in a timer
        context.timer.settle()
        for name, run in work.peers.items():
            peer = f"{case.op or family}: {name}"
            try:
                with context.attempt(peer):
                    run()
                    context.timer.settle()
                    context.timer.check()
                runs[name] = run
            except GivenUp:
                continue
            except Exception as error:
                context.skipped_peers[peer] = _reason(error)
        on_host = case.timer == "host" or work.is_round or not context.is_cuda
        timer = context.timer
        times, num_calls = timer.host_times(runs, work.is_round) if on_host else timer.times(runs)
    except Exception as error:
        return replace(blank, error=_reason(error))
    scale = 1e6 / case.num_items
    center: Callable[[list[float]], float] = min if on_host else statistics.median
    ours = times.pop("quire")
    us = center(ours) * scale
    seconds = us * 1e-6 * case.num_items
    speedups = {name: center(peer) / center(ours) for name, peer in times.items() if center(ours) > 0}
    gb_per_s = case.num_bytes / seconds / 1e9 if case.num_bytes else None
    tflop_per_s = case.num_flops / seconds / 1e12 if case.num_flops else None
    ceiling = (
        case.bound
        if case.bound in ceilings
        else "copy"
        if case.bound == "read" and "copy" in ceilings
        else ""
    )
    achieved = tflop_per_s if case.bound == "matmul" else gb_per_s
    if case.bound != "matmul" and not context.is_cuda and case.num_bytes < _BEYOND_CACHES:
        ceiling = ""  # what stays in the caches is not held to the memory's bandwidth
    percent = 100.0 * achieved / ceilings[ceiling] if ceiling and achieved is not None else None
    met: bool | None = None
    if case.target is not None:
        if case.target.max_us is not None:
            met = us <= case.target.max_us
        elif case.target.min_percent is not None:
            met = None if percent is None else percent >= case.target.min_percent
        elif case.target.min_speedup is not None and case.target.peer in speedups:
            met = speedups[case.target.peer] >= case.target.min_speedup
    return replace(
        blank,
        us=us,
        sample=Sample(min(ours) * scale, statistics.median(ours) * scale, len(ours), num_calls),
        gb_per_s=gb_per_s,
        tflop_per_s=tflop_per_s,
        percent_of_ceiling=percent,
        ceiling=ceiling,
        peers={name: center(peer) * scale for name, peer in times.items()},
        speedups=speedups,
        target="" if case.target is None else str(case.target),
        target_met=met,
        facts=dict(work.facts),
        shares=dict(work.shares),
    )


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300] if text else type(error).__name__


def make_timer(arrays: Arrays, min_time: float, quick: bool) -> Timer:
    """The timer that fits the device and the array library."""
    if arrays.device == "cpu":
        return Timer(min_time, quick)
    from quire.bench.cuda_timer import CudaTimer

    return CudaTimer(arrays, min_time, quick)
