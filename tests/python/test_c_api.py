"""The C interface through ctypes, from the symbols of the extension; tests/cpp/c_consumer calls it from C.

SPDX-License-Identifier: Apache-2.0
"""

import ctypes
import importlib.util
import re
import shutil
import subprocess
import threading
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from op_cases import ops_of_families

import quire
from quire import _core

ROOT = Path(__file__).resolve().parents[2]
HEADER = ROOT / "include" / "quire" / "c_api.h"
LIB = ctypes.CDLL(_core.__file__)
LIB.quire_last_error.restype = LIB.quire_version.restype = ctypes.c_char_p
OK, VALUE, TYPE, INDEX, UNSUPPORTED = 0, 1, 2, 3, 4
D, I64 = ctypes.c_double, ctypes.c_int64


class Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32), ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)), ("strides", ctypes.POINTER(ctypes.c_int64)), ("byte_offset", ctypes.c_uint64),
    ]  # fmt: skip


class Options(ctypes.Structure):
    _fields_ = [
        ("struct_size", ctypes.c_size_t), ("scale", D), ("causal", ctypes.c_int32), ("validate", ctypes.c_int32),
        ("window_left", I64), ("window_right", I64), ("softcap", D),
        *[(name, ctypes.POINTER(Tensor)) for name in ("alibi_slopes", "sinks", "k_scale", "v_scale", "mask", "mask_start")],
        ("variant", ctypes.c_char_p), ("q_scale", ctypes.POINTER(Tensor)), ("batch_invariant", I64),
    ]  # fmt: skip

    def __init__(self, **values):
        super().__init__(ctypes.sizeof(Options), 0.0, 1, 0, -1, -1, 0.0)
        for name, value in values.items():
            setattr(self, name, value)


CODES = {"f": 2, "i": 0, "u": 1, "b": 6}
NAMED = {"bfloat16": 4, "float8_e4m3fn": 10, "float8_e5m2": 12}


