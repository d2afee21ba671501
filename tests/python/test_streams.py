"""Streams on CUDA: graph capture and replay, order across streams and frameworks, threads, host time, the current device.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import pathlib
import subprocess
import sys
import textwrap
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import frameworks
import numpy as np
import pytest
from attention_batch import Batch, prefixed
from frameworks import as_float64, np_dtype
from reference import norm as reference
from tolerances import assert_close

import quire
from quire import _core
from quire._allocate import from_numpy
from quire._packed_weight import device_of

Arrays = dict[str, Any]

# ---- every op, as data -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Op:
    """An op with all that it reads and writes in one dictionary: after a call, the result is what the dictionary holds.

    Names that begin with "host_" stay what they are and are the same in every draw; prepare may make some of the others.
    function: the public function that is called, where that is not the name.
    """

    name: str
    make: Callable[[np.random.Generator, str], dict[str, np.ndarray]]
    call: Callable[..., object]
    prepare: Callable[[Arrays], None] = lambda tensors: None
    function: str = ""

    def __repr__(self) -> str:
        return self.name


def draw(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32).astype(np_dtype(dtype))


ROWS, HIDDEN = 37, 1024
#: Tokens, heads, KV heads and head_dim of the ops on heads; blocks and block_size of the caches.
TOKENS, HEADS, KV_HEADS, DIM = 29, 8, 2, 64
BLOCKS, BLOCK_SIZE = 12, 16


def make_norm(rng: np.random.Generator, dtype: str) -> dict[str, np.ndarray]:
    return {
        "x": draw(rng, (ROWS, HIDDEN), dtype),
        "residual": draw(rng, (ROWS, HIDDEN), dtype),
        "weight": draw(rng, (HIDDEN,), dtype),
        "bias": draw(rng, (HIDDEN,), dtype),
        "out": np.zeros((ROWS, HIDDEN), np_dtype(dtype)),
    }


def make_quantized(rng: np.random.Generator, dtype: str) -> dict[str, np.ndarray]:
    norms = make_norm(rng, dtype)
    norms["out"] = np.zeros((ROWS, HIDDEN), np.int8)
    norms["half_out"] = np.zeros((ROWS, HIDDEN // 2), np.int8)
    norms["token_scales"] = np.zeros((ROWS, 1), np.float32)
    norms["group_scales"] = np.zeros((ROWS, HIDDEN // 128), np.float32)
    return norms


def quantized_ops() -> list[Op]:
    def norm(t: Arrays, **kw: Any) -> object:
        out = (t["out"], t["token_scales"])
        return quire.fused_add_rms_norm(
            t["x"], t["residual"], t["weight"], out=out, out_dtype="int8", granularity="token", **kw
        )

    def gated(t: Arrays, **kw: Any) -> object:
        out = (t["half_out"], t["group_scales"][:, : HIDDEN // 256])
        return quire.silu_and_mul(t["x"], out=out, out_dtype="int8", granularity="group", **kw)

    return [
        Op("fused_add_rms_norm_quantized", make_quantized, norm, function="fused_add_rms_norm"),
        Op("silu_and_mul_quantized", make_quantized, gated, function="silu_and_mul"),
    ]


#: Features of the quantized products.
IN_FEATURES, OUT_FEATURES = 512, 384


def make_quantize(rng: np.random.Generator, dtype: str, to: str) -> dict[str, np.ndarray]:
    return {
        "x": draw(rng, (ROWS, HIDDEN), dtype),
        "q": np.zeros((ROWS, HIDDEN), np_dtype(to)),
        "token_scales": np.zeros((ROWS, 1), np.float32),
        "group_scales": np.zeros((ROWS, HIDDEN // 128), np.float32),
        "scale": np.zeros(1, np.float32),
        "zero_point": np.zeros((ROWS, 1), np.int32),
    }


def make_dequantize(rng: np.random.Generator, dtype: str, to: str) -> dict[str, np.ndarray]:
    return {
        "q": rng.integers(-100, 100, (ROWS, HIDDEN)).astype(np.float32).astype(np_dtype(to)),
        "scales": rng.uniform(0.01, 0.1, (ROWS, 1)).astype(np.float32),
        "out": np.zeros((ROWS, HIDDEN), np_dtype(dtype)),
    }


def make_product(rng: np.random.Generator, dtype: str) -> dict[str, np.ndarray]:
    weight = np.random.default_rng(0).standard_normal((OUT_FEATURES, IN_FEATURES))
    return {
        "x": draw(rng, (TOKENS, IN_FEATURES), dtype),
        "bias": draw(rng, (OUT_FEATURES,), dtype),
        "weight": weight.astype(np.float32).astype(np_dtype(dtype)),
        "out": np.zeros((TOKENS, OUT_FEATURES), np_dtype(dtype)),
    }


def make_scaled(rng: np.random.Generator, dtype: str, of: str) -> dict[str, np.ndarray]:
    def values(*shape: int) -> np.ndarray:
        return rng.integers(-100, 100, shape).astype(np.float32).astype(np_dtype(of))

    return {
        "a": values(TOKENS, IN_FEATURES),
        "b": values(OUT_FEATURES, IN_FEATURES),
        "scale_a": rng.uniform(0.01, 0.1, (TOKENS, 1)).astype(np.float32),
        "scale_b": rng.uniform(0.01, 0.1, (OUT_FEATURES, 1)).astype(np.float32),
        "out": np.zeros((TOKENS, OUT_FEATURES), np_dtype(dtype)),
    }


def quantization_ops() -> list[Op]:
    def product(t: Arrays, **kw: Any) -> object:
        return quire.quantized_matmul(t["x"], t["host_packed"], bias=t["bias"], out=t["out"], **kw)

    def pack(kind: str) -> Callable[[Arrays], None]:
        def prepare(tensors: Arrays) -> None:
            tensors["host_packed"] = quire.PackedWeight.quantize(tensors["weight"], kind)

        return prepare

    def of_checkpoint(tensors: Arrays) -> None:
        """A float8 weight in memory of quire's own, which goes with every framework's activations; scales of blocks."""
        rng = np.random.default_rng(0)
        values = rng.integers(-100, 100, (OUT_FEATURES, IN_FEATURES)).astype(np.float32)
        scale = rng.uniform(0.01, 0.1, (OUT_FEATURES // 128, IN_FEATURES // 128)).astype(np.float32)
        like = _core.empty((1,), "uint8", device_of(tensors["weight"]))
        weight = from_numpy(values.astype(np_dtype("float8_e4m3fn")), like)
        tensors["host_packed"] = quire.PackedWeight.from_fp8(weight, from_numpy(scale, like))

    def scaled(t: Arrays, **kw: Any) -> object:
        return quire.scaled_matmul(t["a"], t["b"], t["scale_a"], t["scale_b"], out=t["out"], **kw)

    def asymmetric(t: Arrays, **kw: Any) -> object:
        out = t["q"], t["token_scales"], t["zero_point"]
        return quire.quantize_int8(t["x"], symmetric=False, granularity="token", out=out, **kw)

    def dequantize(function: Callable[..., object]) -> Callable[..., object]:
        return lambda t, **kw: function(t["q"], t["scales"], granularity="token", out=t["out"], **kw)

    int8, fp8 = (
        {f.__name__: functools.partial(f, **{"of" if f is make_scaled else "to": to})
         for f in (make_quantize, make_dequantize, make_scaled)}
        for to in ("int8", "float8_e4m3fn")
    )  # fmt: skip
    return [
        Op(
            "quantize_int8",
            int8["make_quantize"],
            lambda t, **kw: quire.quantize_int8(t["x"], out=(t["q"], t["scale"]), **kw),
        ),
        Op("quantize_int8_asymmetric", int8["make_quantize"], asymmetric, function="quantize_int8"),
        Op(
            "quantize_fp8",
            fp8["make_quantize"],
            lambda t, **kw: quire.quantize_fp8(
                t["x"], granularity="group", out=(t["q"], t["group_scales"]), **kw
            ),
        ),
        Op("dequantize_int8", int8["make_dequantize"], dequantize(quire.dequantize_int8)),
        Op("dequantize_fp8", fp8["make_dequantize"], dequantize(quire.dequantize_fp8)),
        Op("quantized_matmul", make_product, product, pack("w4a16")),
        Op("quantized_matmul_w8a8", make_product, product, pack("w8a8"), function="quantized_matmul"),
        Op("quantized_matmul_fp8", make_product, product, of_checkpoint, function="quantized_matmul"),
        Op("scaled_matmul", int8["make_scaled"], scaled),
        Op("scaled_matmul_fp8", fp8["make_scaled"], scaled, function="scaled_matmul"),
    ]


def make_gated(rng: np.random.Generator, dtype: str) -> dict[str, np.ndarray]:
    return {"x": draw(rng, (ROWS, 2 * HIDDEN), dtype), "out": np.zeros((ROWS, HIDDEN), np_dtype(dtype))}


def make_plain(rng: np.random.Generator, dtype: str) -> dict[str, np.ndarray]:
    return {"x": draw(rng, (ROWS, HIDDEN), dtype), "out": np.zeros((ROWS, HIDDEN), np_dtype(dtype))}


def make_rotary(rng: np.random.Generator, dtype: str) -> dict[str, np.ndarray]:
    positions = rng.integers(0, 500, TOKENS)
    positions[3] = -1
    return {
        "positions": positions,
        "q": draw(rng, (TOKENS, HEADS, DIM), dtype),
        "k": draw(rng, (TOKENS, KV_HEADS, DIM), dtype),
        "table": quire.rope_cache(DIM, 500, theta=float(rng.integers(1000, 9000))),
    }


def make_kv(rng: np.random.Generator, dtype: str) -> dict[str, np.ndarray]:
    slots = rng.permutation(BLOCKS * BLOCK_SIZE)[:TOKENS]
    slots[5] = -1
    return {
        "k": draw(rng, (TOKENS, KV_HEADS, DIM), dtype),
        "v": draw(rng, (TOKENS, KV_HEADS, DIM), dtype),
        "k_cache": draw(rng, (BLOCKS, BLOCK_SIZE, KV_HEADS, DIM), dtype),
        "v_cache": draw(rng, (BLOCKS, BLOCK_SIZE, KV_HEADS, DIM), dtype),
        "slots": slots,
    }


def make_rope_and_write(rng: np.random.Generator, dtype: str) -> dict[str, np.ndarray]:
    weights = {"q_weight": draw(rng, (DIM,), dtype), "k_weight": draw(rng, (DIM,), dtype)}
    return make_kv(rng, dtype) | make_rotary(rng, dtype) | weights


def call_rope_and_write(t: Arrays, **kw: Any) -> object:
    tensors = (t[name] for name in ("positions", "q", "k", "v", "table", "k_cache", "v_cache", "slots"))
    return quire.rope_and_write_kv(
        *tensors, q_weight=t["q_weight"], k_weight=t["k_weight"], k_out=t["k"], **kw
    )


def make_kv_int8(rng: np.random.Generator, dtype: str) -> dict[str, np.ndarray]:
    arrays = make_kv(rng, dtype)
    for name in ("k_cache", "v_cache"):
        arrays[name] = rng.integers(-127, 128, arrays[name].shape, dtype=np.int8)
        arrays[name[0] + "_scale"] = rng.uniform(0.01, 0.1, KV_HEADS).astype(np.float32)
    return arrays


def make_pool(rng: np.random.Generator, dtype: str) -> dict[str, np.ndarray]:
    return {
        "pool": draw(rng, (3, 2, BLOCKS, BLOCK_SIZE, KV_HEADS, DIM), dtype),
        "pairs": rng.permutation(BLOCKS)[:10].reshape(5, 2),
    }


def make_copy(rng: np.random.Generator, dtype: str) -> dict[str, np.ndarray]:
    return {
        "cache": draw(rng, (BLOCKS, BLOCK_SIZE, KV_HEADS, DIM), dtype),
        "pairs": rng.permutation(BLOCKS)[:10].reshape(5, 2),
    }


def make_swap(rng: np.random.Generator, dtype: str) -> dict[str, np.ndarray]:
    return {
        "dst": draw(rng, (BLOCKS, BLOCK_SIZE, KV_HEADS, DIM), dtype),
        "src": draw(rng, (BLOCKS, BLOCK_SIZE, KV_HEADS, DIM), dtype),
        "host_pairs": np.array([[0, 3], [1, 4], [7, 0], [5, 11]], np.int64),
    }


def make_paged(
    rng: np.random.Generator,
    dtype: str,
    *,
    q_lens: list[int],
    kv_lens: list[int],
    decode: bool = False,
    dim: int = DIM,
) -> dict[str, np.ndarray]:
    # The same lengths in another order: other contents of seq_lens, the same shapes.
    order = rng.permutation(len(kv_lens)) if decode else np.arange(len(kv_lens))
    batch = Batch.make(
        rng,
        q_lens=q_lens,
        kv_lens=[kv_lens[i] for i in order],
        heads=HEADS,
        kv_heads=KV_HEADS,
        dim=dim,
        block_size=BLOCK_SIZE,
        dtype=dtype,
        decode=decode,
    )
    arrays = {
        name: getattr(batch, name)
        for name in ("q", "k_cache", "v_cache", "block_tables", "seq_lens", "query_start_loc")
    }
    arrays["out"] = np.zeros_like(batch.q)
    return {name: array for name, array in arrays.items() if array is not None}


def call_paged(t: Arrays, **keywords: Any) -> object:
    return quire.paged_attention(
        t["q"],
        t["k_cache"],
        t["v_cache"],
        t["block_tables"],
        t["seq_lens"],
        query_start_loc=t.get("query_start_loc"),
        out=t["out"],
        **keywords,
    )


def make_attention(rng: np.random.Generator, dtype: str) -> dict[str, np.ndarray]:
    return {
        "q": draw(rng, (TOKENS, HEADS, DIM), dtype),
        "k": draw(rng, (300, KV_HEADS, DIM), dtype),
        "v": draw(rng, (300, KV_HEADS, DIM), dtype),
        "query_start_loc": np.array([0, int(rng.integers(5, 20)), TOKENS], np.int32),
        "kv_start_loc": np.array([0, int(rng.integers(100, 200)), 300], np.int32),
        "out": np.zeros((TOKENS, HEADS, DIM), np_dtype(dtype)),
    }


def make_prefixed(rng: np.random.Generator, dtype: str) -> dict[str, np.ndarray]:
    prefix, own, _ = prefixed(
        rng,
        num_prefix_blocks=90,
        q_lens=[2] * 20,
        kv_lens=[3, 40] * 10,
        heads=HEADS,
        kv_heads=KV_HEADS,
        dim=DIM,
        block_size=BLOCK_SIZE,
        dtype=dtype,
    )
    return {
        "q": own.q,
        "k_cache": own.k_cache,
        "v_cache": own.v_cache,
        "prefix": prefix,
        "tables": own.block_tables,
        "lens": own.seq_lens,
        "starts": own.query_start_loc,
        "mask": rng.integers(0, 256, (40, 1), dtype=np.uint8),
        "out": np.zeros_like(own.q),
    }


def make_merge(rng: np.random.Generator, dtype: str) -> dict[str, np.ndarray]:
    return {
        "out_a": draw(rng, (TOKENS, HEADS, DIM), dtype),
        "lse_a": draw(rng, (TOKENS, HEADS), "float32"),
        "out_b": draw(rng, (TOKENS, HEADS, DIM), dtype),
        "lse_b": draw(rng, (TOKENS, HEADS), "float32"),
        "out": np.zeros((TOKENS, HEADS, DIM), np_dtype(dtype)),
        "out_lse": np.zeros((TOKENS, HEADS), np.float32),
    }


def activation(name: str, make: Callable[..., dict[str, np.ndarray]]) -> Op:
    return Op(name, make, lambda t, **kw: getattr(quire, name)(t["x"], out=t["out"], **kw))


#: Long enough that a sequence's keys are split over CTAs, whose results meet in the shared workspace.
LONG = 20000

OPS = {
    op.name: op
    for op in [
        Op("rms_norm", make_norm, lambda t, **kw: quire.rms_norm(t["x"], t["weight"], out=t["out"], **kw)),
        Op(
            "fused_add_rms_norm",
            make_norm,
            lambda t, **kw: quire.fused_add_rms_norm(t["x"], t["residual"], t["weight"], **kw),
        ),
        Op(
            "layer_norm",
            make_norm,
            lambda t, **kw: quire.layer_norm(t["x"], t["weight"], t["bias"], out=t["out"], **kw),
        ),
        *quantized_ops(),
        *quantization_ops(),
        *(activation(name, make_gated) for name in ("silu_and_mul", "gelu_and_mul", "gelu_tanh_and_mul")),
        *(activation(name, make_plain) for name in ("gelu_new", "gelu_fast", "gelu_quick", "relu_squared")),
        Op(
            "rotary_embedding",
            make_rotary,
            lambda t, **kw: quire.rotary_embedding(t["positions"], t["q"], t["k"], t["table"], **kw),
        ),
        Op(
            "qk_norm_rope",
            make_rope_and_write,
            lambda t, **kw: quire.qk_norm_rope(
                t["positions"], t["q"], t["k"], t["q_weight"], t["k_weight"], t["table"], **kw
            ),
        ),
        Op("rope_and_write_kv", make_rope_and_write, call_rope_and_write),
        Op(
            "write_kv",
            make_kv,
            lambda t, **kw: quire.write_kv(t["k"], t["v"], t["k_cache"], t["v_cache"], t["slots"], **kw),
        ),
        Op(
            "gather_kv",
            make_kv,
            lambda t, **kw: quire.gather_kv(
                t["k_cache"], t["v_cache"], t["slots"], out=(t["k"], t["v"]), **kw
            ),
        ),
        Op(
            "write_kv_int8",
            make_kv_int8,
            lambda t, **kw: quire.write_kv(
                t["k"],
                t["v"],
                t["k_cache"],
                t["v_cache"],
                t["slots"],
                k_scale=t["k_scale"],
                v_scale=t["v_scale"],
                **kw,
            ),
            function="write_kv",
        ),
        Op(
            "gather_kv_int8",
            make_kv_int8,
            lambda t, **kw: quire.gather_kv(
                t["k_cache"],
                t["v_cache"],
                t["slots"],
                k_scale=t["k_scale"],
                v_scale=t["v_scale"],
                out=(t["k"], t["v"]),
                **kw,
            ),
            function="gather_kv",
        ),
        Op(
            "copy_blocks_of_all_layers",  # as KVCache.copy_blocks does
            make_pool,
            lambda t, **kw: quire.copy_blocks(t["pool"].swapaxes(0, 2), t["pairs"], **kw),
            function="copy_blocks",
        ),
        Op("copy_blocks", make_copy, lambda t, **kw: quire.copy_blocks(t["cache"], t["pairs"], **kw)),
        Op(
            "swap_blocks",
            make_swap,
            lambda t, **kw: quire.swap_blocks(t["dst"], t["src"], t["host_pairs"], **kw),
        ),
        Op(
            "paged_decode",
            functools.partial(make_paged, q_lens=[1, 1, 1, 1], kv_lens=[1, 150, 67, 300], decode=True),
            call_paged,
            function="paged_attention",
        ),
        Op(
            "paged_mixed",
            functools.partial(make_paged, q_lens=[1, 40, 17], kv_lens=[200, 90, 17]),
            call_paged,
            function="paged_attention",
        ),
        Op(
            "paged_long",
            functools.partial(make_paged, q_lens=[1, 1], kv_lens=[LONG, 700], decode=True, dim=128),
            call_paged,
            function="paged_attention",
        ),
        Op(
            "attention",
            make_attention,
            lambda t, **kw: quire.attention(
                t["q"],
                t["k"],
                t["v"],
                query_start_loc=t["query_start_loc"],
                kv_start_loc=t["kv_start_loc"],
                out=t["out"],
                **kw,
            ),
        ),
        Op(
            "shared_prefix_attention",
            make_prefixed,
            lambda t, **kw: quire.shared_prefix_attention(
                t["q"],
                t["k_cache"],
                t["v_cache"],
                t["prefix"],
                t["tables"],
                t["lens"],
                query_start_loc=t["starts"],
                mask=t["mask"],
                out=t["out"],
                **kw,
            ),
        ),
        Op(
            "merge_attention",
            make_merge,
            lambda t, **kw: quire.merge_attention(
                t["out_a"], t["lse_a"], t["out_b"], t["lse_b"], out=t["out"], out_lse=t["out_lse"], **kw
            ),
        ),
    ]
}

every_op = pytest.mark.parametrize("op", list(OPS.values()), ids=list(OPS))

# ---- the frameworks ----------------------------------------------------------------------------------------------------


class TorchWork:
    """Asynchronous work in PyTorch."""

    dtype = "bfloat16"

    def __init__(self, framework: Any = None) -> None:
        self.framework = framework or frameworks.Torch("cuda:0")
        self.torch = self.framework.torch

    def upload(self, arrays: dict[str, np.ndarray]) -> Arrays:
        return {n: a if n.startswith("host_") else self.framework.array(a) for n, a in arrays.items()}

    def made(self, op: Op, seed: int) -> Arrays:
        """One draw of an op's tensors."""
        tensors = self.upload(op.make(np.random.default_rng(seed), self.dtype))
        op.prepare(tensors)
        return tensors

    def malformed(self, op: Op, tensors: Arrays) -> Arrays:
        """The same with an argument that the op must refuse."""
        if op.name == "swap_blocks":  # which takes any devices
            return {**tensors, "host_pairs": np.array([[0, BLOCKS]])}
        name = next(iter(tensors))
        return {**tensors, name: self.framework.numpy(tensors[name])}

    def copy(self, arrays: Arrays) -> Arrays:
        return {n: a if n.startswith("host_") else a.clone() for n, a in arrays.items()}

    def assign(self, to: Arrays, arrays: Arrays) -> None:
        """In place and asynchronously, on the current stream."""
        for name, array in arrays.items():
            if not name.startswith("host_"):
                to[name].copy_(array)

    def stream(self) -> Any:
        return self.torch.cuda.Stream()

    def use(self, stream: Any) -> Any:
        return self.torch.cuda.stream(stream)

    def handle(self, stream: Any) -> int:
        return stream.cuda_stream

    def delay(self, cycles: int) -> None:
        """Keeps the current stream busy: 50 million cycles are about 25 ms."""
        self.torch.cuda._sleep(cycles)

    def capture(self, call: Callable[[], object]) -> Callable[[], None]:
        """Gives what replays the call, on the stream that is current then."""
        graph = self.torch.cuda.CUDAGraph()
        with self.torch.cuda.graph(graph):
            call()
        return graph.replay

    def bits(self, array: Any) -> np.ndarray:
        return np.ascontiguousarray(self.framework.numpy(array)).view(np.uint8)

    def synchronize(self) -> None:
        self.torch.cuda.synchronize()


