"""Short renderings of every family as text, to be read and compared.

    python -m tests.chat.golden

writes them to ``golden/``, one file a family. Every text ends at ``■``, since templates end it in
a line break as often as not.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from onepass_trl.chat import ChatFormatError, render_passes
from tests.chat.coverage import REFUSALS
from tests.chat.families import CASES, Case
from tests.chat.tokenizers import make_small_tokenizer, texts

FOLDER = Path(__file__).with_name("golden")

_CALL = {
    "type": "function",
    "function": {"name": "weather", "arguments": {"city": "Rome", "days": 2}},
}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "two turns": [
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "reasoning_content": "Two and two.", "content": "4"},
        {"role": "user", "content": "And 3+3?"},
        {"role": "assistant", "reasoning_content": "Three and three.", "content": "6"},
    ],
    "a turn without reasoning": [
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "4"},
    ],
    "a tool": [
        {"role": "user", "content": "Warm in Rome?"},
        {
            "role": "assistant",
            "reasoning_content": "I look it up.",
            "content": "",
            "tool_calls": [_CALL],
        },
        {"role": "tool", "name": "weather", "content": "28 degrees"},
        {"role": "assistant", "reasoning_content": "28 is warm.", "content": "Yes."},
    ],
}


def golden_text(case: Case) -> str:
    """Return the renderings of the conversations by the family, as text."""
    return "\n".join(_parts(case))


def _parts(case: Case) -> Iterator[str]:
    tokenizer = make_small_tokenizer(case)
    for name, messages in CONVERSATIONS.items():
        if not case.reasoning:
            messages = [{k: v for k, v in m.items() if k != "reasoning_content"} for m in messages]
            if name == "a turn without reasoning":
                continue
        yield f"=== {name}"
        try:
            passes = render_passes(messages, tokenizer, chat_template_kwargs=case.kwargs)
        except ChatFormatError as error:
            reason = next(reason for part, reason in REFUSALS.items() if part in str(error))
            yield f"refused: {reason}\n"
            continue
        for number, item in enumerate(passes):
            for kind, text in zip(("context", "completion"), texts(tokenizer, item), strict=True):
                # Harmony's, Muse's and Llama 3.2's system messages hold today's date.
                for form in ("%Y-%m-%d", "%d %b %Y"):
                    text = text.replace(datetime.now().strftime(form), "(today)")
                yield f"--- turn {number}, {kind}\n{text}■"
        yield ""


def main() -> None:
    """Write every file."""
    FOLDER.mkdir(exist_ok=True)
    for case in CASES.values():
        (FOLDER / f"{case.slug}.txt").write_text(golden_text(case), "utf-8")


if __name__ == "__main__":
    main()
