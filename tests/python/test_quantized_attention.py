"""Attention over quantized caches and with float8 queries, against float64.

SPDX-License-Identifier: Apache-2.0
"""

import numpy as np
import pytest
from attention_batch import (
    DTYPES,
    OPTIONS,
    QUANTIZED,
    Batch,
    draw,
)
from tolerances import assert_close

import quire


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kv_dtype", QUANTIZED)
@pytest.mark.parametrize("scales", [0, 1, 2], ids=["none", "tensor", "head"])
@pytest.mark.parametrize("decode", [True, False], ids=["decode", "mixed"])
def test_quantized_caches(backend, rng, decode, scales, kv_dtype, dtype):
    q_lens = [1, 1] if decode else [18, 40]
    batch = Batch.make(
        rng,
        q_lens=q_lens,
        kv_lens=[150, 77],
        heads=4,
        kv_heads=2,
        dim=128,
        block_size=16,
        dtype=dtype,
        kv_dtype=kv_dtype,
        scales=scales,
        decode=decode,
    )
    if kv_dtype == "int8" and scales == 0:  # integers of unit scale make enormous scores: bring them back
        batch.check(backend, scale=0.02)
    else:
        batch.check(backend)


@pytest.mark.parametrize("dim", [8, 40, 96, 256])
@pytest.mark.parametrize("kv_dtype", QUANTIZED)
def test_quantized_head_dims(backend, rng, kv_dtype, dim):
    batch = Batch.make(
        rng,
        q_lens=[1, 30],
        kv_lens=[50, 61],
        heads=4,
        kv_heads=2,
        dim=dim,
        block_size=5,
        dtype="bfloat16",
        kv_dtype=kv_dtype,
        scales=2,
    )
    batch.check(backend)


def float8_batch(rng, **shape):
    return Batch.make(rng, **({"heads": 4, "kv_heads": 2, "dtype": "float8_e4m3fn"} | shape))


@pytest.mark.parametrize("kv_dtype", QUANTIZED)
@pytest.mark.parametrize("scales", [0, 1, 2], ids=["none", "tensor", "head"])
@pytest.mark.parametrize("decode", [True, False], ids=["decode", "mixed"])
def test_float8_queries(backend, rng, decode, scales, kv_dtype):
    q_lens, shape = [1, 1] if decode else [18, 40], {"dim": 128, "block_size": 16, "scales": scales}
    batch = float8_batch(rng, q_lens=q_lens, kv_lens=[150, 77], kv_dtype=kv_dtype, decode=decode, **shape)
    scale = 0.02 if kv_dtype == "int8" and scales == 0 else None
    batch.check(backend, scale=scale)
    want, _ = batch.reference(scale=scale)
    positional, keywords = batch.arguments(backend)
    assert backend.numpy(quire.paged_attention(*positional, scale=scale, **keywords)).dtype == "bfloat16"
    out = backend.array(np.zeros(batch.q.shape, np.float16))
    quire.paged_attention(*positional, scale=scale, out=out, **keywords)
    assert_close("attention", backend.numpy(out), want)


@pytest.mark.parametrize("dim", [8, 40, 64, 72, 96, 128, 200, 256])
@pytest.mark.parametrize("decode", [True, False], ids=["decode", "mixed"])
def test_float8_query_head_dims(backend, rng, decode, dim):
    q_lens = [1, 1] if decode else [2, 70]
    batch = float8_batch(rng, q_lens=q_lens, kv_lens=[50, 90], dim=dim, block_size=8, scales=2, decode=decode)
    batch.check(backend)
    # Rows of q that are not aligned to anything.
    _, keywords = batch.arguments(backend)
    keywords.pop("query_start_loc", None)
    if decode:
        flat = np.concatenate([np.zeros(1, batch.q.dtype), batch.q.ravel()])
        q = backend.array(flat)[1:].reshape(batch.q.shape)
        positional, _ = batch.arguments(backend)
        out = quire.paged_attention(q, *positional[1:], **keywords)
        assert_close("attention", backend.numpy(out), batch.reference()[0])


@pytest.mark.parametrize("option", ["noncausal", "window_both", "sinks", "everything"])
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize(
    ("dtype", "kv_dtype"),
    [("bfloat16", "int8"), ("float16", "float8_e5m2"), ("float8_e4m3fn", "float8_e4m3fn")],
)
def test_narrow_keys_and_many_queries(backend, rng, dtype, kv_dtype, dim, option):
    """As many rows as Hopper's kernel is taken from; and scales that turn the order of scores around."""
    options, heads = dict(OPTIONS[option]), 12
    if "alibi_slopes" in options:
        options["alibi_slopes"] = (2.0 ** -np.arange(1, heads + 1)).astype(np.float32)
    if "sinks" in options:
        options["sinks"] = rng.standard_normal(heads).astype(np.float32)
    batch = Batch.make(
        rng,
        q_lens=[200, 0, 1, 520],
        kv_lens=[222, 60, 130, 500],
        heads=heads,
        kv_heads=3,
        dim=dim,
        block_size=16,
        dtype=dtype,
        kv_dtype=kv_dtype,
        scales=3,
    )
    batch.k_scale[1] *= -1
    batch.check(backend, **options)


def test_a_scale_of_zero(backend, rng):
    """All keys alike, and no NaN from a hidden one."""
    for q_lens in ([3, 40], [300, 200]):
        shape = {"heads": 18, "dim": 64, "block_size": 16, "scales": 2}
        batch = float8_batch(rng, q_lens=q_lens, kv_lens=[330, 190], **shape)
        batch.k_scale[0] = 0.0
        batch.check(backend)


def test_float8_queries_in_every_framework(framework, rng):
    batch = float8_batch(rng, q_lens=[1, 5], kv_lens=[20, 9], dim=64, block_size=8)
    batch.check(framework)
    positional, keywords = batch.arguments(framework)
    assert type(quire.paged_attention(*positional, **keywords)) is type(positional[0])


def test_float8_query_refusals(rng):
    q, k = draw(rng, (3, 2, 16), "float8_e4m3fn"), draw(rng, (3, 2, 16), "bfloat16")
    one = np.ones(1, np.float32)
    with pytest.raises(TypeError, match=r"k: expected float8_e4m3fn, float8_e5m2 or int8, got bfloat16"):
        quire.attention(q, k, k)
    with pytest.raises(TypeError, match=r"out: expected bfloat16 or float16"):
        quire.attention(q, q, q, out=np.zeros(q.shape, np.float32))
    with pytest.raises(ValueError, match=r"q_scale: expected none for bfloat16 queries"):
        quire.attention(k, k, k, q_scale=one)
    with pytest.raises(ValueError, match=r"q_scale: expected float32 \[1\] or \[2\]"):
        quire.attention(q, q, q, q_scale=np.ones(3, np.float32))
    with pytest.raises(TypeError, match=r"q: expected .* got float8_e5m2"):
        quire.attention(*[draw(rng, (3, 2, 16), "float8_e5m2")] * 3, out=np.zeros(q.shape, np.float16))
