"""Quantizes the embedded demo model with llm-compressor, for the table of docs/quantization.md and for the tests' data.

SPDX-License-Identifier: Apache-2.0

Needs llmcompressor, torch and transformers. `python docs/_build/quantize_demo_model.py OUT` writes one checkpoint to a folder of OUT
for each scheme; `--tiny` takes a layer of a random model instead, whose files are small (tests/python/data/quantized), and stores beside each
checkpoint the logits of the tool's own model for TOKENS.
"""

from __future__ import annotations

import argparse
import re
import shutil
from pathlib import Path

import numpy as np
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

REPOSITORY = Path(__file__).resolve().parents[2]
MODEL = REPOSITORY / "python" / "quire" / "demo" / "model"
HELD_OUT = REPOSITORY / "tests" / "python" / "data" / "demo_held_out.txt"
TINY_VOCAB, TOKENS = 256, [(7 * i * i + 3) % 256 for i in range(24)]
NUM_CALIBRATION, LENGTH = 16, 512  # the first tokens of the held-out text; the table is made from the last


def weights(bits: int, group_size: int | None, *, kind: str = "int", symmetric: bool = True, strategy: str | None = None):
    strategy = strategy or ("group" if group_size else "channel")
    return QuantizationArgs(
        num_bits=bits, type=kind, symmetric=symmetric, strategy=strategy, group_size=group_size
    )


def scheme(weight, activations=None):
    return {"group_0": QuantizationScheme(targets=["Linear"], weights=weight, input_activations=activations)}


def dynamic(kind: str):
    return QuantizationArgs(num_bits=8, type=kind, symmetric=True, strategy="token", dynamic=True)


def static(kind: str, *, symmetric: bool = True):
    return QuantizationArgs(num_bits=8, type=kind, symmetric=symmetric, strategy="tensor", dynamic=False)


def recipes():
    """Each scheme's name and recipe."""
    ignore = ["lm_head"]
    for size in (32, 64):
        groups = scheme(weights(4, size))
        yield f"w4a16-gptq-{size}", [GPTQModifier(config_groups=groups, ignore=ignore)]
        groups = scheme(weights(4, size, symmetric=False))
        yield (
            f"w4a16-awq-{size}",
            [AWQModifier(duo_scaling=False), QuantizationModifier(config_groups=groups, ignore=ignore)],
        )
    others = {
        "w8a16-rtn-64": scheme(weights(8, 64)),
        "w8a8-dynamic": scheme(weights(8, None), dynamic("int")),
        "w8a8-static-asym": scheme(weights(8, None), static("int", symmetric=False)),
        "fp8-dynamic": scheme(weights(8, None, kind="float"), dynamic("float")),
        "fp8-static": scheme(weights(8, None, kind="float", strategy="tensor"), static("float")),
    }
    for name, groups in others.items():
        yield name, [QuantizationModifier(config_groups=groups, ignore=ignore)]


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=TINY_VOCAB, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=512, bos_token_id=0, eos_token_id=0,
        pad_token_id=None, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(torch.bfloat16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--only", help="a regular expression")
    args = parser.parse_args()
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(MODEL / "tokenizer.json"))
    ids = tokenizer(HELD_OUT.read_text())["input_ids"][: NUM_CALIBRATION * LENGTH]
    rows = [ids[i : i + LENGTH] for i in range(0, len(ids), LENGTH)]
    if args.tiny:
        rows = [[token % TINY_VOCAB for token in row] for row in rows]
    data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * LENGTH for _ in rows]})
    if not torch.accelerator.is_available():  # AWQ pins memory, which needs one
        torch.Tensor.pin_memory = lambda self, *_, **__: self
    source = MODEL
    if args.tiny:
        source = args.out / "plain"
        tiny_model().save_pretrained(source)
    for name, recipe in recipes():
        if args.only and not re.search(args.only, name):
            continue
        directory = args.out / name
        if directory.exists():
            continue
        model = LlamaForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
        oneshot(
            model=model, dataset=data, recipe=recipe, num_calibration_samples=NUM_CALIBRATION,
            max_seq_length=LENGTH, processor=tokenizer, shuffle_calibration_samples=False,
        )  # fmt: skip
        model.save_pretrained(directory, save_compressed=True)
        if args.tiny:
            own = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32)
            with torch.no_grad():
                logits = own(torch.tensor([TOKENS])).logits[0].float().numpy()
            np.save(directory / "logits.npy", logits)
            for name_ in ("generation_config.json", "recipe.yaml"):
                (directory / name_).unlink(missing_ok=True)
        else:
            shutil.copy(MODEL / "tokenizer.json", directory)
        print(name, sum(f.stat().st_size for f in directory.glob("*.safetensors")))


if __name__ == "__main__":
    main()