def tensor(a, contiguous_strides=True):
    """A DLTensor of a NumPy array, which must outlive it."""
    strides = [s // a.itemsize for s in a.strides]
    return Tensor(
        a.ctypes.data, 1, 0, a.ndim, NAMED.get(a.dtype.name, CODES.get(a.dtype.kind)), 8 * a.itemsize, 1,
        (I64 * a.ndim)(*a.shape), (I64 * a.ndim)(*strides) if contiguous_strides else None, 0,
    )  # fmt: skip


def call(name, *args):
    """The status; arrays become tensors."""
    converted = [
        ctypes.byref(tensor(a)) if isinstance(a, np.ndarray) else D(a) if isinstance(a, float) else a
        for a in args
    ]
    return getattr(LIB, f"quire_{name}")(*converted)


def error():
    return LIB.quire_last_error().decode()


def normal(*shape):
    return np.random.default_rng(3).standard_normal(shape).astype(np.float32)


def test_every_declared_function_is_exported():
    if not HEADER.exists():
        pytest.skip("the source tree is not there")
    names = re.findall(r"\b(quire_\w+)\(", re.sub(r"/\*.*?\*/", "", HEADER.read_text(), flags=re.DOTALL))
    assert len(names) > 35
    for name in names:
        assert hasattr(LIB, name), name
    # and every op is there
    of_c = {f"{stem}_{kind}": stem for stem in ("quantize", "dequantize") for kind in ("fp8", "int8")}
    assert {f"quire_{of_c.get(op, op)}" for op in ops_of_families()} - set(names) == set()


def test_versions():
    assert LIB.quire_version().decode() == quire.__version__
    assert LIB.quire_abi_version() == 1
    assert bool(LIB.quire_has_cuda()) == quire.has_cuda()
    assert LIB.quire_num_cuda_devices() == quire.num_cuda_devices()
    assert LIB.quire_num_threads() == quire.num_threads()


def test_norms_and_activations():
    x, w, out = normal(4, 64), normal(64), np.empty((4, 64), np.float32)
    assert call("rms_norm", out, x, w, 1e-6, 1.0, None) == OK
    np.testing.assert_array_equal(out, quire.rms_norm(x, w, weight_offset=1.0))
    assert call("layer_norm", out, x, w, None, 1e-5, None) == OK
    np.testing.assert_array_equal(out, quire.layer_norm(x, w))
    a, r = x.copy(), x * 2
    assert call("fused_add_rms_norm", a, r, w, 1e-6, 0.0, None) == OK
    expected = quire.fused_add_rms_norm(x.copy(), x * 2, w)
    np.testing.assert_array_equal(a, expected[0])
    np.testing.assert_array_equal(r, expected[1])
    q, scales = np.empty((4, 64), np.int8), np.empty((4, 2), np.float32)
    assert call("rms_norm_quantized", q, scales, x, w, 1e-6, 0.0, 2, I64(32), None) == OK
    expected = quire.rms_norm(x, w, out_dtype="int8", granularity="group", group_size=32)
    np.testing.assert_array_equal(q, expected[0])
    np.testing.assert_array_equal(scales, expected[1])
    assert call("layer_norm_quantized", q, scales[:, :1].copy(), x, w, w, 1e-5, 1, I64(0), None) == OK
    np.testing.assert_array_equal(q, quire.layer_norm(x, w, w, out_dtype="int8", granularity="token")[0])
    assert (
        call(
            "fused_add_rms_norm_quantized",
            q,
            np.array([0.05], np.float32),
            x * 2,
            x,
            w,
            1e-6,
            0.0,
            0,
            I64(0),
            None,
        )
        == OK
    )
    given = {"out_dtype": "int8", "scale": np.array([0.05], np.float32)}
    np.testing.assert_array_equal(q, quire.fused_add_rms_norm(x, x * 2, w, **given)[0])
    half, q_half = np.empty((4, 32), np.float32), np.empty((4, 32), np.int8)
    for name in ("silu_and_mul", "gelu_and_mul", "gelu_tanh_and_mul"):
        assert call(name, half, x, None) == OK
        np.testing.assert_array_equal(half, getattr(quire, name)(x))
        assert call(f"{name}_quantized", q_half, scales[:, :1].copy(), x, 1, I64(0), None) == OK
        np.testing.assert_array_equal(
            q_half, getattr(quire, name)(x, out_dtype="int8", granularity="token")[0]
        )
    for name in ("gelu_new", "gelu_fast", "gelu_quick", "relu_squared"):
        assert call(name, out, x, None) == OK
        np.testing.assert_array_equal(out, getattr(quire, name)(x))


def test_kv_and_position_encoding():
    k_cache, v_cache = (
        np.zeros((4, 8, 2, 16), ml_dtypes.bfloat16),
        np.zeros((4, 8, 2, 16), ml_dtypes.bfloat16),
    )
    q, k, v, table = normal(3, 4, 16), normal(3, 2, 16), normal(3, 2, 16), quire.rope_cache(16, 32)
    positions, slots = np.array([4, 5, 6]), np.array([1, 9, -1], np.int64)
    expected = [a.copy() for a in (q, k_cache, v_cache)]
    quire.rope_and_write_kv(positions, expected[0], k, v, table, *expected[1:], slots)
    assert (
        call(
            "rope_and_write_kv",
            positions,
            q,
            k,
            v,
            table,
            k_cache,
            v_cache,
            slots,
            *[None] * 5,
            1e-6,
            0.0,
            0,
            None,
        )
        == OK
    )
    for a, b in zip((q, k_cache, v_cache), expected):
        np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8))
    assert call("copy_blocks", k_cache, np.array([[0, 3]]), None) == OK
    np.testing.assert_array_equal(k_cache[3].view(np.uint16), k_cache[0].view(np.uint16))
    assert call("swap_blocks", v_cache, k_cache, np.array([[0, 2]]), None) == OK
    np.testing.assert_array_equal(v_cache[2].view(np.uint16), k_cache[0].view(np.uint16))
    assert call("write_kv", k_cache, v_cache, k, v, slots, None, None, None) == OK
    got = np.empty_like(k), np.empty_like(v)
    assert call("gather_kv", *got, k_cache, v_cache, slots, None, None, None) == OK
    np.testing.assert_array_equal(got[0][:2], k[:2].astype(ml_dtypes.bfloat16).astype(np.float32))
    a, b = q.copy(), q.copy()
    assert call("rotary_embedding", positions, a, None, table, 1, None) == OK
    np.testing.assert_array_equal(a, quire.rotary_embedding(positions, b, None, table, style="gptj")[0])
    assert (
        call("qk_norm_rope", positions, a, k, table[0].copy(), table[1].copy(), table, 1e-6, 0.0, 0, None)
        == OK
    )


