"""The library in a process: how it ends, forks, is called by many threads, and is steered by environment variables.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from reference import activation, norm
from tolerances import assert_close

import quire

#: Large enough that the thread pool takes part in a call.
ROWS, HIDDEN = 512, 1024

PRELUDE = f"""
import os, sys, threading
import numpy as np
import quire

x = np.random.default_rng(0).standard_normal(({ROWS}, {HIDDEN})).astype(np.float32)
weight = np.ones({HIDDEN}, np.float32)

def loop():
    out = np.empty_like(x)
    while True:
        quire.rms_norm(x, weight, out=out)
        started.set()

started = threading.Event()
"""


def run(code: str, *, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter; two threads for CPU ops unless the environment says otherwise."""
    return subprocess.run(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(code)],
        # An editable install rebuilds at the import; it need not say so on stderr.
        env={**os.environ, "SKBUILD_EDITABLE_VERBOSE": "0", "QUIRE_NUM_THREADS": "2", **(env or {})},
        capture_output=True,
        text=True,
        timeout=60,
    )


def assert_clean(done: subprocess.CompletedProcess[str], code: int = 0) -> None:
    assert (done.returncode, done.stderr) == (code, ""), f"{done.returncode}: {done.stderr}"


# ---- the end of a process ----------------------------------------------------------------------------------------------


LIVE_THREAD = """
threading.Thread(target=loop, daemon=True).start()
started.wait()
"""


@pytest.mark.parametrize("repeat", range(5))
def test_main_returns_under_a_live_thread(repeat):
    """A daemon thread that comes back from an op while the interpreter shuts down must not abort the process."""
    assert_clean(run(LIVE_THREAD))


@pytest.mark.parametrize("num_threads", [1, 4])
def test_main_returns_under_several_live_threads(num_threads):
    code = """
        for _ in range(4):
            threading.Thread(target=loop, daemon=True).start()
        started.wait()
    """
    assert_clean(run(code, env={"QUIRE_NUM_THREADS": str(num_threads)}))


def test_main_returns_under_a_thread_that_raises():
    """An exception's way out of the library is as safe as a return."""
    code = """
        def raises():
            while True:
                try:
                    quire.rms_norm(x, weight[1:])
                except ValueError:
                    started.set()

        threading.Thread(target=raises, daemon=True).start()
        started.wait()
    """
    assert_clean(run(code))


@pytest.mark.parametrize(
    ("end", "code"),
    [
        ("sys.exit(0)", 0),
        ("sys.exit(7)", 7),
        ("os._exit(0)", 0),
        ("os._exit(7)", 7),
    ],
)
def test_exits_under_a_live_thread(end, code):
    assert_clean(run(LIVE_THREAD + end), code)


def test_exception_under_a_live_thread():
    done = run(LIVE_THREAD + "raise KeyError('the end')")
    assert done.returncode == 1, done.stderr
    assert done.stderr.rstrip().endswith("KeyError: 'the end'"), done.stderr


def test_exit_waits_for_a_thread_that_is_no_daemon():
    code = """
        def some():
            for _ in range(200):
                quire.rms_norm(x, weight)
            print("done")

        threading.Thread(target=some).start()
    """
    done = run(code)
    assert_clean(done)
    assert done.stdout == "done\n"


def test_op_at_exit():
    """An exit handler may still call ops."""
    code = """
        import atexit

        atexit.register(lambda: print(float(quire.rms_norm(np.full((1, 4), 2.0, np.float32), np.ones(4, np.float32), 0.0)[0, 0])))
    """
    done = run(code)
    assert_clean(done)
    assert done.stdout == "1.0\n"


def test_globals_at_exit():
    """Objects that the interpreter never frees, or frees late, and views of them in another framework."""
    code = """
        cache = quire.KVCache(2, 8, 16, 2, 64, "bfloat16")
        layer = cache.k(1)
        tensor = quire.empty((4, 8), "float32", "cpu")
        view = np.from_dlpack(quire.empty((4, 8), "float32", "cpu"))
        allocator = quire.BlockAllocator(16, 4)
        allocator.add_sequence(1, list(range(10)))
        quire.rms_norm(x, weight)

        class Holder:
            pass

        holder = Holder()
        holder.cycle, holder.objects = holder, (cache, layer, tensor, view, allocator)
        sys.modules["holder_of_quire_objects"] = holder
    """
    assert_clean(run(code))


# ---- fork --------------------------------------------------------------------------------------------------------------

CHILD = """
import warnings

warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of any fork with threads

def forked():
    want = quire.rms_norm(x, weight)
    child = os.fork()
    if child == 0:
        code = 3
        try:
            code = 0 if all(np.array_equal(quire.rms_norm(x, weight), want) for _ in range(3)) else 1
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_fork_after_ops():
    assert_clean(run(CHILD + "\nsys.exit(forked() or forked())"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_fork_of_a_forked_child():
    code = """
