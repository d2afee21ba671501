"""Trains the demo's model: `python -m quire.demo.train --text kjv.txt --out DIR`.

SPDX-License-Identifier: Apache-2.0

This is the only file of the demo that needs torch and transformers, and it imports nothing else of quire. On
one data-centre GPU a run takes a few minutes. The text is the King James Bible (public domain), as Debian
packages it:

    apt-get install bible-kjv bible-kjv-text
    bible -l 100000 gen1:1-rev22:21 > kjv.txt

Every chapter becomes one document, `<|endoftext|>Genesis 1\\n\\nverse\\nverse\\n…`, without verse numbers.
Each 20th chapter is held out of the training of tokenizer and model; the weights kept are those of the
evaluation with the lowest held-out loss.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
from pathlib import Path
from typing import Any

HOLD_OUT_EVERY = 20  # one chapter in 20 is held out
HOLD_OUT_PHASE = 7
END_OF_TEXT = "<|endoftext|>"
SAMPLE_TEMPERATURE, SAMPLE_TOP_P = 0.9, 0.95
SAMPLE_PROMPTS = ("In the beginning", "And the king said unto", "Psalms 151\n\n", "Blessed are they that")


CARD = """# The embedded demo model

A {millions:.2f} M parameter Llama that continues text in the manner of the King James Bible. It exists so
that `python -m quire demo` has something real to run: it is no assistant, and what it writes is no scripture.

| | |
|---|---|
{table}

A sample (temperature {temperature}, top-p {top_p}):

{sample}

## Limits
The text of 1611 speaks as its time did, of people and peoples too, and the model repeats it. A chapter
fits in the context; the sense of one rarely survives longer than a few verses. Parallel passages (Kings and
Chronicles, the Gospels) are split between training and held-out text, so the held-out loss flatters the model
a little.

## How to retrain
```
apt-get install bible-kjv bible-kjv-text
bible -l 100000 gen1:1-rev22:21 > kjv.txt
python -m quire.demo.train --text kjv.txt --out model {options}
```
needs torch, transformers, tokenizers and safetensors, and one GPU for a few minutes. It
writes this card as well.
"""


def read_chapters(path: Path) -> list[str]:
    """Splits the output of Debian's `bible` into chapters: heading, blank line, one verse per line."""
    chapters: list[list[str]] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if re.fullmatch(r"\S.* \d+", line):
            chapters.append([line, ""])
        elif verse := re.fullmatch(r"\s+\d+ (.*\S)\s*", line):
            if not chapters:
                raise SystemExit(f"{path}: a verse before the first chapter heading")
            chapters[-1].append(verse.group(1))
        elif line.strip():
            raise SystemExit(f"{path}: neither a heading nor a verse: {line[:60]!r}")
    if len(chapters) < HOLD_OUT_EVERY:
        raise SystemExit(f"{path}: found {len(chapters)} chapters, expected at least {HOLD_OUT_EVERY}")
    return ["\n".join(lines) + "\n" for lines in chapters]


def train_tokenizer(chapters: list[str], vocab_size: int) -> Any:
    """Trains a byte-level BPE whose `encode` opens every text with the end-of-text token (id 0)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(chapters, trainer=trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", pair=None, special_tokens=[(END_OF_TEXT, 0)]
    )
    return tokenizer


def build_model(args: argparse.Namespace) -> Any:
    """Builds a LlamaForCausalLM with dropout after its embedding, attention and MLP outputs."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.hidden_size,
        intermediate_size=args.intermediate_size,
        num_hidden_layers=args.num_layers,
        num_attention_heads=args.num_heads,
        num_key_value_heads=args.num_kv_heads,
        head_dim=args.head_dim,
        max_position_embeddings=args.max_position,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config)

    def drop(module: Any, inputs: Any, output: Any) -> Any:
        return torch.nn.functional.dropout(output, args.dropout, module.training)

    model.model.embed_tokens.register_forward_hook(drop)
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_hook(drop)
        layer.mlp.down_proj.register_forward_hook(drop)
        # Residual branches start small, so that depth does not blow up the first activations.
        for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
            torch.nn.init.normal_(projection.weight, std=0.02 / math.sqrt(2 * args.num_layers))
    return model


def build_optimizers(model: Any, learning_rate: float, weight_decay: float) -> list[Any]:
    """Muon for the layers' matrices where this torch has it, AdamW for the rest."""
    import torch

    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    embedding = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers" not in name]
    groups = [{"params": embedding, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    if hasattr(torch.optim, "Muon"):
        muon = torch.optim.Muon(
            matrices, lr=learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
        )
        return [muon, torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95))]
    groups.append({"params": matrices, "weight_decay": weight_decay})
    return [torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95))]


def loss_of(model: Any, windows: Any, device: str) -> Any:
    """Mean cross-entropy, in nats per token, of `windows` `[batch, length + 1]`."""
    import torch

    with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
        logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())


