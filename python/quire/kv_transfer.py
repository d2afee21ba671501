"""Blocks of a KV cache on their way elsewhere: to another process, machine or storage, and to caches with other shares of the heads.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import operator
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from quire import _core
from quire._allocate import ITEM_BYTES, Array
from quire._refusals import called_as

if TYPE_CHECKING:
    from quire.kv_cache import KVCache

__all__ = ["KVBlocks", "KVCacheDescription"]

_MAGIC = b"quireKV\0"
_VERSION = 1
#: magic, version, bytes of the header, dtype, layers, block_size, head_dim, heads of the model, first head, heads here, 1 with keys;
#: blocks, bytes of the payload. Then 16 bytes for each key, and zeros up to a multiple of 64, with a CRC-32 of the rest in the last four.
_FIXED = struct.Struct("<8s10I2Q")
_ALIGNMENT = 64
_MAX_HEADER_BYTES = 1 << 30
#: The dtypes that a cache may have, and their numbers here, which never change.
CACHE_DTYPES = {"float32": 1, "float16": 2, "bfloat16": 3, "float8_e4m3fn": 4, "float8_e5m2": 5, "int8": 6}


@dataclass(frozen=True)
class KVCacheDescription:
    """Where every byte of a :class:`quire.KVCache` lies, for libraries that register and move memory.

    Attributes:
        base: Address of the first byte.
        num_bytes: Bytes of the pool, which is contiguous.
        device: "cpu" or "cuda:<index>".
        dtype: The dtype's name.
        shape: ``[num_layers, 2, num_blocks, block_size, num_kv_heads, head_dim]``; K before V.
        strides_bytes: Of each dimension.
        shard_axis: The dimension that tensor parallelism divides.

    Example:
        >>> import quire
        >>> description = quire.KVCache(2, 8, 16, 4, 64, "bfloat16").describe()
        >>> description.block_bytes, len(list(description.regions([3])))
        (8192, 4)
    """

    base: int
    num_bytes: int
    device: str
    dtype: str
    shape: tuple[int, ...]
    strides_bytes: tuple[int, ...]
    shard_axis: int = 4

    @property
    def block_bytes(self) -> int:
        """Bytes of one block of one layer's K or V, which are contiguous."""
        return self.strides_bytes[2]

    def regions(self, block_ids: Sequence[int]) -> Iterator[tuple[int, int]]:
        """(address, bytes) of every piece of these blocks: by layer, K before V, then in the order of the blocks.

        Args:
            block_ids: The blocks, each in [0, num_blocks).

        Raises:
            IndexError: A block is out of range.
            TypeError: An id is no integer.
        """
        block_ids = _integers("KVCacheDescription", "block_ids", block_ids)
        for block_id in block_ids:
            if not 0 <= block_id < self.shape[2]:
                raise IndexError(
                    f"[KVCacheDescription] block_ids: expected a block id in [0, {self.shape[2]}), got {block_id}"
                )
        layer_bytes, kind_bytes, block_bytes = self.strides_bytes[:3]
        for layer in range(self.shape[0]):
            for kind in range(2):
                for block_id in block_ids:
                    yield (
                        self.base + layer * layer_bytes + kind * kind_bytes + block_id * block_bytes,
                        block_bytes,
                    )


