"""Streams: every op runs on the right one, in order across streams and frameworks, and no call waits for the device.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import time
from typing import Any

import frameworks
import numpy as np
import pytest
from attention_batch import Batch
from frameworks import as_float64
from gpu_work import SHORT_DELAY, assert_same, busy, draws
from op_list import HIDDEN, OPS, ROWS, draw, every_op
from reference import norm as reference
from tolerances import assert_close

import quire


def test_every_public_op_is_listed():
    functions = {
        name
        for name in quire.__all__
        if "stream" in (getattr(getattr(quire, name), "__kwdefaults__", None) or ())
    }
    assert {op.function or op.name for op in OPS.values()} == functions


@every_op
def test_ops_run_on_the_cpu(op):
    """What is captured and raced below does something: each call changes what its dictionary holds."""
    tensors = op.make(np.random.default_rng(1), "bfloat16")
    op.prepare(tensors)
    before = {name: array.copy() for name, array in tensors.items() if not name.startswith("host_")}
    op.call(tensors)
    assert any(array.tobytes() != tensors[name].tobytes() for name, array in before.items())


# ---- order -------------------------------------------------------------------------------------------------------------


@every_op
def test_current_stream(work, op):
    """Behind a late producer on a side stream that is current: the op runs on that stream."""
    tensors, new, want = draws(op, work)
    side = work.stream()
    with work.use(side):
        work.delay(SHORT_DELAY)
        work.assign(tensors, new)
        op.call(tensors)
        got = work.copy(tensors)
    assert_same(work, got, want)


def stream_argument(kind: str, work: Any) -> tuple[Any, object]:
    """A side stream as stream= takes it, and what keeps it alive."""
    if kind == "cupy":
        framework = frameworks.make("cupy", "cuda:0")
        if isinstance(framework, str):
            pytest.skip(f"cupy on cuda:0: {framework}")
        stream = framework.cupy.cuda.Stream(non_blocking=True)
        return stream, stream
    stream = work.stream()
    if kind == "handle":
        return work.handle(stream), stream
    if kind == "protocol":

        class Foreign:
            def __cuda_stream__(self) -> tuple[int, int]:
                return 0, work.handle(stream)

        return Foreign(), stream
    if not hasattr(stream, "__cuda_stream__"):
        pytest.skip("streams of this torch have no __cuda_stream__")
    return stream, stream


@pytest.mark.parametrize("kind", ["object", "handle", "protocol", "cupy"])
@every_op
def test_explicit_stream(work, op, kind):
    """Inputs written late on the current stream, the op on another, the result read on the current one: no sync by hand."""
    tensors, new, want = draws(op, work)
    argument, stream = stream_argument(kind, work)
    current = work.stream()
    with work.use(current):
        work.delay(SHORT_DELAY)
        work.assign(tensors, new)
        op.call(tensors, stream=argument)
        got = work.copy(tensors)
    assert_same(work, got, want)
    del stream


@pytest.mark.parametrize("number", [0, 1, 2])
def test_default_streams_by_number(work, number):
    """0 and 1 are the legacy default stream, 2 the thread's own."""
    op = OPS["fused_add_rms_norm"]
    tensors, new, want = draws(op, work)
    with work.use(work.stream()):
        work.delay(SHORT_DELAY)
        work.assign(tensors, new)
        op.call(tensors, stream=number)
        got = work.copy(tensors)
    assert_same(work, got, want)


@pytest.mark.parametrize("repeat", range(3))
def test_busy_explicit_stream(work, repeat):
    """The explicit stream is the late one: the current stream waits for the op, not for the time of the call."""
    op = OPS["fused_add_rms_norm"]
    tensors, new, want = draws(op, work)
    side, current = work.stream(), work.stream()
    with work.use(side):
        work.delay(SHORT_DELAY)
    with work.use(current):
        work.assign(tensors, new)
        op.call(tensors, stream=work.handle(side))
        got = work.copy(tensors)
        work.assign(tensors, new)  # a write behind the op's reads
    assert_same(work, got, want)


