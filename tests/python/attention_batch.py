"""Batches in a paged cache, and their reference.

SPDX-License-Identifier: Apache-2.0
"""

import dataclasses

import numpy as np
from frameworks import as_float64, np_dtype
from reference import attention as reference
from reference import kv_cache
from tolerances import assert_close, assert_lse_close

import quire

DTYPES = ["float32", "float16", "bfloat16"]
QUANTIZED = ["float8_e4m3fn", "float8_e5m2", "int8"]


def draw(rng, shape, dtype):
    return rng.standard_normal(shape).astype(np.float32).astype(np_dtype(dtype))


def poison(shape, dtype):
    """NaN in each float dtype; -1 in int8."""
    return np.full((*shape[:-1], shape[-1] * np_dtype(dtype).itemsize), 0xFF, np.uint8).view(np_dtype(dtype))


@dataclasses.dataclass
class Batch:
    """A batch in a paged cache: shuffled blocks, and NaN wherever nothing belongs."""

    q: np.ndarray
    k_cache: np.ndarray
    v_cache: np.ndarray
    block_tables: np.ndarray
    seq_lens: np.ndarray
    query_start_loc: np.ndarray | None
    k_scale: np.ndarray | None = None
    v_scale: np.ndarray | None = None
    q_scale: np.ndarray | None = None

    @classmethod
    def make(
        cls,
        rng,
        *,
        q_lens,
        kv_lens,
        heads,
        kv_heads,
        dim,
        block_size,
        dtype,
        kv_dtype=None,
        scales=0,
        decode=False,
    ):
        kv_dtype = kv_dtype or dtype
        needed = [-(-n // block_size) for n in kv_lens]
        num_blocks = sum(needed) + 3
        width = max([*needed, 1]) + 2
        order = rng.permutation(num_blocks)
        # What lies past a sequence's length in its table may be anything.
        tables = rng.choice(
            np.array([-1, -7, num_blocks, 2**31 - 1, -(2**31), 0], np.int64), (len(kv_lens), width)
        ).astype(np.int32)
        shape = (num_blocks, block_size, kv_heads, dim)
        k_cache, v_cache = poison(shape, kv_dtype), poison(shape, kv_dtype)
        k_scale = (0.01 + 0.02 * rng.random(scales)).astype(np.float32) if scales else None
        v_scale = (0.01 + 0.02 * rng.random(scales)).astype(np.float32) if scales else None
        q_scale = (0.5 + rng.random(scales)).astype(np.float32) if scales and dtype in QUANTIZED else None
        at = 0
        for s, length in enumerate(kv_lens):
            tables[s, : needed[s]] = order[at : at + needed[s]]
            at += needed[s]
            slots = np.arange(length)
            where = tables[s][slots // block_size], slots % block_size
            for cache, scale in ((k_cache, k_scale), (v_cache, v_scale)):
                x = rng.standard_normal((length, kv_heads, dim)).astype(np.float32)
                cache[where] = (
                    kv_cache.store(x, scale, kv_dtype)
                    if kv_dtype in QUANTIZED
                    else x.astype(np_dtype(kv_dtype))
                )
        starts = np.concatenate([[0], np.cumsum(q_lens)]).astype(np.int32)
        return cls(
            draw(rng, (int(starts[-1]), heads, dim), dtype),
            k_cache,
            v_cache,
            tables,
            np.asarray(kv_lens, np.int32),
            None if decode else starts,
            k_scale,
            v_scale,
            q_scale,
        )

    def arguments(self, backend):
        positional = [
            backend.array(x) for x in (self.q, self.k_cache, self.v_cache, self.block_tables, self.seq_lens)
        ]
        keywords = {}
        for name in ("query_start_loc", "q_scale", "k_scale", "v_scale"):
            value = getattr(self, name)
            if value is not None:
                keywords[name] = backend.array(value)
        return positional, keywords

    def reference(self, **options):
        def wide(cache, scale):
            x = as_float64(cache)
            return x if scale is None else x * scale.astype(np.float64).reshape(1, 1, -1, 1)

        q = as_float64(self.q)
        if self.q_scale is not None:
            group = q.shape[1] // self.k_cache.shape[2]
            q = q * np.repeat(self.q_scale.astype(np.float64), group if len(self.q_scale) > 1 else 1)[:, None]
        return reference.paged(
            q,
            wide(self.k_cache, self.k_scale),
            wide(self.v_cache, self.v_scale),
            self.block_tables,
            self.seq_lens,
            self.query_start_loc,
            **options,
        )

    def check(self, backend, *, batch_invariant=False, **options):
        positional, keywords = self.arguments(backend)
        keywords["batch_invariant"] = batch_invariant
        converted = {
            name: backend.array(value) if isinstance(value, np.ndarray) else value
            for name, value in options.items()
        }
        out, lse = quire.paged_attention(*positional, return_lse=True, **keywords, **converted)
        if "window" in options and isinstance(options["window"], int):
            options["window"] = (options["window"], -1)
        want, want_lse = self.reference(**options)
        assert_close("attention", backend.numpy(out), want)
        assert_lse_close(backend.numpy(lse), want_lse, self.q.dtype.name, backend.device, self.q.shape[2])


OPTIONS = {
    "noncausal": {"causal": False},
    "scale": {"scale": 0.3},
    "window_int": {"window": 7},
    "window_left": {"window": (20, -1)},
    "window_zero": {"window": (0, 0)},
    "window_both": {"window": (5, 3), "causal": False},
    "window_right": {"window": (-1, 4), "causal": False},
    "softcap": {"softcap": 5.0},
    "alibi": {"alibi_slopes": True},
    "alibi_noncausal": {"alibi_slopes": True, "causal": False},
    "sinks": {"sinks": True},
    "sinks_window": {"sinks": True, "window": (3, -1)},
    "everything": {
        "window": (40, 2),
        "causal": False,
        "softcap": 8.0,
        "alibi_slopes": True,
        "sinks": True,
        "scale": 0.2,
    },
}


def drawn_options(rng, option, heads):
    options = dict(OPTIONS[option])
    if "alibi_slopes" in options:
        options["alibi_slopes"] = (2.0 ** -np.arange(1, heads + 1)).astype(np.float32)
    if "sinks" in options:
        options["sinks"] = rng.standard_normal(heads).astype(np.float32)
    return options


def random_mask(rng, num_tokens, width):
    return rng.integers(0, 256, (num_tokens, width), dtype=np.uint8)


def prefixed(rng, *, num_prefix_blocks, q_lens, kv_lens, **shape):
    """A batch of sequences with a common prefix: as a whole, and what shared_prefix_attention takes instead of its tables."""
    block_size = shape["block_size"]
    prefix_len = num_prefix_blocks * block_size
    own = Batch.make(rng, q_lens=[0, *q_lens], kv_lens=[prefix_len, *kv_lens], **shape)
    prefix = own.block_tables[0, :num_prefix_blocks].copy()
    tables, lens = np.ascontiguousarray(own.block_tables[1:]), own.seq_lens[1:].copy()
    starts = own.query_start_loc[1:].copy()
    own = dataclasses.replace(own, block_tables=tables, seq_lens=lens, query_start_loc=starts)
    whole = dataclasses.replace(
        own,
        block_tables=np.concatenate([np.tile(prefix, (len(lens), 1)), tables], axis=1),
        seq_lens=(lens + prefix_len).astype(np.int32),
    )
    return prefix, own, whole


def good_arguments():
    """Of paged_attention: a decode of two sequences."""
    return {
        "q": np.ones((2, 4, 16), np.float32),
        "k_cache": np.ones((3, 4, 2, 16), np.float32),
        "v_cache": np.ones((3, 4, 2, 16), np.float32),
        "block_tables": np.zeros((2, 2), np.int32),
        "seq_lens": np.full(2, 4, np.int32),
        "out": np.full((2, 4, 16), 7.0, np.float32),
    }
