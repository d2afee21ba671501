"""The border: what tensors are taken, what is refused and why, lifetimes, and what a call costs.

SPDX-License-Identifier: Apache-2.0
"""

import gc
import os
import subprocess
import sys
import timeit
import warnings
import weakref

import frameworks
import numpy as np
import pytest
from frameworks import np_dtype

import quire
from quire import _core

ALL_DTYPES = [
    "float32",
    "float16",
    "bfloat16",
    "float8_e4m3fn",
    "float8_e5m2",
    "int8",
    "uint8",
    "int32",
    "int64",
    "bool",
]


@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_every_dtype_comes_in(framework, dtype):
    """copy_blocks takes any dtype; a writable framework shows that the memory is its own."""
    x = np.arange(12).reshape(4, 3).astype(np.float32).astype(np_dtype(dtype))
    pairs = framework.array(np.array([[3, 0]], np.int32))
    tensor = framework.array(x)
    if not framework.writable:
        with pytest.raises(ValueError, match="got a JAX array"):
            quire.copy_blocks(tensor, pairs)
        return
    quire.copy_blocks(tensor, pairs)
    want = x.copy()
    want[0] = x[3]
    np.testing.assert_array_equal(framework.numpy(tensor).view(np.uint8), want.view(np.uint8))


@pytest.mark.parametrize("dtype", [np.float64, np.int16, np.uint16, np.uint32, np.uint64, np.complex64])
def test_other_dtypes_are_refused_by_name(dtype):
    with pytest.raises(
        TypeError, match=rf"\[copy_blocks\] cache: expected float32, .* or bool, got {np.dtype(dtype).name}"
    ):
        quire.copy_blocks(np.zeros((2, 2), dtype), np.zeros((1, 2), np.int32))


def test_numpy_edge_cases():
    weight = np.ones(4, np.float16)
    raw = np.zeros(4 * 2 + 1, np.uint8)
    misaligned = raw[1:].view(np.float16)
    with pytest.raises(ValueError, match=r"x: expected data aligned to its 2-byte items, got address"):
        quire.rms_norm(misaligned, weight)
    with pytest.raises(TypeError, match=r"x: expected a tensor that DLPack can describe"):
        quire.rms_norm(np.zeros(4, ">f4"), weight, out=weight.copy())
    with pytest.raises(TypeError, match=r"x: expected a tensor that DLPack can describe"):
        quire.rms_norm(np.zeros(4, [("a", "f4")]), weight, out=weight.copy())
    with pytest.raises(TypeError, match=r"x: expected a tensor that DLPack can describe"):
        quire.rms_norm(np.zeros(4, np_dtype("float8_e4m3b11fnuz")), weight, out=weight.copy())
    # A broadcast input is no problem, a broadcast output is.
    x = np.broadcast_to(np.float16(2.0), (3, 4))
    with pytest.raises(ValueError, match="expected stride 1"):
        quire.rms_norm(x, weight, out=np.zeros((3, 4), np.float16))
    rows = np.broadcast_to(np.full(4, 2.0, np.float16), (3, 4))
    np.testing.assert_allclose(quire.rms_norm(rows, weight), 1.0, rtol=1e-3)
    wide = np.lib.stride_tricks.as_strided(np.zeros(64, np.float32), (2,) * 9, (0,) * 8 + (4,))
    with pytest.raises(ValueError, match="expected a rank of at most 8, got 9"):
        quire.copy_blocks(wide, np.zeros((1, 2), np.int32))


@pytest.mark.parametrize("stride", [0, -4, 12, 2**62, -(2**62)])
def test_strides_that_nothing_steps_along(stride):
    """Those of extents of 1, and all of a tensor without elements, may be anything."""
    as_strided = np.lib.stride_tricks.as_strided
    row = np.arange(1.0, 9.0, dtype=np.float32)
    x, weight = as_strided(row, (1, 1, 8), (stride, stride, 4)), np.ones(8, np.float32)
    out = as_strided(np.zeros(8, np.float32), (1, 1, 8), (stride, stride, 4))
    quire.rms_norm(x, weight, out=out)
    np.testing.assert_array_equal(out[0], quire.rms_norm(row[None], weight))
    cache = as_strided(np.zeros((4, 2, 8), np.float32), (4, 2, 1, 8), (64, 32, stride, 4))
    none = as_strided(row[:0], (0, 2, 1, 8), (stride, stride, stride, 4))
    slots, tables, lens = np.array([5]), np.array([[2]], np.int32), np.array([2], np.int32)
    quire.write_kv(x, x, cache, cache.copy(), slots)
    np.testing.assert_array_equal(cache[2, 1, 0], row)
    heads = as_strided(row, (1, 1, 8), (stride, stride, 4))
    want = quire.paged_attention(row.reshape(1, 1, 8), cache.copy(), cache.copy(), tables, lens)
    np.testing.assert_array_equal(quire.paged_attention(heads, cache, cache, tables, lens), want)
    assert not quire.paged_attention(heads, none, none, tables, lens * 0).any()