class NoTuple:
    def __cuda_stream__(self):
        return 5


class OtherProtocol:
    def __cuda_stream__(self):
        return 1, 2


class Raises:
    def __cuda_stream__(self):
        raise RuntimeError("no stream today")


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (-1, ValueError),
        (2**64, ValueError),
        ("x", TypeError),
        (1.5, TypeError),
        (object(), TypeError),
        ([1], TypeError),
        (NoTuple(), TypeError),
        (OtherProtocol(), TypeError),
        (Raises(), RuntimeError),
    ],
    ids=["negative", "large", "str", "float", "object", "list", "no_tuple", "other_protocol", "raises"],
)
def test_wrong_streams(backend, rng, value, error):
    x, weight = backend.array(draw(rng, (3, 64), "float32")), backend.array(np.ones(64, np.float32))
    out = backend.array(np.full((3, 64), 7.0, np.float32))
    match = "no stream today" if error is RuntimeError else r"\[rms_norm\] stream: expected "
    with pytest.raises(error, match=match):
        quire.rms_norm(x, weight, out=out, stream=value)
    np.testing.assert_array_equal(backend.numpy(out), np.full((3, 64), 7.0, np.float32))


def test_mixed_frameworks_on_their_own_streams(torch_work):
    """A CuPy input that is late on CuPy's stream, with PyTorch outputs on PyTorch's."""
    framework = frameworks.make("cupy", "cuda:0")
    if isinstance(framework, str):
        pytest.skip(f"cupy on cuda:0: {framework}")
    torch, cupy = torch_work.torch, framework.cupy
    rng = np.random.default_rng(4)
    x, weight = draw(rng, (ROWS, HIDDEN), "float16"), draw(rng, (HIDDEN,), "float16")
    late = cupy.zeros((ROWS, HIDDEN), cupy.float16)
    source, w = cupy.asarray(x), torch.from_numpy(weight).cuda()
    out = torch.zeros((ROWS, HIDDEN), dtype=torch.float16, device="cuda")
    torch_work.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()), cupy.cuda.Stream(non_blocking=True) as stream:
        with torch.cuda.stream(torch.cuda.ExternalStream(stream.ptr)):
            torch.cuda._sleep(SHORT_DELAY)
        cupy.copyto(late, source)
        quire.rms_norm(late, w, out=out)
        late.fill(float("nan"))  # behind the op, on CuPy's stream
        got = out.clone()
    torch_work.synchronize()
    want = reference.rms_norm(as_float64(x), as_float64(weight), 1e-6)
    assert_close("norm", got.cpu().numpy(), want)


# ---- no host synchronisation -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("explicit", [False, True], ids=["current", "explicit"])
@every_op
def test_no_host_synchronisation(work, op, explicit):
    tensors, new, want = draws(op, work)
    side, current = work.stream(), work.stream()
    keywords = {"stream": work.handle(side)} if explicit else {}
    with work.use(current):  # warm: kernels are loaded, and the streams have their workspace
        for _ in range(2):
            spare = work.copy(new)
            op.call(spare, **keywords)
    work.synchronize()
    with busy(work, current) as is_busy:
        work.assign(tensors, new)
        start = time.perf_counter()
        op.call(tensors, **keywords)
        seconds = time.perf_counter() - start
        still_busy = is_busy()
        got = work.copy(tensors)
    assert still_busy, f"the call returned when the stream was done, after {seconds * 1e3:.1f} ms"
    assert seconds < 0.02
    assert_same(work, got, want)


def test_no_host_synchronisation_of_an_allocated_result(work):
    tensors, _, _ = draws(OPS["rms_norm"], work)
    current = work.stream()
    with work.use(current):
        warm = [quire.rms_norm(tensors["x"], tensors["weight"]) for _ in range(2)]
    work.synchronize()
    del warm
    with busy(work, current) as is_busy:
        start = time.perf_counter()
        quire.rms_norm(tensors["x"], tensors["weight"])
        seconds = time.perf_counter() - start
        assert is_busy(), f"the call returned when the stream was done, after {seconds * 1e3:.1f} ms"
    assert seconds < 0.02
    work.synchronize()


