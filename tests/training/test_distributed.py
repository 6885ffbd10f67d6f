"""Two gloo processes on the CPU give the losses and the weights of one process."""

import json

import pytest
import torch

from onepass_trl.versions import checkpointing_option
from tests.launching import FSDP2, launch, run, zero
from tests.training.sharding import needs_deepspeed

long = pytest.mark.long("onepass_trl", "tests/training", "tests/launching.py")


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    folder = tmp_path_factory.mktemp("single") / "run"
    return run(
        folder, 1, per_device_train_batch_size=4, evaluate=True, per_device_eval_batch_size=1
    )


@pytest.mark.parametrize(
    "options",
    [
        dict(per_device_train_batch_size=2),
        pytest.param(
            dict(per_device_train_batch_size=1, gradient_accumulation_steps=2), marks=long
        ),
        dict(per_device_train_batch_size=2, **FSDP2),
        pytest.param(
            dict(per_device_train_batch_size=1, gradient_accumulation_steps=2, **FSDP2), marks=long
        ),
        *(
            pytest.param(dict(**batch, **zero(stage)), marks=needs_deepspeed)
            for stage in (2, 3)
            for batch in (
                dict(per_device_train_batch_size=2),
                dict(per_device_train_batch_size=1, gradient_accumulation_steps=2),
            )
        ),
    ],
    ids=[
        f"{name}{accumulation}"
        for name in ("ddp", "fsdp2", "zero2", "zero3")
        for accumulation in ("", "_accumulation")
    ],
)
def test_two_processes_equal_one(options, single, tmp_path):
    # Of three rows, the last batch has one, and the other process one that was evaluated already.
    evaluation = dict(evaluate=True, per_device_eval_batch_size=1)
    run_ = run(tmp_path / "run", 2, **evaluation, **options)
    check_equal(run_, single, options)
    check_evaluation(run_, single)


@pytest.mark.parametrize(
    ("num_processes", "options"),
    [
        (2, dict(per_device_train_batch_size=4)),
        pytest.param(
            2,
            dict(per_device_train_batch_size=4, packing=True, eval_packing=False, max_length=100),
            marks=long,
        ),
        pytest.param(
            4,
            dict(
                per_device_train_batch_size=1,
                gradient_accumulation_steps=2,
                **{checkpointing_option(): True},
            ),
            marks=long,
        ),
    ],
    ids=["rows", "packed", "with_data_parallelism"],
)
def test_rows_in_pieces_equal_one_process(num_processes, options, single, tmp_path):
    """Context parallelism of two processes each."""
    # Two rows a batch, three rows: the last batches are partly or wholly rows evaluated already.
    evaluation = dict(evaluate=True, per_device_eval_batch_size=2)
    run_ = run(tmp_path / "run", num_processes, cp_size=2, **evaluation, **options, **FSDP2)
    check_equal(run_, single, options)
    check_evaluation(run_, single)


@pytest.mark.long(
    "onepass_trl/training/finite_weights.py",
    "onepass_trl/training/first_check.py",
    "tests/training/spoiled_worker.py",
)
@pytest.mark.parametrize(
    "options",
    [{}, FSDP2, pytest.param(zero(3), marks=needs_deepspeed)],
    ids=["ddp", "fsdp2", "zero3"],
)
@pytest.mark.parametrize(
    ("spoiled", "message"),
    [
        ("weight", "the weights aren't finite after step 1, since a gradient was NaN"),
        ("positions", "does not compute in one pass what it computes in 5 passes"),
    ],
    ids=["weight", "positions"],
)
def test_all_processes_refuse_what_is_spoiled(options, spoiled, message, tmp_path):
    """A weight that is NaN in one of them, or a model that doesn't follow the tree."""
    use_cpu = str(options.get("use_cpu", True)).lower()
    options = dict(options, spoiled=spoiled, save_strategy="steps", save_steps=1)
    arguments = (str(tmp_path), json.dumps(options))
    launch(2, "tests.training.spoiled_worker", *arguments, ACCELERATE_USE_CPU=use_cpu)
    for process in range(2):
        error = (tmp_path / f"{process}.txt").read_text()
        assert message in error
    assert not list(tmp_path.rglob("*.safetensors"))


def test_what_processes_say_that_fail_is_shown(tmp_path):
    with pytest.raises(AssertionError, match="unexpected keyword argument 'no_such_option'"):
        run(tmp_path / "run", 2, no_such_option=1)


def check_evaluation(actual_run, expected_run):
    """Compare the evaluations of two runs, in which every row counts once."""
    actual, expected = actual_run[0][-1], expected_run[0][-1]
    assert actual["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-5)
    for key in ("row_tokens", "npass_tokens", "trained_tokens", "turns"):
        assert actual[f"eval_{key}"] == expected[f"eval_{key}"]


def check_equal(actual_run, expected_run, options):
    """Compare the losses, totals and weights of two runs."""
    (history, weights), (expected_history, expected_weights) = actual_run, expected_run
    for actual, expected in zip(history, expected_history, strict=True):
        assert actual["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        for key in ("row_tokens", "npass_tokens", "trained_tokens", "turns", "num_tokens"):
            assert actual[key] == expected[key]
        if "gradient_accumulation_steps" not in options:  # a mean of micro-batch means
            assert actual["mean_token_accuracy"] == pytest.approx(expected["mean_token_accuracy"])
    # A sharded model may be saved with its head, which is tied to the embeddings.
    embeddings = weights["model.embed_tokens.weight"]
    assert torch.equal(weights.pop("lm_head.weight", embeddings), embeddings)
    assert weights.keys() == expected_weights.keys()
    for name, expected in expected_weights.items():
        torch.testing.assert_close(weights[name], expected, rtol=1e-4, atol=1e-6, msg=name)
