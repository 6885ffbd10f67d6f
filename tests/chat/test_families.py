"""Every family on written conversations; switches, mixed turns and families of user code."""

from __future__ import annotations

import copy

import pytest

from onepass_trl import register_family
from onepass_trl.chat import ChatFormatError, render_passes
from onepass_trl.chat.families import Composable, Family, family_of, registered_families, registry
from onepass_trl.chat.template import Template
from tests.chat.coverage import REFUSALS, UNKNOWN_PROMPT, cover
from tests.chat.families import CASES, TRAINING
from tests.chat.golden import CONVERSATIONS
from tests.chat.tokenizers import make_small_tokenizer, small_tokenizer, texts


def call(name, **arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


# Text next to parallel calls, several results, steps with and without reasoning, another question.
AGENT = [
    {"role": "user", "content": "Compare Rome with Oslo."},
    {
        "role": "assistant",
        "reasoning_content": "Both at once.",
        "content": "I look them up.",
        "tool_calls": [call("weather", city="Rome", days=2), call("weather", city="Oslo", days=2)],
    },
    {"role": "tool", "name": "weather", "content": "28 degrees"},
    {"role": "tool", "name": "weather", "content": "11 degrees"},
    {"role": "assistant", "content": "", "tool_calls": [call("save", warm=True, note="28 > 11")]},
    {"role": "tool", "name": "save", "content": "saved"},
    {"role": "assistant", "reasoning_content": "28 > 11", "content": "Rome is warmer."},
    {"role": "user", "content": "By how much?"},
    {"role": "assistant", "content": "17 degrees."},
    {"role": "user", "content": "And in kelvin?"},
    {"role": "assistant", "reasoning_content": "A difference.", "content": ">"},
]


@pytest.mark.parametrize("case", [*CASES.values(), *TRAINING.values()], ids=lambda case: case.name)
def test_every_turn_is_rendered_right_or_refused_for_a_known_reason(case):
    conversations = [{"id": name, "messages": messages} for name, messages in CONVERSATIONS.items()]
    conversations.append({"id": "agent", "messages": AGENT})
    covered = cover(case, make_small_tokenizer(case), conversations)
    assert covered.refused.keys() <= set(REFUSALS.values())
    assert covered.rendered >= 3
    assert covered.equal_contexts == covered.stopped == covered.rendered
    assert covered.misread.keys() <= {UNKNOWN_PROMPT}
    assert covered.round_trips == covered.rendered - sum(covered.misread.values())


def user(text="2+2?"):
    return {"role": "user", "content": text}


def answer(text="4", **more):
    return {"role": "assistant", "content": text, **more}


SWITCHES = [
    ("qwen3", {}, "\n", "<think>\n\n</think>\n\n4<|im_end|>"),
    ("qwen3", {"enable_thinking": False}, "</think>\n\n", "4<|im_end|>"),
    ("qwen3_5_think", {}, "<think>\n", "\n</think>\n\n4<|im_end|>"),
    ("qwen3_5_nothink", {}, "</think>\n\n", "4<|im_end|>"),
    ("glm4moe", {}, "<|assistant|>", "\n<think></think>\n4<|user|>"),
    ("glm4moe", {"enable_thinking": False}, "<think></think>", "\n4<|user|>"),
    ("nemotron_3_nano", {}, "<think>\n", "\n</think>\n4<|im_end|>"),
    ("nemotron_3_ultra", {}, "<think>\n", "</think>4<|im_end|>"),
    ("nemotron_3_nano", {"enable_thinking": False}, "<think></think>", "4<|im_end|>"),
    ("deepseek_v3_1", {"thinking": True}, "<think>", "</think>4<｜end▁of▁sentence｜>"),
    ("deepseek_v3_1", {"thinking": False}, "</think>", "4<｜end▁of▁sentence｜>"),
    ("gemma4_v5", {"enable_thinking": True}, "model\n", "4<turn|>"),
    ("lfm2_2_5", {}, "assistant\n", "4<|im_end|>"),
]


@pytest.mark.parametrize(("template", "kwargs", "prompt", "completion"), SWITCHES)
def test_a_turn_without_reasoning(template, kwargs, prompt, completion):
    tokenizer = small_tokenizer(template)
    [item] = render_passes([user(), answer()], tokenizer, chat_template_kwargs=kwargs)
    context, rendered = texts(tokenizer, item)
    assert context.endswith(prompt)
    assert rendered == completion


OFF = [
    ("qwen3", {"enable_thinking": False}, "enable_thinking"),
    ("qwen3_5_nothink", {}, "enable_thinking"),
    ("qwen3_8", {"enable_thinking": False}, "enable_thinking"),
    ("glm4moe", {"enable_thinking": False}, "enable_thinking"),
    ("nemotron_3_5_lightning", {"enable_thinking": False}, "enable_thinking"),
    ("deepseek_v3_1", {}, "thinking"),
]


@pytest.mark.parametrize(("template", "kwargs", "switch"), OFF)
def test_reasoning_after_a_prompt_that_excludes_it_names_the_switch(template, kwargs, switch):
    tokenizer = small_tokenizer(template)
    messages = [user(), answer(), user(), answer(reasoning="Two and two.")]
    match = rf"turn 1 .*says that there is none; set .*{{'{switch}': True}}"
    with pytest.raises(ChatFormatError, match=match):
        render_passes(messages, tokenizer, chat_template_kwargs=kwargs)
    [item] = render_passes(messages, tokenizer, chat_template_kwargs=kwargs, train_on=[0])
    assert texts(tokenizer, item)[1].lstrip().startswith("4")


def test_an_argument_that_the_template_does_not_read_is_logged_once(caplog):
    tokenizer = small_tokenizer("qwen3_6")
    for _ in range(2):
        kwargs = {"enable_thinkng": False}
        render_passes([user(), answer()], tokenizer, chat_template_kwargs=kwargs)
    [record] = caplog.records
    assert "'enable_thinkng', which this chat template doesn't read" in record.message
    assert record.message.endswith("enable_thinking")


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.reasoning])
def test_reasoning_is_never_dropped(name):
    tokenizer = make_small_tokenizer(CASES[name])
    with pytest.raises(ChatFormatError, match="the template has no place for any"):
        render_passes([user(), answer(reasoning="Two and two.")], tokenizer)


