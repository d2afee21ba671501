"""The rotary ops against float64 and against each other, and rope_cache against HF transformers.

SPDX-License-Identifier: Apache-2.0
"""

import numpy as np
import pytest
from frameworks import as_float64, np_dtype
from reference import kv_cache as kv_reference
from reference import norm as norm_reference
from reference import position_encoding as reference
from tolerances import assert_close

import quire

DTYPES = ["float32", "float16", "bfloat16"]
STYLES = ["neox", "gptj"]


def draw(rng, shape, dtype):
    return rng.standard_normal(shape).astype(np.float32).astype(np_dtype(dtype))


def check(
    backend, rng, positions, heads, kv_heads, head_dim, rotary_dim, style, dtype, table_dtype="float32"
):
    q, k = (
        draw(rng, (len(positions), heads, head_dim), dtype),
        draw(rng, (len(positions), kv_heads, head_dim), dtype),
    )
    table = quire.rope_cache(head_dim, 64, rotary_dim=rotary_dim, dtype=table_dtype)
    bq, bk = backend.array(q), backend.array(k) if kv_heads else None
    got_q, got_k = quire.rotary_embedding(backend.array(positions), bq, bk, backend.array(table), style=style)
    assert got_q is bq
    assert got_k is bk
    assert_close(
        "rotary", backend.numpy(bq), reference.rotary(positions, as_float64(q), as_float64(table), style)
    )
    if kv_heads:
        assert_close(
            "rotary", backend.numpy(bk), reference.rotary(positions, as_float64(k), as_float64(table), style)
        )


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [2, 8, 30, 64, 80, 128, 256])
def test_head_dims(backend, rng, head_dim, dtype, style):
    positions = rng.integers(0, 64, 7)
    check(backend, rng, positions, 5, 1, head_dim, None, style, dtype)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("rotary_dim", [2, 6, 32, 64])
@pytest.mark.parametrize("table_dtype", DTYPES)
def test_partial_rotary(backend, rng, rotary_dim, table_dtype, style):
    check(
        backend,
        rng,
        rng.integers(0, 64, 9).astype(np.int32),
        4,
        2,
        96,
        rotary_dim,
        style,
        "bfloat16",
        table_dtype,
    )


