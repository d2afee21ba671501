"""quire.jax: every op as an XLA FFI call, on the CPU and, where there is one, on the GPU; and the ABI that the handlers follow.

SPDX-License-Identifier: Apache-2.0
"""

import ctypes
import functools
import inspect
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import frameworks
import numpy as np
import pytest
from op_cases import (
    BF16,
    CASES,
    IDS,
    LENS,
    LOC,
    TABLES,
    WITHOUT_CASES,
    expected_of,
    flat,
    k,
    k_cache,
    normal,
    ops_of_families,
    packed_weights,
    q,
    split_options,
    v,
    v_cache,
)

import quire
from quire import _core

jax = pytest.importorskip("jax")
import jax.numpy as jnp

import quire.jax

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    framework = frameworks.make("jax", "cpu" if request.param == "cpu" else "cuda:0")
    if isinstance(framework, str):
        pytest.skip(f"jax on {request.param}: {framework}")
    with jax.default_device(framework.jax_device):
        yield request.param


def compare(device, got, expected):
    got, expected = flat(got), flat(expected)
    assert len(got) == len(expected)
    for a, b in zip(got, expected):
        if b is None:
            assert a is None
            continue
        b = np.asarray(b)
        assert (str(a.dtype), a.shape) == (b.dtype.name, b.shape)
        a = np.asarray(a)
        if device == "cpu":  # the same kernel
            np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8))
        else:
            a, b = frameworks.as_float64(a), frameworks.as_float64(b)
            np.testing.assert_allclose(
                a, b, rtol=0.13, atol=2e-2 * max(1.0, np.abs(b[np.isfinite(b)]).max(initial=0))
            )


@pytest.mark.parametrize(("op", "arrays", "options"), CASES, ids=IDS)
def test_under_jit(device, op, arrays, options):
    operands, static = split_options(options)
    function = jax.jit(lambda arrays, operands: getattr(quire.jax, op)(*arrays, **operands, **static))
    inputs = jax.tree.map(jnp.asarray, (arrays, operands))
    compare(device, function(*inputs), expected_of(op, arrays, options))
    # What was passed is as it was.
    for a, b in zip(jax.tree.leaves(inputs), jax.tree.leaves((arrays, operands))):
        np.testing.assert_array_equal(np.asarray(a).view(np.uint8), b.view(np.uint8))


@pytest.mark.parametrize(("op", "arrays", "options"), CASES, ids=IDS)
def test_eager(device, op, arrays, options):
    operands, static = split_options(options)
    arrays_, operands = jax.tree.map(jnp.array, (arrays, operands))
    compare(device, getattr(quire.jax, op)(*arrays_, **operands, **static), expected_of(op, arrays, options))


@pytest.mark.parametrize(("op", "arrays", "options"), CASES, ids=IDS)
def test_scan(device, op, arrays, options):
    """In the body of a loop, on inputs that come from the loop."""
    operands, static = split_options(options)
    stacked = jax.tree.map(lambda a: jnp.stack([jnp.asarray(a)] * 2), (arrays, operands))

    def body(carry, inputs):
        return carry + 1, getattr(quire.jax, op)(*inputs[0], **inputs[1], **static)

    count, results = jax.jit(lambda s: jax.lax.scan(body, 0, s))(stacked)
    assert int(count) == 2
    for i in range(2):
        compare(device, jax.tree.map(lambda r, i=i: r[i], results), expected_of(op, arrays, options))


# ---- vmap ------------------------------------------------------------------------------------------------------------------

#: What all batch elements share, by operand or name.
SHARED = {
    "rms_norm": {1, "scale"},
    "fused_add_rms_norm": {2, "scale"},
    "layer_norm": {1, 2, "scale"},
    "silu_and_mul": {"scale"},
    "gelu_and_mul": {"scale"},
    "rotary_embedding": {3},
    "qk_norm_rope": {3, 4, 5},
    "write_kv": {"k_scale", "v_scale"},
    "rope_and_write_kv": {4, "q_weight", "k_weight"},
    "gather_kv": {"k_scale", "v_scale"},
    "paged_attention": {"alibi_slopes", "sinks", "q_scale", "k_scale", "v_scale"},
    "shared_prefix_attention": {1, 2, 3, "sinks", "q_scale", "k_scale", "v_scale"},
    "attention": {"q_scale", "v_scale"},
    "scaled_matmul": {1, 3, "bias", "column_sums"},
}


def batch_of(op, arrays, options, batch_caches):
    """Two batch elements that differ, the axes of jax.vmap, and the elements."""
    operands, static = split_options(options)
    shared = SHARED.get(op, set())
    caches = {"paged_attention": {1, 2}, "gather_kv": {0, 1}}.get(op, set())
    shared = shared if batch_caches else shared | caches

    def other(key, a):
        if a is None or key in shared:
            return a
        if op == "copy_blocks" and key == 1:
            return a[::-1].copy()
        if a.dtype.kind in "fV" or (a.dtype == np.int8 and key not in ("mask",)):
            return (a[::-1] if a.ndim > 1 else a).copy()
        if (op, key) in (("paged_attention", 3), ("shared_prefix_attention", 4)):
            return np.where(a >= 0, (a + 1) % 5, a).astype(a.dtype)
        if key in ("query_start_loc", "kv_start_loc"):
            return np.maximum(a - 1, 0).astype(a.dtype)  # the last token belongs to no sequence
        return (a[::-1] if a.ndim == 1 else a).copy()

    second = (
        [other(i, a) for i, a in enumerate(arrays)],
        {name: other(name, a) for name, a in operands.items()},
    )

    def axis(key, a):
        return None if a is None or key in shared else 0

    axes = [axis(i, a) for i, a in enumerate(arrays)], {name: axis(name, a) for name, a in operands.items()}
    stack = [
        a if a is None or ax is None else np.stack([a, b]) for a, b, ax in zip(arrays, second[0], axes[0])
    ]
    named = {n: a if axes[1][n] is None else np.stack([a, second[1][n]]) for n, a in operands.items()}
    return (stack, named), axes, [(arrays, operands), second], static


QUANTIZATION_CASES = [case for case in CASES if "quantize" in case[0] or case[0] == "scaled_matmul"]
#: Ops that only read caches take shared ones and a batch of them.
VMAP_CASES = [(*case, False) for case in CASES] + [
    (*case, True) for case in CASES if case[0] in ("paged_attention", "gather_kv")
]


