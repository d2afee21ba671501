"""rms_norm, fused_add_rms_norm, layer_norm against float64, on every framework and backend.

SPDX-License-Identifier: Apache-2.0
"""

import importlib

import frameworks
import numpy as np
import pytest
from frameworks import as_float64, np_dtype
from reference import norm as reference
from reference import quantization
from tolerances import assert_close

import quire

DTYPES = ["float32", "float16", "bfloat16"]
#: Odd ones, vector edges, more than one CTA pass, and more than registers hold.
HIDDEN = [1, 2, 7, 8, 63, 64, 65, 127, 128, 256, 257, 769, 1024, 4096, 5125, 20000]


def draw(rng, shape, dtype):
    return rng.standard_normal(shape).astype(np.float32).astype(np_dtype(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_framework(framework, rng, dtype):
    x, weight, bias = draw(rng, (5, 96), dtype), draw(rng, (96,), dtype), draw(rng, (96,), dtype)
    out = quire.rms_norm(framework.array(x), framework.array(weight))
    assert type(out) is type(framework.array(x))
    assert_close("norm", framework.numpy(out), reference.rms_norm(as_float64(x), as_float64(weight), 1e-6))
    out = quire.layer_norm(framework.array(x), framework.array(weight), framework.array(bias))
    assert_close(
        "layer_norm",
        framework.numpy(out),
        reference.layer_norm(as_float64(x), as_float64(weight), as_float64(bias), 1e-5),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", HIDDEN)
def test_rms_norm(backend, rng, hidden, dtype):
    x, weight = draw(rng, (3, hidden), dtype), draw(rng, (hidden,), "float32")
    for offset in (0.0, 1.0):
        out = quire.rms_norm(backend.array(x), backend.array(weight), 1e-5, weight_offset=offset)
        want = reference.rms_norm(as_float64(x), as_float64(weight), float(np.float32(1e-5)), offset)
        assert_close("norm", backend.numpy(out), want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", HIDDEN)
def test_layer_norm(backend, rng, hidden, dtype):
    x, weight, bias = (
        draw(rng, (3, hidden), dtype),
        draw(rng, (hidden,), dtype),
        draw(rng, (hidden,), "float32"),
    )
    for b in (bias, None):
        out = quire.layer_norm(
            backend.array(x), backend.array(weight), None if b is None else backend.array(b), 1e-5
        )
        want = reference.layer_norm(
            as_float64(x), as_float64(weight), None if b is None else as_float64(b), float(np.float32(1e-5))
        )
        assert_close("layer_norm", backend.numpy(out), want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", HIDDEN)
def test_fused_add_rms_norm(backend, rng, hidden, dtype):
    x, residual, weight = (
        draw(rng, (3, hidden), dtype),
        draw(rng, (3, hidden), dtype),
        draw(rng, (hidden,), dtype),
    )
    bx, br = backend.array(x), backend.array(residual)
    got_x, got_r = quire.fused_add_rms_norm(bx, br, backend.array(weight))
    assert got_x is bx
    assert got_r is br
    # The sum is rounded to the dtype first: exact.
    total = (x.astype(np.float32) + residual.astype(np.float32)).astype(x.dtype)
    np.testing.assert_array_equal(backend.numpy(br).view(np.uint8), total.view(np.uint8))
    assert_close("norm", backend.numpy(bx), reference.rms_norm(as_float64(total), as_float64(weight), 1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [1, 2, 33, 1000])
@pytest.mark.parametrize("hidden", [64, 128, 4096])
def test_row_counts(backend, rng, num_rows, hidden, dtype):
    x, weight = draw(rng, (num_rows, hidden), dtype), draw(rng, (hidden,), dtype)
    out = quire.rms_norm(backend.array(x), backend.array(weight))
    assert_close("norm", backend.numpy(out), reference.rms_norm(as_float64(x), as_float64(weight), 1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pad", [1, 3, 8])
def test_strided_rows(backend, rng, pad, dtype):
    """Rows of a wider tensor, as q and k lie in a packed projection; the padding is NaN and must not matter nor change."""
    x, weight = draw(rng, (2, 3, 5, 72), dtype), draw(rng, (72,), dtype)
    bx = backend.strided(x, pad)
    want = reference.rms_norm(as_float64(x), as_float64(weight), 1e-6)
    assert_close("norm", backend.numpy(quire.rms_norm(bx, backend.array(weight))), want)
    assert_close("norm", backend.numpy(quire.rms_norm(bx, backend.array(weight), out=bx)), want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_permuted_outer_dimensions(backend, rng, dtype):
    x, weight = draw(rng, (4, 3, 2, 40), dtype), draw(rng, (40,), dtype)
    bx = backend.array(x)
    permuted = bx.transpose(0, 2) if backend.name == "torch" else bx.swapaxes(0, 2)
    want = reference.rms_norm(as_float64(np.swapaxes(x, 0, 2)), as_float64(weight), 1e-6)
    assert_close("norm", backend.numpy(quire.rms_norm(permuted, backend.array(weight))), want)


@pytest.mark.parametrize("offset", [1, 3])
def test_unaligned_rows(backend, rng, offset):
    x, weight = draw(rng, (4 * 128 + offset,), "float16"), draw(rng, (128 + offset,), "float16")
    bx = backend.array(x)[offset:].reshape(4, 128)
    want = reference.rms_norm(as_float64(x[offset:].reshape(4, 128)), as_float64(weight[offset:]), 1e-6)
    assert_close("norm", backend.numpy(quire.rms_norm(bx, backend.array(weight)[offset:])), want)


def test_one_dimension_and_out(framework, rng):
    x, weight = draw(rng, (33,), "float32"), draw(rng, (33,), "float32")
    want = reference.rms_norm(as_float64(x), as_float64(weight), 1e-6)
    if not framework.writable:
        with pytest.raises(
            ValueError, match=r"\[rms_norm\] out: expected a writable tensor, got a JAX array.*quire\.jax"
        ):
            quire.rms_norm(framework.array(x), framework.array(weight), out=framework.array(x))
        return
    out = framework.array(np.full_like(x, np.nan))
    assert quire.rms_norm(framework.array(x), framework.array(weight), out=out) is out
    assert_close("norm", framework.numpy(out), want)


def test_no_rows(framework):
    x = np.zeros((0, 16), np.float32)
    assert framework.numpy(
        quire.rms_norm(framework.array(x), framework.array(np.ones(16, np.float32)))
    ).shape == (0, 16)


def test_extreme_values(backend):
    """Squares that overflow 16 bits, zeros, infinities and NaN stay what float32 arithmetic makes of them."""
    x = np.zeros((4, 64), np.float16)
    x[0] = 60000.0
    x[2, 5] = np.inf
    x[3, 7] = np.nan
    out = backend.numpy(quire.rms_norm(backend.array(x), backend.array(np.ones(64, np.float16)))).astype(
        np.float32
    )
    np.testing.assert_allclose(out[0], 1.0, rtol=1e-3)
    np.testing.assert_array_equal(out[1], 0.0)
    assert np.isnan(out[2, 5])
    assert (out[2, :5] == 0).all()
    assert np.isnan(out[3]).all()


@pytest.mark.parametrize(
    ("mutate", "error", "text"),
    [
        (
            lambda a: a.update(weight=np.ones(15, np.float32)),
            ValueError,
            r"\[rms_norm\] weight: expected float32 \[16\], got float32 \[15\]",
        ),
        (
            lambda a: a.update(weight=np.ones((1, 16), np.float32)),
            ValueError,
            r"weight: expected float32 \[16\]",
        ),
        (
            lambda a: a.update(weight=np.ones(32, np.float32)[::2]),
            ValueError,
            r"weight: expected a contiguous tensor, got strides \[2\]",
        ),
        (
            lambda a: a.update(weight=np.ones(16, np.int32)),
            TypeError,
            r"weight: expected float32, float16 or bfloat16, got int32 \[16\]",
        ),
        (
            lambda a: a.update(x=np.ones((2, 16), np.float64)),
            TypeError,
            r"x: expected float32, .*, got float64",
        ),
        (
            lambda a: a.update(x=np.ones((2, 16), np.int64)),
            TypeError,
            r"x: expected float32, float16 or bfloat16, got int64 \[2, 16\]",
        ),
        (
            lambda a: a.update(x=np.ones((2, 32), np.float32)[:, ::2]),
            ValueError,
            r"x: expected stride 1 in the last dimension, got strides \[32, 2\]",
        ),
        (
            lambda a: a.update(x=np.ones((2, 0), np.float32)),
            ValueError,
            r"x: expected a last dimension of 1 or more",
        ),
        (lambda a: a.update(x=np.ones((1, 1, 1, 2, 16), np.float32)), ValueError, r"x: expected rank 1 to 4"),
        (lambda a: a.update(x=np.float32(1.0)), TypeError, r"x: expected a tensor"),
        (
            lambda a: a.update(out=np.ones((2, 15), np.float32)),
            ValueError,
            r"out: expected float32 \[2, 16\] like x, got float32 \[2, 15\]",
        ),
        (
            lambda a: a.update(out=np.ones((2, 16), np.float16)),
            TypeError,
            r"out: expected float32 like x, got float16 \[2, 16\]",
        ),
        (lambda a: a.update(out=np.broadcast_to(np.float32(0), (2, 16))), ValueError, r"out: expected"),
        (
            lambda a: a.update(out=np.ones((2, 16), np.float32)[::-1]),
            ValueError,
            r"out: expected an output whose elements do not share memory .*got strides \[-16, 1\]",
        ),
        (lambda a: a.update(eps=float("nan")), ValueError, r"eps: expected a finite number, got nan"),
        (lambda a: a.update(eps=-1.0), ValueError, r"eps: expected 0 or more, got -1"),
        (lambda a: a.update(eps="small"), TypeError, r"eps: expected a number, got str"),
        (lambda a: a.update(weight=None), TypeError, r"weight: expected a tensor .*, got NoneType"),
        (
            lambda a: a.update(stream="s"),
            TypeError,
            r"stream: expected an int, an object with __cuda_stream__, or None, got str",
        ),
    ],
)
def test_bad_calls(mutate, error, text):
    arguments = {
        "x": np.ones((2, 16), np.float32),
        "weight": np.ones(16, np.float32),
        "out": np.full((2, 16), 7.0, np.float32),
    }
    mutate(arguments)
    before = np.array(arguments["out"])
    with pytest.raises(error, match=text):
        quire.rms_norm(**arguments)
    np.testing.assert_array_equal(arguments["out"], before)


def test_read_only_and_overlapping_outputs():
    x, weight = np.ones((4, 16), np.float32), np.ones(16, np.float32)
    frozen = np.ones((4, 16), np.float32)
    frozen.setflags(write=False)
    with pytest.raises(ValueError, match=r"out: expected a writable tensor, got a read-only one"):
        quire.rms_norm(x, weight, out=frozen)
    pool = np.ones((5, 16), np.float32)
    with pytest.raises(ValueError, match=r"out: expected memory apart from x, or exactly its own"):
        quire.rms_norm(pool[:4], weight, out=pool[1:])
    with pytest.raises(ValueError, match=r"residual: expected memory apart from x"):
        quire.fused_add_rms_norm(pool, pool, weight)
    with pytest.raises(ValueError, match=r"out: expected memory apart from weight"):
        quire.rms_norm(x[:1], pool[0], out=pool[:1])
    # Interleaved columns share a byte range, but no byte.
    packed = np.ones((4, 32), np.float32)
    quire.rms_norm(packed[:, :16], weight, out=packed[:, 16:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_error_at_most_half_again_torchs(torch, rng, dtype):
    """Against float64, our error is at most 1.5 times that of torch at the same dtype."""
    x, weight = draw(rng, (64, 1024), dtype), draw(rng, (1024,), dtype)
    from frameworks import Torch

    cpu = Torch("cpu")
    tx, tw = cpu.array(x), cpu.array(weight)
    want = reference.rms_norm(as_float64(x), as_float64(weight), 1e-6)
    ours = np.abs(as_float64(cpu.numpy(quire.rms_norm(tx, tw))) - want).max()
    theirs = np.abs(as_float64(cpu.numpy(torch.nn.functional.rms_norm(tx, (1024,), tw, 1e-6))) - want).max()
    assert ours <= 1.5 * theirs


# ---- quantized results -------------------------------------------------------------------------------------------------

QUANTIZED = ["float8_e4m3fn", "int8"]
GRANULARITIES = ["tensor", "token", "group"]


def poisoned(shape, dtype):
    x = np.empty(shape, np_dtype(dtype))
    x.view(np.uint8)[...] = 0xFF
    return x


def quantized_out(backend, shape, out_dtype, granularity, group_size, pad=0):
    """Poisoned outputs: out and, where they are computed, scales, in rows of a wider tensor."""
    out = backend.strided(poisoned(shape, out_dtype), pad)
    if granularity == "tensor":
        return out, out
    groups = 1 if granularity == "token" else shape[-1] // group_size
    scales = backend.strided(poisoned((*shape[:-1], groups), "float32"), pad)
    return out, (out, scales)


def check_quantized(
    backend, rng, op, shape, dtype, out_dtype, granularity, group_size=128, pad=0, weight_dtype="float32"
):
    x, residual = draw(rng, shape, dtype), draw(rng, shape, dtype)
    weight, bias = draw(rng, shape[-1:], weight_dtype), draw(rng, shape[-1:], "float32")
    scale = np.array([0.013], np.float32) if granularity == "tensor" else None
    tensor, out = quantized_out(backend, shape, out_dtype, granularity, group_size, pad)
    options = {
        "out": out,
        "out_dtype": out_dtype,
        "scale": None if scale is None else backend.array(scale),
        "granularity": granularity,
        "group_size": group_size,
    }
    bx, bw = backend.strided(x, pad), backend.array(weight)
    eps = float(np.float32(1e-5))
    if op == "rms_norm":
        got = quire.rms_norm(bx, bw, 1e-5, weight_offset=1.0, **options)
        want = reference.rms_norm(as_float64(x), as_float64(weight), eps, 1.0)
    elif op == "layer_norm":
        got = quire.layer_norm(bx, bw, backend.array(bias), 1e-5, **options)
        want = reference.layer_norm(as_float64(x), as_float64(weight), as_float64(bias), eps)
    else:
        br = backend.strided(residual, pad)
        got = quire.fused_add_rms_norm(bx, br, bw, 1e-5, **options)
        total = (x.astype(np.float32) + residual.astype(np.float32)).astype(x.dtype)
        np.testing.assert_array_equal(backend.numpy(br).view(np.uint8), total.view(np.uint8))
        want = reference.rms_norm(as_float64(total), as_float64(weight), eps)
    assert got[0] is tensor
    np.testing.assert_array_equal(backend.numpy(bx).view(np.uint8), x.view(np.uint8))
    scales = scale if granularity == "tensor" else backend.numpy(got[1])
    if granularity != "tensor":
        assert got[1] is out[1]
    # layer_norm's difference from the mean cancels; what is left is near in absolute terms.
    slack = (
        1e-5 if op == "layer_norm" else 2e-6 if shape[-1] <= 20000 else 5e-6
    )  # a long row's sum is less exact
    if op == "layer_norm":
        near = np.abs(want) < 2e-2
        host, exact = backend.numpy(got[0]), want.copy()
        spread = scales if granularity != "group" else np.repeat(scales, group_size, axis=-1)
        exact[near] = (host.astype(np.float64) * spread)[near]
        assert (np.abs(exact - want) <= spread).all()
        want = exact
        quantization.assert_quantized(host, scales, want, out_dtype, granularity, group_size, slack)
        return
    quantization.assert_quantized(
        backend.numpy(got[0]), scales, want, out_dtype, granularity, group_size, slack
    )


OPS = ["rms_norm", "fused_add_rms_norm", "layer_norm"]


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("out_dtype", QUANTIZED)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_quantized_dtypes(backend, rng, op, dtype, out_dtype, granularity):
    for num_rows, hidden in ((1, 128), (5, 256), (3, 2048), (700, 512)):
        check_quantized(backend, rng, op, (num_rows, hidden), dtype, out_dtype, granularity)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("out_dtype", QUANTIZED)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("op", OPS)
def test_quantized_wide_rows(backend, rng, op, dtype, out_dtype, granularity):
    """Weights of x's dtype, and CTAs of several warps whose last one is not full."""
    for num_rows, hidden in ((3, 4224), (600, 1152)):
        check_quantized(
            backend, rng, op, (num_rows, hidden), dtype, out_dtype, granularity, 64, weight_dtype=dtype
        )


@pytest.mark.parametrize("granularity", [None, *GRANULARITIES])
@pytest.mark.parametrize("num_rows", [6, 700])
@pytest.mark.parametrize("op", OPS)
def test_layouts_agree_bit_for_bit(backend, rng, op, num_rows, granularity):
    """Rows at two strides give what the same rows at one stride give."""
    for dtype, hidden in (("bfloat16", 1040), ("float16", 4096)):
        shape = (2, num_rows // 2 + 1, hidden)
        weight, bias = draw(rng, shape[-1:], dtype), draw(rng, shape[-1:], dtype)
        x, residual = draw(rng, shape, dtype), draw(rng, shape, dtype)
        options = {} if granularity is None else {"out_dtype": "float8_e4m3fn", "granularity": granularity}
        if granularity == "tensor":
            options["scale"] = backend.array(np.array([0.017], np.float32))
        if granularity == "group":
            options["group_size"] = 16
        results = []
        for layout in ("one stride", "two strides"):

            def rows(array):
                if layout == "two strides":
                    return backend.array(array)[:, :-1]
                return backend.array(np.ascontiguousarray(array[:, :-1]).reshape(-1, hidden))

            bx, br, bw = rows(x), rows(residual), backend.array(weight)
            if op == "rms_norm":
                got = quire.rms_norm(bx, bw, weight_offset=1.0, **options)
            elif op == "layer_norm":
                got = quire.layer_norm(bx, bw, backend.array(bias), **options)
            else:
                got = quire.fused_add_rms_norm(bx, br, bw, **options)
                got = (*got, br) if isinstance(got, tuple) else (got, br)
            got = got if isinstance(got, tuple) else (got,)
            results.append([np.ascontiguousarray(backend.numpy(g)).reshape(-1).view(np.uint8) for g in got])
        for one, two in zip(*results, strict=True):
            np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("granularity", ["tensor", "token"])
@pytest.mark.parametrize("hidden", [*HIDDEN, 40000])
@pytest.mark.parametrize("op", OPS)
def test_quantized_sizes(backend, rng, op, hidden, granularity):
    for dtype, out_dtype in (("bfloat16", "float8_e4m3fn"), ("float32", "int8")):
        check_quantized(backend, rng, op, (3, hidden), dtype, out_dtype, granularity, weight_dtype=dtype)


@pytest.mark.parametrize(
    ("hidden", "group_size"),
    [
        (128, 128),
        (384, 128),
        (5120, 128),
        (12288, 64),
        (40960, 128),
        (96, 32),
        (96, 3),
        (7, 7),
        (768, 256),
        (1536, 512),
        (60, 1),
        (640, 8),
    ],
)
@pytest.mark.parametrize("op", OPS)
def test_quantized_groups(backend, rng, op, hidden, group_size):
    for dtype, out_dtype, num_rows in (
        ("bfloat16", "float8_e4m3fn", 3),
        ("float32", "int8", 2),
        ("float16", "int8", 600),
    ):
        if num_rows * hidden > 10**6:
            continue
        check_quantized(backend, rng, op, (num_rows, hidden), dtype, out_dtype, "group", group_size)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("pad", [0, 1, 8])
@pytest.mark.parametrize("op", OPS)
def test_quantized_strides(backend, rng, op, pad, granularity):
    check_quantized(backend, rng, op, (2, 3, 256), "bfloat16", "float8_e4m3fn", granularity, 64, pad)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("out_dtype", QUANTIZED)
@pytest.mark.parametrize("weight_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("num_rows", [3, 800])
def test_quantized_bit_for_bit(backend, rng, num_rows, weight_dtype, out_dtype, granularity):
    """Rows of +1 and -1 have norm 1 exactly, so the results are the weights: quotients are those of float32 division, ties included."""
    hidden = 2048
    x = np.where(rng.random((num_rows, hidden)) < 0.5, -1.0, 1.0).astype(np_dtype("bfloat16"))
    weight = (rng.standard_normal(hidden) * np.exp2(rng.integers(-12, 4, hidden))).astype(np.float32)
    weight[:200] = np.arange(200) / 16  # ties under a scale of a power of two
    weight = weight.astype(np_dtype(weight_dtype))
    y = x.astype(np.float32) * weight.astype(np.float32)
    for scale in (0.125, 0.0371, 3.0, 1e-3, 2.0**-70, 1e25):
        given = np.array([scale], np.float32)
        out, scales = quire.rms_norm(
            backend.array(x),
            backend.array(weight),
            0.0,
            out_dtype=out_dtype,
            scale=backend.array(given) if granularity == "tensor" else None,
            granularity=granularity,
        )
        if granularity == "tensor":
            want_scales = spread = given
        else:
            want_scales = quantization.scales_of(y, out_dtype, granularity, 128)
            spread = np.repeat(want_scales, hidden // want_scales.shape[1], axis=1)
        np.testing.assert_array_equal(backend.numpy(scales), want_scales)
        want = quantization.store(y / spread, out_dtype)
        np.testing.assert_array_equal(backend.numpy(out).view(np.uint8), want.view(np.uint8))


@pytest.mark.parametrize("granularity", [None, *GRANULARITIES])
@pytest.mark.parametrize("num_rows", [3, 700])
@pytest.mark.parametrize("hidden", [1152, 4224])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_layer_norm_off_centre(backend, rng, dtype, hidden, num_rows, granularity):
    """Rows whose means are up to fifty deviations, on both sides of where they are swept again; squares that are no number; constant rows."""
    rows = rng.standard_normal((num_rows, hidden)) + rng.choice(
        [0.0, 0.5, 1.9, 2.1, 5.0, 50.0], (num_rows, 1)
    )
    rows[0] = 3.0
    if dtype == "bfloat16":
        rows[1] = 2.0**60 + rng.standard_normal(hidden) * 2.0**54
    x = rows.astype(np_dtype(dtype))
    weight, bias = draw(rng, (hidden,), dtype), draw(rng, (hidden,), dtype)
    want = reference.layer_norm(as_float64(x), as_float64(weight), as_float64(bias), float(np.float32(1e-5)))
    arguments = backend.array(x), backend.array(weight), backend.array(bias), 1e-5
    if granularity is None:
        assert_close("layer_norm", backend.numpy(quire.layer_norm(*arguments)), want)
        return
    given = np.array([0.017], np.float32)
    scale = backend.array(given) if granularity == "tensor" else None
    out, scales = quire.layer_norm(*arguments, out_dtype="int8", granularity=granularity, scale=scale)
    spread = (
        np.repeat(backend.numpy(scales), hidden if granularity == "token" else 128, axis=-1)
        if scale is None
        else given
    )
    # To the nearest step, and near where it is halved to one of both.
    quotient = np.clip(want / spread, -128, 127)
    assert (np.abs(backend.numpy(out) - quotient) <= 0.5 + 1e-3).all()


@pytest.mark.parametrize("hidden", [64, 1152, 4224])
@pytest.mark.parametrize("num_rows", [4, 700])
def test_layer_norm_of_extreme_values(backend, hidden, num_rows):
    """Rows with an infinity or a NaN are NaN, those of huge values are not, and none touches another."""
    x = np.zeros((num_rows, hidden), np.float16)
    x[0, ::2], x[0, 1::2] = 60000.0, -60000.0
    x[1, 5], x[2, 7] = np.inf, np.nan
    ones = np.ones(hidden, np.float16)
    out = backend.numpy(quire.layer_norm(*(backend.array(a) for a in (x, ones, ones)))).astype(np.float32)
    np.testing.assert_allclose(out[0, ::2], 2.0, rtol=1e-3)
    np.testing.assert_allclose(out[0, 1::2], 0.0, atol=1e-3)
    assert np.isnan(out[1:3]).all()
    np.testing.assert_array_equal(out[3:], 1.0)


@pytest.mark.parametrize("granularity", ["token", "group"])
@pytest.mark.parametrize("hidden", [256, 250])
def test_quantized_extremes(backend, hidden, granularity):
    """Rows of zeros have a scale to divide by; NaN does not count for a scale."""
    x = np.zeros((3, hidden), np.float32)
    x[1], x[2] = 1.0, 1.0
    weight = np.ones(hidden, np.float32)
    weight[5] = np.nan
    out, scales = quire.rms_norm(
        backend.array(x),
        backend.array(weight),
        out_dtype="float8_e4m3fn",
        granularity=granularity,
        group_size=hidden // 2,
    )
    host, factors = backend.numpy(out).astype(np.float32), backend.numpy(scales)
    assert np.isnan(host[:, 5]).all()
    rest = np.delete(host, 5, axis=1)
    assert (rest[0] == 0).all()
    assert (rest[1:] == 448).all()
    np.testing.assert_array_equal(factors[0], np.float32(2.0**-126))
    np.testing.assert_allclose(factors[1:], 1 / 448, rtol=1e-6)
    out, _ = quire.rms_norm(backend.array(x), backend.array(weight), out_dtype="int8", granularity="token")
    assert (backend.numpy(out)[:, 5] == 0).all()


def test_quantized_every_framework(framework, rng):
    x, weight = draw(rng, (5, 256), "bfloat16"), draw(rng, (256,), "bfloat16")
    out, scales = quire.rms_norm(
        framework.array(x), framework.array(weight), out_dtype="int8", granularity="group", group_size=64
    )
    assert type(out) is type(scales) is type(framework.array(x))
    want = reference.rms_norm(as_float64(x), as_float64(weight), 1e-6)
    quantization.assert_quantized(
        framework.numpy(out), framework.numpy(scales), want, "int8", "group", 64, 2e-6
    )


def test_quantized_no_rows(framework):
    x, weight = framework.array(np.zeros((0, 256), np.float32)), framework.array(np.ones(256, np.float32))
    for granularity, groups in (("token", 1), ("group", 2)):
        out, scales = quire.rms_norm(x, weight, out_dtype="int8", granularity=granularity)
        assert framework.numpy(out).shape == (0, 256)
        assert framework.numpy(scales).shape == (0, groups)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"out_dtype": "float16"}, TypeError, r"out_dtype: expected float8_e4m3fn or int8, got float16"),
        ({"out_dtype": "int8"}, ValueError, r'scale: expected one for granularity "tensor", got none'),
        (
            {"out_dtype": "int8", "granularity": "token", "scale": np.ones(1, np.float32)},
            ValueError,
            r'scale: expected none for granularity "token", which computes its own, got one',
        ),
        (
            {"out_dtype": "int8", "scale": np.ones(2, np.float32)},
            ValueError,
            r"scales: expected float32 \[1\], got float32 \[2\]",
        ),
        (
            {"out_dtype": "int8", "granularity": "row"},
            ValueError,
            r'granularity: expected "tensor", "token" or "group", got "row"',
        ),
        (
            {"out_dtype": "int8", "granularity": "group", "group_size": 5},
            ValueError,
            r"group_size: expected a divisor of the last dimension 16, got 5",
        ),
        (
            {"out_dtype": "int8", "granularity": "group", "group_size": 0},
            ValueError,
            r"group_size: expected a divisor of the last dimension 16, got 0",
        ),
        (
            {"out_dtype": "int8", "granularity": "token", "out": np.zeros((2, 16), np.int8)},
            ValueError,
            r"out: expected a pair \(out, scales\), as scales are computed, got ndarray",
        ),
        (
            {
                "out_dtype": "int8",
                "granularity": "token",
                "out": (np.zeros((2, 15), np.int8), np.zeros((2, 1), np.float32)),
            },
            ValueError,
            r"out: expected the shape of x, float32 \[2, 16\], got int8 \[2, 15\]",
        ),
        (
            {
                "out_dtype": "int8",
                "granularity": "token",
                "out": (np.zeros((2, 16), np.int8), np.zeros(2, np.float32)),
            },
            ValueError,
            r"scales: expected float32 \[2, 1\], got float32 \[2\]",
        ),
        (
            {
                "out_dtype": "int8",
                "granularity": "token",
                "out": (np.zeros((2, 16), np.uint8), np.zeros((2, 1), np.float32)),
            },
            TypeError,
            r"out: expected float8_e4m3fn or int8, got uint8",
        ),
    ],
)
def test_quantized_refuses(options, error, text):
    x, weight = np.ones((2, 16), np.float32), np.ones(16, np.float32)
    for call in (
        lambda: quire.rms_norm(x, weight, **options),
        lambda: quire.layer_norm(x, weight, **options),
        lambda: quire.fused_add_rms_norm(x, x.copy(), weight, **options),
    ):
        with pytest.raises(error, match=r"\[(rms_norm|layer_norm|fused_add_rms_norm)\] " + text):
            call()
    with pytest.raises(ValueError, match=r"out: expected none without out_dtype, got one: x is overwritten"):
        quire.fused_add_rms_norm(x, x.copy(), weight, out=x.copy())


@pytest.mark.parametrize("kind", ["quire", "quire.jax", "quire.torch", "compiled"])
@pytest.mark.parametrize(
    "op", ["rms_norm", "layer_norm", "fused_add_rms_norm", "silu_and_mul", "gelu_and_mul"]
)
def test_quantization_without_out_dtype(op, kind):
    """Refused, not ignored."""
    x = np.ones((2, 16), np.float32)
    weight = [np.ones(16, np.float32)] if "norm" in op else []
    arguments = [x, x.copy(), *weight] if op == "fused_add_rms_norm" else [x, *weight]
    function = getattr(quire, op)
    if kind != "quire":
        framework = frameworks.make("jax" if kind == "quire.jax" else "torch", "cpu")
        if isinstance(framework, str):
            pytest.skip(f"{kind}: {framework}")
        arguments = [framework.array(a) for a in arguments]
        function = getattr(importlib.import_module("quire.torch" if kind == "compiled" else kind), op)
    if kind == "compiled":
        function = framework.torch.compile(function, backend="eager")
    with pytest.raises(ValueError, match=rf"\[{op}\] scale: expected none without out_dtype, got one"):
        function(*arguments, scale=arguments[-1])
    with pytest.raises(
        ValueError, match=rf"\[{op}\] granularity: expected \"tensor\" without out_dtype, got 'token'"
    ):
        function(*arguments, granularity="token")


def test_quantized_refuses_overlaps():
    pool = np.ones((4, 64), np.float32)
    out = pool[2:].view(np.int8)[:, :64]
    scales = np.zeros((2, 1), np.float32)
    with pytest.raises(ValueError, match=r"out: expected memory apart from x"):
        quire.rms_norm(
            pool[2:], np.ones(64, np.float32), out_dtype="int8", granularity="token", out=(out, scales)
        )
    with pytest.raises(ValueError, match=r"scales: expected memory apart from x"):
        quire.rms_norm(
            pool[2:],
            pool[0],
            out_dtype="int8",
            granularity="token",
            out=(np.zeros((2, 64), np.int8), pool[2:, :1]),
        )
    with pytest.raises(ValueError, match=r"scales: expected memory apart from weight"):
        quire.rms_norm(
            pool[2:],
            pool[0],
            out_dtype="int8",
            granularity="token",
            out=(np.zeros((2, 64), np.int8), pool[:2, :1]),
        )
