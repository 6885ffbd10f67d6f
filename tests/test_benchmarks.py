"""The benchmarks are run in small, and the figures drawn from what is committed."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

from tests.chat.tokenizers import small_tokenizer

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    """A function that returns a script of benchmarks/ as a module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def results_of(path: Path, name: str) -> list[dict]:
    run = json.loads(path.read_text())
    assert run["name"] == name
    assert {"command", "machine", "versions", "commit", "date"} <= set(run)
    return run["results"]


TINY = ["--layers=1", "--hidden-size=16", "--heads=2", "--kv-heads=1", "--head-dim=8"]
TURN = ["--user=4", "--reasoning=9", "--response=5", "--vocab-size=50"]


def test_speed_up_by_turns(script, tmp_path):
    path = tmp_path / "turns.json"
    flags = ["--turns", "1", "3", "--repeats=1", *TINY, *TURN, f"--json={path}"]
    script("bench_turns").main(flags)
    one, three = results_of(path, "turns")
    assert (one["turns"], one["token_ratio"]) == (1, 1)
    assert three["token_ratio"] > 1
    assert max(one["largest_loss_difference"], three["largest_loss_difference"]) < 1e-5


def test_a_step_of_hybrid_models(script, tmp_path):
    path = tmp_path / "hybrid.json"
    flags = ["--turns=2", "--hidden-size=48", "--repeats=1", *TURN, f"--json={path}"]
    script("bench_hybrid").main(flags)
    results = results_of(path, "hybrid")
    assert [result["model"] for result in results] == ["qwen3_5_text", "nemotron_h", "lfm2"]
    assert all(result["token_ratio"] > 1 for result in results)
    assert all(result["largest_loss_difference"] < 1e-5 for result in results)


def test_a_step_with_images(script, tmp_path):
    path = tmp_path / "images.json"
    flags = ["--turns=2", "--images=0", "--pixels=64", "--repeats=1", *TURN[:3], f"--json={path}"]
    script("bench_images").main(flags)
    (result,) = results_of(path, "images")
    assert (result["n_pass_images"], result["one_pass_images"], result["image_tokens"]) == (2, 1, 4)
    assert result["largest_loss_difference"] < 1e-6
    assert result["speedup"] == pytest.approx(
        result["n_pass_min_seconds"] / result["one_pass_min_seconds"]
    )


@pytest.mark.long("benchmarks", "onepass_trl/attention", "onepass_trl/data")
def test_memory_of_pieces(script, tmp_path):
    path = tmp_path / "context_parallel.json"
    flags = ["--processes", "1", "2", "--turns=2", "--layers=1", "--hidden-size=64"]
    script("bench_context_parallel").main([*flags, f"--json={path}"])
    one, two = results_of(path, "context_parallel")
    assert (one["processes"], two["processes"]) == (1, 2)
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-6)
    assert two["memory_ratio"] == pytest.approx(two["peak_mib"] / one["peak_mib"])


def test_loss_curves_lie_on_each_other(script, tmp_path, capsys):
    path = tmp_path / "loss_curves.json"
    script("bench_loss_curves").main(["--steps=3", "--turns=2", f"--json={path}"])
    results = results_of(path, "loss_curves")
    assert [result["step"] for result in results] == [1, 2, 3]
    for result in results:
        assert result["one_pass_loss"] == pytest.approx(result["n_pass_loss"], rel=1e-5)
    assert "3 steps, loss" in capsys.readouterr().out


def test_an_estimate_and_what_is_run(script, tmp_path, tiny_model_dir):
    path = tmp_path / "estimate.json"
    flags = [
        f"--data={ROOT / 'examples' / 'conversations.jsonl'}",
        f"--tokenizer={tiny_model_dir}",
        *("--tokens=900", "--layers=1", "--hidden-size=128", "--repeats=1", f"--json={path}"),
    ]
    script("bench_estimate").main(flags)
    (result,) = results_of(path, "estimate")
    assert result["measured_ratio"] == pytest.approx(
        result["n_pass_seconds"] / result["one_pass_seconds"]
    )
    for way in ("by_operations", "by_rows_run"):
        assert result[f"error_{way}"] == pytest.approx(result[way] / result["measured_ratio"] - 1)
    assert 1 < result["by_operations"] < 2 * result["token_ratio"]


def test_rendering_of_chats_that_are_made(script, tmp_path):
    small_tokenizer("qwen3").save_pretrained(tmp_path)
    path = tmp_path / "rendering.json"
    flags = ["--turns", "2", "4", "--repeats=1", f"--tokenizer={tmp_path}", f"--json={path}"]
    script("bench_rendering").main(flags)
    two, four = results_of(path, "rendering")
    assert (two["turns"], four["turns"]) == (2, 4)
    assert four["npass_tokens"] > 2 * two["npass_tokens"]


def test_what_needs_data_is_skipped_without(script, capsys):
    for name in ("estimate", "preparation", "rendering"):
        script(f"bench_{name}").main(["--data=nowhere.jsonl"])
        assert "skipped: nowhere.jsonl" in capsys.readouterr().out


@pytest.mark.long("benchmarks", "onepass_trl/attention", "onepass_trl/data")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_grows_with_the_mask_and_not_with_the_tree(script):
    memory = script("bench_memory")
    one_pass, dense = (memory.measure(name, 8, 1) for name in ("onepass cpu", "sdpa dense mask"))
    assert one_pass["seq"] == dense["seq"] == 4810
    assert dense["peak_mib"] - one_pass["peak_mib"] > 4810**2 * 4 / 2**20
    assert one_pass["peak_mib"] < 60


def test_the_figures_are_drawn_from_what_is_committed(script, tmp_path):
    pytest.importorskip("matplotlib")
    plots = script("make_plots")
    plots.main([f"--output={tmp_path}"])
    assert {path.stem for path in tmp_path.iterdir()} == {
        "speedup_by_turns",
        "memory_by_tokens",
        "loss_curves",
        "mask",
    }
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.iterdir())
    run = json.loads((BENCHMARKS / "results" / "turns.json").read_text())
    figure = plots.speedup_by_turns(run)
    (axes,) = figure.axes
    ratio, speedup = axes.lines
    assert list(speedup.get_ydata()) == [result["speedup"] for result in run["results"]]
    assert list(ratio.get_xdata()) == [result["turns"] for result in run["results"]]
    assert f"commit {run['commit']}" in figure.get_supxlabel()


def test_a_missing_result_is_named(script, tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(SystemExit, match=r"turns\.json is missing: run benchmarks/bench_turns\.py"):
        script("make_plots").main([f"--results={tmp_path}", f"--output={tmp_path / 'figures'}"])


def test_the_committed_figures_are_of_the_committed_results(script):
    image = pytest.importorskip("PIL.Image")
    plots = script("make_plots")
    for name, (file, _) in plots.FIGURES.items():
        run = json.loads((BENCHMARKS / "results" / f"{name}.json").read_text())
        with image.open(ROOT / "docs" / "figures" / f"{file}.png") as picture:
            assert picture.info["Description"] == plots.source_of(run), "run make plots"


def test_every_result_has_its_table_or_figure(script):
    tables, plots = script("make_tables"), script("make_plots")
    page = (BENCHMARKS / "README.md").read_text()
    for name, runs in tables.newest_results().items():
        assert f"<!-- {name} -->" in page
        assert all(tables.format_table(run) in page for run in runs)
    committed = {path.stem for path in (BENCHMARKS / "results").glob("*.json")}
    assert set(plots.FIGURES) <= committed
    for file, _ in plots.FIGURES.values():
        assert f"figures/{file}.png" in page
