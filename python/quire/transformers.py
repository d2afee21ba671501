"""Attention for transformers: importing this module makes ``attn_implementation="quire"`` known to Hugging Face transformers.

SPDX-License-Identifier: Apache-2.0

The keys and values of transformers' own cache, ``[batch, num_kv_heads, num_keys, head_dim]``, are read where they are, as a paged
cache with one block for each sequence. Causal and sliding-window masks are computed by the kernel; any other (padding, packed
sequences, chunks, prefixes that see both ways) is handed over as bits.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import prepare_padding_mask, sdpa_mask

import quire.torch
from quire import _core
from quire.torch._operators import is_traced

__all__ = ["attention_forward", "attention_mask"]


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    *,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    config: Any = None,
    **kwargs: Any,
) -> torch.Tensor | None:
    """The mask that transformers hands to :func:`attention_forward`: None where causality and the layer's window say everything.

    Returns:
        None, or bool ``[batch_size, 1, q_length, kv_length]``.
    """
    padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    # A window is the layer's own argument; a chunk of the same name is not.
    is_plain = local_size is None or local_size == getattr(config, "sliding_window", None)
    ends_together = q_offset + q_length == kv_offset + kv_length
    unpadded = padding is None or (not torch.compiler.is_compiling() and bool(padding.all()))
    if allow_is_causal_skip and is_plain and ends_together and unpadded:
        return None
    mask: torch.Tensor | None = sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=False,
        allow_is_bidirectional_skip=allow_is_bidirectional_skip,
        **kwargs,
    )
    return mask


def _pack(mask: torch.Tensor) -> torch.Tensor:
    """uint8 ``[batch * q_length, mask_bytes]`` of bool ``[batch, 1, q_length, kv_length]``."""
    if mask.shape[1] != 1 or mask.dtype is not torch.bool:
        raise ValueError(
            f"[quire.transformers] attention_mask: expected bool [batch, 1, q_length, kv_length], got {mask.dtype} {list(mask.shape)}"
        )
    rows = mask.reshape(-1, mask.shape[-1])
    rows = torch.nn.functional.pad(rows, (0, -rows.shape[1] % 8))
    # Made on the device: a copy from the host would wait for it.
    places = torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (rows.view(rows.shape[0], -1, 8).to(torch.uint8) << places).sum(-1, dtype=torch.uint8)


def _make_indices(
    batch: int, q_length: int, kv_length: int, device: torch.device, stream: object = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """block_tables, seq_lens and query_start_loc of sequences with one block each, all of one length."""
    sequences = torch.arange(batch + 1, dtype=torch.int32, device=device)
    lens = torch.full((batch,), kv_length, dtype=torch.int32, device=device)
    return sequences[:batch, None], lens, None if q_length == 1 else sequences * q_length


_known_indices = functools.lru_cache(maxsize=16)(_make_indices)


def _make_mask(mask: torch.Tensor, kv_length: int, stream: object) -> tuple[torch.Tensor, torch.Tensor]:
    """mask and mask_start of :func:`quire.paged_attention`."""
    start = torch.zeros(mask.shape[0], dtype=torch.int32, device=mask.device)
    return _pack(mask[..., :kv_length]), start


class _LastMask:
    """The bits of the mask that was packed last: a step's layers have one."""

    _last: tuple[weakref.ref[torch.Tensor], tuple[object, ...], tuple[torch.Tensor, torch.Tensor]] | None = (
        None
    )

    def get(
        self, mask: torch.Tensor, kv_length: int, stream: object, *, fresh: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``fresh``: a step begins. Not all that writes to a mask, such as a graph's replay, changes its version."""
        if mask.is_inference():  # which has no version at all
            return _make_mask(mask, kv_length, stream)
        key, last = (mask._version, kv_length, stream), self._last
        if not fresh and last is not None and last[0]() is mask and last[1] == key:
            return last[2]
        bits = _make_mask(mask, kv_length, stream)
        self._last = weakref.ref(mask), key, bits
        return bits


_last_mask = _LastMask()


def _stream_of_device(index: int) -> int:
    return torch.cuda.current_stream(index).cuda_stream


# The handle without an object around it, which takes 4 µs to make; what torch.compile's own code calls.
_raw_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", _stream_of_device)


def _sharing(query: torch.Tensor) -> tuple[bool, object]:
    """Whether the layers of a step may share what the first of them makes, and the stream that orders it.

    In a trace, and where tensors are fake, what is made belongs to that; in a capture to the graph.
    """
    if is_traced(query):
        return False, None
    if not query.is_cuda:
        return True, None
    if torch.cuda.is_current_stream_capturing():
        return False, None
    return True, _raw_stream(query.get_device())


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention in the form in which transformers' models call it.

    Args:
        module: The attention layer.
        query: ``[batch, num_heads, q_length, head_dim]``, any strides with a unit inner one.
        key: ``[batch, num_kv_heads, kv_length, head_dim]``, likewise.
        value: As ``key``; its head_dim may be smaller.
        attention_mask: None, or bool ``[batch, 1, q_length, kv_length]``.
        scaling: Default ``1 / sqrt(head_dim)``.
        dropout: 0: there is none here.
        is_causal: None: the module's.
        sliding_window: Keys that a query sees, its own included.
        softcap: None for none.
        s_aux: Attention sinks ``[num_heads]``.
        kwargs: What other implementations take.

    Returns:
        ``[batch, q_length, num_heads, head_dim]``, and None for the weights, which are never made.

    Raises:
        quire.UnsupportedError: Dropout, a bias of positions, or values wider than keys.
    """
    if dropout:
        raise quire.UnsupportedError(
            f"[quire.transformers] dropout: expected 0 (quire is for inference), got {dropout}"
        )
    if kwargs.get("position_bias") is not None:
        raise quire.UnsupportedError("[quire.transformers] position_bias: expected none, got one")
    batch, num_heads, q_length, head_dim = query.shape
    kv_length, value_dim = key.shape[2], value.shape[3]
    if value_dim != head_dim:
        if value_dim > head_dim:
            raise quire.UnsupportedError(
                f"[quire.transformers] value: expected a head_dim of at most the keys' {head_dim}, got {value_dim}"
            )
        value = torch.nn.functional.pad(value, (0, head_dim - value_dim))
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    # quire counts the keys before the query's own.
    window = None if sliding_window is None else sliding_window - 1
    mask = mask_start = None
    shared, stream = _sharing(query)
    if attention_mask is not None:
        # A module that is in no stack of layers shares nothing.
        fresh = getattr(module, "layer_idx", None) in (0, None)
        make_mask = functools.partial(_last_mask.get, fresh=fresh) if shared else _make_mask
        mask, mask_start = make_mask(attention_mask, kv_length, stream)
        causal, window = False, None
    make_indices = _known_indices if shared else _make_indices
    tables, lens, starts = make_indices(batch, q_length, kv_length, query.device, stream)
    sinks = None if s_aux is None else s_aux.detach().float()
    limits = window if causal or window is None else (window, window)
    # In torch.autocast, float32 may become another dtype.
    converts = query.dtype is torch.float32 and torch.is_autocast_enabled(query.device.type)
    if shared and q_length == 1 and not converts:
        # A view in PyTorch is a microsecond of each layer's and token's.
        out = query.new_empty((batch, 1, num_heads, head_dim))
        _core.decode_by_heads(
            out,
            query,
            key,
            value,
            tables,
            lens,
            scaling,
            bool(causal),
            limits,
            softcap,
            sinks,
            mask,
            mask_start,
        )
        return (out if value_dim == head_dim else out[..., :value_dim]), None
    q = query.transpose(1, 2).reshape(batch * q_length, num_heads, head_dim)
    space = None if converts else torch.empty_like(q, memory_format=torch.contiguous_format)
    out = quire.torch.paged_attention(
        q,
        key.transpose(1, 2),  # one block of kv_length slots for each sequence
        value.transpose(1, 2),
        tables,
        lens,
        query_start_loc=starts,
        scale=scaling,
        causal=bool(causal),
        window=limits,
        softcap=softcap,
        sinks=sinks,
        mask=mask,
        mask_start=mask_start,
        out=space,
    ).view(batch, q_length, num_heads, head_dim)
    return (out if value_dim == head_dim else out[..., :value_dim]), None


AttentionInterface.register("quire", attention_forward)
AttentionMaskInterface.register("quire", attention_mask)