@dataclass(frozen=True)
class KVBlocks:
    """Exported blocks: a header of bytes on the host, and a payload, a contiguous uint8 tensor on any device.

    Send the two as you like; :meth:`from_parts` puts them together again and checks them. On the host, :meth:`to_bytes` makes one buffer.

    Attributes:
        header: What :meth:`from_parts` reads.
        payload: ``[num_layers, 2, num_blocks, block_size, num_heads, head_dim_bytes]`` uint8 in that order of memory, of any rank.
        dtype: The dtype's name.
        num_layers: Layers.
        num_blocks: Blocks.
        block_size: Slots of a block.
        head_dim: Elements of a head.
        total_kv_heads: Heads of the model.
        head_start: The first head that is here.
        num_heads: How many heads are here.
        keys: Each block's key, or None.
    """

    header: bytes
    payload: Array
    dtype: str
    num_layers: int
    num_blocks: int
    block_size: int
    head_dim: int
    total_kv_heads: int
    head_start: int
    num_heads: int
    keys: tuple[int, ...] | None

    @property
    def payload_bytes(self) -> int:
        """Bytes of the payload."""
        return int(np.prod(self._shape(), dtype=object))

    def _shape(self) -> tuple[int, ...]:
        width = self.head_dim * ITEM_BYTES[self.dtype]
        return (self.num_layers, 2, self.num_blocks, self.block_size, self.num_heads, width)

    def to_bytes(self) -> bytes:
        """Header and payload in one buffer.

        Raises:
            ValueError: The payload is not on the CPU.
        """
        payload: bytes = _host_bytes(self.payload).tobytes()
        return self.header + payload

    @staticmethod
    def from_bytes(buffer: bytes | bytearray | memoryview | Array) -> KVBlocks:
        """What :meth:`to_bytes` made; the payload is a view of the buffer.

        Args:
            buffer: Contiguous bytes on the host: bytes, bytearray, memoryview, or a NumPy array.

        Raises:
            ValueError: The buffer is truncated, too long, altered in its header, or something else altogether.
            TypeError: It is no contiguous host memory.
        """
        try:
            data = np.frombuffer(buffer, np.uint8)
        except (TypeError, ValueError, BufferError) as error:
            raise TypeError(
                f"[KVBlocks] buffer: expected contiguous bytes on the host, got {type(buffer).__qualname__} ({error})"
            ) from None
        if data.size >= _FIXED.size and bytes(data[:8]) == _MAGIC:
            (header_bytes,) = struct.unpack("<I", data[12:16].tobytes())
            return KVBlocks.from_parts(data[:header_bytes].tobytes(), data[header_bytes:])
        return KVBlocks.from_parts(data[: _FIXED.size].tobytes(), data[_FIXED.size :])

    @staticmethod
    def from_parts(header: bytes, payload: Array) -> KVBlocks:
        """Header and payload that travelled apart.

        Args:
            header: The bytes of :attr:`header`.
            payload: :attr:`payload`: a contiguous uint8 tensor of any framework and rank, on any device.

        Raises:
            ValueError: One of them is truncated, altered, or of something else.
            TypeError: ``header`` is no bytes.
        """
        if not isinstance(header, (bytes, bytearray, memoryview)):
            raise TypeError(f"[KVBlocks] header: expected bytes, got {type(header).__qualname__}")
        fields, keys = _read_header(bytes(header))
        blocks = KVBlocks(bytes(header), payload, *fields, keys)
        blocks._check_payload()
        return blocks

    def _check_payload(self) -> None:
        """Whether the payload has the bytes that the other fields tell of; nobody has to come by :meth:`from_parts`."""
        payload = self.payload
        shape = getattr(payload, "shape", None)
        if shape is None or not str(payload.dtype).endswith("uint8"):
            raise ValueError(f"[KVBlocks] payload: expected a uint8 tensor, got {type(payload).__qualname__}")
        if isinstance(payload, _core.Tensor):
            payload.reshape(shape)  # raises unless it is contiguous
        num_bytes = int(np.prod(tuple(shape), dtype=object))
        if num_bytes != self.payload_bytes:
            raise ValueError(f"[KVBlocks] payload: expected {self.payload_bytes} bytes, got {num_bytes}")


