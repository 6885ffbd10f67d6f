"""Texts that hold what closes them, so that another message would be read."""

from __future__ import annotations

import json

import pytest

from onepass_trl.chat import ChatFormatError
from onepass_trl.preparation.round_trip import check_round_trip
from onepass_trl.training.response_templates import trl_response_template
from tests.chat.families import CASES
from tests.chat.test_trl_templates import NO_CALLS
from tests.chat.tokenizers import make_small_tokenizer, small_tokenizer, tokenizer_with
from tests.chat.turns import render_turns

_XML = ("</parameter>", "</function>", "</tool_call>")
_JSON = ("</tool_call>",)
# What ends arguments in each template that writes calls; special tokens are refused everywhere.
ENDS = {
    **dict.fromkeys(("qwen3", "qwen3_instruct_2507", "qwen3_vl", "qwen2_5", "qwq"), _JSON),
    **dict.fromkeys(("qwen3_5_think", "qwen3_5_nothink", "qwen3_6", "qwen3_8"), _XML),
    **dict.fromkeys(("nemotron_3_nano", "nemotron_3_super", "nemotron_3_ultra"), _XML),
    "nemotron_3_5_lightning": _XML,
    "glm4moe": ("</arg_value>", "</tool_call>"),
    "deepseekv3": ("<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>"),
    "deepseek_v3_1": ("<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>"),
    "muse_glimmer": ("</atem:parameter>", "</atem:invoke>", "</atem:function_calls>"),
    "lfm2_2_5": ("'",),  # it puts texts between quotation marks as they are
    "lfm2_2_5_v2": ("'",),
}
EVERY = sorted({mark for marks in ENDS.values() for mark in marks} | {'"', "\n", "<b>", "</b>"})
WRITES_CALLS = [
    case
    for case in CASES.values()
    if case.template not in (*NO_CALLS, "deepseek_r1_distill")  # which ends none of its calls
]


def calling(*arguments):
    function = [{"name": "note", "arguments": given} for given in arguments]
    return [
        {"role": "user", "content": "Note it."},
        {"role": "assistant", "content": "", "tool_calls": [{"function": f} for f in function]},
    ]


def rendered(case, text):
    tokenizer = make_small_tokenizer(case)
    [turn] = render_turns(calling({"text": text}), tokenizer, chat_template_kwargs=case.kwargs)
    return turn, tokenizer


@pytest.mark.parametrize("case", WRITES_CALLS, ids=lambda case: case.slug)
def test_what_ends_an_argument_is_refused_in_it(case):
    ends = ENDS.get(case.template, ())
    for mark in ends:
        with pytest.raises(ChatFormatError, match=rf"turn 0 .*tool call 0 contains .*{mark}"):
            rendered(case, f"It {mark} ends.")
    others = [mark for mark in EVERY if mark not in ends]
    turn, tokenizer = rendered(case, f"It {' '.join(others)} goes on.")
    if "lfm2" not in case.template:  # TRL's parser doesn't read what the newer ones escape
        assert check_round_trip(turn, tokenizer, trl_response_template)


@pytest.mark.parametrize("template", ["qwen3", "gptoss"])
@pytest.mark.parametrize(
    "arguments", [{"query": 'a "b c"'}, {"page": "", "query": ': "'}, {"query": '"'}]
)
def test_a_quotation_of_an_argument_ends_no_argument(template, arguments):
    """What JSON escapes may be between quotation marks elsewhere, for instance in reasoning."""
    messages = calling(arguments)
    messages[1]["reasoning_content"] = f'I try "{arguments["query"]}" first.'
    [turn] = render_turns(messages, small_tokenizer(template))
    assert json.dumps(arguments) in turn.completion


# MiniMax M2: values as they are, texts or not.
MINIMAX = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<minimax:tool_call>\n"
    '<invoke name="{{ call.function.name }}">\n'
    "{% for key, value in call.function.arguments.items() %}"
    '<parameter name="{{ key }}">{{ value if value is string else value | tojson }}</parameter>\n'
    "{% endfor %}</invoke>\n</minimax:tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("mark", ["</parameter>", "</invoke>", "</minimax:tool_call>"])
