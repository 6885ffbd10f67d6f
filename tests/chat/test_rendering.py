"""What a pass holds: contexts, completions, the choice of turns, and the errors."""

from __future__ import annotations

import copy
import re

import numpy as np
import pytest

from onepass_trl.chat import (
    ChatFormatError,
    InvalidTurn,
    render_answers,
    render_each_turn,
    render_passes,
)
from onepass_trl.chat.messages import REASONING_KEYS
from tests.chat.families import trl_template
from tests.chat.tokenizers import SMALL, small_tokenizer, texts, tokenizer_with
from tests.chat.turns import render_turns
from tests.chats import CALL, TOOL_TURNS, TWO_TURNS


def test_deepseek_prompt_without_opener():
    tokenizer = copy.deepcopy(small_tokenizer("deepseekv3"))
    tokenizer.chat_template = tokenizer.chat_template.replace("｜><think>\\n", "｜>")
    context, completion = texts(tokenizer, render_passes(TWO_TURNS, tokenizer)[0])
    assert context.endswith("<｜Assistant｜>")
    assert completion == "<think>\nTwo and two.\n</think>\n\n4<｜end▁of▁sentence｜>"
    without = [{k: v for k, v in m.items() if k != "reasoning_content"} for m in TWO_TURNS]
    assert texts(tokenizer, render_passes(without, tokenizer)[0])[1] == "4<｜end▁of▁sentence｜>"


def test_deepseek_closes_the_reasoning_that_the_prompt_opens():
    tokenizer = small_tokenizer("deepseekv3")
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    completion = texts(tokenizer, render_passes(messages, tokenizer)[0])[1]
    assert completion == "\n</think>\n\nHello<｜end▁of▁sentence｜>"


def test_phi3_stops_at_the_end_of_the_turn():
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    tokenizer = small_tokenizer("phi3")
    assert texts(tokenizer, render_passes(messages, tokenizer)[0])[1] == "Hello<|end|>"


def test_llama_keeps_inline_reasoning_in_later_contexts():
    answer = "<think>\nEasy.\n</think>\n\n4"
    messages = [
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "Yes"},
    ]
    tokenizer = small_tokenizer("llama3_1")
    first, second = render_passes(messages, tokenizer)
    assert texts(tokenizer, first)[1] == answer + "<|eot_id|>"
    assert answer in texts(tokenizer, second)[0]


def without_reasoning(messages):
    return [{k: v for k, v in m.items() if k != "reasoning_content"} for m in messages]


@pytest.mark.parametrize("family", SMALL)
def test_context_is_the_prompt_of_inference(family):
    tokenizer = small_tokenizer(family)
    messages = [{k: v for k, v in m.items() if k != "reasoning_content"} for m in TWO_TURNS]
    for index, item in zip((2, 4), render_passes(messages, tokenizer), strict=True):
        prompt = tokenizer.apply_chat_template(messages[:index], add_generation_prompt=True)
        assert item.token_ids[~item.trained].tolist() == prompt["input_ids"]
        assert np.all(np.diff(item.trained.astype(int)) >= 0)


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking", "inline"])
@pytest.mark.parametrize("family", ["qwen3", "deepseekv3", "gptoss"])
def test_every_spelling_of_reasoning_gives_the_same_passes(family, key):
    messages = copy.deepcopy(TWO_TURNS)
    for message in messages:
        reasoning = message.pop("reasoning_content", None)
        if reasoning and key == "inline":
            message["content"] = f"<think>\n{reasoning}\n</think>\n\n{message['content']}"
        elif reasoning:
            message[key] = reasoning
    tokenizer = small_tokenizer(family)
    for a, b in zip(
        render_passes(messages, tokenizer), render_passes(TWO_TURNS, tokenizer), strict=True
    ):
        assert a.token_ids.tolist() == b.token_ids.tolist()
        assert a.trained.tolist() == b.trained.tolist()


@pytest.mark.parametrize("given", REASONING_KEYS)
@pytest.mark.parametrize("read", REASONING_KEYS)
def test_a_template_may_read_reasoning_by_any_name(read, given):
    tokenizer = tokenizer_with(
        f"{{% for m in messages %}}{{{{ m.role }}}}\n{{{{ m.{read} or '' }}}}: {{{{ m.content }}}}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}assistant\n{% endif %}"
    )
    messages = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
    messages[1][given] = "Add."
    [item] = render_passes(messages, tokenizer)
    assert texts(tokenizer, item)[1] == "Add.: 4<|im_end|>"


