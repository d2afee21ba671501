"""quire.torch: eager calls, compiled and exported ones, the operators behind them, and PyTorch's modes.

SPDX-License-Identifier: Apache-2.0
"""

import functools
import io
import re
import subprocess
import sys

import frameworks
import ml_dtypes
import numpy as np
import pytest
from op_cases import (
    CASES,
    IDS,
    WITHOUT_CASES,
    expected_of,
    flat,
    functional,
    normal,
    ops_of_families,
    packed_weights,
    split_options,
)

import quire

torch = pytest.importorskip("torch")

import quire.torch

E4M3 = ml_dtypes.float8_e4m3fn


@pytest.fixture(params=["cpu", "cuda:0"])
def framework(request):
    made = frameworks.make("torch", request.param)
    if isinstance(made, str):
        pytest.skip(f"torch on {request.param}: {made}")
    return made


def call_of(framework, module=quire.torch):
    return functional(
        module,
        lambda shape, dtype, like: torch.empty(tuple(shape), dtype=dtype, device=like.device),
        lambda name: getattr(torch, name),
    )


def tensors_of(framework, arrays, operands):
    return (
        [None if a is None else framework.array(a) for a in arrays],
        {name: framework.array(a) for name, a in operands.items()},
    )


def compare(framework, got, expected):
    got, expected = flat(got), flat(expected)
    assert len(got) == len(expected)
    for a, b in zip(got, expected):
        if b is None:
            assert a is None
            continue
        a, b = framework.numpy(a), np.asarray(b)
        assert (a.dtype.name, a.shape) == (b.dtype.name, b.shape)
        if framework.device == "cpu":  # the same kernel
            np.testing.assert_array_equal(
                np.ascontiguousarray(a).view(np.uint8), np.ascontiguousarray(b).view(np.uint8)
            )
        else:
            a, b = frameworks.as_float64(a), frameworks.as_float64(b)
            np.testing.assert_allclose(a, b, rtol=0.13, atol=2e-2 * max(1.0, np.abs(b[np.isfinite(b)]).max()))


@pytest.mark.parametrize(("op", "arrays", "options"), CASES, ids=IDS)
def test_eager(framework, op, arrays, options):
    operands, static = split_options(options)
    tensors, named = tensors_of(framework, arrays, operands)
    compare(framework, call_of(framework)(op)(*tensors, **named, **static), expected_of(op, arrays, options))


@pytest.mark.parametrize(("op", "arrays", "options"), CASES, ids=IDS)
def test_compiled(framework, op, arrays, options):
    """In one graph; what is written is written in the caller's tensors too."""
    operands, static = split_options(options)
    torch._dynamo.reset()
    function = call_of(framework)(op)
    compiled = torch.compile(lambda a, o: function(*a, **o, **static), fullgraph=True, backend="aot_eager")
    tensors, named = tensors_of(framework, arrays, operands)
    compare(framework, compiled(tensors, named), expected_of(op, arrays, options))
    written, _ = tensors_of(framework, arrays, operands)
    function(*written, **named, **static)
    compare(framework, tensors, [None if a is None else framework.numpy(a) for a in written])


@pytest.mark.slow
def test_inductor(framework):
    """A step of a decoder layer, with the default backend."""

    def step(x, residual, weight, positions, table, k_cache, v_cache, slots, tables, lens):
        x, residual = quire.torch.fused_add_rms_norm(x * 2, residual.clone(), weight)
        q = x.view(3, 4, 16)
        k = q[:, :2].contiguous()
        q = quire.torch.rope_and_write_kv(positions, q.clone(), k, k + 1, table, k_cache, v_cache, slots)
        out = quire.torch.paged_attention(q, k_cache, v_cache, tables, lens) + 1
        return quire.torch.silu_and_mul(out.view(3, 64)), residual

    def inputs():
        cache = [framework.array(normal(4, 8, 2, 16)) for _ in "kv"]
        arrays = normal(3, 64), normal(3, 64), normal(64), np.arange(3), quire.rope_cache(16, 32)
        index = (
            np.array([1, 9, 17]),
            np.array([[0, 3], [1, 3], [2, 3]], np.int32),
            np.array([2, 2, 10], np.int32),
        )
        return [*map(framework.array, arrays), *cache, *map(framework.array, index)]

    torch._dynamo.reset()
    a, b = inputs(), inputs()
    got, want = torch.compile(step, fullgraph=True)(*a), step(*b)
    for left, right in zip((*got, *a[5:7]), (*want, *b[5:7])):
        torch.testing.assert_close(left, right, rtol=2e-5, atol=2e-5)


