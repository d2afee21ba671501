"""The paged KV cache of a model: quire.KVCache's memory, per layer, with the scales of a quantized one.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

import quire
from quire.demo import DemoError
from quire.demo.backend import Array

if TYPE_CHECKING:
    from quire.demo.model import Model

KV_DTYPES = {
    "fp32": "float32",
    "fp16": "float16",
    "bf16": "bfloat16",
    "fp8_e4m3fn": "float8_e4m3fn",
    "fp8_e5m2": "float8_e5m2",
    "int8": "int8",
}
# stored = value / scale. An int8 grid is even, so the largest value seen is put at 100 of 127. A float8 grid
# is relative: there only overflow and underflow matter, and the largest value seen is put well below the
# format's own largest.
CALIBRATION_TARGET = {"fp8_e4m3fn": 112.0, "fp8_e5m2": 3584.0, "int8": 100.0}


class PagedCache:
    """Keys and values of every layer.

    k, v: per layer `[num_blocks, block_size, num_kv_heads, head_dim]` (any object with `__dlpack__`).
    k_scale, v_scale: per layer float32 `[num_kv_heads]`, or None where the cache is not quantized.
    """

    def __init__(self, model: Model, num_blocks: int, block_size: int, kv_dtype: str) -> None:
        """Allocates the cache; raises DemoError where it does not fit."""
        config = model.config
        self.kv_dtype = kv_dtype
        self.quantized = kv_dtype in CALIBRATION_TARGET
        self.num_blocks, self.block_size = num_blocks, block_size
        try:
            self.pool = quire.KVCache(
                config.num_layers,
                num_blocks,
                block_size,
                config.num_kv_heads,
                config.head_dim,
                KV_DTYPES[kv_dtype],
                model.backend.device,
            )
        except MemoryError as error:
            raise DemoError(f"the KV cache does not fit: {error}") from None
        self.k = [self.pool.k(layer) for layer in range(config.num_layers)]
        self.v = [self.pool.v(layer) for layer in range(config.num_layers)]
        ones = [model.backend.array(np.ones(config.num_kv_heads, np.float32)) for _ in self.k]
        self.k_scale: list[Array | None] = list(ones) if self.quantized else [None] * len(ones)
        self.v_scale: list[Array | None] = list(ones) if self.quantized else [None] * len(ones)

    def calibrate(self, model: Model, prompts: list[list[int]], max_tokens: int = 512) -> None:
        """Sets each layer's and kv head's scale from the largest key and value of a few prompts.

        The prompts run through the model once, with an unquantized cache. Later values beyond the largest
        seen still have some room; beyond that they saturate.
        """
        if not self.quantized:
            return
        xp = model.backend.xp
        largest = [[xp.zeros(model.config.num_kv_heads, xp.float32) for _ in self.k] for _ in "kv"]

        def observe(layer: int, k: Array, v: Array) -> None:
            for kind, values in enumerate((k, v)):
                seen = xp.abs(values.astype(xp.float32)).max(axis=(0, 2))
                largest[kind][layer] = xp.maximum(largest[kind][layer], seen)

        for prompt in prompts:
            model.run_prompt(prompt[:max_tokens], observe=observe)
            max_tokens -= len(prompt)
            if max_tokens <= 0:
                break
        target = CALIBRATION_TARGET[self.kv_dtype]
        for layer in range(len(self.k)):
            self.k_scale[layer], self.v_scale[layer] = (
                xp.where(values[layer] > 0, values[layer] / target, 1.0).astype(xp.float32)
                for values in largest
            )
