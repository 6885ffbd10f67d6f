"""The attention implementation "onepass" in tiny models, against the models' own "eager" and
"sdpa".
"""

import inspect

import pytest
import torch
from torch import nn
from transformers import DynamicCache, LlamaModel, StaticCache

from onepass_trl.attention import transformers_backend as backend
from onepass_trl.attention.deferred_mask import onepass_mask
from onepass_trl.attention.reference import visibility_mask
from onepass_trl.attention.transformers_backend import use_onepass_attention

from ..models import MODELS, VOCAB_SIZE, WINDOW, make_model
from .cases import random_visible_begin, random_visible_end, tree_positions

WITHOUT_SDPA = ("gemma2", "gpt_oss")  # softcap, sinks
SEQ = 30
# Keyword of a cache, "past_key_values" before transformers 5.24.
[CACHE] = {"cache", "past_key_values"} & inspect.signature(LlamaModel.forward).parameters.keys()


def random_ids(batch: int = 2, seq: int = SEQ) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, VOCAB_SIZE, (batch, seq), generator=generator)


def causal(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    visible_end = torch.full(ids.shape, ids.shape[1], dtype=torch.int32)
    return {"visible_end": visible_end, "position_ids": torch.arange(ids.shape[1])[None]}


def logits_and_gradients(model, ids, **kwargs):
    logits = model(ids, **kwargs).logits
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad((logits * weight).sum(), parameters.values(), allow_unused=True)
    return logits, dict(zip(parameters, gradients, strict=True))


def assert_close(actual, expected):
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-4, atol=1e-5)
    for name, gradient in expected[1].items():
        if gradient is not None:
            error = (actual[1][name] - gradient).norm() / gradient.norm().clamp_min(1e-2)
            assert error < 1e-4, name


@pytest.mark.parametrize("name", MODELS)
def test_causal_row_equals_eager(name):
    model, ids = make_model(name), random_ids()
    expected = logits_and_gradients(model, ids)
    use_onepass_attention(model)
    assert_close(logits_and_gradients(model, ids, use_cache=False, **causal(ids)), expected)