child = os.fork()
if child == 0:
    os._exit(forked())
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) or forked())
"""
    assert_clean(run(CHILD + code))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_fork_child_exits_as_usual():
    """The child leaves through the interpreter's own shutdown, with objects of the library alive."""
    code = """
cache = quire.KVCache(1, 4, 16, 1, 64, "float32")
quire.rms_norm(x, weight)
child = os.fork()
if child == 0:
    quire.rms_norm(x, weight)
    sys.exit(5)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert_clean(run(CHILD + code), 5)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_fork_inside_an_op():
    """Another thread holds the pool at the moment of the fork; the child has neither that thread nor the workers."""
    code = """
stop = False

def busy():
    out = np.empty_like(x)
    while not stop:
        quire.rms_norm(x, weight, out=out)
        started.set()

thread = threading.Thread(target=busy)
thread.start()
started.wait()
codes = [forked() for _ in range(20)]
stop = True
thread.join()
sys.exit(max(codes, key=abs))
"""
    assert_clean(run(CHILD + code))


# ---- threads -----------------------------------------------------------------------------------------------------------


def concurrent_ops() -> dict[str, object]:
    """Ops with inputs of their own, each a function of no arguments that gives an array."""
    rng = np.random.default_rng(5)

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    x, residual, weight, bias = draw(256, 1024), draw(256, 1024), draw(1024), draw(1024)
    table = quire.rope_cache(64, 512)
    positions = rng.integers(0, 512, 300)
    q = draw(300, 8, 64)
    cache = draw(2, 32, 16, 2, 64)
    slots = rng.permutation(32 * 16)[:300]
    tables = rng.permutation(32).astype(np.int32).reshape(2, 16)
    lens = np.array([250, 77], np.int32)
    queries = draw(2, 8, 64)
    k, v = draw(300, 2, 64), draw(300, 2, 64)

    def fused() -> np.ndarray:
        return np.stack(quire.fused_add_rms_norm(x.copy(), residual.copy(), weight))

    def write() -> np.ndarray:
        fresh = np.zeros_like(cache)
        quire.write_kv(k, v, fresh[0], fresh[1], slots)
        return fresh

    return {
        "rms_norm": lambda: quire.rms_norm(x, weight),
        "fused_add_rms_norm": fused,
        "layer_norm": lambda: quire.layer_norm(x, weight, bias),
        "silu_and_mul": lambda: quire.silu_and_mul(x),
        "rotary_embedding": lambda: quire.rotary_embedding(positions, q.copy(), None, table)[0],
        "write_kv": write,
        "paged_attention": lambda: quire.paged_attention(queries, cache[0], cache[1], tables, lens),
        "attention": lambda: quire.attention(q, k, v),
    }


@pytest.fixture
def num_threads():
    """Sets the number of threads, and puts it back."""
    before = quire.num_threads()
    yield quire.set_num_threads
    quire.set_num_threads(before)


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and np.ascontiguousarray(a).tobytes() == np.ascontiguousarray(b).tobytes()


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_eight_threads(num_threads, threads):
    """Eight ops at once: one of them gets the pool, the others run alone, and nothing differs."""
    num_threads(threads)
    ops = concurrent_ops()
    want = {name: op() for name, op in ops.items()}
    barrier = threading.Barrier(len(ops))

    def work(name: str) -> list[bool]:
        barrier.wait()
        return [same_bits(ops[name](), want[name]) for _ in range(30)]

    with ThreadPoolExecutor(len(ops)) as executor:
        for name, right in zip(ops, executor.map(work, ops)):
            assert all(right), name


def test_eight_threads_of_one_op(num_threads):
    num_threads(4)
    rng = np.random.default_rng(6)
    weight = rng.standard_normal(HIDDEN).astype(np.float32)
    inputs = [rng.standard_normal((128, HIDDEN)).astype(np.float32) for _ in range(8)]
    want = [quire.rms_norm(x, weight) for x in inputs]

    def work(i: int) -> bool:
        return all(same_bits(quire.rms_norm(inputs[i], weight), want[i]) for _ in range(50))

    with ThreadPoolExecutor(8) as executor:
        assert all(executor.map(work, range(8)))


def test_set_num_threads_while_others_run(num_threads):
    """Every result is that of one of the counts: attention divides its keys by the count, the rest by their shape alone."""
    counts = [1, 2, 3, 5, 8]
    ops = concurrent_ops()
    want = {name: set() for name in ops}
    for count in counts:
        num_threads(count)
        for name, op in ops.items():
            want[name].add(op().tobytes())
    for name, results in want.items():
        assert len(results) == 1 or "attention" in name, name
    stop = threading.Event()

    def work(name: str) -> tuple[int, bool]:
        calls, right = 0, True
        while right and (calls == 0 or not stop.is_set()):
            right = ops[name]().tobytes() in want[name]
            calls += 1
        return calls, right

    with ThreadPoolExecutor(len(ops)) as executor:
        futures = {name: executor.submit(work, name) for name in ops}
        for i in range(200):
            quire.set_num_threads(counts[i % len(counts)])
            quire.rms_norm(np.ones((64, HIDDEN), np.float32), np.ones(HIDDEN, np.float32))
        stop.set()
        for name, future in futures.items():
            calls, right = future.result()
            assert right, f"{name}: another result in call {calls}"


@pytest.mark.parametrize("count", [1, 2, 3, 1024])
def test_set_num_threads(num_threads, count):
    num_threads(count)
    assert quire.num_threads() == count


@pytest.mark.parametrize(
    ("count", "error"),
    [
        (0, ValueError),
        (-1, ValueError),
        (5000, ValueError),
        (1025, ValueError),
        (2**80, ValueError),
        ("x", TypeError),
        (1.5, TypeError),
    ],
)
def test_set_num_threads_refuses(num_threads, count, error):
    num_threads(3)
    with pytest.raises(error, match=r"\[set_num_threads\] num_threads: expected "):
        quire.set_num_threads(count)
    assert quire.num_threads() == 3


# ---- environment variables ---------------------------------------------------------------------------------------------

LEVELS = ["scalar", "avx2", "avx512", "avx512_amx"]

ISA_OPS = """
import json