class CuPyWork(TorchWork):
    """Asynchronous work in CuPy; PyTorch, where it is there, keeps a stream busy."""

    dtype = "float16"

    def __init__(self, framework: Any) -> None:
        self.framework = framework
        self.cupy = framework.cupy

    def upload(self, arrays: dict[str, np.ndarray]) -> Arrays:
        if any(isinstance(a, np.ndarray) and a.dtype.name.startswith("float8") for a in arrays.values()):
            pytest.skip("CuPy has no float8")
        return super().upload(arrays)

    def copy(self, arrays: Arrays) -> Arrays:
        return {n: a if n.startswith("host_") else a.copy() for n, a in arrays.items()}

    def assign(self, to: Arrays, arrays: Arrays) -> None:
        for name, array in arrays.items():
            if not name.startswith("host_"):
                self.cupy.copyto(to[name], array)

    def stream(self) -> Any:
        return self.cupy.cuda.Stream(non_blocking=True)

    def use(self, stream: Any) -> Any:
        return stream

    def handle(self, stream: Any) -> int:
        return stream.ptr

    def delay(self, cycles: int) -> None:
        torch = pytest.importorskip("torch", reason="torch, which keeps a stream busy, is not installed")
        if not torch.cuda.is_available():
            pytest.skip("this torch, which keeps a stream busy, has no CUDA")
        with torch.cuda.stream(torch.cuda.ExternalStream(self.cupy.cuda.get_current_stream().ptr)):
            torch.cuda._sleep(cycles)

    def capture(self, call: Callable[[], object]) -> Callable[[], None]:
        self.synchronize()
        stream = self.stream()
        pool = self.cupy.cuda.MemoryPool()  # what is allocated in the capture stays the graph's
        with stream, self.cupy.cuda.using_allocator(pool.malloc):
            stream.begin_capture()
            try:
                call()
            finally:
                graph = stream.end_capture()

        def replay(owner: object = pool) -> None:
            graph.launch(self.cupy.cuda.get_current_stream())

        return replay

    def synchronize(self) -> None:
        self.cupy.cuda.Device().synchronize()


