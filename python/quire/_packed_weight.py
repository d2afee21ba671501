"""Packed weights: the constructors from checkpoints' tensors, and back to a dense weight.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from quire import _core
from quire._allocate import ITEM_BYTES, Array, device_of, dtype_name, empty, finish, from_numpy
from quire._quantized import Granularity, quantize, whole_number
from quire._refusals import called_as, unexpected
from quire._weight_source import (
    Groups,
    check_bits,
    check_dtype,
    check_scales,
    check_shape,
    dtype_of,
    host,
    is_symmetric,
    one_value,
    public_group_size,
    settle,
    shape_of_rank,
    words_of,
)

BLOCK = 128  # of scales of blocks
#: A weight's tensors, in the order of pytrees.
TENSORS = ("_data", "_permutation", "weight", "scale", "input_scale", "input_zero_point", "_column_sums")
#: in_features, out_features, bits, group_size, num_rows, scale_dtype, has_zeros, layout
Fields = tuple[int, int, int, int, int, str, bool, str]
#: format, shape, bits, group_size, layout, and the fields of a packed weight
Static = tuple[str, tuple[int, int], int, int, str, "Fields | None"]


#: How weights with traced tensors are dequantized: whether a tensor is traced, and (weight, dtype, out, stream) to the result. quire.jax
#: and quire.torch add theirs.
TRACED_DEQUANTIZE: list[tuple[Callable[[Array], bool], Callable[..., Array]]] = []


def format_of(fields: Fields) -> _core.WeightFormat:
    """What the core calls such a weight."""
    return _core.WeightFormat(*fields)


def restore(static: Static, tensors: Sequence[Array | None]) -> PackedWeight:
    """A weight of its parts, for copies and pickles."""
    return PackedWeight._unflatten(static, tensors)


def _nbytes(t: Array) -> int:
    count = 1
    for n in t.shape:
        count *= int(n)
    return count * ITEM_BYTES[dtype_name(t.dtype)]


class PackedWeight:
    """The quantized weight of a linear layer, ready for :func:`quantized_matmul`.

    Made by one of the constructors ``from_awq``, ``from_gptq``, ``from_compressed_tensors``, ``from_fp8``, ``from_int8`` and ``quantize``,
    which read the contents of scales and of ``g_idx`` on the host, once, to check them. Everything else happens on the device that
    the tensors live on, and stays there. They wait for their stream: before they read, and at the end, so that a weight may be used on
    any stream once it is made. In a CUDA graph's capture they raise :class:`quire.UnsupportedError`.

    ``quire.jax`` makes it a pytree for JAX, ``quire.torch`` for PyTorch: its tensors are the leaves. It may be an argument of a jitted
    function or a part of one's closure, and is copied and pickled like its tensors (JAX unpickles to its default device, which must
    be of the kind that a packed weight was made for).

    Integer codes with 16-bit activations ("w2a16", "w3a16", "w4a16", "w8a16") are repacked into the layout of the device's kernels: the
    value of an element is ``(code - zero) * scale``, the product in float32; on the CPU with AMX, most products with bfloat16
    activations round it to bfloat16 (:func:`quantized_matmul` says which). Codes of 2 and 3 bits take 4. "fp8" and "w8a8" keep the
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
    _data: Array | None
    _permutation: Array | None
    _column_sums: Array | None
    #: The arguments of _core.WeightFormat; all plain, for those who trace or copy a weight.
    _fields: Fields | None

    @classmethod
    def _new(
        cls, format: str, shape: tuple[int, int], bits: int, group_size: int, layout: str
    ) -> PackedWeight:
        self = object.__new__(cls)
        self.format, self.shape, self.bits, self.group_size, self.layout = (
            format,
            shape,
            bits,
            group_size,
            layout,
        )
        for name in TENSORS:
            setattr(self, name, None)
        self._fields = None
        return self

    @property
    def _like(self) -> Array:
        """A tensor on its device, of its framework."""
        return self._data if self.weight is None else self.weight

    @functools.cached_property
    def _format(self) -> _core.WeightFormat:
        assert self._fields is not None
        return format_of(self._fields)

    def __reduce__(self) -> tuple[object, ...]:
        """For copies and pickles: its tensors, and all else."""
        tensors, static = self._flatten()
        return restore, (static, tensors)

    @property
    def _activation_granularity(self) -> Granularity:
        """How a product with an "fp8" or "w8a8" weight quantizes the activations."""
        if self.input_scale is not None:
            return "tensor"
        return "group" if self.group_size == BLOCK else "token"

    @property
    def _granularity(self) -> Literal["tensor", "token", "block"]:
        """What a scale of an "fp8" or "w8a8" weight belongs to."""
        if self.group_size == BLOCK:
            return "block"
        return "tensor" if self.scale is not None and tuple(self.scale.shape) == (1,) else "token"

    def _flatten(self) -> tuple[tuple[Array | None, ...], Static]:
        """Its tensors, and all else."""
        static = self.format, self.shape, self.bits, self.group_size, self.layout, self._fields
        return tuple(getattr(self, name) for name in TENSORS), static

    @classmethod
    def _unflatten(cls, static: Static, tensors: Sequence[Array | None]) -> PackedWeight:
        """The reverse of :meth:`_flatten`."""
        self = cls._new(*static[:5])
        self._fields = static[5]
        for name, tensor in zip(TENSORS, tensors, strict=True):
            setattr(self, name, tensor)
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
        groups: Groups,
        group_size: int,
        stream: object,
    ) -> PackedWeight:
        device = device_of(codes)
        self = cls._new(f"w{bits}a16", shape, bits, group_size, device.partition(":")[0])
        self._fields = (
            shape[1], shape[0], bits, groups.group_size, groups.num_rows, dtype_of(op, "scales", scales), zeros is not None,
            self.layout,
        )  # fmt: skip
        with called_as(op):
            data = empty(codes, (_core.packed_weight_size(self._format, device),), "uint8")
        if groups.permutation is not None:
            self._permutation = from_numpy(groups.permutation, codes)
        sources = None if groups.groups is None else from_numpy(groups.groups, codes)
        with called_as(op):
            _core.pack_weight(
                data, self._format, self._permutation, encoding, codes, scales, zeros, sources, stream
            )
        self._data = finish(data, codes)
        settle(op, "weight", self._data, stream)
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
            stream: An int, an object with ``__cuda_stream__``, or None for the framework's current stream.

        Raises:
            ValueError: Shapes contradict each other, or a scale is negative or not finite.
            TypeError: A dtype does not fit.

        Source: Lin et al., AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration, 2023.
        """
        op = "from_awq"
        in_features, words = shape_of_rank(op, "qweight", qweight, 2)
        num_groups, out_features = shape_of_rank(op, "scales", scales, 2)
        check_dtype(op, "qweight", qweight, "int32")
        check_dtype(op, "qzeros", qzeros, "int32")
        if words * 8 != out_features:
            raise unexpected(
                op, "scales", f"{words * 8} columns, as qweight has {words} of words", out_features
            )
        check_shape(op, "qzeros", qzeros, (num_groups, words))
        groups = Groups(op, in_features, num_groups, group_size)
        check_scales(op, "scales", scales, stream)
        size = public_group_size(in_features, num_groups, group_size)
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
            stream: An int, an object with ``__cuda_stream__``, or None for the framework's current stream.

        Raises:
            ValueError: Shapes contradict each other, or a scale is not finite.
            TypeError: A dtype does not fit.
            IndexError: g_idx names a group that is not there.
            quire.UnsupportedError: Other bits.

        Source: Frantar et al., GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers, 2022.
        """
        op = "from_gptq"
        if checkpoint_format not in ("gptq", "gptq_v2"):
            raise unexpected(op, "checkpoint_format", '"gptq" or "gptq_v2"', repr(checkpoint_format))
        check_bits(op, bits, (2, 3, 4, 8))
        words, out_features = shape_of_rank(op, "qweight", qweight, 2)
        check_dtype(op, "qweight", qweight, "int32")
        in_features = words * 32 // bits if g_idx is None else shape_of_rank(op, "g_idx", g_idx, 1)[0]
        if words_of(in_features, bits) != words:
            raise unexpected(
                op, "qweight", f"{words_of(in_features, bits)} rows for a g_idx of {in_features}", words
            )
        num_groups, _ = shape_of_rank(op, "scales", scales, 2)
        check_shape(op, "scales", scales, (num_groups, out_features))
        groups = Groups(op, in_features, num_groups, group_size, g_idx, stream)
        check_scales(op, "scales", scales, stream, positive=False)
        if qzeros is not None:
            check_dtype(op, "qzeros", qzeros, "int32")
            check_shape(op, "qzeros", qzeros, (num_groups, words_of(out_features, bits)))
            zeros = host(op, "qzeros", qzeros, stream) if out_features * bits % 32 == 0 else None
            if zeros is not None and is_symmetric(zeros, bits, checkpoint_format):
                qzeros = None
        size = public_group_size(in_features, num_groups, group_size)
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
            stream: An int, an object with ``__cuda_stream__``, or None for the framework's current stream.

        Raises:
            ValueError: Shapes contradict each other, or a scale is negative or not finite.
            TypeError: A dtype does not fit.
            IndexError: weight_g_idx names a group that is not there.
            quire.UnsupportedError: Other bits, or int8 weights with zero points.
        """
        op = "from_compressed_tensors"
        if (weight_packed is None) == (weight is None):
            raise unexpected(
                op, "weight", "either weight_packed or weight", "none" if weight is None else "both"
            )
        if weight_packed is None:
            assert weight is not None
            if weight_zero_point is not None:
                dtype_of(op, "weight_zero_point", weight_zero_point)
                zeros = host(op, "weight_zero_point", weight_zero_point, stream)
                if zeros.astype(np.int64).any():
                    raise _core.UnsupportedError(
                        f"[{op}] weight_zero_point: expected zeros for unpacked weights, got others"
                    )
            names = (op, "weight", "weight_scale")
            if dtype_of(op, "weight", weight) == "int8":
                return cls._of_int8(names, weight, weight_scale, input_scale, input_zero_point, stream)
            if input_zero_point is not None:
                raise unexpected(op, "input_zero_point", "none with a float8 weight", "one")
            return cls._of_fp8(names, weight, weight_scale, input_scale, stream)
        check_bits(op, bits, (4, 8))
        check_dtype(op, "weight_packed", weight_packed, "int32")
        out_features, words = shape_of_rank(op, "weight_packed", weight_packed, 2)
        in_features = words * 32 // bits
        if weight_shape is not None:
            check_shape(op, "weight_shape", weight_shape, (2,))
            stated = [int(n) for n in host(op, "weight_shape", weight_shape, stream)]
            in_features = stated[1]
            if stated[0] != out_features or in_features < 1 or words_of(in_features, bits) != words:
                raise unexpected(
                    op, "weight_shape", f"[{out_features}, {words * 32 // bits} or a little less]", stated
                )
        _, num_groups = shape_of_rank(op, "weight_scale", weight_scale, 2)
        check_shape(op, "weight_scale", weight_scale, (out_features, num_groups))
        if weight_zero_point is not None:
            check_dtype(op, "weight_zero_point", weight_zero_point, "int32")
            check_shape(
                op, "weight_zero_point", weight_zero_point, (words_of(out_features, bits), num_groups)
            )
        of_groups = ("weight_scale", "weight_g_idx")
        groups = Groups(op, in_features, num_groups, group_size, weight_g_idx, stream, names=of_groups)
        check_scales(op, "weight_scale", weight_scale, stream)
        size = public_group_size(in_features, num_groups, group_size)
        return cls._pack(
            op, "compressed-tensors", (out_features, in_features), bits, weight_packed, weight_scale,
            weight_zero_point, groups, size, stream,
        )  # fmt: skip

    @classmethod
    def from_fp8(
        cls, weight: Array, scale: Array, *, input_scale: Array | None = None, stream: object = None
    ) -> PackedWeight:
        """From a float8 weight and what it is to be multiplied by (also where a checkpoint calls it ``weight_scale_inv``).

        Args:
            weight: float8_e4m3fn ``[out_features, in_features]``; it is kept, not copied.
            scale: ``[]`` or ``[1]``, ``[out_features]`` or ``[out_features, 1]``, or one for each 128 x 128 block,
                ``[out_features / 128, in_features / 128]`` rounded up; float32, float16 or bfloat16, finite and not negative.
            input_scale: ``[]`` or ``[1]``: the scale of all activations, or None: computed scales.
            stream: An int, an object with ``__cuda_stream__``, or None for the framework's current stream.

        Raises:
            ValueError: Shapes contradict each other, or a scale is negative or not finite.
            TypeError: A dtype does not fit.
        """
        return cls._of_fp8(("from_fp8", "weight", "scale"), weight, scale, input_scale, stream)

    @classmethod
    def _of_fp8(
        cls,
        names: tuple[str, str, str],
        weight: Array,
        scale: Array,
        input_scale: Array | None,
        stream: object,
    ) -> PackedWeight:
        op, weight_name, scale_name = names
        out_features, in_features = shape_of_rank(op, weight_name, weight, 2)
        check_dtype(op, weight_name, weight, "float8_e4m3fn")
        values = check_scales(op, scale_name, scale, stream)
        blocks = (-(-out_features // BLOCK), -(-in_features // BLOCK))
        if values.size == 1:
            values = values.reshape(1)
        elif values.shape in ((out_features,), (out_features, 1)):
            values = values.reshape(out_features, 1)
        elif values.shape != blocks:
            raise unexpected(
                op,
                scale_name,
                f"[1], {[out_features, 1]} or {list(blocks)}",
                f"{dtype_name(scale.dtype)} {list(values.shape)}",
            )
        by_block = values.ndim == 2 and values.shape == blocks and values.shape != (out_features, 1)
        if input_scale is not None and by_block:
            raise unexpected(op, "input_scale", "none with scales of blocks", "one")
        self = cls._new("fp8", (out_features, in_features), 8, BLOCK if by_block else -1, "rows")
        self.weight, self.scale = weight, from_numpy(values, weight)
        self.input_scale = one_value(op, "input_scale", input_scale, weight, stream)
        settle(op, weight_name, weight, stream)
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
            stream: An int, an object with ``__cuda_stream__``, or None for the framework's current stream.

        Raises:
            ValueError: Shapes contradict each other, or a scale is negative or not finite.
            TypeError: A dtype does not fit.
        """
        names = ("from_int8", "weight", "scale")
        return cls._of_int8(names, weight, scale, input_scale, input_zero_point, stream)

    @classmethod
    def _of_int8(
        cls,
        names: tuple[str, str, str],
        weight: Array,
        scale: Array,
        input_scale: Array | None,
        input_zero_point: Array | None,
        stream: object,
    ) -> PackedWeight:
        op, weight_name, scale_name = names
        out_features, in_features = shape_of_rank(op, weight_name, weight, 2)
        check_dtype(op, weight_name, weight, "int8")
        values = check_scales(op, scale_name, scale, stream)
        if values.size == 1:
            values = values.reshape(1)
        elif values.shape in ((out_features,), (out_features, 1)):
            values = values.reshape(out_features, 1)
        else:
            raise unexpected(
                op,
                scale_name,
                f"[1] or {[out_features, 1]}",
                f"{dtype_name(scale.dtype)} {list(values.shape)}",
            )
        self = cls._new("w8a8", (out_features, in_features), 8, -1, "rows")
        self.weight, self.scale = weight, from_numpy(values, weight)
        self.input_scale = one_value(op, "input_scale", input_scale, weight, stream)
        if input_zero_point is not None:
            if input_scale is None:
                raise unexpected(op, "input_zero_point", "none without input_scale", "one")
            dtype_of(op, "input_zero_point", input_zero_point)
            zero = host(op, "input_zero_point", input_zero_point, stream).reshape(-1)
            if zero.size != 1 or zero.dtype.kind not in "iu" or not -128 <= int(zero[0]) <= 127:
                raise unexpected(op, "input_zero_point", "one integer in [-128, 127]", zero.tolist())
            if int(zero[0]) != 0:
                self.input_zero_point = from_numpy(zero.astype(np.int32), weight)
                sums = empty(weight, (out_features,), "int32")
                with called_as(op, b=weight_name):
                    _core.column_sums(sums, weight, stream)
                self._column_sums = finish(sums, weight)
        settle(op, weight_name, weight, stream)
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
            weight: float32, float16 or bfloat16 ``[out_features, in_features]``, finite: infinities are refused, NaN is not looked for.
            format: "w2a16" to "w8a16": integer codes, 16-bit activations; "fp8": float8_e4m3fn; "w8a8": int8.
            group_size: For integer codes; -1: all of a row.
            symmetric: For integer codes: no zero points.
            granularity: For "fp8" and "w8a8": what a scale belongs to; "block" is 128 x 128, for "fp8" only.
            stream: An int, an object with ``__cuda_stream__``, or None for the framework's current stream.

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
        shape = shape_of_rank(op, "weight", weight, 2)
        name = dtype_of(op, "weight", weight)
        if name not in ("float32", "float16", "bfloat16"):
            raise TypeError(f"[{op}] weight: expected float32, float16 or bfloat16, got {name}")
        _core.synchronize(op, "weight", weight, stream)
        if format in ("fp8", "w8a8"):
            return cls._quantize_rows(weight, shape[0], format, granularity, stream)
        if format not in ("w2a16", "w3a16", "w4a16", "w8a16"):
            raise unexpected(
                op, "format", '"w2a16", "w3a16", "w4a16", "w8a16", "fp8" or "w8a8"', repr(format)
            )
        bits = int(format[1])
        group_size = whole_number(op, "group_size", group_size)
        size = shape[1] if group_size == -1 else group_size
        if size < 1:
            raise unexpected(op, "group_size", "1 or more, or -1 for one group", group_size)
        num_groups = -(-shape[1] // size)
        groups = Groups(op, shape[1], num_groups, group_size if num_groups > 1 else -1)
        codes = empty(weight, shape, "uint8")
        scales = empty(weight, (shape[0], num_groups), name)
        zeros = None if symmetric else empty(weight, (shape[0], num_groups), "uint8")
        with called_as(op, w="weight"):
            _core.quantize_weight(codes, scales, zeros, weight, bits, size, stream)
        codes, scales = finish(codes, weight), finish(scales, weight)
        zeros = None if zeros is None else finish(zeros, weight)
        check_scales(op, "weight", scales, stream)
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
            raise unexpected(
                "quantize", "granularity", " or ".join(f'"{k}"' for k in known), repr(granularity)
            )
        dtype = "float8_e4m3fn" if format == "fp8" else "int8"

        def codes(scaling: Granularity, scale: Array | None = None) -> tuple[Array, Array]:
            with called_as("quantize", x="weight"):
                return quantize(
                    "quantize", dtype, weight, scale, None, True, scaling, BLOCK, None, None, stream
                )[:2]

        if granularity == "block":
            # A scale for each 128 elements of a row first; a block's is the largest of its rows'.
            by_row = host("quantize", "weight", codes("group")[1], stream)
            blocks = np.maximum.reduceat(by_row, np.arange(0, out_features, BLOCK), axis=0)
            spread = np.ascontiguousarray(np.repeat(blocks, BLOCK, axis=0)[:out_features])
            q, scale = codes("group", from_numpy(spread, weight))[0], from_numpy(blocks, weight)
        else:
            q, scale = codes("tensor" if granularity == "tensor" else "token")
        names = ("quantize", "weight", "weight")
        if format == "fp8":
            return cls._of_fp8(names, q, scale, None, stream)
        return cls._of_int8(names, q, scale, None, None, stream)

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
        return sum(_nbytes(t) for t in tensors if hasattr(t, "dtype"))

    def dequantize(
        self, dtype: object = "float32", *, out: Array | None = None, stream: object = None
    ) -> Array:
        """The weight ``[out_features, in_features]``, each product computed in float32 and rounded to dtype.

        May be called inside ``torch.compile`` and ``torch.export``, where ``quire.torch`` is imported, and on a weight that is an
        argument of a function under ``jax.jit``, without ``out``.

        Args:
            dtype: "float32", "float16", "bfloat16", or a framework's dtype of that name; ``out``'s own where that is given.
            out: Where to write, or None to allocate it in the framework of the tensors that the weight was made from.
            stream: An int, an object with ``__cuda_stream__``, or None for the framework's current stream.

        Raises:
            ValueError: ``out`` does not fit.
            TypeError: ``dtype`` is another one.
        """
        for is_traced, dequantize in TRACED_DEQUANTIZE:
            if is_traced(self._like):
                return dequantize(self, dtype, out, stream)
        name = dtype_name(dtype)
        if out is None and name not in ("float32", "float16", "bfloat16"):
            raise TypeError(f"[dequantize] dtype: expected float32, float16 or bfloat16, got {name}")
        result = empty(self._like, self.shape, name) if out is None else out
        with called_as("dequantize", q="weight", scales="scale"):
            if self.weight is None:
                _core.dequantize_weight(result, self._data, self._format, self._permutation, stream)
            else:
                undo = _core.dequantize_fp8 if self.format == "fp8" else _core.dequantize_int8
                undo(result, self.weight, self.scale, None, self._granularity, 1, stream)
        return finish(result, self._like) if out is None else out

    def __repr__(self) -> str:
        """Format, shape, group size and bytes."""
        group = "" if self.group_size == -1 else f", groups of {self.group_size}"
        order = ", act-order" if self._permutation is not None else ""
        return f"PackedWeight({self.format}, {list(self.shape)}{group}{order}, {self.nbytes} bytes, layout {self.layout})"
