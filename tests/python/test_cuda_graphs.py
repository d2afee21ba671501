"""CUDA graphs: every op in a capture, also as its first call, and replayed on other contents; calls that raise in a capture.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import functools
import os
import pathlib
import subprocess
import sys
import traceback
from collections.abc import Callable
from typing import Any

import frameworks
import numpy as np
import pytest
from attention_variants import VARIANTS, refusal
from gpu_work import CuPyWork, TorchWork, assert_same, draws
from op_list import HIDDEN, MALFORMED, OPS, call_paged, every_op, make_paged

import quire


@every_op
def test_capture_and_replay(work, op):
    """A replay works on what the tensors hold then, index tensors included, and equals an eager call bit for bit.

    A malformed call in the capture raises, and the capture goes on.
    """
    tensors, new, want = draws(op, work)
    before, malformed = work.copy(tensors), work.malformed(op, tensors)

    def call() -> None:
        for _ in range(2):
            with pytest.raises((ValueError, TypeError, IndexError), match=r"\[\w+\] "):
                op.call(malformed)
        op.call(tensors)

    replay = work.capture(call)
    assert_same(work, tensors, before)  # a capture runs nothing
    for _ in range(3):
        work.assign(tensors, new)
        replay()
        assert_same(work, tensors, want)


@every_op
def test_capture_on_an_explicit_stream(torch_work, op):
    """stream= names the very stream that is captured."""
    torch, work = torch_work.torch, torch_work
    tensors, new, want = draws(op, work)
    replay = work.capture(lambda: op.call(tensors, stream=torch.cuda.current_stream().cuda_stream))
    work.assign(tensors, new)
    replay()
    assert_same(work, tensors, want)


def test_capture_of_a_chain(work):
    """Ops of several families in one graph, among the framework's own."""
    norm, rotary = OPS["fused_add_rms_norm"], OPS["rotary_embedding"]
    kv, paged = OPS["write_kv"], OPS["paged_long"]
    sets = [draws(op, work) for op in (norm, rotary, kv, paged)]

    def chain() -> None:
        for op, (tensors, new, _) in zip((norm, rotary, kv, paged), sets):
            work.assign(tensors, new)
            op.call(tensors)

    replay = work.capture(chain)
    for _ in range(2):
        replay()
        for tensors, _, want in sets:
            assert_same(work, tensors, want)


