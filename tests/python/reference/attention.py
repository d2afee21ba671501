"""Attention in float64, one query and head at a time.

SPDX-License-Identifier: Apache-2.0
"""

import numpy as np


def attend(
    q,
    k,
    v,
    *,
    q_start,
    scale=None,
    causal=True,
    window=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    sinks=None,
    mask=None,
    mask_start=None,
):
    """One sequence: q [q_len, heads, dim], k and v [kv_len, kv_heads, dim]; query i stands at q_start + i. Returns out, lse.

    mask is packed, [q_len, mask_bytes]; mask_start the key of its bit 0, None for kv_len - q_len.
    """
    q_len, heads, dim = q.shape
    kv_len, kv_heads, _ = k.shape
    group = heads // kv_heads
    scale = 1.0 / np.sqrt(dim) if scale is None else scale
    out = np.zeros((q_len, heads, dim))
    lse = np.full((q_len, heads), -np.inf)
    keys = np.arange(kv_len)
    positions = q_start + np.arange(q_len)
    seen = np.ones((q_len, kv_len), bool)
    if causal:
        seen &= keys[None, :] <= positions[:, None]
    left, right = window
    if left >= 0:
        seen &= keys[None, :] >= positions[:, None] - left
    if right >= 0:
        seen &= keys[None, :] <= positions[:, None] + right
    if mask is not None:
        first = kv_len - q_len if mask_start is None else int(mask_start)
        bits = np.unpackbits(mask, axis=-1, bitorder="little").astype(bool)
        for j in keys:
            if 0 <= j - first < bits.shape[1]:
                seen[:, j] &= bits[:, j - first]
    for h in range(heads):
        score = scale * (q[:, h] @ k[:, h // group].T) if kv_len else np.zeros((q_len, 0))
        if softcap:
            score = softcap * np.tanh(score / softcap)
        if alibi_slopes is not None:
            score = score - alibi_slopes[h] * (positions[:, None] - keys[None, :])
        for i in range(q_len):
            visible = np.flatnonzero(seen[i])
            terms = score[i, visible]
            if sinks is not None:
                terms = np.append(terms, sinks[h])
            if len(terms) == 0:
                continue
            top = terms.max()
            total = np.exp(terms - top).sum()
            lse[i, h] = top + np.log(total)
            weights = np.exp(score[i, visible] - lse[i, h])
            out[i, h] = weights @ v[visible, h // group]
    return out, lse


def paged(
    q,
    k_cache,
    v_cache,
    block_tables,
    seq_lens,
    query_start_loc=None,
    *,
    mask=None,
    mask_start=None,
    **options,
):
    """The batch of quire.paged_attention; rows of no sequence are NaN."""
    block_size = k_cache.shape[1]
    starts = np.arange(len(seq_lens) + 1) if query_start_loc is None else query_start_loc
    out = np.full(q.shape, np.nan)
    lse = np.full(q.shape[:2], np.nan)
    for s, kv_len in enumerate(seq_lens):
        rows = slice(starts[s], starts[s + 1])
        slots = np.arange(kv_len)
        blocks = block_tables[s][slots // block_size]
        k, v = k_cache[blocks, slots % block_size], v_cache[blocks, slots % block_size]
        q_len = starts[s + 1] - starts[s]
        masks = (
            {}
            if mask is None
            else {"mask": mask[rows], "mask_start": None if mask_start is None else mask_start[s]}
        )
        out[rows], lse[rows] = attend(q[rows], k, v, q_start=kv_len - q_len, **masks, **options)
    return out, lse


def merge(out_a, lse_a, out_b, lse_b):
    lse = np.logaddexp(lse_a, lse_b)
    with np.errstate(invalid="ignore"):
        weight_a = np.where(np.isneginf(lse_a), 0.0, np.exp(lse_a - lse))
        weight_b = np.where(np.isneginf(lse_b), 0.0, np.exp(lse_b - lse))
    return out_a * weight_a[..., None] + out_b * weight_b[..., None], lse
