"""What the constructors of packed weights look at on the host: a checkpoint's tensors, the values of scales, and groups of rows.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np

from quire import _core
from quire._allocate import Array, dtype_name, framework_of, from_numpy, numpy_dtype, shape_of
from quire._quantized import whole_number
from quire._refusals import unexpected

MAX_EXTENT = 2**31 - 1
_GROUP_SIZES = (128, 64, 32)


def host(op: str, arg: str, x: Array, stream: object) -> np.ndarray[Any, Any]:
    """A tensor's contents in host memory, once the stream, and the framework's current one, are done with what they hold.

    Raises:
        quire.UnsupportedError: The stream is being captured.
    """
    if isinstance(x, np.ndarray):
        return x
    _core.synchronize(op, arg, x, stream)
    framework = framework_of(x)
    if "torch" in sys.modules and isinstance(x, sys.modules["torch"].Tensor):
        torch = sys.modules["torch"]
        x = x.detach().cpu().contiguous()
        name = str(x.dtype).removeprefix("torch.")
        if name in ("bfloat16", "float8_e4m3fn", "float8_e5m2"):
            bits: np.ndarray[Any, Any] = x.view(torch.int16 if x.element_size() == 2 else torch.uint8).numpy()
            return bits.view(numpy_dtype(name))
        array: np.ndarray[Any, Any] = x.numpy()
        return array
    if framework == "cupy":
        array = sys.modules["cupy"].asnumpy(x)
        return array
    if framework == "quire":
        shape = x.shape
        if len(shape) < 2:  # what is copied has a rank of 2 or more
            x = x.reshape((math.prod(shape), 1))
        target = np.empty(x.shape, numpy_dtype(x.dtype))
        if target.size:
            pairs = np.repeat(np.arange(len(target), dtype=np.int64)[:, None], 2, axis=1)
            _core.swap_blocks(target, x, pairs, stream)
            _core.synchronize(op, arg, x, stream)
        return target.reshape(shape)
    return np.asarray(x)


def settle(op: str, arg: str, x: Array, stream: object) -> None:
    """Waits for what was made: on the stream, and, of copies from the host, on the framework's current one."""
    _core.synchronize(op, arg, x, stream)
    if stream is not None:
        _core.synchronize(op, arg, x, None)


def dtype_of(op: str, arg: str, x: Array) -> str:
    """The name of a tensor's dtype."""
    shape_of(op, arg, x)
    return dtype_name(x.dtype)


def shape_of_rank(op: str, arg: str, x: Array, rank: int) -> tuple[int, ...]:
    """The shape of a tensor that must have this rank and no zero size."""
    shape = shape_of(op, arg, x)
    if len(shape) != rank:
        raise unexpected(op, arg, f"rank {rank}", f"{dtype_name(x.dtype)} {list(shape)}")
    if any(n < 1 or n > MAX_EXTENT for n in shape):
        raise unexpected(op, arg, "extents from 1 to 2^31 - 1", list(shape))
    return shape


def check_shape(op: str, arg: str, x: Array, expected: tuple[int, ...]) -> None:
    """Refuses another shape."""
    shape = shape_of(op, arg, x)
    if shape != expected:
        name = dtype_name(x.dtype)
        raise unexpected(op, arg, f"{name} {list(expected)}", f"{name} {list(shape)}")


def check_dtype(op: str, arg: str, x: Array, expected: str) -> None:
    """Refuses another dtype."""
    name = dtype_of(op, arg, x)
    if name != expected:
        raise TypeError(f"[{op}] {arg}: expected {expected}, got {name}")


def check_bits(op: str, bits: int, known: tuple[int, ...]) -> None:
    """Refuses codes of other bits."""
    if whole_number(op, "bits", bits) not in known:
        text = ", ".join(map(str, known[:-1])) + f" or {known[-1]}"
        raise _core.UnsupportedError(f"[{op}] bits: expected {text}, got {bits}")


def check_scales(
    op: str, arg: str, scales: Array, stream: object, *, positive: bool = True
) -> np.ndarray[Any, Any]:
    """Their values as float32 on the host, after a look at each."""
    name = dtype_of(op, arg, scales)
    if name not in ("float32", "float16", "bfloat16"):
        raise TypeError(f"[{op}] {arg}: expected float32, float16 or bfloat16, got {name}")
    values = host(op, arg, scales, stream).astype(np.float32)
    bad = ~np.isfinite(values)
    if positive:
        bad |= values < 0
    if bad.any():
        at = [int(i) for i in np.argwhere(bad)[0]]
        wanted = "finite values of 0 or more" if positive else "finite values"
        raise unexpected(op, arg, wanted, f"{values[tuple(at)]} at {at}")
    return values


def one_value(op: str, arg: str, x: Array | None, like: Array, stream: object) -> Array | None:
    """A scale of everything, as float32 [1]."""
    if x is None:
        return None
    values = check_scales(op, arg, x, stream)
    if values.size != 1:
        raise unexpected(op, arg, "one value", list(values.shape))
    return from_numpy(values.reshape(1), like)


