"""Quantized weights and activations: packed weights from checkpoints, their matrix products, float8 and int8 with scales.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import sys
from typing import Any, Literal, overload

import numpy as np

from quire import _core
from quire._allocate import Array, dtype_name, empty, finish, framework_of, from_numpy, numpy_dtype, shape_of
from quire._quantized import Granularity

__all__ = [
    "PackedWeight",
    "dequantize_fp8",
    "dequantize_int8",
    "quantize_fp8",
    "quantize_int8",
    "quantized_matmul",
    "quantized_matmul_workspace_size",
    "scaled_matmul",
    "scaled_matmul_workspace_size",
]

BLOCK = 128  # of scales of blocks
MAX_EXTENT = 2**31 - 1
_GROUP_SIZES = (128, 64, 32)
_UnsupportedError = _core.UnsupportedError


def _host(x: Array) -> np.ndarray[Any, Any]:
    """A tensor's contents in host memory; waits for a GPU."""
    if isinstance(x, np.ndarray):
        return x
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
        target = np.empty(x.shape, numpy_dtype(x.dtype))
        if target.size:
            pairs = np.repeat(np.arange(len(target), dtype=np.int64)[:, None], 2, axis=1)
            _core.swap_blocks(target, x, pairs, None)
            _core.check_errors(x.device)
        return target
    return np.asarray(x)


def _dtype_of(op: str, arg: str, x: Array) -> str:
    shape_of(op, arg, x)
    return dtype_name(x.dtype)


def _require(op: str, arg: str, expected: str, got: object) -> ValueError:
    return ValueError(f"[{op}] {arg}: expected {expected}, got {got}")


def _shape(op: str, arg: str, x: Array, rank: int) -> tuple[int, ...]:
    shape = shape_of(op, arg, x)
    if len(shape) != rank:
        raise _require(op, arg, f"rank {rank}", f"{dtype_name(x.dtype)} {list(shape)}")
    if any(n < 1 or n > MAX_EXTENT for n in shape):
        raise _require(op, arg, "extents from 1 to 2^31 - 1", list(shape))
    return shape


def _check_shape(op: str, arg: str, x: Array, expected: tuple[int, ...]) -> None:
    shape = shape_of(op, arg, x)
    if shape != expected:
        raise _require(
            op, arg, f"{dtype_name(x.dtype)} {list(expected)}", f"{dtype_name(x.dtype)} {list(shape)}"
        )


def _check_scales(op: str, arg: str, scales: Array, *, positive: bool = True) -> np.ndarray[Any, Any]:
    """Their values as float32 on the host, after a look at each."""
    name = _dtype_of(op, arg, scales)
    if name not in ("float32", "float16", "bfloat16"):
        raise TypeError(f"[{op}] {arg}: expected float32, float16 or bfloat16, got {name}")
    values = _host(scales).astype(np.float32)
    bad = ~np.isfinite(values)
    if positive:
        bad |= values < 0
    if bad.any():
        at = [int(i) for i in np.argwhere(bad)[0]]
        wanted = "finite values of 0 or more" if positive else "finite values"
        raise _require(op, arg, wanted, f"{values[tuple(at)]} at {at}")
    return values


