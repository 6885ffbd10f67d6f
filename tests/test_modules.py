"""Each module of the package has its test file, or a line here that says which covers it."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
COVERED_BY = {
    "attention/api.py": "attention/test_validation.py",
    "attention/branching/": "attention/branching/test_segments.py",
    "attention/cuda_library.py": "cuda/test_build.py",
    "attention/head_exchange.py": "training/test_context_parallel.py",
    "attention/image_models.py": "training/test_images.py",
    "attention/implementations/": "attention/test_op.py",
    "attention/layer_inputs.py": "attention/branching/test_layers.py",
    "attention/ops.py": "attention/test_op.py",
    "attention/self_check/__main__.py": "attention/self_check/test_process.py",
    "chat/checks.py": "chat/test_rendering.py",
    "chat/errors.py": "chat/test_rendering.py",
    "chat/families/": "chat/test_families.py",
    "chat/json_text.py": "preparation/test_json_files.py",
    "chat/template.py": "chat/test_rendering.py",
    "chat/turns.py": "chat/test_rendering.py",
    "cli/": "cli/test_cli.py",
    "data/tree.py": "data/test_layout.py",
    "passes.py": "data/test_layout.py",
    "preparation/given_passes.py": "preparation/test_rows.py",
    "preparation/options.py": "preparation/test_rows.py",
    "preparation/report.py": "preparation/test_datasets.py",
    "setsft/": "setsft/test_trainer.py",
    "tools/bench/": "cli/test_bench.py",
    "tools/estimation_plot.py": "cli/test_estimate.py",
    "tools/estimation_report.py": "tools/test_estimation.py",
    "tools/inspection_report.py": "cli/test_inspect.py",
    "tools/plots.py": "cli/test_estimate.py",
    "training/arguments.py": "training/test_trainer.py",
    "training/config.py": "training/test_trainer.py",
    "training/response_templates.py": "preparation/test_round_trip.py",
    "training/trl_advice.py": "training/test_trainer.py",
    "vision.py": "chat/test_images.py",
    "wording.py": "chat/test_images.py",
}


def test_every_module_is_covered():
    modules = [
        path.relative_to(ROOT / "onepass_trl")
        for path in sorted((ROOT / "onepass_trl").rglob("*.py"))
        if path.name != "__init__.py"
    ]
    alone = [m for m in modules if not (ROOT / "tests" / m.parent / f"test_{m.name}").exists()]
    uncovered = [str(m) for m in alone if not any(map(str(m).startswith, COVERED_BY))]
    assert not uncovered, "write a test file, or a line of COVERED_BY"
    unused = [key for key in COVERED_BY if not any(str(m).startswith(key) for m in alone)]
    assert not unused, "lines of COVERED_BY for modules that are gone or have a test file"


def test_what_covers_them_is_there():
    assert [file for file in COVERED_BY.values() if not (ROOT / "tests" / file).exists()] == []
