"""A small grid over every CUDA kernel variant, for compute-sanitizer, which makes kernels a hundred times slower.

    for tool in memcheck racecheck initcheck synccheck; do
        compute-sanitizer --tool $tool --error-exitcode 1 --kernel-name kernel_substring=quire python tests/sanitizer_grid.py
    done

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
from collections.abc import Callable
from typing import Any

import torch

import quire

DEVICE = "cuda"
KV_DTYPES = [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8]
E4M3 = torch.float8_e4m3fn
#: Of queries and of keys and values.
HOPPER_DTYPES = [(t, t) for t in (*KV_DTYPES[:2], E4M3)] + list(
    itertools.product(KV_DTYPES[:2], KV_DTYPES[2:])
)


def put(x: torch.Tensor) -> torch.Tensor:
    """To the GPU by a copy, which every tool sees; kernels of other libraries are not watched."""
    return x.to(DEVICE)


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    x = torch.randn(*shape)
    return put((x * 20).to(dtype) if dtype == torch.int8 else x.to(dtype))


def starts(lengths: list[int]) -> torch.Tensor:
    return put(torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32))


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
    q = normal(tokens, heads[0], head_dim, dtype=dtype)
    k, v = (torch.randn(pool, block_size, heads[1], head_dim) * (20 if kv == torch.int8 else 1) for _ in "kv")
    tables = torch.randperm(pool)[: num_seqs * blocks].view(num_seqs, blocks).to(torch.int32)
    if hostile:
        tables[0, 0], tables[-1, -1] = -5, pool
        if kv != torch.int8:
            v[1, 0, 0, 0] = float("nan")
    qsl = starts(q_lens) if q_lens else None
    lens = put(torch.tensor(kv_lens, dtype=torch.int32))
    quire.paged_attention(
        q, put(k.to(kv)), put(v.to(kv)), put(tables), lens, query_start_loc=qsl, return_lse=True, **options
    )


def attention_portable(kv: torch.dtype) -> None:
    dtype = torch.float16 if kv == torch.float16 else torch.bfloat16
    if kv.itemsize == 1:
        paged(None, [1, 700, 33], (8, 2), 72, E4M3, kv, q_scale=put(torch.rand(2) + 0.5))
        paged([70, 1, 30], [170, 64, 30], (4, 2), 128, E4M3, kv, block_size=7)
    for head_dim in (64, 72, 256):
        paged(None, [1, 700, 0, 33], (8, 2), head_dim, dtype, kv)  # decode
        paged(None, [700], (8, 2), head_dim, dtype, kv, window=(300, -1))  # decode in clusters
        paged(None, [150, 120, 100], (16, 4), head_dim, dtype, kv)
        paged(None, [40] * 33, (32, 8), head_dim, dtype, kv)  # a CTA to each tile
        paged([2, 5, 1], [40, 300, 1], (8, 2), head_dim, dtype, kv, window=50, softcap=20.0)  # 16 rows
        paged([70, 1, 30], [170, 64, 30], (4, 2), head_dim, dtype, kv, block_size=7)  # 64 rows
        paged([70, 1, 30], [170, 64, 30], (4, 2), head_dim, dtype, kv)
        if head_dim <= 128:
            paged(
                [70, 1], [170, 64], (4, 2), head_dim, dtype, kv, variant="mma_split_rows_128", window=(50, 0)
            )
        elif kv == dtype:
            paged([70, 1], [170, 64], (4, 2), head_dim, dtype, kv, variant="mma_split_rows_small")
        mask = put(torch.randint(0, 256, (8, 3), dtype=torch.uint8))
        paged([2, 5, 1], [40, 300, 1], (8, 2), head_dim, dtype, kv, mask=mask)
        mask = put(torch.randint(0, 256, (101, 30), dtype=torch.uint8))
        zeros = put(torch.zeros(3, dtype=torch.int32))
        paged(
            [70, 1, 30], [170, 64, 30], (4, 2), head_dim, dtype, kv, mask=mask, mask_start=zeros, hostile=True
        )
    paged(None, [100, 900], (8, 2), 128, dtype, kv, hostile=True)
    paged([3, 40], [70, 40], (4, 2), 128, dtype, kv, hostile=True)


def attention_hopper(dtype: torch.dtype, kv: torch.dtype) -> None:
    """As many query rows as Hopper's kernel is taken from."""
    for head_dim in (64, 96, 128, 192, 208) if kv == dtype and kv.itemsize > 1 else (64, 128, 208):
        slopes, sinks = put(torch.rand(4)), put(torch.rand(4))
        paged(
            [900, 1, 0, 700],
            [1000, 600, 40, 700],
            (4, 2),
            head_dim,
            dtype,
            kv,
            alibi_slopes=slopes,
            sinks=sinks,
        )
        paged([1300, 300], [1300, 555], (4, 2), head_dim, dtype, kv, hostile=True, window=(100, 20))
        mask = put(torch.randint(0, 256, (1600, 40), dtype=torch.uint8))
        paged(
            [1300, 300],
            [1300, 555],
            (4, 2),
            head_dim,
            dtype,
            kv,
            mask=mask,
            mask_start=put(torch.tensor([900, 0]).int()),
        )
    # More tiles than SMs, of sequences with and without keys.
    paged([64] * 300, [128 if i % 3 == 0 else 0 for i in range(300)], (1, 1), 128, dtype, kv)
    n = 2048  # more tiles than SMs
    q, k, v = normal(n, 12, 128, dtype=dtype), normal(n, 4, 128, dtype=kv), normal(n, 4, 128, dtype=kv)
    quire.attention(
        q, k, v, query_start_loc=starts([n - 9, 9]), kv_start_loc=starts([n - 9, 9]), causal=False
    )


