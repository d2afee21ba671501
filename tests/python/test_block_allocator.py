"""The block allocator in Python: the border, the rules, and random use against a simulated cache.

SPDX-License-Identifier: Apache-2.0
"""

import doctest
import gc
import os
import subprocess
import sys
import threading
import weakref
from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from quire import BlockAllocator, OutOfBlocksError

BLOCK_SIZE = 4


def make(num_blocks=16, block_size=BLOCK_SIZE, **options):
    options.setdefault("watermark", 0.0)
    return BlockAllocator(num_blocks, block_size, **options)


def compute(a, seq_id):
    """Computes every token that is known of a sequence."""
    info = a.sequence(seq_id)
    count = info.num_tokens - info.num_computed_tokens
    copies = a.grow(seq_id, count)
    a.commit(seq_id, count)
    return copies


def add_computed(a, seq_id, tokens, **options):
    hits = a.add_sequence(seq_id, tokens, **options)
    compute(a, seq_id)
    return hits


def states(a):
    s = a.stats()
    assert s.num_live + s.num_cached + s.num_free == s.num_blocks
    a.check()
    return s.num_live, s.num_cached, s.num_free


class Arrays:
    """The arrays of a batch, filled with a value that nothing writes."""

    def __init__(self, num_seqs, num_columns, num_tokens):
        self.block_tables = np.full((num_seqs, num_columns), 77, np.int32)
        self.slot_mapping = np.full(num_tokens, 77, np.int64)
        self.seq_lens = np.full(num_seqs, 77, np.int32)
        self.query_start_loc = np.full(num_seqs + 1, 77, np.int32)
        self.positions = np.full(num_tokens, 77, np.int64)

    def untouched(self):
        return all((v == 77).all() for v in vars(self).values())


def test_the_docstring_example_runs():
    runner = doctest.DocTestRunner()
    for test in doctest.DocTestFinder().find(BlockAllocator, "BlockAllocator", module=False, globs={}):
        runner.run(test)
    assert runner.failures == 0
    assert runner.tries > 3


# ---- The border. ----


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"num_blocks": 0}, "num_blocks"),
        ({"num_blocks": 2**31}, "num_blocks"),
        ({"block_size": 0}, "block_size"),
        ({"block_size": 65537}, "block_size"),
        ({"num_host_blocks": -1}, "num_host_blocks"),
        ({"watermark": 1.0}, "watermark"),
        ({"watermark": float("nan")}, "watermark"),
        ({"max_events": 0}, "max_events"),
        ({"hash_key": -1}, "hash_key"),
        ({"hash_key": 2**128}, "hash_key"),
    ],
)
def test_bad_options(options, argument):
    with pytest.raises(ValueError, match=rf"^\[BlockAllocator\] {argument}: expected .*, got "):
        BlockAllocator(**({"num_blocks": 8} | options))


def test_more_blocks_than_memory():
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (2**33, 2**33)); import quire\n"
        "try: quire.BlockAllocator(2**31 - 2)\n"
        "except MemoryError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "num_blocks, num_host_blocks: expected as many as host memory" in done.stdout


def test_hash_key_is_an_integer():
    with pytest.raises(TypeError, match=r"hash_key: expected an int in \[0, 2\*\*128\), got str"):
        BlockAllocator(8, hash_key="secret")


def test_options_are_keywords():
    with pytest.raises(TypeError):
        BlockAllocator(8, 16, 4)


def test_properties_and_repr():
    a = make(100, 8, num_host_blocks=3, watermark=0.05)
    assert (a.num_blocks, a.block_size, a.num_host_blocks, a.watermark_blocks) == (100, 8, 3, 5)
    assert "num_blocks=100" in repr(a)
    assert "num_live=0" in repr(a.stats())
    assert len(a) == 0
    add_computed(a, 5, range(8))
    assert 5 in a
    assert 6 not in a
    assert len(a) == 1
    assert "num_tokens=8" in repr(a.sequence(5))
    assert a.usage() == 0.01


