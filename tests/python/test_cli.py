"""The command line: help, exit codes, the doctor where things are broken, every benchmark family.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import csv
import importlib
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from op_cases import ops_of_families

from quire import doctor
from quire.__main__ import main
from quire.bench import FAMILIES, command, peers, report
from quire.bench.arrays import NumpyArrays
from quire.bench.harness import Case, Context, Result, Target, Timer, Work, measure

COMMANDS = ("doctor", "bench", "demo", "generate")
NO_GPU = {
    "driver": {"error": "OSError: libcuda.so.1: no such file"},
    "nvidia_smi": {"error": "not on the PATH"},
}


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def spawn(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "quire", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
    )


def first_on_the_path(folder: Path) -> str:
    """PYTHONPATH with a folder before what is on it: this install may be on it too."""
    return os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])


def last_json(text: str) -> dict:
    """An editable install may build, and say so, before the first line of ours."""
    return json.loads(text[text.index("\n{\n") if not text.startswith("{") else 0 :])


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command(capsys: pytest.CaptureFixture[str], name: str) -> None:
    code, out, err = run(capsys, name, "--help")
    assert code == 0
    assert f"usage: quire {name}" in out
    assert not err


def test_every_op_is_measured() -> None:
    """On a CPU or a GPU, for which swap_blocks is; cases are made without one."""
    contexts = [Context(d, NumpyArrays(), Timer(0.001, quick=True), quick=True) for d in ("cpu", "cuda:0")]
    families = [importlib.import_module(f"quire.bench.{family}") for family in FAMILIES if family != "border"]
    cases = [f"{c.op} {c.name}" for context in contexts for family in families for c in family.cases(context)]
    missing = [op for op in ops_of_families() if not any(re.search(rf"\b{op}(_|\b)", case) for case in cases)]
    assert missing == []


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_on_the_page(capsys: pytest.CaptureFixture[str], name: str) -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "cli.md"
    if not page.exists():
        pytest.skip("the source tree is not there")
    options = set(re.findall(r"--[a-z][a-z-]*", run(capsys, name, "--help")[1])) - {"--help"}
    named = set(re.findall(r"--[a-z][a-z-]*", page.read_text(encoding="utf-8")))
    assert len(options) > 2
    assert options - named == set()


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--help")
    assert code == 0
    assert all(name in out for name in COMMANDS)
    code, out, _ = run(capsys, "--version")
    assert code == 0
    assert out.startswith("quire ")


@pytest.mark.parametrize(
    "arguments", [(), ("nonsense",), ("doctor", "--nonsense"), ("bench", "--min-time", "-1")]
)
def test_a_wrong_argument_is_exit_code_2(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    code, out, err = run(capsys, *arguments)
    assert code == 2
    assert "quire" in err
    assert not out


def test_a_command_that_cannot_load_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "quire.bench.command", None)
    code, _, err = run(capsys, "bench")
    assert code == 1
    assert err.count("\n") == 1
    assert "quire doctor" in err


def test_interrupt_and_broken_pipe(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "_bench", interrupt)
    assert run(capsys, "bench")[0] == 130
    # A reader that has left, as in `quire bench --list | true`.
    script = (
        "import os, sys, quire\n"
        "from quire.__main__ import main\n"
        "reader, writer = os.pipe()\n"
        "os.close(reader)\n"
        "os.dup2(writer, 1)\n"
        "sys.exit(main(['bench', '--list']))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr


# ---- doctor ------------------------------------------------------------------------------------


def test_doctor_here(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "doctor", "--json")
    facts = json.loads(out)
    assert not err
    assert code == (1 if any(verdict["level"] == "fail" for verdict in facts["verdicts"]) else 0)
    assert "error" not in facts["core"]
    assert facts["core"]["cpu_isa"]
    numpy = facts["frameworks"]["numpy"]
    assert numpy["max_version"] == "versioned"
    assert numpy["c_exchange_api"] is False
    if importlib.util.find_spec("torch") is not None:
        torch = facts["frameworks"]["torch"]
        assert "error" not in torch
        assert torch["bfloat16"] == torch["float8_e4m3fn"] == "versioned"


def test_doctor_with_everything_broken(tmp_path: Path) -> None:
    """A torch that raises, a jax that dies, a tokenizers that hangs, no programs, no extension."""
    (tmp_path / "torch.py").write_text("raise RuntimeError('half an install')\n")
    (tmp_path / "jax.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    (tmp_path / "tokenizers.py").write_text("import time\ntime.sleep(600)\n")
    blocked = "import sys\nsys.modules['quire._core'] = None\n"
    (tmp_path / "sitecustomize.py").write_text(blocked)
    done = spawn("doctor", "--json", "--timeout", "12", PYTHONPATH=first_on_the_path(tmp_path), PATH="")
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    facts = last_json(done.stdout)
    assert "half an install" in facts["frameworks"]["torch"]["error"]
    assert "SIGKILL" in facts["frameworks"]["jax"]["error"]
    assert "no answer" in facts["frameworks"]["tokenizers"]["error"]
    assert "error" in facts["nvidia_smi"]
    levels = {verdict["level"]: verdict for verdict in facts["verdicts"]}
    assert "quire._core" in levels["fail"]["text"]
    assert all(verdict["fix"] for verdict in facts["verdicts"] if verdict["level"] != "ok")


BROKEN = "import sys\nsys.modules['quire._core'] = None\n"


def spawn_python(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": first_on_the_path(tmp_path)}
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


@pytest.mark.parametrize("program", ["mypkg", "quire_app", "tool"])
@pytest.mark.parametrize("broken", [False, True])
def test_another_programs_doctor_is_not_ours(tmp_path: Path, program: str, broken: bool) -> None:
    """A subcommand of that name elsewhere gets the whole package, or the ImportError at once."""
    for place in ("__init__.py", "__main__.py"):
        (tmp_path / program).mkdir(exist_ok=True)
        (tmp_path / program / place).write_text("import quire\nprint('rms_norm' in vars(quire))\n")
    if broken:
        (tmp_path / "sitecustomize.py").write_text(BROKEN)
    done = spawn_python(tmp_path, "-m", program, "doctor", "quire", "doctor")
    if broken:
        assert done.returncode == 1
        assert "quire._core" in done.stderr.splitlines()[-1]
    else:
        assert done.returncode == 0, done.stderr
        assert done.stdout.split()[-2:] == ["True", "True"]


@pytest.mark.parametrize("module", [("-m", "quire"), ("-mquire",), ("-Im", "quire")])
@pytest.mark.parametrize("broken", [False, True])
def test_under_the_doctor_the_first_use_imports(
    tmp_path: Path, module: tuple[str, ...], broken: bool
) -> None:
    script = (
        f"import sys\nsys.argv, sys.orig_argv = ['-m', 'doctor'], ['python', *{module!r}, 'doctor']\n"
        "import quire\nassert 'rms_norm' not in vars(quire)\n"
        "for _ in range(2):\n"
        "    try:\n"
        "        from quire import rms_norm\n"
        "        print(quire.__version__, quire.paged_attention.__name__)\n"
        "    except ImportError as error:\n"
        "        print(error)\n"
        "assert not hasattr(quire, 'nonsense')\n"
    )
    if broken:
        script = BROKEN + script
    done = spawn_python(tmp_path, "-c", script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("quire._core" if broken else "paged_attention") == 2


def test_doctor_as_console_script(tmp_path: Path) -> None:
    """The script that pip writes, where the extension cannot be loaded."""
    (tmp_path / "sitecustomize.py").write_text(BROKEN)
    script = tmp_path / "quire"
    script.write_text("import sys\nfrom quire.__main__ import main\nsys.exit(main())\n")
    done = spawn_python(tmp_path, str(script), "doctor", "--json", "--no-frameworks")
    assert done.returncode == 1, done.stderr
    assert "quire._core" in last_json(done.stdout)["core"]["error"]


def test_doctor_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "doctor", "--no-frameworks")
    assert code in (0, 1)
    for title in ("Environment", "GPUs", "This build", "Frameworks", "Verdict"):
        assert f"\n{title}\n" in "\n" + out


@pytest.mark.parametrize(
    ("architectures", "capability", "expected"),
    [
        ("90a-real;80-virtual", (9, 0), "machine code"),
        ("90a-real;80-virtual", (8, 0), "PTX"),
        ("90a-real 80-virtual", (12, 0), "PTX"),
        ("90a", (10, 0), "none"),
        ("80", (8, 6), "machine code"),
        ("86", (8, 0), "none"),
        ("100f", (10, 3), "machine code"),
        ("100f", (12, 0), "none"),
        ("120-real", (12, 1), "machine code"),
        ("", (9, 0), "none"),
    ],
)
def test_architecture_support(architectures: str, capability: tuple[int, int], expected: str) -> None:
    assert doctor.architecture_support(architectures, capability) == expected


def _facts(**changes: object) -> dict:
    facts = {
        "environment": {"python": "3.12.1", "variables": {}},
        "package": {"version": "1"},
        "cpu": {},
        "driver": {
            "cuda_version": 13000,
            "devices": [{"index": 0, "name": "GPU", "memory_bytes": 1, "compute_capability": [9, 0]}],
        },
        "nvidia_smi": {
            "devices": [
                {
                    "index": "0",
                    "name": "GPU",
                    "memory.total": "1",
                    "driver_version": "580.95",
                    "compute_cap": "9.0",
                }
            ]
        },
        "core": {
            "version": "1",
            "cpu_isa": "avx2",
            "num_threads": 2,
            "has_cuda": True,
            "cuda_architectures": "90a-real 80-virtual",
            "cuda_runtime_version": 13000,
            "num_cuda_devices": 1,
        },
        "frameworks": {name: {"version": "9"} for name in doctor.FRAMEWORKS},
    }
    for key, value in changes.items():
        facts[key] = {**facts[key], **value} if isinstance(value, dict) else value
    return facts


@pytest.mark.parametrize(
    ("changes", "level", "text"),
    [
        ({}, "ok", "machine code"),
        (NO_GPU, "ok", "no GPU"),
        ({"core": {"cuda_architectures": "80"}}, "warn", "PTX only"),
        ({"core": {"cuda_architectures": "120-real"}}, "fail", "no kernel of this build"),
        (
            {
                "driver": {
                    "devices": [{"index": 0, "name": "GPU", "memory_bytes": 1, "compute_capability": [7, 5]}]
                }
            },
            "fail",
            "need compute capability 8.0",
        ),
        ({"core": {"has_cuda": False}}, "warn", "no CUDA kernels"),
        ({"core": {"num_cuda_devices": 0}}, "fail", "sees none"),
        ({"core": {"cuda_runtime_version": 14000, "num_cuda_devices": 0}}, "fail", "sees none"),
        ({"core": {"error": "ImportError: version `GLIBC_2.40' not found"}}, "fail", "GLIBC_2.40"),
        ({"core": {"cpu_isa": "scalar"}}, "warn", "no vector instructions"),
        ({"environment": {"variables": {"QUIRE_CPU_ISA": "avx2"}}}, "warn", "holds the CPU kernels at avx2"),
        ({"environment": {"variables": {"QUIRE_CPU_ISA": "avx512"}}}, "ok", "CPU kernels: avx2"),
        ({"environment": {"variables": {"QUIRE_CPU_ISA": "sse"}}}, "warn", "'sse' is none of scalar, avx2"),
        (
            {"environment": {"variables": {"QUIRE_NUM_THREADS": "two"}}},
            "warn",
            "'two' is no number of threads",
        ),
        ({"cpu": {"core_quota": 2.0, "cores_in_affinity": 64}}, "warn", "may use 2"),
        ({"environment": {"python": "3.9.1"}}, "fail", "too old"),
        ({"environment": {"variables": {"QUIRE_SYNC": "1"}}}, "warn", "QUIRE_SYNC"),
        (
            {"environment": {"variables": {"QUIRE_SYNC": "true"}}},
            "warn",
            "QUIRE_SYNC=true counts for nothing",
        ),
        (
            {
                "driver": {"devices": [], "init_error": "cuInit: CUDA_ERROR_UNKNOWN"},
                "nvidia_smi": {"devices": []},
            },
            "warn",
            "UNKNOWN",
        ),
        ({"frameworks": {"numpy": {"version": None}}}, "fail", "NumPy is missing"),
        ({"frameworks": {"torch": {"version": "2.4", "c_exchange_api": False}}}, "warn", "exchange API"),
        ({"cpu": None}, "warn", "no verdict"),
    ],
)
def test_verdicts(changes: dict, level: str, text: str) -> None:
    facts = _facts(**changes)
    if "error" in facts["driver"]:
        facts["driver"], facts["nvidia_smi"] = NO_GPU["driver"], NO_GPU["nvidia_smi"]
    found = [verdict for verdict in doctor.verdicts(facts) if text in verdict.text]
    assert [verdict.level for verdict in found] == [level]
    assert level == "ok" or found[0].fix


def test_an_old_driver_is_named() -> None:
    facts = _facts()
    facts["nvidia_smi"]["devices"][0]["driver_version"] = "550.54.14"
    assert any(
        "550.54.14 is older" in verdict.text and verdict.level == "fail" for verdict in doctor.verdicts(facts)
    )


# ---- bench -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_bench_quick(capsys: pytest.CaptureFixture[str], tmp_path: Path, family: str) -> None:
    """Each family runs with its peers, and a report comes in each format."""
    output = tmp_path / "report.json"
    arguments = ("bench", family, "--quick", "--device", "cpu", "--no-ceilings", "--min-time", "0.001")
    code, out, err = run(capsys, *arguments, "--format", "json", "--output", str(output))
    assert (code, out) == (0, "")
    assert not err or "load average" in err
    found = json.loads(output.read_text())
    assert found["results"]
    assert {result["family"] for result in found["results"]} == {family}
    assert not any(result["error"] for result in found["results"])
    timed = [result for result in found["results"] if not result["facts"] or result["us"] is not None]
    assert timed
    assert all(result["us"] > 0 for result in timed)
    assert found["settings"]["device"] == "cpu"
    assert "date" in found["machine"]


@pytest.mark.parametrize("form", ["md", "csv"])
def test_bench_formats(capsys: pytest.CaptureFixture[str], form: str) -> None:
    code, out, _ = run(
        capsys, "bench", "activation", "--quick", "--device", "cpu", "--format", form, "--min-time", "0.001"
    )
    assert code == 0
    if form == "md":
        assert "## activation" in out
        assert "ceiling, copy" in out
        table = [line for line in out.splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in table}) == 1
    else:
        rows = list(csv.DictReader(io.StringIO(out)))
        assert {"quire"} <= {row["implementation"] for row in rows}
        assert all(float(row["us"]) > 0 for row in rows)


def test_bench_plot(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "plot.png"
    arguments = (
        "bench",
        "norm",
        "--quick",
        "--device",
        "cpu",
        "--no-ceilings",
        "--no-peers",
        "--plot",
        str(path),
    )
    code, _, err = run(capsys, *arguments)
    if importlib.util.find_spec("matplotlib") is None:
        assert code == 2
        assert "pip install matplotlib" in err
    else:
        assert code == 0
        assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("nonsense",), "unknown family 'nonsense'"),
        (("norm", "--device", "tpu"), "expected cpu, cuda or cuda:N"),
        (("norm", "--device", "cuda:4096"), "cuda"),
        (("norm", "--output", "/nonexistent/report"), "no such folder"),
        (("norm", "--plot", "/"), "is a folder"),
        (("norm", "--device", "cpu", "--threads", "0"), "--threads"),
    ],
)
def test_bench_mistakes_are_one_line(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], text: str
) -> None:
    code, out, err = run(capsys, "bench", "--quick", *arguments)
    assert code == 2
    assert not out
    assert text in err
    assert err.count("\n") == 1


def test_bench_one_case(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("bench", "norm", "--quick", "--device", "cpu", "--no-ceilings", "--min-time", "0.001")
    code, out, _ = run(capsys, *arguments, "--format", "json", "--case", "^layer_norm.*float32$")
    assert code == 0
    assert [result["name"] for result in json.loads(out)["results"]] == ["layer_norm T16 H1024 float32"]
    assert run(capsys, *arguments, "--case", "(")[0] == 2
    code, _, err = run(capsys, *arguments, "--case", "nonsense")
    assert code == 2
    assert "no case has this in its name" in err


def test_bench_list(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "bench", "--list")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == list(FAMILIES)


def test_peers_from_a_file(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    monkeypatch.setattr(peers, "_registered", {})
    path = tmp_path / "peers.py"
    path.write_text(
        "def register(add):\n"
        "    add('silu_and_mul', 'mine', lambda *, out, x: lambda: None)\n"
        "    add('silu_and_mul', 'absent', lambda *, out, x: __import__('no_such_library'))\n"
    )
    monkeypatch.setenv("QUIRE_BENCH_PEERS", str(path))
    arguments = ("bench", "activation", "--quick", "--device", "cpu", "--no-ceilings", "--min-time", "0.001")
    code, out, _ = run(capsys, *arguments, "--format", "json")
    assert code == 0
    found = json.loads(out)
    assert "mine" in found["results"][0]["peers"]
    assert any(line.startswith("silu_and_mul against") for line in found["summaries"]["activation"])
    assert "no_such_library" in found["skipped_peers"]["absent"]
    path.write_text("nonsense(\n")
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert err.count("\n") == 1


def test_a_peer_that_takes_too_long_or_fails_is_left_out(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    monkeypatch.setattr(peers, "_registered", {})
    path, calls = tmp_path / "peers.py", tmp_path / "calls"
    calls.write_text("")
    path.write_text(
        "import pathlib, subprocess, time\n"
        "def compile(**_):\n"
        f"    calls = pathlib.Path({str(calls)!r})\n"
        "    calls.write_text(calls.read_text() + 'x')\n"
        "    subprocess.run(['sleep', '60'], check=True)\n"
        "def broken(**_):\n"
        "    raise RuntimeError('Ninja build failed.\\nerror: no such header')\n"
        "def register(add):\n"
        "    add('silu_and_mul', 'slow to make', compile)\n"
        "    add('silu_and_mul', 'slow to run', lambda **_: lambda: time.sleep(60))\n"
        "    add('silu_and_mul', 'broken', broken)\n"
        "    add('silu_and_mul', 'good', lambda **_: lambda: None)\n"
    )
    monkeypatch.setenv("QUIRE_BENCH_PEERS", str(path))
    arguments = ("bench", "activation", "--quick", "--device", "cpu", "--no-ceilings", "--min-time", "0.001")
    start = time.perf_counter()
    code, out, _ = run(
        capsys, *arguments, "--format", "json", "--case", "^silu_and_mul T", "--peer-limit", "0.2"
    )
    assert time.perf_counter() - start < 30
    assert code == 0
    found = json.loads(out)
    assert [
        set(result["peers"]) & {"good", "broken", "slow to make", "slow to run"}
        for result in found["results"]
    ] == [{"good"}] * len(found["results"])
    assert len(found["results"]) > 1
    reasons = found["skipped_peers"]
    assert "took too long" in reasons["silu_and_mul: slow to make"]
    assert "took too long" in reasons["silu_and_mul: slow to run"]
    assert reasons["silu_and_mul: broken"] == "RuntimeError: Ninja build failed. error: no such header"
    assert calls.read_text() == "x"  # not tried again for the next case


def test_blocks_as_flashinfer_wants_them() -> None:
    torch = pytest.importorskip("torch")
    tables = torch.tensor([[7, 2, 0], [4, 0, 0], [1, 5, 3]], dtype=torch.int32)
    lens = torch.tensor([20, 16, 48], dtype=torch.int32)
    starts, blocks, last = peers._flashinfer_blocks(tables, lens, 16)
    assert starts.tolist() == [0, 2, 3, 6]
    assert blocks.tolist() == [7, 2, 4, 1, 5, 3]
    assert last.tolist() == [4, 16, 16]
    assert starts.dtype == blocks.dtype == last.dtype == torch.int32


def test_a_folder_of_peers_may_be_empty(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "_folder", [])
    monkeypatch.setenv("QUIRE_BENCH_PEERS", str(tmp_path))
    arguments = ("bench", "activation", "--quick", "--device", "cpu", "--no-ceilings", "--min-time", "0.001")
    assert run(capsys, *arguments)[0] == 0
    assert peers._folder == [tmp_path]


def test_a_case_that_fails_is_exit_code_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("out of order")

    monkeypatch.setattr("quire.rms_norm", fail)
    code, out, err = run(capsys, "bench", "norm", "--quick", "--device", "cpu", "--no-ceilings", "--no-peers")
    assert code == 1
    assert "out of order" in out
    assert "rms_norm" in err
    assert "layer_norm" in out


def test_targets() -> None:
    context = Context("cpu", NumpyArrays(), Timer(0.001, quick=True), quick=True)

    def judge(target: Target) -> bool | None:
        work = Work(lambda: sum(range(100)), {"slow": lambda: sum(range(10000))})
        return measure("norm", Case("case", lambda: work, target=target), context, {}).target_met

    assert judge(Target(max_us=1e6)) is True
    assert judge(Target(max_us=1e-6)) is False
    assert judge(Target(min_speedup=2.0, peer="slow")) is True
    assert judge(Target(min_speedup=1e6, peer="slow")) is False
    assert judge(Target(min_speedup=2.0, peer="absent")) is None


def test_summary_against_peers() -> None:
    results = [
        Result("attention", "a", group="decode", us=10.0, peers={"x": 20.0, "y": 40.0}),
        Result("attention", "b", group="decode", us=10.0, peers={"x": 9.0, "y": 5.0}),
        Result("attention", "c", group="decode", unranked=("x",), us=10.0, peers={"x": 1.0, "y": 80.0}),
        Result("attention", "d", group="prefill", us=10.0, peers={"y": 15.0}),
        Result("attention", "e", group="alone", us=10.0, unranked=("x",), peers={"x": 1.0}),
        Result("attention", "f", group="decode", error="broken", peers={}),
    ]
    decode, prefill = report.against_peers(results)  # 2, 0.5 and 8 times
    assert decode.startswith("decode ")
    assert "mean 2.00x, ahead in 2 of 3, worst 0.50x (b; y)" in decode
    assert "mean 1.50x, ahead in 1 of 1, worst 1.50x (d; y)" in prefill


def test_summary_against_ceilings() -> None:
    def result(name: str, us: float, gb_per_s: float, percent: float) -> Result:
        return Result(
            "norm", name, group="op", us=us, gb_per_s=gb_per_s, percent_of_ceiling=percent, ceiling="copy"
        )

    results = [
        result("small", 1.0, 10.0, 1.0),
        result("large", 100.0, 800.0, 80.0),
        result("wide", 90.0, 900.0, 90.0),
    ]
    results.append(Result("norm", "in the caches", group="op", us=1.0, gb_per_s=5000.0))
    (line,) = report.against_ceilings(results)
    assert line == "op: 80 to 90 % of the ceiling (copy) in its largest cases (2 of 3)"


def test_facts_without_a_time() -> None:
    context = Context("cpu", NumpyArrays(), Timer(0.001, quick=True), quick=True)
    work = Work(None, facts={"rows": 3.0}, shares={"used": 25.0, "free": 75.0})
    result = measure("norm", Case("pool", lambda: work), context, {})
    assert (result.us, result.facts, result.shares) == (None, {"rows": 3.0}, {"used": 25.0, "free": 75.0})
    settings = {"method": "", "device": "cpu"}
    whole = report.Report({}, settings, results=[result], summaries={"norm": ["three of four"]})
    assert "| pool | 25.0 % | 75.0 % |    3 |" in whole.text("md")
    assert "- three of four" in whole.text("md")
    assert "rows: 3; used: 25.0; free: 75.0" in whole.text("csv")


def test_a_sample_stands_for_a_whole_call() -> None:
    context = Context("cpu", NumpyArrays(), Timer(0.001, quick=True), quick=True)
    sample = Case("case", lambda: Work(lambda: 0.5, is_round=True), num_items=0.01, num_flops=1e12)
    found = measure("norm", sample, context, {})
    assert found.us == pytest.approx(50e6)
    assert found.tflop_per_s == pytest.approx(2.0)


def test_percent_of_ceiling() -> None:
    context = Context("cpu", NumpyArrays(), Timer(0.001, quick=True), quick=True)

    def result(num_bytes: float, bound: str) -> float | None:
        case = Case("case", lambda: Work(lambda: sum(range(1000))), num_bytes=num_bytes, bound=bound)
        return measure("norm", case, context, {"copy": 10.0}).percent_of_ceiling

    assert result(1e9, "copy") is not None
    assert result(1e9, "read") is not None  # held to the copy where no read was measured
    assert result(1e3, "copy") is None  # in the caches
    assert result(1e9, "") is None
