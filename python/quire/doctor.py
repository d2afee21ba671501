"""`quire doctor`: what this machine and this build have, and a verdict with a fix for each problem.

SPDX-License-Identifier: Apache-2.0
"""

# Only the standard library is imported here. Whatever can hang, raise or crash (the extension, the driver,
# the frameworks) is tried in a child process with a deadline, so that the report is always complete.

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

__all__ = ["Verdict", "add_doctor_arguments", "architecture_support", "examine", "run_doctor", "verdicts"]

Facts = dict[str, Any]

FRAMEWORKS = ("numpy", "ml_dtypes", "torch", "jax", "cupy", "tokenizers", "safetensors")
_CPU_FLAGS = [
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "asimddp",
    "bf16",
    "i8mm",
    "sve",
    "sve2",
]
# The oldest driver for each major version of the CUDA runtime (release notes of the CUDA toolkit).
_OLDEST_DRIVER = {11: "450.80.02", 12: "525.60.13", 13: "580.65.06"}
_CUDA_LIBRARY = re.compile(
    r"/(lib(?:cuda|cudart|cublas|cublasLt|cudnn|nvrtc|nccl|nvJitLink|cutlass)\b[^/]*\.so[^/]*)$"
)

# Every child starts with the parent's import path, and prints its result as the last line.
_CHILD = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
def loaded():
    with open("/proc/self/maps") as maps:
        return sorted({line.split(None, 5)[5].strip() for line in maps if line.count("/") and ".so" in line})
def main():
%s
try:
    result = main()
except BaseException as error:
    result = {"error": f"{type(error).__name__}: {error}"}
try:
    result["libraries"] = loaded()
except OSError:
    pass
print()
print(json.dumps(result), flush=True)
import os
os._exit(0)
"""

_CORE = """
    from quire import _core
    return {
        "file": _core.__file__, "version": _core.version(),
        "cpu_isa": _core.cpu_isa(), "num_threads": _core.num_threads(),
        "has_cuda": _core.has_cuda(), "cuda_architectures": _core.cuda_architectures(),
        "cuda_runtime_version": _core.cuda_runtime_version(),
        "num_cuda_devices": _core.num_cuda_devices(),
    }
"""

_DRIVER = """
    import ctypes
    cuda = ctypes.CDLL("libcuda.so.1")
    def call(name, *args):
        status = getattr(cuda, name)(*args)
        if status:
            text = ctypes.c_char_p()
            cuda.cuGetErrorName(status, ctypes.byref(text))
            raise RuntimeError(f"{name}: {(text.value or b'?').decode()}")
    version, count = ctypes.c_int(), ctypes.c_int()
    call("cuDriverGetVersion", ctypes.byref(version))
    result = {"cuda_version": version.value, "devices": []}
    try:
        call("cuInit", 0)
        call("cuDeviceGetCount", ctypes.byref(count))
        for index in range(count.value):
            device, name, size = ctypes.c_int(), ctypes.create_string_buffer(96), ctypes.c_size_t()
            major, minor = ctypes.c_int(), ctypes.c_int()
            call("cuDeviceGet", ctypes.byref(device), index)
            call("cuDeviceGetName", name, 96, device)
            call("cuDeviceTotalMem_v2", ctypes.byref(size), device)
            call("cuDeviceGetAttribute", ctypes.byref(major), 75, device)
            call("cuDeviceGetAttribute", ctypes.byref(minor), 76, device)
            result["devices"].append({
                "index": index, "name": name.value.decode(), "memory_bytes": size.value,
                "compute_capability": [major.value, minor.value]})
    except RuntimeError as error:
        result["init_error"] = str(error)
    return result
