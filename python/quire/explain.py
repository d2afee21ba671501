"""What an op would run on the device of its tensors, and why.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import quire
from quire import _core

__all__ = ["Explanation", "explain"]


@dataclass(frozen=True)
class Explanation:
    """What :func:`explain` found. ``str()`` makes a readable paragraph of it.

    Attributes:
        op: The op's name.
        device: "cpu" or "cuda:0"; empty like ``variant``.
        variant: The kernel, empty where a zero size leaves nothing to run. Attention on CUDA: what its ``variant=`` takes. Products with
            quantized weights on CUDA: "few" (tokens), "wgmma" or "mma". Quantizing there: "rows" in registers, or "groups", behind
            "range+" where a scale of the whole tensor is computed; dequantizing: "rows" or "elements". Other ops on CUDA: "vector" or
            "element" for 16-byte or single accesses, "only" where there is one kernel. On the CPU: the instruction set,
            for attention behind "decode" or "prefill", for products behind the kernel. An op that is two calls tells of the
            second: quantized_matmul with an "fp8" or "w8a8" weight of the product.
        reasons: Why that one, and why not a faster one; a clause each.
    """

    op: str
    device: str
    variant: str
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        """For people."""
        head = f"{self.op} on {self.device}: {self.variant}" if self.variant else f"{self.op}: nothing to run"
        return "\n".join([head, *(f"  - {reason}" for reason in self.reasons)])


def explain(op: str | Callable[..., object], *args: object, **kwargs: object) -> Explanation:
    """Which kernel ``op(*args, **kwargs)`` would run, and why.

    The call is validated and raises as ever, and the choice is the one that the call itself would make; then nothing runs and nothing is
    written. Outputs that the call would allocate are allocated and dropped.

    Args:
        op: A function of quire that takes tensors, or its name.
        args: Its arguments.
        kwargs: Its keyword arguments.

    Returns:
        The :class:`Explanation`.

    Raises:
        ValueError: There is no such op.

    Example:
        >>> import numpy as np, quire
        >>> x = np.ones((4, 8), np.float32)
        >>> explanation = quire.explain("rms_norm", x, np.ones(8, np.float32))
        >>> explanation.op, explanation.device, quire.cpu_isa().removesuffix("_amx") == explanation.variant
        ('rms_norm', 'cpu', True)
    """
    function = (getattr(quire, op) if op in quire.__all__ else None) if isinstance(op, str) else op
    if not callable(function):
        raise ValueError(f"[explain] op: expected a function of quire or its name, got {op!r}")
    ran, device, variant, reasons = _core.explain(lambda: function(*args, **kwargs))
    return Explanation(
        ran or (op if isinstance(op, str) else str(getattr(op, "__name__", op))),
        device,
        variant,
        tuple(reasons),
    )