@pytest.mark.parametrize("family", ["qwen3", "llama3_1", "gptoss"])
def test_arguments_as_json_text_and_flat_calls_give_the_same_passes(family):
    messages = copy.deepcopy(without_reasoning(TOOL_TURNS))
    arguments = '{"query": "tr\\u00e4ge",  "limit": 3}'
    messages[1]["tool_calls"] = [{"name": "search", "arguments": arguments}]
    tokenizer = small_tokenizer(family)
    expected = render_passes(without_reasoning(TOOL_TURNS), tokenizer)
    for a, b in zip(render_passes(messages, tokenizer), expected, strict=True):
        assert a.token_ids.tolist() == b.token_ids.tolist()


@pytest.mark.parametrize(
    "arguments",
    [
        '{"query":"tr\\u00e4ge","limit":1.50}',
        ' {"limit": 1E2,\n "query": "a\\/b"}',
        '{"list": [1,2 ,{"a":null}], "flag":true}',
        "{ }",
    ],
)
def test_arguments_given_as_text_are_written_as_given_where_the_template_takes_text(arguments):
    messages = without_reasoning(TOOL_TURNS)
    messages[1] = {**messages[1], "tool_calls": [{"name": "search", "arguments": arguments}]}
    tokenizer = small_tokenizer("deepseekv3")
    called, answered = (texts(tokenizer, item) for item in render_passes(messages, tokenizer))
    written = f"```json\n{arguments}\n```"
    assert written in called[1]
    assert written in answered[0]


PARTS = [{"type": "text", "text": "First."}, {"type": "text", "text": "Second."}]


@pytest.mark.parametrize("template", ["qwen3", "llama3_1", "deepseekv3", "gptoss", "phi3"])
def test_text_parts_are_joined_as_by_servers_where_the_template_takes_text(template):
    tokenizer = small_tokenizer(template)
    messages = [{"role": "user", "content": PARTS}, {"role": "assistant", "content": PARTS}]
    joined = [{**message, "content": "First.\nSecond."} for message in messages]
    [item], [expected] = (render_passes(m, tokenizer) for m in (messages, joined))
    assert item.token_ids.tolist() == expected.token_ids.tolist()


@pytest.mark.parametrize(("template", "between"), [("qwen3_vl", ""), ("lfm2_2_5_vl", "")])
def test_text_parts_are_joined_as_by_the_template_where_it_takes_parts(template, between):
    tokenizer = small_tokenizer(template)
    messages = [{"role": "user", "content": PARTS}, answer()]
    [item] = render_passes(messages, tokenizer)
    prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True)["input_ids"]
    assert item.token_ids[~item.trained].tolist() == prompt
    assert f"First.{between}Second." in texts(tokenizer, item)[0]


def test_what_a_template_writes_between_parts():
    tokenizer = copy.deepcopy(small_tokenizer("qwen3"))
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }} {% if m.content is string %}"
        "{{ m.content }}{% else %}{{ m.content | map(attribute='text') | join('  ') }}{% endif %}"
        "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
    )
    [item] = render_passes([{"role": "user", "content": PARTS}, answer()], tokenizer)
    assert "First.  Second.<|im_end|>" in texts(tokenizer, item)[0]


@pytest.mark.parametrize("template", ["deepseekv3", "deepseekv3_training"])
def test_arguments_are_given_as_the_template_takes_them(template):
    tokenizer = copy.deepcopy(small_tokenizer("deepseekv3"))
    tokenizer.chat_template = trl_template(template)
    completion = texts(tokenizer, render_passes(TOOL_TURNS, tokenizer)[0])[1]
    assert '```json\n{"query": "träge", "limit": 3}\n```' in completion


def test_the_messages_are_left_alone():
    messages = copy.deepcopy(TOOL_TURNS)
    messages[1]["train"] = False
    before = copy.deepcopy(messages)
    render_passes(messages, small_tokenizer("qwen3"))
    assert messages == before


