"""write_kv, gather_kv, copy_blocks, swap_blocks and KVCache on every framework and backend.

SPDX-License-Identifier: Apache-2.0
"""

import gc

import numpy as np
import pytest
from frameworks import np_dtype
from reference import kv_cache as reference

import quire

DTYPES = ["float32", "float16", "bfloat16"]
CACHE_DTYPES = [*DTYPES, "float8_e4m3fn", "float8_e5m2", "int8"]


def draw(rng, shape, dtype, scale=1.0):
    return (scale * rng.standard_normal(shape)).astype(np.float32).astype(np_dtype(dtype))


def poisoned(shape, dtype):
    """Every byte 0xFF: NaN in each float dtype."""
    return (
        np.full((*shape, np_dtype(dtype).itemsize), 0xFF, np.uint8)
        .reshape(*shape[:-1], -1)
        .view(np_dtype(dtype))
    )


def bits(x):
    return np.ascontiguousarray(x).view(np.uint8)


@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scales", ["none", "tensor", "head"])
def test_write_and_gather(backend, rng, dtype, cache_dtype, scales):
    """Exact, bit for bit; slots that were not named keep their bits."""
    if scales != "none" and cache_dtype in DTYPES:
        x, cache = np.ones((1, 1, 8), np_dtype(dtype)), np.zeros((1, 1, 1, 8), np_dtype(cache_dtype))
        arguments = [backend.array(a) for a in (x, x, cache, cache.copy(), np.zeros(1, np.int64))]
        with pytest.raises(
            ValueError,
            match=rf"k_scale: expected none for {cache_dtype} keys and values \(scales belong to float8 and int8\)",
        ):
            quire.write_kv(*arguments, k_scale=backend.array(np.ones(1, np.float32)))
        return
    num_tokens, heads, dim, blocks, block_size = 23, 3, 40, 7, 5
    k, v = draw(rng, (num_tokens, heads, dim), dtype, 3.0), draw(rng, (num_tokens, heads, dim), dtype, 3.0)
    slots = rng.permutation(blocks * block_size)[:num_tokens]
    slots[4] = -1
    count = {"none": 0, "tensor": 1, "head": heads}[scales]
    k_scale = (0.01 + rng.random(count)).astype(np.float32) if count else None
    v_scale = (0.01 + rng.random(count)).astype(np.float32) if count else None
    k_cache, v_cache = (poisoned((blocks, block_size, heads, dim), cache_dtype) for _ in range(2))
    bk_cache, bv_cache = backend.array(k_cache), backend.array(v_cache)
    scale_arguments = {
        name: None if s is None else backend.array(s)
        for name, s in (("k_scale", k_scale), ("v_scale", v_scale))
    }
    assert (
        quire.write_kv(
            backend.array(k), backend.array(v), bk_cache, bv_cache, backend.array(slots), **scale_arguments
        )
        is None
    )
    for cache, x, scale, got in ((k_cache, k, k_scale, bk_cache), (v_cache, v, v_scale, bv_cache)):
        want = cache.reshape(blocks * block_size, heads, dim).copy()
        stored = reference.store(x.astype(np.float32), scale, cache_dtype)
        kept = slots >= 0
        want[slots[kept]] = stored[kept]
        np.testing.assert_array_equal(bits(backend.numpy(got)), bits(want.reshape(cache.shape)))
    gathered = quire.gather_kv(bk_cache, bv_cache, backend.array(slots), **scale_arguments)
    out_dtype = "float32" if cache_dtype in ("float8_e4m3fn", "float8_e5m2", "int8") else cache_dtype
    for cache, scale, got in ((bk_cache, k_scale, gathered[0]), (bv_cache, v_scale, gathered[1])):
        rows = backend.numpy(cache).reshape(blocks * block_size, heads, dim)[slots]
        want = reference.load(rows, scale)
        want[slots < 0] = 0.0
        host = backend.numpy(got)
        assert host.dtype == np_dtype(out_dtype)
        np.testing.assert_allclose(
            host.astype(np.float64),
            want,
            rtol={"float32": 2e-7, "float16": 5e-4, "bfloat16": 4e-3}[out_dtype],
            atol=1e-30,
        )


