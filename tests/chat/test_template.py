"""What is found out about a template is found once, and anew when what it follows from changes."""

import copy
import pickle

import pytest

from onepass_trl.chat import render_passes
from onepass_trl.chat.template import _MOST_FACTS, Template
from tests.chat.tokenizers import small_tokenizer

TEMPLATE = """
{%- for message in messages %}<|im_start|>{{ message.role }} {{ message.content }}
{{- message.tool_calls[0].function.arguments.a if message.tool_calls }}<|im_end|>
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant {% endif %}
"""
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


def tool():
    """Do nothing."""


@pytest.fixture
def tokenizer():
    tokenizer = copy.deepcopy(small_tokenizer("qwen3"))
    tokenizer.chat_template = TEMPLATE.strip()
    return tokenizer


@pytest.fixture
def renders(monkeypatch):
    """The messages of each rendering."""
    rendered, render = [], Template.render

    def recording(self, messages, *, prompt):
        rendered.append(messages)
        return render(self, messages, prompt=prompt)

    monkeypatch.setattr(Template, "render", recording)
    return rendered


def facts(tokenizer, tools=None, kwargs=None):
    template = Template(tokenizer, tools, kwargs)
    return (
        template.question,
        template.question_prompt,
        template.closing,
        template.takes_text_arguments,
    )


def test_facts_are_those_of_the_template_and_found_once(tokenizer, renders):
    question = "<|im_start|>user <|im_end|>"
    expected = (question, question + "<|im_start|>assistant ", "", False)
    assert facts(tokenizer) == expected
    num_renders = len(renders)
    assert facts(tokenizer) == facts(tokenizer, [], {}) == expected
    assert len(renders) == 2 * num_renders, "no tools and an empty list of them can differ"
    assert facts(tokenizer, [TOOL]) == facts(tokenizer, [copy.deepcopy(TOOL)]) == expected
    assert len(renders) == 3 * num_renders


@pytest.mark.parametrize(
    ("tools", "kwargs"),
    [([tool], None), (None, {"name": object()}), (None, {"chat_template": "{{ strftime_now }}"})],
)
def test_what_may_change_unseen_is_not_kept(tokenizer, renders, tools, kwargs):
    facts(tokenizer, tools, kwargs)
    num_renders = len(renders)
    facts(tokenizer, tools, kwargs)
    assert len(renders) == 2 * num_renders


def test_changes_are_seen(tokenizer):
    question = facts(tokenizer)[0]
    tokenizer.chat_template += "{{ eos_token }}{{ x }}"
    assert facts(tokenizer)[0] == question + "<|im_end|>"
    assert facts(tokenizer)[2] == "<|im_end|>"
    tokenizer.eos_token = "<eos>"
    assert facts(tokenizer)[2] == "<eos>"
    for value in (1, True, 1.0, [1], (1,)):
        assert facts(tokenizer, kwargs={"x": value})[0] == f"{question}<eos>{value}"


def test_what_is_kept_is_bounded_and_not_part_of_the_tokenizer(tokenizer, renders):
    before = pickle.dumps(tokenizer)
    for number in range(_MOST_FACTS + 1):
        facts(tokenizer, kwargs={"x": number})
    assert pickle.dumps(tokenizer) == before
    renders.clear()
    facts(tokenizer, kwargs={"x": _MOST_FACTS})
    assert not renders
    facts(tokenizer, kwargs={"x": 0})
    assert renders


def test_a_second_conversation_renders_only_its_own_turns(renders):
    messages = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
    tokenizer = copy.deepcopy(small_tokenizer("deepseekv3"))
    render_passes(messages, tokenizer)
    first = len(renders)
    render_passes(messages, tokenizer)
    assert len(renders) - first == first - 2
