"""Rendered turns, parsed back."""

from __future__ import annotations

import copy
import json
import logging

import pytest
from datasets import Dataset

from onepass_trl.chat import ChatFormatError
from onepass_trl.chat.families import Composable, registry
from onepass_trl.preparation.datasets import prepare_dataset
from onepass_trl.preparation.options import NUM_VERIFIED_RECORDS, PreparationOptions
from onepass_trl.preparation.round_trip import check_round_trip
from onepass_trl.preparation.rows import RowMaker
from onepass_trl.training.response_templates import trl_response_template
from tests.chat.tokenizers import small_tokenizer
from tests.chat.turns import render_turns

QUESTION = {"role": "user", "content": "2+2?"}
GOOD = [QUESTION, {"role": "assistant", "reasoning_content": "Easy.", "content": "4"}]


def calling(**arguments):
    function = {"name": "note", "arguments": arguments}
    return [
        QUESTION,
        {"role": "assistant", "content": "", "tool_calls": [{"function": function}]},
    ]


# TRL's parser of LFM2.5 takes the text for the beginning of another call.
BAD = calling(text="4, note(5)")


def test_turns_are_parsed_back():
    tokenizer = small_tokenizer("qwen3")
    for messages in (GOOD, calling(text='it\'s "4"', number=4, flag=True, nothing=None)):
        [turn] = render_turns(messages, tokenizer)
        assert check_round_trip(turn, tokenizer, trl_response_template)
    assert tokenizer.response_template is None


@pytest.mark.parametrize(
    "content",
    ["<think>\nEasy.\n</think>\n\n4", "<think>Easy.</think>4", "<think>\n\n</think>\n\n4", "4"],
)
def test_inline_reasoning_that_is_content(content):
    """Qwen2.5's template reads no reasoning, and its parser splits it off all the same."""
    tokenizer = small_tokenizer("qwen2_5")
    [turn] = render_turns([QUESTION, {"role": "assistant", "content": content}], tokenizer)
    assert turn.completion == f"{content}<|im_end|>"
    assert check_round_trip(turn, tokenizer, trl_response_template)


def test_inline_reasoning_that_the_parser_cuts_elsewhere():
    tokenizer = small_tokenizer("qwen2_5")
    content = "<think>\nIt ends at `</think>`.\n</think>\n\n4"
    [turn] = render_turns([QUESTION, {"role": "assistant", "content": content}], tokenizer)
    with pytest.raises(ChatFormatError, match="gives back another reasoning"):
        check_round_trip(turn, tokenizer, trl_response_template)


@pytest.mark.parametrize("value", ["5", 5, 5.5, True, None, ["a", 1], {"a": [None]}, "[1]", ""])
@pytest.mark.parametrize("template", ["qwen3", "qwen3_8", "glm4moe", "gemma4_v5", "lfm2_2_5_vl"])
def test_types_of_arguments_do_not_count(template, value):
    tokenizer = small_tokenizer(template)
    [turn] = render_turns(calling(value=value), tokenizer)
    assert check_round_trip(turn, tokenizer, trl_response_template)


def test_the_error_shows_where_both_differ():
    tokenizer = small_tokenizer("lfm2_2_5")
    [turn] = render_turns(BAD, tokenizer)
    match = r"turn 0 .*gives back another .*from character \d+ on it has .*, the message has .*"
    with pytest.raises(ChatFormatError, match=match + "verify_rendering=False"):
        check_round_trip(turn, tokenizer, trl_response_template)


def test_another_text_is_found():
    tokenizer = copy.deepcopy(small_tokenizer("qwen3"))
    tokenizer.response_template = {
        "start_anchor": "<|im_start|>assistant\n",
        "fields": {
            "reasoning_content": {"open": "<think>", "close": "</think>", "content": "text"},
            "content": {"open_pattern": r"(?=Four)", "close": " rest", "content": "text"},
        },
    }
    message = {"role": "assistant", "content": "Four and the rest"}
    [turn] = render_turns([QUESTION, message], tokenizer)
    match = r"content: from character 12 on it has 'Four and the', .* has 'Four and the rest'"
    with pytest.raises(ChatFormatError, match=match):
        check_round_trip(turn, tokenizer, trl_response_template)


