"""CUDA's attention kernels, each asked for by name, against float64.

SPDX-License-Identifier: Apache-2.0
"""

import functools

import numpy as np
import pytest
from attention_batch import (
    Batch,
    draw,
    random_mask,
)
from attention_variants import VARIANTS, refusal
from frameworks import as_float64
from reference import attention as reference
from tolerances import assert_close, assert_lse_close

import quire


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


def hiding(hole, block_size, q_lens):
    """To the reference, keys of a table's holes are keys that a mask hides."""
    bits = np.packbits(~np.repeat(hole, block_size, axis=1), axis=1, bitorder="little")
    return {"mask": np.repeat(bits, q_lens, axis=0), "mask_start": np.zeros(len(q_lens), np.int32)}


def check_by_default_and_wgmma(backend, batch, options):
    """By the kernel that the call takes of itself, and on a GPU by Hopper's too."""
    want, want_lse = batch.reference(**options)
    positional, keywords = batch.arguments(backend)
    results = [quire.paged_attention(*positional, **keywords, **options, return_lse=True)]
    if backend.device != "cpu":
        results.append(run_variant(backend, "wgmma", batch, positional, keywords | options))
    dtype, dim = batch.q.dtype.name, batch.q.shape[2]
    for out, lse in filter(None, results):
        assert_close("attention", backend.numpy(out), want)
        assert_lse_close(backend.numpy(lse), want_lse, dtype, backend.device, dim)


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
@pytest.mark.parametrize("block_size", [8, 16, 24, 48, 64, 256])
@pytest.mark.parametrize("kv_dtype", ["bfloat16", "float8_e4m3fn"])
def test_block_sizes_in_hoppers_kernel(backend, rng, kv_dtype, block_size, dim):
    """Boxes of as many keys as a block has and of fewer, with a hole in the table."""
    q_lens, kv_lens = [150, 0, 7, 33], [700, 5, 7, 300]
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
    )
    hole = np.zeros(batch.block_tables.shape, bool)
    hole[0, 300 // block_size] = hole[3, 0] = True
    want, want_lse = batch.reference(**hiding(hole, block_size, q_lens))
    positional, keywords = batch.arguments(backend)
    positional[3] = backend.array(np.where(hole, np.int32(-1), batch.block_tables))
    results = run_variant(backend, "wgmma", batch, positional, keywords)
    if results is None:
        return
    out, lse = results
    assert_close("attention", backend.numpy(out), want)
    assert_lse_close(backend.numpy(lse), want_lse, "bfloat16", backend.device)


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
    check_by_default_and_wgmma(backend, batch, options)


@pytest.mark.parametrize("dim", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e4m3fn"])
@pytest.mark.parametrize("num_high", [1, 1000])
def test_weights_that_float32_just_holds(backend, rng, dtype, dim, num_high):
    """Weights that float32 holds one by one, relative to the last keys, whose scores are 87 or 88 less: of one key, and of many, whose sum it does not
    hold. Rows differ by what all of their scores have in common, which is rounded differently once their base is larger."""
    lengths = [400, 300]
    batch = Batch.make(
        rng, q_lens=[130, 33], kv_lens=lengths, heads=4, kv_heads=1, dim=dim, block_size=16, dtype=dtype
    )
    kind = batch.q.dtype
    batch.q[...] = 0
    batch.q[:, :, 0] = 1
    batch.q[:, :, 1] = rng.choice(
        np.float32([0, 0.25, -0.3125, -7, 104, 120, 144, 208]), batch.q.shape[:2]
    ).astype(kind)
    for s, length in enumerate(lengths):
        slots = np.arange(length)
        high = (slots < length - 160) & (slots >= length - 160 - num_high)
        heights = np.where(high, np.float32(88 if dtype.startswith("float8") else 87.5), 0)
        batch.k_cache[batch.block_tables[s][slots // 16], slots % 16, :, 0] = heights.astype(kind)[:, None]
        batch.k_cache[batch.block_tables[s][slots // 16], slots % 16, :, 1] = 1
    options = {"causal": False, "scale": 1.0}
    check_by_default_and_wgmma(backend, batch, options)


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("num_high", [1, 1000])
def test_large_weights_of_large_scores(backend, rng, dtype, dim, num_high):
    """The same where all scores of a row are near 2^26 to 2^28, of which float32 has every 16th: what they have in common is then rounded by more than
    their weights can bear."""
    lengths = [400, 300]
    batch = Batch.make(
        rng, q_lens=[130, 33], kv_lens=lengths, heads=4, kv_heads=1, dim=dim, block_size=16, dtype=dtype
    )
    batch.q[...] = 0
    batch.q[:, :, 0] = 1
    batch.q[:, :, 1] = rng.choice(np.float32([4096, 8192, 12288, 16384]), batch.q.shape[:2])
    for s, length in enumerate(lengths):
        slots = np.arange(length)
        high = (slots < length - 160) & (slots >= length - 160 - num_high)
        batch.k_cache[batch.block_tables[s][slots // 16], slots % 16, :, 0] = np.where(high, 80, 0)[:, None]
        batch.k_cache[batch.block_tables[s][slots // 16], slots % 16, :, 1] = 12288
    want, _ = batch.reference(causal=False, scale=1.0)
    positional, keywords = batch.arguments(backend)
    keywords |= {"causal": False, "scale": 1.0}
    results = [(quire.paged_attention(*positional, **keywords), None)]
    if backend.device != "cpu":
        results.append(run_variant(backend, "wgmma", batch, positional, keywords))
    for out, _ in filter(None, results):
        assert_close("attention", backend.numpy(out), want)


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
            hole = rng.random(batch.block_tables.shape) < 0.2
            positional[3] = backend.array(np.where(hole, np.int32(-1), batch.block_tables))
            seen = hiding(hole, block_size, q_lens)
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