def attention_float32() -> None:
    q, k, v = (normal(n, heads, 40, dtype=torch.float32) for n, heads in ((50, 4), (90, 2), (90, 2)))
    quire.attention(q, k, v)
    paged([3, 20], [70, 20], (4, 2), 64, torch.float32, torch.float32, hostile=True)


def shared_prefix() -> None:
    for num_seqs, num_prefix_blocks in ((3, 5), (60, 150)):
        for dtype in (torch.bfloat16, torch.float32):
            num_blocks = num_prefix_blocks + num_seqs
            k, v = (normal(num_blocks, 16, 2, 128, dtype=dtype) for _ in "kv")
            blocks = torch.randperm(num_blocks).to(torch.int32)
            tables = put(blocks[num_prefix_blocks:].view(num_seqs, 1))
            blocks[1] = num_blocks
            lens = put(torch.randint(0, 17, (num_seqs,)).to(torch.int32))
            q = normal(num_seqs, 8, 128, dtype=dtype)
            quire.shared_prefix_attention(
                q, k, v, put(blocks[:num_prefix_blocks]), tables, lens, return_lse=True
            )


def merge_attention() -> None:
    lse = put(torch.randn(9, 4))
    quire.merge_attention(normal(9, 4, 64), lse, normal(9, 4, 64), lse, out_lse=torch.empty_like(lse))


def kv_cache() -> None:
    for dtype, kv in itertools.product((torch.bfloat16, torch.float32), [*KV_DTYPES, torch.float32]):
        if kv.itemsize > 1 and kv != dtype:
            continue
        k_cache, v_cache = normal(8, 16, 3, 72, dtype=kv), normal(8, 16, 3, 72, dtype=kv)
        slots = put(torch.tensor([3, -1, 127, 5, 4000]))
        scale = (
            {}
            if kv.itemsize > 1
            else {
                "k_scale": put(torch.rand(3) + 0.5),
                "v_scale": put(torch.rand(3) + 0.5),
            }
        )
        quire.write_kv(
            normal(5, 3, 72, dtype=dtype), normal(5, 3, 72, dtype=dtype), k_cache, v_cache, slots, **scale
        )
        quire.gather_kv(k_cache, v_cache, slots, **scale)
        pairs = put(torch.tensor([[0, 1], [2, 3], [0, 77]]))
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
        cache = put(torch.rand(100, 64))
        positions = put(torch.tensor([0, 99, -1, 100, 50]))
        quire.rotary_embedding(
            positions, normal(5, 8, 80, dtype=dtype), normal(5, 2, 80, dtype=dtype), cache, style=style
        )


FAMILIES: dict[str, Callable[[], None]] = {
    **{f"attention_{str(kv)[6:]}": functools.partial(attention_portable, kv) for kv in KV_DTYPES},
    **{
        f"attention_hopper_{str(t)[6:]}_{str(kv)[6:]}": functools.partial(attention_hopper, t, kv)
        for t, kv in HOPPER_DTYPES
    },
    **{
        f.__name__: f
        for f in (
            attention_float32,
            shared_prefix,
            merge_attention,
            kv_cache,
            norm,
            activation,
            position_encoding,
        )
    },
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("family", nargs="*", choices=[*FAMILIES, []], help="default: all")
    torch.manual_seed(0)
    for name in parser.parse_args().family or FAMILIES:
        FAMILIES[name]()
        torch.cuda.synchronize()
        try:
            quire.check_errors(DEVICE)
        except IndexError as error:  # the hostile contents
            print(f"{name}: {error}", file=sys.stderr)
        print(f"{name}: done")