@pytest.mark.parametrize(("op", "arrays", "options", "batch_caches"), VMAP_CASES)
def test_vmap(device, op, arrays, options, batch_caches):
    (stack, named), axes, elements, static = batch_of(op, arrays, options, batch_caches)
    function = jax.vmap(lambda a, o: getattr(quire.jax, op)(*a, **o, **static), in_axes=axes)
    got = jax.jit(function)(*jax.tree.map(jnp.asarray, (stack, named)))
    for i, (own, operands) in enumerate(elements):
        expected = expected_of(op, own, {**operands, **static})
        mine = [None if r is None else r[i] if r.ndim and r.shape[0] == 2 else r for r in flat(got)]
        loc = operands.get("query_start_loc")
        if loc is not None:  # rows of no sequence are undefined
            mine, expected = ([r[: loc[-1]] for r in rows] for rows in (mine, expected))
        compare(
            "cuda" if static.get("out_dtype") is None and device == "cpu" and "attention" in op else device,
            mine,
            expected,
        )


def test_vmap_in_vmap(device):
    x, weight = normal(2, 3, 4, 64), normal(64)
    got = jax.vmap(jax.vmap(lambda x: quire.jax.rms_norm(x, jnp.asarray(weight))))(jnp.asarray(x))
    compare(device, got, quire.rms_norm(x, weight))


@pytest.mark.parametrize(("op", "arrays", "options"), CASES, ids=IDS)
def test_vmap_of_an_empty_batch(device, op, arrays, options):
    """No element: results of the shapes and dtypes that one would have, with a batch of 0 before them."""
    (stack, named), axes, _, static = batch_of(op, arrays, options, False)

    def function(a, o):
        return getattr(quire.jax, op)(*a, **o, **static)

    def none(a, axis):
        return a if axis is None else a[:0]

    batch = (
        [none(a, axis) for a, axis in zip(stack, axes[0])],
        {n: none(a, axes[1][n]) for n, a in named.items()},
    )
    got = jax.jit(jax.vmap(function, in_axes=axes))(*jax.tree.map(jnp.asarray, batch))
    want = jax.eval_shape(function, *jax.tree.map(jnp.asarray, (arrays, split_options(options)[0])))
    assert [None if g is None else (g.shape, g.dtype) for g in flat(got)] == [
        None if w is None else ((0, *w.shape), w.dtype) for w in flat(want)
    ]


@pytest.mark.parametrize("axis", ["rows", "columns"])
@pytest.mark.parametrize(("op", "arrays", "options"), QUANTIZATION_CASES)
def test_vmap_of_no_rows_or_columns(device, op, arrays, options, axis):
    """Elements without rows or without columns give what each gives alone."""
    if (op, axis) == ("scaled_matmul", "columns"):
        pytest.skip("a product has features")

    def cut(a):
        if a is None or a.ndim < 2:
            return a
        if axis == "rows":
            return a[:0] if a.ndim == arrays[0].ndim else a
        return a[..., :0] if a.shape[-1] > 1 else a  # one scale of a row remains

    # The right operand of a product and its scales have rows of their own.
    keep = axis == "rows" and op == "scaled_matmul"
    arrays_ = [a if keep and i in (1, 3) else cut(a) for i, a in enumerate(arrays)]
    options = {n: cut(a) if isinstance(a, np.ndarray) else a for n, a in options.items()}
    (stack, named), axes, elements, static = batch_of(op, arrays_, options, False)
    function = jax.vmap(lambda a, o: getattr(quire.jax, op)(*a, **o, **static), in_axes=axes)
    got = flat(jax.jit(function)(*jax.tree.map(jnp.asarray, (stack, named))))
    for i, (own, operands) in enumerate(elements):
        mine = [None if r is None else r[i] for r in got]
        compare(device, mine, expected_of(op, own, {**operands, **static}))


