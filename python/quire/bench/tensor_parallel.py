"""Decoding with a Llama-shaped model of random weights on one device and on several, heads divided among them.

SPDX-License-Identifier: Apache-2.0

    python -m quire.bench.tensor_parallel --model llama-8b --devices 1 2 --batch 1 16 64 --context 1024

One process for each device, with PyTorch's collectives (NCCL, or gloo on the CPU) behind the output and the down projection. On GPUs the
whole step, collectives and the choice of the next tokens included, is one CUDA graph. Logits of the first step are compared with those
of the first number of devices.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

import quire
from quire.bench import description

__all__ = ["SHAPES", "Decoder", "Shape", "main", "run"]

BLOCK_SIZE = 16
#: Largest difference of logits, relative to the largest: sums in another order, rounded to the dtype after each projection.
TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}


@dataclass(frozen=True)
class Shape:
    """A model's sizes."""

    num_layers: int
    hidden: int
    inner: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab: int


SHAPES = {
    "demo": Shape(6, 192, 512, 6, 2, 32, 2048),
    "llama-1b": Shape(16, 2048, 8192, 32, 8, 64, 128256),
    "llama-8b": Shape(32, 4096, 14336, 32, 8, 128, 128256),
}


@dataclass
class _Layer:
    qkv: torch.Tensor
    output: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor


