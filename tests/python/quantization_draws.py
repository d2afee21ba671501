"""Weights and activations for the tests of quantization, and how their products are compared.

SPDX-License-Identifier: Apache-2.0
"""

import re

import ml_dtypes
import numpy as np
import pytest
from frameworks import as_float64, np_dtype
from tolerances import assert_product_close

import quire

DTYPES = ["float32", "float16", "bfloat16"]
E4M3 = ml_dtypes.float8_e4m3fn


def draw(rng, shape, dtype="float32"):
    return rng.standard_normal(shape).astype(np.float32).astype(np_dtype(dtype))


def rounded(wide, dtype):
    """float64 to a float dtype by way of float32, as the library does: the product is exact in float32 for 16-bit scales."""
    return wide.astype(np.float32).astype(np_dtype(dtype))


def draw_scales(rng, shape, dtype="float16"):
    return (0.01 + 0.05 * rng.random(shape)).astype(np.float32).astype(np_dtype(dtype))


def assert_same_bits(got, want):
    assert got.dtype == want.dtype
    np.testing.assert_array_equal(
        np.ascontiguousarray(got).view(np.uint8), np.ascontiguousarray(want).view(np.uint8)
    )


def activation_dtypes(framework):
    return DTYPES if framework.device == "cpu" else DTYPES[1:]


def check_product(framework, rng, weight, wide, tokens=(1, 3, 17), **kwargs):
    """quantized_matmul against the float64 weight."""
    for dtype in activation_dtypes(framework):
        for count in tokens:
            x = draw(rng, (count, wide.shape[1]), dtype)
            out = framework.numpy(quire.quantized_matmul(framework.array(x), weight, **kwargs))
            assert out.dtype == x.dtype
            assert_product_close(out, as_float64(x) @ wide.T, np.abs(as_float64(x)) @ np.abs(wide).T)


#: Bits, out_features, in_features and numbers of tokens whose last round of tiles, of 64, 128 or 256 rows, leaves some of 132 SMs without one.
HELPED = [
    (4, 11000, 4032, (1, 2, 16, 24, 64)),
    (4, 17000, 2880, (1, 8, 16, 33, 64)),
    (8, 8520, 4032, (17, 32)),
    (8, 17000, 2048, (24, 64)),
]


every_helped = pytest.mark.parametrize(("bits", "out_features", "in_features", "counts"), HELPED)


def skip_unless_helped(backend):
    """Which products are helped with is a matter of how many SMs there are."""
    if backend.device == "cpu":
        pytest.skip("CUDA's kernel for few tokens")
    torch = pytest.importorskip("torch", reason="torch, which counts SMs, is not installed")
    properties = torch.cuda.get_device_properties(0)
    if (properties.major, properties.minor, properties.multi_processor_count) != (9, 0, 132):
        pytest.skip("no Hopper with 132 SMs")
    if not re.search(r"\b90a\b", quire.cuda_architectures()):
        pytest.skip("no code for sm_90a in this build")


def assert_helped(x, weight):
    explanation = quire.explain("quantized_matmul", x, weight)
    assert re.search(r"[1-9]\d* CTAs help the others", str(explanation)), explanation


# ---- Exactness of every format --------------------------------------------------------------------------------------------------


def spread(shape, dtype, value=0):
    """A tensor of any extents that takes no memory."""
    return np.broadcast_to(np.full((1,) * len(shape), value, dtype), shape)