# ---- JAX ---------------------------------------------------------------------------------------------------------------


def test_jax_inputs_made_and_dropped(jax):
    """The input is not there yet when the op is called, and its memory is up for reuse right after."""
    jnp = jax.numpy
    rows, hidden = 512, 2048

    @jax.jit
    def produce(seed: Any) -> Any:
        x = jax.random.normal(jax.random.key(seed), (rows, hidden), jnp.float32)
        late = jax.lax.fori_loop(0, 2000, lambda _, y: 1.5 * jnp.sin(y) + 0.25, x)
        return x + late

    @jax.jit
    def churn(seed: Any) -> Any:
        return [jnp.full((rows, hidden), jnp.nan) * (seed + i) for i in range(4)]

    weight = jax.block_until_ready(jnp.linspace(0.5, 1.5, hidden, dtype=jnp.float32))
    jax.block_until_ready([produce(0), churn(0)])
    outs, garbage = [], []
    for seed in range(20):
        x = produce(seed)
        outs.append(quire.rms_norm(x, weight))
        del x
        garbage = [churn(seed + i) for i in range(3)]
    jax.block_until_ready(garbage)
    w = as_float64(np.asarray(weight))
    for seed, out in enumerate(outs):
        want = reference.rms_norm(as_float64(np.asarray(produce(seed))), w, 1e-6)
        assert_close("norm", np.asarray(out), want)


def test_jax_inputs_of_every_argument(jax):
    """Five inputs at once, each just made by a computation of its own and dropped after the call."""
    jnp = jax.numpy
    rng = np.random.default_rng(8)
    arrays = OPS["paged_long"].make(rng, "float16")
    del arrays["out"]
    order = ["q", "k_cache", "v_cache", "block_tables", "seq_lens"]
    held = {name: jax.device_put(arrays[name], jax.devices("cuda")[0]) for name in order}
    late = jax.jit(lambda x, zero: x + zero)
    want = None
    for _ in range(10):
        made = [late(held[name], jnp.zeros((), held[name].dtype)) for name in order]
        out = quire.paged_attention(*made)
        del made
        garbage = [jnp.full(held["k_cache"].shape, jnp.nan, jnp.float16) for _ in range(4)]
        got = np.asarray(out)
        want = got if want is None else want
        np.testing.assert_array_equal(got.view(np.uint8), want.view(np.uint8))
        del garbage
    assert_close("attention", want, Batch(**arrays, query_start_loc=None).reference()[0])


def test_jax_result_consumed_at_once(jax):
    """A result that a jitted function takes while the op may still run, 200 times, with another result each time."""
    jnp = jax.numpy
    rows, hidden, variants = 4096, 4096, 3
    weight = jnp.ones(hidden, jnp.float32)
    xs = [jax.random.normal(jax.random.key(i), (rows, hidden), jnp.float32) for i in range(variants)]
    consume = jax.jit(lambda x: (x * jnp.arange(hidden, dtype=jnp.float32)).sum(axis=1))
    jax.block_until_ready([weight, *xs])
    settled = []
    for x in xs:
        out = quire.rms_norm(x, weight)
        on_host = np.asarray(out)  # the op is done once this is right
        some = slice(None, None, 61)
        assert_close("norm", on_host[some], reference.rms_norm(as_float64(np.asarray(x)[some]), 1.0, 1e-6))
        settled.append(np.asarray(consume(out)))
    assert not np.array_equal(settled[0], settled[1])
    got = [consume(quire.rms_norm(xs[i % variants], weight)) for i in range(200)]
    for i, y in enumerate(got):
        np.testing.assert_array_equal(np.asarray(y), settled[i % variants], err_msg=f"call {i}")
