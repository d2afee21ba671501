"""The command line: `quire` and `python -m quire`.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

__all__ = ["main"]

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130


@dataclass(frozen=True)
class Command:
    """A subcommand: the module with its two functions is imported only when it is chosen."""

    module: str
    add_arguments: str
    run: str
    summary: str
    description: str
    epilog: str = ""


COMMANDS = {
    "doctor": Command(
        "quire.doctor",
        "add_doctor_arguments",
        "run_doctor",
        "report on this machine and this build, with a fix for each problem",
        "Reports the environment, the GPUs and their driver, what this build of quire contains, and which "
        "array frameworks are here with which of their DLPack features. Ends with verdict lines, each with a "
        "fix. Changes nothing, opens no connection, and runs where everything else is broken.",
        "exit code: 0 when quire is usable, 1 when a verdict is 'fail'",
    ),
    "bench": Command(
        "quire.bench.command",
        "add_bench_arguments",
        "run_bench",
        "measure the kernels, beside torch and other libraries where they are installed",
        "Measures op families with their peers in one run, against ceilings that are measured first.",
        "examples:\n"
        "  quire bench                            every family on the best device\n"
        "  quire bench norm attention --quick     a smoke test in seconds\n"
        "  quire bench attention --device cuda --format json --output attention.json --plot attention.png\n\n"
        "QUIRE_BENCH_PEERS=FILE.py adds peers of your own: the file defines register(add) and calls\n"
        "add(op, name, factory); see quire/bench/peers.py for the ops and their tensors.\n"
        "QUIRE_BENCH_PEERS=FOLDER names the shared objects of an unpacked vLLM wheel, where vLLM cannot be imported.\n\n"
        "exit code: 0 ok, 1 when a case failed (or, with --check, missed its target), 2 for a wrong argument",
    ),
    "demo": Command(
        "quire.demo.cli",
        "add_demo_arguments",
        "run_demo",
        "generate text with the model that ships with quire",
        "Runs a continuous-batching generator on quire's kernels with a small model of the package's own.",
    ),
    "generate": Command(
        "quire.demo.cli",
        "add_generate_arguments",
        "run_generate",
        "generate text with a checkpoint in Hugging Face format",
        "Generates text with a Llama, Mistral, Qwen2, Qwen3 or Gemma2 checkpoint on NumPy or CuPy.",
    ),
}


class _Version(argparse.Action):
    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        try:
            version = importlib.metadata.version("quire")
        except importlib.metadata.PackageNotFoundError:
            version = "(not installed)"
        print(f"quire {version}")
        parser.exit(EXIT_OK)


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, Callable[[argparse.Namespace], int]]:
    """Parses the arguments. Raises SystemExit as argparse does, ImportError if the command cannot load."""
    parser = argparse.ArgumentParser(
        prog="quire",
        description="Kernels for LLM inference on any DLPack tensor, on CPU and CUDA.",
        epilog="`quire COMMAND --help` tells about a command. Exit codes: 0 ok, 1 failed, 2 a wrong argument or a user's "
        "mistake, 130 interrupted.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    chosen = next((argument for argument in argv if not argument.startswith("-")), None)
    run: Callable[[argparse.Namespace], int] | None = None
    for name, command in COMMANDS.items():
        sub = subparsers.add_parser(
            name,
            help=command.summary,
            description=command.description,
            epilog=command.epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter
            if "\n" in command.epilog
            else argparse.HelpFormatter,
        )
        if name == chosen:
            module = importlib.import_module(command.module)
            getattr(module, command.add_arguments)(sub)
            run = getattr(module, command.run)
    args = parser.parse_args(argv)
    assert run is not None  # argparse accepts no other command than those
    return args, run


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code: 0 ok, 1 failed, 2 a user's mistake, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        try:
            args, run = _parse(arguments)
        except SystemExit as stop:
            return stop.code if isinstance(stop.code, int) else EXIT_USAGE
        except ImportError as error:
            print(f"quire: {arguments[0]} cannot start: {error}. `quire doctor` says more.", file=sys.stderr)
            return EXIT_FAILED
        code = run(args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        with contextlib.suppress(OSError):
            print(file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has left. Nothing may be written to it at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main())