@pytest.mark.parametrize(
    "convert",
    [
        list,
        tuple,
        iter,
        lambda r: list(map(np.int64, r)),
        lambda r: np.array(r, np.int32),
        lambda r: np.array(r, np.int64),
        lambda r: np.repeat(np.array(r, np.int32), 2)[::2],
        lambda r: np.repeat(np.array(r, np.int64), 3)[::3],
        lambda r: np.array(r, np.int64)[::-1][::-1],
    ],
)
def test_ways_to_give_integers(convert):
    a = make()
    a.add_sequence(1, convert(range(-3, 7)))
    assert a.token_ids(1) == list(range(-3, 7))
    ids = a.allocate(5)
    a.free(convert(range(5)))
    assert ids == [0, 1, 2, 3, 4]
    assert states(a) == (0, 0, 16)


def test_torch_tensors():
    torch = pytest.importorskip("torch")
    a = make()
    a.add_sequence(1, torch.arange(9))
    a.add_sequence(2, torch.arange(9, dtype=torch.int32)[::2])
    assert a.token_ids(1) == list(range(9))
    assert a.token_ids(2) == [0, 2, 4, 6, 8]
    tables = torch.full((3, 8), 77, dtype=torch.int32)[:, :4]
    slots = torch.empty(12, dtype=torch.int64)
    lens = torch.empty(3, dtype=torch.int32)
    starts = torch.empty(4, dtype=torch.int32)
    a.grow_and_write_batch(
        torch.tensor([2, 1]),
        torch.tensor([1, 9], dtype=torch.int32),
        block_tables=tables,
        slot_mapping=slots,
        seq_lens=lens,
        query_start_loc=starts,
    )
    assert tables.tolist() == [[0, -1, -1, -1], [1, 2, 3, -1], [-1, -1, -1, -1]]
    assert slots.tolist() == [0, *range(4, 13), -1, -1]
    assert lens.tolist() == [1, 9, 0]
    assert starts.tolist() == [0, 1, 10, 10]


@pytest.mark.parametrize(
    ("tokens", "error"),
    [
        ([1.5], TypeError),
        (["a"], TypeError),
        ([None], TypeError),
        (5, TypeError),
        (np.array([1.0]), TypeError),
        (np.array([1], np.uint8), TypeError),
        ([2**31], ValueError),
        ([-(2**31) - 1], ValueError),
        ([2**100], ValueError),
        (np.array([2**31]), ValueError),
        (np.zeros((2, 2), np.int32), ValueError),
    ],
)
def test_bad_tokens(tokens, error):
    a = make()
    with pytest.raises(error, match=r"^\[BlockAllocator\] token_ids: expected "):
        a.add_sequence(1, tokens)
    assert 1 not in a


def test_empty_inputs():
    a = make()
    assert a.add_sequence(1, []) == 0
    assert a.add_sequence(2, np.empty(0, np.int64)) == 0
    a.free([])
    a.commit_batch([], [])
    assert a.allocate(0) == []
    assert a.take_events() == []


def test_errors():
    a = make(4)
    with pytest.raises(
        IndexError, match=r"^\[BlockAllocator.grow\] seq_id: expected the id of a sequence, got 9$"
    ):
        a.grow(9, 1)
    with pytest.raises(IndexError, match=r"expected a block id in \[0, 4\), got 4"):
        a.free([4])
    ids = a.allocate(2)
    with pytest.raises(ValueError, match="held through allocate or ref, got block 0"):
        a.free([0, 1, 0])
    a.free(ids)
    with pytest.raises(ValueError, match="free"):
        a.free(ids)
    with pytest.raises(OutOfBlocksError, match="expected at most 4 available") as caught:
        a.allocate(5)
    assert isinstance(caught.value, MemoryError)
    assert (caught.value.num_requested, caught.value.num_available) == (5, 4)
    assert states(a) == (0, 0, 4)


