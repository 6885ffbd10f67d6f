"""The forms of dataset rows."""

from __future__ import annotations

import json

import datasets
import pytest

from onepass_trl.chat import ChatFormatError, render_passes, row_to_conversation, row_to_passes
from tests.chat.tokenizers import small_tokenizer
from tests.chats import TOOL_TURNS, TWO_TURNS

TOOLS = [{"type": "function", "function": {"name": "search", "parameters": {"type": "object"}}}]
CALLS = [{"function": {"name": "f", "arguments": {"a": None, "b": {"c": None, "d": 1}}}}]

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def ids(passes):
    return [(item.token_ids.tolist(), item.trained.tolist()) for item in passes]


def calling(calls):
    return {"messages": [{"role": "assistant", "tool_calls": calls}]}


def test_messages_with_tools_and_template_arguments_as_json():
    filled = [{"type": "function", "function": {**TOOLS[0]["function"], "strict": None}}]
    for tools, kwargs in ((filled, {"a": 1, "b": None}), (json.dumps(TOOLS), '{"a": 1}')):
        row = {"messages": TWO_TURNS, "tools": tools, "chat_template_kwargs": kwargs, "id": 3}
        conversation = row_to_conversation(row)
        assert conversation.messages == TWO_TURNS
        assert conversation.tools == TOOLS
        assert conversation.chat_template_kwargs == {"a": 1}
        assert conversation.train_on == "all"


def test_nulls_of_tools_in_json_text_are_real():
    """``"default": null`` is part of the prompt that inference sees."""
    row = {"messages": TWO_TURNS, "tools": '[{"name": "f", "default": null}]'}
    assert row_to_conversation(row).tools == [{"name": "f", "default": None}]


def test_only_the_completion_is_trained():
    tokenizer = small_tokenizer("qwen3")
    every = render_passes(TWO_TURNS, tokenizer)
    row = {"prompt": TWO_TURNS[:4], "completion": TWO_TURNS[4:]}
    assert row_to_conversation(row).train_on == [1]
    assert ids(row_to_passes(row, tokenizer)) == ids(every[1:])
    row = {"prompt": TWO_TURNS[:2], "completion": TWO_TURNS[2:]}
    assert ids(row_to_passes(row, tokenizer)) == ids(every)
    assert ids(row_to_passes(row, tokenizer, train_on="last")) == ids(every[1:])
    with pytest.raises(ChatFormatError, match="lists turns, but the row's 'completion'"):
        row_to_passes(row, tokenizer, train_on=[0])


def test_sharegpt():
    call = {"name": "search", "arguments": {"query": "x"}}
    conversations = [
        {"from": "human", "value": "Search.", "reasoning": None},
        {"from": "function_call", "value": f"<think>Hm</think>{json.dumps(call)}"},
        {"from": "observation", "value": "found"},
        {"from": "gpt", "value": "Found it.", "reasoning_content": "There."},
    ]
    as_text = {**call, "arguments": json.dumps(call["arguments"])}  # its nulls are real
    row = {"conversations": conversations, "system": "Be brief."}
    assert row_to_conversation(row).messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Search."},
        {"role": "assistant", "content": "<think>Hm</think>", "tool_calls": [as_text]},
        {"role": "tool", "content": "found"},
        {"role": "assistant", "content": "Found it.", "reasoning_content": "There."},
    ]
    tokenizer = small_tokenizer("qwen3")
    assert len(row_to_passes(row, tokenizer)) == 2
    roles = {"conversations": TWO_TURNS}
    assert ids(row_to_passes(roles, tokenizer)) == ids(render_passes(TWO_TURNS, tokenizer))


def test_the_row_decides_over_the_caller():
    tokenizer = small_tokenizer("qwen3")
    own = row_to_passes({"messages": TOOL_TURNS, "tools": TOOLS}, tokenizer, tools=[])
    assert ids(own) == ids(row_to_passes({"messages": TOOL_TURNS}, tokenizer, tools=TOOLS))


