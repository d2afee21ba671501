"""quire.explain: every op says what it would run, runs nothing, and says what really is chosen; every variant can be asked for.

SPDX-License-Identifier: Apache-2.0
"""

import re
import typing

import numpy as np
import pytest
from attention_batch import Batch
from attention_variants import VARIANTS, refusal
from frameworks import as_float64, np_dtype
from op_list import OPS
from tolerances import assert_close

import quire
from quire.attention import Variant

ISAS = ("scalar", "avx2", "avx512", "avx512_amx")


@pytest.mark.parametrize("op", list(OPS.values()), ids=list(OPS))
def test_every_op_says_what_and_runs_nothing(backend, rng, op):
    """The op is in the answer, its tensors keep every bit, and the call works as ever afterwards."""
    arrays = op.make(rng, "bfloat16")
    tensors = {name: x if name.startswith("host") else backend.array(x) for name, x in arrays.items()}
    op.prepare(tensors)
    explanation = quire.explain(lambda: op.call(tensors))
    assert explanation.op in quire.__all__
    assert explanation.device == backend.device
    assert explanation.variant
    assert explanation.reasons
    backend.synchronize()
    for name, x in arrays.items():
        got = tensors[name] if name.startswith("host") else backend.numpy(tensors[name])
        np.testing.assert_array_equal(got.view(np.uint8), x.view(np.uint8))
    op.call(tensors)
    if backend.device == "cpu":
        assert explanation.variant.endswith(ISAS)
    quire.check_errors(backend.device)


def test_the_answer_can_be_read(rng):
    x = np.ones((3, 16), np.float32)
    explanation = quire.explain(quire.rms_norm, x, np.ones(16, np.float32))
    assert explanation == quire.explain("rms_norm", x, np.ones(16, np.float32))
    lines = str(explanation).splitlines()
    assert lines[0] == f"rms_norm on cpu: {explanation.variant}"
    assert lines[1:] == [f"  - {reason}" for reason in explanation.reasons]


def test_nothing_to_run():
    empty = np.ones((0, 16), np.float32)
    explanation = quire.explain("rms_norm", empty, np.ones(16, np.float32))
    assert (explanation.op, explanation.variant, explanation.reasons) == ("rms_norm", "", ())
    assert str(explanation) == "rms_norm: nothing to run"


def test_refusals():
    x = np.ones((3, 16), np.float32)
    with pytest.raises(ValueError, match=r"\[rms_norm\] weight: expected"):
        quire.explain("rms_norm", x, np.ones(8, np.float32))
    # The state of the failed call is gone: ops run again.
    assert (quire.rms_norm(x, np.ones(16, np.float32)) > 0.9).all()
    for bad in ("no_such_op", "__version__", 3):
        with pytest.raises(ValueError, match=r"\[explain\] op: expected a function of quire or its name"):
            quire.explain(bad, x)


def test_cpu_attention(rng):
    """Decode and prefill kernels by the shape of the batch."""
    for q_lens, kernel in (([1, 1], "decode"), ([40, 60], "prefill"), ([1, 300], "decode_and_prefill")):
        batch = Batch.make(
            rng, q_lens=q_lens, kv_lens=[70, 400], heads=4, kv_heads=2, dim=64, block_size=8, dtype="float32"
        )
        explanation = quire.explain(
            quire.paged_attention,
            batch.q,
            batch.k_cache,
            batch.v_cache,
            batch.block_tables,
            batch.seq_lens,
            query_start_loc=batch.query_start_loc,
        )
        assert explanation.variant == f"{kernel}_{quire.cpu_isa()}" or quire.cpu_isa() == "avx512_amx"
        assert explanation.variant.startswith(kernel)


def test_cpu_knows_no_variants(rng):
    x = np.ones((3, 2, 16), np.float32)
    for call in (quire.attention, lambda *args, **kw: quire.explain(quire.attention, *args, **kw)):
        with pytest.raises(quire.UnsupportedError, match=r"variant: expected none for CPU tensors, got simt"):
            call(x, x, x, variant="simt")
    with pytest.raises(
        ValueError, match=r'variant: expected None or one of "mma_split_keys_8", .*, got "fast"'
    ) as caught:
        quire.attention(x, x, x, variant="fast")
    known = re.findall(r'"(\w+)"', str(caught.value))[:-1]
    assert tuple(known) == VARIANTS == typing.get_args(Variant)


