"""The marks of reasoning inside texts: ``<think>`` and ``</think>``, and those of other formats."""

from __future__ import annotations

import re

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"

_QUOTED = re.compile(rf"(?<=[`'\"]){THINK_CLOSE}(?=[`'\"])")
_FIRST_MARK = re.compile(r"\s*([<\[◁][^<>\[\]◁▷\n]{1,40}[>\]▷])")
_WORD = re.compile(r"[a-z]+")
REASONING_WORDS = frozenset(
    {
        "analysis",
        "cot",
        "monologue",
        "rationale",
        "reasoning",
        "reflection",
        "scratchpad",
        "think",
        "thinking",
        "thought",
        "thoughts",
    }
)
"""The words by which formats call reasoning."""


def words_of(name: str) -> set[str]:
    """Return the words of a mark or a key, in lower case.

    >>> sorted(words_of("<|begin_of_thought|>")), sorted(words_of("chainOfThought"))
    (['begin', 'of', 'thought'], ['chain', 'of', 'thought'])
    """
    return set(_WORD.findall(re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()))


def split_inline(content: str) -> tuple[str, str] | None:
    """Return the ``<think>..</think>`` that begins a content and the rest, None if nothing does.

    Raises:
        ValueError: if it can't be told where the reasoning ends.

    >>> split_inline("<think>\\nNot at a quoted `</think>`.\\n</think>\\n\\nYes.")
    ('Not at a quoted `</think>`.', 'Yes.')
    """
    text = content.lstrip()
    if not text.startswith(THINK_OPEN):
        return None
    text = text.removeprefix(THINK_OPEN)
    quoted = {match.start() for match in _QUOTED.finditer(text)}
    marks = {match.start() for match in re.finditer(THINK_CLOSE, text)}
    if not marks:
        raise ValueError(
            f"has content that opens {THINK_OPEN} and never closes it with {THINK_CLOSE}; close it"
        )
    if len(marks - quoted) != 1:
        raise ValueError(
            f"has content that opens {THINK_OPEN} and has {THINK_CLOSE} {len(marks)} times after "
            f"it, {len(quoted)} of them in quotation marks, so it can't be told where the "
            "reasoning ends; give the reasoning as 'reasoning_content'"
        )
    [end] = marks - quoted
    return text[:end].strip("\n"), text[end + len(THINK_CLOSE) :].lstrip("\n")


def closes_reasoning(text: str) -> bool:
    """Return whether a text has a ``</think>`` that isn't in quotation marks.

    >>> closes_reasoning("Add.</think>4"), closes_reasoning("It ends at `</think>`.")
    (True, False)
    """
    return text.count(THINK_CLOSE) > len(_QUOTED.findall(text))


def other_mark(content: str) -> str | None:
    """Return the mark of another format that begins reasoning at the start of a content, or None.

    >>> other_mark("<thinking>Add.</thinking>4"), other_mark("<|channel|>analysis<|message|>Add.")
    ('<thinking>', '<|channel|>')
    """
    found = _FIRST_MARK.match(content)
    if found is None or found[1] == THINK_OPEN:
        return None
    return found[1] if words_of(found[1]) & (REASONING_WORDS | {"channel"}) else None