def test_attention():
    q, cache, out, lse = (
        normal(3, 4, 16),
        normal(4, 8, 2, 16),
        np.empty((3, 4, 16), np.float32),
        np.empty((3, 4), np.float32),
    )
    tables, lens, loc = (
        np.array([[0, 1], [2, 3]], np.int32),
        np.array([9, 12], np.int32),
        np.array([0, 1, 3], np.int32),
    )
    sinks, k_scale = normal(4), np.array([0.5], np.float32)
    stored = (cache * 10).astype(np.int8)
    options = Options(
        scale=0.3,
        window_left=4,
        softcap=9.0,
        sinks=ctypes.pointer(tensor(sinks)),
        k_scale=ctypes.pointer(tensor(k_scale)),
    )
    given = {"scale": 0.3, "window": 4, "softcap": 9.0, "sinks": sinks, "k_scale": k_scale}
    args = out, lse, q, stored, stored, tables, lens, loc, None, ctypes.byref(options), None
    assert call("paged_attention", *args) == OK, error()
    expected = quire.paged_attention(
        q, stored, stored, tables, lens, query_start_loc=loc, return_lse=True, **given
    )
    np.testing.assert_array_equal(out, expected[0])
    np.testing.assert_array_equal(lse, expected[1])
    # options of a caller that knows no more than the first fields
    options.struct_size = Options.variant.offset
    options.variant = b"never read"
    assert call("paged_attention", *args) == OK, error()
    prefix = np.array([3], np.int32)
    assert (
        call(
            "shared_prefix_attention", out, None, q, cache, cache, prefix, tables, lens, loc, None, None, None
        )
        == OK
    )
    np.testing.assert_array_equal(
        out, quire.shared_prefix_attention(q, cache, cache, prefix, tables, lens, query_start_loc=loc)
    )
    k = normal(3, 2, 16)
    assert call("attention", out, lse, q, k, k, None, None, None, None, None) == OK
    np.testing.assert_array_equal(out, quire.attention(q, k, k))
    merged = np.empty_like(out)
    assert call("merge_attention", merged, None, out, lse, q, lse, None) == OK
    np.testing.assert_array_equal(merged, quire.merge_attention(out, lse, q, lse)[0])
    size = I64(-1)
    for name in ("paged_attention", "shared_prefix_attention", "attention"):
        assert call(f"{name}_workspace_size", *map(I64, (3, 2, 4, 16)), 1, 0, ctypes.byref(size)) == OK
        assert size.value == 0


