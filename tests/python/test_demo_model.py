"""The demo's models against Hugging Face transformers: logits and greedy text of each family.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tokenizers")

import quire.demo
from quire.demo import DemoError
from quire.demo.backend import Backend, select_backend
from quire.demo.cache import CALIBRATION_TARGET, PagedCache
from quire.demo.checkpoint import Checkpoint
from quire.demo.config import parse_config, read_config
from quire.demo.engine import Engine
from quire.demo.model import Model
from quire.demo.sampling import SamplingParams

EMBEDDED = Path(quire.demo.__file__).parent / "model"
HELD_OUT = Path(__file__).parent / "data" / "demo_held_out.txt"

TINY: dict[str, Any] = {
    "vocab_size": 199,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
# One entry per family, and one per option that a checkpoint of it can have.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama-rope-llama3": ("Llama", {"rope_parameters": LLAMA3}),
    "llama-rope-yarn": ("Llama", {"rope_parameters": YARN}),
    "llama-mha-head-40": ("Llama", {"num_key_value_heads": 6, "head_dim": 40}),
    "mistral": ("Mistral", {"sliding_window": 24}),
    "mistral-no-window": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {"head_dim": 8}),
    "qwen2-windows": (
        "Qwen2",
        {"head_dim": 8, "use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {"tie_word_embeddings": True}),
    "qwen3-bias": ("Qwen3", {"attention_bias": True}),
    "gemma2": ("Gemma2", {"sliding_window": 24, "query_pre_attn_scalar": 40}),
}


@pytest.fixture(params=["cpu", "cuda"])
def backend(request: pytest.FixtureRequest) -> Backend:
    """Each array library that is here: NumPy always, CuPy where it and a GPU are."""
    try:
        return select_backend(request.param)
    except DemoError as error:
        pytest.skip(str(error))


def save_random_checkpoint(directory: Path, case: str) -> Any:
    """Saves a transformers model with random weights, far enough from zero that every term matters."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    family, options = CASES[case]
    config = getattr(transformers, f"{family}Config")(**(TINY | options), attn_implementation="eager")
    torch.manual_seed(7)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif parameter.ndim == 1:
                parameter.copy_(0.3 * torch.randn_like(parameter))
            else:
                parameter.copy_(1.5 * torch.randn_like(parameter) / parameter.shape[1] ** 0.5)
    model.save_pretrained(directory)
    return model


def hf_logits(model: Any, token_ids: list[int]) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(input_ids=torch.tensor([token_ids])).logits[0].float().numpy()


def hf_greedy(model: Any, prompt: list[int], num_tokens: int) -> list[int]:
    import torch

    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        min_new_tokens=num_tokens,
        max_new_tokens=num_tokens,
        pad_token_id=0,
        eos_token_id=None,
    )
    return out[0, len(prompt) :].tolist()


def assert_close(actual: np.ndarray, expected: np.ndarray) -> None:
    """Within 1e-4 of the row's largest logit."""
    error = np.abs(actual - expected).max(axis=-1)
    assert (error <= 1e-4 * np.abs(expected).max(axis=-1)).all(), f"largest error {error.max()}"


@pytest.mark.parametrize("case", CASES)
def test_random_weights_agree_with_transformers(case: str, tmp_path: Path, backend: Backend) -> None:
    reference = save_random_checkpoint(tmp_path, case)
    model = Model.load(tmp_path, backend, "fp32")
    rng = np.random.default_rng(1)
    prompt = rng.integers(2, TINY["vocab_size"], 90).tolist()
    assert_close(backend.host(model.run_prompt(prompt)), hf_logits(reference, prompt))

    # Small blocks, chunks that do not divide the prompt.
    engine = Engine(model, num_blocks=80, block_size=5, max_batch_tokens=37)
    (generated,) = engine.generate([prompt], SamplingParams(max_tokens=256))
    assert generated == hf_greedy(reference, prompt, 256)


