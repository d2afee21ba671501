"""Blocks that leave a KV cache and come back: bit for bit, through other shares of the heads, and never from a damaged buffer.

SPDX-License-Identifier: Apache-2.0
"""

import dataclasses

import frameworks
import numpy as np
import pytest

import quire

DTYPES = ["float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int8"]
LAYERS, BLOCKS, BLOCK_SIZE, HEADS, HEAD_DIM = 3, 7, 4, 4, 8


@pytest.fixture(params=["cpu", "cuda:0"])
def device(request):
    if request.param != "cpu" and not frameworks.has_gpu():
        pytest.skip("no CUDA device, or a CPU-only build")
    return request.param


def cache_of(dtype="float32", heads=HEADS, blocks=BLOCKS, device="cpu"):
    return quire.KVCache(LAYERS, blocks, BLOCK_SIZE, heads, HEAD_DIM, dtype, device)


def host(cache):
    """The pool's bytes, [layer, 2, block, slot, head, bytes], writable on the CPU."""
    if cache.device == "cpu":
        return cache.pool.bytes().numpy()
    copy = quire.KVCache(*cache.pool.shape[:1], *cache.pool.shape[2:], cache.dtype, "cpu")
    copy.swap_blocks_from(cache, np.stack([np.arange(cache.num_blocks)] * 2, axis=1))
    wait()
    return copy.pool.bytes().numpy()


def wait():
    """For the device, with whatever framework is here."""
    if not frameworks.has_gpu():
        return
    for name in ("torch", "cupy"):
        made = frameworks.make(name, "cuda:0")
        if not isinstance(made, str):
            made.synchronize()
            return
    pytest.skip("neither torch nor cupy to wait for the device with")


