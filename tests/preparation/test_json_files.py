"""Files of JSON: what is damaged is named with its line; an unreadable record can be left out."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma

import pytest

from onepass_trl import load_conversations
from onepass_trl.preparation import json_files
from onepass_trl.preparation.datasets import prepare_dataset
from onepass_trl.preparation.json_files import UNREADABLE, read_json
from onepass_trl.preparation.options import PreparationOptions
from onepass_trl.preparation.rows import RowMaker
from tests.chat.tokenizers import SHARED, SHARED_REASON

GOOD = json.dumps(
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
)
BAD = {
    "a lone surrogate in a content": (GOOD.replace("Hi", r"Hi \ud83d"), "an unpaired surrogate"),
    "a lone surrogate in a key": (GOOD.replace("{", r'{"\uDC00": 1, ', 1), "an unpaired surrogate"),
    "a lone surrogate in a column of text": (r'{"text": "\udfff\ud83d"}', "an unpaired surrogate"),
    "a long number": (GOOD.replace("{", f'{{"id": {"9" * 5000}, ', 1), "more than 4300 digits"),
    "a long number in arguments": (GOOD.replace('"Hi"', "-" + "1" * 9999), "more than 4300 digits"),
    "deep lists": (f'{{"messages": {"[" * 100_000}{"]" * 100_000}}}', "nested too deep"),
    "a key twice": (
        '{"messages": [{"role": "user", "content": "2+2?"}, '
        '{"role": "assistant", "content": "4", "content": "5"}]}',
        "an object with the key 'content' twice; keep one",
    ),
    "a column twice": (
        '{"text": "2 and 2 are 4.", "text": "2 and 2 are 5."}',
        "an object with the key 'text' twice; keep one",
    ),
}


def prepared(dataset, tokenizer, **options):
    maker = RowMaker(tokenizer, PreparationOptions(verify_rendering=False, **options))
    return prepare_dataset(dataset, dataset.column_names, maker, "train")


@pytest.mark.parametrize(("line", "problem"), BAD.values(), ids=BAD)
@pytest.mark.parametrize("streaming", [False, True])
def test_a_record_that_cannot_be_read(tmp_path, tiny_tokenizer, caplog, line, problem, streaming):
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{GOOD}\n{line}\n\n{GOOD}\n")
    dataset = load_conversations(str(path), streaming=streaming)
    match = f"row 1 of the train dataset: {path}, line 2 (has|is) .*{problem}"
    with pytest.raises(ValueError, match=match):
        list(prepared(dataset, tiny_tokenizer))
    rows = prepared(dataset, tiny_tokenizer, invalid_turns="drop")
    assert [row["num_turns"] for row in rows] == [1, 1]
    assert f"row 1: {path}, line 2" in caplog.text


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.is_dir(), reason=SHARED_REASON)
def test_the_shared_lone_surrogate(tiny_tokenizer):
    path = SHARED / "cases" / "lone_surrogate.jsonl"
    dataset = load_conversations(str(path))
    with pytest.raises(ValueError, match=f"{path}, line 2 has an unpaired surrogate"):
        prepared(dataset, tiny_tokenizer)
    assert len(prepared(dataset, tiny_tokenizer, invalid_turns="drop")) == 1


def test_elements_of_a_list(tmp_path):
    path = tmp_path / "rows.json"
    emoji, lone = r'{"text": "\ud83d\ude00"}', r'{"text": "\ud83d"}'
    path.write_text(f"[{emoji}, {lone}]")
    first, second = read_json(str(path))
    assert first == {"text": "😀"}
    assert second == {
        UNREADABLE: f"{path}, element 1 has an unpaired surrogate, which no tokenizer encodes; "
        "remove it"
    }
    path.write_text(f'[{{"id": {"9" * 5000}}}]')
    with pytest.raises(ValueError, match=f"{path} has a number of more than 4300 digits"):
        list(read_json(str(path)))


@pytest.mark.parametrize(
    ("ending", "pack"), [("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress)]
)
def test_a_file_that_is_damaged(tmp_path, ending, pack):
    path = tmp_path / f"rows.jsonl.{ending}"
    data = pack("".join(f'{{"id": "{n**99}"}}\n' for n in range(9999)).encode())
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=rf"{path} is cut off or damaged after line \d*: "):
        load_conversations(str(path))
    path.write_bytes(b"no archive")
    with pytest.raises(ValueError, match=rf"{path} is cut off or damaged after line 0: "):
        load_conversations(str(path))


def test_what_the_system_refuses_is_said_by_the_system(tmp_path):
    with pytest.raises(IsADirectoryError, match="Is a directory"):
        list(read_json(str(tmp_path)))


@pytest.mark.parametrize("name", ["rows.txt", "rows.jsonl.zst", "rows.csv", "rows", "rows.jsonl2"])
def test_other_files_are_named(tmp_path, name):
    path = tmp_path / name
    path.write_text(GOOD)
    remedy = {"rows.txt": r'{"text": \.\.}', "rows.jsonl.zst": "decompress"}.get(
        name, "convert it|or rename"
    )
    match = rf"{name}' isn't of the files that are read, \.jsonl, .*\.parquet; .*({remedy})"
    with pytest.raises(ValueError, match=match):
        load_conversations(str(path))


@pytest.mark.parametrize(("packing", "pack"), [(".gz", gzip), (".bz2", bz2), (".xz", lzma)])
@pytest.mark.parametrize("kind", [".jsonl", ".json"])
def test_a_file_that_unpacks_without_end_is_named(tmp_path, monkeypatch, packing, pack, kind):
    monkeypatch.setattr(json_files, "_LEAST_LIMIT", 100_000)
    path = tmp_path / f"rows{kind}{packing}"
    path.write_bytes(pack.compress(GOOD.encode() + b"\n" * 2))
    assert len(list(read_json(str(path)))) == 1
    path.write_bytes(pack.compress(b" " * 10**7))
    limit = max(100_000, 200 * path.stat().st_size)
    with pytest.raises(
        ValueError, match=f"{path.name} holds more than {limit} bytes, over 200 times"
    ):
        list(read_json(str(path)))
