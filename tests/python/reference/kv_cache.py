"""Quantized storage of keys and values.

SPDX-License-Identifier: Apache-2.0
"""

import ml_dtypes
import numpy as np

LARGEST = {"float8_e4m3fn": 448.0, "float8_e5m2": 57344.0}


def store(x: np.ndarray, scale: np.ndarray | None, dtype: str) -> np.ndarray:
    """x float32 [tokens, heads, dim] as it lies in a cache of `dtype`; scale [1] or [heads]."""
    if scale is not None:
        x = x / scale.astype(np.float32).reshape(1, -1, 1)  # one float32 division, as documented
    if dtype == "int8":
        rounded = np.rint(np.where(np.isnan(x), 0.0, x))
        return np.clip(rounded, -128, 127).astype(np.int8)
    if dtype in LARGEST:
        limit = np.float32(LARGEST[dtype])
        with np.errstate(invalid="ignore"):
            return np.clip(x, -limit, limit).astype(getattr(ml_dtypes, dtype))
    return x.astype(getattr(ml_dtypes, dtype) if dtype == "bfloat16" else dtype)


def load(stored: np.ndarray, scale: np.ndarray | None) -> np.ndarray:
    wide = stored.astype(np.float32).astype(np.float64)
    return wide if scale is None else wide * scale.astype(np.float64).reshape(1, -1, 1)
