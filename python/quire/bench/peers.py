"""Other libraries, timed beside ours: torch, FlashInfer, vLLM, FlashAttention-3, and those of a user's file.

SPDX-License-Identifier: Apache-2.0

A peer is a factory for an op. It takes the op's tensors as torch tensors by keyword, and returns a callable
without arguments. Where it cannot (library absent, dtype or shape not supported) it raises anything, and is
left out with that reason.

The environment variable QUIRE_BENCH_PEERS names a folder with the shared objects of an unpacked vLLM wheel (_C.abi3.so,
_vllm_fa3_C.abi3.so), where vLLM itself cannot be imported; or a Python file with more peers::

    def register(add):
        add("rms_norm", "mine", lambda *, out, x, weight, eps: lambda: mine.rms_norm(out, x, weight, eps))

Ops and their keywords (shapes as in quire's functions of the same name):

- rms_norm: out, x, weight, eps. layer_norm: out, x, weight, bias, eps
- fused_add_rms_norm: x, residual, weight, eps (in place)
- silu_and_mul, gelu_and_mul, gelu_tanh_and_mul, gelu_new, gelu_fast, gelu_quick, relu_squared: out, x
- rotary_embedding: positions, q, k, cos_sin_cache (in place, style neox)
- rms_norm_fp8_tensor, _token, _group: out, scale, x, weight, eps; fused_add_rms_norm_fp8_...: with residual after x (groups of 128)
- silu_and_mul_fp8_tensor, _group: out, scale, x
- qk_norm_rope: positions, q, k, q_weight, k_weight, cos_sin_cache, eps (in place, style neox)
- write_kv: k, v, k_cache, v_cache, slot_mapping
- gather_kv: out_k, out_v, k_cache, v_cache, slot_mapping
- paged_attention_decode: out, q, k_cache, v_cache, block_tables, seq_lens, max_seq_len
- paged_attention_mixed: the same, query_start_loc, max_query_len
- quantized_matmul_w4, quantized_matmul_w8: out, x, weight (dequantized, ``[N, K]``), qweight and scales (of GPTQ, symmetric), group_size
- scaled_matmul_channel, scaled_matmul_block: out, a, b, scale_a, scale_b
- quantize_fp8_tensor, _token, _group and quantize_int8_...: out, scale, x (scales are computed; groups of 128)
- dequantize_fp8_token, dequantize_int8_token: out, q, scale
- merge_attention: out_a, lse_a, out_b, lse_b, out, out_lse
- attention_prefill: out, q, k, v ``[batch * length, heads, head_dim]``, query_start_loc, batch, length,
  causal
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

from quire._allocate import Array, framework_of
from quire.bench import BenchError
from quire.bench.arrays import available
from quire.bench.harness import Context, GivenUp, Run

__all__ = ["NotApplicable", "load", "peers_of"]

Factory = Callable[..., Run]


class NotApplicable(Exception):
    """A peer cannot do the case; it is left out without a word."""


_registered: dict[str, dict[str, Factory]] = {}


def add(op: str, name: str, factory: Factory) -> None:
    """Adds a peer to an op, or replaces it."""
    _registered.setdefault(op, {})[name] = factory


_folder: list[Path] = []


def load(path: str) -> None:
    """Runs the register(add) of a Python file, or notes a folder. Raises BenchError where that cannot be done."""
    if os.path.isdir(path):
        _folder[:] = [Path(path)]
        return
    spec = importlib.util.spec_from_file_location("quire_bench_peers", path)
    if spec is None or spec.loader is None or not os.path.isfile(path):
        raise BenchError(f"QUIRE_BENCH_PEERS: {path!r} is no Python file and no folder")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        module.register(add)
    except Exception as error:
        raise BenchError(f"QUIRE_BENCH_PEERS: {path}: {type(error).__name__}: {error}") from None


def peers_of(
    context: Context, op: str, *, only_cpu: dict[str, Run] | None = None, **arguments: Array
) -> dict[str, Run]:
    """The callables of the peers that apply.

    Args:
        context: Of the benchmark.
        op: As listed above.
        only_cpu: More peers, on NumPy arrays.
        arguments: The op's tensors and scalars.
    """
    if not context.use_peers:
        return {}
    runs: dict[str, Run] = {} if context.is_cuda else dict(only_cpu or {})
    factories = {**_BUILT_IN.get(op, {}), **_registered.get(op, {})}
    if not factories:
        return runs
    if not available("torch"):
        context.skipped_peers["torch"] = "not installed"
        return runs
    try:
        tensors = {
            name: context.arrays.as_torch(value)
            if hasattr(type(value), "__dlpack__") and framework_of(value) != "torch"
            else value
            for name, value in arguments.items()
        }
    except Exception as error:
        context.skipped_peers["torch"] = f"{type(error).__name__}: {error}"
        return runs
    for name, factory in factories.items():
        try:
            with context.attempt(f"{op}: {name}"):
                runs[name] = factory(**tensors)
        except (NotApplicable, GivenUp):
            continue
        except ModuleNotFoundError as error:
            context.skipped_peers[name] = f"not installed ({error})"
        except Exception as error:
            text = " ".join(str(error).split())[:200]
            context.skipped_peers[f"{op}: {name}"] = f"{type(error).__name__}: {text}"
    return runs


def _need_cuda(x: Any, library: str) -> None:
    if not x.is_cuda:
        raise NotApplicable(f"{library} is for CUDA")


# ---- torch -------------------------------------------------------------------------------------


def _torch_rms_norm(*, out: Any, x: Any, weight: Any, eps: float) -> Run:
    from torch.nn.functional import rms_norm

    return lambda: rms_norm(x, (x.shape[-1],), weight, eps)


def _torch_fused_add_rms_norm(*, x: Any, residual: Any, weight: Any, eps: float) -> Run:
    from torch.nn.functional import rms_norm

    def run() -> object:
        residual.add_(x)
        return rms_norm(residual, (x.shape[-1],), weight, eps)

    return run


def _torch_layer_norm(*, out: Any, x: Any, weight: Any, bias: Any, eps: float) -> Run:
    from torch.nn.functional import layer_norm

    return lambda: layer_norm(x, (x.shape[-1],), weight, bias, eps)


def _torch_silu_and_mul(*, out: Any, x: Any) -> Run:
    from torch.nn.functional import silu

    gate, up = x.chunk(2, -1)
    return lambda: silu(gate).mul_(up)


def _torch_gelu_tanh_and_mul(*, out: Any, x: Any) -> Run:
    from torch.nn.functional import gelu

    gate, up = x.chunk(2, -1)
    return lambda: gelu(gate, approximate="tanh").mul_(up)


def _torch_gelu_and_mul(*, out: Any, x: Any) -> Run:
    from torch.nn.functional import gelu

    gate, up = x.chunk(2, -1)
    return lambda: gelu(gate).mul_(up)


def _torch_gelu_new(*, out: Any, x: Any) -> Run:
    from torch.nn.functional import gelu

    return lambda: gelu(x, approximate="tanh")


def _torch_rotary_embedding(*, positions: Any, q: Any, k: Any, cos_sin_cache: Any) -> Run:
    import torch

    def rotate(x: Any, cos: Any, sin: Any) -> Any:
        a, b = x.chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)

    def run() -> object:
        cos, sin = cos_sin_cache[positions].unsqueeze(1).chunk(2, -1)
        q.copy_(rotate(q, cos, sin))
        return k.copy_(rotate(k, cos, sin))

    return run


def _torch_write_kv(*, k: Any, v: Any, k_cache: Any, v_cache: Any, slot_mapping: Any) -> Run:
    if k_cache.dtype != k.dtype:
        raise NotApplicable("a cache of another dtype")
    flat_k, flat_v = k_cache.flatten(0, 1), v_cache.flatten(0, 1)

    def run() -> object:
        flat_k.index_copy_(0, slot_mapping, k)
        return flat_v.index_copy_(0, slot_mapping, v)

    return run


def _torch_gather_kv(*, out_k: Any, out_v: Any, k_cache: Any, v_cache: Any, slot_mapping: Any) -> Run:
    import torch

    if k_cache.dtype != out_k.dtype:
        raise NotApplicable("a cache of another dtype")
    flat_k, flat_v = k_cache.flatten(0, 1), v_cache.flatten(0, 1)

    def run() -> object:
        torch.index_select(flat_k, 0, slot_mapping, out=out_k)
        return torch.index_select(flat_v, 0, slot_mapping, out=out_v)

    return run


def _torch_decode(
    *, out: Any, q: Any, k_cache: Any, v_cache: Any, block_tables: Any, seq_lens: Any, max_seq_len: int
) -> Run:
    """SDPA on keys and values that were gathered beforehand: what decode costs without paging."""
    from torch.nn.functional import scaled_dot_product_attention

    if k_cache.dtype != q.dtype:
        raise NotApplicable("a cache of another dtype")
    if int(seq_lens.min()) != max_seq_len:
        raise NotApplicable("lengths differ")

    def contiguous(cache: Any) -> Any:
        rows = cache[block_tables.long()].flatten(1, 2)[:, :max_seq_len]
        return rows.transpose(1, 2).contiguous()

    k, v, query = contiguous(k_cache), contiguous(v_cache), q.unsqueeze(2)
    return lambda: scaled_dot_product_attention(query, k, v, enable_gqa=True)


def _torch_prefill(
    *, out: Any, q: Any, k: Any, v: Any, query_start_loc: Any, batch: int, length: int, causal: bool
) -> Run:
    from torch.nn.functional import scaled_dot_product_attention

    if k.dtype != q.dtype:
        raise NotApplicable("keys of another dtype")
    if q.dtype.itemsize == 1:
        raise NotApplicable("float8 queries")
    query, key, value = (x.unflatten(0, (batch, length)).transpose(1, 2) for x in (q, k, v))
    return lambda: scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=True)


def _torch_prefill_by(backend: str) -> Factory:
    """SDPA held to one backend. It gets K and V repeated for each query head, which not all backends do themselves."""

    def factory(
        *, out: Any, q: Any, k: Any, v: Any, query_start_loc: Any, batch: int, length: int, causal: bool
    ) -> Run:
        _need_cuda(q, backend)
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.nn.functional import scaled_dot_product_attention

        if k.dtype != q.dtype:
            raise NotApplicable("keys of another dtype")
        if q.dtype.itemsize == 1:
            raise NotApplicable("float8 queries")
        group = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
        query, key, value = (x.unflatten(0, (batch, length)).transpose(1, 2) for x in (q, k, v))

        def run() -> object:
            with sdpa_kernel(getattr(SDPBackend, backend)):
                return scaled_dot_product_attention(query, key, value, is_causal=causal)

        return run

    return factory


# ---- FlashInfer --------------------------------------------------------------------------------


def _flashinfer_rms_norm(*, out: Any, x: Any, weight: Any, eps: float) -> Run:
    _need_cuda(x, "FlashInfer")
    from flashinfer.norm import rmsnorm

    return lambda: rmsnorm(x, weight, eps, out=out)


def _flashinfer_fused_add_rms_norm(*, x: Any, residual: Any, weight: Any, eps: float) -> Run:
    _need_cuda(x, "FlashInfer")
    from flashinfer.norm import fused_add_rmsnorm

    return lambda: fused_add_rmsnorm(x, residual, weight, eps)


def _flashinfer_layer_norm(*, out: Any, x: Any, weight: Any, bias: Any, eps: float) -> Run:
    _need_cuda(x, "FlashInfer")
    from flashinfer.norm import layernorm

    gamma, beta = weight.float(), bias.float()
    return lambda: layernorm(x, gamma, beta, eps)


def _flashinfer_silu_and_mul(*, out: Any, x: Any) -> Run:
    _need_cuda(x, "FlashInfer")
    from flashinfer.activation import silu_and_mul

    return lambda: silu_and_mul(x, out=out)


def _flashinfer_gelu_tanh_and_mul(*, out: Any, x: Any) -> Run:
    _need_cuda(x, "FlashInfer")
    from flashinfer.activation import gelu_tanh_and_mul

    return lambda: gelu_tanh_and_mul(x, out=out)


def _flashinfer_rotary_embedding(*, positions: Any, q: Any, k: Any, cos_sin_cache: Any) -> Run:
    _need_cuda(q, "FlashInfer")
    from flashinfer.rope import apply_rope_with_cos_sin_cache_inplace

    flat_q, flat_k, table = q.flatten(1), k.flatten(1), cos_sin_cache.float()
    return lambda: apply_rope_with_cos_sin_cache_inplace(positions, flat_q, flat_k, q.shape[-1], table, True)


def _flashinfer_blocks(block_tables: Any, seq_lens: Any, block_size: int) -> tuple[Any, Any, Any]:
    """Where each sequence's blocks start, all blocks in a row, and the tokens in each sequence's last one."""
    import torch

    counts = (seq_lens + block_size - 1) // block_size
    starts = torch.zeros(len(counts) + 1, dtype=torch.int32, device=counts.device)
    starts[1:] = counts.cumsum(0)
    used = torch.arange(block_tables.shape[1], device=counts.device) < counts.unsqueeze(1)
    return starts, block_tables[used].contiguous(), (seq_lens - (counts - 1) * block_size).int()


def _flashinfer_decode(
    *,
    out: Any,
    q: Any,
    k_cache: Any,
    v_cache: Any,
    block_tables: Any,
    seq_lens: Any,
    max_seq_len: int,
    tensor_cores: bool,
) -> Run:
    _need_cuda(q, "FlashInfer")
    import flashinfer
    import torch

    block_size, num_kv_heads = k_cache.shape[1], k_cache.shape[2]
    workspace = torch.empty(512 << 20, dtype=torch.uint8, device=q.device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=tensor_cores)
    wrapper.plan(
        *_flashinfer_blocks(block_tables, seq_lens, block_size),
        q.shape[1],
        num_kv_heads,
        q.shape[2],
        block_size,
        q_data_type=q.dtype,
        kv_data_type=k_cache.dtype,
    )
    return lambda: wrapper.run(q, (k_cache, v_cache))


def _xqa_decode(
    *, out: Any, q: Any, k_cache: Any, v_cache: Any, block_tables: Any, seq_lens: Any, max_seq_len: int
) -> Run:
    _need_cuda(q, "XQA")
    import torch
    from flashinfer.decode import xqa_batch_decode_with_kv_cache

    if k_cache.dtype not in (q.dtype, torch.float8_e4m3fn):
        raise NotApplicable(f"a cache of {k_cache.dtype}")
    workspace = torch.zeros(256 << 20, dtype=torch.uint8, device=q.device)
    scale = q.shape[-1] ** -0.5
    return lambda: xqa_batch_decode_with_kv_cache(
        q,
        (k_cache, v_cache),
        workspace,
        block_tables,
        seq_lens,
        max_seq_len,
        bmm1_scale=scale,
        bmm2_scale=1.0,
        kv_layout="NHD",
    )


# ---- vLLM --------------------------------------------------------------------------------------


def _vllm_ops(x: Any) -> Any:
    _need_cuda(x, "vLLM")
    import torch

    _load_vllm("_C.abi3.so")
    return torch.ops


@cache
def _load_vllm(library: str) -> None:
    """Registers the ops of one of vLLM's shared objects with torch."""
    import torch

    load_library: Any = torch.ops.load_library
    for folder in _folder:
        for path in sorted(folder.rglob(library)):
            load_library(str(path))
            return
    if library == "_C.abi3.so":
        import vllm._custom_ops
    else:
        import vllm.vllm_flash_attn  # noqa: F401  (loads the library)