def test_batch_invariant(framework):
    """Compiled too, a row has the same bits alone and among three, as the option says, and others than without it."""
    own = np.random.default_rng(5)
    arrays = [own.standard_normal(s).astype(np.float32) for s in ((3, 4, 32), *[(960, 16, 2, 32)] * 2)]
    tables = own.permutation(960)[: 3 * 313].reshape(3, 313).astype(np.int32)
    lens = np.array([5000, 4999, 2100], np.int32)
    q, k_cache, v_cache, tables, lens = map(framework.array, (*arrays, tables, lens))
    torch._dynamo.reset()
    compiled = torch.compile(quire.torch.paged_attention, fullgraph=True, backend="aot_eager")
    out = compiled(q, k_cache, v_cache, tables, lens, batch_invariant=True)
    assert torch.equal(out, quire.paged_attention(q, k_cache, v_cache, tables, lens, batch_invariant=True))
    if framework.device == "cpu":
        assert not torch.equal(out, quire.paged_attention(q, k_cache, v_cache, tables, lens))
    for i in range(3):
        some = slice(i, i + 1)
        alone = compiled(q[some], k_cache, v_cache, tables[some], lens[some], batch_invariant=True)
        assert torch.equal(alone[0], out[i])
    k, v = k_cache[:313].reshape(-1, 2, 32)[:5000], v_cache[:313].reshape(-1, 2, 32)[:5000]
    ends = {
        name: framework.array(np.array([0, n], np.int32))
        for name, n in (("query_start_loc", 3), ("kv_start_loc", 5000))
    }
    ragged = torch.compile(quire.torch.attention, fullgraph=True, backend="aot_eager")
    want = quire.attention(q, k, v, **ends, batch_invariant=True)
    assert torch.equal(ragged(q, k, v, **ends, batch_invariant=True), want)
    if framework.device == "cpu":
        assert not torch.equal(want, quire.attention(q, k, v, **ends))


# ---- operators -------------------------------------------------------------------------------------------------------------


def defined():
    return {
        name.removeprefix("quire::")
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("quire::")
    }


