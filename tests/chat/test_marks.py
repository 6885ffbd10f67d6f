"""The reasoning of a turn is opened once and closed once, by the prompt and the completion."""

from __future__ import annotations

import pytest

from onepass_trl.chat import ChatFormatError, render_passes
from onepass_trl.chat.families import family_of
from onepass_trl.chat.template import Template
from tests.chat.tokenizers import SHARED, SHARED_REASON, texts, tokenizer_with


def chatml(answer, prompt="<|im_start|>assistant\n", before=""):
    """Return a template that writes answers so, and other messages as they are."""
    prompt = prompt.replace("\n", "\\n")
    return (
        before + "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n"
        f"{answer}<|im_end|>\n{{% else %}}<|im_start|>{{{{ m.role }}}}\n{{{{ m.content }}}}"
        "<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}"
        f"{{{{ '{prompt}' }}}}{{% endif %}}"
    )


def user(text="2+2?"):
    return {"role": "user", "content": text}


def answer(text="4", **more):
    return {"role": "assistant", "content": text, **more}


def turns(template, *messages, **kwargs):
    tokenizer = tokenizer_with(template)
    passes = render_passes(messages, tokenizer, chat_template_kwargs=kwargs)
    return [texts(tokenizer, item) for item in passes]


OPENED = "<|im_start|>assistant\n<think>\n"
CUT = "{{ m.content.split('</think>')[-1].strip() }}"
# Templates that write no reasoning and open it in the prompt, as Nemotron Nano v2's does: in the
# last turn too; whatever the code that cuts; with a switch in the system message.
CUTTING = {
    "opened in the last turn": chatml("{{ '<think>\\n' if loop.last else '' }}" + CUT, OPENED),
    "partition": chatml("{{ (m.content.rpartition('</think>') | last).strip() }}", OPENED),
    "a mark in a variable": chatml(
        "{{ (m.content.split(mark) | last).strip() }}", OPENED, "{% set mark = '</think>' %}"
    ),
    "a closing token after the last answer": chatml(CUT, OPENED).replace(
        "{% if add", "{% if messages[-1].role == 'assistant' %}<|endoftext|>{% endif %}{% if add"
    ),
}


@pytest.mark.parametrize("template", CUTTING.values(), ids=CUTTING)
@pytest.mark.parametrize("spelling", ["field", "inline"])
def test_the_reasoning_that_the_prompt_opens_is_closed_once(template, spelling):
    def reasoned(text, reasoning):
        if spelling == "field":
            return answer(text, reasoning_content=reasoning)
        return answer(f"<think>\n{reasoning}\n</think>\n\n{text}")

    assert family_of(Template(tokenizer_with(template), None, None)).name == "qwq"
    first, second, third = turns(
        template, user(), reasoned("4", "Add."), user("3+3?"), answer("6"), user(), answer()
    )
    for context, _ in (first, second, third):
        assert context.count("<think>") == 1
        assert context.endswith(OPENED)
    assert first[1] == "Add.\n</think>\n\n4<|im_end|>"
    assert second[1] == "\n</think>\n\n6<|im_end|>"
    assert "<|im_start|>assistant\n4<|im_end|>" in second[0]


SWITCHED = (
    chatml(
        CUT,
        before="{% set off = '/no_think' in messages[0].content %}",
        prompt="<|im_start|>assistant\n",
    )
    + "{% if add_generation_prompt and off %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
)


def test_a_question_that_switches_thinking_off():
    [(context, completion)] = turns(SWITCHED, user("2+2? /no_think"), answer())
    assert context.endswith("<think>\n\n</think>\n\n")
    assert completion == "4<|im_end|>"
    [(context, completion)] = turns(SWITCHED, user(), answer(reasoning="Add."))
    assert context.endswith("<|im_start|>assistant\n")
    assert completion == "<think>\nAdd.\n</think>\n\n4<|im_end|>"
    with pytest.raises(ChatFormatError, match=r"it has reasoning, but the prompt .* there is none"):
        turns(SWITCHED, user("2+2? /no_think"), answer(reasoning="Add."))


def test_marks_without_line_ends():
    bare = chatml(CUT, "<|im_start|>assistant\n<think>")
    [(_, completion)] = turns(bare, user(), answer(reasoning="Add."))
    assert completion == "Add.</think>4<|im_end|>"