def fill(cache, seed=0):
    values = np.random.default_rng(seed).integers(0, 256, cache.pool.bytes().shape).astype(np.uint8)
    staging = cache if cache.device == "cpu" else cache_of(cache.dtype, cache.num_kv_heads, cache.num_blocks)
    staging.pool.bytes().numpy()[...] = values
    if staging is not cache:
        cache.swap_blocks_from(staging, np.stack([np.arange(cache.num_blocks)] * 2, axis=1))
        wait()
    return values


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shards", [(a, b) for a in (1, 2, 4) for b in (1, 2, 4)])
def test_resharding(device, dtype, shards):
    """From one number of caches to another and back; every byte, and only the blocks that were named."""
    ids, places = [5, 0, 3, 4], [1, 2, 6, 0]
    parts, others = shards
    whole = np.random.default_rng(1).integers(0, 256, cache_of(dtype).pool.bytes().shape).astype(np.uint8)
    width, narrow = HEADS // parts, HEADS // others
    first = [cache_of(dtype, width, device=device) for _ in range(parts)]
    for i, cache in enumerate(first):
        staging = cache_of(dtype, width)
        staging.pool.bytes().numpy()[...] = whole[..., i * width : (i + 1) * width, :]
        cache.swap_blocks_from(staging, np.stack([np.arange(BLOCKS)] * 2, axis=1))
        wait()
    second = [cache_of(dtype, narrow, device=device) for _ in range(others)]
    before = [fill(cache, 9) for cache in second]
    sent = [
        cache.export_blocks(ids, head_start=i * width, total_kv_heads=HEADS) for i, cache in enumerate(first)
    ]
    for j, cache in enumerate(second):
        covered = 0
        for blocks in sent:
            options = {"head_start": j * narrow, "total_kv_heads": HEADS}
            if blocks.head_start < (j + 1) * narrow and j * narrow < blocks.head_start + blocks.num_heads:
                start, stop = cache.import_blocks(blocks, places, **options)
                covered += stop - start
            else:
                with pytest.raises(ValueError, match="expected some of the heads"):
                    cache.import_blocks(blocks, places, **options)
        assert covered == narrow
    wait()
    for j, (cache, old) in enumerate(zip(second, before)):
        want = old.copy()
        want[:, :, places] = whole[:, :, ids, :, j * narrow : (j + 1) * narrow]
        np.testing.assert_array_equal(host(cache), want)
    back = [cache_of(dtype, width, device=device) for _ in range(parts)]
    returned = [
        cache.export_blocks(places, head_start=j * narrow, total_kv_heads=HEADS)
        for j, cache in enumerate(second)
    ]
    for i, cache in enumerate(back):
        for blocks in returned:
            if blocks.head_start < (i + 1) * width and i * width < blocks.head_start + blocks.num_heads:
                cache.import_blocks(blocks, ids, head_start=i * width, total_kv_heads=HEADS)
    wait()
    for i, cache in enumerate(back):
        np.testing.assert_array_equal(
            host(cache)[:, :, ids], whole[:, :, ids, :, i * width : (i + 1) * width]
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_through_bytes(dtype):
    cache, other = cache_of(dtype), cache_of(dtype)
    values = fill(cache)
    fill(other, 5)
    allocator = quire.BlockAllocator(BLOCKS, BLOCK_SIZE)
    keys = allocator.hash_blocks(list(range(2 * BLOCK_SIZE)))
    assert len(keys) == 2
    assert max(keys) >= 2**64
    buffer = cache.export_blocks([6, 1], keys=keys).to_bytes()
    blocks = quire.KVBlocks.from_bytes(bytearray(buffer))
    assert blocks.keys == tuple(keys)
    assert (blocks.dtype, blocks.num_blocks, blocks.num_heads, blocks.total_kv_heads) == (
        dtype,
        2,
        HEADS,
        HEADS,
    )
    assert len(blocks.header) % 64 == 0
    assert other.import_blocks(buffer, [0, 2]) == (0, HEADS)
    np.testing.assert_array_equal(host(other)[:, :, [0, 2]], values[:, :, [6, 1]])
    other.import_blocks(memoryview(buffer), [3, 4])
    other.import_blocks(np.frombuffer(buffer, np.uint8), [5, 6])
    np.testing.assert_array_equal(host(other)[:, :, [3, 4]], values[:, :, [6, 1]])


def test_payload_of_another_rank(device):
    """A quire.Tensor payload in whatever shape it travelled."""
    cache, other = cache_of("bfloat16", device=device), cache_of("bfloat16", device=device)
    values = fill(cache)
    fill(other, 5)
    blocks = cache.export_blocks([6, 1])
    for places, shape in (
        ([0, 2], (blocks.payload_bytes,)),
        ([3, 4], (1, blocks.payload_bytes // 64, 1, 64)),
    ):
        again = quire.KVBlocks.from_parts(blocks.header, blocks.payload.reshape(shape))
        assert again.payload.shape == shape
        other.import_blocks(again, places)
        np.testing.assert_array_equal(host(other)[:, :, places], values[:, :, [6, 1]])
    with pytest.raises(ValueError, match=r"\[Tensor.reshape\] strides: expected a contiguous tensor"):
        quire.KVBlocks.from_parts(blocks.header, blocks.payload.transpose(0, 1))
    with pytest.raises(ValueError, match=rf"expected {blocks.payload_bytes} bytes, got 64"):
        quire.KVBlocks.from_parts(blocks.header, quire.empty((64,), "uint8", device))


def test_reshape():
    tensor = quire.empty((4, 6), "int32", "cpu")
    tensor.numpy()[...] = np.arange(24).reshape(4, 6)
    view = tensor.reshape((2, 3, 4))
    assert (view.shape, view.strides, view.data_ptr) == ((2, 3, 4), (12, 4, 1), tensor.data_ptr)
    np.testing.assert_array_equal(view.numpy().ravel(), np.arange(24))
    assert tensor[1].reshape([3, 2]).numpy().tolist() == [[6, 7], [8, 9], [10, 11]]
    assert tensor.narrow(0, 1, 1).reshape((6,)).numpy().tolist() == [6, 7, 8, 9, 10, 11]
    for bad, error, message in (
        ((5, 5), ValueError, "expected 24 elements"),
        ((-1, -24), ValueError, "expected extents of 0 or more"),
        (7, TypeError, "expected a sequence of integers"),
        ((1,) * 8 + (24,), ValueError, "expected a rank of at most 8"),
        ((2.0, 12), TypeError, "shape"),
    ):
        with pytest.raises(error, match=message):
            tensor.reshape(bad)
    with pytest.raises(ValueError, match="expected a contiguous tensor"):
        tensor.narrow(1, 0, 3).reshape((12,))


def test_stable_keys():
    """With a key of one's own, two processes name the same contents alike."""
    tokens = list(range(3 * BLOCK_SIZE))
    first, second = (quire.BlockAllocator(BLOCKS, BLOCK_SIZE, hash_key=2**127 + 5) for _ in "ab")
    assert first.hash_blocks(tokens) == second.hash_blocks(tokens)


@pytest.mark.parametrize("name", ["numpy", "torch", "cupy"])
def test_payload_of_any_framework(name):
    made = frameworks.make(name, "cuda:0" if name == "cupy" else "cpu")
    if isinstance(made, str):
        pytest.skip(f"{name}: {made}")
    cache, other = cache_of("bfloat16", device=made.device), cache_of("bfloat16", device=made.device)
    values = fill(cache)
    exported = cache.export_blocks([2, 5], device="cpu")
    wait()
    payload = made.array(exported.payload.numpy().reshape(-1))
    other.import_blocks(quire.KVBlocks.from_parts(exported.header, payload), [0, 1])
    wait()
    np.testing.assert_array_equal(host(other)[:, :, [0, 1]], values[:, :, [2, 5]])


def test_between_host_and_device():
    if not frameworks.has_gpu():
        pytest.skip("no CUDA device, or a CPU-only build")
    cache, other = cache_of("float16", device="cuda:0"), cache_of("float16", device="cuda:0")
    values = fill(cache)
    for options in ({"device": "cpu", "pinned": True}, {"device": "cpu"}, {}):
        blocks = cache.export_blocks([1, 2, 5], **options)
        wait()
        other.import_blocks(blocks, [6, 5, 0])
        wait()
        np.testing.assert_array_equal(host(other)[:, :, [6, 5, 0]], values[:, :, [1, 2, 5]])
    with pytest.raises(ValueError, match=r"device: expected cpu"):
        cache.export_blocks([1]).to_bytes()


def test_damaged_buffers():
    cache = cache_of("float16")
    values = fill(cache)
    exported = cache.export_blocks([1, 2], keys=[7, 2**127])
    buffer = exported.to_bytes()
    for length in [*range(len(exported.header) + 3), len(buffer) - 1]:
        with pytest.raises(ValueError, match=r"\[KVBlocks\] (header|payload): expected"):
            cache.import_blocks(buffer[:length], [3, 4])
    with pytest.raises(ValueError, match=r"\[KVBlocks\] payload: expected"):
        cache.import_blocks(buffer + b"\0", [3, 4])
    for at in range(len(exported.header)):
        damaged = bytearray(buffer)
        damaged[at] ^= 0x10
        with pytest.raises(ValueError, match=r"\[KVBlocks\] (header|payload): expected"):
            cache.import_blocks(damaged, [3, 4])
    for foreign in (b"", b"GGUF" + bytes(300), bytes(range(256)) * 4):
        with pytest.raises(ValueError, match=r"\[KVBlocks\] header: expected one of quire's KV blocks"):
            cache.import_blocks(foreign, [3, 4])
    with pytest.raises(ValueError, match="expected a uint8 tensor"):
        quire.KVBlocks.from_parts(exported.header, np.zeros(4, np.float32))
    for header in ("text", 64, None):
        with pytest.raises(TypeError, match=r"\[KVBlocks\] header: expected bytes, got"):
            quire.KVBlocks.from_parts(header, exported.payload)
    np.testing.assert_array_equal(host(cache), values)


def test_refusals():
    cache = cache_of("float16")
    values = fill(cache)
    blocks = cache.export_blocks([1, 2])
    for other, text in (
        (quire.KVCache(LAYERS + 1, BLOCKS, BLOCK_SIZE, HEADS, HEAD_DIM, "float16"), "num_layers 4, got 3"),
        (quire.KVCache(LAYERS, BLOCKS, BLOCK_SIZE * 2, HEADS, HEAD_DIM, "float16"), "block_size 8, got 4"),
        (quire.KVCache(LAYERS, BLOCKS, BLOCK_SIZE, HEADS, HEAD_DIM * 2, "float16"), "head_dim 16, got 8"),
        (
            quire.KVCache(LAYERS, BLOCKS, BLOCK_SIZE, HEADS * 2, HEAD_DIM, "float16"),
            "total_kv_heads 8, got 4",
        ),
    ):
        with pytest.raises(ValueError, match=text):
            other.import_blocks(blocks, [0, 1])
    with pytest.raises(TypeError, match="expected bfloat16, got float16"):
        cache_of("bfloat16").import_blocks(blocks, [0, 1])
    with pytest.raises(ValueError, match="block_ids: expected 2, one for each block, got 1"):
        cache.import_blocks(blocks, [0])
    for bad in ([1.9], ["1"]):
        with pytest.raises(TypeError, match="block_ids: expected integers"):
            cache.export_blocks(bad)
    with pytest.raises(TypeError, match="keys: expected integers"):
        cache.export_blocks([1], keys=[0.5])
    assert cache.export_blocks([1], keys=np.array([7])).keys == (7,)
    for bad in ([0, BLOCKS], [-1, 0], [0, 2**63]):
        with pytest.raises(IndexError):
            cache.import_blocks(blocks, bad)
        with pytest.raises(IndexError):
            cache.export_blocks(bad)
    with pytest.raises(ValueError, match="head_start"):
        cache.export_blocks([0], head_start=1)
    with pytest.raises(ValueError, match="keys: expected 1"):
        cache.export_blocks([0], keys=[1, 2])
    with pytest.raises(ValueError, match="keys"):
        cache.export_blocks([0], keys=[2**128])
    for payload in (np.zeros(10, np.uint8), np.zeros(blocks.payload_bytes, np.int8), None):
        with pytest.raises(ValueError, match=r"\[KVBlocks\] payload: expected"):
            cache.import_blocks(dataclasses.replace(blocks, payload=payload), [0, 1])
    for name in ("head_start", "total_kv_heads"):
        with pytest.raises(TypeError, match=rf"export_blocks\] {name}: expected an integer, got float"):
            cache.export_blocks([0], **{name: 4.0})
    with pytest.raises(ValueError, match=r"total_kv_heads: expected fewer than 2\*\*31"):
        cache.export_blocks([0], total_kv_heads=2**31)
    with pytest.raises(TypeError, match="block_ids: expected integers, got NoneType"):
        cache.import_blocks(blocks, None)
    for bad in (None, "text", np.zeros(9, np.uint8)[::2]):
        with pytest.raises(
            TypeError, match=r"\[KVBlocks\] buffer: expected contiguous bytes on the host, got"
        ):
            cache.import_blocks(bad, [0, 1])
    np.testing.assert_array_equal(host(cache), values)
    empty = cache.export_blocks([])
    assert cache.import_blocks(empty.to_bytes(), []) == (0, HEADS)


def test_description(device):
    cache = cache_of("bfloat16", device=device)
    values, description = fill(cache), cache.describe()
    assert (description.base, description.num_bytes) == (cache.pool.data_ptr, cache.num_bytes_allocated)
    assert (description.device, description.dtype, description.shape[description.shard_axis]) == (
        device,
        "bfloat16",
        HEADS,
    )
    assert description.strides_bytes[-1] == 2
    assert description.block_bytes == BLOCK_SIZE * HEADS * HEAD_DIM * 2
    regions = list(description.regions([4, 2]))
    assert len(regions) == LAYERS * 2 * 2
    if device == "cpu":
        import ctypes

        got = b"".join(ctypes.string_at(address, size) for address, size in regions)
        assert got == values[:, :, [4, 2]].tobytes()
    with pytest.raises(IndexError):
        list(description.regions([BLOCKS]))
    with pytest.raises(TypeError, match="block_ids: expected integers"):
        list(description.regions(["1"]))


def test_views_of_tensors():
    tensor = quire.empty((2, 3, 4), "float16", "cpu")
    assert tensor.bytes().shape == (2, 3, 8)
    assert tensor.narrow(1, 1, 2).shape == (2, 2, 4)
    assert tensor.narrow(1, 1, 2).data_ptr == tensor.data_ptr + 8
    assert tensor.narrow(1, 3, 0).shape == (2, 0, 4)
    for arguments in ((3, 0, 1), (-1, 0, 1), (1, 2, 2), (1, -1, 1), (1, 0, -1), (1, 4, 0)):
        with pytest.raises(IndexError):
            tensor.narrow(*arguments)
    with pytest.raises(ValueError, match="stride 1"):
        tensor.transpose(1, 2).bytes()
