"""What models whose layers carry state make of trees, and which calls they refuse."""

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import DynamicCache

from onepass_trl.attention.branching import delta_rule
from onepass_trl.attention.branching.layers import REPLACEMENTS, is_mixer
from onepass_trl.attention.layer_inputs import visible_end_required
from onepass_trl.attention.transformers_backend import use_onepass_attention
from tests.attention.branching.recurrences import random_tree
from tests.attention.branching.test_packages import as_kernels_wraps, original
from tests.attention.cases import random_visible_end
from tests.models import MODELS, VOCAB_SIZE, make_model

HYBRIDS = [name for name in ("qwen3_5", "kimi_linear", "nemotron_h", "lfm2") if name in MODELS]


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


def test_blocks_in_both_directions_are_refused():
    model = make_model(HYBRIDS[0])
    use_onepass_attention(model)
    ids, tree = inputs()
    begins = torch.arange(20, dtype=torch.int32)[None]
    with pytest.raises(ValueError, match=r"\(layer 0\) got visible_begin, with which a block is"):
        model(ids, use_cache=False, visible_begin=begins, **tree)


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


def test_rows_of_packed_sequences_are_refused():
    model = make_model("qwen3_5")
    use_onepass_attention(model)
    ids, tree = inputs()
    with pytest.raises(ValueError, match="got cu_seq_lens_q and visible_end"):
        model(ids, use_cache=False, cu_seq_lens_q=torch.tensor([0, 20]), **tree)


def test_a_visible_end_of_another_shape_is_refused():
    model = make_model("bamba")
    use_onepass_attention(model)
    ids, tree = inputs()
    with pytest.raises(ValueError, match=r"visible_end has shape \(1, 20\), expected .* \(2, 20\)"):
        model(ids.expand(2, -1), use_cache=False, **tree)


@pytest.mark.parametrize("name", [name for name in HYBRIDS if name in ("qwen3_5", "kimi_linear")])
def test_functions_in_pytorch_run_along_chunks(name, monkeypatch):
    """Not once for each group of segments, as functions do of which nothing is known."""
    rules = []
    monkeypatch.setattr(delta_rule, "along_tree", None)
    along_chunks = delta_rule.along_chunks
    monkeypatch.setattr(
        delta_rule,
        "along_chunks",
        lambda *args, **kwargs: rules.append(args[2]) or along_chunks(*args, **kwargs),
    )
    model = make_model(name)
    use_onepass_attention(model)
    ids, tree = inputs()
    model(ids, use_cache=False, **tree)
    assert rules


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


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # of torch.compile itself
@pytest.mark.parametrize("name", [name for name in HYBRIDS if name != "kimi_linear"])
def test_layers_do_not_compile_for_each_tree(name):
    """With breaks in the graph, where a tree is cut and followed."""
    model = make_model(name)
    use_onepass_attention(model)
    layer = next(module for module in model.modules() if is_mixer(module))
    rows = [torch.randn(1, seq, model.config.hidden_size) for seq in (20, 23, 27, 30)]
    ends = [random_tree(row.shape[1], seed=row.shape[1]) for row in rows]
    expected = [layer(row, visible_end=end) for row, end in zip(rows, ends, strict=True)]
    torch.compiler.reset()
    layer.compile(backend="eager", dynamic=True)
    limits = dict(recompile_limit=2, fail_on_recompile_limit_hit=True)
    with torch._dynamo.config.patch(**limits):
        for row, end, out in zip(rows, ends, expected, strict=True):
            torch.testing.assert_close(layer(row, visible_end=end), out, rtol=1e-5, atol=1e-6)


def test_models_run_in_several_threads():
    ids, tree = inputs()

    def run(name):
        model = make_model(name)
        use_onepass_attention(model)
        return [model(ids, use_cache=False, **tree).logits for _ in range(10)]

    with ThreadPoolExecutor(2) as threads:
        for results in threads.map(run, ("qwen3_5", "bamba")):
            assert all(torch.equal(result, results[0]) for result in results)


def test_the_half_precision_of_a_model_is_kept():
    model = make_model("qwen3_5").bfloat16()
    use_onepass_attention(model)
    ids, tree = inputs()
    logits = model(ids, use_cache=False, **tree).logits
    assert logits.dtype == torch.bfloat16
    assert logits.isfinite().all()


@pytest.mark.parametrize("name", HYBRIDS)
def test_functions_without_a_name_branch_too(name, monkeypatch):
    model = make_model(name)
    mixer = next(module for module in model.modules() if is_mixer(module))
    modeling = sys.modules[type(mixer).__module__]
    for function in REPLACEMENTS.keys() & vars(modeling).keys():
        wrapped = as_kernels_wraps(original(getattr(modeling, function)))
        monkeypatch.setattr(modeling, function, wrapped)
    ids, tree = inputs()
    use_onepass_attention(model)
    expected = model(ids, use_cache=False, **tree).logits
    monkeypatch.undo()
    use_onepass_attention(model)
    assert torch.equal(model(ids, use_cache=False, **tree).logits, expected)
