"""Random conversations: every pass is exact, or the conversation is refused with its turn named."""

from __future__ import annotations

import json
import re
from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onepass_trl.chat import ChatFormatError, render_passes
from tests.chat.families import CASES
from tests.chat.tokenizers import small_tokenizer, texts

MARKUP = [
    "<|im_end|>",
    "</think>",
    "<think>",
    "<tool_call>",
    "<|end|>",
    "<|im_start|>user\n",
    "\n",
    " ",
]
text = st.lists(st.one_of(st.text(max_size=6), st.sampled_from(MARKUP)), max_size=4).map("".join)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
    max_leaves=4,
)
calls = st.builds(
    lambda name, arguments: {"function": {"name": name, "arguments": arguments}},
    st.sampled_from(["search", "f_1"]),
    st.dictionaries(st.text(max_size=4), values, max_size=3),
)


@st.composite
def turns(draw):
    """Draw the messages of a turn: a question, steps with tools, an answer."""
    messages = [{"role": "user", "content": draw(text)}]
    for _ in range(draw(st.integers(0, 2))):
        step = {
            "role": "assistant",
            "content": "",
            "tool_calls": draw(st.lists(calls, min_size=1, max_size=2)),
        }
        messages += [
            {**step, "reasoning_content": draw(text)},
            {"role": "tool", "name": "search", "content": draw(text)},
        ]
    content = draw(text.filter(lambda text: not text.lstrip().startswith("<think>")))
    answer = {"role": "assistant", "content": content, "reasoning_content": draw(text)}
    return [*messages, answer]


conversations = st.lists(turns(), min_size=1, max_size=3).map(lambda parts: list(chain(*parts)))

REASONS = (
    "it is empty",
    "contains the special token",
    "contains '</think>'",
    "with which this template closes it",
    "only the first",
)
# Families whose calls hold the arguments as JSON.
JSON_CALLS = ("qwen3", "deepseekv3", "deepseek_v3_1", "gptoss")
OTHER_CALLS = (
    "glm4moe",
    "nemotron_3_nano",
    "nemotron_3_ultra",
    "qwen3_8",
    "gemma4_v2",
    "gemma4_v5",
    "lfm2_2_5_v2",
    "lfm2_2_5_vl",
    "muse_glimmer",
)


@pytest.mark.parametrize("template", [*JSON_CALLS, *OTHER_CALLS])
@given(messages=conversations)
def test_passes_are_exact_or_refused(template, messages):
    tokenizer = small_tokenizer(template)
    [kwargs] = {tuple(c.kwargs.items()) for c in CASES.values() if c.template == template}
    refusal = None
    try:
        passes = render_passes(messages, tokenizer, chat_template_kwargs=dict(kwargs))
    except ChatFormatError as error:
        refusal = str(error)
    if refusal:
        assert re.match(r"assistant turn \d+ \(message \d+, template family", refusal)
        assert any(reason in refusal for reason in REASONS)
        return
    indices = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    for index, item in zip(indices, passes, strict=True):
        message = messages[index]
        if "deepseek" not in template:  # these raise an error for arguments that are dicts
            prompt = tokenizer.apply_chat_template(
                [as_rendered(m) for m in messages[:index]],
                add_generation_prompt=True,
                **dict(kwargs),
            )
            assert np.array_equal(item.token_ids[~item.trained], prompt["input_ids"])
        completion = texts(tokenizer, item)[1]
        assert message["reasoning_content"].strip() in completion
        assert message["content"].strip() in completion
        if template in JSON_CALLS:
            for call in message.get("tool_calls", ()):
                assert json.dumps(call["function"]["arguments"], ensure_ascii=False) in completion
        end = tokenizer.decode(item.token_ids[-1:])
        assert end in tokenizer.all_special_tokens or end in tokenizer.get_added_vocab()
        assert tokenizer.eos_token not in completion[: -len(end)]


def as_rendered(message):
    """Return the message as rendering sees it: empty reasoning is none."""
    if message["role"] != "assistant":
        return message
    rest = {k: v for k, v in message.items() if k != "reasoning_content"}
    reasoning = message["reasoning_content"]
    return (
        {**rest, **dict.fromkeys(("reasoning_content", "thinking"), reasoning)}
        if reasoning
        else rest
    )
