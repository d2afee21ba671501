"""Makes the tables of docs/frameworks/index.md by running what they claim.

SPDX-License-Identifier: Apache-2.0

    python docs/_build/support_matrix.py            prints the tables of the devices that are here
    python docs/_build/support_matrix.py --write    puts them into the page; other devices' tables stay

A cell is a decoding step (rms_norm, write_kv, paged_attention) in one framework, way of calling, and pair of dtypes, compared with float64.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

import quire

PAGE = Path(__file__).resolve().parents[1] / "frameworks" / "index.md"
#: dtype of activations, dtype of the cache
DTYPES = [
    ("float32", "float32"), ("float16", "float16"), ("bfloat16", "bfloat16"),
    ("bfloat16", "float8_e4m3fn"), ("bfloat16", "float8_e5m2"), ("bfloat16", "int8"),
]  # fmt: skip
#: Largest error, relative to the largest value.
ERRORS = {
    "float32": 1e-5,
    "float16": 4e-3,
    "bfloat16": 3e-2,
    "float8_e4m3fn": 0.15,
    "float8_e5m2": 0.25,
    "int8": 6e-2,
}
WAYS = [
    ("NumPy", "eager"), ("PyTorch", "eager"), ("PyTorch", "torch.compile"), ("PyTorch", "CUDA graph"),
    ("CuPy", "eager"), ("CuPy", "CUDA graph"), ("JAX", "eager"), ("JAX", "jax.jit"),
]  # fmt: skip
MODULES = {"NumPy": "numpy", "PyTorch": "torch", "CuPy": "cupy", "JAX": "jax"}
HEADS, KV_HEADS, DIM, TOKENS, BLOCK_SIZE = 4, 2, 64, 21, 16
SCALE = np.array([0.04], np.float32)


class Absent(Exception):
    """There is no such thing: no dtype, no mode, no device."""


def np_dtype(name: str) -> np.dtype[Any]:
    return np.dtype(getattr(ml_dtypes, name, name))


def inputs(dtype: str, cache_dtype: str) -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(0)

    def draw(*shape):
        return rng.standard_normal(shape).astype(np.float32).astype(np_dtype(dtype))

    cache = np.zeros((4, BLOCK_SIZE, KV_HEADS, DIM), np_dtype(cache_dtype))
    return {
        "q": draw(1, HEADS, DIM), "weight": draw(DIM), "k": draw(TOKENS, KV_HEADS, DIM), "v": draw(TOKENS, KV_HEADS, DIM),
        "k_cache": cache, "v_cache": cache.copy(), "slots": np.arange(TOKENS, dtype=np.int32) + BLOCK_SIZE,
        "tables": np.array([[1, 2]], np.int32), "lens": np.array([TOKENS], np.int32), "scale": SCALE,
    }  # fmt: skip


def reference(t: dict[str, np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    q, w, k, v = (t[name].astype(np.float64) for name in ("q", "weight", "k", "v"))
    q = q / np.sqrt((q * q).mean(-1, keepdims=True) + 1e-6) * w
    k, v = (np.repeat(x, HEADS // KV_HEADS, axis=1) for x in (k, v))
    scores = np.einsum("nhd,thd->nht", q, k) / DIM**0.5
    p = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("nht,thd->nhd", p / p.sum(-1, keepdims=True), v)


def step(module: Any, t: dict[str, Any], quantized: bool) -> Any:
    scales = {"k_scale": t["scale"], "v_scale": t["scale"]} if quantized else {}
    q = module.rms_norm(t["q"], t["weight"])
    written = module.write_kv(t["k"], t["v"], t["k_cache"], t["v_cache"], t["slots"], **scales)
    k_cache, v_cache = (t["k_cache"], t["v_cache"]) if written is None else written
    return module.paged_attention(q, k_cache, v_cache, t["tables"], t["lens"], **scales)


def with_torch(way: str, device: str, arrays: dict[str, Any], quantized: bool) -> Any:
    import frameworks
    import torch

    import quire.torch

    make = frameworks.Torch("cpu" if device == "CPU" else "cuda:0")
    if way == "CUDA graph" and device == "CPU":
        raise Absent
    t = {name: make.array(a) for name, a in arrays.items()}
    if way == "torch.compile":
        torch._dynamo.reset()
        out = torch.compile(lambda: step(quire.torch, t, quantized), fullgraph=True, backend="aot_eager")()
    elif way == "CUDA graph":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = step(quire.torch, t, quantized)
        graph.replay()
    else:
        out = step(quire.torch, t, quantized)
    make.synchronize()
    return make.numpy(out)


def with_cupy(way: str, device: str, arrays: dict[str, Any], quantized: bool) -> Any:
    if device == "CPU" or any(a.dtype.name.startswith("float8") for a in arrays.values()):
        raise Absent
    import cupy

    t = {name: cupy.asarray(a) for name, a in arrays.items()}
    if way == "eager":
        return cupy.asnumpy(step(quire, t, quantized))
    cupy.cuda.Device().synchronize()
    stream, normed, out = (
        cupy.cuda.Stream(non_blocking=True),
        cupy.empty_like(t["q"]),
        cupy.empty_like(t["q"]),
    )
    scales = {"k_scale": t["scale"], "v_scale": t["scale"]} if quantized else {}
    with stream:
        stream.begin_capture()
        quire.rms_norm(t["q"], t["weight"], out=normed)
        quire.write_kv(t["k"], t["v"], t["k_cache"], t["v_cache"], t["slots"], **scales)
        quire.paged_attention(normed, t["k_cache"], t["v_cache"], t["tables"], t["lens"], out=out, **scales)
        graph = stream.end_capture()
        graph.launch(stream)
    stream.synchronize()
    return cupy.asnumpy(out)


def with_jax(way: str, device: str, arrays: dict[str, Any], quantized: bool) -> Any:
    import jax

    import quire.jax

    place = jax.devices("cpu" if device == "CPU" else "cuda")[0]
    t = {name: jax.device_put(a, place) for name, a in arrays.items()}

    def run(t):
        return step(quire.jax, t, quantized)

    return np.asarray(jax.jit(run)(t) if way == "jax.jit" else run(t))


def with_numpy(way: str, device: str, arrays: dict[str, Any], quantized: bool) -> Any:
    if device != "CPU":
        raise Absent
    return step(quire, arrays, quantized)


RUN: dict[str, Callable[..., Any]] = {
    "NumPy": with_numpy,
    "PyTorch": with_torch,
    "CuPy": with_cupy,
    "JAX": with_jax,
}


def cell(framework: str, way: str, device: str, dtype: str, cache_dtype: str) -> str:
    arrays = inputs(dtype, cache_dtype)
    want = reference(arrays)
    try:
        got = RUN[framework](way, device, arrays, cache_dtype != dtype)
    except Absent:
        return "–"
    error = np.abs(np.asarray(got).astype(np.float64) - want).max() / np.abs(want).max()
    return "yes" if error <= ERRORS[cache_dtype] else f"wrong by {error:.2g}"


def table(device: str) -> str:
    """The Markdown table of one device, with the versions that ran."""
    heads = [f"{a}" if a == b else f"{a}, {b} cache" for a, b in DTYPES]
    lines = ["| | | " + " | ".join(heads) + " |", "|---|---|" + "---|" * len(DTYPES)]
    versions = []
    for framework, way in WAYS:
        if framework == "CuPy" and device == "CPU":
            continue
        if importlib.util.find_spec(MODULES[framework]) is None:
            cells = ["not run"] * len(DTYPES)
        else:
            cells = [cell(framework, way, device, *dtypes) for dtypes in DTYPES]
            if way == "eager" and set(cells) != {"–"}:
                name = next(
                    n for n in (MODULES[framework], "cupy-cuda13x", "cupy-cuda12x") if n != "cupy" and _has(n)
                )
                versions.append(f"{framework} {importlib.metadata.version(name)}")
        if set(cells) != {"–"}:
            lines.append(f"| {framework} | {way} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + f"\n\nRun with {', '.join(versions)}, Python {sys.version.split()[0]}."


def _has(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def devices() -> list[str]:
    return ["CPU"] + ["CUDA"] * (quire.has_cuda() and quire.num_cuda_devices() > 0)


def replace(text: str, device: str, new: str) -> str:
    """The page with another table for a device."""
    start, end = f"<!-- {device} -->", f"<!-- end of {device} -->"
    found, count = re.subn(
        f"{start}\n.*?{end}", lambda _: f"{start}\n\n{new}\n\n{end}", text, flags=re.DOTALL
    )
    if count != 1:
        raise ValueError(f"{PAGE}: expected one {start} with its end, got {count}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="put the tables into the page")
    write = parser.parse_args().write
    for device in devices():
        made = table(device)
        print(f"{device}\n\n{made}\n")
        if write:
            PAGE.write_text(replace(PAGE.read_text(encoding="utf-8"), device, made), encoding="utf-8")


sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "python"))
if __name__ == "__main__":
    main()
