"""What runs on GPU machines only is run here on the CPU, in small, so that it does not rot."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from onepass_trl.visibility import (
    check_visible_end,
    dense_mask,
    num_executed_pairs,
    num_visible_pairs,
)
from tests.gpu.record_validation import merge

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
from gpu_rows import causal_row, chats, filled_row, rollouts  # noqa: E402

ENTRY = [[9, 0], "bfloat16", [64, 64]]
SOURCE = "the digest of the sources"


@pytest.mark.long("tests/gpu", "benchmarks", "onepass_trl/attention")
def test_dry_run_of_the_gpu_tests(tmp_path):
    path = tmp_path / "results.json"
    variables = {"ONEPASS_TEST_GPU_DRY_RUN": "1", "ONEPASS_TEST_GPU_RESULTS": str(path)}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "tests/gpu", "-q", "-p", "no:cacheprovider"],
        cwd=ROOT,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout
    results = json.loads(path.read_text())
    kernels = {tuple(kernel["head_dims"]): kernel for kernel in results["kernels"]}
    assert set(kernels) == {(64, 64)}
    for kernel in kernels.values():
        assert kernel["passed"] == kernel["tests"] > 30
    with pytest.raises(SystemExit, match="nothing has run on a GPU"):
        merge({"source": SOURCE, "kernels": []}, results, SOURCE)


@pytest.mark.parametrize(
    ("before", "tests", "passed", "failed", "after"),
    [
        ([], 5, 5, 0, [ENTRY]),
        ([ENTRY], 5, 5, 0, [ENTRY]),
        ([], 5, 4, 0, []),
        ([ENTRY], 5, 4, 0, [ENTRY]),
        ([ENTRY], 5, 4, 1, []),
        ([], 0, 0, 0, []),
    ],
)
def test_only_kernels_that_passed_every_test_are_recorded(before, tests, passed, failed, after):
    results = results_of(tests=tests, passed=passed, failed=failed)
    merged = merge({"source": SOURCE, "kernels": before}, results, SOURCE)
    assert merged == {"source": SOURCE, "kernels": after}


def results_of(source=SOURCE, **counts) -> dict:
    kernel = {"dtype": "bfloat16", "head_dims": [64, 64], **counts}
    return {"device": "a GPU", "capability": [9, 0], "source": source, "kernels": [kernel]}


def test_records_hold_for_their_sources():
    passed = results_of(tests=5, passed=5, failed=0)
    older = {"source": "others", "kernels": [[[8, 0], "float16", [64, 64]]]}
    assert merge(older, passed, SOURCE) == {"source": SOURCE, "kernels": [ENTRY]}
    with pytest.raises(SystemExit, match="not of these sources: run `make cuda`"):
        merge(older, {**passed, "source": "others"}, SOURCE)


ROWS = {
    "causal": causal_row(300),
    "chat": filled_row(700, chats(5, 3, 30)),
    "rollouts": filled_row(900, rollouts(prompt=400, branches=9, length=60)),
}


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_the_work_that_benchmarks_count(row):
    check_visible_end(row.visible_end)
    for window in (None, 40):
        mask = dense_mask(row.visible_end, row.positions, window)
        useful = num_visible_pairs(*row, window)
        assert useful == mask.sum()
        assert useful <= num_executed_pairs(*row, window, query_tile=64, key_tile=128)
    assert num_executed_pairs(*row, 40) < num_executed_pairs(*row)


@pytest.mark.long("tests/gpu", "benchmarks", "onepass_trl/attention")
def test_dry_run_of_the_gpu_benchmark(tmp_path):
    """On a CPU every way to train has the same loss."""
    command = [sys.executable, "benchmarks/bench_gpu.py", "--device", "cpu", "--tiny"]
    progress = tmp_path / "progress"
    progress.write_text(json.dumps({"tiny, one pass, flex": None}))  # it ended another process
    run = subprocess.run(
        [*command, "--results", str(tmp_path), "--resume", str(progress)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1, run.stderr
    assert "ended the process that measured them: tiny, one pass, flex" in run.stderr
    records = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("cpu_*.json"))]
    assert [record["name"] for record in records] == ["gpu_attention", "gpu_steps"]
    attention, steps = (record["results"] for record in records)
    for row in attention:
        assert row["forward_tflops"] > 0
        assert row["backward_tflops"] > 0
        assert row["executed_over_useful_forward"] >= 1
    peers = {row["implementation"] for row in attention}
    assert peers == {"onepass cpu", "sdpa dense mask", "sdpa causal"}
    losses = {row["way"]: row["loss"] for row in steps if row["unavailable"] is None}
    assert len(losses) == 3
    assert np.ptp(list(losses.values())) < 2e-3 * max(losses.values())
    assert "one pass, flex" not in [row["way"] for row in steps]
    assert None not in (json.loads(progress.read_text()) | {"tiny, one pass, flex": []}).values()
    n_pass = steps[0]["n_pass_tokens"]
    assert n_pass > steps[0]["one_pass_tokens"]
    for word in ("N-pass, packed flash", "sdpa causal"):
        assert word in run.stdout
