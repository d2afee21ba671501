"""The paged KV cache: its memory, and the ops that write, read and move its blocks.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

from quire import _core
from quire._allocate import ITEM_BYTES, Array, dtype_name, empty, finish, shape_of
from quire._refusals import called_as
from quire.kv_transfer import CACHE_DTYPES, KVBlocks, KVCacheDescription, export_blocks, import_blocks

__all__ = ["KVBlocks", "KVCache", "KVCacheDescription", "copy_blocks", "gather_kv", "swap_blocks", "write_kv"]


def write_kv(
    k: Array,
    v: Array,
    k_cache: Array,
    v_cache: Array,
    slot_mapping: Array,
    *,
    k_scale: Array | None = None,
    v_scale: Array | None = None,
    stream: object = None,
) -> None:
    """Writes token ``t``'s key and value to slot ``slot_mapping[t]`` of the caches.

    A slot is ``block_id * block_size + offset``. Quantized caches store ``saturate(x / scale)``, rounded to nearest even.

    Args:
        k: ``[num_tokens, num_kv_heads, head_dim]`` float32, float16 or bfloat16, unit inner stride.
        v: As ``k``.
        k_cache: ``[num_blocks, block_size, num_kv_heads, head_dim]``, unit inner stride: float32, float16, bfloat16,
            float8_e4m3fn, float8_e5m2 or int8.
        v_cache: As ``k_cache``.
        slot_mapping: int32 or int64 ``[num_tokens]``. -1 skips a token; any other value outside the cache is skipped and
            recorded for :func:`quire.check_errors`.
        k_scale: float32 ``[1]`` or ``[num_kv_heads]``, for float8 and int8 caches only; None is 1.
        v_scale: Likewise.
        stream: An int, an object with ``__cuda_stream__``, or None for the framework's current stream.

    Raises:
        ValueError: Shapes, strides or devices do not fit, a cache is read-only, or memory overlaps.
        TypeError: A dtype does not fit, or an argument is no tensor.

    Source: Kwon et al., Efficient Memory Management for LLM Serving with PagedAttention, 2023; Micikevicius et al., FP8 Formats for Deep
    Learning, 2022.

    Example:
        >>> import numpy as np, quire
        >>> cache = np.zeros((2, 2, 4, 1, 8), np.float32)
        >>> x = np.ones((1, 1, 8), np.float32)
        >>> quire.write_kv(x, x, cache[0], cache[1], np.array([5]))
        >>> float(cache[0, 1, 1].sum())
        8.0
    """
    _core.write_kv(k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale, stream)


def gather_kv(
    k_cache: Array,
    v_cache: Array,
    slot_mapping: Array,
    *,
    k_scale: Array | None = None,
    v_scale: Array | None = None,
    out: tuple[Array, Array] | None = None,
    stream: object = None,
) -> tuple[Array, Array]:
    """The reverse of :func:`write_kv`: ``k[t], v[t] = cache[slot_mapping[t]]``, dequantized; a skipped token gives zeros.

    Args:
        k_cache: As in :func:`write_kv`.
        v_cache: As ``k_cache``.
        slot_mapping: As in :func:`write_kv`.
        k_scale: As in :func:`write_kv`.
        v_scale: Likewise.
        out: ``(k, v)``, each ``[num_tokens, num_kv_heads, head_dim]`` float32, float16 or bfloat16. None allocates them in the
            cache's framework: of its dtype, or float32 for a quantized cache.
        stream: As in :func:`write_kv`.

    Returns:
        ``(k, v)``.

    Raises:
        ValueError: Shapes, strides or devices do not fit.
        TypeError: A dtype does not fit, or an argument is no tensor.

    Example:
        >>> import numpy as np, quire
        >>> cache = np.arange(16, dtype=np.float32).reshape(2, 1, 1, 8)
        >>> quire.gather_kv(cache, cache, np.array([1, -1]))[0][:, 0, 0]
        array([8., 0.], dtype=float32)
    """
    if out is None:
        cache_shape = shape_of("gather_kv", "k_cache", k_cache)
        if len(cache_shape) != 4:
            raise ValueError(
                f"[gather_kv] k_cache: expected [num_blocks, block_size, num_kv_heads, head_dim], got {list(cache_shape)}"
            )
        num_tokens = shape_of("gather_kv", "slot_mapping", slot_mapping)[:1] or (0,)
        dtype = "float32" if ITEM_BYTES.get(dtype_name(k_cache.dtype)) == 1 else None
        shape = (*num_tokens, *cache_shape[2:])
        k, v = empty(k_cache, shape, dtype), empty(k_cache, shape, dtype)
    else:
        try:
            k, v = out
        except TypeError:
            raise TypeError(
                f"[gather_kv] out: expected a pair (k, v), got {type(out).__qualname__}"
            ) from None
        except ValueError:
            raise ValueError(f"[gather_kv] out: expected a pair (k, v), got {len(out)} of them") from None
    _core.gather_kv(k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale, stream)
    return (finish(k, k_cache), finish(v, k_cache)) if out is None else (k, v)


def copy_blocks(cache: Array, pairs: Array, *, stream: object = None) -> None:
    """Copies whole blocks inside one cache, for copy-on-write: ``cache[pairs[i, 1]] = cache[pairs[i, 0]]``.

    Args:
        cache: ``[num_blocks, ...]`` of any dtype and of rank 2 to 8.
        pairs: int32 or int64 ``[num_pairs, 2]`` of (source, destination), on the cache's device. A pair with an index outside the
            cache is skipped and, unless that index is -1, recorded for :func:`quire.check_errors`. No destination may be the
            source or the destination of another pair.
        stream: An int, an object with ``__cuda_stream__``, or None for the framework's current stream.

    Raises:
        ValueError: Shapes, strides or devices do not fit, or the cache is read-only.
        TypeError: A dtype does not fit, or an argument is no tensor.

    Example:
        >>> import numpy as np, quire
        >>> cache = np.arange(4, dtype=np.float32).reshape(4, 1)
        >>> quire.copy_blocks(cache, np.array([[3, 0]]))
        >>> cache[:, 0]
        array([3., 1., 2., 3.], dtype=float32)
    """
    _core.copy_blocks(cache, pairs, stream)


def swap_blocks(dst: Array, src: Array, pairs: Array, *, stream: object = None) -> None:
    """Copies blocks between two caches on any devices, for swapping out and in: ``dst[pairs[i, 1]] = src[pairs[i, 0]]``.

    Adjacent pairs become one transfer.

    Args:
        dst: ``[num_dst_blocks, ...]``.
        src: ``[num_src_blocks, ...]`` of dst's dtype and block shape. Pinned host memory moves at the link's rate.
        pairs: int64 ``[num_pairs, 2]`` of (source, destination), on the CPU.
        stream: An int, an object with ``__cuda_stream__``, or None for the framework's current stream.

    Raises:
        ValueError: Shapes or strides do not fit, or dst is read-only.
        TypeError: A dtype does not fit, or an argument is no tensor.
        IndexError: A pair is out of range; nothing is copied.

    Example:
        >>> import numpy as np, quire
        >>> device, host = np.zeros((4, 2), np.float32), np.ones((2, 2), np.float32)
        >>> quire.swap_blocks(device, host, np.array([[0, 3], [1, 1]]))
        >>> device[:, 0]
        array([0., 1., 0., 1.], dtype=float32)
    """
    _core.swap_blocks(dst, src, pairs, stream)


class KVCache:
    """The memory of a paged KV cache: one pool ``[num_layers, 2, num_blocks, block_size, num_kv_heads, head_dim]``.

    Each layer's K and V go to any framework without a copy, through ``__dlpack__``. The memory lives until the cache and every
    view of it, in whatever framework, are gone. Its contents start undefined.

    Args:
        num_layers: Layers, 1 or more.
        num_blocks: Blocks of each layer, 1 or more.
        block_size: Slots (tokens) of a block.
        num_kv_heads: Heads of K and of V.
        head_dim: Elements of a head.
        dtype: "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2" or "int8", or a framework's dtype of that name.
        device: "cpu", "cuda" or "cuda:<index>".
        pinned: On the CPU: page-locked memory, for :func:`swap_blocks` at the link's rate.

    Raises:
        MemoryError: The memory cannot be had; the message says how many bytes.
        ValueError: A size is not positive, the sizes multiply beyond 64 bits, the device is none, or ``pinned`` is not for the CPU.
        TypeError: A size is no integer, or the dtype is none of those.
        quire.UnsupportedError: "cuda" or ``pinned`` in a CPU-only build.

    Example:
        >>> import quire
        >>> cache = quire.KVCache(2, 8, 16, 1, 64, "float32", "cpu")
        >>> cache.k(0).shape, cache.num_bytes_allocated
        ((8, 16, 1, 64), 131072)
    """

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: object,
        device: object = "cpu",
        *,
        pinned: bool = False,
    ) -> None:
        self._num_bytes = KVCache.num_bytes(num_layers, num_blocks, block_size, num_kv_heads, head_dim, dtype)
        shape = (num_layers, 2, num_blocks, block_size, num_kv_heads, head_dim)
        with called_as("KVCache"):
            self._pool = _core.empty(shape, dtype, device, pinned)

    @staticmethod
    def num_bytes(
        num_layers: int, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int, dtype: object
    ) -> int:
        """Bytes that a cache of this size takes, without allocating it.

        Args:
            num_layers: Layers, 1 or more.
            num_blocks: Blocks of each layer, 1 or more.
            block_size: Slots (tokens) of a block.
            num_kv_heads: Heads of K and of V.
            head_dim: Elements of a head.
            dtype: As of :class:`KVCache`.

        Raises:
            ValueError: A size is not positive, or the product does not fit in 63 bits.
            TypeError: A size is no integer, or the dtype is none that a cache may have.
        """
        total = 2 * _item_bytes(dtype)
        sizes = {
            "num_layers": num_layers,
            "num_blocks": num_blocks,
            "block_size": block_size,
            "num_kv_heads": num_kv_heads,
            "head_dim": head_dim,
        }
        for name, size in sizes.items():
            try:
                count = operator.index(size)
            except TypeError:
                raise TypeError(f"[KVCache] {name}: expected an integer, got {type(size).__name__}") from None
            if count < 1:
                raise ValueError(f"[KVCache] {name}: expected 1 or more, got {count}")
            total *= count
        if total >= 2**63:
            raise ValueError(f"[KVCache] num_bytes: expected a size that fits in 64 bits, got {total}")
        return total

    @staticmethod
    def num_blocks_for(
        num_bytes: int, num_layers: int, block_size: int, num_kv_heads: int, head_dim: int, dtype: object
    ) -> int:
        """The most blocks that a cache of at most ``num_bytes`` can have; 0 if not even one fits.

        Args:
            num_bytes: Bytes for the whole cache, all layers, K and V.
            num_layers: Layers, 1 or more.
            block_size: Slots (tokens) of a block.
            num_kv_heads: Heads of K and of V.
            head_dim: Elements of a head.
            dtype: As of :class:`KVCache`.

        Raises:
            ValueError: A size is not positive.
            TypeError: A size or ``num_bytes`` is no integer, or the dtype is none that a cache may have.
        """
        if not hasattr(num_bytes, "__index__"):
            raise TypeError(f"[KVCache] num_bytes: expected an integer, got {type(num_bytes).__name__}")
        return max(0, operator.index(num_bytes)) // KVCache.num_bytes(
            num_layers, 1, block_size, num_kv_heads, head_dim, dtype
        )

    def k(self, layer: int) -> _core.Tensor:
        """Layer's keys, a view ``[num_blocks, block_size, num_kv_heads, head_dim]``; a negative number counts from the last layer.

        Raises:
            IndexError: No such layer.
            TypeError: ``layer`` is no integer.
        """
        return self._pool[layer, 0]

    def v(self, layer: int) -> _core.Tensor:
        """Layer's values, as :meth:`k`; so are the exceptions."""
        return self._pool[layer, 1]

    def layer(self, layer: int) -> _core.Tensor:
        """Layer's K and V in one tensor, ``[2, num_blocks, block_size, num_kv_heads, head_dim]``; exceptions are those of :meth:`k`."""
        return self._pool[layer]

    @property
    def pool(self) -> _core.Tensor:
        """The whole pool, ``[num_layers, 2, num_blocks, block_size, num_kv_heads, head_dim]``."""
        return self._pool

    @property
    def num_layers(self) -> int:
        """Layers of the cache."""
        return self._pool.shape[0]

    @property
    def num_blocks(self) -> int:
        """Blocks of each layer."""
        return self._pool.shape[2]

    @property
    def block_size(self) -> int:
        """Slots (tokens) of a block."""
        return self._pool.shape[3]

    @property
    def num_kv_heads(self) -> int:
        """Heads of K and of V."""
        return self._pool.shape[4]

    @property
    def head_dim(self) -> int:
        """Elements of a head."""
        return self._pool.shape[5]

    @property
    def dtype(self) -> str:
        """The dtype's name."""
        return self._pool.dtype

    @property
    def device(self) -> str:
        """ "cpu" or "cuda:<index>"."""
        return self._pool.device

    @property
    def num_bytes_allocated(self) -> int:
        """Bytes of the pool."""
        return self._num_bytes

    def copy_blocks(self, pairs: Array, *, stream: object = None) -> None:
        """Copies blocks of every layer's K and V, as :func:`copy_blocks`, in one launch.

        Args:
            pairs: As in :func:`copy_blocks`.
            stream: Likewise.

        Raises:
            ValueError: The shape, strides or device of ``pairs`` do not fit.
            TypeError: ``pairs`` is no tensor of int32 or int64.
        """
        copy_blocks(self._blocks(), pairs, stream=stream)

    def swap_blocks_from(self, src: KVCache, pairs: Array, *, stream: object = None) -> None:
        """Copies blocks of every layer's K and V from another cache, as :func:`swap_blocks`; a run of adjacent pairs is one transfer.

        Args:
            src: The other cache, of the same layers, block shape and dtype, on any device.
            pairs: As in :func:`swap_blocks`.
            stream: Likewise.

        Raises:
            ValueError: The caches differ in layers or block shape, or are one.
            TypeError: The caches differ in dtype, src is no KVCache, or ``pairs`` is no int64 tensor.
            IndexError: A pair is out of range; nothing is copied.
        """
        if not isinstance(src, KVCache):
            raise TypeError(f"[KVCache] src: expected a quire.KVCache, got {type(src).__qualname__}")
        if src.num_layers != self.num_layers:
            raise ValueError(f"[KVCache] src: expected {self.num_layers} layers, got {src.num_layers}")
        swap_blocks(self._blocks(), src._blocks(), pairs, stream=stream)

    def describe(self) -> KVCacheDescription:
        """Where every byte of the pool lies, for those who move it: see :class:`KVCacheDescription`."""
        return KVCacheDescription(
            base=self._pool.data_ptr,
            num_bytes=self._num_bytes,
            device=self.device,
            dtype=self.dtype,
            shape=self._pool.shape,
            strides_bytes=tuple(s * ITEM_BYTES[self.dtype] for s in self._pool.strides),
        )

    def export_blocks(
        self,
        block_ids: Sequence[int],
        *,
        head_start: int = 0,
        total_kv_heads: int | None = None,
        keys: Sequence[int] | None = None,
        device: object = None,
        pinned: bool = False,
        stream: object = None,
    ) -> KVBlocks:
        """Copies blocks of every layer's K and V into one contiguous buffer, with a header that says what it holds.

        Args:
            block_ids: The blocks.
            head_start: The number, in the model, of this cache's first head: where heads are spread over several caches.
            total_kv_heads: Heads of the model; None: this cache's.
            keys: A number below 2**128 for each block that names its contents, as ``BlockAllocator.hash_blocks`` gives them. They
                travel in the header.
            device: Where the buffer is made: "cpu", "cuda:<index>"; None: where the cache is.
            pinned: On the CPU: page-locked memory.
            stream: An int, an object with ``__cuda_stream__``, or None for the current stream. The copy is ordered on it; wait for
                it before the buffer is read elsewhere.

        Returns:
            :class:`KVBlocks`.

        Raises:
            ValueError: The heads do not fit into the model's, or there are more or fewer keys than blocks.
            TypeError: An id, key or number of heads is no integer.
            IndexError: A block is out of range.
            MemoryError: The buffer's memory cannot be had.

        Example:
            >>> import quire
            >>> a, b = (quire.KVCache(2, 8, 16, 4, 64, "bfloat16") for _ in range(2))
            >>> blocks = a.export_blocks([5, 3])
            >>> b.import_blocks(blocks.to_bytes(), [0, 1])
            (0, 4)
        """
        return export_blocks(self, block_ids, head_start, total_kv_heads, keys, device, pinned, stream)

    def import_blocks(
        self,
        blocks: KVBlocks | bytes | bytearray | memoryview | Array,
        block_ids: Sequence[int],
        *,
        head_start: int = 0,
        total_kv_heads: int | None = None,
        stream: object = None,
    ) -> tuple[int, int]:
        """Copies blocks that were exported, here or elsewhere, into this cache: those heads that both have.

        A cache with a part of the heads takes its part of a buffer with all of them, and a cache with all heads is filled by one
        call for each part.

        Args:
            blocks: :class:`KVBlocks`, or a host buffer that ``KVBlocks.to_bytes`` made.
            block_ids: Where each block goes.
            head_start: The number, in the model, of this cache's first head.
            total_kv_heads: Heads of the model; None: this cache's.
            stream: As in :meth:`export_blocks`.

        Returns:
            The heads that were copied, ``(first, behind the last)``, counted in the model.

        Raises:
            ValueError: The buffer is truncated, altered or foreign, of another model or block size, or has none of this cache's
                heads. Nothing was written.
            TypeError: The dtypes differ, or ``blocks`` is no such buffer.
            IndexError: A block is out of range. Nothing was written.
        """
        return import_blocks(self, blocks, block_ids, head_start, total_kv_heads, stream)

    def _blocks(self) -> _core.Tensor:
        """The pool by blocks, ``[num_blocks, 2, num_layers, block_size, num_kv_heads, head_dim]``."""
        return self._pool.transpose(0, 2)

    def __repr__(self) -> str:
        return (
            f"quire.KVCache(num_layers={self.num_layers}, num_blocks={self.num_blocks}, block_size={self.block_size}, "
            f"num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}, dtype={self.dtype!r}, device={self.device!r})"
        )


def _item_bytes(dtype: object) -> int:
    name = dtype_name(dtype)
    if name not in CACHE_DTYPES:
        raise TypeError(f"[KVCache] dtype: expected one of {', '.join(CACHE_DTYPES)}, got {name}")
    return ITEM_BYTES[name]
