from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from onepass_trl.attention.self_check import verdicts
from onepass_trl.attention.self_check.verdicts import Subject, Verdict, check_once, recall

PASSED, FAILED, NOT_RUN = Verdict("passed"), Verdict("failed", "dk"), Verdict("not run", "busy")
SUBJECT = Subject("a GPU", (9, 0), "580.1", "2.13.0", "0.1.0", "abc", "", "bfloat16", (64, 64))


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "onepass-trl" / "self_check"


class Check:
    """Counts how often it is called."""

    def __init__(self, *found: Verdict) -> None:
        self.found = list(found)

    def __call__(self) -> Verdict:
        return self.found.pop(0)


@pytest.mark.parametrize("verdict", [PASSED, FAILED], ids=str)
def test_a_verdict_is_remembered(verdict, folder):
    assert recall(SUBJECT) is None
    assert check_once(SUBJECT, Check(verdict)) == verdict
    assert check_once(SUBJECT, Check()) == verdict
    assert recall(SUBJECT) == verdict
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".lock"]


@pytest.mark.parametrize("field", Subject._fields)
def test_a_verdict_is_about_its_subject(field):
    check_once(SUBJECT, Check(PASSED))
    other = SUBJECT._replace(
        **{field: (8, 6) if isinstance(getattr(SUBJECT, field), tuple) else "x"}
    )
    assert check_once(other, Check(FAILED)) == FAILED
    assert recall(SUBJECT) == PASSED


def test_what_kept_a_check_from_running_is_not_remembered():
    assert check_once(SUBJECT, Check(NOT_RUN)) == NOT_RUN
    assert recall(SUBJECT) is None
    assert check_once(SUBJECT, Check(PASSED)) == PASSED


def test_checking_again_takes_the_place_of_what_is_remembered():
    check_once(SUBJECT, Check(FAILED))
    assert check_once(SUBJECT, Check(PASSED), again=True) == PASSED
    assert recall(SUBJECT) == PASSED


CONTENT = {"subject": SUBJECT._asdict(), "outcome": "passed", "detail": "", "time": 1.0}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe\x00",
        json.dumps(CONTENT).encode()[:90],
        b"[]",
        b"null",
        json.dumps({**CONTENT, "outcome": "splendid"}).encode(),
        json.dumps({**CONTENT, "time": None}).encode(),
        json.dumps({**CONTENT, "subject": {**CONTENT["subject"], "library": "b"}}).encode(),
    ],
    ids=str,
)
def test_what_is_no_verdict_is_checked_again(content, folder, caplog):
    check_once(SUBJECT, Check(PASSED))
    [path] = folder.glob("*.json")
    path.write_bytes(content)
    assert check_once(SUBJECT, Check(FAILED)) == FAILED
    assert "can't be understood" in caplog.text
    assert recall(SUBJECT) == FAILED


def test_content_of_the_test_above_is_that_of_a_verdict(folder):
    check_once(SUBJECT, Check(PASSED))
    [path] = folder.glob("*.json")
    path.write_text(json.dumps(CONTENT))
    assert recall(SUBJECT) == PASSED


def test_where_nothing_can_be_written_each_process_checks(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    for _ in range(2):
        assert check_once(SUBJECT, Check(FAILED)) == FAILED
        assert "set XDG_CACHE_HOME to a folder that it can write to" in caplog.text
        caplog.clear()
    assert recall(SUBJECT) is None


def test_a_full_disk_is_a_warning(monkeypatch, caplog):
    def write_text(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", write_text)
    assert check_once(SUBJECT, Check(PASSED)) == PASSED
    assert "can't be remembered: [Errno 28] No space left on device" in caplog.text


def test_what_others_have_written_is_read_where_nothing_can_be_written(folder, monkeypatch):
    check_once(SUBJECT, Check(PASSED))

    def mkdir(*_, **__):
        raise PermissionError

    monkeypatch.setattr(Path, "mkdir", mkdir)
    assert check_once(SUBJECT, Check()) == PASSED


def test_a_relative_folder_is_ignored(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    check_once(SUBJECT, Check(PASSED))
    assert list((tmp_path / "home" / ".cache").rglob("*.json"))
    assert not (tmp_path / "relative").exists()


def test_without_a_home_each_process_checks(monkeypatch, caplog):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert check_once(SUBJECT, Check(PASSED)) == PASSED
    assert "the user has no home folder" in caplog.text


@pytest.mark.parametrize("verdict", [PASSED, NOT_RUN], ids=str)
def test_processes_that_wait_get_the_same(verdict):
    begun, end = threading.Event(), threading.Event()

    def check() -> Verdict:
        begun.set()
        assert end.wait(60)
        return verdict

    found: list[Verdict] = []

    def run(check) -> threading.Thread:
        thread = threading.Thread(target=lambda: found.append(check_once(SUBJECT, check)))
        thread.start()
        return thread

    threads = [run(check)]
    assert begun.wait(60)
    threads += [run(Check()) for _ in range(3)]
    time.sleep(3 * verdicts._POLL)
    assert found == []
    end.set()
    for thread in threads:
        thread.join(60)
    assert found == [verdict] * 4


HOLDER = """
import sys, time
from tests.attention.self_check.test_verdicts import SUBJECT
from onepass_trl.attention.self_check.verdicts import check_once
def check():
    print("begun", flush=True)
    time.sleep(600)
check_once(SUBJECT, check)
"""


@pytest.fixture
def holder():
    process = subprocess.Popen([sys.executable, "-c", HOLDER], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "begun\n"
    yield process
    process.kill()
    process.communicate()


def test_a_process_that_dies_lets_go_of_its_lock(holder):
    threading.Timer(3 * verdicts._POLL, holder.send_signal, [signal.SIGKILL]).start()
    assert check_once(SUBJECT, Check(PASSED)) == PASSED


def test_nobody_waits_for_ever(holder, monkeypatch):
    monkeypatch.setattr(verdicts, "LONGEST_WAIT", 0.2)
    verdict = check_once(SUBJECT, Check())
    assert verdict.outcome == "not run"
    assert "another process has held" in verdict.detail
