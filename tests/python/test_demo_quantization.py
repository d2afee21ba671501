"""`quire generate` on AWQ, GPTQ, compressed-tensors and FP8 checkpoints: logits against the same weights unquantized, and bad files.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from reference import quantization as reference
from tolerances import assert_product_close

import quire
from quire.demo import DemoError
from quire.demo.backend import Backend, select_backend
from quire.demo.checkpoint import Checkpoint
from quire.demo.config import read_config
from quire.demo.model import Model
from quire.demo.quantization import parse_quantization, read_quantized

HIDDEN, INNER, VOCAB, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 128, 256, 160, 4, 2, 32, 2
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "eos_token_id": 0,
}
LINEARS = {
    "self_attn.q_proj": (HEADS * HEAD_DIM, HIDDEN),
    "self_attn.k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
    "self_attn.v_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
DTYPES = {
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int32": "I32",
    "int64": "I64",
    "int8": "I8",
    "float8_e4m3fn": "F8_E4M3",
}


def write_safetensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    header: dict[str, Any] = {}
    offset = 0
    for name, t in tensors.items():
        header[name] = {
            "dtype": DTYPES[t.dtype.name],
            "shape": list(t.shape),
            "data_offsets": [offset, offset + t.nbytes],
        }
        offset += t.nbytes
    text = json.dumps(header).encode()
    path.write_bytes(
        len(text).to_bytes(8, "little")
        + text
        + b"".join(np.ascontiguousarray(t).tobytes() for t in tensors.values())
    )


def write_model(directory: Path, tensors: dict[str, np.ndarray], quantization: Any) -> Path:
    directory.mkdir()
    config = dict(CONFIG) if quantization is None else {**CONFIG, "quantization_config": quantization}
    (directory / "config.json").write_text(json.dumps(config))
    write_safetensors(directory / "model.safetensors", tensors)
    return directory


def common(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """What no format quantizes."""
    tensors = {
        "model.embed_tokens.weight": rng.standard_normal((VOCAB, HIDDEN)).astype(np.float32),
        "model.norm.weight": np.ones(HIDDEN, np.float32),
        "lm_head.weight": rng.standard_normal((VOCAB, HIDDEN)).astype(np.float32) * np.float32(0.1),
    }
    for layer in range(LAYERS):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{norm}.weight"] = np.ones(HIDDEN, np.float32)
    return tensors


def draw_scales(rng: np.random.Generator, shape: tuple[int, ...], bits: int = 4) -> np.ndarray:
    """Weights of one size whatever the bits: with larger ones a model amplifies what bfloat16 rounds off."""
    return ((0.01 + 0.01 * rng.random(shape)) * 2.0 ** (4 - bits)).astype(np.float16)


def awq_layer(rng, out, into):
    codes, zeros = rng.integers(0, 16, (into, out)), rng.integers(6, 10, (into // 32, out))
    scales = draw_scales(rng, (into // 32, out))
    stored = {"qweight": reference.pack_awq(codes), "qzeros": reference.pack_awq(zeros), "scales": scales}
    return stored, reference.dequantize(codes, zeros, scales, np.arange(into) // 32)


def gptq_layer(rng, out, into, bits=4, act_order=False, v2=False):
    codes, zeros = rng.integers(0, 2**bits, (into, out)), rng.integers(0, 2**bits, (into // 64, out))
    scales = draw_scales(rng, (into // 64, out), bits)
    g_idx = (np.arange(into) // 64).astype(np.int32)
    if act_order:
        g_idx = rng.permutation(g_idx)
    qzeros = reference.pack_stream(zeros if v2 else (zeros - 1) % 2**bits, bits)
    qweight = reference.pack_stream(codes.T, bits).T.copy()
    stored = {"qweight": qweight, "qzeros": qzeros, "scales": scales, "g_idx": g_idx}
    return stored, reference.dequantize(codes, zeros, scales, g_idx)


def compressed_layer(rng, out, into, bits=4):
    codes, scales = rng.integers(0, 2**bits, (out, into)), draw_scales(rng, (out, into // 128), bits)
    stored = {
        "weight_packed": reference.pack_stream(codes, bits),
        "weight_scale": scales.astype(ml_dtypes.bfloat16),
        "weight_shape": np.array([out, into], np.int64),
    }
    zeros = np.full((into // 128, out), 2 ** (bits - 1))
    wide = reference.dequantize(
        codes.T, zeros, stored["weight_scale"].T.astype(np.float32), np.arange(into) // 128
    )
    return stored, wide


def int8_layer(rng, out, into):
    q, scale = (
        rng.integers(-127, 128, (out, into)).astype(np.int8),
        draw_scales(rng, (out, 1)) / np.float16(16),
    )
    return {"weight": q, "weight_scale": scale.astype(np.float32)}, q * scale.astype(np.float64)


def fp8_layer(rng, out, into, kind="channel", name="weight_scale"):
    w = rng.standard_normal((out, into)).astype(np.float32).astype(ml_dtypes.float8_e4m3fn)
    shape = {"tensor": (1,), "channel": (out, 1), "block": (-(-out // 128), -(-into // 128))}[kind]
    scale = draw_scales(rng, shape).astype(np.float32) * np.float32(4)
    wide = w.astype(np.float64) * reference.spread_blocks(scale, (out, into))
    return {"weight": w, name: scale}, wide


def compressed_config(layout, bits=8, group_size=None, kind="int"):
    weights = {"num_bits": bits, "type": kind, "symmetric": True, "group_size": group_size}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
        "ignore": ["lm_head"],
    }


#: Each format: its config, its layers, and how far activations that are quantized too may lead from the unquantized product.
CASES: dict[str, tuple[Any, Any, float]] = {
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}, awq_layer, 1e-4),
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 64}, gptq_layer, 1e-4),
    "gptq-v2": (
        {"quant_method": "gptq", "bits": 8, "group_size": 64, "checkpoint_format": "gptq_v2"},
        lambda *a: gptq_layer(*a, bits=8, v2=True),
        1e-4,
    ),
    "gptq-3-act-order": (
        {"quant_method": "gptq", "bits": 3, "group_size": 64, "desc_act": True},
        lambda *a: gptq_layer(*a, bits=3, act_order=True),
        1e-4,
    ),
    "w4a16": (compressed_config("pack-quantized", 4, 128), compressed_layer, 1e-4),
    "w8a16": (compressed_config("pack-quantized", 8, 128), lambda *a: compressed_layer(*a, bits=8), 1e-4),
    "w8a8": (compressed_config("int-quantized"), int8_layer, 0.05),
    "float-quantized": (
        compressed_config("float-quantized", kind="float"),
        lambda *a: fp8_layer(*a, kind="channel"),
        0.15,
    ),
    "fp8-tensor": (
        {"quant_method": "fp8", "activation_scheme": "dynamic"},
        lambda *a: fp8_layer(*a, kind="tensor"),
        0.15,
    ),
    "fp8-block": (
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
        lambda *a: fp8_layer(*a, kind="block", name="weight_scale_inv"),
        0.15,
    ),
}


@pytest.fixture(params=["cpu", "cuda"])
def backend(request: pytest.FixtureRequest) -> Backend:
    try:
        return select_backend(request.param)
    except DemoError as error:
        pytest.skip(str(error))


def make(directory: Path, rng: np.random.Generator, make_layer: Any, config: Any) -> tuple[Path, Path]:
    """The quantized checkpoint, and one with the same weights in float32."""
    plain = common(rng)
    quantized = dict(plain)
    for layer in range(LAYERS):
        for name, (out, into) in LINEARS.items():
            prefix = f"model.layers.{layer}.{name}"
            stored, wide = make_layer(rng, out, into)
            quantized.update({f"{prefix}.{suffix}": t for suffix, t in stored.items()})
            plain[f"{prefix}.weight"] = wide.astype(np.float32)
    return write_model(directory / "quantized", quantized, config), write_model(
        directory / "plain", plain, None
    )


@pytest.mark.parametrize("case", CASES)
def test_logits(backend: Backend, rng: np.random.Generator, tmp_path: Path, case: str) -> None:
    config, make_layer, tolerance = CASES[case]
    quantized, plain = make(tmp_path, rng, make_layer, config)
    dtype = "fp32" if backend.device == "cpu" else "bf16"
    tokens = [int(t) for t in rng.integers(0, VOCAB, 40)]
    got = backend.host(Model.load(quantized, backend, dtype).run_prompt(tokens))
    want = backend.host(Model.load(plain, backend, dtype).run_prompt(tokens))
    error = np.abs(got - want).max() / np.abs(want).max()
    assert error < max(tolerance, 0.0 if dtype == "fp32" else 0.06), error


def test_quantized_head(rng: np.random.Generator, tmp_path: Path) -> None:
    config, make_layer, tolerance = CASES["awq"]
    plain = common(rng)
    quantized = {k: v for k, v in plain.items() if k != "lm_head.weight"}
    for layer in range(LAYERS):
        for name, (out, into) in LINEARS.items():
            w = rng.standard_normal((out, into)).astype(np.float32) * np.float32(0.05)
            for tensors in (plain, quantized):
                tensors[f"model.layers.{layer}.{name}.weight"] = w
    stored, wide = make_layer(rng, VOCAB, HIDDEN)
    quantized.update({f"lm_head.{suffix}": t for suffix, t in stored.items()})
    plain["lm_head.weight"] = wide.astype(np.float32)
    backend = select_backend("cpu")
    a = Model.load(write_model(tmp_path / "a", quantized, config), backend).run_prompt([1, 2, 3])
    b = Model.load(write_model(tmp_path / "b", plain, None), backend).run_prompt([1, 2, 3])
    assert np.abs(a - b).max() < tolerance * np.abs(b).max()


#: Checkpoints of a small random model by llm-compressor, GPTQModel and AutoAWQ, and the logits of the tool's own model for TOKENS
#: (docs/_build/quantize_demo_model.py --model tiny).
PRODUCED = Path(__file__).parent / "data" / "quantized"
TOKENS = [(7 * i * i + 3) % 256 for i in range(24)]


@pytest.mark.parametrize("name", sorted(path.name for path in PRODUCED.iterdir()))
def test_produced_checkpoints(name: str) -> None:
    """The logits that the tool computes from its own file. Activations that it quantizes in bfloat16 may round the other way."""
    assert produced_error(name, PRODUCED / name) < (0.02 if name.startswith("w8a8") else 2e-6)


def produced_error(name: str, directory: Path, **kwargs: Any) -> float:
    """Of the logits of `directory`, against the largest of the tool's."""
    want = np.load(PRODUCED / name / "logits.npy")
    got = Model.load(directory, select_backend("cpu"), "fp32", **kwargs).run_prompt(TOKENS)
    return float(np.abs(got - want).max() / np.abs(want).max())