@pytest.mark.parametrize(
    ("train_on", "turns"),
    [("all", [0, 1]), ("last", [1]), ([0], [0]), ([-1, 1], [1]), ((1, 0), [0, 1])],
)
def test_train_on(train_on, turns):
    tokenizer = small_tokenizer("qwen3")
    every = render_passes(TWO_TURNS, tokenizer)
    chosen = render_passes(TWO_TURNS, tokenizer, train_on=train_on)
    assert [c.token_ids.tolist() for c in chosen] == [every[t].token_ids.tolist() for t in turns]


def test_a_message_switches_its_turn_off():
    messages = copy.deepcopy(TWO_TURNS)
    messages[2]["train"] = False
    tokenizer = small_tokenizer("qwen3")
    [item] = render_passes(messages, tokenizer)
    assert item.token_ids.tolist() == render_passes(TWO_TURNS, tokenizer)[1].token_ids.tolist()


def test_nulls_that_a_dataset_fills_in_change_nothing():
    keys = {key for message in TOOL_TURNS for key in message}
    filled = [{key: message.get(key) for key in keys} for message in TOOL_TURNS]
    tokenizer = small_tokenizer("qwen3")
    for a, b in zip(
        render_passes(filled, tokenizer), render_passes(TOOL_TURNS, tokenizer), strict=True
    ):
        assert a.token_ids.tolist() == b.token_ids.tolist()


def user(text="Hi"):
    return {"role": "user", "content": text}


def answer(text="Hello", **more):
    return {"role": "assistant", "content": text, **more}


def named(name):
    return {"type": "function", "function": {"name": name, "arguments": {"a": 1}}}


ERRORS = [
    ("qwen3", [user()], {}, "has 1 message, none from the assistant"),
    ("qwen3", [], {}, "has 0 messages, none"),
    ("qwen3", [answer(), user(), answer()], {}, r"turn 0 \(message 0, .* nothing stands before it"),
    ("qwen3", [user(), answer(train=False)], {}, "leave nothing to train of 1 assistant turn;"),
    ("qwen3", TWO_TURNS, {"train_on": []}, "leave nothing to train of 2 assistant turns"),
    ("qwen3", TWO_TURNS, {"train_on": [2]}, r"lists turn 2, .* 2 assistant turns, -2\.\.1"),
    ("qwen3", TWO_TURNS, {"train_on": [True]}, "whole turn numbers"),
    ("qwen3", TWO_TURNS, {"train_on": "first"}, "must be 'all', 'last' or a list"),
    ("qwen3", TWO_TURNS, {"chat_template_kwargs": {"tokenize": False}}, "must not set tokenize"),
    (
        "qwen3",
        TWO_TURNS,
        {"chat_template_kwargs": {"enable_thinking": False}},
        "prompt before it.*enable_thinking.: True",
    ),
    ("qwen3", [user(), answer("a<|im_end|>b")], {}, r"contains the special token '<\|im_end\|>'"),
    ("qwen3", [user(), answer("a</think>b")], {}, "content contains '</think>'"),
    ("qwen3", [user(), answer(reasoning="a</think>b")], {}, "reasoning_content contains"),
    ("qwen3", [{"role": "system", "content": "S"}, answer(reasoning="xyz")], {}, "its reasoning"),
    ("llama3_1", [user(), answer(reasoning="Hm")], {}, "template has no place for any"),
    (
        "llama3_1",
        [*TOOL_TURNS[:1], answer("See", tool_calls=[CALL])],
        {},
        "composable.*its content",
    ),
    (
        "gptoss",
        [user(), answer(reasoning="Hm", tool_calls=[CALL])],
        {},
        "gpt-oss.*refuses.*join content and reasoning",
    ),
    ("gptoss", [user(), answer("", tool_calls=[CALL, CALL])], {}, "2 tool calls, .*only the first"),
    (
        "gptoss",
        [user(), {"role": "tool", "content": "x"}, answer()],
        {},
        "before each tool message",
    ),
    ("deepseekv3", [user(), answer("a</think>b")], {}, "content contains '</think>'"),
    ("gptoss", [user(), answer("a\n</think>\n\nb")], {}, "give it as 'reasoning_content'"),
    ("qwen3", [user(), answer(" \n ")], {}, "it is empty"),
    *(
        (family, [user(), answer("", tool_calls=[named("f\ud800")])], {}, "unpaired surrogate")
        for family in ("qwen3", "gptoss")
    ),
    ("qwen3", [user(), answer()], {"tools": [named("f\ud800")]}, "unpaired surrogate, which no"),
    *(
        (family, [user(), answer(content)], {}, "give it as 'reasoning_content', else")
        for family in ("qwen3", "gptoss", "gemma4", "muse_glimmer")
        for content in ("b <think>a</think>c", "b\n<think>\na\n</think>\nc", "Add.</think>4")
    ),
    (
        "qwen3",
        [user(), answer("Write `</think>`.", reasoning="a </think>")],
        {},
        "where the reasoning would end when it is generated",
    ),
]


