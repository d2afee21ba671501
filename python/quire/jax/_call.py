"""How quire.jax enters the library: XLA FFI calls, registered on first use, with validation while tracing.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from quire import _core

Array = Any
Value = str | int | float
Attributes = dict[str, Value]
#: The shape and dtype name of a result.
Result = tuple[tuple[int, ...], str]
#: A batching rule: (op, axis_size, which operands are batched, operands, attributes) to the batched results.
Rule = Callable[["Op", int, list[bool], list[Array], dict[str, Value]], Sequence[Array]]


@dataclass(frozen=True)
class Op:
    """What one target takes and gives.

    results: from the operands and attributes to its results, None for one that is not wanted.
    aliases: result to the operand whose memory it takes. donated: operands that an eager call gives up.
    scratch_bytes: of the workspace, the result behind the others, that XLA allocates.
    function: what users call it, if that is not the name.
    """

    name: str
    operands: tuple[str, ...]
    results: Callable[[list[Array], dict[str, Value]], list[Result | None]]
    rule: Rule
    aliases: tuple[tuple[int, int], ...] = ()
    donated: tuple[int, ...] = ()
    scratch_bytes: Callable[[list[Array], dict[str, Value]], int] | None = None
    function: str = ""

    @property
    def shown(self) -> str:
        """As messages name it."""
        return self.function or self.name.removesuffix("_quantized")


def call(op: Op, operands: Sequence[Array], attributes: dict[str, Value]) -> tuple[Array, ...]:
    """Calls a target: compiled on its own outside jit, a part of what is traced inside."""
    present = tuple(operand is not None for operand in operands)
    function = _compiled(op, present, tuple(sorted(attributes.items())))
    results: tuple[Array, ...] = function(*(operand for operand in operands if operand is not None))
    return results


def fail_batched(op: str, name: str) -> NoReturn:
    """Refuses a batched argument under vmap."""
    raise ValueError(
        f"[{op}] {name}: expected the same array for the whole batch under jax.vmap, got a batched one; use jax.lax.map"
    )


def ffi() -> Any:
    """``jax.ffi``, which is ``jax.extend.ffi`` before 0.5."""
    if jax.__version_info__ < (0, 4, 38):
        raise ImportError(f"quire.jax: expected jax 0.4.38 or later, got {jax.__version__}")
    if hasattr(jax, "ffi"):
        return jax.ffi
    return importlib.import_module("jax.extend.ffi")


@functools.cache
def _register() -> None:
    register = ffi().register_ffi_target
    # Behind the backend's start: a handler that a runtime refuses would otherwise keep JAX from starting at all.
    jax.devices()
    for name, cpu, cuda in _core.jax_targets():
        register(f"quire.{name}", cpu, platform="cpu")
        register(f"quire.{name}", cuda, platform="CUDA")


def _bits(present: Sequence[bool]) -> int:
    return sum(1 << i for i, here in enumerate(present) if here)


def _spread(present: tuple[bool, ...], arrays: Sequence[Array]) -> list[Array]:
    rest = iter(arrays)
    return [next(rest) if here else None for here in present]


@functools.lru_cache(maxsize=4096)
def _compiled(
    op: Op, present: tuple[bool, ...], items: tuple[tuple[str, Value], ...]
) -> Callable[..., tuple[Array, ...]]:
    _register()
    attributes = dict(items)
    places = [i for i, here in enumerate(present) if here]  # of the arrays that are there

    def forward(*arrays: Array) -> tuple[Array, ...]:
        operands = _spread(present, arrays)
        wanted = op.results(operands, attributes)
        results = [result for result in wanted if result is not None]
        order = [i for i, result in enumerate(wanted) if result is not None]
        aliases = {
            order.index(result): places.index(operand)
            for result, operand in op.aliases
            if wanted[result] is not None and present[operand]
        }
        bits: dict[str, Value] = {
            **attributes,
            "operands": _bits(present),
            "results": _bits([r is not None for r in wanted]),
        }
        _core.jax_validate(
            op.name,
            [(str(a.dtype), tuple(a.shape)) for a in arrays],
            [(dtype, shape) for shape, dtype in results],
            aliases,
            bits,
        )
        scratch = op.scratch_bytes(operands, attributes) if op.scratch_bytes is not None else 0
        if scratch > 0:
            bits["results"] = int(bits["results"]) | 1 << len(wanted)
        described: Any = jax.ShapeDtypeStruct
        outputs = [described(shape, jnp.dtype(dtype)) for shape, dtype in results]
        outputs += [described((scratch,), jnp.uint8)] * (scratch > 0)
        invoke = ffi().ffi_call(
            f"quire.{op.name}",
            outputs,
            input_output_aliases={operand: result for result, operand in aliases.items()},
        )
        return tuple(invoke(*arrays, **{k: _encode(v) for k, v in bits.items()})[: len(results)])

    batched = jax.custom_batching.custom_vmap(forward)

    def rule(axis_size: int, in_batched: list[bool], *arrays: Array) -> tuple[Any, Any]:
        if axis_size == 0:  # what one element would give says the shapes
            described: Any = jax.ShapeDtypeStruct
            elements = [
                described(a.shape[int(is_batched) :], a.dtype)
                for a, is_batched in zip(arrays, in_batched, strict=True)
            ]
            none = tuple(jnp.zeros((0, *r.shape), r.dtype) for r in jax.eval_shape(forward, *elements))
            return none, (True,) * len(none)
        flags = [bool(flag) for flag in _spread(present, in_batched)]
        results = tuple(op.rule(op, axis_size, flags, _spread(present, arrays), attributes))
        return results, (True,) * len(results)

    batched.def_vmap(rule)
    guarded = jax.custom_jvp(batched)

    def refuse(primals: Any, tangents: Any) -> NoReturn:
        raise _core.UnsupportedError(
            f"[{op.shown}] expected no differentiation, since quire is for inference only, got one "
            "(jax.grad, jvp, vjp or linearize); put jax.lax.stop_gradient on its inputs"
        )

    guarded.defjvp(refuse)
    guarded.__name__ = f"quire_{op.name}"  # type: ignore[attr-defined]
    donated = tuple(places.index(i) for i in op.donated if present[i])
    return jax.jit(guarded, inline=True, donate_argnums=donated)


def _encode(value: Value) -> Any:
    if isinstance(value, str):
        return value
    return np.float64(value) if isinstance(value, float) else np.int64(value)
