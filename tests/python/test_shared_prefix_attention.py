"""shared_prefix_attention against float64: every option, guards, workspace.

SPDX-License-Identifier: Apache-2.0
"""

import numpy as np
import pytest
from attention_batch import DTYPES, good_arguments, prefixed, random_mask
from frameworks import as_float64
from reference import attention as reference
from tolerances import assert_close, assert_lse_close

import quire


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
    assert_lse_close(backend.numpy(lse), want_lse, own.q.dtype.name, backend.device, own.q.shape[2])


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
    assert_lse_close(backend.numpy(lse)[1:3], want_lse, "float16", backend.device)


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
        (
            {"prefix_blocks": np.zeros(2, np.int64)},
            TypeError,
            r"prefix_blocks: expected int32 \[\*\], got int64",
        ),
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