class Recorder:
    """Stands in for torch.ops.quire and keeps the calls."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        def record(*args):
            # A copy of what is to be checked, with one tensor for each that was one.
            copies = {id(a): a.clone() for a in args if isinstance(a, torch.Tensor)}
            self.calls.append((name, tuple(copies.get(id(a), a) for a in args)))
            getattr(torch.ops.quire, name)(*args)

        return record


def recorded(monkeypatch, framework, op, arrays, options):
    operands, static = split_options(options)
    recorder = Recorder()
    monkeypatch.setattr(quire.torch._operators, "ops", recorder)
    monkeypatch.setattr(quire.torch._operators, "is_compiling", lambda: True)
    tensors, named = tensors_of(framework, arrays, operands)
    got = call_of(framework)(op)(*tensors, **named, **static)
    return recorder.calls, got


def has_float8(op, arrays, options):
    return (
        "fp8" in op
        or "float8" in str(options.get("out_dtype"))
        or any(a is not None and "float8" in a.dtype.name for a in arrays)
    )


#: PyTorch cannot compare float8 tensors, which opcheck does.
OPCHECK_CASES = [case for case in CASES if not has_float8(*case)]


@pytest.mark.parametrize(("op", "arrays", "options"), OPCHECK_CASES)
def test_opcheck(monkeypatch, framework, op, arrays, options):
    calls, got = recorded(monkeypatch, framework, op, arrays, options)
    compare(framework, got, expected_of(op, arrays, options))
    assert calls
    for name, args in calls:
        result = torch.library.opcheck(getattr(torch.ops.quire, name).default, args)
        assert set(result.values()) == {"SUCCESS"}


def test_every_operator_is_checked(monkeypatch):
    framework = frameworks.make("torch", "cpu")
    seen = set()
    for op, arrays, options in OPCHECK_CASES:
        with monkeypatch.context() as patch:
            seen |= {name for name, _ in recorded(patch, framework, op, arrays, options)[0]}
    assert seen | {"swap_blocks", "dequantize_weight"} | WITHOUT_CASES == defined()


def test_opcheck_of_swap_blocks():
    dst, src = torch.zeros(4, 8), torch.ones(2, 8)
    result = torch.library.opcheck(torch.ops.quire.swap_blocks.default, (dst, src, torch.tensor([[0, 3]])))
    assert set(result.values()) == {"SUCCESS"}


def test_functions_are_quires():
    """Every op of the families that are traced, with the same signature and documentation."""
    import inspect

    assert ops_of_families() == set(quire.torch.__all__)
    for name in quire.torch.__all__:
        own = inspect.signature(getattr(quire.torch, name))
        assert own == inspect.signature(getattr(quire, name))
        traced = getattr(quire.torch, name)
        assert traced.__doc__ == getattr(quire, name).__doc__


def test_export():
    class Step(torch.nn.Module):
        def forward(self, x, weight, cache, pairs):
            quire.torch.copy_blocks(cache, pairs)
            return quire.torch.rms_norm(x, weight)

    inputs = torch.randn(2, 64), torch.ones(64), torch.randn(4, 8), torch.tensor([[0, 3]])
    program = torch.export.export(Step(), tuple(a.clone() for a in inputs))
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert [t for t in targets if t.startswith("quire")] == [
        "quire.copy_blocks.default",
        "quire.rms_norm.default",
    ]
    x, weight, cache, pairs = inputs
    out = program.module()(x, weight, cache, pairs)
    assert torch.equal(out, quire.rms_norm(x, weight))
    assert torch.equal(cache[3], cache[0])


def test_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x, weight = torch.empty(4, 64, dtype=torch.bfloat16), torch.empty(64)
        assert quire.torch.rms_norm(x, weight).shape == (4, 64)
        out, scales = quire.torch.rms_norm(x, weight, out_dtype="int8", granularity="token")
        assert (out.dtype, scales.shape) == (torch.int8, (4, 1))
        assert quire.torch.gelu_and_mul(x).shape == (4, 32)


def test_dynamic_shapes():
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, w: quire.torch.rms_norm(x, w), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    weight = torch.randn(64)
    for num_tokens in (2, 3, 17):
        x = torch.randn(num_tokens, 64)
        assert torch.equal(compiled(x, weight), quire.rms_norm(x, weight))


# ---- modes -----------------------------------------------------------------------------------------------------------------


def test_inference_mode_and_no_grad(framework):
    x, weight = framework.array(normal(2, 64)), torch.nn.Parameter(framework.array(normal(64)))
    with pytest.raises(
        ValueError, match=r"requires_grad; call \.detach\(\) first, or use torch\.no_grad\(\)"
    ):
        quire.torch.rms_norm(x, weight)
    want = quire.rms_norm(x, weight.detach())
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            assert torch.equal(quire.torch.rms_norm(x, weight), want)
            torch._dynamo.reset()
            compiled = torch.compile(
                lambda: quire.torch.rms_norm(x, weight), fullgraph=True, backend="aot_eager"
            )
            assert torch.equal(compiled(), want)


def test_autocast(framework):
    kind = framework.device.partition(":")[0]
    q, k = framework.array(normal(3, 4, 16)), framework.array(normal(3, 2, 16))
    cache = framework.array(normal(4, 8, 2, 16))
    tables, lens = framework.array(np.zeros((3, 1), np.int32)), framework.array(np.full(3, 5, np.int32))
    half = torch.bfloat16
    with torch.autocast(kind, half):
        assert quire.torch.attention(q, k, k).dtype is half
        assert quire.torch.paged_attention(q, cache.to(half), cache.to(half), tables, lens).dtype is half
        assert quire.torch.paged_attention(q, cache, cache, tables, lens).dtype is torch.float32
        int8 = (cache * 10).to(torch.int8)
        assert quire.torch.paged_attention(q, int8, int8, tables, lens).dtype is half
        assert quire.torch.rms_norm(q, k[0, 0]).dtype is torch.float32
        torch._dynamo.reset()
        compiled = torch.compile(
            lambda q, k: quire.torch.attention(q, k, k), fullgraph=True, backend="aot_eager"
        )
        assert torch.equal(compiled(q, k), quire.torch.attention(q, k, k))
    want = quire.attention(q.to(half), k.to(half), k.to(half))
    with torch.autocast(kind, half):
        assert torch.equal(quire.torch.attention(q, k, k), want)


def test_flush_denormal():
    """Results on the CPU are the same for a thread that takes subnormals for zero, and it goes on doing so."""
    cpu = frameworks.make("torch", "cpu")
    x, small = np.full((4096, 64), 1e-40, np.float32), np.full((4096, 64), 2e-40, np.float32)
    tensors = [cpu.array(a) for a in (x, small, np.ones(64, np.float32))]
    # Most values of these are below 2^-6, subnormal in float8_e4m3fn.
    queries, keys = (cpu.array((normal(*shape) * 1e-2).astype(E4M3)) for shape in ((9, 4, 32), (9, 2, 32)))
    want, total = quire.attention(queries, keys, keys), x + small
    num_threads = quire.num_threads()
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot")
    try:
        for threads in (1, 3):  # of a pool that is made here
            quire.set_num_threads(threads)
            _, residual = quire.torch.fused_add_rms_norm(tensors[0].clone(), tensors[1].clone(), tensors[2])
            np.testing.assert_array_equal(residual.numpy().view(np.uint32), total.view(np.uint32))
            got = quire.torch.attention(queries, keys, keys)
            assert torch.equal(got.view(torch.int16), want.view(torch.int16))
            assert float(torch.tensor([1e-40]) * 1) == 0.0
    finally:
        torch.set_flush_denormal(False)
        quire.set_num_threads(num_threads)


def test_refusals_in_a_trace():
    x, weight = torch.randn(2, 64), torch.ones(64)
    torch._dynamo.reset()
    for kwargs, text in (
        ({"stream": 1}, "stream: expected none"),
        ({"validate": "full"}, "validate: expected"),
    ):
        function = functools.partial(quire.torch.rms_norm, **kwargs)
        with pytest.raises(Exception, match=re.escape(text)):
            torch.compile(function, fullgraph=True, backend="aot_eager")(x, weight)
    with pytest.raises(ValueError, match=r"\[rms_norm\] weight: expected float32 \[64\], got float32 \[63\]"):
        torch.compile(quire.torch.rms_norm, fullgraph=True, backend="aot_eager")(x, weight[:63])
    with pytest.raises(TypeError, match=r"\[gelu_new\] x: expected float32"):
        torch.compile(quire.torch.gelu_new, fullgraph=True, backend="aot_eager")(x.int())


def test_current_stream():
    framework = frameworks.make("torch", "cuda:0")
    if isinstance(framework, str):
        pytest.skip(f"torch on cuda: {framework}")
    x, weight = framework.array(normal(64, 4096)), framework.array(normal(4096))
    want = quire.rms_norm(x * 3, weight)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    torch._dynamo.reset()
    for function in (
        quire.torch.rms_norm,
        torch.compile(quire.torch.rms_norm, fullgraph=True, backend="aot_eager"),
    ):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            late = x * 3  # ready only after the sleep, on this stream
            got = function(late, weight)
        stream.synchronize()
        assert torch.equal(got, want)


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")  # PyTorch's own warm-up captures nothing
def test_cuda_graph_of_a_compiled_step():
    framework = frameworks.make("torch", "cuda:0")
    if isinstance(framework, str):
        pytest.skip(f"torch on cuda: {framework}")
    weight = framework.array(normal(4096))
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: quire.torch.rms_norm(x, weight) + 1, fullgraph=True, mode="reduce-overhead"
    )
    for seed in range(4):
        x = torch.randn(8, 4096, device="cuda", generator=torch.Generator("cuda").manual_seed(seed))
        torch.compiler.cudagraph_mark_step_begin()
        torch.testing.assert_close(compiled(x), quire.rms_norm(x, weight) + 1)


def test_importing_quire_imports_no_torch():
    code = "import sys, quire; assert 'torch' not in sys.modules; import quire.torch; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_names_of_arguments():
    """The first arguments may be named, as in quire."""
    x, w = torch.randn(3, 16), torch.ones(16)
    assert torch.equal(quire.torch.rms_norm(x=x, weight=w), quire.torch.rms_norm(x, w))
    q, cache = torch.randn(2, 4, 16), torch.randn(3, 4, 2, 16)
    tables, lens = torch.tensor([[0], [2]], dtype=torch.int32), torch.tensor([3, 4], dtype=torch.int32)
    named = quire.torch.paged_attention(q, k_cache=cache, v_cache=cache, block_tables=tables, seq_lens=lens)
    assert torch.equal(named, quire.torch.paged_attention(q, cache, cache, tables, lens))
    with pytest.raises(TypeError):
        quire.torch.paged_attention(q)


# ---- packed weights --------------------------------------------------------------------------------------------------------


class Linear(torch.nn.Module):
    def __init__(self, w):
        super().__init__()
        self.w = w

    def forward(self, x):
        return quire.torch.quantized_matmul(x, self.w)


class Product(torch.nn.Module):
    def forward(self, x, w):
        return quire.torch.quantized_matmul(x, w)


def test_packed_weights_compiled(framework):
    """As an argument, in a closure, and of a module: in one graph, with the library's own bits."""
    x, bias = framework.array(normal(2, 3, 96).astype(ml_dtypes.bfloat16)), framework.array(normal(48))
    for name, w in packed_weights(framework.array).items():
        want = quire.quantized_matmul(x, w, bias=bias)
        assert torch.equal(quire.torch.quantized_matmul(x, w, bias=bias), want)
        given = torch.empty_like(want)
        for call in (
            lambda x, w: quire.torch.quantized_matmul(x, w, bias=bias),
            lambda x, _: quire.torch.quantized_matmul(x, w, bias=bias),
            lambda x, w: quire.torch.quantized_matmul(x, w, bias=bias, out=given) + 0,
        ):
            torch._dynamo.reset()
            compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
            assert torch.equal(compiled(x, w), want), name
        assert torch.equal(given, want)
        compiled = torch.compile(Linear(w), fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), quire.quantized_matmul(x, w)), name


