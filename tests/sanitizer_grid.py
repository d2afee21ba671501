"""A small grid over every CUDA kernel variant, for compute-sanitizer, which makes kernels a hundred times slower.

    for tool in memcheck racecheck initcheck synccheck; do
        compute-sanitizer --tool $tool --error-exitcode 1 --kernel-name kernel_substring=quire python tests/sanitizer_grid.py
    done

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import argparse
import itertools
import sys
from typing import Any

import torch

import quire

DEVICE = "cuda"
KV_DTYPES = [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8]


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    x = torch.randn(*shape, device=DEVICE)
    return (x * 20).to(dtype) if dtype == torch.int8 else x.to(dtype)


def starts(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=DEVICE)


def paged(
    q_lens: list[int] | None,
    kv_lens: list[int],
    heads: tuple[int, int],
    head_dim: int,
    dtype: torch.dtype,
    kv: torch.dtype,
    block_size: int = 16,
    hostile: bool = False,
    **options: Any,
) -> None:
    num_seqs = len(kv_lens)
    tokens = sum(q_lens) if q_lens else num_seqs
    blocks = max(-(-n // block_size) for n in kv_lens) or 1
    pool = num_seqs * blocks + 1
    k, v = (
        normal(pool, block_size, heads[1], head_dim, dtype=kv),
        normal(pool, block_size, heads[1], head_dim, dtype=kv),
    )
    tables = torch.randperm(pool, device=DEVICE)[: num_seqs * blocks].view(num_seqs, blocks).to(torch.int32)
    if hostile:
        tables[0, 0], tables[-1, -1] = -5, pool
        if kv.itemsize == 2:
            v[1, 0, 0, 0] = float("nan")
    lens = torch.tensor(kv_lens, dtype=torch.int32, device=DEVICE)
    qsl = starts(q_lens) if q_lens else None
    quire.paged_attention(
        normal(tokens, heads[0], head_dim, dtype=dtype),
        k,
        v,
        tables,
        lens,
        query_start_loc=qsl,
        return_lse=True,
        **options,
    )


def attention() -> None:
    for kv, head_dim in itertools.product(KV_DTYPES, [64, 72, 128, 256]):
        dtype = torch.float16 if kv == torch.float16 else torch.bfloat16
        paged(None, [1, 700, 0, 33], (8, 2), head_dim, dtype, kv)  # decode
        paged([2, 5, 1], [40, 300, 1], (8, 2), head_dim, dtype, kv, window=50, softcap=20.0)  # 16 rows
        paged([70, 1, 30], [170, 64, 30], (4, 2), head_dim, dtype, kv, block_size=7)  # prefill
    for dtype in (torch.bfloat16, torch.float16):
        for head_dim in (64, 128, 200):  # prefill on Hopper: more tiles than SMs
            slopes, sinks = torch.rand(4, device=DEVICE), torch.rand(4, device=DEVICE)
            paged(
                [900, 1, 0, 700],
                [1000, 600, 40, 700],
                (4, 2),
                head_dim,
                dtype,
                dtype,
                alibi_slopes=slopes,
                sinks=sinks,
            )
            paged([1300, 300], [1300, 555], (4, 2), head_dim, dtype, dtype, hostile=True, window=(100, 20))
            n = 2048
            quire.attention(
                normal(n, 12, head_dim, dtype=dtype),
                normal(n, 4, head_dim, dtype=dtype),
                normal(n, 4, head_dim, dtype=dtype),
                query_start_loc=starts([n - 9, 9]),
                kv_start_loc=starts([n - 9, 9]),
                causal=False,
            )
    quire.attention(
        normal(50, 4, 40, dtype=torch.float32),
        normal(90, 2, 40, dtype=torch.float32),
        normal(90, 2, 40, dtype=torch.float32),
    )
    paged([3, 20], [70, 20], (4, 2), 64, torch.float32, torch.float32, hostile=True)
    paged(None, [100, 900], (8, 2), 128, torch.bfloat16, torch.bfloat16, hostile=True)
    a, b = normal(9, 4, 64), normal(9, 4, 64)
    lse = torch.randn(9, 4, device=DEVICE)
    quire.merge_attention(a, lse, b, lse, out_lse=torch.empty_like(lse))


def kv_cache() -> None:
    for dtype, kv in itertools.product((torch.bfloat16, torch.float32), [*KV_DTYPES, torch.float32]):
        if kv.itemsize > 1 and kv != dtype:
            continue
        k_cache, v_cache = normal(8, 16, 3, 72, dtype=kv), normal(8, 16, 3, 72, dtype=kv)
        slots = torch.tensor([3, -1, 127, 5, 4000], device=DEVICE)
        scale = (
            {}
            if kv.itemsize > 1
            else {
                "k_scale": torch.rand(3, device=DEVICE) + 0.5,
                "v_scale": torch.rand(3, device=DEVICE) + 0.5,
            }
        )
        quire.write_kv(
            normal(5, 3, 72, dtype=dtype), normal(5, 3, 72, dtype=dtype), k_cache, v_cache, slots, **scale
        )
        quire.gather_kv(k_cache, v_cache, slots, **scale)
        pairs = torch.tensor([[0, 1], [2, 3], [0, 77]], device=DEVICE)
        quire.copy_blocks(k_cache, pairs)


def norm() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for rows, width in [(3, 64), (200, 128), (5, 4096), (300, 1000), (2, 33000)]:
            x, w = normal(rows, width, dtype=dtype), normal(width, dtype=dtype)
            quire.rms_norm(x, w)
            quire.fused_add_rms_norm(x.clone(), x.clone(), w)
            quire.layer_norm(x, w, w)


def activation() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        for rows, width in [(1, 2048), (77, 30)]:
            x = normal(rows, width, dtype=dtype)
            for op in (
                "silu_and_mul",
                "gelu_and_mul",
                "gelu_tanh_and_mul",
                "gelu_new",
                "gelu_fast",
                "gelu_quick",
                "relu_squared",
            ):
                getattr(quire, op)(x)


def position_encoding() -> None:
    for style, dtype in itertools.product(("neox", "gptj"), (torch.bfloat16, torch.float32)):
        cache = torch.rand(100, 64, device=DEVICE)
        positions = torch.tensor([0, 99, -1, 100, 50], device=DEVICE)
        quire.rotary_embedding(
            positions, normal(5, 8, 80, dtype=dtype), normal(5, 2, 80, dtype=dtype), cache, style=style
        )


FAMILIES = {f.__name__: f for f in (attention, kv_cache, norm, activation, position_encoding)}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("family", nargs="*", choices=[[], *FAMILIES], help="default: all")
    torch.manual_seed(0)
    for name in parser.parse_args().family or FAMILIES:
        FAMILIES[name]()
        torch.cuda.synchronize()
        try:
            quire.check_errors(DEVICE)
        except IndexError as error:  # the hostile contents
            print(f"{name}: {error}", file=sys.stderr)
        print(f"{name}: done")
