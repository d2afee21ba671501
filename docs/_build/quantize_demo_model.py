"""Quantizes models with published tools, for the table of docs/quantization.md and for the tests' data.

SPDX-License-Identifier: Apache-2.0

`python docs/_build/quantize_demo_model.py OUT --tool TOOL [--model tiny|wide]` writes one checkpoint to a folder of OUT for each scheme
that TOOL (llm-compressor, gptqmodel, autoawq; each wants an environment of its own) has. Without --model it takes the embedded demo model.
"tiny" is one layer of a random model, whose files are small (tests/python/data/quantized); beside each checkpoint lie the logits of the
tool's own model for TOKENS. "wide" is a random model of two layers and hidden size 1024, of which one weight and the tool's product with
PROBE are kept (tests/python/data/quantized_layers). Everything runs on the CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "4")  # GPTQModel's default on two cores is fewer than it asks for

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

REPOSITORY = Path(__file__).resolve().parents[2]
MODEL = REPOSITORY / "python" / "quire" / "demo" / "model"
HELD_OUT = REPOSITORY / "tests" / "python" / "data" / "demo_held_out.txt"
TINY_VOCAB, TOKENS = 256, [(7 * i * i + 3) % 256 for i in range(24)]
NUM_CALIBRATION, LENGTH = 16, 512  # the first tokens of the held-out text; the table is made from the last
WIDE, WIDE_LAYER = 1024, "model.layers.1.self_attn.k_proj"
PROBE = torch.from_numpy(((np.arange(4)[:, None] * 37 + np.arange(WIDE) * 101) % 251 - 125).astype(np.float32) / 128)

# Each scheme: its name, and what makes the checkpoint of the model in a folder and returns the tool's model.
Scheme = tuple[str, Callable[[Path, Path, list[list[int]]], Any]]


def random_model(name: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {
        "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
                 "head_dim": 32},
        "wide": {"hidden_size": WIDE, "intermediate_size": WIDE, "num_hidden_layers": 2, "num_attention_heads": 16,
                 "num_key_value_heads": 2, "head_dim": 64},
    }[name]  # fmt: skip
    config = LlamaConfig(
        vocab_size=TINY_VOCAB, max_position_embeddings=512, bos_token_id=0, eos_token_id=0, pad_token_id=None, tie_word_embeddings=True,
        **sizes,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(torch.bfloat16)


# ---- llm-compressor ----------------------------------------------------------------------------------------------------------------


def llm_compressor(name: str) -> Iterator[Scheme]:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier

    torch.Tensor.pin_memory = lambda self, *_, **__: self  # AWQ pins memory, which needs an accelerator

    def weights(bits: int, size: int | None, strategy: str = "", **kwargs: Any) -> QuantizationArgs:
        kwargs = {"type": "int", "symmetric": True, "strategy": strategy or ("group" if size else "channel"), **kwargs}
        return QuantizationArgs(num_bits=bits, group_size=size, **kwargs)

    def scheme(weight: QuantizationArgs, **activations: Any) -> dict[str, QuantizationScheme]:
        inputs = QuantizationArgs(num_bits=8, **activations) if activations else None
        return {"group_0": QuantizationScheme(targets=["Linear"], weights=weight, input_activations=inputs)}

    def maker(*modifiers: Any) -> Callable[[Path, Path, list[list[int]]], Any]:
        def make(source: Path, target: Path, rows: list[list[int]]) -> Any:
            data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
            tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(MODEL / "tokenizer.json"))
            model = LlamaForCausalLM.from_pretrained(source, dtype=torch.bfloat16 if name == "tiny" else torch.float32)
            oneshot(
                model=model, dataset=data, recipe=list(modifiers), num_calibration_samples=len(rows),
                max_seq_length=LENGTH, processor=tokenizer, shuffle_calibration_samples=False,
            )  # fmt: skip
            model.save_pretrained(target, save_compressed=True)
            return LlamaForCausalLM.from_pretrained(target, dtype=torch.float32)

        return make

    ignore = ["lm_head"]
    for size in (128,) if name == "wide" else (32, 64):
        order: dict[str, Any] = {"actorder": "weight"} if name == "wide" else {}
        yield f"w4a16-gptq-{size}", maker(GPTQModifier(config_groups=scheme(weights(4, size, **order)), ignore=ignore))
        groups = scheme(weights(4, size, symmetric=False))
        yield f"w4a16-awq-{size}", maker(AWQModifier(duo_scaling=False), QuantizationModifier(config_groups=groups, ignore=ignore))
    token = {"symmetric": True, "strategy": "token", "dynamic": True}
    others = {
        "w8a16-rtn-64": scheme(weights(8, 64)),
        "w8a8-dynamic": scheme(weights(8, None), type="int", **token),
        "w8a8-static-asym": scheme(weights(8, None), type="int", symmetric=False, strategy="tensor", dynamic=False),
        "fp8-dynamic": scheme(weights(8, None, type="float"), type="float", **token),
        "fp8-static": scheme(weights(8, None, "tensor", type="float"), type="float", symmetric=True, strategy="tensor", dynamic=False),
        "fp8-block": scheme(
            weights(8, None, "block", type="float", block_structure=[128, 128]),
            type="float", symmetric=True, strategy="group", group_size=128, dynamic=True,
        ),
    }  # fmt: skip
    for key, groups in others.items():
        if name == "wide" or key != "fp8-block":
            yield key, maker(QuantizationModifier(config_groups=groups, ignore=ignore))


# ---- GPTQModel ---------------------------------------------------------------------------------------------------------------------


def gptqmodel(name: str) -> Iterator[Scheme]:
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    def maker(**kwargs: Any) -> Callable[[Path, Path, list[list[int]]], Any]:
        def make(source: Path, target: Path, rows: list[list[int]]) -> Any:
            model = GPTQModel.load(str(source), QuantizeConfig(**kwargs), device="cpu", dtype=torch.float32)
            data = [{"input_ids": torch.tensor([row]), "attention_mask": torch.ones(1, len(row), dtype=torch.long)} for row in rows]
            model.quantize(data, batch_size=1)
            model.save(str(target))
            # The kernel loads in 16 bits only, and computes in any.
            return GPTQModel.load(str(target), device="cpu", backend=BACKEND.TORCH, dtype=torch.float16).model.float()

        return make

    plain = {"sym": True, "desc_act": False, "act_group_aware": False}
    for size in {"wide": (128,), "tiny": (32, 64)}.get(name, (32, 64, 128)):
        for bits in (4, 3):
            yield f"gptqmodel-w{bits}a16-{size}", maker(bits=bits, group_size=size, **plain)
    size = 128 if name == "wide" else 64
    yield f"gptqmodel-w4a16-{size}-act-order", maker(bits=4, group_size=size, sym=True, desc_act=True, act_group_aware=False)
    yield f"gptqmodel-w4a16-{size}-v2-zeros", maker(bits=4, group_size=size, sym=False, desc_act=False, format="gptq_v2")
    if name:
        yield f"gptqmodel-w8a16-{size}", maker(bits=8, group_size=size, **plain)
        yield f"gptqmodel-w2a16-{size}", maker(bits=2, group_size=size, **plain)


# ---- AutoAWQ -----------------------------------------------------------------------------------------------------------------------


def autoawq(name: str) -> Iterator[Scheme]:
    from awq import AutoAWQForCausalLM
    from awq.utils.packing_utils import dequantize_gemm

    def maker(size: int) -> Callable[[Path, Path, list[list[int]]], Any]:
        def make(source: Path, target: Path, rows: list[list[int]]) -> Any:
            tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(MODEL / "tokenizer.json"))
            model = AutoAWQForCausalLM.from_pretrained(str(source), device_map="cpu", torch_dtype=torch.float32, use_cache=False)
            config = {"zero_point": True, "q_group_size": size, "w_bit": 4, "version": "GEMM"}
            model.quantize(
                tokenizer, quant_config=config, calib_data=rows, max_calib_samples=len(rows), max_calib_seq_len=LENGTH,
                apply_clip=name != "tiny",  # which clips 64 output features at a time, and no fewer
            )  # fmt: skip
            model.save_quantized(str(target))
            # Its layers want a GPU or Intel's extension; its dequantization does not.
            state = load_file(target / "model.safetensors")
            for key in [key.removesuffix(".qweight") for key in state if key.endswith(".qweight")]:
                qweight, qzeros, scales = (state.pop(f"{key}.{name}") for name in ("qweight", "qzeros", "scales"))
                state[f"{key}.weight"] = dequantize_gemm(qweight, qzeros, scales.float(), 4, size).t()
            own = LlamaForCausalLM.from_pretrained(source, torch_dtype=torch.float32)
            odd = own.load_state_dict(state, strict=False)
            assert not odd.unexpected_keys, odd
            assert odd.missing_keys in ([], ["lm_head.weight"]), odd
            return own

        return make

    for size in (128,) if name == "wide" else (32, 64):
        yield f"autoawq-w4a16-{size}", maker(size)


TOOLS = {"llm-compressor": llm_compressor, "gptqmodel": gptqmodel, "autoawq": autoawq}


def keep_layer(directory: Path, own: Any, target: Path) -> None:
    """One weight, the tool's product with PROBE and the config, in one file."""
    stored = load_file(directory / "model.safetensors")
    tensors = {k: v.contiguous() for k, v in stored.items() if k.startswith(WIDE_LAYER)}
    with torch.no_grad():
        own(torch.tensor([TOKENS]))  # with which compressed-tensors unpacks its weights
        tensors["product"] = dict(own.named_modules())[WIDE_LAYER](PROBE).float().contiguous()
    target.mkdir(parents=True, exist_ok=True)
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    save_file(tensors, target / f"{directory.name}.safetensors", {"quantization_config": json.dumps(config)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tool", choices=TOOLS, required=True)
    parser.add_argument("--model", choices=("tiny", "wide"), default="")
    parser.add_argument("--only", help="a regular expression")
    parser.add_argument("--samples", type=int, default=NUM_CALIBRATION)
    args = parser.parse_args()
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(MODEL / "tokenizer.json"))
    ids = tokenizer(HELD_OUT.read_text())["input_ids"][: args.samples * LENGTH]
    rows = [ids[i : i + LENGTH] for i in range(0, len(ids), LENGTH)]
    source = args.out / "plain"
    source.mkdir(parents=True, exist_ok=True)
    if args.model:
        rows = [[token % TINY_VOCAB for token in row] for row in rows]
        random_model(args.model).save_pretrained(source)
    else:
        for name in ("config.json", "model.safetensors", "tokenizer.json"):
            shutil.copy(MODEL / name, source)
    if args.tool == "autoawq":  # whose transformers knows the older key
        config = json.loads((source / "config.json").read_text())
        config["rope_theta"] = config.pop("rope_parameters", {"rope_theta": 10000.0})["rope_theta"]
        (source / "config.json").write_text(json.dumps(config, indent=2))
    shutil.copy(MODEL / "tokenizer.json", source)
    (source / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    for name, make in TOOLS[args.tool](args.model):
        directory = args.out / name
        if directory.exists() or (args.only and not re.search(args.only, name)):
            continue
        own = make(source, directory, rows)
        if args.model == "wide":
            keep_layer(directory, own, args.out / "layers")
        if args.model == "tiny":
            with torch.no_grad():
                logits = own(torch.tensor([TOKENS])).logits[0].float().numpy()
            np.save(directory / "logits.npy", logits)
            for file in directory.iterdir():
                if file.name not in ("config.json", "model.safetensors", "logits.npy"):
                    file.unlink()
        else:
            shutil.copy(MODEL / "tokenizer.json", directory)
        print(name, sum(f.stat().st_size for f in directory.glob("*.safetensors")), flush=True)


if __name__ == "__main__":
    main()
