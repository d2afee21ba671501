"""What the quantization ops refuse, and in which words; copies of packed weights; random tensors for their constructors.

SPDX-License-Identifier: Apache-2.0
"""

import contextlib

import numpy as np
import pytest
from frameworks import as_float64
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from quantization_draws import (
    E4M3,
    assert_same_bits,
    draw,
    draw_scales,
    rounded,
    spread,
)
from reference import quantization as reference
from tolerances import assert_product_close

import quire
from quire import PackedWeight


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
