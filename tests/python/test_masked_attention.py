"""Attention with masks, against float64.

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
    random_mask,
)
from frameworks import as_float64
from reference import attention as reference
from tolerances import assert_close, assert_lse_close

import quire


def tree_mask(rng, q_lens, width):
    """Of random trees whose nodes stand after their parents: a node sees itself and its ancestors. The root's parent is the prompt."""
    rows = []
    for q_len in q_lens:
        seen = np.zeros((q_len, 8 * width), bool)
        for i in range(q_len):
            if i > 0:
                seen[i] = seen[rng.integers(0, i)]
            if i < 8 * width:
                seen[i, i] = True
        rows.append(seen)
    return np.packbits(np.concatenate(rows), axis=-1, bitorder="little")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("q_lens", [[1, 1, 1], [2, 1, 2], [7, 3, 8], [33, 0, 64], [90, 5, 130]], ids=str)
@pytest.mark.parametrize("group", [1, 4])
def test_tree_masks(backend, rng, group, q_lens, dtype):
    """Trees to verify, of different sizes, on long and short prompts; two bits of slack in the rows at most."""
    batch = Batch.make(
        rng,
        q_lens=q_lens,
        kv_lens=[n + extra for n, extra in zip(q_lens, (300, 0, 61))],
        heads=2 * group,
        kv_heads=2,
        dim=64,
        block_size=16,
        dtype=dtype,
    )
    batch.check(backend, mask=tree_mask(rng, q_lens, -(-max(q_lens) // 8)))


@pytest.mark.parametrize("kv_dtype", [*QUANTIZED, "bfloat16"])
@pytest.mark.parametrize("dim", [40, 128, 256])
@pytest.mark.parametrize("q_len", [1, 4, 40])
def test_full_masks(backend, rng, q_len, dim, kv_dtype):
    """A bit for every key."""
    kv_lens = [260, q_len, 77]
    batch = Batch.make(
        rng,
        q_lens=[q_len, q_len, q_len],
        kv_lens=kv_lens,
        heads=4,
        kv_heads=2,
        dim=dim,
        block_size=8,
        dtype="bfloat16",
        kv_dtype=kv_dtype,
        scales=0 if kv_dtype == "bfloat16" else 2,
        decode=q_len == 1,
    )
    mask = random_mask(rng, 3 * q_len, 33)
    mask[1] = 0  # and this query sees nothing
    start = np.zeros(3, np.int32)
    batch.check(backend, mask=mask, mask_start=start)
    batch.check(backend, mask=mask, mask_start=start, causal=False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("q_lens", [[1, 1, 1], [3, 2, 1], [21, 1, 80]], ids=str)
@pytest.mark.parametrize("option", list(OPTIONS))
def test_masks_with_options(backend, rng, option, q_lens, dtype):
    options = dict(OPTIONS[option])
    heads = 6
    if "alibi_slopes" in options:
        options["alibi_slopes"] = (2.0 ** -np.arange(1, heads + 1)).astype(np.float32)
    if "sinks" in options:
        options["sinks"] = rng.standard_normal(heads).astype(np.float32)
    batch = Batch.make(
        rng,
        q_lens=q_lens,
        kv_lens=[33, 130, 90],
        heads=heads,
        kv_heads=2,
        dim=64,
        block_size=16,
        dtype=dtype,
    )
    for start in (np.array([20, -5, 71], np.int32), np.array([-(2**31), 2**31 - 1, 0], np.int32)):
        batch.check(backend, mask=random_mask(rng, sum(q_lens), 3), mask_start=start, **options)


@pytest.mark.parametrize("q_len", [1, 6, 70])
def test_a_mask_can_be_the_causal_one(backend, rng, q_len):
    """The same bits as with causal, where the same kernel runs."""
    batch = Batch.make(
        rng, q_lens=[q_len], kv_lens=[150], heads=4, kv_heads=1, dim=64, block_size=5, dtype="float16"
    )
    positional, keywords = batch.arguments(backend)
    mask = backend.array(np.packbits(np.tri(q_len, dtype=bool), axis=-1, bitorder="little"))
    want = backend.numpy(quire.paged_attention(*positional, **keywords))
    got = backend.numpy(quire.paged_attention(*positional, **keywords, causal=False, mask=mask))
    assert_close("attention", got, as_float64(want))


@pytest.mark.parametrize("q_lens", [[1, 1], [5, 2], [40, 30]], ids=str)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_masked_keys_need_not_be_finite(backend, rng, value, q_lens):
    """What the mask hides is selected away, whatever it holds, also where other queries see it."""
    for dtype in DTYPES:
        batch = Batch.make(
            rng, q_lens=q_lens, kv_lens=[90, 64], heads=4, kv_heads=2, dim=64, block_size=16, dtype=dtype
        )
        mask = random_mask(rng, sum(q_lens), 12)
        starts = np.concatenate([[0], np.cumsum(q_lens)])
        for s, key in ((0, 3), (1, 21)):
            mask[starts[s], key // 8] &= ~np.uint8(1 << key % 8)
            where = batch.block_tables[s, key // 16], key % 16, slice(None), slice(0, 3)
            batch.v_cache[where] = value
            if q_lens[s] == 1:
                batch.k_cache[where] = value
        zeros = np.zeros(2, np.int32)
        positional, keywords = batch.arguments(backend)
        out = backend.numpy(
            quire.paged_attention(
                *positional, **keywords, mask=backend.array(mask), mask_start=backend.array(zeros)
            )
        )
        bits = np.unpackbits(mask, axis=-1, bitorder="little")
        for s, key in ((0, 3), (1, 21)):
            for t in range(starts[s], starts[s + 1]):
                finite = np.isfinite(out[t].astype(np.float32))
                assert finite[:, 3:].all()
                assert finite[:, :3].all() == (not bits[t, key])


def test_mask_rows_with_a_pitch(backend, rng):
    batch = Batch.make(
        rng, q_lens=[4, 9], kv_lens=[33, 20], heads=4, kv_heads=2, dim=64, block_size=16, dtype="float16"
    )
    mask, start = random_mask(rng, 13, 5), np.array([1, 0], np.int32)
    want, _ = batch.reference(mask=mask, mask_start=start)
    positional, keywords = batch.arguments(backend)
    out = quire.paged_attention(
        *positional, **keywords, mask=backend.strided(mask, 3), mask_start=backend.array(start)
    )
    assert_close("attention", backend.numpy(out), want)


def test_a_mask_without_bits_hides_nothing(backend, rng):
    batch = Batch.make(
        rng, q_lens=[4], kv_lens=[33], heads=4, kv_heads=2, dim=64, block_size=16, dtype="float16"
    )
    batch.check(backend, mask=np.zeros((4, 0), np.uint8))


def test_ragged_masks(framework, rng):
    q_starts, kv_starts = np.array([0, 5, 5, 70], np.int32), np.array([0, 40, 44, 150], np.int32)
    q, k = draw(rng, (70, 4, 64), "float32"), draw(rng, (150, 2, 64), "float32")
    mask = random_mask(rng, 70, 4)
    for start in (None, np.array([10, 0, 30], np.int32)):
        out, lse = quire.attention(
            framework.array(q),
            framework.array(k),
            framework.array(k),
            query_start_loc=framework.array(q_starts),
            kv_start_loc=framework.array(kv_starts),
            mask=framework.array(mask),
            mask_start=None if start is None else framework.array(start),
            return_lse=True,
        )
        want, want_lse = np.empty(q.shape), np.empty(q.shape[:2])
        for s in range(3):
            a, b, c, d = q_starts[s], q_starts[s + 1], kv_starts[s], kv_starts[s + 1]
            want[a:b], want_lse[a:b] = reference.attend(
                as_float64(q[a:b]),
                as_float64(k[c:d]),
                as_float64(k[c:d]),
                q_start=(d - c) - (b - a),
                mask=mask[a:b],
                mask_start=None if start is None else start[s],
            )
        assert_close("attention", framework.numpy(out), want)
        assert_lse_close(framework.numpy(lse), want_lse, "float32", framework.device)


# ---- ragged attention --------------------------------------------------------------------------------------------------