def _words(count: int, bits: int) -> int:
    return -(-count * bits // 32)


class _Groups:
    """Which rows share a scale in a packed weight, and where they come from."""

    def __init__(
        self, op: str, in_features: int, num_groups: int, group_size: int | None, g_idx: Array | None
    ) -> None:
        self.group_size, self.num_rows = 0, in_features
        self.permutation: np.ndarray[Any, Any] | None = None
        self.groups: np.ndarray[Any, Any] | None = None
        if group_size is not None and group_size != -1 and not 0 < group_size <= MAX_EXTENT:
            raise _require(op, "group_size", "1 or more, or -1 for one group", group_size)
        order = None if g_idx is None else self._read_g_idx(op, g_idx, in_features, num_groups)
        if num_groups == 1:
            if group_size not in (None, -1) and group_size < in_features:
                raise _require(op, "scales", f"{-(-in_features // group_size)} groups of {group_size}", 1)
            return
        if group_size == -1:
            raise _require(op, "scales", "one group, as group_size is -1", num_groups)
        if group_size is None:
            group_size = self._infer(op, in_features, num_groups, order)
        regular = np.arange(in_features) // group_size
        if order is None:
            if -(-in_features // group_size) != num_groups:
                raise _require(
                    op, "scales", f"{-(-in_features // group_size)} groups of {group_size}", num_groups
                )
            order = regular
        rows = np.argsort(order, kind="stable").astype(np.int32)
        if not self._regular(group_size) or (order[rows] != regular).any():
            self._irregular(order, rows)
        elif (order != regular).any():
            self.permutation = rows

    @staticmethod
    def _read_g_idx(op: str, g_idx: Array, in_features: int, num_groups: int) -> np.ndarray[Any, Any]:
        _check_shape(op, "g_idx", g_idx, (in_features,))
        order = _host(g_idx)
        if order.dtype.kind not in "iu":
            raise TypeError(f"[{op}] g_idx: expected int32, got {dtype_name(g_idx.dtype)}")
        order = order.astype(np.int64)
        bad = (order < 0) | (order >= num_groups)
        if bad.any():
            at = int(np.argmax(bad))
            raise IndexError(
                f"[{op}] g_idx: expected a group in [0, {num_groups}), got {order[at]} at [{at}]"
            )
        return order

    @staticmethod
    def _infer(op: str, in_features: int, num_groups: int, order: np.ndarray[Any, Any] | None) -> int:
        if order is not None:
            return int(np.bincount(order, minlength=num_groups).max())
        if in_features % num_groups != 0:
            raise _require(
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

    def _irregular(self, order: np.ndarray[Any, Any], rows: np.ndarray[Any, Any]) -> None:
        """Groups of any size: each begins at a multiple of 32 rows, and rows that it does not fill are empty."""
        size = _GROUP_SIZES[-1]
        counts = np.bincount(order)
        blocks = -(-counts // size)
        self.group_size, self.num_rows = size, int(blocks.sum()) * size
        if self.num_rows > MAX_EXTENT:
            raise _require("PackedWeight", "g_idx", "groups that fill fewer than 2^31 rows", self.num_rows)
        self.groups = np.repeat(np.arange(len(counts)), blocks).astype(np.int32)
        self.permutation = np.full(self.num_rows, -1, np.int32)
        starts = np.cumsum(blocks * size) - blocks * size
        place = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
        self.permutation[np.repeat(starts, counts) + place] = rows


class PackedWeight:
    """The quantized weight of a linear layer, ready for :func:`quantized_matmul`.

    Made by one of the constructors ``from_awq``, ``from_gptq``, ``from_compressed_tensors``, ``from_fp8``, ``from_int8`` and ``quantize``,
    which read the contents of scales and of ``g_idx`` on the host, once, to check them. Everything else happens on the device that
    the tensors live on, and stays there.

    Integer codes with 16-bit activations ("w2a16", "w3a16", "w4a16", "w8a16") are repacked into the layout of the device's kernels: the
    value of an element is ``(code - zero) * scale``, the product in float32. Codes of 2 and 3 bits take 4. "fp8" and "w8a8" keep the
    ``[out_features, in_features]`` tensor as it is; a product quantizes the activations too.

    Attributes:
        format: "w2a16", "w3a16", "w4a16", "w8a16", "fp8" or "w8a8".
        shape: ``(out_features, in_features)``.
        bits: Bits of a code.
        group_size: Input features that share a scale, or -1: all of them.
        layout: "cpu" or "cuda" for packed codes, whose layouts differ; "rows" for "fp8" and "w8a8".
        weight: The tensor of an "fp8" or "w8a8" weight, or None.
        scale: Its scales, float32 ``[1]``, ``[out_features, 1]``, or ``[out_features / 128, in_features / 128]`` rounded up; or None.
        input_scale: The activations' scale, float32 ``[1]``, or None: it is computed for each token or each 128 features of one.
        input_zero_point: The activations' zero point, int32 ``[1]``, or None.
    """

    def __init__(self) -> None:
        """Use one of the constructors.

        Raises:
            TypeError: Always.
        """
        raise TypeError(
            "[PackedWeight] use from_awq, from_gptq, from_compressed_tensors, from_fp8, from_int8 or quantize"
        )

    format: str
    shape: tuple[int, int]
    bits: int
    group_size: int
    layout: str
    weight: Array | None
    scale: Array | None
    input_scale: Array | None
    input_zero_point: Array | None
    _like: Array
    _data: Array
    _permutation: Array | None
    _format: Any
    _column_sums: Array | None

    @classmethod
    def _new(
        cls, like: Array, format: str, shape: tuple[int, int], bits: int, group_size: int
    ) -> PackedWeight:
        self = object.__new__(cls)
        self.format, self.shape, self.bits, self.group_size = format, shape, bits, group_size
        self.weight = self.scale = self.input_scale = self.input_zero_point = None
        self._like, self._data, self._permutation, self._format, self._column_sums = (
            like,
            None,
            None,
            None,
            None,
        )
        return self

    @classmethod
    def _pack(
        cls,
        op: str,
        encoding: str,
        shape: tuple[int, int],
        bits: int,
        codes: Array,
        scales: Array,
        zeros: Array | None,
        groups: _Groups,
        group_size: int,
        stream: object,
    ) -> PackedWeight:
        self = cls._new(codes, f"w{bits}a16", shape, bits, group_size)
        device = _device_of(codes)
        self.layout = device.partition(":")[0]
        self._format = _core.WeightFormat(
            shape[1],
            shape[0],
            bits,
            groups.group_size,
            groups.num_rows,
            _dtype_of(op, "scales", scales),
            zeros is not None,
        )
        num_bytes = _core.packed_weight_size(self._format, device)
        self._data = empty(codes, (num_bytes,), "uint8")
        if groups.permutation is not None:
            self._permutation = from_numpy(groups.permutation, codes)
        sources = None if groups.groups is None else from_numpy(groups.groups, codes)
        _core.pack_weight(
            self._data, self._format, self._permutation, encoding, codes, scales, zeros, sources, stream
        )
        # Only a view of the data is needed from here on; what allocated it may be large.
        self._like = self._data if not isinstance(self._data, _core.Tensor) else codes[:1]
        return self

    @classmethod
    def from_awq(
        cls,
        qweight: Array,
        qzeros: Array,
        scales: Array,
        group_size: int | None = None,
        *,
        stream: object = None,
    ) -> PackedWeight:
        """From a layer of an AWQ checkpoint ("gemm" version, 4 bits): ``w = (q - zero) * scale``.

        Args:
            qweight: int32 ``[in_features, out_features / 8]``; the nibbles of a word are columns 0 2 4 6 1 3 5 7.
            qzeros: int32 ``[num_groups, out_features / 8]``, likewise.
            scales: ``[num_groups, out_features]`` float16, bfloat16 or float32, finite and not negative.
            group_size: Input features to a group; -1: all of them; None: as many as the groups make. Multiples of 32
                are fastest: others are filled up to the next.
            stream: As everywhere.

        Raises:
            ValueError: Shapes contradict each other, or a scale is negative or not finite.
            TypeError: A dtype does not fit.
        """
        op = "from_awq"
        in_features, words = _shape(op, "qweight", qweight, 2)
        num_groups, out_features = _shape(op, "scales", scales, 2)
        _check_dtype(op, "qweight", qweight, "int32")
        _check_dtype(op, "qzeros", qzeros, "int32")
        if words * 8 != out_features:
            raise _require(
                op, "scales", f"{words * 8} columns, as qweight has {words} of words", out_features
            )
        _check_shape(op, "qzeros", qzeros, (num_groups, words))
        groups = _Groups(op, in_features, num_groups, group_size, None)
        _check_scales(op, "scales", scales)
        size = _public_group_size(in_features, num_groups, group_size)
        return cls._pack(
            op, "awq", (out_features, in_features), 4, qweight, scales, qzeros, groups, size, stream
        )

    @classmethod
    def from_gptq(
        cls,
        qweight: Array,
        qzeros: Array | None,
        scales: Array,
        g_idx: Array | None = None,
        *,
        bits: int = 4,
        checkpoint_format: Literal["gptq", "gptq_v2"] = "gptq",
        group_size: int | None = None,
        stream: object = None,
    ) -> PackedWeight:
        """From a layer of a GPTQ checkpoint: ``w = (q - zero) * scale``.

        Args:
            qweight: int32 ``[in_features * bits / 32, out_features]``, packed along the first dimension, the lowest bits first; codes of 3
                bits run across words.
            qzeros: int32 ``[num_groups, out_features * bits / 32]``, or None: every zero is ``2**(bits - 1)``.
            scales: ``[num_groups, out_features]`` float16, bfloat16 or float32, finite; some tools write negative ones.
            g_idx: int32 ``[in_features]``, the group of each input feature, in any order and number; None: groups of neighbours. Rows
                are sorted by group, and a product reorders the activations (act-order).
            bits: 2, 3, 4 or 8.
            checkpoint_format: "gptq": zeros are stored less 1, modulo ``2**bits``; "gptq_v2": as they are. Some checkpoints name the wrong
                one: a symmetric one has 4-bit zeros of 7 in "gptq" and of 8 in "gptq_v2".
            group_size: As in :meth:`from_awq`.
            stream: As everywhere.

        Raises:
            ValueError: Shapes contradict each other, or a scale is not finite.
            TypeError: A dtype does not fit.
            IndexError: g_idx names a group that is not there.
            UnsupportedError: Such bits.
        """
        op = "from_gptq"
        if checkpoint_format not in ("gptq", "gptq_v2"):
            raise _require(op, "checkpoint_format", '"gptq" or "gptq_v2"', repr(checkpoint_format))
        _check_bits(op, bits, (2, 3, 4, 8))
        words, out_features = _shape(op, "qweight", qweight, 2)
        _check_dtype(op, "qweight", qweight, "int32")
        in_features = words * 32 // bits if g_idx is None else _shape(op, "g_idx", g_idx, 1)[0]
        if _words(in_features, bits) != words:
            raise _require(
                op, "qweight", f"{_words(in_features, bits)} rows for a g_idx of {in_features}", words
            )
        num_groups, _ = _shape(op, "scales", scales, 2)
        _check_shape(op, "scales", scales, (num_groups, out_features))
        groups = _Groups(op, in_features, num_groups, group_size, g_idx)
        _check_scales(op, "scales", scales, positive=False)
        if qzeros is not None:
            _check_dtype(op, "qzeros", qzeros, "int32")
            _check_shape(op, "qzeros", qzeros, (num_groups, _words(out_features, bits)))
            if out_features * bits % 32 == 0 and _is_symmetric(_host(qzeros), bits, checkpoint_format):
                qzeros = None
        size = _public_group_size(in_features, num_groups, group_size)
        return cls._pack(
            op,
            checkpoint_format,
            (out_features, in_features),
            bits,
            qweight,
            scales,
            qzeros,
            groups,
            size,
            stream,
        )

    @classmethod
    def from_compressed_tensors(
        cls,
        *,
        weight_scale: Array,
        weight_packed: Array | None = None,
        weight: Array | None = None,
        weight_zero_point: Array | None = None,
        weight_shape: Array | None = None,
        weight_g_idx: Array | None = None,
        bits: int = 4,
        group_size: int | None = None,
        input_scale: Array | None = None,
        input_zero_point: Array | None = None,
        stream: object = None,
    ) -> PackedWeight:
        """From a layer of a compressed-tensors checkpoint. The arguments have the names of the checkpoint's tensors.

        Args:
            weight_scale: ``[out_features, num_groups]``, or for ``weight`` as in :meth:`from_fp8` and :meth:`from_int8`.
            weight_packed: "pack-quantized": int32 ``[out_features, in_features * bits / 32]``, packed along the second dimension.
            weight: "int-quantized" or "float-quantized", "naive-quantized": int8 or float8_e4m3fn ``[out_features, in_features]``.
            weight_zero_point: For ``weight_packed``: int32 ``[out_features * bits / 32, num_groups]``, packed along the first dimension;
                None: symmetric. For int8 ``weight``: zeros only.
            weight_shape: ``[out_features, in_features]``; needed where in_features is not a whole number of words.
            weight_g_idx: As ``g_idx`` in :meth:`from_gptq`.
            bits: Of ``weight_packed``: 4 or 8.
            group_size: As in :meth:`from_awq`.
            input_scale: For ``weight``: float ``[1]``, or None: activations' scales are computed.
            input_zero_point: With input_scale, for int8: an integer ``[1]``, or None.
            stream: As everywhere.

        Raises:
            ValueError: Shapes contradict each other, or a scale is negative or not finite.
            TypeError: A dtype does not fit.
            IndexError: weight_g_idx names a group that is not there.
            UnsupportedError: Such bits, or int8 weights with zero points.
        """
        op = "from_compressed_tensors"
        if (weight_packed is None) == (weight is None):
            raise _require(
                op, "weight", "either weight_packed or weight", "none" if weight is None else "both"
            )
        if weight_packed is None:
            assert weight is not None
            if weight_zero_point is not None and _host(weight_zero_point).astype(np.int64).any():
                raise _UnsupportedError(
                    f"[{op}] weight_zero_point: expected zeros for unpacked weights, got others"
                )
            if _dtype_of(op, "weight", weight) == "int8":
                return cls.from_int8(
                    weight,
                    weight_scale,
                    input_scale=input_scale,
                    input_zero_point=input_zero_point,
                    stream=stream,
                )
            return cls.from_fp8(weight, weight_scale, input_scale=input_scale)
        _check_bits(op, bits, (4, 8))
        _check_dtype(op, "weight_packed", weight_packed, "int32")
        out_features, words = _shape(op, "weight_packed", weight_packed, 2)
        in_features = words * 32 // bits
        if weight_shape is not None:
            _check_shape(op, "weight_shape", weight_shape, (2,))
            stated = [int(n) for n in _host(weight_shape)]
            in_features = stated[1]
            if stated[0] != out_features or in_features < 1 or _words(in_features, bits) != words:
                raise _require(
                    op, "weight_shape", f"[{out_features}, {words * 32 // bits} or a little less]", stated
                )
        _, num_groups = _shape(op, "weight_scale", weight_scale, 2)
        _check_shape(op, "weight_scale", weight_scale, (out_features, num_groups))
        if weight_zero_point is not None:
            _check_dtype(op, "weight_zero_point", weight_zero_point, "int32")
            _check_shape(op, "weight_zero_point", weight_zero_point, (_words(out_features, bits), num_groups))
        groups = _Groups(op, in_features, num_groups, group_size, weight_g_idx)
        _check_scales(op, "weight_scale", weight_scale)
        size = _public_group_size(in_features, num_groups, group_size)
        return cls._pack(
            op, "compressed-tensors", (out_features, in_features), bits, weight_packed, weight_scale,
            weight_zero_point, groups, size, stream,
        )  # fmt: skip

    @classmethod
    def from_fp8(cls, weight: Array, scale: Array, *, input_scale: Array | None = None) -> PackedWeight:
        """From a float8 weight and what it is to be multiplied by (also where a checkpoint calls it ``weight_scale_inv``).

        Args:
            weight: float8_e4m3fn ``[out_features, in_features]``; it is kept, not copied.
            scale: ``[]`` or ``[1]``, ``[out_features]`` or ``[out_features, 1]``, or one for each 128 x 128 block,
                ``[out_features / 128, in_features / 128]`` rounded up; float32, float16 or bfloat16, finite and not negative.
            input_scale: ``[]`` or ``[1]``: the scale of all activations, or None: computed scales.

        Raises:
            ValueError: Shapes contradict each other, or a scale is negative or not finite.
            TypeError: A dtype does not fit.
        """
        op = "from_fp8"
        out_features, in_features = _shape(op, "weight", weight, 2)
        _check_dtype(op, "weight", weight, "float8_e4m3fn")
        values = _check_scales(op, "scale", scale)
        blocks = (-(-out_features // BLOCK), -(-in_features // BLOCK))
        if values.size == 1:
            values = values.reshape(1)
        elif values.shape in ((out_features,), (out_features, 1)):
            values = values.reshape(out_features, 1)
        elif values.shape != blocks:
            raise _require(
                op,
                "scale",
                f"[1], {[out_features, 1]} or {list(blocks)}",
                f"{dtype_name(scale.dtype)} {list(values.shape)}",
            )
        by_block = values.ndim == 2 and values.shape == blocks and values.shape != (out_features, 1)
        self = cls._new(weight, "fp8", (out_features, in_features), 8, BLOCK if by_block else -1)
        self.layout, self.weight, self.scale = "rows", weight, from_numpy(values, weight)
        if input_scale is not None and by_block:
            raise _require(op, "input_scale", "none with scales of blocks", "one")
        self.input_scale = _one(op, "input_scale", input_scale, weight)
        return self

    @classmethod
    def from_int8(
        cls,
        weight: Array,
        scale: Array,
        *,
        input_scale: Array | None = None,
        input_zero_point: Array | None = None,
        stream: object = None,
    ) -> PackedWeight:
        """From an int8 weight, symmetric: ``w = q * scale``.

        Args:
            weight: int8 ``[out_features, in_features]``; it is kept, not copied.
            scale: ``[]`` or ``[1]``, ``[out_features]`` or ``[out_features, 1]``; float32, float16 or bfloat16, finite and not negative.
            input_scale: ``[]`` or ``[1]``: the scale of all activations, or None: one is computed for each token.
            input_zero_point: ``[]`` or ``[1]``, an integer in [-128, 127], with input_scale.
            stream: As everywhere.

        Raises:
            ValueError: Shapes contradict each other, or a scale is negative or not finite.
            TypeError: A dtype does not fit.
        """
        op = "from_int8"
        out_features, in_features = _shape(op, "weight", weight, 2)
        _check_dtype(op, "weight", weight, "int8")
        values = _check_scales(op, "scale", scale)
        if values.size == 1:
            values = values.reshape(1)
        elif values.shape in ((out_features,), (out_features, 1)):
            values = values.reshape(out_features, 1)
        else:
            raise _require(
                op, "scale", f"[1] or {[out_features, 1]}", f"{dtype_name(scale.dtype)} {list(values.shape)}"
            )
        self = cls._new(weight, "w8a8", (out_features, in_features), 8, -1)
        self.layout, self.weight, self.scale = "rows", weight, from_numpy(values, weight)
        self.input_scale = _one(op, "input_scale", input_scale, weight)
        if input_zero_point is not None:
            if input_scale is None:
                raise _require(op, "input_zero_point", "none without input_scale", "one")
            zero = _host(input_zero_point).reshape(-1)
            if zero.size != 1 or zero.dtype.kind not in "iu" or not -128 <= int(zero[0]) <= 127:
                raise _require(op, "input_zero_point", "one integer in [-128, 127]", zero.tolist())
            if int(zero[0]) != 0:
                self.input_zero_point = from_numpy(zero.astype(np.int32), weight)
                sums = empty(weight, (out_features,), "int32")
                _core.column_sums(sums, weight, stream)
                self._column_sums = finish(sums, weight)
        return self

    @classmethod
    def quantize(
        cls,
        weight: Array,
        format: Literal["w2a16", "w3a16", "w4a16", "w8a16", "fp8", "w8a8"] = "w4a16",
        group_size: int = 128,
        *,
        symmetric: bool = True,
        granularity: Literal["tensor", "channel", "block"] = "channel",
        stream: object = None,
    ) -> PackedWeight:
        """Quantizes a weight, each element to the nearest code: for users without a quantized checkpoint.

        Args:
            weight: float32, float16 or bfloat16 ``[out_features, in_features]``.
            format: "w2a16" to "w8a16": integer codes, 16-bit activations; "fp8": float8_e4m3fn; "w8a8": int8.
            group_size: For integer codes; -1: all of a row.
            symmetric: For integer codes: no zero points.
            granularity: For "fp8" and "w8a8": what a scale belongs to; "block" is 128 x 128, for "fp8" only.
            stream: As everywhere.

        Raises:
            ValueError: An argument does not fit.
            TypeError: The weight is of another dtype.

        Example:
            >>> import numpy as np, quire
            >>> w = np.linspace(-1, 1, 64, dtype=np.float32).reshape(1, 64)
            >>> packed = quire.PackedWeight.quantize(w, "w4a16", 32)
            >>> bool(abs(packed.dequantize() - w).max() < 0.07)
            True
        """
        op = "quantize"
        shape = _shape(op, "weight", weight, 2)
        name = _dtype_of(op, "weight", weight)
        if name not in ("float32", "float16", "bfloat16"):
            raise TypeError(f"[{op}] weight: expected float32, float16 or bfloat16, got {name}")
        if format in ("fp8", "w8a8"):
            return cls._quantize_rows(weight, shape[0], format, granularity, stream)
        if format not in ("w2a16", "w3a16", "w4a16", "w8a16"):
            raise _require(op, "format", '"w2a16", "w3a16", "w4a16", "w8a16", "fp8" or "w8a8"', repr(format))
        bits = int(format[1])
        size = shape[1] if group_size == -1 else group_size
        if not isinstance(size, int) or size < 1:
            raise _require(op, "group_size", "1 or more, or -1 for one group", group_size)
        num_groups = -(-shape[1] // size)
        groups = _Groups(op, shape[1], num_groups, group_size if num_groups > 1 else -1, None)
        codes = empty(weight, shape, "uint8")
        scales = empty(weight, (shape[0], num_groups), name)
        zeros = None if symmetric else empty(weight, (shape[0], num_groups), "uint8")
        _core.quantize_weight(codes, scales, zeros, weight, bits, size, stream)
        codes, scales = finish(codes, weight), finish(scales, weight)
        zeros = None if zeros is None else finish(zeros, weight)
        _check_scales(op, "weight", scales)
        return cls._pack(
            op, "codes", (shape[0], shape[1]), bits, codes, scales, zeros, groups,
            -1 if num_groups == 1 else size, stream,
        )  # fmt: skip

    @classmethod
    def _quantize_rows(
        cls, weight: Array, out_features: int, format: str, granularity: str, stream: object
    ) -> PackedWeight:
        known = ("tensor", "channel", "block") if format == "fp8" else ("tensor", "channel")
        if granularity not in known:
            raise _require("quantize", "granularity", " or ".join(f'"{k}"' for k in known), repr(granularity))
        if format == "w8a8":
            int8 = quantize_int8(
                weight, granularity="tensor" if granularity == "tensor" else "token", stream=stream
            )
            return cls.from_int8(*int8[:2], stream=stream)
        if granularity != "block":
            return cls.from_fp8(
                *quantize_fp8(
                    weight, granularity="tensor" if granularity == "tensor" else "token", stream=stream
                )
            )
        # A scale for each 128 elements of a row first; a block's is the largest of its rows'.
        _, rows = quantize_fp8(weight, granularity="group", group_size=BLOCK, stream=stream)
        by_row = _host(rows)
        starts = np.arange(0, out_features, BLOCK)
        blocks = np.maximum.reduceat(by_row, starts, axis=0)
        spread = from_numpy(np.ascontiguousarray(np.repeat(blocks, BLOCK, axis=0)[:out_features]), weight)
        codes, _ = quantize_fp8(weight, scale=spread, granularity="group", group_size=BLOCK, stream=stream)
        return cls.from_fp8(codes, from_numpy(blocks, weight))

    @property
    def out_features(self) -> int:
        """Rows of the weight; the last dimension of a product."""
        return self.shape[0]

    @property
    def in_features(self) -> int:
        """Columns of the weight; the last dimension of the activations."""
        return self.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the weight takes, with its scales, zeros and permutation."""
        tensors = (self._data, self._permutation, self.weight, self.scale, self._column_sums)
        return sum(_nbytes(t) for t in tensors if t is not None)

    def dequantize(
        self, dtype: object = "float32", *, out: Array | None = None, stream: object = None
    ) -> Array:
        """The weight ``[out_features, in_features]``, each product computed in float32 and rounded to dtype.

        Args:
            dtype: "float32", "float16", "bfloat16", or a framework's dtype of that name; ``out``'s own where that is given.
            out: Where to write, or None to allocate it in the framework of the tensors that the weight was made from.
            stream: As everywhere.

        Raises:
            ValueError: ``out`` does not fit.
            TypeError: ``dtype`` is another one.
        """
        name = dtype_name(dtype)
        if out is None and name not in ("float32", "float16", "bfloat16"):
            raise TypeError(f"[dequantize] dtype: expected float32, float16 or bfloat16, got {name}")
        result = empty(self._like, self.shape, name) if out is None else out
        if self.weight is None:
            _core.dequantize_weight(result, self._data, self._format, self._permutation, stream)
        else:
            assert self.scale is not None
            rows, columns = (BLOCK, BLOCK) if self.group_size == BLOCK else (1, self.in_features)
            scale = self.scale
            if tuple(scale.shape) == (1,):
                _core.dequantize(result, self.weight, scale, None, "tensor", 1, stream)
            else:
                _core.dequantize_blocks(result, self.weight, scale, rows, columns, stream)
        return finish(result, self._like) if out is None else out

    def __repr__(self) -> str:
        """Format, shape, group size and bytes."""
        group = "" if self.group_size == -1 else f", groups of {self.group_size}"
        order = ", act-order" if self._permutation is not None else ""
        return f"PackedWeight({self.format}, {list(self.shape)}{group}{order}, {self.nbytes} bytes, layout {self.layout})"


def _nbytes(t: Array) -> int:
    count = 1
    for n in t.shape:
        count *= int(n)
    return count * int(np.dtype(numpy_dtype(dtype_name(t.dtype))).itemsize)


def _device_of(x: Array) -> str:
    kind, index = x.__dlpack_device__()
    return f"cuda:{index}" if int(kind) in (2, 13) else "cpu"


def _check_dtype(op: str, arg: str, x: Array, expected: str) -> None:
    name = _dtype_of(op, arg, x)
    if name != expected:
        raise TypeError(f"[{op}] {arg}: expected {expected}, got {name}")


def _check_bits(op: str, bits: int, known: tuple[int, ...]) -> None:
    if bits not in known or isinstance(bits, bool):
        text = ", ".join(map(str, known[:-1])) + f" or {known[-1]}"
        raise _UnsupportedError(f"[{op}] bits: expected {text}, got {bits}")


def _public_group_size(in_features: int, num_groups: int, group_size: int | None) -> int:
    if num_groups == 1:
        return -1
    return -(-in_features // num_groups) if group_size is None else group_size


def _is_symmetric(qzeros: np.ndarray[Any, Any], bits: int, checkpoint_format: str) -> bool:
    """Whether every zero is 2**(bits - 1). Words repeat after 1 (2, 4, 8 bits) or 3 (3 bits) of them."""
    zero = 2 ** (bits - 1) - (checkpoint_format == "gptq")
    period = 3 if bits == 3 else 1
    pattern = sum(zero << at for at in range(0, 32 * period, bits))
    words = np.array([(pattern >> 32 * i) & 0xFFFFFFFF for i in range(period)], np.uint32)
    if qzeros.shape[1] % period != 0:
        return False
    return bool((np.ascontiguousarray(qzeros).view(np.uint32).reshape(-1, period) == words).all())


def _one(op: str, arg: str, x: Array | None, like: Array) -> Array | None:
    """A scale of everything, as float32 [1]."""
    if x is None:
        return None
    values = _check_scales(op, arg, x)
    if values.size != 1:
        raise _require(op, arg, "one value", list(values.shape))
    return from_numpy(values.reshape(1), like)


# ---- Products ------------------------------------------------------------------------------------------------------------


def quantized_matmul(
    x: Array,
    w: PackedWeight,
    *,
    bias: Array | None = None,
    out: Array | None = None,
    workspace: Array | None = None,
    batch_invariant: bool = False,
    stream: object = None,
) -> Array:
    """``x @ w.T + bias`` with a quantized weight.

    Packed integer codes meet the activations as they are, and sums are float32. On the CPU, up to four tokens of float16 or bfloat16 are
    multiplied in 16-bit fixed point, with a scale for each group of features (128 where a group is longer): an error of 2**-16 of the
    group's largest magnitude. For "fp8" and "w8a8" weights x is quantized first: by ``w.input_scale``, or for each token, or for each
    128 features where the weight has scales of blocks; then it is :func:`scaled_matmul`.

    Args:
        x: ``[..., in_features]`` float16 or bfloat16, on the CPU also float32; unit inner stride, and one distance between all rows.
        w: The weight, on x's device.
        bias: ``[out_features]`` of any of the three dtypes, or None.
        out: ``[..., out_features]`` of x's dtype, or None to allocate it in x's framework.
        workspace: uint8 ``[n]`` with n of at least :func:`quantized_matmul_workspace_size`; None uses a shared one. For "fp8" and "w8a8" as
            in :func:`scaled_matmul`.
        batch_invariant: The bits of a row of the result do not depend on how many other rows there are.
        stream: An int, an object with ``__cuda_stream__``, or None for the framework's current stream.

    Returns:
        ``out``.

    Raises:
        ValueError: Shapes, strides or devices do not fit, or out overlaps an input.
        TypeError: A dtype is not one of those, or w is no PackedWeight.

    Example:
        >>> import numpy as np, quire
        >>> w = quire.PackedWeight.quantize(np.eye(64, dtype=np.float32), "w8a16", 32)
        >>> quire.quantized_matmul(np.arange(64, dtype=np.float32)[None], w)[0, :4].round(1)
        array([0., 1., 2., 3.], dtype=float32)
    """
    if not isinstance(w, PackedWeight):
        raise TypeError(f"[quantized_matmul] w: expected a PackedWeight, got {type(w).__qualname__}")
    if w.weight is not None:
        return _quantize_and_multiply(x, w, bias, out, workspace, batch_invariant, stream)
    result = out
    if out is None:
        shape = shape_of("quantized_matmul", "x", x)
        result = empty(x, (*shape[:-1], w.shape[0]))
    _core.quantized_matmul(
        result, x, w._data, w._format, w._permutation, bias, workspace, batch_invariant, stream
    )
    return finish(result, x) if out is None else out


def _quantize_and_multiply(
    x: Array,
    w: PackedWeight,
    bias: Array | None,
    out: Array | None,
    workspace: Array | None,
    batch_invariant: bool,
    stream: object,
) -> Array:
    op = "quantized_matmul"
    shape = shape_of(op, "x", x)
    if not shape or shape[-1] != w.in_features:
        raise _require(op, "x", f"a last dimension of {w.in_features}", list(shape))
    granularity: Granularity = "token"
    if w.input_scale is not None:
        granularity = "tensor"
    elif w.group_size == BLOCK:
        granularity = "group"
    zero = w.input_zero_point
    if w.format == "fp8":
        pair: Array | tuple[Array, Array] | None = None
        if framework_of(x) == "cupy":  # which has no float8
            device = _device_of(x)
            a = _core.empty(shape, "float8_e4m3fn", device)
            wanted = _scale_shape(op, shape, granularity, BLOCK)
            pair = a if w.input_scale is not None else (a, _core.empty(wanted, "float32", device))
            out = empty(x, (*shape[:-1], w.out_features)) if out is None else out
        a, scale = quantize_fp8(
            x, scale=w.input_scale, granularity=granularity, group_size=BLOCK, out=pair, stream=stream
        )
    else:
        a, scale = quantize_int8(
            x,
            scale=w.input_scale,
            zero_point=zero,
            symmetric=zero is None,
            granularity=granularity,
            stream=stream,
        )[:2]
    return scaled_matmul(
        a, w, scale, zero_point=zero, bias=bias, out_dtype=x.dtype, out=out, workspace=workspace,
        batch_invariant=batch_invariant, stream=stream,
    )  # fmt: skip


def quantized_matmul_workspace_size(
    num_tokens: int, w: PackedWeight, *, dtype: object = "bfloat16", batch_invariant: bool = False
) -> int:
    """Bytes of workspace for ``num_tokens`` rows of x of this dtype on w's device.

    Raises:
        ValueError: A negative number of tokens.
        TypeError: A dtype that x may not have there.
    """
    if w.weight is not None:
        return scaled_matmul_workspace_size(
            num_tokens, *w.shape, dtype=w.weight.dtype, has_blocks=w.group_size == BLOCK,
            batch_invariant=batch_invariant, device=_device_of(w.weight),
        )  # fmt: skip
    return _core.quantized_matmul_workspace_size(
        num_tokens, w._format, w._permutation is not None, dtype, batch_invariant, _device_of(w._data)
    )


def scaled_matmul(
    a: Array,
    b: Array | PackedWeight,
    scale_a: Array,
    scale_b: Array | None = None,
    *,
    zero_point: Array | None = None,
    column_sums: Array | None = None,
    bias: Array | None = None,
    out_dtype: object = "bfloat16",
    out: Array | None = None,
    workspace: Array | None = None,
    batch_invariant: bool = False,
    stream: object = None,
) -> Array:
    """``((a - zero_point) * scale_a) @ (b * scale_b).T + bias`` of float8 or int8.

    Dimensions: ``n`` output features, ``k`` input features. float8 is accumulated in float32, int8 in int32.

    Args:
        a: ``[..., k]`` float8_e4m3fn or int8; unit inner stride, and one distance between all rows.
        b: ``[n, k]`` of a's dtype, unit inner stride; or an "fp8" or "w8a8" weight, which brings its scale_b.
        scale_a: float32 ``[1]``, ``[..., 1]``, or with scales of blocks ``[..., k / 128]`` rounded up, any strides.
        scale_b: float32 ``[1]``, ``[n, 1]``, or ``[n / 128, k / 128]`` rounded up, any strides.
        zero_point: int32 ``[1]`` or ``[..., 1]``, of int8 a; None: 0. Not with scales of blocks.
        column_sums: int32 ``[n]``, the sum of each row of b, which zero_point needs; None: computed, unless b brings them.
        bias: ``[n]`` float32, float16 or bfloat16, or None.
        out_dtype: Of the result: "float32", "float16", "bfloat16", or a framework's dtype of that name.
        out: ``[..., n]``, of any of these dtypes, or None to allocate it in a's framework.
        workspace: uint8 ``[n]`` with n of at least :func:`scaled_matmul_workspace_size`; None uses a shared one.
        batch_invariant: The bits of a row of the result do not depend on how many other rows there are.
        stream: An int, an object with ``__cuda_stream__``, or None for the framework's current stream.

    Returns:
        ``out``.

    Raises:
        ValueError: Shapes, strides or devices do not fit, or out overlaps an input.
        TypeError: A dtype is not one of those.
        UnsupportedError: A zero point with scales of blocks, or int8 with k above 65536.

    Example:
        >>> import numpy as np, quire
        >>> a, b = np.array([[1, 2]], np.int8), np.array([[3, 4], [5, 6]], np.int8)
        >>> one = np.ones(1, np.float32)
        >>> quire.scaled_matmul(a, b, one, one, out_dtype="float32")
        array([[11., 17.]], dtype=float32)
    """
    if isinstance(b, PackedWeight):
        if b.weight is None:
            raise TypeError(f'[scaled_matmul] b: expected an "fp8" or "w8a8" weight, got "{b.format}"')
        if scale_b is not None:
            raise _require("scaled_matmul", "scale_b", "none, as b brings its own", "one")
        if column_sums is None:
            column_sums = b._column_sums
        b, scale_b = b.weight, b.scale
    if scale_b is None:
        raise _require("scaled_matmul", "scale_b", "a tensor", "none")
    result = out
    if out is None:
        name = dtype_name(out_dtype)
        if name not in ("float32", "float16", "bfloat16"):
            raise TypeError(f"[scaled_matmul] out_dtype: expected float32, float16 or bfloat16, got {name}")
        rows, columns = shape_of("scaled_matmul", "a", a), shape_of("scaled_matmul", "b", b)
        result = empty(a, (*rows[:-1], *columns[:1]), name)
    _core.scaled_matmul(
        result, a, b, scale_a, scale_b, zero_point, column_sums, bias, workspace, batch_invariant, stream
    )
    return finish(result, a) if out is None else out


def scaled_matmul_workspace_size(
    m: int,
    n: int,
    k: int,
    *,
    dtype: object = "float8_e4m3fn",
    has_blocks: bool = False,
    computes_sums: bool = False,
    batch_invariant: bool = False,
    device: object = "cuda",
) -> int:
    """Bytes of workspace for ``m`` rows of a.

    Args:
        m: Rows of a.
        n: Rows of b.
        k: Columns of both.
        dtype: Of both.
        has_blocks: Scales are those of blocks.
        computes_sums: There is a zero_point, and no column_sums.
        batch_invariant: As in :func:`scaled_matmul`.
        device: "cpu", "cuda", "cuda:1", or a framework's device.

    Raises:
        ValueError: An extent does not fit.
        TypeError: Another dtype.
    """
    return _core.scaled_matmul_workspace_size(
        m, n, k, dtype, has_blocks, computes_sums, batch_invariant, device
    )


# ---- Quantizing and undoing it ------------------------------------------------------------------------------------------------


def _scale_shape(op: str, shape: tuple[int, ...], granularity: str, group_size: int) -> tuple[int, ...]:
    if granularity == "tensor":
        return (1,)
    if granularity == "token":
        return (*shape[:-1], 1)
    if granularity != "group":
        raise _require(op, "granularity", '"tensor", "token" or "group"', repr(granularity))
    if not isinstance(group_size, int) or group_size < 1:
        raise _require(op, "group_size", "1 or more", group_size)
    return (*shape[:-1], -(-shape[-1] // group_size))


def quantize_fp8(
    x: Array,
    *,
    scale: Array | None = None,
    granularity: Granularity = "tensor",
    group_size: int = 128,
    scale_ub: float | None = None,
    out: Array | tuple[Array, Array] | None = None,
    stream: object = None,
) -> tuple[Array, Array]:
    """x as float8_e4m3fn: ``saturate(x / scale)``, the float32 quotient rounded to nearest even; NaN stays NaN.

    Args:
        x: ``[..., width]`` float32, float16 or bfloat16; unit inner stride, any outer strides.
        scale: Of granularity's shape: float32 ``[1]``, ``[..., 1]`` or ``[..., width / group_size]`` rounded up, any strides. None: it is
            computed, as the largest magnitude that is not NaN, divided by 448, and not below 2**-126.
        granularity: "tensor", "token" (a row) or "group" (``group_size`` elements of a row).
        group_size: For "group". The last group of a row may be shorter.
        scale_ub: The largest magnitude that a computed scale is made for; what is larger saturates.
        out: float8_e4m3fn of x's shape, or None; where scales are computed a pair ``(out, scale)``.
        stream: An int, an object with ``__cuda_stream__``, or None for the framework's current stream.

    Returns:
        ``(out, scale)``.

    Raises:
        ValueError: Shapes, strides or devices do not fit, or out overlaps an input.
        TypeError: A dtype is not one of those.

    Example:
        >>> import numpy as np, quire
        >>> q, scale = quire.quantize_fp8(np.array([[1.0, -448.0]], np.float32))
        >>> q.astype(np.float32), scale
        (array([[   1., -448.]], dtype=float32), array([1.], dtype=float32))
    """
    op = "quantize_fp8"
    q, scales, _ = _quantize(
        op, "float8_e4m3fn", x, scale, None, True, granularity, group_size, scale_ub, out, stream
    )
    return q, scales


@overload
def quantize_int8(
    x: Array,
    *,
    symmetric: Literal[True] = ...,
    scale: Array | None = ...,
    zero_point: None = ...,
    granularity: Granularity = ...,
    group_size: int = ...,
    out: Array | tuple[Array, ...] | None = ...,
    stream: object = ...,
) -> tuple[Array, Array]: ...
@overload
def quantize_int8(
    x: Array,
    *,
    symmetric: bool,
    scale: Array | None = ...,
    zero_point: Array | None = ...,
    granularity: Granularity = ...,
    group_size: int = ...,
    out: Array | tuple[Array, ...] | None = ...,
    stream: object = ...,
) -> tuple[Array, ...]: ...
def quantize_int8(
    x: Array,
    *,
    symmetric: bool = True,
    scale: Array | None = None,
    zero_point: Array | None = None,
    granularity: Granularity = "tensor",
    group_size: int = 128,
    out: Array | tuple[Array, ...] | None = None,
    stream: object = None,
) -> tuple[Array, ...]:
    """x as int8: ``saturate(round(x / scale) + zero_point)``, rounded to nearest even; NaN becomes zero_point.

    Args:
        x: ``[..., width]`` float32, float16 or bfloat16; unit inner stride, any outer strides.
        symmetric: No zero point, and computed scales are the largest magnitude divided by 127. Otherwise computed scales are the range of
            x, with 0 in it, divided by 255, and ``zero_point = -128 - round(low / scale)``.
        scale: As in :func:`quantize_fp8`.
        zero_point: int32 of scale's shape, with it, unless symmetric; values are taken into [-128, 127].
        granularity: As in :func:`quantize_fp8`.
        group_size: Likewise.
        out: int8 of x's shape, or None; where scales are computed a pair ``(out, scale)``, or ``(out, scale, zero_point)``.
        stream: Likewise.

    Returns:
        ``(out, scale)``, or unless symmetric ``(out, scale, zero_point)``. ``x = (out - zero_point) * scale``.

    Raises:
        ValueError: Shapes, strides or devices do not fit, out overlaps an input, or scale and zero_point do not go together.
        TypeError: A dtype is not one of those.

    Example:
        >>> import numpy as np, quire
        >>> quire.quantize_int8(np.array([[1.0, -2.0]], np.float32))[0]
        array([[  64, -127]], dtype=int8)
    """
    op = "quantize_int8"
    q, scales, zeros = _quantize(
        op, "int8", x, scale, zero_point, symmetric, granularity, group_size, None, out, stream
    )
    return (q, scales) if symmetric else (q, scales, zeros)


def _quantize(
    op: str,
    dtype: str,
    x: Array,
    scale: Array | None,
    zero_point: Array | None,
    symmetric: bool,
    granularity: Granularity,
    group_size: int,
    scale_ub: float | None,
    out: Array | tuple[Array, ...] | None,
    stream: object,
) -> tuple[Array, Array, Array | None]:
    shape = shape_of(op, "x", x)
    if not shape:
        raise _require(op, "x", "rank 1 to 4", list(shape))
    wanted = _scale_shape(op, shape, granularity, group_size)
    computes = scale is None
    if symmetric and zero_point is not None:
        raise _require(op, "zero_point", "none, as symmetric is set", "one")
    if not symmetric and computes != (zero_point is None):
        raise _require(op, "zero_point", "one with scale, and none without", "one" if computes else "none")
    if not computes and scale_ub is not None:
        raise _require(op, "scale_ub", "none with a given scale", scale_ub)
    q: Array = out
    fresh = out is None
    if fresh:
        q = empty(x, shape, dtype)
    if computes:
        count = 2 if symmetric else 3
        if fresh:
            scale = empty(x, wanted, "float32")
            zero_point = None if symmetric else empty(x, wanted, "int32")
        elif not isinstance(out, tuple) or len(out) != count:
            names = "(out, scale)" if symmetric else "(out, scale, zero_point)"
            raise _require(op, "out", f"{names}, as scales are computed", type(out).__qualname__)
        else:
            q, scale, *rest = out
            zero_point = rest[0] if rest else None
    if dtype_name(q.dtype) != dtype:
        raise TypeError(f"[{op}] out: expected {dtype}, got {dtype_name(q.dtype)}")
    bound = float("inf") if scale_ub is None else scale_ub
    _core.quantize(q, scale, zero_point, x, granularity, group_size, computes, bound, stream)
    if fresh:
        q = finish(q, x)
        if computes:
            scale = finish(scale, x)
            zero_point = None if zero_point is None else finish(zero_point, x)
    return q, scale, zero_point


def dequantize_fp8(
    q: Array,
    scale: Array,
    *,
    granularity: Literal["tensor", "token", "group", "block"] = "tensor",
    group_size: int = 128,
    out_dtype: object = "float32",
    out: Array | None = None,
    stream: object = None,
) -> Array:
    """``q * scale``, in float32, rounded to the result's dtype.

    Args:
        q: ``[..., width]`` float8_e4m3fn; unit inner stride, any outer strides.
        scale: float32, as :func:`quantize_fp8` gives it; "block": ``[rows / 128, width / 128]`` rounded up, of a q of two dimensions.
        granularity: "tensor", "token", "group", or "block" for blocks of 128 x 128.
        group_size: For "group".
        out_dtype: "float32", "float16", "bfloat16", or a framework's dtype of that name.
        out: As q, of one of these dtypes, or None to allocate it in q's framework.
        stream: An int, an object with ``__cuda_stream__``, or None for the framework's current stream.

    Returns:
        ``out``.

    Raises:
        ValueError: Shapes, strides or devices do not fit, or out overlaps an input.
        TypeError: A dtype is not one of those.

    Example:
        >>> import numpy as np, quire
        >>> q, scale = quire.quantize_fp8(np.array([[7.0, -448.0]], np.float32), granularity="token")
        >>> quire.dequantize_fp8(q, scale, granularity="token")
        array([[   7., -448.]], dtype=float32)
    """
    return _dequantize(
        "dequantize_fp8", "float8_e4m3fn", q, scale, None, granularity, group_size, out_dtype, out, stream
    )


def dequantize_int8(
    q: Array,
    scale: Array,
    zero_point: Array | None = None,
    *,
    granularity: Literal["tensor", "token", "group", "block"] = "tensor",
    group_size: int = 128,
    out_dtype: object = "float32",
    out: Array | None = None,
    stream: object = None,
) -> Array:
    """``(q - zero_point) * scale``, in float32, rounded to the result's dtype.

    Args:
        q: ``[..., width]`` int8; unit inner stride, any outer strides.
        scale: As in :func:`dequantize_fp8`.
        zero_point: int32 of scale's shape, or None: 0. Not with "block".
        granularity: As in :func:`dequantize_fp8`.
        group_size: Likewise.
        out_dtype: Likewise.
        out: Likewise.
        stream: Likewise.

    Returns:
        ``out``.

    Raises:
        ValueError: Shapes, strides or devices do not fit, or out overlaps an input.
        TypeError: A dtype is not one of those.

    Example:
        >>> import numpy as np, quire
        >>> q, scale, zero = quire.quantize_int8(np.array([[0.0, 255.0]], np.float32), symmetric=False)
        >>> quire.dequantize_int8(q, scale, zero)
        array([[  0., 255.]], dtype=float32)
    """
    return _dequantize(
        "dequantize_int8", "int8", q, scale, zero_point, granularity, group_size, out_dtype, out, stream
    )


def _dequantize(
    op: str,
    dtype: str,
    q: Array,
    scale: Array,
    zero_point: Array | None,
    granularity: str,
    group_size: int,
    out_dtype: object,
    out: Array | None,
    stream: object,
) -> Array:
    shape = shape_of(op, "q", q)
    _check_dtype(op, "q", q, dtype)
    result = out
    if out is None:
        name = dtype_name(out_dtype)
        if name not in ("float32", "float16", "bfloat16"):
            raise TypeError(f"[{op}] out_dtype: expected float32, float16 or bfloat16, got {name}")
        result = empty(q, shape, name)
    if granularity == "block":
        if zero_point is not None:
            raise _require(op, "zero_point", 'none with granularity "block"', "one")
        _core.dequantize_blocks(result, q, scale, BLOCK, BLOCK, stream)
    else:
        _core.dequantize(result, q, scale, zero_point, granularity, group_size, stream)
    return finish(result, q) if out is None else out