def test_salts_and_extra_keys():
    a = make(32)
    tokens = list(range(13))
    add_computed(a, 1, tokens, salt="tenant", extra_keys=[(5, "image")])
    assert a.num_cached_tokens(tokens, salt=b"tenant", extra_keys=((5, b"image"),)) == 12
    assert a.num_cached_tokens(tokens, salt="tenant", extra_keys=[(5, "other")]) == 4
    assert a.num_cached_tokens(tokens, salt="tenant") == 4
    assert a.num_cached_tokens(tokens) == 0
    assert a.num_cached_tokens(tokens, salt="") == 0
    for keys in (5, [5], [(1, 2, 3)], [("a", "b")], [(1, 5)]):
        with pytest.raises(TypeError, match=r"\[BlockAllocator\] extra_keys: expected .*, got "):
            a.num_cached_tokens(tokens, extra_keys=keys)
    with pytest.raises(ValueError, match="extra_keys"):
        a.num_cached_tokens(tokens, extra_keys=[(-1, "x")])
    with pytest.raises(TypeError, match="salt: expected str or bytes, got int"):
        a.num_cached_tokens(tokens, salt=5)


def test_hash_keys():
    one, two = make(hash_key=1234567890123456789012345), make(hash_key=1234567890123456789012345)
    assert one.hash_blocks(range(12)) == two.hash_blocks(np.arange(12))
    assert len(one.hash_blocks(range(12))) == 3
    assert all(0 <= h < 2**128 for h in one.hash_blocks(range(12)))
    assert make().hash_blocks(range(12)) != make().hash_blocks(range(12))
    # SipHash-2-4-128 of 16 zero bytes and four little-endian tokens, under the key 00 01 ... 0f.
    key = int.from_bytes(bytes(range(16)), "little")
    assert make(hash_key=key).hash_blocks(range(4), salt="x") != make(hash_key=key).hash_blocks(range(4))


def test_events():
    a = make(2, enable_events=True)
    add_computed(a, 1, range(8))
    first, second = a.take_events()
    hashes = a.hash_blocks(range(8))
    assert [first.kind, second.kind] == ["stored", "stored"]
    assert [first.hash, second.hash] == hashes
    assert [first.parent_hash, second.parent_hash] == [0, hashes[0]]
    assert second.token_ids == [4, 5, 6, 7]
    assert second.block_id == 1
    assert "stored" in repr(first)
    a.free_sequence(1)
    a.allocate(1)
    (removed,) = a.take_events()
    assert (removed.kind, removed.hash) == ("removed", hashes[1])
    a.reset_prefix_cache()
    assert [e.kind for e in a.take_events()] == ["cleared"]


# ---- Batches. ----


def test_write_batch_and_grow_and_write_batch_agree():
    a = make(32)
    add_computed(a, 1, range(6))
    a.append_tokens(1, [6])
    a.add_sequence(2, range(50, 60))
    fused, separate = Arrays(3, 4, 8), Arrays(3, 4, 8)
    assert a.grow_and_write_batch([2, 1], [5, 1], **vars(fused)) == []
    a.write_batch(np.array([2, 1]), np.array([5, 1]), **vars(separate))
    for arrays in (fused, separate):
        assert arrays.block_tables.tolist() == [[2, 3, -1, -1], [0, 1, -1, -1], [-1] * 4]
        assert arrays.slot_mapping.tolist() == [8, 9, 10, 11, 12, 6, -1, -1]
        assert arrays.seq_lens.tolist() == [5, 7, 0]
        assert arrays.query_start_loc.tolist() == [0, 5, 6, 6]
        assert arrays.positions.tolist() == [0, 1, 2, 3, 4, 6, -1, -1]
    a.commit_batch([2, 1], [5, 1])
    a.append_token_batch([2, 1], [1, 2])
    assert a.token_ids(1)[-1] == 2
    states(a)


