"""Tokens a second of Hugging Face transformers' generate() with each attention implementation, on a Llama of random weights.

SPDX-License-Identifier: Apache-2.0

    python -m quire.bench.transformers_decode --batch 1 8 --prompt 1024 --tokens 64

Prefill is generate() of one token; decode is what more tokens take beyond that. The host, which launches the model op by op, bounds
small batches.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import quire.transformers  # noqa: F401  (makes "quire" known)
from quire.bench import description

__all__ = ["SIZES", "main"]

SIZES: dict[str, dict[str, Any]] = {
    "1b": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131072,
    },
    "tiny": {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 4096,
    },
}


def _seconds(model: PreTrainedModel, prompt: torch.Tensor, tokens: int) -> float:
    """Of one generate() of exactly so many tokens."""
    start = time.perf_counter()
    out = model.generate(  # type: ignore[operator, unused-ignore]  # torch types a module's attributes as tensors, too
        prompt,
        attention_mask=torch.ones_like(prompt),
        min_new_tokens=tokens,
        max_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
    )
    out.cpu()
    return time.perf_counter() - start


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a table."""
    parser = argparse.ArgumentParser(prog="python -m quire.bench.transformers_decode", description=description(__doc__),
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    add = parser.add_argument
    add("--size", choices=SIZES, default="1b")
    add("--device", default="cuda")
    add("--dtype", default="bfloat16")
    add("--batch", type=int, nargs="+", default=[1, 8])
    add("--prompt", type=int, default=1024, help="tokens of each prompt (%(default)s)")
    add("--tokens", type=int, default=64, help="tokens to generate, 2 or more (%(default)s)")
    add("--attention", nargs="+", default=["eager", "sdpa", "quire"])
    add("--rounds", type=int, default=3)
    args = parser.parse_args(arguments)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES[args.size], eos_token_id=None, pad_token_id=0, bos_token_id=1)
    with torch.device(args.device):
        make: Any = AutoModelForCausalLM.from_config
        model = make(config, dtype=getattr(torch, args.dtype)).eval()
    print(
        f"| sequences | prompt | attention | prefill, tokens/s | decode, tokens/s | against {args.attention[0]} |"
    )
    print("|---:|---:|---|---:|---:|---:|")
    with torch.inference_mode():
        for batch in args.batch:
            prompt = torch.randint(2, config.vocab_size, (batch, args.prompt), device=args.device)
            times: dict[str, list[tuple[float, float]]] = {name: [] for name in args.attention}
            for turn in range(args.rounds + 1):
                for name in args.attention:
                    model.set_attn_implementation(name)
                    first, all_tokens = (_seconds(model, prompt, n) for n in (1, args.tokens))
                    if turn > 0:  # the first is warm-up
                        times[name].append((first, all_tokens - first))
            base = 0.0
            for name, pairs in times.items():
                prefill, decode = (statistics.median(column) for column in zip(*pairs, strict=True))
                rate = batch * (args.tokens - 1) / decode
                base = base or rate
                print(
                    f"| {batch} | {args.prompt} | {name} | {batch * args.prompt / prefill:.0f} | {rate:.0f} | "
                    f"{rate / base:.2f}x |",
                    flush=True,
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
