"""What a template's code reads is told from its comments, its prose and its own variables."""

from __future__ import annotations

import pytest

from onepass_trl.chat import ChatFormatError
from onepass_trl.chat.messages import REASONING_KEYS
from onepass_trl.chat.template_source import read_source


@pytest.mark.parametrize(
    "access",
    [
        "{{ m.thinking }}",
        "{% if m['thinking'] %}x{% endif %}",
        '{{ messages[0]["thinking"] }}',
        "{{ m.get('thinking', '') }}",
        "{% if 'thinking' in m %}x{% endif %}",
        "{% if 'thinking' not in m %}x{% endif %}",
        "{% generation %}{{- m . thinking -}}{% endgeneration %}",
    ],
)
def test_accesses_to_a_key(access):
    assert read_source(access).keys & set(REASONING_KEYS) == {"thinking"}


@pytest.mark.parametrize(
    "text",
    [
        "{# reads message.thinking and message['reasoning'] #}",
        "A systematic thinking process. See message.thinking.",
        "{{ 'You are a deep thinking AI. See message.thinking and .reasoning' }}",
        "{% set thinking = true %}{% if thinking %}x{% endif %}",
        "{% set ns = namespace(thinking=false) %}{% set ns.thinking = true %}{{ ns.thinking }}",
        "{% if mode == 'thinking' %}x{% endif %}{{ ['reasoning'] }}",
    ],
)
def test_no_access_to_a_key(text):
    assert not read_source(text).keys & set(REASONING_KEYS)


def test_variables():
    source = read_source(
        "{# enable_thinking #}Set thinking.{% if tools is defined and not strict %}{{ m.reason }}"
        "{{ f(indent=2) }}{{ 'effort' }}{% set deep = tools == 1 %}{% endif %}"
    )
    for name in ("tools", "strict", "m", "f"):
        assert name in source.variables
    for name in ("enable_thinking", "thinking", "reason", "indent", "effort", "deep"):
        assert name not in source.variables


def test_texts_are_all_but_the_comments():
    texts = read_source("{# </a> #}</b>{{ '</c>' }}").texts
    assert [mark in texts for mark in ("</a>", "</b>", "</c>")] == [False, True, True]


def test_a_template_that_is_no_jinja():
    with pytest.raises(ChatFormatError, match=r"isn't valid Jinja: .* \(line 2\); correct it"):
        read_source("\n{{ 'open }}")
