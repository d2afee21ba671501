"""quantize and dequantize against float64.

SPDX-License-Identifier: Apache-2.0
"""

import numpy as np
import pytest
from frameworks import as_float64, np_dtype
from quantization_draws import DTYPES, assert_same_bits, draw
from reference import quantization as reference

import quire


def awkward(rng, shape, dtype):
    """Numbers of many magnitudes, with NaN, infinities, zeros of both signs and ties."""
    x = draw(rng, shape) * np.float32(2.0) ** rng.integers(-12, 12, shape)
    flat = x.reshape(-1)
    if flat.size >= 8:
        flat[:4] = [np.nan, 0.0, -0.0, 1.5]
    return flat.reshape(shape).astype(np_dtype(dtype))


def groups_of(x, granularity, group_size):
    """[..., groups, group elements], NaN where a group is short."""
    if granularity == "tensor":
        return x.reshape(1, 1, -1)
    size = x.shape[-1] if granularity == "token" else group_size
    short = -x.shape[-1] % size
    return np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, short)], constant_values=np.nan).reshape(
        *x.shape[:-1], -1, size
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("granularity", ["tensor", "token", "group"])
@pytest.mark.parametrize("kind", ["fp8", "int8", "asymmetric"])
@pytest.mark.parametrize("width", [16, 100, 128, 1024, 4100, 9000])
def test_quantize(backend, rng, width, kind, granularity, dtype):
    """Bit for bit, computed and given scales, there and back."""
    x = awkward(rng, (5, width), dtype)
    wide = x.astype(np.float32)
    grouped = groups_of(wide, granularity, 64)
    low = np.fmin(np.nanmin(grouped, -1, initial=0.0), 0).astype(np.float32)
    high = np.fmax(np.nanmax(grouped, -1, initial=0.0), 0).astype(np.float32)
    name = "float8_e4m3fn" if kind == "fp8" else "int8"
    if kind == "asymmetric":
        scale, zero = reference.asymmetric_scales(low, high)
    else:
        scale = np.maximum(
            np.maximum(-low, high) / np.float32(reference.LARGEST[name]), reference.SMALLEST_SCALE
        )
        zero = np.zeros(scale.shape, np.int32)
    shape = (1,) if granularity == "tensor" else scale.shape
    quotient = grouped / scale[..., None]
    if kind == "asymmetric":
        rounded_ = np.where(np.isnan(quotient), 0, np.rint(quotient)) + zero[..., None]
        stored = np.clip(rounded_, -128, 127).astype(np.int8)
    else:
        stored = reference.store(quotient, name)
    stored = stored.reshape(5, -1) if granularity == "tensor" else stored.reshape(5, -1)[:, :width]

    arguments = {"granularity": granularity, "group_size": 64}
    if kind == "fp8":
        q, got_scale = quire.quantize_fp8(backend.array(x), **arguments)
    else:
        q, got_scale, *got_zero = quire.quantize_int8(backend.array(x), symmetric=kind == "int8", **arguments)
    np.testing.assert_array_equal(backend.numpy(got_scale), scale.reshape(shape))
    got = backend.numpy(q)
    is_number = ~np.isnan(stored.astype(np.float32))
    np.testing.assert_array_equal(np.isnan(got.astype(np.float32)), ~is_number)
    np.testing.assert_array_equal(got.view(np.uint8)[is_number], stored.view(np.uint8)[is_number])

    given = {"scale": backend.array(scale.reshape(shape)), **arguments}
    if kind == "asymmetric":
        np.testing.assert_array_equal(backend.numpy(got_zero[0]), zero.reshape(shape))
        given["zero_point"] = backend.array(zero.reshape(shape))
    again = (
        quire.quantize_fp8(backend.array(x), **given)
        if kind == "fp8"
        else quire.quantize_int8(backend.array(x), symmetric=kind == "int8", **given)
    )[0]
    np.testing.assert_array_equal(
        backend.numpy(again).view(np.uint8)[is_number], got.view(np.uint8)[is_number]
    )

    spread = np.broadcast_to(scale[..., None], grouped.shape).reshape(5, -1)[:, :width]
    offset = np.broadcast_to(zero[..., None], grouped.shape).reshape(5, -1)[:, :width]
    want = (stored.astype(np.float32) - offset.astype(np.float32)) * spread
    extra = (got_zero[0],) if kind == "asymmetric" else ()
    for out_dtype in DTYPES:
        undo = quire.dequantize_fp8 if kind == "fp8" else quire.dequantize_int8
        back = backend.numpy(undo(q, got_scale, *extra, out_dtype=out_dtype, **arguments))
        np.testing.assert_array_equal(as_float64(back), as_float64(want.astype(np_dtype(out_dtype))))


@pytest.mark.parametrize("kind", ["fp8", "int8", "asymmetric"])
@pytest.mark.parametrize(
    ("rows", "width"), [(65, 2048), (1234, 4000), (4097, 4096), (5003, 4096), (2560, 16384)]
)
def test_quantize_large_tensor(backend, rng, rows, width, kind):
    """One scale for more than a CTA, and for more than the CTAs hold at once; the ends of x count."""
    if backend.device == "cpu" and rows > 65:
        pytest.skip("shares of CTAs")
    x = draw(rng, (rows, width), "float16")
    x[0, 0], x[-1, -1] = -9.0, 11.0
    tensor = backend.array(x)
    if kind == "fp8":
        got = quire.quantize_fp8(tensor)
        again = quire.quantize_fp8(tensor, scale=got[1])
    else:
        got = quire.quantize_int8(tensor, symmetric=kind == "int8")
        given = {"zero_point": got[2]} if kind == "asymmetric" else {}
        again = quire.quantize_int8(tensor, scale=got[1], symmetric=kind == "int8", **given)
    if kind == "asymmetric":
        scale, zero = reference.asymmetric_scales(np.float32([-9.0]), np.float32([11.0]))
        np.testing.assert_array_equal(backend.numpy(got[2]), zero)
    else:
        scale = np.float32([11.0]) / np.float32(448 if kind == "fp8" else 127)
    np.testing.assert_array_equal(backend.numpy(got[1]), scale)
    assert_same_bits(backend.numpy(got[0]), backend.numpy(again[0]))


def test_quantize_frameworks(framework, rng):
    if framework.name == "cupy":
        pytest.skip("cupy on cuda: CuPy has no float8 dtypes")
    x = draw(rng, (3, 64), "float16")
    q, scale = quire.quantize_fp8(framework.array(x), granularity="token")
    assert type(q) is type(scale) is type(framework.array(x))
    back = framework.numpy(quire.dequantize_fp8(q, scale, granularity="token")).astype(np.float64)
    np.testing.assert_allclose(back, as_float64(x), rtol=2.0**-4, atol=1e-2)


@pytest.mark.parametrize("kind", ["fp8", "int8", "asymmetric"])
def test_quantize_groups_of_rows_with_gaps(backend, rng, kind):
    """The same as of dense rows, which one kernel takes as a whole."""
    x = draw(rng, (70, 512), "bfloat16")
    x[7, 130], x[9, 5] = np.nan, np.inf
    quantize = quire.quantize_fp8 if kind == "fp8" else quire.quantize_int8
    options = {"granularity": "group", "group_size": 128} | (
        {} if kind == "fp8" else {"symmetric": kind == "int8"}
    )

    def run(tensor):
        computed = quantize(tensor, **options)
        given = {"scale": computed[1]} | ({"zero_point": computed[2]} if kind == "asymmetric" else {})
        return [*computed, quantize(tensor, **options, **given)[0]]

    for dense, gaps in zip(run(backend.array(x)), run(backend.strided(x, 16)), strict=True):
        assert_same_bits(backend.numpy(dense), backend.numpy(gaps))


def test_quantize_strided_and_zero_sizes(backend, rng):
    x = draw(rng, (4, 40), "bfloat16")
    whole = quire.quantize_fp8(backend.array(x), granularity="group", group_size=16)
    part = quire.quantize_fp8(backend.strided(x, 5), granularity="group", group_size=16)
    for a, b in zip(whole, part, strict=True):
        assert_same_bits(backend.numpy(a), backend.numpy(b))
    assert tuple(whole[1].shape) == (4, 3)
    q, scale = quire.quantize_fp8(backend.array(x[:0]), granularity="token")
    assert (tuple(q.shape), tuple(scale.shape)) == ((0, 40), (0, 1))


@pytest.mark.parametrize("granularity", ["tensor", "token", "group"])
@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 40), (2, 0, 40), (2, 3, 0)])
def test_scales_of_nothing(backend, shape, granularity):
    """Computed scales of no elements are 1, whatever their memory held."""
    x = backend.array(np.zeros(shape, np.float32))
    scale_shape = (
        (1,)
        if granularity == "tensor"
        else (*shape[:-1], 1 if granularity == "token" else -(-shape[-1] // 128))
    )
    for asymmetric in (None, False, True):
        dtype = "float8_e4m3fn" if asymmetric is None else "int8"
        q = backend.array(np.zeros(shape, np_dtype(dtype)))
        scale = backend.array(np.full(scale_shape, np.nan, np.float32))
        zero = backend.array(np.full(scale_shape, 77, np.int32))
        if asymmetric is None:
            quire.quantize_fp8(x, granularity=granularity, out=(q, scale))
        elif asymmetric:
            quire.quantize_int8(x, symmetric=False, granularity=granularity, out=(q, scale, zero))
            np.testing.assert_array_equal(backend.numpy(zero), np.zeros(scale_shape, np.int32))
        else:
            quire.quantize_int8(x, granularity=granularity, out=(q, scale))
        np.testing.assert_array_equal(backend.numpy(scale), np.ones(scale_shape, np.float32))
    given = backend.array(np.full(scale_shape, 3.0, np.float32))
    quire.quantize_fp8(x, scale=given, granularity=granularity)
    np.testing.assert_array_equal(backend.numpy(given), np.full(scale_shape, 3.0, np.float32))


@pytest.mark.parametrize("dtype", DTYPES)
def test_scale_ub_of_awkward_rows(backend, rng, dtype):
    """Values beyond the bound saturate, with infinities and NaN among them."""
    x = awkward(rng, (5, 1024), dtype)
    x[1, 5], x[2, 7] = np.inf, -np.inf
    for bound in (1e-38, 0.5, 1e30):
        q, scale = quire.quantize_fp8(backend.array(x), granularity="token", scale_ub=bound)
        largest = np.nanmax(np.abs(x.astype(np.float32)), -1, keepdims=True)
        want = np.maximum(
            np.minimum(largest, np.float32(bound)) / np.float32(448.0), reference.SMALLEST_SCALE
        )
        np.testing.assert_array_equal(backend.numpy(scale), want)
        with np.errstate(over="ignore"):
            stored = reference.store(x.astype(np.float32) / want, "float8_e4m3fn")
        got, is_number = backend.numpy(q), ~np.isnan(stored.astype(np.float32))
        np.testing.assert_array_equal(np.isnan(got.astype(np.float32)), ~is_number)
        np.testing.assert_array_equal(got.view(np.uint8)[is_number], stored.view(np.uint8)[is_number])


def test_scale_ub(backend):
    x = np.array([[1.0, -1000.0]], np.float32)
    q, scale = quire.quantize_fp8(backend.array(x), granularity="token", scale_ub=44.8)
    np.testing.assert_array_equal(backend.numpy(scale), np.float32([[44.8]]) / np.float32(448.0))
    np.testing.assert_array_equal(backend.numpy(q).astype(np.float32), [[10.0, -448.0]])


# ---- Bad input -----------------------------------------------------------------------------------------------------------------------
