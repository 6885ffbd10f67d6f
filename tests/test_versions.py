"""Which packages are refused, and that what is promised of them is said once."""

import importlib.metadata
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.version import Version

from onepass_trl import versions
from onepass_trl.attention.model_check import check_model
from tests.models import make_model

ROOT = Path(__file__).parents[1]


def test_old_and_missing_packages_are_named_with_the_remedy(monkeypatch):
    def version(package):
        if package == "datasets":
            raise importlib.metadata.PackageNotFoundError(package)
        return {"trl": "0.29.1"}.get(package, versions.OLDEST[package])

    monkeypatch.setattr(versions, "version", version)
    with pytest.raises(ImportError, match=r"trl is 0\.29\.1, datasets is not installed") as error:
        versions.check_versions()
    needed = [f"'{package}>={versions.OLDEST[package]}'" for package in ("trl", "datasets")]
    assert f"pip install {' '.join(needed)}" in str(error.value)


def test_the_command_says_what_to_install(tmp_path):
    metadata = tmp_path / "trl-1.8.0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: trl\nVersion: 1.8.0\n")
    result = subprocess.run(
        [sys.executable, "-m", "onepass_trl.cli", "sft", "chats.jsonl"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    needed = f"'trl>={versions.OLDEST['trl']}'"
    assert result.returncode == 2
    assert result.stderr.startswith(
        "onepass-trl: error: OnePassSFTTrainer needs newer packages: trl is 1.8.0. "
        f"Run: pip install {needed}\n"
    )


def test_the_installed_packages_are_supported():
    versions.check_versions()


def _asked() -> dict[str, str]:
    """Return the oldest versions that ``pyproject.toml`` names."""
    project = tomllib.loads(ROOT.joinpath("pyproject.toml").read_text("utf-8"))["project"]
    return dict(line.split(">=") for line in project["dependencies"] if ">=" in line)


def test_the_package_asks_for_what_it_needs():
    assert versions.OLDEST.items() <= _asked().items()


@pytest.mark.parametrize("name", ["lfm2", "falcon_h1"])
def test_a_model_that_transformers_is_too_old_for_is_refused(name, monkeypatch):
    """Its state layers would get no visible_end."""
    model = make_model(name)
    monkeypatch.setattr(versions, "version", lambda package: "5.16.1")
    with pytest.raises(ValueError, match=r"Run: pip install 'transformers>=5\.\d\d'"):
        check_model(model)


def test_make_test_oldest_installs_the_oldest():
    asked = _asked()
    pinned = dict(
        line.split("==")
        for line in ROOT.joinpath("constraints-oldest.txt").read_text("utf-8").splitlines()
        if "==" in line
    )
    assert "torch" not in pinned  # that of constraints.txt
    del asked["torch"]
    assert {name: Version(pinned[name]) for name in asked} == {
        name: Version(oldest) for name, oldest in asked.items()
    }
