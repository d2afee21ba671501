"""Random layouts, contents and mistakes for every op: the same answer, or an error of the library that wrote nothing.

SPDX-License-Identifier: Apache-2.0
"""

import functools
import re

import ml_dtypes
import numpy as np
import pytest
from op_cases import CASES, OURS, flat

import quire

FORM = re.compile(r"^\[\w+\] [\w, ]+: expected .+, got .+", re.DOTALL)
ERRORS = (ValueError, TypeError, IndexError, quire.UnsupportedError)
#: Operands that must be dense.
DENSE = {("merge_attention", 1), ("merge_attention", 3), ("copy_blocks", 1)}
#: Where index tensors stand among the operands.
INDICES = {
    "rotary_embedding": [0],
    "qk_norm_rope": [0],
    "write_kv": [4],
    "rope_and_write_kv": [0, 7],
    "gather_kv": [2],
    "copy_blocks": [1],
    "paged_attention": [3, 4],
    "shared_prefix_attention": [3, 4, 5],
}
CANARY = 0xC5


class Placed:
    """A copy of an array on a layout of its own, in memory that is full of canaries."""

    def __init__(self, rng, array, dense=False, written=False):
        item, shape = array.itemsize, array.shape
        strides, step = [1] * array.ndim, shape[-1] if array.ndim else 1
        outer = list(range(array.ndim - 1))
        if not dense:
            step += int(rng.choice([0, 1, 3, 8]))
            rng.shuffle(outer)
        for axis in reversed(outer):
            strides[axis] = step
            step *= shape[axis]
            if not dense and not written and rng.random() < 0.2:
                strides[axis] *= -1
        spans = [(extent - 1) * stride for extent, stride in zip(shape, strides, strict=True)]
        first = int(rng.choice([0, 1, 2, 5])) - sum(s for s in spans if s < 0)
        size = first + sum(s for s in spans if s > 0) + 1
        self.memory = np.full((size + 3) * item, CANARY, np.uint8)
        self.at = first * item, [s * item for s in strides]
        self.array = self._view(self.memory, array.dtype, shape, ())
        self.array[...] = array

    def _view(self, memory, dtype, shape, more):
        offset, strides = self.at
        return np.ndarray((*shape, *more), dtype, memory, offset, [*strides, *((1,) * len(more))])

    def canaries_live(self):
        used = np.zeros(self.memory.size, bool)
        self._view(used, bool, self.array.shape, (self.array.itemsize,))[...] = True
        return bool((self.memory[~used] == CANARY).all())


def place(rng, op, arrays, options):
    """All operands of a case on layouts of their own, and their arrays, options included."""
    dense = rng.random() < 0.3
    # In place or not: none has negative strides, for those that are written.
    placed = [
        None
        if a is None
        else Placed(rng, a, dense or (op, i) in DENSE or "rope" in op or "rotary" in op, True)
        for i, a in enumerate(arrays)
    ]
    named = {
        key: Placed(rng, value, value.ndim == 1, True) if isinstance(value, np.ndarray) else value
        for key, value in options.items()
    }
    return placed, named


def call(op, placed, named):
    values = {key: p.array if isinstance(p, Placed) else p for key, p in named.items()}
    return flat(OURS(op)(*(None if p is None else p.array for p in placed), **values))


def error_of(function, *args, **kwargs):
    """The message of the library's error, if it raises one."""
    try:
        function(*args, **kwargs)
    except ERRORS as error:
        return str(error)
    return None


def forget_errors():
    error_of(quire.check_errors, "cpu")


def draw_case(rng):
    op, arrays, options = CASES[int(rng.integers(len(CASES)))]
    return op, [None if a is None else a.copy() for a in arrays], dict(options)


def scramble(rng, op, arrays, options, starts=True):
    """Index contents out of range, now and then; the ends of what their dtype holds among them."""
    for i in INDICES.get(op, []):
        if arrays[i].size and rng.random() < 0.5:
            limits = np.iinfo(arrays[i].dtype)
            place = int(rng.integers(arrays[i].size))
            arrays[i].reshape(-1)[place] = rng.choice([-1, -2, 7, 10**6, limits.min, limits.max])
    for key in ("query_start_loc", "kv_start_loc", "mask_start"):
        if key in options and rng.random() < 0.3 and (starts or key == "mask_start"):
            options[key] = options[key].copy()
            options[key][int(rng.integers(len(options[key])))] = rng.choice([-1, 10**6, -(2**31), 2**31 - 1])


def call_into(got, op, placed, named):
    got.extend(call(op, placed, named))


