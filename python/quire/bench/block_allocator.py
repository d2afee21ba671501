"""Times of the block allocator's calls from Python, single thread.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
from quire.block_allocator import BlockAllocator

__all__ = ["cases"]

Result = tuple[str, float, str]


def _seconds_per_call(call: Callable[[], object], num_calls: int, num_rounds: int = 9) -> float:
    best = float("inf")
    for _ in range(num_rounds):
        start = time.perf_counter()
        for _ in range(num_calls):
            call()
        best = min(best, time.perf_counter() - start)
    return best / num_calls


def allocate_and_free() -> Result:
    """One block, taken and given back."""
    a = BlockAllocator(65536)

    def call() -> None:
        a.free(a.allocate(1))

    seconds = _seconds_per_call(call, 20000)
    return "allocate + free of one block", seconds, f"{1e-6 / seconds:.2f} M/s"


def hash_prompt() -> Result:
    """The hashes of a prompt of 4096 tokens in blocks of 16, and their conversion to ints."""
    a = BlockAllocator(1024)
    prompt = np.arange(4096, dtype=np.int32)
    seconds = _seconds_per_call(lambda: a.hash_blocks(prompt), 200)
    return "hash_blocks, 4096 tokens", seconds, f"{4096e-6 / seconds:.0f} M tokens/s"


def prefix_hit() -> Result:
    """A prompt of 4096 tokens that is cached already: looked up, compared, taken over, given back."""
    a = BlockAllocator(1024)
    prompt = np.arange(4096, dtype=np.int32)
    a.add_sequence(1, prompt)
    a.grow(1, 4096)
    a.commit(1, 4096)

    def call() -> None:
        a.add_sequence(2, prompt)
        a.free_sequence(2)

    seconds = _seconds_per_call(call, 200)
    return "add_sequence + free_sequence, 4096 cached tokens", seconds, f"{4096e-6 / seconds:.0f} M tokens/s"


def decode_step(num_seqs: int = 256, seq_len: int = 1500, max_blocks: int = 128) -> list[Result]:
    """Growing every sequence by one token and filling the four arrays; then committing and appending."""
    a = BlockAllocator(num_seqs * (max_blocks + 1))
    for seq_id in range(num_seqs):
        a.add_sequence(seq_id, np.full(seq_len, seq_id, np.int32))
        a.grow(seq_id, seq_len)
        a.commit(seq_id, seq_len)
    ids = np.arange(num_seqs)
    ones = np.ones(num_seqs, np.int64)
    tokens = np.zeros(num_seqs, np.int32)
    arrays = {
        "block_tables": np.empty((num_seqs, max_blocks), np.int32),
        "slot_mapping": np.empty(num_seqs, np.int64),
        "seq_lens": np.empty(num_seqs, np.int32),
        "query_start_loc": np.empty(num_seqs + 1, np.int32),
    }
    block_size = a.block_size
    grow = rest = float("inf")
    for _ in range(min(20, (max_blocks * block_size - seq_len) // block_size)):
        grown = finished = 0.0
        for _ in range(block_size):  # every sequence takes one block in these
            start = time.perf_counter()
            a.grow_and_write_batch(ids, ones, **arrays)
            middle = time.perf_counter()
            a.commit_batch(ids, ones)
            a.append_token_batch(ids, tokens)
            finished += time.perf_counter() - middle
            grown += middle - start
        grow, rest = min(grow, grown / block_size), min(rest, finished / block_size)
    what = f"{num_seqs} sequences of {seq_len} tokens, {max_blocks} columns"
    return [
        (f"grow_and_write_batch, {what}", grow, f"{grow / num_seqs * 1e9:.0f} ns per sequence"),
        (f"commit_batch + append_token_batch, {what}", rest, f"{rest / num_seqs * 1e9:.0f} ns per sequence"),
    ]


def cases() -> list[Callable[[], Result | list[Result]]]:
    """The benchmarks; each returns (name, seconds per call, figure), or a list of them."""
    return [allocate_and_free, hash_prompt, prefix_hit, decode_step]


if __name__ == "__main__":
    for case in cases():
        outcome = case()
        for name, seconds, figure in outcome if isinstance(outcome, list) else [outcome]:
            print(f"{name:80} {seconds * 1e6:9.2f} us  {figure}")
