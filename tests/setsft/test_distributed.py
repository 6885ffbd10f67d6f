"""Two gloo processes on the CPU match and train as one process does."""

import pytest
import torch

from tests.launching import FSDP2, run, zero
from tests.setsft.trainers import NUM_TOKENS
from tests.training.sharding import needs_deepspeed

WORKER = "tests.setsft.distributed_worker"
long = pytest.mark.long("onepass_trl", "tests/setsft", "tests/training", "tests/launching.py")


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """The run of one process, for each way of matching."""
    runs = {}

    def get(matching):
        if matching not in runs:
            folder = tmp_path_factory.mktemp(matching) / "run"
            options = dict(per_device_train_batch_size=4, matching=matching)
            runs[matching] = run(folder, 1, WORKER, **options)
        return runs[matching]

    return get


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(dict(per_device_train_batch_size=2), marks=long),
        # The processes have 20 + 10 and 15 + 5 pairs: different numbers of forwards.
        dict(per_device_train_batch_size=2, matching_batch=4),
        pytest.param(
            dict(per_device_train_batch_size=1, gradient_accumulation_steps=2), marks=long
        ),
        pytest.param(dict(per_device_train_batch_size=2, matching_batch=4, **FSDP2), marks=long),
        pytest.param(dict(per_device_train_batch_size=4, cp_size=2, **FSDP2), marks=long),
        pytest.param(dict(per_device_train_batch_size=2, matching="random"), marks=long),
        pytest.param(
            dict(per_device_train_batch_size=2, matching_batch=4, **zero(3)), marks=needs_deepspeed
        ),
    ],
    ids=[
        "ddp",
        "ddp_batched",
        "ddp_accumulation",
        "fsdp2",
        "context_parallel",
        "ddp_random",
        "zero3",
    ],
)
def test_two_processes_equal_one(options, single, tmp_path):
    expected_history, expected_weights = single(options.get("matching", "hungarian"))
    history, weights = run(tmp_path / "run", 2, WORKER, **options)
    shares = [f"matched_share_{number}" for number in range(1, NUM_TOKENS + 1)]
    for actual, expected in zip(history, expected_history, strict=True):
        assert actual["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        for key in (*shares, "assignment_entropy", "trained_tokens", "turns", "row_tokens"):
            assert actual[key] == pytest.approx(expected[key], rel=1e-6)
        # Means of micro-batch means.
        if "matched_cost" in expected and "gradient_accumulation_steps" not in options:
            assert actual["matched_cost"] == pytest.approx(expected["matched_cost"], rel=1e-5)
            assert actual["matching_gap"] == pytest.approx(expected["matching_gap"], rel=1e-3)
    for name, expected in expected_weights.items():
        torch.testing.assert_close(weights[name], expected, rtol=1e-4, atol=1e-6, msg=name)