#: A weight [128, 1024] of a random model of hidden size 1024, by the same tools, and the tool's own product of it with PROBE (--model wide).
PRODUCED_LAYERS = Path(__file__).parent / "data" / "quantized_layers"
LAYER, LAYER_SHAPE = "model.layers.1.self_attn.k_proj", (128, 1024)
PROBE = ((np.arange(4)[:, None] * 37 + np.arange(1024) * 101) % 251 - 125).astype(np.float32) / 128


def dequantized_layer(config: dict[str, Any], raw: Any) -> np.ndarray:
    """float64 from the file's bytes, by the formats' descriptions."""

    def optional(name: str) -> np.ndarray | None:
        return raw(name) if name in raw.names else None

    if config["quant_method"] == "awq":
        return reference.dequantize_awq(raw("qweight"), raw("qzeros"), raw("scales"), config["group_size"])
    if config["quant_method"] == "gptq":
        arguments = [raw(name) for name in ("qweight", "qzeros", "scales", "g_idx")]
        return reference.dequantize_gptq(*arguments, config["bits"], config["checkpoint_format"])
    weights = config["config_groups"]["group_0"]["weights"]
    if "weight_packed" in raw.names:
        groups = optional("weight_g_idx")
        if groups is None:
            groups = np.arange(LAYER_SHAPE[1]) // weights["group_size"]
        packed, scale, zero = raw("weight_packed"), raw("weight_scale"), optional("weight_zero_point")
        return reference.dequantize_compressed(
            packed, scale, zero, weights["num_bits"], LAYER_SHAPE[1], groups
        )
    return raw("weight").astype(np.float64) * reference.spread_blocks(raw("weight_scale"), LAYER_SHAPE)


