"""paged_attention, attention and merge_attention against float64: every option, on every backend; poison, hostile indices, empties.

SPDX-License-Identifier: Apache-2.0
"""

import dataclasses
import functools
import itertools

import frameworks
import numpy as np
import pytest
from attention_batch import (
    DTYPES,
    OPTIONS,
    QUANTIZED,
    Batch,
    draw,
    drawn_options,
    good_arguments,
    poison,
    random_mask,
)
from attention_variants import VARIANTS, refusal
from frameworks import Torch, as_float64, np_dtype
from reference import attention as reference
from reference import kv_cache
from tolerances import assert_close, assert_lse_close

import quire


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_framework(framework, rng, dtype):
    batch = Batch.make(
        rng, q_lens=[1, 5], kv_lens=[20, 9], heads=4, kv_heads=2, dim=64, block_size=8, dtype=dtype
    )
    batch.check(framework)
    positional, keywords = batch.arguments(framework)
    assert type(quire.paged_attention(*positional, **keywords)) is type(positional[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [8, 16, 40, 64, 72, 80, 96, 112, 120, 128, 192, 200, 256])
@pytest.mark.parametrize("decode", [True, False], ids=["decode", "mixed"])
def test_head_dims(backend, rng, decode, dim, dtype):
    q_lens = [1, 1, 1] if decode else [1, 17, 40]
    batch = Batch.make(
        rng,
        q_lens=q_lens,
        kv_lens=[1, 150, 67],
        heads=4,
        kv_heads=2,
        dim=dim,
        block_size=16,
        dtype=dtype,
        decode=decode,
    )
    batch.check(backend)


@pytest.mark.parametrize("block_size", [1, 2, 3, 5, 8, 16, 17, 32, 61, 64, 128, 256])
@pytest.mark.parametrize("decode", [True, False], ids=["decode", "mixed"])
def test_block_sizes(backend, rng, decode, block_size):
    q_lens = [1, 1, 1, 1] if decode else [3, 1, 33, 70]
    batch = Batch.make(
        rng,
        q_lens=q_lens,
        kv_lens=[5, 129, 300, 70],
        heads=8,
        kv_heads=2,
        dim=64,
        block_size=block_size,
        dtype="bfloat16",
        decode=decode,
    )
    batch.check(backend)


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 7, 8, 16, 40])
@pytest.mark.parametrize("decode", [True, False], ids=["decode", "mixed"])
def test_gqa_ratios(backend, rng, decode, group):
    q_lens = [1, 1] if decode else [19, 2]
    batch = Batch.make(
        rng,
        q_lens=q_lens,
        kv_lens=[45, 200],
        heads=2 * group,
        kv_heads=2,
        dim=64,
        block_size=16,
        dtype="float16",
        decode=decode,
    )
    batch.check(backend)


@pytest.mark.parametrize(
    "kv_len", [1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129, 255, 257, 511, 513, 1025, 4097]
)
def test_decode_lengths(backend, rng, kv_len):
    for dtype in ("bfloat16", "float32"):
        batch = Batch.make(
            rng,
            q_lens=[1, 1],
            kv_lens=[kv_len, 3],
            heads=4,
            kv_heads=1,
            dim=64,
            block_size=16,
            dtype=dtype,
            decode=True,
        )
        batch.check(backend)


@pytest.mark.parametrize(
    ("dim", "kv_dtype"),
    [
        *itertools.product([64, 128, 256], ["bfloat16", "float8_e4m3fn"]),
        (80, "bfloat16"),
        (128, "int8"),
    ],
)
@pytest.mark.parametrize(
    "kv_lens",
    [
        [700],
        [5000],
        [600, 640, 0],
        [4000, 5, 900],
        [2000, 400],
        [130] * 31 + [100],
        [60] * 40 + [40] * 24,
        [1 + 37 * i % 900 for i in range(64)],
    ],
    ids=["one", "one_long", "alike", "unlike", "alike_in_window", "a_cta_each", "rounds", "many_unlike"],
)
def test_decode_batches(backend, rng, kv_lens, dim, kv_dtype):
    """Few sequences and many, of lengths that are alike or not: who has which keys differs."""
    kv_heads, group = 8, 8 if kv_dtype == "bfloat16" else 4
    batch = Batch.make(
        rng,
        q_lens=[1] * len(kv_lens),
        kv_lens=kv_lens,
        heads=group * kv_heads,
        kv_heads=kv_heads,
        dim=dim,
        block_size=16,
        dtype="bfloat16",
        kv_dtype=kv_dtype,
        scales=kv_heads if kv_dtype != "bfloat16" else 0,
        decode=True,
    )
    batch.check(backend)
    batch.check(backend, window=(300, -1), sinks=rng.standard_normal(group * kv_heads).astype(np.float32))


