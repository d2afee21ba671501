"""That the tolerances follow from what they are said to follow from.

SPDX-License-Identifier: Apache-2.0
"""

import numpy as np
import pytest
from frameworks import as_float64, np_dtype
from tolerances import lse_error


def sum_as_hopper(products: np.ndarray) -> np.ndarray:
    """Sums along the last axis: 32 products and the sum so far at a time, each cut 13 bits below the largest."""
    total = np.zeros(products.shape[0])
    for at in range(0, products.shape[1], 32):
        terms = np.concatenate([total[:, None], products[:, at : at + 32]], axis=1)
        largest = np.abs(terms).max(axis=1, keepdims=True)
        unit = np.exp2(np.floor(np.log2(np.maximum(largest, 1e-30))) - 13)
        total = (np.trunc(terms / unit) * unit).sum(axis=1)
    return total


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_lse_of_float8_queries(rng, head_dim):
    worst = 0.0
    for _ in range(5):
        q, k = rng.standard_normal((2, 10_000, head_dim)).astype(np_dtype("float8_e4m3fn"))
        products = as_float64(q) * as_float64(k)
        scale = 1.5 / head_dim**0.5
        score = scale * products.sum(axis=1)
        error = np.abs(scale * sum_as_hopper(products) - score) / np.maximum(1.0, np.abs(score))
        worst = max(worst, error.max())
    limit = lse_error("float8_e4m3fn", "cuda:0", head_dim)
    assert limit / 3 <= worst <= limit * 2 / 3
