"""Activations in float64.

SPDX-License-Identifier: Apache-2.0
"""

import math

import numpy as np

_erf = np.vectorize(math.erf, otypes=[np.float64])


def silu(x: np.ndarray) -> np.ndarray:
    return x * np.exp(-np.logaddexp(0.0, -x))


def gelu(x: np.ndarray) -> np.ndarray:
    # erfc keeps the digits of the lower tail that 1 + erf loses.
    erfc = np.vectorize(math.erfc, otypes=[np.float64])
    return x / 2 * erfc(-x / math.sqrt(2.0))


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    inner = math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)
    return x * np.exp(-np.logaddexp(0.0, -2.0 * inner))


def gelu_fast(x: np.ndarray) -> np.ndarray:
    inner = 0.7978845608 * x * (1.0 + 0.044715 * x**2)
    return x * np.exp(-np.logaddexp(0.0, -2.0 * inner))


def gelu_quick(x: np.ndarray) -> np.ndarray:
    return x * np.exp(-np.logaddexp(0.0, -1.702 * x))


def relu_squared(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0.0) ** 2


GATED = {"silu_and_mul": silu, "gelu_and_mul": gelu, "gelu_tanh_and_mul": gelu_tanh}
PLAIN = {
    "gelu_new": gelu_tanh,
    "gelu_fast": gelu_fast,
    "gelu_quick": gelu_quick,
    "relu_squared": relu_squared,
}


def gated(name: str, x: np.ndarray) -> np.ndarray:
    half = x.shape[-1] // 2
    return GATED[name](x[..., :half]) * x[..., half:]