@pytest.mark.parametrize("path", sorted(PRODUCED_LAYERS.iterdir()), ids=lambda path: path.stem)
def test_produced_layers(backend: Backend, tmp_path: Path, path: Path) -> None:
    shutil.copy(path, tmp_path / "model.safetensors")
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    raw_config = json.loads(header["__metadata__"]["quantization_config"])
    config, checkpoint = parse_quantization(raw_config), Checkpoint(tmp_path)
    assert config is not None
    weight = read_quantized(config, LAYER, LAYER_SHAPE, checkpoint.__contains__, checkpoint.raw, backend.raw)
    assert weight is not None

    def raw(name: str) -> np.ndarray:
        return checkpoint.raw(f"{LAYER}.{name}")

    raw.names = {key.removeprefix(f"{LAYER}.") for key in header}  # type: ignore[attr-defined]  # of a function
    wide = dequantized_layer(raw_config, raw)

    def host(
        x: Any,
    ) -> np.ndarray:  # results are of the tensors' kind: CuPy has no float8, so quire's own there
        return backend.host(backend.xp.from_dlpack(x) if isinstance(x, quire.Tensor) else x)

    np.testing.assert_array_equal(host(weight.dequantize("float32")), wide.astype(np.float32))
    # The tool multiplied in float32, and rounded activations where the format does.
    product, exact = checkpoint.raw("product").astype(np.float64), PROBE.astype(np.float64) @ wide.T
    magnitude = np.abs(PROBE).astype(np.float64) @ np.abs(wide).T
    rounds = path.stem.startswith(("w8a8", "fp8"))
    assert (np.abs(product - exact) <= magnitude * (2.0**-5 if rounds else 1e-6)).all()
    x = PROBE if backend.device == "cpu" else PROBE.astype(ml_dtypes.bfloat16)
    got = host(quire.quantized_matmul(backend.raw(x), weight))
    if rounds:
        assert (np.abs(got.astype(np.float64) - product) <= magnitude * 2.0**-5).all()
    else:
        assert_product_close(got, product, magnitude)