def _vllm_rms_norm(*, out: Any, x: Any, weight: Any, eps: float) -> Run:
    op = _vllm_ops(x)._C.rms_norm
    return lambda: op(out, x, weight, eps)


def _vllm_fused_add_rms_norm(*, x: Any, residual: Any, weight: Any, eps: float) -> Run:
    op = _vllm_ops(x)._C.fused_add_rms_norm
    return lambda: op(x, residual, weight, eps)


def _vllm_silu_and_mul(*, out: Any, x: Any) -> Run:
    op = _vllm_ops(x)._C.silu_and_mul
    return lambda: op(out, x)


def _vllm_gelu_tanh_and_mul(*, out: Any, x: Any) -> Run:
    op = _vllm_ops(x)._C.gelu_tanh_and_mul
    return lambda: op(out, x)


def _vllm_rms_norm_quantized(granularity: str) -> Factory:
    def factory(*, out: Any, scale: Any, x: Any, weight: Any, eps: float, residual: Any = None) -> Run:
        ops = _vllm_ops(x)._C
        if granularity == "tensor":
            if residual is not None:
                return lambda: ops.fused_add_rms_norm_static_fp8_quant(out, x, residual, weight, scale, eps)
            return lambda: ops.rms_norm_static_fp8_quant(out, x, weight, scale, eps)
        if granularity == "token":
            return lambda: ops.rms_norm_dynamic_per_token_quant(out, x, weight, scale, eps, None, residual)
        return lambda: ops.rms_norm_per_block_quant(out, x, weight, scale, eps, None, residual, 128, False)

    return factory


