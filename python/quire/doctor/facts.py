"""What the doctor finds on a machine.

SPDX-License-Identifier: Apache-2.0
"""

# Only the standard library is imported here. Whatever can hang, raise or crash (the extension, the driver,
# the frameworks) is tried in a child process with a deadline, so that the report is always complete.

from __future__ import annotations

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
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

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


def find(*, frameworks: bool, timeout: float) -> Facts:
    """All facts, as plain data for JSON. Never raises."""
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
    return facts
