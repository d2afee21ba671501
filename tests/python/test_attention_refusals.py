"""What attention refuses, and in which words.

SPDX-License-Identifier: Apache-2.0
"""

import numpy as np
import pytest
from attention_batch import (
    good_arguments,
)

import quire


@pytest.mark.parametrize(
    ("name", "value", "error", "text"),
    [
        (
            "q",
            np.ones((2, 4, 12), np.float32),
            quire.UnsupportedError,
            r"q: expected a head_dim that is a multiple of 8, from 8 to 256, got 12",
        ),
        ("q", np.ones((2, 4, 264), np.float32), quire.UnsupportedError, r"from 8 to 256, got 264"),
        ("q", np.ones((2, 4, 24), np.float32), ValueError, r"k_cache: expected head_dim 24 like q, got 16"),
        (
            "q",
            np.ones((2, 3, 16), np.float32),
            ValueError,
            r"q: expected a num_heads that is a positive multiple of num_kv_heads 2, got 3",
        ),
        (
            "q",
            np.ones((3, 4, 16), np.float32),
            ValueError,
            r"out: expected float32 \[3, 4, 16\] like q|q: expected one token",
        ),
        (
            "q",
            np.ones((2, 4, 16), np.int8),
            TypeError,
            r"q: expected float32, float16, bfloat16 or float8_e4m3fn, got int8",
        ),
        (
            "k_cache",
            np.ones((3, 4, 2, 16), np.float16),
            TypeError,
            r"k_cache: expected float32, float8_e4m3fn, float8_e5m2 or int8, got float16",
        ),
        (
            "v_cache",
            np.ones((3, 4, 1, 16), np.float32),
            ValueError,
            r"v_cache: expected float32 \[3, 4, 2, 16\] like k_cache",
        ),
        (
            "k_cache",
            np.ones((3, 0, 2, 16), np.float32),
            ValueError,
            r"expected float32 \[3, 0, 2, 16\] like k_cache|block_size of 1 or more",
        ),
        (
            "block_tables",
            np.zeros((2, 2), np.int64),
            TypeError,
            r"block_tables: expected int32 \[2, \*\], got int64 \[2, 2\]$",
        ),
        (
            "block_tables",
            np.zeros((3, 2), np.int32),
            ValueError,
            r"block_tables: expected int32 \[2, \*\], got int32 \[3, 2\]",
        ),
        ("seq_lens", np.full(2, 4, np.int64), TypeError, r"seq_lens: expected int32 \[\*\], got int64 \[2\]"),
        (
            "query_start_loc",
            np.zeros(2, np.int32),
            ValueError,
            r"query_start_loc: expected int32 \[3\], got int32 \[2\]",
        ),
        ("out", np.ones((2, 4, 16), np.float16), TypeError, r"out: expected float32 like q"),
        ("scale", float("inf"), ValueError, r"scale: expected a finite number, got inf"),
        ("softcap", -1.0, ValueError, r"softcap: expected 0 \(none\) or more"),
        ("window", (1, 2, 3), ValueError, r"window: expected an int or \(left, right\), got \(1, 2, 3\)"),
        ("window", "wide", TypeError, r"window: expected an integer, got str"),
        (
            "alibi_slopes",
            np.ones(3, np.float32),
            ValueError,
            r"alibi_slopes: expected float32 \[4\], got float32 \[3\]",
        ),
        ("sinks", np.ones(4, np.float16), TypeError, r"sinks: expected float32 \[4\], got float16 \[4\]"),
        (
            "k_scale",
            np.ones(3, np.float32),
            ValueError,
            r"k_scale: expected float32 \[1\] or \[2\], got float32 \[3\]",
        ),
        (
            "v_scale",
            np.ones(1, np.float32),
            ValueError,
            r"v_scale: expected none for float32 keys and values",
        ),
        ("mask", np.zeros((2, 1), np.int8), TypeError, r"mask: expected uint8 \[2, \*\], got int8"),
        ("mask", np.zeros((2, 1), bool), TypeError, r"mask: expected uint8 \[2, \*\], got bool"),
        (
            "mask",
            np.zeros((3, 1), np.uint8),
            ValueError,
            r"mask: expected uint8 \[2, \*\], got uint8 \[3, 1\]",
        ),
        (
            "mask",
            np.zeros((2, 4), np.uint8)[:, ::2],
            ValueError,
            r"mask: expected stride 1 in the last dimension",
        ),
        (
            "mask_start",
            np.zeros(2, np.int32),
            ValueError,
            r"mask: expected uint8 .* with mask_start, got none",
        ),
        ("validate", "all", ValueError, r'validate: expected "shape" or "full", got "all"'),
    ],
)
def test_bad_calls(name, value, error, text):
    arguments = good_arguments()
    out = arguments["out"]
    if name == "k_scale":
        arguments["k_cache"] = arguments["v_cache"] = np.ones((3, 4, 2, 16), np.int8)
    arguments[name] = value
    with pytest.raises(error, match=r"\[paged_attention\] .*" + text if "|" not in text else text):
        quire.paged_attention(**arguments)
    if name != "out":
        assert (out == 7.0).all()


def test_bad_mask_start():
    arguments = good_arguments() | {"mask": np.zeros((2, 1), np.uint8)}
    for bad, error in ((np.zeros(3, np.int32), ValueError), (np.zeros(2, np.int64), TypeError)):
        with pytest.raises(error, match=r"\[paged_attention\] mask_start: expected int32"):
            quire.paged_attention(**arguments, mask_start=bad)


def test_output_may_not_overlap_inputs():
    arguments = good_arguments()
    arguments["out"] = arguments["q"]
    with pytest.raises(ValueError, match=r"out: expected memory apart from q"):
        quire.paged_attention(**arguments)
    arguments = good_arguments()
    arguments["block_tables"] = arguments["out"].view(np.int32)[0, :2, :2]
    with pytest.raises(ValueError, match=r"out: expected memory apart from block_tables"):
        quire.paged_attention(**arguments)
