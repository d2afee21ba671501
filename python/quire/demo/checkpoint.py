"""Reads tensors from safetensors files, one or many with an index, and trusts nothing that the files say.

SPDX-License-Identifier: Apache-2.0

The format: eight bytes (little-endian) with the length of a JSON header, the header, then the tensors' bytes.
The header gives each tensor's dtype, shape and byte range. https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from quire.demo import DemoError
from quire.demo.config import read_json

ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I8": 1, "U8": 1, "F8_E4M3": 1}
FLOATS = ("F64", "F32", "F16", "BF16")
KINDS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I8": "i1", "U8": "u1"}
MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies: `data` is its file's bytes, `start` and `stop` its range in them."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    data: np.ndarray
    start: int
    stop: int


def read_entries(path: Path) -> dict[str, TensorEntry]:
    """Maps one safetensors file into memory and checks its header, every range included."""
    try:
        file_bytes = path.stat().st_size
        if file_bytes < 8:
            raise DemoError(f"{path}: truncated, {file_bytes} bytes are no safetensors file")
        data = np.memmap(path, dtype=np.uint8, mode="r")
    except FileNotFoundError:
        raise DemoError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise DemoError(f"{str(path)!r}: {getattr(error, 'strerror', None) or error}") from None
    header_bytes = int.from_bytes(data[:8].tobytes(), "little")
    if header_bytes > MAX_HEADER_BYTES:
        raise DemoError(f"{path}: no safetensors file (its header would have {header_bytes} bytes)")
    if 8 + header_bytes > file_bytes:
        raise DemoError(
            f"{path}: truncated, the header needs {8 + header_bytes} bytes, the file has {file_bytes}"
        )
    try:
        header = json.loads(data[8 : 8 + header_bytes].tobytes())
    except (ValueError, RecursionError):
        raise DemoError(f"{path}: no safetensors file (its header is no JSON)") from None
    if not isinstance(header, dict):
        raise DemoError(f"{path}: no safetensors file (its header is no JSON object)")
    header.pop("__metadata__", None)
    origin = 8 + header_bytes
    return {name: _entry(path, name, value, data, origin) for name, value in header.items()}


def _entry(path: Path, name: str, value: Any, data: np.ndarray, origin: int) -> TensorEntry:
    """Checks one tensor's description against the file."""
    try:
        dtype, shape, (begin, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise DemoError(f"{path}: tensor {name!r} has a malformed description") from None
    if (
        not isinstance(dtype, str)
        or any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in (*shape, begin, end))
        or begin > end
    ):
        raise DemoError(f"{path}: tensor {name!r} has a malformed description")
    if origin + end > len(data):
        raise DemoError(
            f"{path}: truncated, tensor {name!r} ends at byte {origin + end}, the file at {len(data)}"
        )
    if dtype in ITEM_BYTES and math.prod(shape) * ITEM_BYTES[dtype] != end - begin:
        raise DemoError(
            f"{path}: tensor {name!r}: shape {list(shape)} of {dtype} does not have {end - begin} bytes"
        )
    return TensorEntry(path, dtype, shape, data, origin + begin, origin + end)


class Checkpoint:
    """The tensors of a model directory: model.safetensors, or the shards of model.safetensors.index.json."""

    def __init__(self, directory: Path) -> None:
        """Reads the headers; tensors are read when asked for."""
        index_path = directory / "model.safetensors.index.json"
        single = directory / "model.safetensors"
        self.directory = directory
        self.entries: dict[str, TensorEntry] = {}
        if single.is_file() or not index_path.is_file():
            self.entries = read_entries(single)
            return
        weight_map = read_json(index_path).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
            raise DemoError(f"{index_path}: weight_map: expected an object of file names")
        shards: dict[str, dict[str, TensorEntry]] = {}
        for name, shard in weight_map.items():
            if shard != Path(shard).name or shard in ("", ".", ".."):
                raise DemoError(f"{index_path}: {shard!r} is no plain file name")
            if shard not in shards:
                shards[shard] = read_entries(directory / shard)
            if name not in shards[shard]:
                raise DemoError(f"{directory / shard}: tensor {name!r} is missing, though the index names it")
            self.entries[name] = shards[shard][name]

    def __contains__(self, name: str) -> bool:
        """Whether there is a tensor of this name."""
        return name in self.entries

    def tensor(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """Tensor `name` as float32 (a copy), after checking that it has this shape."""
        entry = self.entries.get(name)
        if entry is None:
            raise DemoError(f"{self.directory}: tensor {name!r} is missing")
        if entry.shape != shape:
            raise DemoError(
                f"{entry.path}: tensor {name!r}: expected shape {list(shape)}, got {list(entry.shape)}"
            )
        if entry.dtype not in FLOATS:
            raise DemoError(
                f"{entry.path}: tensor {name!r}: dtype {entry.dtype} is not supported (known: {', '.join(FLOATS)})"
            )
        raw = entry.data[entry.start : entry.stop].tobytes()
        if entry.dtype == "BF16":  # the upper half of a float32
            wide = np.frombuffer(raw, dtype="<u2").astype(np.uint32)
            wide <<= 16
            return wide.view(np.float32).reshape(shape)
        return np.frombuffer(raw, dtype=KINDS[entry.dtype]).reshape(shape).astype(np.float32)

    def raw(self, name: str) -> np.ndarray:
        """Tensor `name` in its own dtype and shape (a copy); bfloat16 and float8 need ml_dtypes."""
        entry = self.entries.get(name)
        if entry is None:
            raise DemoError(f"{self.directory}: tensor {name!r} is missing")
        if entry.dtype in KINDS:
            dtype = np.dtype(KINDS[entry.dtype])
        elif entry.dtype in ("BF16", "F8_E4M3"):
            try:
                import ml_dtypes
            except ImportError:
                raise DemoError(
                    f"{entry.dtype} tensors need the package ml_dtypes (pip install ml_dtypes)"
                ) from None
            dtype = np.dtype(ml_dtypes.bfloat16 if entry.dtype == "BF16" else ml_dtypes.float8_e4m3fn)
        else:
            known = ", ".join(ITEM_BYTES)
            raise DemoError(
                f"{entry.path}: tensor {name!r}: dtype {entry.dtype} is not supported (known: {known})"
            )
        raw = np.frombuffer(entry.data[entry.start : entry.stop].tobytes(), np.uint8)
        return raw.view(dtype).reshape(entry.shape).copy()