def test_sharded_checkpoint_is_read(tmp_path: Path) -> None:
    reference = save_random_checkpoint(tmp_path / "whole", "qwen3")
    reference.save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    assert (tmp_path / "shards" / "model.safetensors.index.json").is_file()
    prompt = list(range(3, 40))
    whole, shards = (Model.load(tmp_path / name, Backend(), "fp32") for name in ("whole", "shards"))
    np.testing.assert_array_equal(whole.run_prompt(prompt), shards.run_prompt(prompt))


def test_embedded_model_agrees_with_transformers(backend: Backend) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer

    reference = transformers.LlamaForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32).eval()
    tokenizer = Tokenizer.from_file(str(EMBEDDED / "tokenizer.json"))
    model = Model.load(EMBEDDED, backend, "fp32")
    text_ids = tokenizer.encode(HELD_OUT.read_text(encoding="utf-8")[:3000]).ids[:700]
    assert_close(backend.host(model.run_prompt(text_ids)), hf_logits(reference, text_ids))
    prompt = tokenizer.encode("And the king said unto").ids
    (generated,) = Engine(model, num_blocks=32).generate([prompt], SamplingParams(max_tokens=256))
    assert generated == hf_greedy(reference, prompt, 256)


def perplexity(model: Model, kv_dtype: str, windows: list[list[int]]) -> float:
    """Per-token perplexity of `windows`, each run on its own through a cache of `kv_dtype`."""
    total, count = 0.0, 0
    cache = PagedCache(model, max(-(-len(w) // 16) for w in windows), 16, kv_dtype)
    cache.calibrate(model, windows[:1])
    for window in windows:
        logits = model.backend.host(model.run_prompt(window, cache)).astype(np.float64)[:-1]
        peak = logits.max(axis=-1)
        log_sum = peak + np.log(np.exp(logits - peak[:, None]).sum(axis=-1))
        total += float((log_sum - logits[np.arange(len(logits)), window[1:]]).sum())
        count += len(logits)
    return float(np.exp(total / count))


def test_perplexity_of_quantized_kv_caches(backend: Backend) -> None:
    """On held-out text, float8 and int8 caches stay within 1 % of bfloat16's perplexity."""
    pytest.importorskip("ml_dtypes")
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(EMBEDDED / "tokenizer.json"))
    model = Model.load(EMBEDDED, backend, "fp32")
    ids = tokenizer.encode(HELD_OUT.read_text(encoding="utf-8")[:40000]).ids
    windows = [ids[i : i + 1024] for i in range(0, 8 * 1024, 1024)]
    baseline = perplexity(model, "bf16", windows)
    assert 2.4 < np.log(baseline) < 2.8  # the card's figure over all of the held-out text is 2.69
    for kv_dtype in CALIBRATION_TARGET:
        assert perplexity(model, kv_dtype, windows) == pytest.approx(baseline, rel=0.01), kv_dtype


def test_activations_in_half_precision_stay_near_fp32(backend: Backend) -> None:
    pytest.importorskip("ml_dtypes")
    ids = list(range(100, 160))
    exact = backend.host(Model.load(EMBEDDED, backend, "fp32").run_prompt(ids))
    for dtype, tolerance in (("fp16", 0.01), ("bf16", 0.06)):
        logits = backend.host(Model.load(EMBEDDED, backend, dtype).run_prompt(ids))
        assert logits.dtype == np.float32
        assert np.abs(logits - exact).max() <= tolerance * np.abs(exact).max(), dtype


def test_config_defaults_and_old_keys() -> None:
    raw = {
        "architectures": ["MistralForCausalLM"],
        "vocab_size": 9,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    config = parse_config(raw | {"rope_theta": 5e5, "eos_token_id": [3, 4]})
    assert (config.head_dim, config.num_kv_heads, config.windows) == (8, 4, (4096, 4096))
    assert (config.rope_theta, config.rope_scaling, config.eos_token_ids) == (5e5, None, {3, 4})
    old = parse_config(raw | {"rope_scaling": {"type": "linear", "factor": 2.0}})
    assert old.rope_scaling is not None
    assert old.rope_scaling["rope_type"] == "linear"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "unknown architecture 'MambaForCausalLM'"),
        ({"architectures": None}, "unknown architecture None"),
        ({"hidden_size": -4}, "hidden_size: expected a positive integer"),
        ({"hidden_size": "192"}, "hidden_size: expected a positive integer"),
        ({"num_key_value_heads": 5}, "no multiple of num_key_value_heads"),
        ({"hidden_act": "relu"}, "unknown activation 'relu'"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps: expected a positive number"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps: expected a positive number"),
        ({"rope_parameters": [1]}, "rope_scaling: expected an object"),
        (
            {
                "architectures": ["Qwen2ForCausalLM"],
                "use_sliding_window": True,
                "sliding_window": 8,
                "max_window_layers": "1",
            },
            "max_window_layers: expected an integer, got '1'",
        ),
    ],
)
def test_config_mistakes_are_named(change: dict[str, Any], message: str) -> None:
    raw = json.loads((EMBEDDED / "config.json").read_text())
    with pytest.raises(DemoError, match=message):
        parse_config(raw | change)