@pytest.mark.parametrize("num_tokens", [0, 1, 2, 65, 300])
@pytest.mark.parametrize("kv_heads", [0, 1, 8])
def test_token_and_head_counts(backend, rng, num_tokens, kv_heads):
    check(backend, rng, rng.integers(0, 64, num_tokens), 8, kv_heads, 64, None, "neox", "float16")


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("table_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 96, 256])
def test_few_tokens_as_many(backend, rng, head_dim, dtype, table_dtype, style):
    """A token's bits do not depend on how many others there are, nor on the dtype of positions; skipped ones keep theirs."""
    num_tokens, few = 3000, 65
    positions = rng.integers(0, 64, num_tokens)
    positions[3] = -1
    q, k = draw(rng, (num_tokens, 3, head_dim), dtype), draw(rng, (num_tokens, 2, head_dim), dtype)
    table = backend.array(quire.rope_cache(head_dim, 64, dtype=table_dtype))
    want = [backend.array(q), backend.array(k)]
    quire.rotary_embedding(backend.array(positions), *want, table, style=style)
    for index_dtype in (np.int32, np.int64):
        got = [backend.array(q[:few]), backend.array(k[:few])]
        quire.rotary_embedding(backend.array(positions[:few].astype(index_dtype)), *got, table, style=style)
        for one, all_of_them in zip(got, want):
            np.testing.assert_array_equal(
                np.ascontiguousarray(backend.numpy(one)).view(np.uint8),
                np.ascontiguousarray(backend.numpy(all_of_them)[:few]).view(np.uint8),
            )


@pytest.mark.parametrize("style", STYLES)
def test_every_writable_framework(framework, rng, style):
    if not framework.writable:
        with pytest.raises(
            ValueError, match=r"\[rotary_embedding\] q: expected a writable tensor, got a JAX array"
        ):
            quire.rotary_embedding(
                framework.array(np.zeros(1, np.int32)),
                framework.array(np.zeros((1, 1, 8), np.float32)),
                None,
                framework.array(quire.rope_cache(8, 4)),
                style=style,
            )
        return
    check(framework, rng, rng.integers(0, 64, 5), 4, 2, 64, 32, style, "bfloat16")


@pytest.mark.parametrize("index_dtype", [np.int32, np.int64])
def test_positions_out_of_range(backend, rng, index_dtype):
    """-1 is a silent skip; any other value outside the table leaves the token as it is and is reported once."""
    limits = np.iinfo(index_dtype)
    positions = np.array([3, -1, 64, -2, limits.max, limits.min, 63], index_dtype)
    q = draw(rng, (len(positions), 2, 16), "float32")
    table = quire.rope_cache(16, 64)
    bq = backend.array(q)
    quire.rotary_embedding(backend.array(positions), bq, None, backend.array(table))
    got = backend.numpy(bq)
    np.testing.assert_array_equal(got[1:6], q[1:6])
    assert_close("rotary", got, reference.rotary(positions, as_float64(q), as_float64(table), "neox"))
    with pytest.raises(
        IndexError, match=r"\[rotary_embedding\] positions: expected a value in range \(or -1 to skip\), got "
    ):
        quire.check_errors(backend.device)
    quire.check_errors(backend.device)


def test_strided_packed_projection(backend, rng):
    """q and k as slices of one packed qkv tensor."""
    qkv = draw(rng, (6, 4 + 2 + 2, 64), "bfloat16")
    positions = np.arange(6)
    table = quire.rope_cache(64, 64)
    packed = backend.array(qkv)
    quire.rotary_embedding(backend.array(positions), packed[:, :4], packed[:, 4:6], backend.array(table))
    got = backend.numpy(packed)
    assert_close(
        "rotary", got[:, :6], reference.rotary(positions, as_float64(qkv[:, :6]), as_float64(table), "neox")
    )
    np.testing.assert_array_equal(got[:, 6:].view(np.uint16), qkv[:, 6:].view(np.uint16))


def test_bad_calls():
    positions, q, table = np.zeros(2, np.int32), np.zeros((2, 1, 8), np.float32), quire.rope_cache(8, 4)
    with pytest.raises(ValueError, match=r"positions: expected int32 \[2\], got int32 \[3\]"):
        quire.rotary_embedding(np.zeros(3, np.int32), q, None, table)
    with pytest.raises(TypeError, match=r"positions: expected int32 or int64, got uint8"):
        quire.rotary_embedding(np.zeros(2, np.uint8), q, None, table)
    with pytest.raises(
        ValueError,
        match=r"cos_sin_cache: expected an even rotary_dim of at most head_dim 8, got float32 \[4, 10\]",
    ):
        quire.rotary_embedding(positions, q, None, np.zeros((4, 10), np.float32))
    with pytest.raises(ValueError, match=r'style: expected "neox" or "gptj", got "llama"'):
        quire.rotary_embedding(positions, q, None, table, style="llama")
    with pytest.raises(ValueError, match=r"k: expected memory apart from q"):
        quire.rotary_embedding(positions, q, q, table)


# ---- qk_norm_rope ------------------------------------------------------------------------------------------------------


def normed_and_rotated(positions, x, weight, table, style, eps=1e-6, offset=0.0):
    """The reference of qk_norm_rope; weight None: no norm."""
    wide = as_float64(x)
    if weight is not None:
        normed = norm_reference.rms_norm(wide, as_float64(weight), float(np.float32(eps)), offset)
        known = (positions >= 0) & (positions < len(table))
        wide = np.where(known[:, None, None], normed, wide)
    return reference.rotary(positions, wide, as_float64(table), style)


def check_norm_rope(backend, rng, num_tokens, heads, kv_heads, head_dim, rotary_dim, style, dtype, **kw):
    table_dtype, weight_dtype = kw.pop("table_dtype", "float32"), kw.pop("weight_dtype", dtype)
    positions = rng.integers(0, 64, num_tokens)
    q, k = draw(rng, (num_tokens, heads, head_dim), dtype), draw(rng, (num_tokens, kv_heads, head_dim), dtype)
    weights = [draw(rng, (head_dim,), weight_dtype) for _ in range(2)]
    table = quire.rope_cache(head_dim, 64, rotary_dim=rotary_dim, dtype=table_dtype)
    bq, bk = backend.array(q), backend.array(k) if kv_heads else None
    got = quire.qk_norm_rope(
        backend.array(positions),
        bq,
        bk,
        backend.array(weights[0]),
        backend.array(weights[1]) if kv_heads else None,
        backend.array(table),
        kw.get("eps", 1e-6),
        weight_offset=kw.get("offset", 0.0),
        style=style,
    )
    assert got[0] is bq
    assert got[1] is bk
    for x, weight, result in ((q, weights[0], bq), (k, weights[1], bk)):
        if result is not None:
            want = normed_and_rotated(positions, x, weight, table, style, **kw)
            assert_close("rotary", backend.numpy(result), want)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [2, 6, 8, 30, 64, 80, 96, 128, 256, 512, 576])
def test_norm_rope_head_dims(backend, rng, head_dim, dtype, style):
    check_norm_rope(backend, rng, 7, 5, 2, head_dim, None, style, dtype)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("rotary_dim", [2, 6, 32, 64])
