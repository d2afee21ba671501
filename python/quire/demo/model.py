"""The forward pass of Llama-type models over a batch of ragged sequences, on quire's kernels.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

import quire
from quire.demo import DemoError
from quire.demo.backend import Array, Backend, numpy_dtype
from quire.demo.cache import PagedCache
from quire.demo.checkpoint import Checkpoint
from quire.demo.config import ModelConfig, read_config
from quire.demo.quantization import with_format
from quire.demo.weights import WeightReader

GATED = {
    "silu": quire.silu_and_mul,
    "gelu": quire.gelu_and_mul,
    "gelu_pytorch_tanh": quire.gelu_tanh_and_mul,
}


@dataclass
class Batch:
    """One step's tokens: chunks of prompts and single decoded tokens alike, sequence after sequence."""

    token_ids: Array  # int64 [num_tokens]
    positions: Array  # int64 [num_tokens]
    slot_mapping: Array  # int64 [num_tokens]
    block_tables: Array  # int32 [num_seqs, max_blocks_per_seq]
    seq_lens: Array  # int32 [num_seqs]
    query_start_loc: Array | None  # int32 [num_seqs + 1]; None: one token of each sequence
    logit_rows: Array  # int64 [num_logits]: the tokens whose next token is wanted


class Model:
    """A dense decoder of the Llama, Mistral, Qwen2, Qwen3 or Gemma2 family."""

    def __init__(self, config: ModelConfig, checkpoint: Checkpoint, backend: Backend, dtype: str) -> None:
        """Reads all weights; raises DemoError for a tensor that is missing or of another shape."""
        self.config, self.backend, self.dtype = config, backend, dtype
        self.activation_dtype = numpy_dtype(dtype)
        weights = WeightReader(config, checkpoint, backend, dtype)
        self.embedding = weights.embedding()
        self.layers = [weights.layer(i) for i in range(config.num_layers)]
        self.final_norm = weights.norm("model.norm", config.hidden_size)
        self.head = weights.head(self.embedding)
        self.embedding_scale = float(np.asarray(config.embedding_scale, self.activation_dtype))
        try:
            table = quire.rope_cache(
                config.rotary_dim, config.max_position, theta=config.rope_theta, scaling=config.rope_scaling
            )
        except (ValueError, TypeError, KeyError, quire.UnsupportedError) as error:
            raise DemoError(f"rope_scaling: {error}") from None
        self.rope = backend.array(table, np.float32)

    @classmethod
    def load(
        cls, directory: Path, backend: Backend, dtype: str | None = None, checkpoint_format: str | None = None
    ) -> Model:
        """Reads a model directory. `dtype` defaults to fp32 on the CPU and to the checkpoint's on a GPU.

        `checkpoint_format`, "gptq" or "gptq_v2", counts instead of what a GPTQ checkpoint says of itself.
        """
        config = read_config(directory)
        if checkpoint_format is not None:
            config = replace(config, quantization=with_format(config.quantization, checkpoint_format))
        default = "fp32" if backend.device == "cpu" else config.dtype
        return cls(config, Checkpoint(directory), backend, dtype or default)

    def norm(self, x: Array, weight: Array) -> Array:
        """RMS norm with this family's epsilon and weight offset."""
        return quire.rms_norm(x, weight, self.config.norm_eps, weight_offset=self.config.norm_offset)

    def __call__(
        self, batch: Batch, cache: PagedCache, observe: Callable[[int, Array, Array], None] | None = None
    ) -> Array:
        """Runs a batch: writes its keys and values to the cache and returns the wanted logits.

        The logits are float32 `[num_logits, vocab_size]`.
        `observe(layer, k, v)` sees what goes into the cache, `[num_tokens, num_kv_heads, head_dim]` each.
        """
        config, backend = self.config, self.backend
        residual = self.embedding[batch.token_ids].astype(self.activation_dtype, copy=False)
        if self.embedding_scale != 1.0:
            residual = (residual * self.embedding_scale).astype(self.activation_dtype, copy=False)
        x = self.norm(residual, self.layers[0].input_norm)
        for index, layer in enumerate(self.layers):
            x = self._attention(index, x, batch, cache, observe)
            if layer.attention_post_norm is not None:
                x = self.norm(x, layer.attention_post_norm)
            self._add_norm(x, residual, layer.mlp_norm)

            x = GATED[config.activation](backend.linear(x, layer.gate_up, layer.gate_up_bias))
            x = backend.linear(x, layer.down, layer.down_bias)
            if layer.mlp_post_norm is not None:
                x = self.norm(x, layer.mlp_post_norm)
            last = index + 1 == config.num_layers
            self._add_norm(x, residual, self.final_norm if last else self.layers[index + 1].input_norm)

        logits = backend.linear(x[batch.logit_rows], self.head).astype(backend.xp.float32, copy=False)
        if config.logit_softcap is not None:
            logits = config.logit_softcap * backend.xp.tanh(logits / config.logit_softcap)
        return logits

    def _add_norm(self, x: Array, residual: Array, weight: Array) -> None:
        """In place: residual += x, then x = norm(residual)."""
        quire.fused_add_rms_norm(
            x, residual, weight, self.config.norm_eps, weight_offset=self.config.norm_offset
        )

    def _attention(
        self,
        index: int,
        x: Array,
        batch: Batch,
        cache: PagedCache,
        observe: Callable[[int, Array, Array], None] | None,
    ) -> Array:
        """Projects, rotates, writes keys and values to the cache, attends over it, and projects back."""
        config, layer = self.config, self.layers[index]
        heads, kv_heads, head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        # One matrix product; q, k and v are views of its result, which quire's ops take as they are.
        qkv = self.backend.linear(x, layer.qkv, layer.qkv_bias).reshape(
            len(x), heads + 2 * kv_heads, head_dim
        )
        q, k, v = qkv[:, :heads], qkv[:, heads : heads + kv_heads], qkv[:, heads + kv_heads :]
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = self.norm(q, layer.q_norm), self.norm(k, layer.k_norm)
        quire.rotary_embedding(batch.positions, q, k, self.rope)
        if observe is not None:
            observe(index, k, v)
        k_scale, v_scale = cache.k_scale[index], cache.v_scale[index]
        quire.write_kv(
            k, v, cache.k[index], cache.v[index], batch.slot_mapping, k_scale=k_scale, v_scale=v_scale
        )
        if (
            not cache.quantized and cache.kv_dtype != self.dtype
        ):  # attention wants q in an unquantized cache's dtype
            q = q.astype(numpy_dtype(cache.kv_dtype))
        window = config.windows[index]
        out = quire.paged_attention(
            q,
            cache.k[index],
            cache.v[index],
            batch.block_tables,
            batch.seq_lens,
            query_start_loc=batch.query_start_loc,
            scale=config.attention_scale,
            window=None if window is None else window - 1,  # quire counts the keys before the query's own
            softcap=config.attention_softcap,
            k_scale=k_scale,
            v_scale=v_scale,
        )
        out = out.astype(self.activation_dtype, copy=False).reshape(len(x), heads * head_dim)
        return self.backend.linear(out, layer.output, layer.output_bias)

    def run_prompt(
        self,
        token_ids: list[int],
        cache: PagedCache | None = None,
        observe: Callable[[int, Array, Array], None] | None = None,
    ) -> Array:
        """Runs one whole sequence and returns each token's logits, `[num_tokens, vocab_size]`.

        It takes the first blocks of `cache`, by default of a fresh unquantized one. For calibration and
        evaluation.
        """
        num_tokens, array = len(token_ids), self.backend.array
        if cache is None:
            cache = PagedCache(self, -(-num_tokens // 16), 16, self.dtype)
        num_blocks = -(-num_tokens // cache.block_size)
        batch = Batch(
            token_ids=array(token_ids, np.int64),
            positions=array(np.arange(num_tokens), np.int64),
            slot_mapping=array(np.arange(num_tokens), np.int64),
            block_tables=array(np.arange(num_blocks)[None], np.int32),
            seq_lens=array([num_tokens], np.int32),
            query_start_loc=array([0, num_tokens], np.int32),
            logit_rows=array(np.arange(num_tokens), np.int64),
        )
        return self(batch, cache, observe)
