import subprocess

import pytest

from onepass_trl.tools.bench import results


@pytest.fixture
def repository(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "_REPOSITORY", tmp_path)
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    for name in ("code.py", "benchmarks/results/step.json"):
        (tmp_path / name).write_text("before")
    identity = ["-c", "user.name=a", "-c", "user.email=a@localhost"]
    for arguments in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "Begin"]):
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True)
    return tmp_path


def test_a_commit_is_dirty_if_anything_but_results_has_changed(repository):
    clean = results.commit()
    assert clean.isalnum()
    (repository / "benchmarks" / "results" / "step.json").write_text("after")
    assert results.commit() == clean
    (repository / "code.py").write_text("after")
    assert results.commit() == f"{clean}-dirty"


def test_the_commit_of_an_installed_package_is_unknown(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "_REPOSITORY", tmp_path)
    assert results.commit() == "unknown"
