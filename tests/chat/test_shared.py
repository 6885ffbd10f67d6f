"""Every turn of the real conversations, with real tokenizers.

Three oracles: the context is what ``apply_chat_template`` gives; reasoning, answer and tool calls
stand in their own pass; and a parser of the family's output, TRL's where it has one, gives the
message back.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter

import numpy as np
import pytest
from trl.chat_template_utils import add_response_schema

from onepass_trl.chat import ChatFormatError, render_passes
from tests.chat.tokenizers import SHARED, SHARED_REASON, real_tokenizer

pytestmark = [
    pytest.mark.shared,
    pytest.mark.slow,
    pytest.mark.skipif(not SHARED.is_dir(), reason=SHARED_REASON),
]

FILES = {"maths_chat": 450, "tool_chat": 86, "agent_short": 544, "agent_long": 255}
TOKENIZERS = {
    "qwen3": ("qwen3", "chat_template.jinja"),
    "deepseek": ("deepseek-r1", "chat_template.jinja"),
    "deepseek-package": ("deepseek-r1", "chat_template_package.jinja"),
    "gpt-oss": ("gpt-oss", "chat_template.jinja"),
}
# What gpt-oss's template can't write: conversations by the reason for which they are refused.
REFUSED = {
    ("gpt-oss", "agent_short"): {"tool calls, of which": 24, "both content and thinking": 3},
    ("gpt-oss", "agent_long"): {"tool calls, of which": 3},
}
_DEEPSEEK = re.compile(
    r"(?:<think>\n)?(?P<reasoning>.*?)\n</think>\n\n(?P<content>.*?)"
    r"(?:<｜tool▁calls▁begin｜>(?P<calls>.*)<｜tool▁calls▁end｜>)?<｜end▁of▁sentence｜>",
    re.DOTALL,
)
_DEEPSEEK_CALL = re.compile(
    r"<｜tool▁call▁begin｜>function<｜tool▁sep｜>([^\n]+)\n```json\n(.*?)\n```<｜tool▁call▁end｜>",
    re.DOTALL,
)


def conversations(file):
    with open(SHARED / "data" / f"{file}.jsonl", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def parse(tokenizer, completion, context):
    """Return reasoning, content and tool calls of generated tokens."""
    if "｜" in tokenizer.eos_token:  # TRL has no parser for DeepSeek's tool calls
        match = _DEEPSEEK.fullmatch(tokenizer.decode(completion))
        assert match
        calls = [(n, json.loads(a)) for n, a in _DEEPSEEK_CALL.findall(match["calls"] or "")]
        return match["reasoning"], match["content"], calls
    if getattr(tokenizer, "response_template", None) is None:
        add_response_schema(tokenizer)
    # The parser looks for where the answer starts: the end of the context is enough.
    message = tokenizer.parse_response(completion.tolist(), prefix=context[-32:].tolist())
    calls = [call["function"] for call in message.get("tool_calls") or ()]
    return (
        message.get("reasoning_content") or message.get("thinking") or "",
        message.get("content") or "",
        [(call["name"], call["arguments"]) for call in calls],
    )


def expected(message):
    functions = [call["function"] for call in message.get("tool_calls") or ()]
    calls = [(function["name"], function["arguments"]) for function in functions]
    return message["reasoning_content"], message["content"], calls


def plain(value):
    """Return the value with texts stripped and composed (the Qwen tokenizer composes
    characters)."""
    if isinstance(value, str):
        return unicodedata.normalize("NFC", value).strip()
    if isinstance(value, dict):
        return {plain(key): plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def check_turn(tokenizer, prompt_ids, message, item):
    context, completion = item.token_ids[~item.trained], item.token_ids[item.trained]
    assert np.array_equal(context, prompt_ids)
    text = unicodedata.normalize("NFC", tokenizer.decode(completion))
    assert plain(message["reasoning_content"]) in text
    assert plain(message["content"]) in text
    for call in message.get("tool_calls") or ():
        assert call["function"]["name"] in text
        assert plain(json.dumps(call["function"]["arguments"], ensure_ascii=False)) in text
    assert plain(parse(tokenizer, completion, context)) == plain(expected(message))


def turns_of(tokenizer, conversation, prepare):
    """Return what inference feeds before each assistant turn, and the turn's message."""
    messages = conversation["messages"]
    prepared = [prepare(message) for message in messages]
    indices = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    prompts = tokenizer.apply_chat_template(
        [prepared[:index] for index in indices],
        tools=conversation.get("tools"),
        add_generation_prompt=True,
    )["input_ids"]
    return zip(prompts, [messages[index] for index in indices], strict=True)


def with_json_arguments(message):
    """Return the message as DeepSeek's templates want it: they raise an error for dicts."""
    if not message.get("tool_calls"):
        return message
    calls = json.loads(json.dumps(message["tool_calls"]))
    for call in calls:
        call["function"]["arguments"] = json.dumps(
            call["function"]["arguments"], ensure_ascii=False
        )
    return {**message, "tool_calls": calls}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_every_turn(name, file):
    tokenizer = real_tokenizer(*TOKENIZERS[name])
    prepare = with_json_arguments if name.startswith("deepseek") else dict
    known = REFUSED.get((name, file), {})
    num_turns, refused = 0, Counter()
    for conversation in conversations(file):
        reason = None
        try:
            passes = render_passes(
                conversation["messages"], tokenizer, tools=conversation.get("tools")
            )
        except ChatFormatError as error:
            reason = next((r for r in known if r in str(error)), str(error))
        if reason:
            refused[reason] += 1
            num_turns += sum(m["role"] == "assistant" for m in conversation["messages"])
            continue
        turns = turns_of(tokenizer, conversation, prepare)
        for (ids, message), item in zip(turns, passes, strict=True):
            check_turn(tokenizer, ids, message, item)
            num_turns += 1
    assert refused == known
    assert num_turns == FILES[file]
