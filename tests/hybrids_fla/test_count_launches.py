"""The benchmark that counts launches is run in small, and what it has to show is in its result."""

import importlib
import json
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_launches_are_counted(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    path = tmp_path / "launches.json"
    importlib.import_module("count_launches").main(["--turns", "3", f"--json={path}"])
    [result] = json.loads(path.read_text())["results"]
    committed = json.loads((ROOT / "benchmarks" / "results" / "launches.json").read_text())
    assert result.keys() == committed["results"][0].keys()
    # Forward and backward a launch for each piece of the trunk and one for all branches, where N
    # passes take one.
    assert result["launches_leveled"] - result["launches_n_pass"] == 2 * (3 - 1)
    assert result["launches_leveled"] < result["launches_grouped"]
    assert result["steps_n_pass"] <= result["steps_leveled"] < result["steps_grouped"]


def test_the_figures_of_twenty_turns_are_within_their_bounds():
    committed = json.loads((ROOT / "benchmarks" / "results" / "launches.json").read_text())
    [result] = [x for x in committed["results"] if x["turns"] == 20]
    assert result["launches_leveled"] <= 80
    assert result["steps_leveled"] <= 65
