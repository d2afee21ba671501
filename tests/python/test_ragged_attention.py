"""Attention over keys and values without a cache, against float64.

SPDX-License-Identifier: Apache-2.0
"""

import numpy as np
import pytest
from attention_batch import (
    DTYPES,
    OPTIONS,
    QUANTIZED,
    draw,
)
from frameworks import as_float64
from reference import attention as reference
from reference import kv_cache
from tolerances import assert_close, assert_lse_close

import quire


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
