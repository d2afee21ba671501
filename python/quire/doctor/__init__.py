"""`quire doctor`: what this machine and this build have, and a verdict with a fix for each problem.

SPDX-License-Identifier: Apache-2.0

Nothing here imports more than the standard library.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from quire.doctor import report
from quire.doctor.facts import FRAMEWORKS, Facts, find
from quire.doctor.judge import Verdict, architecture_support, verdicts

__all__ = [
    "FRAMEWORKS",
    "Verdict",
    "add_doctor_arguments",
    "architecture_support",
    "examine",
    "run_doctor",
    "verdicts",
]


def examine(*, frameworks: bool = True, timeout: float = 60.0) -> Facts:
    """Everything that the doctor knows, as plain data for JSON. Never raises.

    Args:
        frameworks: Whether to import each array framework in a child process and try its DLPack features.
        timeout: Seconds that a child process may take.
    """
    facts = find(frameworks=frameworks, timeout=timeout)
    facts["verdicts"] = [asdict(verdict) for verdict in verdicts(facts)]
    return facts


def add_doctor_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `quire doctor`."""
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument(
        "--no-frameworks", action="store_true", help="do not import the array frameworks (faster)"
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=60.0,
        metavar="S",
        help="seconds that each probe may take (%(default)s)",
    )


def run_doctor(args: argparse.Namespace) -> int:
    """Runs `quire doctor`; returns the exit code."""
    facts = examine(frameworks=not args.no_frameworks, timeout=args.timeout if args.timeout > 0 else 60.0)
    print(json.dumps(facts, indent=2) if args.json else report.text(facts))
    return 1 if any(verdict["level"] == "fail" for verdict in facts["verdicts"]) else 0