def sparse_rows(torch):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls them beta
        return torch.eye(4).to_sparse_csr()


def test_only_floats_with_complex_types_are_negated(torch):
    """What the importer asks of these alone: PyTorch makes no bfloat16 or float8 view of a negated tensor, and a copy is none."""
    negated = torch.randn(4, dtype=torch.complex64).conj().imag, torch._neg_view(torch.zeros(4))
    for x in negated:
        for dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2):
            assert not x.to(dtype).is_neg()
            with pytest.raises(RuntimeError):
                x.view(dtype)


def test_torch_refusals(torch):
    weight, out = torch.ones(4), torch.zeros(4)
    cases = [
        (torch.zeros(4, requires_grad=True), ValueError, r"requires_grad; call \.detach\(\) first"),
        (torch.nn.Parameter(torch.zeros(4)), ValueError, r"requires_grad; call \.detach\(\) first"),
        (
            torch.randn(4, dtype=torch.complex64).conj().imag,
            ValueError,
            r"lazily negated one; call \.resolve_neg\(\) first",
        ),
        (torch._neg_view(torch.zeros(4)), ValueError, r"lazily negated one"),
        (torch.randn(4, dtype=torch.complex64).conj(), TypeError, r"got complex64"),
        (
            torch.zeros(4).to_sparse(),
            TypeError,
            r"sparse one \(torch.sparse_coo\); call \.to_dense\(\) first",
        ),
        (sparse_rows(torch), TypeError, r"sparse one \(torch.sparse_csr\); call \.to_dense\(\) first"),
        (torch.empty(4, device="meta"), TypeError, r"got a meta tensor; materialize it first"),
        (torch.zeros(4, dtype=torch.float64), TypeError, r"got float64"),
    ]
    for x, error, text in cases:
        for arguments in ({"x": x, "weight": weight, "out": out}, {"x": weight, "weight": weight, "out": x}):
            with pytest.raises(error, match=text):
                quire.rms_norm(**arguments)
    assert bool((out == 0).all())


def test_torch_quantized_and_fake(torch):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = torch.quantize_per_tensor(torch.zeros(4), 0.1, 0, torch.qint8)
    with pytest.raises(TypeError, match=r"got a torch quantized one; call \.dequantize\(\)"):
        quire.rms_norm(quantized, torch.ones(4), out=torch.zeros(4))
    with FakeTensorMode():
        fake = torch.zeros(4)
    with pytest.raises((TypeError, ValueError), match=r"\[rms_norm\] x: expected a tensor"):
        quire.rms_norm(fake, torch.ones(4), out=torch.zeros(4))


def test_torch_inference_mode_and_parameters(torch):
    with torch.inference_mode():
        x = torch.randn(2, 8)
        assert quire.rms_norm(x, torch.ones(8)).shape == (2, 8)
    with torch.no_grad():
        assert quire.rms_norm(torch.randn(2, 8), torch.nn.Parameter(torch.ones(8))).shape == (2, 8)
    parameter = torch.nn.Parameter(torch.ones(8), requires_grad=False)
    assert quire.rms_norm(torch.randn(2, 8), parameter).shape == (2, 8)


def test_torch_subclass_with_a_requires_grad_of_its_own(torch):
    class Own(torch.Tensor):
        @property
        def requires_grad(self):
            return True

    x = torch.randn(2, 8).as_subclass(Own)
    with torch.no_grad():
        assert quire.rms_norm(x, torch.ones(8), out=torch.empty(2, 8)).shape == (2, 8)
    with torch.enable_grad(), pytest.raises(ValueError, match="got one with requires_grad"):
        quire.rms_norm(x, torch.ones(8), out=torch.empty(2, 8))


