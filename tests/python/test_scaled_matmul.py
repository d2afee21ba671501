"""Products of 8-bit matrices against float64.

SPDX-License-Identifier: Apache-2.0
"""

import numpy as np
import pytest
from frameworks import as_float64, np_dtype
from quantization_draws import DTYPES, E4M3, assert_same_bits, draw, draw_scales
from reference import quantization as reference
from tolerances import assert_product_close

import quire
from quire import PackedWeight

SCALINGS = ["tensor", "token", "block"]


def draw_operand(rng, shape, dtype):
    if dtype == "int8":
        return rng.integers(-128, 128, shape).astype(np.int8)
    return draw(rng, shape).astype(E4M3)


def scale_shapes(scaling, m, n, k):
    blocks = -(-k // 128)
    return {
        "tensor": ((1,), (1,)),
        "token": ((m, 1), (n, 1)),
        "block": ((m, blocks), (-(-n // 128), blocks)),
    }[scaling]


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int8"])
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize(
    ("m", "n", "k"),
    [(1, 128, 256), (5, 48, 192), (64, 256, 512), (130, 200, 300), (3, 33, 17), (257, 64, 128)],
)
def test_scaled_matmul(backend, rng, m, n, k, scaling, dtype):
    a, b = draw_operand(rng, (m, k), dtype), draw_operand(rng, (n, k), dtype)
    shape_a, shape_b = scale_shapes(scaling, m, n, k)
    scale_a, scale_b = draw_scales(rng, shape_a, "float32"), draw_scales(rng, shape_b, "float32")
    if scaling == "block":
        wide_a = as_float64(a) * np.repeat(as_float64(scale_a), 128, 1)[:, :k]
        wide_b = as_float64(b) * reference.spread_blocks(scale_b, (n, k))
    else:
        wide_a, wide_b = as_float64(a) * as_float64(scale_a), as_float64(b) * as_float64(scale_b)
    bias = draw(rng, (n,), "float16")
    want = wide_a @ wide_b.T + as_float64(bias)
    magnitude = np.abs(wide_a) @ np.abs(wide_b).T + np.abs(as_float64(bias))
    for out_dtype in DTYPES:
        out = quire.scaled_matmul(
            *(backend.array(t) for t in (a, b, scale_a, scale_b)),
            bias=backend.array(bias),
            out_dtype=out_dtype,
        )
        # Tensor cores keep about 14 bits of a float8 sum.
        assert_product_close(backend.numpy(out), want, magnitude, 2.0**-12 if dtype != "int8" else 0.0)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int8"])
@pytest.mark.parametrize("scaling", ["token", "block"])
@pytest.mark.parametrize(
    ("m", "n", "k"),
    [
        (1024, 14336, 512),
        (1000, 14320, 384),
        (1000, 14320, 128),
        (900, 20000, 1040),
        (64, 4096, 4096),
        (128, 2048, 2048),
        (20, 520, 2048),
        (9, 520, 2176),
        (3, 1024, 4096),
    ],
)
def test_scaled_matmul_shares_of_tiles(backend, rng, m, n, k, scaling, dtype):
    """The last tiles of many are halved, those of few are split along K. Sums of small integers are exact."""
    if backend.device == "cpu":
        pytest.skip("tiles of Hopper's kernel")
    if scaling == "block" and dtype == "int8":
        pytest.skip("the portable kernel, which has no shares of tiles")
    a, b = (rng.integers(-4, 5, shape).astype(np.float32) for shape in ((m, k), (n, k)))
    scales = [
        np.exp2(rng.integers(-2, 3, shape)).astype(np.float32) for shape in scale_shapes(scaling, m, n, k)
    ]
    if scaling == "block":
        wide_a, wide_b = (
            a * np.repeat(scales[0], 128, 1)[:, :k],
            b * reference.spread_blocks(scales[1], (n, k)).astype(np.float32),
        )
    else:
        wide_a, wide_b = a * scales[0], b * scales[1]
    bias = rng.integers(-8, 9, (n,)).astype(np.float32)
    operands = [backend.array(t) for t in (a.astype(np_dtype(dtype)), b.astype(np_dtype(dtype)), *scales)]
    want = wide_a @ wide_b.T + bias
    offset = {}
    if dtype == "int8":
        zero = rng.integers(-3, 4, (m, 1)).astype(np.int32)
        offset = {"zero_point": backend.array(zero)}
        want -= zero * scales[0] * wide_b.sum(1)
    for out_dtype in ("bfloat16", "float16", "float32"):
        out = quire.scaled_matmul(*operands, bias=backend.array(bias), out_dtype=out_dtype, **offset)
        np.testing.assert_array_equal(
            as_float64(backend.numpy(out)), as_float64(want.astype(np_dtype(out_dtype)))
        )


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("given_sums", [False, True])
def test_scaled_matmul_zero_point(backend, rng, given_sums, per_token):
    m, n, k = 37, 72, 208
    a, b = draw_operand(rng, (m, k), "int8"), draw_operand(rng, (n, k), "int8")
    zero = rng.integers(-128, 128, (m, 1) if per_token else (1,)).astype(np.int32)
    scale_a, scale_b = draw_scales(rng, (m, 1), "float32"), draw_scales(rng, (n, 1), "float32")
    sums = backend.array(b.astype(np.int32).sum(1, dtype=np.int32)) if given_sums else None
    out = quire.scaled_matmul(
        *(backend.array(t) for t in (a, b, scale_a, scale_b)),
        zero_point=backend.array(zero),
        column_sums=sums,
        out_dtype="float32",
    )
    wide = as_float64(a) - zero
    want = (wide @ as_float64(b).T) * as_float64(scale_a) * as_float64(scale_b).T
    magnitude = np.abs(want) + 1e-30
    assert_product_close(backend.numpy(out), want, magnitude)  # exact but for the scales


def test_scaled_matmul_long_int8(backend):
    """Sums near the ends of int32."""
    k = 65536
    a, b = np.full((2, k), -128, np.int8), np.full((16, k), -128, np.int8)
    b[1] = 127
    one = np.ones(1, np.float32)
    out = quire.scaled_matmul(*(backend.array(t) for t in (a, b, one, one)), out_dtype="float32")
    want = as_float64(a) @ as_float64(b).T
    np.testing.assert_array_equal(backend.numpy(out).astype(np.float64), want.astype(np.float32))


@pytest.mark.parametrize(("m", "n", "k"), [(6, 128, 256), (70, 136, 1200), (200, 328, 1040), (300, 200, 384)])
def test_scaled_matmul_column_major_scales(backend, rng, m, n, k):
    """Scales of groups as [groups, tokens] in memory."""
    a, b = draw_operand(rng, (m, k), "float8_e4m3fn"), draw_operand(rng, (n, k), "float8_e4m3fn")
    shape_a, shape_b = scale_shapes("block", m, n, k)
    scale_a, scale_b = draw_scales(rng, shape_a[::-1], "float32"), draw_scales(rng, shape_b, "float32")
    tensors = [backend.array(t) for t in (a, b)]
    out = quire.scaled_matmul(*tensors, backend.array(scale_a).T, backend.array(scale_b), out_dtype="float32")
    want = quire.scaled_matmul(
        *tensors, backend.array(np.ascontiguousarray(scale_a.T)), backend.array(scale_b), out_dtype="float32"
    )
    assert_same_bits(backend.numpy(out), backend.numpy(want))


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int8"])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_scaled_matmul_batch_invariant(backend, rng, scaling, dtype):
    m, n, k = 200, 144, 256
    a, b = draw_operand(rng, (m, k), dtype), draw_operand(rng, (n, k), dtype)
    shape_a, shape_b = scale_shapes(scaling, m, n, k)
    scale_a, scale_b = draw_scales(rng, shape_a, "float32"), draw_scales(rng, shape_b, "float32")

    def run(begin, end):
        s = scale_a if scaling == "tensor" else scale_a[begin:end]
        args = [backend.array(np.ascontiguousarray(t)) for t in (a[begin:end], b, s, scale_b)]
        return backend.numpy(quire.scaled_matmul(*args, batch_invariant=True))

    whole = run(0, m)
    for begin, end in ((0, 1), (5, 7), (64, 200)):
        assert_same_bits(run(begin, end), whole[begin:end])


@pytest.mark.parametrize("kind", ["dynamic", "static", "asymmetric"])
def test_w8a8(backend, rng, kind):
    w = draw(rng, (72, 160))
    made = PackedWeight.quantize(backend.array(w), "w8a8")
    x = draw(rng, (9, 160), "bfloat16")
    x[:, 0] += 4.0
    kwargs = {}
    if kind != "dynamic":
        q, scale, *zero = quire.quantize_int8(backend.array(x), symmetric=kind == "static")
        kwargs = {"input_scale": scale, "input_zero_point": zero[0] if zero else None}
    weight = PackedWeight.from_int8(made.weight, made.scale, **kwargs)
    wide = as_float64(backend.numpy(weight.dequantize()))
    assert np.abs(wide - w).max() <= np.abs(w).max() / 127 * 0.51
    out = backend.numpy(quire.quantized_matmul(backend.array(x), weight)).astype(np.float64)
    want = as_float64(x) @ wide.T
    assert np.abs(out - want).max() < 0.03 * np.abs(want).max()
    if kind == "dynamic":
        return
    q = backend.numpy(q).astype(np.float64)
    offset = backend.numpy(zero[0]) if zero else 0
    exact = ((q - offset) * as_float64(backend.numpy(scale))) @ wide.T
    np.testing.assert_allclose(out, exact, rtol=2.0**-8, atol=1e-5)


# ---- quantize, dequantize -----------------------------------------------------------------------------------------------------------
