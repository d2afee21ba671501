"""The C++ package: `cmake --install`, what it leaves, and a program that finds it with find_package(quire).

SPDX-License-Identifier: Apache-2.0
"""

import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CONSUMER = ROOT / "tests" / "cpp" / "consumer"
C_CONSUMER = ROOT / "tests" / "cpp" / "c_consumer"
TOOLS = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
CMAKE = shutil.which("cmake", path=TOOLS)
GENERATOR = ["-G", "Ninja"] if shutil.which("ninja", path=TOOLS) else []

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CMAKE is None, reason="cmake is not installed"),
    pytest.mark.skipif(not (ROOT / "CMakeLists.txt").exists(), reason="the source tree is not there"),
]


def run(*command: object) -> str:
    environment = {**os.environ, "PATH": TOOLS}
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, f"{' '.join(map(str, command))}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """A CPU-only build of the library."""
    folder = tmp_path_factory.mktemp("cpp") / "build"
    run(CMAKE, "-S", ROOT, "-B", folder, *GENERATOR, "-DQUIRE_CUDA=off", "-DCMAKE_INSTALL_LIBDIR=lib")
    run(CMAKE, "--build", folder, "--parallel")
    return folder


@pytest.fixture(scope="module")
def prefix(build, tmp_path_factory):
    """The installed package, moved after its installation: nothing in it may depend on the place."""
    installed = tmp_path_factory.mktemp("install") / "first"
    run(CMAKE, "--install", build, "--prefix", installed)
    return installed.rename(installed.with_name("moved"))


def test_consumer(prefix, tmp_path):
    run(CMAKE, "-S", CONSUMER, "-B", tmp_path, *GENERATOR, f"-DCMAKE_PREFIX_PATH={prefix}")
    run(CMAKE, "--build", tmp_path)
    lines = run(tmp_path / "consumer").splitlines()
    assert re.fullmatch(r"quire \d+\.\d+\.\d+, CPU kernels: (scalar|avx2|avx512|avx512_amx)", lines[0])
    assert lines[1:] == [
        "rms_norm: 0.8485 1.1314",
        "paged_attention: 1.0000",
        "TypeError: [rms_norm] x: expected float32, float16 or bfloat16, got int64 [3]",
    ]


def test_c_consumer(prefix, tmp_path):
    """A project that knows no C++."""
    run(CMAKE, "-S", C_CONSUMER, "-B", tmp_path, *GENERATOR, f"-DCMAKE_PREFIX_PATH={prefix}")
    run(CMAKE, "--build", tmp_path)
    lines = run(tmp_path / "c_consumer").splitlines()
    assert re.fullmatch(r"quire \d+\.\d+\.\d+, ABI 1", lines[0])
    assert lines[1:] == [
        "rms_norm: 0.8485 1.1314",
        "paged_attention: 2.0000",
        "2: [rms_norm] x: expected float32, float16 or bfloat16, got int32 [1]",
    ]


def blocks(page, language):
    """The fenced code of a page that is in this language and not a file's."""
    found = re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
    return [code for code in found if "--8<--" not in code]


def test_the_c_guides_program(prefix, tmp_path):
    program, step = blocks("docs/c.md", "c")
    tensors = ", ".join(
        f"QuireTensor {t}"
        for t in ["out", "q", "k_cache", "v_cache", "block_tables", "seq_lens", "workspace"]
    )
    shutil.copytree(C_CONSUMER, tmp_path / "source")
    (tmp_path / "source" / "main.c").write_text(
        f"{program}\nint step({tensors}, void* stream);\nint step({tensors}, void* stream) {{\n{step}return 0;\n}}\n"
    )
    run(CMAKE, "-S", tmp_path / "source", "-B", tmp_path, *GENERATOR, f"-DCMAKE_PREFIX_PATH={prefix}")
    run(CMAKE, "--build", tmp_path)
    assert run(tmp_path / "c_consumer") == "0.8485 1.1314\n"


@pytest.mark.parametrize("page", ["docs/cpp.md", "README.md"])
def test_the_cpp_guides_code_compiles(page, tmp_path):
    """Each block in a scope of its own, with what it takes for granted as arguments."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("there is no c++")
    code = blocks(page, "cpp")
    assert code
    bodies = [re.sub(r"^#include.*$", "", block, flags=re.MULTILINE) for block in code]
    source = tmp_path / "guide.cpp"
    source.write_text(
        "#include <quire/quire.h>\n"
        "void guide(quire::TensorView out, quire::TensorView x, quire::TensorView weight, quire::TensorView qweight,\n"
        "           quire::TensorView scales, const quire::TensorView* workspace, quire::Stream stream, quire::Device device,\n"
        "           std::int64_t num_tokens, std::int64_t num_seqs, std::int64_t num_heads, std::int64_t head_dim, std::int64_t k,\n"
        "           std::int64_t n) {\n" + "".join(f"{{\n{body}}}\n" for body in bodies) + "}\n"
    )
    run(compiler, "-std=c++20", "-fsyntax-only", "-I", ROOT / "include", source)


def test_contents(prefix):
    files = {str(path.relative_to(prefix)) for path in prefix.rglob("*") if path.is_file()}
    expected = {f"include/quire/{path.name}" for path in (ROOT / "include" / "quire").iterdir()}
    assert {name for name in files if name.startswith("include/")} == expected
    cmake = {"quireConfig.cmake", "quireConfigVersion.cmake", "quireTargets.cmake"}
    assert cmake <= {Path(name).name for name in files if name.startswith("lib/cmake/quire/")}
    version = re.search(r'"(.*)"', (ROOT / "include" / "quire" / "version.h").read_text())[1]
    assert f"lib/libquire.so.{version}" in files


def test_no_path_of_the_build(prefix, build):
    for path in filter(Path.is_file, prefix.rglob("*")):
        content = path.read_bytes()
        for folder in (ROOT, build, prefix.with_name("first")):
            assert str(folder).encode() not in content, f"{path} names {folder}"


def test_headers_include_only_the_standard_library(prefix):
    for header in (prefix / "include" / "quire").iterdir():
        for name in re.findall(r"^\s*#\s*include\s+(.*)$", header.read_text(), re.MULTILINE):
            standard = r"<[a-z_]+\.h>" if header.name == "c_api.h" else "<[a-z_]+>"
            assert re.fullmatch(rf'"quire/[a-z_]+\.h"|{standard}', name.strip()), (
                f"{header.name} includes {name}"
            )


def test_every_header_compiles_alone(prefix, build, tmp_path):
    compiler = re.search(
        r"^CMAKE_CXX_COMPILER:\w+=(.*)$", (build / "CMakeCache.txt").read_text(), re.MULTILINE
    )[1]
    for header in (prefix / "include" / "quire").iterdir():
        source = tmp_path / f"{header.stem}.cpp"
        source.write_text(f"#include <quire/{header.name}>\n")
        run(
            compiler,
            "-std=c++20",
            "-fsyntax-only",
            "-Wall",
            "-Wextra",
            "-Wconversion",
            "-Werror",
            "-I",
            prefix / "include",
            source,
        )


def test_version_is_checked(prefix, tmp_path):
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.25)\nproject(p LANGUAGES CXX)\nfind_package(quire 99.0)\nmessage(STATUS found=${quire_FOUND})\n"
    )
    assert "found=0" in run(
        CMAKE, "-S", tmp_path, "-B", tmp_path / "b", *GENERATOR, f"-DCMAKE_PREFIX_PATH={prefix}"
    )