def _make_header(blocks: tuple[str, int, int, int, int, int, int, int], keys: Sequence[int] | None) -> bytes:
    dtype, num_layers, num_blocks, block_size, head_dim, total, start, count = blocks
    key_bytes = b"".join(key.to_bytes(16, "little") for key in keys or ())
    header_bytes = -(-(_FIXED.size + len(key_bytes) + 4) // _ALIGNMENT) * _ALIGNMENT
    payload_bytes = num_layers * 2 * num_blocks * block_size * count * head_dim * ITEM_BYTES[dtype]
    fixed = _FIXED.pack(
        _MAGIC, _VERSION, header_bytes, CACHE_DTYPES[dtype], num_layers, block_size, head_dim, total, start, count, keys is not None,
        num_blocks, payload_bytes,
    )  # fmt: skip
    body = (fixed + key_bytes).ljust(header_bytes - 4, b"\0")
    return body + struct.pack("<I", zlib.crc32(body))


def _read_header(
    header: bytes,
) -> tuple[tuple[str, int, int, int, int, int, int, int], tuple[int, ...] | None]:
    def refuse(expected: str, got: object) -> ValueError:
        return ValueError(f"[KVBlocks] header: expected {expected}, got {got}")

    if len(header) < _FIXED.size or header[:8] != _MAGIC:
        raise refuse("one of quire's KV blocks", f"{len(header)} bytes of something else")
    (_, version, header_bytes, dtype, num_layers, block_size, head_dim, total, start, count, has_keys, num_blocks, payload_bytes) = (
        _FIXED.unpack_from(header)
    )  # fmt: skip
    if version != _VERSION:
        raise refuse(f"version {_VERSION}", f"version {version}")
    if len(header) != header_bytes or header_bytes > _MAX_HEADER_BYTES:
        raise refuse(f"{header_bytes} bytes", f"{len(header)}")
    if zlib.crc32(header[:-4]) != struct.unpack("<I", header[-4:])[0]:
        raise refuse("its own checksum", "an altered header")
    names = {number: name for name, number in CACHE_DTYPES.items()}
    if dtype not in names or has_keys > 1 or start + count > total:
        raise refuse(
            "a dtype, heads and flags that are known",
            f"dtype {dtype}, heads {start} to {start + count} of {total}",
        )
    name = names[dtype]
    if payload_bytes != num_layers * 2 * num_blocks * block_size * count * head_dim * ITEM_BYTES[name]:
        raise refuse("sizes that multiply to the payload's", f"{payload_bytes} bytes")
    keys = None
    if has_keys:
        if _FIXED.size + 16 * num_blocks + 4 > header_bytes:
            raise refuse(f"{num_blocks} keys", "fewer")
        places = range(_FIXED.size, _FIXED.size + 16 * num_blocks, 16)
        keys = tuple(int.from_bytes(header[at : at + 16], "little") for at in places)
    return (name, num_layers, num_blocks, block_size, head_dim, total, start, count), keys


def _host_bytes(payload: Array) -> Any:
    if isinstance(payload, _core.Tensor):
        return payload.numpy()
    kind = payload.__dlpack_device__()[0]
    if int(kind) not in (1, 3):
        raise ValueError("[KVBlocks] payload: expected one on cpu, got one on a GPU; copy it first")
    return np.from_dlpack(payload)


def _pieces(payload: Array, shape: tuple[int, ...]) -> Iterator[tuple[int, int, Array]]:
    """Each layer's K and V of a payload, ``[num_blocks, block_size, num_heads, head_dim_bytes]``."""
    view = payload if tuple(payload.shape) == shape else payload.reshape(shape)
    for layer in range(shape[0]):
        for kind in range(2):
            yield layer, kind, view[layer, kind]


def _heads(tensor: Array, start: int, count: int) -> Array:
    if isinstance(tensor, _core.Tensor):
        return tensor.narrow(2, start, count)
    return tensor[:, :, start : start + count]


def _head_range(op: str, cache: KVCache, head_start: int, total_kv_heads: int | None) -> int:
    total = cache.num_kv_heads if total_kv_heads is None else total_kv_heads
    for arg, value in (("head_start", head_start), ("total_kv_heads", total)):
        if not hasattr(value, "__index__"):
            raise TypeError(f"[{op}] {arg}: expected an integer, got {type(value).__qualname__}")
    if total >= 2**31:  # the header has 32 bits for it
        raise ValueError(f"[{op}] total_kv_heads: expected fewer than 2**31, got {total}")
    if head_start < 0 or head_start + cache.num_kv_heads > total:
        raise ValueError(
            f"[{op}] head_start: expected {cache.num_kv_heads} heads within the model's {total}, got {head_start} to "
            f"{head_start + cache.num_kv_heads}"
        )
    return total


def _integers(op: str, arg: str, values: Sequence[int]) -> list[int]:
    try:
        return [operator.index(value) for value in values]
    except TypeError:
        raise TypeError(f"[{op}] {arg}: expected integers, got {type(values).__qualname__}") from None


def _ids(op: str, values: Sequence[int]) -> list[int]:
    """Block ids of at most 64 bits; swap_blocks checks them against the caches."""
    ids = _integers(op, "block_ids", values)
    for block in ids:
        if not 0 <= block < 2**63:
            raise IndexError(f"[{op}] block_ids: expected block ids, got {block}")
    return ids


def _pairs(sources: Sequence[int], destinations: Sequence[int]) -> Any:
    pairs = np.array([sources, destinations], np.int64).reshape(2, -1)
    return np.ascontiguousarray(pairs.T)


def export_blocks(
    cache: KVCache,
    block_ids: Sequence[int],
    head_start: int,
    total_kv_heads: int | None,
    keys: Sequence[int] | None,
    device: object,
    pinned: bool,
    stream: object,
) -> KVBlocks:
    """See KVCache.export_blocks."""
    op = "KVCache.export_blocks"
    total = _head_range(op, cache, head_start, total_kv_heads)
    block_ids = _ids(op, block_ids)
    num_blocks = len(block_ids)
    if keys is not None:
        keys = _integers(op, "keys", keys)
        if len(keys) != num_blocks or not all(0 <= key < 2**128 for key in keys):
            raise ValueError(f"[{op}] keys: expected {num_blocks} numbers below 2**128, got {len(keys)}")
    fields = (
        cache.dtype, cache.num_layers, num_blocks, cache.block_size, cache.head_dim, total, head_start, cache.num_kv_heads
    )  # fmt: skip
    width = cache.head_dim * ITEM_BYTES[cache.dtype]
    shape = (cache.num_layers, 2, num_blocks, cache.block_size, cache.num_kv_heads, width)
    with called_as(op):
        payload = _core.empty(shape, "uint8", cache.device if device is None else device, pinned)
    pairs = _pairs(block_ids, range(num_blocks))
    for layer, kind, piece in _pieces(payload, shape):
        _core.swap_blocks(piece, cache.pool[layer, kind].bytes(), pairs, stream)
    return KVBlocks(_make_header(fields, keys), payload, *fields, None if keys is None else tuple(keys))


def import_blocks(
    cache: KVCache,
    blocks: KVBlocks | bytes | bytearray | memoryview | Array,
    block_ids: Sequence[int],
    head_start: int,
    total_kv_heads: int | None,
    stream: object,
) -> tuple[int, int]:
    """See KVCache.import_blocks."""
    op = "KVCache.import_blocks"
    if not isinstance(blocks, KVBlocks):
        blocks = KVBlocks.from_bytes(blocks)
    total = _head_range(op, cache, head_start, total_kv_heads)
    if blocks.dtype != cache.dtype:
        raise TypeError(f"[{op}] blocks: expected {cache.dtype}, got {blocks.dtype}")
    own = {
        "num_layers": cache.num_layers, "block_size": cache.block_size, "head_dim": cache.head_dim, "total_kv_heads": total
    }  # fmt: skip
    for name, size in own.items():
        if getattr(blocks, name) != size:
            raise ValueError(f"[{op}] blocks: expected {name} {size}, got {getattr(blocks, name)}")
    blocks._check_payload()
    block_ids = _ids(op, block_ids)
    if len(block_ids) != blocks.num_blocks:
        raise ValueError(
            f"[{op}] block_ids: expected {blocks.num_blocks}, one for each block, got {len(block_ids)}"
        )
    first = max(head_start, blocks.head_start)
    last = min(head_start + cache.num_kv_heads, blocks.head_start + blocks.num_heads)
    if first >= last:
        raise ValueError(
            f"[{op}] blocks: expected some of the heads {head_start} to {head_start + cache.num_kv_heads}, got "
            f"{blocks.head_start} to {blocks.head_start + blocks.num_heads}"
        )
    pairs = _pairs(range(blocks.num_blocks), block_ids)
    for layer, kind, piece in _pieces(blocks.payload, blocks._shape()):
        destination = _heads(cache.pool[layer, kind].bytes(), first - head_start, last - first)
        _core.swap_blocks(destination, _heads(piece, first - blocks.head_start, last - first), pairs, stream)
    return first, last
