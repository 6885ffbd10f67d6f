import numpy as np
import pytest
import torch

from onepass_trl import build_tree, linearize
from onepass_trl.attention import ImplStatus, available_impls
from onepass_trl.tools.bench import attention, peers
from onepass_trl.tools.bench.attention import measure_attention
from onepass_trl.tools.bench.peers import CAUSAL, DENSE_MASK, FLEX, make_inputs, make_peers
from onepass_trl.tools.bench.report import attention_table
from onepass_trl.tools.bench.workload import AttentionShape, chat_passes
from onepass_trl.visibility import dense_mask, num_visible_pairs

LAYOUT = linearize(build_tree(chat_passes(3, 5, 20, 10, vocab_size=50)))
ROW = LAYOUT.visible_end
OURS = ["onepass cpu", "onepass dense"]


def measure(names, row=ROW, **options):
    given = dict(dtype=torch.float32, device=torch.device("cpu"), repeats=2)
    return measure_attention(row, AttentionShape(4, 2, 16, 8), **{**given, **options}, peers=names)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peers_compute_the_same_but_for_the_causal_one(dtype):
    rows = measure([*OURS, DENSE_MASK, CAUSAL], dtype=dtype)
    assert [row["implementation"] for row in rows] == [*OURS, DENSE_MASK, CAUSAL]
    for row in rows:
        for name in ("forward", "backward", "total"):
            assert 0 < row[f"{name}_min_ms"] <= row[f"{name}_median_ms"]
        assert row["repeats"] == 2
    *trees, causal = rows
    limit = 1e-5 if dtype == torch.float32 else 5e-2
    assert all(row["difference"] <= limit and row["note"] is None for row in trees)
    assert causal["difference"] is None
    assert "something else" in causal["note"]
    assert rows[0]["times_onepass"] == 1


def test_a_window_is_that_of_every_tree_and_its_work_too():
    window = dict(positions=LAYOUT.position_ids, window=9)
    ours, *others = measure([*OURS, DENSE_MASK], **window)
    assert all(other["difference"] < 1e-5 for other in others)
    assert ours["window"] == 9
    mask = dense_mask(ROW, LAYOUT.position_ids, 9)
    assert ours["useful_share_of_causal"] == mask.sum() / (ROW.size * (ROW.size + 1) / 2)


def test_what_is_built_once_per_batch_is_timed_apart():
    ours, dense = measure(["onepass cpu", DENSE_MASK])
    assert ours["build_min_ms"] is None
    assert 0 < dense["build_min_ms"] <= dense["build_median_ms"]


def test_repeats_are_those_that_were_run():
    (row,) = measure(["onepass cpu"], repeats=5, budget_s=0)
    assert row["repeats"] == 1


def test_the_work_is_that_of_the_row():
    (row,) = measure(["onepass cpu"])
    useful = num_visible_pairs(ROW)
    assert row["seq"] == ROW.size
    assert row["useful_share_of_causal"] == useful / (ROW.size * (ROW.size + 1) / 2)
    mask = dense_mask(ROW)
    tiles = sum(
        mask[q : q + 64, k : k + 64].any()
        for q in range(0, ROW.size, 64)
        for k in range(0, ROW.size, 64)
    )
    assert row["executed_over_useful"] == tiles * 64**2 / useful


def test_a_peer_that_does_not_fit_says_so_and_the_others_run(monkeypatch):
    monkeypatch.setattr(attention, "available_bytes", lambda device: 1000)
    first, dense = measure(["onepass cpu", DENSE_MASK])
    assert first["total_min_ms"] > 0
    assert dense["total_min_ms"] is dense["times_onepass"] is None
    assert "not measured: MemoryLimitError: needs" in dense["note"]
    assert "sdpa dense mask: not measured" in attention_table([first, dense])


def test_an_implementation_that_refuses_says_why():
    """The kernel has no float16 on a CPU."""
    ours, dense = measure(OURS, dtype=torch.float16)
    assert "not measured: ValueError: impl='cpu': q is torch.float16" in ours["note"]
    assert dense["forward_min_ms"] > 0
    assert dense["times_onepass"] is None


def test_unknown_peers_are_refused():
    with pytest.raises(ValueError, match="there is no peer 'paper', expected one of onepass cpu"):
        measure(["paper"])


def test_every_usable_implementation_is_a_peer():
    shape = AttentionShape(4, 2, 16, 8)
    inputs = make_inputs(ROW, shape, torch.float32, torch.device("cpu"))
    made = make_peers(inputs)
    usable = [f"onepass {status.name}" for status in available_impls() if "cpu" in status.devices]
    assert list(made) == [*usable, FLEX, DENSE_MASK, CAUSAL]
    assert not made[FLEX].has_backward
    assert "no backward on a CPU" in made[FLEX].note


def test_finding_the_sequences_of_variable_length_kernels_is_timed_too(monkeypatch):
    usable = ImplStatus("varlen", True, ("cpu",), "as if there were kernels for CPUs")
    monkeypatch.setattr(peers, "available_impls", lambda: [usable])
    x = make_inputs(ROW, AttentionShape(4, 2, 16, 8), torch.float32, torch.device("cpu"))
    made = make_peers(x)["onepass varlen"].prepare()
    assert made.queries.numel() == ROW.size
    assert made.keys.numel() == made.key_starts[-1] > ROW.size


def test_flex_is_compiled_and_timed_forward():
    """For rows of several lengths in a process, too."""
    for row in (ROW, np.concatenate([ROW, ROW + ROW.size])):
        ours, flex = measure(["onepass cpu", FLEX], row)
        assert flex["forward_min_ms"], flex["note"]
        assert flex["backward_min_ms"] is flex["total_min_ms"] is flex["times_onepass"] is None
        assert flex["difference"] < 1e-5
        assert "-" in attention_table([ours, flex]).splitlines()[6]
