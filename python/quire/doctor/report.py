"""The doctor's report for a terminal.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quire.doctor.judge import build_text, driver_version, gpus_of


def _gib(num_bytes: float | None) -> str:
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes else "unknown"


def _cuda_text(version: object) -> str:
    return f"{version // 1000}.{version % 1000 // 10}" if isinstance(version, int) else str(version)


def _feature_text(name: str, entry: Mapping[str, Any]) -> str:
    parts = [entry["version"] or "(unknown version)"]
    if "error" in entry:
        return f"{parts[0]}, broken: {' '.join(str(entry['error']).split())}"
    if entry.get("cuda"):
        parts.append(f"CUDA {_cuda_text(entry['cuda'])}")
    if "no_device" in entry:
        return ", ".join([*parts, "no GPU for it"])
    if "max_version" in entry:
        exported = entry["max_version"]
        parts.append(
            {"versioned": "DLPack 1.x", "unversioned": "DLPack 0.x"}.get(exported, f"no DLPack ({exported})")
        )
        parts.append("exchange API" if entry["c_exchange_api"] else "no exchange API")
        for label, dtype in (
            ("bf16", "bfloat16"),
            ("fp8_e4m3fn", "float8_e4m3fn"),
            ("fp8_e5m2", "float8_e5m2"),
        ):
            if entry[dtype] in ("versioned", "unversioned"):
                parts.append(label)
            elif name in ("numpy", "cupy") and "BufferError" in entry[dtype]:
                parts.append(f"{label} by relabelling" if name == "numpy" else f"no {label}")
            else:
                parts.append(f"no {label}")
        if "stream" in entry:
            parts.append("stream" if entry["stream"] == "versioned" else f"no stream ({entry['stream']})")
    return ", ".join(parts)


class _Report:
    """Lines in sections."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def section(self, title: str) -> None:
        self.lines.extend(["", title] if self.lines else [title])

    def row(self, label: str, value: object) -> None:
        self.lines.append(f"  {label:<12} {value}")

    def failed(self, part: Mapping[str, Any]) -> bool:
        """Whether this part could not be found out, which is a row then."""
        if "error" in part:
            self.row("error", part["error"])
        return "error" in part


def _environment(report: _Report, facts: Mapping[str, Any]) -> None:
    report.section("Environment")
    environment, package, cpu, memory = (facts[key] for key in ("environment", "package", "cpu", "memory"))
    if not report.failed(environment):
        report.row("system", ", ".join(environment[key] for key in ("os", "kernel", "machine", "libc")))
        report.row(
            "Python", f"{environment['python']} ({environment['abi'] or environment['implementation']})"
        )
        for name, value in environment["variables"].items():
            report.row(name, value)
    if not report.failed(package):
        tags = ", ".join(package["wheel_tags"]) or "unknown tag"
        report.row(
            "quire", f"{package['version']}, wheel {tags}{', editable' if package['editable'] else ''}"
        )
    if not report.failed(cpu):
        quota = f", quota {cpu['core_quota']:g}" if cpu["core_quota"] else ""
        report.row("CPU", f"{cpu['model']}, {cpu['cores_in_affinity']} of {cpu['cores']} cores{quota}")
        report.row("", " ".join(cpu["flags"]) or "no vector instructions known to the doctor")
    if not report.failed(memory):
        limit = f", limit {_gib(memory['limit_bytes'])}" if memory["limit_bytes"] else ""
        report.row(
            "memory", f"{_gib(memory['total_bytes'])}, {_gib(memory['available_bytes'])} available{limit}"
        )


def _gpus(report: _Report, facts: Mapping[str, Any]) -> None:
    report.section("GPUs")
    driver, gpus = facts["driver"], gpus_of(facts)
    supports = driver.get("cuda_version")
    if supports:
        report.row(
            "driver", f"{driver_version(facts) or 'unknown version'}, CUDA up to {_cuda_text(supports)}"
        )
    for gpu in gpus:
        major, minor = gpu["compute_capability"]
        report.row(
            f"GPU {gpu['index']}",
            f"{gpu['name']}, compute capability {major}.{minor}, {_gib(gpu['memory_bytes'])}",
        )
    if not gpus:
        report.row("none", driver.get("init_error") or driver.get("error") or "the driver shows none")


def _software(report: _Report, facts: Mapping[str, Any]) -> None:
    report.section("This build")
    core = facts["core"]
    if not report.failed(core):
        report.row("kernels", f"CPU ({core['cpu_isa']}, {core['num_threads']} threads); {build_text(core)}")
        report.row("extension", core["file"])
    report.section("Frameworks")
    for name, entry in facts["frameworks"].items():
        report.row(name, "not installed" if entry.get("version") is None else _feature_text(name, entry))
    if facts["cuda_libraries"]:
        report.section("CUDA libraries that each one loads")
        for name, paths in facts["cuda_libraries"].items():
            for path in paths:
                report.row(name, path)


def text(facts: Mapping[str, Any]) -> str:
    """The report."""
    report = _Report()
    _environment(report, facts)
    _gpus(report, facts)
    _software(report, facts)
    report.section("Verdict")
    for verdict in facts["verdicts"]:
        report.lines.append(f"  {verdict['level']:<5} {verdict['text']}")
        if verdict["fix"]:
            report.lines.append(f"        fix: {verdict['fix']}")
    return "\n".join(report.lines)
