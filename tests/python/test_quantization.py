"""Packed weights, products with quantized operands, quantize and dequantize against float64, on every framework and backend.

SPDX-License-Identifier: Apache-2.0
"""

import contextlib
import functools
import re

import ml_dtypes
import numpy as np
import pytest
from frameworks import as_float64, np_dtype
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import quantization as reference
from tolerances import assert_product_close

import quire
from quire import PackedWeight

DTYPES = ["float32", "float16", "bfloat16"]
E4M3 = ml_dtypes.float8_e4m3fn


def draw(rng, shape, dtype="float32"):
    return rng.standard_normal(shape).astype(np.float32).astype(np_dtype(dtype))


def rounded(wide, dtype):
    """float64 to a float dtype by way of float32, as the library does: the product is exact in float32 for 16-bit scales."""
    return wide.astype(np.float32).astype(np_dtype(dtype))


def draw_scales(rng, shape, dtype="float16"):
    return (0.01 + 0.05 * rng.random(shape)).astype(np.float32).astype(np_dtype(dtype))


def assert_same_bits(got, want):
    assert got.dtype == want.dtype
    np.testing.assert_array_equal(
        np.ascontiguousarray(got).view(np.uint8), np.ascontiguousarray(want).view(np.uint8)
    )


def activation_dtypes(framework):
    return DTYPES if framework.device == "cpu" else DTYPES[1:]


def check_product(framework, rng, weight, wide, tokens=(1, 3, 17), **kwargs):
    """quantized_matmul against the float64 weight."""
    for dtype in activation_dtypes(framework):
        for count in tokens:
            x = draw(rng, (count, wide.shape[1]), dtype)
            out = framework.numpy(quire.quantized_matmul(framework.array(x), weight, **kwargs))
            assert out.dtype == x.dtype
            assert_product_close(out, as_float64(x) @ wide.T, np.abs(as_float64(x)) @ np.abs(wide).T)


#: Bits, out_features, in_features and numbers of tokens whose last round of tiles, of 64, 128 or 256 rows, leaves some of 132 SMs without one.
HELPED = [
    (4, 11000, 4032, (1, 2, 16, 24, 64)),
    (4, 17000, 2880, (1, 8, 16, 33, 64)),
    (8, 8520, 4032, (17, 32)),
    (8, 17000, 2048, (24, 64)),
]
every_helped = pytest.mark.parametrize(("bits", "out_features", "in_features", "counts"), HELPED)


def skip_unless_helped(backend):
    """Which products are helped with is a matter of how many SMs there are."""
    if backend.device == "cpu":
        pytest.skip("CUDA's kernel for few tokens")
    torch = pytest.importorskip("torch", reason="torch, which counts SMs, is not installed")
    properties = torch.cuda.get_device_properties(0)
    if (properties.major, properties.minor, properties.multi_processor_count) != (9, 0, 132):
        pytest.skip("no Hopper with 132 SMs")
    if not re.search(r"\b90a\b", quire.cuda_architectures()):
        pytest.skip("no code for sm_90a in this build")


def assert_helped(x, weight):
    explanation = quire.explain("quantized_matmul", x, weight)
    assert re.search(r"[1-9]\d* CTAs help the others", str(explanation)), explanation


