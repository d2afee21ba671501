"""How close results must be, in one place: ulps of the result's dtype, by op.

An ulp is taken at the reference's own value, and not below `floor` times the largest value of the result, or of its row along the
last axis where the rows are sums of their own (sums cancel).

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import numpy as np

#: Bits of the mantissa, the hidden one not counted.
MANTISSA_BITS = {"float32": 23, "float16": 10, "bfloat16": 7, "float8_e4m3fn": 3, "float8_e5m2": 2}

#: (float32, 16-bit) ulps. 0.5 is perfect rounding; arithmetic in float32 adds next to nothing to a 16-bit result.
ULPS = {
    "norm": (8.0, 0.52),
    "layer_norm": (8.0, 0.55),
    "activation": (12.0, 0.54),
    "rotary": (8.0, 0.55),
    "merge": (8.0, 0.55),
    # Attention rounds probabilities to 16 bits for the matrix units, as every peer does.
    "attention": (64.0, 2.5),
    # Put together from results that are rounded to 16 bits themselves, each by half an ulp at most; their weights add up to 1, and so do
    # the errors: attention's limit and half an ulp.
    "shared_prefix_attention": (64.0, 2.5 + 0.5),
}

#: Below this share of the largest magnitude, of the result or of the row, an error counts as if at that magnitude.
FLOOR = {
    "norm": 1e-6,
    "layer_norm": 0.25,
    "activation": 2e-3,
    "rotary": 0.25,
    "merge": 0.5,
    "attention": 0.5,
    "shared_prefix_attention": 0.5,
}

#: The ops whose floor is of each row along the last axis: a row of small values hides behind no other.
PER_ROW = {"merge", "attention", "shared_prefix_attention"}


def lse_error(dtype: str, device: str, head_dim: int) -> float:
    """Largest error of a log-sum-exp (natural log), relative to its magnitude or 1, by the dtype of the queries.

    The CPU adds every dtype in float32. Hopper's tensor cores cut each of 32 products of float8, and the sum so far, 13 bits below the
    largest of them. A log-sum-exp is off by no more than its scores are. `test_tolerances.py` adds standard normal numbers under a q_scale of
    1.5 so: the limit is about twice the largest error of 50 000 scores, for what biases take from a log-sum-exp but not from its error.
    """
    if dtype == "float32" or device == "cpu":
        return 2e-6
    return 4e-3 * (head_dim / 256) ** 0.5 if dtype == "float8_e4m3fn" else 1e-4


def assert_close(op: str, got: np.ndarray, want: np.ndarray) -> None:
    """Compares a result with its float64 reference: NaN and infinity first, then ulps; reports the worst element."""
    name = got.dtype.name
    wide = got.astype(np.float32).astype(np.float64)
    assert got.shape == want.shape, f"{op}: shape {got.shape}, want {want.shape}"
    if got.size == 0:
        return
    for kind in (np.isnan, np.isposinf, np.isneginf):
        mismatch = np.argwhere(kind(wide) != kind(want))
        assert len(mismatch) == 0, (
            f"{op}: {kind.__name__} differs at {len(mismatch)} places, first {tuple(mismatch[0])}: "
            f"got {wide[tuple(mismatch[0])]}, want {want[tuple(mismatch[0])]}"
        )
    finite = np.isfinite(want)
    if not finite.any():
        return
    limit = ULPS[op][0 if name == "float32" else 1]
    size = np.where(finite, np.abs(want), 0.0)
    largest = size.max(axis=-1, keepdims=True) if op in PER_ROW else size.max()
    scale = np.maximum(size, FLOOR[op] * largest)
    smallest = np.finfo(np.float32).tiny if name != "float16" else 2.0**-14
    exponent = np.floor(np.log2(np.maximum(scale, smallest)))
    ulp = np.exp2(exponent - MANTISSA_BITS[name])
    error = np.where(finite, np.abs(np.where(finite, wide - want, 0.0)) / ulp, 0.0)
    worst = np.unravel_index(np.argmax(error), error.shape)
    assert error[worst] <= limit, (
        f"{op}: {error[worst]:.3f} ulp of {name} at {tuple(int(i) for i in worst)}, limit {limit}: "
        f"got {wide[worst]!r}, want {want[worst]!r}"
    )


def assert_lse_close(
    got: np.ndarray, want: np.ndarray, dtype: str, device: str = "cuda", head_dim: int = 256
) -> None:
    """A log-sum-exp against float64, by `lse_error`."""
    np.testing.assert_array_equal(np.isneginf(got), np.isneginf(want))
    finite = np.isfinite(want)
    error = np.abs(got[finite].astype(np.float64) - want[finite]) / np.maximum(1.0, np.abs(want[finite]))
    limit = lse_error(dtype, device, head_dim)
    assert error.size == 0 or error.max() <= limit, f"lse error {error.max()}, limit {limit}"


#: Of a product with quantized operands, relative to the sum of the products' magnitudes: weights or activations rounded to the
#: activations' dtype or to 16-bit fixed point, and the order of additions.
PRODUCT_ERROR = {"float32": 1e-6, "float16": 2.0**-12, "bfloat16": 2.0**-9}


def assert_product_close(
    got: np.ndarray, want: np.ndarray, magnitude: np.ndarray, extra: float = 0.0
) -> None:
    """A product against float64: half an ulp of the result and PRODUCT_ERROR of ``magnitude``, the sums of |a||b|."""
    name = got.dtype.name
    assert got.shape == want.shape, f"shape {got.shape}, want {want.shape}"
    error = np.abs(got.astype(np.float32).astype(np.float64) - want)
    limit = np.abs(want) * 2.0 ** -(MANTISSA_BITS[name] + 1) * 1.01 + magnitude * (
        PRODUCT_ERROR[name] + extra
    )
    worst = np.unravel_index(np.argmax(error - limit), error.shape) if error.size else ()
    assert not error.size or error[worst] <= limit[worst], (
        f"error {error[worst]:.3g} at {tuple(int(i) for i in worst)}, limit {limit[worst]:.3g}: "
        f"got {got[worst]}, want {want[worst]}"
    )
