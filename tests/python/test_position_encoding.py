"""rotary_embedding against float64, and rope_cache against HF transformers.

SPDX-License-Identifier: Apache-2.0
"""

import numpy as np
import pytest
from frameworks import as_float64, np_dtype
from reference import position_encoding as reference
from tolerances import assert_close

import quire

DTYPES = ["float32", "float16", "bfloat16"]
STYLES = ["neox", "gptj"]


def draw(rng, shape, dtype):
    return rng.standard_normal(shape).astype(np.float32).astype(np_dtype(dtype))


def check(
    backend, rng, positions, heads, kv_heads, head_dim, rotary_dim, style, dtype, table_dtype="float32"
):
    q, k = (
        draw(rng, (len(positions), heads, head_dim), dtype),
        draw(rng, (len(positions), kv_heads, head_dim), dtype),
    )
    table = quire.rope_cache(head_dim, 64, rotary_dim=rotary_dim, dtype=table_dtype)
    bq, bk = backend.array(q), backend.array(k) if kv_heads else None
    got_q, got_k = quire.rotary_embedding(backend.array(positions), bq, bk, backend.array(table), style=style)
    assert got_q is bq
    assert got_k is bk
    assert_close(
        "rotary", backend.numpy(bq), reference.rotary(positions, as_float64(q), as_float64(table), style)
    )
    if kv_heads:
        assert_close(
            "rotary", backend.numpy(bk), reference.rotary(positions, as_float64(k), as_float64(table), style)
        )


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [2, 8, 30, 64, 80, 128, 256])
def test_head_dims(backend, rng, head_dim, dtype, style):
    positions = rng.integers(0, 64, 7)
    check(backend, rng, positions, 5, 1, head_dim, None, style, dtype)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("rotary_dim", [2, 6, 32, 64])
@pytest.mark.parametrize("table_dtype", DTYPES)
def test_partial_rotary(backend, rng, rotary_dim, table_dtype, style):
    check(
        backend,
        rng,
        rng.integers(0, 64, 9).astype(np.int32),
        4,
        2,
        96,
        rotary_dim,
        style,
        "bfloat16",
        table_dtype,
    )


@pytest.mark.parametrize("num_tokens", [0, 1, 2, 65, 300])
@pytest.mark.parametrize("kv_heads", [0, 1, 8])
def test_token_and_head_counts(backend, rng, num_tokens, kv_heads):
    check(backend, rng, rng.integers(0, 64, num_tokens), 8, kv_heads, 64, None, "neox", "float16")


@pytest.mark.parametrize("style", STYLES)
def test_every_writable_framework(framework, rng, style):
    if not framework.writable:
        with pytest.raises(
            ValueError, match=r"\[rotary_embedding\] q: expected a writable tensor, got a JAX array"
        ):
            quire.rotary_embedding(
                framework.array(np.zeros(1, np.int32)),
                framework.array(np.zeros((1, 1, 8), np.float32)),
                None,
                framework.array(quire.rope_cache(8, 4)),
                style=style,
            )
        return
    check(framework, rng, rng.integers(0, 64, 5), 4, 2, 64, 32, style, "bfloat16")


@pytest.mark.parametrize("index_dtype", [np.int32, np.int64])
def test_positions_out_of_range(backend, rng, index_dtype):
    """-1 is a silent skip; any other value outside the table leaves the token as it is and is reported once."""
    limits = np.iinfo(index_dtype)
    positions = np.array([3, -1, 64, -2, limits.max, limits.min, 63], index_dtype)
    q = draw(rng, (len(positions), 2, 16), "float32")
    table = quire.rope_cache(16, 64)
    bq = backend.array(q)
    quire.rotary_embedding(backend.array(positions), bq, None, backend.array(table))
    got = backend.numpy(bq)
    np.testing.assert_array_equal(got[1:6], q[1:6])
    assert_close("rotary", got, reference.rotary(positions, as_float64(q), as_float64(table), "neox"))
    with pytest.raises(
        IndexError, match=r"\[rotary_embedding\] positions: expected a value in range \(or -1 to skip\), got "
    ):
        quire.check_errors(backend.device)
    quire.check_errors(backend.device)


