"""Docstrings as the Python page shows them: an extension of griffe, which reads them.

An example in a docstring is a paragraph that begins with ``>>>``. Markdown would take it for a
quotation, so it is fenced here.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_SESSION = re.compile(r"^([ \t]*)>>> .*\n?(?:[ \t]*\S.*\n?)*", re.MULTILINE)
_ROLE = re.compile(r":\w+:`~?([^`]+)`")


class Docstrings(griffe.Extension):
    """Fences the sessions of docstrings."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change the docstring of an object after it has been read."""
        if obj.docstring:
            obj.docstring.value = with_fences(obj.docstring.value)


def with_fences(text: str) -> str:
    """Return the docstring with fenced sessions, and roles of Sphinx as plain names."""
    text = _ROLE.sub(r"`\1`", text)
    return _SESSION.sub(lambda found: _fenced(found[1], found[0].rstrip("\n")), text)


def _fenced(indent: str, session: str) -> str:
    return f"{indent}```pycon\n{session}\n{indent}```\n"
