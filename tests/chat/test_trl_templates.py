"""What each template that TRL ships refuses, and nothing else: `docs/chat_formats.md` says why."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path

import pytest

from onepass_trl.chat import InvalidTurn, render_each_turn
from tests.chat.families import CASES, TRAINING, trl_template
from tests.chat.tokenizers import make_small_tokenizer

FOLDER = Path(importlib.util.find_spec("trl").origin).parent / "chat_templates"
NAMES = sorted(path.stem for path in FOLDER.glob("*.jinja"))
BY_TEMPLATE = {case.template: case for case in reversed(CASES.values())}

QUESTION = {"role": "user", "content": "Warm in Rome?"}
RESULT = {"role": "tool", "name": "weather", "tool_call_id": "call00001", "content": "28"}


def said(content, num_calls=0, **more):
    function = {"name": "weather", "arguments": {"city": "Rome"}}
    calls = [{"type": "function", "id": "call00001", "function": function}] * num_calls
    return {"role": "assistant", "content": content, "tool_calls": calls, **more}


HM = {"reasoning_content": "Hm."}
KINDS = {
    "answer": [QUESTION, said("Yes."), QUESTION, said("No.")],
    "reasoning": [QUESTION, said("Yes.", **HM), QUESTION, said("No.", **HM)],
    "inline": [QUESTION, said("<think>\nHm.\n</think>\n\nYes."), QUESTION],
    "system": [{"role": "system", "content": "Be brief."}, QUESTION, said("Yes.")],
    "call": [QUESTION, said("", 1), RESULT, said("Yes.")],
    "text and call": [QUESTION, said("I look.", 1), RESULT, said("Yes.")],
    "two calls": [QUESTION, said("", 2), RESULT, RESULT, said("Yes.")],
    "all three": [QUESTION, said("I look.", 1, **HM), RESULT, said("Yes.")],
}
CALLS = ("call", "text and call", "two calls", "all three")
VISION = ("idefics3", "llava_next", "qwen2_5_vl", "smolvlm")
NO_REASONING = tuple(case.template for case in CASES.values() if not case.reasoning)
NO_CALLS = ("cohere", "cohere2", "gemma", "gemma3", "lfm2", "llama3", "phi3", "phi3_5", *VISION)
REFUSED = {
    **{name: {"reasoning", "all three"} for name in NO_REASONING},
    **{name: {"reasoning", *CALLS} for name in NO_CALLS},
    # Calls are written only next to a null content, and one alone isn't ended.
    "deepseek_r1_distill": {*CALLS},
    # TRL's own version keeps contents as they are after a prompt that opens the reasoning.
    "deepseek_r1_distill_training": {"answer", "reasoning", "system", *CALLS},
    "gemma": {"reasoning", "system", *CALLS},
    "gptoss": {"text and call", "two calls", "all three"},
    "llama3_1": {"reasoning", "text and call", "two calls", "all three"},
    "llama3_2": {"reasoning", "text and call", "two calls", "all three"},
    "muse_glimmer": {"text and call", "all three"},
}


def problems(name, messages):
    """Return why turns of the messages are refused with the template of this name."""
    case = BY_TEMPLATE.get(name.removesuffix("_training"), CASES["Qwen2.5"])
    tokenizer = copy.deepcopy(make_small_tokenizer(case))
    tokenizer.add_tokens(["<end_of_utterance>", "</s>"], special_tokens=True)
    tokenizer.bos_token = tokenizer.bos_token or "<|im_start|>"
    tokenizer.chat_template = trl_template(name)
    turns = render_each_turn(messages, tokenizer, chat_template_kwargs=case.kwargs)
    return [str(turn.error) for turn in turns if isinstance(turn, InvalidTurn)]


def test_every_template_is_among_the_families():
    covered = {case.template for case in (*CASES.values(), *TRAINING.values())}
    assert set(NAMES) - covered == {"deepseek_r1_distill_training"}


@pytest.mark.parametrize("name", NAMES)
def test_what_is_refused(name):
    refused = {kind for kind, messages in KINDS.items() if problems(name, messages)}
    assert refused == REFUSED.get(name, REFUSED.get(name.removesuffix("_training"), set()))


INLINE = "<think>\nHm.\n</think>\n\n"
REMEDIES = [
    ("qwen2_5", KINDS["reasoning"], "into the content as <think>", KINDS["inline"]),
    (
        "qwen2_5",
        [QUESTION, said("", 1, **HM)],
        "into the content as <think>",
        [QUESTION, said(INLINE, 1)],
    ),
    ("llama3_1", [QUESTION, said("", 1, **HM)], "or remove it", [QUESTION, said("", 1)]),
    ("llama3_1", KINDS["text and call"], "with a tool call: remove it", KINDS["call"]),
    (
        "muse_glimmer",
        KINDS["text and call"],
        "with a tool call: put it into its 'reasoning_content'",
        [QUESTION, said("", 1, reasoning="I look."), RESULT, said("Yes.")],
    ),
    *(
        (
            name,
            KINDS["two calls"],
            "split it into one assistant message for each call",
            [QUESTION, said("", 1), RESULT, said("", 1), RESULT, said("Yes.")],
        )
        for name in ("llama3_1", "gptoss")
    ),
    (
        "gptoss",
        KINDS["text and call"],
        "give it as 'reasoning_content'",
        [QUESTION, said("", 1, reasoning="I look."), RESULT, said("Yes.")],
    ),
    (
        "gptoss",
        KINDS["all three"],
        "and reasoning of that message in its 'reasoning_content'",
        [QUESTION, said("", 1, reasoning="Hm. I look.")],
    ),
    (
        "gemma",
        KINDS["system"],
        "into the first question",
        [{"role": "user", "content": "Be brief. Warm in Rome?"}, said("Yes.")],
    ),
    (
        "gemma3",
        [QUESTION, QUESTION, said("Yes.")],
        "join messages of one role",
        [{"role": "user", "content": "Warm in Rome? Today?"}, said("Yes.")],
    ),
    (
        "qwen3_5_think",
        [{"role": "developer", "content": "Be brief."}, QUESTION, said("Yes.")],
        "the role 'system'",
        KINDS["system"],
    ),
    (
        "deepseek_r1_distill_training",
        KINDS["answer"],
        "begin that with the reasoning",
        KINDS["inline"],
    ),
    (
        "deepseek_r1_distill_training",
        KINDS["reasoning"],
        "put it into the content as <think>",
        KINDS["inline"],
    ),
    ("deepseek_r1_distill", KINDS["call"], "use a template that writes it", KINDS["answer"]),
    ("lfm2", KINDS["call"], "use a template that writes it", KINDS["answer"]),
]


@pytest.mark.parametrize(("name", "messages", "remedy", "mended"), REMEDIES)
def test_the_remedy_of_a_refusal_works(name, messages, remedy, mended):
    first = problems(name, messages)[0]
    assert remedy in first
    assert problems(name, mended) == []