@pytest.mark.parametrize("name", ["gptqmodel-w4a16-32", "gptqmodel-w4a16-64-v2-zeros", "gptqmodel-w3a16-32"])
def test_mislabelled_checkpoints(tmp_path: Path, name: str) -> None:
    """What names the wrong checkpoint_format gives noise, and with the right one given what its tool meant."""
    directory = tmp_path / name
    shutil.copytree(PRODUCED / name, directory)
    config = json.loads((directory / "config.json").read_text())
    right = config["quantization_config"]["checkpoint_format"]
    wrong = {"gptq": "gptq_v2", "gptq_v2": "gptq"}[right]
    config["quantization_config"]["checkpoint_format"] = wrong
    (directory / "config.json").write_text(json.dumps(config))
    assert produced_error(name, directory) > 0.1
    assert produced_error(name, directory, checkpoint_format=right) < 2e-6


def test_checkpoint_format_of_others(tmp_path: Path, rng: np.random.Generator) -> None:
    for config, text in ((None, "none"), (CASES["awq"][0], "awq")):
        directory = write_model(tmp_path / text, common(rng), config)
        with pytest.raises(DemoError, match=f"expected a checkpoint of quant_method gptq, got {text}"):
            Model.load(directory, select_backend("cpu"), checkpoint_format="gptq_v2")


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        ("awq", "expected an object"),
        ({"quant_method": "squeezellm"}, "unknown quant_method 'squeezellm'; known are awq, gptq"),
        ({}, "unknown quant_method None"),
        ({"quant_method": ["awq"]}, "unknown quant_method"),
        ({"quant_method": "awq", "bits": 3}, "bits: expected 4, got 3"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "unknown AWQ version 'gemv'"),
        (
            {"quant_method": "awq", "bits": 4, "group_size": 0},
            "group_size: expected -1 or a positive integer, got 0",
        ),
        ({"quant_method": "gptq", "bits": True}, "bits: expected 2 or 3 or 4 or 8, got True"),
        (
            {"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"},
            "unknown checkpoint_format 'marlin'",
        ),
        ({"quant_method": "gptq", "bits": 4, "group_size": 1.5}, "group_size: expected .*, got 1.5"),
        (
            {"quant_method": "gptq", "bits": 4, "group_size": 2**62},
            "group_size: expected .*, got 4611686018427387904",
        ),
        ({"quant_method": "gptq", "bits": 4, "group_size": -2}, "group_size: expected .*, got -2"),
        (
            {"quant_method": "gptq", "bits": 2**64},
            "bits: expected 2 or 3 or 4 or 8, got 18446744073709551616",
        ),
        ({"quant_method": "gptq", "bits": "4"}, "bits: expected 2 or 3 or 4 or 8, got '4'"),
        ({"quant_method": "gptq", "bits": 5}, "bits: expected 2 or 3 or 4 or 8, got 5"),
        ({"quant_method": "gptq"}, "bits: expected 2 or 3 or 4 or 8, got None"),
        (
            {"quant_method": "fp8", "weight_block_size": [2**62, 1]},
            r"weight_block_size: expected \[128, 128\]",
        ),
        ({"quant_method": "fp8", "weight_block_size": [64, 64]}, r"weight_block_size: expected \[128, 128\]"),
        ({"quant_method": "compressed-tensors"}, "config_groups: expected an object"),
        (
            {"quant_method": "compressed-tensors", "config_groups": {"g": {}}},
            "g: weights: expected an object",
        ),
        (compressed_config("nvfp4-pack-quantized"), "unknown format 'nvfp4-pack-quantized'"),
        (compressed_config("pack-quantized", 5), "bits: expected 4 or 8, got 5"),
    ],
)
def test_bad_configs(raw: Any, text: str) -> None:
    with pytest.raises(DemoError, match=text):
        parse_quantization(raw)