@pytest.mark.parametrize("weight_dtype", DTYPES)
def test_norm_rope_partial(backend, rng, rotary_dim, weight_dtype, style):
    for head_dim in (64, 72, 97):
        check_norm_rope(
            backend,
            rng,
            9,
            4,
            2,
            head_dim,
            rotary_dim,
            style,
            "float16",
            table_dtype=weight_dtype,
            weight_dtype=weight_dtype,
            eps=1e-5,
            offset=1.0,
        )


@pytest.mark.parametrize("num_tokens", [0, 1, 65, 1500])
@pytest.mark.parametrize("kv_heads", [0, 1, 3])
def test_norm_rope_counts(backend, rng, num_tokens, kv_heads):
    check_norm_rope(backend, rng, num_tokens, 5, kv_heads, 64, None, "neox", "bfloat16")
    check_norm_rope(backend, rng, num_tokens, 0, kv_heads, 40, None, "gptj", "float32")


def test_norm_rope_skips(backend, rng):
    """A token without a position keeps its bits: it is not normalised either."""
    positions = np.array([3, -1, 64, -2, 2**40, 63])
    for head_dim in (16, 17):
        q, weight = draw(rng, (6, 2, head_dim), "float32"), draw(rng, (head_dim,), "float32")
        table = quire.rope_cache(head_dim, 64, rotary_dim=16)
        bq = backend.array(q)
        bw = backend.array(weight)
        quire.qk_norm_rope(backend.array(positions), bq, None, bw, None, backend.array(table))
        got = backend.numpy(bq)
        np.testing.assert_array_equal(got[1:5], q[1:5])
        assert_close("rotary", got, normed_and_rotated(positions, q, weight, table, "neox"))
        with pytest.raises(IndexError, match=r"\[qk_norm_rope\] positions: expected a value in range"):
            quire.check_errors(backend.device)


@pytest.mark.parametrize("address", ["an address", "no address"])
def test_norm_without_rotation(rng, torch, address):
    """A table without columns rotates nothing, and the norm is there all the same. torch's have no address."""
    q, k, weight = (draw(rng, shape, "float32") for shape in ((3, 2, 16), (3, 1, 16), (16,)))
    table = torch.empty(4, 0) if address == "no address" else np.zeros((4, 2), np.float32)[:, 2:]
    positions = np.array([0, -1, 3])
    got_q, got_k, cache = q.copy(), k.copy(), np.zeros((2, 2, 2, 1, 16), np.float32)
    quire.qk_norm_rope(positions, got_q, got_k, weight, weight, table)
    for got, x in ((got_q, q), (got_k, k)):
        normed = quire.rms_norm(x, weight)
        normed[1] = x[1]
        np.testing.assert_allclose(got, normed, rtol=1e-6)
    quire.rope_and_write_kv(
        positions, q, k, k, table, cache[0], cache[1], np.arange(3), q_weight=weight, k_weight=weight
    )
    np.testing.assert_array_equal(q, got_q)
    np.testing.assert_array_equal(cache[0].reshape(4, 1, 16)[:3], got_k)


def test_slots_of_a_cache_without_blocks(rng, torch):
    """torch's tensors without elements have no address; the slot is out of range all the same."""
    q, k = draw(rng, (1, 2, 16), "float32"), draw(rng, (1, 1, 16), "float32")
    cache = torch.empty(0, 4, 1, 16)
    quire.rope_and_write_kv(
        np.array([1]), q, k, k, quire.rope_cache(16, 4), cache, cache.clone(), np.array([3])
    )
    with pytest.raises(IndexError, match=r"slot_mapping: expected a value in range .* got 3"):
        quire.check_errors("cpu")


def test_norm_rope_refuses():
    positions, q, table = np.zeros(2, np.int32), np.zeros((2, 1, 8), np.float32), quire.rope_cache(8, 4)
    weight = np.ones(8, np.float32)
    with pytest.raises(
        ValueError, match=r"\[qk_norm_rope\] q_weight: expected float32 \[8\], got float32 \[7\]"
    ):
        quire.qk_norm_rope(positions, q, None, weight[:7], None, table)
    with pytest.raises(
        ValueError, match=r"k_weight: expected one where there is a k, and only there, got one"
    ):
        quire.qk_norm_rope(positions, q, None, weight, weight, table)
    with pytest.raises(
        ValueError, match=r"k_weight: expected one where there is a k, and only there, got none"
    ):
        quire.qk_norm_rope(positions, q, q.copy(), weight, None, table)
    with pytest.raises(ValueError, match=r"eps: expected 0 or more, got -1"):
        quire.qk_norm_rope(positions, q, None, weight, None, table, -1.0)
    with pytest.raises(ValueError, match=r"k: expected memory apart from q"):
        quire.qk_norm_rope(positions, q, q, weight, weight, table)
    with pytest.raises(ValueError, match=r"q: expected memory apart from q_weight"):
        quire.qk_norm_rope(positions, q, None, q[0, 0], None, table)
    with pytest.raises(ValueError, match=r'\[qk_norm_rope\] style: expected "neox" or "gptj", got "llama"'):
        quire.qk_norm_rope(positions, q, None, weight, None, table, style="llama")


