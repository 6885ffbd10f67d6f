"""Records that others met, from the shared folder: trained right, or refused with a remedy."""

from __future__ import annotations

import json

import pytest

from onepass_trl.chat import ChatFormatError, read_conversation
from tests.chat.tokenizers import SHARED, SHARED_REASON, small_tokenizer
from tests.chat.turns import render_turns

pytestmark = [
    pytest.mark.shared,
    pytest.mark.skipif(not SHARED.is_dir(), reason=SHARED_REASON),
]
REASONING = ["qwen3", "deepseekv3", "gptoss"]


def turns(name, line, template):
    lines = (SHARED / "cases" / f"{name}.jsonl").read_text("utf-8").splitlines()
    conversation = read_conversation(json.loads(lines[line]))
    return render_turns(conversation.messages, small_tokenizer(template))


def test_arguments_given_as_text():
    called, answered = turns("arguments_text", 0, "deepseekv3")
    written = r'{"city":"Z\u00fcrich","days":1.50}'
    assert written in called.completion
    assert written in answered.context


@pytest.mark.parametrize("template", [*REASONING, "llama3_1"])
def test_text_parts(template):
    [turn] = turns("text_parts", 0, template)
    assert "First.\nSecond." in turn.context


@pytest.mark.parametrize("template", REASONING)
def test_a_closing_mark_that_the_reasoning_quotes(template):
    if template != "gptoss":
        with pytest.raises(ChatFormatError, match="its reasoning_content contains '</think>'"):
            turns("inline_close_quoted", 0, template)
        return
    first, second = turns("inline_close_quoted", 0, template)
    assert first.message["reasoning_content"].endswith("`</think>` on a line of its own.")
    assert first.message["content"] == "A close mark."
    assert "of its own" not in second.context


@pytest.mark.parametrize("template", REASONING)
@pytest.mark.parametrize("line", [0, 1])
def test_reasoning_between_other_marks(template, line):
    with pytest.raises(ChatFormatError, match=r"has content with .*'reasoning_content'"):
        turns("other_marks", line, template)
    [turn] = turns("other_marks", line, "llama3_1")
    assert turn.completion.startswith(turn.message["content"])


@pytest.mark.parametrize("line", range(3))
def test_columns_that_change_the_meaning(line):
    name = ("loss_mask", "enable_thinking", "system_prompt")[line]
    with pytest.raises(ChatFormatError, match=f"column '{name}', which isn't read"):
        turns("ignored_columns", line, "qwen3")


@pytest.mark.parametrize("template", [*REASONING, "llama3_1"])
def test_keys_under_other_names(template):
    with pytest.raises(ChatFormatError, match=r"'reasoning_details'.*'reasoning_content'"):
        turns("unread_keys", 0, template)
    [turn] = turns("unread_keys", 1, template)
    assert (turn.number, turn.message["content"]) == (1, "2")