def test_strided_tables():
    a = make()
    a.add_sequence(1, range(6))
    backing = np.full((2, 9), 77, np.int32)
    arrays = Arrays(2, 3, 6)
    arrays.block_tables = backing[:, 2:5]
    a.grow_and_write_batch([1], [6], **vars(arrays))
    assert backing.tolist() == [[77, 77, 0, 1, -1, 77, 77, 77, 77], [77, 77, -1, -1, -1, 77, 77, 77, 77]]


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"block_tables": np.zeros((2, 4), np.int64)}, TypeError, "block_tables: expected int32"),
        ({"block_tables": np.zeros(4, np.int32)}, ValueError, "block_tables"),
        ({"block_tables": np.zeros((4, 2), np.int32).T}, ValueError, "block_tables"),
        (
            {"block_tables": np.zeros((2, 1), np.int32)},
            ValueError,
            "block_tables: expected at least 2 columns, got 1",
        ),
        ({"slot_mapping": np.zeros(8, np.int32)}, TypeError, "slot_mapping: expected int64"),
        (
            {"slot_mapping": np.zeros(3, np.int64), "positions": None},
            ValueError,
            "slot_mapping: expected room for 6",
        ),
        ({"seq_lens": np.zeros(3, np.int32)}, ValueError, "seq_lens"),
        ({"seq_lens": np.zeros(4, np.int32)[::2]}, ValueError, "seq_lens"),
        ({"seq_lens": np.zeros(2, np.int64)}, TypeError, "seq_lens"),
        ({"query_start_loc": np.zeros(2, np.int32)}, ValueError, "query_start_loc"),
        ({"positions": np.zeros(7, np.int64)}, ValueError, "positions"),
        ({"positions": np.zeros(8, np.int32)}, TypeError, "positions"),
        ({"seq_lens": [0, 0]}, TypeError, "seq_lens"),
        ({"seq_lens": np.frombuffer(bytes(8), np.int32)}, ValueError, "seq_lens"),
    ],
)
def test_bad_arrays(change, error, text):
    a = make()
    a.add_sequence(1, range(6))
    arrays = Arrays(2, 4, 8)
    for name, value in change.items():
        setattr(arrays, name, value)
    with pytest.raises(error, match=rf"^\[BlockAllocator.*{text}"):
        a.grow_and_write_batch([1], [6], **vars(arrays))
    assert states(a) == (0, 0, 16)


def test_overlapping_arrays():
    a = make()
    arrays = Arrays(2, 4, 8)
    arrays.positions = arrays.slot_mapping
    with pytest.raises(ValueError, match="positions"):
        a.grow_and_write_batch([], [], **vars(arrays))


def test_bad_batches_change_nothing():
    a = make(2)
    a.add_sequence(1, range(9))
    a.add_sequence(2, range(50, 60))
    for ids, counts, error in (
        ([1, 1], [1, 1], ValueError),
        ([1, 3], [1, 1], IndexError),
        ([1], [1, 2], ValueError),
        ([1], [-1], ValueError),
        ([1, 2], [4, 5], OutOfBlocksError),
    ):
        arrays = Arrays(2, 4, 16)
        with pytest.raises(error):
            a.grow_and_write_batch(ids, counts, **vars(arrays))
        assert arrays.untouched()
        assert states(a) == (0, 0, 2)


# ---- Rules. ----


def test_prefix_hits_forks_windows_and_swaps():
    a = make(16, num_host_blocks=8)
    assert add_computed(a, 1, range(10)) == 0
    assert add_computed(a, 2, range(10)) == 8
    assert a.block_table(1)[:2] == a.block_table(2)[:2]
    assert a.num_references(0) == 2
    assert a.num_common_prefix_blocks([1, 2]) == 2
    a.fork(1, 3)
    assert a.num_blocks_needed(3, 1) == 1
    assert a.can_grow(3, 1)
    (copy,) = a.grow(3, 1)
    assert copy[0] == a.block_table(1)[2]
    assert copy[1] == a.block_table(3)[2]
    out = a.swap_out(1)
    assert [host for _, host in out] == [0, 1, 2]
    assert a.sequence(1).is_swapped
    assert a.can_swap_in(1)
    back = a.swap_in(1)
    assert [host for host, _ in back] == [2]  # the full blocks were still on the device
    assert a.release_out_of_window(2, 2) == 2
    assert a.block_table(2)[:2] == [-1, -1]
    a.truncate(3, 5)
    a.preempt(1)
    assert a.match_prefix(1) == 8
    for seq_id in a.sequence_ids():
        a.free_sequence(seq_id)
    live, cached, _ = states(a)
    assert (live, cached) == (0, 2)


