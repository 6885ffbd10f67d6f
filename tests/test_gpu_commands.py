"""What runs on GPU machines only is run here on the CPU, in small, so that it does not rot."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu.record_validation import merge

ROOT = Path(__file__).parents[1]
ENTRY = [[9, 0], "bfloat16", [64, 64]]


@pytest.mark.slow
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
        merge([], results)


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
    kernel = {"dtype": "bfloat16", "head_dims": [64, 64]}
    counts = {"tests": tests, "passed": passed, "failed": failed}
    results = {"device": "a GPU", "capability": [9, 0], "kernels": [{**kernel, **counts}]}
    assert merge(before, results) == after
