"""attn_implementation="quire": models of transformers with random weights give eager attention's logits and tokens.

SPDX-License-Identifier: Apache-2.0
"""

import inspect
import logging

import frameworks
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.0")

from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import quire
import quire.transformers

SIZES = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": None, "initializer_range": 0.2,
}  # fmt: skip
MODELS = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "mistral": lambda: transformers.MistralConfig(**SIZES, sliding_window=7),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES),
    "gemma2": lambda: transformers.Gemma2Config(
        **SIZES, sliding_window=7, attn_logit_softcapping=5.0, query_pre_attn_scalar=16
    ),
    "gpt_oss": lambda: transformers.GptOssConfig(
        **SIZES,
        sliding_window=7,
        num_local_experts=4,
        num_experts_per_tok=2,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    ),
}


@pytest.fixture(params=["cpu", "cuda:0"])
def device(request):
    framework = frameworks.make("torch", request.param)
    if isinstance(framework, str):
        pytest.skip(f"torch on {request.param}: {framework}")
    return request.param


@pytest.fixture(autouse=True)
def quiet():
    logging.getLogger("transformers").setLevel(logging.ERROR)


def model_of(name, device, dtype=torch.float32):
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(
        MODELS[name](), attn_implementation="eager", dtype=dtype
    )
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("sinks"):
                parameter.normal_()
    return model.to(device).eval()


def ids_of(device):
    torch.manual_seed(2)
    ids = torch.randint(3, 97, (3, 21))
    left, right = torch.ones_like(ids), torch.ones_like(ids)
    left[0, :6] = left[2, :1] = 0
    right[1, 15:] = 0
    return ids.to(device), {
        "none": None,
        "ones": torch.ones_like(ids).to(device),
        "left": left.to(device),
        "right": right.to(device),
    }


@pytest.mark.parametrize("name", MODELS)
def test_logits(device, name):
    model = model_of(name, device)
    ids, masks = ids_of(device)
    with torch.inference_mode():
        for mask in masks.values():
            model.set_attn_implementation("eager")
            want = model(ids, attention_mask=mask).logits
            model.set_attn_implementation("quire")
            got = model(ids, attention_mask=mask).logits
            seen = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
            torch.testing.assert_close(got[seen], want[seen], rtol=2e-4, atol=2e-4)
    # the attention matters: without it the logits are others
    assert want.std() > 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_of_16_bits(device, dtype):
    """The error is that of the dtype: not more than eager attention's own, against float32, with room."""
    exact, model = model_of("llama", device), model_of("llama", device, dtype)
    ids, _ = ids_of(device)
    with torch.inference_mode():
        want = exact(ids).logits
        model.set_attn_implementation("eager")
        eager = (model(ids).logits.float() - want).abs().mean()
        model.set_attn_implementation("quire")
        ours = (model(ids).logits.float() - want).abs().mean()
    assert ours < 1.25 * eager


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens(device, name):
    """Past the window, from prompts of unequal lengths, through transformers' caches."""
    model = model_of(name, device)
    ids, masks = ids_of(device)
    arguments = {"max_new_tokens": 24, "do_sample": False}
    for mask in ("ones", "left"):
        model.set_attn_implementation("eager")
        want = model.generate(ids, attention_mask=masks[mask], **arguments)
        model.set_attn_implementation("quire")
        assert torch.equal(model.generate(ids, attention_mask=masks[mask], **arguments), want)
    static = model.generate(
        ids, attention_mask=masks["left"], cache_implementation="static", disable_compile=True, **arguments
    )
    assert torch.equal(static, want)