def test_raw_blocks():
    a = make(4)
    (block,) = a.allocate(1)
    assert a.copy_on_write(block) == (block, block)
    a.ref([block])
    src, dst = a.copy_on_write(block)
    assert src == block != dst
    a.pin([dst])
    assert a.stats().num_pinned == 1
    a.free([src, dst])
    assert states(a) == (1, 0, 3)
    a.unpin([dst])
    assert states(a) == (0, 0, 4)
    assert a.can_allocate(4)
    assert not a.can_allocate(5)


def test_a_constant_hash_changes_no_result():
    rng = np.random.default_rng(5)
    good, bad = make(24), make(24, _constant_hash=True)
    for seq_id in range(200):
        tokens = rng.integers(0, 2, rng.integers(1, 20)).astype(np.int32)
        assert add_computed(good, seq_id, tokens) == add_computed(bad, seq_id, tokens)
        assert good.block_table(seq_id) == bad.block_table(seq_id)
        if seq_id >= 3:
            good.free_sequence(seq_id - 3)
            bad.free_sequence(seq_id - 3)
        bad.check()
    assert good.stats().num_hit_tokens == bad.stats().num_hit_tokens > 0


def test_lifetime():
    a = make()
    dead = weakref.ref(a)
    del a
    gc.collect()
    assert dead() is None


def test_threads():
    a = make(256)
    failures = []

    def work(thread):
        try:
            for i in range(300):
                seq_id = i * 8 + thread
                add_computed(a, seq_id, range(i % 3, i % 3 + 20))
                a.fork(seq_id, -seq_id - 1)
                a.free_sequence(seq_id)
                a.free_sequence(-seq_id - 1)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(t,)) for t in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert states(a)[0] == 0


# ---- Random use. The model keeps, for every slot, what its contents were computed from. ----


class Model:
    def __init__(self, tokens, salt, weights):
        self.tokens = list(tokens)
        self.salt = salt
        self.weights = weights
        self.num_computed = 0
        self.is_swapped = False
        self.tainted = False

    def clone(self):
        other = Model(self.tokens, self.salt, self.weights)
        other.num_computed, other.tainted = self.num_computed, self.tainted
        return other

    def content(self, position):
        return (self.weights, self.salt, tuple(self.tokens[: position + 1]))


