"""Chooses the next tokens from logits: greedy, or by temperature and top-p with a seed per request.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from quire.demo.backend import Array, Backend

#: Below this a temperature counts as 0: the logits divided by it would leave float32.
GREEDY_TEMPERATURE = 1e-5


@dataclass(frozen=True)
class SamplingParams:
    """How one request's tokens are chosen and when it ends. A temperature below 1e-5 is greedy."""

    max_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop_token_ids: frozenset[int] = field(default_factory=frozenset)

    def uniform(self, token_idx: int) -> float:
        """The random number in [0, 1) that decides token `token_idx`.

        It depends on the seed and the index alone, so that a request's text is the same in any batch and
        after a preemption.
        """
        return float(np.random.Generator(np.random.Philox(key=self.seed, counter=token_idx)).random())


def sample(
    logits: Array, params: Sequence[SamplingParams], token_idxs: Sequence[int], backend: Backend
) -> np.ndarray:
    """The chosen token of each row.

    logits: float32 `[num_seqs, vocab_size]`. params, token_idxs: each row's parameters and the index of the
    token to choose. Returns int64 `[num_seqs]` on the host.
    """
    xp = backend.xp
    tokens = backend.host(xp.argmax(logits, axis=-1)).astype(np.int64)
    rows = [i for i, p in enumerate(params) if p.temperature >= GREEDY_TEMPERATURE]
    if not rows:
        return tokens
    column = [[params[i].temperature, params[i].top_p, params[i].uniform(token_idxs[i])] for i in rows]
    temperature, top_p, uniform = backend.array(np.asarray(column, np.float32).T)[:, :, None]
    chosen = logits[backend.array(rows, np.int64)]
    chosen = (chosen - chosen.max(axis=-1, keepdims=True)) / temperature
    order = xp.argsort(-chosen, axis=-1)
    weights = xp.exp(xp.take_along_axis(chosen, order, axis=-1))
    ends = xp.cumsum(weights, axis=-1)
    # A token is kept while the more likely ones do not yet reach top_p; the first always is.
    kept = (ends - weights) < top_p * ends[:, -1:]
    kept[:, 0] = True
    num_kept = kept.sum(axis=-1, keepdims=True)
    total = xp.take_along_axis(ends, num_kept - 1, axis=-1)
    rank = xp.minimum((ends <= uniform * total).sum(axis=-1, keepdims=True), num_kept - 1)
    tokens[rows] = backend.host(xp.take_along_axis(order, rank, axis=-1))[:, 0]
    return tokens
