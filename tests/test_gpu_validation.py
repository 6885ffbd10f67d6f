"""The script for a GPU machine that is lent for minutes: its steps, and all of it in small."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from tests.gpu import validate
from tests.gpu.steps import Command, Setting, Step
from tests.gpu.validate import Process, Run, merged

ROOT = Path(__file__).parents[1]


def python(name: str, program: str, *arguments: object, **options) -> Command:
    return Command(name, (sys.executable, "-c", program, *map(str, arguments)), **options)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A function that makes a call with these steps, and returns the outcomes of all calls."""
    monkeypatch.setattr(validate, "digest", lambda: "the same files")

    class Given(Setting):
        def steps(self):
            return steps

        def parity_results(self):
            return []

    steps: list[Step] = []

    def call(*given: Step, seconds: float = 60):
        steps[:] = given
        setting = Given(tmp_path / "results", tmp_path / "carried", True)
        Run(setting, tmp_path, time.monotonic() + seconds).all()
        return json.loads((tmp_path / "summary.json").read_text())["steps"]

    return call


HANG = "import time; print('begun', flush=True); time.sleep(600)"
NOTE = "import sys; open(sys.argv[1], 'a').write('x')"


def test_a_hang_costs_one_step(run, tmp_path):
    done = tmp_path / "done"
    outcomes = run(
        Step("hangs", 0.5, [python("a", HANG), python("b", NOTE, done)]),
        Step("fails", 60, [python("c", "raise SystemExit('a fault')")]),
        Step("not counted", 60, [python("d", "raise SystemExit(1)", counts=False)]),
        Step("impossible", 60, [], skipped="there is no tool"),
        Step("works", 60, [python("e", NOTE, done)]),
    )
    assert {name: outcome["status"] for name, outcome in outcomes.items()} == {
        "hangs": "timed out",
        "fails": "failed",
        "not counted": "passed",
        "impossible": "skipped",
        "works": "passed",
    }
    assert outcomes["hangs"]["exit_codes"] == {"a": None, "b": 0}
    assert done.read_text() == "xx"
    with tarfile.open(tmp_path / "everything.tgz") as archive:
        assert archive.extractfile("logs/c.log").read() == b"a fault\n"
        assert archive.extractfile("logs/a.log").read() == b"begun\n"


def test_a_further_call_goes_on_where_the_last_one_stopped(run, tmp_path, monkeypatch):
    done = tmp_path / "done"
    first, second = (Step(name, 60, [python(name, NOTE, done)]) for name in ("first", "second"))
    assert run(first, second, seconds=5) == {}  # too few to begin a step
    assert run(first)["first"]["status"] == "passed"
    assert run(first, second)["second"]["status"] == "passed"
    assert done.read_text() == "xx"
    monkeypatch.setattr(validate, "digest", lambda: "other files")
    run(first, second)
    assert done.read_text() == "xxxx"


def test_what_is_recorded_holds_in_further_calls(run, tmp_path, monkeypatch):
    package, done = tmp_path / "package" / "validated.json", tmp_path / "done"
    package.parent.mkdir()
    package.touch()
    monkeypatch.setattr(validate, "VALIDATED", package)
    record = Step("record", 60, [python("record", NOTE, package)])
    run(record)
    assert (tmp_path / "validated.json").read_text() == "x"
    package.write_text("")  # a fresh copy of the repository
    run(record, Step("after", 60, [python("after", NOTE, done)]))
    assert package.read_text() == (tmp_path / "validated.json").read_text() == "x"


def test_some_steps_only_follow_a_failure(run, tmp_path):
    cause, follows = tmp_path / "cause", tmp_path / "follows"
    after = Step("after", 60, [python("after", NOTE, follows)], only_after_failure_of="cause")
    assert "after" not in run(Step("cause", 60, [python("cause", NOTE, cause)]), after)
    (tmp_path / "results" / "summary.json").unlink()
    outcomes = run(Step("cause", 60, [python("cause", "raise SystemExit(1)")]), after)
    assert outcomes["after"]["status"] == "passed"


GOES_ON = """
import json, sys
from pathlib import Path
path, last = Path(sys.argv[1]), int(sys.argv[2])
count = json.loads(path.read_text())["count"] if path.exists() else 0
path.write_text(json.dumps({"count": min(count + 1, 3), "finished": count + 1 == last}))
raise SystemExit(7)
"""


