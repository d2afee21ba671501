"""Reads a checkpoint's config.json into the handful of facts in which the supported model families differ.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quire.demo import DemoError
from quire.demo.quantization import QuantizationConfig, parse_quantization

FAMILIES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Gemma2ForCausalLM": "gemma2",
}
ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh")


@dataclass(frozen=True)
class ModelConfig:
    """What model.py needs to know. Counts are as in quire's vocabulary."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    norm_eps: float
    activation: str
    rope_theta: float
    rope_scaling: dict[str, Any] | None
    rotary_dim: int
    tied_embeddings: bool
    windows: tuple[int | None, ...]  # one per layer, the query's own token counted
    attention_scale: float
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False  # Gemma2 normalises each branch's output too
    norm_offset: float = 0.0  # Gemma's weights are stored as w - 1
    embedding_scale: float = 1.0
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    dtype: str = "fp32"
    eos_token_ids: frozenset[int] = field(default_factory=frozenset)
    quantization: QuantizationConfig | None = None


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object; what can go wrong becomes a DemoError."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DemoError(f"{path}: no such file") from None
    except (
        OSError,
        ValueError,
        RecursionError,
    ) as error:  # ValueError: JSON, UTF-8, or an integer of thousands of digits
        raise DemoError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(data, dict):
        raise DemoError(f"{path}: expected a JSON object, got {type(data).__name__}")
    return data


def read_config(directory: Path) -> ModelConfig:
    """Reads config.json, and generation_config.json for its end-of-text tokens where there is one."""
    if not directory.is_dir():
        raise DemoError(f"{directory}: no such model directory")
    raw = read_json(directory / "config.json")
    generation = directory / "generation_config.json"
    eos = read_json(generation).get("eos_token_id") if generation.is_file() else None
    try:
        return parse_config(raw, eos)
    except DemoError as error:
        raise DemoError(f"{directory / 'config.json'}: {error}") from None


