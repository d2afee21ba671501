"""What tensors of attention may hold: nothing, NaN where nobody looks, hostile indices and lengths.

SPDX-License-Identifier: Apache-2.0
"""

import dataclasses

import numpy as np
import pytest
from attention_batch import (
    Batch,
    draw,
)
from frameworks import as_float64, np_dtype
from reference import attention as reference
from tolerances import assert_close

import quire


@pytest.mark.parametrize("decode", [True, False], ids=["decode", "mixed"])
def test_empty_rows(backend, rng, decode):
    """A sequence of length 0, and queries that stand before the first key: output 0 and LSE -inf, or the sink."""
    sinks = np.array([0.5, -1.0], np.float32)
    if decode:
        batch = Batch.make(
            rng,
            q_lens=[1, 1, 1],
            kv_lens=[0, 5, 0],
            heads=2,
            kv_heads=1,
            dim=16,
            block_size=4,
            dtype="float16",
            decode=True,
        )
    else:
        batch = Batch.make(
            rng,
            q_lens=[4, 6, 0, 2],
            kv_lens=[0, 2, 3, 2],
            heads=2,
            kv_heads=1,
            dim=16,
            block_size=4,
            dtype="float16",
        )
    batch.check(backend)
    batch.check(backend, sinks=sinks)
    batch.check(backend, window=(0, -1))


@pytest.mark.parametrize("dim", [64, 128])
def test_many_sequences_with_and_without_keys(backend, rng, dim):
    """More tiles than a device has SMs, and runs of them that have nothing to do, before and after ones that have."""
    count = 300
    batch = Batch.make(
        rng,
        q_lens=[64] * count,
        kv_lens=[(70 if i % 7 == 3 or i > 250 else 0) for i in range(count)],
        heads=1,
        kv_heads=1,
        dim=dim,
        block_size=16,
        dtype="bfloat16",
    )
    batch.check(backend)


def test_window_that_sees_nothing(backend, rng):
    batch = Batch.make(
        rng, q_lens=[3], kv_lens=[40], heads=1, kv_heads=1, dim=16, block_size=8, dtype="float32"
    )
    batch.check(backend, window=(2, 0))
    # Keys only to the right of the position, with causal hiding all but the position itself.
    batch.check(backend, window=(0, 5))