def test_preserved_reasoning_gives_a_tree_with_one_path():
    tokenizer = small_tokenizer("qwen3_6")
    messages = CONVERSATIONS["two turns"]
    for kept in (False, True):
        kwargs = {"preserve_thinking": kept}
        first, second = render_passes(messages, tokenizer, chat_template_kwargs=kwargs)
        is_path = first.token_ids.tolist() == second.token_ids[: len(first)].tolist()
        assert is_path == kept


def test_reasoning_effort_is_part_of_the_context():
    tokenizer = small_tokenizer("gptoss")
    kwargs = {"reasoning_effort": "high"}
    [item] = render_passes([user(), answer()], tokenizer, chat_template_kwargs=kwargs)
    assert "Reasoning: high" in texts(tokenizer, item)[0]


class Ending(Composable):
    """Ends its turns with the token that ends texts, to see that this family is used."""

    name = "ending"

    def matches(self, template):
        return "<|im_start|>" in template.text

    def completion(self, turn):
        return super().completion(turn).replace("<|im_end|>", "<|endoftext|>")


@pytest.fixture
def clean_registry(monkeypatch):
    monkeypatch.setattr(registry, "_registered", [])


@pytest.mark.usefixtures("clean_registry")
def test_a_registered_family_comes_first():
    tokenizer = small_tokenizer("qwen3")
    assert family_of(Template(tokenizer, None, None)).name == "composable"
    first, second = Ending(), Ending()
    register_family(first)
    register_family(second)
    assert registered_families() == (second,)
    assert family_of(Template(tokenizer, None, None)) is second
    [item] = render_passes([user(), answer("four")], tokenizer)
    assert texts(tokenizer, item)[1] == "<think>\n\n</think>\n\nfour<|endoftext|>"
    assert family_of(Template(small_tokenizer("gptoss"), None, None)).name == "gpt-oss"


@pytest.mark.usefixtures("clean_registry")
@pytest.mark.parametrize("wrong", [Ending, "qwen3", None])
def test_only_families_are_registered(wrong):
    with pytest.raises(TypeError, match=r"an instance of onepass_trl\.chat\.families\.Family"):
        register_family(wrong)


@pytest.mark.usefixtures("clean_registry")
def test_a_registered_family_is_checked_like_all():
    class Silent(Family):
        name = "silent"

        def matches(self, template):
            return True

        def completion(self, turn):
            return "<|im_end|>"

    register_family(Silent())
    with pytest.raises(ChatFormatError, match=r"family silent\): its content"):
        render_passes([user(), answer()], small_tokenizer("qwen3"))


def test_an_edited_template_still_works():
    tokenizer = copy.deepcopy(small_tokenizer("gemma4_v5"))
    tokenizer.chat_template = "{#- edited -#}" + tokenizer.chat_template
    messages = CONVERSATIONS["a tool"]
    edited = render_passes(messages, tokenizer)
    original = render_passes(messages, small_tokenizer("gemma4_v5"))
    assert [texts(tokenizer, a) for a in edited] == [texts(tokenizer, b) for b in original]
