"""The current device: ops run where their tensors are and leave it as it was, also when they raise.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import frameworks
import numpy as np
import pytest
from gpu_work import LONG_DELAY, TorchWork, draws
from op_list import MALFORMED, OPS, Arrays, every_op, make_norm

import quire


def needs_two(work: TorchWork) -> None:
    count = work.torch.cuda.device_count()
    if count < 2:
        pytest.skip(f"two GPUs are needed, {count} is there")


@pytest.fixture(params=[0, 1], ids=["current0", "current1"])
def current(request: pytest.FixtureRequest, torch_work: TorchWork) -> Iterator[int]:
    """Each device in turn is the current one."""
    if request.param:
        needs_two(torch_work)
    with torch_work.torch.cuda.device(request.param):
        yield request.param


def on(torch: Any, arrays: dict[str, np.ndarray], device: int) -> Arrays:
    return TorchWork(frameworks.Torch(f"cuda:{device}")).upload(arrays)


@pytest.mark.parametrize("device", [0, 1], ids=["tensors0", "tensors1"])
@every_op
def test_current_device_is_unchanged(torch_work, current, op, device):
    """An op runs where its tensors are, and leaves the current device as it was."""
    if device:
        needs_two(torch_work)
    torch = torch_work.torch
    _, _, want = draws(op, torch_work) if current == 0 else (None, None, None)
    got = on(torch, op.make(np.random.default_rng(2), "bfloat16"), device)
    op.prepare(got)
    with torch.cuda.device(device):
        torch.cuda.synchronize()
    op.call(got)
    assert torch.cuda.current_device() == current
    with torch.cuda.device(device):
        torch.cuda.synchronize()
    quire.check_errors(f"cuda:{device}")
    assert torch.cuda.current_device() == current
    if want is not None:
        for name, array in want.items():
            if not name.startswith("host_"):
                np.testing.assert_array_equal(
                    torch_work.bits(got[name]), torch_work.bits(array), err_msg=name
                )


@pytest.mark.parametrize("kind", list(MALFORMED))
@pytest.mark.parametrize("device", [0, 1], ids=["tensors0", "tensors1"])
def test_current_device_after_a_raising_call(torch_work, current, kind, device):
    if device:
        needs_two(torch_work)
    if kind == "validate full":
        pytest.skip("validate: it is malformed in a capture only")
    torch = torch_work.torch
    error, bad = MALFORMED[kind]
    rng = np.random.default_rng(1)
    norm = on(torch, make_norm(rng, "bfloat16"), device)
    paged = on(torch, OPS["paged_decode"].make(rng, "bfloat16"), device)
    with pytest.raises(error):
        bad(torch, norm, paged)
    assert torch.cuda.current_device() == current


def test_current_device_with_explicit_streams(torch_work):
    """Another device's tensors on another device's stream."""
    needs_two(torch_work)
    torch, op = torch_work.torch, OPS["paged_long"]
    _, _, want = draws(op, torch_work)
    got = on(torch, op.make(np.random.default_rng(2), "bfloat16"), 1)
    with torch.cuda.device(1):
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
    op.call(got, stream=stream.cuda_stream)
    assert torch.cuda.current_device() == 0
    with torch.cuda.device(1):
        torch.cuda.synchronize()
    np.testing.assert_array_equal(torch_work.bits(got["out"]), torch_work.bits(want["out"]))


def test_tensors_of_two_devices(torch_work):
    needs_two(torch_work)
    torch = torch_work.torch
    x, weight = torch.ones((2, 64), device="cuda:0"), torch.ones(64, device="cuda:1")
    with pytest.raises(ValueError, match=r"\[rms_norm\] weight: expected "):
        quire.rms_norm(x, weight)
    assert torch.cuda.current_device() == 0


def test_devices_have_their_own_streams(torch_work):
    """Work queued on device 0 does not hold up, and is not held up by, an op on device 1."""
    needs_two(torch_work)
    torch, op = torch_work.torch, OPS["paged_long"]
    _, _, want = draws(op, torch_work)
    got = on(torch, op.make(np.random.default_rng(2), "bfloat16"), 1)
    op.call(got)
    for device in (0, 1):
        torch.cuda.synchronize(device)
    torch.cuda._sleep(LONG_DELAY)
    event = torch.cuda.current_stream().record_event()
    op.call(got)
    torch.cuda.synchronize(1)
    assert not event.query()
    np.testing.assert_array_equal(torch_work.bits(got["out"]), torch_work.bits(want["out"]))
