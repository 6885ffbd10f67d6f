"""What neither the package nor the template reads: said once, or an error."""

from __future__ import annotations

import copy

import pytest

from onepass_trl.chat import ChatFormatError, render_passes, unread
from tests.chat.families import CASES
from tests.chat.tokenizers import make_small_tokenizer, small_tokenizer

USER = {"role": "user", "content": "Hi, who are you?"}
ANSWER = {"role": "assistant", "content": "Hello."}
TOOL = {"type": "function", "function": {"name": "search", "description": "", "parameters": {}}}


@pytest.fixture(autouse=True)
def nothing_said_yet(monkeypatch):
    monkeypatch.setattr(unread, "_said", set())


@pytest.mark.parametrize(
    ("template", "role"),
    [("qwen3", "developer"), ("deepseekv3", "developer"), ("gptoss", "system")],
)
def test_a_message_that_the_template_leaves_out_is_named_once(caplog, template, role):
    place = {"qwen3": 0, "deepseekv3": 0, "gptoss": 2}[template]
    messages = [{"role": "system", "content": "Obey."}, USER, ANSWER, USER, ANSWER]
    messages.insert(place, {"role": role, "content": "Be brief."})
    for _ in range(2):
        render_passes(messages, small_tokenizer(template))
    [record] = caplog.records
    assert f"leaves out a message with role '{role}' (message {place})" in record.message


@pytest.mark.parametrize("tool", [TOOL["function"], {"function": TOOL["function"]}, {"name": "f"}])
def test_tools_in_another_form_than_that_of_servers_are_named_once(caplog, tool):
    tokenizer = small_tokenizer("qwen3")
    for _ in range(2):
        render_passes([USER, ANSWER], tokenizer, tools=[TOOL, tool])
    [record] = caplog.records
    assert f"a tool with the keys {str(list(tool))[1:-1]}. Servers give templates" in record.message


def test_functions_as_tools_are_not_reported(caplog):
    def search(query: str) -> str:
        """
        Search.

        Args:
            query: What for.
        """

    [item] = render_passes([USER, ANSWER], small_tokenizer("qwen3"), tools=[search])
    assert '"type": "function"' in small_tokenizer("qwen3").decode(item.token_ids)
    assert not caplog.records


def test_tools_that_the_template_does_not_read_are_named_once(caplog):
    tokenizer = small_tokenizer("phi3")
    for _ in range(2):
        render_passes([USER, ANSWER], tokenizer, tools=[TOOL])
    [record] = caplog.records
    assert "has tools, but this chat template doesn't read tools" in record.message


def test_keys_that_nobody_reads_are_named_once(caplog):
    for others in ({}, {"reason": "stop"}, {"annotations": [], "score": 1.0}):
        messages = [USER | {"timestamp": 1}, ANSWER | {"score": 0.5, "refusal": None} | others]
        render_passes(messages, small_tokenizer("qwen3"))
    first, second = caplog.records
    assert "messages have 'score', 'timestamp', which neither" in first.message
    assert "messages have 'reason', which neither" in second.message


@pytest.mark.parametrize("template", sorted({case.template for case in CASES.values()}))
def test_other_names_for_reasoning_are_errors(template):
    match = "message 1 has 'thought', .*; rename it to 'reasoning_content'"
    with pytest.raises(ChatFormatError, match=match):
        render_passes([USER, ANSWER | {"thought": "Hm."}], small_tokenizer(template))


BLOCK = [{"type": "reasoning.text", "text": "Hm."}]
MEANT = [
    *((key, "Hm.", "reasoning_content") for key in ("thoughts", "think", "cot", "rationale")),
    *((key, "Hm.", "reasoning_content") for key in ("thinking_content", "reasoningText")),
    *((key, BLOCK, "reasoning_content") for key in ("reasoning_details", "thinking_blocks")),
    *((key, [{"name": "f"}], "tool_calls") for key in ("function_calls", "tool_call", "tool_uses")),
    ("toolCalls", {"name": "f"}, "tool_calls"),
    ("train_detail", [{"begin_offset": 0, "end_offset": 3, "train": False}], "train"),
    *((key, 0, "train") for key in ("train_on_turn", "is_trained", "mask", "masked")),
]


@pytest.mark.parametrize(("key", "value", "name"), MEANT)
def test_other_names_for_what_is_trained_are_errors(key, value, name):
    match = rf"message 1 has '{key}', which neither .*'{name}'.*, or remove it"
    with pytest.raises(ChatFormatError, match=match):
        render_passes([USER, ANSWER | {key: value}], small_tokenizer("qwen3"))


def test_what_only_counts_reasoning_or_calls_is_reported(caplog):
    counts = {"reasoning_tokens": 12, "thinking_time": 1.5, "num_calls": 0, "finish_reason": "stop"}
    question = USER | {"train_id": "a7", "thought": "Hm."}
    render_passes([question, ANSWER | counts], small_tokenizer("qwen3"))
    [record] = caplog.records
    for key in (*counts, "train_id", "thought"):
        assert repr(key) in record.message


def test_a_template_may_read_any_key(caplog):
    tokenizer = copy.deepcopy(small_tokenizer("qwen3"))
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + (m.thought or '') + m.content + '<|im_end|>' }}"
        "{% endfor %}{% if add_generation_prompt %}assistant{% endif %}"
    )
    [item] = render_passes([USER, ANSWER | {"thought": "Hm."}], tokenizer)
    assert tokenizer.decode(item.token_ids).endswith("assistantHm.Hello.<|im_end|>")
    assert not caplog.records


@pytest.mark.parametrize("name", CASES)
def test_what_is_written_is_not_reported(caplog, name):
    messages = [{"role": "system", "content": ' Say "yes"\nor no. '}, USER, ANSWER, USER, ANSWER]
    try:
        render_passes(messages, make_small_tokenizer(CASES[name]))
    except ChatFormatError:  # no system message, or a prompt that asks for reasoning
        render_passes(messages[1:], make_small_tokenizer(CASES[name]))
    assert not caplog.records


@pytest.mark.parametrize("template", ["qwen3", "llama3_1", "deepseekv3", "gptoss"])
def test_tools_and_their_results_are_not_reported(caplog, template):
    call = {"type": "function", "function": {"name": "search", "arguments": {"query": "a"}}}
    result = {"role": "tool", "name": "search", "content": '{"found": ["a\\n\\"b\\""]}\n'}
    messages = [USER, {**ANSWER, "content": "", "tool_calls": [call]}, result, ANSWER]
    tools = None if template == "deepseekv3" else [TOOL]
    render_passes(messages, small_tokenizer(template), tools=tools)
    assert not caplog.records