def test_nulls_among_arguments():
    with pytest.raises(ChatFormatError, match="message 0: tool call 0 has a null"):
        row_to_conversation(calling(CALLS))
    [kept] = row_to_conversation(calling(CALLS), null_arguments="keep").messages
    assert kept["tool_calls"] == CALLS
    [dropped] = row_to_conversation(calling(CALLS), null_arguments="drop").messages
    assert dropped["tool_calls"] == [{"function": {"name": "f", "arguments": {"b": {"d": 1}}}}]
    as_text = [{"function": {"name": "f", "arguments": '{"a": null}'}, "type": None}]
    [text] = row_to_conversation(calling(as_text)).messages
    assert text["tool_calls"][0]["function"]["arguments"] == '{"a": null}'


def test_what_datasets_does_to_arguments(tmp_path):
    """Loading JSON lines keeps arguments of any shape; Dataset.from_list fills them with nulls."""
    calls = [
        [{"function": {"name": "f", "arguments": {"a": 1}}}],
        [{"function": {"name": "g", "arguments": {"b": "x", "c": None}}}],
    ]
    rows = [{"messages": [{"role": "assistant", "tool_calls": c, "content": ""}]} for c in calls]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    loaded = datasets.load_dataset(
        "json", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache")
    )
    for row, expected in zip(loaded, calls, strict=True):
        [message] = row_to_conversation(row, null_arguments="keep").messages
        assert message["tool_calls"] == expected
    for row in datasets.Dataset.from_list(rows):
        with pytest.raises(ChatFormatError, match="Arrow struct column"):
            row_to_conversation(row)
    built = datasets.Dataset.from_list(rows, on_mixed_types="use_json")
    assert [row["messages"][0]["tool_calls"] for row in built] == calls


def test_given_passes():
    row = {"passes": [{"input_ids": [1, 2, 3], "labels": [-100, -100, 3]}]}
    [item] = row_to_passes(row, small_tokenizer("qwen3"))
    assert ids([item]) == [([1, 2, 3], [False, False, True])]


ERRORS = [
    ({"messages": TWO_TURNS, "images": ["x"]}, "vision data in column 'images'"),
    ({"text": "a"}, "plain text in column 'text'.*SFTTrainer trains the same"),
    ({"prompt": "a", "completion": "b"}, "plain text in column 'prompt'"),
    ({"a": 1, "b": 2}, "none of the accepted forms: 'messages'.*columns are 'a', 'b'"),
    ({}, "columns are none"),
    ({"prompt": TWO_TURNS}, "none of the accepted forms"),
    ({"messages": None}, r"columns are 'messages' \(null\)"),
    ({"prompt": TWO_TURNS, "completion": TWO_TURNS[:1]}, "no assistant message"),
    ({"messages": "Hi"}, "must be a list of message dicts, got str"),
    ({"messages": ["Hi"]}, "must be a list of message dicts"),
    ({"conversations": [{"from": "human"}]}, "message 0 of 'conversations' must have"),
    ({"conversations": [{"role": "user", "value": "x"}]}, "message 0 has 'value' and no 'content'"),
    ({"conversations": [{"from": "function_call", "value": "x"}]}, "isn't JSON"),
    ({"conversations": TWO_TURNS, "system": "x"}, "keep one"),
    ({"messages": TWO_TURNS, "tools": "["}, "column 'tools' isn't valid JSON"),
    ({"messages": TWO_TURNS, "tools": {"a": 1}}, "column 'tools' must be a list"),
    ({"messages": TWO_TURNS, "chat_template_kwargs": "[]"}, "must be a dict"),
    ({"passes": []}, "must be a non-empty list"),
    ({"passes": [{"input_ids": [1]}]}, "pass 0 must be a dict"),
    ({"passes": [{"input_ids": [1, 2], "labels": [-100]}]}, "of one length"),
    ({"passes": [{"input_ids": [1.5, 2.0], "labels": [-100, 2.0]}]}, "whole numbers"),
    ({"passes": [{"input_ids": [1, 2, 3], "labels": [-100, 3, -100]}]}, "label 3 at index 1"),
    ({"passes": [{"input_ids": [1, 2], "labels": [1, 2]}]}, "pass 0: the first token"),
    ({"passes": [{"input_ids": [1, 2**33], "labels": [-100, 2**33]}]}, r"less than 2\^31"),
    ({"passes": [{"input_ids": [1, 2], "labels": [-100, -100]}]}, "no label .* is trained"),
]


