"""Calls of every op with their arrays, for the tests of the ways into the library: the answer is quire's own on NumPy arrays.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
from frameworks import np_dtype

import quire

#: The families that quire.jax, quire.torch and the C interface have.
FAMILIES = {
    "quire.activation",
    "quire.attention",
    "quire.kv_cache",
    "quire.norm",
    "quire.position_encoding",
    "quire.quantization",
}
#: Ops that take more than arrays, so that they are no cases but have tests of their own.
WITHOUT_CASES = {"quantized_matmul"}


def ops_of_families():
    """The names of their ops: the functions that take a stream."""
    return {
        name
        for name in quire.__all__
        if getattr(getattr(quire, name), "__module__", "") in FAMILIES
        and "stream" in (getattr(getattr(quire, name), "__kwdefaults__", None) or ())
    }


def rng():
    return np.random.default_rng(7)


def normal(*shape, dtype=np.float32):
    return rng().standard_normal(shape).astype(dtype)


BF16 = ml_dtypes.bfloat16
ROPE = quire.rope_cache(32, 64)
TABLES = np.array([[3, 0, 5], [1, -1, -1], [2, 4, 6]], np.int32)
LENS = np.array([37, 9, 40], np.int32)
LOC = np.array([0, 3, 4, 9], np.int32)
MASK = np.full((9, 1), 0b10110101, np.uint8)


def functional(module, empty, cast=np_dtype):
    """The ops of a module whose ops work in place, in the form of functions that return what they wrote.

    empty(shape, dtype, like) allocates.
    """

    def write_kv(k, v, k_cache, v_cache, slots, **options):
        module.write_kv(k, v, k_cache, v_cache, slots, **options)
        return k_cache, v_cache

    def rope_and_write_kv(p, q, k, v, table, k_cache, v_cache, slots, return_k=False, **options):
        k_out = empty(k.shape, k.dtype, k) if return_k else None
        module.rope_and_write_kv(p, q, k, v, table, k_cache, v_cache, slots, k_out=k_out, **options)
        return (q, k_cache, v_cache, k_out) if return_k else (q, k_cache, v_cache)

    def copy_blocks(cache, pairs):
        module.copy_blocks(cache, pairs)
        return cache

    def gather_kv(k_cache, v_cache, slots, dtype=None, **options):
        shape = (len(slots), *k_cache.shape[2:])
        out = None if dtype is None else tuple(empty(shape, cast(dtype), k_cache) for _ in "kv")
        return module.gather_kv(k_cache, v_cache, slots, out=out, **options)

    def fused_add_rms_norm(x, residual, weight, **options):
        first = module.fused_add_rms_norm(x, residual, weight, **options)
        return (*first, residual) if "out_dtype" in options else first

    own = locals()
    names = ("write_kv", "rope_and_write_kv", "copy_blocks", "gather_kv", "fused_add_rms_norm")
    return lambda op: own[op] if op in names else getattr(module, op)


OURS = functional(quire, lambda shape, dtype, like: np.empty(shape, dtype))

x, w = normal(2, 5, 64), normal(64)
q, k, v = normal(9, 4, 32), normal(9, 2, 32, dtype=np.float32) + 1, normal(9, 2, 32) - 1
k_cache, v_cache = normal(7, 16, 2, 32), normal(7, 16, 2, 32) * 2
slots, positions = np.array([0, 17, -1, 33, 50, 64, 81, 99, 111], np.int32), np.arange(9, dtype=np.int32)
scales, heads = np.array([0.03, 0.04], np.float32), np.array([0.5, -1, 2, 0.1], np.float32)
one = np.array([0.05], np.float32)
int8_cache = rng().integers(-100, 100, (7, 16, 2, 32)).astype(np.int8)
fp8_cache, fp8_q = k_cache.astype(ml_dtypes.float8_e4m3fn), q.astype(ml_dtypes.float8_e4m3fn)

codes = rng().integers(-128, 128, (2, 5, 64)).astype(np.int8)
fp8_codes, fp8_weight = (normal(*shape).astype(ml_dtypes.float8_e4m3fn) for shape in ((9, 200), (130, 200)))
token_scales, zeros = abs(normal(2, 5, 1)) + 0.1, rng().integers(-9, 9, (2, 5, 1)).astype(np.int32)
three = np.array([3], np.int32)

#: id, op, arrays, options. Arrays among the options are operands too.
CASES = [
    ("rms_norm", [x, w], {"eps": 1e-5, "weight_offset": 1.0}),
    ("rms_norm", [x.astype(BF16), w], {}),
    ("rms_norm", [x.astype(np.float16), w], {}),
    ("rms_norm", [x, w], {"out_dtype": "int8", "granularity": "token"}),
    ("rms_norm", [x, w], {"out_dtype": "float8_e4m3fn", "granularity": "group", "group_size": 16}),
    ("rms_norm", [x, w], {"out_dtype": "float8_e4m3fn", "scale": one}),
    ("fused_add_rms_norm", [x, x * 2, w], {}),
    ("fused_add_rms_norm", [x, x * 2, w], {"out_dtype": "int8", "granularity": "token"}),
    ("fused_add_rms_norm", [x, x * 2, w], {"out_dtype": "int8", "scale": one}),
    ("layer_norm", [x, w, w], {}),
    ("layer_norm", [x, w], {"eps": 1e-3}),
    ("layer_norm", [x, w, w], {"out_dtype": "int8", "granularity": "group", "group_size": 32}),
    ("silu_and_mul", [x], {}),
    ("gelu_and_mul", [x.astype(BF16)], {}),
    ("gelu_tanh_and_mul", [x], {}),
    ("silu_and_mul", [x], {"out_dtype": "int8", "granularity": "token"}),
    ("silu_and_mul", [x], {"out_dtype": "float8_e4m3fn", "granularity": "token"}),
    ("gelu_and_mul", [x], {"out_dtype": "int8", "scale": one}),
    ("gelu_tanh_and_mul", [x], {"out_dtype": "int8", "granularity": "group", "group_size": 8}),
    ("gelu_new", [x], {}),
    ("gelu_fast", [x], {}),
    ("gelu_quick", [x], {}),
    ("relu_squared", [x], {}),
    ("rotary_embedding", [positions, q, k, ROPE], {}),
    ("rotary_embedding", [positions, q, None, ROPE[:, :16].copy()], {"style": "gptj"}),
    ("qk_norm_rope", [positions, q, k, w[:32], w[32:], ROPE], {"weight_offset": 1.0}),
    ("qk_norm_rope", [positions, q, None, w[:32], None, ROPE], {}),
    ("write_kv", [k, v, k_cache, v_cache, slots], {}),
    ("write_kv", [k, v, int8_cache, int8_cache + 1, slots], {"k_scale": scales, "v_scale": one}),
    ("write_kv", [k.astype(BF16), v.astype(BF16), fp8_cache, fp8_cache, slots], {"k_scale": one}),
    ("rope_and_write_kv", [positions, q, k, v, ROPE, k_cache, v_cache, slots], {}),
    ("rope_and_write_kv", [positions, q, k, v, ROPE, k_cache, v_cache, slots], {"return_k": True}),
    ("rope_and_write_kv", [positions, q, k, v, ROPE, k_cache, v_cache, slots], {"q_weight": w[:32], "k_weight": w[32:]}),
    ("gather_kv", [k_cache, v_cache, slots], {}),
    ("gather_kv", [int8_cache, int8_cache, slots], {"k_scale": scales, "v_scale": scales, "dtype": "float16"}),
    ("copy_blocks", [k_cache, np.array([[0, 3], [1, 6]], np.int32)], {}),
    ("paged_attention", [q, k_cache, v_cache, TABLES, LENS], {"query_start_loc": LOC}),
    ("paged_attention", [q[:3], k_cache, v_cache, TABLES, LENS], {"return_lse": True}),
    ("paged_attention", [q[:3].astype(BF16), k_cache.astype(BF16), v_cache.astype(BF16), TABLES, LENS], {"scale": 0.3}),
    ("paged_attention", [q[:3], int8_cache, int8_cache, TABLES, LENS], {"k_scale": scales, "v_scale": one}),
    ("paged_attention", [q, k_cache, v_cache, TABLES, LENS], {"query_start_loc": LOC, "window": (5, 0), "softcap": 20.0}),
    ("paged_attention", [q, k_cache, v_cache, TABLES, LENS], {"query_start_loc": LOC, "alibi_slopes": heads, "causal": False}),
    ("paged_attention", [q, k_cache, v_cache, TABLES, LENS], {"query_start_loc": LOC, "sinks": heads, "mask": MASK}),
    ("paged_attention", [q, k_cache, v_cache, TABLES, LENS], {"query_start_loc": LOC, "mask": MASK, "mask_start": LENS - 9, "window": 8}),
    ("paged_attention", [fp8_q[:3], fp8_cache, fp8_cache, TABLES, LENS], {"q_scale": scales * 20, "k_scale": one * 10, "return_lse": True}),
    ("paged_attention", [fp8_q, int8_cache, int8_cache, TABLES, LENS], {"query_start_loc": LOC, "q_scale": one, "v_scale": one, "mask": MASK}),
    ("paged_attention", [q, k_cache, v_cache, TABLES, LENS], {"query_start_loc": LOC, "batch_invariant": True, "return_lse": True}),
    (
        "shared_prefix_attention",
        [q, k_cache, v_cache, np.array([6, 2], np.int32), TABLES % 5, LENS // 2],
        {"query_start_loc": LOC, "return_lse": True, "sinks": heads},
    ),
    (
        "shared_prefix_attention",
        [fp8_q[:3], int8_cache, int8_cache, np.array([6, 2], np.int32), TABLES % 5, LENS // 2],
        {"q_scale": one, "k_scale": scales, "v_scale": scales},
    ),
    ("attention", [q, k, v], {"return_lse": True}),
    ("attention", [q, k, v], {"query_start_loc": LOC, "kv_start_loc": np.array([0, 5, 6, 9], np.int32)}),
    ("attention", [q, k, v], {"query_start_loc": LOC, "window": 3, "mask": MASK}),
    ("attention", [fp8_q, fp8_cache[0, :9].copy(), fp8_cache[1, :9].copy()], {"query_start_loc": LOC, "q_scale": scales, "v_scale": one}),
    ("attention", [fp8_q, int8_cache[0], int8_cache[1]], {"return_lse": True}),
    ("attention", [q, k, v], {"query_start_loc": LOC, "batch_invariant": True}),
    ("quantize_fp8", [x], {}),
    ("quantize_fp8", [x.astype(BF16)], {"granularity": "token", "scale_ub": 1.0}),
    ("quantize_fp8", [x.astype(np.float16)], {"granularity": "group", "group_size": 24}),
    ("quantize_fp8", [x], {"scale": one}),
    ("quantize_int8", [x], {"granularity": "token"}),
    ("quantize_int8", [x], {"symmetric": False}),
    ("quantize_int8", [x], {"symmetric": False, "granularity": "group", "group_size": 32}),
    ("quantize_int8", [x], {"symmetric": False, "granularity": "token", "scale": token_scales, "zero_point": zeros}),
    ("quantize_int8", [x], {"symmetric": False, "scale": one, "zero_point": three}),
    ("dequantize_fp8", [fp8_codes, one], {"out_dtype": "float16"}),
    ("dequantize_fp8", [fp8_weight[:128].copy(), abs(normal(1, 2))], {"granularity": "block"}),
    ("dequantize_int8", [codes, token_scales, zeros], {"granularity": "token", "out_dtype": "bfloat16"}),
    ("dequantize_int8", [codes, abs(normal(2, 5, 3))], {"granularity": "group", "group_size": 30}),
    ("scaled_matmul", [codes, codes[0] // 2, token_scales, one], {"bias": normal(5), "out_dtype": "float32"}),
    ("scaled_matmul", [codes, codes[0] // 2, one, abs(normal(5, 1))], {"zero_point": three}),
    ("scaled_matmul", [codes, codes[0] // 2, one, one], {"zero_point": zeros, "column_sums": (codes[0] // 2).sum(1, dtype=np.int32)}),
    ("scaled_matmul", [fp8_codes, fp8_weight, one, one], {"out_dtype": "float16", "batch_invariant": True}),
    ("scaled_matmul", [fp8_codes, fp8_weight, abs(normal(9, 2)), abs(normal(2, 2))], {"bias": normal(130).astype(BF16)}),
    ("merge_attention", [q, q[..., 0].copy(), q + 1, q[..., 1].copy()], {}),
]  # fmt: skip
IDS = [f"{i}-{case[0]}" for i, case in enumerate(CASES)]


def flat(result):
    return list(result) if isinstance(result, (tuple, list)) else [result]


def expected_of(op, arrays, options):
    """The library's own answer on the CPU."""
    copies = [None if a is None else a.copy() for a in arrays]
    return flat(OURS(op)(*copies, **options))


