"""The command lines of `quire demo` and `quire generate`: arguments, prompts, the main loop, errors.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import quire
from quire.demo import DemoError
from quire.demo.backend import DTYPES, Backend, numpy_dtype, select_backend
from quire.demo.cache import KV_DTYPES
from quire.demo.display import Detokenizer, Display, Rate, status_text
from quire.demo.engine import Engine
from quire.demo.model import Model
from quire.demo.quantization import CHECKPOINT_FORMATS
from quire.demo.sampling import SamplingParams

EMBEDDED_MODEL = Path(__file__).parent / "model"

# The demo's prompts share an opening, so that the prefix cache has something to find.
OPENING = (
    "These are the words of the book which was found in the house of the LORD, in the days of the king, "
    "when the people were gathered together from the north and from the south.\n"
)
DEMO_PROMPTS = [
    OPENING + "And the king said",
    OPENING + "And the prophet answered",
    OPENING + "Now there was a certain woman",
    OPENING + "And it came to pass in the seventh year",
    "Psalms 151\n\n",
    "In the beginning",
    OPENING + "Then came the captains of the host",
    OPENING + "And there was a great noise",
    "Proverbs 32\n\nMy son,",
    OPENING + "Thus saith the LORD",
    OPENING + "And the sons of the priests",
    "And when he was come into the ship,",
]


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {text}")
    return value


def _seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**64:
        raise argparse.ArgumentTypeError(f"expected 0 to 2**64 - 1, got {text}")
    return value


def _temperature(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"expected 0 (greedy) or more, got {text}")
    return value


def _probability(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"expected more than 0 and at most 1, got {text}")
    return value


def _add_common_arguments(parser: argparse.ArgumentParser, demo: bool) -> None:
    add = parser.add_argument
    add("--prompts", type=Path, metavar="FILE", help="one prompt per line (\\n stands for a line break)")
    add(
        "--max-tokens",
        type=_positive,
        metavar="N",
        default=128 if demo else 64,
        help="tokens per prompt (%(default)s)",
    )
    add(
        "--temperature",
        type=_temperature,
        metavar="T",
        default=0.8 if demo else 0.0,
        help="below 1e-5: greedy (%(default)s)",
    )
    add(
        "--top-p",
        type=_probability,
        metavar="P",
        default=0.95 if demo else 1.0,
        help="probability kept (%(default)s)",
    )
    add("--seed", type=_seed, metavar="N", default=0, help="prompt i is sampled with seed + i (%(default)s)")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="cuda needs CuPy (%(default)s)")
    add("--dtype", choices=DTYPES, help="weights and activations (CPU: fp32; GPU: the checkpoint's)")
    add("--kv-dtype", choices=list(KV_DTYPES), help="the KV cache (default: as --dtype)")
    add(
        "--block-size",
        type=_positive,
        metavar="N",
        default=16,
        help="tokens per block of the KV cache (%(default)s)",
    )
    as_needed = "as many as the prompts need, within the memory"
    add("--blocks", type=_positive, metavar="N", default=96 if demo else None,
        help=f"blocks of the KV cache ({'%(default)s' if demo else as_needed})")  # fmt: skip
    add(
        "--max-seqs",
        type=_positive,
        metavar="N",
        default=6 if demo else 32,
        help="sequences run at once (%(default)s)",
    )
    add(
        "--max-batch-tokens",
        type=_positive,
        metavar="N",
        default=256 if demo else 1024,
        help="tokens a step (%(default)s)",
    )
    add(
        "--graphs",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="on a GPU: replay decoding as CUDA graphs, and say what it gains (on)",
    )


def add_demo_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `quire demo`."""
    parser.add_argument("prompt", nargs="*", help="prompts; without any, a dozen that are built in")
    _add_common_arguments(parser, demo=True)
    parser.add_argument("--plain", action="store_true", help="plain text, even on a terminal")


