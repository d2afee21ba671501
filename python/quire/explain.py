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
        op: The op's name; of a call that is several (quantized_matmul with an "fp8" or "w8a8" weight, a constructor of ``PackedWeight``)
            that of the last.
        device: "cpu" or "cuda:<index>"; empty like ``variant``.
        variant: The kernel; empty where a zero size leaves nothing to run. On the CPU the instruction set, such as "avx2", behind the
            kernel where there are several: "decode", "prefill", "decode_and_prefill" for attention, "fixed_point", "unpacked" for
            quantized_matmul, "rows", "int32", "float32" for scaled_matmul, as in "decode_avx2". On CUDA:

            - attention: one of the names that its ``variant=`` takes, or two with "+" between, which are two launches;
            - quantized_matmul: "few" (tokens), "wgmma" or "mma"; scaled_matmul: "wgmma" or "mma";
            - quantize_fp8, quantize_int8: "rows", which stay in registers, or "groups"; of a computed scale for the whole tensor
              "tensor", or "range+rows", "range+groups", where x is read twice; dequantize_fp8, dequantize_int8: "rows" or "elements";
            - norms, activations, rotations, write_kv, gather_kv, copy_blocks: "vector" or "element", for accesses of 16 bytes or of one
              element;
            - the rest: "only", as there is one kernel.

            shared_prefix_attention with a prefix has that of the prefix, "+", and that of what follows.
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
