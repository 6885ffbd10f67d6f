"""The one form of messages, and what is refused."""

from __future__ import annotations

import json

import pytest

from onepass_trl.chat import ChatFormatError
from onepass_trl.chat.messages import REASONING_KEYS, normalize_messages


def normalize(*messages, inline_reasoning=True):
    return normalize_messages(messages, inline_reasoning=inline_reasoning)


def nested(depth):
    value = {}
    for _ in range(depth - 1):
        value = {"a": value}
    return value


def calling(*calls):
    return {"role": "assistant", "tool_calls": list(calls)}


def test_text_parts_are_joined():
    parts = [
        {"type": "text", "text": "a", "image": None},
        {"type": "input_text", "text": "b"},
        {"type": "output_text", "text": "c", "annotations": []},
        "d",
    ]
    message = {"role": "user", "content": parts}
    assert normalize(message) == [{"role": "user", "content": "a\nb\nc\nd"}]
    [joined] = normalize_messages([message], inline_reasoning=True, part_separator=lambda: "")
    assert joined["content"] == "abcd"
    for parts, text in ([], ""), (["a"], "a"):
        assert normalize({"role": "user", "content": parts}) == [{"role": "user", "content": text}]


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
    assert [message[key] for key in REASONING_KEYS] == ["a"] * 3


@pytest.mark.parametrize("arguments", [{"a": None}, '{"a": null}'])
def test_tool_call_forms(arguments):
    nested = {"id": "1", "type": None, "function": {"name": "f", "arguments": arguments}}
    flat = {"id": "1", "name": "f", "arguments": arguments}
    for call in (nested, flat):
        [message] = normalize(calling(call))
        assert message["tool_calls"] == [
            {"type": "function", "id": "1", "function": {"name": "f", "arguments": {"a": None}}}
        ]


def test_nested_arguments():
    for arguments in (nested(100), json.dumps(nested(100))):
        [message] = normalize(calling({"name": "f", "arguments": arguments}))
        assert message["tool_calls"][0]["function"]["arguments"] == nested(100)


def test_a_call_without_arguments_has_none():
    [message] = normalize(calling({"function": {"name": "f", "arguments": None}}))
    assert message["tool_calls"][0]["function"]["arguments"] == {}


@pytest.mark.parametrize(
    ("content", "reasoning", "answer"),
    [
        ("<think>a</think>b", "a", "b"),
        (" <think>\na\n\n</think>\n\nb", "a", "b"),
        ("<think>\n`</think>` ends it\n</think>\n\nb", "`</think>` ends it", "b"),
        ("<think>'</think>' and \"</think>\"</think>b", "'</think>' and \"</think>\"", "b"),
        ("<think>\na\n</think>\n\nWrite `</think>`.", "a", "Write `</think>`."),
    ],
)
def test_inline_reasoning_ends_at_the_mark_that_isnt_quoted(content, reasoning, answer):
    [message] = normalize({"role": "assistant", "content": content})
    assert (message["reasoning_content"], message["content"]) == (reasoning, answer)


MARKS = [
    "<thinking>\nAdd.\n</thinking>\n\n2",
    "<reasoning>\nAdd.\n</reasoning>\n<answer>2</answer>",
    "<|begin_of_thought|>\nAdd.\n<|end_of_thought|>\n\n2",
    "[THINK]Add.[/THINK]2",
    "\n<Thought>Add.</Thought>2",
    "<seed:think>Add.</seed:think>2",
    "◁think▷Add.◁/think▷2",
    "<think effort='low'>Add.</think>2",
    "<|channel|>analysis<|message|>Add.<|end|>",
]


@pytest.mark.parametrize("content", MARKS)
def test_reasoning_between_other_marks(content):
    message = {"role": "assistant", "content": content}
    with pytest.raises(ChatFormatError, match=r"content with .*give that as 'reasoning_content'"):
        normalize(message)
    assert normalize(message, inline_reasoning=False) == [message]
    assert normalize({**message, "reasoning_content": ""}) == [message]
    [both] = normalize({**message, "reasoning": "Really."})
    assert both["content"] == content


@pytest.mark.parametrize(
    "content",
    [
        "<answer>2</answer>",
        "[1] Think.",
        "2 <thinking>",
        "<b>I</b>",
        "[Analysis of A](https://a.example/b) says so.",
    ],
)
def test_other_marks_are_content(content):
    message = {"role": "assistant", "content": content}
    assert normalize(message) == [message]


