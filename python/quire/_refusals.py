"""What a call is refused with: the library's message form, and the core's errors under the names of what the caller called.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping

from quire import _core

#: What a call is refused with.
REFUSALS = (TypeError, ValueError, IndexError, _core.UnsupportedError)


def unexpected(op: str, arg: str, expected: str, got: object) -> ValueError:
    """The error for a value that does not fit."""
    return ValueError(f"[{op}] {arg}: expected {expected}, got {got}")


def renamed(error: Exception, op: str, names: Mapping[str, str]) -> Exception:
    """The error as one of ``op``, with its argument's name in ``names``, where it has the library's form."""
    found = re.match(r"\[\w+\] (\w+)(.*)", str(error), re.DOTALL)
    if found is None:
        return error
    arg, rest = found.groups()
    return type(error)(f"[{op}] {names.get(arg, arg)}{rest}")


@contextlib.contextmanager
def called_as(op: str, **names: str) -> Iterator[None]:
    """Errors of the core's functions name what the caller called, and its arguments: ``names`` has the caller's."""
    try:
        yield
    except REFUSALS as error:
        raise renamed(error, op, names) from None
