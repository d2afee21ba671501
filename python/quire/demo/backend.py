"""The array library behind the demo: CuPy where a GPU and CuPy are there, else NumPy.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np

import quire
from quire._allocate import from_numpy
from quire.demo import DemoError

Array = Any  # numpy.ndarray or cupy.ndarray
Weight = Any  # an Array, or quantized weights whose products stand side by side: tuple[PackedWeight, ...]

DTYPES = ("fp32", "fp16", "bf16")
_CUDA_TYPES = {"float32": 0, "float16": 2, "bfloat16": 14}
_CUBLAS_OP_N, _CUBLAS_OP_T, _CUBLAS_COMPUTE_32F, _CUBLAS_GEMM_DEFAULT = 0, 1, 68, -1
_CUBLAS_WORKSPACE_BYTES = 32 << 20


def numpy_dtype(name: str) -> np.dtype:
    """The NumPy dtype of `fp32`, `fp16` or `bf16`; the last comes from ml_dtypes."""
    if name == "bf16":
        try:
            import ml_dtypes
        except ImportError:
            raise DemoError("bf16 arrays need the package ml_dtypes (pip install ml_dtypes)") from None
        bfloat16: np.dtype = np.dtype(ml_dtypes.bfloat16)
        return bfloat16
    return np.dtype({"fp32": np.float32, "fp16": np.float16}[name])


class Backend:
    """NumPy, and the few places where CuPy differs.

    Weights are kept as float32: NumPy multiplies matrices fast in that dtype only.
    """

    device = "cpu"
    label = "NumPy"
    has_graphs = False

    xp: Any = np

    def array(self, host: Any, dtype: Any = None) -> Array:
        """A device array with the contents of a host array."""
        return np.ascontiguousarray(host, dtype=dtype)

    def weight(self, host: np.ndarray, dtype: str) -> Array:
        """A weight `[out, in]` or a table, rounded to `dtype`, in the dtype that `linear` wants."""
        rounded = host if dtype == "fp32" else host.astype(numpy_dtype(dtype))
        return np.ascontiguousarray(rounded, dtype=np.float32)

    def raw(self, host: np.ndarray) -> Any:
        """A tensor for quire with the contents and dtype of a host array."""
        return host

    def host(self, array: Array) -> np.ndarray:
        """A host array with the contents of a device array."""
        return np.asarray(array)

    def quantized(self, x: Array, weights: tuple[quire.PackedWeight, ...], bias: Array | None) -> Array:
        """`x @ w.T + bias` with the rows of all weights."""
        out = self.xp.empty((len(x), sum(w.out_features for w in weights)), x.dtype)
        begin = 0
        for w in weights:
            end = begin + w.out_features
            quire.quantized_matmul(
                x, w, bias=None if bias is None else bias[begin:end], out=out[:, begin:end]
            )
            begin = end
        return out

    def linear(self, x: Array, weight: Weight, bias: Array | None = None) -> Array:
        """`x @ weight.T + bias`, accumulated in float32, in x's dtype."""
        if isinstance(weight, tuple):
            return self.quantized(x, weight, bias)
        out = np.matmul(x.astype(np.float32, copy=False), weight.T)
        if bias is not None:
            out += bias
        return out.astype(x.dtype, copy=False)

    def assign(self, array: Array, host: np.ndarray) -> None:
        """Copies a host array into a contiguous device array of its shape and dtype."""
        array[...] = host

    def capture(self, call: Callable[[], Array]) -> tuple[Callable[[], None], Array]:
        """What replays a call's work, as a CUDA graph, and where its result then lies."""
        raise DemoError(f"{self.label} has no CUDA graphs")

    def free_bytes(self) -> int:
        """Memory that a KV cache may take."""
        return 1 << 30


class _Cublas:
    """cuBLAS's matrix product, called directly: CuPy's own calls refuse to be captured in a graph."""

    def __init__(self, cupy: Any) -> None:
        """Finds the library that CuPy has loaded. All calls must come in one stream's order."""
        cupy.cuda.device.get_cublas_handle()
        with open("/proc/self/maps", encoding="utf-8") as maps:
            path = next((line.split()[-1] for line in maps if "/libcublas.so" in line), None)
        if path is None:
            raise DemoError("the cuBLAS that CuPy uses was not found")
        self._cuda, self._library = cupy.cuda, ctypes.CDLL(path)
        self._handle, self._stream = ctypes.c_void_p(), None
        # cuBLAS would otherwise allocate in the middle of a capture.
        self._workspace = cupy.empty(_CUBLAS_WORKSPACE_BYTES, cupy.uint8)
        self._call("cublasCreate_v2", ctypes.byref(self._handle))

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._library, name)(*arguments)
        if status != 0:
            raise DemoError(f"{name} failed with status {status}")

    def multiply(self, x: Array, weight: Array, out: Array) -> None:
        """out = x @ weight.T, accumulated in float32; row-major arrays are their transposes to cuBLAS: out.T = weight @ x.T."""
        stream = self._cuda.get_current_stream().ptr
        if stream != self._stream:  # which resets the workspace
            size = ctypes.c_size_t(_CUBLAS_WORKSPACE_BYTES)
            self._call("cublasSetStream_v2", self._handle, ctypes.c_void_p(stream))
            self._call("cublasSetWorkspace_v2", self._handle, ctypes.c_void_p(self._workspace.data.ptr), size)
            self._stream = stream
        rows, inner, columns = x.shape[0], x.shape[1], weight.shape[0]
        kind = _CUDA_TYPES[x.dtype.name]
        one, zero = ctypes.c_float(1.0), ctypes.c_float(0.0)
        self._call(
            "cublasGemmEx", self._handle, _CUBLAS_OP_T, _CUBLAS_OP_N, columns, rows, inner,
            ctypes.byref(one), ctypes.c_void_p(weight.data.ptr), kind, inner, ctypes.c_void_p(x.data.ptr), kind, inner,
            ctypes.byref(zero), ctypes.c_void_p(out.data.ptr), kind, columns, _CUBLAS_COMPUTE_32F, _CUBLAS_GEMM_DEFAULT,
        )  # fmt: skip


