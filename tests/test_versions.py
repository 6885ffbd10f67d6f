"""Which packages are refused, and that what is promised of them is said once."""

import importlib.metadata
import tomllib
from pathlib import Path

import pytest

from onepass_trl import versions
from onepass_trl.attention.model_check import check_model
from tests.models import make_model


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


def test_the_installed_packages_are_supported():
    versions.check_versions()


def test_the_package_asks_for_what_it_needs():
    project = tomllib.loads(Path(__file__).parents[1].joinpath("pyproject.toml").read_text("utf-8"))
    asked = dict(line.split(">=") for line in project["project"]["dependencies"] if ">=" in line)
    assert versions.OLDEST.items() <= asked.items()


@pytest.mark.parametrize("name", ["lfm2", "falcon_h1"])
def test_a_model_that_transformers_is_too_old_for_is_refused(name, monkeypatch):
    """Its state layers would get no visible_end."""
    model = make_model(name)
    monkeypatch.setattr(versions, "version", lambda package: "5.16.1")
    with pytest.raises(ValueError, match=r"Run: pip install 'transformers>=5\.\d\d'"):
        check_model(model)
