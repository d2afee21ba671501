"""Reads a checkpoint's tensors as the weights of a model.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from quire.demo import DemoError
from quire.demo.backend import Array, Backend, Weight
from quire.demo.checkpoint import Checkpoint
from quire.demo.config import ModelConfig
from quire.demo.quantization import read_quantized


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


class WeightReader:
    """The weights of a checkpoint, on a backend. Raises DemoError for a tensor that is missing or of another shape."""

    def __init__(self, config: ModelConfig, checkpoint: Checkpoint, backend: Backend, dtype: str) -> None:
        self._config, self._checkpoint, self._backend, self._dtype = config, checkpoint, backend, dtype

    def embedding(self) -> Array:
        """`[vocab_size, hidden_size]`."""
        return self._stack(("model.embed_tokens", self._config.vocab_size, self._config.hidden_size))

    def head(self, embedding: Array) -> Weight:
        """What makes logits. A checkpoint with tied embeddings may leave it out, or store it again."""
        stored = any(f"lm_head.{s}" in self._checkpoint for s in ("weight", "qweight", "weight_packed"))
        if self._config.tied_embeddings or not stored:
            return embedding
        return self.linear(("lm_head", self._config.vocab_size, self._config.hidden_size))

    def norm(self, name: str, size: int) -> Array:
        """A norm's weight."""
        return self._backend.weight(self._checkpoint.tensor(f"{name}.weight", (size,)), self._dtype)

    def linear(self, *parts: tuple[str, int, int]) -> Weight:
        """Projections of one input, each a name with its rows and columns: stacked, or quantized one by one."""
        if self._config.quantization is None:
            return self._stack(*parts)
        packed = [
            read_quantized(
                self._config.quantization,
                name,
                (out, into),
                self._checkpoint.__contains__,
                self._checkpoint.raw,
                self._backend.raw,
            )
            for name, out, into in parts
        ]
        quantized = tuple(w for w in packed if w is not None)
        if quantized and len(quantized) < len(packed):
            names = ", ".join(name for name, _, _ in parts)
            raise DemoError(f"{names}: expected all of them quantized or none")
        return quantized or self._stack(*parts)

    def bias(self, wanted: bool, *parts: tuple[str, int]) -> Array | None:
        """The biases of such projections, one after the other; None unless wanted."""
        if not wanted:
            return None
        vectors = [self._checkpoint.tensor(f"{name}.bias", (out,)) for name, out in parts]
        return self._backend.weight(np.concatenate(vectors), self._dtype)

    def layer(self, index: int) -> Layer:
        """One layer's weights."""
        config, hidden, inner = self._config, self._config.hidden_size, self._config.intermediate_size
        q_dim, kv_dim = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        prefix = f"model.layers.{index}"
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        post = config.post_norms
        return Layer(
            input_norm=self.norm(f"{prefix}.input_layernorm", hidden),
            qkv=self.linear(
                (f"{attention}.q_proj", q_dim, hidden),
                (f"{attention}.k_proj", kv_dim, hidden),
                (f"{attention}.v_proj", kv_dim, hidden),
            ),
            qkv_bias=self.bias(
                config.qkv_bias,
                (f"{attention}.q_proj", q_dim),
                (f"{attention}.k_proj", kv_dim),
                (f"{attention}.v_proj", kv_dim),
            ),
            q_norm=self.norm(f"{attention}.q_norm", config.head_dim) if config.qk_norm else None,
            k_norm=self.norm(f"{attention}.k_norm", config.head_dim) if config.qk_norm else None,
            output=self.linear((f"{attention}.o_proj", hidden, q_dim)),
            output_bias=self.bias(config.output_bias, (f"{attention}.o_proj", hidden)),
            attention_post_norm=self.norm(f"{prefix}.post_attention_layernorm", hidden) if post else None,
            mlp_norm=self.norm(
                f"{prefix}.{'pre_feedforward' if post else 'post_attention'}_layernorm", hidden
            ),
            gate_up=self.linear((f"{mlp}.gate_proj", inner, hidden), (f"{mlp}.up_proj", inner, hidden)),
            gate_up_bias=self.bias(config.mlp_bias, (f"{mlp}.gate_proj", inner), (f"{mlp}.up_proj", inner)),
            down=self.linear((f"{mlp}.down_proj", hidden, inner)),
            down_bias=self.bias(config.mlp_bias, (f"{mlp}.down_proj", hidden)),
            mlp_post_norm=self.norm(f"{prefix}.post_feedforward_layernorm", hidden) if post else None,
        )

    def _stack(self, *parts: tuple[str, int, int]) -> Array:
        matrices = [self._checkpoint.tensor(f"{name}.weight", (out, into)) for name, out, into in parts]
        return self._backend.weight(np.concatenate(matrices), self._dtype)
