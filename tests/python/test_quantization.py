"""Packed weights and their products against float64, on every framework and backend.

SPDX-License-Identifier: Apache-2.0
"""

import functools

import numpy as np
import pytest
from frameworks import as_float64
from quantization_draws import (
    DTYPES,
    E4M3,
    assert_helped,
    assert_same_bits,
    check_product,
    draw,
    draw_scales,
    every_helped,
    rounded,
    skip_unless_helped,
)
from reference import quantization as reference
from tolerances import assert_product_close

import quire
from quire import PackedWeight


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