@pytest.mark.parametrize("shape", [(3, 0, 64), (3, 4, 0)])
@pytest.mark.parametrize("granularity", ["token", "group", "tensor"])
def test_vmap_scales_of_nothing(device, shape, granularity):
    """They are ones, of the shapes that are documented."""
    x = jnp.zeros(shape)
    scales = {"tensor": (1,), "token": (shape[1], 1), "group": (shape[1], -(-shape[2] // 32))}[granularity]
    options = {"granularity": granularity, "group_size": 32}
    q, scale = jax.vmap(lambda x: quire.jax.quantize_fp8(x, **options))(x)
    assert q.shape == shape
    np.testing.assert_array_equal(scale, np.ones((3, *scales), np.float32))
    q, scale, zero = jax.vmap(lambda x: quire.jax.quantize_int8(x, symmetric=False, **options))(x)
    np.testing.assert_array_equal(scale, np.ones((3, *scales), np.float32))
    np.testing.assert_array_equal(zero, np.zeros((3, *scales), np.int32))
    back = jax.vmap(lambda q, s, z: quire.jax.dequantize_int8(q, s, z, **options))(q, scale, zero)
    assert back.shape == shape


@pytest.mark.parametrize(
    "bad", [[0, 3, 99, 9], [-1, 3, 4, 9], [0, 3, 4, 12], [0, 5, 4, 9], [0, -(2**31), 2**31 - 1, 9]]
)
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("op", ["paged_attention", "attention"])
def test_vmap_start_loc_out_of_range(device, op, bad, first):
    """It is recorded; its own element clamps it, as without vmap, and the others do not notice."""
    platform = "cpu" if device == "cpu" else "cuda:0"
    rest = (k_cache, v_cache, TABLES, LENS) if op == "paged_attention" else (k, v)
    keywords = {} if op == "paged_attention" else {"kv_start_loc": jnp.asarray(LOC)}

    def attend(q, loc):
        return getattr(quire.jax, op)(q, *map(jnp.asarray, rest), query_start_loc=loc, **keywords)

    good, wrong = jnp.asarray(LOC), jnp.asarray(np.array(bad, np.int32))
    alone = [np.asarray(attend(jnp.asarray(q), loc)) for loc in (good, wrong)]
    with pytest.raises(IndexError, match="query_start_loc"):
        quire.check_errors(platform)
    order = (wrong, good) if first else (good, wrong)
    got = np.asarray(jax.vmap(attend)(jnp.stack([jnp.asarray(q)] * 2), jnp.stack(order)))
    with pytest.raises(IndexError, match=rf"\[{op}\] query_start_loc: expected a value in range"):
        quire.check_errors(platform)
    np.testing.assert_array_equal(got[int(first)], alone[0])
    covered = np.abs(alone[1]).max((1, 2)) > 0  # what no sequence takes is not written without vmap
    ends = np.clip(bad, 0, 9)
    if ends[0] == 0 and (np.diff(ends) >= 0).all():
        np.testing.assert_array_equal(got[1 - int(first)][covered], alone[1][covered])


def test_vmap_bad_block_of_another_cache(device):
    """With a batch of caches, a block out of one cache's range does not reach the next one's."""
    caches = jnp.stack([jnp.zeros((2, 8, 1, 8)), jnp.full((2, 8, 1, 8), 7.0)])
    tables, lens = jnp.array([[[2]], [[1]]]), jnp.array([[4], [4]])
    out = jax.vmap(quire.jax.paged_attention)(jnp.ones((2, 1, 1, 8)), caches, caches, tables, lens)
    assert np.asarray(out)[:, 0, 0, 0].tolist() == [0.0, 7.0]
    with pytest.raises(IndexError, match="block_tables"):
        quire.check_errors()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: jax.vmap(quire.jax.rms_norm)(jnp.ones((2, 8)), jnp.ones((2, 8))), r"\[rms_norm\] weight: .*batched"),
        (
            lambda: jax.vmap(quire.jax.write_kv, in_axes=(0, 0, None, None, 0))(
                *[jnp.ones((2, 1, 1, 8))] * 2, *[jnp.ones((2, 4, 1, 8))] * 2, jnp.ones((2, 1), jnp.int32)
            ),
            r"\[write_kv\] k_cache: expected a batched cache",
        ),
        (
            lambda: jax.vmap(lambda q, s: quire.jax.attention(q, q, q, sinks=s))(jnp.ones((2, 3, 1, 8)), jnp.ones((2, 1))),
            r"\[attention\] sinks: .*batched",
        ),
        (
            lambda: jax.vmap(lambda q, s: quire.jax.attention(q, q, q, q_scale=s))(
                jnp.ones((2, 3, 1, 8), jnp.float8_e4m3fn), jnp.ones((2, 1))
            ),
            r"\[attention\] q_scale: .*batched",
        ),
        (
            lambda: jax.vmap(quire.jax.rotary_embedding, in_axes=(None, 0, None, 0))(
                jnp.zeros(1, jnp.int32), jnp.ones((2, 1, 1, 8)), None, jnp.ones((2, 4, 8))
            ),
            r"\[rotary_embedding\] cos_sin_cache: .*batched",
        ),
    ],
)  # fmt: skip
def test_vmap_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---- batch invariance ------------------------------------------------------------------------------------------------------

NUM_KEYS = 5000  # more than any kernel leaves in one piece


def bits(a):
    return np.asarray(a).view(np.uint8)


def long_cache():
    """Queries, and a cache with three sequences of many keys."""
    own = np.random.default_rng(5)
    q, *caches = (own.standard_normal(s).astype(np.float32) for s in ((3, 4, 32), *[(960, 16, 2, 32)] * 2))
    tables = own.permutation(960)[: 3 * 313].reshape(3, 313).astype(np.int32)
    return q, *caches, tables, np.array([NUM_KEYS, NUM_KEYS - 1, 2100], np.int32)


def test_batch_invariant_decode(device):
    q, k_cache, v_cache, tables, lens = long_cache()
    attend = jax.jit(functools.partial(quire.jax.paged_attention, batch_invariant=True, return_lse=True))
    out, lse = attend(*map(jnp.asarray, (q, k_cache, v_cache, tables, lens)))
    own = quire.paged_attention(q, k_cache, v_cache, tables, lens, batch_invariant=True, return_lse=True)
    compare(device, [out, lse], own)
    # ... which is another result than without it
    assert not np.array_equal(own[0], quire.paged_attention(q, k_cache, v_cache, tables, lens))
    alone = [attend(*map(jnp.asarray, (q[[i]], k_cache, v_cache, tables[[i]], lens[[i]]))) for i in range(3)]
    batched = jax.vmap(attend, in_axes=(0, None, None, 0, 0))(
        *map(jnp.asarray, (q[:, None], k_cache, v_cache, tables[:, None], lens[:, None]))
    )
    for i in range(3):
        np.testing.assert_array_equal(bits(alone[i][0][0]), bits(out[i]))
        np.testing.assert_array_equal(bits(alone[i][1][0]), bits(lse[i]))
        np.testing.assert_array_equal(bits(batched[0][i]), bits(alone[i][0]))
        np.testing.assert_array_equal(bits(batched[1][i]), bits(alone[i][1]))


def test_batch_invariant_ragged(device):
    own = np.random.default_rng(6)
    q = own.standard_normal((3, 2, 4, 32)).astype(np.float32)
    k, v = (own.standard_normal((3, NUM_KEYS, 2, 32)).astype(np.float32) for _ in "kv")
    loc, kv_loc = (np.arange(4, dtype=np.int32) * n for n in (2, NUM_KEYS))
    ragged = functools.partial(quire.jax.attention, batch_invariant=True)
    starts = {"query_start_loc": loc, "kv_start_loc": kv_loc}
    flat_qkv = [a.reshape(-1, *a.shape[2:]) for a in (q, k, v)]
    out = jax.jit(ragged)(*map(jnp.asarray, flat_qkv), **jax.tree.map(jnp.asarray, starts))
    expected = quire.attention(*flat_qkv, **starts, batch_invariant=True)
    compare(device, out, expected)
    assert not np.array_equal(expected, quire.attention(*flat_qkv, **starts))
    batched = jax.jit(jax.vmap(ragged))(*map(jnp.asarray, (q, k, v)))
    for i in range(3):
        first = {"query_start_loc": jnp.array([0, 2]), "kv_start_loc": jnp.array([0, NUM_KEYS])}
        alone = ragged(*(jnp.asarray(a[i]) for a in (q, k, v)), **first)
        np.testing.assert_array_equal(bits(alone), bits(out[2 * i : 2 * i + 2]))
        np.testing.assert_array_equal(bits(batched[i]), bits(alone))


