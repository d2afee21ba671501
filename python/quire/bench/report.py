"""The benchmark's report as Markdown, JSON or CSV, and its plot.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from quire.bench import FAMILIES, BenchError
from quire.bench.harness import Fact, Result

__all__ = ["FORMATS", "Report", "against_ceilings", "against_peers", "number", "plot"]

FORMATS = ("md", "json", "csv")


@dataclass
class Report:
    """Everything that a run found."""

    machine: dict[str, str]
    settings: dict[str, Any]
    ceilings: dict[str, float] = field(default_factory=dict)
    ceilings_how: dict[str, str] = field(default_factory=dict)
    floor_us: float | None = None
    results: list[Result] = field(default_factory=list)
    summaries: dict[str, list[str]] = field(default_factory=dict)  # by family: what its figures come to
    skipped_peers: dict[str, str] = field(default_factory=dict)

    def text(self, form: str) -> str:
        """The report in one of FORMATS."""
        return {"md": self._markdown, "json": self._json, "csv": self._csv}[form]()

    def families(self) -> dict[str, list[Result]]:
        """The results by family, in the order of the run."""
        found: dict[str, list[Result]] = {}
        for result in self.results:
            found.setdefault(result.family, []).append(result)
        return found

    def _json(self) -> str:
        return json.dumps({"schema": 1, **asdict(self)}, indent=2, ensure_ascii=False) + "\n"

    def _csv(self) -> str:
        """One row for each case and implementation."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        columns = ["family", "case", "device", "implementation", "us", "median_us", "gb_per_s", "tflop_per_s"]
        writer.writerow(
            [
                *columns,
                "percent_of_ceiling",
                "ceiling",
                "speedup_of_quire",
                "target",
                "target_met",
                "facts",
                "error",
            ]
        )
        device = self.settings.get("device", "")
        for r in self.results:
            median = r.sample.median_us if r.sample else None
            rates = [r.gb_per_s, r.tflop_per_s, r.percent_of_ceiling]
            cells = [_csv_number(value) for value in (r.us, median, *rates)]
            met = "" if r.target_met is None else str(r.target_met).lower()
            facts = "; ".join(f"{name}: {_fact(value)}" for name, value in {**r.facts, **r.shares}.items())
            writer.writerow(
                [
                    r.family,
                    r.name,
                    device,
                    r.implementation,
                    *cells,
                    r.ceiling,
                    "",
                    r.target,
                    met,
                    facts,
                    r.error,
                ]
            )
            for name, us in r.peers.items():
                speedup = _csv_number(r.speedups.get(name))
                writer.writerow(
                    [r.family, r.name, device, name, _csv_number(us), *[""] * 5, speedup, *[""] * 4]
                )
        return text.getvalue()

    def _markdown(self) -> str:
        lines = ["# quire benchmarks", ""]
        lines += [f"- {key}: {value}" for key, value in self.machine.items()]
        for name, rate in self.ceilings.items():
            unit = "TFLOP/s" if name == "matmul" else "GB/s"
            lines.append(f"- ceiling, {name}: {number(rate)} {unit} ({self.ceilings_how.get(name, '')})")
        if self.floor_us is not None:
            lines.append(
                f"- a kernel that does nothing: {number(self.floor_us)} µs by this timer, in every figure"
            )
        lines.append(f"- {self.settings['method']}")
        for family, results in self.families().items():
            lines += ["", f"## {family}", "", FAMILIES.get(family, "")]
            timed, shared = [r for r in results if not r.shares], [r for r in results if r.shares]
            lines += ["", *_table(timed)] if timed else []
            lines += ["", *_shares_table(shared)] if shared else []
            summary = self.summaries.get(family)
            lines += ["", *(f"- {line}" for line in summary)] if summary else []
        errors = [result for result in self.results if result.error]
        if errors:
            lines += ["", "## Failed", "", *(f"- {result.name}: {result.error}" for result in errors)]
        if self.skipped_peers:
            lines += [
                "",
                "## Peers left out",
                "",
                *(f"- {name}: {why}" for name, why in sorted(self.skipped_peers.items())),
            ]
        return "\n".join(lines) + "\n"


def against_peers(results: Sequence[Result]) -> list[str]:
    """A line for each group of cases: how many times as fast as the best peer, on average and at worst."""
    groups: dict[str, list[tuple[float, str, str]]] = {}
    for r in results:
        ranked = {name: us for name, us in r.peers.items() if name not in r.unranked}
        if r.us and ranked:
            best = min(ranked, key=ranked.__getitem__)
            groups.setdefault(r.group, []).append((ranked[best] / r.us, r.name, best))
    lines = []
    for group, found in groups.items():
        mean = math.exp(math.fsum(math.log(ratio) for ratio, _, _ in found) / len(found))
        worst, name, peer = min(found)
        ahead = sum(ratio >= 1.0 for ratio, _, _ in found)
        lines.append(
            f"{group} against the best peer of each case: geometric mean {mean:.2f}x, ahead in {ahead} of {len(found)}, "
            f"worst {worst:.2f}x ({name}; {peer})"
        )
    return lines


def against_ceilings(results: Sequence[Result]) -> list[str]:
    """A line for each group: how near its larger cases come to the machine's ceiling."""
    groups: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for r in results:
        rate = r.tflop_per_s if r.ceiling == "matmul" else r.gb_per_s
        if r.implementation == "quire" and r.us and rate and r.percent_of_ceiling is not None:
            groups.setdefault((r.group, r.ceiling), []).append((rate * r.us, r.percent_of_ceiling))
    lines = []
    for (group, ceiling), found in groups.items():
        most = max(work for work, _ in found)
        percents = [percent for work, percent in found if work >= most / 2]
        few, many = f"{min(percents):.0f}", f"{max(percents):.0f}"
        span = few if few == many else f"{few} to {many}"
        lines.append(
            f"{group}: {span} % of the ceiling ({ceiling}) in its largest cases ({len(percents)} of {len(found)})"
        )
    return lines