# ---- Exactness of every format --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_awq_every_code_and_zero(framework, rng, dtype):
    """Every nibble meets every zero at every place of a word."""
    in_features, out_features = 16 * 32, 16 * 8
    codes = (np.arange(in_features)[:, None] + np.arange(out_features) // 8) % 16
    zeros = np.repeat(np.arange(16)[:, None], out_features, 1)
    scales = draw_scales(rng, (16, out_features), dtype)
    qweight, qzeros = reference.pack_awq(codes), reference.pack_awq(zeros)
    weight = PackedWeight.from_awq(
        framework.array(qweight), framework.array(qzeros), framework.array(scales), 32
    )
    wide = reference.dequantize_awq(qweight, qzeros, scales, 32)
    np.testing.assert_array_equal(
        wide, ((codes - np.repeat(zeros, 32, 0)) * as_float64(np.repeat(scales, 32, 0))).T
    )
    assert (weight.shape, weight.bits, weight.group_size) == ((out_features, in_features), 4, 32)
    for out_dtype in DTYPES:
        assert_same_bits(framework.numpy(weight.dequantize(out_dtype)), rounded(wide, out_dtype))


def test_awq_columns_of_a_word(backend):
    """A word with nibbles 0 to 7 holds columns 0 2 4 6 1 3 5 7."""
    qweight = np.full((32, 1), 0x76543210, np.int32)
    weight = PackedWeight.from_awq(
        backend.array(qweight),
        backend.array(np.zeros((1, 1), np.int32)),
        backend.array(np.ones((1, 8), np.float16)),
    )
    np.testing.assert_array_equal(backend.numpy(weight.dequantize())[:, 0], [0, 4, 1, 5, 2, 6, 3, 7])


@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_every_code_and_zero(framework, rng, bits, checkpoint_format):
    levels = 2**bits
    in_features, out_features = 32 * 16, max(levels, 32)
    codes = (np.arange(in_features)[:, None] * 5 + np.arange(out_features)) % levels
    stored = (np.arange(16)[:, None] * 11 + np.arange(out_features)) % levels
    scales = draw_scales(rng, (16, out_features))
    qweight = reference.pack_stream(codes.T, bits).T.copy()
    qzeros = reference.pack_stream(stored, bits)
    groups = np.arange(in_features) // 32
    wide = reference.dequantize_gptq(qweight, qzeros, scales, groups, bits, checkpoint_format)
    zeros = (stored + 1) % levels if checkpoint_format == "gptq" else stored
    np.testing.assert_array_equal(wide, ((codes - zeros[groups]) * as_float64(scales)[groups]).T)
    weight = PackedWeight.from_gptq(
        framework.array(qweight),
        framework.array(qzeros),
        framework.array(scales),
        bits=bits,
        checkpoint_format=checkpoint_format,
    )
    assert_same_bits(framework.numpy(weight.dequantize("float32")), rounded(wide, "float32"))
    assert_same_bits(framework.numpy(weight.dequantize("float16")), rounded(wide, "float16"))


def test_gptq_all_pairs(backend):
    """Each of 256 pairs of a code and a zero, in both conventions, in one weight: [code] by [zero]."""
    codes = np.repeat(np.arange(32)[:, None] % 16, 16, 1)
    for checkpoint_format, shift in (("gptq", 1), ("gptq_v2", 0)):
        weight = PackedWeight.from_gptq(
            backend.array(reference.pack_stream(codes.T, 4).T.copy()),
            backend.array(reference.pack_stream(np.arange(16)[None], 4)),
            backend.array(np.ones((1, 16), np.float16)),
            checkpoint_format=checkpoint_format,
        )
        want = (np.arange(32) % 16)[None] - ((np.arange(16) + shift) % 16)[:, None]
        np.testing.assert_array_equal(backend.numpy(weight.dequantize()), want)


def test_gptq_three_bits_across_words(backend):
    """Values 10 and 21 of 32 lie in two words each."""
    codes = np.zeros((32, 32), int)
    codes[10], codes[21] = 5, 6
    qweight = reference.pack_stream(codes.T, 3).T.copy()
    assert qweight.shape == (3, 32)
    first = qweight[:, 0].view(np.uint32).tolist()
    assert first[0] == (5 << 30) & 0xFFFFFFFF
    assert first[1] == (5 >> 2) | ((6 << 31) & 0xFFFFFFFF)
    assert first[2] == 6 >> 1
    qzeros = reference.pack_stream(np.full((1, 32), 3), 3)
    weight = PackedWeight.from_gptq(
        backend.array(qweight), backend.array(qzeros), backend.array(np.ones((1, 32), np.float16)), bits=3
    )
    np.testing.assert_array_equal(backend.numpy(weight.dequantize()), codes.T - 4)


def test_gptq_mislabelled(backend, rng):
    """A checkpoint whose zeros are 8 but which says "gptq" is read right with checkpoint_format overridden."""
    codes = rng.integers(0, 16, (64, 32))
    qweight, scales = reference.pack_stream(codes.T, 4).T.copy(), draw_scales(rng, (2, 32))
    qzeros = reference.pack_stream(np.full((2, 32), 8), 4)
    tensors = [backend.array(t) for t in (qweight, qzeros, scales)]
    weight = PackedWeight.from_gptq(*tensors, checkpoint_format="gptq_v2")
    wide = ((codes - 8) * as_float64(scales)[np.arange(64) // 32]).T
    assert_same_bits(backend.numpy(weight.dequantize()), rounded(wide, "float32"))
    symmetric = PackedWeight.from_gptq(tensors[0], None, tensors[2])
    assert_same_bits(backend.numpy(symmetric.dequantize()), rounded(wide, "float32"))
    assert symmetric.nbytes == weight.nbytes  # zeros that all are the middle are not kept


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_compressed_tensors(framework, rng, dtype, bits, asymmetric):
    out_features, in_features, group_size = 48, 256 + 32, 128
    groups = np.arange(in_features) // group_size
    codes = rng.integers(0, 2**bits, (out_features, in_features))
    zeros = rng.integers(0, 2**bits, (out_features, 3))
    scale = draw_scales(rng, (out_features, 3), dtype)
    packed = reference.pack_stream(codes, bits)
    zero_point = reference.pack_stream(zeros.T, bits).T.copy() if asymmetric else None
    wide = reference.dequantize_compressed(packed, scale, zero_point, bits, in_features, groups)
    weight = PackedWeight.from_compressed_tensors(
        weight_packed=framework.array(packed),
        weight_scale=framework.array(scale),
        weight_zero_point=None if zero_point is None else framework.array(zero_point),
        weight_shape=framework.array(np.array([out_features, in_features], np.int64)),
        bits=bits,
        group_size=group_size,
    )
    assert_same_bits(framework.numpy(weight.dequantize("float32")), rounded(wide, "float32"))
    check_product(framework, rng, weight, wide, (1, 5))


@pytest.mark.parametrize("shape", [(256, 384), (200, 136), (129, 127)])
@pytest.mark.parametrize("granularity", ["tensor", "channel", "block"])
def test_fp8(backend, rng, granularity, shape):
    codes = rng.integers(0, 256, shape).astype(np.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0  # NaN
    w = codes.view(E4M3)
    blocks = (-(-shape[0] // 128), -(-shape[1] // 128))
    scale = draw_scales(
        rng, {"tensor": (1,), "channel": (shape[0], 1), "block": blocks}[granularity], "float32"
    )
    weight = PackedWeight.from_fp8(backend.array(w), backend.array(scale))
    wide = as_float64(w) * reference.spread_blocks(scale, shape)
    for dtype in DTYPES:
        assert_same_bits(backend.numpy(weight.dequantize(dtype)), rounded(wide, dtype))
    assert weight.group_size == (128 if granularity == "block" else -1)
    x = draw(rng, (5, shape[1]), "bfloat16")
    out = backend.numpy(quire.quantized_matmul(backend.array(x), weight)).astype(np.float64)
    want = as_float64(x) @ wide.T
    # The activations are rounded to three bits of mantissa.
    assert np.abs(out - want).max() < 0.05 * np.abs(want).max()


def own_tensor(x):
    """A quire.Tensor on the CPU."""
    tensor = quire.empty(x.shape, x.dtype.name, "cpu")
    np.from_dlpack(tensor)[...] = x
    return tensor


@pytest.mark.parametrize("own", [False, True], ids=["", "quire"])
@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_scales_without_dimensions(framework, rng, kind, own):
    """A scale ``[]`` is one ``[1]``: from_fp8, from_int8, input_scale, input_zero_point. Those of rows may be ``[N]``."""
    if own and framework.device != "cpu":
        pytest.skip("made on the CPU")
    w = draw(rng, (8, 64))
    w = w.astype(E4M3) if kind == "fp8" else (w * 30).astype(np.int8)
    array = own_tensor if own else framework.array
    made = []
    for shape in ((), (1,)):
        scale, input_scale = (array(np.full(shape, s, np.float32)) for s in (0.5, 0.25))
        more = {} if kind == "fp8" else {"input_zero_point": array(np.full(shape, 3, np.int32))}
        make = PackedWeight.from_fp8 if kind == "fp8" else PackedWeight.from_int8
        made.append(make(framework.array(w), scale, input_scale=input_scale, **more))
    for name in ("scale", "input_scale", "input_zero_point"):
        a, b = (getattr(m, name) for m in made)
        assert (a is None) == (b is None)
        if a is not None:
            assert_same_bits(framework.numpy(a), framework.numpy(b))
    assert framework.numpy(made[0].input_scale).tolist() == [0.25]
    rows = np.arange(1, 9, dtype=np.float32)
    assert_same_bits(framework.numpy(make(framework.array(w), array(rows)).scale), rows[:, None])


# ---- Order, groups, sizes ---------------------------------------------------------------------------------------------------------


def make_gptq(rng, g_idx, num_groups, out_features=64, bits=4):
    codes = rng.integers(0, 2**bits, (len(g_idx), out_features))
    zeros = rng.integers(0, 2**bits, (num_groups, out_features))
    scales = draw_scales(rng, (num_groups, out_features))
    return reference.pack_stream(codes.T, bits).T.copy(), reference.pack_stream(zeros, bits), scales


def g_idx_of(kind, rng, in_features, group_size):
    g_idx = np.arange(in_features) // group_size
    if kind == "shuffled":
        g_idx = rng.permutation(g_idx)
    elif kind == "uneven":
        g_idx = rng.integers(0, g_idx.max() + 1, in_features)
    elif kind == "missing":
        g_idx = np.where(g_idx == 1, 0, rng.permutation(g_idx))
    elif kind == "reversed":
        g_idx = g_idx[::-1].copy()
    return g_idx.astype(np.int32)


@pytest.mark.parametrize("kind", ["sorted", "shuffled", "uneven", "missing", "reversed"])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_act_order(backend, rng, bits, kind):
    in_features, group_size = 384, 128
    g_idx = g_idx_of(kind, rng, in_features, group_size)
    qweight, qzeros, scales = make_gptq(rng, g_idx, 3, bits=bits)
    weight = PackedWeight.from_gptq(
        backend.array(qweight), backend.array(qzeros), backend.array(scales), backend.array(g_idx), bits=bits
    )
    wide = reference.dequantize_gptq(qweight, qzeros, scales, g_idx, bits, "gptq")
    assert_same_bits(backend.numpy(weight.dequantize()), rounded(wide, "float32"))
    assert ("act-order" in repr(weight)) == (kind != "sorted")
    check_product(backend, rng, weight, wide)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("out_features", "in_features", "group_size"),
    [
        (64, 256, 32),
        (192, 512, 128),
        (40, 192, 64),
        (17, 96, -1),
        (130, 300, 128),
        (1, 1, -1),
        (24, 1000, 256),
        (520, 136, 32),
    ],
)
def test_shapes(backend, rng, out_features, in_features, group_size, symmetric, bits):
    """Features that fill no tile, groups that end early, one group, groups larger than any kernel's, and of sizes that no kernel has."""
    w = draw(rng, (out_features, in_features), "bfloat16")
    weight = PackedWeight.quantize(backend.array(w), f"w{bits}a16", group_size, symmetric=symmetric)
    wide = as_float64(backend.numpy(weight.dequantize("float32")))
    size = in_features if group_size == -1 else group_size
    edges = np.arange(0, in_features, size)
    w = as_float64(w)
    low = np.minimum(np.minimum.reduceat(w, edges, 1), 0.0)
    high = np.maximum(np.maximum.reduceat(w, edges, 1), 0.0)
    step = np.maximum(-low, high) / (2 ** (bits - 1) - 0.5) if symmetric else (high - low) / (2**bits - 1)
    spread = np.repeat(step, size, axis=1)[:, :in_features]
    # Half a step for rounding, half for the ends of the range, and the scale's own rounding.
    assert (np.abs(wide - w) <= spread * (1.01 + 2.0**-8 * 2**bits / 2)).all()
    if w.size > 1000:  # rounding to nearest, not down
        assert np.abs(wide - w).mean() <= 0.3 * spread.mean() + 2.0**-9
    check_product(backend, rng, weight, wide)


def test_many_tokens(backend, rng):
    """More rows than a block of any kernel has, and odd numbers of them."""
    w = draw(rng, (96, 160), "float16")
    weight = PackedWeight.quantize(backend.array(w), "w4a16", 32)
    wide = as_float64(backend.numpy(weight.dequantize()))
    check_product(backend, rng, weight, wide, (4, 5, 64, 129, 300, 2000))


@pytest.mark.parametrize("group_size", [32, 128, -1])
@pytest.mark.parametrize("bits", [4, 8])
def test_token_counts(backend, rng, bits, group_size):
    """Around every number of tokens where a kernel or a tile changes."""
    w = draw(rng, (328, 592), "float16")
    weight = PackedWeight.quantize(backend.array(w), f"w{bits}a16", group_size, symmetric=group_size == 32)
    wide = as_float64(backend.numpy(weight.dequantize()))
    check_product(backend, rng, weight, wide, (1, 8, 9, 16, 17, 32, 33, 64, 65, 128, 129, 257))


def test_few_features_of_long_rows(backend, rng):
    """Sums that are cut along K, into few and into many parts."""
    for out_features in (16, 200, 1000):
        w = draw(rng, (out_features, 3072), "bfloat16")
        weight = PackedWeight.quantize(backend.array(w), "w4a16", 128)
        wide = as_float64(backend.numpy(weight.dequantize()))
        check_product(backend, rng, weight, wide, (1, 12, 30, 70))


@pytest.mark.parametrize("distance", [1, 2, 4, 8])
def test_rows_of_any_alignment(backend, rng, distance):
    weight = PackedWeight.quantize(backend.array(draw(rng, (40, 321))), "w4a16", 64)
    wide = as_float64(backend.numpy(weight.dequantize()))
    for count in (1, 10, 33, 100):
        x = draw(rng, (count, 321), "float16")
        out = backend.numpy(quire.quantized_matmul(backend.strided(x, distance), weight))
        assert_product_close(out, as_float64(x) @ wide.T, np.abs(as_float64(x)) @ np.abs(wide).T)


def test_tiles_left_over_after_whole_rounds(backend, rng):
    """More tiles than SMs: the last ones are cut along K, and CTAs without a part of them are not waited for. Twice with one workspace."""
    if backend.device == "cpu":
        pytest.skip("tiles of CUDA's kernel for many tokens")
    weight = PackedWeight.quantize(backend.array(draw(rng, (4096, 4096))), "w4a16", 128)
    wide = as_float64(backend.numpy(weight.dequantize()))
    for count in (2304, 2304, 2112, 1024):
        x = draw(rng, (count, 4096), "float16")
        out = backend.numpy(quire.quantized_matmul(backend.array(x), weight))
        rows = np.arange(0, count, 97)
        sample = as_float64(x[rows])
        assert_product_close(out[rows], sample @ wide.T, np.abs(sample) @ np.abs(wide).T)


@pytest.mark.parametrize("count", [1, 2, 9, 24, 40, 64])
def test_few_tokens_of_many_shapes(backend, rng, count):
    """Rows of tiles alone, in clusters and one after the other; columns that end within a stage."""
    shapes = [(72, 128), (1000, 1088), (256, 8192), (20000, 192), (8600, 1600)]
    if backend.device != "cpu" and count == 1:
        shapes.append((20480, 2112))  # one token of a smaller weight has another kernel
    for out_features, in_features in shapes:
        weight = PackedWeight.quantize(backend.array(draw(rng, (out_features, in_features))), "w4a16", 64)
        wide = as_float64(backend.numpy(weight.dequantize()))
        check_product(backend, rng, weight, wide, (count,))


@every_helped
def test_sms_without_a_tile_help(backend, rng, bits, out_features, in_features, counts):
    """The last round's tiles are cut: other CTAs have their last columns and hand sums over in memory. Rows and columns end within tiles and stages."""
    skip_unless_helped(backend)
    source = backend.array(draw(rng, (out_features, in_features), "float16"))
    weight = PackedWeight.quantize(source, f"w{bits}a16", 128)
    wide = as_float64(backend.numpy(weight.dequantize("float32")))
    for count in counts:
        assert_helped(backend.array(draw(rng, (count, in_features), "float16")), weight)
    check_product(backend, rng, weight, wide, counts)


@every_helped
def test_workspace_contents_with_helpers(backend, rng, bits, out_features, in_features, counts):
    """Whatever is where sums are handed over, the result has the same bits, each time; also after products that leave other things there."""
    skip_unless_helped(backend)
    source = backend.array(draw(rng, (out_features, in_features), "bfloat16"))
    weight = PackedWeight.quantize(source, f"w{bits}a16", 64)
    xs = [backend.array(draw(rng, (count, in_features), "bfloat16")) for count in (*counts, 100)]
    num_bytes = max(quire.quantized_matmul_workspace_size(x.shape[0], weight, dtype="bfloat16") for x in xs)
    wants = []
    for x in xs:
        zeros = backend.array(np.zeros(num_bytes, np.uint8))
        wants.append(backend.numpy(quire.quantized_matmul(x, weight, workspace=zeros)))
    for x in xs[:-1]:
        assert_helped(x, weight)
    for contents in (np.full(num_bytes, 255), rng.integers(0, 256, num_bytes)):
        workspace = backend.array(contents.astype(np.uint8))
        for _ in range(3):
            for x, want in zip(xs, wants):
                assert_same_bits(backend.numpy(quire.quantized_matmul(x, weight, workspace=workspace)), want)


def test_one_token_of_any_order(backend, rng):
    """One token's columns are put in order by the product itself; too many for shared memory are not."""
    for in_features, out_features in ((512, 72), (4096, 200), (30080, 40)):
        g_idx = g_idx_of("shuffled", rng, in_features, 64)
        qweight, qzeros, scales = make_gptq(rng, g_idx, in_features // 64, out_features)
        weight = PackedWeight.from_gptq(*map(backend.array, (qweight, qzeros, scales, g_idx)))
        wide = reference.dequantize_gptq(qweight, qzeros, scales, g_idx, 4, "gptq")
        check_product(backend, rng, weight, wide, (1,))


def test_slices_of_tokens(backend, rng):
    """Many tokens are worked on in slices, so that the workspace stays small; a slice's rows have the bits that they have alone."""
    if backend.device == "cpu":
        pytest.skip("CUDA's workspace")
    weight = PackedWeight.quantize(backend.array(draw(rng, (200, 2048))), "w4a16", 128)
    assert quire.quantized_matmul_workspace_size(1 << 20, weight, batch_invariant=True) <= 64 << 20
    x = draw(rng, (9001, 2048), "float16")
    out = backend.numpy(quire.quantized_matmul(backend.array(x), weight, batch_invariant=True))
    rows = np.r_[0:9001:641, 9000]
    part = backend.numpy(quire.quantized_matmul(backend.array(x[rows]), weight, batch_invariant=True))
    assert_same_bits(out[rows], part)


def test_slices_of_reordered_tokens(backend, rng):
    if backend.device == "cpu":
        pytest.skip("CUDA's workspace")
    in_features, count = 4096, 9219  # a slice of 8192, and 1027
    g_idx = g_idx_of("shuffled", rng, in_features, 128)
    qweight, qzeros, scales = make_gptq(rng, g_idx, in_features // 128)
    weight = PackedWeight.from_gptq(*map(backend.array, (qweight, qzeros, scales, g_idx)))
    assert quire.quantized_matmul_workspace_size(1 << 20, weight) <= 128 << 20
    wide = reference.dequantize_gptq(qweight, qzeros, scales, g_idx, 4, "gptq")
    x = draw(rng, (count, in_features), "float16")
    out = backend.numpy(quire.quantized_matmul(backend.array(x), weight))
    rows = np.r_[0:count:97, 8190:8194, count - 1]
    sample = as_float64(x[rows])
    assert_product_close(out[rows], sample @ wide.T, np.abs(sample) @ np.abs(wide).T)


def test_rows_in_reverse(backend, rng):
    weight = PackedWeight.quantize(backend.array(draw(rng, (48, 128))), "w4a16", 64)
    if backend.name == "torch":
        pytest.skip("PyTorch has no negative strides")
    x = draw(rng, (40, 128), "float16")
    got = backend.numpy(quire.quantized_matmul(backend.array(x)[::-1], weight))
    assert_same_bits(got, backend.numpy(quire.quantized_matmul(backend.array(x[::-1].copy()), weight)))


@pytest.mark.parametrize(
    ("count", "out_features"), [(1, 200), (12, 200), (40, 200), (100, 200), (300, 200), (33, 8600)]
)
def test_workspace_contents(backend, rng, count, out_features):
    """Whatever the workspace holds, the result has the same bits, each time."""
    weight = PackedWeight.quantize(backend.array(draw(rng, (out_features, 2048))), "w4a16", 128)
    x = backend.array(draw(rng, (count, 2048), "bfloat16"))
    want = backend.numpy(quire.quantized_matmul(x, weight))
    num_bytes = max(quire.quantized_matmul_workspace_size(count, weight, dtype="bfloat16"), 1)
    for fill in (0, 255, None):
        contents = rng.integers(0, 256, num_bytes) if fill is None else np.full(num_bytes, fill)
        workspace = backend.array(contents.astype(np.uint8))
        for _ in range(2):
            assert_same_bits(backend.numpy(quire.quantized_matmul(x, weight, workspace=workspace)), want)


@pytest.mark.parametrize(
    "kind", ["fp8", "fp8 tensor", "fp8 block", "fp8 static", "w8a8", "w8a8 static", "w8a8 zero"]
)
@pytest.mark.parametrize("shape", [(200,), (1, 200), (2, 3, 200), (0, 200)], ids=str)
def test_product_of_quantized_activations(backend, rng, kind, shape):
    """It is quantize_* and scaled_matmul, bit for bit, and needs no more memory than its workspace."""
    fp8, given = kind.startswith("fp8"), kind.partition(" ")[2]
    source, scale = backend.array(draw(rng, (136, 200))), backend.array(np.full(1, 0.02, np.float32))
    granularity = given if given in ("tensor", "block") else "channel"
    weight = PackedWeight.quantize(source, "fp8" if fp8 else "w8a8", granularity=granularity)
    if given == "static":
        make = PackedWeight.from_fp8 if fp8 else PackedWeight.from_int8
        weight = make(weight.weight, weight.scale, input_scale=scale)
    if given == "zero":
        zero = backend.array(np.full(1, -7, np.int32))
        weight = PackedWeight.from_int8(weight.weight, weight.scale, input_scale=scale, input_zero_point=zero)
    x, bias = backend.array(draw(rng, shape, "bfloat16")), backend.array(draw(rng, (136,)))

    zeros = {} if weight.input_zero_point is None else {"zero_point": weight.input_zero_point}
    quantize = quire.quantize_fp8 if fp8 else functools.partial(quire.quantize_int8, symmetric=not zeros)
    scaling = "tensor" if given in ("static", "zero") else "group" if given == "block" else "token"
    a, scale_a = quantize(x, scale=weight.input_scale, granularity=scaling, **zeros)[:2]
    want = backend.numpy(quire.scaled_matmul(a, weight, scale_a, bias=bias, **zeros))

    assert_same_bits(backend.numpy(quire.quantized_matmul(x, weight, bias=bias)), want)
    tokens = int(np.prod(shape[:-1]))
    num_bytes = quire.quantized_matmul_workspace_size(tokens, weight)
    assert num_bytes >= 200 * tokens
    workspace = backend.array(np.full(num_bytes, 255, np.uint8))
    for _ in range(2):
        got = quire.quantized_matmul(x, weight, bias=bias, workspace=workspace)
        assert_same_bits(backend.numpy(got), want)
    if tokens > 0:
        with pytest.raises(ValueError, match=r"^\[quantized_matmul\] workspace: expected uint8 \["):
            quire.quantized_matmul(x, weight, workspace=workspace[: num_bytes - 1])


def test_products_on_two_devices_in_turn(backend, rng):
    """Each device has a shared workspace of its own, also where both calls name the default stream."""
    if not backend.device.startswith("cuda"):
        pytest.skip("one device alone")
    arrays = draw(rng, (136, 256)), draw(rng, (3, 256), "bfloat16")
    sides = [[make(a) for a in arrays] for make in (np.asarray, backend.array)]
    weights = [PackedWeight.quantize(weight, "w8a8") for weight, _ in sides]
    for _ in range(2):
        on_cpu, on_cuda = (quire.quantized_matmul(x, w) for (_, x), w in zip(sides, weights))
        error = np.abs(as_float64(backend.numpy(on_cuda)) - as_float64(np.asarray(on_cpu)))
        assert error.max() <= 2**-7 * np.abs(as_float64(np.asarray(on_cpu))).max()


def test_product_of_quantized_activations_refuses_before_it_launches(rng):
    """The workspace is as it was after a call that is refused for what only the product looks at."""
    weight = PackedWeight.quantize(draw(rng, (16, 64)), "fp8")
    workspace = np.full(quire.quantized_matmul_workspace_size(2, weight), 77, np.uint8)
    with pytest.raises(ValueError, match=r"^\[quantized_matmul\] bias: expected "):
        quire.quantized_matmul(draw(rng, (2, 64)), weight, bias=np.zeros(15, np.float32), workspace=workspace)
    assert (workspace == 77).all()


def test_product_of_quantized_activations_refuses(rng):
    weight = PackedWeight.quantize(draw(rng, (16, 64)), "fp8")
    x, out = draw(rng, (2, 64)), np.zeros((2, 16), np.float32)
    for changes, kind, text in (
        ({"x": draw(rng, (2, 48))}, ValueError, "x: expected a last dimension of 64, got "),
        ({"x": draw(rng, (2, 128))[:, ::2]}, ValueError, "x: expected .*, got "),
        ({"x": np.zeros((2, 64), np.int32)}, TypeError, "x: expected .*, got int32"),
        ({"out": out[:, :8]}, ValueError, "out: expected .*, got "),
    ):
        with pytest.raises(kind, match=rf"^\[quantized_matmul\] {text}"):
            quire.quantized_matmul(**{"x": x, "out": out, "w": weight, **changes})


def test_bias_out_and_ranks(backend, rng):
    weight = PackedWeight.quantize(backend.array(draw(rng, (48, 64))), "w4a16", 32)
    wide = as_float64(backend.numpy(weight.dequantize()))
    x = draw(rng, (2, 3, 64), "bfloat16")
    want, magnitude = as_float64(x) @ wide.T, np.abs(as_float64(x)) @ np.abs(wide).T
    for dtype in DTYPES:
        bias = draw(rng, (48,), dtype)
        out = backend.array(np.full((2, 3, 48), 7.0, x.dtype))
        result = quire.quantized_matmul(backend.array(x), weight, bias=backend.array(bias), out=out)
        assert result is out
        assert_product_close(
            backend.numpy(out), want + as_float64(bias), magnitude + np.abs(as_float64(bias))
        )
    one = quire.quantized_matmul(backend.array(x[0, 0]), weight)
    assert_product_close(backend.numpy(one), want[0, 0], magnitude[0, 0])
    strided = backend.strided(x[0], 8)
    assert_product_close(backend.numpy(quire.quantized_matmul(strided, weight)), want[0], magnitude[0])
    empty = quire.quantized_matmul(backend.array(x[:0]), weight)
    assert tuple(empty.shape) == (0, 3, 48)


@pytest.mark.parametrize("bits", [4, 8])
def test_batch_invariant(backend, rng, bits):
    weight = PackedWeight.quantize(backend.array(draw(rng, (80, 256))), f"w{bits}a16", 64)
    x = draw(rng, (200, 256), "bfloat16")
    whole = backend.numpy(quire.quantized_matmul(backend.array(x), weight, batch_invariant=True))
    for begin, end in ((0, 1), (3, 5), (7, 40), (100, 200)):
        part = backend.numpy(
            quire.quantized_matmul(backend.array(x[begin:end]), weight, batch_invariant=True)
        )
        assert_same_bits(part, whole[begin:end])


def test_every_framework(framework, rng):
    codes, zeros = rng.integers(0, 16, (64, 32)), rng.integers(0, 16, (2, 32))
    scales = draw_scales(rng, (2, 32))
    tensors = [framework.array(t) for t in (reference.pack_awq(codes), reference.pack_awq(zeros), scales)]
    weight = PackedWeight.from_awq(*tensors, 32)
    wide = ((codes - zeros[np.arange(64) // 32]) * as_float64(scales)[np.arange(64) // 32]).T
    x = draw(rng, (5, 64), "float16")
    out = quire.quantized_matmul(framework.array(x), weight)
    assert type(out) is type(framework.array(x))
    assert_product_close(framework.numpy(out), as_float64(x) @ wide.T, np.abs(as_float64(x)) @ np.abs(wide).T)
    assert type(weight.dequantize("float16")) is type(out)
    assert weight.nbytes >= 64 * 32 // 2
    assert weight.layout in repr(weight)


def test_not_finite(backend, rng):
    """What is not finite in a row stays in that row."""
    weight = PackedWeight.quantize(backend.array(draw(rng, (32, 128))), "w4a16", 64)
    x = draw(rng, (3, 128), "float16")
    clean = backend.numpy(quire.quantized_matmul(backend.array(x[:1]), weight, batch_invariant=True))
    x[1, 5], x[2, 9] = np.nan, np.inf
    out = backend.numpy(quire.quantized_matmul(backend.array(x), weight, batch_invariant=True))
    assert_same_bits(out[:1], clean)
    assert np.isnan(out[1]).all()
    assert not np.isfinite(out[2]).any()


# ---- scaled_matmul ------------------------------------------------------------------------------------------------------------------

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


def awq_tensors(in_features=64, out_features=32, groups=2):
    return {
        "qweight": np.zeros((in_features, out_features // 8), np.int32),
        "qzeros": np.zeros((groups, out_features // 8), np.int32),
        "scales": np.ones((groups, out_features), np.float16),
    }


def gptq_tensors(in_features=64, out_features=32, groups=2, bits=4):
    return {
        "qweight": np.zeros((in_features * bits // 32, out_features), np.int32),
        "qzeros": np.zeros((groups, out_features * bits // 32), np.int32),
        "scales": np.ones((groups, out_features), np.float16),
    }


@pytest.mark.parametrize(
    ("changes", "kind", "text"),
    [
        ({"qweight": np.zeros((64, 4), np.int64)}, TypeError, "qweight: expected int32, got int64"),
        ({"qweight": np.zeros((64, 5), np.int32)}, ValueError, "scales: expected 40 columns, as qweight has 5 of words, got 32"),
        ({"qweight": np.zeros((0, 4), np.int32)}, ValueError, "qweight: expected extents"),
        ({"qweight": np.zeros(4, np.int32)}, ValueError, "qweight: expected rank 2"),
        ({"qzeros": np.zeros((2, 3), np.int32)}, ValueError, r"qzeros: expected int32 \[2, 4\], got int32 \[2, 3\]"),
        ({"qzeros": np.zeros((3, 4), np.int32)}, ValueError, r"qzeros: expected int32 \[2, 4\]"),
        ({"scales": np.ones((2, 32), np.int32)}, TypeError, "scales: expected float32, float16 or bfloat16, got int32"),
        ({"scales": np.full((2, 32), np.nan, np.float16)}, ValueError, r"scales: expected finite values of 0 or more, got nan at \[0, 0\]"),
        ({"scales": np.full((2, 32), -1, np.float16)}, ValueError, "scales: expected finite values of 0 or more, got -1.0"),
        ({"scales": np.full((2, 32), np.inf, np.float32)}, ValueError, "scales: expected finite"),
        ({"group_size": 128}, ValueError, "scales: expected 1 groups of 128, got 2"),
        ({"group_size": 16}, ValueError, "scales: expected 4 groups of 16, got 2"),
        ({"group_size": 0}, ValueError, "group_size: expected 1 or more"),
        ({"group_size": "32"}, TypeError, "group_size: expected an integer, got str"),
        ({"group_size": -1}, ValueError, "scales: expected one group, as group_size is -1, got 2"),
        ({"group_size": 2**62}, ValueError, "group_size"),
        ({"qweight": "text"}, TypeError, "qweight: expected a tensor"),
    ],
)  # fmt: skip
def test_bad_awq(changes, kind, text):
    with pytest.raises(kind, match=r"\[from_awq\] .*" + text):
        PackedWeight.from_awq(**{**awq_tensors(), "group_size": 32, **changes})


@pytest.mark.parametrize(
    ("changes", "kind", "text"),
    [
        ({"bits": 5}, quire.UnsupportedError, "bits: expected 2, 3, 4 or 8, got 5"),
        ({"bits": "4"}, TypeError, "bits: expected an integer, got str"),
        ({"bits": 8}, ValueError, "qzeros: expected"),
        ({"checkpoint_format": "gptq_v3"}, ValueError, "checkpoint_format"),
        ({"g_idx": np.zeros(65, np.int32)}, ValueError, "qweight: expected 9 rows for a g_idx of 65, got 8"),
        ({"g_idx": np.full(64, 2, np.int32)}, IndexError, r"g_idx: expected a group in \[0, 2\), got 2 at \[0\]"),
        ({"g_idx": np.full(64, -1, np.int32)}, IndexError, "g_idx"),
        ({"g_idx": np.zeros(64, np.float32)}, TypeError, "g_idx: expected int32, got float32"),
        ({"qzeros": np.zeros((2, 32), np.int32)}, ValueError, "qzeros"),
        ({"scales": np.ones((2, 31), np.float16)}, ValueError, "scales: expected"),
        ({"scales": np.full((2, 32), np.nan, np.float16)}, ValueError, "scales: expected finite values, got nan"),
    ],
)  # fmt: skip
def test_bad_gptq(changes, kind, text):
    arguments = {**gptq_tensors(), **changes}
    with pytest.raises(kind, match=r"\[from_gptq\] .*(" + text + ")"):
        PackedWeight.from_gptq(**arguments)


def test_negative_scales_of_gptq(backend):
    """Some tools write them."""
    tensors = gptq_tensors()
    tensors["scales"][...] = -0.5
    weight = PackedWeight.from_gptq(**{k: backend.array(v) for k, v in tensors.items()})
    np.testing.assert_array_equal(backend.numpy(weight.dequantize()), np.full((32, 64), 0.5))


@pytest.mark.parametrize(
    ("changes", "kind", "text"),
    [
        ({"weight_shape": np.array([32, 65], np.int64)}, ValueError, "weight_shape"),
        ({"weight_shape": np.array([31, 64], np.int64)}, ValueError, "weight_shape"),
        ({"weight_shape": np.array([-32, -64], np.int64)}, ValueError, "weight_shape"),
        ({"weight_shape": np.array([64], np.int64)}, ValueError, "weight_shape"),
        ({"weight_scale": np.ones((31, 2), np.float32)}, ValueError, "weight_scale"),
        ({"weight_zero_point": np.zeros((32, 2), np.int32)}, ValueError, "weight_zero_point"),
        ({"weight_zero_point": np.zeros((4, 2), np.int8)}, TypeError, "weight_zero_point"),
        ({"bits": 3}, quire.UnsupportedError, "bits"),
        ({"weight": np.zeros((32, 64), np.int8)}, ValueError, "either weight_packed or weight, got both"),
        ({"weight_packed": None}, ValueError, "either weight_packed or weight, got none"),
        ({"weight_g_idx": np.full(64, 7, np.int32)}, IndexError, "g_idx"),
    ],
)  # fmt: skip
def test_bad_compressed_tensors(changes, kind, text):
    good = {"weight_packed": np.zeros((32, 8), np.int32), "weight_scale": np.ones((32, 2), np.float32)}
    with pytest.raises(kind, match=text):
        PackedWeight.from_compressed_tensors(**{**good, **changes})


@pytest.mark.parametrize(
    ("weight", "scale", "kind", "text"),
    [
        (np.zeros((4, 8), np.int8), np.ones(1, np.float32), TypeError, "weight: expected float8_e4m3fn, got int8"),
        (np.zeros((4, 8), E4M3), np.ones(3, np.float32), ValueError, "scale"),
        (np.zeros((200, 300), E4M3), np.ones((3, 2), np.float32), ValueError, r"scale: expected .* \[2, 3\], got float32 \[3, 2\]"),
        (np.zeros((4, 8), E4M3), np.full(1, -1, np.float32), ValueError, "scale: expected finite values of 0 or more"),
        (np.zeros((4, 8), E4M3), np.full(1, np.nan, np.float32), ValueError, "scale"),
        (np.zeros((4, 8), E4M3), np.ones(1, np.float64), TypeError, "scale"),
    ],
)  # fmt: skip
def test_bad_fp8(weight, scale, kind, text):
    with pytest.raises(kind, match=r"\[from_fp8\] " + text):
        PackedWeight.from_fp8(weight, scale)


def spread(shape, dtype, value=0):
    """A tensor of any extents that takes no memory."""
    return np.broadcast_to(np.full((1,) * len(shape), value, dtype), shape)


@pytest.mark.parametrize(
    ("make", "kind", "text"),
    [
        (lambda: PackedWeight.from_gptq(spread((2**27, 8), np.int32), None, spread((1, 8), np.float16, 1), bits=2),
         ValueError, r"in_features: expected 1 to 2\^31 - 1, got 2147483648"),
        (lambda: PackedWeight.from_awq(spread((8, 2**28), np.int32), spread((1, 2**28), np.int32), spread((1, 2**31), np.float16, 1)),
         ValueError, r"scales: expected extents from 1 to 2\^31 - 1, got \[1, 2147483648\]"),
        (lambda: PackedWeight.from_compressed_tensors(weight_packed=spread((8, 2**28), np.int32), weight_scale=np.ones((8, 1), np.float32)),
         ValueError, r"in_features: expected 1 to 2\^31 - 1, got 2147483648"),
        (lambda: PackedWeight.from_compressed_tensors(
            weight_packed=np.zeros((8, 8), np.int32), weight_scale=np.ones((8, 1), np.float32), weight_shape=np.array([2**62, 2**62])),
         ValueError, "weight_shape: expected .* got .4611686018427387904"),
        (lambda: PackedWeight.from_gptq(**{**gptq_tensors(), "bits": 2**64}), quire.UnsupportedError, "bits: expected 2, 3, 4 or 8, got 18446744073709551616"),
        (lambda: PackedWeight.from_gptq(**gptq_tensors(), g_idx=np.full(64, 2**40)), IndexError, r"g_idx: expected .*, got 1099511627776 at \[0\]"),
        (lambda: PackedWeight.from_int8(np.zeros((8, 64), np.int8), np.full((8, 1), -1, np.float32)), ValueError, "scale: expected finite values of 0 or more, got -1.0"),
        (lambda: PackedWeight.from_int8(np.zeros((8, 64), np.int8), np.ones((8, 1), np.float32), input_scale=np.float32([1]), input_zero_point=np.array([2**40])),
         ValueError, r"input_zero_point: expected one integer in \[-128, 127\], got \[1099511627776\]"),
    ],
)  # fmt: skip
def test_hostile_sizes(make, kind, text):
    with pytest.raises(kind, match=text):
        make()


def test_bad_products(rng):
    w = PackedWeight.quantize(draw(rng, (32, 64)), "w4a16", 32)
    x = draw(rng, (3, 64), "float16")
    cases = [
        (TypeError, "w: expected a PackedWeight", lambda: quire.quantized_matmul(x, x)),
        (ValueError, "x: expected a last dimension of 64", lambda: quire.quantized_matmul(x[:, :63], w)),
        (TypeError, "x: expected float32, float16 or bfloat16", lambda: quire.quantized_matmul(x.astype(np.int32), w)),
        (TypeError, "dtype: expected float32, float16 or bfloat16, got int8", lambda: quire.quantized_matmul_workspace_size(3, w, dtype="int8")),
        (ValueError, "out: expected", lambda: quire.quantized_matmul(x, w, out=np.empty((3, 31), np.float16))),
        (TypeError, "out", lambda: quire.quantized_matmul(x, w, out=np.empty((3, 32), np.float32))),
        (ValueError, "bias", lambda: quire.quantized_matmul(x, w, bias=np.ones(31, np.float32))),
        (TypeError, "use from_awq", lambda: PackedWeight()),
        (ValueError, "format", lambda: PackedWeight.quantize(x, "w5a16")),
        (ValueError, "granularity", lambda: PackedWeight.quantize(x, "w8a8", granularity="block")),
        (TypeError, "group_size: expected an integer, got bool", lambda: PackedWeight.quantize(x, "w4a16", True)),
        (ValueError, 'granularity: expected "tensor", "token", "group" or "block"', lambda: quire.dequantize_int8(x.astype(np.int8), x, granularity="row")),
        (ValueError, "expected finite", lambda: PackedWeight.quantize(np.full((2, 64), np.inf, np.float32), "w4a16", 32)),
        (ValueError, "granularity", lambda: quire.quantize_fp8(x, granularity="row")),
        (ValueError, "zero_point", lambda: quire.quantize_int8(x, scale=np.ones(1, np.float32), symmetric=False)),
        (ValueError, "zero_point", lambda: quire.quantize_int8(x, zero_point=np.zeros(1, np.int32))),
        (ValueError, "scales: expected", lambda: quire.quantize_fp8(x, scale=np.ones(2, np.float32))),
        (ValueError, "scale_ub", lambda: quire.quantize_fp8(x, scale_ub=0.0)),
        (ValueError, "scale_ub", lambda: quire.quantize_fp8(x, scale_ub=1e-300)),
        (TypeError, "q: expected int8", lambda: quire.dequantize_int8(x, np.ones(1, np.float32))),
    ]  # fmt: skip
    a, one = np.zeros((3, 256), np.int8), np.ones(1, np.float32)
    cases += [
        (TypeError, "b: expected int8", lambda: quire.scaled_matmul(a, a.view(E4M3), one, one)),
        (ValueError, "b: expected", lambda: quire.scaled_matmul(a, a[:, :255], one, one)),
        (ValueError, "scale_b", lambda: quire.scaled_matmul(a, a, one, np.ones(2, np.float32))),
        (ValueError, "scale_a", lambda: quire.scaled_matmul(a, a, np.ones((2, 1), np.float32), one)),
        (ValueError, "scale_a", lambda: quire.scaled_matmul(a, a, one, np.ones((1, 2), np.float32))),
        (ValueError, "zero_point", lambda: quire.scaled_matmul(a.view(E4M3), a.view(E4M3), one, one, zero_point=np.zeros(1, np.int32))),
        (quire.UnsupportedError, "65536", lambda: quire.scaled_matmul(np.zeros((1, 65537), np.int8), np.zeros((1, 65537), np.int8), one, one)),
        (ValueError, "scale_b: expected a tensor", lambda: quire.scaled_matmul(a, a, one)),
        (TypeError, "out_dtype", lambda: quire.scaled_matmul(a, a, one, one, out_dtype="int8")),
    ]  # fmt: skip
    for kind, text, call in cases:
        with pytest.raises(kind, match=text):
            call()


def test_names_of_packed_tensors():
    """What only the core looks at has the checkpoint's names too."""
    awq, gptq = awq_tensors(out_features=64), gptq_tensors(out_features=64)
    compressed = {
        "weight_packed": np.zeros((32, 8), np.int32),
        "weight_scale": np.ones((32, 2), np.float32),
        "weight_zero_point": np.zeros((4, 2), np.int32),
    }
    cases = [
        (PackedWeight.from_awq, awq, "qweight"),
        (PackedWeight.from_awq, awq, "qzeros"),
        (PackedWeight.from_gptq, gptq, "qweight"),
        (PackedWeight.from_gptq, gptq, "qzeros"),
        (PackedWeight.from_compressed_tensors, compressed, "weight_packed"),
        (PackedWeight.from_compressed_tensors, compressed, "weight_zero_point"),
    ]
    for make, tensors, name in cases:
        strided = np.repeat(tensors[name], 2, axis=1)[:, ::2]
        with pytest.raises(ValueError, match=rf"^\[{make.__name__}\] {name}: expected .*, got "):
            make(**{**tensors, name: strided})
    dense = draw(np.random.default_rng(0), (32, 128))
    for format in ("w4a16", "fp8", "w8a8"):
        with pytest.raises(ValueError, match=r"^\[quantize\] weight: expected .*, got "):
            PackedWeight.quantize(dense[:, ::2], format)
        packed = PackedWeight.quantize(dense, format)
        with pytest.raises(ValueError, match=r"^\[dequantize\] (out|weight): expected .*, got "):
            packed.dequantize(out=np.zeros((32, 64), np.float32))
    for changes, text in (
        (
            {"weight_g_idx": np.full(64, 7, np.int32)},
            r"weight_g_idx: expected a group in \[0, 2\), got 7 at \[0\]",
        ),
        ({"group_size": 128}, "weight_scale: expected 1 groups of 128, got 2"),
        ({"weight_scale": np.full((32, 2), np.nan, np.float32)}, "weight_scale: expected finite values"),
    ):
        with pytest.raises((ValueError, IndexError), match=r"^\[from_compressed_tensors\] " + text):
            PackedWeight.from_compressed_tensors(**{**compressed, **changes})
    int8 = np.zeros((4, 8), np.int8)
    for weight, scale, text in (
        (int8, np.ones(3, np.float32), r"weight_scale: expected \[1\] or \[4, 1\], got float32 \[3\]"),
        (
            int8.view(E4M3),
            np.ones(3, np.float32),
            r"weight_scale: expected \[1\], \[4, 1\] or \[1, 1\], got float32 \[3\]",
        ),
    ):
        with pytest.raises(ValueError, match=r"^\[from_compressed_tensors\] " + text):
            PackedWeight.from_compressed_tensors(weight=weight, weight_scale=scale)


def test_names_of_ops():
    x, q, one = np.ones((3, 64), np.float32), np.zeros((3, 64), np.int8), np.ones(1, np.float32)
    two = np.ones(2, np.float32)
    for call, text in (
        (
            lambda: quire.quantize_fp8(x.astype(np.int32)),
            r"\[quantize_fp8\] x: expected float32, float16 or bfloat16, got int32",
        ),
        (
            lambda: quire.quantize_int8(x, scale=two),
            r"\[quantize_int8\] scales: expected float32 \[1\], got float32 \[2\]",
        ),
        (
            lambda: quire.dequantize_int8(q, two),
            r"\[dequantize_int8\] scales: expected float32 \[1\], got float32 \[2\]",
        ),
        (
            lambda: quire.dequantize_fp8(q.view(E4M3), two, granularity="block"),
            r"\[dequantize_fp8\] scales: expected float32 \[1, 1\]",
        ),
        (
            lambda: quire.dequantize_int8(q, one, np.zeros(2, np.int32)),
            r"\[dequantize_int8\] zero_points: expected int32 \[1\], got int32 \[2\]",
        ),
        (
            lambda: quire.dequantize_int8(q, one, one.astype(np.int32), granularity="block"),
            r"\[dequantize_int8\] zero_point: expected none",
        ),
    ):
        with pytest.raises((ValueError, TypeError), match="^" + text):
            call()


def test_names_of_tensors_elsewhere(backend, rng):
    """A tensor on another device, and which one it should be with."""
    if backend.device == "cpu":
        pytest.skip("two devices are needed")
    x, q = backend.array(draw(rng, (3, 64), "float16")), backend.array(np.zeros((3, 64), np.int8))
    one, bias = np.ones(1, np.float32), np.ones(3, np.float32)
    on_gpu = backend.array(one)
    w = PackedWeight.quantize(backend.array(draw(rng, (3, 64), "float16")), "w4a16", 32)
    weight = backend.array(np.ones(64, np.float16))
    for call, text in (
        (lambda: quire.quantize_int8(x, scale=one), r"\[quantize_int8\] scales: expected .*\bx\b"),
        (lambda: quire.dequantize_int8(q, one), r"\[dequantize_int8\] scales: expected .*\bout\b"),
        (lambda: quire.quantized_matmul(x, w, bias=bias), r"\[quantized_matmul\] bias: expected .*\bx\b"),
        (
            lambda: quire.scaled_matmul(q, q, on_gpu, on_gpu, bias=bias),
            r"\[scaled_matmul\] bias: expected .*\ba\b",
        ),
        (lambda: quire.scaled_matmul(q, q, one, on_gpu), r"\[scaled_matmul\] scale_a: expected .*\ba\b"),
        (
            lambda: quire.rms_norm(x, weight, out_dtype="int8", scale=one),
            r"\[rms_norm\] scales: expected .*\bx\b",
        ),
    ):
        with pytest.raises(ValueError, match="^" + text):
            call()


def test_copies_and_pickles(framework, rng):
    import copy
    import pickle

    def here():
        """JAX unpickles to its default device."""
        if framework.name != "jax":
            return contextlib.nullcontext()
        import jax

        return jax.default_device(jax.devices("cpu" if framework.device == "cpu" else "gpu")[0])

    for weight in (
        PackedWeight.quantize(framework.array(draw(rng, (48, 64))), "w4a16", 32, symmetric=False),
        PackedWeight.quantize(framework.array(draw(rng, (48, 64))), "w3a16", 20),
        PackedWeight.quantize(framework.array(draw(rng, (48, 64))), "w8a8"),
    ):
        want = framework.numpy(weight.dequantize())
        with here():
            copies = copy.copy(weight), copy.deepcopy(weight), pickle.loads(pickle.dumps(weight))
        for copied in copies:
            assert repr(copied) == repr(weight)
            np.testing.assert_array_equal(framework.numpy(copied.dequantize()), want)


def test_streams_of_constructors_are_checked(backend, rng):
    """Also on the CPU, which has none."""
    w = backend.array(draw(rng, (48, 64)))
    for make in (
        lambda stream: PackedWeight.quantize(w, "w4a16", 32, stream=stream),
        lambda stream: PackedWeight.from_awq(*map(backend.array, awq_tensors().values()), stream=stream),
        lambda stream: PackedWeight.from_int8(
            backend.array(np.zeros((4, 8), np.int8)), backend.array(np.ones(1, np.float32)), stream=stream
        ),
    ):
        with pytest.raises(
            TypeError, match=r"stream: expected an int, an object with __cuda_stream__, or None, got str"
        ):
            make("fast")


@pytest.mark.parametrize("group_size", [2**62, 2**63 - 2, 2**63 - 1])
def test_groups_of_any_size(group_size):
    """A group larger than the row is the row, up to the ends of 64 bits: no scale, or two, are a mistake."""
    x = np.linspace(-1, 1, 512, dtype=np.float32).reshape(2, 256)
    options = {"granularity": "group", "group_size": group_size}
    for op, back in (
        (quire.quantize_fp8, quire.dequantize_fp8),
        (quire.quantize_int8, quire.dequantize_int8),
    ):
        codes, scale = op(x, **options)
        assert scale.shape == (2, 1)
        np.testing.assert_array_equal(codes.view(np.uint8), op(x, granularity="token")[0].view(np.uint8))
        np.testing.assert_allclose(back(codes, scale, **options), x, atol=0.05)
        for groups in (0, 2):
            wrong = np.zeros((2, groups), np.float32)
            for call in (
                lambda: op(x, out=(codes, wrong), **options),
                lambda: op(x, scale=wrong, **options),
                lambda: back(codes, wrong, **options),
            ):
                with pytest.raises(ValueError, match=r"scales: expected float32 \[2, 1\], got float32 \[2, "):
                    call()


def test_out_that_is_no_tensor():
    x = np.ones((2, 8), np.float32)
    for op in (quire.quantize_fp8, quire.quantize_int8):
        for bad in ("text", None, 3):
            with pytest.raises(TypeError, match=r"\[quantize_.*\] out: expected a .* tensor, got "):
                op(x, out=(bad, np.ones(1, np.float32)))


def test_overlap_is_refused():
    pool = np.zeros((3, 64), np.float16)
    w = PackedWeight.quantize(np.eye(64, dtype=np.float32), "w4a16", 32)
    with pytest.raises(ValueError, match="out"):
        quire.quantized_matmul(pool[:2], w, out=pool[1:])


SHAPES = st.lists(st.integers(0, 40), min_size=0, max_size=3).map(tuple)
ARRAYS = st.builds(
    lambda shape, dtype, fill: np.full(shape, fill).astype(dtype),
    SHAPES,
    st.sampled_from([np.int32, np.int64, np.uint8, np.int8, np.float16, np.float32, E4M3]),
    st.sampled_from([0, 1, -1, 3, 127]),
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_fuzz_constructors(data):
    """Whatever the tensors are, a constructor makes a weight whose product works, or raises one of the documented errors."""
    maybe = st.one_of(st.none(), ARRAYS)
    group_size = data.draw(st.one_of(st.none(), st.integers(-2, 300)))
    bits = data.draw(st.sampled_from([2, 3, 4, 8, 0, 16, -1]))
    a, b, c, d = (data.draw(ARRAYS) for _ in range(4))
    kind = data.draw(st.sampled_from(["awq", "gptq", "compressed", "fp8", "int8", "quantize"]))
    make = {
        "awq": lambda: PackedWeight.from_awq(a, b, c, group_size),
        "gptq": lambda: PackedWeight.from_gptq(a, b, c, d, bits=bits, group_size=group_size),
        "compressed": lambda: PackedWeight.from_compressed_tensors(
            weight_packed=data.draw(maybe), weight=data.draw(maybe), weight_scale=c, weight_zero_point=data.draw(maybe),
            weight_shape=data.draw(maybe), weight_g_idx=data.draw(maybe), bits=bits, group_size=group_size,
            input_scale=data.draw(maybe), input_zero_point=data.draw(maybe),
        ),
        "fp8": lambda: PackedWeight.from_fp8(a, c, input_scale=data.draw(maybe)),
        "int8": lambda: PackedWeight.from_int8(a, c, input_scale=data.draw(maybe), input_zero_point=data.draw(maybe)),
        "quantize": lambda: PackedWeight.quantize(a, data.draw(st.sampled_from(["w4a16", "w3a16", "fp8", "w8a8"])), group_size or 32),
    }[kind]  # fmt: skip
    try:
        weight = make()
    except (ValueError, TypeError, IndexError, quire.UnsupportedError):
        return
    x = np.ones((2, weight.in_features), np.float32)
    assert quire.quantized_matmul(x, weight).shape == (2, weight.out_features)
    assert weight.dequantize().shape == weight.shape


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    words=st.integers(1, 6),
    out_features=st.integers(1, 40),
    num_groups=st.integers(1, 5),
    seed=st.integers(0, 2**32 - 1),
    v2=st.booleans(),
)
def test_fuzz_gptq_is_exact(bits, words, out_features, num_groups, seed, v2):
    """Any g_idx, any codes, zeros and scales."""
    rng = np.random.default_rng(seed)
    in_features = 32 * words
    g_idx = rng.integers(0, num_groups, in_features).astype(np.int32)
    codes, zeros = (
        rng.integers(0, 2**bits, (in_features, out_features)),
        rng.integers(0, 2**bits, (num_groups, out_features)),
    )
    scales = draw_scales(rng, (num_groups, out_features))
    qweight, qzeros = reference.pack_stream(codes.T, bits).T.copy(), reference.pack_stream(zeros, bits)
    name = "gptq_v2" if v2 else "gptq"
    weight = PackedWeight.from_gptq(qweight, qzeros, scales, g_idx, bits=bits, checkpoint_format=name)
    wide = reference.dequantize_gptq(qweight, qzeros, scales, g_idx, bits, name)
    assert_same_bits(weight.dequantize(), rounded(wide, "float32"))
    x = rng.standard_normal((2, in_features)).astype(np.float32)
    out = quire.quantized_matmul(x, weight)
    assert_product_close(out, as_float64(x) @ wide.T, np.abs(as_float64(x)) @ np.abs(wide).T)