@pytest.mark.parametrize("captured", [False, True], ids=["eager", "graph"])
def test_what_may_start_early_waits(torch_work, captured):
    """On Hopper a matrix product lets the next kernel start while it still writes: whatever reads its result waits on the device."""
    torch, rows, width = torch_work.torch, 2048, 2048
    torch.manual_seed(0)
    a, b = (torch.randn(n, width, device="cuda").to(torch.float8_e4m3fn) for n in (rows, width))
    one, weight = torch.ones(1, device="cuda"), torch.ones(width, device="cuda")
    product = torch.empty(rows, width, dtype=torch.bfloat16, device="cuda")
    heads, slots = product.view(rows, 16, 128), torch.arange(rows, device="cuda")
    table = torch.from_numpy(quire.rope_cache(128, rows)).cuda()
    normed = torch.empty_like(product)
    caches = [torch.empty(rows // 16, 16, 16, 128, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
    gated = torch.empty(rows, width // 2, dtype=torch.bfloat16, device="cuda")
    readers = {
        "rms_norm": (lambda: quire.rms_norm(product, weight, out=normed), normed),
        "silu_and_mul": (lambda: quire.silu_and_mul(product, out=gated), gated),
        "write_kv": (lambda: quire.write_kv(heads, heads, *caches, slots), caches[0]),
        "rotary_embedding": (lambda: quire.rotary_embedding(slots, heads, None, table), heads),
    }

    def attend(name: str, sequences: int, keys: int, **options: Any) -> None:
        """The last rows, which are written last, are queries, keys and values."""
        cache, q = product.view(rows // 16, 16, 16, 128), heads[-sequences:]
        tables = torch.arange(rows // 16 - 1, -1, -1, dtype=torch.int32, device="cuda").expand(sequences, -1)
        lens, out = torch.full((sequences,), keys, dtype=torch.int32, device="cuda"), torch.empty_like(q)
        call = functools.partial(quire.paged_attention, q, cache, cache, tables, lens, out=out, **options)
        readers[f"attention, {name}"] = call, out

    attend("one sequence", 1, 300)
    attend("eight sequences", 8, 300)
    attend("many sequences", 200, 40)
    attend("batch-invariant", 3, 700, batch_invariant=True)
    for variant in VARIANTS:
        if refusal(variant, torch.cuda.get_device_capability(), 128, "bfloat16") is None:
            attend(variant, 2, 1000, variant=variant)
    tokens, starts = heads[-300:], torch.tensor([0, 100, 300], dtype=torch.int32, device="cuda")
    prefilled, merged = torch.empty_like(tokens), torch.empty_like(tokens)
    lse, new_lse = torch.zeros(300, 16, device="cuda"), torch.empty(300, 16, device="cuda")
    single = product.view(torch.float32).view(rows, 8, 128)[-40:]
    exact = torch.empty_like(single)
    scales = torch.empty(rows, 1, device="cuda")
    quantized = torch.empty(rows, width, dtype=torch.float8_e4m3fn, device="cuda")
    readers |= {
        "prefill": (
            lambda: quire.attention(tokens, tokens, tokens, query_start_loc=starts, out=prefilled),
            prefilled,
        ),
        "float32": (lambda: quire.attention(single, single, single, out=exact), exact),
        "merge_attention": (
            lambda: quire.merge_attention(tokens, lse, heads[-600:-300], lse, out=merged, out_lse=new_lse),
            merged,
        ),
        "quantize_fp8": (
            lambda: quire.quantize_fp8(product, granularity="token", out=(quantized, scales)),
            scales,
        ),
    }
    for kind in ("w4a16", "w8a8"):
        packed = quire.PackedWeight.quantize(torch.randn(256, width, device="cuda"), kind)
        for count in (1, 16, 300):
            out = torch.empty(count, 256, dtype=torch.bfloat16, device="cuda")
            call = functools.partial(quire.quantized_matmul, product[-count:], packed, out=out)
            readers[f"{kind}, {count} tokens"] = call, out
    for name, (read, result) in readers.items():

        def chain(synchronize: Callable[[], None], read: Callable[[], object] = read) -> None:
            product.fill_(float("nan"))
            quire.scaled_matmul(a, b, one, one, out=product)
            synchronize()
            read()

        chain(torch.cuda.synchronize)
        torch.cuda.synchronize()
        want = result.clone()
        run = torch_work.capture(lambda: chain(lambda: None)) if captured else lambda: chain(lambda: None)
        for _ in range(20):
            result.fill_(float("nan"))
            run()
            torch.cuda.synchronize()
            assert torch.equal(result, want), name


def test_graph_outlives_a_larger_call(torch_work):
    """The shared workspace that a graph uses stays when a later call on the same stream needs more."""
    torch, work, op = torch_work.torch, torch_work, OPS["paged_long"]
    tensors, new, want = draws(op, work)
    stream = torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        op.call(tensors)
    larger = functools.partial(make_paged, q_lens=[1] * 64, kv_lens=[700] * 64, decode=True, dim=256)
    large = work.upload(larger(np.random.default_rng(3), work.dtype))
    with torch.cuda.stream(stream):
        for _ in range(3):
            call_paged(large)
    work.synchronize()
    filler = [torch.full((1 << 20,), float("nan"), device="cuda") for _ in range(8)]
    work.assign(tensors, new)
    graph.replay()
    assert_same(work, tensors, want)
    del filler


def first_capture(name: str, kind: str) -> None:
    """In a fresh process: no call of the library comes before the capture, but those that pack a weight."""
    work, op = TorchWork() if kind == "torch" else CuPyWork(frameworks.CuPy()), OPS[name]
    tensors, new = (work.made(op, seed) for seed in (1, 2))
    old, malformed = work.copy(tensors), work.malformed(op, tensors)

    def call() -> None:
        with pytest.raises((ValueError, TypeError, IndexError)):
            op.call(malformed)
        op.call(tensors)

    replay = work.capture(call)
    for _ in range(500):  # a thousand replays, on other contents each time
        for contents in (old, new):
            work.assign(tensors, contents)
            replay()
    work.synchronize()
    before = work.copy(new)
    op.call(new)
    assert_same(work, tensors, new)
    assert any(
        work.bits(new[n]).tobytes() != work.bits(a).tobytes() for n, a in before.items() if n[:5] != "host_"
    )
    quire.check_errors()


def first_captures(names: list[str], kind: str) -> None:
    """One process for each op, with what takes long to import already there: neither CUDA nor the library was used before the fork."""
    if kind == "torch":
        assert not TorchWork().torch.cuda.is_initialized()
    failed, skipped = [], []
    for name in names:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                first_capture(name, kind)
                status = 0
            except pytest.skip.Exception:
                status = 77
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status == 77:
            skipped.append(name)
        elif status != 0:
            failed.append(name)
    print("skipped:", *skipped)
    print("failed:", *failed)


NAMES = list(OPS)


@pytest.mark.parametrize("names", [NAMES[i::6] for i in range(6)], ids=lambda names: f"{names[0]}...")
@pytest.mark.parametrize("kind", ["torch", "cupy"])
def test_capture_as_the_first_call(kind, names):
    """Every op, captured by a process that never called one, and replayed a thousand times."""
    framework = frameworks.make(kind, "cuda:0")
    if isinstance(framework, str):
        pytest.skip(f"{kind} on cuda:0: {framework}")
    here = str(pathlib.Path(__file__).parent)
    call = f"test_cuda_graphs.first_captures({names!r}, {kind!r})"
    code = f"import sys; sys.path.insert(0, {here!r}); import test_cuda_graphs; {call}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    skipped, failed = (line.split()[1:] for line in done.stdout.splitlines()[-2:])
    assert (done.returncode, failed) == (0, []), done.stdout + done.stderr
    # CuPy has no float8.
    assert all(kind == "cupy" and "fp8" in name for name in skipped), skipped
    assert len(skipped) < len(names)


@pytest.mark.parametrize("kind", list(MALFORMED))
def test_malformed_call_in_a_capture(torch_work, kind):
    """It raises before it touches the stream: the capture goes on, and the graph holds the calls around it."""
    torch, work = torch_work.torch, torch_work
    error, bad = MALFORMED[kind]
    norm, new_norm, want_norm = draws(OPS["rms_norm"], work)
    paged, new_paged, want_paged = draws(OPS["paged_long"], work)

    def call() -> None:
        OPS["rms_norm"].call(norm)
        with pytest.raises(error):
            bad(torch, norm, paged)
        OPS["paged_long"].call(paged)

    replay = work.capture(call)
    work.assign(norm, new_norm)
    work.assign(paged, new_paged)
    replay()
    assert_same(work, norm, want_norm)
    assert_same(work, paged, want_paged)


def test_validate_full_names_the_capture(torch_work):
    work = torch_work
    paged, *_ = draws(OPS["paged_decode"], work)

    def call() -> None:
        with pytest.raises(ValueError, match=r"\[paged_attention\] validate: expected \"shape\" while"):
            call_paged(paged, validate="full")
        OPS["paged_decode"].call(paged)

    work.capture(call)()
    quire.check_errors("cuda:0")


def test_jax_array_in_a_capture(torch_work, jax):
    """A JAX array's order cannot be captured; it is refused by name, and the capture goes on."""
    work = torch_work
    tensors, new, want = draws(OPS["rms_norm"], work)
    weight = jax.block_until_ready(jax.numpy.ones(HIDDEN, jax.numpy.bfloat16))

    def call() -> None:
        with pytest.raises(quire.UnsupportedError, match="while a CUDA graph is captured"):
            quire.rms_norm(tensors["x"], weight, out=tensors["out"])
        OPS["rms_norm"].call(tensors)

    replay = work.capture(call)
    work.assign(tensors, new)
    replay()
    assert_same(work, tensors, want)


def test_bad_index_in_a_replay(torch_work):
    """The error word works inside a graph: recorded at the replay, not at the capture, and again at the next."""
    work, op = torch_work, OPS["write_kv"]
    tensors, new, want = draws(op, work)
    replay = work.capture(lambda: op.call(tensors))
    quire.check_errors("cuda:0")
    for _ in range(2):
        work.assign(tensors, new)
        tensors["slots"][0] = 10**6
        replay()
        with pytest.raises(IndexError, match=r"write_kv.*slot_mapping.*1000000"):
            quire.check_errors("cuda:0")
    work.assign(tensors, new)
    replay()
    assert_same(work, tensors, want)


@pytest.mark.parametrize("rows", [2048, 16384])
def test_scale_of_a_large_tensor_in_a_graph(torch_work, rows):
    """One launch whose CTAs wait for each other, or where x is too large for that, several."""
    torch, work = torch_work.torch, torch_work
    x, new = (torch.randn(rows, 8192, device="cuda").bfloat16() * scale for scale in (1, 3))
    got = {
        "q": torch.zeros(rows, 8192, dtype=torch.int8, device="cuda"),
        "scale": torch.zeros(1, device="cuda"),
    }
    replay = work.capture(lambda: quire.quantize_int8(x, out=(got["q"], got["scale"])))
    want = dict(zip(got, quire.quantize_int8(new)))
    for _ in range(3):
        x.copy_(new)
        replay()
        assert_same(work, got, want)
        got["q"].zero_()
