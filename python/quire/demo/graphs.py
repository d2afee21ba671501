"""The decode step as CUDA graphs: one for each of a few batch sizes, replayed for sequences of any lengths.

SPDX-License-Identifier: Apache-2.0

quire's ops plan nothing on the host, and what they launch depends on shapes alone. So a graph that was captured once serves every
later step of its batch size: a step writes its tokens, slots and block tables where the graph reads them, and replays it. A batch
between two sizes takes the larger graph; the rows that are left over have no keys and write none.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from quire.demo.backend import Array
from quire.demo.cache import PagedCache
from quire.demo.model import Batch, Model


@dataclass
class _Captured:
    """A graph with what it reads and what it leaves."""

    inputs: Array  # bytes: what the batch's arrays are views of, but for block_tables
    batch: Batch
    replay: Callable[[], None]
    logits: Array


class DecodeGraphs:
    """Captures a batch size when it is first met.

    max_num_seqs: the largest batch. max_blocks_per_seq: the width of its block table, and with it the longest sequence.
    """

    def __init__(self, model: Model, cache: PagedCache, max_num_seqs: int, max_blocks_per_seq: int) -> None:
        """Captures nothing yet."""
        self.model, self.cache = model, cache
        self.max_num_seqs, self.max_blocks_per_seq = max_num_seqs, max_blocks_per_seq
        self._captured: dict[int, _Captured] = {}

    @staticmethod
    def fit(model: Model) -> bool:
        """Whether this model's step can be captured here."""
        weights = [w for layer in model.layers for w in (layer.qkv, layer.output, layer.gate_up, layer.down)]
        parts = [part for w in (*weights, model.head) if isinstance(w, tuple) for part in w]
        # CuPy has no float8: such activations are memory of quire's own that would be gone when the graph runs.
        return model.backend.has_graphs and all(part.format != "fp8" for part in parts)

    def bucket(self, num_seqs: int) -> int:
        """The batch size that is run for `num_seqs`: the next power of two, or the largest batch."""
        return int(min(1 << (num_seqs - 1).bit_length(), self.max_num_seqs))

    def run(
        self,
        token_ids: list[int],
        positions: np.ndarray,
        slot_mapping: np.ndarray,
        block_tables: np.ndarray,
        seq_lens: np.ndarray,
    ) -> Array:
        """One token of each sequence: the logits, `[num_seqs, vocab_size]`, which the next step overwrites."""
        num_seqs = len(token_ids)
        size = self.bucket(num_seqs)
        host = np.zeros(7 * size, np.int32)
        wide = host[: 6 * size].view(np.int64).reshape(3, size)
        wide[2] = -1  # no slot
        wide[:, :num_seqs] = token_ids, positions, slot_mapping
        host[6 * size : 6 * size + num_seqs] = seq_lens
        if size not in self._captured:
            self._captured[size] = self._capture(size)
        captured = self._captured[size]
        self.model.backend.assign(captured.inputs, host)
        captured.batch.block_tables[:num_seqs, : block_tables.shape[1]] = self.model.backend.array(
            block_tables
        )
        captured.replay()
        return captured.logits[:num_seqs]

    def _capture(self, size: int) -> _Captured:
        backend = self.model.backend
        xp = backend.xp
        inputs = xp.zeros(7 * size, xp.int32)
        wide = inputs[: 6 * size].view(xp.int64).reshape(3, size)
        wide[2] = -1
        batch = Batch(
            token_ids=wide[0],
            positions=wide[1],
            slot_mapping=wide[2],
            block_tables=xp.full((size, self.max_blocks_per_seq), -1, xp.int32),
            seq_lens=inputs[6 * size :],
            query_start_loc=None,
            logit_rows=xp.arange(size),
        )
        replay, logits = backend.capture(lambda: self.model(batch, self.cache))
        return _Captured(inputs, batch, replay, logits)

    def measure(self, num_seqs: int, seq_len: int, repeats: int = 30) -> tuple[float, float]:
        """Tokens a second of decoding with graphs and without, with the next tokens' choice; the cache is left as it is."""
        num_blocks = -(-seq_len // self.cache.block_size)
        tables = np.arange(num_seqs * num_blocks, dtype=np.int32).reshape(num_seqs, num_blocks)
        tables %= self.cache.num_blocks
        positions = np.full(num_seqs, seq_len - 1)
        slots, lens = np.full(num_seqs, -1), np.full(num_seqs, seq_len, np.int32)
        array, tokens = self.model.backend.array, [0] * num_seqs

        def replayed() -> Array:
            return self.run(tokens, positions, slots, tables, lens)

        def launched() -> Array:
            batch = Batch(
                token_ids=array(tokens, np.int64),
                positions=array(positions, np.int64),
                slot_mapping=array(slots, np.int64),
                block_tables=array(tables),
                seq_lens=array(lens),
                query_start_loc=None,
                logit_rows=array(np.arange(num_seqs), np.int64),
            )
            return self.model(batch, self.cache)

        rates = []
        for step in (replayed, launched):
            seconds = []
            for _ in range(repeats + 3):
                start = time.perf_counter()
                self.model.backend.host(step().argmax(axis=-1))
                seconds.append(time.perf_counter() - start)
            rates.append(num_seqs / float(np.median(seconds[3:])))
        return rates[0], rates[1]