def number(value: float | None) -> str:
    """Three significant digits, without an exponent."""
    if value is None:
        return ""
    if 0.0 < abs(value) < 1e-4:
        return f"{value:.{2 - math.floor(math.log10(abs(value)))}f}"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.3g}"


def _fact(value: Fact) -> str:
    return value if isinstance(value, str) else number(value)


def _csv_number(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def _unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _table(results: Sequence[Result]) -> list[str]:
    """A Markdown table with only the columns that have something in them."""
    peers = _unique(name for result in results for name in result.peers)
    times = ["failed" if r.error else "–" if r.us is None else number(r.us) for r in results]
    header, rows = ["case", "µs"], [[r.name, cell] for r, cell in zip(results, times)]

    def column(title: str, cells: Sequence[str]) -> None:
        if any(cells):
            header.append(title)
            for row, cell in zip(rows, cells):
                row.append(cell)

    column("GB/s", [number(r.gb_per_s) for r in results])
    column("TFLOP/s", [number(r.tflop_per_s) for r in results])
    percents = [f"{r.percent_of_ceiling:.0f} %" if r.percent_of_ceiling is not None else "" for r in results]
    column("of ceiling", percents)
    for peer in peers:
        column(f"{peer}, µs", [number(r.peers.get(peer)) for r in results])
        column(f"{peer} / quire", [f"{r.speedups[peer]:.2f}x" if peer in r.speedups else "" for r in results])
    for fact in _unique(name for result in results for name in result.facts):
        column(fact, [_fact(r.facts.get(fact, "")) for r in results])
    verdict = {True: "met", False: "MISSED", None: "not judged"}
    column("target", [f"{r.target}: {verdict[r.target_met]}" if r.target else "" for r in results])
    return _aligned(header, rows)


def _shares_table(results: Sequence[Result]) -> list[str]:
    """A Markdown table of parts of a whole."""
    shares = _unique(name for result in results for name in result.shares)
    facts = _unique(name for result in results for name in result.facts)
    rows = [
        [
            r.name,
            *(f"{r.shares[share]:.1f} %" if share in r.shares else "" for share in shares),
            *(_fact(r.facts.get(fact, "")) for fact in facts),
        ]
        for r in results
    ]
    return _aligned(["case", *shares, *facts], rows)


def _aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cells[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(cells[1:], widths[1:])),
        ]
        return f"| {' | '.join(padded)} |"

    rule = (
        "|" + "|".join("-" * (width + 1) + ("-" if i == 0 else ":") for i, width in enumerate(widths)) + "|"
    )
    return [line(header), rule, *(line(row) for row in rows)]


def plot(report: Report, path: Path) -> None:
    """Draws each family's times, ours beside the peers', on a log axis, and shares as bars. BenchError without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise BenchError(f"--plot needs matplotlib (pip install matplotlib): {error}") from None
    drawn = [
        (family, [result for result in results if (result.us is not None, bool(result.shares)) == kind])
        for family, results in report.families().items()
        for kind in ((True, False), (False, True))
    ]
    panels = [(family, results) for family, results in drawn if results]
    if not panels:
        raise BenchError("--plot: no case gave a time")
    heights = [len(results) * 0.28 + 0.9 for _, results in panels]
    figure = Figure(figsize=(11, sum(heights) + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(
        " · ".join(value for key, value in report.machine.items() if key in ("quire", "CPU", "GPU", "date")),
        fontsize=9,
    )
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    implementations = _unique(["quire", *(name for result in report.results for name in result.peers)])
    for axis, (family, results) in zip(axes, panels):
        places = range(len(results))
        axis.set_yticks(list(places), [result.name for result in results], fontsize=7)
        axis.set_title(family, fontsize=9, loc="left")
        if results[0].shares:
            _draw_shares(axis, results)
            continue
        here = {"quire", *(name for result in results for name in result.peers)}
        for number, name in enumerate(implementations):
            if name not in here:
                continue
            marker = "osD^v<>PhX"[number % 10]
            points = [
                (us, place)
                for place, result in zip(places, results)
                if (us := result.us if name == "quire" else result.peers.get(name)) is not None
            ]
            x, y = [point[0] for point in points], [point[1] for point in points]
            axis.plot(
                x,
                y,
                marker,
                color=f"C{number % 10}",
                label=name,
                markersize=6 if name == "quire" else 5,
                alpha=1.0 if name == "quire" else 0.7,
            )
        axis.set_xscale("log")
        axis.invert_yaxis()
        axis.grid(True, axis="x", which="both", alpha=0.25)
        if len(here) > 1:
            axis.legend(fontsize=7, loc="best")
        axis.set_xlabel("µs (less is better)", fontsize=8)
    try:
        figure.savefig(path, dpi=120, format="png")
    except OSError as error:
        raise BenchError(f"--plot {path}: {error.strerror or error}") from None


def _draw_shares(axis: Any, results: Sequence[Result]) -> None:
    left = [0.0] * len(results)
    for number, name in enumerate(_unique(name for result in results for name in result.shares)):
        widths = [result.shares.get(name, 0.0) for result in results]
        axis.barh(range(len(results)), widths, left=left, color=f"C{number % 10}", label=name)
        left = [a + b for a, b in zip(left, widths)]
    axis.invert_yaxis()
    axis.set_xlabel("%", fontsize=8)
    axis.legend(fontsize=7, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=len(results[0].shares))
