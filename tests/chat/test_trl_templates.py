"""What each template that TRL ships refuses, and nothing else: `docs/chat_formats.md` says why."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path

import pytest

from onepass_trl.chat import InvalidTurn, render_each_turn
from tests.chat.families import CASES, trl_template
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
}
CALLS = ("call", "text and call", "two calls")
VISION = ("idefics3", "llava_next", "qwen2_5_vl", "smolvlm")
NO_REASONING = (
    *(case.template for case in CASES.values() if not case.reasoning),
    *VISION,
)
NO_CALLS = ("cohere", "cohere2", "gemma", "gemma3", "lfm2", "llama3", "phi3", "phi3_5", *VISION)
REFUSED = {
    **{name: {"reasoning"} for name in NO_REASONING},
    **{name: {"reasoning", *CALLS} for name in NO_CALLS},
    # Calls are written only beside a null content, and one alone isn't ended.
    "deepseek_r1_distill": {*CALLS},
    # TRL's own version keeps contents as they are behind a prompt that opens the reasoning.
    "deepseek_r1_distill_training": {"answer", "reasoning", "system", *CALLS},
    "gemma": {"reasoning", "system", *CALLS},
    "gptoss": {"two calls"},
    "llama3_1": {"reasoning", "text and call", "two calls"},
    "llama3_2": {"reasoning", "text and call", "two calls"},
    "muse_glimmer": {"text and call"},
}


@pytest.mark.parametrize("name", NAMES)
def test_what_is_refused(name):
    original = name.removesuffix("_training")
    case = BY_TEMPLATE.get(original, CASES["Qwen2.5"])
    tokenizer = copy.deepcopy(make_small_tokenizer(case))
    tokenizer.add_tokens(["<end_of_utterance>", "</s>"], special_tokens=True)
    tokenizer.bos_token = tokenizer.bos_token or "<|im_start|>"
    tokenizer.chat_template = trl_template(name)
    refused = {
        kind
        for kind, messages in KINDS.items()
        if any(
            isinstance(turn, InvalidTurn)
            for turn in render_each_turn(messages, tokenizer, chat_template_kwargs=case.kwargs)
        )
    }
    assert refused == REFUSED.get(name, REFUSED.get(original, set()))
