"""What jax.vmap makes of quire's ops: a batch becomes more rows, tokens, sequences or blocks of one call.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp

from quire.jax._call import Array, Op, Rule, Value, call, fail_batched

#: More than this outside of a range is not told apart.
_FAR = 1 << 20


def refuse_batched(op: Op, batched: list[bool], shared: Sequence[int]) -> None:
    """Refuses a batch of an operand that all of a call's rows share."""
    for i in shared:
        if batched[i]:
            fail_batched(op.shown, op.operands[i])


def fold(size: int, is_batched: bool, x: Array | None) -> Array | None:
    """``[batch * n, ...]`` of a batch of ``[n, ...]``; what is not batched is repeated."""
    if x is None:
        return None
    if not is_batched:
        x = jnp.broadcast_to(x[None], (size, *x.shape))
    return x.reshape((size * x.shape[1], *x.shape[2:]))


def unfold(size: int, x: Array) -> Array:
    """The reverse of :func:`fold`."""
    return x.reshape((size, x.shape[0] // size, *x.shape[1:]))


def rows(x_operands: Sequence[int]) -> Rule:
    """The rule of an op over rows ``[..., hidden]``: ``x_operands`` have rows, the others are shared."""

    def rule(
        op: Op, size: int, batched: list[bool], operands: list[Array], attributes: dict[str, Value]
    ) -> list[Array]:
        refuse_batched(op, batched, [i for i in range(len(operands)) if i not in x_operands])
        shape: tuple[int, ...] = ()
        for i in x_operands:
            x: Array = operands[i]
            x = x if batched[i] else jnp.broadcast_to(x[None], (size, *x.shape))
            shape = x.shape
            operands[i] = x.reshape((-1, x.shape[-1])) if x.size else x.reshape((0, x.shape[-1]))
        return [result.reshape((*shape[:-1], result.shape[-1])) for result in call(op, operands, attributes)]

    return rule


def tokens(token_operands: Sequence[int]) -> Rule:
    """The rule of an op over independent tokens: ``token_operands`` begin with them, the others are shared."""

    def rule(
        op: Op, size: int, batched: list[bool], operands: list[Array], attributes: dict[str, Value]
    ) -> list[Array]:
        refuse_batched(op, batched, [i for i in range(len(operands)) if i not in token_operands])
        for i in token_operands:
            operands[i] = fold(size, batched[i], operands[i])
        return [unfold(size, result) for result in call(op, operands, attributes)]

    return rule


def shift(size: int, is_batched: bool, indices: Array, step: int, limit: int) -> Array:
    """Indices into ``limit`` things of each batch element, as indices into all of them; others become -1 or stay out of range."""
    wide = indices if is_batched else jnp.broadcast_to(indices[None], (size, *indices.shape))
    offset = (jnp.arange(size, dtype=wide.dtype) * step).reshape((size, *(1,) * (wide.ndim - 1)))
    outside = jnp.where(wide == -1, -1, size * limit).astype(wide.dtype)
    return jnp.where((wide >= 0) & (wide < limit), wide + offset, outside)


def caches(
    cache_operands: Sequence[int], index_operand: int, token_operands: Sequence[int], written: bool
) -> Rule:
    """The rule of an op on caches: a batch of caches becomes one with all their blocks.

    ``index_operand`` holds slots ``[num_tokens]``, or pairs of blocks ``[num_pairs, 2]``. Caches that are ``written`` must be batched: each
    batch element writes its own.
    """

    def rule(
        op: Op, size: int, batched: list[bool], operands: list[Array], attributes: dict[str, Value]
    ) -> list[Array]:
        any_cache = any(batched[i] for i in cache_operands)
        others = (*cache_operands, index_operand, *token_operands)
        refuse_batched(op, batched, [i for i in range(len(operands)) if i not in others])
        if written and not all(batched[i] for i in cache_operands):
            name = op.operands[next(i for i in cache_operands if not batched[i])]
            raise ValueError(
                f"[{op.name}] {name}: expected a batched cache under jax.vmap, since each batch element writes its own, got one that "
                "is shared; put the batch into the tokens instead"
            )
        indices: Array = operands[index_operand]
        if any_cache:
            cache: Array = operands[cache_operands[0]]
            num_blocks, block_size = cache.shape[int(batched[cache_operands[0]]) :][:2]
            step = num_blocks if op.name == "copy_blocks" else num_blocks * block_size
            indices = shift(size, batched[index_operand], indices, step, step)
            batched = [flag or i == index_operand for i, flag in enumerate(batched)]
            for i in cache_operands:
                operands[i] = fold(size, batched[i], operands[i])
        operands[index_operand] = fold(size, batched[index_operand], indices)
        for i in token_operands:
            operands[i] = fold(size, batched[i], operands[i])
        return [unfold(size, result) for result in call(op, operands, attributes)]

    return rule


def start_loc(size: int, is_batched: bool, loc: Array, num_tokens: int) -> Array:
    """The ``query_start_loc`` of a batch's sequences, folded: behind each element's own, a sequence without keys takes the rest.

    An entry outside of its own element's tokens would reach into another's. It is clamped here, as the op clamps, and told to the op by the
    last entry: this lies as far behind the end as the worst of them was outside, and takes nothing with it.
    """
    wide = loc if is_batched else jnp.broadcast_to(loc[None], (size, *loc.shape))
    offset = jnp.arange(size, dtype=wide.dtype)[:, None] * num_tokens
    starts = (jnp.clip(wide, 0, num_tokens) + offset).reshape(-1)
    near = jnp.clip(wide, -_FAR, num_tokens + _FAR)
    outside = jnp.maximum(jnp.maximum(near - num_tokens, -near), 0).max(initial=0)
    return jnp.append(starts, (size * num_tokens + outside).astype(wide.dtype))


def pad_sequences(size: int, is_batched: bool, x: Array, value: int) -> Array:
    """``x`` with one more sequence for each batch element, folded."""
    wide = x if is_batched else jnp.broadcast_to(x[None], (size, *x.shape))
    widths = [(0, 0), (0, 1)] + [(0, 0)] * (wide.ndim - 2)
    wide = jnp.pad(wide, widths, constant_values=value)
    return wide.reshape((-1, *wide.shape[2:]))


def paged(first: int) -> Rule:
    """The rule of attention over paged caches; ``first`` is the operand block_tables."""

    def rule(
        op: Op, size: int, batched: list[bool], operands: list[Array], attributes: dict[str, Value]
    ) -> list[Array]:
        q, tables, lens, loc, mask, mask_start = 0, first, first + 1, first + 2, first + 8, first + 9
        folded = (q, 1, 2, tables, lens, loc, mask, mask_start)
        refuse_batched(op, batched, [i for i in range(len(operands)) if i not in folded])
        if batched[1] or batched[2]:
            if first != 3:  # a prefix is of one cache
                refuse_batched(op, batched, (1, 2))
            cache: Array = operands[1]
            num_blocks = cache.shape[int(batched[1])]
            operands[tables] = shift(size, batched[tables], operands[tables], num_blocks, num_blocks)
            batched = [flag or i == tables for i, flag in enumerate(batched)]
            operands[1], operands[2] = (fold(size, batched[i], operands[i]) for i in (1, 2))
        query: Array = operands[q]
        num_tokens = query.shape[int(batched[q])]
        if operands[loc] is None:
            for i in (tables, lens, mask_start):
                operands[i] = fold(size, batched[i], operands[i])
        else:
            operands[loc] = start_loc(size, batched[loc], operands[loc], num_tokens)
            operands[tables] = pad_sequences(size, batched[tables], operands[tables], -1)
            operands[lens] = pad_sequences(size, batched[lens], operands[lens], 0)
            if operands[mask_start] is not None:
                operands[mask_start] = pad_sequences(size, batched[mask_start], operands[mask_start], 0)
        operands[q], operands[mask] = (fold(size, batched[i], operands[i]) for i in (q, mask))
        return [unfold(size, result) for result in call(op, operands, attributes)]

    return rule


def ragged() -> Rule:
    """The rule of attention over ragged keys."""

    def rule(
        op: Op, size: int, batched: list[bool], operands: list[Array], attributes: dict[str, Value]
    ) -> list[Array]:
        q, k, v, loc, kv_loc, mask, mask_start = 0, 1, 2, 3, 4, 10, 11
        refuse_batched(op, batched, [i for i in range(len(operands)) if 5 <= i <= 9])
        query: Array = operands[q]
        key: Array = operands[k]
        num_tokens, num_keys = query.shape[int(batched[q])], key.shape[int(batched[k])]
        if operands[loc] is None:
            operands[loc] = jnp.arange(size + 1, dtype=jnp.int32) * num_tokens
            operands[kv_loc] = jnp.arange(size + 1, dtype=jnp.int32) * num_keys
            operands[mask_start] = fold(size, batched[mask_start], operands[mask_start])
        else:
            keys_from = loc if operands[kv_loc] is None else kv_loc
            operands[kv_loc] = start_loc(size, batched[keys_from], operands[keys_from], num_keys)
            operands[loc] = start_loc(size, batched[loc], operands[loc], num_tokens)
            if operands[mask_start] is not None:
                operands[mask_start] = pad_sequences(size, batched[mask_start], operands[mask_start], 0)
        for i in (q, k, v, mask):
            operands[i] = fold(size, batched[i], operands[i])
        return [unfold(size, result) for result in call(op, operands, attributes)]

    return rule