class CupyBackend(Backend):
    """CuPy on the current GPU; weights are kept in the model's dtype."""

    device = "cuda"
    label = "CuPy"
    has_graphs = True

    def __init__(self, cupy: Any) -> None:
        """Takes the module, which only exists where CuPy is installed."""
        self.xp = cupy
        # What graphs write on their way is theirs: no other array may get this memory.
        self._graph_pool = cupy.cuda.MemoryPool()
        self._graph_stream = cupy.cuda.Stream(non_blocking=True)
        self._cublas: _Cublas | None = None

    def array(self, host: Any, dtype: Any = None) -> Array:
        """A copy on the GPU."""
        return self.xp.asarray(np.ascontiguousarray(host, dtype=dtype))

    def weight(self, host: np.ndarray, dtype: str) -> Array:
        """A copy on the GPU, in `dtype`."""
        return self.array(host, numpy_dtype(dtype))

    def host(self, array: Array) -> np.ndarray:
        """A copy on the host; waits for the GPU."""
        copy: np.ndarray = self.xp.asnumpy(array)
        return copy

    def raw(self, host: np.ndarray) -> Any:
        """A copy on the GPU; CuPy has no float8."""
        if host.dtype.name != "float8_e4m3fn":
            return self.array(host)
        like = quire.empty((1,), "uint8", f"cuda:{self.xp.cuda.Device().id}")
        return from_numpy(host, like)

    def linear(self, x: Array, weight: Weight, bias: Array | None = None) -> Array:
        """As on the CPU."""
        if isinstance(weight, tuple):
            return self.quantized(x, weight, bias)
        if self._cublas is None:
            self._cublas = _Cublas(self.xp)
        out = self.xp.empty((x.shape[0], weight.shape[0]), x.dtype)
        if out.size > 0:
            self._cublas.multiply(self.xp.ascontiguousarray(x), weight, out)
        if bias is not None:
            out = (out + bias).astype(x.dtype, copy=False)
        return out

    def assign(self, array: Array, host: np.ndarray) -> None:
        """As on the CPU, on the current stream."""
        array.set(host)

    def capture(self, call: Callable[[], Array]) -> tuple[Callable[[], None], Array]:
        """Runs a call, and then captures it, on a stream of its own; replays run on the current stream, one at a time."""
        cuda = self.xp.cuda
        cuda.Device().synchronize()
        with self._graph_stream as stream, cuda.using_allocator(self._graph_pool.malloc):
            call()  # compiles CuPy's kernels and takes the memory
            stream.begin_capture()
            try:
                result = call()
            finally:
                graph = stream.end_capture()
        cuda.Device().synchronize()
        return (lambda: graph.launch(cuda.get_current_stream())), result

    def free_bytes(self) -> int:
        """Half of the GPU memory that is free now."""
        return int(self.xp.cuda.Device().mem_info[0]) // 2


def select_backend(device: str = "auto") -> Backend:
    """NumPy for `cpu`, CuPy for `cuda`; for `auto`, CuPy where it, a GPU and CUDA kernels are there."""
    if device == "cpu":
        return Backend()
    problem = _cuda_problem()
    if problem is None:
        import cupy  # type: ignore[import-not-found, import-untyped, unused-ignore]  # without stubs, and often not here

        return CupyBackend(cupy)
    if device == "auto":
        return Backend()
    raise DemoError(f"device cuda: {problem}")


def _cuda_problem() -> str | None:
    """Why CuPy cannot be used here, or None."""
    if not quire.has_cuda():
        return "this build of quire has no CUDA kernels"
    try:
        import cupy
    except ImportError:
        return "CuPy is not installed (pip install cupy-cuda13x)"
    try:
        if cupy.cuda.runtime.getDeviceCount() == 0:
            return "no GPU found"
        cupy.zeros(1)
    except Exception as error:  # CuPy raises its own types for each missing library
        return (
            f"CuPy does not work here ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
        )
    return None