class Dequantized(torch.nn.Module):
    """x more than the weight, less 1."""

    def __init__(self, dtype: object) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: torch.Tensor, w: quire.PackedWeight) -> torch.Tensor:
        dense = w.dequantize(self.dtype)
        return dense + (x - 1).to(dense.dtype)


def test_packed_weights_exported(framework):
    """What is exported holds the weight's tensors, or takes them, and is saved and loaded."""
    x = framework.array(normal(3, 96).astype(ml_dtypes.bfloat16))
    for name, w in packed_weights(framework.array).items():
        want = quire.quantized_matmul(x, w)
        program = torch.export.export(Linear(w), (x,))
        targets = [str(n.target) for n in program.graph.nodes if str(n.target).startswith("quire")]
        assert targets[-1] == f"quire.{'quantized' if w.weight is None else 'scaled'}_matmul.default"
        assert torch.equal(program.module()(x), want), name
        program, file = torch.export.export(Product(), (x, w)), io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        assert torch.equal(torch.export.load(file).module()(x, w), want), name


def test_dequantize_traced(framework):
    """Compiled as an argument's method and a closure's, and exported: one operator, with the library's own bits."""
    dtype = torch.bfloat16
    for name, w in packed_weights(framework.array).items():
        want, x = w.dequantize(dtype), framework.array(np.ones(1, np.float32))
        given = torch.empty_like(want)
        for call in (
            lambda x, w: w.dequantize("bfloat16") + (x - 1).to(want.dtype),
            lambda x, _: w.dequantize(dtype) + (x - 1).to(want.dtype),
            lambda x, w: w.dequantize(out=given) + (x - 1).to(want.dtype),
        ):
            torch._dynamo.reset()
            assert torch.equal(torch.compile(call, fullgraph=True, backend="aot_eager")(x, w), want), name
        assert torch.equal(given, want), name
        program = torch.export.export(Dequantized(dtype), (x, w))
        targets = [str(n.target) for n in program.graph.nodes if str(n.target).startswith("quire")]
        assert targets == [f"quire.dequantize{'_weight' if w.weight is None else ''}.default"]
        assert torch.equal(program.module()(x, w), want), name
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"\[dequantize\] dtype: expected float32, float16 or bfloat16"):
        torch.compile(lambda w: w.dequantize("int8"), fullgraph=True, backend="aot_eager")(w)