def test_nothing_at_all(backend):
    q = np.zeros((0, 2, 16), np.float32)
    cache = np.zeros((1, 4, 1, 16), np.float32)
    tables, lens = np.zeros((0, 3), np.int32), np.zeros(0, np.int32)
    out, lse = quire.paged_attention(
        *(backend.array(x) for x in (q, cache, cache, tables, lens)), return_lse=True
    )
    assert backend.numpy(out).shape == (0, 2, 16)
    assert backend.numpy(lse).shape == (0, 2)
    one = np.ones((1, 2, 16), np.float32)
    # A cache without blocks, and a table without columns: the sequence has no key that it could see.
    none = np.zeros((0, 4, 1, 16), np.float32)
    out = quire.paged_attention(
        *(backend.array(x) for x in (one, none, none, np.zeros((1, 0), np.int32), np.zeros(1, np.int32)))
    )
    np.testing.assert_array_equal(backend.numpy(out), 0.0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_table_without_columns(backend, dtype):
    """Such a table may have no address: it is a paged call all the same, of one query for each sequence."""
    q = np.ones((3, 2, 16), np_dtype(dtype))
    cache = np.ones((1, 4, 1, 16), np_dtype(dtype))
    rows = backend.array(np.full((300, 2, 16), 7.0, np_dtype(dtype)))
    arguments = (
        backend.array(x) for x in (q, cache, cache, np.zeros((3, 0), np.int32), np.zeros(3, np.int32))
    )
    quire.paged_attention(*arguments, out=rows[:3])
    got = as_float64(backend.numpy(rows))
    assert (got[:3] == 0.0).all()
    assert (got[3:] == 7.0).all()


@pytest.mark.parametrize("decode", [True, False], ids=["decode", "mixed"])
@pytest.mark.parametrize("kv_dtype", ["bfloat16", "float8_e4m3fn", "int8"])
def test_unused_memory_changes_no_bit(backend, rng, decode, kv_dtype):
    """The same batch with zeros instead of NaN in every unused slot, block and table entry: the same bits."""
    q_lens = [1, 1, 1] if decode else [5, 1, 66]
    batch = Batch.make(
        rng,
        q_lens=q_lens,
        kv_lens=[37, 250, 66],
        heads=8,
        kv_heads=2,
        dim=128,
        block_size=16,
        dtype="bfloat16",
        kv_dtype=kv_dtype,
        decode=decode,
    )
    options = {"scale": 0.02, "return_lse": True}
    positional, keywords = batch.arguments(backend)
    dirty = [backend.numpy(x) for x in quire.paged_attention(*positional, **keywords, **options)]
    used = np.zeros(batch.k_cache.shape[:2], bool)
    for s, length in enumerate(batch.seq_lens):
        slots = np.arange(length)
        used[batch.block_tables[s][slots // 16], slots % 16] = True
        batch.block_tables[s, -(-length // 16) :] = 0
    batch.k_cache[~used] = 0
    batch.v_cache[~used] = 0
    positional, keywords = batch.arguments(backend)
    clean = [backend.numpy(x) for x in quire.paged_attention(*positional, **keywords, **options)]
    for a, b in zip(dirty, clean):
        np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8))


@pytest.mark.parametrize("decode", [True, False], ids=["decode", "mixed"])
def test_hostile_block_tables(backend, rng, decode):
    """Entries that are needed and out of range hide their keys; other sequences keep their bits."""
    q_lens = [1, 1, 1] if decode else [7, 3, 20]
    batch = Batch.make(
        rng,
        q_lens=q_lens,
        kv_lens=[60, 45, 90],
        heads=4,
        kv_heads=2,
        dim=64,
        block_size=16,
        dtype="bfloat16",
        decode=decode,
    )
    positional, keywords = batch.arguments(backend)
    good = backend.numpy(quire.paged_attention(*positional, **keywords))
    for bad in (-1, -2, batch.k_cache.shape[0], 2**31 - 1, -(2**31)):
        hostile = dataclasses.replace(batch, block_tables=batch.block_tables.copy())
        hostile.block_tables[1, 1] = bad
        positional, keywords = hostile.arguments(backend)
        out = backend.numpy(quire.paged_attention(*positional, **keywords))
        rows = slice(1, 2) if decode else slice(7, 10)
        others = np.setdiff1d(np.arange(len(out)), np.arange(len(out))[rows])
        np.testing.assert_array_equal(out[others].view(np.uint16), good[others].view(np.uint16))
        assert np.isfinite(out[rows].astype(np.float32)).all()
        # The hidden block's keys are out of the softmax: the same as a batch without them.
        keys = np.r_[0:16, 32:45]
        k = as_float64(batch.k_cache)[batch.block_tables[1][keys // 16], keys % 16]
        v = as_float64(batch.v_cache)[batch.block_tables[1][keys // 16], keys % 16]
        if decode:
            want, _ = reference.attend(as_float64(batch.q[1:2]), k, v, q_start=10**6)
            assert_close("attention", out[rows], want)
        if bad != -1:
            with pytest.raises(
                IndexError, match=r"\[paged_attention\] block_tables: expected a value in range"
            ):
                quire.check_errors(backend.device)
        quire.check_errors(backend.device)


def test_hostile_lengths(backend, rng):
    """Lengths beyond the table are clamped to it; negative ones are 0; both are reported."""
    batch = Batch.make(
        rng,
        q_lens=[1, 1, 1],
        kv_lens=[30, 30, 30],
        heads=2,
        kv_heads=1,
        dim=64,
        block_size=16,
        dtype="float16",
        decode=True,
    )
    batch.block_tables = np.ascontiguousarray(batch.block_tables[:, :2])
    for bad in (33, 2**31 - 1, -1, -(2**31)):
        batch.seq_lens = np.array([30, bad, 30], np.int32)
        positional, _ = batch.arguments(backend)
        # NaN may be read from slots past the real length: they are within the claimed length, so only the other rows are checked.
        out = backend.numpy(quire.paged_attention(*positional))
        batch.seq_lens = np.array([30, 0, 30], np.int32)
        want, _ = batch.reference()
        assert_close("attention", out[[0, 2]], want[[0, 2]])
        if bad < 0:
            np.testing.assert_array_equal(out[1], 0.0)
        with pytest.raises(
            IndexError,
            match=rf"\[paged_attention\] seq_lens: expected a value in range .*, got {bad} at index 1",
        ):
            quire.check_errors(backend.device)


def test_hostile_query_start_loc(backend, rng):
    """No value of query_start_loc reaches outside q; rows of no sequence are not written."""
    batch = Batch.make(
        rng, q_lens=[3, 4], kv_lens=[30, 12], heads=2, kv_heads=1, dim=64, block_size=16, dtype="float32"
    )
    for bad in ([0, 100, 7], [0, -5, 7], [5, 3, 7], [-(2**31), 3, 2**31 - 1], [0, 3, 6], [2, 3, 7]):
        batch.query_start_loc = np.array(bad, np.int32)
        positional, keywords = batch.arguments(backend)
        out = backend.array(np.full(batch.q.shape, 7.0, np.float32))
        quire.paged_attention(*positional, **keywords, out=out)
        host = backend.numpy(out)
        assert np.isfinite(host).all()
        if bad == [0, 3, 6]:
            assert (host[6] == 7.0).all()
            quire.check_errors(backend.device)
        elif bad == [2, 3, 7]:
            assert (host[:2] == 7.0).all()
            quire.check_errors(backend.device)
        else:
            with pytest.raises(IndexError, match=r"\[paged_attention\] query_start_loc"):
                quire.check_errors(backend.device)


def test_random_hostile_contents(backend, rng):
    """Anything at all in the index tensors: no fault, and finite memory gives finite results."""
    cache = draw(rng, (9, 4, 2, 16), "float16")
    q = draw(rng, (12, 4, 16), "float16")
    specials = np.array([-1, 0, 1, 8, 9, 10, 2**31 - 1, -(2**31), 1 << 20], np.int64)
    bq, bk, bv = backend.array(q), backend.array(cache), backend.array(cache)
    for _ in range(60):
        tables = rng.choice(specials, (5, 3)).astype(np.int32)
        lens = rng.choice(np.concatenate([specials, np.arange(12)]), 5).astype(np.int32)
        starts = rng.choice(np.concatenate([specials, np.arange(13)]), 6).astype(np.int32)
        out = quire.paged_attention(
            bq,
            bk,
            bv,
            backend.array(tables),
            backend.array(lens),
            query_start_loc=backend.array(starts),
            out=backend.array(q * 0),
        )
        assert np.isfinite(backend.numpy(out).astype(np.float32)).all()
    with pytest.raises(IndexError, match=r"\[paged_attention\]"):
        quire.check_errors(backend.device)


def test_validate_full(backend, rng):
    batch = Batch.make(
        rng, q_lens=[2, 3], kv_lens=[20, 9], heads=2, kv_heads=1, dim=16, block_size=8, dtype="float32"
    )
    positional, keywords = batch.arguments(backend)
    quire.paged_attention(*positional, **keywords, validate="full")
    skipping = dataclasses.replace(batch, block_tables=batch.block_tables.copy())
    skipping.block_tables[0, 0] = -1  # the documented skip, as after a sliding window has passed
    positional, keywords = skipping.arguments(backend)
    quire.paged_attention(*positional, **keywords, validate="full")
    out = backend.array(np.full(batch.q.shape, 7.0, np.float32))
    for name, value, text in [
        (
            "block_tables",
            (0, 2, -2),
            r"block_tables: expected -1 or a block id in \[0, \d+\), got -2 at \[0, 2\]",
        ),
        ("seq_lens", (1, 10**6), r"seq_lens: expected a value in \[0, 40\], got 1000000 at \[1\]"),
        ("query_start_loc", (1, 9), r"query_start_loc: expected a value in \[0, 5\], got 9 at \[1\]"),
    ]:
        broken = dataclasses.replace(batch, **{name: getattr(batch, name).copy()})
        getattr(broken, name)[value[:-1]] = value[-1]
        positional, keywords = broken.arguments(backend)
        with pytest.raises(IndexError, match=r"\[paged_attention\] " + text):
            quire.paged_attention(*positional, **keywords, validate="full", out=out)
    assert (backend.numpy(out) == 7.0).all()
    quire.check_errors(backend.device)
