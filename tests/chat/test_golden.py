"""Every family renders what its file in `golden/` shows."""

from importlib.metadata import version

import pytest
from packaging.version import Version

from onepass_trl.versions import TESTED
from tests.chat.families import CASES, Case
from tests.chat.golden import FOLDER, golden_text


def skip_without_template(case: Case) -> None:
    """Skip if an older TRL than the tested one has no such template."""
    installed = version("trl")
    if Version(installed) < Version(TESTED["trl"]):
        try:
            case.template_text()
        except FileNotFoundError:
            pytest.skip(f"TRL {installed} has no template {case.template}")


@pytest.mark.parametrize("name", CASES)
def test_golden(name):
    skip_without_template(CASES[name])
    expected = (FOLDER / f"{CASES[name].slug}.txt").read_text("utf-8")
    assert golden_text(CASES[name]) == expected, "if that is right: python -m tests.chat.golden"


def test_every_file_is_of_a_family():
    assert {file.stem for file in FOLDER.glob("*")} == {case.slug for case in CASES.values()}