@pytest.mark.parametrize(("family", "messages", "kwargs", "match"), ERRORS)
def test_errors(family, messages, kwargs, match):
    with pytest.raises(ChatFormatError, match=match):
        render_passes(messages, small_tokenizer(family), **kwargs)


def test_tokenizer_without_a_template():
    tokenizer = copy.deepcopy(small_tokenizer("qwen3"))
    tokenizer.chat_template = None
    with pytest.raises(ChatFormatError, match="no chat template"):
        render_passes(TWO_TURNS, tokenizer)


def test_template_without_end_of_turn():
    tokenizer = copy.deepcopy(small_tokenizer("qwen3"))
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    with pytest.raises(ChatFormatError, match=r"turn 0 \(message 1, .*no special token ends"):
        render_passes([user(), answer()], tokenizer)


def test_short_answers_are_not_found_in_markup():
    tokenizer = copy.deepcopy(small_tokenizer("qwen3"))
    tokenizer.chat_template = tokenizer.chat_template.replace("content.lstrip('\\n')", "''")
    for text in ("t", "end", "im", "k", ">", "<"):
        with pytest.raises(ChatFormatError, match="its content"):
            render_passes([user(), answer(text)], tokenizer)


def test_dropped_fields_are_not_found_elsewhere():
    drops = {
        "reasoning_content.strip('\\n')": [user(), answer("I know it", reasoning="know")],
        "tool_call.name": [user(), answer("I search", tool_calls=[{"name": "search"}])],
        "tool_call.arguments | tojson": [
            user(),
            answer("I search", tool_calls=[{"name": "search", "arguments": {"se": "ar"}}]),
        ],
    }
    for written, messages in drops.items():
        tokenizer = copy.deepcopy(small_tokenizer("qwen3"))
        assert written in tokenizer.chat_template
        tokenizer.chat_template = tokenizer.chat_template.replace(written, "''")
        with pytest.raises(ChatFormatError, match="isn't written by the template"):
            render_passes(messages, tokenizer)


def test_an_empty_turn_is_refused():
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": None}]
    with pytest.raises(ChatFormatError, match=r"message 1, .*it is empty"):
        render_passes(messages, small_tokenizer("qwen3"))


@pytest.mark.parametrize("template", SMALL)
def test_answers_to_the_same_messages_are_the_turns_of_conversations_of_their_own(template):
    tokenizer = small_tokenizer(template)
    answers = [{"role": "assistant", "content": "four"}, {"role": "assistant", "content": ">"}]
    if template not in ("llama3_1", "phi3"):
        answers += [TWO_TURNS[-1], TOOL_TURNS[1]]
    texts = render_answers(TWO_TURNS[:-1], answers, tokenizer)
    for answer, text in zip(answers, texts, strict=True):
        [turn] = render_turns([*TWO_TURNS[:-1], answer], tokenizer, train_on="last")
        assert vars(turn) == {**vars(text), "rendered": turn.rendered}


def test_each_answer_to_the_same_messages_is_checked():
    """What the checks of one answer find says nothing of answers of another shape."""
    tokenizer = copy.deepcopy(small_tokenizer("qwen3"))
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.reasoning_content }}"
        "{{ m.content if not m.reasoning_content else '4' }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
    )
    answer = {"role": "assistant", "content": "4"}
    both = {**answer, "reasoning_content": "4 > 3, so 4"}
    question = {"role": "user", "content": "2+2?"}
    first, second, third = render_answers([question], [answer, both, question], tokenizer)
    assert first.completion == "4<|im_end|>"
    assert "its content" in str(second.error)
    assert "has 2 messages, none from the assistant" in str(third.error)