def _vllm_silu_and_mul_quantized(granularity: str) -> Factory:
    def factory(*, out: Any, scale: Any, x: Any) -> Run:
        ops = _vllm_ops(x)._C
        if granularity == "tensor":
            return lambda: ops.silu_and_mul_quant(out, x, scale)
        return lambda: ops.silu_and_mul_per_block_quant(out, x, scale, 128, None, False)

    return factory


def _vllm_qk_norm_rope(
    *, positions: Any, q: Any, k: Any, q_weight: Any, k_weight: Any, cos_sin_cache: Any, eps: float
) -> Run:
    import torch

    op = _vllm_ops(q)._C.fused_qk_norm_rope
    heads, kv_heads, head_dim = q.shape[1], k.shape[1], q.shape[2]
    # One tensor of q, k and v, of which v is left alone.
    packed = torch.cat((q, k, k), 1).flatten(1).contiguous()
    table = cos_sin_cache.to(q.dtype)
    return lambda: op(
        packed, heads, kv_heads, kv_heads, head_dim, eps, q_weight, k_weight, table, True, positions
    )


def _vllm_rotary_embedding(*, positions: Any, q: Any, k: Any, cos_sin_cache: Any) -> Run:
    op = _vllm_ops(q)._C.rotary_embedding
    flat_q, flat_k, table = q.flatten(1), k.flatten(1), cos_sin_cache.to(q.dtype)
    return lambda: op(positions, flat_q, flat_k, q.shape[-1], table, True)


