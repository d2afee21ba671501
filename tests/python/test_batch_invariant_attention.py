"""batch_invariant=True: a row's bits depend on its own query and keys alone.

SPDX-License-Identifier: Apache-2.0
"""

import dataclasses

import numpy as np
import pytest
from attention_batch import DTYPES, OPTIONS, QUANTIZED, Batch, draw, drawn_options
from frameworks import np_dtype
from reference import kv_cache
from tolerances import assert_close

import quire


def bits(array):
    return np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}")


@dataclasses.dataclass
class Watched:
    """A sequence that is put into several batches."""

    q: np.ndarray  # [q_len, heads, dim]
    k: np.ndarray  # [kv_len, kv_heads, dim], as stored
    v: np.ndarray

    def put(self, batch, seq):
        starts = batch.query_start_loc
        first = seq if starts is None else starts[seq]
        batch.q[first : first + len(self.q)] = self.q
        slots = np.arange(len(self.k))
        block_size = batch.k_cache.shape[1]
        where = batch.block_tables[seq][slots // block_size], slots % block_size
        batch.k_cache[where], batch.v_cache[where] = self.k, self.v
        return slice(first, first + len(self.q))


def invariant_rows(backend, rng, watched, num_others, *, dtype, kv_dtype, q_lens=None, **options):
    """The bits of each watched sequence's rows, among others at random places, in blocks of random numbers."""
    num_seqs = len(watched) + num_others
    places = rng.permutation(num_seqs)[: len(watched)]
    decode = all(len(w.q) == 1 for w in watched) and q_lens is None
    lens, queries = rng.integers(1, 90, num_seqs), np.ones(num_seqs, int)
    if q_lens is not None:
        queries = rng.choice(q_lens, num_seqs)
    for place, w in zip(places, watched, strict=True):
        lens[place], queries[place] = len(w.k), len(w.q)
    heads, dim = watched[0].q.shape[1:]
    batch = Batch.make(
        rng,
        q_lens=queries,
        kv_lens=lens,
        heads=heads,
        kv_heads=watched[0].k.shape[1],
        dim=dim,
        block_size=16,
        dtype=dtype,
        kv_dtype=kv_dtype,
        decode=decode,
    )
    rows = [w.put(batch, place) for place, w in zip(places, watched, strict=True)]
    positional, keywords = batch.arguments(backend)
    out, lse = quire.paged_attention(
        *positional, **keywords, return_lse=True, batch_invariant=True, **options
    )
    return [(bits(backend.numpy(out)[r]), bits(backend.numpy(lse)[r])) for r in rows]


def assert_same_bits(got, want):
    for (out, lse), (want_out, want_lse) in zip(got, want, strict=True):
        np.testing.assert_array_equal(out, want_out)
        np.testing.assert_array_equal(lse, want_lse)


def draw_stored(rng, shape, dtype):
    x = rng.standard_normal(shape).astype(np.float32)
    return kv_cache.store(x, None, dtype) if dtype in QUANTIZED else x.astype(np_dtype(dtype))


@pytest.mark.parametrize("group", [4, 20])
@pytest.mark.parametrize(
    ("dtype", "kv_dtype", "dim"),
    [
        ("float32", "float32", 64),
        ("bfloat16", "bfloat16", 128),
        ("float16", "float16", 256),
        ("bfloat16", "float8_e4m3fn", 64),
        ("bfloat16", "float8_e4m3fn", 128),
        ("float16", "int8", 40),
    ],
)
def test_batch_invariance(backend, rng, dtype, kv_dtype, dim, group):
    watched = [
        Watched(
            draw(rng, (1, 2 * group, dim), dtype),
            draw_stored(rng, (n, 2, dim), kv_dtype),
            draw_stored(rng, (n, 2, dim), kv_dtype),
        )
        for n in (1, 600, 11000)
    ]
    options = {"dtype": dtype, "kv_dtype": kv_dtype}
    want = [invariant_rows(backend, rng, [w], 0, **options)[0] for w in watched]
    for num_seqs in (2, 3, 8, 64, 257):
        some = [int(i) for i in rng.permutation(3)[: min(num_seqs, 3)]]
        got = invariant_rows(backend, rng, [watched[i] for i in some], num_seqs - len(some), **options)
        assert_same_bits(got, [want[i] for i in some])
    # Beside prefills.
    assert_same_bits(invariant_rows(backend, rng, watched, 5, q_lens=[1, 1, 30], **options), want)


@pytest.mark.parametrize("finite", [True, False], ids=["finite", "infinite"])
@pytest.mark.parametrize(
    ("kv_dtype", "dim"),
    [
        ("bfloat16", 64),
        ("bfloat16", 80),
        ("bfloat16", 128),
        ("bfloat16", 256),
        ("float8_e4m3fn", 64),
        ("float8_e4m3fn", 96),
        ("float8_e4m3fn", 128),
        ("float8_e5m2", 256),
    ],
)
def test_batch_invariance_where_lengths_are_alike(backend, rng, kv_dtype, dim, finite):
    """Several CTAs, one, or a part of one's time for a tile, by the number of sequences; and stretches beside a long one."""
    watched = [
        Watched(
            draw(rng, (1, 8, dim), "bfloat16"),
            draw_stored(rng, (n, 2, dim), kv_dtype),
            draw_stored(rng, (n, 2, dim), kv_dtype),
        )
        for n in (1, 560)
    ]
    if not finite:
        watched[1].v[[3, 540], 0, 5] = np.nan if kv_dtype != "bfloat16" else np.inf
    options = {"dtype": "bfloat16", "kv_dtype": kv_dtype}
    want = [invariant_rows(backend, rng, [w], 0, **options)[0] for w in watched]
    for num_seqs in (2, 20, 64, 257, 520):
        got = invariant_rows(backend, rng, watched, num_seqs - 2, **options)
        assert_same_bits(got, want)
    long = Watched(watched[1].q, watched[1].k.repeat(10, 0), watched[1].v.repeat(10, 0))
    assert_same_bits(invariant_rows(backend, rng, [*watched, long], 61, **options)[:2], want)


@pytest.mark.parametrize("block_size", [1, 2, 8, 24, 32])
@pytest.mark.parametrize(
    ("kv_dtype", "dim"), [("bfloat16", 80), ("bfloat16", 128), ("float8_e4m3fn", 64), ("int8", 128)]
)
def test_batch_invariant_decode_with_holes_in_tables(backend, rng, kv_dtype, dim, block_size):
    """As without it, and the same alone, where lengths are alike and where one is long."""
    num_seqs = 40
    for kv_lens in (
        rng.integers(600, 700, num_seqs),
        rng.permutation([9000, *rng.integers(1, 400, num_seqs - 1)]),
    ):
        batch = Batch.make(
            rng,
            q_lens=[1] * num_seqs,
            kv_lens=kv_lens,
            heads=8,
            kv_heads=2,
            dim=dim,
            block_size=block_size,
            dtype="bfloat16",
            kv_dtype=kv_dtype,
            scales=2 if kv_dtype == "int8" else 0,
            decode=True,
        )
        batch.block_tables[rng.random(batch.block_tables.shape) < 0.1] = -1

        def rows(batch, batch_invariant=True):
            positional, keywords = batch.arguments(backend)
            result = quire.paged_attention(
                *positional, **keywords, return_lse=True, batch_invariant=batch_invariant
            )
            return [backend.numpy(x) for x in result]

        together = rows(batch)
        assert_close("attention", together[0], rows(batch, batch_invariant=False)[0].astype(np.float64))
        for seq in (0, int(np.argmax(kv_lens)), num_seqs - 1):
            alone = dataclasses.replace(
                batch,
                q=batch.q[seq : seq + 1],
                block_tables=batch.block_tables[seq : seq + 1],
                seq_lens=batch.seq_lens[seq : seq + 1],
            )
            for got, want in zip(rows(alone), together, strict=True):
                np.testing.assert_array_equal(bits(got[0]), bits(want[seq]))


@pytest.mark.parametrize("group", [1, 5, 8])
@pytest.mark.parametrize(
    ("kv_dtype", "dim"), [("bfloat16", 128), ("float8_e4m3fn", 64), ("float8_e4m3fn", 128)]
)
def test_batch_invariance_of_tiles_of_many_parts(backend, rng, kv_dtype, dim, group):
    """Alone, among sequences as long, and beside a long one."""
    watched = [
        Watched(
            draw(rng, (1, 2 * group, dim), "bfloat16"),
            draw_stored(rng, (n, 2, dim), kv_dtype),
            draw_stored(rng, (n, 2, dim), kv_dtype),
        )
        for n in (2100, 2130)
    ]
    options = {"dtype": "bfloat16", "kv_dtype": kv_dtype}
    want = [invariant_rows(backend, rng, [w], 0, **options)[0] for w in watched]
    others = [Watched(watched[0].q, watched[i % 2].k, watched[i % 2].v) for i in range(62)]
    assert_same_bits(invariant_rows(backend, rng, [*watched, *others], 0, **options)[:2], want)
    long = Watched(watched[1].q, watched[1].k.repeat(8, 0), watched[1].v.repeat(8, 0))
    assert_same_bits(invariant_rows(backend, rng, [*watched, long], 61, **options)[:2], want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("finite", [True, False], ids=["finite", "infinite"])
@pytest.mark.parametrize(
    "option", [{}, {"window": 700}, {"softcap": 5.0}, {"causal": False, "window": (300, 4)}], ids=str
)
def test_a_row_has_the_same_bits_in_decode_and_prefill(backend, rng, option, finite, dim, dtype):
    """Query i of a chunk sees what a decode sees whose sequence ends there."""
    num_keys, q_len = 1500, 37
    q = draw(rng, (q_len, 8, dim), dtype)
    k, v = (draw(rng, (num_keys, 2, dim), dtype) for _ in "kv")
    if not finite:
        # Keys whose weight is 0, or not, for all or for the last queries.
        k[[700, 1480], 0] *= 60
        v[[700, 900, 1480], 0, 3] = np.inf
    options = {"dtype": dtype, "kv_dtype": dtype, **option}
    (out, lse) = invariant_rows(backend, rng, [Watched(q, k, v)], 2, q_lens=[1, 50], **options)[0]
    right = option["window"][1] if isinstance(option.get("window"), tuple) else 0
    for i in (0, 1, 17, 35, 36):
        end = num_keys - q_len + i + 1
        if right > 0:
            # The query and those that follow it, as a chunk of another length.
            chunk = Watched(q[i : i + right + 1], k[: end + right], v[: end + right])
            if len(chunk.q) <= right:
                continue
        else:
            chunk = Watched(q[i : i + 1], k[:end], v[:end])
        got = invariant_rows(backend, rng, [chunk], 1, **options)[0]
        np.testing.assert_array_equal(got[0][0], out[i])
        np.testing.assert_array_equal(got[1][0], lse[i])


@pytest.mark.parametrize("decode", [True, False], ids=["decode", "mixed"])
@pytest.mark.parametrize("option", list(OPTIONS))
def test_batch_invariant_options(backend, rng, option, decode):
    """Right, not only the same."""
    batch = Batch.make(
        rng,
        q_lens=[1, 1, 1] if decode else [3, 0, 20],
        kv_lens=[2500, 0, 90],
        heads=6,
        kv_heads=2,
        dim=64,
        block_size=16,
        dtype="float16",
        decode=decode,
    )
    batch.check(backend, batch_invariant=True, **drawn_options(rng, option, 6))