@pytest.fixture(params=["torch", "cupy"])
def work(request: pytest.FixtureRequest) -> Iterator[Any]:
    """PyTorch or CuPy on the first GPU."""
    framework = frameworks.make(request.param, "cuda:0")
    if isinstance(framework, str):
        pytest.skip(f"{request.param} on cuda:0: {framework}")
    made = (TorchWork if request.param == "torch" else CuPyWork)(framework)
    yield made
    made.synchronize()
    quire.check_errors("cuda:0")


@pytest.fixture
def torch_work() -> Iterator[TorchWork]:
    """PyTorch on the first GPU."""
    framework = frameworks.make("torch", "cuda:0")
    if isinstance(framework, str):
        pytest.skip(f"torch on cuda:0: {framework}")
    made = TorchWork(framework)
    yield made
    made.synchronize()
    quire.check_errors("cuda:0")


@pytest.fixture
def jax() -> Any:
    """JAX with a GPU."""
    framework = frameworks.make("jax", "cuda:0")
    if isinstance(framework, str):
        pytest.skip(f"jax on cuda:0: {framework}")
    return framework.jax


def draws(op: Op, work: TorchWork) -> tuple[Arrays, Arrays, Arrays]:
    """Tensors to call the op on, others to assign to them, and what the op then makes of them; all is done on return."""
    old, new = (work.made(op, seed) for seed in (1, 2))
    want = work.copy(new)
    op.call(want)
    work.synchronize()
    return old, new, want