@pytest.mark.parametrize("place", [lambda text: text, lambda text: [1, {"in": text}]])
def test_every_argument_of_every_call_is_looked_at(mark, place):
    tokenizer = tokenizer_with(MINIMAX)
    right = {"text": '<parameter> ends it\'s "text".', "many": [1, {"in": "</b>"}]}
    [turn] = render_turns(calling(right, right), tokenizer)
    assert turn.completion.count('<parameter name="text"><parameter> ends it\'s "text".') == 2
    wrong = right | {"many": place(f"a {mark} b")}
    for calls, number in (((wrong, right), 0), ((right, wrong), 1)):
        with pytest.raises(ChatFormatError, match=rf"tool call {number} contains '{mark}'"):
            render_turns(calling(*calls), tokenizer)


# Hunyuan A13B closes contents too, ERNIE 4.5 by other marks; others close reasoning by their own.
FENCED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% if m.reasoning_content %}<OPEN>\n{{ m.reasoning_content }}\n</OPEN>\n{% endif %}"
    "<FENCE>\n{{ m.content }}\n</FENCE>{% for call in m.tool_calls or [] %}<call>"
    "{{ call.function | tojson }}</call>{% endfor %}{% else %}{{ m.content }}{% endif %}<|im_end|>"
    "\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("fence", ["answer", "response"])
@pytest.mark.parametrize("opener", ["seed:think", "reflection"])
def test_contents_and_reasoning_hold_no_mark_that_closes_them(fence, opener):
    tokenizer = tokenizer_with(FENCED.replace("FENCE", fence).replace("OPEN", opener))

    def completion(content, reasoning, calls=()):
        messages = calling(*calls)
        messages[1] |= {"content": content, "reasoning_content": reasoning}
        [turn] = render_turns(messages, tokenizer)
        return turn.completion

    other = f"It has <{fence}> and </{opener}>."
    written = f"<{opener}>\nIt has <{opener}> and </{fence}>.\n</{opener}>\n<{fence}>\n{other}\n"
    assert completion(other, f"It has <{opener}> and </{fence}>.").startswith(written)
    for calls in ((), ({"text": other},)):
        with pytest.raises(ChatFormatError, match=f"its content contains '</{fence}>', with which"):
            completion(f"It ends </{fence}>.", "Hm.", calls)
        with pytest.raises(ChatFormatError, match=f"its reasoning_content contains '</{opener}>'"):
            completion("It ends.", f"Hm `</{opener}>`.", calls)
    with pytest.raises(ChatFormatError, match="its tool call 0 contains '</call>', with which"):
        completion("It ends.", "Hm.", ({"text": "</call>"},))


@pytest.mark.parametrize("template", ["qwen3", "qwen3_8", "glm4moe"])
def test_a_content_does_not_open_a_call_next_to_one(template):
    messages = calling({"text": "It."})
    messages[1]["content"] = "I write <tool_call> first."
    with pytest.raises(ChatFormatError, match="its content contains '<tool_call>', with which"):
        render_turns(messages, small_tokenizer(template))
    messages[1] |= {"content": "I write it.", "reasoning_content": "I write <tool_call> first."}
    [turn] = render_turns(messages, small_tokenizer(template))
    assert check_round_trip(turn, small_tokenizer(template), trl_response_template)


def test_a_content_after_the_calls_ends_no_argument():
    after = MINIMAX.replace("{{ m.content }}", "", 1).replace(
        "{% endfor %}<|im_end|>", "{% endfor %}{{ m.content }}<done><|im_end|>"
    )
    messages = calling({"text": "<done>"})
    messages[1]["content"] = "I note it."
    [turn] = render_turns(messages, tokenizer_with(after))
    assert turn.completion.endswith("</minimax:tool_call>I note it.<done><|im_end|>")
