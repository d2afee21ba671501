"""Fixtures: the frameworks and backends that a test runs on, and a seeded generator.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Iterator

import frameworks
import numpy as np
import pytest

import quire


@functools.cache
def _make(name: str, device: str) -> frameworks.Framework | str:
    return frameworks.make(name, device)


def _fixture(request: pytest.FixtureRequest) -> frameworks.Framework:
    name, device = request.param
    framework = _make(name, device)
    if isinstance(framework, str):
        pytest.skip(f"{name} on {device}: {framework}")
    return framework


@pytest.fixture(params=frameworks.ALL, ids=lambda p: f"{p[0]}-{p[1].partition(':')[0]}")
def framework(request: pytest.FixtureRequest) -> Iterator[frameworks.Framework]:
    """Every framework on every device that is there."""
    made = _fixture(request)
    yield made
    made.synchronize()
    quire.check_errors(made.device)


@pytest.fixture(params=frameworks.BACKENDS, ids=lambda p: p[1].partition(":")[0])
def backend(request: pytest.FixtureRequest) -> Iterator[frameworks.Framework]:
    """One writable framework for each backend, for large grids."""
    made = _fixture(request)
    yield made
    made.synchronize()
    quire.check_errors(made.device)


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Seeded by the test's name, so that a failure repeats."""
    return np.random.default_rng(zlib.crc32(request.node.name.encode()))


@pytest.fixture
def torch():
    """PyTorch, or a skip by name."""
    return pytest.importorskip("torch", reason="torch is not installed")