def test_strided_packed_projection(backend, rng):
    """q and k as slices of one packed qkv tensor."""
    qkv = draw(rng, (6, 4 + 2 + 2, 64), "bfloat16")
    positions = np.arange(6)
    table = quire.rope_cache(64, 64)
    packed = backend.array(qkv)
    quire.rotary_embedding(backend.array(positions), packed[:, :4], packed[:, 4:6], backend.array(table))
    got = backend.numpy(packed)
    assert_close(
        "rotary", got[:, :6], reference.rotary(positions, as_float64(qkv[:, :6]), as_float64(table), "neox")
    )
    np.testing.assert_array_equal(got[:, 6:].view(np.uint16), qkv[:, 6:].view(np.uint16))


def test_bad_calls():
    positions, q, table = np.zeros(2, np.int32), np.zeros((2, 1, 8), np.float32), quire.rope_cache(8, 4)
    with pytest.raises(ValueError, match=r"positions: expected int32 \[2\], got int32 \[3\]"):
        quire.rotary_embedding(np.zeros(3, np.int32), q, None, table)
    with pytest.raises(TypeError, match=r"positions: expected int32 or int64, got uint8"):
        quire.rotary_embedding(np.zeros(2, np.uint8), q, None, table)
    with pytest.raises(
        ValueError,
        match=r"cos_sin_cache: expected an even rotary_dim of at most head_dim 8, got float32 \[4, 10\]",
    ):
        quire.rotary_embedding(positions, q, None, np.zeros((4, 10), np.float32))
    with pytest.raises(ValueError, match=r'style: expected "neox" or "gptj", got "llama"'):
        quire.rotary_embedding(positions, q, None, table, style="llama")
    with pytest.raises(ValueError, match=r"k: expected memory apart from q"):
        quire.rotary_embedding(positions, q, q, table)


SCALINGS = {
    "default": None,
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
    "yarn-deepseek": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 256,
        "beta_fast": 16,
        "beta_slow": 2,
        "mscale": 0.707,
        "mscale_all_dim": 1.2,
    },
    "yarn-untruncated": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 512,
        "truncate": False,
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    },
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0 + 0.01 * i for i in range(32)],
        "long_factor": [1.5 + 0.1 * i for i in range(32)],
        "original_max_position_embeddings": 512,
        "factor": 4.0,
    },
}


@pytest.mark.parametrize("length", [256, 2048, 4096])
@pytest.mark.parametrize("kind", list(SCALINGS))
def test_rope_cache_equals_transformers(torch, kind, length):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    scaling = SCALINGS[kind]
    parameters = {"rope_theta": 10000.0, **({"rope_type": "default"} if scaling is None else scaling)}
    config = transformers.LlamaConfig(
        hidden_size=256,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        rope_parameters=parameters,
    )
    rope = LlamaRotaryEmbedding(config)
    positions = torch.arange(length)[None]
    cos, sin = rope(torch.zeros(1, length, 256), positions)
    ours = quire.rope_cache(
        64,
        length,
        theta=10000.0,
        scaling=None if scaling is None else {"max_position_embeddings": 2048, **scaling},
    )
    error = np.maximum(
        np.abs(ours[:, :32] - cos[0, :, :32].numpy()), np.abs(ours[:, 32:] - sin[0, :, :32].numpy())
    )
    limit = np.full((length, 1), 1e-6)
    if kind == "dynamic" and length > 2048:
        # torch's float32 power of this base is one ulp off in one frequency; the angle carries that times the position.
        limit += np.arange(length)[:, None] * 2.0**-24
    assert (error <= limit).all()


