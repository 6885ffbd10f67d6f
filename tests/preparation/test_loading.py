"""Where conversations come from: local files are read exactly, and named where they are wrong."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
from pathlib import Path

import pytest
from datasets import Dataset

from onepass_trl import load_conversations

RECORDS = [{"messages": [{"role": "user", "content": str(n)}]} for n in range(8)]
PACKINGS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


def test_values_of_any_shape_survive(tmp_path):
    """Tool arguments of different shapes, nulls and long numbers, which `datasets` changes."""
    rows = [
        {"messages": [{"arguments": {"x": 3.1622776601683795, "y": None}}], "id": 1},
        {"messages": [{"arguments": {"z": [1, "a"]}}], "tools": []},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    loaded = load_conversations(str(path), "train")
    assert [json.loads(row["messages"]) for row in loaded] == [row["messages"] for row in rows]
    assert [row["tools"] for row in loaded] == [None, "[]"]


def test_slices_patterns_and_streams(tmp_path):
    for name in ("a", "b"):
        text = json.dumps([{"messages": [{"content": f"{name}{n}"}]} for n in range(4)])
        (tmp_path / f"{name}.json").write_text(text)
    pattern = str(tmp_path / "*.json")
    assert len(load_conversations(pattern, "train")) == 8
    assert len(load_conversations(pattern, "train[:75%]")) == 6
    assert "b3" in load_conversations(pattern, "train[-1:]")[0]["messages"]
    assert len(list(load_conversations(pattern, "train", streaming=True))) == 8


NAMES = ["ndjson", "JSONL", "jsonl.gz", "json.gz", "jsonl.bz2", "JSON.BZ2", "ndjson.xz"]


@pytest.mark.parametrize("name", [f"rows.{ending}" for ending in NAMES])
def test_other_names_of_json_files(tmp_path, name):
    text = '{"messages": [{"content": 3.1622776601683795}]}\n'
    pack = PACKINGS.get(Path(name).suffix.lower(), bytes)
    (tmp_path / name).write_bytes(pack(text.encode()))
    for streaming in (False, True):
        (row,) = load_conversations(str(tmp_path / name), "train", streaming=streaming)
        assert "3.1622776601683795" in row["messages"]


def test_the_splits_of_a_folder(tmp_path):
    for name, number in (("train-0", 2), ("train-1", 1), ("test", 4)):
        rows = [{"messages": [{"a": [n] if n else 1}]} for n in range(number)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    folder = str(tmp_path)
    assert len(load_conversations(folder, "train")) == 3
    assert load_conversations(folder, "test[-1:]")[0] == {"messages": '[{"a": [3]}]'}
    assert len(list(load_conversations(folder, "test", streaming=True))) == 4
    assert len(load_conversations(folder, "train[:1]+test[2:]")) == 3
    with pytest.raises(ValueError, match=r"has no split 'dev': it has test, train\."):
        load_conversations(folder, "dev")


def test_other_folders_are_left_to_datasets(tmp_path):
    Dataset.from_list(RECORDS).to_parquet(tmp_path / "train.parquet")
    assert load_conversations(str(tmp_path), "train").num_rows == len(RECORDS)


def test_what_datasets_cannot_read_is_named(tmp_path):
    for name, text in (("train-0", "messages\nx\n"), ("train-1", "chats\nx\n")):
        (tmp_path / f"{name}.csv").write_text(text)
    with pytest.raises(ValueError, match=f"dataset '{tmp_path}' can't be read: "):
        load_conversations(str(tmp_path), "train")


def test_a_byte_order_mark_is_skipped(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"messages": []}\n')
    assert load_conversations(str(path))[0] == {"messages": "[]"}


def test_files_in_other_encodings_are_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes('{"messages": "é"}\n'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 1 is not text in UTF-8"):
        load_conversations(str(path), "train")


def test_changed_files_are_read_again(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"messages": []}\n')
    assert len(load_conversations(str(path), "train")) == 1
    path.write_text('{"messages": []}\n{"messages": []}\n')
    assert len(load_conversations(str(path), "train")) == 2


def _write_at_one_time(path, number):
    """Write a file of one record; like those of archives, it has a fixed time and length."""
    if path.suffix == ".parquet":
        Dataset.from_list([{"text": str(number)}]).to_parquet(path)
    elif path.suffix == ".csv":
        path.write_text(f"text\na{number}\n")
    else:
        path.write_text(json.dumps({"text": str(number)}))
    os.utime(path, ns=(10**18, 10**18))


@pytest.mark.parametrize("name", ["s.jsonl", "s.json", "s.parquet"])
def test_files_of_one_name_size_and_time_are_told_apart(tmp_path, monkeypatch, name):
    for number, folder in enumerate(["one", "two"]):
        (tmp_path / folder).mkdir()
        _write_at_one_time(tmp_path / folder / name, number)
        monkeypatch.chdir(tmp_path / folder)
        assert load_conversations(name)["text"][:] == [str(number)]
    _write_at_one_time(tmp_path / "two" / name, 2)  # in the same place
    assert load_conversations(name)["text"][:] == ["2"]


@pytest.mark.parametrize("name", ["train.jsonl", "train.parquet", "train.csv"])
def test_folders_with_files_of_one_size_and_time_are_told_apart(tmp_path, name):
    texts = []
    for number in range(2):
        _write_at_one_time(tmp_path / name, number)
        texts += load_conversations(str(tmp_path))["text"][:]
    assert len(set(texts)) == 2


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_name_with_brackets_is_first_that_of_a_file(tmp_path, suffix):
    (tmp_path / "runs[2]").mkdir()
    for folder in (tmp_path, tmp_path / "runs[2]"):
        for number, name in enumerate(["a[1]", "a1"]):
            _write_at_one_time(folder / f"{name}{suffix}", number)
        assert load_conversations(str(folder / f"a[1]{suffix}"))["text"][:] == ["0"]
    assert load_conversations(str(tmp_path / f"[a]1{suffix}"))["text"][:] == ["1"]


def test_parquet(tmp_path):
    path = tmp_path / "rows.parquet"
    Dataset.from_list(RECORDS).to_parquet(path)
    assert len(load_conversations(str(path), "train[2:]")) == 6


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"messages": []}\n{"messages": [}\n', "line 2 is not JSON"),
        ("[1, 2]\n", "line 1 must be a JSON object"),
    ],
)
def test_broken_lines_are_named(tmp_path, text, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_conversations(str(path), "train")


def test_a_file_that_is_no_parquet_is_named(tmp_path):
    path = tmp_path / "rows.parquet"
    path.write_text("none")
    with pytest.raises(ValueError, match=r"dataset '.*rows.parquet' can't be read: Parquet"):
        load_conversations(str(path), "train")


def test_empty_files_and_slices_are_errors(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("")
    with pytest.raises(ValueError, match="holds no rows"):
        load_conversations(str(path), "train")
    path.write_text('{"messages": []}\n')
    with pytest.raises(ValueError, match=r"holds none of its 1 row$"):
        load_conversations(str(path), "train[5:]")


def test_a_local_file_has_no_configurations(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"messages": []}\n')
    with pytest.raises(ValueError, match="leave out config"):
        load_conversations(str(path), "train", config="main")
