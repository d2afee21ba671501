"""Every op, as data: its tensors and a call, for tests that go through all of them; and calls that must raise.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from attention_batch import Batch, prefixed
from frameworks import np_dtype

import quire
from quire import _core
from quire._allocate import from_numpy
from quire._packed_weight import device_of

Arrays = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Op:
    """An op with all that it reads and writes in one dictionary: after a call, the result is what the dictionary holds.

    Names that begin with "host_" stay what they are and are the same in every draw; prepare may make some of the others.
    function: the public function that is called, where that is not the name.
    """

    name: str
    make: Callable[[np.random.Generator, str], dict[str, np.ndarray]]
    call: Callable[..., object]
    prepare: Callable[[Arrays], None] = lambda tensors: None
    function: str = ""

    def __repr__(self) -> str:
        return self.name


def draw(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32).astype(np_dtype(dtype))


ROWS, HIDDEN = 37, 1024
#: Tokens, heads, KV heads and head_dim of the ops on heads; blocks and block_size of the caches.
TOKENS, HEADS, KV_HEADS, DIM = 29, 8, 2, 64
BLOCKS, BLOCK_SIZE = 12, 16


def make_norm(rng: np.random.Generator, dtype: str) -> dict[str, np.ndarray]:
    return {
        "x": draw(rng, (ROWS, HIDDEN), dtype),
        "residual": draw(rng, (ROWS, HIDDEN), dtype),
        "weight": draw(rng, (HIDDEN,), dtype),
        "bias": draw(rng, (HIDDEN,), dtype),
        "out": np.zeros((ROWS, HIDDEN), np_dtype(dtype)),
    }


def make_quantized(rng: np.random.Generator, dtype: str) -> dict[str, np.ndarray]:
    norms = make_norm(rng, dtype)
    norms["out"] = np.zeros((ROWS, HIDDEN), np.int8)
    norms["half_out"] = np.zeros((ROWS, HIDDEN // 2), np.int8)
    norms["token_scales"] = np.zeros((ROWS, 1), np.float32)
    norms["group_scales"] = np.zeros((ROWS, HIDDEN // 128), np.float32)
    return norms


def quantized_ops() -> list[Op]:
    def norm(t: Arrays, **kw: Any) -> object:
        out = (t["out"], t["token_scales"])
        return quire.fused_add_rms_norm(
            t["x"], t["residual"], t["weight"], out=out, out_dtype="int8", granularity="token", **kw
        )

    def gated(t: Arrays, **kw: Any) -> object:
        out = (t["half_out"], t["group_scales"][:, : HIDDEN // 256])
        return quire.silu_and_mul(t["x"], out=out, out_dtype="int8", granularity="group", **kw)

    return [
        Op("fused_add_rms_norm_quantized", make_quantized, norm, function="fused_add_rms_norm"),
        Op("silu_and_mul_quantized", make_quantized, gated, function="silu_and_mul"),
    ]


#: Features of the quantized products.
IN_FEATURES, OUT_FEATURES = 512, 384


def make_quantize(rng: np.random.Generator, dtype: str, to: str) -> dict[str, np.ndarray]:
    return {
        "x": draw(rng, (ROWS, HIDDEN), dtype),
        "q": np.zeros((ROWS, HIDDEN), np_dtype(to)),
        "token_scales": np.zeros((ROWS, 1), np.float32),
        "group_scales": np.zeros((ROWS, HIDDEN // 128), np.float32),
        "scale": np.zeros(1, np.float32),
        "zero_point": np.zeros((ROWS, 1), np.int32),
    }


def make_dequantize(rng: np.random.Generator, dtype: str, to: str) -> dict[str, np.ndarray]:
    return {
        "q": rng.integers(-100, 100, (ROWS, HIDDEN)).astype(np.float32).astype(np_dtype(to)),
        "scales": rng.uniform(0.01, 0.1, (ROWS, 1)).astype(np.float32),
        "out": np.zeros((ROWS, HIDDEN), np_dtype(dtype)),
    }


def make_product(rng: np.random.Generator, dtype: str) -> dict[str, np.ndarray]:
    weight = np.random.default_rng(0).standard_normal((OUT_FEATURES, IN_FEATURES))
    return {
        "x": draw(rng, (TOKENS, IN_FEATURES), dtype),
        "bias": draw(rng, (OUT_FEATURES,), dtype),
        "weight": weight.astype(np.float32).astype(np_dtype(dtype)),
        "out": np.zeros((TOKENS, OUT_FEATURES), np_dtype(dtype)),
    }


def make_scaled(rng: np.random.Generator, dtype: str, of: str) -> dict[str, np.ndarray]:
    def values(*shape: int) -> np.ndarray:
        return rng.integers(-100, 100, shape).astype(np.float32).astype(np_dtype(of))

    return {
        "a": values(TOKENS, IN_FEATURES),
        "b": values(OUT_FEATURES, IN_FEATURES),
        "scale_a": rng.uniform(0.01, 0.1, (TOKENS, 1)).astype(np.float32),
        "scale_b": rng.uniform(0.01, 0.1, (OUT_FEATURES, 1)).astype(np.float32),
        "out": np.zeros((TOKENS, OUT_FEATURES), np_dtype(dtype)),
    }


def quantization_ops() -> list[Op]:
    def product(t: Arrays, **kw: Any) -> object:
        return quire.quantized_matmul(t["x"], t["host_packed"], bias=t["bias"], out=t["out"], **kw)

    def pack(kind: str) -> Callable[[Arrays], None]:
        def prepare(tensors: Arrays) -> None:
            tensors["host_packed"] = quire.PackedWeight.quantize(tensors["weight"], kind)

        return prepare

    def of_checkpoint(tensors: Arrays) -> None:
        """A float8 weight in memory of quire's own, which goes with every framework's activations; scales of blocks."""
        rng = np.random.default_rng(0)
        values = rng.integers(-100, 100, (OUT_FEATURES, IN_FEATURES)).astype(np.float32)
        scale = rng.uniform(0.01, 0.1, (OUT_FEATURES // 128, IN_FEATURES // 128)).astype(np.float32)
        like = _core.empty((1,), "uint8", device_of(tensors["weight"]))
        weight = from_numpy(values.astype(np_dtype("float8_e4m3fn")), like)
        tensors["host_packed"] = quire.PackedWeight.from_fp8(weight, from_numpy(scale, like))

    def scaled(t: Arrays, **kw: Any) -> object:
        return quire.scaled_matmul(t["a"], t["b"], t["scale_a"], t["scale_b"], out=t["out"], **kw)

    def asymmetric(t: Arrays, **kw: Any) -> object:
        out = t["q"], t["token_scales"], t["zero_point"]
        return quire.quantize_int8(t["x"], symmetric=False, granularity="token", out=out, **kw)

    def dequantize(function: Callable[..., object]) -> Callable[..., object]:
        return lambda t, **kw: function(t["q"], t["scales"], granularity="token", out=t["out"], **kw)

    int8, fp8 = (
        {f.__name__: functools.partial(f, **{"of" if f is make_scaled else "to": to})
         for f in (make_quantize, make_dequantize, make_scaled)}
        for to in ("int8", "float8_e4m3fn")
    )  # fmt: skip
    return [
        Op(
            "quantize_int8",
            int8["make_quantize"],
            lambda t, **kw: quire.quantize_int8(t["x"], out=(t["q"], t["scale"]), **kw),
        ),
        Op("quantize_int8_asymmetric", int8["make_quantize"], asymmetric, function="quantize_int8"),
        Op(
            "quantize_fp8",
            fp8["make_quantize"],
            lambda t, **kw: quire.quantize_fp8(
                t["x"], granularity="group", out=(t["q"], t["group_scales"]), **kw
            ),
        ),
        Op("dequantize_int8", int8["make_dequantize"], dequantize(quire.dequantize_int8)),
        Op("dequantize_fp8", fp8["make_dequantize"], dequantize(quire.dequantize_fp8)),
        Op("quantized_matmul", make_product, product, pack("w4a16")),
        Op("quantized_matmul_w8a8", make_product, product, pack("w8a8"), function="quantized_matmul"),
        Op("quantized_matmul_fp8", make_product, product, of_checkpoint, function="quantized_matmul"),
        Op("scaled_matmul", int8["make_scaled"], scaled),
        Op("scaled_matmul_fp8", fp8["make_scaled"], scaled, function="scaled_matmul"),
    ]


def make_gated(rng: np.random.Generator, dtype: str) -> dict[str, np.ndarray]:
    return {"x": draw(rng, (ROWS, 2 * HIDDEN), dtype), "out": np.zeros((ROWS, HIDDEN), np_dtype(dtype))}


def make_plain(rng: np.random.Generator, dtype: str) -> dict[str, np.ndarray]:
    return {"x": draw(rng, (ROWS, HIDDEN), dtype), "out": np.zeros((ROWS, HIDDEN), np_dtype(dtype))}


def make_rotary(rng: np.random.Generator, dtype: str) -> dict[str, np.ndarray]:
    positions = rng.integers(0, 500, TOKENS)
    positions[3] = -1
    return {
        "positions": positions,
        "q": draw(rng, (TOKENS, HEADS, DIM), dtype),
        "k": draw(rng, (TOKENS, KV_HEADS, DIM), dtype),
        "table": quire.rope_cache(DIM, 500, theta=float(rng.integers(1000, 9000))),
    }


def make_kv(rng: np.random.Generator, dtype: str) -> dict[str, np.ndarray]:
    slots = rng.permutation(BLOCKS * BLOCK_SIZE)[:TOKENS]
    slots[5] = -1
    return {
        "k": draw(rng, (TOKENS, KV_HEADS, DIM), dtype),
        "v": draw(rng, (TOKENS, KV_HEADS, DIM), dtype),
        "k_cache": draw(rng, (BLOCKS, BLOCK_SIZE, KV_HEADS, DIM), dtype),
        "v_cache": draw(rng, (BLOCKS, BLOCK_SIZE, KV_HEADS, DIM), dtype),
        "slots": slots,
    }


def make_rope_and_write(rng: np.random.Generator, dtype: str) -> dict[str, np.ndarray]:
    weights = {"q_weight": draw(rng, (DIM,), dtype), "k_weight": draw(rng, (DIM,), dtype)}
    return make_kv(rng, dtype) | make_rotary(rng, dtype) | weights


def call_rope_and_write(t: Arrays, **kw: Any) -> object:
    tensors = (t[name] for name in ("positions", "q", "k", "v", "table", "k_cache", "v_cache", "slots"))
    return quire.rope_and_write_kv(
        *tensors, q_weight=t["q_weight"], k_weight=t["k_weight"], k_out=t["k"], **kw
    )


def make_kv_int8(rng: np.random.Generator, dtype: str) -> dict[str, np.ndarray]:
    arrays = make_kv(rng, dtype)
    for name in ("k_cache", "v_cache"):
        arrays[name] = rng.integers(-127, 128, arrays[name].shape, dtype=np.int8)
        arrays[name[0] + "_scale"] = rng.uniform(0.01, 0.1, KV_HEADS).astype(np.float32)
    return arrays


def make_pool(rng: np.random.Generator, dtype: str) -> dict[str, np.ndarray]:
    return {
        "pool": draw(rng, (3, 2, BLOCKS, BLOCK_SIZE, KV_HEADS, DIM), dtype),
        "pairs": rng.permutation(BLOCKS)[:10].reshape(5, 2),
    }


def make_copy(rng: np.random.Generator, dtype: str) -> dict[str, np.ndarray]:
    return {
        "cache": draw(rng, (BLOCKS, BLOCK_SIZE, KV_HEADS, DIM), dtype),
        "pairs": rng.permutation(BLOCKS)[:10].reshape(5, 2),
    }


def make_swap(rng: np.random.Generator, dtype: str) -> dict[str, np.ndarray]:
    return {
        "dst": draw(rng, (BLOCKS, BLOCK_SIZE, KV_HEADS, DIM), dtype),
        "src": draw(rng, (BLOCKS, BLOCK_SIZE, KV_HEADS, DIM), dtype),
        "host_pairs": np.array([[0, 3], [1, 4], [7, 0], [5, 11]], np.int64),
    }


def make_paged(
    rng: np.random.Generator,
    dtype: str,
    *,
    q_lens: list[int],
    kv_lens: list[int],
    decode: bool = False,
    dim: int = DIM,
) -> dict[str, np.ndarray]:
    # The same lengths in another order: other contents of seq_lens, the same shapes.
    order = rng.permutation(len(kv_lens)) if decode else np.arange(len(kv_lens))
    batch = Batch.make(
        rng,
        q_lens=q_lens,
        kv_lens=[kv_lens[i] for i in order],
        heads=HEADS,
        kv_heads=KV_HEADS,
        dim=dim,
        block_size=BLOCK_SIZE,
        dtype=dtype,
        decode=decode,
    )
    arrays = {
        name: getattr(batch, name)
        for name in ("q", "k_cache", "v_cache", "block_tables", "seq_lens", "query_start_loc")
    }
    arrays["out"] = np.zeros_like(batch.q)
    return {name: array for name, array in arrays.items() if array is not None}


def call_paged(t: Arrays, **keywords: Any) -> object:
    return quire.paged_attention(
        t["q"],
        t["k_cache"],
        t["v_cache"],
        t["block_tables"],
        t["seq_lens"],
        query_start_loc=t.get("query_start_loc"),
        out=t["out"],
        **keywords,
    )


def make_attention(rng: np.random.Generator, dtype: str) -> dict[str, np.ndarray]:
    return {
        "q": draw(rng, (TOKENS, HEADS, DIM), dtype),
        "k": draw(rng, (300, KV_HEADS, DIM), dtype),
        "v": draw(rng, (300, KV_HEADS, DIM), dtype),
        "query_start_loc": np.array([0, int(rng.integers(5, 20)), TOKENS], np.int32),
        "kv_start_loc": np.array([0, int(rng.integers(100, 200)), 300], np.int32),
        "out": np.zeros((TOKENS, HEADS, DIM), np_dtype(dtype)),
    }


def make_prefixed(rng: np.random.Generator, dtype: str) -> dict[str, np.ndarray]:
    prefix, own, _ = prefixed(
        rng,
        num_prefix_blocks=90,
        q_lens=[2] * 20,
        kv_lens=[3, 40] * 10,
        heads=HEADS,
        kv_heads=KV_HEADS,
        dim=DIM,
        block_size=BLOCK_SIZE,
        dtype=dtype,
    )
    return {
        "q": own.q,
        "k_cache": own.k_cache,
        "v_cache": own.v_cache,
        "prefix": prefix,
        "tables": own.block_tables,
        "lens": own.seq_lens,
        "starts": own.query_start_loc,
        "mask": rng.integers(0, 256, (40, 1), dtype=np.uint8),
        "out": np.zeros_like(own.q),
    }


def make_merge(rng: np.random.Generator, dtype: str) -> dict[str, np.ndarray]:
    return {
        "out_a": draw(rng, (TOKENS, HEADS, DIM), dtype),
        "lse_a": draw(rng, (TOKENS, HEADS), "float32"),
        "out_b": draw(rng, (TOKENS, HEADS, DIM), dtype),
        "lse_b": draw(rng, (TOKENS, HEADS), "float32"),
        "out": np.zeros((TOKENS, HEADS, DIM), np_dtype(dtype)),
        "out_lse": np.zeros((TOKENS, HEADS), np.float32),
    }


def activation(name: str, make: Callable[..., dict[str, np.ndarray]]) -> Op:
    return Op(name, make, lambda t, **kw: getattr(quire, name)(t["x"], out=t["out"], **kw))


#: Long enough that a sequence's keys are split over CTAs, whose results meet in the shared workspace.
LONG = 20000

OPS = {
    op.name: op
    for op in [
        Op("rms_norm", make_norm, lambda t, **kw: quire.rms_norm(t["x"], t["weight"], out=t["out"], **kw)),
        Op(
            "fused_add_rms_norm",
            make_norm,
            lambda t, **kw: quire.fused_add_rms_norm(t["x"], t["residual"], t["weight"], **kw),
        ),
        Op(
            "layer_norm",
            make_norm,
            lambda t, **kw: quire.layer_norm(t["x"], t["weight"], t["bias"], out=t["out"], **kw),
        ),
        *quantized_ops(),
        *quantization_ops(),
        *(activation(name, make_gated) for name in ("silu_and_mul", "gelu_and_mul", "gelu_tanh_and_mul")),
        *(activation(name, make_plain) for name in ("gelu_new", "gelu_fast", "gelu_quick", "relu_squared")),
        Op(
            "rotary_embedding",
            make_rotary,
            lambda t, **kw: quire.rotary_embedding(t["positions"], t["q"], t["k"], t["table"], **kw),
        ),
        Op(
            "qk_norm_rope",
            make_rope_and_write,
            lambda t, **kw: quire.qk_norm_rope(
                t["positions"], t["q"], t["k"], t["q_weight"], t["k_weight"], t["table"], **kw
            ),
        ),
        Op("rope_and_write_kv", make_rope_and_write, call_rope_and_write),
        Op(
            "write_kv",
            make_kv,
            lambda t, **kw: quire.write_kv(t["k"], t["v"], t["k_cache"], t["v_cache"], t["slots"], **kw),
        ),
        Op(
            "gather_kv",
            make_kv,
            lambda t, **kw: quire.gather_kv(
                t["k_cache"], t["v_cache"], t["slots"], out=(t["k"], t["v"]), **kw
            ),
        ),
        Op(
            "write_kv_int8",
            make_kv_int8,
            lambda t, **kw: quire.write_kv(
                t["k"],
                t["v"],
                t["k_cache"],
                t["v_cache"],
                t["slots"],
                k_scale=t["k_scale"],
                v_scale=t["v_scale"],
                **kw,
            ),
            function="write_kv",
        ),
        Op(
            "gather_kv_int8",
            make_kv_int8,
            lambda t, **kw: quire.gather_kv(
                t["k_cache"],
                t["v_cache"],
                t["slots"],
                k_scale=t["k_scale"],
                v_scale=t["v_scale"],
                out=(t["k"], t["v"]),
                **kw,
            ),
            function="gather_kv",
        ),
        Op(
            "copy_blocks_of_all_layers",  # as KVCache.copy_blocks does
            make_pool,
            lambda t, **kw: quire.copy_blocks(t["pool"].swapaxes(0, 2), t["pairs"], **kw),
            function="copy_blocks",
        ),
        Op("copy_blocks", make_copy, lambda t, **kw: quire.copy_blocks(t["cache"], t["pairs"], **kw)),
        Op(
            "swap_blocks",
            make_swap,
            lambda t, **kw: quire.swap_blocks(t["dst"], t["src"], t["host_pairs"], **kw),
        ),
        Op(
            "paged_decode",
            functools.partial(make_paged, q_lens=[1, 1, 1, 1], kv_lens=[1, 150, 67, 300], decode=True),
            call_paged,
            function="paged_attention",
        ),
        Op(
            "paged_mixed",
            functools.partial(make_paged, q_lens=[1, 40, 17], kv_lens=[200, 90, 17]),
            call_paged,
            function="paged_attention",
        ),
        Op(
            "paged_long",
            functools.partial(make_paged, q_lens=[1, 1], kv_lens=[LONG, 700], decode=True, dim=128),
            call_paged,
            function="paged_attention",
        ),
        Op(
            "attention",
            make_attention,
            lambda t, **kw: quire.attention(
                t["q"],
                t["k"],
                t["v"],
                query_start_loc=t["query_start_loc"],
                kv_start_loc=t["kv_start_loc"],
                out=t["out"],
                **kw,
            ),
        ),
        Op(
            "shared_prefix_attention",
            make_prefixed,
            lambda t, **kw: quire.shared_prefix_attention(
                t["q"],
                t["k_cache"],
                t["v_cache"],
                t["prefix"],
                t["tables"],
                t["lens"],
                query_start_loc=t["starts"],
                mask=t["mask"],
                out=t["out"],
                **kw,
            ),
        ),
        Op(
            "merge_attention",
            make_merge,
            lambda t, **kw: quire.merge_attention(
                t["out_a"], t["lse_a"], t["out_b"], t["lse_b"], out=t["out"], out_lse=t["out_lse"], **kw
            ),
        ),
    ]
}

every_op = pytest.mark.parametrize("op", list(OPS.values()), ids=list(OPS))

MALFORMED: dict[str, tuple[type[Exception], Callable[[Any, Arrays, Arrays], object]]] = {
    "shape": (ValueError, lambda torch, n, p: quire.rms_norm(n["x"], n["weight"][1:], out=n["out"])),
    "dtype": (TypeError, lambda torch, n, p: quire.rms_norm(n["x"], n["weight"].int(), out=n["out"])),
    "no tensor": (TypeError, lambda torch, n, p: quire.rms_norm(n["x"], "weight", out=n["out"])),
    "other device": (
        ValueError,
        lambda torch, n, p: quire.rms_norm(n["x"], torch.ones(HIDDEN, dtype=n["x"].dtype), out=n["out"]),
    ),
    "overlap": (ValueError, lambda torch, n, p: quire.fused_add_rms_norm(n["x"], n["x"], n["weight"])),
    "bad stream": (
        TypeError,
        lambda torch, n, p: quire.rms_norm(n["x"], n["weight"], out=n["out"], stream="x"),
    ),
    "small workspace": (
        ValueError,
        lambda torch, n, p: call_paged(p, workspace=torch.empty(16, dtype=torch.uint8, device="cuda")),
    ),
    "bad option": (ValueError, lambda torch, n, p: call_paged(p, validate="some")),
    "validate full": (ValueError, lambda torch, n, p: call_paged(p, validate="full")),
    "bad pair": (
        IndexError,
        lambda torch, n, p: quire.swap_blocks(p["k_cache"], p["v_cache"], np.array([[0, 10**6]])),
    ),
}
