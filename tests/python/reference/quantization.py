"""Quantized results, and the check of one.

SPDX-License-Identifier: Apache-2.0
"""

import ml_dtypes
import numpy as np

LARGEST = {"float8_e4m3fn": 448.0, "int8": 127.0}
SMALLEST_SCALE = np.float32(2.0**-126)


def store(quotient: np.ndarray, dtype: str) -> np.ndarray:
    """float32 quotients, saturated and rounded to nearest even."""
    quotient = quotient.astype(np.float32)
    if dtype == "int8":
        return np.clip(np.rint(np.where(np.isnan(quotient), 0.0, quotient)), -128, 127).astype(np.int8)
    limit = np.float32(LARGEST[dtype])
    with np.errstate(invalid="ignore"):
        return np.clip(quotient, -limit, limit).astype(ml_dtypes.float8_e4m3fn)


def groups_of(y: np.ndarray, granularity: str, group_size: int) -> np.ndarray:
    """[..., groups, elements of a group]."""
    size = y.shape[-1] if granularity in ("tensor", "token") else group_size
    return y.reshape(*y.shape[:-1], -1 if size else 1, size)


def scales_of(y: np.ndarray, dtype: str, granularity: str, group_size: int) -> np.ndarray:
    """The computed scales of a float32 result, exactly as documented."""
    largest = np.abs(groups_of(y, granularity, group_size)).max(-1, initial=0.0).astype(np.float32)
    return np.maximum(largest / np.float32(LARGEST[dtype]), SMALLEST_SCALE)


def assert_quantized(
    out: np.ndarray,
    scales: np.ndarray,
    want: np.ndarray,
    dtype: str,
    granularity: str,
    group_size: int,
    slack: float,
) -> None:
    """out and scales against the float64 result ``want``, which the float32 one is near to, within ``slack``.

    A stored value lies between what the ends of that interval round to, under the scale that was given or computed.
    """
    assert out.shape == want.shape
    assert out.dtype.name == dtype
    assert scales.dtype == np.float32
    if granularity != "tensor":
        expected = scales_of(want, dtype, granularity, group_size)
        assert scales.shape == expected.shape
        np.testing.assert_allclose(scales, expected, rtol=slack + 2e-7)
    wide = groups_of(want, granularity, group_size)
    spread = scales.astype(np.float64).reshape(1 if granularity == "tensor" else scales.shape)
    quotient = wide / (spread if granularity == "tensor" else spread[..., None])
    margin = np.abs(quotient) * (slack + 2e-7)
    low = store(quotient - margin, dtype).astype(np.float64)
    high = store(quotient + margin, dtype).astype(np.float64)
    got = groups_of(out.astype(np.float64), granularity, group_size)
    wrong = ~((low <= got) & (got <= high))
    assert not wrong.any(), (
        f"{wrong.sum()} of {wrong.size} wrong, first at {np.argwhere(wrong)[0]}: got {got[wrong][0]}, want {low[wrong][0]} to {high[wrong][0]}"
    )


# ---- Checkpoint formats, as bit strings: written and read apart from each other -------------------------------------------------

AWQ_COLUMNS = [0, 2, 4, 6, 1, 3, 5, 7]


def pack_stream(values: np.ndarray, bits: int) -> np.ndarray:
    """[rows, count] values as int32 words [rows, ceil(count * bits / 32)]: one string of bits for each row, the lowest first."""
    rows, count = values.shape
    string = (values[:, :, None].astype(np.int64) >> np.arange(bits)) & 1
    string = string.reshape(rows, count * bits)
    string = np.pad(string, ((0, 0), (0, -count * bits % 32))).astype(np.uint8)
    return np.packbits(string, axis=1, bitorder="little").view("<i4")


def unpack_stream(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The reverse."""
    string = np.unpackbits(
        np.ascontiguousarray(words.astype("<i4")).view(np.uint8), axis=1, bitorder="little"
    )
    string = string[:, : count * bits].reshape(len(words), count, bits).astype(np.int64)
    return (string << np.arange(bits)).sum(-1)


def pack_awq(codes: np.ndarray) -> np.ndarray:
    """[rows, columns] codes of 4 bits as AWQ's int32 [rows, columns / 8]."""
    return pack_stream(codes.reshape(len(codes), -1, 8)[:, :, AWQ_COLUMNS].reshape(codes.shape), 4)


def unpack_awq(words: np.ndarray) -> np.ndarray:
    """The reverse."""
    nibbles = unpack_stream(words, 4, words.shape[1] * 8).reshape(len(words), -1, 8)
    out = np.empty_like(nibbles)
    out[:, :, AWQ_COLUMNS] = nibbles
    return out.reshape(len(words), -1)


def dequantize(codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """float64 [out_features, in_features] from codes [in, out], zeros and scales [num_groups, out] and the group of each row."""
    return ((codes - zeros[groups]).astype(np.float64) * scales.astype(np.float64)[groups]).T


def dequantize_awq(
    qweight: np.ndarray, qzeros: np.ndarray, scales: np.ndarray, group_size: int
) -> np.ndarray:
    codes = unpack_awq(qweight)
    return dequantize(codes, unpack_awq(qzeros), scales, np.arange(len(codes)) // group_size)


def dequantize_gptq(
    qweight: np.ndarray,
    qzeros: np.ndarray | None,
    scales: np.ndarray,
    g_idx: np.ndarray,
    bits: int,
    checkpoint_format: str,
) -> np.ndarray:
    codes = unpack_stream(qweight.T, bits, len(g_idx)).T
    if qzeros is None:
        zeros = np.full(scales.shape, 2 ** (bits - 1))
    else:
        zeros = unpack_stream(qzeros, bits, scales.shape[1])
        if checkpoint_format == "gptq":
            zeros = (zeros + 1) % 2**bits
    return dequantize(codes, zeros, scales, g_idx)


def dequantize_compressed(
    packed: np.ndarray,
    scale: np.ndarray,
    zero_point: np.ndarray | None,
    bits: int,
    in_features: int,
    groups: np.ndarray,
) -> np.ndarray:
    codes = unpack_stream(packed, bits, in_features).T
    if zero_point is None:
        zeros = np.full(scale.T.shape, 2 ** (bits - 1))
    else:
        zeros = unpack_stream(zero_point.T, bits, len(scale))
    return dequantize(codes, zeros, scale.T, groups)


def spread_blocks(scale: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """A scale for each element of [out, in], from one for all, for each row, or for each block of 128 x 128."""
    wide = scale.astype(np.float64)
    if wide.size == 1:
        return np.full(shape, wide.reshape(()))
    if wide.shape == (shape[0], 1):
        return np.broadcast_to(wide, shape)
    return np.repeat(np.repeat(wide, 128, axis=0), 128, axis=1)[: shape[0], : shape[1]]


def asymmetric_scales(low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scale and zero point of elements in [low, high], exactly as documented; low <= 0 <= high, float32."""
    scale = np.maximum((high - low).astype(np.float32) / np.float32(255.0), SMALLEST_SCALE)
    zero = np.clip(-128 - np.rint(low / scale), -128, 127).astype(np.int32)
    return scale, zero