def split_options(options):
    arrays = {name: value for name, value in options.items() if isinstance(value, np.ndarray)}
    return arrays, {name: value for name, value in options.items() if name not in arrays}


def packed_weights(array, out_features=48, in_features=96, float8=True):
    """Weights of each kind, by name: of arrays that `array` makes from NumPy's, whose framework may lack float8."""
    w = normal(out_features, in_features)
    make = quire.PackedWeight
    weights = {
        "w4a16": make.quantize(array(w), "w4a16", 32),
        "w8a16 with zeros": make.quantize(array(w), "w8a16", 32, symmetric=False),
        "w3a16 of odd groups": make.quantize(array(w), "w3a16", 20),
        "w8a8": make.quantize(array(w), "w8a8"),
    }
    if float8:
        weights["fp8"] = make.quantize(array(w), "fp8")
        weights["fp8 of blocks"] = make.quantize(array(w), "fp8", granularity="block")
    int8, scale = quire.quantize_int8(w, granularity="token")
    given = {"input_scale": array(one), "input_zero_point": array(three)}
    weights["w8a8 with a zero point"] = make.from_int8(array(int8), array(scale), **given)
    order = rng().permutation(in_features).astype(np.int32) // 32
    qweight = rng().integers(-(2**31), 2**31, (in_features // 8, out_features)).astype(np.int32)
    group_scales = abs(normal(3, out_features)).astype(np.float16)
    weights["act-order"] = make.from_gptq(array(qweight), None, array(group_scales), array(order))
    return weights