def test_kernel_sees_the_cache_without_a_copy(monkeypatch):
    """Keys go in as a view, and nothing is masked by bits where a window says it."""
    seen, decoded = [], []
    attend, decode = quire.torch.paged_attention, quire.transformers._core.decode_by_heads

    def record(q, k_cache, v_cache, *args, **options):
        seen.append((k_cache, options))
        return attend(q, k_cache, v_cache, *args, **options)

    def record_decode(out, query, key, value, *args):
        decoded.append((key, args))
        return decode(out, query, key, value, *args)

    monkeypatch.setattr(quire.torch, "paged_attention", record)
    monkeypatch.setattr(quire.transformers._core, "decode_by_heads", record_decode)
    model = model_of("mistral", "cpu")
    model.set_attn_implementation("quire")
    ids, masks = ids_of("cpu")
    with torch.inference_mode():
        out = model(ids, attention_mask=masks["ones"], use_cache=True)
        assert all(options["mask"] is None and options["window"] == 6 for _, options in seen)
        seen.clear()
        model(ids, attention_mask=masks["left"])
        assert all(options["mask"] is not None for _, options in seen)
        seen.clear()
        forward = inspect.signature(model.forward).parameters
        model(ids[:, :1], **{"cache" if "cache" in forward else "past_key_values": out.past_key_values})
    assert not seen
    assert len(decoded) == 3
    for layer, (key, (*_, mask, mask_start)) in zip(out.past_key_values.layers, decoded):
        assert mask is None
        assert mask_start is None
        assert key.shape[0] == 3
        # A window's layer keeps a part of what the kernel saw.
        assert key.untyped_storage().data_ptr() == layer.keys.untyped_storage().data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decode_is_the_paged_attention_of_views(device, dtype):
    """One query of each sequence without PyTorch's views of it: the same bits, of every layout that keys may have."""
    module = torch.nn.Identity()
    torch.manual_seed(3)
    q = torch.randn(3, 1, 4, 16, device=device).to(dtype).transpose(1, 2)
    long = torch.randn(2, 3, 40, 2, 16, device=device).to(dtype).transpose(2, 3)
    for k, v in (long, long[..., 4:25, :], long.contiguous()):
        length = k.shape[2]
        tables, lens, _ = quire.transformers._make_indices(3, 1, length, q.device)
        seen = torch.rand(3, 1, 1, length, device=device) < 0.7
        bits = dict(zip(("mask", "mask_start"), quire.transformers._make_mask(seen, length, None)))
        for mask, options, same in (
            (None, {}, {}),
            (None, {"sliding_window": 7, "softcap": 5.0}, {"window": 6, "softcap": 5.0}),
            (seen, {"scaling": 0.3}, {"scale": 0.3, "causal": False, **bits}),
        ):
            got, _ = quire.transformers.attention_forward(module, q, k, v, mask, **options)
            views = q[:, :, 0], k.transpose(1, 2), v.transpose(1, 2)
            want = quire.torch.paged_attention(*views, tables, lens, **same)
            assert got.shape == (3, 1, 4, 16)
            assert torch.equal(got[:, 0], want)


def test_shapes_of_decode():
    out, keys = torch.empty(3, 1, 4, 16), torch.empty(3, 2, 5, 16)
    indices = quire.transformers._make_indices(3, 1, 5, torch.device("cpu"))[:2]
    decode = quire.transformers._core.decode_by_heads
    options = None, True, None, None, None, None, None
    for q, k, message in (
        (out[:, 0], keys, r"q: expected float32 \[\*, \*, 1, \*\], got float32 \[3, 4, 16\]"),
        (out.transpose(1, 2), keys[0], "k_cache: expected rank 4"),
    ):
        with pytest.raises(ValueError, match=rf"\[paged_attention\] {message}"):
            decode(out, q, k, keys, *indices, *options)


def test_compiled_model():
    model = model_of("llama", "cpu")
    ids, _ = ids_of("cpu")
    with torch.no_grad():
        want = model(ids).logits
        model.set_attn_implementation("quire")
        torch._dynamo.reset()
        compiled = torch.compile(
            lambda ids: model(ids, use_cache=False).logits, fullgraph=True, backend="aot_eager"
        )
        torch.testing.assert_close(compiled(ids), want, rtol=2e-4, atol=2e-4)