rng = np.random.default_rng(7)

def draw(*shape):
    return rng.standard_normal(shape).astype(np.float32)

x, w = draw(9, 773), draw(773)
gate = draw(9, 2 * 389)
q, k, v = draw(70, 4, 80), draw(70, 2, 80), draw(70, 2, 80)
np.savez(
    os.environ["TEST_OUT"], x=x, w=w, gate=gate, q=q, k=k, v=v, rms_norm=quire.rms_norm(x, w),
    silu_and_mul=quire.silu_and_mul(gate), attention=quire.attention(q, k, v),
)
print(json.dumps([quire.cpu_isa(), quire.num_threads()]))
"""


@pytest.fixture(scope="module")
def levels(tmp_path_factory):
    """Every level's own name, and its results: by the level that was asked for."""
    found = {}
    for level in [*LEVELS, "unheard_of"]:
        path = tmp_path_factory.mktemp(level) / "results.npz"
        done = run(ISA_OPS, env={"QUIRE_CPU_ISA": level, "TEST_OUT": str(path)})
        assert_clean(done)
        with np.load(path) as results:
            found[level] = json.loads(done.stdout)[0], dict(results)
    return found


def test_isa_names(levels):
    """A level that the machine lacks falls back to its highest one; an unknown name is as none."""
    highest = levels["unheard_of"][0]
    assert highest in LEVELS
    for i, level in enumerate(LEVELS):
        assert levels[level][0] == LEVELS[min(i, LEVELS.index(highest))]


@pytest.mark.parametrize("level", LEVELS)
def test_isa_results(levels, level):
    """Every level is within rounding of float64, and so of every other."""
    _, results = levels[level]
    wide = {name: x.astype(np.float64) for name, x in results.items()}
    want = norm.rms_norm(wide["x"], wide["w"], float(np.float32(1e-6)))
    assert_close("norm", results["rms_norm"], want)
    assert_close("activation", results["silu_and_mul"], activation.gated("silu_and_mul", wide["gate"]))

    q, k, v = wide["q"], np.repeat(wide["k"], 2, axis=1), np.repeat(wide["v"], 2, axis=1)
    scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(q.shape[-1])
    scores = np.where(np.tri(len(q), dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    assert_close("attention", results["attention"], np.einsum("hqk,khd->qhd", weights, v))


@pytest.mark.parametrize(
    ("text", "want"),
    [("1", 1), ("3", 3), ("100000", 1024), ("0", None), ("-2", None), ("many", None), ("", None)],
)
def test_num_threads_variable(text, want):
    """A count of 1 or more holds, up to the most that there may be; anything else is as none: the CPUs of the process."""
    done = run("print(quire.num_threads())", env={"QUIRE_NUM_THREADS": text})
    assert_clean(done)
    cpus = min(len(os.sched_getaffinity(0)), 1024) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert int(done.stdout) == (cpus if want is None else want)


def test_num_threads_variable_changes_no_bit():
    """Rows are divided by their shape, never by who is there to do them."""
    code = "import hashlib; print(hashlib.sha256(quire.rms_norm(x, weight).tobytes()).hexdigest())"
    digests = {run(code, env={"QUIRE_NUM_THREADS": str(n)}).stdout for n in (1, 2, 7)}
    assert len(digests) == 1
    assert len(digests.pop()) == 65
