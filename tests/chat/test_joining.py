"""What the assistant says in several messages is one turn, or an error on every template."""

from __future__ import annotations

import json

import pytest

from onepass_trl.chat import ChatFormatError, read_conversation
from tests.chat.families import CASES
from tests.chat.tokenizers import SHARED, SHARED_REASON, small_tokenizer
from tests.chat.turns import render_turns

TEMPLATES = sorted({case.template for case in CASES.values()})
CALLING = ("qwen3", "glm4moe", "deepseekv3", "nemotron_3_nano")

QUESTION = {"role": "user", "content": "Warm in Rome?"}
RESULT = {"role": "tool", "name": "weather", "content": "28"}
ANSWER = {"role": "assistant", "content": "Yes."}


def call(city):
    return {"type": "function", "function": {"name": "weather", "arguments": {"city": city}}}


def said(content="", *cities, **more):
    calls = {"tool_calls": [call(city) for city in cities]} if cities else {}
    return {"role": "assistant", "content": content, **calls, **more}


def rendered(template, messages, **kwargs):
    turns = render_turns(messages, small_tokenizer(template), **kwargs)
    return [(turn.context, turn.completion) for turn in turns]


PARTS = {
    "text and call": ([said("I look."), said("", "Rome")], said("I look.", "Rome")),
    "calls": ([said("", "Rome"), said("", "Oslo")], said("", "Rome", "Oslo")),
    "three": (
        [said("I look."), said("", "Rome"), said("", "Oslo"), said("", "Bern")],
        said("I look.", "Rome", "Oslo", "Bern"),
    ),
    "thought, text and call": (
        [said(reasoning="Where?"), said("I look."), said("", "Rome")],
        said("I look.", "Rome", reasoning="Where?"),
    ),
    "thought and call": (
        [said("<think>\nWhere?\n</think>\n\n"), said("", "Rome")],
        said("", "Rome", reasoning="Where?"),
    ),
}


@pytest.mark.parametrize(
    ("template", "parts"),
    [
        *((template, parts) for template in CALLING for parts in PARTS),
        *(("qwen2_5", parts) for parts in PARTS if "thought" not in parts),
    ],
)
def test_parts_of_a_turn_are_joined(template, parts):
    split, whole = PARTS[parts]
    results = [RESULT] * len(whole["tool_calls"])
    messages = [[QUESTION, *turn, *results, ANSWER] for turn in (split, [whole])]
    joined, expected = (rendered(template, each) for each in messages)
    assert joined == expected
    assert len(joined) == 2


def test_numbers_and_messages_of_joined_turns():
    messages = [QUESTION, said("I look."), said("", "Rome"), RESULT, ANSWER]
    first, second = render_turns(messages, small_tokenizer("qwen3"))
    assert [first.number, second.number] == [1, 2]
    assert [first.index, second.index] == [1, 3]
    assert first.message["content"] == "I look."
    assert [m["role"] for m in second.messages] == ["user", "assistant", "tool", "assistant"]
    assert "assistant turn 2 (message 4," in second.name
    assert [turn.number for turn in render_turns(messages, small_tokenizer("qwen3"), train_on=[2])]
    assert rendered("qwen3", messages, train_on=[0, 1]) == rendered("qwen3", messages)[:1]


def test_a_turn_of_which_a_part_is_trained():
    messages = [QUESTION, said("I look."), said("", "Rome"), RESULT, ANSWER]
    for train_on in ([0], [1, 2]):
        match = r"messages 1 to 2 are one turn .*, of which only a part would be trained"
        with pytest.raises(ChatFormatError, match=match):
            rendered("qwen3", messages, train_on=train_on)
    messages[1] = said("I look.", train=False)
    with pytest.raises(ChatFormatError, match=r"turn 1 \(message 2, .*the message before it is"):
        rendered("qwen3", messages)
    messages[2] = said("", "Rome", train=False)
    assert rendered("qwen3", messages) == rendered(
        "qwen3", [QUESTION, said("I look.", "Rome", train=False), RESULT, ANSWER]
    )


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize(
    "second", [said("It is."), said("It is.", "Rome"), said("", "Rome", reasoning="Where?")]
)
def test_other_messages_in_a_row_are_errors(template, second):
    messages = [QUESTION, said("Yes."), second]
    for train_on, where in ((("all"), "after"), ([1], "before")):
        with pytest.raises(ChatFormatError, match=f"the message {where} it is from the assistant"):
            rendered(template, messages, train_on=train_on)


@pytest.mark.parametrize("role", ["tool_call", "function_call", "tool-calls", "functionCall"])
def test_calls_in_a_role_of_their_own(role):
    function = {"name": "weather", "arguments": {"city": "Rome"}}
    messages = [QUESTION, {"role": role, "content": json.dumps(function)}, RESULT, ANSWER]
    expected = rendered("qwen3", [QUESTION, said("", "Rome"), RESULT, ANSWER])
    assert rendered("qwen3", messages) == expected
    for content in ([function], json.dumps([function]), f"\n{json.dumps(function)}"):
        messages[1]["content"] = content
        assert rendered("qwen3", messages) == expected
    record = {"prompt": messages[:1], "completion": messages[1:]}
    assert read_conversation(record).train_on == [0, 1]
    messages.insert(1, said("I look."))
    assert "I look." in rendered("qwen3", messages)[0][1]
    for wrong in ("weather(Rome)", '{"name": "f", "name": "g"}', "[" * 100_000):
        with pytest.raises(ChatFormatError, match=f"message 1 has role '{role}', .* isn't JSON"):
            rendered("qwen3", [QUESTION, {"role": role, "content": wrong}])


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.is_dir(), reason=SHARED_REASON)
@pytest.mark.parametrize("line", [0, 1])
def test_shared_cases(line):
    lines = (SHARED / "cases" / "consecutive_assistant.jsonl").read_text("utf-8").splitlines()
    messages = read_conversation(json.loads(lines[line])).messages
    first, second = rendered("qwen3", messages)
    assert first[1].startswith("<think>\nI need the tool.\n</think>\n\nLet me look.\n<tool_call>")
    assert first[1].count("<|im_end|>") == 1
    assert "Let me look.\n<tool_call>" in second[0]
    for template in ("gptoss", "llama3_1"):
        with pytest.raises(ChatFormatError, match="assistant turn 1"):
            rendered(template, messages)