def test_several_kinds_of_weights_are_refused() -> None:
    raw = compressed_config("pack-quantized", 4, 128)
    raw["config_groups"]["group_1"] = compressed_config("pack-quantized", 8, 128)["config_groups"]["group_0"]
    with pytest.raises(DemoError, match="expected one kind of weights, got several"):
        parse_quantization(raw)


def hostile_shape(_: np.ndarray) -> np.ndarray:
    return np.array([2**62, 2**62], np.int64)


@pytest.mark.parametrize(
    ("case", "name", "change", "text"),
    [
        ("awq", "qweight", lambda t: t[:-1], r"expected a weight of shape \[256, 128\], got \[256, 127\]"),
        ("awq", "qweight", lambda t: t[:-32], "scales: expected 3 groups of 32, got 4"),
        ("awq", "qweight", lambda t: t[:, :-1], r"scales: expected \d+ columns, as qweight has \d+ of words, got \d+"),
        ("awq", "qweight", lambda t: t.astype(np.int64), "qweight: expected int32, got int64"),
        ("awq", "qweight", lambda t: t[None], r"qweight: expected rank 2, got int32 \[1, "),
        ("awq", "qzeros", lambda t: t[:, :-1], r"qzeros: expected int32 \[4, 32\], got int32 \[4, 31\]"),
        ("awq", "qzeros", lambda t: t[:-1], r"qzeros: expected int32 \[4, 32\], got int32 \[3, 32\]"),
        ("awq", "scales", lambda t: t[:-1], r"qzeros: expected int32 \[3, 32\], got int32 \[4, 32\]"),
        ("awq", "scales", lambda t: t * np.float16(np.nan), r"scales: expected finite values of 0 or more, got nan at \[0, 0\]"),
        ("awq", "scales", lambda t: -t, "scales: expected finite values of 0 or more, got -0.0"),
        ("awq", "scales", lambda t: t.astype(np.int32), "scales: expected float32, float16 or bfloat16, got int32"),
        ("awq", "scales", None, "tensor '.*scales' is missing"),
        ("awq", "qweight", None, "expected all of them quantized or none"),
        ("gptq", "qweight", lambda t: t[:-1], "qweight: expected 16 rows for a g_idx of 128, got 15"),
        ("gptq", "qweight", lambda t: t[:, :-1], "scales: expected .* got"),
        ("gptq", "qzeros", lambda t: t[:, 1:], r"qzeros: expected int32 \[2, 32\], got int32 \[2, 31\]"),
        ("gptq", "qzeros", lambda t: np.concatenate([t, t]), r"qzeros: expected int32 \[2, 32\], got int32 \[4, 32\]"),
        ("gptq", "scales", lambda t: np.concatenate([t, t]), "scales: expected 2 groups of 64, got 4|qzeros: expected"),
        ("gptq", "scales", lambda t: t * np.float16(np.nan), "scales: expected finite values, got nan"),
        ("gptq", "g_idx", lambda t: t + np.int32(1), r"g_idx: expected a group in \[0, 2\), got 2 at \[64\]"),
        ("gptq", "g_idx", lambda t: t - np.int32(2**31 - 1), r"g_idx: expected a group in \[0, 2\), got -2147483647 at \[0\]"),
        ("gptq", "g_idx", lambda t: t.astype(np.int64) + 2**40, r"g_idx: expected a group in \[0, 2\), got 1099511627776 at \[0\]"),
        ("gptq", "g_idx", lambda t: t[:-1], r"expected a weight of shape \[256, 128\], got \[256, 127\]"),
        ("gptq", "g_idx", lambda t: t[:-8], "qweight: expected 15 rows for a g_idx of 120, got 16"),
        ("gptq", "g_idx", lambda t: t.astype(np.float32), "g_idx: expected int32, got float32"),
        ("gptq-v2", "qweight", lambda t: t[::2], "qweight: expected 32 rows for a g_idx of 128, got 16"),  # that of 4 bits
        ("w4a16", "weight_shape", hostile_shape, r"weight_shape: expected \[256, 128 or a little less\], got \[4611686018427387904"),
        ("w4a16", "weight_shape", lambda t: -t, r"weight_shape: expected .* got \[-256, -128\]"),
        ("w4a16", "weight_packed", lambda t: t[:, :-1], "weight_shape: expected|weight_scale: expected"),
        ("w4a16", "weight_scale", lambda t: t[:-1], r"weight_scale: expected .* got"),
        ("w4a16", "weight_scale", lambda t: -t, "weight_scale: expected finite values of 0 or more, got -0.0"),
        ("w8a8", "weight_scale", lambda t: t * np.float32(np.nan), "scale: expected finite values of 0 or more, got nan"),
        ("w8a8", "weight_scale", lambda t: t[:-1], "scale: expected .* got"),
        ("w8a8", "weight", lambda t: t[:, :-1], r"expected a weight of shape \[256, 128\], got \[256, 127\]"),
        ("fp8-tensor", "weight_scale", lambda t: -t, "scale: expected finite values of 0 or more, got -0.0"),
        ("fp8-block", "weight_scale_inv", lambda t: np.concatenate([t, t]), r"scale: expected .*\[2, 1\], got float32 \[4, 1\]"),
        ("fp8-block", "weight", lambda t: t.astype(np.float32).astype(np.int8), "expected float8_e4m3fn, got int8"),
    ],
)  # fmt: skip
def test_bad_tensors(
    rng: np.random.Generator, tmp_path: Path, case: str, name: str, change: Any, text: str
) -> None:
    """The error names the layer, the tensor, what was expected and what is there."""
    config, make_layer, _ = CASES[case]
    tensors = common(rng)
    for layer in range(LAYERS):
        for linear, (out, into) in LINEARS.items():
            stored, _ = make_layer(rng, out, into)
            tensors.update({f"model.layers.{layer}.{linear}.{suffix}": t for suffix, t in stored.items()})
    key = f"model.layers.1.mlp.up_proj.{name}"
    if change is None:
        del tensors[key]
    else:
        tensors[key] = change(tensors[key])
    directory = write_model(tmp_path / "bad", tensors, config)
    with pytest.raises(DemoError, match=text) as error:
        Model.load(directory, select_backend("cpu"))
    assert "up_proj" in str(error.value)


def test_hostile_header(tmp_path: Path, rng: np.random.Generator) -> None:
    """A shape whose number of bytes overflows 64 bits is no shape of the bytes that are there."""
    config, make_layer, _ = CASES["gptq"]
    directory = write_model(tmp_path / "model", {"x.qweight": make_layer(rng, 32, 64)[0]["qweight"]}, config)
    path = directory / "model.safetensors"
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    for shape in ([2**62, 4], [2**63, 2**63], [2**31, 2**33]):
        header = json.loads(content[8 : 8 + size])
        header["x.qweight"]["shape"] = shape
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])
        with pytest.raises(
            DemoError, match=r"tensor 'x.qweight': shape \[.*\] of I32 does not have 1024 bytes"
        ):
            Checkpoint(directory)


def test_config_is_read(tmp_path: Path, rng: np.random.Generator) -> None:
    config = CASES["gptq"][0]
    read = read_config(write_model(tmp_path / "model", common(rng), config)).quantization
    assert read is not None
    assert (read.method, read.bits, read.group_size, read.checkpoint_format) == ("gptq", 4, 64, "gptq")
