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
from quire.demo.backend import Array, Backend, Weight, numpy_dtype
from quire.demo.cache import PagedCache
from quire.demo.checkpoint import Checkpoint
from quire.demo.config import ModelConfig, read_config
from quire.demo.quantization import read_quantized, with_format

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


@dataclass
class Layer:
    """One layer's weights. Projections that read the same input are stacked, `[out, in]`."""

    input_norm: Array
    qkv: Weight
    qkv_bias: Array | None
    q_norm: Array | None
    k_norm: Array | None
    output: Weight
    output_bias: Array | None
    attention_post_norm: Array | None
    mlp_norm: Array
    gate_up: Weight
    gate_up_bias: Array | None
    down: Weight
    down_bias: Array | None
    mlp_post_norm: Array | None


class Model:
    """A dense decoder of the Llama, Mistral, Qwen2, Qwen3 or Gemma2 family."""

    def __init__(self, config: ModelConfig, checkpoint: Checkpoint, backend: Backend, dtype: str) -> None:
        """Reads all weights; raises DemoError for a tensor that is missing or of another shape."""
        self.config, self.backend, self.dtype = config, backend, dtype
        self.activation_dtype = numpy_dtype(dtype)
        hidden, kv_dim = config.hidden_size, config.num_kv_heads * config.head_dim
        q_dim, inner = config.num_heads * config.head_dim, config.intermediate_size

        def linear(*parts: tuple[str, int, int]) -> Weight:
            if config.quantization is None:
                return stack(*parts)
            packed = [
                read_quantized(
                    config.quantization,
                    name,
                    (out, into),
                    checkpoint.__contains__,
                    checkpoint.raw,
                    backend.raw,
                )
                for name, out, into in parts
            ]
            quantized = tuple(w for w in packed if w is not None)
            if quantized and len(quantized) < len(packed):
                names = ", ".join(name for name, _, _ in parts)
                raise DemoError(f"{names}: expected all of them quantized or none")
            return quantized or stack(*parts)

        def stack(*parts: tuple[str, int, int]) -> Array:
            matrices = [checkpoint.tensor(f"{name}.weight", (out, into)) for name, out, into in parts]
            return backend.weight(np.concatenate(matrices), dtype)

        def bias(wanted: bool, *parts: tuple[str, int]) -> Array | None:
            vectors = [checkpoint.tensor(f"{name}.bias", (out,)) for name, out in parts] if wanted else []
            return backend.weight(np.concatenate(vectors), dtype) if wanted else None

        def norm(name: str, size: int = hidden) -> Array:
            return backend.weight(checkpoint.tensor(f"{name}.weight", (size,)), dtype)

        def layer(prefix: str) -> Layer:
            attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
            post = config.post_norms
            return Layer(
                input_norm=norm(f"{prefix}.input_layernorm"),
                qkv=linear(
                    (f"{attention}.q_proj", q_dim, hidden),
                    (f"{attention}.k_proj", kv_dim, hidden),
                    (f"{attention}.v_proj", kv_dim, hidden),
                ),
                qkv_bias=bias(
                    config.qkv_bias,
                    (f"{attention}.q_proj", q_dim),
                    (f"{attention}.k_proj", kv_dim),
                    (f"{attention}.v_proj", kv_dim),
                ),
                q_norm=norm(f"{attention}.q_norm", config.head_dim) if config.qk_norm else None,
                k_norm=norm(f"{attention}.k_norm", config.head_dim) if config.qk_norm else None,
                output=linear((f"{attention}.o_proj", hidden, q_dim)),
                output_bias=bias(config.output_bias, (f"{attention}.o_proj", hidden)),
                attention_post_norm=norm(f"{prefix}.post_attention_layernorm") if post else None,
                mlp_norm=norm(f"{prefix}.{'pre_feedforward' if post else 'post_attention'}_layernorm"),
                gate_up=linear((f"{mlp}.gate_proj", inner, hidden), (f"{mlp}.up_proj", inner, hidden)),
                gate_up_bias=bias(config.mlp_bias, (f"{mlp}.gate_proj", inner), (f"{mlp}.up_proj", inner)),
                down=linear((f"{mlp}.down_proj", hidden, inner)),
                down_bias=bias(config.mlp_bias, (f"{mlp}.down_proj", hidden)),
                mlp_post_norm=norm(f"{prefix}.post_feedforward_layernorm") if post else None,
            )

        self.embedding = stack(("model.embed_tokens", config.vocab_size, hidden))
        self.layers = [layer(f"model.layers.{i}") for i in range(config.num_layers)]
        self.final_norm = norm("model.norm")
        # A checkpoint with tied embeddings may leave lm_head out, or store it again.
        tied = config.tied_embeddings or not any(
            f"lm_head.{s}" in checkpoint for s in ("weight", "qweight", "weight_packed")
        )
        self.head = self.embedding if tied else linear(("lm_head", config.vocab_size, hidden))
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