def test_opcheck_of_quantized_matmul(framework):
    x = framework.array(normal(3, 96).astype(ml_dtypes.bfloat16))
    for w in packed_weights(framework.array).values():
        if w.weight is None:
            args = (x.new_empty(3, 48), x, w._data, w._permutation, None, None, *w._fields, False)
            result = torch.library.opcheck(torch.ops.quire.quantized_matmul.default, args)
            assert set(result.values()) == {"SUCCESS"}
            args = (x.new_empty(w.shape), w._data, w._permutation, *w._fields)
            result = torch.library.opcheck(torch.ops.quire.dequantize_weight.default, args)
            assert set(result.values()) == {"SUCCESS"}


@pytest.mark.slow
def test_inductor_with_packed_weights(framework):
    """Quantized layers side by side, with the default backend; what is between them is exact."""
    weights = packed_weights(framework.array)

    def layers(x):
        x = torch.cat([quire.torch.quantized_matmul(x * 0.5, w) * 2 for w in weights.values()])
        q, scale = quire.torch.quantize_int8(x, granularity="token")
        return quire.torch.dequantize_int8(q, scale, granularity="token", out_dtype=x.dtype)

    x = framework.array(normal(3, 96).astype(ml_dtypes.bfloat16))
    torch._dynamo.reset()
    assert torch.equal(torch.compile(layers, fullgraph=True)(x), layers(x))