def shape(q_lens, **changes):
    return {
        "q_lens": q_lens,
        "kv_lens": [n + 200 for n in q_lens],
        "heads": 8,
        "kv_heads": 2,
        "dim": 64,
        "block_size": 16,
        "dtype": "bfloat16",
    } | changes


def cuda_variants(rng):
    """(batch, options, the variant on a Hopper, a reason)."""
    no_tma = "block_size is not a multiple of 8"
    mixed = "mma_split_keys_8+"  # the sequences of few rows have a launch of their own
    return [
        (shape([1, 1], decode=True), {}, "mma_split_keys_8", "8 rows|4 rows"),
        (shape([2, 2]), {}, "mma_split_keys_8", "8 rows"),
        (shape([4, 4]), {}, "mma_split_keys_16", "16 rows"),
        (shape([8, 8]), {}, "mma_split_rows", "twice"),
        (shape([20, 20]), {}, mixed + "mma_split_rows", "fewer than a third of the SMs"),
        (shape([3000, 200]), {}, mixed + "wgmma", ""),
        (shape([3000, 200], block_size=12), {}, mixed + "mma_split_rows", no_tma),
        (shape([6000, 200], block_size=12), {}, mixed + "mma_split_rows_128", no_tma),
        (shape([3000, 200], kv_dtype="int8", scales=2), {}, mixed + "wgmma", ""),
        (shape([3000, 200], dtype="float8_e4m3fn"), {}, mixed + "wgmma", ""),
        (
            shape([3000, 200], dtype="float8_e4m3fn", kv_dtype="int8"),
            {},
            mixed + "mma_split_rows",
            "keys and values are not",
        ),
        (shape([3000, 200]), {"mask": np.zeros((3200, 1), np.uint8)}, mixed + "wgmma", ""),
        (shape([3, 2], dtype="float32"), {}, "simt", "float32"),
    ]


def explained(batch, backend, **options):
    positional, keywords = batch.arguments(backend)
    converted = {n: backend.array(x) if isinstance(x, np.ndarray) else x for n, x in options.items()}
    return (
        quire.explain(quire.paged_attention, *positional, **keywords, **converted),
        lambda **more: quire.paged_attention(*positional, **keywords, **converted, **more),
    )


def cuda_backend(backend):
    if backend.device == "cpu":
        pytest.skip("the variants are CUDA kernels")
    return backend


@pytest.mark.filterwarnings("ignore:.*Profiler clears events")
def test_cuda_attention(backend, rng, torch):
    """What is said is what the profiler sees."""
    cuda_backend(backend)
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("written for a Hopper")
    for made, options, variant, reason in cuda_variants(rng):
        explanation, call = explained(Batch.make(rng, **made), backend, **options)
        assert explanation.variant == variant, explanation
        assert any(text in str(explanation) for text in reason.split("|")), explanation
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call()
            torch.cuda.synchronize()
        names = [event.name for event in profile.events() if "attention" in event.name]
        for launched in variant.split("+"):
            kernel = "attention_" + re.sub(r"(_\d+)?(_small)?$", "", launched) + "_kernel"
            assert sum(kernel in name for name in names) == 1, names
            if "split" in launched:
                index = VARIANTS.index(launched)
                assert any(f"AttentionVariant){index}" in name for name in names if kernel in name), names


def test_cuda_batch_invariant_attention(backend, rng):
    """One kernel for every batch."""
    cuda_backend(backend)
    for made, options, _, _ in cuda_variants(rng):
        explanation, _ = explained(Batch.make(rng, **made), backend, batch_invariant=True, **options)
        assert explanation.variant == ("simt" if made["dtype"] == "float32" else "mma_split_keys_8"), (
            explanation
        )


@pytest.mark.parametrize("dim", [64, 128, 200])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn"])
def test_every_variant_can_be_asked_for(backend, rng, dtype, dim):
    """Each gives the right answer or, where it cannot, says why."""
    cuda_backend(backend)
    capability = backend.torch.cuda.get_device_capability()
    for q_lens in ([1, 1, 1], [5, 1, 70]):
        batch = Batch.make(
            rng,
            q_lens=q_lens,
            kv_lens=[20, 300, 90],
            heads=8,
            kv_heads=2,
            dim=dim,
            block_size=16,
            dtype=dtype,
        )
        want, _ = batch.reference()
        positional, keywords = batch.arguments(backend)
        for variant in VARIANTS:
            if reason := refusal(variant, capability, dim, dtype):
                message = f"variant: expected one that can run, got {variant}: .*{reason}"
                with pytest.raises(quire.UnsupportedError, match=message):
                    quire.explain(quire.paged_attention, *positional, **keywords, variant=variant)
                with pytest.raises(quire.UnsupportedError, match=message):
                    quire.paged_attention(*positional, **keywords, variant=variant)
                continue
            explanation = quire.explain(quire.paged_attention, *positional, **keywords, variant=variant)
            assert explanation.variant == variant
            assert "variant=" in explanation.reasons[0]
            out = quire.paged_attention(*positional, **keywords, variant=variant)
            assert_close("attention", backend.numpy(out), want)