FILL_SHARED_MEMORY = r"""
extern "C" __global__ void fill(int num_words, unsigned* out) {
  extern __shared__ unsigned words[];
  for (int i = threadIdx.x; i < num_words; i += blockDim.x) words[i] = ~0u;
  __syncthreads();
  out[blockIdx.x] = words[blockIdx.x % num_words];
}
"""


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize("kv_lens", [[4096], [1000] * 3, [3000, 40] * 40], ids=["one", "alike", "unlike"])
def test_hidden_blocks_over_leftovers(kv_lens, kv_dtype):
    """Blocks that the table hides take nothing from what another kernel left in shared memory, here NaN."""
    if not frameworks.has_gpu():
        pytest.skip("no CUDA device, or a CPU-only build")
    cupy, torch = pytest.importorskip("cupy"), pytest.importorskip("torch")
    attributes = cupy.cuda.Device().attributes
    num_bytes, num_ctas = attributes["MaxSharedMemoryPerBlockOptin"], 2 * attributes["MultiProcessorCount"]
    fill = cupy.RawKernel(FILL_SHARED_MEMORY, "fill")
    fill.max_dynamic_shared_size_bytes = num_bytes
    left = cupy.empty(num_ctas, np.uint32)
    blocks = -(-max(kv_lens) // 16)
    cache = torch.ones(blocks, 16, 8, 128, device="cuda").to(getattr(torch, kv_dtype))
    q = torch.ones(len(kv_lens), 64, 128, device="cuda", dtype=torch.bfloat16)
    tables = torch.arange(blocks, device="cuda", dtype=torch.int32).repeat(len(kv_lens), 1)
    tables[:, 2::3] = -1
    tables[:, :2] = -1
    tables[:, 8:40] = -1
    lens = torch.tensor(kv_lens, device="cuda", dtype=torch.int32)
    out = torch.empty_like(q)
    for _ in range(3):
        fill((num_ctas,), (256,), (num_bytes // 4, left), shared_mem=num_bytes)
        cupy.cuda.Device().synchronize()
        quire.paged_attention(q, cache, cache, tables, lens, out=out)
        # Up to 48 keys the table hides all.
        assert torch.all(out == (lens > 48)[:, None, None])


@pytest.mark.parametrize("q_len", [1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 200])
@pytest.mark.parametrize("extra", [0, 1, 100])
def test_prefill_lengths(backend, rng, q_len, extra):
    batch = Batch.make(
        rng,
        q_lens=[q_len],
        kv_lens=[q_len + extra],
        heads=2,
        kv_heads=1,
        dim=64,
        block_size=16,
        dtype="bfloat16",
    )
    batch.check(backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("option", list(OPTIONS))
@pytest.mark.parametrize("decode", [True, False], ids=["decode", "mixed"])
def test_options(backend, rng, decode, option, dtype):
    heads = 6
    options = drawn_options(rng, option, heads)
    q_lens = [1, 1, 1] if decode else [21, 1, 80]
    batch = Batch.make(
        rng,
        q_lens=q_lens,
        kv_lens=[33, 130, 90],
        heads=heads,
        kv_heads=2,
        dim=64,
        block_size=16,
        dtype=dtype,
        decode=decode,
    )
    batch.check(backend, **options)


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


@pytest.mark.parametrize("layout", ["heads_first", "pool", "interleaved", "packed_kv"])
def test_cache_layouts(backend, rng, layout):
    batch = Batch.make(
        rng, q_lens=[1, 20], kv_lens=[45, 31], heads=4, kv_heads=2, dim=64, block_size=16, dtype="bfloat16"
    )
    want, _ = batch.reference()
    positional, keywords = batch.arguments(backend)
    k, v = batch.k_cache, batch.v_cache
    swap = (lambda x: x.swapaxes(1, 2)) if backend.name == "numpy" else (lambda x: x.transpose(1, 2))
    if layout == "heads_first":
        pool = backend.array(np.stack([np.ascontiguousarray(x.swapaxes(1, 2)) for x in (k, v)]))
        views = swap(pool[0]), swap(pool[1])
    elif layout == "pool":
        pool = backend.array(np.stack([k, v]))
        views = pool[0], pool[1]
    elif layout == "interleaved":
        pool = backend.array(np.stack([k, v], axis=1))
        views = pool[:, 0], pool[:, 1]
    else:
        pool = backend.array(np.concatenate([k, v], axis=-1))
        views = pool[..., :64], pool[..., 64:]
    out = quire.paged_attention(positional[0], *views, *positional[3:], **keywords)
    assert_close("attention", backend.numpy(out), want)


def test_strided_queries_and_outputs(backend, rng):
    """q as a slice of a packed projection, out as a view of a wider tensor, tables with a pitch."""
    batch = Batch.make(
        rng, q_lens=[3, 9], kv_lens=[33, 9], heads=4, kv_heads=2, dim=64, block_size=16, dtype="float16"
    )
    want, _ = batch.reference()
    positional, keywords = batch.arguments(backend)
    packed = backend.array(np.concatenate([batch.q, poison(batch.q.shape, "float16")], axis=1))
    wide = backend.array(np.zeros((12, 8, 64), np.float16))
    tables = backend.strided(batch.block_tables, 3)
    out = wide[:, 2:6]
    quire.paged_attention(
        packed[:, :4], positional[1], positional[2], tables, positional[4], **keywords, out=out
    )
    assert_close("attention", backend.numpy(out), want)
    assert (backend.numpy(wide)[:, 6:] == 0).all()


def test_misaligned_rows(backend, rng):
    """Pointers that allow no 16-byte access."""
    batch = Batch.make(
        rng, q_lens=[1, 8], kv_lens=[40, 20], heads=2, kv_heads=1, dim=64, block_size=8, dtype="bfloat16"
    )
    want, _ = batch.reference()
    positional, keywords = batch.arguments(backend)

    def shift(x):
        flat = np.concatenate([np.zeros(1, x.dtype), x.ravel()])
        return backend.array(flat)[1:].reshape(x.shape)

    out = quire.paged_attention(
        shift(batch.q), shift(batch.k_cache), shift(batch.v_cache), *positional[3:], **keywords
    )
    assert_close("attention", backend.numpy(out), want)


def test_long_context_split(backend, rng):
    """Long sequences beside short ones: whatever the split, the same result."""
    batch = Batch.make(
        rng,
        q_lens=[1, 1, 1, 1],
        kv_lens=[20000, 1, 333, 5000],
        heads=8,
        kv_heads=1,
        dim=128,
        block_size=16,
        dtype="bfloat16",
        decode=True,
    )
    batch.check(backend)


def test_runs_are_bitwise_equal(backend, rng):
    batch = Batch.make(
        rng, q_lens=[1, 40], kv_lens=[3000, 64], heads=8, kv_heads=2, dim=64, block_size=16, dtype="float16"
    )
    positional, keywords = batch.arguments(backend)
    first = backend.numpy(quire.paged_attention(*positional, **keywords))
    for _ in range(5):
        np.testing.assert_array_equal(
            first.view(np.uint16),
            backend.numpy(quire.paged_attention(*positional, **keywords)).view(np.uint16),
        )


def test_workspace(backend, rng):
    """The size is known beforehand, its contents do not matter, and one that is too small is refused."""
    batch = Batch.make(
        rng,
        q_lens=[1, 1],
        kv_lens=[700, 20],
        heads=8,
        kv_heads=2,
        dim=64,
        block_size=16,
        dtype="float16",
        decode=True,
    )
    positional, keywords = batch.arguments(backend)
    size = quire.paged_attention_workspace_size(2, 2, 8, 64, backend.device)
    want = backend.numpy(quire.paged_attention(*positional, **keywords))
    if backend.device == "cpu":
        assert size == 0
        return
    for fill in (0, 255):
        space = backend.array(np.full(size, fill, np.uint8))
        got = backend.numpy(quire.paged_attention(*positional, **keywords, workspace=space))
        np.testing.assert_array_equal(got.view(np.uint16), want.view(np.uint16))
    if size > 0:
        with pytest.raises(
            ValueError, match=rf"workspace: expected uint8 \[{size}\] or longer, got uint8 \[{size - 1}\]"
        ):
            quire.paged_attention(
                *positional, **keywords, workspace=backend.array(np.zeros(size - 1, np.uint8))
            )


# ---- masks -------------------------------------------------------------------------------------------------------------


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


def run_variant(backend, variant, batch, positional, keywords):
    """Output and LSE by one CUDA kernel; None where it must be refused, and is."""
    if backend.device == "cpu":
        pytest.skip("the variants are CUDA kernels")
    capability = backend.torch.cuda.get_device_capability()
    dim, dtype, kv_dtype = batch.q.shape[2], batch.q.dtype.name, batch.k_cache.dtype.name
    call = functools.partial(quire.paged_attention, *positional, **keywords, variant=variant, return_lse=True)
    if reason := refusal(variant, capability, dim, dtype, kv_dtype):
        with pytest.raises(quire.UnsupportedError, match=reason):
            call()
        return None
    return call()


@pytest.mark.parametrize("dim", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "simt"])
def test_masks_in_every_kernel(backend, rng, variant, dim):
    q_lens = [3, 0, 70, 9]
    for kv_dtype in ("bfloat16", "float8_e4m3fn"):
        batch = Batch.make(
            rng,
            q_lens=q_lens,
            kv_lens=[200, 5, 90, 9],
            heads=8,
            kv_heads=2,
            dim=dim,
            block_size=16,
            dtype="bfloat16",
            kv_dtype=kv_dtype,
        )
        mask, start = random_mask(rng, sum(q_lens), 9), np.array([100, 0, 3, 0], np.int32)
        want, want_lse = batch.reference(mask=mask, mask_start=start)
        positional, keywords = batch.arguments(backend)
        keywords |= {"mask": backend.array(mask), "mask_start": backend.array(start)}
        results = run_variant(backend, variant, batch, positional, keywords)
        if results is None:
            continue
        out, lse = results
        assert_close("attention", backend.numpy(out), want)
        assert_lse_close(backend.numpy(lse), want_lse, "bfloat16", backend.device)


@pytest.mark.parametrize("dim", [64, 96, 120, 128, 256])
@pytest.mark.parametrize("group", [1, 2, 3, 4, 8, 16, 24, 32])
@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
def test_groups_in_hoppers_kernel(backend, rng, dtype, group, dim):
    """Query and output rows that are boxes of the copy engine and rows that are not; and a tile that is done again, for a NaN in V."""
    batch = Batch.make(
        rng,
        q_lens=[150, 0, 7, 33],
        kv_lens=[160, 5, 7, 100],
        heads=2 * group,
        kv_heads=2,
        dim=dim,
        block_size=16,
        dtype=dtype,
    )
    batch.v_cache[batch.block_tables[0, 9], 15, 0, 3] = np.nan  # the last query alone sees it
    want, want_lse = batch.reference()
    positional, keywords = batch.arguments(backend)
    results = run_variant(backend, "wgmma", batch, positional, keywords)
    if results is None:
        return
    out, lse = results
    assert_close("attention", backend.numpy(out), want)
    assert_lse_close(backend.numpy(lse), want_lse, dtype, backend.device, dim)


@pytest.mark.parametrize("dim", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e4m3fn"])
@pytest.mark.parametrize(
    ("slope", "options"),
    [(0.03, {}), (0.5, {"window": (37, -1)}), (4.0, {}), (4.0, {"causal": False, "window": (130, 9)})],
)
def test_scores_that_rise(backend, rng, dtype, dim, slope, options):
    """Scores that rise from key to key, or fall: by less than a power of two in a step of keys, and by more than float32 has room for. Rows'
    last keys lie in other steps than the tile's."""
    batch = Batch.make(
        rng,
        q_lens=[150, 33, 40],
        kv_lens=[400, 33, 290],
        heads=4,
        kv_heads=1,
        dim=dim,
        block_size=16,
        dtype=dtype,
    )
    kind = batch.q.dtype
    batch.q[...] = 0
    batch.q[:, :, 0] = rng.choice(np.float32([1, 2, 8, -8, 0.5]), batch.q.shape[:2]).astype(kind)
    for s, length in enumerate(batch.seq_lens):
        slots = np.arange(length)
        heights = np.minimum((length - slots) * np.float32(slope), 448).astype(kind)
        batch.k_cache[batch.block_tables[s][slots // 16], slots % 16, :, 0] = heights[:, None]
    want, want_lse = batch.reference(**options)
    positional, keywords = batch.arguments(backend)
    results = [quire.paged_attention(*positional, **keywords, **options, return_lse=True)]
    if backend.device != "cpu":
        results.append(run_variant(backend, "wgmma", batch, positional, keywords | options))
    for out, lse in filter(None, results):
        assert_close("attention", backend.numpy(out), want)
        assert_lse_close(backend.numpy(lse), want_lse, dtype, backend.device, dim)


@pytest.mark.parametrize("dim", [40, 64, 96, 128, 200, 256])
@pytest.mark.parametrize("variant", ["mma_split_rows", "mma_split_rows_128", "mma_split_rows_small"])
@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int8"])
def test_rows_kernels(backend, rng, variant, dim, kv_dtype):
    """Blocks that a warp copies by groups of keys and blocks that it does not, with and without holes in the table."""
    q_lens, kv_lens = [70, 0, 130, 1], [200, 5, 130, 333]
    for block_size, holes in [
        (8, True),
        (16, False),
        (16, True),
        (64, True),
        (5, False),
        (12, True),
        (1, True),
    ]:
        batch = Batch.make(
            rng,
            q_lens=q_lens,
            kv_lens=kv_lens,
            heads=8,
            kv_heads=2,
            dim=dim,
            block_size=block_size,
            dtype="bfloat16",
            kv_dtype=kv_dtype,
            scales=2 if kv_dtype == "int8" else 0,
        )
        positional, keywords = batch.arguments(backend)
        seen = {}
        if holes:
            # To the reference, keys of a hole are keys that a mask hides.
            hole = rng.random(batch.block_tables.shape) < 0.2
            positional[3] = backend.array(np.where(hole, np.int32(-1), batch.block_tables))
            bits = np.packbits(~np.repeat(hole, block_size, axis=1)[:, :336], axis=1, bitorder="little")
            seen = {"mask": np.repeat(bits, q_lens, axis=0), "mask_start": np.zeros(4, np.int32)}
        for options in ({}, {"causal": False, "window": (37, 9)}, {"softcap": 5.0, "window": (100, -1)}):
            results = run_variant(backend, variant, batch, positional, keywords | options)
            if results is None:
                return
            out, lse = results
            want, want_lse = batch.reference(**options, **seen)
            assert_close("attention", backend.numpy(out), want)
            assert_lse_close(backend.numpy(lse), want_lse, "bfloat16", backend.device)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    ("dim", "variant"), [(64, "mma_split_rows_128"), (128, "mma_split_rows_128"), (256, "mma_split_rows")]
)
@pytest.mark.parametrize("block_size", [0, 8, 16])
@pytest.mark.parametrize("causal", [True, False])
def test_plain_prefill(backend, rng, dtype, dim, variant, block_size, causal):
    """Calls with lengths alone, which have kernels of their own: queries without keys, keys that are not finite, a table with a hole."""
    if backend.device == "cpu":
        pytest.skip("the variants are CUDA kernels")
    if reason := refusal(variant, backend.torch.cuda.get_device_capability(), dim, dtype):
        pytest.skip(reason)
    heads, kv_heads = 12, 4
    q_lens, kv_lens = [70, 0, 45, 1, 60], [70, 9, 149, 8, 20]
    if block_size > 0:
        batch = Batch.make(
            rng,
            q_lens=q_lens,
            kv_lens=kv_lens,
            heads=heads,
            kv_heads=kv_heads,
            dim=dim,
            block_size=block_size,
            dtype=dtype,
        )
        tables = batch.block_tables
        q_all = batch.q
        keys = [
            np.concatenate([batch.k_cache[t] for t in row[: -(-n // block_size)]])[:n]
            for row, n in zip(tables, kv_lens)
        ]
        values = [
            np.concatenate([batch.v_cache[t] for t in row[: -(-n // block_size)]])[:n]
            for row, n in zip(tables, kv_lens)
        ]
    else:
        q_all = draw(rng, (sum(q_lens), heads, dim), dtype)
        keys = [draw(rng, (n, kv_heads, dim), dtype) for n in kv_lens]
        values = [draw(rng, (n, kv_heads, dim), dtype) for n in kv_lens]
    q_starts = np.concatenate([[0], np.cumsum(q_lens)]).astype(np.int32)
    kv_starts = np.concatenate([[0], np.cumsum(kv_lens)]).astype(np.int32)

    def run(k_list, v_list, hole):
        options = {"causal": causal, "return_lse": True, "variant": variant}
        starts = backend.array(q_starts)
        if block_size == 0:
            k, v = backend.array(np.concatenate(k_list)), backend.array(np.concatenate(v_list))
            result = quire.attention(
                backend.array(q_all),
                k,
                v,
                query_start_loc=starts,
                kv_start_loc=backend.array(kv_starts),
                **options,
            )
        else:
            k_cache, v_cache = batch.k_cache.copy(), batch.v_cache.copy()
            slots = [np.arange(n) for n in kv_lens]
            for row, at, k, v in zip(tables, slots, k_list, v_list, strict=True):
                k_cache[row[at // block_size], at % block_size] = k
                v_cache[row[at // block_size], at % block_size] = v
            table = tables.copy()
            if hole:
                table[2, 3] = -1
            arrays = [backend.array(x) for x in (q_all, k_cache, v_cache, table, batch.seq_lens)]
            result = quire.paged_attention(*arrays, query_start_loc=starts, **options)
        return tuple(backend.numpy(x) for x in result)

    def expect(hole):
        out, lse = np.empty(q_all.shape), np.empty(q_all.shape[:2])
        for s, (k, v) in enumerate(zip(keys, values, strict=True)):
            a, b = q_starts[s], q_starts[s + 1]
            if a == b:
                continue
            mask = None
            if hole and s == 2:
                bits = np.ones(kv_lens[s], bool)
                bits[3 * block_size : 4 * block_size] = False
                mask = np.tile(np.packbits(bits, bitorder="little"), (b - a, 1))
            out[a:b], lse[a:b] = reference.attend(
                as_float64(q_all[a:b]),
                as_float64(k),
                as_float64(v),
                q_start=kv_lens[s] - q_lens[s],
                causal=causal,
                **({"mask": mask, "mask_start": 0} if mask is not None else {}),
            )
        return out, lse

    for hole in (False, True) if block_size > 0 else (False,):
        got, got_lse = run(keys, values, hole)
        want, want_lse = expect(hole)
        assert_close("attention", got, want)
        assert_lse_close(got_lse, want_lse, dtype)

    # The last two keys' values: of a causal batch the last two queries alone see them.
    spoiled = [v.copy() for v in values]
    for v in spoiled:
        v[-2:, :, 3] = np.inf
        v[-1, :, 5] = np.nan
    got, _ = run(keys, spoiled, False)
    want, _ = expect(False)
    # Which key a query sees last, counted from the end.
    from_last = np.concatenate([q - np.arange(q) if causal else np.ones(q) for q in q_lens])
    np.testing.assert_array_equal(
        np.isposinf(got[:, :, 3]), np.repeat(from_last[:, None] <= 2, heads, axis=1)
    )
    np.testing.assert_array_equal(np.isnan(got[:, :, 5]), np.repeat(from_last[:, None] <= 1, heads, axis=1))
    for array in (got, want):
        array[:, :, [3, 5]] = 0
    assert_close("attention", got, want)


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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("option", list(OPTIONS))
def test_ragged(backend, rng, option, dtype):
    options = dict(OPTIONS[option])
    heads = 4
    if "alibi_slopes" in options:
        options["alibi_slopes"] = (2.0 ** -np.arange(1, heads + 1)).astype(np.float32)
    if "sinks" in options:
        options["sinks"] = rng.standard_normal(heads).astype(np.float32)
    q_starts, kv_starts = np.array([0, 5, 5, 70], np.int32), np.array([0, 40, 44, 150], np.int32)
    q = draw(rng, (70, heads, 64), dtype)
    k, v = draw(rng, (150, 2, 64), dtype), draw(rng, (150, 2, 64), dtype)
    converted = {n: backend.array(x) if isinstance(x, np.ndarray) else x for n, x in options.items()}
    out, lse = quire.attention(
        backend.array(q),
        backend.array(k),
        backend.array(v),
        query_start_loc=backend.array(q_starts),
        kv_start_loc=backend.array(kv_starts),
        return_lse=True,
        **converted,
    )
    if isinstance(options.get("window"), int):
        options["window"] = (options["window"], -1)
    want, want_lse = np.empty(q.shape), np.empty(q.shape[:2])
    for s in range(3):
        a, b, c, d = q_starts[s], q_starts[s + 1], kv_starts[s], kv_starts[s + 1]
        want[a:b], want_lse[a:b] = reference.attend(
            as_float64(q[a:b]), as_float64(k[c:d]), as_float64(v[c:d]), q_start=(d - c) - (b - a), **options
        )
    assert_close("attention", backend.numpy(out), want)
    assert_lse_close(backend.numpy(lse), want_lse, dtype, backend.device)


def test_ragged_single_sequence_and_defaults(framework, rng):
    q, k = draw(rng, (9, 4, 32), "float32"), draw(rng, (30, 2, 32), "float32")
    out = quire.attention(framework.array(q), framework.array(k), framework.array(k))
    want, _ = reference.attend(as_float64(q), as_float64(k), as_float64(k), q_start=21)
    assert_close("attention", framework.numpy(out), want)
    starts = np.array([0, 4, 9], np.int32)
    out = quire.attention(
        framework.array(q),
        framework.array(k[:9]),
        framework.array(k[:9]),
        query_start_loc=framework.array(starts),
    )
    want = np.concatenate(
        [
            reference.attend(as_float64(q[a:b]), as_float64(k[a:b]), as_float64(k[a:b]), q_start=0)[0]
            for a, b in ((0, 4), (4, 9))
        ]
    )
    assert_close("attention", framework.numpy(out), want)


@pytest.mark.parametrize("kv_dtype", QUANTIZED)
def test_ragged_quantized(backend, rng, kv_dtype):
    q = draw(rng, (33, 4, 64), "bfloat16")
    scale = np.array([0.02, 0.03], np.float32)
    k = kv_cache.store(rng.standard_normal((33, 2, 64)).astype(np.float32), scale, kv_dtype)
    out = quire.attention(
        backend.array(q),
        backend.array(k),
        backend.array(k),
        k_scale=backend.array(scale),
        v_scale=backend.array(scale),
    )
    wide = kv_cache.load(k, scale)
    want, _ = reference.attend(as_float64(q), wide, wide, q_start=0)
    assert_close("attention", backend.numpy(out), want)


# ---- merge -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 7, 64, 128, 256])
def test_merge(backend, rng, dim, dtype):
    a, b = draw(rng, (13, 3, dim), dtype), draw(rng, (13, 3, dim), dtype)
    lse_a, lse_b = (
        (5 * rng.standard_normal((13, 3))).astype(np.float32),
        (5 * rng.standard_normal((13, 3))).astype(np.float32),
    )
    lse_a[0], lse_b[1], lse_a[2], lse_b[2] = -np.inf, -np.inf, -np.inf, -np.inf
    a[0] = b[1] = a[2] = b[2] = 0
    out, lse = quire.merge_attention(*(backend.array(x) for x in (a, lse_a, b, lse_b)))
    want, want_lse = reference.merge(
        as_float64(a), lse_a.astype(np.float64), as_float64(b), lse_b.astype(np.float64)
    )
    assert_close("merge", backend.numpy(out), want)
    assert_lse_close(backend.numpy(lse), want_lse, "float32", backend.device)
    assert (backend.numpy(out)[2].astype(np.float32) == 0).all()


def test_merge_ignores_the_output_of_an_empty_state(backend):
    """-inf means no keys: whatever stands in that output, NaN included, is not used."""
    a, b = np.ones((1, 1, 8), np.float32), np.full((1, 1, 8), np.nan, np.float32)
    zero, empty = np.zeros((1, 1), np.float32), np.full((1, 1), -np.inf, np.float32)
    out, _ = quire.merge_attention(*(backend.array(x) for x in (a, zero, b, empty)))
    np.testing.assert_array_equal(backend.numpy(out), 1.0)


def test_merge_keeps_nan(backend):
    """A NaN of either side is no empty state, whatever the other side is."""
    ones, nan = np.ones((1, 1, 8), np.float32), np.full((1, 1), np.nan, np.float32)
    for other in (0.0, -np.inf):
        lse = np.full((1, 1), other, np.float32)
        for lse_a, lse_b in ((lse, nan), (nan, lse)):
            out, out_lse = quire.merge_attention(*(backend.array(x) for x in (ones, lse_a, ones, lse_b)))
            assert np.isnan(backend.numpy(out)).all()
            assert np.isnan(backend.numpy(out_lse)).all()


def test_merge_in_place(framework, rng):
    a, b = draw(rng, (4, 2, 16), "float32"), draw(rng, (4, 2, 16), "float32")
    lse_a, lse_b = draw(rng, (4, 2), "float32"), draw(rng, (4, 2), "float32")
    want, want_lse = reference.merge(as_float64(a), as_float64(lse_a), as_float64(b), as_float64(lse_b))
    arrays = [framework.array(x) for x in (a, lse_a, b, lse_b)]
    if framework.writable:
        quire.merge_attention(*arrays, out=arrays[0], out_lse=arrays[1])
        got, lse = arrays[0], arrays[1]
    else:
        got, lse = quire.merge_attention(*arrays)
    assert_close("merge", framework.numpy(got), want)
    assert_lse_close(framework.numpy(lse), want_lse, "float32", framework.device)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_huge_batches_are_refused_by_name(torch, device):
    """And before a workspace is made for them."""
    if device == "cuda" and not (frameworks.has_gpu() and torch.cuda.is_available()):
        pytest.skip("no CUDA device")
    q, cache = torch.ones(4, 2, 64, device=device), torch.ones(3, 16, 1, 64, device=device)
    tables = torch.zeros(4, 2, dtype=torch.int32, device=device)
    loc = torch.zeros(5, dtype=torch.int32, device=device)
    for num_seqs in (2**29, 2**31, 2**40):
        many = loc[:1].expand(num_seqs)
        with pytest.raises(
            ValueError, match=r"\[paged_attention\] seq_lens: expected a contiguous tensor, got"
        ):
            quire.paged_attention(q, cache, cache, tables, many, query_start_loc=loc)
        with pytest.raises(
            ValueError, match=r"\[attention\] query_start_loc: expected a contiguous tensor, got"
        ):
            quire.attention(q, q[:, :1], q[:, :1], query_start_loc=many)
        with pytest.raises(
            quire.UnsupportedError, match=r"\[attention\] q: expected num_tokens \* num_heads of at most"
        ):
            quire.attention(q[:1].expand(num_seqs, 2, 64), q[:, :1], q[:, :1], out=q)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 40])
def test_softcaps_that_do_not_bite(backend, rng, dtype, rows):
    """tanh of next to nothing keeps its digits: a cap far above the scores is none."""
    q, k, v = (draw(rng, shape, dtype) for shape in ((rows, 4, 64), (100, 2, 64), (100, 2, 64)))
    arrays = [backend.array(x) for x in (q, k, v)]
    plain = backend.numpy(quire.attention(*arrays, causal=False))
    for softcap in (5e3, 1e5, 1e7, 1e30):
        out = backend.numpy(quire.attention(*arrays, causal=False, softcap=softcap))
        assert_close("attention", out, as_float64(plain))


def test_split_and_merge_equals_whole(backend, rng):
    """Attention over two halves of the keys, merged, is attention over all of them."""
    q, k, v = (
        draw(rng, (6, 4, 64), "float32"),
        draw(rng, (100, 2, 64), "float32"),
        draw(rng, (100, 2, 64), "float32"),
    )
    bq = backend.array(q)
    parts = [
        quire.attention(bq, backend.array(k[part]), backend.array(v[part]), causal=False, return_lse=True)
        for part in (slice(0, 37), slice(37, 100))
    ]
    out, lse = quire.merge_attention(*parts[0], *parts[1])
    want, want_lse = reference.attend(as_float64(q), as_float64(k), as_float64(v), q_start=0, causal=False)
    assert_close("attention", backend.numpy(out), want)
    assert_lse_close(backend.numpy(lse), want_lse, "float32", backend.device)


# ---- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "error", "text"),
    [
        (
            "q",
            np.ones((2, 4, 12), np.float32),
            quire.UnsupportedError,
            r"q: expected a head_dim that is a multiple of 8, from 8 to 256, got 12",
        ),
        ("q", np.ones((2, 4, 264), np.float32), quire.UnsupportedError, r"from 8 to 256, got 264"),
        ("q", np.ones((2, 4, 24), np.float32), ValueError, r"k_cache: expected head_dim 24 like q, got 16"),
        (
            "q",
            np.ones((2, 3, 16), np.float32),
            ValueError,
            r"q: expected a num_heads that is a positive multiple of num_kv_heads 2, got 3",
        ),
        (
            "q",
            np.ones((3, 4, 16), np.float32),
            ValueError,
            r"out: expected float32 \[3, 4, 16\] like q|q: expected one token",
        ),
        (
            "q",
            np.ones((2, 4, 16), np.int8),
            TypeError,
            r"q: expected float32, float16, bfloat16 or float8_e4m3fn, got int8",
        ),
        (
            "k_cache",
            np.ones((3, 4, 2, 16), np.float16),
            TypeError,
            r"k_cache: expected float32, float8_e4m3fn, float8_e5m2 or int8, got float16",
        ),
        (
            "v_cache",
            np.ones((3, 4, 1, 16), np.float32),
            ValueError,
            r"v_cache: expected float32 \[3, 4, 2, 16\] like k_cache",
        ),
        (
            "k_cache",
            np.ones((3, 0, 2, 16), np.float32),
            ValueError,
            r"expected float32 \[3, 0, 2, 16\] like k_cache|block_size of 1 or more",
        ),
        (
            "block_tables",
            np.zeros((2, 2), np.int64),
            TypeError,
            r"block_tables: expected int32 \[2, \*\], got int64 \[2, 2\]$",
        ),
        (
            "block_tables",
            np.zeros((3, 2), np.int32),
            ValueError,
            r"block_tables: expected int32 \[2, \*\], got int32 \[3, 2\]",
        ),
        ("seq_lens", np.full(2, 4, np.int64), TypeError, r"seq_lens: expected int32 \[\*\], got int64 \[2\]"),
        (
            "query_start_loc",
            np.zeros(2, np.int32),
            ValueError,
            r"query_start_loc: expected int32 \[3\], got int32 \[2\]",
        ),
        ("out", np.ones((2, 4, 16), np.float16), TypeError, r"out: expected float32 like q"),
        ("scale", float("inf"), ValueError, r"scale: expected a finite number, got inf"),
        ("softcap", -1.0, ValueError, r"softcap: expected 0 \(none\) or more"),
        ("window", (1, 2, 3), ValueError, r"window: expected an int or \(left, right\), got \(1, 2, 3\)"),
        ("window", "wide", TypeError, r"window: expected an integer, got str"),
        (
            "alibi_slopes",
            np.ones(3, np.float32),
            ValueError,
            r"alibi_slopes: expected float32 \[4\], got float32 \[3\]",
        ),
        ("sinks", np.ones(4, np.float16), TypeError, r"sinks: expected float32 \[4\], got float16 \[4\]"),
        (
            "k_scale",
            np.ones(3, np.float32),
            ValueError,
            r"k_scale: expected float32 \[1\] or \[2\], got float32 \[3\]",
        ),
        (
            "v_scale",
            np.ones(1, np.float32),
            ValueError,
            r"v_scale: expected none for float32 keys and values",
        ),
        ("mask", np.zeros((2, 1), np.int8), TypeError, r"mask: expected uint8 \[2, \*\], got int8"),
        ("mask", np.zeros((2, 1), bool), TypeError, r"mask: expected uint8 \[2, \*\], got bool"),
        (
            "mask",
            np.zeros((3, 1), np.uint8),
            ValueError,
            r"mask: expected uint8 \[2, \*\], got uint8 \[3, 1\]",
        ),
        (
            "mask",
            np.zeros((2, 4), np.uint8)[:, ::2],
            ValueError,
            r"mask: expected stride 1 in the last dimension",
        ),
        (
            "mask_start",
            np.zeros(2, np.int32),
            ValueError,
            r"mask: expected uint8 .* with mask_start, got none",
        ),
        ("validate", "all", ValueError, r'validate: expected "shape" or "full", got "all"'),
    ],
)
def test_bad_calls(name, value, error, text):
    arguments = good_arguments()
    out = arguments["out"]
    if name == "k_scale":
        arguments["k_cache"] = arguments["v_cache"] = np.ones((3, 4, 2, 16), np.int8)
    arguments[name] = value
    with pytest.raises(error, match=r"\[paged_attention\] .*" + text if "|" not in text else text):
        quire.paged_attention(**arguments)
    if name != "out":
        assert (out == 7.0).all()


def test_bad_mask_start():
    arguments = good_arguments() | {"mask": np.zeros((2, 1), np.uint8)}
    for bad, error in ((np.zeros(3, np.int32), ValueError), (np.zeros(2, np.int64), TypeError)):
        with pytest.raises(error, match=r"\[paged_attention\] mask_start: expected int32"):
            quire.paged_attention(**arguments, mask_start=bad)


def test_output_may_not_overlap_inputs():
    arguments = good_arguments()
    arguments["out"] = arguments["q"]
    with pytest.raises(ValueError, match=r"out: expected memory apart from q"):
        quire.paged_attention(**arguments)
    arguments = good_arguments()
    arguments["block_tables"] = arguments["out"].view(np.int32)[0, :2, :2]
    with pytest.raises(ValueError, match=r"out: expected memory apart from block_tables"):
        quire.paged_attention(**arguments)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("decode", [True, False], ids=["decode", "prefill"])
@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_error_at_most_half_again_torchs(torch, rng, device, decode, dtype):
    """Against float64, our error is at most 1.5 times that of torch's SDPA at the same dtype on the same device."""
    from frameworks import make

    made = make("torch", device)
    if isinstance(made, str):
        pytest.skip(f"torch on {device}: {made}")
    assert isinstance(made, Torch)
    q_len, kv_len, heads, dim = (1, 512, 8, 64) if decode else (256, 256, 4, 64)
    ours_error, theirs_error = [], []
    for _ in range(3):
        q, k, v = (
            draw(rng, (q_len, heads, dim), dtype),
            draw(rng, (kv_len, heads, dim), dtype),
            draw(rng, (kv_len, heads, dim), dtype),
        )
        want, _ = reference.attend(as_float64(q), as_float64(k), as_float64(v), q_start=kv_len - q_len)
        tq, tk, tv = (made.array(x) for x in (q, k, v))
        ours = as_float64(made.numpy(quire.attention(tq, tk, tv)))
        sdpa = torch.nn.functional.scaled_dot_product_attention(
            *(x.transpose(0, 1)[None] for x in (tq, tk, tv)), is_causal=not decode
        )
        theirs = as_float64(made.numpy(sdpa[0].transpose(0, 1)))
        ours_error.append(np.sqrt(((ours - want) ** 2).mean()))
        theirs_error.append(np.sqrt(((theirs - want) ** 2).mean()))
    assert np.mean(ours_error) <= 1.5 * np.mean(theirs_error)
