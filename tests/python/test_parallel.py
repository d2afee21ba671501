"""Work divided over devices: heads over collectives of the framework, keys merged by log-sum-exp. One device stands in for several where there is one.

SPDX-License-Identifier: Apache-2.0
"""

import itertools
import os
import socket
import subprocess
import sys

import frameworks
import numpy as np
import pytest
from op_cases import LENS, LOC, ROPE, TABLES, k_cache, normal, positions, q, slots, v_cache

import quire

HEADS, KV_HEADS = q.shape[1], k_cache.shape[2]


def layer(q, k, v, k_cache, v_cache):
    """What a layer does between its projections, on some of the heads."""
    q, k_cache, v_cache = q.copy(), k_cache.copy(), v_cache.copy()
    quire.rope_and_write_kv(positions, q, k, v, ROPE, k_cache, v_cache, slots)
    return quire.paged_attention(q, k_cache, v_cache, TABLES, LENS, query_start_loc=LOC, return_lse=True)


def test_head_slices_are_bit_exact():
    k, v = normal(9, KV_HEADS, 32), normal(9, KV_HEADS, 32)
    want, want_lse = layer(q, k, v, k_cache, v_cache)
    for shards in (1, 2):
        own, own_kv = HEADS // shards, KV_HEADS // shards
        for i in range(shards):
            mine, kv = slice(i * own, (i + 1) * own), slice(i * own_kv, (i + 1) * own_kv)
            got, lse = layer(q[:, mine], k[:, kv], v[:, kv], k_cache[:, :, kv], v_cache[:, :, kv])
            np.testing.assert_array_equal(got, want[:, mine])
            np.testing.assert_array_equal(lse, want_lse[:, mine])


@pytest.mark.parametrize("chunks", [2, 3, 5])
def test_keys_in_chunks(chunks):
    """Context parallelism: each part sees a run of whole blocks, the last one with the causal edge; parts are merged by LSE."""
    num_blocks, block_size = 10, 16
    cache = normal(2, num_blocks, block_size, 2, 32)
    query, tables = normal(1, 4, 32), np.arange(num_blocks, dtype=np.int32)[None]
    length = num_blocks * block_size - 3
    want, want_lse = quire.paged_attention(
        query, *cache, tables, np.array([length], np.int32), return_lse=True
    )
    edges = np.linspace(0, num_blocks, chunks + 1).astype(int)
    state = np.zeros_like(query), np.full((1, 4), -np.inf, np.float32)
    for first, last in itertools.pairwise(edges):
        keys = np.array([min(length, last * block_size) - first * block_size], np.int32)
        part = quire.paged_attention(query, *cache, tables[:, first:last].copy(), keys, return_lse=True)
        state = quire.merge_attention(*state, *part)
    np.testing.assert_allclose(state[0], want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state[1], want_lse, rtol=1e-6)


def test_prefill_in_chunks_of_keys():
    """Queries that stand in the last chunk: earlier chunks are seen whole, the last one causally."""
    query, key, value = normal(6, 4, 32), normal(40, 2, 32), normal(40, 2, 32) + 1
    want, want_lse = quire.attention(query, key, value, query_start_loc=np.array([0, 6], np.int32),
                                     kv_start_loc=np.array([0, 40], np.int32), return_lse=True)  # fmt: skip
    queries = np.array([0, 6], np.int32)
    parts = [
        quire.attention(query, key[a:b], value[a:b], query_start_loc=queries, kv_start_loc=np.array([0, b - a], np.int32),
                        causal=causal, return_lse=True)
        for a, b, causal in ((0, 15, False), (15, 31, False), (31, 40, True))
    ]  # fmt: skip
    state = parts[0]
    for part in parts[1:]:
        state = quire.merge_attention(*state, *part)
    np.testing.assert_allclose(state[0], want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state[1], want_lse, rtol=1e-6)


WORKER = """
import os, sys
import torch, torch.distributed as dist
import quire.torch
rank, kind = int(sys.argv[1]), sys.argv[2]
device = torch.device("cpu") if kind == "gloo" else torch.device("cuda", rank)
dist.init_process_group(kind, rank=rank, world_size=2)
generator = torch.Generator().manual_seed(0)
def draw(*shape): return torch.randn(shape, generator=generator)
hidden, heads, kv_heads, dim = draw(3, 64), 4, 2, 16
w_qkv, w_out = draw(heads + 2 * kv_heads, dim, 64) / 8, draw(64, heads, dim) / 8
k_cache, v_cache = draw(4, 8, kv_heads, dim), draw(4, 8, kv_heads, dim)
slots, tables = torch.tensor([5, 13, 21]), torch.tensor([[0], [1], [2]], dtype=torch.int32)
lens = torch.tensor([6, 6, 6], dtype=torch.int32)
def step(q_heads, kv, device):
    x = hidden.to(device)
    q, k, v = (torch.einsum("th,ndh->tnd", x, w.to(device)).contiguous() for w in
               (w_qkv[q_heads], w_qkv[heads:heads + kv_heads][kv], w_qkv[heads + kv_heads:][kv]))
    caches = [c[:, :, kv].to(device).contiguous() for c in (k_cache, v_cache)]
    index = [t.to(device) for t in (slots, tables, lens)]
    quire.torch.write_kv(k, v, *caches, index[0])
    out = quire.torch.paged_attention(q, *caches, *index[1:])
    return out, torch.einsum("tnd,hnd->th", out, w_out[:, q_heads].to(device))
out, partial = step(slice(2 * rank, 2 * rank + 2), slice(rank, rank + 1), device)
gathered = [torch.empty_like(out) for _ in range(2)]
dist.all_gather(gathered, out.contiguous())
dist.all_reduce(partial)
want, want_sum = step(slice(0, heads), slice(0, kv_heads), device)
if kind == "nccl": torch.cuda.synchronize()
torch.testing.assert_close(torch.cat(gathered, 1), want, rtol=2e-3 if kind == "nccl" else 1e-5, atol=2e-3 if kind == "nccl" else 1e-5)
torch.testing.assert_close(partial, want_sum, rtol=1e-3, atol=1e-3)
dist.destroy_process_group()
print("equal")
"""


@pytest.mark.parametrize("backend", ["gloo", "nccl"])
def test_tensor_parallel_with_torch_distributed(backend):
    """Each process has half of the heads; PyTorch's collectives do the rest."""
    made = frameworks.make("torch", "cpu" if backend == "gloo" else "cuda:0")
    if isinstance(made, str):
        pytest.skip(f"torch: {made}")
    if backend == "nccl" and quire.num_cuda_devices() < 2:
        pytest.skip("needs two CUDA devices")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    workers = [
        subprocess.Popen([sys.executable, "-W", "ignore", "-c", WORKER, str(rank), backend], env=environment, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for rank in range(2)
    ]  # fmt: skip
    for worker in workers:
        out, error = worker.communicate(timeout=300)
        assert out.strip().endswith("equal"), error