def add_generate_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `quire generate`."""
    parser.add_argument("--model", type=Path, metavar="DIR", default=EMBEDDED_MODEL,
                        help="config.json, tokenizer.json and safetensors of a Llama, Mistral, Qwen2, Qwen3 "
                        "or Gemma2 model (default: the embedded one)")  # fmt: skip
    parser.add_argument(
        "--prompt", action="append", default=[], metavar="TEXT", help="a prompt; may be given more than once"
    )
    parser.add_argument("--checkpoint-format", choices=CHECKPOINT_FORMATS,
                        help="how a GPTQ checkpoint stores its zeros (default: as it says)")  # fmt: skip
    _add_common_arguments(parser, demo=False)


def run_demo(args: argparse.Namespace) -> int:
    """Runs `quire demo`; returns the exit code."""
    return _guarded("demo", lambda: _demo(args))


def run_generate(args: argparse.Namespace) -> int:
    """Runs `quire generate`; returns the exit code."""
    return _guarded("generate", lambda: _generate(args))


def _guarded(command: str, work: Callable[[], None]) -> int:
    """Runs a command; a user's mistake becomes one line on stderr and exit code 2."""
    try:
        work()
    except (DemoError, MemoryError) as error:
        message = " ".join(str(error).split()) or "out of memory"
        print(f"quire {command}: {message}", file=sys.stderr)
        return 2
    return 0


def _read_prompts(given: list[str], path: Path | None) -> list[str]:
    """The prompts of the command line, then those of the file."""
    prompts = list(given)
    if path is not None:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise DemoError(f"{path}: {error.strerror or error}") from None
        except UnicodeDecodeError:
            raise DemoError(f"{path}: is not UTF-8 text") from None
        prompts += [line.replace("\\n", "\n") for line in lines if line.strip()]
        if not prompts:
            raise DemoError(f"{path}: has no prompts")
    for index, prompt in enumerate(prompts):
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError:  # bytes of the command line that do not decode come as surrogates
            raise DemoError(f"prompt {index + 1}: is not UTF-8 text") from None
    return prompts


def _load_tokenizer(directory: Path) -> Any:
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise DemoError("the package tokenizers is missing (pip install tokenizers)") from None
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise DemoError(f"{path}: no such file")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises plain Exception
        raise DemoError(f"{path}: cannot be read ({error})") from None


