"""paged_attention, attention and merge_attention against float64: every option, on every backend; poison, hostile indices, empties.

SPDX-License-Identifier: Apache-2.0
"""

import dataclasses
import itertools

import frameworks
import numpy as np
import pytest
from frameworks import Torch, as_float64, np_dtype
from reference import attention as reference
from reference import kv_cache
from tolerances import assert_close, assert_lse_close

import quire

DTYPES = ["float32", "float16", "bfloat16"]
QUANTIZED = ["float8_e4m3fn", "float8_e5m2", "int8"]


def draw(rng, shape, dtype):
    return rng.standard_normal(shape).astype(np.float32).astype(np_dtype(dtype))


def poison(shape, dtype):
    """NaN in each float dtype; -1 in int8."""
    return np.full((*shape[:-1], shape[-1] * np_dtype(dtype).itemsize), 0xFF, np.uint8).view(np_dtype(dtype))


@dataclasses.dataclass
class Batch:
    """A batch in a paged cache: shuffled blocks, and NaN wherever nothing belongs."""

    q: np.ndarray
    k_cache: np.ndarray
    v_cache: np.ndarray
    block_tables: np.ndarray
    seq_lens: np.ndarray
    query_start_loc: np.ndarray | None
    k_scale: np.ndarray | None = None
    v_scale: np.ndarray | None = None
    q_scale: np.ndarray | None = None

    @classmethod
    def make(
        cls,
        rng,
        *,
        q_lens,
        kv_lens,
        heads,
        kv_heads,
        dim,
        block_size,
        dtype,
        kv_dtype=None,
        scales=0,
        decode=False,
    ):
        kv_dtype = kv_dtype or dtype
        needed = [-(-n // block_size) for n in kv_lens]
        num_blocks = sum(needed) + 3
        width = max([*needed, 1]) + 2
        order = rng.permutation(num_blocks)
        # What lies past a sequence's length in its table may be anything.
        tables = rng.choice(
            np.array([-1, -7, num_blocks, 2**31 - 1, -(2**31), 0], np.int64), (len(kv_lens), width)
        ).astype(np.int32)
        shape = (num_blocks, block_size, kv_heads, dim)
        k_cache, v_cache = poison(shape, kv_dtype), poison(shape, kv_dtype)
        k_scale = (0.01 + 0.02 * rng.random(scales)).astype(np.float32) if scales else None
        v_scale = (0.01 + 0.02 * rng.random(scales)).astype(np.float32) if scales else None
        q_scale = (0.5 + rng.random(scales)).astype(np.float32) if scales and dtype in QUANTIZED else None
        at = 0
        for s, length in enumerate(kv_lens):
            tables[s, : needed[s]] = order[at : at + needed[s]]
            at += needed[s]
            slots = np.arange(length)
            where = tables[s][slots // block_size], slots % block_size
            for cache, scale in ((k_cache, k_scale), (v_cache, v_scale)):
                x = rng.standard_normal((length, kv_heads, dim)).astype(np.float32)
                cache[where] = (
                    kv_cache.store(x, scale, kv_dtype)
                    if kv_dtype in QUANTIZED
                    else x.astype(np_dtype(kv_dtype))
                )
        starts = np.concatenate([[0], np.cumsum(q_lens)]).astype(np.int32)
        return cls(
            draw(rng, (int(starts[-1]), heads, dim), dtype),
            k_cache,
            v_cache,
            tables,
            np.asarray(kv_lens, np.int32),
            None if decode else starts,
            k_scale,
            v_scale,
            q_scale,
        )

    def arguments(self, backend):
        positional = [
            backend.array(x) for x in (self.q, self.k_cache, self.v_cache, self.block_tables, self.seq_lens)
        ]
        keywords = {}
        for name in ("query_start_loc", "q_scale", "k_scale", "v_scale"):
            value = getattr(self, name)
            if value is not None:
                keywords[name] = backend.array(value)
        return positional, keywords

    def reference(self, **options):
        def wide(cache, scale):
            x = as_float64(cache)
            return x if scale is None else x * scale.astype(np.float64).reshape(1, 1, -1, 1)

        q = as_float64(self.q)
        if self.q_scale is not None:
            group = q.shape[1] // self.k_cache.shape[2]
            q = q * np.repeat(self.q_scale.astype(np.float64), group if len(self.q_scale) > 1 else 1)[:, None]
        return reference.paged(
            q,
            wide(self.k_cache, self.k_scale),
            wide(self.v_cache, self.v_scale),
            self.block_tables,
            self.seq_lens,
            self.query_start_loc,
            **options,
        )

    def check(self, backend, *, batch_invariant=False, **options):
        positional, keywords = self.arguments(backend)
        keywords["batch_invariant"] = batch_invariant
        converted = {
            name: backend.array(value) if isinstance(value, np.ndarray) else value
            for name, value in options.items()
        }
        out, lse = quire.paged_attention(*positional, return_lse=True, **keywords, **converted)
        if "window" in options and isinstance(options["window"], int):
            options["window"] = (options["window"], -1)
        want, want_lse = self.reference(**options)
        assert_close("attention", backend.numpy(out), want)
        assert_lse_close(backend.numpy(lse), want_lse, self.q.dtype.name)


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
    if (
        not frameworks.has_gpu()
    ):  # asked here: test_streams imports this file in processes that must not have touched CUDA
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


OPTIONS = {
    "noncausal": {"causal": False},
    "scale": {"scale": 0.3},
    "window_int": {"window": 7},
    "window_left": {"window": (20, -1)},
    "window_zero": {"window": (0, 0)},
    "window_both": {"window": (5, 3), "causal": False},
    "window_right": {"window": (-1, 4), "causal": False},
    "softcap": {"softcap": 5.0},
    "alibi": {"alibi_slopes": True},
    "alibi_noncausal": {"alibi_slopes": True, "causal": False},
    "sinks": {"sinks": True},
    "sinks_window": {"sinks": True, "window": (3, -1)},
    "everything": {
        "window": (40, 2),
        "causal": False,
        "softcap": 8.0,
        "alibi_slopes": True,
        "sinks": True,
        "scale": 0.2,
    },
}


def drawn_options(rng, option, heads):
    options = dict(OPTIONS[option])
    if "alibi_slopes" in options:
        options["alibi_slopes"] = (2.0 ** -np.arange(1, heads + 1)).astype(np.float32)
    if "sinks" in options:
        options["sinks"] = rng.standard_normal(heads).astype(np.float32)
    return options


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


# ---- batch invariance --------------------------------------------------------------------------------------------------


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
        for n in (1, 600, 5000)
    ]
    options = {"dtype": dtype, "kv_dtype": kv_dtype}
    want = [invariant_rows(backend, rng, [w], 0, **options)[0] for w in watched]
    for num_seqs in (2, 3, 8, 64, 257):
        some = [int(i) for i in rng.permutation(3)[: min(num_seqs, 3)]]
        got = invariant_rows(backend, rng, [watched[i] for i in some], num_seqs - len(some), **options)
        assert_same_bits(got, [want[i] for i in some])
    # Beside prefills.
    assert_same_bits(invariant_rows(backend, rng, watched, 5, q_lens=[1, 1, 30], **options), want)


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


def random_mask(rng, num_tokens, width):
    return rng.integers(0, 256, (num_tokens, width), dtype=np.uint8)


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


@pytest.mark.parametrize("dim", [64, 96, 128, 192, 256])
@pytest.mark.parametrize(
    "variant",
    [
        "mma_split_keys_8",
        "mma_split_keys_16",
        "mma_split_rows",
        "mma_split_rows_128",
        "mma_split_keys_8_small",
        "wgmma",
        "mma_split_rows_small",
    ],
)
def test_masks_in_every_kernel(backend, rng, variant, dim):
    if backend.device == "cpu":
        pytest.skip("the variants are CUDA kernels")
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
        try:
            out, lse = quire.paged_attention(*positional, **keywords, variant=variant, return_lse=True)
        except quire.UnsupportedError as error:
            pytest.skip(str(error))
        assert_close("attention", backend.numpy(out), want)
        assert_lse_close(backend.numpy(lse), want_lse, "bfloat16")


@pytest.mark.parametrize("dim", [64, 96, 120, 128, 256])
@pytest.mark.parametrize("group", [1, 2, 3, 4, 8, 16, 24, 32])
@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
def test_groups_in_hoppers_kernel(backend, rng, dtype, group, dim):
    """Query and output rows that are boxes of the copy engine and rows that are not; and a tile that is done again, for a NaN in V."""
    if backend.device == "cpu":
        pytest.skip("the variant is a CUDA kernel")
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
    try:
        out, lse = quire.paged_attention(*positional, **keywords, variant="wgmma", return_lse=True)
    except quire.UnsupportedError as error:
        pytest.skip(str(error))
    assert_close("attention", backend.numpy(out), want)
    assert_lse_close(backend.numpy(lse), want_lse, dtype)


@pytest.mark.parametrize("dim", [40, 64, 96, 128, 200, 256])
@pytest.mark.parametrize("variant", ["mma_split_rows", "mma_split_rows_128", "mma_split_rows_small"])
@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int8"])
def test_rows_kernels(backend, rng, variant, dim, kv_dtype):
    """Blocks that a warp copies by groups of keys and blocks that it does not, with and without holes in the table."""
    if backend.device == "cpu":
        pytest.skip("the variants are CUDA kernels")
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
            try:
                out, lse = quire.paged_attention(
                    *positional, return_lse=True, variant=variant, **keywords, **options
                )
            except quire.UnsupportedError as error:
                pytest.skip(str(error))
            want, want_lse = batch.reference(**options, **seen)
            assert_close("attention", backend.numpy(out), want)
            assert_lse_close(backend.numpy(lse), want_lse, "bfloat16")


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
        assert_lse_close(framework.numpy(lse), want_lse, "float32")


# ---- a shared prefix ---------------------------------------------------------------------------------------------------


def prefixed(rng, *, num_prefix_blocks, q_lens, kv_lens, **shape):
    """A batch of sequences with a common prefix: as a whole, and what shared_prefix_attention takes instead of its tables."""
    block_size = shape["block_size"]
    prefix_len = num_prefix_blocks * block_size
    own = Batch.make(rng, q_lens=[0, *q_lens], kv_lens=[prefix_len, *kv_lens], **shape)
    prefix = own.block_tables[0, :num_prefix_blocks].copy()
    tables, lens = np.ascontiguousarray(own.block_tables[1:]), own.seq_lens[1:].copy()
    starts = own.query_start_loc[1:].copy()
    own = dataclasses.replace(own, block_tables=tables, seq_lens=lens, query_start_loc=starts)
    whole = dataclasses.replace(
        own,
        block_tables=np.concatenate([np.tile(prefix, (len(lens), 1)), tables], axis=1),
        seq_lens=(lens + prefix_len).astype(np.int32),
    )
    return prefix, own, whole


def check_prefixed(backend, prefix, own, whole, *, decode=False, **options):
    positional, keywords = own.arguments(backend)
    if decode:
        del keywords["query_start_loc"]
    converted = {n: backend.array(x) if isinstance(x, np.ndarray) else x for n, x in options.items()}
    out, lse = quire.shared_prefix_attention(
        *positional[:3], backend.array(prefix), *positional[3:], return_lse=True, **keywords, **converted
    )
    if "mask" in options:  # over the own keys
        start = options.get("mask_start")
        lens = own.seq_lens - np.diff(own.query_start_loc) if start is None else start
        options["mask_start"] = (lens + len(prefix) * own.k_cache.shape[1]).astype(np.int32)
    want, want_lse = whole.reference(**options)
    assert_close("shared_prefix_attention", backend.numpy(out), want)
    assert_lse_close(backend.numpy(lse), want_lse, own.q.dtype.name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_prefix_blocks", [0, 1, 5, 40, 130])
@pytest.mark.parametrize("num_seqs", [1, 3, 40])
def test_shared_prefix(backend, rng, num_seqs, num_prefix_blocks, dtype):
    q_lens = [1] * num_seqs
    made = prefixed(
        rng,
        num_prefix_blocks=num_prefix_blocks,
        q_lens=q_lens,
        kv_lens=[int(n) for n in rng.integers(1, 60, num_seqs)],
        heads=8,
        kv_heads=2,
        dim=64,
        block_size=16,
        dtype=dtype,
    )
    check_prefixed(backend, *made)
    check_prefixed(backend, *made, decode=True)


@pytest.mark.parametrize("dim", [40, 64, 128, 256])
@pytest.mark.parametrize("block_size", [5, 16])
def test_shared_prefix_with_many_queries(backend, rng, block_size, dim):
    """Enough rows for the largest tiles, and prefixes that the ranges do not divide."""
    made = prefixed(
        rng,
        num_prefix_blocks=20 * 128 // block_size + 3,
        q_lens=[3, 0, 130, 1, 90, 33],
        kv_lens=[3, 7, 200, 44, 90, 60],
        heads=4,
        kv_heads=1,
        dim=dim,
        block_size=block_size,
        dtype="bfloat16",
    )
    check_prefixed(backend, *made)


@pytest.mark.parametrize("num_seqs", [3, 50])
@pytest.mark.parametrize(
    "option",
    [
        "noncausal",
        "scale",
        "softcap",
        "sinks",
        "mask",
        "mask_start",
        "quantized",
        "quantized_heads",
        "float8",
    ],
)
def test_shared_prefix_options(backend, rng, option, num_seqs):
    quantized, float8 = option.startswith("quantized"), option == "float8"
    made = prefixed(
        rng,
        num_prefix_blocks=70,
        q_lens=[2] * num_seqs,
        kv_lens=[int(n) for n in rng.integers(2, 60, num_seqs)],
        heads=4,
        kv_heads=2,
        dim=128,
        block_size=16,
        dtype="float8_e4m3fn" if float8 else "bfloat16",
        kv_dtype="float8_e4m3fn" if option == "quantized" else "int8" if quantized else None,
        scales=2 if option == "quantized_heads" or float8 else 1 if quantized else 0,
    )
    options = {
        "noncausal": {"causal": False},
        "scale": {"scale": 0.3},
        "softcap": {"softcap": 5.0},
        "sinks": {"sinks": np.array([3.0, -1.0, 6.0, 9.0], np.float32)},
        "mask": {"mask": random_mask(rng, 2 * num_seqs, 1)},
        "mask_start": {
            "mask": random_mask(rng, 2 * num_seqs, 3),
            "mask_start": rng.integers(0, 40, num_seqs).astype(np.int32),
        },
    }.get(option, {})
    check_prefixed(backend, *made, **options)


def test_shared_prefix_without_own_keys(backend, rng):
    """Sequences of length 0 see the prefix alone; rows of no sequence are not written."""
    prefix, own, _ = prefixed(
        rng,
        num_prefix_blocks=4,
        q_lens=[1, 2, 1],
        kv_lens=[9, 0, 3],
        heads=4,
        kv_heads=2,
        dim=64,
        block_size=8,
        dtype="float16",
    )
    own.query_start_loc = np.array([1, 1, 3, 3], np.int32)
    sinks = np.array([0.5, 1.0, -1.0, 2.0], np.float32)
    positional, keywords = own.arguments(backend)
    out = backend.array(np.full(own.q.shape, 7.0, np.float16))
    _, lse = quire.shared_prefix_attention(
        *positional[:3],
        backend.array(prefix),
        *positional[3:],
        sinks=backend.array(sinks),
        out=out,
        return_lse=True,
        **keywords,
    )
    host = backend.numpy(out)
    assert (host[0] == 7.0).all()
    assert (host[3] == 7.0).all()
    slots = np.arange(32)
    k = as_float64(own.k_cache)[prefix[slots // 8], slots % 8]
    v = as_float64(own.v_cache)[prefix[slots // 8], slots % 8]
    want, want_lse = reference.attend(as_float64(own.q[1:3]), k, v, q_start=0, causal=False, sinks=sinks)
    assert_close("attention", host[1:3], want)
    assert_lse_close(backend.numpy(lse)[1:3], want_lse, "float16")


def test_shared_prefix_guards(backend, rng):
    """Bad blocks of the prefix hide their keys and are named; validate="full" refuses them first."""
    prefix, own, _ = prefixed(
        rng,
        num_prefix_blocks=300,
        q_lens=[1] * 40,
        kv_lens=[9] * 40,
        heads=4,
        kv_heads=1,
        dim=64,
        block_size=8,
        dtype="bfloat16",
    )
    positional, keywords = own.arguments(backend)
    for bad in (-1, -2, own.k_cache.shape[0], 2**31 - 1):
        hostile = prefix.copy()
        hostile[237] = bad
        call = [*positional[:3], backend.array(hostile), *positional[3:]]
        got = backend.numpy(quire.shared_prefix_attention(*call, **keywords))
        slots = np.setdiff1d(np.arange(2400), np.arange(237 * 8, 238 * 8))
        k = [as_float64(c)[prefix[slots // 8], slots % 8] for c in (own.k_cache, own.v_cache)]
        for t in (0, 39):
            table = own.block_tables[t]
            near = [
                as_float64(c)[table[np.arange(9) // 8], np.arange(9) % 8] for c in (own.k_cache, own.v_cache)
            ]
            want, _ = reference.attend(
                as_float64(own.q[t : t + 1]),
                np.concatenate([k[0], near[0]]),
                np.concatenate([k[1], near[1]]),
                q_start=10**6,
            )
            assert_close("attention", got[t : t + 1], want)
        if bad == -1:
            continue
        with pytest.raises(
            IndexError, match=rf"\[shared_prefix_attention\] prefix_blocks: .* got {bad} at index 237"
        ):
            quire.check_errors(backend.device)
        with pytest.raises(
            IndexError, match=rf"prefix_blocks: expected -1 or a block id .* got {bad} at \[237\]"
        ):
            quire.shared_prefix_attention(*call, **keywords, validate="full")


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"window": 5}, quire.UnsupportedError, r"window: expected none, since the prefix .* got \(5, -1\)"),
        ({"window": (-1, 0)}, quire.UnsupportedError, r"window: expected none, since the prefix"),
        (
            {"alibi_slopes": np.ones(4, np.float32)},
            quire.UnsupportedError,
            r"alibi_slopes: expected none, since",
        ),
        ({"prefix_blocks": np.zeros(2, np.int64)}, TypeError, r"prefix_blocks: expected int32, got int64"),
        ({"prefix_blocks": np.zeros((2, 1), np.int32)}, ValueError, r"prefix_blocks: expected"),
        ({"prefix_blocks": np.zeros(4, np.int32)[::2]}, ValueError, r"prefix_blocks: expected"),
        ({"seq_lens": np.full(3, 4, np.int32)}, ValueError, r"block_tables: expected int32 \[3, \*\]"),
    ],
)
def test_shared_prefix_refusals(change, error, text):
    arguments = good_arguments() | {"prefix_blocks": np.zeros(1, np.int32)} | change
    with pytest.raises(error, match=r"\[shared_prefix_attention\] " + text):
        quire.shared_prefix_attention(**arguments)
    assert (arguments["out"] == 7.0).all()


def test_shared_prefix_workspace(backend, rng):
    prefix, own, _ = prefixed(
        rng,
        num_prefix_blocks=80,
        q_lens=[1] * 40,
        kv_lens=[9] * 40,
        heads=4,
        kv_heads=1,
        dim=64,
        block_size=16,
        dtype="bfloat16",
    )
    positional, keywords = own.arguments(backend)
    call = [*positional[:3], backend.array(prefix), *positional[3:]]
    size = quire.shared_prefix_attention_workspace_size(40, 40, 4, 64, backend.device)
    want = backend.numpy(quire.shared_prefix_attention(*call, **keywords))
    assert (size == 0) == (backend.device == "cpu")
    for fill in (0, 255):
        space = backend.array(np.full(size, fill, np.uint8))
        got = backend.numpy(quire.shared_prefix_attention(*call, **keywords, workspace=space))
        np.testing.assert_array_equal(got.view(np.uint16), want.view(np.uint16))
    if size > 0:
        with pytest.raises(ValueError, match=rf"workspace: expected uint8 \[{size}\] or longer"):
            quire.shared_prefix_attention(
                *call, **keywords, workspace=backend.array(np.zeros(size - 1, np.uint8))
            )


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
    assert_lse_close(backend.numpy(lse), want_lse, dtype)


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
    assert_lse_close(backend.numpy(lse), want_lse, "float32")
    assert (backend.numpy(out)[2].astype(np.float32) == 0).all()


def test_merge_ignores_the_output_of_an_empty_state(backend):
    """-inf means no keys: whatever stands in that output, NaN included, is not used."""
    a, b = np.ones((1, 1, 8), np.float32), np.full((1, 1, 8), np.nan, np.float32)
    zero, empty = np.zeros((1, 1), np.float32), np.full((1, 1), -np.inf, np.float32)
    out, _ = quire.merge_attention(*(backend.array(x) for x in (a, zero, b, empty)))
    np.testing.assert_array_equal(backend.numpy(out), 1.0)


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
    assert_lse_close(framework.numpy(lse), want_lse, "float32")


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
    assert_lse_close(backend.numpy(lse), want_lse, "float32")


# ---- refusals ----------------------------------------------------------------------------------------------------------


def good_arguments():
    return {
        "q": np.ones((2, 4, 16), np.float32),
        "k_cache": np.ones((3, 4, 2, 16), np.float32),
        "v_cache": np.ones((3, 4, 2, 16), np.float32),
        "block_tables": np.zeros((2, 2), np.int32),
        "seq_lens": np.full(2, 4, np.int32),
        "out": np.full((2, 4, 16), 7.0, np.float32),
    }


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
        ("q", np.ones((2, 4, 24), np.float32), ValueError, r"k: expected head_dim 24 like q, got 16"),
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
            r"block_tables: expected int32, got int64 \[2, 2\]",
        ),
        (
            "block_tables",
            np.zeros((3, 2), np.int32),
            ValueError,
            r"block_tables: expected int32 \[2, \*\], got int32 \[3, 2\]",
        ),
        ("seq_lens", np.full(2, 4, np.int64), TypeError, r"seq_lens: expected int32, got int64"),
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
        ("sinks", np.ones(4, np.float16), TypeError, r"sinks: expected float32, got float16"),
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
        ("mask", np.zeros((2, 1), np.int8), TypeError, r"mask: expected uint8, got int8"),
        ("mask", np.zeros((2, 1), bool), TypeError, r"mask: expected uint8, got bool"),
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