def test_an_unparsable_completion_is_an_error():
    tokenizer = copy.deepcopy(small_tokenizer("qwen3"))
    tokenizer.response_template = {
        "start_anchor": "<|im_start|>assistant\n",
        "fields": {"content": {"close": "<|im_end|>", "content": "json"}},
    }
    [turn] = render_turns(GOOD, tokenizer)
    with pytest.raises(ChatFormatError, match="would learn to generate fails: "):
        check_round_trip(turn, tokenizer, trl_response_template)
    tokenizer.response_template = {"fields": {}}
    with pytest.raises(ChatFormatError, match=r"tokenizer\.response_template can't be used"):
        check_round_trip(turn, tokenizer, trl_response_template)


@pytest.mark.parametrize(
    ("bad_row", "verify", "is_found"),
    [
        (0, None, True),
        (NUM_VERIFIED_RECORDS, None, False),
        (NUM_VERIFIED_RECORDS, True, True),
        (0, False, False),
    ],
)
def test_rows_that_are_verified(bad_row, verify, is_found):
    rows = [{"messages": GOOD}] * bad_row + [{"messages": BAD}]
    error = prepared(rows, "lfm2_2_5", verify_rendering=verify)
    if not is_found:
        assert error is None
        return
    assert error.startswith(f"row {bad_row} of the train dataset: assistant turn 0")


def prepared(rows, template, **options):
    """Return the error of preparing the rows, None if there is none."""
    names = sorted({name for row in rows for name in row})
    dataset = Dataset.from_list(
        [{name: json.dumps(row.get(name)) for name in names} for row in rows]
    )
    options = PreparationOptions(
        max_length=None,
        overflow="error",
        train_on="all",
        packing=False,
        known_templates=trl_response_template,
        **options,
    )
    try:
        prepare_dataset(dataset, names, RowMaker(small_tokenizer(template), options), "train")
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize(("verify", "level"), [(None, logging.INFO), (True, logging.WARNING)])
def test_that_there_is_no_parser_is_logged(verify, level, caplog):
    caplog.set_level(logging.INFO, logger="onepass_trl")
    rows = [{"messages": [QUESTION, {"role": "assistant", "content": "4"}]}]
    own = small_tokenizer("llama3").response_template
    assert own
    try:
        small_tokenizer("llama3").response_template = None
        assert prepared(rows, "llama3", verify_rendering=verify) is None
    finally:
        small_tokenizer("llama3").response_template = own
    [record] = [r for r in caplog.records if "response template" in r.message]
    assert record.levelno == level
    assert "train dataset: rendered turns aren't parsed back" in record.message


def test_template_arguments_of_the_dataset_and_of_a_row():
    off = {"chat_template_kwargs": {"enable_thinking": False}}
    error = prepared([{"messages": GOOD}], "qwen3", **off)
    assert "set chat_template_kwargs to {'enable_thinking': True}" in error
    rows = [{"messages": GOOD, "chat_template_kwargs": {"enable_thinking": True}}]
    assert prepared(rows, "qwen3", **off) is None


class Loud(Composable):
    """Every answer ends in the token that ends texts."""

    name = "loud"

    def matches(self, template):
        return True

    def completion(self, turn):
        return super().completion(turn).replace("<|im_end|>", "<|endoftext|>")


def test_registered_families_reach_other_processes(monkeypatch):
    monkeypatch.setattr(registry, "_registered", [Loud()])
    tokenizer = small_tokenizer("qwen3")
    options = PreparationOptions(
        max_length=None, overflow="error", train_on="all", packing=False, verify_rendering=False
    )
    monkeypatch.setattr(registry, "_registered", [])  # as a new process begins
    dataset = Dataset.from_list([{"messages": json.dumps(GOOD)}])
    rows = prepare_dataset(dataset, ["messages"], RowMaker(tokenizer, options), "train")
    targets = rows[0]["shift_labels"]
    assert targets[targets >= 0][-1] == tokenizer.convert_tokens_to_ids("<|endoftext|>")
