"""How much of a KV pool holds tokens: contiguous reservations against blocks, on one stream of requests.

The set-up is that of section 6.1 of "Efficient Memory Management for Large Language Model Serving with PagedAttention"
(Kwon et al., 2023): a contiguous system must reserve a sequence's whole room at its start, from a buddy allocator, for the
longest sequence possible ("max"), for its output's length rounded up to a power of two ("pow2"), or for exactly its
length, which no system knows ("oracle"). Requests wait in line and start when their room is there; each running sequence
gets one token in each step. What is counted are the slots of the pool, averaged over the steps in which somebody waits.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from dataclasses import dataclass

import numpy as np

import quire

__all__ = ["BuddyPool", "PagedPool", "Pool", "Request", "Shares", "draw_requests", "simulate"]


@dataclass
class Request:
    """A sequence: its lengths, and how far it is."""

    seq_id: int
    prompt: int
    output: int
    length: int = 0  # tokens written, 0 before the first start

    @property
    def final(self) -> int:
        """Tokens at its end."""
        return self.prompt + self.output


def draw_requests(count: int, max_length: int, seed: int = 0) -> list[Request]:
    """Log-normal lengths with the means of ShareGPT's conversations: 161 tokens of prompt, 338 of output."""
    rng = np.random.default_rng(seed)

    def lengths(mean: float) -> list[int]:
        sigma = 1.0
        drawn = rng.lognormal(np.log(mean) - sigma**2 / 2, sigma, count)
        return [int(x) for x in np.clip(np.rint(drawn), 1, max_length // 2)]

    return [Request(i, *pair) for i, pair in enumerate(zip(lengths(161.0), lengths(338.0)))]


class Pool(ABC):
    """Who gets which slots."""

    @abstractmethod
    def start(self, request: Request) -> bool:
        """Takes what a request needs to start, or answers False."""

    @abstractmethod
    def grow(self, request: Request) -> bool:
        """Makes room for one more token, or answers False."""

    @abstractmethod
    def stop(self, request: Request, finished: bool) -> None:
        """Gives everything back; unfinished, the request starts again later with the tokens that it has."""

    @abstractmethod
    def allocated(self, request: Request) -> int:
        """Slots that are the request's."""


class BuddyPool(Pool):
    """Contiguous ranges of powers of two, merged again when both halves are free."""

    def __init__(self, num_slots: int, max_length: int, reserve: str) -> None:
        """``num_slots`` is a multiple of ``max_length``, a power of two; ``reserve`` is "max", "pow2" or "oracle"."""
        self._max_length = max_length
        self._reserve = reserve
        self._free: dict[int, set[int]] = {max_length >> i: set() for i in range(max_length.bit_length())}
        self._free[max_length] = set(range(0, num_slots, max_length))
        self._held: dict[int, tuple[int, int]] = {}  # seq_id -> (start, size)

    def _room(self, request: Request) -> int:
        if self._reserve == "max":
            return self._max_length
        if self._reserve == "oracle":
            return request.final
        return min(self._max_length, request.prompt + _power_of_two(request.output))

    def start(self, request: Request) -> bool:
        """Takes the whole range."""
        size = _power_of_two(self._room(request))
        # The smallest free range that is large enough, halved until it fits.
        larger = size
        while larger <= self._max_length and not self._free[larger]:
            larger *= 2
        if larger > self._max_length:
            return False
        start = min(self._free[larger])
        self._free[larger].remove(start)
        while larger > size:
            larger //= 2
            self._free[larger].add(start + larger)
        self._held[request.seq_id] = (start, size)
        return True

    def grow(self, request: Request) -> bool:
        """Nothing to do: the room was reserved."""
        return True

    def stop(self, request: Request, finished: bool) -> None:
        """Frees the range."""
        start, size = self._held.pop(request.seq_id)
        while size < self._max_length and start ^ size in self._free[size]:
            self._free[size].remove(start ^ size)
            start &= ~size
            size *= 2
        self._free[size].add(start)

    def allocated(self, request: Request) -> int:
        """The range's size."""
        return self._held[request.seq_id][1]


class PagedPool(Pool):
    """Blocks from quire's allocator, one when a sequence needs it. Prefix caching is off: nothing is shared."""

    def __init__(self, num_slots: int, block_size: int) -> None:
        """``num_slots`` is a multiple of ``block_size``."""
        self.allocator = quire.BlockAllocator(num_slots // block_size, block_size, enable_prefix_cache=False)

    def start(self, request: Request) -> bool:
        """Takes blocks for the tokens known; 1 % of all are kept back for those that run."""
        allocator, seq_id = self.allocator, request.seq_id
        known = max(request.prompt, request.length)
        if seq_id not in allocator:
            allocator.add_sequence(seq_id, [0] * known)
        if not allocator.can_grow(seq_id, known, keep_watermark=True):
            return False
        allocator.grow(seq_id, known)
        allocator.commit(seq_id, known)
        return True

    def grow(self, request: Request) -> bool:
        """Takes a block where the last one is full."""
        try:
            self.allocator.grow(request.seq_id, 1)
        except quire.OutOfBlocksError:
            return False
        self.allocator.append_tokens(request.seq_id, (0,))
        self.allocator.commit(request.seq_id, 1)
        return True

    def stop(self, request: Request, finished: bool) -> None:
        """Frees the blocks."""
        if finished:
            self.allocator.free_sequence(request.seq_id)
        else:
            self.allocator.preempt(request.seq_id)

    def allocated(self, request: Request) -> int:
        """Slots of its blocks."""
        return len(self.allocator.block_table(request.seq_id)) * self.allocator.block_size


@dataclass(frozen=True)
class Shares:
    """Mean shares of the pool's slots, in percent, and the mean batch."""

    tokens: float
    reserved: float
    fragments: float
    free: float
    num_running: float
    num_preempted: int


def simulate(pool: Pool, num_slots: int, requests: list[Request]) -> Shares:
    """Runs the requests through a pool; counts while at least one waits, after the first tenth has finished."""
    waiting = deque(Request(r.seq_id, r.prompt, r.output) for r in requests)
    running: list[Request] = []
    totals = np.zeros(5)
    num_steps = num_finished = num_preempted = 0
    while waiting:
        while waiting and pool.start(waiting[0]):
            request = waiting.popleft()
            request.length = max(request.length, request.prompt)
            running.append(request)
        if waiting and num_finished >= len(requests) // 10:
            allocated = sum(pool.allocated(r) for r in running)
            tokens = sum(r.length for r in running)
            reserved = sum(min(pool.allocated(r), r.final) - r.length for r in running)
            totals += (tokens, reserved, allocated - tokens - reserved, num_slots - allocated, len(running))
            num_steps += 1
        step, running = running, []
        while step:
            request = step.pop(0)
            # The youngest makes way for the oldest.
            while not pool.grow(request):
                victim = step.pop() if step else request
                pool.stop(victim, finished=False)
                waiting.appendleft(victim)
                num_preempted += 1
                if victim is request:
                    break
            else:
                request.length += 1
                if request.length < request.final:
                    running.append(request)
                else:
                    pool.stop(request, finished=True)
                    num_finished += 1
    if num_steps == 0:
        raise ValueError("the pool held all requests at once: nothing to count")
    means = totals / num_steps
    tokens, reserved, fragments, free = (means[:4] * (100.0 / num_slots)).tolist()
    return Shares(tokens, reserved, fragments, free, float(means[4]), num_preempted)


def _power_of_two(x: int) -> int:
    """The smallest power of two that is at least x."""
    return 1 << (x - 1).bit_length()