def test_rope_cache_in_a_framework(framework):
    like = framework.array(np.zeros(1, np.float32))
    table = quire.rope_cache(16, 8, dtype="bfloat16", like=like)
    assert type(table) is type(like)
    np.testing.assert_array_equal(
        framework.numpy(table).astype(np.float32),
        quire.rope_cache(16, 8, dtype="bfloat16").astype(np.float32),
    )


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        ({"rotary_dim": 7}, "rotary_dim: expected an even number"),
        ({"rotary_dim": 128}, "rotary_dim: expected an even number of 2 to head_dim 64"),
        ({"theta": 0.0}, "theta: expected a finite number above 0"),
        ({"theta": float("inf")}, "theta: expected a finite number above 0, got inf"),
        ({"theta": float("nan")}, "theta: expected a finite number above 0, got nan"),
        (
            {"theta": 1.0, "scaling": SCALINGS["yarn"]},
            "theta: expected a number above 1 for rope_type 'yarn', got 1.0",
        ),
        ({"max_position": 0}, "max_position: expected 1 or more, got 0"),
        (
            {"scaling": {**SCALINGS["longrope"], "original_max_position_embeddings": 1}},
            "'original_max_position_embeddings' above 1 for rope_type 'longrope' without 'attention_factor', got 1.0",
        ),
        (
            {"scaling": {**SCALINGS["longrope"], "short_factor": ["a"], "long_factor": ["a"]}},
            "scaling: expected 'short_factor' with 32 numbers",
        ),
        (
            {"scaling": {**SCALINGS["longrope"], "short_factor": [0.0] * 32}},
            "scaling: expected 'short_factor' above 0, got 0.0",
        ),
        ({"scaling": {**SCALINGS["yarn"], "beta_fast": -1}}, "expected 'beta_fast' above 0"),
        ({"scaling": {**SCALINGS["yarn"], "attention_factor": "x"}}, "expected 'attention_factor' above 0"),
        (
            {"scaling": {"rope_type": "dynamic", "factor": 2.0, "max_position_embeddings": "x"}},
            "expected 'max_position_embeddings' above 0",
        ),
        (
            {
                "theta": 1e38,
                "scaling": {"rope_type": "dynamic", "factor": 64.0, "max_position_embeddings": 4},
            },
            "theta, scaling: expected frequencies above 0 and finite in float32, got 0.0",
        ),
        ({"theta": 1e300}, "theta, scaling: expected frequencies above 0 and finite in float32, got 0.0"),
        (
            {"scaling": {"rope_type": "ntk"}},
            "expected rope_type default, linear, dynamic, yarn, longrope or llama3, got 'ntk'",
        ),
        ({"scaling": {"rope_type": "linear"}}, "expected 'factor' above 0 for rope_type 'linear', got None"),
        ({"scaling": {"rope_type": "yarn", "factor": 2.0}}, "'original_max_position_embeddings' above 0"),
        (
            {"scaling": {**SCALINGS["longrope"], "short_factor": [1.0]}},
            "'short_factor' with 32 numbers, got 1",
        ),
    ],
)
def test_rope_cache_refuses(kwargs, text):
    with pytest.raises(ValueError, match=r"\[rope_cache\] .*" + text):
        quire.rope_cache(64, kwargs.pop("max_position", 16), **kwargs)


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        ({"head_dim": 64.0}, "head_dim: expected an integer, got float"),
        ({"max_position": 4.5}, "max_position: expected an integer, got float"),
        ({"rotary_dim": 8.0}, "rotary_dim: expected an integer, got float"),
        ({"theta": "10000"}, "theta: expected a number, got str"),
        ({"dtype": "int8"}, "dtype: expected float32, float16 or bfloat16, got int8"),
        ({"dtype": None}, "dtype: expected float32, float16 or bfloat16, got None"),
        ({"scaling": "yarn"}, "scaling: expected a mapping or None, got str"),
        ({"like": [1]}, "like: expected a tensor"),
        ({"like": np.ma.zeros(2)}, "like: expected a tensor without a mask"),
    ],
)
def test_rope_cache_refuses_types(kwargs, text):
    with pytest.raises(TypeError, match=r"\[rope_cache\] " + text):
        quire.rope_cache(**{"head_dim": 64, "max_position": 16, **kwargs})


@pytest.mark.parametrize("dtype", DTYPES)
def test_rope_cache_like_a_quire_tensor(backend, dtype):
    like = quire.empty((1,), "float32", backend.device)
    table = quire.rope_cache(16, 8, dtype=dtype, like=like)
    assert isinstance(table, quire.Tensor)
    assert (table.shape, table.dtype, table.device) == ((8, 16), dtype, like.device)
    host = quire.empty((8, 16), dtype, "cpu")
    quire.swap_blocks(host, table, np.array([[i, i] for i in range(8)]))
    backend.synchronize()
    np.testing.assert_array_equal(
        host.numpy().astype(np.float32), quire.rope_cache(16, 8, dtype=dtype).astype(np.float32)
    )
