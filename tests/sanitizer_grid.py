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
import math
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
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


def ragged(
    q_lens: list[int],
    kv_lens: list[int],
    heads: tuple[int, int],
    head_dim: int,
    dtype: torch.dtype,
    **options: Any,
) -> None:
    q = normal(sum(q_lens), heads[0], head_dim, dtype=dtype)
    k, v = (normal(sum(kv_lens), heads[1], head_dim, dtype=dtype) for _ in "kv")
    v[0, 0, 0] = float("nan")
    quire.attention(
        q, k, v, query_start_loc=starts(q_lens), kv_start_loc=starts(kv_lens), return_lse=True, **options
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
    for head_dim, variant in (
        (64, "mma_split_rows_128"),
        (128, "mma_split_rows_128"),
        (256, "mma_split_rows"),
    ):
        # Lengths alone; 256 keys, so that a tile's are not divided.
        paged([70, 0, 1], [128, 9, 64], (4, 2), head_dim, dtype, kv, variant=variant)
        paged([70, 0, 1], [128, 9, 64], (4, 2), head_dim, dtype, kv, variant=variant, hostile=True)
        if kv == dtype:
            ragged([70, 0, 30], [170, 9, 20], (4, 2), head_dim, dtype, variant=variant)
            ragged([70, 0, 30], [170, 9, 20], (4, 2), head_dim, dtype, variant=variant, causal=False)
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
        paged([1300, 300], [1300, 555], (4, 2), head_dim, dtype, kv)  # causal alone, and short
        for block_size in (8, 64):
            paged([700, 300], [800, 555], (4, 2), head_dim, dtype, kv, block_size, hostile=True)
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


def attention_shared_keys() -> None:
    """Decode, whose CTAs share the keys of the batch: by a line over all of them, or by equal parts of equal tiles."""
    bf16 = torch.bfloat16
    for kv in (bf16, torch.float8_e4m3fn):
        paged(None, [3000, 5], (8, 2), 128, bf16, kv)  # one CTA to an SM
        paged(None, [40, 0, 900, 17], (8, 2), 64, bf16, kv)  # pairs of kv heads
        paged(None, [33] * 70, (16, 4), 128, bf16, kv, hostile=True)
        paged(None, [20] * 300, (4, 2), 128, bf16, kv)  # more tiles than CTAs
        paged(None, [900, 40] * 6, (32, 8), 128, bf16, kv)  # may go in clusters of pairs, but lengths differ
        paged(None, [400] * 4, (32, 8), 96, bf16, kv)
        paged([1, 150, 1, 1, 90], [400, 150, 0, 70, 300], (4, 2), 128, bf16, kv)  # decodes and prefills
        paged([1, 3, 2], [500, 70, 9], (20, 2), 128, bf16, kv)  # 16 rows of a tile
    paged(None, [3000, 5], (8, 2), 128, E4M3, E4M3, q_scale=put(torch.rand(2) + 0.5))
    paged([1, 150, 1, 90], [400, 150, 0, 300], (4, 2), 128, E4M3, E4M3)


def attention_batch_invariant() -> None:
    """Keys divided at places that the batch has no part in."""
    for dtype, kv in ((torch.bfloat16, torch.bfloat16), (torch.float16, torch.int8), (E4M3, E4M3)):
        for heads in ((8, 2), (20, 2)):
            paged(None, [1, 1300, 0, 33], heads, 128, dtype, kv, batch_invariant=True)
            paged([1, 70, 0, 5], [700, 90, 3, 5], heads, 128, dtype, kv, batch_invariant=True, hostile=True)
        paged(None, [1, 700, 33], (8, 2), 256, dtype, kv, batch_invariant=True)
    paged([1, 9], [90, 9], (4, 2), 64, torch.float32, torch.float32, batch_invariant=True)


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
    # Single blocks to and from page-locked memory, more than one launch has, of a size that is no whole number of pieces.
    for layers, blocks, heads in ((1, 600, 1), (2, 6, 150)):
        device, host = (
            quire.KVCache(layers, blocks, 16, heads, 8, "bfloat16", where, pinned=where == "cpu")
            for where in (DEVICE, "cpu")
        )
        host.pool.numpy()[...] = 1
        order = torch.randperm(blocks).numpy()
        swaps = np.stack([order, order[::-1]], 1)
        device.swap_blocks_from(host, swaps)
        host.swap_blocks_from(device, swaps)


def quantized_results(width: int) -> list[dict[str, Any]]:
    """One scale that is given, one for each row, one for each group."""
    return [
        {"out_dtype": "float8_e4m3fn", "scale": put(torch.ones(1))},
        {"out_dtype": "int8", "granularity": "token"},
        {"out_dtype": "float8_e4m3fn", "granularity": "group", "group_size": math.gcd(width, 128)},
    ]


def norm() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for rows, width in [
            (3, 64),
            (200, 128),
            (5, 4096),
            (300, 1000),
            (600, 4104),
            (7, 2064),
            (600, 4112),
            (2, 33000),
        ]:
            x, w = normal(rows, width, dtype=dtype), normal(width, dtype=dtype)
            quire.rms_norm(x, w)
            quire.fused_add_rms_norm(x.clone(), x.clone(), w)
            quire.layer_norm(x, w, w)
            off_centre = put(x.cpu() + 5)
            quire.layer_norm(off_centre, w, w)
            for options in quantized_results(width):
                quire.rms_norm(x, w, **options)
                quire.fused_add_rms_norm(x.clone(), x.clone(), w, **options)
                quire.layer_norm(x, w, w, **options)
                quire.layer_norm(off_centre, w, w, **options)


def activation() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        for rows, width in [(1, 2048), (77, 30), (40, 28672)]:
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
            for op, options in itertools.product(
                ("silu_and_mul", "gelu_and_mul", "gelu_tanh_and_mul"), quantized_results(width // 2)
            ):
                getattr(quire, op)(x, **options)


def position_encoding() -> None:
    for style, dtype in itertools.product(("neox", "gptj"), (torch.bfloat16, torch.float32)):
        cache = put(torch.rand(100, 64))
        positions = put(torch.tensor([0, 99, -1, 100, 50]))
        quire.rotary_embedding(
            positions, normal(5, 8, 80, dtype=dtype), normal(5, 2, 80, dtype=dtype), cache, style=style
        )
        # Whole heads; few tokens and many.
        for tokens in (5, 1100):
            positions = put(torch.randint(-1, 101, (tokens,)))
            slots = put(torch.randperm(1200)[:tokens])
            q, k, v = (normal(tokens, heads, 64, dtype=dtype) for heads in (5, 3, 3))
            weight = normal(64)
            quire.rotary_embedding(positions, q, k, cache, style=style)
            quire.qk_norm_rope(positions, q, k, weight, weight, cache, style=style)
            for kv, norms in itertools.product((dtype, E4M3), ({}, {"q_weight": weight, "k_weight": weight})):
                caches = [normal(75, 16, 3, 64, dtype=kv) for _ in "kv"]
                quire.rope_and_write_kv(positions, q, k, v, cache, *caches, slots, style=style, **norms)


def quantize(dtype: torch.dtype) -> None:
    """Rows in registers (one, two, four vectors to a thread), rows in groups, elements; and back."""
    for rows, width in [(3, 64), (40, 512), (3, 9008), (2, 20000), (1, 40000), (7, 33)]:
        x = normal(rows, width, dtype=dtype)
        for granularity, group_size in (("tensor", 1), ("token", 1), ("group", 128), ("group", 20)):
            options: dict[str, Any] = {"granularity": granularity, "group_size": group_size}
            q, scale = quire.quantize_fp8(x, scale_ub=1.0, **options)
            quire.quantize_fp8(x, scale=scale, **options)
            quire.dequantize_fp8(q, scale, out_dtype=dtype, **options)
            quire.quantize_int8(x, **options)
            q, scale, zero = quire.quantize_int8(x, symmetric=False, **options)
            quire.quantize_int8(x, symmetric=False, scale=scale, zero_point=zero, **options)
            quire.dequantize_int8(q, scale, zero, out_dtype=dtype, **options)
    column = normal(9, 5, 64, dtype=dtype)[:, ::2]
    quire.dequantize_fp8(*quire.quantize_fp8(column, granularity="token"), granularity="token")
    x = normal(200, 300, dtype=dtype)
    for format, scaling in (("fp8", "block"), ("fp8", "tensor"), ("w8a8", "channel")):
        quire.PackedWeight.quantize(x, format, granularity=scaling).dequantize(dtype)


def words(*shape: int) -> torch.Tensor:
    return put(torch.randint(-(2**31), 2**31, shape).to(torch.int32))


def multiply(w: quire.PackedWeight, tokens: int, dtype: torch.dtype, **options: Any) -> None:
    bias = normal(w.out_features, dtype=dtype)
    quire.quantized_matmul(normal(tokens, w.in_features, dtype=dtype), w, bias=bias, **options)


def quantized_matmul(bits: int) -> None:
    """Both kernels, their tiles, sums in one and more parts, and what weights may have."""
    stored = 4 if bits <= 4 else 8
    for dtype, group_size in ((torch.bfloat16, 128), (torch.float16, 32)):
        k, n = 512, 328
        scales = put((torch.rand(k // group_size, n) * 0.01).to(dtype))
        qweight, qzeros = words(k * bits // 32, n), words(k // group_size, -(-n * bits // 32))
        g_idx = put((torch.randperm(k) // group_size).to(torch.int32))
        plain = quire.PackedWeight.from_gptq(qweight, None, scales, bits=bits)
        ordered = quire.PackedWeight.from_gptq(qweight, qzeros, scales, g_idx, bits=bits)
        ordered.dequantize(dtype)
        for tokens in (1, 9, 17, 33, 70, 130):
            multiply(plain, tokens, dtype)
        for tokens in (3, 20, 90):
            multiply(ordered, tokens, dtype)
            multiply(ordered, tokens, dtype, batch_invariant=True)
        # Rows that begin at no multiple of 16 bytes.
        quire.quantized_matmul(normal(40, k + 1, dtype=dtype)[:, 1:], plain)
    # Groups of any size, an odd number of columns, and scales of 32 bits.
    for k, group_size, scale in ((300, 60, torch.float32), (77, -1, torch.bfloat16)):
        w = quire.PackedWeight.quantize(
            normal(70, k, dtype=scale), f"w{bits}a16", group_size, symmetric=False
        )
        w.dequantize()
        for tokens in (1, 20, 70):
            multiply(w, tokens, torch.bfloat16)
    if bits != stored:
        return
    # More tiles than SMs: some are whole CTAs', those left over are divided along K.
    w = quire.PackedWeight.quantize(normal(1500, 384), f"w{bits}a16", 128)
    multiply(w, 1700, torch.bfloat16)
    if bits == 4:
        awq = quire.PackedWeight.from_awq(words(256, 16), words(2, 16), put(torch.rand(2, 128).half()))
        multiply(awq, 20, torch.float16)
    packed = quire.PackedWeight.from_compressed_tensors(
        weight_packed=words(70, 256 * bits // 32),
        weight_scale=put(torch.rand(70, 2).half()),
        weight_zero_point=words(-(-70 * bits // 32), 2),
        bits=bits,
    )
    multiply(packed, 20, torch.float16)


def quantized_matmul_helped() -> None:
    """SMs without a tile help with the last round, where there are 132: tiles of 64, 128 and 256 rows, one token to 64."""
    for bits, out_features, in_features, counts in (
        (4, 11000, 4032, (1, 16, 24)),
        (4, 17000, 2880, (1, 9, 64)),
        (8, 8520, 4032, (17,)),
    ):
        w = quire.PackedWeight.quantize(normal(out_features, in_features), f"w{bits}a16", 128)
        for tokens in counts:
            x = normal(tokens, in_features)
            if torch.cuda.get_device_properties(DEVICE).multi_processor_count == 132:
                assert "CTAs help" in str(quire.explain("quantized_matmul", x, w))
            # Flags are looked at before anyone writes them, which is right whatever is there: initcheck shall not mind.
            workspace = put(torch.zeros(quire.quantized_matmul_workspace_size(tokens, w), dtype=torch.uint8))
            for _ in range(2):
                quire.quantized_matmul(x, w, workspace=workspace)


def scaled_matmul(dtype: torch.dtype) -> None:
    """Every tile of both kernels, splits of K in clusters, more tiles than SMs, and all kinds of scales."""

    def multiply_scaled(
        m: int, n: int, k: int, *, blocks: bool = False, extra: int = 0, **options: Any
    ) -> None:
        a, b = (normal(rows, k + extra, dtype=dtype)[:, extra:] for rows in (m, n))
        scale_a = put(torch.rand(m, -(-k // 128) if blocks else 1))
        scale_b = put(torch.rand(-(-n // 128), -(-k // 128)) if blocks else torch.rand(n, 1))
        quire.scaled_matmul(a, b, scale_a, scale_b, bias=normal(n), **options)

    for blocks in (False, True):
        for m, n, k in [(1, 200, 512), (20, 200, 2048), (60, 328, 256), (130, 200, 1040), (300, 520, 384)]:
            multiply_scaled(m, n, k, blocks=blocks)
            multiply_scaled(m, n, k, blocks=blocks, out_dtype="float32", batch_invariant=True)
        multiply_scaled(1500, 1600, 128, blocks=blocks)
        multiply_scaled(9, 70, 77, blocks=blocks)
        multiply_scaled(50, 130, 200, blocks=blocks, extra=1)
    if dtype == torch.int8:
        zero = put(torch.randint(-128, 128, (70, 1), dtype=torch.int32))
        one = put(torch.ones(1))
        for k in (256, 33):
            quire.scaled_matmul(
                normal(70, k, dtype=dtype), normal(90, k, dtype=dtype), one, one, zero_point=zero
            )


FAMILIES: dict[str, Callable[[], None]] = {
    **{f"attention_{str(kv)[6:]}": functools.partial(attention_portable, kv) for kv in KV_DTYPES},
    **{
        f"attention_hopper_{str(t)[6:]}_{str(kv)[6:]}": functools.partial(attention_hopper, t, kv)
        for t, kv in HOPPER_DTYPES
    },
    **{f"quantize_{str(t)[6:]}": functools.partial(quantize, t) for t in (*KV_DTYPES[:2], torch.float32)},
    **{f"quantized_matmul_{bits}": functools.partial(quantized_matmul, bits) for bits in (2, 3, 4, 8)},
    **{f"scaled_matmul_{str(t)[6:]}": functools.partial(scaled_matmul, t) for t in (E4M3, torch.int8)},
    **{
        f.__name__: f
        for f in (
            attention_shared_keys,
            attention_batch_invariant,
            attention_float32,
            shared_prefix,
            merge_attention,
            kv_cache,
            norm,
            activation,
            position_encoding,
            quantized_matmul_helped,
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