@pytest.mark.parametrize(("row", "match"), ERRORS)
def test_errors(row, match):
    with pytest.raises(ChatFormatError, match=match):
        row_to_passes(row, small_tokenizer("qwen3"))


@pytest.mark.parametrize("column", ["messages", "conversations", "prompt"])
def test_lists_may_be_given_as_json_text(column):
    row = {
        "messages": {"messages": CHAT},
        "conversations": {
            "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
        },
        "prompt": {"prompt": CHAT[:1], "completion": CHAT[1:]},
    }[column]
    as_text = {key: json.dumps(value) for key, value in row.items()}
    assert row_to_conversation(as_text) == row_to_conversation(row)


def test_nulls_in_json_text_are_real():
    call = {"function": {"name": "search", "arguments": {"query": "x", "limit": None}}}
    messages = [{"role": "user", "content": "Go"}, {"role": "assistant", "tool_calls": [call]}]
    with pytest.raises(ChatFormatError, match="null among its arguments"):
        row_to_conversation({"messages": messages})
    kept = row_to_conversation({"messages": json.dumps(messages)}).messages
    assert kept[1]["tool_calls"][0]["function"]["arguments"] == {"query": "x", "limit": None}


def test_only_the_column_that_is_json_text_has_real_nulls():
    prompt, completion = CHAT[:1], [{"role": "assistant", "tool_calls": CALLS, "content": ""}]
    for row in (
        {"messages": [*prompt, *completion], "images": "[]"},
        {"messages": [*prompt, *completion], "conversations": json.dumps(CHAT)},
        {"prompt": json.dumps(prompt), "completion": completion},
    ):
        with pytest.raises(ChatFormatError, match="message 1: tool call 0 has a null"):
            row_to_conversation(row)
    row = {"prompt": prompt, "completion": json.dumps(completion)}
    assert row_to_conversation(row).messages == [*prompt, *completion]


@pytest.mark.parametrize("column", ["messages", "conversations", "completion"])
def test_a_system_prompt_may_stand_beside_the_messages(column):
    rest = (
        {"prompt": CHAT[:1], "completion": CHAT[1:]} if column == "completion" else {column: CHAT}
    )
    system = {"role": "system", "content": "Be brief."}
    conversation = row_to_conversation({**rest, "system": "Be brief."})
    assert conversation.messages == [system, *CHAT]
    assert conversation.train_on == ([0] if column == "completion" else "all")


def test_given_passes_that_train_nothing_are_left_out():
    passes = [
        {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]},
        {"input_ids": [1, 2, 4], "labels": [-100] * 3},
    ]
    [item] = row_to_passes({"passes": passes}, None)
    assert item.token_ids.tolist() == [1, 2, 3]
    with pytest.raises(ChatFormatError, match="train_on='last' chooses is trained"):
        row_to_passes({"passes": passes}, None, train_on="last")


def test_plain_text_that_begins_with_a_bracket_is_still_plain_text():
    with pytest.raises(ChatFormatError, match="plain text in column 'prompt'"):
        row_to_conversation({"prompt": "[citation needed", "completion": "a"})


def test_passes_may_be_given_as_json_text():
    passes = [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}]
    (made,) = row_to_passes({"passes": json.dumps(passes)}, None)
    assert made.token_ids.tolist() == [1, 2, 3]
    assert made.trained.tolist() == [False, True, True]
