"""Rotary encoding in float64.

SPDX-License-Identifier: Apache-2.0
"""

import numpy as np


def rotary(positions: np.ndarray, x: np.ndarray, table: np.ndarray, style: str) -> np.ndarray:
    rotary_dim = table.shape[1]
    half = rotary_dim // 2
    out = x.copy()
    for t, position in enumerate(positions):
        if not 0 <= position < table.shape[0]:
            continue
        cos, sin = table[position, :half], table[position, half:]
        if style == "neox":
            first, second = slice(0, half), slice(half, rotary_dim)
        else:
            first, second = slice(0, rotary_dim, 2), slice(1, rotary_dim, 2)
        a, b = x[t][:, first], x[t][:, second]
        out[t][:, first] = a * cos - b * sin
        out[t][:, second] = b * cos + a * sin
    return out
