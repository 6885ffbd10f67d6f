"""The forms in which conversations are stored."""

from __future__ import annotations

import json

import pytest

from onepass_trl.chat import ChatFormatError, read_conversation
from onepass_trl.chat.records import read_question
from tests.chats import TWO_TURNS

TOOLS = [{"type": "function", "function": {"name": "search", "parameters": {"type": "object"}}}]
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


@pytest.mark.parametrize("tools", [[], None, "absent"])
def test_an_empty_list_of_tools_is_none(tools):
    """Datasets fill the column so; Llama 3.1's template would say that there are functions."""
    record = {"messages": TWO_TURNS} | ({} if tools == "absent" else {"tools": tools})
    assert read_conversation(record).tools is None


def test_messages_with_tools_and_template_arguments():
    record = {"messages": TWO_TURNS, "tools": TOOLS, "chat_template_kwargs": {"a": 1}, "id": 3}
    conversation = read_conversation(record)
    assert conversation.messages == TWO_TURNS
    assert conversation.tools == TOOLS
    assert conversation.chat_template_kwargs == {"a": 1}
    assert conversation.train_on == "all"


def test_only_the_completion_is_trained():
    conversation = read_conversation({"prompt": TWO_TURNS[:4], "completion": TWO_TURNS[4:]})
    assert conversation.messages == TWO_TURNS
    assert conversation.train_on == [1]
    assert [conversation.trained(train_on) for train_on in ("all", "last")] == [[1], "last"]
    with pytest.raises(ChatFormatError, match="lists turns, but the row's 'completion'"):
        conversation.trained([0])
    assert read_conversation({"messages": TWO_TURNS}).trained([0]) == [0]


def test_sharegpt():
    call = {"name": "search", "arguments": {"query": "x"}}
    conversations = [
        {"from": "human", "value": "Search.", "reasoning": None},
        {"from": "function_call", "value": f"<think>Hm</think>{json.dumps(call)}"},
        {"from": "observation", "value": "found"},
        {"from": "gpt", "value": "Found it.", "reasoning_content": "There."},
    ]
    record = {"conversations": conversations, "system": "Be brief."}
    assert read_conversation(record).messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Search."},
        {"role": "assistant", "content": "<think>Hm</think>", "tool_calls": [call]},
        {"role": "tool", "content": "found"},
        {"role": "assistant", "content": "Found it.", "reasoning_content": "There."},
    ]
    assert read_conversation({"conversations": TWO_TURNS}).messages == TWO_TURNS


ERRORS = [
    ({"messages": TWO_TURNS, "images": ["x"]}, "image 0 of column 'images': there is no file 'x'"),
    ({"messages": TWO_TURNS, "audio": {"path": "x"}}, "column 'audio', but video and audio aren't"),
    ({"text": "a"}, "none of the accepted forms: .*columns are 'text'"),
    ({"prompt": "a", "completion": "b"}, "column 'prompt' must be a list of message dicts"),
    ({"a": 1, "b": 2}, "none of the accepted forms: 'messages'.*columns are 'a', 'b'"),
    ({}, "columns are none"),
    ({"prompt": TWO_TURNS}, "none of the accepted forms"),
    ({"messages": None}, r"columns are 'messages' \(null\)"),
    ({"prompt": TWO_TURNS, "completion": TWO_TURNS[:1]}, "no assistant message"),
    ({"messages": "Hi"}, "must be a list of message dicts, got str"),
    ({"messages": ["Hi"]}, "must be a list of message dicts"),
    ({"conversations": [{"from": "human"}]}, "message 0 of 'conversations' must have"),
    ({"conversations": [{"from": "function_call", "value": "x"}]}, "isn't JSON"),
    ({"conversations": TWO_TURNS, "system": "x"}, "keep one"),
    ({"messages": TWO_TURNS, "tools": {"a": 1}}, "column 'tools' must be a list"),
    ({"messages": TWO_TURNS, "chat_template_kwargs": []}, "must be a dict"),
]


@pytest.mark.parametrize(("record", "match"), ERRORS)
def test_errors(record, match):
    with pytest.raises(ChatFormatError, match=match):
        read_conversation(record)


@pytest.mark.parametrize("column", ["messages", "conversations", "completion"])
def test_a_system_prompt_may_accompany_the_messages(column):
    rest = (
        {"prompt": CHAT[:1], "completion": CHAT[1:]} if column == "completion" else {column: CHAT}
    )
    system = {"role": "system", "content": "Be brief."}
    conversation = read_conversation({**rest, "system": "Be brief."})
    assert conversation.messages == [system, *CHAT]
    assert conversation.train_on == ([0] if column == "completion" else "all")


def test_questions():
    answer = CHAT[1]
    record = {"prompt": CHAT[:1], "completions": [answer, [answer], "Hello"], "system": "Be brief."}
    question = read_question({**record, "tools": TOOLS, "chat_template_kwargs": {"a": 1}})
    assert question.prompt == [{"role": "system", "content": "Be brief."}, *CHAT[:1]]
    assert question.completions == [answer] * 3
    assert (question.tools, question.chat_template_kwargs) == (TOOLS, {"a": 1})
    text = read_question({"prompt": "Hi", "completions": ["Hello"]})
    assert (text.prompt, text.completions, text.tools) == ("Hi", ["Hello"], None)


@pytest.mark.parametrize(
    ("record", "match"),
    [
        ({"prompt": CHAT[:1]}, "has no completions, only 'prompt'"),
        ({"messages": CHAT}, "has no prompt and no completions, only 'messages'"),
        ({"prompt": CHAT[:1], "completions": []}, "at least one assistant message"),
        ({"prompt": CHAT[:1], "completions": "four"}, "at least one assistant message"),
        ({"prompt": CHAT[:1], "completions": ["x", CHAT[0]]}, "completion 1 of 2: it must be one"),
        ({"prompt": CHAT[:1], "completions": [[]]}, "must be one assistant message"),
        ({"prompt": ["Hi"], "completions": ["x"]}, "'prompt' must be a list of message dicts"),
        (
            {"prompt": "Hi", "system": "x", "completions": ["x"]},
            "'system', which isn't read. Give it in the prompt",
        ),
        ({"prompt": "Hi", "tools": "f", "completions": ["x"]}, "column 'tools' must be a list"),
    ],
)
def test_questions_that_cannot_be_read(record, match):
    with pytest.raises(ChatFormatError, match=match):
        read_question(record)
