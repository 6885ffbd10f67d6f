"""What templates write after the token that ends a turn isn't trained."""

from __future__ import annotations

import pytest

from onepass_trl.chat import ChatFormatError, render_passes
from tests.chat.tokenizers import SHARED, SHARED_REASON, texts, tokenizer_with

QUESTION = {"role": "user", "content": "2+2?"}
ANSWER = {"role": "assistant", "content": "4"}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"name": "add", "arguments": {"a": 2}}]}
RESULT = {"role": "tool", "name": "add", "content": "4"}

_MESSAGES = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>"
    "{% endfor %}<|im_end|>\n"
)
_PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CHATML = _MESSAGES + "{% endfor %}" + _PROMPT
# The header of an answer after every conversation, asked for or not.
HEADER = _MESSAGES + "{% endfor %}{{ '<|im_start|>assistant\\n' }}"
# A token after every answer that ends the conversation, or after the second.
CLOSED = (
    _MESSAGES + "{% if loop.last and m.role == 'assistant' and loop.index > NUM %}<|endoftext|>"
    "{% endif %}{% endfor %}" + _PROMPT
)
# One after the whole conversation, whoever ends it.
CLOSED_ALWAYS = _MESSAGES + (
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}<|endoftext|>"
    "{% endif %}"
)
# A token of its own for the last turn.
LAST = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{{ '<|endoftext|>' if loop.last and m.role == 'assistant' else '<|im_end|>' }}\n{% endfor %}"
) + _PROMPT
# Two tokens end every turn.
TWO = CHATML.replace("<|im_end|>", "<|im_end|><|endoftext|>")


def completions(template, *messages, eos="<|im_end|>"):
    tokenizer = tokenizer_with(template, eos)
    return [texts(tokenizer, item)[1] for item in render_passes(messages, tokenizer)]


@pytest.mark.parametrize("eos", ["<|im_end|>", "<|endoftext|>"])
@pytest.mark.parametrize("template", [CHATML, CLOSED.replace("NUM", "0"), CLOSED_ALWAYS])
def test_the_turn_ends_where_it_ends_in_later_contexts(template, eos):
    assert completions(template, QUESTION, ANSWER, QUESTION, ANSWER, eos=eos) == ["4<|im_end|>"] * 2
    called, answered = completions(template, QUESTION, CALL, RESULT, ANSWER, eos=eos)
    assert called.endswith("}</tool_call><|im_end|>")
    assert answered == "4<|im_end|>"


def test_the_header_of_an_answer_that_nobody_asked_for():
    assert completions(HEADER, QUESTION, ANSWER, QUESTION, ANSWER) == ["4<|im_end|>"] * 2
    called, answered = completions(HEADER, QUESTION, CALL, RESULT, ANSWER)
    assert called.endswith("}</tool_call><|im_end|>")
    assert answered == "4<|im_end|>"


def test_a_header_that_no_end_token_goes_before():
    match = (
        r"writes '.*assistant\\n' after every message, .*; set tokenizer\.eos_token to the token"
    )
    with pytest.raises(ChatFormatError, match=match):
        completions(HEADER, QUESTION, ANSWER, eos="<|endoftext|>")


def test_tokens_that_end_every_turn_are_trained():
    for eos in ("<|endoftext|>", "<think>"):
        turns = completions(TWO, QUESTION, ANSWER, QUESTION, ANSWER, eos=eos)
        assert turns == ["4<|im_end|><|endoftext|>"] * 2
    assert completions(TWO, QUESTION, ANSWER) == ["4<|im_end|>"]


def test_a_last_turn_with_an_end_of_its_own():
    assert completions(LAST, QUESTION, ANSWER, QUESTION, ANSWER) == ["4<|endoftext|>"] * 2


def test_turns_that_end_differently_are_refused():
    template = CLOSED.replace("NUM", "2")
    assert completions(template, QUESTION, ANSWER) == ["4<|im_end|>"]
    match = r"turn 1 .*: it ends in '.*<\|endoftext\|>.*', and turns like it in '<\|im_end\|>'"
    with pytest.raises(ChatFormatError, match=match):
        completions(template, QUESTION, ANSWER, QUESTION, ANSWER)


def test_a_reasoning_without_an_answer_ends_like_one_with_it():
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.reasoning and loop.last %}<think>"
        "{{ m.reasoning }}</think>{% endif %}{{ m.content }}<|im_end|>"
        "{% if loop.last and m.role == 'assistant' %}<|endoftext|>{% endif %}\n{% endfor %}"
    ).replace("m.reasoning", "m.reasoning_content") + _PROMPT
    silent = {"role": "assistant", "content": "", "reasoning": "Four."}
    for eos in ("<|im_end|>", "<|endoftext|>"):
        [completion] = completions(template, QUESTION, silent, eos=eos)
        assert completion == "<think>Four.</think><|im_end|>"


def test_templates_that_take_one_question():
    single = "{% if messages | length > 2 %}{{ raise_exception('one') }}{% endif %}" + HEADER
    assert completions(single, QUESTION, ANSWER) == ["4<|im_end|>"]


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.is_dir(), reason=SHARED_REASON)
@pytest.mark.parametrize("name", ["header_always", "closer_last_answer"])
def test_shared_cases(name):
    tokenizer = tokenizer_with((SHARED / "cases" / f"{name}.jinja").read_text("utf-8"))
    tokenizer.add_tokens(["<|object_ref_start|>", "<|box_start|>"], special_tokens=True)
    [item] = render_passes([QUESTION, ANSWER], tokenizer)
    assert texts(tokenizer, item)[1] == "4<|im_end|>"