def write_safetensors(path: Path, header: Any, data: bytes = b"") -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 800]}, "truncated"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}, "malformed"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}, "malformed"),
        ({"dtype": "F32", "shape": [2.5], "data_offsets": [0, 8]}, "malformed"),
        ({"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}, "does not have 8 bytes"),
        ({"dtype": "F32", "shape": [2]}, "malformed"),
        ({"dtype": "F32", "shape": 2, "data_offsets": [0, 8]}, "malformed"),
        ({"dtype": "I4", "shape": [2], "data_offsets": [0, 8]}, "dtype I4 is not supported"),
        ([], "malformed"),
    ],
)
def test_checkpoint_header_is_not_trusted(entry: Any, message: str, tmp_path: Path) -> None:
    write_safetensors(tmp_path / "model.safetensors", {"x": entry}, bytes(8))
    with pytest.raises(DemoError, match=message):
        Checkpoint(tmp_path).tensor("x", (2,))


def test_checkpoint_reads_every_dtype(tmp_path: Path) -> None:
    values = np.array([1.5, -0.25], np.float32)
    parts = {
        "F64": values.astype("<f8").tobytes(),
        "F32": values.tobytes(),
        "F16": values.astype("<f2").tobytes(),
        "BF16": (values.view(np.uint32) >> 16).astype("<u2").tobytes(),
    }
    header, data = {}, b""
    for dtype, part in parts.items():
        header[dtype] = {"dtype": dtype, "shape": [2], "data_offsets": [len(data), len(data) + len(part)]}
        data += part
    write_safetensors(tmp_path / "model.safetensors", header, data)
    checkpoint = Checkpoint(tmp_path)
    for dtype in parts:
        np.testing.assert_array_equal(checkpoint.tensor(dtype, (2,)), values)
    with pytest.raises(DemoError, match=r"expected shape \[3\], got \[2\]"):
        checkpoint.tensor("F32", (3,))


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/passwd", "", ".."])
def test_checkpoint_index_stays_in_its_directory(shard: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": shard}}))
    with pytest.raises(DemoError, match="no plain file name"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("shard", ["a\0b", "\ud800"])
def test_checkpoint_index_names_a_file(shard: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": shard}}))
    with pytest.raises(DemoError, match=r"x00b|ud800"):
        Checkpoint(tmp_path)


def test_json_of_thousands_of_digits(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"vocab_size": ' + "9" * 5000 + "}")
    with pytest.raises(DemoError):
        read_config(tmp_path)


def test_embedded_model_is_small_and_complete() -> None:
    assert sum(p.stat().st_size for p in EMBEDDED.iterdir()) <= 6_000_000
    assert (EMBEDDED / "MODEL_CARD.md").is_file()
    assert read_config(EMBEDDED).tied_embeddings
