"""paged_attention and attention against float64: every option, on every backend.

SPDX-License-Identifier: Apache-2.0
"""

import itertools

import frameworks
import numpy as np
import pytest
from attention_batch import (
    DTYPES,
    OPTIONS,
    Batch,
    draw,
    drawn_options,
    poison,
)
from frameworks import Torch, as_float64
from reference import attention as reference
from tolerances import assert_close

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
        [90] * 140,
        [1 + 53 * i % 400 for i in range(90)],
    ],
    ids=[
        "one",
        "one_long",
        "alike",
        "unlike",
        "alike_in_window",
        "a_cta_each",
        "rounds",
        "many_unlike",
        "many_rounds",
        "more_unlike",
    ],
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
@pytest.mark.parametrize(
    "kv_lens",
    [[4096], [1000] * 3, [3000, 40] * 10, [3000, 40] * 40],
    ids=["one", "alike", "unlike", "many_unlike"],
)
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
