"""Records as plain Python: JSON text decoded, and the nulls that Arrow filled in told apart."""

from __future__ import annotations

import json

import datasets
import pytest
from datasets import Features, Json, LargeList, List, Value

from onepass_trl.chat import ChatFormatError
from onepass_trl.chat.records import QUESTIONS
from onepass_trl.preparation.nulls import read_record
from tests.chats import write_jsonl

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
CALLS = [{"function": {"name": "f", "arguments": {"a": None, "b": {"c": None, "d": 1}}}}]
CLEAN = [{"function": {"name": "f", "arguments": {"b": {"d": 1}}}}]
CALLING = {"role": "assistant", "tool_calls": CALLS, "content": ""}


def calling(calls):
    return {"messages": [{"role": "assistant", "tool_calls": calls}]}


def test_nulls_among_arguments():
    with pytest.raises(ChatFormatError, match="message 0: tool call 0 has a null"):
        read_record(calling(CALLS), null_arguments="error")
    assert read_record(calling(CALLS), null_arguments="keep") == calling(CALLS)
    assert read_record(calling(CALLS), null_arguments="drop") == calling(CLEAN)
    as_text = [{"function": {"name": "f", "arguments": '{"a": null}'}, "type": None}]
    [text] = read_record(calling(as_text))["messages"]
    assert text["tool_calls"][0]["function"]["arguments"] == '{"a": null}'
    with pytest.raises(ChatFormatError, match=r"one of auto, error, keep, drop, got 'kept'"):
        read_record(calling(CALLS), null_arguments="kept")


def test_nulls_of_sharegpt_calls():
    call = {"name": "f", "arguments": {"a": None}}
    record = {"conversations": [{"from": "human"}, {"from": "function_call", "value": call}]}
    with pytest.raises(ChatFormatError, match="message 1: tool call 0 has a null"):
        read_record(record)
    [_, dropped] = read_record(record, null_arguments="drop")["conversations"]
    assert dropped["value"] == {"name": "f", "arguments": {}}
    record["conversations"][1]["value"] = json.dumps(call)
    assert read_record(record) == record
    struct = {"from": Value("string"), "value": {"name": Value("string"), "arguments": {}}}
    record["conversations"][1]["value"] = call
    with pytest.raises(ChatFormatError, match="message 1: tool call 0 has a null"):
        read_record(record, Features({"conversations": List(struct)}))


def test_what_datasets_does_to_arguments(tmp_path):
    """Loading JSON lines keeps arguments of any shape; Dataset.from_list fills them with nulls."""
    calls = [
        [{"function": {"name": "f", "arguments": {"a": 1}}}],
        [{"function": {"name": "g", "arguments": {"b": "x", "c": None}}}],
    ]
    records = [{"messages": [{"role": "assistant", "tool_calls": c, "content": ""}]} for c in calls]
    path = write_jsonl(tmp_path / "records.jsonl", records)
    loaded = datasets.load_dataset(
        "json", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache")
    )
    for record, expected in zip(loaded, calls, strict=True):
        for nulls in ("keep", "auto"):
            [message] = read_record(record, loaded.features, nulls)["messages"]
            assert message["tool_calls"] == expected
    filled = datasets.Dataset.from_list(records)
    for record in filled:
        with pytest.raises(ChatFormatError, match="Arrow struct column"):
            read_record(record, filled.features)
    built = datasets.Dataset.from_list(records, on_mixed_types="use_json")
    assert [record["messages"][0]["tool_calls"] for record in built] == calls


def test_fillers_next_to_json_are_not_taken_for_nulls():
    def keeps(arguments, wrap=List):
        call = {"function": {"name": Value("string"), "arguments": arguments}}
        message = {"role": Value("string"), "metadata": Json(), "tool_calls": wrap(call)}
        try:
            return read_record(calling(CALLS), Features({"messages": wrap(message)}))
        except ChatFormatError:
            return None

    for exact in (keeps(Json()), keeps(Value("string")), keeps(Json(), LargeList)):
        assert exact == calling(CALLS)
    assert keeps({"a": Value("int64")}) is keeps({"a": Value("int64")}, LargeList) is None


def test_nulls_of_tools_are_real_in_json():
    """``"default": null`` is part of the prompt that inference sees."""
    tool = {"name": "f", "default": None}
    assert read_record({"tools": json.dumps([tool])})["tools"] == [tool]
    assert read_record({"tools": [tool]}, Features({"tools": List(Json())}))["tools"] == [tool]
    filled = Features({"tools": List({"name": Value("string"), "default": Value("string")})})
    for features in (filled, None):
        assert read_record({"tools": [tool]}, features)["tools"] == [{"name": "f"}]
    record = {"tools": "", "chat_template_kwargs": '{"a": null}'}
    assert read_record(record) == {"tools": None, "chat_template_kwargs": {"a": None}}
    with pytest.raises(ChatFormatError, match="column 'tools' isn't valid JSON"):
        read_record({"tools": "["})


@pytest.mark.parametrize(
    "record",
    [
        {"messages": CHAT},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        {"prompt": CHAT[:1], "completion": CHAT[1:]},
        {"prompt": CHAT[:1], "completions": ["Hello", *CHAT[1:]]},
        {"passes": [{"input_ids": [1, 2], "labels": [-100, 2]}]},
        {"messages": [], "images": []},
    ],
    ids=lambda record: "-".join(record),
)
def test_lists_may_be_given_as_json_text(record):
    as_text = {key: json.dumps(value) for key, value in record.items()}
    assert read_record(as_text) == record


@pytest.mark.parametrize("text", ["[citation needed", '["a"]', "[1, 2]", " [] of nothing"])
def test_plain_text_that_begins_with_a_bracket_is_still_plain_text(text):
    assert read_record({"prompt": text, "completion": "a"}) == {"prompt": text, "completion": "a"}


def test_only_the_column_that_is_json_text_has_real_nulls():
    prompt, completion = CHAT[:1], [CALLING]
    for record in (
        {"messages": [*prompt, *completion], "images": "[]"},
        {"messages": [*prompt, *completion], "conversations": json.dumps(CHAT)},
        {"prompt": json.dumps(prompt), "completion": completion},
    ):
        with pytest.raises(ChatFormatError, match="message 1: tool call 0 has a null"):
            read_record(record)
    record = {"prompt": prompt, "completion": json.dumps(completion)}
    assert read_record(record) == {"prompt": prompt, "completion": completion}


def test_columns_of_another_form_may_have_any_nulls():
    record = {"messages": CHAT, "prompt": CHAT[:1], "completion": [CALLING]}
    assert read_record(record) == record


def test_nulls_of_completions():
    record = {"prompt": CHAT[:1], "completions": ["Hello", [CALLING], CALLING]}
    with pytest.raises(ChatFormatError, match="completion 1 of 3: message 1: tool call 0 has a n"):
        read_record(record, forms=QUESTIONS)
    read = read_record(record, null_arguments="drop", forms=QUESTIONS)
    clean = {**CALLING, "tool_calls": CLEAN}
    assert read["completions"] == ["Hello", [clean], clean]
    assert read_record(record) == record  # no form of conversations


@pytest.mark.parametrize("column", ["messages", "tools", "input_ids"])
def test_numbers_that_python_does_not_read(column):
    text = f'[{{"id": {"9" * 5000}}}]'
    with pytest.raises(ChatFormatError, match=f"column '{column}' (can't be read|isn't valid)"):
        read_record({"messages": CHAT, column: text})
