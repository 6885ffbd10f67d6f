"""Segments and seams of random trees against the dense mask, and what the layers make of them."""

import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from onepass_trl.attention.branching import Branching, is_mixer
from onepass_trl.attention.transformers_backend import use_onepass_attention, visible_end_required
from onepass_trl.visibility import dense_mask
from tests.attention.cases import random_visible_end
from tests.models import VOCAB_SIZE, make_model

HYBRIDS = ("qwen3_5", "kimi_linear", "nemotron_h", "lfm2")


@st.composite
def batches(draw):
    seq, batch = draw(st.integers(1, 40)), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rows = [random_visible_end(seq, generator) for _ in range(batch)]
    return torch.tensor(rows, dtype=torch.int32)


def paths(visible_end):
    """Return the tokens of each token's pass up to itself, counted over the batch."""
    return [
        np.flatnonzero(sees) + row * len(ends)
        for row, ends in enumerate(visible_end.numpy())
        for sees in dense_mask(ends)
    ]


@settings(deadline=None)
@given(batches())
def test_segments_are_the_paths(visible_end):
    branching = Branching(visible_end)
    before: dict[int, list[int]] = {}  # the path up to the end of each segment
    seen = []
    expected = paths(visible_end)
    by_group = branching.order.split(branching.sizes)
    for group, flat in zip(branching.groups, by_group, strict=True):
        for at, tokens in enumerate(flat.unflatten(0, (-1, group.length)).tolist()):
            assert tokens == list(range(group.begins[at], group.begins[at] + group.length))
            path = list(before[group.parents[at]]) if group.parents else []
            for token in tokens:
                path.append(token)
                assert path == expected[token].tolist()
            before[token] = path
            seen.append(token)
    # Whoever has children says so.
    handed_on = {parent for group in branching.groups for parent in group.parents}
    for group in branching.groups:
        assert group.has_children == any(
            begin + group.length - 1 in handed_on for begin in group.begins
        )
    assert torch.equal(branching.order[branching.place], torch.arange(visible_end.numel()))


@settings(deadline=None)
@given(batches(), st.integers(1, 5))
def test_seams_are_the_tokens_with_other_predecessors(visible_end, width):
    seams = Branching(visible_end).seams(width)
    seq = visible_end.shape[1]
    actual = dict(zip(seams.tokens.tolist(), seams.predecessors.tolist(), strict=True))
    for token, path in enumerate(paths(visible_end)):
        last = [-1] * width + path.tolist()
        in_row = [
            t if t // seq == token // seq else -1 for t in range(token - width + 1, token + 1)
        ]
        assert (token in actual) == (last[-width:] != in_row)
        if token in actual:
            assert actual[token] == last[-width:]


def test_a_row_without_branches_is_one_segment():
    branching = Branching(torch.full((1, 9), 9))
    assert [(group.begins, group.length) for group in branching.groups] == [((0,), 9)]
    assert branching.seams(4).tokens.numel() == 0


def test_equal_segments_run_as_one_batch():
    """Three branches of two tokens on a trunk of three."""
    (trunk, branches) = Branching(torch.tensor([[9, 9, 9, 5, 5, 7, 7, 9, 9]])).groups
    assert (trunk.begins, trunk.length, trunk.has_children) == ((0,), 3, True)
    assert branches.begins == (3, 5, 7)
    assert branches.parents == (2, 2, 2)
    assert not branches.has_children


def inputs(seq=20):
    ids = torch.randint(3, VOCAB_SIZE, (1, seq), generator=torch.Generator().manual_seed(0))
    ends = random_visible_end(seq, torch.Generator().manual_seed(3))
    positions = torch.arange(seq)[None]
    return ids, dict(position_ids=positions, visible_end=torch.tensor([ends], dtype=torch.int32))


@pytest.mark.parametrize("name", HYBRIDS)
def test_a_mask_of_padding_is_not_read(name):
    """As with attention; the trainer hands routers a mask that counts passes."""
    model = make_model(name)
    use_onepass_attention(model)
    ids, tree = inputs()
    expected = model(ids, use_cache=False, **tree).logits
    mask = torch.randint(0, 3, ids.shape)
    actual = model(ids, attention_mask=mask, use_cache=False, **tree).logits
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("name", HYBRIDS)
def test_a_cache_is_refused(name):
    model = make_model(name)
    use_onepass_attention(model)
    ids, tree = inputs()
    with pytest.raises(ValueError, match=r"\(layer 0\) got a cache: .*use_cache=False"):
        model(ids, use_cache=True, **tree)