@pytest.mark.parametrize("name", MODELS)
def test_every_path_of_a_tree_equals_its_own_pass(name):
    model, ids = make_model(name), random_ids(batch=1)
    ends = random_visible_end(SEQ, torch.Generator().manual_seed(3))
    visible_end = torch.tensor([ends], dtype=torch.int32)
    position_ids = tree_positions(visible_end).long()
    use_onepass_attention(model)
    tree = dict(position_ids=position_ids, visible_end=visible_end)
    logits = model(ids, use_cache=False, **tree).logits
    for token in range(0, SEQ, 3):
        path = [key for key in range(token + 1) if token < ends[key]]
        alone = model(ids[:, path]).logits
        torch.testing.assert_close(logits[:, token], alone[:, -1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", ["cpu", "flex"])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_blocks_equal_the_mask_of_the_rule(impl):
    model, ids = make_model("llama"), random_ids(batch=1)
    model.set_attn_implementation("sdpa")
    generator = torch.Generator().manual_seed(3)
    ends = random_visible_end(SEQ, generator)
    begins = torch.tensor([random_visible_begin(ends, generator)], dtype=torch.int32)
    visible_end = torch.tensor([ends], dtype=torch.int32)
    mask = visibility_mask(visible_end, visible_begin=begins)
    position_ids = tree_positions(visible_end).long()
    expected = model(ids, attention_mask=mask[None], position_ids=position_ids).logits
    use_onepass_attention(model)
    tree = dict(position_ids=position_ids, visible_end=visible_end, visible_begin=begins)
    with torch.no_grad():  # flex has no backward on a CPU
        actual = model(ids, use_cache=False, attention_impl=impl, **tree).logits
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_blocks_are_refused_in_pieces_of_rows():
    x = torch.zeros(1, 4, 2, 8)
    ends = torch.full((1, 2), 2, dtype=torch.int32)
    with pytest.raises(ValueError, match="visible_begin is of whole rows, and cp_size > 1"):
        backend.onepass_attention(
            nn.Identity(), x, x, x, None, visible_end=ends, visible_begin=ends, context_parallel=x
        )


@pytest.mark.parametrize("name", MODELS)
def test_without_visible_end_it_computes_what_the_model_computed(name):
    own = "eager" if name in WITHOUT_SDPA else "sdpa"
    model, ids = make_model(name), random_ids()
    model.set_attn_implementation(own)
    padding = torch.ones_like(ids)
    padding[0, :4] = 0
    packed = torch.cat([torch.arange(12), torch.arange(SEQ - 12)])[None]
    calls = [
        {},
        {"attention_mask": padding},
        {"position_ids": packed},
        {"use_cache": False},
        {"logits_to_keep": 1},
        {"logits_to_keep": 3},
        {"logits_to_keep": 3, "attention_mask": padding},
    ]
    generations = [{}, {"cache_implementation": "static", "disable_compile": True}]

    def results():
        seen = [model(ids, **call).logits[1] for call in calls]
        for options in generations:
            seen.append(
                model.generate(
                    ids, attention_mask=padding, max_new_tokens=8, do_sample=False, **options
                )
            )
        return seen

    expected = results()
    use_onepass_attention(model)
    for a, e in zip(results(), expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_gradient_checkpointing(name):
    model, ids = make_model(name), random_ids()
    use_onepass_attention(model)
    expected = logits_and_gradients(model, ids, **causal(ids))
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_close(logits_and_gradients(model, ids, use_cache=False, **causal(ids)), expected)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_compiles_without_graph_breaks(name):
    model, ids = make_model(name), random_ids()
    use_onepass_attention(model)
    expected = logits_and_gradients(model, ids, use_cache=False, **causal(ids))
    model.compile(fullgraph=True, backend="aot_eager")
    assert_close(logits_and_gradients(model, ids, use_cache=False, **causal(ids)), expected)


def test_positions_are_cast_once_and_follow_changes():
    ends = torch.full((2, 6), 6, dtype=torch.int32)
    position_ids = torch.arange(6)[None]
    first = backend._positions(nn.Linear(1, 1), position_ids, ends)
    assert backend._positions(nn.Linear(1, 1), position_ids, ends) is first
    position_ids += 1
    changed = backend._positions(nn.Linear(1, 1), position_ids, ends)
    assert changed.tolist() == [[1, 2, 3, 4, 5, 6]] * 2
    planes = position_ids.expand(3, 2, 6)
    assert torch.equal(backend._positions(nn.Linear(1, 1), planes, ends), changed)


class Layer(nn.Module):
    layer_idx = 3
    is_causal = True


def call(layer=None, *, keys=4, mask=None, **kwargs):
    q, kv = torch.zeros(1, 2, 4, 8), torch.zeros(1, 1, keys, 8)
    kwargs = {"visible_end": torch.full((1, 4), 4, dtype=torch.int32), **kwargs}
    return backend.onepass_attention(layer or Layer(), q, kv, kv, mask, **kwargs)


def deferred(**kwargs):
    return onepass_mask(batch_size=1, q_length=4, kv_length=4, **kwargs)


BAD_CALLS = {
    "cache": ({"keys": 6}, r"Layer \(layer 3\): 6 keys for 4 queries: .* no cache"),
    "dropout": ({"dropout": 0.1}, "dropout is 0.1, expected 0: set attention_dropout=0.0"),
    "causal": ({"is_causal": False}, "not causal"),
    "bias": ({"position_bias": torch.zeros(1)}, "position_bias changes the scores"),
    "mask": ({"mask": torch.ones(1, 1, 4, 4)}, r"a mask of shape \(1, 1, 4, 4\) and visible_end"),
    "custom mask": ({"mask": deferred(use_vmap=True)}, "adds its own rule"),
    "window": ({"mask": deferred(local_size=3)}, "its mask has a window of 3, .* told None"),
    "positions": ({"sliding_window": 3}, "pass position_ids"),
}


@pytest.mark.parametrize(("change", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_what_the_rule_does_not_cover_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        call(**change)


def test_sliding_layer_that_passes_no_window_is_refused():
    layer = Layer()
    layer.config = make_model("gemma3").config
    layer.layer_idx = 0
    with pytest.raises(ValueError, match="sliding_attention layer passes no sliding_window"):
        call(layer)


def test_cached_keys_with_visible_end_are_refused():
    model, ids = make_model("mistral", sliding_window=WINDOW * 4), random_ids()
    use_onepass_attention(model)
    cache = DynamicCache(config=model.config)
    model(ids[:, :10], **{CACHE: cache})
    with pytest.raises(ValueError, match="pass no cache"):
        model(ids[:, 10:14], **{CACHE: cache}, visible_end=torch.full((2, 4), 4).int())
    static = StaticCache(config=model.config, max_cache_len=SEQ)
    with pytest.raises(ValueError, match="pass no cache"):
        model(ids[:, :9], **{CACHE: static}, visible_end=torch.full((2, 9), 9).int())
