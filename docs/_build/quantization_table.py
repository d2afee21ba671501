"""Perplexities of the demo model in every format, for docs/quantization.md: a table on stdout and a plot.

SPDX-License-Identifier: Apache-2.0

`python docs/_build/quantization_table.py CHECKPOINTS... [--plot docs/quantization.png]`, where quantize_demo_model.py has filled the
folders CHECKPOINTS. The other rows are quantized here, each element to the nearest code. Everything runs on the CPU in float32 otherwise.
"""

from __future__ import annotations

import argparse
import json
import re
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


def describe(directory: Path) -> tuple[str, str]:
    """Format and maker of a checkpoint of quantize_demo_model.py."""
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    name = directory.name
    if "config_groups" in config:
        weights = config["config_groups"]["group_0"]["weights"]
        bits, size, symmetric = weights["num_bits"], weights["group_size"], weights["symmetric"]
        maker = f"{'AWQ' if 'awq' in name else 'GPTQ'} (llm-compressor)"
    else:
        bits, size = config["bits"], config["group_size"]
        symmetric = not config.get("zero_point", not config.get("sym", False))
        maker = "AWQ (AutoAWQ)" if name.startswith("autoawq") else "GPTQ (GPTQModel)"
    text = f"W{bits}A16, groups of {size}" + ("" if symmetric else ", zeros") + (", act-order" if config.get("desc_act") else "")
    return text, maker


def rounded(**kwargs: object) -> Model:
    """The demo model with every linear layer quantized to nearest."""
    model = Model(read_config(MODEL), Checkpoint(MODEL), Backend(), "fp32")
    for layer in model.layers:
        for name in ("qkv", "output", "gate_up", "down"):
            packed = quire.PackedWeight.quantize(getattr(layer, name), **kwargs)  # type: ignore[arg-type]  # of several types
            setattr(layer, name, (packed,))
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoints", type=Path, nargs="*")
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
    found = [directory for folder in args.checkpoints for directory in folder.iterdir() if (directory / "config.json").is_file()]
    described = [(*describe(directory), directory) for directory in found if directory.name != "plain"]

    def natural(row: tuple[str, str, Path]) -> list[int | str]:
        """Numbers by their size."""
        return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", row[0])]

    for name, maker, directory in sorted(sorted(described), key=natural):
        add(name, maker, Model.load(directory, Backend(), "fp32"))
    if args.plot:
        plot(rows, args.plot)


def plot(rows: list[tuple[str, str, int, float]], path: Path) -> None:
    """All formats beside those of 4 bits alone."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(11, 5), dpi=110)
    for panel, shown in zip(panels, ("", "W4A16"), strict=True):
        for index, maker in enumerate(dict.fromkeys(row[1] for row in rows)):
            chosen = [r for r in rows if r[1] == maker and r[0].startswith(shown) and r[3] < 1.15 * rows[0][3]]
            style = {"marker": "so^vDP"[index], "c": f"C{index}", "s": 22, "label": maker or "bfloat16"}
            panel.scatter([r[2] / 1e6 for r in chosen], [r[3] for r in chosen], **style)
            for name, _, size, value in chosen:
                short = name.split(",", 1)[-1].replace("groups of", "").strip() if shown else name.split(",")[0]
                if shown or name.startswith(("bf", "W8", "INT8", "FP8, scale per channel")):
                    offset = (4, -8) if name.startswith("INT8") else (4, 4)
                    panel.annotate(short, (size / 1e6, value), fontsize=7, xytext=offset, textcoords="offset points")
        panel.axhline(rows[0][3], lw=0.5, color="grey")
        panel.margins(x=0.15)
        panel.set_xlabel("bytes of the linear layers as packed (MB)")
        panel.set_ylabel("perplexity")
        panel.set_title("W4A16, by group size" if shown else "all (W3A16 above 25.5, W4A16 below)", fontsize=9)
    panels[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    main()
