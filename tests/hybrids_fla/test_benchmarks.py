"""The benchmarks of fla are run in small, and what they have to show is in the committed result."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def results_of(monkeypatch, tmp_path):
    """A function that returns the results of a script with some flags."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def run(script: str, *flags: str) -> list[dict[str, Any]]:
        path = tmp_path / "results.json"
        importlib.import_module(script).main([*flags, f"--json={path}"])
        return json.loads(path.read_text())["results"]

    return run


def committed() -> list[dict[str, Any]]:
    return json.loads((BENCHMARKS / "results" / "launches.json").read_text())["results"]


def test_launches_are_counted(results_of):
    [result] = results_of("count_launches", "--turns", "3")
    assert result.keys() == committed()[0].keys()
    # Forward and backward a launch for each piece of the trunk and one for all branches, where N
    # passes take one.
    assert result["launches_leveled"] - result["launches_n_pass"] == 2 * (3 - 1)
    assert result["launches_leveled"] < result["launches_grouped"]
    assert result["steps_n_pass"] <= result["steps_leveled"] < result["steps_grouped"]


def test_the_figures_of_twenty_turns_are_within_their_bounds():
    [result] = [result for result in committed() if result["turns"] == 20]
    assert result["launches_leveled"] <= 80
    assert result["steps_leveled"] <= 65


def test_the_ways_are_timed(results_of):
    results = results_of("gpu_linear", "--device=cpu", "--tiny", "--turns", "2", "--repeats=1")
    assert [result["way"] for result in results] == ["grouped", "leveled", "n_pass"]
    assert results[2]["token_ratio"] == results[2]["speedup"] == 1
    assert results[0]["token_ratio"] == results[1]["token_ratio"] > 1
    assert all(result["step_ms"] > 0 and result["kernels"] is None for result in results)