@pytest.mark.parametrize(("last", "count"), [(2, 2), (9, 3)], ids=["finishes", "gets no further"])
def test_a_process_is_started_again_as_long_as_it_gets_further(tmp_path, last, count):
    progress = tmp_path / "progress.json"
    command = python("a", GOES_ON, progress, last, progress=progress)
    process = Process(command, tmp_path / "log")
    begin = time.monotonic()
    while (status := process.status()) is None:
        assert time.monotonic() < begin + 60
        time.sleep(0.01)
    assert status == 7
    assert json.loads(progress.read_text())["count"] == count


def test_results_of_several_processes():
    def record(name, passed):
        kernel = {"dtype": name, "head_dims": [64, 64], "tests": 5, "passed": passed, "failed": 0}
        other = {**kernel, "dtype": "other", "passed": 0}
        facts = {"device": "a GPU", "capability": [9, 0], "torch": "2.11.0", "source": "digest"}
        return {
            **facts,
            "finished": True,
            "kernels": [kernel, other],
            "outcomes": {},
            "messages": {name: "why"},
        }

    found = merged([record("bfloat16", 5), record("float16", 4)])
    assert [(kernel["dtype"], kernel["passed"]) for kernel in found["kernels"]] == [
        ("bfloat16", 5),
        ("float16", 4),
    ]
    assert found["messages"] == {"bfloat16": "why", "float16": "why"}
    assert found["finished"]
    assert merged([]) == {}


FAULTS = """
import os, time
def pytest_runtest_call(item):
    if item.name.startswith("test_rows_on_both_sides_of_the_tiles[31-"):
        time.sleep(600)
    if item.name.startswith("test_rows_on_both_sides_of_the_tiles[64-"):
        os.abort()
"""


@pytest.mark.long("tests/gpu", "benchmarks", "onepass_trl/attention")
def test_dry_run_of_all_steps(tmp_path, tiny_model_dir):
    """One test hangs and one crashes: all others have their outcome, and all steps run."""
    bench = tmp_path / "carried" / "bench"
    bench.mkdir(parents=True)
    (bench / "conversations.jsonl").symlink_to(ROOT / "examples" / "conversations.jsonl")
    (bench / "model").symlink_to(tiny_model_dir)
    (tmp_path / "carried" / "commit").write_text("abc1234\n")
    (tmp_path / "faults.py").write_text(FAULTS)
    out = tmp_path / "out"
    out.mkdir()
    folders = ["--results", str(tmp_path / "results"), "--carried", str(tmp_path / "carried")]
    variables = {
        "OUT": str(out),
        "PYTHON": sys.executable,
        "PYTHONPATH": str(tmp_path),
        "PYTEST_PLUGINS": "faults",
    }
    run = subprocess.run(
        ["tests/gpu/validate.sh", "--dry-run", "--seconds=1800", "--parity-limit=12", *folders],
        cwd=ROOT,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1, run.stdout + run.stderr
    summary = json.loads((out / "summary.json").read_text())
    assert summary["commit"] == "abc1234"
    statuses = {name: outcome["status"] for name, outcome in summary["steps"].items()}
    assert statuses.pop("parity") == "failed"
    skipped = {name: statuses.pop(name) for name in ("record", "wheels", "fla", "linear", "mamba")}
    assert set(skipped.values()) == {"skipped"}
    names = ["machine", "smoke", "attention", "portable", "steps", "others", "memcheck"]
    names += ["racecheck", "synccheck", "ncu", "training", "conversations"]
    assert statuses == dict.fromkeys(names, "passed"), run.stdout
    parity = json.loads((out / "parity.json").read_text())
    [kernel] = parity["kernels"]
    assert (kernel["failed"], kernel["passed"]) == (2, kernel["tests"] - 2)
    assert parity["finished"]
    for name, benchmark in (("attention", "gpu_attention"), ("steps", "gpu_steps")):
        record = json.loads((out / f"{name}.json").read_text())
        assert record["name"] == benchmark
        assert record["commit"] == "abc1234"
        assert record["results"]
    with tarfile.open(out / "everything.tgz") as archive:
        names = archive.getnames()
        log = archive.extractfile("logs/parity_0.log").read().decode()
    assert {"machine.json", "training.json", "conversations.json"} <= set(names)
    assert "Timeout" in log  # with the stack of the test that hung
    assert "Fatal Python error: Aborted" in log
    assert len(list(out.iterdir())) <= 8
