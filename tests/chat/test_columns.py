"""Columns that aren't read: an error where they may change what is trained, else said once."""

from __future__ import annotations

import json

import pytest

from onepass_trl.chat import ChatFormatError, columns, read_conversation
from onepass_trl.chat.records import read_question
from onepass_trl.preparation.options import PreparationOptions
from onepass_trl.preparation.rows import render_record

CHAT = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]
SHAREGPT = [{"from": "human", "value": "1+1?"}, {"from": "gpt", "value": "2"}]
OFF = "'train' .true or false."
REASONING = "as 'reasoning_content' of its message, or in the column 'chat_template_kwargs'"
MEANT = [
    *(("loss_mask", mask, OFF) for mask in ([0, 1], [1], "[0, 1]", 0, True)),
    *((name, [0, 1], OFF) for name in ("mask", "train", "trainMask", "trainable_turns")),
    *(
        (name, value, "count alike")
        for name in ("weight", "sample_weights")
        for value in (0.5, [0])
    ),
    *(("enable_thinking", value, REASONING) for value in (False, True, "false")),
    *((name, "low", REASONING) for name in ("reasoning_effort", "thinking_mode", "effort")),
    *((name, "Add.", REASONING) for name in ("reasoning", "thinking", "cot", "chainOfThought")),
    *((name, [{"name": "f"}], "in the column 'tools'") for name in ("functions", "tool_list")),
    ("functions", '[{"name": "f"}]', "in the column 'tools'"),
    *((name, "Be brief.", "in the column 'system'") for name in ("system_prompt", "systemMessage")),
    ("developer", "Be brief.", "in the column 'system'"),
    *(("label", value, "a bad one, remove the row") for value in (False, "false")),
    *((name, [["1+1?", "2"]], "in the messages") for name in ("history", "documents")),
]


@pytest.fixture(autouse=True)
def nothing_said_yet(monkeypatch):
    monkeypatch.setattr(columns, "_said", set())


@pytest.mark.parametrize(("name", "value", "remedy"), MEANT)
def test_a_column_that_changes_what_is_trained_or_seen_is_named(name, value, remedy):
    match = f"column '{name}', which isn't read. .*{remedy}"
    forms = [
        {"messages": CHAT},
        {"prompt": CHAT[:1], "completion": CHAT[1:]},
        {"conversations": SHAREGPT, "system": "Add."},
    ]
    for form in forms:
        with pytest.raises(ChatFormatError, match=match):
            read_conversation({**form, name: value})
    with pytest.raises(ChatFormatError, match=match):
        read_question({"prompt": CHAT[:1], "completions": ["2"], name: value})


@pytest.mark.parametrize("name", ["reasoning", "loss_mask", "images", "tools"])
def test_ignored_columns_are_as_if_they_were_not_there(name, tiny_tokenizer):
    record = {"messages": CHAT, name: ["on"]}
    with pytest.raises(ChatFormatError):
        render_record({"messages": CHAT, "reasoning": "on"}, tiny_tokenizer)
    [item] = render_record(
        record, tiny_tokenizer, PreparationOptions(ignored_columns=(name,))
    ).passes
    [expected] = render_record({"messages": CHAT}, tiny_tokenizer).passes
    assert item.token_ids.tolist() == expected.token_ids.tolist()


def test_columns_that_change_nothing_are_named_once(caplog):
    harmless = {
        "id": "1",
        "source": "made up",
        "score": 0.5,
        "loss": 2.31,
        "reasoning_tokens": 20,
        "thinking_model": "some",
        "num_tools": 3,
        "seed": 10**400,
        "function": "search",
        "operating_system": "some",
        "label": True,
        "document_ids": ["1"],
    }
    empty = {"loss_mask": None, "enable_thinking": "", "functions": "[]", "cot": [], "videos": "[]"}
    for more in ({}, harmless | empty, harmless | {"url": "some"}):
        assert read_conversation({"messages": CHAT, **more}).messages == CHAT
    first, second = (record.message for record in caplog.records)
    assert first == f"rows have columns that aren't read: {str(sorted(harmless))[1:-1]}"
    assert second == "rows have columns that aren't read: 'url'"


def test_columns_that_repeat_what_is_read():
    messages = [{"role": "system", "content": "Be brief."}, *CHAT]
    tools = [{"type": "function", "function": {"name": "f"}}]
    record = {"messages": messages, "tools": tools}
    again = {"system_prompt": "Be brief.", "functions": tools}
    assert read_conversation(record | again) == read_conversation(record)
    with pytest.raises(ChatFormatError, match="column 'system_prompt'"):
        read_conversation({"messages": messages, "system_prompt": "Be long."})


def test_columns_next_to_one_sequence(tiny_tokenizer):
    """Text and token ids are whole; a prompt of text may lack what is in another column."""
    ids = {"input_ids": [1, 2, 3], "attention_mask": [1, 1, 1], "special_tokens_mask": [1, 0, 0]}
    wholes = [ids, {"text": "1+1?"}, {"passes": [{"input_ids": [1, 2], "labels": [-100, 2]}]}]
    prompt = {"prompt": "1+1?", "completion": "2"}
    for record in (*wholes, prompt):
        assert render_record(record | {"id": 3}, tiny_tokenizer).passes
        with pytest.raises(ChatFormatError, match=r"'loss_mask', .* give token ids with 'labels'"):
            render_record(record | {"loss_mask": [0, 1, 1]}, tiny_tokenizer)
    for record in wholes:
        assert render_record(record | {"cot": "Add.", "system": "a"}, tiny_tokenizer).passes
    question = {"prompt": "1+1?", "completions": ["2"]}
    for name, value in {"cot": "Add.", "system": "Be brief.", "tools": [{"name": "f"}]}.items():
        with pytest.raises(ChatFormatError, match=f"'{name}', .* Give it in the prompt"):
            render_record(prompt | {name: value}, tiny_tokenizer)
        with pytest.raises(ChatFormatError, match=f"'{name}', .* Give it in the prompt"):
            read_question(question | {name: value})
    padded = ids | {"attention_mask": json.dumps([0, 1, 1])}
    with pytest.raises(ChatFormatError, match="'attention_mask' has zeros"):
        render_record(padded, tiny_tokenizer)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"chat_template": "{{ 'x' }}"},
        {"tokenize": True},
        {"add_generation_prompt": False},
        {"eos_token": ""},
    ],
)
def test_a_record_does_not_choose_how_templates_are_applied(kwargs, tiny_tokenizer):
    [name] = kwargs
    for given in (kwargs, json.dumps(kwargs)):
        record = {"messages": CHAT, "chat_template_kwargs": given}
        with pytest.raises(ChatFormatError, match=f"set '{name}', which isn't a row's to choose"):
            render_record(record, tiny_tokenizer)
    with pytest.raises(ChatFormatError, match=f"set '{name}', which isn't a row's to choose"):
        read_question({"prompt": CHAT[:1], "completions": ["2"], "chat_template_kwargs": kwargs})


def test_the_options_choose_a_template(tiny_tokenizer):
    chosen = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    options = PreparationOptions(chat_template_kwargs={"chat_template": chosen})
    [turn] = render_record({"messages": CHAT}, tiny_tokenizer, options).turns
    assert (turn.context, turn.completion) == ("1+1?<|im_end|>", "2<|im_end|>")