@pytest.mark.parametrize("seed", range(4))
def test_layouts_change_no_answer(seed):
    rng = np.random.default_rng(seed)
    compared = set()
    for _ in range(120):
        op, arrays, options = draw_case(rng)
        if not (op == "write_kv" or op.startswith("rope_and")):  # two tokens in one slot: either may win
            # Rows of no sequence would not be written, and hold anything.
            scramble(rng, op, arrays, options, starts=False)
        placed, named = place(rng, op, arrays, options)
        got = []
        message = error_of(functools.partial(call_into, got, op, placed, named))
        if message is not None:  # layouts that an op does not take; each says so
            assert re.search(r"contiguous|fold into one|at one distance", message), (op, message)
            continue
        want = flat(OURS(op)(*arrays, **options))
        forget_errors()
        compared.add(op)
        for ours, dense in zip(got, want, strict=True):
            if dense is None:
                continue
            if dense.itemsize == 1:
                np.testing.assert_array_equal(ours.view(np.uint8), dense.view(np.uint8), err_msg=op)
            else:
                wide = [np.asarray(x, np.float64) for x in (ours, dense)]
                tolerance = 1e-5 if dense.dtype == np.float32 else 2e-2
                np.testing.assert_allclose(*wide, rtol=tolerance, atol=tolerance, err_msg=op)
        for p in [*placed, *named.values()]:
            assert not isinstance(p, Placed) or p.canaries_live(), (op, "wrote beside a tensor")
    assert len(compared) >= 12, compared  # of the ops; the others refused what was drawn for them


def spoil(rng, a):
    """Something that an op may refuse, and that tells no lie about memory."""
    others = [
        np.float32,
        np.float16,
        ml_dtypes.bfloat16,
        ml_dtypes.float8_e5m2,
        np.int8,
        np.uint8,
        np.int64,
        np.bool_,
    ]
    kind = int(rng.integers(12))
    if kind == 0:
        with np.errstate(all="ignore"):
            return a.astype(np.float32).astype(others[int(rng.integers(len(others)))])
    if kind == 1:
        return a[None]
    if kind == 2:
        return a[0] if a.ndim else a[None]
    if kind == 3:
        axis = int(rng.integers(max(a.ndim, 1)))
        return np.concatenate([a, a], axis) if a.ndim else a[None]
    if kind == 4:
        return a[..., :0]
    if kind == 5:
        return np.repeat(a, 2, -1)[..., ::2]
    if kind == 6:
        return a[..., ::-1]
    if kind == 7:
        return np.broadcast_to(a[:1], a.shape) if a.ndim else a
    if kind == 8:
        frozen = a.copy()
        frozen.flags.writeable = False
        return frozen
    if kind == 9:
        raw = np.zeros(a.nbytes + 1, np.uint8)
        return raw[1:].view(a.dtype).reshape(a.shape)
    if kind == 10:
        return (
            a.astype(a.dtype.newbyteorder())
            if a.dtype.kind in "fi" and a.itemsize > 1
            else a.astype(np.complex64)
        )
    return [None, 3, "text", object(), np.zeros(2, object), (1, 2)][int(rng.integers(6))]


@pytest.mark.parametrize("seed", range(4))
def test_mistakes_are_named_and_write_nothing(seed):
    rng = np.random.default_rng(100 + seed)
    refused = 0
    for _ in range(250):
        op, arrays, options = draw_case(rng)
        scramble(rng, op, arrays, options)
        given = [i for i, a in enumerate(arrays) if a is not None]
        victim = given[int(rng.integers(len(given)))]
        broken = list(arrays)
        broken[victim] = spoil(rng, arrays[victim])
        before = [a.copy() if isinstance(a, np.ndarray) else a for a in broken]
        if op == "gather_kv":  # the one whose functional form looks into its operands
            options.pop("dtype", None)
        message = error_of(quire.gather_kv if op == "gather_kv" else OURS(op), *broken, **options)
        if message is not None:
            refused += 1
            assert FORM.match(message), (op, victim, message)
            for a, b in zip(broken, before, strict=True):
                if isinstance(a, np.ndarray) and a.dtype != object:
                    assert a.tobytes() == b.tobytes(), (op, victim, "written, though refused", message)
        forget_errors()
    assert refused > 100


def test_two_names_of_one_memory():
    """An output that is an input as well, or begins within one, is refused, or gives what apart ones give."""
    rng = np.random.default_rng(7)
    for op in ("rms_norm", "layer_norm", "silu_and_mul", "gelu_new", "quantize_int8"):
        for offset in (0, 4, 32, 60):
            memory = rng.standard_normal(200).astype(np.float32)
            x = memory[:64].reshape(2, 32)
            weights = [np.ones(32, np.float32)] if "norm" in op else []
            width = 16 if op == "silu_and_mul" else 32
            if op == "quantize_int8":
                out = (memory.view(np.int8)[offset : offset + 64].reshape(2, 32), np.zeros(1, np.float32))
            else:
                out = memory[offset : offset + 2 * width].reshape(2, width)
            want = getattr(quire, op)(x.copy(), *weights)
            message = error_of(getattr(quire, op), x, *weights, out=out)
            if message is not None:
                assert "overlaps" in message, (op, offset, message)
                continue
            for a, b in zip(flat(out), flat(want), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-6, err_msg=f"{op} {offset}")
