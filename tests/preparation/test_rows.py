"""Records to rows: their passes, what of them is left out, their layout."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from onepass_trl.chat import ChatFormatError, render_passes
from onepass_trl.preparation import rows
from onepass_trl.preparation.options import PreparationOptions
from onepass_trl.preparation.rows import lay_out, render_record
from tests.chat.tokenizers import small_tokenizer
from tests.chats import TOOL_TURNS, TWO_TURNS

OPTIONS = PreparationOptions()
TOOLS = [{"type": "function", "function": {"name": "search", "parameters": {"type": "object"}}}]
PASSES = [
    {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]},
    {"input_ids": [1, 2, 4], "labels": [-100] * 3},
]


def ids(passes):
    return [(item.token_ids.tolist(), item.trained.tolist()) for item in passes]


def passes_of(record, **options):
    return render_record(record, small_tokenizer("qwen3"), replace(OPTIONS, **options)).passes


@pytest.mark.parametrize(
    ("record", "train_on", "numbers"),
    [
        ({"messages": TWO_TURNS}, "all", [0, 1]),
        ({"messages": TWO_TURNS}, [1], [1]),
        ({"messages": json.dumps(TWO_TURNS)}, "last", [1]),
        ({"conversations": TWO_TURNS}, "all", [0, 1]),
        ({"prompt": TWO_TURNS[:4], "completion": TWO_TURNS[4:]}, "all", [1]),
        ({"prompt": TWO_TURNS[:2], "completion": TWO_TURNS[2:]}, "all", [0, 1]),
        ({"prompt": TWO_TURNS[:2], "completion": TWO_TURNS[2:]}, "last", [1]),
    ],
)
def test_every_form_gives_the_passes_of_its_conversation(record, train_on, numbers):
    tokenizer = small_tokenizer("qwen3")
    every = render_passes(TWO_TURNS, tokenizer)
    found = render_record(record, tokenizer, replace(OPTIONS, train_on=train_on))
    assert ids(found.passes) == ids(every[number] for number in numbers)
    assert found.numbers == [turn.number for turn in found.turns] == numbers
    assert found.messages == TWO_TURNS
    assert (found.invalid, found.has_reasoning) == ([], True)


def test_tools_and_template_arguments_of_the_record():
    tools = passes_of({"messages": TOOL_TURNS, "tools": json.dumps(TOOLS)})
    assert ids(tools) == ids(render_passes(TOOL_TURNS, small_tokenizer("qwen3"), tools=TOOLS))
    off = {"chat_template_kwargs": {"enable_thinking": False}}
    messages = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
    without = passes_of({"messages": messages}, **off)
    assert ids(without) != ids(passes_of({"messages": messages}))
    own = {"messages": messages, "chat_template_kwargs": {"enable_thinking": True}}
    assert ids(passes_of(own, **off)) == ids(passes_of({"messages": messages}))


def test_given_passes_that_train_nothing_are_left_out():
    for given in (PASSES, json.dumps(PASSES)):
        found = render_record({"passes": given}, None, OPTIONS)
        assert ids(found.passes) == [([1, 2, 3], [False, True, True])]
        assert (found.numbers, found.turns, found.has_reasoning) == ([0], [], None)
    with pytest.raises(ChatFormatError, match="train_on='last' chooses is trained"):
        passes_of({"passes": PASSES}, train_on="last")


@pytest.mark.parametrize(
    ("passes", "match"),
    [
        ([], "must be a non-empty list"),
        ([{"input_ids": [1]}], "pass 0 must be a dict"),
        ([{"input_ids": [1, 2], "labels": [-100]}], "of one length"),
        ([{"input_ids": [1.5, 2.0], "labels": [-100, 2.0]}], "whole numbers"),
        (
            [{"input_ids": [1, 2, 3], "labels": [-100, 3, -100]}],
            "pass 0: the label at index 1 is 3",
        ),
        ([{"input_ids": [1, 2], "labels": [1, 2]}], "pass 0: the first token"),
        ([{"input_ids": [1, 2**33], "labels": [-100, 2**33]}], r"less than 2\^31"),
        ([{"input_ids": [1, 2], "labels": [-100, -100]}], "no label .* is trained"),
    ],
)
def test_passes_that_cannot_be_read(passes, match):
    with pytest.raises(ChatFormatError, match=match):
        passes_of({"passes": passes})
    found = render_record({"passes": passes}, None, replace(OPTIONS, invalid_turns="drop"))
    assert (found.passes, len(found.invalid)) == ([], 1)


INVALID = [
    *TWO_TURNS,
    {"role": "user", "content": "3+3?"},
    {"role": "assistant", "content": "6<|im_end|>"},
    {"role": "user", "content": "And 1?"},
    {"role": "assistant", "content": "7"},
]


def test_messages_that_cannot_be_understood():
    with pytest.raises(ChatFormatError, match="message 0 has 'value' and no 'content'"):
        passes_of({"conversations": [{"role": "user", "value": "x"}]})


def test_what_is_left_out():
    tokenizer = small_tokenizer("qwen3")
    with pytest.raises(ChatFormatError, match=r"assistant turn 2 .*special token"):
        render_record({"messages": INVALID}, tokenizer, OPTIONS)
    drop = replace(OPTIONS, invalid_turns="drop")
    found = render_record({"messages": INVALID}, tokenizer, drop)
    assert found.numbers == [0, 1, 3]
    [problem] = found.invalid
    assert problem.startswith("assistant turn 2 (message")
    found = render_record({"messages": "Hi"}, tokenizer, drop)
    assert (found.passes, found.messages) == ([], [])
    assert found.invalid[0].startswith("column 'messages' must be a list of message dicts")


@pytest.mark.parametrize(("verify_rendering", "drops"), [(None, False), (True, True)])
def test_what_is_misread_is_left_out_where_all_is_read(verify_rendering, drops, monkeypatch):
    def check(turn, tokenizer, known):
        if turn.number == 1:
            raise ChatFormatError("misread")

    monkeypatch.setattr(rows, "check_round_trip", check)
    options = replace(OPTIONS, invalid_turns="drop", verify_rendering=verify_rendering)
    arguments = {"messages": INVALID}, small_tokenizer("qwen3"), options
    assert render_record(*arguments).numbers == [0, 1, 3]
    if not drops:
        with pytest.raises(ChatFormatError, match="misread"):
            render_record(*arguments, verify=True)
        return
    found = render_record(*arguments, verify=True)
    assert found.numbers == [0, 3]
    assert found.invalid[1:] == ["misread"]


def test_rows_of_at_most_max_length():
    passes = passes_of({"messages": TWO_TURNS})
    longest = max(map(len, passes))
    left, [row], lost = lay_out(passes, OPTIONS)
    assert (len(left), lost.longest, lost.num_passes) == (2, longest, 0)
    assert longest < len(row) < sum(map(len, passes))
    left, layouts, lost = lay_out(passes, replace(OPTIONS, max_length=longest))
    assert len(left) == sum(layout.num_turns for layout in layouts) == 2
    assert max(map(len, layouts)) <= longest
    left, layouts, lost = lay_out(passes, replace(OPTIONS, max_length=longest - 1, overflow="drop"))
    assert (len(left), len(layouts), lost.num_lost_turns) == (1, 1, 1)
    assert lay_out([], OPTIONS)[:2] == ([], [])


def _deep(levels):
    value = 1
    for _ in range(levels):
        value = {"a": [value]}
    return value


DEEP_TEXT = '{"a": [' * 5000
QUESTION = {"role": "user", "content": "2+2?"}
TALK = [QUESTION, {"role": "assistant", "content": "4"}]


@pytest.mark.parametrize(
    "record",
    [
        {"messages": "[" * 100_000},
        {"messages": json.dumps(TALK)[:-1] + "," + DEEP_TEXT},
        {"messages": TALK, "tools": [_deep(2000)]},
        {"messages": TALK, "tools": "[" + DEEP_TEXT},
        {"messages": TALK, "chat_template_kwargs": DEEP_TEXT},
        {"passes": "[" * 100_000},
        {"passes": [_deep(2000)]},
        {"input_ids": "[" * 100_000},
        {"prompt": "[" * 100_000, "completion": "4"},
    ],
    ids=str.split("messages call tools tools_text kwargs passes_text passes ids prompt"),
)
def test_a_record_that_is_nested_too_deep_is_left_out(record):
    tokenizer = small_tokenizer("qwen3")
    with pytest.raises(ChatFormatError, match="it is nested too deep to be read: make it flatter"):
        render_record(record, tokenizer)
    rendered = render_record(record, tokenizer, PreparationOptions(invalid_turns="drop"))
    assert (rendered.passes, len(rendered.invalid)) == ([], 1)


@pytest.mark.parametrize(
    "record",
    [{"input_ids": [1, [2]]}, {"passes": [{"input_ids": [1, [2]], "labels": [-100, 2]}]}],
    ids=["ids", "passes"],
)
def test_lists_among_token_ids_are_left_out(record):
    rendered = render_record(
        record, small_tokenizer("qwen3"), PreparationOptions(invalid_turns="drop")
    )
    assert "whole numbers" in rendered.invalid[0]


@pytest.mark.parametrize(
    ("record", "match"),
    [
        ({"conversations": [{"from": ["gpt"], "value": "a"}]}, r"message 0 has role \['gpt'\]"),
        ({"prompt": "\ud83d", "completion": "b"}, "the text has an unpaired surrogate"),
        ({"text": "\udc00"}, "the text has an unpaired surrogate"),
        ({"messages": TWO_TURNS, "chat_template_kwargs": {1: 2}}, "set 1, which isn't a row's"),
    ],
)
def test_odd_values_are_errors_of_the_record(record, match):
    with pytest.raises(ChatFormatError, match=match):
        passes_of(record)
    found = render_record(record, small_tokenizer("qwen3"), replace(OPTIONS, invalid_turns="drop"))
    assert (found.passes, len(found.invalid)) == ([], 1)
