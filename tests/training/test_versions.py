import importlib.metadata

import pytest

from onepass_trl.training import versions


def test_old_and_missing_packages_are_named_with_the_remedy(monkeypatch):
    def version(package):
        if package == "datasets":
            raise importlib.metadata.PackageNotFoundError(package)
        return {"trl": "0.29.1"}.get(package, versions.OLDEST[package])

    monkeypatch.setattr(versions, "version", version)
    with pytest.raises(ImportError, match=r"trl is 0\.29\.1, datasets is not installed") as error:
        versions.check_versions()
    assert "pip install 'trl>=1.16.0' 'datasets>=5.2.0'" in str(error.value)


def test_the_installed_packages_are_supported():
    versions.check_versions()