MARKS_WITHIN = [
    "Sure.\n\n<thinking>\nAdd.\n</thinking>\n\n2",
    "Sure.\n<thinking>Add</thinking>2",
    "I see. <reasoning>One and one are two.</reasoning> So 2.",
    "Sure.\n<|begin_of_thought|>\nAdd.\n<|end_of_thought|>\n2",
    "So: [THINK]Add.[/THINK]2",
    "So: ◁think▷Add.◁/think▷2",
    "<answer>1</answer>\n<seed:think>No.</seed:think><answer>2</answer>",
    "First.\n<thinking effort='low'>\nAdd\n</thinking>2",
    "Use `<thinking>`.\n<thinking></thinking>\n<thinking>Add.</thinking>",
]


@pytest.mark.parametrize("content", MARKS_WITHIN)
def test_reasoning_between_other_marks_within_an_answer(content):
    message = {"role": "assistant", "content": content}
    with pytest.raises(ChatFormatError, match=r"content with .*give that as 'reasoning_content'"):
        normalize(message)
    assert normalize(message, inline_reasoning=False) == [message]
    assert normalize({**message, "reasoning_content": ""}) == [message]


@pytest.mark.parametrize("content", MARKS_WITHIN)
def test_other_marks_are_texts_of_a_message_that_has_reasoning(content):
    """However it is spelled: whoever gives it says which part of the message it is."""
    inline = [f"<think>\nHm.\n</think>\n\n{content}", f"<think>\n{content}\n</think>\n\n2"]
    given = [{"reasoning_content": "Hm.", "content": content}]
    given += [{"reasoning_content": content, "content": "2"}]
    for text, fields in zip(inline, given, strict=True):
        [expected] = normalize({"role": "assistant", **fields})
        assert normalize({"role": "assistant", "content": text}) == [expected]


@pytest.mark.parametrize(
    "content",
    [
        "Put your thoughts between <thinking> and </thinking>, then answer.",
        "Use <reasoning></reasoning>. Then <answer>..</answer>.",
        "Write <thinking>...</thinking>.",
        "Write `<thinking>Add.</thinking>` first.",
        "It is '<thinking>Add.</thinking>'.",
        "So:\n```xml\n<thinking>\nAdd.\n</thinking>\n```\nOk.",
        "So:\n~~~~\n~~~\n<thinking>\nAdd.\n</thinking>\n~~~~\nOk.",
        "So:\n   ```\n<thinking>\nAdd.\n</thinking>",
        "See\n[Analysis of A](a.html)\n[Analysis of B](b.html).",
        "It ends </thinking>. It begins\n<thinking> Add.",
        "First <thinking> comes.\n<thinking> it is, and <thinking> again.",
        "def f(x):\n    x['enable_thinking'] = 1\n    return x['enable_thinking']",
    ],
)
def test_texts_about_such_marks_are_content(content):
    message = {"role": "assistant", "content": content}
    assert normalize(message) == [message]


