"""What CUDA's attention kernels cannot do, so that a test fails where one is refused that should run.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import re

import quire

#: In the order of the library's own list.
VARIANTS = (
    "mma_split_keys_8",
    "mma_split_keys_16",
    "mma_split_rows",
    "mma_split_rows_128",
    "wgmma",
    "mma_split_keys_8_small",
    "mma_split_rows_small",
    "simt",
)
#: Compute capabilities with 99 KiB of shared memory to a CTA.
SMALL_SHARED = {(8, 6), (8, 9), (12, 0), (12, 1)}


def refusal(
    variant: str, capability: tuple[int, int], dim: int, dtype: str, kv_dtype: str | None = None
) -> str | None:
    """Why ``variant`` must be refused, for contiguous tensors and a block_size that is a multiple of 8; None: it must run."""
    kv_bits = 8 if (kv_dtype or dtype).startswith(("float8", "int8")) else 16
    q_bits = 8 if dtype.startswith("float8") else 16
    if (variant == "simt") != (dtype == "float32"):
        return "q is not float32" if variant == "simt" else "q is float32"
    if capability in SMALL_SHARED and (
        variant == "mma_split_keys_16"
        or (variant == "mma_split_keys_8" and dim > 128)
        or (variant == "mma_split_rows" and dim > 128 and kv_bits == 16)
    ):
        return "the device has too little shared memory"
    if variant == "mma_split_rows_128" and dim > 128:
        return "head_dim is over 128"
    if variant.endswith("_small") and dim <= 128:
        return "head_dim is at most 128"
    if variant == "mma_split_rows_small" and kv_bits != 16:
        return "keys and values are not 16-bit"
    if variant == "wgmma":
        if capability != (9, 0) or not re.search(r"\b90a\b", quire.cuda_architectures()):
            return "the device is no Hopper, or this build has no code for it"
        if q_bits == 8 and kv_dtype not in (None, dtype):
            return "q is float8_e4m3fn and keys and values are not"
        if dim * min(q_bits, kv_bits) % 128 != 0:
            return "not a (positive )?multiple of 16 bytes"
    return None
