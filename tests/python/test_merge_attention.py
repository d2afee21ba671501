"""merge_attention against float64, and of parts against the whole.

SPDX-License-Identifier: Apache-2.0
"""

import numpy as np
import pytest
from attention_batch import (
    DTYPES,
    draw,
)
from frameworks import as_float64
from reference import attention as reference
from tolerances import assert_close, assert_lse_close

import quire


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
