"""The delta rules along trees in PyTorch: against the recurrence, and what they cost."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from onepass_trl.attention.branching import chunked_delta_rule
from onepass_trl.attention.branching.chunks import chunks_of
from onepass_trl.attention.branching.packages import implementation
from onepass_trl.attention.branching.recurrences import along_tree
from onepass_trl.attention.branching.segments import segments_of
from tests.attention.branching import recurrences
from tests.attention.branching.costs import bytes_of_states, kernels, long_chat
from tests.attention.branching.recurrences import assert_equals_recurrence, random_tree
from tests.attention.branching.test_packages import original
from tests.attention.branching.trees import trees

HEADS, D_K, D_V = 2, 8, 6
CHANNELWISE = [False, True]


def random_inputs(visible_end, *, channelwise, heads=HEADS, strength=1.0, seed=0):
    """Return queries, keys, values, decays and rates."""
    generator = torch.Generator().manual_seed(seed)
    batch, seq = visible_end.shape

    def normal(*shape):
        return torch.randn(batch, seq, *shape, generator=generator)

    decay = -strength * normal(heads, *[D_K] * channelwise).abs()
    return [
        normal(HEADS, D_K),
        normal(HEADS, D_K),
        normal(heads, D_V),
        decay,
        normal(heads).sigmoid(),
    ]


def transformers_rule(channelwise):
    """Return the function in PyTorch of transformers; skips the test if it has none."""
    model = "kimi_linear" if channelwise else "qwen3_5"
    modeling = pytest.importorskip(f"transformers.models.{model}.modeling_{model}")
    name = "chunk_kimi_delta_attention" if channelwise else "torch_chunk_gated_delta_rule"
    return implementation(original(getattr(modeling, name)))


def along_chunks(visible_end, *inputs):
    options = dict(use_qk_l2norm_in_kernel=True)
    return chunked_delta_rule.along_chunks(visible_end, inputs, **options)


@pytest.mark.parametrize("channelwise", CHANNELWISE)
@settings(max_examples=25)
@given(
    visible_end=trees(150),
    size=st.sampled_from([1, 4, 64]),
    shared_by=st.integers(1, 2),
    strength=st.sampled_from([0.02, 0.3, 2.0]),
    seed=st.integers(0, 2**31),
)
def test_the_recurrence(channelwise, visible_end, size, shared_by, strength, seed):
    heads = HEADS if channelwise else HEADS * shared_by
    inputs = random_inputs(
        visible_end, channelwise=channelwise, heads=heads, strength=strength, seed=seed
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked_delta_rule, "CHUNK_SIZE", size)
        assert_equals_recurrence(
            visible_end,
            lambda *x: along_chunks(visible_end, *x),
            recurrences.delta_rule,
            inputs,
        )


@pytest.mark.parametrize("channelwise", CHANNELWISE)
def test_decays_that_float32_cannot_hold(channelwise):
    """Each token keeps about a share of exp(-100) of the state; the inverse would be infinite."""
    visible_end = random_tree(100)
    inputs = random_inputs(visible_end, channelwise=channelwise, strength=100.0)
    actual = along_chunks(visible_end, *(x.requires_grad_() for x in inputs))
    flat = [x.detach().double().flatten(0, 1) for x in inputs]
    parents = segments_of(visible_end).token_parents.tolist()
    expected = recurrences.delta_rule(*flat, parents).float().view_as(actual)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)
    assert all(x.isfinite().all() for x in torch.autograd.grad(actual.sum(), inputs))


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("channelwise", CHANNELWISE)
def test_a_row_without_branches_is_what_transformers_computes(channelwise, normalized):
    rule = transformers_rule(channelwise)
    visible_end = torch.full((2, 100), 100, dtype=torch.int32)
    q, k, v, g, beta = inputs = random_inputs(visible_end, channelwise=channelwise)
    options = dict(use_qk_l2norm_in_kernel=normalized)
    expected, _ = rule(q, k / 3, v, g=g, beta=beta, **options)
    inputs[1] = k / 3
    actual = chunked_delta_rule.along_chunks(visible_end, inputs, **options)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("channelwise", CHANNELWISE)
def test_half_precision_is_computed_in_float32(channelwise):
    """With autocast too, which would round what is summed in the states."""
    visible_end = random_tree(100)
    inputs = [x.bfloat16() for x in random_inputs(visible_end, channelwise=channelwise)]
    expected = along_chunks(visible_end, *(x.float() for x in inputs)).bfloat16()
    assert torch.equal(along_chunks(visible_end, *inputs), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(along_chunks(visible_end, *inputs), expected)


@pytest.mark.parametrize("channelwise", CHANNELWISE)
def test_checkpoints_and_offloaded_tensors_change_nothing(channelwise):
    visible_end = random_tree(100)
    inputs = [x.requires_grad_() for x in random_inputs(visible_end, channelwise=channelwise)]

    def gradients(call):
        return torch.autograd.grad(call(visible_end, *inputs).square().sum(), inputs)

    expected = gradients(along_chunks)

    def checkpointed(*arguments):
        return checkpoint(along_chunks, *arguments, use_reentrant=False)

    assert all(map(torch.equal, gradients(checkpointed), expected))
    with saved_tensors_hooks(lambda x: (x.clone(), x.device), lambda packed: packed[0]):
        assert all(map(torch.equal, gradients(along_chunks), expected))


@pytest.mark.parametrize("channelwise", CHANNELWISE)
def test_what_is_not_finite_stays_in_its_branch(channelwise):
    """A trunk of 9 tokens with a branch of 4 that nothing else sees."""
    visible_end = torch.tensor([[16] * 6 + [10] * 4 + [16] * 6], dtype=torch.int32)
    inputs = random_inputs(visible_end, channelwise=channelwise)
    expected = along_chunks(visible_end, *inputs)
    inputs[2][:, 7] = torch.nan
    inputs = [x.requires_grad_() for x in inputs]
    actual = along_chunks(visible_end, *inputs)
    assert actual[:, 6:10].isnan().any()
    others = [0, 1, 2, 3, 4, 5, *range(10, 16)]
    assert torch.equal(actual[:, others], expected[:, others])
    for gradient in torch.autograd.grad(actual[:, 10:].sum(), inputs):
        assert gradient[:, 10:].isfinite().all()


@pytest.mark.parametrize("channelwise", CHANNELWISE)
def test_a_long_chat_takes_an_eighth_of_the_calls(channelwise):
    """Against a call of transformers' function per group of segments: twenty turns."""
    rule = transformers_rule(channelwise)
    visible_end = long_chat()
    inputs = [x.requires_grad_() for x in random_inputs(visible_end, channelwise=channelwise)]

    def run(pieces, initial, wants_state):
        q, k, v, g, beta = pieces
        state = dict(initial_state=initial, output_final_state=wants_state)
        return rule(q, k, v, g=g, beta=beta, use_qk_l2norm_in_kernel=True, **state)

    def by_groups(*inputs):
        return along_tree(run, visible_end, inputs)

    few = kernels(lambda *inputs: along_chunks(visible_end, *inputs), inputs)
    assert few <= kernels(by_groups, inputs) / 8


@pytest.mark.parametrize("channelwise", CHANNELWISE)
def test_a_state_per_chunk_is_kept(channelwise):
    """As docs/scaling.md counts them."""
    visible_end = long_chat()
    inputs = [x.requires_grad_() for x in random_inputs(visible_end, channelwise=channelwise)]
    of_states = bytes_of_states(lambda *x: along_chunks(visible_end, *x), inputs, HEADS, D_K, D_V)
    num_chunks = len(chunks_of(visible_end, chunked_delta_rule.CHUNK_SIZE).tokens)
    assert of_states == 4 * num_chunks * HEADS * D_K * D_V