tokens_strategy = st.one_of(
    st.lists(st.integers(0, 1), max_size=20),
    st.integers(0, 24).map(lambda n: [0] * n),
    st.integers(0, 24).map(lambda n: [0, 1, 2] * (n // 3)),
)


class Machine(RuleBasedStateMachine):
    @initialize(
        num_blocks=st.integers(4, 24),
        block_size=st.integers(1, 5),
        num_host_blocks=st.integers(0, 8),
        constant_hash=st.booleans(),
    )
    def start(self, num_blocks, block_size, num_host_blocks, constant_hash):
        self.a = make(num_blocks, block_size, num_host_blocks=num_host_blocks, _constant_hash=constant_hash)
        self.bs = block_size
        self.device = {}
        self.host = {}
        self.models = {}
        self.raw = []
        self.pins = []
        self.last_id = 0
        self.weights = 0

    def pick(self, data, *, swapped=False):
        ids = [i for i, m in self.models.items() if m.is_swapped == swapped]
        return data.draw(st.sampled_from(ids), label="sequence") if ids else None

    def new_id(self):
        self.last_id += 1
        return self.last_id

    def apply(self, copies, to, source):
        assert len({dst for _, dst in copies}) == len(copies)
        for src, dst in copies:
            for offset in range(self.bs):
                to[dst * self.bs + offset] = source.get(src * self.bs + offset)

    def longest_live_hit(self, m):
        """What must be hit: full blocks that a running sequence has computed and may share."""
        best = 0
        for seq_id, other in self.models.items():
            if other.is_swapped or other.tainted or (other.weights, other.salt) != (m.weights, m.salt):
                continue
            if self.a.sequence(seq_id).num_released_blocks:
                continue
            common = 0
            for x, y in zip(m.tokens[:-1], other.tokens[: other.num_computed], strict=False):
                if x != y:
                    break
                common += 1
            best = max(best, common // self.bs * self.bs)
        return best

    @rule(tokens=tokens_strategy, salt=st.sampled_from(["", "", "salt"]))
    def add(self, tokens, salt):
        if len(self.models) >= 8:
            return
        m = Model(tokens, salt, self.weights)
        expected = self.longest_live_hit(m)
        m.num_computed = self.a.num_cached_tokens(tokens, salt=salt)
        seq_id = self.new_id()
        assert self.a.add_sequence(seq_id, tokens, salt=salt) == m.num_computed
        assert m.num_computed % self.bs == 0
        assert expected <= m.num_computed <= max(0, len(tokens) - 1)
        self.models[seq_id] = m

    @rule(data=st.data())
    def step(self, data):
        ids, counts = [], []
        for seq_id, m in self.models.items():
            pending = len(m.tokens) - m.num_computed
            if m.is_swapped or pending == 0 or data.draw(st.booleans()):
                continue
            ids.append(seq_id)
            counts.append(data.draw(st.integers(0, pending)))
        total = sum(counts)
        width = 1 + 48 // self.bs
        arrays = Arrays(len(ids) + 1, width, total + 2)
        before = states(self.a)
        error = None
        try:
            copies = self.a.grow_and_write_batch(ids, counts, **vars(arrays))
        except OutOfBlocksError as caught:
            error = caught
        if error is not None:
            assert arrays.untouched()
            assert error.num_requested > error.num_available == before[1] + before[2]
            assert states(self.a) == before
            return
        self.apply(copies, self.device, self.device)
        token = 0
        for i, (seq_id, count) in enumerate(zip(ids, counts, strict=True)):
            m = self.models[seq_id]
            assert arrays.seq_lens[i] == m.num_computed + count
            assert arrays.query_start_loc[i] == token
            for position in range(m.num_computed, m.num_computed + count):
                slot = int(arrays.slot_mapping[token])
                assert slot // self.bs == arrays.block_tables[i, position // self.bs]
                assert slot % self.bs == position % self.bs
                assert arrays.positions[token] == position
                self.device[slot] = m.content(position)
                token += 1
        assert (arrays.slot_mapping[total:] == -1).all()
        assert (arrays.block_tables[len(ids) :] == -1).all()
        assert (arrays.query_start_loc[len(ids) :] == total).all()
        self.a.commit_batch(ids, counts)
        for seq_id, count in zip(ids, counts, strict=True):
            self.models[seq_id].num_computed += count

    @rule(data=st.data(), tokens=st.lists(st.integers(0, 2), max_size=6))
    def append(self, data, tokens):
        seq_id = self.pick(data, swapped=data.draw(st.booleans()))
        if seq_id is None or len(self.models[seq_id].tokens) > 40:
            return
        self.a.append_tokens(seq_id, tokens)
        self.models[seq_id].tokens += tokens

    @rule(data=st.data())
    def fork(self, data):
        seq_id = self.pick(data)
        if seq_id is None or len(self.models) >= 8:
            return
        child = self.new_id()
        self.a.fork(seq_id, child)
        self.models[child] = self.models[seq_id].clone()

    @rule(data=st.data())
    def free(self, data):
        seq_id = self.pick(data, swapped=data.draw(st.booleans()))
        if seq_id is not None:
            self.a.free_sequence(seq_id)
            del self.models[seq_id]

    @rule(data=st.data(), match=st.booleans())
    def preempt(self, data, match):
        seq_id = self.pick(data, swapped=data.draw(st.booleans()))
        if seq_id is None:
            return
        m = self.models[seq_id]
        self.a.preempt(seq_id)
        m.is_swapped, m.tainted, m.weights, m.num_computed = False, False, self.weights, 0
        if match:
            m.num_computed = self.a.match_prefix(seq_id)

    @rule(data=st.data(), window=st.integers(1, 10))
    def release(self, data, window):
        seq_id = self.pick(data)
        if seq_id is None:
            return
        m = self.models[seq_id]
        before = self.a.sequence(seq_id).num_released_blocks
        count = self.a.release_out_of_window(seq_id, window)
        assert before + count == max(before, max(0, m.num_computed - window + 1) // self.bs)

    @rule(data=st.data())
    def truncate(self, data):
        seq_id = self.pick(data)
        if seq_id is None:
            return
        m = self.models[seq_id]
        lowest = self.a.sequence(seq_id).num_released_blocks * self.bs
        count = data.draw(st.integers(lowest, len(m.tokens)))
        self.a.truncate(seq_id, count)
        m.tokens = m.tokens[:count]
        m.num_computed = min(m.num_computed, count)

    @rule(data=st.data())
    def swap_out(self, data):
        seq_id = self.pick(data)
        if seq_id is None:
            return
        if not self.a.can_swap_out(seq_id):
            with pytest.raises(OutOfBlocksError):
                self.a.swap_out(seq_id)
            return
        self.apply(self.a.swap_out(seq_id), self.host, self.device)
        self.models[seq_id].is_swapped = True

    @rule(data=st.data())
    def swap_in(self, data):
        seq_id = self.pick(data, swapped=True)
        if seq_id is None:
            return
        if not self.a.can_swap_in(seq_id):
            with pytest.raises(OutOfBlocksError):
                self.a.swap_in(seq_id)
            return
        self.apply(self.a.swap_in(seq_id), self.device, self.host)
        self.models[seq_id].is_swapped = False

    @rule(count=st.integers(0, 4))
    def allocate(self, count):
        if len(self.raw) >= 8:
            return
        if not self.a.can_allocate(count):
            with pytest.raises(OutOfBlocksError):
                self.a.allocate(count)
            return
        ids = self.a.allocate(count)
        assert len(set(ids)) == count
        for block in ids:
            for offset in range(self.bs):
                self.device[block * self.bs + offset] = "raw"
        self.raw += ids

    @precondition(lambda self: self.raw)
    @rule(data=st.data())
    def give_back(self, data):
        block = data.draw(st.sampled_from(self.raw))
        self.raw.remove(block)
        self.a.free([block])

    @rule(data=st.data())
    def pin(self, data):
        seq_id = self.pick(data)
        if seq_id is None or len(self.pins) >= 3:
            return
        table = [b for b in self.a.block_table(seq_id) if b >= 0]
        if table:
            block = data.draw(st.sampled_from(table))
            self.a.pin([block])
            self.pins.append(block)

    @precondition(lambda self: self.pins)
    @rule()
    def unpin(self):
        self.a.unpin([self.pins.pop()])

    @rule(really=st.integers(0, 4))
    def reset(self, really):
        if really:
            return
        self.weights += 1
        for seq_id, m in self.models.items():
            if self.a.sequence(seq_id).num_blocks:
                m.tainted = True
            else:
                m.weights = self.weights
        self.a.reset_prefix_cache()
        assert self.a.stats().num_cached == 0

    @invariant()
    def everything_holds(self):
        if not hasattr(self, "a"):
            return
        live, _, _ = states(self.a)
        holders = Counter(self.raw) + Counter(self.pins)
        for seq_id, m in self.models.items():
            info = self.a.sequence(seq_id)
            assert info.num_computed_tokens == m.num_computed
            assert info.num_tokens == len(m.tokens)
            assert info.is_swapped == m.is_swapped
            table = self.a.block_table(seq_id)
            memory = self.host if m.is_swapped else self.device
            if not m.is_swapped:
                holders.update(b for b in table if b >= 0)
            for position in range(info.num_released_blocks * self.bs, m.num_computed):
                slot = table[position // self.bs] * self.bs + position % self.bs
                assert memory[slot] == m.content(position)
        assert live == len(holders)
        assert all(self.a.num_references(b) == count for b, count in holders.items())
        assert self.a.stats().num_pinned == len(set(self.pins))


TestMachine = Machine.TestCase
TestMachine.settings = settings(
    max_examples=int(os.environ.get("QUIRE_HYPOTHESIS_EXAMPLES", "60")),
    stateful_step_count=60,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
