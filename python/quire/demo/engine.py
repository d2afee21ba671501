"""Continuous batching: a scheduler over quire.BlockAllocator that runs one mixed batch per step.

SPDX-License-Identifier: Apache-2.0

Each step serves the running sequences first (a token each, or the next chunk of a prompt), then admits
waiting ones while the token budget, the seats and the blocks last. When a running sequence finds no block,
the youngest one gives all of its blocks up and waits to be recomputed; what of them is still in the prefix
cache by then is not computed again.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

import quire
from quire.demo import DemoError
from quire.demo.backend import Array
from quire.demo.cache import PagedCache
from quire.demo.graphs import DecodeGraphs
from quire.demo.model import Batch, Model
from quire.demo.sampling import SamplingParams, sample

FinishReason = Literal["stop", "length"]


@dataclass
class Request:
    """One sequence: its prompt, what was generated after it, and how far the cache has it."""

    request_id: int
    prompt_len: int
    token_ids: list[int]
    params: SamplingParams
    num_computed: int = 0  # tokens whose keys and values are in the cache
    is_known: bool = False  # whether the allocator has the sequence
    finish_reason: FinishReason | None = None

    @property
    def output_ids(self) -> list[int]:
        """The generated tokens."""
        return self.token_ids[self.prompt_len :]


@dataclass(frozen=True)
class Output:
    """One token of one request, and, with its last one, why it ended."""

    request_id: int
    token_id: int
    finish_reason: FinishReason | None


@dataclass
class EngineStats:
    """A snapshot for display; the counters run from the engine's start."""

    num_running: int
    num_waiting: int
    num_live_blocks: int
    num_cached_blocks: int
    num_free_blocks: int
    num_generated_tokens: int
    num_prompt_tokens: int  # of admitted requests, again after each preemption
    num_hit_tokens: int  # of these, found in the prefix cache
    num_preemptions: int


@dataclass
class _BatchArrays:
    """Host arrays that the allocator fills, made once for the largest batch."""

    block_tables: np.ndarray
    slot_mapping: np.ndarray
    seq_lens: np.ndarray
    query_start_loc: np.ndarray
    positions: np.ndarray = field(repr=False)


