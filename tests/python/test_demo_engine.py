"""The demo's engine: batching, preemption, chunks and prefix cache change no request's tokens.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tokenizers")

import quire.demo
from quire.demo import DemoError
from quire.demo.backend import Backend, select_backend
from quire.demo.cache import KV_DTYPES
from quire.demo.engine import Engine
from quire.demo.model import Model
from quire.demo.sampling import SamplingParams, sample

EMBEDDED = Path(quire.demo.__file__).parent / "model"
HELD_OUT = Path(__file__).parent / "data" / "demo_held_out.txt"


@pytest.fixture(scope="module", params=["cpu", "cuda"])
def model(request: pytest.FixtureRequest) -> Model:
    """The embedded model in float32 on each array library that is here."""
    try:
        backend = select_backend(request.param)
    except DemoError as error:
        pytest.skip(str(error))
    return Model.load(EMBEDDED, backend, "fp32")


@pytest.fixture(scope="module")
def text_ids() -> list[int]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(EMBEDDED / "tokenizer.json"))
    return list(tokenizer.encode(HELD_OUT.read_text(encoding="utf-8")[:40000]).ids)


def run(engine: Engine, requests: list[tuple[list[int], SamplingParams]]) -> list[list[int]]:
    """Runs requests together and checks at the end that every block was given back."""
    ids = [engine.add_request(prompt, params) for prompt, params in requests]
    outputs: dict[int, list[int]] = {i: [] for i in ids}
    while engine.has_work:
        for output in engine.step():
            outputs[output.request_id].append(output.token_id)
    stats = engine.stats()
    assert stats.num_live_blocks == 0
    assert stats.num_cached_blocks + stats.num_free_blocks == engine.num_blocks
    return [outputs[i] for i in ids]


def test_ragged_prompts_with_preemption_give_the_same_tokens_as_alone(
    model: Model, text_ids: list[int]
) -> None:
    rng = np.random.default_rng(5)
    requests = []
    for index in range(64):
        length, start = int(rng.integers(1, 90)), int(rng.integers(0, len(text_ids) - 100))
        temperature = 0.9 if index % 4 == 3 else 0.0
        params = SamplingParams(int(rng.integers(1, 40)), temperature, 0.9, seed=index)
        requests.append((text_ids[start : start + length], params))
    alone = [run(Engine(model, num_blocks=32, prefix_cache=False), [request])[0] for request in requests]
    assert [len(tokens) for tokens in alone] == [params.max_tokens for _, params in requests]
    # 40 blocks of 8 hold about four of these sequences, so that 24 seats force preemption.
    engine = Engine(model, num_blocks=40, block_size=8, max_batch_tokens=50, max_num_seqs=24)
    assert run(engine, requests) == alone
    assert engine.stats().num_preemptions > 10
    assert engine.stats().num_generated_tokens == sum(map(len, alone))


@pytest.mark.parametrize("max_batch_tokens", [7, 64, 400])
def test_chunked_prefill_changes_nothing(model: Model, text_ids: list[int], max_batch_tokens: int) -> None:
    requests = [(text_ids[i : i + 150], SamplingParams(8)) for i in (0, 31, 77)]
    alone = [run(Engine(model, num_blocks=16), [request])[0] for request in requests]
    engine = Engine(model, num_blocks=64, max_batch_tokens=max_batch_tokens, max_num_seqs=4)
    assert run(engine, requests) == alone


def test_prefix_cache_hits_and_changes_nothing(model: Model, text_ids: list[int]) -> None:
    shared = text_ids[:100]
    requests = [(shared + text_ids[i : i + 9], SamplingParams(12)) for i in range(200, 1000, 100)]
    without = run(Engine(model, num_blocks=64, max_num_seqs=2, prefix_cache=False), requests)
    engine = Engine(model, num_blocks=64, max_num_seqs=2)
    assert run(engine, requests) == without
    assert (
        engine.stats().num_hit_tokens == 6 * 96
    )  # six of eight come after the first two were computed; 100 // 16 blocks
    # The very same prompt again: all but its last token's block hit.
    hits = engine.stats().num_hit_tokens
    assert run(engine, requests[-1:]) == without[-1:]
    assert engine.stats().num_hit_tokens - hits == 96


def test_stop_token_ends_a_request(model: Model, text_ids: list[int]) -> None:
    prompt = text_ids[:20]
    (tokens,) = run(Engine(model, num_blocks=8), [(prompt, SamplingParams(20))])
    stop = next(token for i, token in enumerate(tokens) if i >= 2 and token not in tokens[:i])
    params = SamplingParams(20, stop_token_ids=frozenset({stop}))
    engine = Engine(model, num_blocks=8)
    engine.add_request(prompt, params)
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    assert [o.token_id for o in outputs] == tokens[: tokens.index(stop) + 1]
    assert [o.finish_reason for o in outputs[-2:]] == [None, "stop"]


def test_a_request_may_fill_the_whole_cache_but_not_more(model: Model, text_ids: list[int]) -> None:
    engine = Engine(model, num_blocks=4, max_batch_tokens=32, max_num_seqs=8)
    requests = [
        (text_ids[i : i + 40], SamplingParams(25)) for i in range(3)
    ]  # 64 positions each, the cache's all
    results = run(engine, requests)
    assert [len(tokens) for tokens in results] == [25, 25, 25]
    with pytest.raises(DemoError, match=r"need 5 blocks of 16, the cache has 4"):
        engine.add_request(text_ids[:40], SamplingParams(26))
    with pytest.raises(DemoError, match="prompt too long"):
        engine.add_request(text_ids[:1000], SamplingParams(25))
    with pytest.raises(DemoError, match="no tokens"):
        engine.add_request([], SamplingParams())
    with pytest.raises(DemoError, match="token ids that the model does not have"):
        engine.add_request([2048], SamplingParams())
    assert not engine.has_work


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_every_kv_dtype_generates(model: Model, text_ids: list[int], kv_dtype: str) -> None:
    pytest.importorskip("ml_dtypes")
    engine = Engine(model, num_blocks=32, kv_dtype=kv_dtype)
    (tokens,) = run(engine, [(text_ids[:200], SamplingParams(30))])
    (exact,) = run(Engine(model, num_blocks=32), [(text_ids[:200], SamplingParams(30))])
    agreeing = next((i for i, (a, b) in enumerate(zip(tokens, exact, strict=True)) if a != b), 30)
    # A cache in 16 bits may turn a near tie after a while; perplexities tell how good the quantized ones are.
    assert agreeing >= {"fp32": 30, "fp16": 20, "bf16": 10}.get(kv_dtype, 1), f"{tokens} against {exact}"
    assert all(0 <= token < model.config.vocab_size for token in tokens)


def test_sampling_follows_the_distribution() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    count = 4000
    rows = np.tile(logits, (count, 1))

    def frequencies(temperature: float, top_p: float) -> np.ndarray:
        params = SamplingParams(temperature=temperature, top_p=top_p, seed=11)
        tokens = sample(rows, [params] * count, range(count), Backend())
        return np.bincount(tokens, minlength=4) / count

    np.testing.assert_allclose(frequencies(1.0, 1.0), [0.5, 0.3, 0.15, 0.05], atol=0.03)
    np.testing.assert_allclose(frequencies(1.0, 0.7), [0.625, 0.375, 0, 0], atol=0.03)
    np.testing.assert_array_equal(frequencies(1.0, 0.4), [1, 0, 0, 0])
    hot = np.array([0.5, 0.3, 0.15, 0.05]) ** 0.5
    np.testing.assert_allclose(frequencies(2.0, 1.0), hot / hot.sum(), atol=0.03)
    np.testing.assert_array_equal(frequencies(0.0, 1.0), [1, 0, 0, 0])


def test_a_tiny_temperature_is_greedy() -> None:
    logits = np.random.default_rng(1).standard_normal((3, 50)).astype(np.float32)
    with np.errstate(all="raise", under="ignore"):
        for temperature in (0.0, 1e-300, 1e-44, 9.9e-6, 1e-5):
            params = [SamplingParams(temperature=temperature, seed=s) for s in range(3)]
            np.testing.assert_array_equal(sample(logits, params, [0] * 3, Backend()), logits.argmax(axis=-1))


def test_sampling_mixes_greedy_and_random_rows() -> None:
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((6, 50)).astype(np.float32)
    params = [SamplingParams(temperature=t, seed=s) for s, t in enumerate((0.0, 1.0, 0.0, 0.5, 2.0, 0.0))]
    together = sample(logits, params, [3] * 6, Backend())
    alone = [sample(logits[i : i + 1], params[i : i + 1], [3], Backend())[0] for i in range(6)]
    np.testing.assert_array_equal(together, alone)
    np.testing.assert_array_equal(together[[0, 2, 5]], logits[[0, 2, 5]].argmax(axis=-1))
    assert {params[1].uniform(i) for i in range(3)}.isdisjoint({params[3].uniform(i) for i in range(3)})


class Recording(Backend):
    """NumPy that replays a call by making it again, on whatever its arrays hold by then."""

    has_graphs = True

    def capture(self, call):
        result = call()

        def replay() -> None:
            result[...] = call()

        return replay, result


@pytest.fixture(scope="module", params=["recording", "cuda"])
def graph_model(request: pytest.FixtureRequest) -> Model:
    """The embedded model where steps can be captured."""
    try:
        backend = Recording() if request.param == "recording" else select_backend("cuda")
    except DemoError as error:
        pytest.skip(str(error))
    return Model.load(EMBEDDED, backend, "fp32")


def test_graphs_change_no_token(graph_model: Model, text_ids: list[int]) -> None:
    """Batches that shrink and grow, sequences of all lengths and preemption, over one graph for each batch size."""
    rng = np.random.default_rng(6)
    requests = []
    for index in range(24):
        length, start = int(rng.integers(1, 90)), int(rng.integers(0, len(text_ids) - 100))
        params = SamplingParams(int(rng.integers(1, 50)), 0.9 if index % 4 == 3 else 0.0, 0.9, seed=index)
        requests.append((text_ids[start : start + length], params))
    options = {"num_blocks": 50, "block_size": 8, "max_batch_tokens": 50, "max_num_seqs": 6}
    plain, engine = (Engine(graph_model, cuda_graphs=on, **options) for on in (False, True))
    assert plain.graphs is None
    assert engine.graphs is not None
    assert run(engine, requests) == run(plain, requests)
    assert engine.stats().num_preemptions > 0
    assert set(engine.graphs._captured) == {1, 2, 4, 6}


def test_the_rest_of_a_graph_batch_is_idle(graph_model: Model, text_ids: list[int]) -> None:
    """Three sequences in a graph of four, after four that were longer: the fourth row's old tables are not followed."""
    engine = Engine(graph_model, num_blocks=32, block_size=8, max_num_seqs=4)
    assert engine.graphs is not None
    rng, lens = np.random.default_rng(0), np.array([30, 41, 17, 60], np.int32)
    prompts = [list(rng.integers(0, 2000, n)) for n in lens]
    run(engine, [(prompt, SamplingParams(2)) for prompt in prompts])  # the cache holds something everywhere
    tables = np.arange(32, dtype=np.int32).reshape(4, 8)

    def step(count: int, slots: np.ndarray) -> np.ndarray:
        logits = engine.graphs.run([5] * count, lens[:count] - 1, slots, tables[:count], lens[:count])
        return graph_model.backend.host(logits).copy()

    # Each sequence's last slot is written, so that a second run of the same finds the same cache.
    slots = np.array([tables[i, (n - 1) // 8] * 8 + (n - 1) % 8 for i, n in enumerate(lens)], np.int64)
    four = step(4, slots)
    before = np.from_dlpack(engine.cache.pool.pool).copy() if graph_model.backend.device == "cpu" else None
    three = step(3, slots[:3])
    np.testing.assert_allclose(three, four[:3], rtol=1e-4, atol=1e-4)
    if before is not None:
        np.testing.assert_array_equal(np.from_dlpack(engine.cache.pool.pool), before)
    assert max(engine.graphs._captured) == 4


def test_graphs_measure_leaves_the_cache(graph_model: Model, text_ids: list[int]) -> None:
    """What the command line prints at the end: two rates, and nothing that a later request could see."""
    engine = Engine(graph_model, num_blocks=32, max_num_seqs=4)
    assert engine.graphs is not None
    request = (text_ids[:60], SamplingParams(12))
    first = run(engine, [request])
    assert all(rate > 0 for rate in engine.graphs.measure(3, 70, repeats=2))
    assert run(engine, [request]) == first
    assert engine.stats().num_hit_tokens > 0  # the second run read the first's blocks


def test_what_cannot_be_captured_runs_without(model: Model, text_ids: list[int]) -> None:
    engine = Engine(model, num_blocks=8)
    assert (engine.graphs is None) == (model.backend.device == "cpu")
    with pytest.raises(DemoError, match="no CUDA graphs"):
        Backend().capture(lambda: np.zeros(1))