@pytest.mark.parametrize("cache_dtype", ["float8_e4m3fn", "float8_e5m2", "int8"])
def test_rounding_and_saturation(backend, cache_dtype):
    """Every 16-bit float, through the cache: the same bits as the reference, halves, overflow, infinity and NaN included."""
    x = np.arange(65536, dtype=np.uint16).view(np.float16).reshape(512, 1, 128)
    cache = np.zeros((512, 1, 1, 128), np_dtype(cache_dtype))
    bk, bv = backend.array(cache), backend.array(cache)
    quire.write_kv(backend.array(x), backend.array(x), bk, bv, backend.array(np.arange(512)))
    want = reference.store(x.astype(np.float32), None, cache_dtype)
    got = backend.numpy(bk).reshape(want.shape)
    nan = np.isnan(x)
    if cache_dtype != "int8":
        assert np.isnan(got[nan].astype(np.float32)).all()
        np.testing.assert_array_equal(bits(got[~nan]), bits(want[~nan]))
    else:
        np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(bits(backend.numpy(bv)), bits(backend.numpy(bk)))


@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES)
@pytest.mark.parametrize("heads_dim", [(8, 128), (3, 24), (1, 4096), (2, 17)])
@pytest.mark.parametrize("pad", [0, 8])
@pytest.mark.parametrize(("num_tokens", "block_size"), [(1300, 16), (70, 16), (70, 12)])
def test_token_counts(backend, rng, num_tokens, block_size, heads_dim, cache_dtype, pad):
    """More tokens than fill a device, and few: rows that are dense on both sides, and rows that are not; some skipped, one out of range."""
    heads, dim = heads_dim
    blocks = num_tokens // block_size + 9
    k, v = (draw(rng, (num_tokens, heads, dim), "bfloat16") for _ in range(2))
    slots = rng.permutation(blocks * block_size)[:num_tokens]
    slots[rng.integers(0, num_tokens, 40)] = -1
    slots[num_tokens // 2] = blocks * block_size
    scale = None if cache_dtype in DTYPES else np.array([0.5 if pad else 0.0371], np.float32)
    scales = {} if scale is None else {"k_scale": backend.array(scale), "v_scale": backend.array(scale)}
    caches = [backend.array(poisoned((blocks, block_size, heads, dim), cache_dtype)) for _ in range(2)]
    quire.write_kv(backend.strided(k, pad), backend.strided(v, pad), *caches, backend.array(slots), **scales)
    kept = (slots >= 0) & (slots < blocks * block_size)
    for x, got in zip((k, v), caches):
        want = poisoned((blocks * block_size, heads, dim), cache_dtype)
        want[slots[kept]] = reference.store(x.astype(np.float32), scale, cache_dtype)[kept]
        np.testing.assert_array_equal(bits(backend.numpy(got)), bits(want.reshape(backend.numpy(got).shape)))
    out = tuple(backend.strided(poisoned(k.shape, "float32"), pad) for _ in range(2))
    quire.gather_kv(*caches, backend.array(slots), out=out, **scales)
    for cache, got in zip(caches, out):
        rows = backend.numpy(cache).reshape(blocks * block_size, heads, dim)[np.where(kept, slots, 0)]
        want = np.where(kept[:, None, None], reference.load(rows, scale), 0.0)
        np.testing.assert_array_equal(backend.numpy(got), want.astype(np.float32))
    with pytest.raises(IndexError, match=r"slot_mapping: expected a value in range"):
        quire.check_errors(backend.device)


@pytest.mark.parametrize("dim", [1, 3, 8, 64, 96, 128, 200])
@pytest.mark.parametrize("heads", [1, 8, 40])
def test_sizes(backend, rng, heads, dim):
    k = draw(rng, (50, heads, dim), "bfloat16")
    slots = rng.permutation(64)[:50].astype(np.int32)
    cache = np.zeros((4, 16, heads, dim), np_dtype("bfloat16"))
    bk, bv = backend.array(cache), backend.array(cache)
    quire.write_kv(backend.array(k), backend.array(k), bk, bv, backend.array(slots))
    want = cache.reshape(64, heads, dim).copy()
    want[slots] = k
    np.testing.assert_array_equal(bits(backend.numpy(bk)), bits(want.reshape(cache.shape)))
    np.testing.assert_array_equal(bits(backend.numpy(bv)), bits(want.reshape(cache.shape)))


@pytest.mark.parametrize("layout", ["heads_first", "pool", "interleaved", "packed_kv"])
def test_cache_layouts(backend, rng, layout):
    """[num_blocks, heads, block_size, dim] as a view, a [2, num_blocks, ...] pool, an interleaved pool, and K beside V in a row."""
    blocks, size, heads, dim = 6, 4, 2, 16
    k, v = draw(rng, (10, heads, dim), "float16"), draw(rng, (10, heads, dim), "float16")
    slots = rng.permutation(blocks * size)[:10]
    shape = {
        "heads_first": (2, blocks, heads, size, dim),
        "pool": (2, blocks, size, heads, dim),
        "interleaved": (blocks, 2, size, heads, dim),
        "packed_kv": (blocks, size, heads, 2 * dim),
    }[layout]
    pool = backend.array(poisoned(shape, "float16"))

    def views(x):
        if layout == "heads_first":
            return tuple(
                c.swapaxes(1, 2) if isinstance(c, np.ndarray) else c.transpose(1, 2) for c in (x[0], x[1])
            )
        if layout == "pool":
            return x[0], x[1]
        if layout == "interleaved":
            return x[:, 0], x[:, 1]
        return x[..., :dim], x[..., dim:]

    k_cache, v_cache = views(pool)
    quire.write_kv(backend.array(k), backend.array(v), k_cache, v_cache, backend.array(slots))
    got_k, got_v = quire.gather_kv(k_cache, v_cache, backend.array(slots))
    np.testing.assert_array_equal(bits(backend.numpy(got_k)), bits(k))
    np.testing.assert_array_equal(bits(backend.numpy(got_v)), bits(v))
    host_k, host_v = views(backend.numpy(pool))
    for host in (host_k, host_v):
        untouched = np.setdiff1d(np.arange(blocks * size), slots)
        assert np.isnan(host[untouched // size, untouched % size].astype(np.float32)).all()


@pytest.mark.parametrize("index_dtype", [np.int32, np.int64])
def test_hostile_slots(backend, rng, index_dtype):
    limits = np.iinfo(index_dtype)
    slots = np.array([0, -1, 8, -2, limits.max, limits.min, 7, 9 * 4], index_dtype)
    k = draw(rng, (8, 1, 16), "float32")
    cache = np.zeros((2, 4, 1, 16), np.float32)
    bk, bv = backend.array(cache), backend.array(cache)
    quire.write_kv(backend.array(k), backend.array(k), bk, bv, backend.array(slots))
    want = cache.reshape(8, 1, 16).copy()
    want[0], want[7] = k[0], k[6]
    np.testing.assert_array_equal(backend.numpy(bk).reshape(8, 1, 16), want)
    with pytest.raises(
        IndexError, match=r"\[write_kv\] slot_mapping: expected a value in range \(or -1 to skip\), got "
    ):
        quire.check_errors(backend.device)
    got, _ = quire.gather_kv(bk, bv, backend.array(slots))
    host = backend.numpy(got)
    np.testing.assert_array_equal(host[1:6], 0.0)
    np.testing.assert_array_equal(host[6], k[6])
    with pytest.raises(IndexError, match=r"\[gather_kv\] slot_mapping"):
        quire.check_errors(backend.device)
    # -1 alone is no error.
    quire.write_kv(
        backend.array(k[:1]), backend.array(k[:1]), bk, bv, backend.array(np.array([-1], index_dtype))
    )
    quire.check_errors(backend.device)


def test_no_tokens_and_no_blocks(backend):
    empty = np.zeros((0, 1, 8), np.float32)
    cache = np.zeros((2, 4, 1, 8), np.float32)
    quire.write_kv(*(backend.array(x) for x in (empty, empty, cache, cache.copy(), np.zeros(0, np.int64))))
    none = np.zeros((0, 4, 1, 8), np.float32)
    one = np.ones((1, 1, 8), np.float32)
    quire.write_kv(*(backend.array(x) for x in (one, one, none, none.copy(), np.array([-1]))))
    got, _ = quire.gather_kv(backend.array(none), backend.array(none), backend.array(np.array([-1])))
    np.testing.assert_array_equal(backend.numpy(got), 0.0)


def test_every_framework(framework, rng):
    k = draw(rng, (6, 2, 16), "bfloat16")
    cache = np.zeros((3, 4, 2, 16), np_dtype("bfloat16"))
    slots = np.array([3, 0, 11, 5, 6, -1], np.int32)
    arrays = [framework.array(x) for x in (k, k, cache, cache, slots)]
    if not framework.writable:
        with pytest.raises(
            ValueError, match=r"\[write_kv\] k_cache: expected a writable tensor, got a JAX array"
        ):
            quire.write_kv(*arrays)
        out, _ = quire.gather_kv(arrays[2], arrays[3], arrays[4])
        assert type(out) is type(arrays[0])
        return
    quire.write_kv(*arrays)
    out, _ = quire.gather_kv(arrays[2], arrays[3], arrays[4])
    assert type(out) is type(arrays[0])
    want = k.copy()
    want[5] = 0
    np.testing.assert_array_equal(bits(framework.numpy(out)), bits(want))


@pytest.mark.parametrize("dtype", [*CACHE_DTYPES, "uint8", "int32", "int64"])
def test_copy_blocks(backend, rng, dtype):
    cache = rng.integers(0, 100, (9, 3, 2, 20)).astype(np.float32).astype(np_dtype(dtype))
    pairs = np.array([[0, 8], [0, 3], [5, 1]])
    moved = backend.array(cache)
    quire.copy_blocks(moved, backend.array(pairs))
    want = cache.copy()
    want[pairs[:, 1]] = cache[pairs[:, 0]]
    np.testing.assert_array_equal(bits(backend.numpy(moved)), bits(want))


def test_copy_blocks_of_a_view(backend, rng):
    pool = rng.integers(0, 250, (2, 6, 4, 33)).astype(np.uint8)
    moved = backend.array(pool)
    quire.copy_blocks(moved[1], backend.array(np.array([[5, 0]], np.int32)))
    want = pool.copy()
    want[1, 0] = pool[1, 5]
    np.testing.assert_array_equal(backend.numpy(moved), want)
    interleaved = backend.array(pool)
    view = interleaved.swapaxes(0, 1) if backend.name == "numpy" else interleaved.transpose(0, 1)
    quire.copy_blocks(view, backend.array(np.array([[5, 0]], np.int32)))
    want = pool.copy()
    want[:, 0] = pool[:, 5]
    np.testing.assert_array_equal(backend.numpy(interleaved), want)


def test_copy_blocks_guards(backend):
    cache = np.arange(8, dtype=np.float32).reshape(4, 2)
    moved = backend.array(cache)
    quire.copy_blocks(moved, backend.array(np.array([[-1, 0], [0, -1], [1, 2]])))
    want = cache.copy()
    want[2] = cache[1]
    np.testing.assert_array_equal(backend.numpy(moved), want)
    quire.check_errors(backend.device)
    quire.copy_blocks(moved, backend.array(np.array([[4, 0], [0, 1 << 40], [-5, 3]])))
    np.testing.assert_array_equal(backend.numpy(moved), want)
    with pytest.raises(IndexError, match=r"\[copy_blocks\] pairs"):
        quire.check_errors(backend.device)


def test_swap_blocks(backend, rng):
    host = rng.integers(0, 250, (7, 2, 3, 8)).astype(np.uint8)
    device = backend.array(np.zeros((9, 2, 3, 8), np.uint8))
    pairs = np.array([[0, 2], [1, 3], [2, 4], [6, 0]])
    quire.swap_blocks(device, host, pairs)
    want = np.zeros((9, 2, 3, 8), np.uint8)
    want[pairs[:, 1]] = host[pairs[:, 0]]
    np.testing.assert_array_equal(backend.numpy(device), want)
    back = np.zeros_like(host)
    quire.swap_blocks(back, device, pairs[:, ::-1].copy())
    backend.synchronize()
    np.testing.assert_array_equal(back[pairs[:, 0]], host[pairs[:, 0]])
    within = backend.array(np.zeros((9, 2, 3, 8), np.uint8))
    quire.swap_blocks(within, device, pairs[:1, ::-1].copy())
    np.testing.assert_array_equal(backend.numpy(within)[0], host[0])


@pytest.mark.parametrize("pinned", [True, False])
@pytest.mark.parametrize(
    ("layers", "blocks", "heads"), [(1, 1100, 1), (3, 600, 3), (2, 40, 1100)], ids=lambda n: str(n)
)
def test_swap_blocks_of_many_pairs(backend, rng, layers, blocks, heads, pinned):
    """More than one launch has, single ones and runs, of blocks that are no whole number of a CTA's pieces; there and back."""
    sizes = (2, heads, 8, "float16")
    device = quire.KVCache(layers, blocks, *sizes, backend.device)
    host, back = (
        quire.KVCache(layers, blocks, *sizes, "cpu", pinned=pinned and backend.device != "cpu") for _ in "ab"
    )
    values = host.pool.numpy().view(np.uint16)
    values[...] = rng.integers(0, 1 << 16, values.shape)
    back.pool.numpy().view(np.uint16)[...] = 7
    source, target = rng.permutation(blocks), rng.permutation(blocks)
    source[10:15], target[10:15] = np.sort(source[10:15]), np.sort(target[10:15])
    pairs = np.stack([source, target], 1)[: blocks - 2]
    device.swap_blocks_from(host, pairs)
    back.swap_blocks_from(device, pairs[:, ::-1].copy())
    backend.synchronize()
    want = np.full_like(values, 7)
    want[:, :, pairs[:, 0]] = values[:, :, pairs[:, 0]]
    np.testing.assert_array_equal(back.pool.numpy().view(np.uint16), want)
    inner = quire.KVCache(layers, blocks, *sizes, backend.device)
    inner.swap_blocks_from(device, pairs[:, ::-1].copy())
    back.swap_blocks_from(inner, np.stack([source, source], 1)[: blocks - 2])
    backend.synchronize()
    np.testing.assert_array_equal(back.pool.numpy().view(np.uint16), want)


def test_swap_blocks_to_one_destination(backend, rng):
    """The last pair wins, as in a loop."""
    host = quire.KVCache(1, 64, 2, 1, 8, "float16", "cpu", pinned=backend.device != "cpu")
    device = quire.KVCache(1, 8, 2, 1, 8, "float16", backend.device)
    back = quire.KVCache(1, 8, 2, 1, 8, "float16", "cpu", pinned=backend.device != "cpu")
    values = host.pool.numpy()
    values[...] = rng.standard_normal(values.shape)
    order = rng.permutation(64)
    device.swap_blocks_from(host, np.stack([order, np.arange(64) % 8], 1))
    back.swap_blocks_from(device, np.stack([np.arange(8)] * 2, 1))
    backend.synchronize()
    np.testing.assert_array_equal(back.pool.numpy(), values[:, :, order[56:]])


def test_swap_blocks_of_long_and_short_runs(backend, rng):
    """A run of more than the bytes from which a transfer is as fast as any, among single blocks."""
    shape = (48, 1 << 18)
    host = quire.empty(shape, "uint8", "cpu", pinned=backend.device != "cpu")
    device, back = quire.empty(shape, "uint8", backend.device), quire.empty(shape, "uint8", "cpu")
    values = host.numpy()
    values[...] = rng.integers(0, 256, shape, dtype=np.uint8)
    pairs = np.array([[0, 40], *([i, i] for i in range(4, 28)), [30, 1], [2, 47]])
    quire.swap_blocks(device, host, pairs)
    quire.swap_blocks(back, device, pairs[:, ::-1].copy())
    backend.synchronize()
    np.testing.assert_array_equal(back.numpy()[pairs[:, 0]], values[pairs[:, 0]])


def test_swap_blocks_between_layouts(backend, rng):
    """From a [num_blocks, ...] pool into one layer of an interleaved pool."""
    host = rng.integers(0, 250, (5, 4, 8)).astype(np.uint8)
    pool = backend.array(np.zeros((6, 4, 2, 8), np.uint8))
    quire.swap_blocks(pool[:, :, 1], host, np.array([[4, 0], [0, 5]]))
    want = np.zeros((6, 4, 2, 8), np.uint8)
    want[0, :, 1], want[5, :, 1] = host[4], host[0]
    np.testing.assert_array_equal(backend.numpy(pool), want)


def test_heads_first_views(backend, rng):
    """[num_blocks, num_kv_heads, block_size, head_dim] pools, taken as strided views."""
    pool = rng.integers(0, 250, (5, 2, 3, 8)).astype(np.uint8)
    moved, other = backend.array(pool), backend.array(np.zeros_like(pool))

    def view(x):
        return x.swapaxes(1, 2) if isinstance(x, np.ndarray) else x.transpose(1, 2)

    quire.copy_blocks(view(moved), backend.array(np.array([[4, 0]])))
    want = pool.copy()
    want[0] = pool[4]
    np.testing.assert_array_equal(backend.numpy(moved), want)
    quire.swap_blocks(view(other), view(moved), np.array([[3, 1], [4, 2]]))
    np.testing.assert_array_equal(backend.numpy(other)[1:3], want[3:5])
    with pytest.raises(ValueError, match=r"src: expected strides in the order of dst's"):
        quire.swap_blocks(np.zeros((5, 3, 2, 8), np.uint8), view(pool), np.array([[0, 0]]))


def test_scales_apart_from_caches():
    pool = np.zeros(64, np.uint8)
    cache = pool[:32].view(np.int8).reshape(1, 4, 1, 8)
    scale = pool[28:32].view(np.float32)
    k = np.ones((1, 1, 8), np.float32)
    with pytest.raises(ValueError, match=r"expected memory apart from k_scale"):
        quire.write_kv(k, k, cache, np.zeros((1, 4, 1, 8), np.int8), np.zeros(1, np.int64), k_scale=scale)


def test_swap_blocks_refuses():
    dst, src = np.zeros((4, 8), np.float32), np.ones((2, 8), np.float32)
    for pairs, text in [
        ([[2, 0]], r"pairs: expected a block id in \[0, 2\), got 2 at \[0, 0\]"),
        ([[0, 0], [0, 4]], r"pairs: expected a block id in \[0, 4\), got 4 at \[1, 1\]"),
        ([[0, -1]], r"got -1 at \[0, 1\]"),
    ]:
        with pytest.raises(IndexError, match=text):
            quire.swap_blocks(dst, src, np.array(pairs))
    assert (dst == 0).all()
    with pytest.raises(ValueError, match=r"src: expected blocks of dst's shape"):
        quire.swap_blocks(dst, np.ones((2, 9), np.float32), np.array([[0, 0]]))
    with pytest.raises(TypeError, match=r"pairs: expected int64, got int32"):
        quire.swap_blocks(dst, src, np.array([[0, 0]], np.int32))


@pytest.mark.parametrize(
    ("name", "value", "error", "text"),
    [
        ("k", np.zeros((2, 1, 7), np.float32), ValueError, r"v: expected float32 \[2, 1, 7\] like k"),
        ("v", np.zeros((2, 1, 8), np.float16), TypeError, r"v: expected float32 like k, got float16"),
        (
            "k_cache",
            np.zeros((2, 4, 2, 8), np.float32),
            ValueError,
            r"k_cache: expected float32 \[\*, \*, 1, 8\], got float32 \[2, 4, 2, 8\]",
        ),
        (
            "v_cache",
            np.zeros((2, 4, 1, 8), np.int8),
            TypeError,
            r"v_cache: expected float32 like k_cache, got int8",
        ),
        (
            "v_cache",
            np.zeros((3, 4, 1, 8), np.float32),
            ValueError,
            r"v_cache: expected float32 \[2, 4, 1, 8\] like k_cache",
        ),
        (
            "k_cache",
            np.zeros((2, 4, 1, 8), np.int32),
            TypeError,
            r"k_cache: expected float32, float16, .* or int8, got int32",
        ),
        (
            "slot_mapping",
            np.zeros(3, np.int64),
            ValueError,
            r"slot_mapping: expected int64 \[2\], got int64 \[3\]",
        ),
        (
            "slot_mapping",
            np.zeros(2, np.float32),
            TypeError,
            r"slot_mapping: expected int32 or int64, got float32",
        ),
        (
            "k_scale",
            np.ones(2, np.float32),
            ValueError,
            r"k_scale: expected float32 \[1\] or \[1\], got float32 \[2\]",
        ),
        ("v_scale", np.ones(1, np.float16), TypeError, r"v_scale: expected float32, got float16"),
    ],
)
def test_bad_calls(name, value, error, text):
    arguments = {
        "k": np.ones((2, 1, 8), np.float32),
        "v": np.ones((2, 1, 8), np.float32),
        "k_cache": np.zeros((2, 4, 1, 8), np.int8 if name.endswith("scale") else np.float32),
        "v_cache": np.zeros((2, 4, 1, 8), np.int8 if name.endswith("scale") else np.float32),
        "slot_mapping": np.arange(2),
    }
    caches = arguments["k_cache"], arguments["v_cache"]
    arguments[name] = value
    with pytest.raises(error, match=r"\[write_kv\] " + text):
        quire.write_kv(**arguments)
    assert all((cache == 0).all() for cache in caches)


def test_one_cache_as_both():
    k, cache = np.ones((1, 1, 8), np.float32), np.zeros((2, 4, 1, 8), np.float32)
    with pytest.raises(ValueError, match=r"k_cache: expected memory apart from v_cache"):
        quire.write_kv(k, k, cache, cache, np.arange(1))


# ---- KVCache -----------------------------------------------------------------------------------------------------------


def test_kv_cache_sizes():
    assert quire.KVCache.num_bytes(2, 10, 16, 8, 128, "bfloat16") == 2 * 2 * 10 * 16 * 8 * 128 * 2
    assert quire.KVCache.num_blocks_for(10**6, 2, 16, 8, 128, "int8") == 10**6 // (2 * 2 * 16 * 8 * 128)
    assert quire.KVCache.num_blocks_for(10, 2, 16, 8, 128, "int8") == 0
    with pytest.raises(TypeError, match=r"\[KVCache\] num_bytes: expected an integer, got float"):
        quire.KVCache.num_blocks_for(1e6, 2, 16, 8, 128, "int8")
    cache = quire.KVCache(2, 10, 16, 8, 128, np.float16)
    assert (cache.num_layers, cache.num_blocks, cache.block_size, cache.num_kv_heads, cache.head_dim) == (
        2,
        10,
        16,
        8,
        128,
    )
    assert (cache.dtype, cache.device) == ("float16", "cpu")
    assert cache.num_bytes_allocated == quire.KVCache.num_bytes(2, 10, 16, 8, 128, "float16")
    assert cache.pool.data_ptr % 64 == 0
    assert cache.v(1).shape == (10, 16, 8, 128)
    assert cache.v(1).data_ptr - cache.pool.data_ptr == 3 * 10 * 16 * 8 * 128 * 2


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((0, 1, 1, 1, 8, "float32"), ValueError, r"\[KVCache\] num_layers: expected 1 or more, got 0"),
        ((1, -3, 1, 1, 8, "float32"), ValueError, r"num_blocks: expected 1 or more, got -3"),
        ((1, 2.5, 1, 1, 8, "float32"), TypeError, r"num_blocks: expected an integer, got float"),
        ((1, 1, 1, 1, 8, "int64"), TypeError, r"dtype: expected one of float32, .*, got int64"),
        ((1, 1, 1, 1, 8, None), TypeError, r"\[KVCache\] dtype: expected one of float32, .*, got None"),
        ((1, 1, 1, 1, 8, 7), TypeError, r"\[KVCache\] dtype: expected one of float32, .*, got 7"),
        ((1, 1, 1, 1, 8, "float7"), TypeError, r"dtype: expected one of float32, .*, got float7"),
        ((2**31, 2**31, 2**10, 1, 8, "float32"), ValueError, r"expected a size that fits in 64 bits"),
        ((1, 2**40, 16, 8, 128, "float32"), MemoryError, r"could not get \d+ bytes"),
    ],
)
def test_kv_cache_refuses(arguments, error, text):
    with pytest.raises(error, match=text):
        quire.KVCache(*arguments)
    with pytest.raises(ValueError, match='expected "cpu", "cuda" or "cuda:<index>", got tpu'):
        quire.KVCache(1, 1, 1, 1, 8, "float32", "tpu")
    with pytest.raises(IndexError):
        quire.KVCache(1, 1, 1, 1, 8, "float32").k(1)


def test_swap_blocks_from_refuses():
    cache = quire.KVCache(2, 1, 1, 1, 8, "float32")
    pairs = np.zeros((1, 2), np.int64)
    for thing in (5, None, cache.pool):
        with pytest.raises(TypeError, match=r"\[KVCache\] src: expected a quire.KVCache, got "):
            cache.swap_blocks_from(thing, pairs)
    with pytest.raises(ValueError, match=r"\[KVCache\] src: expected 2 layers, got 1"):
        cache.swap_blocks_from(quire.KVCache(1, 1, 1, 1, 8, "float32"), pairs)


def test_gather_kv_refuses_what_is_no_pair():
    cache, out = np.zeros((2, 4, 1, 8), np.float32), np.zeros((1, 1, 8), np.float32)
    for given, error in (((out,), ValueError), ((out, out, out), ValueError), (5, TypeError)):
        with pytest.raises(error, match=r"\[gather_kv\] out: expected a pair \(k, v\), got "):
            quire.gather_kv(cache, cache, np.zeros(1, np.int64), out=given)


def test_kv_cache_refusals_name_it():
    with pytest.raises(
        ValueError, match=r"\[KVCache\] device: expected \"cpu\", \"cuda\" or \"cuda:<index>\", got x"
    ):
        quire.KVCache(1, 1, 1, 1, 8, "float32", "x")
    with pytest.raises(ValueError, match=r"\[KVCache.export_blocks\] device: expected"):
        quire.KVCache(1, 1, 1, 1, 8, "float32").export_blocks([0], device="x")
    if not quire.has_cuda():
        with pytest.raises(
            quire.UnsupportedError, match=r"\[KVCache\] device: expected cpu, got cuda: this build"
        ):
            quire.KVCache(1, 1, 1, 1, 8, "float32", "cuda")
        with pytest.raises(
            quire.UnsupportedError, match=r"\[KVCache\] pinned: expected False, got True: this build"
        ):
            quire.KVCache(1, 1, 1, 1, 8, "float32", pinned=True)
        with pytest.raises(
            quire.UnsupportedError, match=r"\[empty\] device: expected cpu, got cuda: this build"
        ):
            quire.empty((1,), "float32", "cuda")


def test_kv_cache_beyond_available_memory():
    """More than is available, less than there is: refused at once, not when the memory is touched."""
    with open("/proc/meminfo") as file:
        fields = dict(line.split(":") for line in file)
    total = 1024 * int(fields["MemTotal"].split()[0])
    blocks = quire.KVCache.num_blocks_for(int(0.999 * total), 1, 16, 8, 128, "float32")
    with pytest.raises(MemoryError, match=r"expected memory on cpu, could not get \d+ bytes"):
        quire.KVCache(1, blocks, 16, 8, 128, "float32")


def test_kv_cache_moves_all_layers(backend, rng):
    """Runs of adjacent pairs, single ones, and other numbers of blocks on the two sides."""
    device = quire.KVCache(3, 9, 2, 1, 8, "float16", backend.device)
    host = quire.KVCache(3, 6, 2, 1, 8, "float16", "cpu", pinned=backend.device != "cpu")
    back = quire.KVCache(3, 9, 2, 1, 8, "float16", "cpu")
    values = host.pool.numpy()
    values[...] = rng.standard_normal(values.shape)
    pairs = np.array([[0, 4], [1, 5], [2, 6], [5, 0], [4, 1]])
    device.swap_blocks_from(host, pairs)
    device.copy_blocks(backend.array(np.array([[5, 8], [0, 2]])))
    every = np.array([[i, i] for i in range(9)])
    back.swap_blocks_from(device, every)
    backend.synchronize()
    got = back.pool.numpy()
    np.testing.assert_array_equal(got[:, :, pairs[:, 1]], values[:, :, pairs[:, 0]])
    np.testing.assert_array_equal(got[:, :, [8, 2]], values[:, :, [1, 5]])


def test_tensor_transpose():
    x = quire.empty((2, 3, 4), "float32", "cpu")
    x.numpy()[...] = np.arange(24).reshape(2, 3, 4)
    np.testing.assert_array_equal(x.transpose(0, 2).numpy(), x.numpy().transpose(2, 1, 0))
    with pytest.raises(
        IndexError, match=r"\[Tensor.transpose\] dim1: expected 0 or more and less than 3, got 3"
    ):
        x.transpose(0, 3)


@pytest.mark.parametrize("dtype", CACHE_DTYPES)
def test_kv_cache_zero_copy(dtype):
    cache = quire.KVCache(2, 3, 4, 1, 8, dtype)
    view = cache.k(1).numpy()
    assert view.dtype == np_dtype(dtype)
    assert view.shape == (3, 4, 1, 8)
    view.view(np.uint8)[...] = 0x38
    assert (cache.k(1).numpy().view(np.uint8) == 0x38).all()
    assert view.__array_interface__["data"][0] == cache.k(1).data_ptr


def test_kv_cache_outlives_its_owner(torch):
    """Whoever is dropped first: the views keep the memory, and the memory goes with the last of them."""
    cache = quire.KVCache(1, 64, 16, 8, 128, "float32")
    first, second = torch.from_dlpack(cache.k(0)), np.from_dlpack(cache.v(0))
    first.fill_(3.0)
    address = cache.k(0).data_ptr
    tensor = cache.layer(0)
    del cache
    gc.collect()
    assert first.data_ptr() == address
    assert bool((first == 3.0).all())
    del first
    gc.collect()
    second[...] = 1.0
    assert float(np.from_dlpack(tensor)[1].sum()) == second.size
    del tensor
    gc.collect()
    assert float(second.mean()) == 1.0


def test_kv_cache_on_every_device(framework, rng):
    if not framework.writable:
        pytest.skip(f"{framework}: JAX arrays cannot be written")
    cache = quire.KVCache(2, 4, 4, 2, 16, "float16", framework.device)
    k = draw(rng, (5, 2, 16), "float16")
    slots = framework.array(np.array([1, 3, 5, 7, 9]))
    quire.write_kv(framework.array(k), framework.array(k), cache.k(1), cache.v(1), slots)
    out, _ = quire.gather_kv(
        cache.k(1), cache.v(1), slots, out=(framework.array(k * 0), framework.array(k * 0))
    )
    np.testing.assert_array_equal(framework.numpy(out), k)
    host = quire.KVCache(2, 4, 4, 2, 16, "float16", "cpu", pinned=framework.device != "cpu")
    host.swap_blocks_from(cache, np.array([[i, i] for i in range(4)]))
    framework.synchronize()
    flat = host.k(1).numpy().reshape(16, 2, 16)
    np.testing.assert_array_equal(flat[[1, 3, 5, 7, 9]], k)
    cache.copy_blocks(framework.array(np.array([[0, 3]])))
    host.swap_blocks_from(cache, np.array([[3, 3]]))
    framework.synchronize()
    np.testing.assert_array_equal(host.k(1).numpy()[3, 1], k[0])