def test_value_of_another_head_dim():
    module = torch.nn.Identity()
    q, k, v = torch.randn(2, 4, 5, 16), torch.randn(2, 2, 5, 16), torch.randn(2, 2, 5, 8)
    got, weights = quire.transformers.attention_forward(module, q, k, v, None)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert weights is None
    torch.testing.assert_close(got, want.transpose(1, 2))
    got, _ = quire.transformers.attention_forward(module, q, k, v, None, is_causal=False, sliding_window=2)
    near = (torch.arange(5)[:, None] - torch.arange(5)).abs() < 2
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=near, enable_gqa=True)
    torch.testing.assert_close(got, want.transpose(1, 2))


def test_refusals():
    module, q = torch.nn.Identity(), torch.randn(1, 2, 3, 16)
    with pytest.raises(quire.UnsupportedError, match="dropout"):
        quire.transformers.attention_forward(module, q, q, q, None, dropout=0.1)
    with pytest.raises(quire.UnsupportedError, match="position_bias"):
        quire.transformers.attention_forward(module, q, q, q, None, position_bias=q)
    with pytest.raises(ValueError, match="attention_mask: expected bool"):
        quire.transformers.attention_forward(module, q, q, q, torch.zeros(1, 1, 3, 3))


def test_layers_share_their_index_tensors(device):
    """Made once for the layers of a step, again for another length or batch, and in a trace always anew."""
    query = torch.zeros(1, device=device)

    def indices(*sizes, of=query):
        shared, stream = quire.transformers._sharing(of)
        make = quire.transformers._known_indices if shared else quire.transformers._make_indices
        return make(*sizes, of.device, stream)

    first = indices(3, 1, 20)
    assert all(a is b for a, b in zip(first, indices(3, 1, 20)))
    assert first[0].tolist() == [[0], [1], [2]]
    assert first[1].tolist() == [20, 20, 20]
    assert first[2] is None
    longer = indices(3, 4, 21)
    assert longer[1].tolist() == [21, 21, 21]
    assert longer[2].tolist() == [0, 4, 8, 12]
    if query.is_cuda:
        with torch.cuda.stream(torch.cuda.Stream()):
            assert indices(3, 1, 20)[0] is not first[0]
    with FakeTensorMode() as mode:
        fake = indices(3, 1, 33, of=mode.from_tensor(query))
        assert isinstance(fake[1], FakeTensor)
    assert indices(3, 1, 33)[1].tolist() == [33, 33, 33]


def test_layers_share_the_bits_of_their_mask(device, monkeypatch):
    """A step's mask is packed once; one that was written since, another, or one without a version is packed again."""
    packed = []
    pack = quire.transformers._pack
    monkeypatch.setattr(quire.transformers, "_pack", lambda mask: packed.append(1) or pack(mask))
    module = torch.nn.Identity()
    module.layer_idx = 1
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 3, 16, device=device) for heads in (4, 2, 2))

    def check(mask, calls):
        packed.clear()
        for _ in range(2):
            got, _ = quire.transformers.attention_forward(module, q, k, v, mask)
        want = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        torch.testing.assert_close(got, want.transpose(1, 2), rtol=1e-4, atol=1e-4)
        assert len(packed) == calls

    mask = torch.ones(2, 1, 3, 3, dtype=torch.bool, device=device).tril()
    check(mask, 1)
    check(mask, 0)
    mask[0, 0, 2, 0] = False
    check(mask, 1)
    check(mask.clone(), 1)
    with torch.inference_mode():
        check(mask.clone(), 2)
    check(mask, 1)
    mask.data.copy_(~mask | torch.eye(3, dtype=torch.bool, device=device))  # which no version tells
    module.layer_idx = 0  # but a step begins
    check(mask, 2)