def test_quantization_refusals_in_a_trace(framework):
    x = framework.array(normal(3, 96).astype(np.float16))
    w = packed_weights(framework.array)["fp8"]
    for error, text, call in (
        (ValueError, r"\[quantize_int8\] zero_point: expected none", lambda x: quire.torch.quantize_int8(x, zero_point=x)),
        (ValueError, r"\[quantize_fp8\] out: expected \(out, scale\)", lambda x: quire.torch.quantize_fp8(x, out=x)),
        (ValueError, r"\[quantize_fp8\] x: expected rank 1 to 4, got", lambda x: quire.torch.quantize_fp8(x[0, 0], granularity="group")),
        (ValueError, r"\[quantize_int8\] x: expected rank 1 to 4, got", lambda x: quire.torch.quantize_int8(x[0, 0])),
        (ValueError, r"\[quantize_fp8\] granularity", lambda x: quire.torch.quantize_fp8(x, granularity="row")),
        (TypeError, r"\[dequantize_int8\] q: expected int8, got float16", lambda x: quire.torch.dequantize_int8(x, x)),
        (TypeError, r"\[quantized_matmul\] w: expected a PackedWeight", lambda x: quire.torch.quantized_matmul(x, x)),
        (ValueError, r"\[quantized_matmul\] x: expected a last dimension of 96", lambda x: quire.torch.quantized_matmul(x[:, 1:], w)),
        (ValueError, r"\[scaled_matmul\] scale_b: expected a tensor", lambda x: quire.torch.scaled_matmul(x, x, x)),
    ):  # fmt: skip
        torch._dynamo.reset()
        with pytest.raises(Exception, match=text) as raised:
            torch.compile(call, fullgraph=True, backend="aot_eager")(x)
        assert error.__name__ in repr(raised.value) or isinstance(raised.value, error)
        with pytest.raises(error, match=text):
            call(x)


def test_recorders_see_operators():
    """torch.jit.trace, make_fx and other dispatch modes record a call, instead of what the memory held."""
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.utils._python_dispatch import TorchDispatchMode

    class Names(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.names = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names.append(str(func))
            return func(*args, **(kwargs or {}))

    def step(x, q, k_cache, v_cache, tables, lens):
        out = quire.torch.paged_attention(q, k_cache, v_cache, tables, lens)
        return quire.torch.rms_norm(x, torch.ones(64)), out, quire.torch.silu_and_mul(x)

    def inputs(seed):
        torch.manual_seed(seed)
        cache = torch.randn(4, 16, 1, 32)
        return (
            torch.randn(3, 64),
            torch.randn(2, 2, 32),
            cache,
            cache + 1,
            torch.tensor([[0], [3]]).int(),
            torch.tensor([5, 9]).int(),
        )

    first, second = inputs(0), inputs(1)
    want = step(*second)
    for recorded in (torch.jit.trace(step, first), make_fx(step)(*first)):
        for got, expected in zip(recorded(*second), want):
            assert torch.equal(got, expected)
    with Names() as names:
        step(*first)
    assert {"quire.rms_norm.default", "quire.paged_attention.default", "quire.silu_and_mul.default"} <= set(
        names.names
    )