"""

_EXPORTS = """
    def export(x, **options):
        try:
            capsule = x.__dlpack__(**options)
        except Exception as error:
            return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        return "versioned" if "dltensor_versioned" in repr(capsule) else "unversioned"
    def features(make, stream=None):
        x = make("float32")
        exchange = getattr(type(x), "__dlpack_c_exchange_api__", None) is not None
        result = {"c_exchange_api": exchange}
        result["max_version"] = export(x, max_version=(1, 3))
        for dtype in ("bfloat16", "float8_e4m3fn", "float8_e5m2"):
            try:
                result[dtype] = export(make(dtype), max_version=(1, 3))
            except Exception as error:
                result[dtype] = f"{type(error).__name__}: {error}"
        if stream is not None:
            result["stream"] = export(x, max_version=(1, 3), stream=stream)
        return result
"""

_FRAMEWORK_CHILD = {
    "numpy": _EXPORTS
    + """
    import numpy as np
    def make(dtype):
        if dtype == "float32":
            return np.zeros(4, dtype)
        import ml_dtypes
        return np.zeros(4, getattr(ml_dtypes, dtype))
    return features(make)
""",
    "torch": _EXPORTS
    + """
    import torch
    device = "cuda" if torch.cuda.is_available() else "cpu"
    def make(dtype):
        return torch.zeros(4, dtype=getattr(torch, dtype), device=device)
    result = features(make, stream=1 if device == "cuda" else None)
    result["device"], result["cuda"] = device, torch.version.cuda
    return result
""",
    "jax": _EXPORTS
    + """
    import jax, jax.numpy as jnp
    def make(dtype):
        return jnp.zeros(4, getattr(jnp, dtype))
    result = features(make)
    result["device"] = "cpu"
    return result
""",
    "cupy": _EXPORTS
    + """
    import cupy
    runtime = cupy.cuda.runtime.runtimeGetVersion()
    try:
        cupy.cuda.runtime.getDeviceCount()
    except Exception as error:
        return {"cuda": runtime, "no_device": str(error)}
    def make(dtype):
        if dtype == "float32":
            return cupy.zeros(4, dtype)
        import ml_dtypes
        return cupy.zeros(4, getattr(ml_dtypes, dtype))
    result = features(make, stream=1)
    result["cuda"] = runtime
    return result
""",
}
for _name in ("ml_dtypes", "tokenizers", "safetensors"):
    _FRAMEWORK_CHILD[_name] = f"\n    import {_name}\n    return {{}}\n"


@dataclass(frozen=True)
class Verdict:
    """One line of the doctor's judgement: level is "ok", "warn" or "fail"."""

    level: str
    text: str
    fix: str = ""