# ---- rope_and_write_kv -------------------------------------------------------------------------------------------------

CACHE_DTYPES = [*DTYPES, "float8_e4m3fn", "float8_e5m2", "int8"]


def bits(x):
    return np.ascontiguousarray(x).view(np.uint8)


def poisoned(shape, dtype):
    """Every byte 0xFF: NaN in each float dtype."""
    x = np.empty(shape, np_dtype(dtype))
    x.view(np.uint8)[...] = 0xFF
    return x


def check_rope_and_write(
    backend,
    rng,
    *,
    num_tokens=23,
    heads=4,
    kv_heads=2,
    head_dim=64,
    rotary_dim=None,
    style="neox",
    dtype="bfloat16",
    cache_dtype="bfloat16",
    scales=0,
    norms=False,
    k_out="new",
    index_dtype=np.int64,
    packed=False,
    block_size=5,
):
    """q and the rotated k against float64; the caches, bit for bit, against what write_kv's reference makes of that k."""
    num_blocks = num_tokens // block_size + 3
    slots = rng.permutation(num_blocks * block_size)[:num_tokens].astype(index_dtype)
    positions = rng.integers(0, 64, num_tokens).astype(index_dtype)
    if num_tokens > 4:
        slots[4], positions[2] = -1, -1
    qkv = draw(rng, (num_tokens, heads + 2 * kv_heads, head_dim), dtype)
    q, k, v = np.split(qkv, [heads, heads + kv_heads], axis=1)
    weights = [draw(rng, (head_dim,), dtype) if norms else None for _ in range(2)]
    k_scale, v_scale = ((0.01 + rng.random(scales)).astype(np.float32) if scales else None for _ in range(2))
    table = quire.rope_cache(head_dim, 64, rotary_dim=rotary_dim)
    if packed:
        whole = backend.strided(qkv, 8)
        bq, bk, bv = whole[:, :heads], whole[:, heads : heads + kv_heads], whole[:, heads + kv_heads :]
    else:
        bq, bk, bv = (backend.array(x) for x in (q, k, v))
    out = {"none": None, "k": bk, "new": backend.array(poisoned(k.shape, dtype))}[k_out]
    shape = (num_blocks, block_size, kv_heads, head_dim)
    caches = [backend.array(poisoned(shape, cache_dtype)) for _ in range(2)]

    def optional(x):
        return None if x is None else backend.array(x)

    result = quire.rope_and_write_kv(
        backend.array(positions),
        bq,
        bk,
        bv,
        backend.array(table),
        *caches,
        backend.array(slots),
        style=style,
        k_scale=optional(k_scale),
        v_scale=optional(v_scale),
        k_out=out,
        q_weight=optional(weights[0]),
        k_weight=optional(weights[1]),
    )
    assert result is bq
    want_q = normed_and_rotated(positions, q, weights[0], table, style)
    want_k = normed_and_rotated(positions, k, weights[1], table, style)
    assert_close("rotary", backend.numpy(bq), want_q)
    if out is None:
        # The same call with an output for k, which the caches must agree with.
        bq2, out = backend.array(q), backend.array(poisoned(k.shape, dtype))
        other = [backend.array(poisoned(shape, cache_dtype)) for _ in range(2)]
        quire.rope_and_write_kv(
            backend.array(positions),
            bq2,
            bk,
            bv,
            backend.array(table),
            *other,
            backend.array(slots),
            style=style,
            k_scale=optional(k_scale),
            v_scale=optional(v_scale),
            k_out=out,
            q_weight=optional(weights[0]),
            k_weight=optional(weights[1]),
        )
    rotated = backend.numpy(out)
    assert_close("rotary", rotated, want_k)
    unmoved = positions < 0
    np.testing.assert_array_equal(bits(backend.numpy(bq)[unmoved]), bits(q[unmoved]))
    np.testing.assert_array_equal(bits(rotated[unmoved]), bits(k[unmoved]))
    if k_out != "k":
        np.testing.assert_array_equal(bits(backend.numpy(bk)), bits(k))
    np.testing.assert_array_equal(bits(backend.numpy(bv)), bits(v))
    kept = slots >= 0
    for x, scale, got in ((rotated, k_scale, caches[0]), (v, v_scale, caches[1])):
        want = poisoned(shape, cache_dtype).reshape(num_blocks * block_size, kv_heads, head_dim)
        want[slots[kept]] = kv_reference.store(x.astype(np.float32), scale, cache_dtype)[kept]
        np.testing.assert_array_equal(bits(backend.numpy(got)), bits(want.reshape(shape)))


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rope_and_write_dtypes(backend, rng, dtype, cache_dtype, norms):
    check_rope_and_write(backend, rng, dtype=dtype, cache_dtype=cache_dtype, norms=norms)
    if cache_dtype not in DTYPES:
        for scales in (1, 2):
            check_rope_and_write(
                backend,
                rng,
                dtype=dtype,
                cache_dtype=cache_dtype,
                norms=norms,
                scales=scales,
                index_dtype=np.int32,
            )


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize(
    ("head_dim", "rotary_dim"),
    [(2, 2), (7, 4), (24, 8), (64, 16), (80, None), (96, 32), (128, None), (256, 64), (528, 2)],
)
def test_rope_and_write_head_dims(backend, rng, head_dim, rotary_dim, norms, style):
    for dtype, cache_dtype in (("bfloat16", "float8_e4m3fn"), ("float32", "float32"), ("float16", "int8")):
        check_rope_and_write(
            backend,
            rng,
            head_dim=head_dim,
            rotary_dim=rotary_dim,
            style=style,
            norms=norms,
            dtype=dtype,
            cache_dtype=cache_dtype,
        )