def parse_config(raw: dict[str, Any], eos_token_id: int | list[int] | None = None) -> ModelConfig:
    """Turns the contents of config.json into a ModelConfig, or raises DemoError naming the key."""
    names = raw.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    family = FAMILIES.get(name) if isinstance(name, str) else None
    if family is None:
        raise DemoError(f"unknown architecture {name!r}; known are {', '.join(FAMILIES)}")

    def integer(key: str, default: int | None = None) -> int:
        value = raw.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
            raise DemoError(f"{key}: expected a positive integer, got {value!r}")
        return value

    def number(key: str, default: float | None = None, source: dict[str, Any] = raw) -> float:
        value = source.get(key)
        value = default if value is None else value
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not 0 < value <= sys.float_info.max
        ):
            raise DemoError(f"{key}: expected a positive number, got {value!r}")
        return float(value)

    def softcap(key: str, default: float) -> float | None:
        return number(key, default) if raw.get(key, default) is not None else None

    gemma = family == "gemma2"
    hidden_size, num_heads, num_layers = (
        integer("hidden_size"), integer("num_attention_heads"), integer("num_hidden_layers")
    )  # fmt: skip
    if raw.get("head_dim") is None and hidden_size % num_heads:
        raise DemoError(f"hidden_size {hidden_size} is no multiple of num_attention_heads {num_heads}")
    head_dim = integer("head_dim", 256 if gemma else hidden_size // num_heads)
    if head_dim % 8 or head_dim > 256:
        raise DemoError(f"head_dim: quire's attention takes multiples of 8 up to 256, got {head_dim}")
    num_kv_heads = integer("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise DemoError(
            f"num_attention_heads {num_heads} is no multiple of num_key_value_heads {num_kv_heads}"
        )
    if num_layers > 1000:
        raise DemoError(f"num_hidden_layers: expected at most 1000, got {num_layers}")
    activation = raw.get("hidden_activation") if gemma else raw.get("hidden_act", "silu")
    activation = "gelu_pytorch_tanh" if activation is None else activation
    if activation not in ACTIVATIONS:
        raise DemoError(f"unknown activation {activation!r}; known are {', '.join(ACTIVATIONS)}")
    rope = raw.get("rope_parameters") or raw.get("rope_scaling")
    if rope is not None and not isinstance(rope, dict):
        raise DemoError(f"rope_scaling: expected an object, got {rope!r}")
    rope = dict(rope or {})
    theta = number("rope_theta", number("rope_theta", 10000.0), rope)
    partial = number("partial_rotary_factor", number("partial_rotary_factor", 1.0), rope)
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type != "default" and "original_max_position_embeddings" not in rope:
        original = raw.get("original_max_position_embeddings", raw.get("max_position_embeddings"))
        rope["original_max_position_embeddings"] = original
    eos = raw.get("eos_token_id") if eos_token_id is None else eos_token_id
    eos_ids = eos if isinstance(eos, list) else [eos]
    return ModelConfig(
        family=family,
        vocab_size=integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=integer("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position=integer("max_position_embeddings", 2048),
        norm_eps=number("rms_norm_eps", 1e-6),
        activation=activation,
        rope_theta=theta,
        rope_scaling=None if rope_type == "default" else {**rope, "rope_type": rope_type},
        rotary_dim=int(head_dim * partial) // 2 * 2,
        tied_embeddings=bool(raw.get("tie_word_embeddings", gemma)),
        windows=_windows(raw, family, num_layers),
        attention_scale=(number("query_pre_attn_scalar", 256) if gemma else head_dim) ** -0.5,
        qkv_bias=family == "qwen2" or (family != "mistral" and bool(raw.get("attention_bias", False))),
        output_bias=family not in ("qwen2", "mistral") and bool(raw.get("attention_bias", False)),
        mlp_bias=family == "llama" and bool(raw.get("mlp_bias", False)),
        qk_norm=family == "qwen3",
        post_norms=gemma,
        norm_offset=1.0 if gemma else 0.0,
        embedding_scale=hidden_size**0.5 if gemma else 1.0,
        attention_softcap=softcap("attn_logit_softcapping", 50.0) if gemma else None,
        logit_softcap=softcap("final_logit_softcapping", 30.0) if gemma else None,
        dtype={"float16": "fp16", "bfloat16": "bf16"}.get(
            str(raw.get("dtype", raw.get("torch_dtype"))), "fp32"
        ),
        eos_token_ids=frozenset(i for i in eos_ids if isinstance(i, int)),
        quantization=parse_quantization(raw.get("quantization_config", raw.get("compression_config"))),
    )


def _windows(raw: dict[str, Any], family: str, num_layers: int) -> tuple[int | None, ...]:
    """Each layer's sliding window: Mistral's everywhere, Gemma2's every other one, Qwen's last ones."""
    window = raw.get("sliding_window", 4096 if family in ("mistral", "gemma2") else None)
    if family == "llama" or (family.startswith("qwen") and not raw.get("use_sliding_window", False)):
        window = None
    if window is None:
        return (None,) * num_layers
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise DemoError(f"sliding_window: expected a positive integer, got {window!r}")
    kinds = raw.get("layer_types")
    if family == "mistral":
        kinds = ["sliding_attention"] * num_layers
    elif kinds is None:
        first = raw.get("max_window_layers", 28)
        if not isinstance(first, int):
            raise DemoError(f"max_window_layers: expected an integer, got {first!r}")
        sliding = [i % 2 == 0 if family == "gemma2" else i >= first for i in range(num_layers)]
        kinds = ["sliding_attention" if s else "full_attention" for s in sliding]
    if not isinstance(kinds, list) or len(kinds) != num_layers:
        raise DemoError(f"layer_types: expected {num_layers} entries")
    if unknown := set(map(str, kinds)) - {"sliding_attention", "full_attention"}:
        raise DemoError(f"layer_types: unknown {sorted(unknown)}")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
