"""Views that are put together are what the template writes, or none is used."""

from __future__ import annotations

import copy
import logging
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from onepass_trl.chat import InvalidTurn, render_each_turn, views
from onepass_trl.chat.errors import TemplateRefusal
from onepass_trl.chat.template import Template
from onepass_trl.chat.turns import TurnContext
from onepass_trl.chat.views import MIN_LENGTH, Views, ViewsDiffer
from tests.chat.coverage import read_conversations
from tests.chat.families import CASES, trl_template
from tests.chat.test_trl_templates import BY_TEMPLATE, NAMES
from tests.chat.tokenizers import (
    SHARED,
    SHARED_REASON,
    make_small_tokenizer,
    small_tokenizer,
    tokenizer_with,
)


def user(number):
    return {"role": "user", "content": f"Question {number}?"}


def answer(number, **more):
    return {"role": "assistant", "content": f"Answer {number}.", **more}


def call(number, **more):
    function = {"name": "weather", "arguments": {"city": f"Rome {number}"}}
    calls = [{"type": "function", "id": f"call{number:05}", "function": function}]
    return {"role": "assistant", "content": "", "tool_calls": calls, **more}


def result(number):
    content = f"Result {number}"
    return {
        "role": "tool",
        "name": "weather",
        "tool_call_id": f"call{number:05}",
        "content": content,
    }


def thought(number):
    return {"reasoning_content": f"Hm {number}."}


def chat(num_turns, reasons):
    """Questions and answers, which have reasoning if `reasons`."""
    answers = [answer(i, **(thought(i) if reasons else {})) for i in range(num_turns)]
    return [message for i, said in enumerate(answers) for message in (user(i), said)]


def agent(num_turns, reasons):
    """Questions with no or many steps of calls, some of which have reasoning if `reasons`."""
    draw = random.Random(num_turns)
    messages = [{"role": "system", "content": "Be brief."}]
    for number in range(num_turns):
        more = thought(number) if reasons and draw.random() < 0.8 else {}
        if messages[-1]["role"] != "tool":
            messages.append(user(number))
        if draw.random() < 0.8:
            messages += [call(number, **more), result(number)]
        else:
            messages.append(answer(number, **more))
    return messages


CONVERSATIONS = {"chat": chat, "agent": agent}


def outcomes(turns):
    return [
        str(turn.error)
        if isinstance(turn, InvalidTurn)
        else (turn.context, turn.completion, turn.rendered.token_ids.tolist())
        for turn in turns
    ]


def check(tokenizer, messages, monkeypatch, *, tools=None, **kwargs):
    """Check that all turns are what they are if each view is rendered in full."""
    given = {"tools": tools, "chat_template_kwargs": kwargs}
    turns = render_each_turn(messages, tokenizer, **given)
    with monkeypatch.context() as patch:
        patch.setattr(views, "MIN_LENGTH", len(messages))
        assert outcomes(turns) == outcomes(render_each_turn(messages, tokenizer, **given))


@pytest.fixture
def short_views(monkeypatch):
    """Lets shorter conversations be cut than gains anything."""
    monkeypatch.setattr(views, "MIN_LENGTH", 20)


@pytest.mark.usefixtures("short_views")
@pytest.mark.parametrize("kind", CONVERSATIONS)
@pytest.mark.parametrize(
    "name", sorted({*NAMES, *CASES} - {case.template for case in CASES.values()})
)
def test_every_view_of_every_template(name, kind, monkeypatch):
    case = CASES.get(name) or BY_TEMPLATE.get(name.removesuffix("_training"))
    tokenizer = copy.deepcopy(make_small_tokenizer(case or CASES["Qwen2.5"]))
    if name in NAMES:
        tokenizer.chat_template = trl_template(name)
    kwargs = case.kwargs if case else {}
    messages = CONVERSATIONS[kind](22, reasons=case is not None and case.reasoning)
    check(tokenizer, messages, monkeypatch, **kwargs)


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.is_dir(), reason=SHARED_REASON)
@pytest.mark.usefixtures("short_views")
@pytest.mark.parametrize("name", ["qwen3", "deepseek-r1", "gpt-oss"])
def test_every_view_with_real_tokenizers(name, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "tokenizers" / name, model_max_length=10**9)
    for make in CONVERSATIONS.values():
        check(tokenizer, make(22, reasons=True), monkeypatch)
    real = max(read_conversations("agent_short"), key=lambda row: len(row["messages"]))
    assert len(real["messages"]) > 20
    check(tokenizer, real["messages"], monkeypatch, tools=real.get("tools"))


@pytest.fixture
def in_full(monkeypatch):
    """How many messages each full rendering was made of, those of cut conversations included."""
    lengths = []
    render = Template._render

    def counted(self, messages, prompt):
        lengths.append(len(messages))
        return render(self, messages, prompt)

    monkeypatch.setattr(Template, "_render", counted)
    return lengths


def test_a_long_chat_takes_time_linear_in_its_turns(in_full):
    rendered = []
    for num_turns in (100, 200):
        render_each_turn(chat(num_turns, True), small_tokenizer("qwen3"))
        rendered.append(sum(in_full))
        in_full.clear()
    assert rendered[1] < 2.5 * rendered[0]