def test_a_template_that_cuts_only_if_asked_to():
    """Where it keeps the reasoning, inference sees it in later contexts, and so does training."""
    keeping = chatml("{{ m.content if keep else (m.content.split('</think>') | last).strip() }}")
    messages = [user(), answer("<think>\nAdd.\n</think>\n\n4"), user(), answer()]
    for keep in (True, False):
        first, second = turns(keeping, *messages, keep=keep)
        assert first[1] == "<think>\nAdd.\n</think>\n\n4<|im_end|>"
        assert ("<think>\nAdd.\n</think>\n\n4<|im_end|>" in second[0]) == keep


# Templates that read no field and don't cut, though they talk of thinking: SmolLM3,
# Phi-4-reasoning, Hermes 4, the recipe of OpenR1-Distill.
PROSE = {
    "in a text": chatml("{{ m.content }}", before="Think in <think> </think>: thinking.<|im_end|>"),
    "in the code": chatml(
        "{{ m.content }}",
        before="{{ 'A deep thinking AI encloses thoughts in <think> </think>. ' }}",
    ),
    "in a comment": chatml("{{ m.content }}", before="{# </think> ends message.thinking #}"),
    "in a variable": chatml(
        "{{ m.content }}", before="{% set ns = namespace(thinking=true) %}{{ ns.thinking }}"
    ),
}


@pytest.mark.parametrize("template", PROSE.values(), ids=PROSE)
def test_inline_reasoning_is_content_where_nothing_reads_it(template):
    inline = "<think>\nAdd: </think> comes next.\n</think>\n\n4"
    first, second = turns(template, user(), answer(inline), user(), answer("a </think> b"))
    assert first[1] == f"{inline}<|im_end|>"
    assert inline in second[0]
    assert second[1] == "a </think> b<|im_end|>"
    with pytest.raises(ChatFormatError, match=r"no place for any .* the content as <think>"):
        turns(template, user(), answer(reasoning_content="Add."))


def test_inline_reasoning_goes_on_from_the_prompt_that_opens_it():
    """OLMo-3-Think: contents stay as they are, the prompt opens the reasoning."""
    template = chatml("{{ m.content }}", "<|im_start|>assistant\n<think>")
    first, second = turns(
        template, user(), answer("<think>Add.</think>4"), user(), answer("<think>\n</think>5")
    )
    assert first[1] == "Add.</think>4<|im_end|>"
    assert "assistant\n<think>Add.</think>4<|im_end|>" in second[0]
    assert second[1] == "\n</think>5<|im_end|>"
    for wrong in (answer(), answer("a </think> b")):
        with pytest.raises(
            ChatFormatError, match=r"takes the reasoning from the content: begin that with"
        ):
            turns(template, user(), wrong)
    with pytest.raises(ChatFormatError, match=r"put it into the content as <think>"):
        turns(template, user(), answer(reasoning_content="Add."))


def test_white_space_that_only_the_prompt_has():
    """axolotl's template for Qwen3: turns have one line end after the mark, the prompt has two."""
    prompt = "<|im_start|>assistant\n<think>\n\n"
    fields = "<think>\n{{ m.reasoning_content }}\n</think>\n\n{{ m.content }}"
    [(context, completion)] = turns(chatml(fields, prompt), user(), answer(reasoning="Add."))
    assert context.endswith(prompt)
    assert completion == "Add.\n</think>\n\n4<|im_end|>"
    [(_, completion)] = turns(chatml(fields, prompt), user(), answer())
    assert completion == "</think>\n\n4<|im_end|>"
    inline = answer("<think>Add.</think>4")
    assert (
        turns(chatml("{{ m.content }}", prompt), user(), inline)[0][1] == "Add.</think>4<|im_end|>"
    )


# Kimi K2 Thinking: the last answer has an empty fence whatever its reasoning, calls before it keep
# theirs; of a call the id is written, which has its name. K2.5's prompt opens the reasoning.
KIMI = """
{%- set ns = namespace(last=-1) -%}
{%- for m in messages -%}{%- if m.role == 'assistant' and not m.tool_calls -%}
{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- for m in messages -%}{{ '<|im_start|>' + m.role + '<|im_middle|>' }}
{%- if m.role == 'assistant' -%}
{{ '<think>' + (m.reasoning_content or '' if loop.index0 > ns.last else '') + '</think>' }}
{%- endif -%}{{ m.content }}{%- for call in m.tool_calls or [] -%}
{{ '<tool_call>' + call.id + call.function.arguments | tojson + '</tool_call>' }}{%- endfor -%}
{{ '<|im_end|>' }}{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant<|im_middle|>OPENER' }}{%- endif -%}"""


