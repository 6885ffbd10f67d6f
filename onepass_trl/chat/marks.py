"""The marks of reasoning inside texts: ``<think>`` and ``</think>``, and those of other formats."""

from __future__ import annotations

import re

from onepass_trl.wording import counted

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"

_QUOTED = re.compile(rf"(?<=[`'\"]){THINK_CLOSE}(?=[`'\"])")
_MARK = re.compile(r"[<\[◁][^<>\[\]◁▷\n]{1,40}[>\]▷]")
_LINK = re.compile(r"\[[^\[\]]*\]\(\S+?\)")  # of Markdown
_OPENER = re.compile(
    r"(?<!['\"\u2018\u201c])([<\[◁])([^\s<>\[\]◁▷/]{1,40})[^<>\[\]◁▷\n]{0,40}([>\]▷])"
)
_CODE = re.compile(r"^ *(```+|~~~+).*?(?:^ *\1|\Z)|`[^`\n]+`", re.MULTILINE | re.DOTALL)
_WORD_CHARACTER = re.compile(r"\w")
_SENTENCE = re.compile(r"\w\W*[.!?\u3002\uff01\uff1f\n]")
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
            f"has content that opens {THINK_OPEN} and has {THINK_CLOSE} "
            f"{counted(len(marks), 'time')} after it, {len(quoted)} of them in quotation marks, so "
            "it can't be told where the reasoning ends; give the reasoning as 'reasoning_content'"
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
    text = content.lstrip()
    found = _MARK.match(text)
    if found is None or found[0] == THINK_OPEN or _LINK.match(text):
        return None
    return found[0] if words_of(found[0]) & (REASONING_WORDS | {"channel"}) else None


def thought_within(content: str) -> str | None:
    """Return the mark of another format that begins reasoning within a content, or None.

    Reasoning is a text from a mark to the one that closes it, which begins a line or has the end of
    a sentence. What only names such marks is none: code, quotations, "between <thought> and
    </thought>".

    >>> thought_within("Sure.\\n<thinking>Add</thinking>4"), thought_within("A `<cot>Hm.</cot>`.")
    ('<thinking>', None)
    """
    prose = _CODE.sub("`", content)
    last = {mark[0]: mark.start() for mark in _MARK.finditer(prose)}
    position = 0
    while mark := _OPENER.search(prose, position):
        position = begin = mark.end()
        bracket, name, end = mark.groups()
        if bracket + name + end == THINK_OPEN or not words_of(name) & REASONING_WORDS:
            continue
        line = prose.rfind("\n", 0, mark.start()) + 1
        begins_line = not prose[line : mark.start()].strip()
        evidence = _WORD_CHARACTER if begins_line else _SENTENCE
        for closer in (f"{bracket}/{name}{end}", re.sub("begin|start", "end", mark[0])):
            if closer == mark[0] or last.get(closer, 0) < begin:
                continue
            position = prose.find(closer, begin)
            if evidence.search(prose, begin, position):
                return mark[0]
    return None
