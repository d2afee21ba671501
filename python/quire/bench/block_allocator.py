"""Benchmarks of the block allocator, single thread, through its Python bindings.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial

import numpy as np

import quire
from quire.bench.harness import Case, Context, Target, Work

__all__ = ["cases"]

_BLOCK_SIZE = 16


def cases(context: Context) -> Iterator[Case]:
    """The work of one decode step, raw blocks, and the prefix cache. All on the host, whatever the device."""
    num_seqs = 256
    for length, columns in [(500, 64)] if context.quick else [(500, 64), (1500, 128), (3500, 256)]:
        yield Case(
            name=f"grow {num_seqs} sequences of {length} by one token, fill four arrays ({columns} columns)",
            prepare=partial(_decode_step, num_seqs, length, columns, "grow"),
            target=Target(max_us=25.0),
            timer="host",
            op="grow_and_write_batch",
        )
        yield Case(
            name=f"commit and append one token to {num_seqs} sequences of {length}",
            prepare=partial(_decode_step, num_seqs, length, columns, "commit"),
            timer="host",
            op="commit_batch",
        )
    yield Case(
        name="allocate(64) + free, for each block",
        prepare=partial(_allocate_free, 64),
        target=Target(max_us=0.1),
        num_items=64,
        timer="host",
        op="allocate",
    )
    yield Case(
        name="allocate(1) + free, two calls from Python",
        prepare=partial(_allocate_free, 1),
        timer="host",
        op="allocate",
    )
    yield Case(
        name="hash_blocks of 4096 tokens, block size 16",
        prepare=_hash_blocks,
        target=Target(max_us=60.0),
        timer="host",
        op="hash_blocks",
    )
    yield Case(
        name="add_sequence + free_sequence of 4096 tokens, all cached",
        prepare=partial(_add_free, None),
        timer="host",
        op="add_sequence",
    )
    yield Case(
        name="add_sequence + free_sequence of 4096 tokens, none cached",
        prepare=partial(_add_free, "other"),
        timer="host",
        op="add_sequence",
    )


def _decode_step(num_seqs: int, length: int, columns: int, part: str) -> Work:
    allocator = quire.BlockAllocator(num_seqs * (columns + 1), _BLOCK_SIZE)
    ids = np.arange(1000, 1000 + num_seqs, dtype=np.int64)
    for seq_id in ids.tolist():
        # Different contents, so that nothing is shared.
        allocator.add_sequence(seq_id, np.full(length, seq_id, np.int32))
        allocator.grow(seq_id, length)
        allocator.commit(seq_id, length)
    ones, tokens = np.ones(num_seqs, np.int64), np.full(num_seqs, 5, np.int32)
    tables = np.zeros((num_seqs, columns), np.int32)
    slots = np.zeros(num_seqs, np.int64)
    seq_lens, starts = np.zeros(num_seqs, np.int32), np.zeros(num_seqs + 1, np.int32)
    clock = time.perf_counter
    current = length

    def sixteen_steps() -> float:
        """Seconds of a step; in sixteen of them each sequence takes one new block."""
        nonlocal current
        if current + _BLOCK_SIZE > columns * _BLOCK_SIZE:
            for seq_id in ids.tolist():
                allocator.truncate(seq_id, length)
            current = length
        grown = committed = 0.0
        for _ in range(_BLOCK_SIZE):
            start = clock()
            allocator.grow_and_write_batch(
                ids, ones, block_tables=tables, slot_mapping=slots, seq_lens=seq_lens, query_start_loc=starts
            )
            middle = clock()
            allocator.commit_batch(ids, ones)
            allocator.append_token_batch(ids, tokens)
            committed += clock() - middle
            grown += middle - start
        current += _BLOCK_SIZE
        return (grown if part == "grow" else committed) / _BLOCK_SIZE

    return Work(sixteen_steps, is_round=True)


def _allocate_free(count: int) -> Work:
    allocator = quire.BlockAllocator(65536, _BLOCK_SIZE)
    return Work(lambda: allocator.free(allocator.allocate(count)))


def _hash_blocks() -> Work:
    allocator = quire.BlockAllocator(65536, _BLOCK_SIZE)
    prompt = np.arange(4096, dtype=np.int32)
    return Work(partial(allocator.hash_blocks, prompt))


def _add_free(salt: str | None) -> Work:
    allocator = quire.BlockAllocator(65536, _BLOCK_SIZE)
    prompt = np.arange(4096, dtype=np.int32)
    allocator.add_sequence(1, prompt)
    allocator.grow(1, 4096)
    allocator.commit(1, 4096)

    def run() -> None:
        allocator.add_sequence(2, prompt, salt=salt)
        allocator.free_sequence(2)

    return Work(run)
