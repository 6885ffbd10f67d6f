"""What a verb writes comes whole or not at all, and never takes the place of what it reads."""

import errno
import os
from pathlib import Path

import pytest

from onepass_trl.tools.outputs import check_outputs, write_output


def test_an_output_is_replaced_whole(tmp_path):
    path = tmp_path / "out.json"
    write_output(path, "ä")
    assert path.read_text("utf-8") == "ä"
    path.chmod(0o640)
    link = tmp_path / "link.json"
    link.symlink_to(path)
    write_output(link, b"new")
    assert link.is_symlink()
    assert path.read_text() == "new"
    assert path.stat().st_mode & 0o777 == 0o640
    assert sorted(tmp_path.iterdir()) == [link, path]


def test_a_full_disk_leaves_the_old_file_and_is_named(tmp_path, monkeypatch):
    path = tmp_path / "out.json"
    path.write_text("old")

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"out\.json can't be written.*: No space left on device"):
        write_output(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has this device")
def test_a_device_is_written_to():
    write_output("/dev/null", "text")
    with pytest.raises(OSError, match=r"/dev/full can't be written, .*: No space left on device"):
        write_output("/dev/full", "text")


def test_an_input_is_never_an_output(tmp_path):
    data, model, folder = tmp_path / "a.jsonl", tmp_path / "model", tmp_path / "data"
    for file in (data, model / "config.json", model / "notes.json", folder / "train.json"):
        file.parent.mkdir(exist_ok=True)
        file.write_text("{}")
    (tmp_path / "link.json").symlink_to(data)
    inputs = [str(data), str(model), str(folder), None, "owner/name"]
    for name in ("a.jsonl", "link.json", "model/config.json", "data/../data/train.json"):
        with pytest.raises(ValueError, match=r"--json .* would replace .*, which is read"):
            check_outputs({"--json": str(tmp_path / name)}, inputs)
    with pytest.raises(ValueError, match="would replace"):
        check_outputs({"--json": str(data)}, [str(tmp_path / "*.jsonl")])
    check_outputs({"--json": str(model / "notes.json"), "--png": None}, inputs)
    check_outputs({"--json": str(folder / "new.json")}, inputs)


def test_two_outputs_are_two_files(tmp_path):
    with pytest.raises(ValueError, match=r"--html and --png both name .*a\.png; name two files"):
        check_outputs({"--html": str(tmp_path / "a.png"), "--png": str(tmp_path / "a.png")})