def test_cuda_layouts(backend, rng):
    """Rows that do not divide into 16-byte pieces, and which tensor's they are."""
    cuda_backend(backend)
    x = backend.array(rng.standard_normal((4, 64)).astype(np.float32))
    weight = backend.array(np.ones(63, np.float32))
    assert quire.explain("relu_squared", x).variant == "vector"
    explanation = quire.explain("relu_squared", x[:, 1:])
    assert explanation.variant == "element"
    assert explanation.reasons == ("not vector: x does not divide into aligned 16-byte pieces",)
    explanation = quire.explain("rms_norm", x[:, 1:], weight)
    assert "not vector: x" in explanation.reasons[0]
    want = as_float64(backend.numpy(x))[:, 1:]
    want = want / np.sqrt((want**2).mean(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(backend.numpy(quire.rms_norm(x[:, 1:], weight)), want, rtol=1e-4)


# ---- quantization ----------------------------------------------------------------------------------------------------------


def normal(rng, shape, dtype="float16"):
    return rng.standard_normal(shape).astype(np.float32).astype(np_dtype(dtype))


def test_cpu_products(rng):
    """By the number of tokens, dtypes and scales, with what keeps the faster one out."""
    isa = quire.cpu_isa().removesuffix("_amx")
    w = quire.PackedWeight.quantize(normal(rng, (48, 96)), "w4a16", 32)
    for x, options, variant, reason in (
        (normal(rng, (4, 96)), {}, "fixed_point", "up to 4 tokens"),
        (normal(rng, (5, 96)), {}, "unpacked", "not fixed_point: it reads the weight for each token"),
        (normal(rng, (1, 96), "float32"), {}, "unpacked", "not fixed_point: x is float32"),
        (normal(rng, (1, 96)), {"batch_invariant": True}, "unpacked", "not fixed_point: batch_invariant"),
    ):
        explanation = quire.explain("quantized_matmul", x, w, **options)
        assert (explanation.op, explanation.variant) == ("quantized_matmul", f"{variant}_{isa}")
        assert reason in str(explanation)
    for x, options in (
        (normal(rng, (5, 96), "bfloat16"), {}),
        (normal(rng, (1, 96), "bfloat16"), {"batch_invariant": True}),
    ):
        explanation = quire.explain("quantized_matmul", x, w, **options)
        assert explanation.variant == f"unpacked_{quire.cpu_isa()}"
        rounds = "AMX: the weight is rounded to bfloat16" in explanation.reasons
        assert rounds == (quire.cpu_isa() == "avx512_amx")
    codes, one = rng.integers(-9, 9, (20, 96)).astype(np.int8), np.ones(1, np.float32)
    fp8, blocks = codes.astype(np_dtype("float8_e4m3fn")), np.ones((20, 2), np.float32)
    long = rng.integers(-9, 9, (20, 200)).astype(np.int8)
    for a, scales, options, variant, reason in (
        (codes[:8], (one, one), {}, "rows", "up to 8 rows"),
        (codes, (one, one), {}, "int32", "not rows: more than 8 rows"),
        (codes, (one, one), {"batch_invariant": True}, "int32", "not rows: batch_invariant"),
        (fp8, (one, one), {}, "float32", "not int32: a and b are float8"),
        (long, (blocks, blocks[:1]), {}, "float32", "not int32: scales of blocks"),
    ):
        explanation = quire.explain("scaled_matmul", a, a, *scales, **options)
        level = quire.cpu_isa() if variant == "int32" else isa
        assert (explanation.op, explanation.variant) == ("scaled_matmul", f"{variant}_{level}")
        assert reason in str(explanation)
    # "fp8" and "w8a8" weights quantize x first: the product is what is told of.
    w8a8 = quire.PackedWeight.quantize(normal(rng, (48, 96)), "w8a8")
    assert quire.explain("quantized_matmul", normal(rng, (20, 96)), w8a8).op == "scaled_matmul"
    for name in ("quantize_fp8", "quantize_int8"):
        assert quire.explain(name, normal(rng, (3, 96))).op == name
    assert quire.explain("dequantize_fp8", fp8, one).op == "dequantize_fp8"


def quantized_calls(backend, rng):
    """(op, arguments, options, variants, a reason) on CUDA."""
    array = backend.array
    w = quire.PackedWeight.quantize(array(normal(rng, (200, 512))), "w4a16", 128)
    short = quire.PackedWeight.quantize(array(normal(rng, (200, 192))), "w4a16", 64)
    wide = quire.PackedWeight.quantize(array(normal(rng, (200, 512), "float32")), "w8a16", 128)
    x = array(normal(rng, (70, 512)))
    multiply = quire.quantized_matmul
    yield multiply, (x, w), {}, ("wgmma",), "tiles of"
    yield multiply, (x[:3], w), {}, ("few",), "tiles of 8 tokens"
    yield multiply, (x[:1], w), {}, ("mma",), "not few: one token of a small weight"
    yield multiply, (x, w), {"batch_invariant": True}, ("mma",), "not wgmma: batch_invariant"
    yield (
        multiply,
        (array(normal(rng, (70, 192))), short),
        {},
        ("mma",),
        "not wgmma: fewer than 256 input features",
    )
    yield multiply, (x, wide), {}, ("mma",), "not wgmma: float16 may not have the range"
    yield (
        multiply,
        (array(normal(rng, (70, 513)))[:, 1:], w),
        {},
        ("mma",),
        "not wgmma: rows of x do not begin",
    )
    codes, one = array(rng.integers(-9, 9, (200, 512)).astype(np.int8)), array(np.ones(1, np.float32))
    groups, blocks = array(np.ones((200, 4), np.float32)), array(np.ones((2, 4), np.float32))
    scaled = quire.scaled_matmul
    yield scaled, (codes, codes, one, one), {}, ("wgmma",), "tiles of"
    yield scaled, (codes, codes, groups, blocks), {}, ("mma",), "not wgmma: int8 with scales of blocks"
    yield scaled, (codes[:, 1:], codes[:, 1:], one, one), {}, ("mma",), "not wgmma: rows of a do not begin"
    yield scaled, (codes[:, :480], codes[:, 32:], one, one), {}, ("wgmma",), "tiles of"
    quantize = quire.quantize_int8
    yield quantize, (x,), {"granularity": "token"}, ("rows",), "a row stays in registers"
    yield (
        quantize,
        (x,),
        {"granularity": "group", "group_size": 24},
        ("groups",),
        "not rows: group_size is not",
    )
    yield quantize, (x[:, 1:],), {"granularity": "token"}, ("groups",), "not rows: x or out"
    yield quantize, (x,), {}, ("tensor",), "CTAs keep what fits of x"
    yield quantize, (x[:8],), {}, ("range+rows",), "x is read twice: not tensor: x is small"
    yield quantize, (x[:, 1:],), {}, ("range+groups",), "not tensor: x or out is not dense"
    yield quire.dequantize_int8, (codes, one), {}, ("rows",), "multiples of 16 bytes"
    yield quire.dequantize_int8, (codes[:, 1:], one), {}, ("elements",), "not rows: q or out"


@pytest.mark.filterwarnings("ignore:.*Profiler clears events")
def test_cuda_quantization(backend, rng, torch):
    """What is said is what the profiler sees."""
    cuda_backend(backend)
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("written for a Hopper")
    for op, arguments, options, variants, reason in quantized_calls(backend, rng):
        explanation = quire.explain(op, *arguments, **options)
        assert explanation.op == op.__name__
        assert variants is None or explanation.variant in variants, explanation
        assert reason in str(explanation), explanation
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            op(*arguments, **options)
            torch.cuda.synchronize()
        names = [event.name for event in profile.events()]
        stem = op.__name__.partition("_")[0] if "quantize_" in op.__name__ else op.__name__
        for part in explanation.variant.split("+"):
            kernel = {"range": "tensor_range_kernel", "elements": "dequantize_kernel"}.get(
                part, f"{stem}_{part}_kernel"
            )
            assert any(kernel in name for name in names), (explanation, names)