def test_attention_of_float8_queries():
    q, cache = (normal(*s).astype(ml_dtypes.float8_e4m3fn) for s in ((3, 4, 16), (4, 8, 2, 16)))
    tables, lens = np.array([[0, 1], [2, 3], [1, 0]], np.int32), np.array([9, 12, 16], np.int32)
    scale = np.array([0.5, 3.0], np.float32)
    out = np.empty(q.shape, ml_dtypes.bfloat16)
    options = Options(q_scale=ctypes.pointer(tensor(scale)))
    args = out, None, q, cache, cache, tables, lens, None, None, ctypes.byref(options), None
    assert call("paged_attention", *args) == OK, error()
    expected = quire.paged_attention(q, cache, cache, tables, lens, q_scale=scale)
    np.testing.assert_array_equal(out.view(np.uint16), expected.view(np.uint16))
    half = np.empty(q.shape, np.float16)
    assert call("paged_attention", half, *args[1:]) == OK, error()
    np.testing.assert_array_equal(
        half, quire.paged_attention(q, cache, cache, tables, lens, q_scale=scale, out=np.empty_like(half))
    )
    prefix = np.array([3], np.int32)
    assert call("shared_prefix_attention", *args[:5], prefix, *args[5:]) == OK, error()
    expected = quire.shared_prefix_attention(q, cache, cache, prefix, tables, lens, q_scale=scale)
    np.testing.assert_array_equal(out.view(np.uint16), expected.view(np.uint16))
    k = cache[0, :3].copy()
    assert call("attention", out, None, q, k, k, None, None, None, args[-2], None) == OK, error()
    expected = quire.attention(q, k, k, q_scale=scale)
    np.testing.assert_array_equal(out.view(np.uint16), expected.view(np.uint16))
    # of a caller that does not know the field
    options.struct_size = Options.q_scale.offset
    assert call("attention", out, None, q, k, k, None, None, None, args[-2], None) == OK, error()
    assert not np.array_equal(out.view(np.uint16), expected.view(np.uint16))
    np.testing.assert_array_equal(out.view(np.uint16), quire.attention(q, k, k).view(np.uint16))


def test_batch_invariant_attention():
    """A sequence's row has the same bits alone and among three, as the option says, and others than without it."""
    q, cache = normal(3, 4, 16), normal(960, 16, 2, 16)
    tables = np.random.default_rng(4).permutation(960)[: 3 * 313].reshape(3, 313).astype(np.int32)
    lens = np.array([5000, 4999, 2100], np.int32)
    options = ctypes.byref(Options(batch_invariant=1))
    out, alone = np.empty_like(q), np.empty_like(q[:1])
    assert call("paged_attention", out, None, q, cache, cache, tables, lens, None, None, options, None) == OK
    np.testing.assert_array_equal(
        out, quire.paged_attention(q, cache, cache, tables, lens, batch_invariant=True)
    )
    assert not np.array_equal(out, quire.paged_attention(q, cache, cache, tables, lens))
    for i in range(3):
        own = q[[i]], cache, cache, tables[[i]], lens[[i]]
        assert call("paged_attention", alone, None, *own, None, None, options, None) == OK
        np.testing.assert_array_equal(alone[0], out[i])
    k = normal(5000, 2, 16)
    loc, kv_loc = np.array([0, 3], np.int32), np.array([0, 5000], np.int32)
    assert call("attention", out, None, q, k, k, loc, kv_loc, None, options, None) == OK, error()
    given = {"query_start_loc": loc, "kv_start_loc": kv_loc}
    np.testing.assert_array_equal(out, quire.attention(q, k, k, **given, batch_invariant=True))
    assert not np.array_equal(out, quire.attention(q, k, k, **given))
    # it shares the pass over the prefix, so that it cannot be
    prefix = np.array([3], np.int32)
    args = out, None, q, cache, cache, prefix, tables, lens, None, None, options, None
    assert call("shared_prefix_attention", *args) == UNSUPPORTED
    assert "batch_invariant" in error()


