"""Quantized results, and the check of one.

SPDX-License-Identifier: Apache-2.0
"""

import ml_dtypes
import numpy as np

LARGEST = {"float8_e4m3fn": 448.0, "int8": 127.0}
SMALLEST_SCALE = np.float32(2.0**-126)


def store(quotient: np.ndarray, dtype: str) -> np.ndarray:
    """float32 quotients, saturated and rounded to nearest even."""
    quotient = quotient.astype(np.float32)
    if dtype == "int8":
        return np.clip(np.rint(np.where(np.isnan(quotient), 0.0, quotient)), -128, 127).astype(np.int8)
    limit = np.float32(LARGEST[dtype])
    with np.errstate(invalid="ignore"):
        return np.clip(quotient, -limit, limit).astype(ml_dtypes.float8_e4m3fn)


def groups_of(y: np.ndarray, granularity: str, group_size: int) -> np.ndarray:
    """[..., groups, elements of a group]."""
    size = y.shape[-1] if granularity in ("tensor", "token") else group_size
    return y.reshape(*y.shape[:-1], -1 if size else 1, size)


def scales_of(y: np.ndarray, dtype: str, granularity: str, group_size: int) -> np.ndarray:
    """The computed scales of a float32 result, exactly as documented."""
    largest = np.abs(groups_of(y, granularity, group_size)).max(-1, initial=0.0).astype(np.float32)
    return np.maximum(largest / np.float32(LARGEST[dtype]), SMALLEST_SCALE)


def assert_quantized(
    out: np.ndarray,
    scales: np.ndarray,
    want: np.ndarray,
    dtype: str,
    granularity: str,
    group_size: int,
    slack: float,
) -> None:
    """out and scales against the float64 result ``want``, which the float32 one is near to, within ``slack``.

    A stored value lies between what the ends of that interval round to, under the scale that was given or computed.
    """
    assert out.shape == want.shape
    assert out.dtype.name == dtype
    assert scales.dtype == np.float32
    if granularity != "tensor":
        expected = scales_of(want, dtype, granularity, group_size)
        assert scales.shape == expected.shape
        np.testing.assert_allclose(scales, expected, rtol=slack + 2e-7)
    wide = groups_of(want, granularity, group_size)
    spread = scales.astype(np.float64).reshape(1 if granularity == "tensor" else scales.shape)
    quotient = wide / (spread if granularity == "tensor" else spread[..., None])
    margin = np.abs(quotient) * (slack + 2e-7)
    low = store(quotient - margin, dtype).astype(np.float64)
    high = store(quotient + margin, dtype).astype(np.float64)
    got = groups_of(out.astype(np.float64), granularity, group_size)
    wrong = ~((low <= got) & (got <= high))
    assert not wrong.any(), (
        f"{wrong.sum()} of {wrong.size} wrong, first at {np.argwhere(wrong)[0]}: got {got[wrong][0]}, want {low[wrong][0]} to {high[wrong][0]}"
    )