def test_cupy_arrays_by_their_attributes():
    """A dtype's first array comes through DLPack, later ones by their attributes; nothing may tell the two apart."""
    framework = frameworks.make("cupy", "cuda:0")
    if isinstance(framework, str):
        pytest.skip(f"cupy on cuda:0: {framework}")
    cupy = framework.cupy
    rng = np.random.default_rng(0)
    for dtype in ("float32", "float16", "bfloat16"):
        host = rng.standard_normal((4, 6, 64)).astype(np.float32).astype(np_dtype(dtype))
        base, weight = framework.array(host), framework.array(np.ones(32, np_dtype(dtype)))
        for view in (
            lambda x: x[..., :32],
            lambda x: x[::-1, ::2, 16:48],
            lambda x: x.transpose(1, 0, 2)[1:, :, 32:],
            lambda x: x[3, 5, 1:33],
            lambda x: x[:, :0, :32],
        ):
            want = quire.rms_norm(np.ascontiguousarray(view(host)), np.ones(32, np_dtype(dtype)))
            for _ in range(2):
                got = framework.numpy(quire.rms_norm(view(base), weight))
                np.testing.assert_allclose(
                    got.astype(np.float32), want.astype(np.float32), rtol=2e-2, atol=1e-6
                )
                with pytest.raises(ValueError, match=r"\[rms_norm\] x: expected stride 1"):
                    quire.rms_norm(base[..., ::2], weight)
        out = cupy.zeros((4, 3), dtype=base.dtype).T
        with pytest.raises(ValueError, match=r"\[rms_norm\] out: "):
            quire.rms_norm(base[0, :3, :4], weight[:4], out=out)
    pairs = cupy.asarray(np.array([[3, 0]], np.int64))
    for dtype in ("int8", "uint8", "int32", "int64", "bool"):
        for _ in range(2):
            cache = cupy.arange(12).reshape(4, 3).astype(dtype)
            want = cache.copy()
            want[0] = cache[3]
            quire.copy_blocks(cache, pairs)
            assert bool((cache == want).all())
    for dtype in ("float64", "complex64", "int16"):
        for _ in range(2):
            with pytest.raises(TypeError, match=r"\[copy_blocks\] cache: expected "):
                quire.copy_blocks(cupy.zeros((4, 3), dtype), pairs)


def test_not_a_tensor():
    for thing in (None, 3, [1.0, 2.0], "text", object(), np.float32(1.0)):
        with pytest.raises(TypeError, match=r"\[rms_norm\] x: expected a tensor"):
            quire.rms_norm(thing, np.ones(2, np.float32), out=np.ones(2, np.float32))
        with pytest.raises(TypeError, match=r"\[rms_norm\] x: expected a tensor"):
            quire.rms_norm(thing, np.ones(2, np.float32))
        with pytest.raises(TypeError, match=r"\[silu_and_mul\] x: expected a tensor"):
            quire.silu_and_mul(thing)
        with pytest.raises(TypeError, match=r"\[attention\] q: expected a tensor"):
            quire.attention(thing, np.ones(2, np.float32), np.ones(2, np.float32))


class Producer:
    """A hand-made producer around a NumPy array, to misbehave in chosen ways."""

    def __init__(self, array, *, device=(1, 0), fail=None, old=False):
        self.array, self.device, self.fail, self.old, self.calls = array, device, fail, old, []

    def __dlpack_device__(self):
        return self.device

    def __dlpack__(self, **kwargs):
        self.calls.append(kwargs)
        if self.fail is not None:
            raise self.fail
        if self.old:
            if kwargs:
                raise TypeError("unexpected keyword")
            return self.array.__dlpack__()
        return self.array.__dlpack__(**kwargs)


def test_any_producer():
    x = np.array([[3.0, 4.0]], np.float32)
    producer = Producer(x)
    out = np.zeros_like(x)
    quire.rms_norm(producer, np.ones(2, np.float32), out=out)
    np.testing.assert_allclose(out, [[0.8485, 1.1314]], atol=1e-4)
    assert producer.calls == [{"max_version": (1, 3)}]
    quire.rms_norm(Producer(x, old=True), np.ones(2, np.float32), out=out)
    np.testing.assert_allclose(out, [[0.8485, 1.1314]], atol=1e-4)


