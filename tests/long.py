"""Long tests, which run when what they guard has changed.

``@pytest.mark.long("csrc/cuda", ..)`` names the files and folders that a test guards, from the root
of the repository. ``--long`` says which of these tests run:

- ``none``: what `make test` runs
- ``all``: what `make test-all` runs. When everything passes, `tests/long.json` records digests of
  what was guarded; commit it with the change
- ``changed``: those whose guarded files are not the recorded ones. Continuous integration runs them
"""

from __future__ import annotations

import hashlib
import json
import os
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RECORD = Path(__file__).with_suffix(".json")
_SOURCES = {".py", ".pyi", ".cpp", ".h", ".cu", ".cuh", ".inc", ".md", ".json", ".jsonl", ".yaml"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--long",
        choices=("none", "changed", "all"),
        default=os.environ.get("ONEPASS_LONG_TESTS", "none"),
        help="which tests marked long run: none, those that guard changed files, or all "
        "(default: ONEPASS_LONG_TESTS, or none)",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "long(*paths): guards these paths; see tests/long.py")
    config.pluginmanager.register(LongTests(config))


class LongTests:
    """Leaves long tests out, and records what has passed."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._which = config.getoption("--long")
        self._guarded: set[str] = set()

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        recorded = json.loads(RECORD.read_text()) if RECORD.exists() else {}
        left_out = []
        for item in items:
            if (mark := item.get_closest_marker("long")) is None:
                continue
            guarded = " ".join(mark.args)
            item.user_properties.append(("guarded", guarded))
            passed = recorded.get(guarded) == digest(guarded)
            if self._which == "none" or (self._which == "changed" and passed):
                left_out.append(item)
        if left_out:
            self._config.hook.pytest_deselected(items=left_out)
            items[:] = [item for item in items if item not in left_out]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed:
            self._guarded |= {value for name, value in report.user_properties if name == "guarded"}

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        in_worker = hasattr(self._config, "workerinput")  # of pytest-xdist
        whole = self._config.args_source is pytest.Config.ArgsSource.TESTPATHS
        selected = self._config.option.keyword or self._config.option.markexpr
        if self._which == "all" and whole and not selected and not in_worker and exitstatus == 0:
            passed = {guarded: digest(guarded) for guarded in sorted(self._guarded)}
            RECORD.write_text(json.dumps(passed, indent=2) + "\n")


@cache
def digest(guarded: str) -> str:
    """Return a digest of the sources at these paths, given with spaces between them."""
    result = hashlib.sha256()
    for path in guarded.split():
        place = ROOT / path
        files = [place] if place.is_file() else sorted(place.rglob("*"))
        sources = [file for file in files if file.suffix in _SOURCES and file != RECORD]
        if not sources:
            raise pytest.UsageError(f"a long test guards {path!r}, which has no source")
        for file in sources:
            result.update(f"{file.relative_to(ROOT)}\0".encode())
            result.update(file.read_bytes())
    return result.hexdigest()