@pytest.mark.parametrize("opener", ["", "<think>"])
def test_a_template_that_empties_the_fence_of_the_last_answer(opener):
    call = {"id": "functions.add:0", "function": {"name": "add", "arguments": {"a": 2}}}
    messages = [
        user(),
        answer("", reasoning="Ask.", tool_calls=[call]),
        {"role": "tool", "name": "add", "tool_call_id": call["id"], "content": "4"},
        answer(reasoning="4"),
        user(),
        answer(),
    ]
    called, answered, plain = turns(KIMI.replace("OPENER", opener), *messages)
    start = "<think>".removeprefix(opener)
    written = '</think><tool_call>functions.add:0{"a": 2}</tool_call><|im_end|>'
    assert called[1] == f"{start}Ask.{written}"
    assert f"<think>Ask.{written}" in answered[0]
    assert answered[1] == f"{start}4</think>4<|im_end|>"
    assert f"<think>{written}" in plain[0]
    assert plain[1] == f"{start}</think>4<|im_end|>"
    with pytest.raises(ChatFormatError, match=r"turn 0 .*says that there is none"):
        turns(KIMI.replace("OPENER", "<think></think>"), *messages)
    messages[1] = answer("", tool_calls=[call | {"id": "c1"}])
    with pytest.raises(
        ChatFormatError, match=r"writes the id 'c1' in its place: give calls the ids"
    ):
        turns(KIMI.replace("OPENER", opener), *messages)


def test_inline_reasoning_after_a_prompt_that_excludes_it():
    """SmolLM3 with thinking off."""
    template = chatml(
        "<think>\n\n</think>\n{{ m.content }}", "<|im_start|>assistant\n<think>\n\n</think>\n"
    )
    assert turns(template, user(), answer())[0][1] == "4<|im_end|>"
    with pytest.raises(ChatFormatError, match=r"opened 2 times .* closed 2 times"):
        turns(template, user(), answer("<think>\nAdd.\n</think>\n\n4"))


def test_marks_that_a_template_writes_twice_or_not_at_all():
    fields = "<think>\n{{ m.reasoning_content }}\n</think>\n\n{{ m.content }}"
    for written, match in (
        (chatml("<think>\n" + fields, OPENED), "opened 2 times .* closed 1 time with"),
        (chatml(fields.replace("</think>", ""), OPENED), "opened 1 time .* closed 0 times"),
        (chatml(fields.replace("<think>", "")), "opened 0 times .* closed 1 time with"),
        (chatml(fields + "<think></think>"), "opened 2 times .* closed 2 times"),
    ):
        with pytest.raises(ChatFormatError, match=match):
            turns(written, user(), answer(reasoning="Add."))


def test_marks_that_the_message_quotes_dont_count():
    template = chatml("<think>\n{{ m.reasoning_content }}\n</think>\n\n{{ m.content }}", OPENED)
    quoting = answer("Write <think> first.", reasoning="It is <think>.")
    [(_, completion)] = turns(template, user(), quoting)
    assert completion == "It is <think>.\n</think>\n\nWrite <think> first.<|im_end|>"


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.is_dir(), reason=SHARED_REASON)
def test_shared_cases():
    def case(name):
        return (SHARED / "cases" / f"{name}.jinja").read_text("utf-8")

    template, reasoned = case("opens_in_last_turn"), answer(reasoning="add")
    assert turns(template, user(), reasoned)[0][1] == "add\n</think>\n\n4<|im_end|>"
    assert turns(template, user(), answer())[0][1] == "\n</think>\n\n4<|im_end|>"
    assert turns(template, user("2+2? /no_think"), answer())[0][1] == "4<|im_end|>"
    with pytest.raises(ChatFormatError, match="says that there is none"):
        turns(template, user("2+2? /no_think"), reasoned)
    inline = "<think>\nadd\n</think>\n\n4"
    assert turns(case("prose_thinking"), user(), answer(inline))[0][1] == f"{inline}<|im_end|>"
