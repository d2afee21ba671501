"""Work divided over devices: heads over collectives of the framework, keys merged by log-sum-exp. One device stands in for several where there is one.

SPDX-License-Identifier: Apache-2.0
"""

import importlib
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


def test_benchmark_of_tensor_parallelism():
    """Two processes decode the same tokens as one; on the CPU, where the collectives are gloo's."""
    if not frameworks.has_module("torch"):
        pytest.skip("torch is not installed")
    tensor_parallel = importlib.import_module("quire.bench.tensor_parallel")
    shape = tensor_parallel.Shape(2, 64, 96, 4, 2, 16, 128)
    options = {"kind": "cpu", "batches": (3,), "context": 20, "dtype": "float32", "steps": 1, "rounds": 1}
    one, two = (tensor_parallel.run(shape, world, **options)[3] for world in (1, 2))
    np.testing.assert_allclose(two[1], one[1], rtol=1e-4, atol=1e-4)
    assert one[2] == two[2]
    assert len({tuple(tokens) for tokens in one[2]}) == 3  # the steps differ


def two_gpus(name):
    """A framework that is there with two GPUs, or a skip."""
    if not frameworks.has_gpu() or quire.num_cuda_devices() < 2:
        pytest.skip("needs two CUDA devices and a CUDA build")
    made = frameworks.make(name, "cuda:0")
    if isinstance(made, str):
        pytest.skip(f"{name}: {made}")
    return made


def cupy_layers(cupy, k, v):
    """Each device's heads of layer(), all launched before any is waited for."""
    results = []
    for device in range(2):
        own = slice(device * HEADS // 2, (device + 1) * HEADS // 2)
        kv = slice(device * KV_HEADS // 2, (device + 1) * KV_HEADS // 2)
        arrays = [
            positions,
            q[:, own],
            k[:, kv],
            v[:, kv],
            ROPE,
            k_cache[:, :, kv],
            v_cache[:, :, kv],
            slots,
            TABLES,
            LENS,
            LOC,
        ]
        with cupy.cuda.Device(device):
            on = [cupy.asarray(np.ascontiguousarray(a)) for a in arrays]
        results.append(on)
    outs = []
    for on in results:  # device 0 is current for both
        quire.rope_and_write_kv(*on[:8])
        outs.append(quire.paged_attention(on[1], *on[5:7], *on[8:10], query_start_loc=on[10]))
        assert cupy.cuda.Device().id == 0
    return outs


def test_heads_on_two_gpus_with_nccl():
    """One process, two GPUs: each has half of the heads, and NCCL sums what their output projections give."""
    cupy = two_gpus("cupy").cupy
    nccl = pytest.importorskip("cupy.cuda.nccl", reason="this CuPy has no NCCL")
    if not getattr(nccl, "available", True):
        pytest.skip("this CuPy has no NCCL")
    k, v = normal(9, KV_HEADS, 32), normal(9, KV_HEADS, 32)
    want, _ = layer(q, k, v, k_cache, v_cache)
    outs = cupy_layers(cupy, k, v)
    for device, out in enumerate(outs):
        own = slice(device * HEADS // 2, (device + 1) * HEADS // 2)
        assert out.device.id == device
        np.testing.assert_allclose(cupy.asnumpy(out), want[:, own], rtol=1e-4, atol=1e-4)
    projection = normal(HEADS * 32, 64)
    partial = []
    for device, out in enumerate(outs):
        with cupy.cuda.Device(device):
            rows = projection.reshape(2, -1, 64)[device]
            partial.append(out.reshape(len(q), -1) @ cupy.asarray(rows))
            cupy.cuda.Device().synchronize()
    comms = nccl.NcclCommunicator.initAll([0, 1])
    nccl.groupStart()
    for device, (comm, x) in enumerate(zip(comms, partial, strict=True)):
        with cupy.cuda.Device(device):
            comm.allReduce(
                x.data.ptr, x.data.ptr, x.size, nccl.NCCL_FLOAT32, nccl.NCCL_SUM, cupy.cuda.Stream.null.ptr
            )
    nccl.groupEnd()
    for device, x in enumerate(partial):
        with cupy.cuda.Device(device):
            cupy.cuda.Device().synchronize()
            np.testing.assert_allclose(
                cupy.asnumpy(x), want.reshape(len(q), -1) @ projection, rtol=1e-3, atol=1e-3
            )


def test_heads_on_two_gpus_with_cupy():
    """The same without NCCL: results are where their inputs are, and the current device stays."""
    cupy = two_gpus("cupy").cupy
    k, v = normal(9, KV_HEADS, 32), normal(9, KV_HEADS, 32)
    want, _ = layer(q, k, v, k_cache, v_cache)
    outs = cupy_layers(cupy, k, v)
    for device, out in enumerate(outs):
        assert out.device.id == device
        own = slice(device * HEADS // 2, (device + 1) * HEADS // 2)
        np.testing.assert_allclose(cupy.asnumpy(out), want[:, own], rtol=1e-4, atol=1e-4)
    with cupy.cuda.Device(1):
        weight = cupy.ones(32, cupy.float32)
    with pytest.raises(ValueError, match=r"\[rms_norm\] weight: expected "):
        quire.rms_norm(cupy.ones((2, 32), cupy.float32), weight)
    assert cupy.cuda.Device().id == 0


@pytest.mark.parametrize("direct", [False, True], ids=["jit", "direct"])
def test_jax_on_the_second_gpu(direct):
    """Arrays of the second GPU, which is not JAX's default device: the result is there, and right."""
    jax = two_gpus("jax").jax
    quire_jax = importlib.import_module("quire.jax")
    second = jax.devices("cuda")[1]
    x, weight = normal(3, 256), normal(256)
    placed = [jax.device_put(a, second) for a in (x, weight)]
    out = quire.rms_norm(*placed) if direct else jax.jit(lambda x, w: quire_jax.rms_norm(x, w))(*placed)
    assert out.devices() == {second}
    np.testing.assert_allclose(np.asarray(out), quire.rms_norm(x, weight), rtol=1e-5, atol=1e-6)