class Engine:
    """Generates text for many requests at once.

    num_blocks, block_size: the KV cache. max_batch_tokens: tokens computed per step at most, the budget that
    splits long prompts into chunks. max_num_seqs: sequences that run at once at most. kv_dtype: a key of
    cache.KV_DTYPES, by default the model's dtype; a quantized cache is calibrated on the prompts that wait at
    the first step. cuda_graphs: on a GPU, steps that decode one token of each sequence replay a CUDA graph.
    """

    def __init__(
        self,
        model: Model,
        *,
        num_blocks: int,
        block_size: int = 16,
        max_batch_tokens: int = 512,
        max_num_seqs: int = 32,
        kv_dtype: str | None = None,
        prefix_cache: bool = True,
        cuda_graphs: bool = True,
    ) -> None:
        """Allocates the cache and the batch's host arrays; raises DemoError where the cache does not fit."""
        self.model = model
        self.block_size, self.num_blocks = block_size, num_blocks
        self.max_batch_tokens, self.max_num_seqs = max_batch_tokens, max_num_seqs
        self.cache = PagedCache(model, num_blocks, block_size, kv_dtype or model.dtype)
        self.allocator = quire.BlockAllocator(num_blocks, block_size, enable_prefix_cache=prefix_cache)
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # in order of admission: the last one is preempted first
        max_blocks_per_seq = min(num_blocks, -(-model.config.max_position // block_size))
        self._arrays = _BatchArrays(
            block_tables=np.empty((max_num_seqs, max_blocks_per_seq), np.int32),
            slot_mapping=np.empty(max_batch_tokens, np.int64),
            seq_lens=np.empty(max_num_seqs, np.int32),
            query_start_loc=np.empty(max_num_seqs + 1, np.int32),
            positions=np.empty(max_batch_tokens, np.int64),
        )
        self.graphs: DecodeGraphs | None = None
        if cuda_graphs and DecodeGraphs.fit(model):
            self.graphs = DecodeGraphs(model, self.cache, max_num_seqs, max_blocks_per_seq)
        # With a window in every layer, blocks that all windows have left behind can be given back early.
        windows = model.config.windows
        self._window = max(w for w in windows if w is not None) if None not in windows else None
        self._is_calibrated = False
        self._next_id = 0
        self._num_generated = self._num_prompt = self._num_hit = self._num_preemptions = 0

    def add_request(self, prompt_ids: list[int], params: SamplingParams) -> int:
        """Queues a prompt and returns its id. Raises DemoError if it could never run here."""
        num_tokens = len(prompt_ids) + params.max_tokens
        limit, room = self.model.config.max_position, self.num_blocks * self.block_size
        if not prompt_ids:
            raise DemoError("a prompt has no tokens")
        if not all(0 <= i < self.model.config.vocab_size for i in prompt_ids):
            raise DemoError("the tokenizer gives token ids that the model does not have")
        if num_tokens > limit:
            raise DemoError(
                f"prompt too long: {len(prompt_ids)} tokens and {params.max_tokens} to generate exceed "
                f"the model's {limit} positions"
            )
        if num_tokens - 1 > room:  # the last token's keys and values are never needed
            needed = -(-(num_tokens - 1) // self.block_size)
            raise DemoError(
                f"KV cache too small: {len(prompt_ids)} tokens and {params.max_tokens} to generate need "
                f"{needed} blocks of {self.block_size}, the cache has {self.num_blocks}"
            )
        request = Request(self._next_id, len(prompt_ids), list(prompt_ids), params)
        self._next_id += 1
        self.waiting.append(request)
        return request.request_id

    @property
    def has_work(self) -> bool:
        """Whether any request is not finished."""
        return bool(self.waiting or self.running)

    def stats(self) -> EngineStats:
        """What the live line shows."""
        blocks = self.allocator.stats()
        return EngineStats(
            num_running=len(self.running),
            num_waiting=len(self.waiting),
            num_live_blocks=blocks.num_live,
            num_cached_blocks=blocks.num_cached,
            num_free_blocks=blocks.num_free,
            num_generated_tokens=self._num_generated,
            num_prompt_tokens=self._num_prompt,
            num_hit_tokens=self._num_hit,
            num_preemptions=self._num_preemptions,
        )

    def step(self) -> list[Output]:
        """Schedules and runs one batch, and returns the tokens that it produced."""
        if not self._is_calibrated:
            self.cache.calibrate(self.model, [request.token_ids for request in self.waiting])
            self._is_calibrated = True
        scheduled = self._schedule()
        if not scheduled:
            return []
        # A request whose last known token was computed gets its next one; others were in the middle of their
        # prompt.
        due = [r for r, count in scheduled if r.num_computed + count == len(r.token_ids)]
        is_decode = len(due) == len(scheduled) and all(count == 1 for _, count in scheduled)
        max_blocks = self._fill_arrays(scheduled)
        if is_decode and self.graphs is not None:
            logits = self._replay(due, max_blocks)
        else:
            logits = self.model(self._build_batch(scheduled, max_blocks, is_decode), self.cache)
        tokens = sample(logits, [r.params for r in due], [len(r.output_ids) for r in due], self.model.backend)
        for request, count in scheduled:
            request.num_computed += count
            self.allocator.commit(request.request_id, count)
            if self._window is not None:
                self.allocator.release_out_of_window(request.request_id, self._window)
        return [self._accept(request, int(token)) for request, token in zip(due, tokens, strict=True)]

    def _accept(self, request: Request, token_id: int) -> Output:
        """Appends a token to its request and ends the request if it was the last."""
        request.token_ids.append(token_id)
        self.allocator.append_tokens(request.request_id, [token_id])
        self._num_generated += 1
        if token_id in request.params.stop_token_ids:
            request.finish_reason = "stop"
        elif len(request.output_ids) >= request.params.max_tokens:
            request.finish_reason = "length"
        if request.finish_reason is not None:
            self.running.remove(request)
            self.allocator.free_sequence(request.request_id)  # its full blocks stay in the prefix cache
        return Output(request.request_id, token_id, request.finish_reason)

    def _schedule(self) -> list[tuple[Request, int]]:
        """Chooses the step's requests with the number of tokens of each, and makes room for them."""
        budget = self.max_batch_tokens
        scheduled: list[tuple[Request, int]] = []
        preempted = False
        for request in list(self.running):
            if request not in self.running or budget == 0:
                break  # it and all after it were preempted, or the budget is used up
            count = min(len(request.token_ids) - request.num_computed, budget)
            while request in self.running and not self.allocator.can_grow(request.request_id, count):
                self._preempt_youngest()
                preempted = True
            if request in self.running:
                self._grow(request, count)
                scheduled.append((request, count))
                budget -= count
        while self.waiting and not preempted and budget > 0 and len(self.running) < self.max_num_seqs:
            request = self.waiting[0]
            if not self._admit(request):
                break
            self.running.append(self.waiting.popleft())
            count = min(len(request.token_ids) - request.num_computed, budget)
            self._grow(request, count)
            scheduled.append((request, count))
            budget -= count
        return scheduled

    def _admit(self, request: Request) -> bool:
        """Takes over what the prefix cache has of a request, if there is room for the rest of its tokens."""
        if request.is_known:
            hits = self.allocator.match_prefix(request.request_id)
        else:
            hits = self.allocator.add_sequence(request.request_id, request.token_ids)
            request.is_known = True
        rest = len(request.token_ids) - hits
        # Beside others, a newcomer leaves the watermark's blocks for them to grow into.
        if not self.allocator.can_grow(request.request_id, rest, keep_watermark=bool(self.running)):
            self.allocator.preempt(request.request_id)
            return False
        request.num_computed = hits
        self._num_prompt += len(request.token_ids)
        self._num_hit += hits
        return True

    def _preempt_youngest(self) -> None:
        """Sends the request that was admitted last back to the head of the queue, without its blocks."""
        request = self.running.pop()
        self.allocator.preempt(request.request_id)
        request.num_computed = 0
        self.waiting.appendleft(request)
        self._num_preemptions += 1

    def _grow(self, request: Request, count: int) -> None:
        """Takes the blocks for `count` more tokens, with the copies that a shared last block asks for."""
        copies = self.allocator.grow(request.request_id, count)
        if copies:
            pairs = self.model.backend.array(np.asarray(copies).reshape(-1, 2), np.int64)
            self.cache.pool.copy_blocks(pairs)

    def _fill_arrays(self, scheduled: list[tuple[Request, int]]) -> int:
        """Lets the allocator fill the host arrays; returns the blocks of the longest sequence."""
        arrays = self._arrays
        self.allocator.write_batch(
            [request.request_id for request, _ in scheduled],
            [count for _, count in scheduled],
            block_tables=arrays.block_tables,
            slot_mapping=arrays.slot_mapping,
            seq_lens=arrays.seq_lens,
            query_start_loc=arrays.query_start_loc,
            positions=arrays.positions,
        )
        return -(-int(arrays.seq_lens[: len(scheduled)].max()) // self.block_size)

    def _replay(self, decoding: list[Request], max_blocks: int) -> Array:
        """The logits of a step that decodes one token of each request, by a CUDA graph."""
        arrays, num_seqs = self._arrays, len(decoding)
        assert self.graphs is not None
        return self.graphs.run(
            [request.token_ids[-1] for request in decoding],
            arrays.positions[:num_seqs],
            arrays.slot_mapping[:num_seqs],
            arrays.block_tables[:num_seqs, :max_blocks],
            arrays.seq_lens[:num_seqs],
        )

    def _build_batch(self, scheduled: list[tuple[Request, int]], max_blocks: int, is_decode: bool) -> Batch:
        """Takes the used part of the host arrays to the device."""
        arrays, to_device = self._arrays, self.model.backend.array
        num_seqs, num_tokens = len(scheduled), sum(count for _, count in scheduled)
        ends = arrays.query_start_loc[1 : num_seqs + 1]
        token_ids = [
            i for r, count in scheduled for i in r.token_ids[r.num_computed : r.num_computed + count]
        ]
        due = [r.num_computed + count == len(r.token_ids) for r, count in scheduled]
        return Batch(
            token_ids=to_device(token_ids, np.int64),
            positions=to_device(arrays.positions[:num_tokens]),
            slot_mapping=to_device(arrays.slot_mapping[:num_tokens]),
            block_tables=to_device(arrays.block_tables[:num_seqs, :max_blocks]),
            seq_lens=to_device(arrays.seq_lens[:num_seqs]),
            query_start_loc=None if is_decode else to_device(arrays.query_start_loc[: num_seqs + 1]),
            logit_rows=to_device(ends[due] - 1, np.int64),
        )

    def generate(self, prompts: list[list[int]], params: SamplingParams) -> list[list[int]]:
        """Runs prompts to their end and returns the generated tokens of each, in order."""
        ids = [self.add_request(prompt, params) for prompt in prompts]
        outputs: dict[int, list[int]] = {i: [] for i in ids}
        while self.has_work:
            for output in self.step():
                outputs[output.request_id].append(output.token_id)
        return [outputs[i] for i in ids]
