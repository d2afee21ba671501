"""Perplexities of the demo model in every format, for docs/quantization.md: a table on stdout and a plot.

SPDX-License-Identifier: Apache-2.0

`python docs/_build/quantization_table.py CHECKPOINTS [--plot docs/quantization.png]`, where quantize_demo_model.py has filled the folder
CHECKPOINTS. The other rows are quantized here, each element to the nearest code. Everything runs on the CPU in float32 otherwise.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

import quire
from quire.demo.backend import Backend
from quire.demo.checkpoint import Checkpoint
from quire.demo.config import read_config
from quire.demo.model import Model

REPOSITORY = Path(__file__).resolve().parents[2]
MODEL = Path(quire.__file__).parent / "demo" / "model"
HELD_OUT = REPOSITORY / "tests" / "python" / "data" / "demo_held_out.txt"
NUM_WINDOWS, LENGTH = 16, 512  # the last tokens of the held-out text; calibration is on the first


def linear_bytes(model: Model) -> int:
    """Bytes of the layers' weights with their scales, a float weight counted in bfloat16."""
    total = 0
    for layer in model.layers:
        for weight in (layer.qkv, layer.output, layer.gate_up, layer.down):
            if isinstance(weight, tuple):
                total += sum(w.nbytes for w in weight)
            else:
                total += weight.size * 2
    return total


def perplexity(model: Model, ids: list[int]) -> float:
    loss, count = 0.0, 0
    for begin in range(len(ids) - NUM_WINDOWS * LENGTH, len(ids), LENGTH):
        window = ids[begin : begin + LENGTH]
        logits = model.run_prompt(window)[:-1].astype(np.float64)
        top = logits.max(-1, keepdims=True)
        lse = np.log(np.exp(logits - top).sum(-1)) + top[:, 0]
        loss += float((lse - logits[np.arange(LENGTH - 1), window[1:]]).sum())
        count += LENGTH - 1
    return float(np.exp(loss / count))


def rounded(**kwargs: object) -> Model:
    """The demo model with every linear layer quantized to nearest."""
    model = Model(read_config(MODEL), Checkpoint(MODEL), Backend(), "fp32")
    for layer in model.layers:
        for name in ("qkv", "output", "gate_up", "down"):
            setattr(layer, name, (quire.PackedWeight.quantize(getattr(layer, name), **kwargs),))  # type: ignore[arg-type]
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoints", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    ids = Tokenizer.from_file(str(MODEL / "tokenizer.json")).encode(HELD_OUT.read_text()).ids
    rows: list[tuple[str, str, int, float]] = []

    def add(name: str, maker: str, model: Model) -> None:
        rows.append((name, maker, linear_bytes(model), perplexity(model, ids)))
        print(f"| {name} | {maker} | {rows[-1][2]:,} | {rows[-1][3]:.3f} |", flush=True)

    print("| format | by | bytes of the linear layers | perplexity |\n|---|---|---:|---:|")
    add("bfloat16", "", Model.load(MODEL, Backend(), "fp32"))
    for bits in (8, 4, 3, 2):
        for group_size in (32, 64, 128):
            if bits in (8, 2) and group_size != 128:
                continue
            for symmetric in (True, False):
                if bits == 8 and not symmetric:
                    continue
                kind = "" if symmetric else ", zeros"
                model = rounded(format=f"w{bits}a16", group_size=group_size, symmetric=symmetric)
                add(f"W{bits}A16, groups of {group_size}{kind}", "round to nearest", model)
    for granularity in ("tensor", "channel", "block"):
        add(f"FP8, scale per {granularity}", "round to nearest", rounded(format="fp8", granularity=granularity))
    add("INT8 W8A8, scale per channel", "round to nearest", rounded(format="w8a8"))
    for directory in sorted(args.checkpoints.iterdir()):
        if (directory / "config.json").is_file():
            add(directory.name, "llm-compressor", Model.load(directory, Backend(), "fp32"))
    if args.plot:
        plot(rows, args.plot)


def plot(rows: list[tuple[str, str, int, float]], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), dpi=120)
    for maker, marker in (("", "s"), ("round to nearest", "o"), ("llm-compressor", "^")):
        chosen = [r for r in rows if r[1] == maker and r[3] < 1.35 * rows[0][3]]
        axes.scatter([r[2] / 1e6 for r in chosen], [r[3] for r in chosen], marker=marker, label=maker or "bfloat16")
        for name, _, size, value in chosen:
            axes.annotate(name, (size / 1e6, value), fontsize=5, xytext=(3, 3), textcoords="offset points")
    axes.axhline(rows[0][3], lw=0.5, color="grey")
    axes.set_xlabel("bytes of the linear layers as packed (MB)")
    axes.set_ylabel("perplexity")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    main()
