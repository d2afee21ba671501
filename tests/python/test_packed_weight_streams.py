"""Packed weights and streams: tensors that are late, captures, and products in graphs.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from frameworks import as_float64
from gpu_work import SHORT_DELAY, CuPyWork, assert_same, busy
from op_list import draw
from quantization_draws import HELPED, assert_helped, skip_unless_helped
from tolerances import assert_product_close

import quire


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


@pytest.mark.parametrize("count", [1, 16, 64])
def test_helpers_of_products(work, count):
    """CTAs that wait for other CTAs' sums: on two streams at a time, call after call, and as replays of a graph; what is left in a workspace is never taken
    for sums."""
    skip_unless_helped(work.framework)
    bits, out_features, in_features, _ = HELPED[0]
    rng = np.random.default_rng(3)
    source = work.upload({"w": draw(rng, (out_features, in_features), "float16")})["w"]
    weight = quire.PackedWeight.quantize(source, f"w{bits}a16", 128)
    draws_of_x = {str(i): draw(rng, (count, in_features), "float16") for i in range(3)}
    xs = list(work.upload(draws_of_x).values())
    assert_helped(xs[0], weight)
    wants = [quire.quantized_matmul(x, weight) for x in xs]
    work.synchronize()
    wide = as_float64(work.framework.numpy(weight.dequantize("float32")))
    x = as_float64(draws_of_x["0"])
    assert_product_close(work.framework.numpy(wants[0]), x @ wide.T, np.abs(x) @ np.abs(wide).T)

    streams = [work.stream() for _ in range(2)]
    got: list[tuple[Any, Any]] = []
    for stream in streams:
        with work.use(stream):
            work.delay(SHORT_DELAY)  # until both have all of their calls
    for i in range(12):
        for j, stream in enumerate(streams):
            with work.use(stream):
                got.append((quire.quantized_matmul(xs[(i + j) % 3], weight), wants[(i + j) % 3]))
    work.synchronize()
    for out, want in got:
        assert_same(work, {"out": out}, {"out": want})

    tensors = work.copy({"x": xs[0], "y": xs[1], "x_out": wants[2], "y_out": wants[2]})

    def two_products() -> None:
        quire.quantized_matmul(tensors["x"], weight, out=tensors["x_out"])
        quire.quantized_matmul(tensors["y"], weight, out=tensors["y_out"])

    replay = work.capture(two_products)
    for i in range(6):
        for stream in streams[: 1 + i % 2]:
            with work.use(stream):
                work.assign(tensors, {"x": xs[i % 3], "y": xs[(i + 1) % 3]})
                replay()
                quire.quantized_matmul(xs[2], weight)
            work.synchronize()
        assert_same(work, tensors, {"x_out": wants[i % 3], "y_out": wants[(i + 1) % 3]})
