"""The one form of messages, and what is refused."""

from __future__ import annotations

import pytest

from onepass_trl.chat import ChatFormatError
from onepass_trl.chat.messages import normalize_messages


def normalize(*messages, inline_reasoning=True):
    return normalize_messages(messages, inline_reasoning=inline_reasoning)


def calling(*calls):
    return {"role": "assistant", "tool_calls": list(calls)}


def test_text_parts_are_joined():
    parts = [{"type": "text", "text": "a", "image": None}, {"type": "text", "text": "b"}, "c"]
    assert normalize({"role": "user", "content": parts}) == [{"role": "user", "content": "abc"}]


def test_nulls_and_empty_tool_calls_are_dropped():
    [message] = normalize({"role": "assistant", "content": None, "tool_calls": [], "name": None})
    assert message == {"role": "assistant", "content": ""}


def test_other_keys_are_kept():
    message = {"role": "tool", "content": "x", "tool_call_id": "1", "name": "f"}
    assert normalize(message) == [message]


def test_inline_reasoning_is_left_where_the_template_has_no_reasoning():
    message = {"role": "assistant", "content": "<think>a</think>b"}
    assert normalize(message, inline_reasoning=False) == [message]


def test_equal_reasoning_under_two_names():
    [message] = normalize(
        {
            "role": "assistant",
            "content": "x",
            "thinking": "a",
            "reasoning": "a",
            "reasoning_content": "",
        }
    )
    assert message["reasoning_content"] == message["thinking"] == "a"
    assert "reasoning" not in message


@pytest.mark.parametrize("arguments", [{"a": None}, '{"a": null}'])
def test_tool_call_forms(arguments):
    nested = {"id": "1", "type": None, "function": {"name": "f", "arguments": arguments}}
    flat = {"id": "1", "name": "f", "arguments": arguments}
    for call in (nested, flat):
        [message] = normalize(calling(call))
        assert message["tool_calls"] == [
            {"type": "function", "id": "1", "function": {"name": "f", "arguments": {"a": None}}}
        ]


def test_a_call_without_arguments_has_none():
    [message] = normalize(calling({"function": {"name": "f", "arguments": None}}))
    assert message["tool_calls"][0]["function"]["arguments"] == {}


ERRORS = [
    ("Hi", r"message 0 must be a dict .* got str"),
    ({"role": "human", "content": "x"}, "role 'human', expected one of system, developer"),
    ({"content": "x"}, "role None"),
    ({"role": "user", "content": 3}, "content of type int"),
    ({"role": "user", "content": [{"type": "image", "url": "x"}]}, "'image': vision"),
    (
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "x"}]},
        "'thinking'; give its text as 'reasoning_content'",
    ),
    ({"role": "user", "content": [{"type": "text"}]}, "without a 'text'"),
    ({"role": "user", "content": [3]}, "part of type int"),
    ({"role": "user", "content": "\ud800"}, "surrogate"),
    ({"role": "user", "content": "x", "tool_calls": [1]}, "only assistant messages call tools"),
    ({"role": "user", "content": "x", "train": True}, "train=True and role 'user'"),
    ({"role": "assistant", "content": "x", "train": "no"}, "train='no'"),
    ({"role": "assistant", "content": "x", "reasoning": ["a"]}, "reasoning of type list"),
    (
        {"role": "assistant", "content": "x", "reasoning": "a", "thinking": "b"},
        "different reasoning",
    ),
    ({"role": "assistant", "content": "<think>a</think>x", "thinking": "a"}, "reasoning twice"),
    ({"role": "assistant", "content": "<think>a"}, "never closes"),
    ({"role": "assistant", "tool_calls": "f"}, "tool_calls of type str, expected a list"),
    (calling("f"), "tool call 0 of type str"),
    (calling({"function": "f"}), "function of type str"),
    (calling({"function": {"arguments": {}}}), "tool call 0 without a function name"),
    (calling({"function": {"name": "f", "arguments": [1]}}), "arguments that are list"),
    (calling({"function": {"name": "f", "parameters": {"a": 1}}}), "call 0 with 'parameters'"),
    (calling({"name": "f", "input": {"a": 1}}), "call 0 with 'input', expected 'arguments'"),
    ({"role": "assistant", "content": "x", "function_call": {"name": "f"}}, "the old form of"),
    ({"role": "user", "text": "x"}, "has 'text' and no 'content'; rename it"),
    (calling({"function": {"name": "f", "arguments": "[1]"}}), "arguments that are list"),
    (calling({"function": {"name": "f", "arguments": "{a"}}), "aren't valid JSON"),
    (calling({"function": {"name": "f", "arguments": '{"a":1,"a":2}'}}), "stands twice"),
    (calling({"function": {"name": "f", "arguments": '{"a":NaN}'}}), "NaN isn't JSON"),
    (calling({"function": {"name": "f", "arguments": {"a": object()}}}), "can't be written"),
    (calling({"function": {"name": "f", "arguments": {"a": float("nan")}}}), "can't be written"),
]


@pytest.mark.parametrize(("message", "match"), ERRORS)
def test_errors(message, match):
    with pytest.raises(ChatFormatError, match=match):
        normalize(message)


@pytest.mark.parametrize("messages", ["Hi", {"role": "user"}, 3])
def test_messages_must_be_a_list(messages):
    with pytest.raises(ChatFormatError, match="must be a list"):
        normalize_messages(messages, inline_reasoning=True)


@pytest.mark.parametrize("name", ["weight", "loss", "trainable"])
def test_flags_of_other_names_are_train_flags(name):
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "A", name: 0},
        {"role": "assistant", "content": "B", name: 1},
    ]
    flags = [m.get("train") for m in normalize_messages(messages, inline_reasoning=True)]
    assert flags == [None, False, True]
    with pytest.raises(ChatFormatError, match=rf"message 0 has {name}=0\.5"):
        normalize_messages(
            [{"role": "assistant", "content": "A", name: 0.5}], inline_reasoning=True
        )