def test_invalid_turns_are_values():
    tokenizer = small_tokenizer("qwen3")
    question = {"role": "user", "content": "2+2?"}
    messages = [question, {"role": "assistant", "content": ""}, *TWO_TURNS]
    invalid, *turns = render_each_turn(messages, tokenizer)
    assert isinstance(invalid, InvalidTurn)
    assert "assistant turn 0 (message 1, template family" in str(invalid.error)
    assert [turn.number for turn in turns] == [1, 2]
    assert [messages[turn.index]["content"] for turn in turns] == [
        message["content"] for message in TWO_TURNS if message["role"] == "assistant"
    ]
    with pytest.raises(ChatFormatError, match="it is empty"):
        render_turns(messages, tokenizer)
    with pytest.raises(ChatFormatError, match="has 1 message, none from"):
        render_each_turn([question], tokenizer)


RAISING = {
    "{{ 1 / 0 }}": "ZeroDivisionError: division by zero",
    "{{ 1 // none }}": "TypeError: unsupported operand",
    "{{ 'a' * 10 ** 15 }}": "MemoryError",
    "{{ 10.0 ** 1000 }}": "OverflowError",
    "{{ messages[9].role }}": "has no element 9",
    "{{ ''.join([1]) }}": "TypeError: sequence item 0",
    "{{ raise_exception('Not so.') }}": "Not so.",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "RecursionError",
}


@pytest.mark.parametrize("code", RAISING)
def test_whatever_a_template_raises_is_the_error_of_its_turn(code):
    tokenizer = copy.deepcopy(small_tokenizer("qwen3"))
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.content == 'odd' %}" + code + "{% endif %}"
        "<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
    )
    messages = [user(), answer(), user("odd"), answer()]
    first, second = render_each_turn(messages, tokenizer)
    assert first.completion == "Hello<|im_end|>"
    match = rf"turn 1 .*the template refuses the messages up to it: .*({RAISING[code]})"
    assert re.search(match, str(second.error))


def test_messages_that_are_nested_too_deep():
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    messages = [user(), answer(), {**user(), "metadata": deep}, answer()]
    first, second = render_each_turn(messages, small_tokenizer("qwen3"))
    assert first.completion.endswith("Hello<|im_end|>")
    assert "the template refuses the messages up to it: RecursionError" in str(second.error)


def test_tools_that_are_nested_too_deep():
    deep: dict = {}
    for _ in range(2_000):
        deep = {"items": deep}
    tool = {"type": "function", "function": {"name": "f", "parameters": deep}}
    with pytest.raises(ChatFormatError, match=r"turn 0 .*the template refuses .*RecursionError"):
        render_passes([user(), answer()], small_tokenizer("qwen3"), tools=[tool])


def test_a_template_that_is_no_jinja():
    tokenizer = copy.deepcopy(small_tokenizer("qwen3"))
    for code in ("{{ '", "{% if %}x{% endif %}", "{{ " + "(" * 300 + "1" + ")" * 300 + " }}"):
        tokenizer.chat_template = code
        with pytest.raises(ChatFormatError, match=r"isn't valid Jinja|the template refuses"):
            render_passes([user(), answer()], tokenizer)


@pytest.mark.parametrize("template", ["idefics3", "smolvlm", "llava_next", "smolvlm_training"])
def test_templates_that_take_lists_of_parts_only(template):
    tokenizer = copy.deepcopy(small_tokenizer("qwen3"))
    tokenizer.chat_template = trl_template(template)
    tokenizer.add_tokens(["<end_of_utterance>", "</s>"], special_tokens=True)
    tokenizer.bos_token = "<|im_start|>"
    messages = [user("2+2?"), answer("4"), user("3+3?"), answer("6")]
    served = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
    first, second = render_turns(messages, tokenizer)
    for turn, index in ((first, 1), (second, 3)):
        assert turn.context == tokenizer.apply_chat_template(
            served[:index], add_generation_prompt=True, tokenize=False
        )
    assert first.completion.strip().startswith("4")
    assert second.completion.strip().startswith("6")
    for given, expected in zip(render_turns(served, tokenizer), (first, second), strict=True):
        assert (given.context, given.completion) == (expected.context, expected.completion)


@pytest.mark.parametrize("family", ["gptoss", "gemma4", "muse_glimmer"])
def test_a_quoted_mark_is_text_where_it_ends_no_reasoning(family):
    content = "Models write `<think>` and `</think>`."
    [item] = render_passes([user(), answer(content)], small_tokenizer(family))
    assert content in texts(small_tokenizer(family), item)[1]
