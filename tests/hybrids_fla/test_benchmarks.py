"""The benchmarks of fla are run in small, and what they have to show is in the committed result."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

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


def test_the_ways_of_a_model_have_the_same_loss(monkeypatch):
    """N-pass but for its convolutions, which run on from a pass to the next."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    linear_model, linear_ways = map(importlib.import_module, ("linear_model", "linear_ways"))
    shape = linear_ways.Shape(1, 1, head_dim=16, dtype=torch.float32, device="cpu")
    passes = linear_ways.chat(2, tiny=True)
    of_layer = linear_ways.ways(passes, shape)
    of_model = linear_model.model_ways(passes, shape, of_layer, tiny=True)
    losses = {name: way.forward().item() for name, way in of_model.items()}
    assert losses["grouped"] == pytest.approx(losses["leveled"], rel=1e-6)
    assert losses["n_pass"] == pytest.approx(losses["leveled"], rel=1e-3)


def test_the_ways_are_timed(results_of):
    results = results_of("gpu_linear", "--device=cpu", "--tiny", "--turns", "2", "--repeats=1")
    names = ["grouped", "leveled", "n_pass"]
    expected = [(subject, way) for subject in ("layer", "model") for way in names]
    assert [(result["subject"], result["way"]) for result in results] == expected
    for grouped, leveled, n_pass in (results[:3], results[3:]):
        assert n_pass["token_ratio"] == n_pass["speedup"] == 1
        assert grouped["token_ratio"] == leveled["token_ratio"] > 1
    assert all(result["step_ms"] > 0 and result["kernels"] is None for result in results)