@pytest.mark.parametrize("num_tokens", [0, 1, 2, 65, 1500])
@pytest.mark.parametrize("kv_heads", [0, 1, 8, 40])
def test_rope_and_write_counts(backend, rng, num_tokens, kv_heads):
    check_rope_and_write(backend, rng, num_tokens=num_tokens, heads=8, kv_heads=kv_heads, block_size=16)


@pytest.mark.parametrize("k_out", ["none", "k", "new"])
@pytest.mark.parametrize("packed", [False, True])
def test_rope_and_write_outputs(backend, rng, k_out, packed):
    """k is read only, overwritten, or written elsewhere; q, k and v as slices of one padded projection."""
    for norms in (False, True):
        for head_dim in (64, 33):
            check_rope_and_write(
                backend, rng, k_out=k_out, packed=packed, norms=norms, head_dim=head_dim, rotary_dim=32
            )


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("cache_dtype", ["bfloat16", "float8_e4m3fn"])
def test_rope_and_write_equals_its_parts(backend, rng, cache_dtype, norms):
    num_tokens, heads, kv_heads, head_dim = 1100, 8, 2, 128
    q, k, v = (draw(rng, (num_tokens, n, head_dim), "bfloat16") for n in (heads, kv_heads, kv_heads))
    weights = [backend.array(draw(rng, (head_dim,), "bfloat16")) for _ in range(2)]
    positions = backend.array(rng.integers(0, 500, num_tokens))
    slots = backend.array(rng.permutation(80 * 16)[:num_tokens])
    table = backend.array(quire.rope_cache(head_dim, 500))
    bv = backend.array(v)
    results = []
    for fused in (True, False):
        bq, bk = backend.array(q), backend.array(k)
        caches = [backend.array(poisoned((80, 16, kv_heads, head_dim), cache_dtype)) for _ in range(2)]
        if fused:
            norm = {"q_weight": weights[0], "k_weight": weights[1], "weight_offset": 1.0} if norms else {}
            quire.rope_and_write_kv(positions, bq, bk, bv, table, *caches, slots, k_out=bk, **norm)
        else:
            if norms:
                quire.qk_norm_rope(positions, bq, bk, *weights, table, weight_offset=1.0)
            else:
                quire.rotary_embedding(positions, bq, bk, table)
            quire.write_kv(bk, bv, *caches, slots)
        results.append([bits(backend.numpy(x)) for x in (bq, bk, *caches)])
    for ours, parts in zip(*results):
        np.testing.assert_array_equal(ours, parts)