def test_misbehaving_producers():
    x, out = np.ones((1, 2), np.float32), np.zeros((1, 2), np.float32)
    weight = np.ones(2, np.float32)
    with pytest.raises(
        TypeError, match=r"x: expected a tensor that DLPack can describe, got .*Producer \(BufferError: no\)"
    ):
        quire.rms_norm(Producer(x, fail=BufferError("no")), weight, out=out)
    if not quire.has_cuda():
        with pytest.raises(
            quire.UnsupportedError, match=r"device: expected cpu, got cuda: this build .* no CUDA kernels"
        ):
            quire.rms_norm(Producer(x, device=(2, 0)), weight, out=out)
    with pytest.raises(
        quire.UnsupportedError, match=r"x: expected a tensor on cpu or cuda, got one on DLPack device type 10"
    ):
        quire.rms_norm(Producer(x, device=(10, 0)), weight, out=out)

    if quire.has_cuda():
        with pytest.raises(ValueError, match=r"x: expected a CUDA device's index of 0 or more, got -1"):
            quire.rms_norm(Producer(x, device=(2, -1)), weight, out=out)

    class WrongCapsule(Producer):
        def __dlpack__(self, **kwargs):
            return object()

    with pytest.raises(TypeError, match=r"x: expected a DLPack capsule from __dlpack__, got object"):
        quire.rms_norm(WrongCapsule(x), weight, out=out)

    class WrongDevice(Producer):
        def __dlpack_device__(self):
            return "cpu"

    with pytest.raises(TypeError, match=r"x: expected a tensor with __dlpack_device__"):
        quire.rms_norm(WrongDevice(x), weight, out=out)
    assert (out == 0).all()


def test_uninitialized_tensor():
    hollow = quire.Tensor.__new__(quire.Tensor)
    with pytest.raises(
        TypeError, match=r"x: expected a tensor, got a quire.Tensor that was never initialized"
    ):
        quire.rms_norm(hollow, np.ones(2, np.float32), out=np.ones(2, np.float32))


def test_interrupts_are_not_swallowed():
    x = np.ones((1, 2), np.float32)
    for error in (KeyboardInterrupt, SystemExit):
        with pytest.raises(error):
            quire.rms_norm(Producer(x, fail=error()), np.ones(2, np.float32), out=x.copy())


def test_no_reference_is_kept():
    """Inputs are released when the call is over, on success and on failure alike."""

    class Array(np.ndarray):
        pass

    for weight in (np.ones(8, np.float32), np.ones(7, np.float32)):
        x = np.zeros((1, 8), np.float32).view(Array)
        alive = weakref.ref(x)
        count = sys.getrefcount(weight)
        for _ in range(100):
            try:
                quire.rms_norm(x, weight, out=np.zeros((1, 8), np.float32))
            except ValueError:
                assert weight.shape == (7,)
        assert sys.getrefcount(weight) == count
        del x
        gc.collect()
        assert alive() is None


def test_capsules_of_quire_tensors():
    tensor = quire.empty((2, 3), "float32", "cpu")
    assert tensor.__dlpack_device__() == (1, 0)
    for kwargs in (
        {},
        {"max_version": (1, 3)},
        {"max_version": None, "stream": None},
        {"dl_device": (1, 0), "copy": False},
    ):
        capsule = tensor.__dlpack__(**kwargs)
        assert ("dltensor_versioned" in repr(capsule)) == (kwargs.get("max_version") is not None)
    for kwargs in ({"stream": 1}, {"copy": True}, {"dl_device": (2, 0)}):
        with pytest.raises(BufferError, match=r"\[Tensor\.__dlpack__\]"):
            tensor.__dlpack__(**kwargs)
    assert tensor[1].shape == (3,)
    assert tensor[-1, 2].shape == ()
    for index in (2, -3, (0, 3), (0, 0, 0)):
        with pytest.raises(IndexError):
            tensor[index]


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((3, "float32", "cpu"), TypeError, r"\[empty\] shape: expected a sequence of integers, got 3"),
        (((2.5,), "float32", "cpu"), TypeError, r"shape: expected an integer, got float"),
        (((-1,), "float32", "cpu"), ValueError, r"shape: expected extents of 0 or more, got -1"),
        (((1,) * 9, "float32", "cpu"), ValueError, r"shape: expected a rank of at most 8, got 9"),
        (((2**40, 2**40), "float32", "cpu"), ValueError, r"shape: expected a size that fits in 64 bits"),
        (((2**50,), "float32", "cpu"), MemoryError, r"could not get 4503599627370496 bytes"),
        (((1,), "float128", "cpu"), TypeError, r"dtype: expected float32, .*, got float128"),
        (((1,), "float32", "cuda:x"), ValueError, r"device: expected"),
    ],
)
def test_empty_refuses(arguments, error, text):
    with pytest.raises(error, match=text):
        quire.empty(*arguments)


