"""The activations against float64, on every framework and backend.

SPDX-License-Identifier: Apache-2.0
"""

import numpy as np
import pytest
from frameworks import as_float64, np_dtype
from reference import activation as reference
from reference import quantization
from tolerances import assert_close

import quire

DTYPES = ["float32", "float16", "bfloat16"]


def draw(rng, shape, dtype):
    return (2.0 * rng.standard_normal(shape)).astype(np.float32).astype(np_dtype(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", [*reference.GATED, *reference.PLAIN])
def test_every_framework(framework, rng, op, dtype):
    x = draw(rng, (3, 96), dtype)
    want = reference.gated(op, as_float64(x)) if op in reference.GATED else reference.PLAIN[op](as_float64(x))
    out = getattr(quire, op)(framework.array(x))
    assert type(out) is type(framework.array(x))
    assert_close("activation", framework.numpy(out), want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 2, 7, 8, 31, 64, 129, 1000, 13824])
@pytest.mark.parametrize("op", list(reference.GATED))
def test_gated(backend, rng, op, width, dtype):
    x = draw(rng, (5, 2 * width), dtype)
    out = getattr(quire, op)(backend.array(x))
    assert_close("activation", backend.numpy(out), reference.gated(op, as_float64(x)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 2, 7, 8, 31, 64, 129, 1000])
@pytest.mark.parametrize("op", list(reference.PLAIN))
def test_plain(backend, rng, op, width, dtype):
    x = draw(rng, (2, 3, width), dtype)
    bx = backend.array(x)
    want = reference.PLAIN[op](as_float64(x))
    assert_close("activation", backend.numpy(getattr(quire, op)(bx)), want)
    assert getattr(quire, op)(bx, out=bx) is bx
    assert_close("activation", backend.numpy(bx), want)


@pytest.mark.parametrize("op", [*reference.GATED, *reference.PLAIN])
def test_strided(backend, rng, op):
    x = draw(rng, (4, 3, 66), "bfloat16")
    want = reference.gated(op, as_float64(x)) if op in reference.GATED else reference.PLAIN[op](as_float64(x))
    assert_close("activation", backend.numpy(getattr(quire, op)(backend.strided(x, 5))), want)


@pytest.mark.parametrize("op", [*reference.GATED, *reference.PLAIN])
def test_limits(backend, op):
    """Large arguments saturate instead of overflowing, and NaN passes through."""
    x = np.array([[-1e30, -100.0, -20.0, 0.0, 20.0, 100.0, 1e10, np.nan]], np.float32)
    if op in reference.GATED:
        out = backend.numpy(getattr(quire, op)(backend.array(np.concatenate([x, np.ones_like(x)], axis=1))))
        function = reference.GATED[op]
    else:
        out = backend.numpy(getattr(quire, op)(backend.array(x)))
        function = reference.PLAIN[op]
    assert np.isnan(out[0, 7])
    with np.errstate(over="ignore"):
        want = function(x[:, :7].astype(np.float64))
    np.testing.assert_allclose(out[:, :7], want, rtol=2e-5, atol=1e-5)


def test_zero_size(framework):
    for shape in [(0, 8), (3, 0)]:
        assert framework.numpy(quire.silu_and_mul(framework.array(np.zeros(shape, np.float32)))).shape == (
            shape[0],
            shape[1] // 2,
        )


def test_bad_calls():
    x = np.ones((2, 6), np.float32)
    with pytest.raises(
        ValueError,
        match=r"\[silu_and_mul\] x: expected an even last dimension \(gate and up\), got float32 \[2, 7\]",
    ):
        quire.silu_and_mul(np.ones((2, 7), np.float32), out=np.ones((2, 3), np.float32))
    with pytest.raises(
        ValueError,
        match=r"\[silu_and_mul\] out: expected float32 \[2, 3\] like half of x, got float32 \[2, 6\]",
    ):
        quire.silu_and_mul(x, out=np.ones((2, 6), np.float32))
    with pytest.raises(ValueError, match=r"out: expected memory apart from x"):
        quire.silu_and_mul(x, out=x[:, :3])
    with pytest.raises(TypeError, match=r"\[gelu_new\] x: expected float32, float16 or bfloat16, got int8"):
        quire.gelu_new(np.ones((2, 6), np.int8))


@pytest.mark.parametrize("dtype", DTYPES)
def test_error_at_most_half_again_torchs(torch, rng, dtype):
    from frameworks import Torch

    cpu = Torch("cpu")
    x = draw(rng, (64, 2048), dtype)
    tx = cpu.array(x)
    want = reference.gated("silu_and_mul", as_float64(x))
    ours = np.abs(as_float64(cpu.numpy(quire.silu_and_mul(tx))) - want).max()
    theirs = np.abs(as_float64(cpu.numpy(torch.nn.functional.silu(tx[:, :1024]) * tx[:, 1024:])) - want).max()
    assert ours <= 1.5 * theirs


# ---- quantized results -------------------------------------------------------------------------------------------------

QUANTIZED = ["float8_e4m3fn", "int8"]
GRANULARITIES = ["tensor", "token", "group"]


def check_quantized(backend, rng, op, num_rows, width, dtype, out_dtype, granularity, group_size=128, pad=0):
    x = draw(rng, (num_rows, 2 * width), dtype)
    scale = np.array([0.02], np.float32) if granularity == "tensor" else None
    groups = {"tensor": 0, "token": 1, "group": width // group_size}[granularity]
    out, scales = (np.empty((num_rows, n), np_dtype(d)) for n, d in ((width, out_dtype), (groups, "float32")))
    for array in (out, scales):
        array.view(np.uint8)[...] = 0xFF
    bx, out, scales = backend.strided(x, pad), backend.strided(out, pad), backend.strided(scales, pad)
    got = getattr(quire, op)(
        bx,
        out=out if granularity == "tensor" else (out, scales),
        out_dtype=out_dtype,
        scale=None if scale is None else backend.array(scale),
        granularity=granularity,
        group_size=group_size,
    )
    assert got[0] is out
    want = reference.gated(op, as_float64(x))
    # Small results are compared in absolute terms, as far as the scale shows them.
    factors = scale if granularity == "tensor" else backend.numpy(got[1])
    quantization.assert_quantized(backend.numpy(out), factors, want, out_dtype, granularity, group_size, 4e-6)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("out_dtype", QUANTIZED)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", list(reference.GATED))
def test_quantized_dtypes(backend, rng, op, dtype, out_dtype, granularity):
    for num_rows, width in ((1, 128), (5, 256), (3, 2048), (300, 384)):
        check_quantized(backend, rng, op, num_rows, width, dtype, out_dtype, granularity)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("out_dtype", QUANTIZED)
def test_quantized_of_many_rows(backend, rng, out_dtype, granularity):
    """As many as a GPU takes in other pieces give what a few of them give, bit for bit."""
    num_rows, width = (18000 if backend.device != "cpu" else 70), 1024
    x = draw(rng, (num_rows, 2 * width), "bfloat16")
    scale = backend.array(np.array([0.02], np.float32)) if granularity == "tensor" else None
    many, few = (
        quire.silu_and_mul(backend.array(rows), out_dtype=out_dtype, scale=scale, granularity=granularity)
        for rows in (x, x[-40:].copy())
    )
    for a, b in zip(many, few, strict=True):
        a, b = backend.numpy(a), backend.numpy(b)
        np.testing.assert_array_equal(a[-len(b) :].view(np.uint8), b.view(np.uint8))


@pytest.mark.parametrize("granularity", ["tensor", "token"])
@pytest.mark.parametrize("width", [1, 2, 7, 8, 31, 64, 129, 1000, 13824, 40000])
def test_quantized_widths(backend, rng, width, granularity):
    for dtype, out_dtype in (("bfloat16", "float8_e4m3fn"), ("float32", "int8")):
        check_quantized(backend, rng, "silu_and_mul", 3, width, dtype, out_dtype, granularity)


@pytest.mark.parametrize(
    ("width", "group_size"),
    [
        (128, 128),
        (1408, 128),
        (14336, 128),
        (96, 32),
        (96, 3),
        (7, 7),
        (768, 256),
        (1536, 512),
        (60, 1),
        (640, 8),
    ],
)
def test_quantized_groups(backend, rng, width, group_size):
    for dtype, out_dtype in (("bfloat16", "float8_e4m3fn"), ("float32", "int8"), ("float16", "int8")):
        check_quantized(backend, rng, "silu_and_mul", 5, width, dtype, out_dtype, "group", group_size)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("pad", [1, 8])
def test_quantized_strides(backend, rng, pad, granularity):
    check_quantized(backend, rng, "silu_and_mul", 6, 256, "bfloat16", "int8", granularity, 64, pad)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("out_dtype", QUANTIZED)
@pytest.mark.parametrize("width", [1024, 1025])
def test_quantized_bit_for_bit(backend, rng, width, out_dtype, granularity):
    """silu(100) is 100 in float32, so the results are known exactly: quotients are those of float32 division."""
    group_size = 128 if width == 1024 else 205
    up = (rng.standard_normal((6, width)) * np.exp2(rng.integers(-12, 4, width))).astype(np.float32)
    y = np.float32(100.0) * up
    given = np.array([0.37], np.float32)
    out, scales = quire.silu_and_mul(
        backend.array(np.concatenate([np.full_like(up, 100.0), up], axis=1)),
        out_dtype=out_dtype,
        scale=backend.array(given) if granularity == "tensor" else None,
        granularity=granularity,
        group_size=group_size,
    )
    if granularity == "tensor":
        want_scales = spread = given
    else:
        want_scales = quantization.scales_of(y, out_dtype, granularity, group_size)
        spread = np.repeat(want_scales, width // want_scales.shape[1], axis=1)
    np.testing.assert_array_equal(backend.numpy(scales), want_scales)
    want = quantization.store(y / spread, out_dtype)
    np.testing.assert_array_equal(backend.numpy(out).view(np.uint8), want.view(np.uint8))


def test_quantized_every_framework(framework, rng):
    x = draw(rng, (5, 512), "bfloat16")
    out, scales = quire.silu_and_mul(framework.array(x), out_dtype="int8", granularity="token")
    assert type(out) is type(scales) is type(framework.array(x))
    want = reference.gated("silu_and_mul", as_float64(x))
    quantization.assert_quantized(
        framework.numpy(out), framework.numpy(scales), want, "int8", "token", 0, 4e-6
    )


def test_quantized_zero_size(framework):
    for shape in [(0, 256), (3, 0)]:
        x = framework.array(np.zeros(shape, np.float32))
        out, scales = quire.silu_and_mul(x, out_dtype="int8", granularity="token")
        assert framework.numpy(out).shape == (shape[0], shape[1] // 2)
        assert framework.numpy(scales).shape == (shape[0], 1)


def test_quantized_refuses():
    x = np.ones((2, 6), np.float32)
    with pytest.raises(
        TypeError, match=r"\[silu_and_mul\] out_dtype: expected float8_e4m3fn or int8, got float32"
    ):
        quire.silu_and_mul(x, out_dtype="float32")
    with pytest.raises(ValueError, match=r"group_size: expected a divisor of the last dimension 3, got 2"):
        quire.gelu_and_mul(x, out_dtype="int8", granularity="group", group_size=2)
    with pytest.raises(
        ValueError, match=r"out: expected the shape of half of x, float32 \[2, 3\], got int8 \[2, 6\]"
    ):
        quire.gelu_tanh_and_mul(
            x, out_dtype="int8", scale=np.ones(1, np.float32), out=np.zeros((2, 6), np.int8)
        )
    scales = x[:, :1]
    with pytest.raises(ValueError, match=r"scales: expected memory apart from x"):
        quire.silu_and_mul(x, out_dtype="int8", granularity="token", out=(np.zeros((2, 3), np.int8), scales))