def words_of(count: int, bits: int) -> int:
    """How many words of 32 bits hold so many codes."""
    return -(-count * bits // 32)


class Groups:
    """Which rows share a scale in a packed weight, and where they come from."""

    def __init__(
        self,
        op: str,
        in_features: int,
        num_groups: int,
        group_size: int | None,
        g_idx: Array | None = None,
        stream: object = None,
        *,
        names: tuple[str, str] = ("scales", "g_idx"),
    ) -> None:
        """``names`` are those of the tensors that num_groups and g_idx come from.

        Raises:
            ValueError: The groups contradict each other.
            TypeError: g_idx has another dtype.
            IndexError: g_idx names a group that is not there.
        """
        self.group_size, self.num_rows = 0, in_features
        self.permutation: np.ndarray[Any, Any] | None = None
        self.groups: np.ndarray[Any, Any] | None = None
        if group_size is not None:
            group_size = whole_number(op, "group_size", group_size)
        if group_size not in (None, -1) and not 0 < group_size <= MAX_EXTENT:
            raise unexpected(op, "group_size", "1 or more, or -1 for one group", group_size)
        order = (
            None if g_idx is None else self._read_g_idx(op, names[1], g_idx, in_features, num_groups, stream)
        )
        if num_groups == 1:
            if group_size not in (None, -1) and group_size < in_features:
                raise unexpected(op, names[0], f"{-(-in_features // group_size)} groups of {group_size}", 1)
            return
        if group_size == -1:
            raise unexpected(op, names[0], "one group, as group_size is -1", num_groups)
        if group_size is None:
            group_size = self._infer(op, in_features, num_groups, order)
        regular = np.arange(in_features) // group_size
        if order is None:
            if -(-in_features // group_size) != num_groups:
                raise unexpected(
                    op, names[0], f"{-(-in_features // group_size)} groups of {group_size}", num_groups
                )
            order = regular
        rows = np.argsort(order, kind="stable").astype(np.int32)
        if not self._regular(group_size) or (order[rows] != regular).any():
            self._irregular(op, names[1], order, rows)
        elif (order != regular).any():
            self.permutation = rows

    @staticmethod
    def _read_g_idx(
        op: str, arg: str, g_idx: Array, in_features: int, num_groups: int, stream: object
    ) -> np.ndarray[Any, Any]:
        check_shape(op, arg, g_idx, (in_features,))
        order = host(op, arg, g_idx, stream)
        if order.dtype.kind not in "iu":
            raise TypeError(f"[{op}] {arg}: expected int32, got {dtype_name(g_idx.dtype)}")
        order = order.astype(np.int64)
        bad = (order < 0) | (order >= num_groups)
        if bad.any():
            at = int(np.argmax(bad))
            raise IndexError(
                f"[{op}] {arg}: expected a group in [0, {num_groups}), got {order[at]} at [{at}]"
            )
        return order

    @staticmethod
    def _infer(op: str, in_features: int, num_groups: int, order: np.ndarray[Any, Any] | None) -> int:
        if order is not None:
            return int(np.bincount(order, minlength=num_groups).max())
        if in_features % num_groups != 0:
            raise unexpected(
                op, "group_size", f"a number, as {num_groups} groups do not divide {in_features}", None
            )
        return in_features // num_groups

    def _regular(self, group_size: int) -> bool:
        """Groups of neighbours, cut into those of a size that kernels know; False where none divides them."""
        for size in _GROUP_SIZES:
            if group_size % size == 0:
                self.group_size = size
                if group_size != size:
                    self.groups = (np.arange(-(-self.num_rows // size)) // (group_size // size)).astype(
                        np.int32
                    )
                return True
        return False

    def _irregular(self, op: str, arg: str, order: np.ndarray[Any, Any], rows: np.ndarray[Any, Any]) -> None:
        """Groups of any size: each begins at a multiple of 32 rows, and rows that it does not fill are empty."""
        size = _GROUP_SIZES[-1]
        counts = np.bincount(order)
        blocks = -(-counts // size)
        self.group_size, self.num_rows = size, int(blocks.sum()) * size
        if self.num_rows > MAX_EXTENT:
            raise unexpected(op, arg, "groups that fill fewer than 2^31 rows", self.num_rows)
        self.groups = np.repeat(np.arange(len(counts)), blocks).astype(np.int32)
        self.permutation = np.full(self.num_rows, -1, np.int32)
        starts = np.cumsum(blocks * size) - blocks * size
        place = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
        self.permutation[np.repeat(starts, counts) + place] = rows


def public_group_size(in_features: int, num_groups: int, group_size: int | None) -> int:
    """What a weight says its group size is."""
    if num_groups == 1:
        return -1
    return -(-in_features // num_groups) if group_size is None else int(group_size)


def is_symmetric(qzeros: np.ndarray[Any, Any], bits: int, checkpoint_format: str) -> bool:
    """Whether every zero is 2**(bits - 1). Words repeat after 1 (2, 4, 8 bits) or 3 (3 bits) of them."""
    zero = 2 ** (bits - 1) - (checkpoint_format == "gptq")
    period = 3 if bits == 3 else 1
    pattern = sum(zero << at for at in range(0, 32 * period, bits))
    words = np.array([(pattern >> 32 * i) & 0xFFFFFFFF for i in range(period)], np.uint32)
    if qzeros.shape[1] % period != 0:
        return False
    return bool((np.ascontiguousarray(qzeros).view(np.uint32).reshape(-1, period) == words).all())
