"""The command line of `quire bench`.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib
import importlib.metadata
import importlib.util
import math
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import quire
from quire.bench import FAMILIES, BenchError, arrays, peers
from quire.bench.ceilings import measure_ceilings
from quire.bench.cuda_timer import CudaTimer
from quire.bench.harness import Case, Context, make_timer, measure
from quire.bench.report import FORMATS, Report, against_ceilings, against_peers, plot

__all__ = ["add_bench_arguments", "run_bench"]


def _seconds(text: str) -> float:
    value = float(text)
    if not 0.0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number of seconds above 0, got {text}")
    return value


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from None


def add_bench_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `quire bench`."""
    add = parser.add_argument
    add("family", nargs="*", help=f"any of {', '.join(FAMILIES)} (default: all)")
    add("--list", action="store_true", help="list the families and exit")
    add("--case", type=_pattern, metavar="REGEX", help="only the cases in whose name this is found")
    add(
        "--device",
        help="cpu, cuda or cuda:N (default: cuda if this build, a GPU and torch or CuPy are there)",
    )
    add("--format", choices=FORMATS, default="md", help="%(choices)s (%(default)s)")
    add("--output", type=Path, metavar="FILE", help="write the report there instead of to the terminal")
    add("--plot", type=Path, metavar="FILE.png", help="also draw the times (needs matplotlib)")
    add("--quick", action="store_true", help="tiny shapes and few rounds: a smoke test, no measurement")
    add(
        "--peers",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="time other libraries beside ours (on)",
    )
    add(
        "--peer-limit",
        type=_seconds,
        default=300.0,
        metavar="S",
        help="seconds that a peer of an op may spend on attempts that fail, to compile say (%(default)g)",
    )
    add(
        "--ceilings",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="measure the machine's ceilings first (on)",
    )
    add(
        "--min-time",
        type=_seconds,
        metavar="S",
        help="seconds to spend on a case at least (0.5, --quick 0.02)",
    )
    add(
        "--threads",
        type=int,
        metavar="N",
        help="threads of the CPU kernels and of torch (default: all cores)",
    )
    add("--check", action="store_true", help="exit with 1 where a case misses its target")


def run_bench(args: argparse.Namespace) -> int:
    """Runs `quire bench`; returns the exit code."""
    try:
        return _bench(args)
    except BenchError as error:
        print(f"quire bench: {error}", file=sys.stderr)
        return 2


def _bench(args: argparse.Namespace) -> int:
    if args.list:
        for name, summary in FAMILIES.items():
            print(f"{name:<18} {summary}")
        return 0
    families = _families(args.family)
    _check_paths(args)
    extra = os.environ.get("QUIRE_BENCH_PEERS")
    if extra and args.peers:
        peers.load(extra)
    device = _device(args.device)
    library = arrays.for_device(device)
    _set_threads(args.threads)
    min_time = args.min_time or (0.02 if args.quick else 0.5)
    timer = make_timer(library, min_time, args.quick)
    context = Context(device, library, timer, args.quick, args.peers, peer_limit_s=args.peer_limit)
    report = Report(
        machine=_machine(context),
        settings={
            "device": device,
            "quick": args.quick,
            "min_time_s": min_time,
            "arrays": library.name,
            "method": _method(context),
        },
        skipped_peers=context.skipped_peers,
    )
    if "warning" in report.machine:
        print(f"quire bench: {report.machine['warning']}", file=sys.stderr)
    progress = _Progress()
    try:
        if args.ceilings:
            progress.show(0, 1, "measuring the machine's ceilings")
            report.ceilings, report.ceilings_how = measure_ceilings(context)
        if isinstance(timer, CudaTimer):
            report.floor_us = timer.floor_us()
        cases: list[tuple[str, Case]] = []
        modules = {family: importlib.import_module(f"quire.bench.{family}") for family in families}
        for family, module in modules.items():
            cases += [
                (family, case)
                for case in module.cases(context)
                if args.case is None or args.case.search(case.name)
            ]
        if not cases:
            raise BenchError(f"--case {args.case.pattern!r}: no case has this in its name")
        for number, (family, case) in enumerate(cases):
            progress.show(number, len(cases), f"{family}: {case.name}")
            report.results.append(measure(family, case, context, report.ceilings))
            gc.collect()  # the tensors of one case are gone before those of the next come
        for family, results in report.families().items():
            lines = against_peers(results) + against_ceilings(results)
            if hasattr(modules[family], "summary"):
                lines += modules[family].summary(results)
            if lines:
                report.summaries[family] = lines
    finally:
        progress.clear()
    _write(args, report)
    failed = [result for result in report.results if result.error]
    missed = [result for result in report.results if result.target_met is False]
    for result in failed:
        print(f"quire bench: {result.name} failed: {result.error}", file=sys.stderr)
    if args.check:
        for result in missed:
            print(f"quire bench: {result.name} missed its target {result.target}", file=sys.stderr)
    return 1 if failed or (args.check and missed) else 0


def _families(chosen: Sequence[str]) -> list[str]:
    unknown = [name for name in chosen if name not in FAMILIES]
    if unknown:
        raise BenchError(f"unknown family {unknown[0]!r}; there are {', '.join(FAMILIES)}")
    return [name for name in FAMILIES if name in chosen or not chosen]