def test_statuses():
    x, w, out = normal(4, 64), normal(64), np.empty((4, 64), np.float32)
    assert call("rms_norm", out, x.astype(np.int32), w, 1e-6, 0.0, None) == TYPE
    assert error() == "[rms_norm] x: expected float32, float16 or bfloat16, got int32 [4, 64]"
    assert call("rms_norm", out, x.astype(np.float64), w, 1e-6, 0.0, None) == TYPE
    assert "DLPack type code 2, 64 bits" in error()
    assert call("rms_norm", out, x, w[1:].copy(), 1e-6, 0.0, None) == VALUE
    assert error() == "[rms_norm] weight: expected float32 [64], got float32 [63]"
    assert call("rms_norm", None, x, w, 1e-6, 0.0, None) == VALUE
    assert error() == "[rms_norm] out: expected a tensor, got null"
    assert call("rms_norm_quantized", out, x, x, w, 1e-6, 0.0, 3, I64(1), None) == VALUE
    assert "granularity" in error()
    assert (
        call("rotary_embedding", np.zeros(1, np.int64), normal(1, 1, 8), None, normal(4, 8), 2, None) == VALUE
    )
    assert "style" in error()
    nine = normal(2, 1, 9)
    assert call("attention", nine.copy(), None, nine, nine, nine, None, None, None, None, None) == UNSUPPORTED
    q = normal(2, 1, 8)
    for options, text in (
        (Options(validate=2), "validate"), (Options(struct_size=8), "struct_size"), (Options(variant=b"fast"), "variant"),
    ):  # fmt: skip
        assert (
            call("attention", q.copy(), None, q, q, q, None, None, None, ctypes.byref(options), None) == VALUE
        )
        assert text in error()
    assert (
        call(
            "attention",
            q.copy(),
            None,
            q,
            q,
            q,
            None,
            None,
            None,
            ctypes.byref(Options(variant=b"simt")),
            None,
        )
        == UNSUPPORTED
    )
    assert (
        call("attention_workspace_size", *map(I64, (3, 2, 4, 16)), 7, 0, ctypes.byref(I64())) == UNSUPPORTED
    )
    assert call("attention_workspace_size", *map(I64, (3, 2, 4, 16)), 1, 0, None) == VALUE
    if not quire.has_cuda():
        on_gpu = tensor(x)
        on_gpu.device_type = 2
        assert LIB.quire_gelu_new(ctypes.byref(tensor(out)), ctypes.byref(on_gpu), None) == UNSUPPORTED
    bad = tensor(x)
    for field, value in (("ndim", 9), ("ndim", -1), ("lanes", 2), ("shape", None)):
        bad = tensor(x)
        setattr(bad, field, value)
        assert LIB.quire_gelu_new(ctypes.byref(tensor(out)), ctypes.byref(bad), None) in (VALUE, TYPE), field


def test_index_error():
    cache, k = np.zeros((2, 4, 1, 8), np.float32), normal(1, 1, 8)
    assert call("write_kv", cache, cache.copy(), k, k, np.array([99]), None, None, None) == OK
    assert LIB.quire_check_errors(1, 0) == INDEX
    assert "slot_mapping" in error()
    assert LIB.quire_check_errors(1, 0) == OK
    q, tables, lens = normal(1, 1, 8), np.array([[5]], np.int32), np.array([3], np.int32)
    options = ctypes.byref(Options(validate=1))
    assert (
        call("paged_attention", q.copy(), None, q, cache, cache, tables, lens, None, None, options, None)
        == INDEX
    )


def test_last_error_is_of_the_thread():
    assert LIB.quire_set_num_threads(0) == VALUE
    mine, theirs = error(), []
    thread = threading.Thread(target=lambda: theirs.append(error()))
    thread.start()
    thread.join()
    assert mine != ""
    assert theirs == [""]


def test_null_strides_and_byte_offset():
    x, out = normal(4, 64), np.empty((4, 64), np.float32)
    a, b = tensor(out, False), tensor(x, False)
    a.data, a.byte_offset = a.data - 64, 64
    assert LIB.quire_gelu_new(ctypes.byref(a), ctypes.byref(b), None) == OK
    np.testing.assert_array_equal(out, quire.gelu_new(x))


