"""What ops with a quantized result share: making ``out`` and ``scales``.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from quire._allocate import Array, dtype_name, empty, finish

Granularity = Literal["tensor", "token", "group"]


class Quantized:
    """The tensors of one quantized result."""

    def __init__(
        self,
        op: str,
        like: Array,
        shape: Sequence[int],
        out_dtype: object,
        scale: Array | None,
        granularity: str,
        group_size: int,
        out: Array | tuple[Array, Array] | None,
    ) -> None:
        """Takes or allocates them, in the framework of ``like``.

        Raises:
            ValueError: ``scale`` is there where scales are computed, or missing where they are not; ``out`` is no pair.
            TypeError: ``out_dtype`` is neither of the two.
        """
        name = dtype_name(out_dtype)
        if name not in ("float8_e4m3fn", "int8"):
            raise TypeError(f"[{op}] out_dtype: expected float8_e4m3fn or int8, got {name}")
        self._like, self._given = like, out
        self.out: Array = out
        self.scales: Array = scale
        if granularity == "tensor":
            if scale is None:
                raise ValueError(f'[{op}] scale: expected one for granularity "tensor", got none')
            if out is None:
                self.out = empty(like, shape, name)
            return
        if scale is not None:
            raise ValueError(
                f'[{op}] scale: expected none for granularity "{granularity}", which computes its own, got one'
            )
        if out is None:
            self.out = empty(like, shape, name)
            groups = 1
            if granularity == "group" and shape:
                groups = shape[-1] // group_size if isinstance(group_size, int) and group_size > 0 else 1
            self.scales = empty(like, (*shape[:-1], groups), "float32")
        elif isinstance(out, tuple) and len(out) == 2:
            self.out, self.scales = out
        else:
            raise ValueError(
                f"[{op}] out: expected a pair (out, scales), as scales are computed, got {type(out).__qualname__}"
            )

    def finish(self) -> tuple[Array, Array]:
        """``(out, scales)`` in the caller's framework, now that they are written."""
        if self._given is not None:
            return self.out, self.scales
        out = finish(self.out, self._like)
        return out, finish(self.scales, self._like)
