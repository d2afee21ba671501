"""Reads the quantized layers of AWQ, GPTQ, compressed-tensors and FP8 checkpoints, and trusts nothing that they say.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

import quire
from quire.demo import DemoError
from quire.quantization import BLOCK, PackedWeight

CHECKPOINT_FORMATS = ("gptq", "gptq_v2")
METHODS = ("awq", "gptq", "compressed-tensors", "fp8")
COMPRESSED_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")


@dataclass(frozen=True)
class QuantizationConfig:
    """What config.json says about the quantized layers; which layers those are, their tensors say."""

    method: str
    bits: int = 4
    group_size: int | None = None  # -1: all of a row; None: what the scales' shape says
    checkpoint_format: str = "gptq"


def parse_quantization(raw: Any) -> QuantizationConfig | None:
    """Reads `quantization_config`, or raises DemoError naming the key."""
    if raw is None:
        return None
    if not isinstance(raw, dict):
        raise DemoError(f"quantization_config: expected an object, got {raw!r}")
    method = raw.get("quant_method")
    if method not in METHODS:
        raise DemoError(
            f"quantization_config: unknown quant_method {method!r}; known are {', '.join(METHODS)}"
        )
    if method == "awq":
        version = str(raw.get("version", "gemm")).lower()
        if version != "gemm":
            raise DemoError(f"quantization_config: unknown AWQ version {version!r}; known is gemm")
        return QuantizationConfig(method, _bits(raw.get("bits"), (4,)), _group_size(raw.get("group_size")))
    if method == "gptq":
        checkpoint_format = raw.get("checkpoint_format") or "gptq"
        if checkpoint_format not in CHECKPOINT_FORMATS:
            raise DemoError(
                f"quantization_config: unknown checkpoint_format {checkpoint_format!r}; known are gptq, gptq_v2"
            )
        bits = _bits(raw.get("bits"), (2, 3, 4, 8))
        return QuantizationConfig(method, bits, _group_size(raw.get("group_size")), checkpoint_format)
    if method == "fp8":
        block = raw.get("weight_block_size")
        if block is not None and block != [BLOCK, BLOCK]:
            raise DemoError(f"quantization_config: weight_block_size: expected [128, 128], got {block!r}")
        return QuantizationConfig(method, 8)
    return _parse_compressed(raw)


def with_format(config: QuantizationConfig | None, checkpoint_format: str) -> QuantizationConfig:
    """The same with another checkpoint_format, for checkpoints that name the wrong one."""
    if config is None or config.method != "gptq":
        method = "none" if config is None else config.method
        raise DemoError(f"checkpoint_format: expected a checkpoint of quant_method gptq, got {method}")
    return replace(config, checkpoint_format=checkpoint_format)


def _parse_compressed(raw: dict[str, Any]) -> QuantizationConfig:
    groups = raw.get("config_groups")
    if not isinstance(groups, dict) or not groups or not all(isinstance(g, dict) for g in groups.values()):
        raise DemoError("quantization_config: config_groups: expected an object of objects")
    found: set[tuple[str, int, int | None]] = set()
    for name, group in groups.items():
        weights = group.get("weights")
        if not isinstance(weights, dict):
            raise DemoError(f"quantization_config: {name}: weights: expected an object, got {weights!r}")
        layout = group.get("format") or raw.get("format")
        if layout not in COMPRESSED_FORMATS:
            raise DemoError(
                f"quantization_config: unknown format {layout!r}; known are {', '.join(COMPRESSED_FORMATS)}"
            )
        packed = layout == "pack-quantized"
        bits = _bits(weights.get("num_bits"), (4, 8) if packed else (8,))
        size = weights.get("group_size")
        found.add((str(layout), bits, _group_size(-1 if size is None else size) if packed else None))
    if len(found) > 1:
        raise DemoError("quantization_config: config_groups: expected one kind of weights, got several")
    ((_, bits, group_size),) = found
    return QuantizationConfig("compressed-tensors", bits, group_size)


def _bits(value: Any, known: tuple[int, ...]) -> int:
    if isinstance(value, bool) or value not in known:
        raise DemoError(f"quantization_config: bits: expected {' or '.join(map(str, known))}, got {value!r}")
    return int(value)


def _group_size(value: Any) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not (value == -1 or 0 < value < 2**31):
        raise DemoError(f"quantization_config: group_size: expected -1 or a positive integer, got {value!r}")
    return value


def read_quantized(
    config: QuantizationConfig,
    name: str,
    shape: tuple[int, int],
    has: Callable[[str], bool],
    read: Callable[[str], np.ndarray],
    place: Callable[[np.ndarray], Any],
) -> PackedWeight | None:
    """The weight of a linear layer, `[out, in]`, or None where the checkpoint stores it unquantized.

    `has(name)` and `read(name)` are the checkpoint's, `place(array)` puts an array where the model runs.
    """

    def tensor(suffix: str) -> Any:
        return place(read(f"{name}.{suffix}"))

    def optional(suffix: str) -> Any:
        return tensor(suffix) if has(f"{name}.{suffix}") else None

    try:
        weight = _read(config, name, has, read, tensor, optional)
    except (ValueError, TypeError, IndexError, quire.UnsupportedError) as error:
        raise DemoError(f"{name}: {error}") from None
    if weight is not None and weight.shape != shape:
        raise DemoError(f"{name}: expected a weight of shape {list(shape)}, got {list(weight.shape)}")
    return weight


def _read(
    config: QuantizationConfig,
    name: str,
    has: Callable[[str], bool],
    read: Callable[[str], np.ndarray],
    tensor: Callable[[str], Any],
    optional: Callable[[str], Any],
) -> PackedWeight | None:
    if config.method == "awq" and has(f"{name}.qweight"):
        return PackedWeight.from_awq(tensor("qweight"), tensor("qzeros"), tensor("scales"), config.group_size)
    if config.method == "gptq" and has(f"{name}.qweight"):
        return PackedWeight.from_gptq(
            tensor("qweight"),
            optional("qzeros"),
            tensor("scales"),
            optional("g_idx"),
            bits=config.bits,
            checkpoint_format="gptq_v2" if config.checkpoint_format == "gptq_v2" else "gptq",
            group_size=config.group_size,
        )
    if config.method == "compressed-tensors" and has(f"{name}.weight_packed"):
        return PackedWeight.from_compressed_tensors(
            weight_packed=tensor("weight_packed"),
            weight_scale=tensor("weight_scale"),
            weight_zero_point=optional("weight_zero_point"),
            weight_shape=optional("weight_shape"),
            weight_g_idx=optional("weight_g_idx"),
            bits=config.bits,
            group_size=config.group_size,
        )
    if not has(f"{name}.weight") or not (has(f"{name}.weight_scale") or has(f"{name}.weight_scale_inv")):
        return None
    if config.method == "compressed-tensors":
        return PackedWeight.from_compressed_tensors(
            weight=tensor("weight"),
            weight_scale=tensor("weight_scale"),
            weight_zero_point=optional("weight_zero_point"),
            input_scale=optional("input_scale"),
            input_zero_point=optional("input_zero_point"),
        )
    if config.method == "fp8":
        scale = tensor("weight_scale_inv") if has(f"{name}.weight_scale_inv") else tensor("weight_scale")
        return PackedWeight.from_fp8(tensor("weight"), scale, input_scale=optional("input_scale"))
    return None