def test_two_devices_are_refused(torch):
    if not frameworks.has_gpu() or not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    with pytest.raises(ValueError, match=r"\[rms_norm\] weight: expected cuda:0 like x, got cpu"):
        quire.rms_norm(torch.zeros(2, 8, device="cuda"), torch.ones(8))


def test_import_needs_no_framework():
    code = (
        "import sys, quire; bad = {'torch', 'jax', 'cupy', 'ml_dtypes'} & set(sys.modules); assert not bad, bad; "
        "import numpy as np; quire.rms_norm(np.ones((1, 8), np.float32), np.ones(8, np.float32))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_call_overhead(torch):
    """Generous bounds that hold on a busy machine; `quire bench border` prints the figures."""
    arrays = [np.zeros((4, 8), np.float32) for _ in range(6)]
    tensors = [torch.zeros(4, 8) for _ in range(6)]
    x, weight, out = np.ones((1, 64), np.float32), np.ones(64, np.float32), np.ones((1, 64), np.float32)

    def best(function):
        return min(timeit.repeat(function, number=2000, repeat=9)) / 2000

    assert best(lambda: _core.import_tensors(*arrays)) < 10e-6
    assert best(lambda: _core.import_tensors(*tensors)) < 10e-6
    assert best(lambda: quire.rms_norm(x, weight, out=out)) < 20e-6


# ---- what out=None is made like ----------------------------------------------------------------------------------------


def test_subclasses_of_ndarray(tmp_path):
    weight = np.ones(8, np.float32)
    x = np.memmap(tmp_path / "x", np.float32, "w+", shape=(2, 8))
    x[...] = 2.0
    for given in (x, x.view(np.recarray)):
        out = quire.rms_norm(given, weight)
        assert type(out) is np.ndarray
        np.testing.assert_allclose(out, 1.0, rtol=1e-5)
    masked = np.ma.masked_array(np.ones((2, 8), np.float32), mask=True)
    for out in (None, np.empty((2, 8), np.float32)):
        with pytest.raises(
            TypeError, match=r"\[rms_norm\] x: expected a tensor without a mask, got (numpy.ma.)?MaskedArray"
        ):
            quire.rms_norm(masked, weight, out=out)


def test_jax_refusals():
    jax = pytest.importorskip("jax", reason="jax is not installed")
    weight = jax.numpy.ones(8)
    with pytest.raises(TypeError, match=r"\[rms_norm\] x: .* got a tracer; .* use quire.jax.rms_norm"):
        jax.jit(lambda x: quire.rms_norm(x, weight))(jax.numpy.ones((2, 8)))
    gone = jax.numpy.ones((2, 8))
    gone.delete()
    with pytest.raises(ValueError, match=r"\[rms_norm\] x: expected a JAX array with data, got a deleted"):
        quire.rms_norm(gone, weight)


MANY_JAX_DEVICES = """
import jax, numpy as np, quire
first, second = jax.devices("cpu")
x = jax.device_put(np.full((2, 8), 2.0, np.float32), second)
out = quire.rms_norm(x, jax.device_put(np.ones(8, np.float32), second))
assert out.device == second, out.device
np.testing.assert_allclose(out, 1.0, rtol=1e-5)
table = quire.rope_cache(8, 4, like=x)
assert table.device == second, table.device
mesh = jax.sharding.Mesh(np.array([first, second]), ("x",))
sharded = jax.device_put(np.ones((2, 8), np.float32), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x")))
for call in (lambda: quire.rms_norm(sharded, np.ones(8, np.float32)), lambda: quire.rope_cache(8, 4, like=sharded)):
    try:
        call()
    except ValueError as error:
        assert "expected a JAX array on one device, got one sharded over 2" in str(error), error
    else:
        raise AssertionError("a sharded array was taken")
"""


def test_jax_with_many_devices():
    pytest.importorskip("jax", reason="jax is not installed")
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_PLATFORMS": "cpu",
    }
    subprocess.run([sys.executable, "-c", MANY_JAX_DEVICES], check=True, env=environment, timeout=300)
