"""`quire demo` and `quire generate`: output, no torch, one line for every mistake.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import argparse
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("tokenizers")

import quire.demo
from quire.demo import DemoError, cli
from quire.demo.backend import select_backend
from quire.demo.display import Detokenizer, Display

EMBEDDED = Path(quire.demo.__file__).parent / "model"


def generate(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    cli.add_generate_arguments(parser)
    return cli.run_generate(parser.parse_args([*arguments, "--device", "cpu"]))


def demo(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    cli.add_demo_arguments(parser)
    return cli.run_demo(parser.parse_args([*arguments, "--device", "cpu"]))


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    """A copy of the embedded model that a test may damage."""
    return Path(shutil.copytree(EMBEDDED, tmp_path / "model"))


RUN_WITHOUT_TORCH = """
import runpy, sys
sys.argv = ["quire", *sys.argv[1:]]
try:
    runpy.run_module("quire", run_name="__main__", alter_sys=True)
except SystemExit as end:
    code = end.code
assert "torch" not in sys.modules and "transformers" not in sys.modules, "torch was imported"
sys.exit(code)
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ["demo", "--max-tokens", "6", "--device", "cpu"],
        ["generate", "--prompt", "In the beginning", "--max-tokens", "6", "--device", "cpu"],
    ],
)
def test_commands_run_and_never_import_torch(arguments: list[str]) -> None:
    result = subprocess.run(
        [sys.executable, "-c", RUN_WITHOUT_TORCH, *arguments], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert len(result.stdout) > 20
    assert "Traceback" not in result.stderr
    assert "tokens/s" in (result.stdout if arguments[0] == "demo" else result.stderr)


def test_generate_is_reproducible(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--prompt", "And the king said", "--max-tokens", "12"]
    texts = []
    for extra in ([], [], ["--temperature", "1", "--seed", "1"], ["--temperature", "1", "--seed", "2"]):
        assert generate(*options, *extra) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert len(set(texts)) == 3


def test_generate_reads_a_prompt_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompts.txt").write_text("Psalms 151\\n\\n\n\nIn the beginning\n", encoding="utf-8")
    assert (
        generate("--prompts", str(tmp_path / "prompts.txt"), "--prompt", "Blessed", "--max-tokens", "4") == 0
    )
    out = capsys.readouterr().out
    assert re.findall("^### .*", out, re.M) == [
        "### 1: 'Blessed'",
        r"### 2: 'Psalms 151\n\n'",
        "### 3: 'In the beginning'",
    ]


def test_demo_shows_every_prompt_and_the_figures(capsys: pytest.CaptureFixture[str]) -> None:
    assert demo("--max-tokens", "5", "--max-seqs", "3") == 0
    out = capsys.readouterr().out
    count = len(cli.DEMO_PROMPTS)
    assert all(f"[{i + 1}/{count}]" in out for i in range(count))
    hits = re.search(r"prefix-cache hits (\d+) %", out)
    assert hits is not None
    assert int(hits.group(1)) > 10
    assert re.search(r"blocks 0 live / \d+ cached / \d+ free", out)


def test_demo_takes_prompts_from_the_command_line_and_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.txt").write_text("Two of two\n", encoding="utf-8")
    assert demo("One of two", "--prompts", str(tmp_path / "p.txt"), "--max-tokens", "3") == 0
    out = capsys.readouterr().out
    assert "[1/2] One of two" in out
    assert "[2/2] Two of two" in out


def test_a_prompt_that_does_not_decode_is_one_line() -> None:
    for arguments in (["demo", b"a\xff"], ["generate", "--prompt", "a", "--prompt", b"a\xff"]):
        command = [sys.executable, "-X", "utf8", "-m", "quire", *arguments, "--device", "cpu"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 2
        assert done.stderr.endswith(
            f"quire {arguments[0]}: prompt {len(arguments) // 2}: is not UTF-8 text\n"
        )
        assert "Traceback" not in done.stderr


def test_a_tiny_temperature_is_greedy(capsys: pytest.CaptureFixture[str]) -> None:
    texts = set()
    for temperature in ("0", "1e-300"):
        assert (
            generate("--prompt", "And the king said", "--max-tokens", "6", "--temperature", temperature) == 0
        )
        captured = capsys.readouterr()
        assert "Warning" not in captured.err
        texts.add(captured.out)
    assert len(texts) == 1


def expect_error(capsys: pytest.CaptureFixture[str], message: str, *arguments: str) -> None:
    """Exit code 2, one line on stderr that says what is wrong, nothing on stdout."""
    assert generate(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("quire generate: ")
    assert re.search(message, captured.err), captured.err


def test_missing_files(model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expect_error(capsys, "no such model directory", "--model", str(model_dir / "nowhere"), "--prompt", "x")
    for name in ("tokenizer.json", "model.safetensors", "config.json"):
        (model_dir / name).unlink()
        expect_error(capsys, f"{name}: no such file", "--model", str(model_dir), "--prompt", "x")


@pytest.mark.parametrize("num_bytes", [0, 5, 8, 1000, 5_000_000])
def test_truncated_weights(model_dir: Path, num_bytes: int, capsys: pytest.CaptureFixture[str]) -> None:
    weights = model_dir / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:num_bytes])
    expect_error(capsys, "model.safetensors: truncated", "--model", str(model_dir), "--prompt", "x")


def test_damaged_files(model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = model_dir / "model.safetensors"
    whole = weights.read_bytes()
    arguments = ["--model", str(model_dir), "--prompt", "x"]
    weights.write_bytes(b"\xff" * 64)
    expect_error(capsys, "no safetensors file", *arguments)
    weights.write_bytes(whole.replace(b"model.norm.weight", b"model.gnome.weigh"))
    expect_error(capsys, "tensor 'model.norm.weight' is missing", *arguments)
    weights.write_bytes(whole)

    config_path = model_dir / "config.json"
    config = json.loads(config_path.read_text())
    config_path.write_text(json.dumps(config | {"intermediate_size": 500}))
    expect_error(capsys, r"expected shape \[500, 192\], got \[512, 192\]", *arguments)
    config_path.write_text(json.dumps(config | {"architectures": ["BertModel"]}))
    expect_error(capsys, "unknown architecture 'BertModel'; known are LlamaForCausalLM", *arguments)
    config_path.write_text(json.dumps(config | {"head_dim": 36}))
    expect_error(capsys, "multiples of 8 up to 256, got 36", *arguments)
    config_path.write_text("{")
    expect_error(capsys, "cannot be read as JSON", *arguments)
    config_path.write_text(json.dumps(config))

    (model_dir / "tokenizer.json").write_text("{}")
    expect_error(capsys, "tokenizer.json: cannot be read", *arguments)


def test_prompts_that_do_not_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expect_error(capsys, "no prompt: give --prompt TEXT or --prompts FILE")
    expect_error(capsys, "no such file|No such file", "--prompts", str(tmp_path / "absent"))
    (tmp_path / "empty").write_text("\n \n")
    expect_error(capsys, "has no prompts", "--prompts", str(tmp_path / "empty"))
    (tmp_path / "latin").write_bytes(b"caf\xe9\n")
    expect_error(capsys, "is not UTF-8 text", "--prompts", str(tmp_path / "latin"))
    expect_error(
        capsys,
        "prompt too long: 1001 tokens and 64 to generate exceed the model's 1024 positions",
        "--prompt",
        " and" * 1000,
    )
    expect_error(capsys, "prompt 2: prompt too long", "--prompt", "x", "--prompt", " and" * 1000)


def test_full_cache_and_conflicting_limits(capsys: pytest.CaptureFixture[str]) -> None:
    expect_error(
        capsys,
        r"KV cache too small: .* need 5 blocks of 16, the cache has 2",
        "--prompt",
        "In the beginning",
        "--blocks",
        "2",
    )
    expect_error(
        capsys, "KV cache does not fit|does not fit|memory", "--prompt", "x", "--blocks", "2000000000"
    )
    expect_error(capsys, "is less than --max-seqs", "--prompt", "x", "--max-batch-tokens", "8")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--max-tokens", "0"],
        ["--temperature", "-1"],
        ["--temperature", "nan"],
        ["--top-p", "0"],
        ["--top-p", "1.5"],
        ["--seed", "-1"],
        ["--kv-dtype", "fp4"],
        ["--dtype", "int8"],
        ["--block-size", "0"],
    ],
)
def test_option_values_are_checked(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        generate("--prompt", "x", *arguments)
    assert end.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_cuda_without_a_gpu_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    from quire.demo import DemoError
    from quire.demo.backend import select_backend

    if select_backend("auto").device == "cuda":
        pytest.skip("CUDA works here")
    with pytest.raises(DemoError, match=r"^device cuda: [^\n]+$"):
        select_backend("cuda")


class FakeTokenizer:
    """Bytes as tokens, so that a character can take several."""

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode("utf-8", errors="replace")


def test_detokenizer_never_shows_half_a_character() -> None:
    text = "où été 🙂!"
    detokenizer = Detokenizer(FakeTokenizer(), list(b"prompt "))
    pieces = [detokenizer.push(byte) for byte in text.encode()]
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces)


def screen(stream: str, width: int) -> list[str]:
    """What a terminal shows after this output, row by row."""
    rows, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[\d*[A-Za-z]|\r|\n|[^\x1b\r\n]+", stream):
        if part == "\r":
            column = 0
        elif part == "\n":
            row += 1
            rows += [""] * (row + 1 - len(rows))
        elif part == "\x1b[1A":
            row -= 1
        elif part == "\x1b[K":
            rows[row] = rows[row][:column]
        elif not part.startswith("\x1b"):
            rows[row] = rows[row][:column].ljust(column) + part + rows[row][column + len(part) :]
            column += len(part)
            assert column < width
    return rows


def test_live_display_keeps_text_and_status_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    out = io.StringIO()
    display = Display(out, io.StringIO(), live=True)
    text = "In the beginning God created the heaven and the earth.\nAnd the earth"
    for word in re.split(" ", text):
        display.write(word + " ")
        display.status("status " * 10)
    assert screen(out.getvalue(), 30) == [
        "In the beginning God created",
        "the heaven and the earth.",
        "And the earth ",
        ("status " * 10)[:29],
    ]
    display.close()
    assert screen(out.getvalue(), 30)[-1] == ""


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("option", ["--graphs", "--no-graphs"])
def test_the_gain_of_graphs_is_printed(device: str, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    """On a GPU, with graphs; and the text is the same without."""
    try:
        select_backend(device)
    except DemoError as error:
        pytest.skip(str(error))
    parser = argparse.ArgumentParser()
    cli.add_generate_arguments(parser)
    arguments = ["--prompt", "In the beginning", "--max-tokens", "20", "--dtype", "fp32", "--device"]
    assert cli.run_generate(parser.parse_args([*arguments, device, option])) == 0
    text, status = capsys.readouterr()
    gain = re.search(
        r"^decoding 1 x \d+ tokens: \d+ tokens/s as a CUDA graph, \d+ tokens/s without", status, re.M
    )
    assert (gain is not None) == (device == "cuda" and option == "--graphs")
    assert cli.run_generate(parser.parse_args([*arguments, "cpu", "--no-graphs"])) == 0
    assert capsys.readouterr().out == text