def test_no_view_of_a_short_chat_is_cut(in_full):
    messages = chat(MIN_LENGTH // 2, True)
    num_turns = len(render_each_turn(messages, small_tokenizer("qwen3")))
    long = [length for length in in_full if length > 6]  # others have stand-ins for messages
    assert sorted(long)[-2:] == [len(messages) - 1, len(messages)]
    assert len(long) < 2 * num_turns + 3


TEMPLATE = """
{%- set ns = namespace(users=0, loud=false) %}
{%- set users = messages | selectattr('role', 'equalto', 'user') | list | length %}
{%- for m in messages %}
    {%- if m.role == 'user' %}
        {%- set ns.users = ns.users + 1 %}
        {%- set ns.loud = ns.loud or '/loud' in m.content %}
    {%- endif %}
    {{- '<|im_start|>' + m.role + '\n' }}BEFORE
    {{- m.content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {%- set m = {'role': 'assistant'} %}
    {%- set loop = {'last': true} %}
    {{- '<|im_start|>assistant\n' }}BEFORE
{%- endif %}"""
# What the template writes before a message. A conversation without its middle shows that it isn't
# so in the first three; the others are seen where a view is compared with its full rendering.
ONLY_LAST = "if loop.last and m.role == 'assistant'"
DEPENDENCES = {
    "the number of a message": "{{ ns.users if m.role == 'user' }}",
    "a switch in the middle": "{{ 'loud: ' if ns.loud and m.role == 'assistant' }}",
    "a switch in the middle, for the last": f"{{{{ 'loud: ' {ONLY_LAST} and ns.loud }}}}",
    "how many messages follow": "{{ 'earlier: ' if m.role == 'user' and ns.users + 20 < users }}",
    "how many there are, for the last": f"{{{{ 'long: ' {ONLY_LAST} and users > 37 }}}}",
    "a switch in the middle, much later": "{{ 'loud: ' if ns.loud and '!' in m.content }}",
    "a refusal of many messages": "{{ raise_exception('too long') if users > 37 }}",
}
LONG_CHAT = chat(45, reasons=False)
LONG_CHAT[10]["content"] += " /loud"
LONG_CHAT[-6]["content"] += "!"


@pytest.mark.parametrize("before", DEPENDENCES.values(), ids=DEPENDENCES)
def test_a_dependence_on_the_middle_is_seen(before, monkeypatch):
    check(tokenizer_with(TEMPLATE.replace("BEFORE", before)), LONG_CHAT, monkeypatch)


@pytest.mark.parametrize("before", list(DEPENDENCES.values())[3:], ids=list(DEPENDENCES)[3:])
def test_views_are_compared_with_their_full_rendering(before, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    tokenizer = tokenizer_with(TEMPLATE.replace("BEFORE", before))
    right = outcomes(render_each_turn(LONG_CHAT, tokenizer))
    assert "each is rendered in full" in caplog.text
    monkeypatch.setattr(Views, "_check", lambda self, view: None)
    monkeypatch.setattr(TurnContext, "report_left_out", lambda self: None)
    assert right != outcomes(render_each_turn(LONG_CHAT, tokenizer))


def test_the_template_refuses_what_it_would_refuse_in_full(monkeypatch):
    refusing = "{{ raise_exception('no ?') if loop.index0 > 60 and '?' in m.content }}"
    messages = [*LONG_CHAT[:60], user("60"), *chat(10, reasons=False)]
    messages[61:] = [
        {**message, "content": message["content"].strip("?")} for message in messages[61:]
    ]
    tokenizer = tokenizer_with(TEMPLATE.replace("BEFORE", refusing))
    check(tokenizer, messages, monkeypatch)


def has(role, number):
    return {"role": role, "content": str(number)}


@given(
    roles=st.lists(st.sampled_from(["user", "assistant", "tool"]), min_size=50, max_size=80),
    shown=st.sampled_from(["last", "later", "all", "numbers"]),
    threshold=st.integers(1, 70),
    prompts=st.sampled_from([(True, False), (False,)]),
)
def test_views_are_right_or_differ(roles, shown, threshold, prompts):
    """A template whose texts depend on how many messages there are, from some number on."""

    def render(messages, prompt):
        long = len(messages) > threshold
        texts = [f"<{message['role']}>{message['content']}" for message in messages]
        if shown == "numbers" and long:
            texts = [f"{number}{text}" for number, text in enumerate(texts)]
        elif shown == "all" and long:
            texts = [text.replace("<", "(") for text in texts]
        elif shown == "later":
            texts[:-threshold] = [text[:2] for text in texts[:-threshold]]
        elif long:
            texts[-1] += " long"
        return "".join(texts) + "<assistant>" * prompt

    messages = [has(role, number) for number, role in enumerate(roles)]
    shared = Views(render)
    made = {}
    try:
        for length in range(1, len(messages) + 1):
            for prompt in prompts:
                made[length, prompt] = shared.render(messages[:length], prompt)
        shared.check()
    except ViewsDiffer:
        return
    assert made == {key: render(messages[: key[0]], key[1]) for key in made}


def test_a_refusal_in_full_alone_is_a_difference():
    refuses = False

    def render(messages, prompt):
        if refuses:
            raise TemplateRefusal("no")
        return "".join(f"<{message['role']}>{message['content']}" for message in messages)

    shared = Views(render)
    for length in range(MIN_LENGTH, 80):
        shared.render(LONG_CHAT[:length], True)
    refuses = True
    with pytest.raises(ViewsDiffer):
        shared.check()
