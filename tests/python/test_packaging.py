"""What is installed: imports, stubs, types, version; and the build's own refusals.

SPDX-License-Identifier: Apache-2.0
"""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import quire._core

import quire

ROOT = Path(__file__).resolve().parents[2]
TOOLS = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
CMAKE = shutil.which("cmake", path=TOOLS)


def python(code: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert result.returncode == 0, result.stderr
    # An editable install that rebuilds on import may speak before the program does.
    return result.stdout.splitlines()[-1]


def test_import_brings_no_framework():
    unwanted = "torch jax jaxlib cupy ml_dtypes tokenizers safetensors transformers"
    code = f"import sys, quire; print(sorted(set({unwanted!r}.split()) & set(sys.modules)))"
    assert python(code) == "[]"


def test_numpy_works_with_every_framework_blocked():
    code = (
        "import sys\n"
        "for name in ('torch', 'jax', 'cupy', 'ml_dtypes'): sys.modules[name] = None\n"
        "import numpy as np, quire\n"
        "print(quire.rms_norm(np.ones((1, 2), np.float32), np.ones(2, np.float32), eps=0.0).tolist())\n"
    )
    assert python(code) == "[[1.0, 1.0]]"


def test_import_needs_no_device():
    assert python("import quire; print(quire.num_cuda_devices())", CUDA_VISIBLE_DEVICES="") == "0"


def test_every_export_exists():
    assert [name for name in quire.__all__ if not hasattr(quire, name)] == []
    assert len(set(quire.__all__)) == len(quire.__all__)


def test_version_agrees():
    assert quire.__version__ == importlib.metadata.version("quire")
    header = ROOT / "include" / "quire" / "version.h"
    if header.exists():
        assert re.search(r'#define QUIRE_VERSION "(.*)"', header.read_text())[1] == quire.__version__


def test_stub_and_marker_are_installed():
    assert Path(quire.__file__).with_name("py.typed").exists()
    stub = Path(quire._core.__file__).with_name("_core.pyi").read_text()
    for name in ("BlockAllocator", "rms_norm", "paged_attention", "CudaError"):
        assert re.search(rf"^(def|class) {name}\b", stub, re.MULTILINE), name


RIGHT = """
import numpy as np
import quire

x = np.ones((2, 8), np.float32)
y = quire.rms_norm(x, x[0], eps=1e-5, out=x)
out, lse = quire.paged_attention(x, x, x, x, x, window=(128, 0), return_lse=True)
either = quire.paged_attention(x, x, x, x, x, return_lse=len(x) > 1)
shapes = [quire.attention(x, x, x).shape, quire.shared_prefix_attention(x, x, x, x, x, x).shape]
out, lse = quire.attention(x, x, x, return_lse=True)
blocks: list[int] = quire.BlockAllocator(8, 4).allocate(2)
size: int = quire.KVCache.num_bytes(2, 8, 16, 1, 64, "float32")
"""

#: Lines and the codes of their errors: of a function with overloads, mypy says no more than that none fits.
WRONG = {
    'quire.rms_norm(x, x, eps="small")': "call-overload",
    "quire.rms_norm(x)": "call-overload",
    "quire.rms_norm(x, x, 1e-5, 1.0)": "call-overload",
    'quire.paged_attention(x, x, x, x, x, validate="half")': "call-overload",
    'quire.attention(x, x, x, validate="half")': "call-overload",
    "quire.shared_prefix_attention(x, x, x, x, x, x, return_lse=True).shape": "attr-defined",
    "quire.merge_attention(x)": "call-arg",
    "quire.attention(x, x, x, 1.0)": "call-overload",
    "blocks: list[str] = quire.BlockAllocator(8, 4).allocate(2)": "assignment",
    "quire.no_such_op(x)": "attr-defined",
}


@pytest.fixture(scope="module")
def mypy(tmp_path_factory):
    """Runs mypy --strict on a program that uses the package as installed; returns the codes of its errors by line."""
    pytest.importorskip("mypy", reason="mypy is not installed")
    folder = tmp_path_factory.mktemp("mypy")
    environment = dict(os.environ)
    package, stub = Path(quire.__file__).parent, Path(quire._core.__file__).with_name("_core.pyi")
    if stub.parent != package:  # an editable install, which mypy cannot look through
        tree = folder / "tree" / "quire"
        shutil.copytree(package, tree, ignore=shutil.ignore_patterns("__pycache__", "model"))
        shutil.copy(stub, tree)
        environment["MYPYPATH"] = str(tree.parent)

    def check(code: str) -> dict[int, str]:
        program = folder / "program.py"
        program.write_text(code)
        command = [
            sys.executable,
            "-m",
            "mypy",
            "--strict",
            "--config-file",
            os.devnull,
            "--no-pretty",
            program.name,
        ]
        result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)
        assert result.returncode in (0, 1), result.stdout + result.stderr
        errors = re.findall(r"^(.*?\.pyi?):(\d+): error: .*\[([a-z-]+)\]$", result.stdout, re.MULTILINE)
        assert all(file == program.name for file, _, _ in errors), result.stdout
        assert bool(errors) == (result.returncode == 1), result.stdout
        return {int(line): kind for _, line, kind in errors}

    return check


def test_mypy_accepts_a_right_program(mypy):
    assert mypy(RIGHT) == {}


def test_mypy_flags_a_wrong_program(mypy):
    errors = mypy(
        "import numpy as np\nimport quire\nx = np.ones((2, 8), np.float32)\n" + "\n".join(WRONG) + "\n"
    )
    assert list(errors) == list(range(4, 4 + len(WRONG)))
    for kind, expected in zip(errors.values(), WRONG.values()):
        assert re.fullmatch(expected, kind)


@pytest.fixture
def configure(tmp_path):
    """Runs CMake's configure step of the source tree where no nvcc is found; returns the exit code and the text on one line."""
    if CMAKE is None:
        pytest.skip("cmake is not installed")
    if not (ROOT / "CMakeLists.txt").exists():
        pytest.skip("the source tree is not there")
    environment = {**os.environ, "PATH": TOOLS, "CUDACXX": str(tmp_path / "no-nvcc")}

    def run(*settings: str) -> tuple[int, str]:
        command = [
            CMAKE,
            "-S",
            str(ROOT),
            "-B",
            str(tmp_path / "build"),
            *(f"-D{setting}" for setting in settings),
        ]
        result = subprocess.run(command, capture_output=True, text=True, env=environment)
        return result.returncode, " ".join((result.stdout + result.stderr).split())

    return run


@pytest.mark.slow
def test_cuda_on_without_a_toolkit(configure):
    code, text = configure("QUIRE_CUDA=on")
    assert code != 0
    assert "quire.cuda=on: no nvcc was found" in text
    assert "quire.cuda=pypi" in text
    assert "quire.cuda=off" in text


@pytest.mark.slow
def test_cuda_auto_without_a_toolkit(configure):
    code, text = configure("QUIRE_CUDA=auto")
    assert code == 0, text
    assert "quire: CPU only (quire.cuda=auto)" in text


@pytest.mark.slow
def test_bad_settings(configure):
    code, text = configure("QUIRE_CUDA=maybe")
    assert code != 0
    assert "quire.cuda: expected auto, on, off or pypi, got maybe" in text
    code, text = configure("QUIRE_CUDA=off", "QUIRE_SANITIZE=everything")
    assert code != 0
    assert "QUIRE_SANITIZE: expected address, undefined or thread, got everything" in text