def _vllm_write_kv(*, k: Any, v: Any, k_cache: Any, v_cache: Any, slot_mapping: Any) -> Run:
    import torch

    op = _vllm_ops(k)._C_cache_ops.reshape_and_cache_flash
    one = torch.ones((), device=k.device)
    if k_cache.dtype == k.dtype:
        return lambda: op(k, v, k_cache, v_cache, slot_mapping, "auto", one, one)
    if k_cache.dtype != torch.float8_e4m3fn:
        raise NotApplicable(f"a cache of {k_cache.dtype}")
    bytes_k, bytes_v = k_cache.view(torch.uint8), v_cache.view(torch.uint8)
    return lambda: op(k, v, bytes_k, bytes_v, slot_mapping, "fp8", one, one)


def _vllm_decode(version: int) -> Factory:
    def factory(
        *, out: Any, q: Any, k_cache: Any, v_cache: Any, block_tables: Any, seq_lens: Any, max_seq_len: int
    ) -> Run:
        import torch

        ops = _vllm_ops(q)._C
        if k_cache.dtype == torch.int8:
            raise NotApplicable("a cache of int8")
        batch, num_heads, head_dim = q.shape
        num_blocks, block_size, num_kv_heads, _ = k_cache.shape
        is_fp8 = k_cache.dtype == torch.float8_e4m3fn
        raw_k, raw_v = (x.view(torch.uint8) if is_fp8 else x for x in (k_cache, v_cache))
        group = 16 // raw_k.element_size()
        # Its own layout: [blocks, kv_heads, head_dim / group, block_size, group], [.., head_dim, block_size].
        keys = (
            raw_k.view(num_blocks, block_size, num_kv_heads, head_dim // group, group)
            .permute(0, 2, 3, 1, 4)
            .contiguous()
        )
        values = raw_v.permute(0, 2, 3, 1).contiguous()
        one, mode = torch.ones((), device=q.device), "fp8" if is_fp8 else "auto"
        common = (
            q,
            keys,
            values,
            num_kv_heads,
            head_dim**-0.5,
            block_tables,
            seq_lens,
            block_size,
            max_seq_len,
            None,
        )
        tail = (mode, one, one, 0, 0, 0, 64, 0)
        result = torch.empty_like(q)
        if version == 1:
            return lambda: ops.paged_attention_v1(result, *common, *tail)
        parts = -(-max_seq_len // 512)
        sums = torch.empty(batch, num_heads, parts, device=q.device)
        maxima, partial = (
            torch.empty_like(sums),
            torch.empty(batch, num_heads, parts, head_dim, device=q.device, dtype=q.dtype),
        )
        return lambda: ops.paged_attention_v2(result, sums, maxima, partial, *common, *tail)

    return factory


# ---- FlashAttention-3 --------------------------------------------------------------------------


def _fa3(
    q: Any,
    k: Any,
    v: Any,
    starts: Any,
    max_query_len: int,
    max_seq_len: int,
    causal: bool,
    seq_lens: Any = None,
    block_tables: Any = None,
) -> Run:
    """Paged with seq_lens and block_tables, else ragged. With keys in float8 the queries must be, too."""
    _need_cuda(q, "FlashAttention-3")
    import torch

    scales: dict[str, Any] = {}
    if k.dtype == torch.int8:
        raise NotApplicable("keys of int8")
    if k.dtype.itemsize == 1:
        q = q.to(k.dtype)
        one = torch.ones(starts.numel() - 1, k.shape[-2], device=q.device)
        scales = {"q_descale": one, "k_descale": one, "v_descale": one}
    if available("flash_attn_interface"):
        import flash_attn_interface as interface

        if block_tables is None:
            return partial(
                interface.flash_attn_varlen_func,
                *(q, k, v, starts, starts, max_query_len, max_seq_len),
                causal=causal,
                **scales,
            )
        return partial(
            interface.flash_attn_with_kvcache,
            *(q, k, v),
            cache_seqlens=seq_lens,
            page_table=block_tables,
            cu_seqlens_q=starts,
            max_seqlen_q=max_query_len,
            causal=causal,
            **scales,
        )
    _load_vllm("_vllm_fa3_C.abi3.so")
    nothing = (None,) * 5
    return partial(
        torch.ops._vllm_fa3_C.fwd,
        *(q, k, v, None, None, None, None, starts, starts if block_tables is None else None),
        *(None, None, seq_lens, max_query_len, max_seq_len, block_tables, *nothing),
        *(scales.get("q_descale"), scales.get("k_descale"), scales.get("v_descale")),
        *(q.shape[-1] ** -0.5, causal, -1, -1, 0.0, True, None, 0, None, 0, None, 1, 0, None),
    )


def _fa3_decode(
    *, out: Any, q: Any, k_cache: Any, v_cache: Any, block_tables: Any, seq_lens: Any, max_seq_len: int
) -> Run:
    _need_cuda(q, "FlashAttention-3")
    import torch

    starts = torch.arange(q.shape[0] + 1, dtype=torch.int32, device=q.device)
    return _fa3(q, k_cache, v_cache, starts, 1, max_seq_len, True, seq_lens, block_tables)


def _fa3_mixed(
    *,
    out: Any,
    q: Any,
    k_cache: Any,
    v_cache: Any,
    block_tables: Any,
    seq_lens: Any,
    max_seq_len: int,
    query_start_loc: Any,
    max_query_len: int,
) -> Run:
    return _fa3(
        q, k_cache, v_cache, query_start_loc, max_query_len, max_seq_len, True, seq_lens, block_tables
    )


def _fa3_prefill(
    *, out: Any, q: Any, k: Any, v: Any, query_start_loc: Any, batch: int, length: int, causal: bool
) -> Run:
    return _fa3(q, k, v, query_start_loc, length, length, causal)


# ---- Quantization --------------------------------------------------------------------------------


def _torch_dense_matmul(*, out: Any, x: Any, weight: Any, qweight: Any, scales: Any, group_size: int) -> Run:
    """A product with the weight in 16 bits: cuBLAS on a GPU."""
    import torch

    transposed = weight.t()
    return lambda: torch.mm(x, transposed, out=out)


def _vllm_marlin(bits: int) -> Factory:
    def factory(*, out: Any, x: Any, weight: Any, qweight: Any, scales: Any, group_size: int) -> Run:
        import torch

        ops = _vllm_ops(x)._C
        m, k = x.shape
        n = out.shape[1]
        order = torch.empty(0, dtype=torch.int32, device=x.device)
        packed = ops.gptq_marlin_repack(qweight, order, k, n, bits, False)
        columns = [i + 8 * j for i in range(8) for j in range(8)]
        permuted = scales.reshape(-1, 64)[:, columns].reshape(-1, n).contiguous()
        num_sms = torch.cuda.get_device_properties(x.device).multi_processor_count
        locks = torch.zeros(num_sms * 4, dtype=torch.int32, device=x.device)
        # vLLM's number for unsigned codes of this many bits around the middle.
        scalar_type = {4: 0x4000000100400, 8: 0x4000001000800}[bits]
        nothing = (None,) * 5
        return lambda: ops.marlin_gemm(
            *(x, None, packed, None, permuted, *nothing, locks, scalar_type, m, n, k),
            *(True, False, True, False),
        )

    return factory


def _torch_bf16_matmul(*, out: Any, a: Any, b: Any, scale_a: Any, scale_b: Any) -> Run:
    """A product of bfloat16, for the CPU: what W8A8 replaces."""
    import torch

    if a.is_cuda:
        raise NotApplicable("the CPU's yardstick")
    x, w = a.to(torch.bfloat16), b.to(torch.bfloat16).t()
    return lambda: torch.mm(x, w, out=out)


def _torch_scaled_mm(*, out: Any, a: Any, b: Any, scale_a: Any, scale_b: Any) -> Run:
    _need_cuda(a, "cuBLAS")
    import torch

    if a.dtype == torch.int8:
        raise NotApplicable("int8")
    flat = b.t()
    return lambda: torch._scaled_mm(a, flat, scale_a, scale_b.t(), out_dtype=out.dtype)


def _vllm_scaled_mm(*, out: Any, a: Any, b: Any, scale_a: Any, scale_b: Any) -> Run:
    import torch

    ops = _vllm_ops(a)._C
    _load_vllm("_C_stable_libtorch.abi3.so")
    flat = b.t()
    if scale_b.shape[1] > 1:  # scales of blocks, of a column by column
        by_column, transposed = scale_a.t().contiguous().t(), scale_b.t()
        return lambda: torch.ops._C.cutlass_scaled_mm(out, a, flat, by_column, transposed, None)
    return lambda: ops.cutlass_scaled_mm(out, a, flat, scale_a, scale_b.t(), None)


def _vllm_quantize(name: str) -> Factory:
    def factory(*, out: Any, scale: Any, x: Any) -> Run:
        op = getattr(_vllm_ops(x)._C, name)
        extra = (None,) if name != "dynamic_scaled_fp8_quant" else ()
        return lambda: op(out, x, scale, *extra)

    return factory


_BUILT_IN: dict[str, dict[str, Factory]] = {
    "rms_norm": {"torch": _torch_rms_norm, "FlashInfer": _flashinfer_rms_norm, "vLLM": _vllm_rms_norm},
    "fused_add_rms_norm": {
        "torch": _torch_fused_add_rms_norm,
        "FlashInfer": _flashinfer_fused_add_rms_norm,
        "vLLM": _vllm_fused_add_rms_norm,
    },
    "layer_norm": {"torch": _torch_layer_norm, "FlashInfer": _flashinfer_layer_norm},
    **{
        f"{op}_fp8_{granularity}": {"vLLM": _vllm_rms_norm_quantized(granularity)}
        for op in ("rms_norm", "fused_add_rms_norm")
        for granularity in ("tensor", "token", "group")
    },
    **{
        f"silu_and_mul_fp8_{granularity}": {"vLLM": _vllm_silu_and_mul_quantized(granularity)}
        for granularity in ("tensor", "group")
    },
    "qk_norm_rope": {"vLLM": _vllm_qk_norm_rope},
    "silu_and_mul": {
        "torch": _torch_silu_and_mul,
        "FlashInfer": _flashinfer_silu_and_mul,
        "vLLM": _vllm_silu_and_mul,
    },
    "gelu_tanh_and_mul": {
        "torch": _torch_gelu_tanh_and_mul,
        "FlashInfer": _flashinfer_gelu_tanh_and_mul,
        "vLLM": _vllm_gelu_tanh_and_mul,
    },
    "gelu_and_mul": {"torch": _torch_gelu_and_mul},
    "gelu_new": {"torch": _torch_gelu_new},
    "rotary_embedding": {
        "torch": _torch_rotary_embedding,
        "FlashInfer": _flashinfer_rotary_embedding,
        "vLLM": _vllm_rotary_embedding,
    },
    "write_kv": {"torch": _torch_write_kv, "vLLM": _vllm_write_kv},
    "gather_kv": {"torch": _torch_gather_kv},
    "paged_attention_decode": {
        "torch": _torch_decode,
        "FA3": _fa3_decode,
        "FlashInfer tc": partial(_flashinfer_decode, tensor_cores=True),
        "FlashInfer": partial(_flashinfer_decode, tensor_cores=False),
        "XQA": _xqa_decode,
        "vLLM v1": _vllm_decode(1),
        "vLLM v2": _vllm_decode(2),
    },
    "paged_attention_mixed": {"FA3": _fa3_mixed},
    "quantized_matmul_w4": {"torch": _torch_dense_matmul, "Marlin": _vllm_marlin(4)},
    "quantized_matmul_w8": {"torch": _torch_dense_matmul, "Marlin": _vllm_marlin(8)},
    "scaled_matmul_channel": {
        "torch": _torch_bf16_matmul,
        "cuBLAS": _torch_scaled_mm,
        "vLLM CUTLASS": _vllm_scaled_mm,
    },
    "scaled_matmul_block": {"torch": _torch_bf16_matmul, "vLLM CUTLASS": _vllm_scaled_mm},
    "quantize_fp8_tensor": {"vLLM": _vllm_quantize("dynamic_scaled_fp8_quant")},
    "quantize_fp8_token": {"vLLM": _vllm_quantize("dynamic_per_token_scaled_fp8_quant")},
    "quantize_int8_token": {"vLLM": _vllm_quantize("dynamic_scaled_int8_quant")},
    "attention_prefill": {
        "torch": _torch_prefill,
        "FA3": _fa3_prefill,
        "cuDNN": _torch_prefill_by("CUDNN_ATTENTION"),
        "FA2": _torch_prefill_by("FLASH_ATTENTION"),
    },
}