@pytest.mark.slow
def test_layout_is_dlpacks(tmp_path):
    """Compiled as C and as C++, with and without dlpack.h before it."""
    tvm_ffi, compiler = importlib.util.find_spec("tvm_ffi"), shutil.which("cc")
    if not HEADER.exists() or tvm_ffi is None or compiler is None:
        pytest.skip("needs the source tree, a C compiler and dlpack.h from apache-tvm-ffi")
    include = Path(tvm_ffi.submodule_search_locations[0]) / "include"
    fields = "data device ndim dtype shape strides byte_offset"
    checks = ["#include <stddef.h>", '#include "quire/c_api.h"', "#include <dlpack/dlpack.h>"]
    checks += ['_Static_assert(sizeof(QuireTensor) == sizeof(DLTensor), "size");']
    checks += [
        f'_Static_assert(offsetof(QuireTensor, {f}) == offsetof(DLTensor, {f}), "{f}");'
        for f in fields.split()
    ]
    checks += [
        '_Static_assert(kDLCPU == 1 && kDLCUDA == 2 && kDLCUDAHost == 3 && kDLCUDAManaged == 13, "devices");'
    ]
    checks += [
        '_Static_assert(kDLInt == 0 && kDLUInt == 1 && kDLFloat == 2 && kDLBfloat == 4 && kDLBool == 6 && kDLFloat8_e4m3fn == 10 && '
        'kDLFloat8_e5m2 == 12, "codes");'
    ]  # fmt: skip
    (tmp_path / "layout.c").write_text("\n".join(checks) + "\n")
    same = '#include <dlpack/dlpack.h>\n#include "quire/c_api.h"\nint f(DLTensor* t) { return quire_gelu_new(t, t, NULL); }\n'
    for suffix in ("c", "cpp"):
        (tmp_path / f"same.{suffix}").write_text(same)
    for source in ("layout.c", "same.c", "same.cpp"):
        flags = ["-Wall", "-Wextra", "-Werror", "-fsyntax-only", "-I", ROOT / "include", "-isystem", include]
        result = subprocess.run(
            [compiler, *map(str, flags), str(tmp_path / source)], capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr


class Format(ctypes.Structure):
    _fields_ = [
        ("struct_size", ctypes.c_size_t), ("in_features", I64), ("out_features", I64), ("group_size", I64), ("num_rows", I64),
        ("bits", ctypes.c_int32), ("has_zeros", ctypes.c_int32), ("dtype_code", ctypes.c_uint8), ("dtype_bits", ctypes.c_uint8),
        ("dtype_lanes", ctypes.c_uint16),
    ]  # fmt: skip


class DataType(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16)]


def test_quantize_and_dequantize():
    x, q, scales = normal(4, 64), np.empty((4, 64), np.int8), np.empty((4, 2), np.float32)
    zeros, back = np.empty((4, 2), np.int32), np.empty((4, 64), np.float32)
    infinity = float("inf")
    assert call("quantize", q, scales, zeros, x, 2, I64(32), 1, infinity, None) == OK, error()
    given = {"granularity": "group", "group_size": 32}
    expected = quire.quantize_int8(x, symmetric=False, **given)
    for a, b in zip((q, scales, zeros), expected):
        np.testing.assert_array_equal(a, b)
    assert call("dequantize", back, q, scales, zeros, 2, I64(32), None) == OK, error()
    np.testing.assert_array_equal(back, quire.dequantize_int8(*expected, **given))
    fp8, one = np.empty((4, 64), ml_dtypes.float8_e4m3fn), np.array([0.5], np.float32)
    assert call("quantize", fp8, one, None, x, 0, I64(0), 0, infinity, None) == OK, error()
    np.testing.assert_array_equal(fp8.view(np.uint8), quire.quantize_fp8(x, scale=one)[0].view(np.uint8))
    assert call("dequantize_blocks", back, fp8, scales[:2].copy(), I64(2), I64(32), None) == OK, error()
    spread = np.repeat(np.repeat(scales[:2], 2, 0), 32, 1)
    np.testing.assert_array_equal(back, fp8.astype(np.float32) * spread)
    assert call("quantize", q, scales, None, x, 1, I64(0), 1, infinity, None) == VALUE
    assert error() == "[quantize_int8] scales: expected float32 [4, 1], got float32 [4, 2]"
    assert call("quantize", q, scales, None, x, 3, I64(0), 1, infinity, None) == VALUE
    assert "granularity" in error()