def assert_same(work: TorchWork, got: Arrays, want: Arrays) -> None:
    work.synchronize()
    for name, array in want.items():
        if not name.startswith("host_"):
            np.testing.assert_array_equal(work.bits(got[name]), work.bits(array), err_msg=name)


# ---- the list itself -----------------------------------------------------------------------------------------------------


def test_every_public_op_is_listed():
    functions = {
        name
        for name in quire.__all__
        if "stream" in (getattr(getattr(quire, name), "__kwdefaults__", None) or ())
    }
    assert {op.function or op.name for op in OPS.values()} == functions


@every_op
def test_ops_run_on_the_cpu(op):
    """What is captured and raced below does something: each call changes what its dictionary holds."""
    tensors = op.make(np.random.default_rng(1), "bfloat16")
    op.prepare(tensors)
    before = {name: array.copy() for name, array in tensors.items() if not name.startswith("host_")}
    op.call(tensors)
    assert any(array.tobytes() != tensors[name].tobytes() for name, array in before.items())


# ---- CUDA graphs -------------------------------------------------------------------------------------------------------


@every_op
def test_capture_and_replay(work, op):
    """A replay works on what the tensors hold then, index tensors included, and equals an eager call bit for bit.

    A malformed call in the capture raises, and the capture goes on.
    """
    tensors, new, want = draws(op, work)
    before, malformed = work.copy(tensors), work.malformed(op, tensors)

    def call() -> None:
        for _ in range(2):
            with pytest.raises((ValueError, TypeError, IndexError), match=r"\[\w+\] "):
                op.call(malformed)
        op.call(tensors)

    replay = work.capture(call)
    assert_same(work, tensors, before)  # a capture runs nothing
    for _ in range(3):
        work.assign(tensors, new)
        replay()
        assert_same(work, tensors, want)


@every_op
def test_capture_on_an_explicit_stream(torch_work, op):
    """stream= names the very stream that is captured."""
    torch, work = torch_work.torch, torch_work
    tensors, new, want = draws(op, work)
    replay = work.capture(lambda: op.call(tensors, stream=torch.cuda.current_stream().cuda_stream))
    work.assign(tensors, new)
    replay()
    assert_same(work, tensors, want)


def test_capture_of_a_chain(work):
    """Ops of several families in one graph, among the framework's own."""
    norm, rotary = OPS["fused_add_rms_norm"], OPS["rotary_embedding"]
    kv, paged = OPS["write_kv"], OPS["paged_long"]
    sets = [draws(op, work) for op in (norm, rotary, kv, paged)]

    def chain() -> None:
        for op, (tensors, new, _) in zip((norm, rotary, kv, paged), sets):
            work.assign(tensors, new)
            op.call(tensors)

    replay = work.capture(chain)
    for _ in range(2):
        replay()
        for tensors, _, want in sets:
            assert_same(work, tensors, want)