# ---- in place --------------------------------------------------------------------------------------------------------------


def pointer(a):
    return a.unsafe_buffer_pointer()


def test_donated_cache_stays_where_it_is(device):
    new, k_cache, v_cache = jnp.ones((1, 2, 16)), jnp.zeros((4, 8, 2, 16)), jnp.zeros((4, 8, 2, 16))
    where = pointer(k_cache), pointer(v_cache)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(k_cache, v_cache):
        k_cache, v_cache = quire.jax.write_kv(new, new, k_cache, v_cache, jnp.array([3]))
        return quire.jax.copy_blocks(k_cache, jnp.array([[0, 2]])), v_cache

    k_new, v_new = step(k_cache, v_cache)
    assert (pointer(k_new), pointer(v_new)) == where
    assert k_cache.is_deleted()
    assert float(k_new.sum()) == 64.0
    assert float(v_new.sum()) == 32.0


def test_cache_in_a_loop_stays_where_it_is(device):
    new, k_cache, v_cache = jnp.ones((1, 2, 16)), jnp.zeros((4, 8, 2, 16)), jnp.zeros((4, 8, 2, 16))
    where = pointer(k_cache)

    def body(state):
        i, k_cache, v_cache = state
        return i + 1, *quire.jax.write_kv(new, new, k_cache, v_cache, i[None])

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def run(k_cache, v_cache):
        return jax.lax.while_loop(lambda s: s[0] < 10, body, (jnp.int32(0), k_cache, v_cache))

    _, k_new, _ = run(k_cache, v_cache)
    assert pointer(k_new) == where
    assert float(k_new.sum()) == 320.0


def test_eager_calls_donate_the_cache(device):
    new, k_cache, v_cache = jnp.ones((1, 2, 16)), jnp.zeros((4, 8, 2, 16)), jnp.zeros((4, 8, 2, 16))
    where = pointer(k_cache)
    k_new, _ = quire.jax.write_kv(new, new, k_cache, v_cache, jnp.array([3]))
    assert pointer(k_new) == where
    assert k_cache.is_deleted()


def test_cache_that_is_not_donated_is_copied(device):
    new, k_cache, v_cache = jnp.ones((1, 2, 16)), jnp.zeros((4, 8, 2, 16)), jnp.zeros((4, 8, 2, 16))
    k_new, _ = jax.jit(lambda k, v: quire.jax.write_kv(new, new, k, v, jnp.array([3])))(k_cache, v_cache)
    assert pointer(k_new) != pointer(k_cache)
    assert float(k_cache.sum()) == 0.0
    assert float(k_new.sum()) == 32.0


# ---- refusals --------------------------------------------------------------------------------------------------------------


def float_operand(arrays):
    """The first operand that may be differentiated, or None."""
    kinds = (np.float32, np.float16, BF16)
    return next((i for i, a in enumerate(arrays) if a is not None and a.dtype in kinds), None)


@pytest.mark.parametrize(
    ("op", "arrays", "options"), [case for case in CASES if float_operand(case[1]) is not None]
)
def test_no_gradient(op, arrays, options):
    operands, static = split_options(options)
    place = float_operand(arrays)

    def loss(a):
        own = [a if i == place else b for i, b in enumerate(arrays)]
        return jnp.sum(flat(getattr(quire.jax, op)(*own, **operands, **static))[0].astype(jnp.float32))

    with pytest.raises(quire.UnsupportedError, match=rf"\[{op}\] .*inference only"):
        jax.grad(loss)(jnp.asarray(arrays[place]))
    with pytest.raises(quire.UnsupportedError, match="inference only"):
        jax.jit(jax.grad(loss))(jnp.asarray(arrays[place]))
    assert not jax.grad(lambda a: loss(jax.lax.stop_gradient(a)))(jnp.asarray(arrays[place])).any()


