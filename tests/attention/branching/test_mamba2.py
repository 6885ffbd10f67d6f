"""The scan of Mamba 2 along trees: against the recurrence, with all its options."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from onepass_trl.attention.branching import mamba2
from onepass_trl.attention.branching.chunks import chunks_of
from onepass_trl.attention.branching.recurrences import along_tree as by_groups
from tests.attention.branching import recurrences
from tests.attention.branching.costs import bytes_of_states, kernels, long_chat
from tests.attention.branching.recurrences import assert_equals_recurrence, random_tree
from tests.attention.branching.test_packages import original
from tests.attention.branching.trees import trees

modeling = pytest.importorskip("transformers.models.nemotron_h.modeling_nemotron_h")
if not hasattr(modeling, "mamba2_chunk_scan"):
    pytest.skip("transformers is too old", allow_module_level=True)

HEADS, GROUPS, HEAD_DIM, STATE_SIZE = 4, 2, 5, 6


def random_inputs(visible_end, *, seed=0, gated=False):
    """Return sequences (x, dt, B, C and z) and parameters (A, D and dt_bias)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    rows = visible_end.shape
    groups = normal(*rows, GROUPS, STATE_SIZE), normal(*rows, GROUPS, STATE_SIZE)
    sequences = [normal(*rows, HEADS, HEAD_DIM), normal(*rows, HEADS), *groups]
    sequences += [normal(*rows, HEADS, HEAD_DIM)] * gated
    return sequences, [-normal(HEADS).exp(), normal(HEADS), normal(HEADS)]


def along_tree(scan, visible_end, x, dt, B, C, *others, chunk_size=16, **options):
    *gate, A, D, dt_bias = others
    options |= dict(D=D, dt_bias=dt_bias, z=gate[0] if gate else None, visible_end=visible_end)
    options = dict(dt_softplus=True) | options
    return mamba2.chunk_scan(scan, "scan")(x, dt, A, B, C, chunk_size, **options)


def plain_scan(x, dt, A, B, C, chunk_size, *, D, z, initial_states, **options):
    """Return what the scan of transformers gives, which leaves out z, as a package's would."""
    scan = original(modeling.mamba2_chunk_scan)
    out = scan(x, dt, A, B, C, chunk_size, D=D, initial_states=initial_states, **options)
    return out if z is None else out * torch.nn.functional.silu(z)


@settings(max_examples=30)
@given(
    visible_end=trees(120),
    chunk_size=st.sampled_from([1, 4, 16, 128]),
    softplus=st.booleans(),
    limit=st.sampled_from([(0.0, float("inf")), (0.1, 0.7), (0.0, 0.5)]),
    gated=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_the_recurrence(visible_end, chunk_size, softplus, limit, gated, seed):
    """A least step above zero too, which padding must not take."""
    sequences, parameters = random_inputs(visible_end, seed=seed, gated=gated)
    if not softplus:
        sequences[1], parameters[2] = sequences[1].abs() / 2, parameters[2].abs() / 2
    options = dict(dt_softplus=softplus, dt_limit=limit)
    scan = plain_scan if gated else original(modeling.mamba2_chunk_scan)
    assert_equals_recurrence(
        visible_end,
        lambda *x: along_tree(scan, visible_end, *x, chunk_size=chunk_size, **options),
        lambda *x: recurrences.mamba2(*x, softplus=softplus, limit=limit),
        sequences,
        parameters,
    )


def test_a_package_gets_chunks_of_the_size_of_the_model_and_finished_steps():
    """Its kernels are made for that size; functions in PyTorch get smaller chunks."""
    calls = []

    def scan(x, dt, A, B, C, chunk_size, **options):
        calls.append((x.shape[1], chunk_size, dt.dtype, sorted(options)))
        return plain_scan(x, dt, A, B, C, chunk_size, **options)

    visible_end = torch.full((1, 300), 300, dtype=torch.int32)
    sequences, parameters = random_inputs(visible_end)
    out = along_tree(scan, visible_end, *sequences, *parameters, chunk_size=128, seq_idx=None)
    assert calls == [(128, 128, torch.float32, ["D", "initial_states", "seq_idx", "z"])]
    in_pytorch = original(modeling.mamba2_chunk_scan)
    other = along_tree(in_pytorch, visible_end, *sequences, *parameters, chunk_size=128)
    torch.testing.assert_close(out, other, rtol=1e-5, atol=1e-5)


def test_checkpoints_and_offloaded_tensors_change_nothing():
    visible_end = random_tree(100)
    sequences, parameters = random_inputs(visible_end)
    inputs = [x.requires_grad_() for x in (*sequences, *parameters)]
    scan = original(modeling.mamba2_chunk_scan)

    def gradients(call):
        return torch.autograd.grad(call(scan, visible_end, *inputs).square().sum(), inputs)

    expected = gradients(along_tree)

    def checkpointed(*arguments):
        return checkpoint(along_tree, *arguments, use_reentrant=False)

    assert all(map(torch.equal, gradients(checkpointed), expected))
    with saved_tensors_hooks(lambda x: (x.clone(), x.device), lambda packed: packed[0]):
        assert all(map(torch.equal, gradients(along_tree), expected))


def test_states_are_kept_in_float32():
    """Initial states of a model in bfloat16, with autocast too."""
    given = []

    def scan(*arguments, initial_states, **options):
        given.append(initial_states)
        return plain_scan(*arguments, initial_states=initial_states, **options)

    visible_end = random_tree(100)
    sequences, parameters = random_inputs(visible_end)
    sequences = [x.bfloat16() for x in sequences]
    along_tree(scan, visible_end, *sequences, *parameters)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        along_tree(scan, visible_end, *sequences, *parameters)
    along_tree(scan, visible_end, *(x.float() for x in sequences), *parameters)
    assert all(states.dtype == torch.float32 for states in given)
    assert torch.equal(given[0], given[2])
    assert torch.equal(given[1], given[2])


def test_a_long_chat_takes_a_fourteenth_of_the_calls():
    """Against a call of transformers' function per group of segments: twenty turns."""
    visible_end = long_chat()
    sequences, (A, D, dt_bias) = random_inputs(visible_end)
    inputs = [x.requires_grad_() for x in (*sequences, A, D, dt_bias)]
    scan = original(modeling.mamba2_chunk_scan)

    def run(pieces, initial, wants_state):
        state = dict(initial_states=initial, return_final_states=wants_state)
        x, dt, B, C = pieces
        out = scan(x, dt, A, B, C, 16, D=D, dt_bias=dt_bias, dt_softplus=True, **state)
        return out if wants_state else (out, None)

    few = kernels(lambda *inputs: along_tree(scan, visible_end, *inputs), inputs)
    many = kernels(lambda *inputs: by_groups(run, visible_end, inputs[:4]), inputs)
    assert few <= many / 14, (few, many)


def test_a_state_per_chunk_is_kept():
    """As docs/scaling.md counts them."""
    visible_end = long_chat()
    sequences, parameters = random_inputs(visible_end)
    inputs = [x.requires_grad_() for x in (*sequences, *parameters)]
    scan, state = original(modeling.mamba2_chunk_scan), (HEADS, HEAD_DIM, STATE_SIZE)
    of_states = bytes_of_states(lambda *x: along_tree(scan, visible_end, *x), inputs, *state)
    assert of_states == 4 * len(chunks_of(visible_end, 16).tokens) * math.prod(state)
