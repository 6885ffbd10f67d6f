"""What models whose layers carry state make of trees, and which calls they refuse."""

import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers import DynamicCache

from onepass_trl.attention.branching import convolutions, delta_rule, mamba2
from onepass_trl.attention.branching.layers import REPLACEMENTS, is_mixer
from onepass_trl.attention.layer_inputs import visible_end_required
from onepass_trl.attention.transformers_backend import use_onepass_attention
from tests.attention.branching.recurrences import random_tree
from tests.attention.branching.test_packages import as_kernels_wraps, original
from tests.attention.cases import random_visible_end, tree_positions
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


# Who computes the layers of a model where no package does.
PATHS = {
    (delta_rule, "along_chunks"): (
        "qwen3_5",
        "qwen3_5_moe",
        "qwen3_next",
        "olmo_hybrid",
        "kimi_linear",
        "bailing_hybrid",
    ),
    (mamba2, "_along_chunks"): ("nemotron_h", "granitemoehybrid", "falcon_h1", "bamba"),
    (convolutions, "_convolve_seams"): ("lfm2", "lfm2_moe", "lfm3"),
}
PATH_OF = {name: path for path, names in PATHS.items() for name in names if name in MODELS}


@pytest.mark.parametrize("name", PATH_OF)
def test_functions_in_pytorch_run_along_chunks(name, monkeypatch):
    """Not once for each group of segments, as functions do of which nothing is known. That they
    equal N-pass is tested with all models, in tests/training/test_exactness.py."""
    module, function = PATH_OF[name]
    called, original = [], getattr(module, function)
    monkeypatch.setattr(delta_rule, "along_tree", None)
    monkeypatch.setattr(
        module,
        function,
        lambda *args, **kwargs: called.append(function) or original(*args, **kwargs),
    )
    model = make_model(name)
    use_onepass_attention(model)
    ids, tree = inputs()
    model(ids, use_cache=False, **tree)
    assert len(called) == sum(map(is_mixer, model.modules()))


def packed_rows():
    """Return inputs of two rows, the first with two trees, and the places of all trees."""
    trees = [(0, 0, 12), (0, 12, 30), (1, 0, 30)]
    ends = torch.empty(2, 30, dtype=torch.int32)
    positions = torch.empty(2, 30, dtype=torch.int64)
    for row, begin, end in trees:
        tree = random_tree(end - begin, seed=end)
        ends[row, begin:end] = tree[0] + begin
        positions[row, begin:end] = tree_positions(tree)[0]
    ids = torch.randint(3, VOCAB_SIZE, ends.shape, generator=torch.Generator().manual_seed(0))
    return ids, dict(position_ids=positions, visible_end=ends), trees


@pytest.mark.parametrize("name", HYBRIDS)
def test_trees_of_a_row_and_rows_of_a_batch_are_each_as_alone(name):
    model = make_model(name)
    use_onepass_attention(model)
    ids, tree, trees = packed_rows()
    logits = model(ids, use_cache=False, **tree).logits
    for row, begin, end in trees:
        own = (slice(row, row + 1), slice(begin, end))
        alone = model(
            ids[own],
            position_ids=tree["position_ids"][own],
            visible_end=tree["visible_end"][own] - begin,
            use_cache=False,
        ).logits
        torch.testing.assert_close(logits[own], alone, rtol=1e-4, atol=1e-5)


def gradients(model, ids, tree):
    model.zero_grad()
    logits = model(ids, use_cache=False, **tree).logits
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    (logits * weight).sum().backward()
    return {name: x.grad for name, x in model.named_parameters() if x.grad is not None}


def checkpointed(use_reentrant):
    def prepare(model):
        model.train()
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        return nullcontext()

    return prepare


def compiled(model):
    model.compile(backend="aot_eager")
    return nullcontext()


WAYS = {
    "checkpointed": checkpointed(use_reentrant=False),
    "checkpointed by reentering": checkpointed(use_reentrant=True),
    "offloaded": lambda _: saved_tensors_hooks(torch.clone, torch.clone),
    "compiled": compiled,
}


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # of torch.compile itself
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", HYBRIDS)
def test_gradients_are_the_same_however_activations_are_kept(name, way):
    model = make_model(name)
    use_onepass_attention(model)
    ids, tree, _ = packed_rows()
    expected = gradients(model, ids, tree)
    with WAYS[way](model):
        actual = gradients(model, ids, tree)
    assert actual.keys() == expected.keys()
    for parameter, gradient in expected.items():
        assert (actual[parameter] - gradient).norm() <= 1e-5 * gradient.norm(), parameter


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
