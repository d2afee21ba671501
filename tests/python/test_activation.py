"""The activations against float64, on every framework and backend.

SPDX-License-Identifier: Apache-2.0
"""

import numpy as np
import pytest
from frameworks import as_float64, np_dtype
from reference import activation as reference
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
