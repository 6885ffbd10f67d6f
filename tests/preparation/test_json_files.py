"""Files of JSON: what is damaged is named with its line; an unreadable record can be left out."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma

import pytest
from datasets import Dataset

from onepass_trl import load_conversations
from onepass_trl.chat.errors import ChatFormatError
from onepass_trl.preparation import json_files
from onepass_trl.preparation.datasets import prepare_dataset
from onepass_trl.preparation.json_files import UNREADABLE, read_json
from onepass_trl.preparation.options import PreparationOptions
from onepass_trl.preparation.rows import RowMaker, render_record
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


CHAT = json.loads(GOOD)["messages"]
NOT_TEXT_BUT = {
    "text is a list": ({"text": ["a", "b"]}, "column 'text' must be text, got list: .*convert it"),
    "text is a number": ({"text": 5}, "column 'text' must be text, got int: '5'"),
    "text is a truth value": ({"text": True}, "column 'text' must be text, got bool: 'True'"),
    "text is an object": ({"text": {"a": 1}}, "column 'text' must be text, got dict"),
    "text is a conversation": ({"text": CHAT}, "got list: .* in the column 'messages'"),
    "prompt": ({"prompt": 5, "completion": "a"}, "column 'prompt' must be a list .*, got int: '5'"),
    "prompt is a list": ({"prompt": ["a"], "completion": "b"}, "'prompt' must be .*, got list"),
    "prompt is an object": (
        {"prompt": CHAT[0], "completion": "b"},
        "'prompt' must be a list of message dicts, got dict: .* or give text in both",
    ),
    "completion": ({"prompt": "a", "completion": 5}, "'completion' must be text too, got int: '5'"),
    "completion is a list": (
        {"prompt": "a", "completion": ["b"]},
        "'completion' must be text too, got list",
    ),
    "system": ({"messages": CHAT, "system": 5}, "column 'system' must be text, got int: '5'"),
    "system is a list": ({"messages": CHAT, "system": ["a"]}, "'system' must be text, got list"),
    "content": (
        {"messages": [{"role": "user", "content": 5}, CHAT[1]]},
        "message 0 has content of type int, expected a string or a list of parts",
    ),
    "value": (
        {"conversations": [{"from": "human", "value": 5}, {"from": "gpt", "value": "a"}]},
        "message 0 has content of type int",
    ),
}


@pytest.mark.parametrize(("record", "problem"), NOT_TEXT_BUT.values(), ids=NOT_TEXT_BUT)
@pytest.mark.parametrize("streaming", [False, True])
def test_what_is_not_text_is_not_trained_as_its_json(
    tmp_path, tiny_tokenizer, record, problem, streaming
):
    """As where the record doesn't come from a file."""
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps(record)}\n{GOOD}\n")
    dataset = load_conversations(str(path), streaming=streaming)
    with pytest.raises(ValueError, match=f"row 0 of the train dataset: .*{problem}"):
        list(prepared(dataset, tiny_tokenizer))
    rows = prepared(dataset, tiny_tokenizer, invalid_turns="drop")
    assert [row["num_turns"] for row in rows] == [1]
    with pytest.raises(ChatFormatError, match=problem):
        render_record(record, tiny_tokenizer)


def test_a_column_of_text_may_have_another_name(tmp_path, tiny_tokenizer):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"body": ["a"], "text": 5}\n{"body": "[1]", "text": null}\n')
    dataset = load_conversations(str(path), text_field="body")
    with pytest.raises(ValueError, match=r"row 0 of .*: column 'body' must be text, got list"):
        prepared(dataset, tiny_tokenizer, text_field="body")
    converted = dataset.map(lambda row: {"body": row["body"].strip("[]")})
    rows = prepared(converted, tiny_tokenizer, text_field="body")
    assert tiny_tokenizer.decode(rows[0]["input_ids"]).startswith('"a"')


def test_text_that_is_json_too_is_trained(tmp_path, tiny_tokenizer):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": '["a"]'}))
    [row] = prepared(load_conversations(str(path)), tiny_tokenizer)
    assert tiny_tokenizer.decode(row["input_ids"]).startswith('["a"]')


def test_columns_that_are_not_read_may_hold_anything(tmp_path, tiny_tokenizer):
    path = tmp_path / "rows.jsonl"
    messages = json.loads(GOOD)
    path.write_text(json.dumps({**messages, "text": ["a"], "prompt": 5, "id": 7}))
    [row] = prepared(load_conversations(str(path)), tiny_tokenizer)
    [expected] = prepared(Dataset.from_list([messages]), tiny_tokenizer)
    assert row["input_ids"].tolist() == expected["input_ids"].tolist()
    path.write_text(json.dumps({**messages, "system": 5}))
    [row] = prepared(load_conversations(str(path)), tiny_tokenizer, ignored_columns=["system"])
    assert row["input_ids"].tolist() == expected["input_ids"].tolist()
