"""How quire.torch enters PyTorch: operators of the library ``quire``, and functions that are eager outside a trace and operators inside.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

F = TypeVar("F", bound=Callable[..., Any])
is_compiling = torch.compiler.is_compiling
_C: Any = torch._C
tracing_state: Callable[[], object] = _C._get_tracing_state
num_dispatch_modes: Callable[[], int] = _C._len_torch_dispatch_stack
#: What eager calls may pass: anything else dispatches in a way of its own.
PLAIN = (torch.Tensor, torch.nn.Parameter)

_torch_library: Any = torch.library
_library = _torch_library.Library("quire", "DEF")
ops = torch.ops.quire


def define(name: str, arguments: str, call: Callable[..., None]) -> None:
    """An operator that returns nothing: what it writes is among its arguments, and marked so."""
    _library.define(f"{name}({arguments}) -> ()", tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CPU", "CUDA"):
        _library.impl(name, call, key)
    _torch_library.register_fake(f"quire::{name}", lambda *args: None, lib=_library)


def core_call(op: Callable[..., None]) -> Callable[..., None]:
    """A function of the core as an operator's implementation."""
    return lambda *args: op(*args, None)  # None: the current stream


def is_traced(x: object) -> bool:
    """Whether a call with this first argument is an operator."""
    # A subclass is a fake or functional tensor, or one that dispatches in its own way: operators know how.
    return is_compiling() or (isinstance(x, torch.Tensor) and (type(x) not in PLAIN or not is_unwatched()))


def is_unwatched() -> bool:
    """Whether nothing looks at each operator that is called, as torch.jit.trace, make_fx and other dispatch modes do."""
    return tracing_state() is None and num_dispatch_modes() == 0


def function(eager: F) -> Callable[[Callable[..., Any]], F]:
    """Makes a function that is ``eager`` outside a trace, and the decorated one inside."""

    def decorate(traced: Callable[..., Any]) -> F:
        @functools.wraps(eager)
        def call(*args: Any, **kwargs: Any) -> Any:
            # What most calls are; is_unwatched() without its call.
            if (
                args
                and type(args[0]) in PLAIN
                and not is_compiling()
                and tracing_state() is None
                and num_dispatch_modes() == 0
            ):
                return eager(*args, **kwargs)
            first = args[0] if args else next(iter(kwargs.values()), None)
            if is_traced(first):
                check_traced(eager.__name__, kwargs)
                return traced(*args, **kwargs)
            return eager(*args, **kwargs)

        call.__module__ = "quire.torch"
        return cast(F, call)

    return decorate


def check_traced(op: str, kwargs: dict[str, Any]) -> None:
    """Takes out of the arguments what a trace has no use for, and refuses other values of it."""
    if kwargs.pop("stream", None) is not None:
        raise ValueError(
            f"[{op}] stream: expected none in a compiled function, which runs on the current stream, got one"
        )
    if kwargs.pop("validate", "shape") != "shape":
        raise ValueError(f'[{op}] validate: expected "shape" in a compiled function, got another')