@pytest.mark.parametrize("jit", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_refusals_are_the_librarys(jit):
    ones = jnp.ones
    with pytest.raises(
        ValueError, match=r"^\[rms_norm\] weight: expected float32 \[64\], got float32 \[63\]"
    ):
        jit(quire.jax.rms_norm)(ones((2, 64)), ones(63))
    with pytest.raises(
        TypeError, match=r"^\[rms_norm\] x: expected float32, float16 or bfloat16, got int32 \[2, 64\]"
    ):
        jit(quire.jax.rms_norm)(ones((2, 64), jnp.int32), ones(64))
    with pytest.raises(quire.UnsupportedError, match="head_dim that is a multiple of 8"):
        jit(quire.jax.attention)(*[ones((2, 1, 9))] * 3)
    half, eight = ones((2, 2, 8), jnp.bfloat16), ones((2, 2, 8), jnp.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"\[attention\] q_scale: expected none for bfloat16 queries"):
        jit(lambda q: quire.jax.attention(q, q, q, q_scale=ones(1)))(half)
    with pytest.raises(ValueError, match=r"\[attention\] q_scale: expected float32 \[1\] or \[2\]"):
        jit(lambda q: quire.jax.attention(q, q, q, q_scale=ones(3)))(eight)
    with pytest.raises(TypeError, match=r"\[attention\] k: expected"):
        jit(lambda q, k: quire.jax.attention(q, k, k))(eight, half)
    with pytest.raises(ValueError, match=r"\[write_kv\] v: expected float32 \[2, 1, 8\]"):
        jit(quire.jax.write_kv)(
            ones((2, 1, 8)), ones((3, 1, 8)), *[ones((2, 4, 1, 8))] * 2, ones(2, jnp.int32)
        )
    with pytest.raises(TypeError, match=r"\[gelu_new\] array|dtype"):
        jit(quire.jax.gelu_new)(ones((2, 64), jnp.complex64))
    with pytest.raises(ValueError, match="style"):
        quire.jax.rotary_embedding(ones(1, jnp.int32), ones((1, 1, 8)), None, ones((4, 8)), style="other")
    with pytest.raises(ValueError, match="granularity"):
        quire.jax.rms_norm(ones((2, 64)), ones(64), out_dtype="int8", granularity="row")
    with pytest.raises(ValueError, match=r"scale: expected one for granularity"):
        quire.jax.rms_norm(ones((2, 64)), ones(64), out_dtype="int8")
    with pytest.raises(ValueError, match=r"scale: expected none for granularity"):
        quire.jax.rms_norm(ones((2, 64)), ones(64), out_dtype="int8", granularity="token", scale=ones(1))
    with pytest.raises(TypeError, match="out_dtype"):
        quire.jax.silu_and_mul(ones((2, 64)), out_dtype="int4")
    with pytest.raises(ValueError, match="window"):
        quire.jax.attention(*[ones((2, 1, 8))] * 3, window=(1, 2, 3))


def test_index_errors_are_recorded(device):
    cache, new = jnp.zeros((2, 4, 1, 8)), jnp.ones((2, 1, 8))
    k_cache, _ = quire.jax.write_kv(new, new, cache, jnp.zeros_like(cache), jnp.array([8, 1]))
    jax.block_until_ready(k_cache)
    with pytest.raises(IndexError, match=r"\[write_kv\] slot_mapping"):
        quire.check_errors()
    assert float(k_cache.sum()) == 8.0


@pytest.mark.parametrize("num_tokens", [0, 1])
def test_zero_sizes(device, num_tokens):
    x, weight = jnp.ones((num_tokens, 64)), jnp.ones(64)
    assert jax.jit(quire.jax.rms_norm)(x, weight).shape == (num_tokens, 64)
    q, cache = jnp.ones((num_tokens, 2, 16)), jnp.ones((2, 4, 1, 16))
    tables, lens = jnp.zeros((num_tokens, 1), jnp.int32), jnp.ones(num_tokens, jnp.int32)
    assert jax.jit(quire.jax.paged_attention)(q, cache, cache, tables, lens).shape == q.shape


# ---- several devices -------------------------------------------------------------------------------------------------------

SHARDED = """
from functools import partial
import jax, jax.numpy as jnp, numpy as np, quire.jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
assert len(jax.devices()) >= 2
shard_map = getattr(jax, "shard_map", None)
if shard_map is None:
    from jax.experimental import shard_map as older
    # It has no rule for the replication of custom_vmap.
    shard_map = partial(older.shard_map, check_rep=False)
rng = np.random.default_rng(0)
mesh = Mesh(np.array(jax.devices()[:2]), ("heads",))
def normal(*shape): return jnp.asarray(rng.standard_normal(shape), jnp.float32)
q, k, v = normal(9, 4, 32), normal(9, 2, 32), normal(9, 2, 32)
k_cache, v_cache = normal(7, 16, 2, 32), normal(7, 16, 2, 32)
tables, lens, loc = jnp.array([[3, 0, 5], [1, 6, 6], [2, 4, 6]]), jnp.array([37, 9, 40]), jnp.array([0, 3, 4, 9])
slots, table = jnp.array([0, 17, -1, 33, 50, 64, 81, 99, 111]), normal(64, 32)
def step(q, k, v, k_cache, v_cache, slots, tables, lens, loc, table):
    q, k_cache, v_cache = quire.jax.rope_and_write_kv(slots % 64, q, k, v, table, k_cache, v_cache, slots)
    out, lse = quire.jax.paged_attention(q, k_cache, v_cache, tables, lens, query_start_loc=loc, return_lse=True)
    return out, lse, k_cache, v_cache
head, cache = P(None, "heads"), P(None, None, "heads")
specs = (head, head, head, cache, cache, P(), P(), P(), P(), P())
sharded = jax.jit(shard_map(step, mesh=mesh, in_specs=specs, out_specs=(head, head, cache, cache)), donate_argnums=(3, 4))
args = (q, k, v, k_cache, v_cache, slots, tables, lens, loc, table)
placed = [jax.device_put(np.asarray(a), NamedSharding(mesh, s)) for a, s in zip(args, specs)]
where = [s.data.unsafe_buffer_pointer() for s in placed[3].addressable_shards]
text = sharded.lower(*placed).compile().as_text()
assert "all-gather" not in text and "all-reduce" not in text
got, expected = sharded(*placed), jax.jit(step)(*args)
assert [s.data.unsafe_buffer_pointer() for s in got[2].addressable_shards] == where
for a, b in zip(got, expected):
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
print("equal")
"""


def test_shard_map_on_two_cpu_devices():
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
    environment = {**os.environ, "XLA_FLAGS": flags.strip(), "JAX_PLATFORMS": "cpu"}
    result = subprocess.run([sys.executable, "-c", SHARDED], capture_output=True, text=True, env=environment)
    assert result.stdout.strip() == "equal", result.stderr


def test_shard_map_on_two_gpus():
    if not frameworks.has_gpu() or quire.num_cuda_devices() < 2:
        pytest.skip("needs two CUDA devices and a CUDA build")
    if isinstance(frameworks.make("jax", "cuda:0"), str):
        pytest.skip("this JAX has no CUDA")
    environment = {**os.environ, "JAX_PLATFORMS": "cuda", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    result = subprocess.run([sys.executable, "-c", SHARDED], capture_output=True, text=True, env=environment)
    assert result.stdout.strip() == "equal", result.stderr


# ---- on a GPU --------------------------------------------------------------------------------------------------------------


def test_scratch_is_declared(device):
    if device == "cpu":
        pytest.skip("attention needs scratch memory on CUDA only")
    args = [
        jnp.asarray(a) for a in (q[:3].astype(BF16), k_cache.astype(BF16), v_cache.astype(BF16), TABLES, LENS)
    ]
    text = jax.jit(quire.jax.paged_attention).lower(*args).compile().as_text()
    size = quire.paged_attention_workspace_size(3, 3, 4, 32, "cuda")
    assert size > 0
    assert f"u8[{size}]" in text


def test_command_buffer(device):
    """A step of several ops in one of XLA's command buffers, replayed on other values."""
    if device == "cpu":
        pytest.skip("command buffers are CUDA graphs")
    code = """
import jax, jax.numpy as jnp, numpy as np, quire.jax
def step(x, w, q, cache, tables, lens):
    x = quire.jax.rms_norm(x, w)
    for _ in range(4):
        x = quire.jax.silu_and_mul(jnp.concatenate([x, x], -1))
    return x, quire.jax.paged_attention(q, cache, cache, tables, lens)
run = jax.jit(step)
rng = np.random.default_rng(0)
for i in range(5):
    x, q, cache = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((4, 64), (2, 2, 64), (4, 16, 1, 64)))
    args = x, jnp.ones(64), q, cache, jnp.array([[i % 4], [3]]), jnp.array([5, 9])
    for a, b in zip(run(*args), step(*args)):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-5, atol=1e-6)
print("equal")
"""
    flags = (
        os.environ.get("XLA_FLAGS", "")
        + " --xla_gpu_enable_command_buffer=FUSION,CUBLAS,CUSTOM_CALL --xla_gpu_graph_min_graph_size=1"
    )
    environment = {**os.environ, "XLA_FLAGS": flags.strip(), "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert result.stdout.strip() == "equal", result.stderr


# ---- the ABI ---------------------------------------------------------------------------------------------------------------


class Extension(ctypes.Structure):
    _fields_ = [("struct_size", ctypes.c_size_t), ("type", ctypes.c_int), ("next", ctypes.c_void_p)]


class Version(ctypes.Structure):
    _fields_ = [
        ("struct_size", ctypes.c_size_t), ("extension_start", ctypes.c_void_p), ("major", ctypes.c_int), ("minor", ctypes.c_int)
    ]  # fmt: skip


class Metadata(ctypes.Structure):
    _fields_ = [("struct_size", ctypes.c_size_t), ("version", Version), ("traits", ctypes.c_uint32)]


class MetadataExtension(ctypes.Structure):
    _fields_ = [("base", Extension), ("metadata", ctypes.POINTER(Metadata))]


def test_every_handler_says_its_version_and_traits():
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    for name, *capsules in _core.jax_targets():
        for capsule in capsules:
            metadata = Metadata(traits=0)
            extension = MetadataExtension(
                Extension(ctypes.sizeof(Extension), 1, None), ctypes.pointer(metadata)
            )
            frame = (ctypes.c_void_p * 32)(256, ctypes.addressof(extension))
            handler = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(
                get(capsule, b"xla._CUSTOM_CALL_TARGET")
            )
            assert handler(ctypes.addressof(frame)) is None
            found = metadata.version.major, metadata.version.minor, metadata.traits
            assert found == (0, 1, 1), name


#: Our struct, XLA's, and the fields, where the names differ as "ours=theirs".
STRUCTS = [
    ("Extension", "XLA_FFI_Extension_Base", "struct_size type next"),
    ("ApiVersion", "XLA_FFI_Api_Version", "struct_size extension_start major_version minor_version"),
    ("Buffer", "XLA_FFI_Buffer", "struct_size extension_start dtype data rank dims"),
    ("ByteSpan", "XLA_FFI_ByteSpan", "ptr len"),
    ("Scalar", "XLA_FFI_Scalar", "dtype value"),
    ("Buffers", "XLA_FFI_Args", "struct_size extension_start size types buffers=args"),
    ("Buffers", "XLA_FFI_Rets", "struct_size extension_start size types buffers=rets"),
    ("Attributes", "XLA_FFI_Attrs", "struct_size extension_start size types names attrs"),
    ("ErrorCreateArgs", "XLA_FFI_Error_Create_Args", "struct_size extension_start message errc"),
    ("StreamGetArgs", "XLA_FFI_Stream_Get_Args", "struct_size extension_start ctx stream"),
    (
        "Api",
        "XLA_FFI_Api",
        "struct_size extension_start api_version internal_api error_create=XLA_FFI_Error_Create "
        "error_get_message=XLA_FFI_Error_GetMessage error_destroy=XLA_FFI_Error_Destroy "
        "handler_register=XLA_FFI_Handler_Register stream_get=XLA_FFI_Stream_Get",
    ),
    ("CallFrame", "XLA_FFI_CallFrame", "struct_size extension_start api ctx stage args rets attrs"),
    ("Metadata", "XLA_FFI_Metadata", "struct_size api_version traits"),
    ("MetadataExtension", "XLA_FFI_Metadata_Extension", "extension_base metadata"),
]
#: Structs of which arrays or values are embedded must also have the size that XLA's have.
SAME_SIZE = {
    "Extension",
    "ApiVersion",
    "Buffer",
    "ByteSpan",
    "Scalar",
    "Buffers",
    "Attributes",
    "ErrorCreateArgs",
    "StreamGetArgs",
}
CONSTANTS = {
    "kExtensionMetadata": "XLA_FFI_Extension_Metadata",
    "kStageExecute": "XLA_FFI_ExecutionStage_EXECUTE",
    "kArgBuffer": "XLA_FFI_ArgType_BUFFER",
    "kAttrScalar": "XLA_FFI_AttrType_SCALAR",
    "kAttrString": "XLA_FFI_AttrType_STRING",
    "kCommandBufferCompatible": "XLA_FFI_HANDLER_TRAITS_COMMAND_BUFFER_COMPATIBLE",
    "kInvalidArgument": "XLA_FFI_Error_Code_INVALID_ARGUMENT",
    "kResourceExhausted": "XLA_FFI_Error_Code_RESOURCE_EXHAUSTED",
    "kUnimplemented": "XLA_FFI_Error_Code_UNIMPLEMENTED",
    "kInternal": "XLA_FFI_Error_Code_INTERNAL",
    **{
        f"k{name}": f"XLA_FFI_DataType_{name.upper()}"
        for name in ["Pred", "S8", "S32", "S64", "U8", "F16", "F32", "F64", "BF16", "F8E5M2", "F8E4M3FN"]
    },
}


#: What later headers call it, of the same layout and in the same place.
RENAMED = {
    "XLA_FFI_Extension_Base": "XLA_FFI_InternalExtension",
    "XLA_FFI_Error_GetMessage": "XLA_FFI_Error_GetDetails",
}


@pytest.mark.slow
def test_abi_is_that_of_the_installed_header(tmp_path):
    ours = ROOT / "cpp" / "bindings" / "jax" / "xla_ffi.h"
    compiler = shutil.which("c++") or shutil.which("g++")
    theirs = Path(quire.jax._call.ffi().include_dir()) / "xla" / "ffi" / "api" / "c_api.h"
    if not ours.exists() or compiler is None or not theirs.exists():
        pytest.skip("needs the source tree, a C++ compiler and jaxlib's headers")
    declared = set(re.findall(r"^(?:struct|enum) (\w+)(?: :[^{]*)? {", ours.read_text(), re.MULTILINE))
    assert {name for name, _, _ in STRUCTS} == declared - {
        "ExtensionType", "Stage", "ArgType", "AttrType", "HandlerTraits", "ErrorCode", "DataType"
    }  # fmt: skip
    assert set(re.findall(r"\bk[A-Z]\w*(?= = )", ours.read_text())) - {"kApiMajor", "kApiMinor"} == set(
        CONSTANTS
    )
    lines = [f'#include "{theirs}"', "#include <cstddef>", f'#include "{ours}"', "namespace x = quire::xla;"]
    for mine, other, fields in STRUCTS:
        # ours is never longer than what any runtime passes, and those it reads from us are as long as it expects
        lines.append(
            f'static_assert(sizeof(x::{mine}) {"==" if mine in SAME_SIZE else "<="} sizeof({other}), "{mine}");'
        )
        for field in fields.split():
            name, _, their_name = field.partition("=")
            their_name = their_name or name
            lines.append(
                f'static_assert(offsetof(x::{mine}, {name}) == offsetof({other}, {their_name}), "{mine}::{name}");'
            )
            lines.append(
                f"static_assert(sizeof(x::{mine}::{name}) == sizeof({other}::{their_name}) || "
                f'sizeof(x::{mine}::{name}) > 8, "{mine}::{name}");'
            )
    lines += [
        f'static_assert(int(x::{mine}) == int({other}), "{mine}");' for mine, other in CONSTANTS.items()
    ]
    lines.append(
        'static_assert(x::kApiMajor == XLA_FFI_API_MAJOR && x::kApiMinor <= XLA_FFI_API_MINOR, "version");'
    )
    text, header = "\n".join(lines) + "\n", theirs.read_text()
    for old, new in RENAMED.items():
        if not re.search(rf"\b{old}\b", header):
            text = re.sub(rf"\b{old}\b", new, text)
    source = tmp_path / "abi.cpp"
    source.write_text(text)
    result = subprocess.run(
        [compiler, "-std=c++20", "-fsyntax-only", "-Wno-invalid-offsetof", str(source)],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr


def test_every_op_is_there():
    """But for the copy between host and device, which is JAX's own."""
    assert set(quire.jax.__all__) == ops_of_families() - {"swap_blocks"}
    assert {case[0] for case in CASES} | WITHOUT_CASES == set(quire.jax.__all__)


def test_arguments_are_quires():
    """The same names, in the same order, with the same defaults and types, less what XLA sees to."""
    xlas = {"out", "out_lse", "k_out", "workspace", "validate", "variant", "stream"}
    refused = {"shared_prefix_attention": {"window", "alibi_slopes"}}
    instead = {"gather_kv": {"dtype"}, "rope_and_write_kv": {"return_k"}}  # of an output
    for name in quire.jax.__all__:
        quires = inspect.signature(getattr(quire, name)).parameters
        own = inspect.signature(getattr(quire.jax, name)).parameters
        left_out = xlas | refused.get(name, set())
        assert [p for key, p in own.items() if key not in instead.get(name, ())] == [
            p for key, p in quires.items() if key not in left_out
        ], name


def test_importing_quire_imports_no_jax():
    code = "import sys, quire; assert not {'jax', 'jaxlib', 'torch', 'cupy'} & set(sys.modules); import quire.jax; assert 'jax' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_float8_result_that_jax_refuses(monkeypatch):
    def refuse(x):
        raise jax.errors.JaxRuntimeError("float8")

    monkeypatch.setattr(jax.dlpack, "from_dlpack", refuse)
    x = jnp.ones((2, 16))
    for op, call in (
        ("quantize_fp8", quire.quantize_fp8),
        ("rms_norm", lambda x: quire.rms_norm(x, x[0], out_dtype="float8_e4m3fn", granularity="token")),
    ):
        with pytest.raises(
            TypeError, match=rf"^\[{op}\] out: expected a dtype that JAX .* got float8_e4m3fn"
        ):
            call(x)


# ---- packed weights --------------------------------------------------------------------------------------------------------


def half(*shape):
    return jnp.asarray(normal(*shape).astype(BF16))


def weights_of_jax():
    """Those that this JAX can hold: its DLPack has had float8 since 0.5.3."""
    return packed_weights(jnp.asarray, float8=jax.__version_info__ >= (0, 5, 3))


def test_packed_weights(device):
    """As an argument of a jitted function, in its closure, outside jit, and in a loop over weights: the library's own bits."""
    weights = weights_of_jax()
    x, bias = half(2, 3, 96), jnp.asarray(normal(48))
    for name, w in weights.items():
        want = np.asarray(quire.quantized_matmul(x, w, bias=bias))
        for call in (
            jax.jit(quire.jax.quantized_matmul),
            jax.jit(lambda x, w, bias: quire.jax.quantized_matmul(x, weights[name], bias=bias)),
            quire.jax.quantized_matmul,
        ):
            got = np.asarray(call(x, w, bias=bias))
            np.testing.assert_array_equal(bits(got), bits(want), err_msg=name)
        again = jax.tree.unflatten(jax.tree.structure(w), jax.tree.leaves(w))
        assert repr(again) == repr(w)
        stacked = jax.tree.map(lambda *t: jnp.stack(t), w, w)
        _, got = jax.lax.scan(lambda carry, w: (carry, quire.jax.quantized_matmul(x, w)), 0, stacked)
        want = np.asarray(quire.quantized_matmul(x, w))
        for each in np.asarray(got):
            np.testing.assert_array_equal(bits(each), bits(want), err_msg=name)


def test_packed_weights_under_vmap(device):
    x = half(4, 3, 96)
    for name, w in weights_of_jax().items():
        got = jax.vmap(lambda x: quire.jax.quantized_matmul(x, w, batch_invariant=True))(x)
        for each, own in zip(np.asarray(got), x):
            want = np.asarray(quire.quantized_matmul(own, w, batch_invariant=True))
            np.testing.assert_array_equal(bits(each), bits(want), err_msg=name)
        argument = "weight" if w.weight is not None else "w"
        stacked = jax.tree.map(lambda *t: jnp.stack(t), w, w)
        with pytest.raises(
            ValueError, match=rf"\] ({argument}|permutation): expected the same array .*jax\.lax\.map"
        ):
            jax.vmap(quire.jax.quantized_matmul, in_axes=(None, 0))(x[0], stacked)


def test_scales_under_vmap(device):
    """Each batch element has a scale of its own, computed or given, one for all of it too."""
    x = jnp.asarray(normal(3, 2, 5, 64))
    for options in ({}, {"symmetric": False}):
        q, *scales = jax.vmap(lambda x: quire.jax.quantize_int8(x, **options))(x)
        assert [s.shape for s in scales] == [(3, 1)] * len(scales)
        back = jax.vmap(quire.jax.dequantize_int8)(q, *scales)
        given = dict(zip(("scale", "zero_point"), scales))

        def quantize(x, given):
            return quire.jax.quantize_int8(x, **given, **options)[0]

        again = jax.vmap(quantize)(x, given)
        for i in range(3):
            want_q, *want = quire.quantize_int8(np.asarray(x[i]), **options)
            np.testing.assert_array_equal(q[i], want_q)
            np.testing.assert_array_equal(again[i], want_q)
            for a, b in zip(scales, want):
                np.testing.assert_allclose(a[i], b, rtol=1e-6)
            np.testing.assert_array_equal(
                back[i], quire.dequantize_int8(want_q, *(np.asarray(s[i]) for s in scales))
            )
    a, b = jnp.asarray(normal(2, 3, 64) * 30, jnp.int8), jnp.asarray(normal(8, 64) * 30, jnp.int8)
    one_each = jnp.asarray([[0.5], [2.0]])
    got = jax.vmap(lambda a, s: quire.jax.scaled_matmul(a, b, s, jnp.ones(1), out_dtype="float32"))(
        a, one_each
    )
    for i in range(2):
        want = quire.scaled_matmul(a[i], b, one_each[i], jnp.ones(1), out_dtype="float32")
        np.testing.assert_array_equal(got[i], want)


def test_dequantize_traced(device):
    """A packed weight that is an argument is dequantized where the trace runs it, with the library's own bits."""
    for name, w in weights_of_jax().items():
        want = np.asarray(w.dequantize("bfloat16"))
        traced = jax.jit(lambda w: w.dequantize("bfloat16"))
        assert "quire.dequantize" in traced.lower(w).as_text(), name
        for got in (traced(w), jax.jit(lambda: w.dequantize("bfloat16"))()):
            assert got.dtype == jnp.bfloat16
            np.testing.assert_array_equal(np.asarray(got).view(np.uint8), want.view(np.uint8), err_msg=name)
    for arguments, error, text in (
        ({"dtype": "int8"}, TypeError, "dtype: expected float32, float16 or bfloat16, got int8"),
        ({"out": want}, ValueError, "out: expected none"),
        ({"stream": 1}, ValueError, "stream: expected none"),
    ):
        with pytest.raises(error, match=rf"^\[dequantize\] {text}"):
            jax.jit(lambda w: w.dequantize(**arguments))(w)


def test_quantization_refusals():
    with jax.default_device(jax.devices("cpu")[0]):
        refuse_quantization()


def refuse_quantization():
    ones = jnp.ones
    (w, *_) = weights_of_jax().values()
    with pytest.raises(
        ValueError, match=r"\[quantized_matmul\] x: expected a last dimension of 96, got float32 \[2, 95\]"
    ):
        jax.jit(quire.jax.quantized_matmul)(ones((2, 95)), w)
    with pytest.raises(ValueError, match=r"\[quantized_matmul\] bias: expected float32 \[48\]"):
        jax.jit(quire.jax.quantized_matmul)(ones((2, 96)), w, bias=ones(47))
    with pytest.raises(TypeError, match=r"\[quantized_matmul\] w: expected a PackedWeight"):
        quire.jax.quantized_matmul(ones((2, 96)), ones((48, 96)))
    with pytest.raises(ValueError, match=r"\[quantize_fp8\] scales: expected"):
        quire.jax.quantize_fp8(ones((2, 96)), scale=ones(2))
    with pytest.raises(ValueError, match=r"\[quantize_int8\] zero_point: expected one with scale"):
        quire.jax.quantize_int8(ones((2, 96)), scale=ones(1), symmetric=False)
    with pytest.raises(TypeError, match=r"\[dequantize_int8\] out_dtype"):
        quire.jax.dequantize_int8(ones((2, 96), jnp.int8), ones(1), out_dtype="int8")
    with pytest.raises(ValueError, match=r"\[dequantize_fp8\] granularity"):
        quire.jax.dequantize_fp8(ones((2, 96), jnp.float8_e4m3fn), ones(1), granularity="row")
    with pytest.raises(ValueError, match=r"\[dequantize_fp8\] q: .*jax\.lax\.map"):
        jax.vmap(lambda q: quire.jax.dequantize_fp8(q, ones((1, 1)), granularity="block"))(
            ones((2, 3, 96), jnp.float8_e4m3fn)
        )
    with pytest.raises(ValueError, match=r"\[scaled_matmul\] scale_b: expected a tensor"):
        quire.jax.scaled_matmul(ones((2, 96), jnp.int8), ones((2, 96), jnp.int8), ones(1))
    with pytest.raises(quire.UnsupportedError, match=r"\[quantized_matmul\] .*inference only"):
        jax.grad(lambda x: quire.jax.quantized_matmul(x, w).sum())(ones((2, 96)))


def test_weight_packed_for_another_device():
    """A weight that was copied to another device is told from one that was packed there."""
    with jax.default_device(jax.devices("cpu")[0]):
        (w, *_) = weights_of_jax().values()
    gpu = frameworks.make("jax", "cuda:0")
    if isinstance(gpu, str):
        fields = (*w._fields[:7], "cuda")
        other = quire.PackedWeight._unflatten((*w._flatten()[1][:4], "cuda", fields), w._flatten()[0])
        with pytest.raises(ValueError, match="weight: expected one packed for cpu, got one for cuda"):
            quire.quantized_matmul(jnp.ones((2, 96)), other)
        with pytest.raises((ValueError, quire.UnsupportedError), match="quantized_matmul"):
            quire.jax.quantized_matmul(jnp.ones((2, 96)), other)
        return
    x, moved = jax.device_put((jnp.ones((2, 96), jnp.bfloat16), w), gpu.jax_device)
    with pytest.raises(ValueError, match="weight: expected one packed for cuda, got one for cpu"):
        quire.quantized_matmul(x, moved)
    with pytest.raises(Exception, match="expected a weight packed for cuda, got one for cpu"):
        jax.block_until_ready(quire.jax.quantized_matmul(x, moved))