ERRORS = [
    ("Hi", r"message 0 must be a dict .* got str"),
    ({"role": "human", "content": "x"}, "role 'human', expected one of system, .* to 'user'"),
    ({"role": "model", "content": "x"}, "role 'model', .*; rename it to 'assistant'"),
    ({"role": "tool_response", "content": "x"}, "role 'tool_response', .*; rename it to 'tool'"),
    ({"role": "narrator", "content": "x"}, "role 'narrator', .*; rename it$"),
    ({"content": "x"}, "has no 'role', expected one of system"),
    ({"role": "User", "content": "x"}, "has role 'User', .*; rename it to 'user'"),
    ({"role": "ASSISTANT", "content": "x"}, "; rename it to 'assistant'"),
    ({"role": "user", "contnet": "x"}, "is a user's and has no 'content'; give it"),
    ({"role": "user", "content": None}, "is a user's and has no 'content'; give it"),
    ({"role": "tool", "contents": "x"}, "has 'contents' and no 'content'; rename it"),
    ({"role": "user", "content": 3}, "content of type int"),
    (
        {"role": "user", "content": [{"type": "image", "url": "x"}]},
        "message 0 has an image in part 0 that can't be used: there is no file 'x'",
    ),
    (
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "x"}]},
        "'thinking'; give its text as 'reasoning_content'",
    ),
    ({"role": "user", "content": [{"type": "text"}]}, "without a 'text'"),
    ({"role": "user", "content": [{"type": "output_text", "text": 1}]}, "without a 'text'"),
    (
        {"role": "assistant", "content": [{"type": "tool_use", "name": "f", "input": {}}]},
        "'tool_use'; give it in the message's 'tool_calls', as",
    ),
    (
        {"role": "user", "content": [{"type": "tool_result", "content": "x"}]},
        "'tool_result'; make it a message of its own, {'role': 'tool'",
    ),
    (
        {"role": "assistant", "content": [{"type": "server-tool-use", "name": "f"}]},
        "'server-tool-use'; give it in the message's 'tool_calls', as",
    ),
    (
        {"role": "user", "content": [{"type": "function_call_output", "output": "x"}]},
        "'function_call_output'; make it a message of its own, {'role': 'tool'",
    ),
    (
        {"role": "assistant", "content": [{"type": "redacted_thinking", "data": "x"}]},
        "nobody can read it, so remove the turn",
    ),
    ({"role": "user", "content": [{"type": "document"}]}, "'document'; give its text as a part"),
    ({"role": "user", "content": [{"type": "input_audio"}]}, "only text and images can be read"),
    ({"role": "user", "content": [{"type": ["image"]}]}, "give it as {'type': 'image'"),
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
    *(
        ({"role": "assistant", "content": content}, r"can't be told where .*'reasoning_content'")
        for content in (
            "<think>It is `</think>`.",
            '<think>He said "yes"</think>"Yes."',
            "<think>\nThe mark (</think>) ends it.\n</think>\n\nTwo.",
            "<think>\nOk.\n</think>\n\nUse </think> there.",
            "<think>a</think><think>b</think>c",
        )
    ),
    ({"role": "assistant", "content": "<think>a </think> b\n</think>\n\nc"}, "</think> 2 times"),
    ({"role": "assistant", "content": "<think>\na\n</think>\nb\n</think>"}, "</think> 2 times"),
    ({"role": "assistant", "tool_calls": "f"}, "tool_calls of type str, expected a list"),
    (calling("f"), "tool call 0 of type str"),
    (calling({"function": "f"}), "function of type str"),
    (calling({"function": {"arguments": {}}}), "tool call 0 without a function name"),
    (calling({"function": {"name": "f", "arguments": [1]}}), "arguments that are list"),
    (calling({"function": {"name": "f", "parameters": {"a": 1}}}), "call 0 with 'parameters'"),
    (calling({"name": "f", "input": {"a": 1}}), "call 0 with 'input', expected 'arguments'"),
    ({"role": "assistant", "content": "x", "function_call": {"name": "f"}}, "the old form of"),
    ({"role": "user", "text": "x"}, "has 'text' and no 'content'; rename it"),
    ({"role": "user", "parts": [{"text": "x"}]}, "has 'parts' and no 'content'; rename it"),
    ({"role": "user", "content": None, "message": "x"}, "has 'message' and no 'content'"),
    ({"role": "tool", "content": "", "output": "x"}, "has 'output' and no 'content'"),
    ({"role": "assistant", "content": "", "answer": "x"}, "has 'answer' and no 'content'"),
    (calling({"function": {"name": "f", "arguments": "[1]"}}), "arguments that are list"),
    (calling({"function": {"name": "f", "arguments": "{a"}}), "aren't valid JSON"),
    (
        calling({"function": {"name": "f", "arguments": '{"a":1,"a":2}'}}),
        "an object with the key 'a' twice",
    ),
    (calling({"function": {"name": "f", "arguments": '{"a":NaN}'}}), "NaN isn't JSON"),
    (calling({"function": {"name": "f", "arguments": {"a": object()}}}), "can't be written"),
    (calling({"name": "f", "arguments": nested(101)}), "nested more than 100 levels deep"),
    (calling({"name": "f", "arguments": nested(100_000)}), "nested more than 100 levels deep"),
    (calling({"name": "f", "arguments": json.dumps(nested(101))}), "nested more than 100"),
    (calling({"name": "f", "arguments": '{"a":' + "[" * 100_000}), "nested more than 100"),
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


@pytest.mark.parametrize("name", ["weight", "loss", "loss_mask", "trainable"])
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
