"""Fixtures: the frameworks and backends that a test runs on, and a seeded generator.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Iterator
from typing import Any

import frameworks
import numpy as np
import pytest
from gpu_work import CuPyWork, TorchWork

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


@pytest.fixture(params=["torch", "cupy"])
def work(request: pytest.FixtureRequest) -> Iterator[Any]:
    """PyTorch or CuPy on the first GPU."""
    framework = frameworks.make(request.param, "cuda:0")
    if isinstance(framework, str):
        pytest.skip(f"{request.param} on cuda:0: {framework}")
    made = (TorchWork if request.param == "torch" else CuPyWork)(framework)
    with made.device():
        yield made
        made.synchronize()
    quire.check_errors("cuda:0")


@pytest.fixture
def torch_work() -> Iterator[TorchWork]:
    """PyTorch on the first GPU."""
    framework = frameworks.make("torch", "cuda:0")
    if isinstance(framework, str):
        pytest.skip(f"torch on cuda:0: {framework}")
    made = TorchWork(framework)
    with made.device():
        yield made
        made.synchronize()
    quire.check_errors("cuda:0")


@pytest.fixture
def jax() -> Any:
    """JAX with a GPU."""
    framework = frameworks.make("jax", "cuda:0")
    if isinstance(framework, str):
        pytest.skip(f"jax on cuda:0: {framework}")
    return framework.jax
