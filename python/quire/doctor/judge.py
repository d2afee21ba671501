"""The doctor's judgement of what was found, with a fix for each problem.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quire.doctor.facts import Facts

# The oldest driver for each major version of the CUDA runtime (release notes of the CUDA toolkit).
_OLDEST_DRIVER = {11: "450.80.02", 12: "525.60.13", 13: "580.65.06"}
_ISAS = ("scalar", "avx2", "avx512", "avx512_amx")
_OLDEST_CAPABILITY = (8, 0)  # of which the kernels take mma.sync and cp.async


@dataclass(frozen=True)
class Verdict:
    """One line of the doctor's judgement: level is "ok", "warn" or "fail"."""

    level: str
    text: str
    fix: str = ""


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
        verdict = [Verdict("ok", f"quire {core['version']} loads, {build_text(core)}")]
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
    variables = facts["environment"].get("variables", {})
    asked = variables.get("QUIRE_CPU_ISA")
    lowered = asked == isa
    if asked and asked not in _ISAS:
        text = f"QUIRE_CPU_ISA={asked!r} is none of {', '.join(_ISAS)}, and counts for nothing"
        found.append(Verdict("warn", text, "unset QUIRE_CPU_ISA"))
    threads = variables.get("QUIRE_NUM_THREADS")
    if threads and not re.fullmatch(r"\s*\+?0*[1-9]\d*", threads):
        text = f"QUIRE_NUM_THREADS={threads!r} is no number of threads, and counts for nothing"
        found.append(Verdict("warn", text, "unset QUIRE_NUM_THREADS"))
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


def _judge_gpu(facts: Mapping[str, Any]) -> list[Verdict]:
    core, driver, found = facts["core"], facts["driver"], []
    devices, has_cuda = gpus_of(facts), bool(core.get("has_cuda"))
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
    version, runtime = driver_version(facts), int(core.get("cuda_runtime_version", 0))
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
        if capability < _OLDEST_CAPABILITY:
            text = f"{name}: quire's kernels need compute capability {_OLDEST_CAPABILITY[0]}.{_OLDEST_CAPABILITY[1]} or newer"
            found.append(Verdict("fail", text, "use another GPU, or tensors on the CPU"))
            continue
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
    sync = variables.get("QUIRE_SYNC", "")
    if sync not in ("", "0", "1"):
        found.append(Verdict("warn", f"QUIRE_SYNC={sync} counts for nothing", "QUIRE_SYNC=1, or unset it"))
    if sync == "1":
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


def gpus_of(facts: Mapping[str, Any]) -> list[Facts]:
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


def driver_version(facts: Mapping[str, Any]) -> str:
    """As nvidia-smi says it; "" where it says nothing."""
    rows = facts["nvidia_smi"].get("devices", [])
    return str(rows[0]["driver_version"]) if rows else ""


def _older(version: str, than: str) -> bool:
    return [int(n) for n in re.findall(r"\d+", version)] < [int(n) for n in re.findall(r"\d+", than)]


def build_text(core: Mapping[str, Any]) -> str:
    """What kernels this build has, in a few words."""
    if not core.get("has_cuda"):
        return "CPU-only build"
    runtime = int(core.get("cuda_runtime_version", 0))
    text = f"CUDA {runtime // 1000}.{runtime % 1000 // 10} build" if runtime else "CUDA build"
    return f"{text} for {core.get('cuda_architectures') or 'no architecture'}"