def test_packed_weight():
    """Quantized, packed, multiplied and undone as the constructor and the ops of Python do it."""
    w, x = normal(48, 64), normal(3, 64)
    codes, scales, zeros = (
        np.empty((48, 64), np.uint8),
        np.empty((48, 2), np.float32),
        np.empty((48, 2), np.uint8),
    )
    assert call("quantize_weight", codes, scales, zeros, w, 4, I64(32), None) == OK, error()
    format = Format(ctypes.sizeof(Format), 64, 48, 32, 64, 4, 1, 2, 32, 1)
    size = I64()
    assert call("packed_weight_size", ctypes.byref(format), 1, 0, ctypes.byref(size)) == OK, error()
    data = np.empty(size.value, np.uint8)
    pack = data, ctypes.byref(format), None, 4, codes, scales, zeros, None, None
    assert call("pack_weight", *pack) == OK, error()
    made = quire.PackedWeight.quantize(w, "w4a16", 32, symmetric=False)
    np.testing.assert_array_equal(data, made._data)
    dense, out, bias = np.empty_like(w), np.empty((3, 48), np.float32), normal(48)
    assert call("dequantize_weight", dense, data, ctypes.byref(format), None, None) == OK, error()
    np.testing.assert_array_equal(dense, made.dequantize())
    multiply = out, x, data, ctypes.byref(format), None, bias, None, 1, None
    assert call("quantized_matmul", *multiply) == OK, error()
    np.testing.assert_array_equal(out, quire.quantized_matmul(x, made, bias=bias, batch_invariant=True))
    f32 = DataType(2, 32, 1)
    sized = I64(3), ctypes.byref(format), 0, f32, 1, 1, 0, ctypes.byref(size)
    assert call("quantized_matmul_workspace_size", *sized) == OK, error()
    assert size.value == 0
    # refusals
    assert call("pack_weight", *pack[:3], 5, *pack[4:]) == VALUE
    assert "encoding" in error()
    assert call("pack_weight", *pack[:6], None, *pack[7:]) == VALUE
    assert error() == "[pack_weight] zeros: expected a tensor, got none"
    for field, value, status in (
        ("struct_size", 8, VALUE),
        ("bits", 5, UNSUPPORTED),
        ("dtype_code", 9, TYPE),
        ("num_rows", 63, VALUE),
    ):
        bad = Format(ctypes.sizeof(Format), 64, 48, 32, 64, 4, 1, 2, 32, 1)
        setattr(bad, field, value)
        assert (
            call("quantized_matmul", out, x, data, ctypes.byref(bad), None, None, None, 0, None) == status
        ), field
    assert call("quantized_matmul", out, x, data, None, None, None, None, 0, None) == VALUE
    assert error() == "[quantized_matmul] format: expected a QuireWeightFormat, got null"


def test_scaled_matmul():
    rng = np.random.default_rng(4)
    a, b = rng.integers(-128, 128, (5, 64)).astype(np.int8), rng.integers(-128, 128, (16, 64)).astype(np.int8)
    scale_a, one, zero = abs(normal(5, 1)), np.ones(1, np.float32), np.array([7], np.int32)
    sums, out = np.empty(16, np.int32), np.empty((5, 16), np.float32)
    assert call("column_sums", sums, b, None) == OK, error()
    np.testing.assert_array_equal(sums, b.sum(1, dtype=np.int32))
    assert call("scaled_matmul", out, a, b, scale_a, one, zero, sums, None, None, 0, None) == OK, error()
    expected = quire.scaled_matmul(a, b, scale_a, one, zero_point=zero, out_dtype="float32")
    np.testing.assert_array_equal(out, expected)
    size, int8 = I64(), DataType(0, 8, 1)
    sized = *map(I64, (5, 16, 64)), int8, 0, 1, 0, 1, 0, ctypes.byref(size)
    assert call("scaled_matmul_workspace_size", *sized) == OK, error()
    workspace = np.empty(size.value + 16, np.uint8)
    workspace = workspace[-workspace.ctypes.data % 16 :][: size.value]
    out[:] = 0
    assert call("scaled_matmul", out, a, b, scale_a, one, zero, None, None, workspace, 0, None) == OK, error()
    np.testing.assert_array_equal(out, expected)
    assert call("scaled_matmul", out, a, b, scale_a, one, zero, None, None, None, 0, None) == VALUE
    assert error() == f"[scaled_matmul] workspace: expected uint8 [{size.value}] or longer, got none"