@pytest.mark.parametrize("layout", ["heads_first", "interleaved"])
@pytest.mark.parametrize("cache_dtype", ["float16", "int8"])
def test_rope_and_write_cache_layouts(backend, rng, layout, cache_dtype):
    blocks, size, kv_heads, dim = 6, 4, 2, 16
    q, k, v = (draw(rng, (10, n, dim), "float16") for n in (3, kv_heads, kv_heads))
    slots, positions = rng.permutation(blocks * size)[:10], np.full(10, -1)
    shape = (2, blocks, kv_heads, size, dim) if layout == "heads_first" else (blocks, 2, size, kv_heads, dim)
    pool = backend.array(poisoned(shape, cache_dtype))

    def views(x):
        if layout == "interleaved":
            return x[:, 0], x[:, 1]
        return tuple(
            c.swapaxes(1, 2) if isinstance(c, np.ndarray) else c.transpose(1, 2) for c in (x[0], x[1])
        )

    table = backend.array(quire.rope_cache(dim, 8))
    arrays = [backend.array(x) for x in (positions, q, k, v)]
    quire.rope_and_write_kv(*arrays, table, *views(pool), backend.array(slots))
    for x, view in zip((k, v), views(backend.numpy(pool))):
        want = kv_reference.store(x.astype(np.float32), None, cache_dtype)
        np.testing.assert_array_equal(bits(view[slots // size, slots % size]), bits(want))
        others = np.setdiff1d(np.arange(blocks * size), slots)
        assert (bits(view[others // size, others % size]) == 0xFF).all()


@pytest.mark.parametrize("head_dim", [16, 17])
def test_rope_and_write_hostile_indices(backend, rng, head_dim):
    """Bad positions and slots touch nothing, and the first is reported."""
    q, k, v = (draw(rng, (6, 1, head_dim), "float32") for _ in range(3))
    positions = np.array([0, 8, -5, 3, 2**62, -(2**63)])
    slots = np.array([0, 1, 2, 8, -(2**63), 2**63 - 1])
    table = quire.rope_cache(head_dim, 8, rotary_dim=16)
    caches = [backend.array(np.zeros((2, 4, 1, head_dim), np.float32)) for _ in range(2)]
    bq = backend.array(q)
    quire.rope_and_write_kv(
        backend.array(positions),
        bq,
        backend.array(k),
        backend.array(v),
        backend.array(table),
        *caches,
        backend.array(slots),
    )
    assert_close(
        "rotary", backend.numpy(bq), reference.rotary(positions, as_float64(q), as_float64(table), "neox")
    )
    flat = backend.numpy(caches[0]).reshape(8, 1, head_dim)
    np.testing.assert_array_equal(flat[1:3], k[1:3])
    np.testing.assert_array_equal(flat[3:], 0.0)
    np.testing.assert_array_equal(backend.numpy(caches[1]).reshape(8, 1, head_dim)[:3], v[:3])
    with pytest.raises(
        IndexError, match=r"\[rope_and_write_kv\] (positions|slot_mapping): expected a value in range"
    ):
        quire.check_errors(backend.device)


def test_rope_and_write_every_framework(framework, rng):
    q, k = draw(rng, (3, 2, 16), "bfloat16"), draw(rng, (3, 1, 16), "bfloat16")
    cache = np.zeros((2, 4, 1, 16), np_dtype("bfloat16"))
    table, positions, slots = quire.rope_cache(16, 8), np.array([1, 2, 7]), np.array([6, 1, 0])
    arrays = [framework.array(x) for x in (positions, q, k, k, table, cache, cache, slots)]
    if not framework.writable:
        with pytest.raises(
            ValueError, match=r"\[rope_and_write_kv\] q: expected a writable tensor, got a JAX array"
        ):
            quire.rope_and_write_kv(*arrays)
        return
    assert quire.rope_and_write_kv(*arrays) is arrays[1]
    assert_close(
        "rotary",
        framework.numpy(arrays[1]),
        reference.rotary(positions, as_float64(q), as_float64(table), "neox"),
    )
    np.testing.assert_array_equal(bits(framework.numpy(arrays[6]).reshape(8, 1, 16)[slots]), bits(k))


@pytest.mark.parametrize(
    ("name", "value", "error", "text"),
    [
        (
            "k",
            np.zeros((2, 1, 7), np.float32),
            ValueError,
            r"k: expected float32 \[2, \*, 8\], got float32 \[2, 1, 7\]",
        ),
        ("k", np.zeros((2, 1, 8), np.float16), TypeError, r"k: expected float32 like q, got float16"),
        ("v", np.zeros((2, 2, 8), np.float32), ValueError, r"v: expected float32 \[2, 1, 8\] like k"),
        (
            "k_cache",
            np.zeros((2, 4, 2, 8), np.float32),
            ValueError,
            r"k_cache: expected float32 \[\*, \*, 1, 8\]",
        ),
        (
            "slot_mapping",
            np.zeros(3, np.int64),
            ValueError,
            r"slot_mapping: expected int64 \[2\], got int64 \[3\]",
        ),
        (
            "k_scale",
            np.ones(1, np.float32),
            ValueError,
            r"k_scale: expected none for float32 keys and values",
        ),
        ("k_out", np.zeros((2, 2, 8), np.float32), ValueError, r"k_out: expected float32 \[2, 1, 8\] like k"),
        (
            "q_weight",
            np.ones(8, np.float32),
            ValueError,
            r"k_weight: expected both weights or neither, got none",
        ),
        (
            "k_weight",
            np.ones(8, np.float32),
            ValueError,
            r"q_weight: expected both weights or neither, got none",
        ),
        (
            "cos_sin_cache",
            np.ones((4, 10), np.float32),
            ValueError,
            r"cos_sin_cache: expected an even rotary_dim",
        ),
        ("style", "llama", ValueError, r'style: expected "neox" or "gptj", got "llama"'),
    ],
)
def test_rope_and_write_refuses(name, value, error, text):
    arguments = {
        "positions": np.zeros(2, np.int32),
        "q": np.ones((2, 3, 8), np.float32),
        "k": np.ones((2, 1, 8), np.float32),
        "v": np.ones((2, 1, 8), np.float32),
        "cos_sin_cache": quire.rope_cache(8, 4),
        "k_cache": np.zeros((2, 4, 1, 8), np.float32),
        "v_cache": np.zeros((2, 4, 1, 8), np.float32),
        "slot_mapping": np.arange(2),
    }
    arguments[name] = value
    caches = [arguments["v_cache"], arguments["q"] - 1]
    with pytest.raises(error, match=r"\[rope_and_write_kv\] " + text):
        quire.rope_and_write_kv(**arguments)
    assert all((x == 0).all() for x in caches)


def test_rope_and_write_refuses_overlaps():
    base = {
        "positions": np.zeros(1, np.int64),
        "q": np.ones((1, 1, 8), np.float32),
        "k": np.ones((1, 1, 8), np.float32),
        "v": np.ones((1, 1, 8), np.float32),
        "cos_sin_cache": quire.rope_cache(8, 4),
        "k_cache": np.zeros((1, 1, 1, 8), np.float32),
        "v_cache": np.zeros((1, 1, 1, 8), np.float32),
        "slot_mapping": np.arange(1),
    }
    for first, second in [
        ("q", "k"),
        ("q", "v"),
        ("k_cache", "q"),
        ("v_cache", "k"),
        ("k_cache", "v_cache"),
        ("k_out", "v"),
        ("k_out", "q"),
        ("k_cache", "k_out"),
    ]:
        shared = np.ones((1, 1, 1, 8), np.float32)
        arguments = dict(base)
        for name in (first, second):
            arguments[name] = shared if "cache" in name else shared[0]
        with pytest.raises(ValueError, match=r"expected memory apart from"):
            quire.rope_and_write_kv(**arguments)


# ---- rope_cache --------------------------------------------------------------------------------------------------------

SCALINGS = {
    "default": None,
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
    "yarn-deepseek": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 256,
        "beta_fast": 16,
        "beta_slow": 2,
        "mscale": 0.707,
        "mscale_all_dim": 1.2,
    },
    "yarn-untruncated": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 512,
        "truncate": False,
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    },
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0 + 0.01 * i for i in range(32)],
        "long_factor": [1.5 + 0.1 * i for i in range(32)],
        "original_max_position_embeddings": 512,
        "factor": 4.0,
    },
}


@pytest.mark.parametrize("length", [256, 2048, 4096])
@pytest.mark.parametrize("kind", list(SCALINGS))
def test_rope_cache_equals_transformers(torch, kind, length):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    scaling = SCALINGS[kind]
    parameters = {"rope_theta": 10000.0, **({"rope_type": "default"} if scaling is None else scaling)}
    config = transformers.LlamaConfig(
        hidden_size=256,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        rope_parameters=parameters,
    )
    rope = LlamaRotaryEmbedding(config)
    positions = torch.arange(length)[None]
    cos, sin = rope(torch.zeros(1, length, 256), positions)
    ours = quire.rope_cache(
        64,
        length,
        theta=10000.0,
        scaling=None if scaling is None else {"max_position_embeddings": 2048, **scaling},
    )
    error = np.maximum(
        np.abs(ours[:, :32] - cos[0, :, :32].numpy()), np.abs(ours[:, 32:] - sin[0, :, :32].numpy())
    )
    limit = np.full((length, 1), 1e-6)
    if kind == "dynamic" and length > 2048:
        # torch's float32 power of this base is one ulp off in one frequency; the angle carries that times the position.
        limit += np.arange(length)[:, None] * 2.0**-24
    assert (error <= limit).all()


def test_rope_cache_in_a_framework(framework):
    like = framework.array(np.zeros(1, np.float32))
    table = quire.rope_cache(16, 8, dtype="bfloat16", like=like)
    assert type(table) is type(like)
    np.testing.assert_array_equal(
        framework.numpy(table).astype(np.float32),
        quire.rope_cache(16, 8, dtype="bfloat16").astype(np.float32),
    )


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        ({"rotary_dim": 7}, "rotary_dim: expected an even number"),
        ({"rotary_dim": 128}, "rotary_dim: expected an even number of 2 to head_dim 64"),
        ({"theta": 0.0}, "theta: expected a finite number above 0"),
        ({"theta": float("inf")}, "theta: expected a finite number above 0, got inf"),
        ({"theta": float("nan")}, "theta: expected a finite number above 0, got nan"),
        (
            {"theta": 1.0, "scaling": SCALINGS["yarn"]},
            "theta: expected a number above 1 for rope_type 'yarn', got 1.0",
        ),
        ({"max_position": 0}, "max_position: expected 1 or more, got 0"),
        (
            {"scaling": {**SCALINGS["longrope"], "original_max_position_embeddings": 1}},
            "'original_max_position_embeddings' above 1 for rope_type 'longrope' without 'attention_factor', got 1.0",
        ),
        (
            {"scaling": {**SCALINGS["longrope"], "short_factor": ["a"], "long_factor": ["a"]}},
            "scaling: expected 'short_factor' with 32 numbers",
        ),
        (
            {"scaling": {**SCALINGS["longrope"], "short_factor": [0.0] * 32}},
            "scaling: expected 'short_factor' above 0, got 0.0",
        ),
        ({"scaling": {**SCALINGS["yarn"], "beta_fast": -1}}, "expected 'beta_fast' above 0"),
        ({"scaling": {**SCALINGS["yarn"], "attention_factor": "x"}}, "expected 'attention_factor' above 0"),
        (
            {"scaling": {"rope_type": "dynamic", "factor": 2.0, "max_position_embeddings": "x"}},
            "expected 'max_position_embeddings' above 0",
        ),
        (
            {
                "theta": 1e38,
                "scaling": {"rope_type": "dynamic", "factor": 64.0, "max_position_embeddings": 4},
            },
            "theta, scaling: expected frequencies above 0 and finite in float32, got 0.0",
        ),
        ({"theta": 1e300}, "theta, scaling: expected frequencies above 0 and finite in float32, got 0.0"),
        (
            {"scaling": {"rope_type": "ntk"}},
            "expected rope_type default, linear, dynamic, yarn, longrope or llama3, got 'ntk'",
        ),
        ({"theta": 10**400}, "theta: expected a finite number above 0, got inf"),
        ({"scaling": {"rope_type": "linear", "factor": 10**400}}, "expected 'factor' above 0"),
        ({"max_position": 2**63}, "max_position: expected a table of fewer than"),
        ({"scaling": {"rope_type": "linear"}}, "expected 'factor' above 0 for rope_type 'linear', got None"),
        ({"scaling": {"rope_type": "yarn", "factor": 2.0}}, "'original_max_position_embeddings' above 0"),
        (
            {"scaling": {**SCALINGS["longrope"], "short_factor": [1.0]}},
            "'short_factor' with 32 numbers, got 1",
        ),
    ],
)
def test_rope_cache_refuses(kwargs, text):
    with pytest.raises(ValueError, match=r"\[rope_cache\] .*" + text):
        quire.rope_cache(64, kwargs.pop("max_position", 16), **kwargs)


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        ({"head_dim": 64.0}, "head_dim: expected an integer, got float"),
        ({"max_position": 4.5}, "max_position: expected an integer, got float"),
        ({"rotary_dim": 8.0}, "rotary_dim: expected an integer, got float"),
        ({"theta": "10000"}, "theta: expected a number, got str"),
        ({"dtype": "int8"}, "dtype: expected float32, float16 or bfloat16, got int8"),
        ({"dtype": None}, "dtype: expected float32, float16 or bfloat16, got None"),
        ({"scaling": "yarn"}, "scaling: expected a mapping or None, got str"),
        ({"like": [1]}, "like: expected a tensor"),
        ({"like": np.ma.zeros(2)}, "like: expected a tensor without a mask"),
    ],
)
def test_rope_cache_refuses_types(kwargs, text):
    with pytest.raises(TypeError, match=r"\[rope_cache\] " + text):
        quire.rope_cache(**{"head_dim": 64, "max_position": 16, **kwargs})


@pytest.mark.parametrize("dtype", DTYPES)
def test_rope_cache_like_a_quire_tensor(backend, dtype):
    like = quire.empty((1,), "float32", backend.device)
    table = quire.rope_cache(16, 8, dtype=dtype, like=like)
    assert isinstance(table, quire.Tensor)
    assert (table.shape, table.dtype, table.device) == ((8, 16), dtype, like.device)
    host = quire.empty((8, 16), dtype, "cpu")
    quire.swap_blocks(host, table, np.array([[i, i] for i in range(8)]))
    backend.synchronize()
    np.testing.assert_array_equal(
        host.numpy().astype(np.float32), quire.rope_cache(16, 8, dtype=dtype).astype(np.float32)
    )