def evaluate(model: Any, ids: Any, args: argparse.Namespace) -> float:
    """Held-out loss over consecutive windows, each predicted without what precedes it."""
    import torch

    model.eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for start in range(0, len(ids) - 1, args.length):
            window = ids[start : start + args.length + 1][None]
            tokens = window.shape[1] - 1
            total += loss_of(model, window, args.device).item() * tokens
            count += tokens
    model.train()
    return total / count


def train(model: Any, train_ids: Any, held_out_ids: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Trains with warm-up and cosine decay, leaves the best weights in `model` and returns the figures."""
    import torch

    optimizers = build_optimizers(model, args.learning_rate, args.weight_decay)
    windows_per_epoch = (len(train_ids) - 1) // args.length - 1
    steps_per_epoch = max(1, windows_per_epoch // args.batch)
    num_steps = args.steps or args.epochs * steps_per_epoch
    warmup = min(100, num_steps // 10 + 1)
    best: dict[str, Any] = {"held_out_loss": float("inf")}
    best_state: dict[str, Any] = {}
    start_time, running = time.monotonic(), 0.0
    order = torch.empty(0, dtype=torch.long)
    offset = 0
    model.train()
    for step in range(num_steps):
        if len(order) < args.batch:  # a new epoch: shift the windows, then shuffle them
            offset = int(torch.randint(args.length, ()))
            order = torch.randperm(windows_per_epoch)
        batch, order = order[: args.batch], order[args.batch :]
        index = (batch * args.length + offset)[:, None] + torch.arange(args.length + 1)
        # Whichever is further gone, steps or minutes, drives the schedule: a slow GPU still ends well cooled.
        progress = max(step / num_steps, (time.monotonic() - start_time) / (60 * args.minutes))
        if progress >= 1:
            break
        factor = min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * progress))
        loss = loss_of(model, train_ids[index.to(train_ids.device)], args.device)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = args.learning_rate * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        running = loss.detach() if step == 0 else 0.98 * running + 0.02 * loss.detach()
        if (step + 1) % args.evaluate_every == 0 or step + 1 == num_steps:
            held_out = evaluate(model, held_out_ids, args)
            seconds = time.monotonic() - start_time
            print(
                f"step {step + 1}/{num_steps}  epoch {(step + 1) / steps_per_epoch:.1f}  "
                f"train {float(running):.4f}  held-out {held_out:.4f}  {seconds:.0f} s",
                flush=True,
            )
            if held_out < best["held_out_loss"]:
                best = {
                    "held_out_loss": held_out,
                    "train_loss": float(running),
                    "step": step + 1,
                    "epoch": (step + 1) / steps_per_epoch,
                    "seconds": seconds,
                }
                best_state = {key: value.detach().clone() for key, value in model.state_dict().items()}
    if best_state:
        model.load_state_dict(best_state)
    return best


def write_samples(model: Any, tokenizer: Any, args: argparse.Namespace) -> list[str]:
    """Generates one sample per prompt."""
    import torch

    model.eval()
    samples = []
    for prompt in SAMPLE_PROMPTS:
        ids = torch.tensor([tokenizer.encode(prompt).ids], device=args.device)
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=True,
            temperature=SAMPLE_TEMPERATURE, top_p=SAMPLE_TOP_P, max_new_tokens=args.sample_tokens,
            pad_token_id=0,
        )  # fmt: skip
        samples.append(tokenizer.decode(out[0].tolist()))
    return samples


def model_card(args: argparse.Namespace, figures: dict[str, Any], sample: str) -> str:
    """The text of MODEL_CARD.md."""
    rows = {
        "architecture": (
            f"`LlamaForCausalLM`, {args.num_layers} layers, hidden size {args.hidden_size}, MLP "
            f"{args.intermediate_size}, {args.num_heads} heads over {args.num_kv_heads} KV heads of "
            f"{args.head_dim}, tied embeddings, rope theta 10000"
        ),
        "context": f"{args.max_position} tokens",
        "tokenizer": (
            f"byte-level BPE, {args.vocab_size} entries, trained on the same text; `{END_OF_TEXT}` (id 0) "
            "opens each chapter"
        ),
        "weights": f"bfloat16 safetensors, {figures['weight_bytes']:,} bytes",
        "data": (
            f"King James Bible, Debian package `bible-kjv-text`; {figures['num_train_chapters']} chapters "
            f"({figures['train_bytes']:,} bytes, {figures['num_train_tokens']:,} tokens) to train, "
            f"{figures['num_held_out_chapters']} (each {HOLD_OUT_EVERY}th; {figures['held_out_bytes']:,} "
            "bytes) held out"
        ),
        "loss (nats per token)": (
            f"train {figures['train_loss']:.4f} (with dropout), held out {figures['held_out_loss']:.4f} "
            f"= {figures['bits_per_byte']:.3f} bits per byte"
        ),
        "training": (
            f"{figures['epoch']:.1f} epochs (schedule: {args.epochs} epochs or {args.minutes:g} minutes), "
            f"{args.batch} × {args.length} tokens a step, Muon and AdamW at {args.learning_rate:g} with "
            f"cosine decay, dropout {args.dropout:g}, weight decay {args.weight_decay:g}, seed {args.seed}; "
            f"{figures['seconds']:.0f} s on {figures['device']}"
        ),
        "licence": "the text is in the public domain; weights and tokenizer: Apache-2.0",
    }
    return CARD.format(
        millions=figures["num_parameters"] / 1e6,
        table="\n".join(f"| {key} | {value} |" for key, value in rows.items()),
        temperature=SAMPLE_TEMPERATURE,
        top_p=SAMPLE_TOP_P,
        sample="\n".join("> " + line for line in sample.strip().splitlines()),
        options=(
            f"--epochs {args.epochs} --minutes {args.minutes:g} --dropout {args.dropout:g} "
            f"--learning-rate {args.learning_rate:g} --batch {args.batch}"
        ),
    )


def save(model: Any, tokenizer: Any, out: Path, card: str) -> None:
    """Writes config.json, tokenizer.json, model.safetensors (bfloat16) and MODEL_CARD.md."""
    import torch
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    state = {name: p.detach().to("cpu", torch.bfloat16).contiguous() for name, p in model.named_parameters()}
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads(model.config.to_json_string(use_diff=True))
    config.pop("transformers_version", None)
    config |= {"architectures": ["LlamaForCausalLM"], "torch_dtype": "bfloat16", "tie_word_embeddings": True}
    config.pop("dtype", None)
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    tokenizer.save(str(out / "tokenizer.json"), pretty=False)
    (out / "MODEL_CARD.md").write_text(card, encoding="utf-8")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m quire.demo.train", description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--text", type=Path, required=True, help="made by `bible`, see above")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model into")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--epochs", type=int, default=80)
    parser.add_argument(
        "--steps", type=int, default=0, help="stop after so many steps instead; 0: use --epochs"
    )
    parser.add_argument("--minutes", type=float, default=5.0, help="time limit that the schedule adapts to")
    parser.add_argument("--batch", type=int, default=16, help="windows per step")
    parser.add_argument("--length", type=int, default=1024, help="tokens per window")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--dropout", type=float, default=0.2)
    parser.add_argument("--evaluate-every", type=int, default=75)
    parser.add_argument("--sample-tokens", type=int, default=160)
    parser.add_argument("--seed", type=int, default=1611)
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--hidden-size", type=int, default=192)
    parser.add_argument("--intermediate-size", type=int, default=512)
    parser.add_argument("--num-layers", type=int, default=6)
    parser.add_argument("--num-heads", type=int, default=6)
    parser.add_argument("--num-kv-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=32)
    parser.add_argument("--max-position", type=int, default=1024)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Trains, writes the model and prints samples."""
    args = parse_arguments(argv)
    import torch

    torch.manual_seed(args.seed)
    chapters = read_chapters(args.text)
    held_out = chapters[HOLD_OUT_PHASE::HOLD_OUT_EVERY]
    training = [c for i, c in enumerate(chapters) if i % HOLD_OUT_EVERY != HOLD_OUT_PHASE]
    tokenizer = train_tokenizer(training, args.vocab_size)

    def encode(texts: list[str]) -> Any:
        ids = [i for encoding in tokenizer.encode_batch(texts) for i in encoding.ids]
        return torch.tensor(ids, device=args.device)

    train_ids, held_out_ids = encode(training), encode(held_out)
    model = build_model(args).to(args.device)
    num_parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{num_parameters:,} parameters, {len(train_ids):,} tokens, {len(held_out_ids):,} held out",
        flush=True,
    )
    figures = train(model, train_ids, held_out_ids, args)
    # What is written is bfloat16, so that is what the card's loss is taken from.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))
    held_out_bytes = sum(len(c.encode()) for c in held_out)
    figures["held_out_loss"] = evaluate(model, held_out_ids, args)
    figures |= {
        "bits_per_byte": figures["held_out_loss"] * (len(held_out_ids) - 1) / math.log(2) / held_out_bytes,
        "num_parameters": num_parameters,
        "weight_bytes": 2 * num_parameters,
        "num_train_chapters": len(training),
        "num_held_out_chapters": len(held_out),
        "train_bytes": sum(len(c.encode()) for c in training),
        "held_out_bytes": held_out_bytes,
        "num_train_tokens": len(train_ids),
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "a CPU",
    }
    samples = write_samples(model, tokenizer, args)
    save(model, tokenizer, args.out, model_card(args, figures, samples[0]))
    (args.out / "held_out.txt").write_text("\n".join(held_out), encoding="utf-8")
    print(json.dumps(figures, indent=2))
    for sample in samples:
        print("-" * 78, sample, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