class Decoder:
    """One rank's share of a model, and of a batch that has ``context`` keys for each sequence."""

    def __init__(
        self, shape: Shape, batch: int, context: int, max_steps: int, rank: int, world: int, device: torch.device, dtype: torch.dtype
    ) -> None:  # fmt: skip
        """Draws the whole model, tensor by tensor, and keeps this rank's part: so all numbers of devices see the same one."""
        for name in ("num_heads", "num_kv_heads", "inner", "vocab"):
            if getattr(shape, name) % world:
                raise ValueError(
                    f"{name}: expected a multiple of {world} devices, got {getattr(shape, name)}"
                )
        self.shape, self.rank, self.world = shape, rank, world
        heads, kv_heads, dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
        self.heads, self.kv_heads = heads // world, kv_heads // world
        generator = torch.Generator(device).manual_seed(0)

        def draw(*size: int) -> torch.Tensor:
            return torch.randn(size, generator=generator, device=device, dtype=dtype)

        def share(whole: torch.Tensor, dim: int) -> torch.Tensor:
            return whole.chunk(world, dim)[rank].clone()

        def linear(out: int, into: int, dim: int) -> torch.Tensor:
            return share(draw(out, into).mul_(into**-0.5), dim)

        max_blocks = -(-(context + max_steps) // BLOCK_SIZE)
        cache = (batch * max_blocks, BLOCK_SIZE, kv_heads, dim)
        self.embedding = draw(shape.vocab, shape.hidden)
        self.layers = [
            _Layer(
                qkv=torch.cat([linear(n * dim, shape.hidden, 0) for n in (heads, kv_heads, kv_heads)]),
                output=linear(shape.hidden, heads * dim, 1),
                gate_up=torch.cat([linear(shape.inner, shape.hidden, 0) for _ in range(2)]),
                down=linear(shape.hidden, shape.inner, 1),
                k_cache=share(draw(*cache), 2),
                v_cache=share(draw(*cache), 2),
            )
            for _ in range(shape.num_layers)
        ]
        self.head = linear(shape.vocab, shape.hidden, 0)
        self.norm = torch.ones(shape.hidden, device=device, dtype=dtype)
        self.rope = torch.from_numpy(quire.rope_cache(dim, context + max_steps + 1)).to(device)
        order = np.random.default_rng(0).permutation(batch * max_blocks).reshape(batch, max_blocks)
        self.tables = torch.from_numpy(order.astype(np.int32)).to(device)
        self.tokens = torch.arange(batch, device=device)
        self.positions = torch.full((batch,), context, device=device)
        self.lens = torch.full((batch,), context + 1, dtype=torch.int32, device=device)
        self.slots = torch.empty(batch, dtype=torch.int64, device=device)
        self.first_logits: torch.Tensor | None = None

    def reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks."""
        if self.world > 1:
            dist.all_reduce(x)
        return x

    def logits(self) -> torch.Tensor:
        """This rank's part of a step's logits, ``[batch, vocab / world]``."""
        batch, dim = len(self.tokens), self.shape.head_dim
        blocks = self.tables.gather(1, (self.positions // BLOCK_SIZE)[:, None])[:, 0]
        torch.add(self.positions % BLOCK_SIZE, blocks, alpha=BLOCK_SIZE, out=self.slots)
        residual = self.embedding[self.tokens]
        x = quire.rms_norm(residual, self.norm)
        for layer in self.layers:
            qkv = (x @ layer.qkv.T).view(batch, -1, dim)
            q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], 1)
            quire.rope_and_write_kv(
                self.positions, q, k, v, self.rope, layer.k_cache, layer.v_cache, self.slots
            )
            x = quire.paged_attention(q, layer.k_cache, layer.v_cache, self.tables, self.lens)
            x = self.reduce(x.view(batch, -1) @ layer.output.T)
            quire.fused_add_rms_norm(x, residual, self.norm)
            x = self.reduce(quire.silu_and_mul(x @ layer.gate_up.T) @ layer.down.T)
            quire.fused_add_rms_norm(x, residual, self.norm)
        logits: torch.Tensor = (x @ self.head.T).float()
        return logits

    def step(self) -> torch.Tensor:
        """Decodes a token of each sequence; returns this rank's part of the logits."""
        logits = self.logits()
        best, index = logits.max(-1)
        if self.world > 1:
            found = torch.stack([best, index + float(self.rank * logits.shape[1])], 1)
            every = found.new_empty(self.world, *found.shape)
            dist.all_gather(list(every), found)
            winner = every[:, :, 0].argmax(0)
            index = every[:, :, 1].gather(0, winner[None])[0].long()
        self.tokens.copy_(index)
        self.positions += 1
        self.lens += 1
        return logits

    def whole(self, logits: torch.Tensor) -> torch.Tensor:
        """All ranks' logits side by side."""
        if self.world == 1:
            return logits
        parts = [torch.empty_like(logits) for _ in range(self.world)]
        dist.all_gather(parts, logits.contiguous())
        return torch.cat(parts, 1)


def _captured(decoder: Decoder) -> Callable[[], object]:
    """The step as a CUDA graph."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(
        graph, capture_error_mode="thread_local"
    ):  # NCCL's watchdog looks at events meanwhile
        decoder.step()
    return graph.replay


def _rank(
    rank: int, world: int, store: str, kind: str, shape: Shape, batches: Sequence[int], context: int, dtype_name: str,
    steps: int, rounds: int, results: Any,
) -> None:  # fmt: skip
    device = torch.device(kind, rank) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group(
            "nccl" if kind == "cuda" else "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=world,
            device_id=device if kind == "cuda" else None,
        )
    dtype = getattr(torch, dtype_name)
    with torch.inference_mode():
        for batch in batches:
            decoder = Decoder(shape, batch, context, 3 + steps * (rounds + 1), rank, world, device, dtype)
            first = decoder.whole(decoder.step())
            tokens = [decoder.tokens.tolist()]
            for _ in range(2):
                decoder.step()
                tokens.append(decoder.tokens.tolist())
            step = _captured(decoder) if kind == "cuda" else decoder.step
            seconds = []
            for _ in range(rounds + 1):
                if world > 1:
                    dist.barrier()
                if kind == "cuda":
                    torch.cuda.synchronize()
                start = time.perf_counter()
                for _ in range(steps):
                    step()
                if kind == "cuda":
                    torch.cuda.synchronize()
                seconds.append((time.perf_counter() - start) / steps)
            if rank == 0:
                results.put((batch, statistics.median(seconds[1:]), first.cpu().numpy(), tokens))
            del decoder, step, first
            if kind == "cuda":
                quire.check_errors(str(device))
                torch.cuda.empty_cache()
    if world > 1:
        dist.destroy_process_group()


def run(
    shape: Shape, world: int, *, kind: str = "cuda", batches: Sequence[int] = (1,), context: int = 1024, dtype: str = "bfloat16",
    steps: int = 32, rounds: int = 5, timeout: float = 600.0,
) -> dict[int, tuple[float, np.ndarray[Any, Any], list[list[int]]]]:  # fmt: skip
    """By batch size: seconds of a step, the first step's logits, and the first three steps' tokens.

    Raises:
        RuntimeError: A process failed, or was not done in time.
    """
    context_of = torch.multiprocessing.get_context("spawn")
    results = context_of.Queue()
    directory = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    store = str(Path(directory.name) / "store")  # where the processes meet; a port could be taken meanwhile
    common = (world, store, kind, shape, tuple(batches), context, dtype, steps, rounds, results)
    workers = [context_of.Process(target=_rank, args=(rank, *common), daemon=True) for rank in range(world)]
    found: dict[int, tuple[float, np.ndarray[Any, Any], list[list[int]]]] = {}
    deadline = time.monotonic() + timeout
    try:
        for worker in workers:
            worker.start()
        while len(found) < len(batches):
            if not results.empty():
                batch, *rest = results.get()
                found[batch] = (rest[0], rest[1], rest[2])
            elif any(worker.exitcode not in (None, 0) for worker in workers):
                raise RuntimeError(f"a process of {world} failed")
            elif time.monotonic() > deadline:
                raise RuntimeError(f"{world} processes were not done after {timeout:.0f} s")
            else:
                time.sleep(0.02)
        for worker in workers:
            worker.join(60)
    finally:
        for worker in workers:
            if worker.pid is not None:
                worker.kill()
                worker.join(60)
        directory.cleanup()
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a table; 1 where the logits of two numbers of devices differ."""
    parser = argparse.ArgumentParser(prog="python -m quire.bench.tensor_parallel", description=description(__doc__),
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    add = parser.add_argument
    add("--model", choices=SHAPES, nargs="+", default=["demo", "llama-8b"])
    add("--devices", type=int, nargs="+", default=[1, 2], help="numbers of devices (%(default)s)")
    add("--batch", type=int, nargs="+", default=[1, 16, 64], help="sequences (%(default)s)")
    add("--context", type=int, default=1024, help="keys of each sequence at the start (%(default)s)")
    add("--dtype", choices=TOLERANCE, default="bfloat16")
    add("--device", choices=["cuda", "cpu"], default="cuda")
    add("--steps", type=int, default=32, help="steps a round (%(default)s)")
    args = parser.parse_args(arguments)
    if args.device == "cuda" and max(args.devices) > torch.cuda.device_count():
        print(
            f"{max(args.devices)} GPUs are asked for, {torch.cuda.device_count()} are here", file=sys.stderr
        )
        return 2
    print(
        f"| model, {args.dtype} | devices | sequences | keys | step, µs | tokens/s | against the first | logits differ by |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    status = 0
    for model in args.model:
        base: dict[int, tuple[float, np.ndarray[Any, Any], list[list[int]]]] = {}
        for world in args.devices:
            found = run(
                SHAPES[model], world, kind=args.device, batches=args.batch, context=args.context, dtype=args.dtype,
                steps=args.steps,
            )  # fmt: skip
            base = base or found
            for batch, (seconds, logits, _) in found.items():
                first_seconds, first_logits, _ = base[batch]
                difference = float(np.abs(logits - first_logits).max() / np.abs(first_logits).max())
                status |= difference > TOLERANCE[args.dtype]
                print(
                    f"| {model} | {world} | {batch} | {args.context} | {seconds * 1e6:.0f} | {batch / seconds:.0f} | "
                    f"{first_seconds / seconds:.2f}x | {difference:.1e} |",
                    flush=True,
                )
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