class _Child:
    """A child process that runs the body of a function and gives back its dictionary."""

    def __init__(self, body: str, timeout: float, **environment: str) -> None:
        self._timeout, self._deadline = timeout, time.monotonic() + timeout
        self._start_error = ""
        try:
            self._process: subprocess.Popen[str] | None = subprocess.Popen(
                [sys.executable, "-c", _CHILD % body, json.dumps([str(entry) for entry in sys.path])],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                env={**os.environ, **environment},
            )
        except OSError as error:
            self._process, self._start_error = None, str(error)

    def result(self) -> Facts:
        if self._process is None:
            return {"error": f"cannot start {sys.executable}: {self._start_error}"}
        try:
            stdout, stderr = self._process.communicate(timeout=max(0.1, self._deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
            return {"error": f"no answer within {self._timeout:g} s"}
        lines = stdout.strip().splitlines()
        if self._process.returncode == 0 and lines:
            with contextlib.suppress(ValueError):
                result = json.loads(lines[-1])
                if isinstance(result, dict):
                    return result
        if self._process.returncode < 0:
            with contextlib.suppress(ValueError):
                return {"error": f"killed by {signal.Signals(-self._process.returncode).name}"}
        tail = stderr.strip().splitlines()
        return {"error": tail[-1] if tail else f"exit code {self._process.returncode} without a word"}


def _guard(probe: Callable[[], Any]) -> Any:
    """A probe's result, or {"error": why}: nothing that a machine can do stops the report."""
    try:
        return probe()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def _read(path: str) -> str:
    with contextlib.suppress(OSError):
        return Path(path).read_text(errors="replace")
    return ""


def _package() -> Facts:
    distribution = importlib.metadata.distribution("quire")
    wheel = distribution.read_text("WHEEL") or ""
    direct = json.loads(distribution.read_text("direct_url.json") or "{}")
    return {
        "version": distribution.version,
        "wheel_tags": re.findall(r"^Tag: (.+)$", wheel, re.MULTILINE),
        "editable": bool(direct.get("dir_info", {}).get("editable", False)),
        "requires": distribution.requires or [],
    }


def _environment() -> Facts:
    release = _guard(platform.freedesktop_os_release)
    return {
        "os": release.get("PRETTY_NAME", platform.system()),
        "kernel": platform.release(),
        "machine": platform.machine(),
        "libc": " ".join(platform.libc_ver()).strip() or "unknown",
        "python": platform.python_version(),
        "implementation": platform.python_implementation(),
        "abi": sysconfig.get_config_var("SOABI") or "",
        "free_threaded": bool(sysconfig.get_config_var("Py_GIL_DISABLED")),
        "executable": sys.executable,
        "variables": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith("QUIRE_")
            or name in ("CUDA_VISIBLE_DEVICES", "CUDA_HOME", "CUDA_LAUNCH_BLOCKING")
        },
    }


def _cpu() -> Facts:
    info = _read("/proc/cpuinfo")
    model = re.search(r"^(?:model name|Model)\s*:\s*(.+)$", info, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", info, re.MULTILINE)
    present = set(flags[1].split()) if flags else set()
    quota = _read("/sys/fs/cgroup/cpu.max").split()
    return {
        "model": model[1].strip() if model else platform.processor() or "unknown",
        "flags": [flag for flag in _CPU_FLAGS if flag in present],
        "cores": os.cpu_count() or 0,
        "cores_in_affinity": len(os.sched_getaffinity(0)),
        "core_quota": int(quota[0]) / int(quota[1]) if len(quota) == 2 and quota[0].isdigit() else None,
    }


def _memory() -> Facts:
    sizes = {
        key: int(value) * 1024
        for key, value in re.findall(r"^(\w+):\s+(\d+) kB", _read("/proc/meminfo"), re.M)
    }
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    return {
        "total_bytes": sizes.get("MemTotal", 0),
        "available_bytes": sizes.get("MemAvailable", 0),
        "limit_bytes": int(limit) if limit.isdigit() else None,
    }


def _nvidia_smi(timeout: float) -> Facts:
    program = shutil.which("nvidia-smi")
    if program is None:
        return {"error": "nvidia-smi is not on the PATH"}
    fields = ("index", "name", "memory.total", "driver_version", "compute_cap", "mig.mode.current")
    command = [program, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    done = subprocess.run(
        command, capture_output=True, text=True, errors="replace", timeout=timeout, stdin=subprocess.DEVNULL
    )
    if done.returncode:
        return {"error": (done.stdout + done.stderr).strip().splitlines()[0]}
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.strip().splitlines()]
    return {"devices": [dict(zip(fields, row)) for row in rows if len(row) == len(fields)]}


def _version_of(framework: str) -> str | None:
    """The installed version, or "" where only the module is found, or None. Imports nothing."""
    names = ["cupy-cuda13x", "cupy-cuda12x", "cupy-cuda11x", "cupy"] if framework == "cupy" else [framework]
    try:
        found = importlib.util.find_spec(framework) is not None
    except (ImportError, ValueError, AttributeError):
        found = framework in sys.modules
    if not found:
        return None
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return ""


def _cuda_libraries(paths: Sequence[str]) -> list[str]:
    return sorted({path for path in paths if _CUDA_LIBRARY.search(path)})


def examine(*, frameworks: bool = True, timeout: float = 60.0) -> Facts:
    """Everything that the doctor knows, as plain data for JSON. Never raises.

    Args:
        frameworks: Whether to import each array framework in a child process and try its DLPack features.
        timeout: Seconds that a child process may take.
    """
    core = _Child(_CORE, timeout)
    driver = _Child(_DRIVER, timeout, CUDA_DEVICE_ORDER="PCI_BUS_ID")
    versions = {name: _guard(partial(_version_of, name)) for name in FRAMEWORKS}
    children = {
        # JAX would take most of a GPU's memory, and its CPU backend exports the same dtypes.
        name: _Child(
            _FRAMEWORK_CHILD[name], timeout, JAX_PLATFORMS="cpu", XLA_PYTHON_CLIENT_PREALLOCATE="false"
        )
        for name, version in versions.items()
        if frameworks and version is not None
    }
    facts: Facts = {
        "environment": _guard(_environment),
        "package": _guard(_package),
        "cpu": _guard(_cpu),
        "memory": _guard(_memory),
        "nvidia_smi": _guard(lambda: _nvidia_smi(timeout)),
        "driver": driver.result(),
        "core": core.result(),
        "frameworks": {},
        "cuda_libraries": {},
    }
    for name, version in versions.items():
        entry: Facts = {"version": version} if version is None or isinstance(version, str) else dict(version)
        if name in children:
            entry.update(children[name].result())
        facts["frameworks"][name] = entry
    for name, entry in [("quire", facts["core"]), ("driver", facts["driver"]), *facts["frameworks"].items()]:
        loaded = _cuda_libraries(entry.pop("libraries", []))
        if loaded:
            facts["cuda_libraries"][name] = loaded
    facts["verdicts"] = [asdict(verdict) for verdict in verdicts(facts)]
    return facts


def architecture_support(architectures: str, capability: tuple[int, int]) -> str:
    """How kernels built for ``architectures`` run on a GPU: "machine code", "PTX" or "none".

    Args:
        architectures: As CMake spells them, with spaces or semicolons between: "90a-real 80-virtual", "90f".
        capability: The GPU's compute capability.

    Machine code runs within its major version from its minor version on; with the suffix "a" on that one
    architecture, with "f" on its family. PTX runs on everything newer, unless "a" or "f" binds it likewise.

    Example:
        >>> from quire.doctor import architecture_support
        >>> architecture_support("90a-real 80-virtual", (9, 0))
        'machine code'
        >>> architecture_support("90a-real 80-virtual", (12, 0))
        'PTX'
    """
    support = "none"
    for number, suffix, kind in re.findall(r"\b(\d{2,3})([af]?)(?:-(real|virtual))?\b", architectures):
        built = (int(number[:-1]), int(number[-1]))
        if suffix == "a":
            same = newer = capability == built
        else:
            same = capability[0] == built[0] and capability[1] >= built[1]
            newer = same if suffix == "f" else capability >= built
        if same and kind != "virtual":
            return "machine code"
        if newer and kind != "real":
            support = "PTX"
    return support


def verdicts(facts: Mapping[str, Any]) -> list[Verdict]:
    """The doctor's judgement of what examine() found. Never raises."""
    found: list[Verdict] = []
    for judge in (_judge_python, _judge_core, _judge_cpu, _judge_gpu, _judge_frameworks, _judge_variables):
        try:
            found += judge(facts)
        except Exception as error:
            found.append(
                Verdict(
                    "warn",
                    f"{judge.__name__[7:]}: no verdict ({type(error).__name__}: {error})",
                    "report this",
                )
            )
    return found


def _judge_python(facts: Mapping[str, Any]) -> list[Verdict]:
    environment, package = facts["environment"], facts["package"]
    found = []
    version = tuple(int(part) for part in re.findall(r"\d+", environment.get("python", "0"))[:2])
    if version < (3, 10):
        found.append(
            Verdict("fail", f"Python {environment.get('python')} is too old", "use Python 3.10 or newer")
        )
    else:
        found.append(Verdict("ok", f"Python {environment['python']}"))
    if environment.get("free_threaded"):
        found.append(
            Verdict("warn", "free-threaded Python: not tested", "use a build of Python with the GIL")
        )
    if "error" in package:
        found.append(
            Verdict("warn", f"quire is not installed as a package ({package['error']})", "pip install .")
        )
    return found


def _judge_core(facts: Mapping[str, Any]) -> list[Verdict]:
    core = facts["core"]
    error = core.get("error")
    if error is None:
        verdict = [Verdict("ok", f"quire {core['version']} loads, {_build_text(core)}")]
        installed = facts["package"].get("version")
        if installed not in (None, core["version"]):
            verdict.append(
                Verdict(
                    "warn",
                    f"the package says version {installed}, its extension {core['version']}",
                    "reinstall quire: pip install --force-reinstall .",
                )
            )
        return verdict
    fix = "reinstall quire: pip install --force-reinstall ."
    if "GLIBC" in error or "GLIBCXX" in error or "CXXABI" in error:
        fix = "the wheel was built on a newer system: build quire here with pip install ."
    elif "numpy" in error:
        fix = "pip install --upgrade 'numpy>=2.1'"
    elif "SIGILL" in error:
        fix = "the CPU lacks an instruction: set QUIRE_CPU_ISA=scalar, and report this"
    return [Verdict("fail", f"quire's extension cannot be loaded: {error}", fix)]


def _judge_cpu(facts: Mapping[str, Any]) -> list[Verdict]:
    cpu, core, found = facts["cpu"], facts["core"], []
    isa = core.get("cpu_isa")
    lowered = facts["environment"].get("variables", {}).get("QUIRE_CPU_ISA")
    if isa == "scalar":
        fix = "unset QUIRE_CPU_ISA" if lowered else "the kernels are fast from AVX2 with FMA and F16C on"
        found.append(Verdict("warn", "the CPU kernels use no vector instructions", fix))
    elif isa and lowered:
        found.append(Verdict("warn", f"QUIRE_CPU_ISA holds the CPU kernels at {isa}", "unset QUIRE_CPU_ISA"))
    elif isa:
        found.append(Verdict("ok", f"CPU kernels: {isa}, {core['num_threads']} threads"))
    quota = cpu.get("core_quota")
    if quota and cpu.get("cores_in_affinity", 0) > quota + 0.5:
        found.append(
            Verdict(
                "warn",
                f"{cpu['cores_in_affinity']} cores are visible but the container may use {quota:g}",
                f"quire.set_num_threads({max(1, int(quota))}), or give the container a CPU set",
            )
        )
    return found


def _devices(facts: Mapping[str, Any]) -> list[Facts]:
    """The GPUs: as the driver shows them, else as nvidia-smi lists them."""
    devices = [dict(device) for device in facts["driver"].get("devices", [])]
    rows = facts["nvidia_smi"].get("devices", [])
    if not devices:
        for row in rows:
            major, _, minor = row["compute_cap"].partition(".")
            if major.isdigit() and minor.isdigit():
                size = int(row["memory.total"]) << 20 if row["memory.total"].isdigit() else 0
                devices.append(
                    {
                        "index": row["index"],
                        "name": row["name"],
                        "memory_bytes": size,
                        "compute_capability": [int(major), int(minor)],
                    }
                )
    return devices


def _driver_version(facts: Mapping[str, Any]) -> str:
    rows = facts["nvidia_smi"].get("devices", [])
    return str(rows[0]["driver_version"]) if rows else ""


def _older(version: str, than: str) -> bool:
    return [int(n) for n in re.findall(r"\d+", version)] < [int(n) for n in re.findall(r"\d+", than)]


def _judge_gpu(facts: Mapping[str, Any]) -> list[Verdict]:
    core, driver, found = facts["core"], facts["driver"], []
    devices, has_cuda = _devices(facts), bool(core.get("has_cuda"))
    visible = facts["environment"].get("variables", {}).get("CUDA_VISIBLE_DEVICES")
    if not devices:
        reason = driver.get("init_error") or driver.get("error") or "the driver shows none"
        if "libcuda" in reason:
            reason = "no driver"
        elif visible is not None and "NO_DEVICE" in reason:
            return [
                Verdict(
                    "warn", f"CUDA_VISIBLE_DEVICES={visible!r} hides every GPU", "unset CUDA_VISIBLE_DEVICES"
                )
            ]
        if "init_error" in driver and "NO_DEVICE" not in reason:
            return [
                Verdict("warn", f"the CUDA driver does not start: {reason}", "repair or update the driver")
            ]
        return [Verdict("ok", f"no GPU ({reason}): quire runs on the CPU")]
    if "error" in core:
        return []
    if not has_cuda:
        text = f"{len(devices)} GPU{'s' * (len(devices) > 1)}, but this build has no CUDA kernels"
        return [Verdict("warn", text, "pip install --force-reinstall -C quire.cuda=pypi .")]
    version, runtime = _driver_version(facts), int(core.get("cuda_runtime_version", 0))
    oldest = _OLDEST_DRIVER.get(runtime // 1000)
    if version and oldest and _older(version, oldest):
        text = f"driver {version} is older than {oldest}, which CUDA {runtime // 1000} needs"
        return [
            Verdict("fail", text, f"update the driver to {oldest} or newer, or build with an older toolkit")
        ]
    if not core.get("num_cuda_devices"):
        text = f"quire sees none of {len(devices)} GPUs"
        return [Verdict("fail", text, "update the driver, or build quire with the toolkit that fits it")]
    for device in devices:
        capability = tuple(device["compute_capability"])
        name = f"GPU {device['index']} ({device['name']}, {capability[0]}.{capability[1]})"
        support = architecture_support(core["cuda_architectures"], (capability[0], capability[1]))
        build = f"pip install --force-reinstall -C quire.cuda-architectures={capability[0]}{capability[1]} ."
        if support == "machine code":
            found.append(Verdict("ok", f"{name}: kernels in machine code"))
        elif support == "PTX":
            found.append(
                Verdict("warn", f"{name}: kernels as PTX only, compiled at first use and slower", build)
            )
        else:
            found.append(Verdict("fail", f"{name}: no kernel of this build runs on it", build))
    return found


def _judge_frameworks(facts: Mapping[str, Any]) -> list[Verdict]:
    frameworks, found = facts["frameworks"], []
    for name, entry in frameworks.items():
        if entry.get("version") is not None and entry.get("error"):
            level = "fail" if name == "numpy" else "warn"
            text = f"{name} {entry['version']} does not work: {entry['error']}"
            found.append(Verdict(level, " ".join(text.split()), f"reinstall or remove {name}"))
    if frameworks["numpy"].get("version") is None:
        found.append(Verdict("fail", "NumPy is missing", "pip install 'numpy>=2.1'"))
    elif _older(frameworks["numpy"]["version"] or "9", "2.1"):
        found.append(Verdict("fail", "NumPy is too old", "pip install --upgrade 'numpy>=2.1'"))
    if frameworks["ml_dtypes"].get("version") is None:
        found.append(Verdict("warn", "no bfloat16 or float8 in NumPy arrays", "pip install ml_dtypes"))
    if frameworks["torch"].get("c_exchange_api") is False:
        text = "this torch has no DLPack exchange API: each tensor costs microseconds more"
        found.append(Verdict("warn", text, "pip install --upgrade 'torch>=2.10'"))
    for name in ("tokenizers", "safetensors"):
        if frameworks[name].get("version") is None:
            found.append(Verdict("warn", f"quire demo and quire generate need {name}", f"pip install {name}"))
    if facts["core"].get("num_cuda_devices") and all(
        frameworks[n].get("version") is None for n in ("torch", "cupy", "jax")
    ):
        found.append(Verdict("warn", "no array framework for the GPU", "pip install cupy-cuda13x"))
    usable = [
        n
        for n in ("numpy", "torch", "jax", "cupy")
        if frameworks[n].get("version") and not frameworks[n].get("error")
    ]
    if usable:
        found.append(Verdict("ok", f"array frameworks: {', '.join(usable)}"))
    return found


def _judge_variables(facts: Mapping[str, Any]) -> list[Verdict]:
    variables = facts["environment"].get("variables", {})
    found = []
    if variables.get("QUIRE_SYNC", "0") not in ("", "0"):
        found.append(
            Verdict(
                "warn", "QUIRE_SYNC waits for the GPU after each op", "unset QUIRE_SYNC but for debugging"
            )
        )
    if variables.get("CUDA_LAUNCH_BLOCKING", "0") not in ("", "0"):
        found.append(
            Verdict("warn", "CUDA_LAUNCH_BLOCKING makes every launch wait", "unset CUDA_LAUNCH_BLOCKING")
        )
    return found


def _gib(num_bytes: float | None) -> str:
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes else "unknown"


def _build_text(core: Mapping[str, Any]) -> str:
    if not core.get("has_cuda"):
        return "CPU-only build"
    runtime = int(core.get("cuda_runtime_version", 0))
    text = f"CUDA {runtime // 1000}.{runtime % 1000 // 10} build" if runtime else "CUDA build"
    return f"{text} for {core.get('cuda_architectures') or 'no architecture'}"


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


def _text(facts: Mapping[str, Any]) -> str:
    """The report for a terminal."""
    lines: list[str] = []

    def section(title: str) -> None:
        lines.extend(["", title] if lines else [title])

    def row(label: str, value: object) -> None:
        lines.append(f"  {label:<12} {value}")

    def failed(part: Mapping[str, Any]) -> bool:
        if "error" in part:
            row("error", part["error"])
        return "error" in part

    section("Environment")
    environment, package, cpu, memory = (facts[key] for key in ("environment", "package", "cpu", "memory"))
    if not failed(environment):
        row(
            "system",
            ", ".join(
                [environment["os"], environment["kernel"], environment["machine"], environment["libc"]]
            ),
        )
        row("Python", f"{environment['python']} ({environment['abi'] or environment['implementation']})")
        for name, value in environment["variables"].items():
            row(name, value)
    if not failed(package):
        tags = ", ".join(package["wheel_tags"]) or "unknown tag"
        row("quire", f"{package['version']}, wheel {tags}{', editable' if package['editable'] else ''}")
    if not failed(cpu):
        quota = f", quota {cpu['core_quota']:g}" if cpu["core_quota"] else ""
        row("CPU", f"{cpu['model']}, {cpu['cores_in_affinity']} of {cpu['cores']} cores{quota}")
        row("", " ".join(cpu["flags"]) or "no vector instructions known to the doctor")
    if not failed(memory):
        limit = f", limit {_gib(memory['limit_bytes'])}" if memory["limit_bytes"] else ""
        row("memory", f"{_gib(memory['total_bytes'])}, {_gib(memory['available_bytes'])} available{limit}")

    section("GPUs")
    driver = facts["driver"]
    supports = driver.get("cuda_version")
    if supports:
        row("driver", f"{_driver_version(facts) or 'unknown version'}, CUDA up to {_cuda_text(supports)}")
    for device in _devices(facts):
        major, minor = device["compute_capability"]
        row(
            f"GPU {device['index']}",
            f"{device['name']}, compute capability {major}.{minor}, {_gib(device['memory_bytes'])}",
        )
    if not _devices(facts):
        row("none", driver.get("init_error") or driver.get("error") or "the driver shows none")

    section("This build")
    core = facts["core"]
    if not failed(core):
        row("kernels", f"CPU ({core['cpu_isa']}, {core['num_threads']} threads); {_build_text(core)}")
        row("extension", core["file"])

    section("Frameworks")
    for name, entry in facts["frameworks"].items():
        row(name, "not installed" if entry.get("version") is None else _feature_text(name, entry))

    if facts["cuda_libraries"]:
        section("CUDA libraries that each one loads")
        for name, paths in facts["cuda_libraries"].items():
            for path in paths:
                row(name, path)

    section("Verdict")
    for verdict in facts["verdicts"]:
        lines.append(f"  {verdict['level']:<5} {verdict['text']}")
        if verdict["fix"]:
            lines.append(f"        fix: {verdict['fix']}")
    return "\n".join(lines)


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
    print(json.dumps(facts, indent=2) if args.json else _text(facts))
    return 1 if any(verdict["level"] == "fail" for verdict in facts["verdicts"]) else 0
