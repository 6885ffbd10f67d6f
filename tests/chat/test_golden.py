"""Every family renders what its file in `golden/` shows."""

import pytest

from tests.chat.families import CASES
from tests.chat.golden import FOLDER, golden_text


@pytest.mark.parametrize("name", CASES)
def test_golden(name):
    expected = (FOLDER / f"{CASES[name].slug}.txt").read_text("utf-8")
    assert golden_text(CASES[name]) == expected, "if that is right: python -m tests.chat.golden"


def test_every_file_is_of_a_family():
    assert {file.stem for file in FOLDER.glob("*")} == {case.slug for case in CASES.values()}