@pytest.mark.parametrize("captured", [False, True], ids=["eager", "graph"])
def test_what_may_start_early_waits(torch_work, captured):
    """On Hopper a matrix product lets the next kernel start while it still writes: whatever reads its result waits on the device."""
    torch, rows, width = torch_work.torch, 2048, 2048
    torch.manual_seed(0)
    a, b = (torch.randn(n, width, device="cuda").to(torch.float8_e4m3fn) for n in (rows, width))
    one, weight = torch.ones(1, device="cuda"), torch.ones(width, device="cuda")
    product = torch.empty(rows, width, dtype=torch.bfloat16, device="cuda")
    heads, slots = product.view(rows, 16, 128), torch.arange(rows, device="cuda")
    table = torch.from_numpy(quire.rope_cache(128, rows)).cuda()
    normed = torch.empty_like(product)
    caches = [torch.empty(rows // 16, 16, 16, 128, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
    gated = torch.empty(rows, width // 2, dtype=torch.bfloat16, device="cuda")
    readers = {
        "rms_norm": (lambda: quire.rms_norm(product, weight, out=normed), normed),
        "silu_and_mul": (lambda: quire.silu_and_mul(product, out=gated), gated),
        "write_kv": (lambda: quire.write_kv(heads, heads, *caches, slots), caches[0]),
        "rotary_embedding": (lambda: quire.rotary_embedding(slots, heads, None, table), heads),
    }

    def attend(name: str, sequences: int, keys: int, **options: Any) -> None:
        """The last rows, which are written last, are queries, keys and values."""
        cache, q = product.view(rows // 16, 16, 16, 128), heads[-sequences:]
        tables = torch.arange(rows // 16 - 1, -1, -1, dtype=torch.int32, device="cuda").expand(sequences, -1)
        lens, out = torch.full((sequences,), keys, dtype=torch.int32, device="cuda"), torch.empty_like(q)
        call = functools.partial(quire.paged_attention, q, cache, cache, tables, lens, out=out, **options)
        readers[f"attention, {name}"] = call, out

    attend("one sequence", 1, 300)
    attend("eight sequences", 8, 300)
    attend("many sequences", 200, 40)
    attend("batch-invariant", 3, 700, batch_invariant=True)
    for variant in ("mma_split_keys_8", "mma_split_keys_16", "mma_split_rows", "mma_split_rows_128", "wgmma"):
        attend(variant, 2, 1000, variant=variant)
    tokens, starts = heads[-300:], torch.tensor([0, 100, 300], dtype=torch.int32, device="cuda")
    prefilled, merged = torch.empty_like(tokens), torch.empty_like(tokens)
    lse, new_lse = torch.zeros(300, 16, device="cuda"), torch.empty(300, 16, device="cuda")
    single = product.view(torch.float32).view(rows, 8, 128)[-40:]
    exact = torch.empty_like(single)
    scales = torch.empty(rows, 1, device="cuda")
    quantized = torch.empty(rows, width, dtype=torch.float8_e4m3fn, device="cuda")
    readers |= {
        "prefill": (
            lambda: quire.attention(tokens, tokens, tokens, query_start_loc=starts, out=prefilled),
            prefilled,
        ),
        "float32": (lambda: quire.attention(single, single, single, out=exact), exact),
        "merge_attention": (
            lambda: quire.merge_attention(tokens, lse, heads[-600:-300], lse, out=merged, out_lse=new_lse),
            merged,
        ),
        "quantize_fp8": (
            lambda: quire.quantize_fp8(product, granularity="token", out=(quantized, scales)),
            scales,
        ),
    }
    for kind in ("w4a16", "w8a8"):
        packed = quire.PackedWeight.quantize(torch.randn(256, width, device="cuda"), kind)
        for count in (1, 16, 300):
            out = torch.empty(count, 256, dtype=torch.bfloat16, device="cuda")
            call = functools.partial(quire.quantized_matmul, product[-count:], packed, out=out)
            readers[f"{kind}, {count} tokens"] = call, out
    for name, (read, result) in readers.items():

        def chain(synchronize: Callable[[], None], read: Callable[[], object] = read) -> None:
            product.fill_(float("nan"))
            quire.scaled_matmul(a, b, one, one, out=product)
            synchronize()
            read()

        chain(torch.cuda.synchronize)
        torch.cuda.synchronize()
        want = result.clone()
        run = torch_work.capture(lambda: chain(lambda: None)) if captured else lambda: chain(lambda: None)
        for _ in range(20):
            result.fill_(float("nan"))
            run()
            torch.cuda.synchronize()
            assert torch.equal(result, want), name


def test_graph_outlives_a_larger_call(torch_work):
    """The shared workspace that a graph uses stays when a later call on the same stream needs more."""
    torch, work, op = torch_work.torch, torch_work, OPS["paged_long"]
    tensors, new, want = draws(op, work)
    stream = torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        op.call(tensors)
    larger = functools.partial(make_paged, q_lens=[1] * 64, kv_lens=[700] * 64, decode=True, dim=256)
    large = work.upload(larger(np.random.default_rng(3), work.dtype))
    with torch.cuda.stream(stream):
        for _ in range(3):
            call_paged(large)
    work.synchronize()
    filler = [torch.full((1 << 20,), float("nan"), device="cuda") for _ in range(8)]
    work.assign(tensors, new)
    graph.replay()
    assert_same(work, tensors, want)
    del filler


def first_capture(name: str, kind: str) -> None:
    """In a fresh process: no call of the library comes before the capture, but those that pack a weight."""
    work, op = TorchWork() if kind == "torch" else CuPyWork(frameworks.CuPy()), OPS[name]
    tensors, new = (work.made(op, seed) for seed in (1, 2))
    old, malformed = work.copy(tensors), work.malformed(op, tensors)

    def call() -> None:
        with pytest.raises((ValueError, TypeError, IndexError)):
            op.call(malformed)
        op.call(tensors)

    replay = work.capture(call)
    for _ in range(500):  # a thousand replays, on other contents each time
        for contents in (old, new):
            work.assign(tensors, contents)
            replay()
    work.synchronize()
    before = work.copy(new)
    op.call(new)
    assert_same(work, tensors, new)
    assert any(
        work.bits(new[n]).tobytes() != work.bits(a).tobytes() for n, a in before.items() if n[:5] != "host_"
    )
    quire.check_errors()


def first_captures(names: list[str], kind: str) -> None:
    """One process for each op, with what takes long to import already there: neither CUDA nor the library was used before the fork."""
    if kind == "torch":
        assert not TorchWork().torch.cuda.is_initialized()
    failed, skipped = [], []
    for name in names:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                first_capture(name, kind)
                status = 0
            except pytest.skip.Exception:
                status = 77
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status == 77:
            skipped.append(name)
        elif status != 0:
            failed.append(name)
    print("skipped:", *skipped)
    print("failed:", *failed)


NAMES = list(OPS)


@pytest.mark.parametrize("names", [NAMES[i::6] for i in range(6)], ids=lambda names: f"{names[0]}...")
@pytest.mark.parametrize("kind", ["torch", "cupy"])
def test_capture_as_the_first_call(kind, names):
    """Every op, captured by a process that never called one, and replayed a thousand times."""
    framework = frameworks.make(kind, "cuda:0")
    if isinstance(framework, str):
        pytest.skip(f"{kind} on cuda:0: {framework}")
    here = str(pathlib.Path(__file__).parent)
    call = f"test_streams.first_captures({names!r}, {kind!r})"
    code = f"import sys; sys.path.insert(0, {here!r}); import test_streams; {call}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    skipped, failed = (line.split()[1:] for line in done.stdout.splitlines()[-2:])
    assert (done.returncode, failed) == (0, []), done.stdout + done.stderr
    # CuPy has no float8.
    assert all(kind == "cupy" and "fp8" in name for name in skipped), skipped
    assert len(skipped) < len(names)


MALFORMED: dict[str, tuple[type[Exception], Callable[[Any, Arrays, Arrays], object]]] = {
    "shape": (ValueError, lambda torch, n, p: quire.rms_norm(n["x"], n["weight"][1:], out=n["out"])),
    "dtype": (TypeError, lambda torch, n, p: quire.rms_norm(n["x"], n["weight"].int(), out=n["out"])),
    "no tensor": (TypeError, lambda torch, n, p: quire.rms_norm(n["x"], "weight", out=n["out"])),
    "other device": (
        ValueError,
        lambda torch, n, p: quire.rms_norm(n["x"], torch.ones(HIDDEN, dtype=n["x"].dtype), out=n["out"]),
    ),
    "overlap": (ValueError, lambda torch, n, p: quire.fused_add_rms_norm(n["x"], n["x"], n["weight"])),
    "bad stream": (
        TypeError,
        lambda torch, n, p: quire.rms_norm(n["x"], n["weight"], out=n["out"], stream="x"),
    ),
    "small workspace": (
        ValueError,
        lambda torch, n, p: call_paged(p, workspace=torch.empty(16, dtype=torch.uint8, device="cuda")),
    ),
    "bad option": (ValueError, lambda torch, n, p: call_paged(p, validate="some")),
    "validate full": (ValueError, lambda torch, n, p: call_paged(p, validate="full")),
    "bad pair": (
        IndexError,
        lambda torch, n, p: quire.swap_blocks(p["k_cache"], p["v_cache"], np.array([[0, 10**6]])),
    ),
}


@pytest.mark.parametrize("kind", list(MALFORMED))
def test_malformed_call_in_a_capture(torch_work, kind):
    """It raises before it touches the stream: the capture goes on, and the graph holds the calls around it."""
    torch, work = torch_work.torch, torch_work
    error, bad = MALFORMED[kind]
    norm, new_norm, want_norm = draws(OPS["rms_norm"], work)
    paged, new_paged, want_paged = draws(OPS["paged_long"], work)

    def call() -> None:
        OPS["rms_norm"].call(norm)
        with pytest.raises(error):
            bad(torch, norm, paged)
        OPS["paged_long"].call(paged)

    replay = work.capture(call)
    work.assign(norm, new_norm)
    work.assign(paged, new_paged)
    replay()
    assert_same(work, norm, want_norm)
    assert_same(work, paged, want_paged)


def test_validate_full_names_the_capture(torch_work):
    work = torch_work
    paged, *_ = draws(OPS["paged_decode"], work)

    def call() -> None:
        with pytest.raises(ValueError, match=r"\[paged_attention\] validate: expected \"shape\" while"):
            call_paged(paged, validate="full")
        OPS["paged_decode"].call(paged)

    work.capture(call)()
    quire.check_errors("cuda:0")


def test_jax_array_in_a_capture(torch_work, jax):
    """A JAX array's order cannot be captured; it is refused by name, and the capture goes on."""
    work = torch_work
    tensors, new, want = draws(OPS["rms_norm"], work)
    weight = jax.block_until_ready(jax.numpy.ones(HIDDEN, jax.numpy.bfloat16))

    def call() -> None:
        with pytest.raises(quire.UnsupportedError, match="while a CUDA graph is captured"):
            quire.rms_norm(tensors["x"], weight, out=tensors["out"])
        OPS["rms_norm"].call(tensors)

    replay = work.capture(call)
    work.assign(tensors, new)
    replay()
    assert_same(work, tensors, want)


def test_bad_index_in_a_replay(torch_work):
    """The error word works inside a graph: recorded at the replay, not at the capture, and again at the next."""
    work, op = torch_work, OPS["write_kv"]
    tensors, new, want = draws(op, work)
    replay = work.capture(lambda: op.call(tensors))
    quire.check_errors("cuda:0")
    for _ in range(2):
        work.assign(tensors, new)
        tensors["slots"][0] = 10**6
        replay()
        with pytest.raises(IndexError, match=r"write_kv.*slot_mapping.*1000000"):
            quire.check_errors("cuda:0")
    work.assign(tensors, new)
    replay()
    assert_same(work, tensors, want)


# ---- order -------------------------------------------------------------------------------------------------------------

SHORT_DELAY, LONG_DELAY = 50_000_000, 200_000_000


@every_op
def test_current_stream(work, op):
    """Behind a late producer on a side stream that is current: the op runs on that stream."""
    tensors, new, want = draws(op, work)
    side = work.stream()
    with work.use(side):
        work.delay(SHORT_DELAY)
        work.assign(tensors, new)
        op.call(tensors)
        got = work.copy(tensors)
    assert_same(work, got, want)


def stream_argument(kind: str, work: Any) -> tuple[Any, object]:
    """A side stream as stream= takes it, and what keeps it alive."""
    if kind == "cupy":
        framework = frameworks.make("cupy", "cuda:0")
        if isinstance(framework, str):
            pytest.skip(f"cupy on cuda:0: {framework}")
        stream = framework.cupy.cuda.Stream(non_blocking=True)
        return stream, stream
    stream = work.stream()
    if kind == "handle":
        return work.handle(stream), stream
    if kind == "protocol":

        class Foreign:
            def __cuda_stream__(self) -> tuple[int, int]:
                return 0, work.handle(stream)

        return Foreign(), stream
    if not hasattr(stream, "__cuda_stream__"):
        pytest.skip("streams of this torch have no __cuda_stream__")
    return stream, stream


@pytest.mark.parametrize("kind", ["object", "handle", "protocol", "cupy"])
@every_op
def test_explicit_stream(work, op, kind):
    """Inputs written late on the current stream, the op on another, the result read on the current one: no sync by hand."""
    tensors, new, want = draws(op, work)
    argument, stream = stream_argument(kind, work)
    current = work.stream()
    with work.use(current):
        work.delay(SHORT_DELAY)
        work.assign(tensors, new)
        op.call(tensors, stream=argument)
        got = work.copy(tensors)
    assert_same(work, got, want)
    del stream


@pytest.mark.parametrize("number", [0, 1, 2])
def test_default_streams_by_number(work, number):
    """0 and 1 are the legacy default stream, 2 the thread's own."""
    op = OPS["fused_add_rms_norm"]
    tensors, new, want = draws(op, work)
    with work.use(work.stream()):
        work.delay(SHORT_DELAY)
        work.assign(tensors, new)
        op.call(tensors, stream=number)
        got = work.copy(tensors)
    assert_same(work, got, want)


@pytest.mark.parametrize("repeat", range(3))
def test_busy_explicit_stream(work, repeat):
    """The explicit stream is the late one: the current stream waits for the op, not for the time of the call."""
    op = OPS["fused_add_rms_norm"]
    tensors, new, want = draws(op, work)
    side, current = work.stream(), work.stream()
    with work.use(side):
        work.delay(SHORT_DELAY)
    with work.use(current):
        work.assign(tensors, new)
        op.call(tensors, stream=work.handle(side))
        got = work.copy(tensors)
        work.assign(tensors, new)  # a write behind the op's reads
    assert_same(work, got, want)


class NoTuple:
    def __cuda_stream__(self):
        return 5


class OtherProtocol:
    def __cuda_stream__(self):
        return 1, 2


class Raises:
    def __cuda_stream__(self):
        raise RuntimeError("no stream today")


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (-1, ValueError),
        (2**64, ValueError),
        ("x", TypeError),
        (1.5, TypeError),
        (object(), TypeError),
        ([1], TypeError),
        (NoTuple(), TypeError),
        (OtherProtocol(), TypeError),
        (Raises(), RuntimeError),
    ],
    ids=["negative", "large", "str", "float", "object", "list", "no_tuple", "other_protocol", "raises"],
)
def test_wrong_streams(backend, rng, value, error):
    x, weight = backend.array(draw(rng, (3, 64), "float32")), backend.array(np.ones(64, np.float32))
    out = backend.array(np.full((3, 64), 7.0, np.float32))
    match = "no stream today" if error is RuntimeError else r"\[rms_norm\] stream: expected "
    with pytest.raises(error, match=match):
        quire.rms_norm(x, weight, out=out, stream=value)
    np.testing.assert_array_equal(backend.numpy(out), np.full((3, 64), 7.0, np.float32))


def test_mixed_frameworks_on_their_own_streams(torch_work):
    """A CuPy input that is late on CuPy's stream, with PyTorch outputs on PyTorch's."""
    framework = frameworks.make("cupy", "cuda:0")
    if isinstance(framework, str):
        pytest.skip(f"cupy on cuda:0: {framework}")
    torch, cupy = torch_work.torch, framework.cupy
    rng = np.random.default_rng(4)
    x, weight = draw(rng, (ROWS, HIDDEN), "float16"), draw(rng, (HIDDEN,), "float16")
    late = cupy.zeros((ROWS, HIDDEN), cupy.float16)
    source, w = cupy.asarray(x), torch.from_numpy(weight).cuda()
    out = torch.zeros((ROWS, HIDDEN), dtype=torch.float16, device="cuda")
    torch_work.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()), cupy.cuda.Stream(non_blocking=True) as stream:
        with torch.cuda.stream(torch.cuda.ExternalStream(stream.ptr)):
            torch.cuda._sleep(SHORT_DELAY)
        cupy.copyto(late, source)
        quire.rms_norm(late, w, out=out)
        late.fill(float("nan"))  # behind the op, on CuPy's stream
        got = out.clone()
    torch_work.synchronize()
    want = reference.rms_norm(as_float64(x), as_float64(weight), 1e-6)
    assert_close("norm", got.cpu().numpy(), want)


# ---- no host synchronisation -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def busy(work: Any, stream: Any) -> Iterator[Callable[[], bool]]:
    """Makes the stream current, and busy for a tenth of a second; gives whether it still is."""
    with work.use(stream):
        work.delay(LONG_DELAY)
        if isinstance(work, CuPyWork):
            event = stream.record()
            yield lambda: not event.done
        else:
            event = stream.record_event()
            yield lambda: not event.query()


@pytest.mark.parametrize("explicit", [False, True], ids=["current", "explicit"])
@every_op
def test_no_host_synchronisation(work, op, explicit):
    tensors, new, want = draws(op, work)
    side, current = work.stream(), work.stream()
    keywords = {"stream": work.handle(side)} if explicit else {}
    with work.use(current):  # warm: kernels are loaded, and the streams have their workspace
        for _ in range(2):
            spare = work.copy(new)
            op.call(spare, **keywords)
    work.synchronize()
    with busy(work, current) as is_busy:
        work.assign(tensors, new)
        start = time.perf_counter()
        op.call(tensors, **keywords)
        seconds = time.perf_counter() - start
        still_busy = is_busy()
        got = work.copy(tensors)
    assert still_busy, f"the call returned when the stream was done, after {seconds * 1e3:.1f} ms"
    assert seconds < 0.02
    assert_same(work, got, want)


def test_no_host_synchronisation_of_an_allocated_result(work):
    tensors, _, _ = draws(OPS["rms_norm"], work)
    current = work.stream()
    with work.use(current):
        warm = [quire.rms_norm(tensors["x"], tensors["weight"]) for _ in range(2)]
    work.synchronize()
    del warm
    with busy(work, current) as is_busy:
        start = time.perf_counter()
        quire.rms_norm(tensors["x"], tensors["weight"])
        seconds = time.perf_counter() - start
        assert is_busy(), f"the call returned when the stream was done, after {seconds * 1e3:.1f} ms"
    assert seconds < 0.02
    work.synchronize()


# ---- packed weights ----------------------------------------------------------------------------------------------------


def make_awq(rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {
        "qweight": rng.integers(-(2**31), 2**31, (128, 8)).astype(np.int32),
        "qzeros": rng.integers(-(2**31), 2**31, (2, 8)).astype(np.int32),
        "scales": (rng.random((2, 64)) + 0.1).astype(np.float16),
    }


def make_gptq(rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {
        "qweight": rng.integers(-(2**31), 2**31, (16, 64)).astype(np.int32),
        "qzeros": rng.integers(-(2**31), 2**31, (3, 8)).astype(np.int32),
        "scales": (rng.random((3, 64)) + 0.1).astype(np.float16),
        "g_idx": rng.integers(0, 3, 128).astype(np.int32),
    }


def make_compressed(rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {
        "weight_packed": rng.integers(-(2**31), 2**31, (64, 16)).astype(np.int32),
        "weight_zero_point": rng.integers(-(2**31), 2**31, (8, 2)).astype(np.int32),
        "weight_scale": (rng.random((64, 2)) + 0.1).astype(np.float16),
        "weight_shape": np.array([64, 125], np.int64),
    }


def make_int8(rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {
        "weight": rng.integers(-128, 128, (64, 128)).astype(np.int8),
        "scale": (rng.random((64, 1)) + 0.1).astype(np.float32),
        "input_scale": np.array([0.5], np.float32),
        "input_zero_point": np.array([3], np.int32),
    }


def make_fp8(rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {
        "weight": draw(rng, (64, 128), "float8_e4m3fn"),
        "scale": (rng.random((64, 1)) + 0.1).astype(np.float32),
        "input_scale": np.array([0.5], np.float32),
    }


def make_dense(rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {"weight": draw(rng, (64, 128), "float16")}


PACKED = quire.PackedWeight
#: The tensors of each constructor, and the constructor.
CONSTRUCTORS: dict[str, tuple[Callable[..., dict[str, np.ndarray]], Callable[..., Any]]] = {
    "awq": (make_awq, PACKED.from_awq),
    "gptq": (make_gptq, PACKED.from_gptq),
    "compressed-tensors": (make_compressed, functools.partial(PACKED.from_compressed_tensors, group_size=64)),
    "int8": (make_int8, PACKED.from_int8),
    "fp8": (make_fp8, PACKED.from_fp8),
    "w4a16": (make_dense, functools.partial(PACKED.quantize, format="w4a16", group_size=32)),
    "w8a8": (make_dense, functools.partial(PACKED.quantize, format="w8a8")),
    "fp8 of blocks": (make_dense, functools.partial(PACKED.quantize, format="fp8", granularity="block")),
}
every_constructor = pytest.mark.parametrize("kind", list(CONSTRUCTORS))


def skip_float8(work: Any, kind: str) -> None:
    if isinstance(work, CuPyWork) and "fp8" in kind:
        pytest.skip("cupy on cuda: CuPy has no float8 dtypes")


@every_constructor
def test_packed_weight_of_late_tensors(work, kind):
    """Tensors that are late on a stream that is not the current one: the host reads them when they are there, and the weight is ready."""
    skip_float8(work, kind)
    make, construct = CONSTRUCTORS[kind]
    new = work.upload(make(np.random.default_rng(1)))
    # Until then nothing in them is right: scales are NaN, groups are not there.
    old = {
        n: np.full(a.shape, np.nan if a.dtype.kind in "fV" else -7).astype(a.dtype)
        for n, a in make(np.random.default_rng(1)).items()
    }
    tensors = work.upload(old)
    x = work.upload(
        {"x": draw(np.random.default_rng(2), (3, 125 if "weight_shape" in new else 128), "float16")}
    )["x"]
    wanted = construct(**new)
    want = {"dense": wanted.dequantize("float16"), "product": quire.quantized_matmul(x, wanted)}
    side, current, third = work.stream(), work.stream(), work.stream()
    work.synchronize()
    with work.use(side):
        work.delay(SHORT_DELAY)
        work.assign(tensors, new)
    with work.use(current):
        weight = construct(**tensors, stream=work.handle(side))
    with work.use(third):
        got = {"dense": weight.dequantize("float16"), "product": quire.quantized_matmul(x, weight)}
        got = work.copy(got)
    assert_same(work, got, want)


@every_constructor
def test_packed_weight_in_a_capture(torch_work, kind):
    """Refused, as the host reads contents; and the capture goes on."""
    torch, work = torch_work.torch, torch_work
    make, construct = CONSTRUCTORS[kind]
    tensors, out = work.upload(make(np.random.default_rng(1))), torch.zeros(4, device="cuda")

    def call() -> None:
        with pytest.raises(quire.UnsupportedError, match="stream: expected one that is not being captured"):
            construct(**tensors)
        out.add_(1)

    work.capture(call)()
    work.synchronize()
    assert out.tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("count", [2, 100])
@every_constructor
def test_quantized_matmul_in_a_graph(work, kind, count):
    """Captured as its first call with that weight, and replayed on other activations; and the host waits for nothing."""
    skip_float8(work, kind)
    make, construct = CONSTRUCTORS[kind]
    weight = construct(**work.upload(make(np.random.default_rng(1))))
    rng = np.random.default_rng(2)
    old, new = ({"x": draw(rng, (count, weight.in_features), "float16")} for _ in range(2))
    tensors, new = work.upload(old), work.upload(new)
    tensors["out"] = work.upload({"out": np.zeros((count, 64), np.float16)})["out"]
    replay = work.capture(lambda: quire.quantized_matmul(tensors["x"], weight, out=tensors["out"]))
    want = {"out": quire.quantized_matmul(new["x"], weight)}
    work.synchronize()
    for _ in range(2):
        work.assign(tensors, new)
        replay()
        assert_same(work, {"out": tensors["out"]}, want)
    current = work.stream()
    with work.use(current):  # warm
        quire.quantized_matmul(tensors["x"], weight, out=tensors["out"])
    work.synchronize()
    with busy(work, current) as is_busy:
        quire.quantized_matmul(tensors["x"], weight, out=tensors["out"])
        assert is_busy()
    assert_same(work, {"out": tensors["out"]}, want)


@pytest.mark.parametrize("rows", [2048, 16384])
def test_scale_of_a_large_tensor_in_a_graph(torch_work, rows):
    """One launch whose CTAs wait for each other, or where x is too large for that, several."""
    torch, work = torch_work.torch, torch_work
    x, new = (torch.randn(rows, 8192, device="cuda").bfloat16() * scale for scale in (1, 3))
    got = {
        "q": torch.zeros(rows, 8192, dtype=torch.int8, device="cuda"),
        "scale": torch.zeros(1, device="cuda"),
    }
    replay = work.capture(lambda: quire.quantize_int8(x, out=(got["q"], got["scale"])))
    want = dict(zip(got, quire.quantize_int8(new)))
    for _ in range(3):
        x.copy_(new)
        replay()
        assert_same(work, got, want)
        got["q"].zero_()


# ---- JAX ---------------------------------------------------------------------------------------------------------------


def test_jax_inputs_made_and_dropped(jax):
    """The input is not there yet when the op is called, and its memory is up for reuse right after."""
    jnp = jax.numpy
    rows, hidden = 512, 2048

    @jax.jit
    def produce(seed: Any) -> Any:
        x = jax.random.normal(jax.random.key(seed), (rows, hidden), jnp.float32)
        late = jax.lax.fori_loop(0, 2000, lambda _, y: 1.5 * jnp.sin(y) + 0.25, x)
        return x + late

    @jax.jit
    def churn(seed: Any) -> Any:
        return [jnp.full((rows, hidden), jnp.nan) * (seed + i) for i in range(4)]

    weight = jax.block_until_ready(jnp.linspace(0.5, 1.5, hidden, dtype=jnp.float32))
    jax.block_until_ready([produce(0), churn(0)])
    outs, garbage = [], []
    for seed in range(20):
        x = produce(seed)
        outs.append(quire.rms_norm(x, weight))
        del x
        garbage = [churn(seed + i) for i in range(3)]
    jax.block_until_ready(garbage)
    w = as_float64(np.asarray(weight))
    for seed, out in enumerate(outs):
        want = reference.rms_norm(as_float64(np.asarray(produce(seed))), w, 1e-6)
        assert_close("norm", np.asarray(out), want)


def test_jax_inputs_of_every_argument(jax):
    """Five inputs at once, each just made by a computation of its own and dropped after the call."""
    jnp = jax.numpy
    rng = np.random.default_rng(8)
    arrays = OPS["paged_long"].make(rng, "float16")
    del arrays["out"]
    order = ["q", "k_cache", "v_cache", "block_tables", "seq_lens"]
    held = {name: jax.device_put(arrays[name], jax.devices("cuda")[0]) for name in order}
    late = jax.jit(lambda x, zero: x + zero)
    want = None
    for _ in range(10):
        made = [late(held[name], jnp.zeros((), held[name].dtype)) for name in order]
        out = quire.paged_attention(*made)
        del made
        garbage = [jnp.full(held["k_cache"].shape, jnp.nan, jnp.float16) for _ in range(4)]
        got = np.asarray(out)
        want = got if want is None else want
        np.testing.assert_array_equal(got.view(np.uint8), want.view(np.uint8))
        del garbage
    assert_close("attention", want, Batch(**arrays, query_start_loc=None).reference()[0])


def test_jax_result_consumed_at_once(jax):
    """A result that a jitted function takes while the op may still run, 200 times, with another result each time."""
    jnp = jax.numpy
    rows, hidden, variants = 4096, 4096, 3
    weight = jnp.ones(hidden, jnp.float32)
    xs = [jax.random.normal(jax.random.key(i), (rows, hidden), jnp.float32) for i in range(variants)]
    consume = jax.jit(lambda x: (x * jnp.arange(hidden, dtype=jnp.float32)).sum(axis=1))
    jax.block_until_ready([weight, *xs])
    settled = []
    for x in xs:
        out = quire.rms_norm(x, weight)
        on_host = np.asarray(out)  # the op is done once this is right
        some = slice(None, None, 61)
        assert_close("norm", on_host[some], reference.rms_norm(as_float64(np.asarray(x)[some]), 1.0, 1e-6))
        settled.append(np.asarray(consume(out)))
    assert not np.array_equal(settled[0], settled[1])
    got = [consume(quire.rms_norm(xs[i % variants], weight)) for i in range(200)]
    for i, y in enumerate(got):
        np.testing.assert_array_equal(np.asarray(y), settled[i % variants], err_msg=f"call {i}")


# ---- threads -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streams", ["same", "different", "default"])
def test_two_threads(torch_work, streams):
    """Two threads whose calls share a workspace (one stream) or not: nothing of one call shows in the other's result."""
    torch, work, op = torch_work.torch, torch_work, OPS["paged_long"]
    variants, calls = 4, 200
    inputs = [
        [work.upload(op.make(np.random.default_rng(10 * t + i), work.dtype)) for i in range(variants)]
        for t in range(2)
    ]
    want = []
    for thread_inputs in inputs:
        for tensors in thread_inputs:
            op.call(tensors)
        want.append([tensors["out"].clone() for tensors in thread_inputs])
    outs = [[torch.zeros_like(want[t][0]) for _ in range(calls)] for t in range(2)]
    work.synchronize()
    own = [torch.cuda.Stream(), torch.cuda.Stream()]
    chosen = {"same": [own[0]] * 2, "different": own, "default": [torch.cuda.default_stream()] * 2}[streams]
    barrier = threading.Barrier(2, timeout=60)

    def loop(thread: int) -> None:
        with torch.cuda.stream(chosen[thread]):
            barrier.wait()
            for i, out in enumerate(outs[thread]):
                op.call({**inputs[thread][i % variants], "out": out})

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(2) as executor:
            list(executor.map(loop, range(2)))
    finally:
        sys.setswitchinterval(interval)
    work.synchronize()
    for thread in range(2):
        wrong = [
            i
            for i, out in enumerate(outs[thread])
            if not torch.equal(out.view(torch.uint8), want[thread][i % variants].view(torch.uint8))
        ]
        assert not wrong, f"thread {thread}: {len(wrong)} of {calls} calls differ, first {wrong[0]}"


def test_threads_on_the_first_call(torch_work):
    """Eight threads of a fresh process whose first calls meet: what is made once is made once."""
    here = str(pathlib.Path(__file__).parent)
    code = f"""
        import sys, threading
        sys.path.insert(0, {here!r})
        import numpy as np
        import test_streams as s

        work = s.TorchWork()
        names = ["rms_norm", "rotary_embedding", "write_kv", "paged_long"] * 2
        made = [work.upload(s.OPS[n].make(np.random.default_rng(i), work.dtype)) for i, n in enumerate(names)]
        wants = [work.copy(t) for t in made]
        work.synchronize()
        barrier = threading.Barrier(len(names), timeout=60)

        def call(i):
            barrier.wait()
            with work.use(work.stream()):
                s.OPS[names[i]].call(made[i])

        threads = [threading.Thread(target=call, args=(i,)) for i in range(len(names))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for name, got, want in zip(names, made, wants):
            s.OPS[name].call(want)
            s.assert_same(work, got, want)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


# ---- the current device ------------------------------------------------------------------------------------------------


def needs_two(work: TorchWork) -> None:
    count = work.torch.cuda.device_count()
    if count < 2:
        pytest.skip(f"two GPUs are needed, {count} is there")


@pytest.fixture(params=[0, 1], ids=["current0", "current1"])
def current(request: pytest.FixtureRequest, torch_work: TorchWork) -> Iterator[int]:
    """Each device in turn is the current one."""
    if request.param:
        needs_two(torch_work)
    with torch_work.torch.cuda.device(request.param):
        yield request.param


def on(torch: Any, arrays: dict[str, np.ndarray], device: int) -> Arrays:
    return TorchWork(frameworks.Torch(f"cuda:{device}")).upload(arrays)


@pytest.mark.parametrize("device", [0, 1], ids=["tensors0", "tensors1"])
@every_op
def test_current_device_is_unchanged(torch_work, current, op, device):
    """An op runs where its tensors are, and leaves the current device as it was."""
    if device:
        needs_two(torch_work)
    torch = torch_work.torch
    _, _, want = draws(op, torch_work) if current == 0 else (None, None, None)
    got = on(torch, op.make(np.random.default_rng(2), "bfloat16"), device)
    op.prepare(got)
    with torch.cuda.device(device):
        torch.cuda.synchronize()
    op.call(got)
    assert torch.cuda.current_device() == current
    with torch.cuda.device(device):
        torch.cuda.synchronize()
    quire.check_errors(f"cuda:{device}")
    assert torch.cuda.current_device() == current
    if want is not None:
        for name, array in want.items():
            if not name.startswith("host_"):
                np.testing.assert_array_equal(
                    torch_work.bits(got[name]), torch_work.bits(array), err_msg=name
                )


@pytest.mark.parametrize("kind", list(MALFORMED))
@pytest.mark.parametrize("device", [0, 1], ids=["tensors0", "tensors1"])
def test_current_device_after_a_raising_call(torch_work, current, kind, device):
    if device:
        needs_two(torch_work)
    if kind == "validate full":
        pytest.skip("validate: it is malformed in a capture only")
    torch = torch_work.torch
    error, bad = MALFORMED[kind]
    rng = np.random.default_rng(1)
    norm = on(torch, make_norm(rng, "bfloat16"), device)
    paged = on(torch, OPS["paged_decode"].make(rng, "bfloat16"), device)
    with pytest.raises(error):
        bad(torch, norm, paged)
    assert torch.cuda.current_device() == current


def test_current_device_with_explicit_streams(torch_work):
    """Another device's tensors on another device's stream."""
    needs_two(torch_work)
    torch, op = torch_work.torch, OPS["paged_long"]
    _, _, want = draws(op, torch_work)
    got = on(torch, op.make(np.random.default_rng(2), "bfloat16"), 1)
    with torch.cuda.device(1):
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
    op.call(got, stream=stream.cuda_stream)
    assert torch.cuda.current_device() == 0
    with torch.cuda.device(1):
        torch.cuda.synchronize()
    np.testing.assert_array_equal(torch_work.bits(got["out"]), torch_work.bits(want["out"]))


def test_tensors_of_two_devices(torch_work):
    needs_two(torch_work)
    torch = torch_work.torch
    x, weight = torch.ones((2, 64), device="cuda:0"), torch.ones(64, device="cuda:1")
    with pytest.raises(ValueError, match=r"\[rms_norm\] weight: expected "):
        quire.rms_norm(x, weight)
    assert torch.cuda.current_device() == 0


def test_devices_have_their_own_streams(torch_work):
    """Work queued on device 0 does not hold up, and is not held up by, an op on device 1."""
    needs_two(torch_work)
    torch, op = torch_work.torch, OPS["paged_long"]
    _, _, want = draws(op, torch_work)
    got = on(torch, op.make(np.random.default_rng(2), "bfloat16"), 1)
    op.call(got)
    for device in (0, 1):
        torch.cuda.synchronize(device)
    torch.cuda._sleep(LONG_DELAY)
    event = torch.cuda.current_stream().record_event()
    op.call(got)
    torch.cuda.synchronize(1)
    assert not event.query()
    np.testing.assert_array_equal(torch_work.bits(got["out"]), torch_work.bits(want["out"]))