@pytest.mark.parametrize("name", HYBRIDS)
def test_a_cache_is_seen_by_whatever_name_it_comes(name):
    model = make_model(name)
    use_onepass_attention(model)
    mixer = next(module for module in model.modules() if is_mixer(module))
    hidden_states = torch.zeros(1, 4, model.config.hidden_size)
    visible_end = torch.full((1, 4), 4, dtype=torch.int32)
    cache = DynamicCache(config=model.config)
    with pytest.raises(ValueError, match="got a cache"):
        mixer(hidden_states, cache, visible_end=visible_end)
    with pytest.raises(ValueError, match="got a cache"):
        mixer(hidden_states=hidden_states, states_of_another_name=cache, visible_end=visible_end)


@pytest.mark.parametrize("name", HYBRIDS)
def test_a_layer_that_gets_no_visible_end_is_an_error_in_training(name):
    model = make_model(name)
    use_onepass_attention(model)
    ids, _ = inputs()
    with visible_end_required(), pytest.raises(ValueError, match=r"\(layer 0\) got no visible_end"):
        model(ids, use_cache=False)


def test_states_branch_once_however_often_it_is_asked_for():
    model = make_model("qwen3_5")
    for _ in range(2):
        use_onepass_attention(model)
    layer = model.model.layers[0].linear_attn
    assert (len(layer._forward_pre_hooks), len(layer._forward_hooks)) == (2, 1)
    rule = sys.modules[type(layer).__module__].torch_chunk_gated_delta_rule
    assert not hasattr(rule.__wrapped__.__wrapped__, "branches")


@pytest.mark.parametrize("name", HYBRIDS)
def test_a_layer_that_computes_otherwise_is_an_error(name, monkeypatch):
    """As one whose forward is replaced by a kernel of the Hub."""
    model = make_model(name)
    use_onepass_attention(model)
    layer = next(module for module in model.modules() if is_mixer(module))
    monkeypatch.setattr(layer, "forward", lambda hidden_states, **_: hidden_states)
    ids, tree = inputs()
    with pytest.raises(ValueError, match="has not called causal_conv1d_fn"):
        model(ids, use_cache=False, **tree)


def test_a_model_that_is_switched_halfway_is_refused():
    """transformers can set the attention, but doesn't know of the other layers."""
    model = make_model("qwen3_5")
    model.set_attn_implementation("onepass")
    ids, tree = inputs()
    with pytest.raises(ValueError, match=r"the model has other layers, .*use_onepass_attention"):
        model(ids, use_cache=False, **tree)


def test_a_class_of_the_same_name_is_no_mixer():
    kind = type("Lfm2ShortConv", (torch.nn.Module,), {})
    assert not is_mixer(kind())


def test_what_is_no_tree_is_an_error():
    with pytest.raises(ValueError, match="visible_end"):
        Branching(torch.tensor([[2, 4, 4, 4]]))


def test_rows_of_packed_sequences_are_refused():
    model = make_model("qwen3_5")
    use_onepass_attention(model)
    ids, tree = inputs()
    with pytest.raises(ValueError, match="got cu_seq_lens_q and visible_end"):
        model(ids, use_cache=False, cu_seq_lens_q=torch.tensor([0, 20]), **tree)


def test_a_visible_end_of_another_shape_is_refused():
    model = make_model("lfm2")
    use_onepass_attention(model)
    ids, tree = inputs()
    with pytest.raises(ValueError, match=r"visible_end has shape \(1, 20\), expected .* \(2, 20\)"):
        model(ids.expand(2, -1), use_cache=False, **tree)


@pytest.mark.parametrize("name", ["qwen3_5", "gemma2"])  # branches; a window
def test_training_may_follow_inference_on_the_same_tensors(name):
    model = make_model(name)
    use_onepass_attention(model)
    ids, tree = inputs()
    with torch.inference_mode():
        expected = model(ids, use_cache=False, **tree).logits.clone()
    logits = model(ids, use_cache=False, **tree).logits
    logits.sum().backward()
    assert torch.equal(logits, expected)


def test_models_run_in_several_threads():
    ids, tree = inputs()

    def run(name):
        model = make_model(name)
        use_onepass_attention(model)
        return [model(ids, use_cache=False, **tree).logits for _ in range(10)]

    with ThreadPoolExecutor(2) as threads:
        for results in threads.map(run, ("qwen3_5", "lfm2")):
            assert all(torch.equal(result, results[0]) for result in results)


def test_the_half_precision_of_a_model_is_kept():
    model = make_model("qwen3_5").bfloat16()
    use_onepass_attention(model)
    ids, tree = inputs()
    logits = model(ids, use_cache=False, **tree).logits
    assert logits.dtype == torch.bfloat16
    assert logits.isfinite().all()