def _num_blocks(args: argparse.Namespace, model: Model, prompts: list[list[int]]) -> int:
    """--blocks, or what the longest prompts that can run together need, within the memory there is."""
    if args.blocks is not None:
        return int(args.blocks)
    config = model.config
    needs = sorted((-(-(len(p) + args.max_tokens) // args.block_size) for p in prompts), reverse=True)
    limit: int = quire.KVCache.num_blocks_for(
        model.backend.free_bytes(), config.num_layers, args.block_size, config.num_kv_heads, config.head_dim,
        KV_DTYPES[args.kv_dtype or model.dtype],
    )  # fmt: skip
    return int(min(sum(needs[: args.max_seqs]) + 1, max(limit, 1)))


def _prepare(
    args: argparse.Namespace, directory: Path, texts: list[str]
) -> tuple[Engine, Any, list[list[int]]]:
    """Loads everything and queues the prompts, so that any mistake shows before the first output."""
    if args.max_seqs > args.max_batch_tokens:
        raise DemoError(f"--max-batch-tokens {args.max_batch_tokens} is less than --max-seqs {args.max_seqs}")
    backend = select_backend(args.device)
    for dtype in (args.dtype, args.kv_dtype):
        if dtype == "bf16":
            numpy_dtype(dtype)  # fails early where ml_dtypes is missing
    model = Model.load(directory, backend, args.dtype, getattr(args, "checkpoint_format", None))
    tokenizer = _load_tokenizer(directory)
    prompts = [tokenizer.encode(text).ids for text in texts]
    engine = Engine(
        model,
        num_blocks=_num_blocks(args, model, prompts),
        block_size=args.block_size,
        max_batch_tokens=args.max_batch_tokens,
        max_num_seqs=args.max_seqs,
        kv_dtype=args.kv_dtype,
        cuda_graphs=args.graphs,
    )
    for index, prompt in enumerate(prompts):
        seed = (args.seed + index) % 2**64
        stop = model.config.eos_token_ids
        params = SamplingParams(args.max_tokens, args.temperature, args.top_p, seed, stop)
        try:
            engine.add_request(prompt, params)
        except DemoError as error:
            raise DemoError(f"prompt {index + 1}: {error}" if len(prompts) > 1 else str(error)) from None
    return engine, tokenizer, prompts


def _run(
    engine: Engine,
    tokenizer: Any,
    prompts: list[list[int]],
    display: Display,
    begin: Callable[[int], None],
) -> str:
    """Steps the engine to the end and returns the last status.

    Requests are shown one after the other: the first unfinished one streams, the text of the others is kept
    until it is their turn. `begin(i)` is called before request i is shown.
    """
    detokenizers = [Detokenizer(tokenizer, prompt) for prompt in prompts]
    kept = ["" for _ in prompts]
    finished = [False for _ in prompts]
    shown, begun = 0, False
    rate = Rate()
    while engine.has_work:
        for output in engine.step():
            if output.finish_reason != "stop":
                kept[output.request_id] += detokenizers[output.request_id].push(output.token_id)
            finished[output.request_id] = output.finish_reason is not None
        while shown < len(prompts):
            if not begun:
                begin(shown)
                begun = True
            if kept[shown]:
                display.write(kept[shown])
                kept[shown] = ""
            if not finished[shown]:
                break
            display.write("\n")
            shown, begun = shown + 1, False
        stats = engine.stats()
        display.status(status_text(stats, rate.update(stats.num_generated_tokens)))
    stats = engine.stats()
    return status_text(stats, stats.num_generated_tokens / max(rate.seconds(), 1e-9))


def _describe(backend: Backend, model: Model, engine: Engine) -> str:
    config = model.config
    return (
        f"{config.family}, {config.num_layers} layers, {model.dtype} on {backend.label}; "
        f"KV cache {engine.cache.kv_dtype}, {engine.num_blocks} blocks of {engine.block_size} tokens"
    )


def _graph_gain(engine: Engine, args: argparse.Namespace, prompts: list[list[int]]) -> str:
    """What decoding gains by CUDA graphs, or nothing where they are off."""
    if engine.graphs is None:
        return ""
    num_seqs = min(len(prompts), args.max_seqs)
    seq_len = min(max(map(len, prompts)) + args.max_tokens, engine.num_blocks * engine.block_size)
    replayed, launched = engine.graphs.measure(num_seqs, seq_len)
    return (
        f"decoding {num_seqs} x {seq_len} tokens: {replayed:.0f} tokens/s as a CUDA graph, {launched:.0f} tokens/s without, "
        f"{replayed / launched:.1f}x"
    )


def _demo(args: argparse.Namespace) -> None:
    texts = _read_prompts(args.prompt, args.prompts) or DEMO_PROMPTS
    engine, tokenizer, prompts = _prepare(args, EMBEDDED_MODEL, texts)
    live = sys.stdout.isatty() and not args.plain and os.environ.get("TERM") != "dumb"
    print(_describe(engine.model.backend, engine.model, engine), flush=True)
    display = Display(sys.stdout, sys.stderr, live=live)

    def begin(index: int) -> None:
        start = texts[index].rstrip().rfind("\n") + 1  # a long prompt's last line tells it apart
        display.write(f"\n[{index + 1}/{len(texts)}] {'… ' if start else ''}{texts[index][start:]}")

    try:
        display.status(_run(engine, tokenizer, prompts, display, begin))
    finally:
        display.close()
    if not live:
        stats = engine.stats()
        print(f"\ndone: {stats.num_generated_tokens} tokens. {display.last_status}", flush=True)
    if gain := _graph_gain(engine, args, prompts):
        print(gain, flush=True)


def _generate(args: argparse.Namespace) -> None:
    texts = _read_prompts(args.prompt, args.prompts)
    if not texts:
        raise DemoError("no prompt: give --prompt TEXT or --prompts FILE")
    engine, tokenizer, prompts = _prepare(args, args.model, texts)
    display = Display(sys.stdout, sys.stderr, live=False, interval=0)

    def begin(index: int) -> None:
        if len(texts) > 1:
            display.write(f"### {index + 1}: {texts[index]!r}\n")

    status = _run(engine, tokenizer, prompts, display, begin)
    print(f"{engine.stats().num_generated_tokens} tokens, {status}", file=sys.stderr)
    if gain := _graph_gain(engine, args, prompts):
        print(gain, file=sys.stderr)