def _check_paths(args: argparse.Namespace) -> None:
    """Finds a mistake in the arguments before minutes are spent on measuring."""
    for option, path in (("--output", args.output), ("--plot", args.plot)):
        if path is None:
            continue
        if path.is_dir():
            raise BenchError(f"{option} {path}: is a folder")
        if not path.absolute().parent.is_dir():
            raise BenchError(f"{option} {path}: no such folder")
    if args.plot is not None and not arrays.available("matplotlib"):
        raise BenchError("--plot needs matplotlib (pip install matplotlib)")


def _device(wanted: str | None) -> str:
    if wanted is None:
        usable = quire.has_cuda() and quire.num_cuda_devices() > 0
        return "cuda:0" if usable and (arrays.available("torch") or arrays.available("cupy")) else "cpu"
    if wanted == "cpu":
        return wanted
    match = re.fullmatch(r"cuda(?::(\d{1,4}))?", wanted)
    if match is None:
        raise BenchError(f"--device: expected cpu, cuda or cuda:N, got {wanted!r}")
    if not quire.has_cuda():
        raise BenchError("--device cuda: this build has no CUDA kernels (install with -C quire.cuda=pypi)")
    index, count = int(match[1] or 0), quire.num_cuda_devices()
    if index >= count:
        raise BenchError(f"--device {wanted}: the driver shows {count} GPUs; `quire doctor` says more")
    return f"cuda:{index}"


def _set_threads(count: int | None) -> None:
    if count is None:
        return
    try:
        quire.set_num_threads(count)
    except (ValueError, OverflowError) as error:
        raise BenchError(f"--threads: {error}") from None
    if arrays.available("torch"):
        import torch

        torch.set_num_threads(count)


def _method(context: Context) -> str:
    turns = "ours and the peers' in turn"
    if context.is_cuda:
        return (
            f"times are medians of device time by CUDA events, L2 flushed before each run, {turns}; "
            "of the border, the block allocator and CPU steps the best round of host time"
        )
    return f"times are the best round, {turns}"


def _machine(context: Context) -> dict[str, str]:
    """What a figure is worth nothing without."""
    cores = len(os.sched_getaffinity(0))
    found = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "quire": quire.__version__,
        "CPU": f"{_cpu_model()}, {cores} cores, {quire.cpu_isa()}, {quire.num_threads()} threads",
    }
    if context.is_cuda:
        found["GPU"] = _gpu(int(context.device.partition(":")[2] or 0))
        found["kernels built for"] = quire.cuda_architectures()
    versions = [f"Python {platform.python_version()}"]
    for name in ("numpy", "ml_dtypes", "torch", "cupy-cuda13x", "cupy-cuda12x", "flashinfer-python", "vllm"):
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    found["versions"] = ", ".join(versions)
    load = os.getloadavg()[0]
    if load > 0.5 * cores:
        found["warning"] = (
            f"load average {load:.1f} on {cores} cores: other processes take part in these figures; thread "
            "pools that wait for all their threads, as torch's, suffer most"
        )
    if context.quick:
        found["note"] = "--quick: tiny shapes and few rounds; these are no measurements"
    return found


def _cpu_model() -> str:
    try:
        match = re.search(
            r"^(?:model name|Model)\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE
        )
    except OSError:
        match = None
    return match[1].strip() if match else platform.processor() or platform.machine()


def _gpu(index: int) -> str:
    """Name, memory and driver as nvidia-smi tells them, by the index under CUDA_VISIBLE_DEVICES."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return "unknown (nvidia-smi is not on the PATH)"
    visible = [
        entry.strip() for entry in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if entry.strip()
    ]
    chosen = visible[index] if index < len(visible) else str(index)
    command = [
        program,
        f"--id={chosen}",
        "--query-gpu=name,memory.total,driver_version",
        "--format=csv,noheader",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown (nvidia-smi does not answer)"
    cells = [cell.strip() for cell in done.stdout.strip().split(",")]
    return f"{cells[0]}, {cells[1]}, driver {cells[2]}" if len(cells) == 3 else "unknown"


def _write(args: argparse.Namespace, report: Report) -> None:
    text = report.text(args.format)
    if args.output is None:
        sys.stdout.write(text)
    else:
        try:
            args.output.write_text(text, encoding="utf-8")
        except OSError as error:
            raise BenchError(f"--output {args.output}: {error.strerror or error}") from None
    if args.plot is not None:
        plot(report, args.plot)


class _Progress:
    """A bar on stderr, where that is a terminal."""

    def __init__(self) -> None:
        self._stream = sys.stderr if sys.stderr is not None and sys.stderr.isatty() else None

    def show(self, done: int, total: int, text: str) -> None:
        """Draws the bar for ``done`` of ``total`` cases."""
        if self._stream is None:
            return
        width = shutil.get_terminal_size().columns - 1
        filled = 20 * done // max(1, total)
        line = f"[{'#' * filled}{'-' * (20 - filled)}] {done}/{total} {text}"
        self._stream.write("\r\x1b[K" + line[:width])
        self._stream.flush()

    def clear(self) -> None:
        """Wipes the bar away."""
        if self._stream is not None:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
